//! How far a move has come, as the new server sees it and tells the old one.

use serde::{Deserialize, Serialize};

/// What the new server knows of one move. Counts are those since its daemon started.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Progress {
    /// Whether something listens where the move is delivered.
    pub listens: Listens,
    /// Conversations that came by the tunnel and live.
    pub live: u64,
    /// New conversations that came by the tunnel.
    pub by_tunnel: u64,
    /// New conversations that came directly to where the move is delivered.
    pub directly: u64,
}

/// Whether something listens.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Listens {
    /// On every port that has moved by number.
    Yes,
    /// Not on all of them.
    No,
    /// Nobody can tell: no port is named, or what is there may be in a container.
    #[default]
    Unknown,
}
