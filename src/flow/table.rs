//! The flow table of the new server: which conversation a packet belongs to, on either side of the
//! rewriting, and how long that is remembered.
//!
//! Owns the two views of a flow ([`Outside`]: as the client sees it, [`Inside`]: as the
//! application's host sees it), how either is found, and what happens when memory runs out.
//! [`class`](super::class) says how long a flow is kept, and which gives way first. Must not touch
//! packets, and reads no clock: every call is given the time.
//!
//! ```text
//!   Outside {peer, client:port, moved:port}  ──►  entry  ◄──  Inside {client:port', delivery:port}
//!                                                   ▲
//!                                                   └──  {client:port'}, of UDP the latest
//!                                                   │
//!                   one of twelve lists of its peer, oldest first, by protocol and state
//! ```
//!
//! Entries lie in a slab that grows by chunks; two hash indexes of slot numbers find them. Each
//! entry is in the list of its class, whose members share a timeout. A packet only notes the time
//! in its entry. When the head of a list is examined and was used since it was put there, it moves
//! to the tail. So a list is nearly in order of last use, at no cost per packet.
//!
//! Where both addresses are translated (`ipmoved nat`), the inner view has one address in place of
//! every client's, and a port that is borrowed from a range ([`Masquerade`]); all else is the same.
//!
//! At the limit a new flow takes the place of an old one ([`Stage`] says which), of the peer and
//! the source that [`fairness`](super::fairness) chooses. If none qualifies the new flow is
//! refused: a flood cannot take what others are using.

mod handed;

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hashbrown::HashTable;

pub use self::handed::HandedFlow;

use crate::flow::class::{ANY, Class, EVICTION_ORDER, RECENT, Seen, Side, Tier, UNCONFIRMED};
use crate::flow::ended::Outbox;
use crate::flow::fairness::{
    Candidate, Holder, Limit, SAMPLE, SAMPLE_LEAD, Turn, most_dispensable, of_largest_holder,
};
use crate::flow::listing::{self, Place, Row, SLICE};
use crate::flow::seed::Seed;
use crate::flow::slab::{List, Slab};
use crate::flow::tally::{Counted, Tallies};
use crate::flow::watch::Noted;
use crate::flow::weight::{Counts, Weight};
use crate::model::drops::DropReason;
use crate::model::moved::{TCP, UDP};
use crate::model::peer::PeerId;
use crate::packet::{Addr, Family, ICMP, ICMPV6};

/// Where one in so many of a peer's flows is unconfirmed, a flood makes space for itself. Below
/// that they may all be clients that are just connecting.
const FLOODED: u32 = 8;
/// Entries drawn for a sample of [`SAMPLE`]: some are free, or another peer's.
const DRAWS: usize = 4 * SAMPLE;

/// List heads examined for one eviction, if they turn out to have been used meanwhile.
const EVICT_TRIES: usize = 8;

/// Ports tried for a flow that would be mistaken for another.
const PORT_TRIES: u32 = 64;
/// Where those ports begin: below lie the ports of services.
const FIRST_PORT: u32 = 1024;
/// Step from one port that is tried to the next. A prime that does not divide the range visits
/// every port before any port twice.
const PORT_STEP: u32 = 7919;
/// A source that has so many more of the ports that are tried than who asks gives one up first: a
/// quarter.
const PORT_SHARE: usize = PORT_TRIES as usize / 4;
/// So many more make it give one up where nothing else does: a sixteenth, a thousand ports.
const LAST_PORT_SHARE: usize = PORT_TRIES as usize / 16;
/// Where ports run out, an established TCP connection unused for so long gives up its own. Each
/// server port has 16,384 of them, and for half an hour ([`RECENT_TCP`](super::class::RECENT_TCP))
/// nine handshakes a second would keep them.
pub const RECENT_PORT: Duration = Duration::from_secs(300);

/// A flow as the client sees it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Outside {
    /// The old server the client came through.
    pub peer: PeerId,
    /// IP protocol number.
    pub protocol: u8,
    /// The client.
    pub client: Addr,
    /// Its port, or the identifier of its queries; 0 for protocols without.
    pub client_port: u16,
    /// The moved address.
    pub moved: Addr,
    /// The port there; 0 for protocols without.
    pub moved_port: u16,
}

/// The same flow as the application's host sees it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Inside {
    /// IP protocol number.
    pub protocol: u8,
    /// The client, or the address that stands for it ([`Masquerade`]).
    pub client: Addr,
    /// Its port, or another one where two flows would be the same otherwise.
    pub client_port: u16,
    /// The delivery address.
    pub delivery: Addr,
    /// The port there.
    pub delivery_port: u16,
}

/// What stands for every client in the inner views of a table.
#[derive(Clone, Debug)]
pub struct Masquerade {
    /// In place of IPv4 clients.
    pub v4: Addr,
    /// In place of IPv6 clients.
    pub v6: Addr,
    /// The ports that are borrowed. A port is borrowed anew for each port of the application's
    /// host.
    pub ports: RangeInclusive<u16>,
    /// Chooses the first port that is tried. With the same seed, a flow that is made anew after a
    /// restart gets the port that it had, unless another flow was faster.
    pub seed: Seed,
}

impl Masquerade {
    fn of(&self, client: Addr) -> Addr {
        match client.family() {
            Family::V4 => self.v4,
            Family::V6 => self.v6,
        }
    }
}

/// What a table did since it was made.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct FlowStats {
    /// Number of flows.
    pub live: u64,
    /// The most flows there may be.
    pub max: u64,
    /// Flows that had to go before their time.
    pub evicted: u64,
    /// Those of them that were in use, of a source or peer that held more than others.
    pub displaced: u64,
    /// Flows that got another client port, to tell them from one that was there.
    pub collisions: u64,
    /// New flows that were turned away.
    pub refused: u64,
}

/// The flows of one shard.
pub struct FlowTable {
    seed: Seed,
    masquerade: Option<Masquerade>,
    epoch: Instant,
    slab: Slab<Entry>,
    outside: HashTable<u32>,
    inside: HashTable<u32>,
    /// Of UDP, the flow that each end of a client began last.
    latest: HashTable<u32>,
    /// By [`PeerId`].
    peers: Vec<PeerFlows>,
    /// The peer whose flows expire first next time.
    expired: usize,
    /// Entries drawn for samples.
    drawn: u64,
    /// Flows that ended, if anybody wants to know.
    ended: Option<Outbox<Inside>>,
    /// Where flows count, if they do.
    tallies: Option<Arc<Tallies>>,
    live: usize,
    evicted: u64,
    displaced: u64,
    collisions: u64,
    refused: u64,
}

/// The flows of one peer.
#[derive(Clone, Copy)]
struct PeerFlows {
    lists: [List; Class::COUNT],
    live: u32,
    unconfirmed: u32,
}

impl PeerFlows {
    const NONE: Self = Self {
        lists: [List::EMPTY; Class::COUNT],
        live: 0,
        unconfirmed: 0,
    };
}

/// How space is made for a new flow: the first way that finds a flow of the peer whose
/// [`Turn`] it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stage {
    /// If it looks like a flood: a flow that was reset, else the oldest unconfirmed one.
    Flood,
    /// A flow of the source that holds most, whatever its age.
    Holder,
    /// A flow that nobody is using, in the order of eviction. Clients that are just connecting come
    /// last.
    Idle,
    /// The flow that was unused for the longest time, if the new one is another peer's.
    InUse,
}

impl Stage {
    /// All, in order.
    pub(super) const ALL: [Self; 4] = [Self::Flood, Self::Holder, Self::Idle, Self::InUse];
}

impl FlowTable {
    /// An empty table. `epoch` is a time not later than any `now` that follows.
    pub fn new(seed: Seed, epoch: Instant) -> Self {
        Self {
            seed,
            masquerade: None,
            epoch,
            slab: Slab::default(),
            outside: HashTable::new(),
            inside: HashTable::new(),
            latest: HashTable::new(),
            peers: Vec::new(),
            expired: 0,
            drawn: 0,
            ended: None,
            tallies: None,
            live: 0,
            evicted: 0,
            displaced: 0,
            collisions: 0,
            refused: 0,
        }
    }

    /// An empty table with one address in place of every client's.
    pub fn masquerading(seed: Seed, epoch: Instant, masquerade: Masquerade) -> Self {
        Self {
            masquerade: Some(masquerade),
            ..Self::new(seed, epoch)
        }
    }

    /// From now on, keeps the inner views of flows that end, at most `room` until they are taken.
    pub fn note_ended(&mut self, room: usize) {
        self.ended = Some(Outbox::new(room));
    }

    /// From now on, flows count there.
    pub(super) fn tally(&mut self, tallies: Arc<Tallies>) {
        self.tallies = Some(tallies);
    }

    /// A flow that was just made counts there.
    pub(super) fn count_as(&mut self, key: &Outside, at: Counted) {
        if let Some(flow) = self.find_outside(key) {
            self.slab.get_mut(flow).counted = at;
        }
    }

    /// Puts a flow among those that ended that is not here, since it was refused.
    pub fn tell_ended(&mut self, flow: Inside) {
        if let Some(ended) = &mut self.ended {
            ended.put(flow);
        }
    }

    /// Takes the flows that ended, in the order they did, and how many more found no room.
    pub fn take_ended(&mut self) -> (Vec<Inside>, u64) {
        self.ended.as_mut().map(Outbox::take).unwrap_or_default()
    }

    /// A packet from the client: finds its flow and notes the packet.
    #[inline]
    pub fn client_packet(
        &mut self,
        now: Instant,
        key: &Outside,
        weight: impl Into<Weight>,
        limit: &Limit,
    ) -> Option<Inside> {
        let now = self.tick(now);
        let at = self.find_outside(key)?;
        if self.slab.get(at).is_expired(now) {
            self.remove(at, limit);
            return None;
        }
        self.note(at, now, Side::Client, weight.into());
        Some(inner(&self.masquerade, self.slab.get(at)))
    }

    /// A packet from the application: finds its flow and notes the packet.
    #[inline]
    pub fn application_packet(
        &mut self,
        now: Instant,
        key: &Inside,
        weight: impl Into<Weight>,
        limit: &Limit,
    ) -> Option<Outside> {
        let now = self.tick(now);
        let at = self.find_inside(key)?;
        if self.slab.get(at).is_expired(now) {
            self.remove(at, limit);
            return None;
        }
        self.note(at, now, Side::Application, weight.into());
        Some(self.slab.get(at).outside())
    }

    /// What was seen of a flow, if it is known. Nothing changes by the question.
    pub(super) fn noted(&self, key: &Outside) -> Option<Noted> {
        let entry = self.slab.get(self.find_outside(key)?);
        Some(Noted {
            seen: entry.seen,
            protocol: entry.protocol,
            used: self.epoch + Duration::from_secs(entry.last_seen.into()),
        })
    }

    /// Whether the client has begun this connection, and nothing has answered it.
    pub fn is_unanswered(&self, key: &Outside) -> bool {
        let at = self.find_outside(key);
        at.is_some_and(|at| !self.slab.get(at).seen.is_answered())
    }

    /// Forgets a flow.
    pub fn forget(&mut self, key: &Outside, limit: &Limit) {
        if let Some(at) = self.find_outside(key) {
            self.remove(at, limit);
        }
    }

    /// The inner view of a flow, without noting anything.
    pub fn peek_outside(&self, key: &Outside) -> Option<Inside> {
        self.find_outside(key)
            .map(|at| inner(&self.masquerade, self.slab.get(at)))
    }

    /// The outer view of a flow, without noting anything.
    pub fn peek_inside(&self, key: &Inside) -> Option<Outside> {
        self.find_inside(key).map(|at| self.slab.get(at).outside())
    }

    /// The flow of UDP that the client began last from that port, as the application's host sees
    /// it, in both views, without noting anything.
    pub fn latest(&self, now: Instant, client: Addr, port: u16) -> Option<(Inside, Outside)> {
        let now = self.tick(now);
        let at = *(self.latest).find(end_hash(&self.seed, client, port), |&at| {
            self.slab.get(at).is_end(client, port)
        })?;
        let entry = self.slab.get(at);
        let live = !entry.is_expired(now);
        live.then(|| (inner(&self.masquerade, entry), entry.outside()))
    }

    /// Makes the flow that a packet from the client begins, or continues after a restart.
    ///
    /// `key` must not be there yet. The inner client port is borrowed, or it is the outer one,
    /// unless that would make two flows the same.
    ///
    /// # Errors
    /// [`DropReason::FlowTableFull`], [`DropReason::FlowCollision`],
    /// [`DropReason::PortsExhausted`].
    pub fn open(
        &mut self,
        now: Instant,
        key: &Outside,
        delivery: Addr,
        delivery_port: u16,
        weight: impl Into<Weight>,
        limit: &Limit,
    ) -> Result<Inside, DropReason> {
        let (now, weight) = (self.tick(now), weight.into());
        debug_assert!(self.find_outside(key).is_none());
        let inside = Inside {
            protocol: key.protocol,
            client: seen_client(key),
            client_port: key.client_port,
            delivery,
            delivery_port,
        };
        // Make space first: a flow that is evicted for it can no longer be in the way.
        self.make_space(now, key.peer, key.client, limit)?;
        if let Some(masquerade) = &self.masquerade {
            let first = outside_hash(&masquerade.seed, key) as u32;
            let inside = Inside {
                client: masquerade.of(key.client),
                ..inside
            };
            let Some(inside) = self.borrow_port(now, key, inside, first, limit) else {
                limit.give_back(key.peer);
                self.refused += 1;
                return Err(DropReason::PortsExhausted);
            };
            self.insert(now, key, &inside, Side::Client, weight);
            return Ok(inside);
        }
        let Some((inside, collided)) = self.free_inside(now, key, inside, limit) else {
            limit.give_back(key.peer);
            return Err(DropReason::FlowCollision);
        };
        self.collisions += u64::from(collided);
        self.insert(now, key, &inside, Side::Client, weight);
        Ok(inside)
    }

    /// Makes the flow that a packet from the application continues after a restart.
    ///
    /// # Errors
    /// [`DropReason::FlowTableFull`]; [`DropReason::NoFlow`] if the client knows a flow by
    /// `outside` that has another inner view.
    pub fn reopen(
        &mut self,
        now: Instant,
        inside: &Inside,
        outside: &Outside,
        weight: impl Into<Weight>,
        limit: &Limit,
    ) -> Result<(), DropReason> {
        let now = self.tick(now);
        debug_assert!(self.find_inside(inside).is_none());
        if let Some(at) = self.find_outside(outside) {
            if !self.slab.get(at).is_expired(now) {
                return Err(DropReason::NoFlow);
            }
            self.remove(at, limit);
        }
        self.make_space(now, outside.peer, outside.client, limit)?;
        self.insert(now, outside, inside, Side::Application, weight.into());
        Ok(())
    }

    /// Makes the flow that a packet from the application begins, or continues after a restart,
    /// where the application has asked first.
    ///
    /// `wanted` is how the other end is to see it. If it sees another flow so, this one gets
    /// another port at the moved address.
    ///
    /// # Errors
    /// [`DropReason::FlowTableFull`], [`DropReason::FlowCollision`].
    pub fn begin(
        &mut self,
        now: Instant,
        inside: &Inside,
        wanted: &Outside,
        weight: impl Into<Weight>,
        limit: &Limit,
    ) -> Result<Outside, DropReason> {
        let now = self.tick(now);
        debug_assert!(self.find_inside(inside).is_none());
        self.make_space(now, wanted.peer, wanted.client, limit)?;
        let Some(outside) = self.free_outside(now, wanted, limit) else {
            limit.give_back(wanted.peer);
            return Err(DropReason::FlowCollision);
        };
        self.collisions += u64::from(outside != *wanted);
        self.insert(now, &outside, inside, Side::Application, weight.into());
        Ok(outside)
    }

    /// Delivers a flow to another address from now on, unless that would make two flows the same.
    pub fn deliver_to(&mut self, key: &Inside, delivery: Addr) {
        let after = Inside { delivery, ..*key };
        let (Some(at), None) = (self.find_inside(key), self.find_inside(&after)) else {
            return;
        };
        let before = inside_hash(&self.seed, key);
        if let Ok(found) = self.inside.find_entry(before, |&other| other == at) {
            found.remove();
        }
        self.slab.get_mut(at).delivery = delivery;
        let (seed, slab, masquerade) = (&self.seed, &self.slab, &self.masquerade);
        (self.inside).insert_unique(inside_hash(seed, &after), at, |&at| {
            inside_hash(seed, &inner(masquerade, slab.get(at)))
        });
    }

    /// Forgets the flows without a connection that are delivered to an address: the client's next
    /// packet makes them anew. A connection has ended with its address, or waits for it.
    pub fn forget_delivery(&mut self, delivery: Addr, limit: &Limit) {
        for at in 0..self.slab.used() {
            let entry = self.slab.get(at);
            let there = !entry.seen.is_nothing() && entry.delivery == delivery;
            if there && entry.protocol != TCP {
                self.remove(at, limit);
            }
        }
    }

    /// Forgets all flows of a peer.
    pub fn forget_peer(&mut self, peer: PeerId, limit: &Limit) {
        for at in 0..self.slab.used() {
            let entry = self.slab.get(at);
            if !entry.seen.is_nothing() && entry.peer == peer {
                self.remove(at, limit);
            }
        }
    }

    /// Removes flows whose time is up, examining at most `budget`. Returns how many it removed.
    /// Call it every second or so.
    pub fn expire(&mut self, now: Instant, budget: usize, limit: &Limit) -> usize {
        let now = self.tick(now);
        let mut looked = 0;
        let mut removed = 0;
        let peers = self.peers.len();
        let first = self.expired;
        let turns = (0..peers).map(|step| (first + step) % peers);
        // Another begins each time, so that nobody's flows use the budget up for good.
        self.expired = (first + 1) % peers.max(1);
        let lists = turns.flat_map(|peer| Class::ALL.iter().map(move |&class| (peer, class)));
        'all: for (peer, class) in lists {
            while let Some(at) = self.peers[peer].lists[class as usize].first() {
                if looked == budget {
                    break 'all;
                }
                let entry = self.slab.get(at);
                if entry.is_expired(now) {
                    self.remove(at, limit);
                    removed += 1;
                } else if entry.was_used_since_placed()
                    && now.saturating_sub(entry.placed) > class.timeout() / 4
                {
                    self.unlink(at);
                    self.link(at, now);
                } else {
                    break;
                }
                looked += 1;
            }
        }
        removed
    }

    /// Makes space for a new flow in one way. Returns whether that found a flow to give up.
    pub(super) fn evict(&mut self, now: Instant, stage: Stage, turn: &Turn, limit: &Limit) -> bool {
        let now = self.tick(now);
        self.evict_one(now, stage, turn, limit)
    }

    /// How many flows there are.
    pub(super) fn live(&self) -> usize {
        self.live
    }

    /// Appends the flows at the next few numbers from `from` on, as those of the table `part`, and
    /// returns where the next ones are, if there are more.
    pub(super) fn slice(
        &self,
        now: Instant,
        part: u32,
        from: u32,
        out: &mut Vec<Row>,
    ) -> Option<u32> {
        let (now, used) = (self.tick(now), self.slab.used());
        let end = from.saturating_add(SLICE).min(used);
        for at in from..end {
            let entry = self.slab.get(at);
            // A removed one has seen nothing.
            if !entry.seen.is_nothing() && !entry.is_expired(now) {
                out.push(entry.row(Place { part, at }, now));
            }
        }
        (end < used).then_some(end)
    }

    /// Counters of this table. `max` is 0 here: only the limit knows it.
    pub fn stats(&self) -> FlowStats {
        FlowStats {
            live: self.live as u64,
            max: 0,
            evicted: self.evicted,
            displaced: self.displaced,
            collisions: self.collisions,
            refused: self.refused,
        }
    }

    /// Bytes that the table has allocated.
    pub fn allocated(&self) -> usize {
        self.slab.allocated()
            + self.outside.allocation_size()
            + self.inside.allocation_size()
            + self.latest.allocation_size()
            + self.peers.capacity() * size_of::<PeerFlows>()
    }

    #[inline]
    fn tick(&self, now: Instant) -> u32 {
        now.saturating_duration_since(self.epoch).as_secs() as u32
    }

    #[inline]
    fn find_outside(&self, key: &Outside) -> Option<u32> {
        let slab = &self.slab;
        self.outside
            .find(outside_hash(&self.seed, key), |&at| {
                slab.get(at).is_outside(key)
            })
            .copied()
    }

    #[inline]
    fn find_inside(&self, key: &Inside) -> Option<u32> {
        let slab = &self.slab;
        self.inside
            .find(inside_hash(&self.seed, key), |&at| {
                inner(&self.masquerade, slab.get(at)) == *key
            })
            .copied()
    }

    /// Notes a packet of the flow at `at`.
    #[inline]
    fn note(&mut self, at: u32, now: u32, side: Side, weight: Weight) {
        let entry = self.slab.get_mut(at);
        entry.last_seen = now;
        entry.counts.add(side as usize, weight);
        let seen = entry.seen.after(entry.protocol, side, weight.tcp_flags);
        if seen != entry.seen {
            if entry.seen.is_closed() && !seen.is_closed() {
                // Another connection with the same ports.
                entry.began = now;
                entry.counts = Counts::default();
                entry.counts.add(side as usize, weight);
            }
            entry.seen = seen;
            self.reclass(at, now);
        }
    }

    #[cold]
    fn reclass(&mut self, at: u32, now: u32) {
        let entry = self.slab.get(at);
        let class = Class::of(entry.protocol, entry.seen);
        if class != entry.class {
            self.unlink(at);
            let entry = self.slab.get_mut(at);
            let before = std::mem::replace(&mut entry.class, class);
            if let Some(tallies) = &self.tallies {
                tallies.turned(entry.peer, &mut entry.counted, before, class);
            }
            self.link(at, now);
        }
    }

    /// Takes a place for one more flow, evicting another if need be.
    fn make_space(
        &mut self,
        now: u32,
        peer: PeerId,
        client: Addr,
        limit: &Limit,
    ) -> Result<(), DropReason> {
        while !limit.take(peer) {
            let turn = limit.turn(peer, client);
            let mut stages = Stage::ALL.into_iter();
            if !stages.any(|stage| self.evict_one(now, stage, &turn, limit)) {
                self.refused += 1;
                return Err(DropReason::FlowTableFull);
            }
        }
        Ok(())
    }

    /// The inner view to use, and whether it differs from `wanted`.
    fn free_inside(
        &mut self,
        now: u32,
        outside: &Outside,
        wanted: Inside,
        limit: &Limit,
    ) -> Option<(Inside, bool)> {
        if self.is_free(now, &wanted, limit) {
            return Some((wanted, false));
        }
        if !has_ports(wanted.protocol) {
            return None;
        }
        let start = (inside_hash(&self.seed, &wanted) >> 32) as u32;
        let others = (FIRST_PORT as u16)..=u16::MAX;
        self.find_port(now, outside, wanted, others, start, limit)
            .map(|key| (key, true))
    }

    /// The outer view to use: as it is wanted, or with another port at the moved address.
    fn free_outside(&mut self, now: u32, wanted: &Outside, limit: &Limit) -> Option<Outside> {
        if self.is_outside_free(now, wanted, limit) {
            return Some(*wanted);
        }
        if !has_ports(wanted.protocol) {
            return None;
        }
        let first = (outside_hash(&self.seed, wanted) >> 32) as u32;
        let span = u32::from(u16::MAX) - FIRST_PORT + 1;
        let port = |index: u32| {
            let offset = first.wrapping_add(index.wrapping_mul(PORT_STEP)) % span;
            (FIRST_PORT + offset) as u16
        };
        (0..PORT_TRIES)
            .map(|index| Outside {
                moved_port: port(index),
                ..*wanted
            })
            .find(|key| self.is_outside_free(now, key, limit))
    }

    fn is_outside_free(&mut self, now: u32, key: &Outside, limit: &Limit) -> bool {
        let found = self.find_outside(key);
        self.is_free_at(now, found, limit)
    }

    /// The inner view with a port of the range that is borrowed.
    fn borrow_port(
        &mut self,
        now: u32,
        outside: &Outside,
        wanted: Inside,
        first: u32,
        limit: &Limit,
    ) -> Option<Inside> {
        let ports = self.masquerade.as_ref()?.ports.clone();
        self.find_port(now, outside, wanted, ports, first, limit)
    }

    /// The inner view with a port of the range that is free there. If all ports that are tried are
    /// taken, a flow gives up its own: one of the source that has a good part of them, or one that
    /// nobody is using.
    fn find_port(
        &mut self,
        now: u32,
        outside: &Outside,
        wanted: Inside,
        ports: RangeInclusive<u16>,
        first: u32,
        limit: &Limit,
    ) -> Option<Inside> {
        let span = u32::from(*ports.end()) - u32::from(*ports.start()) + 1;
        let mut taken = Vec::new();
        for index in 0..PORT_TRIES.min(span) {
            let offset = first.wrapping_add(index.wrapping_mul(PORT_STEP)) % span;
            let key = Inside {
                client_port: ports.start() + offset as u16,
                ..wanted
            };
            if self.is_free(now, &key, limit) {
                return Some(key);
            }
            let Some(at) = self.find_inside(&key) else {
                continue;
            };
            let mut one = self.candidate(at, now);
            if now.saturating_sub(one.last_seen) >= RECENT_PORT.as_secs() as u32 {
                one.tier = one.tier.or(Some(EVICTION_ORDER.len()));
            }
            taken.push(one);
        }
        let new = Holder::of(outside.peer, outside.client);
        let gives_way = of_largest_holder(&mut taken, new, PORT_SHARE)
            .or_else(|| most_dispensable(&taken))
            .or_else(|| of_largest_holder(&mut taken, new, LAST_PORT_SHARE))?;
        let freed = self.slab.get(gives_way.at).inside_port;
        self.give_up(gives_way, limit);
        Some(Inside {
            client_port: freed,
            ..wanted
        })
    }

    fn is_free(&mut self, now: u32, key: &Inside, limit: &Limit) -> bool {
        let found = self.find_inside(key);
        self.is_free_at(now, found, limit)
    }

    /// Whether nothing was found there, or nothing but a flow whose time is up: it ends now.
    fn is_free_at(&mut self, now: u32, found: Option<u32>, limit: &Limit) -> bool {
        match found {
            None => true,
            Some(at) if self.slab.get(at).is_expired(now) => {
                self.remove(at, limit);
                true
            }
            Some(_) => false,
        }
    }

    fn insert(&mut self, now: u32, outside: &Outside, inside: &Inside, side: Side, weight: Weight) {
        let mut entry = Entry::new(outside, inside, now);
        entry.counts.add(side as usize, weight);
        entry.seen = entry.seen.after(entry.protocol, side, weight.tcp_flags);
        entry.class = Class::of(entry.protocol, entry.seen);
        self.add(entry, now);
    }

    /// Puts an entry everywhere that it belongs, as one that was placed then.
    fn add(&mut self, entry: Entry, now: u32) {
        let at = self.slab.add(entry);
        let (seed, slab, masquerade) = (&self.seed, &self.slab, &self.masquerade);
        let outer = |entry: &Entry| outside_hash(seed, &entry.outside());
        let inner = |entry: &Entry| inside_hash(seed, &inner(masquerade, entry));
        (self.outside).insert_unique(outer(&entry), at, |&at| outer(slab.get(at)));
        (self.inside).insert_unique(inner(&entry), at, |&at| inner(slab.get(at)));
        self.note_latest(at);
        self.live += 1;
        self.link(at, now);
    }

    /// The flow at `at` is the last that its client's end began. Nobody asks for one where all
    /// clients have one address.
    fn note_latest(&mut self, at: u32) {
        let entry = self.slab.get(at);
        if entry.protocol != UDP || self.masquerade.is_some() {
            return;
        }
        let (client, port) = (entry.client, entry.inside_port);
        let (seed, slab) = (&self.seed, &self.slab);
        let is_end = |&other: &u32| slab.get(other).is_end(client, port);
        match self.latest.find_mut(end_hash(seed, client, port), is_end) {
            Some(other) => *other = at,
            None => {
                let hash = |&at: &u32| {
                    let entry = slab.get(at);
                    end_hash(seed, entry.client, entry.inside_port)
                };
                let first = end_hash(seed, client, port);
                self.latest.insert_unique(first, at, hash);
            }
        }
    }

    fn remove(&mut self, at: u32, limit: &Limit) {
        self.unlink(at);
        let entry = self.slab.get(at);
        let seen_inside = inner(&self.masquerade, entry);
        let (outside, inside) = (
            outside_hash(&self.seed, &entry.outside()),
            inside_hash(&self.seed, &seen_inside),
        );
        if let Some(ended) = &mut self.ended {
            ended.put(seen_inside);
        }
        for (index, hash) in [(&mut self.outside, outside), (&mut self.inside, inside)] {
            match index.find_entry(hash, |&other| other == at) {
                Ok(found) => drop(found.remove()),
                Err(_) => debug_assert!(false, "every entry is in both indexes"),
            }
        }
        let entry = self.slab.get_mut(at);
        if entry.protocol == UDP {
            let hash = end_hash(&self.seed, entry.client, entry.inside_port);
            if let Ok(found) = self.latest.find_entry(hash, |&other| other == at) {
                found.remove();
            }
        }
        entry.seen = Seen::default();
        if let Some(tallies) = &self.tallies {
            tallies.ended(entry.peer, entry.counted, entry.class);
        }
        let peer = entry.peer;
        self.slab.free(at);
        self.live -= 1;
        limit.give_back(peer);
    }

    fn evict_one(&mut self, now: u32, stage: Stage, turn: &Turn, limit: &Limit) -> bool {
        let Some(&peer) = self.peers.get(usize::from(turn.peer.0)) else {
            return false;
        };
        let found = match stage {
            Stage::Flood if peer.unconfirmed < peer.live / FLOODED => None,
            // Any flow that was reset will do, whether it was used meanwhile or not.
            Stage::Flood => (peer.lists[Class::TcpReset as usize].first())
                .or_else(|| self.least_recent(turn.peer, &UNCONFIRMED, now, 0)),
            Stage::Holder => {
                let mut sample = self.sample(turn.peer, now);
                let found = of_largest_holder(&mut sample, turn.new, SAMPLE_LEAD);
                return found.is_some_and(|found| {
                    self.give_up(found, limit);
                    true
                });
            }
            Stage::Idle => {
                let recent = RECENT.as_secs() as u32;
                let [reset, unconfirmed, idle @ ..] = &EVICTION_ORDER;
                (self.least_recent(turn.peer, reset, now, 0))
                    .or_else(|| self.least_recent(turn.peer, unconfirmed, now, recent))
                    .or_else(|| {
                        let mut tiers = idle.iter();
                        tiers.find_map(|tier| self.least_recent(turn.peer, tier, now, 0))
                    })
                    .or_else(|| self.least_recent(turn.peer, unconfirmed, now, 0))
            }
            Stage::InUse if !turn.is_guest => None,
            Stage::InUse => self.least_recent(turn.peer, &ANY, now, 0),
        };
        let Some(at) = found else {
            return false;
        };
        let found = self.candidate(at, now);
        self.give_up(found, limit);
        true
    }

    /// Removes a flow before its time.
    fn give_up(&mut self, flow: Candidate, limit: &Limit) {
        self.remove(flow.at, limit);
        self.evicted += 1;
        self.displaced += u64::from(flow.tier.is_none());
    }

    fn candidate(&self, at: u32, now: u32) -> Candidate {
        let entry = self.slab.get(at);
        let idle = now.saturating_sub(entry.last_seen);
        Candidate {
            at,
            holder: Holder::of(entry.peer, entry.client),
            tier: entry.class.eviction_tier(idle),
            last_seen: entry.last_seen,
        }
    }

    /// Some flows of a peer, drawn at random.
    fn sample(&mut self, peer: PeerId, now: u32) -> Vec<Candidate> {
        let (seed, drawn, used) = (&self.seed, self.drawn, self.slab.used());
        self.drawn = self.drawn.wrapping_add(DRAWS as u64);
        let draws = (0..DRAWS as u64).map(|step| seed.draw(drawn.wrapping_add(step), used));
        let mut some: Vec<u32> = draws
            .filter(|&at| {
                let entry = self.slab.get(at);
                !entry.seen.is_nothing() && entry.peer == peer
            })
            .take(SAMPLE)
            .collect();
        some.sort_unstable();
        some.dedup();
        some.into_iter().map(|at| self.candidate(at, now)).collect()
    }

    /// The flow of a peer and tier that was unused for the longest time, if that is `idle` seconds
    /// and as long as the tier says.
    fn least_recent(&mut self, peer: PeerId, tier: &Tier, now: u32, idle: u32) -> Option<u32> {
        let mut best: Option<(u32, u32)> = None;
        for &class in tier.classes {
            for tries in 1.. {
                let peer = &self.peers[usize::from(peer.0)];
                let Some(at) = peer.lists[class as usize].first() else {
                    break;
                };
                let entry = self.slab.get(at);
                if entry.was_used_since_placed() && tries < EVICT_TRIES {
                    self.unlink(at);
                    self.link(at, now);
                    continue;
                }
                if best.is_none_or(|(seen, _)| entry.last_seen < seen) {
                    best = Some((entry.last_seen, at));
                }
                break;
            }
        }
        let unused = |seen: u32| now.saturating_sub(seen);
        best.filter(|&(seen, _)| unused(seen) >= idle && tier.lets_go(unused(seen)))
            .map(|(_, at)| at)
    }

    /// Appends an entry to the list of its peer and class.
    fn link(&mut self, at: u32, now: u32) {
        let entry = self.slab.get_mut(at);
        entry.placed = now;
        let (class, peer) = (entry.class, usize::from(entry.peer.0));
        if self.peers.len() <= peer {
            self.peers.resize(peer + 1, PeerFlows::NONE);
        }
        let peer = &mut self.peers[peer];
        self.slab.append(&mut peer.lists[class as usize], at);
        peer.live += 1;
        peer.unconfirmed += u32::from(class.is_unconfirmed());
    }

    /// Takes an entry out of the list of its peer and class.
    fn unlink(&mut self, at: u32) {
        let entry = self.slab.get(at);
        let (class, peer) = (entry.class, usize::from(entry.peer.0));
        let peer = &mut self.peers[peer];
        self.slab.unlink(&mut peer.lists[class as usize], at);
        peer.live -= 1;
        peer.unconfirmed -= u32::from(class.is_unconfirmed());
    }
}

impl std::fmt::Debug for FlowTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FlowTable")
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

/// The inner view of a flow. An entry has space for one client address: the other is always the
/// same.
#[inline]
fn inner(masquerade: &Option<Masquerade>, entry: &Entry) -> Inside {
    let inside = entry.inside();
    match masquerade {
        None => inside,
        Some(masquerade) => Inside {
            client: masquerade.of(inside.client),
            ..inside
        },
    }
}

/// The client's address as the application sees it. What this host sends to a moved address comes
/// from there: it takes no packet from itself that comes in on a link.
#[inline]
pub(super) fn seen_client(flow: &Outside) -> Addr {
    if flow.peer == PeerId::SELF {
        flow.moved
    } else {
        flow.client
    }
}

/// Whether a port, which may be rewritten, tells the flows of a protocol apart.
fn has_ports(protocol: u8) -> bool {
    matches!(protocol, TCP | UDP | ICMP | ICMPV6)
}

/// One flow. 120 bytes with its links; with both indexes about 141 at a million flows. (In a cache
/// line of its own it is found no faster: a cold lookup waits for the page tables.) It has whole
/// addresses, and no numbers that stand for them: numbers run out, or are given out again while a
/// flow still has them, and one peer decides how soon.
#[derive(Clone, Copy, Debug)]
struct Entry {
    client: Addr,
    moved: Addr,
    delivery: Addr,
    client_port: u16,
    moved_port: u16,
    inside_port: u16,
    delivery_port: u16,
    peer: PeerId,
    protocol: u8,
    class: Class,
    seen: Seen,
    /// Time of the last packet, in seconds since the table's epoch. `placed` is the time at which
    /// the entry was put into its list, in the same unit.
    last_seen: u32,
    placed: u32,
    counted: Counted,
    /// Time of the first packet.
    began: u32,
    counts: Counts,
}

impl Entry {
    fn new(outside: &Outside, inside: &Inside, now: u32) -> Self {
        Self {
            client: outside.client,
            client_port: outside.client_port,
            moved_port: outside.moved_port,
            inside_port: inside.client_port,
            delivery_port: inside.delivery_port,
            peer: outside.peer,
            moved: outside.moved,
            delivery: inside.delivery,
            protocol: outside.protocol,
            class: Class::Other,
            seen: Seen::default(),
            last_seen: now,
            placed: now,
            counted: Counted::NOWHERE,
            began: now,
            counts: Counts::default(),
        }
    }

    /// What a reader gets of it.
    fn row(&self, place: Place, now: u32) -> Row {
        let since = |then: u32| Duration::from_secs(now.saturating_sub(then).into());
        Row {
            place,
            peer: self.peer,
            protocol: self.protocol,
            client: self.client,
            client_port: self.client_port,
            moved: self.moved,
            moved_port: self.moved_port,
            delivery: Some((self.delivery, self.delivery_port)),
            state: listing::state(self.protocol, self.seen),
            age: since(self.began),
            idle: since(self.last_seen),
            packets: self.counts.packets,
            bytes: self.counts.bytes,
        }
    }

    #[inline]
    fn is_outside(&self, key: &Outside) -> bool {
        self.outside() == *key
    }

    #[inline]
    fn outside(&self) -> Outside {
        Outside {
            peer: self.peer,
            protocol: self.protocol,
            client: self.client,
            client_port: self.client_port,
            moved: self.moved,
            moved_port: self.moved_port,
        }
    }

    #[inline]
    fn inside(&self) -> Inside {
        Inside {
            protocol: self.protocol,
            client: seen_client(&self.outside()),
            client_port: self.inside_port,
            delivery: self.delivery,
            delivery_port: self.delivery_port,
        }
    }

    #[inline]
    fn is_end(&self, client: Addr, port: u16) -> bool {
        self.client == client && self.inside_port == port
    }

    #[inline]
    fn is_expired(&self, now: u32) -> bool {
        now.saturating_sub(self.last_seen) >= self.class.timeout()
    }

    fn was_used_since_placed(&self) -> bool {
        self.last_seen > self.placed
    }
}

#[inline]
fn outside_hash(seed: &Seed, key: &Outside) -> u64 {
    let ports =
        u64::from(key.client_port) | u64::from(key.moved_port) << 16 | u64::from(key.peer.0) << 32;
    seed.flow([key.client, key.moved], ports, key.protocol)
}

#[inline]
fn end_hash(seed: &Seed, client: Addr, port: u16) -> u64 {
    seed.flow([client, client], port.into(), UDP)
}

#[inline]
fn inside_hash(seed: &Seed, key: &Inside) -> u64 {
    let ports = u64::from(key.client_port) | u64::from(key.delivery_port) << 16;
    seed.flow([key.client, key.delivery], ports, key.protocol)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::class::{
        ICMP_QUERY, OTHER, RECENT_TCP, TCP_ESTABLISHED, TCP_HALF_CLOSED, TCP_OPENING,
        UDP_BOTH_WAYS, UDP_ONE_WAY,
    };
    use crate::flow::slab::slot_size;
    use crate::packet::{ACK, FIN, RST, SYN};
    use crate::testing::epoch;
    use proptest::prelude::*;
    use std::collections::HashMap;
    use std::net::Ipv4Addr;
    use std::time::Duration;

    const PEER: PeerId = PeerId(3);
    const MOVED: u8 = 0;
    const DELIVERY: u8 = 1;
    const SYN_ACK: u8 = SYN | ACK;

    struct Bed {
        table: FlowTable,
        limit: Limit,
        now: Instant,
    }

    impl Bed {
        fn new(max: usize) -> Self {
            let now = epoch();
            Self {
                table: FlowTable::new(Seed::new([1, 2]), now),
                limit: Limit::new(max),
                now,
            }
        }

        fn wait(&mut self, time: Duration) {
            self.now += time;
        }

        fn client_sends(&mut self, key: &Outside, flags: u8) -> Result<Inside, DropReason> {
            match self.table.client_packet(self.now, key, flags, &self.limit) {
                Some(inside) => Ok(inside),
                None => {
                    let (now, limit) = (self.now, &self.limit);
                    self.table
                        .open(now, key, ours(DELIVERY), key.moved_port, flags, limit)
                }
            }
        }

        fn application_sends(&mut self, key: &Inside, flags: u8) -> Option<Outside> {
            self.table
                .application_packet(self.now, key, flags, &self.limit)
        }

        /// A connection with its handshake done.
        fn connect(&mut self, key: &Outside) -> Inside {
            let inside = self.client_sends(key, SYN).unwrap();
            self.application_sends(&inside, SYN_ACK).unwrap();
            self.client_sends(key, ACK).unwrap()
        }

        /// A conversation without TCP: there, back, and there again.
        fn converse(&mut self, key: &Outside) -> Inside {
            let inside = self.client_sends(key, 0).unwrap();
            self.application_sends(&inside, 0).unwrap();
            self.client_sends(key, 0).unwrap()
        }

        fn expire(&mut self) {
            self.table.expire(self.now, usize::MAX, &self.limit);
        }

        fn knows(&self, key: &Outside) -> bool {
            self.table.peek_outside(key).is_some()
        }
    }

    fn ours(n: u8) -> Addr {
        Ipv4Addr::new(192, 0, 2, n).into()
    }

    fn key(protocol: u8, client: u32, port: u16) -> Outside {
        Outside {
            peer: PEER,
            protocol,
            client: Ipv4Addr::from(client).into(),
            client_port: port,
            moved: ours(MOVED),
            moved_port: 80,
        }
    }

    fn class(bed: &Bed, key: &Outside) -> Class {
        bed.table
            .slab
            .get(bed.table.find_outside(key).unwrap())
            .class
    }

    #[test]
    fn an_entry_is_small() {
        assert_eq!(slot_size::<Entry>(), 120);
    }

    #[test]
    fn tcp_states_follow_what_both_sides_send() {
        let mut bed = Bed::new(10);
        let k = key(TCP, 1, 1);
        let inside = bed.client_sends(&k, SYN).unwrap();
        assert_eq!(class(&bed, &k), Class::TcpOpening);
        bed.application_sends(&inside, SYN_ACK).unwrap();
        assert_eq!(
            class(&bed, &k),
            Class::TcpOpening,
            "a SYN cookie proves nothing"
        );
        bed.client_sends(&k, ACK).unwrap();
        assert_eq!(class(&bed, &k), Class::TcpEstablished);
        bed.client_sends(&k, SYN).unwrap();
        assert_eq!(
            class(&bed, &k),
            Class::TcpEstablished,
            "a forged SYN changes nothing"
        );
        bed.client_sends(&k, FIN | ACK).unwrap();
        assert_eq!(class(&bed, &k), Class::TcpHalfClosed);
        bed.wait(TCP_HALF_CLOSED - Duration::from_secs(1));
        bed.expire();
        bed.application_sends(&inside, ACK).unwrap();
        bed.wait(TCP_HALF_CLOSED - Duration::from_secs(1));
        bed.expire();
        assert!(bed.knows(&k), "data still flows");
        bed.application_sends(&inside, FIN | ACK).unwrap();
        assert_eq!(class(&bed, &k), Class::TcpClosing);
        bed.client_sends(&k, SYN).unwrap();
        assert_eq!(class(&bed, &k), Class::TcpOpening, "the port is used again");
        bed.application_sends(&inside, RST | ACK).unwrap();
        assert_eq!(class(&bed, &k), Class::TcpReset);
        bed.client_sends(&k, ACK).unwrap();
        assert_eq!(class(&bed, &k), Class::TcpReset, "what was under way");
        bed.application_sends(&inside, ACK).unwrap();
        assert_eq!(
            class(&bed, &k),
            Class::TcpEstablished,
            "the RST was not accepted"
        );
    }

    #[test]
    fn timeouts_are_those_of_the_rfcs() {
        for (protocol, both, timeout) in [
            (TCP, false, TCP_OPENING),
            (TCP, true, TCP_ESTABLISHED),
            (UDP, false, UDP_ONE_WAY),
            (UDP, true, UDP_BOTH_WAYS),
            (ICMP, true, ICMP_QUERY),
            (47, true, OTHER),
        ] {
            let mut bed = Bed::new(10);
            let k = key(protocol, 1, 1);
            let inside = bed.client_sends(&k, SYN).unwrap();
            if both {
                bed.application_sends(&inside, SYN_ACK).unwrap();
                bed.client_sends(&k, ACK).unwrap();
            }
            // Used once on the way: the time counts from there.
            bed.wait(timeout / 2);
            bed.expire();
            bed.client_sends(&k, if both { ACK } else { SYN }).unwrap();
            bed.wait(timeout - Duration::from_secs(1));
            bed.expire();
            assert!(bed.knows(&k), "{protocol} {both}");
            bed.wait(Duration::from_secs(1));
            bed.expire();
            assert!(!bed.knows(&k), "{protocol} {both}");
            assert_eq!(bed.limit.live(), 0);
        }
    }

    #[test]
    fn two_moved_addresses_with_one_delivery_stay_apart() {
        let mut bed = Bed::new(10);
        let first = key(TCP, 1, 4000);
        let second = Outside {
            moved: ours(7),
            ..first
        };
        let a = bed.connect(&first);
        let b = bed.connect(&second);
        assert_eq!(a.client_port, 4000);
        assert_ne!(a, b);
        assert_eq!(bed.application_sends(&a, ACK), Some(first));
        assert_eq!(bed.application_sends(&b, ACK), Some(second));
        assert_eq!(bed.table.stats().collisions, 1);
        // A protocol without ports has nothing that tells its flows apart.
        let gre = Outside {
            moved_port: 0,
            ..key(47, 1, 0)
        };
        bed.client_sends(&gre, 0).unwrap();
        let other = Outside {
            moved: ours(7),
            ..gre
        };
        assert_eq!(bed.client_sends(&other, 0), Err(DropReason::FlowCollision));
        assert_eq!(bed.limit.live(), 3);
        // Once the first is over, the second has its place.
        bed.wait(OTHER);
        assert!(bed.client_sends(&other, 0).is_ok());
    }

    #[test]
    fn a_flood_takes_nothing_that_is_in_use() {
        let mut bed = Bed::new(20_000);
        let live: Vec<_> = (0..1000)
            .map(|port| key(TCP, 0x0a00_0001 + u32::from(port) / 100, port))
            .collect();
        for key in &live {
            bed.connect(key);
        }
        let udp = key(UDP, 0x0a00_0001, 53);
        bed.converse(&udp);
        for source in 0..200_000 {
            // Forged sources, all of which are answered.
            let protocol = [TCP, UDP, ICMP][source as usize % 3];
            let syn = key(protocol, 0x2000_0000 + source * 977, 1);
            let inside = bed.client_sends(&syn, SYN).unwrap();
            bed.application_sends(&inside, SYN_ACK).unwrap();
        }
        assert_eq!(bed.limit.live(), 20_000);
        assert!(live.iter().all(|key| bed.knows(key)) && bed.knows(&udp));
        let stats = bed.table.stats();
        assert_eq!((stats.evicted, stats.refused), (200_000 + 1001 - 20_000, 0));
    }

    #[test]
    fn what_is_used_stays_and_the_new_is_refused() {
        let mut bed = Bed::new(100);
        let live: Vec<_> = (0..100).map(|n| key(TCP, 0x0a00_0000 + n, 1)).collect();
        for key in &live {
            bed.connect(key);
        }
        let new = key(TCP, 2, 1);
        assert_eq!(bed.client_sends(&new, SYN), Err(DropReason::FlowTableFull));
        assert_eq!(bed.table.stats().refused, 1);
        // All but the first were used lately: that one goes.
        bed.wait(RECENT_TCP);
        for key in &live[1..] {
            bed.client_sends(key, ACK).unwrap();
        }
        assert!(bed.client_sends(&new, SYN).is_ok());
        assert!(!bed.knows(&live[0]) && bed.knows(&live[1]));
    }

    /// A thousand flows of one source, all answered and used this moment, and clients that come.
    #[test]
    fn one_source_cannot_have_it_all() {
        type Fill = fn(&mut Bed, u16);
        let fills: [(&str, Fill); 4] = [
            ("one-way", |bed, port| {
                bed.client_sends(&key(UDP, 1, port), 0).unwrap();
            }),
            ("established", |bed, port| {
                bed.connect(&key(TCP, 1, port));
            }),
            ("half-closed", |bed, port| {
                let inside = bed.connect(&key(TCP, 1, port));
                bed.application_sends(&inside, FIN | ACK).unwrap();
            }),
            ("conversations", |bed, port| {
                bed.converse(&key(UDP, 1, port));
            }),
        ];
        for (what, fill) in fills {
            let mut bed = Bed::new(1000);
            (0..1000).for_each(|port| fill(&mut bed, port));
            let mine = |bed: &Bed| {
                let of_one = |port| bed.knows(&key(TCP, 1, port)) || bed.knows(&key(UDP, 1, port));
                (0..1000).filter(|&port| of_one(port)).count()
            };
            assert_eq!(mine(&bed), 1000, "{what}: nobody else wants the space");
            let others: Vec<_> = (0..500).map(|n| key(TCP, 0x0a00_0000 + n, 7)).collect();
            for key in &others {
                bed.connect(key);
            }
            assert_eq!(mine(&bed), 500, "{what}");
            assert!(others.iter().all(|key| bed.knows(key)), "{what}");
            // More of its own displace nobody else.
            for port in 1000..2000 {
                let _ = bed.client_sends(&key(UDP, 1, port), 0);
            }
            assert!(others.iter().all(|key| bed.knows(key)), "{what}");
            assert!(bed.limit.live() <= 1000, "{what}");
        }
    }

    #[test]
    fn half_closed_connections_give_way() {
        let mut bed = Bed::new(100);
        for n in 0..100 {
            let inside = bed.connect(&key(TCP, 0x0a00_0000 + n, 1));
            if n < 50 {
                bed.application_sends(&inside, FIN | ACK).unwrap();
            }
        }
        let new = |n: u32| key(TCP, 0x0b00_0000 + n, 1);
        assert_eq!(
            bed.client_sends(&new(0), SYN),
            Err(DropReason::FlowTableFull)
        );
        bed.wait(RECENT);
        for n in 0..50 {
            bed.connect(&new(n));
        }
        assert_eq!(
            bed.client_sends(&new(50), SYN),
            Err(DropReason::FlowTableFull)
        );
        let open = |n: u32| bed.knows(&key(TCP, 0x0a00_0000 + n, 1));
        assert_eq!((0..100u32).filter(|&n| open(n)).count(), 50);
        assert!((50..100).all(open));
    }

    #[test]
    fn a_peer_keeps_its_part_whatever_another_sends() {
        let mut bed = Bed::new(1000);
        let of = |peer, key: Outside| Outside {
            peer: PeerId(peer),
            ..key
        };
        let held: Vec<_> = (0..400)
            .map(|n| of(2, key(TCP, 0x0a00_0000 + n, 1)))
            .collect();
        for key in &held {
            bed.connect(key);
        }
        // From as many sources as it likes, of which it says that they go on.
        for n in 0..5_000 {
            let busy = [
                of(1, key(TCP, 0x2000_0000 + n, 1)),
                of(1, key(UDP, 0x0a00_0000 + n % 400, n as u16)),
            ];
            for key in busy {
                for flags in [SYN, ACK] {
                    if let Ok(inside) = bed.client_sends(&key, flags) {
                        bed.application_sends(&inside, SYN_ACK).unwrap();
                    }
                }
            }
        }
        assert!(held.iter().all(|key| bed.knows(key)));
        // And it keeps none of the other's new ones out.
        let more: Vec<_> = (0..100)
            .map(|n| of(2, key(TCP, 0x0a01_0000 + n, 1)))
            .collect();
        for key in &more {
            bed.connect(key);
        }
        assert!(held.iter().chain(&more).all(|key| bed.knows(key)));
        assert_eq!(bed.limit.live(), 1000);
    }

    #[test]
    fn a_client_of_one_peer_has_ports_whatever_another_says_it_uses() {
        let mut bed = Bed::new(100_000);
        let of = |peer, port| Outside {
            peer: PeerId(peer),
            moved: ours(peer as u8),
            ..key(UDP, 1, port)
        };
        for port in 0..=u16::MAX {
            let inside = bed.client_sends(&of(1, port), 0);
            bed.application_sends(&inside.unwrap(), 0).unwrap();
            bed.client_sends(&of(1, port), 0).unwrap();
        }
        for port in 5_000..5_100 {
            bed.converse(&of(2, port));
        }
        // One client that uses every port at two addresses of one peer is told so.
        let full = Outside {
            moved: ours(9),
            ..of(1, 77)
        };
        assert_eq!(bed.client_sends(&full, 0), Err(DropReason::FlowCollision));
    }

    #[test]
    fn a_reader_gets_each_flow_with_both_its_ends_and_what_it_carried() {
        let mut bed = Bed::new(1_000);
        for n in 0..500 {
            bed.connect(&key(TCP, 0x0a00_0000 + n, 7));
        }
        let first = key(TCP, 0x0a00_0000, 7);
        let weight = Weight {
            tcp_flags: ACK,
            packets: 3,
            bytes: 4_000,
        };
        bed.wait(Duration::from_secs(5));
        let inside = bed.table.client_packet(bed.now, &first, weight, &bed.limit);
        let inside = inside.unwrap();
        bed.table
            .application_packet(bed.now, &inside, weight, &bed.limit)
            .unwrap();
        bed.table.forget(&key(TCP, 0x0a00_0001, 7), &bed.limit);
        bed.wait(Duration::from_secs(2));
        let (mut rows, mut next) = (Vec::new(), Some(0));
        while let Some(from) = next {
            let before = rows.len();
            next = bed.table.slice(bed.now, 9, from, &mut rows);
            assert!(rows.len() - before <= SLICE as usize);
        }
        assert_eq!(rows.len(), 499);
        let row = rows.iter().find(|row| row.client == first.client).unwrap();
        assert_eq!(
            (row.place.part, row.peer, row.state),
            (9, first.peer, "established")
        );
        assert_eq!(
            (row.client_port, row.moved, row.moved_port),
            (7, first.moved, first.moved_port)
        );
        assert_eq!(row.delivery, Some((inside.delivery, inside.delivery_port)));
        assert_eq!((row.age.as_secs(), row.idle.as_secs()), (7, 2));
        // The packets of the handshake weigh nothing here.
        assert_eq!((row.packets, row.bytes), ([5, 4], [4_000, 4_000]));
    }

    #[test]
    fn a_flow_goes_on_from_the_inside() {
        let mut bed = Bed::new(10);
        let outside = key(TCP, 1, 4000);
        let inside = Inside {
            protocol: TCP,
            client: outside.client,
            client_port: 4000,
            delivery: ours(DELIVERY),
            delivery_port: 80,
        };
        let (now, limit) = (bed.now, &bed.limit);
        bed.table
            .reopen(now, &inside, &outside, ACK, limit)
            .unwrap();
        assert_eq!(bed.client_sends(&outside, ACK), Ok(inside));
        assert_eq!(class(&bed, &outside), Class::TcpEstablished);
    }

    #[test]
    fn a_million_flows_take_less_than_152_bytes_each() {
        let mut bed = Bed::new(1 << 20);
        let before = bed.table.allocated();
        assert_eq!(before, 0, "no memory without flows");
        for index in 0..1_000_000 {
            bed.client_sends(&key(UDP, index / 4, index as u16), 0)
                .unwrap();
        }
        let each = bed.table.allocated() as f64 / 1e6;
        println!("{each} bytes a flow at a million flows");
        assert!(each <= 152.0, "{each}");
    }

    #[derive(Clone, Debug)]
    enum Step {
        Client(u8, u8, u8),
        Application(u8),
        Wait(u16),
        Expire,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => (0u8..4, 0u8..4, 0u8..3)
                .prop_map(|(client, port, moved)| Step::Client(client, port, moved)),
            4 => any::<u8>().prop_map(Step::Application),
            1 => (1u16..200).prop_map(Step::Wait),
            1 => Just(Step::Expire),
        ];
        prop::collection::vec(step, 1..200)
    }

    proptest! {
        /// Whatever peers and sources do, the limit holds, and a new flow never costs another peer
        /// what is within its part.
        #[test]
        fn no_peer_loses_its_part_to_another(
            steps in prop::collection::vec(
                (0u16..4, 0u32..6, 0u16..40, 0u8..3, 0u16..4),
                1..300,
            ),
        ) {
            const MAX: usize = 60;
            const PEERS: u16 = 4;
            let mut bed = Bed::new(MAX);
            let held = |bed: &Bed| [0, 1, 2, 3].map(|peer| bed.limit.of_peer(PeerId(peer)));
            for (peer, source, port, packets, pause) in steps {
                // Nothing times out, but much of it goes unused for a while.
                bed.wait(Duration::from_millis(u64::from(pause) * 100));
                let key = Outside {
                    peer: PeerId(peer),
                    moved: ours(peer as u8),
                    ..key(UDP, source, port)
                };
                let (before, was_there) = (held(&bed), bed.knows(&key));
                if let Ok(inside) = bed.client_sends(&key, 0) {
                    for _ in 0..packets {
                        bed.application_sends(&inside, 0).unwrap();
                        bed.client_sends(&key, 0).unwrap();
                    }
                }
                let after = held(&bed);
                prop_assert!(bed.limit.live() <= MAX);
                prop_assert_eq!(after.iter().sum::<usize>(), bed.limit.live());
                prop_assert_eq!(bed.table.live, bed.limit.live());
                let is_holder = |other: &u16| *other == peer || before[usize::from(*other)] > 0;
                let part = MAX / (0..PEERS).filter(is_holder).count();
                for other in (0..PEERS).filter(|&other| other != peer).map(usize::from) {
                    let kept = before[other] == after[other];
                    prop_assert!(kept || (before[other] > part && !was_there));
                }
            }
        }

        #[test]
        fn behaves_as_a_naive_table(steps in steps()) {
            // UDP, where the rules are few: what was seen when, and in both directions or not.
            let mut model: HashMap<Outside, (Inside, Instant, bool)> = HashMap::new();
            let mut known: Vec<Inside> = Vec::new();
            let mut bed = Bed::new(1000);
            let timeout = |both| if both { UDP_BOTH_WAYS } else { UDP_ONE_WAY };
            for step in steps {
                let now = bed.now;
                let alive =
                    |(_, seen, both): &(Inside, Instant, bool)| now - *seen < timeout(*both);
                match step {
                    Step::Client(client, port, moved) => {
                        let key = Outside {
                            moved: ours(moved),
                            ..key(UDP, client.into(), port.into())
                        };
                        let inside = bed.client_sends(&key, 0).unwrap();
                        match model.get_mut(&key).filter(|flow| alive(flow)) {
                            Some(flow) => {
                                prop_assert_eq!(flow.0, inside);
                                flow.1 = now;
                            }
                            None => {
                                let mut others = model.values().filter(|flow| alive(flow));
                                prop_assert!(others.all(|flow| flow.0 != inside));
                                model.insert(key, (inside, now, false));
                            }
                        }
                        known.push(inside);
                    }
                    Step::Application(index) if !known.is_empty() => {
                        let inside = known[usize::from(index) % known.len()];
                        let wanted = model
                            .iter_mut()
                            .find(|(_, flow)| flow.0 == inside && alive(flow));
                        let found = bed.application_sends(&inside, 0);
                        prop_assert_eq!(found, wanted.as_ref().map(|(key, _)| **key));
                        if let Some((_, flow)) = wanted { (flow.1, flow.2) = (now, true); }
                    }
                    Step::Application(_) => {}
                    Step::Wait(seconds) => bed.wait(Duration::from_secs(seconds.into())),
                    Step::Expire => bed.expire(),
                }
                let now = bed.now;
                let flows = model.values();
                let live = flows.filter(|(_, seen, both)| now - *seen < timeout(*both)).count();
                prop_assert!(bed.limit.live() >= live);
                prop_assert_eq!(bed.limit.live(), bed.table.live);
            }
            bed.wait(UDP_BOTH_WAYS * 2);
            bed.expire();
            bed.wait(UDP_BOTH_WAYS * 2);
            bed.expire();
            prop_assert_eq!(bed.limit.live(), 0);
        }
    }
}
