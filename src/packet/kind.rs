//! What an IP packet carries: ports, a query, an error, or something known by its number alone.

use std::fmt;

use crate::model::moved::{TCP, UDP};
use crate::packet::addr::Family;
use crate::packet::field::{ICMP, ICMPV6, get_u16, icmp};

/// What follows the IP header.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Kind {
    /// TCP, with ports.
    Tcp,
    /// UDP, with ports.
    Udp,
    /// An ICMP query (echo request and its like): its identifier is the source port, the
    /// destination port is 0.
    IcmpQuery,
    /// A reply to an ICMP query: its identifier is the destination port, the source port is 0.
    IcmpReply,
    /// An ICMP error, which quotes the packet it is about ([`Quoted`](crate::packet::Quoted)).
    IcmpError,
    /// Any other protocol, known by its number alone.
    Other,
    /// A later fragment: what follows is a part of the payload.
    LaterFragment,
}

impl Kind {
    /// Whether packets of this kind have ports, rather than something that stands for them.
    #[inline]
    pub fn has_ports(self) -> bool {
        matches!(self, Self::Tcp | Self::Udp)
    }
}

pub(super) fn icmp_kind(family: Family, icmp_type: u8) -> Option<Kind> {
    match (family, icmp_type) {
        // Echo, timestamp, information, address mask.
        (Family::V4, 8 | 13 | 15 | 17) | (Family::V6, 128) => Some(Kind::IcmpQuery),
        (Family::V4, 0 | 14 | 16 | 18) | (Family::V6, 129) => Some(Kind::IcmpReply),
        // Unreachable (with too big), time exceeded, parameter problem. Source quench is
        // deprecated (RFC 6633), redirects concern the link they were sent on.
        (Family::V4, 3 | 11 | 12) | (Family::V6, 1..=4) => Some(Kind::IcmpError),
        _ => None,
    }
}

/// The ports that stand for an ICMP identifier, which is on the side where a client has its port.
pub(super) fn icmp_ports(kind: Kind, l4: &[u8]) -> (u16, u16) {
    let id = get_u16(l4, icmp::ID);
    match kind {
        Kind::IcmpQuery => (id, 0),
        Kind::IcmpReply => (0, id),
        Kind::Tcp | Kind::Udp | Kind::IcmpError | Kind::Other | Kind::LaterFragment => (0, 0),
    }
}

/// The name of an IP protocol, for people.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ProtocolName(pub u8);

impl fmt::Display for ProtocolName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            TCP => f.write_str("TCP"),
            UDP => f.write_str("UDP"),
            ICMP | ICMPV6 => f.write_str("ICMP"),
            other => write!(f, "IP protocol {other}"),
        }
    }
}
