//! Routes, and the kernel's choice of a route for a packet.

use std::net::IpAddr;

use netlink_packet_core::{DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{
    RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteScope,
    RouteType,
};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::{Family, Netlink, NetlinkError, Result, attributes, ip, word};
use crate::model::moved::{TCP, UDP};

/// The kernel's table of what is this host's own.
pub const TABLE_LOCAL: u32 = 255;

/// The kernel's table of ordinary routes.
pub const TABLE_MAIN: u32 = 254;

/// The question for a packet's route, in errors.
const LOOK_UP: &str = "look up route";

/// See linux/rtnetlink.h; not in every libc.
const RTA_VIA: u16 = 18;

/// A route. We read a route with several next hops as several routes, one for each.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Route {
    /// Destination network; a prefix length of 0 is the default route.
    pub dst: (IpAddr, u8),
    /// What it does with a packet.
    pub kind: RouteKind,
    /// Routing table.
    pub table: u32,
    /// Gateway, if the destination is not on the link.
    pub via: Option<IpAddr>,
    /// Interface index.
    pub dev: Option<u32>,
    /// Metric; the lower is preferred.
    pub metric: Option<u32>,
    /// Preferred source address.
    pub src: Option<IpAddr>,
    /// Path MTU of the route, in bytes.
    pub mtu: Option<u32>,
}

impl Route {
    /// The default route of a family in the main table; the caller sets what else it needs.
    pub fn default_of(family: Family) -> Self {
        Self::to(family.unspecified(), 0)
    }

    /// A unicast route to a network in the main table; the caller sets what else it needs.
    pub fn to(addr: IpAddr, prefix: u8) -> Self {
        Self {
            dst: (addr, prefix),
            kind: RouteKind::Unicast,
            table: TABLE_MAIN,
            via: None,
            dev: None,
            metric: None,
            src: None,
            mtu: None,
        }
    }

    /// IPv4 or IPv6.
    pub fn family(&self) -> Family {
        Family::of(self.dst.0)
    }
}

/// A route of any table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ListedRoute {
    /// The route.
    pub route: Route,
    /// The kernel made it by itself, because of an address (`RTPROT_KERNEL`).
    pub by_kernel: bool,
}

/// What a route does with a packet.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RouteKind {
    /// Sends it on.
    Unicast,
    /// Delivers it on this host.
    Local,
    /// Discards it silently.
    Blackhole,
    /// Any other `RTN_*`.
    Other(u8),
}

impl RouteKind {
    fn raw(self) -> u8 {
        match self {
            Self::Unicast => libc::RTN_UNICAST,
            Self::Local => libc::RTN_LOCAL,
            Self::Blackhole => libc::RTN_BLACKHOLE,
            Self::Other(raw) => raw,
        }
    }

    fn from_raw(raw: u8) -> Self {
        match raw {
            libc::RTN_UNICAST => Self::Unicast,
            libc::RTN_LOCAL => Self::Local,
            libc::RTN_BLACKHOLE => Self::Blackhole,
            other => Self::Other(other),
        }
    }
}

/// A packet of this host for which a route is looked up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RouteQuery {
    /// Destination.
    pub dst: IpAddr,
    /// Source, if it is chosen already.
    pub src: Option<IpAddr>,
    /// Its mark.
    pub mark: Option<u32>,
    /// IP protocol and source port, where rules go by them.
    pub from: Option<(u8, u16)>,
}

/// The kernel's answer to the question how it would route a packet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RouteAnswer {
    /// Whether it would send the packet on, or deliver it on this host.
    pub kind: RouteKind,
    /// Index of the outgoing interface.
    pub oif: Option<u32>,
    /// Gateway, if the destination is not on the link.
    pub gateway: Option<IpAddr>,
    /// The source address that the kernel would choose.
    pub prefsrc: Option<IpAddr>,
    /// The MTU that the route has by its table. If absent, the interface's counts.
    pub mtu: Option<u32>,
    /// The MTU of the path to this destination that the kernel has learned from an ICMP error,
    /// until it forgets that. Anybody can send such an error in a router's name.
    pub learned_mtu: Option<u32>,
}

impl Netlink {
    /// Every route of a family in one table; none if the table does not exist.
    pub fn routes(&self, family: Family, table: u32) -> Result<Vec<Route>> {
        let mut message = RouteMessage::default();
        message.header.address_family = family.raw();
        message.attributes.push(RouteAttribute::Table(table));
        match self.dump("list routes", RouteNetlinkMessage::GetRoute(message)) {
            Ok(answers) => Ok(answers
                .iter()
                .flat_map(|answer| read_route(answer))
                .filter(|route| route.family() == family && route.table == table)
                .collect()),
            Err(error) if error.is_missing() => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// Hands over every route of a family in every table, one by one: a router's tables may hold
    /// more than a million. What the kernel has learned of single destinations is not among them.
    pub fn for_each_route(&self, family: Family, each: &mut dyn FnMut(ListedRoute)) -> Result<()> {
        let mut message = RouteMessage::default();
        message.header.address_family = family.raw();
        let request = RouteNetlinkMessage::GetRoute(message);
        self.dump_each("list routes", &request, &mut |answer| {
            // `struct rtmsg`: the protocol is its sixth byte, the flags are its last word.
            let Some((header, _)) = answer.split_first_chunk::<12>() else {
                return;
            };
            if word(&header[8..]).is_some_and(|flags| flags & RTM_F_CLONED != 0) {
                return;
            }
            for route in read_route(answer) {
                if route.family() == family {
                    each(ListedRoute {
                        route,
                        by_kernel: header[5] == libc::RTPROT_KERNEL,
                    });
                }
            }
        })
    }

    /// Adds a route. It is an error if one with the same destination, table and metric exists.
    pub fn add_route(&self, route: &Route) -> Result<()> {
        let request = RouteNetlinkMessage::NewRoute(route_message(route));
        self.acked("add route", request, NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Deletes a route.
    pub fn delete_route(&self, route: &Route) -> Result<()> {
        let mut message = route_message(route);
        message.header.scope = RouteScope::NoWhere;
        self.acked("delete route", RouteNetlinkMessage::DelRoute(message), 0)
    }

    /// How the kernel would route a packet to `dst`, optionally with a mark or a source address.
    pub fn route_get(
        &self,
        dst: IpAddr,
        mark: Option<u32>,
        src: Option<IpAddr>,
    ) -> Result<RouteAnswer> {
        let from = None;
        self.route_of(RouteQuery {
            dst,
            src,
            mark,
            from,
        })
    }

    /// How the kernel would route a packet.
    pub fn route_of(&self, query: RouteQuery) -> Result<RouteAnswer> {
        let route = self.look_up(query, RouteFlags::empty())?;
        // What the kernel has learned hides what the table says, so we ask for the latter as well.
        let by_table = route.mtu.and_then(|_| {
            let entry = self.look_up(query, RouteFlags::FibMatch);
            entry.ok()?.mtu
        });
        Ok(RouteAnswer {
            kind: route.kind,
            oif: route.dev,
            gateway: route.via,
            prefsrc: route.src,
            mtu: by_table,
            learned_mtu: route.mtu.filter(|_| route.mtu != by_table),
        })
    }

    /// Whether the kernel would take the packet that `answer` answers, if it came by an interface,
    /// as its routes and reverse path filtering decide.
    ///
    /// # Errors
    /// If it would not: `EXDEV` for reverse path filtering, or `EINVAL` (Linux 6.13 on).
    pub fn takes(&self, answer: RouteQuery, iif: u32) -> Result<()> {
        const RTA_DPORT: u16 = 29;
        let RouteQuery { dst, src, from, .. } = answer;
        let mut message = question(dst, src);
        std::mem::swap(
            &mut message.header.destination_prefix_length,
            &mut message.header.source_prefix_length,
        );
        message.attributes = vec![RouteAttribute::Source(dst.into())];
        if let Some(src) = src {
            let to = RouteAttribute::Destination(src.into());
            message.attributes.push(to);
        }
        message.attributes.push(RouteAttribute::Iif(iif));
        push_ports(&mut message, from, RTA_DPORT);
        let request = RouteNetlinkMessage::GetRoute(message);
        self.exchange("look up route", request, NLM_F_ACK).map(drop)
    }

    /// The route that the kernel would take for a packet.
    pub fn choice(&self, query: RouteQuery) -> Result<Route> {
        self.look_up(query, RouteFlags::empty())
    }

    /// The routes among which the kernel chooses for a packet: more than one if the table's entry
    /// has several next hops. The one that it would take for this packet is the first.
    pub fn choices(&self, query: RouteQuery) -> Result<Vec<Route>> {
        let route = self.choice(query)?;
        let entry = self.look_up_all(query, RouteFlags::FibMatch);
        let mut others = entry.unwrap_or_default();
        let is_it = |other: &Route| other.dev == route.dev && other.via == route.via;
        // Of IPv6 the kernel tells another one where a rule goes by the interface.
        if !others.iter().any(is_it) {
            others.clear();
        }
        others.retain(|other| !is_it(other));
        others.insert(0, route);
        Ok(others)
    }

    /// The kernel's answer to the question, or, with `FibMatch`, the table's entry behind it.
    fn look_up(&self, query: RouteQuery, flags: RouteFlags) -> Result<Route> {
        let mut routes = self.look_up_all(query, flags)?;
        routes
            .pop()
            .ok_or(NetlinkError::Malformed { request: LOOK_UP })
    }

    fn look_up_all(&self, query: RouteQuery, flags: RouteFlags) -> Result<Vec<Route>> {
        const RTA_SPORT: u16 = 28;
        let RouteQuery {
            dst,
            src,
            mark,
            from,
        } = query;
        let mut message = question(dst, src);
        message.header.flags = flags;
        message
            .attributes
            .push(RouteAttribute::Destination(dst.into()));
        if let Some(src) = src {
            message.attributes.push(RouteAttribute::Source(src.into()));
        }
        if let Some(mark) = mark {
            message.attributes.push(RouteAttribute::Mark(mark));
        }
        push_ports(&mut message, from, RTA_SPORT);
        let request = RouteNetlinkMessage::GetRoute(message);
        let answers = self.exchange(LOOK_UP, request, NLM_F_ACK);
        let answers = answers.map_err(|error| in_words(error, src))?;
        let mut routes = answers.iter().map(|answer| read_route(answer));
        Ok(routes.find(|some| !some.is_empty()).unwrap_or_default())
    }
}

/// The error with what it means of a route: the kernel has a number of its own for each kind that
/// refuses, and says no word (`fib_props` in net/ipv4/fib_semantics.c).
fn in_words(error: NetlinkError, src: Option<IpAddr>) -> NetlinkError {
    let words = match error.errno() {
        Some(Errno::INVAL) if src.is_some() => {
            "a blackhole route or rule, or this server has not that address"
        }
        Some(Errno::INVAL) => "a blackhole route or rule",
        Some(Errno::HOSTUNREACH) => "an unreachable route",
        Some(Errno::ACCESS) => "a prohibit route or rule",
        Some(_) | None => return error,
    };
    match error {
        NetlinkError::Refused {
            request,
            errno,
            detail,
        } if detail.is_empty() => NetlinkError::Refused {
            request,
            errno,
            detail: words.into(),
        },
        NetlinkError::Refused { .. } | NetlinkError::Socket(_) | NetlinkError::Malformed { .. } => {
            error
        }
    }
}

/// A question about a packet with these addresses.
fn question(dst: IpAddr, src: Option<IpAddr>) -> RouteMessage {
    let bits = Family::of(dst).bits();
    let mut message = RouteMessage::default();
    message.header.address_family = Family::of(dst).raw();
    message.header.destination_prefix_length = bits;
    message.header.source_prefix_length = if src.is_some() { bits } else { 0 };
    message
}

/// Adds what rules of ports go by; the kernel knows them for no other protocols.
fn push_ports(message: &mut RouteMessage, end: Option<(u8, u16)>, which: u16) {
    const RTA_IP_PROTO: u16 = 27;
    let Some((protocol @ (TCP | UDP), port)) = end else {
        return;
    };
    for (kind, value) in [
        (RTA_IP_PROTO, vec![protocol]),
        (which, port.to_be_bytes().to_vec()),
    ] {
        let other = DefaultNla::new(kind, value);
        message.attributes.push(RouteAttribute::Other(other));
    }
}

fn route_message(route: &Route) -> RouteMessage {
    let mut message = RouteMessage::default();
    let on_link = route.via.is_none() && route.kind == RouteKind::Unicast;
    message.header = RouteHeader {
        address_family: route.family().raw(),
        destination_prefix_length: route.dst.1,
        protocol: RouteProtocol::Static,
        scope: match (route.family(), route.kind) {
            // The kernel refuses any other for what is this host's own.
            (_, RouteKind::Local) => RouteScope::Host,
            (Family::V4, _) if on_link => RouteScope::Link,
            _ => RouteScope::Universe,
        },
        kind: RouteType::from(route.kind.raw()),
        ..RouteHeader::default()
    };
    let attributes = &mut message.attributes;
    attributes.push(RouteAttribute::Table(route.table));
    if route.dst.1 > 0 {
        attributes.push(RouteAttribute::Destination(route.dst.0.into()));
    }
    attributes.extend(route.via.map(|via| RouteAttribute::Gateway(via.into())));
    attributes.extend(route.dev.map(RouteAttribute::Oif));
    attributes.extend(route.metric.map(RouteAttribute::Priority));
    attributes.extend(route.src.map(|src| RouteAttribute::PrefSource(src.into())));
    let mtu = route.mtu.map(RouteMetric::Mtu);
    attributes.extend(mtu.map(|mtu| RouteAttribute::Metrics(vec![mtu])));
    message
}

fn read_route(payload: &[u8]) -> Vec<Route> {
    fn read(payload: &[u8]) -> Option<Vec<Route>> {
        let (header, rest) = payload.split_first_chunk::<12>()?;
        let family = Family::from_raw(header[0])?;
        let mut route = Route::to(family.unspecified(), header[1]);
        route.kind = RouteKind::from_raw(header[7]);
        route.table = header[4].into();
        let mut hops = Vec::new();
        for (kind, value) in attributes(rest) {
            match kind {
                libc::RTA_DST => route.dst.0 = ip(value)?,
                libc::RTA_TABLE => route.table = word(value)?,
                libc::RTA_OIF => route.dev = word(value),
                libc::RTA_GATEWAY => route.via = ip(value),
                RTA_VIA => route.via = value.get(2..).and_then(ip),
                libc::RTA_PRIORITY => route.metric = word(value),
                libc::RTA_PREFSRC => route.src = ip(value),
                libc::RTA_METRICS => {
                    let mut metrics = attributes(value);
                    let mtu = metrics.find(|&(metric, _)| metric == RTAX_MTU);
                    route.mtu = mtu.and_then(|(_, value)| word(value));
                }
                libc::RTA_MULTIPATH => hops = next_hops(value),
                _ => {}
            }
        }
        if hops.is_empty() {
            return Some(vec![route]);
        }
        let routes = hops.into_iter().map(|(dev, via)| Route {
            dev: Some(dev),
            via,
            ..route.clone()
        });
        Some(routes.collect())
    }
    read(payload).unwrap_or_default()
}

const RTAX_MTU: u16 = 2;

/// `rtm_flags` of what the kernel has learned of one destination (linux/rtnetlink.h).
const RTM_F_CLONED: u32 = 0x200;

/// `struct rtnexthop`s: length (u16), flags, hops, interface index, attributes.
fn next_hops(mut rest: &[u8]) -> Vec<(u32, Option<IpAddr>)> {
    let mut hops = Vec::new();
    while let Some((header, _)) = rest.split_first_chunk::<8>() {
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let Some(hop) = rest.get(8..length) else {
            break;
        };
        let Some(dev) = word(&header[4..8]) else {
            break;
        };
        let via = attributes(hop).find_map(|(kind, value)| match kind {
            libc::RTA_GATEWAY => ip(value),
            RTA_VIA => value.get(2..).and_then(ip),
            _ => None,
        });
        hops.push((dev, via));
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    hops
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;

    use super::*;
    use crate::kernel::netlink::{Address, Rule};
    use crate::kernel::testing::{in_fresh_namespace, veth};
    use crate::lab::wiring::Wiring;
    use crate::model::prefix::Prefix;

    #[test]
    fn addresses_and_routes_come_and_go() {
        in_fresh_namespace(|| {
            let netlink = Netlink::new().unwrap();
            let index = veth(&netlink).index;
            for (addr, prefix, far) in [
                ("192.0.2.5", 24, "198.51.100.0"),
                ("2001:db8::5", 64, "2001:db8:f::"),
            ] {
                let addr: IpAddr = addr.parse().unwrap();
                let family = Family::of(addr);
                let address = Address {
                    index,
                    addr,
                    prefix,
                };
                netlink.add_address(&address).unwrap();
                assert!(netlink.add_address(&address).unwrap_err().is_exists());
                assert!(netlink.addresses().unwrap().contains(&address));
                let route = Route {
                    dev: Some(index),
                    metric: Some(77),
                    table: 0x6970_6d76,
                    mtu: Some(1400),
                    ..Route::to(far.parse().unwrap(), prefix)
                };
                netlink.add_route(&route).unwrap();
                assert!(netlink.add_route(&route).unwrap_err().is_exists());
                let blackhole = Route {
                    kind: RouteKind::Blackhole,
                    metric: Some(4_000_000),
                    table: 0x6970_6d76,
                    ..Route::default_of(family)
                };
                netlink.add_route(&blackhole).unwrap();
                let listed = netlink.routes(family, 0x6970_6d76).unwrap();
                assert!(listed.contains(&route), "{listed:?}");
                assert!(listed.iter().any(|r| r.kind == RouteKind::Blackhole
                    && r.dst.1 == 0
                    && r.metric == Some(4_000_000)));
                netlink.delete_route(&blackhole).unwrap();
                netlink.delete_route(&route).unwrap();
                assert!(netlink.delete_route(&route).unwrap_err().is_missing());
                assert_eq!(netlink.routes(family, 0x6970_6d76).unwrap(), []);
                assert_eq!(netlink.routes(family, 4711).unwrap(), []);
                netlink.delete_address(&address).unwrap();
                assert!(netlink.delete_address(&address).unwrap_err().is_missing());
            }
        });
    }

    #[test]
    fn the_routes_of_every_table_are_listed_with_their_gateways() {
        in_fresh_namespace(|| {
            let netlink = Netlink::new().unwrap();
            let index = veth(&netlink).index;
            for (addr, prefix, gateway, far) in [
                ("192.0.2.5", 24, "192.0.2.254", "198.51.100.0"),
                ("2001:db8::5", 64, "2001:db8::fe", "2001:db8:f::"),
            ] {
                let addr: IpAddr = addr.parse().unwrap();
                let family = Family::of(addr);
                let address = Address {
                    index,
                    addr,
                    prefix,
                };
                netlink.add_address(&address).unwrap();
                let far = Route {
                    via: Some(gateway.parse().unwrap()),
                    dev: Some(index),
                    table: 4_711,
                    metric: Some(77),
                    ..Route::to(far.parse().unwrap(), prefix)
                };
                netlink.add_route(&far).unwrap();
                let mut all = Vec::new();
                let mut each = |listed| all.push(listed);
                netlink.for_each_route(family, &mut each).unwrap();
                let ours = all.iter().find(|listed| listed.route == far);
                assert!(ours.is_some_and(|listed| !listed.by_kernel), "{all:?}");
                let connected = all.iter().find(|listed| {
                    let route = &listed.route;
                    route.kind == RouteKind::Unicast
                        && route.dst.1 == prefix
                        && route.via.is_none()
                        && route.dev == Some(index)
                        && Prefix::of(route.dst.0, prefix).contains(addr)
                });
                assert!(connected.is_some_and(|listed| listed.by_kernel), "{all:?}");
                let local = |listed: &ListedRoute| listed.route.kind == RouteKind::Local;
                // IPv6 has them only once an address was checked for duplicates.
                assert!(family == Family::V6 || all.iter().any(local), "{all:?}");
            }
        });
    }

    #[test]
    fn the_kernel_is_asked_for_a_route() {
        in_fresh_namespace(|| {
            let netlink = Netlink::new().unwrap();
            let index = veth(&netlink).index;
            let addr: IpAddr = "192.0.2.5".parse().unwrap();
            netlink
                .add_address(&Address {
                    index,
                    addr,
                    prefix: 24,
                })
                .unwrap();
            let gateway: IpAddr = "192.0.2.254".parse().unwrap();
            let default = Route {
                via: Some(gateway),
                mtu: Some(1400),
                ..Route::default_of(Family::V4)
            };
            netlink.add_route(&default).unwrap();
            let local = netlink.route_get(addr, None, None).unwrap();
            assert_eq!(local.kind, RouteKind::Local);
            let far = "203.0.113.7".parse().unwrap();
            let answer = netlink.route_get(far, None, None).unwrap();
            assert_eq!(answer.oif, Some(index));
            assert_eq!(answer.gateway, Some(gateway));
            assert_eq!(answer.prefsrc, Some(addr));
            assert_eq!((answer.mtu, answer.learned_mtu), (Some(1400), None));

            let rule = Rule {
                mark: Some((0x6970_6d76, u32::MAX)),
                table: Some(0x6970_6d76),
                ..Rule::of(Family::V4, 100)
            };
            netlink.add_rule(&rule).unwrap();
            assert!(netlink.add_rule(&rule).unwrap_err().is_exists());
            assert!(netlink.rules(Family::V4).unwrap().contains(&rule));
            let blackhole = Route {
                kind: RouteKind::Blackhole,
                table: 0x6970_6d76,
                ..Route::default_of(Family::V4)
            };
            netlink.add_route(&blackhole).unwrap();
            let refused = netlink.route_get(far, Some(0x6970_6d76), None).unwrap_err();
            assert_eq!(refused.errno(), Some(Errno::INVAL));
            assert!(netlink.route_get(far, Some(1), Some(addr)).is_ok());
            netlink.delete_rule(&rule).unwrap();
            assert!(netlink.delete_rule(&rule).unwrap_err().is_missing());
            assert_eq!(netlink.rules(Family::V4).unwrap().len(), 3);
            assert_eq!(
                netlink
                    .rules(Family::V6)
                    .unwrap()
                    .iter()
                    .filter(|r| r.selects_more)
                    .count(),
                0
            );
        });
    }
}
