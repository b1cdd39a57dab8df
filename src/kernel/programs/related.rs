//! Replies that come from another port or another address of this host than the client asked: TFTP
//! answers from a new port (RFC 1350 section 4), and a UDP socket that is bound to any address
//! answers from the one that the route prefers.
//!
//! No flow has their addresses and ports, so they are found by the client's end alone. This host
//! speaks first to others by the same look of a packet, and anybody can forge a datagram of such a
//! remote end through the tunnel. So a packet is related only if nothing else explains it:
//!
//! * It belongs to no conversation that this host began or was asked for directly.
//! * A socket waited for what the client sent; or one behind this host, which sends this.
//! * From another port, or from a socket that is connected to the client and may have chosen itself
//!   whom it speaks to, or between equal ports at both ends, where each side may speak first (time,
//!   key exchange, telephony, other tunnels), the client spoke a moment ago, from a port that no
//!   service has: what this host asks is mostly at a well-known port. This host has begun nothing
//!   with that remote end so far; and what no socket sends is not sent from the port of one, as
//!   kernel tunnels do.
//!
//! ```text
//! deliver, UDP of a new flow, and once a second:
//!     update(related, { remote }, { local, ports, began = lookup(own, { remote }) });
//!
//! take_replies, UDP of no flow and no direct conversation:
//!     if (!(it = lookup(related, { remote })) || !(flow = lookup(flows, it's key))) no;
//!     if (now - flow->asked_directly <= ANSWERED_DIRECTLY) no;
//!     if (from a socket) { if (flow->unawaited) no; }
//!     if (same port && remote port != local port && the socket is not connected) {
//!         if (now - flow->seen > REPLY_IDLE) no;
//!         refresh(flow->seen); yes;
//!     }
//!     if (remote port < 1024 || it->began || now - flow->heard > ANSWERED_ANEW) no;
//!     if (not from a socket && a socket has this port) no;
//!     update(flows, key, { now, now, 0, flow->entrance, 0 }); yes;
//! ```

use std::time::Duration;

use Reg::{R0, R1, R2, R7, R10};

use super::flows::{
    ANSWERED_DIRECTLY, FLOW_ASKED_DIRECTLY, FLOW_ENTRANCE, FLOW_HEARD, FLOW_OPENING, FLOW_SEEN,
    FLOW_UNAWAITED, FLOW_VALUE, FlowMaps, KEY, KEY_LAST, KEY_LOCAL, OWN_KEPT, REFRESH, REPLY_IDLE,
    enter_from, enter_now, jump_if_within, look_up,
};
use super::headers::sock;
use super::sockets::{load_sender, look_up_socket};
use crate::kernel::bpf::{Alu, Assembler, Helper, If, Label, Reg, Size};
use crate::model::moved::UDP;

/// How long after a client's last packet it may be answered from another port for the first time.
/// Servers that do so begin at once; where theirs is lost the client asks again within seconds.
pub const ANSWERED_ANEW: Duration = Duration::from_secs(10);

/// Below lie the ports of services (RFC 6335 section 6), from which no client speaks that is
/// answered from another port.
const FIRST_CLIENT_PORT: i32 = 1024;

/// Where the parts of a value of `related` lie in it: the local address, and the key's last part.
const LOCAL: i16 = 0;
const LAST: i16 = 16;
/// Not 0: this host has begun something with that remote end.
const BEGAN: i16 = 20;
/// Length of such a value, in bytes.
pub(super) const RELATED_BYTES: usize = 24;

/// Where the stack keeps the local end of the packet's key meanwhile: the address, and the port.
const SAVED: i16 = -224;
const SAVED_PORT: i16 = SAVED + 16;

/// Jumps to `other` unless the key is one of UDP.
fn jump_unless_udp(a: &mut Assembler, other: Label) {
    a.load(Size::W, R0, R10, KEY);
    a.alu(Alu::And, R0, 0xff);
    a.jump_if(R0, If::Ne, i32::from(UDP), other);
}

/// Remembers by the client's end the flow in the key, if it is one of UDP: for where a client's
/// packet is delivered. The key is lost.
pub(super) fn relate(a: &mut Assembler, maps: &FlowMaps) {
    let (none, done) = (a.label(), a.label());
    jump_unless_udp(a, done);
    for word in (0..16).step_by(4) {
        a.load(Size::W, R0, R10, KEY_LOCAL + word);
        a.store(Size::W, R10, FLOW_VALUE + LOCAL + word, R0);
    }
    a.load(Size::W, R0, R10, KEY_LAST);
    a.store(Size::W, R10, FLOW_VALUE + LAST, R0);
    a.store(Size::W, R10, FLOW_VALUE + BEGAN, 0);
    forget_local_end(a);
    look_up(a, &maps.own);
    a.jump_if_wide(R0, If::Eq, 0, none);
    let recently = a.label();
    a.mov(R7, R0);
    jump_if_within(a, (R7, 0), OWN_KEPT, recently);
    a.jump(none);
    a.bind(recently);
    a.store(Size::W, R10, FLOW_VALUE + BEGAN, 1);
    a.bind(none);
    enter_from(a, &maps.related, FLOW_VALUE);
    a.bind(done);
}

/// Remembers that this host has begun something with the remote end in the key, if that is of UDP.
pub(super) fn remember_remote_end(a: &mut Assembler, maps: &FlowMaps) {
    let done = a.label();
    jump_unless_udp(a, done);
    save_local_end(a);
    forget_local_end(a);
    enter_now(a, &maps.own);
    restore_local_end(a);
    a.bind(done);
}

/// Jumps to `yes` if the packet, which belongs to no conversation that is known, answers a client
/// of the tunnel from another port or address. R7 is lost.
pub(super) fn jump_if_related(a: &mut Assembler, maps: &FlowMaps, yes: Label) {
    let (no, unrelated) = (a.label(), a.label());
    jump_unless_udp(a, no);
    save_local_end(a);
    forget_local_end(a);
    look_up(a, &maps.related);
    a.jump_if_wide(R0, If::Eq, 0, unrelated);
    for word in (0..16).step_by(4) {
        a.load(Size::W, R1, R0, LOCAL + word);
        a.store(Size::W, R10, KEY_LOCAL + word, R1);
    }
    a.load(Size::W, R1, R0, LAST);
    a.store(Size::W, R10, KEY_LAST, R1);
    a.load(Size::W, R1, R0, BEGAN);
    a.store(Size::W, R10, FLOW_VALUE + FLOW_OPENING, R1);
    look_up(a, &maps.flows);
    a.jump_if_wide(R0, If::Eq, 0, unrelated);
    a.mov(R7, R0);

    let (by_the_tunnel, sent, no_socket) = (a.label(), a.label(), a.label());
    a.load(Size::Dw, R0, R7, FLOW_ASKED_DIRECTLY);
    a.jump_if_wide(R0, If::Eq, 0, by_the_tunnel);
    jump_if_within(a, (R7, FLOW_ASKED_DIRECTLY), ANSWERED_DIRECTLY, unrelated);
    a.bind(by_the_tunnel);
    // R0 = the state of the socket, or 0 where none sends it.
    load_sender(a, no_socket);
    a.load(Size::W, R1, R7, FLOW_UNAWAITED);
    a.jump_if(R1, If::Ne, 0, unrelated);
    a.load(Size::W, R0, R0, sock::STATE);
    a.jump(sent);
    a.bind(no_socket);
    a.mov(R0, 0);
    a.bind(sent);

    // A server that connects its socket to whom it answers does both.
    let (other_port, fresh) = (a.label(), a.label());
    a.load(Size::H, R1, R10, KEY_LAST + 2);
    a.load(Size::H, R2, R10, SAVED_PORT);
    a.jump_if(R1, If::Ne, R2, other_port);
    a.jump_if(R0, If::Eq, sock::ESTABLISHED, other_port);
    a.load(Size::H, R1, R10, KEY_LAST);
    a.jump_if(R1, If::Eq, R2, other_port);
    restore_local_end(a);
    jump_if_within(a, (R7, FLOW_SEEN), REFRESH, yes);
    jump_if_within(a, (R7, FLOW_SEEN), REPLY_IDLE, fresh);
    a.jump(no);
    a.bind(fresh);
    a.store(Size::Dw, R7, FLOW_SEEN, R0);
    a.jump(yes);

    a.bind(other_port);
    let recent = a.label();
    a.store(Size::Dw, R10, FLOW_VALUE + FLOW_SEEN, R0);
    a.load(Size::W, R0, R10, FLOW_VALUE + FLOW_OPENING);
    a.jump_if(R0, If::Ne, 0, unrelated);
    a.load(Size::B, R0, R10, KEY_LAST);
    a.alu(Alu::Lsh, R0, 8);
    a.load(Size::B, R1, R10, KEY_LAST + 1);
    a.alu(Alu::Or, R0, R1);
    a.jump_if(R0, If::Lt, FIRST_CLIENT_PORT, unrelated);
    jump_if_within(a, (R7, FLOW_HEARD), ANSWERED_ANEW, recent);
    a.jump(unrelated);
    a.bind(recent);
    a.load(Size::W, R0, R7, FLOW_ENTRANCE);
    a.store(Size::W, R10, FLOW_VALUE + FLOW_ENTRANCE, R0);
    restore_local_end(a);
    let (enter, free) = (a.label(), a.label());
    a.load(Size::Dw, R0, R10, FLOW_VALUE + FLOW_SEEN);
    a.jump_if_wide(R0, If::Ne, 0, enter);
    look_up_socket(a, Helper::SkLookupUdp);
    a.jump_if_wide(R0, If::Eq, 0, free);
    a.mov(R1, R0);
    a.call(Helper::SkRelease);
    a.jump(no);
    a.bind(free);
    a.bind(enter);
    a.call(Helper::KtimeGetNs);
    a.store(Size::Dw, R10, FLOW_VALUE + FLOW_SEEN, R0);
    a.store(Size::Dw, R10, FLOW_VALUE + FLOW_HEARD, R0);
    a.store(Size::Dw, R10, FLOW_VALUE + FLOW_ASKED_DIRECTLY, 0);
    a.store(Size::W, R10, FLOW_VALUE + FLOW_UNAWAITED, 0);
    // Where there is no room, the next packet is found like this one.
    enter_from(a, &maps.flows, FLOW_VALUE);
    a.jump(yes);

    a.bind(unrelated);
    restore_local_end(a);
    a.bind(no);
}

/// Keeps the local end of the key.
fn save_local_end(a: &mut Assembler) {
    for word in (0..16).step_by(4) {
        a.load(Size::W, R0, R10, KEY_LOCAL + word);
        a.store(Size::W, R10, SAVED + word, R0);
    }
    a.load(Size::H, R0, R10, KEY_LAST + 2);
    a.store(Size::H, R10, SAVED_PORT, R0);
}

/// Leaves the remote end alone in the key.
fn forget_local_end(a: &mut Assembler) {
    for word in (0..16).step_by(4) {
        a.store(Size::W, R10, KEY_LOCAL + word, 0);
    }
    a.store(Size::H, R10, KEY_LAST + 2, 0);
}

/// Gives the key its local end back.
fn restore_local_end(a: &mut Assembler) {
    for word in (0..16).step_by(4) {
        a.load(Size::W, R0, R10, SAVED + word);
        a.store(Size::W, R10, KEY_LOCAL + word, R0);
    }
    a.load(Size::H, R0, R10, SAVED_PORT);
    a.store(Size::H, R10, KEY_LAST + 2, R0);
}
