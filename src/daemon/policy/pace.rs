//! How often an administrator is told the same kind of thing about one peer.
//!
//! Owns the pace. What a peer does makes such warnings, and it can do that as often as it likes.

use std::time::{Duration, Instant};

use super::Warning;

/// A kind of warning comes at most once in this time for each peer.
pub(super) const PACE: Duration = Duration::from_secs(60);

/// One kind of warning about one peer.
#[derive(Debug, Default)]
pub(super) struct Pace {
    next: Option<Instant>,
    /// The newest warning that came too early.
    waiting: Option<Warning>,
}

impl Pace {
    /// Something to warn of, in place of what still waits. Returns it if it is time.
    pub(super) fn offer(&mut self, now: Instant, warning: Warning) -> Option<Warning> {
        self.waiting = Some(warning);
        self.due(now)
    }

    /// What waited is no longer true.
    pub(super) fn withdraw(&mut self) {
        self.waiting = None;
    }

    /// What is due now.
    pub(super) fn due(&mut self, now: Instant) -> Option<Warning> {
        if self.next.is_some_and(|next| now < next) {
            return None;
        }
        let due = self.waiting.take()?;
        self.next = Some(now + PACE);
        Some(due)
    }
}
