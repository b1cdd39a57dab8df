//! Captures packets to moved addresses: for the ingress of the old server's uplink.
//!
//! * A whole move takes every packet to the address, except neighbour discovery and multicast
//!   listener discovery. Those stay with the kernel that holds the address.
//! * A move of ports takes TCP and UDP packets by destination port, ICMP errors that quote a packet
//!   from such a port, and every fragment of the transports concerned, since only the first one
//!   shows its port.
//! * Where the new server may begin connections from other ports than have moved, their answers are
//!   taken as well, exactly, and every fragment.
//! * A packet that the daemon has bounced ([`return_path`](super::return_path())) passes.
//! * It takes only packets for this host that belong to no VLAN (a tag that has a priority only
//!   does not count), and never a UDP datagram to one of the tunnel's own ends, nor an ICMP error
//!   about one from there.
//!
//! What has moved, and which moved addresses have such an end, [`Facts`] say at any time.
//!
//! ```text
//! pass_bounced();
//! if (skb->pkt_type != PACKET_HOST || skb->vlan_tci & 0xfff) pass;
//! if (IPv4) {
//!     rights = facts.rights(ip.daddr) or pass;
//!     if (rights == WHOLE) take;
//!     if (fragment) goto fragment;
//!     if (TCP or UDP) port = destination;
//!     else if (ICMP error && quoted.saddr == ip.daddr && quoted is TCP or UDP and shows its ports)
//!         port = quoted source, protocol = quoted protocol;
//!     else goto other;
//!     goto port;
//! } else if (IPv6) {
//!     the same, past extension headers; and the link's own ICMPv6 passes, by address too
//! } else pass;
//!
//! other:     if (rights & WHOLE) take; else not;
//! fragment:  if (rights & (WHOLE | BEGINS) || rights has ports of protocol) take; else pass;
//! port:      if (UDP && port == tunnel.port && rights & TUNNEL_END) pass;
//!            if (rights & WHOLE || port in the set of the protocol) take; else not;
//!
//! not:       if (rights & BEGINS && the new server has begun it) goto begun;   // see `begun`
//!            pass;
//! take:      if (it is this host's own) pass;                  // see `stays`
//! begun:     skb_vlan_pop(); return redirect(tun, 0);
//! pass:      return TC_ACT_UNSPEC;
//! ```

use Reg::{R0, R9, R10};

use super::begun::pass_unless_begun;
use super::facts::Facts;
use super::headers::{fragment, icmp, icmpv4, icmpv6, ipv4, ipv6, ports};
use super::moved::Family;
use super::phrases::{
    DESTINATION_KEPT, Expected, PROTOCOL, TC_ACT_UNSPEC, TRANSPORT, branch_by_family,
    jump_if_it_has_ports, jump_if_link_scoped_icmpv6, jump_unless_icmpv6_error, keep_packet,
    load_ipv4_header_end, pass_bounced, pass_unless_for_this_host, quoted_flow_v4, quoted_flow_v6,
    take, verdict, walk_extension_headers,
};
use super::rights::Rights;
use super::stays::leave_own;
use crate::kernel::bpf::{Assembler, BpfError, If, Label, Program, Reg, Size};
use crate::model::moved::{TCP, UDP};

/// The program's name.
pub const CAPTURE: &str = "ipmoved_capture";

/// What has moved of the destination: [`Rights`].
const RIGHTS: Reg = R9;

/// The port that decides, once the program has read the transport header.
const PORT: Reg = TRANSPORT;

/// The program for what has moved by these facts, which leads into the TUN. Datagrams to
/// `tunnel_port` at the tunnel's own ends are left out.
///
/// # Errors
/// If the program is too large.
pub fn capture(
    facts: &Facts,
    l2_header: u32,
    tun_ifindex: u32,
    tunnel_port: Option<u16>,
) -> Result<Program, BpfError> {
    let mut asm = Assembler::arriving(l2_header);
    let a = &mut asm;
    let v6 = a.label();
    let ways = Ways {
        pass: a.label(),
        take: a.label(),
        port: a.label(),
        fragment: a.label(),
        other: a.label(),
    };
    keep_packet(a);
    pass_bounced(a);
    pass_unless_for_this_host(a, ways.pass);
    branch_by_family(a, v6, ways.pass);
    read_ipv4(a, &facts.rights, l2_header, ways);
    a.bind(v6);
    read_ipv6(a, &facts.rights, l2_header, ways);

    let begun = a.label();
    let not_moved = facts.begun.as_ref().map_or(ways.pass, |_| a.label());
    a.bind(ways.other);
    Rights::jump_if_whole(a, RIGHTS, ways.take);
    a.jump(not_moved);
    a.bind(ways.fragment);
    Rights::decide_by_protocol(a, RIGHTS, ways.take, ways.pass);
    a.bind(ways.port);
    let exits = (ways.take, not_moved, ways.pass);
    (facts.rights).decide_by_port(a, RIGHTS, PORT, tunnel_port, exits);
    if facts.begun.is_some() {
        a.bind(not_moved);
        Rights::jump_unless_it_begins(a, RIGHTS, ways.pass);
        pass_unless_begun(a, l2_header, &facts.own, ways.pass);
        a.jump(begun);
    }

    a.bind(ways.take);
    leave_own(a, l2_header, facts);
    a.bind(begun);
    take(a, tun_ifindex);
    a.bind(ways.pass);
    verdict(a, TC_ACT_UNSPEC);
    asm.finish(CAPTURE)
}

/// The exits of the part that reads addresses and headers. RIGHTS are known in all but the first
/// two.
#[derive(Clone, Copy)]
struct Ways {
    pass: Label,
    take: Label,
    /// PORT is a port of TCP or UDP at the moved address, and PROTOCOL says which.
    port: Label,
    /// It is a fragment of PROTOCOL.
    fragment: Label,
    /// It is a packet without ports.
    other: Label,
}

fn read_ipv4(a: &mut Assembler, rights: &Rights, l2: u32, ways: Ways) {
    let [.., kept] = DESTINATION_KEPT;
    keep_destination(a, l2 + ipv4::DESTINATION, &[kept]);
    rights.load(a, (Family::V4, kept), RIGHTS, ways.pass);
    Rights::jump_if_by_address(a, RIGHTS, ways.take);

    load_ipv4_header_end(a, l2, ways.pass);
    a.load_packet(Size::B, l2 + ipv4::PROTOCOL);
    a.mov(PROTOCOL, R0);
    a.load_packet(Size::H, l2 + ipv4::FLAGS_AND_OFFSET);
    a.jump_if(R0, If::Set, ipv4::FRAGMENTED, ways.fragment);
    let (error, destination_port) = (a.label(), a.label());
    jump_if_it_has_ports(a, destination_port);
    a.jump_if(PROTOCOL, If::Ne, i32::from(icmpv4::PROTOCOL), ways.other);
    a.load_packet_at(Size::B, TRANSPORT, icmp::TYPE);
    for kind in icmpv4::ERRORS {
        a.jump_if(R0, If::Eq, kind, error);
    }
    a.jump(ways.other);

    // The source of the quoted packet is the moved address.
    a.bind(error);
    turn_destination(a, &[kept]);
    let sender = (ipv4::SOURCE, Expected::Kept(&[kept]));
    let quoted = quoted_flow_v4(a, &[sender], ways.other);
    go_by_port_of_quoted(a, quoted, ways);
    a.bind(destination_port);
    go_by_destination_port(a, ways);
}

fn read_ipv6(a: &mut Assembler, rights: &Rights, l2: u32, ways: Ways) {
    let (by_address, icmp) = (a.label(), a.label());
    let [kept, ..] = DESTINATION_KEPT;
    keep_destination(a, l2 + ipv6::DESTINATION, &DESTINATION_KEPT);
    rights.load(a, (Family::V6, kept), RIGHTS, ways.pass);
    Rights::jump_if_by_address(a, RIGHTS, by_address);

    let (fragmented, destination_port) = (a.label(), a.label());
    walk_extension_headers(a, l2, fragmented);
    jump_if_it_has_ports(a, destination_port);
    a.jump_if(PROTOCOL, If::Eq, i32::from(icmpv6::PROTOCOL), icmp);
    a.jump(ways.other);
    a.bind(fragmented);
    a.load_packet_at(Size::B, TRANSPORT, fragment::NEXT_HEADER);
    a.mov(PROTOCOL, R0);
    a.jump(ways.fragment);

    a.bind(icmp);
    a.load_packet_at(Size::B, TRANSPORT, icmp::TYPE);
    jump_if_link_scoped_icmpv6(a, ways.pass);
    jump_unless_icmpv6_error(a, ways.other);
    turn_destination(a, &DESTINATION_KEPT);
    let sender = (ipv6::SOURCE, Expected::Kept(&DESTINATION_KEPT));
    let quoted = quoted_flow_v6(a, &[sender], ways.other);
    go_by_port_of_quoted(a, quoted, ways);
    a.bind(destination_port);
    go_by_destination_port(a, ways);

    // The program does not walk extension headers here: the link's own messages have none that it
    // could skip.
    a.bind(by_address);
    a.load_packet(Size::B, l2 + ipv6::NEXT_HEADER);
    a.jump_if(R0, If::Ne, i32::from(icmpv6::PROTOCOL), ways.take);
    a.load_packet(Size::B, l2 + ipv6::LEN + icmp::TYPE);
    jump_if_link_scoped_icmpv6(a, ways.pass);
    a.jump(ways.take);
}

/// Keeps the destination on the stack, in bytes as on the wire.
fn keep_destination(a: &mut Assembler, at: u32, slots: &[i16]) {
    for (word, &slot) in (0..).zip(slots) {
        a.load_packet(Size::W, at + 4 * word);
        a.swap_if_little_endian(R0);
        a.store(Size::W, R10, slot, R0);
    }
}

/// From bytes as on the wire to words as packet loads give them.
fn turn_destination(a: &mut Assembler, slots: &[i16]) {
    for &slot in slots {
        a.load(Size::W, R0, R10, slot);
        a.swap_if_little_endian(R0);
        a.store(Size::W, R10, slot, R0);
    }
}

/// PORT = the source port of a quoted packet whose transport header is `at` behind TRANSPORT.
fn go_by_port_of_quoted(a: &mut Assembler, at: u32, ways: Ways) {
    let has_ports = a.label();
    a.jump_if(PROTOCOL, If::Eq, i32::from(TCP), has_ports);
    a.jump_if(PROTOCOL, If::Ne, i32::from(UDP), ways.other);
    a.bind(has_ports);
    a.load_packet_at(Size::H, TRANSPORT, at + ports::SOURCE);
    a.mov(PORT, R0);
    a.jump(ways.port);
}

fn go_by_destination_port(a: &mut Assembler, ways: Ways) {
    a.load_packet_at(Size::H, TRANSPORT, ports::DESTINATION);
    a.mov(PORT, R0);
    a.jump(ways.port);
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, SocketAddr};
    use std::os::fd::AsFd;

    use proptest::prelude::*;

    use super::*;
    use crate::kernel::bpf::test_run::{nanoseconds, run};
    use crate::kernel::programs::return_path;
    use crate::kernel::programs::testing::{
        L2, Packet, TC_ACT_REDIRECT, frame, moves, ports, taken,
    };
    use crate::kernel::testing::{capabilities_of_the_unit, in_fresh_namespace, keep_only};
    use crate::model::moved::{MAX_MOVES, MAX_PORT_SETS, Move, Transport};
    use crate::model::prefix::Prefix;
    use crate::packet::MAX_EXTENSION_HEADERS;

    /// The right decision of the capture program, from [`Move::takes`].
    fn should_take(moves: &[Move], tunnel: Option<SocketAddr>, packet: &Packet) -> bool {
        let of_tunnel = |port: u16, protocol: u8| {
            tunnel
                .is_some_and(|end| end.ip() == packet.dst && end.port() == port && protocol == UDP)
        };
        let icmp_type = packet.payload.first().copied().unwrap_or(0);
        let first = packet
            .fragment
            .is_none_or(|(_, offset, more)| offset == 0 && !more);
        let icmp6 = packet.protocol == icmpv6::PROTOCOL && packet.dst.is_ipv6();
        // Where the address alone decides, the program does not walk extension headers: none of the
        // link's own messages to a unicast address has any.
        let bare = packet.options == 0 && packet.fragment.is_none();
        let walked = tunnel.is_some_and(|end| end.ip() == packet.dst);
        if icmp6 && (bare || first && walked) && matches!(icmp_type, 130..=137 | 143) {
            return false;
        }
        let word = |at: usize| u16::from_be_bytes([packet.payload[at], packet.payload[at + 1]]);
        let port = (first && [TCP, UDP].contains(&packet.protocol)).then(|| word(2));
        if port.is_some_and(|port| of_tunnel(port, packet.protocol)) {
            return false;
        }
        moves
            .iter()
            .filter(|moved| moved.prefix.contains(packet.dst))
            .any(|moved| {
                moved.takes(packet.protocol, port)
                    || !first && (1..=u16::MAX).any(|port| moved.takes(packet.protocol, Some(port)))
            })
    }

    fn packets() -> impl Strategy<Value = Packet> {
        let host = prop::sample::select(vec![1_u8, 5, 6, 7, 8]);
        let protocol =
            prop::sample::select(vec![TCP, UDP, icmpv4::PROTOCOL, icmpv6::PROTOCOL, 47, 132]);
        let port = prop_oneof![
            prop::sample::select(vec![
                22_u16, 53, 79, 80, 81, 443, 8000, 8100, 8101, 51820, 65535
            ]),
            any::<u16>()
        ];
        let fragment = prop::option::weighted(0.3, (any::<u16>(), 0_u16..100, any::<bool>()));
        (
            any::<bool>(),
            host,
            protocol,
            port,
            0_u8..4,
            fragment,
            any::<u8>(),
        )
            .prop_map(|(v6, host, protocol, port, options, fragment, kind)| {
                let (src, dst) = if v6 {
                    ("2001:db8::99".into(), format!("2001:db8::{host}"))
                } else {
                    ("203.0.113.7".to_owned(), format!("192.0.2.{host}"))
                };
                let mut payload = ports(1234, port);
                if [icmpv4::PROTOCOL, icmpv6::PROTOCOL].contains(&protocol) {
                    // Errors need a quoted packet; they have a test of their own.
                    let errors = if protocol == icmpv4::PROTOCOL {
                        &[3, 11, 12][..]
                    } else {
                        &[1, 2, 3, 4]
                    };
                    payload[0] = if errors.contains(&kind) { 128 } else { kind };
                }
                Packet {
                    options,
                    fragment,
                    ..Packet::new(&src, &dst, protocol, payload)
                }
            })
    }

    #[test]
    fn capture_takes_moved_packets_and_nothing_else() {
        let moves = moves(&[
            "192.0.2.5",
            "192.0.2.6:80,443,8000-8100/tcp",
            "192.0.2.6:53/udp",
            "192.0.2.7/udp",
            "192.0.2.8",
            "2001:db8::5",
            "[2001:db8::6]:80,443,8000-8100",
            "2001:db8::7/tcp",
            "2001:db8::8",
            "192.0.2.0/30:22,443/tcp",
            "192.0.2.4/30:1-52/udp",
            "[2001:db8::/126]:22,443/udp",
            "[2001:db8::/64]:8101/tcp",
        ]);
        for tunnel in [
            None,
            Some("192.0.2.8:51820"),
            Some("192.0.2.1:443"),
            Some("[2001:db8::8]:443"),
        ] {
            let tunnel: Option<SocketAddr> = tunnel.map(|end| end.parse().unwrap());
            let facts = Facts::new(&moves).unwrap();
            let end = tunnel.map(|end| end.ip());
            facts.set_tunnel_ends(end.into_iter()).unwrap();
            let port = tunnel.map(|end| end.port());
            let program = capture(&facts, L2, 1, port).unwrap();
            let program = program.load().expect("run the tests as root");
            proptest!(|(packet in packets())| {
                let expected = should_take(&moves, tunnel, &packet);
                prop_assert_eq!(taken(program.as_fd(), &packet), expected, "{:?}", packet);
            });
        }
    }

    #[test]
    fn icmp_errors_go_where_their_flow_lives() {
        let moves = moves(&["192.0.2.6:80/tcp", "[2001:db8::6]:80/tcp", "192.0.2.8"]);
        let facts = Facts::new(&moves).unwrap();
        let end = "192.0.2.8".parse().unwrap();
        facts.set_tunnel_ends(std::iter::once(end)).unwrap();
        let program = capture(&facts, L2, 1, Some(51820)).unwrap();
        let program = program.load().unwrap();
        for (router, client, moved) in [
            ("198.51.100.1", "203.0.113.7", "192.0.2.6"),
            ("2001:db8:1::1", "2001:db8:2::1", "2001:db8::6"),
        ] {
            for (protocol, source, options, expected) in [
                (TCP, 80, 0, true),
                (TCP, 81, 0, false),
                (UDP, 80, 0, false),
                (47, 80, 0, false),
                (TCP, 80, 2, moved.contains('.')),
            ] {
                let mut quoted = Packet::new(moved, client, protocol, ports(source, 999));
                quoted.options = options;
                let error = Packet::icmp_error(router, &quoted);
                assert_eq!(taken(program.as_fd(), &error), expected, "{error:?}");
            }
            let mut quoted = Packet::new(moved, client, TCP, ports(80, 999));
            quoted.fragment = Some((1, 0, true));
            assert!(taken(program.as_fd(), &Packet::icmp_error(router, &quoted)));
            quoted.fragment = Some((1, 8, true));
            assert!(!taken(
                program.as_fd(),
                &Packet::icmp_error(router, &quoted)
            ));
            // An error that quotes somebody else's packet.
            let mut error =
                Packet::icmp_error(router, &Packet::new(client, moved, TCP, ports(80, 9)));
            error.dst = moved.parse().unwrap();
            assert!(!taken(program.as_fd(), &error));
        }
        // An error for the path MTU of the tunnel itself, which ends at an address that moved
        // whole.
        let own = Packet::new("192.0.2.8", "198.51.100.2", UDP, ports(51820, 51820));
        assert!(!taken(
            program.as_fd(),
            &Packet::icmp_error("198.51.100.1", &own)
        ));
        let other = Packet::new("192.0.2.8", "198.51.100.2", UDP, ports(53, 51820));
        assert!(taken(
            program.as_fd(),
            &Packet::icmp_error("198.51.100.1", &other)
        ));
        // The address is no longer this host's, and its port is the clients' again.
        let datagram = Packet::new("203.0.113.7", "192.0.2.8", UDP, ports(1, 51820));
        assert!(!taken(program.as_fd(), &datagram));
        facts.set_tunnel_ends(std::iter::empty()).unwrap();
        assert!(taken(program.as_fd(), &datagram));
    }

    #[test]
    fn truncated_and_foreign_frames_pass() {
        let moves = moves(&["192.0.2.6:80", "[2001:db8::6]:80", "2001:db8::5"]);
        let facts = Facts::new(&moves).unwrap();
        let program = capture(&facts, L2, 1, None).unwrap().load().unwrap();
        for packet in [
            Packet::new("203.0.113.7", "192.0.2.6", TCP, ports(1, 80)),
            Packet::new("2001:db8::99", "2001:db8::6", TCP, ports(1, 80)),
        ] {
            assert!(taken(program.as_fd(), &packet));
            let whole = frame(&packet.bytes());
            let needed = whole.len() - 20;
            // BPF_PROG_TEST_RUN wants whole IP headers.
            let headers = if packet.dst.is_ipv4() { 34 } else { 54 };
            for length in headers..needed {
                let verdict = run(program.as_fd(), &whole[..length]).verdict;
                assert_ne!(verdict, TC_ACT_REDIRECT, "{length} bytes");
            }
            let mut foreign = whole.clone();
            foreign[0] = 2; // another host's MAC address
            assert_eq!(run(program.as_fd(), &foreign).verdict, TC_ACT_UNSPEC);
            let mut arp = whole;
            arp[12..14].copy_from_slice(&[8, 6]);
            assert_eq!(run(program.as_fd(), &arp).verdict, TC_ACT_UNSPEC);
        }
    }

    #[test]
    fn as_many_moves_as_may_be_asked_for_load() {
        // Each has ports of its own, as far as there may be such sets.
        let ports_of = |n: usize| {
            let first = 16 * (n % (MAX_PORT_SETS - 1)) as u16;
            let ranges = (0..4).map(|range| first + 4 * range + 1..=first + 4 * range + 2);
            ranges.collect::<Vec<_>>()
        };
        let each = |v6: bool| -> Vec<Move> {
            (0..MAX_MOVES)
                .map(|n| Move {
                    prefix: if v6 {
                        let network = (0x2001_0db8_u128 << 96) + ((n as u128) << 64);
                        Prefix::of(IpAddr::V6(network.into()), 64)
                    } else {
                        IpAddr::V4((0x0a00_0000 + 2 * n as u32).into()).into()
                    },
                    ports: ports_of(n),
                    transport: (n % 2 == 0).then_some(Transport::Tcp),
                })
                .collect()
        };
        let all = [each(false), each(true)];
        in_fresh_namespace(|| {
            keep_only(capabilities_of_the_unit());
            all.into_iter().for_each(they_load);
        });
    }

    /// Checks that the program for `moves` loads, and decides rightly about some of them.
    fn they_load(moves: Vec<Move>) {
        let facts = Facts::new(&moves).unwrap();
        let program = capture(&facts, L2, 1, Some(1)).unwrap();
        let loaded = program.load().unwrap();
        for moved in [&moves[0], &moves[MAX_MOVES / 2], &moves[MAX_MOVES - 1]] {
            let addr = moved.prefix.last();
            let src = if addr.is_ipv4() {
                "203.0.113.7"
            } else {
                "2001:db8::99"
            };
            let at = |port| Packet::new(src, &addr.to_string(), TCP, ports(1, port));
            for range in &moved.ports {
                assert!(taken(loaded.as_fd(), &at(*range.start())));
                assert!(taken(loaded.as_fd(), &at(*range.end())));
                assert!(!taken(loaded.as_fd(), &at(range.end() + 1)));
            }
        }
        return_path(&facts).unwrap().load().unwrap();
    }

    #[test]
    #[ignore = "a measurement: cargo test --lib -- --ignored --nocapture what_capture_costs"]
    fn what_capture_costs() {
        in_fresh_namespace(|| {
            for count in [1, 64, 4096_u32] {
                for ports_of in ["", ":80/tcp"] {
                    let addrs = (0..count).map(|n| IpAddr::V4((0x0a14_0000 + 2 * n).into()));
                    let texts = addrs.map(|addr| format!("{addr}{ports_of}"));
                    let all: Vec<Move> = texts.map(|text| text.parse().unwrap()).collect();
                    let facts = Facts::new(&all).unwrap();
                    let program = capture(&facts, L2, 1, Some(51820)).unwrap().load().unwrap();
                    for (to, port) in [
                        ("192.0.2.1", 51820),
                        ("10.20.0.1", 80),
                        ("10.20.0.0", 80),
                        ("10.20.0.0", 81),
                    ] {
                        let packet = Packet::new("203.0.113.7", to, TCP, ports(1, port));
                        let cost = nanoseconds(program.as_fd(), &frame(&packet.bytes()));
                        eprintln!("{count} of 10.20.0.0{ports_of}, to {to}:{port}: {cost} ns");
                    }
                }
            }
        });
    }

    #[test]
    fn as_many_extension_headers_are_skipped_as_the_daemon_skips() {
        let facts = Facts::new(&moves(&["[2001:db8::6]:80/tcp"])).unwrap();
        let program = capture(&facts, L2, 1, None).unwrap();
        let program = program.load().expect("run the tests as root");
        for (headers, expected) in [
            (1, true),
            (MAX_EXTENSION_HEADERS, true),
            (MAX_EXTENSION_HEADERS + 1, false),
        ] {
            let packet = Packet::new("2001:db8::99", "2001:db8::6", TCP, ports(1, 80));
            let packet = packet.behind_options(headers);
            assert_eq!(taken(program.as_fd(), &packet), expected, "{headers}");
        }
    }
}
