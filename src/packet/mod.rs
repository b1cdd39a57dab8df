//! One door for bytes: an IP packet is checked here, once, and everything after relies on it.
//!
//! Owns what an IPv4 or IPv6 packet may look like, where its fields lie, and how its checksums are
//! mended when a field changes (RFC 1624). Knows nothing of flows, tunnels or the kernel.
//!
//! [`Parsed`] is a small `Copy` table of offsets; the bytes stay with the caller, who hands both to
//! the setters. A checksum is in one of two states, and every setter is told which:
//!
//! * *full*: the field is the finished checksum, as on the wire;
//! * *partial* (`VIRTIO_NET_HDR_F_NEEDS_CSUM`): the field holds the folded, non-complemented sum of
//!   the pseudo-header alone, and whoever needs the finished one sums up the rest.
//!
//! Setters mend and never recompute: a packet that came with a wrong checksum leaves with a wrong
//! one, so that the receiver still sees the damage.

pub mod ecn;
pub mod fragment;
pub mod icmp;
pub mod icmp_reply;
pub mod offload;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::model::drops::DropReason;
use crate::model::moved::{TCP, UDP};

/// IP protocol number of ICMP for IPv4.
pub const ICMP: u8 = 1;
/// IP protocol number of ICMP for IPv6.
pub const ICMPV6: u8 = 58;

/// TCP flag FIN.
pub const FIN: u8 = 0x01;
/// TCP flag SYN.
pub const SYN: u8 = 0x02;
/// TCP flag RST.
pub const RST: u8 = 0x04;
/// TCP flag PSH.
pub const PSH: u8 = 0x08;
/// TCP flag ACK.
pub const ACK: u8 = 0x10;
/// TCP flag URG.
pub const URG: u8 = 0x20;
/// TCP flag ECE (RFC 3168).
pub const ECE: u8 = 0x40;
/// TCP flag CWR (RFC 3168).
pub const CWR: u8 = 0x80;

/// Most IPv6 extension headers that are walked. RFC 8200 section 4.1 names six that may stand
/// before the upper layer, one of them twice; a longer chain only serves to hide something.
pub const MAX_EXTENSION_HEADERS: usize = 8;

/// Length of an IPv6 header.
pub(crate) const IPV6_HEADER: usize = 40;
/// Length of an IPv4 header without options.
pub(crate) const IPV4_HEADER: usize = 20;

const UDP_LITE: u8 = 136;
const DCCP: u8 = 33;

/// Address family of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// An address of either family in 16 bytes: IPv4 as `::ffff:a.b.c.d`, which no packet may carry on
/// the wire, so the two never meet.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Addr([u8; 16]);

impl Addr {
    /// The family the address belongs to.
    #[inline]
    pub fn family(self) -> Family {
        if self.0[..12] == V4_MAPPED {
            Family::V4
        } else {
            Family::V6
        }
    }

    /// The address as two words, for hashing and comparing.
    #[inline]
    pub(crate) fn words(self) -> [u64; 2] {
        let all = u128::from_ne_bytes(self.0);
        [all as u64, (all >> 64) as u64]
    }

    /// What counts as one source: an IPv4 address, or the /64 that one IPv6 host can fill at will.
    #[inline]
    pub(crate) fn source(self) -> Self {
        match self.family() {
            Family::V4 => self,
            Family::V6 => {
                let mut out = self.0;
                out[8..].fill(0);
                Self(out)
            }
        }
    }

    #[inline]
    fn v4(bytes: [u8; 4]) -> Self {
        let mut out = [0; 16];
        out[..12].copy_from_slice(&V4_MAPPED);
        out[12..].copy_from_slice(&bytes);
        Self(out)
    }
}

const V4_MAPPED: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];

impl From<IpAddr> for Addr {
    fn from(addr: IpAddr) -> Self {
        match addr {
            IpAddr::V4(addr) => addr.into(),
            IpAddr::V6(addr) => addr.into(),
        }
    }
}

impl From<Ipv4Addr> for Addr {
    fn from(addr: Ipv4Addr) -> Self {
        Self::v4(addr.octets())
    }
}

impl From<Ipv6Addr> for Addr {
    fn from(addr: Ipv6Addr) -> Self {
        Self(addr.octets())
    }
}

impl From<Addr> for IpAddr {
    fn from(addr: Addr) -> Self {
        Self::V6(Ipv6Addr::from(addr.0)).to_canonical()
    }
}

impl fmt::Debug for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        IpAddr::from(*self).fmt(f)
    }
}

/// What follows the IP header.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Kind {
    /// TCP, with ports.
    Tcp,
    /// UDP, with ports.
    Udp,
    /// An ICMP query (echo request and its like): its identifier is the source port, the
    /// destination port is 0.
    Request,
    /// An answer to an ICMP query: its identifier is the destination port, the source port is 0.
    Reply,
    /// An ICMP error, which quotes the packet it is about ([`Quoted`]).
    Error,
    /// Any other protocol, known by its number alone.
    Other,
    /// A later fragment: what follows is a piece of the payload.
    Hidden,
}

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

/// Where things lie in one packet that has passed the door.
///
/// Belongs to the bytes it was made from: the methods that take `bytes` panic on a buffer that is
/// shorter than the headers they touch. They touch headers only, so the head of a super-packet
/// whose payload lies elsewhere will do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Parsed {
    total: u32,
    fragment_id: u32,
    l4: u16,
    payload: u16,
    /// Offset of the upper-layer checksum; 0 if there is none to mend.
    csum_at: u16,
    src_port: u16,
    dst_port: u16,
    family: Family,
    protocol: u8,
    kind: Kind,
    fragment: Fragment,
    tcp_flags: u8,
}

impl Parsed {
    /// Checks `bytes` and finds the fields of the packet they begin with.
    ///
    /// Bytes beyond the packet's total length are allowed (link-layer padding) and not part of it:
    /// the packet is `bytes[..parsed.total()]`.
    ///
    /// # Errors
    /// * [`DropReason::IpMalformed`]: not IP, lengths that contradict each other, source routes
    ///   (RFC 7126, RFC 5095), fragments that RFC 1858 and RFC 3128 warn of or that end beyond 65,535;
    /// * [`DropReason::L4Malformed`]: a transport header that is cut off or contradicts itself;
    /// * [`DropReason::BadSource`]: a loopback, multicast, unspecified, reserved or link-local
    ///   source, or one that equals the destination;
    /// * [`DropReason::IcmpUnsupported`]: ICMP that is neither query nor error.
    #[inline]
    pub fn parse(bytes: &[u8]) -> Result<Self, DropReason> {
        match bytes.first().map(|byte| byte >> 4) {
            Some(4) => Self::parse_v4(bytes),
            Some(6) => Self::parse_v6(bytes),
            _ => Err(DropReason::IpMalformed),
        }
    }

    /// Address family.
    #[inline]
    pub fn family(&self) -> Family {
        self.family
    }

    /// IP protocol number of the upper layer; of a later IPv6 fragment, the number its fragment
    /// header names, which may be that of a further extension header.
    #[inline]
    pub fn protocol(&self) -> u8 {
        self.protocol
    }

    /// What follows the IP header.
    #[inline]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Whether the packet is a fragment.
    #[inline]
    pub fn fragment(&self) -> Fragment {
        self.fragment
    }

    /// Identification of a fragment; of an IPv4 packet that is none, its identification all the same.
    #[inline]
    pub fn fragment_id(&self) -> u32 {
        self.fragment_id
    }

    /// Length of the whole packet in bytes, IP header included: at most 65,535 for IPv4 and
    /// 65,575 for IPv6.
    #[inline]
    pub fn total(&self) -> usize {
        self.total as usize
    }

    /// Offset of the upper-layer header; of a later fragment, of its payload.
    #[inline]
    pub fn l4(&self) -> usize {
        usize::from(self.l4)
    }

    /// Offset of what follows the TCP, UDP or ICMP header; the same as [`Self::l4`] for others.
    #[inline]
    pub fn payload(&self) -> usize {
        usize::from(self.payload)
    }

    /// Bytes after the TCP, UDP or ICMP header.
    #[inline]
    pub fn payload_len(&self) -> usize {
        self.total() - self.payload()
    }

    /// Offset of the upper-layer checksum, if it has one that covers what is rewritten here.
    #[inline]
    pub fn csum_at(&self) -> Option<usize> {
        (self.csum_at != 0).then_some(usize::from(self.csum_at))
    }

    /// Source port, or the identifier of an ICMP request; 0 where there is none.
    #[inline]
    pub fn src_port(&self) -> u16 {
        self.src_port
    }

    /// Destination port, or the identifier of an ICMP reply; 0 where there is none.
    #[inline]
    pub fn dst_port(&self) -> u16 {
        self.dst_port
    }

    /// The TCP flags ([`SYN`] and its like); 0 for other protocols.
    #[inline]
    pub fn tcp_flags(&self) -> u8 {
        self.tcp_flags
    }

    /// Source address.
    #[inline]
    pub fn src(&self, bytes: &[u8]) -> Addr {
        match self.family {
            Family::V4 => Addr::v4(field(bytes, 12)),
            Family::V6 => Addr(field(bytes, 8)),
        }
    }

    /// Destination address.
    #[inline]
    pub fn dst(&self, bytes: &[u8]) -> Addr {
        match self.family {
            Family::V4 => Addr::v4(field(bytes, 16)),
            Family::V6 => Addr(field(bytes, 24)),
        }
    }

    /// Puts another source address, of the same family, and mends the checksums.
    #[inline]
    pub fn set_src(&self, bytes: &mut [u8], addr: Addr, partial: bool) {
        let at = match self.family {
            Family::V4 => 12,
            Family::V6 => 8,
        };
        self.set_addr(bytes, at, addr, partial);
    }

    /// Puts another destination address, of the same family, and mends the checksums.
    #[inline]
    pub fn set_dst(&self, bytes: &mut [u8], addr: Addr, partial: bool) {
        let at = match self.family {
            Family::V4 => 16,
            Family::V6 => 24,
        };
        self.set_addr(bytes, at, addr, partial);
    }

    /// Puts another source port, or identifier of an ICMP request, and mends the checksum.
    /// A packet without one is left alone.
    pub fn set_src_port(&mut self, bytes: &mut [u8], port: u16, partial: bool) {
        let at = match self.kind {
            Kind::Tcp | Kind::Udp => self.l4(),
            Kind::Request => self.l4() + 4,
            Kind::Reply | Kind::Error | Kind::Other | Kind::Hidden => return,
        };
        self.src_port = port;
        self.set_port(bytes, at, port, partial);
    }

    /// Puts another destination port, or identifier of an ICMP reply, and mends the checksum.
    /// A packet without one is left alone.
    pub fn set_dst_port(&mut self, bytes: &mut [u8], port: u16, partial: bool) {
        let at = match self.kind {
            Kind::Tcp | Kind::Udp => self.l4() + 2,
            Kind::Reply => self.l4() + 4,
            Kind::Request | Kind::Error | Kind::Other | Kind::Hidden => return,
        };
        self.dst_port = port;
        self.set_port(bytes, at, port, partial);
    }

    /// Puts another total length (IP and UDP) and mends the IPv4 header checksum and the length in
    /// the pseudo-header. The sum of the bytes that came or went is the caller's to mend if the
    /// checksum is full; if it is partial nothing is left to do.
    ///
    /// `total` has to hold the headers and fit the length fields, but for TCP over IPv4: there a length
    /// that does not becomes zero, as in the kernel's BIG TCP, and the pseudo-header has it in full.
    pub fn set_total(&mut self, bytes: &mut [u8], total: usize, partial: bool) {
        debug_assert!(total >= self.payload());
        debug_assert!(
            total <= 65_535 || (self.family == Family::V4 && self.kind == Kind::Tcp),
            "only BIG TCP over IPv4 is longer"
        );
        let old_l4 = (self.total() - self.l4()) as u32;
        let new_l4 = (total - self.l4()) as u32;
        match self.family {
            Family::V4 => {
                let field = u16::try_from(total).unwrap_or(0);
                let delta = replace(bytes, 2, field.to_be_bytes());
                mend_full(bytes, 10, delta);
            }
            Family::V6 => {
                let _ = replace(bytes, 4, ((total - IPV6_HEADER) as u16).to_be_bytes());
            }
        }
        self.total = total as u32;
        let pseudo = if self.has_pseudo_header() {
            Sum::change(old_l4.to_be_bytes(), new_l4.to_be_bytes())
        } else {
            Sum::default()
        };
        let body = if self.kind == Kind::Udp {
            replace(bytes, self.l4() + 4, (new_l4 as u16).to_be_bytes())
        } else {
            Sum::default()
        };
        self.mend_l4(bytes, pseudo, body, partial);
    }

    /// Puts another identification into the header of an IPv4 packet.
    pub(crate) fn set_ipv4_id(&mut self, bytes: &mut [u8], id: u16) {
        debug_assert_eq!(self.family, Family::V4);
        let delta = replace(bytes, 4, id.to_be_bytes());
        mend_full(bytes, 10, delta);
        self.fragment_id = id.into();
    }

    /// Puts TCP flags (FIN and PSH) in addition to those that are set; the checksum has to be
    /// partial, which does not know of them.
    pub(crate) fn add_tcp_flags(&mut self, bytes: &mut [u8], flags: u8) {
        debug_assert_eq!(self.kind, Kind::Tcp);
        self.tcp_flags |= flags;
        bytes[self.l4() + 13] = self.tcp_flags;
    }

    /// The same packet with the total length that its bytes have by now.
    pub(crate) fn with_total(self, total: usize) -> Self {
        Self {
            total: total as u32,
            ..self
        }
    }

    /// Time to live or hop limit.
    #[inline]
    pub fn ttl(&self, bytes: &[u8]) -> u8 {
        match self.family {
            Family::V4 => bytes[8],
            Family::V6 => bytes[7],
        }
    }

    /// Takes one from time to live or hop limit, as a router does before it forwards.
    ///
    /// # Errors
    /// [`DropReason::TtlExpired`] if nothing would be left (RFC 1812 section 5.3.1); the packet is
    /// unchanged then.
    pub fn decrement_ttl(&self, bytes: &mut [u8]) -> Result<(), DropReason> {
        let ttl = self.ttl(bytes);
        if ttl <= 1 {
            return Err(DropReason::TtlExpired);
        }
        match self.family {
            Family::V4 => {
                let protocol = bytes[9];
                let delta = replace(bytes, 8, [ttl - 1, protocol]);
                mend_full(bytes, 10, delta);
            }
            Family::V6 => bytes[7] = ttl - 1,
        }
        Ok(())
    }

    /// Whether the upper-layer checksum covers addresses and length.
    fn has_pseudo_header(&self) -> bool {
        self.csum_at != 0 && !(self.protocol == ICMP && self.family == Family::V4)
    }

    #[inline]
    fn set_addr(&self, bytes: &mut [u8], at: usize, addr: Addr, partial: bool) {
        debug_assert_eq!(
            addr.family(),
            self.family,
            "no translation between families"
        );
        let delta = match self.family {
            Family::V4 => {
                let [.., a, b, c, d] = addr.0;
                let delta = replace(bytes, at, [a, b, c, d]);
                mend_full(bytes, 10, delta);
                delta
            }
            Family::V6 => replace(bytes, at, addr.0),
        };
        if self.has_pseudo_header() {
            self.mend_l4(bytes, delta, Sum::default(), partial);
        }
    }

    #[inline]
    fn set_port(&self, bytes: &mut [u8], at: usize, port: u16, partial: bool) {
        let delta = replace(bytes, at, port.to_be_bytes());
        self.mend_l4(bytes, Sum::default(), delta, partial);
    }

    /// Mends the upper-layer checksum after a change of `pseudo` in the pseudo-header and of
    /// `body` behind it. A partial checksum does not know of the body.
    #[inline]
    fn mend_l4(&self, bytes: &mut [u8], pseudo: Sum, body: Sum, partial: bool) {
        let Some(at) = self.csum_at() else { return };
        if partial {
            let old = u16::from_ne_bytes(field(bytes, at));
            put(bytes, at, pseudo.and(Sum(old.into())).fold().to_ne_bytes());
        } else {
            mend_l4_full(bytes, at, self.protocol, pseudo.and(body));
        }
    }

    #[inline]
    fn parse_v4(bytes: &[u8]) -> Result<Self, DropReason> {
        let Some(header) = bytes.first_chunk::<IPV4_HEADER>() else {
            return Err(DropReason::IpMalformed);
        };
        let l4 = usize::from(header[0] & 0x0f) * 4;
        let total = usize::from(u16::from_be_bytes([header[2], header[3]]));
        if l4 < IPV4_HEADER || total < l4 || total > bytes.len() {
            return Err(DropReason::IpMalformed);
        }
        let src: [u8; 4] = field(header, 12);
        // 0/8 and 127/8 never leave a host, 224/4 is no one's source, 240/4 is reserved (RFC 6890).
        if matches!(src[0], 0 | 127 | 224..) || src == field::<4>(header, 16) {
            return Err(DropReason::BadSource);
        }
        if l4 > IPV4_HEADER {
            check_options(&bytes[IPV4_HEADER..l4])?;
        }
        let piece = u16::from_be_bytes([header[6], header[7]]);
        let fragment = if piece & 0x3fff == 0 {
            Fragment::None
        } else {
            let offset = usize::from(piece & 0x1fff) * 8;
            check_fragment(offset, piece & 0x2000 != 0, total - l4, header[9])?
        };
        Self {
            total: total as u32,
            fragment_id: u16::from_be_bytes([header[4], header[5]]).into(),
            l4: l4 as u16,
            payload: l4 as u16,
            csum_at: 0,
            src_port: 0,
            dst_port: 0,
            family: Family::V4,
            protocol: header[9],
            kind: Kind::Hidden,
            fragment,
            tcp_flags: 0,
        }
        .with_l4(&bytes[..total])
    }

    #[inline]
    fn parse_v6(bytes: &[u8]) -> Result<Self, DropReason> {
        let Some(header) = bytes.first_chunk::<IPV6_HEADER>() else {
            return Err(DropReason::IpMalformed);
        };
        let total = IPV6_HEADER + usize::from(u16::from_be_bytes([header[4], header[5]]));
        if total > bytes.len() {
            return Err(DropReason::IpMalformed);
        }
        let (src, dst): ([u8; 16], [u8; 16]) = (field(header, 8), field(header, 24));
        if src == dst || is_bad_v6_source(src) {
            return Err(DropReason::BadSource);
        }
        if dst[..12] == V4_MAPPED {
            return Err(DropReason::IpMalformed);
        }
        let chain = Chain::walk(&bytes[..total], IPV6_HEADER, header[6])?;
        Self {
            total: total as u32,
            fragment_id: chain.fragment_id,
            l4: chain.l4 as u16,
            payload: chain.l4 as u16,
            csum_at: 0,
            src_port: 0,
            dst_port: 0,
            family: Family::V6,
            protocol: chain.protocol,
            kind: Kind::Hidden,
            fragment: chain.fragment,
            tcp_flags: 0,
        }
        .with_l4(&bytes[..total])
    }

    /// Reads the upper-layer header; `packet` ends where the packet ends.
    #[inline]
    fn with_l4(mut self, packet: &[u8]) -> Result<Self, DropReason> {
        if self.fragment == Fragment::Later {
            return Ok(self);
        }
        let l4 = &packet[self.l4()..];
        match (self.protocol, self.family) {
            (TCP, _) => {
                let Some(header) = l4.first_chunk::<20>() else {
                    return Err(DropReason::L4Malformed);
                };
                let len = header[12] >> 4;
                if len < 5 || usize::from(len) * 4 > l4.len() {
                    return Err(DropReason::L4Malformed);
                }
                self.kind = Kind::Tcp;
                self.tcp_flags = header[13];
                self.payload = self.l4 + u16::from(len) * 4;
                self.csum_at = self.l4 + 16;
                self.read_ports(l4);
            }
            (UDP, _) => {
                let Some(header) = l4.first_chunk::<8>() else {
                    return Err(DropReason::L4Malformed);
                };
                // Less than the packet holds is allowed: the surplus area of RFC 9868.
                let len = usize::from(u16::from_be_bytes([header[4], header[5]]));
                if len < 8 || (len > l4.len() && self.fragment == Fragment::None) {
                    return Err(DropReason::L4Malformed);
                }
                self.kind = Kind::Udp;
                self.payload = self.l4 + 8;
                self.csum_at = self.l4 + 6;
                self.read_ports(l4);
            }
            (ICMP, Family::V4) | (ICMPV6, Family::V6) => {
                let Some(header) = l4.first_chunk::<8>() else {
                    return Err(DropReason::L4Malformed);
                };
                self.kind = icmp_kind(self.family, header[0]).ok_or(DropReason::IcmpUnsupported)?;
                if self.kind == Kind::Error && self.fragment != Fragment::None {
                    // An error is never larger than what every link carries.
                    return Err(DropReason::L4Malformed);
                }
                self.payload = self.l4 + 8;
                self.csum_at = self.l4 + 2;
                (self.src_port, self.dst_port) = icmp_ports(self.kind, l4);
            }
            (UDP_LITE | DCCP, _) => {
                if l4.len() < 8 {
                    return Err(DropReason::L4Malformed);
                }
                self.kind = Kind::Other;
                self.csum_at = self.l4 + 6;
            }
            _ => self.kind = Kind::Other,
        }
        Ok(self)
    }

    #[inline]
    fn read_ports(&mut self, l4: &[u8]) {
        self.src_port = u16::from_be_bytes([l4[0], l4[1]]);
        self.dst_port = u16::from_be_bytes([l4[2], l4[3]]);
    }
}

/// Lowers the MSS option of a SYN or SYN-ACK to `max_v4` or `max_v6`, by the packet's family, and
/// mends the checksum. Returns whether anything was changed.
///
/// Nothing is added where the option is absent: the sender's peer assumes 536 or 1220 then
/// (RFC 9293 section 3.7.1), which any tunnel carries.
pub fn clamp_mss(
    bytes: &mut [u8],
    parsed: &Parsed,
    max_v4: u16,
    max_v6: u16,
    partial: bool,
) -> bool {
    if parsed.kind != Kind::Tcp || parsed.tcp_flags & SYN == 0 {
        return false;
    }
    let max = match parsed.family {
        Family::V4 => max_v4,
        Family::V6 => max_v6,
    };
    let Some(at) = find_mss(&bytes[..parsed.payload()], parsed.l4() + 20) else {
        return false;
    };
    let old: [u8; 2] = field(bytes, at);
    if u16::from_be_bytes(old) <= max {
        return false;
    }
    let new = max.to_be_bytes();
    put(bytes, at, new);
    // Options have no alignment: at an odd offset the two bytes lie in two words of the sum, where
    // they count as if they were swapped.
    let delta = if (at - parsed.l4()).is_multiple_of(2) {
        Sum::change(old, new)
    } else {
        Sum::change([old[1], old[0]], [new[1], new[0]])
    };
    parsed.mend_l4(bytes, Sum::default(), delta, partial);
    true
}

/// Where the value of the MSS option lies, among the options from `at` to the end of `header`.
fn find_mss(header: &[u8], mut at: usize) -> Option<usize> {
    const END: u8 = 0;
    const NOP: u8 = 1;
    const MSS: u8 = 2;
    while at < header.len() {
        match header[at] {
            END => return None,
            NOP => at += 1,
            kind => {
                let len = usize::from(*header.get(at + 1)?);
                if kind == MSS && len == 4 && at + 4 <= header.len() {
                    return Some(at + 2);
                }
                at += len.max(2);
            }
        }
    }
    None
}

/// The packet that an ICMP error quotes: as much of it as there is.
///
/// Offsets are those of the whole ICMP packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Quoted {
    at: u16,
    end: u16,
    l4: u16,
    csum_at: u16,
    src_port: u16,
    dst_port: u16,
    family: Family,
    protocol: u8,
    kind: Kind,
}

/// What to change in a quoted packet; `None` leaves a field alone.
#[derive(Clone, Copy, Default, Debug)]
pub struct Rewrite {
    /// Source address.
    pub src: Option<Addr>,
    /// Destination address.
    pub dst: Option<Addr>,
    /// Source port, or identifier of a request.
    pub src_port: Option<u16>,
    /// Destination port, or identifier of a reply.
    pub dst_port: Option<u16>,
}

impl Quoted {
    /// Reads the quotation of an ICMP error.
    ///
    /// # Errors
    /// [`DropReason::IcmpUnrelated`] if nothing is quoted that a flow could be found by: another
    /// family, a later fragment, an ICMP error, or less than the ports.
    pub fn parse(bytes: &[u8], error: &Parsed) -> Result<Self, DropReason> {
        Self::read(bytes, error).ok_or(DropReason::IcmpUnrelated)
    }

    fn read(bytes: &[u8], error: &Parsed) -> Option<Self> {
        if error.kind != Kind::Error {
            return None;
        }
        let at = error.payload();
        let bytes = &bytes[..error.total()];
        let quote = &bytes[at..];
        let (l4, protocol) = match error.family {
            Family::V4 => {
                let header = quote.first_chunk::<IPV4_HEADER>()?;
                let len = usize::from(header[0] & 0x0f) * 4;
                let later = u16::from_be_bytes([header[6], header[7]]) & 0x1fff != 0;
                if header[0] >> 4 != 4 || len < IPV4_HEADER || len > quote.len() || later {
                    return None;
                }
                (at + len, header[9])
            }
            Family::V6 => {
                let header = quote.first_chunk::<IPV6_HEADER>()?;
                if header[0] >> 4 != 6 {
                    return None;
                }
                let chain = Chain::walk(bytes, at + IPV6_HEADER, header[6]).ok()?;
                if chain.fragment == Fragment::Later {
                    return None;
                }
                (chain.l4, chain.protocol)
            }
        };
        let mut out = Self {
            at: u16::try_from(at).ok()?,
            end: u16::try_from(bytes.len()).ok()?,
            l4: u16::try_from(l4).ok()?,
            csum_at: 0,
            src_port: 0,
            dst_port: 0,
            family: error.family,
            protocol,
            kind: Kind::Other,
        };
        let l4 = &bytes[l4..];
        let csum = match (protocol, error.family) {
            (TCP | UDP, _) => {
                let ports = l4.first_chunk::<8>()?;
                out.src_port = u16::from_be_bytes([ports[0], ports[1]]);
                out.dst_port = u16::from_be_bytes([ports[2], ports[3]]);
                out.kind = if protocol == TCP {
                    Kind::Tcp
                } else {
                    Kind::Udp
                };
                if protocol == TCP { 16 } else { 6 }
            }
            (ICMP, Family::V4) | (ICMPV6, Family::V6) => {
                let header = l4.first_chunk::<8>()?;
                out.kind =
                    icmp_kind(error.family, header[0]).filter(|&kind| kind != Kind::Error)?;
                (out.src_port, out.dst_port) = icmp_ports(out.kind, l4);
                2
            }
            (UDP_LITE | DCCP, _) => 6,
            _ => return Some(out),
        };
        // Eight bytes are all that RFC 792 promises; the checksum of TCP lies behind them.
        if l4.len() >= csum + 2 {
            out.csum_at = out.l4 + csum as u16;
        }
        Some(out)
    }

    /// IP protocol number of the quoted packet.
    pub fn protocol(&self) -> u8 {
        self.protocol
    }

    /// What the quoted packet is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Source port of the quoted packet, or identifier of a request.
    pub fn src_port(&self) -> u16 {
        self.src_port
    }

    /// Destination port of the quoted packet, or identifier of a reply.
    pub fn dst_port(&self) -> u16 {
        self.dst_port
    }

    /// Source address of the quoted packet.
    pub fn src(&self, bytes: &[u8]) -> Addr {
        match self.family {
            Family::V4 => Addr::v4(field(bytes, usize::from(self.at) + 12)),
            Family::V6 => Addr(field(bytes, usize::from(self.at) + 8)),
        }
    }

    /// Destination address of the quoted packet.
    pub fn dst(&self, bytes: &[u8]) -> Addr {
        match self.family {
            Family::V4 => Addr::v4(field(bytes, usize::from(self.at) + 16)),
            Family::V6 => Addr(field(bytes, usize::from(self.at) + 24)),
        }
    }

    /// Changes the quoted packet; mends its checksums as far as they are quoted, and that of the
    /// error around it.
    pub fn rewrite(&self, bytes: &mut [u8], error: &Parsed, change: &Rewrite) {
        // Everything that can change lies between the quoted IP header and the end of the longest
        // plain transport header; the difference of its sums is what the error's checksum needs.
        let reach = usize::from(self.at)..usize::from(self.end).min(usize::from(self.l4) + 20);
        let before = Sum::default().add(&bytes[reach.clone()]);
        let (src_at, dst_at) = match self.family {
            Family::V4 => (12, 16),
            Family::V6 => (8, 24),
        };
        self.set_addr(bytes, src_at, change.src);
        self.set_addr(bytes, dst_at, change.dst);
        let (src_at, dst_at) = match self.kind {
            Kind::Tcp | Kind::Udp => (Some(0), Some(2)),
            Kind::Request => (Some(4), None),
            Kind::Reply => (None, Some(4)),
            Kind::Error | Kind::Other | Kind::Hidden => (None, None),
        };
        for (at, port) in [(src_at, change.src_port), (dst_at, change.dst_port)] {
            if let (Some(at), Some(port)) = (at, port) {
                let delta = replace(bytes, usize::from(self.l4) + at, port.to_be_bytes());
                self.mend(bytes, delta);
            }
        }
        let after = Sum::default().add(&bytes[reach]);
        let delta = Sum::change(before.fold().to_ne_bytes(), after.fold().to_ne_bytes());
        mend_full(bytes, usize::from(error.csum_at), delta);
    }

    fn set_addr(&self, bytes: &mut [u8], offset: usize, addr: Option<Addr>) {
        let Some(addr) = addr else { return };
        let at = usize::from(self.at);
        match self.family {
            Family::V4 => {
                let [.., a, b, c, d] = addr.0;
                let delta = replace(bytes, at + offset, [a, b, c, d]);
                mend_full(bytes, at + 10, delta);
                if self.protocol != ICMP {
                    self.mend(bytes, delta);
                }
            }
            Family::V6 => {
                let delta = replace(bytes, at + offset, addr.0);
                self.mend(bytes, delta);
            }
        }
    }

    fn mend(&self, bytes: &mut [u8], delta: Sum) {
        if self.csum_at != 0 {
            mend_l4_full(bytes, usize::from(self.csum_at), self.protocol, delta);
        }
    }
}

/// Where a chain of IPv6 extension headers ends.
struct Chain {
    l4: usize,
    protocol: u8,
    fragment: Fragment,
    fragment_id: u32,
}

impl Chain {
    /// Follows the headers from `at`, the first being of type `protocol`, up to the upper layer, a
    /// later fragment's payload, or the end of `packet`.
    #[inline]
    fn walk(packet: &[u8], at: usize, protocol: u8) -> Result<Self, DropReason> {
        const HOP_BY_HOP: u8 = 0;
        const ROUTING: u8 = 43;
        const FRAGMENT: u8 = 44;
        const DESTINATION: u8 = 60;
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
            let mut len = 8 + usize::from(header[1]) * 8;
            match chain.protocol {
                // The destination would not be the last one, which is what the checksum covers.
                ROUTING if header[3] != 0 => return Err(DropReason::IpMalformed),
                FRAGMENT => {
                    if chain.fragment != Fragment::None {
                        return Err(DropReason::IpMalformed);
                    }
                    len = 8;
                    let piece = u16::from_be_bytes([header[2], header[3]]);
                    let (offset, more) = (usize::from(piece & 0xfff8), piece & 1 != 0);
                    if offset != 0 || more {
                        let rest = packet.len() - chain.l4 - len;
                        chain.fragment = check_fragment(offset, more, rest, header[0])?;
                        chain.fragment_id = u32::from_be_bytes(field(header, 4));
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

/// What kind of fragment `len` bytes at `offset` are.
fn check_fragment(
    offset: usize,
    more: bool,
    len: usize,
    protocol: u8,
) -> Result<Fragment, DropReason> {
    // An empty or ragged piece, one that ends beyond the largest packet, or one that could write
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
fn check_options(mut options: &[u8]) -> Result<(), DropReason> {
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

/// Unspecified, loopback, IPv4-mapped, multicast, and link-local, which no router may forward
/// (RFC 4291 section 2.5.6).
#[inline]
fn is_bad_v6_source(src: [u8; 16]) -> bool {
    let first = u16::from_be_bytes([src[0], src[1]]);
    if first != 0 {
        return first >= 0xff00 || first & 0xffc0 == 0xfe80;
    }
    src[..12] == V4_MAPPED || u128::from_be_bytes(src) <= 1
}

fn icmp_kind(family: Family, icmp_type: u8) -> Option<Kind> {
    match (family, icmp_type) {
        // Echo, timestamp, information, address mask.
        (Family::V4, 8 | 13 | 15 | 17) | (Family::V6, 128) => Some(Kind::Request),
        (Family::V4, 0 | 14 | 16 | 18) | (Family::V6, 129) => Some(Kind::Reply),
        // Unreachable (with too big), time exceeded, parameter problem. Source quench is
        // deprecated (RFC 6633), redirects concern the link they were sent on.
        (Family::V4, 3 | 11 | 12) | (Family::V6, 1..=4) => Some(Kind::Error),
        _ => None,
    }
}

/// The identifier on the side where a client has its port.
fn icmp_ports(kind: Kind, l4: &[u8]) -> (u16, u16) {
    let id = u16::from_be_bytes([l4[4], l4[5]]);
    match kind {
        Kind::Request => (id, 0),
        Kind::Reply => (0, id),
        Kind::Tcp | Kind::Udp | Kind::Error | Kind::Other | Kind::Hidden => (0, 0),
    }
}

/// A one's complement sum that is not folded yet.
///
/// In the byte order of the machine: such a sum comes out with its bytes swapped, and stored in the
/// same order they are right again (RFC 1071 section 2 B). Holds some 2^32 words without overflow.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(crate) struct Sum(u64);

impl Sum {
    /// What replacing `old` by `new`, both of whole words, adds.
    #[inline]
    pub(crate) fn change<const N: usize>(old: [u8; N], new: [u8; N]) -> Self {
        const { assert!(N.is_multiple_of(2) && N > 0) };
        let mut sum = 0;
        if N == 2 {
            sum += u64::from(!u16::from_ne_bytes(field(&old, 0)));
            sum += u64::from(u16::from_ne_bytes(field(&new, 0)));
        } else {
            for at in (0..N).step_by(4) {
                sum += u64::from(!u32::from_ne_bytes(field(&old, at)));
                sum += u64::from(u32::from_ne_bytes(field(&new, at)));
            }
        }
        Self(sum)
    }

    /// Both sums as one.
    #[inline]
    pub(crate) fn and(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }

    /// With one more word, given as it is in memory.
    #[inline]
    pub(crate) fn word(self, word: [u8; 2]) -> Self {
        Self(self.0 + u64::from(u16::from_ne_bytes(word)))
    }

    /// With all of `bytes`; an odd last byte counts as if a zero followed.
    #[inline]
    pub(crate) fn add(self, bytes: &[u8]) -> Self {
        let (words, rest) = bytes.as_chunks::<4>();
        let mut sum: u64 = words
            .iter()
            .map(|word| u64::from(u32::from_ne_bytes(*word)))
            .sum();
        let (halves, rest) = rest.as_chunks::<2>();
        if let [half] = halves {
            sum += u64::from(u16::from_ne_bytes(*half));
        }
        if let [byte] = rest {
            sum += u64::from(u16::from_ne_bytes([*byte, 0]));
        }
        Self(self.0 + sum)
    }

    /// Folded to 16 bits; store it with `to_ne_bytes`.
    #[inline]
    pub(crate) fn fold(self) -> u16 {
        let sum = (self.0 & 0xffff_ffff) + (self.0 >> 32);
        let sum = (sum & 0xffff_ffff) + (sum >> 32);
        let sum = (sum & 0xffff) + (sum >> 16);
        let sum = (sum & 0xffff) + (sum >> 16);
        sum as u16
    }
}

/// The sum of a pseudo-header without its length (RFC 793, RFC 8200 section 8.1).
pub(crate) fn pseudo_sum(header: &[u8], family: Family, protocol: u8) -> Sum {
    let addrs = match family {
        Family::V4 => &header[12..20],
        Family::V6 => &header[8..40],
    };
    Sum::default().add(addrs).word([0, protocol])
}

/// Puts `new` at `at` and says what that adds to a sum.
#[inline]
fn replace<const N: usize>(bytes: &mut [u8], at: usize, new: [u8; N]) -> Sum {
    let old = field(bytes, at);
    put(bytes, at, new);
    Sum::change(old, new)
}

/// RFC 1624, equation 3.
#[inline]
fn mend_full(bytes: &mut [u8], at: usize, delta: Sum) {
    let old = u16::from_ne_bytes(field(bytes, at));
    let new = !delta.and(Sum(u64::from(!old))).fold();
    put(bytes, at, new.to_ne_bytes());
}

/// The same for an upper layer where 0 may mean that there is no checksum (RFC 768): 0 stays 0, and
/// what comes out as 0 is written as its equal 0xffff.
#[inline]
fn mend_l4_full(bytes: &mut [u8], at: usize, protocol: u8, delta: Sum) {
    if protocol == UDP && field::<2>(bytes, at) == [0, 0] {
        return;
    }
    mend_full(bytes, at, delta);
    if matches!(protocol, UDP | UDP_LITE) && field::<2>(bytes, at) == [0, 0] {
        put(bytes, at, [0xff, 0xff]);
    }
}

#[inline]
pub(crate) fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

#[inline]
pub(crate) fn put<const N: usize>(bytes: &mut [u8], at: usize, value: [u8; N]) {
    bytes[at..at + N].copy_from_slice(&value);
}

/// Packets to try things on, and etherparse as the judge of their checksums.
#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use etherparse::{NetHeaders, PacketBuilder, PacketHeaders, TransportHeader};
    use proptest::prelude::*;

    /// What is sent.
    #[derive(Clone, Debug)]
    pub(crate) struct Plan {
        pub(crate) src: IpAddr,
        pub(crate) dst: IpAddr,
        pub(crate) ttl: u8,
        pub(crate) src_port: u16,
        pub(crate) dst_port: u16,
        pub(crate) kind: Kind,
        pub(crate) flags: u8,
        pub(crate) seq: u32,
        pub(crate) mss: Option<u16>,
        pub(crate) payload: Vec<u8>,
    }

    impl Plan {
        pub(crate) fn new(kind: Kind, src: &str, dst: &str) -> Self {
            Self {
                src: src.parse().unwrap(),
                dst: dst.parse().unwrap(),
                ttl: 64,
                src_port: if kind == Kind::Reply { 0 } else { 40_000 },
                dst_port: if kind == Kind::Request { 0 } else { 80 },
                kind,
                flags: ACK,
                seq: 1_000,
                mss: None,
                payload: b"some payload".to_vec(),
            }
        }

        /// The packet as etherparse makes it, with full checksums.
        pub(crate) fn build(&self) -> Vec<u8> {
            let mut out = Vec::new();
            let ip = match (self.src, self.dst) {
                (IpAddr::V4(src), IpAddr::V4(dst)) => {
                    PacketBuilder::ipv4(src.octets(), dst.octets(), self.ttl)
                }
                (IpAddr::V6(src), IpAddr::V6(dst)) => {
                    PacketBuilder::ipv6(src.octets(), dst.octets(), self.ttl)
                }
                _ => panic!("one family"),
            };
            let v4 = self.src.is_ipv4();
            match self.kind {
                Kind::Tcp => {
                    let mut tcp = ip.tcp(self.src_port, self.dst_port, self.seq, 512);
                    let set = |flag| self.flags & flag != 0;
                    if set(ACK) {
                        tcp = tcp.ack(77);
                    }
                    if set(SYN) {
                        tcp = tcp.syn();
                    }
                    if set(FIN) {
                        tcp = tcp.fin();
                    }
                    if set(RST) {
                        tcp = tcp.rst();
                    }
                    if set(PSH) {
                        tcp = tcp.psh();
                    }
                    if set(CWR) {
                        tcp = tcp.cwr();
                    }
                    if let Some(mss) = self.mss {
                        use etherparse::TcpOptionElement::{MaximumSegmentSize, Noop};
                        tcp = tcp.options(&[Noop, MaximumSegmentSize(mss)]).unwrap();
                    }
                    tcp.write(&mut out, &self.payload)
                }
                Kind::Udp => ip
                    .udp(self.src_port, self.dst_port)
                    .write(&mut out, &self.payload),
                Kind::Request if v4 => ip
                    .icmpv4_echo_request(self.src_port, 3)
                    .write(&mut out, &self.payload),
                Kind::Reply if v4 => ip
                    .icmpv4_echo_reply(self.dst_port, 3)
                    .write(&mut out, &self.payload),
                Kind::Request => ip
                    .icmpv6_echo_request(self.src_port, 3)
                    .write(&mut out, &self.payload),
                Kind::Reply => ip
                    .icmpv6_echo_reply(self.dst_port, 3)
                    .write(&mut out, &self.payload),
                Kind::Error | Kind::Other | Kind::Hidden => panic!("not built here"),
            }
            .unwrap();
            out
        }

        /// The same with a partial checksum.
        pub(crate) fn build_partial(&self) -> Vec<u8> {
            let mut out = self.build();
            make_partial(&mut out);
            out
        }
    }

    pub(crate) fn make_partial(packet: &mut [u8]) {
        let parsed = Parsed::parse(packet).unwrap();
        let len = ((parsed.total() - parsed.l4()) as u16).to_be_bytes();
        let sum = pseudo_sum(packet, parsed.family(), parsed.protocol()).word(len);
        put(packet, parsed.csum_at().unwrap(), sum.fold().to_ne_bytes());
    }

    /// Does what hardware would do for a partial checksum.
    pub(crate) fn complete(packet: &mut [u8]) {
        let parsed = Parsed::parse(packet).unwrap();
        let sum = !Sum::default().add(&packet[parsed.l4()..]).fold();
        let sum = if sum == 0 && parsed.kind() == Kind::Udp {
            0xffff
        } else {
            sum
        };
        put(packet, parsed.csum_at().unwrap(), sum.to_ne_bytes());
    }

    /// Compares every checksum of a whole packet with etherparse's own computation.
    pub(crate) fn assert_sums(packet: &[u8]) {
        let headers = PacketHeaders::from_ip_slice(packet).unwrap();
        let payload = headers.payload.slice();
        match headers.net.unwrap() {
            NetHeaders::Ipv4(ip, _) => {
                assert_eq!(ip.header_checksum, ip.calc_header_checksum());
                match headers.transport.unwrap() {
                    TransportHeader::Tcp(tcp) => {
                        assert_eq!(tcp.checksum, tcp.calc_checksum_ipv4(&ip, payload).unwrap());
                    }
                    TransportHeader::Udp(udp) => {
                        assert_eq!(udp.checksum, udp.calc_checksum_ipv4(&ip, payload).unwrap());
                    }
                    TransportHeader::Icmpv4(icmp) => {
                        assert_eq!(icmp.checksum, icmp.icmp_type.calc_checksum(payload));
                    }
                    TransportHeader::Icmpv6(_) | TransportHeader::Igmp(_) => panic!("not IPv4"),
                }
            }
            NetHeaders::Ipv6(ip, _) => match headers.transport.unwrap() {
                TransportHeader::Tcp(tcp) => {
                    assert_eq!(tcp.checksum, tcp.calc_checksum_ipv6(&ip, payload).unwrap());
                }
                TransportHeader::Udp(udp) => {
                    assert_eq!(udp.checksum, udp.calc_checksum_ipv6(&ip, payload).unwrap());
                }
                TransportHeader::Icmpv6(icmp) => {
                    let sum = icmp
                        .icmp_type
                        .calc_checksum(ip.source, ip.destination, payload);
                    assert_eq!(icmp.checksum, sum.unwrap());
                }
                TransportHeader::Icmpv4(_) | TransportHeader::Igmp(_) => panic!("not IPv6"),
            },
            NetHeaders::Arp(_) => panic!("ARP"),
        }
    }

    pub(crate) fn addrs() -> impl Strategy<Value = (IpAddr, IpAddr)> {
        let v4 = (any::<[u8; 3]>(), any::<[u8; 3]>());
        let v6 = (any::<[u8; 14]>(), any::<[u8; 14]>());
        prop_oneof![
            v4.prop_map(|(a, b)| {
                let addr = |first, rest: [u8; 3]| IpAddr::from([first, rest[0], rest[1], rest[2]]);
                (addr(11, a), addr(12, b))
            }),
            v6.prop_map(|(a, b)| {
                let addr = |second, rest: [u8; 14]| {
                    let mut out = [0x20; 16];
                    out[1] = second;
                    out[2..].copy_from_slice(&rest);
                    IpAddr::from(out)
                };
                (addr(1, a), addr(2, b))
            }),
        ]
    }

    /// Any packet that a client could send, addresses aside.
    pub(crate) fn plans() -> impl Strategy<Value = Plan> {
        let kinds = prop_oneof![
            Just(Kind::Tcp),
            Just(Kind::Udp),
            Just(Kind::Request),
            Just(Kind::Reply)
        ];
        let payload = prop::collection::vec(any::<u8>(), 0..200);
        let mss = prop::option::of(500u16..9000);
        (
            addrs(),
            kinds,
            any::<[u16; 2]>(),
            2u8..,
            any::<u32>(),
            payload,
            mss,
        )
            .prop_map(|((src, dst), kind, ports, ttl, seq, payload, mss)| Plan {
                src,
                dst,
                ttl,
                src_port: if kind == Kind::Reply { 0 } else { ports[0] },
                dst_port: if kind == Kind::Request { 0 } else { ports[1] },
                kind,
                flags: if mss.is_some() { SYN } else { ACK },
                seq,
                mss,
                payload,
            })
    }
}

#[cfg(test)]
mod tests {
    use super::testing::*;
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn setters_make_what_would_have_been_built(
            plan in plans(), (src, dst) in addrs(), ports in any::<[u16; 2]>(), partial in any::<bool>(),
        ) {
            let is_icmp = matches!(plan.kind, Kind::Request | Kind::Reply);
            let partial = partial && !is_icmp;
            let same_family = src.is_ipv4() == plan.src.is_ipv4();
            let mut wanted = plan.clone();
            wanted.ttl -= 1;
            if same_family {
                (wanted.src, wanted.dst) = (src, dst);
            }
            if plan.kind != Kind::Reply { wanted.src_port = ports[0]; }
            if plan.kind != Kind::Request { wanted.dst_port = ports[1]; }
            let mut bytes = if partial { plan.build_partial() } else { plan.build() };
            let mut parsed = Parsed::parse(&bytes).unwrap();
            prop_assert_eq!((parsed.src_port(), parsed.dst_port()), (plan.src_port, plan.dst_port));
            prop_assert_eq!(IpAddr::from(parsed.src(&bytes)), plan.src);
            prop_assert_eq!(IpAddr::from(parsed.dst(&bytes)), plan.dst);
            parsed.set_src(&mut bytes, wanted.src.into(), partial);
            parsed.set_dst(&mut bytes, wanted.dst.into(), partial);
            parsed.set_src_port(&mut bytes, wanted.src_port, partial);
            parsed.set_dst_port(&mut bytes, wanted.dst_port, partial);
            parsed.decrement_ttl(&mut bytes).unwrap();
            let wanted = if partial { wanted.build_partial() } else { wanted.build() };
            prop_assert_eq!(&bytes, &wanted);
            prop_assert_eq!(parsed, Parsed::parse(&bytes).unwrap());
            if !partial { assert_sums(&bytes); }
        }

        #[test]
        fn a_new_length_mends_the_partial_sum(plan in plans(), more in 0usize..300) {
            let mut longer = plan.clone();
            longer.payload.extend(vec![9; more]);
            if plan.kind == Kind::Request || plan.kind == Kind::Reply { return Ok(()); }
            let mut bytes = plan.build_partial();
            let mut parsed = Parsed::parse(&bytes).unwrap();
            let total = bytes.len() + more;
            parsed.set_total(&mut bytes, total, true);
            bytes.extend(vec![9; more]);
            prop_assert_eq!(&bytes, &longer.build_partial());
            prop_assert_eq!(parsed, Parsed::parse(&bytes).unwrap());
        }

        #[test]
        fn no_bytes_make_the_door_panic(bytes in prop::collection::vec(any::<u8>(), 0..120)) {
            try_all(bytes);
        }

        #[test]
        fn no_damaged_packet_makes_the_door_panic(
            plan in plans(), damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
            cut in any::<prop::sample::Index>(), keep in any::<bool>(),
        ) {
            let mut bytes = plan.build();
            for (at, value) in damage {
                let at = at.index(bytes.len().min(80));
                bytes[at] = value;
            }
            if !keep { bytes.truncate(cut.index(bytes.len())); }
            try_all(bytes);
        }

        #[test]
        fn mss_is_clamped_and_the_sum_stays_right(plan in plans(), max in 500u16..1400) {
            let mut bytes = plan.build();
            let parsed = Parsed::parse(&bytes).unwrap();
            let changed = clamp_mss(&mut bytes, &parsed, max, max, false);
            let is_tcp = plan.kind == Kind::Tcp;
            prop_assert_eq!(changed, is_tcp && plan.mss.is_some_and(|mss| mss > max));
            let wanted = Plan { mss: plan.mss.map(|mss| mss.min(max)), ..plan };
            prop_assert_eq!(bytes, wanted.build());
        }
    }

    /// Whatever passes the door can be handled without a panic.
    fn try_all(mut bytes: Vec<u8>) {
        let Ok(mut parsed) = Parsed::parse(&bytes) else {
            return;
        };
        assert!(parsed.payload() <= parsed.total() && parsed.total() <= bytes.len());
        let (src, dst) = (parsed.src(&bytes), parsed.dst(&bytes));
        for partial in [true, false] {
            parsed.set_src(&mut bytes, dst, partial);
            parsed.set_dst(&mut bytes, src, partial);
            parsed.set_src_port(&mut bytes, 1, partial);
            parsed.set_dst_port(&mut bytes, 2, partial);
            clamp_mss(&mut bytes, &parsed, 1200, 1200, partial);
            let _ = parsed.decrement_ttl(&mut bytes);
        }
        if let Ok(quoted) = Quoted::parse(&bytes, &parsed) {
            let change = Rewrite {
                src: Some(dst),
                dst: Some(src),
                src_port: Some(1),
                dst_port: Some(2),
            };
            quoted.rewrite(&mut bytes, &parsed, &change);
        }
    }

    #[test]
    fn udp_without_checksum_stays_without() {
        let mut bytes = Plan::new(Kind::Udp, "203.0.113.9", "192.0.2.5").build();
        bytes[26..28].fill(0);
        let mut parsed = Parsed::parse(&bytes).unwrap();
        parsed.set_dst(&mut bytes, Ipv4Addr::new(198, 51, 100, 2).into(), false);
        parsed.set_dst_port(&mut bytes, 53, false);
        assert_eq!(bytes[26..28], [0, 0]);
    }

    #[test]
    fn a_udp_sum_of_zero_is_written_as_ones() {
        // Choose the source port so that the sum comes out as zero.
        let mut plan = Plan::new(Kind::Udp, "203.0.113.9", "192.0.2.5");
        plan.src_port = 0;
        let bytes = plan.build();
        let sum = u16::from_be_bytes([bytes[26], bytes[27]]);
        let mut bytes = bytes;
        let mut parsed = Parsed::parse(&bytes).unwrap();
        parsed.set_src_port(&mut bytes, sum, false);
        assert_eq!(bytes[26..28], [0xff, 0xff]);
        assert_sums(&bytes);
    }

    #[test]
    fn bad_packets_are_named() {
        use DropReason::{BadSource, IcmpUnsupported, IpMalformed, L4Malformed};
        let tcp = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = Plan::new(Kind::Tcp, "203.0.113.9", "192.0.2.5").build();
            change(&mut bytes);
            Parsed::parse(&bytes).err()
        };
        assert_eq!(tcp(&|_| ()), None);
        assert_eq!(tcp(&|b| b.extend([0; 6])), None, "padding is cut");
        assert_eq!(tcp(&|b| b.truncate(b.len() - 1)), Some(IpMalformed));
        assert_eq!(tcp(&|b| b[0] = 0x44), Some(IpMalformed));
        assert_eq!(tcp(&|b| b[0] = 0x55), Some(IpMalformed));
        assert_eq!(tcp(&|b| b[3] = 19), Some(IpMalformed));
        assert_eq!(tcp(&|b| b[3] = 39), Some(L4Malformed));
        assert_eq!(tcp(&|b| b[32] = 0x40), Some(L4Malformed));
        assert_eq!(tcp(&|b| b[32] = 0xf0), Some(L4Malformed));
        assert_eq!(tcp(&|b| b.copy_within(16..20, 12)), Some(BadSource));
        for first in [0, 127, 224, 240, 255] {
            assert_eq!(tcp(&|b| b[12] = first), Some(BadSource));
        }
        // A second piece that would cover the flags; a ragged one; one beyond the end.
        assert_eq!(tcp(&|b| b[7] = 1), Some(IpMalformed));
        assert_eq!(tcp(&|b| b[6] = 0x20), None);
        let ragged = |b: &mut Vec<u8>| (b[6], b[3]) = (0x20, b[3] - 1);
        assert_eq!(tcp(&ragged), Some(IpMalformed));
        assert_eq!(tcp(&|b| b[6..8].fill(0x1f)), None);
        assert_eq!(
            tcp(&|b| b[6..8].copy_from_slice(&[0x1f, 0xff])),
            Some(IpMalformed)
        );
        let udp = |len: u8| {
            let mut bytes = Plan::new(Kind::Udp, "203.0.113.9", "192.0.2.5").build();
            bytes[25] = len;
            Parsed::parse(&bytes).err()
        };
        assert_eq!(udp(20), None);
        assert_eq!(udp(8), None, "the surplus of RFC 9868");
        assert_eq!(udp(7), Some(L4Malformed));
        assert_eq!(udp(21), Some(L4Malformed));
        let mut echo = Plan::new(Kind::Request, "203.0.113.9", "192.0.2.5").build();
        echo[20] = 5;
        assert_eq!(Parsed::parse(&echo), Err(IcmpUnsupported), "a redirect");
        for src in ["::1", "::", "ff02::1", "fe80::1", "::ffff:192.0.2.1"] {
            let bytes = Plan::new(Kind::Tcp, src, "2001:db8::5").build();
            assert_eq!(Parsed::parse(&bytes), Err(BadSource), "{src}");
        }
    }

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
            (Kind::Hidden, TCP, 48)
        );
    }

    #[test]
    fn a_full_ipv6_super_packet_passes() {
        let mut plan = Plan::new(Kind::Tcp, "2001:db8::9", "2001:db8::5");
        plan.payload = vec![1; 65_515];
        let bytes = plan.build();
        assert_eq!(Parsed::parse(&bytes).unwrap().total(), 65_575);
    }
}
