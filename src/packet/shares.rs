//! Memory that many sources share, none of which can take it from the others. Nor can a peer, with
//! as many sources as it likes.
//!
//! Owns the bounds: how much there is, how much of it one source may have, how long it is kept, and
//! who makes way. Knows nothing of what is kept. Everything is found in ordered maps, so what one
//! packet costs does not depend on what others have sent, and nobody can choose what collides.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::model::peer::PeerId;
use crate::packet::Addr;

/// How much may be kept, in a unit that the user chooses.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Of all sources together.
    pub(super) room: usize,
    /// Of one source.
    pub(super) share: usize,
    /// How long.
    pub(super) life: Duration,
}

/// Whose a value is: a peer, and a source behind it.
pub(super) type Owner = (PeerId, Addr);

/// Keeps values of many sources under keys, of which several values can have the same.
///
/// If a source has more than its share, its own oldest value goes. If all have more than there is
/// room for, the source with most loses its oldest one, of the peer whose sources have most. So who
/// sends much displaces itself.
#[derive(Debug)]
pub(super) struct Shares<K, V> {
    bounds: Bounds,
    /// In the order they came.
    kept: BTreeMap<u64, Kept<K, V>>,
    numbers: BTreeSet<(K, u64)>,
    sources: BTreeMap<Owner, Source>,
    /// What is kept of all sources of a peer.
    peers: BTreeMap<PeerId, usize>,
    cost: usize,
    next: u64,
}

#[derive(Debug)]
struct Kept<K, V> {
    source: Owner,
    key: K,
    since: Instant,
    cost: usize,
    value: V,
}

/// What is kept of one source.
#[derive(Default, Debug)]
struct Source {
    cost: usize,
    numbers: BTreeSet<u64>,
}

impl<K: Ord + Copy, V> Shares<K, V> {
    /// Starts with nothing.
    pub(super) fn new(bounds: Bounds) -> Self {
        Self {
            bounds,
            kept: BTreeMap::new(),
            numbers: BTreeSet::new(),
            sources: BTreeMap::new(),
            peers: BTreeMap::new(),
            cost: 0,
            next: 0,
        }
    }

    /// Keeps a value that costs so much of the room. Returns those that make way for it, which may
    /// be itself.
    pub(super) fn keep(
        &mut self,
        now: Instant,
        (peer, source): Owner,
        key: K,
        cost: usize,
        value: V,
    ) -> Vec<V> {
        // What one host can fill at will counts as one.
        let source = (peer, source.source());
        let number = self.next;
        self.next += 1;
        let of_source = self.sources.entry(source).or_default();
        of_source.cost += cost;
        of_source.numbers.insert(number);
        let over = of_source.cost > self.bounds.share;
        *self.peers.entry(peer).or_default() += cost;
        self.numbers.insert((key, number));
        self.cost += cost;
        let kept = Kept {
            source,
            key,
            since: now,
            cost,
            value,
        };
        self.kept.insert(number, kept);
        let mut out = Vec::new();
        if over {
            self.cut(source, &mut out);
        }
        while self.cost > self.bounds.room {
            let most = self.peers.iter().max_by_key(|&(_, &cost)| cost);
            let Some((&peer, _)) = most else {
                break;
            };
            // Of several with as much, the one whose oldest value is oldest.
            let most = (self.sources.range((peer, Addr::FIRST)..))
                .take_while(|((other, _), _)| *other == peer)
                .map(|(_, source)| source)
                .max_by(|a, b| {
                    a.cost
                        .cmp(&b.cost)
                        .then_with(|| b.numbers.first().cmp(&a.numbers.first()))
                });
            let Some(oldest) = most.and_then(|source| source.numbers.first().copied()) else {
                break;
            };
            out.extend(self.remove(oldest).map(|kept| kept.value));
        }
        out
    }

    /// The value kept longest under this key.
    pub(super) fn get_mut(&mut self, key: K) -> Option<&mut V> {
        let (_, number) = *self.numbers.range((key, 0)..=(key, u64::MAX)).next()?;
        self.kept.get_mut(&number).map(|kept| &mut kept.value)
    }

    /// Takes out all values under this key, in the order they came.
    pub(super) fn take(&mut self, key: K) -> Vec<V> {
        let of_key = self.numbers.range((key, 0)..=(key, u64::MAX));
        let numbers: Vec<u64> = of_key.map(|&(_, number)| number).collect();
        let taken = numbers.into_iter().filter_map(|number| self.remove(number));
        taken.map(|kept| kept.value).collect()
    }

    /// Takes out a value that was kept for its whole life, as long as there is one.
    pub(super) fn expire(&mut self, now: Instant) -> Option<V> {
        let (&number, oldest) = self.kept.first_key_value()?;
        if now.saturating_duration_since(oldest.since) < self.bounds.life {
            return None;
        }
        self.remove(number).map(|kept| kept.value)
    }

    /// Takes the oldest values of a source out until it has no more than its share.
    fn cut(&mut self, source: Owner, out: &mut Vec<V>) {
        while let Some(of_source) = self.sources.get(&source)
            && of_source.cost > self.bounds.share
            && let Some(&oldest) = of_source.numbers.first()
        {
            out.extend(self.remove(oldest).map(|kept| kept.value));
        }
    }

    fn remove(&mut self, number: u64) -> Option<Kept<K, V>> {
        let kept = self.kept.remove(&number)?;
        self.numbers.remove(&(kept.key, number));
        self.cost -= kept.cost;
        let (peer, _) = kept.source;
        if let Some(of_peer) = self.peers.get_mut(&peer) {
            *of_peer -= kept.cost;
            if *of_peer == 0 {
                self.peers.remove(&peer);
            }
        }
        if let Some(of_source) = self.sources.get_mut(&kept.source) {
            of_source.cost -= kept.cost;
            of_source.numbers.remove(&number);
            if of_source.numbers.is_empty() {
                self.sources.remove(&kept.source);
            }
        }
        Some(kept)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::epoch;
    use proptest::prelude::*;
    use std::net::IpAddr;

    const LIFE: Duration = Duration::from_secs(30);
    const BOUNDS: Bounds = Bounds {
        room: 8,
        share: 4,
        life: LIFE,
    };

    fn addr(n: u8) -> Owner {
        (PeerId(0), IpAddr::from([10, 0, 0, n]).into())
    }

    #[test]
    fn who_has_more_than_its_share_displaces_itself() {
        let now = epoch();
        let mut shares = Shares::new(BOUNDS);
        assert!(shares.keep(now, addr(1), 'a', 1, 0).is_empty());
        for n in 1..=4 {
            assert!(shares.keep(now, addr(2), 'b', 1, n).is_empty());
        }
        assert_eq!(shares.keep(now, addr(2), 'b', 2, 5), [1, 2]);
        assert_eq!(shares.take('a'), [0]);
        assert_eq!(shares.take('b'), [3, 4, 5]);
        assert_eq!(shares.keep(now, addr(2), 'b', 5, 6), [6], "never fits");
        assert!(shares.sources.is_empty() && shares.numbers.is_empty());
    }

    #[test]
    fn where_there_is_no_room_who_has_most_makes_way() {
        let now = epoch();
        let mut shares = Shares::new(BOUNDS);
        assert!(shares.keep(now, addr(9), 'v', 1, 0).is_empty());
        for n in 0..7 {
            assert!(shares.keep(now, addr(n % 3), 'a', 1, 10 + n).is_empty());
        }
        // 0 has three, 1 and 2 have two.
        assert_eq!(shares.keep(now, addr(9), 'v', 1, 1), [10]);
        // All have two now: the oldest goes, which is the victim's own.
        assert_eq!(shares.keep(now, addr(8), 'n', 1, 20), [0]);
        assert_eq!(shares.keep(now, addr(8), 'n', 1, 21), [11]);
    }

    #[test]
    fn a_peer_with_many_sources_displaces_itself() {
        let now = epoch();
        let mut shares = Shares::new(BOUNDS);
        let of = |peer, n| (PeerId(peer), addr(n).1);
        for n in 0..4 {
            assert!(shares.keep(now, of(2, 1), 'v', 1, n).is_empty());
        }
        for n in 0..100 {
            let out = shares.keep(now, of(1, n), 'a', 1, 100 + n);
            assert!(out.iter().all(|&value| value >= 100), "{out:?}");
        }
        assert_eq!(shares.take('v'), [0, 1, 2, 3]);
        assert_eq!(shares.peers.len(), 1);
    }

    #[test]
    fn a_64_is_one_source() {
        let host = |n: u16| {
            let addr = IpAddr::from([0x2001, 0xdb8, 0, 0, n, 0, 0, 1]);
            (PeerId(0), addr.into())
        };
        let mut shares = Shares::new(BOUNDS);
        let out: Vec<_> = (0..6)
            .flat_map(|n| shares.keep(epoch(), host(n), 'a', 1, n))
            .collect();
        assert_eq!(out, [0, 1]);
    }

    proptest! {
        /// Whatever comes, the bounds hold, and everything that went in comes out once.
        #[test]
        fn bounds_hold_and_nothing_is_lost(
            steps in prop::collection::vec((0u8..6, 0u8..5, 1usize..4, 0u64..8), 0..200),
        ) {
            let mut now = epoch();
            let mut shares = Shares::new(BOUNDS);
            let mut out = Vec::new();
            let mut came = 0;
            for (source, key, cost, pause) in steps {
                now += Duration::from_secs(pause);
                if cost == 3 {
                    out.extend(shares.take(key));
                } else {
                    let owner = (PeerId(u16::from(source) / 4), addr(source).1);
                    out.extend(shares.keep(now, owner, key, cost, came));
                    came += 1;
                }
                while let Some(expired) = shares.expire(now) {
                    out.push(expired);
                }
                let sum: usize = shares.kept.values().map(|kept| kept.cost).sum();
                prop_assert_eq!(sum, shares.cost);
                prop_assert_eq!(sum, shares.peers.values().sum::<usize>());
                prop_assert!(sum <= BOUNDS.room);
                prop_assert!(shares.sources.values().all(|source| source.cost <= BOUNDS.share));
                prop_assert!(shares.kept.values().all(|kept| now - kept.since < LIFE));
            }
            while let Some(expired) = shares.expire(now + LIFE) {
                out.push(expired);
            }
            prop_assert!(shares.numbers.is_empty() && shares.sources.is_empty());
            out.sort_unstable();
            prop_assert_eq!(out, (0..came).collect::<Vec<_>>());
        }
    }
}
