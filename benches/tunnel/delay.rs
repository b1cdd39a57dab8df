//! A delay line: what comes from the new server takes some milliseconds longer.
//!
//! ```text
//!  router:  new ──rule──► TUN ─► [held] ─► TUN ──► main table: clients, old server
//! ```
//!
//! Between namespaces a round trip takes microseconds. There no sender needs more than a packet or two
//! under way, and what loss does to it is a matter of timers; on a path with a length a sender slows
//! down by the formulas, and whoever adds delay or loss of his own is seen. Only the way back is
//! delayed: it carries acknowledgements, which are few, and is not the impaired one.
//!
//! Frames are held and written as they were read, super-packets and unfinished checksums included.

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

/// How much longer the way takes: most of a round trip, and far more than any tunnel adds.
pub(crate) const DELAY: Duration = Duration::from_millis(5);
/// Frames held at most: what 800,000 acknowledgements a second are in that time, several times more than
/// a path here has. What comes then is dropped.
const HELD: usize = 4_096;
/// Frames read before those that are due are written.
const BURST: usize = 64;
/// How often an idle line looks whether it is to end.
const LOOK: Duration = Duration::from_millis(100);

/// The device, and the table that leads into it.
const DEVICE: &str = "delay";
const TABLE: u32 = 50;

/// A delay line in a router; gone when dropped.
pub(crate) struct Delay<'lab> {
    router: &'lab Namespace,
    stop: Arc<AtomicBool>,
    line: Option<JoinHandle<Result<(), LabError>>>,
}

impl<'lab> Delay<'lab> {
    /// Delays what comes in by `interface`.
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

    /// Ends it and says what went wrong.
    pub(crate) fn stop(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        let Some(line) = self.line.take() else {
            return Ok(());
        };
        let unruled = sh(self.router, &format!("ip rule del pref {TABLE}"));
        // The device goes with its queue, and the route with the device.
        self.stop.store(true, Relaxed);
        let ended = line.join().ok().context("the delay line panicked")?;
        unruled?;
        Ok(ended?)
    }
}

impl Drop for Delay<'_> {
    fn drop(&mut self) {
        // Only on the way out of an error, which says more.
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
            // What the kernel does not take is lost, as on any path.
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
    // Whether it was a frame, the time or a signal: the next turn finds out.
    let _ = poll(&mut [PollFd::new(queue, PollFlags::IN)], Some(&pause));
}
