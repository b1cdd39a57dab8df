//! What clients ask for, one port of one moved address or a protocol without ports, and whether it
//! is answered.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::model::moved::{TCP, UDP};

/// What a conversation is for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct Asked {
    /// The moved address.
    pub addr: IpAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// The port; 0 for protocols without.
    pub port: u16,
}

impl fmt::Display for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = SocketAddr::new(self.addr, self.port);
        match self.protocol {
            TCP => write!(f, "{end}/tcp"),
            UDP => write!(f, "{end}/udp"),
            other => write!(f, "{} (IP protocol {other})", self.addr),
        }
    }
}

/// What is known of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Answered, as far as is known.
    Well,
    /// No answer yet. That is no fault of this protocol.
    Unanswered,
    /// The server says that nothing is there.
    Refused,
    /// Packets go in, and nothing comes out.
    Silent,
}

/// Whether something listens there, where it is delivered.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Found {
    /// Something does.
    Yes,
    /// Nothing does.
    No,
    /// Nothing was found, but that server forwards packets, and a container may answer.
    Perhaps,
    /// Nobody can tell.
    #[default]
    Unknown,
}

/// What one server tells the other of something that is not well.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Trouble {
    /// What clients ask for.
    pub asked: Asked,
    /// What becomes of it. Of what nobody has asked for yet it is [`Verdict::Unanswered`].
    pub verdict: Verdict,
    /// The name of the cause; empty if that server does not know it.
    pub cause: String,
    /// Why, for people; empty if that server does not know.
    pub why: String,
    /// How long ago the first of the clients that wait came, so that both servers speak of the
    /// same; zero if none waits.
    pub age: Duration,
}

/// What one server has seen of something that the other one says is not answered, since the first
/// of those came who wait there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct View {
    /// What clients ask for.
    pub asked: Asked,
    /// Clients' packets came.
    pub came: bool,
    /// They were answered.
    pub answered: bool,
}

/// Everything that one server tells the other of what is not answered.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct News {
    /// What is not well.
    pub troubles: Vec<Trouble>,
    /// What it sees of the troubles of the other.
    pub views: Vec<View>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_reads_as_what_is_moved() {
        let asked = |addr: &str, protocol, port| {
            let addr = addr.parse().unwrap();
            Asked {
                addr,
                protocol,
                port,
            }
            .to_string()
        };
        assert_eq!(asked("192.0.2.5", TCP, 80), "192.0.2.5:80/tcp");
        assert_eq!(asked("2001:db8::5", UDP, 53), "[2001:db8::5]:53/udp");
        assert_eq!(asked("192.0.2.5", 47, 0), "192.0.2.5 (IP protocol 47)");
    }
}
