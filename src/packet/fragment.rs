//! Fragments on their way through a lane: those that must wait, those that contradict each other,
//! and those that are made here.
//!
//! Owns what has to be known of a fragmented packet without ever putting it together: which bytes of
//! it were seen ([`Overlaps`]), and later fragments that came before the first, which alone says whose
//! they are ([`Waiting`]). Where fragments go is [`translate`](crate::flow::translate)'s business.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant};

use crate::model::drops::DropReason;
use crate::packet::{Addr, Family, Fragment, IPV6_HEADER, Kind, Parsed, Sum, put};

/// How long the pieces of one packet may be apart: what Linux waits for them
/// (`net.ipv4.ipfrag_time`, RFC 791 section 3.2 suggests 15 s, RFC 8200 section 4.5 has 60 s).
pub const FRAGMENT_LIFE: Duration = Duration::from_secs(30);

/// Fragmented packets watched at a time; their pieces come right after each other.
const WATCHED: usize = 128;

/// Pieces of one packet: 65,535 bytes in pieces of 576, and more only to make work.
const MAX_PIECES: usize = 120;

/// Pieces that wait for their first: two packets of 64 KB whose pieces come in reverse.
const MAX_WAITING: usize = 128;

/// Bytes of the pieces that wait.
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
    pub(crate) fn of(parsed: &Parsed, bytes: &[u8]) -> Self {
        Self {
            src: parsed.src(bytes),
            dst: parsed.dst(bytes),
            id: parsed.fragment_id(),
            // IPv6 leaves the protocol out of it (RFC 8200 section 4.5).
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

/// Refuses fragments that write over others (RFC 5722; RFC 1858 for what that is good for).
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
        let piece = place(parsed, bytes);
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
                seen: vec![piece],
                spoilt: false,
            });
            return Ok(());
        };
        let repeated = watched.seen.contains(&piece);
        let clashes = |seen: &Range<usize>| seen.start < piece.end && piece.start < seen.end;
        watched.spoilt |=
            !repeated && (watched.seen.len() == MAX_PIECES || watched.seen.iter().any(clashes));
        if watched.spoilt {
            return Err(DropReason::FragmentOverlap);
        }
        if !repeated {
            watched.seen.push(piece);
        }
        Ok(())
    }
}

/// Which bytes of the whole packet's payload a fragment holds.
fn place(parsed: &Parsed, bytes: &[u8]) -> Range<usize> {
    let (start, payload) = match parsed.family() {
        Family::V4 => {
            let word = u16::from_be_bytes([bytes[6], bytes[7]]);
            (usize::from(word & 0x1fff) * 8, header_len(bytes))
        }
        Family::V6 => {
            // The door has walked these headers: they end inside the packet.
            let (mut kind, mut at) = (bytes[6], IPV6_HEADER);
            while kind != FRAGMENT_HEADER && at + 8 <= parsed.l4() {
                kind = bytes[at];
                at += 8 + usize::from(bytes[at + 1]) * 8;
            }
            match bytes.get(at..at + 8) {
                Some(header) => {
                    let word = u16::from_be_bytes([header[2], header[3]]);
                    (usize::from(word & 0xfff8), at + 8)
                }
                None => (0, parsed.l4()),
            }
        }
    };
    start..start + parsed.total().saturating_sub(payload)
}

const FRAGMENT_HEADER: u8 = 44;

fn header_len(bytes: &[u8]) -> usize {
    usize::from(bytes[0] & 0x0f) * 4
}

/// Later fragments that came before their first.
#[derive(Debug)]
pub struct Waiting<T> {
    held: VecDeque<Held<T>>,
    bytes: usize,
}

/// One of them.
#[derive(Debug)]
pub struct Held<T> {
    id: u32,
    since: Instant,
    /// What belongs to it.
    pub with: T,
    /// As it came.
    pub bytes: Vec<u8>,
}

impl<T> Default for Waiting<T> {
    fn default() -> Self {
        Self {
            held: VecDeque::new(),
            bytes: 0,
        }
    }
}

impl<T> Waiting<T> {
    /// Keeps a fragment, whose identification is `id`. Those that have to make room are handed out.
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

    /// Takes out what has waited for longer than its first fragment can be late.
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

/// Whether a router may cut the packet (RFC 791; in IPv6 only its sender may).
pub fn may_cut(parsed: &Parsed, bytes: &[u8]) -> bool {
    const DONT_FRAGMENT: u8 = 0x40;
    parsed.family() == Family::V4 && bytes[6] & DONT_FRAGMENT == 0
}

/// Writes the checksum of a packet that has only the sum of its pseudo-header.
pub fn complete(parsed: &Parsed, bytes: &mut [u8]) {
    let Some(at) = parsed.csum_at() else { return };
    let sum = !Sum::default()
        .add(&bytes[parsed.l4()..parsed.total()])
        .fold();
    let sum = if sum == 0 && parsed.kind() == Kind::Udp {
        0xffff
    } else {
        sum
    };
    put(bytes, at, sum.to_ne_bytes());
}

/// The pieces of an IPv4 packet for which [`may_cut`] holds, none longer than `mtu`. Its checksum
/// has to be complete.
#[derive(Debug)]
pub struct Cut<'a> {
    packet: &'a [u8],
    header: usize,
    /// Payload bytes of each piece but the last.
    size: usize,
    at: usize,
}

impl<'a> Cut<'a> {
    /// `None` if not even eight bytes fit beside the header.
    pub fn new(parsed: &Parsed, packet: &'a [u8], mtu: usize) -> Option<Self> {
        let header = header_len(packet);
        let size = mtu.checked_sub(header)? / 8 * 8;
        (size > 0).then_some(Self {
            packet: &packet[..parsed.total()],
            header,
            size,
            at: header,
        })
    }

    /// Writes the next piece to the front of `out` and returns its length.
    pub fn next_into(&mut self, out: &mut [u8]) -> Option<usize> {
        let payload = &self.packet[self.at..];
        if payload.is_empty() {
            return None;
        }
        let len = payload.len().min(self.size);
        let total = self.header + len;
        out[..self.header].copy_from_slice(&self.packet[..self.header]);
        out[self.header..total].copy_from_slice(&payload[..len]);
        const MORE: u16 = 0x2000;
        let old = u16::from_be_bytes([self.packet[6], self.packet[7]]);
        let more = if len < payload.len() { MORE } else { 0 };
        let field = (old | more) + ((self.at - self.header) / 8) as u16;
        put(out, 2, (total as u16).to_be_bytes());
        put(out, 6, field.to_be_bytes());
        put(out, 10, [0, 0]);
        let sum = !Sum::default().add(&out[..self.header]).fold();
        put(out, 10, sum.to_ne_bytes());
        self.at += len;
        Some(total)
    }
}

/// Whether `parsed` is the fragment that says whose its packet is.
#[inline]
pub fn is_first(parsed: &Parsed) -> bool {
    parsed.fragment() == Fragment::First
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::testing::{Plan, assert_sums};
    use crate::testing::epoch;
    use proptest::prelude::*;

    fn pieces(packet: &[u8], mtu: usize) -> Vec<Vec<u8>> {
        let parsed = Parsed::parse(packet).unwrap();
        let mut cut = Cut::new(&parsed, packet, mtu).unwrap();
        let mut all = Vec::new();
        let mut out = vec![0; mtu];
        while let Some(len) = cut.next_into(&mut out) {
            all.push(out[..len].to_vec());
        }
        all
    }

    fn udp(payload: usize) -> Vec<u8> {
        let mut plan = Plan::new(Kind::Udp, "203.0.113.9", "192.0.2.5");
        plan.payload = (0..payload).map(|at| at as u8).collect();
        let mut packet = plan.build();
        packet[6] = 0;
        let parsed = Parsed::parse(&packet).unwrap();
        packet[10..12].fill(0);
        let sum = !Sum::default().add(&packet[..parsed.l4()]).fold();
        packet[10..12].copy_from_slice(&sum.to_ne_bytes());
        packet
    }

    proptest! {
        #[test]
        fn pieces_make_the_packet_again(payload in 0usize..5_000, mtu in 68usize..1_500, twice in 68usize..1_500) {
            let packet = udp(payload);
            let mut whole = packet[..20].to_vec();
            let all = pieces(&packet, mtu).iter().flat_map(|piece| pieces(piece, twice)).collect::<Vec<_>>();
            for (index, piece) in all.iter().enumerate() {
                prop_assert!(piece.len() <= mtu.min(twice));
                let field = u16::from_be_bytes([piece[6], piece[7]]);
                prop_assert_eq!(usize::from(field & 0x1fff) * 8, whole.len() - 20);
                prop_assert_eq!(field & 0x2000 != 0, index + 1 < all.len());
                prop_assert_eq!(Sum::default().add(&piece[..20]).fold(), 0xffff);
                prop_assert!(Parsed::parse(piece).is_ok());
                whole.extend(&piece[20..]);
            }
            prop_assert_eq!(&whole[20..], &packet[20..]);
        }

        #[test]
        fn completing_a_partial_sum_makes_the_full_one(payload in 0usize..300) {
            let mut plan = Plan::new(Kind::Udp, "203.0.113.9", "192.0.2.5");
            plan.payload = vec![7; payload];
            let mut packet = plan.build_partial();
            let parsed = Parsed::parse(&packet).unwrap();
            complete(&parsed, &mut packet);
            assert_sums(&packet);
        }
    }

    #[test]
    fn an_overlap_spoils_the_packet() {
        let now = epoch();
        let packet = udp(3_000);
        let all = pieces(&packet, 1_020);
        let check = |overlaps: &mut Overlaps, piece: &[u8]| {
            overlaps.check(now, &Parsed::parse(piece).unwrap(), piece)
        };
        let mut overlaps = Overlaps::default();
        for piece in all.iter().rev() {
            assert_eq!(check(&mut overlaps, piece), Ok(()));
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
    fn ipv6_pieces_are_placed_behind_their_headers() {
        let mut plain = Plan::new(Kind::Udp, "2001:db8::9", "2001:db8::5").build();
        let payload = plain.len() - 40;
        // Destination options, then the fragment header of a piece at 1,232.
        plain[5] += 16;
        plain[6] = 60;
        plain.splice(
            40..40,
            [44, 0, 1, 4, 0, 0, 0, 0, 17, 0, 4, 0xd0, 0, 0, 0, 7],
        );
        let parsed = Parsed::parse(&plain).unwrap();
        assert_eq!(parsed.fragment(), Fragment::Later);
        assert_eq!(place(&parsed, &plain), 1_232..1_232 + payload);
    }

    #[test]
    fn what_waits_is_bounded_and_forgotten() {
        let now = epoch();
        let mut waiting = Waiting::default();
        for id in 0..MAX_WAITING as u32 {
            assert!(waiting.keep(now, id, (), &[0; 100]).is_empty());
        }
        let out = waiting.keep(now, 7, (), &[1; 100]);
        assert_eq!(out.len(), 1, "the oldest makes room");
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
