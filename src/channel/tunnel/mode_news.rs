//! What the old server tells the new one of the mode of each move: it rides on keepalives of its
//! own.
//!
//! Owns its bytes, and what is told when. A daemon that does not know of it takes it for padding,
//! so nothing has to be agreed. Mostly all moves are in one mode, and one short message says so;
//! else each is named, in as many messages as that takes. It is told at once when it changes, and
//! then with pings, so one that is lost costs nothing but time.

use super::progress_news::MoveName;
use crate::model::bytes::take;
use crate::model::mode::Told;

/// The first byte of it on a keepalive. Others ride there with other ones.
const KIND: u8 = 5;

/// In place of the number of names: all are in one mode.
const ALL: u8 = u8::MAX;

/// Most moves that a message names, so that it fits a datagram that passes everywhere.
const MAX_ENTRIES: usize = 110;

/// Most messages that are sent at once when something changes, and with one ping: the peer takes
/// 256 control messages a second, of everything.
const AT_ONCE: usize = 32;
const AT_A_TIME: usize = 4;

/// How often everything is told beyond the first time, if all have moved: that is what a peer takes
/// for granted.
const REPEATS: usize = 3;

/// What the modes of a peer's moves are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PeerModes {
    /// All are in this one.
    All(Told),
    /// Some of them are in these.
    Some(Vec<(MoveName, Told)>),
}

/// What we tell the peer.
#[derive(Default, Debug)]
pub(super) struct Outgoing {
    messages: Vec<Vec<u8>>,
    /// The next message.
    at: usize,
    /// Messages that are still to be told, if all have moved.
    left: usize,
}

impl Outgoing {
    /// Replaces what we tell. Returns what is to be told at once.
    pub(super) fn replace(&mut self, all: &[(MoveName, Told)]) -> Vec<Vec<u8>> {
        let messages = match all {
            [] => Vec::new(),
            [(_, first), rest @ ..] if rest.iter().all(|(_, told)| told == first) => {
                vec![encode(&PeerModes::All(*first))]
            }
            _ => {
                let some = |some: &[(MoveName, Told)]| encode(&PeerModes::Some(some.to_vec()));
                all.chunks(MAX_ENTRIES).map(some).collect()
            }
        };
        if messages == self.messages {
            return Vec::new();
        }
        self.messages = messages;
        self.tell_anew();
        self.take(AT_ONCE)
    }

    /// The peer has started anew, and knows nothing of what it was told.
    pub(super) fn tell_anew(&mut self) {
        (self.at, self.left) = (0, REPEATS * self.messages.len());
    }

    /// What is to be told with a ping.
    pub(super) fn take_turn(&mut self) -> Vec<Vec<u8>> {
        let is_plain = self.messages == [encode(&PeerModes::All(Told::default()))];
        match is_plain && self.left == 0 {
            true => Vec::new(),
            false => self.take(AT_A_TIME),
        }
    }

    fn take(&mut self, most: usize) -> Vec<Vec<u8>> {
        let count = self.messages.len();
        let some = (self.messages.iter().cycle().skip(self.at)).take(most.min(count));
        let some: Vec<Vec<u8>> = some.cloned().collect();
        self.left = self.left.saturating_sub(some.len());
        self.at = (self.at + some.len()) % count.max(1);
        some
    }
}

fn encode(modes: &PeerModes) -> Vec<u8> {
    match modes {
        PeerModes::All(told) => vec![KIND, ALL, told.byte()],
        PeerModes::Some(some) => {
            let mut out = vec![KIND, some.len() as u8];
            for (MoveName(name), told) in some {
                out.extend_from_slice(&name.to_be_bytes());
                out.push(told.byte());
            }
            out
        }
    }
}

/// Reads what rode on a keepalive; `None` if it is no such thing.
pub(super) fn decode(bytes: &[u8]) -> Option<PeerModes> {
    let mut rest = bytes;
    let rest = &mut rest;
    let [kind, count] = take(rest)?;
    let told = |rest: &mut &[u8]| {
        let [byte] = take(rest)?;
        Told::from_byte(byte)
    };
    match (kind, count) {
        (KIND, ALL) => Some(PeerModes::All(told(rest)?)),
        (KIND, 0..) if usize::from(count) <= MAX_ENTRIES => {
            let one = |_| Some((MoveName(u64::from_be_bytes(take(rest)?)), told(rest)?));
            let some = (0..count).map(one).collect::<Option<_>>()?;
            Some(PeerModes::Some(some))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::{asks, news, progress_news};
    use super::*;
    use proptest::prelude::*;

    fn name(number: u64) -> MoveName {
        MoveName(number)
    }

    #[test]
    fn golden_bytes() {
        let cases = [
            (PeerModes::All(Told::Percent(0)), vec![5, 255, 0]),
            (
                PeerModes::Some(vec![(name(0x102), Told::Held), (name(3), Told::Percent(5))]),
                vec![5, 2, 0, 0, 0, 0, 0, 0, 1, 2, 101, 0, 0, 0, 0, 0, 0, 0, 3, 5],
            ),
        ];
        for (modes, bytes) in cases {
            assert_eq!(encode(&modes), bytes);
            assert_eq!(decode(&bytes), Some(modes));
            assert_eq!(news::decode(&bytes), None);
            assert_eq!(progress_news::decode(&bytes), None);
            assert_eq!(
                (asks::decode(&bytes), asks::decode_told(&bytes)),
                (None, None)
            );
        }
        for other in [
            &[][..],
            &[0; 99],
            &[5],
            &[5, 255],
            &[5, 255, 102],
            &[5, 1, 0],
            &[5, 200],
        ] {
            assert_eq!(decode(other), None, "{other:?}");
        }
    }

    #[test]
    fn a_change_is_told_at_once_and_then_with_pings() {
        let all = |told| [(name(1), told), (name(2), told)];
        let mut outgoing = Outgoing::default();
        assert_eq!(outgoing.take_turn().len(), 0);
        assert_eq!(outgoing.replace(&all(Told::Percent(0))), [[5, 255, 0]]);
        assert_eq!(outgoing.replace(&all(Told::Percent(0))).len(), 0, "no news");
        assert_eq!(
            (0..9).filter(|_| !outgoing.take_turn().is_empty()).count(),
            9
        );
        // That all have moved is told a few times.
        assert_eq!(outgoing.replace(&all(Told::default())), [[5, 255, 100]]);
        assert_eq!(
            (0..9).filter(|_| !outgoing.take_turn().is_empty()).count(),
            2
        );
        outgoing.tell_anew();
        assert_eq!(
            (0..9).filter(|_| !outgoing.take_turn().is_empty()).count(),
            3
        );
    }

    #[test]
    fn very_many_moves_are_told_by_turns() {
        let all: Vec<_> = (0..16_384)
            .map(|it| (name(it), Told::Percent((it % 3) as u8)))
            .collect();
        let mut outgoing = Outgoing::default();
        let mut messages = outgoing.replace(&all);
        assert_eq!(messages.len(), AT_ONCE);
        for _ in 0..30 {
            messages.extend(outgoing.take_turn());
        }
        let mut told: Vec<(MoveName, Told)> = Vec::new();
        for message in messages {
            assert!(message.len() <= 1_100);
            match decode(&message) {
                Some(PeerModes::Some(some)) => told.extend(some),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(told[..all.len()], all);
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_strange(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&bytes);
        }
    }
}
