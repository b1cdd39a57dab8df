//! Takes a changed configuration while packets are carried.
//!
//! ```text
//! SIGHUP, `ipmoved reload` ─► reload ─► prepare, on a thread of its own:
//!                                       read, judge, make what the kernel has to have
//!                                          │ why not: nothing has changed
//!                                          ▼
//!              answer, log ◄─ apply ◄─ take_prepared
//! ```
//!
//! Owns the order of things. Whatever can be refused is refused by [`prepare`], which changes
//! nothing; what [`Control::apply`] then does for each peer cannot be. Packets wait for none of it:
//! lanes are given another view, and programs on links are replaced one by the other.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket as Knock};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};
use tracing::{info, warn};

use super::{Control, PeerRules, TunnelMaker, index, several_begin, timers};
use crate::channel::session::{Offer, PeerKeys};
use crate::channel::wire::{LANE_AT, TYPE_DATA};
use crate::daemon::chosen::{Cgroups, chosen};
use crate::daemon::early::{Awaited, PeerTerms, Terms};
use crate::daemon::follow::{LinkSettings, Programs};
use crate::daemon::forge::{Forge, Made, Wanted};
use crate::daemon::gates::{Before, Gates, Part};
use crate::daemon::kept;
use crate::daemon::policy::reload::{Plan, Running, Step};
use crate::daemon::service::{notify_ready, notify_reloading};
use crate::daemon::setup::{check_new, check_old, resolve};
use crate::daemon::visitors::Visitors;
use crate::flow::class::TCP_ESTABLISHED;
use crate::flow::modes::Taken;
use crate::flow::role::Forwarder;
use crate::kernel::netlink::Netlink;
use crate::kernel::programs::Chosen;
use crate::kernel::steer::Remade;
use crate::kernel::supplied;
use crate::model::moved::Move;
use crate::model::peer::{PeerId, Role};
use crate::model::request::Answer;
use crate::model::scopes::Scopes;
use crate::settings::config::{ClientLog, Config, PeerConfig};
use crate::settings::values::{DeliverTo, PeerAddr};

/// Where the forge has made something else than the daemon asked for.
const OTHERS: &str = "the programs that were made are others than those that are wanted";

/// How long a lane and the kernel may take to deliver a packet that has begun a flow.
const IN_HAND: Duration = Duration::from_millis(20);

/// How long a session may take that is made with the earlier keys, before others are used: then
/// both servers have the longest time to change them.
const LAST_WITH_EARLIER: Duration = Duration::from_secs(3);

/// What leaves is looked at once it cannot have begun anew for so long.
const LEAVES_AFTER: Duration = Duration::from_secs(2);

/// How long after that has failed it is tried again.
const LEAVES_AGAIN: Duration = Duration::from_secs(60);

/// The configuration that runs, and what becomes of another one.
#[derive(Debug)]
pub(super) struct Reloads {
    /// `None` if it could not be started.
    forge: Option<Forge>,
    running: Running,
    /// What leaves through the tunnel because of its port (new server).
    chosen: Vec<Chosen>,
    /// One is being prepared; who waits for it.
    busy: Option<Vec<oneshot::Sender<Answer>>>,
    /// Who asked meanwhile: the files may have changed since they were read.
    again: Option<Vec<oneshot::Sender<Answer>>>,
    prepared: mpsc::Sender<Prepared>,
    /// Keys that are yet to be used.
    keys: Vec<Rotation>,
    /// Since when something leaves.
    leaves_since: Option<Instant>,
}

/// Other keys of a peer.
#[derive(Debug)]
struct Rotation {
    peer: PeerId,
    keys: PeerKeys,
    since: Instant,
}

/// What came of preparing a configuration.
pub(super) struct Prepared(Result<Ready, String>);

/// What is ready to be applied.
struct Ready {
    plan: Plan,
    wanted: Wanted,
    made: Made,
    chosen: Vec<Chosen>,
    cgroups: Cgroups,
    /// Where peers are, as far as their names were looked up just now.
    endpoints: HashMap<PeerId, SocketAddr>,
    warnings: Vec<String>,
}

/// What preparing needs to know.
struct Terrain {
    forge: Forge,
    running: Running,
    chosen: Vec<Chosen>,
    lanes: usize,
    port: u16,
    called: Vec<Option<SocketAddr>>,
}

impl Reloads {
    /// For a daemon that starts with this configuration. The other end receives what is prepared.
    pub(super) fn new(
        forge: Option<Forge>,
        config: &Config,
        chosen: Vec<Chosen>,
    ) -> (Self, mpsc::Receiver<Prepared>) {
        let (prepared, receiver) = mpsc::channel(1);
        let reloads = Self {
            forge,
            running: Running::new(config),
            chosen,
            busy: None,
            again: None,
            prepared,
            keys: Vec::new(),
            leaves_since: (!config.leaving.is_empty()).then(Instant::now),
        };
        (reloads, receiver)
    }

    /// Why no daemon can take over at present.
    pub(super) fn forbids_handover(&self) -> Option<&'static str> {
        if self.busy.is_some() || !self.keys.is_empty() {
            return Some("the configuration is being read again: wait until that is over");
        }
        None
    }

    /// When something is due.
    pub(super) fn next(&self) -> Option<Instant> {
        let due = self.keys.iter().map(|it| it.since + LAST_WITH_EARLIER);
        due.min()
    }
}

/// Reads the configuration, and makes all that it wants of the kernel. Nothing is changed.
fn prepare(terrain: &Terrain) -> Result<Ready, String> {
    let Terrain {
        forge,
        running,
        lanes,
        port,
        called,
        ..
    } = terrain;
    let files = forge.read()?;
    let config = Config::again(&running.config.given, &files).map_err(|it| it.to_string())?;
    let mut plan = running.plan(&config)?;
    let text = |error: &dyn std::error::Error| error.to_string();
    let (chosen, cgroups) = chosen(&config, &files).map_err(|error| text(&error))?;
    let mut endpoints = HashMap::new();
    let mut warnings = config.warnings.clone();
    for (id, step) in &plan.steps {
        let (before, after) = match step {
            Step::Ends => continue,
            Step::Begins(peer) => (None, &**peer),
            Step::Changes { before, after } => (before.endpoint.as_ref(), &**after),
        };
        let Some(named) = after.endpoint.as_ref().filter(|it| before != Some(*it)) else {
            continue;
        };
        match resolve(named, 0) {
            Ok(found) => drop(endpoints.insert(*id, found)),
            Err(error) => warnings.push(format!("{error}; trying again")),
        }
    }
    if !plan.steps.is_empty() {
        let at = |id: PeerId| endpoints.get(&id).copied();
        let known = |id: PeerId| at(id).or_else(|| called.get(index(id)).copied().flatten());
        let places = (0..plan.next.peers.len() as u16).map(PeerId);
        let endpoints: Vec<Option<SocketAddr>> = places.map(known).collect();
        let netlink = Netlink::new().map_err(|error| text(&error))?;
        let terms = terms(&plan.next);
        let checked = match config.role {
            Role::Old => {
                check_old(&netlink, &terms, &endpoints).map(|taken| taken.map_or(Ok(()), Err))
            }
            Role::New => check_new(&netlink, &terms).map(Ok),
        };
        checked.map_err(|error| text(&error))??;
    }
    let wants_port = config.listen.port != running.config.listen.port;
    let next_port = if wants_port {
        config.listen.port
    } else {
        *port
    };
    let names = |moves: Vec<Move>| moves.iter().map(ToString::to_string).collect::<Vec<_>>();
    let own_calls = calls_itself(&plan.next);
    let programs = wants_port
        || match config.role {
            Role::Old => {
                plan.next.captured() != running.captured() || plan.next.begin() != running.begin()
            }
            Role::New => {
                chosen != terrain.chosen
                    || config.max_flows != running.config.max_flows
                    || own_calls && !calls_itself(running)
            }
        };
    let mut wanted = Wanted {
        moves: names(plan.next.captured()),
        begin: names(plan.next.begin()),
        programs,
        own_calls,
        sockets: wants_port,
        port: next_port,
    };
    if config.role == Role::New {
        (wanted.moves, wanted.begin) = (Vec::new(), Vec::new());
    }
    let made = match wanted.programs || wanted.sockets {
        true => forge.make(&wanted, *lanes)?,
        false => Made::default(),
    };
    plan.next.config.warnings = Vec::new();
    Ok(Ready {
        plan,
        wanted,
        made,
        chosen,
        cgroups,
        endpoints,
        warnings,
    })
}

/// The same, where nothing has changed but that some moves have left.
fn prepare_leave(terrain: &Terrain, left: &[(PeerId, Move)]) -> Result<Ready, String> {
    let mut next = terrain.running.clone();
    next.leaving.retain(|it| !left.contains(it));
    let mut plan = Plan {
        steps: Vec::new(),
        lines: Vec::new(),
        next,
    };
    for (id, moved) in left {
        let peer = plan.next.peers.get(index(*id)).and_then(Option::as_ref);
        let Some(peer) = peer.map(|peer| Box::new(peer.clone())) else {
            continue;
        };
        plan.lines.push(format!(
            "{moved} has left: the new server has nothing of it any more"
        ));
        let (before, after) = (peer.clone(), peer);
        plan.steps.push((*id, Step::Changes { before, after }));
    }
    plan.steps.dedup_by_key(|(id, _)| *id);
    let names = |moves: Vec<Move>| moves.iter().map(ToString::to_string).collect::<Vec<_>>();
    let wanted = Wanted {
        moves: names(plan.next.captured()),
        begin: names(plan.next.begin()),
        programs: true,
        own_calls: false,
        sockets: false,
        port: terrain.port,
    };
    let made = terrain.forge.make(&wanted, terrain.lanes)?;
    Ok(Ready {
        plan,
        wanted,
        made,
        chosen: Vec::new(),
        cgroups: Cgroups::default(),
        endpoints: HashMap::new(),
        warnings: Vec::new(),
    })
}

/// What the checks of this server's addresses ask for.
fn terms(running: &Running) -> Terms {
    let nothing = || PeerTerms {
        moves: Vec::new(),
        deliver_to: DeliverTo::default(),
        deliver: Vec::new(),
    };
    let of_peer = |peer: &PeerConfig| PeerTerms {
        moves: peer.moves.clone(),
        deliver_to: peer.deliver_to,
        deliver: peer.deliver.clone(),
    };
    let peers = running.peers.iter();
    Terms {
        role: running.config.role,
        listen: running.config.listen.ip,
        peers: peers
            .map(|peer| peer.as_ref().map_or_else(nothing, of_peer))
            .collect(),
    }
}

/// Whether this server's own calls of what is held here for a peer want a program.
fn calls_itself(running: &Running) -> bool {
    let calls = |peer: &PeerConfig| peer.deliver_to != DeliverTo::Keep && !peer.outgoing.is_empty();
    running.each().any(|(_, peer)| calls(peer))
}

impl Control<'_> {
    /// Reads the configuration again. Whoever asks waits for the answer.
    pub(super) fn reload(&mut self, answer: Option<oneshot::Sender<Answer>>) {
        if self.is_leaving {
            let why = "another daemon is about to take over, and reads the configuration itself";
            warn!(why, "not reloaded; everything goes on as before");
            notify_reloading();
            notify_ready(&self.first_line(Instant::now()));
            if let Some(answer) = answer {
                let why = why.into();
                let _ = answer.send(Answer::Refused { input: false, why });
            }
            return;
        }
        if self.reloads.busy.is_some() {
            self.reloads.again.get_or_insert_default().extend(answer);
            return;
        }
        notify_reloading();
        let answers = answer.into_iter().collect();
        self.prepare(answers, prepare);
    }

    /// Prepares on a thread of its own: files may lie on a slow disk, and names take long.
    fn prepare(
        &mut self,
        answers: Vec<oneshot::Sender<Answer>>,
        how: impl FnOnce(&Terrain) -> Result<Ready, String> + Send + 'static,
    ) {
        self.reloads.busy = Some(answers);
        let terrain = self.reloads.forge.clone().map(|forge| Terrain {
            forge,
            running: self.reloads.running.clone(),
            chosen: self.reloads.chosen.clone(),
            lanes: self.lanes,
            port: self.udp.port().unwrap_or_default(),
            called: self.called.clone(),
        });
        let prepared = self.reloads.prepared.clone();
        tokio::task::spawn_blocking(move || {
            let result = match &terrain {
                Some(terrain) => how(terrain),
                None => {
                    Err("nothing here reads the configuration again: restart the daemon".into())
                }
            };
            // Nobody receives it if the daemon is ending.
            let _ = prepared.blocking_send(Prepared(result));
        });
    }

    /// Applies what was prepared, or says why not.
    pub(super) fn take_prepared(&mut self, now: Instant, Prepared(result): Prepared) {
        let answers = self.reloads.busy.take().unwrap_or_default();
        let result = result.and_then(|ready| {
            let (lines, warnings) = (ready.plan.lines.clone(), ready.warnings.clone());
            self.apply(now, ready).map(|()| (lines, warnings))
        });
        let answer = match result {
            Ok((changes, warnings)) => {
                for text in &warnings {
                    self.warnings.warn(now, text.clone());
                }
                match changes.is_empty() {
                    true => info!("the configuration was read again, and is the same"),
                    false => changes.iter().for_each(|change| info!(change, "reloaded")),
                }
                Answer::Reloaded { changes, warnings }
            }
            Err(why) => {
                warn!(why, "not reloaded; everything goes on as before");
                Answer::Refused { input: false, why }
            }
        };
        for asked in answers {
            // Whoever asked may have gone meanwhile.
            let _ = asked.send(answer.clone());
        }
        notify_ready(&self.first_line(now));
        if let Some(waiting) = self.reloads.again.take() {
            notify_reloading();
            self.prepare(waiting, prepare);
        }
    }

    /// Brings everything to where these settings want it.
    ///
    /// # Errors
    /// If it cannot be done; nothing has changed then.
    fn apply(&mut self, now: Instant, ready: Ready) -> Result<(), String> {
        let Ready {
            plan,
            wanted,
            made,
            chosen,
            cgroups,
            endpoints,
            warnings: _,
        } = ready;
        let programs = self.remake(&plan.next, &wanted, made.programs, &chosen)?;
        if let Some(forge) = &self.reloads.forge
            && wanted.programs
        {
            forge.used();
        }
        // From here on nothing is refused.
        let before = std::mem::replace(&mut self.reloads.running, plan.next);
        if self.role == Role::New {
            (self.reloads.chosen, self.cgroups) = (chosen, cgroups);
        }
        self.take_sockets(&before.config, made.sockets);
        let is_new = |(id, step): &(PeerId, Step)| match step {
            Step::Begins(_) => Some(*id),
            Step::Changes { .. } | Step::Ends => None,
        };
        let begun: Vec<PeerId> = plan.steps.iter().filter_map(is_new).collect();
        for (id, step) in plan.steps {
            match step {
                Step::Ends => self.end_peer(now, id),
                Step::Begins(peer) => self.begin_peer(now, id, &peer, endpoints.get(&id).copied()),
                Step::Changes { before, after } => {
                    let at = endpoints.get(&id).copied();
                    self.change_peer(now, id, &before, &after, at);
                }
            }
        }
        let after = &self.reloads.running;
        let (offer, timers) = (
            Offer::of_this_machine(after.config.cipher),
            timers(&after.config),
        );
        for tunnel in &mut self.tunnels {
            tunnel.set_terms(offer, timers);
        }
        if self.awaited.is_some() {
            self.awaited = Some(Awaited::new(terms(after)));
        }
        self.listen = after.config.listen.ip;
        if let Some(translator) = self.view.forwarder.translator() {
            translator.set_max_flows(after.config.max_flows as usize);
        }
        if before.config.client_log != after.config.client_log
            && let Some(visitors) = &mut *self.visitors
        {
            // The gates of now know what is to be told yet.
            visitors.flush(now, &self.view.forwarder);
        }
        let grows = {
            let known: HashSet<Move> = before.captured().into_iter().collect();
            let captured = after.captured();
            captured.iter().any(|moved| !known.contains(moved))
        };
        let after = &self.reloads.running;
        if let Some(orders) = &mut self.orders {
            let names = after.peers.iter();
            let names = names.map(|it| it.as_ref().map(|it| it.keys.name()));
            orders.set_moves(
                after.moves(),
                after.leaving.clone(),
                names.collect(),
                after.config.start,
            );
        }
        // Who judges has to know of more before programs hand it over, and of less afterwards.
        let taken = match &programs {
            Some(Programs::Old(capture)) => Some(capture.taken()),
            Some(Programs::New(_)) | None => self.follower.taken(),
        };
        if grows {
            self.remake_gates(now, &before, &begun, taken.as_ref());
        }
        self.take_programs(now, &before, wanted.programs, programs);
        if !grows {
            self.remake_gates(now, &before, &begun, taken.as_ref());
        }
        self.set_modes(now);
        self.look_at_outgoing(now);
        self.take_client_log(now, before.config.client_log);
        self.reloads.leaves_since = (!self.reloads.running.leaving.is_empty()).then_some(now);
        self.carry_out(now);
        self.look(now);
        Ok(())
    }

    /// Makes the programs that are wanted of what the forge has made.
    fn remake(
        &mut self,
        next: &Running,
        wanted: &Wanted,
        made: Vec<OwnedFd>,
        chosen: &[Chosen],
    ) -> Result<Option<Programs>, String> {
        if !wanted.programs {
            return Ok(None);
        }
        let (captured, begin) = (next.captured(), next.begin());
        let lo = match wanted.own_calls.then(|| self.netlink.links()) {
            Some(links) => links
                .unwrap_or_default()
                .into_iter()
                .find(|link| link.loopback),
            None => None,
        };
        let tun = self.tun.clone();
        let result = match self.follower.programs() {
            Programs::Old(capture) => {
                let make = || capture.again(&captured, &begin, wanted.port);
                match supplied(made, make) {
                    (Ok(again), 0) => Ok(Some(Programs::Old(Box::new(again)))),
                    (Ok(_), _) => Err(OTHERS.to_owned()),
                    (Err(error), _) => Err(error.to_string()),
                }
            }
            Programs::New(steering) => {
                let remade = Remade {
                    outgoing: chosen.to_vec(),
                    tunnel_port: wanted.port,
                    max_flows: next.config.max_flows,
                };
                match supplied(made, || steering.remake(&tun, lo.as_ref(), remade)) {
                    (Ok(()), 0) => Ok(None),
                    // Nothing is on a link as yet.
                    (Ok(()), _) => Err(OTHERS.to_owned()),
                    (Err(error), _) => Err(error.to_string()),
                }
            }
        };
        result.inspect_err(|_| {
            if let Some(forge) = &self.reloads.forge {
                forge.give_up();
            }
        })
    }

    /// The programs on links become those of these settings.
    fn take_programs(
        &mut self,
        now: Instant,
        before: &Running,
        others: bool,
        programs: Option<Programs>,
    ) {
        let running = &self.reloads.running;
        let keeps =
            |peer: &PeerConfig| peer.deliver_to == DeliverTo::Keep || !peer.outgoing.is_empty();
        let settings = LinkSettings {
            named: running.config.uplink.clone(),
            moves: running.captured(),
            listen: running.config.listen.ip.filter(|ip| !ip.is_unspecified()),
            keeps: running.each().any(|(_, peer)| keeps(peer)),
            calls_itself: calls_itself(running),
        };
        if !others {
            self.follower
                .set_settings(now, self.host, settings, &mut self.warnings);
            return;
        }
        let known: HashSet<Move> = before.captured().into_iter().collect();
        let mut added = running.captured();
        added.retain(|moved| !known.contains(moved));
        if let (Some(Programs::Old(capture)), Some(orders)) = (&programs, &self.orders)
            && let Err(error) = capture.set_modes(&orders.modes(), orders.key())
        {
            let text = format!("the programs do not know who answers new connections: {error}");
            self.warnings.warn(now, text);
        }
        if let Some(Programs::Old(capture)) = &programs {
            // They ask no daemon that they take for dead. If this fails, the next beat says so.
            let _ = capture.beat();
        }
        let grows = (self.follower.steering()).is_some_and(|steering| steering.carries_over());
        let translator = self.view.forwarder.translator().filter(|_| grows);
        if let Some(translator) = translator {
            translator.pause(true);
            // Until what lanes have in hand has come through.
            std::thread::sleep(IN_HAND);
        }
        if let Some(steering) = self.follower.steering()
            && let Err(error) = steering.carry_over(false)
        {
            self.warnings
                .warn(now, format!("the kernel forgets some flows: {error}"));
        }
        let forge = self.reloads.forge.clone();
        let note = |programs: &Programs| {
            // Those of hosts behind this one go on here, as this server's own do.
            if let (Programs::Old(_), Some(forge)) = (programs, &forge)
                && !added.is_empty()
            {
                forge.note_others(&added);
            }
        };
        (self.follower).set_programs(now, self.host, programs, settings, note, &mut self.warnings);
        if let Some(steering) = self.follower.steering()
            && let Err(error) = steering.carry_over(true)
        {
            self.warnings
                .warn(now, format!("the kernel forgets some flows: {error}"));
        }
        if let Some(translator) = translator {
            translator.pause(false);
        }
        match self.follower.programs() {
            Programs::Old(capture) => kept::keep(&capture.memory()),
            Programs::New(steering) => kept::keep(&steering.memory()),
        }
    }

    /// Gives the lanes gates for what moves now (old server), which know who answers it.
    /// `taken` is what the programs to come know.
    fn remake_gates(
        &mut self,
        now: Instant,
        before: &Running,
        begun: &[PeerId],
        taken: Option<&Arc<dyn Taken>>,
    ) {
        let running = &self.reloads.running;
        let Forwarder::Old(known) = &*self.view.forwarder else {
            return;
        };
        let common = Gates {
            all: Arc::new(Scopes::new(&running.captured())),
            max_flows: running.config.max_flows as usize,
            log: running.config.client_log,
            several_begin: several_begin(&self.policy),
            now,
        };
        let gates = (0..running.peers.len()).map(|place| {
            let id = PeerId(place as u16);
            let peer = running.peers[place].as_ref();
            let was = before.peers.get(place).and_then(Option::as_ref);
            let goes_on = was.is_some() && peer.is_some() && !begun.contains(&id);
            let earlier = match known.get(place).filter(|_| goes_on) {
                Some(gate) => Before::Gate {
                    gate,
                    max_flows: before.config.max_flows as usize,
                    log: before.config.client_log,
                },
                None => Before::NewPeer {
                    beside: known.first().map(|other| &**other),
                },
            };
            let part = Part {
                moves: &running.captured_for(id),
                allow_outgoing: peer.map_or(&[][..], |peer| &peer.allow_outgoing),
                name: peer.map(|peer| peer.keys.name()),
            };
            let gate = common.make(&part, earlier);
            if let Some(taken) = taken {
                gate.set_taken(Arc::clone(taken));
            }
            Arc::new(gate)
        });
        let forwarder = Arc::new(Forwarder::Old(gates.collect()));
        self.view.forwarder = Arc::clone(&forwarder);
        self.shared.holding.set_moves(&running.captured());
        self.set_modes_of_gates(now);
        self.view.number += 1;
        self.shared.view.store(Arc::new(self.view.clone()));
    }

    /// Carries on with the tunnel at another port.
    fn take_sockets(&mut self, before: &Config, sockets: Vec<OwnedFd>) {
        if sockets.is_empty() {
            return;
        }
        let all = self.lane_sockets.iter().map(|it| &**it).chain([&self.udp]);
        for (socket, other) in all.zip(sockets.iter().chain(sockets.first())) {
            if let Err(error) = socket.become_another(other.as_fd()) {
                warn!(%error, "a lane stays at the earlier port of the tunnel");
            }
        }
        if let Some(steering) = self.follower.steering() {
            for socket in &self.lane_sockets {
                let _ = steering.set_of_tunnel(socket.as_fd());
            }
        }
        knock(before, self.lanes);
        self.policy.peers().for_each(|peer| self.tell_tunnel(peer));
        let now = Instant::now();
        for tunnel in &mut self.tunnels {
            // The peer hears by it where this server is now.
            tunnel.renew(now);
        }
    }

    /// One more peer.
    fn begin_peer(&mut self, now: Instant, id: PeerId, peer: &PeerConfig, at: Option<SocketAddr>) {
        let place = index(id);
        self.warnings.begin(id);
        self.progress.begin(id);
        self.asks.begin(id);
        self.theirs.begin(id);
        self.silence.begin(now, id);
        self.policy.begin(now, id, self.rules(id, peer, at));
        let maker = TunnelMaker {
            config: &self.reloads.running.config,
            policy: &self.policy,
            lanes: self.lanes as u8,
            indexes: &self.indexes,
        };
        let tunnel = match maker.make(id, &peer.keys, at, now) {
            Ok(tunnel) => tunnel,
            // Nothing else works then either.
            Err(error) => {
                self.fault = Some(error);
                return;
            }
        };
        if place == self.tunnels.len() {
            self.tunnels.push(tunnel);
            self.called.push(at);
            self.resumed.push(true);
            self.delivering.push(None);
            self.reachable.push(false);
            self.view.peers.push(Default::default());
        } else {
            self.tunnels[place] = tunnel;
            self.called[place] = at;
            self.resumed[place] = true;
            self.delivering[place] = None;
            self.reachable[place] = false;
            self.view.peers[place] = Default::default();
        }
        self.view_changed = true;
        self.shared.peer_drops[place].clear();
        self.counters
            .iter()
            .for_each(|lane| lane.peers[place].clear());
        self.shared.mac_check.set_peer(id, Some(peer.keys.clone()));
        self.set_homes(id);
        if let Some(translator) = self.view.forwarder.translator() {
            translator.allow_clients(id, &peer.clients_from);
        }
        self.carry_out(now);
    }

    /// A peer with other settings.
    fn change_peer(
        &mut self,
        now: Instant,
        id: PeerId,
        before: &PeerConfig,
        after: &PeerConfig,
        at: Option<SocketAddr>,
    ) {
        self.policy.change(now, id, self.rules(id, after, at));
        if before.endpoint != after.endpoint {
            self.called[index(id)] = at;
            self.set_homes(id);
            self.tunnels[index(id)].set_endpoint(now, at);
        }
        if self.role == Role::New {
            self.tunnels[index(id)].set_accept(after.accept.clone());
        }
        if before.keys != after.keys {
            self.reloads.keys.retain(|it| it.peer != id);
            self.tunnels[index(id)].renew(now);
            self.reloads.keys.push(Rotation {
                peer: id,
                keys: after.keys.clone(),
                since: now,
            });
        }
        if let Some(translator) = self.view.forwarder.translator() {
            translator.allow_clients(id, &after.clients_from);
        }
        self.carry_out(now);
    }

    /// A peer is gone, and with it what it had.
    fn end_peer(&mut self, now: Instant, id: PeerId) {
        self.policy.end(now, id);
        self.reloads.keys.retain(|it| it.peer != id);
        self.tunnels[index(id)].close(now);
        self.send_all(now);
        while let Some(event) = self.tunnels[index(id)].poll_event() {
            self.event(now, id, event);
        }
        self.shared.mac_check.set_peer(id, None);
        (self.shared.mac_check).set_homes(id, []);
        self.called[index(id)] = None;
        self.delivering[index(id)] = None;
        self.view.peers[index(id)] = Default::default();
        self.view_changed = true;
        self.silence.begin(now, id);
        self.progress.begin(id);
        self.asks.begin(id);
        self.theirs.begin(id);
        self.warnings.begin(id);
        if let Some(translator) = self.view.forwarder.translator() {
            translator.forget_peer(id);
        }
        self.carry_out(now);
    }

    fn rules(&self, id: PeerId, peer: &PeerConfig, at: Option<SocketAddr>) -> PeerRules {
        let literal = |peer: &PeerAddr| peer.host.parse::<IpAddr>().ok();
        let known_at = at.map(|at| at.ip());
        PeerRules {
            endpoint: peer.endpoint.clone(),
            known_at: known_at.or_else(|| peer.endpoint.as_ref().and_then(literal)),
            moves: self.reloads.running.captured_for(id),
            deliver_to: peer.deliver_to,
            deliver: peer.deliver.clone(),
            accept: peer.accept.clone(),
            clients_from: peer.clients_from.clone(),
            outgoing: peer.outgoing.clone(),
            allow_outgoing: peer.allow_outgoing.clone(),
        }
    }

    /// Uses other keys, once a session was made with the earlier ones or that has taken too long.
    pub(super) fn rotate_keys(&mut self, now: Instant) {
        if self.reloads.keys.is_empty() {
            return;
        }
        let tunnels = &self.tunnels;
        let is_due = |it: &mut Rotation| {
            let session = tunnels[index(it.peer)].session();
            let fresh = session.is_some_and(|session| session.created() >= it.since);
            fresh || now >= it.since + LAST_WITH_EARLIER
        };
        let due: Vec<Rotation> = self.reloads.keys.extract_if(.., is_due).collect();
        for Rotation { peer, keys, .. } in due {
            self.tunnels[index(peer)].set_keys(now, keys.clone());
            self.shared.mac_check.set_peer(peer, Some(keys));
        }
    }

    /// Lets go of what leaves, once the new server has nothing of it any more.
    pub(super) fn look_at_leaving(&mut self, now: Instant) {
        let Some(since) = self.reloads.leaves_since else {
            return;
        };
        let passed = now.saturating_duration_since(since);
        if self.is_leaving || self.reloads.busy.is_some() || passed < LEAVES_AFTER {
            return;
        }
        let leaving = self.reloads.running.leaving.iter();
        let left: Vec<(PeerId, Move)> = leaving
            .filter(|(peer, moved)| {
                let name = moved.to_string();
                let known = self
                    .progress
                    .of(*peer)
                    .into_iter()
                    .find(|it| it.what == name);
                // One that does not say has forgotten them by then, unless they are used.
                known.map_or(passed > TCP_ESTABLISHED, |it| it.progress.live == 0)
            })
            .cloned()
            .collect();
        if !left.is_empty() {
            // If that fails, it can wait.
            self.reloads.leaves_since = Some(now + LEAVES_AGAIN);
            self.prepare(Vec::new(), move |terrain| prepare_leave(terrain, &left));
        }
    }

    /// Records who comes, or no longer does.
    fn take_client_log(&mut self, now: Instant, before: Option<ClientLog>) {
        let config = &self.reloads.running.config;
        let keep = |log: Option<ClientLog>| log.map(|log| log.keep);
        if keep(config.client_log) == keep(before) {
            if let (Some(visitors), Some(log)) = (&mut *self.visitors, config.client_log) {
                visitors.set_names(log.names);
            }
            return;
        }
        if let Some(mut visitors) = self.visitors.take() {
            visitors.end(now, &self.view.forwarder);
        }
        let refused = self.orders.as_ref().and_then(|it| it.dir_refused());
        *self.visitors = Visitors::start(config, refused, now);
        if self.visitors.is_none() {
            // Whatever fails here nobody reads.
            let _ = self.follower.tell_served(false);
        }
    }
}

/// Wakes the lanes that still wait at the earlier port: a datagram for each of them, which they do
/// not read any more.
fn knock(before: &Config, lanes: usize) {
    let port = before.listen.port;
    let to = match before.listen.ip.filter(|ip| !ip.is_unspecified()) {
        Some(ip) => ip,
        None => Ipv4Addr::LOCALHOST.into(),
    };
    let from: IpAddr = match to {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let Ok(socket) = Knock::bind((from, 0)) else {
        return;
    };
    for lane in 0..lanes {
        let mut datagram = [0; LANE_AT as usize + 1];
        (datagram[0], datagram[LANE_AT as usize]) = (TYPE_DATA, lane as u8);
        // Without it they wake by themselves within a second.
        let _ = socket.send_to(&datagram, (to, port));
    }
}
