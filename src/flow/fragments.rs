//! What the first fragment of a packet told, kept for the later ones, which do not say it again.
//!
//! Owns a small cache from (source, destination, identification, protocol) to whatever was decided
//! for the first fragment. Bounded, and forgetful on purpose: a later fragment that comes before
//! its first, or too long after it, is not known. Nothing is ever reassembled here.

use std::time::Instant;

use crate::flow::seed::Seed;
use crate::packet::Parsed;
use crate::packet::fragment::{FRAGMENT_LIFE, Key};

/// Sets of the cache: a thousand fragmented packets at a time, whose fragments come right after
/// each other.
const SETS: usize = 256;
/// Packets a set remembers.
const WAYS: usize = 4;

/// Remembers a `T` for every packet whose first fragment was seen. Takes no memory until then.
#[derive(Debug)]
pub struct FragmentCache<T> {
    sets: Vec<[Option<Slot<T>>; WAYS]>,
}

#[derive(Clone, Copy, Debug)]
struct Slot<T> {
    key: Key,
    seen: Instant,
    value: T,
}

impl<T: Copy> FragmentCache<T> {
    /// An empty cache.
    pub const fn new() -> Self {
        Self { sets: Vec::new() }
    }

    /// Remembers `value` for the later fragments of the packet that `parsed` is the first one of.
    /// If the set is full, its oldest entry goes.
    ///
    /// `bytes` are those from before any rewriting, which the later fragments will have too.
    pub fn remember(&mut self, now: Instant, seed: &Seed, parsed: &Parsed, bytes: &[u8], value: T) {
        if self.sets.is_empty() {
            self.sets.resize(SETS, [const { None }; WAYS]);
        }
        let key = Key::of(parsed, bytes);
        let set = &mut self.sets[set_of(&key, seed)];
        let mut place = 0;
        for (index, slot) in set.iter().enumerate() {
            match slot {
                Some(slot) if slot.key == key => {
                    place = index;
                    break;
                }
                slot if slot.as_ref().map(|slot| slot.seen)
                    < set[place].as_ref().map(|slot| slot.seen) =>
                {
                    place = index;
                }
                _ => {}
            }
        }
        set[place] = Some(Slot {
            key,
            seen: now,
            value,
        });
    }

    /// What was remembered for the packet that `parsed` is a fragment of.
    pub fn recall(&self, now: Instant, seed: &Seed, parsed: &Parsed, bytes: &[u8]) -> Option<T> {
        let key = Key::of(parsed, bytes);
        self.sets
            .get(set_of(&key, seed))?
            .iter()
            .flatten()
            .find(|slot| {
                slot.key == key && now.saturating_duration_since(slot.seen) < FRAGMENT_LIFE
            })
            .map(|slot| slot.value)
    }
}

impl<T: Copy> Default for FragmentCache<T> {
    fn default() -> Self {
        Self::new()
    }
}

/// The set of the cache that a packet belongs to.
fn set_of(key: &Key, seed: &Seed) -> usize {
    let (src, rest, protocol) = key.words();
    seed.flow(src, rest, protocol) as usize % SETS
}
