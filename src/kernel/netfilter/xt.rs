//! The matches of iptables, of both of its kinds (linux/netfilter/xt_*.h).
//!
//! Owns what is understood of them. What is not is unknown, never false.

use std::net::SocketAddr;

use super::nft::end;
use super::walk::Packet;

/// A new connection, as a bit of `xt_state` and `xt_conntrack`.
const NEW: u32 = 8;

/// Whether a packet that begins a conversation fits; `None` if that is not known.
pub(super) fn fits(name: &str, info: &[u8], packet: &Packet) -> Option<bool> {
    match name {
        "comment" => Some(true),
        "tcp" if packet.protocol == 6 => tcp(info, packet),
        "udp" if packet.protocol == 17 => {
            let turned = *info.get(8)?;
            Some(ports(info, turned, packet)?)
        }
        "tcp" | "udp" => Some(false),
        "multiport" => multiport(info, packet),
        "state" => Some(word(info, 0)? & NEW != 0),
        "conntrack" => conntrack(info, packet),
        "addrtype" => addrtype(info, packet),
        // `struct xt_mark_mtinfo1`: of what comes and of the tunnel the mark is 0.
        "mark" => Some((word(info, 0)? == 0) != (*info.get(8)? != 0)),
        _ => None,
    }
}

/// `struct xt_tcp`: source ports, destination ports, option, flags asked for, flags set, inverted.
fn tcp(info: &[u8], packet: &Packet) -> Option<bool> {
    const SYN: u8 = 2;
    const FLAGS_TURNED: u8 = 4;
    const OPTION_TURNED: u8 = 8;
    let [option, mask, set, turned] = *info.get(8..)?.first_chunk()?;
    if option != 0 || turned & OPTION_TURNED != 0 {
        return None;
    }
    let flags = (SYN & mask == set) != (turned & FLAGS_TURNED != 0);
    Some(ports(info, turned, packet)? && flags)
}

fn ports(info: &[u8], turned: u8, packet: &Packet) -> Option<bool> {
    let within = |at, port: u16| Some(half(info, at)? <= port && port <= half(info, at + 2)?);
    let source = within(0, packet.ports.0)? != (turned & 1 != 0);
    let destination = within(4, packet.ports.1)? != (turned & 2 != 0);
    Some(source && destination)
}

/// `struct xt_multiport_v1`: which ports, how many, ports, whether one begins a range, inverted.
fn multiport(info: &[u8], packet: &Packet) -> Option<bool> {
    const MOST: usize = 15;
    let (source, destination) = packet.ports;
    let (which, count) = (*info.first()?, usize::from(*info.get(1)?));
    let port = |at: usize| half(info, 2 + 2 * at);
    let begins = |at: usize| Some(*info.get(2 + 2 * MOST + at)? != 0);
    let inverted = *info.get(2 + 2 * MOST + MOST)? != 0;
    let (mut found, mut at) = (false, 0);
    while at < count.min(MOST) {
        let first = port(at)?;
        let last = if begins(at)? {
            at += 1;
            port(at)?
        } else {
            first
        };
        at += 1;
        let within = |port: u16| (first..=last).contains(&port);
        found |= match which {
            0 => within(source),
            1 => within(destination),
            _ => within(source) || within(destination),
        };
    }
    Some(found != inverted)
}

/// `struct xt_conntrack_mtinfo3`, if it asks for the state alone.
fn conntrack(info: &[u8], packet: &Packet) -> Option<bool> {
    const STATE: u16 = 1;
    /// `XT_CONNTRACK_STATE_DNAT`.
    const DNAT: u16 = 1 << 7;
    const ASKED: usize = 146;
    let (asked, turned) = (half(info, ASKED)?, half(info, ASKED + 2)?);
    let states = half(info, ASKED + 4)?;
    if asked & STATE != 0 && states & DNAT != 0 && packet.is_forwarded() {
        // It may have been turned on its way here.
        return None;
    }
    let fits = (states & NEW as u16 != 0) != (turned & STATE != 0);
    match asked {
        0 => Some(true),
        STATE => Some(fits),
        // It asks for more than that.
        _ if asked & STATE != 0 && !fits => Some(false),
        _ => None,
    }
}

/// `struct xt_addrtype_info_v1`: types of source and destination, flags. What comes to this server
/// is for an address of its own, where nothing else is said; the rest is not told apart.
fn addrtype(info: &[u8], packet: &Packet) -> Option<bool> {
    const LOCAL: u16 = 1 << 2;
    const DESTINATION_TURNED: u32 = 2;
    let (source, destination, flags) = (half(info, 0)?, half(info, 2)?, word(info, 4)?);
    let comes = packet.iif.is_some() && packet.oif.is_none();
    if info.len() != 8 || source != 0 || flags & !DESTINATION_TURNED != 0 || !comes {
        return None;
    }
    Some((destination & LOCAL != 0) != (flags & DESTINATION_TURNED != 0))
}

/// Where DNAT leads to: `struct nf_nat_range2` begins with flags, addresses and ports.
pub(super) fn destination(info: &[u8]) -> Option<SocketAddr> {
    const HAS_ADDRESS: u32 = 1;
    const HAS_PORT: u32 = 2;
    let flags = word(info, 0)?;
    let port = info.get(36..38)?.first_chunk()?;
    let port = if flags & HAS_PORT != 0 {
        u16::from_be_bytes(*port)
    } else {
        0
    };
    let addr = info.get(4..20).filter(|_| flags & HAS_ADDRESS != 0)?;
    let is_v4 = addr[4..].iter().all(|&byte| byte == 0);
    end(if is_v4 { &addr[..4] } else { addr }, port)
}

/// Four bytes of a structure of the kernel.
pub(super) fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let raw = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_ne_bytes(*raw))
}

/// Two bytes of one.
pub(super) fn half(bytes: &[u8], at: usize) -> Option<u16> {
    let raw = bytes.get(at..)?.first_chunk()?;
    Some(u16::from_ne_bytes(*raw))
}
