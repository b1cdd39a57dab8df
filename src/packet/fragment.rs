//! Fragments on their way through a lane: those that wait, those that contradict each other, and
//! those that are made here.
//!
//! Owns what has to be known of a fragmented packet without ever reassembling it: which bytes of it
//! were seen ([`Overlaps`]), and later fragments that came before the first, which alone says whose
//! they are ([`HeldFragments`]). The caller decides where fragments go.

use std::ops::Range;
use std::time::{Duration, Instant};

use crate::model::drops::DropReason;
use crate::model::peer::PeerId;
use crate::packet::checksum::{Sum, finish};
use crate::packet::field::{get_u16, ipv4, put};
use crate::packet::shares::{Bounds, Owner, Shares};
use crate::packet::{Addr, Family, Parsed};

/// How far apart the fragments of one packet may come: as long as Linux waits for them
/// (`net.ipv4.ipfrag_time`; RFC 791 section 3.2 suggests 15 s, RFC 8200 section 4.5 has 60 s).
pub const FRAGMENT_LIFE: Duration = Duration::from_secs(30);

/// Fragmented packets watched at a time. The fragments of one come right after each other.
const WATCHED: usize = 128;

/// Most fragments of one packet: 65,535 bytes in fragments of 576. More would only make work.
const MAX_FRAGMENTS: usize = 120;

/// Bytes of the fragments that wait for their first: four shares.
const MAX_WAITING_BYTES: usize = 1 << 20;

/// What of this one client may have: four packets of 64 KB whose fragments come in reverse.
const MAX_WAITING_SHARE: usize = MAX_WAITING_BYTES / 4;

/// What a fragment counts for at least. It bounds their number: 64 of one client, as many as a
/// packet of 64 KB has on any path of IPv6 (its least MTU is 1,280), and 256 in all.
const LEAST_WAITING: usize = 4_096;

/// What all fragments of one packet have in common.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Key {
    peer: PeerId,
    src: Addr,
    dst: Addr,
    id: u32,
    protocol: u8,
}

/// Which end of the packets that pass is a client, who can be anybody.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Client {
    /// The one that sends them.
    Source,
    /// The one that they are sent to.
    Destination,
}

impl Key {
    /// The key of a fragment, where peers need not be told apart.
    pub fn of(parsed: &Parsed, bytes: &[u8]) -> Self {
        Self {
            peer: PeerId(0),
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

    /// The same for a fragment that came through `peer`. It goes with none that came through
    /// another, whatever that one says of its packets.
    #[must_use]
    pub fn through(self, peer: PeerId) -> Self {
        Self { peer, ..self }
    }

    /// The two ends of the packet.
    pub(crate) fn between(&self) -> [Addr; 2] {
        [self.src, self.dst]
    }

    /// What tells packets between the same two addresses apart, for hashing.
    pub(crate) fn words(&self) -> (u64, u8) {
        (u64::from(self.id), self.protocol)
    }

    fn owner(&self, client: Client) -> Owner {
        match client {
            Client::Source => (self.peer, self.src),
            Client::Destination => (self.peer, self.dst),
        }
    }
}

/// Refuses fragments that overlap others (RFC 5722; RFC 1858 tells which attacks that stops).
#[derive(Debug)]
pub struct Overlaps {
    client: Client,
    watched: Shares<Key, Watched>,
}

#[derive(Debug)]
struct Watched {
    /// Sorted, and apart from each other.
    seen: Vec<Range<usize>>,
    spoilt: bool,
}

impl Overlaps {
    /// Starts with nothing seen.
    pub fn new(client: Client) -> Self {
        Self {
            client,
            watched: Shares::new(Bounds {
                room: WATCHED,
                // One client may have all while nobody else needs any.
                share: WATCHED,
                life: FRAGMENT_LIFE,
            }),
        }
    }

    /// Takes note of a fragment of the packet with this key.
    ///
    /// # Errors
    /// [`DropReason::FragmentOverlap`] if it overlaps another of its packet without being the same
    /// one, or if one did before: nothing more of that packet is carried.
    pub fn check(
        &mut self,
        now: Instant,
        key: Key,
        parsed: &Parsed,
        bytes: &[u8],
    ) -> Result<(), DropReason> {
        while self.watched.expire(now).is_some() {}
        let range = parsed.fragment_range(bytes);
        let Some(watched) = self.watched.get_mut(key) else {
            let seen = vec![range];
            let watched = Watched {
                seen,
                spoilt: false,
            };
            (self.watched).keep(now, key.owner(self.client), key, 1, watched);
            return Ok(());
        };
        // No fragment is empty, so only the first one that ends behind its start can clash.
        let place = watched.seen.partition_point(|seen| seen.end <= range.start);
        let next = watched.seen.get(place);
        let repeated = next == Some(&range);
        let clashes = next.is_some_and(|next| next.start < range.end);
        watched.spoilt |= !repeated && (watched.seen.len() == MAX_FRAGMENTS || clashes);
        if watched.spoilt {
            return Err(DropReason::FragmentOverlap);
        }
        if !repeated {
            watched.seen.insert(place, range);
        }
        Ok(())
    }
}

/// Later fragments that came before their first.
///
/// Only those of one packet are ever taken out for its first one, whatever else waits.
#[derive(Debug)]
pub struct HeldFragments<T> {
    client: Client,
    held: Shares<Key, Held<T>>,
}

/// A later fragment that waits.
#[derive(Debug)]
pub struct Held<T> {
    /// What the caller keeps with it.
    pub with: T,
    /// Its bytes, as it came.
    pub bytes: Vec<u8>,
}

impl<T> HeldFragments<T> {
    /// Starts with none.
    pub fn new(client: Client) -> Self {
        Self {
            client,
            held: Shares::new(Bounds {
                room: MAX_WAITING_BYTES,
                share: MAX_WAITING_SHARE,
                life: FRAGMENT_LIFE,
            }),
        }
    }

    /// Keeps a fragment of the packet with this key. Returns those that it displaced: of the same
    /// client, or of the client with most if there is no room.
    pub fn keep(&mut self, now: Instant, key: Key, with: T, bytes: &[u8]) -> Vec<Held<T>> {
        let held = Held {
            with,
            bytes: bytes.to_vec(),
        };
        let cost = bytes.len().max(LEAST_WAITING);
        (self.held).keep(now, key.owner(self.client), key, cost, held)
    }

    /// Takes out a fragment that has waited longer than its first one can be late.
    pub fn expire(&mut self, now: Instant) -> Option<Held<T>> {
        self.held.expire(now)
    }

    /// Takes out all of the packet with this key, in the order they came.
    pub fn take(&mut self, key: Key) -> Vec<Held<T>> {
        self.held.take(key)
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
    use std::net::IpAddr;

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
            let parsed = Parsed::parse(fragment).unwrap();
            overlaps.check(now, Key::of(&parsed, fragment), &parsed, fragment)
        };
        let mut overlaps = Overlaps::new(Client::Source);
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
        let key = Key::of(&parsed, &all[0]);
        assert_eq!(overlaps.check(later, key, &parsed, &all[0]), Ok(()));
    }

    proptest! {
        /// The sorted ranges say the same as a look at each of them.
        #[test]
        fn overlaps_are_those_of_a_naive_model(
            places in prop::collection::vec((0usize..20, 1usize..4), 1..40),
        ) {
            let packet = udp(300);
            let mut overlaps = Overlaps::new(Client::Source);
            let mut seen: Vec<Range<usize>> = Vec::new();
            let mut spoilt = false;
            for (start, words) in places {
                let mut fragment = packet[..20 + words * 8].to_vec();
                put(&mut fragment, ipv4::TOTAL_LEN, ((20 + words * 8) as u16).to_be_bytes());
                let word = ipv4::MORE_FRAGMENTS | start as u16;
                put(&mut fragment, ipv4::FRAGMENT, word.to_be_bytes());
                let range = start * 8..(start + words) * 8;
                let clashes = |seen: &Range<usize>| {
                    *seen != range && seen.start < range.end && range.start < seen.end
                };
                spoilt |= seen.iter().any(clashes);
                seen.push(range.clone());
                let parsed = Parsed::parse(&fragment).unwrap();
                let key = Key::of(&parsed, &fragment);
                let checked = overlaps.check(epoch(), key, &parsed, &fragment);
                prop_assert_eq!(checked.is_err(), spoilt);
            }
        }
    }

    /// A key of its own for each of these.
    fn key(client: u8, id: u32) -> Key {
        Key {
            peer: PeerId(0),
            src: IpAddr::from([10, 0, 0, client]).into(),
            dst: IpAddr::from([192, 0, 2, 5]).into(),
            id,
            protocol: 17,
        }
    }

    #[test]
    fn a_first_fragment_takes_what_has_its_whole_key_and_nothing_else() {
        let now = epoch();
        let mut held = HeldFragments::new(Client::Source);
        let wanted = key(1, 7);
        let others = [
            key(2, 7),
            key(1, 8),
            Key {
                protocol: 6,
                ..wanted
            },
            Key {
                dst: IpAddr::from([192, 0, 2, 6]).into(),
                ..wanted
            },
            wanted.through(PeerId(1)),
        ];
        assert!(held.keep(now, wanted, 1, &[1; 100]).is_empty());
        for other in others {
            assert!(held.keep(now, other, 0, &[0; 100]).is_empty());
        }
        assert!(held.keep(now, wanted, 2, &[2; 100]).is_empty());
        let taken = held.take(wanted);
        let order: Vec<_> = taken
            .iter()
            .map(|held| (held.with, held.bytes[0]))
            .collect();
        assert_eq!(order, [(1, 1), (2, 2)]);
        assert!(held.take(wanted).is_empty());
        assert_eq!(others.map(|other| held.take(other).len()), [1; 5]);
    }

    #[test]
    fn a_client_that_floods_displaces_its_own_fragments_alone() {
        let now = epoch();
        let mut held = HeldFragments::new(Client::Source);
        for n in 0..3 {
            assert!(held.keep(now, key(1, 1), 1, &[n; 1_480]).is_empty());
        }
        let mut displaced = 0;
        for id in 0..1_000 {
            let out = held.keep(now, key(2, id), 2, &[0; 1_480]);
            assert!(out.iter().all(|held| held.with == 2));
            displaced += out.len();
        }
        assert_eq!(displaced, 1_000 - MAX_WAITING_SHARE / LEAST_WAITING);
        // Nor do many clients, as long as each has as much.
        for n in 0..1_000 {
            let out = held.keep(now, key(3 + (n % 50) as u8, n), 2, &[0; 1_480]);
            assert!(out.iter().all(|held| held.with == 2));
        }
        assert_eq!(held.take(key(1, 1)).len(), 3);
        let most = (0..)
            .map_while(|_| held.expire(now + FRAGMENT_LIFE))
            .count();
        assert!(most <= MAX_WAITING_BYTES / LEAST_WAITING, "{most} waited");
    }

    #[test]
    fn a_peer_that_floods_displaces_its_own_fragments_alone() {
        let now = epoch();
        let mut held = HeldFragments::new(Client::Source);
        let mut overlaps = Overlaps::new(Client::Source);
        let victim = key(1, 1).through(PeerId(2));
        let packet = Plan::new(Kind::Udp, "203.0.113.9", "192.0.2.5").build();
        let first = fragments(&packet, 576).swap_remove(0);
        let parsed = Parsed::parse(&first).unwrap();
        for n in 0..40 {
            assert!(held.keep(now, victim, 2, &[n; 1_480]).is_empty());
        }
        overlaps.check(now, victim, &parsed, &first).unwrap();
        for n in 0..2_000_u32 {
            // From ever new addresses, for which it need not even forge anything.
            let addr = IpAddr::from((0x0b00_0000 + n).to_be_bytes());
            let key = Key {
                src: addr.into(),
                ..key(1, n)
            };
            let out = held.keep(now, key.through(PeerId(1)), 1, &[0; 1_480]);
            assert!(out.iter().all(|held| held.with == 1));
            let _ = overlaps.check(now, key.through(PeerId(1)), &parsed, &first);
        }
        assert_eq!(held.take(victim).len(), 40);
        assert!(overlaps.watched.get_mut(victim).is_some(), "still watched");
    }

    #[test]
    fn what_waits_is_forgotten_whatever_passes_meanwhile() {
        let mut now = epoch();
        let mut held = HeldFragments::new(Client::Source);
        assert!(held.keep(now, key(1, 7), (), &[0; 100]).is_empty());
        for client in 2..FRAGMENT_LIFE.as_secs() as u8 + 1 {
            now += Duration::from_secs(1);
            assert!(held.take(key(client, 7)).is_empty());
            assert!(held.expire(now).is_none());
        }
        now += Duration::from_secs(1);
        assert!(held.expire(now).is_some());
        assert!(held.expire(now).is_none());
    }
}
