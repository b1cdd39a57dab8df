//! The wire form of many moves, in which a prefix takes no more bytes than it has, and moves of the
//! same ports that stand one behind the other name these once.
//!
//! ```text
//! group      transport: 0 any, 6 TCP, 17 UDP (1) | number of port ranges (1)
//!            | first (2, big-endian), last (2, big-endian), …
//!            | number of prefixes (2, big-endian) | prefixes
//! prefix     length (1): 0 to 32 of IPv4, 33 to 161 of IPv6 plus 33
//!            | the bytes that this length reaches into
//! ```

use std::net::IpAddr;

use crate::model::bytes::take;
use crate::model::moved::{MAX_MOVES, Move};
use crate::model::prefix::Prefix;

/// The first length of IPv6.
const IPV6: u8 = 33;

/// Appends the moves, in their order.
pub fn encode(moves: &[Move], out: &mut Vec<u8>) {
    let same = |a: &Move, b: &Move| a.ports == b.ports && a.transport == b.transport;
    for group in moves.chunk_by(same) {
        // No more than there may be moves.
        debug_assert!(group.len() <= MAX_MOVES, "refused when configured");
        let Some(first) = group.first() else {
            continue;
        };
        first.encode_ports(out);
        out.extend_from_slice(&(group.len() as u16).to_be_bytes());
        for moved in group {
            let len = moved.prefix.len();
            let reached = usize::from(len.div_ceil(8));
            match moved.prefix.first() {
                IpAddr::V4(addr) => {
                    out.push(len);
                    out.extend_from_slice(&addr.octets()[..reached]);
                }
                IpAddr::V6(addr) => {
                    out.push(IPV6 + len);
                    out.extend_from_slice(&addr.octets()[..reached]);
                }
            }
        }
    }
}

/// Reads moves to the end of the bytes; `None` if they are not well-formed, or more than there may
/// be.
pub fn decode(mut bytes: &[u8]) -> Option<Vec<Move>> {
    let rest = &mut bytes;
    let mut moves = Vec::new();
    while !rest.is_empty() {
        let (transport, ports) = Move::decode_ports(rest)?;
        for _ in 0..u16::from_be_bytes(take(rest)?) {
            let prefix = prefix(rest)?;
            let moved = Move {
                prefix,
                ports: ports.clone(),
                transport,
            };
            if moves.len() == MAX_MOVES || !moved.is_well_formed() {
                return None;
            }
            moves.push(moved);
        }
    }
    Some(moves)
}

fn prefix(rest: &mut &[u8]) -> Option<Prefix> {
    let [length] = take(rest)?;
    let (len, most) = match length.checked_sub(IPV6) {
        None => (length, 32),
        Some(len) => (len, 128),
    };
    if len > most {
        return None;
    }
    let (reached, tail) = rest.split_at_checked(len.div_ceil(8).into())?;
    *rest = tail;
    let mut octets = [0; 16];
    octets.get_mut(..reached.len())?.copy_from_slice(reached);
    let addr = if most == 32 {
        let [a, b, c, d, ..] = octets;
        IpAddr::from([a, b, c, d])
    } else {
        IpAddr::from(octets)
    };
    let prefix = Prefix::of(addr, len);
    (prefix.first() == addr).then_some(prefix)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::all;
    use proptest::prelude::*;

    fn moves(text: &str) -> Vec<Move> {
        all(text)
    }

    #[test]
    fn golden_bytes() {
        let all =
            moves("192.0.2.0/28 192.0.2.32 2001:db8:a:1::/64 198.51.100.0/23:80,8000-8001/tcp");
        let bytes: &[u8] = &[
            0, 0, 0, 3, 28, 192, 0, 2, 0, 32, 192, 0, 2, 32, 97, 0x20, 1, 0xd, 0xb8, 0, 10, 0, 1,
            6, 2, 0, 80, 0, 80, 0x1f, 0x40, 0x1f, 0x41, 0, 1, 23, 198, 51, 100,
        ];
        let mut out = Vec::new();
        encode(&all, &mut out);
        assert_eq!(out, bytes);
        assert_eq!(decode(bytes), Some(all));
        for (at, byte) in [(0, 1), (4, 29), (4, 33 + 129), (5, 127), (14, 96), (23, 5)] {
            let mut wrong = bytes.to_vec();
            wrong[at] = byte;
            if at == 4 && byte == 29 {
                // A longer prefix with the same bytes is one as well.
                assert!(decode(&wrong).is_some());
            } else {
                assert_eq!(decode(&wrong), None, "{at} {byte}");
            }
        }
    }

    #[test]
    fn no_more_are_read_than_there_may_be() {
        let addr = |n: usize| IpAddr::V4((0x0a00_0000 + n as u32).into());
        let all: Vec<Move> = (0..=MAX_MOVES)
            .map(|n| Move {
                prefix: addr(n).into(),
                ports: Vec::new(),
                transport: None,
            })
            .collect();
        for (count, expected) in [(MAX_MOVES, true), (MAX_MOVES + 1, false)] {
            let mut bytes = Vec::new();
            let (half, rest) = all[..count].split_at(count / 2);
            encode(half, &mut bytes);
            encode(rest, &mut bytes);
            assert_eq!(decode(&bytes).is_some(), expected, "{count}");
        }
    }

    proptest! {
        #[test]
        fn what_is_read_is_written_again(
            hosts in proptest::collection::vec(
                (any::<bool>(), any::<u16>(), 0u8..=64, 1u16..3), 0..20,
            ),
        ) {
            let all: Vec<Move> = hosts
                .into_iter()
                .map(|(v6, host, less, port)| {
                    let prefix = if v6 {
                        let addr = [0x2001, 0xdb8, 0, 0, host, 0, 0, host];
                        Prefix::of(IpAddr::from(addr), 128 - less)
                    } else {
                        let [a, b] = host.to_be_bytes();
                        Prefix::of(IpAddr::from([10, a, b, a]), 32 - less % 25)
                    };
                    Move { prefix, ports: vec![port..=port + 1], transport: None }
                })
                .collect();
            let mut bytes = Vec::new();
            encode(&all, &mut bytes);
            prop_assert_eq!(decode(&bytes), Some(all));
        }

        #[test]
        fn no_bytes_make_decode_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Some(moves) = decode(&bytes) {
                let mut again = Vec::new();
                encode(&moves, &mut again);
                prop_assert_eq!(decode(&again), Some(moves));
            }
        }
    }
}
