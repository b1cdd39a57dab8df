//! The old server's gates as the settings want them, at the start and after each reload.
//!
//! Owns what a gate is told of the settings, in one place for both. What it knows of flows comes
//! from the gate that it takes the place of. Which modes the moves are in, what capture knows, and
//! this server's own addresses the control task tells.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Instant;

use crate::flow::gate::{Gate, GateConfig};
use crate::io::entropy;
use crate::model::moved::Move;
use crate::model::outgoing::AllowOutgoing;
use crate::model::scopes::Scopes;
use crate::settings::config::ClientLog;

/// What all gates of a daemon have in common.
pub(super) struct Gates {
    /// All that has moved, to whichever peer.
    pub(super) all: Arc<Scopes>,
    /// `--max-flows`.
    pub(super) max_flows: usize,
    /// Whether and how it is recorded who comes.
    pub(super) log: Option<ClientLog>,
    /// More than one peer may begin connections, so that gates need names.
    pub(super) several_begin: bool,
    /// When these settings come into force.
    pub(super) now: Instant,
}

/// What one peer's settings say of its gate.
pub(super) struct Part<'a> {
    /// What has moved to it.
    pub(super) moves: &'a [Move],
    /// What it may begin.
    pub(super) allow_outgoing: &'a [AllowOutgoing],
    /// The name of its key; `None` where there is no peer any more.
    pub(super) name: Option<NonZeroU64>,
}

/// What was there before a gate.
pub(super) enum Before<'a> {
    /// The daemon has just started. It `resumes` what a killed one had.
    Start {
        /// Whether it does.
        resumes: bool,
    },
    /// Another daemon handed itself over.
    Handed {
        /// What goes on with the clients of its gate.
        gate: Box<Gate>,
    },
    /// The peer is new. The gate of another one knows which addresses no client can have.
    NewPeer {
        /// The other one.
        beside: Option<&'a Gate>,
    },
    /// A gate by other settings.
    Gate {
        /// The gate.
        gate: &'a Gate,
        /// `--max-flows` by then.
        max_flows: usize,
        /// Whether and how it was recorded who comes.
        log: Option<ClientLog>,
    },
}

impl Gates {
    /// Makes one of them.
    pub(super) fn make(&self, part: &Part<'_>, before: Before<'_>) -> Gate {
        let fresh = |resumes| {
            let config = GateConfig {
                max_flows: self.max_flows,
                seed: entropy::seed(),
                started: self.now,
                resumes,
            };
            Gate::new(part.moves, config)
        };
        let (gate, recorded) = match before {
            Before::Start { resumes } => (fresh(resumes), None),
            Before::Handed { gate } => (*gate, None),
            Before::NewPeer { beside: None } => (fresh(false), None),
            Before::NewPeer {
                beside: Some(other),
            } => (fresh(false).among_addresses_of(other), None),
            Before::Gate {
                gate,
                max_flows,
                log,
            } => {
                let again = gate.again(part.moves);
                let again = match max_flows == self.max_flows {
                    true => again,
                    false => again.with_room(self.max_flows, self.now),
                };
                (again, log)
            }
        };
        let gate = gate
            .among(Arc::clone(&self.all))
            .allow_outgoing(part.allow_outgoing);
        // The kernel knows what it has begun by the name that it had first, also after another key.
        let name = part.name.filter(|_| self.several_begin && !gate.is_named());
        let gate = match name {
            Some(name) => gate.beside_others(name),
            None => gate,
        };
        match self.log {
            None => gate.noting_nobody(),
            Some(log) if recorded == Some(log) => gate,
            Some(log) => gate.noting_visits(log.names),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::class::TCP_ESTABLISHED;
    use crate::flow::ownership::Verdict;
    use crate::model::drops::DropReason;
    use crate::packet::testing::Plan;
    use crate::packet::{Kind, Parsed, SYN};
    use crate::testing::epoch;

    /// Also after another key, by which it would have another name.
    #[test]
    fn a_gate_that_is_taken_over_keeps_its_name() {
        let moves: [Move; 1] = ["192.0.2.5".parse().unwrap()];
        let (then, now) = (epoch(), epoch() + std::time::Duration::from_secs(9));
        let config = || GateConfig {
            max_flows: 100,
            seed: entropy::seed(),
            started: then,
            resumes: false,
        };
        for name in [NonZeroU64::new(7), None] {
            let before = Gate::new(&moves, config());
            let before = match name {
                Some(name) => before.beside_others(name),
                None => before,
            };
            let mut handed = Vec::new();
            before.put(now, &mut handed);
            let mut rest = &*handed;
            let config = GateConfig::taken_over(100, now, &mut rest).unwrap();
            assert_eq!(config.started, then);
            let after = Gate::new(&moves, config).take_up(&mut rest).unwrap();
            assert!(rest.is_empty());
            assert_eq!(after.is_named(), name.is_some());
            let mut again = Vec::new();
            after.put(now, &mut again);
            assert!(again == handed, "the same name");
        }
    }

    const MOVED: &str = "192.0.2.5";
    const CLIENT: &str = "203.0.113.9";

    fn common(max_flows: usize, log: Option<ClientLog>, several_begin: bool) -> Gates {
        Gates {
            all: Arc::new(Scopes::new(&[MOVED.parse().unwrap()])),
            max_flows,
            log,
            several_begin,
            now: epoch(),
        }
    }

    fn judged(gate: &Gate, begins: &Plan) -> Result<(), DropReason> {
        let bytes = begins.build();
        let parsed = Parsed::parse(&bytes)?;
        let now = epoch() + TCP_ESTABLISHED;
        match begins.src.to_string().as_str() {
            MOVED => gate.check_returning(now, &parsed, &bytes, &[]),
            _ => gate
                .check_captured(now, &parsed, &bytes)
                .map(|verdict| assert_eq!(verdict, Verdict::Carry)),
        }
    }

    /// Room, name, whether a connection that the new server begins is let out, and whether a client
    /// that comes is noted.
    fn shows(gate: &Gate) -> (u64, bool, Result<(), DropReason>, u64) {
        let begins = |src: &str, dst: &str| Plan {
            flags: SYN,
            ..Plan::new(Kind::Tcp, src, dst)
        };
        let out = judged(gate, &begins(MOVED, "203.0.113.77"));
        judged(gate, &begins(CLIENT, MOVED)).unwrap();
        (gate.stats().max, gate.is_named(), out, gate.settling())
    }

    #[test]
    fn after_a_reload_it_is_as_after_a_start_with_the_same_settings() {
        let log = |keep, names| Some(ClientLog { keep, names });
        let settings = [
            (common(1_000, None, false), "", None),
            (
                common(2_000, log(90, true), true),
                "any",
                NonZeroU64::new(7),
            ),
            (
                common(1_000, log(30, false), false),
                "25/tcp",
                NonZeroU64::new(7),
            ),
        ];
        let moves = [MOVED.parse().unwrap()];
        for (before, allows, name) in &settings {
            for (after, allow, next_name) in &settings {
                let rules = |text: &str| -> Vec<AllowOutgoing> {
                    let all = text.split(' ').filter(|it| !it.is_empty());
                    all.map(|it| it.parse().unwrap()).collect()
                };
                let (first, second) = (rules(allows), rules(allow));
                let part = |allow_outgoing, name| Part {
                    moves: &moves,
                    allow_outgoing,
                    name,
                };
                let started = before.make(&part(&first, *name), Before::Start { resumes: false });
                let reloaded = after.make(
                    &part(&second, *next_name),
                    Before::Gate {
                        gate: &started,
                        max_flows: before.max_flows,
                        log: before.log,
                    },
                );
                let again = part(&second, *next_name);
                let fresh = after.make(&again, Before::Start { resumes: false });
                let added = after.make(
                    &again,
                    Before::NewPeer {
                        beside: Some(&fresh),
                    },
                );
                let (mut expected, found) = (shows(&fresh), shows(&reloaded));
                assert_eq!(shows(&added), expected);
                // A name stays.
                expected.1 |= started.is_named();
                assert_eq!(found, expected);
            }
        }
    }
}
