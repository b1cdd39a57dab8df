//! Round trips: several requests are under way at a time, and each gets a reply of as many bytes.
//!
//! Owns both ends, which work like most servers and their clients: one datagram in a call, one
//! message in a call. Nobody sends the next request before a reply, so no queue overflows. The
//! result shows what everybody on the path needs for a small packet, asleep and awake.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};

use ipmoved::lab::Lab;
use ipmoved::lab::topology::NEW;

use crate::load::{Congestion, LOOK, bind, connect, in_words, listen, rate};

/// The messages of an exchange.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Messages {
    /// Bytes of each message, without headers.
    pub(crate) payload: usize,
    /// Messages under way at the same time.
    pub(crate) outstanding: usize,
}

/// Events that one call takes from the kernel.
const EVENTS: usize = 64;

/// Round trips a second of datagrams of one flow.
pub(crate) fn udp(lab: &Lab, target: Ipv4Addr, messages: Messages, time: Duration) -> Result<f64> {
    let server = lab.new_server().run(|| bind((NEW, 0).into()))?;
    let to = (target, server.local_addr()?.port());
    let client = lab.clients().run(|| {
        let socket = bind((Ipv4Addr::UNSPECIFIED, 0).into())?;
        socket.connect(to).map_err(in_words)?;
        Ok(socket)
    })?;
    for end in [&client, &server] {
        end.set_read_timeout(Some(LOOK))?;
    }
    let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut buffer = vec![0; messages.payload];
            while !stop.load(Relaxed) {
                if let Ok((n, peer)) = server.recv_from(&mut buffer) {
                    // If sending fails, the client misses this datagram.
                    let _ = server.send_to(&buffer[..n], peer);
                }
            }
        });
        scope.spawn(|| ask(&client, messages, &stop, &done));
        let measured = rate(&done, time);
        stop.store(true, Relaxed);
        measured
    })
}

/// Sends the next datagram for each reply. If none is under way any more, sends all again.
fn ask(client: &UdpSocket, messages: Messages, stop: &AtomicBool, done: &AtomicU64) {
    let mut buffer = vec![0x5a; messages.payload];
    let mut due = messages.outstanding;
    while !stop.load(Relaxed) {
        for _ in 0..due {
            // If sending fails, the datagram counts as lost on the path.
            let _ = client.send(&buffer);
        }
        due = match client.recv(&mut buffer) {
            Ok(_) => {
                done.fetch_add(1, Relaxed);
                1
            }
            Err(_) => messages.outstanding,
        };
    }
}

/// Round trips a second over TCP, one at a time on each of `outstanding` connections.
pub(crate) fn tcp(lab: &Lab, target: Ipv4Addr, messages: Messages, time: Duration) -> Result<f64> {
    let listener = listen(lab)?;
    let to = (target, listener.local_addr()?.port()).into();
    let (mut clients, mut servers) = (Vec::new(), Vec::new());
    for _ in 0..messages.outstanding {
        clients.push(small_talk(connect(lab, to, Congestion::Default)?)?);
        servers.push(small_talk(listener.accept()?.0)?);
    }
    let (stop, done, answered) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        let answering = scope.spawn(|| answer(&servers, messages.payload, &stop, &answered));
        let asking = scope.spawn(|| {
            let request = vec![0x5a; messages.payload];
            for mut client in &clients {
                client.write_all(&request)?;
            }
            answer(&clients, messages.payload, &stop, &done)
        });
        let measured = rate(&done, time);
        stop.store(true, Relaxed);
        for end in [asking, answering] {
            // The panic hook has reported a panic.
            if let Ok(ended) = end.join() {
                ended.context("a connection broke")?;
            }
        }
        measured
    })
}

/// Turns off Nagle's algorithm: small messages must not wait for each other (RFC 9293, section
/// 3.7.4).
fn small_talk(stream: TcpStream) -> Result<TcpStream> {
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Replies to each message with one of the same length, on any connection.
fn answer(
    ends: &[TcpStream],
    payload: usize,
    stop: &AtomicBool,
    heard: &AtomicU64,
) -> io::Result<()> {
    let ready = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    for (n, end) in ends.iter().enumerate() {
        let data = epoll::EventData::new_u64(n as u64);
        epoll::add(&ready, end, data, epoll::EventFlags::IN)?;
    }
    let look = Timespec::try_from(LOOK).map_err(io::Error::other)?;
    let mut message = vec![0x5a; payload];
    let mut have = vec![0; ends.len()];
    let mut events = Vec::with_capacity(EVENTS);
    while !stop.load(Relaxed) {
        epoll::wait(&ready, spare_capacity(&mut events), Some(&look))?;
        for event in events.drain(..) {
            let n = event.data.u64() as usize;
            let mut end = &ends[n];
            have[n] += match end.read(&mut message[have[n]..])? {
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                len => len,
            };
            if have[n] == payload {
                have[n] = 0;
                heard.fetch_add(1, Relaxed);
                end.write_all(&message)?;
            }
        }
    }
    Ok(())
}
