//! Which peer a moved address belongs to.
//!
//! On the new server several old servers may name the same address, or overlapping ports of it. The
//! first to name it has it for as long as it names it; the others are refused until then. On the
//! old server the settings say what moved to whom, and nothing is refused.
//!
//! Owns the list of what is served for each peer. It never serves one packet for two of them.

use std::sync::Arc;

use crate::daemon::index;
use crate::model::moved::Move;
use crate::model::peer::PeerId;

/// For each peer, the moves that are served and those that were refused.
#[derive(Debug)]
pub(super) struct Claims(Vec<Claim>);

#[derive(Debug)]
struct Claim {
    /// It has announced what it moved, so moves that it does not name are withdrawn.
    announced: bool,
    served: Arc<[Move]>,
    /// Moves that it named although another peer had them.
    refused: Vec<Move>,
}

/// Changes that an announcement made for one peer.
#[derive(Debug)]
pub(super) struct Settled {
    pub(super) peer: PeerId,
    /// Other moves than before are served for it.
    pub(super) served_changed: bool,
    /// Moves that were not refused before and are now.
    pub(super) refused: Vec<Move>,
}

impl Claims {
    /// Takes the old server's moves from the settings; on the new server there are none yet.
    pub(super) fn new(moves: Vec<Vec<Move>>) -> Self {
        let claim = |served: Vec<Move>| Claim {
            announced: false,
            served: served.into(),
            refused: Vec::new(),
        };
        Self(moves.into_iter().map(claim).collect())
    }

    /// `peer` has moved this here, in place of what it had named before.
    ///
    /// The first result is that of `peer`. Then come those of peers that had been refused
    /// something, which may be free now.
    pub(super) fn announce(&mut self, peer: PeerId, moves: Vec<Move>) -> Vec<Settled> {
        self.0[index(peer)].announced = true;
        let mut settled = vec![self.settle(peer, moves)];
        for other in (0..self.0.len() as u16).map(PeerId) {
            let claim = &self.0[index(other)];
            if other != peer && !claim.refused.is_empty() {
                let named = claim.served.iter().chain(&claim.refused);
                settled.push(self.settle(other, named.cloned().collect()));
            }
        }
        settled
    }

    /// Whether the peer has announced its moves.
    pub(super) fn has_announced(&self, peer: PeerId) -> bool {
        self.0[index(peer)].announced
    }

    /// The moves that are served for the peer.
    pub(super) fn served(&self, peer: PeerId) -> &Arc<[Move]> {
        &self.0[index(peer)].served
    }

    /// The moves that are not served for the peer, because another peer has them.
    pub(super) fn refused(&self, peer: PeerId) -> &[Move] {
        &self.0[index(peer)].refused
    }

    /// The moves that are served for any peer.
    pub(super) fn all(&self) -> impl Iterator<Item = &Move> + Clone {
        self.0.iter().flat_map(|claim| claim.served.iter())
    }

    fn settle(&mut self, peer: PeerId, moves: Vec<Move>) -> Settled {
        let is_free = |moved: &Move| {
            let others = self.0.iter().enumerate();
            others
                .filter(|&(at, _)| at != index(peer))
                .flat_map(|(_, other)| other.served.iter())
                .all(|other| !other.overlaps(moved))
        };
        let (served, refused): (Vec<Move>, Vec<Move>) = moves.into_iter().partition(is_free);
        let claim = &mut self.0[index(peer)];
        let served_changed = *claim.served != *served;
        if served_changed {
            claim.served = served.into();
        }
        let news = if refused == claim.refused {
            Vec::new()
        } else {
            refused.clone()
        };
        claim.refused = refused;
        Settled {
            peer,
            served_changed,
            refused: news,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PEERS: usize = 3;

    fn moves(names: &[&str]) -> Vec<Move> {
        names.iter().map(|name| name.parse().unwrap()).collect()
    }

    fn claims() -> Claims {
        Claims::new(vec![Vec::new(); PEERS])
    }

    #[test]
    fn the_first_to_name_an_address_has_it_until_it_does_not() {
        let mut claims = claims();
        claims.announce(PeerId(0), moves(&["192.0.2.5", "192.0.2.6:80"]));
        let late = ["192.0.2.5:25", "192.0.2.6:443", "192.0.2.7"];
        let settled = claims.announce(PeerId(1), moves(&late));
        assert_eq!(settled.len(), 1);
        assert_eq!(settled[0].refused, moves(&["192.0.2.5:25"]));
        assert_eq!(
            **claims.served(PeerId(1)),
            moves(&["192.0.2.6:443", "192.0.2.7"])
        );
        // The first lets go of it: now the second has it.
        let settled = claims.announce(PeerId(0), moves(&["192.0.2.6:80"]));
        assert_eq!(settled[1].peer, PeerId(1));
        assert!(settled[1].served_changed && settled[1].refused.is_empty());
        assert!(
            claims
                .served(PeerId(1))
                .contains(&moves(&["192.0.2.5:25"])[0])
        );
        assert!(claims.refused(PeerId(1)).is_empty());
    }

    #[test]
    fn naming_the_same_again_changes_nothing() {
        let mut claims = claims();
        claims.announce(PeerId(0), moves(&["192.0.2.5"]));
        for (round, news) in [(0, 1), (1, 0), (2, 0)] {
            let settled = claims.announce(PeerId(1), moves(&["192.0.2.5"]));
            assert_eq!(settled[0].refused.len(), news, "round {round}");
            assert!(!settled[0].served_changed);
        }
    }

    #[test]
    fn two_peers_are_both_served_only_disjoint_moves() {
        for (first, second, both) in [
            ("192.0.2.5", "192.0.2.5", false),
            ("192.0.2.5", "192.0.2.5:80/tcp", false),
            ("192.0.2.5:53/udp", "192.0.2.5:53", false),
            ("192.0.2.5:80-90", "192.0.2.5:90-99", false),
            ("192.0.2.5:53/udp", "192.0.2.5:53/tcp", true),
            ("192.0.2.5:80-90", "192.0.2.5:91-99", true),
            ("192.0.2.5", "192.0.2.6", true),
            ("192.0.2.5", "2001:db8::5", true),
        ] {
            let mut claims = claims();
            claims.announce(PeerId(2), moves(&[first]));
            claims.announce(PeerId(0), moves(&[second]));
            assert_eq!(
                !claims.served(PeerId(0)).is_empty(),
                both,
                "{first} {second}"
            );
        }
    }

    fn any_move() -> impl Strategy<Value = Move> {
        let addr = prop_oneof![Just("192.0.2.5"), Just("192.0.2.6"), Just("[2001:db8::5]")];
        let ports = prop_oneof![Just(""), Just(":80"), Just(":80-90"), Just(":85,443")];
        let transport = prop_oneof![Just(""), Just("/tcp"), Just("/udp")];
        (addr, ports, transport).prop_map(|(addr, ports, transport)| {
            format!("{addr}{ports}{transport}").parse().unwrap()
        })
    }

    fn any_announcement() -> impl Strategy<Value = (u16, Vec<Move>)> {
        let moves = proptest::collection::vec(any_move(), 0..5);
        (0..PEERS as u16, moves)
    }

    proptest! {
        #[test]
        fn no_sequence_of_announcements_serves_a_packet_for_two_peers(
            announcements in proptest::collection::vec(any_announcement(), 1..30),
        ) {
            let mut claims = claims();
            let mut named = vec![Vec::new(); PEERS];
            for (peer, moves) in announcements {
                named[usize::from(peer)] = moves.clone();
                claims.announce(PeerId(peer), moves);
                for one in (0..PEERS as u16).map(PeerId) {
                    let others = || (0..PEERS as u16).map(PeerId).filter(|&other| other != one);
                    let served_for_others = |moved: &Move| {
                        let mut served = others().flat_map(|other| claims.served(other).iter());
                        served.any(|other| other.overlaps(moved))
                    };
                    prop_assert!(!claims.served(one).iter().any(served_for_others));
                    // A withdrawn move is free for others, so a refused one is in use.
                    prop_assert!(claims.refused(one).iter().all(served_for_others));
                    // Nothing is lost and nothing made up.
                    let key = |moved: &Move| moved.to_string();
                    let both = claims.served(one).iter().chain(claims.refused(one));
                    let mut known: Vec<String> = both.map(key).collect();
                    let mut said: Vec<String> = named[index(one)].iter().map(key).collect();
                    known.sort_unstable();
                    said.sort_unstable();
                    prop_assert_eq!(known, said);
                }
            }
        }
    }
}
