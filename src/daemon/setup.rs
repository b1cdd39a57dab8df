//! From settings to a host that is ready: first every check, then every change.
//!
//! Nothing is changed before all that can be known to be wrong has been refused.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use tracing::{debug, warn};

use super::checks::{self, Words};
use super::chosen::{Cgroups, chosen};
use super::early::{self, Awaited, Terms};
use super::follow::{Follower, LinkSettings, Programs};
use super::handover::older;
use super::handover::taking::{self, Inheritance, Places};
use super::held::{self, Held};
use super::kept::{self, Kept};
use super::orders::{Orders, still_leaving};
use super::service::{DaemonError, Result, Signals, cannot, input, system, warn_of_unread};
use super::viewers;
use crate::channel::wire::{LANE_AT, TYPE_DATA};
use crate::io::tun::{TunError, TunFeatures, TunOptions, TunQueue};
use crate::io::udp::{LaneField, UdpOptions, UdpSocket};
use crate::kernel::capture::Capture;
use crate::kernel::netlink::{
    Address, Family, Link, Netlink, NetlinkError, RouteKind, TABLE_LOCAL,
};
use crate::kernel::plan::{self, PUBLIC};
use crate::kernel::programs::Chosen;
use crate::kernel::steer::Steering;
use crate::kernel::tun;
use crate::kernel::{Host, HostError, RuntimeDirError, lock_path};
use crate::model::moved::{Move, Transport};
use crate::model::peer::Role;
use crate::settings::args::Without;
use crate::settings::config::{Config, PeerConfig};
use crate::settings::files::Files;
use crate::settings::values::{DeliverTo, Listen, PeerAddr};

/// The MTU of uplinks that are not there yet: that of most (RFC 894).
const ETHERNET_MTU: u32 = 1_500;

/// How long a service manager may take to close the queues of a TUN that it was told to forget.
const CLOSED: Duration = Duration::from_secs(2);

/// A host that is ready to carry packets.
pub(super) struct Ready {
    /// Makes the kernel changes, and holds those that were made.
    pub(super) host: Host,
    /// The daemon's tools.
    pub(super) tools: Tools,
}

/// The daemon's tools.
pub(super) struct Tools {
    /// The signals that end the daemon. They are caught from before the first change on.
    pub(super) signals: Signals,
    /// For requests to the kernel.
    pub(super) netlink: Netlink,
    /// Where others connect.
    pub(super) places: Places,
    /// What another daemon leaves to this one.
    pub(super) inheritance: Option<Inheritance>,
    /// Where others connect who look at the daemon.
    pub(super) viewers: viewers::Sockets,
    /// The modes of what has moved (old server).
    pub(super) orders: Option<Orders>,
    /// One queue for each lane.
    pub(super) queues: Vec<TunQueue>,
    /// The features of the TUN.
    pub(super) features: TunFeatures,
    /// The TUN.
    pub(super) tun: Link,
    /// One socket for each lane.
    pub(super) sockets: Vec<UdpSocket>,
    /// The programs on the links, and the uplinks.
    pub(super) follower: Follower,
    /// The control groups whose connections are chosen by port.
    pub(super) cgroups: Cgroups,
    /// Where each peer is, if its address is known or its name resolved.
    pub(super) endpoints: Vec<Option<SocketAddr>>,
    /// How many threads can run at once, by affinity and control group.
    pub(super) processors: usize,
    /// A predecessor was killed: what it changed was still there.
    pub(super) resumes: bool,
    /// What this server does not have yet.
    pub(super) awaited: Option<Awaited>,
    /// What is in the way, if that was looked for already: packets wait after that.
    pub(super) checked: Option<Vec<String>>,
}

impl Ready {
    /// Checks everything, then changes what has to be changed. Call it inside the runtime.
    ///
    /// # Errors
    /// See [`DaemonError`]; what was changed before is undone.
    pub(super) fn new(config: &mut Config, runtime_dir: &Path, takeover: bool) -> Result<Self> {
        let kept = Kept::taken_over();
        let was_left = kept.is_left();
        let netlink = Netlink::new().map_err(system)?;
        let taking::Found {
            inheritance,
            mut places,
            memory: kept,
        } = taking::Found::new(config, runtime_dir, kept, takeover)?;
        let mut host = match places.as_mut().and_then(|places| places.lock.take()) {
            Some(lock) => Host::inherit(runtime_dir, lock)?,
            None => open(runtime_dir, takeover)?,
        };
        if config.role == Role::Old {
            config.leaving = still_leaving(config);
        }
        let config = &*config;
        warn_of_unread(&host);
        let resumes = !host.made().is_empty();
        // After an orderly end everything begins anew: what was remembered may have changed since.
        let kept = if resumes { kept } else { Vec::new() };
        let addresses = netlink.addresses().map_err(system)?;
        let may_come = early::may_come(&addresses);
        let is_up = early::is_up(&addresses);
        let endpoints = find_peers(config, is_up);
        // Without changes in the kernel it would begin anew, which the last one's TUN forbids.
        let mut inheritance = inheritance.filter(|_| resumes || places.is_some());
        if was_left && inheritance.is_none() {
            wait_until_gone(&netlink, &config.tun).map_err(system)?;
        }
        let found = Found::new(
            &netlink,
            config,
            &endpoints,
            &addresses,
            (may_come, inheritance.is_some()),
        )?;
        let sockets = match &mut inheritance {
            Some(inheritance) => {
                let options = udp_options(config, may_come);
                inheritance.take_sockets(options).map_err(system)?
            }
            None => bind(config, may_come)?,
        };
        let mut places = match places {
            Some(places) => places,
            None => Places::open(host.dir())?,
        };
        let viewers = match places.viewers.take() {
            Some(viewers) => viewers.with(config.metrics, may_come)?,
            None => viewers::Sockets::open(host.dir(), config.metrics, may_come)?,
        };
        let orders = match config.role {
            Role::Old => Some(Orders::open(config, places.state_dir.take())?),
            Role::New => None,
        };
        let signals = Signals::new()?;
        let options = TunOptions {
            coalesced: !config.without.contains(&Without::JoinedWrites),
            long: !config.without.contains(&Without::LongWrites),
        };
        let (queues, features) = match &mut inheritance {
            Some(inheritance) => inheritance.take_queues(options),
            None => TunQueue::create(&config.tun, sockets.len(), options)?,
        };
        let tun = match &inheritance {
            Some(_) => there(&netlink, &config.tun)?,
            None => raise_tun(&netlink, &config.tun, found.uplinks.mtu())?,
        };
        let port = sockets[0].port().map_err(system)?;
        let ports = (&*sockets, port);
        let takes_over = |it: &Inheritance| it.is_of_running() && !may_come;
        let checked = inheritance.as_ref().is_some_and(takes_over).then(|| {
            let words = Words::of_this_process();
            checks::at_start(config, &words, &endpoints, &found.uplinks)
        });
        let earlier = (&*kept, inheritance.as_mut());
        let (follower, cgroups) =
            found.change(&mut host, config, &tun, ports, earlier, orders.as_ref())?;
        let tools = Tools {
            signals,
            netlink,
            places,
            inheritance,
            viewers,
            orders,
            queues,
            features,
            tun,
            sockets,
            follower,
            cgroups,
            endpoints,
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            resumes,
            awaited: may_come.then(|| Awaited::new(Terms::of(config))),
            checked,
        };
        Ok(Self { host, tools })
    }
}

/// Waits until the TUN is gone whose queues a service manager has let go: it closes them when it
/// has nothing else to do. One that stays is somebody else's.
fn wait_until_gone(netlink: &Netlink, tun: &str) -> Result<(), NetlinkError> {
    let over = Instant::now() + CLOSED;
    while netlink.link_by_name(tun)?.is_some() && Instant::now() < over {
        std::thread::sleep(CLOSED / 200);
    }
    Ok(())
}

/// Where each peer is, as far as its address is known or its name is found. No name is looked up
/// before the network `is_up`.
pub(super) fn find_peers(config: &Config, is_up: bool) -> Vec<Option<SocketAddr>> {
    let find = |peer: &PeerConfig| {
        let named = peer.endpoint.as_ref()?;
        if !is_up && named.is_name() {
            // Nobody answers, and capture must not wait for that.
            return None;
        }
        let found = resolve(named, 0);
        found
            .map_err(|error| warn!(error, "a peer is not found by its name; trying again"))
            .ok()
    };
    config.peers.iter().map(find).collect()
}

/// The facts about this host that the checks found out.
pub(super) struct Found {
    /// The interfaces that clients' packets use.
    pub(super) uplinks: Uplinks,
    /// What leaves through the tunnel because of its port.
    pub(super) chosen: Vec<Chosen>,
    cgroups: Cgroups,
}

/// The interfaces that clients' packets use, each once. There may be none before the network is up.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Uplinks(Vec<Link>);

impl Uplinks {
    fn new(first: Link, others: impl IntoIterator<Item = Link>) -> Self {
        let mut uplinks = Self(vec![first]);
        for link in others {
            if !uplinks.contains(link.index) {
                uplinks.0.push(link);
            }
        }
        uplinks
    }

    /// One alone.
    #[cfg(test)]
    pub(super) fn of(link: Link) -> Self {
        Self::new(link, [])
    }

    /// The first: of those that clients use, or the one of `--uplink`.
    pub(super) fn first(&self) -> Option<&Link> {
        self.0.first()
    }

    /// Each of them.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Link> {
        self.0.iter()
    }

    /// Whether the interface with this index is one of them.
    pub(super) fn contains(&self, index: u32) -> bool {
        self.0.iter().any(|link| link.index == index)
    }

    /// The largest packet that all of them take, in bytes.
    pub(super) fn mtu(&self) -> u32 {
        let least = self.0.iter().map(|link| link.mtu).min();
        least.unwrap_or(ETHERNET_MTU)
    }
}

impl Found {
    /// Checks the settings against the host, which has these `addresses`. What it does not have is
    /// an error, unless that `may_come`. An earlier daemon may have left its TUN (`has_tun`).
    pub(super) fn new(
        netlink: &Netlink,
        config: &Config,
        endpoints: &[Option<SocketAddr>],
        addresses: &[Address],
        (may_come, has_tun): (bool, bool),
    ) -> Result<Self> {
        if !has_tun && netlink.link_by_name(&config.tun).map_err(system)?.is_some() {
            return Err(TunError::Exists(config.tun.clone()).into());
        }
        let moves = moves(config);
        let towards: Vec<IpAddr> = endpoints.iter().flatten().map(SocketAddr::ip).collect();
        if !may_come {
            warn_of_absent(netlink, &moves)?;
        }
        let named = config.uplink.as_deref();
        let uplinks = match find_uplinks(netlink, named, &moves, &towards, &config.tun) {
            Err(DaemonError::Input(error)) if may_come && !is_loopback(netlink, named)? => {
                debug!(error, "the network is not up yet");
                Uplinks(Vec::new())
            }
            found => found?,
        };
        match config.role {
            Role::Old => {
                let taken = check_old(netlink, &Terms::of(config), endpoints)?;
                if let Some(reason) = taken.filter(|_| !early::own_may_come(addresses)) {
                    return Err(input(reason));
                }
            }
            Role::New if may_come => {}
            Role::New => check_new(netlink, &Terms::of(config))?,
        }
        let (chosen, cgroups) = chosen(config, &Files::on_disk())?;
        Ok(Self {
            uplinks,
            chosen,
            cgroups,
        })
    }

    /// Makes the changes that the role needs. Returns who follows what they depend on. `kept` are
    /// the descriptors that somebody kept of an earlier daemon, which may run until the programs
    /// are loaded, `sockets` the tunnel's, which have this port.
    fn change(
        mut self,
        host: &mut Host,
        config: &Config,
        tun: &Link,
        (sockets, port): (&[UdpSocket], u16),
        (kept, inheritance): (&[OwnedFd], Option<&mut Inheritance>),
        orders: Option<&Orders>,
    ) -> Result<(Follower, Cgroups)> {
        let moves = moves(config);
        let links = plan::carriers(host.netlink(), tun).map_err(system)?;
        let programs = match config.role {
            Role::Old => {
                let own = plan::own::memory(host.netlink(), &links, kept);
                let own = own.map_err(system)?;
                let begin = moves_that_begin(config);
                let capture = Capture::new(&moves, &begin, tun, port, own).map_err(system)?;
                if let Some(orders) = orders {
                    // If it fails, the control task tells them again, and says so.
                    let _ = capture.set_modes(&orders.modes(), orders.key());
                }
                kept::keep(&capture.memory());
                Programs::Old(Box::new(capture))
            }
            Role::New => {
                let flows = config.max_flows;
                let steering = Steering::new(host.netlink(), &links, port, flows, kept);
                let steering = steering.map_err(system)?.with_outgoing(self.chosen);
                self.cgroups.look(&steering).map_err(system)?;
                for socket in sockets {
                    steering.set_of_tunnel(socket.as_fd()).map_err(system)?;
                }
                kept::keep(&steering.memory());
                Programs::New(Box::new(steering))
            }
        };
        let settings = link_settings(config, moves);
        if let Some(inheritance) = inheritance {
            match &programs {
                Programs::Old(capture) => capture.load_all(),
                Programs::New(steering) => steering.load_all(tun),
            }
            .map_err(system)?;
            inheritance.stop_the_other()?;
        }
        let follower = Follower::start(settings, programs, tun.clone(), self.uplinks, host)?;
        Ok((follower, self.cgroups))
    }
}

/// Takes charge of this network namespace. One that another daemon is in charge of which cannot
/// hand itself over is taken from it with `takeover`.
fn open(runtime_dir: &Path, takeover: bool) -> Result<Host> {
    match Host::open(runtime_dir) {
        Err(HostError::RuntimeDir(RuntimeDirError::Locked { pid })) if takeover => {
            older::end(&lock_path(runtime_dir).map_err(system)?, &pid)?;
            Ok(Host::open(runtime_dir)?)
        }
        opened => Ok(opened?),
    }
}

/// Whether that is the loopback interface.
fn is_loopback(netlink: &Netlink, named: Option<&str>) -> Result<bool> {
    let Some(name) = named else { return Ok(false) };
    let link = netlink.link_by_name(name).map_err(system)?;
    Ok(link.is_some_and(|link| link.loopback))
}

/// What the settings say about links.
pub(super) fn link_settings(config: &Config, moves: Vec<Move>) -> LinkSettings {
    let keeps = |peer: &PeerConfig| peer.deliver_to == DeliverTo::Keep || !peer.outgoing.is_empty();
    let calls_itself =
        |peer: &PeerConfig| peer.deliver_to != DeliverTo::Keep && !peer.outgoing.is_empty();
    LinkSettings {
        named: config.uplink.clone(),
        moves,
        listen: config.listen.ip.filter(|ip| !ip.is_unspecified()),
        keeps: config.peers.iter().any(keeps),
        calls_itself: config.peers.iter().any(calls_itself),
    }
}

/// Everything that has moved, and then what leaves (old server).
pub(super) fn moves(config: &Config) -> Vec<Move> {
    let moves = config.peers.iter().flat_map(|peer| &peer.moves);
    let leaving = config.leaving.iter().map(|(_, moved)| moved);
    moves.chain(leaving).cloned().collect()
}

/// The moves of those peers that may begin connections.
pub(super) fn moves_that_begin(config: &Config) -> Vec<Move> {
    let begin = (config.peers.iter()).filter(|peer| !peer.allow_outgoing.is_empty());
    begin.flat_map(|peer| &peer.moves).cloned().collect()
}

/// Warns of moved addresses that this server does not have.
pub(super) fn warn_of_absent(netlink: &Netlink, moves: &[Move]) -> Result<()> {
    let held = Held::new(netlink.addresses().map_err(system)?);
    let mut local = Vec::new();
    for family in [Family::V4, Family::V6] {
        let routes = netlink.routes(family, TABLE_LOCAL).map_err(system)?;
        // Addresses have such routes, too; those tell nothing new.
        let prefixes = routes.iter().filter_map(held::local_prefix);
        local.extend(prefixes.filter(|prefix| !prefix.is_single()));
    }
    for line in held::absent(moves, &held, &local) {
        warn!(warning = %line, "an administrator should know");
    }
    Ok(())
}

/// Moves of whose addresses the kernel is asked how it would send what comes from there: more of an
/// interface hardly say anything new, and each takes a request.
const ASKED: usize = 16;

/// The interfaces that clients' packets use: the one named with `--uplink`; else those by which the
/// old server sends what comes from its moved addresses, as its routes and rules say; else the one
/// that [`find_uplink`] finds. `tun` is none of them, whatever routes lead there.
pub(super) fn find_uplinks(
    netlink: &Netlink,
    named: Option<&str>,
    moves: &[Move],
    towards: &[IpAddr],
    tun: &str,
) -> Result<Uplinks> {
    if named.is_none() {
        let addresses = Held::new(netlink.addresses().map_err(system)?);
        let links = netlink.links().map_err(system)?;
        let mut asked: HashMap<(u32, bool), usize> = HashMap::new();
        let leaves_by = |moved: &Move| {
            let held = addresses.within(moved.prefix).next()?;
            let asked = asked.entry((held.index, held.addr.is_ipv4())).or_default();
            *asked += 1;
            if *asked > ASKED {
                return None;
            }
            let mut clients = PUBLIC.into_iter();
            let client = clients.find(|ip| ip.is_ipv4() == held.addr.is_ipv4())?;
            let route = netlink.route_get(client, None, Some(held.addr));
            let index = route.ok()?.oif?;
            let found = links.iter().find(|link| link.index == index);
            found
                .filter(|link| !link.loopback && link.name != tun)
                .cloned()
        };
        let mut found = moves.iter().filter_map(leaves_by);
        if let Some(first) = found.next() {
            return Ok(Uplinks::new(first, found));
        }
    }
    let uplink = find_uplink(netlink, named, moves, towards, tun)?;
    if uplink.loopback {
        return Err(input(format!(
            "{} is the loopback interface; name the one clients' packets use with --uplink",
            uplink.name
        )));
    }
    Ok(Uplinks::new(uplink, []))
}

/// The interface named with `--uplink`; else, on the old server, the one that holds the moved
/// address; else the one that leads to the peer; else that of the default route.
pub(super) fn find_uplink(
    netlink: &Netlink,
    named: Option<&str>,
    moves: &[Move],
    towards: &[IpAddr],
    tun: &str,
) -> Result<Link> {
    if let Some(name) = named {
        return netlink.link_by_name(name).map_err(system)?.ok_or_else(|| {
            input(format!(
                "interface {name} does not exist (--uplink); `ip link` lists those that do"
            ))
        });
    }
    let by_index = |index: u32| netlink.link_by_index(index).map_err(system);
    let mut holding: Option<(Link, IpAddr)> = None;
    let addresses = Held::new(netlink.addresses().map_err(system)?);
    let links = netlink.links().map_err(system)?;
    for moved in moves {
        let Some(held) = addresses.within(moved.prefix).next() else {
            continue;
        };
        let link = links.iter().find(|link| link.index == held.index);
        let Some(link) = link.filter(|link| !link.loopback) else {
            continue;
        };
        match &holding {
            Some((first, other)) if first.index != link.index => {
                return Err(input(format!(
                    "{other} is on {} and {} on {}: one ipmoved serves one interface; \
                     name it with --uplink",
                    first.name, held.addr, link.name
                )));
            }
            Some(_) => {}
            None => holding = Some((link.clone(), held.addr)),
        }
    }
    if let Some((link, _)) = holding {
        return Ok(link);
    }
    let probes = towards.iter().filter(|ip| !ip.is_loopback());
    for ip in probes.copied().chain(PUBLIC) {
        let Ok(route) = netlink.route_get(ip, None, None) else {
            continue;
        };
        if let Some(link) = route.oif.map(by_index).transpose()?.flatten()
            && !link.loopback
            && link.name != tun
        {
            return Ok(link);
        }
    }
    Err(input(
        "no route leads out of this server: name the interface clients' packets use with --uplink",
    ))
}

/// The old server must not move the address from which it speaks to its peer, nor move an address
/// to itself.
///
/// Returns why it must not go on if it has no other address to speak from: one that comes may mend
/// that.
///
/// # Errors
/// If it must not go on whatever comes.
pub(super) fn check_old(
    netlink: &Netlink,
    config: &Terms,
    endpoints: &[Option<SocketAddr>],
) -> Result<Option<String>> {
    let addresses = Held::new(netlink.addresses().map_err(system)?);
    let mut taken = None;
    for (peer, endpoint) in config.peers.iter().zip(endpoints) {
        let remote = endpoint.map(|endpoint| endpoint.ip());
        if let Some(remote) = remote
            && addresses.has(remote)
        {
            return Err(input(format!(
                "--peer {remote} is an address of this server itself; give that of the other one"
            )));
        }
        // The peer's address may not be known yet. Then it is taken for a host on the internet.
        let towards = remote.map_or(PUBLIC.to_vec(), |remote| vec![remote]);
        let speaks_from = |to: IpAddr| netlink.route_get(to, None, None).ok()?.prefsrc;
        let named = config.listen.filter(|ip| !ip.is_unspecified());
        let ours: Vec<IpAddr> = match named {
            Some(ip) => vec![ip],
            None => towards.into_iter().filter_map(speaks_from).collect(),
        };
        for moved in peer.moves.iter().filter(|moved| takes_logins(moved)) {
            if let Some(remote) = remote.filter(|&ip| moved.prefix.contains(ip)) {
                return Err(input(if moved.prefix.is_single() {
                    format!(
                        "--move {moved} is the peer's own address; \
                         give the address that clients still use"
                    )
                } else {
                    format!(
                        "--move {moved} holds {remote}, the peer's own address; {}",
                        move_beside(moved, remote)
                    )
                }));
            }
            if let Some(own) = ours.iter().find(|&&ip| moved.prefix.contains(ip)) {
                let reason = would_take(moved, *own);
                if named.is_some() {
                    return Err(input(reason));
                }
                taken.get_or_insert(reason);
            }
        }
        if taken.is_some() {
            continue;
        }
        for own in PUBLIC.into_iter().filter_map(speaks_from) {
            let mut moves = peer.moves.iter().filter(|moved| takes_logins(moved));
            let moved = moves.find(|it| it.prefix.contains(own) && !it.prefix.is_single());
            if let Some(moved) = moved {
                warn!(
                    "--move {moved} holds {own}, from which this server itself speaks to the \
                     internet: logins there go to the new server from now on, your own included; \
                     if they are to stay here, {}",
                    move_beside(moved, own)
                );
            }
        }
    }
    Ok(taken)
}

/// Why a move is refused that has the address from which this server speaks to its peer.
fn would_take(moved: &Move, own: IpAddr) -> String {
    let ports = Move {
        ports: vec![80..=80, 443..=443],
        transport: Some(Transport::Tcp),
        ..moved.clone()
    };
    let other = "or let this server use another of its addresses (--listen ADDR:PORT)";
    if moved.prefix.is_single() {
        return format!(
            "--move {moved} would take every new connection to the address this server itself uses \
             to reach the peer, your login included; move only the service's ports, as in \
             --move {ports}, {other}; what it does itself, as DNS or updates, stays with it either \
             way"
        );
    }
    format!(
        "--move {moved} holds {own}, the address this server itself uses to reach the peer, your \
         login included; {}, {other}",
        move_beside(moved, own)
    )
}

/// How to move a prefix but for one of its addresses.
fn move_beside(moved: &Move, addr: IpAddr) -> String {
    let parts = held::beside(moved.prefix, addr).into_iter().map(|prefix| {
        let part = Move {
            prefix,
            ..moved.clone()
        };
        format!(" --move {part}")
    });
    format!("move what lies beside it:{}", parts.collect::<String>())
}

/// Whether a move takes all of an address's TCP, and thereby every login.
fn takes_logins(moved: &Move) -> bool {
    moved.ports.is_empty() && moved.transport != Some(Transport::Udp)
}

/// Most addresses of a prefix that are looked at, and its last one.
const MAX_LOOKED_AT: usize = 256;

/// Whether an address is this host's own by a route, as those of a whole prefix are.
fn is_local(netlink: &Netlink, addr: IpAddr) -> bool {
    let route = netlink.route_get(addr, None, None);
    route.is_ok_and(|route| route.kind == RouteKind::Local)
}

/// The new server delivers to its own addresses only.
pub(super) fn check_new(netlink: &Netlink, config: &Terms) -> Result<()> {
    let addresses = netlink.addresses().map_err(system)?;
    for peer in &config.peers {
        let keeps = peer.deliver_to == DeliverTo::Keep;
        for map in &peer.deliver {
            // The new server takes a moved address that is kept as soon as the peer has named it.
            let will_be = keeps && map.to == map.moved;
            let looked_at = map
                .to
                .addresses()
                .take(MAX_LOOKED_AT)
                .chain([map.to.last()]);
            let strange = |addr: &IpAddr| {
                !addresses.iter().any(|held| held.addr == *addr) && !is_local(netlink, *addr)
            };
            let mut looked_at = looked_at.filter(|_| !will_be);
            let Some(addr) = looked_at.find(strange) else {
                continue;
            };
            let remedy = match map.to.is_single() {
                true => "`ip addr` lists those that are".into(),
                false => format!(
                    "all of a prefix are by `ip route add local {} dev lo`",
                    map.to
                ),
            };
            return Err(input(format!(
                "--deliver {map}: {addr} is not an address of this server; {remedy}"
            )));
        }
        let DeliverTo::Addresses { v4, v6 } = peer.deliver_to else {
            continue;
        };
        let wanted = v4.map(IpAddr::V4).into_iter().chain(v6.map(IpAddr::V6));
        for addr in wanted {
            if !addresses.iter().any(|held| held.addr == addr) {
                return Err(input(format!(
                    "--deliver-to {addr} is not an address of this server; \
                     `ip addr` lists those that are"
                )));
            }
        }
    }
    Ok(())
}

/// Looks a peer's name up. If it has several addresses, each `turn` gives another one.
pub(super) fn resolve(peer: &PeerAddr, turn: usize) -> Result<SocketAddr, String> {
    let found = (peer.host.as_str(), peer.port)
        .to_socket_addrs()
        .map_err(|error| format!("cannot look up {}: {error}", peer.host))?
        .collect::<Vec<_>>();
    let addr = turn
        .checked_rem(found.len())
        .and_then(|turn| found.get(turn));
    addr.copied()
        .ok_or_else(|| format!("{} has no address", peer.host))
}

/// How the UDP sockets are opened.
fn udp_options(config: &Config, may_come: bool) -> UdpOptions {
    UdpOptions {
        gso: !config.without.contains(&Without::UdpGso),
        gro: !config.without.contains(&Without::UdpGro),
        absent: may_come && config.listen.ip.is_some(),
    }
}

/// Opens the UDP sockets, one for each lane: for both families if the host has IPv6. The address
/// of `--listen` has to be there, unless it `may_come`.
pub(super) fn bind(config: &Config, may_come: bool) -> Result<Vec<UdpSocket>> {
    let options = udp_options(config, may_come);
    let Listen { ip, port } = config.listen;
    let lanes = usize::from(config.lanes);
    let field = LaneField {
        message_type: TYPE_DATA,
        at: LANE_AT,
    };
    let any = |ip: IpAddr| UdpSocket::bind_lanes(SocketAddr::new(ip, port), lanes, field, options);
    let bound = match ip {
        Some(ip) => any(ip),
        None => any(Ipv6Addr::UNSPECIFIED.into()).or_else(|error| match error.raw_os_error() {
            // A host without IPv6.
            Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL) => any(Ipv4Addr::UNSPECIFIED.into()),
            _ => Err(error),
        }),
    };
    bound.map_err(|error| match error.raw_os_error() {
        Some(libc::EADDRINUSE) => input(format!(
            "UDP port {port} is in use by another program (`ss -lunp 'sport = :{port}'` names it); \
             choose another with --listen (and name it in the other server's --peer)"
        )),
        Some(libc::EADDRNOTAVAIL) => input(format!(
            "--listen {} is not an address of this server; `ip -br addr` lists those",
            ip.map_or_else(String::new, |ip| ip.to_string())
        )),
        _ => cannot(format!("open UDP port {port}"), error),
    })
}

/// The interface of this name.
fn there(netlink: &Netlink, name: &str) -> Result<Link> {
    let link = netlink.link_by_name(name).map_err(system)?;
    link.ok_or_else(|| system(format!("the interface {name} vanished")))
}

/// Brings the TUN up.
pub(super) fn raise_tun(netlink: &Netlink, name: &str, mtu: u32) -> Result<Link> {
    let tun = there(netlink, name)?;
    for setting in tun::settings(mtu) {
        setting.make(netlink, &tun).map_err(system)?;
    }
    Ok(Link {
        mtu,
        up: true,
        ..tun
    })
}
