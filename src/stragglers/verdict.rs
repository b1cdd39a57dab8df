//! Whether the old server can be switched off: what `ipmoved verdict` says, and what it rests on.
//!
//! * Somebody must have watched each move for all of the time that is judged, and still watch.
//! * No client may have come in that time: nobody who was answered and went on.
//! * A passer-by is none: whoever tries every address there is, as scanners do, speaks TLS or HTTP
//!   and names nothing, and has come within an hour, a few times, and never before. That can be
//!   told once the week before was watched as well. They are named, so that a person can judge.
//!   With names that nobody looks for, and other protocols, nobody passes by.
//! * What was too much to list or to look at may have been a client.

use std::collections::HashSet;

use serde::Serialize;

use crate::model::moved::{Move, TCP, Transport, UDP};
use crate::model::prefix::Prefix;

use super::findings::{Straggler, ignores};
use super::history::{Came, History, Known, MoveWatched, Watched, Watches, stretch};
use super::store::StoreError;
use super::time::{DAY, Day};
use super::trend::{self, Trend};

/// The part of the time in which nobody need have watched: restarts and reboots.
const UNWATCHED: f64 = 0.05;

/// A passer-by came within so many seconds …
const PASSES: i64 = 3_600;

/// … and had no more conversations than this. A scanner tries a port, and then what it speaks.
const PASSING: u64 = 4;

/// So long somebody must have watched before the time that is judged, to tell who never came
/// before: most of what comes by itself comes once a week.
const BEFORE: i64 = 7 * DAY;

/// Clients that are shown.
const SHOWN: usize = 20;

/// Days that were watched for less of their time say nothing of how many came.
const WHOLE_DAY: f64 = 0.9;

/// Whether the old server can be switched off.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Verdict {
    /// When this was asked, in seconds since 1970.
    pub at: i64,
    /// It can.
    pub safe: bool,
    /// Why not; empty if it can.
    pub reasons: Vec<Reason>,
    /// The time that was judged, and when somebody watched, of the move that was watched least.
    pub watched: Watched,
    /// When somebody watched each move.
    pub moves: Vec<MoveWatched>,
    /// What moved before and does not any more: it is not judged.
    pub gone: Vec<String>,
    /// Clients that came in it.
    pub clients: usize,
    /// Those of them that came for the first time, within an hour, a few times, if the week before
    /// was watched.
    pub newcomers: usize,
    /// Those of them that came most often.
    pub stragglers: Vec<Straggler>,
    /// Passers-by, which do not count.
    pub passers_by: Vec<String>,
    /// Clients that came and were left out by `--ignore`.
    pub ignored: usize,
    /// Conversations that were too many to list, to look at, to write or to remember.
    pub unknown: u64,
    /// Conversations whose sender was answered, and neither went on nor came back.
    pub answered_once: u64,
    /// Conversations that were no client's: scans, floods, and what nobody answered.
    pub others: u64,
    /// Where the number of clients a day leads to.
    #[serde(flatten)]
    pub trend: Trend,
    /// When it will be safe if that goes on.
    pub around: Option<Day>,
    /// Clients a day: of each day that was watched, in order.
    pub days: Vec<DayCount>,
}

/// A day, and how many clients came.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct DayCount {
    /// The day.
    pub day: Day,
    /// The clients that count.
    pub clients: u64,
}

/// Why the old server cannot be switched off yet.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[serde(tag = "reason", rename_all = "snake_case")]
pub enum Reason {
    /// Clients came.
    Clients {
        /// So many.
        count: usize,
        /// When the last one was seen.
        last_seen: i64,
    },
    /// Nobody watches any more.
    NotWatched {
        /// What, if it is not all.
        what: Option<String>,
        /// When somebody did last.
        last: Option<i64>,
    },
    /// Somebody did not watch for long enough.
    WatchedTooLittle {
        /// What, if it is not all.
        what: Option<String>,
        /// Seconds of watching.
        seconds: i64,
        /// Seconds that are judged.
        of: i64,
    },
    /// This server still serves something itself.
    NotMoved {
        /// What.
        what: String,
        /// In which mode it is.
        mode: String,
    },
    /// The daemon that runs here has moved something of which this database knows nothing.
    NotRecorded {
        /// What.
        what: String,
    },
    /// Clients ask for something, and are not answered: so nobody knows who they are.
    NotAnswered {
        /// What.
        what: String,
    },
    /// This server still has conversations of its own there.
    StillHere {
        /// So many.
        conversations: u64,
    },
    /// How many it still has cannot be told.
    HereUnknown {
        /// Why.
        why: String,
    },
    /// There was too much to see who came.
    TooMuch {
        /// Conversations that are not listed.
        conversations: u64,
    },
}

impl Verdict {
    /// Judges the last `quiet` seconds, without the clients in `ignored`.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn of(history: &History, quiet: i64, ignored: &[Prefix]) -> Result<Self, StoreError> {
        let now = history.now();
        let since = now.saturating_sub(quiet);
        let watches = history.watches()?;
        let known = history.known()?;
        let knows_new = watches.least((since - BEFORE, since)).share() >= 1.0 - UNWATCHED;
        let is = |client: &Prefix, what: fn(&Known, i64) -> bool| {
            known.get(client).is_some_and(|it| what(it, since))
        };
        let came = history.came(since)?;
        let conversations = history.conversations(since)?;
        let (left_out, came): (Vec<Came>, Vec<Came>) =
            came.into_iter().partition(|it| ignores(ignored, &it.who.0));
        let (passing, mut came): (Vec<Came>, Vec<Came>) =
            (came.into_iter()).partition(|it| knows_new && is(&it.who.0, Known::passes));
        came.sort_by_key(|it| (std::cmp::Reverse((it.connections, it.last)), it.who));
        let each_client = each(&came);
        let clients = each_client.len();
        let is_new = |it: &&Prefix| knows_new && is(it, Known::is_new);
        let newcomers = each_client.iter().filter(is_new);
        let newcomers = newcomers.count();
        let last_seen = came.iter().map(|it| it.last).max();
        let beside = history.beside(since)?;
        let unknown = beside.unknown();
        let mut reasons = Vec::new();
        if let Some(last_seen) = last_seen {
            reasons.push(Reason::Clients {
                count: clients,
                last_seen,
            });
        }
        if unknown > 0 {
            reasons.push(Reason::TooMuch {
                conversations: unknown,
            });
        }
        reasons.extend(unwatched(&watches, (since, now)));
        let still = still_moved(&watches.each((since, now)));
        let unanswered = history.unanswered(since)?.into_iter();
        let unanswered = unanswered.filter(|what| still(what));
        reasons.extend(unanswered.map(|what| Reason::NotAnswered { what }));
        let counts = |client: &Prefix| {
            let passes = known.get(client).is_some_and(|it| it.passes(i64::MIN));
            !ignores(ignored, client) && !passes
        };
        let days = days(history, &watches, now, counts)?;
        let pairs: Vec<(Day, u64)> = days.iter().map(|it| (it.day, it.clients)).collect();
        let trend = trend::of(&pairs);
        let around = match trend {
            Trend::Declines { gone, .. } => gone
                .map(|day| Day(day.0 + (quiet + DAY - 1) / DAY))
                .filter(|&day| day > Day::of(now)),
            Trend::TooFewDays { .. } | Trend::NoDecline => None,
        };
        came.truncate(SHOWN);
        Ok(Self {
            at: now,
            safe: reasons.is_empty(),
            reasons,
            watched: watches.least((since, now)),
            moves: watches.each((since, now)),
            gone: watches.gone,
            clients,
            newcomers,
            stragglers: Straggler::of(history, came, since)?,
            passers_by: each(&passing).iter().map(ToString::to_string).collect(),
            ignored: each(&left_out).len(),
            unknown,
            answered_once: beside.answered_once,
            others: beside.others(conversations),
            trend,
            around,
            days,
        })
    }
}

/// What a running daemon and its host say.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Now {
    /// What has moved, each with its mode.
    pub modes: Vec<(String, String)>,
    /// What clients ask for and nobody answers.
    pub unanswered: Vec<String>,
    /// How many conversations this server has itself, or why that cannot be told.
    pub here: Result<u64, String>,
}

impl Verdict {
    /// Takes in what is so at present, which nobody records.
    #[must_use]
    pub fn with(mut self, now: Now) -> Self {
        let mut reasons = Vec::new();
        let recorded: HashSet<&str> = self.moves.iter().map(|it| it.what.as_str()).collect();
        for (what, mode) in now.modes {
            if mode != "moved" {
                reasons.push(Reason::NotMoved { what, mode });
            } else if !recorded.contains(what.as_str()) {
                reasons.push(Reason::NotRecorded { what });
            }
        }
        let unanswered = now.unanswered.into_iter();
        let unanswered = unanswered.map(|what| Reason::NotAnswered { what });
        reasons.extend(unanswered.filter(|it| !self.reasons.contains(it)));
        match now.here {
            Ok(0) => {}
            Ok(conversations) => reasons.push(Reason::StillHere { conversations }),
            Err(why) => reasons.push(Reason::HereUnknown { why }),
        }
        self.safe &= reasons.is_empty();
        self.reasons.extend(reasons);
        self
    }
}

impl Known {
    /// Whether it came for the first time since then, and is likely not to come again.
    fn is_new(&self, since: i64) -> bool {
        self.first >= since && self.last - self.first <= PASSES && self.connections <= PASSING
    }

    /// Whether it is a passer-by: such a one that might have named something each time, and never
    /// did.
    fn passes(&self, since: i64) -> bool {
        self.is_new(since)
            && !self.named
            && (1..).contains(&self.connections)
            && self.nameless >= self.connections
    }
}

/// Tells whether clients ask for one of these moves who ask for something.
fn still_moved(moves: &[MoveWatched]) -> impl Fn(&str) -> bool + use<> {
    let moves: Vec<Move> = moves.iter().filter_map(|it| it.what.parse().ok()).collect();
    move |what| {
        let Ok(asked) = what.parse::<Move>() else {
            return false;
        };
        let port = asked.ports.first().map(|ports| *ports.start());
        let protocols: &[u8] = match asked.transport {
            Some(Transport::Tcp) => &[TCP],
            Some(Transport::Udp) => &[UDP],
            None => &[TCP, UDP],
        };
        let covers = |it: &Move| {
            it.prefix.covers(&asked.prefix) && protocols.iter().any(|&one| it.takes(one, port))
        };
        moves.iter().any(covers)
    }
}

/// Why it cannot be told who came.
fn unwatched(watches: &Watches, stretch: (i64, i64)) -> Vec<Reason> {
    let each = watches.each(stretch);
    let quiet = stretch.1 - stretch.0;
    // Of many moves one is named, unless all are the same.
    let name = |it: &MoveWatched| {
        let differs = (each.iter()).any(|other| other.watched != it.watched);
        differs.then(|| it.what.clone())
    };
    let mut reasons = Vec::new();
    let last = each.iter().min_by_key(|it| it.watched.last);
    match last {
        None => reasons.push(Reason::NotWatched {
            what: None,
            last: None,
        }),
        Some(it) if !watches.is_live(&it.watched) => reasons.push(Reason::NotWatched {
            what: name(it),
            last: it.watched.last,
        }),
        Some(_) => {}
    }
    let least = each.iter().min_by_key(|it| it.watched.seconds);
    if let Some(it) = least.filter(|it| it.watched.share() < 1.0 - UNWATCHED) {
        reasons.push(Reason::WatchedTooLittle {
            what: name(it),
            seconds: it.watched.seconds,
            of: quiet,
        });
    }
    reasons
}

/// The clients among those who came, each once, in order.
fn each(came: &[Came]) -> Vec<Prefix> {
    let clients: HashSet<Prefix> = came.iter().map(|it| it.who.0).collect();
    let mut clients: Vec<Prefix> = clients.into_iter().collect();
    clients.sort_unstable();
    clients
}

/// How many clients came on each whole day that was watched.
fn days(
    history: &History,
    watches: &Watches,
    now: i64,
    counts: impl Fn(&Prefix) -> bool,
) -> Result<Vec<DayCount>, StoreError> {
    let today = Day::of(now);
    let first = Day(today.0 - trend::WINDOW);
    let came = history.days(first)?;
    let whole = (first.0..today.0)
        .map(Day)
        .filter(|&day| watches.has(stretch(day), WHOLE_DAY));
    let count = whole.map(|day| DayCount {
        day,
        clients: came.get(&day).map_or(0, |all| {
            all.iter().filter(|client| counts(client)).count() as u64
        }),
    });
    Ok(count.collect())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::model::visit::Visit;
    use crate::stragglers::store::Store;
    use crate::stragglers::tally::{Others, Tally};
    use crate::stragglers::tests::{NOON, Scratch, visit, wall, watch, watch_of};
    use crate::stragglers::watch::Watch;

    const WEEK: i64 = 7 * DAY;

    /// Writes what came, and that somebody watched for so many days.
    fn record(dir: &Path, watched: i64, visits: impl IntoIterator<Item = Visit<i64>>) {
        let mut tally = Tally::default();
        visits.into_iter().for_each(|it| tally.add(it));
        write(dir, &tally, &watch(NOON - watched * DAY), NOON);
    }

    fn write(dir: &Path, tally: &Tally, watch: &Watch, now: i64) {
        let mut store = Store::to_write(dir, None).unwrap();
        store.write(tally.waiting(), watch, now, true).unwrap();
    }

    fn judged(dir: &Path, ignored: &[&str]) -> Verdict {
        let ignored: Vec<Prefix> = ignored.iter().map(|text| text.parse().unwrap()).collect();
        let history = History::open(dir, wall(NOON + 60), None).unwrap();
        Verdict::of(&history, WEEK, &ignored).unwrap()
    }

    fn monitor(client: &str, days: std::ops::Range<i64>) -> Vec<Visit<i64>> {
        let hours = days.start * 24..days.end * 24;
        hours
            .map(|hour| visit(client, 443, NOON - hour * 3_600))
            .collect()
    }

    #[test]
    fn it_is_safe_when_nobody_came_and_somebody_watched() {
        let scratch = Scratch::new("safe");
        record(scratch.dir(), 30, monitor("203.0.113.9", 8..20));
        let verdict = judged(scratch.dir(), &[]);
        assert_eq!((verdict.safe, verdict.reasons.len()), (true, 0));
        assert_eq!((verdict.clients, verdict.ignored), (0, 0));
    }

    #[test]
    fn a_client_that_comes_keeps_it_on_unless_it_is_left_out() {
        let scratch = Scratch::new("client");
        record(scratch.dir(), 30, monitor("203.0.113.9", 0..20));
        let verdict = judged(scratch.dir(), &[]);
        let last = NOON;
        let reason = Reason::Clients {
            count: 1,
            last_seen: last,
        };
        assert_eq!((verdict.safe, &verdict.reasons[..]), (false, &[reason][..]));
        assert_eq!(
            verdict.stragglers[0].rhythm.map(|it| it.every_s),
            Some(3_600)
        );
        assert_eq!(verdict.trend, Trend::NoDecline);
        let verdict = judged(scratch.dir(), &["203.0.113.0/24", "2001:db8::/32"]);
        assert_eq!((verdict.safe, verdict.ignored), (true, 1));
    }

    #[test]
    fn who_passes_by_does_not_count_and_is_named() {
        let scratch = Scratch::new("passes");
        let asks = |client: &str, host: &str, at| {
            let mut asks = visit(client, 80, at);
            asks.first_bytes = format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n").into_bytes();
            asks
        };
        let nameless = |client: &str, at| asks(client, "192.0.2.5", at);
        let mut visits = vec![nameless("203.0.113.9", NOON - DAY)];
        // One that asks for a name, one that came before, one that stays, one of which nobody knows
        // whether it names something, and one that speaks something else as well.
        visits.push(asks("203.0.113.10", "www.example.net", NOON - DAY));
        visits.push(nameless("203.0.113.11", NOON - 20 * DAY));
        visits.push(nameless("203.0.113.11", NOON - DAY));
        visits.extend((0..6).map(|n| nameless("203.0.113.12", NOON - DAY + n)));
        visits.push(visit("203.0.113.13", 443, NOON - DAY));
        visits.push(nameless("203.0.113.14", NOON - DAY));
        visits.push(visit("203.0.113.14", 22, NOON - DAY));
        record(scratch.dir(), 30, visits);
        let verdict = judged(scratch.dir(), &[]);
        assert_eq!(verdict.passers_by, ["203.0.113.9"]);
        assert_eq!((verdict.clients, verdict.newcomers), (5, 3));
        let names: Vec<_> = verdict.stragglers.iter().flat_map(|it| &it.names).collect();
        assert!(names.contains(&&"www.example.net".to_owned()), "{names:?}");
    }

    #[test]
    fn nobody_passes_by_who_may_have_come_before() {
        let scratch = Scratch::new("before");
        let mut nameless = visit("203.0.113.9", 80, NOON - DAY);
        nameless.first_bytes = b"GET / HTTP/1.1\r\nHost: 192.0.2.5\r\n\r\n".to_vec();
        record(scratch.dir(), 10, [nameless]);
        let verdict = judged(scratch.dir(), &[]);
        assert_eq!((verdict.safe, verdict.clients), (false, 1));
        assert_eq!(verdict.passers_by, [""; 0]);
    }

    #[test]
    fn a_move_that_is_added_today_was_not_watched_before() {
        let scratch = Scratch::new("added");
        let mut both = watch_of(&[("192.0.2.5", true)], NOON - 30 * DAY);
        let moves = [
            ("192.0.2.5".to_owned(), true),
            ("192.0.2.6".to_owned(), true),
        ];
        both.set(&moves.into(), NOON - DAY);
        write(scratch.dir(), &Tally::default(), &both, NOON);
        let little = Reason::WatchedTooLittle {
            what: Some("192.0.2.6".into()),
            seconds: DAY,
            of: WEEK,
        };
        let verdict = judged(scratch.dir(), &[]);
        assert_eq!(verdict.reasons, [little]);
        assert!(
            verdict.to_text().contains("watched 192.0.2.6 for"),
            "{}",
            verdict.to_text()
        );
        // What is watched no more, though it has moved, was not forgotten about.
        let moves = [
            ("192.0.2.5".to_owned(), true),
            ("192.0.2.6".to_owned(), false),
        ];
        both.set(&moves.into(), NOON);
        write(scratch.dir(), &Tally::default(), &both, NOON + 10);
        write(scratch.dir(), &Tally::default(), &both, NOON + 8 * DAY);
        let history = History::open(scratch.dir(), wall(NOON + 8 * DAY), None).unwrap();
        let verdict = Verdict::of(&history, WEEK, &[]).unwrap();
        let what = Some("192.0.2.6".to_owned());
        let last = Some(NOON);
        assert_eq!(verdict.reasons[0], Reason::NotWatched { what, last });
        // And what has gone from the settings is said.
        let moves = [("192.0.2.5".to_owned(), true)];
        both.set(&moves.into(), NOON + 8 * DAY);
        write(scratch.dir(), &Tally::default(), &both, NOON + 8 * DAY + 1);
        let history = History::open(scratch.dir(), wall(NOON + 8 * DAY + 2), None).unwrap();
        let verdict = Verdict::of(&history, WEEK, &[]).unwrap();
        assert!(verdict.safe, "{:?}", verdict.reasons);
        assert_eq!(verdict.gone, ["192.0.2.6"]);
    }

    #[test]
    fn what_the_daemon_says_now_counts_as_well() {
        let scratch = Scratch::new("now");
        record(scratch.dir(), 30, []);
        let with = |modes: &[(&str, &str)], here| {
            let modes = modes.iter().map(|&(what, mode)| (what.into(), mode.into()));
            let (modes, unanswered) = (modes.collect(), Vec::new());
            judged(scratch.dir(), &[]).with(Now {
                modes,
                unanswered,
                here,
            })
        };
        assert!(with(&[("192.0.2.5", "moved")], Ok(0)).safe);
        let verdict = judged(scratch.dir(), &[]).with(Now {
            modes: Vec::new(),
            unanswered: vec!["192.0.2.5:80/tcp".into()],
            here: Ok(0),
        });
        let what = "192.0.2.5:80/tcp".into();
        assert_eq!(verdict.reasons, [Reason::NotAnswered { what }]);
        for (modes, here, reason) in [
            (&[("192.0.2.5", "shared")][..], Ok(0), "in mode shared"),
            (
                &[("192.0.2.5", "moved"), ("192.0.2.6", "moved")],
                Ok(0),
                "not in this database",
            ),
            (
                &[("192.0.2.5", "moved")],
                Ok(2),
                "2 conversations are still",
            ),
            (
                &[("192.0.2.5", "moved")],
                Err("no".into()),
                "cannot be counted (no)",
            ),
        ] {
            let verdict = with(modes, here);
            let text = verdict.to_text().replace("\n    ", " ");
            assert!(!verdict.safe && text.contains(reason), "{reason}: {text}");
        }
    }

    #[test]
    fn what_a_running_daemon_has_not_written_yet_was_watched() {
        let scratch = Scratch::new("live");
        record(scratch.dir(), 30, []);
        let of = |runs: Option<u64>| {
            let runs = runs.map(std::time::Duration::from_secs);
            let history = History::open(scratch.dir(), wall(NOON + 30), runs).unwrap();
            Verdict::of(&history, 60, &[]).unwrap()
        };
        assert!(of(Some(1_000)).safe);
        for unknown in [None, Some(20)] {
            let verdict = of(unknown);
            assert_eq!((verdict.safe, verdict.watched.seconds), (false, 30));
        }
    }

    #[test]
    fn it_is_not_safe_if_nobody_watched() {
        let scratch = Scratch::new("unwatched");
        record(scratch.dir(), 2, []);
        let short = Reason::WatchedTooLittle {
            what: None,
            seconds: 2 * DAY,
            of: WEEK,
        };
        assert_eq!(judged(scratch.dir(), &[]).reasons, [short]);
        let history = History::open(scratch.dir(), wall(NOON + DAY), None).unwrap();
        let verdict = Verdict::of(&history, DAY * 3 / 2, &[]).unwrap();
        let last = Reason::NotWatched {
            what: None,
            last: Some(NOON),
        };
        assert_eq!(verdict.reasons[0], last);
    }

    #[test]
    fn what_was_too_much_may_have_been_a_client() {
        let scratch = Scratch::new("much");
        for (others, count) in [((7, 0, 0), 7), ((0, 5, 0), 12), ((0, 0, 3), 15)] {
            let mut tally = Tally::default();
            let more = Others {
                openings: 9,
                missed: others.0,
                lost: others.1,
                displaced: others.2,
                ..Others::default()
            };
            tally.add_others(NOON, more);
            write(scratch.dir(), &tally, &watch(NOON - 30 * DAY), NOON);
            let much = Reason::TooMuch {
                conversations: count,
            };
            assert_eq!(judged(scratch.dir(), &[]).reasons, [much]);
        }
    }

    #[test]
    fn a_decline_leads_to_a_date() {
        let scratch = Scratch::new("decline");
        // Each day a tenth fewer.
        let mut visits = Vec::new();
        for day in 1..=14_i64 {
            let clients = (20.0 * 0.9_f64.powi(14 - day as i32)).round() as i64;
            let each = |client| visit(&format!("203.0.113.{client}"), 443, NOON - day * DAY);
            visits.extend((0..clients).map(each));
        }
        record(scratch.dir(), 14, visits);
        let verdict = judged(scratch.dir(), &[]);
        assert!(!verdict.safe);
        let Trend::Declines {
            halves_in_days,
            gone: Some(gone),
        } = verdict.trend
        else {
            panic!("{:?}", verdict.trend);
        };
        assert!((6.0..8.0).contains(&halves_in_days), "{halves_in_days}");
        assert_eq!(verdict.around, Some(Day(gone.0 + 7)));
        assert_eq!(
            verdict.days.len(),
            13,
            "the first day was not watched as a whole"
        );
    }

    #[test]
    fn whoever_came_while_the_clock_was_ahead_has_come() {
        for ahead in [2 * 3_600, 400 * DAY] {
            let scratch = Scratch::new("future");
            record(
                scratch.dir(),
                30,
                vec![visit("203.0.113.9", 443, NOON + ahead); 9],
            );
            let verdict = judged(scratch.dir(), &[]);
            let came = Reason::Clients {
                count: 1,
                last_seen: NOON + 60,
            };
            assert_eq!(verdict.reasons, [came], "{ahead}");
        }
    }

    #[test]
    fn a_client_of_ipv6_is_left_out_by_its_own_address() {
        let scratch = Scratch::new("ignore-6");
        record(
            scratch.dir(),
            30,
            vec![visit("2001:db8:1:2::9", 443, NOON); 9],
        );
        for ignored in ["2001:db8:1:2::9", "2001:db8:1:2::/64", "2001:db8::/32"] {
            let verdict = judged(scratch.dir(), &[ignored]);
            assert_eq!((verdict.safe, verdict.ignored), (true, 1), "{ignored}");
        }
        assert!(!judged(scratch.dir(), &["2001:db8:1:3::9"]).safe);
    }
}
