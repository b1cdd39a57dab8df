//! A budget: how much may be done at once, and how much more with time (a token bucket).
//!
//! Owns the arithmetic. What is counted, and what happens when the budget is used up, is the
//! business of whoever has one. It reads no clock.

use std::time::Instant;

/// Parts of one unit that are counted: as many as a second has nanoseconds, so that no time is too
/// short to add something.
const PARTS: u64 = 1_000_000_000;

/// What may be spent. It fills up evenly, not once a second: so whoever comes at a time that a
/// flood cannot foresee finds something left with the same chance as each message of the flood.
#[derive(Debug)]
pub struct Budget {
    limit: Limit,
    /// In [`PARTS`] of a unit.
    left: u64,
    filled: Option<Instant>,
}

/// How large a [`Budget`] is.
#[derive(Clone, Copy, Debug)]
pub struct Limit {
    /// Units that are added in a second.
    pub per_second: u32,
    /// Units that may be spent at once.
    pub at_once: u32,
}

impl Budget {
    /// A full budget.
    pub fn new(limit: Limit) -> Self {
        Self {
            limit,
            left: u64::from(limit.at_once) * PARTS,
            filled: None,
        }
    }

    /// Spends so many units; false, and nothing is spent, if there are not as many.
    pub fn spend(&mut self, now: Instant, units: u32) -> bool {
        self.fill(now);
        let cost = u64::from(units) * PARTS;
        let enough = self.left >= cost;
        if enough {
            self.left -= cost;
        }
        enough
    }

    /// Gives back what was spent.
    pub fn give_back(&mut self, units: u32) {
        self.add(u64::from(units) * PARTS);
    }

    fn fill(&mut self, now: Instant) {
        let since = self.filled.map(|at| now.saturating_duration_since(at));
        // A time before the last one adds nothing, and does not count twice later.
        self.filled = self.filled.max(Some(now));
        let nanos = since.map_or(0, |since| since.as_nanos());
        let nanos = u64::try_from(nanos).unwrap_or(u64::MAX);
        self.add(nanos.saturating_mul(u64::from(self.limit.per_second)));
    }

    fn add(&mut self, parts: u64) {
        let full = u64::from(self.limit.at_once) * PARTS;
        self.left = self.left.saturating_add(parts).min(full);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::epoch;
    use std::time::Duration;

    const LIMIT: Limit = Limit {
        per_second: 10,
        at_once: 4,
    };

    #[test]
    fn it_is_spent_at_once_and_fills_up_evenly() {
        let (mut budget, now) = (Budget::new(LIMIT), epoch());
        assert!(budget.spend(now, 3) && !budget.spend(now, 2) && budget.spend(now, 1));
        let soon = now + Duration::from_millis(99);
        assert!(!budget.spend(soon, 1));
        assert!(budget.spend(now + Duration::from_millis(100), 1));
        // Time that goes back adds nothing.
        assert!(!budget.spend(now, 1) && !budget.spend(soon, 1));
        // It holds no more than it may.
        let later = now + Duration::from_secs(u64::from(u32::MAX));
        assert!(budget.spend(later, 4) && !budget.spend(later, 1));
        budget.give_back(9);
        assert!(budget.spend(later, 4) && !budget.spend(later, 1));
    }

    #[test]
    fn over_a_long_time_no_more_is_spent_than_was_added() {
        let (mut budget, now) = (Budget::new(LIMIT), epoch());
        let spent = (0..100_000)
            .filter(|&millis| budget.spend(now + Duration::from_micros(100 * millis), 1))
            .count();
        assert!((100..=104).contains(&spent), "{spent} in ten seconds");
    }
}
