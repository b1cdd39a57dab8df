//! The largest datagram that the path to a peer carries. Probes find it, and follow it for as long
//! as the tunnel runs, without any ICMP (RFC 8899, Datagram Packetization Layer PMTU Discovery).
//!
//! Anybody can send an ICMP error in a router's name, so what it says is a hint: it makes us ask at
//! once whether the size in use still passes, and which size to try first if it does not. Nothing
//! but a probe changes the result (RFC 8899, sections 4.6.1 and 4.6.2).
//!
//! Owns the search and nothing else: the tunnel makes and seals the probes, and reports which of
//! them arrived. Reads no clock. A size is that of a whole datagram as UDP carries it, including
//! header and tag.
//!
//! ```text
//!          probe arrives: raise the floor      a probe of the current size is lost three times
//!           ┌───────┐                            while the peer is heard: black hole
//!           ▼       │      nothing between             │
//!  start ─► Searching ──────────────────────► Settled ─┘──► Searching from the base
//!           ▲       │    floor and ceiling      │
//!           └───────┘                           └─ every ten minutes: Searching for more
//!          lost three times: lower the ceiling
//! ```

use std::time::{Duration, Instant};

/// Where the search starts: every path that IPv6 may use carries 1,280 bytes (RFC 8200, section 5),
/// and a UDP payload of 1,200 leaves space for the headers (RFC 8899, section 5.1.2).
pub const BASE: u16 = 1_200;

/// The size that is assumed to pass even if the base does not: the 576 bytes that every IPv4 host
/// takes, less the largest IPv4 header and the UDP header (RFC 1122, section 3.3.2).
const FLOOR: u16 = 508;

/// Probes of one size before the size is given up (RFC 8899, section 5.1.2: MAX_PROBES).
const MAX_PROBES: u32 = 3;

/// How many times in a row we ask a silent peer whether it is there. On a path that loses every
/// fourth datagram, two of a hundred peers that are there stay silent that often. Other timers find
/// out that a peer is gone.
const MAX_ASKED: u32 = 5;

/// How long to wait for a probe while the round trip time is not known: the least that RFC 8899,
/// section 5.1.1 allows in that case.
const PROBE_TIMER: Duration = Duration::from_secs(1);

/// How many round trips to wait for a probe once the round trip time is known (RFC 8899, section
/// 5.1.1 lets the timer be derived from it).
const PROBE_ROUND_TRIPS: u32 = 4;

/// The least time to wait for a probe: as long as TCP waits at least (RFC 6298 as Linux has it),
/// for the peer may be busy.
const MIN_PROBE_TIMER: Duration = Duration::from_millis(200);

/// The most time to wait for a probe: a second more than the longest round trip that a tunnel has
/// to bear.
const MAX_PROBE_TIMER: Duration = Duration::from_secs(5);

/// How often the current size is confirmed while no packets are carried.
const CONFIRMATION_TIMER: Duration = Duration::from_secs(5);

/// How often the current size is confirmed while packets are carried. If the path narrows silently,
/// this time and three probes pass before it is noticed, so TCP inside the tunnel loses a few
/// seconds.
const BUSY_CONFIRMATION_TIMER: Duration = Duration::from_secs(1);

/// How often a larger size is tried (RFC 8899, section 5.1.1).
const RAISE_TIMER: Duration = Duration::from_secs(600);

/// How often a hint may make us ask. Whoever forges ICMP errors all the time has the size in use
/// confirmed as often as when packets are carried, and no more often.
const HINT_TIMER: Duration = BUSY_CONFIRMATION_TIMER;

/// How close the search comes to the largest size. Half a per cent more is not worth another probe.
const GRANULARITY: u16 = 8;

/// The discovery of one path's MTU. See the module.
#[derive(Debug)]
pub struct MtuDiscovery {
    /// The largest datagram that the uplink takes.
    limit: u16,
    /// The largest datagram that is known to pass.
    current: u16,
    phase: Phase,
    /// The probe whose arrival we wait for.
    probe: Option<Probe>,
    /// When [`Self::poll`] has something to do.
    next: Instant,
    /// How long to wait for a probe.
    timer: Duration,
    /// When the current size was last confirmed, or chosen without a probe.
    confirmed: Instant,
    /// The size that an ICMP error said, as long as the kernel remembers it.
    hint: Option<u16>,
    /// Whether the search has yet to try the hint.
    hint_untried: bool,
    /// The next probe is one of the current size, since the hint is smaller.
    doubted: bool,
    /// When a hint may cast doubt again.
    next_hint: Instant,
    hints: Hints,
}

/// How many ICMP errors said that less than the size in use passes, as far as the kernel's route to
/// the peer showed them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Hints {
    /// Times that such an error made us ask.
    pub asked: u64,
    /// Times that the size in use passed nevertheless.
    pub refuted: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// The size lies between the current one and `ceiling`, which did not pass or is one above the
    /// limit.
    Searching {
        ceiling: u16,
        /// The first guess, that the path carries as much as the uplink takes, was tried: go on by
        /// halves.
        guessed: bool,
    },
    /// The current size is kept until `raise`; then a larger one is tried.
    Settled { raise: Instant },
}

#[derive(Debug)]
struct Probe {
    size: u16,
    sent: Instant,
    /// How many times it was lost although the peer was heard in the meantime.
    lost: u32,
    /// How many times in a row the peer was silent after it was sent.
    silent: u32,
    /// Whether it asks because of a hint.
    hinted: bool,
}

impl MtuDiscovery {
    /// Searches up to `limit`, the largest datagram that the uplink takes.
    pub fn new(limit: u16, now: Instant) -> Self {
        let limit = limit.max(FLOOR);
        Self {
            limit,
            current: BASE.min(limit),
            phase: Phase::Searching {
                ceiling: limit.saturating_add(1),
                guessed: false,
            },
            probe: None,
            next: now,
            timer: PROBE_TIMER,
            confirmed: now,
            hint: None,
            hint_untried: false,
            doubted: false,
            next_hint: now,
            hints: Hints::default(),
        }
    }

    /// The largest size that is known to pass.
    pub fn current(&self) -> u16 {
        self.current
    }

    /// When [`poll`](Self::poll) has something to do.
    pub fn next_timeout(&self) -> Instant {
        self.next
    }

    /// Takes note of the last round trip time.
    pub fn set_rtt(&mut self, rtt: Duration) {
        let timer = rtt.saturating_mul(PROBE_ROUND_TRIPS);
        self.timer = timer.clamp(MIN_PROBE_TIMER, MAX_PROBE_TIMER);
    }

    /// Whether a probe is out that had to be sent again, or that a hint made us send. Then it is
    /// worth asking whether the peer is there at all.
    pub fn is_doubtful(&self) -> bool {
        let doubtful = |probe: &Probe| probe.hinted || probe.lost + probe.silent > 0;
        let probe = self.probe.as_ref();
        probe.is_some_and(|probe| doubtful(probe) && probe.silent <= MAX_ASKED)
    }

    /// What came of hints.
    pub fn hints(&self) -> Hints {
        self.hints
    }

    /// Another daemon has found that datagrams of this size pass: the search goes on above it.
    pub fn go_on_at(&mut self, size: u16) {
        self.limit = self.limit.max(size);
        self.current = size;
        if let Phase::Searching { ceiling, .. } = &mut self.phase {
            *ceiling = self.limit.saturating_add(1);
        }
    }

    /// Starts over, since datagrams take another path now.
    pub fn restart(&mut self, now: Instant) {
        *self = Self {
            next_hint: self.next_hint,
            hints: self.hints,
            ..Self::new(self.limit, now)
        };
    }

    /// An ICMP error said that the path takes datagrams of this size and no larger ones, or the
    /// kernel has forgotten that. It may be called with the same hint as often as one likes.
    pub fn set_hint(&mut self, now: Instant, hint: Option<u16>) {
        let hint = hint.map(|hint| hint.max(FLOOR));
        if hint == self.hint {
            return;
        }
        self.hint = hint;
        self.hint_untried = true;
        let smaller = hint.is_some_and(|hint| hint < self.current);
        if smaller && now >= self.next_hint {
            self.next_hint = now + HINT_TIMER;
            self.hints.asked += 1;
            self.doubted = true;
            if self.probe.is_none() {
                self.next = now;
            }
        }
    }

    /// The uplink takes larger or smaller datagrams than before.
    pub fn set_limit(&mut self, now: Instant, limit: u16) {
        self.limit = limit.max(FLOOR);
        self.current = self.current.min(self.limit);
        self.search_below(now, self.limit.saturating_add(1), false);
    }

    /// A probe of this size arrived.
    pub fn acked(&mut self, now: Instant, size: u16) {
        if let Some(probe) = self.probe.take_if(|probe| probe.size == size) {
            self.current = self.current.max(size);
            self.next = match self.phase {
                Phase::Settled { .. } if !self.doubted => now + BUSY_CONFIRMATION_TIMER,
                Phase::Searching { .. } | Phase::Settled { .. } => now,
            };
            self.confirmed = now;
            self.hints.refuted += u64::from(probe.hinted);
        }
    }

    /// The kernel refused to send a datagram of this length, since it is too large for the uplink.
    pub fn refused(&mut self, now: Instant, length: usize) {
        let ours = |probe: &mut Probe| usize::from(probe.size) == length;
        if let Some(probe) = self.probe.take_if(ours) {
            self.does_not_pass(now, probe.size);
        }
    }

    /// The size of the probe that is due now, if one is.
    ///
    /// `heard` is when the peer was last heard: a probe that is lost while the peer is silent tells
    /// nothing about its size. `carried` is when a packet was last carried.
    pub fn poll(
        &mut self,
        now: Instant,
        heard: Option<Instant>,
        carried: Option<Instant>,
    ) -> Option<u16> {
        if now < self.next {
            return None;
        }
        if let Some(probe) = &mut self.probe {
            let alive = heard.is_some_and(|heard| heard > probe.sent);
            if alive {
                (probe.lost, probe.silent) = (probe.lost + 1, 0);
            } else {
                probe.silent = probe.silent.saturating_add(1);
            }
            if probe.lost < MAX_PROBES {
                probe.sent = now;
                let backed_off = PROBE_TIMER.min(self.timer * probe.silent.min(MAX_ASKED));
                self.next = now + self.timer.max(backed_off);
                return Some(probe.size);
            }
            let size = probe.size;
            self.probe = None;
            self.does_not_pass(now, size);
        }
        let busy = carried.is_some_and(|carried| carried > self.confirmed);
        let settled = matches!(self.phase, Phase::Settled { .. });
        if settled && !busy && !self.doubted && now < self.confirmed + CONFIRMATION_TIMER {
            self.next = now + BUSY_CONFIRMATION_TIMER;
            return None;
        }
        let hinted = std::mem::take(&mut self.doubted);
        let size = if hinted {
            self.current
        } else {
            self.choose(now)?
        };
        self.probe = Some(Probe {
            size,
            sent: now,
            lost: 0,
            silent: 0,
            hinted,
        });
        self.next = now + self.timer;
        Some(size)
    }

    fn choose(&mut self, now: Instant) -> Option<u16> {
        let untried = std::mem::take(&mut self.hint_untried);
        let hint = self.hint.filter(|_| untried);
        let current = self.current;
        match (self.phase, hint) {
            (Phase::Searching { ceiling, .. }, Some(hint)) if current < hint && hint < ceiling => {
                return Some(hint);
            }
            _ => {}
        }
        match self.phase {
            Phase::Searching {
                ceiling,
                guessed: false,
            } if ceiling > self.current + 1 => {
                self.phase = Phase::Searching {
                    ceiling,
                    guessed: true,
                };
                Some(ceiling - 1)
            }
            Phase::Searching { ceiling, .. } if ceiling - self.current > GRANULARITY => {
                Some(self.current + (ceiling - self.current) / 2)
            }
            Phase::Searching { .. } => {
                let raise = now + RAISE_TIMER;
                self.phase = Phase::Settled { raise };
                self.confirmed = now;
                self.next = now + BUSY_CONFIRMATION_TIMER;
                None
            }
            Phase::Settled { raise } if now >= raise && self.current < self.limit => {
                self.search_below(now, self.limit.saturating_add(1), false);
                self.choose(now)
            }
            Phase::Settled { .. } => Some(self.current),
        }
    }

    fn does_not_pass(&mut self, now: Instant, size: u16) {
        if size > self.current {
            self.search_below(now, size, true);
            return;
        }
        // A black hole: the size that used to pass no longer does.
        let safe = if self.current > BASE { BASE } else { FLOOR };
        if self.current > safe {
            self.current = safe;
            self.search_below(now, size, true);
            // If the hint was right so far, the safe size may be too large as well.
            self.doubted = self.hint.is_some_and(|hint| hint < safe);
            self.hints.asked += u64::from(self.doubted);
        } else {
            self.next = now + CONFIRMATION_TIMER;
        }
    }

    fn search_below(&mut self, now: Instant, ceiling: u16, guessed: bool) {
        self.phase = Phase::Searching { ceiling, guessed };
        self.hint_untried = true;
        self.probe = None;
        self.next = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::epoch;
    use proptest::prelude::*;

    /// Runs a search over a path that carries `carries` and also loses every `nth` probe.
    fn run(
        search: &mut MtuDiscovery,
        mut now: Instant,
        time: Duration,
        carries: u16,
        nth: u32,
    ) -> Instant {
        let end = now + time;
        let mut sent = 0;
        loop {
            now = search.next_timeout().max(now);
            if now > end {
                return end;
            }
            let Some(size) = search.poll(now, Some(now), None) else {
                continue;
            };
            sent += 1;
            if size <= carries && (nth == 0 || sent % nth != 0) {
                now += Duration::from_millis(30);
                search.acked(now, size);
            }
        }
    }

    #[test]
    fn the_limit_is_tried_first() {
        let now = epoch();
        let mut search = MtuDiscovery::new(1_472, now);
        assert_eq!(search.current(), BASE);
        assert_eq!(search.poll(now, None, None), Some(1_472));
        search.acked(now, 1_471);
        assert_eq!(search.current(), BASE, "no such probe is out");
        search.acked(now, 1_472);
        assert_eq!(search.current(), 1_472);
        assert_eq!(search.poll(now, None, None), None);
        assert_eq!(search.next_timeout(), now + BUSY_CONFIRMATION_TIMER);
    }

    /// When the size is next confirmed, if packets are carried all the time or never.
    fn confirmed_after(carried: bool) -> Duration {
        let start = epoch();
        let mut search = MtuDiscovery::new(1_472, start);
        run(&mut search, start, Duration::ZERO, 1_472, 0);
        let mut now = start;
        loop {
            now = search.next_timeout().max(now);
            if search
                .poll(now, Some(now), carried.then_some(now))
                .is_some()
            {
                return now - start;
            }
        }
    }

    #[test]
    fn a_path_in_use_is_confirmed_more_often() {
        let idle = CONFIRMATION_TIMER..CONFIRMATION_TIMER + BUSY_CONFIRMATION_TIMER;
        assert!(
            idle.contains(&confirmed_after(false)),
            "{:?}",
            confirmed_after(false)
        );
        assert!(confirmed_after(true) <= BUSY_CONFIRMATION_TIMER + Duration::from_millis(100));
    }

    #[test]
    fn a_black_hole_in_use_is_noticed_within_two_seconds() {
        let mut now = epoch();
        let mut search = MtuDiscovery::new(1_472, now);
        search.set_rtt(Duration::from_millis(20));
        run(&mut search, now, Duration::from_secs(1), 1_472, 0);
        now += Duration::from_secs(1);
        let narrowed = now;
        while search.current() == 1_472 {
            now = search.next_timeout().max(now);
            let _ = search.poll(now, Some(now), Some(now));
        }
        let took = now - narrowed;
        assert!(took < Duration::from_secs(2), "{took:?}");
        assert_eq!(search.current(), BASE);
    }

    /// A search that has settled at 1,472, and the time.
    fn settled() -> (MtuDiscovery, Instant) {
        let now = epoch();
        let mut search = MtuDiscovery::new(1_472, now);
        search.set_rtt(Duration::from_millis(30));
        let now = run(&mut search, now, Duration::from_secs(3), 1_472, 0);
        assert_eq!(search.current(), 1_472);
        (search, now)
    }

    #[test]
    fn a_hint_makes_us_ask_at_once_and_changes_nothing() {
        for hint in [0, FLOOR, 548, BASE, 1_232, 1_471] {
            let (mut search, now) = settled();
            search.set_hint(now, Some(hint));
            assert_eq!(search.current(), 1_472);
            assert_eq!(search.poll(now, Some(now), None), Some(1_472), "{hint}");
            assert!(
                search.is_doubtful(),
                "a ping tells whether the peer is there"
            );
            search.acked(now, 1_472);
            run(&mut search, now, Duration::from_secs(60), 1_472, 0);
            assert_eq!(search.current(), 1_472);
            let once = Hints {
                asked: 1,
                refuted: 1,
            };
            assert_eq!(search.hints(), once, "{hint}");
        }
    }

    #[test]
    fn a_hint_of_no_less_than_the_size_in_use_is_none() {
        let (mut search, now) = settled();
        for hint in [Some(1_472), Some(9_000), Some(u16::MAX), None] {
            search.set_hint(now, hint);
            assert_eq!(search.poll(now, Some(now), None), None, "{hint:?}");
        }
        assert_eq!(search.hints(), Hints::default());
    }

    #[test]
    fn a_hint_that_is_true_is_followed_to_the_byte_within_a_second() {
        // Below the base, the base itself is tried in between.
        for (carries, within) in [(1_471, 1_000), (1_372, 1_000), (1_232, 1_000), (848, 2_000)] {
            let (mut search, mut now) = settled();
            let narrowed = now;
            search.set_hint(now, Some(carries));
            while search.current() != carries {
                now = run(&mut search, now, Duration::from_millis(10), carries, 0);
                let took = now - narrowed;
                assert!(took < Duration::from_millis(within), "{carries}: {took:?}");
            }
            run(&mut search, now, Duration::from_secs(60), carries, 0);
            assert_eq!(search.current(), carries);
        }
    }

    #[test]
    fn a_hint_comes_too_late_for_a_probe_that_is_out() {
        let (mut search, mut now) = settled();
        while search.poll(now, Some(now), Some(now)).is_none() {
            now = search.next_timeout();
        }
        // What has arrived was sent before the path narrowed.
        search.set_hint(now, Some(1_232));
        search.acked(now, 1_472);
        assert_eq!(search.hints().refuted, 0);
        assert_eq!(search.poll(now, Some(now), None), Some(1_472));
    }

    #[test]
    fn hints_without_end_cost_a_probe_a_second_and_hold_no_search_up() {
        let (mut search, mut now) = settled();
        search.set_limit(now, 8_972);
        let (started, mut hint) = (now, 1_400);
        let mut probes = 0;
        while now < started + Duration::from_secs(60) {
            now += Duration::from_millis(10);
            hint = if hint > FLOOR { hint - 1 } else { 1_400 };
            search.set_hint(now, Some(hint));
            if let Some(size) = search.poll(now, Some(now), None) {
                probes += 1;
                if size <= 8_000 {
                    search.acked(now, size);
                }
            }
            assert!(search.current() >= 1_472);
        }
        assert!((7_992..=8_000).contains(&search.current()));
        assert!(search.hints().asked <= 61, "{:?}", search.hints());
        assert!(probes < 61 + 60, "{probes}");
    }

    #[test]
    fn a_hint_outlives_no_change_of_the_path_and_the_counts_do() {
        let (mut search, now) = settled();
        search.set_hint(now, Some(548));
        search.restart(now);
        assert_eq!(search.hints().asked, 1);
        assert_eq!(search.poll(now, None, None), Some(1_472));
    }

    #[test]
    fn a_silent_peer_is_asked_a_few_times_and_again_after_it_was_heard() {
        let mut now = epoch();
        let mut search = MtuDiscovery::new(1_472, now);
        let mut asked = |times: usize, heard: bool| {
            let asks = (0..times).filter(|_| {
                let _ = search.poll(now, heard.then_some(now), None);
                now = search.next_timeout();
                search.is_doubtful()
            });
            asks.count()
        };
        assert_eq!(asked(1, false), 0, "a first probe is no reason");
        assert_eq!(asked(20, false), MAX_ASKED as usize);
        assert_eq!(asked(1, true), 1);
        assert_eq!(asked(20, false), MAX_ASKED as usize);
    }

    #[test]
    fn a_probe_is_waited_for_longer_than_the_round_trip() {
        let now = epoch();
        let mut search = MtuDiscovery::new(1_472, now);
        for rtt in [0, 1, 60, 300, 4_000].map(Duration::from_millis) {
            search.set_rtt(rtt);
            assert!(search.timer > rtt + MIN_PROBE_TIMER / 2, "{rtt:?}");
        }
        let _ = search.poll(now, None, None);
        assert_eq!(search.next_timeout(), now + MAX_PROBE_TIMER);
    }

    #[test]
    fn a_lost_probe_in_silence_tells_nothing() {
        let mut now = epoch();
        let mut search = MtuDiscovery::new(1_472, now);
        for _ in 0..20 {
            assert_eq!(search.poll(now, None, None), Some(1_472));
            now = search.next_timeout();
        }
    }

    #[test]
    fn a_path_narrower_than_the_base() {
        let now = epoch();
        let mut search = MtuDiscovery::new(1_472, now);
        run(&mut search, now, Duration::from_secs(120), 900, 0);
        assert!(
            (900 - GRANULARITY..=900).contains(&search.current()),
            "{}",
            search.current()
        );
    }

    proptest! {
        #[test]
        fn the_size_that_is_found_passes_and_is_nearly_the_largest(
            limit in 508u16..9_000, carries in 508u16..9_000, narrowed in 508u16..9_000,
            nth in 0u32..6, hints in any::<[Option<u16>; 3]>(),
        ) {
            prop_assume!(nth != 1);
            let mut now = epoch();
            let mut search = MtuDiscovery::new(limit, now);
            for (carries, hint) in [carries, narrowed, carries].into_iter().zip(hints) {
                search.set_hint(now, hint);
                now = run(&mut search, now, Duration::from_secs(1_000), carries, nth);
                let best = carries.min(limit);
                prop_assert!(search.current() <= best);
                let current = search.current();
                prop_assert!(current + GRANULARITY >= best, "{current} of {best}");
                search.set_limit(now, limit);
            }
        }

        /// Whoever says what, and however often: what passes is used on.
        #[test]
        fn no_hint_lowers_what_passes(
            carries in BASE..9_000,
            hints in proptest::collection::vec((0u64..3_000, any::<Option<u16>>()), 1..40),
        ) {
            let mut now = epoch();
            let mut search = MtuDiscovery::new(8_972, now);
            let mut least = BASE;
            for (pause, hint) in hints {
                search.set_hint(now, hint);
                prop_assert!(search.current() >= least);
                now = run(&mut search, now, Duration::from_millis(pause), carries, 0);
                prop_assert!(search.current() >= least);
                least = search.current();
            }
            prop_assert!(search.hints().refuted <= search.hints().asked);
        }
    }
}
