//! Which mode each move is in, as the old servers say: what the new one serves as yet, and what is
//! still served there.
//!
//! Owns what was heard. An old server that says nothing has moved everything.

use std::collections::HashMap;

use super::index;
use crate::channel::tunnel::{MoveName, PeerModes};
use crate::model::mode::Told;
use crate::model::moved::{MAX_MOVES, Move};
use crate::model::peer::PeerId;
use crate::model::status::PeerMode;

/// What all old servers have said.
pub(super) struct TheirModes(Vec<OfPeer>);

#[derive(Clone, Default)]
struct OfPeer {
    /// The run of the peer that has said it.
    run: Option<u64>,
    /// Of what is not named.
    all: Told,
    some: HashMap<MoveName, Told>,
}

impl TheirModes {
    /// Nothing was heard yet, of so many peers.
    pub(super) fn new(peers: usize) -> Self {
        Self(vec![OfPeer::default(); peers])
    }

    /// A peer begins, or is gone: nothing was heard of it.
    pub(super) fn begin(&mut self, peer: PeerId) {
        let place = index(peer);
        self.0
            .resize(self.0.len().max(place + 1), OfPeer::default());
        self.0[place] = OfPeer::default();
    }

    /// An old server has said this. Returns whether it is news.
    pub(super) fn hear(&mut self, peer: PeerId, run: u64, modes: PeerModes) -> bool {
        let of_peer = &mut self.0[index(peer)];
        // Another run begins with other moves; until it has named all, what was said stands.
        let (mut all, mut some) = (of_peer.all, std::mem::take(&mut of_peer.some));
        match modes {
            PeerModes::All(told) => {
                let same = all == told && some.is_empty();
                *of_peer = OfPeer {
                    run: Some(run),
                    all: told,
                    some: HashMap::new(),
                };
                !same
            }
            PeerModes::Some(told) => {
                // More than there can be: those of earlier settings are among them.
                if some.len() + told.len() > 2 * MAX_MOVES {
                    some.clear();
                }
                let mut news = false;
                if of_peer.run != Some(run) {
                    all = Told::default();
                }
                for (name, told) in told {
                    news |= some.insert(name, told) != Some(told);
                }
                *of_peer = OfPeer {
                    run: Some(run),
                    all,
                    some,
                };
                news
            }
        }
    }

    /// The mode of a move.
    pub(super) fn of(&self, peer: PeerId, moved: &Move) -> Told {
        let OfPeer { all, some, .. } = &self.0[index(peer)];
        match some.is_empty() {
            true => *all,
            false => some.get(&MoveName::of(moved)).copied().unwrap_or(*all),
        }
    }

    /// For the status: of each move that is not in the mode `moved`.
    pub(super) fn status(&self, peer: PeerId, moves: &[Move]) -> Vec<PeerMode> {
        let told = moves.iter().map(|moved| (moved, self.of(peer, moved)));
        told.filter(|(_, told)| *told != Told::default())
            .map(|(moved, told)| PeerMode {
                what: moved.to_string(),
                mode: told.name().into(),
                percent: match told {
                    Told::Percent(percent) => Some(percent),
                    Told::Held => None,
                },
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: PeerId = PeerId(0);
    const HERE: Told = Told::Percent(0);

    #[test]
    fn what_was_said_last_counts() {
        let moves: [Move; 2] = ["192.0.2.5:80/tcp", "192.0.2.6"].map(|it| it.parse().unwrap());
        let [one, other] = [0, 1].map(|at: usize| MoveName::of(&moves[at]));
        let mut modes = TheirModes::new(1);
        let of = |modes: &TheirModes| [0, 1].map(|at: usize| modes.of(PEER, &moves[at]));
        assert_eq!(of(&modes), [Told::default(); 2]);
        assert!(modes.hear(PEER, 1, PeerModes::All(HERE)));
        assert!(!modes.hear(PEER, 1, PeerModes::All(HERE)), "no news");
        assert_eq!(of(&modes), [HERE; 2]);
        let held = PeerModes::Some(vec![(other, Told::Held)]);
        assert!(modes.hear(PEER, 1, held.clone()));
        assert!(!modes.hear(PEER, 1, held.clone()));
        assert_eq!(of(&modes), [HERE, Told::Held]);
        // Another run that names its moves has others.
        assert!(modes.hear(PEER, 2, PeerModes::Some(vec![(one, Told::Percent(5))])));
        assert_eq!(of(&modes), [Told::Percent(5), Told::Held]);
        let shown = modes.status(PEER, &moves);
        let shown: Vec<&str> = shown.iter().map(|it| it.mode.as_str()).collect();
        assert_eq!(shown, ["shared", "held"]);
        assert!(modes.hear(PEER, 2, PeerModes::All(Told::default())));
        assert_eq!(modes.status(PEER, &moves), []);
        for number in 0..70_000 {
            modes.hear(
                PEER,
                2,
                PeerModes::Some(vec![(MoveName::test(number), HERE)]),
            );
        }
        assert!(modes.0[0].some.len() <= 2 * MAX_MOVES);
    }
}
