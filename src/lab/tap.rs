//! A tap on an interface: every frame that passes, in both directions, and questions about them.
//!
//! Owns a packet socket and the thread that empties it. It only listens. A statement such as "no
//! packet had this address" is worth something only if the tap has seen all packets. So
//! [`Tap::stop`] is an error if the kernel or the tap had to leave frames out.

#![allow(
    unsafe_code,
    reason = "packet sockets have no safe binding: their address and statistics are C structures"
)]

use std::io::{self, Read};
use std::mem::size_of;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use etherparse::{LaxNetSlice, LaxSlicedPacket, TransportSlice};
use socket2::{Domain, SockAddr, Socket, Type};

use super::{Doing, LabError, Namespace, Result};

/// Most bytes of frames that it keeps. A tap is for a handful of connections, not for a benchmark.
const MAX_BYTES: usize = 128 << 20;

/// Receive buffer of the packet socket: several full windows of super-packets, so that nothing is
/// lost while the reading thread waits for a processor.
const RECEIVE_BUFFER: usize = 64 << 20;

/// Longest frame: a super-packet of BIG TCP (`GRO_MAX_SIZE`) with its link header.
const MAX_FRAME: usize = 8 * 65_536;

/// How long the tap waits for a frame before it checks whether it should stop, and how long the
/// interface must be quiet before a stopped tap ends.
const PAUSE: Duration = Duration::from_millis(30);

/// A running tap.
#[derive(Debug)]
pub struct Tap {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Capture>>,
}

impl Tap {
    /// Starts to listen on an interface. It sees all frames that pass after this returns.
    pub fn start(namespace: &Namespace, interface: &str) -> Result<Self> {
        let mut socket = namespace
            .run(|| open(interface).doing(|| format!("listen on interface {interface}")))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let name = interface.to_owned();
        let thread = namespace.thread(&format!("tap {interface}"), move || {
            let mut frames = Vec::new();
            let mut bytes = 0;
            let mut lost = 0;
            let mut frame = vec![0; MAX_FRAME];
            loop {
                let last = stopped.load(Relaxed);
                match socket.read(&mut frame) {
                    Ok(n) if bytes + n <= MAX_BYTES => {
                        frames.push(frame[..n].into());
                        bytes += n;
                    }
                    Ok(_) => lost += 1,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        if last {
                            break;
                        }
                    }
                    Err(source) => {
                        return Err(source).doing(|| format!("listen on interface {name}"));
                    }
                }
            }
            lost += dropped(&socket).doing(|| "ask what a tap has missed".into())?;
            if lost > 0 {
                return Err(LabError::unexpected(format!(
                    "the tap on {name} missed {lost} frames, so it cannot speak for all of them"
                )));
            }
            Ok(Capture { frames })
        })?;
        Ok(Self { stop, thread })
    }

    /// Ends once the interface is quiet, and returns the frames that passed.
    pub fn stop(self) -> Result<Capture> {
        self.stop.store(true, Relaxed);
        self.thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// The frames that a tap has seen, in order.
#[derive(Debug)]
pub struct Capture {
    frames: Vec<Box<[u8]>>,
}

/// The important parts of one frame. An ARP message counts as from its sender to its target.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packet {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// Its content.
    pub kind: PacketKind,
}

/// The content of a packet, as far as the lab asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PacketKind {
    /// An ARP message.
    Arp,
    /// A TCP segment.
    Tcp {
        /// Whether it is a reset.
        reset: bool,
    },
    /// A UDP datagram.
    Udp {
        /// Source port.
        source_port: u16,
        /// Destination port.
        destination_port: u16,
    },
    /// An ICMP or ICMPv6 message.
    Icmp {
        /// Its type.
        kind: u8,
    },
    /// Anything else, later fragments included.
    Other,
}

impl PacketKind {
    /// Whether it is one of the ICMPv6 messages of neighbours (RFC 4861, RFC 2710, RFC 3810).
    pub fn is_neighbour_talk(self) -> bool {
        matches!(
            self,
            Self::Arp
                | Self::Icmp {
                    kind: 130..=137 | 143
                }
        )
    }
}

impl Capture {
    /// How many frames passed.
    pub fn len(&self) -> usize {
        self.frames.len()
    }

    /// Whether none passed.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// The frames, as they lay on the interface.
    pub fn frames(&self) -> impl Iterator<Item = &[u8]> {
        self.frames.iter().map(|frame| &**frame)
    }

    /// How many frames contain `needle` anywhere.
    pub fn frames_with(&self, needle: &[u8]) -> usize {
        let first = needle.first();
        self.frames
            .iter()
            .filter(|frame| {
                // Searching for the first byte first makes this fast without optimisation.
                frame
                    .iter()
                    .enumerate()
                    .any(|(at, byte)| Some(byte) == first && frame[at..].starts_with(needle))
            })
            .count()
    }

    /// The IP packets and ARP messages.
    pub fn packets(&self) -> impl Iterator<Item = Packet> + '_ {
        self.frames.iter().filter_map(|frame| packet(frame))
    }

    /// How many packets or ARP messages are from or to `addr`.
    pub fn packets_with(&self, addr: impl Into<IpAddr>) -> usize {
        let addr = addr.into();
        self.packets()
            .filter(|packet| packet.source == addr || packet.destination == addr)
            .count()
    }

    /// The payloads of the UDP datagrams to `port`, in order.
    pub fn udp_payloads(&self, port: u16) -> Vec<Vec<u8>> {
        let payload = |frame: &[u8]| match LaxSlicedPacket::from_ethernet(frame).ok()?.transport? {
            TransportSlice::Udp(udp) if udp.destination_port() == port => {
                Some(udp.payload().to_vec())
            }
            TransportSlice::Udp(_)
            | TransportSlice::Tcp(_)
            | TransportSlice::Icmpv4(_)
            | TransportSlice::Icmpv6(_)
            | TransportSlice::Igmp(_) => None,
        };
        self.frames
            .iter()
            .filter_map(|frame| payload(frame))
            .collect()
    }

    /// How many TCP resets and ICMP messages came from `addr`.
    pub fn refusals_from(&self, addr: impl Into<IpAddr>) -> usize {
        let addr = addr.into();
        self.packets()
            .filter(|packet| {
                let refuses = match packet.kind {
                    PacketKind::Tcp { reset } => reset,
                    PacketKind::Icmp { .. } => !packet.kind.is_neighbour_talk(),
                    PacketKind::Arp | PacketKind::Udp { .. } | PacketKind::Other => false,
                };
                refuses && packet.source == addr
            })
            .count()
    }
}

fn packet(frame: &[u8]) -> Option<Packet> {
    let sliced = LaxSlicedPacket::from_ethernet(frame).ok()?;
    let (source, destination) = match sliced.net.as_ref()? {
        LaxNetSlice::Ipv4(ip) => (
            ip.header().source_addr().into(),
            ip.header().destination_addr().into(),
        ),
        LaxNetSlice::Ipv6(ip) => (
            ip.header().source_addr().into(),
            ip.header().destination_addr().into(),
        ),
        LaxNetSlice::Arp(arp) => {
            let addr = |bytes: &[u8]| <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from);
            return Some(Packet {
                source: addr(arp.sender_protocol_addr())?,
                destination: addr(arp.target_protocol_addr())?,
                kind: PacketKind::Arp,
            });
        }
    };
    let kind = match sliced.transport {
        Some(TransportSlice::Tcp(tcp)) => PacketKind::Tcp { reset: tcp.rst() },
        Some(TransportSlice::Udp(udp)) => PacketKind::Udp {
            source_port: udp.source_port(),
            destination_port: udp.destination_port(),
        },
        Some(TransportSlice::Icmpv4(icmp)) => PacketKind::Icmp {
            kind: icmp.type_u8(),
        },
        Some(TransportSlice::Icmpv6(icmp)) => PacketKind::Icmp {
            kind: icmp.type_u8(),
        },
        Some(TransportSlice::Igmp(_)) | None => PacketKind::Other,
    };
    Some(Packet {
        source,
        destination,
        kind,
    })
}

/// A packet socket that receives everything on one interface.
fn open(interface: &str) -> io::Result<Socket> {
    // Without a protocol the socket receives nothing until it is bound, and then only from that
    // interface.
    let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
    let index = rustix::net::netdevice::name_to_index(&socket, interface)?;
    // SAFETY: the storage is zeroed and at least as large and aligned as a sockaddr_ll; the fields
    // written make it one, and its length is returned.
    let ((), addr) = unsafe {
        SockAddr::try_init(|storage, len| {
            let ll = storage.cast::<libc::sockaddr_ll>();
            (*ll).sll_family = libc::AF_PACKET as u16;
            (*ll).sll_protocol = (libc::ETH_P_ALL as u16).to_be();
            (*ll).sll_ifindex = index as i32;
            *len = size_of::<libc::sockaddr_ll>() as u32;
            Ok(())
        })
    }?;
    socket.set_read_timeout(Some(PAUSE))?;
    // This goes beyond net.core.rmem_max, for the lab runs with CAP_NET_ADMIN.
    rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, RECEIVE_BUFFER)?;
    socket.bind(&addr)?;
    Ok(socket)
}

/// The number of frames that the kernel had to leave out.
fn dropped(socket: &Socket) -> io::Result<u32> {
    let mut stats = libc::tpacket_stats {
        tp_packets: 0,
        tp_drops: 0,
    };
    let mut len = size_of::<libc::tpacket_stats>() as libc::socklen_t;
    // SAFETY: the pointers are to a structure of the type this option fills in (packet(7)) and to
    // its length, both alive for the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            (&raw mut stats).cast(),
            &raw mut len,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(stats.tp_drops)
}
