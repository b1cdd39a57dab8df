//! The largest datagram that the path to a peer carries. Probes find it, and follow it for as long
//! as the tunnel runs, without any ICMP (RFC 8899, Datagram Packetization Layer PMTU Discovery).
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

    /// Whether a probe is out that had to be sent again. Then it is worth asking whether the peer
    /// is there at all.
    pub fn is_doubtful(&self) -> bool {
        let probe = self.probe.as_ref();
        probe.is_some_and(|probe| probe.lost + probe.silent > 0 && probe.silent <= MAX_ASKED)
    }

    /// Starts over, since datagrams take another path now.
    pub fn restart(&mut self, now: Instant) {
        *self = Self::new(self.limit, now);
    }

    /// The uplink takes larger or smaller datagrams than before.
    pub fn set_limit(&mut self, now: Instant, limit: u16) {
        self.limit = limit.max(FLOOR);
        self.current = self.current.min(self.limit);
        self.search_below(now, self.limit.saturating_add(1), false);
    }

    /// A probe of this size arrived.
    pub fn acked(&mut self, now: Instant, size: u16) {
        if self.probe.take_if(|probe| probe.size == size).is_some() {
            self.current = self.current.max(size);
            self.next = match self.phase {
                Phase::Searching { .. } => now,
                Phase::Settled { .. } => now + BUSY_CONFIRMATION_TIMER,
            };
            self.confirmed = now;
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
        if settled && !busy && now < self.confirmed + CONFIRMATION_TIMER {
            self.next = now + BUSY_CONFIRMATION_TIMER;
            return None;
        }
        let size = self.choose(now)?;
        self.probe = Some(Probe {
            size,
            sent: now,
            lost: 0,
            silent: 0,
        });
        self.next = now + self.timer;
        Some(size)
    }

    fn choose(&mut self, now: Instant) -> Option<u16> {
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
        } else {
            self.next = now + CONFIRMATION_TIMER;
        }
    }

    fn search_below(&mut self, now: Instant, ceiling: u16, guessed: bool) {
        self.phase = Phase::Searching { ceiling, guessed };
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
            nth in 0u32..6,
        ) {
            prop_assume!(nth != 1);
            let mut now = epoch();
            let mut search = MtuDiscovery::new(limit, now);
            for carries in [carries, narrowed, carries] {
                now = run(&mut search, now, Duration::from_secs(1_000), carries, nth);
                let best = carries.min(limit);
                prop_assert!(search.current() <= best);
                let current = search.current();
                prop_assert!(current + GRANULARITY >= best, "{current} of {best}");
                search.set_limit(now, limit);
            }
        }
    }
}
