//! What a tunnel asks of the daemon around it: datagrams to send, and what has happened.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::messages::Announcement;
use super::mode_news::PeerModes;
use super::progress_news::MoveName;
use crate::channel::session::{Ciphers, Session};
use crate::model::asked::{Asked, Found, News};
use crate::model::peer::{Endpoint, Role};
use crate::model::progress::Progress;

/// Something that the daemon has to react to.
#[derive(Clone, Debug)]
pub enum Event {
    /// Lanes accept datagrams on this session from now on.
    SessionInstalled(Arc<Session>),
    /// Lanes forget the session with this index.
    SessionRemoved(u32),
    /// Lanes seal on this session from now on.
    SendOn(Arc<Session>),
    /// Lanes have no session to seal on.
    SendOff,
    /// Lanes send to this endpoint from now on.
    Endpoint(Endpoint),
    /// The peer is at this endpoint: what depends on it is to be decided anew. It comes once a
    /// second at most, the newest in the end, however often the endpoint changes.
    Arrived(Endpoint),
    /// The peer came or went.
    State(State),
    /// The peer announced this. It comes once a second at most, the newest in the end.
    PeerConfig(Announcement),
    /// The peer says that this is not answered, and nothing else. It says so again and again.
    PeerSees {
        /// Which run of the peer says so: another one knows nothing of what came before it.
        run: u64,
        /// What it says.
        news: News,
    },
    /// The peer says how far some moves have come.
    PeerProgress {
        /// Which run of the peer says so: it counts since it began.
        run: u64,
        /// What it says of each.
        progress: Vec<(MoveName, Progress)>,
    },
    /// The peer says which mode its moves are in.
    PeerModes {
        /// Which run of the peer says so.
        run: u64,
        /// What it says.
        modes: PeerModes,
    },
    /// The peer asks whether something listens for these.
    PeerAsks(Vec<Asked>),
    /// The peer tells what it was asked: whether something listens for each.
    PeerTells(Vec<(Asked, Found)>),
    /// A round trip took this long.
    Rtt(Duration),
    /// Largest datagram (UDP payload) that the path carries towards the peer.
    PathMtu(u16),
    /// The operator should know.
    Warning(Warning),
}

/// A datagram of the control task.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Transmit {
    /// Where it goes.
    pub to: Endpoint,
    /// The bytes.
    pub datagram: Vec<u8>,
    /// It asks whether the path carries its size. Send it with "don't fragment"; if the kernel
    /// refuses it because of its size, that is nothing to report.
    pub probe: bool,
}

/// Whether the peer is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// It was not reached yet.
    Connecting,
    /// It answers.
    Up,
    /// It answered once and no longer does.
    Down,
}

impl State {
    /// The name as in `status`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Up => "up",
            Self::Down => "down",
        }
    }
}

/// A problem that only an operator can solve.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Warning {
    /// The peer has this side's role, or somebody sends our own messages back.
    SameRole(Role),
    /// The two sides allow no common cipher.
    NoCommonCipher {
        /// The ciphers that this side allows.
        ours: Ciphers,
        /// The ciphers that the peer allows.
        theirs: Ciphers,
    },
    /// The peer announced something that this version does not understand.
    ConfigUnreadable,
    /// The system gave no randomness, so no handshake can be made.
    NoEntropy,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SameRole(Role::Old) => f.write_str(
                "the peer, too, was given --move: give it to the old server only \
                 (or somebody sends our own messages back to us)",
            ),
            Self::SameRole(Role::New) => f.write_str(
                "neither this daemon nor the peer was given --move: give it to the old server \
                 (or somebody sends our own messages back to us)",
            ),
            Self::NoCommonCipher { ours, theirs } => write!(
                f,
                "no common cipher: --cipher allows {ours} here and {theirs} at the peer; \
                 make them agree"
            ),
            Self::ConfigUnreadable => f.write_str(
                "the peer announced something this version does not understand; \
                 run the same version on both servers",
            ),
            Self::NoEntropy => {
                f.write_str("the system's random number generator failed: no handshake is possible")
            }
        }
    }
}
