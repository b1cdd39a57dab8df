//! The sessions that both sides agreed on, and the one that lanes send on.
//!
//! Owns the rules that the head of `tunnel` calls "Which session", and the bounds on how many
//! sessions there are. The tunnel does whatever follows from a change.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::event::Event;
use crate::channel::session::{Session, SessionSpec};
use crate::model::peer::Role;

/// Most initiations of ours that wait for a response. Retries go out each second at first, so even
/// a path with a round trip of four seconds ends in a session.
pub(super) const MAX_PENDING: usize = 4;

/// Most sessions that we granted and on which nothing was heard yet: more than the peer can have
/// pending.
pub(super) const MAX_UNCONFIRMED: usize = MAX_PENDING + 1;

/// Most sessions in use for receiving: the current one, the one before, and both of a crossing.
pub(super) const MAX_USABLE: usize = 4;

/// Time between the keepalives by which the initiator shows a new session to the responder, until
/// it hears the responder on it.
const CONFIRM_RETRY: Duration = Duration::from_millis(250);

/// What both sides know about how a session was asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Origin {
    pub(super) initiator: Role,
    pub(super) timestamp: u64,
    /// The highest timestamp that the initiator had accepted from the responder.
    pub(super) seen: u64,
}

impl Origin {
    /// Whether this session is sent on rather than `other`. Both sides come to the same result, for
    /// it rests only on what both know. Of two sessions of one initiator the later one wins. Of two
    /// with different initiators, the one that was asked for in knowledge of the other wins. If
    /// their initiations crossed, the one that the old server asked for wins.
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
pub(super) struct AgreedSession {
    pub(super) session: Arc<Session>,
    origin: Origin,
    /// The run of the peer's daemon that agreed to it.
    pub(super) peer_run: u64,
    /// The peer proved that it holds the keys, so lanes may send on it.
    pub(super) usable: bool,
    /// When to show the peer again that we hold the keys. The initiator does so until it hears the
    /// peer.
    pub(super) confirm_at: Option<Instant>,
    /// An earlier run of this daemon agreed to it.
    pub(super) inherited: bool,
}

impl AgreedSession {
    /// One that an earlier run of this daemon agreed to.
    pub(super) fn inherited(
        session: Arc<Session>,
        origin: Origin,
        peer_run: u64,
        usable: bool,
    ) -> Self {
        Self {
            session,
            origin,
            peer_run,
            usable,
            confirm_at: None,
            inherited: true,
        }
    }

    /// How it was asked for.
    pub(super) fn origin(&self) -> Origin {
        self.origin
    }

    fn index(&self) -> u32 {
        self.session.index()
    }

    fn supersedes(&self, other: &Self) -> bool {
        // A restarted peer has lost every session of its last run.
        self.peer_run != other.peer_run || self.origin.supersedes(&other.origin)
    }
}

/// What became of the session that lanes send on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub(super) enum Sending {
    /// It is the same as before, or there is still none.
    Unchanged,
    /// It is another one.
    Switched {
        /// There was none before.
        first: bool,
    },
    /// There is none any more.
    Lost,
}

/// All sessions of one peer, the oldest first.
#[derive(Default)]
pub(super) struct Sessions {
    all: Vec<AgreedSession>,
    /// Index of the session that lanes send on.
    sending: Option<u32>,
}

impl Sessions {
    /// The session that lanes send on.
    pub(super) fn current(&self) -> Option<&AgreedSession> {
        self.get(self.sending?)
    }

    /// Whether lanes were told to send on this session.
    pub(super) fn is_current(&self, index: u32) -> bool {
        self.sending == Some(index)
    }

    /// Whether lanes were told to send at all.
    pub(super) fn is_sending(&self) -> bool {
        self.sending.is_some()
    }

    pub(super) fn get(&self, index: u32) -> Option<&AgreedSession> {
        self.all.iter().find(|agreed| agreed.index() == index)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &AgreedSession> {
        self.all.iter()
    }

    /// A session on which a lane heard the peer first and could not tell the tunnel.
    pub(super) fn heard_but_not_usable(&self) -> Option<u32> {
        let unreported = |agreed: &&AgreedSession| !agreed.usable && agreed.session.is_heard();
        self.all.iter().find(unreported).map(AgreedSession::index)
    }

    /// Accepts a session for receiving. If there are too many, the oldest goes.
    pub(super) fn install(
        &mut self,
        spec: SessionSpec,
        origin: Origin,
        peer_run: u64,
        events: &mut VecDeque<Event>,
    ) -> Option<u32> {
        let session = Session::new(spec)?;
        let index = session.index();
        events.push_back(Event::SessionInstalled(Arc::clone(&session)));
        self.all.push(AgreedSession {
            session,
            origin,
            peer_run,
            usable: false,
            confirm_at: None,
            inherited: false,
        });
        self.evict(false, MAX_UNCONFIRMED, events);
        Some(index)
    }

    /// Takes up those of an earlier run, the oldest first, and sends on one of them.
    pub(super) fn inherit(
        &mut self,
        sessions: Vec<AgreedSession>,
        sending: Option<u32>,
        events: &mut VecDeque<Event>,
    ) {
        for agreed in &sessions {
            events.push_back(Event::SessionInstalled(Arc::clone(&agreed.session)));
        }
        self.all.extend(sessions);
        if let Some(index) = sending {
            let _ = self.send_on(index, events);
        }
    }

    /// Shows the peer from now on that we hold the keys of this session.
    pub(super) fn begin_confirming(&mut self, index: u32, now: Instant) {
        if let Some(agreed) = self.get_mut(index) {
            agreed.confirm_at = Some(now);
        }
    }

    /// The next session whose keys are due to be shown to the peer.
    pub(super) fn take_unconfirmed(&mut self, now: Instant) -> Option<Arc<Session>> {
        for agreed in &mut self.all {
            if agreed.session.is_heard() {
                agreed.confirm_at = None;
            }
        }
        let due = |agreed: &&mut AgreedSession| agreed.confirm_at.is_some_and(|due| now >= due);
        let agreed = self.all.iter_mut().find(due)?;
        agreed.confirm_at = Some(now + CONFIRM_RETRY);
        Some(Arc::clone(&agreed.session))
    }

    /// An authenticated datagram came in on a session; true if that is the proof it waited for.
    pub(super) fn heard(&mut self, index: u32) -> bool {
        self.get_mut(index).is_some_and(|agreed| {
            agreed.confirm_at = None;
            !agreed.usable
        })
    }

    /// The peer proved that it holds the keys of a session.
    pub(super) fn make_usable(&mut self, index: u32, events: &mut VecDeque<Event>) -> Sending {
        let Some(agreed) = self.get_mut(index) else {
            return Sending::Unchanged;
        };
        agreed.usable = true;
        let peer_run = agreed.peer_run;
        // Sessions that an earlier run of the peer asked for will never be used.
        self.remove_all(
            |agreed| !agreed.usable && agreed.peer_run != peer_run,
            events,
        );
        let switch = match (self.get(index), self.current()) {
            (Some(agreed), Some(current)) => agreed.supersedes(current),
            (Some(_), None) => true,
            (None, _) => false,
        };
        let sending = if switch {
            self.send_on(index, events)
        } else {
            Sending::Unchanged
        };
        // A session that lanes do not send on needs no proof of ours.
        for agreed in &mut self.all {
            if self.sending != Some(agreed.session.index()) {
                agreed.confirm_at = None;
            }
        }
        self.evict(true, MAX_USABLE, events);
        sending
    }

    /// Ends the sessions that are older than `life`. If the current one is among them, any other
    /// whose keys the peer proved to hold is better than none.
    pub(super) fn expire(
        &mut self,
        now: Instant,
        life: Duration,
        events: &mut VecDeque<Event>,
    ) -> Sending {
        self.remove_all(|agreed| now >= agreed.session.created() + life, events);
        if self.sending.is_none() || self.current().is_some() {
            return Sending::Unchanged;
        }
        let best = self
            .all
            .iter()
            .filter(|agreed| agreed.usable)
            .reduce(|best, agreed| {
                if agreed.supersedes(best) {
                    agreed
                } else {
                    best
                }
            })
            .map(AgreedSession::index);
        match best {
            Some(index) => self.send_on(index, events),
            None => Sending::Lost,
        }
    }

    /// Ends every session that this run of the peer agreed to.
    pub(super) fn remove_run(&mut self, peer_run: u64, events: &mut VecDeque<Event>) {
        self.remove_all(|agreed| agreed.peer_run == peer_run, events);
    }

    /// Ends all sessions.
    pub(super) fn clear(&mut self, events: &mut VecDeque<Event>) {
        self.remove_all(|_| true, events);
    }

    /// Tells lanes that they have no session to send on any more.
    pub(super) fn stop_sending(&mut self, events: &mut VecDeque<Event>) {
        if self.sending.take().is_some() {
            events.push_back(Event::SendOff);
        }
    }

    fn send_on(&mut self, index: u32, events: &mut VecDeque<Event>) -> Sending {
        let Some(agreed) = self.get(index) else {
            return Sending::Unchanged;
        };
        events.push_back(Event::SendOn(Arc::clone(&agreed.session)));
        let first = self.sending.replace(index).is_none();
        Sending::Switched { first }
    }

    /// Gives up the oldest sessions of a kind while there are more than `most`.
    fn evict(&mut self, usable: bool, most: usize, events: &mut VecDeque<Event>) {
        let kind = |agreed: &&AgreedSession| agreed.usable == usable;
        while self.all.iter().filter(kind).count() > most {
            let oldest = self
                .all
                .iter()
                .filter(kind)
                .map(AgreedSession::index)
                .find(|&index| !self.is_current(index));
            let Some(oldest) = oldest else {
                return;
            };
            self.remove_all(|agreed| agreed.index() == oldest, events);
        }
    }

    fn remove_all(&mut self, which: impl Fn(&AgreedSession) -> bool, events: &mut VecDeque<Event>) {
        self.all.retain(|agreed| {
            let remove = which(agreed);
            if remove {
                agreed.session.retire();
                events.push_back(Event::SessionRemoved(agreed.index()));
            }
            !remove
        });
    }

    fn get_mut(&mut self, index: u32) -> Option<&mut AgreedSession> {
        self.all.iter_mut().find(|agreed| agreed.index() == index)
    }
}

impl Drop for Sessions {
    fn drop(&mut self) {
        // A lane may hold a session a little longer, but must not use it.
        for agreed in &self.all {
            agreed.session.retire();
        }
    }
}
