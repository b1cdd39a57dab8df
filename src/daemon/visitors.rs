//! Who comes to what has moved: from the gates to the thread that records it, once a second.
//!
//! Owns when that is done, and what an administrator is told of it. No packet waits for it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::warnings::Warnings;
use crate::flow::role::Forwarder;
use crate::model::moved::Move;
use crate::model::progress::Progress;
use crate::model::status::ProgressOf;
use crate::settings::config::Config;
use crate::stragglers::tally::Arrived;
use crate::stragglers::watch::Moves;
use crate::stragglers::writer::{Settings, Writer};

/// How often the gates are asked.
const EVERY: Duration = Duration::from_secs(1);

/// How often what the new server says of arrivals is taken in: there may be 16,384 moves.
const PROGRESS_EVERY: Duration = Duration::from_secs(10);

/// The recording of who comes.
#[derive(Debug)]
pub(super) struct Visitors {
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
    arrived: Vec<(String, Arrived)>,
    /// Conversations that the gates had no place for.
    missed: u64,
}

impl Visitors {
    /// Starts to record who comes, if that is wanted, and the directory is not `refused`.
    pub(super) fn start(config: &Config, refused: Option<&str>, now: Instant) -> Option<Self> {
        let settings = Settings {
            dir: config.state_dir.clone(),
            keep: config.client_log?.keep,
        };
        let started = match refused {
            Some(why) => Err(why.to_owned()),
            None => Writer::start(settings).map_err(|error| error.to_string()),
        };
        let (writer, failed) = match started {
            Ok(writer) => (Some(writer), None),
            Err(error) => (None, Some(format!("clients are not recorded: {error}"))),
        };
        Some(Self {
            writer,
            failed,
            next: now + EVERY,
            next_progress: now + PROGRESS_EVERY,
            watched: Vec::new(),
            moves: Arc::new([]),
            said: HashMap::new(),
            arrived: Vec::new(),
            missed: 0,
        })
    }

    /// When to look.
    pub(super) fn next(&self) -> Instant {
        self.next
    }

    /// These are the moves. One is watched while it is the new server's, and its clients get
    /// there: others this server serves itself, and does not see.
    pub(super) fn watch<'m>(&mut self, moves: impl Iterator<Item = (&'m Move, bool)>) {
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
                self.arrived.push((what.clone(), more));
            }
        }
        // What is not said at present, as while the new server is away, was said before.
        self.said.extend(all);
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
        forwarder.know(&writer.take_known());
    }

    /// Conversations that were too many to look at or to record.
    pub(super) fn unrecorded(&self) -> u64 {
        self.missed + self.writer.as_ref().map_or(0, Writer::lost)
    }

    /// Conversations that came and are not in the database yet.
    pub(super) fn unwritten(&self, forwarder: &Forwarder) -> u64 {
        match &self.writer {
            Some(writer) => forwarder.settling() + writer.unwritten(),
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
        let visited = forwarder.visited(now, last);
        self.missed += visited.missed;
        if let Some(writer) = &self.writer {
            let arrived = std::mem::take(&mut self.arrived);
            writer.tell(visited, arrived, &self.moves, now, SystemTime::now(), last);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn visitors() -> Visitors {
        Visitors {
            writer: None,
            failed: None,
            next: Instant::now(),
            next_progress: Instant::now(),
            watched: Vec::new(),
            moves: Arc::new([]),
            said: HashMap::new(),
            arrived: Vec::new(),
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
            visitors.watch(watched.iter().map(|&(at, all)| (&moves[at], all)));
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
            std::mem::take(&mut visitors.arrived)
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
