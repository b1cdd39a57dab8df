//! What is known of a flow, how long that is worth keeping, and which flow gives way first.
//!
//! Owns the states of a flow ([`Seen`]), the classes that follow from them, the timeout of each,
//! and the order of eviction. This is policy alone: the entries lie in [`table`](super::table),
//! which asks here.

use std::time::Duration;

use crate::model::moved::{TCP, UDP};
use crate::packet::{ACK, FIN, ICMP, ICMPV6, RST, SYN};

/// TCP, no handshake seen to its end: not less than 4 minutes (RFC 5382 REQ-5, "partially open").
pub const TCP_OPENING: Duration = Duration::from_secs(240);
/// TCP, established: not less than 2 hours 4 minutes (RFC 5382 REQ-5).
pub const TCP_ESTABLISHED: Duration = Duration::from_secs(7440);
/// TCP, FIN seen from both sides: not less than 4 minutes (RFC 5382 REQ-5, "closing").
pub const TCP_CLOSING: Duration = Duration::from_secs(240);
/// TCP, FIN seen from one side. RFC 5382 takes it for established, but whoever closes its half and
/// vanishes would be remembered for two hours, and both kernels forget it sooner: Linux gives it
/// 60 s (`tcp_fin_timeout`), its connection tracker 60 or 120 s. While data still flows it lives.
pub const TCP_HALF_CLOSED: Duration = TCP_CLOSING;
/// TCP after RST: RFC 5382 leaves it open. Long enough for packets that are still under way.
pub const TCP_RESET: Duration = Duration::from_secs(10);
/// UDP, no reply yet: not less than 2 minutes (RFC 4787 REQ-5).
pub const UDP_ONE_WAY: Duration = Duration::from_secs(120);
/// UDP, both directions seen: 5 minutes are recommended (RFC 4787 REQ-5).
pub const UDP_BOTH_WAYS: Duration = Duration::from_secs(300);
/// ICMP queries: not less than 60 seconds (RFC 5508 REQ-2).
pub const ICMP_QUERY: Duration = Duration::from_secs(60);
/// Any other protocol: what the Linux connection tracker gives them.
pub const OTHER: Duration = Duration::from_secs(600);

/// A flow without a connection (UDP, ICMP, closing or half-closed TCP …) used this recently is not
/// evicted.
pub const RECENT: Duration = Duration::from_secs(10);
/// An established TCP connection used this recently is not evicted either. Evicting an idle one is
/// seldom fatal: its next packet makes the flow anew where only one is possible.
pub const RECENT_TCP: Duration = Duration::from_secs(1800);

/// How flows give way to new ones: the first tier before the next, and within a tier the flow that
/// was unused for the longest time.
///
/// A forged RST makes a flow the first to go, and 10 s without a packet end it. That costs the
/// client nothing where its next packet makes the same flow again. It costs the connection only
/// where the flow was told apart by a port, and the flow that has the plain port is gone meanwhile;
/// an application that speaks within the 10 s undoes it. A forged FIN does less.
pub(super) const EVICTION_ORDER: [Tier; 4] = [
    Tier {
        classes: &[Class::TcpReset],
        idle: Duration::ZERO,
    },
    UNCONFIRMED,
    Tier {
        classes: &[
            Class::TcpHalfClosed,
            Class::TcpClosing,
            Class::Icmp,
            Class::Udp,
            Class::Other,
        ],
        idle: RECENT,
    },
    Tier {
        classes: &[Class::TcpEstablished],
        idle: RECENT_TCP,
    },
];

/// Every flow, in use or not.
pub(super) const ANY: Tier = Tier {
    classes: &Class::ALL,
    idle: Duration::ZERO,
};

/// Flows whose client has not been seen to go on after a reply. A flood with forged sources
/// consists of such, whether it is answered or not.
pub(super) const UNCONFIRMED: Tier = Tier {
    classes: &[
        Class::TcpOpening,
        Class::UdpOneWay,
        Class::UdpAnswered,
        Class::IcmpOneWay,
        Class::OtherOneWay,
    ],
    idle: Duration::ZERO,
};

/// Classes whose flows are equally dispensable.
pub(super) struct Tier {
    pub(super) classes: &'static [Class],
    /// A flow that was used more recently than this is in use, and stays.
    idle: Duration,
}

impl Tier {
    /// Whether a flow may go that was unused for `idle` seconds.
    pub(super) fn lets_go(&self, idle: u32) -> bool {
        u64::from(idle) >= self.idle.as_secs()
    }
}

/// Flows that are treated alike: they have one timeout and one place in the order of eviction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(super) enum Class {
    TcpOpening,
    TcpEstablished,
    TcpHalfClosed,
    TcpClosing,
    TcpReset,
    UdpOneWay,
    UdpAnswered,
    Udp,
    IcmpOneWay,
    Icmp,
    OtherOneWay,
    Other,
}

impl Class {
    pub(super) const COUNT: usize = Self::ALL.len();
    pub(super) const ALL: [Self; 12] = [
        Self::TcpOpening,
        Self::TcpEstablished,
        Self::TcpHalfClosed,
        Self::TcpClosing,
        Self::TcpReset,
        Self::UdpOneWay,
        Self::UdpAnswered,
        Self::Udp,
        Self::IcmpOneWay,
        Self::Icmp,
        Self::OtherOneWay,
        Self::Other,
    ];

    pub(super) fn of(protocol: u8, seen: Seen) -> Self {
        let replied = seen.has(Seen::BOTH);
        let confirmed = replied && seen.has(Seen::WENT_ON);
        match protocol {
            TCP if seen.has(Seen::RESET) => Self::TcpReset,
            TCP if seen.has(Seen::FIN_BOTH) => Self::TcpClosing,
            TCP if confirmed && seen.has_any(Seen::FIN_BOTH) => Self::TcpHalfClosed,
            TCP if confirmed => Self::TcpEstablished,
            TCP => Self::TcpOpening,
            UDP if confirmed => Self::Udp,
            UDP if replied => Self::UdpAnswered,
            UDP => Self::UdpOneWay,
            ICMP | ICMPV6 if confirmed => Self::Icmp,
            ICMP | ICMPV6 => Self::IcmpOneWay,
            _ if confirmed => Self::Other,
            _ => Self::OtherOneWay,
        }
    }

    /// Seconds after its last packet until a flow is forgotten.
    #[inline]
    pub(super) fn timeout(self) -> u32 {
        let timeout = match self {
            Self::TcpOpening => TCP_OPENING,
            Self::TcpEstablished => TCP_ESTABLISHED,
            Self::TcpHalfClosed => TCP_HALF_CLOSED,
            Self::TcpClosing => TCP_CLOSING,
            Self::TcpReset => TCP_RESET,
            Self::UdpOneWay => UDP_ONE_WAY,
            Self::UdpAnswered | Self::Udp => UDP_BOTH_WAYS,
            Self::IcmpOneWay | Self::Icmp => ICMP_QUERY,
            Self::OtherOneWay | Self::Other => OTHER,
        };
        timeout.as_secs() as u32
    }

    /// The tier of [`EVICTION_ORDER`] in which a flow gives way that was unused for `idle` seconds;
    /// `None` if it is in use.
    pub(super) fn eviction_tier(self, idle: u32) -> Option<usize> {
        EVICTION_ORDER
            .iter()
            .position(|tier| tier.classes.contains(&self))
            .filter(|&index| EVICTION_ORDER[index].lets_go(idle))
    }

    /// Whether it is one of [`UNCONFIRMED`].
    pub(super) fn is_unconfirmed(self) -> bool {
        match self {
            Self::TcpOpening
            | Self::UdpOneWay
            | Self::UdpAnswered
            | Self::IcmpOneWay
            | Self::OtherOneWay => true,
            Self::TcpEstablished
            | Self::TcpHalfClosed
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
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Seen(u8);

impl Seen {
    const CLIENT: Self = Self(1);
    const APPLICATION: Self = Self(2);
    const BOTH: Self = Self(1 | 2);
    /// The client sent a TCP packet other than its SYN: once a reply was seen too, the handshake is
    /// done. Without TCP, it sent something after a reply.
    const WENT_ON: Self = Self(4);
    const FIN_CLIENT: Self = Self(8);
    const FIN_APPLICATION: Self = Self(16);
    const FIN_BOTH: Self = Self(8 | 16);
    const RESET: Self = Self(32);

    /// What was seen of the flow, including a packet of `protocol` from `side`.
    #[inline]
    pub(super) fn after(self, protocol: u8, side: Side, tcp_flags: u8) -> Self {
        let own = match side {
            Side::Client => Self::CLIENT,
            Side::Application => Self::APPLICATION,
        };
        if protocol != TCP {
            let went_on = side == Side::Client && self.has(Self::APPLICATION);
            let seen = self.with(own);
            return if went_on {
                seen.with(Self::WENT_ON)
            } else {
                seen
            };
        }
        if tcp_flags & RST != 0 {
            return self.with(own).with(Self::RESET);
        }
        match side {
            Side::Client if tcp_flags & (SYN | ACK) == SYN => {
                // A SYN on a closed connection opens another. On a live one it is a repetition or a
                // forgery, and the application's reply will tell.
                let closed = self.has(Self::RESET) || self.has(Self::FIN_BOTH);
                if closed { own } else { self.with(own) }
            }
            Side::Client => {
                let seen = self.with(own).with(Self::WENT_ON);
                if tcp_flags & FIN != 0 {
                    seen.with(Self::FIN_CLIENT)
                } else {
                    seen
                }
            }
            // A connection that begins on this side, after another one with the same ports.
            Side::Application if tcp_flags & (SYN | ACK) == SYN && self.has(Self::FIN_BOTH) => own,
            // The application, which is next door, goes on: it did not accept the RST.
            Side::Application => {
                let seen = Self(self.0 & !Self::RESET.0).with(own);
                if tcp_flags & FIN != 0 {
                    seen.with(Self::FIN_APPLICATION)
                } else {
                    seen
                }
            }
        }
    }

    /// Whether the application has answered, and not only refused; `None` if nothing came from it.
    ///
    /// A client's own RST, behind the answer to its SYN, looks like a refusal to a table that takes
    /// clients' RSTs for what they say: a scan sends such.
    pub(super) fn answer(self, protocol: u8) -> Option<bool> {
        let refused = protocol == TCP && self.has(Self::RESET) && !self.has(Self::WENT_ON);
        self.has(Self::APPLICATION).then_some(!refused)
    }

    /// As six bits, for a table that packs its entries. Of a flow that was seen, not all are zero.
    #[inline]
    pub(super) fn bits(self) -> u8 {
        self.0
    }

    /// What [`Self::bits`] gave.
    #[inline]
    pub(super) fn from_bits(bits: u8) -> Self {
        Self(bits)
    }

    /// Whether no packet was seen, as of no flow.
    pub(super) fn is_nothing(self) -> bool {
        self == Self::default()
    }

    /// Whether a new connection may take its place: it was reset, or closed from both sides.
    pub(super) fn is_over(self) -> bool {
        self.has(Self::RESET) || self.has(Self::FIN_BOTH)
    }

    /// Whether its client has gone on, as far as [`Self::WENT_ON`] tells.
    pub(super) fn has_gone_on(self) -> bool {
        self.has(Self::WENT_ON)
    }

    /// Whether the application has said anything.
    pub(super) fn is_answered(self) -> bool {
        self.has(Self::APPLICATION)
    }

    #[inline]
    fn has_any(self, some: Self) -> bool {
        self.0 & some.0 != 0
    }

    #[inline]
    fn has(self, all: Self) -> bool {
        self.0 & all.0 == all.0
    }

    #[inline]
    fn with(self, more: Self) -> Self {
        Self(self.0 | more.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_class_has_one_place_in_the_order_of_eviction() {
        for class in Class::ALL {
            let tiers = EVICTION_ORDER
                .iter()
                .filter(|tier| tier.classes.contains(&class));
            assert_eq!(tiers.count(), 1, "{class:?}");
            assert_eq!(class.is_unconfirmed(), class.eviction_tier(0) == Some(1));
        }
        let established = |idle| Class::TcpEstablished.eviction_tier(idle);
        assert_eq!((established(1_799), established(1_800)), (None, Some(3)));
    }
}
