//! Remembers who speaks to this host directly, and lets what was delivered pass: for the ingress of
//! the new server's links.
//!
//! A client that used the moved address and now comes to this host's own, from the same port, is
//! answered from there, from its first packet on. TCP tells that by its handshake, where
//! [`take_replies`](super::take_replies()) sees it. Anything else may be forged, so as long as the
//! client is heard in the tunnel its flow lives on, and only what leaves at once is an answer to
//! what came directly.
//!
//! ```text
//! if (skb->mark == DELIVERED) { skb->mark = 0; it is for this host; pass; }
//! if (skb->pkt_type != PACKET_HOST || skb->vlan_present || to the tunnel's own port) pass;
//! if (TCP && !shifts && !(SYN without ACK)) pass;
//! parse();                                                    // later, none: pass
//! if (TCP) {                                                  // see `shifted`
//!     if (it = shifted(DIRECTLY, key)) { exchange the client's port; pass; }
//!     if (!(SYN without ACK) || shifted(BY_TUNNEL, key)) pass;
//!     if (!shifted(LEAVING, key) && !((flow = lookup(flows, key)) && (flow->opening
//!         || flow->behind || sk_lookup_tcp() has a connection by the tunnel))) pass;
//!     if (take_free_port(DIRECTLY)) exchange the client's port;
//!     pass;
//! }
//! if ((flow = lookup(flows, key))) {
//!     if (it began here) pass;
//!     if (now - flow->heard <= GONE_OVER) { flow->asked_directly = now; pass; }
//!     delete(flows, key);
//! } else if (ICMP || (it = lookup(own, key)) || (come = lookup(in, key)) && !come->unawaited) {
//!     if (it) it->seen |= HEARD_DIRECTLY;                     // see `named`
//!     pass;
//! }
//! update(in, key, { unawaited = UDP && no socket waits; as it was: answered });
//! pass:   return TC_ACT_UNSPEC;
//! ```

use Reg::{R0, R1, R7, R10};

use super::directly::{ANSWERED, UNAWAITED};
use super::flows::{
    BEGUN_HERE, Counter, FLOW_ASKED_DIRECTLY, FLOW_BEHIND, FLOW_HEARD, FLOW_OPENING,
    FLOW_UNAWAITED, FlowMaps, GONE_OVER, VALUE, count, enter, jump_if_within, look_up, remove,
};
use super::headers::{ipv4, ipv6, ports, sock, tcp};
use super::named::hear_directly;
use super::parse::{Side, Ways, load_syn, parse, sort_out};
use super::phrases::{
    PROTOCOL, TC_ACT_UNSPEC, count_as_for_this_host, jump_if_icmp, jump_if_v6,
    jump_unless_delivered, keep_packet, pass_unless_for_this_host, verdict,
};
use super::shifted::{
    Coming, jump_unless_any, look_up_coming, look_up_leaving, shift_coming, take_free_port,
};
use super::sockets::{jump_unless_somebody_waits, look_up_socket, look_up_taken};
use crate::kernel::bpf::{Alu, Assembler, BpfError, Helper, If, Label, Program, Reg, Size};
use crate::model::moved::{TCP, UDP};
use crate::packet::{ACK, SYN};

/// The flow's value in the map.
const FLOW: Reg = R7;

/// The socket that is looked up, for as long as it is held.
const SOCKET: Reg = R7;

/// The program for a link. `tunnel_port` is the tunnel's own on this host.
///
/// # Errors
/// If the program is too large.
pub fn arrivals(maps: &FlowMaps, l2_header: u32, tunnel_port: u16) -> Result<Program, BpfError> {
    let mut asm = Assembler::arriving(l2_header);
    let a = &mut asm;
    let ways = Ways::new(a);
    let (pass, read, from_the_wire) = (a.label(), a.label(), a.label());
    keep_packet(a);
    jump_unless_delivered(a, from_the_wire);
    // The link may have another address by now.
    count_as_for_this_host(a);
    verdict(a, TC_ACT_UNSPEC);
    a.bind(from_the_wire);
    pass_unless_for_this_host(a, pass);
    // TCP and the tunnel itself are most of what comes. They cost a few loads.
    let of_tcp = a.label();
    sort_out(
        a,
        l2_header,
        ports::DESTINATION,
        tunnel_port,
        of_tcp,
        read,
        pass,
    );
    a.bind(of_tcp);
    pass_unless_it_begins(a, maps, l2_header, read, pass);
    a.bind(read);
    parse(a, l2_header, Side::Client, ways);
    a.bind(ways.flow);
    let (unknown, new, enter_it) = (a.label(), a.label(), a.label());
    let without_tcp = a.label();
    a.jump_if(PROTOCOL, If::Ne, i32::from(TCP), without_tcp);
    tell_apart(a, maps, pass);
    a.jump(pass);
    a.bind(without_tcp);
    look_up(a, &maps.flows);
    a.jump_if_wide(R0, If::Eq, 0, unknown);
    let live = a.label();
    a.mov(FLOW, R0);
    a.load(Size::W, R0, FLOW, FLOW_UNAWAITED);
    a.jump_if(R0, If::Eq, BEGUN_HERE, pass);
    jump_if_within(a, (FLOW, FLOW_HEARD), GONE_OVER, live);
    remove(a, &maps.flows);
    a.jump(new);
    a.bind(live);
    a.store(Size::Dw, FLOW, FLOW_ASKED_DIRECTLY, R0);
    a.jump(pass);
    a.bind(unknown);
    jump_if_icmp(a, pass);
    let not_own = a.label();
    look_up(a, &maps.own);
    a.jump_if_wide(R0, If::Eq, 0, not_own);
    hear_directly(a);
    a.jump(pass);
    a.bind(not_own);
    look_up(a, &maps.direct);
    a.jump_if_wide(R0, If::Eq, 0, new);
    a.load(Size::Dw, R0, R0, 0);
    a.mov(R1, R0);
    a.alu(Alu::And, R1, UNAWAITED);
    a.jump_if_wide(R1, If::Eq, 0, pass);
    a.alu(Alu::And, R0, ANSWERED);
    a.store(Size::Dw, R10, VALUE, R0);
    a.jump(enter_it);
    a.bind(new);
    count(a, maps, Counter::Came);
    a.store(Size::Dw, R10, VALUE, 0);
    a.bind(enter_it);
    let (unawaited, awaited) = (a.label(), a.label());
    a.jump_if(PROTOCOL, If::Ne, i32::from(UDP), awaited);
    jump_unless_somebody_waits(a, unawaited);
    a.jump(awaited);
    a.bind(unawaited);
    a.load(Size::Dw, R0, R10, VALUE);
    a.alu(Alu::Or, R0, UNAWAITED);
    a.store(Size::Dw, R10, VALUE, R0);
    a.bind(awaited);
    enter(a, &maps.direct);
    for label in [ways.later, ways.none, ways.quoted, ways.other, pass] {
        a.bind(label);
    }
    verdict(a, TC_ACT_UNSPEC);
    asm.finish("ipmoved_direct")
}

/// Jumps to `pass` unless the packet of TCP begins a connection, or some connection is shifted;
/// then jumps to `read`. Most of what comes gets no further.
fn pass_unless_it_begins(a: &mut Assembler, maps: &FlowMaps, l2: u32, read: Label, pass: Label) {
    let (none, v6, flags) = (a.label(), a.label(), a.label());
    jump_unless_any(a, maps, none);
    a.jump(read);
    a.bind(none);
    jump_if_v6(a, v6);
    a.load_packet(Size::B, l2 + ipv4::VERSION_AND_IHL);
    a.jump_if(R0, If::Ne, ipv4::WITHOUT_OPTIONS, read);
    a.load_packet(Size::H, l2 + ipv4::FLAGS_AND_OFFSET);
    a.jump_if(R0, If::Set, ipv4::OFFSET_MASK, pass);
    a.load_packet(Size::B, l2 + ipv4::LEN + tcp::FLAGS);
    a.jump(flags);
    a.bind(v6);
    a.load_packet(Size::B, l2 + ipv6::LEN + tcp::FLAGS);
    a.bind(flags);
    a.alu(Alu::And, R0, i32::from(SYN | ACK));
    a.jump_if(R0, If::Eq, i32::from(SYN), read);
    a.jump(pass);
}

/// Gives a packet of TCP another port if a connection by the tunnel has its addresses and ports;
/// jumps to `pass` if none has.
fn tell_apart(a: &mut Assembler, maps: &FlowMaps, pass: Label) {
    let Some(sockets) = &maps.sockets else {
        // Nothing would tell the connections of the tunnel from others.
        return;
    };
    let (unshifted, unused, second) = (a.label(), a.label(), a.label());
    let pass_unless_syn = |a: &mut Assembler| {
        load_syn(a);
        a.jump_if(R0, If::Ne, i32::from(SYN), pass);
    };
    jump_unless_any(a, maps, unused);
    shift_coming(a, maps, Coming::Directly, unshifted);
    a.jump(pass);
    a.bind(unshifted);
    pass_unless_syn(a);
    // Another client port may stand for it already, or this one for another.
    look_up_coming(a, maps, Coming::ByTunnel);
    a.jump_if_wide(R0, If::Ne, 0, pass);
    look_up_leaving(a, maps);
    a.jump_if_wide(R0, If::Ne, 0, second);
    a.bind(unused);
    pass_unless_syn(a);
    look_up(a, &maps.flows);
    a.jump_if_wide(R0, If::Eq, 0, pass);
    a.load(Size::W, R1, R0, FLOW_OPENING);
    a.jump_if(R1, If::Ne, 0, second);
    a.load(Size::W, R1, R0, FLOW_BEHIND);
    a.jump_if(R1, If::Ne, 0, second);
    let other = a.label();
    look_up_socket(a, Helper::SkLookupTcp);
    a.jump_if_wide(R0, If::Eq, 0, pass);
    a.mov(SOCKET, R0);
    a.load(Size::W, R0, SOCKET, sock::STATE);
    a.jump_if(R0, If::Eq, sock::LISTEN, other);
    look_up_taken(a, sockets, SOCKET);
    a.jump_if_wide(R0, If::Eq, 0, other);
    a.mov(R1, SOCKET);
    a.call(Helper::SkRelease);
    a.mov(SOCKET, 0);
    a.jump(second);
    a.bind(other);
    a.mov(R1, SOCKET);
    a.call(Helper::SkRelease);
    a.jump(pass);
    a.bind(second);
    take_free_port(a, maps, Coming::Directly, pass);
    shift_coming(a, maps, Coming::Directly, pass);
}
