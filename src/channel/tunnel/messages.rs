//! The control messages that two tunnels exchange inside a session: their bytes, and what each side
//! announces to the other.
//!
//! The bytes are authenticated, but another program wrote them: reading refuses what is wrong and
//! never panics.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::channel::wire::role_byte;
use crate::model::bytes::{put_address, take};
use crate::model::moved::{MAX_MOVES, Move};
use crate::model::moved_list;
use crate::model::peer::Role;

/// Most bytes of an announcement in one message. With every header it stays below 1,200 bytes,
/// which pass on every path that IPv6 may use (RFC 8200, section 5: 1,280).
pub(crate) const PART_LEN: usize = 1_100;

/// Most bytes of a control message that can mean anything: the head of a part, its bytes, and one
/// more, which shows that a part is too long. Whatever follows is padding.
pub const MAX_MESSAGE: usize = 7 + PART_LEN + 1;

/// Most parts of an announcement, as many as their numbers tell apart: 16,384 single IPv6 addresses
/// take 278,536 bytes.
pub(crate) const MAX_PARTS: usize = 255;

/// Most bytes of an announcement.
pub const MAX_ANNOUNCEMENT: usize = MAX_PARTS * PART_LEN;

/// Most moves in the form that every peer reads.
const MAX_SINGLE: usize = 64;

/// In place of the role: the old server, whose moves are in the form for many and for prefixes.
const OLD_WITH_LIST: u8 = 3;

/// Most bytes of the error text for the operator of the other side: a line of a log.
const MAX_ERROR_LEN: usize = 256;

/// A control message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ControlMessage<'a> {
    /// Says that the sender lives, and that it holds the keys of the session. What rides on it is
    /// read by `news`.
    Keepalive { news: &'a [u8] },
    /// Asks for a [`ControlMessage::Pong`] with the same number.
    Ping { id: u32 },
    /// Answers a [`ControlMessage::Ping`].
    Pong { id: u32 },
    /// A part of an [`Announcement`].
    Config {
        id: u32,
        part: u8,
        parts: u8,
        body: &'a [u8],
    },
    /// Acknowledges that part.
    ConfigAck { id: u32, part: u8 },
    /// The sender's daemon ends.
    Close,
    /// Fills a datagram of this size, to see whether it arrives.
    Probe { size: u16 },
    /// A probe of this size arrived.
    ProbeAck { size: u16 },
}

impl<'a> ControlMessage<'a> {
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        match *self {
            Self::Keepalive { news } => {
                out.push(1);
                out.extend_from_slice(news);
            }
            Self::Ping { id } | Self::Pong { id } => {
                out.push(if matches!(self, Self::Ping { .. }) {
                    2
                } else {
                    3
                });
                out.extend_from_slice(&id.to_le_bytes());
            }
            Self::Config {
                id,
                part,
                parts,
                body,
            } => {
                out.push(4);
                out.extend_from_slice(&id.to_le_bytes());
                out.extend_from_slice(&[part, parts]);
                out.extend_from_slice(body);
            }
            Self::ConfigAck { id, part } => {
                out.push(5);
                out.extend_from_slice(&id.to_le_bytes());
                out.push(part);
            }
            Self::Close => out.push(6),
            Self::Probe { size } | Self::ProbeAck { size } => {
                out.push(if matches!(self, Self::Probe { .. }) {
                    7
                } else {
                    8
                });
                out.extend_from_slice(&size.to_le_bytes());
            }
        }
    }

    /// Reads a message. It ignores bytes after those that the type needs: padding, or additions of
    /// a later version.
    pub(crate) fn decode(bytes: &'a [u8]) -> Option<Self> {
        let mut rest = bytes;
        let rest = &mut rest;
        let [kind] = take(rest)?;
        Some(match kind {
            1 => Self::Keepalive { news: rest },
            2 | 3 => {
                let id = u32::from_le_bytes(take(rest)?);
                if kind == 2 {
                    Self::Ping { id }
                } else {
                    Self::Pong { id }
                }
            }
            4 => {
                let id = u32::from_le_bytes(take(rest)?);
                let [part, parts] = take(rest)?;
                let right = part < parts && usize::from(parts) <= MAX_PARTS;
                if !right || rest.len() > PART_LEN {
                    return None;
                }
                Self::Config {
                    id,
                    part,
                    parts,
                    body: rest,
                }
            }
            5 => {
                let id = u32::from_le_bytes(take(rest)?);
                let [part] = take(rest)?;
                Self::ConfigAck { id, part }
            }
            6 => Self::Close,
            7 | 8 => {
                let size = u16::from_le_bytes(take(rest)?);
                if kind == 7 {
                    Self::Probe { size }
                } else {
                    Self::ProbeAck { size }
                }
            }
            _ => return None,
        })
    }
}

/// What one side tells the other about itself, once they have a session and whenever it changes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Announcement {
    /// Of the old server.
    Old {
        /// The moved addresses that it captures.
        moves: Vec<Move>,
        /// MTU of its uplink, for the clients' packets.
        mtu: u16,
        /// The address at which its settings name the new server. Whoever begins a handshake, and
        /// from where, this is the same.
        reached: Option<IpAddr>,
        /// It lets connections out that the new server begins.
        outgoing: bool,
    },
    /// Of the new server.
    New {
        /// Where it delivers.
        deliver: Deliver,
        /// MTU of its uplink.
        mtu: u16,
        /// One line for the operator of the old server, if something keeps this one from
        /// delivering.
        error: Option<String>,
    },
}

/// Where the new server delivers packets for moved addresses (`--deliver-to`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Deliver {
    /// To the moved address itself, which it holds.
    Keep,
    /// To its own address of the packet's family, if it has one.
    To {
        /// For IPv4.
        v4: Option<Ipv4Addr>,
        /// For IPv6.
        v6: Option<Ipv6Addr>,
    },
}

impl Announcement {
    /// Whose announcement it is.
    pub fn role(&self) -> Role {
        match self {
            Self::Old { .. } => Role::Old,
            Self::New { .. } => Role::New,
        }
    }

    /// The bytes of the message: its type, then its fields.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = vec![role_byte(self.role())];
        match self {
            Self::Old {
                moves,
                mtu,
                reached,
                outgoing,
            } if needs_list(moves) => {
                debug_assert!(moves.len() <= MAX_MOVES, "refused when configured");
                out[0] = OLD_WITH_LIST;
                out.extend_from_slice(&mtu.to_le_bytes());
                encode_address(*reached, &mut out);
                out.push(u8::from(*outgoing));
                moved_list::encode(moves, &mut out);
            }
            Self::Old {
                moves,
                mtu,
                reached,
                outgoing,
            } => {
                out.extend_from_slice(&mtu.to_le_bytes());
                out.push(moves.len() as u8);
                for moved in moves {
                    moved.encode(&mut out);
                }
                encode_address(*reached, &mut out);
                out.push(u8::from(*outgoing));
            }
            Self::New {
                deliver,
                mtu,
                error,
            } => {
                out.extend_from_slice(&mtu.to_le_bytes());
                let (keep, v4, v6) = match *deliver {
                    Deliver::Keep => (true, None, None),
                    Deliver::To { v4, v6 } => (false, v4, v6),
                };
                let flags = u8::from(v4.is_some())
                    | u8::from(v6.is_some()) << 1
                    | u8::from(keep) << 2
                    | u8::from(error.is_some()) << 3;
                out.push(flags);
                out.extend(v4.iter().flat_map(Ipv4Addr::octets));
                out.extend(v6.iter().flat_map(Ipv6Addr::octets));
                if let Some(error) = error {
                    let text = &error[..boundary(error, MAX_ERROR_LEN)];
                    out.extend_from_slice(&(text.len() as u16).to_le_bytes());
                    out.extend_from_slice(text.as_bytes());
                }
            }
        }
        out
    }

    /// `None` if no peer of this version sends such bytes.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut rest = bytes;
        let rest = &mut rest;
        let [role] = take(rest)?;
        let mtu = u16::from_le_bytes(take(rest)?);
        match role {
            1 => {
                let [count] = take(rest)?;
                if usize::from(count) > MAX_SINGLE {
                    return None;
                }
                let moves = (0..count)
                    .map(|_| Move::decode(rest))
                    .collect::<Option<_>>()?;
                let reached = take_address(rest)?;
                // Earlier versions end here, and let nothing out.
                let outgoing = take(rest).is_some_and(|[flags]: [u8; 1]| flags & 1 != 0);
                Some(Self::Old {
                    moves,
                    mtu,
                    reached,
                    outgoing,
                })
            }
            OLD_WITH_LIST => {
                let reached = take_address(rest)?;
                let [flags] = take(rest)?;
                let moves = moved_list::decode(rest)?;
                Some(Self::Old {
                    moves,
                    mtu,
                    reached,
                    outgoing: flags & 1 != 0,
                })
            }
            2 => {
                let [flags] = take(rest)?;
                let has = |bit: u8| flags & (1 << bit) != 0;
                let v4 = has(0)
                    .then(|| take(rest))
                    .map_or(Some(None), |v| v.map(Some))?;
                let v6 = has(1)
                    .then(|| take::<16>(rest))
                    .map_or(Some(None), |v| v.map(Some))?;
                let deliver = match (has(2), v4, v6) {
                    (true, None, None) => Deliver::Keep,
                    (true, ..) => return None,
                    (false, v4, v6) => Deliver::To {
                        v4: v4.map(|octets: [u8; 4]| octets.into()),
                        v6: v6.map(Into::into),
                    },
                };
                let error = match has(3) {
                    true => Some(take_line(rest)?),
                    false => None,
                };
                Some(Self::New {
                    deliver,
                    mtu,
                    error,
                })
            }
            _ => None,
        }
    }
}

/// An address that may be left out: its family, 0 if there is none, then its bytes.
fn encode_address(addr: Option<IpAddr>, out: &mut Vec<u8>) {
    match addr {
        None => out.push(0),
        Some(addr) => put_address(addr, out),
    }
}

/// Reads such an address at the end of what older versions send: for them there is none.
fn take_address(rest: &mut &[u8]) -> Option<Option<IpAddr>> {
    Some(match take(rest) {
        Some([4]) => Some(take::<4>(rest)?.into()),
        Some([6]) => Some(take::<16>(rest)?.into()),
        Some(_) | None => None,
    })
}

/// Whether peers of versions without prefixes cannot read these moves.
pub fn needs_list(moves: &[Move]) -> bool {
    moves.len() > MAX_SINGLE || !moves.iter().all(|moved| moved.prefix.is_single())
}

/// Reads a text that will stand in a log and on a terminal. It has no control characters, whatever
/// the peer sent.
fn take_line(rest: &mut &[u8]) -> Option<String> {
    let length = usize::from(u16::from_le_bytes(take(rest)?));
    if length > MAX_ERROR_LEN {
        return None;
    }
    let (text, tail) = rest.split_at_checked(length)?;
    *rest = tail;
    let text = std::str::from_utf8(text).ok()?;
    Some(text.replace(char::is_control, " "))
}

/// The last place at or before `at` where a text can be truncated between two characters;
/// `str::floor_char_boundary` is newer than the Rust this package promises to build with.
pub(super) fn boundary(text: &str, at: usize) -> usize {
    (0..=at.min(text.len()))
        .rev()
        .find(|&at| text.is_char_boundary(at))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes_of(message: &ControlMessage<'_>) -> Vec<u8> {
        let mut out = Vec::new();
        message.encode(&mut out);
        out
    }

    #[test]
    fn golden_bytes() {
        let cases: [(ControlMessage<'_>, &[u8]); 8] = [
            (ControlMessage::Keepalive { news: &[] }, &[1]),
            (ControlMessage::Ping { id: 1 }, &[2, 1, 0, 0, 0]),
            (ControlMessage::Pong { id: 1 }, &[3, 1, 0, 0, 0]),
            (
                ControlMessage::Config {
                    id: 9,
                    part: 1,
                    parts: 2,
                    body: b"ab",
                },
                &[4, 9, 0, 0, 0, 1, 2, b'a', b'b'],
            ),
            (
                ControlMessage::ConfigAck { id: 9, part: 1 },
                &[5, 9, 0, 0, 0, 1],
            ),
            (ControlMessage::Close, &[6]),
            (ControlMessage::Probe { size: 1_200 }, &[7, 0xb0, 4]),
            (ControlMessage::ProbeAck { size: 1_200 }, &[8, 0xb0, 4]),
        ];
        for (message, bytes) in cases {
            assert_eq!(bytes_of(&message), bytes);
            assert_eq!(ControlMessage::decode(bytes), Some(message));
            assert_eq!(
                ControlMessage::decode(&bytes[..bytes.len() - 1]).is_some(),
                bytes.len() == 9
            );
        }
        assert_eq!(ControlMessage::decode(&[9]), None);
        assert_eq!(
            ControlMessage::decode(&[4, 9, 0, 0, 0, 2, 2]),
            None,
            "no part 2 of 2"
        );
    }

    #[test]
    fn the_largest_announcement_fits() {
        let ports = (0..64)
            .map(|n| 1000 + 10 * n..=1001 + 10 * n)
            .collect::<Vec<_>>();
        let moves = (1..=64)
            .map(|n| Move {
                prefix: format!("2001:db8::{n:x}").parse().unwrap(),
                ports: ports.clone(),
                transport: None,
            })
            .collect();
        let announcement = Announcement::Old {
            moves,
            mtu: 1500,
            reached: None,
            outgoing: true,
        };
        let bytes = announcement.encode();
        assert!(bytes.len() <= MAX_PARTS * PART_LEN, "{}", bytes.len());
        assert_eq!(Announcement::decode(&bytes), Some(announcement));
    }

    #[test]
    fn an_old_server_that_does_not_say_so_lets_no_connections_out() {
        let said = |outgoing| Announcement::Old {
            moves: vec!["192.0.2.5".parse().unwrap()],
            mtu: 1500,
            reached: None,
            outgoing,
        };
        for outgoing in [false, true] {
            let bytes = said(outgoing).encode();
            assert_eq!(Announcement::decode(&bytes), Some(said(outgoing)));
            let (_, earlier) = bytes.split_last().unwrap();
            assert_eq!(Announcement::decode(earlier), Some(said(false)));
            let later = [&bytes[..], &[7, 7]].concat();
            assert_eq!(Announcement::decode(&later), Some(said(outgoing)));
        }
    }

    #[test]
    fn an_error_for_the_operator_is_one_line() {
        let announcement = |error: &str| Announcement::New {
            deliver: Deliver::Keep,
            mtu: 1500,
            error: Some(error.into()),
        };
        let read = |error: &str| Announcement::decode(&announcement(error).encode());
        assert_eq!(read("a\n\x1b[31mb"), Some(announcement("a  [31mb")));
        let long = "ü".repeat(200);
        assert_eq!(read(&long), Some(announcement(&long[..MAX_ERROR_LEN])));
    }

    proptest! {
        #[test]
        fn no_bytes_make_reading_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..64), kind in 0u8..10,
        ) {
            let mut bytes = bytes;
            let _ = ControlMessage::decode(&bytes);
            if let Some(read) = Announcement::decode(&bytes) {
                prop_assert_eq!(Announcement::decode(&read.encode()), Some(read));
            }
            if let Some(first) = bytes.first_mut() {
                *first = kind;
            }
            if let Some(message) = ControlMessage::decode(&bytes) {
                let again = bytes_of(&message);
                prop_assert_eq!(&bytes[..again.len()], &again[..]);
            }
            let _ = Announcement::decode(&bytes);
        }

        #[test]
        fn the_announcement_of_the_new_server_comes_back(
            v4 in any::<Option<[u8; 4]>>(), v6 in any::<Option<[u8; 16]>>(), keep in any::<bool>(),
            mtu in any::<u16>(), error in proptest::option::of("[a-z ]{0,100}"),
        ) {
            let deliver = if keep { Deliver::Keep } else {
                Deliver::To { v4: v4.map(Into::into), v6: v6.map(Into::into) }
            };
            let announcement = Announcement::New { deliver, mtu, error };
            prop_assert_eq!(Announcement::decode(&announcement.encode()), Some(announcement));
        }
    }
}
