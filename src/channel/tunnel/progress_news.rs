//! What the new server tells the old one of how far each move has come: it rides on keepalives of
//! its own.
//!
//! Owns its bytes, and what is told when. A daemon that does not know of it takes it for padding,
//! so nothing has to be agreed. Each entry says everything of one move, so that one which is lost
//! costs nothing but time: those that changed go first, and the rest follow in turn.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use blake2::digest::Digest;

use crate::model::bytes::take;
use crate::model::moved::Move;
use crate::model::progress::{Listens, Progress};

/// The first byte of it on a keepalive. Padding is zero, and troubles have another one.
const KIND: u8 = 2;

/// Bytes of an entry: name, whether something listens, and three counts.
const ENTRY_LEN: usize = 8 + 1 + 4 + 8 + 8;

/// Most entries of a message, so that it fits a datagram that passes everywhere.
pub(super) const MAX_ENTRIES: usize = 36;

/// Most messages that are sent in one go: the peer takes 256 control messages a second, of
/// everything.
const AT_A_TIME: usize = 4;

/// Counts that changed are told so often. What listens is told at once, unless that was just told.
const PACE: Duration = Duration::from_secs(1);
const AT_LEAST: Duration = Duration::from_millis(250);

/// How often a change of what listens is told at that pace: whoever holds clients back waits for
/// it.
const REPEATS: u8 = 3;

/// What a move is called on the wire: the same on both sides, wherever it stands in their lists.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct MoveName(pub(super) u64);

impl MoveName {
    /// A name of no move in particular.
    #[cfg(test)]
    pub(crate) fn test(number: u64) -> Self {
        Self(number)
    }

    /// The name of a move.
    pub fn of(moved: &Move) -> Self {
        let mut bytes = Vec::new();
        moved.encode(&mut bytes);
        bytes.push(moved.prefix.len());
        let digest = blake2::Blake2s256::digest(&bytes);
        Self(
            digest
                .iter()
                .take(8)
                .fold(0, |word, &byte| word << 8 | u64::from(byte)),
        )
    }
}

/// What we tell the peer of each move.
#[derive(Default, Debug)]
pub(super) struct Outgoing {
    entries: BTreeMap<MoveName, Entry>,
    /// Those that are to be told soon, in the order in which they changed.
    news: VecDeque<MoveName>,
    /// The last that was told in turn.
    turn: Option<MoveName>,
    /// When news were told last.
    told: Option<Instant>,
}

/// What we tell of one move.
#[derive(Clone, Copy, Debug)]
struct Entry {
    progress: Progress,
    /// How often it is still to be told soon.
    left: u8,
    /// Whoever waits for it is to hear at once.
    urgent: bool,
}

impl Outgoing {
    /// Replaces what we tell.
    pub(super) fn replace(&mut self, all: &[(MoveName, Progress)]) {
        let mut before = std::mem::take(&mut self.entries);
        for &(name, progress) in all {
            let known = before.remove(&name);
            let mut entry = known.unwrap_or(Entry {
                progress: Progress::default(),
                left: 0,
                urgent: false,
            });
            let is_waiting = entry.left > 0;
            if entry.progress.listens != progress.listens || known.is_none() {
                (entry.left, entry.urgent) = (REPEATS, true);
            } else if entry.progress != progress {
                entry.left = entry.left.max(1);
            }
            entry.progress = progress;
            if entry.left > 0 && !is_waiting {
                self.news.push_back(name);
            }
            self.entries.insert(name, entry);
        }
        let entries = &self.entries;
        self.news.retain(|name| entries.contains_key(name));
    }

    /// What is to be told now because it is news: what rides on each of some keepalives.
    pub(super) fn take_news(&mut self, now: Instant) -> Vec<Vec<u8>> {
        let urgent = |name| self.entries.get(name).is_some_and(|entry| entry.urgent);
        let pace = if self.news.iter().any(urgent) {
            AT_LEAST
        } else {
            PACE
        };
        if self.news.is_empty() || self.told.is_some_and(|told| now < told + pace) {
            return Vec::new();
        }
        self.told = Some(now);
        let (urgent, other): (Vec<_>, Vec<_>) = self.news.drain(..).partition(|name| {
            let entry = self.entries.get(name);
            entry.is_some_and(|entry| entry.urgent)
        });
        self.news.extend(urgent.into_iter().chain(other));
        let count = self.news.len().min(AT_A_TIME * MAX_ENTRIES);
        let some: Vec<MoveName> = self.news.drain(..count).collect();
        let messages = self.encode(&some);
        for name in some {
            if let Some(entry) = self.entries.get_mut(&name) {
                entry.urgent = false;
                entry.left = entry.left.saturating_sub(1);
                if entry.left > 0 {
                    self.news.push_back(name);
                }
            }
        }
        messages
    }

    /// What is told though it is no news, with each ping: some, and the next ones the next time.
    pub(super) fn take_turn(&mut self) -> Vec<Vec<u8>> {
        let most = AT_A_TIME * MAX_ENTRIES;
        let behind = |name: &&MoveName| self.turn.is_none_or(|last| **name > last);
        let names: Vec<MoveName> = self
            .entries
            .keys()
            .filter(behind)
            .take(most)
            .copied()
            .collect();
        // Behind the last comes the first.
        self.turn = names.last().copied().filter(|_| names.len() == most);
        self.encode(&names)
    }

    fn encode(&self, names: &[MoveName]) -> Vec<Vec<u8>> {
        let told: Vec<(MoveName, Progress)> = names
            .iter()
            .filter_map(|&name| Some((name, self.entries.get(&name)?.progress)))
            .collect();
        told.chunks(MAX_ENTRIES).map(encode).collect()
    }
}

fn encode(told: &[(MoveName, Progress)]) -> Vec<u8> {
    let mut out = Vec::with_capacity(2 + told.len() * ENTRY_LEN);
    out.extend([KIND, told.len() as u8]);
    for (MoveName(name), progress) in told {
        out.extend_from_slice(&name.to_be_bytes());
        out.push(match progress.listens {
            Listens::Unknown => 0,
            Listens::Yes => 1,
            Listens::No => 2,
        });
        let live = u32::try_from(progress.live).unwrap_or(u32::MAX);
        out.extend_from_slice(&live.to_be_bytes());
        out.extend_from_slice(&progress.by_tunnel.to_be_bytes());
        out.extend_from_slice(&progress.directly.to_be_bytes());
    }
    out
}

/// Reads what rode on a keepalive; `None` if it is no such thing.
pub(super) fn decode(bytes: &[u8]) -> Option<Vec<(MoveName, Progress)>> {
    let mut rest = bytes;
    let rest = &mut rest;
    let [kind, count] = take(rest)?;
    if kind != KIND || usize::from(count) > MAX_ENTRIES {
        return None;
    }
    (0..count).map(|_| decode_one(rest)).collect()
}

fn decode_one(rest: &mut &[u8]) -> Option<(MoveName, Progress)> {
    let name = MoveName(u64::from_be_bytes(take(rest)?));
    let listens = match take(rest)? {
        [0] => Listens::Unknown,
        [1] => Listens::Yes,
        [2] => Listens::No,
        _ => return None,
    };
    let progress = Progress {
        listens,
        live: u32::from_be_bytes(take(rest)?).into(),
        by_tunnel: u64::from_be_bytes(take(rest)?),
        directly: u64::from_be_bytes(take(rest)?),
    };
    Some((name, progress))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::epoch;
    use proptest::prelude::*;

    fn name(text: &str) -> MoveName {
        MoveName::of(&text.parse().unwrap())
    }

    fn progress(listens: Listens, by_tunnel: u64) -> Progress {
        Progress {
            listens,
            live: 3,
            by_tunnel,
            directly: 7,
        }
    }

    fn read(messages: &[Vec<u8>]) -> Vec<(MoveName, Progress)> {
        let each = messages.iter().map(|message| decode(message).unwrap());
        each.flatten().collect()
    }

    #[test]
    fn golden_bytes() {
        let named = name("192.0.2.5:80/tcp");
        assert_eq!(named, MoveName(7_554_320_390_435_173_405));
        let told = progress(Listens::Yes, 0x102);
        let mut expected = vec![2, 1];
        expected.extend(named.0.to_be_bytes());
        expected.extend([
            1, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0, 7,
        ]);
        assert_eq!(encode(&[(named, told)]), expected);
        assert_eq!(decode(&expected), Some(vec![(named, told)]));
    }

    #[test]
    fn it_is_padding_to_whoever_reads_troubles_and_the_other_way_round() {
        let bytes = encode(&[(name("192.0.2.5"), Progress::default())]);
        assert_eq!(super::super::news::decode(&bytes), None);
        for other in [&[][..], &[0; 99], &[1, 0], &[2], &[2, 37], &[2, 1, 0]] {
            assert_eq!(decode(other), None, "{other:?}");
        }
        assert_eq!(decode(&[2, 0]), Some(vec![]));
    }

    #[test]
    fn every_part_of_a_move_is_in_its_name() {
        let all = [
            "192.0.2.5",
            "192.0.2.5/32:80",
            "192.0.2.5:80/tcp",
            "192.0.2.5:80/udp",
            "192.0.2.5:81/tcp",
            "192.0.2.5:80-81/tcp",
            "192.0.2.4/30",
            "192.0.2.4/31",
            "2001:db8::5",
            "2001:db8::/64",
        ];
        let mut names: Vec<MoveName> = all.into_iter().map(name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all.len());
    }

    #[test]
    fn what_listens_is_told_at_once_and_three_times_and_counts_once_a_second() {
        let (mut out, start) = (Outgoing::default(), epoch());
        let one = name("192.0.2.5:80/tcp");
        let at = |ms| start + Duration::from_millis(ms);
        let mut told = |ms: u64, listens, count| {
            out.replace(&[(one, progress(listens, count))]);
            read(&out.take_news(at(ms))).len()
        };
        assert_eq!(told(0, Listens::No, 0), 1);
        assert_eq!(told(100, Listens::No, 0), 0);
        assert_eq!(
            [told(1_000, Listens::No, 0), told(2_000, Listens::No, 0)],
            [1, 1]
        );
        assert_eq!(told(9_000, Listens::No, 0), 0, "three times");
        assert_eq!(told(10_000, Listens::No, 1), 1);
        assert_eq!(told(10_500, Listens::No, 2), 0, "a count");
        assert_eq!(told(10_501, Listens::Yes, 2), 1, "no count");
        assert_eq!(told(10_502, Listens::No, 2), 0, "a door that flaps");
        assert_eq!(told(10_751, Listens::No, 2), 1);
    }

    #[test]
    fn many_moves_are_told_in_turn_and_those_that_matter_first() {
        let (mut out, now) = (Outgoing::default(), epoch());
        let all: Vec<(MoveName, Progress)> = (0..1_000)
            .map(|name| (MoveName(name), Progress::default()))
            .collect();
        out.replace(&all);
        let mut seen = std::collections::BTreeSet::new();
        for second in 0..30 {
            let messages = out.take_news(now + PACE * second);
            assert!(messages.len() <= AT_A_TIME);
            assert!(
                messages
                    .iter()
                    .all(|it| it.len() <= super::super::messages::PART_LEN)
            );
            seen.extend(read(&messages).into_iter().map(|(name, _)| name));
        }
        assert_eq!(seen.len(), 1_000);
        let rounds: Vec<_> = (0..7).flat_map(|_| read(&out.take_turn())).collect();
        assert_eq!(
            rounds.len(),
            1_000,
            "and again, whether there is news or not"
        );
        assert_eq!(read(&out.take_turn())[0].0, MoveName(0));
        let mut changed = all;
        changed.iter_mut().for_each(|(_, it)| it.by_tunnel = 1);
        changed[999].1.listens = Listens::Yes;
        out.replace(&changed);
        let first = read(&out.take_news(now + PACE * 40))[0];
        assert_eq!(first, changed[999]);
        out.replace(&[]);
        assert!(out.take_news(now + PACE * 50).is_empty() && out.take_turn().is_empty());
    }

    proptest! {
        #[test]
        fn it_comes_back_as_it_went(
            some in proptest::collection::vec((any::<u64>(), 0_u8..3, any::<u32>(),
                any::<[u64; 2]>()), 0..=MAX_ENTRIES),
        ) {
            let told: Vec<(MoveName, Progress)> = some
                .into_iter()
                .map(|(name, listens, live, [by_tunnel, directly])| {
                    let all = [Listens::Unknown, Listens::Yes, Listens::No];
                    let listens = all[usize::from(listens)];
                    let progress = Progress { listens, live: live.into(), by_tunnel, directly };
                    (MoveName(name), progress)
                })
                .collect();
            let mut bytes = encode(&told);
            bytes.extend([0; 40]);
            prop_assert_eq!(decode(&bytes), Some(told));
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut bytes = bytes;
            bytes.insert(0, KIND);
            let _ = decode(&bytes);
        }
    }
}
