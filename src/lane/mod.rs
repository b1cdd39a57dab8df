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
pub mod nat;
mod outbound;
mod receive_ring;
pub mod shared;
mod slow_path;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use helper::Crowd;
use helper::{LONG_WINDOW, Load, Second, Work};
use inbound::Inbound;
use outbound::Outbound;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::sync::mpsc;
use tracing::debug;

use crate::channel::session::{Admitted, Session};
use crate::io::tun::TunQueue;
use crate::io::udp::UdpSocket;
use crate::lane::shared::{LaneCounters, Queue, Shared, Translation, View};
use crate::model::drops::DropReason;
use crate::model::peer::{Path, PeerId};
use crate::packet::offload::Reach;
use crate::packet::{Parsed, clamp_mss};

/// Frames or batches taken from one side before the other side gets its turn. More amortises the
/// wake-up further: 8 was worth 25 to 40 % over 1 for full super-packets; small packets, of which
/// one batch holds many, are worth more.
const BURST: usize = 64;

/// Bytes taken from one side before the other side gets its turn: 8 full super-packets, beyond which
/// latency suffers.
const BURST_BYTES: usize = 8 * 65_536;

/// How often expiring flows are looked at, and longest wait without a packet.
const TICK: Duration = Duration::from_secs(1);

/// Pause before an interface that somebody set down is read again.
const DEVICE_DOWN_PAUSE: Duration = Duration::from_millis(50);

/// Flows examined for expiry per tick, so that a full table cannot hold up packets: at this rate a
/// million flows are gone through in a quarter of an hour, far below the shortest long timeout.
const EXPIRY_BUDGET: usize = 1_024;

/// What a lane passes to the control task.
pub enum ToControl {
    /// A handshake message that was made with a peer's key.
    Handshake {
        /// Where it came from.
        path: Path,
        /// The message.
        admitted: Admitted,
    },
    /// A control message that was authenticated.
    Control {
        /// The session it came in.
        session: Arc<Session>,
        /// Where it came from, if that says something new of where the peer is.
        heard_from: Option<Path>,
        /// The plaintext, as far as it can mean anything.
        message: Vec<u8>,
    },
    /// The lane cannot go on.
    Failed(String),
    /// The peer was heard on a session for the first time, or from elsewhere than before.
    Heard {
        /// The session.
        session: Arc<Session>,
        /// Where it was heard from.
        path: Path,
    },
}

impl ToControl {
    /// Whose it is, and in which queue it waits.
    pub fn origin(&self) -> Option<(PeerId, Queue)> {
        match self {
            Self::Handshake { admitted, .. } => Some((admitted.peer(), Queue::Handshakes)),
            Self::Control { session, .. } | Self::Heard { session, .. } => {
                Some((session.peer(), Queue::Messages))
            }
            Self::Failed(_) => None,
        }
    }
}

/// What a lane is made of.
pub struct LaneParts {
    /// Its number, which chooses its keys.
    pub number: u8,
    /// Its queue of the TUN.
    pub tun: TunQueue,
    /// The TUN takes UDP super-packets.
    pub uso: bool,
    /// The TUN takes super-packets at all (`--without tun-gso` says no).
    pub tso: bool,
    /// Where super-packets written to it go.
    pub reach: Reach,
    /// Packets too big for one datagram do not go in several (`--no-split`).
    pub no_split: bool,
    /// Its socket.
    pub udp: UdpSocket,
    /// What it shares with the control task.
    pub shared: Arc<Shared>,
    /// Its counters.
    pub counters: Arc<LaneCounters>,
    /// The way to the control task.
    pub control: mpsc::Sender<ToControl>,
    /// Readable once the lane is to stop.
    pub stop: OwnedFd,
}

/// One lane, running.
pub struct Lane {
    parts: Arc<LaneParts>,
    outbound: Outbound,
    /// `None` while the second thread has it.
    inbound: Option<Box<Inbound>>,
    /// `None` where it could not be started.
    second: Option<Second<Inbound>>,
    load: Load,
    ticked: Instant,
}

/// What poll said, or what is known to wait.
#[derive(Clone, Copy, Default)]
struct Ready {
    tun: bool,
    udp: bool,
    stop: bool,
    /// The second thread has laid down what it was given.
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

/// What a packet may know of its surroundings while it passes.
#[derive(Clone, Copy)]
struct Moment<'a> {
    now: Instant,
    view: &'a View,
}

impl Lane {
    /// Runs until told to stop.
    #[allow(clippy::disallowed_methods)] // the edge: here the clock is read, once per wake-up
    pub fn run(parts: LaneParts) {
        let (parts, now) = (Arc::new(parts), Instant::now());
        let second = Second::start(format!("lane-{}-in", parts.number));
        let second = second.map_err(|error| debug!(%error, "a lane has no second thread"));
        let mut lane = Self {
            outbound: Outbound::new(Arc::clone(&parts), now),
            inbound: Some(Box::new(Inbound::new(Arc::clone(&parts), now))),
            second: second.ok(),
            load: Load::new(now),
            ticked: now,
            parts,
        };
        if let Err(error) = lane.carry() {
            // The control task is gone only if the daemon is ending already.
            let _ = (lane.parts.control).blocking_send(ToControl::Failed(error));
        }
        lane.load.end(&lane.parts.shared.crowd);
        if let Some(second) = lane.second
            && second.end().is_err()
        {
            debug!("the second thread of a lane had crashed");
        }
    }

    /// Carries packets until told to stop, or until that is not possible any more.
    #[allow(clippy::disallowed_methods)] // the edge: here the clock is read, thrice per wake-up
    fn carry(&mut self) -> Result<(), String> {
        let shared = Arc::clone(&self.parts.shared);
        let mut ready = Ready::default();
        loop {
            ready = self.wait(ready)?;
            if ready.stop {
                return Ok(());
            }
            let view = shared.view.load_full();
            let moment = Moment {
                now: Instant::now(),
                view: &view,
            };
            if ready.back {
                ready.back = false;
                self.take_back()?;
            }
            ready.udp = match &mut self.inbound {
                Some(inbound) if ready.udp => inbound.drain(moment),
                _ => false,
            };
            let turned = Instant::now();
            if ready.tun {
                ready.tun = self.outbound.drain(moment)?;
            }
            self.tick(moment.now);
            let now = Instant::now();
            self.share(now, [now - turned, turned - moment.now]);
        }
    }

    /// Waits until something is to be done, beside what is known to wait.
    fn wait(&self, known: Ready) -> Result<Ready, String> {
        let parts = &self.parts;
        // A descriptor that is not asked is replaced by one that is asked anyway.
        let stop = parts.stop.as_fd();
        let (udp, back) = match (&self.inbound, &self.second) {
            (None, Some(second)) => (stop, second.is_back()),
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
            Err(error) => return Err(format!("waiting for packets failed: {error}")),
        }
        let [tun, udp, stop, back] = fds.map(|fd| !fd.revents().is_empty());
        Ok(known.or(Ready {
            tun,
            udp,
            stop,
            back,
        }))
    }

    /// Gives one way to the second thread if both are too much for this one, and takes it back once
    /// they are not; this thread has just spent so much on the way out and on the way into this host.
    fn share(&mut self, now: Instant, spent: [Duration; 2]) {
        let Some(second) = &self.second else {
            return;
        };
        let crowd = &self.parts.shared.crowd;
        let two = self.load.note(now, spent, second.awake(), crowd);
        match self.inbound.take() {
            Some(inbound) if two => self.inbound = second.give(inbound).err(),
            None if !two => second.recall(),
            as_it_is => self.inbound = as_it_is,
        }
    }

    /// Takes what the second thread has laid down.
    fn take_back(&mut self) -> Result<(), String> {
        let Some(second) = &self.second else {
            return Ok(());
        };
        match second.take_back() {
            Ok(None) => Ok(()),
            Ok(back) => {
                self.inbound = back;
                Ok(())
            }
            Err(_) => Err("the thread that takes packets out of the tunnel crashed".into()),
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
        if self.parts.number == 0
            && let Translation::New(translator) = &self.parts.shared.translation
        {
            translator.expire(now, EXPIRY_BUDGET);
        }
    }
}

/// What the second thread does.
impl Work for Inbound {
    fn work(&self) -> BorrowedFd<'_> {
        self.parts.udp.as_fd()
    }

    fn stop(&self) -> BorrowedFd<'_> {
        self.parts.stop.as_fd()
    }

    #[allow(clippy::disallowed_methods)] // the edge: here the clock is read, once per wake-up
    fn turn(&mut self, waits: bool) -> bool {
        let view = self.parts.shared.view.load_full();
        let moment = Moment {
            now: Instant::now(),
            view: &view,
        };
        let more = waits && self.drain(moment);
        self.tick(moment.now);
        more
    }
}

impl LaneParts {
    /// Passes something to the control task, unless that has enough of this peer's to do.
    fn tell(&self, message: ToControl) -> Result<(), Dropped> {
        let Some((peer, queue)) = message.origin() else {
            return Ok(());
        };
        let waiting = &self.shared.waiting[usize::from(peer.0)];
        let busy = Dropped::of(peer, DropReason::ControlBusy);
        if !waiting.enter(queue) {
            return Err(busy);
        }
        self.control.try_send(message).map_err(|_| {
            // The control task is ending.
            waiting.leave(queue);
            busy
        })
    }

    /// Counts a drop where it belongs.
    fn count(&self, drop: Dropped) {
        match drop.peer {
            Some(peer) => self.shared.peer_drops[usize::from(peer.0)].count(drop.reason),
            None => self.shared.drops.count(drop.reason),
        }
    }
}

/// A packet that goes no further, and whose it was.
#[derive(Clone, Copy, Debug)]
struct Dropped {
    peer: Option<PeerId>,
    reason: DropReason,
}

impl Dropped {
    fn of(peer: PeerId, reason: DropReason) -> Self {
        Self {
            peer: Some(peer),
            reason,
        }
    }
}

impl From<DropReason> for Dropped {
    fn from(reason: DropReason) -> Self {
        Self { peer: None, reason }
    }
}

fn timespec(time: Duration) -> Timespec {
    Timespec {
        tv_sec: time.as_secs() as i64,
        tv_nsec: time.subsec_nanos().into(),
    }
}

/// Clamps the MSS of a SYN or SYN-ACK to what fits one datagram.
fn clamp(packet: &mut [u8], parsed: &Parsed, mtu: usize, partial: bool) {
    let room = |headers: usize| mtu.saturating_sub(headers).min(usize::from(u16::MAX)) as u16;
    clamp_mss(packet, parsed, room(40), room(60), partial);
}
