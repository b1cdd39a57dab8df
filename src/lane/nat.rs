//! The lane of `ipmoved nat`: the old server alone translates both addresses. There is no peer, no
//! channel and no socket; one thread reads a packet from the TUN, translates it and writes it back
//! ([`NatLane::run`]):
//!
//! 1. read a super-packet with its `virtio_net_hdr`;
//! 2. parse it, look its flow up and rewrite its head, once ([`Nat::translate`]);
//! 3. write it back whole: the program at the TUN's ingress sends it out, or up into the stack.
//!
//! Owns this loop and its counters. [`flow::nat`](crate::flow::nat) decides what a packet becomes.
//! The daemon decides what is changed in the kernel, and when the loop ends.

use std::io::IoSlice;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, poll};
use tracing::debug;

use super::shared::{BURST, DEVICE_DOWN_PAUSE, EXPIRY_BUDGET, TICK, Turns, timespec};
use super::to_control::LaneError;
use crate::flow::nat::{Nat, Outcome};
use crate::flow::table::FlowStats;
use crate::io::tun::{MAX_FRAME, TunQueue, VNET_HDR_LEN};
use crate::model::drops::{DropReason, Drops};
use crate::model::status::Traffic;
use crate::packet::Parsed;
use crate::packet::icmp_reply::{IcmpError, IcmpReplies};
use crate::packet::vnet::{NEEDS_CSUM, Offload, VnetHdr};

/// What the lane counts, for `status`.
#[derive(Default)]
pub struct NatCounters {
    /// Packets that were dropped, by reason.
    pub drops: Drops,
    /// Turns of its loop.
    pub turns: Turns,
    traffic: Mutex<[Traffic; 2]>,
    flows: Mutex<FlowStats>,
}

impl NatCounters {
    /// Packets that were carried to clients.
    pub fn to_clients(&self) -> Traffic {
        lock(&self.traffic)[TO_CLIENT]
    }

    /// Packets that were carried to the new server.
    pub fn to_server(&self) -> Traffic {
        lock(&self.traffic)[TO_SERVER]
    }

    /// The flow table's counters after the last packets.
    pub fn flows(&self) -> FlowStats {
        *lock(&self.flows)
    }
}

const TO_CLIENT: usize = 0;
const TO_SERVER: usize = 1;

/// The thread that carries packets.
pub struct NatLane {
    queue: TunQueue,
    /// Others read it between two turns.
    nat: Arc<Mutex<Nat>>,
    replies: IcmpReplies,
    counters: Arc<NatCounters>,
    stop: OwnedFd,
}

impl NatLane {
    /// A lane that can run from `now` on, until `stop` becomes readable.
    pub fn new(
        queue: TunQueue,
        nat: Arc<Mutex<Nat>>,
        counters: Arc<NatCounters>,
        stop: OwnedFd,
        now: Instant,
    ) -> Self {
        Self {
            queue,
            nat,
            replies: IcmpReplies::new(now),
            counters,
            stop,
        }
    }

    /// Carries packets until told to stop.
    ///
    /// # Errors
    /// Why it can carry no more packets.
    pub fn run(mut self) -> Result<(), LaneError> {
        let mut frame = vec![0; MAX_FRAME].into_boxed_slice();
        let mut ticked = Instant::now();
        let nat = Arc::clone(&self.nat);
        while !self.wait()? {
            self.counters.turns.count();
            let mut nat = lock(&nat);
            let now = Instant::now();
            for _ in 0..BURST {
                if !self.pass(now, &mut nat, &mut frame)? {
                    break;
                }
            }
            if now.duration_since(ticked) >= TICK {
                ticked = now;
                nat.expire(now, EXPIRY_BUDGET);
            }
            *lock(&self.counters.flows) = nat.stats();
        }
        Ok(())
    }

    /// Waits until there is something to do. Returns true if that is to stop.
    fn wait(&self) -> Result<bool, LaneError> {
        let mut fds = [
            PollFd::from_borrowed_fd(self.queue.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.stop.as_fd(), PollFlags::IN),
        ];
        match poll(&mut fds, Some(&timespec(TICK))) {
            Ok(_) => Ok(!fds[1].revents().is_empty()),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(LaneError::Wait(error.into())),
        }
    }

    /// Carries one frame. Returns false if none waits.
    fn pass(&mut self, now: Instant, nat: &mut Nat, frame: &mut [u8]) -> Result<bool, LaneError> {
        let len = match self.queue.recv(frame) {
            Ok(len) => len,
            Err(error) => {
                return match error.raw_os_error() {
                    Some(libc::EAGAIN) => Ok(false),
                    Some(libc::EINTR) => Ok(true),
                    // Somebody set the interface down: there is nothing to read until it is up
                    // again.
                    Some(libc::EIO) => {
                        std::thread::sleep(DEVICE_DOWN_PAUSE);
                        Ok(false)
                    }
                    _ => Err(LaneError::TunGone(error)),
                };
            }
        };
        if let Err(reason) = self.translate(now, nat, &mut frame[..len]) {
            self.counters.drops.count(reason);
        }
        Ok(true)
    }

    fn translate(
        &mut self,
        now: Instant,
        nat: &mut Nat,
        frame: &mut [u8],
    ) -> Result<(), DropReason> {
        let (header, packet) = frame
            .split_first_chunk_mut::<VNET_HDR_LEN>()
            .ok_or(DropReason::IpMalformed)?;
        let vnet = VnetHdr::read(header);
        let mut parsed = Parsed::parse(packet)?;
        let offload = Offload::accept(&vnet, packet, &parsed)?;
        let partial = offload.partial();
        if vnet.flags & NEEDS_CSUM != 0 && !partial {
            // The header meant another checksum than the packet's own. That one is finished now.
            *header = VnetHdr::default().to_bytes();
        }
        let bytes = parsed.total();
        let segments = vnet.packets(parsed.payload_len());
        parsed.set_packets(segments);
        let outcome = nat.translate(now, packet, &mut parsed, partial);
        let side = match outcome {
            Ok(Outcome::ToClient) => Some(TO_CLIENT),
            Ok(Outcome::ToServer) => Some(TO_SERVER),
            Ok(Outcome::Bounce) => None,
            Err(DropReason::TtlExpired) => {
                self.reply(now, packet, &parsed);
                return Err(DropReason::TtlExpired);
            }
            Err(reason) => return Err(reason),
        };
        self.queue
            .send(&[IoSlice::new(header), IoSlice::new(packet)])
            .map_err(|error| {
                debug!(%error, "the TUN refused a packet");
                DropReason::TunWriteFailed
            })?;
        if let Some(side) = side {
            let traffic = &mut lock(&self.counters.traffic)[side];
            traffic.packets += u64::from(segments);
            traffic.bytes += bytes as u64;
        }
        Ok(())
    }

    /// Tells the sender that the hop limit was used up here.
    #[cold]
    fn reply(&mut self, now: Instant, packet: &[u8], parsed: &Parsed) {
        let from = IpAddr::from(parsed.dst(packet));
        match self
            .replies
            .make(now, IcmpError::Expired, packet, parsed, from)
        {
            Ok(_) => {}
            Err(reason) => return self.counters.drops.count(reason),
        }
        if let Some(reply) = self.replies.take() {
            let header = VnetHdr::default().to_bytes();
            // An ICMP error that cannot be sent is as good as one that got lost.
            let _ = self
                .queue
                .send(&[IoSlice::new(&header), IoSlice::new(reply)]);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
