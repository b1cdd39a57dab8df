//! Captures packets to moved addresses: for the ingress of the old server's uplink.
//!
//! * A whole move takes every packet to the address, except neighbour discovery and multicast
//!   listener discovery. Those stay with the kernel that holds the address.
//! * A move of ports takes TCP and UDP packets by destination port, ICMP errors that quote a packet
//!   from such a port, and every fragment of the transports concerned, since only the first one
//!   shows its port.
//! * A packet that the daemon has bounced ([`return_path`](super::return_path())) passes.
//! * It takes only packets for this host that belong to no VLAN (a tag that has a priority only
//!   does not count), and never a UDP datagram to one of the tunnel's own ends, nor an ICMP error
//!   about one from there. Which moved addresses have such an end, [`Facts`] say at any time.
//!
//! ```text
//! pass_bounced();
//! if (skb->pkt_type != PACKET_HOST || skb->vlan_tci & 0xfff) pass;
//! if (IPv4) {
//!     for each scope: if (ip.daddr == scope.addr) { if by_address take; else goto parse; }
//!     pass;
//! parse:
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
//! other:     if (scope.whole) take; else pass;
//! fragment:  if (scope.whole || protocol in scope) take; else pass;
//! port:      if (UDP && port == tunnel.port && facts.tunnel_end[scope]) pass;
//!            if (port in scope.ranges(protocol)) take; else pass;
//!
//! take:      if (it is this host's own) pass;                  // see `stays`
//!            skb_vlan_pop(); return redirect(tun, 0);
//! pass:      return TC_ACT_UNSPEC;
//! ```
//!
//! A balanced tree finds the ports, so that no path through the program has more than some hundred
//! branches. The trees stand last.

use std::net::IpAddr;
use std::ops::RangeInclusive;

use Reg::{R0, R9, R10};

use super::facts::{Facts, addresses};
use super::headers::{fragment, icmp, icmpv4, icmpv6, ipv4, ipv6, ports};
use super::own::Own;
use super::phrases::{
    DESTINATION_KEPT, Expected, PROTOCOL, TC_ACT_UNSPEC, TRANSPORT, branch_by_family,
    jump_if_it_has_ports, jump_if_link_scoped_icmpv6, jump_unless_icmpv6_error,
    jump_unless_v6_destination, keep_packet, load_ipv4_header_end, load_v6_destination,
    pass_bounced, pass_unless_for_this_host, quoted_flow_v4, quoted_flow_v6, take, verdict,
    walk_extension_headers,
};
use super::stays::leave_own;
use crate::kernel::bpf::{Assembler, BpfError, If, Label, Program, Reg, Size};
use crate::model::moved::{Move, TCP, Transport, UDP, merged};

/// The [`Scope`] of the destination, as its index.
const SCOPE: Reg = R9;

/// The port that decides, once the program has read the transport header.
const PORT: Reg = TRANSPORT;

/// The tunnel's own ends on this host: its UDP port, at each moved address of which the facts say
/// so. The facts are those of the same moves.
#[derive(Clone, Copy, Debug)]
pub struct TunnelEnds<'f> {
    /// The port.
    pub port: u16,
    /// Where it is the tunnel's.
    pub facts: &'f Facts,
}

/// The program for `moves`, which leads into the TUN; without a tunnel, no datagram is left out.
///
/// # Errors
/// If the program is too large.
pub fn capture(
    moves: &[Move],
    l2_header: u32,
    tun_ifindex: u32,
    tunnel: Option<TunnelEnds<'_>>,
    own: &Own,
) -> Result<Program, BpfError> {
    Capture {
        asm: Assembler::new(),
        l2: l2_header,
        tun_ifindex,
        scopes: scopes(moves, tunnel.is_some()),
        tunnel,
        own,
    }
    .assemble()
}

/// Everything that has moved of one address, from all its moves.
struct Scope {
    addr: IpAddr,
    whole: bool,
    tcp: Vec<RangeInclusive<u16>>,
    udp: Vec<RangeInclusive<u16>>,
    /// The tunnel may have an end at this address.
    tunnel: bool,
}

impl Scope {
    /// Whether the address alone decides.
    fn by_address(&self) -> bool {
        self.whole && !self.tunnel
    }
}

/// The scopes, by the number of their address.
fn scopes(moves: &[Move], tunnel: bool) -> Vec<Scope> {
    let scope = |addr| Scope {
        addr,
        whole: false,
        tcp: Vec::new(),
        udp: Vec::new(),
        tunnel,
    };
    let mut scopes: Vec<Scope> = addresses(moves).into_iter().map(scope).collect();
    for moved in moves {
        let Some(scope) = scopes
            .iter_mut()
            .find(|scope| scope.addr == moved.prefix.first())
        else {
            continue;
        };
        scope.whole |= moved.is_whole();
        let ports = if moved.ports.is_empty() {
            vec![0..=u16::MAX]
        } else {
            moved.ports.clone()
        };
        if moved.transport != Some(Transport::Udp) {
            scope.tcp.extend(ports.iter().cloned());
        }
        if moved.transport != Some(Transport::Tcp) {
            scope.udp.extend(ports);
        }
    }
    for scope in &mut scopes {
        scope.tcp = merged(std::mem::take(&mut scope.tcp));
        scope.udp = merged(std::mem::take(&mut scope.udp));
    }
    scopes
}

/// The state of the generator while it writes the program.
struct Capture<'f> {
    asm: Assembler,
    l2: u32,
    tun_ifindex: u32,
    scopes: Vec<Scope>,
    tunnel: Option<TunnelEnds<'f>>,
    own: &'f Own,
}

/// The exits of the part that reads addresses and headers. SCOPE is known in all but the first two.
#[derive(Clone, Copy)]
struct Ways {
    pass: Label,
    redirect: Label,
    /// PORT is a port of TCP or UDP at the moved address, and PROTOCOL says which.
    port: Label,
    /// It is a fragment of PROTOCOL.
    fragment: Label,
    /// It is a packet without ports.
    other: Label,
}

impl Capture<'_> {
    fn assemble(mut self) -> Result<Program, BpfError> {
        let a = &mut self.asm;
        let v6 = a.label();
        let ways = Ways {
            pass: a.label(),
            redirect: a.label(),
            port: a.label(),
            fragment: a.label(),
            other: a.label(),
        };
        keep_packet(a);
        pass_bounced(a);
        pass_unless_for_this_host(a, ways.pass);
        branch_by_family(a, v6, ways.pass);
        self.ipv4(ways);
        self.asm.bind(v6);
        self.ipv6(ways);
        self.asm.bind(ways.redirect);
        leave_own(&mut self.asm, self.l2, self.own);
        take(&mut self.asm, self.tun_ifindex);
        self.asm.bind(ways.pass);
        verdict(&mut self.asm, TC_ACT_UNSPEC);
        self.decide_other(ways.other, ways.redirect);
        self.decide_fragment(ways.fragment, ways.redirect);
        self.decide_port(ways.port, ways.redirect);
        self.asm.finish("ipmoved_capture")
    }

    fn ipv4(&mut self, ways: Ways) {
        let (a, l2) = (&mut self.asm, self.l2);
        let parse = a.label();
        a.load_packet(Size::W, l2 + ipv4::DESTINATION);
        for (index, scope) in self.scopes.iter().enumerate() {
            let IpAddr::V4(addr) = scope.addr else {
                continue;
            };
            if scope.by_address() {
                a.jump_if(R0, If::Eq, addr.to_bits(), ways.redirect);
            } else {
                a.mov(SCOPE, index as i32);
                a.jump_if(R0, If::Eq, addr.to_bits(), parse);
            }
        }
        a.jump(ways.pass);

        a.bind(parse);
        let [.., kept] = DESTINATION_KEPT;
        a.store(Size::W, R10, kept, R0);
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
        let sender = (ipv4::SOURCE, Expected::Kept(&[kept]));
        let quoted = quoted_flow_v4(a, &[sender], ways.other);
        go_by_port_of_quoted(a, quoted, ways);
        a.bind(destination_port);
        go_by_destination_port(a, ways);
    }

    fn ipv6(&mut self, ways: Ways) {
        let (a, l2) = (&mut self.asm, self.l2);
        let (by_address, parse, icmp) = (a.label(), a.label(), a.label());
        load_v6_destination(a, l2);
        for (index, scope) in self.scopes.iter().enumerate() {
            let IpAddr::V6(addr) = scope.addr else {
                continue;
            };
            let next = a.label();
            jump_unless_v6_destination(a, addr, next);
            a.mov(SCOPE, index as i32);
            a.jump(if scope.by_address() {
                by_address
            } else {
                parse
            });
            a.bind(next);
        }
        a.jump(ways.pass);

        // The program does not walk extension headers here: the link's own messages have none that
        // it could skip.
        a.bind(by_address);
        a.load_packet(Size::B, l2 + ipv6::NEXT_HEADER);
        a.jump_if(R0, If::Ne, i32::from(icmpv6::PROTOCOL), ways.redirect);
        a.load_packet(Size::B, l2 + ipv6::LEN + icmp::TYPE);
        jump_if_link_scoped_icmpv6(a, ways.pass);
        a.jump(ways.redirect);

        a.bind(parse);
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
        let sender = (ipv6::SOURCE, Expected::Kept(&DESTINATION_KEPT));
        let quoted = quoted_flow_v6(a, &[sender], ways.other);
        go_by_port_of_quoted(a, quoted, ways);
        a.bind(destination_port);
        go_by_destination_port(a, ways);
    }

    fn decide_other(&mut self, other: Label, taken: Label) {
        let a = &mut self.asm;
        a.bind(other);
        for (index, scope) in self.scopes.iter().enumerate() {
            if scope.whole && !scope.by_address() {
                a.jump_if(SCOPE, If::Eq, index as i32, taken);
            }
        }
        verdict(a, TC_ACT_UNSPEC);
    }

    fn decide_fragment(&mut self, fragment: Label, taken: Label) {
        let a = &mut self.asm;
        a.bind(fragment);
        for (index, scope) in self.scopes.iter().enumerate() {
            if scope.by_address() {
                continue;
            }
            let next = a.label();
            a.jump_if(SCOPE, If::Ne, index as i32, next);
            if scope.whole {
                a.jump(taken);
            }
            for (protocol, ranges) in [(TCP, &scope.tcp), (UDP, &scope.udp)] {
                if !ranges.is_empty() {
                    a.jump_if(PROTOCOL, If::Eq, i32::from(protocol), taken);
                }
            }
            a.bind(next);
        }
        verdict(a, TC_ACT_UNSPEC);
    }

    fn decide_port(&mut self, port: Label, taken: Label) {
        self.asm.bind(port);
        for (index, scope) in self.scopes.iter().enumerate() {
            if scope.by_address() {
                continue;
            }
            let a = &mut self.asm;
            let everything = [0..=u16::MAX];
            let (tcp, udp) = if scope.whole {
                (&everything[..], &everything[..])
            } else {
                (&scope.tcp[..], &scope.udp[..])
            };
            if let Some(tunnel) = self.tunnel {
                let next = a.label();
                a.jump_if(SCOPE, If::Ne, index as i32, next);
                a.jump_if(PROTOCOL, If::Ne, i32::from(UDP), next);
                a.jump_if(PORT, If::Ne, i32::from(tunnel.port), next);
                tunnel.facts.jump_unless_tunnel_end(a, index, R0, next);
                verdict(a, TC_ACT_UNSPEC);
                a.bind(next);
            }
            if tcp == udp {
                tree(a, index, None, tcp, taken);
            } else {
                tree(a, index, Some(TCP), tcp, taken);
                tree(a, index, Some(UDP), udp, taken);
            }
        }
        verdict(&mut self.asm, TC_ACT_UNSPEC);
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

/// Decides for one scope (and protocol) by PORT. For any other scope the program goes on behind it.
fn tree(
    a: &mut Assembler,
    scope: usize,
    protocol: Option<u8>,
    ranges: &[RangeInclusive<u16>],
    hit: Label,
) {
    fn node(a: &mut Assembler, ranges: &[RangeInclusive<u16>], hit: Label, miss: Label) {
        let middle = ranges.len() / 2;
        let Some(range) = ranges.get(middle) else {
            a.jump(miss);
            return;
        };
        let below = if middle == 0 { miss } else { a.label() };
        a.jump_if(PORT, If::Lt, i32::from(*range.start()), below);
        a.jump_if(PORT, If::Le, i32::from(*range.end()), hit);
        node(a, &ranges[middle + 1..], hit, miss);
        if middle > 0 {
            a.bind(below);
            node(a, &ranges[..middle], hit, miss);
        }
    }
    let (next, miss) = (a.label(), a.label());
    a.jump_if(SCOPE, If::Ne, scope as i32, next);
    if let Some(protocol) = protocol {
        a.jump_if(PROTOCOL, If::Ne, i32::from(protocol), next);
    }
    node(a, ranges, hit, miss);
    a.bind(miss);
    verdict(a, TC_ACT_UNSPEC);
    a.bind(next);
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
    use std::os::fd::AsFd;

    use proptest::prelude::*;

    use super::*;
    use crate::kernel::bpf::test_run::run;
    use crate::kernel::programs::return_path;
    use crate::kernel::programs::testing::{
        L2, Packet, TC_ACT_REDIRECT, frame, moves, ports, taken,
    };
    use crate::kernel::testing::{capabilities_of_the_unit, in_fresh_namespace, keep_only};
    use crate::model::moved::{MAX_MOVES, MAX_PORT_RANGES};
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
        let walked = tunnel.is_some();
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
            .filter(|m| m.prefix.first() == packet.dst)
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
        ]);
        for tunnel in [None, Some("192.0.2.8:51820"), Some("[2001:db8::8]:443")] {
            let tunnel: Option<SocketAddr> = tunnel.map(|end| end.parse().unwrap());
            let facts = Facts::new(&moves).unwrap();
            facts.set_tunnel_ends(|addr| tunnel.is_some_and(|end| end.ip() == addr));
            let ends = tunnel.map(|end| TunnelEnds {
                port: end.port(),
                facts: &facts,
            });
            let program = capture(&moves, L2, 1, ends, &facts.own).unwrap();
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
        let tunnel = TunnelEnds {
            port: 51820,
            facts: &facts,
        };
        facts.set_tunnel_ends(|addr| addr.to_string() == "192.0.2.8");
        let program = capture(&moves, L2, 1, Some(tunnel), &facts.own).unwrap();
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
        facts.set_tunnel_ends(|_| false);
        assert!(taken(program.as_fd(), &datagram));
    }

    #[test]
    fn truncated_and_foreign_frames_pass() {
        let moves = moves(&["192.0.2.6:80", "[2001:db8::6]:80", "2001:db8::5"]);
        let own = Own::new().expect("run the tests as root");
        let program = capture(&moves, L2, 1, None, &own).unwrap().load().unwrap();
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
        let ranges: Vec<_> = (0..MAX_PORT_RANGES as u16)
            .map(|n| 4 * n + 1..=4 * n + 2)
            .collect();
        let each = |spread: bool, v6: bool| -> Vec<Move> {
            (0..MAX_MOVES as u16)
                .map(|n| Move {
                    prefix: Prefix::from(match (spread, v6) {
                        (true, false) => IpAddr::from(Ipv4Addr::new(192, 0, 2, n as u8)),
                        (true, true) => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, n).into(),
                        (false, _) => Ipv4Addr::new(192, 0, 2, 1).into(),
                    }),
                    ports: ranges
                        .iter()
                        .map(|r| r.start() + 512 * n..=r.end() + 512 * n)
                        .collect(),
                    transport: (n == 0).then_some(Transport::Udp),
                })
                .collect()
        };
        let all = [each(true, false), each(true, true), each(false, false)];
        in_fresh_namespace(|| {
            // Without CAP_PERFMON the verifier looks at more instructions.
            keep_only(capabilities_of_the_unit());
            all.into_iter().for_each(they_load);
        });
    }

    /// Checks that the program for `moves` loads, and decides rightly about the last of them.
    fn they_load(moves: Vec<Move>) {
        let facts = Facts::new(&moves).unwrap();
        let tunnel = TunnelEnds {
            port: 1,
            facts: &facts,
        };
        let program = capture(&moves, L2, 1, Some(tunnel), &facts.own).unwrap();
        let loaded = program.load().unwrap();
        let last = &moves[MAX_MOVES - 1];
        let src = if last.prefix.first().is_ipv4() {
            "203.0.113.7"
        } else {
            "2001:db8::99"
        };
        let at = |port| Packet::new(src, &last.prefix.first().to_string(), TCP, ports(1, port));
        for range in &last.ports {
            assert!(taken(loaded.as_fd(), &at(*range.start())));
            assert!(taken(loaded.as_fd(), &at(*range.end())));
            assert!(!taken(loaded.as_fd(), &at(range.end() + 1)));
        }
        return_path(&facts, 1).unwrap().load().unwrap();
    }

    #[test]
    fn as_many_extension_headers_are_skipped_as_the_daemon_skips() {
        let own = Own::new().expect("run the tests as root");
        let moves = moves(&["[2001:db8::6]:80/tcp"]);
        let program = capture(&moves, L2, 1, None, &own).unwrap();
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
