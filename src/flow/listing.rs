//! The flows that there are, read a few at a time while others carry packets.
//!
//! Owns what a reader gets of a flow ([`Row`]), where it goes on ([`Place`]), and how much it may
//! read in one go ([`SLICE`]). The tables own their entries, and say what is in a slice.

use std::time::{Duration, Instant};

use crate::flow::class::{Class, Seen};
use crate::model::moved::TCP;
use crate::model::peer::PeerId;
use crate::packet::Addr;

/// Entries of a locked table that are looked at in one go. A lane that wants the lock meanwhile
/// waits for so many: some five microseconds.
pub(super) const SLICE: u32 = 128;

/// Where a flow lies, in the order in which flows are read.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Place {
    /// The table.
    pub part: u32,
    /// The place in it.
    pub at: u32,
}

/// A flow at one moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Row {
    /// Where it lies as long as it lives.
    pub place: Place,
    /// The peer that it goes to or comes from.
    pub peer: PeerId,
    /// IP protocol number.
    pub protocol: u8,
    /// The client.
    pub client: Addr,
    /// Its port, or the identifier of its queries; 0 for protocols without.
    pub client_port: u16,
    /// The moved address.
    pub moved: Addr,
    /// The port there; 0 for protocols without.
    pub moved_port: u16,
    /// Where it is delivered, if that is decided here.
    pub delivery: Option<(Addr, u16)>,
    /// The name of its state.
    pub state: &'static str,
    /// Since it began, as far as this daemon has seen it.
    pub age: Duration,
    /// Since its last packet.
    pub idle: Duration,
    /// Packets to the application and to the client.
    pub packets: [u64; 2],
    /// Their bytes.
    pub bytes: [u64; 2],
}

/// What can be read flow by flow.
pub trait Flows: Send + Sync {
    /// Appends the flows of the slice at `from`, and returns where the next slice is, if there is
    /// one. Nobody waits longer because of it than a slice takes.
    fn slice(&self, now: Instant, from: Place, out: &mut Vec<Row>) -> Option<Place>;
}

/// The name of a flow's state: with TCP of its connection, else how far it was answered.
pub(super) fn state(protocol: u8, seen: Seen) -> &'static str {
    match Class::of(protocol, seen) {
        Class::TcpOpening => "opening",
        Class::TcpEstablished => "established",
        Class::TcpHalfClosed => "half_closed",
        Class::TcpClosing => "closing",
        Class::TcpReset => "reset",
        Class::Udp | Class::Icmp | Class::Other => "assured",
        Class::UdpOneWay | Class::UdpAnswered | Class::IcmpOneWay | Class::OtherOneWay => {
            debug_assert!(protocol != TCP, "it has states of its own");
            match (seen.is_answered(), seen.is_asked()) {
                (true, true) => "answered",
                (false, _) => "unanswered",
                (true, false) => "begun",
            }
        }
    }
}
