//! One packet that has been checked: where its fields lie, and how they are changed.
//!
//! By hand, and not by etherparse, which is the oracle in the tests and builds the ICMP errors. A
//! lane needs 24 bytes of offsets that it can copy, made by looking at the headers once, and
//! setters that mend a checksum in either of its states. etherparse makes headers of its own and
//! sums up anew.

use std::ops::Range;

use crate::model::drops::DropReason;
use crate::model::moved::{TCP, UDP};
use crate::packet::addr::{Addr, Family, V4_MAPPED};
use crate::packet::checksum::{Sum, finish, mend_full, mend_l4_full, replace};
use crate::packet::field::{
    DCCP, ICMP, ICMPV6, UDP_LITE, get, get_u16, get_u32, icmp, ipv4, ipv6, ipv6_fragment, put, tcp,
    udp,
};
use crate::packet::headers::{Chain, Fragment, check_fragment, check_options, fragmented_part};
use crate::packet::kind::{Kind, icmp_kind, icmp_ports};

/// Where things lie in one packet that has been checked.
///
/// It belongs to the bytes that it was made from: the methods that take `bytes` panic on a buffer
/// that is shorter than the headers they touch. They touch headers only, so the head of a
/// super-packet whose payload lies elsewhere will do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Parsed {
    total: u32,
    fragment_id: u32,
    l4: u16,
    payload: u16,
    /// Packets that it stands for.
    packets: u16,
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
    ///   (RFC 7126, RFC 5095), fragments that RFC 1858 and RFC 3128 warn of or that end beyond
    ///   65,535;
    /// * [`DropReason::L4Malformed`]: a transport header that is truncated or contradicts itself;
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

    /// IP protocol number of the upper layer. For a later IPv6 fragment it is the number that its
    /// fragment header names, which may be that of a further extension header.
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

    /// Identification of a fragment, or of an IPv4 packet that is none.
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

    /// How many packets it stands for: 1, unless somebody has said that it is a super-packet.
    #[inline]
    pub fn packets(&self) -> u16 {
        self.packets
    }

    /// It is a super-packet, or the head of one, that stands for so many packets.
    #[inline]
    pub fn set_packets(&mut self, packets: u16) {
        self.packets = packets.max(1);
    }

    /// Bytes of all packets that it stands for, each with its headers.
    #[inline]
    pub fn wire_len(&self) -> usize {
        self.total() + usize::from(self.packets - 1) * self.payload()
    }

    /// Sequence and acknowledgement number of a TCP packet.
    pub(crate) fn tcp_numbers(&self, bytes: &[u8]) -> [u32; 2] {
        [tcp::SEQ, tcp::ACK_NUMBER].map(|at| get_u32(bytes, self.l4() + at))
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

    /// Whether the upper-layer checksum may be left to hardware: that of TCP or UDP, in a packet
    /// that is no fragment. Other protocols have sums of other kinds at the same places (UDP-Lite
    /// covers a part of its packet, RFC 3828), which a kernel would take for finished.
    #[inline]
    pub fn may_be_partial(&self) -> bool {
        self.kind.has_ports() && self.fragment == Fragment::None
    }

    /// Source port, or the identifier of an ICMP query; 0 where there is none.
    #[inline]
    pub fn src_port(&self) -> u16 {
        self.src_port
    }

    /// Destination port, or the identifier of an ICMP reply; 0 where there is none.
    #[inline]
    pub fn dst_port(&self) -> u16 {
        self.dst_port
    }

    /// The TCP flags ([`SYN`](crate::packet::SYN) and its like); 0 for other protocols.
    #[inline]
    pub fn tcp_flags(&self) -> u8 {
        self.tcp_flags
    }

    /// Source address.
    #[inline]
    pub fn src(&self, bytes: &[u8]) -> Addr {
        match self.family {
            Family::V4 => Addr::v4(get(bytes, ipv4::SRC)),
            Family::V6 => Addr(get(bytes, ipv6::SRC)),
        }
    }

    /// Destination address.
    #[inline]
    pub fn dst(&self, bytes: &[u8]) -> Addr {
        match self.family {
            Family::V4 => Addr::v4(get(bytes, ipv4::DST)),
            Family::V6 => Addr(get(bytes, ipv6::DST)),
        }
    }

    /// Replaces the source address by one of the same family, and mends the checksums.
    #[inline]
    pub fn set_src(&self, bytes: &mut [u8], addr: Addr, partial: bool) {
        let at = match self.family {
            Family::V4 => ipv4::SRC,
            Family::V6 => ipv6::SRC,
        };
        self.set_addr(bytes, at, addr, partial);
    }

    /// Replaces the destination address by one of the same family, and mends the checksums.
    #[inline]
    pub fn set_dst(&self, bytes: &mut [u8], addr: Addr, partial: bool) {
        let at = match self.family {
            Family::V4 => ipv4::DST,
            Family::V6 => ipv6::DST,
        };
        self.set_addr(bytes, at, addr, partial);
    }

    /// Replaces the source port, or the identifier of an ICMP query, and mends the checksum. A
    /// packet without one is left alone.
    pub fn set_src_port(&mut self, bytes: &mut [u8], port: u16, partial: bool) {
        let at = match self.kind {
            Kind::Tcp | Kind::Udp => self.l4() + udp::SRC_PORT,
            Kind::IcmpQuery => self.l4() + icmp::ID,
            Kind::IcmpReply | Kind::IcmpError | Kind::Other | Kind::LaterFragment => return,
        };
        self.src_port = port;
        self.set_port(bytes, at, port, partial);
    }

    /// Replaces the destination port, or the identifier of an ICMP reply, and mends the checksum. A
    /// packet without one is left alone.
    pub fn set_dst_port(&mut self, bytes: &mut [u8], port: u16, partial: bool) {
        let at = match self.kind {
            Kind::Tcp | Kind::Udp => self.l4() + udp::DST_PORT,
            Kind::IcmpReply => self.l4() + icmp::ID,
            Kind::IcmpQuery | Kind::IcmpError | Kind::Other | Kind::LaterFragment => return,
        };
        self.dst_port = port;
        self.set_port(bytes, at, port, partial);
    }

    /// Replaces the total length (IP and UDP). Mends the IPv4 header checksum and the length in the
    /// pseudo-header. If the checksum is full, the caller has to mend it for the bytes that came or
    /// went; if it is partial, nothing is left to do.
    ///
    /// `total` has to hold the headers and fit the length fields. Only TCP over IPv4 may be longer:
    /// then the length field becomes zero, as in the kernel's BIG TCP, and the pseudo-header has
    /// the length in full.
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
                let delta = replace(bytes, ipv4::TOTAL_LEN, field.to_be_bytes());
                mend_full(bytes, ipv4::CHECKSUM, delta);
            }
            Family::V6 => {
                let field = (total - ipv6::HEADER_LEN) as u16;
                put(bytes, ipv6::PAYLOAD_LEN, field.to_be_bytes());
            }
        }
        self.total = total as u32;
        let pseudo = if self.has_pseudo_header() {
            Sum::change(old_l4.to_be_bytes(), new_l4.to_be_bytes())
        } else {
            Sum::default()
        };
        let body = if self.kind == Kind::Udp {
            replace(bytes, self.l4() + udp::LEN, (new_l4 as u16).to_be_bytes())
        } else {
            Sum::default()
        };
        self.mend_l4(bytes, pseudo, body, partial);
    }

    /// Replaces the identification in the header of an IPv4 packet. An IPv6 packet is left alone.
    pub(crate) fn set_ipv4_id(&mut self, bytes: &mut [u8], id: u16) {
        if self.family != Family::V4 {
            return;
        }
        let delta = replace(bytes, ipv4::ID, id.to_be_bytes());
        mend_full(bytes, ipv4::CHECKSUM, delta);
        self.fragment_id = id.into();
    }

    /// Sets TCP flags (FIN and PSH) in addition to those that are set. The checksum has to be
    /// partial, for then it does not cover them.
    pub(crate) fn add_tcp_flags(&mut self, bytes: &mut [u8], flags: u8) {
        debug_assert_eq!(self.kind, Kind::Tcp);
        self.tcp_flags |= flags;
        bytes[self.l4() + tcp::FLAGS] = self.tcp_flags;
    }

    /// Which bytes of the whole packet's payload a fragment holds. A packet that is none holds all.
    pub fn fragment_range(&self, bytes: &[u8]) -> Range<usize> {
        let (start, from) = match (self.family, self.fragment) {
            (Family::V4, _) => {
                let word = get_u16(bytes, ipv4::FRAGMENT) & ipv4::FRAGMENT_OFFSET;
                (usize::from(word) * 8, self.l4())
            }
            // The fragment header is the last that was walked.
            (Family::V6, Fragment::Later) => {
                let header = self.l4() - ipv6_fragment::HEADER_LEN;
                let word = get_u16(bytes, header + ipv6_fragment::FRAGMENT);
                let offset = word & ipv6_fragment::FRAGMENT_OFFSET;
                (usize::from(offset), self.l4())
            }
            // More extension headers may follow the fragment header. They are a part of the
            // fragment.
            (Family::V6, Fragment::First) => {
                let from = fragmented_part(bytes, self.l4());
                (0, from.unwrap_or(self.l4()))
            }
            (Family::V6, Fragment::None) => (0, self.l4()),
        };
        start..start + self.total() - from
    }

    /// Whether a router may fragment the packet (RFC 791; in IPv6 only its sender may).
    pub fn may_fragment(&self, bytes: &[u8]) -> bool {
        self.family == Family::V4 && get_u16(bytes, ipv4::FRAGMENT) & ipv4::DONT_FRAGMENT == 0
    }

    /// The ECN field (RFC 3168 section 5).
    #[inline]
    pub fn ecn(&self, bytes: &[u8]) -> u8 {
        match self.family {
            Family::V4 => bytes[ipv4::TRAFFIC_CLASS] & 3,
            Family::V6 => bytes[ipv6::VERSION_CLASS + 1] >> 4 & 3,
        }
    }

    /// Replaces the ECN field, two bits, and mends the IPv4 header checksum.
    pub fn set_ecn(&self, bytes: &mut [u8], ecn: u8) {
        match self.family {
            Family::V4 => {
                let [version, class] = get(bytes, ipv4::VERSION_IHL);
                let delta = replace(bytes, ipv4::VERSION_IHL, [version, class & !3 | ecn]);
                mend_full(bytes, ipv4::CHECKSUM, delta);
            }
            Family::V6 => {
                let byte = &mut bytes[ipv6::VERSION_CLASS + 1];
                *byte = *byte & !0x30 | ecn << 4;
            }
        }
    }

    /// Makes a partial upper-layer checksum full, as hardware does for a kernel that leaves it
    /// partial. `bytes` have to be the whole packet.
    pub fn finish_checksum(&self, bytes: &mut [u8]) {
        let Some(at) = self.csum_at() else { return };
        let sum = Sum::default().add(&bytes[self.l4()..self.total()]);
        put(bytes, at, finish(sum, self.kind == Kind::Udp).to_ne_bytes());
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
            Family::V4 => bytes[ipv4::TTL],
            Family::V6 => bytes[ipv6::HOP_LIMIT],
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
                let protocol = bytes[ipv4::PROTOCOL];
                let delta = replace(bytes, ipv4::TTL, [ttl - 1, protocol]);
                mend_full(bytes, ipv4::CHECKSUM, delta);
            }
            Family::V6 => bytes[ipv6::HOP_LIMIT] = ttl - 1,
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
                mend_full(bytes, ipv4::CHECKSUM, delta);
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
    pub(super) fn mend_l4(&self, bytes: &mut [u8], pseudo: Sum, body: Sum, partial: bool) {
        let Some(at) = self.csum_at() else { return };
        if partial {
            let old = u16::from_ne_bytes(get(bytes, at));
            put(bytes, at, pseudo.and(Sum(old.into())).fold().to_ne_bytes());
        } else {
            mend_l4_full(bytes, at, self.protocol, pseudo.and(body));
        }
    }

    #[inline]
    fn parse_v4(bytes: &[u8]) -> Result<Self, DropReason> {
        let Some(header) = bytes.first_chunk::<{ ipv4::HEADER_LEN }>() else {
            return Err(DropReason::IpMalformed);
        };
        let l4 = ipv4::header_len(header[ipv4::VERSION_IHL]);
        let total = usize::from(get_u16(header, ipv4::TOTAL_LEN));
        if l4 < ipv4::HEADER_LEN || total < l4 || total > bytes.len() {
            return Err(DropReason::IpMalformed);
        }
        let src: [u8; 4] = get(header, ipv4::SRC);
        // 0/8 and 127/8 never leave a host, 224/4 is no one's source, 240/4 is reserved (RFC 6890).
        if matches!(src[0], 0 | 127 | 224..) || src == get::<4>(header, ipv4::DST) {
            return Err(DropReason::BadSource);
        }
        if l4 > ipv4::HEADER_LEN {
            check_options(&bytes[ipv4::HEADER_LEN..l4])?;
        }
        let protocol = header[ipv4::PROTOCOL];
        let word = get_u16(header, ipv4::FRAGMENT);
        let fragment = if word & (ipv4::MORE_FRAGMENTS | ipv4::FRAGMENT_OFFSET) == 0 {
            Fragment::None
        } else {
            let offset = usize::from(word & ipv4::FRAGMENT_OFFSET) * 8;
            let more = word & ipv4::MORE_FRAGMENTS != 0;
            check_fragment(offset, more, total - l4, protocol)?
        };
        Self {
            total: total as u32,
            packets: 1,
            fragment_id: get_u16(header, ipv4::ID).into(),
            l4: l4 as u16,
            payload: l4 as u16,
            csum_at: 0,
            src_port: 0,
            dst_port: 0,
            family: Family::V4,
            protocol,
            kind: Kind::LaterFragment,
            fragment,
            tcp_flags: 0,
        }
        .with_l4(&bytes[..total])
    }

    #[inline]
    fn parse_v6(bytes: &[u8]) -> Result<Self, DropReason> {
        let Some(header) = bytes.first_chunk::<{ ipv6::HEADER_LEN }>() else {
            return Err(DropReason::IpMalformed);
        };
        let total = ipv6::HEADER_LEN + usize::from(get_u16(header, ipv6::PAYLOAD_LEN));
        if total > bytes.len() {
            return Err(DropReason::IpMalformed);
        }
        let (src, dst): ([u8; 16], [u8; 16]) = (get(header, ipv6::SRC), get(header, ipv6::DST));
        if src == dst || is_bad_v6_source(src) {
            return Err(DropReason::BadSource);
        }
        if dst[..12] == V4_MAPPED {
            return Err(DropReason::IpMalformed);
        }
        let chain = Chain::walk(&bytes[..total], ipv6::HEADER_LEN, header[ipv6::NEXT_HEADER])?;
        Self {
            total: total as u32,
            packets: 1,
            fragment_id: chain.fragment_id,
            l4: chain.l4 as u16,
            payload: chain.l4 as u16,
            csum_at: 0,
            src_port: 0,
            dst_port: 0,
            family: Family::V6,
            protocol: chain.protocol,
            kind: Kind::LaterFragment,
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
                let Some(header) = l4.first_chunk::<{ tcp::HEADER_LEN }>() else {
                    return Err(DropReason::L4Malformed);
                };
                let len = header[tcp::DATA_OFFSET] >> 4;
                if len < 5 || usize::from(len) * 4 > l4.len() {
                    return Err(DropReason::L4Malformed);
                }
                self.kind = Kind::Tcp;
                self.tcp_flags = header[tcp::FLAGS];
                self.payload = self.l4 + u16::from(len) * 4;
                self.csum_at = self.l4 + tcp::CHECKSUM as u16;
                self.read_ports(l4);
            }
            (UDP, _) => {
                let Some(header) = l4.first_chunk::<{ udp::HEADER_LEN }>() else {
                    return Err(DropReason::L4Malformed);
                };
                // It may be less than the packet holds: the surplus area of RFC 9868.
                let len = usize::from(get_u16(header, udp::LEN));
                if len < udp::HEADER_LEN || (len > l4.len() && self.fragment == Fragment::None) {
                    return Err(DropReason::L4Malformed);
                }
                self.kind = Kind::Udp;
                self.payload = self.l4 + udp::HEADER_LEN as u16;
                self.csum_at = self.l4 + udp::CHECKSUM as u16;
                self.read_ports(l4);
            }
            (ICMP, Family::V4) | (ICMPV6, Family::V6) => {
                let Some(header) = l4.first_chunk::<{ icmp::HEADER_LEN }>() else {
                    return Err(DropReason::L4Malformed);
                };
                self.kind = icmp_kind(self.family, header[icmp::TYPE])
                    .ok_or(DropReason::IcmpUnsupported)?;
                if self.kind == Kind::IcmpError && self.fragment != Fragment::None {
                    // An error is never larger than what every link carries.
                    return Err(DropReason::L4Malformed);
                }
                self.payload = self.l4 + icmp::HEADER_LEN as u16;
                self.csum_at = self.l4 + icmp::CHECKSUM as u16;
                (self.src_port, self.dst_port) = icmp_ports(self.kind, l4);
            }
            (UDP_LITE | DCCP, _) => {
                if l4.len() < udp::HEADER_LEN {
                    return Err(DropReason::L4Malformed);
                }
                self.kind = Kind::Other;
                self.csum_at = self.l4 + udp::CHECKSUM as u16;
            }
            _ => self.kind = Kind::Other,
        }
        Ok(self)
    }

    #[inline]
    fn read_ports(&mut self, l4: &[u8]) {
        self.src_port = get_u16(l4, udp::SRC_PORT);
        self.dst_port = get_u16(l4, udp::DST_PORT);
    }
}

/// Whether no packet may come from this address: unspecified, loopback, IPv4-mapped, multicast, or
/// link-local, which no router may forward (RFC 4291 section 2.5.6).
#[inline]
fn is_bad_v6_source(src: [u8; 16]) -> bool {
    let first = u16::from_be_bytes([src[0], src[1]]);
    if first != 0 {
        return first >= 0xff00 || first & 0xffc0 == 0xfe80;
    }
    src[..12] == V4_MAPPED || u128::from_be_bytes(src) <= 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::testing::*;
    use crate::packet::{Quoted, Rewrite, clamp_mss};
    use proptest::prelude::*;
    use std::net::{IpAddr, Ipv4Addr};

    proptest! {
        #[test]
        fn setters_make_what_would_have_been_built(
            plan in plans(), (src, dst) in addrs(), ports in any::<[u16; 2]>(),
            partial in any::<bool>(),
        ) {
            let is_icmp = matches!(plan.kind, Kind::IcmpQuery | Kind::IcmpReply);
            let partial = partial && !is_icmp;
            let same_family = src.is_ipv4() == plan.src.is_ipv4();
            let mut wanted = plan.clone();
            wanted.ttl -= 1;
            if same_family {
                (wanted.src, wanted.dst) = (src, dst);
            }
            if plan.kind != Kind::IcmpReply { wanted.src_port = ports[0]; }
            if plan.kind != Kind::IcmpQuery { wanted.dst_port = ports[1]; }
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
            if plan.kind == Kind::IcmpQuery || plan.kind == Kind::IcmpReply { return Ok(()); }
            let mut bytes = plan.build_partial();
            let mut parsed = Parsed::parse(&bytes).unwrap();
            let total = bytes.len() + more;
            parsed.set_total(&mut bytes, total, true);
            bytes.extend(vec![9; more]);
            prop_assert_eq!(&bytes, &longer.build_partial());
            prop_assert_eq!(parsed, Parsed::parse(&bytes).unwrap());
        }

        #[test]
        fn a_finished_partial_sum_is_the_full_one(plan in plans()) {
            if matches!(plan.kind, Kind::IcmpQuery | Kind::IcmpReply) { return Ok(()); }
            let mut bytes = plan.build_partial();
            Parsed::parse(&bytes).unwrap().finish_checksum(&mut bytes);
            prop_assert_eq!(&bytes, &plan.build());
        }

        #[test]
        fn no_bytes_make_parsing_panic(bytes in prop::collection::vec(any::<u8>(), 0..120)) {
            try_all(bytes);
        }

        #[test]
        fn no_damaged_packet_makes_parsing_panic(
            plan in plans(),
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
            len in any::<prop::sample::Index>(), keep in any::<bool>(),
        ) {
            let mut bytes = plan.build();
            for (at, value) in damage {
                let at = at.index(bytes.len().min(80));
                bytes[at] = value;
            }
            if !keep { bytes.truncate(len.index(bytes.len())); }
            try_all(bytes);
        }
    }

    #[test]
    fn only_tcp_and_udp_leave_their_sum_to_hardware() {
        let may = |bytes: &[u8]| Parsed::parse(bytes).unwrap().may_be_partial();
        for (kind, partial) in [
            (Kind::Tcp, true),
            (Kind::Udp, true),
            (Kind::IcmpQuery, false),
        ] {
            for v6 in [false, true] {
                let mut bytes = plan(kind, v6, 64).build();
                assert_eq!(may(&bytes), partial, "{kind:?}");
                for part in fragments(&bytes, 32, 1) {
                    assert!(!may(&part));
                }
                if kind == Kind::Udp && !v6 {
                    // UDP-Lite, then DCCP: known by their numbers alone.
                    for protocol in [136, 33] {
                        bytes[9] = protocol;
                        set_ipv4_checksum(&mut bytes);
                        assert!(!may(&bytes), "{protocol}");
                    }
                }
            }
        }
    }

    /// Whatever parses can be handled without a panic.
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
        parsed.set_ecn(&mut bytes, 3);
        assert_eq!(parsed.ecn(&bytes), 3);
        let range = parsed.fragment_range(&bytes);
        assert!(range.len() <= parsed.total() && parsed.total() - range.len() <= parsed.l4());
        parsed.finish_checksum(&mut bytes);
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
    fn fragments_know_their_place() {
        for (src, dst, header) in [
            ("203.0.113.9", "192.0.2.5", 20),
            ("2001:db8::9", "2001:db8::5", 40),
        ] {
            let whole = Plan::new(Kind::Udp, src, dst).build();
            let range = |bytes: &[u8]| Parsed::parse(bytes).unwrap().fragment_range(bytes);
            let len = whole.len() - header;
            assert_eq!(range(&whole), 0..len);
            let [first, second] = fragments(&whole, 16, 7);
            assert_eq!((range(&first), range(&second)), (0..16, 16..len));
        }
    }

    #[test]
    fn ipv6_fragments_are_placed_behind_their_headers() {
        let plain = Plan {
            // The first fragment of several has whole words of eight bytes.
            payload: vec![7; 16],
            ..Plan::new(Kind::Udp, "2001:db8::9", "2001:db8::5")
        };
        let plain = plain.build();
        let len = plain.len() - 40;
        let with = |first: u8, headers: [u8; 16]| {
            let mut bytes = plain.clone();
            bytes[5] += 16;
            bytes[6] = first;
            bytes.splice(40..40, headers);
            let parsed = Parsed::parse(&bytes).unwrap();
            (parsed.fragment(), parsed.fragment_range(&bytes))
        };
        // Destination options, then the fragment header of a fragment at 1,232.
        let later = [44, 0, 1, 4, 0, 0, 0, 0, 17, 0, 4, 0xd0, 0, 0, 0, 7];
        assert_eq!(with(60, later), (Fragment::Later, 1_232..1_232 + len));
        // Destination options behind the fragment header are a part of the fragment.
        let first = [60, 0, 0, 1, 0, 0, 0, 7, 17, 0, 1, 4, 0, 0, 0, 0];
        assert_eq!(with(44, first), (Fragment::First, 0..8 + len));
        // An atomic fragment is none.
        let atomic = [60, 0, 0, 0, 0, 0, 0, 7, 17, 0, 1, 4, 0, 0, 0, 0];
        assert_eq!(with(44, atomic), (Fragment::None, 0..len));
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
        assert_eq!(tcp(&|b| b.extend([0; 6])), None, "padding is left out");
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
        // A second fragment that would cover the flags; a ragged one; one beyond the end.
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
        let mut echo = Plan::new(Kind::IcmpQuery, "203.0.113.9", "192.0.2.5").build();
        echo[20] = 5;
        assert_eq!(Parsed::parse(&echo), Err(IcmpUnsupported), "a redirect");
        for src in ["::1", "::", "ff02::1", "fe80::1", "::ffff:192.0.2.1"] {
            let bytes = Plan::new(Kind::Tcp, src, "2001:db8::5").build();
            assert_eq!(Parsed::parse(&bytes), Err(BadSource), "{src}");
        }
    }

    #[test]
    fn a_full_ipv6_super_packet_passes() {
        let mut plan = Plan::new(Kind::Tcp, "2001:db8::9", "2001:db8::5");
        plan.payload = vec![1; 65_515];
        let bytes = plan.build();
        assert_eq!(Parsed::parse(&bytes).unwrap().total(), 65_575);
    }
}
