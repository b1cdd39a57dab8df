//! Tells whether something on this host waits for what comes to an address and port.
//!
//! The daemon runs it on a packet that it has made up (`BPF_PROG_TEST_RUN`), so it stands on no
//! interface. The kernel looks the socket up as it does for a packet: bound to the address, to any,
//! or to `::` with IPv4 or without, shared between processes, bound to a device. Lists of sockets
//! do not say all of that.
//!
//! ```text
//! parse();                                                // other: no
//! if (TCP) return sk_lookup_tcp(key)->state == LISTEN;
//! if (UDP) return sk_lookup_udp(key)->state != ESTABLISHED;
//! ```

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};

use Reg::{R0, R9};

use etherparse::{IpNumber, Ipv4Header, Ipv6Header, TcpHeader, UdpHeader};

use super::headers::sock;
use super::parse::{Side, Ways, parse};
use super::phrases::{PROTOCOL, TC_ACT_UNSPEC, keep_packet, verdict};
use super::sockets::{look_up_socket, release_keeping_state};
use crate::kernel::bpf::test_run::ask;
use crate::kernel::bpf::{Assembler, BpfError, Helper, If, Program, Reg};
use crate::model::moved::{TCP, UDP};

/// Length of the link-layer header of the packet that is made up.
const ETHERNET_HEADER: u32 = 14;

/// Verdict of this program alone.
const YES: i32 = 1;

/// The state of a socket that was found.
const STATE: Reg = R9;

/// Asks who listens.
#[derive(Debug)]
pub struct Listening(OwnedFd);

impl Listening {
    /// Loads the program.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn new() -> Result<Self, BpfError> {
        Ok(Self(listens()?.load()?))
    }

    /// Whether something waits for what comes to this end of this host by one of the links, or by
    /// none in particular; `None` if the kernel does not say.
    pub fn at(&self, protocol: u8, end: SocketAddr, links: &[u32]) -> Option<bool> {
        let frame = frame(protocol, end)?;
        let mut said = Some(false);
        // First for a packet that comes from this host itself.
        for link in [0].iter().chain(links) {
            match ask(self.0.as_fd(), &frame, *link) {
                Ok(YES) => return Some(true),
                Ok(_) => {}
                Err(_) => said = None,
            }
        }
        said
    }
}

/// The program.
pub(super) fn listens() -> Result<Program, BpfError> {
    let mut asm = Assembler::new();
    let a = &mut asm;
    let ways = Ways::new(a);
    let (yes, udp) = (a.label(), a.label());
    keep_packet(a);
    parse(a, ETHERNET_HEADER, Side::Client, ways);
    a.bind(ways.flow);
    a.jump_if(PROTOCOL, If::Eq, i32::from(UDP), udp);
    a.jump_if(PROTOCOL, If::Ne, i32::from(TCP), ways.other);
    look_up_socket(a, Helper::SkLookupTcp);
    a.jump_if_wide(R0, If::Eq, 0, ways.other);
    release_keeping_state(a, STATE);
    a.jump_if(STATE, If::Eq, sock::LISTEN, yes);
    a.jump(ways.other);
    a.bind(udp);
    look_up_socket(a, Helper::SkLookupUdp);
    a.jump_if_wide(R0, If::Eq, 0, ways.other);
    release_keeping_state(a, STATE);
    a.jump_if(STATE, If::Ne, sock::ESTABLISHED, yes);
    for label in [ways.later, ways.none, ways.quoted, ways.other] {
        a.bind(label);
    }
    verdict(a, TC_ACT_UNSPEC);
    a.bind(yes);
    verdict(a, YES);
    asm.finish("ipmoved_listens")
}

/// A packet to that end, from nobody: no connection is in its way.
fn frame(protocol: u8, end: SocketAddr) -> Option<Vec<u8>> {
    let mut transport = Vec::new();
    let number = match protocol {
        TCP => {
            let tcp = TcpHeader {
                syn: true,
                ..TcpHeader::new(0, end.port(), 0, 0)
            };
            tcp.write(&mut transport).ok()?;
            IpNumber::TCP
        }
        UDP => {
            let udp = UdpHeader {
                source_port: 0,
                destination_port: end.port(),
                length: UdpHeader::LEN as u16,
                checksum: 0,
            };
            udp.write(&mut transport).ok()?;
            IpNumber::UDP
        }
        _ => return None,
    };
    let mut frame = vec![0; 12];
    let length = transport.len() as u16;
    match end.ip() {
        IpAddr::V4(addr) => {
            frame.extend([8, 0]);
            let nobody = Ipv4Addr::UNSPECIFIED.octets();
            let header = Ipv4Header::new(length, 64, number, nobody, addr.octets()).ok()?;
            header.write(&mut frame).ok()?;
        }
        IpAddr::V6(addr) => {
            frame.extend([0x86, 0xdd]);
            let header = Ipv6Header {
                payload_length: length,
                next_header: number,
                hop_limit: 64,
                source: Ipv6Addr::UNSPECIFIED.octets(),
                destination: addr.octets(),
                ..Ipv6Header::default()
            };
            header.write(&mut frame).ok()?;
        }
    }
    frame.extend(transport);
    Some(frame)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};

    use super::*;
    use crate::kernel::netlink::Netlink;
    use crate::kernel::testing::{in_fresh_namespace, sysctl, veth};

    #[test]
    fn a_listener_is_found_however_it_is_bound() {
        in_fresh_namespace(|| {
            let netlink = Netlink::new().unwrap();
            let link = veth(&netlink);
            sysctl("net/ipv4/ip_nonlocal_bind", "1");
            sysctl("net/ipv6/ip_nonlocal_bind", "1");
            sysctl("net/ipv6/bindv6only", "0");
            let listening = Listening::new().expect("run the tests as root");
            let at = |protocol, end: &str| {
                let end = end.parse().unwrap();
                listening.at(protocol, end, &[link.index]).unwrap()
            };
            let (v4, v6) = ("198.51.100.2:80", "[2001:db8:b::2]:80");
            let both = |protocol| [at(protocol, v4), at(protocol, v6)];
            assert_eq!([both(TCP), both(UDP)], [[false; 2]; 2]);
            for (bound, expected) in [
                (v4, [true, false]),
                (v6, [false, true]),
                ("0.0.0.0:80", [true, false]),
                ("[::]:80", [true, true]),
                ("127.0.0.1:80", [false, false]),
                ("198.51.100.3:80", [false, false]),
                ("198.51.100.2:81", [false, false]),
            ] {
                let tcp = TcpListener::bind(bound).unwrap();
                assert_eq!([both(TCP), both(UDP)], [expected, [false; 2]], "{bound}");
                drop(tcp);
                let udp = UdpSocket::bind(bound).unwrap();
                assert_eq!([both(TCP), both(UDP)], [[false; 2], expected], "{bound}");
                drop(udp);
            }
            assert_eq!([both(TCP), both(UDP)], [[false; 2]; 2]);
            sysctl("net/ipv6/bindv6only", "1");
            let only = TcpListener::bind("[::]:80").unwrap();
            assert_eq!(both(TCP), [false, true], "`::` without IPv4");
            drop(only);
            assert_eq!(listening.at(47, v4.parse().unwrap(), &[]), None);
        });
    }

    #[test]
    fn what_is_no_listener_is_none_and_a_device_does_not_hide_one() {
        in_fresh_namespace(|| {
            let netlink = Netlink::new().unwrap();
            let link = veth(&netlink);
            netlink.set_link_up(1).unwrap();
            let listening = Listening::new().expect("run the tests as root");
            let end = "127.0.0.1:80".parse().unwrap();
            let listener = TcpListener::bind(end).unwrap();
            let _client = TcpStream::connect(end).unwrap();
            let (_conn, _) = listener.accept().unwrap();
            drop(listener);
            assert_eq!(listening.at(TCP, end, &[]), Some(false), "a connection");
            let udp = UdpSocket::bind(end).unwrap();
            udp.connect("127.0.0.1:9").unwrap();
            assert_eq!(listening.at(UDP, end, &[]), Some(false), "connected");
            let bound = UdpSocket::bind("0.0.0.0:53").unwrap();
            let device = Some(link.name.as_bytes());
            socket2::SockRef::from(&bound).bind_device(device).unwrap();
            let end = "198.51.100.2:53".parse().unwrap();
            assert_eq!(listening.at(UDP, end, &[]), Some(false));
            assert_eq!(listening.at(UDP, end, &[link.index]), Some(true));
        });
    }
}
