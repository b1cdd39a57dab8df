//! How far each move has come is looked at, told to the old server, and kept there.
//!
//! ```text
//!          new server                                            old server
//! who listens, by asking the kernel ──┐
//! flows of each move ─────────────────┼──► Tunnel ════► Tunnel ──► Heard ──► status
//! who comes directly, from programs ──┘
//! ```
//!
//! Owns when that is looked at and what a look may cost. What follows from it is
//! [`policy::progress`](super::policy::progress)'s.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::index;
use super::policy::progress::{Arrivals, Heard, ends, listens};
use crate::channel::tunnel::MoveName;
use crate::flow::translate::Translator;
use crate::kernel::look;
use crate::kernel::steer::Steering;
use crate::model::moved::Move;
use crate::model::peer::{PeerId, Role};
use crate::model::progress::{Listens, Progress};
use crate::model::status::ProgressOf;

/// How often is looked: whoever holds clients back on the old server until something listens here
/// knows it within a second.
const EVERY: Duration = Duration::from_millis(500);

/// Who comes directly is counted so often: nobody waits for it.
const COUNT_EVERY: Duration = Duration::from_secs(1);

/// Most times that the kernel is asked in one look who listens. It takes a microsecond or two each;
/// of more ends each is looked at by turns.
const MAX_ASKED: usize = 512;

/// Of all peers, how far their moves have come.
pub(super) struct Progresses {
    role: Role,
    next: Instant,
    next_count: Instant,
    arrivals: Arrivals,
    peers: Vec<OfPeer>,
    /// The peer whose moves are looked at first.
    first: usize,
}

struct OfPeer {
    moves: Arc<[Move]>,
    names: Vec<MoveName>,
    listens: Vec<Listens>,
    /// The move that is looked at next.
    turn: usize,
    /// As it was told last (new server).
    told: Vec<Progress>,
    /// As it was heard (old server).
    heard: Heard,
}

impl OfPeer {
    fn new() -> Self {
        Self {
            moves: Arc::new([]),
            names: Vec::new(),
            listens: Vec::new(),
            turn: 0,
            told: Vec::new(),
            heard: Heard::new(),
        }
    }
}

impl Progresses {
    /// There is one more peer, or another one in the place of one that is gone.
    pub(super) fn begin(&mut self, peer: PeerId) {
        match self.peers.get_mut(index(peer)) {
            Some(place) => *place = OfPeer::new(),
            None => self.peers.push(OfPeer::new()),
        }
    }

    /// Of so many peers.
    pub(super) fn new(role: Role, peers: usize, now: Instant) -> Self {
        Self {
            role,
            next: now,
            next_count: now,
            arrivals: Arrivals::default(),
            peers: (0..peers).map(|_| OfPeer::new()).collect(),
            first: 0,
        }
    }

    /// When to look next, on the new server.
    pub(super) fn next(&self) -> Option<Instant> {
        (self.role == Role::New).then_some(self.next)
    }

    /// Looks at what the peers have moved here, if it is time. Returns what to tell each of them.
    pub(super) fn look(
        &mut self,
        now: Instant,
        steering: &Steering,
        links: &[u32],
        translator: &Translator,
        of_peers: &[&Arc<[Move]>],
    ) -> Vec<Vec<(MoveName, Progress)>> {
        self.next = now + EVERY;
        if now >= self.next_count {
            self.next_count = now + COUNT_EVERY;
            // What the kernel does not tell is told the next time.
            let counts = steering.came_directly().unwrap_or_default();
            for (protocol, end, new) in self.arrivals.take(counts) {
                translator.came_directly(protocol, end, new);
            }
        }
        let forwards = [false, true].map(|v4| look::forwards(v4).unwrap_or(false));
        let mut left = MAX_ASKED;
        let peers = self.peers.len();
        for step in 0..peers {
            let at = (self.first + step) % peers;
            let delivered = |asked: &_| translator.delivered(PeerId(at as u16), asked);
            let found = |protocol, end| steering.listens(protocol, end, links);
            let forwards = |v4: bool| forwards[usize::from(v4)];
            let of_peer = &mut self.peers[at];
            of_peer.set_moves(of_peers[at]);
            of_peer.look(&mut left, delivered, found, forwards);
        }
        self.first = (self.first + 1) % peers.max(1);
        let each = (0..).map(PeerId).zip(&mut self.peers);
        each.map(|(peer, of_peer)| of_peer.tell(translator.tallies(peer).into_iter()))
            .collect()
    }

    /// The new server has said this.
    pub(super) fn heard(
        &mut self,
        peer: PeerId,
        moves: &Arc<[Move]>,
        run: u64,
        said: Vec<(MoveName, Progress)>,
    ) {
        if self.role == Role::Old {
            self.peers[index(peer)].heard.take(moves, run, said);
        }
    }

    /// The peer is not there.
    pub(super) fn lost(&mut self, peer: PeerId) {
        self.peers[index(peer)].heard.lost();
    }

    /// For the status.
    pub(super) fn of(&self, peer: PeerId) -> Vec<ProgressOf> {
        let of_peer = &self.peers[index(peer)];
        let shown = |(moved, progress): (&Move, Progress)| ProgressOf {
            what: moved.to_string(),
            progress,
        };
        match self.role {
            Role::Old => of_peer.heard.all().map(shown).collect(),
            Role::New => {
                let told = of_peer.told.iter().copied();
                of_peer.moves.iter().zip(told).map(shown).collect()
            }
        }
    }
}

impl OfPeer {
    fn set_moves(&mut self, moves: &Arc<[Move]>) {
        if !Arc::ptr_eq(&self.moves, moves) {
            self.moves = Arc::clone(moves);
            self.names = moves.iter().map(MoveName::of).collect();
            self.listens = vec![Listens::Unknown; moves.len()];
            self.turn = 0;
        }
    }

    /// Looks who listens for as many moves as `left` allows, from where the last look ended.
    fn look(
        &mut self,
        left: &mut usize,
        delivered: impl Fn(&crate::model::asked::Asked) -> Option<SocketAddr>,
        mut found: impl FnMut(u8, SocketAddr) -> Option<bool>,
        forwards: impl Fn(bool) -> bool,
    ) {
        let count = self.moves.len();
        for step in 0..count {
            let at = (self.turn + step) % count;
            let ends = ends(&self.moves[at], &delivered);
            let cost = ends.iter().flatten().map(Vec::len).sum::<usize>().max(1);
            if cost > *left {
                self.turn = at;
                return;
            }
            *left -= cost;
            self.listens[at] = listens(ends.as_deref(), &mut found, &forwards);
        }
    }

    /// Puts together what to tell.
    fn tell(
        &mut self,
        tallies: impl Iterator<Item = crate::flow::tally::Tally>,
    ) -> Vec<(MoveName, Progress)> {
        let each = tallies
            .zip(&self.listens)
            .map(|(tally, &listens)| Progress {
                listens,
                live: tally.live,
                by_tunnel: tally.by_tunnel,
                directly: tally.directly,
            });
        self.told = each.collect();
        let told = self.told.iter().copied();
        self.names.iter().copied().zip(told).collect()
    }
}
