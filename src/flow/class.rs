//! How long a flow is remembered, and which one gives way first: policy without mechanism.

use std::time::Duration;

use crate::model::moved::{TCP, UDP};
use crate::packet::{ICMP, ICMPV6};

/// TCP, no handshake seen to its end: not less than 4 minutes (RFC 5382 REQ-5, "partially open").
pub const TCP_OPENING: Duration = Duration::from_secs(240);
/// TCP, established: not less than 2 hours 4 minutes (RFC 5382 REQ-5).
pub const TCP_ESTABLISHED: Duration = Duration::from_secs(7440);
/// TCP, FIN seen from both sides: not less than 4 minutes (RFC 5382 REQ-5, "closing").
pub const TCP_CLOSING: Duration = Duration::from_secs(240);
/// TCP after RST: RFC 5382 leaves it open; long enough for what is still under way.
pub const TCP_RESET: Duration = Duration::from_secs(10);
/// UDP, no answer yet: not less than 2 minutes (RFC 4787 REQ-5).
pub const UDP_ONE_WAY: Duration = Duration::from_secs(120);
/// UDP, both directions seen: 5 minutes are recommended (RFC 4787 REQ-5).
pub const UDP_BOTH_WAYS: Duration = Duration::from_secs(300);
/// ICMP queries: not less than 60 seconds (RFC 5508 REQ-2).
pub const ICMP_QUERY: Duration = Duration::from_secs(60);
/// Any other protocol: what the Linux connection tracker gives them.
pub const OTHER: Duration = Duration::from_secs(600);

/// A flow without a connection (UDP, ICMP, closing TCP …) used this recently is not evicted.
pub const RECENT: Duration = Duration::from_secs(10);
/// Nor is an established TCP connection used this recently. Evicting an idle one is seldom fatal:
/// its next packet makes the flow anew where only one is possible.
pub const RECENT_TCP: Duration = Duration::from_secs(1800);

/// The lists: flows with the same timeout.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(super) enum Class {
    TcpOpening,
    TcpEstablished,
    TcpClosing,
    TcpReset,
    UdpOneWay,
    Udp,
    IcmpOneWay,
    Icmp,
    OtherOneWay,
    Other,
}

impl Class {
    pub(super) const COUNT: usize = Self::ALL.len();
    pub(super) const ALL: [Self; 10] = [
        Self::TcpOpening,
        Self::TcpEstablished,
        Self::TcpClosing,
        Self::TcpReset,
        Self::UdpOneWay,
        Self::Udp,
        Self::IcmpOneWay,
        Self::Icmp,
        Self::OtherOneWay,
        Self::Other,
    ];

    pub(super) fn of(protocol: u8, seen: u8) -> Self {
        use seen::{ANSWERED, BOTH, FIN_BOTH, RESET};
        let answered = seen & BOTH == BOTH;
        match protocol {
            TCP if seen & RESET != 0 => Self::TcpReset,
            TCP if seen & FIN_BOTH == FIN_BOTH => Self::TcpClosing,
            TCP if answered && seen & ANSWERED != 0 => Self::TcpEstablished,
            TCP => Self::TcpOpening,
            UDP if answered => Self::Udp,
            UDP => Self::UdpOneWay,
            ICMP | ICMPV6 if answered => Self::Icmp,
            ICMP | ICMPV6 => Self::IcmpOneWay,
            _ if answered => Self::Other,
            _ => Self::OtherOneWay,
        }
    }

    #[inline]
    pub(super) fn timeout(self) -> u32 {
        let timeout = match self {
            Self::TcpOpening => TCP_OPENING,
            Self::TcpEstablished => TCP_ESTABLISHED,
            Self::TcpClosing => TCP_CLOSING,
            Self::TcpReset => TCP_RESET,
            Self::UdpOneWay => UDP_ONE_WAY,
            Self::Udp => UDP_BOTH_WAYS,
            Self::IcmpOneWay | Self::Icmp => ICMP_QUERY,
            Self::OtherOneWay | Self::Other => OTHER,
        };
        timeout.as_secs() as u32
    }

    /// How readily a flow gives way that was not seen for `idle` seconds, the least first; `None` if it
    /// is in use. The order of `FlowTable::dispensable`.
    pub(super) fn dispensable(self, idle: u32) -> Option<u8> {
        match self {
            Self::TcpReset => Some(0),
            Self::TcpOpening | Self::UdpOneWay | Self::IcmpOneWay | Self::OtherOneWay => Some(1),
            Self::TcpClosing | Self::Udp | Self::Icmp | Self::Other => {
                (u64::from(idle) >= RECENT.as_secs()).then_some(2)
            }
            Self::TcpEstablished => (u64::from(idle) >= RECENT_TCP.as_secs()).then_some(3),
        }
    }

    pub(super) fn is_one_way(self) -> bool {
        match self {
            Self::TcpOpening | Self::UdpOneWay | Self::IcmpOneWay | Self::OtherOneWay => true,
            Self::TcpEstablished
            | Self::TcpClosing
            | Self::TcpReset
            | Self::Udp
            | Self::Icmp
            | Self::Other => false,
        }
    }
}

/// Where a packet came from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Side {
    Client,
    Application,
}

/// What was seen of a flow.
pub(super) mod seen {
    pub(in crate::flow) const CLIENT: u8 = 1;
    pub(in crate::flow) const APPLICATION: u8 = 2;
    pub(in crate::flow) const BOTH: u8 = CLIENT | APPLICATION;
    /// The client sent a TCP packet other than its SYN: with an answer seen, its handshake is done.
    pub(in crate::flow) const ANSWERED: u8 = 4;
    pub(in crate::flow) const FIN_CLIENT: u8 = 8;
    pub(in crate::flow) const FIN_APPLICATION: u8 = 16;
    pub(in crate::flow) const FIN_BOTH: u8 = FIN_CLIENT | FIN_APPLICATION;
    pub(in crate::flow) const RESET: u8 = 32;
}
