//! What the new server begins from ports that have not moved, where it may: on the old server,
//! whose own those ports are otherwise.
//!
//! The daemon lets out no such packet but what `--allow-outgoing` names
//! ([`gate`](crate::flow::gate)). The [return path](super::return_path()) notes its flow before it
//! leaves, so no answer can come too early; and [`capture`](super::capture()) takes the answers,
//! and ICMP errors, by the exact addresses and ports. Their fragments it takes as it takes all of
//! such an address: the daemon bounces the others.
//!
//! What this host has itself stays its own, and stays as it was: by its sockets for TCP and
//! connected UDP, by what it [has begun](super::own) or answered otherwise. So is the tunnel's own
//! port, whose socket is one that waits for everybody. A connection of the new
//! server with the very same addresses and ports does not begin. What a client begins at a port
//! that has not moved is none of the new server's in any case.
//!
//! ```text
//! return path:
//!     if (!(rights of ip.saddr & BEGINS)) go on;
//!     parse();                                         // quoted, later, none, other: go on
//!     if (its port has moved) go on;
//!     if ((b = lookup(begun, key))) { if (now - b->seen > REFRESH) b->seen = now; go on; }
//!     if (this host has it, or a UDP socket at that port) { count; drop; }
//!     update(begun, key, { now, 0 });
//!     if (!TCP) update(taken, key, now);               // this host has not spoken first
//! capture:  // of an address with BEGINS, by no port that has moved
//!     parse();                                         // later, none, other: pass
//!     if (SYN without ACK || !(b = lookup(begun, key)) || now - b->seen > idle) pass;
//!     if (this host has it) pass;
//!     if (now - b->seen > REFRESH) b->seen = now;      // quoted keeps nothing alive
//! ```

use std::os::fd::AsFd;

use Reg::{R0, R1, R7, R9, R10};

use super::facts::Facts;
use super::flows::{KEY_LAST, REFRESH, VALUE, enter_now, jump_if_within, look_up};
use super::headers::{icmpv4, icmpv6, ipv4, ipv6};
use super::moved::Family;
use super::own::Own;
use super::parse::{FRAGMENT, QUOTED, Side, Ways, load_syn, parse};
use super::phrases::{PROTOCOL, branch_by_family, jump_if_it_has_ports, load_bytes};
use super::rights::Rights;
use super::sockets::{load_port, look_up_socket};
use super::stays::{ask_sockets, judge_begun};
use crate::flow::class::{ICMP_QUERY, OTHER, TCP_ESTABLISHED, UDP_BOTH_WAYS};
use crate::kernel::bpf::{Assembler, BpfError, Helper, If, Label, Map, MapKind, Reg, Shape, Size};
use crate::model::moved::{TCP, UDP};
use crate::packet::SYN;

/// Where the stack keeps the source, below what [`parse`] needs, and what has moved of it, which is
/// no multiple of 8 for the same reason as in [`rights`](super::rights).
const SOURCE: i16 = -120;
const RIGHTS_KEPT: i16 = -172;

/// What has moved of the source, and its port.
const RIGHTS: Reg = R9;
const PORT: Reg = R7;

/// The flow's value in the map.
const FOUND: Reg = R7;

const REFUSED: Shape = Shape {
    kind: MapKind::Array,
    name: "ipmoved_refused",
    key_size: 4,
    value_size: 8,
    max_entries: 1,
};

/// Where the new server may begin something from a port that has not moved.
#[derive(Debug)]
pub(super) struct Begun {
    refused: Map,
}

impl Begun {
    /// Makes room in this memory for what it begins.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(super) fn new(own: &mut Own) -> Result<Self, BpfError> {
        own.remember_begun()?;
        Ok(Self {
            refused: Map::new(REFUSED)?,
        })
    }

    /// Packets that were dropped since this host has their flow itself.
    pub(super) fn refused(&self) -> u64 {
        self.refused.get(0).unwrap_or(0)
    }

    fn count_refused(&self, a: &mut Assembler) {
        a.load_address(R1, self.refused.as_fd(), 0);
        a.mov(R0, 1);
        a.add_atomically(R1, 0, R0);
    }
}

/// Notes the flow of a packet of the new server, if its port has not moved. Jumps to `refused` if
/// this host has such a flow itself; goes on in any other case, with nothing but the packet in any
/// register.
pub(super) fn note_begun(a: &mut Assembler, facts: &Facts, refused: Label) {
    note_begun_behind(a, 0, facts, refused);
}

/// As [`note_begun`], behind a header of the link.
fn note_begun_behind(a: &mut Assembler, l2: u32, facts: &Facts, refused: Label) {
    let Some((begun, map)) = facts.begun.as_ref().zip(facts.own.begun.as_ref()) else {
        return;
    };
    let ways = Ways::new(a);
    let (v6, begins, done) = (a.label(), a.label(), a.label());
    branch_by_family(a, v6, done);
    for (family, at) in [(Family::V4, ipv4::SOURCE), (Family::V6, ipv6::SOURCE)] {
        if family == Family::V6 {
            a.bind(v6);
        }
        load_bytes(a, l2 + at, SOURCE, family.bytes());
        a.jump_if_wide(R0, If::Ne, 0, done);
        facts.rights.load(a, (family, SOURCE), RIGHTS, done);
        a.jump(begins);
    }
    a.bind(begins);
    Rights::jump_unless_it_begins(a, RIGHTS, done);
    a.store(Size::W, R10, RIGHTS_KEPT, RIGHTS);
    parse(a, l2, Side::Own, ways);

    a.bind(ways.flow);
    let (by_port, unmoved, new) = (a.label(), a.label(), a.label());
    let (taken, note) = (a.label(), a.label());
    jump_if_it_has_ports(a, by_port);
    a.jump(unmoved);
    a.bind(by_port);
    load_port(a, KEY_LAST + 2);
    a.mov(PORT, R1);
    a.load(Size::W, RIGHTS, R10, RIGHTS_KEPT);
    let exits = (done, unmoved, done);
    (facts.rights).decide_by_port(a, RIGHTS, PORT, None, exits);
    a.bind(unmoved);
    look_up(a, map);
    a.jump_if_wide(R0, If::Eq, 0, new);
    a.mov(FOUND, R0);
    jump_if_within(a, (FOUND, 0), REFRESH, done);
    a.store(Size::Dw, FOUND, 0, R0);
    a.jump(done);

    a.bind(new);
    let unbound = a.label();
    a.jump_if(PROTOCOL, If::Ne, i32::from(UDP), unbound);
    // A service that waits for everybody has the port, whoever has spoken there so far.
    look_up_socket(a, Helper::SkLookupUdp);
    a.jump_if_wide(R0, If::Eq, 0, unbound);
    a.mov(R1, R0);
    a.call(Helper::SkRelease);
    a.jump(taken);
    a.bind(unbound);
    jump_if_this_hosts(a, &facts.own, taken, note);
    a.bind(taken);
    begun.count_refused(a);
    a.jump(refused);
    a.bind(note);
    // Who has begun it, the daemon notes.
    a.store(Size::Dw, R10, VALUE + 8, 0);
    enter_now(a, map);
    a.jump_if(PROTOCOL, If::Eq, i32::from(TCP), done);
    enter_now(a, &facts.own.taken);
    for label in [ways.later, ways.quoted, ways.none, ways.other, done] {
        a.bind(label);
    }
}

/// Goes on if the packet answers what the new server has begun, and is none of this host's own.
/// Jumps to `pass` otherwise. Nothing but the packet is left in any register.
pub(super) fn pass_unless_begun(a: &mut Assembler, l2: u32, own: &Own, pass: Label) {
    let Some(begun) = own.begun.as_ref() else {
        a.jump(pass);
        return;
    };
    let ways = Ways::new(a);
    parse(a, l2, Side::Remote, ways);
    a.bind(ways.quoted);
    a.mov(FRAGMENT, QUOTED);
    a.bind(ways.flow);
    let (alive, old, fresh) = (a.label(), a.label(), a.label());
    load_syn(a);
    a.jump_if(R0, If::Eq, i32::from(SYN), pass);
    look_up(a, begun);
    a.jump_if_wide(R0, If::Eq, 0, pass);
    a.mov(FOUND, R0);
    jump_if_within(a, (FOUND, 0), REFRESH, fresh);
    for (protocols, idle) in [
        (&[TCP][..], TCP_ESTABLISHED),
        (&[UDP], UDP_BOTH_WAYS),
        (&[icmpv4::PROTOCOL, icmpv6::PROTOCOL], ICMP_QUERY),
    ] {
        let (is_it, other) = (a.label(), a.label());
        for &protocol in protocols {
            a.jump_if(PROTOCOL, If::Eq, i32::from(protocol), is_it);
        }
        a.jump(other);
        a.bind(is_it);
        jump_if_within(a, (FOUND, 0), idle, alive);
        a.jump(pass);
        a.bind(other);
    }
    jump_if_within(a, (FOUND, 0), OTHER, alive);
    a.jump(pass);
    a.bind(alive);
    a.jump_if(FRAGMENT, If::Eq, QUOTED, fresh);
    a.store(Size::Dw, FOUND, 0, R0);
    a.bind(fresh);
    jump_if_this_hosts(a, own, old, ways.later);
    for label in [old, ways.none, ways.other] {
        a.bind(label);
    }
    a.jump(pass);
    // A later fragment is taken without this program.
    a.bind(ways.later);
}

/// Jumps to `yes` if this host, or one behind it, has the conversation of the key, and to `no`
/// otherwise.
fn jump_if_this_hosts(a: &mut Assembler, own: &Own, yes: Label, no: Label) {
    let (begun, unknown) = (a.label(), a.label());
    own.look_up(a, begun);
    a.jump(unknown);
    a.bind(begun);
    judge_begun(a, own, None, yes, unknown);
    a.bind(unknown);
    ask_sockets(a, yes, no);
    a.jump(no);
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpListener, UdpSocket};
    use std::num::NonZeroU64;
    use std::os::fd::{AsFd, OwnedFd};
    use std::time::Duration;

    use rustix::net::{AddressFamily, SocketType, bind, connect, socket};

    use super::*;
    use crate::flow::ended::HostFlow;
    use crate::kernel::bpf::test_run::{nanoseconds, run};
    use crate::kernel::netlink::{Address, Netlink};
    use crate::kernel::programs::capture;
    use crate::kernel::programs::phrases::{TC_ACT_SHOT, TC_ACT_UNSPEC, keep_packet, verdict};
    use crate::kernel::programs::testing::{self, L2, Packet, frame, icmp, moves, ports, tcp};
    use crate::kernel::testing::{capabilities_of_the_unit, in_fresh_namespace, keep_only};
    use crate::lab::wiring::Wiring as _;
    use crate::packet::ACK;

    /// An old server of which single ports have moved, and what its return path lets out.
    struct OldServer {
        programs: testing::OldServer,
        back: OwnedFd,
    }

    impl std::ops::Deref for OldServer {
        type Target = testing::OldServer;

        fn deref(&self) -> &testing::OldServer {
            &self.programs
        }
    }

    impl OldServer {
        fn new() -> Self {
            let moves = moves(&[
                "192.0.2.5:80/tcp",
                "192.0.2.5:53/udp",
                "[2001:db8:a::5]:80/tcp",
                "[2001:db8:a::5]:53/udp",
                "192.0.2.6:80/tcp",
            ]);
            let begin = &moves[..4];
            let own = Own::new().expect("run the tests as root");
            let facts = Facts::remembering(&moves, begin, own).unwrap();
            facts.own.begin_at(Duration::ZERO);
            let mut asm = Assembler::new();
            let refused = asm.label();
            keep_packet(&mut asm);
            note_begun_behind(&mut asm, L2, &facts, refused);
            verdict(&mut asm, TC_ACT_UNSPEC);
            asm.bind(refused);
            verdict(&mut asm, TC_ACT_SHOT);
            Self {
                back: asm.finish("ipmoved_test").unwrap().load().unwrap(),
                programs: testing::OldServer::new(facts),
            }
        }

        /// The new server sends it, and it leaves.
        fn lets_out(&self, packet: &Packet) -> bool {
            match run(self.back.as_fd(), &frame(&packet.bytes())).verdict {
                TC_ACT_UNSPEC => true,
                TC_ACT_SHOT => false,
                other => panic!("{other}"),
            }
        }
    }

    /// The moved address, somebody else's, and the protocol of ICMP with its echo.
    const ENDS: [(&str, &str, u8, [u8; 2]); 2] = [
        ("192.0.2.5", "203.0.113.7", 1, [8, 0]),
        ("2001:db8:a::5", "2001:db8:c::7", 58, [128, 129]),
    ];

    #[test]
    fn answers_to_what_began_are_taken_exactly_and_nothing_else_is() {
        in_fresh_namespace(|| {
            keep_only(capabilities_of_the_unit());
            let old = OldServer::new();
            for (moved, remote, protocol, [ping, pong]) in ENDS {
                for (of, question, answer, others) in [
                    (
                        TCP,
                        tcp(40_000, 25, SYN),
                        tcp(25, 40_000, SYN | ACK),
                        vec![
                            tcp(25, 40_001, ACK),
                            tcp(26, 40_000, ACK),
                            tcp(25, 40_000, SYN),
                        ],
                    ),
                    (
                        UDP,
                        ports(5_060, 5_060),
                        ports(5_060, 5_060),
                        vec![ports(5_061, 5_060), ports(5_060, 5_061)],
                    ),
                    (protocol, icmp(ping, 7), icmp(pong, 7), vec![icmp(pong, 8)]),
                    (47, ports(1, 2), ports(3, 4), vec![]),
                ] {
                    let question = Packet::new(moved, remote, of, question);
                    let answer = Packet::new(remote, moved, of, answer);
                    let error = Packet::icmp_error(remote, &question);
                    assert!(!old.is_taken(&answer) && !old.is_taken(&error));
                    assert!(old.lets_out(&question));
                    for _ in 0..2 {
                        assert!(old.is_taken(&answer), "{answer:?}");
                        assert!(old.is_taken(&error));
                    }
                    for other in others {
                        assert!(!old.is_taken(&Packet::new(remote, moved, of, other)));
                    }
                    let beside = Packet {
                        dst: ENDS[0].0.replace(".5", ".6").parse().unwrap(),
                        ..answer.clone()
                    };
                    assert!(!moved.contains('.') || !old.is_taken(&beside));
                    // Of a fragment the daemon decides.
                    let fragment = Packet {
                        fragment: Some((9, 3, false)),
                        ..answer
                    };
                    assert!(old.is_taken(&fragment));
                }
                // From a port that has moved it is a flow like a client's.
                let begun = || old.facts.own.begun.as_ref().unwrap().keys().unwrap().len();
                let before = begun();
                assert!(old.lets_out(&Packet::new(moved, remote, TCP, tcp(80, 25, SYN))));
                assert!(old.lets_out(&Packet::new(moved, remote, UDP, ports(53, 53))));
                assert_eq!(begun(), before);
            }
            // The new server may begin nothing from there.
            assert!(old.lets_out(&Packet::new("192.0.2.6", "203.0.113.7", 47, ports(1, 2))));
            assert!(!old.is_taken(&Packet::new("203.0.113.7", "192.0.2.6", 47, ports(1, 2))));
            assert_eq!(old.facts.refused(), 0);
        });
    }

    #[test]
    fn the_tunnels_own_datagrams_are_no_answers() {
        in_fresh_namespace(|| {
            let old = OldServer::new();
            let end = std::iter::once("192.0.2.5".parse().unwrap());
            old.facts.set_tunnel_ends(end).unwrap();
            let out = Packet::new("192.0.2.5", "198.51.100.2", UDP, ports(51820, 51820));
            assert!(old.lets_out(&out));
            let back = Packet::new("198.51.100.2", "192.0.2.5", UDP, ports(51820, 51820));
            assert!(!old.is_taken(&back));
            // Nor does the new server send any, while the tunnel has its socket.
            let _tunnel = UdpSocket::bind("[::]:51820").unwrap();
            for (moved, remote, ..) in ENDS {
                let forged = Packet::new(moved, remote, UDP, ports(51820, 53));
                assert!(!old.lets_out(&forged), "{moved}");
            }
            assert_eq!(old.facts.refused(), 2);
        });
    }

    #[test]
    fn which_new_server_has_begun_a_flow_is_kept_with_it() {
        in_fresh_namespace(|| {
            let old = OldServer::new();
            let taken = old.facts.own().taken();
            let [first, second] = [1, 2].map(NonZeroU64::new);
            for (moved, remote, protocol, [ping, _]) in ENDS {
                let at = |addr: &str, port| SocketAddr::new(addr.parse().unwrap(), port);
                for (of, question, [local, other]) in [
                    (TCP, tcp(40_000, 25, SYN), [40_000, 25]),
                    (UDP, ports(5_060, 5_061), [5_060, 5_061]),
                    (protocol, icmp(ping, 7), [0, 7]),
                    (47, ports(1, 2), [0, 0]),
                ] {
                    let flow = HostFlow {
                        protocol: of,
                        local: at(moved, local),
                        remote: at(remote, other),
                    };
                    taken.note_begun(&flow, first.unwrap());
                    assert_eq!(taken.begun_by(&flow), None, "it has not begun");
                    let question = Packet::new(moved, remote, of, question);
                    assert!(old.lets_out(&question));
                    assert_eq!(taken.begun_by(&flow), None, "nobody has told");
                    for by in [first, second] {
                        taken.note_begun(&flow, by.unwrap());
                        assert!(old.lets_out(&question));
                        assert_eq!(taken.begun_by(&flow), by);
                    }
                    let lasting: Vec<_> = (old.facts.own().lasting().iter())
                        .map(|fd| fd.try_clone_to_owned().unwrap())
                        .collect();
                    let next = Own::found(&lasting).unwrap().unwrap().taken();
                    assert_eq!(next.begun_by(&flow), second, "{flow:?}");
                }
            }
        });
    }

    #[test]
    fn what_this_host_has_itself_stays_and_does_not_begin() {
        in_fresh_namespace(|| {
            let netlink = Netlink::new().unwrap();
            netlink.set_link_up(1).unwrap();
            for addr in ENDS.iter().flat_map(|&(moved, remote, ..)| [moved, remote]) {
                let held = Address {
                    index: 1,
                    addr: addr.parse().unwrap(),
                    prefix: if addr.contains(':') { 128 } else { 32 },
                };
                netlink.add_address(&held).unwrap();
            }
            let old = OldServer::new();
            let mut refused = 0;
            for (moved, remote, protocol, [ping, pong]) in ENDS {
                let at = |addr: &str, port| SocketAddr::new(addr.parse().unwrap(), port);
                let mail = TcpListener::bind(at(remote, 25)).unwrap();
                let family = if moved.contains('.') {
                    AddressFamily::INET
                } else {
                    AddressFamily::INET6
                };
                let socket = socket(family, SocketType::STREAM, None).unwrap();
                bind(&socket, &at(moved, 40_000)).unwrap();
                connect(&socket, &mail.local_addr().unwrap()).unwrap();
                let dns = UdpSocket::bind(at(moved, 40_000)).unwrap();
                dns.connect(at(remote, 53)).unwrap();
                // What no socket tells of.
                old.sends(&Packet::new(moved, remote, 47, ports(1, 2)));
                old.sends(&Packet::new(moved, remote, protocol, icmp(ping, 7)));
                for (of, begins, answer) in [
                    (TCP, tcp(40_000, 25, SYN), tcp(25, 40_000, ACK)),
                    (UDP, ports(40_000, 53), ports(53, 40_000)),
                    (47, ports(1, 2), ports(3, 4)),
                    (protocol, icmp(ping, 7), icmp(pong, 7)),
                ] {
                    assert!(!old.lets_out(&Packet::new(moved, remote, of, begins)));
                    refused += 1;
                    assert_eq!(old.facts.refused(), refused);
                    assert!(!old.is_taken(&Packet::new(remote, moved, of, answer)));
                }
                // It began there first, and this host's connection is over now.
                assert!(old.lets_out(&Packet::new(moved, remote, TCP, tcp(40_002, 25, SYN))));
                let answer = Packet::new(remote, moved, TCP, tcp(25, 40_002, ACK));
                assert!(old.is_taken(&answer));
                let socket = TcpListener::bind(at(moved, 40_002)).unwrap();
                assert!(old.is_taken(&answer), "who listens has no connection yet");
                drop(socket);
                // Without TCP the new server was first, and has answered since.
                let question = Packet::new(moved, remote, UDP, ports(5_060, 5_060));
                assert!(old.lets_out(&question));
                old.sends(&question);
                assert!(old.is_taken(&Packet::new(remote, moved, UDP, ports(5_060, 5_060))));
            }
        });
    }

    #[test]
    #[ignore = "a measurement: cargo test --lib -- --ignored --nocapture what_an_answer_costs"]
    fn what_an_answer_costs() {
        in_fresh_namespace(|| {
            let old = OldServer::new();
            let plain = Facts::new(&moves(&["192.0.2.5:80/tcp", "192.0.2.5:53/udp"])).unwrap();
            let plain = capture(&plain, L2, 1, Some(51820)).unwrap().load().unwrap();
            let (moved, remote, ..) = ENDS[0];
            let begins = Packet::new(moved, remote, TCP, tcp(40_000, 25, SYN));
            assert!(old.lets_out(&begins));
            let cost = |program: &OwnedFd, packet: &Packet| {
                nanoseconds(program.as_fd(), &frame(&packet.bytes()))
            };
            for (name, src, dst, payload) in [
                ("an answer", remote, moved, tcp(25, 40_000, ACK)),
                ("this host's own", remote, moved, tcp(25, 22, ACK)),
                ("moved", remote, moved, tcp(25, 80, ACK)),
                ("elsewhere", remote, "192.0.2.1", tcp(25, 22, ACK)),
            ] {
                let packet = Packet::new(src, dst, TCP, payload);
                let (with, without) = (cost(&old.capture, &packet), cost(&plain, &packet));
                eprintln!("{name}: {with} ns, {without} ns without");
            }
            for (name, payload) in [("begun", tcp(40_000, 25, ACK)), ("moved", tcp(80, 1, ACK))] {
                let packet = Packet::new(moved, remote, TCP, payload);
                eprintln!("out, {name}: {} ns", cost(&old.back, &packet));
            }
        });
    }
}
