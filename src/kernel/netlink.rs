//! A small blocking rtnetlink client: links, addresses, routes, rules, clsact and cls_bpf filters.
//!
//! Owns the conversation with `NETLINK_ROUTE` and nothing else: it decides nothing, remembers
//! nothing and undoes nothing. Requests are built with the types of netlink-packet-route. Answers
//! are read attribute by attribute, only for what is needed here, so that an attribute of a newer
//! kernel, or a foreign classifier the crate cannot decode, does not make a dump fail.
//!
//! A socket belongs to the network namespace of the thread that opened it, for good.

use std::cell::Cell;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL,
    NLM_F_REPLACE, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, NlasIterator,
};
use netlink_packet_route::address::{
    AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope, CacheInfo,
};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::route::{
    RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleHeader, RuleMessage};
use netlink_packet_route::tc::{
    TcAttribute, TcBpfFlags, TcFilterBpfOption, TcHandle, TcMessage, TcOption,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// The kernel's table of routes to its own addresses.
pub const TABLE_LOCAL: u32 = 255;
/// The kernel's table of ordinary routes.
pub const TABLE_MAIN: u32 = 254;

/// How often a dump is started again because the kernel's tables changed under it
/// (`NLM_F_DUMP_INTR`); a table that changes faster than that is read as it is.
const MAX_DUMP_TRIES: usize = 8;

/// See linux/if_link.h; not in every libc.
const IFLA_GRO_IPV4_MAX_SIZE: u16 = 64;

/// `ETH_P_ALL` in the kernel's `tcm_info`: big-endian in the low half.
const PROTOCOL_ALL: u32 = (libc::ETH_P_ALL as u16).to_be() as u32;

/// IPv4 or IPv6.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family of an address.
    pub fn of(addr: IpAddr) -> Self {
        match addr {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// Length of a whole address, in bits.
    pub fn bits(self) -> u8 {
        match self {
            Self::V4 => 32,
            Self::V6 => 128,
        }
    }

    /// `0.0.0.0` or `::`.
    pub fn unspecified(self) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::UNSPECIFIED.into(),
            Self::V6 => Ipv6Addr::UNSPECIFIED.into(),
        }
    }

    fn raw(self) -> AddressFamily {
        match self {
            Self::V4 => AddressFamily::Inet,
            Self::V6 => AddressFamily::Inet6,
        }
    }

    fn from_raw(raw: u8) -> Option<Self> {
        match i32::from(raw) {
            libc::AF_INET => Some(Self::V4),
            libc::AF_INET6 => Some(Self::V6),
            _ => None,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// Which side of an interface a filter sits on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// What the interface has received.
    Ingress,
    /// What is about to be sent.
    Egress,
}

impl Direction {
    fn parent(self) -> TcHandle {
        TcHandle {
            major: TcHandle::CLSACT.major,
            minor: match self {
                Self::Ingress => TcHandle::MIN_INGRESS,
                Self::Egress => TcHandle::MIN_EGRESS,
            },
        }
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        })
    }
}

/// A network interface.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Link {
    /// Interface index.
    pub index: u32,
    /// Interface name.
    pub name: String,
    /// Largest packet in bytes, without the link-layer header.
    pub mtu: u32,
    /// Administratively up (`IFF_UP`).
    pub up: bool,
    /// Loopback (`IFF_LOOPBACK`).
    pub loopback: bool,
    /// Link-layer type, one of `ARPHRD_*`.
    pub link_type: u16,
    /// Hardware address, where the link layer is Ethernet-like.
    pub mac: Option<[u8; 6]>,
    /// The kernel knows BIG TCP over IPv4: it tells how long a super-packet may become when it is
    /// received (`IFLA_GRO_IPV4_MAX_SIZE`, Linux 6.3 and kernels it was backported to). Whether a TUN
    /// takes one (6.6) shows when one is written.
    pub big_tcp: bool,
}

/// An address on an interface.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Address {
    /// Index of the interface that holds it.
    pub index: u32,
    /// The address.
    pub addr: IpAddr,
    /// Prefix length.
    pub prefix: u8,
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

/// A route. One that has several next hops is read as several routes, one each.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Route {
    /// Destination network; a prefix length of 0 is the default route.
    pub dst: (IpAddr, u8),
    /// What becomes of the packet.
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
    /// MSS that TCP advertises on this route, in bytes.
    pub advmss: Option<u32>,
}

impl Route {
    /// The default route of a family in the main table; set what else it needs.
    pub fn default_of(family: Family) -> Self {
        Self::to(family.unspecified(), 0)
    }

    /// A unicast route to a network in the main table; set what else it needs.
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
            advmss: None,
        }
    }

    /// IPv4 or IPv6.
    pub fn family(&self) -> Family {
        Family::of(self.dst.0)
    }
}

/// The kernel's answer to "which way would this packet go".
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RouteAnswer {
    /// Whether it would be sent, or delivered on this host.
    pub kind: RouteKind,
    /// Index of the outgoing interface.
    pub oif: Option<u32>,
    /// Gateway, if the destination is not on the link.
    pub gateway: Option<IpAddr>,
    /// The source address that the kernel would choose.
    pub prefsrc: Option<IpAddr>,
    /// The MTU of the route or learned for the path; where it is absent the interface's counts.
    pub mtu: Option<u32>,
}

/// A policy routing rule, as far as this daemon makes them: `fwmark MARK/MASK lookup TABLE`.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Rule {
    /// IPv4 or IPv6.
    pub family: Family,
    /// Preference; the lower is asked first.
    pub priority: u32,
    /// Mark and mask.
    pub mark: Option<(u32, u32)>,
    /// The table that is looked up; `None` for rules with another action.
    pub table: Option<u32>,
    /// Whether it selects by anything besides the mark (only read, never written).
    pub selects_more: bool,
}

/// A tc filter on the clsact qdisc of an interface.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Filter {
    /// Classifier: `bpf`, `u32`, `flower`, ….
    pub kind: String,
    /// Preference; the lower runs first.
    pub priority: u16,
    /// Handle, unique within the preference; 0 in the entry that stands for the preference itself.
    pub handle: u32,
    /// EtherType that it sees, in host order.
    pub protocol: u16,
    /// Chain; packets start in chain 0.
    pub chain: u32,
    /// Name of the program, for `bpf`.
    pub name: Option<String>,
    /// Id of the program, for `bpf`.
    pub program_id: Option<u32>,
}

/// Where a cls_bpf filter sits: everything that tells it from another one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FilterSlot {
    /// Interface index.
    pub index: u32,
    /// Side of the interface.
    pub direction: Direction,
    /// Preference; the lower runs first.
    pub priority: u16,
    /// Handle, unique within the preference.
    pub handle: u32,
}

/// Why the kernel was not asked, or refused.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The socket could not be opened, written or read.
    #[error("netlink socket: {0}")]
    Socket(#[from] io::Error),
    /// The kernel refused.
    #[error("{request}: {}", describe(*errno, detail))]
    Refused {
        /// What was asked, such as `add qdisc clsact`.
        request: &'static str,
        /// The kernel's error number.
        errno: Errno,
        /// The kernel's own words, where it has any.
        detail: String,
    },
    /// An answer that makes no sense.
    #[error("{request}: the kernel's answer cannot be read")]
    Malformed {
        /// What was asked.
        request: &'static str,
    },
}

impl NetlinkError {
    /// The kernel's error number, if it was the kernel that refused.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Socket(error) => Errno::from_io_error(error),
            Self::Refused { errno, .. } => Some(*errno),
            Self::Malformed { .. } => None,
        }
    }

    /// The object exists already.
    pub fn is_exists(&self) -> bool {
        self.errno() == Some(Errno::EXIST)
    }

    /// The object, its table or its interface does not exist.
    pub fn is_missing(&self) -> bool {
        matches!(
            self.errno(),
            Some(Errno::NOENT | Errno::NODEV | Errno::SRCH | Errno::ADDRNOTAVAIL | Errno::NXIO)
        )
    }

    /// Privileges are missing.
    pub fn is_denied(&self) -> bool {
        matches!(self.errno(), Some(Errno::PERM | Errno::ACCESS))
    }
}

/// The kernel's words without errno's number.
fn describe(errno: Errno, detail: &str) -> String {
    let name = io::Error::from(errno).to_string();
    let name = name.split(" (os error").next().unwrap_or(&name).to_owned();
    if detail.is_empty() {
        name
    } else {
        format!("{name} ({detail})")
    }
}

type Result<T> = std::result::Result<T, NetlinkError>;

/// A blocking `NETLINK_ROUTE` socket of one network namespace.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
    sequence: Cell<u32>,
}

impl Netlink {
    /// Opens a socket in the calling thread's network namespace.
    pub fn new() -> Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        // Better error texts and filtered dumps where the kernel has them; all works without.
        let _ = socket.set_ext_ack(true);
        let _ = socket.set_cap_ack(true);
        let _ = socket.set_netlink_get_strict_chk(true);
        Ok(Self {
            socket,
            sequence: Cell::new(0),
        })
    }

    // Links.

    /// Every interface.
    pub fn links(&self) -> Result<Vec<Link>> {
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let answers = self.dump("list interfaces", request)?;
        Ok(answers.iter().filter_map(|a| read_link(a)).collect())
    }

    /// The interface called `name`; `None` if there is none.
    pub fn link_by_name(&self, name: &str) -> Result<Option<Link>> {
        Ok(self.links()?.into_iter().find(|link| link.name == name))
    }

    /// The interface with this index; `None` if there is none.
    pub fn link_by_index(&self, index: u32) -> Result<Option<Link>> {
        Ok(self.links()?.into_iter().find(|link| link.index == index))
    }

    /// Sets an interface up.
    pub fn set_link_up(&self, index: u32) -> Result<()> {
        let mut message = link_message(index);
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        self.acked("set interface up", RouteNetlinkMessage::SetLink(message), 0)
    }

    /// Sets an interface down.
    pub fn set_link_down(&self, index: u32) -> Result<()> {
        let mut message = link_message(index);
        message.header.change_mask = LinkFlags::Up;
        self.acked(
            "set interface down",
            RouteNetlinkMessage::SetLink(message),
            0,
        )
    }

    /// Sets the MTU of an interface, in bytes.
    pub fn set_link_mtu(&self, index: u32, mtu: u32) -> Result<()> {
        self.set_link("set interface MTU", index, LinkAttribute::Mtu(mtu))
    }

    /// Renames an interface (which older kernels only do while it is down).
    pub fn rename_link(&self, index: u32, name: &str) -> Result<()> {
        self.set_link(
            "rename interface",
            index,
            LinkAttribute::IfName(name.into()),
        )
    }

    /// Moves an interface into another network namespace.
    pub fn move_link(&self, index: u32, netns: BorrowedFd<'_>) -> Result<()> {
        let attribute = LinkAttribute::NetNsFd(netns.as_raw_fd());
        self.set_link("move interface", index, attribute)
    }

    /// Creates a pair of connected Ethernet interfaces; the peer straight in another network
    /// namespace if one is given.
    pub fn add_veth(&self, name: &str, peer: &str, netns: Option<BorrowedFd<'_>>) -> Result<()> {
        let mut other = LinkMessage::default();
        other.attributes.push(LinkAttribute::IfName(peer.into()));
        if let Some(netns) = netns {
            let attribute = LinkAttribute::NetNsFd(netns.as_raw_fd());
            other.attributes.push(attribute);
        }
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(name.into()),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Veth),
                LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(other))),
            ]),
        ];
        let request = RouteNetlinkMessage::NewLink(message);
        self.acked("create veth pair", request, NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Deletes an interface.
    pub fn delete_link(&self, index: u32) -> Result<()> {
        let request = RouteNetlinkMessage::DelLink(link_message(index));
        self.acked("delete interface", request, 0)
    }

    fn set_link(&self, what: &'static str, index: u32, attribute: LinkAttribute) -> Result<()> {
        let mut message = link_message(index);
        message.attributes.push(attribute);
        self.acked(what, RouteNetlinkMessage::SetLink(message), 0)
    }

    // Addresses.

    /// Every address of both families.
    pub fn addresses(&self) -> Result<Vec<Address>> {
        let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let answers = self.dump("list addresses", request)?;
        Ok(answers.iter().filter_map(|a| read_address(a)).collect())
    }

    /// Adds an address; an IPv6 address is usable at once (no duplicate address detection).
    pub fn add_address(&self, address: &Address) -> Result<()> {
        let request = RouteNetlinkMessage::NewAddress(address_message(address));
        self.acked("add address", request, NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Adds an address that is answered from, but not chosen as the source of anything else: of
    /// scope host (IPv4), or deprecated (IPv6, RFC 4862 section 5.5.4).
    pub fn add_quiet_address(&self, address: &Address) -> Result<()> {
        let mut message = address_message(address);
        match address.addr {
            IpAddr::V4(_) => message.header.scope = AddressScope::Host,
            IpAddr::V6(_) => {
                let mut lifetimes = CacheInfo::default();
                lifetimes.ifa_valid = u32::MAX;
                lifetimes.ifa_preferred = 0;
                let attributes = &mut message.attributes;
                attributes.push(AddressAttribute::CacheInfo(lifetimes));
            }
        }
        let request = RouteNetlinkMessage::NewAddress(message);
        self.acked("add address", request, NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Deletes an address.
    pub fn delete_address(&self, address: &Address) -> Result<()> {
        let request = RouteNetlinkMessage::DelAddress(address_message(address));
        self.acked("delete address", request, 0)
    }

    // Routes.

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

    /// Adds a route; an error if one with the same destination, table and metric exists.
    pub fn add_route(&self, route: &Route) -> Result<()> {
        let request = RouteNetlinkMessage::NewRoute(route_message(route));
        self.acked("add route", request, NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Adds a route, in place of one with the same destination, table and metric.
    pub fn replace_route(&self, route: &Route) -> Result<()> {
        let request = RouteNetlinkMessage::NewRoute(route_message(route));
        self.acked("replace route", request, NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Deletes a route.
    pub fn delete_route(&self, route: &Route) -> Result<()> {
        let mut message = route_message(route);
        message.header.scope = RouteScope::NoWhere;
        self.acked("delete route", RouteNetlinkMessage::DelRoute(message), 0)
    }

    /// Which way a packet to `dst` would go, optionally with a mark or from a source address.
    pub fn route_get(
        &self,
        dst: IpAddr,
        mark: Option<u32>,
        src: Option<IpAddr>,
    ) -> Result<RouteAnswer> {
        const WHAT: &str = "look up route";
        let bits = Family::of(dst).bits();
        let mut message = RouteMessage::default();
        message.header.address_family = Family::of(dst).raw();
        message.header.destination_prefix_length = bits;
        message
            .attributes
            .push(RouteAttribute::Destination(dst.into()));
        if let Some(src) = src {
            message.header.source_prefix_length = bits;
            message.attributes.push(RouteAttribute::Source(src.into()));
        }
        if let Some(mark) = mark {
            message.attributes.push(RouteAttribute::Mark(mark));
        }
        let request = RouteNetlinkMessage::GetRoute(message);
        let answers = self.exchange(WHAT, request, NLM_F_ACK)?;
        let route = answers.iter().find_map(|answer| read_route(answer).pop());
        let route = route.ok_or(NetlinkError::Malformed { request: WHAT })?;
        Ok(RouteAnswer {
            kind: route.kind,
            oif: route.dev,
            gateway: route.via,
            prefsrc: route.src,
            mtu: route.mtu,
        })
    }

    // Rules.

    /// Every policy routing rule of a family, in the order of preference.
    pub fn rules(&self, family: Family) -> Result<Vec<Rule>> {
        let mut message = RuleMessage::default();
        message.header.family = family.raw();
        let answers = self.dump("list rules", RouteNetlinkMessage::GetRule(message))?;
        Ok(answers
            .iter()
            .filter_map(|answer| read_rule(answer))
            .filter(|rule| rule.family == family)
            .collect())
    }

    /// Adds a rule; an error if the same one exists.
    pub fn add_rule(&self, rule: &Rule) -> Result<()> {
        let request = RouteNetlinkMessage::NewRule(rule_message(rule));
        self.acked("add rule", request, NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Deletes a rule.
    pub fn delete_rule(&self, rule: &Rule) -> Result<()> {
        self.acked(
            "delete rule",
            RouteNetlinkMessage::DelRule(rule_message(rule)),
            0,
        )
    }

    // Traffic control.

    /// Adds the clsact qdisc to an interface; an error if it has one (or an ingress qdisc).
    pub fn add_clsact(&self, index: u32) -> Result<()> {
        let request = RouteNetlinkMessage::NewQueueDiscipline(clsact_message(index));
        self.acked("add qdisc clsact", request, NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Deletes the clsact qdisc of an interface with every filter on it.
    pub fn delete_clsact(&self, index: u32) -> Result<()> {
        let request = RouteNetlinkMessage::DelQueueDiscipline(clsact_message(index));
        self.acked("delete qdisc clsact", request, 0)
    }

    /// Kinds of the qdiscs on an interface, such as `noqueue` and `clsact`.
    pub fn qdiscs(&self, index: u32) -> Result<Vec<String>> {
        let mut message = TcMessage::with_index(index as i32);
        // Not every kernel lists clsact, whose parent is the ingress handle, without being asked.
        message.attributes.push(TcAttribute::DumpInvisible(true));
        let request = RouteNetlinkMessage::GetQueueDiscipline(message);
        let answers = self.dump("list qdiscs", request)?;
        Ok(answers
            .iter()
            .filter_map(|answer| read_tc(answer))
            .filter(|tc| tc.index == index)
            .map(|tc| tc.kind)
            .collect())
    }

    /// Whether an interface has the clsact qdisc.
    pub fn has_clsact(&self, index: u32) -> Result<bool> {
        Ok(self.qdiscs(index)?.iter().any(|kind| kind == "clsact"))
    }

    /// The filters on one side of an interface's clsact qdisc; none if it has no such qdisc.
    pub fn filters(&self, index: u32, direction: Direction) -> Result<Vec<Filter>> {
        let mut message = TcMessage::with_index(index as i32);
        message.header.parent = direction.parent();
        let request = RouteNetlinkMessage::GetTrafficFilter(message);
        match self.dump("list filters", request) {
            Ok(answers) => Ok(answers
                .iter()
                .filter_map(|answer| read_tc(answer))
                .map(Tc::into_filter)
                .collect()),
            Err(error) if error.is_missing() => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// Attaches a program as a direct-action filter for all protocols; an error if the slot is
    /// taken. The filter keeps the program when `program` is closed.
    pub fn add_filter(&self, slot: FilterSlot, program: BorrowedFd<'_>, name: &str) -> Result<()> {
        let request = RouteNetlinkMessage::NewTrafficFilter(bpf_message(slot, program, name));
        self.acked("add bpf filter", request, NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Attaches a program in place of what the slot holds, without a gap: every packet meets
    /// either the old program or the new one.
    pub fn replace_filter(
        &self,
        slot: FilterSlot,
        program: BorrowedFd<'_>,
        name: &str,
    ) -> Result<()> {
        let request = RouteNetlinkMessage::NewTrafficFilter(bpf_message(slot, program, name));
        self.acked("replace bpf filter", request, NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Detaches a filter.
    pub fn delete_filter(&self, slot: FilterSlot) -> Result<()> {
        let mut message = slot_message(slot);
        message.attributes.push(TcAttribute::Kind("bpf".into()));
        self.acked(
            "delete filter",
            RouteNetlinkMessage::DelTrafficFilter(message),
            0,
        )
    }

    // The conversation.

    fn acked(&self, what: &'static str, message: RouteNetlinkMessage, flags: u16) -> Result<()> {
        self.exchange(what, message, NLM_F_ACK | flags).map(drop)
    }

    fn dump(&self, what: &'static str, message: RouteNetlinkMessage) -> Result<Vec<Vec<u8>>> {
        for _ in 1..MAX_DUMP_TRIES {
            let mut interrupted = false;
            let answers =
                self.exchange_once(what, message.clone(), NLM_F_DUMP, &mut interrupted)?;
            if !interrupted {
                return Ok(answers);
            }
        }
        self.exchange(what, message, NLM_F_DUMP)
    }

    fn exchange(
        &self,
        what: &'static str,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<Vec<Vec<u8>>> {
        self.exchange_once(what, message, flags, &mut false)
    }

    /// Sends one request and collects the payloads of its answers up to the final one.
    fn exchange_once(
        &self,
        request: &'static str,
        message: RouteNetlinkMessage,
        flags: u16,
        interrupted: &mut bool,
    ) -> Result<Vec<Vec<u8>>> {
        let sequence = self.sequence.get().wrapping_add(1);
        self.sequence.set(sequence);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = sequence;
        let mut packet = NetlinkMessage::new(header, NetlinkPayload::from(message));
        packet.finalize();
        let mut bytes = vec![0; packet.buffer_len()];
        packet.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;

        let mut answers = Vec::new();
        loop {
            let (datagram, _) = match self.socket.recv_from_full() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            };
            let mut rest = &datagram[..];
            while !rest.is_empty() {
                let answer = NetlinkBuffer::new_checked(rest)
                    .map_err(|_| NetlinkError::Malformed { request })?;
                let length = (answer.length() as usize).next_multiple_of(4);
                rest = rest.get(length..).unwrap_or_default();
                // The tail of an exchange that was given up on.
                if answer.sequence_number() != sequence {
                    continue;
                }
                *interrupted |= answer.flags() & NLM_F_DUMP_INTR != 0;
                match answer.message_type() {
                    NLMSG_ERROR | NLMSG_DONE => {
                        return match verdict(&answer) {
                            Some((errno, detail)) => Err(NetlinkError::Refused {
                                request,
                                errno,
                                detail,
                            }),
                            None => Ok(answers),
                        };
                    }
                    _ => answers.push(answer.payload().to_vec()),
                }
            }
        }
    }
}

// Requests.

fn link_message(index: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message
}

fn address_message(address: &Address) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = Family::of(address.addr).raw();
    message.header.prefix_len = address.prefix;
    message.header.index = address.index;
    message.attributes = match address.addr {
        IpAddr::V4(_) => vec![
            AddressAttribute::Local(address.addr),
            AddressAttribute::Address(address.addr),
        ],
        IpAddr::V6(_) => {
            message.header.flags = AddressHeaderFlags::Nodad;
            vec![AddressAttribute::Address(address.addr)]
        }
    };
    message
}

fn route_message(route: &Route) -> RouteMessage {
    let mut message = RouteMessage::default();
    let on_link = route.via.is_none() && route.kind == RouteKind::Unicast;
    message.header = RouteHeader {
        address_family: route.family().raw(),
        destination_prefix_length: route.dst.1,
        protocol: RouteProtocol::Static,
        scope: if on_link && route.family() == Family::V4 {
            RouteScope::Link
        } else {
            RouteScope::Universe
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
    let metrics: Vec<_> = [
        route.mtu.map(RouteMetric::Mtu),
        route.advmss.map(RouteMetric::Advmss),
    ]
    .into_iter()
    .flatten()
    .collect();
    if !metrics.is_empty() {
        attributes.push(RouteAttribute::Metrics(metrics));
    }
    message
}

fn rule_message(rule: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header = RuleHeader {
        family: rule.family.raw(),
        action: RuleAction::ToTable,
        ..RuleHeader::default()
    };
    message
        .attributes
        .push(RuleAttribute::Priority(rule.priority));
    if let Some((mark, mask)) = rule.mark {
        message.attributes.push(RuleAttribute::FwMark(mark));
        message.attributes.push(RuleAttribute::FwMask(mask));
    }
    message
        .attributes
        .extend(rule.table.map(RuleAttribute::Table));
    message
}

fn clsact_message(index: u32) -> TcMessage {
    let mut message = TcMessage::with_index(index as i32);
    message.header.parent = TcHandle::CLSACT;
    message.header.handle = TcHandle {
        major: TcHandle::CLSACT.major,
        minor: 0,
    };
    message.attributes.push(TcAttribute::Kind("clsact".into()));
    message
}

fn slot_message(slot: FilterSlot) -> TcMessage {
    let mut message = TcMessage::with_index(slot.index as i32);
    message.header.parent = slot.direction.parent();
    message.header.handle = TcHandle::from(slot.handle);
    message.header.info = u32::from(slot.priority) << 16 | PROTOCOL_ALL;
    message
}

fn bpf_message(slot: FilterSlot, program: BorrowedFd<'_>, name: &str) -> TcMessage {
    let mut message = slot_message(slot);
    message.attributes = vec![
        TcAttribute::Kind("bpf".into()),
        TcAttribute::Options(vec![
            TcOption::Bpf(TcFilterBpfOption::ProgFd(program.as_raw_fd() as u32)),
            TcOption::Bpf(TcFilterBpfOption::ProgName(name.into())),
            TcOption::Bpf(TcFilterBpfOption::Flags(TcBpfFlags::DirectAction)),
        ]),
    ];
    message
}

// Answers.

/// What a final answer says: an error number with the kernel's words, or success.
fn verdict(answer: &NetlinkBuffer<&[u8]>) -> Option<(Errno, String)> {
    const NLMSGERR_ATTR_MSG: u16 = 1;
    let payload = answer.payload();
    let code = payload
        .first_chunk()
        .map_or(0, |raw| i32::from_ne_bytes(*raw));
    if code == 0 {
        return None;
    }
    // The request's header stands between the code of an error and its words.
    let words = match answer.message_type() {
        NLMSG_ERROR => 20,
        _ => 4,
    };
    let mut detail = String::new();
    if answer.flags() & NLM_F_ACK_TLVS != 0 {
        for (kind, value) in attributes(payload.get(words..).unwrap_or_default()) {
            if kind == NLMSGERR_ATTR_MSG {
                detail = text(value);
            }
        }
    }
    Some((Errno::from_raw_os_error(-code), detail))
}

fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    NlasIterator::new(bytes)
        .map_while(std::result::Result::ok)
        .map(|attribute| {
            let length = attribute.value_length();
            let value = attribute.into_inner();
            (
                u16::from_ne_bytes([value[2], value[3]]) & 0x3fff,
                &value[4..4 + length],
            )
        })
}

fn read_link(payload: &[u8]) -> Option<Link> {
    let (header, rest) = payload.split_first_chunk::<16>()?;
    let flags = word(&header[8..12])?;
    let mut link = Link {
        index: word(&header[4..8])?,
        name: String::new(),
        mtu: 0,
        up: flags & libc::IFF_UP as u32 != 0,
        loopback: flags & libc::IFF_LOOPBACK as u32 != 0,
        link_type: u16::from_ne_bytes([header[2], header[3]]),
        mac: None,
        big_tcp: false,
    };
    for (kind, value) in attributes(rest) {
        match kind {
            libc::IFLA_IFNAME => link.name = text(value),
            libc::IFLA_MTU => link.mtu = word(value)?,
            libc::IFLA_ADDRESS => link.mac = value.try_into().ok(),
            IFLA_GRO_IPV4_MAX_SIZE => link.big_tcp = true,
            _ => {}
        }
    }
    Some(link)
}

fn read_address(payload: &[u8]) -> Option<Address> {
    let (header, rest) = payload.split_first_chunk::<8>()?;
    let (mut addr, mut local) = (None, None);
    for (kind, value) in attributes(rest) {
        match kind {
            libc::IFA_ADDRESS => addr = ip(value),
            libc::IFA_LOCAL => local = ip(value),
            _ => {}
        }
    }
    Some(Address {
        index: word(&header[4..8])?,
        // On a point-to-point link IFA_ADDRESS is the other end's.
        addr: local.or(addr)?,
        prefix: header[1],
    })
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
                libc::RTA_VIA => route.via = value.get(2..).and_then(ip),
                libc::RTA_PRIORITY => route.metric = word(value),
                libc::RTA_PREFSRC => route.src = ip(value),
                libc::RTA_METRICS => {
                    for (metric, value) in attributes(value) {
                        match metric {
                            RTAX_MTU => route.mtu = word(value),
                            RTAX_ADVMSS => route.advmss = word(value),
                            _ => {}
                        }
                    }
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
const RTAX_ADVMSS: u16 = 8;

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
            libc::RTA_VIA => value.get(2..).and_then(ip),
            _ => None,
        });
        hops.push((dev, via));
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    hops
}

fn read_rule(payload: &[u8]) -> Option<Rule> {
    const FR_ACT_TO_TBL: u8 = 1;
    // From linux/fib_rules.h.
    const FRA_PRIORITY: u16 = 6;
    const FRA_FWMARK: u16 = 10;
    const FRA_SUPPRESS_PREFIXLEN: u16 = 14;
    const FRA_TABLE: u16 = 15;
    const FRA_FWMASK: u16 = 16;
    const FRA_PAD: u16 = 18;
    const FRA_PROTOCOL: u16 = 21;
    const FIB_RULE_INVERT: u32 = 2;
    let (header, rest) = payload.split_first_chunk::<12>()?;
    let mut rule = Rule {
        family: Family::from_raw(header[0])?,
        priority: 0,
        mark: None,
        table: Some(header[4].into()),
        selects_more: header[1] > 0
            || header[2] > 0
            || header[3] > 0
            || word(&header[8..12])? & FIB_RULE_INVERT != 0,
    };
    let (mut mark, mut mask) = (None, u32::MAX);
    for (kind, value) in attributes(rest) {
        match kind {
            FRA_PRIORITY => rule.priority = word(value)?,
            FRA_FWMARK => mark = word(value),
            FRA_FWMASK => mask = word(value)?,
            FRA_TABLE => rule.table = word(value),
            // "Suppress nothing" is what every rule without a suppressor says.
            FRA_SUPPRESS_PREFIXLEN if word(value) == Some(u32::MAX) => {}
            FRA_PAD | FRA_PROTOCOL => {}
            _ => rule.selects_more = true,
        }
    }
    rule.mark = mark.map(|mark| (mark, mask));
    if header[7] != FR_ACT_TO_TBL {
        rule.table = None;
    }
    Some(rule)
}

/// A qdisc or filter as it is listed.
struct Tc {
    index: u32,
    handle: u32,
    info: u32,
    kind: String,
    chain: u32,
    name: Option<String>,
    program_id: Option<u32>,
}

impl Tc {
    fn into_filter(self) -> Filter {
        Filter {
            kind: self.kind,
            priority: (self.info >> 16) as u16,
            handle: self.handle,
            protocol: u16::from_be(self.info as u16),
            chain: self.chain,
            name: self.name,
            program_id: self.program_id,
        }
    }
}

fn read_tc(payload: &[u8]) -> Option<Tc> {
    const TCA_KIND: u16 = 1;
    const TCA_OPTIONS: u16 = 2;
    const TCA_CHAIN: u16 = 11;
    const TCA_BPF_NAME: u16 = 7;
    const TCA_BPF_ID: u16 = 11;
    let (header, rest) = payload.split_first_chunk::<20>()?;
    let mut tc = Tc {
        index: word(&header[4..8])?,
        handle: word(&header[8..12])?,
        info: word(&header[16..20])?,
        kind: String::new(),
        chain: 0,
        name: None,
        program_id: None,
    };
    for (kind, value) in attributes(rest) {
        match kind {
            TCA_KIND => tc.kind = text(value),
            TCA_CHAIN => tc.chain = word(value)?,
            TCA_OPTIONS if tc.kind == "bpf" => {
                for (option, value) in attributes(value) {
                    match option {
                        TCA_BPF_NAME => tc.name = Some(text(value)),
                        TCA_BPF_ID => tc.program_id = word(value),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    Some(tc)
}

fn word(value: &[u8]) -> Option<u32> {
    value.first_chunk().map(|raw| u32::from_ne_bytes(*raw))
}

fn text(value: &[u8]) -> String {
    let end = value.iter().position(|&b| b == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

fn ip(value: &[u8]) -> Option<IpAddr> {
    if let Ok(octets) = <[u8; 4]>::try_from(value) {
        return Some(octets.into());
    }
    <[u8; 16]>::try_from(value).ok().map(IpAddr::from)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::kernel::testing::in_fresh_namespace;

    fn veth(netlink: &Netlink) -> Link {
        netlink.add_veth("v0", "v1", None).unwrap();
        let peer = netlink.link_by_name("v1").unwrap().unwrap();
        let link = netlink.link_by_name("v0").unwrap().unwrap();
        netlink.set_link_up(peer.index).unwrap();
        netlink.set_link_up(link.index).unwrap();
        link
    }

    #[test]
    fn links_come_change_and_go() {
        in_fresh_namespace(|| {
            let netlink = Netlink::new().unwrap();
            let lo = netlink.link_by_name("lo").unwrap().unwrap();
            assert!(lo.loopback && !lo.up && lo.link_type == libc::ARPHRD_LOOPBACK);
            let link = veth(&netlink);
            assert_eq!(link.link_type, libc::ARPHRD_ETHER);
            assert!(link.mac.is_some());
            netlink.set_link_mtu(link.index, 1300).unwrap();
            netlink.set_link_down(link.index).unwrap();
            netlink.rename_link(link.index, "w0").unwrap();
            let renamed = netlink.link_by_index(link.index).unwrap().unwrap();
            assert_eq!(
                (renamed.name.as_str(), renamed.mtu, renamed.up),
                ("w0", 1300, false)
            );
            assert!(netlink.add_veth("w0", "w1", None).unwrap_err().is_exists());
            netlink.delete_link(link.index).unwrap();
            assert_eq!(netlink.link_by_name("v1").unwrap(), None);
            assert!(netlink.delete_link(link.index).unwrap_err().is_missing());
        });
    }

    #[test]
    fn a_peer_is_made_in_another_namespace() {
        let (name, fd) = in_fresh_namespace(|| {
            let other =
                in_fresh_namespace(|| std::fs::File::open("/proc/thread-self/ns/net").unwrap());
            let netlink = Netlink::new().unwrap();
            netlink.add_veth("v0", "v1", Some(other.as_fd())).unwrap();
            assert_eq!(netlink.link_by_name("v1").unwrap(), None);
            let link = netlink.link_by_name("v0").unwrap().unwrap();
            netlink.move_link(link.index, other.as_fd()).unwrap();
            assert_eq!(netlink.links().unwrap().len(), 1);
            (link.name, other)
        });
        assert_eq!(name, "v0");
        drop(fd);
    }

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
                    advmss: Some(1340),
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
                netlink.replace_route(&blackhole).unwrap();
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
    fn the_kernel_is_asked_for_the_way() {
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
            assert_eq!(answer.mtu, Some(1400));

            let rule = Rule {
                family: Family::V4,
                priority: 100,
                mark: Some((0x6970_6d76, u32::MAX)),
                table: Some(0x6970_6d76),
                selects_more: false,
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

    #[test]
    fn clsact_is_seen() {
        in_fresh_namespace(|| {
            let netlink = Netlink::new().unwrap();
            let index = veth(&netlink).index;
            assert!(!netlink.has_clsact(index).unwrap());
            assert_eq!(netlink.filters(index, Direction::Ingress).unwrap(), []);
            netlink.add_clsact(index).unwrap();
            assert!(netlink.add_clsact(index).unwrap_err().is_exists());
            assert!(netlink.has_clsact(index).unwrap());
            assert_eq!(netlink.filters(index, Direction::Egress).unwrap(), []);
            netlink.delete_clsact(index).unwrap();
            assert!(!netlink.has_clsact(index).unwrap());
            let gone = netlink.delete_clsact(index).unwrap_err();
            assert!(gone.errno().is_some(), "{gone}");
        });
    }
}
