//! How busy a lane is, and whether it should have a helper thread.
//!
//! Owns the measure ([`Load`]), its limits, and the count of busy lanes ([`BusyLanes`]). Starts no
//! thread: that is the business of [`super::helper`].

use std::mem;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// How often the load of a lane with a helper thread is looked at, if nothing else wakes the lane.
pub(super) const LONG_WINDOW: Duration = Duration::from_millis(50);

/// How many lanes have more to do than one thread can, and how many processors there are.
///
/// A helper thread that has to wait for a processor only takes turns with the lane's own thread.
/// Helpers are for lanes that leave processors idle, as one busy stream does.
#[derive(Debug)]
pub struct BusyLanes {
    processors: usize,
    busy: AtomicUsize,
}

impl BusyLanes {
    /// Starts with no busy lane.
    pub fn new(processors: usize) -> Self {
        Self {
            processors,
            busy: AtomicUsize::new(0),
        }
    }

    /// Whether every busy lane can have two processors.
    fn has_spare_processors(&self) -> bool {
        2 * self.busy.load(Relaxed) <= self.processors
    }

    fn set_busy(&self, was: bool, is: bool) {
        match (was, is) {
            (false, true) => _ = self.busy.fetch_add(1, Relaxed),
            (true, false) => _ = self.busy.fetch_sub(1, Relaxed),
            _ => {}
        }
    }
}

/// How busy a lane is, and whether it should therefore have a helper thread.
#[derive(Debug)]
pub(super) struct Load {
    since: Instant,
    /// Time spent on the outbound direction after `since`.
    out: Duration,
    /// Time spent on the inbound direction after `since`.
    into: Duration,
    /// How long the helper had been awake, since it was started, when `into` last took it in.
    helper: Duration,
    is_busy: bool,
    wants_helper: bool,
}

impl Load {
    /// A lane that is idle.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            since: now,
            out: Duration::ZERO,
            into: Duration::ZERO,
            helper: Duration::ZERO,
            is_busy: false,
            wants_helper: false,
        }
    }

    /// Takes in how long the lane's own thread has just spent on the outbound and on the inbound
    /// direction, and how long the helper has been awake since it was started.
    ///
    /// Returns whether the lane should have a helper from `now` on.
    pub(super) fn note(
        &mut self,
        now: Instant,
        [out, into]: [Duration; 2],
        helper: Duration,
        busy_lanes: &BusyLanes,
    ) -> bool {
        self.out += out;
        self.into += into;
        let limits = if self.wants_helper { STAY } else { BEGIN };
        let window = now.saturating_duration_since(self.since);
        if window >= limits.window {
            self.into += helper.saturating_sub(mem::replace(&mut self.helper, helper));
            let is_above = |share| self.out + self.into >= window.mul_f64(share);
            let leans_out = self.out >= self.into.mul_f64(limits.lean);
            self.wants_helper = leans_out && is_above(limits.share);
            let is_busy = is_above(if self.is_busy {
                STAY.share
            } else {
                BEGIN.share
            });
            busy_lanes.set_busy(self.is_busy, is_busy);
            self.is_busy = is_busy;
            (self.since, self.out, self.into) = (now, Duration::ZERO, Duration::ZERO);
        }
        self.wants_helper &= busy_lanes.has_spare_processors();
        self.wants_helper
    }

    /// The lane ends, and counts as busy no more.
    pub(super) fn end(&mut self, busy_lanes: &BusyLanes) {
        busy_lanes.set_busy(mem::take(&mut self.is_busy), false);
    }
}

/// When a lane gets a helper thread, and when it keeps it.
struct Limits {
    /// How long the lane is watched before it is judged.
    window: Duration,
    /// Least share of one thread's time that the lane is awake: running, or waiting for a processor
    /// or for space in the send buffer. Inbound packets should not wait for such space.
    share: f64,
    /// Least ratio of the time spent outbound to the time spent inbound.
    ///
    /// The host's own stack replies to an inbound packet within the very write that hands it over.
    /// Where that is most of the work, one thread does both with fewer wake-ups.
    lean: f64,
}

/// For a lane to get a helper. The window is some hundreds of super-packets at full speed: too
/// short for anybody to notice, and long enough that one delay by the scheduler does not make a
/// lane look busy.
const BEGIN: Limits = Limits {
    window: Duration::from_millis(20),
    share: 0.9,
    lean: 3.0,
};

/// For a lane to keep its helper: a longer window and lower limits, so that helpers do not come and
/// go.
const STAY: Limits = Limits {
    window: LONG_WINDOW,
    share: 0.7,
    lean: 1.5,
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::epoch;

    const MS: Duration = Duration::from_millis(1);

    /// Whether a lane ends up with a helper if it spends these shares of each millisecond on the
    /// outbound direction and, in its helper, on the inbound one.
    fn lasts(load: &mut Load, now: &mut Instant, shares: [f64; 2], busy_lanes: &BusyLanes) -> bool {
        let mut wants = false;
        let mut helper = load.helper;
        for _ in 0..200 {
            *now += MS;
            helper += MS.mul_f64(shares[1]);
            let own = [MS.mul_f64(shares[0]), Duration::ZERO];
            wants = load.note(*now, own, helper, busy_lanes);
        }
        wants
    }

    #[test]
    fn only_a_lane_that_does_not_sleep_gets_a_helper_and_keeps_it_while_it_needs_it() {
        let (busy_lanes, mut now) = (BusyLanes::new(2), epoch());
        let mut load = Load::new(now);
        assert!(!lasts(&mut load, &mut now, [0.7, 0.1], &busy_lanes));
        assert!(lasts(&mut load, &mut now, [0.75, 0.2], &busy_lanes));
        assert!(
            lasts(&mut load, &mut now, [0.6, 0.2], &busy_lanes),
            "0.8 of one"
        );
        assert!(!lasts(&mut load, &mut now, [0.5, 0.1], &busy_lanes));
        assert!(!lasts(&mut load, &mut now, [0.7, 0.1], &busy_lanes));
        assert_eq!(busy_lanes.busy.load(Relaxed), 0);
    }

    #[test]
    fn a_mostly_inbound_lane_keeps_one_thread() {
        let (busy_lanes, mut now) = (BusyLanes::new(2), epoch());
        let mut load = Load::new(now);
        assert!(!lasts(&mut load, &mut now, [0.3, 0.7], &busy_lanes));
        assert!(!lasts(&mut load, &mut now, [0.5, 0.5], &busy_lanes));
        assert!(
            !lasts(&mut load, &mut now, [0.7, 0.3], &busy_lanes),
            "busy, but not to begin with"
        );
        load.end(&busy_lanes);
        let mut load = Load::new(now);
        assert!(lasts(&mut load, &mut now, [0.8, 0.2], &busy_lanes));
        assert!(
            lasts(&mut load, &mut now, [0.8, 0.5], &busy_lanes),
            "a little less"
        );
        assert!(!lasts(&mut load, &mut now, [0.4, 0.7], &busy_lanes));
    }

    #[test]
    fn as_many_busy_lanes_as_processors_have_one_thread_each() {
        let (busy_lanes, mut now) = (BusyLanes::new(2), epoch());
        let (mut one, mut other) = (Load::new(now), Load::new(now));
        assert!(lasts(&mut one, &mut now, [1.0, 0.0], &busy_lanes));
        assert!(!lasts(&mut other, &mut now, [1.0, 0.0], &busy_lanes));
        assert!(!lasts(&mut one, &mut now, [1.0, 0.2], &busy_lanes));
        other.end(&busy_lanes);
        assert!(lasts(&mut one, &mut now, [1.0, 0.2], &busy_lanes));
        one.end(&busy_lanes);
        assert_eq!(busy_lanes.busy.load(Relaxed), 0);
    }

    #[test]
    fn a_long_sleep_is_no_load() {
        let (busy_lanes, mut now) = (BusyLanes::new(8), epoch());
        let mut load = Load::new(now);
        let spent = |out| [out, Duration::ZERO];
        now += Duration::from_secs(60);
        assert!(!load.note(now, spent(MS), Duration::ZERO, &busy_lanes));
        now += 19 * MS;
        assert!(
            !load.note(now, spent(19 * MS), Duration::ZERO, &busy_lanes),
            "too short"
        );
        now += MS;
        assert!(load.note(now, spent(MS), Duration::ZERO, &busy_lanes));
    }
}
