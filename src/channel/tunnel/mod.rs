//! One peer: when to shake hands, which session to send on, whether the peer is there, what it said.
//!
//! A state machine without sockets and clocks: the daemon's control task hands it what arrived and what
//! time it is, and takes from it what to send and what has happened. Data packets do not pass here: lanes
//! seal and open them on the [`Session`]s that this room hands out, and leave the times in
//! [`Activity`]. Keys and handshake messages are made in `session`, layouts in `wire`.
//!
//! ```text
//!            lane: Door::admit                       lane: Session::open
//!                    │ Admitted                        │ first on its session, new source, CONTROL
//!                    ▼                                 ▼
//!            handle_handshake ──────────┐   ┌─ session_heard, handle_control
//!                                       ▼   ▼
//!  handle_timeout (next_timeout) ──►  Tunnel  ──► poll_event     install, send on, remove, state, …
//!                                              ──► poll_transmit  handshake and control datagrams
//! ```
//!
//! Take events before transmits: a session must be in the lanes' hands before the peer learns of it.
//!
//! # Which session
//!
//! Any session that both sides agreed on is accepted for receiving until it expires, so a change of
//! session loses nothing that is in flight. To send, both sides must come to the same one, also when
//! their initiations crossed. Each initiation says the highest timestamp that its sender had accepted
//! from the other; so both sides can tell which of two was made in knowledge of the other and wins, and
//! when neither was, that of the old server wins (`Origin::supersedes`).
//!
//! # Clocks
//!
//! A timestamp that does not rise is refused: that is what stops replayed initiations. A host that was
//! restarted with its clock set back would be locked out by it. So the refusing side initiates itself,
//! towards the endpoint that it knows, and its message carries the timestamp that the other has to exceed.

use std::collections::VecDeque;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crate::channel::pmtu::{self, Search};
use crate::channel::session::{
    Activity, Admitted, Answer, Hello, Initiating, NoEntropy, Offer, Responding, Session,
    SessionSpec,
};
use crate::channel::wire::{
    CONTROL_LANE, DATA_HEADER_LEN, DATA_OVERHEAD, Flags, Initiation, Message, Response, TAG_LEN,
};
use crate::model::drops::DropReason;
use crate::model::peer::{Path, PeerId, Role};

mod announcement;
mod config;
mod event;
mod messages;
mod sessions;
#[cfg(test)]
mod tests;

pub use config::{Timers, TunnelConfig};
pub use event::{Event, State, Transmit, Warning};
pub use messages::{Announcement, Deliver, MAX_MESSAGE};

use announcement::{CONFIG_RETRY, Incoming, Outgoing};
use messages::{ControlMessage, PART_LEN};
use sessions::{Held, Origin};

/// Initiations of ours that may still be answered. Retries go out each second at first, so a path of
/// four seconds' round trip still ends in a session.
const MAX_PENDING: usize = 4;

/// Sessions we granted on which nothing was heard yet: more than the peer can have pending.
const MAX_UNCONFIRMED: usize = MAX_PENDING + 1;

/// Sessions in use for receiving: the current one, the one before, and both of a crossing.
const MAX_USABLE: usize = 4;

/// How long an initiation waits for its answer.
const PENDING_LIFE: Duration = Duration::from_secs(10);

/// Retries that follow each other quickly before the pace slows down.
const FAST_ATTEMPTS: u32 = 20;

/// Pace of the keepalives by which the initiator shows a new session to the responder, until it is heard.
const CONFIRM_RETRY: Duration = Duration::from_millis(250);

/// Unheard for so long, a new session is not what the peer has: ask again.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(5);

/// At most one initiation of ours in this time because of a stale one: replayed messages must not make
/// us talk.
const STALE_ANSWER_PACE: Duration = Duration::from_secs(5);

/// At most one warning of a kind in this time.
const WARNING_PACE: Duration = Duration::from_secs(60);

/// The responder of a session asks for the next this much later than its initiator, in case the
/// initiator cannot.
const RESPONDER_GRACE: Duration = Duration::from_secs(30);

/// An initiation that may still be answered.
struct Pending {
    initiating: Initiating,
    origin: Origin,
    sent: Instant,
}

/// One peer. See the module.
pub struct Tunnel {
    config: TunnelConfig,
    activity: Arc<Activity>,
    /// Names this run of our daemon.
    run: u64,
    /// The last timestamp we used, or one that the peer says we have to exceed.
    timestamp: u64,
    /// The highest timestamp accepted from the peer.
    seen: u64,
    /// The run of the peer's daemon that used the timestamp in `seen`.
    seen_run: u64,

    state: State,
    closed: bool,
    /// Where the last authenticated datagram came from.
    learned: Option<Path>,

    sessions: Vec<Held>,
    /// Index of the session that lanes send on.
    sending: Option<u32>,
    pending: VecDeque<Pending>,
    attempts: u32,
    next_attempt: Instant,
    /// Initiate once although nothing else calls for it.
    forced: bool,
    stale_answered: Option<Instant>,

    next_ping: Instant,
    ping: Option<(u32, Instant)>,
    pings: u32,
    rtt: Option<Duration>,
    search: Option<Search>,
    outgoing: Outgoing,
    incoming: Incoming,

    warned: [Option<Instant>; 4],
    transmits: VecDeque<Transmit>,
    events: VecDeque<Event>,
}

impl Tunnel {
    /// Starts at once to look for the peer, if it is known where.
    ///
    /// # Errors
    /// [`NoEntropy`] if the system has no randomness to give.
    pub fn new(config: TunnelConfig, now: Instant) -> Result<Self, NoEntropy> {
        let run = config.entropy.u64()?;
        Ok(Self {
            activity: Arc::new(Activity::new(now)),
            run,
            timestamp: 0,
            seen: 0,
            seen_run: 0,
            state: State::Connecting,
            closed: false,
            learned: None,
            sessions: Vec::new(),
            sending: None,
            pending: VecDeque::new(),
            attempts: 0,
            next_attempt: now,
            forced: false,
            stale_answered: None,
            next_ping: now,
            ping: None,
            pings: 0,
            rtt: None,
            search: config.max_datagram.map(|limit| Search::new(limit, now)),
            outgoing: Outgoing::new(1, &config.announcement, now),
            incoming: Incoming::default(),
            warned: [None; 4],
            transmits: VecDeque::new(),
            events: VecDeque::new(),
            config,
        })
    }

    // What the daemon shows.

    /// Whose tunnel it is.
    pub fn peer(&self) -> PeerId {
        self.config.peer
    }

    /// This side's role.
    pub fn role(&self) -> Role {
        self.config.role
    }

    /// Whether the peer is there.
    pub fn state(&self) -> State {
        self.state
    }

    /// Where the peer is: where it was last heard, or else where it was said to be.
    pub fn endpoint(&self) -> Option<Path> {
        self.learned.or(self.configured())
    }

    /// The session that lanes send on.
    pub fn session(&self) -> Option<&Arc<Session>> {
        self.sending_held().map(|held| &held.session)
    }

    /// The last round trip.
    pub fn rtt(&self) -> Option<Duration> {
        self.rtt
    }

    /// Largest datagram (UDP payload) that the path is known to carry towards the peer.
    pub fn path_mtu(&self) -> u16 {
        self.search.as_ref().map_or(pmtu::BASE, Search::current)
    }

    // What arrives.

    /// A handshake message that [`Door::admit`](crate::channel::session::Door::admit) let in for this peer.
    ///
    /// # Errors
    /// [`DropReason::HandshakeRole`], [`DropReason::HandshakeReplay`],
    /// [`DropReason::HandshakeUnexpected`], [`DropReason::HandshakeAuth`], [`DropReason::WireMalformed`]:
    /// it was not accepted, for the caller to count.
    pub fn handle_handshake(
        &mut self,
        now: Instant,
        from: Path,
        admitted: &Admitted,
    ) -> Result<(), DropReason> {
        match admitted.message()? {
            Message::Initiation(initiation) => {
                self.check_role(now, initiation.role())?;
                self.handle_initiation(now, from, &initiation)
            }
            Message::Response(response) => {
                self.check_role(now, response.role())?;
                self.handle_response(now, from, &response)
            }
            Message::Data(_) => Err(DropReason::WireMalformed),
        }
    }

    /// A lane opened a datagram of `session` that was the first on it, or the newest of its lane with
    /// another source than [`Event::Endpoint`] last said.
    pub fn session_heard(&mut self, now: Instant, session: &Session, from: Path) {
        self.activity.answered(now);
        let Some(at) = self.position(session.index()) else {
            return;
        };
        // An old session still delivers what was in flight; where the peer is now, the current one tells.
        let current = self.sending == Some(session.index()) || !self.sessions[at].usable;
        if current {
            self.learn(now, from);
        }
        self.heard(now, at);
    }

    /// A lane opened a control message on `session`.
    ///
    /// # Errors
    /// [`DropReason::SessionUnknown`] if the session is gone, [`DropReason::WireMalformed`] if the
    /// message is of no known type or contradicts itself.
    pub fn handle_control(
        &mut self,
        now: Instant,
        session: &Session,
        plaintext: &[u8],
    ) -> Result<(), DropReason> {
        self.activity.answered(now);
        let at = self
            .position(session.index())
            .ok_or(DropReason::SessionUnknown)?;
        let peer_run = self.sessions[at].peer_run;
        self.heard(now, at);
        match ControlMessage::decode(plaintext).ok_or(DropReason::WireMalformed)? {
            ControlMessage::Keepalive => {}
            ControlMessage::Ping { id } => self.send(now, &ControlMessage::Pong { id }),
            ControlMessage::Pong { id } => self.handle_pong(now, id),
            ControlMessage::Config {
                id,
                part,
                parts,
                body,
            } => {
                if self.is_current_run(peer_run) {
                    self.send(now, &ControlMessage::ConfigAck { id, part });
                    self.handle_config(now, peer_run, id, part, parts, body);
                }
            }
            ControlMessage::ConfigAck { id, part } => {
                let outgoing = &mut self.outgoing;
                let ours = id == outgoing.id && outgoing.peer_run == Some(peer_run);
                if let Some(acked) = outgoing.acked.get_mut(usize::from(part)).filter(|_| ours) {
                    *acked = true;
                }
            }
            ControlMessage::Close => self.handle_close(now, peer_run),
            ControlMessage::Probe { size } => self.send(now, &ControlMessage::ProbeAck { size }),
            ControlMessage::ProbeAck { size } => self.search(|search| search.acked(now, size)),
        }
        Ok(())
    }

    // What the daemon wants.

    /// Tells the peer something else than before.
    pub fn set_announcement(&mut self, now: Instant, announcement: Announcement) {
        if announcement != self.config.announcement {
            self.outgoing = Outgoing::new(self.outgoing.id.wrapping_add(1), &announcement, now);
            self.config.announcement = announcement;
        }
    }

    /// Where the peer is said to be has changed: its name was resolved again.
    pub fn set_endpoint(&mut self, now: Instant, endpoint: Option<SocketAddr>) {
        if endpoint != self.config.endpoint {
            self.config.endpoint = endpoint;
            self.attempts = 0;
            self.next_attempt = self.next_attempt.min(now);
        }
    }

    /// The uplink takes larger or smaller datagrams than before.
    pub fn set_max_datagram(&mut self, now: Instant, limit: u16) {
        if self.config.max_datagram.is_some_and(|old| old != limit) {
            self.config.max_datagram = Some(limit);
            self.search(|search| search.set_limit(now, limit));
        }
    }

    /// The kernel refused a [`Transmit::probe`] of this length because of its size.
    pub fn probe_refused(&mut self, now: Instant, length: usize) {
        self.search(|search| search.refused(now, length));
    }

    /// Says good-bye. Nothing is accepted or started after this.
    pub fn close(&mut self, now: Instant) {
        self.send(now, &ControlMessage::Close);
        self.closed = true;
        self.pending.clear();
        while let Some(index) = self.sessions.first().map(|held| held.session.index()) {
            self.remove(index);
        }
        self.stop_sending();
    }

    // What time does.

    /// When [`handle_timeout`](Self::handle_timeout) is to be called next; ask again after every call
    /// that changes something.
    pub fn next_timeout(&self) -> Option<Instant> {
        if self.closed {
            return None;
        }
        let timers = &self.config.timers;
        let sessions = self.sessions.iter().flat_map(|held| {
            let expiry = held.session.created() + timers.reject_after;
            [Some(expiry), held.confirm_at]
        });
        let pending = self.pending.iter().map(|p| Some(p.sent + PENDING_LIFE));
        let sending = self.sending_held().into_iter().flat_map(|_| {
            let sent = self.activity.last_sent();
            let down = (self.state == State::Up).then(|| self.silence_since() + timers.down_after);
            let config = self.config_due();
            [
                Some(self.next_ping),
                sent.map(|sent| sent + timers.keepalive),
                down,
                config,
                self.probe_due(),
            ]
        });
        let attempt = self
            .endpoint()
            .map(|_| self.handshake_wanted_at().max(self.next_attempt));
        sessions
            .chain(pending)
            .chain(sending)
            .chain([attempt])
            .flatten()
            .min()
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Instant, wall: SystemTime) {
        if self.closed {
            return;
        }
        self.expire(now);
        self.observe(now);
        self.confirm(now);
        if self.endpoint().is_some()
            && now >= self.next_attempt
            && now >= self.handshake_wanted_at()
        {
            self.initiate(now, wall);
        }
        if self.sending.is_none() {
            return;
        }
        if self.config_due().is_some_and(|due| now >= due) {
            self.send_config(now);
        }
        if now >= self.next_ping {
            self.send_ping(now);
        }
        if self.probe_due().is_some_and(|due| now >= due) {
            self.send_probe(now);
        }
        let quiet = self
            .activity
            .last_sent()
            .map(|at| at + self.config.timers.keepalive);
        if quiet.is_none_or(|due| now >= due) {
            self.send(now, &ControlMessage::Keepalive);
        }
    }

    // What comes of it.

    /// What has happened; to be taken before [`poll_transmit`](Self::poll_transmit).
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// What is to be sent.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.transmits.pop_front()
    }

    // Handshake.

    fn check_role(&mut self, now: Instant, role: Role) -> Result<(), DropReason> {
        if self.closed {
            return Err(DropReason::HandshakeUnexpected);
        }
        if role == self.config.role {
            self.warn(now, Warning::SameRole(role));
            return Err(DropReason::HandshakeRole);
        }
        Ok(())
    }

    fn initiate(&mut self, now: Instant, wall: SystemTime) {
        let Some(to) = self.attempt_path() else {
            return;
        };
        let pace = if self.attempts < FAST_ATTEMPTS {
            self.config.timers.fast_retry
        } else {
            self.config.timers.retry
        };
        self.attempts = self.attempts.saturating_add(1);
        self.next_attempt = now + self.with_jitter(pace);
        let hello = Hello {
            timestamp: self.next_timestamp(wall),
            seen: self.seen,
            run: self.run,
            offer: self.config.offer,
            lanes: self.config.lanes,
        };
        let begun = self
            .config
            .indexes
            .draw(&self.config.entropy)
            .ok()
            .and_then(|index| {
                let TunnelConfig {
                    keys,
                    role,
                    entropy,
                    ..
                } = &self.config;
                Initiating::begin(keys, *role, index, &hello, entropy)
            });
        let Some((initiating, message)) = begun else {
            self.warn(now, Warning::NoEntropy);
            return;
        };
        self.forced = false;
        if self.pending.len() == MAX_PENDING {
            self.pending.pop_front();
        }
        self.pending.push_back(Pending {
            initiating,
            origin: Origin {
                initiator: self.config.role,
                timestamp: hello.timestamp,
                seen: hello.seen,
            },
            sent: now,
        });
        self.transmit(to, message.to_vec());
    }

    /// Rises with every call, whatever the clock does.
    fn next_timestamp(&mut self, wall: SystemTime) -> u64 {
        let clock = wall
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0, |since| since.as_nanos() as u64);
        self.timestamp = self.timestamp.saturating_add(1).max(clock);
        self.timestamp
    }

    fn handle_initiation(
        &mut self,
        now: Instant,
        from: Path,
        initiation: &Initiation<'_>,
    ) -> Result<(), DropReason> {
        let (responding, hello) =
            Responding::read(&self.config.keys, initiation, &self.config.entropy)?;
        // Even a stale message tells the truth about what the peer had accepted from us.
        self.timestamp = self.timestamp.max(hello.seen);
        if hello.timestamp <= self.seen {
            // Within one run timestamps rise: then it is a replay, or was overtaken on the way.
            if hello.run != self.seen_run {
                self.answer_stale(now);
            }
            return Err(DropReason::HandshakeReplay);
        }
        self.seen = hello.timestamp;
        self.seen_run = hello.run;
        let TunnelConfig {
            keys, role, offer, ..
        } = &self.config;
        let (role, offer) = (*role, *offer);
        let cipher = offer.agree(hello.offer);
        let answer = Answer {
            run: self.run,
            cipher,
            offer,
            lanes: self.config.lanes,
        };
        let index = match cipher {
            None => None,
            Some(_) => match self.config.indexes.draw(&self.config.entropy) {
                Ok(index) => Some(index),
                Err(NoEntropy) => {
                    self.warn(now, Warning::NoEntropy);
                    return Err(DropReason::ControlBusy);
                }
            },
        };
        let sender = index.as_ref().map_or(0, |index| index.value);
        let Some((split, message)) =
            responding.answer(keys, role, sender, initiation.sender(), &answer)
        else {
            self.warn(now, Warning::NoEntropy);
            return Err(DropReason::ControlBusy);
        };
        if let (Some(cipher), Some(index)) = (cipher, index) {
            self.install(
                SessionSpec {
                    index,
                    remote: initiation.sender(),
                    cipher,
                    keys: split,
                    initiator: initiation.role(),
                    own_role: role,
                    own_lanes: self.config.lanes,
                    peer_lanes: hello.lanes,
                    peer: self.config.peer,
                    created: now,
                    activity: Arc::clone(&self.activity),
                },
                Origin {
                    initiator: initiation.role(),
                    timestamp: hello.timestamp,
                    seen: hello.seen,
                },
                hello.run,
            );
            // The peer has the next word; an initiation of ours would only cross its own.
            let pace = self.with_jitter(self.config.timers.fast_retry);
            self.next_attempt = self.next_attempt.max(now + pace);
        } else {
            self.warn_cipher(now, hello.offer);
        }
        self.transmit(from, message.to_vec());
        Ok(())
    }

    /// A peer whose clock was set back is told what to exceed, at the endpoint that we know: whoever
    /// replays its messages learns nothing.
    fn answer_stale(&mut self, now: Instant) {
        let recently = self
            .stale_answered
            .is_some_and(|at| now < at + STALE_ANSWER_PACE);
        if !recently {
            self.stale_answered = Some(now);
            self.forced = true;
            self.next_attempt = self.next_attempt.min(now);
        }
    }

    fn handle_response(
        &mut self,
        now: Instant,
        from: Path,
        response: &Response<'_>,
    ) -> Result<(), DropReason> {
        let at = self
            .pending
            .iter()
            .position(|pending| pending.initiating.index() == response.receiver())
            .ok_or(DropReason::HandshakeUnexpected)?;
        let (answer, split) = self.pending[at].initiating.read(response)?;
        let Some(pending) = self.pending.remove(at) else {
            return Err(DropReason::HandshakeUnexpected);
        };
        // It is answered; what else we sent in the meantime need not be.
        self.pending.clear();
        self.activity.answered(now);
        self.learn(now, from);
        // A peer that chooses what was not offered is refused as one that chooses nothing.
        let cipher = answer
            .cipher
            .filter(|&cipher| self.config.offer.agree(answer.offer) == Some(cipher));
        let Some(cipher) = cipher else {
            self.warn_cipher(now, answer.offer);
            self.slow_down(now);
            return Ok(());
        };
        let index = self.install(
            SessionSpec {
                index: pending.initiating.into_index(),
                remote: response.sender(),
                cipher,
                keys: split,
                initiator: self.config.role,
                own_role: self.config.role,
                own_lanes: self.config.lanes,
                peer_lanes: answer.lanes,
                peer: self.config.peer,
                created: now,
                activity: Arc::clone(&self.activity),
            },
            pending.origin,
            answer.run,
        );
        if let Some(at) = index.and_then(|index| self.position(index)) {
            self.sessions[at].confirm_at = Some(now);
            self.make_usable(now, at);
            self.confirm(now);
            self.observe(now);
        }
        Ok(())
    }

    // Sessions.

    /// Accepts a session for receiving, and gives up the oldest if there are too many.
    fn install(&mut self, spec: SessionSpec, origin: Origin, peer_run: u64) -> Option<u32> {
        let session = Session::new(spec)?;
        let index = session.index();
        self.events
            .push_back(Event::SessionInstalled(Arc::clone(&session)));
        self.sessions.push(Held {
            session,
            origin,
            peer_run,
            usable: false,
            confirm_at: None,
        });
        self.evict(false, MAX_UNCONFIRMED);
        Some(index)
    }

    /// Gives up the oldest sessions of a kind while there are more than `most`.
    fn evict(&mut self, usable: bool, most: usize) {
        let kind = |held: &&Held| held.usable == usable;
        while self.sessions.iter().filter(kind).count() > most {
            let oldest = self
                .sessions
                .iter()
                .filter(kind)
                .map(|held| held.session.index())
                .find(|&index| Some(index) != self.sending);
            match oldest {
                Some(index) => self.remove(index),
                None => return,
            }
        }
    }

    fn remove(&mut self, index: u32) {
        if let Some(at) = self.position(index) {
            self.sessions.remove(at).session.retire();
            self.events.push_back(Event::SessionRemoved(index));
        }
    }

    /// Something authenticated came in on a session.
    fn heard(&mut self, now: Instant, at: usize) {
        let held = &mut self.sessions[at];
        held.confirm_at = None;
        if !held.usable {
            self.make_usable(now, at);
            // The initiator repeats itself until it hears us.
            self.send(now, &ControlMessage::Keepalive);
        }
        self.observe(now);
    }

    /// The peer proved that it holds the keys of a session.
    fn make_usable(&mut self, now: Instant, at: usize) {
        self.sessions[at].usable = true;
        let (index, peer_run) = (
            self.sessions[at].session.index(),
            self.sessions[at].peer_run,
        );
        // No answer is wanted any more to what was asked before this, …
        self.pending.clear();
        self.attempts = 0;
        self.next_attempt = now;
        self.forced = false;
        // … and what an earlier run of the peer asked for will never be used.
        let dead = |held: &Held| !held.usable && held.peer_run != peer_run;
        while let Some(held) = self.sessions.iter().find(|held| dead(held)) {
            self.remove(held.session.index());
        }
        let switch = match (self.position(index), self.sending_held()) {
            (Some(at), Some(current)) => self.sessions[at].supersedes(current),
            (Some(_), None) => true,
            (None, _) => false,
        };
        if switch {
            self.send_on(now, index);
        }
        // What is not sent on needs no proof of ours.
        let sending = self.sending;
        for held in &mut self.sessions {
            if Some(held.session.index()) != sending {
                held.confirm_at = None;
            }
        }
        self.evict(true, MAX_USABLE);
    }

    fn send_on(&mut self, now: Instant, index: u32) {
        let Some(at) = self.position(index) else {
            return;
        };
        let first = self.sending.is_none();
        self.sending = Some(index);
        let held = &self.sessions[at];
        self.events
            .push_back(Event::SendOn(Arc::clone(&held.session)));
        if self.outgoing.peer_run != Some(held.peer_run) {
            self.outgoing.peer_run = Some(held.peer_run);
            self.outgoing.acked.fill(false);
            self.outgoing.send_at = now;
        }
        if first {
            self.next_ping = now;
        }
    }

    fn stop_sending(&mut self) {
        if self.sending.take().is_some() {
            self.events.push_back(Event::SendOff);
        }
        if self.state == State::Up {
            self.set_state(State::Down);
        }
    }

    /// Ends what is too old.
    fn expire(&mut self, now: Instant) {
        let life = self.config.timers.reject_after;
        let expired = |held: &&Held| now >= held.session.created() + life;
        while let Some(held) = self.sessions.iter().find(expired) {
            self.remove(held.session.index());
        }
        if self.sending.is_some() && self.sending_held().is_none() {
            // Any other that the peer proved is better than none.
            let best = self
                .sessions
                .iter()
                .filter(|held| held.usable)
                .reduce(|best, held| if held.supersedes(best) { held } else { best })
                .map(|held| held.session.index());
            match best {
                Some(index) => self.send_on(now, index),
                None => self.stop_sending(),
            }
        }
        self.pending
            .retain(|pending| now < pending.sent + PENDING_LIFE);
    }

    /// Shows the peer that we hold the keys of what we asked for, until we hear that it knows.
    fn confirm(&mut self, now: Instant) {
        for at in 0..self.sessions.len() {
            let held = &mut self.sessions[at];
            if held.session.is_heard() {
                held.confirm_at = None;
            }
            if held.confirm_at.is_some_and(|due| now >= due) {
                held.confirm_at = Some(now + CONFIRM_RETRY);
                let session = Arc::clone(&held.session);
                self.send_sealed(now, &session, &ControlMessage::Keepalive, 0);
            }
        }
    }

    /// Sees from the times that lanes left whether the peer is there.
    fn observe(&mut self, now: Instant) {
        // What lanes opened first and could not report.
        let unreported = |held: &Held| !held.usable && held.session.is_heard();
        while let Some(at) = self.sessions.iter().position(unreported) {
            self.make_usable(now, at);
        }
        if self.sending.is_none() {
            return;
        }
        let silent = now >= self.silence_since() + self.config.timers.down_after;
        match (self.state, silent) {
            (State::Up, true) => self.set_state(State::Down),
            (State::Connecting | State::Down, false) => self.set_state(State::Up),
            (State::Up, false) | (State::Connecting | State::Down, true) => {}
        }
    }

    /// When a handshake is wanted, whatever the pace of attempts; possibly long ago.
    fn handshake_wanted_at(&self) -> Instant {
        let timers = &self.config.timers;
        let Some(held) = self.sending_held().filter(|_| !self.forced) else {
            return self.next_attempt;
        };
        let session = &held.session;
        if session.messages() >= session.cipher().rekey_after() {
            return self.next_attempt;
        }
        let rekey = if session.is_initiator() {
            timers.rekey_after
        } else {
            timers.rekey_after + RESPONDER_GRACE
        };
        let unheard = held.confirm_at.map(|_| session.created() + CONFIRM_TIMEOUT);
        let silent = self.silence_since() + timers.answer_timeout;
        [Some(session.created() + rekey), Some(silent), unheard]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(silent)
    }

    /// Since when nothing was heard. A session begins with a sign of life.
    fn silence_since(&self) -> Instant {
        let created = self.sending_held().map(|held| held.session.created());
        let heard = self.activity.last_heard();
        heard.max(created).unwrap_or(self.next_attempt)
    }

    // Control messages.

    fn handle_pong(&mut self, now: Instant, id: u32) {
        if let Some((_, sent)) = self.ping.take_if(|(expected, _)| *expected == id) {
            let rtt = now.saturating_duration_since(sent);
            self.rtt = Some(rtt);
            self.search(|search| search.set_rtt(rtt));
            self.events.push_back(Event::Rtt(rtt));
        }
    }

    fn send_ping(&mut self, now: Instant) {
        self.pings = self.pings.wrapping_add(1);
        self.ping = Some((self.pings, now));
        self.next_ping = now + self.config.timers.ping;
        self.send(now, &ControlMessage::Ping { id: self.pings });
    }

    fn handle_config(
        &mut self,
        now: Instant,
        peer_run: u64,
        id: u32,
        part: u8,
        parts: u8,
        body: &[u8],
    ) {
        let incoming = &mut self.incoming;
        if incoming.peer_run != peer_run {
            *incoming = Incoming {
                peer_run,
                ..Incoming::default()
            };
        }
        if id <= incoming.done || id < incoming.id {
            return;
        }
        if id > incoming.id || incoming.parts.len() != usize::from(parts) {
            incoming.id = id;
            incoming.parts = vec![None; usize::from(parts)];
        }
        incoming.parts[usize::from(part)] = Some(body.to_vec());
        let Some(whole) = incoming.parts.iter().cloned().collect::<Option<Vec<_>>>() else {
            return;
        };
        incoming.done = id;
        incoming.parts.clear();
        match Announcement::decode(&whole.concat()) {
            Some(announcement) if announcement.role() == self.config.role.other() => {
                self.events.push_back(Event::PeerConfig(announcement));
            }
            _ => self.warn(now, Warning::ConfigUnreadable),
        }
    }

    fn config_due(&self) -> Option<Instant> {
        let open = self.outgoing.acked.iter().any(|acked| !acked);
        open.then_some(self.outgoing.send_at)
    }

    fn send_config(&mut self, now: Instant) {
        self.outgoing.send_at = now + CONFIG_RETRY;
        self.outgoing.peer_run = self.sending_held().map(|held| held.peer_run);
        let (id, parts) = (self.outgoing.id, self.outgoing.parts.len() as u8);
        for part in 0..parts {
            let at = usize::from(part);
            if !self.outgoing.acked[at] {
                let body = std::mem::take(&mut self.outgoing.parts[at]);
                self.send(
                    now,
                    &ControlMessage::Config {
                        id,
                        part,
                        parts,
                        body: &body,
                    },
                );
                self.outgoing.parts[at] = body;
            }
        }
    }

    /// Nothing is learned about a path from probes to a peer that is not there.
    fn probe_due(&self) -> Option<Instant> {
        let up = self.state == State::Up;
        self.search
            .as_ref()
            .filter(|_| up)
            .map(Search::next_timeout)
    }

    fn send_probe(&mut self, now: Instant) {
        let heard = self.activity.last_heard();
        let mut probe = None;
        let carried = self.activity.last_carried();
        self.search(|search| probe = search.poll(now, heard, carried));
        if let (Some(size), Some(session)) = (probe, self.session().map(Arc::clone)) {
            self.send_sealed(
                now,
                &session,
                &ControlMessage::Probe { size },
                usize::from(size),
            );
            if self.search.as_ref().is_some_and(Search::is_doubtful) {
                // Whether the size is lost or everything is: the answer to something small tells.
                self.send_ping(now);
            }
        }
    }

    /// Does something to the search and tells if that changed its result.
    fn search(&mut self, with: impl FnOnce(&mut Search)) {
        if let Some(search) = &mut self.search {
            let before = search.current();
            with(search);
            let after = search.current();
            if before != after {
                self.events.push_back(Event::PathMtu(after));
            }
        }
    }

    /// The peer's daemon ended: nothing of that run is of use any more.
    fn handle_close(&mut self, now: Instant, peer_run: u64) {
        let of_run = |held: &&Held| held.peer_run == peer_run;
        while let Some(held) = self.sessions.iter().find(of_run) {
            self.remove(held.session.index());
        }
        if self.sending_held().is_none() {
            self.stop_sending();
            self.slow_down(now);
        }
    }

    /// Sends a control message on the session in use.
    fn send(&mut self, now: Instant, message: &ControlMessage<'_>) {
        if let Some(session) = self.session().map(Arc::clone) {
            self.send_sealed(now, &session, message, 0);
        }
    }

    fn send_sealed(
        &mut self,
        now: Instant,
        session: &Session,
        message: &ControlMessage<'_>,
        padded_to: usize,
    ) {
        // Also if it cannot be: the pace of trying is the same.
        self.activity.spoke(now);
        let (Some(to), Some(sealer)) = (self.endpoint(), session.sealer(CONTROL_LANE)) else {
            return;
        };
        let mut datagram = Vec::with_capacity(DATA_OVERHEAD + PART_LEN);
        datagram.resize(DATA_HEADER_LEN, 0);
        message.encode(&mut datagram);
        let length = datagram.len() + TAG_LEN;
        datagram.resize(length.max(padded_to), 0);
        let counter = sealer.reserve(1).and_then(|mut reserved| reserved.next());
        let sealed = counter.map(|counter| sealer.seal(counter, Flags::CONTROL, &mut datagram));
        if sealed == Some(Ok(())) {
            self.transmits.push_back(Transmit {
                to,
                datagram,
                probe: padded_to > 0,
            });
        }
    }

    // Helpers.

    fn transmit(&mut self, to: Path, datagram: Vec<u8>) {
        self.transmits.push_back(Transmit {
            to,
            datagram,
            probe: false,
        });
    }

    fn learn(&mut self, now: Instant, from: Path) {
        if self.learned != Some(from) {
            let moved = self.learned.is_some_and(|old| old.remote != from.remote);
            self.learned = Some(from);
            self.events.push_back(Event::Endpoint(from));
            if moved {
                self.search(|search| search.restart(now));
            }
        }
    }

    fn configured(&self) -> Option<Path> {
        let remote = self.config.endpoint?;
        Some(Path {
            remote,
            local: None,
        })
    }

    /// Where the next initiation goes: by turns to where the peer was last heard and to where it is
    /// said to be, for after a restart it may be back there.
    fn attempt_path(&self) -> Option<Path> {
        let configured = self.configured();
        match self.attempts % 2 {
            0 => self.learned.or(configured),
            _ => configured.or(self.learned),
        }
    }

    fn slow_down(&mut self, now: Instant) {
        self.attempts = FAST_ATTEMPTS;
        self.next_attempt = now + self.with_jitter(self.config.timers.retry);
    }

    /// Up to a third more, so that two sides do not cross again and again.
    fn with_jitter(&self, pace: Duration) -> Duration {
        let random = self.config.entropy.u64().unwrap_or(0);
        let third = (pace.as_millis() as u64 / 3).max(1);
        pace + Duration::from_millis(random % third)
    }

    fn position(&self, index: u32) -> Option<usize> {
        self.sessions
            .iter()
            .position(|held| held.session.index() == index)
    }

    fn sending_held(&self) -> Option<&Held> {
        let at = self.position(self.sending?)?;
        self.sessions.get(at)
    }

    fn is_current_run(&self, peer_run: u64) -> bool {
        self.sending_held()
            .is_some_and(|held| held.peer_run == peer_run)
    }

    fn set_state(&mut self, state: State) {
        self.state = state;
        self.events.push_back(Event::State(state));
    }

    fn warn_cipher(&mut self, now: Instant, theirs: Offer) {
        let ours = self.config.offer.ciphers;
        let theirs = theirs.ciphers;
        self.warn(now, Warning::NoCommonCipher { ours, theirs });
    }

    fn warn(&mut self, now: Instant, warning: Warning) {
        let kind = match warning {
            Warning::SameRole(_) => 0,
            Warning::NoCommonCipher { .. } => 1,
            Warning::ConfigUnreadable => 2,
            Warning::NoEntropy => 3,
        };
        if self.warned[kind].is_none_or(|at| now >= at + WARNING_PACE) {
            self.warned[kind] = Some(now);
            self.events.push_back(Event::Warning(warning));
        }
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        // A lane may hold a session a little longer; it must not use it.
        for held in &self.sessions {
            held.session.retire();
        }
    }
}

impl fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tunnel")
            .field("peer", &self.config.peer)
            .field("role", &self.config.role)
            .field("state", &self.state)
            .field("sending", &self.sending)
            .finish_non_exhaustive()
    }
}
