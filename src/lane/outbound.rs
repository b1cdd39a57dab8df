//! Out of this host: from a queue of the TUN into the tunnel, as the head of [`super`] tells.
//!
//! Owns what is on its way there. Whoever holds an [`Outbound`] may run it; two of one lane, of which
//! one only answers, never use a counter twice, for those are given out by the session.

use std::io::IoSlice;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::debug;

use super::shared::{BURST, BURST_BYTES, Context, LaneParts};
use super::slow_path::Aside;
use super::to_control::LaneError;
use crate::channel::session::Sealer;
use crate::channel::wire::{DATA_HEADER_LEN, DATA_OVERHEAD, Flags};
use crate::flow::role::Judgement;
use crate::io::batch::{Batch, Destination, Reservation, SendBatch};
use crate::io::tun::{MAX_FRAME, VNET_HDR_LEN};
use crate::model::drops::{DropReason, Dropped};
use crate::packet::ecn;
use crate::packet::offload::{Offload, Segments, VnetHdr};
use crate::packet::{Fragment, Parsed};

/// Pause before an interface that somebody set down is read again.
const DEVICE_DOWN_PAUSE: Duration = Duration::from_millis(50);

/// One direction of a lane: TUN to tunnel.
pub(super) struct Outbound {
    pub(super) parts: Arc<LaneParts>,
    /// What was read from the TUN.
    pub(super) frame: Box<[u8]>,
    /// What is about to be sent.
    batch: SendBatch,
    /// Where a packet that is split is put together first.
    scratch: Box<[u8]>,
    /// For packets out of the ordinary.
    pub(super) aside: Aside<()>,
}

impl Outbound {
    /// With nothing on its way.
    pub(super) fn new(parts: Arc<LaneParts>, now: Instant) -> Self {
        Self {
            parts,
            frame: vec![0; MAX_FRAME].into_boxed_slice(),
            batch: SendBatch::new(),
            scratch: vec![0; MAX_FRAME].into_boxed_slice(),
            aside: Aside::new(now),
        }
    }

    /// Takes what waits at the TUN into the tunnel, up to a turn's worth; whether more may wait.
    pub(super) fn drain(&mut self, context: Context<'_>) -> Result<bool, LaneError> {
        let (mut frames, mut bytes) = (0, 0);
        let result = loop {
            match self.parts.tun.recv(&mut self.frame) {
                Ok(len) => {
                    let result = self.route(context, len);
                    if result.is_err() || self.aside.has_news() {
                        self.after_frame(context, len, result);
                    }
                    (frames, bytes) = (frames + 1, bytes + len);
                    if frames == BURST || bytes >= BURST_BYTES {
                        break Ok(true);
                    }
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => break Ok(false),
                    Some(libc::EINTR) => {}
                    // Set down by somebody: nothing to read until it is up again.
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

    /// Finds where the frame in `self.frame[..len]` goes, rewrites it and has it sealed.
    pub(super) fn route(&mut self, context: Context<'_>, len: usize) -> Result<(), Dropped> {
        let (vnet, packet) = self.frame[..len]
            .split_first_chunk_mut::<VNET_HDR_LEN>()
            .ok_or(DropReason::IpMalformed)?;
        let vnet = VnetHdr::read(vnet);
        let mut parsed = Parsed::parse(packet)?;
        if parsed.fragment() != Fragment::None {
            self.aside.note_piece(context, &parsed, packet)?;
        }
        let forwarder = &self.parts.shared.translation;
        let Judgement::Carry(outgoing) = forwarder.judge(context.now, &parsed, packet)? else {
            return self.bounce(len);
        };
        // What is bounced goes back as it came: a checksum is only finished behind this line.
        let offload = Offload::accept(&vnet, packet, &parsed)?;
        let partial = offload.partial();
        let peer = outgoing.rewrite(context.now, packet, &mut parsed, partial)?;
        let view = context.view.peer(peer);
        let (Some(session), Some(path)) = (&view.session, view.path) else {
            return Err(Dropped::of(peer, DropReason::NoSession));
        };
        view.clamp_mss(packet, &parsed, partial);
        let destination = Destination {
            peer,
            path,
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
        session.activity().sent(context.now);
        counters.add(sealed.packets, sealed.bytes);
        match sealed.stopped {
            None => Ok(()),
            Some(reason) => Err(Dropped::of(peer, reason)),
        }
    }

    /// Gives a packet that was captured with others, but has not moved, back to this host's stack.
    fn bounce(&self, len: usize) -> Result<(), Dropped> {
        self.parts
            .tun
            .send(&[IoSlice::new(&self.frame[..len])])
            .map_err(|_| DropReason::TunWriteFailed.into())
    }

    /// Sends what waits in the batch.
    pub(super) fn flush(&mut self) {
        if let Some(batch) = self.batch.take() {
            send(&self.parts, batch);
        }
    }
}

/// Cuts one packet, however long, and seals the pieces into the batch.
pub(super) struct Sealing<'a> {
    parts: &'a LaneParts,
    batch: &'a mut SendBatch,
    sealer: &'a Sealer,
    destination: Destination,
    /// Largest plaintext of one datagram.
    pub(super) mtu: usize,
}

/// What became of the pieces.
#[derive(Default)]
pub(super) struct Sealed {
    pub(super) packets: usize,
    pub(super) bytes: usize,
    /// Why not all of them were sealed.
    stopped: Option<DropReason>,
}

impl Sealing<'_> {
    fn seal_all(&mut self, mut segments: Segments<'_>, scratch: &mut [u8]) -> Sealed {
        let mut sealed = Sealed::default();
        // The first segment is the longest.
        let result = if segments.next_len().is_some_and(|len| len <= self.mtu) {
            self.seal_segments(&mut segments, &mut sealed)
        } else if self.parts.split {
            self.seal_splits(&mut segments, scratch, &mut sealed)
        } else {
            self.seal_cuts(&mut segments, scratch, &mut sealed)
        };
        sealed.stopped = result.err();
        sealed
    }

    /// One datagram a packet: each is written where it is sealed and sent from.
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

    /// Several datagrams a packet.
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

    /// One packet in several datagrams of equal length, which suits the batch.
    pub(super) fn seal_parts(&mut self, packet: &[u8], all: Flags) -> Result<(), DropReason> {
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

    /// Room in the batch for a plaintext of `len` bytes; what is in the way is sent first.
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

pub(super) fn checksum_flag(partial: bool) -> Flags {
    if partial {
        Flags::CSUM_PARTIAL
    } else {
        Flags::NONE
    }
}

/// Sends a batch, and counts it for its peer if the kernel refused any of it.
fn send(parts: &LaneParts, batch: Batch<'_>) {
    let Destination { peer, path, ecn } = &batch.destination;
    if let Err(error) = parts.udp.send(path, *ecn, batch.bytes, batch.stride) {
        debug!(%error, "sending failed");
        parts.shared.peer_drops[usize::from(peer.0)]
            .add(DropReason::SendFailed, batch.count as u64);
    }
}
