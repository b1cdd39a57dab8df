//! Which moves somebody watches, and since when: what a verdict rests on.
//!
//! A move is watched while all that comes to it is seen: what the new server answers while the
//! tunnel is up, what the old one answers while its programs tell. Each move has its own time,
//! since one that is added today was not watched yesterday.
//!
//! What was told is written some seconds later, so that a killed daemon has not watched these.

use std::collections::HashMap;
use std::sync::Arc;

/// How long it takes until all that came is written: what a conversation needs to settle, and the
/// time until it is told of and written (`flow::visits`).
const LAG: i64 = 10;

/// The moves of a daemon as `--move` names them, each with whether it is watched.
pub type Moves = Arc<[(String, bool)]>;

/// The moves, and since when each is watched.
#[derive(Debug)]
pub(super) struct Watch {
    moves: Moves,
    since: HashMap<String, i64>,
    /// Time that ended and is not written yet.
    ended: Vec<Stretch>,
    /// What was before is forgotten.
    floor: i64,
}

/// A stretch of time in which a move was watched.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Stretch {
    pub(super) what: String,
    pub(super) since: i64,
    pub(super) until: i64,
}

impl Default for Watch {
    fn default() -> Self {
        Self {
            moves: Arc::from([]),
            since: HashMap::new(),
            ended: Vec::new(),
            floor: i64::MIN,
        }
    }
}

impl Watch {
    /// From now on these are the moves. Returns whether that is news.
    pub(super) fn set(&mut self, moves: &Moves, now: i64) -> bool {
        if Arc::ptr_eq(&self.moves, moves) {
            return false;
        }
        self.moves = Arc::clone(moves);
        // Of the same name, as of two peers, all have to be watched.
        let mut watched: HashMap<&str, bool> = HashMap::new();
        for (what, is_watched) in moves.iter() {
            let all = watched.entry(what).or_insert(true);
            *all &= is_watched;
        }
        let ended = (self.since)
            .extract_if(|what, _| watched.get(what.as_str()).is_none_or(|watched| !watched));
        self.ended.extend(ended.map(|(what, since)| Stretch {
            what,
            since,
            until: now.max(since),
        }));
        let fresh = watched.into_iter().filter(|(_, is_watched)| *is_watched);
        for (what, _) in fresh {
            self.since.entry(what.to_owned()).or_insert(now);
        }
        true
    }

    /// The time before cannot be told from what comes now: it begins anew.
    pub(super) fn begin_anew(&mut self, now: i64) {
        self.ended.clear();
        self.floor = i64::MIN;
        self.since.values_mut().for_each(|since| *since = now);
    }

    /// What was before is forgotten, and counts as not watched.
    pub(super) fn forget_before(&mut self, floor: i64) {
        self.floor = self.floor.max(floor);
    }

    /// The moves, whether they are watched or not.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.moves.iter().map(|(what, _)| what.as_str())
    }

    /// What there is to write: with `all`, what came until now was written, too.
    pub(super) fn stretches(&self, now: i64, all: bool) -> Vec<Stretch> {
        let until = if all { now } else { now.saturating_sub(LAG) };
        let live = self.since.iter().map(|(what, &since)| Stretch {
            what: what.clone(),
            since,
            until,
        });
        let all = self.ended.iter().cloned().chain(live);
        let kept = all.map(|it| Stretch {
            since: it.since.max(self.floor),
            ..it
        });
        kept.filter(|it| it.until >= it.since).collect()
    }

    /// It was written.
    pub(super) fn written(&mut self) {
        self.ended.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moves(all: &[(&str, bool)]) -> Moves {
        let each = all.iter().map(|&(what, watched)| (what.into(), watched));
        each.collect()
    }

    fn told(watch: &Watch, now: i64, all: bool) -> Vec<(String, i64, i64)> {
        let mut all: Vec<_> = (watch.stretches(now, all).into_iter())
            .map(|it| (it.what, it.since, it.until))
            .collect();
        all.sort_unstable();
        all
    }

    #[test]
    fn each_move_has_a_time_of_its_own() {
        let mut watch = Watch::default();
        assert!(watch.set(&moves(&[("a", true), ("b", false)]), 100));
        assert_eq!(told(&watch, 200, false), [("a".into(), 100, 190)]);
        watch.set(&moves(&[("a", true), ("b", true), ("c", true)]), 300);
        watch.written();
        watch.set(&moves(&[("b", true), ("c", false)]), 400);
        let all = [
            ("a".into(), 100, 400),
            ("b".into(), 300, 500),
            ("c".into(), 300, 400),
        ];
        assert_eq!(told(&watch, 500, true), all);
        watch.written();
        assert_eq!(told(&watch, 500, true), [("b".into(), 300, 500)]);
        assert_eq!(watch.names().collect::<Vec<_>>(), ["b", "c"]);
    }

    #[test]
    fn one_name_at_two_peers_is_watched_if_both_are() {
        let mut watch = Watch::default();
        watch.set(&moves(&[("a", true), ("a", false)]), 100);
        assert_eq!(told(&watch, 200, true), []);
        watch.set(&moves(&[("a", true), ("a", true)]), 150);
        assert_eq!(told(&watch, 200, true), [("a".into(), 150, 200)]);
    }

    #[test]
    fn what_is_forgotten_and_what_another_clock_said_was_not_watched() {
        let mut watch = Watch::default();
        watch.set(&moves(&[("a", true)]), 100);
        watch.forget_before(150);
        assert_eq!(told(&watch, 200, true), [("a".into(), 150, 200)]);
        assert_eq!(told(&watch, 155, false), [], "it is younger than the lag");
        watch.begin_anew(20);
        assert_eq!(told(&watch, 40, true), [("a".into(), 20, 40)]);
    }
}
