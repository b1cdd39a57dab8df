//! What new servers begin from ports that have not moved: what leaves, and whose the answers are.
//!
//! Owns the question which gate has begun a flow. Ports that have not moved belong to no gate, so
//! where parts of an address have moved to several new servers, all gates are asked what they know
//! before any of them may take a flow for one that is older than this daemon. No two gates have the
//! same flow.
//!
//! ```text
//! answer ──► known to a gate? ──► that one
//!                  │ no
//!                  ▼
//!            may be older than this daemon? ──► what the kernel remembers, or the only gate that
//!                  │ no                         may have begun it; if there is neither, nobody
//!                  ▼
//!            none of what was begun
//! ```

use std::borrow::Borrow;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Instant;

use super::{Gate, begins, host_flow};
use crate::flow::clients::{Flow, Known};
use crate::flow::ended::HostFlow;
use crate::flow::lock;
use crate::flow::ownership::Verdict;
use crate::flow::records::Ends;
use crate::model::drops::DropReason;
use crate::packet::{Fragment, Kind, Parsed, Quoted, SYN};

impl Gate {
    /// The same gate beside others that may begin something from the same address, under a name
    /// which is the same after a crash.
    #[must_use]
    pub fn beside_others(mut self, name: NonZeroU64) -> Self {
        self.name = Some(name);
        self
    }

    /// Whether it has a name among others.
    pub fn is_named(&self) -> bool {
        self.name.is_some()
    }

    /// Judges a packet of the new server from a port that has not moved, and notes its flow if it
    /// leaves. `gates` are those of all peers.
    pub(super) fn check_begun(
        &self,
        now: Instant,
        parsed: &Parsed,
        bytes: &[u8],
        gates: &[Arc<Self>],
    ) -> Result<(), DropReason> {
        let (protocol, port) = (parsed.protocol(), parsed.src_port());
        if self.is_of_another(parsed.src(bytes), protocol, parsed.kind(), port) {
            return Err(DropReason::NotMoved);
        }
        let flow = self.clients.begun(parsed, bytes);
        let flow = flow.filter(|_| self.begins_anywhere);
        let flow = flow.ok_or(DropReason::NotMoved)?;
        if !begins(parsed) && self.clients.server_spoke(now, &flow).is_known() {
            return Ok(());
        }
        self.may_begin(now, parsed, bytes, &flow, gates)
    }

    /// Whether a packet leaves that begins something from a port that has not moved, or goes on
    /// with it after a restart.
    #[cold]
    fn may_begin(
        &self,
        now: Instant,
        parsed: &Parsed,
        bytes: &[u8],
        flow: &Flow,
        gates: &[Arc<Self>],
    ) -> Result<(), DropReason> {
        if self.is_own(parsed.dst(bytes)) {
            return Err(self.refuse(DropReason::BadDestination, parsed, bytes));
        }
        let mut others = gates
            .iter()
            .filter(|&gate| !std::ptr::eq(&raw const **gate, self));
        if others.any(|gate| gate.has_begun(now, parsed, bytes)) {
            return Err(DropReason::OutgoingTaken);
        }
        let ends = (parsed.src_port(), parsed.dst_port());
        if self.may_be_older(now, parsed, flow, ends) {
            let by = self.remembered(|| returning_flow(parsed, bytes));
            if by.is_some() && by != self.name {
                return Err(DropReason::OutgoingTaken);
            }
            self.clients
                .presume(now, flow, &Ends::of_server(parsed, bytes));
            return Ok(());
        }
        match self.allowed.judge(now, parsed) {
            Some(Ok(())) => {
                let ends = Ends::of_server(parsed, bytes);
                self.clients.presume(now, flow, &ends);
            }
            Some(Err(reason)) => return Err(self.refuse(reason, parsed, bytes)),
            None => return Err(DropReason::NotMoved),
        }
        Ok(())
    }

    /// Whether a packet to a client would belong to a flow that this gate has begun.
    fn has_begun(&self, now: Instant, parsed: &Parsed, bytes: &[u8]) -> bool {
        let flow = (self.begins_anywhere).then(|| self.clients.begun(parsed, bytes));
        let flow = flow.flatten();
        flow.is_some_and(|flow| self.clients.knows(now, &flow))
    }

    /// Whether a captured packet answers what the new server is known to have begun.
    fn is_answered(&self, now: Instant, parsed: &Parsed, bytes: &[u8]) -> bool {
        if parsed.kind() == Kind::IcmpError {
            return self.begins_anywhere && self.is_about_begun(now, parsed, bytes);
        }
        let Some(flow) = self.answered_flow(parsed, bytes) else {
            return false;
        };
        match self.clients.client_spoke(now, &flow) {
            Known::No => return false,
            Known::Same => {}
            Known::Changed(_) => self.remember_begun(parsed, bytes),
        }
        self.ownership.carry_fragments(now, parsed, bytes);
        if parsed.fragment() == Fragment::First {
            lock(&self.decided).remember(now, &self.seed, parsed, bytes, Verdict::Carry);
        }
        true
    }

    /// The flow that a captured packet answers, if that may be older than this daemon.
    ///
    /// The kernel knows it all the same, and takes nothing else to such a port but fragments.
    fn may_be_answered(&self, now: Instant, parsed: &Parsed, bytes: &[u8]) -> Option<Flow> {
        let flow = self.answered_flow(parsed, bytes)?;
        let ends = (parsed.dst_port(), parsed.src_port());
        let may_be =
            parsed.fragment() == Fragment::None && self.may_be_older(now, parsed, &flow, ends);
        may_be.then_some(flow)
    }

    /// The flow is this gate's, since it cannot be another's.
    fn take_answers(&self, now: Instant, parsed: &Parsed, bytes: &[u8], flow: &Flow) {
        let ends = Ends::of_client(parsed, bytes);
        self.clients.presume(now, flow, &ends);
        self.remember_begun(parsed, bytes);
    }

    /// The flow that a captured packet answers, if it may answer what was begun here.
    fn answered_flow(&self, parsed: &Parsed, bytes: &[u8]) -> Option<Flow> {
        if !self.begins_anywhere || begins(parsed) || parsed.fragment() == Fragment::Later {
            return None;
        }
        let (protocol, port) = (parsed.protocol(), parsed.dst_port());
        let scope = self.ownership.find(parsed.dst(bytes))?;
        let is_moved = self.ownership.takes(scope, protocol, parsed.kind(), port)
            || self.is_of_another(parsed.dst(bytes), protocol, parsed.kind(), port);
        (!is_moved).then(|| self.clients.begun_answer(parsed, bytes))?
    }

    /// Whether an ICMP error is about such a flow.
    fn is_about_begun(&self, now: Instant, parsed: &Parsed, bytes: &[u8]) -> bool {
        let Ok(quoted) = Quoted::parse(bytes, parsed) else {
            return false;
        };
        let flow = self.clients.begun_quoted(&quoted, bytes);
        flow.is_some_and(|flow| self.clients.knows(now, &flow))
    }

    /// Whether a flow from a port that has not moved may be older than this daemon, between these
    /// ports of the new server and of the other end.
    fn may_be_older(
        &self,
        now: Instant,
        parsed: &Parsed,
        flow: &Flow,
        (moved_port, remote_port): (u16, u16),
    ) -> bool {
        let query = matches!(parsed.kind(), Kind::IcmpQuery | Kind::IcmpReply);
        // Whoever's connection a SYN-ACK opens knows it.
        let is_one = parsed.kind() == Kind::Tcp || self.resumes;
        is_one
            && parsed.tcp_flags() & SYN == 0
            && self.clients.may_be_older(now, flow)
            && (self.allowed).names(parsed.protocol(), query, moved_port, remote_port)
    }

    /// Keeps over a crash who has begun the flow that a captured packet answers. Who is alone need
    /// not tell.
    fn remember_begun(&self, parsed: &Parsed, bytes: &[u8]) {
        if let Some((taken, name)) = self.taken.get().zip(self.name) {
            taken.note_begun(&host_flow(parsed, bytes), name);
        }
    }

    /// Who has begun a flow, as far as that was kept over a crash.
    fn remembered(&self, flow: impl FnOnce() -> HostFlow) -> Option<NonZeroU64> {
        let taken = self.taken.get().filter(|_| self.name.is_some())?;
        taken.begun_by(&flow())
    }
}

/// The place of the gate whose new server has begun what a captured packet answers; `None` if it
/// answers nothing of that kind.
///
/// # Errors
/// [`DropReason::OutgoingUnknown`] if it is not known which of several. The old server's own stack
/// would reset it; once its new server has spoken, that is known.
#[inline]
pub(in crate::flow) fn whose<G: Borrow<Gate>>(
    gates: &[G],
    now: Instant,
    parsed: &Parsed,
    bytes: &[u8],
) -> Result<Option<usize>, DropReason> {
    let mut all = gates.iter().map(Borrow::borrow);
    let Some(gate) = all.find(|gate: &&Gate| gate.begins_anywhere) else {
        return Ok(None);
    };
    let (to, protocol, port) = (parsed.dst(bytes), parsed.protocol(), parsed.dst_port());
    if gate.is_of_another(to, protocol, parsed.kind(), port) {
        return Ok(None);
    }
    find(gates, now, parsed, bytes)
}

fn find<G: Borrow<Gate>>(
    gates: &[G],
    now: Instant,
    parsed: &Parsed,
    bytes: &[u8],
) -> Result<Option<usize>, DropReason> {
    let all = || gates.iter().map(Borrow::<Gate>::borrow);
    let known = |gate: &Gate| gate.is_answered(now, parsed, bytes);
    if let Some(index) = all().position(known) {
        // Its later fragments come to these gates first.
        for gate in all().take(index) {
            gate.ownership.leave_fragments(now, parsed, bytes);
        }
        return Ok(Some(index));
    }
    let may_be = |(index, gate): (usize, &Gate)| {
        let flow = gate.may_be_answered(now, parsed, bytes);
        flow.map(|flow| (index, flow))
    };
    let candidates: Vec<_> = all().enumerate().filter_map(may_be).collect();
    let chosen = match candidates[..] {
        [] => return Ok(None),
        [only] => Some(only),
        [(first, _), ..] => {
            let by = gates[first]
                .borrow()
                .remembered(|| host_flow(parsed, bytes));
            let is_it =
                |&&(index, _): &&(usize, Flow)| by.is_some() && gates[index].borrow().name == by;
            candidates.iter().find(is_it).copied()
        }
    };
    let (index, flow) = chosen.ok_or(DropReason::OutgoingUnknown)?;
    gates[index]
        .borrow()
        .take_answers(now, parsed, bytes, &flow);
    Ok(Some(index))
}

/// How this host's own stack sees the flow of a packet that leaves.
fn returning_flow(parsed: &Parsed, bytes: &[u8]) -> HostFlow {
    let [local, remote] = match parsed.kind() {
        Kind::Tcp | Kind::Udp => [parsed.src_port(), parsed.dst_port()],
        Kind::IcmpQuery => [0, parsed.src_port()],
        Kind::IcmpReply | Kind::IcmpError | Kind::Other | Kind::LaterFragment => [0, 0],
    };
    HostFlow {
        protocol: parsed.protocol(),
        local: SocketAddr::new(parsed.src(bytes).into(), local),
        remote: SocketAddr::new(parsed.dst(bytes).into(), remote),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::flow::class::TCP_ESTABLISHED;
    use crate::flow::gate::tests::{
        Bed, CARRY, CLIENT, GRE, MOVED, OWN, other, outgoing, request, with,
    };
    use crate::flow::modes::Taken;
    use crate::model::scopes::Scopes;
    use crate::packet::testing::{Plan, fragments, reply, too_big};
    use crate::packet::{ACK, RST};

    /// A port that has moved, beside those that have not.
    const IN_PART: &str = "192.0.2.5:80/tcp";
    const BOUNCE: Result<Verdict, DropReason> = Ok(Verdict::Bounce);
    const NOT_MOVED: Result<(), DropReason> = Err(DropReason::NotMoved);

    #[test]
    fn what_begins_from_a_port_that_has_not_moved_is_answered_exactly() {
        for kind in [Kind::Tcp, Kind::Udp, Kind::IcmpQuery] {
            let bed = Bed::settled(&[IN_PART]);
            let begins = outgoing(kind);
            assert_eq!(bed.returning(&begins.build()), NOT_MOVED, "{kind:?}");
            let bed = bed.allow(&["any"]);
            let mut answer = reply(&begins);
            answer.flags = SYN | ACK;
            let about = |plan: &Plan| too_big(&plan.build(), 28, "203.0.113.1".parse().unwrap());
            assert_eq!(bed.captured(&answer.build()), BOUNCE, "it has not begun");
            assert_eq!(bed.captured(&about(&begins)), BOUNCE);
            assert_eq!(bed.returning(&begins.build()), Ok(()));
            assert_eq!(bed.returning(&begins.build()), Ok(()), "sent again");
            assert_eq!(bed.captured(&answer.build()), CARRY);
            assert_eq!(bed.captured(&about(&begins)), CARRY);
            if kind == Kind::Udp {
                let [first, second] = fragments(&answer.build(), 16, 3);
                assert_eq!(bed.captured(&first), CARRY);
                assert_eq!(bed.captured(&second), CARRY);
            }
            // Nobody else's packet is, nor is any other of the same remote.
            let other = |change: &dyn Fn(&mut Plan)| {
                assert_eq!(bed.captured(&with(&answer, change)), BOUNCE, "{kind:?}");
            };
            other(&|p| p.src = "203.0.113.10".parse().unwrap());
            other(&|p| p.dst_port += 1);
            let astray = with(&begins, |p| p.src_port += 1);
            let astray = too_big(&astray, 28, "203.0.113.1".parse().unwrap());
            assert_eq!(bed.captured(&astray), BOUNCE);
            if kind == Kind::IcmpQuery {
                continue;
            }
            other(&|p| p.src_port += 1);
            assert_eq!(bed.returning(&with(&begins, |p| p.flags = ACK)), Ok(()));
            let error = too_big(&answer.build(), 28, MOVED.parse().unwrap());
            assert_eq!(bed.returning(&error), Ok(()), "an error about the answer");
            if kind == Kind::Tcp {
                // A client's, at a port of the old server.
                other(&|p| p.flags = SYN);
            }
        }
        let gre = Bed::settled(&[IN_PART]).allow(&["any"]);
        assert_eq!(gre.captured(&other(CLIENT, MOVED, GRE)), BOUNCE);
        assert_eq!(gre.returning(&other(MOVED, CLIENT, GRE)), Ok(()));
        assert_eq!(gre.captured(&other(CLIENT, MOVED, GRE)), CARRY);
        assert_eq!(gre.captured(&other(CLIENT, MOVED, GRE + 1)), BOUNCE);
    }

    #[test]
    fn from_a_port_that_has_not_moved_nobody_is_answered_and_only_what_is_named_begins() {
        let bed = Bed::settled(&[IN_PART]).allow(&["25/tcp"]);
        let tcp = outgoing(Kind::Tcp);
        assert_eq!(bed.returning(&tcp.build()), Ok(()));
        let elsewhere = with(&tcp, |p| p.dst_port = 26);
        let not_allowed = Err(DropReason::OutgoingNotAllowed);
        assert_eq!(bed.returning(&elsewhere), not_allowed);
        assert_eq!(bed.returning(&outgoing(Kind::Udp).build()), not_allowed);
        let to_own = with(&tcp, |p| p.dst = OWN.parse().unwrap());
        assert_eq!(bed.returning(&to_own), Err(DropReason::BadDestination));
        // A client of the old server's port 22.
        let mut asks = request(Kind::Tcp);
        (asks.src_port, asks.dst_port, asks.flags) = (25, 22, SYN);
        assert_eq!(bed.captured(&asks.build()), BOUNCE);
        for flags in [SYN | ACK, ACK, RST] {
            let answer = with(&reply(&asks), |p| p.flags = flags);
            assert_eq!(bed.returning(&answer), NOT_MOVED);
        }
        // What began goes to no client's port, and makes nobody a client.
        let to_moved = with(&reply(&tcp), |p| p.dst_port = 80);
        assert_eq!(bed.captured(&to_moved), CARRY);
        let mut udp = outgoing(Kind::Udp);
        udp.src_port = 5060;
        let bed = Bed::settled(&[IN_PART, "192.0.2.5:53/udp"]).allow(&["from:5060/udp"]);
        assert_eq!(bed.returning(&udp.build()), Ok(()));
        assert_eq!(bed.captured(&reply(&udp).build()), CARRY);
        let from_moved = with(&udp, |p| p.src_port = 53);
        assert_eq!(bed.returning(&from_moved), not_allowed);
    }

    #[test]
    fn what_began_before_a_restart_from_such_a_port_goes_on_if_it_is_named() {
        let ack = with(&outgoing(Kind::Tcp), |p| p.flags = ACK);
        let back = with(&reply(&outgoing(Kind::Tcp)), |p| p.flags = ACK);
        let udp = outgoing(Kind::Udp);
        for resumes in [false, true] {
            let bed = || Bed::started(&[IN_PART], resumes);
            // Whoever speaks first.
            assert_eq!(bed().allow(&["25/tcp"]).returning(&ack), Ok(()));
            assert_eq!(bed().allow(&["25/tcp"]).captured(&back), CARRY);
            assert_eq!(bed().allow(&["26/tcp"]).returning(&ack), NOT_MOVED);
            assert_eq!(bed().allow(&["26/tcp"]).captured(&back), BOUNCE);
            assert_eq!(bed().captured(&back), BOUNCE);
            let late = bed().later(TCP_ESTABLISHED).allow(&["any"]);
            assert_eq!(late.captured(&back), BOUNCE);
            let wanted = if resumes { CARRY } else { BOUNCE };
            let bed = bed().allow(&["25"]);
            // Of fragments the kernel takes those of the old server, too.
            let [first, _] = fragments(&reply(&udp).build(), 16, 3);
            assert_eq!(bed.captured(&first), BOUNCE);
            assert_eq!(bed.captured(&reply(&udp).build()), wanted);
        }
    }

    const TAKEN: Result<(), DropReason> = Err(DropReason::OutgoingTaken);
    const UNKNOWN: Result<Option<usize>, DropReason> = Err(DropReason::OutgoingUnknown);

    /// What the kernel keeps over a crash.
    #[derive(Debug, Default)]
    struct Kept(Mutex<Vec<(HostFlow, NonZeroU64)>>);

    impl Taken for Kept {
        fn has(&self, _: &HostFlow) -> bool {
            false
        }

        fn note(&self, _: &HostFlow) {}

        fn begun_by(&self, flow: &HostFlow) -> Option<NonZeroU64> {
            let kept = self.0.lock().unwrap();
            let found = kept.iter().rev().find(|(of, _)| of == flow);
            found.map(|&(_, by)| by)
        }

        fn note_begun(&self, flow: &HostFlow, by: NonZeroU64) {
            self.0.lock().unwrap().push((*flow, by));
        }
    }

    /// Two new servers at one address, each with a port of its own that has moved.
    struct Beside {
        gates: Vec<Arc<Gate>>,
        now: Instant,
    }

    impl Beside {
        /// Just started after a crash, each with what it may begin, and with what was kept.
        fn new(rules: [&[&str]; 2], kept: &Arc<Kept>) -> Self {
            let moves = [&["192.0.2.5:80/tcp"], &["192.0.2.5:443/tcp"]];
            let all: Vec<_> = moves.iter().map(|it| it[0].parse().unwrap()).collect();
            let all = Arc::new(Scopes::new(&all));
            let gates = (1..)
                .zip(moves.iter().zip(rules))
                .map(|(name, (moves, rules))| {
                    let gate = Bed::new(*moves).allow(rules).gate.among(Arc::clone(&all));
                    gate.set_taken(Arc::clone(kept) as Arc<dyn Taken>);
                    Arc::new(gate.beside_others(NonZeroU64::new(name).unwrap()))
                });
            Self {
                gates: gates.collect(),
                now: Bed::new(moves[0]).now,
            }
        }

        fn both_begin() -> Self {
            Self::new([&["any"], &["any"]], &Arc::default())
        }

        fn returning(&self, of: usize, bytes: &[u8]) -> Result<(), DropReason> {
            let parsed = Parsed::parse(bytes)?;
            self.gates[of].check_returning(self.now, &parsed, bytes, &self.gates)
        }

        fn whose(&self, bytes: &[u8]) -> Result<Option<usize>, DropReason> {
            whose(&self.gates, self.now, &Parsed::parse(bytes)?, bytes)
        }
    }

    #[test]
    fn answers_go_to_whichever_new_server_has_begun() {
        for by in [0, 1] {
            for kind in [Kind::Tcp, Kind::Udp, Kind::IcmpQuery] {
                let both = Beside::both_begin();
                let begins = outgoing(kind);
                let answer = reply(&begins);
                assert_eq!(both.returning(by, &begins.build()), Ok(()), "{kind:?}");
                for flags in [SYN | ACK, ACK, RST] {
                    let answer = with(&answer, |p| p.flags = flags);
                    assert_eq!(both.whose(&answer), Ok(Some(by)), "{kind:?} {flags}");
                }
                let error = too_big(&begins.build(), 28, "203.0.113.1".parse().unwrap());
                assert_eq!(both.whose(&error), Ok(Some(by)));
                // The other one begins it no more, and neither goes on with it.
                assert_eq!(both.returning(1 - by, &begins.build()), TAKEN);
                let goes_on = with(&begins, |p| p.flags = ACK);
                assert_eq!(both.returning(1 - by, &goes_on), TAKEN);
                assert_eq!(both.returning(by, &goes_on), Ok(()));
            }
            let both = Beside::both_begin();
            assert_eq!(both.returning(by, &other(MOVED, CLIENT, GRE)), Ok(()));
            assert_eq!(both.whose(&other(CLIENT, MOVED, GRE)), Ok(Some(by)));
            assert_eq!(both.returning(1 - by, &other(MOVED, CLIENT, GRE)), TAKEN);
        }
    }

    #[test]
    fn later_fragments_of_an_answer_follow_their_first_one() {
        for by in [0, 1] {
            let both = Beside::both_begin();
            let begins = outgoing(Kind::Udp);
            assert_eq!(both.returning(by, &begins.build()), Ok(()));
            let [first, second] = fragments(&reply(&begins).build(), 16, 3);
            // The same identification has just been the other one's.
            let parsed = Parsed::parse(&first).unwrap();
            let other = &both.gates[1 - by];
            other.ownership.carry_fragments(both.now, &parsed, &first);
            assert_eq!(both.whose(&first), Ok(Some(by)));
            let parsed = Parsed::parse(&second).unwrap();
            let taken = |gate: &Arc<Gate>| gate.check_moved(both.now, &parsed, &second) == CARRY;
            assert_eq!(both.gates.iter().position(taken), Some(by));
        }
    }

    #[test]
    fn after_a_crash_it_is_the_kernel_that_tells_who_had_begun() {
        let kept = Arc::default();
        let (begins, goes_on) = (outgoing(Kind::Tcp), |p: &mut Plan| p.flags = ACK);
        let before = Beside::new([&["any"], &["any"]], &kept);
        assert_eq!(before.returning(1, &begins.build()), Ok(()));
        let answer = with(&reply(&begins), |p| p.flags = SYN | ACK);
        assert_eq!(before.whose(&answer), Ok(Some(1)));
        let answer = with(&reply(&begins), goes_on);
        let after = || Beside::new([&["any"], &["any"]], &kept);
        assert_eq!(after().whose(&answer), Ok(Some(1)));
        assert_eq!(after().returning(0, &with(&begins, goes_on)), TAKEN);
        assert_eq!(after().returning(1, &with(&begins, goes_on)), Ok(()));
        // Where it does not tell, nobody takes it until one of them has spoken.
        let forgotten = Beside::both_begin();
        assert_eq!(forgotten.whose(&answer), UNKNOWN);
        assert_eq!(forgotten.returning(1, &with(&begins, goes_on)), Ok(()));
        assert_eq!(forgotten.whose(&answer), Ok(Some(1)));
        // Only one of them may have.
        for (rules, by) in [
            ([&["25/tcp"], &["26/tcp"]], Some(0)),
            ([&["26/tcp"], &["25/tcp"]], Some(1)),
            ([&["26/tcp"], &["26/tcp"]], None),
        ] {
            let one = Beside::new(rules.map(|it| &it[..]), &Arc::default());
            assert_eq!(one.whose(&answer), Ok(by));
        }
    }
}
