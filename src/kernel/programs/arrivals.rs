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
//! if (skb->pkt_type != PACKET_HOST || skb->vlan_present || TCP || to the tunnel's own port) pass;
//! parse();                                                    // later, none: pass
//! if ((flow = lookup(flows, key))) {
//!     if (now - flow->heard <= GONE_OVER) { flow->asked_directly = now; pass; }
//!     delete(flows, key);
//! } else if (ICMP || lookup(own, key) || (come = lookup(in, key)) && !come->unawaited) pass;
//! update(in, key, { unawaited = UDP && no socket waits });
//! pass:   return TC_ACT_UNSPEC;
//! ```

use Reg::{R0, R7, R10};

use super::flows::{
    Counter, FLOW_ASKED_DIRECTLY, FLOW_HEARD, FlowMaps, GONE_OVER, VALUE, count, enter,
    jump_if_within, look_up, remove,
};
use super::headers::{icmpv4, icmpv6, ports, skb};
use super::parse::{Side, Ways, parse, sort_out};
use super::phrases::{
    DELIVERED, PACKET, PROTOCOL, TC_ACT_UNSPEC, count_as_for_this_host, keep_packet,
    pass_unless_for_this_host, verdict,
};
use super::sockets::jump_unless_somebody_waits;
use crate::kernel::bpf::{Assembler, BpfError, If, Program, Reg, Size};
use crate::model::moved::{TCP, UDP};

/// The flow's value in the map.
const FLOW: Reg = R7;

/// The program for a link. `tunnel_port` is the tunnel's own on this host.
///
/// # Errors
/// If the program is too large.
pub fn arrivals(maps: &FlowMaps, l2_header: u32, tunnel_port: u16) -> Result<Program, BpfError> {
    let mut asm = Assembler::new();
    let a = &mut asm;
    let ways = Ways::new(a);
    let (pass, read, from_the_wire) = (a.label(), a.label(), a.label());
    keep_packet(a);
    a.load(Size::W, R0, PACKET, skb::MARK);
    a.jump_if(R0, If::Ne, DELIVERED, from_the_wire);
    // Kernels before 6.5 take no constant there.
    a.mov(R0, 0);
    a.store(Size::W, PACKET, skb::MARK, R0);
    // The link may have another address by now.
    count_as_for_this_host(a);
    verdict(a, TC_ACT_UNSPEC);
    a.bind(from_the_wire);
    pass_unless_for_this_host(a, pass);
    // TCP and the tunnel itself are most of what comes. They cost a few loads.
    sort_out(
        a,
        l2_header,
        ports::DESTINATION,
        tunnel_port,
        pass,
        read,
        pass,
    );
    a.bind(read);
    parse(a, l2_header, Side::Client, ways);
    a.bind(ways.flow);
    let (unknown, new, enter_it) = (a.label(), a.label(), a.label());
    a.jump_if(PROTOCOL, If::Eq, i32::from(TCP), pass);
    look_up(a, &maps.flows);
    a.jump_if_wide(R0, If::Eq, 0, unknown);
    let live = a.label();
    a.mov(FLOW, R0);
    jump_if_within(a, (FLOW, FLOW_HEARD), GONE_OVER, live);
    remove(a, &maps.flows);
    a.jump(new);
    a.bind(live);
    a.store(Size::Dw, FLOW, FLOW_ASKED_DIRECTLY, R0);
    a.jump(pass);
    a.bind(unknown);
    for icmp in [icmpv4::PROTOCOL, icmpv6::PROTOCOL] {
        a.jump_if(PROTOCOL, If::Eq, i32::from(icmp), pass);
    }
    look_up(a, &maps.own);
    a.jump_if_wide(R0, If::Ne, 0, pass);
    look_up(a, &maps.direct);
    a.jump_if_wide(R0, If::Eq, 0, new);
    a.load(Size::Dw, R0, R0, 0);
    a.jump_if_wide(R0, If::Eq, 0, pass);
    a.jump(enter_it);
    a.bind(new);
    count(a, maps, Counter::Came);
    a.bind(enter_it);
    let (unawaited, awaited, noted) = (a.label(), a.label(), a.label());
    a.jump_if(PROTOCOL, If::Ne, i32::from(UDP), awaited);
    jump_unless_somebody_waits(a, unawaited);
    a.bind(awaited);
    a.store(Size::Dw, R10, VALUE, 0);
    a.jump(noted);
    a.bind(unawaited);
    a.store(Size::Dw, R10, VALUE, 1);
    a.bind(noted);
    enter(a, &maps.direct);
    for label in [ways.later, ways.none, ways.quoted, ways.other, pass] {
        a.bind(label);
    }
    verdict(a, TC_ACT_UNSPEC);
    asm.finish("ipmoved_direct")
}
