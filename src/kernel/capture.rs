//! What the old server needs of its kernel: packets to moved addresses go into the TUN, and what the
//! daemon writes to the TUN goes out of the uplink.
//!
//! Owns the choice of interface and of the filters' places. The addresses stay configured where they
//! are, so ARP and neighbour discovery go on being answered. The filter on the uplink outlives the
//! daemon and then leads into nothing, so that moved addresses fall silent instead of answering
//! with resets.

use std::net::SocketAddr;

use super::Desired;
use super::bpf::BpfError;
use super::change::{BpfFilter, Change, Clsact, Interface};
use super::netlink::{
    Direction, Family, Filter, Link, Netlink, NetlinkError, RouteKind, TABLE_MAIN,
};
use super::programs::{self, NAME_PREFIX};
use crate::model::moved::Move;

/// Preference of the daemon's filters, unless a foreign one stands before it: low, to run before
/// filters that the kernel numbers (from 49152 down), with room for administrators to be earlier.
pub const FILTER_PRIORITY: u16 = 40;

/// Handle of the daemon's filters within their preference.
pub const FILTER_HANDLE: u32 = 1;

/// Length of the Ethernet header, in bytes.
const ETHERNET_HEADER: u32 = 14;

/// `ARPHRD_RAWIP`: cellular modems.
const ARPHRD_RAWIP: u16 = 519;

/// Why it cannot be said what is wanted.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The kernel cannot be asked.
    #[error("cannot ask the kernel: {0}")]
    Netlink(#[from] NetlinkError),
    /// A program cannot be loaded.
    #[error(transparent)]
    Bpf(#[from] BpfError),
    /// An interface whose packets the programs cannot read.
    #[error(
        "interface {name} is of link-layer type {link_type}, which ipmoved cannot use; name an Ethernet, PPP or raw IP interface with --uplink"
    )]
    LinkType {
        /// Its name.
        name: String,
        /// `ARPHRD_*`.
        link_type: u16,
    },
    /// No place is left among the filters.
    #[error("every filter preference on {0} is taken; remove a filter")]
    NoPriority(String),
    /// Rules leave no place for ours.
    #[error("{0} rule with preference {1} leaves no room before it; give it a higher preference")]
    NoRulePriority(Family, u32),
}

/// What the old server needs: capture on `uplink`, the way back from `tun`.
///
/// `tunnel` are the tunnel's own ends on this host, whose datagrams are never captured. The TUN must
/// exist. Nothing is changed yet, but the programs are in the kernel.
///
/// # Errors
/// If the kernel refuses a program, or `uplink` is of a kind that cannot be used.
pub fn plan(
    netlink: &Netlink,
    moves: &[Move],
    uplink: &Link,
    tun: &Link,
    tunnel: &[SocketAddr],
) -> Result<Vec<Desired>, PlanError> {
    let l2 = l2_header(uplink)?;
    let back = programs::return_path(moves, l2, uplink.index)?;
    let capture = programs::capture(moves, l2, tun.index, tunnel)?;
    let on_tun = filter(netlink, tun, Direction::Ingress, back.name())?;
    let on_uplink = filter(netlink, uplink, Direction::Ingress, capture.name())?;
    Ok(vec![
        // The way back first: what is captured may be answered at once.
        Desired::with_tun(clsact(tun)),
        Desired::with_tun(on_tun).program(back.load()?),
        Desired::lasting(clsact(uplink)),
        Desired::lasting(on_uplink).program(capture.load()?),
    ])
}

/// Length of the header before the IP header on an interface, in bytes.
///
/// # Errors
/// If the programs do not know that kind of interface.
pub fn l2_header(link: &Link) -> Result<u32, PlanError> {
    match link.link_type {
        libc::ARPHRD_ETHER => Ok(ETHERNET_HEADER),
        libc::ARPHRD_NONE | libc::ARPHRD_PPP | ARPHRD_RAWIP => Ok(0),
        link_type => Err(PlanError::LinkType {
            name: link.name.clone(),
            link_type,
        }),
    }
}

/// Interfaces of a family's default routes in the main table, the preferred one first.
pub(super) fn default_routes(netlink: &Netlink, family: Family) -> Result<Vec<u32>, NetlinkError> {
    let mut routes: Vec<_> = netlink
        .routes(family, TABLE_MAIN)?
        .into_iter()
        .filter(|route| route.dst.1 == 0 && route.kind == RouteKind::Unicast)
        .filter_map(|route| Some((route.metric.unwrap_or(0), route.dev?)))
        .collect();
    routes.sort_by_key(|&(metric, _)| metric);
    Ok(routes.into_iter().map(|(_, dev)| dev).collect())
}

pub(super) fn interface(link: &Link) -> Interface {
    Interface::from(link)
}

pub(super) fn clsact(link: &Link) -> Change {
    Change::Clsact(Clsact {
        on: interface(link),
    })
}

/// The place for a program: the one it has, else one before every foreign filter, else the first
/// free one behind.
pub(super) fn filter(
    netlink: &Netlink,
    link: &Link,
    direction: Direction,
    program: &str,
) -> Result<Change, PlanError> {
    let filters = netlink.filters(link.index, direction)?;
    let own = filters
        .iter()
        .find(|filter| filter.handle != 0 && filter.name.as_deref() == Some(program));
    let (priority, handle) = match own {
        Some(own) => (own.priority, own.handle),
        None => (
            free_priority(&filters).ok_or_else(|| PlanError::NoPriority(link.name.clone()))?,
            FILTER_HANDLE,
        ),
    };
    Ok(Change::Filter(BpfFilter {
        on: interface(link),
        direction,
        priority,
        handle,
        program: program.to_owned(),
    }))
}

fn free_priority(filters: &[Filter]) -> Option<u16> {
    let foreign: Vec<u16> = filters
        .iter()
        .filter(|filter| {
            !filter
                .name
                .as_deref()
                .is_some_and(|name| name.starts_with(NAME_PREFIX))
        })
        // The entry that stands for a whole preference says nothing of whose it is.
        .filter(|filter| filter.handle != 0)
        .map(|filter| filter.priority)
        .collect();
    let before = foreign
        .iter()
        .min()
        .map_or(FILTER_PRIORITY, |&first| FILTER_PRIORITY.min(first - 1));
    if before > 0 {
        return Some(before);
    }
    (1..=u16::MAX).find(|priority| !foreign.contains(priority))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::Host;
    use crate::kernel::testing::{
        Router, Scratch, Tun, bound, in_fresh_namespace, strict_rp_filter,
    };

    const HERE: [(&str, u8); 4] = [
        ("192.0.2.1", 24),
        ("192.0.2.5", 24),
        ("2001:db8:a::1", 64),
        ("2001:db8:a::5", 64),
    ];
    const GATEWAYS: [(&str, u8); 2] = [("192.0.2.254", 24), ("2001:db8:a::fe", 64)];
    /// Family by family: moved address, address of the router.
    const ENDS: [(&str, &str); 2] = [
        ("192.0.2.5", "192.0.2.254"),
        ("2001:db8:a::5", "2001:db8:a::fe"),
    ];

    fn end(addr: &str, port: u16) -> SocketAddr {
        SocketAddr::new(addr.parse().unwrap(), port)
    }

    /// The same packet on its way back: ends exchanged, which leaves every checksum right.
    fn turned(packet: &[u8]) -> Vec<u8> {
        let mut out = packet.to_vec();
        let (addrs, length, l4) = if packet[0] >> 4 == 4 {
            (12, 4, 20)
        } else {
            (8, 16, 40)
        };
        out[addrs..addrs + length].copy_from_slice(&packet[addrs + length..addrs + 2 * length]);
        out[addrs + length..addrs + 2 * length].copy_from_slice(&packet[addrs..addrs + length]);
        out[l4..l4 + 2].copy_from_slice(&packet[l4 + 2..l4 + 4]);
        out[l4 + 2..l4 + 4].copy_from_slice(&packet[l4..l4 + 2]);
        out
    }

    #[test]
    fn a_moved_address_is_captured_and_answered_through_the_uplink() {
        in_fresh_namespace(|| {
            strict_rp_filter();
            let netlink = Netlink::new().unwrap();
            let router = Router::new(&netlink, &HERE, &GATEWAYS);
            let tun = Tun::new(&netlink, "tun0", false);
            strict_rp_filter();
            let moves: Vec<Move> = vec![
                "192.0.2.5:53".parse().unwrap(),
                "2001:db8:a::5".parse().unwrap(),
            ];
            let scratch = Scratch::new();
            let mut host = Host::open(&scratch.0).unwrap();
            let desired = plan(&netlink, &moves, &router.uplink, &tun.link, &[]).unwrap();
            host.reconcile(desired).unwrap();

            for (moved, gateway) in ENDS {
                let own = bound(end(moved, 53));
                let client = router.udp(&end(gateway, 4000).to_string());
                // Found by ARP or neighbour discovery, which A still answers.
                client.send_to(b"question", end(moved, 53)).unwrap();
                let (_, packet) = tun.read(|p| p.ends_with(b"question")).expect("captured");
                assert!(
                    own.recv(&mut [0; 100]).is_err(),
                    "A's own stack must not see it"
                );
                tun.write(&turned(&packet));
                let mut buffer = [0; 100];
                let (length, from) = client.recv_from(&mut buffer).expect("the way back");
                assert_eq!(
                    (&buffer[..length], from),
                    (&b"question"[..], end(moved, 53))
                );
            }
            // The rest of the first address is still A's.
            let own = bound(end("192.0.2.5", 54));
            let client = router.udp("192.0.2.254:4001");
            client.send_to(b"for A", end("192.0.2.5", 54)).unwrap();
            assert_eq!(own.recv(&mut [0; 100]).unwrap(), 5);

            // Killed: captured into nothing, and nothing answers.
            drop((tun, host));
            let own = bound(end("192.0.2.5", 53));
            client.send_to(b"question", end("192.0.2.5", 53)).unwrap();
            assert!(own.recv(&mut [0; 100]).is_err());
            Host::cleanup(&scratch.0).unwrap();
            client.send_to(b"question", end("192.0.2.5", 53)).unwrap();
            assert_eq!(own.recv(&mut [0; 100]).unwrap(), 8);
        });
    }

    #[test]
    fn a_bounced_packet_goes_up_into_the_own_stack() {
        in_fresh_namespace(|| {
            strict_rp_filter();
            let netlink = Netlink::new().unwrap();
            let router = Router::new(&netlink, &HERE, &GATEWAYS);
            let tun = Tun::new(&netlink, "tun0", false);
            strict_rp_filter();
            let moves = ["192.0.2.5", "2001:db8:a::5"];
            let moves: Vec<Move> = moves.iter().map(|text| text.parse().unwrap()).collect();
            let scratch = Scratch::new();
            let mut host = Host::open(&scratch.0).unwrap();
            let desired = plan(&netlink, &moves, &router.uplink, &tun.link, &[]).unwrap();
            host.reconcile(desired).unwrap();
            for (moved, gateway) in ENDS {
                let own = bound(end(moved, 53));
                let client = router.udp(&end(gateway, 4000).to_string());
                client.send_to(b"question", end(moved, 53)).unwrap();
                let (_, packet) = tun.read(|p| p.ends_with(b"question")).expect("captured");
                tun.write(&packet);
                assert_eq!(own.recv(&mut [0; 100]).unwrap(), 8, "{moved}");
            }
            host.undo_all().unwrap();
        });
    }

    #[test]
    fn an_interface_that_cannot_be_used_is_named() {
        in_fresh_namespace(|| {
            let netlink = Netlink::new().unwrap();
            let lo = netlink.link_by_name("lo").unwrap().unwrap();
            let error = l2_header(&lo).unwrap_err().to_string();
            assert!(error.contains("lo is of link-layer type 772"), "{error}");
        });
    }

    #[test]
    fn a_free_preference_before_foreign_filters_is_chosen() {
        let at = |priority, name: &str| Filter {
            kind: "bpf".into(),
            priority,
            handle: 1,
            protocol: 3,
            chain: 0,
            name: Some(name.into()),
            program_id: None,
        };
        assert_eq!(free_priority(&[]), Some(FILTER_PRIORITY));
        assert_eq!(free_priority(&[at(49152, "x")]), Some(FILTER_PRIORITY));
        assert_eq!(free_priority(&[at(10, "x")]), Some(9));
        assert_eq!(free_priority(&[at(1, "x"), at(2, "y")]), Some(3));
        assert_eq!(
            free_priority(&[at(1, "ipmoved_reply")]),
            Some(FILTER_PRIORITY)
        );
    }
}
