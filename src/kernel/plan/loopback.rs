//! The kernel changes for the new server's own calls of moved addresses that it holds itself
//! (`--outgoing`): a program at the egress of the loopback interface.
//!
//! Owns where that stands, and the setting without which the kernel takes nothing that arrives anew
//! on `lo` from an address of this host. Where it cannot be set, such packets keep their way; then
//! a firewall that lets in on `lo` nothing but answers does not know those of IPv4.

use std::os::fd::OwnedFd;

use super::steer::may_write;
use super::{PlanError, clsact, filter};
use crate::kernel::Desired;
use crate::kernel::change::{Change, Interface, Sysctl, read_sysctl};
use crate::kernel::netlink::{Direction, Link, Netlink};
use crate::kernel::programs::LOOPBACK;

/// Lets packets from this host's own addresses arrive on `lo`.
const ACCEPT_LOCAL: &str = "accept_local";

/// Whether IPv4 packets from this host's own addresses may arrive there, if [`plan`] is carried
/// out.
pub(super) fn accepts_local(lo: &Link) -> bool {
    let accepts = read_sysctl(&path(lo)).is_ok_and(|value| value == "1");
    accepts || may_write(&path(lo))
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
    if may_write(&path(lo)) {
        let accept = Change::Sysctl(Sysctl {
            from: read_sysctl(&path(lo)).unwrap_or_default(),
            to: "1".to_owned(),
            path: path(lo),
            on: Some(Interface::from(lo)),
        });
        desired.push(Desired::lasting(accept));
    }
    desired.push(Desired::lasting(clsact(lo)));
    let place = filter(netlink, lo, Direction::Egress, LOOPBACK)?;
    desired.push(Desired::lasting(place).program(program));
    Ok(desired)
}

fn path(lo: &Link) -> String {
    format!("net/ipv4/conf/{}/{ACCEPT_LOCAL}", lo.name)
}
