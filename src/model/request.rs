//! What an administrator's command asks of the daemon, and what the daemon answers: one JSON
//! document on a line each.

use serde::{Deserialize, Serialize};

use crate::model::asked::Asked;
use crate::model::mode::Percent;

/// A command to the old server's daemon. `what` names moves as `--move` does; none means all.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "lowercase")]
pub enum Request {
    /// New conversations go to the new server, or those of some clients.
    Move {
        /// Of what.
        what: Vec<String>,
        /// How many per cent of all clients; `None` means all.
        percent: Option<Percent>,
    },
    /// New conversations wait.
    Hold {
        /// Of what.
        what: Vec<String>,
        /// For how long at most.
        seconds: u32,
    },
    /// New conversations go to the old server's own service.
    Back {
        /// Of what.
        what: Vec<String>,
    },
    /// Nobody but this connection changes the modes of these moves, until it ends.
    Cutover {
        /// Of what.
        what: Vec<String>,
        /// Meanwhile the new server is asked whether something listens for these.
        #[serde(default)]
        asks: Vec<Asked>,
    },
    /// The service here is being stopped, and this connection starts it again if it goes back. Who
    /// goes back in its place lets new conversations wait meanwhile.
    Stopping {
        /// Of what.
        what: Vec<String>,
    },
    /// What the new server refuses is kept from clients, as long as this connection lasts.
    Shield {
        /// Of what.
        what: Vec<String>,
        /// For how long at most.
        seconds: u32,
    },
    /// What is noted of conversations that the old server has is forgotten.
    Forget {
        /// Of what.
        what: Vec<String>,
    },
    /// The configuration is read again, on either server.
    Reload,
}

impl Request {
    /// What it is about.
    pub fn what(&self) -> &[String] {
        match self {
            Self::Move { what, .. }
            | Self::Hold { what, .. }
            | Self::Back { what }
            | Self::Cutover { what, .. }
            | Self::Shield { what, .. }
            | Self::Stopping { what }
            | Self::Forget { what } => what,
            Self::Reload => &[],
        }
    }
}

/// What the daemon says to a [`Request`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Answer {
    /// It is done.
    Done {
        /// The moves that it was about, in the order of the settings.
        moves: Vec<Changed>,
        /// What an administrator should know.
        warnings: Vec<String>,
        /// Conversations that were forgotten.
        forgotten: u64,
    },
    /// The configuration was read again, and is in use.
    Reloaded {
        /// What is another one than before, a line each.
        changes: Vec<String>,
        /// What an administrator should know.
        warnings: Vec<String>,
    },
    /// It is not done, and nothing has changed.
    Refused {
        /// The command itself is wrong.
        input: bool,
        /// Why, and what to do.
        why: String,
    },
}

/// A move, and its mode before and after the command, in words.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Changed {
    /// The move, as `--move` names it.
    pub what: String,
    /// The mode before.
    pub before: String,
    /// The mode now.
    pub mode: String,
}
