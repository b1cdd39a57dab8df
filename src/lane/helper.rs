//! The helper thread of a lane. It runs the inbound direction while the two directions together are
//! more than one thread can do.
//!
//! ```text
//!                  one thread                              two
//!   lane-N         waits for TUN and socket   ──give──►    waits for the TUN
//!   lane-N-in      waits to be given work     ◄──recall──  waits for the socket
//! ```
//!
//! A lane is best served by one thread. The reply to a packet that it wrote to the TUN is often
//! there before it looks again, so that a packet and its reply cost one wake-up less. A helper
//! thread is worth its own wake-ups only where the lane's own thread never sleeps. It is given the
//! whole inbound direction, so that the two threads share nothing while they carry packets.
//!
//! Owns the thread, and how it is given work and gives it back. Does not decide when
//! ([`super::load`]) and does not know what the work is ([`Work`]).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::bell::{clear, ring};
use super::shared::{TICK, timespec};
use crate::channel::session::wipe_frames;

/// What the helper thread can do for a lane: the inbound direction, or a stand-in of a test.
pub(super) trait Work: Send + 'static {
    /// Becomes readable when there is something to do.
    fn work(&self) -> BorrowedFd<'_>;

    /// Becomes readable, and stays so, once the work is over.
    fn stop(&self) -> BorrowedFd<'_>;

    /// Does a turn's worth if something waits, and whatever else is due now and then.
    fn turn(&mut self, waits: bool) -> Turn;
}

/// The result of a turn.
#[derive(Clone, Copy, Default)]
pub(super) struct Turn {
    /// More may wait.
    pub(super) more: bool,
    /// There is something that the lane's own thread should look at.
    pub(super) has_news: bool,
}

/// The helper thread, as the lane's own thread sees it.
///
/// If it is dropped without having been [ended](Self::end), the thread stops working and ends.
pub(super) struct InboundHelper<W> {
    /// `None` once the thread is to end.
    given: Option<SyncSender<Box<W>>>,
    back: Receiver<Box<W>>,
    /// Asks for the work back.
    recall: OwnedFd,
    /// Readable once the work is back, the work has news, or the thread has crashed.
    bell: OwnedFd,
    /// Nanoseconds that the thread was awake.
    awake: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

/// The helper thread, as it sees itself. Fields are dropped in this order: the bell rings last.
struct Ends<W> {
    given: Receiver<Box<W>>,
    back: SyncSender<Box<W>>,
    recall: OwnedFd,
    awake: Arc<AtomicU64>,
    bell: Doorbell,
}

/// Rings when it is dropped too, so that nobody waits for a thread that crashed.
struct Doorbell(OwnedFd);

/// The helper thread has crashed, and the work that it was given is lost with it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Crashed;

impl<W: Work> InboundHelper<W> {
    /// Starts a thread, which sleeps until it is given work.
    pub(super) fn start(name: String) -> io::Result<Self> {
        let (give, given) = sync_channel(1);
        let (give_back, back) = sync_channel(1);
        let recall = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let awake = Arc::new(AtomicU64::new(0));
        let ends = Ends {
            given,
            back: give_back,
            recall: recall.try_clone()?,
            awake: Arc::clone(&awake),
            bell: Doorbell(bell.try_clone()?),
        };
        let thread = std::thread::Builder::new()
            .name(name)
            .spawn(move || ends.serve())?;
        Ok(Self {
            given: Some(give),
            back,
            recall,
            bell,
            awake,
            thread: Some(thread),
        })
    }

    /// Gives work to the thread, or returns it if the thread cannot take it.
    pub(super) fn give(&self, work: Box<W>) -> Result<(), Box<W>> {
        let Some(given) = &self.given else {
            return Err(work);
        };
        // A recall that came when the last work was on its way back already is not meant for this
        // work.
        clear(&self.recall);
        given.try_send(work).map_err(|error| match error {
            TrySendError::Full(work) | TrySendError::Disconnected(work) => work,
        })
    }

    /// Asks for the work back. Once it is back, [`Self::bell`] is readable.
    pub(super) fn recall(&self) {
        ring(&self.recall);
    }

    /// Becomes readable when the work is back or has news, or the thread has crashed.
    pub(super) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// Takes the work back, if the thread has given it back.
    pub(super) fn take_back(&self) -> Result<Option<Box<W>>, Crashed> {
        clear(&self.bell);
        match self.back.try_recv() {
            Ok(work) => Ok(Some(work)),
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => Err(Crashed),
        }
    }

    /// How long the thread has been awake since it was started: running, or waiting for a
    /// processor.
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

impl<W> Drop for InboundHelper<W> {
    fn drop(&mut self) {
        ring(&self.recall);
    }
}

impl<W: Work> Ends<W> {
    fn serve(self) {
        while let Ok(mut work) = self.given.recv() {
            self.run(&mut *work);
            // The sessions may have ended before this thread is given work again.
            wipe_frames();
            clear(&self.recall);
            if self.back.send(work).is_err() {
                return;
            }
            ring(&self.bell.0);
        }
    }

    /// Works until the work is recalled or over.
    fn run(&self, work: &mut W) {
        let mut more = false;
        loop {
            let mut fds = [work.work(), self.recall.as_fd(), work.stop()]
                .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
            let patience = if more { Duration::ZERO } else { TICK };
            match poll(&mut fds, Some(&timespec(patience))) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                // The lane's own thread will see the same error, and knows whom to tell.
                Err(_) => return,
            }
            let [waits, recall, stop] = fds.map(|fd| !fd.revents().is_empty());
            if recall || stop {
                return;
            }
            let woken = Instant::now();
            let turn = work.turn(waits || more);
            more = turn.more;
            if turn.has_news {
                ring(&self.bell.0);
            }
            let awake = woken.elapsed().as_nanos() as u64;
            // No other thread writes it.
            self.awake.store(self.awake.load(Relaxed) + awake, Relaxed);
        }
    }
}

impl Drop for Doorbell {
    fn drop(&mut self) {
        ring(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use std::mem;

    use super::*;
    use crate::testing::epoch;

    /// Counts the turns in which something waited; a turn takes what waits.
    struct Turns {
        waits: OwnedFd,
        stop: OwnedFd,
        turns: usize,
        /// The turn in which it crashes.
        crash: Option<usize>,
        /// Has news in its next turn.
        has_news: bool,
    }

    impl Work for Turns {
        fn work(&self) -> BorrowedFd<'_> {
            self.waits.as_fd()
        }

        fn stop(&self) -> BorrowedFd<'_> {
            self.stop.as_fd()
        }

        fn turn(&mut self, waits: bool) -> Turn {
            self.turns += usize::from(waits);
            assert!(self.crash != Some(self.turns), "as the test wants it");
            clear(&self.waits);
            Turn {
                more: false,
                has_news: mem::take(&mut self.has_news),
            }
        }
    }

    /// A helper thread, work for it, and the other ends of the descriptors that the work waits on.
    fn stage(crash: Option<usize>) -> (InboundHelper<Turns>, Box<Turns>, [OwnedFd; 2]) {
        let bell = || eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let (waits, stop) = (bell(), bell());
        let ends = [waits.try_clone().unwrap(), stop.try_clone().unwrap()];
        let turns = Turns {
            waits,
            stop,
            turns: 0,
            crash,
            has_news: false,
        };
        let helper = InboundHelper::start("test-in".into()).unwrap();
        (helper, Box::new(turns), ends)
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
    fn given_work_is_done_and_comes_back_when_recalled() {
        let (helper, mut turns, [waits, _stop]) = stage(None);
        for round in 1..=20 {
            assert!(helper.give(turns).is_ok());
            ring(&waits);
            is_taken(&waits);
            assert!(!comes_now(helper.bell()), "it stays until recalled");
            helper.recall();
            // The lane asks until the work is back, so it may ask more than once.
            helper.recall();
            assert!(comes(helper.bell()));
            turns = helper.take_back().unwrap().unwrap();
            assert_eq!(turns.turns, round);
            helper.recall();
            assert_eq!(helper.take_back().map(|none| none.is_none()), Ok(true));
        }
        assert!(helper.awake() > Duration::ZERO);
        assert_eq!(helper.end(), Ok(()));
    }

    #[test]
    fn news_is_told_without_giving_the_work_back() {
        let (helper, mut turns, [waits, _stop]) = stage(None);
        turns.has_news = true;
        assert!(helper.give(turns).is_ok());
        ring(&waits);
        assert!(comes(helper.bell()));
        assert_eq!(helper.take_back().map(|none| none.is_none()), Ok(true));
        assert!(!comes_now(helper.bell()), "told once");
        helper.recall();
        assert!(comes(helper.bell()));
        assert!(helper.take_back().is_ok_and(|back| back.is_some()));
        assert_eq!(helper.end(), Ok(()));
    }

    #[test]
    fn it_ends_with_and_without_work_and_with_work_that_stopped() {
        let (helper, turns, _bells) = stage(None);
        assert_eq!(helper.end(), Ok(()));
        let (helper, _, _bells) = stage(None);
        assert!(helper.give(turns).is_ok());
        assert_eq!(helper.end(), Ok(()));
        let (helper, turns, [_waits, stop]) = stage(None);
        assert!(helper.give(turns).is_ok());
        ring(&stop);
        assert!(comes(helper.bell()), "given back without being asked");
        assert_eq!(helper.end(), Ok(()));
    }

    #[test]
    fn it_ends_when_its_lane_is_gone() {
        let (helper, turns, _bells) = stage(None);
        assert!(helper.give(turns).is_ok());
        let bell = helper.bell.try_clone().unwrap();
        drop(helper);
        assert!(comes(bell.as_fd()));
    }

    #[test]
    fn a_crash_is_told() {
        let (helper, turns, [waits, _stop]) = stage(Some(2));
        assert!(helper.give(turns).is_ok());
        ring(&waits);
        is_taken(&waits);
        ring(&waits);
        assert!(comes(helper.bell()));
        assert_eq!(helper.take_back().map(drop), Err(Crashed));
        assert_eq!(helper.end(), Err(Crashed));
    }
}
