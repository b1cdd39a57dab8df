//! The question in an initiation: would the receiver accept this move?
//!
//! Only a check asks (`ipmoved check`): a daemon announces what has moved on the session itself.

use std::net::IpAddr;

use crate::model::moved::{Move, Transport};
use crate::model::prefix::Prefix;

/// Bytes of a question.
pub(super) const LEN: usize = 20;

/// The lengths of IPv6 prefixes stand behind those of IPv4, and 0 is no question.
const IPV4: u8 = 1;
const IPV6: u8 = 34;

/// Writes a move. Of its ports only the first is asked for.
pub(super) fn encode(moved: Option<&Move>) -> [u8; LEN] {
    let mut bytes = [0; LEN];
    let Some(moved) = moved else {
        return bytes;
    };
    match moved.prefix.first() {
        IpAddr::V4(addr) => {
            bytes[0] = IPV4 + moved.prefix.len();
            bytes[1..5].copy_from_slice(&addr.octets());
        }
        IpAddr::V6(addr) => {
            bytes[0] = IPV6 + moved.prefix.len();
            bytes[1..17].copy_from_slice(&addr.octets());
        }
    }
    bytes[17] = match moved.transport {
        None => 0,
        Some(Transport::Tcp) => 6,
        Some(Transport::Udp) => 17,
    };
    let port = moved.ports.first().map_or(0, |range| *range.start());
    bytes[18..].copy_from_slice(&port.to_be_bytes());
    bytes
}

/// Reads one; `None` if nothing is asked, or nothing that a daemon of this version would.
pub(super) fn decode(bytes: &[u8; LEN]) -> Option<Move> {
    let [length, rest @ ..] = bytes;
    let (octets, rest) = rest.split_first_chunk::<16>()?;
    let [transport, port @ ..] = rest else {
        return None;
    };
    let prefix = if let Some(len) = length.checked_sub(IPV6) {
        (len <= 128).then(|| Prefix::of(IpAddr::from(*octets), len))?
    } else {
        let len = length.checked_sub(IPV4)?;
        let [a, b, c, d, ..] = *octets;
        Prefix::of(IpAddr::from([a, b, c, d]), len)
    };
    let ports = match u16::from_be_bytes(port.try_into().ok()?) {
        0 => Vec::new(),
        port => vec![port..=port],
    };
    Some(Move {
        prefix,
        ports,
        transport: match transport {
            0 => None,
            6 => Some(Transport::Tcp),
            17 => Some(Transport::Udp),
            _ => return None,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_move_is_asked_for_by_its_first_port() {
        for (text, asked) in [
            ("192.0.2.5", "192.0.2.5"),
            ("192.0.2.0/28:80,443/tcp", "192.0.2.0/28:80/tcp"),
            ("2001:db8:a:1::/64", "2001:db8:a:1::/64"),
            ("[2001:db8::5]:53-60/udp", "[2001:db8::5]:53/udp"),
        ] {
            let moved: Move = text.parse().unwrap();
            let read = decode(&encode(Some(&moved))).unwrap();
            assert_eq!(read.to_string(), asked);
        }
        assert_eq!(decode(&encode(None)), None);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes: [u8; LEN]) {
            if let Some(moved) = decode(&bytes) {
                prop_assert_eq!(decode(&encode(Some(&moved))), Some(moved));
            }
        }
    }
}
