//! Clients' conversations that the new server's daemon itself turns away, so that nobody has to
//! guess why they are not answered.
//!
//! Owns a sample of the newest. A packet that is dropped is shown here, and once a second the
//! control task takes what there is, as it takes what becomes of conversations ([`watch`]). It is
//! bounded in places and in locks for a second: whoever floods the daemon with such packets pays
//! for each no more than the count of the drop.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Instant;

use crate::flow::lock;
use crate::flow::watch::{self, Fate, Observed};
use crate::model::asked::Asked;
use crate::model::drops::DropReason;
use crate::packet::Parsed;

/// Conversations that are followed at a time. One is enough to name the cause.
const MAX: usize = 64;

/// Packets that are looked at in a second. A client that is not answered sends four in 16 s.
const EACH_SECOND: u32 = 256;

/// A conversation that was turned away.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TurnedAway {
    /// It waits, as any that nobody answers.
    pub observed: Observed,
    /// Why.
    pub reason: DropReason,
}

/// The newest conversations that were turned away, of one peer.
#[derive(Default)]
pub(super) struct TurnedAways {
    /// Packets since the last look.
    seen: AtomicU32,
    samples: Mutex<Vec<Sample>>,
}

#[derive(Clone, Copy)]
struct Sample {
    client_port: u16,
    /// Its newest packet.
    used: Instant,
    turned: TurnedAway,
}

impl TurnedAways {
    /// A client's packet is dropped. `bytes` are as they came.
    #[cold]
    pub(super) fn note(&self, now: Instant, parsed: &Parsed, bytes: &[u8], reason: DropReason) {
        let Some((addr, protocol, port)) = watch::asked(parsed, parsed.dst(bytes)) else {
            return;
        };
        if self.seen.fetch_add(1, Relaxed) >= EACH_SECOND {
            return;
        }
        let addr = addr.into();
        let asked = Asked {
            addr,
            protocol,
            port,
        };
        let (client, client_port) = (parsed.src(bytes).into(), parsed.src_port());
        let mut samples = lock(&self.samples);
        let known = samples.iter_mut().find(|sample| {
            let observed = &sample.turned.observed;
            (observed.asked, observed.client, sample.client_port) == (asked, client, client_port)
        });
        if let Some(known) = known {
            known.used = now;
            known.turned.reason = reason;
        } else if samples.len() < MAX {
            let fate = Fate::Waiting { again: false };
            let observed = Observed {
                asked,
                client,
                opened: now,
                waited: now,
                fate,
            };
            samples.push(Sample {
                client_port,
                used: now,
                turned: TurnedAway { observed, reason },
            });
        }
    }

    /// Forgets them all: they were another peer's.
    pub(super) fn forget(&self) {
        self.seen.store(0, Relaxed);
        lock(&self.samples).clear();
    }

    /// Those that still wait. Call it every second.
    pub(super) fn take(&self, now: Instant) -> Vec<TurnedAway> {
        if self.seen.swap(0, Relaxed) == 0 && lock(&self.samples).is_empty() {
            return Vec::new();
        }
        let mut all = Vec::new();
        lock(&self.samples).retain_mut(|sample| {
            let observed = &mut sample.turned.observed;
            let again = sample.used.saturating_duration_since(observed.opened) >= watch::AGAIN;
            observed.fate = Fate::Waiting { again };
            all.push(sample.turned);
            sample.turned.observed.waited = now;
            now.saturating_duration_since(sample.turned.observed.opened) < watch::FOLLOWED
        });
        all
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::packet::testing::Plan;
    use crate::packet::{ACK, Kind, SYN};
    use crate::testing::epoch;

    fn note(turned: &TurnedAways, now: Instant, port: u16, flags: u8) {
        let mut plan = Plan::new(Kind::Tcp, "203.0.113.9", "192.0.2.5");
        plan.dst_port = port;
        plan.flags = flags;
        let bytes = plan.build();
        let parsed = Parsed::parse(&bytes).unwrap();
        turned.note(now, &parsed, &bytes, DropReason::MartianSource);
    }

    #[test]
    fn a_client_that_asks_again_is_followed_for_a_while() {
        let (turned, start) = (TurnedAways::default(), epoch());
        let at = |second| start + Duration::from_secs(second);
        note(&turned, start, 80, SYN);
        note(&turned, start, 80, ACK);
        let one = |all: Vec<TurnedAway>| {
            assert_eq!(all.len(), 1);
            all[0]
        };
        let first = one(turned.take(at(1)));
        assert_eq!(first.reason, DropReason::MartianSource);
        assert_eq!(first.observed.asked.to_string(), "192.0.2.5:80/tcp");
        assert_eq!(first.observed.fate, Fate::Waiting { again: false });
        assert_eq!(first.observed.waited, start, "it is new");
        note(&turned, at(1), 80, SYN);
        let second = one(turned.take(at(2)));
        assert_eq!(second.observed.fate, Fate::Waiting { again: true });
        assert_eq!(second.observed.waited, at(1));
        one(turned.take(at(16)));
        assert_eq!(turned.take(at(17)), []);
    }

    #[test]
    fn a_flood_is_bounded() {
        let (turned, now) = (TurnedAways::default(), epoch());
        for port in 1..10_000 {
            note(&turned, now, port, SYN);
        }
        assert_eq!(turned.take(now).len(), MAX);
    }
}
