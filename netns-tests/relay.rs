//! A host on the path between the two servers. It does to their datagrams what the internet does,
//! and an attacker on the path: it loses, delays, keeps and repeats them, and shows one side
//! another address, as a NAT does.
//!
//! ```text
//!  old server ── 192.0.2.254:51850 │ relay (on the router) │ 198.51.100.254:51850 ── new server
//! ```
//!
//! Each server has the relay's address as its peer's.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ipmoved::internals::Role;
use ipmoved::lab::topology::{NEW, OLD, ROUTER_NEW, ROUTER_OLD};
use ipmoved::lab::{DaemonSetup, Lab, LabError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::stage::{Result, setup};

/// The UDP port of both daemons, and of the relay.
pub(crate) const PORT: u16 = 51_850;

/// Longest wait before the relay reads its orders again.
const TICK: Duration = Duration::from_millis(2);

/// Most datagrams that it takes from one side before the other has its turn.
const BURST: usize = 64;

/// Size of the socket buffers. The relay must lose only what it has been told to lose.
const BUFFER: usize = 16 << 20;

/// What happens to a datagram.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fate {
    Pass,
    Lose,
    Late(Duration),
    /// It waits until [`Relay::release`].
    Hold,
}

/// Decides what happens to a datagram from that side.
type Rule = Box<dyn FnMut(Role, &[u8]) -> Fate + Send>;

struct State {
    rule: Rule,
    /// Every datagram that came, with the side it came from, whatever its fate.
    record: Option<Vec<(Role, Vec<u8>)>>,
    held: Vec<(Role, Vec<u8>)>,
    release: bool,
    /// The side that will see the relay at another port.
    rebind: Option<Role>,
    inject: Vec<(Role, Vec<u8>)>,
    passed: u64,
}

/// A running relay.
pub(crate) struct Relay {
    state: Arc<Mutex<State>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result>>,
}

impl Relay {
    /// Starts a relay that passes everything on.
    pub(crate) fn start(lab: &Lab) -> Result<Self> {
        let sockets = lab.router().run(|| {
            let open = |addr| open(addr, PORT);
            open(ROUTER_OLD)
                .and_then(|old| Ok((old, open(ROUTER_NEW)?)))
                .map_err(failed)
        })?;
        let state = Arc::new(Mutex::new(State {
            rule: Box::new(|_, _| Fate::Pass),
            record: None,
            held: Vec::new(),
            release: false,
            rebind: None,
            inject: Vec::new(),
            passed: 0,
        }));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = {
            let (state, stop) = (Arc::clone(&state), Arc::clone(&stop));
            lab.router().thread("relay", move || {
                let mut work = Work {
                    old: sockets.0,
                    new: sockets.1,
                    old_at: (OLD, PORT).into(),
                    new_at: (NEW, PORT).into(),
                    late: BTreeMap::new(),
                    order: 0,
                };
                while !stop.load(Relaxed) {
                    work.turn(&state).map_err(failed)?;
                }
                Ok(())
            })?
        };
        Ok(Self {
            state,
            stop,
            thread: Some(thread),
        })
    }

    /// The daemons of a lab with the relay between them.
    pub(crate) fn setup(lab: &Lab) -> Result<DaemonSetup<'_>> {
        Ok(setup(lab)?
            .peer(Role::Old, ROUTER_OLD)
            .peer(Role::New, ROUTER_NEW)
            .args(Role::New, &["--deliver-to", &NEW.to_string()]))
    }

    /// From now on `rule` decides.
    pub(crate) fn rule(&self, rule: impl FnMut(Role, &[u8]) -> Fate + Send + 'static) {
        self.state().rule = Box::new(rule);
    }

    /// Keeps a copy of everything from now on.
    pub(crate) fn record(&self) {
        self.state().record = Some(Vec::new());
    }

    /// Returns the datagrams that came since [`record`](Self::record), and the sides they came
    /// from.
    pub(crate) fn recorded(&self) -> Vec<(Role, Vec<u8>)> {
        self.state().record.take().unwrap_or_default()
    }

    /// The datagrams that the relay holds.
    pub(crate) fn held(&self) -> Vec<(Role, Vec<u8>)> {
        self.state().held.clone()
    }

    /// Sends all held datagrams.
    pub(crate) fn release(&self) {
        self.state().release = true;
    }

    /// From now on one side sees the relay at another port, as if a NAT had lost its state.
    pub(crate) fn rebind(&self, seen_by: Role) {
        self.state().rebind = Some(seen_by);
    }

    /// Sends something to one side as if it came from the other.
    pub(crate) fn inject(&self, to: Role, bytes: Vec<u8>) {
        self.state().inject.push((to, bytes));
    }

    /// The number of datagrams that it has passed on.
    pub(crate) fn passed(&self) -> u64 {
        self.state().passed
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(Ok(Err(error))) = self.thread.take().map(JoinHandle::join) {
            println!("the relay ended early: {error}");
        }
    }
}

fn failed(error: io::Error) -> LabError {
    LabError::unexpected(format!("the relay cannot go on: {error}"))
}

fn open(addr: Ipv4Addr, port: u16) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((addr, port))?;
    socket.set_nonblocking(true)?;
    rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, BUFFER)?;
    rustix::net::sockopt::set_socket_send_buffer_size(&socket, BUFFER)?;
    Ok(socket)
}

struct Work {
    old: UdpSocket,
    new: UdpSocket,
    old_at: SocketAddr,
    new_at: SocketAddr,
    late: BTreeMap<(Instant, u64), (Role, Vec<u8>)>,
    order: u64,
}

impl Work {
    fn turn(&mut self, state: &Mutex<State>) -> io::Result<()> {
        let mut fds = [
            PollFd::new(&self.old, PollFlags::IN),
            PollFd::new(&self.new, PollFlags::IN),
        ];
        let timeout = Timespec {
            tv_sec: 0,
            tv_nsec: TICK.as_nanos() as i64,
        };
        poll(&mut fds, Some(&timeout))?;
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        match state.rebind.take() {
            Some(Role::Old) => self.old = open(ROUTER_OLD, 0)?,
            Some(Role::New) => self.new = open(ROUTER_NEW, 0)?,
            None => {}
        }
        if std::mem::take(&mut state.release) {
            for (from, bytes) in std::mem::take(&mut state.held) {
                self.pass(from, &bytes);
            }
        }
        for (to, bytes) in std::mem::take(&mut state.inject) {
            self.pass(to.other(), &bytes);
        }
        for from in [Role::Old, Role::New] {
            self.take(from, &mut state)?;
        }
        let now = Instant::now();
        while let Some(entry) = self.late.first_entry().filter(|e| e.key().0 <= now) {
            let (from, bytes) = entry.remove();
            self.pass(from, &bytes);
        }
        Ok(())
    }

    fn take(&mut self, from: Role, state: &mut State) -> io::Result<()> {
        let mut buffer = [0; 65_536];
        for _ in 0..BURST {
            let socket = match from {
                Role::Old => &self.old,
                Role::New => &self.new,
            };
            let (n, source) = match socket.recv_from(&mut buffer) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                // This is an ICMP message about a server that is away.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => continue,
                Err(error) => return Err(error),
            };
            match from {
                Role::Old => self.old_at = source,
                Role::New => self.new_at = source,
            }
            let bytes = &buffer[..n];
            if let Some(record) = &mut state.record {
                record.push((from, bytes.to_vec()));
            }
            match (state.rule)(from, bytes) {
                Fate::Pass => {
                    state.passed += 1;
                    self.pass(from, bytes);
                }
                Fate::Lose => {}
                Fate::Late(by) => {
                    self.order += 1;
                    let key = (Instant::now() + by, self.order);
                    self.late.insert(key, (from, bytes.to_vec()));
                }
                Fate::Hold => state.held.push((from, bytes.to_vec())),
            }
        }
        Ok(())
    }

    fn pass(&self, from: Role, bytes: &[u8]) {
        // If sending fails, the datagram is lost, as on any path.
        let _ = match from {
            Role::Old => self.new.send_to(bytes, self.new_at),
            Role::New => self.old.send_to(bytes, self.old_at),
        };
    }
}

/// Numbers from a seed, for rules that are the same each run (SplitMix64).
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    /// True `chance` times in a thousand.
    pub(crate) fn per_thousand(&mut self, chance: u64) -> bool {
        self.next() % 1_000 < chance
    }

    /// The next number.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}
