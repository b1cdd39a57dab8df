//! Whose a conversation is that nobody knows: what the mode of its move says, on the old server.
//!
//! Owns the modes as the [gate](super::gate) sees them. Programs in the kernel decide by the same
//! modes about what they see first
//! ([`kernel::programs::modes`](crate::kernel::programs)); what they cannot tell they hand over.

use std::fmt;
use std::net::IpAddr;
use std::num::NonZeroU64;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;

use crate::flow::ended::HostFlow;
use crate::flow::lock;
use crate::model::inherited::inherited;
use crate::model::mode::{Mode, Settled, ShareKey};
use crate::model::moved::Move;

/// How long after clients have moved a TCP packet that no known connection has may belong to one
/// which this server has begun without remembering it: a SYN cookie is good for two minutes
/// (`TCP_SYNCOOKIE_VALID`, include/net/tcp.h). Its listener is asked.
pub const COOKIES: Duration = Duration::from_secs(120);

/// In place of a local port, in the flow of a client's ICMP query: another one with the same
/// identifier may have begun at the moved address.
pub const CLIENTS_QUERY: u16 = 1;

/// What capture has noted of the flows that it hands over, asked where the gate knows nothing.
pub trait Taken: fmt::Debug + Send + Sync {
    /// Whether a flow is the new server's: captured, and unless it is TCP, answered there.
    fn has(&self, flow: &HostFlow) -> bool;

    /// A flow of TCP is the new server's: from now on capture knows it, also after a crash of the
    /// daemon, and need not ask.
    fn note(&self, flow: &HostFlow);

    /// Which of several new servers has begun a flow from a port that has not moved; `None` if
    /// that is not known.
    fn begun_by(&self, flow: &HostFlow) -> Option<NonZeroU64>;

    /// Such a flow is this new server's, also after a crash of the daemon.
    fn note_begun(&self, flow: &HostFlow, by: NonZeroU64);
}

/// The modes of the moves of one peer.
#[derive(Debug, Default)]
pub(super) struct Modes {
    /// Whether they say anything but that all is moved, so that most packets need not ask.
    some: AtomicBool,
    table: ArcSwap<Table>,
    changing: Mutex<()>,
}

#[derive(Clone, Debug)]
struct Table {
    moves: Vec<Entry>,
    key: ShareKey,
}

impl Default for Table {
    fn default() -> Self {
        Self {
            moves: Vec::new(),
            key: ShareKey([0; 2]),
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    mode: Mode<Instant>,
    cookies: Cookies,
}

/// Whether a connection that begins with a cookie may be the old server's.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Cookies {
    #[default]
    Over,
    /// Clients have just moved. The end is not known yet, since nobody has told the time.
    JustMoved,
    Until(Instant),
}

impl Cookies {
    fn lasts_longer_than(self, other: Self) -> bool {
        match (self, other) {
            (Self::Over, _) | (_, Self::JustMoved) => false,
            (Self::JustMoved, _) | (Self::Until(_), Self::Over) => true,
            (Self::Until(one), Self::Until(other)) => one > other,
        }
    }
}

/// What a mode says of a new conversation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Says {
    /// It is the new server's.
    There,
    /// It is the old server's own.
    Here,
    /// It waits.
    Waits,
}

impl Modes {
    /// Whether they have to be asked.
    #[inline]
    pub(super) fn apply(&self) -> bool {
        self.some.load(Relaxed)
    }

    /// From now on the moves are in these modes, in their order.
    pub(super) fn set(&self, modes: &[Mode<Instant>], key: ShareKey) {
        let _changing = lock(&self.changing);
        let before = self.table.load();
        let followed = |(number, mode): (usize, &Mode<Instant>)| {
            let before = before.moves.get(number).copied().unwrap_or(Entry::MOVED);
            let more = mode.settled.percent() > before.mode.settled.percent();
            Entry {
                mode: *mode,
                cookies: if more {
                    Cookies::JustMoved
                } else {
                    before.cookies
                },
            }
        };
        let moves: Vec<Entry> = modes.iter().enumerate().map(followed).collect();
        let some = moves.iter().any(Entry::says_something);
        self.table.store(Table { moves, key }.into());
        self.some.store(some, Relaxed);
    }

    /// The modes of other moves, which were these: what was so, and that clients have just moved,
    /// goes on.
    pub(super) fn again(&self, before: &[Move], moves: &[Move]) -> Self {
        let table = self.table.load();
        let known = before.iter().zip(&table.moves);
        let known: Vec<(&Move, Entry)> = known
            .filter(|(_, entry)| entry.says_something())
            .map(|(moved, entry)| (moved, *entry))
            .collect();
        let later = |one: Entry, other: Entry| match other.cookies.lasts_longer_than(one.cookies) {
            true => other,
            false => one,
        };
        let known = inherited(&known, moves, later).into_iter();
        let moves: Vec<Entry> = known.map(|it| it.unwrap_or(Entry::MOVED)).collect();
        let key = table.key;
        Self {
            some: AtomicBool::new(moves.iter().any(Entry::says_something)),
            table: ArcSwap::from_pointee(Table { moves, key }),
            changing: Mutex::default(),
        }
    }

    /// Takes note of the time. Call it every second.
    pub(super) fn expire(&self, now: Instant) {
        if !self.apply() {
            return;
        }
        let _changing = lock(&self.changing);
        let mut table = Table::clone(&self.table.load());
        for entry in &mut table.moves {
            entry.cookies = match entry.cookies {
                Cookies::JustMoved => Cookies::Until(now + COOKIES),
                Cookies::Until(end) if end <= now => Cookies::Over,
                known @ (Cookies::Over | Cookies::Until(_)) => known,
            };
            if entry.mode.held_until.is_some_and(|until| until <= now) {
                entry.mode.held_until = None;
            }
        }
        let some = table.moves.iter().any(Entry::says_something);
        self.table.store(table.into());
        self.some.store(some, Relaxed);
    }

    /// What the mode of a move says of a client's new conversation.
    pub(super) fn of_new(&self, now: Instant, number: Option<usize>, client: IpAddr) -> Says {
        let table = self.table.load();
        let Some(entry) = number.and_then(|number| table.moves.get(number)) else {
            return Says::There;
        };
        if entry.mode.held_until.is_some_and(|until| until > now) {
            return Says::Waits;
        }
        entry.settled(table.key, client)
    }

    /// What it says of a packet that goes on with what nobody knows. It does not wait.
    pub(super) fn of_old(&self, number: Option<usize>, client: IpAddr) -> Says {
        let table = self.table.load();
        let entry = number.and_then(|number| table.moves.get(number));
        entry.map_or(Says::There, |entry| entry.settled(table.key, client))
    }

    /// Whether a TCP connection that nobody knows may have begun here with a cookie, though its
    /// client has moved.
    pub(super) fn may_have_cookie(&self, number: Option<usize>) -> bool {
        let table = self.table.load();
        let entry = number.and_then(|number| table.moves.get(number));
        entry.is_some_and(|entry| entry.cookies != Cookies::Over)
    }
}

impl Entry {
    const MOVED: Self = Self {
        mode: Mode {
            settled: Settled::Moved,
            held_until: None,
        },
        cookies: Cookies::Over,
    };

    fn says_something(&self) -> bool {
        self.mode != Self::MOVED.mode || self.cookies != Cookies::Over
    }

    fn settled(&self, key: ShareKey, client: IpAddr) -> Says {
        let there = match self.mode.settled {
            Settled::Here => false,
            Settled::Shared(percent) => key.takes(client, percent.get()),
            Settled::Moved => true,
        };
        if there { Says::There } else { Says::Here }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::flow::class::{TCP_ESTABLISHED, UDP_BOTH_WAYS};
    use crate::flow::gate::{Gate, GateConfig};
    use crate::flow::ownership::Verdict;
    use crate::flow::seed::Seed;
    use crate::model::drops::DropReason;
    use crate::model::mode::Percent;
    use crate::packet::testing::{Plan, fragments, reply, too_big};
    use crate::packet::{ACK, FIN, Kind, Parsed, SYN};
    use crate::testing::epoch;
    use proptest::prelude::*;

    const CLIENT: &str = "203.0.113.9";
    const MOVED: &str = "192.0.2.5";
    const KEY: ShareKey = ShareKey([7, 9]);
    const CARRY: Result<Verdict, DropReason> = Ok(Verdict::Carry);
    const BOUNCE: Result<Verdict, DropReason> = Ok(Verdict::Bounce);
    const HOLD: Result<Verdict, DropReason> = Ok(Verdict::Hold);

    const KINDS: [Kind; 4] = [Kind::Tcp, Kind::Udp, Kind::IcmpQuery, Kind::Other];
    const MODES: [&str; 5] = ["here", "shared", "moved", "held here", "held moved"];

    /// A gate in the middle of its life, and the time that it is told.
    struct Bed {
        gate: Gate,
        now: Instant,
    }

    impl Bed {
        fn new(moves: &[&str]) -> Self {
            let bed = Self::resuming(moves, false);
            let now = bed.now + TCP_ESTABLISHED;
            Self { now, ..bed }
        }

        fn resuming(moves: &[&str], resumes: bool) -> Self {
            let moves: Vec<_> = moves.iter().map(|text| text.parse().unwrap()).collect();
            let config = GateConfig {
                max_flows: 1_000,
                seed: Seed::new([1, 2]),
                started: epoch(),
                resumes,
            };
            Self {
                gate: Gate::new(&moves, config),
                now: epoch(),
            }
        }

        /// Every move is in this mode from now on.
        fn set(&self, mode: &str) {
            let (held, settled) = match mode.strip_prefix("held ") {
                Some(settled) => (true, settled),
                None => (false, mode),
            };
            let settled = match settled {
                "here" => Settled::Here,
                "moved" => Settled::Moved,
                _ => Settled::Shared(Percent::new(50).unwrap()),
            };
            let mode = Mode {
                settled,
                held_until: held.then(|| self.now + Duration::from_secs(60)),
            };
            self.gate.set_modes(&[mode; 4], KEY);
        }

        fn captured(&self, bytes: &[u8]) -> Result<Verdict, DropReason> {
            let parsed = Parsed::parse(bytes)?;
            self.gate.check_captured(self.now, &parsed, bytes)
        }

        fn answered(&self, plan: &Plan, flags: u8) {
            let mut back = reply(plan);
            back.flags = flags;
            let bytes = bytes(&back);
            let parsed = Parsed::parse(&bytes).unwrap();
            let passed = self.gate.check_returning(self.now, &parsed, &bytes, &[]);
            assert_eq!(passed, Ok(()), "{plan:?}");
        }
    }

    /// A client's first packet.
    fn begins(kind: Kind, port: u16) -> Plan {
        let mut plan = Plan::new(kind, CLIENT, MOVED);
        (plan.src_port, plan.flags) = (port, SYN);
        plan
    }

    fn goes_on(plan: &Plan) -> Plan {
        let mut plan = plan.clone();
        plan.flags = ACK;
        plan
    }

    fn bytes(plan: &Plan) -> Vec<u8> {
        if plan.kind != Kind::Other {
            return plan.build();
        }
        let kind = Kind::Udp;
        let mut bytes = Plan {
            kind,
            ..plan.clone()
        }
        .build();
        // GRE.
        bytes[9] = 47;
        bytes
    }

    /// What a new conversation gets.
    fn of_new(mode: &str) -> Result<Verdict, DropReason> {
        match mode {
            "here" => BOUNCE,
            "moved" => CARRY,
            "shared" if KEY.takes(CLIENT.parse().unwrap(), 50) => CARRY,
            "shared" => BOUNCE,
            _ => HOLD,
        }
    }

    #[test]
    fn what_the_new_server_has_goes_on_there_and_the_mode_says_who_gets_the_rest() {
        for kind in KINDS {
            for mode in MODES {
                let bed = Bed::new(&[MOVED]);
                let has = begins(kind, 1);
                assert_eq!(bed.captured(&bytes(&has)), CARRY);
                bed.answered(&has, SYN | ACK);
                bed.set(mode);
                assert_eq!(
                    bed.captured(&bytes(&goes_on(&has))),
                    CARRY,
                    "{kind:?} {mode}"
                );
                assert_eq!(bed.captured(&bytes(&has)), CARRY, "{kind:?} {mode}");
                // GRE has no ports to tell one from another.
                if kind != Kind::Other {
                    let new = bytes(&begins(kind, 2));
                    assert_eq!(bed.captured(&new), of_new(mode), "{kind:?} {mode}");
                }
                bed.answered(&has, ACK);
            }
        }
    }

    #[test]
    fn what_the_new_server_has_not_answered_is_served_by_whoever_serves() {
        for kind in KINDS {
            for mode in MODES {
                let bed = Bed::new(&[MOVED]);
                let asks = bytes(&begins(kind, 1));
                assert_eq!(bed.captured(&asks), CARRY);
                bed.set(mode);
                assert_eq!(bed.captured(&asks), of_new(mode), "{kind:?} {mode}");
            }
        }
    }

    #[test]
    fn a_connection_that_is_over_gives_way_to_a_new_one() {
        let bed = Bed::new(&[MOVED]);
        let syn = begins(Kind::Tcp, 1);
        assert_eq!(bed.captured(&syn.build()), CARRY);
        bed.answered(&syn, SYN | ACK);
        bed.set("here");
        let mut fin = goes_on(&syn);
        fin.flags = FIN | ACK;
        assert_eq!(bed.captured(&fin.build()), CARRY);
        assert_eq!(bed.captured(&syn.build()), CARRY, "the other side is open");
        bed.answered(&syn, FIN | ACK);
        assert_eq!(bed.captured(&goes_on(&syn).build()), CARRY, "the last ACK");
        assert_eq!(bed.captured(&syn.build()), BOUNCE);
    }

    #[test]
    fn a_connection_that_began_with_a_cookie_is_left_to_its_listener_for_two_minutes() {
        let mut bed = Bed::new(&[MOVED]);
        let ack = |port| goes_on(&begins(Kind::Tcp, port)).build();
        bed.set("here");
        assert_eq!(bed.captured(&ack(1)), BOUNCE);
        bed.set("held here");
        assert_eq!(bed.captured(&ack(1)), BOUNCE);
        bed.set("moved");
        assert_eq!(bed.captured(&ack(1)), BOUNCE);
        assert_eq!(bed.captured(&begins(Kind::Tcp, 2).build()), CARRY);
        assert_eq!(bed.captured(&ack(2)), CARRY, "the new server's");
        assert_eq!(bed.captured(&begins(Kind::Udp, 2).build()), CARRY);
        bed.gate.expire(bed.now, 0);
        bed.now += COOKIES - Duration::from_secs(1);
        bed.gate.expire(bed.now, 0);
        assert_eq!(bed.captured(&ack(1)), BOUNCE);
        bed.now += Duration::from_secs(1);
        bed.gate.expire(bed.now, 0);
        assert_eq!(bed.captured(&ack(1)), CARRY);
    }

    #[test]
    fn a_reload_forgets_neither_the_modes_nor_that_clients_have_just_moved() {
        let mut bed = Bed::new(&[MOVED, "192.0.2.6"]);
        let ack = |port| goes_on(&begins(Kind::Tcp, port)).build();
        bed.set("here");
        bed.set("moved");
        bed.gate.expire(bed.now, 0);
        // Cut anew, and in another order.
        let moves = ["192.0.2.7", "192.0.2.5:80/tcp"].map(|text| text.parse().unwrap());
        let gate = bed.gate.again(&moves);
        bed.gate = gate;
        bed.set("moved");
        assert_eq!(bed.captured(&ack(1)), BOUNCE);
        let mut other = goes_on(&begins(Kind::Tcp, 1));
        other.dst = "192.0.2.7".parse().unwrap();
        assert_eq!(bed.captured(&other.build()), CARRY, "it was never here");
        bed.now += COOKIES;
        bed.gate.expire(bed.now, 0);
        assert_eq!(bed.captured(&ack(1)), CARRY);
        // Until the modes are told, those of before apply.
        let bed = Bed::new(&[MOVED]);
        bed.set("here");
        let gate = bed.gate.again(&moves);
        let bed = Bed { gate, ..bed };
        assert_eq!(bed.captured(&begins(Kind::Tcp, 1).build()), BOUNCE);
    }

    #[test]
    fn a_hold_ends_by_itself() {
        for (mode, afterwards) in [("held here", BOUNCE), ("held moved", CARRY)] {
            let mut bed = Bed::new(&[MOVED]);
            bed.set(mode);
            let udp = begins(Kind::Udp, 1).build();
            bed.now += Duration::from_secs(59);
            assert_eq!(bed.captured(&udp), HOLD);
            bed.now += Duration::from_secs(1);
            assert_eq!(bed.captured(&udp), afterwards);
        }
    }

    #[test]
    fn each_move_has_a_mode_of_its_own() {
        let bed = Bed::new(&["192.0.2.5:80/tcp", "192.0.2.0/24", "192.0.2.5:81"]);
        let modes = [Settled::Here, Settled::Moved, Settled::Here].map(Mode::settled);
        bed.gate.set_modes(&modes, KEY);
        let at = |kind, dst: &str, port| {
            let mut plan = begins(kind, 1);
            (plan.dst, plan.dst_port) = (dst.parse().unwrap(), port);
            bed.captured(&plan.build())
        };
        assert_eq!(at(Kind::Tcp, MOVED, 80), BOUNCE);
        assert_eq!(at(Kind::Udp, MOVED, 80), CARRY);
        assert_eq!(at(Kind::Udp, MOVED, 81), BOUNCE);
        assert_eq!(at(Kind::Tcp, MOVED, 82), CARRY);
        assert_eq!(at(Kind::Tcp, "192.0.2.6", 80), CARRY);
        assert_eq!(at(Kind::IcmpQuery, MOVED, 0), CARRY);
    }

    #[test]
    fn errors_and_fragments_follow() {
        let router = "192.0.2.99".parse().unwrap();
        for kind in [Kind::Tcp, Kind::Udp] {
            let bed = Bed::new(&[MOVED]);
            let has = begins(kind, 1);
            assert_eq!(bed.captured(&has.build()), CARRY);
            bed.answered(&has, SYN | ACK);
            bed.set("here");
            let new = begins(kind, 2);
            for (plan, verdict) in [(&has, CARRY), (&new, BOUNCE)] {
                let about = reply(&goes_on(plan)).build();
                let error = too_big(&about, about.len(), router);
                assert_eq!(bed.captured(&error), verdict, "{kind:?}");
            }
            let mut id = 0;
            for (plan, verdict) in [(&has, CARRY), (&new, BOUNCE)] {
                id += 1;
                let at = if kind == Kind::Tcp { 24 } else { 16 };
                let [first, second] = fragments(&plan.build(), at, id);
                let unknown = Err(DropReason::FragmentUnknown);
                assert_eq!(bed.captured(&second), unknown, "not known yet");
                assert_eq!(bed.captured(&first), verdict);
                assert_eq!(bed.captured(&second), verdict);
            }
        }
    }

    #[derive(Debug)]
    struct All;

    impl Taken for All {
        fn has(&self, _: &HostFlow) -> bool {
            true
        }

        fn note(&self, _: &HostFlow) {}

        fn begun_by(&self, _: &HostFlow) -> Option<NonZeroU64> {
            None
        }

        fn note_begun(&self, _: &HostFlow, _: NonZeroU64) {}
    }

    #[derive(Debug, Default)]
    struct Noted(Mutex<Vec<HostFlow>>);

    impl Taken for Noted {
        fn has(&self, _: &HostFlow) -> bool {
            false
        }

        fn note(&self, flow: &HostFlow) {
            self.0.lock().unwrap().push(*flow);
        }

        fn begun_by(&self, _: &HostFlow) -> Option<NonZeroU64> {
            None
        }

        fn note_begun(&self, _: &HostFlow, _: NonZeroU64) {}
    }

    #[test]
    fn capture_is_told_of_connections_that_it_asks_about() {
        let bed = Bed::new(&[MOVED]);
        let noted = std::sync::Arc::new(Noted::default());
        bed.gate.set_taken(noted.clone());
        let told = || noted.0.lock().unwrap().len();
        for kind in KINDS {
            let has = begins(kind, 1);
            bed.set("moved");
            assert_eq!(bed.captured(&bytes(&has)), CARRY);
            bed.set("here");
            let before = told();
            // What nobody has answered yet is nobody's.
            assert!(bed.captured(&bytes(&goes_on(&has))).is_ok());
            assert_eq!(told(), before, "{kind:?}");
            bed.set("moved");
            assert_eq!(bed.captured(&bytes(&has)), CARRY);
            bed.answered(&has, ACK | SYN);
            bed.set("here");
            assert_eq!(bed.captured(&bytes(&goes_on(&has))), CARRY);
            assert_eq!(bed.captured(&bytes(&goes_on(&has))), CARRY);
            let once = usize::from(kind == Kind::Tcp);
            assert_eq!(told() - before, once, "not of every packet: {kind:?}");
        }
    }

    #[test]
    fn what_capture_has_noted_goes_on_after_a_crash() {
        for kind in KINDS {
            let udp_like = kind != Kind::Tcp;
            let mut bed = Bed::resuming(&[MOVED], true);
            bed.gate.set_taken(std::sync::Arc::new(All));
            bed.set("here");
            let client = begins(kind, 1);
            if !udp_like {
                assert_eq!(bed.captured(&bytes(&client)), BOUNCE, "a SYN begins anew");
            }
            let next = goes_on(&client);
            assert_eq!(bed.captured(&bytes(&next)), CARRY, "{kind:?}");
            bed.answered(&client, ACK);
            let another = bytes(&goes_on(&begins(kind, 2)));
            bed.now += UDP_BOTH_WAYS * 3;
            if kind != Kind::Other {
                let verdict = if udp_like { BOUNCE } else { CARRY };
                assert_eq!(bed.captured(&another), verdict, "{kind:?}");
            }
            // One that was stopped has left nothing that goes on, but for connections.
            let bed = Bed::resuming(&[MOVED], false);
            bed.gate.set_taken(std::sync::Arc::new(All));
            bed.set("here");
            let verdict = if udp_like { BOUNCE } else { CARRY };
            assert_eq!(bed.captured(&bytes(&next)), verdict, "{kind:?}");
        }
    }

    #[test]
    fn who_cannot_be_a_client_is_not_held() {
        let bed = Bed::new(&[MOVED]);
        bed.set("held moved");
        let mut plan = begins(Kind::Udp, 1);
        plan.src = "127.0.0.1".parse().unwrap();
        assert_eq!(bed.captured(&plan.build()), Err(DropReason::BadSource));
    }

    proptest! {
        /// Modes change at any time, clients speak and the new server answers in any order: it is
        /// the same as in a model that remembers who was answered.
        #[test]
        fn it_is_as_a_naive_model_has_it(
            steps in proptest::collection::vec(
                (0usize..7, 0u16..4, 0usize..2, any::<bool>()), 1..60,
            ),
        ) {
            let bed = Bed::new(&[MOVED]);
            let mut mode = "moved";
            // Whether the new server has answered what it was given.
            let mut given: HashMap<(usize, u16), bool> = HashMap::new();
            for (step, port, kind, first) in steps {
                let plan = begins([Kind::Tcp, Kind::Udp][kind], port + 1);
                let known = given.get(&(kind, port)).copied();
                match step {
                    0..5 if step != 0 || !first => {
                        mode = MODES[step];
                        bed.set(mode);
                    }
                    5 => if known.is_some() {
                        bed.answered(&plan, SYN | ACK);
                        given.insert((kind, port), true);
                    },
                    _ => {
                        // A connection goes on only with who has answered it.
                        let tcp_goes_on = kind == 0 && known == Some(true) && !first;
                        let plan = if tcp_goes_on { goes_on(&plan) } else { plan };
                        let expected = if known == Some(true) { CARRY } else { of_new(mode) };
                        prop_assert_eq!(bed.captured(&plan.build()), expected);
                        if expected == CARRY {
                            given.entry((kind, port)).or_insert(false);
                        }
                    }
                }
            }
        }
    }
}
