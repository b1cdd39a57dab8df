//! What a flow notes of a packet: its TCP flags, and how much it counts.

use crate::packet::Parsed;

/// How much a packet counts, or the packets that a super-packet stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Weight {
    pub(super) tcp_flags: u8,
    pub(super) packets: u16,
    pub(super) bytes: u32,
}

impl Weight {
    /// That of a packet.
    #[inline]
    pub fn of(parsed: &Parsed) -> Self {
        Self {
            tcp_flags: parsed.tcp_flags(),
            packets: parsed.packets(),
            bytes: parsed.wire_len() as u32,
        }
    }

    /// The same with other flags.
    #[inline]
    pub(super) fn with_flags(self, tcp_flags: u8) -> Self {
        Self { tcp_flags, ..self }
    }
}

/// A packet of no length, of which nothing but its flags matters.
impl From<u8> for Weight {
    fn from(tcp_flags: u8) -> Self {
        Self {
            tcp_flags,
            packets: 1,
            bytes: 0,
        }
    }
}

/// Packets and bytes of one flow, in each direction: to the application and to the client.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Counts {
    pub(super) packets: [u64; 2],
    pub(super) bytes: [u64; 2],
}

impl Counts {
    /// Adds what passed in one direction.
    #[inline]
    pub(super) fn add(&mut self, direction: usize, weight: Weight) {
        let at = direction & 1;
        self.packets[at] = self.packets[at].wrapping_add(weight.packets.into());
        self.bytes[at] = self.bytes[at].wrapping_add(weight.bytes.into());
    }
}
