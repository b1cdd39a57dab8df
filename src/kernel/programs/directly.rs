//! Counts the conversations that come to this host directly, by the end here: the new server tells
//! from it how far a move has come.
//!
//! Owns the map and what counts. Only what went on does, so that a flood with forged sources counts
//! nothing, and it costs an ordinary packet next to nothing:
//!
//! * TCP of a socket of this host: the first packet that its connection itself sends. The kernel
//!   makes that socket when the handshake is over, and answers a SYN without one. A connection that
//!   this host has asked for begins with a SYN.
//! * TCP of hosts behind this one: the first packet that is no part of the handshake. One that was
//!   there before this memory counts as well.
//! * UDP: the first answer to what came directly. It may be forged, as it may be by the tunnel.
//!
//! ```text
//! struct end {                 // 24 bytes
//!     u32 family_and_protocol; // this and the address as in `struct key`
//!     u8  local[16];
//!     u8  port[2];             // as on the wire
//!     u8  zero[2];
//! };
//! directly   u64, by end
//! ```

use std::net::SocketAddr;
use std::os::fd::AsFd;

use Reg::{R0, R1, R2, R3, R4, R10};

use super::flows::{FlowMaps, KEY, KEY_LAST, flow_of, refused};
use super::headers::{skb, tcp_sock};
use super::parse::load_syn;
use super::phrases::{PACKET, look_up_at};
use super::sockets::jump_unless_from_own_port;
use crate::kernel::bpf::{Alu, Assembler, BpfError, Helper, If, Label, MapKind, Reg, Shape, Size};
use crate::packet::SYN;

/// Ends that have a count. The one used least recently gives way: a host serves a few ports, and
/// many only where something like FTP opens them one by one.
const MAX_ENDS: u32 = 4_096;

const END_BYTES: usize = 24;

/// The measures of the map.
pub(super) const DIRECTLY: Shape = Shape {
    kind: MapKind::LruHash,
    name: "ipmoved_direct",
    key_size: END_BYTES,
    value_size: 8,
    max_entries: MAX_ENDS,
};

/// Where the end and its first count lie on the stack.
const END: i16 = -360;
const ONE: i16 = -336;

/// Of what came directly without TCP, as bits: nobody waited for it; and its answer was counted.
pub(super) const UNAWAITED: i32 = 1;
pub(super) const ANSWERED: i32 = 2;

/// Counts the connection of this TCP socket, unless it was counted. Destroys R0 to R5.
pub(super) fn count_connection(a: &mut Assembler, maps: &FlowMaps, socket: Reg) {
    let not = a.label();
    a.mov(R1, socket);
    a.call(Helper::TcpSock);
    a.jump_if_wide(R0, If::Eq, 0, not);
    // The kernel has added this packet's segments before.
    a.load(Size::W, R1, R0, tcp_sock::SEGS_OUT);
    a.load(Size::W, R2, PACKET, skb::GSO_SEGS);
    a.jump_if(R1, If::Ne, R2, not);
    load_syn(a);
    a.jump_if(R0, If::Eq, i32::from(SYN), not);
    count_end(a, maps);
    a.bind(not);
}

/// Jumps to `own` if the packet is no answer to what came directly, whose entry is at `entry`;
/// otherwise counts the conversation with its first answer, and jumps to `done`.
pub(super) fn count_answer(
    a: &mut Assembler,
    maps: &FlowMaps,
    entry: Reg,
    own: Label,
    done: Label,
) {
    let answer = a.label();
    a.load(Size::Dw, R0, entry, 0);
    a.alu(Alu::And, R0, UNAWAITED);
    a.jump_if_wide(R0, If::Eq, 0, answer);
    jump_unless_from_own_port(a, answer);
    a.jump(own);
    a.bind(answer);
    a.load(Size::Dw, R0, entry, 0);
    a.jump_if(R0, If::Set, ANSWERED, done);
    a.alu(Alu::Or, R0, ANSWERED);
    a.store(Size::Dw, entry, 0, R0);
    count_end(a, maps);
    a.jump(done);
}

/// Counts a conversation with the local end of the key. Destroys R0 to R5.
pub(super) fn count_end(a: &mut Assembler, maps: &FlowMaps) {
    let (first, counted) = (a.label(), a.label());
    for word in (0..20).step_by(4) {
        a.load(Size::W, R0, R10, KEY + word);
        a.store(Size::W, R10, END + word, R0);
    }
    a.load(Size::H, R0, R10, KEY_LAST + 2);
    a.store(Size::W, R10, END + 20, 0);
    a.store(Size::H, R10, END + 20, R0);
    look_up_at(a, &maps.directly, END);
    a.jump_if_wide(R0, If::Eq, 0, first);
    a.mov(R1, 1);
    a.add_atomically(R0, 0, R1);
    a.jump(counted);
    a.bind(first);
    a.store(Size::Dw, R10, ONE, 1);
    a.load_map(R1, maps.directly.as_fd());
    a.mov(R2, R10);
    a.alu(Alu::Add, R2, i32::from(END));
    a.mov(R3, R10);
    a.alu(Alu::Add, R3, i32::from(ONE));
    a.mov(R4, 0);
    a.call(Helper::MapUpdate);
    a.bind(counted);
}

impl FlowMaps {
    /// How many conversations came directly to each end of this host, by protocol.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn came_directly(&self) -> Result<Vec<(u8, SocketAddr, u64)>, BpfError> {
        let (mut ends, mut place) = (Vec::new(), None);
        let mut look = |end: &[u8], count: &[u8]| {
            // The key of a flow whose remote end is left out.
            let mut key = [0; 40];
            key[..20].copy_from_slice(&end[..20]);
            key[38..].copy_from_slice(&end[20..22]);
            let count = count.try_into().map_or(0, u64::from_ne_bytes);
            ends.extend(flow_of(&key).map(|flow| (flow.protocol, flow.local, count)));
        };
        while (self.directly.read_some(&mut place, MAX_ENDS, &mut look)).map_err(refused)? {}
        Ok(ends)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
    use std::os::fd::OwnedFd;

    use super::*;
    use crate::kernel::bpf::test_run::{nanoseconds, run};
    use crate::kernel::netlink::{Direction, FilterSlot, Netlink};
    use crate::kernel::programs::testing::{L2, Packet, frame, ports, tcp};
    use crate::kernel::programs::{arrivals, take_replies};
    use crate::kernel::testing::in_fresh_namespace;
    use crate::model::moved::{TCP, UDP};
    use crate::packet::{ACK, FIN, RST};

    struct Bed {
        maps: FlowMaps,
        ingress: OwnedFd,
        egress: OwnedFd,
    }

    impl Bed {
        fn new() -> Self {
            let maps = FlowMaps::new(1000).expect("run the tests as root");
            Self {
                ingress: arrivals(&maps, L2, 51820).unwrap().load().unwrap(),
                egress: take_replies(&maps, L2, 1, 51820, &[])
                    .unwrap()
                    .load()
                    .unwrap(),
                maps,
            }
        }

        fn comes(&self, packet: &Packet) {
            run(self.ingress.as_fd(), &frame(&packet.bytes()));
        }

        fn leaves(&self, packet: &Packet) {
            run(self.egress.as_fd(), &frame(&packet.bytes()));
        }

        fn counted(&self) -> Vec<(u8, String, u64)> {
            let mut all: Vec<_> = self.maps.came_directly().unwrap();
            all.sort_unstable();
            let named =
                |(protocol, end, count): (u8, SocketAddr, u64)| (protocol, end.to_string(), count);
            all.into_iter().map(named).collect()
        }
    }

    const ENDS: [(&str, &str); 2] = [
        ("203.0.113.7", "198.51.100.2"),
        ("2001:db8:c::7", "2001:db8:b::2"),
    ];

    #[test]
    fn what_hosts_behind_this_one_answer_counts_once_it_went_on() {
        in_fresh_namespace(|| {
            for (client, here) in ENDS {
                let bed = Bed::new();
                let out = |port, flags| Packet::new(here, client, TCP, tcp(80, port, flags));
                for port in 1..1_000 {
                    bed.comes(&Packet::new(client, here, TCP, tcp(port, 80, SYN)));
                    bed.leaves(&out(port, SYN | ACK));
                    bed.leaves(&out(port, RST));
                }
                assert_eq!(bed.counted(), [], "a flood");
                for port in 1..4 {
                    bed.leaves(&out(port, SYN | ACK));
                    for flags in [ACK, ACK, FIN | ACK, ACK] {
                        bed.leaves(&out(port, flags));
                    }
                }
                // One that begins here.
                for flags in [SYN, ACK, ACK] {
                    bed.leaves(&Packet::new(here, client, TCP, tcp(40_000, 443, flags)));
                }
                let end = SocketAddr::new(here.parse().unwrap(), 80).to_string();
                assert_eq!(bed.counted(), [(TCP, end, 3)]);
            }
        });
    }

    #[test]
    fn datagrams_count_with_their_first_answer_whoever_sends_it() {
        in_fresh_namespace(|| {
            for (client, here) in ENDS {
                let bed = Bed::new();
                let ask = |port| Packet::new(client, here, UDP, ports(port, 53));
                let answer = |port| Packet::new(here, client, UDP, ports(53, port));
                (1..1_000).for_each(|port| bed.comes(&ask(port)));
                assert_eq!(bed.counted(), [], "nobody answers a flood");
                for _ in 0..3 {
                    for port in [7, 8] {
                        bed.comes(&ask(port));
                        bed.leaves(&answer(port));
                        bed.leaves(&answer(port));
                    }
                }
                // What this host says first is no answer.
                bed.leaves(&Packet::new(here, client, UDP, ports(123, 123)));
                let end = SocketAddr::new(here.parse().unwrap(), 53).to_string();
                assert_eq!(bed.counted(), [(UDP, end, 2)]);
            }
        });
    }

    /// The programs on `lo`, where both ends are this host's.
    #[test]
    fn a_connection_of_a_socket_counts_once_at_the_end_that_was_asked() {
        in_fresh_namespace(|| {
            let netlink = Netlink::new().unwrap();
            netlink.set_link_up(1).unwrap();
            let bed = Bed::new();
            netlink.add_clsact(1).unwrap();
            let slot = FilterSlot {
                index: 1,
                direction: Direction::Egress,
                priority: 1,
                handle: 1,
            };
            netlink
                .add_filter(slot, bed.egress.as_fd(), "ipmoved_reply")
                .unwrap();
            for at in ["127.0.0.1:80", "[::1]:80"] {
                let listener = TcpListener::bind(at).unwrap();
                for bytes in [1, 200_000, 0] {
                    let mut near = TcpStream::connect(at).unwrap();
                    let (mut far, _) = listener.accept().unwrap();
                    let sends = std::thread::spawn(move || {
                        near.write_all(b"?").unwrap();
                        let mut all = Vec::new();
                        near.read_to_end(&mut all).unwrap();
                        all.len()
                    });
                    far.read_exact(&mut [0]).unwrap();
                    far.write_all(&vec![0; bytes]).unwrap();
                    drop(far);
                    assert_eq!(sends.join().unwrap(), bytes);
                }
            }
            // Nobody listens.
            TcpStream::connect("127.0.0.1:81").unwrap_err();
            let udp = UdpSocket::bind("127.0.0.1:53").unwrap();
            udp.send_to(b"?", "127.0.0.1:54").unwrap();
            let ends = [(TCP, "127.0.0.1:80".into(), 3), (TCP, "[::1]:80".into(), 3)];
            assert_eq!(bed.counted(), ends);
        });
    }

    #[test]
    fn ends_beyond_the_bound_displace_others() {
        let bed = Bed::new();
        let (client, here) = ENDS[0];
        for port in 1..=u16::try_from(MAX_ENDS * 2).unwrap() {
            let mut packet = Packet::new(here, client, TCP, tcp(80, 9, ACK));
            packet.src = IpAddr::from((0xc633_0000 + u32::from(port)).to_be_bytes());
            bed.leaves(&packet);
        }
        let left = bed.counted().len();
        assert!(left <= MAX_ENDS as usize && left > 1_000, "{left}");
    }

    /// `cargo test --lib directly::tests::what_it_costs -- --ignored --nocapture`
    #[test]
    #[ignore = "it measures"]
    fn what_it_costs() {
        in_fresh_namespace(|| {
            let bed = Bed::new();
            let (client, here) = ENDS[0];
            let cost = |packet: &Packet, program: &OwnedFd| {
                nanoseconds(program.as_fd(), &frame(&packet.bytes()))
            };
            let of_tcp = Packet::new(here, client, TCP, tcp(80, 9, ACK));
            println!(
                "TCP of a host behind, known: {} ns",
                cost(&of_tcp, &bed.egress)
            );
            let ask = Packet::new(client, here, UDP, ports(9, 53));
            bed.comes(&ask);
            println!("UDP that comes, known: {} ns", cost(&ask, &bed.ingress));
            let answer = Packet::new(here, client, UDP, ports(53, 9));
            println!(
                "UDP that leaves, counted: {} ns",
                cost(&answer, &bed.egress)
            );
            let syn = Packet::new(client, here, TCP, tcp(9, 80, SYN));
            println!("TCP that comes, SYN: {} ns", cost(&syn, &bed.ingress));
            let ack = Packet::new(client, here, TCP, tcp(9, 80, ACK));
            println!("TCP that comes: {} ns", cost(&ack, &bed.ingress));
        });
    }
}
