//! Which initiations of checks (`ipmoved check`) were answered: each is answered once.
//!
//! A check makes no session, and its clock may be wrong: that is one of the things it is to find
//! out. So its timestamps must not move the floor of those that make sessions, or a check with a
//! clock that is ahead would shut the peer's daemon out. They have this memory of their own, which
//! takes them in any order: after a check whose clock was ahead the next one, with the clock put
//! right, is answered as well.
//!
//! A daemon that takes over from another one is another run, and begins with none of it. All that
//! comes of that is one more answer to each recording, which whoever plays it back cannot read.
//!
//! Owns the memory. Nothing in here ever answers the same timestamp twice, however many there were.

use std::collections::BTreeSet;

/// Most timestamps that are remembered. A check takes one for each question (eight at most) and
/// each try. So dozens of checks with a clock that is ahead are needed before those with a right
/// one are refused, until this run ends.
const MOST: usize = 256;

/// The timestamps of checks that were answered.
#[derive(Debug, Default)]
pub(super) struct Checked {
    /// The highest that is not remembered any more. What is not above counts as answered.
    floor: u64,
    answered: BTreeSet<u64>,
}

impl Checked {
    /// Whether a check with this timestamp was not answered yet.
    pub(super) fn is_new(&self, timestamp: u64) -> bool {
        timestamp > self.floor && !self.answered.contains(&timestamp)
    }

    /// It is answered now. The lowest gives way: a recording of it stays refused.
    pub(super) fn remember(&mut self, timestamp: u64) {
        self.answered.insert(timestamp);
        if self.answered.len() > MOST
            && let Some(lowest) = self.answered.pop_first()
        {
            self.floor = self.floor.max(lowest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_clock_that_was_ahead_shuts_no_later_check_out() {
        let mut checked = Checked::default();
        let (ahead, right) = (1_000_000, 1_000);
        for at in ahead..ahead + 8 {
            assert!(checked.is_new(at));
            checked.remember(at);
        }
        // As many as there may be: those of before stay refused, and leave room.
        for at in right..right + 4 * MOST as u64 {
            assert!(checked.is_new(at), "{at}");
            checked.remember(at);
        }
        assert!((ahead..ahead + 8).all(|at| !checked.is_new(at)));
    }

    proptest! {
        #[test]
        fn nothing_is_answered_twice_and_memory_is_bounded(
            timestamps in proptest::collection::vec(0u64..1_000, 0..2_000),
        ) {
            let (mut checked, mut answered) = (Checked::default(), BTreeSet::new());
            for timestamp in timestamps {
                if checked.is_new(timestamp) {
                    checked.remember(timestamp);
                    prop_assert!(answered.insert(timestamp), "{} twice", timestamp);
                }
                prop_assert!(checked.answered.len() <= MOST);
            }
        }
    }
}
