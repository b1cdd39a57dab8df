//! Who gives way when flows or ports run out.
//!
//! Owns how many flows there may be ([`Limit`]), which peer has to make space ([`Turn`]), and which
//! source: whoever holds most. Nobody is counted for that while there is space. When there is none,
//! a few flows are looked at: a source with many of all flows has many of those, whatever it does.
//! So a new flow's cost is bounded, and a packet of a known flow costs nothing.
//!
//! ```text
//! full ──► which peer?    one with more than its part; else the new flow's own
//!      ──► which source?  who has most of the flows that are looked at, if that is much
//!      ──► which flow?    the most dispensable (class), then the one unused for longest
//! ```
//!
//! A flow in use goes only for another peer, or another source, that holds less. What is given up
//! is not lost: the client's next packet makes the flow again.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use crate::model::peer::{MAX_HOLDERS, PeerId};
use crate::packet::Addr;

/// Flows that are looked at to find a source that holds many.
pub(super) const SAMPLE: usize = 32;
/// So many more of a [`SAMPLE`] than the source of the new flow make a source give way. Who has a
/// tenth of all flows is found nearly always within a few new flows, and of sixteen sources that
/// have everything together one is found each time; who has less than a hundredth hardly ever.
pub(super) const SAMPLE_LEAD: usize = 3;

/// How many flows there may be, shared by the tables that share it.
#[derive(Debug)]
pub struct Limit {
    max: AtomicUsize,
    live: AtomicUsize,
    /// By [`PeerId`].
    of_peers: Box<[AtomicUsize]>,
}

impl Limit {
    /// At most `max` flows.
    pub fn new(max: usize) -> Self {
        Self {
            max: AtomicUsize::new(max),
            live: AtomicUsize::new(0),
            of_peers: (0..MAX_HOLDERS).map(|_| AtomicUsize::new(0)).collect(),
        }
    }

    /// The most there may be.
    pub fn max(&self) -> usize {
        self.max.load(Relaxed)
    }

    /// Sets the most there may be from now on.
    pub fn set_max(&self, max: usize) {
        self.max.store(max, Relaxed);
    }

    /// How many there are.
    pub fn live(&self) -> usize {
        self.live.load(Relaxed)
    }

    /// Whether a new flow has to take the place of another.
    pub(super) fn is_full(&self) -> bool {
        self.live() >= self.max()
    }

    /// How many flows of `peer` there are.
    #[cfg(test)]
    pub(super) fn of_peer(&self, peer: PeerId) -> usize {
        self.of_peers[usize::from(peer.0)].load(Relaxed)
    }

    /// Takes a place for a flow of `peer`; false if there is none.
    pub(super) fn take(&self, peer: PeerId) -> bool {
        if self.live.fetch_add(1, Relaxed) < self.max() {
            if let Some(flows) = self.of_peers.get(usize::from(peer.0)) {
                flows.fetch_add(1, Relaxed);
            }
            return true;
        }
        self.live.fetch_sub(1, Relaxed);
        false
    }

    /// Gives back the place of a flow of `peer`.
    pub(super) fn give_back(&self, peer: PeerId) {
        if let Some(flows) = self.of_peers.get(usize::from(peer.0)) {
            flows.fetch_sub(1, Relaxed);
        }
        self.live.fetch_sub(1, Relaxed);
    }

    /// Who gives way to a new flow of `client`, which came through `peer`.
    ///
    /// Each peer that has flows has a part of the limit, all the same. One that has less gets space
    /// from the one with most, even what that one is using. One that has its part makes space for
    /// itself.
    pub(super) fn turn(&self, peer: PeerId, client: Addr) -> Turn {
        let new = Holder::of(peer, client);
        let held = |flows: &AtomicUsize| flows.load(Relaxed);
        let own = self.of_peers.get(usize::from(peer.0)).map_or(0, held);
        let others = (0..).map(PeerId).zip(self.of_peers.iter().map(held));
        let (mut holders, mut most) = (1, (peer, own));
        for (other, flows) in others.filter(|&(other, flows)| other != peer && flows > 0) {
            holders += 1;
            if flows > most.1 {
                most = (other, flows);
            }
        }
        let is_guest = own < self.max() / holders && most.0 != peer;
        Turn {
            peer: if is_guest { most.0 } else { peer },
            is_guest,
            new,
        }
    }
}

/// Who has to make space, and for whom.
#[derive(Clone, Copy, Debug)]
pub(super) struct Turn {
    /// The peer whose flows give way.
    pub(super) peer: PeerId,
    /// The new flow is another peer's, which has less than its part: even flows in use give way.
    pub(super) is_guest: bool,
    /// Whose flow is new.
    pub(super) new: Holder,
}

/// Who holds flows: a source behind a peer. What a peer says of its clients cannot be checked, so
/// what comes through one counts for no client of another.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Holder {
    peer: PeerId,
    source: Addr,
}

impl Holder {
    pub(super) fn of(peer: PeerId, client: Addr) -> Self {
        Self {
            peer,
            source: client.source(),
        }
    }
}

/// A flow that might give way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    pub(super) at: u32,
    pub(super) holder: Holder,
    /// Its place in the order of eviction; `None` if it is in use.
    pub(super) tier: Option<usize>,
    pub(super) last_seen: u32,
}

impl Candidate {
    /// Those in use come last, and of equals the one unused for longest first.
    fn worth(&self) -> (usize, u32) {
        (self.tier.unwrap_or(usize::MAX), self.last_seen)
    }
}

/// The flow to give up for one of `new`, if some source holds so many of the candidates.
///
/// That is a source that has at least `lead` more than `new` has; or `new` itself, if it has most,
/// but then nothing that it is using.
pub(super) fn of_largest_holder(
    candidates: &mut [Candidate],
    new: Holder,
    lead: usize,
) -> Option<Candidate> {
    candidates.sort_unstable_by_key(|one| (one.holder, one.worth()));
    let (mut own, mut most): (&[Candidate], &[Candidate]) = (&[], &[]);
    for held in candidates.chunk_by(|one, next| one.holder == next.holder) {
        match held.first() {
            Some(first) if first.holder == new => own = held,
            Some(_) if held.len() > most.len() => most = held,
            _ => {}
        }
    }
    if most.len() >= own.len() + lead {
        return most.first().copied();
    }
    let is_largest = own.len() >= lead && own.len() >= most.len();
    let first = own.first().filter(|first| first.tier.is_some());
    first.filter(|_| is_largest).copied()
}

/// The candidate that nobody is using and that is missed least.
pub(super) fn most_dispensable(candidates: &[Candidate]) -> Option<Candidate> {
    let unused = candidates.iter().filter(|one| one.tier.is_some());
    unused.min_by_key(|one| one.worth()).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::Ipv4Addr;

    fn addr(n: u32) -> Addr {
        Ipv4Addr::from(n).into()
    }

    fn candidate(at: u32, source: u32, tier: Option<usize>) -> Candidate {
        Candidate {
            at,
            holder: Holder::of(PeerId(0), addr(source)),
            tier,
            last_seen: at,
        }
    }

    #[test]
    fn who_has_most_gives_way_and_keeps_what_it_uses_from_itself() {
        let mut some: Vec<_> = (0..8).map(|at| candidate(at, 1 + at % 2, None)).collect();
        some.extend((8..13).map(|at| candidate(at, 1, None)));
        let mut way = |new, lead| {
            let new = Holder::of(PeerId(0), addr(new));
            of_largest_holder(&mut some, new, lead).map(|one| one.at)
        };
        // 1 has nine, 2 has four.
        assert_eq!(way(3, 3), Some(0), "the oldest");
        assert_eq!(way(2, 5), Some(0));
        assert_eq!(way(2, 6), None, "not that many more");
        assert_eq!(way(1, 3), None, "all in use");
        some.push(candidate(20, 1, Some(2)));
        let mut way = |new| {
            let new = Holder::of(PeerId(new), addr(1));
            of_largest_holder(&mut some, new, 3).map(|one| one.at)
        };
        assert_eq!(way(0), Some(20), "the one that is not in use");
        assert_eq!(
            way(9),
            Some(20),
            "another peer's client of the same address"
        );
        assert_eq!(most_dispensable(&some).map(|one| one.at), Some(20));
    }

    #[test]
    fn a_peer_below_its_part_gets_space_from_the_one_with_most() {
        let limit = Limit::new(100);
        for (peer, flows) in [(1, 70), (2, 20), (3, 10)] {
            (0..flows).for_each(|_| assert!(limit.take(PeerId(peer))));
        }
        assert!(limit.is_full() && !limit.take(PeerId(3)));
        let turn = |peer| {
            let turn = limit.turn(PeerId(peer), addr(1));
            (turn.peer.0, turn.is_guest)
        };
        assert_eq!((turn(1), turn(2)), ((1, false), (1, true)));
        assert_eq!((turn(3), turn(4)), ((1, true), (1, true)));
        let alone = Limit::new(10);
        (0..10).for_each(|_| assert!(alone.take(PeerId(0))));
        let turn = alone.turn(PeerId(0), addr(1));
        assert_eq!((turn.peer, turn.is_guest), (PeerId(0), false));
    }

    proptest! {
        /// Whatever the peers hold, nobody at or below its part is made to give way to another.
        #[test]
        fn a_peers_part_is_its_own(
            held in prop::collection::vec(0usize..50, 1..8), new in 0u16..8,
        ) {
            let limit = Limit::new(held.iter().sum::<usize>().max(1));
            for (peer, &flows) in held.iter().enumerate() {
                (0..flows).for_each(|_| assert!(limit.take(PeerId(peer as u16))));
            }
            let turn = limit.turn(PeerId(new), addr(1));
            let with = |peer: PeerId| held.get(usize::from(peer.0)).copied().unwrap_or(0);
            let holders = (held.iter().enumerate())
                .filter(|&(peer, &flows)| flows > 0 || peer == usize::from(new))
                .count()
                .max(1);
            if turn.is_guest {
                prop_assert!(with(turn.peer) > limit.max() / (holders + 1));
                prop_assert!(with(turn.peer) > with(turn.new.peer));
            } else {
                prop_assert_eq!(turn.peer, PeerId(new));
            }
        }
    }
}
