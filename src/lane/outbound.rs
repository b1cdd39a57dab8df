//! The outbound direction: from a queue of the TUN into the tunnel. [`super`] tells its steps.
//!
//! Owns the packets that are on their way out. Whoever holds an [`Outbound`] may run it.

use std::io::IoSlice;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use tracing::debug;

use super::shared::{BURST, BURST_BYTES, Context, DEVICE_DOWN_PAUSE, LaneParts};
use super::slow_path::{OutboundOutcome, SlowPath, Unsplit, unsplit};
use super::to_control::LaneError;
use super::to_host::{self, Arrival};
use crate::channel::session::Sealer;
use crate::channel::wire::{DATA_HEADER_LEN, DATA_OVERHEAD, Flags};
use crate::flow::role::{Judgement, ReplyTo};
use crate::io::batch::{Batch, Destination, Reservation, SendBatch};
use crate::io::tun::{MAX_FRAME, VNET_HDR_LEN};
use crate::io::udp::WhenFull;
use crate::model::drops::{DropReason, Dropped};
use crate::packet::fragment::Fragments;
use crate::packet::segment::Segments;
use crate::packet::vnet::{Offload, VnetHdr};
use crate::packet::{Fragment, Parsed, RST, ecn};

/// One direction of a lane: TUN to tunnel.
pub(super) struct Outbound {
    parts: Arc<LaneParts>,
    /// The frame that was read from the TUN.
    frame: Box<[u8]>,
    /// Datagrams that are about to be sent.
    batch: SendBatch,
    /// Where a packet is put together before it is split.
    scratch: Box<[u8]>,
    /// The slow path of this direction. It keeps whole frames.
    slow_path: SlowPath<()>,
}

impl Outbound {
    /// Starts with nothing on its way.
    pub(super) fn new(parts: Arc<LaneParts>, now: Instant) -> Self {
        let client = parts.shared.view.load().forwarder.outbound_client();
        Self {
            parts,
            frame: vec![0; MAX_FRAME].into_boxed_slice(),
            batch: SendBatch::new(),
            scratch: vec![0; MAX_FRAME].into_boxed_slice(),
            slow_path: SlowPath::new(now, client),
        }
    }

    /// Takes what waits at the TUN into the tunnel, up to a turn's worth. Returns whether more may
    /// wait.
    pub(super) fn drain(&mut self, context: Context<'_>) -> Result<bool, LaneError> {
        let (mut frames, mut bytes) = (0, 0);
        let result = loop {
            match self.parts.tun.recv(&mut self.frame) {
                Ok(len) => {
                    self.carry(context, len);
                    (frames, bytes) = (frames + 1, bytes + len);
                    if frames == BURST || bytes >= BURST_BYTES {
                        break Ok(true);
                    }
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => break Ok(false),
                    Some(libc::EINTR) => {}
                    // Somebody set the interface down: there is nothing to read until it is up
                    // again.
                    Some(libc::EIO) => {
                        std::thread::sleep(DEVICE_DOWN_PAUSE);
                        break Ok(false);
                    }
                    _ => break Err(LaneError::TunGone(error)),
                },
            }
        };
        self.flush();
        result
    }

    /// Sends ICMP errors about packets that came out of the tunnel back into it.
    #[cold]
    pub(super) fn send_replies(
        &mut self,
        context: Context<'_>,
        replies: impl Iterator<Item = Vec<u8>>,
    ) {
        for reply in replies {
            let len = VNET_HDR_LEN + reply.len();
            self.frame[..VNET_HDR_LEN].copy_from_slice(&VnetHdr::default().to_bytes());
            self.frame[VNET_HDR_LEN..len].copy_from_slice(&reply);
            if let Err(drop) = self.route(context, len) {
                self.parts.count(drop);
            }
        }
        self.flush();
    }

    /// Judges frames anew that have waited for the end of a hold.
    pub(super) fn send_held(
        &mut self,
        context: Context<'_>,
        frames: impl Iterator<Item = Box<[u8]>>,
    ) {
        for frame in frames {
            self.frame[..frame.len()].copy_from_slice(&frame);
            self.carry(context, frame.len());
        }
        self.flush();
    }

    /// Gives up fragments whose first one never came.
    pub(super) fn tick(&mut self, now: Instant) {
        while self.slow_path.expire(now).is_some() {
            self.parts.count(DropReason::FragmentUnknown.into());
        }
    }

    /// Does what is to be done with the frame in `self.frame[..len]`.
    #[inline]
    fn carry(&mut self, context: Context<'_>, len: usize) {
        let result = self.route(context, len);
        if result.is_err() || self.slow_path.has_first() {
            self.after_frame(context, len, result);
        }
    }

    /// Finds where the frame in `self.frame[..len]` goes, rewrites it and seals it.
    fn route(&mut self, context: Context<'_>, len: usize) -> Result<(), Dropped> {
        let (head, packet) = self.frame[..len]
            .split_first_chunk_mut::<VNET_HDR_LEN>()
            .ok_or(DropReason::IpMalformed)?;
        let vnet = VnetHdr::read(head);
        let mut parsed = Parsed::parse(packet)?;
        parsed.set_packets(vnet.packets(parsed.payload_len()));
        if parsed.fragment() != Fragment::None {
            (self.slow_path).note_fragment(context.now, None, &parsed, packet)?;
        }
        let holding = &self.parts.shared.holding;
        if holding.has_some() && holding.join(context.now, &parsed, head, packet) {
            return Ok(());
        }
        let forwarder = &context.view.forwarder;
        let outgoing = match forwarder.judge(context.now, &parsed, packet)? {
            Judgement::Carry(outgoing) => outgoing,
            Judgement::Bounce => return self.leave(&parsed, len),
            Judgement::Hold => return self.keep(context, &parsed, len),
        };
        // A bounced packet goes back as it came, so no checksum may be finished before this line.
        let offload = Offload::accept(&vnet, packet, &parsed)?;
        let partial = offload.partial();
        let peer = outgoing.rewrite(context.now, packet, &mut parsed, partial)?;
        if peer.is_inside() {
            return self.turn_round(len, offload);
        }
        let view = context.view.peer(peer);
        let (Some(session), Some(endpoint)) = (&view.session, view.endpoint) else {
            return Err(Dropped::of(peer, DropReason::NoSession));
        };
        view.clamp_mss(packet, &parsed, partial);
        let destination = Destination {
            peer,
            endpoint,
            ecn: ecn::inner(packet, &parsed),
        };
        let segments = Segments::new(offload, packet, &parsed, view.mtu);
        let counters = &self.parts.counters.peers[usize::from(peer.0)].tx;
        let mut sealing = Sealing {
            parts: &self.parts,
            batch: &mut self.batch,
            sealer: session
                .sealer(self.parts.number)
                .ok_or(Dropped::of(peer, DropReason::NoSession))?,
            destination,
            mtu: view.mtu,
        };
        let sealed = sealing.seal_all(segments, &mut self.scratch);
        session.activity().data_sent(context.now);
        counters.add(sealed.packets, sealed.bytes);
        match sealed.stopped {
            None => Ok(()),
            Some(reason) => Err(Dropped::of(peer, reason)),
        }
    }

    /// Keeps a packet until a hold ends. No checksum of it has been finished.
    #[cold]
    fn keep(&self, context: Context<'_>, parsed: &Parsed, len: usize) -> Result<(), Dropped> {
        let holding = &self.parts.shared.holding;
        Ok(holding.keep(context.now, parsed, &self.frame[..len])?)
    }

    /// Leaves a packet to this host. What waits of a client that has given up waits no longer.
    fn leave(&self, parsed: &Parsed, len: usize) -> Result<(), Dropped> {
        if parsed.tcp_flags() & RST != 0 {
            let (shared, packet) = (&self.parts.shared, &self.frame[VNET_HDR_LEN..len]);
            let withdrawn = shared.holding.withdraw(parsed, packet);
            shared.drops.add(DropReason::HoldExpired, withdrawn as u64);
        }
        self.bounce(len)
    }

    /// Gives a packet that was captured with others, but has not moved, back to this host's stack.
    fn bounce(&self, len: usize) -> Result<(), Dropped> {
        self.parts
            .tun
            .send(&[IoSlice::new(&self.frame[..len])])
            .map_err(|_| DropReason::TunWriteFailed.into())
    }

    /// Gives a packet that called a moved address from inside, or answers such a call, back to this
    /// host's stack under its new addresses.
    #[cold]
    fn turn_round(&mut self, len: usize, offload: Offload) -> Result<(), Dropped> {
        if !offload.is_unfinished() {
            // A checksum of something inside is finished by now.
            self.frame[..VNET_HDR_LEN].copy_from_slice(&VnetHdr::default().to_bytes());
        }
        self.bounce(len)
    }

    /// Does what is left to do after `route` has tried the frame in `self.frame[..len]`.
    #[cold]
    fn after_frame(&mut self, context: Context<'_>, len: usize, result: Result<(), Dropped>) {
        match result {
            Ok(()) => self.release(context),
            Err(drop) => self.refuse(context, len, drop),
        }
    }

    /// Sends on the fragments that came before their first one, which has just gone on.
    fn release(&mut self, context: Context<'_>) {
        for held in self.slow_path.release() {
            let len = held.bytes.len();
            self.frame[..len].copy_from_slice(&held.bytes);
            if let Err(drop) = self.route(context, len) {
                self.parts.count(drop);
            }
        }
    }

    /// Handles the frame in `self.frame[..len]`, which is not carried.
    fn refuse(&mut self, context: Context<'_>, len: usize, drop: Dropped) {
        let packet = self.frame.get(VNET_HDR_LEN..len).unwrap_or_default();
        let forwarder = &context.view.forwarder;
        let refused = (self.slow_path).refuse_outbound(context, forwarder, packet, drop);
        let told = match refused {
            OutboundOutcome::Hold(key) => {
                for _ in (self.slow_path).hold(context.now, key, (), &self.frame[..len]) {
                    self.parts.count(drop);
                }
                return;
            }
            OutboundOutcome::Drop => Ok(()),
            OutboundOutcome::ReplyLimited => Err(Dropped {
                reason: DropReason::ReplyLimited,
                ..drop
            }),
            OutboundOutcome::Reply { peer, to, bytes } => match to {
                ReplyTo::Sender => to_host::write_as_is(&self.parts, bytes)
                    .map_err(|reason| Dropped::of(peer, reason)),
                ReplyTo::Application => {
                    let arrival = Arrival {
                        peer,
                        partial: false,
                        outer_ecn: 0,
                    };
                    to_host::deliver(&self.parts, context, bytes, arrival)
                }
            },
        };
        self.parts.count(drop);
        if let Err(drop) = told {
            self.parts.count(drop);
        }
    }

    /// Sends what waits in the batch.
    fn flush(&mut self) {
        if let Some(batch) = self.batch.take() {
            send(&self.parts, batch);
        }
    }
}

/// Segments or splits one packet, however long, and seals it into the batch.
struct Sealing<'a> {
    parts: &'a LaneParts,
    batch: &'a mut SendBatch,
    sealer: &'a Sealer,
    destination: Destination,
    /// Largest plaintext of one datagram.
    mtu: usize,
}

/// What was sealed of a packet.
#[derive(Default)]
struct Sealed {
    packets: usize,
    bytes: usize,
    /// Why not all of it was sealed.
    stopped: Option<DropReason>,
}

impl Sealing<'_> {
    fn seal_all(&mut self, mut segments: Segments<'_>, scratch: &mut [u8]) -> Sealed {
        let mut sealed = Sealed::default();
        // The first segment is the longest.
        let result = if segments.next_len().is_some_and(|len| len <= self.mtu) {
            self.seal_segments(&mut segments, &mut sealed)
        } else if self.parts.no_split {
            self.seal_unsplit(&mut segments, scratch, &mut sealed)
        } else {
            self.seal_splits(&mut segments, scratch, &mut sealed)
        };
        sealed.stopped = result.err();
        sealed
    }

    /// Seals segments that fit one datagram each: each is written where it is sealed and sent from.
    fn seal_segments(
        &mut self,
        segments: &mut Segments<'_>,
        sealed: &mut Sealed,
    ) -> Result<(), DropReason> {
        let sealer = self.sealer;
        let counters = sealer.reserve(segments.remaining() as u32);
        for counter in counters.ok_or(DropReason::NoSession)? {
            let Some(len) = segments.next_len() else {
                break;
            };
            let mut slot = self.reserve(len);
            let Some(segment) = segments.next_into(&mut slot[DATA_HEADER_LEN..]) else {
                break;
            };
            sealer
                .seal(counter, checksum_flag(segment.csum_partial), &mut slot)
                .map_err(|_| DropReason::TooBig)?;
            slot.commit();
            sealed.packets += 1;
            sealed.bytes += len;
        }
        Ok(())
    }

    /// Seals packets that are split, each over several datagrams.
    fn seal_splits(
        &mut self,
        segments: &mut Segments<'_>,
        scratch: &mut [u8],
        sealed: &mut Sealed,
    ) -> Result<(), DropReason> {
        while let Some(len) = segments.next_len() {
            let Some(segment) = segments.next_into(scratch) else {
                break;
            };
            self.seal_parts(&scratch[..segment.len], checksum_flag(segment.csum_partial))?;
            sealed.packets += 1;
            sealed.bytes += len;
        }
        Ok(())
    }

    /// Seals packets that may be too big for a datagram, where none may be split.
    #[cold]
    fn seal_unsplit(
        &mut self,
        segments: &mut Segments<'_>,
        scratch: &mut [u8],
        sealed: &mut Sealed,
    ) -> Result<(), DropReason> {
        while let Some(len) = segments.next_len() {
            let Some(segment) = segments.next_into(scratch) else {
                break;
            };
            let packet = &mut scratch[..segment.len];
            let parsed = Parsed::parse(packet)?;
            match unsplit(&parsed, packet, self.mtu) {
                Unsplit::Whole => self.seal_parts(packet, checksum_flag(segment.csum_partial))?,
                Unsplit::Fragment => {
                    if segment.csum_partial {
                        parsed.finish_checksum(packet);
                    }
                    self.seal_fragments(&parsed, packet)?;
                }
                Unsplit::Refuse => return Err(DropReason::TooBig),
            }
            sealed.packets += 1;
            sealed.bytes += len;
        }
        Ok(())
    }

    /// Seals one IPv4 packet in fragments, each in a datagram.
    fn seal_fragments(&mut self, parsed: &Parsed, packet: &[u8]) -> Result<(), DropReason> {
        let mut fragments = Fragments::new(parsed, packet, self.mtu).ok_or(DropReason::TooBig)?;
        let mut fragment = vec![0; self.mtu];
        while let Some(len) = fragments.next_into(&mut fragment) {
            self.seal_parts(&fragment[..len], Flags::NONE)?;
        }
        Ok(())
    }

    /// Seals one packet in several datagrams of equal length, which suits the batch.
    fn seal_parts(&mut self, packet: &[u8], all: Flags) -> Result<(), DropReason> {
        let count = packet.len().div_ceil(self.mtu);
        let size = packet.len().div_ceil(count);
        let counters = self.sealer.reserve(count as u32);
        let counters = counters.ok_or(DropReason::NoSession)?;
        for (index, (part, counter)) in packet.chunks(size).zip(counters).enumerate() {
            let mut flags = all;
            if index > 0 {
                flags = flags.with(Flags::CONTINUES);
            }
            if index + 1 < count {
                flags = flags.with(Flags::MORE);
            }
            let sealer = self.sealer;
            let mut slot = self.reserve(part.len());
            slot[DATA_HEADER_LEN..][..part.len()].copy_from_slice(part);
            sealer
                .seal(counter, flags, &mut slot)
                .map_err(|_| DropReason::TooBig)?;
            slot.commit();
        }
        Ok(())
    }

    /// Reserves space in the batch for a plaintext of `len` bytes. Sends what is in the way first.
    #[inline]
    fn reserve(&mut self, len: usize) -> Reservation<'_> {
        let Self {
            parts,
            batch,
            destination,
            ..
        } = self;
        batch.reserve(len + DATA_OVERHEAD, destination, |batch| send(parts, batch))
    }
}

fn checksum_flag(partial: bool) -> Flags {
    if partial {
        Flags::CSUM_PARTIAL
    } else {
        Flags::NONE
    }
}

/// Sends a batch. Counts it for its peer if the kernel refused any of it.
fn send(parts: &LaneParts, batch: Batch<'_>) {
    let Destination {
        peer,
        endpoint,
        ecn,
    } = &batch.destination;
    // While the buffer is full, packets wait at the TUN.
    let wait = WhenFull::Wait(parts.stop.as_fd());
    if let Err(error) = (parts.udp).send(endpoint, *ecn, batch.bytes, batch.stride, wait) {
        debug!(%error, "sending failed");
        parts.shared.peer_drops[usize::from(peer.0)]
            .add(DropReason::SendFailed, batch.count as u64);
    }
}
