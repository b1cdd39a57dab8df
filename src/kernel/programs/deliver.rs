//! Remembers what comes out of the tunnel, and delivers it through the ingress of the link that
//! leads to the client: for the ingress of the new server's TUN.
//!
//! So firewalls, `rp_filter` and sockets bound to an interface see a client where they expect it,
//! and its packets take part in whatever translates addresses there. Where no link leads to the
//! client, the packet goes on from the TUN itself.
//!
//! A conversation that this host began itself stays its own, whoever claims to be its other end: a
//! packet from the tunnel with the same addresses and ports is none of it. If it is TCP, a SYN may
//! begin a second connection, with another port (`shifted`); others are dropped, since nobody has a
//! connection there by the tunnel. Anything else is delivered all the same, and answered directly:
//! two hosts that use fixed ports may speak at both addresses.
//!
//! ```text
//! parse();                                   // later, none: entrance = by_route; goto deliver
//! if ((flow = lookup(flows, key))) {
//!     if (TCP) flow->opening = SYN ? 1 : FIN, RST or PSH ? 0 : as it is;
//!     else { flow->asked_directly = 0; if (a socket waits) flow->unawaited = 0; }
//!     if (now - flow->heard > REFRESH) {
//!         flow->seen = flow->heard = now; flow->entrance = by_route; relate(flow);
//!     }
//!     entrance = flow->entrance; goto deliver;
//! }
//! if ((caller = lookup(callers, key))) {              // later, none: by the addresses alone
//!     if (caller->leaves) { skb->mark = DELIVERED; return redirect_neigh(caller->ifindex); }
//!     entrance = caller->ifindex; goto deliver;
//! }
//! if (TCP && shifted(BY_TUNNEL, key)) goto new;
//! if (TCP && (socket = sk_lookup_tcp()) && socket->state != LISTEN
//!     && !storage(sockets, socket)
//!     && !(now < counters[GRACE] && sequence and acknowledgment fit the socket)) direct;
//! if (!ICMP && (conversation = lookup(own, key))
//!     && !CLOSED && now - conversation->seen <= OWN_KEPT
//!     && !(it is taken over)) direct;                             // see `named`
//! new: note = TCP ? SYN : UDP ? no socket waits : 0;
//! if (update(flows, key, { now, now, 0, entrance = by_route, note })) { count; drop; }
//! relate(flow);                              // see `related`
//!
//! deliver: if (TCP && it = shifted(BY_TUNNEL, key)) exchange the client's port;
//!          if (!entrance) return TC_ACT_UNSPEC;
//!          link = lookup(links, entrance) or lookup(links, FIRST) or return TC_ACT_UNSPEC;
//!          if (link->header) write an Ethernet header to link->mac;
//!          skb->mark = DELIVERED;
//!          return redirect(link->ifindex, BPF_F_INGRESS);
//! direct:  if (!TCP) { entrance = by_route; goto deliver; }
//!          if (SYN without ACK && take_free_port(BY_TUNNEL)) goto new;
//!          count; drop;
//! by_route: fib_lookup(from local to remote); 0 for the TUN, or if no route leads there; FIRST if
//!          the kernel does not tell
//! ```

use Reg::{R0, R1, R2, R3, R4, R7, R8, R9, R10};

use super::flows::{
    CLOSED, Counter, FLOW_ASKED_DIRECTLY, FLOW_ENTRANCE, FLOW_HEARD, FLOW_OPENING, FLOW_SEEN,
    FLOW_UNAWAITED, FLOW_VALUE, FlowMaps, KEY, KEY_LOCAL, KEY_REMOTE, LINK_FIRST, LINK_HEADER,
    LINK_IFINDEX, LINK_MAC, OWN_KEPT, REFRESH, VALUE, count, counter_at, enter_from,
    jump_if_within, look_up, look_up_route_of_key,
};
use super::headers::{ethernet, fib, skb, sock, tcp, tcp_sock};
use super::inside::{jump_if_answer, key_by_addresses};
use super::named::take_over;
use super::parse::{FLAGS, HEADER, Side, Ways, load_syn, parse};
use super::phrases::{
    BPF_F_INGRESS, DELIVERED, PACKET, PROTOCOL, TC_ACT_SHOT, TC_ACT_UNSPEC, add_empty_header,
    jump_if_icmp, keep_packet, look_up_at, store_ethernet_header, verdict,
};
use super::related::relate;
use super::shifted::{Coming, jump_unless_any, look_up_coming, shift_coming, take_free_port};
use super::sockets::{jump_unless_somebody_waits, look_up_socket, look_up_taken};
use crate::kernel::bpf::{
    Alu, Assembler, BpfError, Helper, If, Label, Operand, Program, Reg, Size,
};
use crate::model::moved::{TCP, UDP};
use crate::packet::{ACK, FIN, PSH, RST, SYN};

/// The flow's value in the map.
const FLOW: Reg = R7;

/// What is known of that link, at last.
const LINK: Reg = R7;

/// The link by which the packet is delivered, once its flow is known.
const ENTRANCE: Reg = R8;

/// Where the stack keeps `struct bpf_fib_lookup`.
const FIB: i16 = -168;

/// The program for the TUN. Where packets arrive, [`FlowMaps::set_links`] says at any time.
///
/// The kernel tells a program where a route leads only if forwarding is on for the TUN. Without it
/// everything arrives at the first link.
///
/// # Errors
/// If the program is too large.
pub fn deliver(maps: &FlowMaps, tun_ifindex: u32) -> Result<Program, BpfError> {
    deliver_behind(0, maps, tun_ifindex)
}

/// The same program for packets with a link-layer header of this length. A TUN has none, but
/// BPF_PROG_TEST_RUN asks for one.
pub(super) fn deliver_behind(
    l2_header: u32,
    maps: &FlowMaps,
    tun_ifindex: u32,
) -> Result<Program, BpfError> {
    let mut asm = Assembler::new();
    let a = &mut asm;
    let ways = Ways::new(a);
    let (known, new, on_the_tun) = (a.label(), a.label(), a.label());
    let (by_route, deliver, leaves) = (a.label(), a.label(), a.label());
    keep_packet(a);
    parse(a, l2_header, Side::Client, ways);

    a.bind(ways.flow);
    look_up(a, &maps.flows);
    a.jump_if_wide(R0, If::Ne, 0, known);
    jump_if_answer(a, &maps.inside, (FLOW, ENTRANCE), deliver, leaves);
    let (plain, shot) = (a.label(), a.label());
    a.jump_if(PROTOCOL, If::Ne, i32::from(TCP), plain);
    jump_unless_any(a, maps, plain);
    look_up_coming(a, maps, Coming::ByTunnel);
    a.jump_if_wide(R0, If::Ne, 0, new);
    a.bind(plain);
    jump_if_direct(a, maps, new);
    a.jump_if(PROTOCOL, If::Ne, i32::from(TCP), by_route);
    load_syn(a);
    a.jump_if(R0, If::Ne, i32::from(SYN), shot);
    take_free_port(a, maps, Coming::ByTunnel, shot);
    a.jump(new);
    a.bind(shot);
    count(a, maps, Counter::Direct);
    verdict(a, TC_ACT_SHOT);

    a.bind(new);
    let (not_opening, entered) = (a.label(), a.label());
    a.store(Size::Dw, R10, FLOW_VALUE + FLOW_ASKED_DIRECTLY, 0);
    a.store(Size::Dw, R10, FLOW_VALUE + FLOW_ENTRANCE, 0);
    load_syn(a);
    a.jump_if(R0, If::Ne, i32::from(SYN), not_opening);
    a.store(Size::W, R10, FLOW_VALUE + FLOW_OPENING, 1);
    a.bind(not_opening);
    let (unawaited, awaited) = (a.label(), a.label());
    a.jump_if(PROTOCOL, If::Ne, i32::from(UDP), awaited);
    jump_unless_somebody_waits(a, unawaited);
    a.jump(awaited);
    a.bind(unawaited);
    a.store(Size::W, R10, FLOW_VALUE + FLOW_UNAWAITED, 1);
    a.bind(awaited);
    find_entrance(a, tun_ifindex);
    a.store(Size::W, R10, FLOW_VALUE + FLOW_ENTRANCE, ENTRANCE);
    a.call(Helper::KtimeGetNs);
    a.store(Size::Dw, R10, FLOW_VALUE + FLOW_SEEN, R0);
    a.store(Size::Dw, R10, FLOW_VALUE + FLOW_HEARD, R0);
    enter_from(a, &maps.flows, FLOW_VALUE);
    a.jump_if_wide(R0, If::Eq, 0, entered);
    // Delivered without a memory it would be answered from this host's own address.
    count(a, maps, Counter::Full);
    verdict(a, TC_ACT_SHOT);
    a.bind(entered);
    relate(a, maps);
    a.jump(deliver);

    a.bind(known);
    let (aged, opening, no_news, fresh) = (a.label(), a.label(), a.label(), a.label());
    let without_tcp = a.label();
    a.mov(FLOW, R0);
    a.jump_if(PROTOCOL, If::Ne, i32::from(TCP), without_tcp);
    a.load(Size::W, R0, R10, FLAGS);
    a.mov(R1, R0);
    a.alu(Alu::And, R1, i32::from(SYN | ACK));
    a.jump_if(R1, If::Eq, i32::from(SYN), opening);
    a.jump_if(R0, If::Set, i32::from(FIN | RST | PSH), no_news);
    a.jump(aged);
    a.bind(opening);
    a.store(Size::W, FLOW, FLOW_OPENING, 1);
    a.jump(aged);
    a.bind(no_news);
    // Most packets find it so, and write nothing that other processors have to read again.
    a.load(Size::W, R0, FLOW, FLOW_OPENING);
    a.jump_if(R0, If::Eq, 0, aged);
    a.store(Size::W, FLOW, FLOW_OPENING, 0);
    a.jump(aged);
    a.bind(without_tcp);
    let by_the_tunnel = a.label();
    a.load(Size::Dw, R0, FLOW, FLOW_ASKED_DIRECTLY);
    a.jump_if_wide(R0, If::Eq, 0, by_the_tunnel);
    a.store(Size::Dw, FLOW, FLOW_ASKED_DIRECTLY, 0);
    a.bind(by_the_tunnel);
    a.load(Size::W, R0, FLOW, FLOW_UNAWAITED);
    a.jump_if(R0, If::Ne, 1, aged);
    jump_unless_somebody_waits(a, aged);
    a.store(Size::W, FLOW, FLOW_UNAWAITED, 0);
    a.bind(aged);
    jump_if_within(a, (FLOW, FLOW_HEARD), REFRESH, fresh);
    a.store(Size::Dw, FLOW, FLOW_SEEN, R0);
    a.store(Size::Dw, FLOW, FLOW_HEARD, R0);
    find_entrance(a, tun_ifindex);
    a.store(Size::W, FLOW, FLOW_ENTRANCE, ENTRANCE);
    relate(a, maps);
    a.jump(deliver);
    a.bind(fresh);
    a.load(Size::W, ENTRANCE, FLOW, FLOW_ENTRANCE);
    a.jump(deliver);

    a.bind(ways.later);
    a.bind(ways.none);
    key_by_addresses(a);
    jump_if_answer(a, &maps.inside, (FLOW, ENTRANCE), by_route, leaves);
    a.bind(by_route);
    find_entrance(a, tun_ifindex);
    a.bind(deliver);
    let unshifted = a.label();
    jump_unless_any(a, maps, unshifted);
    a.load(Size::W, R0, R10, KEY);
    a.alu(Alu::And, R0, 0xff);
    a.jump_if(R0, If::Ne, i32::from(TCP), unshifted);
    shift_coming(a, maps, Coming::ByTunnel, unshifted);
    a.bind(unshifted);
    let (found, bare, no_room) = (a.label(), a.label(), a.label());
    a.jump_if(ENTRANCE, If::Eq, 0, on_the_tun);
    look_up_link(a, maps, ENTRANCE);
    a.jump_if_wide(R0, If::Ne, 0, found);
    // A link that a flow remembers may be gone, and one that leads to a client without programs.
    look_up_link(a, maps, LINK_FIRST);
    a.jump_if_wide(R0, If::Eq, 0, on_the_tun);
    a.bind(found);
    a.mov(LINK, R0);
    a.load(Size::W, R0, LINK, LINK_HEADER);
    a.jump_if(R0, If::Eq, 0, bare);
    add_empty_header(a, ethernet::LEN as u32);
    a.jump_if_wide(R0, If::Ne, 0, no_room);
    // The destination is the link's own address, the source nobody's.
    store_ethernet_header(a, LINK, LINK_MAC);
    a.bind(bare);
    a.mov(R0, DELIVERED);
    a.store(Size::W, PACKET, skb::MARK, R0);
    a.load(Size::W, R1, LINK, LINK_IFINDEX);
    a.mov(R2, BPF_F_INGRESS);
    a.call(Helper::Redirect);
    a.exit();
    a.bind(leaves);
    a.mov(R0, DELIVERED);
    a.store(Size::W, PACKET, skb::MARK, R0);
    add_empty_header(a, ethernet::LEN as u32);
    a.jump_if_wide(R0, If::Ne, 0, no_room);
    a.mov(R1, ENTRANCE);
    for none in [R2, R3, R4] {
        a.mov(none, 0);
    }
    a.call(Helper::RedirectNeigh);
    a.exit();
    // The kernel has no room for the header: the TUN has to do.
    a.bind(no_room);
    a.bind(on_the_tun);
    a.bind(ways.quoted);
    a.bind(ways.other);
    verdict(a, TC_ACT_UNSPEC);
    asm.finish("ipmoved_deliver")
}

/// Goes on if the key is that of a direct conversation; jumps to `no` otherwise.
fn jump_if_direct(a: &mut Assembler, maps: &FlowMaps, no: Label) {
    let (own, yes, aged) = (a.label(), a.label(), a.label());
    // This host's own queries are never taken for replies.
    jump_if_icmp(a, no);
    a.jump_if(PROTOCOL, If::Ne, i32::from(TCP), own);
    jump_unless_connected(a, maps, own);
    a.jump(yes);

    a.bind(own);
    look_up(a, &maps.own);
    a.jump_if_wide(R0, If::Eq, 0, no);
    a.mov(R7, R0);
    a.load(Size::Dw, R0, R7, 0);
    a.jump_if_wide(R0, If::Eq, CLOSED, no);
    jump_if_within(a, (R7, 0), OWN_KEPT, aged);
    a.jump(no);
    a.bind(aged);
    take_over(a, maps, R7, no);
    a.bind(yes);
}

/// Goes on if a TCP socket has a connection with the client, and did not get it by the tunnel.
fn jump_unless_connected(a: &mut Assembler, maps: &FlowMaps, no: Label) {
    let other = a.label();
    let Some(sockets) = &maps.sockets else {
        // Nothing would tell the connections of the tunnel from others.
        a.jump(no);
        return;
    };
    look_up_socket(a, Helper::SkLookupTcp);
    a.jump_if_wide(R0, If::Eq, 0, no);
    a.mov(R7, R0);
    a.load(Size::W, R0, R7, sock::STATE);
    a.jump_if(R0, If::Eq, sock::LISTEN, other);
    look_up_taken(a, sockets, R7);
    a.jump_if_wide(R0, If::Ne, 0, other);
    let yes = a.label();
    jump_unless_older(a, maps, yes);
    a.jump(other);
    a.bind(yes);
    a.mov(R1, R7);
    a.call(Helper::SkRelease);
    let connected = a.label();
    a.jump(connected);
    a.bind(other);
    a.mov(R1, R7);
    a.call(Helper::SkRelease);
    a.jump(no);
    a.bind(connected);
}

/// Goes on if the connection of the socket in R7 may be older than the memory of programs, and the
/// packet stands where its client would: it acknowledges what is under way, and its own sequence
/// number is about the one expected. Who cannot see the connection has to guess both. Jumps to `no`
/// otherwise.
fn jump_unless_older(a: &mut Assembler, maps: &FlowMaps, no: Label) {
    counter_at(a, maps, Counter::Grace, no);
    a.load(Size::Dw, R9, R0, 0);
    a.call(Helper::KtimeGetNs);
    a.jump_if_wide(R9, If::Lt, R0, no);
    load_syn(a);
    a.jump_if(R0, If::Ne, i32::from(ACK), no);
    a.mov(R1, R7);
    a.call(Helper::TcpSock);
    a.jump_if_wide(R0, If::Eq, 0, no);
    a.load(Size::W, R2, R0, tcp_sock::SND_UNA);
    a.load(Size::W, R3, R0, tcp_sock::SND_NXT);
    a.load(Size::W, R4, R0, tcp_sock::RCV_NXT);
    // Comparisons are of 32 bits, where sequence numbers come round (RFC 9293 section 3.4).
    a.alu(Alu::Sub, R3, R2);
    a.alu(Alu::Add, R3, OLD_NEWS);
    load_wire_word(a, R0, HEADER + tcp::ACKNOWLEDGMENT as i16);
    a.alu(Alu::Sub, R0, R2);
    a.alu(Alu::Add, R0, OLD_NEWS);
    a.jump_if(R0, If::Gt, R3, no);
    load_wire_word(a, R0, HEADER + tcp::SEQUENCE as i16);
    a.alu(Alu::Sub, R0, R4);
    a.alu(Alu::Add, R0, OLD_NEWS);
    a.jump_if(R0, If::Gt, 4 * OLD_NEWS, no);
}

/// How far a packet may lag behind its connection, in bytes: a window without scaling.
const OLD_NEWS: i32 = 1 << 16;

/// REG = a word of a header on the stack, in the order of this host. Uses R1.
fn load_wire_word(a: &mut Assembler, reg: Reg, at: i16) {
    a.mov(reg, 0);
    for byte in 0..4 {
        a.alu(Alu::Lsh, reg, 8);
        a.load(Size::B, R1, R10, at + byte);
        a.alu(Alu::Or, reg, R1);
    }
}

/// R0 = the address of what is known of a link, or 0.
fn look_up_link(a: &mut Assembler, maps: &FlowMaps, ifindex: impl Into<Operand>) {
    a.store(Size::W, R10, VALUE, ifindex);
    look_up_at(a, &maps.links, VALUE);
}

/// ENTRANCE = the link that leads to the client, by the addresses in the key; 0 for the TUN.
fn find_entrance(a: &mut Assembler, tun_ifindex: u32) {
    let (found, done) = (a.label(), a.label());
    look_up_route_of_key(a, FIB, tun_ifindex, (KEY_LOCAL, KEY_REMOTE), found);
    a.mov(ENTRANCE, LINK_FIRST);
    a.jump_if(R0, If::Eq, fib::FORWARDING_DISABLED, done);
    a.mov(ENTRANCE, 0);
    a.jump(done);
    a.bind(found);
    a.load(Size::W, ENTRANCE, R10, FIB + fib::IFINDEX);
    a.jump_if(ENTRANCE, If::Ne, tun_ifindex, done);
    a.mov(ENTRANCE, 0);
    a.bind(done);
}
