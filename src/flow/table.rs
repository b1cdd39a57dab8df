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
//!                                                   │
//!                        one of ten lists, oldest first, by protocol and state
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
//! At the limit a new flow takes the place of an old one, in this order: closed and one-way flows,
//! oldest first; idle flows without a connection; TCP connections idle for half an hour. If nothing
//! qualifies the new flow is refused: a flood cannot take what is in use.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

use hashbrown::HashTable;

use crate::flow::class::{Class, EVICTION_ORDER, Seen, Side, Tier};
use crate::flow::ended::Outbox;
use crate::flow::seed::Seed;
use crate::flow::slab::{List, Slab};
use crate::model::drops::DropReason;
use crate::model::moved::{TCP, UDP};
use crate::model::peer::PeerId;
use crate::packet::{Addr, Family, ICMP, ICMPV6};

/// From this share of the limit on (3/4), no source may have more than its share
/// ([`SOURCE_SHARE`]).
const PRESSURE: (usize, usize) = (3, 4);
/// Under pressure, one source (an IPv4 address, an IPv6 /64) may hold one in this many of the
/// limit's flows as one-way and half-open ones: a quarter.
pub const SOURCE_SHARE: usize = 4;
/// Counters of the flows of one source, each shared by the sources that hash to it. They take 4 KiB
/// a table, and two of some hundred busy sources seldom meet.
const SOURCES: usize = 1024;

/// List heads examined for one eviction, if they turn out to have been used meanwhile.
const EVICT_TRIES: usize = 8;

/// Ports tried for a flow that would be mistaken for another.
const PORT_TRIES: u32 = 64;
/// Where those ports begin: below lie the ports of services.
const FIRST_PORT: u32 = 1024;
/// Step from one port that is tried to the next. A prime that does not divide the range visits
/// every port before any port twice.
const PORT_STEP: u32 = 7919;

/// Number of an address that the translator knows. It keeps keys small. No address is forgotten
/// while the daemon runs.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct AddrId(pub u16);

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
    pub moved: AddrId,
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
    pub delivery: AddrId,
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

/// How many flows there may be, shared by the tables that share it.
#[derive(Debug)]
pub struct Limit {
    max: usize,
    live: AtomicUsize,
}

impl Limit {
    /// At most `max` flows.
    pub fn new(max: usize) -> Self {
        Self {
            max,
            live: AtomicUsize::new(0),
        }
    }

    /// The most there may be.
    pub fn max(&self) -> usize {
        self.max
    }

    /// How many there are.
    pub fn live(&self) -> usize {
        self.live.load(Relaxed)
    }

    fn is_pressed(&self) -> bool {
        self.live() >= self.max / PRESSURE.1 * PRESSURE.0
    }

    /// Takes a place; false if there is none.
    fn take(&self) -> bool {
        if self.live.fetch_add(1, Relaxed) < self.max {
            return true;
        }
        self.give_back();
        false
    }

    fn give_back(&self) {
        self.live.fetch_sub(1, Relaxed);
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
    lists: [List; Class::COUNT],
    /// One-way and half-open flows by source; empty until there is one.
    sources: Vec<u32>,
    /// Flows that ended, if anybody wants to know.
    ended: Option<Outbox<Inside>>,
    live: usize,
    evicted: u64,
    collisions: u64,
    refused: u64,
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
            lists: [List::EMPTY; Class::COUNT],
            sources: Vec::new(),
            ended: None,
            live: 0,
            evicted: 0,
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
        tcp_flags: u8,
        limit: &Limit,
    ) -> Option<Inside> {
        let now = self.tick(now);
        let at = self.find_outside(key)?;
        if self.slab.get(at).is_expired(now) {
            self.remove(at, limit);
            return None;
        }
        self.note(at, now, Side::Client, tcp_flags);
        Some(inner(&self.masquerade, self.slab.get(at)))
    }

    /// A packet from the application: finds its flow and notes the packet.
    #[inline]
    pub fn application_packet(
        &mut self,
        now: Instant,
        key: &Inside,
        tcp_flags: u8,
        limit: &Limit,
    ) -> Option<Outside> {
        let now = self.tick(now);
        let at = self.find_inside(key)?;
        if self.slab.get(at).is_expired(now) {
            self.remove(at, limit);
            return None;
        }
        self.note(at, now, Side::Application, tcp_flags);
        Some(self.slab.get(at).outside())
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
        delivery: AddrId,
        delivery_port: u16,
        tcp_flags: u8,
        limit: &Limit,
    ) -> Result<Inside, DropReason> {
        let now = self.tick(now);
        debug_assert!(self.find_outside(key).is_none());
        let inside = Inside {
            protocol: key.protocol,
            client: key.client,
            client_port: key.client_port,
            delivery,
            delivery_port,
        };
        // Make space first: a flow that is evicted for it can no longer be in the way.
        self.make_space(now, key.client, limit)?;
        if let Some(masquerade) = &self.masquerade {
            let first = outside_hash(&masquerade.seed, key) as u32;
            let inside = Inside {
                client: masquerade.of(key.client),
                ..inside
            };
            let Some(inside) = self.borrow_port(now, inside, first, limit) else {
                limit.give_back();
                self.refused += 1;
                return Err(DropReason::PortsExhausted);
            };
            self.insert(now, key, &inside, Side::Client, tcp_flags);
            return Ok(inside);
        }
        let Some((inside, collided)) = self.free_inside(now, inside, limit) else {
            limit.give_back();
            return Err(DropReason::FlowCollision);
        };
        self.collisions += u64::from(collided);
        self.insert(now, key, &inside, Side::Client, tcp_flags);
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
        tcp_flags: u8,
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
        self.make_space(now, inside.client, limit)?;
        self.insert(now, outside, inside, Side::Application, tcp_flags);
        Ok(())
    }

    /// Removes flows whose time is up, examining at most `budget`. Returns how many it removed.
    /// Call it every second or so.
    pub fn expire(&mut self, now: Instant, budget: usize, limit: &Limit) -> usize {
        let now = self.tick(now);
        let mut looked = 0;
        let mut removed = 0;
        for class in Class::ALL {
            let timeout = class.timeout();
            while looked < budget {
                let Some(at) = self.lists[class as usize].first() else {
                    break;
                };
                let entry = self.slab.get(at);
                if entry.is_expired(now) {
                    self.remove(at, limit);
                    removed += 1;
                } else if entry.was_used_since_placed()
                    && now.saturating_sub(entry.placed) > timeout / 4
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

    /// Removes the most dispensable flow. Returns false if all are in use.
    pub fn evict(&mut self, now: Instant, limit: &Limit) -> bool {
        let now = self.tick(now);
        self.evict_one(now, limit)
    }

    /// Counters of this table. `max` is 0 here: only the limit knows it.
    pub fn stats(&self) -> FlowStats {
        FlowStats {
            live: self.live as u64,
            max: 0,
            evicted: self.evicted,
            collisions: self.collisions,
            refused: self.refused,
        }
    }

    /// Bytes that the table has allocated.
    pub fn allocated(&self) -> usize {
        self.slab.allocated()
            + self.outside.allocation_size()
            + self.inside.allocation_size()
            + self.sources.capacity() * size_of::<u32>()
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
    fn note(&mut self, at: u32, now: u32, side: Side, tcp_flags: u8) {
        let entry = self.slab.get_mut(at);
        entry.last_seen = now;
        let seen = entry.seen.after(entry.protocol, side, tcp_flags);
        if seen != entry.seen {
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
            self.slab.get_mut(at).class = class;
            self.link(at, now);
        }
    }

    /// Takes a place for one more flow of `client`, evicting another if need be.
    fn make_space(&mut self, now: u32, client: Addr, limit: &Limit) -> Result<(), DropReason> {
        let held = match self.sources.get(self.source(client)) {
            Some(&held) => held as usize,
            None => 0,
        };
        if limit.is_pressed() && held >= (limit.max() / SOURCE_SHARE).max(1) {
            self.refused += 1;
            return Err(DropReason::FlowTableFull);
        }
        while !limit.take() {
            if !self.evict_one(now, limit) {
                self.refused += 1;
                return Err(DropReason::FlowTableFull);
            }
        }
        Ok(())
    }

    /// The inner view to use, and whether it differs from `wanted`.
    fn free_inside(&mut self, now: u32, wanted: Inside, limit: &Limit) -> Option<(Inside, bool)> {
        if self.is_free(now, &wanted, limit) {
            return Some((wanted, false));
        }
        if !has_ports(wanted.protocol) {
            return None;
        }
        let span = u32::from(u16::MAX) + 1 - FIRST_PORT;
        let start = (inside_hash(&self.seed, &wanted) >> 32) as u32;
        (0..PORT_TRIES)
            .map(|index| Inside {
                client_port: (FIRST_PORT + start.wrapping_add(index.wrapping_mul(PORT_STEP)) % span)
                    as u16,
                ..wanted
            })
            .find(|key| self.is_free(now, key, limit))
            .map(|key| (key, true))
    }

    /// The inner view with a port of the range that is free there. If all ports that are tried are
    /// taken, the most dispensable of their flows gives up its own.
    fn borrow_port(
        &mut self,
        now: u32,
        wanted: Inside,
        first: u32,
        limit: &Limit,
    ) -> Option<Inside> {
        let ports = self.masquerade.as_ref()?.ports.clone();
        let span = u32::from(*ports.end()) - u32::from(*ports.start()) + 1;
        let mut best: Option<(usize, u32, u32, Inside)> = None;
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
            let entry = self.slab.get(at);
            let idle = now.saturating_sub(entry.last_seen);
            if let Some(tier) = entry.class.eviction_tier(idle)
                && best.is_none_or(|(other, seen, ..)| (tier, entry.last_seen) < (other, seen))
            {
                best = Some((tier, entry.last_seen, at, key));
            }
        }
        let (_, _, at, key) = best?;
        self.remove(at, limit);
        self.evicted += 1;
        Some(key)
    }

    fn is_free(&mut self, now: u32, key: &Inside, limit: &Limit) -> bool {
        match self.find_inside(key) {
            None => true,
            Some(at) if self.slab.get(at).is_expired(now) => {
                self.remove(at, limit);
                true
            }
            Some(_) => false,
        }
    }

    fn insert(&mut self, now: u32, outside: &Outside, inside: &Inside, side: Side, tcp_flags: u8) {
        let mut entry = Entry::new(outside, inside, now);
        entry.seen = entry.seen.after(entry.protocol, side, tcp_flags);
        entry.class = Class::of(entry.protocol, entry.seen);
        let at = self.slab.add(entry);
        let (seed, slab, masquerade) = (&self.seed, &self.slab, &self.masquerade);
        self.outside
            .insert_unique(outside_hash(seed, outside), at, |&at| {
                outside_hash(seed, &slab.get(at).outside())
            });
        self.inside
            .insert_unique(inside_hash(seed, inside), at, |&at| {
                inside_hash(seed, &inner(masquerade, slab.get(at)))
            });
        self.live += 1;
        self.link(at, now);
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
        self.slab.free(at);
        self.live -= 1;
        limit.give_back();
    }

    fn evict_one(&mut self, now: u32, limit: &Limit) -> bool {
        let Some(at) = self.dispensable(now) else {
            return false;
        };
        self.remove(at, limit);
        self.evicted += 1;
        true
    }

    /// The flow to give up first.
    fn dispensable(&mut self, now: u32) -> Option<u32> {
        // Any flow that was reset will do, whether it was used meanwhile or not.
        if let Some(reset) = self.lists[Class::TcpReset as usize].first() {
            return Some(reset);
        }
        EVICTION_ORDER
            .iter()
            .find_map(|tier| self.least_recent(tier, now))
    }

    /// The flow of this tier that was unused for the longest time, unless it is in use.
    fn least_recent(&mut self, tier: &Tier, now: u32) -> Option<u32> {
        let mut best: Option<(u32, u32)> = None;
        for &class in tier.classes {
            for tries in 1.. {
                let Some(at) = self.lists[class as usize].first() else {
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
        best.filter(|(seen, _)| tier.lets_go(now.saturating_sub(*seen)))
            .map(|(_, at)| at)
    }

    /// Appends an entry to the list of its class.
    fn link(&mut self, at: u32, now: u32) {
        let entry = self.slab.get_mut(at);
        entry.placed = now;
        let class = entry.class;
        self.slab.append(&mut self.lists[class as usize], at);
        if class.is_one_way() {
            let source = self.source(self.slab.get(at).client);
            if self.sources.is_empty() {
                self.sources.resize(SOURCES, 0);
            }
            self.sources[source] += 1;
        }
    }

    /// Takes an entry out of the list of its class.
    fn unlink(&mut self, at: u32) {
        let class = self.slab.get(at).class;
        self.slab.unlink(&mut self.lists[class as usize], at);
        if class.is_one_way() {
            let source = self.source(self.slab.get(at).client);
            self.sources[source] -= 1;
        }
    }

    fn source(&self, client: Addr) -> usize {
        self.seed.client(client.source()) as usize % SOURCES
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

/// Whether a port, which may be rewritten, tells the flows of a protocol apart.
fn has_ports(protocol: u8) -> bool {
    matches!(protocol, TCP | UDP | ICMP | ICMPV6)
}

/// One flow. 52 bytes with its links; with both indexes about 73 at a million flows. (In a cache
/// line of its own it is found no faster: a cold lookup waits for the page tables.)
#[derive(Clone, Copy, Debug)]
struct Entry {
    client: Addr,
    client_port: u16,
    moved_port: u16,
    inside_port: u16,
    delivery_port: u16,
    peer: PeerId,
    moved: AddrId,
    delivery: AddrId,
    protocol: u8,
    class: Class,
    seen: Seen,
    /// Time of the last packet, in seconds since the table's epoch. `placed` is the time at which
    /// the entry was put into its list, in the same unit.
    last_seen: u32,
    placed: u32,
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
            client: self.client,
            client_port: self.inside_port,
            delivery: self.delivery,
            delivery_port: self.delivery_port,
        }
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
    let ports = u64::from(key.client_port)
        | u64::from(key.moved_port) << 16
        | u64::from(key.moved.0) << 32
        | u64::from(key.peer.0) << 48;
    seed.flow(key.client, ports, key.protocol)
}

#[inline]
fn inside_hash(seed: &Seed, key: &Inside) -> u64 {
    let ports = u64::from(key.client_port)
        | u64::from(key.delivery_port) << 16
        | u64::from(key.delivery.0) << 32;
    seed.flow(key.client, ports, key.protocol)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::class::{
        ICMP_QUERY, OTHER, RECENT_TCP, TCP_ESTABLISHED, TCP_OPENING, UDP_BOTH_WAYS, UDP_ONE_WAY,
    };
    use crate::flow::slab::slot_size;
    use crate::packet::{ACK, FIN, RST, SYN};
    use crate::testing::epoch;
    use proptest::prelude::*;
    use std::collections::HashMap;
    use std::net::Ipv4Addr;
    use std::time::Duration;

    const PEER: PeerId = PeerId(3);
    const MOVED: AddrId = AddrId(0);
    const DELIVERY: AddrId = AddrId(1);
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
                        .open(now, key, DELIVERY, key.moved_port, flags, limit)
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

        fn expire(&mut self) {
            self.table.expire(self.now, usize::MAX, &self.limit);
        }

        fn knows(&self, key: &Outside) -> bool {
            self.table.peek_outside(key).is_some()
        }
    }

    fn key(protocol: u8, client: u32, port: u16) -> Outside {
        Outside {
            peer: PEER,
            protocol,
            client: Ipv4Addr::from(client).into(),
            client_port: port,
            moved: MOVED,
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
        assert_eq!(slot_size::<Entry>(), 52);
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
        assert_eq!(
            class(&bed, &k),
            Class::TcpEstablished,
            "half-closed may last"
        );
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
            moved: AddrId(7),
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
            moved: AddrId(7),
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
        let inside = bed.client_sends(&udp, 0).unwrap();
        bed.application_sends(&inside, 0).unwrap();
        for source in 0..200_000 {
            let syn = key(TCP, 0x2000_0000 + source * 977, 1);
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
        let live: Vec<_> = (0..100).map(|port| key(TCP, 1, port)).collect();
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

    #[test]
    fn one_source_cannot_have_it_all() {
        let mut bed = Bed::new(1000);
        let mut taken = 0;
        for port in 0..2000 {
            taken += usize::from(bed.client_sends(&key(UDP, 1, port), 0).is_ok());
        }
        // Unhindered until the table is three quarters full.
        assert_eq!(taken, 750);
        assert_eq!(bed.table.stats().refused, 1250);
        assert!(bed.client_sends(&key(UDP, 2, 1), 0).is_ok());
    }

    #[test]
    fn a_flow_goes_on_from_the_inside() {
        let mut bed = Bed::new(10);
        let outside = key(TCP, 1, 4000);
        let inside = Inside {
            protocol: TCP,
            client: outside.client,
            client_port: 4000,
            delivery: DELIVERY,
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
    fn a_million_flows_take_less_than_128_bytes_each() {
        let mut bed = Bed::new(1 << 20);
        let before = bed.table.allocated();
        assert_eq!(before, 0, "no memory without flows");
        for index in 0..1_000_000 {
            bed.client_sends(&key(UDP, index / 4, index as u16), 0)
                .unwrap();
        }
        let each = bed.table.allocated() as f64 / 1e6;
        println!("{each} bytes a flow at a million flows");
        assert!(each <= 128.0, "{each}");
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
                            moved: AddrId(moved.into()),
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
