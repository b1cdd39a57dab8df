//! The control task hands everything over to another daemon, and takes it up from one.
//!
//! Owns what has to stop for that and in which order, and how it goes on if the other one fails:
//! nothing may be sealed on sessions whose counters another process has, and nobody but one may
//! change the kernel.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tracing::{info, warn};

use super::super::handover::giving::Step;
use super::super::handover::state::{Fingerprint, PeerState, State};
use super::super::handover::taking::{OF_A_MANAGER, Places};
use super::super::handover::{About, Descriptors, VERSION};
use super::super::kept;
use super::super::service::{Result, Threads, failed};
use super::Control;
use crate::channel::session::wipe_frames;
use crate::channel::tunnel::Tunnel;
use crate::daemon::control_socket::Order;
use crate::daemon::orders::Orders;
use crate::daemon::viewers::{Sockets, Viewers};
use crate::flow::gate::{Gate, GateConfig};
use crate::flow::role::Forwarder;
use crate::flow::table::HandedFlow;
use crate::io::tun::TunQueue;
use crate::io::udp::UdpSocket;
use crate::lane::shared::{LaneCounters, Shared};
use crate::lane::{Lane, LaneParts, ToControl};
use crate::model::moved::Move;
use crate::model::peer::{MAX_PEERS, PeerId};
use crate::model::request::Answer;
use crate::packet::coalesce::Reach;

/// How long whoever asked for the handover may take to hear that it is done.
const LAST_WORD: Duration = Duration::from_secs(2);

/// How long those may take who look at the daemon when it is handed over, while it still carries
/// packets: two readings of flows, a second apart. Whoever takes longer asks once more.
const SEEN_OFF: Duration = Duration::from_secs(4);

/// How often others have a turn before the end: each takes the answer to a command, and writes it.
const ANSWERS: usize = 8;

/// What lanes are made of, so that they can be stopped and started again, and what of it another
/// daemon goes on with.
pub(super) struct LaneKit {
    pub(super) queues: Vec<TunQueue>,
    pub(super) sockets: Vec<Arc<UdpSocket>>,
    pub(super) shared: Arc<Shared>,
    pub(super) to_control: mpsc::Sender<ToControl>,
    pub(super) uso: bool,
    pub(super) tso: bool,
    pub(super) reach: Reach,
    pub(super) no_split: bool,
    pub(super) doors: Doors,
}

/// The sockets on which this daemon listens.
pub(super) struct Doors {
    status: OwnedFd,
    handover: OwnedFd,
    commands: OwnedFd,
    flows: OwnedFd,
    metrics: Option<OwnedFd>,
}

impl Doors {
    /// A second handle to each.
    ///
    /// # Errors
    /// If there is no descriptor left.
    pub(super) fn new(places: &Places, viewers: &Sockets) -> io::Result<Self> {
        let (flows, metrics) = viewers.copies()?;
        Ok(Self {
            status: places.status.as_fd().try_clone_to_owned()?,
            handover: places.handover.as_fd().try_clone_to_owned()?,
            commands: places.commands.as_fd().try_clone_to_owned()?,
            flows,
            metrics,
        })
    }
}

impl LaneKit {
    /// A counter for each lane.
    pub(super) fn counters(&self) -> Vec<Arc<LaneCounters>> {
        let of_lane = |_: &TunQueue| Arc::new(LaneCounters::new(MAX_PEERS));
        self.queues.iter().map(of_lane).collect()
    }

    /// Starts a thread for each lane.
    ///
    /// # Errors
    /// If the kernel has no thread or descriptor left.
    pub(super) fn start(&self, lanes: &mut Threads, counters: &[Arc<LaneCounters>]) -> Result<()> {
        let ends = self.queues.iter().zip(&self.sockets);
        for (number, ((tun, udp), counters)) in (0_u8..).zip(ends.zip(counters)) {
            let tun = tun.try_clone().map_err(failed)?;
            let udp = Arc::clone(udp);
            let (shared, control) = (Arc::clone(&self.shared), self.to_control.clone());
            let (uso, tso, reach, no_split) = (self.uso, self.tso, self.reach, self.no_split);
            let counters = Arc::clone(counters);
            lanes.start(format!("lane-{number}"), move |stop| {
                Lane::run(LaneParts {
                    number,
                    tun,
                    uso,
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
        Ok(())
    }
}

impl Control<'_> {
    /// Does the next step of a handover. Whether it is done, and this daemon is to end.
    pub(super) async fn hand_over(
        &mut self,
        step: Step,
        lanes: &mut Threads,
        from_lanes: &mut mpsc::Receiver<ToControl>,
        (steps, viewers): (&mut mpsc::Receiver<Step>, &mut Viewers),
        kit: &LaneKit,
    ) -> Result<bool> {
        match step {
            Step::Begin(answer) => {
                let offer = self.offer(kit);
                self.is_leaving = offer.is_ok();
                // Whoever asked may have gone meanwhile, which comes as a step as well.
                let _ = answer.send(offer);
                Ok(false)
            }
            Step::Stop(answer) => {
                self.see_off(viewers).await;
                let stopped = Instant::now();
                self.stop_lanes(lanes, from_lanes)?;
                let _ = answer.send(self.state(kit).map_err(|error| error.to_string()));
                // It comes for sure, and nobody else decides: the conversation has its own limits,
                // and has said the last word by then, or cannot any more.
                if matches!(steps.recv().await, Some(Step::Over(true))) {
                    let milliseconds = stopped.elapsed().as_millis() as u64;
                    info!(
                        milliseconds,
                        "another daemon has taken over; packets waited so long"
                    );
                    return Ok(true);
                }
                viewers.open();
                self.go_on_after_all(lanes, kit)?;
                Ok(false)
            }
            Step::Store(answer) => {
                if let Some(why) = self.cannot_be_stored() {
                    let _ = answer.send(Err(why));
                    return Ok(false);
                }
                self.see_off(viewers).await;
                self.stop_lanes(lanes, from_lanes)?;
                if let Err(error) = self.store(kit) {
                    let why = format!("its service manager does not keep what it has: {error}");
                    warn!("{why}");
                    kept::forget();
                    viewers.open();
                    self.go_on_after_all(lanes, kit)?;
                    let _ = answer.send(Err(why));
                    return Ok(false);
                }
                let _ = answer.send(Ok(()));
                let _ = tokio::time::timeout(LAST_WORD, steps.recv()).await;
                info!("the service manager keeps everything for the next daemon");
                Ok(true)
            }
            Step::Over(_) => {
                if std::mem::take(&mut self.is_leaving) {
                    info!("the daemon that was to take over has gone; going on");
                    // It may have written its own.
                    if let Some(orders) = &self.orders {
                        orders.keep_again();
                    }
                    self.look_again();
                }
                Ok(false)
            }
        }
    }

    /// The order, unless it is a command and another daemon is about to take over.
    pub(super) fn refuse_while_leaving(&self, order: Order) -> Option<Order> {
        match order {
            Order::Request { .. } if self.is_leaving => {
                refuse(order);
                None
            }
            Order::Request { .. } | Order::Gone(_) => Some(order),
        }
    }

    /// Answers those who look at the daemon already. Whoever comes now waits for the next one.
    async fn see_off(&mut self, viewers: &mut Viewers) {
        let door = viewers.close();
        let over = tokio::time::Instant::now() + SEEN_OFF;
        loop {
            let ask = tokio::select! {
                ask = viewers.asked() => ask,
                () = door.all_gone() => return,
                () = tokio::time::sleep_until(over) => return,
            };
            // Who does not wait any longer is not told.
            let _ = ask.send(self.status_now());
        }
    }

    /// Told to end, while another daemon is about to take over: whether that is left to it. To undo
    /// everything now would take from the other one what it was given, and reset whom it serves; it
    /// is over in a moment, either way. Whoever says it twice means it.
    pub(super) fn ends_later(&mut self) -> bool {
        let later = self.is_leaving && !self.is_to_end;
        if later {
            self.is_to_end = true;
            info!(
                "another daemon is about to take over; stopping if it fails, or at a second signal"
            );
        }
        later
    }

    /// Whether it was told to end while another daemon was to take over, and that one has failed.
    pub(super) fn ends_now(&self) -> bool {
        self.is_to_end && !self.is_leaving
    }

    /// Ends without a goodbye: another daemon goes on with everything.
    pub(super) fn leave(&mut self) {
        if let Some(visitors) = &mut *self.visitors {
            visitors.end(Instant::now(), &self.view.forwarder);
        }
        if let Some(orders) = &mut self.orders {
            orders.end_keeping();
        }
    }

    /// What this daemon has to offer.
    ///
    /// # Errors
    /// Why it has nothing, at present.
    fn offer(&self, kit: &LaneKit) -> std::result::Result<(About, Descriptors<OwnedFd>), String> {
        if kept::has_manager() {
            return Err(OF_A_MANAGER.into());
        }
        if self.orders.as_ref().is_some_and(Orders::is_busy) {
            return Err(
                "new connections are held, or a cut-over is running: wait until that is over, or \
                 end it with `ipmoved back` or `ipmoved move`"
                    .into(),
            );
        }
        if let Some(why) = self.reloads.forbids_handover() {
            return Err(why.into());
        }
        let memory = self.follower.memory();
        let about = self.about(kit, memory.len());
        let copies = || -> io::Result<Descriptors<OwnedFd>> {
            let copy = |fd: &dyn AsFd| fd.as_fd().try_clone_to_owned();
            let metrics = kit.doors.metrics.as_ref().map(|it| copy(it));
            Ok(Descriptors {
                lock: self.host.lock()?,
                status: copy(&kit.doors.status)?,
                handover: copy(&kit.doors.handover)?,
                commands: copy(&kit.doors.commands)?,
                flows: copy(&kit.doors.flows)?,
                metrics: metrics.transpose()?,
                state_dir: self.state_dir_lock()?,
                memory: memory
                    .iter()
                    .map(|it| copy(it))
                    .collect::<io::Result<_>>()?,
                queues: kit
                    .queues
                    .iter()
                    .map(|it| copy(it))
                    .collect::<io::Result<_>>()?,
                sockets: kit
                    .sockets
                    .iter()
                    .map(|it| copy(&**it))
                    .collect::<io::Result<_>>()?,
            })
        };
        let copies = copies().map_err(|error| error.to_string())?;
        Ok((about, copies))
    }

    fn state_dir_lock(&self) -> io::Result<Option<OwnedFd>> {
        self.orders.as_ref().map_or(Ok(None), Orders::lock)
    }

    fn about(&self, kit: &LaneKit, memory: usize) -> About {
        About {
            version: VERSION,
            pid: std::process::id(),
            role: self.role,
            tun: self.tun.name.clone(),
            uso: kit.uso,
            lanes: kit.queues.len(),
            memory,
            metrics: kit.doors.metrics.is_some(),
            state_dir: matches!(self.state_dir_lock(), Ok(Some(_))),
        }
    }

    /// Why no service manager could keep what this daemon has.
    fn cannot_be_stored(&self) -> Option<String> {
        (!kept::has_manager()).then(|| {
            "no service manager has started it; start the next one with --takeover instead".into()
        })
    }

    /// Stops carrying packets, and does what is left to be done of those that came.
    fn stop_lanes(
        &mut self,
        lanes: &mut Threads,
        from_lanes: &mut mpsc::Receiver<ToControl>,
    ) -> Result<()> {
        self.is_leaving = true;
        std::mem::take(lanes).stop();
        let now = Instant::now();
        while let Ok(message) = from_lanes.try_recv() {
            self.handle(now, message)?;
        }
        self.turn(now);
        Ok(())
    }

    /// What this daemon knows, for another process.
    fn state(&self, kit: &LaneKit) -> io::Result<OwnedFd> {
        let now = Instant::now();
        let mut gates = Vec::new();
        let (mut flows, mut age) = (Vec::new(), Duration::ZERO);
        match &*self.view.forwarder {
            Forwarder::Old(all) => gates.extend(all),
            Forwarder::New(translator) => {
                translator.put_flows(now, &mut flows);
                age = translator.age(now);
            }
        }
        let mut gates = gates.into_iter();
        let there: Vec<PeerId> = self.policy.peers().collect();
        let peers = (0..).map(PeerId).zip(&self.tunnels).map(|(peer, tunnel)| {
            let mut gate = Vec::new();
            if let Some(of_peer) = gates.next() {
                of_peer.put(now, &mut gate);
            }
            if !there.contains(&peer) {
                // One that has left the settings keeps its place, by which flows name theirs.
                return PeerState::of_nobody();
            }
            PeerState {
                fingerprint: tunnel.fingerprint(),
                tunnel: tunnel.hand_over(now),
                gate,
            }
        });
        let about = self.about(kit, self.follower.memory().len());
        State::new(now, age, peers.collect(), flows).write(&about)
    }

    /// Leaves everything to the service manager.
    fn store(&self, kit: &LaneKit) -> io::Result<()> {
        let state = self.state(kit)?;
        let queues: Vec<_> = kit.queues.iter().map(AsFd::as_fd).collect();
        let sockets: Vec<_> = kit.sockets.iter().map(|it| it.as_fd()).collect();
        kept::leave(&queues, &sockets, state.as_fd())
    }

    /// Carries packets again: nobody else does. What another daemon has changed in the kernel is
    /// put back.
    fn go_on_after_all(&mut self, lanes: &mut Threads, kit: &LaneKit) -> Result<()> {
        warn!("the daemon that was to take over did not; going on");
        let now = Instant::now();
        for tunnel in &mut self.tunnels {
            tunnel.give_up_sessions(now);
        }
        let (repairs, report) = self.host.resume();
        for failure in repairs.failed {
            // The next look tries it once more.
            warn!(change = %failure.change, reason = failure.reason, "not put back");
        }
        match report {
            Ok(report) => super::super::service::warn_of_left(&report),
            Err(error) => warn!(%error, "what another daemon has made may be left in the kernel"),
        }
        if let Some(orders) = &self.orders {
            orders.keep_again();
        }
        self.is_leaving = false;
        self.look_again();
        self.turn(now);
        kit.start(lanes, &self.counters)
    }

    /// Catches up with what was left alone meanwhile.
    fn look_again(&mut self) {
        let now = Instant::now();
        self.next_look = now;
        if let Some(wanted) = self.holding.clone() {
            let result = self.hold(&wanted).map_err(|error| error.to_string());
            self.policy.handle(now, super::Input::Held(result));
        }
    }
}

/// Why a command is not carried out while another daemon takes over.
const ABOUT_TO_END: &str = "another daemon is about to take over: try again";

/// Refuses whatever commands wait, and lets the answers go: this daemon ends now.
pub(super) async fn refuse_all(commands: &mut mpsc::Receiver<Order>) {
    while let Ok(order) = commands.try_recv() {
        refuse(order);
    }
    // Whoever writes them has a turn, which is all that a short line needs.
    for _ in 0..ANSWERS {
        tokio::task::yield_now().await;
    }
}

fn refuse(order: Order) {
    match order {
        Order::Gone(_) => {}
        Order::Request { answer, .. } => {
            let refused = Answer::Refused {
                input: false,
                why: ABOUT_TO_END.into(),
            };
            // Who does not wait any longer is not told.
            let _ = answer.send(refused);
        }
    }
}

/// Gives each tunnel what another daemon knew of its peer. Returns the flows that wait for what has
/// moved to be known.
pub(super) fn take_up(
    state: &State,
    fingerprints: &[Fingerprint],
    tunnels: &mut [Tunnel],
    forwarder: &Forwarder,
    now: Instant,
) -> BTreeMap<PeerId, Vec<HandedFlow>> {
    for (tunnel, fingerprint) in tunnels.iter_mut().zip(fingerprints) {
        let known = state.of(fingerprint);
        if known.is_some_and(|known| !tunnel.take_over(now, state.then, &known.tunnel)) {
            warn!("what the last daemon knew of a peer is not understood; beginning anew with it");
        }
    }
    let place = |at: usize| {
        let of_peer = &state.peers.get(at)?.fingerprint;
        let peer = fingerprints.iter().position(|it| it == of_peer)?;
        Some(PeerId(peer as u16))
    };
    let mut waiting = BTreeMap::new();
    for (peer, flows) in state.flows(place) {
        match (peer, forwarder.translator()) {
            (Some(peer), _) => drop(waiting.insert(peer, flows)),
            (None, Some(translator)) => translator.take_up_inside(now, &flows),
            (None, None) => {}
        }
    }
    // Of the keys that were taken up.
    wipe_frames();
    waiting
}

/// A gate that goes on with the clients of another daemon's.
pub(super) fn gate(
    moves: &[Move],
    max_flows: usize,
    state: &State,
    fingerprint: &Fingerprint,
) -> Option<Gate> {
    let mut rest = &*state.of(fingerprint)?.gate;
    let config = GateConfig::taken_over(max_flows, state.then, &mut rest)?;
    Gate::new(moves, config).take_up(&mut rest)
}
