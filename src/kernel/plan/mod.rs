//! The kernel changes that each role needs, as values. This only asks the kernel and loads
//! programs.
//!
//! ```text
//!   capture      the old server: moved addresses into the TUN, and from the TUN to their clients
//!   steer        the new server: replies to packets from the TUN go back into it
//!   keep         the new server with `keep`: it holds the moved address itself
//!   loopback     the new server: its own calls of what it holds itself
//!   masquerade   the old server with `nat`: it translates both addresses
//!   own          what the old server's programs remember, before and after a crash
//! ```
//!
//! Owns the places that the plans share: the interfaces that they can use, and where our filters
//! stand among those of others. [`Host`](super::Host) makes the changes and undoes them.

pub mod capture;
pub mod keep;
pub mod loopback;
pub mod masquerade;
pub mod own;
pub mod steer;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::Desired;
use super::bpf::{BpfError, redirects_to_ip6gre};
use super::change::{BpfFilter, Change, Clsact, Interface};
use super::netlink::{Direction, Filter, Link, Netlink, NetlinkError};
use super::programs::NAME_PREFIX;

/// Preference of the daemon's filters, unless a foreign one stands before it. It is low, so that
/// they run before filters that the kernel numbers (from 49152 down), and an administrator can
/// still put others before them.
pub const FILTER_PRIORITY: u16 = 40;

/// Handle of the daemon's filters within their preference.
pub const FILTER_HANDLE: u32 = 1;

/// Addresses that only a default route leads to (RFC 5737, RFC 3849).
pub const PUBLIC: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(203, 0, 113, 1)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
];

/// Length of the Ethernet header, in bytes.
const ETHERNET_HEADER: u32 = 14;

/// `ARPHRD_RAWIP`: cellular modems.
const ARPHRD_RAWIP: u16 = 519;

/// `ARPHRD_IP6GRE`: GRE over IPv6.
const ARPHRD_IP6GRE: u16 = 823;

/// Interfaces whose packets begin with the IP header: WireGuard and others' TUNs (`NONE`), PPP,
/// modems, IPIP and VTI (`TUNNEL`), and other tunnels.
const WITHOUT_HEADER: [u16; 7] = [
    libc::ARPHRD_NONE,
    libc::ARPHRD_PPP,
    ARPHRD_RAWIP,
    libc::ARPHRD_TUNNEL,
    libc::ARPHRD_TUNNEL6,
    libc::ARPHRD_SIT,
    libc::ARPHRD_IPGRE,
];

/// Why no plan could be made.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The kernel cannot be asked.
    #[error("cannot ask the kernel: {0}")]
    Netlink(#[from] NetlinkError),
    /// A program cannot be loaded.
    #[error(transparent)]
    Bpf(#[from] BpfError),
    /// The programs cannot read the packets of an interface.
    #[error(
        "interface {name} is of link-layer type {link_type}, which ipmoved cannot use; name an \
         Ethernet, PPP, tunnel or raw IP interface with --uplink (GRE over IPv6 wants Linux 5.16)"
    )]
    LinkType {
        /// Its name.
        name: String,
        /// `ARPHRD_*`.
        link_type: u16,
    },
    /// Answers that leave by an interface cannot be taken.
    #[error(
        "interface {0} is a GRE tunnel to many (without `remote`), and answers to clients would \
         leave by it with this server's own address; make a tunnel to each other end (`ip link add \
         NAME type gre local ADDRESS remote ADDRESS`), or name another interface with --uplink"
    )]
    ToMany(String),
    /// No place is left among the filters.
    #[error("every filter preference on {0} is taken; remove a filter")]
    NoPriority(String),
}

/// Length of the header before the IP header on an interface, in bytes.
///
/// # Errors
/// If the programs do not know that kind of interface.
pub fn l2_header(link: &Link) -> Result<u32, PlanError> {
    let ip6gre = redirects_to_ip6gre();
    match link.link_type {
        libc::ARPHRD_ETHER => Ok(ETHERNET_HEADER),
        link_type if WITHOUT_HEADER.contains(&link_type) => Ok(0),
        ARPHRD_IP6GRE if ip6gre => Ok(0),
        link_type => Err(PlanError::LinkType {
            name: link.name.clone(),
            link_type,
        }),
    }
}

/// The interfaces that may carry clients' packets, in either direction, but the TUN: every one that
/// is not part of another one, and has packets that the programs can read. An interface counts
/// before it is up or has an address, so that the programs are there when the first packet is.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn carriers(netlink: &Netlink, tun: &Link) -> Result<Vec<Link>, NetlinkError> {
    let mut links = netlink.links()?;
    links.retain(|link| is_carrier(link, tun));
    Ok(links)
}

/// Whether a link is one of [`carriers`].
pub fn is_carrier(link: &Link, tun: &Link) -> bool {
    let own = !link.loopback && link.index != tun.index && !link.port;
    own && l2_header(link).is_ok()
}

fn clsact(link: &Link) -> Change {
    Change::Clsact(Clsact {
        on: Interface::from(link),
    })
}

/// The changes that let an interface carry filters at its ingress: none if others have put the
/// older ingress qdisc there, which takes the same filters.
fn for_ingress(netlink: &Netlink, link: &Link) -> Result<Vec<Desired>, NetlinkError> {
    let qdiscs = netlink.qdiscs(link.index)?;
    let older = qdiscs.iter().any(|kind| kind == "ingress");
    Ok(if older {
        Vec::new()
    } else {
        vec![Desired::lasting(clsact(link))]
    })
}

/// The place for a program: the one where it stands, else one before every foreign filter, else the
/// first free one behind.
fn filter(
    netlink: &Netlink,
    link: &Link,
    direction: Direction,
    program: &str,
) -> Result<Change, PlanError> {
    filter_from(netlink, link, direction, program, FILTER_HANDLE)
}

/// As [`filter`]. If the program does not stand there yet, its handle is the first from this one on
/// that no other has: those below are for others of the same plan, and a killed daemon of the
/// other role may have left its own.
fn filter_from(
    netlink: &Netlink,
    link: &Link,
    direction: Direction,
    program: &str,
    first: u32,
) -> Result<Change, PlanError> {
    let filters = netlink.filters(link.index, direction)?;
    let own = filters
        .iter()
        .find(|filter| filter.handle != 0 && filter.name.as_deref() == Some(program));
    let (priority, handle) = match own {
        Some(own) => (own.priority, own.handle),
        None => {
            let priority =
                free_priority(&filters).ok_or_else(|| PlanError::NoPriority(link.name.clone()))?;
            let taken = |handle| {
                let at = |it: &Filter| (it.priority, it.handle) == (priority, handle);
                filters.iter().any(at)
            };
            let free = (first..).find(|&handle| !taken(handle));
            (priority, free.unwrap_or(first))
        }
    };
    Ok(Change::Filter(BpfFilter {
        on: Interface::from(link),
        direction,
        priority,
        handle,
        program: program.to_owned(),
    }))
}

/// The first handle behind those of filters of the same plan, on one side of their link.
fn behind<'a>(others: impl IntoIterator<Item = &'a Change>, direction: Direction) -> u32 {
    let handles = others.into_iter().filter_map(|it| match it {
        Change::Filter(it) if it.direction == direction => Some(it.handle),
        Change::Filter(_)
        | Change::Clsact(_)
        | Change::Rule(_)
        | Change::Route(_)
        | Change::Sysctl(_)
        | Change::Address(_)
        | Change::LocalPrefix(_) => None,
    });
    handles.max().map_or(FILTER_HANDLE, |last| last + 1)
}

/// The filter of others that every packet meets before ours on one side of an interface, if ours is
/// there: its preference and kind. What it takes, ours never sees.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn before_ours(
    netlink: &Netlink,
    link: &Link,
    direction: Direction,
) -> Result<Option<(u16, String)>, NetlinkError> {
    let is_ours = |filter: &&Filter| {
        let name = filter.name.as_deref();
        name.is_some_and(|name| name.starts_with(NAME_PREFIX))
    };
    let filters = netlink.filters(link.index, direction)?;
    let ours = filters.iter().filter(is_ours).map(|filter| filter.priority);
    let Some(ours) = ours.min() else {
        return Ok(None);
    };
    let others = filters.iter().filter(|filter| !is_ours(filter));
    let first = others.min_by_key(|filter| filter.priority);
    let first = first.filter(|filter| filter.priority < ours);
    Ok(first.map(|filter| (filter.priority, filter.kind.clone())))
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
        // The entry for a whole preference does not tell whose it is.
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
    use std::os::fd::AsFd;

    use netlink_packet_route::link::InfoKind;

    use super::*;
    use crate::kernel::bpf::{Assembler, Reg};
    use crate::kernel::netlink::FilterSlot;
    use crate::kernel::testing::{Tun, in_fresh_namespace, veth};
    use crate::lab::wiring::Wiring;

    #[test]
    fn every_interface_with_packets_of_its_own_carries_those_of_clients() {
        in_fresh_namespace(|| {
            let netlink = Netlink::new().unwrap();
            let tun = Tun::new(&netlink, "tun0", false);
            let vpn = Tun::new(&netlink, "vpn0", false);
            netlink.add_veth("up0", "port0", None).unwrap();
            netlink.add_interface("br0", InfoKind::Bridge).unwrap();
            let names = || -> Vec<String> {
                let links = carriers(&netlink, &tun.link).unwrap().into_iter();
                let mut names: Vec<_> = links.map(|link| link.name).collect();
                names.sort();
                names
            };
            // Whether they are up or not.
            assert_eq!(names(), ["br0", "port0", "up0", "vpn0"]);
            let index = |name: &str| netlink.link_by_name(name).unwrap().unwrap().index;
            netlink.set_master(index("port0"), index("br0")).unwrap();
            assert_eq!(names(), ["br0", "up0", "vpn0"]);
            drop(vpn);
            assert_eq!(names(), ["br0", "up0"]);
        });
    }

    #[test]
    fn a_filter_that_stands_before_ours_is_found() {
        in_fresh_namespace(|| {
            let netlink = Netlink::new().unwrap();
            let link = veth(&netlink);
            netlink.add_clsact(link.index).unwrap();
            let mut asm = Assembler::new();
            asm.mov(Reg::R0, -1);
            asm.exit();
            let program = asm.finish("t").unwrap().load().unwrap();
            let put = |priority, name| {
                let slot = FilterSlot {
                    index: link.index,
                    direction: Direction::Ingress,
                    priority,
                    handle: 1,
                };
                netlink.add_filter(slot, program.as_fd(), name).unwrap();
            };
            let found = || before_ours(&netlink, &link, Direction::Ingress).unwrap();
            put(10, "foreign");
            assert_eq!(found(), None, "ours is not there");
            put(9, "ipmoved_capture");
            assert_eq!(found(), None);
            put(8, "another");
            assert_eq!(found(), Some((8, "bpf".to_owned())));
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
