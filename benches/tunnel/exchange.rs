//! Round trips: requests of which several are under way at a time, each answered by as many bytes.
//!
//! Owns both ends, which are as most servers and their clients are: one datagram in a call, one
//! message in a call. Nobody sends before it was answered, so that no queue overflows and what is
//! counted is what everybody on the way needs for a small packet, asleep and awake.

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

/// What is exchanged.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Messages {
    /// Bytes of each, without headers.
    pub(crate) payload: usize,
    /// Under way at the same time.
    pub(crate) outstanding: usize,
}

/// Events taken from the kernel in one call.
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
            let mut room = vec![0; messages.payload];
            while !stop.load(Relaxed) {
                if let Ok((n, peer)) = server.recv_from(&mut room) {
                    // What is not sent is missed by the client.
                    let _ = server.send_to(&room[..n], peer);
                }
            }
        });
        scope.spawn(|| ask(&client, messages, &stop, &done));
        let measured = rate(&done, time);
        stop.store(true, Relaxed);
        measured
    })
}

/// Sends the next datagram for each answer, and all that may be under way where none is any more.
fn ask(client: &UdpSocket, messages: Messages, stop: &AtomicBool, done: &AtomicU64) {
    let mut room = vec![0x5a; messages.payload];
    let mut due = messages.outstanding;
    while !stop.load(Relaxed) {
        for _ in 0..due {
            // As if it were lost on the way.
            let _ = client.send(&room);
        }
        due = match client.recv(&mut room) {
            Ok(_) => {
                done.fetch_add(1, Relaxed);
                1
            }
            Err(_) => messages.outstanding,
        };
    }
}

/// Round trips a second over TCP, one under way on each of as many connections.
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
            // A panic has been told by the hook.
            if let Ok(ended) = end.join() {
                ended.context("a connection broke")?;
            }
        }
        measured
    })
}

/// Small messages are not to wait for each other (RFC 9293, section 3.7.4).
fn small_talk(stream: TcpStream) -> Result<TcpStream> {
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Answers each message with one of the same length, on whatever connection there is one.
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
