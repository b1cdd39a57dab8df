//! The UDP socket: batches of equal datagrams in one system call.
//!
//! Sends with `UDP_SEGMENT` (generic segmentation offload) and receives with `UDP_GRO`. Where the
//! kernel or the route cannot, it sends datagram by datagram and goes on. With each datagram comes
//! the address that it was sent to, and a reply leaves from there (`IP_PKTINFO`, `IPV6_PKTINFO`).
//!
//! One socket serves both families where the host has IPv6: IPv4 peers then appear as IPv4, never
//! as mapped addresses.

// recvmsg and sendmsg with control messages; each block says why it is sound.
#![allow(unsafe_code)]

use std::io;
use std::mem::{self, MaybeUninit};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use rustix::event::{PollFd, PollFlags, poll};
use socket2::{Domain, Protocol, Socket, Type};

use crate::model::peer::Endpoint;

/// Most datagrams one `UDP_SEGMENT` send may hold (`UDP_MAX_SEGMENTS`; later kernels allow 128).
pub const MAX_SEGMENTS: usize = 64;

/// Most bytes one send may hold: the largest UDP payload over IPv4, 65,535 − 20 − 8.
pub const MAX_BATCH: usize = 65_507;

/// Size of a receive slot: a GRO batch never exceeds one IP packet's length.
pub const RECV_SLOT: usize = 65_536;

/// Socket buffers. With the defaults (212 KiB) a burst from one TCP stream overflows them and costs
/// 100,000 retransmits in a short test; 4 MiB does not.
const SOCKET_BUFFER: usize = 4 << 20;

/// Space for the control messages of one datagram, both families, with alignment.
const CONTROL_LEN: usize = 256;

/// A batch of datagrams that was received.
#[derive(Clone, Copy, Debug)]
pub struct Received {
    /// Bytes in the slot.
    pub len: usize,
    /// Length of each datagram but the last, which may be shorter.
    pub stride: usize,
    /// Where it came from and the address it was sent to.
    pub endpoint: Endpoint,
    /// The outer header's ECN field (RFC 3168), low two bits of the traffic class.
    pub ecn: u8,
}

/// Offloads that may be turned off, to test the fallbacks or to work around a driver.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UdpOptions {
    /// Send with `UDP_SEGMENT`.
    pub gso: bool,
    /// Receive with `UDP_GRO`.
    pub gro: bool,
    /// Bind to an address that this host may not have yet (`IP_FREEBIND`, ip(7)).
    pub absent: bool,
}

impl Default for UdpOptions {
    fn default() -> Self {
        Self {
            gso: true,
            gro: true,
            absent: false,
        }
    }
}

/// What to do while the socket's buffer is full.
#[derive(Clone, Copy, Debug)]
pub enum WhenFull<'a> {
    /// Wait for space, however long it takes, unless this becomes readable.
    Wait(BorrowedFd<'a>),
    /// Give up: `WouldBlock`.
    GiveUp,
}

/// Where a datagram says which of its sender's lanes it comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LaneField {
    /// First byte of the datagrams that say so.
    pub message_type: u8,
    /// Offset of the byte that holds the lane's number.
    pub at: u32,
}

/// One lane's UDP socket.
pub struct UdpSocket {
    socket: Socket,
    ipv6: bool,
    gso: AtomicBool,
    gro: bool,
    /// One counter for all sockets of the port.
    gso_fallbacks: Arc<AtomicU64>,
}

impl UdpSocket {
    /// Binds to `listen`; an unspecified IPv6 address takes IPv4 as well.
    ///
    /// `shared`: several lanes of this daemon bind the same port.
    pub fn bind(listen: SocketAddr, shared: bool, options: UdpOptions) -> io::Result<Self> {
        let ipv6 = listen.is_ipv6();
        let domain = if ipv6 { Domain::IPV6 } else { Domain::IPV4 };
        let socket = Socket::new(domain, Type::DGRAM.cloexec(), Some(Protocol::UDP))?;
        if ipv6 {
            socket.set_only_v6(!listen.ip().is_unspecified())?;
        }
        if shared {
            socket.set_reuse_port(true)?;
        }
        set_buffers(&socket);
        set_option(&socket, libc::IPPROTO_IP, libc::IP_PKTINFO, 1).or_else(only_if(!ipv6))?;
        set_option(&socket, libc::IPPROTO_IP, libc::IP_RECVTOS, 1).or_else(only_if(!ipv6))?;
        // Path MTU discovery without letting the kernel fragment or refuse: the tunnel sizes its
        // datagrams itself and must be able to probe (ip(7), IP_PMTUDISC_PROBE).
        let probe = libc::IP_PMTUDISC_PROBE;
        set_option(&socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, probe)
            .or_else(only_if(!ipv6))?;
        if ipv6 {
            set_option(&socket, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1)?;
            set_option(&socket, libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS, 1)?;
            let probe = libc::IPV6_PMTUDISC_PROBE;
            set_option(&socket, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, probe)?;
        }
        let gso = options.gso && set_option(&socket, libc::SOL_UDP, libc::UDP_SEGMENT, 0).is_ok();
        let gro = options.gro && set_option(&socket, libc::SOL_UDP, libc::UDP_GRO, 1).is_ok();
        if options.absent {
            let (level, name) = if ipv6 {
                (libc::IPPROTO_IPV6, libc::IPV6_FREEBIND)
            } else {
                (libc::IPPROTO_IP, libc::IP_FREEBIND)
            };
            set_option(&socket, level, name, 1)?;
        }
        socket.bind(&listen.into())?;
        Ok(Self {
            socket,
            ipv6,
            gso: AtomicBool::new(gso),
            gro,
            gso_fallbacks: Arc::default(),
        })
    }

    /// Opens `lanes` sockets on one port. Each gets the datagrams of those of the sender's lanes
    /// whose number modulo `lanes` is its own. The first also gets those without a [`LaneField`].
    ///
    /// The kernel asks a classic BPF program of ours which socket takes a datagram
    /// (`SO_ATTACH_REUSEPORT_CBPF`, socket(7)). Where it cannot, it spreads datagrams by their
    /// addresses, and one lane does the work of all.
    pub fn bind_lanes(
        listen: SocketAddr,
        lanes: usize,
        field: LaneField,
        options: UdpOptions,
    ) -> io::Result<Vec<Self>> {
        if lanes <= 1 {
            return Ok(vec![Self::bind(listen, false, options)?]);
        }
        // The first decides whether the port is free. If the option were set on all of them,
        // another program of root's that also sets it could share the port unnoticed.
        drop(Self::bind(listen, false, options)?);
        let mut sockets = (0..lanes)
            .map(|_| Self::bind(listen, true, options))
            .collect::<io::Result<Vec<_>>>()?;
        let gso_fallbacks = Arc::<AtomicU64>::default();
        for socket in &mut sockets {
            socket.gso_fallbacks = Arc::clone(&gso_fallbacks);
        }
        if let Err(error) = choose_by_lane(&sockets[0].socket, lanes, field) {
            tracing::debug!(%error, "datagrams cannot be given to their lanes");
        }
        Ok(sockets)
    }

    /// The sockets of another daemon's lanes, in their order.
    ///
    /// # Errors
    /// If one of them is none.
    pub fn adopt_lanes(sockets: Vec<OwnedFd>, options: UdpOptions) -> io::Result<Vec<Self>> {
        let gso_fallbacks = Arc::<AtomicU64>::default();
        let adopt = |socket: OwnedFd| {
            let socket = Socket::from(socket);
            let addr = socket.local_addr()?;
            let gso =
                options.gso && set_option(&socket, libc::SOL_UDP, libc::UDP_SEGMENT, 0).is_ok();
            let wanted = i32::from(options.gro);
            let set = set_option(&socket, libc::SOL_UDP, libc::UDP_GRO, wanted).is_ok();
            Ok(Self {
                socket,
                ipv6: addr.is_ipv6(),
                gso: AtomicBool::new(gso),
                gro: options.gro && set,
                gso_fallbacks: Arc::clone(&gso_fallbacks),
            })
        };
        sockets.into_iter().map(adopt).collect()
    }

    /// From now on this is another socket, which was bound with the same options: whoever uses this
    /// one, on whatever thread, uses that. Who waits for datagrams waits for those of the earlier
    /// one until the end of that wait.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn become_another(&self, other: BorrowedFd<'_>) -> io::Result<()> {
        // SAFETY: both are open. The number stays this value's, and close-on-exec.
        let result =
            unsafe { libc::dup3(other.as_raw_fd(), self.socket.as_raw_fd(), libc::O_CLOEXEC) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// The port bound to.
    pub fn port(&self) -> io::Result<u16> {
        let addr = self.socket.local_addr()?;
        Ok(addr.as_socket().map_or(0, |addr| addr.port()))
    }

    /// Whether batches leave in one send.
    pub fn gso(&self) -> bool {
        self.gso.load(Relaxed)
    }

    /// Whether batches arrive in one receive.
    pub fn gro(&self) -> bool {
        self.gro
    }

    /// Batches that the kernel refused, so that they left datagram by datagram, on all sockets of
    /// the port.
    pub fn gso_fallbacks(&self) -> u64 {
        self.gso_fallbacks.load(Relaxed)
    }

    /// A second handle to the same socket, for the control task.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            socket: self.socket.try_clone()?,
            ipv6: self.ipv6,
            gso: AtomicBool::new(self.gso()),
            gro: self.gro,
            gso_fallbacks: Arc::clone(&self.gso_fallbacks),
        })
    }

    /// Receives a batch of datagrams of one sender without waiting; `WouldBlock` when none is
    /// there.
    pub fn recv(&self, slot: &mut [u8]) -> io::Result<Received> {
        let mut name = MaybeUninit::<libc::sockaddr_storage>::zeroed();
        let mut control = Control([MaybeUninit::uninit(); CONTROL_LEN]);
        let mut iov = libc::iovec {
            iov_base: slot.as_mut_ptr().cast(),
            iov_len: slot.len(),
        };
        // SAFETY: an all-zero msghdr is a valid value; its pointers are set below.
        let mut message: libc::msghdr = unsafe { mem::zeroed() };
        message.msg_name = name.as_mut_ptr().cast();
        message.msg_namelen = size_of::<libc::sockaddr_storage>() as u32;
        message.msg_iov = &raw mut iov;
        message.msg_iovlen = 1;
        message.msg_control = control.0.as_mut_ptr().cast();
        message.msg_controllen = CONTROL_LEN as _;
        // SAFETY: `message` points to a name, one buffer and a control area that live across the
        // call and whose lengths are given with them.
        let len = unsafe {
            libc::recvmsg(
                self.socket.as_raw_fd(),
                &raw mut message,
                libc::MSG_DONTWAIT,
            )
        };
        if len < 0 {
            return Err(io::Error::last_os_error());
        }
        if message.msg_flags & libc::MSG_TRUNC != 0 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let len = len as usize;
        // SAFETY: the storage was zeroed, so every byte of it is initialised whatever the kernel
        // wrote; `read_name` looks at it by the family it holds.
        let remote =
            read_name(unsafe { name.assume_init_ref() }).ok_or(io::ErrorKind::AddrNotAvailable)?;
        let mut received = Received {
            len,
            stride: len.max(1),
            endpoint: Endpoint {
                remote,
                local: None,
            },
            ecn: 0,
        };
        // SAFETY: the kernel filled `msg_controllen` bytes of the control area with whole control
        // messages; the CMSG macros stay inside it.
        unsafe { read_control(&message, &mut received) };
        Ok(received)
    }

    /// Sends `batch` to `endpoint` as datagrams of `stride` bytes (the last may be shorter).
    ///
    /// # Errors
    /// The kernel's, for the last datagram that it refused; those before it have left.
    /// `WouldBlock` if the socket's buffer is full, and it is not to wait, or no longer.
    pub fn send(
        &self,
        endpoint: &Endpoint,
        ecn: u8,
        batch: &[u8],
        stride: usize,
        when_full: WhenFull<'_>,
    ) -> io::Result<()> {
        debug_assert!(stride > 0 && batch.len() <= MAX_BATCH);
        if batch.len() <= stride {
            return self.send_message(endpoint, ecn, batch, None, when_full);
        }
        if self.gso() {
            match self.send_message(endpoint, ecn, batch, Some(stride as u16), when_full) {
                Ok(()) => return Ok(()),
                Err(error) => match error.raw_os_error() {
                    // This route, device or size cannot: send this batch datagram by datagram and
                    // go on.
                    Some(libc::EIO | libc::EINVAL | libc::EMSGSIZE | libc::EOPNOTSUPP) => {
                        self.gso_fallbacks.fetch_add(1, Relaxed);
                    }
                    _ => return Err(error),
                },
            }
        }
        let mut result = Ok(());
        for datagram in batch.chunks(stride) {
            if let Err(error) = self.send_message(endpoint, ecn, datagram, None, when_full) {
                result = Err(error);
            }
        }
        result
    }

    /// Sends from the address that the peer knows. If that is no longer ours, sends from the one
    /// that the kernel chooses: the peer follows.
    fn send_message(
        &self,
        endpoint: &Endpoint,
        ecn: u8,
        bytes: &[u8],
        segment: Option<u16>,
        when_full: WhenFull<'_>,
    ) -> io::Result<()> {
        let sent = self.send_from(endpoint, ecn, bytes, segment, when_full);
        match &sent {
            Err(error) if endpoint.local.is_some() && is_gone(error) => {
                let endpoint = Endpoint {
                    local: None,
                    ..*endpoint
                };
                self.send_from(&endpoint, ecn, bytes, segment, when_full)
            }
            Ok(()) | Err(_) => sent,
        }
    }

    fn send_from(
        &self,
        endpoint: &Endpoint,
        ecn: u8,
        bytes: &[u8],
        segment: Option<u16>,
        when_full: WhenFull<'_>,
    ) -> io::Result<()> {
        let name = socket2::SockAddr::from(self.as_sendable(endpoint.remote));
        let mut control = Control([MaybeUninit::zeroed(); CONTROL_LEN]);
        let mut iov = libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        // SAFETY: an all-zero msghdr is a valid value; its pointers are set below.
        let mut message: libc::msghdr = unsafe { mem::zeroed() };
        message.msg_name = name.as_ptr().cast_mut().cast();
        message.msg_namelen = name.len();
        message.msg_iov = &raw mut iov;
        message.msg_iovlen = 1;
        message.msg_control = control.0.as_mut_ptr().cast();
        message.msg_controllen = CONTROL_LEN as _;
        let mut writer = ControlWriter {
            message: &mut message,
            used: 0,
        };
        if let Some(size) = segment {
            writer.push(libc::SOL_UDP, libc::UDP_SEGMENT, size);
        }
        let v4_out = endpoint.remote.is_ipv4();
        if ecn != 0 && v4_out {
            writer.push(libc::IPPROTO_IP, libc::IP_TOS, libc::c_int::from(ecn));
        } else if ecn != 0 {
            writer.push(
                libc::IPPROTO_IPV6,
                libc::IPV6_TCLASS,
                libc::c_int::from(ecn),
            );
        }
        match endpoint.local {
            Some(IpAddr::V4(addr)) if v4_out => writer.push(
                libc::IPPROTO_IP,
                libc::IP_PKTINFO,
                libc::in_pktinfo {
                    ipi_ifindex: 0,
                    ipi_spec_dst: libc::in_addr {
                        s_addr: u32::from_ne_bytes(addr.octets()),
                    },
                    ipi_addr: libc::in_addr { s_addr: 0 },
                },
            ),
            Some(IpAddr::V6(addr)) if !v4_out => writer.push(
                libc::IPPROTO_IPV6,
                libc::IPV6_PKTINFO,
                libc::in6_pktinfo {
                    ipi6_addr: libc::in6_addr {
                        s6_addr: addr.octets(),
                    },
                    ipi6_ifindex: 0,
                },
            ),
            Some(_) | None => {}
        }
        let used = writer.used;
        message.msg_controllen = used as _;
        if used == 0 {
            message.msg_control = std::ptr::null_mut();
        }
        loop {
            // SAFETY: `message` points to an address, one buffer and control messages that live
            // across the call and whose lengths are given with them; the kernel only reads them.
            let sent = unsafe {
                libc::sendmsg(
                    self.socket.as_raw_fd(),
                    &raw const message,
                    libc::MSG_DONTWAIT,
                )
            };
            if sent >= 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            match (error.kind(), when_full) {
                (io::ErrorKind::Interrupted, _) => {}
                (io::ErrorKind::WouldBlock, WhenFull::Wait(stop)) if self.has_space(stop)? => {}
                _ => return Err(error),
            }
        }
    }

    /// Waits until half of the socket's buffer is free; false if `stop` is readable before.
    #[cold]
    fn has_space(&self, stop: BorrowedFd<'_>) -> io::Result<bool> {
        let mut fds = [
            PollFd::from_borrowed_fd(self.socket.as_fd(), PollFlags::OUT),
            PollFd::from_borrowed_fd(stop, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) => Ok(fds[1].revents().is_empty()),
            Err(rustix::io::Errno::INTR) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }

    /// A socket of the IPv6 family names IPv4 peers by their mapped addresses.
    fn as_sendable(&self, addr: SocketAddr) -> SocketAddr {
        match addr {
            SocketAddr::V4(v4) if self.ipv6 => {
                SocketAddr::V6(SocketAddrV6::new(v4.ip().to_ipv6_mapped(), v4.port(), 0, 0))
            }
            SocketAddr::V4(_) | SocketAddr::V6(_) => addr,
        }
    }
}

impl AsFd for UdpSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Control messages want the alignment of `cmsghdr`.
#[repr(C, align(8))]
struct Control([MaybeUninit<u8>; CONTROL_LEN]);

struct ControlWriter<'a> {
    message: &'a mut libc::msghdr,
    used: usize,
}

impl ControlWriter<'_> {
    /// Appends one control message with `value` as its data.
    fn push<T: Copy>(&mut self, level: libc::c_int, kind: libc::c_int, value: T) {
        let size = size_of::<T>() as u32;
        // SAFETY: CMSG_SPACE and CMSG_LEN only compute; the control area is zeroed, aligned for
        // cmsghdr, and the assertion keeps the message inside it.
        unsafe {
            let space = libc::CMSG_SPACE(size) as usize;
            assert!(self.used + space <= CONTROL_LEN, "control area too small");
            let header = self
                .message
                .msg_control
                .cast::<u8>()
                .add(self.used)
                .cast::<libc::cmsghdr>();
            (*header).cmsg_level = level;
            (*header).cmsg_type = kind;
            (*header).cmsg_len = libc::CMSG_LEN(size) as _;
            libc::CMSG_DATA(header).cast::<T>().write_unaligned(value);
            self.used += space;
        }
    }
}

/// Reads the control messages that came with a datagram.
///
/// # Safety
/// `message` must be as `recvmsg` left it, with its control area alive.
unsafe fn read_control(message: &libc::msghdr, received: &mut Received) {
    // SAFETY: see above; CMSG_FIRSTHDR and CMSG_NXTHDR return null at the end of the area, and data
    // is read unaligned, with the type that the level and kind stand for.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(message);
        while let Some(cmsg) = header.as_ref() {
            let data = libc::CMSG_DATA(header);
            match (cmsg.cmsg_level, cmsg.cmsg_type) {
                (libc::SOL_UDP, libc::UDP_GRO) => {
                    let stride = data.cast::<libc::c_int>().read_unaligned();
                    if stride > 0 {
                        received.stride = stride as usize;
                    }
                }
                (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                    let info = data.cast::<libc::in_pktinfo>().read_unaligned();
                    let addr = Ipv4Addr::from(info.ipi_addr.s_addr.to_ne_bytes());
                    received.endpoint.local = Some(addr.into());
                }
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                    let info = data.cast::<libc::in6_pktinfo>().read_unaligned();
                    let addr = Ipv6Addr::from(info.ipi6_addr.s6_addr);
                    // A mapped address says the same as IP_PKTINFO does.
                    received.endpoint.local = Some(addr.to_canonical());
                }
                (libc::IPPROTO_IP, libc::IP_TOS) => received.ecn = data.read() & 3,
                (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                    received.ecn = (data.cast::<libc::c_int>().read_unaligned() & 3) as u8;
                }
                _ => {}
            }
            header = libc::CMSG_NXTHDR(message, header);
        }
    }
}

fn read_name(name: &libc::sockaddr_storage) -> Option<SocketAddr> {
    match libc::c_int::from(name.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says that the storage holds a sockaddr_in, which fits in it.
            let addr = unsafe { &*std::ptr::from_ref(name).cast::<libc::sockaddr_in>() };
            Some(SocketAddr::V4(SocketAddrV4::new(
                Ipv4Addr::from(addr.sin_addr.s_addr.to_ne_bytes()),
                u16::from_be(addr.sin_port),
            )))
        }
        libc::AF_INET6 => {
            // SAFETY: the family says that the storage holds a sockaddr_in6, which fits in it.
            let addr = unsafe { &*std::ptr::from_ref(name).cast::<libc::sockaddr_in6>() };
            let ip = Ipv6Addr::from(addr.sin6_addr.s6_addr);
            let port = u16::from_be(addr.sin6_port);
            Some(match ip.to_ipv4_mapped() {
                Some(v4) => SocketAddr::V4(SocketAddrV4::new(v4, port)),
                None => SocketAddr::V6(SocketAddrV6::new(ip, port, 0, addr.sin6_scope_id)),
            })
        }
        _ => None,
    }
}

/// Asks for [`SOCKET_BUFFER`] beyond the system's limit, or else for as much as that gives.
fn set_buffers(socket: &Socket) {
    let size = SOCKET_BUFFER as libc::c_int;
    if set_option(socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, size).is_err() {
        let _ = socket.set_recv_buffer_size(SOCKET_BUFFER);
    }
    if set_option(socket, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, size).is_err() {
        let _ = socket.set_send_buffer_size(SOCKET_BUFFER);
    }
}

/// Attaches the program that gives a datagram that names a lane to that lane's socket, and every
/// other datagram to the first socket.
fn choose_by_lane(socket: &Socket, lanes: usize, field: LaneField) -> io::Result<()> {
    let op = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let program = [
        op(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 0, 0, 0),
        op(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            0,
            3,
            u32::from(field.message_type),
        ),
        op(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 0, 0, field.at),
        op(
            libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K,
            0,
            0,
            lanes as u32,
        ),
        op(libc::BPF_RET | libc::BPF_A, 0, 0, 0),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
    ];
    let filter = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: `filter` and the program it points to live across the call, which copies them; its
    // length is given with it.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_REUSEPORT_CBPF,
            (&raw const filter).cast(),
            size_of::<libc::sock_fprog>() as u32,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Whether the kernel may have refused a source address that is not its own. It says `EINVAL` of
/// IPv6 and, on newer kernels, `ENETUNREACH` of IPv4. It says both of much else too.
fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::EADDRNOTAVAIL | libc::ENETUNREACH)
    )
}

/// Ignores the error of an option that is not `required`. A socket of the IPv6 family can do
/// without options of IPv4; one of the IPv4 family cannot.
fn only_if(required: bool) -> impl Fn(io::Error) -> io::Result<()> {
    move |error| if required { Err(error) } else { Ok(()) }
}

fn set_option(
    socket: &Socket,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: `value` is a c_int that lives across the call, and its length is given with it.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as u32,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn pair(options: UdpOptions) -> (UdpSocket, UdpSocket, Endpoint) {
        let bind = |text: &str| UdpSocket::bind(text.parse().unwrap(), false, options).unwrap();
        let (a, b) = (bind("127.0.0.1:0"), bind("[::]:0"));
        let endpoint = Endpoint {
            remote: SocketAddr::from(([127, 0, 0, 1], b.port().unwrap())),
            local: Some([127, 0, 0, 1].into()),
        };
        (a, b, endpoint)
    }

    fn drain(socket: &UdpSocket) -> Vec<(Vec<u8>, Received)> {
        let mut slot = vec![0; RECV_SLOT];
        let mut all = Vec::new();
        let until = Duration::from_millis(200);
        socket.socket.set_read_timeout(Some(until)).unwrap();
        for _ in 0..200 {
            match socket.recv(&mut slot) {
                Ok(received) => {
                    for datagram in slot[..received.len].chunks(received.stride) {
                        all.push((datagram.to_vec(), received));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => panic!("{error}"),
            }
        }
        all
    }

    fn batch_arrives(options: UdpOptions) {
        let (a, b, endpoint) = pair(options);
        let batch: Vec<u8> = (0..3_300u32).map(|i| (i / 1_000) as u8).collect();
        a.send(&endpoint, 0, &batch, 1_000, WhenFull::GiveUp)
            .unwrap();
        let got = drain(&b);
        let lengths: Vec<usize> = got.iter().map(|(bytes, _)| bytes.len()).collect();
        assert_eq!(lengths, [1_000, 1_000, 1_000, 300]);
        assert_eq!(got[3].0, [3; 300]);
        let meta = got[0].1.endpoint;
        assert_eq!(meta.local, Some([127, 0, 0, 1].into()));
        assert_eq!(meta.remote.port(), a.port().unwrap());
        assert!(meta.remote.is_ipv4(), "mapped addresses are unwrapped");
        // And back, from the family-spanning socket to the IPv4 one.
        b.send(&meta, 1, b"back", 4, WhenFull::GiveUp).unwrap();
        let back = drain(&a);
        assert_eq!(back[0].0, b"back");
        assert_eq!(back[0].1.ecn, 1);
    }

    #[test]
    fn a_batch_arrives_as_its_datagrams() {
        batch_arrives(UdpOptions::default());
    }

    #[test]
    fn each_lane_gets_its_own_datagrams() {
        let (a, _, _) = pair(UdpOptions::default());
        let listen = "127.0.0.1:0".parse().unwrap();
        let port = UdpSocket::bind(listen, false, UdpOptions::default())
            .unwrap()
            .port()
            .unwrap();
        let listen = SocketAddr::from(([127, 0, 0, 1], port));
        let field = LaneField {
            message_type: 4,
            at: 2,
        };
        let options = UdpOptions::default();
        let lanes = UdpSocket::bind_lanes(listen, 3, field, options).unwrap();
        let endpoint = Endpoint {
            remote: listen,
            local: None,
        };
        // Type, flags, lane: data of lanes 0 to 7 and of the control lane, then a handshake
        // message.
        for lane in [0, 1, 2, 3, 4, 5, 6, 7, 255] {
            a.send(&endpoint, 0, &[4, 0, lane, 0], 4, WhenFull::GiveUp)
                .unwrap();
        }
        a.send(&endpoint, 0, &[1, 1, 2, 0], 4, WhenFull::GiveUp)
            .unwrap();
        let got: Vec<Vec<u8>> = lanes
            .iter()
            .map(|lane| drain(lane).iter().map(|(bytes, _)| bytes[2]).collect())
            .collect();
        assert_eq!(got, [vec![0, 3, 6, 255, 2], vec![1, 4, 7], vec![2, 5]]);
        let taken = UdpSocket::bind_lanes(listen, 2, field, options);
        let kind = taken.err().map(|error| error.kind());
        assert_eq!(
            kind,
            Some(io::ErrorKind::AddrInUse),
            "the port is ours alone"
        );
    }

    #[test]
    fn a_datagram_leaves_although_its_source_is_no_longer_ours() {
        let (a, b, mut endpoint) = pair(UdpOptions::default());
        endpoint.local = Some([192, 0, 2, 99].into());
        a.send(&endpoint, 0, &[7; 1_500], 1_000, WhenFull::GiveUp)
            .unwrap();
        assert_eq!(drain(&b).len(), 2);
        endpoint.local = Some([0x2001, 0xdb8, 0, 0, 0, 0, 0, 9].into());
        let (c, d, mut path6) = {
            let bind = |text: &str| {
                let options = UdpOptions::default();
                UdpSocket::bind(text.parse().unwrap(), false, options).unwrap()
            };
            (bind("[::]:0"), bind("[::1]:0"), endpoint)
        };
        path6.remote = format!("[::1]:{}", d.port().unwrap()).parse().unwrap();
        c.send(&path6, 0, b"seven", 5, WhenFull::GiveUp).unwrap();
        assert_eq!(drain(&d).len(), 1);
    }

    #[test]
    fn without_offloads_a_batch_arrives_as_its_datagrams() {
        batch_arrives(UdpOptions {
            gso: false,
            gro: false,
            ..UdpOptions::default()
        });
    }
}
