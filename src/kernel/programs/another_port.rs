//! On the old server, UDP of its own that comes from another port than it spoke to: from whom, and
//! to which port here. For [`note_own`](super::note_own()), which notes it, and for
//! [`stays`](super::stays), which asks of a datagram that belongs to no conversation.
//!
//! * A program that asks from a port which the kernel has dealt out may be answered from another
//!   one, as by TFTP (RFC 1350 section 4) or a STUN server (RFC 8489), within some seconds.
//! * A tunnel of the kernel's own (VXLAN, RFC 7348 section 5; GENEVE, RFC 8926 section 3.3) has
//!   one port at either end to which everything goes, from a port that differs by what is inside.
//!   What leaves so has no socket at its source port, and this host has one at the port to which it
//!   goes. While it has, whoever it spoke to so may speak to that port, also before this host
//!   spoke.
//!
//! A service that waits at a port of its own is neither: who comes to that gets the new server.
//!
//! ```text
//! elsewhere  by the key of a conversation without the other one's port: u64 until
//!
//! note:  if (!UDP) go on;
//!        if (an unconnected socket sends it that nobody has asked, from DEALT_OUT or above)
//!            update(elsewhere, { key, remote port 0 }, now + ANSWERS);
//!        else if (it began here, no socket sends it,
//!                 and one waits at the port here to which it goes there)
//!            update(elsewhere, { key, remote port 0, local port = remote port },
//!                   now + OWN_LASTING);
//! stay:  if (!UDP || !any) go on;
//!        if ((until = lookup(elsewhere, { key, remote port 0 })) && now < *until
//!            && sk_lookup_udp()) stay;
//! ```

use std::time::Duration;

use Reg::{R0, R1, R2, R7, R10};

use super::flows::{KEY_LAST, VALUE, enter, look_up};
use super::headers::{skb, sock};
use super::own::{KIND_BEHIND, KIND_LASTING, OWN_LASTING, Own};
use super::phrases::{PACKET, PROTOCOL};
use super::sockets::{load_port, load_udp_sender, look_up_socket, release_keeping_state};
use crate::kernel::bpf::{Alu, Assembler, Helper, If, Label, Reg, Size};
use crate::model::moved::UDP;

/// The lowest port that the kernel deals out, unless somebody has changed
/// `net.ipv4.ip_local_port_range`. Services wait below.
const DEALT_OUT: i32 = 32_768;

/// How long an answer may come from another port: a TFTP server is asked again after some seconds.
const ANSWERS: Duration = Duration::from_secs(10);

/// Where the stack keeps the other one's port, meanwhile: no multiple of 8, for the same reason as
/// in [`rights`](super::rights).
const PORT_KEPT: i16 = -244;

/// An entry, and the state of a socket, in a register that helpers leave alone.
const FOUND: Reg = R7;

/// Notes who may speak to which port here because of the conversation that the packet begins, of
/// this kind; of lasting ones only those that nobody has asked for. The key is lost.
pub(super) fn note(a: &mut Assembler, own: &Own, kind: Reg) {
    let (tunnel, enter_it, done) = (a.label(), a.label(), a.label());
    a.jump_if(PROTOCOL, If::Ne, i32::from(UDP), done);
    a.jump_if(kind, If::Eq, KIND_BEHIND, tunnel);
    a.jump_if(kind, If::Ne, KIND_LASTING, done);
    load_port(a, KEY_LAST + 2);
    a.jump_if(R1, If::Lt, DEALT_OUT, done);
    a.mov_wide(FOUND, ANSWERS.as_nanos() as u64);
    a.jump(enter_it);

    a.bind(tunnel);
    let nobody = a.label();
    a.load(Size::W, R0, PACKET, skb::INGRESS_IFINDEX);
    a.jump_if(R0, If::Ne, 0, done);
    // A socket that is bound to an interface, or whose address is translated, is one all the same.
    load_udp_sender(a, nobody);
    a.load(Size::W, FOUND, R0, sock::SRC_PORT);
    load_port(a, KEY_LAST + 2);
    a.jump_if(R1, If::Eq, FOUND, done);
    a.bind(nobody);
    a.load(Size::H, R0, R10, KEY_LAST);
    a.store(Size::H, R10, KEY_LAST + 2, R0);
    look_up_socket(a, Helper::SkLookupUdp);
    a.jump_if_wide(R0, If::Eq, 0, done);
    release_keeping_state(a, FOUND);
    a.jump_if(FOUND, If::Eq, sock::ESTABLISHED, done);
    a.mov_wide(FOUND, OWN_LASTING.as_nanos() as u64);

    a.bind(enter_it);
    a.store(Size::H, R10, KEY_LAST, 0);
    a.call(Helper::KtimeGetNs);
    a.alu(Alu::Add, R0, FOUND);
    a.store(Size::Dw, R10, VALUE, R0);
    let (words, at) = own.any_elsewhere();
    a.load_address(R1, words, at);
    a.mov(R2, 1);
    a.store(Size::W, R1, 0, R2);
    enter(a, &own.elsewhere);
    a.bind(done);
}

/// Goes on to `none` if nothing was ever noted. Destroys R1.
pub(super) fn jump_unless_any(a: &mut Assembler, own: &Own, none: Label) {
    let (words, at) = own.any_elsewhere();
    a.load_address(R1, words, at);
    a.load(Size::W, R1, R1, 0);
    a.jump_if(R1, If::Eq, 0, none);
}

/// Jumps to `stay` if the packet is one that this host may get from any port of the sender's. Goes
/// on otherwise.
pub(super) fn stay_if_noted(a: &mut Assembler, own: &Own, stay: Label) {
    let (no, known) = (a.label(), a.label());
    a.jump_if(PROTOCOL, If::Ne, i32::from(UDP), no);
    jump_unless_any(a, own, no);
    a.load(Size::H, R0, R10, KEY_LAST);
    a.store(Size::W, R10, PORT_KEPT, R0);
    a.store(Size::H, R10, KEY_LAST, 0);
    look_up(a, &own.elsewhere);
    a.load(Size::W, R1, R10, PORT_KEPT);
    a.store(Size::H, R10, KEY_LAST, R1);
    a.jump_if_wide(R0, If::Ne, 0, known);
    a.jump(no);
    a.bind(known);
    a.load(Size::Dw, FOUND, R0, 0);
    a.call(Helper::KtimeGetNs);
    a.jump_if_wide(R0, If::Gt, FOUND, no);
    look_up_socket(a, Helper::SkLookupUdp);
    a.jump_if_wide(R0, If::Eq, 0, no);
    release_keeping_state(a, FOUND);
    a.jump(stay);
    a.bind(no);
}
