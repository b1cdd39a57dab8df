//! The reassembly of packets that were too big for one datagram and came in parts.
//!
//! The parts of one packet have consecutive counters of one session and lane. Every part but the
//! last says that more follow; every part but the first says that it continues the counter before
//! it (`contrib/protocol.md`).
//!
//! Owns the bytes of packets that are not complete yet. It does not look into them and does not
//! authenticate them: the session has opened them already.

use std::collections::{BTreeMap, VecDeque};

/// Most parts that wait for others. The sender sends the parts of a packet back to back, so more
/// than a few wait only when the path reorders or loses. Then the part that has waited longest is
/// given up.
const MAX_WAITING: usize = 256;

/// Most bytes of parts that wait: [`MAX_WAITING`] parts as long as any path of today carries.
const MAX_BYTES: usize = MAX_WAITING * 9_216;

/// Longest packet: what the length field of an IPv4 header can say.
const MAX_PACKET: usize = 65_535;

/// Where parts come from: only those of one stream belong together.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Stream {
    /// Index of the session that carried them.
    pub session: u32,
    /// The sender's lane.
    pub lane: u8,
}

/// One part of a packet.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// Its counter.
    pub counter: u64,
    /// It continues the packet of the part with the previous counter.
    pub continues: bool,
    /// The packet goes on in the part with the next counter.
    pub more: bool,
    /// Its bytes.
    pub bytes: &'a [u8],
}

/// Parts that wait for the others of their packet.
#[derive(Default)]
pub struct Reassembler {
    waiting: BTreeMap<(Stream, u64), WaitingPart>,
    /// The waiting parts by age, oldest first. It may also name parts that no longer wait.
    ages: VecDeque<(Stream, u64)>,
    /// Bytes of the waiting parts.
    bytes: usize,
    /// The last packet that was complete; its memory serves for the next one.
    packet: Vec<u8>,
    /// Parts given up since [`Self::take_incomplete`] was last called.
    incomplete: u64,
}

struct WaitingPart {
    continues: bool,
    more: bool,
    bytes: Vec<u8>,
}

impl Reassembler {
    /// Takes a part. Returns the whole packet if this was the last part missing.
    pub fn push(&mut self, stream: Stream, part: Part<'_>) -> Option<&mut [u8]> {
        let waiting = WaitingPart {
            continues: part.continues,
            more: part.more,
            bytes: part.bytes.to_vec(),
        };
        self.bytes += waiting.bytes.len();
        if let Some(same) = self.waiting.insert((stream, part.counter), waiting) {
            self.bytes -= same.bytes.len();
        }
        let Some((first, last)) = self.whole(stream, part.counter) else {
            self.ages.push_back((stream, part.counter));
            self.give_up_oldest();
            return None;
        };
        self.packet.clear();
        for counter in first..=last {
            if let Some(part) = self.waiting.remove(&(stream, counter)) {
                self.bytes -= part.bytes.len();
                self.packet.extend_from_slice(&part.bytes);
            }
        }
        if self.waiting.is_empty() {
            self.ages.clear();
        }
        if self.packet.len() > MAX_PACKET {
            self.incomplete += 1;
            return None;
        }
        Some(&mut self.packet)
    }

    /// How many parts were given up since the last call because the rest of their packet never
    /// came.
    pub fn take_incomplete(&mut self) -> u64 {
        std::mem::take(&mut self.incomplete)
    }

    /// The first and last counter of the packet that `counter` belongs to, if all of it is here.
    fn whole(&self, stream: Stream, counter: u64) -> Option<(u64, u64)> {
        let part = |counter: u64| self.waiting.get(&(stream, counter));
        let (mut first, mut last) = (counter, counter);
        while part(first)?.continues {
            first = first.checked_sub(1)?;
        }
        while part(last)?.more {
            last = last.checked_add(1)?;
        }
        Some((first, last))
    }

    fn give_up_oldest(&mut self) {
        while self.waiting.len() > MAX_WAITING
            || self.bytes > MAX_BYTES
            || self.ages.len() > 2 * MAX_WAITING
        {
            let Some(oldest) = self.ages.pop_front() else {
                return;
            };
            if let Some(part) = self.waiting.remove(&oldest) {
                self.bytes -= part.bytes.len();
                self.incomplete += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STREAM: Stream = Stream {
        session: 1,
        lane: 0,
    };

    fn split(packet: &[u8], size: usize, counter: u64) -> Vec<Part<'_>> {
        let count = packet.len().div_ceil(size);
        packet
            .chunks(size)
            .enumerate()
            .map(|(index, bytes)| Part {
                counter: counter + index as u64,
                continues: index > 0,
                more: index + 1 < count,
                bytes,
            })
            .collect()
    }

    #[test]
    fn two_packets_interleaved_out_of_order() {
        let (a, b) = ([1; 3_000], [2; 2_500]);
        let (pa, pb) = (split(&a, 1_400, 10), split(&b, 1_400, 13));
        let mut reassembler = Reassembler::default();
        assert!(reassembler.push(STREAM, pb[1]).is_none());
        assert!(reassembler.push(STREAM, pa[2]).is_none());
        assert!(reassembler.push(STREAM, pa[0]).is_none());
        assert_eq!(reassembler.push(STREAM, pb[0]).unwrap(), b);
        assert_eq!(reassembler.push(STREAM, pa[1]).unwrap(), a);
        assert_eq!(reassembler.take_incomplete(), 0);
    }

    #[test]
    fn parts_of_other_sessions_and_lanes_do_not_mix() {
        let packet = [3; 2_000];
        let parts = split(&packet, 1_400, 5);
        let mut reassembler = Reassembler::default();
        assert!(reassembler.push(STREAM, parts[0]).is_none());
        let other = Stream { lane: 1, ..STREAM };
        assert!(reassembler.push(other, parts[1]).is_none());
        let other = Stream {
            session: 2,
            ..STREAM
        };
        assert!(reassembler.push(other, parts[1]).is_none());
        assert_eq!(reassembler.push(STREAM, parts[1]).unwrap(), packet);
    }

    #[test]
    fn parts_of_packets_that_never_complete_are_given_up_and_counted() {
        let packet = [4; 2_000];
        let mut reassembler = Reassembler::default();
        for n in 0..MAX_WAITING as u64 + 3 {
            let first = split(&packet, 1_400, n * 2)[0];
            assert!(reassembler.push(STREAM, first).is_none());
        }
        assert_eq!(reassembler.take_incomplete(), 3);
        assert_eq!(reassembler.waiting.len(), MAX_WAITING);
        // The youngest is still there, the oldest is not.
        let last = MAX_WAITING as u64 + 2;
        assert!(
            reassembler
                .push(STREAM, split(&packet, 1_400, last * 2)[1])
                .is_some()
        );
        assert!(
            reassembler
                .push(STREAM, split(&packet, 1_400, 0)[1])
                .is_none()
        );
    }

    #[test]
    fn long_parts_are_given_up_earlier() {
        let long = vec![5; 60_000];
        let mut reassembler = Reassembler::default();
        for counter in 0..200 {
            let part = Part {
                counter: counter * 2,
                continues: false,
                more: true,
                bytes: &long,
            };
            assert!(reassembler.push(STREAM, part).is_none());
            let waiting: usize = reassembler
                .waiting
                .values()
                .map(|part| part.bytes.len())
                .sum();
            assert!(waiting == reassembler.bytes && waiting <= MAX_BYTES);
        }
        assert!(reassembler.take_incomplete() > 100);
    }

    #[test]
    fn counters_at_the_ends_of_their_range_are_harmless() {
        let mut reassembler = Reassembler::default();
        let part = |counter, continues, more| Part {
            counter,
            continues,
            more,
            bytes: &[0],
        };
        assert!(reassembler.push(STREAM, part(0, true, false)).is_none());
        assert!(
            reassembler
                .push(STREAM, part(u64::MAX, false, true))
                .is_none()
        );
    }

    proptest! {
        #[test]
        fn parts_in_any_order_reassemble_to_their_packet(
            lengths in proptest::collection::vec(1usize..9_000, 1..5),
            size in 500usize..1_500,
            order in proptest::collection::vec(any::<u16>(), 100),
        ) {
            let packets: Vec<Vec<u8>> = lengths.iter().enumerate()
                .map(|(n, &length)| (0..length).map(|i| (i * 7 + n) as u8).collect()).collect();
            let mut counter = 0;
            let mut parts = Vec::new();
            for packet in &packets {
                // A packet that fits one datagram never comes here.
                if packet.len() > size {
                    let split = split(packet, size, counter);
                    counter += split.len() as u64;
                    parts.extend(split);
                }
            }
            let mut keyed: Vec<_> = parts.into_iter().enumerate()
                .map(|(n, part)| (order[n % order.len()], part)).collect();
            keyed.sort_by_key(|&(key, _)| key);
            let mut reassembler = Reassembler::default();
            let mut out = Vec::new();
            for (_, part) in keyed {
                if let Some(packet) = reassembler.push(STREAM, part) {
                    out.push(packet.to_vec());
                }
            }
            let mut want: Vec<_> =
                packets.into_iter().filter(|packet| packet.len() > size).collect();
            want.sort();
            out.sort();
            prop_assert_eq!(out, want);
        }
    }
}
