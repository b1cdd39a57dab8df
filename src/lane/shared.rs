//! What the control task and both directions of each lane share: sessions and endpoints, the parts
//! of a lane, and counters.
//!
//! The control task publishes a new [`LaneView`] whenever something changes. Lanes read the current
//! one once per wake-up, without waiting. Counters are kept per lane, so that lanes never write to
//! the same cache line.

use std::collections::HashMap;
use std::mem;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use rustix::event::Timespec;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use crate::channel::pmtu;
use crate::channel::session::{MacCheck, Session, wipe_frames};
use crate::channel::wire::DATA_OVERHEAD;
use crate::flow::listing::{Flows, Place, Row};
use crate::flow::role::{Forwarder, Hop};
use crate::io::tun::TunQueue;
use crate::io::udp::UdpSocket;
use crate::lane::holding::Holding;
use crate::lane::load::BusyLanes;
use crate::lane::to_control::{Queue, ToControl, Waiting};
use crate::model::drops::{DropReason, Dropped, Drops};
use crate::model::peer::{Endpoint, PeerId};
use crate::model::status::Traffic;
use crate::packet::coalesce::Reach;
use crate::packet::{Parsed, clamp_mss};

/// Frames or batches taken from one side before the other side gets its turn. More amortises the
/// wake-up further. For full super-packets, 8 gained 25 to 40 % over 1. Small packets, of which one
/// batch holds many, gain more.
pub(super) const BURST: usize = 64;

/// Bytes taken from one side before the other side gets its turn. Latency suffers beyond 8 full
/// super-packets.
pub(super) const BURST_BYTES: usize = 8 * 65_536;

/// Pause before a lane reads again from an interface that somebody set down.
pub(super) const DEVICE_DOWN_PAUSE: Duration = Duration::from_millis(50);

/// How often lanes look for expired flows, and the longest wait without a packet.
pub(super) const TICK: Duration = Duration::from_secs(1);

/// Flows examined for expiry per tick, so that a full table cannot hold up packets. At this rate it
/// takes a quarter of an hour to go through a million flows: far below the shortest long timeout.
pub(super) const EXPIRY_BUDGET: usize = 1_024;

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
    /// Packets that are too big for one datagram are not split (`--no-split`).
    pub no_split: bool,
    /// Its socket.
    pub udp: Arc<UdpSocket>,
    /// What it shares with the control task.
    pub shared: Arc<Shared>,
    /// Its counters.
    pub counters: Arc<LaneCounters>,
    /// Its queue to the control task.
    pub control: mpsc::Sender<ToControl>,
    /// Readable once the lane is to stop.
    pub stop: OwnedFd,
}

/// The time and the view that hold for the packets of one turn.
#[derive(Clone, Copy)]
pub(super) struct Context<'a> {
    pub(super) now: Instant,
    pub(super) view: &'a LaneView,
}

/// Everything that lanes need to know beside the packet in hand.
pub struct Shared {
    /// Sessions and endpoints, replaced whole when anything changes.
    pub view: ArcSwap<LaneView>,
    /// Lets in handshake messages that were made with a peer's key.
    pub mac_check: MacCheck,
    /// Drops that belong to no peer: datagrams of strangers.
    pub drops: Drops,
    /// Drops that belong to a peer.
    pub peer_drops: Vec<Drops>,
    /// What each peer has waiting for the control task.
    pub waiting: Vec<Waiting>,
    /// What waits for the end of a hold.
    pub holding: Holding,
    /// How many lanes have more to do than one thread can.
    pub busy_lanes: BusyLanes,
}

/// Who may send what to whom, at one moment.
#[derive(Clone, Default)]
pub struct LaneView {
    /// Which one it is: a later one has another number.
    pub number: u64,
    /// What happens to a packet between TUN and tunnel.
    pub forwarder: Arc<Forwarder>,
    /// Every session on which datagrams are accepted, by our index.
    pub sessions: HashMap<u32, Arc<Session>, IndexHash>,
    /// One for each peer, by [`PeerId`].
    pub peers: Vec<PeerView>,
    /// The old server as a hop between clients and the application.
    pub hop: Hop,
}

/// The view that a thread saw last.
#[derive(Default)]
pub(super) struct Seen(u64);

impl Seen {
    /// Before the thread uses a view: with another one, sessions may have ended that it has used,
    /// and it has let go of them. What their keys have left on its stack goes now.
    pub(super) fn wipe_after(&mut self, view: &LaneView) {
        if mem::replace(&mut self.0, view.number) != view.number {
            wipe_frames();
        }
    }
}

impl Flows for Shared {
    fn slice(&self, now: Instant, from: Place, out: &mut Vec<Row>) -> Option<Place> {
        self.view.load().forwarder.slice(now, from, out)
    }
}

impl LaneParts {
    /// Passes a message of `peer` to the control task, unless enough of this peer's wait there, or
    /// were there of late.
    pub(super) fn tell(
        &self,
        now: Instant,
        peer: PeerId,
        queue: Queue,
        message: impl FnOnce(OwnedSemaphorePermit) -> ToControl,
    ) -> Result<(), Dropped> {
        let busy = Dropped::of(peer, DropReason::ControlBusy);
        let permit = self.shared.waiting[usize::from(peer.0)].enter(now, queue);
        let permit = permit.ok_or(busy)?;
        // This thread has just used a key. A message that is made where that was would carry what
        // is left of it, between its own parts, into memory that nothing overwrites.
        wipe_frames();
        // If sending fails, the control task is ending.
        self.send(|| message(permit)).then_some(()).ok_or(busy)
    }

    /// Makes and sends a message, in a frame of its own below the caller's. Whether it was taken.
    #[inline(never)]
    fn send(&self, message: impl FnOnce() -> ToControl) -> bool {
        self.control.try_send(message()).is_ok()
    }

    /// Counts a drop where it belongs.
    pub(super) fn count(&self, drop: Dropped) {
        match drop.peer {
            Some(peer) => self.shared.peer_drops[usize::from(peer.0)].count(drop.reason),
            None => self.shared.drops.count(drop.reason),
        }
    }
}

impl LaneView {
    /// The view of `peer`, which has to be one of those configured.
    pub fn peer(&self, peer: PeerId) -> &PeerView {
        &self.peers[usize::from(peer.0)]
    }
}

/// How a peer is reached at one moment.
#[derive(Clone)]
pub struct PeerView {
    /// The session to seal on; `None` while the peer has proved none.
    pub session: Option<Arc<Session>>,
    /// Where to send to.
    pub endpoint: Option<Endpoint>,
    /// Largest plaintext of one datagram, in bytes: the tunnel MTU. It is never 0.
    pub mtu: usize,
    /// MTU of its link to its clients, in bytes, where it says one: TCP segments have to fit it.
    pub client_mtu: usize,
}

impl Default for PeerView {
    /// A peer that is not reached yet, with the MTU that holds until the path is known: the kernel
    /// may never find the route that the datagrams take, if a rule chooses it by their port.
    fn default() -> Self {
        Self {
            session: None,
            endpoint: None,
            mtu: usize::from(pmtu::BASE) - DATA_OVERHEAD,
            client_mtu: usize::MAX,
        }
    }
}

impl PeerView {
    /// Clamps the MSS of a SYN or SYN-ACK to what fits one datagram, and the link behind it.
    #[inline]
    pub(super) fn clamp_mss(&self, packet: &mut [u8], parsed: &Parsed, partial: bool) {
        let mtu = self.mtu.min(self.client_mtu);
        let mss = |headers: usize| mtu.saturating_sub(headers).min(usize::from(u16::MAX));
        clamp_mss(packet, parsed, mss(40) as u16, mss(60) as u16, partial);
    }
}

/// Session indexes are random already.
pub type IndexHash = std::hash::BuildHasherDefault<IndexHasher>;

/// Passes a random `u32` through.
#[derive(Default)]
pub struct IndexHasher(u64);

impl std::hash::Hasher for IndexHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = self.0 << 8 | u64::from(byte);
        }
    }

    fn write_u32(&mut self, index: u32) {
        // The table takes its buckets from the low bits and its tags from the high ones.
        self.0 = u64::from(index) << 32 | u64::from(index);
    }
}

/// One lane's counters.
pub struct LaneCounters {
    /// One for each peer, by [`PeerId`].
    pub peers: Vec<PeerCounters>,
    /// Turns of the outbound direction.
    pub outbound: Turns,
    /// Turns of the inbound direction, whichever thread it is with.
    pub inbound: Turns,
    /// Super-packets that the TUN refused whole, so that they were written packet by packet.
    pub tun_gso_fallbacks: AtomicU64,
    /// The TUN refused more than 64 KiB, so the lane does not try that at present.
    pub big_tcp_refused: AtomicBool,
}

/// How often a loop that carries packets has turned: at least once in a [`TICK`], unless it hangs.
/// Aligned so that two threads, one for each direction, do not share a cache line.
#[derive(Default)]
#[repr(align(64))]
pub struct Turns(AtomicU64);

impl Turns {
    /// Counts a turn.
    pub fn count(&self) {
        // A direction is with one thread at a time.
        self.0.store(self.0.load(Relaxed).wrapping_add(1), Relaxed);
    }

    /// The turns so far.
    pub fn counted(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// What one lane carried for one peer.
#[derive(Default)]
pub struct PeerCounters {
    /// Out of the tunnel.
    pub rx: TrafficCounter,
    /// Into the tunnel.
    pub tx: TrafficCounter,
}

/// IP packets and their bytes. Aligned so that two threads, one for each direction, do not share a
/// cache line.
#[derive(Default)]
#[repr(align(64))]
pub struct TrafficCounter {
    packets: AtomicU64,
    bytes: AtomicU64,
}

impl LaneCounters {
    /// Counters that are all zero.
    pub fn new(peers: usize) -> Self {
        Self {
            peers: (0..peers).map(|_| PeerCounters::default()).collect(),
            outbound: Turns::default(),
            inbound: Turns::default(),
            tun_gso_fallbacks: AtomicU64::new(0),
            big_tcp_refused: AtomicBool::new(false),
        }
    }
}

impl PeerCounters {
    /// Nothing was carried: another peer is here now.
    pub fn clear(&self) {
        for counter in [&self.rx, &self.tx] {
            counter.packets.store(0, Relaxed);
            counter.bytes.store(0, Relaxed);
        }
    }
}

impl TrafficCounter {
    /// Counts packets that were carried.
    pub fn add(&self, packets: usize, bytes: usize) {
        self.packets.fetch_add(packets as u64, Relaxed);
        self.bytes.fetch_add(bytes as u64, Relaxed);
    }

    /// Adds what was counted to `total`.
    pub fn add_to(&self, total: &mut Traffic) {
        total.packets += self.packets.load(Relaxed);
        total.bytes += self.bytes.load(Relaxed);
    }
}

/// A time as `poll` takes it.
pub(super) fn timespec(time: Duration) -> Timespec {
    Timespec {
        tv_sec: time.as_secs() as i64,
        tv_nsec: time.subsec_nanos().into(),
    }
}
