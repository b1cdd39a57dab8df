//! Traffic between the client and the new server of a lab.
//!
//! Owns the generators: TCP streams, pings, short connections. They are plain sockets with large
//! buffers in threads of this process, made inside the namespaces; a socket stays in the namespace
//! in which it was made, whichever thread uses it. Knows nothing of tunnels.

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

/// What one write or read takes: twice a super-packet, and it stays in the cache.
const CHUNK: usize = 128 << 10;
/// How long a stream may take to find its speed before it is measured.
const RAMP: Duration = Duration::from_millis(400);
/// A path on which nothing moves for so long is broken.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How often a thread that waits looks whether it is to end.
pub(crate) const LOOK: Duration = Duration::from_millis(100);
/// How long what is under way may take to arrive after a flood.
pub(crate) const DRAIN: Duration = Duration::from_millis(150);
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

/// Where connections come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Clients {
    /// All from one address.
    One,
    /// From [`MANY_CLIENTS`] addresses in turn.
    Many,
}

/// Some less than their network has addresses; the figure's name tells the number.
const MANY_CLIENTS: usize = 250;
/// Their network and its length: from the block for benchmarks (RFC 2544).
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

/// Lets the clients' host speak from the addresses of [`Clients::Many`]. The router reaches them by
/// way of it: neighbours for each of them would not fit the kernel's table, which all labs share.
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

/// TCP connections a second: opened, one byte each way, closed by the server, one after the other in
/// a few threads, from one address or from the next one each.
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
                    // What breaks is not counted by the client.
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
        // Wakes accept(), and refuses who waits to be accepted: a client would wait for its answer until
        // its time is over. Fails only if the socket is shut down already.
        let _ = rustix::net::shutdown(&listener, rustix::net::Shutdown::Both);
        for connector in connectors {
            // It has nothing to report but a panic, which the hook has told.
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

/// How much a second is counted, from when it goes on steadily.
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
