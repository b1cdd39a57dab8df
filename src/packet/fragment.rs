//! Fragments on their way through a lane: those that wait, those that contradict each other, and
//! those that are made here.
//!
//! Owns what has to be known of a fragmented packet without ever reassembling it: which bytes of it
//! were seen ([`Overlaps`]), and later fragments that came before the first, which alone says whose
//! they are ([`HeldFragments`]). The caller decides where fragments go.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant};

use crate::model::drops::DropReason;
use crate::packet::checksum::{Sum, finish};
use crate::packet::field::{get_u16, ipv4, put};
use crate::packet::{Addr, Family, Parsed};

/// How far apart the fragments of one packet may come: as long as Linux waits for them
/// (`net.ipv4.ipfrag_time`; RFC 791 section 3.2 suggests 15 s, RFC 8200 section 4.5 has 60 s).
pub const FRAGMENT_LIFE: Duration = Duration::from_secs(30);

/// Fragmented packets watched at a time. The fragments of one come right after each other.
const WATCHED: usize = 128;

/// Most fragments of one packet: 65,535 bytes in fragments of 576. More would only make work.
const MAX_FRAGMENTS: usize = 120;

/// Most fragments that wait for their first: two packets of 64 KB whose fragments come in reverse.
const MAX_WAITING: usize = 128;

/// Most bytes of the fragments that wait.
const MAX_WAITING_BYTES: usize = 1 << 20;

/// What all fragments of one packet have in common.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Key {
    src: Addr,
    dst: Addr,
    id: u32,
    protocol: u8,
}

impl Key {
    /// The key of a fragment.
    pub(crate) fn of(parsed: &Parsed, bytes: &[u8]) -> Self {
        Self {
            src: parsed.src(bytes),
            dst: parsed.dst(bytes),
            id: parsed.fragment_id(),
            // In IPv6 the protocol is no part of it (RFC 8200 section 4.5).
            protocol: match parsed.family() {
                Family::V4 => parsed.protocol(),
                Family::V6 => 0,
            },
        }
    }

    /// What tells packets between the same two addresses apart, for hashing.
    pub(crate) fn words(&self) -> (Addr, u64, u8) {
        let [a, b] = self.dst.words();
        (
            self.src,
            a ^ b.rotate_left(32) ^ u64::from(self.id) << 16,
            self.protocol,
        )
    }
}

/// Refuses fragments that overlap others (RFC 5722; RFC 1858 tells which attacks that stops).
#[derive(Debug, Default)]
pub struct Overlaps {
    watched: VecDeque<Watched>,
}

#[derive(Debug)]
struct Watched {
    key: Key,
    since: Instant,
    seen: Vec<Range<usize>>,
    spoilt: bool,
}

impl Overlaps {
    /// Takes note of a fragment.
    ///
    /// # Errors
    /// [`DropReason::FragmentOverlap`] if it overlaps another of its packet without being the same
    /// one, or if one did before: nothing more of that packet is carried.
    pub fn check(&mut self, now: Instant, parsed: &Parsed, bytes: &[u8]) -> Result<(), DropReason> {
        let key = Key::of(parsed, bytes);
        let range = parsed.fragment_range(bytes);
        let known = self.watched.iter_mut().rev().find(|watched| {
            watched.key == key && now.saturating_duration_since(watched.since) < FRAGMENT_LIFE
        });
        let Some(watched) = known else {
            if self.watched.len() == WATCHED {
                self.watched.pop_front();
            }
            self.watched.push_back(Watched {
                key,
                since: now,
                seen: vec![range],
                spoilt: false,
            });
            return Ok(());
        };
        let repeated = watched.seen.contains(&range);
        let clashes = |seen: &Range<usize>| seen.start < range.end && range.start < seen.end;
        watched.spoilt |=
            !repeated && (watched.seen.len() == MAX_FRAGMENTS || watched.seen.iter().any(clashes));
        if watched.spoilt {
            return Err(DropReason::FragmentOverlap);
        }
        if !repeated {
            watched.seen.push(range);
        }
        Ok(())
    }
}

/// Later fragments that came before their first.
#[derive(Debug)]
pub struct HeldFragments<T> {
    held: VecDeque<Held<T>>,
    bytes: usize,
}

/// A later fragment that waits.
#[derive(Debug)]
pub struct Held<T> {
    id: u32,
    since: Instant,
    /// What the caller keeps with it.
    pub with: T,
    /// Its bytes, as it came.
    pub bytes: Vec<u8>,
}

impl<T> Default for HeldFragments<T> {
    fn default() -> Self {
        Self {
            held: VecDeque::new(),
            bytes: 0,
        }
    }
}

impl<T> HeldFragments<T> {
    /// Keeps a fragment, whose identification is `id`. Returns those that it displaced.
    pub fn keep(&mut self, now: Instant, id: u32, with: T, bytes: &[u8]) -> Vec<Held<T>> {
        self.bytes += bytes.len();
        self.held.push_back(Held {
            id,
            since: now,
            with,
            bytes: bytes.to_vec(),
        });
        let mut out = Vec::new();
        while self.held.len() > MAX_WAITING || self.bytes > MAX_WAITING_BYTES {
            let Some(oldest) = self.held.pop_front() else {
                break;
            };
            self.bytes -= oldest.bytes.len();
            out.push(oldest);
        }
        out
    }

    /// Takes out a fragment that has waited longer than its first one can be late.
    pub fn expire(&mut self, now: Instant) -> Option<Held<T>> {
        let oldest = self.held.front()?;
        if now.saturating_duration_since(oldest.since) < FRAGMENT_LIFE {
            return None;
        }
        self.bytes -= oldest.bytes.len();
        self.held.pop_front()
    }

    /// Takes out all with this identification, in the order they came.
    pub fn take(&mut self, id: u32) -> Vec<Held<T>> {
        if self.held.is_empty() {
            return Vec::new();
        }
        let (taken, left) = std::mem::take(&mut self.held)
            .into_iter()
            .partition::<Vec<_>, _>(|held| held.id == id);
        self.held = left.into();
        self.bytes -= taken.iter().map(|held| held.bytes.len()).sum::<usize>();
        taken
    }
}

/// The fragments of an IPv4 packet that [may be fragmented](Parsed::may_fragment), none longer than
/// `mtu`. Its checksum has to be full.
#[derive(Debug)]
pub struct Fragments<'a> {
    packet: &'a [u8],
    header: usize,
    /// Payload bytes of each fragment but the last.
    size: usize,
    at: usize,
}

impl<'a> Fragments<'a> {
    /// `None` if not even eight bytes fit beside the header.
    pub fn new(parsed: &Parsed, packet: &'a [u8], mtu: usize) -> Option<Self> {
        let header = parsed.l4();
        let size = mtu.checked_sub(header)? / 8 * 8;
        (size > 0).then_some(Self {
            packet: &packet[..parsed.total()],
            header,
            size,
            at: header,
        })
    }

    /// Writes the next fragment to the front of `out` and returns its length.
    pub fn next_into(&mut self, out: &mut [u8]) -> Option<usize> {
        let payload = &self.packet[self.at..];
        if payload.is_empty() {
            return None;
        }
        let len = payload.len().min(self.size);
        let total = self.header + len;
        out[..self.header].copy_from_slice(&self.packet[..self.header]);
        out[self.header..total].copy_from_slice(&payload[..len]);
        // If the packet is a fragment itself, offsets count on from its own, and its flag stays.
        let mut word = get_u16(self.packet, ipv4::FRAGMENT);
        word += ((self.at - self.header) / 8) as u16;
        if len < payload.len() {
            word |= ipv4::MORE_FRAGMENTS;
        }
        put(out, ipv4::TOTAL_LEN, (total as u16).to_be_bytes());
        put(out, ipv4::FRAGMENT, word.to_be_bytes());
        put(out, ipv4::CHECKSUM, [0, 0]);
        let sum = Sum::default().add(&out[..self.header]);
        put(out, ipv4::CHECKSUM, finish(sum, false).to_ne_bytes());
        self.at += len;
        Some(total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::Kind;
    use crate::packet::testing::{Plan, checksum, set_ipv4_checksum};
    use crate::testing::epoch;
    use proptest::prelude::*;

    fn fragments(packet: &[u8], mtu: usize) -> Vec<Vec<u8>> {
        let parsed = Parsed::parse(packet).unwrap();
        let mut left = Fragments::new(&parsed, packet, mtu).unwrap();
        let mut all = Vec::new();
        let mut out = vec![0; mtu];
        while let Some(len) = left.next_into(&mut out) {
            all.push(out[..len].to_vec());
        }
        all
    }

    fn udp(payload: usize) -> Vec<u8> {
        let mut plan = Plan::new(Kind::Udp, "203.0.113.9", "192.0.2.5");
        plan.payload = (0..payload).map(|at| at as u8).collect();
        let mut packet = plan.build();
        packet[6] = 0;
        set_ipv4_checksum(&mut packet);
        packet
    }

    proptest! {
        #[test]
        fn fragments_make_the_packet_again(
            payload in 0usize..5_000, mtu in 68usize..1_500, twice in 68usize..1_500,
        ) {
            let packet = udp(payload);
            let mut whole = packet[..20].to_vec();
            let once = fragments(&packet, mtu);
            let all: Vec<_> = once.iter().flat_map(|one| fragments(one, twice)).collect();
            for (index, fragment) in all.iter().enumerate() {
                prop_assert!(fragment.len() <= mtu.min(twice));
                let field = u16::from_be_bytes([fragment[6], fragment[7]]);
                prop_assert_eq!(usize::from(field & 0x1fff) * 8, whole.len() - 20);
                prop_assert_eq!(field & 0x2000 != 0, index + 1 < all.len());
                prop_assert_eq!(checksum(&fragment[..20]), [0, 0]);
                prop_assert!(Parsed::parse(fragment).is_ok());
                whole.extend(&fragment[20..]);
            }
            prop_assert_eq!(&whole[20..], &packet[20..]);
        }
    }

    #[test]
    fn an_overlap_spoils_the_packet() {
        let now = epoch();
        let packet = udp(3_000);
        let all = fragments(&packet, 1_020);
        let check = |overlaps: &mut Overlaps, fragment: &[u8]| {
            overlaps.check(now, &Parsed::parse(fragment).unwrap(), fragment)
        };
        let mut overlaps = Overlaps::default();
        for fragment in all.iter().rev() {
            assert_eq!(check(&mut overlaps, fragment), Ok(()));
        }
        assert_eq!(check(&mut overlaps, &all[1]), Ok(()), "sent twice");
        let mut over = all[1].clone();
        over[7] += 1;
        let overlap = Err(DropReason::FragmentOverlap);
        assert_eq!(check(&mut overlaps, &over), overlap);
        assert_eq!(check(&mut overlaps, &all[0]), overlap, "spoilt");
        let later = now + FRAGMENT_LIFE;
        let parsed = Parsed::parse(&all[0]).unwrap();
        assert_eq!(overlaps.check(later, &parsed, &all[0]), Ok(()));
    }

    #[test]
    fn what_waits_is_bounded_and_forgotten() {
        let now = epoch();
        let mut waiting = HeldFragments::default();
        for id in 0..MAX_WAITING as u32 {
            assert!(waiting.keep(now, id, (), &[0; 100]).is_empty());
        }
        let out = waiting.keep(now, 7, (), &[1; 100]);
        assert_eq!(out.len(), 1, "the oldest makes way");
        let taken = waiting.take(7);
        assert_eq!(taken.len(), 2);
        assert_eq!(taken[1].bytes, [1; 100]);
        assert!(waiting.take(7).is_empty());
        assert!(waiting.expire(now).is_none());
        let mut expired = 0;
        while waiting.expire(now + FRAGMENT_LIFE).is_some() {
            expired += 1;
        }
        assert_eq!(expired, MAX_WAITING - 2);
        assert_eq!(waiting.bytes, 0);
        let big = vec![0; MAX_WAITING_BYTES];
        assert!(waiting.keep(now, 1, (), &big).is_empty());
        assert_eq!(waiting.keep(now, 1, (), &[0]).len(), 1);
    }
}
