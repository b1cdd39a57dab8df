//! The journey of a packet. A lane owns one TUN queue and one UDP socket.
//!
//! Outbound: out of this host, from the TUN into the tunnel ([`Outbound::drain`]).
//!
//! 1. read a super-packet with its `virtio_net_hdr`;
//! 2. parse it, look its flow up and rewrite it, once ([`Outbound::route`]);
//! 3. segment it into datagrams, and seal each where it lies in the send batch (`Sealing::seal_all`
//!    in [`outbound`]);
//! 4. send the batch in one call ([`Outbound::flush`]).
//!
//! Inbound: into this host, from the tunnel to the TUN ([`Inbound::drain`]).
//!
//! 1. receive a batch of datagrams;
//! 2. open each where it lies ([`Inbound::open`]);
//! 3. coalesce it with the one before it, if the two are adjacent ([`Inbound::deliver`]);
//! 4. parse, look the flow up and rewrite, once, and write it to the TUN ([`Inbound::flush`]).
//!
//! A packet that does not go on is the business of the slow path ([`slow_path`]). It decides what
//! becomes of the packet, and the direction that read the packet does it. An ICMP error about a
//! packet out of the tunnel has to go back into it: the inbound direction puts it into the
//! [`outbox`], and the outbound direction sends it.
//!
//! The first packet of a conversation that is held waits ([`holding`]), and [`release`] sends it on
//! when the hold ends.
//!
//! Files use each other in one direction: each may use those above it in this list.
//!
//! | file | owns |
//! |---|---|
//! | `bell` | how one thread wakes another |
//! | [`load`] | how busy a lane is |
//! | [`to_control`] | what a lane passes to the control task, and the bound on it |
//! | [`holding`] | what waits for the end of a hold |
//! | [`shared`] | what the control task and both directions of a lane share |
//! | [`receive_ring`] | where to receive the next datagrams |
//! | [`outbox`] | ICMP errors that the inbound direction wants sent |
//! | [`helper`] | the helper thread |
//! | [`slow_path`] | what becomes of packets that are not just carried |
//! | [`to_host`] | one packet rewritten and written to the TUN |
//! | [`outbound`], [`inbound`] | the two directions |
//! | [`release`] | the thread that releases what was held |
//! | this one | the lane, which runs them |
//! | [`nat`] | the loop of `ipmoved nat`, which has no tunnel |
//!
//! Nothing here waits for anybody else. Sessions and endpoints come as a snapshot from the control
//! task. What is not a packet (handshakes, control messages) goes to that task through a bounded
//! queue. There is no allocation for each packet, and no lock is held while a packet is read, sent
//! or written.

#![expect(
    clippy::disallowed_methods,
    reason = "an edge: its loops read the clock and run threads"
)]

mod bell;
mod helper;
mod holding;
mod inbound;
mod load;
pub mod nat;
mod outbound;
mod outbox;
mod receive_ring;
mod release;
pub mod shared;
mod slow_path;
mod to_control;
mod to_host;

use std::mem;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use helper::InboundHelper;
pub use holding::Holding;
use inbound::Inbound;
pub use load::BusyLanes;
use load::{LONG_WINDOW, Load};
use outbound::Outbound;
use outbox::{Outbox, Posted};
use release::Releaser;
use rustix::event::{PollFd, PollFlags, poll};
pub use shared::LaneParts;
use shared::{Context, EXPIRY_BUDGET, Seen, TICK, timespec};
pub use to_control::{LaneError, ToControl, Waiting};
use tracing::debug;

/// One lane, running.
pub struct Lane {
    parts: Arc<LaneParts>,
    outbound: Outbound,
    /// `None` while the helper thread has it.
    inbound: Option<Box<Inbound>>,
    /// `None` if it could not be started.
    helper: Option<InboundHelper<Inbound>>,
    /// ICMP errors that the inbound direction wants sent back into the tunnel.
    posted: Posted,
    load: Load,
    ticked: Instant,
}

/// What is ready: poll has said so, or it was known before.
#[derive(Clone, Copy, Default)]
struct Ready {
    tun: bool,
    udp: bool,
    stop: bool,
    /// The helper has given its work back, or has something to send.
    bell: bool,
}

impl Ready {
    fn any(self) -> bool {
        self.tun || self.udp || self.stop || self.bell
    }

    fn or(self, other: Self) -> Self {
        Self {
            tun: self.tun || other.tun,
            udp: self.udp || other.udp,
            stop: self.stop || other.stop,
            bell: self.bell || other.bell,
        }
    }
}

impl Lane {
    /// Runs until told to stop.
    pub fn run(parts: LaneParts) {
        let (parts, now) = (Arc::new(parts), Instant::now());
        let helper = InboundHelper::start(format!("lane-{}-in", parts.number));
        let helper = helper.map_err(|error| debug!(%error, "a lane has no helper thread"));
        // One for all lanes: what comes in by any of them waits in one place.
        let releases = parts.number == 0 && parts.shared.view.load().forwarder.holds();
        let releaser = match releases.then(|| Releaser::start(Arc::clone(&parts))) {
            None => None,
            Some(Ok(releaser)) => Some(releaser),
            Some(Err(error)) => {
                let failed = ToControl::Failed(LaneError::NoRelease(error));
                let _ = parts.control.blocking_send(failed);
                return;
            }
        };
        let (outbox, posted) = Outbox::pair();
        let mut lane = Self {
            outbound: Outbound::new(Arc::clone(&parts), now),
            inbound: Some(Box::new(Inbound::new(Arc::clone(&parts), outbox, now))),
            helper: helper.ok(),
            posted,
            load: Load::new(now),
            ticked: now,
            parts,
        };
        match lane.carry() {
            Ok(()) => releaser.into_iter().for_each(Releaser::end),
            // The control task is gone only if the daemon is ending already.
            Err(error) => {
                let _ = (lane.parts.control).blocking_send(ToControl::Failed(error));
            }
        }
        lane.load.end(&lane.parts.shared.busy_lanes);
        if let Some(helper) = lane.helper
            && helper.end().is_err()
        {
            debug!("the helper thread of a lane had crashed");
        }
    }

    /// Carries packets until told to stop, or until it can carry no more.
    fn carry(&mut self) -> Result<(), LaneError> {
        let shared = Arc::clone(&self.parts.shared);
        let mut ready = Ready::default();
        let mut seen = Seen::default();
        loop {
            ready = self.wait(ready)?;
            self.parts.counters.outbound.count();
            if self.inbound.is_some() {
                self.parts.counters.inbound.count();
            }
            if ready.stop {
                return Ok(());
            }
            let view = shared.view.load_full();
            seen.wipe_after(&view);
            let context = Context {
                now: Instant::now(),
                view: &view,
            };
            // The bell rings for both: work that was given back, and replies to send.
            let mut has_replies = mem::take(&mut ready.bell);
            if has_replies {
                self.take_back()?;
            }
            match &mut self.inbound {
                Some(inbound) if ready.udp => {
                    ready.udp = inbound.drain(context);
                    has_replies |= inbound.has_posted();
                }
                Some(_) | None => ready.udp = false,
            }
            if has_replies {
                self.outbound.send_replies(context, self.posted.drain());
            }
            let turned = Instant::now();
            if ready.tun {
                ready.tun = self.outbound.drain(context)?;
            }
            self.tick(context.now);
            let now = Instant::now();
            self.share(now, [now - turned, turned - context.now]);
        }
    }

    /// Waits until there is something to do, beside what is known to wait.
    fn wait(&self, known: Ready) -> Result<Ready, LaneError> {
        let parts = &self.parts;
        // `stop`, which is polled anyway, stands in for a descriptor that is not to be polled.
        let stop = parts.stop.as_fd();
        let (udp, bell) = match (&self.inbound, &self.helper) {
            (None, Some(helper)) => (stop, helper.bell()),
            _ => (parts.udp.as_fd(), stop),
        };
        let mut fds = [parts.tun.as_fd(), udp, stop, bell]
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        // A side that had more than its turn's worth goes on at once, but the others are polled
        // too.
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
        let [tun, udp, stop, bell] = fds.map(|fd| !fd.revents().is_empty());
        Ok(known.or(Ready {
            tun,
            udp,
            stop,
            bell,
        }))
    }

    /// Gives the inbound direction to the helper thread if both directions are too much for this
    /// thread, and takes it back once they are not. `spent` is what this thread has just spent on
    /// the outbound and on the inbound direction.
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

    /// Takes the work back, if the helper thread has given it back.
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

    /// Lets fragments and flows expire. One lane takes care of the flows for all lanes.
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
            let view = self.parts.shared.view.load();
            view.forwarder.expire(now, EXPIRY_BUDGET);
        }
    }
}
