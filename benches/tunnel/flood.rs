//! UDP floods from the client to the new server of a lab.
//!
//! Owns sender and sink: plain sockets in threads of this process, made inside the namespaces. It
//! knows nothing of tunnels.
//!
//! The number of arrivals depends on the programs at both ends as much as on the path. Most
//! programs send one datagram in a call, read one in a call, and leave the receive buffer as it is.
//! Some are written for many datagrams in a call and a large buffer. Where processors are short, a
//! small buffer overflows while its reader waits for one. A figure of one kind says nothing about
//! the other, so the bench measures both. Many flows in turn are the hardest: no two adjacent
//! datagrams belong together, so nobody can coalesce them.

#![allow(
    unsafe_code,
    reason = "sendmmsg and recvmmsg, and the large buffer of a reader that takes many"
)]

use std::io;
use std::mem;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use socket2::SockRef;

use ipmoved::lab::Lab;
use ipmoved::lab::topology::NEW;

use crate::counters::socket_drops;
use crate::load::{DRAIN, LOOK, bind, in_words};
use crate::rest;

/// Most datagrams that one call gives to the kernel, or takes from it.
const BURST: usize = 64;
/// Size of [`Buffer::Large`]: the bench counts arrivals, not how quick it is itself.
const SINK_BUFFER: usize = 16 << 20;

/// How programs give datagrams to the kernel, and take them from it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Calls {
    /// Up to [`BURST`] in a call, by programs that were written for it.
    Batched,
    /// One in a call, as most programs do.
    OneEach,
}

/// The size of the receive buffer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Buffer {
    /// The default of a socket (`net.core.rmem_default`): some hundred small datagrams.
    Default,
    /// Space for all datagrams that come while the reader waits for a processor.
    Large,
}

/// The datagrams of a flood.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Datagrams {
    /// Bytes of each, without headers: the least and the most. Sizes between these take turns.
    pub(crate) payload: [usize; 2],
    pub(crate) calls: Calls,
    pub(crate) buffer: Buffer,
    /// Flows, each from a port of its own. Every call serves the next one.
    pub(crate) flows: usize,
}

/// The result of a flood.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flood {
    /// Datagrams sent, in all.
    pub(crate) sent: u64,
    /// Datagrams that arrived, in all.
    pub(crate) received: u64,
    /// Datagrams that came, but did not fit the buffer of a sink that got no processor in time.
    pub(crate) overran: u64,
    /// Datagrams sent a second.
    pub(crate) offered: f64,
    /// Datagrams received a second, while the rate was steady.
    pub(crate) rate: f64,
}

impl Flood {
    /// The share that did not arrive.
    pub(crate) fn loss(&self) -> f64 {
        1.0 - self.received as f64 / self.sent.max(1) as f64
    }
}

/// Sends datagrams to the new server, `pace` a second, or as fast as one thread can.
pub(crate) fn flood(
    lab: &Lab,
    target: Ipv4Addr,
    datagrams: Datagrams,
    pace: Option<f64>,
    time: Duration,
) -> Result<Flood> {
    let sink = lab.new_server().run(|| bind((NEW, 0).into()))?;
    SockRef::from(&sink).set_read_timeout(Some(LOOK))?;
    if datagrams.buffer == Buffer::Large {
        force_buffer(&sink)?;
    }
    let port = sink.local_addr()?.port();
    let mut source = Source::new(lab, datagrams, (target, port).into())?;
    let (stop, end) = (AtomicBool::new(false), AtomicBool::new(false));
    let (sent, received) = (AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        let (stop, sent) = (&stop, &sent);
        scope.spawn(move || {
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
                done += source.send(count);
                sent.store(done, Relaxed);
            }
        });
        scope.spawn(|| {
            let mut buffer = vec![0; BURST * 2_048];
            while !end.load(Relaxed) {
                received.fetch_add(datagrams.calls.receive(&sink, &mut buffer), Relaxed);
            }
        });
        let measured = (|| {
            // The first tenth of the time fills the queues.
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
    .and_then(|(offered, rate)| {
        Ok(Flood {
            sent: sent.load(Relaxed),
            received: received.load(Relaxed),
            overran: socket_drops(lab.new_server(), port)?,
            offered,
            rate,
        })
    })
}

/// The sender of a flood.
struct Source {
    datagrams: Datagrams,
    /// One for each flow.
    sockets: Vec<UdpSocket>,
    bytes: Vec<u8>,
    calls: usize,
}

impl Source {
    fn new(lab: &Lab, datagrams: Datagrams, to: SocketAddr) -> Result<Self> {
        let sockets = lab.clients().run(|| {
            let flow = |_| {
                let socket = bind((Ipv4Addr::UNSPECIFIED, 0).into())?;
                socket.connect(to).map_err(in_words)?;
                Ok(socket)
            };
            (0..datagrams.flows).map(flow).collect()
        })?;
        Ok(Self {
            datagrams,
            sockets,
            bytes: vec![0x5a; datagrams.payload[1]],
            calls: 0,
        })
    }

    /// Sends `count` datagrams, and returns how many the kernel took. An error is ICMP about an
    /// earlier one, or a full queue; then the datagram was not sent.
    fn send(&mut self, count: usize) -> u64 {
        match self.datagrams.calls {
            Calls::Batched => {
                let (socket, bytes) = self.next();
                send_burst(socket, bytes, count).unwrap_or(0)
            }
            Calls::OneEach => {
                let mut one = || {
                    let (socket, bytes) = self.next();
                    u64::from(socket.send(bytes).is_ok())
                };
                (0..count).map(|_| one()).sum()
            }
        }
    }

    /// The next socket and the next payload.
    fn next(&mut self) -> (&UdpSocket, &[u8]) {
        let [least, most] = self.datagrams.payload;
        let len = least + self.calls % (most - least + 1);
        let socket = &self.sockets[self.calls % self.sockets.len()];
        self.calls += 1;
        (socket, &self.bytes[..len])
    }
}

impl Calls {
    /// Waits for datagrams, and returns their number.
    fn receive(self, socket: &UdpSocket, buffer: &mut [u8]) -> u64 {
        match self {
            Self::Batched => receive_burst(socket, buffer).unwrap_or(0),
            Self::OneEach => u64::from(socket.recv(buffer).is_ok()),
        }
    }
}

fn force_buffer(socket: &UdpSocket) -> Result<()> {
    // socket2 and rustix know only the option that stops at rmem_max.
    let size = SINK_BUFFER as libc::c_int;
    // SAFETY: the option's value is a C int that lives until the call returns; the descriptor is
    // open.
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

/// Sends the same datagram `count` times, and returns how many the kernel took.
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

/// Receives datagrams into `buffer`, and returns their number.
fn receive_burst(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<u64> {
    let mut slices: Vec<libc::iovec> = buffer
        .chunks_exact_mut(buffer.len() / BURST)
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
    // SAFETY: every message points to a slice of its own, every slice to a part of `buffer` of its
    // own; all outlive the call.
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

/// Waits until the socket can be read. recvmmsg checks its own timeout only between datagrams.
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
