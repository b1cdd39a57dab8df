//! What the steering programs ask the sockets of this host: who waits for a packet, and who sends
//! one.
//!
//! A stranger can name any port of this host before a program there has opened it. So a flow
//! remembers whether a socket waited for its packets: what later leaves from a socket at that port
//! itself answers nobody, unless a packet came in between.

use std::os::fd::AsFd;

use Reg::{R0, R1, R2, R3, R4, R5, R7, R9, R10};

use super::flows::{KEY, KEY_LAST, KEY_LOCAL, KEY_REMOTE, VALUE};
use super::headers::{skb, sock};
use super::phrases::{PACKET, jump_if_v6};
use crate::kernel::bpf::{Alu, Assembler, Helper, If, Label, Map, Reg, Size};
use crate::model::moved::{TCP, UDP};

/// Where the stack keeps the addresses and ports of a socket, `struct bpf_sock_tuple`.
const TUPLE: i16 = -168;

/// A socket that is looked up, for as long as it is held.
const FOUND: Reg = R9;

/// R0 = the socket of this host that gets the packet of a client with this key, or 0. The program
/// has to release it.
pub(super) fn look_up_socket(a: &mut Assembler, helper: Helper) {
    let (v6, tuple) = (a.label(), a.label());
    jump_if_v6(a, v6);
    for (length, family) in [(4_i16, libc::AF_INET), (16, libc::AF_INET6)] {
        if family == libc::AF_INET6 {
            a.bind(v6);
        }
        for word in (0..length).step_by(4) {
            a.load(Size::W, R0, R10, KEY_REMOTE + word);
            a.store(Size::W, R10, TUPLE + word, R0);
            a.load(Size::W, R0, R10, KEY_LOCAL + word);
            a.store(Size::W, R10, TUPLE + length + word, R0);
        }
        a.load(Size::W, R0, R10, KEY_LAST);
        a.store(Size::W, R10, TUPLE + 2 * length, R0);
        a.mov(R3, i32::from(2 * length + 4));
        a.jump(tuple);
    }
    a.bind(tuple);
    a.mov(R1, PACKET);
    a.mov(R2, R10);
    a.alu(Alu::Add, R2, i32::from(TUPLE));
    // This namespace.
    a.mov(R4, -1);
    a.mov(R5, 0);
    a.call(helper);
}

/// Goes on if a UDP socket of this host waits for the client's packet, and would for anybody's: one
/// that is connected speaks with somebody of its own choice. Jumps to `no` otherwise. FRAGMENT is
/// lost.
pub(super) fn jump_unless_somebody_waits(a: &mut Assembler, no: Label) {
    look_up_socket(a, Helper::SkLookupUdp);
    a.jump_if_wide(R0, If::Eq, 0, no);
    a.mov(FOUND, R0);
    a.load(Size::W, R0, FOUND, sock::STATE);
    a.store(Size::W, R10, TUPLE, R0);
    a.mov(R1, FOUND);
    a.call(Helper::SkRelease);
    a.mov(FOUND, 0);
    a.load(Size::W, R0, R10, TUPLE);
    a.jump_if(R0, If::Eq, sock::ESTABLISHED, no);
}

/// R0 = the socket of this host that sends the packet. Jumps to `none` if none does, or the kernel
/// in the name of one. Destroys R1.
pub(super) fn load_sender(a: &mut Assembler, none: Label) {
    a.load(Size::Dw, R1, PACKET, skb::SK);
    a.jump_if_wide(R1, If::Eq, 0, none);
    a.call(Helper::SkFullsock);
    a.jump_if_wide(R0, If::Eq, 0, none);
}

/// R0 = the UDP socket that sends the packet. Jumps to `none` if there is none: tunnels leave the
/// socket there of what they carry. Destroys R1.
pub(super) fn load_udp_sender(a: &mut Assembler, none: Label) {
    load_sender(a, none);
    a.load(Size::W, R1, R0, sock::PROTOCOL);
    a.jump_if(R1, If::Ne, i32::from(UDP), none);
}

/// Goes on if a socket of this host sends the packet from the key's own address and port. Jumps to
/// `no` if it is forwarded or its source was translated, so that it may answer what was translated
/// the other way; and if the socket is bound to an interface, where no look-up from another one
/// finds it.
pub(super) fn jump_unless_from_own_port(a: &mut Assembler, no: Label) {
    load_sender(a, no);
    a.load(Size::W, R1, R0, sock::BOUND_DEV_IF);
    a.jump_if(R1, If::Ne, 0, no);
    jump_unless_at_own_end(a, R0, no);
}

/// R1 = the port at this place of the key, in this host's order. Destroys R2.
pub(super) fn load_port(a: &mut Assembler, at: i16) {
    a.load(Size::B, R1, R10, at);
    a.alu(Alu::Lsh, R1, 8);
    a.load(Size::B, R2, R10, at + 1);
    a.alu(Alu::Or, R1, R2);
}

/// Goes on if this socket has the key's own address, or any, and its port, so that the addresses
/// and ports on the wire find it. Jumps to `no` if they were translated. Destroys R1 to R4.
pub(super) fn jump_unless_at_own_end(a: &mut Assembler, socket: Reg, no: Label) {
    let (v6, yes) = (a.label(), a.label());
    // The socket's port is in this host's order, the key's as on the wire.
    load_port(a, KEY_LAST + 2);
    a.load(Size::W, R2, socket, sock::SRC_PORT);
    a.jump_if(R1, If::Ne, R2, no);
    a.load(Size::W, R1, R10, KEY);
    a.alu(Alu::And, R1, 0xff00);
    a.jump_if(R1, If::Ne, 4 << 8, v6);
    a.load(Size::W, R1, socket, sock::SRC_IP4);
    a.jump_if(R1, If::Eq, 0, yes);
    a.load(Size::W, R2, R10, KEY_LOCAL);
    a.jump_if(R1, If::Ne, R2, no);
    a.jump(yes);
    a.bind(v6);
    // What differs, and what is set.
    a.mov(R3, 0);
    a.mov(R4, 0);
    for word in (0..16).step_by(4) {
        a.load(Size::W, R1, socket, sock::SRC_IP6 + word);
        a.alu(Alu::Or, R4, R1);
        a.load(Size::W, R2, R10, KEY_LOCAL + word);
        a.alu(Alu::Xor, R1, R2);
        a.alu(Alu::Or, R3, R1);
    }
    a.jump_if(R3, If::Eq, 0, yes);
    a.jump_if(R4, If::Ne, 0, no);
    a.bind(yes);
}

/// The TCP socket that sends the packet, once [`load_tcp_socket`] has found it.
pub(super) const SOCKET: Reg = R7;

/// `SOCK_STREAM`, as the kernel counts.
const SOCK_STREAM: i32 = 1;

/// SOCKET = the TCP socket that sends the packet. Jumps to `none` if no socket of TCP sends it; to
/// `other` if the kernel answers in the name of one: the request behind a SYN-ACK, or the kernel's
/// own socket for resets.
pub(super) fn load_tcp_socket(a: &mut Assembler, none: Label, other: Label) {
    a.load(Size::Dw, R1, PACKET, skb::SK);
    a.jump_if_wide(R1, If::Eq, 0, none);
    a.call(Helper::SkFullsock);
    a.jump_if_wide(R0, If::Eq, 0, other);
    a.mov(SOCKET, R0);
    a.load(Size::W, R0, SOCKET, sock::PROTOCOL);
    a.jump_if(R0, If::Ne, i32::from(TCP), none);
    a.load(Size::W, R0, SOCKET, sock::TYPE);
    a.jump_if(R0, If::Ne, SOCK_STREAM, other);
}

/// How the packets of a TCP socket are taken, if they are: they leave as they are, or with another
/// port ([`shifted`](super::shifted)).
pub(super) const AS_IT_IS: i32 = 1;
pub(super) const SHIFTED: i32 = 2;

/// In the same place: it is one of the tunnel's own, whose datagrams leave as they are.
pub(super) const OF_TUNNEL: i32 = 3;

/// Goes on if one of the tunnel's own sockets sends the packet; jumps to `other` otherwise. Its
/// port does not tell: others may have the same at another address of this host, or behind it.
pub(super) fn jump_unless_of_tunnel(a: &mut Assembler, sockets: Option<&Map>, other: Label) {
    let Some(sockets) = sockets else {
        a.load(Size::W, R0, PACKET, skb::INGRESS_IFINDEX);
        a.jump_if(R0, If::Ne, 0, other);
        return;
    };
    load_sender(a, other);
    look_up_taken(a, sockets, R0);
    a.jump_if_wide(R0, If::Eq, 0, other);
    a.load(Size::W, R0, R0, 0);
    a.jump_if(R0, If::Ne, OF_TUNNEL, other);
}

/// Makes the storage of a socket that has none.
const BPF_SK_STORAGE_GET_F_CREATE: i32 = 1;

/// R0 = where it stands how the packets of this socket are taken, or 0 if they are not.
pub(super) fn look_up_taken(a: &mut Assembler, sockets: &Map, socket: Reg) {
    a.load_map(R1, sockets.as_fd());
    a.mov(R2, socket);
    a.mov(R3, 0);
    a.mov(R4, 0);
    a.call(Helper::SkStorageGet);
}

/// Notes that SOCKET sends into the TUN, and how, which lies there on the stack.
pub(super) fn remember_taken(a: &mut Assembler, sockets: &Map, taken_as: i16) {
    a.load_map(R1, sockets.as_fd());
    a.mov(R2, SOCKET);
    a.mov(R3, R10);
    a.alu(Alu::Add, R3, i32::from(taken_as));
    a.mov(R4, BPF_SK_STORAGE_GET_F_CREATE);
    a.call(Helper::SkStorageGet);
}

/// Notes that SOCKET sends into the TUN, as long as it lives.
pub(super) fn remember_as_it_is(a: &mut Assembler, sockets: &Map) {
    a.store(Size::W, R10, VALUE, AS_IT_IS);
    remember_taken(a, sockets, VALUE);
}

/// `state` = that of the socket at R0, which is released.
pub(super) fn release_keeping_state(a: &mut Assembler, state: Reg) {
    a.load(Size::W, state, R0, sock::STATE);
    a.mov(R1, R0);
    a.call(Helper::SkRelease);
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, OwnedFd};

    use super::*;
    use crate::kernel::bpf::test_run::nanoseconds;
    use crate::kernel::programs::FlowMaps;
    use crate::kernel::programs::phrases::{TC_ACT_UNSPEC, keep_packet, verdict};
    use crate::kernel::programs::testing::{Packet, frame, ports};

    #[test]
    #[ignore = "a measurement: cargo test --lib -- --ignored --nocapture whose_a_datagram_is_costs"]
    fn whose_a_datagram_is_costs() {
        let maps = FlowMaps::with_room(10).expect("run the tests as root");
        let program = |asks: bool| -> OwnedFd {
            let mut asm = Assembler::new();
            let a = &mut asm;
            let other = a.label();
            keep_packet(a);
            if asks {
                jump_unless_of_tunnel(a, maps.sockets.as_ref(), other);
            }
            a.bind(other);
            verdict(a, TC_ACT_UNSPEC);
            asm.finish("ipmoved_test").unwrap().load().unwrap()
        };
        let packet = Packet::new("198.51.100.2", "192.0.2.1", UDP, ports(51820, 51820));
        let frame = frame(&packet.bytes());
        let [with, without] = [true, false].map(|it| nanoseconds(program(it).as_fd(), &frame));
        eprintln!("{with} ns, {without} ns without");
    }
}
