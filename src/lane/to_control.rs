//! What a lane passes to the control task, and how much of it may wait there.
//!
//! Owns the messages and the bound for each peer ([`Waiting`]). A message carries a permit, its
//! place in the share of its peer. Whoever drops the message gives the place back.

use std::io;
use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::channel::session::{Admitted, Session};
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
}

/// What one peer may have waiting for the control task, so that a flood in one peer's name never
/// keeps another's messages out.
#[derive(Debug)]
pub struct Waiting {
    handshakes: Arc<Semaphore>,
    messages: Arc<Semaphore>,
}

/// In which of a peer's two queues something waits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Queue {
    /// Handshake messages. Anybody who has recorded some can send them again.
    Handshakes,
    /// Messages inside a session. Only the peer can make them.
    Messages,
}

impl Waiting {
    /// The most that all peers together may have waiting.
    pub const fn limit(peers: usize) -> usize {
        peers * (Queue::Handshakes.limit() + Queue::Messages.limit())
    }

    /// Takes a place; `None` if there is none. Dropping the permit gives the place back.
    pub(super) fn enter(&self, queue: Queue) -> Option<OwnedSemaphorePermit> {
        let places = match queue {
            Queue::Handshakes => &self.handshakes,
            Queue::Messages => &self.messages,
        };
        Arc::clone(places).try_acquire_owned().ok()
    }
}

impl Default for Waiting {
    fn default() -> Self {
        let places = |queue: Queue| Arc::new(Semaphore::new(queue.limit()));
        Self {
            handshakes: places(Queue::Handshakes),
            messages: places(Queue::Messages),
        }
    }
}

impl Queue {
    /// Most that may wait. A peer has at most four initiations under way. It says at most 17 parts
    /// of an announcement, their acknowledgements and a few more at once.
    const fn limit(self) -> usize {
        match self {
            Self::Handshakes => 16,
            Self::Messages => 64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_handshakes_takes_no_place_of_messages() {
        let waiting = Waiting::default();
        let enter = || waiting.enter(Queue::Handshakes);
        let mut taken: Vec<_> = std::iter::from_fn(enter).collect();
        assert_eq!(taken.len(), Queue::Handshakes.limit());
        assert!(waiting.enter(Queue::Messages).is_some());
        taken.pop();
        taken.extend(enter());
        assert_eq!(taken.len(), Queue::Handshakes.limit(), "given back");
        assert!(enter().is_none());
        assert_eq!(Waiting::limit(3), 240);
    }
}
