//! Whether the new server's daemon is too old to read what has moved: prefixes, and more than 64
//! moves, are announced in a form that is newer than the rest, and nothing tells the sender that it
//! was not read.
//!
//! Owns the sign of it. A daemon that knows the form says what it sees of the clients
//! (`served` in the status), and says so soon after the tunnel is up even if there is nothing.

use std::time::{Duration, Instant};

use crate::channel::tunnel::State;

/// How long the tunnel is up by the time that a daemon which says what it sees has done so: it does
/// four times, five seconds apart.
const SAYS_WITHIN: Duration = Duration::from_secs(30);

/// What one peer has said.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Older {
    up: Option<Instant>,
    says: bool,
    told: bool,
}

impl Older {
    /// The peer came or went. Whoever comes may be another version.
    pub(super) fn is(&mut self, now: Instant, state: State) {
        match state {
            State::Up => self.up = self.up.or(Some(now)),
            State::Down | State::Connecting => *self = Self::default(),
        }
    }

    /// It says what it sees.
    pub(super) fn says(&mut self) {
        self.says = true;
    }

    /// Whether it is known from now on that it does not.
    pub(super) fn is_news(&mut self, now: Instant) -> bool {
        let up = |up| now.saturating_duration_since(up) >= SAYS_WITHIN;
        let news = !self.told && !self.says && self.up.is_some_and(up);
        self.told |= news;
        news
    }
}
