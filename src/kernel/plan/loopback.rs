//! The kernel changes for the new server's own calls of moved addresses that it holds itself
//! (`--outgoing`): a program at the egress of the loopback interface.
//!
//! Owns where that stands, and the setting without which the kernel takes nothing that arrives anew
//! on `lo` from an address of this host. Where it cannot be set, such packets keep their way; then
//! a firewall that lets in on `lo` nothing but answers does not know those of IPv4.

use std::os::fd::OwnedFd;

use super::{PlanError, clsact, filter};
use crate::kernel::Desired;
use crate::kernel::change::{Change, Interface, OfLink, Sysctl};
use crate::kernel::netlink::{Direction, Link, Netlink};
use crate::kernel::programs::LOOPBACK;

/// Lets packets from this host's own addresses arrive on `lo`.
const ACCEPT_LOCAL: &str = "accept_local";

/// Whether IPv4 packets from this host's own addresses may arrive there, if [`plan`] is carried
/// out.
pub(super) fn accepts_local(lo: &Link) -> bool {
    let accepts = setting(lo).value().is_ok_and(|value| value == "1");
    accepts || setting(lo).may_write()
}

/// The changes for this program.
///
/// # Errors
/// If there is no place for it.
pub(super) fn plan(
    netlink: &Netlink,
    lo: &Link,
    program: OwnedFd,
) -> Result<Vec<Desired>, PlanError> {
    let mut desired = Vec::new();
    let setting = setting(lo);
    if setting.may_write() {
        let accept = Change::Sysctl(Sysctl {
            from: setting.value().unwrap_or_default(),
            to: "1".to_owned(),
            path: setting.path,
            on: Some(Interface::from(lo)),
        });
        desired.push(Desired::lasting(accept));
    }
    desired.push(Desired::lasting(clsact(lo)));
    let place = filter(netlink, lo, Direction::Egress, LOOPBACK)?;
    desired.push(Desired::lasting(place).program(program));
    Ok(desired)
}

/// Whether a change is one of those that [`plan`] makes.
pub fn is_part(change: &Change, lo: &Link) -> bool {
    match change {
        Change::Clsact(_) | Change::Filter(_) => change.interface() == Some(lo.index),
        Change::Sysctl(sysctl) => {
            let on_lo = sysctl.on.as_ref().is_some_and(|on| on.index == lo.index);
            on_lo && sysctl.path.rsplit('/').next() == Some(ACCEPT_LOCAL)
        }
        Change::Rule(_) | Change::Route(_) | Change::Address(_) | Change::LocalPrefix(_) => false,
    }
}

fn setting(lo: &Link) -> OfLink {
    OfLink::new(lo, "ipv4", ACCEPT_LOCAL)
}
