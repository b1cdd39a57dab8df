//! Packets for tests, and etherparse as the oracle of their checksums.

use std::net::IpAddr;

use etherparse::checksum::Sum16BitWords;
use etherparse::{NetHeaders, PacketBuilder, PacketHeaders, TransportHeader};
use proptest::prelude::*;

use crate::packet::field::{ACK, CWR, FIN, ICMPV6, PSH, RST, SYN, put};
use crate::packet::segment::Segments;
use crate::packet::vnet::{GSO_ECN, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, Offload, VnetHdr};
use crate::packet::{Family, Kind, Parsed, icmp};

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
            src_port: if kind == Kind::IcmpReply { 0 } else { 40_000 },
            dst_port: if kind == Kind::IcmpQuery { 0 } else { 80 },
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
            Kind::IcmpQuery if v4 => ip
                .icmpv4_echo_request(self.src_port, 3)
                .write(&mut out, &self.payload),
            Kind::IcmpReply if v4 => ip
                .icmpv4_echo_reply(self.dst_port, 3)
                .write(&mut out, &self.payload),
            Kind::IcmpQuery => ip
                .icmpv6_echo_request(self.src_port, 3)
                .write(&mut out, &self.payload),
            Kind::IcmpReply => ip
                .icmpv6_echo_reply(self.dst_port, 3)
                .write(&mut out, &self.payload),
            Kind::IcmpError | Kind::Other | Kind::LaterFragment => panic!("not built here"),
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

/// Puts the sum of the pseudo-header in place of the checksum, as a kernel does that leaves the
/// rest to hardware.
pub(crate) fn make_partial(packet: &mut [u8]) {
    let parsed = Parsed::parse(packet).unwrap();
    let len = (parsed.total() - parsed.l4()) as u32;
    let sum = pseudo_header(packet, parsed.protocol(), len);
    put(packet, parsed.csum_at().unwrap(), sum);
}

/// The sum of a packet's pseudo-header, as a partial checksum has it.
pub(crate) fn pseudo_header(packet: &[u8], protocol: u8, len: u32) -> [u8; 2] {
    let addrs = if packet[0] >> 4 == 4 { 12..20 } else { 8..40 };
    let mut sum = Sum16BitWords::new()
        .add_slice(&packet[addrs])
        .add_2bytes([0, protocol]);
    (!sum.add_4bytes(len.to_be_bytes()).ones_complement()).to_ne_bytes()
}

/// Does what hardware would do for a partial checksum.
pub(crate) fn complete(packet: &mut [u8]) {
    let parsed = Parsed::parse(packet).unwrap();
    let sum = match checksum(&packet[parsed.l4()..]) {
        [0, 0] if parsed.kind() == Kind::Udp => [0xff, 0xff],
        sum => sum,
    };
    put(packet, parsed.csum_at().unwrap(), sum);
}

/// The checksum of `bytes` by etherparse, as it is stored; zero if they contain it already.
pub(crate) fn checksum(bytes: &[u8]) -> [u8; 2] {
    Sum16BitWords::new()
        .add_slice(bytes)
        .ones_complement()
        .to_ne_bytes()
}

/// Makes the checksum of an IPv4 header without options right.
pub(crate) fn set_ipv4_checksum(packet: &mut [u8]) {
    packet[10..12].fill(0);
    let sum = checksum(&packet[..20]);
    packet[10..12].copy_from_slice(&sum);
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
        Just(Kind::IcmpQuery),
        Just(Kind::IcmpReply)
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
            src_port: if kind == Kind::IcmpReply { 0 } else { ports[0] },
            dst_port: if kind == Kind::IcmpQuery { 0 } else { ports[1] },
            kind,
            flags: if mss.is_some() { SYN } else { ACK },
            seq,
            mss,
            payload,
        })
}

const V4: (&str, &str) = ("203.0.113.9", "192.0.2.5");
const V6: (&str, &str) = ("2001:db8::9", "2001:db8::5");

/// A packet with `payload` bytes of which no two runs are alike.
pub(crate) fn plan(kind: Kind, v6: bool, payload: usize) -> Plan {
    let (src, dst) = if v6 { V6 } else { V4 };
    let payload = (0..payload).map(|at| (at * 7 + at / 251) as u8).collect();
    Plan {
        payload,
        ..Plan::new(kind, src, dst)
    }
}

/// The virtio header by which `parsed` is a super-packet of segments of `size` bytes.
pub(crate) fn vnet(parsed: &Parsed, size: u16, partial: bool) -> VnetHdr {
    let gso_type = match (parsed.kind(), parsed.family()) {
        (Kind::Udp, _) => GSO_UDP_L4,
        (_, Family::V4) => GSO_TCPV4,
        (_, Family::V6) => GSO_TCPV6,
    };
    let ecn = if parsed.tcp_flags() & CWR != 0 {
        GSO_ECN
    } else {
        0
    };
    VnetHdr {
        gso_type: gso_type | ecn,
        gso_size: size,
        hdr_len: parsed.payload() as u16,
        ..VnetHdr::single(parsed, partial)
    }
}

/// All segments of a packet, and whether their checksums are partial.
pub(crate) fn segments(packet: &mut [u8], vnet: &VnetHdr, max: usize) -> Vec<(Vec<u8>, bool)> {
    let parsed = Parsed::parse(packet).unwrap();
    let offload = Offload::accept(vnet, packet, &parsed).unwrap();
    let mut left = Segments::new(offload, packet, &parsed, max);
    let mut out = vec![0; 70_000];
    let mut all = Vec::new();
    while let Some(len) = left.next_len() {
        let segment = left.next_into(&mut out[..len]).unwrap();
        all.push((out[..segment.len].to_vec(), segment.csum_partial));
    }
    assert_eq!(left.remaining(), 0);
    all
}

/// What a host replies to `plan`.
pub(crate) fn reply(plan: &Plan) -> Plan {
    Plan {
        src: plan.dst,
        dst: plan.src,
        src_port: plan.dst_port,
        dst_port: plan.src_port,
        kind: if plan.kind == Kind::IcmpQuery {
            Kind::IcmpReply
        } else {
            plan.kind
        },
        flags: SYN | ACK,
        ..plan.clone()
    }
}

/// An IP packet in two fragments, the second from `at` (a multiple of 8) of the payload.
pub(crate) fn fragments(packet: &[u8], at: usize, id: u8) -> [Vec<u8>; 2] {
    if packet[0] >> 4 == 4 {
        let fragment = |range: std::ops::Range<usize>, more: bool| {
            let mut out = packet[..20].to_vec();
            out.extend(&packet[20..][range.clone()]);
            let len = out.len() as u16;
            out[2..4].copy_from_slice(&len.to_be_bytes());
            out[5] = id;
            let field = (range.start / 8) as u16 | if more { 0x2000 } else { 0 };
            out[6..8].copy_from_slice(&field.to_be_bytes());
            set_ipv4_checksum(&mut out);
            out
        };
        return [
            fragment(0..at, true),
            fragment(at..packet.len() - 20, false),
        ];
    }
    let fragment = |range: std::ops::Range<usize>, more: bool| {
        let mut out = packet[..40].to_vec();
        let field = range.start as u16 | u16::from(more);
        let [high, low] = field.to_be_bytes();
        out.extend([packet[6], 0, high, low, 0, 0, 0, id]);
        out[6] = 44;
        out.extend(&packet[40..][range]);
        let len = (out.len() - 40) as u16;
        out[4..6].copy_from_slice(&len.to_be_bytes());
        out
    };
    [
        fragment(0..at, true),
        fragment(at..packet.len() - 40, false),
    ]
}

/// An ICMP error from `from` that quotes the first `len` bytes of `about`.
pub(crate) fn too_big(about: &[u8], len: usize, from: IpAddr) -> Vec<u8> {
    let parsed = Parsed::parse(about).unwrap();
    let mut out = [0; icmp::MAX_V6];
    let all = icmp::too_big(&mut out, about, &parsed, from, 1300).unwrap();
    let missing = about.len() - len;
    let mut out = out[..all - missing].to_vec();
    let head = if from.is_ipv4() { 20 } else { 40 };
    // Truncate the quotation and set lengths and checksums anew.
    if from.is_ipv4() {
        out[2..4].copy_from_slice(&((all - missing) as u16).to_be_bytes());
        set_ipv4_checksum(&mut out);
    } else {
        out[4..6].copy_from_slice(&((all - missing - 40) as u16).to_be_bytes());
    }
    let pseudo = if from.is_ipv4() {
        [0, 0]
    } else {
        pseudo_header(&out, ICMPV6, (out.len() - head) as u32)
    };
    out[head + 2..head + 4].copy_from_slice(&pseudo);
    let sum = checksum(&out[head..]);
    out[head + 2..head + 4].copy_from_slice(&sum);
    out
}
