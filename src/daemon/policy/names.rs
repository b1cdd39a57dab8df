//! When a peer's name is looked up again: while the peer does not answer, since its address may
//! have changed.
//!
//! Owns the pace. The control task does the look-up, which takes as long as the resolver does.

use std::time::{Duration, Instant};

/// How often a name is looked up again while the peer does not answer.
const PACE: Duration = Duration::from_secs(10);

/// One peer's name.
#[derive(Debug)]
pub(super) struct Lookup {
    next: Instant,
    running: bool,
    /// How often a look-up was wanted.
    turn: usize,
    /// Why the last look-up failed.
    failure: Option<String>,
}

impl Lookup {
    /// A name that was looked up just now.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            next: now + PACE,
            running: false,
            turn: 0,
            failure: None,
        }
    }

    /// The peer came or went. If it does not answer, its name is looked up at once.
    pub(super) fn hurry(&mut self, now: Instant) {
        self.next = now;
    }

    /// Which turn is due now, if any. Whoever asks then has to look the name up.
    pub(super) fn due(&mut self, now: Instant, up: bool) -> Option<usize> {
        if up || self.running || now < self.next {
            return None;
        }
        self.running = true;
        self.next = now + PACE;
        self.turn += 1;
        Some(self.turn)
    }

    /// A look-up ended; true if it came out differently from the last one.
    pub(super) fn done(&mut self, failure: Option<&String>) -> bool {
        self.running = false;
        let news = self.failure.as_ref() != failure;
        self.failure = failure.cloned();
        news
    }
}
