//! How far a move has come, as the new server sees it and tells the old one.

use serde::{Deserialize, Serialize};

/// What the new server knows of one move. Counts are those since its daemon started.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Progress {
    /// Whether something listens where the move is delivered.
    pub listens: Listens,
    /// Conversations that came by the tunnel and live: connections of TCP, and what else was
    /// answered as long as it is remembered.
    pub live: u64,
    /// New conversations that came by the tunnel and were answered; of TCP, went on after that.
    pub by_tunnel: u64,
    /// Those that came directly to where the move is delivered.
    pub directly: u64,
}

impl Progress {
    /// How many per cent of all new conversations came directly; `None` if there were none.
    pub fn percent_directly(&self) -> Option<u64> {
        let all = u128::from(self.by_tunnel) + u128::from(self.directly);
        let percent = (u128::from(self.directly) * 100).checked_div(all)?;
        u64::try_from(percent).ok()
    }
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
