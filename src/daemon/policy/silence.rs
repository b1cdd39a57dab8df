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
//!   repeated twice by its client, and lost three times: something is wrong. What a client does not
//!   repeat tells nothing: scanners send one SYN each, and it may be lost.
//! * **Other protocols** need not answer (syslog and statsd never do), so this alone is no fault:
//!   it is shown, and nobody is warned.
//! * **A scan** asks for ports that nobody serves, and a firewall that drops or rejects such
//!   packets does what it should, though something listens there. So of an address that has moved
//!   whole, a port counts if it has answered before, or if nothing of the move was ever answered.
//! * **While the other server is away** nobody can be answered, which says nothing of what has
//!   moved. A verdict of that time is forgotten once it is back, and what was asked then does not
//!   count.
//! * **A client that is banned** is refused where something listens, and others are not. So there
//!   it takes two clients without an answer between them, and the verdict lapses.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::flow::watch::{Fate, Observations, Observed};
use crate::model::asked::{Asked, Verdict, View};
use crate::model::drops::DropReason;
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

/// Something listens, and nobody was refused for so long: whoever was refused has been banned, or
/// the rule that rejected is gone.
const REFUSED_FOR: Duration = Duration::from_secs(60);

/// Most refusals of a port that are remembered, the newest. Two clients are enough.
const MAX_REFUSALS: usize = 8;

/// Nobody has asked for it for so long: whether it is answered now, nobody knows.
const FORGOTTEN: Duration = Duration::from_secs(600);

/// Most ports that are judged at a time for one peer, named or not.
const MAX_THINGS: usize = 1_024;

/// Who went away may have had packets so long before that it did not answer any more.
const IN_FLIGHT: Duration = Duration::from_millis(500);

/// A move of more ports than this does not name them: it is as good as the whole address.
pub(in super::super) const NAMED: usize = 64;

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
    /// Whom the newest refusals met, and when.
    refusals: VecDeque<(IpAddr, Instant)>,
    /// A move names the port by its number.
    named: bool,
    /// Which move it belongs to.
    entry: Option<usize>,
    /// Whether something listens there, as a look has shown.
    listens: Option<bool>,
    /// Whom this server's daemon itself turns away, and why.
    turned: Option<(IpAddr, DropReason)>,
    /// The other server alone has seen it so.
    told: bool,
    /// The last client that was answered.
    answers_to: Option<IpAddr>,
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
    /// The other server is there since then, after it was away.
    back: Option<Instant>,
}

impl Silence {
    /// Nothing has moved yet.
    pub(in super::super) fn new() -> Self {
        Self {
            moves: Arc::new([]),
            answered: Vec::new(),
            asked: Vec::new(),
            things: BTreeMap::new(),
            back: None,
        }
    }

    /// Goes by these moves from now on. What is no longer moved is forgotten.
    pub(in super::super) fn set_moves(&mut self, moves: &Arc<[Move]>) {
        if Arc::ptr_eq(moves, &self.moves) || *moves == self.moves {
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
            thing.turned = None;
        }
        // What was asked while the other server was away it cannot have answered.
        let back = self.back;
        let counts = |it: &Observed| {
            let waits = matches!(it.fate, Fate::Waiting { .. });
            !waits || back.is_none_or(|back| it.opened >= back)
        };
        for observed in seen.some.into_iter().filter(counts) {
            self.take_in(now, observed);
        }
        for turned in seen.turned {
            self.take_in(now, turned.observed);
            if let Some(thing) = self.things.get_mut(&turned.observed.asked)
                && asks_again(&turned.observed)
            {
                thing.turned = Some((turned.observed.client, turned.reason));
            }
        }
        for thing in self.things.values_mut() {
            let never = thing.entry.is_some_and(|entry| !self.answered[entry]);
            let verdict = thing.judge(now, never);
            if verdict != thing.verdict {
                (thing.verdict, thing.since) = (verdict, now);
            }
        }
    }

    /// The other server was away from `from` on, and is back: what nobody answered meanwhile tells
    /// nothing.
    pub(in super::super) fn was_away(&mut self, now: Instant, from: Instant) {
        self.back = Some(now);
        for thing in self.things.values_mut() {
            let bad = matches!(thing.verdict, Verdict::Silent | Verdict::Unanswered);
            // If it was there after the clients had come, it is they who were not answered.
            if bad && thing.bad_since() + IN_FLIGHT >= from {
                (thing.verdict, thing.since) = (Verdict::Well, now);
            }
        }
    }

    /// What was seen since then of a port that the other server finds unanswered.
    pub(in super::super) fn view(&self, since: Instant, asked: &Asked) -> View {
        let thing = self.things.get(asked);
        let came = |it: &Thing| it.last >= since || it.waiting.iter().any(|it| it.opened >= since);
        let answered = |it: &Thing| it.answered.is_some_and(|at| at >= since);
        View {
            asked: *asked,
            came: thing.is_some_and(came),
            answered: thing.is_some_and(answered),
        }
    }

    /// A port as the other server sees it, which this one knows nothing of, or nothing bad.
    pub(in super::super) fn as_told(&self, now: Instant, asked: &Asked, verdict: Verdict) -> Thing {
        let known = self.things.get(asked).cloned();
        let thing = known.unwrap_or_else(|| {
            let (entry, named) = entry_of(&self.moves, asked);
            Thing::new(now, entry, named)
        });
        let told = thing.told || thing.verdict == Verdict::Well;
        Thing {
            verdict,
            told,
            ..thing
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
        // The program was started: the next client will be answered.
        if listens && thing.listens == Some(false) {
            thing.forget_refusals();
        }
        thing.listens = Some(listens);
        if thing.verdict == Verdict::Refused && !thing.refuses(now) {
            (thing.verdict, thing.since) = (Verdict::Well, now);
        }
    }

    /// What was refused is well: the other server knows that something listens.
    pub(in super::super) fn trust(&mut self, now: Instant, asked: &Asked) {
        if let Some(thing) = self.things.get_mut(asked)
            && thing.verdict == Verdict::Refused
        {
            thing.forget_refusals();
            (thing.verdict, thing.since) = (Verdict::Well, now);
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
        if !self.things.contains_key(&asked) {
            let (entry, named) = entry_of(&self.moves, &asked);
            self.make_room();
            let mut thing = Thing::new(now, entry, named);
            thing.last = observed.opened;
            self.things.insert(asked, thing);
        }
        let Some(thing) = self.things.get_mut(&asked) else {
            return;
        };
        let entry = thing.entry;
        let answered = thing.take_in(observed);
        if let Some(entry) = entry {
            self.asked[entry] = true;
            self.answered[entry] |= answered;
        }
    }

    /// Makes room for one more port. What nobody is meant to serve goes first, then what no move
    /// names, then what is well; of each the one that was not asked for the longest.
    fn make_room(&mut self) {
        if self.things.len() < MAX_THINGS {
            return;
        }
        let rank = |thing: &Thing| {
            let well = thing.verdict == Verdict::Well;
            (thing.serves(), thing.named, !well, thing.last)
        };
        let least = self.things.iter().min_by_key(|(_, thing)| rank(thing));
        if let Some(asked) = least.map(|(asked, _)| *asked) {
            self.things.remove(&asked);
        }
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
            refusals: VecDeque::new(),
            named,
            entry,
            listens: None,
            turned: None,
            told: false,
            answers_to: None,
        }
    }

    /// The last client that was answered, if one has asked since then.
    pub(in super::super) fn answers_to(&self, since: Instant) -> Option<IpAddr> {
        self.answers_to.filter(|_| self.last >= since)
    }

    /// Whether the other server alone has seen it so.
    pub(in super::super) fn is_told(&self) -> bool {
        self.told
    }

    /// A client that this server's daemon itself turns away, and why.
    pub(in super::super) fn turned(&self) -> Option<(IpAddr, DropReason)> {
        self.turned
    }

    /// Since when the first of the clients waits that wait now; `None` if none does.
    pub(in super::super) fn waits_since(&self) -> Option<Instant> {
        let waits = self.in_vain().filter(|observed| asks_again(observed));
        waits.map(|observed| observed.opened).min()
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
        self.told = false;
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
                self.answers_to = Some(observed.client);
            }
            Fate::Refused => {
                self.counts[2] += 1;
                self.refused = self.refused.max(at);
                if self.refusals.len() == MAX_REFUSALS {
                    self.refusals.pop_front();
                }
                let when = observed.waited.max(observed.opened);
                self.refusals.push_back((observed.client, when));
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

    /// Whether somebody is meant to serve it: an administrator has named it, or somebody did, or
    /// would.
    pub(in super::super) fn serves(&self) -> bool {
        self.is_meant() || self.listens == Some(true)
    }

    /// Whether clients are meant to be answered. A program that listens is not enough: a firewall
    /// may keep clients from it on purpose.
    fn is_meant(&self) -> bool {
        self.named || self.answered.is_some()
    }

    /// Whether clients are refused, and not one alone that is banned.
    fn refuses(&self, now: Instant) -> bool {
        if !self.is_meant() || self.refused <= self.answered {
            return false;
        }
        if self.listens != Some(true) {
            return true;
        }
        let since = |&&(_, at): &&(IpAddr, Instant)| {
            self.answered.is_none_or(|answered| at > answered)
                && now.saturating_duration_since(at) < REFUSED_FOR
        };
        let clients = self.refusals.iter().filter(since);
        let clients: BTreeSet<IpAddr> = clients.map(|(client, _)| *client).collect();
        clients.len() >= 2
    }

    /// What was refused so far says nothing any more.
    fn forget_refusals(&mut self) {
        self.refused = None;
        self.refusals.clear();
    }

    /// `never`: nothing of the move that it belongs to was ever answered.
    fn judge(&self, now: Instant, never: bool) -> Verdict {
        let tcp = self.entry.is_some() && self.is_tcp();
        let waits = || self.in_vain().filter(|observed| asks_again(observed));
        let ages = || waits().map(|observed| age(now, observed));
        let mute = ages().any(|age| age >= PATIENCE)
            || ages().filter(|&age| age >= PATIENCE_OF_TWO).count() >= 2;
        let meant = self.is_meant();
        if mute {
            let clients: BTreeSet<IpAddr> = waits().map(|observed| observed.client).collect();
            let agreed = clients.len() >= 2 || ages().any(|age| age >= PATIENCE_OF_STRANGERS);
            let stranger = never && (agreed || self.listens == Some(true));
            return if tcp && (meant || stranger) {
                Verdict::Silent
            } else {
                Verdict::Unanswered
            };
        }
        if self.refuses(now) {
            return Verdict::Refused;
        }
        let heard = self.answered.max(self.refused).max(Some(self.last));
        let forgotten = heard.is_none_or(|heard| now.saturating_duration_since(heard) >= FORGOTTEN);
        let since_answered = self.answered.is_some_and(|at| at >= self.bad_since());
        if self.verdict == Verdict::Refused || since_answered || forgotten {
            return Verdict::Well;
        }
        // Something else of the move is answered now: it was a scan.
        if self.verdict == Verdict::Silent && !meant && !never {
            return Verdict::Unanswered;
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

/// Whether a conversation that waits counts: a TCP client asks again after a second.
fn asks_again(observed: &Observed) -> bool {
    observed.asked.protocol != TCP || observed.fate == Fate::Waiting { again: true }
}

fn age(now: Instant, observed: &Observed) -> Duration {
    now.saturating_duration_since(observed.opened)
}

/// The move that a port belongs to, and whether a move names it by its number. Of moves within each
/// other it is the one that names it, and then that of the longest prefix.
fn entry_of(moves: &[Move], asked: &Asked) -> (Option<usize>, bool) {
    let port = (asked.port > 0).then_some(asked.port);
    let takes =
        |moved: &Move| moved.prefix.contains(asked.addr) && moved.takes(asked.protocol, port);
    let all = moves.iter().enumerate().filter(|(_, moved)| takes(moved));
    // Of those that are alike the first one counts.
    let entry = all
        .rev()
        .max_by_key(|(_, moved)| (names(moved), moved.prefix.len()));
    (
        entry.map(|(at, _)| at),
        entry.is_some_and(|(_, moved)| names(moved)),
    )
}

/// Whether a move names its ports, so that somebody is meant to serve each.
pub(in super::super) fn names(moved: &Move) -> bool {
    let ports = moved.ports.iter().map(ExactSizeIterator::len);
    (1..=NAMED).contains(&ports.sum())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::turned::TurnedAway;
    use crate::model::moved::UDP;
    use crate::testing::epoch;
    use proptest::prelude::*;

    /// Such a client asks once, as a scanner that keeps no state.
    const STATELESS: u8 = 250;

    fn waits(client: u8, age: Duration) -> Fate {
        let again = client != STATELESS && age >= Duration::from_secs(1);
        Fate::Waiting { again }
    }

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
                        .map_or_else(|| waits(*client, now - *opened), |(_, fate)| fate);
                    some.push(Observed {
                        asked: *asked,
                        client: [203, 0, 113, *client].into(),
                        opened: *opened,
                        waited: *waited,
                        fate,
                    });
                    *waited = now;
                    matches!(fate, Fate::Waiting { .. }) && now - *opened < Duration::from_secs(16)
                });
            let opened = some.len() as u64;
            let turned = Vec::new();
            let seen = Observations {
                some,
                opened,
                turned,
            };
            self.silence.observe(now, seen);
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
    }

    #[test]
    fn a_client_that_is_banned_is_no_refusal_and_two_are_for_a_minute() {
        let mut bed = Bed::new(&["192.0.2.5:80"]);
        let asked = |port| Asked {
            addr: "192.0.2.5".parse().unwrap(),
            protocol: TCP,
            port,
        };
        bed.ask(80, 9, REFUSAL);
        bed.pass(1_000);
        bed.silence.listens(bed.now, &asked(80), true);
        assert_eq!(bed.verdict(80), Verdict::Well, "the look is in time");
        for _ in 0..5 {
            bed.ask(80, 9, REFUSAL);
            bed.pass(1_000);
            assert_eq!(bed.verdict(80), Verdict::Well, "the same client");
        }
        bed.ask(80, 8, ANSWER);
        bed.pass(1_000);
        bed.ask(80, 7, REFUSAL);
        bed.pass(1_000);
        assert_eq!(bed.verdict(80), Verdict::Well, "one since the answer");
        bed.ask(80, 9, REFUSAL);
        bed.pass(1_000);
        assert_eq!(bed.verdict(80), Verdict::Refused);
        bed.pass(50_000);
        assert_eq!(bed.verdict(80), Verdict::Refused);
        bed.pass(10_000);
        assert_eq!(bed.verdict(80), Verdict::Well, "it lapses");
    }

    #[test]
    fn what_the_other_server_knows_better_is_well() {
        let mut bed = Bed::new(&["192.0.2.5:80"]);
        bed.ask(80, 9, REFUSAL);
        bed.ask(80, 8, REFUSAL);
        bed.pass(1_000);
        let (&asked, ..) = bed.silence.doubts(bed.now).next().unwrap();
        bed.silence.trust(bed.now, &asked);
        assert_eq!(bed.verdict(80), Verdict::Well);
        bed.pass(1_000);
        assert_eq!(bed.verdict(80), Verdict::Well);
    }

    #[test]
    fn what_listens_behind_a_firewall_on_purpose_is_no_fault() {
        let mut bed = Bed::new(&["192.0.2.5"]);
        bed.ask(80, 9, ANSWER);
        bed.pass(1_000);
        bed.ask(22, 7, None);
        bed.ask(22, 8, None);
        bed.ask(5_432, 7, REFUSAL);
        bed.ask(5_432, 8, REFUSAL);
        for second in 0..10 {
            bed.pass(1_000);
            let asked: Vec<Asked> = bed.silence.things().map(|(asked, _)| *asked).collect();
            for asked in asked {
                bed.silence.listens(bed.now, &asked, true);
            }
            assert_ne!(bed.verdict(22), Verdict::Silent, "{second}");
            assert_eq!(bed.verdict(5_432), Verdict::Well, "{second}");
        }
        assert_eq!(bed.verdict(22), Verdict::Unanswered);
    }

    #[test]
    fn a_syn_that_its_client_does_not_repeat_is_not_taken_for_three() {
        let mut bed = Bed::new(&["192.0.2.5:80", "192.0.2.5:514/udp"]);
        for _ in 0..10 {
            bed.ask(80, STATELESS, None);
            bed.ask_by(UDP, 514, STATELESS, None);
            bed.pass(1_500);
            assert_eq!(bed.verdict(80), Verdict::Well);
        }
        assert_eq!(bed.verdict(514), Verdict::Unanswered);
        bed.ask(80, 9, None);
        bed.pass(4_500);
        assert_eq!(bed.verdict(80), Verdict::Silent, "this one repeats it");
    }

    #[test]
    fn a_scan_before_the_first_client_is_no_silence_once_that_is_answered() {
        let mut bed = Bed::new(&["192.0.2.5"]);
        bed.ask(1_000, 7, None);
        bed.pass(7_000);
        assert_eq!(bed.verdict(1_000), Verdict::Silent, "nothing was answered");
        bed.pass(20_000);
        assert_eq!(bed.verdict(1_000), Verdict::Silent);
        bed.ask(80, 9, ANSWER);
        bed.pass(1_000);
        assert_eq!(bed.verdict(1_000), Verdict::Unanswered);
    }

    #[test]
    fn a_named_port_gets_in_though_scans_have_filled_all_places() {
        let mut bed = Bed::new(&["192.0.2.5:80", "192.0.2.5:1000-60000"]);
        bed.ask(2_000, 9, ANSWER);
        bed.pass(1_000);
        for port in 3_000..6_000 {
            bed.ask(port, 7, None);
            bed.ask(port, 8, None);
        }
        bed.pass(10_000);
        bed.ask(80, 9, None);
        bed.pass(4_500);
        assert_eq!(bed.verdict(80), Verdict::Silent);
        assert_eq!(bed.silence.things().count(), MAX_THINGS);
        assert!(bed.silence.things().any(|(asked, _)| asked.port == 2_000));
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

    #[test]
    fn what_nobody_could_answer_while_the_other_server_was_away_is_no_silence() {
        let mut bed = Bed::new(&["192.0.2.5:80-81"]);
        bed.ask(80, 9, None);
        bed.pass(5_000);
        let away = bed.now;
        bed.ask(81, 9, None);
        bed.pass(5_000);
        assert_eq!(bed.verdict(81), Verdict::Silent);
        bed.silence.was_away(bed.now, away);
        assert_eq!(bed.verdict(81), Verdict::Well);
        bed.pass(10_000);
        assert_eq!(bed.verdict(81), Verdict::Well, "it was asked meanwhile");
        assert_eq!(bed.verdict(80), Verdict::Silent, "and this before");
        bed.ask(81, 9, None);
        bed.pass(5_000);
        assert_eq!(bed.verdict(81), Verdict::Silent);
    }

    #[test]
    fn what_is_turned_away_waits_as_what_nobody_answers() {
        let mut bed = Bed::new(&["192.0.2.5:80"]);
        let asked = Asked {
            addr: "192.0.2.5".parse().unwrap(),
            protocol: TCP,
            port: 80,
        };
        let (client, opened) = (IpAddr::from([10, 0, 0, 9]), bed.now);
        for second in 1..6 {
            bed.now += Duration::from_secs(1);
            let again = second > 1;
            let observed = Observed {
                asked,
                client,
                opened,
                waited: opened,
                fate: Fate::Waiting { again },
            };
            let reason = DropReason::MartianSource;
            let seen = Observations {
                turned: vec![TurnedAway { observed, reason }],
                ..Observations::default()
            };
            bed.silence.observe(bed.now, seen);
        }
        assert_eq!(bed.verdict(80), Verdict::Silent);
        let (_, thing, _) = bed.silence.doubts(bed.now).next().unwrap();
        assert_eq!(thing.turned(), Some((client, DropReason::MartianSource)));
        let view = bed.silence.view(opened, &asked);
        assert!(view.came && !view.answered, "{view:?}");
    }

    #[test]
    fn a_port_belongs_to_the_move_that_names_it() {
        let moves: Vec<Move> = ["192.0.2.0/24", "192.0.2.5", "192.0.2.0/28:80"]
            .map(|text| text.parse().unwrap())
            .into();
        let of = |addr: &str, port| {
            let asked = Asked {
                addr: addr.parse().unwrap(),
                protocol: TCP,
                port,
            };
            entry_of(&moves, &asked)
        };
        assert_eq!(of("192.0.2.5", 80), (Some(2), true));
        assert_eq!(of("192.0.2.5", 81), (Some(1), false));
        assert_eq!(of("192.0.2.6", 81), (Some(0), false));
        assert_eq!(of("192.0.3.6", 81), (None, false));
    }

    #[test]
    fn what_was_seen_since_a_time_is_told() {
        let mut bed = Bed::new(&["192.0.2.5:80"]);
        let view = |bed: &Bed, since| {
            let asked = Asked {
                addr: "192.0.2.5".parse().unwrap(),
                protocol: TCP,
                port: 80,
            };
            let view = bed.silence.view(since, &asked);
            [view.came, view.answered]
        };
        let start = bed.now;
        assert_eq!(view(&bed, start), [false, false]);
        bed.ask(80, 9, ANSWER);
        bed.pass(1_000);
        assert_eq!(view(&bed, start), [true, true]);
        let later = bed.now;
        assert_eq!(view(&bed, later), [false, false], "that was before");
        bed.ask(80, 9, None);
        bed.pass(1_000);
        assert_eq!(view(&bed, later), [true, false]);
        assert_eq!(view(&bed, start), [true, true]);
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
