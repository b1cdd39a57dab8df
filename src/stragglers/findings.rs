//! Who still comes: what `ipmoved stragglers` says.

use serde::{Serialize, Serializer};

use crate::model::asked::Asked;
use crate::model::prefix::Prefix;
use crate::model::visit::ServedBy;

use super::history::{self, Beside, Came, History, MoveWatched, Watched};
use super::rhythm::{self, Rhythm};
use super::store::{StoreError, protocol};

/// Who still comes, in a stretch of time.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Findings {
    /// When this was asked, in seconds since 1970.
    pub at: i64,
    /// Those who came since then are shown; their counts are those of whole days (UTC).
    pub since: i64,
    /// When somebody watched, of the move that was watched least.
    pub watched: Watched,
    /// When somebody watched each move.
    pub moves: Vec<MoveWatched>,
    /// Clients that came, each address once.
    pub clients: usize,
    /// Those who come, by client and port: most often first, and no more than were asked for.
    pub stragglers: Vec<Straggler>,
    /// How many more there are.
    pub more: usize,
    /// What came beside them.
    pub beside: Beside,
    /// Conversations that were no client's: scans, floods, and what nobody answered.
    pub others: u64,
}

/// One client, and one port that it asks for.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Straggler {
    /// The client: an IPv4 address, or the /64 of an IPv6 one.
    #[serde(serialize_with = "shown")]
    pub client: Prefix,
    /// What it asks for.
    #[serde(flatten, serialize_with = "asked")]
    pub asked: Asked,
    /// The names that it asked for, the last one first; `(none)` where it gave none.
    pub names: Vec<String>,
    /// Conversations.
    pub connections: u64,
    /// Those of them that the old server itself answered.
    pub by_old: u64,
    /// Those of them that the new server was asked for.
    pub by_new: u64,
    /// Those that were answered.
    pub answered: u64,
    /// Those whose client went on after the answer.
    pub went_on: u64,
    /// Payload from the client.
    pub bytes_in: u64,
    /// Payload to the client.
    pub bytes_out: u64,
    /// First seen, in this stretch of time.
    pub first_seen: i64,
    /// Last seen.
    pub last_seen: i64,
    /// On so many days.
    pub days: u64,
    /// How regularly it comes, if it does.
    pub rhythm: Option<Rhythm>,
}

impl Findings {
    /// Who came since then, `top` of them, without the clients in `ignored`.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn of(
        history: &History,
        since: i64,
        top: usize,
        ignored: &[Prefix],
    ) -> Result<Self, StoreError> {
        let now = history.now();
        let mut came = history.came(since)?;
        let conversations = history.conversations(since)?;
        came.retain(|it| !ignores(ignored, &it.who.0));
        came.sort_by_key(|it| (std::cmp::Reverse((it.connections, it.last)), it.who));
        let mut clients: Vec<Prefix> = came.iter().map(|it| it.who.0).collect();
        clients.sort_unstable();
        clients.dedup();
        let beside = history.beside(since)?;
        let watches = history.watches()?;
        let more = came.len().saturating_sub(top);
        came.truncate(top);
        Ok(Self {
            at: now,
            since,
            watched: watches.least((since, now)),
            moves: watches.each((since, now)),
            clients: clients.len(),
            stragglers: Straggler::of(history, came, since)?,
            more,
            others: beside.others(conversations),
            beside,
        })
    }
}

/// Whether a client is one of those to leave out. A prefix that is longer than a client's, as that
/// of one host of IPv6, means that client.
pub(super) fn ignores(ignored: &[Prefix], client: &Prefix) -> bool {
    let mut ignored = ignored.iter();
    ignored.any(|it| it.covers(client) || client.covers(it))
}

impl Straggler {
    /// What is known of those who came since then.
    pub(super) fn of(
        history: &History,
        came: Vec<Came>,
        since: i64,
    ) -> Result<Vec<Self>, StoreError> {
        let (arrivals, mut names) = (history.arrivals()?, history.names(since)?);
        let straggler = |it: Came| Self {
            client: it.who.0,
            asked: it.who.1,
            names: names.remove(&it.who).unwrap_or_default(),
            connections: it.connections,
            by_old: history::by(ServedBy::Old, &it),
            by_new: history::by(ServedBy::New, &it),
            answered: it.answered,
            went_on: it.went_on,
            bytes_in: it.bytes_in,
            bytes_out: it.bytes_out,
            first_seen: it.first,
            last_seen: it.last,
            days: it.days,
            rhythm: arrivals.get(&it.who).and_then(|all| rhythm::of(all)),
        };
        Ok(came.into_iter().map(straggler).collect())
    }
}

fn shown<S: Serializer>(client: &Prefix, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(client)
}

/// `address`, `port` and `protocol`, as in the database.
fn asked<S: Serializer>(asked: &Asked, serializer: S) -> Result<S::Ok, S::Error> {
    use serde::ser::SerializeMap;
    let mut map = serializer.serialize_map(Some(3))?;
    map.serialize_entry("address", &asked.addr)?;
    map.serialize_entry("port", &asked.port)?;
    map.serialize_entry("protocol", &protocol(asked.protocol))?;
    map.end()
}
