//! Way 1 as a daemon: the old server alone translates both addresses. No peer, no channel, nothing
//! encrypted; one thread reads a packet from the TUN, translates it and writes it back.
//!
//! Owns the order of things, like [`control`](super::control) for the tunnel, and this loop:
//!
//! 1. read a super-packet with its `virtio_net_hdr`;
//! 2. parse it, look its flow up and rewrite its head, once ([`Nat::translate`]);
//! 3. write it back whole: the program at the TUN's ingress sends it out, or up.

use std::collections::BTreeMap;
use std::io::IoSlice;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tracing::{debug, info, warn};

use super::DaemonError;
use super::control::{REPAIR_EVERY, Signals, answer, failed, names, notify_ready, undo};
use super::setup::{find_uplink, listen, raise_tun, refused, system, tun_refused};
use crate::daemon::confine;
use crate::flow::nat::{Nat, NatConfig, Outcome, PORTS, Target};
use crate::flow::seed::Seed;
use crate::flow::table::FlowStats;
use crate::io::entropy;
use crate::io::tun::{MAX_FRAME, TunError, TunOptions, TunQueue, VNET_HDR_LEN};
use crate::kernel::masquerade::{self, Towards};
use crate::kernel::netlink::{Link, Netlink};
use crate::kernel::{Failure, Host, Repairs, journal};
use crate::model::drops::{DropReason, Drops};
use crate::model::peer::Role;
use crate::model::status::{Flows, Offloads, State, Status, Traffic, TunnelStatus, Way};
use crate::packet::Parsed;
use crate::packet::icmp;
use crate::packet::offload::{GSO_NONE, NEEDS_CSUM, Offload, VnetHdr};
use crate::settings::config::NatSettings;

/// How often expiring flows are looked at, and longest wait without a packet.
const TICK: Duration = Duration::from_secs(1);

/// Flows examined for expiry per tick; see [`lane`](crate::lane).
const EXPIRY_BUDGET: usize = 1_024;

/// Packets handled before the clock is read again.
const BURST: usize = 64;

/// Answers to packets whose hop limit is used up, per second: what Linux allows itself
/// (`net.ipv4.icmp_msgs_per_sec`).
const ANSWERS: u32 = 1_000;

/// Pause before an interface that somebody set down is read again.
const DEVICE_DOWN_PAUSE: Duration = Duration::from_millis(50);

/// Runs until a signal ends it, and undoes everything then.
///
/// # Errors
/// See [`DaemonError`]; whatever it is, kernel changes of this run are undone.
pub fn run(settings: NatSettings, runtime_dir: &Path) -> Result<(), DaemonError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| DaemonError::System(format!("cannot start the event loop: {error}")))?;
    runtime.block_on(async {
        let Ready { mut host, tools } = Ready::new(&settings, runtime_dir)?;
        // Before the first thread: what is given up is given up by those that follow as well.
        confine::drop_privileges();
        let mut thread = None;
        let result = carry(settings, tools, &mut host, &mut thread).await;
        let undone = undo(&mut host);
        if let Some(thread) = thread {
            thread.stop();
        }
        result.and(undone)
    })
}

/// A host that is ready to translate.
struct Ready {
    host: Host,
    tools: Tools,
}

/// What the daemon works with.
struct Tools {
    signals: Signals,
    status: std::os::unix::net::UnixListener,
    queue: TunQueue,
    uplink: Link,
    towards: Vec<Towards>,
}

/// The thread that carries packets.
struct Thread {
    handle: JoinHandle<()>,
    stop: OwnedFd,
}

impl Thread {
    fn stop(self) {
        if let Err(error) = rustix::io::write(&self.stop, &1u64.to_ne_bytes()) {
            warn!("cannot stop the lane: {error}");
        }
        if self.handle.join().is_err() {
            warn!("the lane had crashed");
        }
    }
}

impl Ready {
    /// Checks everything, then changes what has to be changed. To be called inside the runtime.
    fn new(settings: &NatSettings, runtime_dir: &Path) -> Result<Self, DaemonError> {
        let netlink = Netlink::new().map_err(system)?;
        let mut host = Host::open(runtime_dir).map_err(refused)?;
        if netlink
            .link_by_name(&settings.tun)
            .map_err(system)?
            .is_some()
        {
            let error = TunError::Exists(settings.tun.clone());
            return Err(DaemonError::Input(error.to_string()));
        }
        let servers: Vec<IpAddr> = settings.to.iter().map(|to| to.ip).collect();
        let moves: Vec<_> = settings.moves.iter().collect();
        let uplink = find_uplink(&netlink, settings.uplink.as_deref(), &moves, &servers)?;
        let towards = servers
            .iter()
            .map(|&to| find_server(&netlink, settings, to))
            .collect::<Result<Vec<_>, _>>()?;
        // What a killed predecessor reserved keeps everybody else out; its own flows are no sockets.
        if let Some(conflict) = masquerade::conflict(&PORTS, &towards) {
            return Err(DaemonError::Input(format!(
                "{conflict} is in use on this server, and ports {}-{} have to stand for clients: \
                 close it, or let it use another",
                PORTS.start(),
                PORTS.end()
            )));
        }
        let status = listen(&host)?;
        let signals = Signals::new()?;
        let (queues, _) =
            TunQueue::create(&settings.tun, 1, TunOptions::default()).map_err(tun_refused)?;
        let queue = queues.into_iter().next();
        let queue = queue.ok_or_else(|| system("the TUN interface has no queue"))?;
        let tun = raise_tun(&netlink, &settings.tun, uplink.mtu)?;
        let moves = &settings.moves;
        let desired = masquerade::plan(&netlink, moves, &uplink, &towards, &tun, &PORTS);
        let report = host.reconcile(desired.map_err(system)?).map_err(system)?;
        for failure in report.left {
            warn!(
                "left by an earlier run and still there: {}: {}",
                failure.change, failure.reason
            );
        }
        let tools = Tools {
            signals,
            status,
            queue,
            uplink,
            towards,
        };
        Ok(Self { host, tools })
    }
}

/// The way to the new server, and the address it is asked from.
fn find_server(
    netlink: &Netlink,
    settings: &NatSettings,
    to: IpAddr,
) -> Result<Towards, DaemonError> {
    let input = |text: String| Err(DaemonError::Input(text));
    let held = netlink.addresses().map_err(system)?;
    if held.iter().any(|held| held.addr == to) {
        return input(format!(
            "--to {to} is an address of this server itself; give that of the other one"
        ));
    }
    let route = netlink.route_get(to, None, None);
    let link = match route.as_ref().ok().and_then(|route| route.oif) {
        Some(index) => netlink.link_by_index(index).map_err(system)?,
        None => None,
    };
    let Some(link) = link.filter(|link| !link.loopback) else {
        return input(format!(
            "--to {to}: no route leads there; `ip route get {to}` says why"
        ));
    };
    // What all of has moved, clients speak to. Of IPv6 addresses the kernel may prefer it all the
    // same, and another will do; of IPv4 ones it prefers the primary one, so that was a mistake.
    let is_moved = |addr: IpAddr| {
        let mut moves = settings.moves.iter();
        moves.any(|moved| moved.addr == addr && moved.is_whole())
    };
    let of_link = held
        .iter()
        .filter(|held| held.index == link.index && held.addr.is_ipv4() == to.is_ipv4())
        .map(|held| held.addr)
        .filter(|addr| matches!(addr, IpAddr::V6(addr) if !addr.is_unicast_link_local()));
    let preferred = route.ok().and_then(|route| route.prefsrc);
    let Some(own) = preferred
        .into_iter()
        .chain(of_link)
        .find(|&addr| !is_moved(addr))
    else {
        return input(format!(
            "--to {to}: every address this server can speak to it from has moved, your login included; \
             move only the service's ports, as in --move {}:80,443/tcp",
            settings.moves[0].addr
        ));
    };
    Ok(Towards { to, own, link })
}

/// Translates packets until a signal.
async fn carry(
    settings: NatSettings,
    tools: Tools,
    host: &mut Host,
    running: &mut Option<Thread>,
) -> Result<(), DaemonError> {
    let started = Instant::now();
    let Tools {
        mut signals,
        status,
        queue,
        uplink,
        towards,
    } = tools;
    let status = UnixListener::from_std(status).map_err(failed)?;
    let targets = towards
        .iter()
        .zip(&settings.to)
        .map(|(towards, to)| Target {
            to: to.ip,
            port: to.port,
            own: towards.own,
        })
        .collect();
    let nat = Nat::new(NatConfig {
        moves: settings.moves.clone(),
        targets,
        max_flows: settings.max_flows as usize,
        seed: entropy::seed(),
        port_seed: port_seed(),
        epoch: started,
    });
    let counters = Arc::new(Counters::default());
    let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(failed)?;
    let (tell, mut ended) = mpsc::channel(1);
    let lane = Lane {
        queue,
        nat,
        counters: Arc::clone(&counters),
        stop: stop.try_clone().map_err(failed)?,
        answers: ANSWERS,
    };
    let handle = std::thread::Builder::new()
        .name("nat".into())
        .spawn(move || {
            if let Err(error) = lane.run() {
                // The other end is gone only if the daemon is ending already.
                let _ = tell.blocking_send(error);
            }
        })
        .map_err(failed)?;
    *running = Some(Thread { handle, stop });
    for end in &towards {
        info!(
            uplink = uplink.name,
            server = %end.to,
            from = %end.own,
            "translating both addresses: the new server sees this one's, and nothing is encrypted"
        );
    }
    notify_ready();
    let mut repair = tokio::time::interval(REPAIR_EVERY);
    let result = loop {
        tokio::select! {
            () = signals.recv() => break Ok(()),
            Some(error) = ended.recv() => break Err(DaemonError::Failed(error)),
            connection = status.accept() => match connection {
                Ok((stream, _)) => {
                    let up = Instant::now().duration_since(started);
                    answer(stream, &report(&settings, &towards, &uplink, &counters, up));
                }
                Err(error) => warn!("the status socket failed: {error}"),
            },
            _ = repair.tick() => {
                let Repairs { made, failed } = host.repair();
                for change in made {
                    warn!("somebody removed {change}; it is back");
                }
                for Failure { change, reason } in failed {
                    warn!("{change} is gone and cannot be made again: {reason}");
                }
            }
        }
    };
    info!("stopping");
    result
}

/// Chooses the same ports after a restart, and others than anybody outside could guess: 122 random
/// bits that the kernel made when it booted.
fn port_seed() -> Seed {
    let Some(id) = journal::boot_id() else {
        return entropy::seed();
    };
    let digits: Vec<u8> = id.bytes().filter(u8::is_ascii_hexdigit).collect();
    let (high, low) = digits.split_at(digits.len() / 2);
    let word = |digits: &[u8]| {
        digits.iter().fold(0, |word: u64, &digit| {
            word << 4 | u64::from((digit as char).to_digit(16).unwrap_or(0))
        })
    };
    Seed::new([word(high), word(low)])
}

/// What the lane counts, for `status`.
#[derive(Default)]
struct Counters {
    drops: Drops,
    /// To clients and to the new server.
    traffic: Mutex<[Traffic; 2]>,
    flows: Mutex<FlowStats>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What `status` says: one entry for each address that is translated to.
fn report(
    settings: &NatSettings,
    towards: &[Towards],
    uplink: &Link,
    counters: &Counters,
    up: Duration,
) -> Status {
    let [rx, tx] = *lock(&counters.traffic);
    let stats = *lock(&counters.flows);
    let entry = |end: &Towards, port: Option<u16>| TunnelStatus {
        peer: end.to.to_string(),
        endpoint: Some(end.to.to_string()),
        role: Role::Old,
        state: State::Up,
        cipher: None,
        rtt_ms: None,
        handshake_age_s: None,
        mtu: end.link.mtu.min(uplink.mtu) as usize,
        moved: (settings.moves.iter())
            .filter(|moved| moved.addr.is_ipv4() == end.to.is_ipv4())
            .map(ToString::to_string)
            .collect(),
        deliver_to: Some(match port {
            None => end.to.to_string(),
            Some(port) => std::net::SocketAddr::new(end.to, port).to_string(),
        }),
        deliver: Vec::new(),
        flows: Flows {
            live: stats.live,
            max: stats.max,
            evicted: stats.evicted,
            collisions: stats.collisions,
            refused: stats.refused,
        },
        rx,
        tx,
        drops: names(&counters.drops),
    };
    Status {
        way: Way::Nat,
        tunnels: towards
            .iter()
            .zip(&settings.to)
            .map(|(end, to)| entry(end, to.port))
            .collect(),
        tun: settings.tun.clone(),
        port: 0,
        version: env!("CARGO_PKG_VERSION").into(),
        pid: std::process::id(),
        uptime_s: up.as_secs(),
        offloads: Offloads::default(),
        drops: BTreeMap::new(),
        warnings: Vec::new(),
    }
}

/// The thread that carries packets.
struct Lane {
    queue: TunQueue,
    nat: Nat,
    counters: Arc<Counters>,
    stop: OwnedFd,
    /// Answers that may still be given this second.
    answers: u32,
}

impl Lane {
    /// Runs until told to stop.
    fn run(mut self) -> Result<(), String> {
        let mut frame = vec![0; MAX_FRAME].into_boxed_slice();
        let mut ticked = Instant::now();
        while !self.wait()? {
            let now = Instant::now();
            for _ in 0..BURST {
                if !self.pass(now, &mut frame)? {
                    break;
                }
            }
            if now.duration_since(ticked) >= TICK {
                ticked = now;
                self.answers = ANSWERS;
                self.nat.expire(now, EXPIRY_BUDGET);
            }
            *lock(&self.counters.flows) = self.nat.stats();
        }
        Ok(())
    }

    /// Waits until something is to be done; true if that is to stop.
    fn wait(&self) -> Result<bool, String> {
        let mut fds = [
            PollFd::from_borrowed_fd(self.queue.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.stop.as_fd(), PollFlags::IN),
        ];
        let timeout = Timespec {
            tv_sec: TICK.as_secs() as i64,
            tv_nsec: 0,
        };
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) => Ok(!fds[1].revents().is_empty()),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(format!("waiting for packets failed: {error}")),
        }
    }

    /// Takes one frame through; false if none waits.
    fn pass(&mut self, now: Instant, frame: &mut [u8]) -> Result<bool, String> {
        let len = match self.queue.recv(frame) {
            Ok(len) => len,
            Err(error) => {
                return match error.raw_os_error() {
                    Some(libc::EAGAIN) => Ok(false),
                    Some(libc::EINTR) => Ok(true),
                    // Set down by somebody: nothing to read until it is up again.
                    Some(libc::EIO) => {
                        std::thread::sleep(DEVICE_DOWN_PAUSE);
                        Ok(false)
                    }
                    _ => Err(format!("the TUN interface is gone: {error}")),
                };
            }
        };
        if let Err(reason) = self.translate(now, &mut frame[..len]) {
            self.counters.drops.count(reason);
        }
        Ok(true)
    }

    fn translate(&mut self, now: Instant, frame: &mut [u8]) -> Result<(), DropReason> {
        let (header, packet) = frame
            .split_first_chunk_mut::<VNET_HDR_LEN>()
            .ok_or(DropReason::IpMalformed)?;
        let vnet = VnetHdr::read(header);
        let mut parsed = Parsed::parse(packet)?;
        let offload = Offload::accept(&vnet, packet, &parsed)?;
        let partial = offload.partial();
        if vnet.flags & NEEDS_CSUM != 0 && !partial {
            // The checksum meant was another one, and is finished now.
            *header = VnetHdr::default().to_bytes();
        }
        let bytes = parsed.total();
        let segments = match vnet.gso_type {
            GSO_NONE => 1,
            _ => (parsed.payload_len()).div_ceil(usize::from(vnet.gso_size).max(1)),
        };
        let outcome = self.nat.translate(now, packet, &mut parsed, partial);
        let side = match outcome {
            Ok(Outcome::ToClient) => Some(0),
            Ok(Outcome::ToServer) => Some(1),
            Ok(Outcome::Bounce) => None,
            Err(DropReason::TtlExpired) => {
                self.answer(packet, &parsed);
                return Err(DropReason::TtlExpired);
            }
            Err(reason) => return Err(reason),
        };
        self.queue
            .send(&[IoSlice::new(header), IoSlice::new(packet)])
            .map_err(|error| {
                debug!(%error, "the TUN refused a packet");
                DropReason::TunWriteFailed
            })?;
        if let Some(side) = side {
            let traffic = &mut lock(&self.counters.traffic)[side];
            traffic.packets += segments as u64;
            traffic.bytes += bytes as u64;
        }
        Ok(())
    }

    /// Tells the sender that the hop limit was used up here.
    fn answer(&mut self, packet: &[u8], parsed: &Parsed) {
        if self.answers == 0 {
            return;
        }
        let mut out = [0; icmp::MAX_V6];
        let from = IpAddr::from(parsed.dst(packet));
        if let Some(len) = icmp::time_exceeded(&mut out, packet, parsed, from) {
            self.answers -= 1;
            let header = VnetHdr::default().to_bytes();
            // One that is not heard is as good as one that got lost.
            let _ = self
                .queue
                .send(&[IoSlice::new(&header), IoSlice::new(&out[..len])]);
        }
    }
}
