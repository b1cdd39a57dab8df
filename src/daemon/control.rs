//! The control task: everything but carrying packets.
//!
//! One thread that waits for whatever comes first: a message from a lane, a timer of a tunnel, a
//! request on the status socket, a name that was looked up, a signal. It hands these to the tunnels
//! (channel) and to the [`Policy`] (decisions), and carries out what they say. What concerns lanes
//! becomes a new view for them. No lane ever waits for this task.
//!
//! Owns the order of things and every call to the kernel while the daemon runs. When it looks at
//! the kernel, and what follows for programs on links, is [`follow`](super::follow)'s business.

mod handing;
mod reload;

use std::collections::{BTreeMap, HashMap};
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use tokio::sync::mpsc;
use tracing::{debug, info, warn};

use super::asks::Asks;
use super::chosen::Cgroups;
use super::control_socket::{self, Order};
use super::delivered::Delivered;
use super::early::Awaited;
use super::facts::Facts;
use super::follow::{Follower, Listener};
use super::forge::Forge;
use super::gates::{Before, Gates, Part};
use super::handover::giving::{self, Step};
use super::handover::state::{Fingerprint, State as Handed};
use super::handover::taking::{Inheritance, not_taken_over};
use super::keeper;
use super::orders::{CarriedOut, Orders};
use super::policy::{Action, HostFacts, Input, PeerRules, Policy, RouteSize, tunnel_mtu};
use super::progress::Progresses;
use super::report;
use super::service::{
    self, Cause, DaemonError, End, LOOK_EVERY, Repairer, Result, Signals, Threads, Told, Wish, end,
    failed, notify_ready, notify_stopping,
};
use super::setup::{Ready, Tools, moves, resolve};
use super::silence::{Around, Said, Watcher};
use super::status_socket::{self, StatusListener};
use super::their_modes::TheirModes;
use super::viewers::Viewers;
use super::visitors::Visitors;
use super::warnings::Warnings;
use super::watchdog::Watchdog;
use super::{index, log};
use crate::channel::pmtu;
use crate::channel::session::{MacCheck, Offer, PeerKeys, SessionIndexes, wipe_frames};
use crate::channel::tunnel::{Event, MoveName, State, Timers, Transmit, Tunnel, TunnelConfig};
use crate::flow::ended::HostFlow;
use crate::flow::listing::Flows;
use crate::flow::role::{Forwarder, Hop};
use crate::flow::routes::Delivery;
use crate::flow::table::HandedFlow;
use crate::flow::translate::{Translator, TranslatorConfig};
use crate::io::entropy;
use crate::io::udp::{UdpSocket, WhenFull};
use crate::kernel::look;
use crate::kernel::netlink::{Address, Family, Link, Netlink};
use crate::kernel::programs::{self, PeerTargets};
use crate::kernel::steer::Steering;
use crate::kernel::{Change, Host, Place, keep, named_ports};
use crate::lane::shared::{LaneCounters, LaneView, PeerView, Shared};
use crate::lane::{BusyLanes, Holding, LaneError, ToControl, Waiting};
use crate::model::asked::Asked;
use crate::model::drops::{DropReason, Drops};
use crate::model::mode::Mode;
use crate::model::moved::Move;
use crate::model::peer::{MAX_PEERS, PeerId, Role};
use crate::model::prefix::Prefix;
use crate::model::request::{Answer, Request};
use crate::model::scopes::Scopes;
use crate::model::status::{ModeStatus, Offloads, Status};
use crate::packet::coalesce::Reach;
use crate::settings::args::Without;
use crate::settings::config::{Config, PeerConfig};
use crate::settings::values::PeerAddr;
use handing::{Doors, LaneKit};
use reload::Reloads;

/// How often to look at the route to a peer, whose MTU may have changed. A router's message changes
/// it, and the kernel tells nobody. A transfer that is too big stalls until we look and ask.
const PATH_EVERY: Duration = Duration::from_secs(1);

/// Messages of lanes that are handled in one turn, before anything is sent.
const MESSAGES_A_TURN: usize = 64;

/// How often to tell the kernel which flows ended. Until then they take room from new ones.
const FLOWS_EVERY: Duration = Duration::from_millis(100);

/// At most so long after the end of a hold what has waited is gone
/// ([`flow::hold`](crate::flow::hold)).
const RELEASED: Duration = Duration::from_secs(6);

/// How often to look meanwhile whether it is.
const RELEASED_EVERY: Duration = Duration::from_millis(50);

/// How often to look for flows that the kernel remembers from an earlier daemon.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

/// Carries packets until a signal, then undoes everything, unless a thread crashed.
pub(super) async fn run(config: Config, ready: Ready, forge: Option<Forge>) -> Result<()> {
    let Ready {
        mut host,
        mut tools,
    } = ready;
    let mut lanes = Threads::default();
    let refused = tools.orders.as_ref().and_then(Orders::dir_refused);
    let mut visitors = Visitors::start(&config, refused, Instant::now());
    let mut inheritance = tools.inheritance.take();
    let taking = inheritance.as_ref().is_some_and(Inheritance::is_of_running);
    let with = (&mut inheritance, forge);
    let carried = carry(config, tools, with, &mut host, &mut lanes, &mut visitors);
    let mut result = carried.await;
    if taking && inheritance.is_some() {
        result = result.map_err(not_taken_over);
    }
    if let Ok(End::HandedOver) = result {
        host.leave();
    }
    let result = end(result, &mut host);
    lanes.stop();
    // Nothing else waits for a disk.
    if let Some(visitors) = &mut visitors {
        visitors.wait();
    }
    result
}

/// Carries packets until a signal, then says goodbye; or until another daemon takes over. Nothing
/// is left of the `inheritance` once this daemon is the one that runs.
async fn carry(
    mut config: Config,
    tools: Tools,
    (inheritance, forge): (&mut Option<Inheritance>, Option<Forge>),
    host: &mut Host,
    lanes: &mut Threads,
    visitors: &mut Option<Visitors>,
) -> Result<End> {
    let started = Instant::now();
    let peers = config.peers.len();
    // Each peer has places of its own in the queue, and there is one more for a lane's last
    // message.
    let (to_control, mut from_lanes) = mpsc::channel(Waiting::limit(MAX_PEERS) + 1);
    let Tools {
        mut signals,
        netlink,
        places,
        viewers,
        inheritance: _,
        mut orders,
        queues,
        features,
        tun,
        sockets,
        mut follower,
        cgroups,
        endpoints,
        processors,
        resumes,
        awaited,
        checked: _,
    } = tools;
    let chosen = follower.steering().map(|it| it.outgoing().to_vec());
    let sockets: Vec<Arc<UdpSocket>> = sockets.into_iter().map(Arc::new).collect();
    let mut listener = Listener::new([&netlink, host.netlink()]);
    let doors = Doors::new(&places, &viewers).map_err(failed)?;
    let mut status = StatusListener::new(places.status).map_err(failed)?;
    let mut steps = giving::serve(places.handover).map_err(failed)?;
    let mut commands = control_socket::serve(places.commands).map_err(failed)?;
    let lasting = orders.iter_mut().flat_map(Orders::take_warnings);
    config.warnings.extend(lasting);
    orders.as_mut().map(Orders::start_keeping).transpose()?;
    let (reloads, mut prepared) = Reloads::new(forge, &config, chosen.unwrap_or_default());
    let captured = moves(&config);
    let (keys, rules) = take_peers(&mut config, &endpoints);
    let facts = HostFacts {
        uplink_mtu: follower.uplinks().mtu(),
        tun_mtu: tun.mtu,
        left: keep::held(host.made()).collect(),
    };
    let mut policy = Policy::new(config.role, rules, facts, started);
    let delivered = Delivered::read(host.dir(), resumes);
    policy.delivered_before(delivered.known());
    let indexes = SessionIndexes::default();
    let maker = TunnelMaker {
        config: &config,
        policy: &policy,
        lanes: sockets.len() as u8,
        indexes: &indexes,
    };
    let mut tunnels = policy
        .peers()
        .map(|peer| maker.make(peer, &keys[index(peer)], endpoints[index(peer)], started))
        .collect::<Result<Vec<_>>>()?;
    let state = inheritance.as_ref().and_then(Inheritance::state);
    let fingerprints: Vec<_> = keys.iter().map(PeerKeys::fingerprint).collect();
    let handed = state.zip(Some(&*fingerprints));
    let forwarder = Arc::new(forwarder(
        &config,
        &policy,
        (&keys, &captured),
        started,
        resumes,
        handed,
    )?);
    let mut inherited = BTreeMap::new();
    if let Some(state) = state {
        inherited = handing::take_up(state, &fingerprints, &mut tunnels, &forwarder, started);
    }
    // Whoever was reached by the last daemon need not be called as one to whom a way has just come.
    let reachable = tunnels.iter().map(|it| it.state() == State::Up).collect();
    let shared = Arc::new(Shared {
        view: ArcSwap::from_pointee(LaneView {
            forwarder: Arc::clone(&forwarder),
            ..LaneView::default()
        }),
        mac_check: MacCheck::new(config.role, keys),
        drops: Drops::default(),
        // There may be more of them one day.
        peer_drops: (0..MAX_PEERS).map(|_| Drops::default()).collect(),
        waiting: (0..MAX_PEERS).map(|_| Waiting::default()).collect(),
        holding: Holding::new(&captured).map_err(failed)?,
        busy_lanes: BusyLanes::new(processors),
    });
    let mut viewers = viewers.serve(Arc::clone(&shared) as Arc<dyn Flows>)?;
    if let Some(taken) = follower.taken() {
        forwarder.set_taken(&taken);
    }
    let tso = !config.without.contains(&Without::TunGso);
    // Not on the old server: its packets leave on a link, which takes no such sizes.
    let big_tcp = tso
        && config.role == Role::New
        && tun.big_tcp
        && !config.without.contains(&Without::BigTcp);
    let (to_names, mut names) = mpsc::channel(MAX_PEERS);
    let mut control = Control {
        role: config.role,
        policy,
        tunnels,
        indexes,
        lanes: sockets.len(),
        lane_sockets: sockets.clone(),
        host,
        shared: Arc::clone(&shared),
        netlink,
        udp: sockets[0].try_clone().map_err(failed)?,
        tun,
        follower,
        cgroups,
        resumed: vec![false; peers],
        inherited,
        is_leaving: false,
        is_to_end: false,
        facts: Facts::default(),
        listen: config.listen.ip,
        delivering: vec![None; peers],
        delivered,
        calls: Vec::new(),
        holding: None,
        view: LaneView {
            number: 0,
            forwarder,
            sessions: Default::default(),
            peers: vec![PeerView::default(); peers],
            hop: Hop::default(),
        },
        view_changed: true,
        called: endpoints,
        awaited,
        fault: None,
        reachable,
        counters: Vec::new(),
        names: to_names,
        started,
        next_path: started,
        link_mtus: Vec::new(),
        next_look: started,
        next_flows: started + FLOWS_EVERY,
        next_sweep: started + SWEEP_EVERY,
        repairer: Repairer::default(),
        silence: Watcher::new(config.role, peers, started),
        orders,
        modes_again: None,
        progress: Progresses::new(config.role, peers, started),
        asks: Asks::new(peers, started),
        theirs: TheirModes::new(peers),
        visitors,
        reloads,
        offloads: Offloads {
            udp_gso: sockets[0].gso(),
            udp_gro: sockets[0].gro(),
            tun_tso: tso,
            tun_uso: tso && features.uso,
            tun_big_tcp: big_tcp,
            ..Offloads::default()
        },
        warnings: Warnings::new(peers),
        watchdog: service::watchdog(started),
        told: Told::new(started),
    };
    for peer in control.policy.peers() {
        control.set_homes(peer);
    }
    control.find_calls();
    control.set_modes(started);
    control.turn(started);
    // It has looked at everything; what the start itself caused can wait.
    listener.looked(started, Instant::now());
    let kit = LaneKit {
        queues,
        sockets,
        shared,
        to_control,
        uso: tso && features.uso,
        tso,
        reach: if big_tcp { Reach::Here } else { Reach::Further },
        no_split: config.no_split,
        doors,
    };
    control.counters = kit.counters();
    if let Some(inheritance) = inheritance {
        inheritance.take_charge(control.host)?;
    }
    *inheritance = None;
    kit.start(lanes, &control.counters)?;
    control.announce_start(config.warnings);
    notify_ready(&control.first_line(Instant::now()));
    let result = control
        .serve(
            &mut signals,
            lanes,
            &mut from_lanes,
            (&mut names, &mut prepared),
            (&mut status, &mut commands, &mut viewers),
            (&mut listener, &mut steps, &kit),
        )
        .await;
    match result {
        Ok(End::HandedOver) => control.leave(),
        Ok(End::Stopped) | Err(_) => {
            notify_stopping();
            control.close(!matches!(result, Err(DaemonError::Crashed(_))));
        }
    }
    result
}

/// Takes the peers out of the settings: their keys for the tunnels, the rest for the policy.
fn take_peers(
    config: &mut Config,
    endpoints: &[Option<SocketAddr>],
) -> (Vec<PeerKeys>, Vec<PeerRules>) {
    let mut leaving: BTreeMap<PeerId, Vec<Move>> = BTreeMap::new();
    for (peer, moved) in &config.leaving {
        leaving.entry(*peer).or_default().push(moved.clone());
    }
    let each = |((id, peer), endpoint): ((PeerId, PeerConfig), &Option<SocketAddr>)| {
        let leaving = leaving.remove(&id).unwrap_or_default();
        let rules = PeerRules {
            endpoint: peer.endpoint,
            known_at: endpoint.map(|endpoint| endpoint.ip()),
            moves: peer.moves.into_iter().chain(leaving).collect(),
            deliver_to: peer.deliver_to,
            deliver: peer.deliver,
            accept: peer.accept,
            clients_from: peer.clients_from,
            outgoing: peer.outgoing,
            allow_outgoing: peer.allow_outgoing,
        };
        (peer.keys, rules)
    };
    (0..)
        .map(PeerId)
        .zip(std::mem::take(&mut config.peers))
        .zip(endpoints)
        .map(each)
        .unzip()
}

/// The times of the protocol.
fn timers(config: &Config) -> Timers {
    let rekey_after = config.rekey_after;
    rekey_after.map_or_else(Timers::default, Timers::with_rekey_after)
}

/// What all tunnels of this daemon are made of.
struct TunnelMaker<'a> {
    config: &'a Config,
    policy: &'a Policy,
    /// This side's data lanes.
    lanes: u8,
    indexes: &'a SessionIndexes,
}

impl TunnelMaker<'_> {
    /// The tunnel to a peer, which is there if the settings say so.
    ///
    /// # Errors
    /// If the system has no randomness.
    fn make(
        &self,
        peer: PeerId,
        keys: &PeerKeys,
        endpoint: Option<SocketAddr>,
        now: Instant,
    ) -> Result<Tunnel> {
        let role = self.config.role;
        let config = TunnelConfig {
            peer,
            keys: keys.clone(),
            role,
            lanes: self.lanes,
            offer: Offer::of_this_machine(self.config.cipher),
            endpoint,
            announcement: self.policy.announcement(peer),
            max_datagram: Some(pmtu::BASE),
            timers: timers(self.config),
            indexes: self.indexes.clone(),
            entropy: entropy::system(),
        };
        let mut tunnel = Tunnel::new(config, now).map_err(failed)?;
        if role == Role::New {
            tunnel.set_accept(self.policy.accept(peer).to_vec());
        }
        Ok(tunnel)
    }
}

/// Where what has moved here is delivered: the links that clients' packets come by, and who knows
/// what of it (new server).
fn delivering<'a>(
    follower: &'a mut Follower,
    forwarder: &'a Forwarder,
) -> Option<(Vec<u32>, &'a mut Steering, &'a Translator)> {
    let links = follower.carrying().iter().map(|link| link.index).collect();
    let (steering, translator) = follower.steering().zip(forwarder.translator())?;
    Some((links, steering, translator))
}

/// Whether more than one new server may begin connections, so that their gates need names.
fn several_begin(policy: &Policy) -> bool {
    let begins = |peer: &PeerId| !policy.allow_outgoing(*peer).is_empty();
    policy.peers().filter(begins).nth(1).is_some()
}

/// Makes the forwarder: gates on the old server, a translator on the new one.
/// `resumes`: a predecessor was killed.
/// A `state` is another daemon's; with it come the fingerprints of this one's peers.
fn forwarder(
    config: &Config,
    policy: &Policy,
    (keys, captured): (&[PeerKeys], &[Move]),
    epoch: Instant,
    resumes: bool,
    state: Option<(&Handed, &[Fingerprint])>,
) -> Result<Forwarder> {
    let max_flows = config.max_flows as usize;
    if config.role == Role::Old {
        let common = Gates {
            all: Arc::new(Scopes::new(captured)),
            max_flows,
            log: config.client_log,
            several_begin: several_begin(policy),
            now: epoch,
        };
        let gates = policy.peers().map(|peer| {
            let part = Part {
                moves: policy.moves(peer),
                allow_outgoing: policy.allow_outgoing(peer),
                name: Some(keys[index(peer)].name()),
            };
            let handed = state.and_then(|(state, fingerprints)| {
                handing::gate(part.moves, max_flows, state, &fingerprints[index(peer)])
            });
            let before = match handed {
                Some(gate) => Before::Handed {
                    gate: Box::new(gate),
                },
                None => Before::Start { resumes },
            };
            Arc::new(common.make(&part, before))
        });
        // The policy will tell this server's own addresses, once they could be listed.
        return Ok(Forwarder::Old(gates.collect()));
    }
    let entropy = entropy::system();
    let word = || entropy.u64().map_err(failed);
    let translator = Translator::new(TranslatorConfig {
        // Enough shards that two lanes seldom want the same one.
        shards: if config.lanes == 1 {
            1
        } else {
            4 * usize::from(config.lanes)
        },
        max_flows,
        seed: [word()?, word()?],
        epoch: state
            .and_then(|(state, _)| state.then.checked_sub(state.age))
            .unwrap_or(epoch),
        note_ended: true,
    });
    for peer in policy.peers() {
        translator.allow_clients(peer, policy.clients_from(peer));
        translator.set_outgoing(peer, policy.outgoing_rules(peer));
    }
    Ok(Forwarder::New(translator))
}

/// Who comes from outside the daemon: who asks for the status, who gives commands, who looks.
type Outside<'a> = (
    &'a mut StatusListener,
    &'a mut mpsc::Receiver<Order>,
    &'a mut Viewers,
);

/// The result of looking up a peer's name, which a reload may have replaced meanwhile.
type Found = (PeerId, PeerAddr, Result<SocketAddr, String>);

/// The control task.
struct Control<'h> {
    role: Role,
    policy: Policy,
    /// The tunnels, by [`PeerId`].
    tunnels: Vec<Tunnel>,
    /// Shared by the tunnels.
    indexes: SessionIndexes,
    /// How many lanes there are.
    lanes: usize,
    /// The sockets of the lanes.
    lane_sockets: Vec<Arc<UdpSocket>>,
    host: &'h mut Host,
    shared: Arc<Shared>,
    netlink: Netlink,
    /// The first lane's socket: the tunnels' datagrams leave through it.
    udp: UdpSocket,
    tun: Link,
    follower: Follower,
    cgroups: Cgroups,
    /// For each peer, whether what began here before a crash was looked for.
    resumed: Vec<bool>,
    /// The flows of another daemon, until what has moved is known (new server).
    inherited: BTreeMap<PeerId, Vec<HandedFlow>>,
    /// Another daemon is about to take over: nothing is changed in the kernel any more.
    is_leaving: bool,
    /// It was told to end meanwhile, and does so if that other daemon fails.
    is_to_end: bool,
    facts: Facts,
    /// The address of `--listen`, if it names one.
    listen: Option<IpAddr>,
    /// Where packets of each peer are delivered, as was told last.
    delivering: Vec<Option<Delivery>>,
    /// The same, for the next daemon if this one is killed.
    delivered: Delivered,
    /// Calls from inside that an earlier daemon carried, until what they called is served.
    calls: Vec<HostFlow>,
    /// The moved addresses that this host was last asked to hold.
    holding: Option<Vec<Prefix>>,
    /// The lanes see this once it is published.
    view: LaneView,
    view_changed: bool,
    /// Where the settings say that each peer is, if they do.
    called: Vec<Option<SocketAddr>>,
    /// What this server did not have when the daemon started.
    awaited: Option<Awaited>,
    /// Why the daemon must not go on.
    fault: Option<DaemonError>,
    /// Whether a route leads to each peer.
    reachable: Vec<bool>,
    counters: Vec<Arc<LaneCounters>>,
    /// Where the results of look-ups are sent.
    names: mpsc::Sender<Found>,
    started: Instant,
    next_path: Instant,
    /// MTUs of interfaces, as the kernel said in this second.
    link_mtus: Vec<(u32, Option<u32>)>,
    next_look: Instant,
    next_flows: Instant,
    next_sweep: Instant,
    repairer: Repairer,
    silence: Watcher,
    /// The modes of what has moved (old server).
    orders: Option<Orders>,
    /// When the programs may have to be told the modes again.
    modes_again: Option<Instant>,
    progress: Progresses,
    asks: Asks,
    /// The modes of what has moved here (new server).
    theirs: TheirModes,
    visitors: &'h mut Option<Visitors>,
    /// What was read anew, and what runs.
    reloads: Reloads,
    offloads: Offloads,
    warnings: Warnings,
    watchdog: Option<Watchdog>,
    /// What the service manager was told of the state of things.
    told: Option<Told>,
}

impl Control<'_> {
    /// Waits for whatever comes first, until a signal.
    async fn serve(
        &mut self,
        signals: &mut Signals,
        lanes: &mut Threads,
        from_lanes: &mut mpsc::Receiver<ToControl>,
        (names, prepared): (
            &mut mpsc::Receiver<Found>,
            &mut mpsc::Receiver<reload::Prepared>,
        ),
        (status, commands, viewers): Outside<'_>,
        (listener, steps, kit): (&mut Listener, &mut mpsc::Receiver<Step>, &LaneKit),
    ) -> Result<End> {
        loop {
            self.turn(Instant::now());
            if let Some(fault) = self.fault.take() {
                return Err(fault);
            }
            self.watch();
            let wake = tokio::time::sleep_until(self.next_timeout().into());
            tokio::select! {
                wish = signals.recv() => match wish {
                    Wish::End if self.ends_later() => {}
                    Wish::End => return Ok(End::Stopped),
                    Wish::Reload => self.reload(None),
                },
                Some(prepared) = prepared.recv() => {
                    self.take_prepared(Instant::now(), prepared);
                }
                crash = lanes.crashed() => return Err(crash),
                Some(message) = from_lanes.recv() => {
                    let now = Instant::now();
                    self.handle(now, message)?;
                    // What waits as well is answered in the same turn, which looks at every peer.
                    for _ in 1..MESSAGES_A_TURN {
                        let Ok(message) = from_lanes.try_recv() else { break };
                        self.handle(now, message)?;
                    }
                }
                Some((peer, name, found)) = names.recv() => {
                    self.see(Instant::now(), Input::LookedUp { peer, name, found });
                }
                () = listener.news(), if !self.is_leaving => {
                    let begun = Instant::now();
                    self.look(begun);
                    listener.looked(begun, Instant::now());
                }
                client = status.accept() => {
                    let status = self.status_now();
                    status_socket::send_status(client, || status);
                }
                ask = viewers.asked() => {
                    // Who does not wait any longer is not told.
                    let _ = ask.send(self.status_now());
                }
                Some(order) = commands.recv() => {
                    if let Some(order) = self.refuse_while_leaving(order) {
                        self.order(Instant::now(), order);
                    }
                }
                Some(step) = steps.recv() => {
                    let others = (&mut *steps, &mut *viewers);
                    if self.hand_over(step, lanes, from_lanes, others, kit).await? {
                        handing::refuse_all(commands).await;
                        return Ok(End::HandedOver);
                    }
                    if self.ends_now() {
                        return Ok(End::Stopped);
                    }
                }
                () = wake => {}
            }
        }
    }

    fn next_timeout(&self) -> Instant {
        self.tunnels
            .iter()
            .filter_map(Tunnel::next_timeout)
            .chain([self.next_path, self.silence.next()])
            .chain((!self.is_leaving).then_some(self.next_look))
            .chain(self.watchdog.as_ref().map(Watchdog::next))
            .chain(self.told.as_ref().map(Told::next))
            .chain(self.visitors.as_ref().map(|visitors| visitors.next()))
            .chain((self.role == Role::New).then_some(self.next_flows))
            .chain(self.orders.as_ref().and_then(|it| it.next(Instant::now())))
            .chain(self.modes_again)
            .chain(self.reloads.next())
            .chain(self.progress.next())
            .chain(self.asks.next())
            .min()
            .unwrap_or(self.next_path)
    }

    /// Tells the service manager that both directions of each lane do their work, while they do.
    fn watch(&mut self) {
        let both = |lane: &Arc<LaneCounters>| [lane.outbound.counted(), lane.inbound.counted()];
        service::watch(&mut self.watchdog, self.counters.iter().flat_map(both));
    }

    /// Handles what a lane passed on.
    fn handle(&mut self, now: Instant, message: ToControl) -> Result<()> {
        let (peer, result) = match message {
            ToControl::Handshake {
                endpoint, admitted, ..
            } => {
                let peer = admitted.peer();
                let tunnel = &mut self.tunnels[index(peer)];
                (peer, tunnel.handle_handshake(now, endpoint, &admitted))
            }
            ToControl::Control {
                session,
                heard_from,
                message,
                ..
            } => {
                let tunnel = &mut self.tunnels[index(session.peer())];
                if let Some(endpoint) = heard_from {
                    tunnel.session_heard(now, &session, endpoint);
                }
                let result = tunnel.handle_control(now, &session, &message);
                (session.peer(), result)
            }
            ToControl::Heard {
                session, endpoint, ..
            } => {
                let tunnel = &mut self.tunnels[index(session.peer())];
                tunnel.session_heard(now, &session, endpoint);
                return Ok(());
            }
            ToControl::Failed(what @ (LaneError::HelperCrashed | LaneError::ReleaseCrashed)) => {
                return Err(DaemonError::Crashed(what.into()));
            }
            ToControl::Failed(what) => return Err(failed(what)),
        };
        if let Err(reason) = result {
            self.shared.peer_drops[index(peer)].count(reason);
        }
        Ok(())
    }

    /// Lets the tunnels and the policy do what is due, and carries out the result.
    fn turn(&mut self, now: Instant) {
        let wall = SystemTime::now();
        for peer in self.policy.peers() {
            self.tunnels[index(peer)].handle_timeout(now, wall);
            while let Some(event) = self.tunnels[index(peer)].poll_event() {
                self.event(now, peer, event);
            }
        }
        if now >= self.next_look && !self.is_leaving {
            self.look(now);
        }
        if now >= self.next_flows {
            self.next_flows = now + FLOWS_EVERY;
            self.look_at_flows(now);
        }
        if now >= self.next_path {
            self.next_path = now + PATH_EVERY;
            self.link_mtus.clear();
            self.follower.beat(now, &mut self.warnings);
            for peer in self.policy.peers() {
                self.look_at_route(now, peer);
                if let Some(refused) = self.view.forwarder.take_refused(peer) {
                    self.policy.handle(now, Input::Refused(peer, refused));
                }
            }
            self.look_at_refused_sources(now);
            self.look_at_outgoing(now);
            self.look_at_leaving(now);
        }
        self.rotate_keys(now);
        if now >= self.silence.next() {
            self.look_at_silence(now);
        }
        if self.orders.as_mut().is_some_and(Orders::end_holds) {
            self.set_modes(now);
        }
        if self.modes_again.is_some_and(|at| now >= at) {
            self.set_modes_again(now);
        }
        if self.progress.next().is_some_and(|next| now >= next) {
            self.look_at_progress(now);
        }
        if self.asks.next().is_some_and(|next| now >= next) {
            for (tunnel, asks) in self.tunnels.iter_mut().zip(self.asks.take(now)) {
                if !asks.is_empty() {
                    tunnel.ask(now, &asks);
                }
            }
        }
        if let Some(visitors) = &mut *self.visitors
            && now >= visitors.next()
        {
            visitors.read(now, &self.follower);
            if visitors.wants_look(now) {
                let is_up = |peer| self.tunnels[index(peer)].state() == State::Up;
                let moves = self.orders.iter().flat_map(Orders::moved);
                let moves = moves.map(|(peer, moved, settled)| (moved, settled, is_up(peer)));
                visitors.watch(&self.follower, moves);
                if visitors.wants_progress(now) {
                    let peers = self.policy.peers();
                    visitors.progress(peers.flat_map(|peer| self.progress.of(peer)));
                    let peers = self.policy.peers();
                    visitors.served(peers.flat_map(|peer| self.silence.served(now, peer)));
                }
                visitors.look(now, &self.view.forwarder, &mut self.warnings);
            }
        }
        self.tell_unlogged(now);
        self.policy.handle_timeout(now);
        self.carry_out(now);
        if self.told.as_ref().is_some_and(|told| now >= told.next()) {
            let line = self.first_line(now);
            self.told
                .iter_mut()
                .for_each(|told| told.tell(now, line.clone()));
        }
        // A session has to be in the lanes' hands before the peer learns of it.
        if std::mem::take(&mut self.view_changed) {
            self.view.number += 1;
            self.shared.view.store(Arc::new(self.view.clone()));
            // What keys of sessions that have ended left on this thread's stack.
            wipe_frames();
        }
        self.send_all(now);
    }

    /// Sends what the tunnels have to say.
    fn send_all(&mut self, now: Instant) {
        for (tunnel, drops) in self.tunnels.iter_mut().zip(&self.shared.peer_drops) {
            while let Some(transmit) = tunnel.poll_transmit() {
                send(&self.udp, now, tunnel, &transmit, drops);
            }
        }
    }

    /// Tells the translation which packets are those of the tunnel to a peer.
    fn tell_tunnel(&self, peer: PeerId) {
        let endpoint = self.view.peers[index(peer)].endpoint;
        let ends = endpoint.zip(self.udp.port().ok());
        if let Some((translator, (to, from))) = self.view.forwarder.translator().zip(ends) {
            translator.set_tunnel(peer, to.remote, from);
        }
    }

    fn event(&mut self, now: Instant, peer: PeerId, event: Event) {
        let view = &mut self.view.peers[index(peer)];
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
                view.session = Some(session);
                self.view_changed = true;
            }
            Event::SendOff => {
                view.session = None;
                self.view_changed = true;
            }
            Event::Endpoint(endpoint) => {
                view.endpoint = Some(endpoint);
                self.view_changed = true;
                self.set_homes(peer);
                self.tell_tunnel(peer);
            }
            Event::Arrived(endpoint) => {
                self.look_before_choosing(now);
                let from = self.speaks_from(endpoint.remote.ip());
                self.see(now, Input::SpeaksFrom(peer, from));
                self.see(now, Input::Endpoint(peer, endpoint));
                self.look_at_route(now, peer);
            }
            Event::State(state) => self.state_changed(now, peer, state),
            Event::PeerConfig(announcement) => {
                self.look_before_choosing(now);
                self.see(now, Input::Announced(peer, announcement));
            }
            Event::PeerSees { run, news } => {
                self.see(now, Input::Says(peer));
                self.silence.peer_sees(now, peer, run, news);
            }
            Event::PeerProgress { run, progress } => {
                let moves = self.policy.moves(peer);
                self.progress.heard(peer, moves, run, progress);
            }
            Event::PeerModes { run, modes } => {
                if self.role == Role::New && self.theirs.hear(peer, run, modes) {
                    self.serve_inside(now);
                }
            }
            Event::PeerAsks(asks) => self.answer(now, peer, asks),
            Event::PeerTells(told) => self.asks.told(peer, told),
            Event::PathMtu(_) => self.set_mtu(peer),
            Event::Rtt(rtt) => debug!(peer = peer.0, ?rtt, "round trip"),
            Event::Warning(warning) => self.warn(now, peer, &warning.to_string()),
        }
    }

    /// Tells the lanes where the peer is known to be: where it was heard, and where the settings
    /// say. Its handshake messages are looked at first, and not with those of strangers.
    fn set_homes(&mut self, peer: PeerId) {
        let heard = self.view.peers[index(peer)].endpoint.map(|at| at.remote);
        let homes = heard.into_iter().chain(self.called[index(peer)]);
        (self.shared.mac_check).set_homes(peer, homes);
    }

    fn state_changed(&mut self, now: Instant, peer: PeerId, state: State) {
        let heard = self.tunnels[index(peer)].last_heard();
        self.silence.peer_is(now, peer, state == State::Up, heard);
        if state != State::Up {
            self.progress.lost(peer);
            self.asks.lost(peer);
        }
        self.see(now, Input::State(peer, state));
        let name = self.policy.name(peer);
        if self.warnings.may_log(now, peer) {
            match state {
                State::Up => info!(peer = name, "tunnel up"),
                State::Down if self.tunnels[index(peer)].stopped().is_some() => {
                    warn!(peer = name, "tunnel down: the peer's daemon was stopped");
                }
                State::Down => warn!(peer = name, "tunnel down: the peer does not answer"),
                State::Connecting => {}
            }
        }
        if let Some(told) = &mut self.told {
            told.hurry(now);
        }
    }

    // The policy.

    /// Gives an input to the policy, and carries out its actions.
    fn see(&mut self, now: Instant, input: Input) {
        self.policy.handle(now, input);
        self.carry_out(now);
    }

    fn carry_out(&mut self, now: Instant) {
        let mut inside = false;
        while let Some(action) = self.policy.poll_action() {
            match action {
                Action::Serve(peer, moves) => {
                    if self.warnings.may_log(now, peer) {
                        let names: Vec<String> = moves.iter().map(ToString::to_string).collect();
                        let name = self.policy.name(peer);
                        info!(peer = name, moved = names.join(" "), "serving");
                    }
                    self.serve_moves(now, peer, &moves);
                    inside = true;
                }
                Action::Deliver(peer, delivery) => {
                    self.tell_of_delivery(peer, &delivery);
                    if let Some(translator) = self.view.forwarder.translator() {
                        translator.set_delivery(peer, delivery);
                    }
                    self.delivered.keep(self.policy.delivered());
                    inside = true;
                }
                Action::Outgoing(peer, rules) => {
                    if let Some(translator) = self.view.forwarder.translator() {
                        translator.set_outgoing(peer, rules);
                    }
                }
                Action::Places { places, complete } => self.set_places(now, &places, complete),
                Action::Hold(wanted) if self.is_leaving => self.holding = Some(wanted),
                Action::Hold(wanted) => {
                    let result = self.hold(&wanted).map_err(|error| error.to_string());
                    self.holding = Some(wanted);
                    self.policy.handle(now, Input::Held(result));
                    self.read_addresses(now);
                }
                Action::OwnAddresses(own) => {
                    self.view.forwarder.set_own_addresses(&own);
                }
                Action::OwnNetworks(networks) => {
                    if let Some(translator) = self.view.forwarder.translator() {
                        translator.set_own_networks(networks);
                    }
                    inside = true;
                }
                Action::Hop(hop) => {
                    self.view.hop = hop;
                    self.view_changed = true;
                }
                Action::SetTunMtu(mtu) => self.set_tun_mtu(now, mtu),
                Action::ClientMtu(peer, mtu) => {
                    let view = &mut self.view.peers[index(peer)];
                    self.view_changed |= view.client_mtu != mtu;
                    view.client_mtu = mtu;
                }
                Action::Announce(peer, announcement) => {
                    self.tunnels[index(peer)].set_announcement(now, announcement);
                }
                Action::ProbeUpTo(peer, datagram) => {
                    self.tunnels[index(peer)].set_max_datagram(now, datagram);
                }
                Action::HintMtu(peer, hint) => {
                    self.tunnels[index(peer)].set_mtu_hint(now, hint);
                }
                Action::LookUp { peer, name, turn } => self.look_up(peer, name, turn),
                Action::Call(peer, addr) => {
                    self.called[index(peer)] = Some(addr);
                    self.set_homes(peer);
                    self.tunnels[index(peer)].set_endpoint(now, Some(addr));
                }
                Action::Warn(peer, warning) => self.warn(now, peer, &warning.to_string()),
                Action::Withdraw(peer, warning) => self.withdraw(peer, &warning.to_string()),
            }
        }
        if inside {
            self.serve_inside(now);
        }
    }

    /// Logs where packets of a peer are delivered, whenever that changes.
    fn tell_of_delivery(&mut self, peer: PeerId, delivery: &Delivery) {
        let to = (delivery.v4, delivery.v6);
        let before = self.delivering[index(peer)].replace(delivery.clone());
        let before = before.map(|before| (before.v4, before.v6));
        if delivery.keep || before == Some(to) {
            return;
        }
        let name = |addr: Option<IpAddr>| addr.map_or_else(|| "-".into(), |addr| addr.to_string());
        let (v4, v6) = (name(to.0.map(IpAddr::V4)), name(to.1.map(IpAddr::V6)));
        let peer = self.policy.name(peer);
        // One that goes for a moment, as its interface is made anew, is not another one.
        let replaced = before.is_some_and(|(v4, v6)| {
            let v4 = v4.zip(to.0).is_some_and(|(before, after)| before != after);
            v4 || v6.zip(to.1).is_some_and(|(before, after)| before != after)
        });
        if replaced {
            warn!(
                peer,
                v4, v6, "the delivery address has changed; name one with --deliver-to to keep it"
            );
        } else {
            info!(peer, v4, v6, "delivering to these addresses of this server");
        }
    }

    /// Takes these moved addresses, for which `--deliver-to keep` leaves packets as they are, and
    /// lets go of all others. What cannot be done for one family is done for the other.
    fn hold(&mut self, wanted: &[Prefix]) -> Result<(), Cause> {
        let v4 = self.hold_family(Family::V4, wanted);
        let v6 = self.hold_family(Family::V6, wanted);
        v4.and(v6)
    }

    fn hold_family(&mut self, family: Family, wanted: &[Prefix]) -> Result<(), Cause> {
        let of_family = |prefix: &&Prefix| Family::of(prefix.first()) == family;
        let wanted: Vec<Prefix> = wanted.iter().filter(of_family).copied().collect();
        let desired = keep::plan(self.host.netlink(), &wanted, &self.tun, self.host.made())?;
        let part = |change: &Change| keep::is_part_for(change, family);
        let report = self.host.reconcile_part(part, desired)?;
        for change in report.undone {
            info!(%change, "undone");
        }
        for failure in report.left {
            warn!(change = %failure.change, reason = failure.reason, "cannot undo a kernel change");
        }
        Ok(())
    }

    /// Finds the calls from inside that an earlier daemon carried.
    fn find_calls(&mut self) {
        if let Some(steering) = self.follower.steering() {
            let found = steering.calls_from_inside();
            // Without them a caller's own packets begin a flow again, where they can.
            self.calls = found.unwrap_or_default();
        }
    }

    /// Lets those inside have what is served: this host, and those behind it.
    fn serve_inside(&mut self, now: Instant) {
        self.name_ports(now);
        // What the old server serves as yet is reached there, as by anybody else.
        let mut of_peers = self.policy.served_inside();
        for (peer, moves) in (0..).map(PeerId).zip(&mut of_peers) {
            moves.retain(|moved| !self.theirs.of(peer, moved).is_there());
        }
        let translator = self.view.forwarder.translator();
        let Some((steering, translator)) = self.follower.steering().zip(translator) else {
            return;
        };
        let peers = of_peers.iter().zip(&self.delivering);
        let peers = peers.filter_map(|(moves, to)| to.as_ref().map(|to| PeerTargets { moves, to }));
        let targets: Vec<PeerTargets<'_>> = peers.collect();
        if let Err(error) = steering.deliver_own_calls(&targets) {
            let text =
                format!("this server's own calls reach no moved address that is new: {error}");
            self.warnings.warn(now, text);
        }
        match steering.serve_inside(&of_peers) {
            Ok(left_out) => {
                for peer in self
                    .policy
                    .peers()
                    .filter(|&it| left_out.contains(&index(it)))
                {
                    let text = format!(
                        "{} moves more addresses, or more different ports, than this server and \
                         its containers can reach here; those that are too many they reach where \
                         they lead to without ipmoved: move whole addresses or prefixes",
                        self.policy.name(peer)
                    );
                    self.warnings.warn(now, text);
                }
            }
            Err(error) => {
                let text = format!(
                    "this server and its containers do not reach every moved address here: {error}"
                );
                self.warnings.warn(now, text);
            }
        }
        translator.restore_calls(now, &mut self.calls);
    }

    fn set_tun_mtu(&mut self, now: Instant, mtu: u32) {
        let interface = &self.tun.name;
        match self.netlink.set_link_mtu(self.tun.index, mtu) {
            Ok(()) => self.policy.handle(now, Input::TunMtu(mtu)),
            Err(error) => {
                let text = format!("cannot set the MTU of {interface} to {mtu}: {error}");
                self.warnings.warn(now, text);
            }
        }
    }

    /// Looks a name up on a thread of its own, since a resolver may take long.
    fn look_up(&self, peer: PeerId, name: PeerAddr, turn: usize) {
        let names = self.names.clone();
        tokio::task::spawn_blocking(move || {
            // Nobody receives the result if the daemon is ending.
            let found = resolve(&name, turn);
            let _ = names.blocking_send((peer, name, found));
        });
    }

    // What the kernel says.

    /// Looks at everything of this server that may have changed, and goes along with it.
    fn look(&mut self, now: Instant) {
        self.next_look = now + LOOK_EVERY;
        let Some(held) = self.list_addresses() else {
            return;
        };
        let peers = self.policy.peers();
        let peers: Vec<IpAddr> = peers.filter_map(|peer| self.address_of(peer)).collect();
        let (host, known) = (&mut *self.host, &mut self.warnings);
        let led_out = self.follower.leads_out();
        let other_links = self.follower.look(now, host, &peers, &held, known);
        if self.follower.leads_out() && !led_out {
            self.policy.handle(now, Input::WayOut);
        }
        // Which of them are the uplinks' has only become clear now.
        self.have_addresses(now, &held);
        let (host, known) = (&mut *self.host, &mut self.warnings);
        let broken = self.repairer.repair(now, host, known);
        self.follower.plan_again(now, host, &broken, known);
        if let Some(wanted) = self.holding.clone().filter(|_| other_links) {
            // Links that are new have to keep quiet about these addresses, too.
            let result = self.hold(&wanted).map_err(|error| error.to_string());
            self.policy.handle(now, Input::Held(result));
        }
        let mtu = self.follower.uplinks().mtu();
        self.policy.handle(now, Input::UplinkMtu(mtu));
        self.look_at_awaited(now, &held);
        self.carry_out(now);
        let steering = self.follower.steering();
        if steering.is_some_and(|steering| steering.inherits_inside()) {
            self.serve_inside(now);
        }
        self.next_path = now;
    }

    /// Looks whether what this server did not have at the start has come.
    fn look_at_awaited(&mut self, now: Instant, held: &[Address]) {
        let Some(awaited) = &mut self.awaited else {
            return;
        };
        let leads_out = self.follower.leads_out();
        let (netlink, known) = (&self.netlink, &mut self.warnings);
        match awaited.look(now, netlink, held, leads_out, &self.called, known) {
            Ok(all) if all => self.awaited = None,
            Ok(_) => {}
            Err(error) => self.fault = Some(error),
        }
    }

    /// Where a peer was heard, or else where the settings say that it is.
    fn address_of(&self, peer: PeerId) -> Option<IpAddr> {
        let heard = self.view.peers[index(peer)].endpoint;
        let known = heard.map(|at| at.remote).or(self.called[index(peer)]);
        known.map(|addr| addr.ip())
    }

    /// Learns whether a route leads to a peer. As soon as one does, the peer is called.
    fn has_route(&mut self, now: Instant, peer: PeerId, leads: bool) {
        let before = std::mem::replace(&mut self.reachable[index(peer)], leads);
        if leads && !before {
            self.tunnels[index(peer)].hurry(now);
        }
    }

    /// Looks at this server's addresses, and on the new server at its networks and the hosts that
    /// it needs. No client may claim one of the addresses as its source. On the old server nothing
    /// is let out to them, and ICMP replies are sent from them.
    fn look_at_addresses(&mut self, now: Instant) {
        self.read_addresses(now);
        self.carry_out(now);
    }

    /// Lists the addresses anew, since the new server is about to choose one to deliver to.
    fn look_before_choosing(&mut self, now: Instant) {
        if self.role == Role::New {
            self.look_at_addresses(now);
        }
    }

    /// The address that this server speaks from to somebody there: the one of `--listen`, or the
    /// one that the kernel prefers.
    fn speaks_from(&self, to: IpAddr) -> Option<IpAddr> {
        let listen = self.listen.filter(|ip| !ip.is_unspecified());
        listen.or_else(|| self.netlink.route_get(to, None, None).ok()?.prefsrc)
    }

    fn read_addresses(&mut self, now: Instant) {
        if let Some(held) = self.list_addresses() {
            self.have_addresses(now, &held);
        }
    }

    fn list_addresses(&self) -> Option<Vec<Address>> {
        let held = self.netlink.addresses();
        held.map_err(|error| warn!(%error, "cannot list this server's addresses"))
            .ok()
    }

    fn have_addresses(&mut self, now: Instant, held: &[Address]) {
        let uplinks = self.follower.uplinks();
        let addresses = match self.role {
            Role::Old => Facts::addresses(held, uplinks),
            Role::New => {
                let kept = keep::held(self.host.made()).collect();
                let ways_out = self.follower.ways_out();
                (self.facts).read(&self.netlink, held, uplinks, ways_out, &self.tun, kept)
            }
        };
        self.policy.handle(now, Input::Addresses(addresses));
        if let Some(text) = self.facts.warning() {
            self.warnings.warn(now, text);
        }
    }

    /// Looks for clients that claimed to be in a network of this server's own, and for answers from
    /// ports that have not moved.
    fn look_at_refused_sources(&mut self, now: Instant) {
        if let Some(translator) = self.view.forwarder.translator() {
            for (peer, refused) in translator.take_refused_sources() {
                self.policy.handle(now, Input::RefusedSource(peer, refused));
            }
            for (peer, unmoved) in translator.take_unmoved_ports() {
                self.policy.handle(now, Input::UnmovedPort(peer, unmoved));
            }
        }
    }

    /// Serves these moves. What began here under an earlier daemon goes on.
    fn serve_moves(&mut self, now: Instant, peer: PeerId, moves: &[Move]) {
        let Some(translator) = self.view.forwarder.translator() else {
            return;
        };
        let handed = self.inherited.remove(&peer).unwrap_or_default();
        let resumed = &mut self.resumed[index(peer)];
        if *resumed || self.policy.outgoing(peer).is_empty() {
            translator.set_moves_again(now, peer, moves, &handed, &[]);
            return;
        }
        *resumed = true;
        let rules = self.policy.outgoing_rules(peer);
        // Where the address is kept, a client's flow and one that began here look alike.
        let keeps = self.policy.keeps(peer);
        let moved = Scopes::new(moves);
        // Few flows are left of a million that clients may have.
        let wanted = |flow: &HostFlow| {
            let (local, remote) = (flow.local, flow.remote);
            !keeps && moved.contains(local.ip())
                || (rules.by_port.iter())
                    .any(|rule| rule.ports.takes(flow.protocol, local.port(), remote.port()))
        };
        let earlier = self.follower.steering().map(|it| it.earlier_flows(wanted));
        let flows = earlier.transpose().unwrap_or_else(|error| {
            warn!(%error, "connections that began here before a crash may end");
            None
        });
        let flows = flows.unwrap_or_default();
        translator.set_moves_again(now, peer, moves, &handed, &flows);
    }

    /// Tells the programs from which UDP ports this host speaks for what has moved.
    fn name_ports(&mut self, now: Instant) {
        let named = |peer| named_ports(self.policy.moves(peer).iter(), self.policy.maps(peer));
        let ports = self.policy.peers().flat_map(named).collect();
        let told = (self.follower.steering()).map(|it| it.name_ports(&ports));
        if let Some(Err(error)) = told {
            let text = format!("the programs do not know which ports have moved here: {error}");
            self.warnings.warn(now, text);
        }
    }

    /// Tells the programs what addresses are.
    fn set_places(&mut self, now: Instant, places: &BTreeMap<Prefix, Place>, complete: bool) {
        let result = self
            .follower
            .steering()
            .map(|it| it.set_places(places, complete));
        if let Some(Err(error)) = result {
            let text = format!("the programs do not know what has moved here: {error}");
            self.warnings.warn(now, text);
        }
    }

    /// Looks for packets that were to leave from a moved address and may not, and for control
    /// groups that came or went.
    fn look_at_outgoing(&mut self, now: Instant) {
        if let Some(translator) = self.view.forwarder.translator() {
            for (peer, refused) in translator.take_refused_outgoing() {
                (self.policy).handle(now, Input::RefusedOutgoing(peer, refused));
            }
        }
        if let Some(steering) = self.follower.steering()
            && let Err(error) = self.cgroups.look(steering)
        {
            let text = format!("the programs do not know a control group of --outgoing: {error}");
            self.warnings.warn(now, text);
        }
    }

    /// Looks at how large a packet the route to a peer takes: the tunnel's probes go up to that
    /// size. What the kernel has learned from ICMP errors is no more than a hint for them.
    fn look_at_route(&mut self, now: Instant, peer: PeerId) {
        let Some(to) = self.address_of(peer) else {
            return;
        };
        let local = self.view.peers[index(peer)]
            .endpoint
            .and_then(|at| at.local);
        let route = self.netlink.route_get(to, None, local);
        let route = route.or_else(|_| self.netlink.route_get(to, None, None));
        self.has_route(now, peer, route.is_ok());
        let Ok(route) = route else {
            return;
        };
        let size = RouteSize {
            route: route.mtu,
            learned: route.learned_mtu,
            link: route.oif.and_then(|oif| self.link_mtu(oif)),
        };
        self.see(now, Input::Route(peer, size));
        self.set_mtu(peer);
    }

    /// The MTU of an interface. The kernel is asked once a second for all peers.
    fn link_mtu(&mut self, index: u32) -> Option<u32> {
        let known = self.link_mtus.iter().find(|(known, _)| *known == index);
        if let Some((_, mtu)) = known {
            return *mtu;
        }
        let link = self.netlink.link_by_index(index).ok().flatten();
        let mtu = link.map(|link| link.mtu);
        self.link_mtus.push((index, mtu));
        mtu
    }

    /// Makes the kernel forget the flows that ended, and counts what its programs dropped.
    fn look_at_flows(&mut self, now: Instant) {
        let translator = self.view.forwarder.translator();
        if let Some((reason, packets)) = self.follower.take_captures_drops() {
            self.shared.drops.add(reason, packets);
        }
        let steering = self.follower.steering();
        let Some((steering, translator)) = steering.zip(translator) else {
            return;
        };
        let mut ended = Vec::new();
        let untold = translator.take_ended(&mut ended);
        let knows = |flow: &HostFlow| translator.knows(flow);
        let mut result = steering.forget(&ended, untold > 0, knows);
        if now >= self.next_sweep {
            self.next_sweep = now + SWEEP_EVERY;
            result = result.and_then(|()| steering.sweep(knows));
        }
        for (reason, packets) in steering.take_drops() {
            self.shared.drops.add(reason, packets);
        }
        if let Err(error) = result {
            let text = format!("the kernel remembers flows that have ended: {error}");
            self.warnings.warn(now, text);
        }
    }

    /// Looks what became of clients' conversations, and why some are not answered.
    fn look_at_silence(&mut self, now: Instant) {
        for peer in self.policy.peers() {
            let seen = self.view.forwarder.observe(now, peer);
            let heard = self.tunnels[index(peer)].last_heard();
            let named = self.policy.named(peer);
            self.silence.observe(now, peer, &named, heard, seen);
        }
        let around = Around {
            policy: &self.policy,
            drops: &self.shared.drops,
            netlink: &self.netlink,
            follower: &self.follower,
            translator: self.view.forwarder.translator(),
        };
        for (peer, said) in self.silence.judge(now, &around) {
            self.told.iter_mut().for_each(|told| told.hurry(now));
            match said {
                Said::Warning(text) => self.warn(now, peer, &text),
                Said::Changed(before, text) => {
                    self.withdraw(peer, &before);
                    self.warn(now, peer, &text);
                }
                Said::Well(what, warning) => {
                    self.withdraw(peer, &warning);
                    let name = self.policy.name(peer);
                    if self.warnings.may_log(now, peer) {
                        info!(peer = name, what, "well again");
                    }
                }
            }
        }
        for peer in self.policy.peers() {
            let news = self.silence.news(now, peer);
            self.tunnels[index(peer)].set_news(now, &news);
        }
    }

    /// Carries out what a command asks for.
    fn order(&mut self, now: Instant, order: Order) {
        let (who, request, answer) = match order {
            Order::Gone(connection) => {
                self.asks.gone(connection);
                if self.orders.as_mut().is_some_and(|it| it.gone(connection)) {
                    self.set_modes(now);
                }
                return;
            }
            Order::Request {
                request: Request::Reload,
                answer,
                ..
            } => return self.reload(Some(answer)),
            Order::Request {
                who,
                request,
                answer,
            } => (who, request, answer),
        };
        let not_here = self.not_here();
        let Some(orders) = &mut self.orders else {
            let _ = answer.send(not_here);
            return;
        };
        let CarriedOut {
            answer: mut said,
            kept,
        } = orders.carry_out(who, &request);
        if let (Answer::Done { forgotten, .. }, Request::Forget { .. }) = (&mut said, &request) {
            *forgotten = self.follower.forget_own(orders.takes(&request));
        }
        if let (Answer::Done { .. }, Request::Cutover { asks, .. }) = (&said, &request) {
            for asked in asks {
                if let Some(peer) = orders.peer_of(asked) {
                    self.asks.want(now, who.connection, peer, *asked);
                }
            }
        }
        let untold = self.set_modes(now);
        if let Answer::Done { warnings, .. } = &mut said {
            warnings.extend(untold);
            if matches!(request, Request::Move { .. }) {
                warnings.extend(self.unreachable(&request));
            }
        }
        tokio::spawn(async move {
            let kept = match kept {
                Some(kept) => tokio::time::timeout(keeper::PATIENCE, kept).await,
                None => Ok(Ok(Ok(()))),
            };
            let why = match kept {
                Ok(Ok(Ok(()))) => None,
                Ok(Ok(Err(why))) => Some(why),
                // Nobody keeps it any more, or not in time.
                Ok(Err(_)) | Err(_) => Some("the disk does not answer".into()),
            };
            if let (Some(why), Answer::Done { warnings, .. }) = (why, &mut said) {
                warnings.push(format!("a restart forgets this: {why}"));
            }
            // Whoever asked may have gone meanwhile.
            let _ = answer.send(said);
        });
    }

    /// Answers a peer that asks whether something listens here.
    fn answer(&mut self, now: Instant, peer: PeerId, asks: Vec<Asked>) {
        let found = delivering(&mut self.follower, &self.view.forwarder);
        let Some((links, steering, translator)) = found else {
            return;
        };
        let told = self.asks.answer(
            now,
            peer,
            asks,
            |asked| translator.delivered(peer, asked),
            |protocol, end| steering.listens(protocol, end, &links),
            |v4| look::forwards(v4).unwrap_or(false),
        );
        if !told.is_empty() {
            self.tunnels[index(peer)].tell(now, &told);
        }
    }

    /// What those are told who give a command to the wrong server.
    fn not_here(&self) -> Answer {
        let peers = self.policy.peers().map(|peer| self.policy.name(peer));
        let peer = peers.into_iter().next().unwrap_or_default();
        Answer::Refused {
            input: true,
            why: format!("this is the new server; run it on the old server ({peer})"),
        }
    }

    /// What those have to know who move something to a server that is not there.
    fn unreachable(&self, request: &Request) -> Option<String> {
        let about = self.orders.as_ref()?.about(request);
        let is_away = |peer: &PeerId| self.policy.state(*peer) != State::Up;
        let peer = about.into_iter().map(|(peer, _)| peer).find(is_away)?;
        if self.tunnels[index(peer)].stopped().is_some() {
            return Some(format!(
                "the daemon of the new server {} is stopped, and what has moved there does not \
                 answer until it runs again; `ipmoved back` rolls back",
                self.policy.name(peer)
            ));
        }
        Some(format!(
            "the new server {} does not answer, and neither do moved addresses until it does; \
             `ipmoved back` rolls back",
            self.policy.name(peer)
        ))
    }

    /// Tells the data path who answers new conversations: those who judge first, then those who
    /// hand over, and last those who let go what waits. Returns what is to be said if that fails.
    fn set_modes(&mut self, now: Instant) -> Option<String> {
        let orders = self.orders.as_ref()?;
        let modes = orders.modes_at(now);
        self.tell_gates(now, orders, &modes);
        for peer in self.policy.peers() {
            let of_peer = modes.iter().filter(|(of, _)| *of == peer);
            let names = self.policy.moves(peer).iter().map(MoveName::of);
            let told: Vec<_> = names.zip(of_peer.map(|(_, mode)| mode.told())).collect();
            self.tunnels[index(peer)].set_modes(now, &told);
        }
        let (mut for_programs, key) = (orders.modes(), orders.key());
        self.modes_again = None;
        // Where this server itself answers, programs would let what comes now overtake what has
        // waited: they hand it over for a little longer.
        let waiting = self.shared.holding.waiting();
        for (mode, waiting) in for_programs.iter_mut().zip(waiting) {
            if waiting > 0 && mode.held_until.is_none() && mode.settled.percent() < 100 {
                mode.held_until = Some(programs::now() + RELEASED);
                self.modes_again = Some(now + RELEASED_EVERY);
            }
        }
        let untold = (self.follower).set_modes(now, &for_programs, key, &mut self.warnings);
        let all: Vec<_> = modes.into_iter().map(|(_, mode)| mode).collect();
        self.shared.holding.set_modes(&all);
        untold
    }

    /// The same, but for the programs.
    fn set_modes_of_gates(&self, now: Instant) {
        if let Some(orders) = &self.orders {
            let modes = orders.modes_at(now);
            self.tell_gates(Instant::now(), orders, &modes);
            let all: Vec<_> = modes.into_iter().map(|(_, mode)| mode).collect();
            self.shared.holding.set_modes(&all);
        }
    }

    /// Tells those who judge.
    fn tell_gates(&self, now: Instant, orders: &Orders, modes: &[(PeerId, Mode<Instant>)]) {
        let shields = orders.shields_at(now);
        for peer in self.policy.peers() {
            let of_peer = shields.iter().filter(|(of, _)| *of == peer);
            let of_peer: Vec<_> = of_peer.map(|(_, until)| *until).collect();
            self.view.forwarder.set_shields(peer, &of_peer);
            let of_peer = modes.iter().filter(|(of, _)| *of == peer);
            let of_peer: Vec<_> = of_peer.map(|(_, mode)| *mode).collect();
            (self.view.forwarder).set_modes(peer, &of_peer, orders.key());
        }
    }

    /// Tells the modes again, once nothing is left of what waited and is no longer held.
    fn set_modes_again(&mut self, now: Instant) {
        let waiting = self.shared.holding.waiting();
        let mut modes = self.orders.iter().flat_map(Orders::modes).zip(waiting);
        if modes.any(|(mode, waiting)| mode.held_until.is_none() && waiting > 0) {
            self.modes_again = Some(now + RELEASED_EVERY);
        } else {
            self.set_modes(now);
        }
    }

    /// Looks how far what is served here has come, and tells whoever has moved it.
    fn look_at_progress(&mut self, now: Instant) {
        let found = delivering(&mut self.follower, &self.view.forwarder);
        let Some((links, steering, translator)) = found else {
            return;
        };
        let places = (0..self.tunnels.len() as u16).map(PeerId);
        let moves: Vec<_> = places.map(|peer| self.policy.moves(peer)).collect();
        let told = (self.progress).look(now, steering, &links, translator, &moves);
        for (tunnel, told) in self.tunnels.iter_mut().zip(told) {
            tunnel.set_progress(now, &told);
        }
    }

    /// Tells the lanes how large a packet may be to fit one datagram to a peer.
    fn set_mtu(&mut self, peer: PeerId) {
        let mtu = tunnel_mtu(self.tunnels[index(peer)].path_mtu());
        let view = &mut self.view.peers[index(peer)];
        if view.mtu != mtu {
            view.mtu = mtu;
            self.view_changed = true;
        }
    }

    // What people see.

    /// Logs what this daemon is once it has started, so that a refusal stands alone on its line.
    fn announce_start(&mut self, warnings: Vec<String>) {
        for text in warnings {
            if self.warnings.keep(self.started, text.clone()) {
                warn!(warning = %text, "an administrator should know");
            }
        }
        let uplink = self.follower.uplink_name();
        for peer in self.policy.peers() {
            let name = self.policy.name(peer);
            match self.role {
                Role::Old => {
                    let moved = report::in_short(self.policy.moves(peer));
                    info!(moved, uplink, peer = name, "this is the old server");
                }
                Role::New => info!(uplink, peer = name, "this is the new server"),
            }
        }
    }

    fn warn(&mut self, now: Instant, peer: PeerId, text: &str) {
        let name = self.policy.name(peer);
        let line = format!("{name}: {text}");
        if self.warnings.keep_of(now, peer, line) {
            warn!(peer = name, warning = %text, "an administrator should know");
        }
    }

    /// What [`warn`](Self::warn) said is no longer so.
    fn withdraw(&mut self, peer: PeerId, text: &str) {
        let line = format!("{}: {text}", self.policy.name(peer));
        self.warnings.withdraw(peer, &line);
    }

    /// Says how many lines about a peer were not logged because they were too many.
    fn tell_unlogged(&mut self, now: Instant) {
        for (peer, lines) in self.warnings.take_unlogged(now) {
            let name = self.policy.name(peer);
            warn!(
                peer = name,
                lines, "more lines about this peer were not logged"
            );
        }
    }

    /// The state of things in one line, for the service manager.
    fn first_line(&self, now: Instant) -> String {
        let text = self.status(now).to_text();
        text.lines().next().unwrap_or_default().to_owned()
    }

    /// The status, with what the old server still has.
    fn status_now(&mut self) -> Status {
        let now = Instant::now();
        if let Some(orders) = &mut self.orders {
            orders.count(now, || self.follower.own_conversations());
        }
        self.status(now)
    }

    fn status(&self, now: Instant) -> Status {
        let mut offloads = self.offloads;
        offloads.udp_gso_fallbacks = self.udp.gso_fallbacks();
        for lane in &self.counters {
            offloads.tun_gso_fallbacks += lane.tun_gso_fallbacks.load(Relaxed);
            offloads.tun_big_tcp &= !lane.big_tcp_refused.load(Relaxed);
        }
        let daemon = report::Daemon {
            tun: self.tun.name.clone(),
            port: self.udp.port().unwrap_or_default(),
            up: now.duration_since(self.started),
            warnings: {
                let lines = self.warnings.lines();
                let troubles = self.orders.iter().flat_map(Orders::troubles);
                let mut all: Vec<String> = troubles.filter(|it| !lines.contains(it)).collect();
                all.extend(lines);
                all
            },
            log_lines_lost: log::lost(),
            stayed: self.follower.stayed(),
            own_full: self.follower.own_full(),
            unrecorded: (self.visitors.as_ref()).map_or(0, |visitors| visitors.unrecorded()),
            unwritten: (self.visitors.as_ref())
                .map_or(0, |visitors| visitors.unwritten(&self.view.forwarder)),
        };
        let waiting = match self.role {
            Role::Old => self.shared.holding.waiting(),
            Role::New => Vec::new(),
        };
        let peers = self
            .policy
            .peers()
            .map(|peer| self.known(now, peer, &waiting));
        report::tunnels(
            daemon,
            peers.collect(),
            offloads,
            &self.counters,
            &self.shared.drops,
        )
    }

    /// The modes of a peer's moves, for its status.
    fn modes(&self, peer: PeerId, waiting: &[u64]) -> Vec<ModeStatus> {
        let Some(orders) = &self.orders else {
            return Vec::new();
        };
        let progress = self.progress.of(peer).into_iter();
        let live: HashMap<String, u64> = progress.map(|of| (of.what, of.progress.live)).collect();
        let mut modes = orders.status(peer, waiting);
        for mode in &mut modes {
            mode.there_live = live.get(&mode.what).copied();
        }
        modes
    }

    /// The facts about a peer, for its status.
    fn known(&self, now: Instant, peer: PeerId, waiting: &[u64]) -> report::Peer<'_> {
        let (view, tunnel) = (&self.view.peers[index(peer)], &self.tunnels[index(peer)]);
        let session = tunnel.session().map(|session| {
            let age = now.saturating_duration_since(session.created());
            (session.cipher().to_string(), age)
        });
        let maps = self.policy.maps(peer).iter();
        report::Peer {
            index: index(peer),
            name: self.policy.name(peer),
            role: self.role,
            endpoint: view.endpoint.map(|endpoint| endpoint.remote),
            state: self.policy.state(peer),
            session,
            rtt: tunnel.rtt(),
            mtu: view.mtu,
            mtu_hints: tunnel.mtu_hints(),
            unheard: tunnel.unheard(now),
            stopped: (tunnel.stopped()).map(|at| now.saturating_duration_since(at)),
            served: self.silence.served(now, peer),
            progress: self.progress.of(peer),
            looked_for: self.asks.of(peer),
            peer_modes: match self.role {
                Role::Old => Vec::new(),
                Role::New => self.theirs.status(peer, self.policy.moves(peer)),
            },
            moves: self.policy.moves(peer),
            modes: self.modes(peer, waiting),
            deliver: self.policy.delivery(peer),
            maps: maps.map(ToString::to_string).collect(),
            flows: self.view.forwarder.flow_stats(peer),
            accept: self.policy.accept(peer),
            clients_from: self.policy.clients_from(peer),
            outgoing: self.policy.outgoing(peer),
            allow_outgoing: self.policy.allow_outgoing(peer),
            lets_out: self.policy.lets_out(peer),
            refused: self.policy.refusals(peer),
            refused_moves: self.policy.refused_moves(peer),
            drops: &self.shared.peer_drops[index(peer)],
        }
    }

    // The end.

    /// Says goodbye to every peer. What is in the kernel is then undone, unless that is left to the
    /// next start.
    fn close(&mut self, undoes: bool) {
        let now = Instant::now();
        for tunnel in &mut self.tunnels {
            tunnel.close(now);
        }
        // If a goodbye is lost, the peer notices the silence.
        self.send_all(now);
        if let Some(visitors) = &mut *self.visitors {
            visitors.read(now, &self.follower);
            visitors.end(now, &self.view.forwarder);
        }
        if let Some(orders) = &mut self.orders {
            if undoes {
                orders.let_go();
            }
            orders.end_keeping();
        }
    }
}

/// Sends a tunnel's datagram, and tells the tunnel if a probe was too big for the kernel. It never
/// waits: one that the socket has no room for is lost, and sent again when its reply does not come.
fn send(udp: &UdpSocket, now: Instant, tunnel: &mut Tunnel, transmit: &Transmit, drops: &Drops) {
    let datagram = &transmit.datagram;
    match udp.send(&transmit.to, 0, datagram, datagram.len(), WhenFull::GiveUp) {
        Err(error) if transmit.probe && error.raw_os_error() == Some(libc::EMSGSIZE) => {
            tunnel.probe_refused(now, datagram.len());
        }
        Err(error) if error.kind() == ErrorKind::WouldBlock => {
            drops.count(DropReason::ControlUnsent);
        }
        Err(error) => debug!(to = %transmit.to.remote, %error, "sending failed"),
        Ok(()) => {}
    }
}
