//! When the service manager is told that the daemon still does its work (`WatchdogSec=` of
//! systemd.service(5)). If it hears nothing for that long it kills the daemon and starts it again,
//! and established connections live on, as after any crash.
//!
//! Owns the pace and the judgement: a word is due while every loop that carries packets still
//! turns. The control task sends it between other things, so if it hangs it sends none. Reads no
//! clock.

use std::time::{Duration, Instant};

/// A loop that has not turned for this long hangs. Each turns once a second even if there is
/// nothing to do ([`TICK`](crate::lane)), but on a busy machine it may have to wait for its turn.
const PATIENCE: Duration = Duration::from_secs(5);

/// How many words there are in the time after which the service manager acts: one may come late.
const WORDS: u32 = 3;

/// What to do about the watchdog.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Word {
    /// Nothing yet.
    NotYet,
    /// Tell the service manager that all is well.
    Well,
    /// Tell it nothing: the loop of this number hangs.
    Hangs(usize),
}

/// The watchdog of one daemon.
#[derive(Debug)]
pub(super) struct Watchdog {
    every: Duration,
    next: Instant,
    loops: Vec<Seen>,
}

/// What was last seen of a loop.
#[derive(Debug)]
struct Seen {
    turns: u64,
    since: Instant,
}

impl Watchdog {
    /// A service manager that acts after `patience`.
    pub(super) fn new(now: Instant, patience: Duration) -> Self {
        Self {
            every: patience / WORDS,
            next: now,
            loops: Vec::new(),
        }
    }

    /// When to look again.
    pub(super) fn next(&self) -> Instant {
        self.next
    }

    /// Looks at how often each loop has turned.
    pub(super) fn look(&mut self, now: Instant, turns: impl Iterator<Item = u64>) -> Word {
        if now < self.next {
            return Word::NotYet;
        }
        self.next = now + self.every;
        let mut word = Word::Well;
        for (number, turns) in turns.enumerate() {
            match self.loops.get_mut(number) {
                Some(seen) if seen.turns == turns => {
                    if now.duration_since(seen.since) >= PATIENCE {
                        word = Word::Hangs(number);
                    }
                }
                Some(seen) => *seen = Seen { turns, since: now },
                None => self.loops.push(Seen { turns, since: now }),
            }
        }
        word
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::epoch;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_word_is_due_three_times_while_all_turn() {
        let start = epoch();
        let mut watchdog = Watchdog::new(start, 30 * SECOND);
        let words = (0..300).filter(|&seconds: &u32| {
            let word = watchdog.look(start + seconds * SECOND, [seconds.into(); 4].into_iter());
            assert_ne!(word, Word::Hangs(0));
            word == Word::Well
        });
        assert_eq!(words.count(), 30);
        assert_eq!(watchdog.next(), start + 300 * SECOND);
    }

    #[test]
    fn none_is_while_one_of_them_hangs() {
        for hangs in 0..3 {
            let start = epoch();
            let mut watchdog = Watchdog::new(start, 3 * SECOND);
            let mut look = |seconds: u32, stuck: bool| {
                let turns = |number| {
                    if stuck && number == hangs {
                        7
                    } else {
                        seconds.into()
                    }
                };
                watchdog.look(start + seconds * SECOND, (0..3).map(turns))
            };
            assert_eq!(look(7, true), Word::Well, "seen for the first time");
            for seconds in 8..12 {
                assert_eq!(look(seconds, true), Word::Well, "it may have had to wait");
            }
            for seconds in 12..60 {
                assert_eq!(look(seconds, true), Word::Hangs(hangs));
            }
            assert_eq!(look(60, false), Word::Well, "it goes on");
        }
    }
}
