//! Clients and services with real sockets, as plain as the programs that people run.
//!
//! Owns one TCP service (it replies, takes uploads, gives downloads, holds conversations), one UDP
//! echo, and the client of both. Each end remembers the addresses of the other, since tests have to
//! show which server replied, and to which client address.
//!
//! The service speaks just enough HTTP/1.1 for `curl` to be its client too:
//!
//! | request | reply |
//! |---|---|
//! | `GET /` | the two ends: `server ADDR:PORT`, `client ADDR:PORT` |
//! | `GET /stream/SEED/BYTES` | that many bytes of the stream of that seed |
//! | `PUT /sink` | SHA-256 of the body |
//! | `GET /echo` | `101`, then every byte back until the client closes |
//!
//! Every wait has an end. Nothing here knows of tunnels.

use std::collections::HashMap;
use std::fmt::{self, Write as _};
use std::fs;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{
    IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket,
};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use aws_lc_rs::digest;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::{Doing, LabError, Namespace, Result, patience};

/// How long a client waits for a connection or for the next bytes. It covers several
/// retransmissions of a lost SYN (1 s, 3 s), so that a single loss is no failure, and it soon tells
/// silence.
pub const TIMEOUT: Duration = Duration::from_secs(5);

/// How long a transfer may stall. Killing a daemon and starting it again costs a few
/// retransmissions, the longest of them 6.4 s apart.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);

/// How long the service keeps a silent connection: longer than any test leaves one alone.
const IDLE_TIMEOUT: Duration = Duration::from_secs(180);

/// Most connections of a service at the same time. It closes further ones at once.
const MAX_CONNECTIONS: usize = 4_096;

/// Most peers that a service remembers. It forgets later ones.
const MAX_SEEN: usize = 65_536;

/// Longest request head. Browsers send a tenth of it.
const MAX_HEAD: usize = 8192;

/// Longest reply that is not a stream.
const MAX_ANSWER: u64 = 65_536;

/// The service makes, sends and hashes streams in chunks of this size: a multiple of 8, as the
/// generator makes words.
const CHUNK: usize = 65_536;

/// How often a waiting service checks whether it should end.
const STOP_PAUSE: Duration = Duration::from_millis(50);

/// Largest UDP payload over IPv4: 65,535 less 20 and 8 bytes of headers.
pub const MAX_UDP_PAYLOAD: usize = 65_507;

/// The address and port that a client connects to; port 80 if none is given.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Target(pub SocketAddr);

impl From<SocketAddr> for Target {
    fn from(addr: SocketAddr) -> Self {
        Self(addr)
    }
}

impl From<IpAddr> for Target {
    fn from(addr: IpAddr) -> Self {
        Self(SocketAddr::new(addr, 80))
    }
}

impl From<Ipv4Addr> for Target {
    fn from(addr: Ipv4Addr) -> Self {
        IpAddr::from(addr).into()
    }
}

impl From<Ipv6Addr> for Target {
    fn from(addr: Ipv6Addr) -> Self {
        IpAddr::from(addr).into()
    }
}

impl<A: Into<IpAddr>> From<(A, u16)> for Target {
    fn from((addr, port): (A, u16)) -> Self {
        Self(SocketAddr::new(addr.into(), port))
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A client on one host, with one address of each family.
#[derive(Clone, Copy, Debug)]
pub struct Client<'lab> {
    namespace: &'lab Namespace,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
    port: u16,
}

impl<'lab> Client<'lab> {
    /// A client that speaks from these addresses of the host.
    pub fn new(namespace: &'lab Namespace, v4: Ipv4Addr, v6: Ipv6Addr) -> Self {
        Self {
            namespace,
            v4,
            v6,
            port: 0,
        }
    }

    /// The same client, always from this port (otherwise from any free one).
    #[must_use]
    pub fn from_port(self, port: u16) -> Self {
        Self { port, ..self }
    }

    /// The host it runs on.
    pub fn namespace(&self) -> &'lab Namespace {
        self.namespace
    }

    /// The address from which it speaks to `to`.
    pub fn address_towards(&self, to: impl Into<Target>) -> IpAddr {
        match to.into().0 {
            SocketAddr::V4(_) => self.v4.into(),
            SocketAddr::V6(_) => self.v6.into(),
        }
    }

    /// `GET /`: asks which server is there.
    pub fn get(&self, to: impl Into<Target>) -> Result<Answer> {
        let to = to.into();
        let mut stream = self.connect(to)?;
        let doing = || format!("GET http://{to}/");
        request(&mut stream, "GET / HTTP/1.1").doing(doing)?;
        let body = answer(&mut BufReader::new(&stream)).doing(doing)?;
        let client = stream.local_addr().doing(doing)?;
        Answer::parse(&body, to, client)
            .ok_or_else(|| LabError::unexpected(format!("{to} answered something else: {body}")))
    }

    /// Opens `count` connections one after the other, asks on each and closes it.
    pub fn get_many(&self, to: impl Into<Target>, count: usize) -> Result<Vec<Answer>> {
        let to = to.into();
        (0..count).map(|_| self.get(to)).collect()
    }

    /// Downloads `bytes` bytes, and compares their hash with that of the stream.
    pub fn download(&self, to: impl Into<Target>, bytes: u64) -> Result<Transfer> {
        let to = to.into();
        let doing = || format!("download {bytes} bytes from {to}");
        let mut stream = self.connect(to)?;
        patiently(&stream).doing(doing)?;
        let started = Instant::now();
        request(
            &mut stream,
            &format!("GET /stream/{bytes}/{bytes} HTTP/1.1"),
        )
        .doing(doing)?;
        let mut reader = BufReader::with_capacity(CHUNK, &stream);
        let length = answer_head(&mut reader).doing(doing)?;
        let mut hash = digest::Context::new(&digest::SHA256);
        let mut got = 0;
        while got < length {
            let chunk = reader.fill_buf().doing(doing)?;
            if chunk.is_empty() {
                break;
            }
            hash.update(chunk);
            let n = chunk.len();
            got += n as u64;
            reader.consume(n);
        }
        let transfer = Transfer {
            bytes: got,
            took: started.elapsed(),
            sha256: hex(hash.finish().as_ref()),
        };
        transfer.checked(bytes, bytes)
    }

    /// Uploads `bytes` bytes, and compares their hash with the one in the reply.
    pub fn upload(&self, to: impl Into<Target>, bytes: u64) -> Result<Transfer> {
        let to = to.into();
        let doing = || format!("upload {bytes} bytes to {to}");
        let mut stream = self.connect(to)?;
        patiently(&stream).doing(doing)?;
        let started = Instant::now();
        request(
            &mut stream,
            &format!("PUT /sink HTTP/1.1\r\nContent-Length: {bytes}"),
        )
        .doing(doing)?;
        make_stream(bytes, bytes, |chunk| stream.write_all(chunk)).doing(doing)?;
        let sha256 = answer(&mut BufReader::new(&stream)).doing(doing)?;
        let transfer = Transfer {
            bytes,
            took: started.elapsed(),
            sha256,
        };
        transfer.checked(bytes, bytes)
    }

    /// Opens a connection that stays open.
    pub fn converse(&self, to: impl Into<Target>) -> Result<Conversation> {
        let to = to.into();
        let doing = || format!("open a conversation with {to}");
        let mut stream = self.connect(to)?;
        request(&mut stream, "GET /echo HTTP/1.1").doing(doing)?;
        // No buffer here: the bytes behind the head belong to the conversation.
        let head = read_head(&mut stream).doing(doing)?;
        if !head.starts_with("HTTP/1.1 101") {
            return Err(LabError::unexpected(format!(
                "{to} refused to converse: {head}"
            )));
        }
        Ok(Conversation { stream, to })
    }

    /// Sends one datagram, and waits for the same one back from the same address and port.
    pub fn udp(&self, to: impl Into<Target>, payload: &[u8]) -> Result<Duration> {
        let to = to.into();
        let doing = || format!("get {} bytes of UDP echoed by {to}", payload.len());
        let socket = self.udp_socket(to)?;
        let started = Instant::now();
        socket.send(payload).doing(doing)?;
        let mut back = vec![0; MAX_UDP_PAYLOAD + 1];
        let n = socket.recv(&mut back).map_err(timed_out).doing(doing)?;
        if &back[..n] != payload {
            return Err(LabError::unexpected(format!("{to} echoed other bytes")));
        }
        Ok(started.elapsed())
    }

    /// Sends one ICMP echo request with `size` bytes of payload, and returns the round-trip time.
    ///
    /// The host must allow ping sockets (`net.ipv4.ping_group_range`), as the lab's clients do.
    pub fn ping(&self, to: impl Into<IpAddr>, size: usize) -> Result<Duration> {
        let to = to.into();
        let doing = || format!("ping {to}");
        let (domain, protocol, request, reply) = match to {
            IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4, 8, 0),
            IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6, 128, 129),
        };
        let socket = self
            .socket(domain, Type::DGRAM, protocol, to)
            .doing(doing)?;
        // The kernel writes identifier and checksum of a ping socket.
        let mut echo = vec![request, 0, 0, 0, 0, 0, 0, 1];
        echo.extend((0..size).map(|i| i as u8));
        let started = Instant::now();
        socket
            .connect(&SocketAddr::new(to, 0).into())
            .doing(doing)?;
        socket.send(&echo).doing(doing)?;
        let mut back = vec![0; echo.len() + 1];
        let n = (&socket).read(&mut back).map_err(timed_out).doing(doing)?;
        if n != echo.len() || back[0] != reply || back[8..n] != echo[8..] {
            return Err(LabError::unexpected(format!(
                "{to} answered a ping with other bytes"
            )));
        }
        Ok(started.elapsed())
    }

    /// Sends a SYN: it is accepted, refused, or nothing comes back within `patience`.
    pub fn probe_tcp(&self, to: impl Into<Target>, patience: Duration) -> Result<Probe> {
        let to = to.into();
        match self.try_connect(to, patience)? {
            Ok(_) => Ok(Probe::Open),
            Err(error) => Probe::of(&error)
                .ok_or(error)
                .doing(|| format!("probe TCP {to}")),
        }
    }

    /// Sends a datagram: it is echoed, refused with port unreachable, or nothing comes back.
    pub fn probe_udp(&self, to: impl Into<Target>, patience: Duration) -> Result<Probe> {
        let to = to.into();
        let doing = || format!("probe UDP {to}");
        let socket = self.udp_socket(to)?;
        let wait = self::patience(patience);
        socket.set_read_timeout(Some(wait)).doing(doing)?;
        socket.send(b"anybody there?").doing(doing)?;
        match socket.recv(&mut [0; 64]) {
            Ok(_) => Ok(Probe::Open),
            Err(error) => Probe::of(&error).ok_or(error).doing(doing),
        }
    }

    /// A TCP connection from the client's own address.
    pub fn connect(&self, to: impl Into<Target>) -> Result<TcpStream> {
        let to = to.into();
        self.try_connect(to, TIMEOUT)?
            .doing(|| format!("connect to {to}"))
    }

    /// The same, which may take so long.
    pub fn connect_within(&self, to: impl Into<Target>, patience: Duration) -> Result<TcpStream> {
        let to = to.into();
        self.try_connect(to, patience)?
            .doing(|| format!("connect to {to}"))
    }

    /// A UDP socket from the client's own address, connected, with [`TIMEOUT`].
    pub fn udp_socket(&self, to: impl Into<Target>) -> Result<UdpSocket> {
        let to = to.into();
        let domain = Domain::for_address(to.0);
        let doing = || format!("open a UDP socket to {to}");
        let socket = self
            .socket(domain, Type::DGRAM, Protocol::UDP, to.0.ip())
            .doing(doing)?;
        socket.connect(&to.0.into()).doing(doing)?;
        Ok(socket.into())
    }

    fn try_connect(&self, to: Target, patience: Duration) -> Result<io::Result<TcpStream>> {
        let domain = Domain::for_address(to.0);
        let socket = self
            .socket(domain, Type::STREAM, Protocol::TCP, to.0.ip())
            .doing(|| format!("open a TCP socket to {to}"))?;
        Ok(socket
            .connect_timeout(&to.0.into(), self::patience(patience))
            .map(|()| socket.into()))
    }

    /// A socket in the client's namespace, bound to its own address towards `to`.
    fn socket(
        &self,
        domain: Domain,
        kind: Type,
        protocol: Protocol,
        to: IpAddr,
    ) -> Result<Socket, io::Error> {
        let from = SocketAddr::new(self.address_towards((to, 0)), self.port);
        self.namespace
            .run(|| {
                Ok((|| {
                    let socket = Socket::new(domain, kind, Some(protocol))?;
                    socket.set_reuse_address(from.port() != 0)?;
                    socket.bind(&SockAddr::from(from))?;
                    socket.set_read_timeout(Some(patience(TIMEOUT)))?;
                    socket.set_write_timeout(Some(patience(TIMEOUT)))?;
                    Ok(socket)
                })())
            })
            .map_err(io::Error::other)?
    }
}

/// The two ends of a `GET /`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Answer {
    /// The address and port that the client asked.
    pub asked: SocketAddr,
    /// The client's own address and port.
    pub client: SocketAddr,
    /// The listening address of the service that replied.
    pub server: SocketAddr,
    /// The client's address and port, as the service saw them.
    pub client_seen: SocketAddr,
}

impl Answer {
    fn parse(body: &str, to: Target, client: SocketAddr) -> Option<Self> {
        let field = |name: &str| {
            body.lines()
                .find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
        };
        Some(Self {
            asked: to.0,
            client,
            server: field("server ")?,
            client_seen: field("client ")?,
        })
    }

    /// Expects that the reply came from the service that listens on `server`.
    pub fn is_answered_by(self, server: impl Into<IpAddr>) -> Result<Self> {
        let server = server.into();
        if self.server.ip() != server {
            return Err(LabError::unexpected(format!(
                "{} was answered by {}, not by {server}",
                self.asked, self.server
            )));
        }
        Ok(self)
    }

    /// Expects that the service saw the client's own address and port.
    pub fn for_the_client_itself(self) -> Result<Self> {
        if self.client_seen != self.client {
            return Err(LabError::unexpected(format!(
                "the service saw {}, the client is {}",
                self.client_seen, self.client
            )));
        }
        Ok(self)
    }
}

/// A transfer in one direction.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Transfer {
    /// Bytes that arrived.
    pub bytes: u64,
    /// From the request to the last byte (download) or to the reply (upload).
    pub took: Duration,
    /// SHA-256 of the bytes that arrived, in hexadecimal.
    pub sha256: String,
}

impl Transfer {
    /// Megabits per second.
    pub fn mbit_per_s(&self) -> f64 {
        self.bytes as f64 * 8e-6 / self.took.as_secs_f64()
    }

    fn checked(self, seed: u64, bytes: u64) -> Result<Self> {
        let mut hash = digest::Context::new(&digest::SHA256);
        make_stream(seed, bytes, |chunk| {
            hash.update(chunk);
            Ok(())
        })
        .doing(|| "hash a stream".into())?;
        let sent = hex(hash.finish().as_ref());
        if self.bytes != bytes || self.sha256 != sent {
            return Err(LabError::unexpected(format!(
                "{bytes} bytes with SHA-256 {sent} were sent; {} with {} arrived",
                self.bytes, self.sha256
            )));
        }
        Ok(self)
    }
}

/// A connection that stays open.
#[derive(Debug)]
pub struct Conversation {
    stream: TcpStream,
    to: Target,
}

impl Conversation {
    /// Sends `words`, and expects their echo within `patience`.
    pub fn exchange(&mut self, words: &[u8], patience: Duration) -> Result<Duration> {
        let started = Instant::now();
        self.say(words)?;
        self.hear(words, patience)?;
        Ok(started.elapsed())
    }

    /// Sends `words` without waiting for the echo.
    pub fn say(&mut self, words: &[u8]) -> Result<()> {
        let to = self.to;
        self.stream
            .write_all(words)
            .doing(|| format!("say {} bytes to {to}", words.len()))
    }

    /// Expects the echo of `words` within `patience`.
    pub fn hear(&mut self, words: &[u8], patience: Duration) -> Result<()> {
        let to = self.to;
        let doing = || format!("hear {} bytes back from {to}", words.len());
        let deadline = Instant::now() + self::patience(patience);
        let mut back = vec![0; words.len()];
        let mut heard = 0;
        while heard < back.len() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::Error::from(ErrorKind::TimedOut)).doing(doing);
            }
            self.stream.set_read_timeout(Some(left)).doing(doing)?;
            heard += match self.stream.read(&mut back[heard..]).map_err(timed_out) {
                Ok(0) => Err(io::Error::from(ErrorKind::UnexpectedEof)).doing(doing)?,
                Ok(n) => n,
                Err(error) => Err(error).doing(doing)?,
            };
        }
        if back != words {
            return Err(LabError::unexpected(format!("{to} echoed other bytes")));
        }
        Ok(())
    }
}

/// What a client learns about a port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Probe {
    /// There was a reply.
    Open,
    /// A reset, or an ICMP port unreachable.
    Refused,
    /// A router or the host says that the address cannot be reached.
    Unreachable,
    /// Nothing came back.
    Silent,
}

impl Probe {
    fn of(error: &io::Error) -> Option<Self> {
        if error.kind() == ErrorKind::ConnectionRefused {
            return Some(Self::Refused);
        }
        if [
            ErrorKind::HostUnreachable,
            ErrorKind::NetworkUnreachable,
            ErrorKind::PermissionDenied,
        ]
        .contains(&error.kind())
        {
            return Some(Self::Unreachable);
        }
        is_timeout(error).then_some(Self::Silent)
    }
}

/// A TCP service that listens on one address; it ends when dropped.
#[derive(Debug)]
pub struct Service {
    addr: SocketAddr,
    listener: TcpListener,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<Result<()>>>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    seen: Mutex<Vec<SocketAddr>>,
    next: AtomicU64,
    open: Mutex<HashMap<u64, TcpStream>>,
}

impl Shared {
    fn saw(&self, peer: SocketAddr) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.len() < MAX_SEEN {
            seen.push(peer);
        }
    }

    fn seen(&self) -> Vec<SocketAddr> {
        self.seen
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Service {
    /// Starts a service that listens on this address alone.
    pub fn start(namespace: &Namespace, addr: impl Into<Target>) -> Result<Self> {
        let Target(addr) = addr.into();
        let doing = || format!("listen on {addr}");
        let listener = namespace.run(|| TcpListener::bind(addr).doing(doing))?;
        let addr = listener.local_addr().doing(doing)?;
        let shared = Arc::new(Shared::default());
        let acceptor = {
            let (listener, shared) = (listener.try_clone().doing(doing)?, Arc::clone(&shared));
            namespace.thread(&format!("service {addr}"), move || {
                accept(&listener, addr, &shared);
                Ok(())
            })?
        };
        Ok(Self {
            addr,
            listener,
            shared,
            acceptor: Some(acceptor),
        })
    }

    /// Its listening address.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The clients that it has seen, in order.
    pub fn peers(&self) -> Vec<SocketAddr> {
        self.shared.seen()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.shared.stop.store(true, Relaxed);
        // This wakes accept(). It fails only if the socket is already shut down.
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
        if let Some(acceptor) = self.acceptor.take() {
            // The panic hook has reported its panic, if there was one.
            let _ = acceptor.join();
        }
        let open = &self.shared.open;
        for stream in open.lock().unwrap_or_else(PoisonError::into_inner).values() {
            // This wakes the thread of the connection. The connection may have ended just now.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn accept(listener: &TcpListener, addr: SocketAddr, shared: &Arc<Shared>) {
    loop {
        let accepted = listener.accept();
        if shared.stop.load(Relaxed) {
            return;
        }
        // A client that left before we accepted it is no reason to end.
        let Ok((stream, peer)) = accepted else {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        };
        shared.saw(peer);
        let id = shared.next.fetch_add(1, Relaxed);
        let Ok(twin) = stream.try_clone() else {
            continue;
        };
        {
            let mut open = shared.open.lock().unwrap_or_else(PoisonError::into_inner);
            if open.len() >= MAX_CONNECTIONS {
                continue;
            }
            open.insert(id, twin);
        }
        let shared = Arc::clone(shared);
        std::thread::spawn(move || {
            // If a connection breaks, its client reports it.
            let _ = serve(&stream, addr, peer);
            shared
                .open
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .remove(&id);
        });
    }
}

fn serve(stream: &TcpStream, server: SocketAddr, client: SocketAddr) -> io::Result<()> {
    stream.set_read_timeout(Some(IDLE_TIMEOUT))?;
    stream.set_write_timeout(Some(IDLE_TIMEOUT))?;
    let mut reader = BufReader::with_capacity(CHUNK, stream);
    let head = read_head(&mut reader)?;
    let mut out = stream;
    let mut line = head.lines().next().unwrap_or_default().split(' ');
    let (method, path) = (
        line.next().unwrap_or_default(),
        line.next().unwrap_or_default(),
    );
    let mut parts = path.split('/').skip(1);
    match (method, parts.next().unwrap_or_default()) {
        ("GET", "") => respond(out, &format!("server {server}\nclient {client}\n")),
        ("GET", "stream") => {
            let mut number = || parts.next()?.parse::<u64>().ok();
            let (Some(seed), Some(bytes)) = (number(), number()) else {
                return out.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n");
            };
            respond_head(out, bytes)?;
            make_stream(seed, bytes, |chunk| out.write_all(chunk))
        }
        ("PUT" | "POST", "sink") => {
            let length = header(&head, "content-length").unwrap_or(0);
            let mut hash = digest::Context::new(&digest::SHA256);
            let mut left = length;
            while left > 0 {
                let chunk = reader.fill_buf()?;
                if chunk.is_empty() {
                    return Err(ErrorKind::UnexpectedEof.into());
                }
                let n = chunk.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                hash.update(&chunk[..n]);
                reader.consume(n);
                left -= n as u64;
            }
            respond(out, &hex(hash.finish().as_ref()))
        }
        ("GET", "echo") => {
            out.write_all(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")?;
            loop {
                let words = reader.fill_buf()?;
                if words.is_empty() {
                    return Ok(());
                }
                out.write_all(words)?;
                let n = words.len();
                reader.consume(n);
            }
        }
        _ => out.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"),
    }
}

fn respond(mut out: impl Write, body: &str) -> io::Result<()> {
    respond_head(&mut out, body.len() as u64)?;
    out.write_all(body.as_bytes())
}

fn respond_head(mut out: impl Write, length: u64) -> io::Result<()> {
    write!(
        out,
        "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    )
}

fn patiently(stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(patience(STALL_TIMEOUT)))?;
    stream.set_write_timeout(Some(patience(STALL_TIMEOUT)))
}

fn request(stream: &mut TcpStream, line: &str) -> io::Result<()> {
    // One write, so that the request is one segment.
    stream.write_all(format!("{line}\r\nHost: lab\r\nConnection: close\r\n\r\n").as_bytes())
}

/// Reads the body of a short reply.
fn answer(reader: &mut impl BufRead) -> io::Result<String> {
    let length = answer_head(reader)?.min(MAX_ANSWER);
    let mut body = String::new();
    reader
        .take(length)
        .read_to_string(&mut body)
        .map_err(timed_out)?;
    Ok(body)
}

/// Reads the head of a reply, and returns the length of its body.
fn answer_head(reader: &mut impl Read) -> io::Result<u64> {
    let head = read_head(reader)?;
    match header(&head, "content-length") {
        Some(length) if head.starts_with("HTTP/1.1 200 ") => Ok(length),
        _ => Err(io::Error::other(format!(
            "the answer is `{}`",
            head.trim_end()
        ))),
    }
}

/// Reads up to and including the empty line, and not one byte more.
fn read_head(reader: &mut impl Read) -> io::Result<String> {
    let mut head = Vec::new();
    let mut byte = [0];
    while head.len() < MAX_HEAD && !head.ends_with(b"\r\n\r\n") {
        reader.read_exact(&mut byte).map_err(timed_out)?;
        head.extend(byte);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

fn header(head: &str, name: &str) -> Option<u64> {
    head.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case(name)
            .then(|| value.trim().parse().ok())?
    })
}

/// A UDP service that listens on one address and sends everything back; it ends when dropped.
#[derive(Debug)]
pub struct UdpService {
    addr: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl UdpService {
    /// Starts a service that listens on this address alone.
    pub fn start(namespace: &Namespace, addr: impl Into<Target>) -> Result<Self> {
        let Target(addr) = addr.into();
        let doing = || format!("listen on {addr}/udp");
        let socket = namespace.run(|| UdpSocket::bind(addr).doing(doing))?;
        let addr = socket.local_addr().doing(doing)?;
        socket.set_read_timeout(Some(STOP_PAUSE)).doing(doing)?;
        let shared = Arc::new(Shared::default());
        let seen = Arc::clone(&shared);
        let thread = namespace.thread(&format!("service {addr}/udp"), move || {
            let mut datagram = vec![0; MAX_UDP_PAYLOAD + 1];
            while !seen.stop.load(Relaxed) {
                // Timeouts let it check whether it should stop. Errors are ICMP about clients that
                // left.
                if let Ok((n, peer)) = socket.recv_from(&mut datagram) {
                    seen.saw(peer);
                    let _ = socket.send_to(&datagram[..n], peer);
                }
            }
            Ok(())
        })?;
        Ok(Self {
            addr,
            shared,
            thread: Some(thread),
        })
    }

    /// Its listening address.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The senders of the datagrams that it has seen, in order.
    pub fn peers(&self) -> Vec<SocketAddr> {
        self.shared.seen()
    }
}

impl Drop for UdpService {
    fn drop(&mut self) {
        self.shared.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            // The panic hook has reported its panic, if there was one.
            let _ = thread.join();
        }
    }
}

/// The TCP addresses that somebody listens on in a namespace.
pub fn listeners(namespace: &Namespace) -> Result<Vec<SocketAddr>> {
    // From the kernel's net/tcp_states.h.
    const TCP_LISTEN: &str = "0A";
    namespace.run(|| {
        let mut found = Vec::new();
        for file in ["tcp", "tcp6"] {
            let path = format!("/proc/thread-self/net/{file}");
            let table = fs::read_to_string(&path).doing(|| format!("read {path}"))?;
            for line in table.lines().skip(1) {
                let mut fields = line.split_ascii_whitespace().skip(1);
                let (local, state) = (fields.next(), fields.nth(1));
                if state == Some(TCP_LISTEN) {
                    found.extend(local.and_then(proc_addr));
                }
            }
        }
        Ok(found)
    })
}

/// Parses `0102000A:0050`: the address as host-order words of its bytes, the port as a number.
fn proc_addr(text: &str) -> Option<SocketAddr> {
    let (addr, port) = text.split_once(':')?;
    let mut bytes = Vec::new();
    for at in (0..addr.len()).step_by(8) {
        let word = u32::from_str_radix(addr.get(at..at + 8)?, 16).ok()?;
        bytes.extend(word.to_ne_bytes());
    }
    let addr = match bytes.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?),
        _ => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?),
    };
    Some(SocketAddr::new(addr, u16::from_str_radix(port, 16).ok()?))
}

/// The stream of a seed: SplitMix64 (Steele, Lea, Flood 2014), little-endian, [`CHUNK`] bytes at a
/// time.
fn make_stream(
    seed: u64,
    bytes: u64,
    mut sink: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut state = seed;
    let mut chunk = vec![0; CHUNK];
    let mut left = bytes;
    while left > 0 {
        for word in chunk.chunks_exact_mut(8) {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            word.copy_from_slice(&(z ^ (z >> 31)).to_le_bytes());
        }
        let n = CHUNK.min(usize::try_from(left).unwrap_or(CHUNK));
        sink(&chunk[..n]).map_err(timed_out)?;
        left -= n as u64;
    }
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn is_timeout(error: &io::Error) -> bool {
    [ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&error.kind())
}

/// Replaces "try again", the error of a socket after its timeout, by "timed out" for people.
fn timed_out(error: io::Error) -> io::Error {
    if is_timeout(&error) {
        io::Error::new(ErrorKind::TimedOut, "timed out")
    } else {
        error
    }
}
