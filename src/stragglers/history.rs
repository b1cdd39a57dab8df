//! What is in the database, for those who ask.
//!
//! Owns the questions. Whoever is written as come in the future, by a clock that was wrong, has
//! come now: that is not known to be long ago. A row that a person has put there and that makes no
//! sense is left out.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::time::{Duration, SystemTime};

use crate::model::asked::Asked;
use crate::model::prefix::Prefix;
use crate::model::visit::ServedBy;

use super::store::{AHEAD, Store, StoreError, times, who};
use super::tally::{Arrived, Who};
use super::time::{DAY, Day};
use super::writer::unix;

/// The database, open to those who ask. The daemon may go on writing meanwhile.
#[derive(Debug)]
pub struct History {
    store: Store,
    now: i64,
    /// Since when the daemon runs that writes it, if one does.
    runs_since: Option<i64>,
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
    /// Connections that might have named something, and did not.
    pub(super) nameless: u64,
}

/// What came beside the clients that are listed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize)]
pub struct Beside {
    /// Conversations that began, clients' among them.
    pub openings: u64,
    /// Those that were answered, and whose sender neither went on nor came back.
    pub answered_once: u64,
    /// Clients' conversations that were too many to list.
    pub unlisted: u64,
    /// Conversations that were too many to look at.
    pub missed: u64,
    /// Connections that were too many to look for a name in.
    pub unnamed: u64,
    /// Conversations that could not be written in time.
    pub lost: u64,
    /// Senders among `answered_once` that were too many to remember.
    pub displaced: u64,
}

impl Beside {
    /// Conversations of which nobody knows whether they were a client's.
    pub fn unknown(&self) -> u64 {
        self.unlisted + self.missed + self.lost + self.displaced
    }

    /// Conversations that were no client's, where those had so many that are listed.
    pub(super) fn others(&self, listed: u64) -> u64 {
        let clients = listed.saturating_add(self.unlisted);
        self.openings.saturating_sub(clients)
    }
}

/// So long ago somebody must have watched last, in seconds. It is written every 20 s.
pub(super) const STILL: i64 = 60;

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

/// A move, and when it was watched.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
pub struct MoveWatched {
    /// As `--move` names it.
    pub what: String,
    /// When somebody watched it, in the time that is asked about.
    #[serde(flatten)]
    pub watched: Watched,
}

/// When each move was watched.
#[derive(Debug)]
pub(super) struct Watches {
    now: i64,
    moves: Vec<WatchedMove>,
    /// Moves that have gone from the settings.
    pub(super) gone: Vec<String>,
}

#[derive(Debug)]
struct WatchedMove {
    what: String,
    since: i64,
    /// In order.
    spans: Vec<(i64, i64)>,
}

impl WatchedMove {
    fn of(&self, (from, to): (i64, i64)) -> Watched {
        let (mut seconds, mut at) = (0, from);
        for &(since, until) in &self.spans {
            let (since, until) = (since.max(at), until.min(to));
            seconds += (until - since).max(0);
            at = at.max(until);
        }
        Watched {
            from,
            to,
            seconds,
            since: self.spans.first().map(|span| span.0),
            last: self.spans.iter().map(|span| span.1).max(),
        }
    }
}

impl Watches {
    /// When each move that still is one was watched, in this stretch of time.
    pub(super) fn each(&self, stretch: (i64, i64)) -> Vec<MoveWatched> {
        let of = |it: &WatchedMove| MoveWatched {
            what: it.what.clone(),
            watched: it.of(stretch),
        };
        self.moves.iter().map(of).collect()
    }

    /// The one of them that was watched least.
    pub(super) fn least(&self, stretch: (i64, i64)) -> Watched {
        let each = self.moves.iter().map(|it| it.of(stretch));
        let least = each.min_by_key(|it| (it.seconds, it.last));
        least.unwrap_or(Watched {
            from: stretch.0,
            to: stretch.1,
            seconds: 0,
            since: None,
            last: None,
        })
    }

    /// Whether at least this part of a stretch of time was watched, of what had moved by then.
    pub(super) fn has(&self, (from, to): (i64, i64), share: f64) -> bool {
        let mut then = self.moves.iter().filter(|it| it.since < to).peekable();
        then.peek().is_some()
            && then.all(|it| it.of((from.max(it.since), to)).share() >= share)
            // Of a day with an hour of watching nobody knows the rest.
            && self.moves.iter().any(|it| it.of((from, to)).share() >= share)
    }

    /// Whether somebody watches still.
    pub(super) fn is_live(&self, it: &Watched) -> bool {
        it.last.is_some_and(|last| last >= self.now - STILL)
    }
}

impl History {
    /// Opens the database in the state directory, as it is `now`. `runs`: for how long a daemon
    /// has run that writes it, which has seen what it has not written yet.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn open(dir: &Path, now: SystemTime, runs: Option<Duration>) -> Result<Self, StoreError> {
        let store = Store::to_read(dir)?;
        let now = unix(now);
        let runs_since = runs.map(|runs| now.saturating_sub(runs.as_secs() as i64));
        Ok(Self {
            store,
            now,
            runs_since,
        })
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
            FROM visits WHERE day >= ?1
            GROUP BY client, address, port, protocol HAVING max(last) >= ?2";
        let day = Day::of(since).to_string();
        self.store.read(query, (day, since), |row| {
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
                first: row.get::<_, i64>(10)?.min(self.now),
                last: row.get::<_, i64>(11)?.min(self.now),
                days: count(row, 12)?,
            }))
        })
    }

    /// What clients have asked for since then, and were answered.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn asked_for(&self, since: i64) -> Result<BTreeSet<Asked>, StoreError> {
        let came = self.came(since)?.into_iter();
        Ok(came
            .filter(|it| it.answered > 0)
            .map(|it| it.who.1)
            .collect())
    }

    /// What clients have asked for since then, and nobody was ever answered.
    pub(super) fn unanswered(&self, since: i64) -> Result<Vec<String>, StoreError> {
        let query = "SELECT what FROM unanswered WHERE last >= ?1 ORDER BY what";
        self.store.read(query, [since], |row| row.get(0).map(Some))
    }

    /// Clients' conversations on the day of `since` and later.
    pub(super) fn conversations(&self, since: i64) -> Result<u64, StoreError> {
        let query = "SELECT coalesce(sum(connections), 0) FROM visits WHERE day >= ?1";
        let day = Day::of(since).to_string();
        let all = self
            .store
            .read(query, [day], |row| count(row, 0).map(Some))?;
        Ok(all.into_iter().sum())
    }

    /// All clients that are remembered.
    pub(super) fn known(&self) -> Result<HashMap<Prefix, Known>, StoreError> {
        let query = "
            SELECT client, sum(connections), min(first), max(last),
                   EXISTS (SELECT 1 FROM names WHERE names.client = visits.client
                           AND name != '(none)'),
                   (SELECT coalesce(sum(names.connections), 0) FROM names
                    WHERE names.client = visits.client AND name = '(none)')
            FROM visits GROUP BY client";
        let known = self.store.read(query, [], |row| {
            let client: String = row.get(0)?;
            let known = Known {
                connections: count(row, 1)?,
                first: row.get::<_, i64>(2)?.min(self.now),
                last: row.get::<_, i64>(3)?.min(self.now),
                named: row.get(4)?,
                nameless: count(row, 5)?,
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
            list.retain(|&at| at <= self.now.saturating_add(AHEAD));
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
        let query = "SELECT DISTINCT day, client FROM visits WHERE day >= ?1";
        let all = self.store.read(query, [since.to_string()], |row| {
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
            SELECT openings, answered_once, unlisted, missed, unnamed, lost, displaced
            FROM days WHERE day >= ?1";
        let all = self
            .store
            .read(query, [Day::of(since).to_string()], |row| {
                let of = |at| count(row, at);
                Ok(Some(Beside {
                    openings: of(0)?,
                    answered_once: of(1)?,
                    unlisted: of(2)?,
                    missed: of(3)?,
                    unnamed: of(4)?,
                    lost: of(5)?,
                    displaced: of(6)?,
                }))
            })?;
        Ok(all.into_iter().fold(Beside::default(), |sum, of| Beside {
            openings: sum.openings + of.openings,
            answered_once: sum.answered_once + of.answered_once,
            unlisted: sum.unlisted + of.unlisted,
            missed: sum.missed + of.missed,
            unnamed: sum.unnamed + of.unnamed,
            lost: sum.lost + of.lost,
            displaced: sum.displaced + of.displaced,
        }))
    }

    /// When somebody watched each move.
    pub(super) fn watches(&self) -> Result<Watches, StoreError> {
        let query = "SELECT what, since, current FROM moves ORDER BY what";
        let moves = self.store.read(query, [], |row| {
            let what: String = row.get(0)?;
            let plain = !what.chars().any(char::is_control);
            let row = (what, row.get::<_, i64>(1)?, row.get::<_, i64>(2)?);
            Ok(Some(row).filter(|_| plain))
        })?;
        let query = "SELECT what, since, until FROM watched WHERE since <= ?1 ORDER BY since";
        let spans = self.store.read(query, [self.now], |row| {
            let span = (row.get(1)?, row.get::<_, i64>(2)?.min(self.now));
            Ok(Some((row.get::<_, String>(0)?, span)))
        })?;
        let mut of: HashMap<String, Vec<(i64, i64)>> = HashMap::new();
        for (what, span) in spans {
            of.entry(what).or_default().push(self.up_to_now(span));
        }
        let (current, gone): (Vec<_>, Vec<_>) = moves.into_iter().partition(|it| it.2 != 0);
        Ok(Watches {
            now: self.now,
            moves: (current.into_iter())
                .map(|(what, since, _)| {
                    let spans = of.remove(&what).unwrap_or_default();
                    let first = spans.first().map_or(since, |span| span.0);
                    WatchedMove {
                        what,
                        since: since.min(first),
                        spans,
                    }
                })
                .collect(),
            gone: gone.into_iter().map(|(what, ..)| what).collect(),
        })
    }

    /// What a running daemon has not written yet.
    fn up_to_now(&self, (since, until): (i64, i64)) -> (i64, i64) {
        let runs = self.runs_since.is_some_and(|start| start <= until);
        if runs && until >= self.now - STILL {
            (since, self.now)
        } else {
            (since, until)
        }
    }

    /// How each day's new conversations came to the new server, on that day and later.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn arrived(&self, since: Day) -> Result<BTreeMap<Day, Arrived>, StoreError> {
        let query = "
            SELECT day, sum(by_tunnel), sum(directly) FROM arrived
            WHERE day BETWEEN ?1 AND ?2 GROUP BY day";
        let days = [since, Day::of(self.now)].map(|day| day.to_string());
        let all = self.store.read(query, days, |row| {
            let day: String = row.get(0)?;
            let arrived = Arrived {
                by_tunnel: count(row, 1)?,
                directly: count(row, 2)?,
            };
            Ok(Day::parse(&day).map(|day| (day, arrived)))
        })?;
        Ok(all.into_iter().collect())
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
