//! A default route into an interface, or into nothing (a blackhole).

use std::fmt;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::{ChangeError, Interface, Kind, Means, Presence, There, Undone, in_ip, typed};
use crate::kernel::netlink::{Family, Netlink, Route, RouteKind, TABLE_MAIN};

/// A default route in a table of our own.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DefaultRoute {
    /// IPv4 or IPv6.
    pub family: Family,
    /// The table.
    pub table: u32,
    /// The interface; `None` is a blackhole.
    pub dev: Option<Interface>,
    /// Metric; the lower is preferred.
    pub metric: u32,
}

impl DefaultRoute {
    fn route(&self) -> Route {
        Route {
            kind: match self.dev {
                Some(_) => RouteKind::Unicast,
                None => RouteKind::Blackhole,
            },
            table: self.table,
            dev: self.dev.as_ref().map(|dev| dev.index),
            metric: Some(self.metric),
            ..Route::default_of(self.family)
        }
    }
}

impl DefaultRoute {
    /// The route as ip takes it. `action` is what to do with it.
    fn in_ip(&self, action: &str) -> String {
        let Self {
            family,
            table,
            dev,
            metric,
        } = self;
        let to = match dev {
            Some(dev) => format!("default dev {}", typed(&dev.name)),
            None => "blackhole default".to_owned(),
        };
        let table = match *table {
            TABLE_MAIN => String::new(),
            table => format!(" table {table}"),
        };
        let ip = in_ip(*family);
        format!("{ip} route {action} {to} proto static{table} metric {metric}")
    }
}

impl fmt::Display for DefaultRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            family,
            table,
            dev,
            metric,
        } = self;
        write!(f, "{family} route in table {table}: ")?;
        match dev {
            Some(dev) => write!(f, "default dev {} metric {metric}", dev.name),
            None => write!(f, "blackhole default metric {metric}"),
        }
    }
}

impl Kind for DefaultRoute {
    /// A route has no values beside its identity: another metric makes it another route.
    fn object(&self) -> String {
        format!("route {self:?}")
    }

    fn to_make(&self) -> String {
        self.in_ip("add")
    }

    fn to_undo(&self) -> String {
        self.in_ip("del")
    }

    fn check(&self) -> Result<(), String> {
        self.dev.as_ref().map_or(Ok(()), Interface::check)
    }

    fn is_unmistakable(&self) -> bool {
        true
    }

    /// Listing the routes may mean reading the whole Internet's routing table.
    fn is_costly_to_find(&self) -> bool {
        true
    }

    fn present(&self, there: &There<'_>) -> Result<Presence, ChangeError> {
        let wanted = self.route();
        let routes = there.netlink.routes(self.family, self.table)?;
        Ok(Presence::of(routes.iter().any(|route| {
            // The kernel reports lo as the device of an IPv6 blackhole.
            let dev = wanted.kind == RouteKind::Blackhole || route.dev == wanted.dev;
            let metric = route.metric.unwrap_or(0) == wanted.metric.unwrap_or(0);
            route.dst == wanted.dst && route.kind == wanted.kind && metric && dev
        })))
    }

    fn make(&self, with: &Means<'_>) -> Result<(), ChangeError> {
        Ok(with.netlink.add_route(&self.route())?)
    }

    fn undo(&self, netlink: &Netlink) -> Result<Undone, ChangeError> {
        netlink.delete_route(&self.route())?;
        Ok(Undone::Gone)
    }

    fn remedy(&self, error: &ChangeError) -> Option<&'static str> {
        (error.errno() == Some(Errno::NETDOWN)).then_some("the interface must be up")
    }
}
