//! A small rtnetlink client: links, addresses, routes, rules, clsact and cls_bpf filters.
//!
//! Owns the conversation with `NETLINK_ROUTE` and nothing else: it decides nothing, remembers
//! nothing and undoes nothing. It builds requests with the types of netlink-packet-route. It reads
//! only those attributes of an answer that we need, so a newer kernel's attribute, or a foreign
//! classifier that the crate cannot decode, does not make a dump fail.
//!
//! This file owns the socket for requests, `events` the one on which the kernel speaks by itself,
//! and `plain` those for single requests to other parts of the kernel.
//! Each kind of object has a file of its own, with its type, its
//! requests (methods of [`Netlink`]), and how to read the kernel's answers.
//!
//! A socket belongs to the network namespace of the thread that opened it, for good.

mod address;
mod events;
mod link;
mod neighbour;
mod plain;
mod route;
mod rule;
mod tc;

use std::cell::Cell;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR,
    NetlinkBuffer, NetlinkHeader, NetlinkMessage, NetlinkPayload, NlasIterator,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

pub use address::Address;
pub use events::Events;
pub use link::{Link, Nature};
pub use plain::ask;
pub use route::{ListedRoute, Route, RouteAnswer, RouteKind, RouteQuery, TABLE_LOCAL, TABLE_MAIN};
pub use rule::Rule;
pub use tc::{Direction, Filter, FilterSlot};

pub(crate) use address::address_message;

/// How often we start a dump again because the kernel's tables changed under it
/// (`NLM_F_DUMP_INTR`). If a table changes faster than that, we take it as it comes.
const MAX_DUMP_TRIES: usize = 8;

/// A blocking `NETLINK_ROUTE` socket of one network namespace.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
    port: u32,
    sequence: Cell<u32>,
}

impl Netlink {
    /// Opens a socket in the calling thread's network namespace.
    pub fn new() -> Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        let port = socket.bind_auto()?.port_number();
        // They give better error texts and filtered dumps where the kernel has them; we can do
        // without.
        let _ = socket.set_ext_ack(true);
        let _ = socket.set_cap_ack(true);
        let _ = socket.set_netlink_get_strict_chk(true);
        Ok(Self {
            socket,
            port,
            sequence: Cell::new(0),
        })
    }

    /// The number by which [`Events`] name who asked for a change.
    pub fn port_id(&self) -> u32 {
        self.port
    }

    /// Makes a request, and waits until the kernel has done it or refuses.
    pub(crate) fn acked(
        &self,
        what: &'static str,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<()> {
        self.exchange(what, message, NLM_F_ACK | flags).map(drop)
    }

    fn dump(&self, what: &'static str, message: RouteNetlinkMessage) -> Result<Vec<Vec<u8>>> {
        for _ in 1..MAX_DUMP_TRIES {
            let (mut answers, mut interrupted) = (Vec::new(), false);
            let keep = &mut |answer: &[u8]| answers.push(answer.to_vec());
            self.exchange_once(what, message.clone(), NLM_F_DUMP, &mut interrupted, keep)?;
            if !interrupted {
                return Ok(answers);
            }
        }
        self.exchange(what, message, NLM_F_DUMP)
    }

    /// Hands each answer over as it comes, for tables that are too large to be kept. If a table
    /// changes meanwhile, some answers come twice.
    fn dump_each(
        &self,
        what: &'static str,
        message: &RouteNetlinkMessage,
        each: &mut dyn FnMut(&[u8]),
    ) -> Result<()> {
        for _ in 0..MAX_DUMP_TRIES {
            let mut interrupted = false;
            self.exchange_once(what, message.clone(), NLM_F_DUMP, &mut interrupted, each)?;
            if !interrupted {
                break;
            }
        }
        Ok(())
    }

    fn exchange(
        &self,
        what: &'static str,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<Vec<Vec<u8>>> {
        let mut answers = Vec::new();
        let keep = &mut |answer: &[u8]| answers.push(answer.to_vec());
        self.exchange_once(what, message, flags, &mut false, keep)?;
        Ok(answers)
    }

    /// Sends one request, and hands the payloads of its answers over up to the last one.
    fn exchange_once(
        &self,
        request: &'static str,
        message: RouteNetlinkMessage,
        flags: u16,
        interrupted: &mut bool,
        each: &mut dyn FnMut(&[u8]),
    ) -> Result<()> {
        let sequence = self.sequence.get().wrapping_add(1);
        self.sequence.set(sequence);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = sequence;
        let mut packet = NetlinkMessage::new(header, NetlinkPayload::from(message));
        packet.finalize();
        let mut bytes = vec![0; packet.buffer_len()];
        packet.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;

        loop {
            let (datagram, _) = match self.socket.recv_from_full() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            };
            let mut rest = &datagram[..];
            while !rest.is_empty() {
                let answer = NetlinkBuffer::new_checked(rest)
                    .map_err(|_| NetlinkError::Malformed { request })?;
                let length = (answer.length() as usize).next_multiple_of(4);
                rest = rest.get(length..).unwrap_or_default();
                // It belongs to an earlier exchange that we gave up.
                if answer.sequence_number() != sequence {
                    continue;
                }
                *interrupted |= answer.flags() & NLM_F_DUMP_INTR != 0;
                match answer.message_type() {
                    NLMSG_ERROR | NLMSG_DONE => {
                        return match verdict(&answer) {
                            Some((errno, detail)) => Err(NetlinkError::Refused {
                                request,
                                errno,
                                detail,
                            }),
                            None => Ok(()),
                        };
                    }
                    _ => each(answer.payload()),
                }
            }
        }
    }
}

/// IPv4 or IPv6.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family of an address.
    pub fn of(addr: IpAddr) -> Self {
        match addr {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// Length of a whole address, in bits.
    pub fn bits(self) -> u8 {
        match self {
            Self::V4 => 32,
            Self::V6 => 128,
        }
    }

    /// `0.0.0.0` or `::`.
    pub fn unspecified(self) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::UNSPECIFIED.into(),
            Self::V6 => Ipv6Addr::UNSPECIFIED.into(),
        }
    }

    fn raw(self) -> AddressFamily {
        match self {
            Self::V4 => AddressFamily::Inet,
            Self::V6 => AddressFamily::Inet6,
        }
    }

    fn from_raw(raw: u8) -> Option<Self> {
        match i32::from(raw) {
            libc::AF_INET => Some(Self::V4),
            libc::AF_INET6 => Some(Self::V6),
            _ => None,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The socket could not be opened, written or read.
    #[error("netlink socket: {0}")]
    Socket(#[from] io::Error),
    /// The kernel refused.
    #[error("{request}: {}", describe(*errno, detail))]
    Refused {
        /// The request, such as `add qdisc clsact`.
        request: &'static str,
        /// The kernel's error number.
        errno: Errno,
        /// The kernel's own words, where it has any.
        detail: String,
    },
    /// The answer makes no sense.
    #[error("{request}: the kernel's answer cannot be read")]
    Malformed {
        /// The request.
        request: &'static str,
    },
}

impl NetlinkError {
    /// The kernel's error number, if it was the kernel that refused.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Socket(error) => Errno::from_io_error(error),
            Self::Refused { errno, .. } => Some(*errno),
            Self::Malformed { .. } => None,
        }
    }

    /// The object exists already.
    pub fn is_exists(&self) -> bool {
        self.errno() == Some(Errno::EXIST)
    }

    /// The object, its table or its interface does not exist.
    pub fn is_missing(&self) -> bool {
        matches!(
            self.errno(),
            Some(Errno::NOENT | Errno::NODEV | Errno::SRCH | Errno::ADDRNOTAVAIL | Errno::NXIO)
        )
    }

    /// Privileges are missing.
    pub fn is_denied(&self) -> bool {
        matches!(self.errno(), Some(Errno::PERM | Errno::ACCESS))
    }
}

/// The kernel's words, and errno's text without its number.
fn describe(errno: Errno, detail: &str) -> String {
    let name = io::Error::from(errno).to_string();
    let name = name.split(" (os error").next().unwrap_or(&name).to_owned();
    if detail.is_empty() {
        name
    } else {
        format!("{name} ({detail})")
    }
}

type Result<T> = std::result::Result<T, NetlinkError>;

/// The result in a final answer: an error number with the kernel's words, or success.
fn verdict(answer: &NetlinkBuffer<&[u8]>) -> Option<(Errno, String)> {
    const NLMSGERR_ATTR_MSG: u16 = 1;
    let payload = answer.payload();
    let code = payload
        .first_chunk()
        .map_or(0, |raw| i32::from_ne_bytes(*raw));
    if code == 0 {
        return None;
    }
    // In an error message, the request's header stands between the code and the words.
    let words = match answer.message_type() {
        NLMSG_ERROR => 20,
        _ => 4,
    };
    let mut detail = String::new();
    if answer.flags() & NLM_F_ACK_TLVS != 0 {
        for (kind, value) in attributes(payload.get(words..).unwrap_or_default()) {
            if kind == NLMSGERR_ATTR_MSG {
                detail = text(value);
            }
        }
    }
    Some((Errno::from_raw_os_error(-code), detail))
}

pub(super) fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    NlasIterator::new(bytes)
        .map_while(std::result::Result::ok)
        .map(|attribute| {
            let length = attribute.value_length();
            let value = attribute.into_inner();
            (
                u16::from_ne_bytes([value[2], value[3]]) & 0x3fff,
                &value[4..4 + length],
            )
        })
}

fn word(value: &[u8]) -> Option<u32> {
    value.first_chunk().map(|raw| u32::from_ne_bytes(*raw))
}

pub(super) fn text(value: &[u8]) -> String {
    let end = value.iter().position(|&b| b == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

pub(super) fn ip(value: &[u8]) -> Option<IpAddr> {
    if let Ok(octets) = <[u8; 4]>::try_from(value) {
        return Some(octets.into());
    }
    <[u8; 16]>::try_from(value).ok().map(IpAddr::from)
}
