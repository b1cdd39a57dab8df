//! What the old server needs of its kernel: packets to moved addresses go into the TUN, and what the
//! daemon writes to the TUN goes out of the uplink.
//!
//! Owns the choice of interface and of the filters' places. The addresses stay configured where they
//! are, so ARP and neighbour discovery go on being answered. The filter on the uplink outlives the
//! daemon and then leads into nothing, so that moved addresses fall silent instead of answering
//! with resets.

use std::net::{IpAddr, SocketAddr};

use super::Desired;
use super::bpf::BpfError;
use super::journal::{Change, Interface};
use super::netlink::{
    Direction, Family, Filter, Link, Netlink, NetlinkError, RouteKind, TABLE_MAIN,
};
use super::programs::{self, NAME_PREFIX};
use crate::moved::Move;

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
    /// Nothing leads to clients.
    #[error("no interface holds {0} and there is no default route; name one with --uplink")]
    NoUplink(IpAddr),
    /// The interface that was named does not exist.
    #[error("interface {0} does not exist (--uplink)")]
    NoInterface(String),
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

/// The interface on which packets to `addr` arrive: the one that holds it, else (as on a host that
/// has it on `lo`) that of the default route.
///
/// # Errors
/// If there is neither.
pub fn uplink_for(netlink: &Netlink, addr: IpAddr) -> Result<Link, PlanError> {
    let links = netlink.links()?;
    let holder = netlink
        .addresses()?
        .into_iter()
        .filter(|held| held.addr == addr)
        .filter_map(|held| links.iter().find(|link| link.index == held.index))
        .find(|link| !link.loopback);
    if let Some(link) = holder {
        return Ok(link.clone());
    }
    let index = default_routes(netlink, Family::of(addr))?
        .into_iter()
        .next();
    links
        .into_iter()
        .find(|link| Some(link.index) == index)
        .ok_or(PlanError::NoUplink(addr))
}

/// The interface called `name`.
///
/// # Errors
/// If there is none.
pub fn uplink_named(netlink: &Netlink, name: &str) -> Result<Link, PlanError> {
    netlink
        .link_by_name(name)?
        .ok_or_else(|| PlanError::NoInterface(name.to_owned()))
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
    Interface {
        index: link.index,
        name: link.name.clone(),
    }
}

pub(super) fn clsact(link: &Link) -> Change {
    Change::Clsact {
        on: interface(link),
    }
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
    Ok(Change::Filter {
        on: interface(link),
        direction,
        priority,
        handle,
        program: program.to_owned(),
    })
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
