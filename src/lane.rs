//! The journey of a packet. A lane is one thread that owns one TUN queue and one UDP socket.
//!
//! Out of this host, from the TUN into the tunnel ([`Lane::outbound`]):
//!
//! 1. read a super-packet with its `virtio_net_hdr`;
//! 2. parse it, look its flow up and rewrite it, once ([`Lane::route_out`]);
//! 3. cut it to datagrams and seal each where it lies in the send batch ([`Lane::seal_all`]);
//! 4. send the batch in one call ([`Lane::flush_udp`]).
//!
//! Into this host, from the tunnel to the TUN ([`Lane::inbound`]):
//!
//! 1. receive a batch of datagrams;
//! 2. open each where it lies ([`Lane::open`]);
//! 3. join it with the one before it, if the two are adjacent ([`Lane::deliver`]);
//! 4. parse, look the flow up and rewrite, once, and write it to the TUN ([`Lane::flush_tun`]).
//!
//! Nothing here waits for anybody else: sessions and endpoints come as a snapshot from the control
//! task, and what is not a packet (handshakes, control messages) goes to it through a bounded queue.
//! There is no allocation per packet and no lock is held across a system call.

use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::sync::mpsc;
use tracing::{debug, warn};

use crate::batch::{Destination, SendBatch};
use crate::drops::DropReason;
use crate::io::tun::{MAX_FRAME, TunQueue, VNET_HDR_LEN};
use crate::io::udp::{Path, RECV_SLOT, Received, UdpSocket};
use crate::join::{Joiner, Part, Stream};
use crate::offload::{Coalescer, Push, Segments, VnetHdr};
use crate::packet::Parsed;
use crate::peer::PeerId;
use crate::session::Session;
use crate::shared::{LaneCounters, Shared, Translation, View};
use crate::wire::{DATA_HEADER_LEN, DATA_OVERHEAD, Flags, Message};

/// Batches handled from one side before the other side gets its turn. More amortises the wake-up
/// further; 8 was worth 25 to 40 % over 1, and latency suffers beyond it.
const BURST: usize = 8;

/// Longest time without a look at expiring flows, in milliseconds.
const TICK_MS: i64 = 1_000;

/// Flows examined for expiry per tick, so that a full table cannot hold up packets: at this rate a
/// million flows are gone through in a quarter of an hour, far below the shortest long timeout.
const EXPIRY_BUDGET: usize = 1_024;

/// What a lane passes to the control task.
pub enum ToControl {
    /// A handshake message.
    Handshake {
        /// Where it came from.
        path: Path,
        /// The datagram.
        datagram: Vec<u8>,
    },
    /// A control message that was authenticated.
    Control {
        /// The session it came in.
        session: Arc<Session>,
        /// The plaintext.
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
    parts: LaneParts,
    /// What was read from the TUN.
    frame: Box<[u8]>,
    /// What is about to be sent.
    batch: SendBatch,
    /// What was received, opened in place.
    slab: Box<[u8]>,
    /// Whose packets the coalescer holds.
    joining: PeerId,
    coalescer: Coalescer,
    joiner: Joiner,
    ticked: Instant,
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
        let mut lane = Self {
            frame: vec![0; MAX_FRAME].into_boxed_slice(),
            batch: SendBatch::new(),
            slab: vec![0; RECV_SLOT].into_boxed_slice(),
            joining: PeerId(0),
            coalescer: Coalescer::new(parts.uso),
            joiner: Joiner::default(),
            ticked: Instant::now(),
            parts,
        };
        let shared = Arc::clone(&lane.parts.shared);
        loop {
            match lane.wait() {
                Ok(false) => {}
                Ok(true) => return,
                Err(error) => return lane.fail(format!("waiting for packets failed: {error}")),
            }
            let view = shared.view.load_full();
            let moment = Moment {
                now: Instant::now(),
                view: &view,
            };
            let result = lane.burst(moment);
            lane.tick(moment.now);
            if let Err(error) = result {
                return lane.fail(error);
            }
        }
    }

    /// Waits until something is to be done; true if that is to stop.
    fn wait(&self) -> io::Result<bool> {
        let mut fds = [
            PollFd::from_borrowed_fd(self.parts.tun.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.parts.udp.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.parts.stop.as_fd(), PollFlags::IN),
        ];
        let timeout = Timespec {
            tv_sec: TICK.as_secs() as i64,
            tv_nsec: 0,
        };
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) => Ok(!fds[2].revents().is_empty()),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Handles what waits on both sides, in turns.
    fn burst(&mut self, moment: Moment<'_>) -> Result<(), String> {
        for _ in 0..BURST {
            let more = self.inbound(moment);
            let more = self.outbound(moment)? || more;
            if !more {
                break;
            }
        }
        self.flush_udp();
        Ok(())
    }

    // Out of this host.

    /// Takes one frame from the TUN into the tunnel; false if none waits.
    fn outbound(&mut self, moment: Moment<'_>) -> Result<bool, String> {
        let len = match self.parts.tun.recv(&mut self.frame) {
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(true),
            // Set down by somebody: nothing to read until it is up again.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => {
                std::thread::sleep(DEVICE_DOWN_PAUSE);
                return Ok(false);
            }
            Err(error) => return Err(format!("the TUN interface is gone: {error}")),
        };
        if let Err((peer, reason)) = self.route_out(moment, len) {
            self.drop_for(peer, reason);
        }
        Ok(true)
    }

    /// Finds where the frame in `self.frame[..len]` goes, rewrites it and has it sealed.
    fn route_out(
        &mut self,
        moment: Moment<'_>,
        len: usize,
    ) -> Result<(), (Option<PeerId>, DropReason)> {
        let unknown = |reason| (None, reason);
        let (vnet, packet) = self.frame[..len]
            .split_first_chunk_mut::<VNET_HDR_LEN>()
            .ok_or(unknown(DropReason::IpMalformed))?;
        let vnet = VnetHdr::parse(vnet);
        let mut parsed = Parsed::parse(packet).map_err(unknown)?;
        let partial = vnet.needs_csum();
        let peer = match &self.parts.shared.translation {
            Translation::Old(gates) => match Gate::choose(gates, &parsed, packet) {
                Ok((peer, Verdict::Pass)) => peer,
                Ok((_, Verdict::Bounce)) => {
                    return self.bounce(len).map_err(unknown);
                }
                Err(reason) => return Err(unknown(reason)),
            },
            Translation::New(translator) => translator
                .outbound(moment.now, packet, &mut parsed, partial)
                .map_err(unknown)?,
        };
        let known = |reason| (Some(peer), reason);
        let peer_view = &moment.view.peers[usize::from(peer.0)];
        let (Some(session), Some(path)) = (&peer_view.session, peer_view.path) else {
            return Err(known(DropReason::NoSession));
        };
        clamp_mss(packet, &parsed, peer_view.mtu, partial);
        let destination = Destination {
            peer,
            path,
            ecn: packet::ecn(packet),
        };
        self.seal_all(len, vnet, &parsed, session, destination, peer_view.mtu)
            .map_err(known)
    }
}
