//! How many conversations each move has: those that live, those that came by the tunnel, and those
//! that came directly to where it is delivered.
//!
//! Owns the counts and which of them is a move's. A flow has the place of its move's count, and
//! counts when it changes its class or ends: a packet costs nothing, a new flow an addition or two.
//!
//! Only what was answered counts, and with TCP only what went on after that, so that a flood with
//! forged sources brings no conversation. ICMP does not count.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock};

use crate::flow::class::Class;
use crate::flow::lock;
use crate::model::moved::{MAX_MOVES, Move};
use crate::model::peer::{MAX_PEERS, PeerId};

/// Counts of a peer: those of as many moves as it may have, and of as many that it had. A move that
/// comes back has what it had.
const PLACES: usize = 2 * MAX_MOVES;

/// Places for which memory is taken at a time.
const CHUNK: usize = 256;

/// Of a flow: where it counts, and whether it is still to count as a new conversation.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Counted(u16);

impl Counted {
    const NEW: u16 = 1 << 15;
    /// It counts nowhere.
    pub(super) const NOWHERE: Self = Self(Self::NEW - 1);

    /// It begins a conversation, and is a new one as soon as it counts.
    pub(super) fn begun(self) -> Self {
        Self(self.0 | Self::NEW)
    }

    fn place(self) -> usize {
        usize::from(self.0 & !Self::NEW)
    }

    /// Whether it is still to count as a new conversation.
    pub(super) fn is_new(self) -> bool {
        self.0 & Self::NEW != 0
    }

    /// Whether it counts at all.
    pub(super) fn is_somewhere(self) -> bool {
        self.place() != Self::NOWHERE.place()
    }
}

/// What was counted of a move since this daemon started.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Tally {
    /// Conversations that came by the tunnel and live.
    pub live: u64,
    /// Conversations that came by the tunnel.
    pub by_tunnel: u64,
    /// Those that came directly.
    pub directly: u64,
}

/// The counts of all moves.
pub(super) struct Tallies {
    peers: Box<[OnceLock<Box<OfPeer>>]>,
}

/// Those of one peer.
struct OfPeer {
    chunks: [OnceLock<Box<[Counts; CHUNK]>>; PLACES.div_ceil(CHUNK)],
    names: Mutex<Names>,
}

#[derive(Default)]
struct Counts {
    live: AtomicU64,
    by_tunnel: AtomicU64,
    directly: AtomicU64,
}

/// Which place is whose.
#[derive(Default)]
struct Names {
    places: HashMap<Move, Named>,
    /// Moves that are gone, the one that has been for longest first.
    gone: BTreeMap<u64, Move>,
    gone_so_far: u64,
}

struct Named {
    place: u16,
    /// Its place among those that are gone, if it is.
    gone: Option<u64>,
}

impl Tallies {
    pub(super) fn new() -> Self {
        Self {
            peers: (0..MAX_PEERS).map(|_| OnceLock::new()).collect(),
        }
    }

    /// Where the flows of each of a peer's moves count from now on.
    pub(super) fn name(&self, peer: PeerId, moves: &[Move]) -> Arc<[Counted]> {
        let Some(of_peer) = self.peers.get(usize::from(peer.0)) else {
            return moves.iter().map(|_| Counted::NOWHERE).collect();
        };
        let of_peer = of_peer.get_or_init(|| {
            Box::new(OfPeer {
                chunks: std::array::from_fn(|_| OnceLock::new()),
                names: Mutex::default(),
            })
        });
        let mut names = lock(&of_peer.names);
        names.retire_all_but(moves);
        let place = |moved| names.place(moved, of_peer);
        moves.iter().map(place).collect()
    }

    /// What was counted there.
    pub(super) fn get(&self, peer: PeerId, at: Counted) -> Tally {
        let counts = self.counts(peer, at);
        counts.map_or_else(Tally::default, |counts| Tally {
            live: counts.live.load(Relaxed),
            by_tunnel: counts.by_tunnel.load(Relaxed),
            directly: counts.directly.load(Relaxed),
        })
    }

    /// So many new conversations came directly.
    pub(super) fn came_directly(&self, peer: PeerId, at: Counted, new: u64) {
        if let Some(counts) = self.counts(peer, at) {
            counts.directly.fetch_add(new, Relaxed);
        }
    }

    /// A flow has another class.
    pub(super) fn turned(&self, peer: PeerId, at: &mut Counted, before: Class, after: Class) {
        let Some(counts) = self.counts(peer, *at) else {
            return;
        };
        match (before.counts(), after.counts()) {
            (false, true) => {
                counts.live.fetch_add(1, Relaxed);
                if at.is_new() {
                    counts.by_tunnel.fetch_add(1, Relaxed);
                    *at = Counted(at.0 & !Counted::NEW);
                }
            }
            (true, false) => {
                counts.live.fetch_sub(1, Relaxed);
            }
            (true, true) | (false, false) => {}
        }
        // Another connection with the same addresses and ports.
        if after == Class::TcpOpening {
            *at = at.begun();
        }
    }

    /// A flow ended.
    pub(super) fn ended(&self, peer: PeerId, at: Counted, class: Class) {
        if let Some(counts) = self.counts(peer, at).filter(|_| class.counts()) {
            counts.live.fetch_sub(1, Relaxed);
        }
    }

    fn counts(&self, peer: PeerId, at: Counted) -> Option<&Counts> {
        self.peers
            .get(usize::from(peer.0))?
            .get()?
            .counts(at.place())
    }
}

impl OfPeer {
    fn counts(&self, place: usize) -> Option<&Counts> {
        let chunk = self.chunks.get(place / CHUNK)?;
        chunk.get()?.get(place % CHUNK)
    }
}

impl Names {
    fn retire_all_but(&mut self, moves: &[Move]) {
        let kept: std::collections::HashSet<&Move> = moves.iter().collect();
        for (moved, named) in &mut self.places {
            if named.gone.is_none() && !kept.contains(moved) {
                named.gone = Some(self.gone_so_far);
                self.gone.insert(self.gone_so_far, moved.clone());
                self.gone_so_far += 1;
            }
        }
    }

    fn place(&mut self, moved: &Move, of_peer: &OfPeer) -> Counted {
        if let Some(named) = self.places.get_mut(moved) {
            if let Some(gone) = named.gone.take() {
                self.gone.remove(&gone);
            }
            return Counted(named.place);
        }
        // The last one means nowhere.
        let fresh = self.places.len();
        let place = if fresh < PLACES - 1 {
            of_peer.chunks[fresh / CHUNK]
                .get_or_init(|| Box::new(std::array::from_fn(|_| Counts::default())));
            Some(fresh as u16)
        } else {
            self.take_over(of_peer)
        };
        let Some(place) = place else {
            return Counted::NOWHERE;
        };
        self.places
            .insert(moved.clone(), Named { place, gone: None });
        Counted(place)
    }

    /// The place of a move that is gone and has no flows any more.
    fn take_over(&mut self, of_peer: &OfPeer) -> Option<u16> {
        let is_free = |moved: &Move| {
            let counts = of_peer.counts(self.places.get(moved)?.place.into())?;
            (counts.live.load(Relaxed) == 0).then_some(counts)
        };
        let (&at, counts) =
            (self.gone.iter()).find_map(|(at, moved)| Some((at, is_free(moved)?)))?;
        counts.by_tunnel.store(0, Relaxed);
        counts.directly.store(0, Relaxed);
        let moved = self.gone.remove(&at)?;
        Some(self.places.remove(&moved)?.place)
    }
}

impl Class {
    /// Whether such a flow is a conversation that lives.
    fn counts(self) -> bool {
        match self {
            Self::TcpEstablished
            | Self::TcpHalfClosed
            | Self::UdpAnswered
            | Self::Udp
            | Self::Other => true,
            Self::TcpOpening
            | Self::TcpClosing
            | Self::TcpReset
            | Self::UdpOneWay
            | Self::IcmpOneWay
            | Self::Icmp
            | Self::OtherOneWay => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: PeerId = PeerId(3);

    fn moves(hosts: std::ops::Range<usize>) -> Vec<Move> {
        let moved = |host: usize| format!("10.{}.{}.{}", host >> 16, host >> 8 & 255, host & 255);
        hosts.map(|host| moved(host).parse().unwrap()).collect()
    }

    #[test]
    fn a_flow_is_new_once_and_lives_until_it_ends() {
        let tallies = Tallies::new();
        let mut at = tallies.name(PEER, &moves(0..1))[0].begun();
        let tally = |at| {
            let Tally {
                live, by_tunnel, ..
            } = tallies.get(PEER, at);
            (live, by_tunnel)
        };
        let mut turn = |before, after| {
            tallies.turned(PEER, &mut at, before, after);
            tally(at)
        };
        use Class::*;
        assert_eq!(turn(TcpOpening, TcpReset), (0, 0), "refused");
        assert_eq!(turn(TcpReset, TcpOpening), (0, 0));
        assert_eq!(turn(TcpOpening, TcpEstablished), (1, 1));
        assert_eq!(turn(TcpEstablished, TcpHalfClosed), (1, 1));
        assert_eq!(turn(TcpHalfClosed, TcpEstablished), (1, 1));
        assert_eq!(turn(TcpHalfClosed, TcpClosing), (0, 1));
        assert_eq!(turn(TcpClosing, TcpOpening), (0, 1), "the same ports again");
        assert_eq!(turn(TcpOpening, TcpEstablished), (1, 2));
        tallies.ended(PEER, at, TcpEstablished);
        assert_eq!(tally(at), (0, 2));
        tallies.ended(PEER, at, TcpClosing);
        assert_eq!(tally(at), (0, 2));
        tallies.came_directly(PEER, at, 5);
        assert_eq!(tallies.get(PEER, at).directly, 5);
    }

    #[test]
    fn one_that_continues_is_no_new_conversation() {
        let tallies = Tallies::new();
        let mut at = tallies.name(PEER, &moves(0..1))[0];
        tallies.turned(PEER, &mut at, Class::TcpOpening, Class::TcpEstablished);
        let tally = tallies.get(PEER, at);
        assert_eq!((tally.live, tally.by_tunnel), (1, 0));
    }

    #[test]
    fn what_counts_nowhere_changes_nothing() {
        let tallies = Tallies::new();
        tallies.name(PEER, &moves(0..1));
        for peer in [PEER, PeerId(0), PeerId::SELF] {
            let mut at = Counted::NOWHERE.begun();
            tallies.turned(peer, &mut at, Class::TcpOpening, Class::TcpEstablished);
            tallies.came_directly(peer, at, 1);
            tallies.ended(peer, at, Class::TcpEstablished);
            assert_eq!(tallies.get(peer, at), Tally::default());
        }
        assert_eq!(tallies.name(PeerId::SELF, &moves(0..2)).len(), 2);
    }

    #[test]
    fn a_move_that_comes_back_has_what_it_had_and_others_get_the_places_of_those_gone() {
        let tallies = Tallies::new();
        let first = moves(0..2);
        let at = tallies.name(PEER, &first);
        tallies.came_directly(PEER, at[0], 1);
        tallies.turned(
            PEER,
            &mut at[1].begun(),
            Class::UdpOneWay,
            Class::UdpAnswered,
        );
        tallies.name(PEER, &[]);
        assert_eq!(tallies.name(PEER, &first), at);
        for round in 1..=4 {
            let some = moves(round * MAX_MOVES..(round + 1) * MAX_MOVES);
            let places = tallies.name(PEER, &some);
            assert!(!places.contains(&Counted::NOWHERE));
            let fresh = places
                .iter()
                .all(|&at| tallies.get(PEER, at) == Tally::default());
            assert!(fresh, "in round {round}");
        }
        let again = tallies.name(PEER, &first);
        assert_eq!(
            tallies.get(PEER, again[0]).directly,
            0,
            "it was gone for too long"
        );
        assert_eq!(again[1], at[1], "it still has a flow");
        assert_eq!(tallies.get(PEER, again[1]).live, 1);
    }
}
