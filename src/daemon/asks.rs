//! While a cut-over runs, the old server asks the new one whether something listens where the ports
//! of the old service are delivered.
//!
//! ```text
//!      old server                                          new server
//! a command names ports ──► Asks ──► Tunnel ════► Tunnel ──► Asks: asks the kernel
//!        status ◄────────── Asks ◄── Tunnel ◄════ Tunnel ◄────┘
//! ```
//!
//! Where single ports have moved, the new server tells that by itself
//! ([`progress`](super::progress)). Of a whole address only the old server knows what is served
//! there. Owns who wants to know what, when that is asked, and what was told.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::index;
use crate::channel::tunnel::MAX_ASKS;
use crate::model::asked::{Asked, Found};
use crate::model::peer::PeerId;
use crate::model::status::LookedFor;

/// How often the peer is asked: whoever holds clients back until something listens there knows it
/// within a second.
const EVERY: Duration = Duration::from_millis(500);

/// Questions of a peer that come sooner after the last ones are not answered. It asks again.
const PACE: Duration = Duration::from_millis(100);

/// What is asked of all peers, and by them.
pub(super) struct Asks {
    next: Instant,
    peers: Vec<OfPeer>,
}

#[derive(Clone, Default)]
struct OfPeer {
    /// What is to be known, and which connection of the control socket wants to know it.
    wanted: Vec<(u64, Asked)>,
    /// What was told of that.
    told: BTreeMap<Asked, Found>,
    /// When the peer was answered last.
    answered: Option<Instant>,
}

impl Asks {
    /// Of so many peers.
    pub(super) fn new(peers: usize, now: Instant) -> Self {
        Self {
            next: now,
            peers: vec![OfPeer::default(); peers],
        }
    }

    /// A peer begins, or is gone: nothing is asked of it.
    pub(super) fn begin(&mut self, peer: PeerId) {
        let place = index(peer);
        self.peers
            .resize(self.peers.len().max(place + 1), OfPeer::default());
        self.peers[place] = OfPeer::default();
    }

    // The old server.

    /// A connection wants to know this of a peer. Beyond [`MAX_ASKS`] nobody can tell.
    pub(super) fn want(&mut self, now: Instant, connection: u64, peer: PeerId, asked: Asked) {
        let wanted = &mut self.peers[index(peer)].wanted;
        if wanted.len() < MAX_ASKS {
            wanted.push((connection, asked));
            self.next = now;
        }
    }

    /// A connection is over.
    pub(super) fn gone(&mut self, connection: u64) {
        for of_peer in &mut self.peers {
            of_peer.wanted.retain(|(of, _)| *of != connection);
            let OfPeer { wanted, told, .. } = of_peer;
            told.retain(|asked, _| wanted.iter().any(|(_, it)| it == asked));
        }
    }

    /// When to ask next, if anything is to be known.
    pub(super) fn next(&self) -> Option<Instant> {
        let some = self.peers.iter().any(|it| !it.wanted.is_empty());
        some.then_some(self.next)
    }

    /// What to ask of each peer now, in their order.
    pub(super) fn take(&mut self, now: Instant) -> Vec<Vec<Asked>> {
        self.next = now + EVERY;
        let of = |it: &OfPeer| it.wanted.iter().map(|(_, asked)| *asked).collect();
        self.peers.iter().map(of).collect()
    }

    /// A peer has told this.
    pub(super) fn told(&mut self, peer: PeerId, said: Vec<(Asked, Found)>) {
        let OfPeer { wanted, told, .. } = &mut self.peers[index(peer)];
        let is_wanted = |asked: &Asked| wanted.iter().any(|(_, it)| it == asked);
        told.extend(said.into_iter().filter(|(asked, _)| is_wanted(asked)));
    }

    /// A peer is not there: what listens there now, nobody knows.
    pub(super) fn lost(&mut self, peer: PeerId) {
        self.peers[index(peer)].told.clear();
    }

    /// For the status.
    pub(super) fn of(&self, peer: PeerId) -> Vec<LookedFor> {
        let OfPeer { wanted, told, .. } = &self.peers[index(peer)];
        let of = |(_, asked): &(u64, Asked)| LookedFor {
            what: asked.to_string(),
            listens: told.get(asked).copied().unwrap_or_default(),
        };
        wanted.iter().map(of).collect()
    }

    // The new server.

    /// Answers a peer, unless it was just answered. `delivered` says where something is delivered,
    /// `listens` whether something does there, and `forwards` whether this host forwards packets of
    /// a family (IPv4: true), so that a container may answer.
    pub(super) fn answer(
        &mut self,
        now: Instant,
        peer: PeerId,
        asks: Vec<Asked>,
        delivered: impl Fn(&Asked) -> Option<SocketAddr>,
        listens: impl Fn(u8, SocketAddr) -> Option<bool>,
        forwards: impl Fn(bool) -> bool,
    ) -> Vec<(Asked, Found)> {
        let answered = &mut self.peers[index(peer)].answered;
        if answered.is_some_and(|at| now.saturating_duration_since(at) < PACE) {
            return Vec::new();
        }
        *answered = Some(now);
        let found = |asked: &Asked| {
            let Some(end) = delivered(asked) else {
                return Found::Unknown;
            };
            match listens(asked.protocol, end) {
                None => Found::Unknown,
                Some(true) => Found::Yes,
                Some(false) if forwards(end.is_ipv4()) => Found::Perhaps,
                Some(false) => Found::No,
            }
        };
        let told = asks.into_iter().map(|asked| (asked, found(&asked)));
        told.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::moved::{TCP, UDP};

    const PEER: PeerId = PeerId(0);

    fn asked(port: u16) -> Asked {
        Asked {
            addr: "192.0.2.5".parse().unwrap(),
            protocol: TCP,
            port,
        }
    }

    #[test]
    fn what_is_wanted_is_asked_until_it_is_not() {
        let start = Instant::now();
        let mut asks = Asks::new(2, start);
        assert_eq!(asks.next(), None);
        asks.want(start, 1, PEER, asked(80));
        asks.want(start, 2, PEER, asked(81));
        assert_eq!(asks.next(), Some(start));
        let both = vec![asked(80), asked(81)];
        assert_eq!(asks.take(start), [both, Vec::new()]);
        assert_eq!(asks.next(), Some(start + EVERY));
        asks.told(PEER, vec![(asked(80), Found::Yes), (asked(22), Found::Yes)]);
        let of =
            |asks: &Asks| -> Vec<Found> { asks.of(PEER).iter().map(|it| it.listens).collect() };
        assert_eq!(of(&asks), [Found::Yes, Found::Unknown]);
        asks.lost(PEER);
        assert_eq!(of(&asks), [Found::Unknown; 2]);
        asks.gone(1);
        assert_eq!(of(&asks), [Found::Unknown]);
        asks.gone(2);
        assert_eq!(asks.next(), None);
        for port in 0..100 {
            asks.want(start, 3, PEER, asked(port));
        }
        assert_eq!(asks.of(PEER).len(), MAX_ASKS);
    }

    #[test]
    fn it_is_told_whether_something_listens_and_not_too_often() {
        let now = Instant::now();
        let mut asks = Asks::new(1, now);
        let mut answer = |now, forwarding| {
            let delivered = |asked: &Asked| {
                let to = SocketAddr::new("198.51.100.2".parse().unwrap(), asked.port);
                (asked.port != 1).then_some(to)
            };
            let listens = |protocol, end: SocketAddr| match end.port() {
                80 => Some(protocol == TCP),
                2 => None,
                _ => Some(false),
            };
            let udp = Asked {
                protocol: UDP,
                ..asked(80)
            };
            let all = vec![asked(80), udp, asked(1), asked(2)];
            let told = asks.answer(now, PEER, all, delivered, listens, |_| forwarding);
            told.into_iter().map(|(_, found)| found).collect::<Vec<_>>()
        };
        let unknown = Found::Unknown;
        assert_eq!(
            answer(now, false),
            [Found::Yes, Found::No, unknown, unknown]
        );
        assert_eq!(answer(now + PACE / 2, false), []);
        let perhaps = [Found::Yes, Found::Perhaps, unknown, unknown];
        assert_eq!(answer(now + PACE, true), perhaps);
    }
}
