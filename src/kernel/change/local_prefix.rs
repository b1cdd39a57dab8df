//! A prefix of which every address is this host's own, without being configured on an interface
//! (`ip route add local PREFIX dev lo`, "AnyIP").

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{ChangeError, Interface, Kind, Means, Presence, There, Undone, in_ip, typed};
use crate::kernel::netlink::{Family, Netlink, Route, RouteKind, TABLE_LOCAL};
use crate::model::prefix::Prefix;

/// A route of type local.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LocalPrefix {
    /// The loopback interface.
    pub on: Interface,
    /// The prefix.
    #[serde(with = "as_text")]
    pub prefix: Prefix,
}

impl LocalPrefix {
    fn route(&self) -> Route {
        Route {
            kind: RouteKind::Local,
            table: TABLE_LOCAL,
            dev: Some(self.on.index),
            ..Route::to(self.prefix.first(), self.prefix.len())
        }
    }
}

impl LocalPrefix {
    /// The route as ip takes it. `action` is what to do with it.
    fn in_ip(&self, action: &str) -> String {
        let ip = in_ip(Family::of(self.prefix.first()));
        let (prefix, dev) = (self.prefix, typed(&self.on.name));
        format!("{ip} route {action} local {prefix} dev {dev} proto static")
    }
}

impl fmt::Display for LocalPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "route local {} dev {}", self.prefix, self.on.name)
    }
}

impl Kind for LocalPrefix {
    fn object(&self) -> String {
        format!("local {} {}", self.on.index, self.prefix)
    }

    fn to_make(&self) -> String {
        self.in_ip("add")
    }

    fn to_undo(&self) -> String {
        self.in_ip("del")
    }

    fn check(&self) -> Result<(), String> {
        self.on.check()
    }

    /// An administrator may have made it as well.
    fn is_unmistakable(&self) -> bool {
        false
    }

    fn present(&self, there: &There<'_>) -> Result<Presence, ChangeError> {
        let wanted = self.route();
        let there = there.has_local(&(wanted.dst, wanted.dev))?;
        Ok(Presence::of(there))
    }

    fn make(&self, with: &Means<'_>) -> Result<(), ChangeError> {
        Ok(with.netlink.add_route(&self.route())?)
    }

    fn undo(&self, netlink: &Netlink) -> Result<Undone, ChangeError> {
        netlink.delete_route(&self.route())?;
        Ok(Undone::Gone)
    }

    fn remedy(&self, _error: &ChangeError) -> Option<&'static str> {
        None
    }
}

/// A prefix in the journal is as people write it.
mod as_text {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use crate::model::prefix::Prefix;

    pub(super) fn serialize<S: Serializer>(prefix: &Prefix, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(prefix)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Prefix, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}
