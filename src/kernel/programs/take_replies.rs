//! Takes replies of known flows into the TUN, and remembers the conversations that this host has
//! directly: for the egress of the new server's links.
//!
//! It is the last that a packet meets before the link. So no rule, route or mark on the way there
//! makes a difference, and it is the same for sockets of this host and for what it forwards.
//!
//! A TCP socket that once sent into the tunnel does so as long as it lives. Its connection is then
//! known even when the flow is forgotten, and its packets need not be read. What answers a SYN that
//! did not come by the tunnel ends what was known of the same addresses and ports.
//!
//! All fragments of a reply follow the first, and an ICMP error follows the packet that it quotes.
//! When the daemon is dead its TUN is gone, and the kernel drops what is redirected there: known
//! flows fall silent, and nothing leaves with this host's own address.
//!
//! ```text
//! if (skb->vlan_present) pass;
//! if (UDP from the tunnel's own port && storage(sockets) == OF_TUNNEL) pass;
//! if (it is from a TCP socket with storage(sockets) == AS_IT_IS) return redirect(tun, 0);
//! parse();                                           // other: pass; none, later, quoted: below
//! if (TCP && it = shifted(LEAVING, key)) {                    // see `shifted`
//!     exchange the client's port;
//!     if (it is direct) goto leaves;
//! } else if (TCP && shifted(BY_TUNNEL, key)) goto miss;
//! else if (storage(sockets) == SHIFTED) return redirect(tun, 0);
//! if ((flow = lookup(flows, key))) {
//!     if (TCP) {
//!         if (SYN and ACK && !flow->opening) { delete(flows, key); forget own; goto leaves; }
//!         if (SYN without ACK) { delete(flows, key); goto miss; }
//!         if (it is from a TCP socket) storage(sockets) = it is shifted ? SHIFTED : AS_IT_IS;
//!         else if (no socket sends it) flow->behind = 1;
//!     } else {
//!         if (it began here) goto known;
//!         if (flow->unawaited && from a socket at this port) { delete(flows, key); goto miss; }
//!         if (now - flow->asked_directly <= ANSWERED_DIRECTLY) goto unknown;
//! known:  if (now - flow->seen > REPLY_IDLE) goto miss;
//!         if (now - flow->seen > REFRESH) flow->seen = now;
//!     }
//! hit:
//!     if (FRAGMENT == FIRST_FRAGMENT) update(fragments, key by identification);
//!     return redirect(tun, 0);
//! }
//! miss:   if (skb->mark == DELIVERED) { skb->mark = 0; pass; }
//!         if (it calls a moved address) return redirect(tun, 0);                 // see `inside`
//!         if (it begins here and is chosen by its port) goto hit;              // see `outgoing`
//!         // TCP of a socket of this host needs no memory: the socket is there to be asked
//!     if (TCP && !forwarded) { count it with its first packet; goto unknown; } // see `directly`
//!     if (TCP) {
//!         if (RST, or SYN and ACK) delete(own, key);
//!         else if (SYN) update(own, key, now);
//!         else if (FIN) update(own, key, CLOSED);
//!         else { if (!lookup(own, key)) count it; refresh(own, key); }
//!     } else if (!ICMP) {
//!         if ((come = lookup(in, key)) ? !come->unawaited || !from a socket at this port
//!                                      : counters[PRESSED]) {
//!             if (come) count it with its first answer;
//!             goto unknown;
//!         }
//!         if (!come && it is related) goto hit;      // see `related`
//!         refresh(own, key); refresh(own, remote end);
//!     }
//! unknown: // a first fragment of another flow ends the entry for its identification
//!     if (FRAGMENT == FIRST_FRAGMENT) delete(fragments, key by identification);
//!     goto leaves;
//! quoted: if (lookup(flows, key) || lookup(callers, key)) return redirect(tun, 0);
//!         goto leaves;
//! none:   if (a query that calls a moved address) return redirect(tun, 0); else goto leaves;
//! later:  if (!lookup(fragments, key by identification)) goto leaves;
//!         if (FRAGMENT == LAST_FRAGMENT) delete(fragments, key by identification);
//!         return redirect(tun, 0);
//! leaves: if (skb->mark == DELIVERED) { skb->mark = 0; pass; }
//!         if (it is from a moved address) return redirect(tun, 0);       // see `outgoing`
//! pass:   return TC_ACT_UNSPEC;
//! ```

use Reg::{R0, R1, R7, R8, R10};

use super::directly::{count_answer, count_connection, count_end};
use super::flows::{
    ANSWERED_DIRECTLY, BEGUN_HERE, CLOSED, Counter, FLOW_ASKED_DIRECTLY, FLOW_BEHIND, FLOW_OPENING,
    FLOW_SEEN, FLOW_UNAWAITED, FlowMaps, KEY_LAST, REFRESH, REPLY_IDLE, VALUE, counter_at, enter,
    jump_if_within, look_up, remove,
};
use super::headers::{ports, skb, sock};
use super::inside::{jump_if_call, jump_if_query};
use super::named::{enter_begun, refresh_begun};
use super::outgoing::{Chosen, keep_from_leaving, take_by_port};
use super::parse::{
    FLAGS, Side, Ways, follow_first_fragment, forget_first_fragment, load_syn, parse,
    remember_first_fragment, sort_out, wire,
};
use super::phrases::{
    PACKET, PROTOCOL, TC_ACT_UNSPEC, jump_if_icmp, jump_unless_delivered, keep_packet,
    pass_if_tagged, redirect_to, verdict,
};
use super::related::{jump_if_related, remember_remote_end};
use super::shifted::{Coming, jump_unless_any, look_up_coming, shift_leaving};
use super::sockets::{
    AS_IT_IS, SHIFTED, SOCKET, jump_unless_from_own_port, jump_unless_of_tunnel, load_tcp_socket,
    look_up_taken, remember_taken,
};
use crate::kernel::bpf::{Alu, Assembler, BpfError, If, Label, Program, Reg, Size};
use crate::model::moved::{TCP, UDP};
use crate::packet::{ACK, FIN, RST, SYN};

/// The program's name.
pub const TAKE_REPLIES: &str = "ipmoved_reply";

/// The flow's value in the map, once the packet is read.
const FLOW: Reg = R7;

/// The program for a link and the TUN. `tunnel_port` is the tunnel's own on this host, and
/// `outgoing` what leaves through the tunnel because of its port.
///
/// # Errors
/// If the program is too large.
pub fn take_replies(
    maps: &FlowMaps,
    l2_header: u32,
    tun_ifindex: u32,
    tunnel_port: u16,
    outgoing: &[Chosen],
) -> Result<Program, BpfError> {
    let mut asm = Assembler::new();
    let a = &mut asm;
    let ways = Ways::new(a);
    let (pass, hit, miss, unknown) = (a.label(), a.label(), a.label(), a.label());
    let leaves = a.label();
    keep_packet(a);
    pass_if_tagged(a, pass);
    let (read, from_socket, of_tunnel) = (a.label(), a.label(), a.label());
    a.store(Size::W, R10, TAKEN_AS, AS_IT_IS);
    // The tunnel itself is most of what leaves, and TCP of sockets that are known.
    sort_out(
        a,
        l2_header,
        ports::SOURCE,
        tunnel_port,
        from_socket,
        read,
        of_tunnel,
    );
    a.bind(of_tunnel);
    jump_unless_of_tunnel(a, maps.sockets.as_ref(), read);
    a.jump(pass);
    a.bind(from_socket);
    if let Some(sockets) = &maps.sockets {
        load_tcp_socket(a, read, read);
        look_up_taken(a, sockets, SOCKET);
        a.jump_if_wide(R0, If::Eq, 0, read);
        let as_it_is = a.label();
        a.load(Size::W, R0, R0, 0);
        a.jump_if(R0, If::Eq, AS_IT_IS, as_it_is);
        a.store(Size::W, R10, TAKEN_AS, SHIFTED);
        a.jump(read);
        a.bind(as_it_is);
        redirect_to(a, tun_ifindex);
    }
    a.bind(read);
    parse(a, l2_header, Side::Host, ways);

    a.bind(ways.flow);
    let (flow, of_tcp, by_tunnel) = (a.label(), a.label(), a.label());
    a.jump_if(PROTOCOL, If::Eq, i32::from(TCP), of_tcp);
    // The tunnel once more, behind options.
    a.jump_if(PROTOCOL, If::Ne, i32::from(UDP), flow);
    a.load(Size::H, R0, R10, KEY_LAST + 2);
    a.jump_if(R0, If::Ne, wire(i32::from(tunnel_port)), flow);
    jump_unless_of_tunnel(a, maps.sockets.as_ref(), flow);
    a.jump(pass);
    a.bind(of_tcp);
    let unshifted = a.label();
    jump_unless_any(a, maps, unshifted);
    shift_leaving(a, maps, by_tunnel, leaves);
    // The flow with these ports has another one here, so this is the direct connection.
    look_up_coming(a, maps, Coming::ByTunnel);
    a.jump_if_wide(R0, If::Ne, 0, miss);
    a.bind(unshifted);
    a.load(Size::W, R0, R10, TAKEN_AS);
    a.jump_if(R0, If::Ne, SHIFTED, flow);
    // It was one of the tunnel, whose port is forgotten: it must not leave all the same.
    redirect_to(a, tun_ifindex);
    a.bind(by_tunnel);
    a.store(Size::W, R10, TAKEN_AS, SHIFTED);
    a.bind(flow);
    look_up(a, &maps.flows);
    a.jump_if_wide(R0, If::Eq, 0, miss);
    a.mov(FLOW, R0);
    let (without_tcp, known, fresh) = (a.label(), a.label(), a.label());
    a.jump_if(PROTOCOL, If::Ne, i32::from(TCP), without_tcp);
    load_syn(a);
    let begins = a.label();
    a.jump_if(R0, If::Eq, i32::from(SYN), begins);
    a.jump_if(R0, If::Ne, i32::from(SYN | ACK), known);
    a.load(Size::W, R0, FLOW, FLOW_OPENING);
    a.jump_if(R0, If::Ne, 0, hit);
    remove(a, &maps.flows);
    remove(a, &maps.own);
    a.jump(leaves);
    // Nobody is answered by it, so whatever came under its addresses was not for this connection.
    a.bind(begins);
    remove(a, &maps.flows);
    a.jump(miss);
    a.bind(known);
    if let Some(sockets) = &maps.sockets {
        let sent_here = a.label();
        a.load(Size::Dw, R0, PACKET, skb::SK);
        a.jump_if_wide(R0, If::Ne, 0, sent_here);
        a.load(Size::W, R0, FLOW, FLOW_BEHIND);
        a.jump_if(R0, If::Ne, 0, hit);
        a.store(Size::W, FLOW, FLOW_BEHIND, 1);
        a.jump(hit);
        a.bind(sent_here);
        load_tcp_socket(a, hit, hit);
        remember_taken(a, sockets, TAKEN_AS);
    }
    a.jump(hit);
    a.bind(without_tcp);
    let (answer, by_the_tunnel) = (a.label(), a.label());
    a.load(Size::W, R0, FLOW, FLOW_UNAWAITED);
    a.jump_if(R0, If::Eq, 0, answer);
    a.jump_if(R0, If::Eq, BEGUN_HERE, by_the_tunnel);
    jump_unless_from_own_port(a, answer);
    remove(a, &maps.flows);
    a.jump(miss);
    a.bind(answer);
    a.load(Size::Dw, R0, FLOW, FLOW_ASKED_DIRECTLY);
    a.jump_if_wide(R0, If::Eq, 0, by_the_tunnel);
    jump_if_within(a, (FLOW, FLOW_ASKED_DIRECTLY), ANSWERED_DIRECTLY, unknown);
    a.bind(by_the_tunnel);
    jump_if_within(a, (FLOW, FLOW_SEEN), REFRESH, hit);
    jump_if_within(a, (FLOW, FLOW_SEEN), REPLY_IDLE, fresh);
    a.jump(miss);
    a.bind(fresh);
    a.store(Size::Dw, FLOW, FLOW_SEEN, R0);
    a.bind(hit);
    let redirect = a.label();
    remember_first_fragment(a, &maps.fragments, redirect);
    a.bind(redirect);
    redirect_to(a, tun_ifindex);

    a.bind(miss);
    pass_turned(a, pass);
    jump_if_call(a, maps, tun_ifindex, hit);
    let not_chosen = a.label();
    take_by_port(a, maps, outgoing, l2_header, hit, not_chosen);
    a.bind(not_chosen);
    remember_own(a, maps, hit, unknown);
    a.bind(unknown);
    forget_first_fragment(a, &maps.fragments, leaves);
    a.jump(leaves);

    a.bind(ways.quoted);
    look_up(a, &maps.flows);
    a.jump_if_wide(R0, If::Ne, 0, redirect);
    look_up(a, &maps.inside.callers);
    a.jump_if_wide(R0, If::Eq, 0, leaves);
    redirect_to(a, tun_ifindex);

    a.bind(ways.none);
    jump_if_query(a, &maps.inside, tun_ifindex, hit, leaves);

    a.bind(ways.later);
    let follows = a.label();
    follow_first_fragment(a, &maps.fragments, follows, leaves);
    a.bind(follows);
    redirect_to(a, tun_ifindex);

    a.bind(leaves);
    // Later fragments of such an answer, and ICMP errors, come by other ways.
    pass_turned(a, pass);
    keep_from_leaving(a, maps, l2_header, tun_ifindex, pass);
    a.bind(ways.other);
    a.bind(pass);
    verdict(a, TC_ACT_UNSPEC);
    asm.finish(TAKE_REPLIES)
}

/// Where the stack keeps how the packets of a TCP socket are taken: as they are, or shifted.
const TAKEN_AS: i16 = -280;

/// Lets an answer to a call leave, whose source is a moved address and which needs no memory.
fn pass_turned(a: &mut Assembler, pass: Label) {
    let other = a.label();
    jump_unless_delivered(a, other);
    a.jump(pass);
    a.bind(other);
}

/// Remembers a direct conversation, and jumps to `done`; to `related` if it is none.
fn remember_own(a: &mut Assembler, maps: &FlowMaps, related: Label, done: Label) {
    let (tcp, forwarded, fresh, new) = (a.label(), a.label(), a.label(), a.label());
    let (ended, refresh, closed, went_on) = (a.label(), a.label(), a.label(), a.label());
    a.jump_if(PROTOCOL, If::Eq, i32::from(TCP), tcp);
    jump_if_icmp(a, done);
    look_up(a, &maps.own);
    a.jump_if_wide(R0, If::Ne, 0, refresh);
    look_up(a, &maps.direct);
    let come = a.label();
    a.jump_if_wide(R0, If::Ne, 0, come);
    jump_if_related(a, maps, related);
    counter_at(a, maps, Counter::Pressed, new);
    a.load(Size::Dw, R0, R0, 0);
    a.jump_if_wide(R0, If::Ne, 0, done);
    a.jump(new);
    a.bind(come);
    a.mov(FLOW, R0);
    count_answer(a, maps, FLOW, new, done);

    a.bind(tcp);
    if maps.sockets.is_some() {
        load_tcp_socket(a, forwarded, done);
        // Nobody but its own interface finds a socket that is bound to one.
        a.load(Size::W, R0, SOCKET, sock::BOUND_DEV_IF);
        a.jump_if(R0, If::Ne, 0, forwarded);
        count_connection(a, maps, SOCKET);
        a.jump(done);
    }
    a.bind(forwarded);
    a.load(Size::W, R8, R10, FLAGS);
    a.jump_if(R8, If::Set, i32::from(RST), ended);
    a.mov(R0, R8);
    a.alu(Alu::And, R0, i32::from(SYN | ACK));
    a.jump_if(R0, If::Eq, i32::from(SYN | ACK), ended);
    a.jump_if(R0, If::Eq, i32::from(SYN), new);
    a.jump_if(R8, If::Set, i32::from(FIN), closed);
    look_up(a, &maps.own);
    a.jump_if_wide(R0, If::Eq, 0, went_on);
    a.load(Size::Dw, R1, R0, 0);
    a.jump_if_wide(R1, If::Eq, CLOSED, done);

    a.bind(refresh);
    a.mov(FLOW, R0);
    jump_if_within(a, (FLOW, 0), REFRESH, fresh);
    refresh_begun(a, FLOW);
    remember_remote_end(a, maps);
    a.bind(fresh);
    a.jump(done);
    a.bind(went_on);
    count_end(a, maps);
    a.bind(new);
    remember_remote_end(a, maps);
    enter_begun(a, maps);
    a.jump(done);
    a.bind(closed);
    a.store(Size::Dw, R10, VALUE, CLOSED);
    enter(a, &maps.own);
    a.jump(done);
    a.bind(ended);
    remove(a, &maps.own);
    a.jump(done);
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::{AsFd, OwnedFd};
    use std::time::Duration;

    use super::*;
    use crate::flow::class::{TCP_ESTABLISHED, TCP_HALF_CLOSED, TCP_OPENING, TCP_RESET};
    use crate::kernel::bpf::test_run::{nanoseconds, run};
    use crate::kernel::programs::arrivals::arrivals;
    use crate::kernel::programs::deliver::deliver_behind;
    use crate::kernel::programs::flows::Counter;
    use crate::kernel::programs::headers::{icmpv4, icmpv6};
    use crate::kernel::programs::phrases::{DELIVERED, TC_ACT_SHOT};
    use crate::kernel::programs::testing::{
        L2, Packet, TC_ACT_REDIRECT, frame, icmp, ports, taken, tcp,
    };
    use crate::kernel::testing::in_fresh_namespace;
    use crate::packet::{MAX_EXTENSION_HEADERS, PSH};

    /// All programs of the new server, with a memory of their own.
    struct Steering {
        maps: FlowMaps,
        deliver: OwnedFd,
        arrivals: OwnedFd,
        egress: OwnedFd,
    }

    impl Steering {
        fn new() -> Self {
            Self::with_room_for(1000)
        }

        fn with_room_for(flows: u32) -> Self {
            let maps = FlowMaps::with_room(flows).expect("run the tests as root");
            let deliver = deliver_behind(L2, &maps, 1).unwrap();
            Self {
                deliver: deliver.load().unwrap(),
                arrivals: arrivals(&maps, L2, 51820).unwrap().load().unwrap(),
                egress: take_replies(&maps, L2, 1, 51820, &[])
                    .unwrap()
                    .load()
                    .unwrap(),
                maps,
            }
        }

        /// Comes out of the tunnel; returns whether it is delivered.
        fn arrives(&self, packet: &Packet) -> bool {
            match run(self.deliver.as_fd(), &frame(&packet.bytes())).verdict {
                TC_ACT_UNSPEC => true,
                TC_ACT_SHOT => false,
                other => panic!("verdict {other} for {packet:?}"),
            }
        }

        /// Comes out of the tunnel and is delivered; returns the source port that this host sees.
        fn arrives_from(&self, packet: &Packet) -> u16 {
            let outcome = run(self.deliver.as_fd(), &frame(&packet.bytes()));
            assert_eq!(outcome.verdict, TC_ACT_UNSPEC);
            port_at(packet, &outcome.frame, 0)
        }

        /// Comes from the wire; returns the source port that this host sees.
        fn comes_from(&self, packet: &Packet) -> u16 {
            let outcome = run(self.arrivals.as_fd(), &frame(&packet.bytes()));
            assert_eq!(outcome.verdict, TC_ACT_UNSPEC);
            port_at(packet, &outcome.frame, 0)
        }

        /// Leaves: whether it is taken into the tunnel, and its destination port then.
        fn leaves_for(&self, packet: &Packet) -> (bool, u16) {
            let outcome = run(self.egress.as_fd(), &frame(&packet.bytes()));
            let port = port_at(packet, &outcome.frame, 2);
            (outcome.verdict == TC_ACT_REDIRECT, port)
        }

        /// Comes from the wire.
        fn comes_directly(&self, packet: &Packet) {
            assert!(!taken(self.arrivals.as_fd(), packet));
        }

        /// Leaves, and is taken into the tunnel.
        fn is_steered(&self, packet: &Packet) -> bool {
            taken(self.egress.as_fd(), packet)
        }
    }

    const ENDS: [(&str, &str); 2] = [
        ("203.0.113.7", "198.51.100.2"),
        ("2001:db8:c::7", "2001:db8:b::2"),
    ];

    /// A port of a frame's TCP header, whose checksum is as right as that of `before`.
    fn port_at(before: &Packet, frame: &[u8], at: usize) -> u16 {
        let transport = L2 as usize + if before.src.is_ipv4() { 20 } else { 40 };
        let word = |bytes: &[u8], at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let sum = |bytes: &[u8], start: usize| {
            let words = bytes[start..].chunks_exact(2);
            let sum: u32 = words.map(|pair| u32::from(word(pair, 0))).sum();
            (sum & 0xffff) + (sum >> 16)
        };
        assert_eq!(
            sum(frame, transport) % 0xffff,
            sum(&before.payload, 0) % 0xffff
        );
        word(frame, transport + at)
    }

    #[test]
    #[ignore = "a measurement: cargo test --lib -- --ignored --nocapture what_a_shifted_connection"]
    fn what_a_shifted_connection_costs_others() {
        for (client, here) in ENDS {
            let steering = Steering::new();
            let in_ = |port| Packet::new(client, here, TCP, tcp(port, 80, ACK));
            let out = |port| Packet::new(here, client, TCP, tcp(80, port, ACK));
            let cost = |program: &OwnedFd, packet: &Packet| {
                nanoseconds(program.as_fd(), &frame(&packet.bytes()))
            };
            // One of the tunnel, and one of the stack.
            assert!(steering.arrives(&Packet::new(client, here, TCP, tcp(50_000, 80, SYN))));
            for shifts in [0, 1] {
                steering.maps.shifts.set(0, shifts);
                eprintln!(
                    "{shifts}: from the wire {}; leaves directly {}; into the tunnel {}",
                    cost(&steering.arrivals, &in_(40_000)),
                    cost(&steering.egress, &out(40_000)),
                    cost(&steering.egress, &out(50_000)),
                );
            }
        }
    }

    #[test]
    fn a_second_connection_with_the_same_ports_has_another_one_inside() {
        for (client, here) in ENDS {
            let in_ = |flags| Packet::new(client, here, TCP, tcp(40_000, 80, flags));
            let out = |port, flags| Packet::new(here, client, TCP, tcp(80, port, flags));
            // Directly first.
            let steering = Steering::new();
            assert!(!steering.is_steered(&out(40_000, ACK)));
            assert!(!steering.arrives(&in_(ACK)));
            let inside = steering.arrives_from(&in_(SYN));
            assert!(inside >= 0x8000 && inside != 40_000);
            for _ in 0..2 {
                assert_eq!(steering.arrives_from(&in_(SYN)), inside);
                assert_eq!(steering.leaves_for(&out(inside, SYN | ACK)), (true, 40_000));
                assert_eq!(steering.arrives_from(&in_(ACK)), inside);
                assert_eq!(steering.leaves_for(&out(inside, PSH | ACK)), (true, 40_000));
                assert_eq!(steering.comes_from(&in_(ACK)), 40_000);
                assert_eq!(steering.leaves_for(&out(40_000, ACK)), (false, 40_000));
            }
            // It is remembered though the flow is not.
            steering
                .maps
                .flows
                .remove_all(&steering.maps.flows.keys().unwrap().concat())
                .unwrap();
            assert_eq!(steering.arrives_from(&in_(ACK)), inside);
            assert_eq!(steering.leaves_for(&out(inside, ACK)), (true, 40_000));
            // What this host resets is forgotten soon, and its flow does not take the direct one.
            let later = |time| super::super::now() + time;
            let second = Duration::from_secs(1);
            let sweep = |steering: &Steering, time| {
                let (later, since) = (later(time), Duration::ZERO);
                (steering.maps.sweep_shifted(later, since, |_| true)).unwrap();
                steering.maps.shifted.keys().unwrap().len()
            };
            assert_eq!(steering.comes_from(&in_(RST)), 40_000);
            assert_eq!(steering.arrives_from(&in_(RST)), inside);
            assert_eq!(sweep(&steering, TCP_RESET + second), 2);
            assert_eq!(steering.leaves_for(&out(inside, RST)), (true, 40_000));
            assert_eq!(sweep(&steering, TCP_RESET + second), 0);
            assert_eq!(steering.maps.shifts.get(0), 0);
            assert_eq!(steering.leaves_for(&out(40_000, ACK)), (false, 40_000));
            assert!(!steering.arrives(&in_(ACK)));

            // By the tunnel first.
            let steering = Steering::new();
            assert_eq!(steering.arrives_from(&in_(SYN)), 40_000);
            assert_eq!(steering.leaves_for(&out(40_000, SYN | ACK)), (true, 40_000));
            assert_eq!(steering.comes_from(&in_(ACK)), 40_000, "it begins nothing");
            let inside = steering.comes_from(&in_(SYN));
            assert!(inside >= 0x8000 && inside != 40_000);
            for _ in 0..2 {
                assert_eq!(steering.comes_from(&in_(SYN)), inside);
                assert_eq!(
                    steering.leaves_for(&out(inside, SYN | ACK)),
                    (false, 40_000)
                );
                assert_eq!(steering.comes_from(&in_(ACK)), inside);
                assert_eq!(steering.leaves_for(&out(inside, ACK)), (false, 40_000));
                assert_eq!(steering.arrives_from(&in_(ACK)), 40_000);
                assert_eq!(steering.leaves_for(&out(40_000, ACK)), (true, 40_000));
            }
            // The client has a connection by the very port.
            let taken = Packet::new(client, here, TCP, tcp(inside, 80, SYN));
            let another = steering.comes_from(&taken);
            assert!(another >= 0x8000 && another != inside && another != 40_000);
            assert_eq!(steering.leaves_for(&out(another, ACK)), (false, inside));
            // All others are left alone.
            let other = Packet::new(client, here, TCP, tcp(40_001, 80, SYN));
            assert_eq!(steering.comes_from(&other), 40_001);
            // They fall silent.
            assert_eq!(sweep(&steering, TCP_OPENING - second), 4);
            assert_eq!(
                steering.leaves_for(&out(inside, FIN | ACK)),
                (false, 40_000)
            );
            assert_eq!(steering.comes_from(&in_(FIN | ACK)), inside);
            let minute = Duration::from_secs(60);
            assert_eq!(sweep(&steering, minute - second), 4);
            assert_eq!(sweep(&steering, minute + second), 2, "it ended");
            // Nothing came after the SYN.
            assert_eq!(sweep(&steering, TCP_OPENING + second), 0);
            assert_eq!(steering.maps.shifts.get(0), 0);
            assert_eq!(steering.comes_from(&in_(ACK)), 40_000);
        }
    }

    #[test]
    fn a_second_connection_is_remembered_only_as_long_as_it_may_live() {
        let second = Duration::from_secs(1);
        let start = super::super::now();
        let left = |steering: &Steering, time, knows| {
            let later = super::super::now() + time;
            (steering.maps.sweep_shifted(later, start, |_| knows)).unwrap();
            steering.maps.shifted.keys().unwrap().len()
        };
        for (client, here) in ENDS {
            let in_ = |flags| Packet::new(client, here, TCP, tcp(40_000, 80, flags));
            let out = |port, flags| Packet::new(here, client, TCP, tcp(80, port, flags));
            // By the tunnel second.
            let by_tunnel = || {
                let steering = Steering::new();
                assert!(!steering.is_steered(&out(40_000, ACK)));
                let inside = steering.arrives_from(&in_(SYN));
                assert_ne!(inside, 40_000);
                assert_eq!(steering.arrives_from(&in_(ACK)), inside);
                assert_eq!(steering.leaves_for(&out(inside, ACK)), (true, 40_000));
                (steering, inside)
            };
            let (steering, _) = by_tunnel();
            let silent = Duration::from_secs(600);
            assert_eq!(left(&steering, silent + second, true), 2);
            assert_eq!(left(&steering, silent - second, false), 2);
            assert_eq!(left(&steering, silent + second, false), 0);
            let (steering, _) = by_tunnel();
            assert_eq!(left(&steering, TCP_ESTABLISHED + second, true), 0);
            // This host closes, and hears no more of its client.
            let (steering, inside) = by_tunnel();
            let closes = out(inside, FIN | ACK);
            assert_eq!(steering.leaves_for(&closes), (true, 40_000));
            assert_eq!(left(&steering, TCP_HALF_CLOSED - second, true), 2);
            assert_eq!(left(&steering, TCP_HALF_CLOSED + second, true), 0);
            // Directly second: no daemon knows it, but it may live.
            let steering = Steering::new();
            assert_eq!(steering.arrives_from(&in_(SYN)), 40_000);
            assert_eq!(steering.leaves_for(&out(40_000, SYN | ACK)), (true, 40_000));
            let inside = steering.comes_from(&in_(SYN));
            assert_eq!(steering.comes_from(&in_(ACK)), inside);
            assert_eq!(left(&steering, TCP_ESTABLISHED - second, false), 2);
            assert_eq!(left(&steering, TCP_ESTABLISHED + second, false), 0);
            assert_eq!(steering.maps.shifts.get(0), 0);
        }
    }

    fn icmp_protocol(addr: &str) -> u8 {
        if addr.contains(':') {
            icmpv6::PROTOCOL
        } else {
            icmpv4::PROTOCOL
        }
    }

    /// Echo request and echo reply.
    fn echo(addr: &str) -> (u8, u8) {
        if addr.contains(':') {
            (128, 129)
        } else {
            (8, 0)
        }
    }

    #[test]
    fn replies_of_flows_from_the_tunnel_are_steered() {
        let steering = Steering::new();
        for (client, here) in ENDS {
            for (options, protocol) in [(0, UDP), (2, UDP), (0, TCP), (2, TCP)] {
                let client_port = 40_000 + u16::from(options);
                let mut request = Packet::new(client, here, protocol, ports(client_port, 53));
                request.options = options;
                let reply = Packet::new(here, client, protocol, ports(53, client_port));
                assert!(steering.arrives(&request));
                assert!(steering.is_steered(&reply), "{reply:?}");
                let elsewhere = Packet::new(here, client, protocol, ports(53, 41_000));
                assert!(!steering.is_steered(&elsewhere));
                let turned = Packet::new(client, here, protocol, ports(client_port, 53));
                assert!(!steering.is_steered(&turned));
                let gre = Packet::new(here, client, 47, ports(53, client_port));
                assert!(!steering.is_steered(&gre));
            }
            let (request, reply) = echo(here);
            let protocol = icmp_protocol(here);
            let pong = |id| Packet::new(here, client, protocol, icmp(reply, id));
            assert!(!steering.is_steered(&pong(7)));
            steering.arrives(&Packet::new(client, here, protocol, icmp(request, 7)));
            assert!(steering.is_steered(&pong(7)));
            assert!(!steering.is_steered(&pong(8)));
            // A query of this host itself with the same identifier.
            let own = Packet::new(here, client, protocol, icmp(request, 7));
            assert!(!steering.is_steered(&own));
            steering.arrives(&Packet::new(client, here, 50, ports(1, 2)));
            assert!(steering.is_steered(&Packet::new(here, client, 50, ports(3, 4))));
        }
    }

    #[test]
    fn errors_follow_the_packet_that_they_quote() {
        let steering = Steering::new();
        for (client, here) in ENDS {
            let (request, _) = echo(here);
            for (protocol, payload) in [
                (UDP, ports(40_000, 53)),
                (TCP, ports(40_000, 53)),
                (icmp_protocol(here), icmp(request, 9)),
                (50, ports(1, 2)),
            ] {
                for options in [0, 2] {
                    let mut packet = Packet::new(client, here, protocol, payload.clone());
                    // Errors quote IPv6 packets from their first header on.
                    packet.options = if here.contains(':') { 0 } else { options };
                    let mut other = packet.clone();
                    other.dst = if here.contains(':') {
                        "2001:db8:b::3".parse().unwrap()
                    } else {
                        "198.51.100.3".parse().unwrap()
                    };
                    steering.arrives(&packet);
                    assert!(steering.is_steered(&Packet::icmp_error(here, &packet)));
                    assert!(!steering.is_steered(&Packet::icmp_error(here, &other)));
                }
            }
        }
    }

    #[test]
    fn replies_are_steered_whatever_headers_the_request_had() {
        let steering = Steering::new();
        let (client, here) = ENDS[1];
        let request = Packet::new(client, here, UDP, ports(40_000, 53));
        steering.arrives(&request.behind_options(MAX_EXTENSION_HEADERS));
        assert!(steering.is_steered(&Packet::new(here, client, UDP, ports(53, 40_000))));
    }

    #[test]
    fn who_has_the_tunnels_port_is_steered_like_any_other() {
        let steering = Steering::new();
        for (client, here) in ENDS {
            let answer = Packet::new(here, client, UDP, ports(51820, 51820));
            assert!(!steering.is_steered(&answer));
            let steering = Steering::new();
            steering.arrives(&Packet::new(client, here, UDP, ports(51820, 51820)));
            assert!(steering.is_steered(&answer));
        }
    }

    #[test]
    fn fragments_of_a_reply_follow_the_first() {
        let steering = Steering::new();
        for (client, here) in ENDS {
            let mut request = Packet::new(client, here, UDP, ports(40_000, 53));
            request.fragment = Some((9, 0, true));
            steering.arrives(&request);
            request.fragment = Some((9, 8, false));
            request.payload = ports(7, 7);
            steering.arrives(&request);
            assert!(!steering.is_steered(&Packet::new(here, client, UDP, ports(7, 7))));

            let fragment = |ports, id, offset, more| Packet {
                fragment: Some((id, offset, more)),
                ..Packet::new(here, client, UDP, ports)
            };
            let ours = || ports(53, 40_000);
            let noise = || ports(1, 2);
            assert!(!steering.is_steered(&fragment(noise(), 5, 3, true)));
            assert!(steering.is_steered(&fragment(ours(), 5, 0, true)));
            assert!(steering.is_steered(&fragment(noise(), 5, 3, true)));
            assert!(!steering.is_steered(&fragment(noise(), 6, 3, true)));
            assert!(steering.is_steered(&fragment(noise(), 5, 6, false)));
            // The last fragment ends the entry.
            assert!(!steering.is_steered(&fragment(noise(), 5, 3, true)));
            // So does a direct packet that uses the identification again.
            assert!(steering.is_steered(&fragment(ours(), 5, 0, true)));
            assert!(!steering.is_steered(&fragment(ports(99, 40_000), 5, 0, true)));
            assert!(!steering.is_steered(&fragment(noise(), 5, 3, true)));
        }
    }

    #[test]
    fn no_packet_from_the_tunnel_takes_over_a_conversation_of_this_host() {
        let steering = Steering::new();
        for (remote, here) in ENDS {
            for (protocol, port) in [(UDP, 123), (UDP, 5060), (47, 0), (50, 0), (132, 1)] {
                let own = Packet::new(here, remote, protocol, ports(port, port));
                let forged = Packet::new(remote, here, protocol, ports(port, port));
                assert!(!steering.is_steered(&own));
                for _ in 0..3 {
                    // It is delivered, since a genuine peer may use both addresses.
                    assert!(steering.arrives(&forged));
                    assert!(!steering.is_steered(&own), "{own:?}");
                }
            }
            // A conversation of a host behind this one, which no socket tells of.
            let own = |flags| Packet::new(here, remote, TCP, tcp(40_000, 443, flags));
            let forged = |flags| Packet::new(remote, here, TCP, tcp(443, 40_000, flags));
            assert!(!steering.is_steered(&own(SYN)));
            for flags in [ACK, ACK | PSH, SYN | ACK, RST] {
                assert!(!steering.arrives(&forged(flags)));
                assert!(!steering.is_steered(&own(ACK)));
            }
            // A SYN begins another one, which this host sees with another port.
            for flags in [SYN, ACK, ACK | PSH, RST] {
                assert_ne!(steering.arrives_from(&forged(flags)), 443);
                assert!(!steering.is_steered(&own(ACK)));
            }
            // It is over, and the remote is a client with the same ports.
            let over = Steering::new();
            assert!(!over.is_steered(&own(SYN)));
            assert!(!over.is_steered(&own(FIN | ACK)));
            assert!(!over.is_steered(&own(ACK)));
            assert_eq!(over.arrives_from(&forged(SYN)), 443);
            assert!(over.is_steered(&own(SYN | ACK)));
        }
        // Four for each family.
        assert_eq!(steering.maps.count(Counter::Direct), 8);
    }

    #[test]
    fn answers_to_a_flood_of_syns_leave_no_memory() {
        let steering = Steering::new();
        let (client, here) = ENDS[0];
        // The container answers directly, and later the client comes by the tunnel.
        for flags in [SYN | ACK, RST, RST | ACK] {
            let answer = Packet::new(here, client, TCP, tcp(80, 40_000, flags));
            assert!(!steering.is_steered(&answer));
            assert!(steering.arrives(&Packet::new(client, here, TCP, tcp(40_000, 80, SYN))));
            let answer = Packet::new(here, client, TCP, tcp(80, 40_000, SYN | ACK));
            assert!(steering.is_steered(&answer));
            // What a SYN from the wire brings about ends the flow.
            steering.arrives(&Packet::new(client, here, TCP, tcp(40_000, 80, FIN | ACK)));
            assert!(!steering.is_steered(&answer));
        }
    }

    #[test]
    fn a_client_that_comes_directly_is_answered_directly_from_then_on() {
        let steering = Steering::new();
        for (client, here) in ENDS {
            let (ping, pong) = echo(here);
            let icmp_of = icmp_protocol(here);
            for (protocol, request, reply) in [
                (UDP, ports(5060, 5060), ports(5060, 5060)),
                (50, ports(1, 2), ports(3, 4)),
                (icmp_of, icmp(ping, 7), icmp(pong, 7)),
            ] {
                let request = Packet::new(client, here, protocol, request);
                let reply = Packet::new(here, client, protocol, reply);
                // Whichever way it came last.
                for _ in 0..3 {
                    steering.arrives(&request);
                    assert!(steering.is_steered(&reply));
                    assert!(steering.is_steered(&reply));
                    steering.comes_directly(&request);
                    assert!(!steering.is_steered(&reply), "{reply:?}");
                    assert!(!steering.is_steered(&reply));
                    steering.comes_directly(&request);
                }
            }
        }
    }

    #[test]
    fn a_connection_with_the_same_ports_may_be_direct_after_one_by_the_tunnel() {
        for (client, here) in ENDS {
            let in_ = |flags| Packet::new(client, here, TCP, tcp(40_000, 80, flags));
            let out = |flags| Packet::new(here, client, TCP, tcp(80, 40_000, flags));
            for last in [FIN | ACK, RST, PSH | ACK] {
                let steering = Steering::new();
                steering.arrives(&in_(SYN));
                assert!(steering.is_steered(&out(SYN | ACK)));
                steering.arrives(&in_(ACK));
                // A listener that defers accepting sends it again after the client's ACK.
                assert!(steering.is_steered(&out(SYN | ACK)));
                steering.arrives(&in_(last));
                assert!(steering.is_steered(&out(ACK)));
                // Directly.
                steering.comes_directly(&in_(SYN));
                assert!(!steering.is_steered(&out(SYN | ACK)));
                assert!(!steering.is_steered(&out(ACK)));
                // And by the tunnel again, once the direct one is over.
                assert!(!steering.is_steered(&out(FIN | ACK)));
                assert_eq!(steering.arrives_from(&in_(SYN)), 40_000);
                assert!(steering.is_steered(&out(SYN | ACK)));
            }
            // This host's own connection, whose other end somebody named before it was there.
            let steering = Steering::new();
            steering.arrives(&in_(SYN));
            assert!(!steering.is_steered(&out(SYN)));
            assert!(!steering.is_steered(&out(ACK)));
            // A forged SYN from the wire ends nothing: the answer to it is no SYN.
            let steering = Steering::new();
            steering.arrives(&in_(SYN));
            steering.arrives(&in_(ACK | PSH));
            steering.comes_directly(&in_(SYN));
            assert!(steering.is_steered(&out(ACK)));
        }
    }

    /// Another address of the same host.
    fn next_to(here: &str) -> String {
        let (rest, _) = here.split_at(here.len() - 1);
        format!("{rest}3")
    }

    #[test]
    fn replies_from_another_port_or_address_are_steered() {
        in_fresh_namespace(|| {
            let waits = UdpSocket::bind("[::]:6969").unwrap();
            for (client, here) in ENDS {
                let steering = Steering::new();
                let beside = next_to(here);
                let ask =
                    |from, to| steering.arrives(&Packet::new(client, here, UDP, ports(from, to)));
                let out = |src: &str, from, to| {
                    steering.is_steered(&Packet::new(src, client, UDP, ports(from, to)))
                };
                assert!(ask(40_000, 6_969));
                assert!(!out(here, 7_000, 39_999), "nobody has asked");
                for _ in 0..2 {
                    assert!(out(&beside, 6_969, 40_000));
                    assert!(out(here, 7_000, 40_000));
                    assert!(out(&beside, 7_001, 40_000));
                }
                assert!(!out(here, 7_000, 40_001), "another client");
                // The client goes on with the port that answered.
                assert!(ask(40_000, 7_000));
                assert!(out(here, 7_000, 40_000));
                // Fragments follow the first.
                let fragment = |offset, more| Packet {
                    fragment: Some((9, offset, more)),
                    ..Packet::new(&beside, client, UDP, ports(6_969, 40_000))
                };
                assert!(steering.is_steered(&fragment(0, true)));
                assert!(steering.is_steered(&fragment(3, false)));
                // It asks directly.
                let direct = Packet::new(client, here, UDP, ports(40_000, 6_969));
                steering.comes_directly(&direct);
                assert!(!out(&beside, 6_969, 40_000));
            }
            drop(waits);
        });
    }

    #[test]
    fn what_this_host_begins_is_related_to_nothing() {
        in_fresh_namespace(|| {
            let waits = UdpSocket::bind("[::]:6969").unwrap();
            for (client, here) in ENDS {
                let steering = Steering::new();
                let beside = next_to(here);
                let ask = |from, to| {
                    assert!(steering.arrives(&Packet::new(client, here, UDP, ports(from, to))));
                };
                let out = |src: &str, from, to| {
                    steering.is_steered(&Packet::new(src, client, UDP, ports(from, to)))
                };
                // Somebody forges a service that this host asks: at a service's port, at one that
                // it spoke to before, and where nobody waited for what was forged.
                ask(53, 6_969);
                assert!(!out(here, 7_000, 53));
                assert!(!out(here, 7_001, 3_478));
                ask(3_478, 6_969);
                assert!(!out(here, 7_002, 3_478));
                assert!(!out(here, 7_001, 3_478));
                ask(4_000, 6_970);
                assert!(!out(here, 7_003, 4_000));
                assert!(!out(&beside, 6_970, 4_000));
                // Between equal ports each side may be the first, from whichever address.
                ask(6_969, 6_969);
                assert!(out(&beside, 6_969, 6_969), "a client of just now");
                ask(123, 123);
                assert!(!out(&beside, 123, 123));
                // What came directly is answered directly.
                ask(40_000, 6_969);
                let direct = Packet::new(client, here, UDP, ports(40_000, 7_004));
                steering.comes_directly(&direct);
                assert!(!out(here, 7_004, 40_000));
            }
            drop(waits);
        });
    }

    #[test]
    fn a_flow_that_has_no_room_is_dropped_and_counted() {
        let steering = Steering::with_room_for(2);
        let (client, here) = ENDS[0];
        let request = |port| Packet::new(client, here, UDP, ports(port, 53));
        let delivered: Vec<_> = (1..=4)
            .filter(|&port| steering.arrives(&request(port)))
            .collect();
        assert_eq!(delivered, [1, 2]);
        assert_eq!(steering.maps.count(Counter::Full), 2);
        assert!(steering.arrives(&request(1)));
    }

    #[test]
    fn what_was_delivered_passes_and_loses_its_mark() {
        let steering = Steering::new();
        let (client, here) = ENDS[0];
        let packet = frame(&Packet::new(client, here, UDP, ports(1, 2)).bytes());
        for (mark, after) in [(DELIVERED, 0), (7, 7)] {
            let outcome =
                crate::kernel::bpf::test_run::run_marked(steering.arrivals.as_fd(), &packet, mark);
            assert_eq!((outcome.verdict, outcome.mark), (TC_ACT_UNSPEC, after));
        }
    }
}
