//! The kernel changes of the new server with `keep` (`--deliver-to keep`), where the moved
//! address is its own, and with `--outgoing`, where programs are bound to it: the address, on the
//! loopback interface.
//!
//! Owns how the host holds it without neighbours noticing:
//!
//! * By default Linux answers ARP on any interface for any address it holds (`arp_ignore` 0), and
//!   puts any of them into its own requests (`arp_announce` 0). On a link that both servers share,
//!   the new one would draw the moved address's packets past the old one. So IPv4 addresses get the
//!   scope host, for which `arp_ignore` 3 does not answer while it goes on answering for every
//!   other address, and `arp_announce` 2 leaves them out of requests. Where an administrator has
//!   set either to something stricter, that does as well, and stays.
//! * IPv6 answers solicitations only for addresses of the interface they arrive on, so it needs
//!   nothing.
//! * The kernel chooses neither as the source of the host's own connections. Scope host sees to
//!   that, and for IPv6 a preferred lifetime of zero.
//!
//! Of a prefix every address is made the host's own by one route (`local PREFIX dev lo`), and so
//! are single addresses if there are more than [`MAX_SINGLE`] of them, prefix by prefix as far as
//! they fill one. ARP and neighbour discovery are answered for these neither, since no interface
//! has such an address. (A program that binds to one address of an IPv6 prefix needs
//! `IPV6_FREEBIND` or `net.ipv6.ip_nonlocal_bind`; the wildcard needs nothing.)
//!
//! Interfaces that appear later keep their ARP settings (`ip-sysctl`: `conf/default`).

use std::collections::HashSet;

use super::PlanError;
use crate::kernel::Desired;
use crate::kernel::change::{Change, Interface, LocalPrefix, QuietAddress, Sysctl, read_sysctl};
use crate::kernel::netlink::{Family, Link, Netlink};
use crate::model::prefix::Prefix;

/// Does not answer for addresses of scope host; for every other as with 0.
const ARP_IGNORE: (&str, u32) = ("arp_ignore", 3);
/// Always announces the best local address for the target, never just the packet's source.
const ARP_ANNOUNCE: (&str, u32) = ("arp_announce", 2);

/// More single addresses than this are held by prefixes where they fill some: the kernel and this
/// daemon go through all addresses at times.
const MAX_SINGLE: usize = 64;

/// The changes that make this host hold `wanted`. Addresses that it has of its own accord stay as
/// they are.
///
/// `made` is the content of the journal. It tells the daemon's own addresses from others.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn plan(
    netlink: &Netlink,
    wanted: &[Prefix],
    tun: &Link,
    made: &[Change],
) -> Result<Vec<Desired>, PlanError> {
    let links = netlink.links()?;
    let Some(lo) = links.iter().find(|link| link.loopback) else {
        return Ok(Vec::new());
    };
    let there = netlink.addresses()?;
    let ours: HashSet<Prefix> = held(made).collect();
    let there: HashSet<Prefix> = there.iter().map(|held| held.addr.into()).collect();
    let wanted = wanted.iter().copied();
    let mine = filled(wanted.filter(|it| ours.contains(it) || !there.contains(it)));
    let mut desired = Vec::new();
    if mine.iter().any(Prefix::is_ipv4) {
        let ethernet = |link: &&Link| {
            link.link_type == libc::ARPHRD_ETHER && !link.loopback && link.index != tun.index
        };
        // Before the address, so that no neighbour hears of it.
        for link in links.iter().filter(ethernet) {
            let quiet = [ARP_IGNORE, ARP_ANNOUNCE];
            desired.extend(quiet.into_iter().filter_map(|it| sysctl(link, it, made)));
        }
    }
    let hold = |prefix: Prefix| {
        let on = Interface::from(lo);
        if prefix.is_single() {
            Change::Address(QuietAddress {
                on,
                addr: prefix.first(),
                prefix: prefix.len(),
            })
        } else {
            Change::LocalPrefix(LocalPrefix { on, prefix })
        }
    };
    desired.extend(mine.into_iter().map(hold));
    Ok(desired.into_iter().map(Desired::lasting).collect())
}

/// The prefixes, with as many of the single ones as possible in longer ones that they fill if there
/// are more than [`MAX_SINGLE`].
fn filled(prefixes: impl Iterator<Item = Prefix>) -> Vec<Prefix> {
    let mut all: Vec<Prefix> = prefixes.collect();
    all.sort_unstable();
    all.dedup();
    if all.iter().filter(|prefix| prefix.is_single()).count() <= MAX_SINGLE {
        return all;
    }
    let mut out: Vec<Prefix> = Vec::with_capacity(all.len());
    for mut prefix in all {
        // Two halves are next to each other in order.
        while let Some(&half) = out.last()
            && half.len() == prefix.len()
            && half != prefix
            && prefix.len() > 0
            && Prefix::of(half.first(), half.len() - 1).contains(prefix.first())
        {
            out.pop();
            prefix = Prefix::of(half.first(), half.len() - 1);
        }
        if out.last().is_none_or(|last| !last.covers(&prefix)) {
            out.push(prefix);
        }
    }
    out
}

/// The addresses and prefixes among the changes in `made`.
pub fn held(made: &[Change]) -> impl Iterator<Item = Prefix> {
    made.iter().filter_map(|change| match change {
        Change::Address(address) => Some(address.addr.into()),
        Change::LocalPrefix(local) => Some(local.prefix),
        Change::Clsact(_)
        | Change::Filter(_)
        | Change::Rule(_)
        | Change::Route(_)
        | Change::Sysctl(_) => None,
    })
}

/// Whether a change is one of those that [`plan`] makes.
pub fn is_part(change: &Change) -> bool {
    match change {
        Change::Address(_) | Change::LocalPrefix(_) => true,
        Change::Sysctl(sysctl) => [ARP_IGNORE.0, ARP_ANNOUNCE.0]
            .iter()
            .any(|name| sysctl.path.rsplit('/').next() == Some(name)),
        Change::Clsact(_) | Change::Filter(_) | Change::Rule(_) | Change::Route(_) => false,
    }
}

/// Whether a change is one of those that [`plan`] makes for addresses of this family.
pub fn is_part_for(change: &Change, family: Family) -> bool {
    let of = match change {
        Change::Address(address) => Family::of(address.addr),
        Change::LocalPrefix(local) => Family::of(local.prefix.first()),
        Change::Sysctl(_)
        | Change::Clsact(_)
        | Change::Filter(_)
        | Change::Rule(_)
        | Change::Route(_) => Family::V4,
    };
    is_part(change) && of == family
}

/// The change that strengthens a setting of an interface, if it is too weak. The stronger of the
/// interface's setting and the one for all interfaces counts.
fn sysctl(link: &Link, (name, to): (&str, u32), made: &[Change]) -> Option<Change> {
    let path = format!("net/ipv4/conf/{}/{name}", link.name);
    let value = |path: &str| read_sysctl(path).ok()?.parse::<u32>().ok();
    let from = value(&path)?;
    let counts = from.max(value(&format!("net/ipv4/conf/all/{name}")).unwrap_or(0));
    let change = Change::Sysctl(Sysctl {
        path,
        from: from.to_string(),
        to: to.to_string(),
        on: Some(Interface::from(link)),
    });
    let ours = made.iter().any(|known| known.same_object(&change));
    let weak = if name == ARP_IGNORE.0 {
        counts == 0
    } else {
        counts < to
    };
    (ours || weak).then_some(change)
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::kernel::Host;
    use crate::kernel::netlink::Address;
    use crate::kernel::testing::{
        Router, Scratch, Tun, bound, in_fresh_namespace, rename_link, set_link_down, snapshot,
    };
    use crate::lab::wiring::Wiring;

    const HERE: [(&str, u8); 1] = [("192.0.2.2", 24)];
    const GATEWAY: [(&str, u8); 1] = [("192.0.2.254", 24)];
    /// In the same network: the old server is next door.
    const MOVED: [u8; 4] = [192, 0, 2, 5];

    fn socket(addr: [u8; 4]) -> std::net::UdpSocket {
        bound((IpAddr::from(addr), 53).into())
    }

    #[test]
    fn a_shared_network_does_not_learn_of_a_kept_address() {
        in_fresh_namespace(|| {
            let netlink = Netlink::new().unwrap();
            let router = Router::new(&netlink, &HERE, &GATEWAY);
            let tun = Tun::new(&netlink, "tun0", false);
            let neighbour = router.udp("192.0.2.254:4000");
            let to_moved = || neighbour.send_to(b"for the old server", (IpAddr::from(MOVED), 53));
            let settings = || {
                ["up0/arp_ignore", "up0/arp_announce"]
                    .map(|name| read_sysctl(&format!("net/ipv4/conf/{name}")).unwrap())
            };
            // Those that may be somebody else's come last, until that is known. Link-local ones the
            // kernel adds in its own time.
            let addresses = || {
                let mut all = netlink.addresses().unwrap();
                all.retain(
                    |held| !matches!(held.addr, IpAddr::V6(v6) if v6.is_unicast_link_local()),
                );
                all.sort_by_key(|held| held.addr);
                all
            };
            let before = (snapshot(&netlink), addresses(), settings());
            let scratch = Scratch::new();
            let mut host = Host::open(&scratch.0).unwrap();
            let keep = |host: &mut Host, addrs: &[Prefix]| {
                let desired = plan(host.netlink(), addrs, &tun.link, host.made()).unwrap();
                host.reconcile_part(is_part, desired).unwrap();
            };
            keep(&mut host, &[IpAddr::from(MOVED).into()]);
            for change in host.made() {
                assert_eq!(change.check(), Ok(()), "the next start undoes it");
            }
            let own = socket(MOVED);
            to_moved().unwrap();
            assert!(own.recv(&mut [0; 100]).is_err(), "ARP was answered");
            assert!(!router.has_seen(&[0; 1500]));
            // Nobody has this neighbour's address: only ARP requests leave, and the moved address
            // must not be their source.
            let _ = own.send_to(b"anybody", "192.0.2.77:9");
            assert!(!router.has_seen(&MOVED), "it was announced");
            // The host still answers for every other address.
            neighbour.send_to(b"hello", "192.0.2.2:53").unwrap();
            assert_eq!(socket([192, 0, 2, 2]).recv(&mut [0; 9]).ok(), None);
            let other = socket([192, 0, 2, 2]);
            neighbour.send_to(b"hello", "192.0.2.2:53").unwrap();
            assert_eq!(other.recv(&mut [0; 9]).unwrap(), 5);
            // The kernel does not choose it as a source either, unless a program asks for it.
            let route = netlink.route_get("192.0.2.254".parse().unwrap(), None, None);
            assert_eq!(route.unwrap().prefsrc, Some("192.0.2.2".parse().unwrap()));
            keep(&mut host, &[]);
            let after = (snapshot(&netlink), addresses(), settings());
            assert_eq!(after, before);

            // Without these precautions the neighbour does learn of it, so the test above means
            // something.
            let lo = Address {
                index: 1,
                addr: MOVED.into(),
                prefix: 32,
            };
            netlink.add_address(&lo).unwrap();
            drop(own);
            let own = socket(MOVED);
            std::thread::sleep(std::time::Duration::from_millis(1100));
            to_moved().unwrap();
            assert_eq!(own.recv(&mut [0; 100]).unwrap(), 18);
            router.has_seen(&MOVED);
            let _ = own.send_to(b"anybody", "192.0.2.78:9");
            assert!(router.has_seen(&MOVED));
        });
    }

    #[test]
    fn an_interface_that_was_renamed_is_repaired_and_gets_its_settings_back() {
        in_fresh_namespace(|| {
            let netlink = Netlink::new().unwrap();
            let _router = Router::new(&netlink, &HERE, &GATEWAY);
            let tun = Tun::new(&netlink, "tun0", false);
            let setting = |name| read_sysctl(&format!("net/ipv4/conf/{name}/arp_ignore")).unwrap();
            let rename = |from: &str, to| {
                let link = netlink.link_by_name(from).unwrap().unwrap();
                set_link_down(&netlink, link.index).unwrap();
                rename_link(&netlink, link.index, to).unwrap();
                netlink.set_link_up(link.index).unwrap();
            };
            let scratch = Scratch::new();
            let mut host = Host::open(&scratch.0).unwrap();
            let keep = |host: &mut Host| {
                let moved = [IpAddr::from(MOVED).into()];
                let desired = plan(host.netlink(), &moved, &tun.link, host.made()).unwrap();
                host.reconcile_part(is_part, desired).unwrap();
            };
            keep(&mut host);
            rename("up0", "wan0");
            crate::kernel::testing::sysctl("net/ipv4/conf/wan0/arp_ignore", "0");
            let repairs = host.repair();
            assert_eq!(
                (repairs.made.len(), repairs.failed.len()),
                (1, 0),
                "{repairs:?}"
            );
            assert_eq!(setting("wan0"), "3");
            // The daemon is killed, and the interface has yet another name at the next start.
            drop(host);
            rename("wan0", "lan0");
            let mut host = Host::open(&scratch.0).unwrap();
            keep(&mut host);
            assert_eq!(setting("lan0"), "3");
            let report = host.undo_all().unwrap();
            assert!(report.left.is_empty(), "{report:?}");
            assert_eq!(setting("lan0"), "0");
        });
    }

    #[test]
    fn settings_that_an_administrator_made_stricter_stay() {
        in_fresh_namespace(|| {
            let netlink = Netlink::new().unwrap();
            let _router = Router::new(&netlink, &HERE, &GATEWAY);
            let tun = Tun::new(&netlink, "tun0", false);
            crate::kernel::testing::sysctl("net/ipv4/conf/up0/arp_ignore", "1");
            crate::kernel::testing::sysctl("net/ipv4/conf/all/arp_announce", "2");
            let desired = plan(&netlink, &[IpAddr::from(MOVED).into()], &tun.link, &[]).unwrap();
            let changes: Vec<String> = desired.iter().map(|it| it.change.to_string()).collect();
            assert_eq!(changes, ["address 192.0.2.5/32 on lo"]);
            let v6 = "2001:db8:a::5".parse().unwrap();
            let desired = plan(&netlink, &[v6], &tun.link, &[]).unwrap();
            assert_eq!(desired.len(), 1, "IPv6 needs no more");
            // An address that is there already stays as it is.
            let there = plan(&netlink, &["192.0.2.2".parse().unwrap()], &tun.link, &[]);
            assert!(there.unwrap().is_empty());
        });
    }
}
