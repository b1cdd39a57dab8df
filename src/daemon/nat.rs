//! The daemon of `ipmoved nat`: the old server alone translates both addresses. There is no peer,
//! no channel, and nothing is encrypted.
//!
//! Owns the order of things, as [`control`](super::control) does for the tunnel. What happens to a
//! packet is [`lane::nat`](crate::lane::nat)'s business.

use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use tokio::sync::mpsc;
use tracing::{info, warn};

use super::dry_run::DryRun;
use super::follow::Listener;
use super::report;
use super::service::{
    self, DaemonError, End, LOOK_EVERY, Repairer, Result, Signals, Threads, Wish, block_on, end,
    failed, input, notify_ready, notify_stopping, system, warn_of_left, warn_of_unread,
};
use super::setup::{find_uplink, raise_tun, warn_of_absent};
use super::status_socket::{self, StatusListener};
use super::viewers;
use super::warnings::Warnings;
use super::watchdog::Watchdog;
use crate::daemon::{confine, log};
use crate::flow::listing::Flows;
use crate::flow::nat::{Nat, NatConfig, PORTS, Target};
use crate::flow::seed::Seed;
use crate::io::entropy;
use crate::io::tun::{TunError, TunOptions, TunQueue};
use crate::kernel::masquerade::{self, Towards};
use crate::kernel::netlink::{Link, Netlink};
use crate::kernel::{Host, journal};
use crate::lane::nat::{NatCounters, NatLane};
use crate::settings::config::NatSettings;

/// Runs until a signal ends it, and undoes everything then.
///
/// # Errors
/// See [`DaemonError`]; kernel changes of this run are undone, unless a thread crashed.
pub fn run(settings: NatSettings, runtime_dir: &Path) -> Result<(), DaemonError> {
    block_on(async {
        let Ready { mut host, tools } = Ready::new(&settings, runtime_dir)?;
        // Before the first thread starts: later threads inherit what this one gives up.
        let confinement = confine::confine(confine::Needs {
            runtime_dir: host.dir(),
            names: false,
            state_dir: None,
        });
        let mut warnings = Warnings::default();
        for text in &confinement.lacking {
            if warnings.keep(Instant::now(), text.clone()) {
                warn!(warning = %text, "an administrator should know");
            }
        }
        let _log = log::queue();
        let mut threads = Threads::default();
        let result = carry(settings, tools, &mut host, &mut threads, warnings).await;
        let result = end(result, &mut host);
        threads.stop();
        result
    })
}

/// A host that is ready to translate.
struct Ready {
    host: Host,
    tools: Tools,
}

/// The daemon's tools.
struct Tools {
    signals: Signals,
    status: std::os::unix::net::UnixListener,
    viewers: viewers::Sockets,
    queue: TunQueue,
    uplink: Link,
    towards: Vec<Towards>,
    port_seed: Seed,
}

impl Ready {
    /// Checks everything, then changes what has to be changed. Call it inside the runtime.
    fn new(settings: &NatSettings, runtime_dir: &Path) -> Result<Self> {
        let netlink = Netlink::new().map_err(system)?;
        let mut host = Host::open(runtime_dir)?;
        warn_of_unread(&host);
        let Found { uplink, towards } = Found::new(&netlink, settings)?;
        let moves = &settings.moves;
        let status = status_socket::listen(host.dir())?;
        let viewers = viewers::Sockets::open(host.dir(), settings.metrics, false)?;
        let signals = Signals::new()?;
        let (queues, _) = TunQueue::create(&settings.tun, 1, TunOptions::default())?;
        let queue = queues.into_iter().next();
        let queue = queue.ok_or_else(|| system("the TUN interface has no queue"))?;
        let tun = raise_tun(&netlink, &settings.tun, uplink.mtu)?;
        let plan = masquerade::plan(&netlink, moves, &uplink, &towards, &tun, &PORTS);
        let mut plan = plan.map_err(system)?;
        let [first, captures] = [&mut plan.first, &mut plan.captures].map(std::mem::take);
        let mut noted = Ok(());
        let note_older = |netlink: &Netlink| noted = plan.note_older(netlink, moves);
        warn_of_left(&host.reconcile_around(first, note_older, captures)?);
        noted.map_err(system)?;
        let tools = Tools {
            signals,
            status,
            viewers,
            queue,
            uplink,
            towards,
            port_seed: port_seed(),
        };
        Ok(Self { host, tools })
    }
}

/// The facts about this host that the checks found out.
struct Found {
    uplink: Link,
    towards: Vec<Towards>,
}

impl Found {
    /// Checks the settings against the host.
    fn new(netlink: &Netlink, settings: &NatSettings) -> Result<Self> {
        if netlink
            .link_by_name(&settings.tun)
            .map_err(system)?
            .is_some()
        {
            return Err(TunError::Exists(settings.tun.clone()).into());
        }
        let servers: Vec<IpAddr> = settings.to.iter().map(|to| to.ip).collect();
        let moves = &settings.moves;
        warn_of_absent(netlink, moves)?;
        let named = settings.uplink.as_deref();
        let uplink = find_uplink(netlink, named, moves, &servers, &settings.tun)?;
        let towards = servers
            .iter()
            .map(|&to| find_server(netlink, settings, to))
            .collect::<Result<Vec<_>, _>>()?;
        // A killed predecessor's reservation keeps everybody else out of these ports; its own flows
        // have no sockets.
        if let Some(conflict) = masquerade::conflict(&PORTS, &towards) {
            return Err(input(ports_in_use(&conflict)));
        }
        Ok(Self { uplink, towards })
    }
}

/// What a start would refuse.
pub(super) struct Unfit {
    /// The new server it is about; `None` if it is about the borrowed ports.
    pub(super) to: Option<IpAddr>,
    /// Why.
    pub(super) why: String,
}

/// Which new servers can be spoken to, and what a start would refuse of them and of the ports that
/// are to stand for clients; not of those, if a daemon `runs` here.
pub(super) fn judge_servers(
    netlink: &Netlink,
    settings: &NatSettings,
    runs: bool,
) -> (Vec<Towards>, Vec<Unfit>) {
    let (mut fit, mut unfit) = (Vec::new(), Vec::new());
    for to in settings.to.iter().map(|to| to.ip) {
        match find_server(netlink, settings, to) {
            Ok(towards) => fit.push(towards),
            Err(error) => unfit.push(Unfit {
                to: Some(to),
                why: error.to_string(),
            }),
        }
    }
    let used = masquerade::conflict(&PORTS, &fit).filter(|_| !runs);
    unfit.extend(used.map(|used| Unfit {
        to: None,
        why: ports_in_use(&used),
    }));
    (fit, unfit)
}

/// That a port that is to stand for clients is somebody's.
fn ports_in_use(used: &impl std::fmt::Display) -> String {
    format!(
        "{used} is in use on this server, and ports {}-{} have to stand for clients: close it, or \
         let it use another",
        PORTS.start(),
        PORTS.end()
    )
}

/// Tells what [`run`] would change.
///
/// # Errors
/// As a start would fail.
pub fn dry_run(settings: &NatSettings, runtime_dir: &Path) -> Result<DryRun, DaemonError> {
    let netlink = Netlink::new().map_err(system)?;
    let mut host = Host::rehearse(runtime_dir)?;
    warn_of_unread(&host);
    let Found { uplink, towards } = Found::new(&netlink, settings)?;
    let tun = Link::planned_tun(&settings.tun, uplink.mtu);
    let plan = masquerade::plan(&netlink, &settings.moves, &uplink, &towards, &tun, &PORTS);
    let plan = plan.map_err(system)?;
    host.reconcile_around(plan.first, |_| {}, plan.captures)?;
    DryRun::new(&host, &tun, 1, tun.mtu).end(&mut host, &tun)
}

/// The route to the new server, and the address from which this server speaks to it.
fn find_server(netlink: &Netlink, settings: &NatSettings, to: IpAddr) -> Result<Towards> {
    let held = netlink.addresses().map_err(system)?;
    if held.iter().any(|held| held.addr == to) {
        return Err(input(format!(
            "--to {to} is an address of this server itself; give that of the other one"
        )));
    }
    let route = netlink.route_get(to, None, None);
    let link = match route.as_ref().ok().and_then(|route| route.oif) {
        Some(index) => netlink.link_by_index(index).map_err(system)?,
        None => None,
    };
    let Some(link) = link.filter(|link| !link.loopback) else {
        return Err(input(format!(
            "--to {to}: no route leads there; `ip route get {to}` says why"
        )));
    };
    // Clients speak to an address that has moved as a whole. Among IPv6 addresses the kernel may
    // prefer it all the same, and another one will do. Among IPv4 addresses it prefers the primary
    // one, so moving that was a mistake.
    let is_moved = |addr: IpAddr| {
        let mut moves = settings.moves.iter();
        moves.any(|moved| moved.prefix.first() == addr && moved.is_whole())
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
        return Err(input(format!(
            "--to {to}: every address this server can speak to it from has moved, \
             your login included; move only the service's ports, as in --move {}:80,443/tcp",
            settings.moves[0].prefix.first()
        )));
    };
    Ok(Towards { to, own, link })
}

/// Translates packets until a signal.
async fn carry(
    settings: NatSettings,
    tools: Tools,
    host: &mut Host,
    threads: &mut Threads,
    mut warnings: Warnings,
) -> Result<End> {
    let started = Instant::now();
    let Tools {
        mut signals,
        status,
        viewers,
        queue,
        uplink,
        towards,
        port_seed,
    } = tools;
    let mut status = StatusListener::new(status).map_err(failed)?;
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
        port_seed,
        epoch: started,
    });
    let nat = Arc::new(Mutex::new(nat));
    let mut viewers = viewers.serve(Arc::clone(&nat) as Arc<dyn Flows>)?;
    let counters = Arc::new(NatCounters::default());
    let (tell, mut ended) = mpsc::channel(1);
    let counts = Arc::clone(&counters);
    threads.start("nat".into(), move |stop| {
        if let Err(error) = NatLane::new(queue, nat, counts, stop, started).run() {
            // Nobody receives it only if the daemon is ending already.
            let _ = tell.blocking_send(error);
        }
    })?;
    for end in &towards {
        info!(
            uplink = uplink.name,
            server = %end.to,
            from = %end.own,
            "translating both addresses: the new server sees this one's, and nothing is encrypted"
        );
    }
    let servers: Vec<String> = towards.iter().map(|end| end.to.to_string()).collect();
    notify_ready(&format!("translating to {}", servers.join(" and ")));
    let mut by_clock = tokio::time::interval(LOOK_EVERY);
    let mut listener = Listener::new([host.netlink()]);
    let (mut repairer, mut watchdog) = (Repairer::default(), service::watchdog(started));
    let status_now = |warnings: &Warnings| {
        let daemon = report::Daemon {
            tun: settings.tun.clone(),
            port: 0,
            up: started.elapsed(),
            warnings: warnings.lines(),
            log_lines_lost: log::lost(),
            stayed: 0,
            own_full: 0,
            unrecorded: 0,
            unwritten: 0,
        };
        report::translated(daemon, &settings, &towards, uplink.mtu, &counters)
    };
    let result = loop {
        tokio::select! {
            wish = signals.recv() => match wish {
                Wish::End => break Ok(End::Stopped),
                Wish::Reload => info!("`ipmoved nat` has no configuration file to read again"),
            },
            crash = threads.crashed() => break Err(crash),
            Some(error) = ended.recv() => break Err(failed(error)),
            client = status.accept() => {
                status_socket::send_status(client, || status_now(&warnings));
            }
            ask = viewers.asked() => {
                // Who does not wait any longer is not told.
                let _ = ask.send(status_now(&warnings));
            }
            () = until(watchdog.as_ref().map(Watchdog::next)) => {
                service::watch(&mut watchdog, std::iter::once(counters.turns.counted()));
            }
            () = listener.news() => {
                let begun = Instant::now();
                repairer.repair(begun, host, &mut warnings);
                listener.looked(begun, Instant::now());
            }
            _ = by_clock.tick() => {
                repairer.repair(Instant::now(), host, &mut warnings);
            }
        }
    };
    notify_stopping();
    result
}

/// Waits until then; for ever, if there is no such time.
async fn until(then: Option<Instant>) {
    match then {
        Some(then) => tokio::time::sleep_until(then.into()).await,
        None => std::future::pending().await,
    }
}

/// Makes the ports the same after a restart, and impossible to guess from outside: 122 random bits
/// that the kernel drew when it booted.
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
