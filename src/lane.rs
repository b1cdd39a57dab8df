//! The journey of a packet. A lane is one thread that owns one TUN queue and one UDP socket.
//!
//! Out of this host, from the TUN into the tunnel ([`Lane::drain_tun`]):
//!
//! 1. read a super-packet with its `virtio_net_hdr`;
//! 2. parse it, look its flow up and rewrite it, once ([`Lane::route_out`]);
//! 3. cut it to datagrams and seal each where it lies in the send batch ([`Sealing::seal_all`]);
//! 4. send the batch in one call ([`Lane::flush_udp`]).
//!
//! Into this host, from the tunnel to the TUN ([`Lane::drain_udp`]):
//!
//! 1. receive a batch of datagrams;
//! 2. open each where it lies ([`Lane::open`]);
//! 3. join it with the one before it, if the two are adjacent ([`Lane::deliver`]);
//! 4. parse, look the flow up and rewrite, once, and write it to the TUN ([`Lane::flush_tun`]).
//!
//! Nothing here waits for anybody else: sessions and endpoints come as a snapshot from the control
//! task, and what is not a packet (handshakes, control messages) goes to it through a bounded queue.
//! There is no allocation per packet and no lock is held across a system call.

mod aside;
mod room;

use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use aside::{Arriving, Aside};
use room::Room;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::sync::mpsc;
use tracing::debug;

use crate::batch::{Destination, SendBatch};
use crate::drops::DropReason;
use crate::ecn;
use crate::io::tun::{MAX_FRAME, TunQueue, VNET_HDR_LEN};
use crate::io::udp::{RECV_SLOT, Received, UdpSocket};
use crate::join::{Joiner, Part, Stream};
use crate::offload::{Coalescer, MAX_BIG, MAX_SUPER, Offload, Push, Reach, Segments, VnetHdr};
use crate::packet::{Fragment, Parsed, clamp_mss};
use crate::peer::{Path, PeerId};
use crate::session::{Admitted, OpenBatch, Sealer, Session};
use crate::shared::{LaneCounters, Queue, Shared, Translation, View};
use crate::translate::{Gate, Verdict};
use crate::tunnel::MAX_MESSAGE;
use crate::wire::{DATA_HEADER_LEN, DATA_OVERHEAD, Flags, Message};

/// Frames or batches taken from one side before the other side gets its turn. More amortises the
/// wake-up further: 8 was worth 25 to 40 % over 1 for full super-packets; small packets, of which
/// one batch holds many, are worth more.
const BURST: usize = 64;

/// Bytes taken from one side before the other side gets its turn: 8 full super-packets, beyond which
/// latency suffers.
const BURST_BYTES: usize = 8 * 65_536;

/// Size of the receive buffer: what is joined at most, begun anywhere in a batch. A super-packet of
/// 64 KiB takes two sends once it is sealed, so that even it arrives in two batches.
const fn receive_buffer(reach: Reach) -> usize {
    match reach {
        // Headers and tags make it a sixteenth more.
        Reach::Here => (MAX_BIG.div_ceil(RECV_SLOT) + 2) * RECV_SLOT,
        Reach::Further => 2 * RECV_SLOT,
    }
}

/// How often expiring flows are looked at, and longest wait without a packet.
const TICK: Duration = Duration::from_secs(1);

/// Pause before more than 64 KiB are joined again after the kernel had no memory for it.
const LONG_PAUSE: Duration = Duration::from_secs(10);

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
    /// Packets too big for one datagram go in several (`--no-split` says no).
    pub split: bool,
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
    room: Room,
    /// What was opened and not yet delivered.
    opened: Vec<Plain>,
    /// Whose packets the coalescer holds.
    joining: PeerId,
    coalescer: Coalescer,
    /// One for each peer, so that none has to make room for another.
    joiners: Vec<Joiner>,
    /// Where a packet that is split is put together first.
    scratch: Box<[u8]>,
    /// For packets out of the ordinary.
    aside: Aside,
    ticked: Instant,
    /// When more than 64 KiB are joined again.
    long_again: Option<Instant>,
}

/// What poll said, or what is known to wait.
#[derive(Clone, Copy, Default)]
struct Ready {
    tun: bool,
    udp: bool,
    stop: bool,
}

impl Ready {
    fn any(self) -> bool {
        self.tun || self.udp || self.stop
    }

    fn or(self, other: Self) -> Self {
        Self {
            tun: self.tun || other.tun,
            udp: self.udp || other.udp,
            stop: self.stop || other.stop,
        }
    }
}

/// A packet, or a part of one, that was opened.
struct Plain {
    peer: PeerId,
    /// Where it lies in the slab.
    range: Range<usize>,
    flags: Flags,
    stream: Stream,
    counter: u64,
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
            slab: vec![0; receive_buffer(parts.reach)].into_boxed_slice(),
            room: Room::new(receive_buffer(parts.reach)),
            opened: Vec::new(),
            joining: PeerId(0),
            coalescer: Coalescer::new(parts.uso, parts.reach),
            joiners: (0..parts.counters.peers.len())
                .map(|_| Joiner::default())
                .collect(),
            scratch: vec![0; MAX_FRAME].into_boxed_slice(),
            aside: Aside::new(Instant::now()),
            ticked: Instant::now(),
            long_again: None,
            parts,
        };
        let shared = Arc::clone(&lane.parts.shared);
        let mut ready = Ready::default();
        loop {
            // What had more than its turn's worth goes on at once, but never without asking the others.
            let patience = if ready.any() { Duration::ZERO } else { TICK };
            ready = match lane.wait(patience) {
                Ok(now_ready) => ready.or(now_ready),
                Err(error) => return lane.fail(format!("waiting for packets failed: {error}")),
            };
            if ready.stop {
                return;
            }
            let view = shared.view.load_full();
            let moment = Moment {
                now: Instant::now(),
                view: &view,
            };
            if ready.udp {
                ready.udp = lane.drain_udp(moment);
            }
            if ready.tun {
                ready.tun = match lane.drain_tun(moment) {
                    Ok(more) => more,
                    Err(error) => return lane.fail(error),
                };
            }
            lane.tick(moment.now);
        }
    }

    /// Waits until something is to be done, at most this long.
    fn wait(&self, patience: Duration) -> io::Result<Ready> {
        let mut fds = [
            PollFd::from_borrowed_fd(self.parts.tun.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.parts.udp.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.parts.stop.as_fd(), PollFlags::IN),
        ];
        let timeout = Timespec {
            tv_sec: patience.as_secs() as i64,
            tv_nsec: patience.subsec_nanos().into(),
        };
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) => Ok(Ready {
                tun: !fds[0].revents().is_empty(),
                udp: !fds[1].revents().is_empty(),
                stop: !fds[2].revents().is_empty(),
            }),
            Err(rustix::io::Errno::INTR) => Ok(Ready::default()),
            Err(error) => Err(error.into()),
        }
    }

    // Out of this host.

    /// Takes what waits at the TUN into the tunnel, up to a turn's worth; whether more may wait.
    fn drain_tun(&mut self, moment: Moment<'_>) -> Result<bool, String> {
        let (mut frames, mut bytes) = (0, 0);
        let result = loop {
            match self.parts.tun.recv(&mut self.frame) {
                Ok(len) => {
                    let result = self.route_out(moment, len);
                    if result.is_err() || self.aside.has_news() {
                        self.after_frame(moment, len, result);
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
                    _ => break Err(format!("the TUN interface is gone: {error}")),
                },
            }
        };
        self.flush_udp();
        result
    }

    /// Finds where the frame in `self.frame[..len]` goes, rewrites it and has it sealed.
    fn route_out(&mut self, moment: Moment<'_>, len: usize) -> Result<(), Dropped> {
        let (vnet, packet) = self.frame[..len]
            .split_first_chunk_mut::<VNET_HDR_LEN>()
            .ok_or(DropReason::IpMalformed)?;
        let vnet = VnetHdr::read(vnet);
        let mut parsed = Parsed::parse(packet)?;
        if parsed.fragment() != Fragment::None {
            self.aside.note_piece(moment, &parsed, packet)?;
        }
        let captured = match &self.parts.shared.translation {
            Translation::Old(gates) => match judge(gates, moment.now, &parsed, packet)? {
                (peer, Verdict::Carry) => Some(peer),
                (_, Verdict::Bounce) => return self.bounce(len),
            },
            Translation::New(_) => None,
        };
        // What is bounced goes back as it came: a checksum is only finished behind this line.
        let offload = Offload::accept(&vnet, packet, &parsed)?;
        let partial = offload.partial();
        let peer = match (&self.parts.shared.translation, captured) {
            (Translation::New(translator), _) => {
                translator.outbound(moment.now, packet, &mut parsed, partial)?
            }
            (Translation::Old(_), Some(peer)) => {
                let left = parsed.decrement_ttl(packet);
                left.map_err(|reason| Dropped::of(peer, reason))?;
                peer
            }
            (Translation::Old(_), None) => return Err(DropReason::NotMoved.into()),
        };
        let view = moment.view.peer(peer);
        let (Some(session), Some(path)) = (&view.session, view.path) else {
            return Err(Dropped::of(peer, DropReason::NoSession));
        };
        clamp(packet, &parsed, view.mtu, partial);
        let destination = Destination {
            peer,
            path,
            ecn: ecn::inner(packet, &parsed),
        };
        let segments = Segments::new(offload, packet, &parsed, view.mtu);
        let counters = &self.parts.counters.peers[usize::from(peer.0)].tx;
        let mut sealing = Sealing {
            batch: &mut self.batch,
            udp: &self.parts.udp,
            sealer: session
                .sealer(self.parts.number)
                .ok_or(Dropped::of(peer, DropReason::NoSession))?,
            destination,
            mtu: view.mtu,
            split: self.parts.split,
            refused: 0,
        };
        let sealed = sealing.seal_all(segments, &mut self.scratch);
        let refused = sealing.refused;
        session.activity().sent(moment.now);
        counters.add(sealed.packets, sealed.bytes);
        self.parts.shared.peer_drops[usize::from(peer.0)].add(DropReason::SendFailed, refused);
        match sealed.stopped {
            None => Ok(()),
            Some(reason) => Err(Dropped::of(peer, reason)),
        }
    }

    /// Gives a packet that was captured with others, but has not moved, back to this host's stack.
    fn bounce(&mut self, len: usize) -> Result<(), Dropped> {
        self.parts
            .tun
            .send(&[IoSlice::new(&self.frame[..len])])
            .map_err(|_| DropReason::TunWriteFailed.into())
    }

    /// Sends what waits in the batch.
    fn flush_udp(&mut self) {
        let refused = flush(&mut self.batch, &self.parts.udp);
        if let Some((peer, datagrams)) = refused {
            self.parts.shared.peer_drops[usize::from(peer.0)]
                .add(DropReason::SendFailed, datagrams);
        }
    }

    // Into this host.

    /// Takes what waits at the socket out of the tunnel, up to a turn's worth; whether more may wait.
    fn drain_udp(&mut self, moment: Moment<'_>) -> bool {
        let (mut more, mut batches, mut bytes) = (true, 0, 0);
        while batches < BURST && bytes < BURST_BYTES {
            let start = self.make_room(moment);
            match self.parts.udp.recv(&mut self.slab[start..][..RECV_SLOT]) {
                Ok(received) => {
                    (batches, bytes) = (batches + 1, bytes + received.len);
                    self.room.took(start, received.len);
                    self.open_all(moment, start, &received);
                }
                Err(error) => {
                    // An error that was queued on the socket is gone once it was told; whatever
                    // else it was, waiting for the next datagram is right.
                    if error.kind() != io::ErrorKind::WouldBlock {
                        debug!(%error, "receiving failed");
                    }
                    more = false;
                    break;
                }
            }
        }
        self.flush_tun(moment);
        more
    }

    /// Where the next batch may be received to; what is in the way is written first.
    fn make_room(&mut self, moment: Moment<'_>) -> usize {
        self.room
            .next(self.coalescer.held_from())
            .unwrap_or_else(|| {
                self.flush_tun(moment);
                0
            })
    }

    /// Opens every datagram of the batch at `base`, then delivers what was in them.
    fn open_all(&mut self, moment: Moment<'_>, base: usize, received: &Received) {
        let mut opened = std::mem::take(&mut self.opened);
        // The lock of a replay window is taken once a batch and is free again before anything is
        // written.
        let mut opening = None;
        let mut start = base;
        while start < base + received.len {
            let end = (base + received.len).min(start + received.stride);
            match self.open(moment, &mut opening, start..end, received) {
                Ok(Some(plain)) => opened.push(plain),
                Ok(None) => {}
                Err(drop) => self.count(drop),
            }
            start = end;
        }
        drop(opening);
        for plain in opened.drain(..) {
            let result = if plain.flags.has(Flags::CONTINUES) || plain.flags.has(Flags::MORE) {
                self.join(moment, &plain, received.ecn)
            } else {
                self.deliver(moment, &plain, received.ecn)
            };
            if let Err(drop) = result {
                self.count(drop);
            }
        }
        self.opened = opened;
    }

    /// Opens the datagram in `self.slab[range]`; what is not a packet goes to the control task.
    fn open<'v>(
        &mut self,
        moment: Moment<'v>,
        opening: &mut Option<(u32, OpenBatch<'v>)>,
        range: Range<usize>,
        received: &Received,
    ) -> Result<Option<Plain>, Dropped> {
        let datagram = &mut self.slab[range.clone()];
        let data = match Message::parse(datagram)? {
            Message::Data(data) => data,
            Message::Initiation(_) | Message::Response(_) => {
                let admitted = self.parts.shared.door.admit(datagram)?;
                self.tell(ToControl::Handshake {
                    path: received.path,
                    admitted,
                })?;
                return Ok(None);
            }
        };
        let current;
        let (session, opened) = match moment.view.sessions.get(&data.receiver) {
            Some(session) => {
                if opening
                    .as_ref()
                    .is_none_or(|(index, _)| *index != data.receiver)
                {
                    // Let go of one session's window before another's is taken.
                    *opening = None;
                }
                let (_, batch) =
                    opening.get_or_insert_with(|| (data.receiver, session.open_batch()));
                (session, batch.open(data, datagram))
            }
            None => {
                // It may have been agreed since this wake-up began.
                current = self.parts.shared.view.load();
                let session = current.sessions.get(&data.receiver);
                let session = session.ok_or(DropReason::SessionUnknown)?;
                (session, session.open(data, datagram))
            }
        };
        let peer = session.peer();
        let opened = opened.map_err(|reason| Dropped::of(peer, reason))?;
        session.activity().heard(moment.now);
        let plaintext = range.start + opened.plaintext.start..range.start + opened.plaintext.end;
        let moved = opened.newest && moment.view.peer(peer).path != Some(received.path);
        if opened.flags.has(Flags::CONTROL) {
            let length = plaintext.len().min(MAX_MESSAGE);
            self.tell(ToControl::Control {
                session: Arc::clone(session),
                // One that was held up on the way says where the peer was, not where it is.
                heard_from: (opened.first || moved).then_some(received.path),
                message: self.slab[plaintext][..length].to_vec(),
            })?;
            return Ok(None);
        }
        if opened.first || moved {
            // If the control task is too busy now, the next datagram tells it.
            let _ = self.tell(ToControl::Heard {
                session: Arc::clone(session),
                path: received.path,
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
    fn join(&mut self, moment: Moment<'_>, plain: &Plain, outer_ecn: u8) -> Result<(), Dropped> {
        // What came before it goes first.
        self.flush_tun(moment);
        let part = Part {
            counter: plain.counter,
            continues: plain.flags.has(Flags::CONTINUES),
            more: plain.flags.has(Flags::MORE),
            bytes: &self.slab[plain.range.clone()],
        };
        let partial = plain.flags.has(Flags::CSUM_PARTIAL);
        let joiner = &mut self.joiners[usize::from(plain.peer.0)];
        let result = match joiner.push(plain.stream, part) {
            None => Ok(()),
            Some(packet) => {
                let how = Arriving {
                    peer: plain.peer,
                    partial,
                    outer_ecn,
                };
                self.aside.pass_in(&self.parts, moment, packet, how)
            }
        };
        self.send_answer(moment);
        let incomplete = self.joiners[usize::from(plain.peer.0)].take_incomplete();
        self.parts.shared.peer_drops[usize::from(plain.peer.0)]
            .add(DropReason::JoinIncomplete, incomplete);
        result
    }

    /// Joins a packet to the one before it, if it continues it.
    fn deliver(&mut self, moment: Moment<'_>, plain: &Plain, outer_ecn: u8) -> Result<(), Dropped> {
        let known = |reason| Dropped::of(plain.peer, reason);
        let range = plain.range.clone();
        let partial = plain.flags.has(Flags::CSUM_PARTIAL);
        if plain.peer == self.joining
            && self.parts.tso
            && ecn::changes_nothing(outer_ecn)
            && self.coalescer.follow(&self.slab, range.clone(), partial)
        {
            return Ok(());
        }
        let packet = &mut self.slab[range.clone()];
        let parsed = Parsed::parse(packet).map_err(known)?;
        if parsed.fragment() != Fragment::None {
            return self.deliver_piece(moment, plain, outer_ecn);
        }
        ecn::carry_over(packet, &parsed, outer_ecn).map_err(known)?;
        if plain.peer != self.joining || !self.parts.tso {
            self.flush_tun(moment);
            self.joining = plain.peer;
        }
        let pushed = self
            .coalescer
            .push(&self.slab, range.clone(), &parsed, partial);
        if pushed == Push::MustFlush {
            self.flush_tun(moment);
            // Into what is empty now everything goes.
            let _ = self.coalescer.push(&self.slab, range, &parsed, partial);
        }
        Ok(())
    }

    /// Rewrites what was joined and writes it to the TUN.
    fn flush_tun(&mut self, moment: Moment<'_>) {
        let peer = self.joining;
        let Some(joined) = self.coalescer.finish(&mut self.slab) else {
            return;
        };
        let packets = joined.packets;
        let bytes = joined.parsed.total() + (packets - 1) * joined.parsed.payload();
        let mut parsed = joined.parsed;
        let head = &mut self.slab[joined.parts[0].clone()];
        if let Err(drop) = route_in(&self.parts, moment, peer, head, &mut parsed, joined.partial) {
            let how = Arriving {
                peer,
                partial: joined.partial,
                outer_ecn: 0,
            };
            let refused = (self.aside).refuse_in(&self.parts, moment, head, &parsed, how, drop);
            if let Err(drop) = refused {
                self.parts.shared.peer_drops[usize::from(peer.0)].add(drop.reason, packets as u64);
            }
            return self.send_answer(moment);
        }
        let (vnet, joined_partial) = (joined.vnet.to_bytes(), joined.partial);
        let result = (self.parts.tun).send_joined(&vnet, &self.slab, joined.parts);
        let result = match result {
            Err(error) if packets > 1 && is_too_much(&error) => {
                if parsed.total() > MAX_SUPER {
                    self.stay_short(moment.now, &error);
                }
                self.write_apart(parsed.total(), joined_partial)
            }
            result => result,
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

    /// Joins no more than 64 KiB: for good if this kernel's TUN takes no more, for a while if the kernel
    /// has no memory in pieces as large as that.
    #[cold]
    fn stay_short(&mut self, now: Instant, error: &io::Error) {
        let passes = matches!(error.raw_os_error(), Some(libc::ENOMEM | libc::ENOBUFS));
        self.long_again = passes.then_some(now + LONG_PAUSE);
        self.coalescer.set_reach(Reach::Further);
        self.parts.counters.big_tcp_refused.store(true, Relaxed);
        debug!(%error, "the TUN takes no more than 64 KiB");
    }

    /// Writes what the kernel did not take whole: what is longer than 64 KiB in such super-packets, what
    /// is not packet by packet.
    #[cold]
    fn write_apart(&mut self, total: usize, partial: bool) -> io::Result<()> {
        let fallbacks = &self.parts.counters.tun_gso_fallbacks;
        fallbacks.store(fallbacks.load(Relaxed) + 1, Relaxed);
        let (vnet, parts) = self.coalescer.unjoin(&mut self.slab);
        if total <= MAX_SUPER {
            return write_singly(&self.parts.tun, vnet, &self.slab, parts);
        }
        let parts = parts.to_vec();
        let mut shorter = Coalescer::new(self.parts.uso, Reach::Further);
        for part in parts {
            let parsed = Parsed::parse(&self.slab[part.clone()]);
            // It was parsed before, and its head only rewritten since.
            let parsed = parsed.map_err(|_| io::ErrorKind::InvalidData)?;
            let push = shorter.push(&self.slab, part.clone(), &parsed, partial);
            if push == Push::MustFlush {
                write_joined(&self.parts.tun, &mut shorter, &mut self.slab)?;
                let _ = shorter.push(&self.slab, part, &parsed, partial);
            }
        }
        write_joined(&self.parts.tun, &mut shorter, &mut self.slab)
    }

    // Beside the packets.

    /// Passes something to the control task, unless that has enough of this peer's to do.
    fn tell(&self, message: ToControl) -> Result<(), Dropped> {
        let Some((peer, queue)) = message.origin() else {
            return Ok(());
        };
        let waiting = &self.parts.shared.waiting[usize::from(peer.0)];
        let busy = Dropped::of(peer, DropReason::ControlBusy);
        if !waiting.enter(queue) {
            return Err(busy);
        }
        self.parts.control.try_send(message).map_err(|_| {
            // The control task is ending.
            waiting.leave(queue);
            busy
        })
    }

    /// Counts a drop where it belongs.
    fn count(&self, drop: Dropped) {
        self.parts.count(drop);
    }

    /// Lets fragments and flows expire. Of the flows one lane takes care for all.
    fn tick(&mut self, now: Instant) {
        if now.duration_since(self.ticked) < TICK {
            return;
        }
        self.ticked = now;
        self.expire_pieces(now);
        if self.long_again.is_some_and(|at| at <= now) {
            self.long_again = None;
            self.coalescer.set_reach(self.parts.reach);
            self.parts.counters.big_tcp_refused.store(false, Relaxed);
        }
        if self.parts.number == 0
            && let Translation::New(translator) = &self.parts.shared.translation
        {
            translator.expire(now, EXPIRY_BUDGET);
        }
    }

    /// Ends the lane and with it the daemon.
    fn fail(&self, what: String) {
        // The control task is gone only if the daemon is ending already.
        let _ = self.parts.control.blocking_send(ToControl::Failed(what));
    }
}

impl LaneParts {
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

/// Cuts one packet, however long, and seals the pieces into the batch.
struct Sealing<'a> {
    batch: &'a mut SendBatch,
    udp: &'a UdpSocket,
    sealer: &'a Sealer,
    destination: Destination,
    /// Largest plaintext of one datagram.
    mtu: usize,
    /// What is larger may go in several.
    split: bool,
    /// Datagrams that the kernel did not take.
    refused: u64,
}

/// What became of the pieces.
#[derive(Default)]
struct Sealed {
    packets: usize,
    bytes: usize,
    /// Why not all of them were sealed.
    stopped: Option<DropReason>,
}

impl Sealing<'_> {
    fn seal_all(&mut self, mut segments: Segments<'_>, scratch: &mut [u8]) -> Sealed {
        let mut sealed = Sealed::default();
        // The first segment is the longest.
        let result = if segments.next_len().is_some_and(|len| len <= self.mtu) {
            self.seal_segments(&mut segments, &mut sealed)
        } else if self.split {
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
            let slot = self.slot(len);
            let Some(segment) = segments.next_into(&mut slot[DATA_HEADER_LEN..]) else {
                break;
            };
            sealer
                .seal(counter, checksum_flag(segment.csum_partial), slot)
                .map_err(|_| DropReason::TooBig)?;
            self.batch.commit(len + DATA_OVERHEAD, self.destination);
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
            let slot = self.slot(part.len());
            slot[DATA_HEADER_LEN..][..part.len()].copy_from_slice(part);
            sealer
                .seal(counter, flags, slot)
                .map_err(|_| DropReason::TooBig)?;
            self.batch
                .commit(part.len() + DATA_OVERHEAD, self.destination);
        }
        Ok(())
    }

    /// Room in the batch for a plaintext of `len` bytes; what is in the way is sent first.
    fn slot(&mut self, len: usize) -> &mut [u8] {
        let len = len + DATA_OVERHEAD;
        if !self.batch.fits(len, &self.destination)
            && let Some((_, datagrams)) = flush(self.batch, self.udp)
        {
            self.refused += datagrams;
        }
        self.batch.slot(len)
    }
}

/// Finds the peer that a captured packet's destination moved to.
fn judge(
    gates: &[Gate],
    now: Instant,
    parsed: &Parsed,
    packet: &[u8],
) -> Result<(PeerId, Verdict), DropReason> {
    let mut outcome = Err(DropReason::NotMoved);
    for (index, gate) in gates.iter().enumerate() {
        let peer = PeerId(index as u16);
        match gate.check_captured(now, parsed, packet) {
            Ok(Verdict::Carry) => return Ok((peer, Verdict::Carry)),
            // Another part of the address may have moved to another peer.
            Ok(Verdict::Bounce) => outcome = Ok((peer, Verdict::Bounce)),
            Err(reason @ DropReason::FragmentUnknown) if outcome.is_err() => outcome = Err(reason),
            Err(_) => {}
        }
    }
    outcome
}

fn checksum_flag(partial: bool) -> Flags {
    if partial {
        Flags::CSUM_PARTIAL
    } else {
        Flags::NONE
    }
}

/// Sends the batch; tells whose it was and how many datagrams were in it if the kernel refused any.
fn flush(batch: &mut SendBatch, udp: &UdpSocket) -> Option<(PeerId, u64)> {
    let (destination, bytes, stride, count) = batch.take()?;
    match udp.send(&destination.path, destination.ecn, bytes, stride) {
        Ok(()) => None,
        Err(error) => {
            debug!(%error, "sending failed");
            Some((destination.peer, count as u64))
        }
    }
}

/// Rewrites one packet that was not joined with others and writes it to the TUN.
fn pass_in(
    parts: &LaneParts,
    moment: Moment<'_>,
    peer: PeerId,
    packet: &mut [u8],
    partial: bool,
    outer_ecn: u8,
) -> Result<(), Dropped> {
    let known = |reason| Dropped::of(peer, reason);
    let mut parsed = Parsed::parse(packet).map_err(known)?;
    ecn::carry_over(packet, &parsed, outer_ecn).map_err(known)?;
    let vnet = VnetHdr::single(&parsed, partial).to_bytes();
    route_in(parts, moment, peer, packet, &mut parsed, partial)?;
    let packet = &packet[..parsed.total()];
    parts
        .tun
        .send(&[IoSlice::new(&vnet), IoSlice::new(packet)])
        .map_err(|error| {
            debug!(%error, "the TUN refused a packet");
            known(DropReason::TunWriteFailed)
        })?;
    parts.counters.peers[usize::from(peer.0)]
        .rx
        .add(1, packet.len());
    Ok(())
}

/// Writes what was joined, packet by packet if the kernel does not take it whole.
fn write_joined(tun: &TunQueue, coalescer: &mut Coalescer, slab: &mut [u8]) -> io::Result<()> {
    let Some(joined) = coalescer.finish(slab) else {
        return Ok(());
    };
    match tun.send_joined(&joined.vnet.to_bytes(), slab, joined.parts) {
        Err(error) if joined.packets > 1 && is_too_much(&error) => {
            let (vnet, parts) = coalescer.unjoin(slab);
            write_singly(tun, vnet, slab, parts)
        }
        result => result,
    }
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

/// Whether the kernel may take in parts what it did not take whole.
fn is_too_much(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::EMSGSIZE | libc::ENOMEM | libc::ENOBUFS)
    )
}

/// Checks and rewrites a packet, or the head of a super-packet, that came out of the tunnel.
fn route_in(
    parts: &LaneParts,
    moment: Moment<'_>,
    peer: PeerId,
    packet: &mut [u8],
    parsed: &mut Parsed,
    partial: bool,
) -> Result<(), Dropped> {
    match &parts.shared.translation {
        Translation::Old(gates) => gates[usize::from(peer.0)]
            .check_returning(moment.now, parsed, packet)
            .and_then(|()| parsed.decrement_ttl(packet))
            .and_then(|()| fits_link(packet, parsed, moment.view.hop.mtu)),
        Translation::New(translator) => {
            translator.inbound(moment.now, peer, packet, parsed, partial)
        }
    }
    .map_err(|reason| Dropped::of(peer, reason))?;
    clamp(packet, parsed, moment.view.peer(peer).mtu, partial);
    Ok(())
}

/// Whether a packet, or each that the head of a super-packet stands for, fits the link to the clients:
/// on the way there nobody else looks.
#[inline]
fn fits_link(packet: &[u8], parsed: &Parsed, mtu: usize) -> Result<(), DropReason> {
    if packet.len().min(parsed.total()) > mtu && mtu > 0 {
        return Err(DropReason::TooBig);
    }
    Ok(())
}

/// Clamps the MSS of a SYN or SYN-ACK to what fits one datagram.
fn clamp(packet: &mut [u8], parsed: &Parsed, mtu: usize, partial: bool) {
    let room = |headers: usize| mtu.saturating_sub(headers).min(usize::from(u16::MAX)) as u16;
    clamp_mss(packet, parsed, room(40), room(60), partial);
}
