//! A delay line: it makes packets from the new server take some milliseconds longer.
//!
//! ```text
//!  router:  new ──rule──► TUN ─► [held] ─► TUN ──► main table: clients, old server
//! ```
//!
//! Between namespaces a round trip takes microseconds. There no sender needs more than a packet or
//! two under way, and the effect of loss on it depends on timers. On a path with a length a sender
//! slows down by the formulas, and a contender that adds delay or loss of its own shows. The line
//! delays only the way back, which carries acknowledgements: these are few, and that direction is
//! not the impaired one.
//!
//! It holds and writes frames exactly as it read them, including super-packets and unfinished
//! checksums.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use ipmoved::internals::{MAX_FRAME, TunOptions, TunQueue};
use ipmoved::lab::{LabError, Namespace};

use crate::contenders::sh;

/// The added delay: most of a round trip, and far more than any tunnel adds.
pub(crate) const DELAY: Duration = Duration::from_millis(5);
/// Most frames that it holds: 800,000 acknowledgements a second make so many in that time, and a
/// path here has several times less. It drops further ones.
const HELD: usize = 4_096;
/// Frames that it reads before it writes those that are due.
const BURST: usize = 64;
/// How often an idle line checks whether it should end.
const LOOK: Duration = Duration::from_millis(100);

/// The device, and the table that leads into it.
const DEVICE: &str = "delay";
const TABLE: u32 = 50;

/// A delay line in a router. Dropping it removes it.
pub(crate) struct Delay<'lab> {
    router: &'lab Namespace,
    stop: Arc<AtomicBool>,
    line: Option<JoinHandle<Result<(), LabError>>>,
}

impl<'lab> Delay<'lab> {
    /// Delays the packets that come in by `interface`.
    pub(crate) fn start(router: &'lab Namespace, interface: &str) -> Result<Self> {
        let queue = router.run(|| {
            let (mut queues, _) = TunQueue::create(DEVICE, 1, TunOptions::default())
                .map_err(|error| LabError::unexpected(error.to_string()))?;
            queues
                .pop()
                .ok_or_else(|| LabError::unexpected("a TUN without a queue"))
        })?;
        let stop = Arc::new(AtomicBool::new(false));
        let line = {
            let stop = Arc::clone(&stop);
            router.thread("delay line", move || {
                carry(&queue, &stop);
                Ok(())
            })?
        };
        let delay = Self {
            router,
            stop,
            line: Some(line),
        };
        sh(router, &format!("ip link set {DEVICE} up"))?;
        sh(
            router,
            &format!("ip route add default dev {DEVICE} table {TABLE}"),
        )?;
        sh(
            router,
            &format!("ip rule add pref {TABLE} iif {interface} lookup {TABLE}"),
        )?;
        Ok(delay)
    }

    /// Ends it, and returns its error.
    pub(crate) fn stop(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        let Some(line) = self.line.take() else {
            return Ok(());
        };
        let unruled = sh(self.router, &format!("ip rule del pref {TABLE}"));
        // The device takes its queue with it, and the route goes with the device.
        self.stop.store(true, Relaxed);
        let ended = line.join().ok().context("the delay line panicked")?;
        unruled?;
        Ok(ended?)
    }
}

impl Drop for Delay<'_> {
    fn drop(&mut self) {
        // This is the way out of another error, which says more.
        let _ = self.end();
    }
}

fn carry(queue: &TunQueue, stop: &AtomicBool) {
    let mut frame = vec![0; MAX_FRAME];
    let mut held: VecDeque<(Instant, Box<[u8]>)> = VecDeque::new();
    while !stop.load(Relaxed) {
        for _ in 0..BURST {
            let Ok(len) = queue.recv(&mut frame) else {
                break;
            };
            if held.len() < HELD {
                held.push_back((Instant::now() + DELAY, frame[..len].into()));
            }
        }
        while let Some((_, frame)) = held.front().filter(|(due, _)| *due <= Instant::now()) {
            // If the kernel does not take a frame, it is lost, as on any path.
            let _ = queue.send(&[IoSlice::new(frame)]);
            held.pop_front();
        }
        let pause = held.front().map_or(LOOK, |(due, _)| {
            due.saturating_duration_since(Instant::now())
        });
        wait_readable(queue, pause);
    }
}

fn wait_readable(queue: &TunQueue, pause: Duration) {
    let pause = Timespec {
        tv_sec: 0,
        tv_nsec: i64::from(pause.subsec_nanos()),
    };
    // It may have been a frame, the time or a signal. The next turn finds out.
    let _ = poll(&mut [PollFd::new(queue, PollFlags::IN)], Some(&pause));
}
