//! The journey of a packet. A lane owns one TUN queue and one UDP socket.
//!
//! Out of this host, from the TUN into the tunnel ([`Outbound::drain`]):
//!
//! 1. read a super-packet with its `virtio_net_hdr`;
//! 2. parse it, look its flow up and rewrite it, once ([`Outbound::route`]);
//! 3. cut it to datagrams and seal each where it lies in the send batch ([`outbound::Sealing::seal_all`]);
//! 4. send the batch in one call ([`Outbound::flush`]).
//!
//! Into this host, from the tunnel to the TUN ([`Inbound::drain`]):
//!
//! 1. receive a batch of datagrams;
//! 2. open each where it lies ([`Inbound::open`]);
//! 3. join it with the one before it, if the two are adjacent ([`Inbound::deliver`]);
//! 4. parse, look the flow up and rewrite, once, and write it to the TUN ([`Inbound::flush`]).
//!
//! Nothing here waits for anybody else: sessions and endpoints come as a snapshot from the control
//! task, and what is not a packet (handshakes, control messages) goes to it through a bounded queue.
//! There is no allocation per packet and no lock is held across a system call.

mod helper;
mod inbound;
mod load;
mod outbound;
mod receive_ring;
pub mod shared;
mod slow_path;
mod to_control;

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use helper::{InboundHelper, timespec};
use inbound::Inbound;
pub use load::BusyLanes;
use load::{LONG_WINDOW, Load};
use outbound::Outbound;
use rustix::event::{PollFd, PollFlags, poll};
pub use shared::LaneParts;
use shared::{Context, TICK};
pub use to_control::{LaneError, ToControl, Waiting};
use tracing::debug;

/// Flows examined for expiry per tick, so that a full table cannot hold up packets: at this rate a
/// million flows are gone through in a quarter of an hour, far below the shortest long timeout.
const EXPIRY_BUDGET: usize = 1_024;

/// One lane, running.
pub struct Lane {
    parts: Arc<LaneParts>,
    outbound: Outbound,
    /// `None` while the helper thread has it.
    inbound: Option<Box<Inbound>>,
    /// `None` where it could not be started.
    helper: Option<InboundHelper<Inbound>>,
    load: Load,
    ticked: Instant,
}

/// What poll said, or what is known to wait.
#[derive(Clone, Copy, Default)]
struct Ready {
    tun: bool,
    udp: bool,
    stop: bool,
    /// The helper has laid down what it was given.
    back: bool,
}

impl Ready {
    fn any(self) -> bool {
        self.tun || self.udp || self.stop || self.back
    }

    fn or(self, other: Self) -> Self {
        Self {
            tun: self.tun || other.tun,
            udp: self.udp || other.udp,
            stop: self.stop || other.stop,
            back: self.back || other.back,
        }
    }
}

impl Lane {
    /// Runs until told to stop.
    #[allow(clippy::disallowed_methods)] // the edge: here the clock is read, once per wake-up
    pub fn run(parts: LaneParts) {
        let (parts, now) = (Arc::new(parts), Instant::now());
        let helper = InboundHelper::start(format!("lane-{}-in", parts.number));
        let helper = helper.map_err(|error| debug!(%error, "a lane has no helper thread"));
        let mut lane = Self {
            outbound: Outbound::new(Arc::clone(&parts), now),
            inbound: Some(Box::new(Inbound::new(Arc::clone(&parts), now))),
            helper: helper.ok(),
            load: Load::new(now),
            ticked: now,
            parts,
        };
        if let Err(error) = lane.carry() {
            // The control task is gone only if the daemon is ending already.
            let _ = (lane.parts.control).blocking_send(ToControl::Failed(error));
        }
        lane.load.end(&lane.parts.shared.busy_lanes);
        if let Some(helper) = lane.helper
            && helper.end().is_err()
        {
            debug!("the helper thread of a lane had crashed");
        }
    }

    /// Carries packets until told to stop, or until that is not possible any more.
    #[allow(clippy::disallowed_methods)] // the edge: here the clock is read, thrice per wake-up
    fn carry(&mut self) -> Result<(), LaneError> {
        let shared = Arc::clone(&self.parts.shared);
        let mut ready = Ready::default();
        loop {
            ready = self.wait(ready)?;
            if ready.stop {
                return Ok(());
            }
            let view = shared.view.load_full();
            let context = Context {
                now: Instant::now(),
                view: &view,
            };
            if ready.back {
                ready.back = false;
                self.take_back()?;
            }
            ready.udp = match &mut self.inbound {
                Some(inbound) if ready.udp => inbound.drain(context),
                _ => false,
            };
            let turned = Instant::now();
            if ready.tun {
                ready.tun = self.outbound.drain(context)?;
            }
            self.tick(context.now);
            let now = Instant::now();
            self.share(now, [now - turned, turned - context.now]);
        }
    }

    /// Waits until something is to be done, beside what is known to wait.
    fn wait(&self, known: Ready) -> Result<Ready, LaneError> {
        let parts = &self.parts;
        // A descriptor that is not asked is replaced by one that is asked anyway.
        let stop = parts.stop.as_fd();
        let (udp, back) = match (&self.inbound, &self.helper) {
            (None, Some(helper)) => (stop, helper.is_back()),
            _ => (parts.udp.as_fd(), stop),
        };
        let mut fds = [parts.tun.as_fd(), udp, stop, back]
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        // What had more than its turn's worth goes on at once, but never without asking the others.
        let patience = match &self.inbound {
            _ if known.any() => Duration::ZERO,
            Some(_) => TICK,
            None => LONG_WINDOW,
        };
        match poll(&mut fds, Some(&timespec(patience))) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(known),
            Err(error) => return Err(LaneError::Wait(error.into())),
        }
        let [tun, udp, stop, back] = fds.map(|fd| !fd.revents().is_empty());
        Ok(known.or(Ready {
            tun,
            udp,
            stop,
            back,
        }))
    }

    /// Gives one way to the helper thread if both are too much for this one, and takes it back once
    /// they are not; this thread has just spent so much on the way out and on the way into this host.
    fn share(&mut self, now: Instant, spent: [Duration; 2]) {
        let Some(helper) = &self.helper else {
            return;
        };
        let busy_lanes = &self.parts.shared.busy_lanes;
        let wants_helper = self.load.note(now, spent, helper.awake(), busy_lanes);
        match self.inbound.take() {
            Some(inbound) if wants_helper => self.inbound = helper.give(inbound).err(),
            None if !wants_helper => helper.recall(),
            as_it_is => self.inbound = as_it_is,
        }
    }

    /// Takes what the helper thread has laid down.
    fn take_back(&mut self) -> Result<(), LaneError> {
        let Some(helper) = &self.helper else {
            return Ok(());
        };
        match helper.take_back() {
            Ok(None) => Ok(()),
            Ok(back) => {
                self.inbound = back;
                Ok(())
            }
            Err(_) => Err(LaneError::HelperCrashed),
        }
    }

    /// Lets fragments and flows expire. Of the flows one lane takes care for all.
    fn tick(&mut self, now: Instant) {
        if let Some(inbound) = &mut self.inbound {
            inbound.tick(now);
        }
        if now.duration_since(self.ticked) < TICK {
            return;
        }
        self.ticked = now;
        self.outbound.tick(now);
        if self.parts.number == 0 {
            self.parts.shared.translation.expire(now, EXPIRY_BUDGET);
        }
    }
}
