//! What is added up of clients' conversations until it is written, and who is listed at all.
//!
//! Owns the bounds. Does no I/O and reads no clock: the [`writer`](super::writer) does.
//!
//! * Whoever went on after the answer is a client. Where one question and its answer are all there
//!   is, as with name servers, and where a connection carried nothing, as a scan's does or a
//!   monitor's: whoever is answered again after a while is one, too.
//! * Clients that came before have half of the day's places for themselves, so that no crowd of new
//!   ones displaces them.
//! * What there is no place for is counted.

use std::collections::{HashMap, HashSet};

use crate::model::asked::Asked;
use crate::model::moved::TCP;
use crate::model::prefix::Prefix;
use crate::model::progress::Progress;
use crate::model::visit::{InVain, ServedBy, Visit};

use super::names;
use super::rhythm;
use super::time::Day;

/// Rows of one day, one for each client and port: with 90 days of them the database has reached its
/// own bound.
pub(super) const MAX_ROWS_A_DAY: usize = 50_000;

/// Rows of one day that clients have which never came before.
const MAX_NEWCOMERS: usize = MAX_ROWS_A_DAY / 2;

/// Rows of one client on one day: a scan of all ports of a server that answers on each is one
/// client.
const MAX_ROWS_A_CLIENT: u8 = 16;

/// Clients that are remembered as such: as many as the gates' maps tell apart from others.
pub(super) const MAX_KNOWN: usize = 50_000;

/// Senders that were answered once, in each of two generations. The older one is forgotten when the
/// younger is full.
const MAX_ONCE: usize = 32_768;

/// Seconds after which an answer is another one. Whoever asks for both kinds of address at once
/// came once.
const AGAIN: i64 = 5;

/// Rows that wait to be written, while the database takes none.
const MAX_WAITING: usize = 2 * MAX_ROWS_A_DAY;

/// Names that wait to be written.
const MAX_NAMES: usize = MAX_ROWS_A_DAY;

/// What nobody was ever answered: a scan asks for every port that there is.
pub(super) const MAX_UNANSWERED: usize = 1_024;

/// A client and what it asks for.
pub(super) type Who = (Prefix, Asked);

/// Which row a conversation belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Key {
    pub(super) day: Day,
    pub(super) who: Who,
    pub(super) served_by: ServedBy,
}

/// What is to be added to a row.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Counts {
    pub(super) connections: u64,
    pub(super) answered: u64,
    pub(super) went_on: u64,
    pub(super) bytes_in: u64,
    pub(super) bytes_out: u64,
    pub(super) first: i64,
    pub(super) last: i64,
}

/// What is to be added to a name.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Asks {
    pub(super) connections: u64,
    pub(super) first: i64,
    pub(super) last: i64,
}

/// What is to be added to a day.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Others {
    pub(super) openings: u64,
    /// Fewer than none if it turns out that they came again.
    pub(super) answered_once: i64,
    pub(super) unlisted: u64,
    pub(super) missed: u64,
    pub(super) unnamed: u64,
    pub(super) lost: u64,
    pub(super) displaced: u64,
}

/// What is to be added to how a move's conversations came to the new server on a day.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Arrived {
    /// Those that came by the tunnel.
    pub by_tunnel: u64,
    /// Those that came directly.
    pub directly: u64,
}

impl Arrived {
    /// How many per cent came directly; `None` if nobody came.
    pub fn percent(&self) -> Option<u64> {
        let all = Progress {
            by_tunnel: self.by_tunnel,
            directly: self.directly,
            ..Progress::default()
        };
        all.percent_directly()
    }
}

/// An answer after which a sender has not gone on.
#[derive(Clone, Copy, Debug)]
struct Once {
    first: i64,
    asked: Asked,
    /// How many conversations were counted.
    count: i64,
}

/// What a conversation says of who has it.
enum Judged {
    /// It is a client's.
    Client,
    /// It is a client's, since that one came before.
    Again(Once),
    /// It may be a scan's, or forged.
    Not,
}

/// What was added up.
#[derive(Debug, Default)]
pub(super) struct Tally {
    waiting: Waiting,
    /// The day whose rows are counted.
    day: Option<Day>,
    rows: HashSet<Key>,
    of_clients: HashMap<Prefix, u8>,
    newcomers: usize,
    known: HashSet<Prefix>,
    /// Who became known since this was asked last.
    newly_known: Vec<Prefix>,
    /// Senders that were answered once, the younger ones and the older ones.
    once: [HashMap<Prefix, Once>; 2],
}

/// What waits to be written.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    pub(super) visits: HashMap<Key, Counts>,
    pub(super) arrivals: HashMap<Who, Vec<i64>>,
    pub(super) names: HashMap<(Who, String), Asks>,
    pub(super) others: HashMap<Day, Others>,
    pub(super) arrived: HashMap<(Day, String), Arrived>,
    /// When it was asked for last; `None` if somebody was answered.
    pub(super) unanswered: HashMap<String, Option<i64>>,
}

impl Waiting {
    /// Whether there is nothing to write.
    pub(super) fn is_empty(&self) -> bool {
        self.visits.is_empty()
            && self.others.is_empty()
            && self.arrived.is_empty()
            && self.unanswered.is_empty()
    }
}

impl Tally {
    /// Goes on from what the database has: clients that came before, and the rows of today.
    pub(super) fn resume(&mut self, known: impl IntoIterator<Item = Prefix>, rows: Vec<Key>) {
        for client in known {
            if self.known.len() < MAX_KNOWN && self.known.insert(client) {
                self.newly_known.push(client);
            }
        }
        self.day = self.day.max(rows.iter().map(|key| key.day).max());
        for key in rows.into_iter().filter(|key| Some(key.day) == self.day) {
            *self.of_clients.entry(key.who.0).or_default() += 1;
            self.rows.insert(key);
        }
    }

    /// The clock was set: which day it is has to be seen anew.
    pub(super) fn clock_was_set(&mut self) {
        self.day = None;
        self.begin_day();
    }

    /// Adds what there is to add about a conversation.
    pub(super) fn add(&mut self, visit: Visit<i64>) {
        match self.judge(&visit) {
            Judged::Client => self.list(visit),
            Judged::Again(once) => {
                // What it came for the first time counts as well.
                let mut first = visit.clone();
                (first.asked, first.began, first.last) = (once.asked, Some(once.first), once.first);
                (first.answered, first.went_on) = (true, visit.asked.protocol == TCP);
                (first.bytes_in, first.bytes_out) = (0, 0);
                first.first_bytes.clear();
                self.list(first);
                self.list(visit);
            }
            Judged::Not => {}
        }
    }

    /// Lists a client's conversation.
    fn list(&mut self, visit: Visit<i64>) {
        let key = Key {
            day: Day::of(visit.last),
            who: (visit.client, visit.asked),
            served_by: visit.served_by,
        };
        if !self.has_place(key) {
            let others = self.others(key.day);
            others.unlisted += u64::from(visit.began.is_some());
            return;
        }
        if self.known.len() < MAX_KNOWN && self.known.insert(visit.client) {
            self.newly_known.push(visit.client);
        }
        let first = visit.began.unwrap_or(visit.last);
        let counts = self.waiting.visits.entry(key).or_insert(Counts {
            first,
            last: visit.last,
            ..Counts::default()
        });
        counts.connections += u64::from(visit.began.is_some());
        counts.answered += u64::from(visit.answered);
        counts.went_on += u64::from(visit.went_on);
        counts.bytes_in += visit.bytes_in;
        counts.bytes_out += visit.bytes_out;
        // Not before the day: its conversations may have begun on the day before.
        counts.first = counts.first.min(first).max(key.day.start());
        counts.last = counts.last.max(visit.last);
        if let Some(began) = visit.began {
            let arrivals = self.waiting.arrivals.entry(key.who).or_default();
            if arrivals.len() >= rhythm::KEPT {
                arrivals.remove(0);
            }
            arrivals.push(began);
        }
        if let Some(name) = names::asked(&visit.first_bytes) {
            let name = (key.who, name);
            if self.waiting.names.len() < MAX_NAMES || self.waiting.names.contains_key(&name) {
                let asks = self.waiting.names.entry(name).or_insert(Asks {
                    first,
                    last: first,
                    ..Asks::default()
                });
                asks.connections += 1;
                asks.first = asks.first.min(first);
                asks.last = asks.last.max(visit.last);
            }
        }
    }

    /// Adds what came beside, on the day of `now`.
    pub(super) fn add_others(&mut self, now: i64, more: Others) {
        if more != Others::default() {
            let others = self.others(Day::of(now));
            others.openings += more.openings;
            others.missed += more.missed;
            others.unnamed += more.unnamed;
            others.lost += more.lost;
            others.displaced += more.displaced;
        }
    }

    /// Adds how conversations of a move came to the new server, on the day of `now`.
    pub(super) fn add_arrived(&mut self, now: i64, what: &str, more: Arrived) {
        if more != Arrived::default() {
            let key = (Day::of(now), what.to_owned());
            let arrived = self.waiting.arrived.entry(key).or_default();
            arrived.by_tunnel += more.by_tunnel;
            arrived.directly += more.directly;
        }
    }

    /// Clients have asked for this at that time.
    pub(super) fn add_in_vain(&mut self, at: i64, it: InVain) {
        let unanswered = &mut self.waiting.unanswered;
        if unanswered.len() < MAX_UNANSWERED || unanswered.contains_key(&it.what) {
            unanswered.insert(it.what, (!it.answered).then_some(at));
        }
    }

    /// What waits to be written.
    pub(super) fn waiting(&self) -> &Waiting {
        &self.waiting
    }

    /// It was written.
    pub(super) fn written(&mut self) {
        self.waiting = Waiting::default();
    }

    /// Clients that became known since this was asked last.
    pub(super) fn take_known(&mut self) -> Vec<Prefix> {
        std::mem::take(&mut self.newly_known)
    }

    fn others(&mut self, day: Day) -> &mut Others {
        self.waiting.others.entry(day).or_default()
    }

    /// Whether a conversation is that of a client.
    fn judge(&mut self, visit: &Visit<i64>) -> Judged {
        if self.known.contains(&visit.client) {
            return Judged::Client;
        }
        if !visit.bare {
            // How it began may not have told that.
            let before = self.forget_once(visit.client);
            return before.map_or(Judged::Client, |once| self.came_again(once));
        }
        let Some(began) = visit.began else {
            return Judged::Not;
        };
        if !visit.answered || !visit.went_on && visit.asked.protocol == TCP {
            return Judged::Not;
        }
        let before = self.forget_once(visit.client);
        // A clock that was set back is no reason to wait.
        let is_again = |once: &Once| (began - once.first).abs() >= AGAIN;
        if let Some(once) = before.filter(is_again) {
            return self.came_again(once);
        }
        self.others(Day::of(began)).answered_once += 1;
        let mut once = before.unwrap_or(Once {
            first: began,
            asked: visit.asked,
            count: 0,
        });
        once.count += 1;
        let [younger, older] = &mut self.once;
        if younger.len() >= MAX_ONCE {
            let displaced = std::mem::replace(older, std::mem::take(younger));
            self.others(Day::of(began)).displaced += displaced.len() as u64;
        }
        self.once[0].insert(visit.client, once);
        Judged::Not
    }

    /// A sender that was answered once is a client.
    fn came_again(&mut self, once: Once) -> Judged {
        self.others(Day::of(once.first)).answered_once -= once.count;
        Judged::Again(once)
    }

    fn forget_once(&mut self, client: Prefix) -> Option<Once> {
        self.once.iter_mut().find_map(|it| it.remove(&client))
    }

    /// No rows of the day are counted yet.
    fn begin_day(&mut self) {
        self.rows.clear();
        self.of_clients.clear();
        self.newcomers = 0;
    }

    /// Whether there is a place for a row, which it takes then.
    fn has_place(&mut self, key: Key) -> bool {
        if self.day.is_none_or(|day| key.day > day) {
            self.day = Some(key.day);
            self.begin_day();
        }
        if self.rows.contains(&key) {
            return self.waiting.visits.len() < MAX_WAITING
                || self.waiting.visits.contains_key(&key);
        }
        let new = !self.known.contains(&key.who.0);
        let of_client = self.of_clients.entry(key.who.0).or_default();
        if self.rows.len() >= MAX_ROWS_A_DAY
            || self.waiting.visits.len() >= MAX_WAITING
            || new && self.newcomers >= MAX_NEWCOMERS
            || *of_client >= MAX_ROWS_A_CLIENT
        {
            if *of_client == 0 {
                self.of_clients.remove(&key.who.0);
            }
            return false;
        }
        *of_client += 1;
        self.newcomers += usize::from(new);
        self.rows.insert(key);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::moved::UDP;
    use crate::stragglers::tests::{NOON, visit};
    use proptest::prelude::*;

    fn connections(tally: &Tally) -> u64 {
        let rows = tally.waiting().visits.values();
        rows.map(|counts| counts.connections).sum()
    }

    #[test]
    fn whoever_went_on_is_a_client_and_who_was_answered_twice() {
        let mut tally = Tally::default();
        tally.add(visit("203.0.113.9", 443, NOON));
        assert_eq!(connections(&tally), 1);
        let mut scan = visit("203.0.113.10", 443, NOON);
        (scan.went_on, scan.bare) = (false, true);
        for answered in [true, false] {
            scan.answered = answered;
            tally.add(scan.clone());
        }
        assert_eq!(connections(&tally), 1, "a scan");
        let mut query = visit("203.0.113.11", 53, NOON);
        query.asked.protocol = UDP;
        (query.went_on, query.bare) = (false, true);
        tally.add(query.clone());
        tally.add(query.clone());
        assert_eq!(connections(&tally), 1, "it came once");
        assert_eq!(tally.waiting().others[&Day::of(NOON)].answered_once, 2);
        (query.last, query.began) = (NOON + 10, Some(NOON + 10));
        tally.add(query.clone());
        assert_eq!(tally.waiting().others[&Day::of(NOON)].answered_once, 0);
        query.answered = false;
        tally.add(query);
        assert_eq!(
            connections(&tally),
            4,
            "it came before as well, and what a known one asks in vain counts"
        );
        let known: Vec<String> = tally.take_known().iter().map(ToString::to_string).collect();
        assert_eq!(known, ["203.0.113.9", "203.0.113.11"]);
    }

    #[test]
    fn a_connection_that_carries_nothing_is_a_scan_until_another_one_follows() {
        let mut tally = Tally::default();
        let mut probe = visit("203.0.113.9", 443, NOON);
        (probe.bare, probe.bytes_in, probe.bytes_out) = (true, 0, 0);
        tally.add(probe.clone());
        // Its end.
        probe.began = None;
        tally.add(probe.clone());
        assert_eq!(connections(&tally), 0);
        (probe.began, probe.last) = (Some(NOON + 60), NOON + 60);
        tally.add(probe);
        let rows: Vec<Counts> = tally.waiting().visits.values().copied().collect();
        assert_eq!((rows.len(), rows[0].connections), (1, 2));
        assert_eq!((rows[0].first, rows[0].last), (NOON, NOON + 60));
        let mut types = visit("203.0.113.10", 22, NOON);
        types.bare = true;
        tally.add(types.clone());
        (types.bare, types.began) = (false, None);
        tally.add(types);
        assert_eq!(tally.waiting().visits.len(), 2, "it says something later");
        assert_eq!(connections(&tally), 3);
    }

    #[test]
    fn a_clock_that_was_ahead_takes_no_places_of_later_days() {
        let mut tally = Tally::default();
        tally.add(visit("203.0.113.9", 443, NOON + 400 * 86_400));
        tally.clock_was_set();
        for day in 0..3 {
            for n in 0..(MAX_NEWCOMERS + 1) as u32 {
                let mut many = visit("203.0.113.9", 443, NOON + day * 86_400);
                let client = std::net::Ipv4Addr::from(0x2000_0000 + n + day as u32 * 100_000);
                many.client = std::net::IpAddr::from(client).into();
                tally.add(many);
            }
            let unlisted = tally.waiting().others[&Day::of(NOON + day * 86_400)].unlisted;
            assert_eq!(unlisted, 1, "on day {day}");
            tally.written();
        }
    }

    #[test]
    fn what_goes_on_over_midnight_is_seen_on_both_days() {
        let mut tally = Tally::default();
        let midnight = Day::of(NOON).start() + 86_400;
        let mut long = visit("203.0.113.9", 443, midnight - 2);
        tally.add(long.clone());
        (long.began, long.answered, long.went_on) = (None, false, false);
        (long.last, long.bytes_out) = (midnight + 2, 7);
        tally.add(long);
        let rows = &tally.waiting().visits;
        let mut seen: Vec<_> = rows
            .iter()
            .map(|(key, it)| (key.day, it.connections))
            .collect();
        seen.sort_unstable();
        let day = Day::of(NOON);
        assert_eq!(seen, [(day, 1), (Day(day.0 + 1), 0)]);
        let last = rows.values().max_by_key(|it| it.last).unwrap();
        assert_eq!(
            (last.first, last.last, last.bytes_out),
            (midnight + 2, midnight + 2, 7)
        );
    }

    #[test]
    fn a_million_sources_take_no_place_of_those_that_came_before() {
        let mut tally = Tally::default();
        let before: Vec<_> = (0..10_000)
            .map(|n: u32| {
                visit(
                    &std::net::Ipv4Addr::from(0x0a00_0000 + n).to_string(),
                    443,
                    NOON - 86_400,
                )
            })
            .collect();
        before.iter().cloned().for_each(|it| tally.add(it));
        tally.written();
        for n in 0..1_000_000_u32 {
            let source = std::net::Ipv4Addr::from(0x2000_0000 + n * 977);
            let mut flood = visit("203.0.113.9", 443, NOON);
            flood.client = std::net::IpAddr::from(source).into();
            tally.add(flood);
        }
        for mut again in before {
            (again.began, again.last) = (Some(NOON + 60), NOON + 60);
            tally.add(again);
        }
        let rows = &tally.waiting().visits;
        let old = rows
            .keys()
            .filter(|key| key.who.0.to_string().starts_with("10.0."));
        assert_eq!(old.count(), 10_000);
        assert!(rows.len() <= MAX_ROWS_A_DAY && tally.known.len() <= MAX_KNOWN);
        let unlisted = tally.waiting().others[&Day::of(NOON)].unlisted;
        assert_eq!(unlisted, 1_000_000 - MAX_NEWCOMERS as u64);
    }

    #[test]
    fn senders_that_are_answered_once_are_bounded_too() {
        let mut tally = Tally::default();
        for n in 0..200_000_u32 {
            let mut query = visit("203.0.113.9", 53, NOON + i64::from(n / 1_000));
            query.client = std::net::IpAddr::from(std::net::Ipv4Addr::from(n * 7)).into();
            (query.asked.protocol, query.went_on, query.bare) = (UDP, false, true);
            tally.add(query);
        }
        assert!(tally.waiting().visits.is_empty());
        assert!(tally.once.iter().all(|once| once.len() <= MAX_ONCE));
        let others = tally.waiting().others[&Day::of(NOON)];
        assert_eq!(others.answered_once, 200_000);
        let kept: usize = tally.once.iter().map(HashMap::len).sum();
        assert_eq!(others.displaced, 200_000 - kept as u64);
    }

    #[test]
    fn a_client_that_asks_every_port_is_one_client() {
        let mut tally = Tally::default();
        (1..2_000).for_each(|port| tally.add(visit("203.0.113.9", port, NOON)));
        assert_eq!(tally.waiting().visits.len(), usize::from(MAX_ROWS_A_CLIENT));
        let others = tally.waiting().others[&Day::of(NOON)];
        assert_eq!(others.unlisted, 1_999 - u64::from(MAX_ROWS_A_CLIENT));
    }

    proptest! {
        #[test]
        fn every_conversation_that_began_is_counted_once(
            came in proptest::collection::vec((0_u8..40, 0_u16..40, 0_i64..400_000), 1..300),
        ) {
            let mut tally = Tally::default();
            for &(client, port, after) in &came {
                tally.add(visit(&format!("203.0.113.{client}"), port, NOON + after));
            }
            let unlisted: u64 = tally.waiting().others.values().map(|it| it.unlisted).sum();
            prop_assert_eq!(connections(&tally) + unlisted, came.len() as u64);
            for (key, counts) in &tally.waiting().visits {
                prop_assert!(counts.first <= counts.last);
                prop_assert_eq!(Day::of(counts.first), key.day);
                prop_assert_eq!(Day::of(counts.last), key.day);
            }
        }
    }
}
