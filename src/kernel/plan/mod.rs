//! The kernel changes that each role needs, as values. This only asks the kernel and loads
//! programs.
//!
//! ```text
//!   capture      the old server: moved addresses into the TUN, and from the TUN to the uplink
//!   steer        the new server: replies to packets from the TUN go back into it
//!   keep         the new server in mode `keep`: it holds the moved address itself
//!   masquerade   the old server in mode `nat`: it translates both addresses
//! ```
//!
//! Owns the places that the plans share: the interfaces that they can use, and where our filters
//! stand among those of others. [`Host`](super::Host) makes the changes and undoes them.

pub mod capture;
pub mod keep;
pub mod masquerade;
pub mod steer;

use super::bpf::BpfError;
use super::change::{BpfFilter, Change, Clsact, Interface};
use super::netlink::{
    Direction, Family, Filter, Link, Netlink, NetlinkError, RouteKind, TABLE_MAIN,
};
use super::programs::NAME_PREFIX;

/// Preference of the daemon's filters, unless a foreign one stands before it. It is low, so that
/// they run before filters that the kernel numbers (from 49152 down), and an administrator can
/// still put others before them.
pub const FILTER_PRIORITY: u16 = 40;

/// Handle of the daemon's filters within their preference.
pub const FILTER_HANDLE: u32 = 1;

/// Length of the Ethernet header, in bytes.
const ETHERNET_HEADER: u32 = 14;

/// `ARPHRD_RAWIP`: cellular modems.
const ARPHRD_RAWIP: u16 = 519;

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
         Ethernet, PPP or raw IP interface with --uplink"
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
fn default_routes(netlink: &Netlink, family: Family) -> Result<Vec<u32>, NetlinkError> {
    let mut routes: Vec<_> = netlink
        .routes(family, TABLE_MAIN)?
        .into_iter()
        .filter(|route| route.dst.1 == 0 && route.kind == RouteKind::Unicast)
        .filter_map(|route| Some((route.metric.unwrap_or(0), route.dev?)))
        .collect();
    routes.sort_by_key(|&(metric, _)| metric);
    Ok(routes.into_iter().map(|(_, dev)| dev).collect())
}

fn clsact(link: &Link) -> Change {
    Change::Clsact(Clsact {
        on: Interface::from(link),
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
        on: Interface::from(link),
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
    use super::*;
    use crate::kernel::testing::in_fresh_namespace;

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
