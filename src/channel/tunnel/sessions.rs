//! The sessions that both sides agreed on, and which of them is sent on.

use std::sync::Arc;
use std::time::Instant;

use crate::channel::session::Session;
use crate::model::peer::Role;

/// What both sides know of how a session was asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Origin {
    pub(super) initiator: Role,
    pub(super) timestamp: u64,
    /// The highest timestamp that the initiator had accepted from the responder.
    pub(super) seen: u64,
}

impl Origin {
    /// Whether this session is sent on rather than `other`. Both sides answer alike, for it is made only
    /// of what both know: of two sessions of one initiator the later one; of two of different initiators
    /// the one that was asked for in knowledge of the other; if their initiations crossed, the one that
    /// the old server asked for.
    pub(super) fn supersedes(&self, other: &Self) -> bool {
        if self.initiator == other.initiator {
            self.timestamp > other.timestamp
        } else if self.seen >= other.timestamp {
            true
        } else if other.seen >= self.timestamp {
            false
        } else {
            self.initiator == Role::Old
        }
    }
}

/// A session and what the tunnel knows of it.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) session: Arc<Session>,
    pub(super) origin: Origin,
    /// Which run of the peer's daemon agreed to it.
    pub(super) peer_run: u64,
    /// The peer proved that it holds the keys: it may be sent on.
    pub(super) usable: bool,
    /// When the peer is next shown that we hold the keys; for the initiator, until it is heard.
    pub(super) confirm_at: Option<Instant>,
}

impl Held {
    pub(super) fn supersedes(&self, other: &Self) -> bool {
        // A restarted peer has lost every session of its last run.
        self.peer_run != other.peer_run || self.origin.supersedes(&other.origin)
    }
}
