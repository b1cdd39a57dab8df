//! How far a move has come, as the new server sees it and tells the old one.

use serde::{Deserialize, Serialize};

use crate::model::moved::Move;

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

/// What is lacking of a move on the new server where something does not listen on all of its ports
/// ([`Listens::No`]), for people. `what` is the move as it was typed.
pub fn lacking(what: &str) -> &'static str {
    let moved = what.parse::<Move>();
    let one = |moved: Move| match moved.ports.as_slice() {
        [] => true,
        [range] => range.start() == range.end() && moved.prefix.is_single(),
        _ => false,
    };
    if moved.is_ok_and(one) {
        "nothing listens on the new server"
    } else {
        "not all of its ports are open on the new server"
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_many_ports_only_some_may_be_missing() {
        for one in ["192.0.2.5:80/tcp", "[2001:db8::5]:53", "192.0.2.5"] {
            assert!(lacking(one).starts_with("nothing listens"), "{one}");
        }
        for some in ["192.0.2.5:80,443/tcp", "192.0.2.5:80-81", "192.0.2.0/28:80"] {
            assert!(lacking(some).starts_with("not all"), "{some}");
        }
    }
}
