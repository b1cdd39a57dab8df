//! Flows as one daemon leaves them to the next: what tells a flow from others, what was seen of it,
//! and for how long it was not used.
//!
//! Owns the bytes of one, [`RECORD`] each, so that a million of them are read in a fraction of a
//! second.

use std::time::Instant;

use super::{Entry, FlowTable, Inside, Outside, seen_client};
use crate::flow::class::{Class, Seen};
use crate::flow::fairness::Limit;
use crate::flow::tally::Counted;
use crate::flow::weight::Counts;
use crate::model::bytes::take;
use crate::model::peer::PeerId;
use crate::packet::Addr;

/// Bytes of a flow.
pub const RECORD: usize = 100;

/// Beside what was seen, which has six bits: it counts as a conversation of its move.
const COUNTS: u8 = 1 << 6;
/// It is still to count as a new one.
const IS_NEW: u8 = 1 << 7;

/// A flow that another daemon had.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HandedFlow {
    /// As the client sees it. Its peer is numbered as that daemon did.
    pub outside: Outside,
    /// As the application's host sees it.
    pub inside: Inside,
    seen: Seen,
    /// Seconds without a packet.
    idle: u32,
    /// Seconds since the first one.
    age: u32,
    carried: Counts,
    pub(in super::super) counts: bool,
    is_new: bool,
}

impl HandedFlow {
    /// Takes one off the front; `None` if there is none, or it is of nothing.
    pub fn take(rest: &mut &[u8]) -> Option<Self> {
        let peer = PeerId(u16::from_le_bytes(take(rest)?));
        let [protocol, flags] = take(rest)?;
        let mut seconds = || Some(u32::from_le_bytes(take(rest)?));
        let (idle, age) = (seconds()?, seconds()?);
        let mut count = || Some(u64::from_le_bytes(take(rest)?));
        let carried = Counts {
            packets: [count()?, count()?],
            bytes: [count()?, count()?],
        };
        let mut addr = || Some(Addr::from_bytes(take(rest)?));
        let (client, moved, delivery) = (addr()?, addr()?, addr()?);
        let mut port = || Some(u16::from_le_bytes(take(rest)?));
        let (client_port, moved_port) = (port()?, port()?);
        let (inside_port, delivery_port) = (port()?, port()?);
        let outside = Outside {
            peer,
            protocol,
            client,
            client_port,
            moved,
            moved_port,
        };
        let seen = Seen::from_bits(flags & !(COUNTS | IS_NEW));
        (!seen.is_nothing()).then_some(Self {
            outside,
            inside: Inside {
                protocol,
                client: seen_client(&outside),
                client_port: inside_port,
                delivery,
                delivery_port,
            },
            seen,
            idle,
            age,
            carried,
            counts: flags & COUNTS != 0,
            is_new: flags & IS_NEW != 0,
        })
    }
}

impl FlowTable {
    /// Appends every flow to `out`; of those that are treated alike the one that was used first
    /// comes first.
    pub fn put(&self, now: Instant, out: &mut Vec<u8>) {
        let now = self.tick(now);
        out.reserve(self.live * RECORD);
        for peer in &self.peers {
            for list in &peer.lists {
                for at in self.slab.members(list) {
                    put(self.slab.get(at), now, out);
                }
            }
        }
    }

    /// Takes a flow of another daemon up, which counts `at` a move if it did; unless there is one
    /// already in its place, or no room.
    pub(in crate::flow) fn take_up(
        &mut self,
        now: Instant,
        flow: &HandedFlow,
        at: Option<Counted>,
        limit: &Limit,
    ) {
        let HandedFlow {
            outside, inside, ..
        } = flow;
        let key = Inside {
            client: match &self.masquerade {
                Some(masquerade) => masquerade.of(inside.client),
                None => inside.client,
            },
            ..*inside
        };
        let is_there = self.find_outside(outside).is_some() || self.find_inside(&key).is_some();
        if is_there || !limit.take(outside.peer) {
            return;
        }
        let mut entry = Entry::new(outside, inside, self.tick(now).saturating_sub(flow.idle));
        entry.began = self.tick(now).saturating_sub(flow.age);
        entry.counts = flow.carried;
        entry.seen = flow.seen;
        entry.class = Class::of(outside.protocol, flow.seen);
        if let (Some(at), Some(tallies)) = (at, &self.tallies) {
            entry.counted = if flow.is_new { at.begun() } else { at };
            // As if it had just become what it is.
            let before = Class::TcpOpening;
            tallies.turned(outside.peer, &mut entry.counted, before, entry.class);
        }
        self.add(entry, entry.last_seen);
    }
}

fn put(entry: &Entry, now: u32, out: &mut Vec<u8>) {
    let mut flags = entry.seen.bits();
    if entry.counted.is_somewhere() {
        flags |= COUNTS;
    }
    if entry.counted.is_new() {
        flags |= IS_NEW;
    }
    out.extend_from_slice(&entry.peer.0.to_le_bytes());
    out.extend_from_slice(&[entry.protocol, flags]);
    for second in [entry.last_seen, entry.began] {
        out.extend_from_slice(&now.saturating_sub(second).to_le_bytes());
    }
    for count in entry.counts.packets.iter().chain(&entry.counts.bytes) {
        out.extend_from_slice(&count.to_le_bytes());
    }
    for addr in [entry.client, entry.moved, entry.delivery] {
        out.extend_from_slice(&addr.to_bytes());
    }
    for port in [
        entry.client_port,
        entry.moved_port,
        entry.inside_port,
        entry.delivery_port,
    ] {
        out.extend_from_slice(&port.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::time::Duration;

    use super::*;
    use crate::flow::seed::Seed;
    use crate::model::moved::{TCP, UDP};
    use crate::packet::{ACK, SYN};
    use crate::testing::epoch;

    fn v4(n: u32) -> Addr {
        Ipv4Addr::from(n).into()
    }

    fn outside(moved: u32, protocol: u8) -> Outside {
        Outside {
            peer: PeerId(1),
            protocol,
            client: v4(9),
            client_port: 4_000,
            moved: v4(moved),
            moved_port: 80,
        }
    }

    #[test]
    fn flows_go_on_with_the_ports_and_the_time_that_they_had() {
        let (limit, start) = (Limit::new(10), epoch());
        let seed = || Seed::new([1, 2]);
        let mut before = FlowTable::new(seed(), start);
        let mut opened = Vec::new();
        // The second one of each protocol is told apart from the first by another port.
        for (moved, protocol) in [(1, TCP), (2, TCP), (1, UDP), (2, UDP)] {
            let key = outside(moved, protocol);
            let inside = before.open(start, &key, v4(100), 80, SYN, &limit);
            opened.push((key, inside.unwrap()));
        }
        let (first, first_inside) = opened[0];
        before.application_packet(start, &first_inside, SYN | ACK, &limit);
        let later = start + Duration::from_secs(100);
        before.client_packet(later, &first, ACK, &limit);
        let mut bytes = Vec::new();
        let then = start + Duration::from_secs(119);
        before.put(then, &mut bytes);
        assert_eq!(bytes.len(), opened.len() * RECORD);

        // The next daemon's clock begins anew.
        let (limit, now) = (Limit::new(10), epoch() + Duration::from_secs(1_000));
        let mut after = FlowTable::new(Seed::new([3, 4]), now - Duration::from_secs(500));
        let mut rest = &*bytes;
        while let Some(flow) = HandedFlow::take(&mut rest) {
            after.take_up(now, &flow, None, &limit);
            // Once more changes nothing.
            after.take_up(now, &flow, None, &limit);
        }
        assert_eq!(rest, &[0; 0]);
        assert_eq!((after.live(), limit.live()), (opened.len(), opened.len()));
        for (key, inside) in &opened {
            assert_eq!(after.peek_outside(key).as_ref(), Some(inside));
            assert_eq!(after.peek_inside(inside).as_ref(), Some(key));
            let (seen, noted) = (before.noted(key).unwrap(), after.noted(key).unwrap());
            assert_eq!(noted.seen, seen.seen);
            assert_eq!(now - noted.used, then - seen.used);
        }
        // UDP that is not answered is forgotten after two minutes, one of which is left of none.
        after.expire(now + Duration::from_secs(1), 10, &limit);
        assert_eq!(after.live(), 2, "both connections are left");
        for end in 0..RECORD {
            assert_eq!(HandedFlow::take(&mut &bytes[..end]), None);
        }
    }
}
