//! What the new server may begin on the old one (`--allow-outgoing`), and how fast.
//!
//! Owns the question whether a packet that answers nobody is allowed. What becomes of it is
//! [`gate`](super::gate)'s business. Must not touch sockets, devices or the clock.

use std::sync::Mutex;
use std::time::Instant;

use crate::flow::lock;
use crate::model::budget::{Budget, Limit};
use crate::model::drops::DropReason;
use crate::model::outgoing::AllowOutgoing;
use crate::packet::{ACK, Kind, Parsed, SYN};

/// Connections that a new server may begin: far more than a busy mail server does, and far fewer
/// than a flood, should somebody take it over. (Connections that answer clients do not count.)
const PACE: Limit = Limit {
    per_second: 1_000,
    at_once: 4_000,
};

/// The rules of one peer.
#[derive(Debug)]
pub(super) struct Allowed {
    rules: Vec<AllowOutgoing>,
    budget: Mutex<Budget>,
}

impl Allowed {
    /// Without rules nothing is allowed.
    pub(super) fn new(rules: Vec<AllowOutgoing>) -> Self {
        Self {
            rules,
            budget: Mutex::new(Budget::new(PACE)),
        }
    }

    /// Whether anything is allowed.
    pub(super) fn is_any(&self) -> bool {
        !self.rules.is_empty()
    }

    /// Whether a rule takes what has these ports: of the new server, and of whom it speaks to.
    pub(super) fn names(&self, protocol: u8, query: bool, source: u16, destination: u16) -> bool {
        let takes = |rule: &AllowOutgoing| rule.takes(protocol, query, source, destination);
        self.rules.iter().any(takes)
    }

    /// Whether a packet of which no flow is known may begin one. `None` if it begins none, or if
    /// nothing may.
    ///
    /// # Errors
    /// [`DropReason::OutgoingNotAllowed`], [`DropReason::OutgoingLimited`].
    pub(super) fn judge(&self, now: Instant, parsed: &Parsed) -> Option<Result<(), DropReason>> {
        let (begins, query) = match parsed.kind() {
            Kind::Tcp => (parsed.tcp_flags() & (SYN | ACK) == SYN, false),
            Kind::IcmpQuery => (true, true),
            Kind::Udp | Kind::Other => (true, false),
            Kind::IcmpReply | Kind::IcmpError | Kind::LaterFragment => (false, false),
        };
        if !begins || self.rules.is_empty() {
            return None;
        }
        let (source, destination) = (parsed.src_port(), parsed.dst_port());
        if !self.names(parsed.protocol(), query, source, destination) {
            return Some(Err(DropReason::OutgoingNotAllowed));
        }
        if !lock(&self.budget).spend(now, 1) {
            return Some(Err(DropReason::OutgoingLimited));
        }
        Some(Ok(()))
    }
}
