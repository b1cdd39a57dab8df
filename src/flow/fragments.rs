//! What the first fragment of a packet told, kept for the later ones, which do not say it again.
//!
//! Owns a small cache from (source, destination, identification, protocol) to whatever was decided
//! for the first fragment. Bounded, and forgetful on purpose: a later fragment that comes before
//! its first, or too long after it, is not known. Nothing is ever reassembled here. Where space
//! runs out, who has most of it makes way: first among peers, then among the hosts of one.

use std::time::Instant;

use crate::flow::seed::Seed;
use crate::model::peer::PeerId;
use crate::packet::fragment::{FRAGMENT_LIFE, Key};
use crate::packet::{Addr, Parsed};

/// Sets of the cache: a thousand fragmented packets at a time, whose fragments come right after
/// each other.
const SETS: usize = 128;
/// Packets a set remembers. So many peers, or hosts of one, always have a place in each.
const WAYS: usize = 8;

/// Remembers a `T` for every packet whose first fragment was seen. Takes no memory until then.
#[derive(Debug)]
pub struct FragmentCache<T> {
    sets: Vec<[Option<Slot<T>>; WAYS]>,
}

#[derive(Clone, Copy, Debug)]
struct Slot<T> {
    peer: PeerId,
    key: Key,
    seen: Instant,
    value: T,
}

impl<T> Slot<T> {
    fn is_fresh(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.seen) < FRAGMENT_LIFE
    }

    fn between(&self) -> [Addr; 2] {
        self.key.between().map(Addr::source)
    }
}

impl<T: Copy> FragmentCache<T> {
    /// An empty cache.
    pub const fn new() -> Self {
        Self { sets: Vec::new() }
    }

    /// Remembers `value` for the later fragments of the packet that `parsed` is the first one of,
    /// where peers need not be told apart.
    ///
    /// `bytes` are those from before any rewriting, which the later fragments will have too.
    pub fn remember(&mut self, now: Instant, seed: &Seed, parsed: &Parsed, bytes: &[u8], value: T) {
        self.remember_of(PeerId(0), now, seed, parsed, bytes, value);
    }

    /// As [`remember`](Self::remember), for a packet that comes from or goes to `peer`.
    pub fn remember_of(
        &mut self,
        peer: PeerId,
        now: Instant,
        seed: &Seed,
        parsed: &Parsed,
        bytes: &[u8],
        value: T,
    ) {
        if self.sets.is_empty() {
            self.sets.resize(SETS, [const { None }; WAYS]);
        }
        let key = Key::of(parsed, bytes);
        let slot = Slot {
            peer,
            key,
            seen: now,
            value,
        };
        let set = &mut self.sets[set_of(&key, seed)];
        set[place_for(set, &slot, now)] = Some(slot);
    }

    /// What was remembered for the packet that `parsed` is a fragment of.
    pub fn recall(&self, now: Instant, seed: &Seed, parsed: &Parsed, bytes: &[u8]) -> Option<T> {
        self.find(now, seed, &Key::of(parsed, bytes), |_| true)
    }

    /// As [`recall`](Self::recall), only what was remembered for a packet of `peer`.
    pub fn recall_of(
        &self,
        peer: PeerId,
        now: Instant,
        seed: &Seed,
        parsed: &Parsed,
        bytes: &[u8],
    ) -> Option<T> {
        let key = Key::of(parsed, bytes);
        self.find(now, seed, &key, |slot| slot.peer == peer)
    }

    fn find(
        &self,
        now: Instant,
        seed: &Seed,
        key: &Key,
        fits: impl Fn(&Slot<T>) -> bool,
    ) -> Option<T> {
        self.sets
            .get(set_of(key, seed))?
            .iter()
            .flatten()
            .filter(|slot| slot.key == *key && slot.is_fresh(now) && fits(slot))
            .max_by_key(|slot| slot.seen)
            .map(|slot| slot.value)
    }
}

impl<T: Copy> Default for FragmentCache<T> {
    fn default() -> Self {
        Self::new()
    }
}

/// The place in its set for a new slot: that of the same packet, or a free one. If there is none,
/// the oldest goes of the hosts with most, of the peers with most.
fn place_for<T>(set: &[Option<Slot<T>>; WAYS], new: &Slot<T>, now: Instant) -> usize {
    let same = |slot: &Option<Slot<T>>| {
        let slot = slot.as_ref();
        slot.is_some_and(|slot| slot.key == new.key && slot.peer == new.peer)
    };
    let free = |slot: &Option<Slot<T>>| !slot.as_ref().is_some_and(|slot| slot.is_fresh(now));
    let ready = (set.iter().position(same)).or_else(|| set.iter().position(free));
    ready.unwrap_or_else(|| {
        let count = |fits: &dyn Fn(&Slot<T>) -> bool| {
            let all = set.iter().flatten().chain(std::iter::once(new));
            all.filter(|slot| fits(slot)).count()
        };
        let weight = |slot: &Slot<T>| {
            let of_peer = count(&|other| other.peer == slot.peer);
            let of_host =
                count(&|other| other.peer == slot.peer && other.between() == slot.between());
            (of_peer, of_host, std::cmp::Reverse(slot.seen))
        };
        let most = |&at: &usize| set[at].as_ref().map(weight);
        (0..WAYS).max_by_key(most).unwrap_or(0)
    })
}

/// The set of the cache that a packet belongs to.
fn set_of(key: &Key, seed: &Seed) -> usize {
    let (id, protocol) = key.words();
    seed.flow(key.between(), id, protocol) as usize % SETS
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::Kind;
    use crate::packet::testing::{Plan, fragments};
    use crate::testing::epoch;
    use std::net::IpAddr;

    struct Bed {
        cache: FragmentCache<u32>,
        seed: Seed,
    }

    impl Bed {
        fn new() -> Self {
            Self {
                cache: FragmentCache::new(),
                seed: Seed::new([1, 2]),
            }
        }

        fn first(&mut self, peer: u16, source: u32, id: u8) {
            let bytes = fragment(source, id);
            let parsed = Parsed::parse(&bytes).unwrap();
            let (peer, value) = (PeerId(peer), u32::from(id));
            (self.cache).remember_of(peer, epoch(), &self.seed, &parsed, &bytes, value);
        }

        fn knows(&self, peer: u16, source: u32, id: u8) -> bool {
            let bytes = fragment(source, id);
            let parsed = Parsed::parse(&bytes).unwrap();
            let peer = PeerId(peer);
            let found = (self.cache).recall_of(peer, epoch(), &self.seed, &parsed, &bytes);
            assert!(found.is_none_or(|value| value == u32::from(id)));
            found.is_some()
        }
    }

    fn fragment(source: u32, id: u8) -> Vec<u8> {
        let client = IpAddr::from(source.to_be_bytes()).to_string();
        let plan = Plan::new(Kind::Udp, &client, "192.0.2.5");
        let [first, _] = fragments(&plan.build(), 16, id);
        first
    }

    #[test]
    fn a_peer_that_floods_displaces_itself() {
        let mut bed = Bed::new();
        for id in 0..100 {
            bed.first(2, 0x0a00_0001, id);
        }
        // From as many hosts as it likes.
        for n in 0..20_000 {
            bed.first(1, 0x0b00_0000 + n, n as u8);
        }
        let known = (0..100).filter(|&id| bed.knows(2, 0x0a00_0001, id));
        assert_eq!(known.count(), 100);
        assert!(!bed.knows(1, 0x0a00_0001, 7), "another peer's");
    }

    #[test]
    fn a_host_that_floods_displaces_itself() {
        let mut bed = Bed::new();
        for id in 0..100 {
            bed.first(1, 0x0a00_0001 + u32::from(id), id);
        }
        // From a whole /24, to as many addresses as one peer may have moved.
        for id in 0..=u8::MAX {
            bed.first(1, 0x0b00_0000, id);
        }
        let known = (0..100).filter(|&id| bed.knows(1, 0x0a00_0001 + u32::from(id), id));
        assert_eq!(known.count(), 100);
    }
}
