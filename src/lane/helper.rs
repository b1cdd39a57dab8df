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

use super::{TICK, timespec};

/// What makes a lane one for two threads.
struct Limits {
    /// How long it is watched before anything is said of it.
    window: Duration,
    /// At least this share of one thread's time it is awake: running, waiting for a processor, or for
    /// room to send, in which case what comes in should not wait with it.
    share: f64,
    /// Out of this host at least so many times as much of it as into it.
    ///
    /// What comes into this host is answered by its own stack within the very write that hands it over,
    /// so where that is most of the work, one thread does both with fewer wake-ups.
    lean: f64,
}

/// Some hundreds of super-packets at full speed, too short for anybody to notice, and too long for a
/// thread that was kept from its processor once to be taken for a busy one.
const BEGIN: Limits = Limits {
    window: Duration::from_millis(20),
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

/// What a thread can do for another: the way into this host, or what a test makes of it.
pub(super) trait Work: Send + 'static {
    /// Becomes readable when there is something to do.
    fn work(&self) -> BorrowedFd<'_>;

    /// Becomes readable, for good, once there is nothing to do any more.
    fn stop(&self) -> BorrowedFd<'_>;

    /// Does a turn's worth if something waits, and what else has to be done now and then; whether more
    /// may wait.
    fn turn(&mut self, waits: bool) -> bool;
}

/// The second thread, and the way between it and the first.
///
/// Dropped without having been [ended](Self::end), it lays down what it was given and goes.
pub(super) struct Second<W> {
    /// `None` once the thread is to end.
    given: Option<SyncSender<Box<W>>>,
    back: Receiver<Box<W>>,
    /// Asks for what was given.
    recall: OwnedFd,
    /// Readable once it is back, or never will be.
    is_back: OwnedFd,
    /// Nanoseconds that the thread was awake.
    awake: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

/// What the second thread holds. In this order they are dropped: the bell rings last.
struct Ends<W> {
    given: Receiver<Box<W>>,
    back: SyncSender<Box<W>>,
    recall: OwnedFd,
    awake: Arc<AtomicU64>,
    is_back: Doorbell,
}

/// Rings when it is dropped too, so that a thread that crashed is not waited for.
struct Doorbell(OwnedFd);

/// The second thread has crashed, and with it what it was given.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Crashed;

impl<W: Work> Second<W> {
    /// Starts a thread; it sleeps until it is given something.
    pub(super) fn start(name: String) -> io::Result<Self> {
        let (give, given) = sync_channel(1);
        let (give_back, back) = sync_channel(1);
        let recall = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let is_back = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let awake = Arc::new(AtomicU64::new(0));
        let ends = Ends {
            given,
            back: give_back,
            recall: recall.try_clone()?,
            awake: Arc::clone(&awake),
            is_back: Doorbell(is_back.try_clone()?),
        };
        let thread = std::thread::Builder::new()
            .name(name)
            .spawn(move || ends.serve())?;
        Ok(Self {
            given: Some(give),
            back,
            recall,
            is_back,
            awake,
            thread: Some(thread),
        })
    }

    /// Gives work to the thread; what it does not take comes back.
    pub(super) fn give(&self, work: Box<W>) -> Result<(), Box<W>> {
        let Some(given) = &self.given else {
            return Err(work);
        };
        // Asked for once more when it was on its way back already.
        clear(&self.recall);
        given.try_send(work).map_err(|error| match error {
            TrySendError::Full(work) | TrySendError::Disconnected(work) => work,
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
    pub(super) fn take_back(&self) -> Result<Option<Box<W>>, Crashed> {
        clear(&self.is_back);
        match self.back.try_recv() {
            Ok(work) => Ok(Some(work)),
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => Err(Crashed),
        }
    }

    /// How long the thread was awake, since it was started: running, or waiting for a processor.
    pub(super) fn awake(&self) -> Duration {
        Duration::from_nanos(self.awake.load(Relaxed))
    }

    /// Ends the thread and waits for it.
    pub(super) fn end(mut self) -> Result<(), Crashed> {
        self.given = None;
        ring(&self.recall);
        let thread = self.thread.take();
        thread.map_or(Ok(()), |thread| thread.join().map_err(|_| Crashed))
    }
}

impl<W> Drop for Second<W> {
    fn drop(&mut self) {
        ring(&self.recall);
    }
}

impl<W: Work> Ends<W> {
    fn serve(self) {
        while let Ok(mut work) = self.given.recv() {
            self.run(&mut *work);
            clear(&self.recall);
            if self.back.send(work).is_err() {
                return;
            }
            ring(&self.is_back.0);
        }
    }

    /// Works until the work is recalled, or is to stop.
    fn run(&self, work: &mut W) {
        let mut more = false;
        loop {
            let mut fds = [work.work(), self.recall.as_fd(), work.stop()]
                .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
            let patience = if more { Duration::ZERO } else { TICK };
            match poll(&mut fds, Some(&timespec(patience))) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                // The first thread will see the same, and knows whom to tell.
                Err(_) => return,
            }
            let [waits, recall, stop] = fds.map(|fd| !fd.revents().is_empty());
            if recall || stop {
                return;
            }
            let woken = Instant::now();
            more = work.turn(waits || more);
            let awake = woken.elapsed().as_nanos() as u64;
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
    /// It should have two threads.
    is_for_two: bool,
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
            is_for_two: false,
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
        let limits = if self.is_for_two { STAY } else { BEGIN };
        let window = now.saturating_duration_since(self.since);
        if window >= limits.window {
            self.into += second.saturating_sub(mem::replace(&mut self.second, second));
            let is_above = |share| self.out + self.into >= window.mul_f64(share);
            let leans_out = self.out >= self.into.mul_f64(limits.lean);
            self.is_for_two = leans_out && is_above(limits.share);
            let is_busy = is_above(if self.is_busy {
                STAY.share
            } else {
                BEGIN.share
            });
            crowd.set_busy(self.is_busy, is_busy);
            self.is_busy = is_busy;
            (self.since, self.out, self.into) = (now, Duration::ZERO, Duration::ZERO);
        }
        self.is_for_two &= crowd.has_room();
        self.is_for_two
    }

    /// The lane ends.
    pub(super) fn end(&mut self, crowd: &Crowd) {
        crowd.set_busy(mem::take(&mut self.is_busy), false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::epoch;

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
        let (crowd, mut now) = (Crowd::new(2), epoch());
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
        let (crowd, mut now) = (Crowd::new(2), epoch());
        let mut load = Load::new(now);
        assert!(!lasts(&mut load, &mut now, [0.3, 0.7], &crowd));
        assert!(!lasts(&mut load, &mut now, [0.5, 0.5], &crowd));
        assert!(
            !lasts(&mut load, &mut now, [0.7, 0.3], &crowd),
            "busy, but not to begin with"
        );
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
        let (crowd, mut now) = (Crowd::new(2), epoch());
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
        let (crowd, mut now) = (Crowd::new(8), epoch());
        let mut load = Load::new(now);
        let spent = |out| [out, Duration::ZERO];
        now += Duration::from_secs(60);
        assert!(!load.note(now, spent(MS), Duration::ZERO, &crowd));
        now += 19 * MS;
        assert!(
            !load.note(now, spent(19 * MS), Duration::ZERO, &crowd),
            "too short"
        );
        now += MS;
        assert!(load.note(now, spent(MS), Duration::ZERO, &crowd));
    }

    /// Counts the turns in which something waited; a turn takes what waits.
    struct Turns {
        waits: OwnedFd,
        stop: OwnedFd,
        turns: usize,
        /// The turn in which it crashes.
        crash: Option<usize>,
    }

    impl Work for Turns {
        fn work(&self) -> BorrowedFd<'_> {
            self.waits.as_fd()
        }

        fn stop(&self) -> BorrowedFd<'_> {
            self.stop.as_fd()
        }

        fn turn(&mut self, waits: bool) -> bool {
            self.turns += usize::from(waits);
            assert!(self.crash != Some(self.turns), "as the test wants it");
            clear(&self.waits);
            false
        }
    }

    /// A thread, something for it to do, and the other ends of its bells.
    fn stage(crash: Option<usize>) -> (Second<Turns>, Box<Turns>, [OwnedFd; 2]) {
        let bell = || eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let (waits, stop) = (bell(), bell());
        let ends = [waits.try_clone().unwrap(), stop.try_clone().unwrap()];
        let turns = Turns {
            waits,
            stop,
            turns: 0,
            crash,
        };
        let second = Second::start("test-in".into()).unwrap();
        (second, Box::new(turns), ends)
    }

    /// Whether a descriptor becomes readable soon.
    fn comes(fd: BorrowedFd<'_>) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
        poll(&mut fds, Some(&timespec(Duration::from_secs(5)))).unwrap() == 1
    }

    /// Waits until the thread has taken what waited.
    fn is_taken(fd: &OwnedFd) {
        let end = epoch() + Duration::from_secs(5);
        while comes_now(fd.as_fd()) {
            assert!(epoch() < end, "not taken");
            std::thread::yield_now();
        }
    }

    fn comes_now(fd: BorrowedFd<'_>) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
        poll(&mut fds, Some(&timespec(Duration::ZERO))).unwrap() == 1
    }

    #[test]
    fn what_is_given_is_worked_on_and_comes_back_when_asked_for() {
        let (second, mut turns, [waits, _stop]) = stage(None);
        for round in 1..=20 {
            assert!(second.give(turns).is_ok());
            ring(&waits);
            is_taken(&waits);
            assert!(!comes_now(second.is_back()), "it stays until asked for");
            second.recall();
            // As the lane does until it is back.
            second.recall();
            assert!(comes(second.is_back()));
            turns = second.take_back().unwrap().unwrap();
            assert_eq!(turns.turns, round);
            second.recall();
            assert_eq!(second.take_back().map(|none| none.is_none()), Ok(true));
        }
        assert!(second.awake() > Duration::ZERO);
        assert_eq!(second.end(), Ok(()));
    }

    #[test]
    fn it_ends_with_and_without_work_and_with_work_that_stopped() {
        let (second, turns, _bells) = stage(None);
        assert_eq!(second.end(), Ok(()));
        let (second, _, _bells) = stage(None);
        assert!(second.give(turns).is_ok());
        assert_eq!(second.end(), Ok(()));
        let (second, turns, [_waits, stop]) = stage(None);
        assert!(second.give(turns).is_ok());
        ring(&stop);
        assert!(comes(second.is_back()), "laid down without being asked");
        assert_eq!(second.end(), Ok(()));
    }

    #[test]
    fn it_goes_when_nobody_is_there_any_more() {
        let (second, turns, _bells) = stage(None);
        assert!(second.give(turns).is_ok());
        let is_back = second.is_back.try_clone().unwrap();
        drop(second);
        assert!(comes(is_back.as_fd()));
    }

    #[test]
    fn a_crash_is_told() {
        let (second, turns, [waits, _stop]) = stage(Some(2));
        assert!(second.give(turns).is_ok());
        ring(&waits);
        is_taken(&waits);
        ring(&waits);
        assert!(comes(second.is_back()));
        assert_eq!(second.take_back().map(drop), Err(Crashed));
        assert_eq!(second.end(), Err(Crashed));
    }
}
