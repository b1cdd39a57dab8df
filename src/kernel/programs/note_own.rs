//! Notes the conversations that this host has itself, or a host behind it, from an address that has
//! moved: for the egress of the old server's links, after any translation of addresses.
//!
//! Who spoke first decides. What leaves makes a conversation this host's own unless the new server
//! has one with the same addresses and ports, as far as it has answered there: what a client alone
//! sends may be forged. The daemon's own packets, which come out of its TUN, are left alone, and
//! so are those of the tunnel.
//!
//! ```text
//! if (skb->ingress_ifindex == tun || skb->vlan_present || UDP from the tunnel's own port
//!     || !(r = rights of ip.saddr)) pass;
//! parse();                                       // quoted, later, none, other: pass
//! if (nothing of this protocol has moved by r) pass;          // none of it is captured
//! if (its port has not, and nothing may begin there) {         // only fragments are
//!     if (UDP) others[key] = now;                              // once a second
//!     pass;
//! }
//! // Conversations are looked up in `kept`, then in `own`.
//! if (TCP) {
//!     if (SYN without ACK) delete(taken, key);
//!     if (it is from a socket of this host, and was not translated) pass; // which can be asked
//!     if (RST) { delete(own, key); pass; }
//!     if ((o = lookup(own, key)) && !(SYN without ACK)) {
//!         if (FIN) move(kept, own, key, { now, KIND_CLOSED });
//!         else if (OPENING && SYN) goto opens;
//!         else if (RESET) move(own, kept, key, { now, o->kind });       // it was forged
//!         else refresh;                               // if it was asked, KIND_BEHIND again
//!         pass;
//!     }
//!     if (FIN || lookup(taken, key)) pass;
//!     if (SYN) opens: update(own, key, { now, KIND_OPENING, sequence + 1 });
//!     else update(kept or own, key, { now, KIND_BEHIND, 0 });
//!     pass;
//! } else {
//!     if ((o = lookup(own, key)) && !REQUEST) {
//!         if (HEARD) { move(own, kept, key, { now, o->kind, STAGE_KEPT }); pass; }
//!         if (now - o->seen <= (YOUNG ? YOUNG_IDLE : OWN_IDLE)) { if (!YOUNG) refresh; pass; }
//!         delete(kept and own, key);
//!     }
//!     if ((t = lookup(taken, key))) {
//!         if (now - t->answered <= ANSWERED) pass;
//!         delete(taken, key);
//!     }
//! }
//! s = the UDP socket at this port that sends it, or for which the kernel does (WireGuard, IPsec);
//! update(own, key, { now, !s ? KIND_BEHIND
//!                         : s->state != ESTABLISHED && now - since > OWN_IDLE && !REQUEST
//!                         ? KIND_LASTING
//!                         : KIND_SOCKET,
//!                    now - since <= YOUNG ? STAGE_YOUNG : STAGE_PLAIN });
//! note who may answer from another port;                               // see `another_port`
//! if (it was REQUEST) go on with `served_here`;
//! pass:    return TC_ACT_UNSPEC;
//! refresh: if (now - o->seen > REFRESH) { o->seen = now; delete(taken, key); }
//! ```

use Reg::{R0, R1, R7, R9, R10};

use super::another_port;
use super::facts::Facts;
use super::flows::{KEY_LAST, REFRESH, VALUE, enter_now, jump_if_within, look_up, remove};
use super::headers::{ipv4, ipv6, ports, skb, sock, tcp};
use super::moved::Family;
use super::own::{
    ANSWERED, KIND_ASKED, KIND_BEHIND, KIND_CLOSED, KIND_LASTING, KIND_OPENING, KIND_SOCKET,
    OWN_IDLE, OWN_KIND, OWN_SEEN, OWN_STAGE, Own, STAGE_HEARD, STAGE_KEPT, STAGE_PLAIN,
    STAGE_REQUEST, STAGE_RESET, YOUNG_IDLE,
};
use super::parse::{
    FLAGS, HEADER, Side, Ways, key_of_other_query, load_syn, parse, sort_out, wire,
};
use super::phrases::{
    PACKET, PROTOCOL, TC_ACT_UNSPEC, branch_by_family, jump_if_icmp, jump_if_it_has_ports,
    keep_packet, load_bytes, pass_if_tagged, verdict,
};
use super::rights::Rights;
use super::served_here::End;
use super::sockets::{
    SOCKET, jump_unless_at_own_end, load_port, load_tcp_socket, load_udp_sender, look_up_socket,
    release_keeping_state,
};
use crate::kernel::bpf::{Alu, Assembler, BpfError, Helper, If, Label, Program, Reg, Size};
use crate::model::moved::{TCP, UDP};
use crate::packet::{FIN, RST, SYN};

/// The program's name.
pub const NOTE_OWN: &str = "ipmoved_own";

/// Where the stack keeps the source, below what [`parse`] needs.
const SOURCE: i16 = -120;

/// Where it keeps what has moved of the source, below what is looked up.
const RIGHTS_KEPT: i16 = -136;

/// Where it keeps whether a client has asked before.
const ANSWERS: i16 = -176;

/// The conversation's value in the map.
const FOUND: Reg = R7;

/// Which it is, once the packet is read.
const KIND: Reg = R9;

/// The program for a link and the TUN, for packets from what has moved by these facts.
/// `tunnel_port` is the tunnel's own on this host, if there is a tunnel.
///
/// # Errors
/// If the program is too large.
pub fn note_own(
    facts: &Facts,
    l2_header: u32,
    tun_ifindex: u32,
    tunnel_port: Option<u16>,
) -> Result<Program, BpfError> {
    let own = &facts.own;
    let mut asm = Assembler::new();
    let a = &mut asm;
    let ways = Ways::new(a);
    let (pass, read, new) = (a.label(), a.label(), a.label());
    keep_packet(a);
    a.load(Size::W, R0, PACKET, skb::INGRESS_IFINDEX);
    a.jump_if(R0, If::Eq, tun_ifindex, pass);
    pass_if_tagged(a, pass);
    if let Some(port) = tunnel_port {
        // The tunnel itself is most of what leaves.
        sort_out(a, l2_header, ports::SOURCE, port, read, read, pass);
    }
    a.bind(read);
    pass_unless_moved(a, l2_header, facts, pass);
    parse(a, l2_header, Side::Own, ways);

    a.bind(ways.none);
    key_of_other_query(a, Side::Own, ways.flow);
    a.jump(pass);
    a.bind(ways.flow);
    let (captured, without_tcp) = (a.label(), a.label());
    note_other_port(a, facts, captured, pass);
    a.bind(captured);
    a.jump_if(PROTOCOL, If::Ne, i32::from(TCP), without_tcp);
    note_tcp(a, own, pass);

    a.bind(without_tcp);
    let (unknown, known, aged, young) = (a.label(), a.label(), a.label(), a.label());
    let (began, answers) = (a.label(), a.label());
    if let Some(port) = tunnel_port {
        let other = a.label();
        // The tunnel once more, behind options.
        a.jump_if(PROTOCOL, If::Ne, i32::from(UDP), other);
        a.load(Size::H, R0, R10, KEY_LAST + 2);
        a.jump_if(R0, If::Eq, wire(i32::from(port)), pass);
        a.bind(other);
    }
    a.store(Size::W, R10, ANSWERS, 0);
    own.look_up(a, known);
    a.bind(unknown);
    jump_if_icmp(a, new);
    look_up(a, &own.taken);
    a.jump_if_wide(R0, If::Eq, 0, new);
    a.mov(FOUND, R0);
    let unanswered = a.label();
    a.load(Size::Dw, R0, FOUND, 0);
    a.jump_if_wide(R0, If::Eq, 0, unanswered);
    jump_if_within(a, (FOUND, 0), ANSWERED, pass);
    a.bind(unanswered);
    remove(a, &own.taken);

    a.bind(new);
    let kind_known = a.label();
    look_for_sender(a);
    a.load(Size::W, R0, R10, ANSWERS);
    a.jump_if(R0, If::Eq, 0, kind_known);
    a.jump_if(KIND, If::Ne, KIND_LASTING, kind_known);
    a.mov(KIND, KIND_SOCKET);
    a.bind(kind_known);
    own.enter_own(a, KIND);
    another_port::note(a, own, KIND);
    a.load(Size::W, R0, R10, ANSWERS);
    a.jump_if(R0, If::Eq, 0, pass);
    facts.served.go_on(a, l2_header, End::Egress);
    a.jump(pass);

    a.bind(known);
    a.mov(FOUND, R0);
    a.load(Size::W, R0, FOUND, OWN_STAGE);
    a.jump_if(R0, If::Eq, STAGE_PLAIN, aged);
    a.jump_if(R0, If::Eq, STAGE_KEPT, aged);
    a.jump_if(R0, If::Eq, STAGE_HEARD, began);
    a.jump_if(R0, If::Eq, STAGE_REQUEST, answers);
    a.bind(young);
    jump_if_within(a, (FOUND, OWN_SEEN), YOUNG_IDLE, pass);
    a.jump(unknown);
    a.bind(aged);
    let heard = a.label();
    jump_if_within(a, (FOUND, OWN_SEEN), REFRESH, pass);
    jump_if_within(a, (FOUND, OWN_SEEN), OWN_IDLE, heard);
    own.forget(a);
    a.jump(unknown);
    a.bind(heard);
    refresh(a, own, None, pass);
    a.bind(answers);
    a.store(Size::W, R10, ANSWERS, 1);
    a.jump(unknown);

    // Both have gone on.
    a.bind(began);
    keep_going(a, own, pass);

    for label in [ways.later, ways.quoted, ways.other, pass] {
        a.bind(label);
    }
    verdict(a, TC_ACT_UNSPEC);
    asm.finish(NOTE_OWN)
}

/// Goes on if something of the packet's source has moved, which the stack keeps.
fn pass_unless_moved(a: &mut Assembler, l2: u32, facts: &Facts, pass: Label) {
    let (v6, moved) = (a.label(), a.label());
    branch_by_family(a, v6, pass);
    for (family, at) in [(Family::V4, ipv4::SOURCE), (Family::V6, ipv6::SOURCE)] {
        if family == Family::V6 {
            a.bind(v6);
        }
        load_bytes(a, l2 + at, SOURCE, family.bytes());
        a.jump_if_wide(R0, If::Ne, 0, pass);
        facts.rights.look_up(a, family, SOURCE);
        a.jump_if_wide(R0, If::Ne, 0, moved);
        a.jump(pass);
    }
    a.bind(moved);
    a.load(Size::W, R0, R0, 0);
    a.store(Size::W, R10, RIGHTS_KEPT, R0);
}

/// Jumps to `captured` if what answers the packet would be, or may be since the new server begins
/// something there, and to `pass` if not: then only the fragments are that answer UDP, which is
/// noted for them.
fn note_other_port(a: &mut Assembler, facts: &Facts, captured: Label, pass: Label) {
    const RIGHTS: Reg = KIND;
    const PORT: Reg = FOUND;
    let (has_ports, another, fragmented, new) = (a.label(), a.label(), a.label(), a.label());
    a.load(Size::W, RIGHTS, R10, RIGHTS_KEPT);
    Rights::jump_if_whole(a, RIGHTS, captured);
    jump_if_it_has_ports(a, has_ports);
    Rights::decide_by_protocol(a, RIGHTS, captured, pass);
    a.bind(has_ports);
    load_port(a, KEY_LAST + 2);
    a.mov(PORT, R1);
    (facts.rights).decide_by_port(a, RIGHTS, PORT, None, (captured, another, another));
    a.bind(another);
    let alone = a.label();
    Rights::jump_unless_it_begins(a, RIGHTS, alone);
    a.jump(captured);
    a.bind(alone);
    a.jump_if(PROTOCOL, If::Ne, i32::from(UDP), pass);
    Rights::decide_by_protocol(a, RIGHTS, fragmented, pass);
    a.bind(fragmented);
    look_up(a, &facts.own.others);
    a.jump_if_wide(R0, If::Eq, 0, new);
    a.mov(FOUND, R0);
    jump_if_within(a, (FOUND, 0), REFRESH, pass);
    a.store(Size::Dw, FOUND, 0, R0);
    a.jump(pass);
    a.bind(new);
    enter_now(a, &facts.own.others);
    a.jump(pass);
}

/// KIND = that of a conversation that the packet, which has no TCP, begins. It is lasting as far as
/// the socket says; a socket that is bound to an interface is found from there only.
fn look_for_sender(a: &mut Assembler) {
    let (ask, by_state, done) = (a.label(), a.label(), a.label());
    a.mov(KIND, KIND_BEHIND);
    a.jump_if(PROTOCOL, If::Ne, i32::from(UDP), done);
    load_udp_sender(a, ask);
    a.load(Size::W, R1, R0, sock::BOUND_DEV_IF);
    a.jump_if(R1, If::Ne, 0, done);
    jump_unless_at_own_end(a, R0, done);
    a.load(Size::W, FOUND, R0, sock::STATE);
    a.jump(by_state);
    a.bind(ask);
    look_up_socket(a, Helper::SkLookupUdp);
    a.jump_if_wide(R0, If::Eq, 0, done);
    release_keeping_state(a, FOUND);
    a.bind(by_state);
    a.mov(KIND, KIND_SOCKET);
    a.jump_if(FOUND, If::Eq, sock::ESTABLISHED, done);
    a.mov(KIND, KIND_LASTING);
    a.bind(done);
}

/// Keeps the conversation at [`FOUND`], which was heard and is seen now, and goes to `pass`.
fn keep_going(a: &mut Assembler, own: &Own, pass: Label) {
    let full = a.label();
    a.load(Size::W, R0, FOUND, OWN_KIND);
    Own::make_value(a, R0, STAGE_KEPT);
    own.keep(a, full);
    remove(a, &own.taken);
    a.jump(pass);
    a.bind(full);
    a.load(Size::Dw, R0, R10, VALUE + OWN_SEEN);
    a.store(Size::Dw, FOUND, OWN_SEEN, R0);
    // Not once more until the other one has.
    a.mov(R0, STAGE_PLAIN);
    a.store(Size::W, FOUND, OWN_STAGE, R0);
    a.jump(pass);
}

/// Notes TCP of hosts behind this one, and of sockets that the wire's addresses do not find; goes
/// to `pass`.
fn note_tcp(a: &mut Assembler, own: &Own, pass: Label) {
    let (begins, forwarded, new) = (a.label(), a.label(), a.label());
    let (ended, closed, opening, unknown) = (a.label(), a.label(), a.label(), a.label());
    let (spoke, goes_on, full) = (a.label(), a.label(), a.label());
    load_syn(a);
    a.jump_if(R0, If::Eq, i32::from(SYN), begins);
    pass_if_found(a, forwarded, pass);
    a.bind(begins);
    remove(a, &own.taken);
    pass_if_found(a, new, pass);

    a.bind(forwarded);
    a.load(Size::W, R0, R10, FLAGS);
    a.jump_if(R0, If::Set, i32::from(RST), ended);
    own.look_up(a, spoke);
    a.jump(unknown);
    a.bind(spoke);
    a.mov(FOUND, R0);
    a.load(Size::W, R0, R10, FLAGS);
    a.jump_if(R0, If::Set, i32::from(FIN), closed);
    a.load(Size::W, R0, FOUND, OWN_KIND);
    a.jump_if(R0, If::Eq, KIND_OPENING, opening);
    a.jump_if(R0, If::Eq, KIND_ASKED, goes_on);
    let lives = a.label();
    a.load(Size::W, R1, FOUND, OWN_STAGE);
    a.jump_if(R1, If::Eq, STAGE_RESET, lives);
    refresh(a, own, None, pass);
    a.bind(lives);
    keep_going(a, own, pass);
    a.bind(goes_on);
    refresh(a, own, Some(KIND_BEHIND), pass);
    a.bind(opening);
    // It may have begun anew.
    a.load(Size::W, R0, R10, FLAGS);
    a.jump_if(R0, If::Set, i32::from(SYN), new);
    refresh(a, own, None, pass);
    // Hundreds may close in a second: none of them is kept from giving way.
    a.bind(closed);
    Own::make_value(a, KIND_CLOSED, STAGE_PLAIN);
    own.enter_value(a);
    remove(a, &own.kept);
    a.jump(pass);
    a.bind(unknown);
    a.load(Size::W, R0, R10, FLAGS);
    a.jump_if(R0, If::Set, i32::from(FIN), pass);
    look_up(a, &own.taken);
    a.jump_if_wide(R0, If::Ne, 0, pass);
    a.bind(new);
    a.load(Size::W, R0, R10, FLAGS);
    let begun = a.label();
    a.jump_if(R0, If::Set, i32::from(SYN), begun);
    Own::make_value(a, KIND_BEHIND, STAGE_PLAIN);
    own.keep(a, full);
    a.jump(pass);
    a.bind(begun);
    a.load(Size::W, R0, R10, HEADER + tcp::SEQUENCE as i16);
    a.swap_if_little_endian(R0);
    a.alu(Alu::Add, R0, 1);
    Own::make_value(a, KIND_OPENING, R0);
    remove(a, &own.kept);
    a.bind(full);
    own.enter_value(a);
    a.jump(pass);
    a.bind(ended);
    own.forget(a);
    a.jump(pass);
}

/// Jumps to `pass` if a socket sends the packet that its addresses and ports find: that one can be
/// asked at any time. Jumps to `other` if none does.
fn pass_if_found(a: &mut Assembler, other: Label, pass: Label) {
    load_tcp_socket(a, other, pass);
    jump_unless_at_own_end(a, SOCKET, other);
    a.jump(pass);
}

/// Notes that the conversation at [`FOUND`] was heard, and is of this kind, and goes to `pass`.
/// Another processor may have captured a packet of it just when it began.
fn refresh(a: &mut Assembler, own: &Own, kind: Option<i32>, pass: Label) {
    jump_if_within(a, (FOUND, OWN_SEEN), REFRESH, pass);
    a.store(Size::Dw, FOUND, OWN_SEEN, R0);
    if let Some(kind) = kind {
        a.mov(R0, kind);
        a.store(Size::W, FOUND, OWN_KIND, R0);
    }
    remove(a, &own.taken);
    a.jump(pass);
}
