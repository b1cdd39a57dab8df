//! Takes the calls of hosts behind this server (containers, virtual machines, other networks) to
//! moved addresses that it serves: for the ingress of links that lead to no client.
//!
//! Here nothing has translated their source yet. The answer leaves by the same link, past the
//! stack, whose connection tracking has not seen the call either.
//!
//! Only who is reached by this very link may call by it: a source that is not its own gets no
//! further than it would without this program.
//!
//! ```text
//! if (skb->pkt_type != PACKET_HOST || of a VLAN || !lookup(moved, ip.daddr)) pass;
//! parse();                                                             // other: pass
//! if (it is not served, by its ports) pass;
//! if (!lookup(callers, key)) {
//!     if (TCP && not a SYN) pass;
//!     if (fib_lookup(from ip.daddr to ip.saddr) != skb->ifindex) pass;
//!     update(callers, key, { skb->ifindex, leaves }); and by its addresses alone
//! }
//! if (FRAGMENT == FIRST_FRAGMENT) update(fragments, key by identification);
//! take:   skb_vlan_pop(); return redirect(tun, 0);
//! none:   the same for an ICMP query, by its addresses alone
//! quoted: if (lookup(callers, key)) take; else pass;
//! later:  if (lookup(fragments, key by identification)) take; else pass;
//! pass:   return TC_ACT_UNSPEC;
//! ```

use Reg::{R0, R1, R7, R8, R10};

use super::flows::{FlowMaps, KEY, KEY_LAST, look_up};
use super::headers::{fib, ipv4, ipv6, skb};
use super::inside::{
    ADDRESS, Inside, ROUTE, Way, branch_if_served, jump_if_it_begins, jump_unless_query,
    key_by_addresses, look_up_way_to_caller, note_caller,
};
use super::moved::Family;
use super::parse::{Side, Ways, follow_first_fragment, parse, remember_first_fragment};
use super::phrases::{
    PACKET, TC_ACT_UNSPEC, branch_by_family, jump_if_icmp, keep_packet, load_bytes,
    pass_unless_for_this_host, take, verdict,
};
use crate::kernel::bpf::{Assembler, BpfError, If, Label, Program, Reg, Size};

/// Where the start of the key is kept while it stands for its addresses alone, and its end.
const KEPT_START: Reg = R7;
const KEPT_END: Reg = R8;

/// The program for a link and the TUN.
///
/// # Errors
/// If the program is too large.
pub fn callers(maps: &FlowMaps, l2_header: u32, tun_ifindex: u32) -> Result<Program, BpfError> {
    let mut asm = Assembler::arriving(l2_header);
    let a = &mut asm;
    let ways = Ways::new(a);
    let inside = &maps.inside;
    let (pass, called, taken, out) = (a.label(), a.label(), a.label(), a.label());
    keep_packet(a);
    pass_unless_for_this_host(a, pass);
    look_up_destination(a, inside, l2_header, called, pass);
    a.bind(called);
    a.jump_if_wide(R0, If::Eq, 0, pass);
    parse(a, l2_header, Side::Host, ways);

    a.bind(ways.flow);
    let (served, new) = (a.label(), a.label());
    // What of ICMP belongs to a flow answers a query, and is none.
    jump_if_icmp(a, pass);
    branch_if_served(a, inside, served, pass);
    a.bind(served);
    look_up(a, &inside.callers);
    a.jump_if_wide(R0, If::Ne, 0, taken);
    jump_if_it_begins(a, new);
    a.jump(pass);
    a.bind(new);
    pass_unless_reached_here(a, tun_ifindex, pass);
    note_caller(a, inside, Way::PastTheStack);
    note_addresses(a, inside);
    a.bind(taken);
    remember_first_fragment(a, &maps.fragments, out);
    a.bind(out);
    take(a, tun_ifindex);

    a.bind(ways.none);
    let (served, known) = (a.label(), a.label());
    jump_unless_query(a, pass);
    branch_if_served(a, inside, served, pass);
    a.bind(served);
    a.load(Size::W, KEPT_START, R10, KEY);
    key_by_addresses(a);
    look_up(a, &inside.callers);
    a.jump_if_wide(R0, If::Ne, 0, known);
    pass_unless_reached_here(a, tun_ifindex, pass);
    note_caller(a, inside, Way::PastTheStack);
    a.bind(known);
    a.store(Size::W, R10, KEY, KEPT_START);
    a.jump(taken);

    a.bind(ways.quoted);
    look_up(a, &inside.callers);
    a.jump_if_wide(R0, If::Eq, 0, pass);
    a.jump(out);

    a.bind(ways.later);
    follow_first_fragment(a, &maps.fragments, out, pass);
    a.jump(out);

    for label in [ways.other, pass] {
        a.bind(label);
    }
    verdict(a, TC_ACT_UNSPEC);
    asm.finish("ipmoved_callers")
}

/// Looks the destination up alone, which is all that most packets cost: jumps to `asked` with R0.
fn look_up_destination(a: &mut Assembler, inside: &Inside, l2: u32, asked: Label, other: Label) {
    let v6 = a.label();
    branch_by_family(a, v6, other);
    for (family, at) in [
        (Family::V4, ipv4::DESTINATION),
        (Family::V6, ipv6::DESTINATION),
    ] {
        if family == Family::V6 {
            a.bind(v6);
        }
        load_bytes(a, l2 + at, ADDRESS, family.bytes());
        a.jump_if_wide(R0, If::Ne, 0, other);
        inside.moved.look_up(a, family, ADDRESS);
        a.jump(asked);
    }
}

/// Goes on if the route to the caller leads to the link of the packet; jumps to `pass` otherwise.
fn pass_unless_reached_here(a: &mut Assembler, tun_ifindex: u32, pass: Label) {
    let found = a.label();
    look_up_way_to_caller(a, tun_ifindex, found);
    a.jump(pass);
    a.bind(found);
    a.load(Size::W, R0, R10, ROUTE + fib::IFINDEX);
    a.load(Size::W, R1, PACKET, skb::IFINDEX);
    a.jump_if(R0, If::Ne, R1, pass);
}

/// Notes the caller by its addresses alone, which is all that later fragments and ICMP tell.
fn note_addresses(a: &mut Assembler, inside: &Inside) {
    a.load(Size::W, KEPT_START, R10, KEY);
    a.load(Size::W, KEPT_END, R10, KEY_LAST);
    key_by_addresses(a);
    note_caller(a, inside, Way::PastTheStack);
    a.store(Size::W, R10, KEY, KEPT_START);
    a.store(Size::W, R10, KEY_LAST, KEPT_END);
}
