//! One peer: when to shake hands, which session to send on, whether the peer is there, and what it
//! said.
//!
//! A state machine without sockets and clocks: the daemon's control task hands it what arrived and
//! what time it is, and takes from it what to send and what has happened. Data packets do not pass
//! here: lanes seal and open them on the [`Session`]s that this module hands out, and leave the
//! times in [`Activity`]. `session` makes keys and handshake messages; `wire` knows the layouts.
//!
//! ```text
//!            lane: MacCheck::admit                       lane: Session::open
//!                    │ Admitted                        │ first on its session, new source, CONTROL
//!                    ▼                                 ▼
//!            handle_handshake ──────────┐   ┌─ session_heard, handle_control
//!                                       ▼   ▼
//!  handle_timeout (next_timeout) ──►  Tunnel  ──► poll_event     sessions, endpoint, state
//!                                              ──► poll_transmit  handshake, control datagrams
//! ```
//!
//! Take events before transmits: a session must be in the lanes' hands before the peer learns of
//! it.
//!
//! # Which session
//!
//! Any session that both sides agreed on is accepted for receiving until it expires, so a change of
//! session loses nothing that is in flight. To send, both sides must choose the same one, even if
//! their initiations crossed. Each initiation says the highest timestamp that its sender had
//! accepted from the other side. So both sides can tell which of two initiations was made in
//! knowledge of the other: that one wins. If neither was, that of the old server wins
//! (`Origin::supersedes`).
//!
//! # Clocks
//!
//! An initiation whose timestamp is not higher than the last one is refused: that stops replays. It
//! would also lock out a host that was restarted with its clock set back. So the side that refuses
//! sends an initiation itself, to the endpoint that it knows. That message carries the timestamp
//! that the other side has to exceed.

use std::collections::VecDeque;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crate::channel::pmtu::{self, MtuDiscovery};
use crate::channel::session::{
    Accepts, Activity, Admitted, Initiating, InitiationPayload, NoEntropy, Offer, PeerKeys,
    Responding, ResponsePayload, Session, SessionSpec,
};
use crate::channel::wire::{
    CONTROL_LANE, DATA_HEADER_LEN, DATA_OVERHEAD, Flags, Initiation, Message, Response, TAG_LEN,
};
use crate::model::accept::Accept;
use crate::model::asked::{Asked, Found, News};
use crate::model::budget::{Budget, Limit};
use crate::model::drops::DropReason;
use crate::model::mode::Told;
use crate::model::moved::Move;
use crate::model::peer::{Endpoint, Role};
use crate::model::progress::Progress;

mod announcement;
mod asks;
mod checked;
mod config;
mod event;
mod handed;
mod messages;
mod mode_news;
mod news;
mod pace;
mod progress_news;
mod sessions;
#[cfg(test)]
mod tests;

pub use asks::MAX_ASKS;
pub use config::{Timers, TunnelConfig};
pub use event::{Event, State, Transmit, Warning};
pub use messages::{Announcement, Deliver, MAX_ANNOUNCEMENT, MAX_MESSAGE, needs_list};
pub use mode_news::PeerModes;
pub use news::MAX_TROUBLES;
pub use progress_news::MoveName;

use announcement::{Incoming, Outgoing};
use checked::Checked;
use messages::{ControlMessage, PART_LEN};
use pace::Paced;
use sessions::{MAX_PENDING, Origin, Sending, Sessions};

/// How long an initiation waits for its response.
const PENDING_LIFE: Duration = Duration::from_secs(10);

/// Retries at the fast pace, before it slows down.
const FAST_ATTEMPTS: u32 = 20;

/// When the peer has not been heard on a new session for this long, it does not have that session,
/// and we ask again.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(5);

/// Least time between two initiations that we send because of stale ones: whoever replays messages
/// must not be able to make us talk.
const STALE_REPLY_PACE: Duration = Duration::from_secs(5);

/// Least time between two warnings of a kind.
const WARNING_PACE: Duration = Duration::from_secs(60);

/// Initiations that are answered. Only the peer can make a new one, and it sends one a second; each
/// costs us two Diffie-Hellman operations and a session.
const ANSWERED: Limit = Limit {
    per_second: 8,
    at_once: 16,
};

/// Least time between two searches of the path from the beginning because the peer moved. Whoever
/// can make it seem to move all the time must not keep the search from ending.
const SEARCH_PACE: Duration = Duration::from_secs(10);

/// How much later than its initiator the responder of a session asks for the next one, in case the
/// initiator cannot.
const RESPONDER_GRACE: Duration = Duration::from_secs(30);

/// An initiation that waits for its response.
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
    /// What the settings accept of the peer, where they say so (new server).
    accept: Option<Vec<Accept>>,
    /// What this host's clock last showed, and when.
    wall: Option<(Instant, SystemTime)>,
    /// The last timestamp we used, or one that the peer says we have to exceed.
    timestamp: u64,
    /// The highest timestamp accepted from the peer.
    seen: u64,
    /// The run of the peer's daemon that used the timestamp in `seen`.
    seen_run: u64,

    state: State,
    /// When the peer said goodbye, if it was not heard since.
    stopped: Option<Instant>,
    closed: bool,
    /// Where the last authenticated datagram came from.
    learned: Option<Endpoint>,
    arrived: Paced<Endpoint>,

    sessions: Sessions,
    pending: VecDeque<Pending>,
    attempts: u32,
    next_attempt: Instant,
    /// Initiate once, even if no timer asks for it.
    forced: bool,
    stale_replied: Option<Instant>,
    answered: Budget,
    /// The same of checks.
    checks: Budget,
    checked: Checked,

    next_ping: Instant,
    ping: Option<(u32, Instant)>,
    pings: u32,
    rtt: Option<Duration>,
    mtu: Option<MtuDiscovery>,
    /// Where the peer was when the search of the path began, and when that was, if it had moved.
    searched: Option<(SocketAddr, Option<Instant>)>,
    outgoing: Outgoing,
    incoming: Incoming,
    announced: Paced<Vec<u8>>,
    /// The peer's last announcement, for a daemon that takes over.
    said: Option<Vec<u8>>,
    news: news::Outgoing,
    progress: progress_news::Outgoing,
    modes: mode_news::Outgoing,

    warned: [Option<Instant>; 4],
    transmits: VecDeque<Transmit>,
    events: VecDeque<Event>,
}

impl Tunnel {
    /// Starts at once to look for the peer, if its address is known.
    ///
    /// # Errors
    /// [`NoEntropy`] if the system has no randomness to give.
    pub fn new(config: TunnelConfig, now: Instant) -> Result<Self, NoEntropy> {
        let run = config.entropy.u64()?;
        Ok(Self {
            activity: Arc::new(Activity::new(now)),
            run,
            accept: None,
            wall: None,
            timestamp: 0,
            seen: 0,
            seen_run: 0,
            state: State::Connecting,
            stopped: None,
            closed: false,
            learned: None,
            arrived: Paced::default(),
            sessions: Sessions::default(),
            pending: VecDeque::new(),
            attempts: 0,
            next_attempt: now,
            forced: false,
            stale_replied: None,
            answered: Budget::new(ANSWERED),
            checks: Budget::new(ANSWERED),
            checked: Checked::default(),
            next_ping: now,
            ping: None,
            pings: 0,
            rtt: None,
            mtu: config
                .max_datagram
                .map(|limit| MtuDiscovery::new(limit, now)),
            searched: None,
            outgoing: Outgoing::new(&config.announcement, now),
            incoming: Incoming::default(),
            announced: Paced::default(),
            said: None,
            news: news::Outgoing::new(),
            progress: progress_news::Outgoing::default(),
            modes: mode_news::Outgoing::default(),
            warned: [None; 4],
            transmits: VecDeque::new(),
            events: VecDeque::new(),
            config,
        })
    }

    // What the daemon shows.

    /// This side's role.
    pub fn role(&self) -> Role {
        self.config.role
    }

    /// Whether the peer is there.
    pub fn state(&self) -> State {
        self.state
    }

    /// When the peer's daemon was stopped, if it said so and has not come back.
    pub fn stopped(&self) -> Option<Instant> {
        self.stopped
    }

    /// Where the peer is: where it was last heard, or else where the settings say.
    pub fn endpoint(&self) -> Option<Endpoint> {
        self.learned.or(self.configured())
    }

    /// The session that lanes send on.
    pub fn session(&self) -> Option<&Arc<Session>> {
        self.sessions.current().map(|current| &current.session)
    }

    /// The last round trip.
    pub fn rtt(&self) -> Option<Duration> {
        self.rtt
    }

    /// When the peer was last heard, whether it is up or not.
    pub fn last_heard(&self) -> Option<Instant> {
        self.activity.last_received()
    }

    /// For how long nothing was heard of a peer that is taken to be there.
    pub fn unheard(&self, now: Instant) -> Option<Duration> {
        let up = self.state == State::Up;
        up.then(|| now.saturating_duration_since(self.silence_since()))
    }

    /// Largest datagram (UDP payload) that the path is known to carry towards the peer.
    pub fn path_mtu(&self) -> u16 {
        self.mtu.as_ref().map_or(pmtu::BASE, MtuDiscovery::current)
    }

    /// What came of ICMP errors about the path.
    pub fn mtu_hints(&self) -> pmtu::Hints {
        let mtu = self.mtu.as_ref();
        mtu.map_or_else(pmtu::Hints::default, MtuDiscovery::hints)
    }

    // What arrives.

    /// A handshake message for this peer that passed
    /// [`MacCheck::admit`](crate::channel::session::MacCheck::admit).
    ///
    /// # Errors
    /// [`DropReason::HandshakeRole`], [`DropReason::HandshakeReplay`],
    /// [`DropReason::HandshakeLimited`], [`DropReason::HandshakeUnexpected`],
    /// [`DropReason::HandshakeAuth`], [`DropReason::WireMalformed`]: it was not accepted, for the
    /// caller to count.
    pub fn handle_handshake(
        &mut self,
        now: Instant,
        from: Endpoint,
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

    /// A lane opened a datagram of `session` that was the first on it, or the newest of its lane
    /// with another source than [`Event::Endpoint`] last said.
    pub fn session_heard(&mut self, now: Instant, session: &Session, from: Endpoint) {
        self.activity.control_received(now);
        let Some(agreed) = self.sessions.get(session.index()) else {
            return;
        };
        // An old session still delivers packets in flight; only the current one tells where the
        // peer is now.
        if self.sessions.is_current(session.index()) || !agreed.usable {
            self.learn(now, from);
        }
        self.heard(now, session.index());
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
        self.activity.control_received(now);
        let agreed = self.sessions.get(session.index());
        let peer_run = agreed.ok_or(DropReason::SessionUnknown)?.peer_run;
        self.heard(now, session.index());
        match ControlMessage::decode(plaintext).ok_or(DropReason::WireMalformed)? {
            ControlMessage::Keepalive { news } => {
                if let Some(news) = news::decode(news)
                    && self.is_current_run(peer_run)
                {
                    let run = peer_run;
                    self.events.push_back(Event::PeerSees { run, news });
                }
                if let Some(progress) = progress_news::decode(news)
                    && self.is_current_run(peer_run)
                {
                    let run = peer_run;
                    self.events.push_back(Event::PeerProgress { run, progress });
                }
                if let Some(modes) = mode_news::decode(news)
                    && self.is_current_run(peer_run)
                {
                    let run = peer_run;
                    self.events.push_back(Event::PeerModes { run, modes });
                }
                if let Some(asks) = asks::decode(news) {
                    self.events.push_back(Event::PeerAsks(asks));
                }
                if let Some(told) = asks::decode_told(news)
                    && self.is_current_run(peer_run)
                {
                    self.events.push_back(Event::PeerTells(told));
                }
            }
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
            ControlMessage::ConfigAck { id, part } => self.outgoing.acked(peer_run, id, part),
            ControlMessage::Close => self.handle_close(now, peer_run),
            ControlMessage::Probe { size } => self.send(now, &ControlMessage::ProbeAck { size }),
            ControlMessage::ProbeAck { size } => self.discover(|mtu| mtu.acked(now, size)),
        }
        Ok(())
    }

    // What the daemon wants.

    /// Replaces our announcement to the peer.
    pub fn set_announcement(&mut self, now: Instant, announcement: Announcement) {
        if announcement != self.config.announcement {
            self.outgoing.replace(&announcement, now);
            self.config.announcement = announcement;
        }
    }

    /// What the peer may move here, nothing for everything: for its checks, which ask before
    /// anything is announced.
    pub fn set_accept(&mut self, accept: Vec<Accept>) {
        self.accept = Some(accept);
    }

    /// Tells the peer what is not answered, in place of what it was told before.
    pub fn set_news(&mut self, now: Instant, news: &News) {
        if self.news.replace(news) && self.tells() {
            self.send_keepalive(now);
        }
    }

    /// Tells the peer how far each move has come, in place of what it was told before. Call it
    /// every half second: what is to be told again is told then.
    pub fn set_progress(&mut self, now: Instant, all: &[(MoveName, Progress)]) {
        self.progress.replace(all);
        if self.tells() {
            let news = self.progress.take_news(now);
            self.send_keepalives(now, &news);
        }
    }

    /// Tells the peer the mode of each move, in place of what it was told before.
    pub fn set_modes(&mut self, now: Instant, all: &[(MoveName, Told)]) {
        let news = self.modes.replace(all);
        if self.tells() {
            self.send_keepalives(now, &news);
        }
    }

    /// Asks the peer whether something listens for these, [`MAX_ASKS`] of them at most. Call it
    /// again as long as that is to be known.
    pub fn ask(&mut self, now: Instant, asks: &[Asked]) {
        if self.tells() {
            self.send_keepalives(now, &[asks::encode(asks)]);
        }
    }

    /// Tells the peer what it has asked.
    pub fn tell(&mut self, now: Instant, told: &[(Asked, Found)]) {
        if self.tells() {
            self.send_keepalives(now, &[asks::encode_told(told)]);
        }
    }

    /// The peer's name was resolved again: the settings now lead to this address.
    pub fn set_endpoint(&mut self, now: Instant, endpoint: Option<SocketAddr>) {
        if endpoint != self.config.endpoint {
            self.config.endpoint = endpoint;
            self.hurry(now);
        }
    }

    /// The secret that is shared with the peer is another one. The sessions that there are go on
    /// until they expire; the next one is made with these keys.
    pub fn set_keys(&mut self, now: Instant, keys: PeerKeys) {
        self.config.keys = keys;
        // A response to these cannot be read any more.
        self.pending.clear();
        self.forced = true;
        self.hurry(now);
    }

    /// From now on sessions are made with these ciphers and replaced after such times.
    pub fn set_terms(&mut self, offer: Offer, timers: Timers) {
        self.config.offer = offer;
        self.config.timers = timers;
    }

    /// Asks for a new session now, whatever the age of the present one.
    pub fn renew(&mut self, now: Instant) {
        self.forced = true;
        self.hurry(now);
    }

    /// There is a way to the peer again: what waits for the next attempt need not.
    pub fn hurry(&mut self, now: Instant) {
        self.attempts = 0;
        self.next_attempt = self.next_attempt.min(now);
    }

    /// The uplink takes larger or smaller datagrams than before.
    pub fn set_max_datagram(&mut self, now: Instant, limit: u16) {
        if self.config.max_datagram.is_some_and(|old| old != limit) {
            self.config.max_datagram = Some(limit);
            self.discover(|mtu| mtu.set_limit(now, limit));
        }
    }

    /// The size of datagrams that an ICMP error said the path takes, as long as the kernel
    /// remembers it. Anybody can send such an error: it makes the tunnel ask, and changes nothing
    /// by itself.
    pub fn set_mtu_hint(&mut self, now: Instant, hint: Option<u16>) {
        self.discover(|mtu| mtu.set_hint(now, hint));
    }

    /// The kernel refused a [`Transmit::probe`] of this length because of its size.
    pub fn probe_refused(&mut self, now: Instant, length: usize) {
        self.discover(|mtu| mtu.refused(now, length));
    }

    /// Says goodbye. Nothing is accepted or started after this.
    pub fn close(&mut self, now: Instant) {
        self.send(now, &ControlMessage::Close);
        self.closed = true;
        self.pending.clear();
        self.sessions.clear(&mut self.events);
        self.stop_sending();
    }

    // What time does.

    /// When [`handle_timeout`](Self::handle_timeout) is due next. Ask again after every call that
    /// changes something.
    pub fn next_timeout(&self) -> Option<Instant> {
        if self.closed {
            return None;
        }
        let timers = &self.config.timers;
        let sessions = self.sessions.iter().flat_map(|agreed| {
            let expiry = agreed.session.created() + timers.reject_after;
            [Some(expiry), agreed.confirm_at]
        });
        let pending = self.pending.iter().map(|p| Some(p.sent + PENDING_LIFE));
        let sending = self.sessions.current().into_iter().flat_map(|_| {
            let sent = self.activity.last_sent();
            let down = (self.state == State::Up).then(|| self.silence_since() + timers.down_after);
            let config = self.outgoing.due().filter(|_| self.tells());
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
        let paced = [self.arrived.due(), self.announced.due(), self.search_due()];
        sessions
            .chain(pending)
            .chain(sending)
            .chain([attempt])
            .chain(paced)
            .flatten()
            .min()
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Instant, wall: SystemTime) {
        if self.closed {
            return;
        }
        self.wall = Some((now, wall));
        self.expire(now);
        self.observe(now);
        self.confirm(now);
        self.arrive(now);
        self.search_anew(now);
        self.look_at_announcement(now);
        if self.endpoint().is_some()
            && now >= self.next_attempt
            && now >= self.handshake_wanted_at()
        {
            self.initiate(now, wall);
        }
        if !self.sessions.is_sending() {
            return;
        }
        if self.tells() && self.outgoing.due().is_some_and(|due| now >= due) {
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
            self.send_keepalive(now);
        }
    }

    // What comes out.

    /// What has happened. Take all events before [`poll_transmit`](Self::poll_transmit).
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// The next datagram to send.
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
        let payload = InitiationPayload {
            timestamp: self.next_timestamp(wall),
            seen: self.seen,
            run: self.run,
            offer: self.config.offer,
            checks: false,
            lanes: self.config.lanes,
            question: None,
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
                Initiating::begin(keys, *role, index, &payload, entropy)
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
                timestamp: payload.timestamp,
                seen: payload.seen,
            },
            sent: now,
        });
        self.transmit(to, message.to_vec());
    }

    /// Whether the settings accept what the peer asks for.
    fn answer(&self, question: Option<&Move>) -> Accepts {
        match (&self.accept, question) {
            (Some(accept), Some(moved)) => {
                let all = accept.is_empty() || Accept::all_accept(accept, moved);
                if all { Accepts::Yes } else { Accepts::No }
            }
            (None, _) | (_, None) => Accepts::Unsaid,
        }
    }

    /// What this host's clock shows, by what it last showed; 0 if it was not looked at yet.
    fn clock(&self, now: Instant) -> u64 {
        let Some((then, shown)) = self.wall else {
            return 0;
        };
        let shown = shown + now.saturating_duration_since(then);
        let since = shown.duration_since(SystemTime::UNIX_EPOCH);
        since.map_or(0, |since| since.as_nanos() as u64)
    }

    /// The next timestamp. It rises with every call, whatever the clock does.
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
        from: Endpoint,
        initiation: &Initiation<'_>,
    ) -> Result<(), DropReason> {
        let (responding, payload) =
            Responding::read(&self.config.keys, initiation, &self.config.entropy)?;
        if payload.checks {
            return self.answer_check(now, from, initiation, responding, &payload);
        }
        // Even a stale message tells the truth about what the peer had accepted from us.
        self.timestamp = self.timestamp.max(payload.seen);
        if payload.timestamp <= self.seen {
            // Timestamps rise within a run: one of the same run is a replay, or was overtaken on
            // the way.
            if payload.run != self.seen_run {
                self.reply_to_stale(now);
            }
            return Err(DropReason::HandshakeReplay);
        }
        if !self.answered.spend(now, 1) {
            return Err(DropReason::HandshakeLimited);
        }
        self.seen = payload.timestamp;
        self.seen_run = payload.run;
        let TunnelConfig { keys, role, .. } = &self.config;
        let role = *role;
        let reply = self.reply(now, &payload);
        let cipher = reply.cipher;
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
            responding.respond(keys, role, sender, initiation.sender(), &reply)
        else {
            self.warn(now, Warning::NoEntropy);
            return Err(DropReason::ControlBusy);
        };
        if let (Some(cipher), Some(index)) = (cipher, index) {
            self.sessions.install(
                SessionSpec {
                    index,
                    remote: initiation.sender(),
                    cipher,
                    keys: split,
                    initiator: initiation.role(),
                    own_role: role,
                    own_lanes: self.config.lanes,
                    peer_lanes: payload.lanes,
                    peer: self.config.peer,
                    created: now,
                    activity: Arc::clone(&self.activity),
                },
                Origin {
                    initiator: initiation.role(),
                    timestamp: payload.timestamp,
                    seen: payload.seen,
                },
                payload.run,
                &mut self.events,
            );
            // The peer confirms the session next; an initiation of ours would only cross its own.
            let pace = self.with_jitter(self.config.timers.fast_retry);
            self.next_attempt = self.next_attempt.max(now + pace);
        } else {
            self.warn_cipher(now, payload.offer);
        }
        self.transmit(from, message.to_vec());
        Ok(())
    }

    /// Answers a check, each once, and leaves everything here as it was: no session, no timestamp
    /// that the peer's daemon would have to exceed, no warning. It has answers of its own, so that
    /// checks that are played back take none of the peer's.
    fn answer_check(
        &mut self,
        now: Instant,
        from: Endpoint,
        initiation: &Initiation<'_>,
        responding: Responding,
        payload: &InitiationPayload,
    ) -> Result<(), DropReason> {
        if !self.checked.is_new(payload.timestamp) {
            return Err(DropReason::HandshakeReplay);
        }
        if !self.checks.spend(now, 1) {
            return Err(DropReason::HandshakeLimited);
        }
        self.checked.remember(payload.timestamp);
        let TunnelConfig {
            keys,
            role,
            entropy,
            indexes,
            ..
        } = &self.config;
        let reply = self.reply(now, payload);
        // Drawn, so that no session of ours has it, and given back at once.
        let index = indexes.draw(entropy).map_err(|_| DropReason::ControlBusy)?;
        let sender = reply.cipher.map_or(0, |_| index.value);
        let (_, message) = responding
            .respond(keys, *role, sender, initiation.sender(), &reply)
            .ok_or(DropReason::ControlBusy)?;
        self.transmit(from, message.to_vec());
        Ok(())
    }

    /// What is answered to an initiation.
    fn reply(&self, now: Instant, payload: &InitiationPayload) -> ResponsePayload {
        let offer = self.config.offer;
        ResponsePayload {
            run: self.run,
            cipher: offer.agree(payload.offer),
            offer,
            lanes: self.config.lanes,
            clock: self.clock(now),
            version: version(),
            accepts: self.answer(payload.question.as_ref()),
        }
    }

    /// Tells a peer whose clock was set back which timestamp to exceed. The message goes to the
    /// endpoint that we know: whoever replays the peer's messages learns nothing.
    fn reply_to_stale(&mut self, now: Instant) {
        let recently = self
            .stale_replied
            .is_some_and(|at| now < at + STALE_REPLY_PACE);
        if !recently {
            self.stale_replied = Some(now);
            self.forced = true;
            self.next_attempt = self.next_attempt.min(now);
        }
    }

    fn handle_response(
        &mut self,
        now: Instant,
        from: Endpoint,
        response: &Response<'_>,
    ) -> Result<(), DropReason> {
        let at = self
            .pending
            .iter()
            .position(|pending| pending.initiating.index() == response.receiver())
            .ok_or(DropReason::HandshakeUnexpected)?;
        let (payload, split) = self.pending[at].initiating.read(response)?;
        let Some(pending) = self.pending.remove(at) else {
            return Err(DropReason::HandshakeUnexpected);
        };
        // This one was answered; the others that we sent in the meantime need no response.
        self.pending.clear();
        self.activity.control_received(now);
        self.learn(now, from);
        // A peer that chooses a cipher that was not offered is refused like one that chooses none.
        let cipher = payload
            .cipher
            .filter(|&cipher| self.config.offer.agree(payload.offer) == Some(cipher));
        let Some(cipher) = cipher else {
            self.warn_cipher(now, payload.offer);
            self.slow_down(now);
            return Ok(());
        };
        let index = self.sessions.install(
            SessionSpec {
                index: pending.initiating.into_index(),
                remote: response.sender(),
                cipher,
                keys: split,
                initiator: self.config.role,
                own_role: self.config.role,
                own_lanes: self.config.lanes,
                peer_lanes: payload.lanes,
                peer: self.config.peer,
                created: now,
                activity: Arc::clone(&self.activity),
            },
            pending.origin,
            payload.run,
            &mut self.events,
        );
        if let Some(index) = index {
            self.sessions.begin_confirming(index, now);
            self.make_usable(now, index);
            self.confirm(now);
            self.observe(now);
        }
        Ok(())
    }

    // Sessions.

    /// An authenticated datagram came in on a session.
    fn heard(&mut self, now: Instant, index: u32) {
        if self.sessions.heard(index) {
            self.make_usable(now, index);
            // The initiator repeats its keepalive until it hears us.
            self.send_keepalive(now);
        }
        self.observe(now);
    }

    /// The peer proved that it holds the keys of a session.
    fn make_usable(&mut self, now: Instant, index: u32) {
        // Initiations from before this need no response any more.
        self.pending.clear();
        self.attempts = 0;
        self.next_attempt = now;
        self.forced = false;
        let sending = self.sessions.make_usable(index, &mut self.events);
        self.follow(now, sending);
    }

    /// Ends sessions and initiations that are too old.
    fn expire(&mut self, now: Instant) {
        let life = self.config.timers.reject_after;
        let sending = self.sessions.expire(now, life, &mut self.events);
        self.follow(now, sending);
        self.pending
            .retain(|pending| now < pending.sent + PENDING_LIFE);
    }

    /// Does what follows when lanes send on another session, or on none.
    fn follow(&mut self, now: Instant, sending: Sending) {
        match sending {
            Sending::Unchanged => {}
            Sending::Switched { first } => {
                let current = self.sessions.current();
                let anew =
                    current.is_some_and(|current| self.outgoing.send_to(current.peer_run, now));
                if anew {
                    self.news.tell_anew();
                    self.modes.tell_anew();
                }
                if first || anew {
                    self.next_ping = now;
                }
            }
            Sending::Lost => self.stop_sending(),
        }
    }

    fn stop_sending(&mut self) {
        self.sessions.stop_sending(&mut self.events);
        if self.state == State::Up {
            self.set_state(State::Down);
        }
    }

    /// Shows the peer that we hold the keys of the sessions we asked for, until we hear that it
    /// knows.
    fn confirm(&mut self, now: Instant) {
        while let Some(session) = self.sessions.take_unconfirmed(now) {
            self.send_sealed(now, &session, &ControlMessage::Keepalive { news: &[] }, 0);
        }
    }

    /// Finds out from the times that lanes left whether the peer is there.
    fn observe(&mut self, now: Instant) {
        // Sessions on which a lane heard the peer first but could not report it.
        while let Some(index) = self.sessions.heard_but_not_usable() {
            self.make_usable(now, index);
        }
        if !self.sessions.is_sending() {
            return;
        }
        let silent = now >= self.silence_since() + self.config.timers.down_after;
        match (self.state, silent) {
            (State::Up, true) => self.set_state(State::Down),
            (State::Connecting | State::Down, false) => self.set_state(State::Up),
            (State::Up, false) | (State::Connecting | State::Down, true) => {}
        }
    }

    /// When a handshake is wanted, regardless of the pace of attempts; possibly long ago.
    fn handshake_wanted_at(&self) -> Instant {
        let timers = &self.config.timers;
        let current = self.sessions.current().filter(|it| !it.inherited);
        let Some(current) = current.filter(|_| !self.forced) else {
            return self.next_attempt;
        };
        let session = &current.session;
        if session.messages() >= session.cipher().rekey_after() {
            return self.next_attempt;
        }
        let rekey = if session.is_initiator() {
            timers.rekey_after
        } else {
            timers.rekey_after + RESPONDER_GRACE
        };
        let unheard = current
            .confirm_at
            .map(|_| session.created() + CONFIRM_TIMEOUT);
        let silent = self.silence_since() + timers.answer_timeout;
        [Some(session.created() + rekey), Some(silent), unheard]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(silent)
    }

    /// Since when the peer has been silent. A new session counts as a sign of life.
    fn silence_since(&self) -> Instant {
        let current = self.sessions.current();
        let created = current.map(|current| current.session.created());
        let heard = self.activity.last_received();
        heard.max(created).unwrap_or(self.next_attempt)
    }

    // Control messages.

    fn handle_pong(&mut self, now: Instant, id: u32) {
        if let Some((_, sent)) = self.ping.take_if(|(expected, _)| *expected == id) {
            let rtt = now.saturating_duration_since(sent);
            self.rtt = Some(rtt);
            self.discover(|mtu| mtu.set_rtt(rtt));
            self.events.push_back(Event::Rtt(rtt));
        }
    }

    fn send_ping(&mut self, now: Instant) {
        self.pings = self.pings.wrapping_add(1);
        self.ping = Some((self.pings, now));
        self.next_ping = now + self.config.timers.ping;
        self.send(now, &ControlMessage::Ping { id: self.pings });
        if !self.tells() {
            return;
        }
        if self.news.again() {
            self.send_keepalive(now);
        }
        let progress = self.progress.take_turn();
        self.send_keepalives(now, &progress);
        let modes = self.modes.take_turn();
        self.send_keepalives(now, &modes);
    }

    fn send_keepalives(&mut self, now: Instant, with: &[Vec<u8>]) {
        for news in with {
            self.send(now, &ControlMessage::Keepalive { news });
        }
    }

    fn send_keepalive(&mut self, now: Instant) {
        let tells = self.tells();
        let news = if tells { self.news.bytes() } else { Vec::new() };
        self.send(now, &ControlMessage::Keepalive { news: &news });
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
        if let Some(whole) = self.incoming.push(peer_run, id, part, parts, body) {
            self.announced.put(whole);
            self.look_at_announcement(now);
        }
    }

    fn look_at_announcement(&mut self, now: Instant) {
        let Some(whole) = self.announced.take(now) else {
            return;
        };
        match Announcement::decode(&whole) {
            Some(announcement) if announcement.role() == self.config.role.other() => {
                self.events.push_back(Event::PeerConfig(announcement));
                self.said = Some(whole);
            }
            _ => self.warn(now, Warning::ConfigUnreadable),
        }
    }

    fn send_config(&mut self, now: Instant) {
        let peer_run = self.sessions.current().map(|current| current.peer_run);
        let (id, parts) = (self.outgoing.id(), self.outgoing.count());
        for (part, body) in self.outgoing.take_due(now, peer_run) {
            let message = ControlMessage::Config {
                id,
                part,
                parts,
                body: &body,
            };
            self.send(now, &message);
        }
    }

    /// When a probe is due. Probes to a peer that is not there tell nothing about the path.
    fn probe_due(&self) -> Option<Instant> {
        let up = self.state == State::Up;
        self.mtu
            .as_ref()
            .filter(|_| up)
            .map(MtuDiscovery::next_timeout)
    }

    fn send_probe(&mut self, now: Instant) {
        let heard = self.activity.last_received();
        let mut probe = None;
        let carried = self.activity.last_data_sent();
        self.discover(|mtu| probe = mtu.poll(now, heard, carried));
        if let (Some(size), Some(session)) = (probe, self.session().map(Arc::clone)) {
            self.send_sealed(
                now,
                &session,
                &ControlMessage::Probe { size },
                usize::from(size),
            );
            if self.mtu.as_ref().is_some_and(MtuDiscovery::is_doubtful) {
                // If a small message gets its reply, only the large size is lost.
                self.send_ping(now);
            }
        }
    }

    /// Lets the MTU discovery do something, and tells the daemon if that changed its result.
    fn discover(&mut self, with: impl FnOnce(&mut MtuDiscovery)) {
        if let Some(mtu) = &mut self.mtu {
            let before = mtu.current();
            with(mtu);
            let after = mtu.current();
            if before != after {
                self.events.push_back(Event::PathMtu(after));
            }
        }
    }

    /// The peer's daemon ended: the sessions of that run are of no use any more.
    fn handle_close(&mut self, now: Instant, peer_run: u64) {
        self.sessions.remove_run(peer_run, &mut self.events);
        if self.sessions.current().is_none() {
            self.stopped = Some(now);
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
        // Even if sending fails: the pace of attempts is the same.
        self.activity.control_sent(now);
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

    fn transmit(&mut self, to: Endpoint, datagram: Vec<u8>) {
        self.transmits.push_back(Transmit {
            to,
            datagram,
            probe: false,
        });
    }

    fn learn(&mut self, now: Instant, from: Endpoint) {
        if self.learned != Some(from) {
            self.learned = Some(from);
            self.events.push_back(Event::Endpoint(from));
            self.arrived.put(from);
            self.arrive(now);
            self.search_anew(now);
        }
    }

    fn arrive(&mut self, now: Instant) {
        if let Some(endpoint) = self.arrived.take(now) {
            self.events.push_back(Event::Arrived(endpoint));
        }
    }

    /// When to search the path from the beginning; `None` if the peer is where it was.
    fn search_due(&self) -> Option<Instant> {
        let (searched, since) = self.searched?;
        let remote = self.learned?.remote;
        let due = since.map(|since| since + SEARCH_PACE)?;
        (remote != searched).then_some(due)
    }

    /// Searches the path from the beginning if the peer has moved, though not too often.
    fn search_anew(&mut self, now: Instant) {
        let Some(remote) = self.learned.map(|at| at.remote) else {
            return;
        };
        match self.searched {
            // The first search has begun already.
            None => self.searched = Some((remote, None)),
            Some((searched, _)) if searched == remote => {}
            Some((_, Some(since))) if now < since + SEARCH_PACE => {}
            Some(_) => {
                self.searched = Some((remote, Some(now)));
                self.discover(|mtu| mtu.restart(now));
            }
        }
    }

    fn configured(&self) -> Option<Endpoint> {
        let remote = self.config.endpoint?;
        Some(Endpoint {
            remote,
            local: None,
        })
    }

    /// Where the next initiation goes. It alternates between where the peer was last heard and
    /// where the settings say it is, since the peer may be back there after a restart.
    fn attempt_path(&self) -> Option<Endpoint> {
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

    /// Adds up to a third, so that the two sides do not cross again and again.
    fn with_jitter(&self, pace: Duration) -> Duration {
        let random = self.config.entropy.u64().unwrap_or(0);
        let third = (pace.as_millis() as u64 / 3).max(1);
        pace + Duration::from_millis(random % third)
    }

    fn is_current_run(&self, peer_run: u64) -> bool {
        let current = self.sessions.current();
        current.is_some_and(|current| current.peer_run == peer_run)
    }

    fn set_state(&mut self, state: State) {
        if state == State::Up {
            self.stopped = None;
        }
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

/// This program's version, in three numbers.
fn version() -> [u8; 3] {
    let number = |text: &str| text.parse().unwrap_or(0);
    [
        number(env!("CARGO_PKG_VERSION_MAJOR")),
        number(env!("CARGO_PKG_VERSION_MINOR")),
        number(env!("CARGO_PKG_VERSION_PATCH")),
    ]
}

impl fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tunnel")
            .field("peer", &self.config.peer)
            .field("role", &self.config.role)
            .field("state", &self.state)
            .field("sending", &self.session())
            .finish_non_exhaustive()
    }
}
