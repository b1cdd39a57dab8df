//! Commands to the old server's daemon: they change modes, which are kept on the disk before a
//! command is answered.
//!
//! Owns what happens where they cannot be kept. A command is carried out all the same: somebody may
//! need it who is in trouble already. Its answer says that a restart forgets it, and `status` does
//! as long as that is so.

use std::collections::{BTreeSet, HashSet};
use std::io;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use rustix::time::{ClockId, clock_gettime};
use tokio::sync::oneshot;
use tracing::{info, warn};

use super::index;
use super::keeper::Keeper;
use super::policy::modes::{Carried, Clock, Modes, Ordered, Record, Who};
use super::service::{Result, failed, input};
use super::state_dir::{StateDir, unkept};
use crate::flow::ended::HostFlow;
use crate::io::entropy;
use crate::model::asked::Asked;
use crate::model::mode::{Mode, Settled, ShareKey};
use crate::model::move_index::MoveIndex;
use crate::model::moved::{MAX_MOVES, MAX_PORT_SETS, Move, TCP};
use crate::model::peer::PeerId;
use crate::model::request::{Answer, Request};
use crate::model::rest::rest;
use crate::model::scopes::Scopes;
use crate::model::status::ModeStatus;
use crate::settings::config::Config;

/// What this server has is counted once in this time at most: there may be 100,000 conversations.
const COUNT_EVERY: Duration = Duration::from_secs(1);

/// Moves that the log names; `status` names all.
const LOGGED: usize = 16;

/// Where the kernel says which boot this is.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The modes of this server's moves, and where they are kept.
#[derive(Debug)]
pub(super) struct Orders {
    modes: Modes,
    dir: Arc<StateDir>,
    warnings: Vec<String>,
    /// What the settings no longer move, and the new server still has connections of.
    leaving: Vec<(PeerId, Move)>,
    /// Why what is there is not kept.
    failed: Option<String>,
    /// Once the daemon runs.
    keeper: Option<Keeper>,
    /// The places of moves that begin as `--start` says because nobody knows their modes, and that
    /// no command has named since.
    unsure: BTreeSet<usize>,
    /// Finds the move of a conversation.
    index: MoveIndex,
    /// What this server has of each move, but for its own sockets, and when that was counted.
    here: Option<(Instant, Vec<Here>)>,
    /// What tells each peer from others, whose connections outlive this daemon; nothing once all is
    /// undone.
    names: Vec<Option<NonZeroU64>>,
}

/// What the daemon before this one has captured for peers that are still there, and these settings
/// do not move: it leaves, as it does where the settings are read again.
pub(super) fn still_leaving(config: &Config) -> Vec<(PeerId, Move)> {
    let record = StateDir::look(&config.state_dir);
    let carried = record.map(|record| record.carried).unwrap_or_default();
    let peers = (0_u16..).map(PeerId).zip(&config.peers);
    let peers: Vec<_> = peers.map(|(id, peer)| (id, peer.keys.name())).collect();
    let named: Vec<&Move> = config.peers.iter().flat_map(|it| &it.moves).collect();
    let known: HashSet<&Move> = named.iter().copied().collect();
    let left = carried.iter().filter_map(|it| {
        let (id, _) = peers.iter().find(|(_, name)| *name == it.peer)?;
        let moved: Move = it.moved.parse().ok()?;
        // Mostly that is all of them, and there may be thousands.
        if known.contains(&moved) {
            return None;
        }
        let left = rest(&moved, named.iter().copied()).into_iter();
        Some(left.map(|moved| (*id, moved)))
    });
    let left: Vec<_> = left.flatten().collect();
    // Nobody has more; if somebody wrote more here, it is not what a daemon has kept.
    let all: Vec<Move> = left
        .iter()
        .map(|(_, moved)| moved)
        .chain(named)
        .cloned()
        .collect();
    let fits = all.len() <= MAX_MOVES && Scopes::new(&all).port_sets() <= MAX_PORT_SETS;
    if fits { left } else { Vec::new() }
}

/// What becomes of a command.
pub(super) struct CarriedOut {
    /// Its answer.
    pub(super) answer: Answer,
    /// It is sent once this says that the modes are kept, or why not.
    pub(super) kept: Option<oneshot::Receiver<Result<(), String>>>,
}

/// Conversations of hosts behind this server, and others that no socket tells of.
#[derive(Clone, Copy, Default, Debug)]
struct Here {
    all: u64,
    tcp: u64,
}

impl Orders {
    /// Takes up the modes that are kept, and keeps those of moves that are new.
    ///
    /// # Errors
    /// If the settings name something that is no directory.
    ///
    /// A daemon that is about to hand over shares the lock of its state directory.
    pub(super) fn open(config: &Config, shared: Option<OwnedFd>) -> Result<Self> {
        let path = &config.state_dir;
        if path.exists() && !path.is_dir() {
            return Err(input(format!(
                "--state-dir: `{}` is not a directory; name one, which is made if it is not there",
                path.display()
            )));
        }
        let (dir, opened) = StateDir::open(path, shared);
        let (record, mut warnings) = (opened.record, opened.warnings);
        let boot = std::fs::read_to_string(BOOT_ID).unwrap_or_default();
        let word = || entropy::system().u64().map_err(failed);
        let key = ShareKey([word()?, word()?]);
        let peers = (0_u16..).map(PeerId).zip(&config.peers);
        let moves = peers.flat_map(|(id, peer)| peer.moves.iter().map(move |it| (id, it.clone())));
        let clock = clock();
        let modes = Modes::new(
            moves,
            config.start,
            record.as_ref(),
            key,
            boot.trim(),
            clock,
        );
        let names = config.peers.iter().map(|it| Some(it.keys.name()));
        let captured = modes.moves().iter().map(|it| &it.moved);
        let captured = captured.chain(config.leaving.iter().map(|(_, moved)| moved));
        let captured = MoveIndex::new(captured.cloned().collect());
        let places = 0..modes.moves().len();
        let mut orders = Self {
            modes,
            dir: Arc::new(dir),
            warnings: Vec::new(),
            leaving: config.leaving.clone(),
            failed: None,
            keeper: None,
            unsure: places.filter(|_| opened.lost).collect(),
            index: captured,
            here: None,
            names: names.collect(),
        };
        let now = orders.record(clock);
        if opened.stale || record.as_ref() != Some(&now) {
            orders.failed = orders.dir.keep(&now).err();
        }
        if let Some(why) = orders.failed.as_ref().filter(|_| warnings.is_empty()) {
            warnings.push(unkept(why));
        }
        orders.warnings = warnings;
        Ok(orders)
    }

    /// What is to be kept.
    fn record(&self, clock: Clock) -> Record {
        let settled = self.modes.moves().iter().map(|it| (it.peer, &it.moved));
        let leaving = self.leaving.iter().map(|(peer, moved)| (*peer, moved));
        let carried = settled.chain(leaving).filter_map(|(peer, moved)| {
            Some(Carried {
                moved: moved.to_string(),
                peer: (*self.names.get(index(peer))?)?,
            })
        });
        Record {
            carried: carried.collect(),
            ..self.modes.record(clock)
        }
    }

    /// From now on these are the moves, and those that leave. What has moved before keeps its mode;
    /// who answers the others first, `start` says.
    pub(super) fn set_moves(
        &mut self,
        moves: Vec<(PeerId, Move)>,
        leaving: Vec<(PeerId, Move)>,
        names: Vec<Option<NonZeroU64>>,
        start: Settled,
    ) {
        let clock = clock();
        let unsure: Vec<Move> = (self.unsure.iter())
            .map(|&place| self.modes.moves()[place].moved.clone())
            .collect();
        self.modes.set_moves(moves, start, clock);
        let places = self.modes.moves().iter().enumerate();
        self.unsure = (places.filter(|(_, it)| unsure.contains(&it.moved)))
            .map(|(place, _)| place)
            .collect();
        (self.leaving, self.names) = (leaving, names);
        self.here = None;
        let settled = self.modes.moves().iter().map(|it| &it.moved);
        let leaving = self.leaving.iter().map(|(_, moved)| moved);
        self.index = MoveIndex::new(settled.chain(leaving).cloned().collect());
        self.keep_again();
    }

    /// Keeps what there is now, in case somebody else has written there.
    pub(super) fn keep_again(&self) {
        if let Some(keeper) = &self.keeper {
            // Nobody waits for it; what fails is said in the status.
            drop(keeper.keep(self.record(clock())));
        }
    }

    /// The daemon is about to undo everything, so that no new server has connections any more.
    pub(super) fn let_go(&mut self) {
        self.names.clear();
        self.keep_again();
    }

    /// Keeps modes on a thread of its own from now on.
    ///
    /// # Errors
    /// If the system has no thread left.
    pub(super) fn start_keeping(&mut self) -> Result<()> {
        let (dir, reason) = (Arc::clone(&self.dir), self.failed.take());
        let unkept = reason.is_some();
        self.keeper = Some(Keeper::start(dir, reason).map_err(failed)?);
        if unkept {
            // It is tried again until it works.
            self.keep_again();
        }
        Ok(())
    }

    /// Waits until the last modes are kept, but not for long.
    pub(super) fn end_keeping(&mut self) {
        if let Some(keeper) = &mut self.keeper {
            keeper.end();
        }
    }

    /// What is wrong with the modes at present, for the status.
    pub(super) fn troubles(&self) -> Vec<String> {
        let unsure = self.unsure.first().map(|&place| {
            let one = &self.modes.moves()[place];
            format!(
                "nobody knows the mode of {} and others any more: each is as --start says ({}), \
                 which may not be where the service runs; say `ipmoved move` or `ipmoved back`",
                one.moved,
                one.name()
            )
        });
        let unkept = self.keeper.as_ref().and_then(Keeper::unkept);
        let unkept = unkept.map(|why| self::unkept(&why));
        unsure.into_iter().chain(unkept).collect()
    }

    /// What an administrator has to know of the start.
    pub(super) fn take_warnings(&mut self) -> Vec<String> {
        std::mem::take(&mut self.warnings)
    }

    /// Why nothing may be kept in the state directory, if that is so.
    pub(super) fn dir_refused(&self) -> Option<&str> {
        self.dir.refused()
    }

    /// Where the modes are kept.
    pub(super) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Carries out a command.
    pub(super) fn carry_out(&mut self, who: Who, request: &Request) -> CarriedOut {
        let clock = clock();
        let Ordered {
            moves,
            ended,
            restarts,
        } = match self.modes.order(clock, who, request) {
            Ok(done) => done,
            Err(refusal) => {
                return CarriedOut {
                    answer: Answer::Refused {
                        input: refusal.is_input(),
                        why: refusal.to_string(),
                    },
                    kept: None,
                };
            }
        };
        let keeper = self.keeper.as_ref().filter(|_| changes_modes(request));
        let kept = keeper.map(|keeper| keeper.keep(self.record(clock)));
        if changes_modes(request) {
            for place in self.modes.places(request.what()).unwrap_or_default() {
                self.unsure.remove(&place);
            }
        }
        let pid = who.pid;
        let changed = moves.iter().filter(|it| it.before != it.mode);
        for moved in changed.clone().take(LOGGED) {
            let (what, before) = (&moved.what, &moved.before);
            info!(what, before, mode = moved.mode, pid, "mode");
        }
        if let Some(more @ 1..) = changed.count().checked_sub(LOGGED) {
            info!(more, pid, "modes of more moves, as of those");
        }
        let over = |of: i32| match restarts {
            None => format!("this has ended the cutover of process {of}, which goes back"),
            Some(seconds) => format!(
                "this has ended the cutover of process {of}, which starts the service here again: \
                 new connections wait {seconds} s at most, or until `ipmoved back` is said again"
            ),
        };
        let warnings: Vec<String> = ended.into_iter().map(over).collect();
        for text in &warnings {
            warn!(pid, warning = %text, "an administrator should know");
        }
        CarriedOut {
            answer: Answer::Done {
                moves,
                warnings,
                forgotten: 0,
            },
            kept,
        }
    }

    /// A second handle to the lock of the state directory, if this daemon has it.
    ///
    /// # Errors
    /// If there is no descriptor left.
    pub(super) fn lock(&self) -> io::Result<Option<OwnedFd>> {
        self.dir.lock()
    }

    /// Whether something is held, or a cut-over is running.
    pub(super) fn is_busy(&self) -> bool {
        self.modes.is_busy()
    }

    /// A connection of the control socket has ended. Returns whether clients are to be told of
    /// refusals again.
    pub(super) fn gone(&mut self, connection: u64) -> bool {
        self.modes.gone(connection)
    }

    /// Who has moved what a client asks for.
    pub(super) fn peer_of(&self, asked: &Asked) -> Option<PeerId> {
        let end = SocketAddr::new(asked.addr, asked.port);
        let place = self.index.find(asked.protocol, end)?;
        // What leaves has no mode.
        self.modes.moves().get(place).map(|it| it.peer)
    }

    /// Until when clients of each move are told of no refusal, each with its peer.
    pub(super) fn shields_at(&self, now: Instant) -> Vec<(PeerId, Option<Instant>)> {
        let ktime = clock().now;
        let moves = self.modes.moves().iter();
        moves
            .map(|it| {
                let until = it.shielded_until();
                (it.peer, until.map(|until| instant(now, ktime, until)))
            })
            .collect()
    }

    /// Ends the holds that are over. The file already says when.
    pub(super) fn end_holds(&mut self) -> bool {
        let ended = self.modes.end_holds(clock());
        for &place in ended.iter().take(LOGGED) {
            let one = &self.modes.moves()[place];
            let (what, mode) = (one.moved.to_string(), one.mode.settled.to_string());
            warn!(what, mode, "the time of the hold is over");
        }
        !ended.is_empty()
    }

    /// When the next hold is over.
    pub(super) fn next(&self, now: Instant) -> Option<Instant> {
        Some(instant(now, clock().now, self.modes.next()?))
    }

    /// The peers and moves that a command was about.
    pub(super) fn about(&self, request: &Request) -> Vec<(PeerId, Move)> {
        let places = self.modes.places(request.what()).unwrap_or_default();
        let of = |place: usize| {
            let one = &self.modes.moves()[place];
            (one.peer, one.moved.clone())
        };
        places.into_iter().map(of).collect()
    }

    /// The moves, each with its peer and with who answers new clients, but for a hold.
    pub(super) fn moved(&self) -> impl Iterator<Item = (PeerId, &Move, Settled)> {
        let moves = self.modes.moves().iter();
        moves.map(|it| (it.peer, &it.moved, it.mode.settled))
    }

    /// The modes, in the order of the settings and of what leaves, on the clock of the kernel's
    /// programs.
    pub(super) fn modes(&self) -> Vec<Mode<Duration>> {
        let settled = self.modes.moves().iter().map(|it| it.mode);
        let leaving = self.leaving.iter().map(|_| Mode::settled(Settled::Here));
        settled.chain(leaving).collect()
    }

    /// The same on this process's clock, each with its peer.
    pub(super) fn modes_at(&self, now: Instant) -> Vec<(PeerId, Mode<Instant>)> {
        let ktime = clock().now;
        let moves = self.modes.moves().iter();
        moves
            .map(|it| {
                let mode = Mode {
                    settled: it.mode.settled,
                    held_until: it.mode.held_until.map(|until| instant(now, ktime, until)),
                };
                (it.peer, mode)
            })
            .chain(
                self.leaving
                    .iter()
                    .map(|(peer, _)| (*peer, Mode::settled(Settled::Here))),
            )
            .collect()
    }

    /// Which clients a share takes.
    pub(super) fn key(&self) -> ShareKey {
        self.modes.key()
    }

    /// Counts what this server has, if that was long ago.
    pub(super) fn count(&mut self, now: Instant, found: impl FnOnce() -> Option<Vec<HostFlow>>) {
        let fresh = |&(at, _): &(Instant, _)| now.saturating_duration_since(at) < COUNT_EVERY;
        if self.here.as_ref().is_some_and(fresh) {
            return;
        }
        self.here = found().map(|found| {
            let mut here = vec![Here::default(); self.index.moves().len()];
            for flow in found {
                if let Some(place) = self.index.find(flow.protocol, flow.local) {
                    here[place].all += 1;
                    here[place].tcp += u64::from(flow.protocol == TCP);
                }
            }
            (now, here)
        });
    }

    /// Tells whether a conversation is one of those that a command is about.
    pub(super) fn takes(&self, request: &Request) -> impl Fn(&HostFlow) -> bool + use<'_> {
        let places = self.modes.places(request.what()).unwrap_or_default();
        move |flow| {
            let place = self.index.find(flow.protocol, flow.local);
            place.is_some_and(|place| places.binary_search(&place).is_ok())
        }
    }

    /// What `status` says of a peer's moves. `waiting` says how many conversations wait of each
    /// move of all peers.
    pub(super) fn status(&self, peer: PeerId, waiting: &[u64]) -> Vec<ModeStatus> {
        let now = clock().now;
        let here = self.here.as_ref().map(|(_, here)| here);
        let all = self.modes.moves().iter().enumerate();
        let of_peer = all.filter(|(_, it)| it.peer == peer);
        let first = self.modes.moves().len();
        let leaving = (first..)
            .zip(&self.leaving)
            .filter(|(_, (of, _))| *of == peer);
        let leaving = leaving.map(|(place, (_, moved))| ModeStatus {
            what: moved.to_string(),
            mode: Settled::Here.name().into(),
            percent: 0,
            then: None,
            held_s: None,
            waiting: waiting.get(place).copied().unwrap_or(0),
            here_live: here.map(|here| here[place].all),
            here_tcp: here.map(|here| here[place].tcp),
            there_live: None,
            leaving: true,
            since: String::new(),
            cutover: None,
        });
        of_peer
            .map(|(place, it)| ModeStatus {
                what: it.moved.to_string(),
                mode: it.name().into(),
                percent: it.mode.settled.percent(),
                then: (it.mode.held_until).map(|_| it.mode.settled.name().into()),
                held_s: (it.mode.held_until).map(|until| until.saturating_sub(now).as_secs()),
                waiting: waiting.get(place).copied().unwrap_or(0),
                here_live: here.map(|here| here[place].all),
                here_tcp: here.map(|here| here[place].tcp),
                there_live: None,
                leaving: false,
                since: jiff::Timestamp::from_second(it.since.try_into().unwrap_or_default())
                    .map_or_else(|_| String::new(), |since| since.to_string()),
                cutover: self.modes.cutover_of(place),
            })
            .chain(leaving)
            .collect()
    }
}

/// Whether a command can change a mode.
fn changes_modes(request: &Request) -> bool {
    match request {
        Request::Move { .. } | Request::Hold { .. } | Request::Back { .. } => true,
        Request::Cutover { .. }
        | Request::Stopping { .. }
        | Request::Shield { .. }
        | Request::Forget { .. }
        | Request::Reload => false,
    }
}

/// What the clocks show now.
fn clock() -> Clock {
    let now = clock_gettime(ClockId::Monotonic);
    Clock {
        now: Duration::new(now.tv_sec as u64, now.tv_nsec as u32),
        wall: SystemTime::now(),
    }
}

/// The same time on this process's clock.
fn instant(now: Instant, ktime: Duration, until: Duration) -> Instant {
    now + until.saturating_sub(ktime)
}
