//! Which of the things that have moved are not answered.
//!
//! Owns the verdict on each port that clients ask for, from what became of its newest
//! conversations ([`watch`](crate::flow::watch)). It asks nobody why: that takes a look at the
//! system, which the control task has when something here is [`doubtful`](Silence::doubts).
//!
//! ```text
//!                 answered after that
//!      ┌────────────────────────────────────────┐
//!      ▼                                        │
//!   answered ── asked, and nothing comes back ──┼─► TCP: silent      UDP and others: unanswered
//!                RST or "unreachable" ──────────┴─► refused
//! ```
//!
//! * **TCP** answers every SYN, if only with a reset. One that got nothing for [`PATIENCE`] was
//!   repeated twice by its client, and lost three times: something is wrong.
//! * **Other protocols** need not answer (syslog and statsd never do), so this alone is no fault:
//!   it is shown, and nobody is warned.
//! * **A scan** asks for ports that nobody serves, and a firewall that drops such packets does what
//!   it should. So of an address that has moved whole, a port counts if it has answered before, if
//!   something listens there, or if nothing of the whole move was ever answered.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::flow::watch::{Fate, Observations, Observed};
use crate::model::asked::{Asked, Verdict};
use crate::model::moved::{Move, TCP};

/// A SYN that was not answered for so long has been repeated after 1 and after 3 s (RFC 6298
/// section 2). Two losses in a row are no fault on a bad path, three are.
const PATIENCE: Duration = Duration::from_millis(3_500);

/// Two conversations that were not answered for so long are as good as one for [`PATIENCE`].
const PATIENCE_OF_TWO: Duration = Duration::from_secs(2);

/// So long after a client was not answered for the first time the system is looked at, so that a
/// look later can tell what has changed since.
const SUSPICION: Duration = Duration::from_millis(900);

/// A port that has never served is judged only after so long, or when two clients agree: of an
/// address that has moved whole, the first packets after the start may be a scan's.
const PATIENCE_OF_STRANGERS: Duration = Duration::from_secs(6);

/// Nobody has asked for it for so long: whether it is answered now, nobody knows.
const FORGOTTEN: Duration = Duration::from_secs(600);

/// Most ports that are judged at a time for one peer, named or not.
const MAX_THINGS: usize = 1_024;

/// A move of more ports than this does not name them: it is as good as the whole address.
const NAMED: usize = 64;

/// A port that clients ask for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(in super::super) struct Thing {
    /// The verdict.
    pub(in super::super) verdict: Verdict,
    /// Since when it stands.
    pub(in super::super) since: Instant,
    /// When a conversation last began.
    pub(in super::super) last: Instant,
    /// Conversations that were watched, those of them that were answered, and those refused.
    pub(in super::super) counts: [u64; 3],
    /// The conversations that wait.
    waiting: Vec<Observed>,
    /// Conversations that began later are not answered by what was seen so far.
    answered: Option<Instant>,
    refused: Option<Instant>,
    /// A move names the port by its number.
    named: bool,
    /// Which move it belongs to.
    entry: Option<usize>,
    /// Something listens there, as was seen at this time.
    listens: bool,
    looked: Option<Instant>,
}

/// The verdicts on what has moved to one peer, or from it.
#[derive(Debug)]
pub(in super::super) struct Silence {
    moves: Arc<[Move]>,
    /// Whether any conversation of the move was answered.
    answered: Vec<bool>,
    /// Whether anybody has asked for anything of the move.
    asked: Vec<bool>,
    things: BTreeMap<Asked, Thing>,
}

impl Silence {
    /// Nothing has moved yet.
    pub(in super::super) fn new() -> Self {
        Self {
            moves: Arc::new([]),
            answered: Vec::new(),
            asked: Vec::new(),
            things: BTreeMap::new(),
        }
    }

    /// Goes by these moves from now on. What is no longer moved is forgotten.
    pub(in super::super) fn set_moves(&mut self, moves: &Arc<[Move]>) {
        if Arc::ptr_eq(moves, &self.moves) {
            return;
        }
        self.moves = Arc::clone(moves);
        self.answered = vec![false; moves.len()];
        self.asked = vec![false; moves.len()];
        let mut things = std::mem::take(&mut self.things);
        things.retain(|asked, thing| {
            (thing.entry, thing.named) = entry_of(moves, asked);
            if let Some(entry) = thing.entry {
                self.asked[entry] = true;
                self.answered[entry] |= thing.answered.is_some();
            }
            thing.entry.is_some()
        });
        self.things = things;
    }

    /// Takes in what became of the newest conversations, and judges. Call it every second.
    pub(in super::super) fn observe(&mut self, now: Instant, seen: Observations) {
        for thing in self.things.values_mut() {
            thing.waiting.clear();
        }
        for observed in seen.some {
            self.take_in(now, observed);
        }
        for thing in self.things.values_mut() {
            let never = thing.entry.is_some_and(|entry| !self.answered[entry]);
            let verdict = thing.judge(now, never);
            if verdict != thing.verdict {
                (thing.verdict, thing.since) = (verdict, now);
            }
        }
    }

    /// The ports on which a look at the system would help, and clients that ask in vain.
    pub(in super::super) fn doubts(
        &self,
        now: Instant,
    ) -> impl Iterator<Item = (&Asked, &Thing, Option<IpAddr>)> {
        self.things.iter().filter_map(move |(asked, thing)| {
            let waits = |observed: &&Observed| age(now, observed) >= SUSPICION;
            let in_vain = thing.in_vain().find(waits).map(|observed| observed.client);
            let doubtful = thing.verdict != Verdict::Well || in_vain.is_some();
            doubtful.then_some((asked, thing, in_vain))
        })
    }

    /// A look has shown whether something listens on a port.
    pub(in super::super) fn listens(&mut self, now: Instant, asked: &Asked, listens: bool) {
        let Some(thing) = self.things.get_mut(asked) else {
            return;
        };
        let came = listens && !thing.listens;
        (thing.listens, thing.looked) = (listens, Some(now));
        // The program was started: the next client will be answered.
        if came && thing.verdict == Verdict::Refused {
            (thing.verdict, thing.since) = (Verdict::Well, now);
            thing.refused = None;
        }
    }

    /// The verdict on a port.
    pub(in super::super) fn verdict(&self, asked: &Asked) -> Verdict {
        let thing = self.things.get(asked);
        thing.map_or(Verdict::Well, |thing| thing.verdict)
    }

    /// Every port that clients asked for.
    pub(in super::super) fn things(&self) -> impl Iterator<Item = (&Asked, &Thing)> {
        self.things.iter()
    }

    /// The moves of which nobody has asked for anything.
    pub(in super::super) fn unasked(&self) -> impl Iterator<Item = &Move> {
        let moves = self.moves.iter().zip(&self.asked);
        moves.filter(|(_, asked)| !**asked).map(|(moved, _)| moved)
    }

    fn take_in(&mut self, now: Instant, observed: Observed) {
        let asked = observed.asked;
        if !self.things.contains_key(&asked) && !self.has_room() {
            return;
        }
        let moves = &self.moves;
        let thing = self.things.entry(asked).or_insert_with(|| {
            let (entry, named) = entry_of(moves, &asked);
            Thing::new(now, entry, named)
        });
        let entry = thing.entry;
        let answered = thing.take_in(observed);
        if let Some(entry) = entry {
            self.asked[entry] = true;
            self.answered[entry] |= answered;
        }
    }

    /// Makes room for one more port. One that never served goes first, the oldest of them.
    fn has_room(&mut self) -> bool {
        if self.things.len() < MAX_THINGS {
            return true;
        }
        let idle = |thing: &Thing| thing.answered.is_none() && thing.verdict == Verdict::Well;
        let idle = self.things.iter().filter(|(_, thing)| idle(thing));
        let oldest = idle
            .min_by_key(|(_, thing)| thing.last)
            .map(|(asked, _)| *asked);
        oldest.is_some_and(|asked| self.things.remove(&asked).is_some())
    }
}

impl Thing {
    fn new(now: Instant, entry: Option<usize>, named: bool) -> Self {
        Self {
            verdict: Verdict::Well,
            since: now,
            last: now,
            counts: [0; 3],
            waiting: Vec::new(),
            answered: None,
            refused: None,
            named,
            entry,
            listens: false,
            looked: None,
        }
    }

    /// How many clients wait for an answer.
    pub(in super::super) fn clients(&self) -> usize {
        let mut clients: Vec<IpAddr> = self.in_vain().map(|observed| observed.client).collect();
        clients.sort_unstable();
        clients.dedup();
        clients.len()
    }

    /// Takes in a conversation; whether it was answered.
    fn take_in(&mut self, observed: Observed) -> bool {
        if observed.waited == observed.opened {
            self.counts[0] += 1;
            self.last = self.last.max(observed.opened);
        }
        // It may have been answered right after it was last seen to wait.
        let at = Some(observed.waited.max(observed.opened));
        match observed.fate {
            Fate::Answered => {
                self.counts[1] += 1;
                self.answered = self.answered.max(at);
            }
            Fate::Refused => {
                self.counts[2] += 1;
                self.refused = self.refused.max(at);
            }
            Fate::Waiting { .. } => self.waiting.push(observed),
        }
        observed.fate == Fate::Answered
    }

    /// The conversations that nothing came back for, though others before got something.
    fn in_vain(&self) -> impl Iterator<Item = &Observed> {
        let heard = self.answered.max(self.refused);
        let waiting = self.waiting.iter();
        waiting.filter(move |observed| heard.is_none_or(|heard| observed.opened > heard))
    }

    /// Whether somebody is meant to serve it: an administrator has named it, or somebody did.
    pub(in super::super) fn serves(&self) -> bool {
        self.named || self.answered.is_some() || self.listens
    }

    /// Whether nobody has looked who listens there for so long.
    pub(in super::super) fn rested(&self, now: Instant, rest: Duration) -> bool {
        let looked = self.looked;
        looked.is_none_or(|looked| now.saturating_duration_since(looked) >= rest)
    }

    /// `never`: nothing of the move that it belongs to was ever answered.
    fn judge(&self, now: Instant, never: bool) -> Verdict {
        let tcp = self.entry.is_some() && self.is_tcp();
        let ages = || self.in_vain().map(|observed| age(now, observed));
        let mute = ages().any(|age| age >= PATIENCE)
            || ages().filter(|&age| age >= PATIENCE_OF_TWO).count() >= 2;
        let serves = self.serves();
        if mute {
            let agreed = self.clients() >= 2 || ages().any(|age| age >= PATIENCE_OF_STRANGERS);
            return match () {
                () if !tcp => Verdict::Unanswered,
                () if serves || (never && agreed) => Verdict::Silent,
                () => Verdict::Unanswered,
            };
        }
        if serves && self.refused > self.answered {
            return Verdict::Refused;
        }
        let heard = self.answered.max(self.refused).max(Some(self.last));
        let forgotten = heard.is_none_or(|heard| now.saturating_duration_since(heard) >= FORGOTTEN);
        let since_answered = self.answered.is_some_and(|at| at >= self.bad_since());
        if self.verdict == Verdict::Refused || since_answered || forgotten {
            return Verdict::Well;
        }
        self.verdict
    }

    /// What was asked at this time was not answered when the verdict was given.
    fn bad_since(&self) -> Instant {
        self.since.checked_sub(PATIENCE).unwrap_or(self.since)
    }

    fn is_tcp(&self) -> bool {
        self.waiting
            .iter()
            .any(|observed| observed.asked.protocol == TCP)
    }
}

fn age(now: Instant, observed: &Observed) -> Duration {
    now.saturating_duration_since(observed.opened)
}

/// The move that a port belongs to, and whether the move names it by its number.
fn entry_of(moves: &[Move], asked: &Asked) -> (Option<usize>, bool) {
    let port = (asked.port > 0).then_some(asked.port);
    let takes =
        |moved: &Move| moved.prefix.contains(asked.addr) && moved.takes(asked.protocol, port);
    let names = |moved: &Move| {
        let ports = moved
            .ports
            .iter()
            .map(ExactSizeIterator::len)
            .sum::<usize>();
        ports > 0 && ports <= NAMED
    };
    let entry = moves.iter().position(takes);
    (entry, entry.is_some_and(|entry| names(&moves[entry])))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::moved::UDP;
    use crate::testing::epoch;
    use proptest::prelude::*;

    const WAITS: Fate = Fate::Waiting { again: false };

    /// A judge that is shown conversations as a watch shows them.
    struct Bed {
        silence: Silence,
        start: Instant,
        now: Instant,
        open: Vec<Open>,
    }

    /// Port, client, time of the first packet, time of the answer and what it is, and when it was
    /// last seen to wait.
    type Open = (Asked, u8, Instant, Option<(Instant, Fate)>, Instant);

    impl Bed {
        fn new(moves: &[&str]) -> Self {
            let mut silence = Silence::new();
            let moves: Vec<Move> = moves.iter().map(|text| text.parse().unwrap()).collect();
            silence.set_moves(&moves.into());
            let start = epoch();
            Self {
                silence,
                start,
                now: start,
                open: Vec::new(),
            }
        }

        fn ask(&mut self, port: u16, client: u8, answer: Option<(u64, Fate)>) {
            self.ask_by(TCP, port, client, answer);
        }

        /// A client asks now, and the answer comes so many milliseconds later.
        fn ask_by(&mut self, protocol: u8, port: u16, client: u8, answer: Option<(u64, Fate)>) {
            let asked = Asked {
                addr: "192.0.2.5".parse().unwrap(),
                protocol,
                port,
            };
            let now = self.now;
            let answer = answer.map(|(after, fate)| (now + Duration::from_millis(after), fate));
            self.open.push((asked, client, now, answer, now));
        }

        /// Time passes, with a look each second.
        fn pass(&mut self, millis: u64) {
            for _ in 0..millis / 100 {
                self.now += Duration::from_millis(100);
                if self.now.duration_since(self.start).subsec_millis() == 0 {
                    self.look();
                }
            }
        }

        fn look(&mut self) {
            let now = self.now;
            let mut some = Vec::new();
            self.open
                .retain_mut(|(asked, client, opened, answer, waited)| {
                    let fate = answer
                        .filter(|(at, _)| *at <= now)
                        .map_or(WAITS, |(_, fate)| fate);
                    some.push(Observed {
                        asked: *asked,
                        client: [203, 0, 113, *client].into(),
                        opened: *opened,
                        waited: *waited,
                        fate,
                    });
                    *waited = now;
                    fate == WAITS && now - *opened < Duration::from_secs(16)
                });
            let opened = some.len() as u64;
            self.silence.observe(now, Observations { some, opened });
        }

        fn verdict(&self, port: u16) -> Verdict {
            let mut things = self.silence.things();
            let thing = things.find(|(asked, _)| asked.port == port);
            thing.map_or(Verdict::Well, |(_, thing)| thing.verdict)
        }
    }

    const ANSWER: Option<(u64, Fate)> = Some((10, Fate::Answered));
    const REFUSAL: Option<(u64, Fate)> = Some((10, Fate::Refused));

    #[test]
    fn one_client_that_is_not_answered_shows_within_seconds() {
        let mut bed = Bed::new(&["192.0.2.5:80/tcp"]);
        bed.ask(80, 9, None);
        bed.pass(3_000);
        assert_eq!(bed.verdict(80), Verdict::Well, "two packets may be lost");
        assert!(bed.silence.doubts(bed.now).next().is_some());
        bed.pass(1_000);
        assert_eq!(bed.verdict(80), Verdict::Silent);
        bed.pass(60_000);
        assert_eq!(
            bed.verdict(80),
            Verdict::Silent,
            "though nobody asks any more"
        );
        bed.ask(80, 9, ANSWER);
        bed.pass(1_000);
        assert_eq!(bed.verdict(80), Verdict::Well);
        assert!(bed.silence.doubts(bed.now).next().is_none());
    }

    #[test]
    fn what_worked_a_moment_ago_shows_as_soon() {
        let mut bed = Bed::new(&["192.0.2.5"]);
        bed.ask(80, 9, ANSWER);
        bed.pass(500);
        bed.ask(80, 9, None);
        bed.pass(4_500);
        assert_eq!(bed.verdict(80), Verdict::Silent);
    }

    #[test]
    fn a_late_answer_is_an_answer() {
        let mut bed = Bed::new(&["192.0.2.5:80"]);
        bed.ask(80, 9, Some((7_100, Fate::Answered)));
        bed.pass(7_000);
        assert_eq!(bed.verdict(80), Verdict::Silent);
        bed.pass(1_000);
        assert_eq!(bed.verdict(80), Verdict::Well);
    }

    #[test]
    fn a_refusal_of_what_is_named_or_has_served_is_told_until_something_listens() {
        let mut bed = Bed::new(&["192.0.2.5:80", "192.0.2.5:1-1000/udp"]);
        bed.ask(80, 9, REFUSAL);
        bed.ask_by(UDP, 53, 9, REFUSAL);
        bed.pass(1_000);
        assert_eq!(bed.verdict(80), Verdict::Refused);
        assert_eq!(bed.verdict(53), Verdict::Well, "a scan of all ports");
        let (&asked, ..) = bed.silence.doubts(bed.now).next().unwrap();
        bed.silence.listens(bed.now, &asked, false);
        bed.pass(1_000);
        assert_eq!(bed.verdict(80), Verdict::Refused);
        bed.silence.listens(bed.now, &asked, true);
        assert_eq!(bed.verdict(80), Verdict::Well);
        bed.pass(1_000);
        assert_eq!(bed.verdict(80), Verdict::Well);
        bed.ask(80, 9, REFUSAL);
        bed.pass(1_000);
        assert_eq!(
            bed.verdict(80),
            Verdict::Refused,
            "though something listens"
        );
    }

    #[test]
    fn a_scan_behind_a_firewall_is_no_silence() {
        let mut bed = Bed::new(&["192.0.2.5"]);
        bed.ask(22, 9, ANSWER);
        bed.pass(1_000);
        for port in 1_000..1_300 {
            bed.ask(port, 7, None);
            bed.ask(port, 8, None);
        }
        bed.pass(10_000);
        let mut things = bed.silence.things();
        assert!(things.all(|(_, thing)| thing.verdict != Verdict::Silent));
        assert_eq!(bed.verdict(22), Verdict::Well);
    }

    #[test]
    fn a_whole_address_of_which_nothing_was_ever_answered_is_silent() {
        let mut bed = Bed::new(&["192.0.2.5"]);
        bed.ask(80, 9, None);
        bed.pass(5_000);
        assert_eq!(bed.verdict(80), Verdict::Unanswered);
        bed.pass(1_000);
        assert_eq!(bed.verdict(80), Verdict::Silent);
        // And as soon as it is known that somebody would be there.
        let mut bed = Bed::new(&["192.0.2.5"]);
        bed.ask(80, 9, None);
        bed.pass(1_000);
        let (&asked, ..) = bed.silence.doubts(bed.now).next().unwrap();
        bed.silence.listens(bed.now, &asked, true);
        bed.pass(3_000);
        assert_eq!(bed.verdict(80), Verdict::Silent);
    }

    #[test]
    fn a_protocol_that_need_not_answer_is_never_silent() {
        let mut bed = Bed::new(&["192.0.2.5:514/udp"]);
        for client in 0..50 {
            bed.ask_by(UDP, 514, client, None);
            bed.pass(500);
        }
        assert_eq!(bed.verdict(514), Verdict::Unanswered);
    }

    #[test]
    fn it_is_bounded_and_a_port_that_serves_stays() {
        let mut bed = Bed::new(&["192.0.2.5"]);
        bed.ask(80, 9, ANSWER);
        bed.pass(1_000);
        for port in 1_000..9_000 {
            bed.ask(port, 7, REFUSAL);
        }
        bed.pass(1_000);
        assert_eq!(bed.silence.things().count(), MAX_THINGS);
        assert!(bed.silence.things().any(|(asked, _)| asked.port == 80));
    }

    #[test]
    fn what_nobody_asks_for_is_known() {
        let mut bed = Bed::new(&["192.0.2.5:80", "192.0.2.5:443"]);
        bed.ask(443, 9, ANSWER);
        bed.pass(1_000);
        let unasked: Vec<String> = bed.silence.unasked().map(ToString::to_string).collect();
        assert_eq!(unasked, ["192.0.2.5:80"]);
        let moves: Arc<[Move]> = [("192.0.2.5:80".parse().unwrap())].into();
        bed.silence.set_moves(&moves);
        assert_eq!(bed.silence.things().count(), 0);
    }

    proptest! {
        /// Whatever else happens, a port all of whose clients are answered within a second is well.
        #[test]
        fn what_answers_is_never_called_silent(
            asks in proptest::collection::vec((0..3_000u64, 0..200u8, 0..1_000u64), 1..60),
            others in proptest::collection::vec((0..60u16, 0..3u8), 0..60),
        ) {
            let mut bed = Bed::new(&["192.0.2.5"]);
            let mut others = others.into_iter();
            for (pause, client, after) in asks {
                bed.ask(80, client, Some((after, Fate::Answered)));
                if let Some((port, kind)) = others.next() {
                    let answer = [None, REFUSAL, ANSWER][usize::from(kind)];
                    bed.ask(1_000 + port, client, answer);
                }
                bed.pass(pause / 100 * 100);
                prop_assert_eq!(bed.verdict(80), Verdict::Well);
            }
        }

        /// And one that answers nobody is not called well for longer than it takes to know.
        #[test]
        fn what_does_not_answer_is_called_silent(
            asks in proptest::collection::vec((0..3_000u64, 0..200u8), 1..30),
        ) {
            let mut bed = Bed::new(&["192.0.2.5:80"]);
            bed.ask(80, 9, ANSWER);
            bed.pass(1_000);
            for (pause, client) in asks {
                bed.ask(80, client, None);
                bed.pass(pause / 100 * 100);
            }
            bed.pass(5_000);
            prop_assert_eq!(bed.verdict(80), Verdict::Silent);
        }
    }
}
