//! Which peer a moved address belongs to.
//!
//! On the new server several old servers may name the same address, or overlapping ports of it. The
//! first to name it has it for as long as it names it; the others are refused until then. What
//! other reasons there are to refuse a move is asked for ([`Judge`]), and such a move is nobody's.
//! On the old server the settings say what moved to whom, and nothing is refused.
//!
//! Owns the list of what is served for each peer. It never serves one packet for two of them.

use std::collections::HashSet;
use std::sync::Arc;

use super::refusal::{Refusal, Why};
use crate::daemon::index;
use crate::model::moved::Move;
use crate::model::peer::{PeerId, Role};
use crate::model::scopes;

/// Why a peer's move is not served, whatever the others have.
pub(super) type Judge<'a> = &'a dyn Fn(PeerId, &Move) -> Option<Why>;

/// For each peer, the moves that are served and those that were refused.
#[derive(Debug)]
pub(super) struct Claims(Vec<Claim>);

#[derive(Debug)]
struct Claim {
    /// What it has announced; `None` before that. Moves that it does not name are withdrawn.
    named: Option<Vec<Move>>,
    served: Arc<[Move]>,
    refused: Vec<Refusal>,
}

/// Changes that were made for one peer.
#[derive(Debug)]
pub(super) struct Settled {
    pub(super) peer: PeerId,
    /// What is served for it now, if that is not what was.
    pub(super) served: Option<Arc<[Move]>>,
    /// Other moves than before are refused, or for other reasons.
    pub(super) refusals_changed: bool,
    /// Moves that were refused now.
    pub(super) refused: usize,
}

impl Claims {
    /// Takes the old server's moves from the settings; on the new server there are none yet.
    pub(super) fn new(moves: Vec<Vec<Move>>) -> Self {
        let claim = |served: Vec<Move>| Claim {
            named: None,
            served: served.into(),
            refused: Vec::new(),
        };
        Self(moves.into_iter().map(claim).collect())
    }

    /// There is one more peer, or another one in a place that is free. On the old server these are
    /// its moves.
    pub(super) fn begin(&mut self, peer: PeerId, served: Vec<Move>) {
        let claim = Claim {
            named: None,
            served: served.into(),
            refused: Vec::new(),
        };
        match self.0.get_mut(index(peer)) {
            Some(place) => *place = claim,
            None => self.0.push(claim),
        }
    }

    /// On the old server: these are a peer's moves from now on.
    pub(super) fn set_moves(&mut self, role: Role, peer: PeerId, moves: Vec<Move>) {
        if role == Role::Old {
            self.0[index(peer)].served = moves.into();
        }
    }

    /// `peer` has moved this here, in place of what it had named before.
    ///
    /// The first result is that of `peer`. Then come those of peers that had been refused
    /// something, which may be free now. Carry them out in this order.
    pub(super) fn announce(
        &mut self,
        peer: PeerId,
        moves: Vec<Move>,
        judge: Judge<'_>,
    ) -> Vec<Settled> {
        let claim = &mut self.0[index(peer)];
        claim.named = Some(moves);
        let before = std::mem::take(&mut claim.refused);
        let mut first = self.settle(peer, judge);
        first.refusals_changed = self.0[index(peer)].refused != before;
        let mut settled = vec![first];
        settled.extend(self.give_what_is_free(Some(peer), judge));
        settled
    }

    /// Judges the moves of one peer, or of all (`None`), anew, since other reasons to refuse some
    /// may count now. What was served and must not be any more is withdrawn. Carry the results out
    /// in this order.
    pub(super) fn judge_again(&mut self, whose: Option<PeerId>, judge: Judge<'_>) -> Vec<Settled> {
        let everybody = (0..self.0.len() as u16).map(PeerId);
        let meant = everybody.filter(|&peer| whose.is_none_or(|only| only == peer));
        let mut settled: Vec<Settled> = meant.map(|peer| self.settle(peer, judge)).collect();
        settled.extend(self.give_what_is_free(None, judge));
        settled.retain(|it| it.served.is_some() || it.refusals_changed);
        settled
    }

    /// Whether the peer has announced its moves.
    pub(super) fn has_announced(&self, peer: PeerId) -> bool {
        self.0[index(peer)].named.is_some()
    }

    /// The moves that are served for the peer.
    pub(super) fn served(&self, peer: PeerId) -> &Arc<[Move]> {
        &self.0[index(peer)].served
    }

    /// The moves that are not served for the peer.
    pub(super) fn refused(&self, peer: PeerId) -> &[Refusal] {
        &self.0[index(peer)].refused
    }

    /// Settles those once more that wanted what another peer had.
    fn give_what_is_free(&mut self, except: Option<PeerId>, judge: Judge<'_>) -> Vec<Settled> {
        let waits = |claim: &Claim| claim.refused.iter().any(|it| it.why == Why::Taken);
        let mut settled = Vec::new();
        for peer in (0..self.0.len() as u16).map(PeerId) {
            if Some(peer) != except && waits(&self.0[index(peer)]) {
                settled.push(self.settle(peer, judge));
            }
        }
        settled
    }

    fn settle(&mut self, peer: PeerId, judge: Judge<'_>) -> Settled {
        let others = || {
            let all = self.0.iter().enumerate();
            let others = all.filter(|&(at, _)| at != index(peer));
            others.flat_map(|(_, other)| other.served.iter())
        };
        let claim = &self.0[index(peer)];
        // Before the first announcement the settings count, if there are any.
        let Some(named) = &claim.named else {
            return Settled {
                peer,
                served: None,
                refusals_changed: false,
                refused: 0,
            };
        };
        let (mut served, mut refused) = (Vec::new(), Vec::new());
        let taken = scopes::overlapping(named.iter(), others());
        for (moved, taken) in named.iter().cloned().zip(taken) {
            match judge(peer, &moved).or(taken.then_some(Why::Taken)) {
                None => served.push(moved),
                Some(why) => refused.push(Refusal { moved, why }),
            }
        }
        let known: HashSet<&Refusal> = claim.refused.iter().collect();
        let news = refused.iter().filter(|it| !known.contains(it));
        let settled = Settled {
            peer,
            served: (*claim.served != *served).then(|| served.into()),
            refusals_changed: refused != claim.refused,
            refused: news.count(),
        };
        let claim = &mut self.0[index(peer)];
        claim.served = settled.served.clone().unwrap_or(Arc::clone(&claim.served));
        claim.refused = refused;
        settled
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

    /// Nothing but other peers' moves speaks against a move.
    const ANYTHING: Judge<'_> = &|_, _| None;

    fn refused(claims: &Claims, peer: PeerId) -> Vec<Move> {
        let refused = claims.refused(peer).iter();
        refused.map(|refusal| refusal.moved.clone()).collect()
    }

    #[test]
    fn the_first_to_name_an_address_has_it_until_it_does_not() {
        let mut claims = claims();
        claims.announce(PeerId(0), moves(&["192.0.2.5", "192.0.2.6:80"]), ANYTHING);
        let late = ["192.0.2.5:25", "192.0.2.6:443", "192.0.2.7"];
        let settled = claims.announce(PeerId(1), moves(&late), ANYTHING);
        assert_eq!(settled.len(), 1);
        assert_eq!(refused(&claims, PeerId(1)), moves(&["192.0.2.5:25"]));
        assert_eq!((settled[0].refused, settled[0].refusals_changed), (1, true));
        assert_eq!(
            **claims.served(PeerId(1)),
            moves(&["192.0.2.6:443", "192.0.2.7"])
        );
        // The first lets go of it: now the second has it.
        let settled = claims.announce(PeerId(0), moves(&["192.0.2.6:80"]), ANYTHING);
        assert_eq!(settled[1].peer, PeerId(1));
        assert_eq!(settled[1].served.as_deref(), Some(&*moves(&late)));
        assert_eq!(**claims.served(PeerId(1)), moves(&late));
        assert!(claims.refused(PeerId(1)).is_empty());
    }

    #[test]
    fn naming_the_same_again_changes_nothing() {
        let mut claims = claims();
        claims.announce(PeerId(0), moves(&["192.0.2.5"]), ANYTHING);
        for (round, news) in [(0, true), (1, false), (2, false)] {
            let settled = claims.announce(PeerId(1), moves(&["192.0.2.5"]), ANYTHING);
            assert_eq!(settled[0].refusals_changed, news, "round {round}");
            assert_eq!(settled[0].refused, 1, "each time is counted");
            assert!(settled[0].served.is_none());
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
            claims.announce(PeerId(2), moves(&[first]), ANYTHING);
            claims.announce(PeerId(0), moves(&[second]), ANYTHING);
            assert_eq!(
                !claims.served(PeerId(0)).is_empty(),
                both,
                "{first} {second}"
            );
        }
    }

    #[test]
    fn what_becomes_forbidden_is_withdrawn_before_another_peer_has_it() {
        let mut claims = claims();
        claims.announce(PeerId(2), moves(&["192.0.2.5", "192.0.2.6"]), ANYTHING);
        claims.announce(PeerId(0), moves(&["192.0.2.5:80"]), ANYTHING);
        let gateway = Why::Needed(super::super::refusal::Need::Gateway);
        // Only the third peer must not have it any more.
        let judge: Judge<'_> = &|peer, moved| {
            let forbidden = peer == PeerId(2)
                && moved.prefix.first() == moves(&["192.0.2.5"])[0].prefix.first();
            forbidden.then_some(gateway)
        };
        let settled = claims.judge_again(None, judge);
        let order: Vec<(u16, Vec<Move>)> = settled
            .iter()
            .map(|it| (it.peer.0, it.served.as_deref().unwrap().to_vec()))
            .collect();
        let expected = [(2, moves(&["192.0.2.6"])), (0, moves(&["192.0.2.5:80"]))];
        assert_eq!(order, expected);
        assert_eq!(settled[0].refused, 1);
        assert_eq!(claims.refused(PeerId(2))[0].why, gateway);
        assert!(
            claims.judge_again(None, judge).is_empty(),
            "that is no news"
        );
        // It is allowed again, but now another peer has it.
        claims.judge_again(None, ANYTHING);
        assert_eq!(claims.refused(PeerId(2))[0].why, Why::Taken);
        assert_eq!(refused(&claims, PeerId(2)), moves(&["192.0.2.5"]));
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
            forbidden in proptest::collection::vec((0..PEERS as u16, any_move()), 0..5),
        ) {
            let is_forbidden = |peer: PeerId, moved: &Move| {
                forbidden.iter().any(|(of, it)| *of == peer.0 && it.overlaps(moved))
            };
            let judge: Judge<'_> = &|peer, moved| {
                is_forbidden(peer, moved).then_some(Why::NotAccepted)
            };
            let mut claims = claims();
            let mut named = vec![Vec::new(); PEERS];
            for (peer, moves) in announcements {
                named[usize::from(peer)] = moves.clone();
                claims.announce(PeerId(peer), moves, judge);
                for one in (0..PEERS as u16).map(PeerId) {
                    let others = || (0..PEERS as u16).map(PeerId).filter(|&other| other != one);
                    let served_for_others = |moved: &Move| {
                        let mut served = others().flat_map(|other| claims.served(other).iter());
                        served.any(|other| other.overlaps(moved))
                    };
                    prop_assert!(!claims.served(one).iter().any(served_for_others));
                    // A withdrawn move is free for others, so a refused one is in use.
                    let for_a_reason = |moved: &Move| {
                        is_forbidden(one, moved) || served_for_others(moved)
                    };
                    prop_assert!(refused(&claims, one).iter().all(for_a_reason));
                    prop_assert!(!claims.served(one).iter().any(|it| is_forbidden(one, it)));
                    // Nothing is lost and nothing made up.
                    let key = |moved: &Move| moved.to_string();
                    let refused = refused(&claims, one);
                    let both = claims.served(one).iter().chain(&refused);
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
