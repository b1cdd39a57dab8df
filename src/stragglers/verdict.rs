//! Whether the old server can be switched off: what `ipmoved verdict` says, and what it rests on.
//!
//! * Somebody must have watched for all of the time that is judged, and still watch.
//! * No client may have come in that time. A passer-by is none: whoever came for the first time in
//!   it, within an hour, a few times, and asked for no name, as those do who try every address
//!   there is. They are named, so that a person can judge.
//! * What was too much to list or to look at may have been a client.

use std::collections::HashSet;

use serde::Serialize;

use crate::model::prefix::Prefix;

use super::findings::Straggler;
use super::history::{Came, History, Known, Watched, stretch};
use super::store::StoreError;
use super::time::{DAY, Day};
use super::trend::{self, Trend};

/// The part of the time in which nobody need have watched: restarts and reboots.
const UNWATCHED: f64 = 0.05;

/// So long ago somebody must have watched last, in seconds. It is written once a minute.
const STILL: i64 = 180;

/// A passer-by came within so many seconds …
const PASSES: i64 = 3_600;

/// … and had no more conversations than this. A scanner tries a port, and then what it speaks.
const PASSING: u64 = 4;

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
    /// The time that was judged, and when somebody watched.
    pub watched: Watched,
    /// Clients that came in it.
    pub clients: usize,
    /// Those of them that came most often.
    pub stragglers: Vec<Straggler>,
    /// Passers-by, which do not count.
    pub passers_by: Vec<String>,
    /// Clients that came and were left out by `--ignore`.
    pub ignored: usize,
    /// Conversations that were too many to list or to look at.
    pub unknown: u64,
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
        /// When somebody did last.
        last: Option<i64>,
    },
    /// Somebody did not watch for long enough.
    WatchedTooLittle {
        /// Seconds of watching.
        seconds: i64,
        /// Seconds that are judged.
        of: i64,
    },
    /// This server still has conversations of its own there.
    StillHere {
        /// So many.
        conversations: u64,
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
        let watched = history.watched(&[(since, now)])?[0];
        let known = history.known()?;
        let ignores = |client: &Prefix| ignored.iter().any(|it| it.covers(client));
        let passes = |client: &Prefix| known.get(client).is_some_and(|it| it.passes(since));
        let came = history.came(since)?;
        let (left_out, came): (Vec<Came>, Vec<Came>) =
            came.into_iter().partition(|it| ignores(&it.who.0));
        let (passing, mut came): (Vec<Came>, Vec<Came>) =
            came.into_iter().partition(|it| passes(&it.who.0));
        came.sort_by_key(|it| (std::cmp::Reverse((it.connections, it.last)), it.who));
        let clients = each(&came).len();
        let last_seen = came.iter().map(|it| it.last).max();
        let beside = history.beside(since)?;
        let unknown = beside.unlisted + beside.missed;
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
        if watched.last.is_none_or(|last| last < now - STILL) {
            reasons.push(Reason::NotWatched { last: watched.last });
        }
        if watched.share() < 1.0 - UNWATCHED {
            reasons.push(Reason::WatchedTooLittle {
                seconds: watched.seconds,
                of: quiet,
            });
        }
        let counts = |client: &Prefix| {
            !ignores(client) && !known.get(client).is_some_and(|it| it.passes(i64::MIN))
        };
        let days = days(history, now, counts)?;
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
            watched,
            clients,
            stragglers: Straggler::of(history, came, since)?,
            passers_by: each(&passing).iter().map(ToString::to_string).collect(),
            ignored: each(&left_out).len(),
            unknown,
            trend,
            around,
            days,
        })
    }
}

impl Verdict {
    /// Takes in how many conversations this server still has itself, which nobody records.
    pub fn with_here(mut self, conversations: u64) -> Self {
        if conversations > 0 {
            self.safe = false;
            self.reasons.push(Reason::StillHere { conversations });
        }
        self
    }
}

impl Known {
    /// Whether it is a passer-by that came for the first time since then.
    fn passes(&self, since: i64) -> bool {
        !self.named
            && self.first >= since
            && self.last - self.first <= PASSES
            && self.connections <= PASSING
    }
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
    now: i64,
    counts: impl Fn(&Prefix) -> bool,
) -> Result<Vec<DayCount>, StoreError> {
    let today = Day::of(now);
    let first = Day(today.0 - trend::WINDOW);
    let came = history.days(first)?;
    let all: Vec<Day> = (first.0..today.0).map(Day).collect();
    let stretches: Vec<(i64, i64)> = all.iter().copied().map(stretch).collect();
    let watched = history.watched(&stretches)?;
    let whole = all.into_iter().zip(watched);
    let whole = whole.filter(|(_, watched)| watched.share() >= WHOLE_DAY);
    let count = whole.map(|(day, _)| DayCount {
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
    use crate::stragglers::tests::{NOON, Scratch, visit, wall};

    const WEEK: i64 = 7 * DAY;

    /// Writes what came, and that somebody watched for so many days.
    fn record(dir: &Path, watched: i64, visits: impl IntoIterator<Item = Visit<i64>>) {
        let mut tally = Tally::default();
        visits.into_iter().for_each(|it| tally.add(it));
        let mut store = Store::to_write(dir).unwrap();
        let since = NOON - watched * DAY;
        store.write(tally.waiting(), Some(since), NOON).unwrap();
    }

    fn judged(dir: &Path, ignored: &[&str]) -> Verdict {
        let ignored: Vec<Prefix> = ignored.iter().map(|text| text.parse().unwrap()).collect();
        let history = History::open(dir, wall(NOON + 60)).unwrap();
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
        let mut visits = vec![visit("203.0.113.9", 443, NOON - DAY)];
        // One that asks for a name, one that came before, one that stays.
        let mut named = visit("203.0.113.10", 80, NOON - DAY);
        named.first_bytes = b"GET / HTTP/1.1\r\nHost: www.example.net\r\n\r\n".to_vec();
        visits.push(named);
        visits.push(visit("203.0.113.11", 443, NOON - 20 * DAY));
        visits.push(visit("203.0.113.11", 443, NOON - DAY));
        visits.extend((0..6).map(|n| visit("203.0.113.12", 443, NOON - DAY + n)));
        record(scratch.dir(), 30, visits);
        let verdict = judged(scratch.dir(), &[]);
        assert_eq!(verdict.passers_by, ["203.0.113.9"]);
        assert_eq!(verdict.clients, 3);
        let names: Vec<_> = verdict.stragglers.iter().flat_map(|it| &it.names).collect();
        assert_eq!(names, ["www.example.net"]);
    }

    #[test]
    fn it_is_not_safe_if_nobody_watched() {
        let scratch = Scratch::new("unwatched");
        record(scratch.dir(), 2, []);
        let short = Reason::WatchedTooLittle {
            seconds: 2 * DAY,
            of: WEEK,
        };
        assert_eq!(judged(scratch.dir(), &[]).reasons, [short]);
        let history = History::open(scratch.dir(), wall(NOON + DAY)).unwrap();
        let verdict = Verdict::of(&history, DAY * 3 / 2, &[]).unwrap();
        let last = Reason::NotWatched { last: Some(NOON) };
        assert_eq!(verdict.reasons[0], last);
    }

    #[test]
    fn what_was_too_much_may_have_been_a_client() {
        let scratch = Scratch::new("much");
        let mut tally = Tally::default();
        tally.add_others(
            NOON,
            Others {
                missed: 7,
                openings: 9,
                ..Others::default()
            },
        );
        let mut store = Store::to_write(scratch.dir()).unwrap();
        store
            .write(tally.waiting(), Some(NOON - 30 * DAY), NOON)
            .unwrap();
        let much = Reason::TooMuch { conversations: 7 };
        assert_eq!(judged(scratch.dir(), &[]).reasons, [much]);
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
    fn what_lies_in_the_future_is_left_out() {
        let scratch = Scratch::new("future");
        let ahead = NOON + 400 * DAY;
        record(scratch.dir(), 30, vec![visit("203.0.113.9", 443, ahead); 9]);
        let verdict = judged(scratch.dir(), &[]);
        assert!(verdict.safe, "{:?}", verdict.reasons);
    }
}
