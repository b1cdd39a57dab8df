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

use std::collections::HashMap;
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
        "a cutover of {what} is running (process {pid}): wait for it, or end it with ^C or \
         `kill {pid}`, which goes back"
    )]
    Cutover {
        /// One of its moves.
        what: String,
        /// Whose it is.
        pid: i32,
    },
}

impl Refusal {
    /// Whether the command itself is wrong.
    pub(in super::super) fn is_input(&self) -> bool {
        match self {
            Self::NotMoved { .. } | Self::Seconds => true,
            Self::Cutover { .. } => false,
        }
    }
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
}

/// A cut-over that is under way.
#[derive(Clone, Debug)]
struct Cutover {
    who: Who,
    /// The places of its moves.
    moves: Vec<usize>,
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
                        moved,
                    };
                }
                OneMove {
                    peer,
                    mode: Mode::settled(like.unwrap_or(start)),
                    since: clock.unix().as_secs(),
                    seconds: 0,
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
        let names: Vec<(Who, Vec<Move>)> = self
            .cutovers
            .iter()
            .map(|it| {
                let moves = it.moves.iter().map(|&at| self.moves[at].moved.clone());
                (it.who, moves.collect())
            })
            .collect();
        let mut next = Self::new(moves, start, Some(&record), self.key, &self.boot, clock);
        for (who, moves) in names {
            let all = next.moves.iter().enumerate();
            let there = all.filter(|(_, it)| moves.contains(&it.moved));
            let moves = there.map(|(at, _)| at).collect();
            next.cutovers.push(Cutover { who, moves });
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

    /// Carries out a command. Returns the moves that it was about, before and after.
    ///
    /// # Errors
    /// If it is refused; nothing has changed then.
    pub(in super::super) fn order(
        &mut self,
        clock: Clock,
        who: Who,
        request: &Request,
    ) -> Result<Vec<Changed>, Refusal> {
        let places = self.places(request.what())?;
        let others = self
            .cutovers
            .iter()
            .filter(|it| it.who.connection != who.connection);
        for cutover in others {
            if let Some(&both) = cutover.moves.iter().find(|place| places.contains(place)) {
                return Err(Refusal::Cutover {
                    what: self.moves[both].moved.to_string(),
                    pid: cutover.who.pid,
                });
            }
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
            Request::Cutover { .. } => {
                let moves = places.clone();
                self.cutovers.push(Cutover { who, moves });
                Next::Same
            }
            Request::Forget { .. } | Request::Reload => Next::Same,
        };
        let mut changed = Vec::new();
        for place in places {
            let one = &mut self.moves[place];
            let before = one.says(clock.now);
            match next {
                Next::Settled(settled) => one.set(clock, Mode::settled(settled), 0),
                Next::Held { until, seconds } => {
                    let held_until = Some(until);
                    let mode = Mode {
                        held_until,
                        ..one.mode
                    };
                    one.set(clock, mode, seconds);
                }
                Next::Same => {}
            }
            changed.push(Changed {
                what: one.moved.to_string(),
                before,
                mode: one.says(clock.now),
            });
        }
        self.note_next();
        Ok(changed)
    }

    /// A connection has ended, and with it its cut-over.
    pub(in super::super) fn gone(&mut self, connection: u64) {
        self.cutovers.retain(|it| it.who.connection != connection);
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
    for mode in modes {
        let in_it = kept.iter().filter(|(_, kept)| kept.mode == mode);
        let overlaps = overlapping(
            moves.iter().map(|(_, moved)| moved),
            in_it.map(|(moved, _)| *moved),
        );
        for (least, _) in least.iter_mut().zip(overlaps).filter(|(_, it)| *it) {
            least.get_or_insert(mode);
        }
    }
    least
}

fn seconds_of(seconds: u32) -> Duration {
    Duration::from_secs(seconds.into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::mode::Percent;

    const MOVES: [&str; 3] = ["192.0.2.5:80/tcp", "192.0.2.5:53", "2001:db8::5"];
    const ME: Who = Who {
        connection: 1,
        pid: 7,
    };
    const OTHER: Who = Who {
        connection: 2,
        pid: 8,
    };

    fn clock(seconds: u64) -> Clock {
        Clock {
            now: Duration::from_secs(1_000 + seconds),
            wall: SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000 + seconds),
        }
    }

    fn moves(names: &[&str]) -> Vec<(PeerId, Move)> {
        let moved = |name: &&str| (PeerId(0), name.parse().unwrap());
        names.iter().map(moved).collect()
    }

    const KEY: ShareKey = ShareKey([1, 2]);

    fn begin(start: Settled) -> Modes {
        Modes::new(moves(&MOVES), start, None, KEY, "boot", clock(0))
    }

    fn what(places: &[usize]) -> Vec<String> {
        places.iter().map(|&place| MOVES[place].into()).collect()
    }

    fn of(modes: &Modes) -> Vec<Mode<Duration>> {
        modes.moves.iter().map(|it| it.mode).collect()
    }

    fn requests() -> impl Strategy<Value = Request> {
        let places = prop::collection::vec(0..MOVES.len(), 0..4).prop_map(|it| what(&it));
        (places, 0_u8..101, 0_u32..40, 0..5).prop_map(|(what, percent, seconds, kind)| match kind {
            0 => Request::Move {
                what,
                percent: Percent::new(percent),
            },
            1 => Request::Hold { what, seconds },
            2 => Request::Back { what },
            3 => Request::Cutover { what },
            _ => Request::Forget { what },
        })
    }

    proptest! {
        /// Whatever is ordered and whenever the daemon is killed, what it begins with next time is
        /// what it had, and nothing but a command or the end of a hold changes a mode.
        #[test]
        fn nothing_but_commands_and_time_changes_a_mode(
            steps in prop::collection::vec((requests(), any::<bool>(), 0_u64..20), 1..30),
        ) {
            let (mut modes, mut at) = (begin(Settled::Moved), 0);
            for (request, mine, later) in steps {
                let before = modes.clone();
                let who = if mine { ME } else { OTHER };
                let about = modes.places(request.what()).unwrap();
                let result = modes.order(clock(at), who, &request);
                for place in 0..MOVES.len() {
                    let (was, is) = (before.moves[place].mode, modes.moves[place].mode);
                    let changes = matches!(request, Request::Move { .. } | Request::Back { .. });
                    if result.is_err() || !about.contains(&place) {
                        prop_assert_eq!(was, is);
                    } else if !changes {
                        prop_assert_eq!(was.settled, is.settled, "a hold keeps what follows");
                    } else {
                        prop_assert_eq!(is.held_until, None);
                    }
                }
                let record = modes.record(clock(at));
                let text = serde_json::to_string(&record).unwrap();
                let record: Record = serde_json::from_str(&text).unwrap();
                let (record, key) = (Some(&record), ShareKey([3, 4]));
                let (now, start) = (clock(at), Settled::Here);
                let again = Modes::new(moves(&MOVES), start, record, key, "boot", now);
                prop_assert_eq!(again.key(), KEY);
                prop_assert_eq!(of(&again), of(&modes));
                at += later;
                let (held, next) = (of(&modes), modes.next());
                let ended = modes.end_holds(clock(at));
                for (place, was) in held.into_iter().enumerate() {
                    let is = modes.moves[place].mode;
                    let over = was.held_until.is_some_and(|until| until <= clock(at).now);
                    prop_assert_eq!(ended.contains(&place), over);
                    prop_assert_eq!(is.settled, was.settled);
                    prop_assert_eq!(is.held_until, was.held_until.filter(|_| !over));
                }
                prop_assert_eq!(ended.is_empty(), next.is_none_or(|next| next > clock(at).now));
            }
        }

        /// A reboot ends no hold early, and none lasts longer than was asked, whatever the clock.
        #[test]
        fn a_hold_survives_a_reboot_but_not_a_wrong_clock(
            seconds in 1_u32..3_600, away in 0_u64..5_000, wall in any::<u32>(),
        ) {
            let mut modes = begin(Settled::Here);
            let what = Vec::new();
            modes.order(clock(0), ME, &Request::Hold { what, seconds }).unwrap();
            let record = modes.record(clock(0));
            let begin = |wall| {
                let clock = Clock { now: Duration::from_secs(9), wall };
                let modes = moves(&MOVES);
                let modes = Modes::new(modes, Settled::Moved, Some(&record), KEY, "new", clock);
                let left = modes.moves[0].mode.held_until.map(|until| until - clock.now);
                (modes.moves[0].mode.settled, left.map_or(0, |left| left.as_secs()))
            };
            let left = u64::from(seconds).saturating_sub(away);
            prop_assert_eq!(begin(clock(away).wall), (Settled::Here, left));
            let wrong = SystemTime::UNIX_EPOCH + Duration::from_secs(wall.into());
            prop_assert!(begin(wrong).1 <= seconds.into());
        }
    }

    #[test]
    fn while_a_cutover_runs_nobody_else_changes_its_moves() {
        let mut modes = begin(Settled::Here);
        let cutover = Request::Cutover { what: what(&[0]) };
        modes.order(clock(0), ME, &cutover).unwrap();
        for places in [&[0_usize][..], &[1, 0], &[]] {
            for request in [
                Request::Move {
                    what: what(places),
                    percent: None,
                },
                Request::Hold {
                    what: what(places),
                    seconds: 5,
                },
                Request::Back { what: what(places) },
                Request::Cutover { what: what(places) },
            ] {
                let refused = modes.order(clock(1), OTHER, &request).unwrap_err();
                assert!(!refused.is_input());
                let text = refused.to_string();
                assert!(text.contains("192.0.2.5:80/tcp"), "{text}");
                assert!(text.contains("`kill 7`"), "{text}");
            }
        }
        let others = Request::Back {
            what: what(&[1, 2]),
        };
        assert!(modes.order(clock(1), OTHER, &others).is_ok());
        let own = Request::Hold {
            what: what(&[0]),
            seconds: 5,
        };
        assert!(modes.order(clock(1), ME, &own).is_ok());
        modes.gone(ME.connection);
        assert!(modes.order(clock(2), OTHER, &cutover).is_ok());
    }

    #[test]
    fn what_is_no_move_is_refused_with_what_is() {
        let mut modes = begin(Settled::Moved);
        for wrong in ["192.0.2.5", "192.0.2.5:80", "203.0.113.1", "www", ""] {
            let what = vec![MOVES[0].into(), wrong.into()];
            let refused = modes
                .order(clock(0), ME, &Request::Back { what })
                .unwrap_err();
            assert!(refused.is_input());
            let text = refused.to_string();
            assert!(
                text.starts_with(&format!("`{wrong}` is not moved here")),
                "{text}"
            );
            assert!(
                text.contains("192.0.2.5:80/tcp, 192.0.2.5:53, 2001:db8::5"),
                "{text}"
            );
        }
        assert_eq!(of(&modes), of(&begin(Settled::Moved)));
        // Another way to write one is no other.
        let what = vec!["[2001:DB8:0::5]".into()];
        assert!(modes.order(clock(0), ME, &Request::Back { what }).is_ok());
        for seconds in [0, MAX_HOLD + 1] {
            let hold = Request::Hold {
                what: Vec::new(),
                seconds,
            };
            assert_eq!(modes.order(clock(0), ME, &hold), Err(Refusal::Seconds));
        }
    }

    #[test]
    fn a_move_that_changed_its_name_keeps_its_mode() {
        let mut modes = begin(Settled::Here);
        let percent = Percent::new(30);
        let share = Request::Move {
            what: what(&[1]),
            percent,
        };
        modes.order(clock(0), ME, &share).unwrap();
        let record = modes.record(clock(0));
        let names = [
            "192.0.2.5:80,443/tcp",
            "192.0.2.5:53/udp",
            "192.0.2.5:22",
            "192.0.2.6",
        ];
        let again = |names: &[&str], record: Record| {
            Modes::new(
                moves(names),
                Settled::Moved,
                Some(&record),
                KEY,
                "boot",
                clock(9),
            )
        };
        let modes = again(&names, record);
        let settled: Vec<Settled> = of(&modes).iter().map(|it| it.settled).collect();
        let shared = Settled::Shared(percent.unwrap());
        assert_eq!(
            settled,
            [Settled::Here, shared, Settled::Moved, Settled::Moved]
        );
        assert_eq!(modes.moves[0].since, clock(9).unix().as_secs());
        // What is taken out of the settings for a while has its mode when it is back.
        let without = again(&names[1..], modes.record(clock(9)));
        let back = again(&names, without.record(clock(9)));
        assert_eq!(of(&back), of(&modes));
        // Of two that become one, the old server keeps what it has.
        let one = again(&["192.0.2.5"], modes.record(clock(9)));
        assert_eq!(one.moves[0].mode.settled, Settled::Here);
    }

    #[test]
    fn the_file_is_text_that_people_can_read() {
        let mut modes = begin(Settled::Here);
        let hold = Request::Hold {
            what: what(&[0]),
            seconds: 60,
        };
        modes.order(clock(0), ME, &hold).unwrap();
        let share = Request::Move {
            what: what(&[1]),
            percent: Percent::new(5),
        };
        modes.order(clock(0), ME, &share).unwrap();
        let json = serde_json::to_value(modes.record(clock(0))).unwrap();
        let expected = serde_json::json!({
            "share_key": [1, 2],
            "boot": "boot",
            "moves": [
                {
                    "move": "192.0.2.5:80/tcp", "mode": "here", "since": 1_700_000_000,
                    "held": {
                        "until_ms": 1_060_000, "until_unix_ms": 1_700_000_060_000_u64,
                        "seconds": 60
                    }
                },
                { "move": "192.0.2.5:53", "mode": { "shared": 5 }, "since": 1_700_000_000 },
                { "move": "2001:db8::5", "mode": "here", "since": 1_700_000_000 },
            ]
        });
        assert_eq!(json, expected);
    }

    #[test]
    fn other_moves_leave_the_modes_of_the_rest_and_a_cut_over_of_them() {
        let mut modes = begin(Settled::Moved);
        let order = |modes: &mut Modes, who, request: Request| modes.order(clock(1), who, &request);
        order(&mut modes, ME, Request::Back { what: what(&[1]) }).unwrap();
        order(
            &mut modes,
            ME,
            Request::Hold {
                what: what(&[2]),
                seconds: 60,
            },
        )
        .unwrap();
        order(
            &mut modes,
            ME,
            Request::Cutover {
                what: what(&[0, 2]),
            },
        )
        .unwrap();
        let next = ["2001:db8::5", "192.0.2.9", "192.0.2.5:53"];
        modes.set_moves(moves(&next), Settled::Here, clock(11));
        let held = Mode {
            settled: Settled::Moved,
            held_until: Some(clock(61).now),
        };
        let here = Mode::settled(Settled::Here);
        assert_eq!(of(&modes), [held, here, here]);
        assert_eq!(modes.next(), Some(clock(61).now));
        let all = |names: &[&str]| Request::Move {
            what: names.iter().map(|&name| name.into()).collect(),
            percent: None,
        };
        assert!(
            order(&mut modes, OTHER, all(&next[..1])).is_err(),
            "its cut-over goes on"
        );
        order(&mut modes, OTHER, all(&next[1..])).unwrap();
        // It comes back as it was.
        modes.set_moves(moves(&MOVES), Settled::Here, clock(12));
        assert_eq!(modes.moves[0].mode, Mode::settled(Settled::Moved));
    }
}
