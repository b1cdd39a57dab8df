//! The inbound direction: out of the tunnel to a queue of the TUN. [`super`] tells its steps.
//!
//! Owns the packets that are on their way in. Whoever holds an [`Inbound`] may run it.

use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use tracing::debug;

use super::helper::{Turn, Work};
use super::outbox::Outbox;
use super::receive_ring::ReceiveRing;
use super::shared::{BURST, BURST_BYTES, Context, LaneParts, Seen, TICK};
use super::slow_path::{InboundOutcome, SlowPath};
use super::to_control::{Queue, ToControl};
use super::to_host::{self, Arrival};
use crate::channel::parts::{Part, Reassembler, Stream};
use crate::channel::session::OpenBatch;
use crate::channel::tunnel::MAX_MESSAGE;
use crate::channel::wire::{Flags, Message};
use crate::io::tun::TunQueue;
use crate::io::udp::{RECV_SLOT, Received};
use crate::model::drops::{DropReason, Dropped};
use crate::model::peer::PeerId;
use crate::packet::coalesce::{Coalescer, MAX_BIG, MAX_PARTS, MAX_SUPER, Push, Reach};
use crate::packet::ecn;
use crate::packet::fragment::Key;
use crate::packet::vnet::VnetHdr;
use crate::packet::{Fragment, Parsed};

/// Size of the receive buffer: the most that is coalesced, beginning anywhere in a batch. A
/// super-packet of 64 KiB takes two sends once it is sealed, so that even it arrives in two
/// batches.
const fn receive_buffer(reach: Reach) -> usize {
    match reach {
        // Headers and tags add a sixteenth.
        Reach::Here => (MAX_BIG.div_ceil(RECV_SLOT) + 2) * RECV_SLOT,
        Reach::Further => 2 * RECV_SLOT,
    }
}

/// Pause before more than 64 KiB are coalesced again after the kernel had no memory for it.
const LONG_PAUSE: Duration = Duration::from_secs(10);

/// A packet, or a part of one, that was opened.
struct Plain {
    peer: PeerId,
    /// Where it lies in the slab.
    range: Range<usize>,
    flags: Flags,
    stream: Stream,
    counter: u64,
}

/// One direction of a lane: tunnel to TUN.
pub(super) struct Inbound {
    parts: Arc<LaneParts>,
    /// Received datagrams, opened in place.
    slab: Box<[u8]>,
    ring: ReceiveRing,
    /// Packets that were opened and not yet delivered.
    opened: Vec<Plain>,
    /// The peer whose packets the coalescer holds.
    coalescing: PeerId,
    coalescer: Coalescer,
    /// One for each peer, so that no peer takes another's space.
    reassemblers: Vec<Reassembler>,
    /// When to coalesce more than 64 KiB again.
    long_again: Option<Instant>,
    detour: Detour,
    ticked: Instant,
    /// By the helper thread.
    seen: Seen,
}

/// The slow path of this direction: fragments, packets that were reassembled from parts, and
/// packets that do not go on.
struct Detour {
    slow_path: SlowPath<Arrival>,
    outbox: Outbox,
}

impl Inbound {
    /// Starts with nothing on its way.
    pub(super) fn new(parts: Arc<LaneParts>, outbox: Outbox, now: Instant) -> Self {
        Self {
            slab: vec![0; receive_buffer(parts.reach)].into_boxed_slice(),
            ring: ReceiveRing::new(receive_buffer(parts.reach)),
            opened: Vec::new(),
            coalescing: PeerId(0),
            coalescer: Coalescer::new(parts.uso, parts.reach),
            reassemblers: (0..parts.counters.peers.len())
                .map(|_| Reassembler::default())
                .collect(),
            long_again: None,
            detour: Detour {
                slow_path: SlowPath::new(now, parts.shared.view.load().forwarder.inbound_client()),
                outbox,
            },
            ticked: now,
            seen: Seen::default(),
            parts,
        }
    }

    /// Takes what waits at the socket out of the tunnel, up to a turn's worth. Returns whether more
    /// may wait.
    pub(super) fn drain(&mut self, context: Context<'_>) -> bool {
        let (mut more, mut batches, mut bytes) = (true, 0, 0);
        while batches < BURST && bytes < BURST_BYTES {
            let start = self.next_slot(context);
            match self.parts.udp.recv(&mut self.slab[start..][..RECV_SLOT]) {
                Ok(received) => {
                    (batches, bytes) = (batches + 1, bytes + received.len);
                    self.ring.took(start, received.len);
                    self.open_all(context, start, &received);
                }
                Err(error) => {
                    // The socket reports an error that was queued on it only once. After any other
                    // error too, the right thing is to wait for the next datagram.
                    if error.kind() != io::ErrorKind::WouldBlock {
                        debug!(%error, "receiving failed");
                    }
                    more = false;
                    break;
                }
            }
        }
        self.flush(context);
        more
    }

    /// Where to receive the next batch. Writes what is in the way first.
    fn next_slot(&mut self, context: Context<'_>) -> usize {
        self.ring
            .next(self.coalescer.held_from())
            .unwrap_or_else(|| {
                self.flush(context);
                0
            })
    }

    /// Opens every datagram of the batch at `base`, then delivers what was in them.
    fn open_all(&mut self, context: Context<'_>, base: usize, received: &Received) {
        let mut opened = std::mem::take(&mut self.opened);
        // The lock of a replay window is taken once for a batch, and released before anything is
        // written.
        let mut opening = None;
        let mut start = base;
        while start < base + received.len {
            let end = (base + received.len).min(start + received.stride);
            match self.open(context, &mut opening, start..end, received) {
                Ok(Some(plain)) => opened.push(plain),
                Ok(None) => {}
                Err(drop) => self.parts.count(drop),
            }
            start = end;
        }
        drop(opening);
        for plain in opened.drain(..) {
            let result = if plain.flags.has(Flags::CONTINUES) || plain.flags.has(Flags::MORE) {
                self.reassemble(context, &plain, received.ecn)
            } else {
                self.deliver(context, &plain, received.ecn)
            };
            if let Err(drop) = result {
                self.parts.count(drop);
            }
        }
        self.opened = opened;
    }

    /// Opens the datagram in `self.slab[range]`. What is not a packet goes to the control task.
    fn open<'v>(
        &mut self,
        context: Context<'v>,
        opening: &mut Option<(u32, OpenBatch<'v>)>,
        range: Range<usize>,
        received: &Received,
    ) -> Result<Option<Plain>, Dropped> {
        let datagram = &mut self.slab[range.clone()];
        let data = match Message::parse(datagram)? {
            Message::Data(data) => data,
            Message::Initiation(_) | Message::Response(_) => {
                let from = received.endpoint.remote;
                let mac_check = &self.parts.shared.mac_check;
                let admitted = mac_check.admit(context.now, from, datagram)?;
                let peer = admitted.peer();
                let queue = Queue::Handshakes;
                (self.parts).tell(context.now, peer, queue, |permit| ToControl::Handshake {
                    endpoint: received.endpoint,
                    admitted,
                    _permit: permit,
                })?;
                return Ok(None);
            }
        };
        let current;
        let (session, opened) = match context.view.sessions.get(&data.receiver) {
            Some(session) => {
                if opening
                    .as_ref()
                    .is_none_or(|(index, _)| *index != data.receiver)
                {
                    // Release one session's window before taking another's.
                    *opening = None;
                }
                let (_, batch) =
                    opening.get_or_insert_with(|| (data.receiver, session.open_batch()));
                (session, batch.open(data, datagram))
            }
            None => {
                // The session may have been agreed since this wake-up began.
                current = self.parts.shared.view.load();
                let session = current.sessions.get(&data.receiver);
                let session = session.ok_or(DropReason::SessionUnknown)?;
                (session, session.open(data, datagram))
            }
        };
        let peer = session.peer();
        let opened = opened.map_err(|reason| Dropped::of(peer, reason))?;
        session.activity().data_received(context.now);
        let plaintext = range.start + opened.plaintext.start..range.start + opened.plaintext.end;
        let moved = opened.newest && context.view.peer(peer).endpoint != Some(received.endpoint);
        if opened.flags.has(Flags::CONTROL) {
            let length = plaintext.len().min(MAX_MESSAGE);
            let message = &self.slab[plaintext][..length];
            (self.parts).tell(context.now, peer, Queue::Messages, |permit| {
                ToControl::Control {
                    session: Arc::clone(session),
                    // A datagram that was delayed says where the peer was, not where it is.
                    heard_from: (opened.first || moved).then_some(received.endpoint),
                    message: message.to_vec(),
                    _permit: permit,
                }
            })?;
            return Ok(None);
        }
        if opened.first || moved {
            // If the control task is too busy now, the next datagram tells it.
            let queue = Queue::Sightings;
            let _ = (self.parts).tell(context.now, peer, queue, |permit| ToControl::Heard {
                session: Arc::clone(session),
                endpoint: received.endpoint,
                _permit: permit,
            });
        }
        Ok(Some(Plain {
            peer,
            range: plaintext,
            flags: opened.flags,
            stream: Stream {
                session: data.receiver,
                lane: opened.lane,
            },
            counter: opened.counter,
        }))
    }

    /// Takes a part of a packet, and delivers the packet once all of it is here.
    fn reassemble(
        &mut self,
        context: Context<'_>,
        plain: &Plain,
        outer_ecn: u8,
    ) -> Result<(), Dropped> {
        // Packets that came before it go first.
        self.flush(context);
        let part = Part {
            counter: plain.counter,
            continues: plain.flags.has(Flags::CONTINUES),
            more: plain.flags.has(Flags::MORE),
            bytes: &self.slab[plain.range.clone()],
        };
        let partial = plain.flags.has(Flags::CSUM_PARTIAL);
        let reassembler = &mut self.reassemblers[usize::from(plain.peer.0)];
        let result = match reassembler.push(plain.stream, part) {
            None => Ok(()),
            Some(packet) => {
                let arrival = Arrival {
                    peer: plain.peer,
                    partial,
                    outer_ecn,
                };
                self.detour.deliver(&self.parts, context, packet, arrival)
            }
        };
        let incomplete = self.reassemblers[usize::from(plain.peer.0)].take_incomplete();
        self.parts.shared.peer_drops[usize::from(plain.peer.0)]
            .add(DropReason::ReassemblyIncomplete, incomplete);
        result
    }

    /// Coalesces a packet with the one before it, if it continues that one.
    fn deliver(
        &mut self,
        context: Context<'_>,
        plain: &Plain,
        outer_ecn: u8,
    ) -> Result<(), Dropped> {
        let known = |reason| Dropped::of(plain.peer, reason);
        let range = plain.range.clone();
        let partial = plain.flags.has(Flags::CSUM_PARTIAL);
        if plain.peer == self.coalescing
            && self.parts.tso
            && ecn::changes_nothing(outer_ecn)
            && self.coalescer.follow(&self.slab, range.clone(), partial)
        {
            return Ok(());
        }
        let packet = &mut self.slab[range.clone()];
        let parsed = Parsed::parse(packet).map_err(known)?;
        if parsed.fragment() != Fragment::None {
            return self.deliver_fragment(context, plain, outer_ecn);
        }
        if partial && !parsed.may_be_partial() {
            return Err(known(DropReason::BadChecksumFlag));
        }
        ecn::carry_over(packet, &parsed, outer_ecn).map_err(known)?;
        if plain.peer != self.coalescing || !self.parts.tso {
            self.flush(context);
            self.coalescing = plain.peer;
        }
        let pushed = self
            .coalescer
            .push(&self.slab, range.clone(), &parsed, partial);
        if pushed == Push::MustFlush {
            self.flush(context);
            // The coalescer is empty now, so it takes any packet.
            let _ = self.coalescer.push(&self.slab, range, &parsed, partial);
        }
        Ok(())
    }

    /// Writes a fragment, which is not coalesced with anything.
    #[cold]
    fn deliver_fragment(
        &mut self,
        context: Context<'_>,
        plain: &Plain,
        outer_ecn: u8,
    ) -> Result<(), Dropped> {
        // Packets that came before it go first.
        self.flush(context);
        let arrival = Arrival {
            peer: plain.peer,
            partial: plain.flags.has(Flags::CSUM_PARTIAL),
            outer_ecn,
        };
        let packet = &mut self.slab[plain.range.clone()];
        self.detour.deliver(&self.parts, context, packet, arrival)
    }

    /// Rewrites the super-packet that was coalesced, and writes it to the TUN.
    fn flush(&mut self, context: Context<'_>) {
        let peer = self.coalescing;
        let Some(coalesced) = self.coalescer.finish(&mut self.slab) else {
            return;
        };
        let packets = coalesced.packets;
        let bytes = coalesced.parsed.total() + (packets - 1) * coalesced.parsed.payload();
        let mut parsed = coalesced.parsed;
        parsed.set_packets(packets as u16);
        let head = &mut self.slab[coalesced.parts[0].clone()];
        let partial = coalesced.partial;
        let routed = to_host::rewrite(context, peer, head, &mut parsed, partial);
        if let Err(drop) = routed {
            let arrival = Arrival {
                peer,
                partial,
                outer_ecn: 0,
            };
            let parts = &self.parts;
            let refused = (self.detour).refuse(parts, context, head, &parsed, arrival, drop);
            if let Err(drop) = refused {
                parts.shared.peer_drops[usize::from(peer.0)].add(drop.reason, packets as u64);
            }
            return;
        }
        let vnet = coalesced.vnet.to_bytes();
        let result = match write_whole(&self.parts.tun, &vnet, &self.slab, coalesced.parts) {
            Ok(None) => Ok(()),
            Ok(Some(error)) => {
                if parsed.total() > MAX_SUPER {
                    self.stay_short(context.now, &error);
                }
                self.write_apart(parsed.total(), partial)
            }
            Err(error) => Err(error),
        };
        match result {
            Ok(()) => self.parts.counters.peers[usize::from(peer.0)]
                .rx
                .add(packets, bytes),
            Err(error) => {
                debug!(%error, "the TUN refused a packet");
                self.parts.shared.peer_drops[usize::from(peer.0)]
                    .add(DropReason::TunWriteFailed, packets as u64);
            }
        }
    }

    /// Coalesces no more than 64 KiB from now on: for good if this kernel's TUN takes no more, for
    /// a while if the kernel has no memory in pieces as large as that.
    #[cold]
    fn stay_short(&mut self, now: Instant, error: &io::Error) {
        let passes = matches!(error.raw_os_error(), Some(libc::ENOMEM | libc::ENOBUFS));
        self.long_again = passes.then_some(now + LONG_PAUSE);
        self.coalescer.set_reach(Reach::Further);
        self.parts.counters.big_tcp_refused.store(true, Relaxed);
        debug!(%error, "the TUN takes no more than 64 KiB");
    }

    /// Writes in smaller units what the kernel did not take whole. A packet of more than 64 KiB
    /// becomes super-packets of at most 64 KiB; any other is written packet by packet.
    #[cold]
    fn write_apart(&mut self, total: usize, partial: bool) -> io::Result<()> {
        let fallbacks = &self.parts.counters.tun_gso_fallbacks;
        fallbacks.store(fallbacks.load(Relaxed) + 1, Relaxed);
        let (vnet, parts) = self.coalescer.take_apart(&mut self.slab);
        if total <= MAX_SUPER {
            return write_singly(&self.parts.tun, vnet, &self.slab, parts);
        }
        let parts = parts.to_vec();
        let mut shorter = Coalescer::new(self.parts.uso, Reach::Further);
        for part in parts {
            let parsed = Parsed::parse(&self.slab[part.clone()]);
            // It was parsed before, and only its head was rewritten since.
            let parsed = parsed.map_err(|_| io::ErrorKind::InvalidData)?;
            let push = shorter.push(&self.slab, part.clone(), &parsed, partial);
            if push == Push::MustFlush {
                write_coalesced(&self.parts.tun, &mut shorter, &mut self.slab)?;
                let _ = shorter.push(&self.slab, part, &parsed, partial);
            }
        }
        write_coalesced(&self.parts.tun, &mut shorter, &mut self.slab)
    }

    /// Whether there is something new in the outbox. Ask after each turn.
    pub(super) fn has_posted(&mut self) -> bool {
        self.detour.outbox.take_news()
    }

    /// Lets fragments expire, and allows more than 64 KiB again once it is time. Call it often.
    pub(super) fn tick(&mut self, now: Instant) {
        if now.duration_since(self.ticked) < TICK {
            return;
        }
        self.ticked = now;
        while let Some(held) = self.detour.slow_path.expire(now) {
            let unknown = DropReason::FragmentUnknown;
            self.parts.count(Dropped::of(held.with.peer, unknown));
        }
        if self.long_again.is_some_and(|at| at <= now) {
            self.long_again = None;
            self.coalescer.set_reach(self.parts.reach);
            self.parts.counters.big_tcp_refused.store(false, Relaxed);
        }
    }
}

/// The work that the helper thread can do.
impl Work for Inbound {
    fn work(&self) -> BorrowedFd<'_> {
        self.parts.udp.as_fd()
    }

    fn stop(&self) -> BorrowedFd<'_> {
        self.parts.stop.as_fd()
    }

    fn turn(&mut self, waits: bool) -> Turn {
        self.parts.counters.inbound.count();
        let view = self.parts.shared.view.load_full();
        self.seen.wipe_after(&view);
        let context = Context {
            now: Instant::now(),
            view: &view,
        };
        let more = waits && self.drain(context);
        self.tick(context.now);
        Turn {
            more,
            has_news: self.has_posted(),
        }
    }
}

impl Detour {
    /// Writes a packet that is not coalesced with others.
    fn deliver(
        &mut self,
        parts: &LaneParts,
        context: Context<'_>,
        packet: &mut [u8],
        arrival: Arrival,
    ) -> Result<(), Dropped> {
        let known = |reason| Dropped::of(arrival.peer, reason);
        let parsed = Parsed::parse(packet).map_err(known)?;
        if parsed.fragment() != Fragment::None {
            (self.slow_path)
                .note_fragment(context.now, Some(arrival.peer), &parsed, packet)
                .map_err(known)?;
        }
        match to_host::deliver(parts, context, packet, arrival) {
            Ok(()) => {
                self.release(parts, context);
                Ok(())
            }
            Err(drop) => self.refuse(parts, context, packet, &parsed, arrival, drop),
        }
    }

    /// Sends on the fragments that came before their first one, which has just gone on.
    fn release(&mut self, parts: &LaneParts, context: Context<'_>) {
        for mut held in self.slow_path.release() {
            if let Err(drop) = to_host::deliver(parts, context, &mut held.bytes, held.with) {
                parts.count(drop);
            }
        }
    }

    /// Handles a packet, or the head of a super-packet, that is not written.
    ///
    /// # Errors
    /// The packet is dropped. The caller counts it.
    #[cold]
    fn refuse(
        &mut self,
        parts: &LaneParts,
        context: Context<'_>,
        packet: &mut [u8],
        parsed: &Parsed,
        arrival: Arrival,
        drop: Dropped,
    ) -> Result<(), Dropped> {
        let forwarder = &context.view.forwarder;
        let slow_path = &mut self.slow_path;
        match slow_path.refuse_inbound(context, forwarder, packet, parsed, drop) {
            InboundOutcome::Hold(key) => {
                self.hold(parts, context, key, packet, arrival);
                return Ok(());
            }
            InboundOutcome::Fragment(mtu) => {
                return to_host::write_fragments(parts, packet, parsed, arrival, mtu);
            }
            InboundOutcome::Reply(bytes) => {
                if let Err(reason) = self.outbox.post(bytes) {
                    parts.count(Dropped::of(arrival.peer, reason));
                }
            }
            InboundOutcome::ReplyLimited => {
                parts.count(Dropped::of(arrival.peer, DropReason::ReplyLimited));
            }
            InboundOutcome::Drop => {}
        }
        Err(drop)
    }

    /// Keeps a fragment until the first one of its packet comes.
    fn hold(
        &mut self,
        parts: &LaneParts,
        context: Context<'_>,
        key: Key,
        packet: &[u8],
        arrival: Arrival,
    ) {
        for given_up in self.slow_path.hold(context.now, key, arrival, packet) {
            let unknown = DropReason::FragmentUnknown;
            parts.count(Dropped::of(given_up.with.peer, unknown));
        }
    }
}

/// Writes what was coalesced, or packet by packet if the kernel does not take it whole.
fn write_coalesced(tun: &TunQueue, coalescer: &mut Coalescer, slab: &mut [u8]) -> io::Result<()> {
    let Some(coalesced) = coalescer.finish(slab) else {
        return Ok(());
    };
    if write_whole(tun, &coalesced.vnet.to_bytes(), slab, coalesced.parts)?.is_none() {
        return Ok(());
    }
    let (vnet, parts) = coalescer.take_apart(slab);
    write_singly(tun, vnet, slab, parts)
}

/// Writes one packet that consists of these parts. Returns the kernel's error if it did not take
/// the packet whole but may take its parts.
fn write_whole(
    tun: &TunQueue,
    vnet: &[u8],
    slab: &[u8],
    parts: &[Range<usize>],
) -> io::Result<Option<io::Error>> {
    // Most packets come alone, and the array for all slices is some kilobytes to clear.
    if let [packet] = parts {
        let packet = IoSlice::new(&slab[packet.clone()]);
        return tun.send(&[IoSlice::new(vnet), packet]).map(|()| None);
    }
    match write_gathered(tun, vnet, slab, parts) {
        Ok(()) => Ok(None),
        Err(error) if is_too_much(&error) => Ok(Some(error)),
        Err(error) => Err(error),
    }
}

/// Writes one packet, gathered from where its parts lie.
fn write_gathered(
    tun: &TunQueue,
    vnet: &[u8],
    slab: &[u8],
    parts: &[Range<usize>],
) -> io::Result<()> {
    let mut slices = [IoSlice::new(&[]); 1 + MAX_PARTS];
    slices[0] = IoSlice::new(vnet);
    for (slice, part) in slices[1..].iter_mut().zip(parts) {
        *slice = IoSlice::new(&slab[part.clone()]);
    }
    tun.send_coalesced(&slices[..=parts.len()])
}

fn write_singly(
    tun: &TunQueue,
    vnet: VnetHdr,
    slab: &[u8],
    parts: &[Range<usize>],
) -> io::Result<()> {
    let vnet = vnet.to_bytes();
    parts
        .iter()
        .try_for_each(|part| tun.send(&[IoSlice::new(&vnet), IoSlice::new(&slab[part.clone()])]))
}

/// Whether the kernel may take in parts what it refused whole.
fn is_too_much(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::EMSGSIZE | libc::ENOMEM | libc::ENOBUFS)
    )
}
