//! The reassembly of packets that were too big for one datagram and came in parts.
//!
//! The parts of one packet have consecutive counters of one session and lane. Every part but the
//! last says that more follow; every part but the first says that it continues the counter before
//! it (`contrib/protocol.md`).
//!
//! Owns the bytes of packets that are not complete yet. Does not look into them, and does not
//! authenticate: what comes here has been opened.

use std::collections::{BTreeMap, VecDeque};

/// Most parts that wait for others. The parts of a packet are sent back to back, so more than a few
/// wait only when the path reorders or loses. Then the part that has waited longest gives way.
const MAX_WAITING: usize = 256;

/// Most bytes of parts that wait: [`MAX_WAITING`] of the longest that any path of today carries.
const MAX_BYTES: usize = MAX_WAITING * 9_216;

/// Longest packet: what the length field of an IPv4 header can say.
const MAX_PACKET: usize = 65_535;

/// Whose parts they are.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Stream {
    /// Index of the session they came in.
    pub session: u32,
    /// The sender's lane.
    pub lane: u8,
}

/// One part of a packet.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// Its counter.
    pub counter: u64,
    /// It continues the packet that the part before it began.
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
    /// The waiting parts by age, oldest first. Parts that wait no more may still be named.
    ages: VecDeque<(Stream, u64)>,
    /// Bytes of the waiting parts.
    bytes: usize,
    /// The last packet that was complete; its memory serves for the next one.
    packet: Vec<u8>,
    /// Parts that were given up.
    incomplete: u64,
}

struct WaitingPart {
    continues: bool,
    more: bool,
    bytes: Vec<u8>,
}

impl Reassembler {
    /// Takes a part; gives the whole packet when it was the last one missing.
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
            self.make_room();
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

    fn make_room(&mut self) {
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

    fn cut(packet: &[u8], size: usize, counter: u64) -> Vec<Part<'_>> {
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
        let (pa, pb) = (cut(&a, 1_400, 10), cut(&b, 1_400, 13));
        let mut joiner = Reassembler::default();
        assert!(joiner.push(STREAM, pb[1]).is_none());
        assert!(joiner.push(STREAM, pa[2]).is_none());
        assert!(joiner.push(STREAM, pa[0]).is_none());
        assert_eq!(joiner.push(STREAM, pb[0]).unwrap(), b);
        assert_eq!(joiner.push(STREAM, pa[1]).unwrap(), a);
        assert_eq!(joiner.take_incomplete(), 0);
    }

    #[test]
    fn parts_of_other_sessions_and_lanes_do_not_mix() {
        let packet = [3; 2_000];
        let parts = cut(&packet, 1_400, 5);
        let mut joiner = Reassembler::default();
        assert!(joiner.push(STREAM, parts[0]).is_none());
        let other = Stream { lane: 1, ..STREAM };
        assert!(joiner.push(other, parts[1]).is_none());
        let other = Stream {
            session: 2,
            ..STREAM
        };
        assert!(joiner.push(other, parts[1]).is_none());
        assert_eq!(joiner.push(STREAM, parts[1]).unwrap(), packet);
    }

    #[test]
    fn what_never_becomes_whole_gives_way_and_is_counted() {
        let packet = [4; 2_000];
        let mut joiner = Reassembler::default();
        for n in 0..MAX_WAITING as u64 + 3 {
            let first = cut(&packet, 1_400, n * 2)[0];
            assert!(joiner.push(STREAM, first).is_none());
        }
        assert_eq!(joiner.take_incomplete(), 3);
        assert_eq!(joiner.waiting.len(), MAX_WAITING);
        // The youngest is still there, the oldest is not.
        let last = MAX_WAITING as u64 + 2;
        assert!(
            joiner
                .push(STREAM, cut(&packet, 1_400, last * 2)[1])
                .is_some()
        );
        assert!(joiner.push(STREAM, cut(&packet, 1_400, 0)[1]).is_none());
    }

    #[test]
    fn long_parts_give_way_earlier() {
        let long = vec![5; 60_000];
        let mut joiner = Reassembler::default();
        for counter in 0..200 {
            let part = Part {
                counter: counter * 2,
                continues: false,
                more: true,
                bytes: &long,
            };
            assert!(joiner.push(STREAM, part).is_none());
            let waiting: usize = joiner.waiting.values().map(|part| part.bytes.len()).sum();
            assert!(waiting == joiner.bytes && waiting <= MAX_BYTES);
        }
        assert!(joiner.take_incomplete() > 100);
    }

    #[test]
    fn counters_at_the_ends_of_their_range_are_harmless() {
        let mut joiner = Reassembler::default();
        let part = |counter, continues, more| Part {
            counter,
            continues,
            more,
            bytes: &[0],
        };
        assert!(joiner.push(STREAM, part(0, true, false)).is_none());
        assert!(joiner.push(STREAM, part(u64::MAX, false, true)).is_none());
    }

    proptest! {
        #[test]
        fn any_order_joins_to_what_was_cut(
            lengths in proptest::collection::vec(1usize..9_000, 1..5),
            size in 500usize..1_500,
            order in proptest::collection::vec(any::<u16>(), 100),
        ) {
            let packets: Vec<Vec<u8>> = lengths.iter().enumerate()
                .map(|(n, &length)| (0..length).map(|i| (i * 7 + n) as u8).collect()).collect();
            let mut counter = 0;
            let mut parts = Vec::new();
            for packet in &packets {
                // What fits one datagram never comes here.
                if packet.len() > size {
                    let cut = cut(packet, size, counter);
                    counter += cut.len() as u64;
                    parts.extend(cut);
                }
            }
            let mut keyed: Vec<_> = parts.into_iter().enumerate()
                .map(|(n, part)| (order[n % order.len()], part)).collect();
            keyed.sort_by_key(|&(key, _)| key);
            let mut joiner = Reassembler::default();
            let mut out = Vec::new();
            for (_, part) in keyed {
                if let Some(packet) = joiner.push(STREAM, part) {
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
