//! What a tunnel is made of, and the times by which it runs.

use std::net::SocketAddr;
use std::time::Duration;

use super::messages::Announcement;
#[cfg(doc)]
use crate::channel::pmtu;
use crate::channel::session::{Entropy, Offer, PeerKeys, SessionIndexes};
use crate::model::peer::{PeerId, Role};

/// Everything a tunnel is made of.
#[derive(Clone, Debug)]
pub struct TunnelConfig {
    /// The peer's place in the daemon's configuration.
    pub peer: PeerId,
    /// The keys derived from the secret that is shared with the peer.
    pub keys: PeerKeys,
    /// This side's role.
    pub role: Role,
    /// This side's data lanes.
    pub lanes: u8,
    /// This side's ciphers.
    pub offer: Offer,
    /// `--peer`; without it this side waits until the peer finds it.
    pub endpoint: Option<SocketAddr>,
    /// Our announcement to the peer.
    pub announcement: Announcement,
    /// Largest datagram (UDP payload) that the uplink takes: the limit of the search for the path
    /// MTU. With `None` no probes are sent, and the path MTU stays at [`pmtu::BASE`].
    pub max_datagram: Option<u16>,
    /// Usually [`Timers::default`].
    pub timers: Timers,
    /// Shared by all tunnels of the daemon.
    pub indexes: SessionIndexes,
    /// Usually the system's: `io::entropy::system`.
    pub entropy: Entropy,
}

/// The times of the protocol. The defaults are WireGuard's where it has them ("WireGuard: Next
/// Generation Kernel Network Tunnel", section 6).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timers {
    /// A session this old is replaced: 120 s.
    pub rekey_after: Duration,
    /// A session this old is refused: 180 s.
    pub reject_after: Duration,
    /// Something is sent at least this often: 10 s.
    pub keepalive: Duration,
    /// After so much silence the session or the path is taken to be gone: 15 s.
    pub answer_timeout: Duration,
    /// After so much silence the peer is taken to be down: 25 s.
    pub down_after: Duration,
    /// Time between retries: 5 s, and up to a third more at random.
    pub retry: Duration,
    /// Time between the first retries: 1 s, and up to a third more at random.
    pub fast_retry: Duration,
    /// Time between round trip measurements: 5 s.
    pub ping: Duration,
}

impl Default for Timers {
    fn default() -> Self {
        Self {
            rekey_after: Duration::from_secs(120),
            reject_after: Duration::from_secs(180),
            keepalive: Duration::from_secs(10),
            answer_timeout: Duration::from_secs(15),
            down_after: Duration::from_secs(25),
            retry: Duration::from_secs(5),
            fast_retry: Duration::from_secs(1),
            ping: Duration::from_secs(5),
        }
    }
}

impl Timers {
    /// The defaults with another interval between sessions, for tests that want many of them.
    pub fn with_rekey_after(rekey_after: Duration) -> Self {
        Self {
            rekey_after,
            ..Self::default()
        }
    }
}
