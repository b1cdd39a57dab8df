//! Who is at the other end: the words that every folder uses for a peer and its role.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

/// Index of a peer in the daemon's configuration; stable while the daemon runs.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct PeerId(pub u16);

/// Most peers that one daemon serves: a stranger's datagram costs one hash for each peer.
pub const MAX_PEERS: usize = 256;

/// Peers and what counts as one where flows are shared out ([`PeerId::SELF`], [`PeerId::BEHIND`]).
pub const MAX_HOLDERS: usize = MAX_PEERS + 2;

impl PeerId {
    /// No peer, but this host itself, where it calls a moved address that it serves.
    pub const SELF: Self = Self(MAX_PEERS as u16);
    /// No peer, but the hosts behind this one (containers, virtual machines), where they do.
    pub const BEHIND: Self = Self(MAX_PEERS as u16 + 1);

    /// Whether it is no peer, and its packets never leave this host.
    #[inline]
    pub fn is_inside(self) -> bool {
        self.0 >= Self::SELF.0
    }
}

/// What a daemon is for the moved addresses of one tunnel.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The server the service has left: it captures the moved addresses (`--move`).
    Old,
    /// The server the service runs on now: it delivers to the application.
    New,
}

impl Role {
    /// The role of the other end of the tunnel.
    pub fn other(self) -> Self {
        match self {
            Self::Old => Self::New,
            Self::New => Self::Old,
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Old => "old",
            Self::New => "new",
        })
    }
}

/// How a peer is reached: where it is, and which of our addresses it knows.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Endpoint {
    /// Its address and port.
    pub remote: SocketAddr,
    /// The address that its datagrams are sent to; `None` lets the kernel choose.
    pub local: Option<IpAddr>,
}
