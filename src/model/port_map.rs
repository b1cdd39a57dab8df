//! Where one port of a moved address is delivered, if not where the others are
//! (`--deliver MOVED:PORT[/tcp|/udp]=ADDR:PORT`).
//!
//! Owns the syntax that people type. Which of several counts for a packet is `flow`'s business.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use crate::model::moved::{Move, MoveError, TCP, Transport, UDP};

/// One port of a moved address that is delivered to another address or port.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PortMap {
    /// TCP or UDP alone.
    pub transport: Option<Transport>,
    /// The moved address.
    pub moved: IpAddr,
    /// The port there.
    pub port: u16,
    /// The delivery address, of the same family.
    pub to: IpAddr,
    /// The port there.
    pub to_port: u16,
}

impl PortMap {
    /// Whether packets of that protocol are delivered by it.
    pub fn takes(&self, protocol: u8) -> bool {
        match self.transport {
            None => protocol == TCP || protocol == UDP,
            Some(Transport::Tcp) => protocol == TCP,
            Some(Transport::Udp) => protocol == UDP,
        }
    }

    /// Whether some packet would be delivered by both.
    pub fn overlaps(&self, other: &Self) -> bool {
        let transports = match (self.transport, other.transport) {
            (Some(a), Some(b)) => a == b,
            _ => true,
        };
        self.moved == other.moved && self.port == other.port && transports
    }
}

/// Why the text of a `--deliver` was refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PortMapError {
    /// It has nothing behind a `=`.
    #[error("`{0}` does not say where to deliver; write 192.0.2.5:80=198.51.100.2:8080")]
    NoTarget(String),
    /// The part before the `=` is no move.
    #[error("{0}")]
    Moved(MoveError),
    /// The part before the `=` is not exactly one port.
    #[error("`{0}` has to name one port of a moved address, as in 192.0.2.5:80")]
    OnePort(String),
    /// The part behind the `=` is no address with a port.
    #[error(
        "`{0}` is not an address and port of this server, \
         as in 198.51.100.2:8080 or [2001:db8::2]:8080"
    )]
    Target(String),
    /// The part behind the `=` is an address that no client's packet can be delivered to.
    #[error(
        "`{0}`: clients' packets cannot be delivered there; \
         give an address of this server's network interface, and a port"
    )]
    Undeliverable(String),
    /// IPv4 on one side and IPv6 on the other.
    #[error("`{0}` is IPv4 on one side and IPv6 on the other; both have to be the same")]
    Families(String),
}

impl FromStr for PortMap {
    type Err = PortMapError;

    fn from_str(text: &str) -> Result<Self, PortMapError> {
        let (from, target) = text
            .split_once('=')
            .ok_or_else(|| PortMapError::NoTarget(text.into()))?;
        let moved: Move = from.parse().map_err(PortMapError::Moved)?;
        let port = match moved.ports.as_slice() {
            [range] if range.start() == range.end() && moved.prefix.is_single() => *range.start(),
            _ => return Err(PortMapError::OnePort(from.into())),
        };
        let to: SocketAddr = target
            .parse()
            .map_err(|_| PortMapError::Target(target.into()))?;
        let host = to.ip();
        if to.port() == 0 || host.is_unspecified() || host.is_multicast() || host.is_loopback() {
            return Err(PortMapError::Undeliverable(target.into()));
        }
        if host.is_ipv4() != moved.prefix.first().is_ipv4() {
            return Err(PortMapError::Families(text.into()));
        }
        Ok(Self {
            transport: moved.transport,
            moved: moved.prefix.first(),
            port,
            to: host,
            to_port: to.port(),
        })
    }
}

impl fmt::Display for PortMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let transport = match self.transport {
            None => "",
            Some(Transport::Tcp) => "/tcp",
            Some(Transport::Udp) => "/udp",
        };
        let (moved, to) = (
            SocketAddr::new(self.moved, self.port),
            SocketAddr::new(self.to, self.to_port),
        );
        write!(f, "{moved}{transport}={to}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_is_shown_again() {
        for text in [
            "192.0.2.5:80=198.51.100.2:8080",
            "192.0.2.5:80/tcp=198.51.100.2:80",
            "[2001:db8::5]:53/udp=[2001:db8::2]:5353",
        ] {
            assert_eq!(text.parse::<PortMap>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn refuses_with_a_reason() {
        for (text, says) in [
            ("", "where to deliver"),
            ("192.0.2.5:80", "where to deliver"),
            ("www:80=198.51.100.2:80", "is a name"),
            ("192.0.2.5=198.51.100.2:80", "one port"),
            ("192.0.2.5:80-81=198.51.100.2:80", "one port"),
            ("192.0.2.5:80,90=198.51.100.2:80", "one port"),
            ("192.0.2.5:0=198.51.100.2:80", "not a port"),
            ("192.0.2.5:80=198.51.100.2", "address and port"),
            ("192.0.2.5:80=198.51.100.2:0", "cannot be delivered"),
            ("192.0.2.5:80=127.0.0.1:80", "cannot be delivered"),
            ("192.0.2.5:80=[2001:db8::2]:80", "IPv6"),
        ] {
            let error = text.parse::<PortMap>().unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn overlaps_are_seen() {
        let overlap = |a: &str, b: &str| {
            let map = |from: &str| format!("{from}=198.51.100.2:1").parse::<PortMap>().unwrap();
            map(a).overlaps(&map(b))
        };
        assert!(overlap("192.0.2.5:80", "192.0.2.5:80/udp"));
        assert!(overlap("192.0.2.5:80/udp", "192.0.2.5:80/udp"));
        assert!(!overlap("192.0.2.5:80/tcp", "192.0.2.5:80/udp"));
        assert!(!overlap("192.0.2.5:80", "192.0.2.5:81"));
        assert!(!overlap("192.0.2.5:80", "192.0.2.6:80"));
    }
}
