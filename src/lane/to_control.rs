//! What a lane passes to the control task, and how much of it may wait there.
//!
//! Owns the messages and the bound for each peer ([`Waiting`]). A message carries a permit, its
//! place in the share of its peer. Whoever drops the message gives the place back.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::channel::session::{Admitted, MOST_AT_ONCE, Session};
use crate::model::budget::{Budget, Limit};
use crate::model::peer::Endpoint;

/// What a lane passes to the control task.
pub enum ToControl {
    /// A handshake message that was made with a peer's key.
    Handshake {
        /// Where it came from.
        endpoint: Endpoint,
        /// The message.
        admitted: Admitted,
        /// Its place in its peer's share.
        _permit: OwnedSemaphorePermit,
    },
    /// A control message that was authenticated.
    Control {
        /// The session it came in.
        session: Arc<Session>,
        /// Where it came from, if that says something new about where the peer is.
        heard_from: Option<Endpoint>,
        /// The plaintext, truncated to the longest message that can mean anything.
        message: Vec<u8>,
        /// Its place in its peer's share.
        _permit: OwnedSemaphorePermit,
    },
    /// A datagram came from the peer: the first on a session, or one from elsewhere than before.
    Heard {
        /// The session.
        session: Arc<Session>,
        /// Where it came from.
        endpoint: Endpoint,
        /// Its place in its peer's share.
        _permit: OwnedSemaphorePermit,
    },
    /// The lane cannot go on.
    Failed(LaneError),
}

/// Why a lane cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum LaneError {
    /// The kernel no longer says when packets come.
    #[error("waiting for packets failed: {0}")]
    Wait(#[source] io::Error),
    /// Somebody took the TUN away.
    #[error("the TUN interface is gone: {0}")]
    TunGone(#[source] io::Error),
    /// The inbound direction is lost with its thread.
    #[error("the thread that takes packets out of the tunnel crashed")]
    HelperCrashed,
    /// There would be nobody to release what is held.
    #[error("cannot start the thread that releases what was held: {0}")]
    NoRelease(#[source] io::Error),
    /// What was held is lost with its thread.
    #[error("the thread that releases what was held crashed")]
    ReleaseCrashed,
}

/// What one peer may have waiting for the control task, and how much it may send there in a second.
/// So a flood in one peer's name neither keeps another's messages out nor takes the time they need.
#[derive(Debug)]
pub struct Waiting {
    handshakes: Places,
    messages: Places,
    sightings: Places,
}

/// In which of a peer's queues something waits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Queue {
    /// Handshake messages. Anybody who has recorded some can send them again.
    Handshakes,
    /// Messages inside a session. Only the peer can make them.
    Messages,
    /// News of where a peer's packets come from. Whoever is on the path can make each of them come
    /// from elsewhere.
    Sightings,
}

/// The places of one queue of one peer.
#[derive(Debug)]
struct Places {
    free: Arc<Semaphore>,
    budget: Mutex<Budget>,
}

impl Waiting {
    /// The most that all peers together may have waiting.
    pub const fn limit(peers: usize) -> usize {
        let each = Queue::Handshakes.limit().at_once
            + Queue::Messages.limit().at_once
            + Queue::Sightings.limit().at_once;
        peers * each as usize
    }

    /// Takes a place; `None` if there is none, or if too many were taken of late. Dropping the
    /// permit gives the place back.
    pub(super) fn enter(&self, now: Instant, queue: Queue) -> Option<OwnedSemaphorePermit> {
        let places = match queue {
            Queue::Handshakes => &self.handshakes,
            Queue::Messages => &self.messages,
            Queue::Sightings => &self.sightings,
        };
        let permit = Arc::clone(&places.free).try_acquire_owned().ok()?;
        let mut budget = places.budget.lock().unwrap_or_else(PoisonError::into_inner);
        budget.spend(now, 1).then_some(permit)
    }
}

impl Default for Waiting {
    fn default() -> Self {
        let places = |queue: Queue| Places {
            free: Arc::new(Semaphore::new(queue.limit().at_once as usize)),
            budget: Mutex::new(Budget::new(queue.limit())),
        };
        Self {
            handshakes: places(Queue::Handshakes),
            messages: places(Queue::Messages),
            sightings: places(Queue::Sightings),
        }
    }
}

impl Queue {
    /// Most that may wait, and most that may come in a second.
    const fn limit(self) -> Limit {
        match self {
            // The MAC check bounds what comes in a second.
            Self::Handshakes => Limit {
                per_second: u32::MAX,
                at_once: MOST_AT_ONCE,
            },
            // At once a peer says at most 17 parts of an announcement, their acknowledgements and a
            // few more; in a second no more than that, a ping, a probe and their replies.
            Self::Messages => Limit {
                per_second: 256,
                at_once: 64,
            },
            // A sighting that is refused is made up for by the next packet's.
            Self::Sightings => Limit {
                per_second: 16,
                at_once: 16,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::testing::epoch;
    use std::time::Duration;

    #[test]
    fn a_flood_of_handshakes_takes_no_place_of_messages() {
        let (waiting, now) = (Waiting::default(), epoch());
        let enter = || waiting.enter(now, Queue::Handshakes);
        let mut taken: Vec<_> = std::iter::from_fn(enter).collect();
        assert_eq!(taken.len(), MOST_AT_ONCE as usize);
        assert!(waiting.enter(now, Queue::Messages).is_some());
        taken.pop();
        let later = now + Duration::from_millis(1);
        taken.extend(waiting.enter(later, Queue::Handshakes));
        assert_eq!(taken.len(), MOST_AT_ONCE as usize, "given back");
        assert!(waiting.enter(later, Queue::Handshakes).is_none());
        assert_eq!(Waiting::limit(3), 384);
    }

    #[test]
    fn a_flood_of_messages_that_are_handled_at_once_is_bounded_too() {
        let (waiting, start) = (Waiting::default(), epoch());
        let mut passed = 0;
        for micros in (0..10_000_000).step_by(100) {
            let now = start + Duration::from_micros(micros);
            passed += usize::from(waiting.enter(now, Queue::Messages).is_some());
        }
        assert!((2_560..=2_640).contains(&passed), "{passed} in ten seconds");
    }
}
