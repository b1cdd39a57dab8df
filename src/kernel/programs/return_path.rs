//! Sends packets that the daemon writes to its TUN to their clients: for the ingress of the old
//! server's TUN.
//!
//! A reply leaves as this host would send it itself: by the route that its tables and rules give
//! for it, through whatever interface that is. If the administrator has named an uplink, it leaves
//! by that one. The kernel resolves the neighbour. No netfilter hook takes part, and the TTL stays.
//!
//! What a host sends itself begins on its loopback interface, as far as rules are concerned (`iif
//! lo`, `ip_route_output_key_hash` in net/ipv4/route.c). So the question is that of a packet which
//! comes in there.
//!
//! The daemon writes packets to a moved address only if it bounces them: what came out of the
//! tunnel for one it drops ([`flow::gate`](crate::flow::gate)). These arrive on the uplink once
//! more, where
//! [`capture`](super::capture()) lets them pass. So this host's own stack sees them as it would
//! without a daemon, and strict reverse path filtering and firewall rules for the uplink judge them
//! alike.
//!
//! ```text
//! note that the new server has answered, or begun;             // see `stays`, `begun`
//! if (!IP) return TC_ACT_UNSPEC;
//! if (ip.daddr in moves) {
//!     note that it is not the new server's;
//!     skb_change_head(14); ethernet.type = skb->protocol;
//!     skb->mark = BOUNCED;
//!     return redirect((m = lookup(marked, ip.daddr)) ? m->link : facts.uplink, BPF_F_INGRESS);
//! }
//! if (!facts.always) {
//!     question = { lo, ip.saddr, ip.daddr };
//!     if (facts.detailed) question += { protocol, ports of what is no fragment, DSCP };
//!     route = fib_lookup(question);
//!     if (facts.marked && (m = lookup(marked, ip.saddr)) && route in m->instead_of) {
//!         skb->mark = m->mark;                                 // see `marked`
//!         skb_change_head(14); return redirect_neigh(m->link);
//!     }
//!     if (found) { skb_change_head(14); return redirect_neigh(route.ifindex, route.gateway); }
//!     if (blackhole, unreachable, prohibited) drop;
//! }
//! if (!facts.uplink) drop;
//! skb_change_head(14); return redirect_neigh(facts.uplink);
//! ```
//!
//! As BPF_PROG_TEST_RUN counts, an answer costs 133 ns of IPv4 and 232 ns of IPv6, most of it the
//! look-up; 40 ns more where rules go by ports, and 10 to 20 ns more where some addresses have
//! marks.
//!
//! Both redirections want a link-layer header, and take it off where the interface has none. The
//! look-up works only while the loopback interface counts as forwarding (`conf/lo/forwarding`).
//! Later fragments have no ports, and all of a datagram leave by one way, so none of them is asked
//! for by its ports.

use Reg::{R0, R1, R2, R3, R4, R5, R7, R8, R9, R10};

use super::begun::note_begun;
use super::facts::Facts;
use super::headers::{ethernet, fib, fragment, ipv4, ipv6, ports, skb};
use super::marked::Marked;
use super::moved::Family;
use super::phrases::{
    BOUNCED, BPF_F_INGRESS, PACKET, PROTOCOL, TC_ACT_SHOT, TC_ACT_UNSPEC, TRANSPORT,
    add_empty_header, branch_by_family, clear_route_lookup, jump_if_v6, keep_packet, load_bytes,
    load_ipv4_header_end, look_up_route, verdict, walk_extension_headers,
};
use super::stays::{note_answered, note_bounced};
use crate::kernel::bpf::{Alu, Assembler, BpfError, Helper, If, Label, Program, Reg, Size};
use crate::model::moved::{TCP, UDP};

/// Where the EtherType lies on the stack.
const ETHERTYPE: i16 = -8;

/// Where the destination lies on the stack, as on the wire; the word before it is free.
const DESTINATION: i16 = -16;

/// The look-up (`struct bpf_fib_lookup`) on the stack, below the destination.
const LOOKUP: i16 = -96;

/// `struct bpf_redir_neigh` on the stack: the family and the next hop, which the look-up leaves in
/// place of the destination. It overlaps the look-up, whose last word of the source is not wanted
/// any more.
const NEXT_HOP: i16 = LOOKUP + fib::DESTINATION - 4;
const NEXT_HOP_LEN: i32 = 20;

/// Where the redirection goes.
const IFINDEX: Reg = R7;

/// Why no route was found.
const RESULT: Reg = R8;

/// The loopback interface of every network namespace (`LOOPBACK_IFINDEX`, net/flow.h).
pub const LO: u32 = 1;

/// The protocols whose headers begin with two ports: those, UDP-Lite, DCCP and SCTP.
const WITH_PORTS: [u8; 5] = [TCP, UDP, 136, 33, 132];

/// The program for what has moved by these facts.
///
/// # Errors
/// If the program is too large.
pub fn return_path(facts: &Facts) -> Result<Program, BpfError> {
    return_path_behind(0, facts)
}

/// The same program for packets with a link-layer header of this length. A TUN has none, but
/// BPF_PROG_TEST_RUN asks for one.
fn return_path_behind(l2: u32, facts: &Facts) -> Result<Program, BpfError> {
    let mut asm = Assembler::new();
    let a = &mut asm;
    let (v6, look, bounced, other) = (a.label(), a.label(), a.label(), a.label());
    let (found, by_uplink, refused) = (a.label(), a.label(), a.label());
    let by_mark = a.label();
    keep_packet(a);
    note_answered(a, l2, &facts.own, Some(&facts.modes));
    note_begun(a, facts, refused);
    branch_by_family(a, v6, other);
    jump_if_moved(a, l2, facts, Family::V4, (bounced, other));
    facts.jump_if_always(a, R0, by_uplink);
    ask_for_addresses(a, l2, Family::V4);
    let plain = a.label();
    facts.jump_unless_detailed(a, R0, plain);
    ask_for_details_v4(a, l2);
    a.bind(plain);
    a.store(Size::B, R10, LOOKUP + fib::FAMILY, libc::AF_INET);
    a.jump(look);
    a.bind(v6);
    jump_if_moved(a, l2, facts, Family::V6, (bounced, other));
    facts.jump_if_always(a, R0, by_uplink);
    ask_for_addresses(a, l2, Family::V6);
    let plain = a.label();
    facts.jump_unless_detailed(a, R0, plain);
    ask_for_details_v6(a, l2);
    a.bind(plain);
    a.store(Size::B, R10, LOOKUP + fib::FAMILY, libc::AF_INET6);

    a.bind(look);
    a.store(Size::W, R10, LOOKUP + fib::IFINDEX, LO.cast_signed());
    look_up_route(a, LOOKUP, found);
    a.mov(RESULT, R0);
    let unmarked = a.label();
    facts.jump_unless_marked(a, R0, unmarked);
    a.mov(IFINDEX, 0);
    jump_if_instead(a, facts, by_mark);
    a.bind(unmarked);
    for result in fib::REFUSED {
        a.jump_if(RESULT, If::Eq, result, refused);
    }
    a.bind(by_uplink);
    facts.load_uplink(a, IFINDEX);
    a.jump_if(IFINDEX, If::Eq, 0, refused);
    a.bind(by_mark);
    a.mov(R8, 0);
    a.mov(R9, 0);
    send(a);
    a.bind(refused);
    verdict(a, TC_ACT_SHOT);

    a.bind(found);
    a.load(Size::W, IFINDEX, R10, LOOKUP + fib::IFINDEX);
    let as_found = a.label();
    facts.jump_unless_marked(a, R0, as_found);
    jump_if_instead(a, facts, by_mark);
    a.bind(as_found);
    a.load(Size::B, R0, R10, LOOKUP + fib::FAMILY);
    a.store(Size::W, R10, NEXT_HOP, R0);
    a.mov(R8, R10);
    a.alu(Alu::Add, R8, i32::from(NEXT_HOP));
    a.mov(R9, NEXT_HOP_LEN);
    send(a);

    bounce(a, l2, facts, (bounced, refused));
    a.bind(other);
    verdict(a, TC_ACT_UNSPEC);
    asm.finish("ipmoved_return")
}

/// Jumps to `bounced` if the destination has moved, and to `other` if there is none. The stack
/// keeps it.
fn jump_if_moved(
    a: &mut Assembler,
    l2: u32,
    facts: &Facts,
    family: Family,
    (bounced, other): (Label, Label),
) {
    let at = match family {
        Family::V4 => ipv4::DESTINATION,
        Family::V6 => ipv6::DESTINATION,
    };
    load_bytes(a, l2 + at, DESTINATION, family.bytes());
    a.jump_if_wide(R0, If::Ne, 0, other);
    facts.rights.look_up(a, family, DESTINATION);
    a.jump_if_wide(R0, If::Ne, 0, bounced);
}

/// Copies it into the question. Two words at once: without CAP_PERFMON some kernels (6.1) keep
/// account of a word that begins a place of eight bytes, and refuse to let the next one be written
/// behind it (`attempt to corrupt spilled pointer on stack`).
fn copy_destination(a: &mut Assembler, family: Family) {
    let (size, step) = match family {
        Family::V4 => (Size::W, 4),
        Family::V6 => (Size::Dw, 8),
    };
    for at in (0..family.bytes() as i16).step_by(step) {
        a.load(size, R0, R10, DESTINATION + at);
        a.store(size, R10, LOOKUP + fib::DESTINATION + at, R0);
    }
}

/// Begins the question with the addresses. What is a constant comes last: without CAP_PERFMON some
/// kernels (6.4 on) keep account of one that begins a place of eight bytes, and refuse to let
/// anything else be written behind it.
fn ask_for_addresses(a: &mut Assembler, l2: u32, family: Family) {
    clear_route_lookup(a, LOOKUP);
    let source = match family {
        Family::V4 => ipv4::SOURCE,
        Family::V6 => ipv6::SOURCE,
    };
    load_bytes(a, l2 + source, LOOKUP + fib::SOURCE, family.bytes());
    copy_destination(a, family);
}

/// Adds what rules may go by beside the addresses.
fn ask_for_details_v4(a: &mut Assembler, l2: u32) {
    let done = a.label();
    a.load_packet(Size::B, l2 + ipv4::SERVICE);
    a.alu(Alu::And, R0, ipv4::DSCP);
    a.store(Size::B, R10, LOOKUP + fib::SERVICE, R0);
    load_ipv4_header_end(a, l2, done);
    a.load_packet(Size::B, l2 + ipv4::PROTOCOL);
    a.mov(PROTOCOL, R0);
    a.store(Size::B, R10, LOOKUP + fib::PROTOCOL, PROTOCOL);
    a.load_packet(Size::H, l2 + ipv4::FLAGS_AND_OFFSET);
    a.jump_if(R0, If::Set, ipv4::FRAGMENTED, done);
    ask_for_ports(a);
    a.bind(done);
}

/// The same for IPv6.
fn ask_for_details_v6(a: &mut Assembler, l2: u32) {
    let (fragmented, whole, done) = (a.label(), a.label(), a.label());
    a.load_packet(Size::W, l2 + ipv6::FIRST_WORD);
    a.alu(Alu::And, R0, ipv6::DSCP);
    a.swap_if_little_endian(R0);
    a.store(Size::W, R10, LOOKUP + fib::SERVICE, R0);
    walk_extension_headers(a, l2, fragmented);
    a.jump(whole);
    a.bind(fragmented);
    a.load_packet_at(Size::B, TRANSPORT, fragment::NEXT_HEADER);
    a.store(Size::B, R10, LOOKUP + fib::PROTOCOL, R0);
    a.jump(done);
    a.bind(whole);
    a.store(Size::B, R10, LOOKUP + fib::PROTOCOL, PROTOCOL);
    ask_for_ports(a);
    a.bind(done);
}

/// Adds the ports, if PROTOCOL has any. A packet that ends before them has none.
fn ask_for_ports(a: &mut Assembler) {
    let (some, none) = (a.label(), a.label());
    for protocol in WITH_PORTS {
        a.jump_if(PROTOCOL, If::Eq, i32::from(protocol), some);
    }
    a.jump(none);
    a.bind(some);
    a.mov(R1, PACKET);
    a.mov(R2, TRANSPORT);
    a.mov(R3, R10);
    a.alu(Alu::Add, R3, i32::from(LOOKUP + fib::PORTS));
    a.mov(R4, ports::LEN);
    a.load_packet_bytes();
    a.bind(none);
}

/// Jumps, with another IFINDEX, if what was asked for leaves by a mark instead of by that one.
fn jump_if_instead(a: &mut Assembler, facts: &Facts, by_mark: Label) {
    let (v6, either) = (a.label(), a.label());
    // The family of the question is that of the gateway by now (RFC 8950).
    jump_if_v6(a, v6);
    facts.marked.look_up(a, Family::V4, LOOKUP);
    a.jump(either);
    a.bind(v6);
    facts.marked.look_up(a, Family::V6, LOOKUP);
    a.bind(either);
    Marked::jump_if_instead(a, LOOKUP, IFINDEX, by_mark);
}

/// Sends the packet out of IFINDEX, to the next hop at R8 with length R9 (0: the kernel asks its
/// tables for one behind this interface).
fn send(a: &mut Assembler) {
    add_empty_header(a, ethernet::LEN as u32);
    a.mov(R1, IFINDEX);
    a.mov(R2, R8);
    a.mov(R3, R9);
    a.mov(R4, 0);
    a.call(Helper::RedirectNeigh);
    a.exit();
}

/// Lets the packet arrive on the uplink, or where its destination is reached if that is known: a
/// firewall marks it there by that interface. The new header is all zeros, and the kernel looks
/// only at its EtherType.
fn bounce(a: &mut Assembler, l2: u32, facts: &Facts, (bounced, nowhere): (Label, Label)) {
    a.bind(bounced);
    note_bounced(a, l2, facts);
    facts.load_uplink(a, IFINDEX);
    let (v6, unmarked) = (a.label(), a.label());
    facts.jump_unless_marked(a, R0, unmarked);
    clear_route_lookup(a, LOOKUP);
    jump_if_v6(a, v6);
    for (family, at) in [
        (Family::V4, ipv4::DESTINATION),
        (Family::V6, ipv6::DESTINATION),
    ] {
        if family == Family::V6 {
            a.bind(v6);
        }
        load_bytes(a, l2 + at, LOOKUP + fib::SOURCE, family.bytes());
        facts.marked.find_link(a, (family, LOOKUP), IFINDEX);
        if family == Family::V4 {
            a.jump(unmarked);
        }
    }
    a.bind(unmarked);
    a.jump_if(IFINDEX, If::Eq, 0, nowhere);
    add_empty_header(a, ethernet::LEN as u32);
    a.load(Size::W, R0, PACKET, skb::PROTOCOL);
    a.store(Size::H, R10, ETHERTYPE, R0);
    a.mov(R1, PACKET);
    a.mov(R2, ethernet::TYPE);
    a.mov(R3, R10);
    a.alu(Alu::Add, R3, i32::from(ETHERTYPE));
    a.mov(R4, 2);
    a.mov(R5, 0);
    a.call(Helper::SkbStoreBytes);
    a.mov(R0, BOUNCED);
    a.store(Size::W, PACKET, skb::MARK, R0);
    a.mov(R1, IFINDEX);
    a.mov(R2, BPF_F_INGRESS);
    a.call(Helper::Redirect);
    a.exit();
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::os::fd::AsFd;
    use std::process::Command;

    use super::*;
    use crate::kernel::bpf::test_run::{nanoseconds, run};
    use crate::kernel::netlink::Netlink;
    use crate::kernel::programs::testing::{L2, Packet, TC_ACT_REDIRECT, frame, moves, ports, tcp};
    use crate::kernel::programs::{Hop, MarkedWay};
    use crate::kernel::testing::{in_fresh_namespace, sysctl};
    use crate::packet::ACK;

    /// Two ways out, and which replies may take the first one.
    const TWO_WAYS: &str = "
        ip link set lo up
        for way in 1 2; do
            ip link add wan$way type bridge
            ip addr add 10.99.$way.1/24 dev wan$way
            ip addr add fd00:99:$way::1/64 dev wan$way nodad
            ip link set wan$way up
        done
        ip route add default via 10.99.1.254
        ip -6 route add default via fd00:99:1::fe
        ip route add 198.18.0.0/24 via 10.99.1.253
        ip -6 route add 2001:db8:d::/64 via fd00:99:1::fd
        ip route add default via 10.99.2.254 table 102
        ip -6 route add default via fd00:99:2::fe table 102";

    fn shell(script: &str) {
        let done = Command::new("sh").args(["-ec", script]).status().unwrap();
        assert!(done.success(), "{script}");
    }

    fn facts() -> Facts {
        for family in ["ipv4", "ipv6"] {
            sysctl(&format!("net/{family}/conf/lo/forwarding"), "1");
        }
        Facts::new(&moves(&["192.0.2.5", "2001:db8:a::5"])).unwrap()
    }

    /// The moved addresses, and a client of each.
    const ENDS: [(&str, &str); 2] = [
        ("192.0.2.5", "203.0.113.7"),
        ("2001:db8:a::5", "2001:db8:c::7"),
    ];

    #[test]
    fn what_no_rule_takes_is_marked_if_it_would_leave_by_the_other_way() {
        in_fresh_namespace(|| {
            shell(TWO_WAYS);
            let netlink = Netlink::new().unwrap();
            let [wan1, wan2] =
                ["wan1", "wan2"].map(|name| netlink.link_by_name(name).unwrap().unwrap().index);
            let facts = facts();
            let program = return_path_behind(L2, &facts).unwrap().load().unwrap();
            let mark = |packet: &Packet| {
                let outcome = run(program.as_fd(), &frame(&packet.bytes()));
                assert_eq!(outcome.verdict, TC_ACT_REDIRECT, "{packet:?}");
                outcome.mark
            };
            let way = |hop: Hop| MarkedWay {
                link: wan2,
                mark: 7,
                instead_of: [None, Some(hop), None, None],
            };
            let gateways = ["10.99.1.254", "fd00:99:1::fe"].map(|text| text.parse().unwrap());
            for ((moved, client), gateway) in ENDS.into_iter().zip(gateways) {
                let reply = Packet::new(moved, client, TCP, tcp(80, 40_000, ACK));
                let wan1 = (wan1, Some(gateway));
                let set = |prefix: &str, way: MarkedWay| {
                    let ways = BTreeMap::from([(prefix.parse().unwrap(), way)]);
                    facts.set_marked(&ways).unwrap();
                };
                assert_eq!(mark(&reply), 0);
                set(moved, way(wan1));
                assert_eq!(mark(&reply), 7);
                set(moved, way((0, None)));
                assert_eq!(mark(&reply), 0, "there is a route");
                set(moved, way((wan1.0, None)));
                assert_eq!(mark(&reply), 7, "any gateway");
                let [(around, other), (around6, other6)] = [
                    ("192.0.2.0/29", "192.0.2.8/29"),
                    ("2001:db8:a::/64", "2001:db8:b::/64"),
                ];
                let is_v4 = moved.contains('.');
                set(if is_v4 { other } else { other6 }, way(wan1));
                assert_eq!(mark(&reply), 0, "it is not among them");
                set(if is_v4 { around } else { around6 }, way(wan1));
                assert_eq!(mark(&reply), 7);
                // What would leave by another interface or gateway goes there: to a client in its
                // network, and to one behind another router of the other way's.
                let others = if is_v4 {
                    ["10.99.2.7", "10.99.1.7", "198.18.0.7"]
                } else {
                    ["fd00:99:2::7", "fd00:99:1::7", "2001:db8:d::7"]
                };
                for other in others {
                    let other = Packet::new(moved, other, TCP, tcp(80, 40_000, ACK));
                    assert_eq!(mark(&other), 0, "{other:?}");
                }
                // One address of the prefix leaves as it is.
                let ways = [
                    (around, way(wan1)),
                    (around6, way(wan1)),
                    (moved, MarkedWay::NONE),
                ];
                let ways = ways.map(|(prefix, way)| (prefix.parse().unwrap(), way));
                facts.set_marked(&ways.into()).unwrap();
                assert_eq!(mark(&reply), 0, "it is excepted");
                let beside = if is_v4 { "192.0.2.6" } else { "2001:db8:a::6" };
                let beside = Packet::new(beside, client, TCP, tcp(80, 40_000, ACK));
                assert_eq!(mark(&beside), 7);
                facts.set_marked(&BTreeMap::new()).unwrap();
                assert_eq!(mark(&reply), 0);
            }
            // A default route of IPv4 by a gateway of IPv6.
            shell("ip -4 route replace default via inet6 fd00:99:1::fe dev wan1");
            let (moved, client) = ENDS[0];
            let reply = Packet::new(moved, client, TCP, tcp(80, 40_000, ACK));
            let by = |gateway: &str| way((wan1, Some(gateway.parse().unwrap())));
            for (gateway, expected) in [("fd00:99:1::fe", 7), ("fd00:99:1::fd", 0)] {
                let ways = BTreeMap::from([(moved.parse().unwrap(), by(gateway))]);
                facts.set_marked(&ways).unwrap();
                assert_eq!(mark(&reply), expected, "{gateway}");
            }
        });
    }

    #[test]
    fn what_is_bounced_arrives_at_the_uplink_where_its_address_has_no_way() {
        in_fresh_namespace(|| {
            shell(TWO_WAYS);
            let netlink = Netlink::new().unwrap();
            let wan1 = netlink.link_by_name("wan1").unwrap().unwrap().index;
            let facts = facts();
            let program = return_path_behind(L2, &facts).unwrap().load().unwrap();
            for (moved, client) in ENDS {
                let request = Packet::new(client, moved, TCP, tcp(40_000, 80, ACK));
                let verdict = || run(program.as_fd(), &frame(&request.bytes())).verdict;
                assert_eq!(verdict(), TC_ACT_SHOT, "there is no uplink");
                let ways = BTreeMap::from([(moved.parse().unwrap(), MarkedWay::NONE)]);
                facts.set_marked(&ways).unwrap();
                assert_eq!(verdict(), TC_ACT_SHOT, "that is no interface");
                facts.set_uplink(Some(wan1), false);
                assert_eq!(verdict(), TC_ACT_REDIRECT);
                facts.set_uplink(None, false);
            }
        });
    }

    #[test]
    fn rules_are_asked_with_all_that_a_packet_has() {
        in_fresh_namespace(|| {
            shell(TWO_WAYS);
            let netlink = Netlink::new().unwrap();
            let wan2 = netlink.link_by_name("wan2").unwrap().unwrap().index;
            let facts = facts();
            // What leaves by the second way bears a mark.
            let way = MarkedWay {
                link: wan2,
                mark: 7,
                instead_of: [Some((wan2, None)), None, None, None],
            };
            let prefixes = ENDS.map(|(moved, _)| moved.parse().unwrap());
            let ways = BTreeMap::from(prefixes.map(|prefix| (prefix, way.clone())));
            facts.set_marked(&ways).unwrap();
            let program = return_path_behind(L2, &facts).unwrap().load().unwrap();
            for (rule, selected) in [
                (
                    "ipproto tcp sport 443",
                    [true, false, false, false, false, true, false],
                ),
                (
                    "ipproto udp dport 4000",
                    [false, true, false, true, false, false, false],
                ),
                ("ipproto udp", [false, true, true, true, true, false, false]),
                (
                    "ipproto gre",
                    [false, false, false, false, false, false, true],
                ),
                (
                    "dsfield 0x10",
                    [false, false, false, false, false, true, false],
                ),
                (
                    "iif lo ipproto tcp",
                    [true, false, false, false, false, true, false],
                ),
            ] {
                for (ip, (moved, client)) in ["ip", "ip -6"].into_iter().zip(ENDS) {
                    shell(&format!("{ip} rule add pref 100 {rule} lookup 102"));
                    let tcp443 = Packet::new(moved, client, TCP, tcp(443, 40_000, ACK));
                    let udp = Packet::new(moved, client, UDP, ports(53, 4_000));
                    let first = Packet {
                        fragment: Some((9, 0, true)),
                        ..udp.clone()
                    };
                    let options = Packet {
                        options: 2,
                        ..udp.clone()
                    };
                    let later = Packet {
                        fragment: Some((9, 3, false)),
                        ..udp.clone()
                    };
                    let gre = Packet::new(moved, client, 47, vec![0; 24]);
                    let mut with_class = tcp443.bytes();
                    // With congestion experienced, which is no part of the class.
                    if moved.contains('.') {
                        with_class[1] = 0x13;
                    } else {
                        with_class[0] |= 0x01;
                        with_class[1] |= 0x30;
                    }
                    let all = [
                        tcp443.bytes(),
                        udp.bytes(),
                        first.bytes(),
                        options.bytes(),
                        later.bytes(),
                        with_class,
                        gre.bytes(),
                    ];
                    let is_taken = |packet: &Vec<u8>| {
                        let outcome = run(program.as_fd(), &frame(packet));
                        assert_eq!(outcome.verdict, TC_ACT_REDIRECT);
                        outcome.mark == 7
                    };
                    facts.set_detailed(true);
                    let taken = all.each_ref().map(is_taken);
                    assert_eq!(taken, selected, "{ip} rule {rule}");
                    facts.set_detailed(false);
                    assert_eq!(all.each_ref().map(is_taken), [false; 7]);
                    shell(&format!("{ip} rule del pref 100"));
                }
            }
        });
    }

    #[test]
    #[ignore = "a measurement: cargo test --lib -- --ignored --nocapture what_a_way_back_costs"]
    fn what_a_way_back_costs() {
        in_fresh_namespace(|| {
            shell(TWO_WAYS);
            // Nothing is sent, or the same packet would grow each time.
            shell(
                "ip route replace unreachable default
                ip -6 route del default
                ip -6 route add unreachable default",
            );
            let facts = facts();
            let program = return_path_behind(L2, &facts).unwrap().load().unwrap();
            for (moved, client) in ENDS {
                let reply = Packet::new(moved, client, TCP, tcp(80, 40_000, ACK));
                let cost = || nanoseconds(program.as_fd(), &frame(&reply.bytes()));
                eprintln!("{moved}: {} ns", cost());
                facts.set_detailed(true);
                eprintln!("{moved}: {} ns where rules go by ports", cost());
                facts.set_detailed(false);
                let way = MarkedWay {
                    link: LO,
                    mark: 7,
                    instead_of: [Some((LO, None)), None, None, None],
                };
                let ways = BTreeMap::from([(moved.parse().unwrap(), way)]);
                facts.set_marked(&ways).unwrap();
                eprintln!("{moved}: {} ns where it is asked for a mark", cost());
                facts.set_marked(&BTreeMap::new()).unwrap();
            }
        });
    }
}
