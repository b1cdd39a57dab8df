//! The control task: everything that is not a packet.
//!
//! One thread that waits for whatever comes first: what lanes pass on, a timer of a tunnel, a
//! question on the status socket, a name to look up, a signal. What the tunnels decide becomes a
//! new view for the lanes. Nothing here is ever waited for by a lane.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tracing::{debug, info, warn};

use super::service::{
    REPAIR_EVERY, Repairer, Result, Signals, Threads, failed, notify_ready, notify_status,
    notify_stopping, undo,
};
use super::setup::{Ready, Tools, resolve};
use super::status_socket;
use super::warnings::Warnings;
use crate::channel::pmtu;
use crate::channel::session::{Door, Entropy, Offer, SessionIndexes};
use crate::channel::tunnel::{Announcement, Deliver, Event, State, Timers, Tunnel, TunnelConfig};
use crate::channel::wire::DATA_OVERHEAD;
use crate::flow::translate::{Delivery, Gate, Translator, TranslatorConfig};
use crate::io::udp::UdpSocket;
use crate::kernel::netlink::{Link, Netlink};
use crate::kernel::{Host, keep};
use crate::lane::shared::{Hop, LaneCounters, PeerView, Shared, Translation, View, Waiting};
use crate::lane::{Crowd, Lane, LaneParts, ToControl};
use crate::model::drops::Drops;
use crate::model::moved::Move;
use crate::model::peer::{Path, PeerId, Role};
use crate::model::status::{self, Flows, Offloads, Status, Traffic, TunnelStatus, Way};
use crate::packet::offload::Reach;
use crate::settings::args::Offload;
use crate::settings::config::{Config, PeerConfig};
use crate::settings::values::DeliverTo;

/// How often a name is looked up again while the peer does not answer.
const RESOLVE_EVERY: Duration = Duration::from_secs(10);

/// How often the path to a peer is looked at: its MTU may have changed. What a router says arrives at
/// the kernel's route, which tells nobody; a transfer that is too big stalls until it is asked.
const PATH_EVERY: Duration = Duration::from_secs(1);

/// How often this server's addresses are listed, for the case that some were added.
const ADDRESSES_EVERY: Duration = Duration::from_secs(5);

/// Smallest MTU an interface that carries IPv6 may have (RFC 8200 section 5).
const MIN_MTU: u32 = 1_280;

/// IP and UDP headers in front of a datagram.
fn outer_headers(to: SocketAddr) -> usize {
    if to.is_ipv4() { 20 + 8 } else { 40 + 8 }
}

/// Carries packets until a signal, then undoes everything, whatever went wrong.
pub(super) async fn run(config: Config, ready: Ready) -> Result<()> {
    let Ready { mut host, tools } = ready;
    let mut lanes = Threads::default();
    let result = carry(config, tools, &mut host, &mut lanes).await;
    let undone = undo(&mut host);
    lanes.stop();
    result.and(undone)
}

/// Carries packets until a signal, then says goodbye.
#[allow(clippy::disallowed_methods)] // the edge: here the clock is read
async fn carry(config: Config, tools: Tools, host: &mut Host, lanes: &mut Threads) -> Result<()> {
    let started = Instant::now();
    // Each peer has places of its own; one more for a lane's last word.
    let (to_control, mut from_lanes) = mpsc::channel(Waiting::limit(config.peers.len()) + 1);
    let Tools {
        mut signals,
        netlink,
        status,
        queues,
        features,
        tun,
        sockets,
        uplink,
        endpoints,
    } = tools;
    let status = UnixListener::from_std(status).map_err(failed)?;
    let lanes_wanted = sockets.len() as u8;
    let shared = Arc::new(Shared {
        view: ArcSwap::from_pointee(View::default()),
        translation: translation(&config, started)?,
        door: Door::new(peer_ids(&config).zip(config.peers.iter().map(|peer| peer.keys.clone()))),
        drops: Drops::default(),
        peer_drops: config.peers.iter().map(|_| Drops::default()).collect(),
        waiting: config.peers.iter().map(|_| Waiting::default()).collect(),
        crowd: Crowd::new(std::thread::available_parallelism().map_or(1, usize::from)),
    });
    let udp = sockets[0].try_clone().map_err(failed)?;
    let tso = !config.without.contains(&Offload::TunGso);
    // What the old server writes goes on to a link.
    let big_tcp = tso
        && config.role == Role::New
        && tun.big_tcp
        && !config.without.contains(&Offload::BigTcp);
    let mut control = Control {
        peers: peers(&config, &endpoints, lanes_wanted, &uplink, started)?,
        view: View {
            sessions: Default::default(),
            peers: vec![PeerView::default(); config.peers.len()],
            hop: Hop::default(),
        },
        view_changed: true,
        config,
        host,
        shared: Arc::clone(&shared),
        netlink,
        udp,
        tun,
        uplink,
        counters: Vec::new(),
        started,
        next_path: started,
        next_repair: started + REPAIR_EVERY,
        repairer: Repairer::default(),
        next_addresses: started,
        offloads: Offloads {
            udp_gso: sockets[0].gso(),
            udp_gro: sockets[0].gro(),
            tun_tso: tso,
            tun_uso: tso && features.uso,
            tun_big_tcp: big_tcp,
            ..Offloads::default()
        },
        warnings: Warnings::default(),
    };
    control.set_own_addresses();
    control.turn(started);
    for (number, (tun, udp)) in queues.into_iter().zip(sockets).enumerate() {
        let counters = Arc::new(LaneCounters::new(control.config.peers.len()));
        control.counters.push(Arc::clone(&counters));
        let reach = if big_tcp { Reach::Here } else { Reach::Further };
        let no_split = control.config.no_split;
        let (shared, control) = (Arc::clone(&shared), to_control.clone());
        lanes.start(format!("lane-{number}"), move |stop| {
            Lane::run(LaneParts {
                number: number as u8,
                tun,
                uso: tso && features.uso,
                tso,
                reach,
                no_split,
                udp,
                shared,
                counters,
                control,
                stop,
            });
        })?;
    }
    control.announce_start();
    notify_ready(&control.summary());
    let result = control.serve(&mut signals, &mut from_lanes, &status).await;
    notify_stopping();
    control.close();
    result
}

fn peer_ids(config: &Config) -> impl Iterator<Item = PeerId> {
    (0..config.peers.len() as u16).map(PeerId)
}

/// What the role makes of packets.
fn translation(config: &Config, epoch: Instant) -> Result<Translation> {
    if config.role == Role::Old {
        let gates = config
            .peers
            .iter()
            .map(|peer| Gate::new(peer.moves.clone()));
        return Ok(Translation::Old(gates.collect()));
    }
    let mut seed = [0; 16];
    Entropy::system().fill(&mut seed).map_err(failed)?;
    let (low, high) = seed.split_at(8);
    let word = |bytes: &[u8]| {
        bytes
            .iter()
            .fold(0, |word, &byte| word << 8 | u64::from(byte))
    };
    Ok(Translation::New(Translator::new(TranslatorConfig {
        // Enough that two lanes seldom want the same one.
        shards: if config.lanes == 1 {
            1
        } else {
            4 * usize::from(config.lanes)
        },
        max_flows: config.max_flows as usize,
        seed: [word(low), word(high)],
        epoch,
    })))
}

fn peers(
    config: &Config,
    endpoints: &[Option<SocketAddr>],
    lanes: u8,
    uplink: &Link,
    now: Instant,
) -> Result<Vec<Peer>> {
    let indexes = SessionIndexes::default();
    let timers = match config.rekey_after {
        Some(rekey_after) => Timers::with_rekey_after(rekey_after),
        None => Timers::default(),
    };
    let mtu = uplink.mtu.min(u32::from(u16::MAX)) as u16;
    peer_ids(config)
        .zip(&config.peers)
        .zip(endpoints)
        .map(|((id, peer), &endpoint)| {
            let announcement = match config.role {
                Role::Old => Announcement::Old {
                    moves: peer.moves.clone(),
                    mtu,
                },
                Role::New => Announcement::New {
                    deliver: Deliver::To { v4: None, v6: None },
                    mtu,
                    error: None,
                },
            };
            let tunnel = Tunnel::new(
                TunnelConfig {
                    peer: id,
                    keys: peer.keys.clone(),
                    role: config.role,
                    lanes,
                    offer: Offer::of_this_machine(config.cipher),
                    endpoint,
                    announcement,
                    max_datagram: Some(pmtu::BASE),
                    timers,
                    indexes: indexes.clone(),
                    entropy: Entropy::system(),
                },
                now,
            )
            .map_err(failed)?;
            Ok(Peer {
                id,
                tunnel,
                moves: peer.moves.clone(),
                refused: Vec::new(),
                client_mtu: None,
                announced: false,
                deliver: None,
                state: State::Connecting,
                next_resolve: now + RESOLVE_EVERY,
                resolving: false,
                resolved: 0,
                unresolved: None,
            })
        })
        .collect()
}

/// One peer, as the control task sees it.
struct Peer {
    id: PeerId,
    tunnel: Tunnel,
    /// What moved: from the settings on the old server, from the peer on the new one.
    moves: Vec<Move>,
    /// What the old server says has moved, but has moved from another one already (new server).
    refused: Vec<Move>,
    /// MTU of the old server's link to the clients (new server).
    client_mtu: Option<u32>,
    /// It has said what it moved here, so that what it does not name is withdrawn.
    announced: bool,
    /// Where the new server delivers, once known.
    deliver: Option<Deliver>,
    state: State,
    next_resolve: Instant,
    resolving: bool,
    /// How often its name was looked up again.
    resolved: usize,
    /// Why it could not be the last time.
    unresolved: Option<String>,
}

/// What looking a name up came to.
type Resolved = Result<SocketAddr, String>;

/// Everything that is not a packet.
struct Control<'h> {
    config: Config,
    host: &'h mut Host,
    shared: Arc<Shared>,
    netlink: Netlink,
    /// The first lane's socket, for what the tunnels send.
    udp: UdpSocket,
    tun: Link,
    uplink: Link,
    peers: Vec<Peer>,
    /// What the lanes see once it is published.
    view: View,
    view_changed: bool,
    counters: Vec<Arc<LaneCounters>>,
    started: Instant,
    next_path: Instant,
    next_repair: Instant,
    repairer: Repairer,
    next_addresses: Instant,
    offloads: Offloads,
    warnings: Warnings,
}

impl Control<'_> {
    /// Waits for whatever comes first, until a signal.
    #[allow(clippy::disallowed_methods)] // the edge: here the clock is read
    async fn serve(
        &mut self,
        signals: &mut Signals,
        from_lanes: &mut mpsc::Receiver<ToControl>,
        status: &UnixListener,
    ) -> Result<()> {
        let (resolved_to, mut resolved) = mpsc::channel(self.peers.len());
        loop {
            let now = Instant::now();
            self.turn(now);
            self.repair(now)?;
            self.resolve_names(now, &resolved_to);
            let wake = tokio::time::sleep_until(self.next_timeout().into());
            tokio::select! {
                () = signals.recv() => return Ok(()),
                message = from_lanes.recv() => match message {
                    Some(message) => self.handle(Instant::now(), message)?,
                    None => return Err(failed("all lanes have ended")),
                },
                Some((peer, addr)) = resolved.recv() => self.resolved(Instant::now(), peer, addr),
                connection = status.accept() => {
                    status_socket::answer(connection, || self.status(Instant::now()));
                }
                () = wake => {}
            }
        }
    }

    fn next_timeout(&self) -> Instant {
        self.peers
            .iter()
            .filter_map(|peer| peer.tunnel.next_timeout())
            .chain([self.next_path, self.next_repair])
            .min()
            .unwrap_or(self.next_path)
    }

    /// What a lane passes on.
    fn handle(&mut self, now: Instant, message: ToControl) -> Result<()> {
        if let Some((peer, queue)) = message.origin() {
            self.shared.waiting[usize::from(peer.0)].leave(queue);
        }
        let (peer, result) = match message {
            ToControl::Handshake { path, admitted } => {
                let peer = admitted.peer();
                let tunnel = &mut self.peers[usize::from(peer.0)].tunnel;
                (peer, tunnel.handle_handshake(now, path, &admitted))
            }
            ToControl::Control {
                session,
                heard_from,
                message,
            } => {
                let tunnel = &mut self.peers[usize::from(session.peer().0)].tunnel;
                if let Some(path) = heard_from {
                    tunnel.session_heard(now, &session, path);
                }
                let result = tunnel.handle_control(now, &session, &message);
                (session.peer(), result)
            }
            ToControl::Heard { session, path } => {
                let tunnel = &mut self.peers[usize::from(session.peer().0)].tunnel;
                tunnel.session_heard(now, &session, path);
                return Ok(());
            }
            ToControl::Failed(what) => return Err(failed(what)),
        };
        if let Err(reason) = result {
            self.shared.peer_drops[usize::from(peer.0)].count(reason);
        }
        Ok(())
    }

    /// Lets every tunnel do what is due, and carries out what comes of it.
    #[allow(clippy::disallowed_methods)] // the edge: here the clock is read
    fn turn(&mut self, now: Instant) {
        let wall = SystemTime::now();
        for index in 0..self.peers.len() {
            self.peers[index].tunnel.handle_timeout(now, wall);
            while let Some(event) = self.peers[index].tunnel.poll_event() {
                self.event(now, index, event);
            }
        }
        if now >= self.next_addresses {
            self.next_addresses = now + ADDRESSES_EVERY;
            self.set_own_addresses();
        }
        if now >= self.next_path {
            self.next_path = now + PATH_EVERY;
            self.measure_link(now);
            for index in 0..self.peers.len() {
                self.measure_path(now, index);
            }
        }
        // A session has to be in the lanes' hands before the peer learns of it.
        if std::mem::take(&mut self.view_changed) {
            self.shared.view.store(Arc::new(self.view.clone()));
        }
        for peer in &mut self.peers {
            while let Some(transmit) = peer.tunnel.poll_transmit() {
                let datagram = &transmit.datagram;
                let sent = self.udp.send(&transmit.to, 0, datagram, datagram.len());
                match sent {
                    Err(error) if transmit.probe && is_too_big(&error) => {
                        peer.tunnel.probe_refused(now, datagram.len());
                    }
                    Err(error) => debug!(to = %transmit.to.remote, %error, "sending failed"),
                    Ok(()) => {}
                }
            }
        }
    }

    fn event(&mut self, now: Instant, index: usize, event: Event) {
        match event {
            Event::SessionInstalled(session) => {
                self.view.sessions.insert(session.index(), session);
                self.view_changed = true;
            }
            Event::SessionRemoved(session) => {
                self.view.sessions.remove(&session);
                self.view_changed = true;
            }
            Event::SendOn(session) => {
                self.view.peers[index].session = Some(session);
                self.view_changed = true;
            }
            Event::SendOff => {
                self.view.peers[index].session = None;
                self.view_changed = true;
            }
            Event::Endpoint(path) => {
                self.view.peers[index].path = Some(path);
                self.view_changed = true;
                self.measure_path(now, index);
                self.choose_delivery(now, index, path);
            }
            Event::State(state) => self.state_changed(now, index, state),
            Event::PeerConfig(announcement) => self.peer_announced(now, index, announcement),
            Event::PathMtu(_) => self.set_mtu(index),
            Event::Rtt(rtt) => debug!(peer = index, ?rtt, "round trip"),
            Event::Warning(warning) => self.warn(now, index, &warning.to_string()),
        }
    }

    fn state_changed(&mut self, now: Instant, index: usize, state: State) {
        let peer = &mut self.peers[index];
        peer.state = state;
        // Its address may have changed: look it up at once.
        peer.next_resolve = now;
        let name = self.name(index);
        match state {
            State::Up => info!(peer = name, "tunnel up"),
            State::Down => warn!(peer = name, "tunnel down: the peer does not answer"),
            State::Connecting => {}
        }
        notify_status(&self.summary());
    }

    /// What the peer says of itself.
    fn peer_announced(&mut self, now: Instant, index: usize, announcement: Announcement) {
        match (announcement, &self.shared.translation) {
            (Announcement::Old { moves, mtu }, Translation::New(_)) => {
                self.peer_moved(now, index, moves, mtu);
            }
            (Announcement::New { deliver, error, .. }, Translation::Old(_)) => {
                self.peers[index].deliver = Some(deliver);
                if let Some(error) = error {
                    self.warn(now, index, &format!("the new server says: {error}"));
                }
            }
            // The handshake does not let two daemons of one role agree.
            (Announcement::Old { .. }, Translation::Old(_))
            | (Announcement::New { .. }, Translation::New(_)) => {}
        }
    }

    /// The old server says what it has moved here.
    fn peer_moved(&mut self, now: Instant, index: usize, moves: Vec<Move>, mtu: u16) {
        self.peers[index].announced = true;
        self.accept_moves(now, index, moves);
        // What it has let go of may be what another one was refused.
        for other in 0..self.peers.len() {
            let peer = &self.peers[other];
            if other != index && !peer.refused.is_empty() {
                let moves = peer.moves.iter().chain(&peer.refused).cloned().collect();
                self.accept_moves(now, other, moves);
            }
        }
        // What the application sends has to fit each old server's link to the clients too.
        self.peers[index].client_mtu = Some(u32::from(mtu));
        let mtus = self.peers.iter().filter_map(|peer| peer.client_mtu);
        let mtu = mtus.min().unwrap_or(MIN_MTU);
        let mtu = mtu.clamp(MIN_MTU, self.uplink.mtu.max(MIN_MTU));
        if mtu != self.tun.mtu {
            match self.netlink.set_link_mtu(self.tun.index, mtu) {
                Ok(()) => self.tun.mtu = mtu,
                Err(error) => warn!("cannot set the MTU of {} to {mtu}: {error}", self.tun.name),
            }
        }
    }

    /// Serves what no other old server has moved here; the first to say so has it.
    fn accept_moves(&mut self, now: Instant, index: usize, moves: Vec<Move>) {
        let others = |moved: &Move| {
            self.peers
                .iter()
                .filter(|peer| usize::from(peer.id.0) != index)
                .flat_map(|peer| &peer.moves)
                .all(|other| !other.overlaps(moved))
        };
        let (accepted, refused): (Vec<Move>, Vec<Move>) = moves.into_iter().partition(others);
        if refused != self.peers[index].refused {
            for moved in &refused {
                self.warn(now, index, &taken(moved));
            }
            self.peers[index].refused = refused;
        }
        if accepted != self.peers[index].moves {
            let names: Vec<String> = accepted.iter().map(ToString::to_string).collect();
            info!(peer = self.name(index), moved = names.join(" "), "serving");
            if let Translation::New(translator) = &self.shared.translation
                && let Err(error) = translator.set_moves(self.peers[index].id, accepted.clone())
            {
                self.warn(now, index, &error.to_string());
            }
            self.peers[index].moves = accepted;
        }
        if let Some(path) = self.view.peers[index].path {
            self.choose_delivery(now, index, path);
        }
        for map in self.config.peers[index].deliver.clone() {
            let moved = self.peers[index].moves.iter();
            let names = |moved: &Move| {
                let port = moved.ports.is_empty()
                    || moved.ports.iter().any(|range| range.contains(&map.port));
                moved.addr == map.moved && port
            };
            if !moved.clone().any(names) {
                let text = format!("--deliver {map}: that port has not moved here");
                self.warn(now, index, &text);
            }
        }
    }

    /// Settles where packets from a peer are delivered, and tells the peer.
    fn choose_delivery(&mut self, now: Instant, index: usize, path: Path) {
        let shared = Arc::clone(&self.shared);
        let Translation::New(translator) = &shared.translation else {
            return;
        };
        let ports = self.config.peers[index].deliver.clone();
        let held = self.hold_kept();
        let (deliver, delivery) = match self.config.peers[index].deliver_to {
            DeliverTo::Keep => (
                Deliver::Keep,
                Delivery {
                    keep: true,
                    ports,
                    ..Delivery::default()
                },
            ),
            DeliverTo::Addresses { v4, v6 } => {
                // The address the peer reaches us on; of the other family, the interface's first.
                let reached = path.local;
                let v4 = v4.or_else(|| match reached {
                    Some(IpAddr::V4(addr)) => Some(addr),
                    _ => self.own_address(|addr| match addr {
                        IpAddr::V4(addr) => Some(addr),
                        IpAddr::V6(_) => None,
                    }),
                });
                let v6 = v6.or_else(|| match reached {
                    Some(IpAddr::V6(addr)) => Some(addr),
                    _ => self.own_address(|addr| match addr {
                        IpAddr::V6(addr) if is_global(addr) => Some(addr),
                        IpAddr::V6(_) | IpAddr::V4(_) => None,
                    }),
                });
                let delivery = Delivery {
                    v4,
                    v6,
                    keep: false,
                    ports,
                };
                (Deliver::To { v4, v6 }, delivery)
            }
        };
        let missing = self.peers[index].moves.iter().find(|moved| match deliver {
            Deliver::Keep => false,
            Deliver::To { v4, v6 } => match moved.addr {
                IpAddr::V4(_) => v4.is_none(),
                IpAddr::V6(_) => v6.is_none(),
            },
        });
        let error = missing.map(|moved| {
            let family = if moved.addr.is_ipv4() { "IPv4" } else { "IPv6" };
            format!("{moved} cannot be delivered: the new server has no {family} address; give it one with --deliver-to")
        });
        let error = error.or(held.err());
        if let Err(error) = translator.set_delivery(self.peers[index].id, delivery) {
            self.warn(now, index, &error.to_string());
        }
        if self.peers[index].deliver != Some(deliver) {
            self.peers[index].deliver = Some(deliver);
            if let Some(error) = &error {
                self.warn(now, index, error);
            }
        }
        // What is refused was told here when it was; there it is told with everything else.
        let error = error.or(self.peers[index].refused.first().map(taken));
        let mtu = self.uplink.mtu.min(u32::from(u16::MAX)) as u16;
        self.peers[index].tunnel.set_announcement(
            now,
            Announcement::New {
                deliver,
                mtu,
                error,
            },
        );
    }

    /// Takes the moved addresses whose packets are kept as they are (`--deliver-to keep`), and lets
    /// go of those that are withdrawn. Until every such peer has said what it moved, what an earlier
    /// run left is kept: the application may be listening there.
    fn hold_kept(&mut self) -> Result<(), String> {
        let keeping = || {
            let peers = self.peers.iter().zip(&self.config.peers);
            peers.filter(|(_, config)| config.deliver_to == DeliverTo::Keep)
        };
        if keeping().next().is_none() {
            return Ok(());
        }
        let mut wanted: Vec<IpAddr> = keeping()
            .flat_map(|(peer, _)| peer.moves.iter().map(|moved| moved.addr))
            .collect();
        if keeping().any(|(peer, _)| !peer.announced) {
            wanted.extend(keep::held(self.host.made()));
        }
        wanted.sort_unstable();
        wanted.dedup();
        let cannot = |error: String| format!("a moved address cannot be held: {error}");
        let desired = keep::plan(self.host.netlink(), &wanted, &self.tun, self.host.made())
            .map_err(|error| cannot(error.to_string()))?;
        let report = (self.host.reconcile_part(keep::is_part, desired))
            .map_err(|error| cannot(error.to_string()))?;
        for change in report.undone {
            info!("undone: {change}");
        }
        for failure in report.left {
            warn!("{}: {}", failure.change, failure.reason);
        }
        self.set_own_addresses();
        Ok(())
    }

    /// The first address of the uplink that `choose` accepts.
    fn own_address<T>(&self, choose: impl Fn(IpAddr) -> Option<T>) -> Option<T> {
        let addresses = self.netlink.addresses().ok()?;
        addresses
            .into_iter()
            .filter(|held| held.index == self.uplink.index)
            .find_map(|held| choose(held.addr))
    }

    /// Looks at this server's addresses: on the new server no client may claim them as its source, on
    /// the old one they are what ICMP messages are sent from.
    fn set_own_addresses(&mut self) {
        let held = match self.netlink.addresses() {
            Ok(held) => held,
            Err(error) => return warn!("cannot list this server's addresses: {error}"),
        };
        if let Translation::New(translator) = &self.shared.translation {
            let own: Vec<IpAddr> = held.into_iter().map(|held| held.addr).collect();
            return translator.set_own_addresses(&own);
        }
        let moves = || self.peers.iter().flat_map(|peer| &peer.moves);
        let mut own: Vec<IpAddr> = held
            .iter()
            .filter(|held| held.index == self.uplink.index)
            .map(|held| held.addr)
            .filter(|&addr| !moves().any(|moved| moved.addr == addr && moved.is_whole()))
            .collect();
        // One of which nothing has moved, if there is one.
        own.sort_by_key(|&addr| moves().any(|moved| moved.addr == addr));
        let v4 = own.iter().find_map(|&addr| match addr {
            IpAddr::V4(addr) => Some(addr),
            IpAddr::V6(_) => None,
        });
        let v6 = own.iter().find_map(|&addr| match addr {
            IpAddr::V6(addr) if is_global(addr) => Some(addr),
            IpAddr::V6(_) | IpAddr::V4(_) => None,
        });
        let hop = &mut self.view.hop;
        self.view_changed |= (hop.v4, hop.v6) != (v4, v6);
        (hop.v4, hop.v6) = (v4, v6);
    }

    /// Looks at the link to the clients, whose MTU may have changed.
    fn measure_link(&mut self, now: Instant) {
        if let Ok(Some(link)) = self.netlink.link_by_index(self.uplink.index) {
            self.uplink = link;
        }
        let mtu = self.uplink.mtu as usize;
        if self.config.role != Role::Old || self.view.hop.mtu == mtu {
            return;
        }
        self.view.hop.mtu = mtu;
        self.view_changed = true;
        let mtu = self.uplink.mtu.min(u32::from(u16::MAX)) as u16;
        for peer in &mut self.peers {
            // The new server's host is not to send more than the clients' link takes.
            let moves = peer.moves.clone();
            let announcement = Announcement::Old { moves, mtu };
            peer.tunnel.set_announcement(now, announcement);
        }
    }

    /// Tells the tunnel how much the route to its peer takes: up to there it searches.
    fn measure_path(&mut self, now: Instant, index: usize) {
        let Some(path) = self.view.peers[index].path else {
            return;
        };
        let to = path.remote.ip();
        let route = self.netlink.route_get(to, None, path.local);
        let Ok(route) = route.or_else(|_| self.netlink.route_get(to, None, None)) else {
            return;
        };
        let link = route
            .oif
            .and_then(|oif| self.netlink.link_by_index(oif).ok().flatten());
        // A route's own MTU is what a router on the path said, or what the administrator did.
        let mtu = route
            .mtu
            .filter(|&mtu| mtu > 0)
            .or(link.map(|link| link.mtu));
        let carries = mtu.unwrap_or(MIN_MTU).clamp(MIN_CARRIED, MAX_CARRIED) as usize;
        let datagram = (carries - outer_headers(path.remote)) as u16;
        self.peers[index].tunnel.set_max_datagram(now, datagram);
        self.set_mtu(index);
    }

    /// Tells the lanes what fits one datagram to a peer.
    fn set_mtu(&mut self, index: usize) {
        let mtu = usize::from(self.peers[index].tunnel.path_mtu()) - DATA_OVERHEAD;
        if self.view.peers[index].mtu != mtu {
            self.view.peers[index].mtu = mtu;
            self.view_changed = true;
        }
    }

    // The host.

    /// Makes again what others have taken away.
    ///
    /// # Errors
    /// If only a new start can: the old server's programs know their interface by its number.
    fn repair(&mut self, now: Instant) -> Result<()> {
        if now < self.next_repair {
            return Ok(());
        }
        self.next_repair = now + REPAIR_EVERY;
        let broken = self.repairer.repair(now, self.host, &mut self.warnings);
        if !broken || self.config.role == Role::New {
            return Ok(());
        }
        match self.netlink.link_by_name(&self.uplink.name) {
            Ok(Some(link)) if link.index != self.uplink.index => Err(failed(format!(
                "interface {} was deleted and made again, and has to be captured from anew: start ipmoved again",
                link.name
            ))),
            _ => Ok(()),
        }
    }

    // Names.

    /// Looks up again the names of peers that do not answer.
    fn resolve_names(&mut self, now: Instant, to: &mpsc::Sender<(usize, Resolved)>) {
        for (index, peer) in self.peers.iter_mut().enumerate() {
            let Some(endpoint) = &self.config.peers[index].endpoint else {
                continue;
            };
            let is_name = endpoint.host.parse::<IpAddr>().is_err();
            if !is_name || peer.state == State::Up || peer.resolving || now < peer.next_resolve {
                continue;
            }
            peer.resolving = true;
            peer.next_resolve = now + RESOLVE_EVERY;
            peer.resolved += 1;
            let (endpoint, turn, to) = (endpoint.clone(), peer.resolved, to.clone());
            tokio::task::spawn_blocking(move || {
                // The daemon may be ending.
                let _ = to.blocking_send((index, resolve(&endpoint, turn)));
            });
        }
    }

    fn resolved(&mut self, now: Instant, index: usize, result: Resolved) {
        let peer = &mut self.peers[index];
        peer.resolving = false;
        let failure = match result {
            Ok(addr) => {
                peer.tunnel.set_endpoint(now, Some(addr));
                None
            }
            Err(error) => Some(error),
        };
        if peer.unresolved != failure {
            peer.unresolved.clone_from(&failure);
            if let Some(error) = failure {
                self.warn(now, index, &format!("{error}; trying again"));
            }
        }
    }

    // What people see.

    /// Says what this daemon is, once it is: a refusal stands alone on its line.
    fn announce_start(&mut self) {
        for text in std::mem::take(&mut self.config.warnings) {
            warn!("{text}");
            let _ = self.warnings.keep(self.started, text);
        }
        for (peer, config) in self.peers.iter().zip(&self.config.peers) {
            let name = self.name(usize::from(peer.id.0));
            match self.config.role {
                Role::Old => {
                    let moved: Vec<String> = config.moves.iter().map(ToString::to_string).collect();
                    info!(
                        moved = moved.join(" "),
                        uplink = self.uplink.name,
                        peer = name,
                        "this is the old server"
                    );
                }
                Role::New => info!(
                    uplink = self.uplink.name,
                    peer = name,
                    "this is the new server"
                ),
            }
        }
    }

    fn warn(&mut self, now: Instant, index: usize, text: &str) {
        let name = self.name(index);
        if self.warnings.keep(now, format!("{name}: {text}")) {
            warn!(peer = name, "{text}");
        }
    }

    /// How the tunnels do, for the service manager.
    fn summary(&self) -> String {
        let up = self.peers.iter().filter(|peer| peer.state == State::Up);
        let all = self.peers.len();
        format!(
            "{} server, {} of {all} tunnels up",
            self.config.role,
            up.count()
        )
    }

    /// The peer as configured, or as it was heard.
    fn name(&self, index: usize) -> String {
        match (
            &self.config.peers[index].endpoint,
            self.view.peers[index].path,
        ) {
            (Some(endpoint), _) => endpoint.to_string(),
            (None, Some(path)) => path.remote.to_string(),
            (None, None) => "(any address)".into(),
        }
    }

    fn status(&self, now: Instant) -> Status {
        let mut offloads = self.offloads;
        offloads.udp_gso_fallbacks = self.udp.gso_fallbacks();
        offloads.tun_gso_fallbacks = self
            .counters
            .iter()
            .map(|lane| lane.tun_gso_fallbacks.load(Relaxed))
            .sum();
        let refused = |lane: &Arc<LaneCounters>| lane.big_tcp_refused.load(Relaxed);
        offloads.tun_big_tcp &= !self.counters.iter().any(refused);
        Status {
            way: Way::Tunnel,
            tunnels: self
                .peers
                .iter()
                .zip(&self.config.peers)
                .map(|(peer, config)| self.tunnel_status(now, peer, config))
                .collect(),
            tun: self.tun.name.clone(),
            port: self.udp.port().unwrap_or_default(),
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            uptime_s: now.duration_since(self.started).as_secs(),
            offloads,
            drops: names(&self.shared.drops),
            warnings: self.warnings.lines(),
        }
    }

    fn tunnel_status(&self, now: Instant, peer: &Peer, config: &PeerConfig) -> TunnelStatus {
        let index = usize::from(peer.id.0);
        let view = &self.view.peers[index];
        let session = peer.tunnel.session();
        let (mut rx, mut tx) = (Traffic::default(), Traffic::default());
        for lane in &self.counters {
            lane.peers[index].rx.add_to(&mut rx);
            lane.peers[index].tx.add_to(&mut tx);
        }
        let flows = match &self.shared.translation {
            Translation::Old(_) => Flows::default(),
            Translation::New(translator) => {
                let stats = translator.stats();
                Flows {
                    live: stats.live,
                    max: stats.max,
                    evicted: stats.evicted,
                    collisions: stats.collisions,
                    refused: stats.refused,
                }
            }
        };
        let mut drops = names(&self.shared.peer_drops[index]);
        if self.peers.len() == 1 {
            // With one peer, what strangers send is best seen where one looks first.
            for (reason, count) in names(&self.shared.drops) {
                *drops.entry(reason).or_default() += count;
            }
        }
        TunnelStatus {
            peer: self.name(index),
            endpoint: view.path.map(|path| path.remote.to_string()),
            role: self.config.role,
            state: match peer.state {
                State::Connecting => status::State::Connecting,
                State::Up => status::State::Up,
                State::Down => status::State::Down,
            },
            cipher: session.map(|session| session.cipher().to_string()),
            rtt_ms: peer.tunnel.rtt().map(|rtt| rtt.as_secs_f64() * 1_000.0),
            handshake_age_s: session
                .map(|session| now.saturating_duration_since(session.created()).as_secs()),
            mtu: view.mtu,
            moved: peer.moves.iter().map(ToString::to_string).collect(),
            deliver_to: peer.deliver.and_then(|to| deliver_text(to, &peer.moves)),
            deliver: config.deliver.iter().map(ToString::to_string).collect(),
            flows,
            rx,
            tx,
            drops,
        }
    }

    // The end.

    /// Says goodbye to every peer.
    #[allow(clippy::disallowed_methods)] // the edge: here the clock is read
    fn close(&mut self) {
        let now = Instant::now();
        for peer in &mut self.peers {
            peer.tunnel.close(now);
            while let Some(transmit) = peer.tunnel.poll_transmit() {
                let datagram = &transmit.datagram;
                // A goodbye that does not leave is noticed by its absence.
                let _ = self.udp.send(&transmit.to, 0, datagram, datagram.len());
            }
        }
    }
}

/// Smallest and largest IP packet a path is taken to carry: RFC 791's 576 less what nobody uses
/// today, and the largest UDP datagram over IPv4.
const MIN_CARRIED: u32 = 576;
const MAX_CARRIED: u32 = 65_535;

/// Why something is not served, for the operators of both servers.
fn taken(moved: &Move) -> String {
    format!("{moved} has moved here from another old server already; it is not served for this one")
}

fn is_too_big(error: &std::io::Error) -> bool {
    error.raw_os_error() == Some(libc::EMSGSIZE)
}

fn is_global(addr: Ipv6Addr) -> bool {
    !addr.is_unicast_link_local() && !addr.is_loopback()
}

/// Where is delivered, for the families that something was moved of.
fn deliver_text(deliver: Deliver, moves: &[Move]) -> Option<String> {
    match deliver {
        Deliver::Keep => Some("keep".into()),
        Deliver::To { v4, v6 } => {
            let moved = |v4: bool| moves.iter().any(|moved| moved.addr.is_ipv4() == v4);
            let v4 = v4.filter(|_| moved(true)).map(IpAddr::V4);
            let v6 = v6.filter(|_| moved(false)).map(IpAddr::V6);
            let all: Vec<String> = v4.iter().chain(&v6).map(ToString::to_string).collect();
            (!all.is_empty()).then(|| all.join(", "))
        }
    }
}

pub(super) fn names(drops: &Drops) -> BTreeMap<String, u64> {
    drops
        .iter()
        .map(|(reason, count)| (reason.name().to_owned(), count))
        .collect()
}
