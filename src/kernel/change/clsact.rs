//! The clsact qdisc on an interface, which carries filters and does nothing by itself.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{ChangeError, Interface, Kind, Means, Presence, There, Undone, typed};
use crate::kernel::netlink::{Direction, Netlink};

/// The clsact qdisc on an interface.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Clsact {
    /// The interface.
    pub on: Interface,
}

impl fmt::Display for Clsact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "qdisc clsact on {}", self.on.name)
    }
}

impl Kind for Clsact {
    fn object(&self) -> String {
        format!("clsact {}", self.on.index)
    }

    fn to_make(&self) -> String {
        format!("tc qdisc add dev {} clsact", typed(&self.on.name))
    }

    fn to_undo(&self) -> String {
        format!("tc qdisc del dev {} clsact", typed(&self.on.name))
    }

    fn check(&self) -> Result<(), String> {
        self.on.check()
    }

    /// Others may have made it, for filters of their own.
    fn is_unmistakable(&self) -> bool {
        false
    }

    fn present(&self, there: &There<'_>) -> Result<Presence, ChangeError> {
        Ok(Presence::of(there.netlink.has_clsact(self.on.index)?))
    }

    fn make(&self, with: &Means<'_>) -> Result<(), ChangeError> {
        Ok(with.netlink.add_clsact(self.on.index)?)
    }

    /// Deleting the qdisc deletes every filter on it, so it stays as long as others have filters
    /// there.
    fn undo(&self, netlink: &Netlink) -> Result<Undone, ChangeError> {
        if !netlink.has_clsact(self.on.index)? {
            return Ok(Undone::Gone);
        }
        for direction in [Direction::Ingress, Direction::Egress] {
            if !netlink.filters(self.on.index, direction)?.is_empty() {
                return Ok(Undone::Foreign(format!(
                    "others have put {direction} filters on it; it stays for them"
                )));
            }
        }
        netlink.delete_clsact(self.on.index)?;
        Ok(Undone::Gone)
    }

    fn remedy(&self, error: &ChangeError) -> Option<&'static str> {
        if error.is_exists() {
            return Some(
                "the interface has an ingress qdisc already; replace it by clsact, which takes the \
                 same filters",
            );
        }
        error
            .is_unsupported()
            .then_some("the kernel needs CONFIG_NET_SCH_INGRESS (module sch_ingress)")
    }
}
