//! The thread that releases what waited for the end of a hold.
//!
//! Owns when it wakes, and nothing else. A frame that is released takes the way of one that was
//! just read from the TUN: it is judged by the modes that hold now, and goes into the tunnel, or
//! back to this host's own stack as one that is not the tunnel's. So it passes no queue of the
//! kernel that could be full, and no program has to tell it from others. If a new hold has begun,
//! it waits again.
//!
//! A thread of its own keeps the pace whatever the lanes have to do, and no lane waits for it. It
//! sleeps but for holds. Between two daemons nothing is kept: what waits when this one dies is sent
//! again by its clients.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use tokio::sync::mpsc;
use tracing::debug;

use super::outbound::Outbound;
use super::shared::{BURST, Context, LaneParts, TICK, timespec};
use super::to_control::{LaneError, ToControl};
use crate::channel::session::wipe_frames;
use crate::flow::hold::Awaits;
use crate::model::drops::DropReason;
use crate::packet::Parsed;

/// Shortest pause between two turns: a few flows of a line go on in each.
const PAUSE: Duration = Duration::from_millis(2);

/// The thread, as its lane sees it.
pub(super) struct Releaser(JoinHandle<()>);

/// Tells the control task if the thread crashes, since what waits would wait for ever.
struct Alarm(mpsc::Sender<ToControl>);

impl Releaser {
    /// Starts the thread, which sends by the same queue and socket as the lane with these parts. It
    /// ends when the lane is to.
    pub(super) fn start(parts: Arc<LaneParts>) -> io::Result<Self> {
        let thread = std::thread::Builder::new().name("release".into());
        let alarm = Alarm(parts.control.clone());
        let run = move || {
            if let Err(error) = Release::new(parts).run() {
                let _ = alarm.0.blocking_send(ToControl::Failed(error));
            }
        };
        thread.spawn(run).map(Self)
    }

    /// Waits for the end of the thread, which the lane was told of as well.
    pub(super) fn end(self) {
        if self.0.join().is_err() {
            debug!("the thread that releases what was held had crashed");
        }
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = (self.0).blocking_send(ToControl::Failed(LaneError::ReleaseCrashed));
        }
    }
}

/// The thread, as it sees itself.
struct Release {
    parts: Arc<LaneParts>,
    /// `None` until it is wanted for the first time.
    outbound: Option<Box<Outbound>>,
    frames: Vec<Box<[u8]>>,
}

impl Release {
    fn new(parts: Arc<LaneParts>) -> Self {
        Self {
            parts,
            outbound: None,
            frames: Vec::new(),
        }
    }

    /// Releases what is due, until told to stop.
    fn run(&mut self) -> Result<(), LaneError> {
        let shared = Arc::clone(&self.parts.shared);
        let mut next = None;
        loop {
            let patience = match next {
                Some(next) => self.until(next),
                None => TICK,
            };
            if self.wait(patience)? {
                return Ok(());
            }
            shared.holding.silence();
            let now = Instant::now();
            while let Some(packets) = shared.holding.lock().expire(now) {
                shared.drops.add(DropReason::HoldExpired, packets as u64);
            }
            // The lock is held for a few flows at a time, since lanes may wait for it.
            loop {
                let taken = shared.holding.lock().take(now, BURST, &mut self.frames);
                if taken == 0 {
                    break;
                }
                self.send(now);
            }
            let view = shared.view.load_full();
            let awaits = |packet: &[u8]| match Parsed::parse(packet) {
                Ok(parsed) => view.forwarder.awaits_answer(now, &parsed, packet),
                Err(_) => Awaits::Nothing,
            };
            shared.holding.lock().again(now, awaits, &mut self.frames);
            if !self.frames.is_empty() {
                self.send(now);
            }
            if let Some(outbound) = &mut self.outbound {
                outbound.tick(now);
            }
            next = shared.holding.lock().next(now);
        }
    }

    /// How long to sleep until then.
    fn until(&self, next: Instant) -> Duration {
        (next.saturating_duration_since(Instant::now())).clamp(PAUSE, TICK)
    }

    /// Waits that long at most, or until the bell rings. Returns whether to stop.
    fn wait(&self, patience: Duration) -> Result<bool, LaneError> {
        let fds = [self.parts.shared.holding.bell(), self.parts.stop.as_fd()];
        let mut fds = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        match poll(&mut fds, Some(&timespec(patience))) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(LaneError::Wait(error.into())),
        }
        let [_, stop] = fds;
        Ok(!stop.revents().is_empty())
    }

    /// Sends on what was taken out.
    fn send(&mut self, now: Instant) {
        let view = self.parts.shared.view.load_full();
        let context = Context { now, view: &view };
        let new = || Box::new(Outbound::new(Arc::clone(&self.parts), now));
        let outbound = self.outbound.get_or_insert_with(new);
        outbound.send_held(context, self.frames.drain(..));
        // The sessions may have ended before this thread is asked again.
        wipe_frames();
    }
}
