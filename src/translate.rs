//! Where packet meets flow: what may pass, and under which addresses.
//!
//! Owns the old server's checks ([`Gate`]) and the new server's rewriting ([`Translator`]): which
//! flow a packet, an ICMP error or a fragment belongs to, and what its addresses become. Must not
//! touch sockets, devices or the clock. A super-packet is translated like a single one: once.
//!
//! ```text
//!             old server                          new server
//! client ──► Gate::check_captured ──► tunnel ──► Translator::inbound  ──► application
//! client ◄── Gate::check_returning ◄── tunnel ◄── Translator::outbound ◄── application
//!            (nothing rewritten)                 (moved address ⇄ delivery address)
//! ```
//!
//! Both families, never one into the other. Fragments go where their first one went; the pieces of
//! packets to two moved addresses with one delivery address keep their own identifications, which a
//! client chooses per destination, so two of them could meet (RFC 6864 section 5.2).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use arc_swap::ArcSwap;

use crate::drops::DropReason;
use crate::flow::{AddrId, FlowStats, FlowTable, Inside, Limit, Outside, Seed};
use crate::fragment::FragmentCache;
use crate::moved::{Move, Transport};
use crate::packet::{ACK, Addr, Family, Fragment, Kind, Parsed, Quoted, Rewrite, SYN};
use crate::peer::PeerId;

/// Most shards of the flow table: more than any machine has lanes.
const MAX_SHARDS: usize = 256;

/// Whose a packet is that the capture on the old server handed over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Verdict {
    /// The tunnel's.
    Carry,
    /// The old server's own: to be written back to the TUN as it is, for local delivery.
    Bounce,
}

/// The old server's checks. Shared by the lanes.
pub struct Gate {
    moves: Vec<Move>,
    seed: Seed,
    captured: Mutex<FragmentCache<Verdict>>,
    returning: Mutex<FragmentCache<()>>,
}

impl Gate {
    /// The gate of what was moved.
    pub fn new(moves: Vec<Move>) -> Self {
        Self {
            moves,
            seed: Seed::random(),
            captured: Mutex::new(FragmentCache::new()),
            returning: Mutex::new(FragmentCache::new()),
        }
    }

    /// Judges a packet that was captured on its way to a moved address.
    ///
    /// Of an address that was moved in part, later fragments follow their first one, and ICMP errors
    /// the flow they quote; what cannot be told is the old server's.
    ///
    /// # Errors
    /// [`DropReason::NotMoved`] if no part of the destination was moved.
    pub fn check_captured(
        &self,
        now: Instant,
        parsed: &Parsed,
        bytes: &[u8],
    ) -> Result<Verdict, DropReason> {
        let addr = IpAddr::from(parsed.dst(bytes));
        let mut known = false;
        for moved in self.moves.iter().filter(|moved| moved.addr == addr) {
            if moved.is_whole() {
                return Ok(Verdict::Carry);
            }
            known = true;
        }
        if !known {
            return Err(DropReason::NotMoved);
        }
        if parsed.fragment() == Fragment::Later {
            let cache = lock(&self.captured);
            let verdict = cache.recall(now, &self.seed, parsed, bytes);
            return Ok(verdict.unwrap_or(Verdict::Bounce));
        }
        let ours = match parsed.kind() {
            // It is about a packet that left from the moved address.
            Kind::Error => Quoted::parse(bytes, parsed).is_ok_and(|quoted| {
                self.takes(
                    quoted.src(bytes),
                    quoted.protocol(),
                    quoted.kind(),
                    quoted.src_port(),
                )
            }),
            kind => self.takes(addr.into(), parsed.protocol(), kind, parsed.dst_port()),
        };
        let verdict = if ours {
            Verdict::Carry
        } else {
            Verdict::Bounce
        };
        if parsed.fragment() == Fragment::First {
            lock(&self.captured).remember(now, &self.seed, parsed, bytes, verdict);
        }
        Ok(verdict)
    }

    /// Judges a packet that came out of the tunnel on its way to a client: the new server speaks
    /// for what was moved and for nothing else.
    ///
    /// # Errors
    /// [`DropReason::NotMoved`], [`DropReason::FragmentUnknown`], [`DropReason::IcmpUnrelated`].
    pub fn check_returning(
        &self,
        now: Instant,
        parsed: &Parsed,
        bytes: &[u8],
    ) -> Result<(), DropReason> {
        let src = parsed.src(bytes);
        let addr = IpAddr::from(src);
        if self
            .moves
            .iter()
            .any(|moved| moved.addr == addr && moved.is_whole())
        {
            return Ok(());
        }
        if parsed.fragment() == Fragment::Later {
            return lock(&self.returning)
                .recall(now, &self.seed, parsed, bytes)
                .ok_or(DropReason::FragmentUnknown);
        }
        let (kind, protocol, port) = match parsed.kind() {
            // It is about a packet that came to the moved address.
            Kind::Error => {
                let quoted = Quoted::parse(bytes, parsed)?;
                if quoted.dst(bytes) != src {
                    return Err(DropReason::IcmpUnrelated);
                }
                (quoted.kind(), quoted.protocol(), quoted.dst_port())
            }
            kind => (kind, parsed.protocol(), parsed.src_port()),
        };
        if !self.takes(src, protocol, kind, port) {
            return Err(DropReason::NotMoved);
        }
        if parsed.fragment() == Fragment::First {
            lock(&self.returning).remember(now, &self.seed, parsed, bytes, ());
        }
        Ok(())
    }

    fn takes(&self, addr: Addr, protocol: u8, kind: Kind, port: u16) -> bool {
        let addr = IpAddr::from(addr);
        self.moves
            .iter()
            .any(|moved| moved.addr == addr && moved.takes(protocol, port_of(kind, port)))
    }
}

/// How the new server's translator is made.
#[derive(Clone, Copy, Debug)]
pub struct TranslatorConfig {
    /// Parts of the flow table that are locked apart; rounded up to a power of two.
    pub shards: usize,
    /// Most flows at a time (`--max-flows`).
    pub max_flows: usize,
    /// Two random words.
    pub seed: [u64; 2],
    /// A time not later than any `now` that follows.
    pub epoch: Instant,
}

/// Where the packets that come through one peer are delivered.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Delivery {
    /// Delivery address for IPv4.
    pub v4: Option<Ipv4Addr>,
    /// Delivery address for IPv6.
    pub v6: Option<Ipv6Addr>,
    /// No rewriting: the new server holds the moved address itself (`--deliver-to keep`).
    pub keep: bool,
    /// Ports that are delivered elsewhere; the first that fits counts. With `keep` too.
    pub ports: Vec<PortMap>,
}

/// One port of a moved address that is delivered to another address or port.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PortMap {
    /// TCP or UDP alone.
    pub transport: Option<Transport>,
    /// The moved address.
    pub moved: IpAddr,
    /// The port there.
    pub port: u16,
    /// The delivery address, of the same family.
    pub to: IpAddr,
    /// The port there.
    pub to_port: u16,
}

/// Why moves or a delivery could not be set.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RouteError {
    /// More addresses than [`AddrId`] can number were named since the daemon started.
    #[error(
        "more than 65,536 addresses were moved or delivered to since the start; restart the daemon"
    )]
    TooManyAddresses,
    /// A port map from one family to the other.
    #[error("cannot deliver {0} to {1}: one is IPv4, the other IPv6")]
    Families(IpAddr, IpAddr),
}

/// The new server's rewriting. Shared by the lanes; a lane locks the shard of the packet's client
/// and nothing else, and only while it looks the flow up.
pub struct Translator {
    seed: Seed,
    limit: Limit,
    shards: Box<[Shard]>,
    routes: ArcSwap<Routes>,
    /// Held while routes are exchanged.
    changing: Mutex<()>,
    inbound_pieces: Mutex<FragmentCache<AddrId>>,
    outbound_pieces: Mutex<FragmentCache<(PeerId, AddrId)>>,
}

/// A table in cache lines of its own.
#[repr(align(128))]
struct Shard(Mutex<FlowTable>);

impl Translator {
    /// A translator that knows no moves and no deliveries yet.
    pub fn new(config: TranslatorConfig) -> Self {
        let seed = Seed::new(config.seed);
        let shards = config.shards.clamp(1, MAX_SHARDS).next_power_of_two();
        Self {
            seed,
            limit: Limit::new(config.max_flows),
            shards: (0..shards)
                .map(|_| Shard(Mutex::new(FlowTable::new(seed, config.epoch))))
                .collect(),
            routes: ArcSwap::default(),
            changing: Mutex::new(()),
            inbound_pieces: Mutex::new(FragmentCache::new()),
            outbound_pieces: Mutex::new(FragmentCache::new()),
        }
    }

    /// What `peer` has moved, in place of what it had moved before. Flows of what is no longer
    /// moved are forgotten in their own time; their packets are dropped at once.
    ///
    /// # Errors
    /// [`RouteError`]; nothing is changed then.
    pub fn set_moves(&self, peer: PeerId, moves: Vec<Move>) -> Result<(), RouteError> {
        self.change(|routes| routes.peer_mut(peer).moves = moves)
    }

    /// Where the packets of `peer` are delivered. Flows that are under way stay where they are.
    ///
    /// # Errors
    /// [`RouteError`]; nothing is changed then.
    pub fn set_delivery(&self, peer: PeerId, delivery: Delivery) -> Result<(), RouteError> {
        for map in &delivery.ports {
            if map.moved.is_ipv4() != map.to.is_ipv4() {
                return Err(RouteError::Families(map.moved, map.to));
            }
        }
        self.change(|routes| routes.peer_mut(peer).delivery = delivery)
    }

    /// This host's own addresses, which no client may claim.
    pub fn set_own_addresses(&self, own: &[IpAddr]) {
        let mut own: Vec<Addr> = own.iter().map(|&addr| addr.into()).collect();
        own.sort_unstable();
        // Names no new address, so it cannot fail.
        let _ = self.change(|routes| routes.own = own);
    }

    /// Translates a packet that came from `peer`'s client: destination from the moved address to
    /// where it is delivered.
    ///
    /// `bytes` are those that `parsed` was made from, of a joined super-packet its head. `partial`:
    /// whether its checksum is.
    ///
    /// # Errors
    /// Why the packet is to be dropped; it may be rewritten in part then.
    pub fn inbound(
        &self,
        now: Instant,
        peer: PeerId,
        bytes: &mut [u8],
        parsed: &mut Parsed,
        partial: bool,
    ) -> Result<(), DropReason> {
        let routes = self.routes.load();
        let moved = routes
            .peers
            .get(usize::from(peer.0))
            .and_then(|routes| routes.moved(parsed.dst(bytes)))
            .ok_or(DropReason::NotMoved)?;
        if parsed.fragment() == Fragment::Later {
            return self.inbound_piece(now, &routes, moved, bytes, parsed);
        }
        if parsed.kind() == Kind::Error {
            return self.inbound_error(&routes, peer, moved, bytes, parsed, partial);
        }
        if !moved.takes(parsed.protocol(), parsed.kind(), parsed.dst_port()) {
            return Err(DropReason::NotMoved);
        }
        let key = Outside {
            peer,
            protocol: parsed.protocol(),
            client: parsed.src(bytes),
            client_port: parsed.src_port(),
            moved: moved.id,
            moved_port: parsed.dst_port(),
        };
        let flags = parsed.tcp_flags();
        let found = {
            let mut table = self.table(key.client);
            table.client_packet(now, &key, flags, &self.limit)
        };
        let inside = match found {
            Some(inside) => inside,
            None => self.open(now, &routes, moved, &key, parsed)?,
        };
        if parsed.fragment() == Fragment::First {
            lock(&self.inbound_pieces).remember(now, &self.seed, parsed, bytes, inside.delivery);
        }
        if inside.delivery != key.moved {
            parsed.set_dst(bytes, routes.addr(inside.delivery), partial);
        }
        if inside.delivery_port != key.moved_port {
            parsed.set_dst_port(bytes, inside.delivery_port, partial);
        }
        if inside.client_port != key.client_port {
            parsed.set_src_port(bytes, inside.client_port, partial);
        }
        Ok(())
    }

    /// Translates a packet that the application's host sent to a client: source from the delivery
    /// address back to the moved one. Returns the peer that it goes through.
    ///
    /// A packet of an unknown flow that can only be one goes on with it: that is how a sending
    /// application is heard again after a restart of the daemon.
    ///
    /// # Errors
    /// Why the packet is to be dropped; it may be rewritten in part then.
    pub fn outbound(
        &self,
        now: Instant,
        bytes: &mut [u8],
        parsed: &mut Parsed,
        partial: bool,
    ) -> Result<PeerId, DropReason> {
        let routes = self.routes.load();
        if parsed.kind() == Kind::Error {
            return self.outbound_error(&routes, bytes, parsed, partial);
        }
        let delivery = routes.id(parsed.src(bytes)).ok_or(DropReason::NoFlow)?;
        if parsed.fragment() == Fragment::Later {
            let (peer, moved) = lock(&self.outbound_pieces)
                .recall(now, &self.seed, parsed, bytes)
                .ok_or(DropReason::FragmentUnknown)?;
            parsed.set_src(bytes, routes.addr(moved), partial);
            return Ok(peer);
        }
        let key = Inside {
            protocol: parsed.protocol(),
            client: parsed.dst(bytes),
            client_port: parsed.dst_port(),
            delivery,
            delivery_port: parsed.src_port(),
        };
        let flags = parsed.tcp_flags();
        let found = {
            let mut table = self.table(key.client);
            table.application_packet(now, &key, flags, &self.limit)
        };
        let outside = match found {
            Some(outside) => outside,
            None => self.reopen(now, &routes, &key, parsed)?,
        };
        if parsed.fragment() == Fragment::First {
            let value = (outside.peer, outside.moved);
            lock(&self.outbound_pieces).remember(now, &self.seed, parsed, bytes, value);
        }
        if outside.moved != delivery {
            parsed.set_src(bytes, routes.addr(outside.moved), partial);
        }
        if outside.moved_port != key.delivery_port {
            parsed.set_src_port(bytes, outside.moved_port, partial);
        }
        if outside.client_port != key.client_port {
            parsed.set_dst_port(bytes, outside.client_port, partial);
        }
        Ok(outside.peer)
    }

    /// Forgets flows whose time is up, looking at no more than `budget` of each shard; to be called
    /// every second. Returns how many.
    pub fn expire(&self, now: Instant, budget: usize) -> usize {
        self.shards
            .iter()
            .map(|shard| lock(&shard.0).expire(now, budget, &self.limit))
            .sum()
    }

    /// Counters of all flows.
    pub fn stats(&self) -> FlowStats {
        let mut all = FlowStats {
            max: self.limit.max() as u64,
            ..FlowStats::default()
        };
        for shard in &self.shards {
            let stats = lock(&shard.0).stats();
            all.live += stats.live;
            all.evicted += stats.evicted;
            all.collisions += stats.collisions;
            all.refused += stats.refused;
        }
        all
    }

    /// Bytes that the flow table has allocated.
    pub fn allocated(&self) -> usize {
        self.shards
            .iter()
            .map(|shard| lock(&shard.0).allocated())
            .sum()
    }

    /// A later fragment from a client.
    fn inbound_piece(
        &self,
        now: Instant,
        routes: &Routes,
        moved: &Moved,
        bytes: &mut [u8],
        parsed: &Parsed,
    ) -> Result<(), DropReason> {
        let known = lock(&self.inbound_pieces).recall(now, &self.seed, parsed, bytes);
        let delivery = match known {
            Some(delivery) => delivery,
            // Every packet of the address goes to one place: the first one is not needed.
            None if moved.is_whole && moved.ports.is_empty() => {
                if routes.is_own(parsed.src(bytes)) {
                    return Err(DropReason::BadSource);
                }
                moved.delivery.ok_or(DropReason::NoDelivery)?
            }
            None => return Err(DropReason::FragmentUnknown),
        };
        parsed.set_dst(bytes, routes.addr(delivery), false);
        Ok(())
    }

    /// An ICMP error from the client's side, about a packet that the application sent.
    fn inbound_error(
        &self,
        routes: &Routes,
        peer: PeerId,
        moved: &Moved,
        bytes: &mut [u8],
        parsed: &Parsed,
        partial: bool,
    ) -> Result<(), DropReason> {
        let quoted = Quoted::parse(bytes, parsed)?;
        if quoted.src(bytes) != parsed.dst(bytes) {
            return Err(DropReason::IcmpUnrelated);
        }
        if routes.is_own(parsed.src(bytes)) {
            return Err(DropReason::BadSource);
        }
        let key = Outside {
            peer,
            protocol: quoted.protocol(),
            client: quoted.dst(bytes),
            client_port: quoted.dst_port(),
            moved: moved.id,
            moved_port: quoted.src_port(),
        };
        let inside = self
            .table(key.client)
            .peek_outside(&key)
            .ok_or(DropReason::IcmpUnrelated)?;
        let delivery = routes.addr(inside.delivery);
        parsed.set_dst(bytes, delivery, partial);
        let change = Rewrite {
            src: Some(delivery),
            src_port: Some(inside.delivery_port),
            dst: None,
            dst_port: Some(inside.client_port),
        };
        quoted.rewrite(bytes, parsed, &change);
        Ok(())
    }

    /// An ICMP error from the application's side, about a packet that a client sent. Whoever it is
    /// from, the client hears it from the moved address: no other could be spoken for.
    fn outbound_error(
        &self,
        routes: &Routes,
        bytes: &mut [u8],
        parsed: &Parsed,
        partial: bool,
    ) -> Result<PeerId, DropReason> {
        let quoted = Quoted::parse(bytes, parsed)?;
        let client = quoted.src(bytes);
        if client != parsed.dst(bytes) {
            return Err(DropReason::IcmpUnrelated);
        }
        let key = Inside {
            protocol: quoted.protocol(),
            client,
            client_port: quoted.src_port(),
            delivery: routes
                .id(quoted.dst(bytes))
                .ok_or(DropReason::IcmpUnrelated)?,
            delivery_port: quoted.dst_port(),
        };
        let outside = self
            .table(client)
            .peek_inside(&key)
            .ok_or(DropReason::IcmpUnrelated)?;
        let moved = routes.addr(outside.moved);
        parsed.set_src(bytes, moved, partial);
        let change = Rewrite {
            src: None,
            src_port: Some(outside.client_port),
            dst: Some(moved),
            dst_port: Some(outside.moved_port),
        };
        quoted.rewrite(bytes, parsed, &change);
        Ok(outside.peer)
    }

    /// Begins a flow with a client's packet.
    #[cold]
    fn open(
        &self,
        now: Instant,
        routes: &Routes,
        moved: &Moved,
        key: &Outside,
        parsed: &Parsed,
    ) -> Result<Inside, DropReason> {
        if routes.is_own(key.client) {
            return Err(DropReason::BadSource);
        }
        // An answer to a query that no one here sent.
        if parsed.kind() == Kind::Reply {
            return Err(DropReason::NoFlow);
        }
        let (delivery, port) = moved.delivery(parsed.kind(), parsed.dst_port())?;
        let flags = parsed.tcp_flags();
        let try_open = || {
            let mut table = self.table(key.client);
            // Another lane may have been faster.
            match table.client_packet(now, key, flags, &self.limit) {
                Some(inside) => Ok(inside),
                None => table.open(now, key, delivery, port, flags, &self.limit),
            }
        };
        match try_open() {
            Err(DropReason::FlowTableFull) if self.evict_elsewhere(now, key.client) => try_open(),
            outcome => outcome,
        }
    }

    /// Goes on with a flow by the application's packet, if it can only be one.
    #[cold]
    fn reopen(
        &self,
        now: Instant,
        routes: &Routes,
        key: &Inside,
        parsed: &Parsed,
    ) -> Result<Outside, DropReason> {
        let flags = parsed.tcp_flags();
        let begins = match parsed.kind() {
            Kind::Tcp => flags & (SYN | ACK) == SYN,
            Kind::Request => true,
            Kind::Udp | Kind::Reply | Kind::Error | Kind::Other | Kind::Hidden => false,
        };
        if begins || routes.is_own(key.client) {
            return Err(DropReason::NoFlow);
        }
        let mut origins =
            routes.origins(key.protocol, parsed.kind(), key.delivery, key.delivery_port);
        let (Some((peer, moved, moved_port)), None) = (origins.next(), origins.next()) else {
            return Err(DropReason::NoFlow);
        };
        let outside = Outside {
            peer,
            protocol: key.protocol,
            client: key.client,
            client_port: key.client_port,
            moved,
            moved_port,
        };
        let mut table = self.table(key.client);
        match table.application_packet(now, key, flags, &self.limit) {
            Some(outside) => Ok(outside),
            None => table
                .reopen(now, key, &outside, flags, &self.limit)
                .map(|()| outside),
        }
    }

    /// Evicts a flow from another shard than `client`'s, of those that are not busy.
    fn evict_elsewhere(&self, now: Instant, client: Addr) -> bool {
        if self.limit.live() < self.limit.max() {
            // Not for want of room: one source had its share.
            return false;
        }
        let own = self.shard(client);
        let others = (1..self.shards.len()).map(|step| (own + step) % self.shards.len());
        others
            .filter_map(|index| self.shards[index].0.try_lock().ok())
            .any(|mut table| table.evict(now, &self.limit))
    }

    #[inline]
    fn table(&self, client: Addr) -> MutexGuard<'_, FlowTable> {
        lock(&self.shards[self.shard(client)].0)
    }

    #[inline]
    fn shard(&self, client: Addr) -> usize {
        // The high half: the low bits choose other things.
        (self.seed.client(client) >> 32) as usize & (self.shards.len() - 1)
    }

    fn change(&self, change: impl FnOnce(&mut Routes)) -> Result<(), RouteError> {
        let _one_at_a_time = lock(&self.changing);
        let mut routes = Routes::clone(&self.routes.load());
        change(&mut routes);
        routes.resolve()?;
        self.routes.store(Arc::new(routes));
        Ok(())
    }
}

impl std::fmt::Debug for Translator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Translator")
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

/// Everything that is configured, made ready for lookup. Exchanged as a whole.
#[derive(Clone, Default)]
struct Routes {
    /// By [`AddrId`]; only ever grows.
    addrs: Vec<Addr>,
    /// The same, to be searched.
    ids: Vec<(Addr, AddrId)>,
    own: Vec<Addr>,
    /// By [`PeerId`].
    peers: Vec<PeerRoutes>,
}

#[derive(Clone, Default)]
struct PeerRoutes {
    moves: Vec<Move>,
    delivery: Delivery,
    /// The moved addresses, sorted; made from the two above.
    resolved: Vec<Moved>,
}

/// One moved address of one peer.
#[derive(Clone)]
struct Moved {
    addr: Addr,
    id: AddrId,
    is_whole: bool,
    moves: Vec<Move>,
    /// Where it is delivered, unless a port map says otherwise.
    delivery: Option<AddrId>,
    ports: Vec<MappedPort>,
}

#[derive(Clone, Copy)]
struct MappedPort {
    transport: Option<Transport>,
    port: u16,
    to: AddrId,
    to_port: u16,
}

impl Routes {
    #[inline]
    fn addr(&self, id: AddrId) -> Addr {
        self.addrs[usize::from(id.0)]
    }

    #[inline]
    fn id(&self, addr: Addr) -> Option<AddrId> {
        self.ids
            .binary_search_by_key(&addr, |&(addr, _)| addr)
            .ok()
            .map(|at| self.ids[at].1)
    }

    fn is_own(&self, addr: Addr) -> bool {
        self.own.binary_search(&addr).is_ok() || self.id(addr).is_some()
    }

    fn peer_mut(&mut self, peer: PeerId) -> &mut PeerRoutes {
        let index = usize::from(peer.0);
        if self.peers.len() <= index {
            self.peers.resize(index + 1, PeerRoutes::default());
        }
        &mut self.peers[index]
    }

    /// Where a packet that leaves from `delivery` could have been asked: peer, moved address, port.
    fn origins(
        &self,
        protocol: u8,
        kind: Kind,
        delivery: AddrId,
        port: u16,
    ) -> impl Iterator<Item = (PeerId, AddrId, u16)> {
        self.peers
            .iter()
            .enumerate()
            .flat_map(move |(peer, routes)| {
                routes.resolved.iter().flat_map(move |moved| {
                    let mapped = moved
                        .ports
                        .iter()
                        .filter(move |map| map.to == delivery && map.to_port == port)
                        .map(|map| map.port);
                    mapped
                        .chain(std::iter::once(port))
                        .enumerate()
                        .filter(move |&(index, moved_port)| {
                            let first = index == 0 || moved_port != port;
                            let forwards = moved.delivery(kind, moved_port) == Ok((delivery, port));
                            first && forwards && moved.takes(protocol, kind, moved_port)
                        })
                        .map(move |(_, moved_port)| (PeerId(peer as u16), moved.id, moved_port))
                })
            })
    }

    /// Makes what is looked up from what is configured.
    fn resolve(&mut self) -> Result<(), RouteError> {
        let mut peers = std::mem::take(&mut self.peers);
        for peer in &mut peers {
            let mut addrs: Vec<Addr> = peer.moves.iter().map(|moved| moved.addr.into()).collect();
            addrs.sort_unstable();
            addrs.dedup();
            peer.resolved = addrs
                .into_iter()
                .map(|addr| self.resolve_one(addr, &peer.moves, &peer.delivery))
                .collect::<Result<_, _>>()?;
        }
        self.peers = peers;
        Ok(())
    }

    fn resolve_one(
        &mut self,
        addr: Addr,
        moves: &[Move],
        delivery: &Delivery,
    ) -> Result<Moved, RouteError> {
        let ip = IpAddr::from(addr);
        let moves: Vec<Move> = moves
            .iter()
            .filter(|moved| moved.addr == ip)
            .cloned()
            .collect();
        let to = match addr.family() {
            _ if delivery.keep => Some(addr),
            Family::V4 => delivery.v4.map(Addr::from),
            Family::V6 => delivery.v6.map(Addr::from),
        };
        Ok(Moved {
            addr,
            id: self.number(addr)?,
            is_whole: moves.iter().any(Move::is_whole),
            moves,
            delivery: to.map(|to| self.number(to)).transpose()?,
            ports: delivery
                .ports
                .iter()
                .filter(|map| map.moved == ip)
                .map(|map| {
                    Ok(MappedPort {
                        transport: map.transport,
                        port: map.port,
                        to: self.number(map.to.into())?,
                        to_port: map.to_port,
                    })
                })
                .collect::<Result<_, _>>()?,
        })
    }

    fn number(&mut self, addr: Addr) -> Result<AddrId, RouteError> {
        match self.ids.binary_search_by_key(&addr, |&(addr, _)| addr) {
            Ok(at) => Ok(self.ids[at].1),
            Err(at) => {
                let id =
                    u16::try_from(self.addrs.len()).map_err(|_| RouteError::TooManyAddresses)?;
                self.addrs.push(addr);
                self.ids.insert(at, (addr, AddrId(id)));
                Ok(AddrId(id))
            }
        }
    }
}

impl PeerRoutes {
    #[inline]
    fn moved(&self, addr: Addr) -> Option<&Moved> {
        self.resolved
            .binary_search_by_key(&addr, |moved| moved.addr)
            .ok()
            .map(|at| &self.resolved[at])
    }
}

impl Moved {
    #[inline]
    fn takes(&self, protocol: u8, kind: Kind, port: u16) -> bool {
        self.is_whole
            || self
                .moves
                .iter()
                .any(|moved| moved.takes(protocol, port_of(kind, port)))
    }

    /// Where a packet of this kind to `port` goes.
    fn delivery(&self, kind: Kind, port: u16) -> Result<(AddrId, u16), DropReason> {
        let transport = match kind {
            Kind::Tcp => Some(Transport::Tcp),
            Kind::Udp => Some(Transport::Udp),
            Kind::Request | Kind::Reply | Kind::Error | Kind::Other | Kind::Hidden => None,
        };
        let mapped = self.ports.iter().find(|map| {
            transport.is_some()
                && map.port == port
                && (map.transport.is_none() || map.transport == transport)
        });
        match (mapped, self.delivery) {
            (Some(map), _) => Ok((map.to, map.to_port)),
            (None, Some(delivery)) => Ok((delivery, port)),
            (None, None) => Err(DropReason::NoDelivery),
        }
    }
}

/// The port as [`Move::takes`] wants it: only what is a port.
#[inline]
fn port_of(kind: Kind, port: u16) -> Option<u16> {
    matches!(kind, Kind::Tcp | Kind::Udp).then_some(port)
}

/// A lock that a panic elsewhere does not close: what it guards is whole between any two calls.
#[inline]
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
