//! Sends packets that the daemon writes to its TUN to their clients: for the ingress of the old
//! server's TUN.
//!
//! A reply leaves as this host would send it itself: by the route that its tables and rules give
//! for this source and destination, through whatever interface that is. If the administrator has
//! named an uplink, it leaves by that one. The kernel resolves the neighbour. No netfilter hook
//! takes part, and the TTL stays.
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
//!     return redirect(facts.uplink, BPF_F_INGRESS);
//! }
//! if (!facts.always) {
//!     route = fib_lookup(tun, ip.saddr, ip.daddr);
//!     if (found) { skb_change_head(14); return redirect_neigh(route.ifindex, route.gateway); }
//!     if (blackhole, unreachable, prohibited) drop;
//! }
//! if (!facts.uplink) drop;
//! skb_change_head(14); return redirect_neigh(facts.uplink);
//! ```
//!
//! Both redirections want a link-layer header, and take it off where the interface has none. The
//! look-up works only while the TUN counts as forwarding (`conf/TUN/forwarding`). It does not know
//! the ports, so a rule that selects by port does not match.

use Reg::{R0, R1, R2, R3, R4, R5, R7, R8, R9, R10};

use super::begun::note_begun;
use super::facts::Facts;
use super::headers::{ethernet, fib, ipv4, ipv6, skb};
use super::moved::Family;
use super::phrases::{
    BOUNCED, BPF_F_INGRESS, PACKET, TC_ACT_SHOT, TC_ACT_UNSPEC, add_empty_header,
    begin_route_lookup, branch_by_family, keep_packet, load_bytes, look_up_route, verdict,
};
use super::stays::{note_answered, note_bounced};
use crate::kernel::bpf::{Alu, Assembler, BpfError, Helper, If, Label, Program, Reg, Size};

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

/// The program for what has moved by these facts, for the TUN with this index.
///
/// # Errors
/// If the program is too large.
pub fn return_path(facts: &Facts, tun_ifindex: u32) -> Result<Program, BpfError> {
    let mut asm = Assembler::new();
    let a = &mut asm;
    let (v6, look, bounced, other) = (a.label(), a.label(), a.label(), a.label());
    let (found, by_uplink, refused) = (a.label(), a.label(), a.label());
    keep_packet(a);
    note_answered(a, 0, &facts.own, Some(&facts.modes));
    note_begun(a, facts, refused);
    branch_by_family(a, v6, other);
    jump_if_moved(a, facts, Family::V4, bounced, other);
    facts.jump_if_always(a, R0, by_uplink);
    begin_lookup(a, libc::AF_INET, tun_ifindex);
    load_bytes(a, ipv4::SOURCE, LOOKUP + fib::SOURCE, Family::V4.bytes());
    copy_destination(a, Family::V4);
    a.jump(look);
    a.bind(v6);
    jump_if_moved(a, facts, Family::V6, bounced, other);
    facts.jump_if_always(a, R0, by_uplink);
    begin_lookup(a, libc::AF_INET6, tun_ifindex);
    load_bytes(a, ipv6::SOURCE, LOOKUP + fib::SOURCE, Family::V6.bytes());
    copy_destination(a, Family::V6);

    a.bind(look);
    look_up_route(a, LOOKUP, found);
    for result in fib::REFUSED {
        a.jump_if(R0, If::Eq, result, refused);
    }
    a.bind(by_uplink);
    facts.load_uplink(a, IFINDEX);
    a.jump_if(IFINDEX, If::Eq, 0, refused);
    a.mov(R8, 0);
    a.mov(R9, 0);
    send(a);
    a.bind(refused);
    verdict(a, TC_ACT_SHOT);

    a.bind(found);
    a.load(Size::B, R0, R10, LOOKUP + fib::FAMILY);
    a.store(Size::W, R10, NEXT_HOP, R0);
    a.load(Size::W, IFINDEX, R10, LOOKUP + fib::IFINDEX);
    a.mov(R8, R10);
    a.alu(Alu::Add, R8, i32::from(NEXT_HOP));
    a.mov(R9, NEXT_HOP_LEN);
    send(a);

    bounce(a, bounced, facts, refused);
    a.bind(other);
    verdict(a, TC_ACT_UNSPEC);
    asm.finish("ipmoved_return")
}

/// Jumps to `bounced` if the destination has moved, and to `other` if there is none. The stack
/// keeps it.
fn jump_if_moved(a: &mut Assembler, facts: &Facts, family: Family, bounced: Label, other: Label) {
    let at = match family {
        Family::V4 => ipv4::DESTINATION,
        Family::V6 => ipv6::DESTINATION,
    };
    load_bytes(a, at, DESTINATION, family.bytes());
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

/// Everything but the addresses.
fn begin_lookup(a: &mut Assembler, family: i32, tun_ifindex: u32) {
    begin_route_lookup(a, LOOKUP, tun_ifindex);
    a.store(Size::B, R10, LOOKUP + fib::FAMILY, family);
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

/// Lets the packet arrive on the uplink. The new header is all zeros, and the kernel looks only at
/// its EtherType.
fn bounce(a: &mut Assembler, bounced: Label, facts: &Facts, nowhere: Label) {
    a.bind(bounced);
    note_bounced(a, 0, facts);
    facts.load_uplink(a, IFINDEX);
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
