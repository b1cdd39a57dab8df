//! What is there of the kinds of which a host may have thousands, listed once for many questions.

use std::cell::OnceCell;
use std::collections::HashSet;
use std::net::IpAddr;

use super::ChangeError;
use crate::kernel::netlink::{Family, Netlink, RouteKind, TABLE_LOCAL};

/// A local route: its network, and the index of its interface.
type Local = ((IpAddr, u8), Option<u32>);

/// The state of the kernel, for as long as nobody but the one who asks changes it.
///
/// The kernel lists addresses and routes only all at once: to ask for each of n would take n lists
/// of n.
pub(in crate::kernel) struct There<'a> {
    pub(super) netlink: &'a Netlink,
    addresses: OnceCell<HashSet<(u32, IpAddr)>>,
    /// Of IPv4 and of IPv6.
    local: [OnceCell<HashSet<Local>>; 2],
}

impl<'a> There<'a> {
    /// Nothing is listed until somebody asks.
    pub(in crate::kernel) fn new(netlink: &'a Netlink) -> Self {
        Self {
            netlink,
            addresses: OnceCell::new(),
            local: [OnceCell::new(), OnceCell::new()],
        }
    }

    /// For what is not listed here.
    pub(in crate::kernel) fn netlink(&self) -> &'a Netlink {
        self.netlink
    }

    /// Whether the interface with this index has the address.
    pub(super) fn has_address(&self, index: u32, addr: IpAddr) -> Result<bool, ChangeError> {
        if let Some(known) = self.addresses.get() {
            return Ok(known.contains(&(index, addr)));
        }
        let listed = self.netlink.addresses()?;
        let listed = listed.iter().map(|held| (held.index, held.addr)).collect();
        let known = self.addresses.get_or_init(|| listed);
        Ok(known.contains(&(index, addr)))
    }

    /// Whether there is such a local route.
    pub(super) fn has_local(&self, wanted: &Local) -> Result<bool, ChangeError> {
        let addr = wanted.0.0;
        let cell = &self.local[usize::from(addr.is_ipv6())];
        if let Some(known) = cell.get() {
            return Ok(known.contains(wanted));
        }
        let routes = self.netlink.routes(Family::of(addr), TABLE_LOCAL)?;
        let local = routes.iter().filter(|it| it.kind == RouteKind::Local);
        let listed = local.map(|route| (route.dst, route.dev)).collect();
        Ok(cell.get_or_init(|| listed).contains(wanted))
    }
}
