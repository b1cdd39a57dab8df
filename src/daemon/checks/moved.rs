//! What has moved, on the old server: where it is, whether it comes, and what goes with it.

use std::net::{IpAddr, SocketAddr};

use super::SETTINGS;
use super::links::{before, ip};
use super::words::{Words, quoted};
use crate::daemon::early::Terms;
use crate::daemon::held::{self, Held};
use crate::daemon::setup::{Uplinks, check_old};
use crate::kernel::netlink::{Family, Link, Nature, Netlink, RouteKind, TABLE_LOCAL};
use crate::kernel::plan::PUBLIC;
use crate::kernel::sockets;
use crate::model::finding::Finding;
use crate::model::moved::{Move, TCP, Transport};
use crate::model::prefix::Prefix;
use crate::settings::config::Config;

/// Moves that have a line of their own.
const SHOWN: usize = 16;

/// The login's port, which seldom is what moves.
const SSH: u16 = 22;

/// What is known of this server's addresses.
pub(super) struct Place<'a> {
    pub(super) held: &'a Held,
    pub(super) leased: &'a [IpAddr],
    pub(super) links: &'a [Link],
    pub(super) natures: &'a [Nature],
    pub(super) uplinks: Option<&'a Uplinks>,
}

impl Place<'_> {
    fn link(&self, index: u32) -> Option<&Link> {
        self.links.iter().find(|link| link.index == index)
    }

    /// Why nothing arrives on an interface by itself, if that is so.
    fn is_dead(&self, index: u32) -> Option<&'static str> {
        let nature = self.natures.iter().find(|it| it.index == index)?;
        match nature.kind.as_deref()? {
            "dummy" => Some("a dummy, where nothing arrives"),
            "ifb" => Some("an ifb, where nothing arrives by itself"),
            "bridge" if self.natures.iter().all(|it| it.master != Some(index)) => {
                Some("a bridge without ports, where nothing arrives")
            }
            _ => None,
        }
    }

    /// The addresses of a family by which others reach this server, on its uplinks.
    fn on_uplinks(&self, v4: bool) -> Vec<IpAddr> {
        let on = |index| self.uplinks.is_some_and(|them| them.contains(index));
        let held = self.held.iter().filter(|it| on(it.index));
        let addrs = held.map(|it| it.addr).filter(|it| it.is_ipv4() == v4);
        addrs.filter(|it| !is_link_local(*it)).collect()
    }

    /// The private address that a provider may translate a public one to.
    pub(super) fn behind_nat(&self, public: IpAddr) -> Option<IpAddr> {
        let own = self.on_uplinks(public.is_ipv4());
        let hidden = !own.is_empty() && own.iter().all(|it| is_private(*it));
        own.first()
            .copied()
            .filter(|_| hidden && public.is_ipv4() && !is_private(public))
    }
}

fn is_link_local(addr: IpAddr) -> bool {
    match addr {
        IpAddr::V4(addr) => addr.is_link_local(),
        IpAddr::V6(addr) => addr.is_unicast_link_local(),
    }
}

/// RFC 1918 and RFC 6598.
fn is_private(addr: IpAddr) -> bool {
    match addr {
        IpAddr::V4(addr) => {
            addr.is_private() || (addr.octets()[0] == 100 && addr.octets()[1] & 0xc0 == 64)
        }
        IpAddr::V6(addr) => addr.is_unique_local(),
    }
}

/// Where what has moved is.
pub(super) fn addresses(moves: &[Move], place: &Place<'_>, words: &Words) -> Vec<Finding> {
    let mut prefixes: Vec<Prefix> = moves.iter().map(|moved| moved.prefix).collect();
    prefixes.sort_unstable();
    prefixes.dedup();
    let mut found = Vec::new();
    let here = |prefix: &&Prefix| place.held.within(**prefix).next().is_some();
    for prefix in prefixes.iter().filter(here).take(SHOWN) {
        let Some(held) = place.held.within(*prefix).next() else {
            continue;
        };
        let link = place.link(held.index).map_or("?", |link| &link.name);
        let mut text = format!("is on {link}");
        if let Some(dead) = place.is_dead(held.index) {
            text = format!("{text}, {dead}: it is taken where it comes in");
        }
        if place.leased.contains(&held.addr) {
            text.push_str(
                ", with a lease (DHCP, router advertisements): let its client go on, the lease \
                 stays with it",
            );
        }
        if place.on_uplinks(prefix.is_ipv4()) == [held.addr] {
            text.push_str(", the only address there: what this server does itself stays with it");
        }
        found.push(Finding::ok("address", prefix, text));
    }
    found.extend(absent(moves, place, words));
    found
}

/// What this server does not have.
fn absent(moves: &[Move], place: &Place<'_>, words: &Words) -> Vec<Finding> {
    let mut found = Vec::new();
    let lines = |local: &[Prefix], moves: &[Move]| held::absent(moves, place.held, local);
    let uplink = place.uplinks.and_then(Uplinks::first);
    let by = uplink.map_or("eth0", |link| link.name.as_str());
    for moved in moves {
        let text = lines(&[], std::slice::from_ref(moved));
        if text.is_empty() {
            continue;
        }
        let addr = moved.prefix.first();
        if let Some(private) = place.behind_nat(addr).filter(|_| moved.prefix.is_single()) {
            let text = format!(
                "is on no interface, and {by} has {private}: where a provider translates one to \
                 the other (1:1 NAT), packets come for {private}"
            );
            let new = words.replacing(&addr.to_string(), &private.to_string());
            let remedy = match words.hold(&addr.to_string()) {
                true => new,
                false => {
                    let addr = addr.to_string().replace('.', r"\.");
                    format!(r"sed -i 's/\b{addr}\b/{private}/g' {SETTINGS}")
                }
            };
            found.push(Finding::warn("nat", moved.prefix, text, remedy));
            continue;
        }
        let meant = held::with_port(addr, place.held).filter(|_| moved.prefix.is_single());
        if let Some(meant) = meant.filter(|_| words.hold(&addr.to_string())) {
            let text = format!(
                "is on no interface: if its end is meant as a port, the address stands in \
                 brackets, {meant}"
            );
            let remedy = words.replacing(&addr.to_string(), &meant);
            found.push(Finding::warn("address", moved.prefix, text, remedy));
            continue;
        }
        let text = "is on no interface: packets come only if the network routes them here";
        let remedy = match moved.prefix.is_single() {
            true => format!("ip addr add {} dev {}", network(moved.prefix), quoted(by)),
            false if moved.prefix.is_ipv4() => {
                format!("ip route add local {} dev lo", moved.prefix)
            }
            false => format!("ip -6 route add local {} dev lo", moved.prefix),
        };
        found.push(Finding::warn("address", moved.prefix, text, remedy));
    }
    found.sort_by(|a, b| a.object.cmp(&b.object));
    found.dedup();
    found.truncate(SHOWN);
    found
}

/// A single address with its length.
fn network(prefix: Prefix) -> String {
    let bits = if prefix.is_ipv4() { 32 } else { 128 };
    format!("{}/{bits}", prefix.first())
}

/// The prefixes that a route makes this server's own.
pub(super) fn local_prefixes(netlink: &Netlink) -> Vec<Prefix> {
    let families = [Family::V4, Family::V6].into_iter();
    let routes = families.flat_map(|it| netlink.routes(it, TABLE_LOCAL).unwrap_or_default());
    let prefixes = routes.filter_map(|route| held::local_prefix(&route));
    prefixes.filter(|prefix| !prefix.is_single()).collect()
}

/// Whether a move takes what this server cannot do without.
pub(super) fn own(
    netlink: &Netlink,
    config: &Config,
    endpoints: &[Option<SocketAddr>],
    words: &Words,
) -> Option<Finding> {
    let refused = check_old(netlink, &Terms::of(config), endpoints);
    let reason = match refused {
        Ok(None) => return None,
        Ok(Some(reason)) => reason,
        Err(error) => error.to_string(),
    };
    let ports = served();
    // The others may stay as they are.
    let named = |moved: &Move| {
        let moved = format!("--move {moved} ");
        reason.starts_with(&moved) || !reason.starts_with("--move ")
    };
    let moves = config.peers.iter().flat_map(|peer| &peer.moves);
    let parts: Vec<String> = moves
        .map(|moved| match moved.ports.is_empty() && named(moved) {
            true => Move {
                ports: ports.iter().map(|&port| port..=port).collect(),
                transport: Some(Transport::Tcp),
                ..moved.clone()
            }
            .to_string(),
            false => moved.to_string(),
        })
        .collect();
    let remedy = words.with("move", &parts);
    Some(Finding::fail("own", "--move", reason, remedy))
}

/// The TCP ports that something listens on here, but for logins.
fn served() -> Vec<u16> {
    let listening = sockets::listening().unwrap_or_default();
    let ports: Vec<u16> = listening.into_iter().filter(|&port| port != SSH).collect();
    match ports.as_slice() {
        [] => vec![80, 443],
        some => some.iter().copied().take(16).collect(),
    }
}

/// Whether what comes from a moved address has a way to clients.
pub(super) fn ways_out(netlink: &Netlink, moves: &[Move], held: &Held) -> Vec<Finding> {
    let mut found = Vec::new();
    for far in PUBLIC {
        let of_family = moves
            .iter()
            .filter(|it| it.prefix.is_ipv4() == far.is_ipv4());
        let sources = of_family.filter_map(|it| held.within(it.prefix).next());
        for source in sources.take(SHOWN).map(|it| it.addr) {
            let refused = match netlink.route_get(far, None, Some(source)) {
                Ok(route) if route.kind == RouteKind::Unicast => continue,
                Ok(_) => "it is dropped".to_owned(),
                Err(error) => error.to_string(),
            };
            let text = format!("what comes from it has no way to clients: {refused}");
            let rules = netlink.rules(Family::of(far)).unwrap_or_default();
            let remedy = match netlink.route_get(far, None, None) {
                Ok(_) => format!(
                    "{} rule add pref {} from {source} lookup main",
                    ip(far),
                    before(&rules)
                ),
                Err(_) => format!("{} route", ip(far)),
            };
            found.push(Finding::fail("route", source, text, remedy));
        }
    }
    found
}

/// Whether somebody's next login goes to the new server: `login` are the ends of the one that this
/// is typed in, its client's first.
pub(super) fn login(
    login: Option<(SocketAddr, SocketAddr)>,
    moves: &[Move],
    held: &Held,
) -> Option<Finding> {
    let (_, server) = login?;
    let takes =
        |moved: &Move| moved.prefix.contains(server.ip()) && moved.takes(TCP, Some(server.port()));
    if !moves.iter().any(takes) {
        return None;
    }
    let text = "your login comes in by what moves: this session goes on, the next one reaches the \
                new server; log in by another address from now on";
    let stays = |addr: &IpAddr| {
        let moved = moves.iter().any(|moved| moved.prefix.contains(*addr));
        !moved && !addr.is_loopback() && !is_link_local(*addr)
    };
    let other = held.iter().map(|it| it.addr).find(stays);
    let port = match server.port() {
        SSH => String::new(),
        port => format!("-p {port} "),
    };
    let remedy = match other {
        Some(other) => format!("ssh {port}{other}"),
        None => "ss -tnp state established '( sport = :ssh )'".to_owned(),
    };
    Some(Finding::warn("login", server, text, remedy))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::netlink::Address;
    use crate::model::finding::Grade;

    fn held(texts: &[(u32, &str)]) -> Held {
        let address = |&(index, text): &(u32, &str)| Address {
            index,
            addr: text.parse().unwrap(),
            prefix: 24,
        };
        Held::new(texts.iter().map(address).collect())
    }

    fn moves(texts: &[&str]) -> Vec<Move> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn a_login_by_what_moves_is_seen_and_another_way_in_named() {
        let here = held(&[(2, "192.0.2.1"), (2, "192.0.2.5"), (1, "127.0.0.1")]);
        let by = |server: &str| {
            let client = "203.0.113.9:5000".parse().unwrap();
            Some((client, server.parse().unwrap()))
        };
        let whole = moves(&["192.0.2.5"]);
        let found = login(by("192.0.2.5:22"), &whole, &here).unwrap();
        assert_eq!(found.remedy.as_deref(), Some("ssh 192.0.2.1"));
        let found = login(by("192.0.2.5:2222"), &whole, &here).unwrap();
        assert_eq!(found.remedy.as_deref(), Some("ssh -p 2222 192.0.2.1"));
        assert_eq!(login(by("192.0.2.1:22"), &whole, &here), None);
        assert_eq!(login(None, &whole, &here), None);
        let web = moves(&["192.0.2.5:80,443/tcp"]);
        assert_eq!(login(by("192.0.2.5:22"), &web, &here), None);
    }

    #[test]
    fn an_address_is_told_where_it_is_and_what_that_means() {
        let link = |index, name: &str| Link {
            index,
            name: name.into(),
            mtu: 1_500,
            up: true,
            loopback: false,
            link_type: libc::ARPHRD_ETHER,
            mac: None,
            port: false,
            big_tcp: false,
            to_many: false,
        };
        let nature = |index, kind: &str| Nature {
            index,
            kind: Some(kind.into()),
            master: None,
            lower: None,
        };
        let links = [link(2, "eth0"), link(3, "dummy0"), link(4, "br0")];
        let natures = [nature(3, "dummy"), nature(4, "bridge")];
        let words = Words::new(["ipmoved", "--move", "203.0.113.7"].map(str::to_owned));
        let says = |here: &Held, leased: &[IpAddr], text: &str| {
            let uplinks = Uplinks::of(links[0].clone());
            let place = Place {
                held: here,
                leased,
                links: &links,
                natures: &natures,
                uplinks: Some(&uplinks),
            };
            addresses(&moves(&[text]), &place, &words)
        };
        let here = held(&[(2, "192.0.2.1"), (2, "192.0.2.5"), (3, "192.0.2.6")]);
        let found = says(&here, &[], "192.0.2.5:80");
        assert_eq!(found[0].text, "is on eth0");
        let leased = ["192.0.2.5".parse().unwrap()];
        assert!(says(&here, &leased, "192.0.2.5")[0].text.contains("DHCP"));
        assert!(says(&here, &[], "192.0.2.6")[0].text.contains("a dummy"));
        let only = held(&[(2, "192.0.2.5")]);
        assert!(says(&only, &[], "192.0.2.5:80")[0].text.contains("only"));
        let found = says(&here, &[], "198.51.100.9");
        assert_eq!(found[0].result, Grade::Warn);
        let remedy = "ip addr add 198.51.100.9/32 dev eth0";
        assert_eq!(found[0].remedy.as_deref(), Some(remedy));
        // A cloud's public address is on no interface.
        let cloud = held(&[(2, "10.0.0.7")]);
        let found = says(&cloud, &[], "203.0.113.7");
        assert_eq!((found.len(), found[0].name), (1, "nat"));
        let remedy = "ipmoved --move 10.0.0.7";
        assert_eq!(found[0].remedy.as_deref(), Some(remedy));
    }
}
