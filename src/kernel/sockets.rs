//! The conversations that this host's own sockets have, and how to end them.
//!
//! Owns dumps and requests over `NETLINK_SOCK_DIAG` (linux/inet_diag.h). It is for commands that
//! people run: a daemon does not open such a socket, through which whoever takes it over could end
//! others' connections.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;

use crate::kernel::netlink::{ask, attributes};

/// `SOCK_DIAG_BY_FAMILY` and `SOCK_DESTROY` (linux/sock_diag.h).
const BY_FAMILY: u16 = 20;
const DESTROY: u16 = 21;

/// States of net/tcp_states.h, as bits. Of a connection that this host has closed, and whose other
/// end knows, nothing more is to come: `FIN_WAIT2`, `TIME_WAIT`.
const ESTABLISHED: u32 = 1 << 1;
const SYN_RECV: u32 = 1 << 3;
const FIN_WAIT1: u32 = 1 << 4;
const FIN_WAIT2: u32 = 1 << 5;
const CLOSE_WAIT: u32 = 1 << 8;
/// Of UDP, a socket that is not connected.
const CLOSE: u32 = 1 << 7;
const LAST_ACK: u32 = 1 << 9;
/// Of UDP.
const UNCONNECTED: u32 = 1 << 7;
const LISTEN: u32 = 1 << 10;
const CLOSING: u32 = 1 << 11;

/// TCP connections that live.
const LIVING: u32 = ESTABLISHED | SYN_RECV | FIN_WAIT1 | CLOSE_WAIT | LAST_ACK | CLOSING;

const FAMILIES: [u8; 2] = [libc::AF_INET as u8, libc::AF_INET6 as u8];

/// Length of `struct inet_diag_sockid`, and where it lies in an answer.
const ID: usize = 48;
const ID_ANSWERED: usize = 4;

/// A socket with a conversation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Conversation {
    /// The IP protocol.
    pub protocol: u8,
    /// The end here.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
    family: u8,
    /// The kernel's name for it.
    id: [u8; ID],
}

/// Hands over each TCP connection that lives.
///
/// # Errors
/// If the kernel does not tell.
pub fn tcp(mut each: impl FnMut(&Conversation)) -> io::Result<()> {
    dump(libc::IPPROTO_TCP as u8, LIVING, &mut each)
}

/// Hands over each conversation that can be ended: TCP that is not over yet, and connected UDP.
///
/// # Errors
/// If the kernel does not tell.
pub fn all(mut each: impl FnMut(&Conversation)) -> io::Result<()> {
    dump(libc::IPPROTO_TCP as u8, LIVING | FIN_WAIT2, &mut each)?;
    dump(libc::IPPROTO_UDP as u8, ESTABLISHED, &mut each)
}

/// Hands over each socket that waits for clients: TCP that listens, and UDP that is not connected.
/// Its other end means nothing.
///
/// # Errors
/// If the kernel does not tell.
pub fn bound(mut each: impl FnMut(&Conversation)) -> io::Result<()> {
    dump(libc::IPPROTO_TCP as u8, LISTEN, &mut each)?;
    dump(libc::IPPROTO_UDP as u8, CLOSE, &mut each)
}

/// The TCP ports that something listens on, at whichever address.
///
/// # Errors
/// If the kernel does not tell.
pub fn listening() -> io::Result<BTreeSet<u16>> {
    let mut ports = BTreeSet::new();
    dump(libc::IPPROTO_TCP as u8, LISTEN, &mut |it| {
        ports.insert(it.local.port());
    })?;
    Ok(ports)
}

/// Whether what is bound to a port at any address of IPv6 takes IPv6 alone.
///
/// # Errors
/// If the kernel does not tell.
pub fn only_v6(protocol: u8, port: u16) -> io::Result<bool> {
    /// What comes before the attributes in `struct inet_diag_msg`, and `INET_DIAG_SKV6ONLY`.
    const HEAD: usize = 72;
    const ONLY_V6: u16 = 11;
    let (mut only, mut both) = (false, false);
    let all = about(FAMILIES[1], protocol, LISTEN | UNCONNECTED, &[0; ID]);
    ask(NETLINK_SOCK_DIAG, BY_FAMILY, NLM_F_DUMP, &all, |answer| {
        let of_port = |it: &Conversation| it.local.port() == port && it.remote.port() == 0;
        if read(protocol, answer).is_some_and(|it| of_port(&it)) {
            let mut rest = attributes(answer.get(HEAD..).unwrap_or_default());
            let flag = rest.find(|(kind, _)| *kind == ONLY_V6);
            match flag.and_then(|(_, value)| value.first()) {
                Some(1) => only = true,
                _ => both = true,
            }
        }
        true
    })?;
    Ok(only && !both)
}

/// Ends a conversation: its socket fails, and of TCP the other end gets a reset. One that has ended
/// meanwhile is no error.
///
/// # Errors
/// If the kernel refuses: it cannot do it (`CONFIG_INET_DIAG_DESTROY`), or not for this user.
pub fn end(conversation: &Conversation) -> io::Result<()> {
    let &Conversation {
        family,
        protocol,
        id,
        ..
    } = conversation;
    let named = about(family, protocol, !0, &id);
    match ask(NETLINK_SOCK_DIAG, DESTROY, NLM_F_ACK, &named, |_| true) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        result => result,
    }
}

fn dump(protocol: u8, states: u32, each: &mut dyn FnMut(&Conversation)) -> io::Result<()> {
    for family in FAMILIES {
        let all = about(family, protocol, states, &[0; ID]);
        let result = ask(NETLINK_SOCK_DIAG, BY_FAMILY, NLM_F_DUMP, &all, |answer| {
            if let Some(found) = read(protocol, answer) {
                each(&found);
            }
            true
        });
        match result {
            // A kernel without IPv6, or without the module for this protocol, which has none then.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            result => result?,
        }
    }
    Ok(())
}

/// A `struct inet_diag_req_v2`.
fn about(family: u8, protocol: u8, states: u32, id: &[u8; ID]) -> Vec<u8> {
    let mut request = vec![family, protocol, 0, 0];
    request.extend(states.to_ne_bytes());
    request.extend(id);
    request
}

/// A `struct inet_diag_msg`.
fn read(protocol: u8, answer: &[u8]) -> Option<Conversation> {
    let family = *answer.first()?;
    let id: [u8; ID] = answer.get(ID_ANSWERED..ID_ANSWERED + ID)?.try_into().ok()?;
    let port = |at: usize| Some(u16::from_be_bytes(id.get(at..at + 2)?.try_into().ok()?));
    let addr = |at: usize| -> Option<IpAddr> {
        if family == FAMILIES[0] {
            let octets: [u8; 4] = id.get(at..at + 4)?.try_into().ok()?;
            return Some(Ipv4Addr::from(octets).into());
        }
        let octets: [u8; 16] = id.get(at..at + 16)?.try_into().ok()?;
        // A socket of both families has an IPv4 client so.
        Some(IpAddr::from(Ipv6Addr::from(octets)).to_canonical())
    };
    Some(Conversation {
        protocol,
        local: SocketAddr::new(addr(4)?, port(0)?),
        remote: SocketAddr::new(addr(20)?, port(2)?),
        family,
        id,
    })
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::{TcpListener, TcpStream, UdpSocket};

    use super::*;
    use crate::kernel::testing::in_fresh_namespace;

    fn found(each: impl Fn(&mut dyn FnMut(&Conversation))) -> Vec<Conversation> {
        let mut found = Vec::new();
        each(&mut |it| found.push(*it));
        found
    }

    #[test]
    fn conversations_are_found_and_ended_in_both_families() {
        in_fresh_namespace(|| {
            let netlink = crate::kernel::netlink::Netlink::new().unwrap();
            netlink.set_link_up(1).unwrap();
            for addr in ["127.0.0.1:0", "[::1]:0", "[::]:0"] {
                let listener = TcpListener::bind(addr).unwrap();
                let port = listener.local_addr().unwrap().port();
                // The last listens for both families.
                let server: IpAddr = match addr {
                    "[::1]:0" => Ipv6Addr::LOCALHOST.into(),
                    _ => Ipv4Addr::LOCALHOST.into(),
                };
                let mut client = TcpStream::connect((server, port)).unwrap();
                let (accepted, remote) = listener.accept().unwrap();
                let remote = SocketAddr::new(remote.ip().to_canonical(), remote.port());
                assert_eq!(listening().unwrap(), [port].into());
                let waits = found(|each| bound(|it| each(it)).unwrap());
                assert_eq!(waits.len(), 1, "{waits:?}");
                assert_eq!(
                    waits[0].local,
                    addr.replace(":0", &format!(":{port}")).parse().unwrap()
                );
                let local = SocketAddr::new(server, port);
                let all = found(|each| all(|it| each(it)).unwrap());
                assert_eq!(all.len(), 2, "either end: {all:?}");
                let here = all.iter().find(|it| it.local == local).unwrap();
                assert_eq!(here.remote, remote);
                end(here).unwrap();
                let error = client.read(&mut [0]).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
                end(here).unwrap();
                assert_eq!(found(|each| tcp(|it| each(it)).unwrap()), []);
                drop((accepted, listener));
            }
            assert!(!only_v6(libc::IPPROTO_TCP as u8, 7_002).unwrap());
            let of = |alone| {
                let (domain, kind) = (socket2::Domain::IPV6, socket2::Type::STREAM);
                let socket = socket2::Socket::new(domain, kind, None).unwrap();
                socket.set_only_v6(alone).unwrap();
                let any: SocketAddr = "[::]:7002".parse().unwrap();
                socket.bind(&any.into()).unwrap();
                socket.listen(1).unwrap();
                only_v6(libc::IPPROTO_TCP as u8, 7_002).unwrap()
            };
            assert_eq!([of(true), of(false)], [true, false]);
            let (one, other) = ("127.0.0.1:7000", "127.0.0.1:7001");
            let socket = UdpSocket::bind(one).unwrap();
            assert_eq!(found(|each| all(|it| each(it)).unwrap()), []);
            let waits = found(|each| bound(|it| each(it)).unwrap());
            assert_eq!(waits[0].local, one.parse().unwrap());
            socket.connect(other).unwrap();
            assert_eq!(found(|each| bound(|it| each(it)).unwrap()), []);
            let conversations = found(|each| all(|it| each(it)).unwrap());
            assert_eq!(conversations.len(), 1);
            end(&conversations[0]).unwrap();
            let error = socket.recv(&mut [0]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
        });
    }
}
