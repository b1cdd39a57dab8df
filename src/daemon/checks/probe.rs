//! Speaks with a peer as far as the first answer, and no further.
//!
//! ```text
//! initiation ──► peer     which is told that nobody will use a session, and keeps none
//!           ◄── response  the key is right
//! ```
//!
//! So nothing is displaced, announced or logged there, whether the peer has a session with a daemon
//! here or not. Where no daemon runs here, the tunnel's own port is used: then the peer's own
//! initiations are heard as well, and tell more than silence does.

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant, SystemTime};

use crate::channel::session::{
    Accepts, Initiating, InitiationPayload, MacCheck, Offer, PeerKeys, Responding, ResponsePayload,
    SessionIndexes,
};
use crate::channel::wire::{Message, TYPE_INITIATION};
use crate::io::entropy;
use crate::model::drops::DropReason;
use crate::model::moved::Move;
use crate::model::peer::Role;

/// How long an answer is waited for. A peer that waits for this server initiates every five to
/// seven seconds.
const PATIENCE: Duration = Duration::from_secs(7);

/// The same where the peer's initiations go to a daemon here.
const SHORT_PATIENCE: Duration = Duration::from_secs(3);

/// How long an answer is waited for once the peer was heard otherwise.
const AFTER_A_SIGN: Duration = Duration::from_secs(2);

/// Between two tries. A peer answers eight a second.
const PACE: Duration = Duration::from_millis(500);

/// Refusals of the network that are believed: one may be late, of another conversation.
const REFUSALS: u32 = 2;

/// How often it is looked whether it is time for the next try.
const TICK: Duration = Duration::from_millis(50);

/// Whom to speak with, and as whom.
pub(super) struct Probe {
    pub(super) keys: PeerKeys,
    pub(super) role: Role,
    pub(super) offer: Offer,
    pub(super) lanes: u8,
    /// What it is asked whether it would accept, one after the other.
    pub(super) questions: Vec<Move>,
    pub(super) peer: SocketAddr,
    /// The tunnel's own end here, if no daemon has it.
    pub(super) own: SocketAddr,
    /// Whether that is so.
    pub(super) is_free: bool,
}

/// What came of it.
#[derive(Debug)]
pub(super) enum Answer {
    /// It agrees to a session.
    Agrees {
        /// What it says.
        payload: ResponsePayload,
        /// How long it took.
        rtt: Duration,
        /// What of the questions it would not accept.
        refuses: Vec<Move>,
    },
    /// It does not answer, but initiates itself with the same key: this one said so much.
    Calls(InitiationPayload),
    /// It initiates itself, and has the same role.
    SameRole,
    /// It initiates itself, with another key.
    OtherKey,
    /// It speaks another version of the protocol.
    OtherVersion,
    /// The network refuses.
    Refused(io::Error),
    /// Nothing at all.
    Nothing,
}

/// Asks.
pub(super) fn ask(probe: &Probe) -> io::Result<Answer> {
    let port = if probe.is_free { probe.own.port() } else { 0 };
    let socket = UdpSocket::bind(SocketAddr::new(probe.own.ip(), port))?;
    socket.connect(probe.peer)?;
    socket.set_read_timeout(Some(TICK))?;
    let mut asking = Asking {
        mac: MacCheck::new(probe.role, [probe.keys.clone()]),
        probe,
        run: entropy::system().u64().map_err(io::Error::other)?,
        timestamp: 0,
        indexes: SessionIndexes::default(),
        pending: Vec::new(),
        answered: 0,
        refuses: Vec::new(),
    };
    let start = Instant::now();
    let patience = match probe.is_free {
        true => PATIENCE,
        false => SHORT_PATIENCE,
    };
    let (mut until, mut next) = (start + patience, start);
    let (mut sign, mut refusals) = (None, 0);
    let mut buffer = [0; 2048];
    loop {
        let now = Instant::now();
        if now >= until {
            return Ok(sign.unwrap_or(Answer::Nothing));
        }
        let sent = if now >= next {
            next = now + PACE;
            asking.initiate(&socket, now)
        } else {
            Ok(())
        };
        let heard = match sent {
            Ok(()) => socket.recv(&mut buffer),
            Err(error) => Err(error),
        };
        match heard {
            Ok(length) => match asking.hear(Instant::now(), &buffer[..length]) {
                Some(answer @ Answer::Agrees { .. }) if asking.is_done() => return Ok(answer),
                Some(answer @ Answer::Agrees { .. }) => {
                    next = now;
                    until = until.min(now + AFTER_A_SIGN);
                    sign = Some(answer);
                }
                Some(other) => {
                    if let Answer::Calls(_) = other {
                        // It may know a later time than this server's clock has.
                        next = now;
                    }
                    if sign.is_none() {
                        until = until.min(now + AFTER_A_SIGN);
                    }
                    sign = Some(other);
                }
                None => {}
            },
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                ) => {}
            Err(error) => {
                refusals += 1;
                if refusals >= REFUSALS {
                    return Ok(Answer::Refused(error));
                }
            }
        }
    }
}

/// A conversation that does not get far.
struct Asking<'a> {
    probe: &'a Probe,
    mac: MacCheck,
    run: u64,
    timestamp: u64,
    indexes: SessionIndexes,
    pending: Vec<(Initiating, Instant)>,
    /// Questions that were answered, or are not.
    answered: usize,
    refuses: Vec<Move>,
}

impl Asking<'_> {
    fn initiate(&mut self, socket: &UdpSocket, now: Instant) -> io::Result<()> {
        let clock = nanoseconds(SystemTime::now());
        self.timestamp = self.timestamp.saturating_add(1).max(clock);
        let payload = InitiationPayload {
            timestamp: self.timestamp,
            seen: 0,
            run: self.run,
            offer: self.probe.offer,
            checks: true,
            lanes: self.probe.lanes,
            question: self.probe.questions.get(self.answered).cloned(),
        };
        let entropy = entropy::system();
        let index = self.indexes.draw(&entropy).map_err(io::Error::other)?;
        let Probe { keys, role, .. } = self.probe;
        let begun = Initiating::begin(keys, *role, index, &payload, &entropy);
        let (initiating, message) = begun.ok_or_else(|| io::Error::other("no randomness"))?;
        self.pending.push((initiating, now));
        socket.send(&message).map(drop)
    }

    /// Whether everything was asked.
    fn is_done(&self) -> bool {
        self.answered >= self.probe.questions.len()
    }

    /// What a datagram of the peer's says.
    fn hear(&mut self, now: Instant, datagram: &[u8]) -> Option<Answer> {
        let admitted = match self.mac.admit(now, self.probe.peer, datagram) {
            Ok(admitted) => admitted,
            // Only its own initiations say whose key that is: a response is one to us.
            Err(dropped) if dropped.reason == DropReason::HandshakeAuth => {
                let calls = datagram.first() == Some(&TYPE_INITIATION);
                return calls.then_some(Answer::OtherKey);
            }
            Err(dropped) if dropped.reason == DropReason::WireVersion => {
                return Some(Answer::OtherVersion);
            }
            Err(dropped) if dropped.reason == DropReason::HandshakeRole => {
                return Some(Answer::SameRole);
            }
            Err(_) => return None,
        };
        match admitted.message().ok()? {
            Message::Initiation(initiation) if initiation.role() == self.probe.role => {
                Some(Answer::SameRole)
            }
            Message::Initiation(initiation) => {
                let keys = &self.probe.keys;
                let (_, payload) = Responding::read(keys, &initiation, &entropy::system()).ok()?;
                self.timestamp = self.timestamp.max(payload.seen);
                Some(Answer::Calls(payload))
            }
            Message::Response(response) => {
                let of = |it: &&mut (Initiating, Instant)| it.0.index() == response.receiver();
                let (initiating, sent) = self.pending.iter_mut().find(of)?;
                let rtt = now.saturating_duration_since(*sent);
                let (payload, _) = initiating.read(&response).ok()?;
                // An answer of before may still come.
                self.pending.clear();
                match payload.accepts {
                    Accepts::Unsaid => self.answered = self.probe.questions.len(),
                    Accepts::Yes => self.answered += 1,
                    Accepts::No => {
                        let asked = self.probe.questions.get(self.answered);
                        self.refuses.extend(asked.cloned());
                        self.answered += 1;
                    }
                }
                let refuses = self.refuses.clone();
                Some(Answer::Agrees {
                    payload,
                    rtt,
                    refuses,
                })
            }
            Message::Data(_) => None,
        }
    }
}

/// Nanoseconds since 1970.
pub(super) fn nanoseconds(at: SystemTime) -> u64 {
    let since = at.duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_nanos() as u64)
}
