//! What the control task and the lanes share: who may send what where, and what was counted.
//!
//! The control task publishes a new [`View`] whenever something changes; lanes read the current one
//! once per wake-up without waiting. Counters are kept per lane, so that lanes never write to the
//! same cache line.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};

use arc_swap::ArcSwap;

use crate::channel::session::{Door, Session};
use crate::flow::translate::{Gate, Translator};
use crate::lane::Crowd;
use crate::model::drops::Drops;
use crate::model::peer::{Path, PeerId};
use crate::model::status::Traffic;
use crate::packet::Family;

/// Everything that lanes need to know beside the packet in hand.
pub struct Shared {
    /// Sessions and endpoints, replaced whole when anything changes.
    pub view: ArcSwap<View>,
    /// What happens to a packet between TUN and tunnel.
    pub translation: Translation,
    /// Lets in handshake messages that were made with a peer's key.
    pub door: Door,
    /// Drops that belong to no peer: strangers' datagrams.
    pub drops: Drops,
    /// Drops that belong to a peer.
    pub peer_drops: Vec<Drops>,
    /// What of each peer waits for the control task.
    pub waiting: Vec<Waiting>,
    /// How many lanes have more to do than one thread can.
    pub crowd: Crowd,
}

/// What one peer may have waiting for the control task, so that a flood in one peer's name never
/// keeps another's messages out.
#[derive(Debug, Default)]
pub struct Waiting {
    handshakes: AtomicU32,
    messages: AtomicU32,
}

/// In which of a peer's two queues something waits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Queue {
    /// Handshake messages, of which anybody who recorded them can send more.
    Handshakes,
    /// What came inside a session, which only the peer can make.
    Messages,
}

impl Queue {
    /// Most that may wait. A peer has at most four initiations under way, and says at most 17 parts of
    /// an announcement, their acknowledgements and a few more at once.
    pub const fn limit(self) -> u32 {
        match self {
            Self::Handshakes => 16,
            Self::Messages => 64,
        }
    }
}

impl Waiting {
    /// What all peers together may have waiting.
    pub const fn limit(peers: usize) -> usize {
        peers * (Queue::Handshakes.limit() + Queue::Messages.limit()) as usize
    }

    /// Takes a place; false if there is none.
    pub fn enter(&self, queue: Queue) -> bool {
        let enter = |count: u32| (count < queue.limit()).then_some(count + 1);
        let count = self.count(queue);
        count.fetch_update(Relaxed, Relaxed, enter).is_ok()
    }

    /// Gives a place back that was taken.
    pub fn leave(&self, queue: Queue) {
        self.count(queue).fetch_sub(1, Relaxed);
    }

    fn count(&self, queue: Queue) -> &AtomicU32 {
        match queue {
            Queue::Handshakes => &self.handshakes,
            Queue::Messages => &self.messages,
        }
    }
}

/// What the role makes of a packet.
pub enum Translation {
    /// The old server: nothing is rewritten, but only moved addresses pass. One gate a peer.
    Old(Vec<Gate>),
    /// The new server: the flow table rewrites.
    New(Translator),
}

/// Who may send what where, at one moment.
#[derive(Clone, Default)]
pub struct View {
    /// Every session that datagrams are accepted on, by our index.
    pub sessions: HashMap<u32, Arc<Session>, IndexHash>,
    /// One for each peer, by [`PeerId`].
    pub peers: Vec<PeerView>,
    /// The old server as a hop between clients and the application.
    pub hop: Hop,
}

/// What a host is to packets that only pass through it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Hop {
    /// Its own address of each family, which has not moved.
    pub v4: Option<Ipv4Addr>,
    /// See `v4`.
    pub v6: Option<Ipv6Addr>,
    /// MTU of the link to the clients, in bytes.
    pub mtu: usize,
}

impl Hop {
    /// The address that it speaks from.
    pub fn addr(&self, family: Family) -> Option<IpAddr> {
        match family {
            Family::V4 => self.v4.map(IpAddr::V4),
            Family::V6 => self.v6.map(IpAddr::V6),
        }
    }
}

impl View {
    /// What is known of `peer`, which is one of those configured.
    pub fn peer(&self, peer: PeerId) -> &PeerView {
        &self.peers[usize::from(peer.0)]
    }
}

/// How a peer is reached at one moment.
#[derive(Clone, Default)]
pub struct PeerView {
    /// The session to seal on; `None` while there is none the peer has proved.
    pub session: Option<Arc<Session>>,
    /// Where to send to.
    pub path: Option<Path>,
    /// Largest plaintext of one datagram, in bytes: the tunnel MTU.
    pub mtu: usize,
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
    /// Super-packets that the TUN refused whole and that were written packet by packet.
    pub tun_gso_fallbacks: AtomicU64,
    /// The TUN refused more than 64 KiB; at present it is not tried.
    pub big_tcp_refused: AtomicBool,
}

/// What one lane carried for one peer.
#[derive(Default)]
pub struct PeerCounters {
    /// Out of the tunnel.
    pub rx: TrafficCounter,
    /// Into the tunnel.
    pub tx: TrafficCounter,
}

/// IP packets and their bytes. Aligned so that two threads, one for each way, do not share a cache line.
#[derive(Default)]
#[repr(align(64))]
pub struct TrafficCounter {
    packets: AtomicU64,
    bytes: AtomicU64,
}

impl LaneCounters {
    /// All zero.
    pub fn new(peers: usize) -> Self {
        Self {
            peers: (0..peers).map(|_| PeerCounters::default()).collect(),
            tun_gso_fallbacks: AtomicU64::new(0),
            big_tcp_refused: AtomicBool::new(false),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_handshakes_takes_no_place_of_messages() {
        let waiting = Waiting::default();
        let mut taken = 0;
        while waiting.enter(Queue::Handshakes) {
            taken += 1;
        }
        assert_eq!(taken, Queue::Handshakes.limit());
        assert!(waiting.enter(Queue::Messages));
        waiting.leave(Queue::Handshakes);
        assert!(waiting.enter(Queue::Handshakes));
        assert!(!waiting.enter(Queue::Handshakes));
        assert_eq!(Waiting::limit(3), 240);
    }
}
