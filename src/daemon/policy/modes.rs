//! The mode of each move of the old server: what commands make of it, what ends by itself, and what
//! outlives the daemon.
//!
//! A machine without I/O. It is given the time as the kernel's programs have it
//! (`CLOCK_MONOTONIC`), and the time of day. Whoever owns it writes [`Modes::record`] to the disk,
//! and tells programs and gates the modes.
//!
//! A hold is kept with its end on both clocks. The monotonic one counts while the host runs, so
//! that setting the time of day changes nothing. After a reboot there is only the time of day, and
//! one that is off must not make clients wait for longer than was asked.
//!
//! A mode is a move's, whoever the new server is: it says whether the old one serves.

use std::collections::{BTreeMap, HashMap};
use std::num::NonZeroU64;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::model::mode::{Mode, Settled, ShareKey};
use crate::model::moved::Move;
use crate::model::peer::PeerId;
use crate::model::request::{Changed, Request};
use crate::model::scopes::overlapping;
use crate::settings::values::MAX_HOLD;

/// Most moves that are remembered though the settings no longer name them: of somebody who tries
/// other settings for a while.
const MAX_OTHERS: usize = 1_024;

/// How long new conversations wait at most for a cut-over that has been ended to start the service
/// here again.
const RESTART: u32 = 45;

/// Moves that a refusal names.
const NAMED: usize = 4;

/// What the clocks show.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in super::super) struct Clock {
    /// `CLOCK_MONOTONIC`.
    pub(in super::super) now: Duration,
    /// The time of day.
    pub(in super::super) wall: SystemTime,
}

impl Clock {
    /// Seconds of the Unix epoch.
    fn unix(self) -> Duration {
        let since = self.wall.duration_since(SystemTime::UNIX_EPOCH);
        since.unwrap_or_default()
    }
}

/// What outlives the daemon.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(in super::super) struct Record {
    /// Which clients a share takes.
    pub(in super::super) share_key: ShareKey,
    /// The boot in which this was written.
    pub(in super::super) boot: String,
    /// The moves.
    pub(in super::super) moves: Vec<Kept>,
    /// What the new servers may have connections of, until the daemon is stopped.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(in super::super) carried: Vec<Carried>,
}

/// What is captured for a peer.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(in super::super) struct Carried {
    /// As `--move` names it.
    #[serde(rename = "move")]
    pub(in super::super) moved: String,
    /// What tells the peer from others ([`PeerKeys::name`]).
    ///
    /// [`PeerKeys::name`]: crate::channel::session::PeerKeys::name
    pub(in super::super) peer: NonZeroU64,
}

/// What is kept of one move.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(in super::super) struct Kept {
    /// As `--move` names it.
    #[serde(rename = "move")]
    pub(in super::super) moved: String,
    /// Its mode, but for a hold.
    pub(in super::super) mode: Settled,
    /// Since when, in seconds of the Unix epoch.
    pub(in super::super) since: u64,
    /// While it is held.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in super::super) held: Option<KeptHold>,
}

/// The hold of a move.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(in super::super) struct KeptHold {
    /// Its end on `CLOCK_MONOTONIC`, in milliseconds.
    pub(in super::super) until_ms: u64,
    /// Its end by the time of day, in milliseconds of the Unix epoch.
    pub(in super::super) until_unix_ms: u64,
    /// How long it was to be.
    pub(in super::super) seconds: u32,
}

/// Who gives commands: a connection of the control socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in super::super) struct Who {
    /// A number of its own.
    pub(in super::super) connection: u64,
    /// Its process, for people.
    pub(in super::super) pid: i32,
}

/// Why a command is refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(in super::super) enum Refusal {
    /// There is no such move.
    #[error("`{what}` is not moved here; name it as --move does: {known}")]
    NotMoved {
        /// What was named.
        what: String,
        /// What has moved.
        known: String,
    },
    /// A hold that is none, or too long.
    #[error("a hold lasts 1 to {MAX_HOLD} seconds")]
    Seconds,
    /// A cut-over is under way.
    #[error(
        "a cutover of {what} is running (process {pid}): wait for it, or end it with \
         `ipmoved back`, which goes back at once"
    )]
    Cutover {
        /// One of its moves.
        what: String,
        /// Whose it is.
        pid: i32,
    },
    /// Somebody has ended this cut-over.
    #[error("`ipmoved back` (process {pid}) has ended this cutover")]
    Overruled {
        /// Whose command that was.
        pid: i32,
    },
}

impl Refusal {
    /// Whether the command itself is wrong.
    pub(in super::super) fn is_input(&self) -> bool {
        match self {
            Self::NotMoved { .. } | Self::Seconds => true,
            Self::Cutover { .. } | Self::Overruled { .. } => false,
        }
    }
}

/// What a command has done.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(in super::super) struct Ordered {
    /// The moves that it was about, before and after.
    pub(in super::super) moves: Vec<Changed>,
    /// The processes whose cut-overs it has ended.
    pub(in super::super) ended: Vec<i32>,
    /// They start the service here again, for which new conversations wait so many seconds at most.
    pub(in super::super) restarts: Option<u32>,
}

/// The modes of all moves, in the order of the settings.
#[derive(Clone, Debug)]
pub(in super::super) struct Modes {
    key: ShareKey,
    boot: String,
    moves: Vec<OneMove>,
    /// What the settings do not name.
    others: Vec<Kept>,
    cutovers: Vec<Cutover>,
    /// Connections whose cut-overs somebody has ended, and the process that did.
    overruled: BTreeMap<u64, i32>,
    /// When the next hold is over: it is asked far oftener than it changes.
    next: Option<Duration>,
}

/// One move.
#[derive(Clone, Debug)]
pub(in super::super) struct OneMove {
    /// Where it has moved to.
    pub(in super::super) peer: PeerId,
    /// What it is.
    pub(in super::super) moved: Move,
    /// Its mode.
    pub(in super::super) mode: Mode<Duration>,
    /// Since when, in seconds of the Unix epoch.
    pub(in super::super) since: u64,
    /// How long the hold was to be.
    seconds: u32,
    /// Clients are told of no refusal until then, as long as that connection lasts.
    shield: Option<Shield>,
}

/// That clients are told of no refusal.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Shield {
    connection: u64,
    until: Duration,
}

/// What a command makes of a mode.
#[derive(Clone, Copy)]
enum Next {
    /// This, and nothing is held.
    Settled(Settled),
    /// New connections wait, for so many seconds.
    Held { until: Duration, seconds: u32 },
    /// The same.
    Same,
    /// The same, and clients are told of no refusal until then.
    Shielded(Duration),
}

/// A cut-over that is under way.
#[derive(Clone, Debug)]
struct Cutover {
    who: Who,
    /// The places of its moves.
    moves: Vec<usize>,
    /// The service here is stopped, and is started again if it goes back.
    stopping: bool,
}

impl OneMove {
    /// Its name in `status --json`.
    pub(in super::super) fn name(&self) -> &'static str {
        match self.mode.held_until {
            Some(_) => "held",
            None => self.mode.settled.name(),
        }
    }

    /// Its mode in words, with what follows.
    fn says(&self, now: Duration) -> String {
        match self.mode.held_until {
            None => self.mode.settled.to_string(),
            Some(until) => {
                let left = until.saturating_sub(now).as_secs_f64().ceil();
                format!("held for {left} s, then {}", self.mode.settled)
            }
        }
    }

    /// Until when clients are told of no refusal.
    pub(in super::super) fn shielded_until(&self) -> Option<Duration> {
        self.shield.map(|it| it.until)
    }

    fn set(&mut self, clock: Clock, mode: Mode<Duration>, seconds: u32) {
        let is_news = self.mode.settled != mode.settled
            || self.mode.held_until.is_some() != mode.held_until.is_some();
        if is_news {
            self.since = clock.unix().as_secs();
        }
        self.mode = mode;
        self.seconds = seconds;
    }
}

impl Modes {
    /// The modes of these moves. What `record` does not know begins with `start`; what it knows by
    /// another name, as with other ports, in the mode of that. With several, in the one that leaves
    /// most to the old server, which has the service as yet. `key` is for shares without a record.
    pub(in super::super) fn new(
        moves: impl IntoIterator<Item = (PeerId, Move)>,
        start: Settled,
        record: Option<&Record>,
        key: ShareKey,
        boot: &str,
        clock: Clock,
    ) -> Self {
        let same_boot = record.is_some_and(|record| record.boot == boot);
        let kept = record.map_or(&[][..], |record| &record.moves);
        let known: Vec<(Option<Move>, &Kept)> = kept
            .iter()
            .map(|kept| (kept.moved.parse().ok(), kept))
            .collect();
        let by_name: HashMap<&Move, &Kept> = known
            .iter()
            .filter_map(|(moved, kept)| Some((moved.as_ref()?, *kept)))
            .collect();
        let moves: Vec<(PeerId, Move)> = moves.into_iter().collect();
        // What the settings name otherwise now is over.
        let kept = known.iter().filter_map(|(moved, _)| moved.as_ref());
        let named = overlapping(kept, moves.iter().map(|(_, moved)| moved));
        let parsed = known.iter().filter(|(moved, _)| moved.is_some());
        let mut others: Vec<Kept> = parsed
            .zip(named)
            .filter(|(_, named)| !named)
            .map(|((_, kept), _)| Kept {
                held: None,
                ..(*kept).clone()
            })
            .collect();
        others.sort_by_key(|kept| std::cmp::Reverse(kept.since));
        others.truncate(MAX_OTHERS);
        let like = least_of_overlapping(&moves, &by_name);
        let moves: Vec<OneMove> = moves
            .into_iter()
            .zip(like)
            .map(|((peer, moved), like)| {
                if let Some(kept) = by_name.get(&moved) {
                    let held = kept.held.and_then(|held| held.left(same_boot, clock));
                    return OneMove {
                        peer,
                        mode: Mode {
                            settled: kept.mode,
                            held_until: held.map(|left| clock.now + left),
                        },
                        since: kept.since,
                        seconds: kept.held.map_or(0, |held| held.seconds),
                        shield: None,
                        moved,
                    };
                }
                OneMove {
                    peer,
                    mode: Mode::settled(like.unwrap_or(start)),
                    since: clock.unix().as_secs(),
                    seconds: 0,
                    shield: None,
                    moved,
                }
            })
            .collect();
        let mut modes = Self {
            key: record.map_or(key, |record| record.share_key),
            boot: boot.into(),
            moves,
            others,
            cutovers: Vec::new(),
            overruled: BTreeMap::new(),
            next: None,
        };
        modes.note_next();
        modes
    }

    /// From now on these are the moves: as after a restart with them, but that cut-overs go on as
    /// far as their moves are still there.
    pub(in super::super) fn set_moves(
        &mut self,
        moves: Vec<(PeerId, Move)>,
        start: Settled,
        clock: Clock,
    ) {
        let record = self.record(clock);
        let names: Vec<(Who, bool, Vec<Move>)> = self
            .cutovers
            .iter()
            .map(|it| {
                let moves = it.moves.iter().map(|&at| self.moves[at].moved.clone());
                (it.who, it.stopping, moves.collect())
            })
            .collect();
        let mut next = Self::new(moves, start, Some(&record), self.key, &self.boot, clock);
        next.overruled = std::mem::take(&mut self.overruled);
        let shields: HashMap<&Move, Shield> = (self.moves.iter())
            .filter_map(|it| Some((&it.moved, it.shield?)))
            .collect();
        for one in &mut next.moves {
            one.shield = shields.get(&one.moved).copied();
        }
        for (who, stopping, moves) in names {
            let all = next.moves.iter().enumerate();
            let there = all.filter(|(_, it)| moves.contains(&it.moved));
            let moves = there.map(|(at, _)| at).collect();
            next.cutovers.push(Cutover {
                who,
                moves,
                stopping,
            });
        }
        *self = next;
    }

    /// Each move.
    pub(in super::super) fn moves(&self) -> &[OneMove] {
        &self.moves
    }

    /// Which clients a share takes.
    pub(in super::super) fn key(&self) -> ShareKey {
        self.key
    }

    /// The places of the moves that a command is about.
    ///
    /// # Errors
    /// If one of them is no move.
    pub(in super::super) fn places(&self, what: &[String]) -> Result<Vec<usize>, Refusal> {
        if what.is_empty() {
            return Ok((0..self.moves.len()).collect());
        }
        let all = self.moves.iter().enumerate();
        let all: HashMap<&Move, usize> = all.map(|(place, it)| (&it.moved, place)).collect();
        let place = |text: &String| {
            let wanted: Option<Move> = text.parse().ok();
            let found = wanted.and_then(|wanted| all.get(&wanted).copied());
            found.ok_or_else(|| self.not_moved(text))
        };
        let mut places = what.iter().map(place).collect::<Result<Vec<_>, _>>()?;
        places.sort_unstable();
        places.dedup();
        Ok(places)
    }

    fn not_moved(&self, what: &str) -> Refusal {
        let named = self.moves.iter().take(NAMED).map(|it| it.moved.to_string());
        let mut known = named.collect::<Vec<_>>().join(", ");
        if let Some(more @ 1..) = self.moves.len().checked_sub(NAMED) {
            known.push_str(&format!(" and {more} more (`ipmoved status` shows all)"));
        }
        Refusal::NotMoved {
            what: what.into(),
            known,
        }
    }

    /// Carries out a command. A way back comes before everything else: it ends the cut-overs of
    /// others.
    ///
    /// # Errors
    /// If it is refused; nothing has changed then.
    pub(in super::super) fn order(
        &mut self,
        clock: Clock,
        who: Who,
        request: &Request,
    ) -> Result<Ordered, Refusal> {
        let places = self.places(request.what())?;
        let is_back = matches!(request, Request::Back { .. });
        if let Some(&pid) = self.overruled.get(&who.connection).filter(|_| !is_back) {
            return Err(Refusal::Overruled { pid });
        }
        let is_others = |it: &Cutover| it.who.connection != who.connection;
        let both = |it: &Cutover| it.moves.iter().find(|it| places.contains(it)).copied();
        let mut others = self.cutovers.iter().filter(|it| is_others(it));
        if !is_back && let Some((cutover, place)) = others.find_map(|it| Some((it, both(it)?))) {
            return Err(Refusal::Cutover {
                what: self.moves[place].moved.to_string(),
                pid: cutover.who.pid,
            });
        }
        let next = match request {
            Request::Move { percent, .. } => {
                Next::Settled(percent.map_or(Settled::Moved, Settled::Shared))
            }
            Request::Back { .. } => Next::Settled(Settled::Here),
            Request::Hold { seconds, .. } if (1..=MAX_HOLD).contains(seconds) => Next::Held {
                until: clock.now + seconds_of(*seconds),
                seconds: *seconds,
            },
            Request::Hold { .. } => return Err(Refusal::Seconds),
            Request::Shield { seconds, .. } => {
                Next::Shielded(clock.now + seconds_of((*seconds).min(MAX_HOLD)))
            }
            Request::Cutover { .. } => {
                self.cutovers.push(Cutover {
                    who,
                    moves: places.clone(),
                    stopping: false,
                });
                Next::Same
            }
            Request::Stopping { .. } => {
                let own = self.cutovers.iter_mut().filter(|it| it.who == who);
                own.for_each(|it| it.stopping = true);
                Next::Same
            }
            Request::Forget { .. } | Request::Reload => Next::Same,
        };
        let (mut ended, mut starting) = (Vec::new(), Vec::new());
        if is_back {
            let over = |it: &Cutover| is_others(it) && both(it).is_some();
            for cutover in self.cutovers.iter().filter(|it| over(it)) {
                self.overruled.insert(cutover.who.connection, who.pid);
                ended.push(cutover.who.pid);
                if cutover.stopping {
                    starting.extend(&cutover.moves);
                }
            }
            self.cutovers.retain(|it| !over(it));
        }
        let mut moves = Vec::new();
        for place in places {
            let one = &mut self.moves[place];
            let before = one.says(clock.now);
            let connection = who.connection;
            match next {
                Next::Settled(settled) if starting.contains(&place) => {
                    let mode = Mode {
                        settled,
                        held_until: Some(clock.now + seconds_of(RESTART)),
                    };
                    one.set(clock, mode, RESTART);
                    one.shield = None;
                }
                Next::Settled(settled) => {
                    one.set(clock, Mode::settled(settled), 0);
                    one.shield = one
                        .shield
                        .filter(|it| !is_back && it.connection == connection);
                }
                Next::Held { until, seconds } => {
                    let held_until = Some(until);
                    let mode = Mode {
                        held_until,
                        ..one.mode
                    };
                    one.set(clock, mode, seconds);
                }
                Next::Shielded(until) => one.shield = Some(Shield { connection, until }),
                Next::Same => {}
            }
            moves.push(Changed {
                what: one.moved.to_string(),
                before,
                mode: one.says(clock.now),
            });
        }
        self.note_next();
        let restarts = (!starting.is_empty()).then_some(RESTART);
        Ok(Ordered {
            moves,
            ended,
            restarts,
        })
    }

    /// Whether something is held, or a cut-over is running.
    pub(in super::super) fn is_busy(&self) -> bool {
        let mut moves = self.moves.iter();
        !self.cutovers.is_empty() || moves.any(|it| it.mode.held_until.is_some())
    }

    /// The process whose cut-over a move is in, if there is one.
    pub(in super::super) fn cutover_of(&self, place: usize) -> Option<i32> {
        let takes = |it: &&Cutover| it.moves.binary_search(&place).is_ok();
        self.cutovers.iter().find(takes).map(|it| it.who.pid)
    }

    /// A connection has ended, and with it its cut-over. Returns whether clients are to be told of
    /// refusals again.
    pub(in super::super) fn gone(&mut self, connection: u64) -> bool {
        self.cutovers.retain(|it| it.who.connection != connection);
        self.overruled.remove(&connection);
        let mut ended = false;
        for one in &mut self.moves {
            let shield = one.shield.take_if(|it| it.connection == connection);
            ended |= shield.is_some();
        }
        ended
    }

    /// Ends the holds that are over. Returns the places of their moves.
    pub(in super::super) fn end_holds(&mut self, clock: Clock) -> Vec<usize> {
        let mut ended = Vec::new();
        if self.next.is_none_or(|next| next > clock.now) {
            return ended;
        }
        for (place, one) in self.moves.iter_mut().enumerate() {
            if one.mode.held_until.is_some_and(|until| until <= clock.now) {
                let settled = one.mode.settled;
                one.set(clock, Mode::settled(settled), 0);
                ended.push(place);
            }
        }
        self.note_next();
        ended
    }

    /// When the next hold is over.
    pub(in super::super) fn next(&self) -> Option<Duration> {
        self.next
    }

    fn note_next(&mut self) {
        self.next = self.moves.iter().filter_map(|it| it.mode.held_until).min();
    }

    /// What has to outlive the daemon.
    pub(in super::super) fn record(&self, clock: Clock) -> Record {
        let of = |one: &OneMove| Kept {
            moved: one.moved.to_string(),
            mode: one.mode.settled,
            since: one.since,
            held: one.mode.held_until.map(|until| KeptHold {
                until_ms: until.as_millis() as u64,
                until_unix_ms: (clock.unix() + until.saturating_sub(clock.now)).as_millis() as u64,
                seconds: one.seconds,
            }),
        };
        let moves = self.moves.iter().map(of).chain(self.others.iter().cloned());
        Record {
            share_key: self.key,
            boot: self.boot.clone(),
            moves: moves.collect(),
            carried: Vec::new(),
        }
    }
}

impl KeptHold {
    /// How much is left of it.
    fn left(self, same_boot: bool, clock: Clock) -> Option<Duration> {
        let (until, now) = match same_boot {
            true => (self.until_ms, clock.now),
            false => (self.until_unix_ms, clock.unix()),
        };
        let left = Duration::from_millis(until).saturating_sub(now);
        let left = left.min(seconds_of(self.seconds.min(MAX_HOLD)));
        (!left.is_zero()).then_some(left)
    }
}

/// For each move, the mode that leaves most to the old server, of those kept for what it overlaps.
fn least_of_overlapping(
    moves: &[(PeerId, Move)],
    kept: &HashMap<&Move, &Kept>,
) -> Vec<Option<Settled>> {
    let mut modes: Vec<Settled> = Vec::new();
    for kept in kept.values() {
        if !modes.contains(&kept.mode) {
            modes.push(kept.mode);
        }
    }
    modes.sort_by_key(|mode| mode.percent());
    let mut least = vec![None; moves.len()];
    let all: Vec<usize> = (0..moves.len()).collect();
    halve(&modes, &all, moves, kept, &mut least);
    least
}

/// The same of some moves, among some modes in order: those which overlap something in the first
/// half of these have their least one there. So each move is looked at a few times, however many
/// modes there are.
fn halve(
    modes: &[Settled],
    some: &[usize],
    moves: &[(PeerId, Move)],
    kept: &HashMap<&Move, &Kept>,
    least: &mut [Option<Settled>],
) {
    if modes.is_empty() || some.is_empty() {
        return;
    }
    let (first, rest) = modes.split_at(modes.len().div_ceil(2));
    let in_it = kept.iter().filter(|(_, kept)| first.contains(&kept.mode));
    let overlaps = overlapping(
        some.iter().map(|&place| &moves[place].1),
        in_it.map(|(moved, _)| *moved),
    );
    let (mut within, mut beyond) = (Vec::new(), Vec::new());
    for (&place, overlaps) in some.iter().zip(overlaps) {
        match overlaps {
            true => within.push(place),
            false => beyond.push(place),
        }
    }
    halve(rest, &beyond, moves, kept, least);
    match first {
        [mode] => within.iter().for_each(|&place| least[place] = Some(*mode)),
        _ => halve(first, &within, moves, kept, least),
    }
}

fn seconds_of(seconds: u32) -> Duration {
    Duration::from_secs(seconds.into())
}

#[cfg(test)]
mod tests;
