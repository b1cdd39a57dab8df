//! What becomes of new conversations: which are answered, which refused, and which wait in vain.
//!
//! Owns a sample of the newest conversations. Whoever opens a flow shows it here, and once a second
//! the control task asks what the tables of flows say of those that were kept. So packets cost
//! nothing, and a new flow costs one addition; only the first few of each port in a second are
//! kept, which costs a lock.
//!
//! ```text
//! new flow ── opened() ──► slot of its port: one of the first of this second? ──► sample
//!                                                                                   │
//! control task ── take() ── asks the table of flows what was seen of it ◄───────────┘
//! ```
//!
//! ICMP queries are not watched: many hosts do not answer them, and nobody misses it.
//!
//! A scan of all ports must not hide what happens to those that serve. So a port that has answered
//! has places of its own, which others cannot take.

use std::net::IpAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::flow::class::Seen;
use crate::flow::lock;
use crate::flow::seed::Seed;
use crate::flow::turned::TurnedAway;
use crate::model::asked::Asked;
use crate::packet::{ACK, Addr, Family, Kind, Parsed, SYN};

/// Slots to which ports are spread: 16 KiB for each peer, and a thousand ports seldom share one.
const SLOTS: usize = 1_024;

/// Conversations of one slot that are kept in a second. Silence shows in a few, and a port that is
/// asked a thousand times a second is not worth a thousand locks.
const EACH_SECOND: u32 = 4;

/// Conversations that wait at a time, of ports that have answered before, and as many of others.
const MAX_WAITING: usize = 256;

/// So long a conversation is followed. A client that is not answered asks again after 1, 3, 7 and
/// 15 s (RFC 6298 section 2, and Linux's `tcp_syn_retries`).
pub(super) const FOLLOWED: Duration = Duration::from_secs(16);

/// A packet so long after the first one is a repeat.
pub(super) const AGAIN: Duration = Duration::from_millis(900);

/// What has become of a conversation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// The application's side has answered.
    Answered,
    /// It has refused: TCP RST, or an ICMP error "unreachable".
    Refused,
    /// Nothing came back yet.
    Waiting {
        /// The client has asked again.
        again: bool,
    },
}

/// A conversation, as it stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Observed {
    /// What the client asked for.
    pub asked: Asked,
    /// The client.
    pub client: IpAddr,
    /// When it asked first.
    pub opened: Instant,
    /// When it was last seen to wait, or else when it was opened.
    pub waited: Instant,
    /// What has become of it.
    pub fate: Fate,
}

/// What was seen since the last time.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Observations {
    /// The conversations that are followed, each until it is answered.
    pub some: Vec<Observed>,
    /// Those that this server's daemon itself turned away (new server).
    pub turned: Vec<TurnedAway>,
    /// How many new conversations there were, whether they are followed or not.
    pub opened: u64,
}

/// The sample of the newest conversations. `K` is how the table of flows names a flow.
pub(super) struct Watch<K> {
    seed: Seed,
    slots: Box<[Slot]>,
    /// Something was opened since the last look.
    news: AtomicBool,
    samples: Mutex<Vec<Sample<K>>>,
}

/// The ports that fall to one place.
#[derive(Default)]
struct Slot {
    /// Conversations since the last look.
    opened: AtomicU32,
    /// The hash of one of them that has answered at some time, or zero.
    serves: AtomicU64,
    /// Conversations with that one among them.
    with_it: AtomicU32,
}

/// A conversation that is followed.
#[derive(Clone, Copy)]
struct Sample<K> {
    key: K,
    /// Of what is asked for.
    hash: u64,
    serves: bool,
    refused: bool,
    observed: Observed,
}

/// What a table of flows says of a conversation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Noted {
    /// What was seen of it.
    pub(super) seen: Seen,
    /// Its protocol.
    pub(super) protocol: u8,
    /// When its last packet came, as exactly as the table knows.
    pub(super) used: Instant,
}

impl<K: Copy> Watch<K> {
    /// Nothing was seen yet.
    pub(super) fn new(seed: Seed) -> Self {
        Self {
            seed,
            slots: (0..SLOTS).map(|_| Slot::default()).collect(),
            news: AtomicBool::new(false),
            samples: Mutex::new(Vec::new()),
        }
    }

    /// A client's packet has opened a flow.
    #[cold]
    pub(super) fn opened(&self, now: Instant, asked: (Addr, u8, u16), client: Addr, key: K) {
        let (addr, protocol, port) = asked;
        let hash = self.seed.client_flow(addr, port.into(), protocol) | 1 << 63;
        let slot = self.slot(hash);
        let mut before = slot.opened.fetch_add(1, Relaxed);
        let serves = slot.serves.load(Relaxed) == hash;
        if serves {
            before = slot.with_it.fetch_add(1, Relaxed);
        }
        if !self.news.load(Relaxed) {
            self.news.store(true, Relaxed);
        }
        if before >= EACH_SECOND {
            return;
        }
        let mut samples = lock(&self.samples);
        let alike = samples.iter().filter(|sample| sample.serves == serves);
        if alike.count() >= MAX_WAITING {
            return;
        }
        let addr = addr.into();
        samples.push(Sample {
            key,
            hash,
            serves,
            refused: false,
            observed: Observed {
                asked: Asked {
                    addr,
                    protocol,
                    port,
                },
                client: client.into(),
                opened: now,
                waited: now,
                fate: Fate::Waiting { again: false },
            },
        });
    }

    /// An ICMP error about a client's packet goes to the client. If it says that nothing is there,
    /// the conversation with this key was refused.
    #[cold]
    pub(super) fn error(&self, parsed: &Parsed, bytes: &[u8], is_it: impl Fn(&K) -> bool) {
        if says_unreachable(parsed, bytes) {
            let mut samples = lock(&self.samples);
            if let Some(sample) = samples.iter_mut().find(|sample| is_it(&sample.key)) {
                sample.refused = true;
            }
        }
    }

    /// What was seen since the last time. `noted` asks the table of flows. Call it every second.
    pub(super) fn take(
        &self,
        now: Instant,
        mut noted: impl FnMut(&K) -> Option<Noted>,
    ) -> Observations {
        let mut all = Observations::default();
        if self.news.swap(false, Relaxed) {
            for slot in &self.slots {
                all.opened += u64::from(slot.opened.swap(0, Relaxed));
                slot.with_it.store(0, Relaxed);
            }
        }
        lock(&self.samples).retain_mut(|sample| {
            // The flow had to make space for another, or its time was up.
            let Some(noted) = noted(&sample.key) else {
                return false;
            };
            let observed = &mut sample.observed;
            let age = now.saturating_duration_since(observed.opened);
            observed.fate = match noted.seen.answer(noted.protocol) {
                _ if sample.refused => Fate::Refused,
                Some(true) => Fate::Answered,
                Some(false) => Fate::Refused,
                None => Fate::Waiting {
                    again: noted.used.saturating_duration_since(observed.opened) >= AGAIN,
                },
            };
            all.some.push(*observed);
            match observed.fate {
                Fate::Answered => self.slot(sample.hash).serves.store(sample.hash, Relaxed),
                Fate::Refused => {}
                Fate::Waiting { .. } => observed.waited = now,
            }
            matches!(observed.fate, Fate::Waiting { .. }) && age < FOLLOWED
        });
        all
    }

    /// Forgets them all, and which ports have answered: they were another peer's.
    pub(super) fn forget(&self) {
        for slot in &self.slots {
            slot.opened.store(0, Relaxed);
            slot.serves.store(0, Relaxed);
            slot.with_it.store(0, Relaxed);
        }
        self.news.store(false, Relaxed);
        lock(&self.samples).clear();
    }

    fn slot(&self, hash: u64) -> &Slot {
        &self.slots[hash as usize % SLOTS]
    }
}

impl<K> std::fmt::Debug for Watch<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Watch(..)")
    }
}

/// What a packet that opens a flow asks for; `None` if nobody misses the answer.
pub(super) fn asked(parsed: &Parsed, moved: Addr) -> Option<(Addr, u8, u16)> {
    let port = match parsed.kind() {
        Kind::Tcp if parsed.tcp_flags() & (SYN | ACK) != SYN => return None,
        Kind::Tcp | Kind::Udp => parsed.dst_port(),
        Kind::Other => 0,
        Kind::IcmpQuery | Kind::IcmpReply | Kind::IcmpError | Kind::LaterFragment => return None,
    };
    Some((moved, parsed.protocol(), port))
}

/// Whether an ICMP error says that a host, a port or a protocol is not there, or not allowed.
pub(super) fn says_unreachable(parsed: &Parsed, bytes: &[u8]) -> bool {
    let Some(&[kind, code]) = bytes.get(parsed.l4()..).and_then(<[u8]>::first_chunk) else {
        return false;
    };
    match parsed.family() {
        // Not "fragmentation needed".
        Family::V4 => kind == 3 && code != 4,
        Family::V6 => kind == 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::class::Side;
    use crate::model::moved::{TCP, UDP};
    use crate::packet::RST;
    use crate::packet::testing::{Plan, reply, too_big};
    use crate::testing::epoch;

    fn watch() -> Watch<u32> {
        Watch::new(Seed::new([1, 2]))
    }

    fn addr(text: &str) -> Addr {
        Addr::from(text.parse::<IpAddr>().unwrap())
    }

    fn open(watch: &Watch<u32>, now: Instant, port: u16, key: u32) {
        let asked = (addr("192.0.2.5"), TCP, port);
        watch.opened(now, asked, addr("203.0.113.9"), key);
    }

    fn noted(seen: Seen, used: Instant) -> Option<Noted> {
        Some(Noted {
            seen,
            protocol: TCP,
            used,
        })
    }

    fn asked_once() -> Seen {
        Seen::default().after(TCP, Side::Client, SYN)
    }

    fn answered() -> Seen {
        asked_once().after(TCP, Side::Application, SYN | ACK)
    }

    #[test]
    fn a_conversation_is_followed_until_it_is_answered() {
        let (watch, start) = (watch(), epoch());
        open(&watch, start, 80, 7);
        let at = |second| start + Duration::from_secs(second);
        let one = |all: Observations| {
            assert_eq!(all.some.len(), 1);
            all.some[0]
        };
        let first = one(watch.take(at(1), |_| noted(asked_once(), start)));
        assert_eq!(first.fate, Fate::Waiting { again: false });
        assert_eq!(first.asked.to_string(), "192.0.2.5:80/tcp");
        let second = one(watch.take(at(2), |_| noted(asked_once(), at(1))));
        assert_eq!(second.fate, Fate::Waiting { again: true });
        let third = one(watch.take(at(3), |_| noted(answered(), at(3))));
        assert_eq!(third.fate, Fate::Answered);
        assert_eq!((third.opened, third.waited), (start, at(2)));
        assert!(
            watch
                .take(at(4), |_| noted(answered(), at(3)))
                .some
                .is_empty()
        );
    }

    #[test]
    fn what_nobody_answers_is_followed_for_a_while_and_what_is_forgotten_is_not() {
        let (watch, start) = (watch(), epoch());
        open(&watch, start, 80, 1);
        open(&watch, start, 80, 2);
        let look = |second| {
            let now = start + Duration::from_secs(second);
            let still = |key: &u32| (*key == 1).then(|| noted(asked_once(), start)).flatten();
            watch.take(now, still).some.len()
        };
        assert_eq!([look(1), look(15), look(16), look(17)], [1, 1, 1, 0]);
    }

    #[test]
    fn a_refusal_is_a_reset_or_an_icmp_error() {
        let (watch, now) = (watch(), epoch());
        for key in 0..4 {
            open(&watch, now, 80, key);
        }
        let reset = asked_once().after(TCP, Side::Application, RST | ACK);
        // Of a scan: the client itself sends the reset.
        let scanned = answered().after(TCP, Side::Client, RST);
        let request = Plan::new(Kind::Tcp, "203.0.113.9", "192.0.2.5");
        let (answer, router) = (reply(&request).build(), "192.0.2.254".parse().unwrap());
        let mut error = too_big(&answer, answer.len(), router);
        let parsed = Parsed::parse(&error).unwrap();
        watch.error(&parsed, &error, |&key| key == 3);
        let l4 = parsed.l4();
        error[l4 + 1] = 3;
        watch.error(&parsed, &error, |&key| key == 2);
        let seen = [reset, scanned, asked_once(), asked_once()];
        let all = watch.take(now, |&key| noted(seen[key as usize], now));
        let fates: Vec<Fate> = all.some.iter().map(|observed| observed.fate).collect();
        let waits = Fate::Waiting { again: false };
        assert_eq!(fates[0], Fate::Refused);
        assert_eq!(fates[2..], [Fate::Refused, waits]);
        assert_eq!(all.opened, 4);
    }

    #[test]
    fn a_scan_takes_no_place_of_a_port_that_serves() {
        let (watch, start) = (watch(), epoch());
        open(&watch, start, 80, 0);
        watch.take(start, |_| noted(answered(), start));
        for port in 1_000..60_000 {
            open(&watch, start, port, u32::from(port));
        }
        open(&watch, start, 80, 80);
        let all = watch.take(start, |_| noted(asked_once(), start));
        assert!(all.some.iter().any(|observed| observed.asked.port == 80));
        assert!(all.some.len() <= 2 * MAX_WAITING);
        assert_eq!(all.opened, 59_001);
    }

    #[test]
    fn a_busy_port_costs_a_few_locks_a_second() {
        let (watch, now) = (watch(), epoch());
        for key in 0..10_000 {
            open(&watch, now, 80, key);
        }
        let all = watch.take(now, |_| noted(asked_once(), now));
        assert_eq!((all.some.len(), all.opened), (EACH_SECOND as usize, 10_000));
        let of_udp = Seen::default().after(UDP, Side::Client, 0);
        assert_eq!(of_udp.answer(UDP), None);
        let both = of_udp.after(UDP, Side::Application, 0);
        assert_eq!(both.answer(UDP), Some(true));
    }
}
