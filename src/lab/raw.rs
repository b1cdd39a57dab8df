//! Packets that no kernel would send: any protocol, any source, any damage.
//!
//! Owns raw and packet sockets inside the lab. Tests write their own packets; [`packets`] helps.

#![allow(
    unsafe_code,
    reason = "packet sockets have no safe binding: their address is a C structure"
)]

use std::io::{self, ErrorKind, Read};
use std::mem::size_of;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::{Doing, LabError, Namespace, Result};

/// Longest packet that is read.
const MAX_PACKET: usize = 65_600;

/// A wire into an interface: it sends whole IP packets, as they are, to the interface at the other
/// end.
#[derive(Debug)]
pub struct Wire {
    socket: Socket,
    to: [SockAddr; 3],
}

impl Wire {
    /// Sends from `interface` of `from` to `at` on `to`, which must be the other end of the same
    /// link.
    pub fn new(from: &Namespace, interface: &str, to: &Namespace, at: &str) -> Result<Self> {
        let doing = || format!("send raw packets from {interface} of the {}", from.name());
        let mac = to.run(|| hardware_address(at).doing(doing))?;
        from.run(|| {
            let socket = Socket::new(Domain::PACKET, Type::DGRAM, None).doing(doing)?;
            let index = rustix::net::netdevice::name_to_index(&socket, interface).doing(doing)?;
            let to = [libc::ETH_P_IP, libc::ETH_P_IPV6, libc::ETH_P_8021Q]
                .map(|protocol| link_address(index, protocol as u16, mac));
            Ok(Self { socket, to })
        })
    }

    /// Sends one packet, whatever it is.
    pub fn send(&self, packet: &[u8]) -> Result<()> {
        let v6 = packet.first().is_some_and(|byte| byte >> 4 == 6);
        self.send_to(packet, &self.to[usize::from(v6)])
    }

    /// Sends one packet in a frame with a tag (IEEE 802.1Q): of a VLAN, or of none (0), and with a
    /// priority.
    pub fn send_tagged(&self, packet: &[u8], vlan: u16, priority: u16) -> Result<()> {
        let v6 = packet.first().is_some_and(|byte| byte >> 4 == 6);
        let inner = if v6 { libc::ETH_P_IPV6 } else { libc::ETH_P_IP } as u16;
        let mut tagged = Vec::from((priority << 13 | vlan).to_be_bytes());
        tagged.extend(inner.to_be_bytes());
        tagged.extend(packet);
        self.send_to(&tagged, &self.to[2])
    }

    fn send_to(&self, content: &[u8], to: &SockAddr) -> Result<()> {
        loop {
            match self.socket.send_to(content, to) {
                Ok(_) => return Ok(()),
                // The queue of the interface is full. It empties by itself.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    std::thread::sleep(Duration::from_micros(200));
                }
                Err(error) => return Err(error).doing(|| "send a raw packet".into()),
            }
        }
    }
}

/// A raw socket of one IP protocol, for the part of packets behind the IP header.
#[derive(Debug)]
pub struct RawSocket {
    socket: Socket,
    v4: bool,
}

impl RawSocket {
    /// Opens it on a host, bound to one of its addresses.
    pub fn open(namespace: &Namespace, addr: impl Into<IpAddr>, protocol: u8) -> Result<Self> {
        let addr = addr.into();
        let doing = || format!("open a raw socket of protocol {protocol} on {addr}");
        let domain = Domain::for_address(SocketAddr::new(addr, 0));
        let protocol = Protocol::from(i32::from(protocol));
        namespace.run(|| {
            let socket = Socket::new(domain, Type::RAW, Some(protocol)).doing(doing)?;
            socket.bind(&SocketAddr::new(addr, 0).into()).doing(doing)?;
            socket.set_recv_buffer_size(4 << 20).doing(doing)?;
            Ok(Self {
                socket,
                v4: addr.is_ipv4(),
            })
        })
    }

    /// Sets the hop limit of the packets that it sends.
    pub fn set_hops(&self, hops: u8) -> Result<()> {
        let hops = u32::from(hops);
        let set = if self.v4 {
            self.socket.set_ttl_v4(hops)
        } else {
            self.socket.set_unicast_hops_v6(hops)
        };
        set.doing(|| "set a hop limit".into())
    }

    /// Sends a payload to a host.
    pub fn send(&self, to: impl Into<IpAddr>, payload: &[u8]) -> Result<()> {
        let to = to.into();
        self.socket
            .send_to(payload, &SocketAddr::new(to, 0).into())
            .doing(|| format!("send a raw packet to {to}"))
            .map(drop)
    }

    /// The first payload that `wanted` accepts, and its source; an error if none came in time.
    pub fn expect(
        &self,
        patience: Duration,
        wanted: impl Fn(&[u8]) -> bool,
    ) -> Result<(IpAddr, Vec<u8>)> {
        self.hear(patience, wanted)?
            .ok_or_else(|| LabError::unexpected(format!("nothing came within {patience:?}")))
    }

    /// The first payload that `wanted` accepts, and its source, if one came in time.
    pub fn hear(
        &self,
        patience: Duration,
        wanted: impl Fn(&[u8]) -> bool,
    ) -> Result<Option<(IpAddr, Vec<u8>)>> {
        let deadline = Instant::now() + super::patience(patience);
        let mut buffer = vec![0; MAX_PACKET];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let doing = || "listen on a raw socket".into();
            self.socket.set_read_timeout(Some(left)).doing(doing)?;
            let (len, from) = match recv_from(&self.socket, &mut buffer) {
                Ok(received) => received,
                Err(error)
                    if [ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&error.kind()) =>
                {
                    return Ok(None);
                }
                Err(error) => return Err(error).doing(doing),
            };
            // Raw sockets of IPv4 receive the IP header too.
            let skip = if self.v4 {
                usize::from(buffer[0] & 0x0f) * 4
            } else {
                0
            };
            let payload = &buffer[skip.min(len)..len];
            if wanted(payload) {
                return Ok(Some((from, payload.to_vec())));
            }
        }
    }
}

fn recv_from(socket: &Socket, buffer: &mut [u8]) -> io::Result<(usize, IpAddr)> {
    let mut spare: Vec<std::mem::MaybeUninit<u8>> =
        vec![std::mem::MaybeUninit::uninit(); buffer.len()];
    let (len, from) = socket.recv_from(&mut spare)?;
    for (to, byte) in buffer.iter_mut().zip(&spare[..len]) {
        // SAFETY: the kernel has written the first `len` bytes.
        *to = unsafe { byte.assume_init() };
    }
    let from = from.as_socket().ok_or(ErrorKind::AddrNotAvailable)?;
    Ok((len, from.ip()))
}

/// Makes the kernel send each buffer from a socket as datagrams of this size (`UDP_SEGMENT`).
pub fn set_segment(socket: &UdpSocket, size: u16) -> Result<()> {
    let size = libc::c_int::from(size);
    // SAFETY: `size` is a c_int that lives across the call, and its length is given with it.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_UDP,
            libc::UDP_SEGMENT,
            (&raw const size).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error()).doing(|| "set the size of datagrams".into())
}

/// A simpler tap: it counts the IP packets at an interface that `wanted` accepts.
#[derive(Debug)]
pub struct Watch {
    socket: Socket,
}

impl Watch {
    /// Begins to watch.
    pub fn start(namespace: &Namespace, interface: &str) -> Result<Self> {
        let doing = || format!("watch {interface} of the {}", namespace.name());
        namespace.run(|| {
            let all = Protocol::from(i32::from((libc::ETH_P_ALL as u16).to_be()));
            let socket = Socket::new(Domain::PACKET, Type::DGRAM, Some(all)).doing(doing)?;
            let index = rustix::net::netdevice::name_to_index(&socket, interface).doing(doing)?;
            let addr = link_address(index, libc::ETH_P_ALL as u16, [0; 6]);
            socket.bind(&addr).doing(doing)?;
            Ok(Self { socket })
        })
    }

    /// The number of such packets until `pause` has passed in silence.
    pub fn count(&self, pause: Duration, wanted: impl Fn(&[u8]) -> bool) -> Result<usize> {
        let doing = || "watch an interface".into();
        self.socket.set_read_timeout(Some(pause)).doing(doing)?;
        let mut buffer = vec![0; MAX_PACKET];
        let mut count = 0;
        loop {
            match (&self.socket).read(&mut buffer) {
                Ok(len) => count += usize::from(wanted(&buffer[..len])),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(count),
                Err(error) => return Err(error).doing(doing),
            }
        }
    }
}

/// Packets, as tests describe them.
pub mod packets {
    use std::net::IpAddr;

    use etherparse::PacketBuilder;

    /// An IP packet of any protocol.
    pub fn ip(
        from: impl Into<IpAddr>,
        to: impl Into<IpAddr>,
        protocol: u8,
        payload: &[u8],
    ) -> Vec<u8> {
        let mut out = Vec::new();
        match (from.into(), to.into()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let total = (20 + payload.len()) as u16;
                out.extend([0x45, 0]);
                out.extend(total.to_be_bytes());
                out.extend([0, 1, 0, 0, 64, protocol, 0, 0]);
                out.extend(from.octets());
                out.extend(to.octets());
                mend(&mut out);
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                out.extend([0x60, 0, 0, 0]);
                out.extend((payload.len() as u16).to_be_bytes());
                out.extend([protocol, 64]);
                out.extend(from.octets());
                out.extend(to.octets());
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => {}
        }
        out.extend(payload);
        out
    }

    /// A UDP datagram.
    pub fn udp(from: (IpAddr, u16), to: (IpAddr, u16), payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        let written = match (from.0, to.0) {
            (IpAddr::V4(a), IpAddr::V4(b)) => PacketBuilder::ipv4(a.octets(), b.octets(), 64)
                .udp(from.1, to.1)
                .write(&mut out, payload),
            (IpAddr::V6(a), IpAddr::V6(b)) => PacketBuilder::ipv6(a.octets(), b.octets(), 64)
                .udp(from.1, to.1)
                .write(&mut out, payload),
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => Ok(()),
        };
        debug_assert!(written.is_ok());
        out
    }

    /// A SYN over IPv4.
    pub fn syn(from: (std::net::Ipv4Addr, u16), to: (std::net::Ipv4Addr, u16)) -> Vec<u8> {
        let mut out = Vec::new();
        let written = PacketBuilder::ipv4(from.0.octets(), to.0.octets(), 64)
            .tcp(from.1, to.1, 1_000, 64_000)
            .syn()
            .write(&mut out, &[]);
        debug_assert!(written.is_ok());
        out
    }

    /// A TCP segment of a connection over IPv4 that nobody has, from whoever cannot see one.
    pub fn blind(
        from: (std::net::Ipv4Addr, u16),
        to: (std::net::Ipv4Addr, u16),
        payload: &[u8],
    ) -> Vec<u8> {
        let mut out = Vec::new();
        let written = PacketBuilder::ipv4(from.0.octets(), to.0.octets(), 64)
            .tcp(from.1, to.1, 1_000, 64_000)
            .ack(2_000)
            .write(&mut out, payload);
        debug_assert!(written.is_ok());
        out
    }

    /// Fragments a packet of either family, with `size` payload bytes (a multiple of 8) each.
    pub fn fragments(packet: &[u8], size: usize, id: u16) -> Vec<Vec<u8>> {
        let v4 = packet[0] >> 4 == 4;
        let header = if v4 { 20 } else { 40 };
        let payload = &packet[header..];
        let fragments = payload.chunks(size).enumerate().map(|(index, content)| {
            let at = index * size;
            let more = at + content.len() < payload.len();
            fragment(packet, at, content, more, id)
        });
        fragments.collect()
    }

    /// One fragment of `packet`, with any offset and content.
    pub fn fragment(packet: &[u8], at: usize, content: &[u8], more: bool, id: u16) -> Vec<u8> {
        if packet[0] >> 4 == 4 {
            let mut out = packet[..20].to_vec();
            let field = (at / 8) as u16 | if more { 0x2000 } else { 0 };
            out[2..4].copy_from_slice(&((20 + content.len()) as u16).to_be_bytes());
            out[4..6].copy_from_slice(&id.to_be_bytes());
            out[6..8].copy_from_slice(&field.to_be_bytes());
            mend(&mut out);
            out.extend(content);
            return out;
        }
        let mut out = packet[..40].to_vec();
        let field = at as u16 | u16::from(more);
        let [high, low] = field.to_be_bytes();
        let [id_high, id_low] = id.to_be_bytes();
        out.extend([packet[6], 0, high, low, 0, 0, id_high, id_low]);
        out[6] = 44;
        out.extend(content);
        let len = (out.len() - 40) as u16;
        out[4..6].copy_from_slice(&len.to_be_bytes());
        out
    }

    /// Writes a new header checksum into an IPv4 packet.
    pub fn mend(packet: &mut [u8]) {
        packet[10..12].fill(0);
        let header = usize::from(packet[0] & 0x0f) * 4;
        let words = packet[..header.clamp(20, packet.len())].chunks_exact(2);
        let mut sum: u32 = words
            .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
            .sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        packet[10..12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    }
}

/// The hardware address of an interface of the calling thread's namespace.
fn hardware_address(interface: &str) -> io::Result<[u8; 6]> {
    let socket = Socket::new(Domain::PACKET, Type::DGRAM, None)?;
    let index = rustix::net::netdevice::name_to_index(&socket, interface)?;
    socket.bind(&link_address(index, 0, [0; 6]))?;
    let bound = socket.local_addr()?;
    // SAFETY: the address of a packet socket is a sockaddr_ll, and the storage is large enough and
    // aligned for any address.
    let ll = unsafe { &*bound.as_ptr().cast::<libc::sockaddr_ll>() };
    let [a, b, c, d, e, f, ..] = ll.sll_addr;
    Ok([a, b, c, d, e, f])
}

fn link_address(index: u32, protocol: u16, mac: [u8; 6]) -> SockAddr {
    // SAFETY: the storage is zeroed and at least as large and aligned as a sockaddr_ll; the fields
    // written make it one, and its length is set.
    let made = unsafe {
        SockAddr::try_init(|storage, len| {
            let ll = storage.cast::<libc::sockaddr_ll>();
            (*ll).sll_family = libc::AF_PACKET as u16;
            (*ll).sll_protocol = protocol.to_be();
            (*ll).sll_ifindex = index as i32;
            (*ll).sll_halen = 6;
            (&mut (*ll).sll_addr)[..6].copy_from_slice(&mac);
            *len = size_of::<libc::sockaddr_ll>() as u32;
            Ok(())
        })
    };
    match made {
        Ok(((), addr)) => addr,
        Err(_) => unreachable!("the closure returns Ok"),
    }
}
