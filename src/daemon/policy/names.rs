//! When a peer's name is looked up again: while the peer does not answer, since its address may
//! have changed.
//!
//! Owns the pace. The looking up takes as long as a resolver may, and is the control task's
//! business.

use std::time::{Duration, Instant};

/// How often a name is looked up again while the peer does not answer.
const PACE: Duration = Duration::from_secs(10);

/// One peer's name.
#[derive(Debug)]
pub(super) struct Lookup {
    next: Instant,
    running: bool,
    /// How often it was asked for.
    turn: usize,
    /// What the last one failed with.
    failure: Option<String>,
}

impl Lookup {
    /// It was looked up just now.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            next: now + PACE,
            running: false,
            turn: 0,
            failure: None,
        }
    }

    /// The peer came or went: if it does not answer, no time is to be lost.
    pub(super) fn hurry(&mut self, now: Instant) {
        self.next = now;
    }

    /// Whether it is to be looked up now, and for which time; that it is, is taken for granted.
    pub(super) fn due(&mut self, now: Instant, up: bool) -> Option<usize> {
        if up || self.running || now < self.next {
            return None;
        }
        self.running = true;
        self.next = now + PACE;
        self.turn += 1;
        Some(self.turn)
    }

    /// It was looked up; true if it came to something else than the last time.
    pub(super) fn done(&mut self, failure: Option<&String>) -> bool {
        self.running = false;
        let news = self.failure.as_ref() != failure;
        self.failure = failure.cloned();
        news
    }
}
