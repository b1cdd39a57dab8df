//! Traffic between the client and the new server of a lab.
//!
//! Owns the generators: TCP streams, pings, short connections. They are plain sockets with large
//! buffers in threads of this process, made inside the namespaces. A socket stays in the namespace
//! where it was made, whichever thread uses it. They know nothing of tunnels.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use ipmoved::internals::{Netlink, Route};
use ipmoved::lab::topology::{CLIENT, NEW};
use ipmoved::lab::{Lab, LabError};

use crate::{pass, rest};

/// Bytes of one write or read: twice a super-packet, and small enough for the cache.
const CHUNK: usize = 128 << 10;
/// How long a stream may take to find its speed before we measure it.
const RAMP: Duration = Duration::from_millis(400);
/// If nothing moves on a path for so long, it is broken.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How often a waiting thread checks whether it should end.
pub(crate) const LOOK: Duration = Duration::from_millis(100);
/// How long packets under way may take to arrive after a flood.
pub(crate) const DRAIN: Duration = Duration::from_millis(150);
/// Clients that open connections at the same time.
const CONNECTORS: usize = 4;

/// The direction of the bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Direction {
    /// From the client to the application.
    Forward,
    /// From the application to the client.
    Reverse,
}

/// The origin of connections.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Clients {
    /// All from one address.
    One,
    /// From [`MANY_CLIENTS`] addresses in turn.
    Many,
}

/// Number of the many clients: a few less than their network has addresses. The figure's name
/// contains it.
const MANY_CLIENTS: usize = 250;
/// The network of the many clients and its prefix length, from the block for benchmarks (RFC 2544).
const MANY_NET: (Ipv4Addr, u8) = (Ipv4Addr::new(198, 19, 0, 0), 24);

impl Clients {
    fn address(self, n: usize) -> Ipv4Addr {
        match self {
            Self::One => CLIENT,
            Self::Many => {
                let host = 1 + n % MANY_CLIENTS;
                Ipv4Addr::from_bits(MANY_NET.0.to_bits() + host as u32)
            }
        }
    }
}

/// Lets the clients' host speak from the addresses of [`Clients::Many`]. The router gets a route to
/// them by that host: neighbours for each of them would not fit the kernel's table, which all labs
/// share.
pub(crate) fn add_clients(lab: &Lab) -> Result<()> {
    let (net, len) = MANY_NET;
    // An address of the loopback device makes its whole network local.
    lab.set_address(lab.clients(), "lo", Clients::Many.address(0), len, true)?;
    let route = Route {
        via: Some(CLIENT.into()),
        ..Route::to(net.into(), len)
    };
    lab.router().run(|| {
        let added = Netlink::new().and_then(|netlink| netlink.add_route(&route));
        added.map_err(|error| LabError::unexpected(error.to_string()))
    })?;
    Ok(())
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
    /// Streams with the machine's default congestion control.
    pub(crate) const fn new(count: usize, direction: Direction) -> Self {
        Self {
            count,
            direction,
            congestion: Congestion::Default,
        }
    }

    /// The same streams with a congestion control that takes a lost packet for congestion.
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
    /// By the machine's default.
    Default,
    /// By losses: CUBIC (RFC 9438), or Reno where the kernel has no other.
    LossBased,
}

impl Congestion {
    /// Sets it on a socket that is not connected yet, because one that began with BBR would keep
    /// pacing. A listener hands it on to its connections.
    fn set(self, socket: SockRef<'_>) -> Result<()> {
        let set = |name: &&[u8]| socket.set_tcp_congestion(name).is_ok();
        if self == Self::LossBased && !LOSS_BASED.iter().any(set) {
            bail!("the kernel allows neither CUBIC nor Reno");
        }
        Ok(())
    }
}

/// Runs TCP streams. Returns the payload bytes that arrived while it measured, and how long it did.
/// Calls `at` at the beginning and at the end of that time.
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
            // This wakes both threads. A connection that broke is shut down already.
            let _ = from.shutdown(Shutdown::Both);
            let _ = to.shutdown(Shutdown::Both);
        }
        measured
    })
}

/// Round-trip times of ICMP echoes, one after the other, sorted.
pub(crate) fn pings(lab: &Lab, target: Ipv4Addr, count: usize) -> Result<Vec<Duration>> {
    /// Pause between two: about the rate of somebody who types.
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
        // An echo request. The kernel writes identifier and checksum.
        let mut echo = [0x5a; 64];
        echo[..8].copy_from_slice(&[8, 0, 0, 0, 0, 0, (n >> 8) as u8, n as u8]);
        let started = Instant::now();
        socket.send(&echo)?;
        loop {
            let len = (&socket)
                .read(&mut back)
                .context("a ping was not answered")?;
            // This passes over a reply that comes too late for its turn.
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

/// TCP connections a second: opened, one byte in each direction, closed by the server. A few
/// threads make them one after the other, from one address or from the next one each.
pub(crate) fn connections(
    lab: &Lab,
    target: Ipv4Addr,
    clients: Clients,
    time: Duration,
) -> Result<f64> {
    let listener = listen(lab)?;
    let to = SocketAddr::from((target, listener.local_addr()?.port()));
    let (stop, done, next) = (
        AtomicBool::new(false),
        AtomicU64::new(0),
        AtomicUsize::new(0),
    );
    listener.set_nonblocking(false)?;
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Ok((mut stream, _)) = listener.accept() {
                    if stop.load(Relaxed) {
                        return;
                    }
                    // If a connection breaks, the client does not count it.
                    let _ = stream.set_read_timeout(Some(TIMEOUT));
                    let mut byte = [0];
                    if stream.read_exact(&mut byte).is_ok() {
                        let _ = stream.write_all(&byte);
                    }
                }
            });
        }
        let connectors: Vec<_> = (0..CONNECTORS)
            .map(|_| {
                let (stop, done, next) = (&stop, &done, &next);
                scope.spawn(move || {
                    lab.clients().run(|| {
                        while !stop.load(Relaxed) {
                            let from = clients.address(next.fetch_add(1, Relaxed));
                            if once(from, to).is_ok() {
                                done.fetch_add(1, Relaxed);
                            }
                        }
                        Ok(())
                    })
                })
            })
            .collect();
        let measured = rate(&done, time);
        stop.store(true, Relaxed);
        // This wakes accept(), and refuses connections that wait for it, whose clients would
        // otherwise wait until their timeout. It fails only if the socket is shut down already.
        let _ = rustix::net::shutdown(&listener, rustix::net::Shutdown::Both);
        for connector in connectors {
            // It has nothing to report but a panic, which the hook has reported.
            let _ = connector.join();
        }
        measured
    })
}

fn once(from: Ipv4Addr, to: SocketAddr) -> io::Result<()> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    socket.bind(&SocketAddr::from((from, 0)).into())?;
    socket.connect_timeout(&to.into(), TIMEOUT)?;
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(&[1])?;
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer)? {
        1 => Ok(()),
        _ => Err(ErrorKind::UnexpectedEof.into()),
    }
}

/// Opens `count` UDP flows to the target, each with other ports, `pace` a second. A packet that is
/// lost opens no flow, so this starts again from the beginning until `enough` says so.
pub(crate) fn open_flows(
    lab: &Lab,
    target: Ipv4Addr,
    count: usize,
    pace: f64,
    mut enough: impl FnMut() -> Result<bool>,
) -> Result<()> {
    /// Ports of the target for each source port.
    const FAN: usize = 50_000;
    const FIRST: usize = 10_000;
    /// Packets sent without a pause: a fraction of a TUN's queue, which holds 500.
    const AT_ONCE: usize = 64;
    /// Most passes. The first flows must not have expired when the last ones open.
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
            // A refusal is ICMP about an earlier packet, since nobody listens there.
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

/// The increase of `count` a second, once it goes on steadily.
pub(crate) fn rate(count: &AtomicU64, time: Duration) -> Result<f64> {
    rest(time / 10)?;
    let (started, before) = (Instant::now(), count.load(Relaxed));
    rest(time)?;
    Ok((count.load(Relaxed) - before) as f64 / started.elapsed().as_secs_f64())
}

pub(crate) fn listen(lab: &Lab) -> Result<TcpListener> {
    Ok(lab
        .new_server()
        .run(|| TcpListener::bind((NEW, 0)).map_err(in_words))?)
}

pub(crate) fn connect(lab: &Lab, to: SocketAddr, congestion: Congestion) -> Result<TcpStream> {
    let socket = lab
        .clients()
        .run(|| Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).map_err(in_words))?;
    congestion.set(SockRef::from(&socket))?;
    socket.connect_timeout(&to.into(), TIMEOUT)?;
    Ok(socket.into())
}

pub(crate) fn bind(addr: SocketAddr) -> Result<UdpSocket, LabError> {
    UdpSocket::bind(addr).map_err(in_words)
}

pub(crate) fn in_words(error: io::Error) -> LabError {
    LabError::unexpected(error.to_string())
}
