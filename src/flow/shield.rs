//! Refusals that are kept from clients while a cut-over is watched, on the old server.
//!
//! The new server may refuse the first clients that it is given: its application is not there yet,
//! or a firewall says no. Whoever changes servers wants to know that, and to go back; a client that
//! was told "connection refused" would not try again. So for that time a refusal goes no further
//! than the [gate](super::gate). To the client its packet is one that was lost: it, or the
//! [hold](super::hold) for it, sends that again, to whoever serves then.
//!
//! Owns until when each move is shielded. That is seldom the case, so packets ask nothing but one
//! flag, and only those do that may refuse something.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Instant;

use arc_swap::ArcSwap;

/// Until when the clients of each move are told of no refusal.
#[derive(Debug, Default)]
pub(super) struct Shields {
    some: AtomicBool,
    until: ArcSwap<Vec<Option<Instant>>>,
}

impl Shields {
    /// From now on the moves are shielded until then, in their order.
    pub(super) fn set(&self, until: &[Option<Instant>]) {
        let some = until.iter().any(Option::is_some);
        self.until.store(until.to_vec().into());
        self.some.store(some, Relaxed);
    }

    /// Whether there may be a shield at all.
    #[inline]
    pub(super) fn apply(&self) -> bool {
        self.some.load(Relaxed)
    }

    /// Whether a move of that number is shielded.
    pub(super) fn cover(&self, now: Instant, number: Option<usize>) -> bool {
        let until = self.until.load();
        let until = number.and_then(|number| until.get(number).copied().flatten());
        until.is_some_and(|until| now < until)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::flow::gate::{Gate, GateConfig};
    use crate::flow::hold::Awaits;
    use crate::flow::ownership::Verdict;
    use crate::flow::seed::Seed;
    use crate::flow::watch::Fate;
    use crate::model::drops::DropReason;
    use crate::packet::testing::{Plan, reply, too_big};
    use crate::packet::{ACK, Kind, Parsed, RST, SYN};
    use crate::testing::epoch;

    const WITHHELD: Result<(), DropReason> = Err(DropReason::RefusalWithheld);

    struct Bed {
        gate: Gate,
        now: Instant,
    }

    impl Bed {
        /// Two moves, of which the first is shielded for ten seconds.
        fn new() -> Self {
            let moves = ["192.0.2.5:80", "192.0.2.5:81"].map(|it| it.parse().unwrap());
            let config = GateConfig {
                max_flows: 1_000,
                seed: Seed::new([1, 2]),
                started: epoch(),
                resumes: false,
            };
            let (gate, now) = (
                Gate::new(&moves, config),
                epoch() + Duration::from_secs(9_000),
            );
            gate.set_shields(&[Some(now + Duration::from_secs(10)), None]);
            Self { gate, now }
        }

        fn asks(&self, plan: &Plan) {
            let bytes = plan.build();
            let parsed = Parsed::parse(&bytes).unwrap();
            let said = self.gate.check_captured(self.now, &parsed, &bytes);
            assert_eq!(said, Ok(Verdict::Carry));
        }

        fn says(&self, bytes: &[u8]) -> Result<(), DropReason> {
            let parsed = Parsed::parse(bytes).unwrap();
            self.gate.check_returning(self.now, &parsed, bytes, &[])
        }

        fn awaits(&self, plan: &Plan) -> Awaits {
            let bytes = plan.build();
            let parsed = Parsed::parse(&bytes).unwrap();
            self.gate.awaits_answer(self.now, &parsed, &bytes)
        }

        /// What the watch sees of the conversations since the last time.
        fn fates(&self) -> Vec<Fate> {
            let seen = self.gate.observe(self.now).some.into_iter();
            seen.map(|it| it.fate).collect()
        }
    }

    fn asks(kind: Kind, port: u16) -> Plan {
        Plan {
            dst_port: port,
            flags: SYN,
            ..Plan::new(kind, "203.0.113.9", "192.0.2.5")
        }
    }

    /// That nobody is there for it.
    fn unreachable(about: &Plan) -> Vec<u8> {
        let about = about.build();
        let mut error = too_big(&about, about.len(), "192.0.2.5".parse().unwrap());
        // Type 3, code 3 (RFC 792), in place of code 4.
        error[21] = 3;
        error
    }

    fn answer(plan: &Plan, flags: u8) -> Vec<u8> {
        Plan {
            flags,
            ..reply(plan)
        }
        .build()
    }

    #[test]
    fn a_refusal_is_seen_and_goes_no_further_until_the_client_is_answered() {
        let bed = Bed::new();
        let client = asks(Kind::Tcp, 80);
        bed.asks(&client);
        assert_eq!(bed.awaits(&client), Awaits::Chance);
        // As often as it is refused, and also twice for one SYN.
        for _ in 0..3 {
            for _ in 0..2 {
                assert_eq!(bed.says(&answer(&client, RST | ACK)), WITHHELD);
                assert_eq!(bed.awaits(&client), Awaits::Chance);
            }
            assert_eq!(bed.fates(), [Fate::Refused]);
            bed.asks(&client);
        }
        assert_eq!(bed.says(&answer(&client, SYN | ACK)), Ok(()));
        assert_eq!(bed.fates(), [Fate::Answered], "which is watched anew");
        assert_eq!(bed.awaits(&client), Awaits::Nothing);
        // A connection that is there may be reset.
        bed.asks(&Plan {
            flags: ACK,
            ..client.clone()
        });
        assert_eq!(bed.says(&answer(&client, RST)), Ok(()));
    }

    #[test]
    fn errors_that_say_the_same_go_no_further_either() {
        for kind in [Kind::Tcp, Kind::Udp] {
            let mut bed = Bed::new();
            let client = asks(kind, 80);
            bed.asks(&client);
            assert_eq!(bed.says(&unreachable(&client)), WITHHELD, "{kind:?}");
            assert_eq!(bed.fates(), [Fate::Refused, Fate::Waiting { again: false }]);
            assert_eq!(bed.says(&answer(&client, SYN | ACK)), Ok(()));
            assert_eq!(bed.fates(), [Fate::Answered]);
            // About what is answered, and later, it is told.
            assert_eq!(bed.says(&unreachable(&client)), Ok(()));
            bed.now += Duration::from_secs(10);
            let client = asks(kind, 80);
            bed.asks(&client);
            assert_eq!(bed.says(&unreachable(&client)), Ok(()));
        }
    }

    #[test]
    fn other_moves_and_other_times_are_refused_as_ever() {
        let mut bed = Bed::new();
        let other = asks(Kind::Tcp, 81);
        bed.asks(&other);
        assert_eq!(bed.says(&answer(&other, RST | ACK)), Ok(()));
        assert_eq!(bed.awaits(&other), Awaits::Nothing);
        bed.now += Duration::from_secs(10);
        let late = asks(Kind::Tcp, 80);
        bed.asks(&late);
        assert_eq!(bed.says(&answer(&late, RST | ACK)), Ok(()));
        assert_eq!(bed.awaits(&late), Awaits::Nothing);
    }
}
