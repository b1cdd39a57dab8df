//! Traffic between the client and the new server of a lab.
//!
//! Owns the generators: TCP streams, UDP floods, pings, short connections. They are plain sockets
//! with large buffers in threads of this process, made inside the namespaces; a socket stays in the
//! namespace in which it was made, whichever thread uses it. Knows nothing of tunnels.

#![allow(
    unsafe_code,
    reason = "sendmmsg and recvmmsg: one system call a packet would make the generator the bottleneck"
)]

use std::io::{self, ErrorKind, Read, Write};
use std::mem;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use ipmoved::lab::topology::NEW;
use ipmoved::lab::{Lab, LabError};

use crate::{pass, rest};

/// What one write or read takes: twice a super-packet, and it stays in the cache.
const CHUNK: usize = 128 << 10;
/// How long a stream may take to find its speed before it is measured.
const RAMP: Duration = Duration::from_millis(400);
/// A path on which nothing moves for so long is broken.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How often a thread that waits looks whether it is to end.
const LOOK: Duration = Duration::from_millis(100);
/// Datagrams given to the kernel, or taken from it, in one call.
const BURST: usize = 64;
/// The sink's buffer: what counts is what arrives, not how quick the bench reads.
const SINK_BUFFER: usize = 16 << 20;
/// How long what is under way may take to arrive after a flood.
const DRAIN: Duration = Duration::from_millis(150);
/// Clients that open connections at the same time.
const CONNECTORS: usize = 4;

/// Which way the bytes go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Direction {
    /// From the client to the application.
    Forward,
    /// From the application to the client.
    Reverse,
}

/// Congestion controls that slow down when packets are lost, the usual one first.
const LOSS_BASED: [&[u8]; 2] = [b"cubic", b"reno"];

/// TCP streams that run at the same time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Streams {
    /// How many.
    pub(crate) count: usize,
    pub(crate) direction: Direction,
    pub(crate) congestion: Congestion,
}

impl Streams {
    /// Streams with the machine's congestion control.
    pub(crate) const fn new(count: usize, direction: Direction) -> Self {
        Self {
            count,
            direction,
            congestion: Congestion::Default,
        }
    }

    /// The same with one that takes a lost packet for congestion.
    pub(crate) const fn loss_based(self) -> Self {
        Self {
            congestion: Congestion::LossBased,
            ..self
        }
    }
}

/// How a sender finds its speed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Congestion {
    /// As the machine does.
    Default,
    /// By losses: CUBIC (RFC 9438), or Reno where the kernel has no other.
    LossBased,
}

impl Congestion {
    /// Gives it to a socket that is not connected yet: one that began with BBR would go on to pace.
    /// What a listener has is inherited.
    fn set(self, socket: SockRef<'_>) -> Result<()> {
        let set = |name: &&[u8]| socket.set_tcp_congestion(name).is_ok();
        if self == Self::LossBased && !LOSS_BASED.iter().any(set) {
            bail!("the kernel allows neither CUBIC nor Reno");
        }
        Ok(())
    }
}

/// Runs TCP streams and returns the payload bytes that arrived while measured, and how long that was.
/// `at` is called at the beginning and at the end of that time.
pub(crate) fn tcp(
    lab: &Lab,
    target: Ipv4Addr,
    streams: Streams,
    time: Duration,
    mut at: impl FnMut() -> Result<()>,
) -> Result<(u64, Duration)> {
    let listener = listen(lab)?;
    streams.congestion.set(SockRef::from(&listener))?;
    let port = listener.local_addr()?.port();
    let mut pairs = Vec::new();
    for _ in 0..streams.count {
        let client = connect(lab, (target, port).into(), streams.congestion)?;
        let (server, _) = listener.accept()?;
        pairs.push(match streams.direction {
            Direction::Forward => (client, server),
            Direction::Reverse => (server, client),
        });
    }
    let (stop, arrived) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let (stop, arrived) = (&stop, &arrived);
        for (from, to) in &pairs {
            let (mut from, mut to): (&TcpStream, &TcpStream) = (from, to);
            scope.spawn(move || {
                let chunk = vec![0x5a; CHUNK];
                while !stop.load(Relaxed) && from.write(&chunk).is_ok() {}
            });
            scope.spawn(move || {
                let mut chunk = vec![0; CHUNK];
                while let Ok(n @ 1..) = to.read(&mut chunk) {
                    arrived.fetch_add(n as u64, Relaxed);
                }
            });
        }
        let measured = (|| {
            rest(RAMP)?;
            at()?;
            let (started, before) = (Instant::now(), arrived.load(Relaxed));
            rest(time)?;
            let took = started.elapsed();
            let bytes = arrived.load(Relaxed) - before;
            at()?;
            Ok((bytes, took))
        })();
        stop.store(true, Relaxed);
        for (from, to) in &pairs {
            // Wakes both threads; a connection that broke is shut down already.
            let _ = from.shutdown(Shutdown::Both);
            let _ = to.shutdown(Shutdown::Both);
        }
        measured
    })
}

/// What became of a flood.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flood {
    /// Datagrams sent, in all.
    pub(crate) sent: u64,
    /// Datagrams that arrived, in all.
    pub(crate) received: u64,
    /// Datagrams sent a second.
    pub(crate) offered: f64,
    /// Datagrams received a second, while it was steady.
    pub(crate) rate: f64,
}

impl Flood {
    /// Share that did not arrive.
    pub(crate) fn loss(&self) -> f64 {
        1.0 - self.received as f64 / self.sent.max(1) as f64
    }
}

/// Sends datagrams of `payload` bytes to the new server, `pace` a second, or as fast as one thread can.
pub(crate) fn flood(
    lab: &Lab,
    target: Ipv4Addr,
    payload: usize,
    pace: Option<f64>,
    time: Duration,
) -> Result<Flood> {
    let sink = lab.new_server().run(|| bind((NEW, 0).into()))?;
    SockRef::from(&sink).set_read_timeout(Some(LOOK))?;
    force_buffer(&sink)?;
    let port = sink.local_addr()?.port();
    let source = lab.clients().run(|| {
        let socket = bind((Ipv4Addr::UNSPECIFIED, 0).into())?;
        socket.connect((target, port)).map_err(in_words)?;
        Ok(socket)
    })?;
    let (stop, end) = (AtomicBool::new(false), AtomicBool::new(false));
    let (sent, received) = (AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            let bytes = vec![0x5a; payload];
            let started = Instant::now();
            let mut done = 0;
            while !stop.load(Relaxed) {
                let count = match pace {
                    None => BURST,
                    Some(pace) => {
                        let due = (pace * started.elapsed().as_secs_f64()) as u64;
                        match usize::try_from(due - done.min(due)) {
                            Ok(0) | Err(_) => {
                                thread::sleep(Duration::from_micros(50));
                                continue;
                            }
                            Ok(count) => count.min(BURST),
                        }
                    }
                };
                // An error is ICMP about an earlier datagram, or a full queue: it was not sent.
                done += send_burst(&source, &bytes, count).unwrap_or(0);
                sent.store(done, Relaxed);
            }
        });
        scope.spawn(|| {
            let mut room = vec![0; BURST * 2_048];
            while !end.load(Relaxed) {
                if let Ok(n) = receive_burst(&sink, &mut room) {
                    received.fetch_add(n, Relaxed);
                }
            }
        });
        let measured = (|| {
            // The first tenth fills the queues.
            rest(time / 10)?;
            let before = (Instant::now(), sent.load(Relaxed), received.load(Relaxed));
            rest(time)?;
            let took = before.0.elapsed().as_secs_f64();
            let offered = (sent.load(Relaxed) - before.1) as f64 / took;
            let rate = (received.load(Relaxed) - before.2) as f64 / took;
            stop.store(true, Relaxed);
            rest(DRAIN)?;
            Ok((offered, rate))
        })();
        stop.store(true, Relaxed);
        end.store(true, Relaxed);
        measured
    })
    .map(|(offered, rate)| Flood {
        sent: sent.load(Relaxed),
        received: received.load(Relaxed),
        offered,
        rate,
    })
}

/// Round trips of ICMP echoes, one after the other, sorted.
pub(crate) fn pings(lab: &Lab, target: Ipv4Addr, count: usize) -> Result<Vec<Duration>> {
    /// Between two: about the rate of somebody who types.
    const PAUSE: Duration = Duration::from_millis(1);
    const WARM_UP: usize = 10;
    let socket = lab.clients().run(|| {
        let make = || {
            let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::ICMPV4))?;
            socket.set_read_timeout(Some(Duration::from_secs(1)))?;
            socket.connect(&SocketAddr::from((target, 0)).into())?;
            Ok(socket)
        };
        make().map_err(in_words)
    })?;
    let mut trips = Vec::new();
    let mut back = [0; 128];
    for n in 0..count + WARM_UP {
        pass()?;
        // Echo request; the kernel writes identifier and checksum.
        let mut echo = [0x5a; 64];
        echo[..8].copy_from_slice(&[8, 0, 0, 0, 0, 0, (n >> 8) as u8, n as u8]);
        let started = Instant::now();
        socket.send(&echo)?;
        loop {
            let len = (&socket)
                .read(&mut back)
                .context("a ping was not answered")?;
            // An answer that came too late for its turn is passed over.
            if len >= 8 && back[6..8] == echo[6..8] {
                break;
            }
        }
        let took = started.elapsed();
        if n >= WARM_UP {
            trips.push(took);
        }
        thread::sleep(PAUSE);
    }
    trips.sort_unstable();
    Ok(trips)
}

/// TCP connections a second: opened, one byte each way, closed by the server, one after the other in a
/// few threads.
pub(crate) fn connections(lab: &Lab, target: Ipv4Addr, time: Duration) -> Result<f64> {
    let listener = listen(lab)?;
    let to = SocketAddr::from((target, listener.local_addr()?.port()));
    let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
    listener.set_nonblocking(false)?;
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Ok((mut stream, _)) = listener.accept() {
                    if stop.load(Relaxed) {
                        return;
                    }
                    // What breaks is not counted by the client.
                    let _ = stream.set_read_timeout(Some(TIMEOUT));
                    let mut byte = [0];
                    if stream.read_exact(&mut byte).is_ok() {
                        let _ = stream.write_all(&byte);
                    }
                }
            });
        }
        let clients: Vec<_> = (0..CONNECTORS)
            .map(|_| {
                let (stop, done) = (&stop, &done);
                scope.spawn(move || {
                    lab.clients().run(|| {
                        while !stop.load(Relaxed) {
                            if once(to).is_ok() {
                                done.fetch_add(1, Relaxed);
                            }
                        }
                        Ok(())
                    })
                })
            })
            .collect();
        let measured = (|| {
            rest(time / 10)?;
            let (started, before) = (Instant::now(), done.load(Relaxed));
            rest(time)?;
            Ok((done.load(Relaxed) - before) as f64 / started.elapsed().as_secs_f64())
        })();
        stop.store(true, Relaxed);
        // Wakes accept(), and refuses who waits to be accepted: a client would wait for its answer until
        // its time is over. Fails only if the socket is shut down already.
        let _ = rustix::net::shutdown(&listener, rustix::net::Shutdown::Both);
        for client in clients {
            // It has nothing to report but a panic, which the hook has told.
            let _ = client.join();
        }
        measured
    })
}

fn once(to: SocketAddr) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&to, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(&[1])?;
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer)? {
        1 => Ok(()),
        _ => Err(ErrorKind::UnexpectedEof.into()),
    }
}

/// Begins `count` UDP flows towards the target, each another pair of ports, `pace` a second. What is
/// lost on the way is a flow that is not there: it goes on from the beginning until `enough` says so.
pub(crate) fn open_flows(
    lab: &Lab,
    target: Ipv4Addr,
    count: usize,
    pace: f64,
    mut enough: impl FnMut() -> Result<bool>,
) -> Result<()> {
    /// Ports of the target that each source port turns to.
    const FAN: usize = 50_000;
    const FIRST: usize = 10_000;
    /// Sent without a pause: a fraction of a TUN's queue, which holds 500.
    const AT_ONCE: usize = 64;
    /// Flows begun first must not have expired when the last ones are.
    const PASSES: usize = 3;
    let sockets = (0..count.div_ceil(FAN))
        .map(|_| {
            lab.clients()
                .run(|| bind((Ipv4Addr::UNSPECIFIED, 0).into()))
        })
        .collect::<Result<Vec<_>, _>>()?;
    for _ in 0..PASSES {
        let started = Instant::now();
        for n in 0..count {
            let to = (target, (FIRST + n % FAN) as u16);
            // A refusal is ICMP about an earlier one: nobody listens there.
            if sockets[n / FAN].send_to(&[0], to).is_err() {
                let _ = sockets[n / FAN].send_to(&[0], to);
            }
            if n % AT_ONCE == 0 {
                pass()?;
                let due = Duration::from_secs_f64(n as f64 / pace);
                thread::sleep(due.saturating_sub(started.elapsed()));
            }
        }
        rest(DRAIN)?;
        if enough()? {
            break;
        }
    }
    Ok(())
}

fn listen(lab: &Lab) -> Result<TcpListener> {
    Ok(lab
        .new_server()
        .run(|| TcpListener::bind((NEW, 0)).map_err(in_words))?)
}

fn connect(lab: &Lab, to: SocketAddr, congestion: Congestion) -> Result<TcpStream> {
    let socket = lab
        .clients()
        .run(|| Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).map_err(in_words))?;
    congestion.set(SockRef::from(&socket))?;
    socket.connect_timeout(&to.into(), TIMEOUT)?;
    Ok(socket.into())
}

fn bind(addr: SocketAddr) -> Result<UdpSocket, LabError> {
    UdpSocket::bind(addr).map_err(in_words)
}

fn in_words(error: io::Error) -> LabError {
    LabError::unexpected(error.to_string())
}

fn force_buffer(socket: &UdpSocket) -> Result<()> {
    // socket2 and rustix know only the option that stops at rmem_max.
    let size = SINK_BUFFER as libc::c_int;
    // SAFETY: the option's value is a C int that lives until the call returns; the descriptor is open.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVBUFFORCE,
            (&raw const size).cast(),
            size_of_val(&size) as libc::socklen_t,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error()).context("cannot enlarge the sink's buffer");
    }
    Ok(())
}

/// Sends the same datagram `count` times; how many the kernel took.
fn send_burst(socket: &UdpSocket, bytes: &[u8], count: usize) -> io::Result<u64> {
    let mut slice = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: zero is a valid value of every field: no address, no control data, no slices.
    let mut messages: [libc::mmsghdr; BURST] = unsafe { mem::zeroed() };
    for message in &mut messages {
        message.msg_hdr.msg_iov = &raw mut slice;
        message.msg_hdr.msg_iovlen = 1;
    }
    // SAFETY: `count` is no more than there are messages; each points to `slice`, which points to
    // `bytes`, and the kernel only reads those. All outlive the call.
    let sent = unsafe {
        libc::sendmmsg(
            socket.as_raw_fd(),
            messages.as_mut_ptr(),
            count.min(BURST) as libc::c_uint,
            0,
        )
    };
    u64::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Receives datagrams into `room`; how many there were.
fn receive_burst(socket: &UdpSocket, room: &mut [u8]) -> io::Result<u64> {
    let mut slices: Vec<libc::iovec> = room
        .chunks_exact_mut(room.len() / BURST)
        .map(|slot| libc::iovec {
            iov_base: slot.as_mut_ptr().cast(),
            iov_len: slot.len(),
        })
        .collect();
    // SAFETY: zero is a valid value of every field: no address, no control data, no slices.
    let mut messages: [libc::mmsghdr; BURST] = unsafe { mem::zeroed() };
    for (message, slice) in messages.iter_mut().zip(&mut slices) {
        message.msg_hdr.msg_iov = slice;
        message.msg_hdr.msg_iovlen = 1;
    }
    wait_readable(socket)?;
    // SAFETY: every message points to a slice of its own, every slice to a part of `room` of its own;
    // all outlive the call.
    let received = unsafe {
        libc::recvmmsg(
            socket.as_raw_fd(),
            messages.as_mut_ptr(),
            BURST as libc::c_uint,
            libc::MSG_DONTWAIT,
            std::ptr::null_mut(),
        )
    };
    u64::try_from(received).map_err(|_| io::Error::last_os_error())
}

/// recvmmsg's own timeout is looked at between datagrams only.
fn wait_readable(socket: &UdpSocket) -> io::Result<()> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let socket: BorrowedFd<'_> = std::os::fd::AsFd::as_fd(socket);
    let timeout = Timespec {
        tv_sec: 0,
        tv_nsec: LOOK.as_nanos() as i64,
    };
    poll(
        &mut [PollFd::from_borrowed_fd(socket, PollFlags::IN)],
        Some(&timeout),
    )?;
    Ok(())
}
