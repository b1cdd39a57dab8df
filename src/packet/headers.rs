//! What may stand between the fixed IP header and the upper layer: IPv4 options, IPv6 extension
//! headers, and what either family says about fragments.

use crate::model::drops::DropReason;
use crate::model::moved::TCP;
use crate::packet::field::{get_u16, get_u32, ipv6, ipv6_fragment};

/// Most IPv6 extension headers that are walked. RFC 8200 section 4.1 names six that may stand
/// before the upper layer, one of them twice; a longer chain only serves to hide something.
pub const MAX_EXTENSION_HEADERS: usize = 8;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;

/// Whether the packet is a fragment.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Fragment {
    /// A whole packet (also an IPv6 atomic fragment, RFC 6946).
    None,
    /// The fragment with the upper-layer header.
    First,
    /// A fragment without it.
    Later,
}

/// Where a chain of IPv6 extension headers ends.
pub(super) struct Chain {
    pub(super) l4: usize,
    pub(super) protocol: u8,
    pub(super) fragment: Fragment,
    pub(super) fragment_id: u32,
}

impl Chain {
    /// Follows the headers from `at`, the first being of type `protocol`, up to the upper layer, a
    /// later fragment's payload, or the end of `packet`.
    #[inline]
    pub(super) fn walk(packet: &[u8], at: usize, protocol: u8) -> Result<Self, DropReason> {
        let mut chain = Self {
            l4: at,
            protocol,
            fragment: Fragment::None,
            fragment_id: 0,
        };
        for _ in 0..=MAX_EXTENSION_HEADERS {
            if !matches!(
                chain.protocol,
                HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION
            ) {
                return Ok(chain);
            }
            let Some(header) = packet[chain.l4..].first_chunk::<8>() else {
                return Err(DropReason::IpMalformed);
            };
            let mut len = extension_len(header);
            match chain.protocol {
                // Then the destination would not be the last one, which the checksum covers.
                ROUTING if header[3] != 0 => return Err(DropReason::IpMalformed),
                FRAGMENT => {
                    if chain.fragment != Fragment::None {
                        return Err(DropReason::IpMalformed);
                    }
                    len = ipv6_fragment::HEADER_LEN;
                    let word = get_u16(header, ipv6_fragment::FRAGMENT);
                    let offset = usize::from(word & ipv6_fragment::FRAGMENT_OFFSET);
                    let more = word & ipv6_fragment::MORE_FRAGMENTS != 0;
                    if offset != 0 || more {
                        let rest = packet.len() - chain.l4 - len;
                        chain.fragment = check_fragment(offset, more, rest, header[0])?;
                        chain.fragment_id = get_u32(header, ipv6_fragment::ID);
                    }
                }
                _ => {}
            }
            chain.l4 += len;
            chain.protocol = header[0];
            if chain.l4 > packet.len() {
                return Err(DropReason::IpMalformed);
            }
            if chain.fragment == Fragment::Later {
                return Ok(chain);
            }
        }
        Err(DropReason::IpMalformed)
    }
}

/// Length of an IPv6 extension header other than that of a fragment (RFC 8200 section 4.2).
#[inline]
fn extension_len(header: &[u8; 8]) -> usize {
    8 + usize::from(header[1]) * 8
}

/// Where the part of an IPv6 packet begins that its fragment header is about, if there is such a
/// header before `l4`. [`Chain::walk`] has checked the headers.
pub(super) fn fragmented_part(packet: &[u8], l4: usize) -> Option<usize> {
    let (mut kind, mut at) = (*packet.get(ipv6::NEXT_HEADER)?, ipv6::HEADER_LEN);
    while at < l4 {
        let header = packet.get(at..)?.first_chunk::<8>()?;
        if kind == FRAGMENT {
            return Some(at + ipv6_fragment::HEADER_LEN);
        }
        kind = header[0];
        at += extension_len(header);
    }
    None
}

/// What kind of fragment `len` bytes at `offset` are.
pub(super) fn check_fragment(
    offset: usize,
    more: bool,
    len: usize,
    protocol: u8,
) -> Result<Fragment, DropReason> {
    // An empty or ragged fragment, one that ends beyond the largest packet, or one that could write
    // over the flags of a TCP header already judged (RFC 1858 section 3.3).
    let ragged = more && !len.is_multiple_of(8);
    let beyond = offset + len > usize::from(u16::MAX);
    if len == 0 || ragged || beyond || (protocol == TCP && offset == 8) {
        return Err(DropReason::IpMalformed);
    }
    Ok(if offset == 0 {
        Fragment::First
    } else {
        Fragment::Later
    })
}

/// Refuses IPv4 options that run out of the header and source routes (RFC 7126 section 4.3).
pub(super) fn check_options(mut options: &[u8]) -> Result<(), DropReason> {
    const END: u8 = 0;
    const NOP: u8 = 1;
    const LOOSE_SOURCE_ROUTE: u8 = 131;
    const STRICT_SOURCE_ROUTE: u8 = 137;
    while let Some(&kind) = options.first() {
        let len = match kind {
            END => break,
            NOP => 1,
            LOOSE_SOURCE_ROUTE | STRICT_SOURCE_ROUTE => return Err(DropReason::IpMalformed),
            _ => usize::from(options.get(1).copied().unwrap_or(0)).max(1),
        };
        if (kind != NOP && len < 2) || len > options.len() {
            return Err(DropReason::IpMalformed);
        }
        options = &options[len..];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::testing::Plan;
    use crate::packet::{Kind, Parsed};

    #[test]
    fn source_routes_are_refused() {
        let mut bytes = Plan::new(Kind::Udp, "203.0.113.9", "192.0.2.5").build();
        bytes.splice(20..20, [131, 3, 4, 0]);
        bytes[0] = 0x46;
        bytes[3] += 4;
        assert_eq!(Parsed::parse(&bytes), Err(DropReason::IpMalformed));
        bytes[20] = 7;
        assert!(Parsed::parse(&bytes).is_ok(), "record route is harmless");
        bytes[21] = 5;
        assert_eq!(Parsed::parse(&bytes), Err(DropReason::IpMalformed));
    }

    #[test]
    fn ipv6_extension_headers_are_walked_so_far() {
        let plain = Plan::new(Kind::Tcp, "2001:db8::9", "2001:db8::5").build();
        let with = |headers: &[(u8, [u8; 7])]| {
            let mut bytes = plain.clone();
            let mut last = 6;
            for (index, (kind, rest)) in headers.iter().enumerate() {
                let at = 40 + index * 8;
                bytes.splice(at..at, [TCP].into_iter().chain(*rest));
                bytes[last] = *kind;
                last = at;
            }
            bytes[5] += headers.len() as u8 * 8;
            Parsed::parse(&bytes)
        };
        let none = [0; 7];
        let parsed = with(&[(0, none), (60, none), (43, none)]).unwrap();
        assert_eq!((parsed.l4(), parsed.kind()), (64, Kind::Tcp));
        assert_eq!(
            with(&[(43, [0, 0, 1, 0, 0, 0, 0])]),
            Err(DropReason::IpMalformed)
        );
        assert!(with(&[(60, none); MAX_EXTENSION_HEADERS]).is_ok());
        assert!(with(&[(60, none); MAX_EXTENSION_HEADERS + 1]).is_err());
        let atomic = with(&[(44, none)]).unwrap();
        assert_eq!(
            (atomic.fragment(), atomic.kind()),
            (Fragment::None, Kind::Tcp)
        );
        let first = with(&[(44, [0, 0, 1, 0, 0, 0, 7])]).unwrap();
        assert_eq!(
            (first.fragment(), first.kind()),
            (Fragment::First, Kind::Tcp)
        );
        let later = with(&[(44, [0, 0, 64, 0, 0, 0, 7])]).unwrap();
        assert_eq!(
            (later.fragment(), later.fragment_id()),
            (Fragment::Later, 7)
        );
        assert_eq!(
            (later.kind(), later.protocol(), later.l4()),
            (Kind::LaterFragment, TCP, 48)
        );
    }
}
