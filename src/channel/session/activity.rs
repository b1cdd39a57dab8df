//! When something last came from a peer, and last went to it. Lanes write it; the tunnel's timers
//! read it.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// When anything last came from a peer and went to it, on whatever session and lane.
///
/// Lanes write it once a batch; the tunnel's timers read it. Times are microseconds since an epoch,
/// so that they fit an atomic. They are no coarser, because the tunnel needs to know whether a
/// reply came after its request, and a peer may be a tenth of a millisecond away.
#[derive(Debug)]
pub struct Activity {
    epoch: Instant,
    received: AtomicU64,
    data_sent: AtomicU64,
    control_sent: AtomicU64,
}

impl Activity {
    /// Least time between two writes of the lanes, in microseconds. All lanes share the cell, and
    /// no timer that depends on it is finer.
    const WRITE_PAUSE: u64 = 1_000;

    /// Starts a record at `epoch`, with nothing received and nothing sent.
    pub fn new(epoch: Instant) -> Self {
        Self {
            epoch,
            received: AtomicU64::new(0),
            data_sent: AtomicU64::new(0),
            control_sent: AtomicU64::new(0),
        }
    }

    /// An authenticated datagram came in. While many come in, the time is kept to the millisecond.
    pub fn data_received(&self, now: Instant) {
        self.raise(&self.received, now);
    }

    /// A handshake or control message came in. These are few, so the time is kept exactly.
    pub fn control_received(&self, now: Instant) {
        self.received.fetch_max(self.micros(now), Relaxed);
    }

    /// A packet went out.
    pub fn data_sent(&self, now: Instant) {
        self.raise(&self.data_sent, now);
    }

    /// A control message went out.
    pub fn control_sent(&self, now: Instant) {
        self.raise(&self.control_sent, now);
    }

    /// When a datagram last came in; `None` if none did.
    pub fn last_received(&self) -> Option<Instant> {
        self.read(&self.received)
    }

    /// When a datagram last went out; `None` if none did.
    pub fn last_sent(&self) -> Option<Instant> {
        self.last_data_sent().max(self.read(&self.control_sent))
    }

    /// When a packet last went out; `None` if none did.
    pub fn last_data_sent(&self) -> Option<Instant> {
        self.read(&self.data_sent)
    }

    fn raise(&self, cell: &AtomicU64, now: Instant) {
        let (micros, known) = (self.micros(now), cell.load(Relaxed));
        if known == 0 || known + Self::WRITE_PAUSE <= micros {
            cell.fetch_max(micros, Relaxed);
        }
    }

    /// Microseconds since the epoch plus one, since 0 means never.
    fn micros(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.epoch).as_micros() as u64 + 1
    }

    fn read(&self, cell: &AtomicU64) -> Option<Instant> {
        let micros = cell.load(Relaxed).checked_sub(1)?;
        self.epoch.checked_add(Duration::from_micros(micros))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::epoch;

    #[test]
    fn datagrams_are_timed_to_the_millisecond_and_control_messages_exactly() {
        let epoch = epoch();
        let activity = Activity::new(epoch);
        let at = |micros| epoch + Duration::from_micros(micros);
        assert_eq!(activity.last_received(), None);
        activity.data_received(at(300));
        assert_eq!(activity.last_received(), Some(at(300)), "the first");
        activity.data_received(at(1_299));
        assert_eq!(activity.last_received(), Some(at(300)), "within the pause");
        activity.data_received(at(1_300));
        assert_eq!(activity.last_received(), Some(at(1_300)));
        activity.control_received(at(1_400));
        assert_eq!(activity.last_received(), Some(at(1_400)));
        activity.control_received(at(1_350));
        assert_eq!(
            activity.last_received(),
            Some(at(1_400)),
            "a later one was first"
        );
        assert_eq!(
            (activity.last_data_sent(), activity.last_sent()),
            (None, None)
        );
        activity.control_sent(at(0));
        assert_eq!(activity.last_sent(), Some(at(0)));
    }
}
