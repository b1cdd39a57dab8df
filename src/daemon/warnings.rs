//! What an administrator should know: which lines `status` still shows, and when one is logged
//! again.
//!
//! Owns the newest few lines. It reads no clock and logs nothing: the caller logs a line if told
//! to.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Warnings that `status` still shows.
const KEPT: usize = 8;

/// A line that is still kept is logged at most once in this time, so that a peer that repeats
/// itself does not fill the disk.
const PACE: Duration = Duration::from_secs(60);

/// The newest warnings.
#[derive(Debug, Default)]
pub(super) struct Warnings(VecDeque<Kept>);

#[derive(Debug)]
struct Kept {
    line: String,
    logged: Instant,
}

impl Warnings {
    /// Keeps `line` as the newest one; true if the caller has to log it.
    #[must_use]
    pub(super) fn keep(&mut self, now: Instant, line: String) -> bool {
        let known = self.0.iter().position(|kept| kept.line == line);
        let before = known.and_then(|at| self.0.remove(at));
        let fresh = before
            .as_ref()
            .is_none_or(|kept| now.saturating_duration_since(kept.logged) >= PACE);
        let logged = before.map_or(now, |kept| if fresh { now } else { kept.logged });
        if self.0.len() == KEPT {
            self.0.pop_front();
        }
        self.0.push_back(Kept { line, logged });
        fresh
    }

    /// The lines that are kept, newest last.
    pub(super) fn lines(&self) -> Vec<String> {
        self.0.iter().map(|kept| kept.line.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::epoch;

    #[test]
    fn the_newest_are_kept_each_once() {
        let (mut warnings, now) = (Warnings::default(), epoch());
        for number in 0..20 {
            assert!(warnings.keep(now, format!("line {number}")));
        }
        assert!(!warnings.keep(now, "line 15".into()));
        let lines = warnings.lines();
        assert_eq!(lines.len(), KEPT);
        assert_eq!(lines.first().unwrap(), "line 12");
        assert_eq!(lines.last().unwrap(), "line 15");
    }

    #[test]
    fn the_same_line_is_logged_once_a_minute() {
        let (mut warnings, now) = (Warnings::default(), epoch());
        let logged = (0..600)
            .filter(|&seconds| {
                let at = now + Duration::from_secs(seconds);
                warnings.keep(at, "again and again".into())
            })
            .count();
        assert_eq!(logged, 10);
        assert_eq!(warnings.lines(), ["again and again"]);
    }
}
