//! What is in the database, for those who ask.
//!
//! Owns the questions. A row that lies in the future was written while the clock was wrong, and is
//! left out; so is one that a person has put there and that makes no sense.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::time::SystemTime;

use crate::model::prefix::Prefix;
use crate::model::visit::ServedBy;

use super::store::{Store, StoreError, times, who};
use super::tally::Who;
use super::time::{DAY, Day};
use super::writer::unix;

/// Seconds by which a time may lie in the future: another clock may be a little ahead.
const AHEAD: i64 = 3_600;

/// The database, open to those who ask. The daemon may go on writing meanwhile.
#[derive(Debug)]
pub struct History {
    store: Store,
    now: i64,
}

/// A client's conversations with one port of a moved address.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Came {
    pub(super) who: Who,
    pub(super) connections: u64,
    pub(super) by_old: u64,
    pub(super) answered: u64,
    pub(super) went_on: u64,
    pub(super) bytes_in: u64,
    pub(super) bytes_out: u64,
    pub(super) first: i64,
    pub(super) last: i64,
    pub(super) days: u64,
}

/// A client, as far back as it is remembered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Known {
    pub(super) connections: u64,
    pub(super) first: i64,
    pub(super) last: i64,
    pub(super) named: bool,
}

/// What came beside the clients that are listed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize)]
pub struct Beside {
    /// Conversations that began, clients' among them.
    pub openings: u64,
    /// Those that were answered once without a connection, and whose sender never came back.
    pub answered_once: u64,
    /// Clients' conversations that were too many to list.
    pub unlisted: u64,
    /// Conversations that were too many to look at.
    pub missed: u64,
    /// Connections that were too many to look for a name in.
    pub unnamed: u64,
}

/// When somebody watched, in a stretch of time.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
pub struct Watched {
    /// When the stretch begins.
    pub from: i64,
    /// When it ends.
    pub to: i64,
    /// Seconds of it in which somebody watched.
    pub seconds: i64,
    /// Since when somebody watches at all, as far as is remembered.
    pub since: Option<i64>,
    /// When somebody watched last.
    pub last: Option<i64>,
}

impl Watched {
    /// The part of the stretch in which somebody watched, from 0 to 1.
    pub fn share(&self) -> f64 {
        self.seconds as f64 / (self.to - self.from).max(1) as f64
    }
}

impl History {
    /// Opens the database in the state directory, as it is `now`.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn open(dir: &Path, now: SystemTime) -> Result<Self, StoreError> {
        let store = Store::to_read(dir)?;
        let now = unix(now);
        Ok(Self { store, now })
    }

    /// When it was opened, in seconds since 1970.
    pub fn now(&self) -> i64 {
        self.now
    }

    /// Who came since then, by client and port. Counts are those of whole days.
    pub(super) fn came(&self, since: i64) -> Result<Vec<Came>, StoreError> {
        let query = "
            SELECT client, address, port, protocol, sum(connections),
                   sum(CASE served_by WHEN 'old' THEN connections ELSE 0 END),
                   sum(answered), sum(went_on), sum(bytes_in), sum(bytes_out),
                   min(first), max(last), count(DISTINCT day)
            FROM visits WHERE day >= ?1 AND last <= ?3
            GROUP BY client, address, port, protocol HAVING max(last) >= ?2";
        let day = Day::of(since).to_string();
        let params = (day, since, self.latest());
        self.store.read(query, params, |row| {
            let Some(who) = who(row)? else {
                return Ok(None);
            };
            Ok(Some(Came {
                who,
                connections: count(row, 4)?,
                by_old: count(row, 5)?,
                answered: count(row, 6)?,
                went_on: count(row, 7)?,
                bytes_in: count(row, 8)?,
                bytes_out: count(row, 9)?,
                first: row.get(10)?,
                last: row.get::<_, i64>(11)?.min(self.now),
                days: count(row, 12)?,
            }))
        })
    }

    /// All clients that are remembered.
    pub(super) fn known(&self) -> Result<HashMap<Prefix, Known>, StoreError> {
        let query = "
            SELECT client, sum(connections), min(first), max(last), EXISTS (
                SELECT 1 FROM names WHERE names.client = visits.client AND name != '(none)')
            FROM visits WHERE last <= ?1 GROUP BY client";
        let known = self.store.read(query, [self.latest()], |row| {
            let client: String = row.get(0)?;
            let known = Known {
                connections: count(row, 1)?,
                first: row.get(2)?,
                last: row.get(3)?,
                named: row.get(4)?,
            };
            Ok(client.parse().ok().map(|client| (client, known)))
        })?;
        Ok(known.into_iter().collect())
    }

    /// When their last conversations began.
    pub(super) fn arrivals(&self) -> Result<HashMap<Who, Vec<i64>>, StoreError> {
        let query = "SELECT client, address, port, protocol, last FROM arrivals";
        let all = self.store.read(query, [], |row| {
            let list: String = row.get(4)?;
            let mut list = times(&list);
            list.retain(|&at| at <= self.latest());
            Ok(who(row)?.map(|who| (who, list)))
        })?;
        Ok(all.into_iter().collect())
    }

    /// The names that they asked for since then, the one asked for last first.
    pub(super) fn names(&self, since: i64) -> Result<HashMap<Who, Vec<String>>, StoreError> {
        let query = "
            SELECT client, address, port, protocol, name FROM names
            WHERE last >= ?1 ORDER BY last DESC, name";
        let all = self.store.read(query, [since], |row| {
            let name: String = row.get(4)?;
            // Whoever has put it there, a terminal gets to see it.
            let plain = !name.chars().any(char::is_control);
            Ok(who(row)?.filter(|_| plain).map(|who| (who, name)))
        })?;
        let mut names: HashMap<Who, Vec<String>> = HashMap::new();
        for (who, name) in all {
            names.entry(who).or_default().push(name);
        }
        Ok(names)
    }

    /// Which clients came on which day since then.
    pub(super) fn days(&self, since: Day) -> Result<BTreeMap<Day, Vec<Prefix>>, StoreError> {
        let query = "SELECT DISTINCT day, client FROM visits WHERE day >= ?1 AND last <= ?2";
        let params = (since.to_string(), self.latest());
        let all = self.store.read(query, params, |row| {
            let (day, client): (String, String) = (row.get(0)?, row.get(1)?);
            Ok(Day::parse(&day).zip(client.parse().ok()))
        })?;
        let mut days: BTreeMap<Day, Vec<Prefix>> = BTreeMap::new();
        for (day, client) in all {
            days.entry(day).or_default().push(client);
        }
        Ok(days)
    }

    /// What came beside, on the day of `since` and later.
    pub(super) fn beside(&self, since: i64) -> Result<Beside, StoreError> {
        let query = "
            SELECT openings, answered_once, unlisted, missed, unnamed
            FROM days WHERE day BETWEEN ?1 AND ?2";
        let days = [since, self.latest()].map(|at| Day::of(at).to_string());
        let mut beside = Beside::default();
        for [openings, answered_once, unlisted, missed, unnamed] in
            self.store.read(query, days, |row| {
                let of = |at| count(row, at);
                Ok(Some([of(0)?, of(1)?, of(2)?, of(3)?, of(4)?]))
            })?
        {
            beside.openings += openings;
            beside.answered_once += answered_once;
            beside.unlisted += unlisted;
            beside.missed += missed;
            beside.unnamed += unnamed;
        }
        Ok(beside)
    }

    /// When somebody watched, of these stretches of time.
    pub(super) fn watched(&self, stretches: &[(i64, i64)]) -> Result<Vec<Watched>, StoreError> {
        let query = "SELECT since, until FROM watched WHERE since <= ?1 ORDER BY since";
        let spans = self.store.read(query, [self.now], |row| {
            Ok(Some((
                row.get::<_, i64>(0)?,
                row.get::<_, i64>(1)?.min(self.now),
            )))
        })?;
        let since = spans.first().map(|span| span.0);
        let last = spans.iter().map(|span| span.1).max();
        let watched = |&(from, to): &(i64, i64)| {
            let (mut seconds, mut at) = (0, from);
            for &(since, until) in &spans {
                let (since, until) = (since.max(at), until.min(to));
                seconds += (until - since).max(0);
                at = at.max(until);
            }
            Watched {
                from,
                to,
                seconds,
                since,
                last,
            }
        };
        Ok(stretches.iter().map(watched).collect())
    }

    /// The latest time that may be right.
    fn latest(&self) -> i64 {
        self.now.saturating_add(AHEAD)
    }
}

/// A count, which SQLite has with a sign.
fn count(row: &rusqlite::Row<'_>, at: usize) -> rusqlite::Result<u64> {
    row.get::<_, i64>(at).map(|count| count.max(0) as u64)
}

/// How many of so many conversations the old server itself has answered.
pub(super) fn by(served: ServedBy, came: &Came) -> u64 {
    match served {
        ServedBy::Old => came.by_old,
        ServedBy::New => came.connections - came.by_old.min(came.connections),
    }
}

/// A day as a stretch of time.
pub(super) fn stretch(day: Day) -> (i64, i64) {
    (day.start(), day.start().saturating_add(DAY))
}
