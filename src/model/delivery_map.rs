//! What of a moved prefix is delivered elsewhere than the rest
//! (`--deliver MOVED[/LEN][:PORT[/tcp|/udp]]=ADDR[/LEN][:PORT]`).
//!
//! Owns the syntax that people type, and where an address and port go. Both prefixes are equally
//! long; each address goes to the one with the same host part. Which of several counts for a packet
//! is `flow`'s business.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use crate::model::moved::{Move, MoveError, Transport};
use crate::model::prefix::Prefix;

/// The addresses of a prefix, or one port of each, that are delivered to others.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeliveryMap {
    /// The moved addresses.
    pub moved: Prefix,
    /// Where they are delivered: as many addresses, of the same family.
    pub to: Prefix,
    /// The port, if it is only one. All others stay the same, and so do protocols without ports.
    pub port: Option<MappedPort>,
}

/// One port of a moved address, and where it is delivered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MappedPort {
    /// TCP or UDP alone.
    pub transport: Option<Transport>,
    /// The port at the moved address.
    pub from: u16,
    /// The port at the delivery address.
    pub to: u16,
}

impl DeliveryMap {
    /// Whether some packet would be delivered by both. One that names the port counts before one
    /// that names none.
    pub fn overlaps(&self, other: &Self) -> bool {
        let ports = match (self.port, other.port) {
            (None, None) => true,
            (Some(a), Some(b)) => {
                let transports = match (a.transport, b.transport) {
                    (Some(a), Some(b)) => a == b,
                    _ => true,
                };
                a.from == b.from && transports
            }
            _ => false,
        };
        ports && self.moved.overlaps(&other.moved)
    }

    /// Where a moved address and port are delivered that it is about.
    pub fn place(&self, addr: IpAddr, port: u16) -> (IpAddr, u16) {
        let port = self.port.map_or(port, |mapped| mapped.to);
        (self.to.with_host_of(addr), port)
    }

    /// Which moved address and port are delivered there by it.
    pub fn origin(&self, addr: IpAddr, port: u16) -> Option<(IpAddr, u16)> {
        let leads_there =
            self.to.contains(addr) && self.port.is_none_or(|mapped| mapped.to == port);
        leads_there.then(|| {
            let port = self.port.map_or(port, |mapped| mapped.from);
            (self.moved.with_host_of(addr), port)
        })
    }

    /// Everything that it is about, as if that had moved.
    pub fn about(&self) -> Move {
        Move {
            prefix: self.moved,
            ports: (self.port.iter())
                .map(|mapped| mapped.from..=mapped.from)
                .collect(),
            transport: self.port.and_then(|mapped| mapped.transport),
        }
    }
}

/// Why the text of a `--deliver` was refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DeliveryMapError {
    /// It has nothing behind a `=`.
    #[error(
        "`{0}` does not say where to deliver; write 192.0.2.5:80=198.51.100.2:8080 or \
         192.0.2.16/28=198.51.100.16/28"
    )]
    NoTarget(String),
    /// The part before the `=` is no move.
    #[error("{0}")]
    Moved(MoveError),
    /// A part names more than one port.
    #[error("`{0}` has to name one port, as in 192.0.2.5:80, or none")]
    OnePort(String),
    /// A protocol without a port.
    #[error("`{0}` names a protocol and no port; write 192.0.2.5:80/tcp, or leave both out")]
    NoPort(String),
    /// A port on one side only.
    #[error(
        "`{0}` has a port on one side; name one on both, as in 192.0.2.5:80=198.51.100.2:8080, or \
         on neither"
    )]
    OneSide(String),
    /// The part behind the `=` is no address.
    #[error(
        "`{0}` is not an address, prefix or port of this server, as in 198.51.100.2, \
         198.51.100.16/28, 198.51.100.2:8080 or [2001:db8::2]:8080"
    )]
    Target(String),
    /// The part behind the `=` is a prefix with bits set behind its length, or has a wrong length.
    #[error("{0}")]
    TargetPrefix(MoveError),
    /// The part behind the `=` is an address that no client's packet can be delivered to.
    #[error(
        "`{0}`: clients' packets cannot be delivered there; \
         give an address of this server's network interface, and a port"
    )]
    Undeliverable(String),
    /// IPv4 on one side and IPv6 on the other.
    #[error("`{0}` is IPv4 on one side and IPv6 on the other; both have to be the same")]
    Families(String),
    /// Prefixes of different lengths.
    #[error(
        "`{0}`: one side has more addresses than the other; each address goes to the one with the \
         same host part, so write both with the same length, as in 192.0.2.16/28=198.51.100.16/28"
    )]
    Lengths(String),
}

impl FromStr for DeliveryMap {
    type Err = DeliveryMapError;

    fn from_str(text: &str) -> Result<Self, DeliveryMapError> {
        let (from, target) = text
            .split_once('=')
            .ok_or_else(|| DeliveryMapError::NoTarget(text.into()))?;
        let moved: Move = from.parse().map_err(DeliveryMapError::Moved)?;
        let to = parse_target(target)?;
        let ports = match (one_port(from, &moved)?, one_port(target, &to)?) {
            (None, None) => None,
            (Some(from), Some(to)) => Some((from, to)),
            _ => return Err(DeliveryMapError::OneSide(text.into())),
        };
        if ports.is_none() && moved.transport.is_some() {
            return Err(DeliveryMapError::NoPort(from.into()));
        }
        if to.prefix.is_ipv4() != moved.prefix.is_ipv4() {
            return Err(DeliveryMapError::Families(text.into()));
        }
        if to.prefix.len() != moved.prefix.len() {
            return Err(DeliveryMapError::Lengths(text.into()));
        }
        let transport = moved.transport;
        Ok(Self {
            moved: moved.prefix,
            to: to.prefix,
            port: ports.map(|(from, to)| MappedPort {
                transport,
                from,
                to,
            }),
        })
    }
}

/// Reads what stands behind the `=`, which looks like a move but for the protocol.
fn parse_target(text: &str) -> Result<Move, DeliveryMapError> {
    let to: Move = text.parse().map_err(|error| match error {
        MoveError::NotUnicast(_) | MoveError::NotAllUnicast(..) => {
            DeliveryMapError::Undeliverable(text.into())
        }
        error @ (MoveError::Prefix(_) | MoveError::Port(_) | MoveError::Range(..)) => {
            DeliveryMapError::TargetPrefix(error)
        }
        MoveError::Address(_)
        | MoveError::Name(_)
        | MoveError::TooManyRanges(_)
        | MoveError::Transport(_) => DeliveryMapError::Target(text.into()),
    })?;
    match to.transport {
        None => Ok(to),
        Some(_) => Err(DeliveryMapError::Target(text.into())),
    }
}

/// The port that a side names, if it names any.
fn one_port(text: &str, side: &Move) -> Result<Option<u16>, DeliveryMapError> {
    match side.ports.as_slice() {
        [] => Ok(None),
        [range] if range.start() == range.end() => Ok(Some(*range.start())),
        _ => Err(DeliveryMapError::OnePort(text.into())),
    }
}

impl fmt::Display for DeliveryMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let to = Move {
            prefix: self.to,
            ports: (self.port.iter())
                .map(|mapped| mapped.to..=mapped.to)
                .collect(),
            transport: None,
        };
        write!(f, "{}={to}", self.about())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(text: &str) -> DeliveryMap {
        text.parse().unwrap()
    }

    #[test]
    fn what_is_read_is_shown_again() {
        for text in [
            "192.0.2.5:80=198.51.100.2:8080",
            "192.0.2.5:80/tcp=198.51.100.2:80",
            "[2001:db8::5]:53/udp=[2001:db8::2]:5353",
            "192.0.2.5=198.51.100.2",
            "192.0.2.16/28=198.51.100.32/28",
            "192.0.2.16/28:80/tcp=198.51.100.32/28:8080",
            "2001:db8:a:1::/64=2001:db8:b:1::/64",
            "[2001:db8:a:1::/64]:53=[2001:db8:b:1::/64]:5353",
        ] {
            assert_eq!(map(text).to_string(), text);
        }
        let plain = map("192.0.2.5/32=198.51.100.2");
        assert_eq!(plain, map("192.0.2.5=198.51.100.2/32"));
    }

    #[test]
    fn refuses_with_a_reason() {
        for (text, says) in [
            ("", "where to deliver"),
            ("192.0.2.5:80", "where to deliver"),
            ("www:80=198.51.100.2:80", "is a name"),
            ("192.0.2.5=198.51.100.2:80", "a port on one side"),
            ("192.0.2.5:80=198.51.100.2", "a port on one side"),
            ("192.0.2.5:80-81=198.51.100.2:80", "one port"),
            ("192.0.2.5:80,90=198.51.100.2:80", "one port"),
            ("192.0.2.5:80=198.51.100.2:80,90", "one port"),
            ("192.0.2.5:0=198.51.100.2:80", "not a port"),
            ("192.0.2.5:80=198.51.100.2:0", "not a port"),
            ("192.0.2.5/tcp=198.51.100.2", "a protocol and no port"),
            ("192.0.2.5:80=198.51.100.2:80/tcp", "not an address"),
            ("192.0.2.5:80=www:80", "not an address"),
            ("192.0.2.5:80=127.0.0.1:80", "cannot be delivered"),
            ("192.0.2.0/28=127.0.0.0/28", "cannot be delivered"),
            ("192.0.2.5:80=[2001:db8::2]:80", "IPv6"),
            ("192.0.2.0/28=2001:db8::/64", "IPv6"),
            ("192.0.2.16/28=198.51.100.16/27", "bits set"),
            ("192.0.2.16/28=198.51.100.0/27", "the same length"),
            ("192.0.2.16/28=198.51.100.2", "the same length"),
            ("192.0.2.16/28:80=198.51.100.2:80", "the same length"),
        ] {
            let error = text.parse::<DeliveryMap>().unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn overlaps_are_seen() {
        let overlap = |a: &str, b: &str| {
            let (a, b) = (map(a), map(b));
            assert_eq!(a.overlaps(&b), b.overlaps(&a));
            a.overlaps(&b)
        };
        let port = |from: &str| format!("{from}=198.51.100.2:1");
        assert!(overlap(&port("192.0.2.5:80"), &port("192.0.2.5:80/udp")));
        assert!(overlap(
            &port("192.0.2.5:80/udp"),
            &port("192.0.2.5:80/udp")
        ));
        assert!(!overlap(
            &port("192.0.2.5:80/tcp"),
            &port("192.0.2.5:80/udp")
        ));
        assert!(!overlap(&port("192.0.2.5:80"), &port("192.0.2.5:81")));
        assert!(!overlap(&port("192.0.2.5:80"), &port("192.0.2.6:80")));
        let (whole, inside) = ("192.0.2.0/28=198.51.100.0/28", "192.0.2.5=198.51.100.99");
        assert!(overlap(whole, inside));
        assert!(
            !overlap(whole, &port("192.0.2.5:80")),
            "a port is an exception"
        );
        let ports = "192.0.2.0/28:80=198.51.100.0/28:8080";
        assert!(overlap(ports, &port("192.0.2.5:80/tcp")));
        assert!(!overlap(ports, &port("192.0.2.16:80")));
    }

    #[test]
    fn each_address_goes_to_the_one_with_the_same_host_part_and_back() {
        for (text, moved, port, to, to_port) in [
            (
                "192.0.2.16/28=198.51.100.32/28",
                "192.0.2.21",
                80,
                "198.51.100.37",
                80,
            ),
            (
                "192.0.2.16/28:80=198.51.100.32/28:81",
                "192.0.2.31",
                80,
                "198.51.100.47",
                81,
            ),
            ("192.0.2.5=198.51.100.2", "192.0.2.5", 9, "198.51.100.2", 9),
            (
                "2001:db8:a:1::/64=2001:db8:b:7::/64",
                "2001:db8:a:1:ffff::5",
                80,
                "2001:db8:b:7:ffff::5",
                80,
            ),
        ] {
            let map = map(text);
            let [moved, to]: [IpAddr; 2] = [moved, to].map(|it| it.parse().unwrap());
            assert_eq!(map.place(moved, port), (to, to_port));
            assert_eq!(map.origin(to, to_port), Some((moved, port)));
            assert_eq!(map.origin(moved, to_port), None);
            let other_port = map.origin(to, to_port + 1).is_some();
            assert_eq!(other_port, map.port.is_none());
        }
    }
}
