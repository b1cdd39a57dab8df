//! ICMP errors that the daemon sends itself: too big, hop limit used up, and not allowed.
//!
//! Owns which packets an error may be sent about, and what it quotes. The caller limits how often
//! (RFC 1812 section 4.3.2.8, RFC 4443 section 2.4 f), and knows where to send it.

use std::net::IpAddr;

use etherparse::icmpv4::{DestUnreachableHeader, TimeExceededCode as TimeExceededV4};
use etherparse::icmpv6::{DestUnreachableCode, TimeExceededCode as TimeExceededV6};
use etherparse::{Icmpv4Type, Icmpv6Type, PacketBuilder};

use crate::packet::field::{icmp, ipv4, ipv6};
use crate::packet::{Family, Fragment, IPV6_MIN_MTU, Kind, Parsed};

/// Longest ICMP error over IPv4: what every host takes (RFC 1812 section 4.3.2.3).
pub const MAX_V4: usize = 576;
/// Longest ICMP error over IPv6: what every link carries (RFC 4443 section 2.4 c).
pub const MAX_V6: usize = IPV6_MIN_MTU;

/// Hop limit of an error (RFC 1700, as Linux has it).
const HOPS: u8 = 64;
/// IP header without options and ICMP header.
const V4_HEADERS: usize = ipv4::HEADER_LEN + icmp::HEADER_LEN;
/// IPv6 header and ICMPv6 header.
const V6_HEADERS: usize = ipv6::HEADER_LEN + icmp::HEADER_LEN;

/// Writes "fragmentation needed" (RFC 1191) or "packet too big" (RFC 4443) about `packet` to the
/// front of `out`: from `from`, to the packet's sender, who may send `mtu` bytes.
///
/// Returns the error's length, or `None` where none may be sent (RFC 1122 section 3.2.2): about an
/// ICMP error, a later fragment, a packet to many; or if `from` is of the other family or `out`
/// shorter than [`MAX_V4`] or [`MAX_V6`].
pub fn too_big(
    out: &mut [u8],
    packet: &[u8],
    parsed: &Parsed,
    from: IpAddr,
    mtu: u32,
) -> Option<usize> {
    let v4 = Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::FragmentationNeeded {
        next_hop_mtu: u16::try_from(mtu).unwrap_or(u16::MAX),
    });
    error(
        out,
        packet,
        parsed,
        from,
        v4,
        Icmpv6Type::PacketTooBig { mtu },
    )
}

/// Writes "time exceeded in transit" about `packet`; for the rest see [`too_big`].
pub fn time_exceeded(
    out: &mut [u8],
    packet: &[u8],
    parsed: &Parsed,
    from: IpAddr,
) -> Option<usize> {
    let v4 = Icmpv4Type::TimeExceeded(TimeExceededV4::TtlExceededInTransit);
    let v6 = Icmpv6Type::TimeExceeded(TimeExceededV6::HopLimitExceeded);
    error(out, packet, parsed, from, v4, v6)
}

/// Writes "communication administratively prohibited" (RFC 1812 section 5.2.7.1, RFC 4443 section
/// 3.1) about `packet`, which its sender hears of at once; for the rest see [`too_big`].
pub fn prohibited(out: &mut [u8], packet: &[u8], parsed: &Parsed, from: IpAddr) -> Option<usize> {
    let v4 = DestUnreachableHeader::FilterProhibited;
    let v6 = DestUnreachableCode::Prohibited;
    error(
        out,
        packet,
        parsed,
        from,
        Icmpv4Type::DestinationUnreachable(v4),
        Icmpv6Type::DestinationUnreachable(v6),
    )
}

fn error(
    out: &mut [u8],
    packet: &[u8],
    parsed: &Parsed,
    from: IpAddr,
    v4: Icmpv4Type,
    v6: Icmpv6Type,
) -> Option<usize> {
    if !may_report(packet, parsed) {
        return None;
    }
    let packet = &packet[..parsed.total().min(packet.len())];
    let to = IpAddr::from(parsed.src(packet));
    let space = out.len();
    let mut rest = out;
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) if space >= MAX_V4 => {
            let quote = &packet[..packet.len().min(MAX_V4 - V4_HEADERS)];
            PacketBuilder::ipv4(from.octets(), to.octets(), HOPS)
                .icmpv4(v4)
                .write(&mut rest, quote)
                .ok()?;
        }
        (IpAddr::V6(from), IpAddr::V6(to)) if space >= MAX_V6 => {
            let quote = &packet[..packet.len().min(MAX_V6 - V6_HEADERS)];
            PacketBuilder::ipv6(from.octets(), to.octets(), HOPS)
                .icmpv6(v6)
                .write(&mut rest, quote)
                .ok()?;
        }
        _ => return None,
    }
    Some(space - rest.len())
}

/// Whether an error may be sent about a packet. That its source is a single host is sure:
/// [`Parsed::parse`] lets no other pass.
fn may_report(packet: &[u8], parsed: &Parsed) -> bool {
    let to_many = match (parsed.family(), IpAddr::from(parsed.dst(packet))) {
        (Family::V4, IpAddr::V4(dst)) => dst.is_multicast() || dst.is_broadcast(),
        (_, dst) => dst.is_multicast(),
    };
    !to_many && parsed.kind() != Kind::IcmpError && parsed.fragment() != Fragment::Later
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::Quoted;
    use crate::packet::testing::checksum;

    fn udp_v4(dst: [u8; 4], payload: usize) -> Vec<u8> {
        let mut out = Vec::new();
        PacketBuilder::ipv4([203, 0, 113, 9], dst, 7)
            .udp(4000, 53)
            .write(&mut out, &vec![7; payload])
            .unwrap();
        out
    }

    #[test]
    fn too_big_says_how_much_and_quotes_the_packet() {
        let packet = udp_v4([192, 0, 2, 5], 1400);
        let parsed = Parsed::parse(&packet).unwrap();
        let mut out = [0; MAX_V6];
        let from = "192.0.2.5".parse().unwrap();
        let len = too_big(&mut out, &packet, &parsed, from, 1300).unwrap();
        assert_eq!(len, MAX_V4);
        let error = Parsed::parse(&out[..len]).unwrap();
        assert_eq!(error.kind(), Kind::IcmpError);
        assert_eq!(
            IpAddr::from(error.dst(&out)),
            IpAddr::from([203, 0, 113, 9])
        );
        assert_eq!(out[20..22], [3, 4]);
        assert_eq!(u16::from_be_bytes([out[26], out[27]]), 1300);
        assert_eq!(out[28..MAX_V4], packet[..MAX_V4 - 28]);
        let quoted = Quoted::parse(&out, &error).unwrap();
        assert_eq!((quoted.src_port(), quoted.dst_port()), (4000, 53));
        assert_eq!(checksum(&out[20..len]), [0, 0]);
    }

    #[test]
    fn time_exceeded_over_ipv6() {
        let mut packet = Vec::new();
        let (src, dst) = ([0x20; 16], [0x21; 16]);
        PacketBuilder::ipv6(src, dst, 1)
            .icmpv6_echo_request(7, 1)
            .write(&mut packet, &[1; 2000])
            .unwrap();
        let parsed = Parsed::parse(&packet).unwrap();
        let mut out = [0; MAX_V6];
        let len = time_exceeded(&mut out, &packet, &parsed, dst.into()).unwrap();
        assert_eq!(len, MAX_V6);
        let headers = etherparse::PacketHeaders::from_ip_slice(&out[..len]).unwrap();
        let icmp = headers.transport.unwrap().icmpv6().unwrap();
        assert_eq!(icmp.icmp_type.type_u8(), 3);
        let sum = icmp
            .icmp_type
            .calc_checksum(dst, src, &packet[..MAX_V6 - 48]);
        assert_eq!(icmp.checksum, sum.unwrap());
        // No error goes to the other family, and none is about an error.
        let v4 = "192.0.2.5".parse().unwrap();
        assert_eq!(time_exceeded(&mut [0; MAX_V6], &packet, &parsed, v4), None);
        let about = Parsed::parse(&out).unwrap();
        assert_eq!(
            time_exceeded(&mut [0; MAX_V6], &out, &about, src.into()),
            None
        );
    }

    #[test]
    fn no_error_is_sent_about_what_may_have_none() {
        let from = "192.0.2.5".parse().unwrap();
        let mut out = [0; MAX_V4];
        for dst in [[224, 0, 0, 1], [255, 255, 255, 255]] {
            let packet = udp_v4(dst, 10);
            let parsed = Parsed::parse(&packet).unwrap();
            assert_eq!(too_big(&mut out, &packet, &parsed, from, 1300), None);
        }
        let mut packet = udp_v4([192, 0, 2, 5], 10);
        packet[7] = 100;
        let parsed = Parsed::parse(&packet).unwrap();
        assert_eq!(time_exceeded(&mut out, &packet, &parsed, from), None);
        let whole = udp_v4([192, 0, 2, 5], 10);
        let parsed = Parsed::parse(&whole).unwrap();
        assert_eq!(too_big(&mut [0; 100], &whole, &parsed, from, 1300), None);
    }
}
