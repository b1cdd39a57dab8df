//! Who comes to what has moved: from the gates, and from the programs that see whom this server
//! serves itself, to the thread that records it, once a second.
//!
//! Owns when that is done, and what an administrator is told of it. No packet waits for it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::follow::Follower;
use super::warnings::Warnings;
use crate::flow::role::Forwarder;
use crate::flow::seed::Seed;
use crate::flow::served_here::{Passed, ServedHere};
use crate::io::entropy;
use crate::kernel::programs::{self, READ_EVERY};
use crate::model::mode::Settled;
use crate::model::moved::Move;
use crate::model::progress::Progress;
use crate::model::status::{ProgressOf, Served, many_in_vain};
use crate::model::visit::InVain;
use crate::settings::config::Config;
use crate::stragglers::tally::Arrived;
use crate::stragglers::watch::Moves;
use crate::stragglers::writer::{MoveNews, Settings, Writer};

/// How often the gates are asked.
const EVERY: Duration = Duration::from_secs(1);

/// How often what the new server says of arrivals is taken in: there may be 16,384 moves.
const PROGRESS_EVERY: Duration = Duration::from_secs(10);

/// Things that are remembered as asked for: as many as a status shows of a few peers.
const MAX_IN_VAIN: usize = 4_096;

/// The recording of who comes.
#[derive(Debug)]
pub(super) struct Visitors {
    /// Who is served by this server itself.
    served: ServedHere,
    /// The programs tell of them.
    serving: bool,
    /// Some move is not in mode `moved`, so that there is much to read.
    some_here: bool,
    next_read: Instant,
    writer: Option<Writer>,
    /// Why there is no writer.
    failed: Option<String>,
    next: Instant,
    next_progress: Instant,
    /// The moves, each with whether all its clients are seen here.
    watched: Vec<(Move, bool)>,
    /// The same, for the writer.
    moves: Moves,
    /// What the new server said last of arrivals, by move.
    said: HashMap<String, Arrived>,
    /// What has come since, and is not told yet.
    news: MoveNews,
    /// How often each thing was asked for that nobody was answered, as far as that was told; of
    /// what was answered that is all.
    in_vain: HashMap<String, Option<u64>>,
    /// Conversations that the gates had no place for.
    missed: u64,
}

impl Visitors {
    /// Starts to record who comes, if that is wanted, and the directory is not `refused`.
    pub(super) fn start(config: &Config, refused: Option<&str>, now: Instant) -> Option<Self> {
        let log = config.client_log?;
        let settings = Settings {
            dir: config.state_dir.clone(),
            keep: log.keep,
        };
        let started = match refused {
            Some(why) => Err(why.to_owned()),
            None => Writer::start(settings).map_err(|error| error.to_string()),
        };
        let (writer, failed) = match started {
            Ok(writer) => (Some(writer), None),
            Err(error) => (None, Some(format!("clients are not recorded: {error}"))),
        };
        // Without randomness whoever knows the seed can make conversations look like one.
        let word = || entropy::system().u64().unwrap_or_default();
        Some(Self {
            served: ServedHere::new(Seed::new([word(), word()]), log.names),
            serving: false,
            some_here: true,
            next_read: now,
            writer,
            failed,
            next: now,
            next_progress: now + PROGRESS_EVERY,
            watched: Vec::new(),
            moves: Arc::new([]),
            said: HashMap::new(),
            news: MoveNews::default(),
            in_vain: HashMap::new(),
            missed: 0,
        })
    }

    /// When to read or to look.
    pub(super) fn next(&self) -> Instant {
        match self.some_here {
            true => self.next.min(self.next_read),
            false => self.next,
        }
    }

    /// Whether it is time to look.
    pub(super) fn wants_look(&self, now: Instant) -> bool {
        now >= self.next
    }

    /// From now on names are looked for, or no longer are.
    pub(super) fn set_names(&mut self, names: bool) {
        self.served.set_names(names);
    }

    /// Reads what the programs tell of whom this server serves itself.
    pub(super) fn read(&mut self, now: Instant, follower: &Follower) {
        self.next_read = now + READ_EVERY;
        let ktime = programs::now();
        let served = &mut self.served;
        let [openings, lost] = follower.take_served(|told| {
            let passed = Passed {
                at: (now.checked_sub(ktime.saturating_sub(told.at))).unwrap_or(now),
                is_answer: told.is_answer,
                is_first: told.is_first,
            };
            served.passed(passed, told.head);
        });
        self.served.count(openings, lost);
    }

    /// These are the moves, each with who answers and whether its tunnel is up. One is watched
    /// while whoever answers can be seen: the new server by the tunnel, this one by the programs.
    pub(super) fn watch<'m>(
        &mut self,
        follower: &Follower,
        moves: impl Iterator<Item = (&'m Move, Settled, bool)>,
    ) {
        // What keeps them from it is nothing that a later try mends, and is said by the verdict.
        self.serving = follower.tell_served(true).unwrap_or(false);
        let serving = self.serving;
        let mut some_here = false;
        let moves = moves.map(|(moved, settled, is_up)| {
            some_here |= settled != Settled::Moved;
            let watched = match settled {
                Settled::Moved => is_up,
                Settled::Here => serving,
                Settled::Shared(_) => serving && is_up,
            };
            (moved, watched)
        });
        self.watch_each(moves);
        self.some_here = some_here;
    }

    /// These are the moves, each with whether all its clients are seen.
    fn watch_each<'m>(&mut self, moves: impl Iterator<Item = (&'m Move, bool)>) {
        let mut count = 0;
        let mut same = true;
        let mut fresh = Vec::new();
        for (moved, watched) in moves {
            let known = self.watched.get(count);
            if same && known.is_none_or(|known| (&known.0, known.1) != (moved, watched)) {
                same = false;
                fresh.extend_from_slice(&self.watched[..count]);
            }
            if !same {
                fresh.push((moved.clone(), watched));
            }
            count += 1;
        }
        if same && count == self.watched.len() {
            return;
        }
        if same {
            fresh = self.watched[..count].to_vec();
        }
        self.moves = (fresh.iter())
            .map(|(it, all)| (it.to_string(), *all))
            .collect();
        self.watched = fresh;
    }

    /// Whether it is time to take in what the new server says of arrivals.
    pub(super) fn wants_progress(&self, now: Instant) -> bool {
        now >= self.next_progress
    }

    /// Takes in what it says. What it said first counts from there: it may have been counted.
    pub(super) fn progress(&mut self, said: impl Iterator<Item = ProgressOf>) {
        let mut all: HashMap<String, Arrived> = HashMap::new();
        for ProgressOf { what, progress } in said {
            let Progress {
                by_tunnel,
                directly,
                ..
            } = progress;
            let sum = all.entry(what).or_default();
            sum.by_tunnel += by_tunnel;
            sum.directly += directly;
        }
        for (what, now) in &all {
            let Some(before) = self.said.get(what) else {
                continue;
            };
            // A new server that was restarted counts from the beginning.
            let restarted = now.by_tunnel < before.by_tunnel || now.directly < before.directly;
            let before = if restarted {
                Arrived::default()
            } else {
                *before
            };
            let more = Arrived {
                by_tunnel: now.by_tunnel - before.by_tunnel,
                directly: now.directly - before.directly,
            };
            if more != Arrived::default() {
                self.news.arrived.push((what.clone(), more));
            }
        }
        // What is not said at present, as while the new server is away, was said before.
        self.said.extend(all);
    }

    /// Takes in whether what clients ask for is answered. What nobody ever was stays known when
    /// this daemon is gone: it is no visit.
    pub(super) fn served(&mut self, all: impl Iterator<Item = Served>) {
        for Served {
            what,
            expected,
            asked,
            answered,
            ..
        } in all
        {
            let seen = (answered == 0).then_some(asked);
            let is_many = asked >= many_in_vain(&what);
            let is_news = match self.in_vain.get(&what) {
                Some(before) => *before != seen,
                None => self.in_vain.len() < MAX_IN_VAIN,
            };
            if !is_news || !expected && seen.is_some() || seen.is_some() && !is_many {
                continue;
            }
            self.in_vain.insert(what.clone(), seen);
            let answered = seen.is_none();
            self.news.in_vain.push(InVain { what, answered });
        }
    }

    /// Asks the gates. Call it when it is [time](Self::next).
    pub(super) fn look(&mut self, now: Instant, forwarder: &Forwarder, warnings: &mut Warnings) {
        self.next = now + EVERY;
        if self.wants_progress(now) {
            self.next_progress = now + PROGRESS_EVERY;
        }
        self.tell(now, forwarder, false);
        let trouble = self.writer.as_ref().and_then(Writer::trouble);
        for text in self.failed.iter().cloned().chain(trouble) {
            warnings.warn(now, text);
        }
        let Some(writer) = &self.writer else {
            return;
        };
        for text in writer.take_notes() {
            warnings.warn(now, text);
        }
        let known = writer.take_known();
        forwarder.know(&known);
        self.served.know(&known);
    }

    /// Conversations that were too many to look at or to record.
    pub(super) fn unrecorded(&self) -> u64 {
        self.missed + self.writer.as_ref().map_or(0, Writer::lost)
    }

    /// Conversations that came and are not in the database yet.
    pub(super) fn unwritten(&self, forwarder: &Forwarder) -> u64 {
        match &self.writer {
            Some(writer) => forwarder.settling() + self.served.settling() + writer.unwritten(),
            None => 0,
        }
    }

    /// Hands over everything that is known by now.
    pub(super) fn flush(&mut self, now: Instant, forwarder: &Forwarder) {
        self.tell(now, forwarder, true);
    }

    /// Tells what is left, for the thread to write.
    pub(super) fn end(&mut self, now: Instant, forwarder: &Forwarder) {
        self.flush(now, forwarder);
        if let Some(writer) = &mut self.writer {
            writer.end();
        }
    }

    /// Waits until it is written.
    pub(super) fn wait(&mut self) {
        if let Some(writer) = &mut self.writer {
            writer.end();
            writer.wait();
        }
    }

    fn tell(&mut self, now: Instant, forwarder: &Forwarder, last: bool) {
        let mut visited = forwarder.visited(now, last);
        visited.add(self.served.take(now, last));
        self.missed += visited.missed;
        if let Some(writer) = &self.writer {
            let news = std::mem::take(&mut self.news);
            writer.tell(visited, news, &self.moves, now, SystemTime::now(), last);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn visitors() -> Visitors {
        Visitors {
            served: ServedHere::new(Seed::new([1, 2]), true),
            serving: false,
            some_here: false,
            next_read: Instant::now(),
            writer: None,
            failed: None,
            next: Instant::now(),
            next_progress: Instant::now(),
            watched: Vec::new(),
            moves: Arc::new([]),
            said: HashMap::new(),
            news: MoveNews::default(),
            in_vain: HashMap::new(),
            missed: 0,
        }
    }

    #[test]
    fn the_writer_hears_of_moves_only_when_something_changes() {
        let moves: Vec<Move> = ["192.0.2.5", "192.0.2.6", "192.0.2.7"]
            .map(|text| text.parse().unwrap())
            .into();
        let mut visitors = visitors();
        let mut told = |watched: &[(usize, bool)]| {
            let before = Arc::clone(&visitors.moves);
            visitors.watch_each(watched.iter().map(|&(at, all)| (&moves[at], all)));
            let changed = !Arc::ptr_eq(&before, &visitors.moves);
            let moves: Vec<_> = visitors.moves.iter().map(|it| it.1).collect();
            (changed, moves)
        };
        assert_eq!(told(&[(0, true), (1, true)]), (true, vec![true, true]));
        assert!(!told(&[(0, true), (1, true)]).0);
        assert_eq!(told(&[(0, true), (1, false)]), (true, vec![true, false]));
        assert_eq!(told(&[(0, true), (1, false), (2, true)]).1.len(), 3);
        assert_eq!(told(&[(0, true), (1, false)]), (true, vec![true, false]));
        assert_eq!(told(&[(1, false)]), (true, vec![false]));
        assert_eq!(told(&[]), (true, vec![]));
    }

    #[test]
    fn what_nobody_was_ever_answered_is_told_as_it_is_asked_for_and_once_it_is_answered() {
        let mut visitors = visitors();
        let mut see = |what: &str, expected, asked, answered| {
            let served = Served {
                what: what.into(),
                state: crate::model::status::Answers::Silent,
                expected,
                since_s: 0,
                asked,
                answered,
                refused: 0,
                clients: 0,
                causes: Vec::new(),
            };
            visitors.served([served].into_iter());
            let told = std::mem::take(&mut visitors.news.in_vain);
            told.into_iter().map(|it| it.answered).collect::<Vec<_>>()
        };
        assert_eq!(see("192.0.2.5:80/tcp", true, 0, 0), [true; 0]);
        assert_eq!(see("192.0.2.5:80/tcp", true, 1, 0), [false]);
        assert_eq!(see("192.0.2.5:80/tcp", true, 1, 0), [true; 0]);
        assert_eq!(see("192.0.2.5:80/tcp", true, 3, 0), [false]);
        assert_eq!(see("192.0.2.5:80/tcp", true, 4, 1), [true]);
        assert_eq!(see("192.0.2.5:80/tcp", true, 9, 5), [true; 0]);
        // A scan's, and what need not answer.
        assert_eq!(see("192.0.2.5:81/tcp", false, 9, 0), [true; 0]);
        assert_eq!(see("192.0.2.5:53/udp", true, 2, 0), [true; 0]);
        assert_eq!(see("192.0.2.5:53/udp", true, 8, 0), [false]);
    }

    #[test]
    fn arrivals_count_from_what_was_said_first_and_after_a_restart_from_nothing() {
        let mut visitors = visitors();
        let mut say = |by_tunnel, directly| {
            let progress = Progress {
                by_tunnel,
                directly,
                ..Progress::default()
            };
            let what = "192.0.2.5".to_owned();
            visitors.progress([ProgressOf { what, progress }].into_iter());
            std::mem::take(&mut visitors.news.arrived)
                .into_iter()
                .map(|(_, it)| (it.by_tunnel, it.directly))
                .collect::<Vec<_>>()
        };
        assert_eq!(say(100, 50), []);
        assert_eq!(say(103, 54), [(3, 4)]);
        assert_eq!(say(103, 54), []);
        assert_eq!(say(1, 2), [(1, 2)]);
    }
}
