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
    /// The newest that was given, until it is withdrawn.
    given: Option<Warning>,
}

impl Pace {
    /// Something to warn of, in place of what still waits. Returns it if it is time.
    pub(super) fn offer(&mut self, now: Instant, warning: Warning) -> Option<Warning> {
        self.waiting = Some(warning);
        self.due(now)
    }

    /// As [`offer`](Self::offer), where what was given before is no longer true if it was another
    /// one: that is returned first.
    pub(super) fn replace(
        &mut self,
        now: Instant,
        warning: Warning,
    ) -> (Option<Warning>, Option<Warning>) {
        let over = self.given.take_if(|given| *given != warning);
        (over, self.offer(now, warning))
    }

    /// What waited is no longer true, nor what was given: that is returned.
    pub(super) fn withdraw(&mut self) -> Option<Warning> {
        self.waiting = None;
        self.given.take()
    }

    /// What is due now.
    pub(super) fn due(&mut self, now: Instant) -> Option<Warning> {
        if self.next.is_some_and(|next| now < next) {
            return None;
        }
        let due = self.waiting.take()?;
        self.next = Some(now + PACE);
        self.given = Some(due.clone());
        Some(due)
    }
}
