//! What a peer may cause once a second.
//!
//! Owns the pace. Of what comes meanwhile the newest waits, so nothing is lost but what was
//! overtaken.

use std::time::{Duration, Instant};

/// Least time between two values that are looked at.
const PACE: Duration = Duration::from_secs(1);

/// The newest value, and when to look at it.
#[derive(Debug)]
pub(super) struct Paced<T> {
    waiting: Option<T>,
    next: Option<Instant>,
}

impl<T> Default for Paced<T> {
    fn default() -> Self {
        Self {
            waiting: None,
            next: None,
        }
    }
}

impl<T> Paced<T> {
    /// Lets a value wait in place of the one before it. Then ask whether it is due already.
    pub(super) fn put(&mut self, value: T) {
        self.waiting = Some(value);
    }

    /// When the value that waits is due.
    pub(super) fn due(&self) -> Option<Instant> {
        self.waiting.as_ref().and(self.next)
    }

    /// The value that is due now.
    pub(super) fn take(&mut self, now: Instant) -> Option<T> {
        if self.next.is_some_and(|next| now < next) {
            return None;
        }
        let value = self.waiting.take()?;
        self.next = Some(now + PACE);
        Some(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::epoch;

    #[test]
    fn one_a_second_and_the_newest_in_the_end() {
        let (mut paced, start) = (Paced::default(), epoch());
        let mut taken = Vec::new();
        for millis in 0..3_500 {
            let now = start + Duration::from_millis(millis);
            if millis < 2_500 {
                paced.put(millis);
            }
            taken.extend(paced.take(now));
        }
        assert_eq!(taken, [0, 1_000, 2_000, 2_499]);
        assert_eq!(paced.due(), None);
        paced.put(0);
        assert_eq!(paced.due(), Some(start + 4 * PACE));
    }
}
