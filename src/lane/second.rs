//! The second thread of a lane, which runs the way into this host while both ways together are more
//! than one thread can do.
//!
//! ```text
//!                  one thread                              two
//!   lane-N         waits for TUN and socket   ──give──►    waits for the TUN
//!   lane-N-in      waits to be given work     ◄──recall──  waits for the socket
//! ```
//!
//! One thread is what a lane wants: what it wrote to the TUN is often answered before it looks there,
//! and a packet and its answer cost one wake-up less. Only where the thread does not come to sleep any
//! more is a second one worth its wake-ups. The way into this host is handed over whole, so nothing is
//! shared while packets are carried.
//!
//! Owns the thread, and when there is work for it ([`Load`], [`Crowd`]).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::{io, mem};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::inbound::Inbound;
use super::{LaneParts, Moment, TICK, timespec};

/// What makes a lane one for two threads.
struct Limits {
    /// How long it is watched before anything is said of it.
    window: Duration,
    /// At least this share of one thread's time is spent.
    share: f64,
    /// Out of this host at least so many times as much of it as into it.
    ///
    /// What comes into this host is answered by its own stack within the very write that hands it over,
    /// so where that is most of the work, one thread does both with fewer wake-ups.
    lean: f64,
}

/// Some hundred super-packets at full speed, and still too short for anybody to notice.
const BEGIN: Limits = Limits {
    window: Duration::from_millis(10),
    share: 0.9,
    lean: 3.0,
};

/// Once there are two: longer and less, so that they do not come and go.
const STAY: Limits = Limits {
    window: LONG_WINDOW,
    share: 0.7,
    lean: 1.5,
};

/// How often a lane with two threads is looked at, if nothing else wakes it.
pub(super) const LONG_WINDOW: Duration = Duration::from_millis(50);

/// The second thread, and the way between it and the first.
pub(super) struct Second {
    given: SyncSender<Box<Inbound>>,
    back: Receiver<Box<Inbound>>,
    /// Asks for what was given.
    recall: OwnedFd,
    /// Readable once it is back, or never will be.
    is_back: OwnedFd,
    /// Nanoseconds that the thread was awake.
    awake: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

/// What the second thread holds.
struct Ends {
    given: Receiver<Box<Inbound>>,
    back: SyncSender<Box<Inbound>>,
    recall: OwnedFd,
    is_back: Doorbell,
    awake: Arc<AtomicU64>,
}

/// Rings when it is dropped too, so that a thread that crashed is not waited for.
struct Doorbell(OwnedFd);

/// The second thread has crashed, and with it what it was given.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Crashed;

impl Second {
    /// Starts the thread of a lane; it sleeps until it is given something.
    pub(super) fn start(parts: &LaneParts) -> io::Result<Self> {
        let (give, given) = sync_channel(1);
        let (give_back, back) = sync_channel(1);
        let recall = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let is_back = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let awake = Arc::new(AtomicU64::new(0));
        let ends = Ends {
            given,
            back: give_back,
            recall: recall.try_clone()?,
            is_back: Doorbell(is_back.try_clone()?),
            awake: Arc::clone(&awake),
        };
        let thread = std::thread::Builder::new()
            .name(format!("lane-{}-in", parts.number))
            .spawn(move || ends.serve())?;
        Ok(Self {
            given: give,
            back,
            recall,
            is_back,
            awake,
            thread,
        })
    }

    /// Gives the way into this host to the thread; what it does not take comes back.
    pub(super) fn give(&self, inbound: Box<Inbound>) -> Result<(), Box<Inbound>> {
        // Asked for once more when it was on its way back already.
        clear(&self.recall);
        self.given.try_send(inbound).map_err(|error| match error {
            TrySendError::Full(inbound) | TrySendError::Disconnected(inbound) => inbound,
        })
    }

    /// Asks for it. Once it is back, [`Self::is_back`] is readable.
    pub(super) fn recall(&self) {
        ring(&self.recall);
    }

    /// Becomes readable when [`Self::take_back`] has something to say.
    pub(super) fn is_back(&self) -> BorrowedFd<'_> {
        self.is_back.as_fd()
    }

    /// Takes back what the thread has laid down, if it has.
    pub(super) fn take_back(&self) -> Result<Option<Box<Inbound>>, Crashed> {
        clear(&self.is_back);
        match self.back.try_recv() {
            Ok(inbound) => Ok(Some(inbound)),
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => Err(Crashed),
        }
    }

    /// How long the thread was awake, since it was started.
    pub(super) fn awake(&self) -> Duration {
        Duration::from_nanos(self.awake.load(Relaxed))
    }

    /// Ends the thread, which still runs only if the lane was not told to stop.
    pub(super) fn end(self) -> Result<(), Crashed> {
        drop(self.given);
        ring(&self.recall);
        self.thread.join().map_err(|_| Crashed)
    }
}

impl Ends {
    fn serve(self) {
        while let Ok(mut inbound) = self.given.recv() {
            self.run(&mut inbound);
            clear(&self.recall);
            if self.back.send(inbound).is_err() {
                return;
            }
            ring(&self.is_back.0);
        }
    }

    /// Runs the way into this host until it is recalled, or the lane is to stop.
    #[allow(clippy::disallowed_methods)] // the edge: here the clock is read, once per wake-up
    fn run(&self, inbound: &mut Inbound) {
        let parts = Arc::clone(&inbound.parts);
        let mut ticked = Instant::now();
        let mut more = false;
        loop {
            let mut fds = [
                PollFd::from_borrowed_fd(parts.udp.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.recall.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(parts.stop.as_fd(), PollFlags::IN),
            ];
            let patience = if more { Duration::ZERO } else { TICK };
            match poll(&mut fds, Some(&timespec(patience))) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                // The first thread will see the same, and knows whom to tell.
                Err(_) => return,
            }
            let [socket, recall, stop] = fds.map(|fd| !fd.revents().is_empty());
            if recall || stop {
                return;
            }
            let view = parts.shared.view.load_full();
            let moment = Moment {
                now: Instant::now(),
                view: &view,
            };
            if socket || more {
                more = inbound.drain(moment);
            }
            if moment.now.duration_since(ticked) >= TICK {
                ticked = moment.now;
                inbound.tick(moment.now);
            }
            let awake = moment.now.elapsed().as_nanos() as u64;
            // Nobody else writes it.
            self.awake.store(self.awake.load(Relaxed) + awake, Relaxed);
        }
    }
}

impl Drop for Doorbell {
    fn drop(&mut self) {
        ring(&self.0);
    }
}

/// Makes an event descriptor readable.
fn ring(fd: &OwnedFd) {
    // It cannot fail: the counter is far from its end, and its own descriptor is open.
    let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
}

/// Makes an event descriptor unreadable.
fn clear(fd: &OwnedFd) {
    // Unreadable already, if it fails.
    let _ = rustix::io::read(fd, &mut [0; 8]);
}

/// How many lanes have more to do than a thread can, beside the processors there are.
///
/// A second thread that has to wait for a processor only takes turns with the first: it is for lanes
/// that leave processors idle, as one busy stream does.
#[derive(Debug)]
pub struct Crowd {
    processors: usize,
    busy: AtomicUsize,
}

impl Crowd {
    /// With no busy lane.
    pub fn new(processors: usize) -> Self {
        Self {
            processors,
            busy: AtomicUsize::new(0),
        }
    }

    /// Whether every busy lane can have two processors.
    fn has_room(&self) -> bool {
        2 * self.busy.load(Relaxed) <= self.processors
    }

    fn set_busy(&self, was: bool, is: bool) {
        match (was, is) {
            (false, true) => _ = self.busy.fetch_add(1, Relaxed),
            (true, false) => _ = self.busy.fetch_sub(1, Relaxed),
            _ => {}
        }
    }
}

/// How busy a lane is, and with it how many threads it should have.
#[derive(Debug)]
pub(super) struct Load {
    since: Instant,
    /// Spent since then on the way out of this host.
    out: Duration,
    /// And on the way into it, but for what the second thread said before.
    into: Duration,
    second: Duration,
    is_busy: bool,
    leans_out: bool,
}

impl Load {
    /// Idle.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            since: now,
            out: Duration::ZERO,
            into: Duration::ZERO,
            second: Duration::ZERO,
            is_busy: false,
            leans_out: false,
        }
    }

    /// The first thread has spent this long on the way out and that long on the way into this host; the
    /// second was awake for `second` since it was started.
    ///
    /// Tells whether the lane should have two threads from `now` on.
    pub(super) fn note(
        &mut self,
        now: Instant,
        [out, into]: [Duration; 2],
        second: Duration,
        crowd: &Crowd,
    ) -> bool {
        self.out += out;
        self.into += into;
        let limits = if self.is_busy { STAY } else { BEGIN };
        let window = now.saturating_duration_since(self.since);
        if window >= limits.window {
            self.into += second.saturating_sub(mem::replace(&mut self.second, second));
            let was = self.is_busy;
            self.is_busy = self.out + self.into >= window.mul_f64(limits.share);
            self.leans_out = self.out >= self.into.mul_f64(limits.lean);
            crowd.set_busy(was, self.is_busy);
            (self.since, self.out, self.into) = (now, Duration::ZERO, Duration::ZERO);
        }
        self.is_busy && self.leans_out && crowd.has_room()
    }

    /// The lane ends.
    pub(super) fn end(&mut self, crowd: &Crowd) {
        crowd.set_busy(mem::take(&mut self.is_busy), false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(
        clippy::disallowed_methods,
        reason = "a virtual clock has to begin somewhere"
    )]
    fn start() -> Instant {
        Instant::now()
    }

    const MS: Duration = Duration::from_millis(1);

    /// A lane that spends these shares of each millisecond out of this host and into it, the latter in
    /// its second thread.
    fn lasts(load: &mut Load, now: &mut Instant, shares: [f64; 2], crowd: &Crowd) -> bool {
        let mut two = false;
        let mut second = load.second;
        for _ in 0..200 {
            *now += MS;
            second += MS.mul_f64(shares[1]);
            let first = [MS.mul_f64(shares[0]), Duration::ZERO];
            two = load.note(*now, first, second, crowd);
        }
        two
    }

    #[test]
    fn only_a_lane_that_does_not_sleep_gets_a_second_thread_and_keeps_it_while_it_needs_it() {
        let (crowd, mut now) = (Crowd::new(2), start());
        let mut load = Load::new(now);
        assert!(!lasts(&mut load, &mut now, [0.7, 0.1], &crowd));
        assert!(lasts(&mut load, &mut now, [0.75, 0.2], &crowd));
        assert!(lasts(&mut load, &mut now, [0.6, 0.2], &crowd), "0.8 of one");
        assert!(!lasts(&mut load, &mut now, [0.5, 0.1], &crowd));
        assert!(!lasts(&mut load, &mut now, [0.7, 0.1], &crowd));
        assert_eq!(crowd.busy.load(Relaxed), 0);
    }

    #[test]
    fn a_lane_that_works_most_on_what_comes_in_keeps_one_thread() {
        let (crowd, mut now) = (Crowd::new(2), start());
        let mut load = Load::new(now);
        assert!(!lasts(&mut load, &mut now, [0.3, 0.7], &crowd));
        assert!(!lasts(&mut load, &mut now, [0.5, 0.5], &crowd));
        load.end(&crowd);
        let mut load = Load::new(now);
        assert!(lasts(&mut load, &mut now, [0.8, 0.2], &crowd));
        assert!(
            lasts(&mut load, &mut now, [0.8, 0.5], &crowd),
            "a little less"
        );
        assert!(!lasts(&mut load, &mut now, [0.4, 0.7], &crowd));
    }

    #[test]
    fn as_many_busy_lanes_as_processors_have_one_thread_each() {
        let (crowd, mut now) = (Crowd::new(2), start());
        let (mut one, mut other) = (Load::new(now), Load::new(now));
        assert!(lasts(&mut one, &mut now, [1.0, 0.0], &crowd));
        assert!(!lasts(&mut other, &mut now, [1.0, 0.0], &crowd));
        assert!(!lasts(&mut one, &mut now, [1.0, 0.2], &crowd));
        other.end(&crowd);
        assert!(lasts(&mut one, &mut now, [1.0, 0.2], &crowd));
        one.end(&crowd);
        assert_eq!(crowd.busy.load(Relaxed), 0);
    }

    #[test]
    fn a_long_sleep_is_no_load() {
        let (crowd, mut now) = (Crowd::new(8), start());
        let mut load = Load::new(now);
        let spent = |out| [out, Duration::ZERO];
        now += Duration::from_secs(60);
        assert!(!load.note(now, spent(MS), Duration::ZERO, &crowd));
        now += 9 * MS;
        assert!(
            !load.note(now, spent(9 * MS), Duration::ZERO, &crowd),
            "too short"
        );
        now += MS;
        assert!(load.note(now, spent(MS), Duration::ZERO, &crowd));
    }
}
