//! Where packet meets flow on the new server: under which addresses a packet goes on.
//!
//! Owns the rewriting ([`Translator`]): which flow a packet, an ICMP error or a fragment belongs
//! to, and what its addresses become. Must not touch sockets, devices or the clock. A super-packet
//! is translated like a single one: once.
//!
//! ```text
//!             old server                           new server
//! client ──► Gate::check_captured ──► tunnel ──► Translator::inbound ───► application
//! client ◄── Gate::check_returning ◄── tunnel ◄── Translator::outbound ◄── application
//!            (nothing rewritten)                  (moved address ⇄ delivery address)
//! ```
//!
//! Both families, never one into the other. Fragments go where their first one went. Fragments of
//! packets to two moved addresses with one delivery address keep their own identifications. A
//! client chooses those for each destination, so that two of them could meet (RFC 6864 section
//! 5.2).

mod related;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;

pub use self::related::UnmovedPort;
use crate::flow::class::UDP_BOTH_WAYS;
use crate::flow::ended::{ENDED_ROOM, HostFlow};
use crate::flow::fairness::Limit;
use crate::flow::fragments::FragmentCache;
use crate::flow::hairpin::Turned;
use crate::flow::listing::{Place, Row};
use crate::flow::lock;
use crate::flow::networks::{Networks, OwnNetwork, RefusedSource};
use crate::flow::outgoing::{self, OutgoingRules, Refusals, RefusedOutgoing};
use crate::flow::routes::{Delivery, Moved, Routes, Tunnel};
use crate::flow::seed::Seed;
use crate::flow::table::{FlowStats, FlowTable, HandedFlow, Inside, Outside, Stage, seen_client};
use crate::flow::tally::{Counted, Tallies, Tally};
use crate::flow::turned::TurnedAways;
use crate::flow::watch::{self, Observations, Watch};
use crate::flow::weight::Weight;
use crate::model::asked::Asked;
use crate::model::drops::{DropReason, Dropped};
use crate::model::moved::{Move, TCP, UDP};
use crate::model::peer::{MAX_PEERS, PeerId};
use crate::model::prefix::Prefix;
use crate::packet::{ACK, Addr, Fragment, Kind, Parsed, Quoted, Rewrite, SYN};

/// Most shards of the flow table: more than any machine has lanes.
const MAX_SHARDS: usize = 256;

/// So long after the start, an application's packet without TCP may continue a flow that was there
/// before it. No flow of UDP is remembered for longer without a packet ([`UDP_BOTH_WAYS`]), so
/// after that time it continues nothing. What it costs: an application that pushes to a client that
/// has been silent for longer (or whose flow gave way to others) is not heard until that client
/// speaks again, as behind any address translation. What it keeps out: datagrams that some program
/// of this host sends to the TUN by itself, which would make a conversation with whomever it likes.
/// TCP needs no such bound, since what begins a connection never makes a flow.
const REOPEN_FOR: Duration = UDP_BOTH_WAYS;

/// Below lie the ports of services (RFC 6335 section 6), from which no client speaks.
const FIRST_CLIENT_PORT: u16 = 1024;

/// New flows that make space before it is looked again which shard is the fullest.
const TURNS: usize = 64;

/// How the new server's translator is made.
#[derive(Clone, Copy, Debug)]
pub struct TranslatorConfig {
    /// Parts of the flow table, each behind a lock of its own; rounded up to a power of two.
    pub shards: usize,
    /// Most flows at a time (`--max-flows`).
    pub max_flows: usize,
    /// Two random words.
    pub seed: [u64; 2],
    /// The start: a time not later than any `now` that follows.
    pub epoch: Instant,
    /// Whether somebody takes the flows that ended ([`Translator::take_ended`]).
    pub note_ended: bool,
}

/// The new server's rewriting. Shared by the lanes. A lane locks the shard of the packet's client
/// and nothing else, and only while it looks the flow up.
pub struct Translator {
    pub(super) seed: Seed,
    start: Instant,
    pub(super) limit: Limit,
    /// No client may begin a flow at the moment.
    pub(super) pauses: AtomicBool,
    shards: Box<[Shard]>,
    /// New flows that found no space.
    turns: AtomicUsize,
    /// The shard that had most flows when it was last looked.
    fullest: AtomicUsize,
    pub(super) routes: ArcSwap<Routes>,
    networks: Networks,
    /// One of each peer that is not told yet.
    unmoved_ports: Mutex<Vec<(PeerId, UnmovedPort)>>,
    refused_outgoing: Refusals,
    /// Held while routes are replaced.
    changing: Mutex<()>,
    inbound_fragments: Mutex<FragmentCache<Addr>>,
    outbound_fragments: Mutex<FragmentCache<(PeerId, Addr)>>,
    /// The newest conversations, by [`PeerId`]: no peer's clients take the places of another's.
    watches: Box<[OnceLock<Watch<Outside>>]>,
    /// By [`PeerId`].
    turned: Box<[TurnedAways]>,
    pub(super) turned_fragments: Mutex<FragmentCache<Turned>>,
    tallies: Arc<Tallies>,
}

/// A table in cache lines of its own.
#[repr(align(128))]
struct Shard(Mutex<FlowTable>);

impl Translator {
    /// A translator that knows no moves and no deliveries yet.
    pub fn new(config: TranslatorConfig) -> Self {
        let seed = Seed::new(config.seed);
        let shards = config.shards.clamp(1, MAX_SHARDS).next_power_of_two();
        let tallies = Arc::new(Tallies::new());
        Self {
            seed,
            start: config.epoch,
            limit: Limit::new(config.max_flows),
            pauses: AtomicBool::new(false),
            shards: (0..shards)
                .map(|_| {
                    let mut table = FlowTable::new(seed, config.epoch);
                    table.tally(Arc::clone(&tallies));
                    if config.note_ended {
                        table.note_ended(ENDED_ROOM / shards);
                    }
                    Shard(Mutex::new(table))
                })
                .collect(),
            turns: AtomicUsize::new(0),
            fullest: AtomicUsize::new(0),
            routes: ArcSwap::default(),
            networks: Networks::default(),
            unmoved_ports: Mutex::default(),
            refused_outgoing: Refusals::default(),
            changing: Mutex::new(()),
            inbound_fragments: Mutex::new(FragmentCache::new()),
            outbound_fragments: Mutex::new(FragmentCache::new()),
            watches: (0..MAX_PEERS).map(|_| OnceLock::new()).collect(),
            turned: (0..MAX_PEERS).map(|_| TurnedAways::default()).collect(),
            turned_fragments: Mutex::new(FragmentCache::new()),
            tallies,
        }
    }

    /// Sets what `peer` has moved, in place of what it had moved before. Packets of what is no
    /// longer moved are dropped at once; its flows are forgotten in their own time.
    pub fn set_moves(&self, peer: PeerId, moves: &[Move]) {
        let counted = self.tallies.name(peer, moves);
        self.change(|routes| routes.peer_mut(peer).set_moves(moves, counted));
    }

    /// As [`set_moves`](Self::set_moves), where an earlier daemon has `handed` flows over, or the
    /// kernel still knows `flows` from it. Of the latter those that began on this side are known
    /// here, too, before the first packet comes: the remote may be the first to speak, and would be
    /// taken for a client.
    pub fn set_moves_again(
        &self,
        now: Instant,
        peer: PeerId,
        moves: &[Move],
        handed: &[HandedFlow],
        flows: &[HostFlow],
    ) {
        let counted = self.tallies.name(peer, moves);
        self.change_first(
            |routes| routes.peer_mut(peer).set_moves(moves, counted),
            |routes| {
                (handed.iter()).for_each(|flow| self.take_up(now, routes, flow));
                flows
                    .iter()
                    .for_each(|flow| self.resume(now, routes, peer, flow))
            },
        );
    }

    /// Sets where the packets of `peer` are delivered. Flows that are under way stay where they
    /// are; but if this host has lost the address, and another one takes its place, those without
    /// a connection go there with the client's next packet.
    pub fn set_delivery(&self, peer: PeerId, delivery: Delivery) {
        let addresses = |it: &Delivery| [it.v4.map(Addr::from), it.v6.map(Addr::from)];
        let after = addresses(&delivery);
        let mut before = [None; 2];
        self.change(|routes| {
            before = addresses(&routes.peer_mut(peer).delivery);
            routes.peer_mut(peer).delivery = delivery;
        });
        let routes = self.routes.load();
        for (before, after) in before.into_iter().zip(after) {
            if let (Some(before), Some(after)) = (before, after)
                && before != after
                && !routes.host.is_empty()
                && !routes.host.contains(&before)
            {
                for shard in &self.shards {
                    lock(&shard.0).forget_delivery(before, &self.limit);
                }
            }
        }
    }

    /// Forgets a peer with all that it had: nothing of it is served, and its flows have ended.
    pub fn forget_peer(&self, peer: PeerId) {
        let counted = self.tallies.name(peer, &[]);
        self.change(|routes| {
            let routes = routes.peer_mut(peer);
            routes.set_moves(&[], counted);
            routes.delivery = Delivery::default();
            routes.outgoing = OutgoingRules::default();
        });
        self.networks.allow(peer, &[]);
        for shard in &self.shards {
            lock(&shard.0).forget_peer(peer, &self.limit);
        }
        // Its place may be another peer's tomorrow.
        let place = usize::from(peer.0);
        if let Some(watch) = self.watches.get(place).and_then(OnceLock::get) {
            watch.forget();
        }
        if let Some(turned) = self.turned.get(place) {
            turned.forget();
        }
        lock(&self.unmoved_ports).retain(|(of, _)| *of != peer);
    }

    /// Sets the most flows at a time. If there are more, each new one takes the place of another.
    pub fn set_max_flows(&self, max: usize) {
        self.limit.set_max(max);
    }

    /// From now on no client begins a flow, or again; those that are known go on.
    pub fn pause(&self, pauses: bool) {
        self.pauses.store(pauses, Relaxed);
    }

    /// Sets this host's own addresses, which no client may claim.
    pub fn set_own_addresses(&self, own: &[IpAddr]) {
        let mut host: Vec<Addr> = own.iter().map(|&addr| addr.into()).collect();
        host.sort_unstable();
        self.change(|routes| routes.host = host);
    }

    /// Sets the networks that this host is in itself. No new flow begins with a client from there,
    /// unless [`Self::allow_clients`] lets it; flows that are under way go on.
    pub fn set_own_networks(&self, networks: Vec<OwnNetwork>) {
        self.networks.set_own(networks);
    }

    /// Lets clients of `peer` come from these prefixes, whatever networks this host is in.
    pub fn allow_clients(&self, peer: PeerId, prefixes: &[Prefix]) {
        self.networks.allow(peer, prefixes);
    }

    /// Sets what may leave from the moved addresses of `peer` that answers nobody.
    pub fn set_outgoing(&self, peer: PeerId, rules: OutgoingRules) {
        self.change(|routes| routes.peer_mut(peer).outgoing = rules);
    }

    /// Sets where the datagrams of the tunnel to `peer` go, and from which port of this host. They
    /// come here where nothing else leads to the peer, and would go round for ever.
    pub fn set_tunnel(&self, peer: PeerId, to: SocketAddr, from: u16) {
        let tunnel = Tunnel {
            to: (to.ip().into(), to.port()),
            from,
        };
        self.change(|routes| routes.peer_mut(peer).tunnel = Some(tunnel));
    }

    /// Whether a packet of this host is one of a tunnel itself.
    fn is_of_a_tunnel(&self, key: &Inside) -> bool {
        let of = |tunnel: &Tunnel| {
            tunnel.from == key.delivery_port && tunnel.to == (key.client, key.client_port)
        };
        let routes = self.routes.load();
        let mut tunnels = routes.peers.iter().filter_map(|peer| peer.tunnel.as_ref());
        key.protocol == UDP && tunnels.any(of)
    }

    /// For each peer, a packet of this host that was refused since the last call.
    pub fn take_refused_outgoing(&self) -> BTreeMap<PeerId, RefusedOutgoing> {
        self.refused_outgoing.take()
    }

    /// For each peer, a source that was refused since the last call.
    pub fn take_refused_sources(&self) -> BTreeMap<PeerId, RefusedSource> {
        self.networks.take_refused()
    }

    /// Translates a packet that came from `peer`'s client: destination from the moved address to
    /// where it is delivered.
    ///
    /// `parsed` was made from `bytes`, which are the head of a coalesced super-packet if it is one.
    /// `partial` says whether its checksum is partial.
    ///
    /// # Errors
    /// Why to drop the packet, which may be rewritten in part then.
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
            .peer(peer)
            .and_then(|routes| routes.moved(parsed.dst(bytes)))
            .ok_or(DropReason::NotMoved)?;
        if parsed.fragment() == Fragment::Later {
            return self.inbound_later_fragment(now, &routes, peer, &moved, bytes, parsed);
        }
        if parsed.kind() == Kind::IcmpError {
            return self.inbound_error(&routes, peer, &moved, bytes, parsed, partial);
        }
        let key = Outside {
            peer,
            protocol: parsed.protocol(),
            client: parsed.src(bytes),
            client_port: parsed.src_port(),
            moved: moved.addr,
            moved_port: parsed.dst_port(),
        };
        // What began here has a port that need not have moved.
        if !moved.takes(parsed.protocol(), parsed.kind(), parsed.dst_port())
            && self.table(key.client).peek_outside(&key).is_none()
        {
            return Err(DropReason::NotMoved);
        }
        let weight = Weight::of(parsed);
        let found = {
            let mut table = self.table(key.client);
            table.client_packet(now, &key, weight, &self.limit)
        };
        let inside = match found {
            Some(inside) => inside,
            None => self.open(now, &routes, &moved, &key, parsed)?,
        };
        if parsed.fragment() == Fragment::First {
            let mut cache = lock(&self.inbound_fragments);
            cache.remember_of(peer, now, &self.seed, parsed, bytes, inside.delivery);
        }
        if inside.delivery != key.moved {
            parsed.set_dst(bytes, inside.delivery, partial);
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
    /// A packet of an unknown flow continues that flow if only one is possible. So an application
    /// that keeps sending is heard again after a restart of the daemon: with TCP at any time, else
    /// for some minutes after the start.
    ///
    /// If none is, the packet may begin a flow of this side ([`outgoing`]).
    ///
    /// # Errors
    /// Why to drop the packet, which may be rewritten in part then.
    pub fn outbound(
        &self,
        now: Instant,
        bytes: &mut [u8],
        parsed: &mut Parsed,
        partial: bool,
    ) -> Result<PeerId, Dropped> {
        if parsed.kind() == Kind::IcmpError {
            return Ok(self.outbound_error(bytes, parsed, partial)?);
        }
        let delivery = parsed.src(bytes);
        if parsed.fragment() == Fragment::Later {
            let known = lock(&self.outbound_fragments).recall(now, &self.seed, parsed, bytes);
            let Some((peer, moved)) = known else {
                return Ok(self.turn_later_fragment(now, bytes, parsed)?);
            };
            parsed.set_src(bytes, moved, partial);
            return Ok(peer);
        }
        let key = Inside {
            protocol: parsed.protocol(),
            client: parsed.dst(bytes),
            client_port: parsed.dst_port(),
            delivery,
            delivery_port: parsed.src_port(),
        };
        let weight = Weight::of(parsed);
        let found = {
            let mut table = self.table(key.client);
            table.application_packet(now, &key, weight, &self.limit)
        };
        let outside = match found {
            Some(outside) => outside,
            None if self.is_of_a_tunnel(&key) => return Err(DropReason::NoFlow.into()),
            None => match self.earlier(now, &key, parsed) {
                Ok(outside) => outside,
                Err(DropReason::NoFlow) => match self.call(now, bytes, parsed, partial) {
                    // What may be an answer to a client is one, whoever says that its address has
                    // moved.
                    Some(called) => return Ok(called?),
                    None => self.begin_or_tell(now, &key, parsed)?,
                },
                Err(DropReason::UnmovedPort) if outgoing::is_by_port(&self.routes.load(), &key) => {
                    self.begin_or_tell(now, &key, parsed)?
                }
                Err(reason) => return Err(reason.into()),
            },
        };
        if outside.peer.is_inside() {
            return Ok(self.answer(now, (&outside, &key), bytes, parsed, partial));
        }
        if parsed.fragment() == Fragment::First {
            let value = (outside.peer, outside.moved);
            let mut cache = lock(&self.outbound_fragments);
            cache.remember_of(outside.peer, now, &self.seed, parsed, bytes, value);
        }
        if outside.moved != delivery {
            parsed.set_src(bytes, outside.moved, partial);
        }
        if outside.moved_port != key.delivery_port {
            parsed.set_src_port(bytes, outside.moved_port, partial);
        }
        if outside.client_port != key.client_port {
            parsed.set_dst_port(bytes, outside.client_port, partial);
        }
        Ok(outside.peer)
    }

    /// Forgets flows whose time is up, examining at most `budget` of each shard. Returns how many.
    /// Call it every second.
    pub fn expire(&self, now: Instant, budget: usize) -> usize {
        self.shards
            .iter()
            .map(|shard| lock(&shard.0).expire(now, budget, &self.limit))
            .sum()
    }

    /// Appends the flows that ended since the last time and have not begun again. Returns how many
    /// more there were: if any, everything that is kept of flows is to be looked at with
    /// [`knows`](Self::knows). Call it every second.
    ///
    /// A flow may begin again right after.
    pub fn take_ended(&self, out: &mut Vec<HostFlow>) -> u64 {
        let mut lost = 0;
        for shard in &self.shards {
            let (ended, more) = lock(&shard.0).take_ended();
            let flows = ended.into_iter().map(|flow| HostFlow {
                protocol: flow.protocol,
                local: SocketAddr::new(flow.delivery.into(), flow.delivery_port),
                remote: SocketAddr::new(flow.client.into(), flow.client_port),
            });
            out.extend(flows.filter(|flow| !self.knows(flow)));
            lost += more;
        }
        lost
    }

    /// Whether there is such a flow.
    pub fn knows(&self, flow: &HostFlow) -> bool {
        let key = Inside {
            protocol: flow.protocol,
            client: flow.remote.ip().into(),
            client_port: flow.remote.port(),
            delivery: flow.local.ip().into(),
            delivery_port: flow.local.port(),
        };
        self.table(key.client).peek_inside(&key).is_some()
    }

    /// What has become of the newest conversations of `peer`'s clients. Call it every second.
    pub fn observe(&self, now: Instant, peer: PeerId) -> Observations {
        let watch = self.watches.get(usize::from(peer.0));
        let watch = watch.and_then(OnceLock::get);
        let mut seen = watch.map_or_else(Observations::default, |watch| {
            watch.take(now, |key| self.table(key.client).noted(key))
        });
        if let Some(turned) = self.turned.get(usize::from(peer.0)) {
            seen.turned = turned.take(now);
        }
        seen
    }

    /// A packet of `peer`'s client is dropped, before anything in it was changed.
    #[cold]
    pub(super) fn turned_away(
        &self,
        now: Instant,
        peer: PeerId,
        parsed: &Parsed,
        bytes: &[u8],
        reason: DropReason,
    ) {
        if let Some(turned) = self.turned.get(usize::from(peer.0)) {
            turned.note(now, parsed, bytes, reason);
        }
    }

    /// The smallest network of this server's own that an address lies in.
    pub fn own_network(&self, addr: IpAddr) -> Option<OwnNetwork> {
        self.networks.own_network(addr)
    }

    /// Where new conversations for a port of a moved address are delivered.
    pub fn delivered(&self, peer: PeerId, asked: &Asked) -> Option<SocketAddr> {
        let routes = self.routes.load();
        let moved = routes.peer(peer)?.moved(asked.addr.into())?;
        let kind = match asked.protocol {
            TCP => Kind::Tcp,
            UDP => Kind::Udp,
            _ => Kind::Other,
        };
        let (delivery, port) = moved.delivery(kind, asked.port).ok()?;
        Some(SocketAddr::new(delivery.into(), port))
    }

    /// What was counted of each move of `peer`, in their order.
    pub fn tallies(&self, peer: PeerId) -> Vec<Tally> {
        let routes = self.routes.load();
        let counted = routes.peer(peer).map_or(&[][..], |routes| routes.counted());
        counted
            .iter()
            .map(|&at| self.tallies.get(peer, at))
            .collect()
    }

    /// So many new conversations with this end of this host came directly.
    pub fn came_directly(&self, protocol: u8, end: SocketAddr, new: u64) {
        let kind = match protocol {
            TCP => Kind::Tcp,
            UDP => Kind::Udp,
            _ => return,
        };
        let routes = self.routes.load();
        for peer in routes.peer_ids() {
            let Some(of_peer) = routes.peer(peer) else {
                continue;
            };
            for at in of_peer.delivered_to(protocol, kind, (end.ip().into(), end.port())) {
                self.tallies.came_directly(peer, at, new);
            }
        }
    }

    /// Appends the flows of the slice at `from`, and returns where the next one is.
    pub(super) fn slice(&self, now: Instant, from: Place, out: &mut Vec<Row>) -> Option<Place> {
        let Place { part, at } = from;
        let shard = self.shards.get(part as usize)?;
        let next = lock(&shard.0).slice(now, part, at, out);
        match next {
            Some(at) => Some(Place { part, at }),
            None if part as usize + 1 < self.shards.len() => Some(Place {
                part: part + 1,
                at: 0,
            }),
            None => None,
        }
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
            all.displaced += stats.displaced;
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

    /// Translates a later fragment from a client.
    fn inbound_later_fragment(
        &self,
        now: Instant,
        routes: &Routes,
        peer: PeerId,
        moved: &Moved<'_>,
        bytes: &mut [u8],
        parsed: &Parsed,
    ) -> Result<(), DropReason> {
        let known = lock(&self.inbound_fragments).recall_of(peer, now, &self.seed, parsed, bytes);
        let delivery = match (known, moved.one_place()) {
            (Some(delivery), _) => delivery,
            // Every packet of the address goes to one place, so the first fragment is not needed.
            (None, Some(to)) => {
                if routes.is_own(peer, parsed.src(bytes)) {
                    return Err(DropReason::BadSource);
                }
                self.networks.check(peer, parsed.src(bytes))?;
                to.ok_or(DropReason::NoDelivery)?
            }
            (None, None) => return Err(DropReason::FragmentUnknown),
        };
        parsed.set_dst(bytes, delivery, false);
        Ok(())
    }

    /// Translates an ICMP error from the client's side, about a packet that the application sent.
    /// It may come from a network of this host's own: routers on the path speak from private
    /// addresses, and it concerns a flow that is known.
    fn inbound_error(
        &self,
        routes: &Routes,
        peer: PeerId,
        moved: &Moved<'_>,
        bytes: &mut [u8],
        parsed: &Parsed,
        partial: bool,
    ) -> Result<(), DropReason> {
        let quoted = Quoted::parse(bytes, parsed)?;
        if quoted.src(bytes) != parsed.dst(bytes) {
            return Err(DropReason::IcmpUnrelated);
        }
        if routes.is_own(peer, parsed.src(bytes)) {
            return Err(DropReason::BadSource);
        }
        let key = Outside {
            peer,
            protocol: quoted.protocol(),
            client: quoted.dst(bytes),
            client_port: quoted.dst_port(),
            moved: moved.addr,
            moved_port: quoted.src_port(),
        };
        let inside = self
            .table(key.client)
            .peek_outside(&key)
            .ok_or(DropReason::IcmpUnrelated)?;
        let delivery = inside.delivery;
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

    /// Translates an ICMP error from the application's side, about a packet that a client sent.
    /// Whoever sent the error, the client gets it from the moved address: we may speak for no
    /// other.
    fn outbound_error(
        &self,
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
            delivery: quoted.dst(bytes),
            delivery_port: quoted.dst_port(),
        };
        let Some(outside) = self.table(client).peek_inside(&key) else {
            return self
                .callers_error(&quoted, bytes, parsed, partial)
                .ok_or(DropReason::IcmpUnrelated);
        };
        let watch = self.watches.get(usize::from(outside.peer.0));
        if let Some(watch) = watch.and_then(OnceLock::get) {
            watch.error(parsed, bytes, |known| *known == outside);
        }
        let moved = outside.moved;
        parsed.set_src(bytes, moved, partial);
        let change = Rewrite {
            src: None,
            src_port: Some(outside.client_port),
            dst: Some(moved),
            dst_port: Some(outside.moved_port),
        };
        quoted.rewrite(bytes, parsed, &change);
        if outside.peer.is_inside() {
            self.turn_error(&outside, &quoted, bytes, parsed, partial);
        }
        Ok(outside.peer)
    }

    /// Begins a flow with a client's packet.
    #[cold]
    fn open(
        &self,
        now: Instant,
        routes: &Routes,
        moved: &Moved<'_>,
        key: &Outside,
        parsed: &Parsed,
    ) -> Result<Inside, DropReason> {
        if self.pauses.load(Relaxed) {
            return Err(DropReason::FlowTableGrows);
        }
        if routes.is_own(key.peer, key.client) {
            return Err(DropReason::BadSource);
        }
        self.networks.check(key.peer, key.client)?;
        // It replies to a query that nobody here sent.
        if parsed.kind() == Kind::IcmpReply {
            return Err(DropReason::NoFlow);
        }
        let (delivery, port) = moved.delivery(parsed.kind(), parsed.dst_port())?;
        let weight = Weight::of(parsed);
        let asked = watch::asked(parsed, key.moved);
        let counted = match (
            moved.counted(key.protocol, parsed.kind(), key.moved_port),
            asked,
        ) {
            (at, Some(_)) => at.begun(),
            (at, None) if parsed.kind() == Kind::Tcp => at,
            (_, None) => Counted::NOWHERE,
        };
        let try_open = || {
            let mut table = self.table(key.client);
            // Another lane may have been faster.
            match table.client_packet(now, key, weight, &self.limit) {
                Some(inside) => Ok(inside),
                None => {
                    let inside = table.open(now, key, delivery, port, weight, &self.limit)?;
                    table.count_as(key, counted);
                    Ok(inside)
                }
            }
        };
        self.make_space(now, key.peer, key.client);
        let inside = try_open()?;
        if let Some(watch) = self.watches.get(usize::from(key.peer.0)) {
            let watch = watch.get_or_init(|| Watch::new(self.seed));
            if let Some(asked) = asked {
                watch.opened(now, asked, key.client, *key);
            }
        }
        Ok(inside)
    }

    /// Continues a flow with the application's packet, if only one is possible.
    #[cold]
    fn reopen(&self, now: Instant, key: &Inside, parsed: &Parsed) -> Result<Outside, DropReason> {
        let routes = self.routes.load();
        let key = &Self::as_delivered(&routes, key, parsed);
        let (flags, weight) = (parsed.tcp_flags(), Weight::of(parsed));
        let begins = match parsed.kind() {
            Kind::Tcp => flags & (SYN | ACK) == SYN,
            Kind::IcmpQuery => true,
            Kind::Udp | Kind::IcmpReply | Kind::IcmpError | Kind::Other | Kind::LaterFragment => {
                false
            }
        };
        let is_late = now.saturating_duration_since(self.start) >= REOPEN_FOR;
        if begins || (is_late && parsed.kind() != Kind::Tcp) || !routes.is_delivery(key.delivery) {
            return Err(DropReason::NoFlow);
        }
        let (peer, moved, moved_port) = routes
            .origin(key.protocol, parsed.kind(), key.delivery, key.delivery_port)
            .filter(|&(peer, ..)| !routes.is_own(peer, key.client))
            .ok_or(DropReason::NoFlow)?;
        // No client of that address can have begun the flow.
        if self.networks.check(peer, key.client).is_err() {
            return Err(DropReason::NoFlow);
        }
        let outside = Outside {
            peer,
            protocol: key.protocol,
            client: key.client,
            client_port: key.client_port,
            moved,
            moved_port,
        };
        self.make_space(now, peer, key.client);
        let mut table = self.table(key.client);
        match table.application_packet(now, key, weight, &self.limit) {
            Some(outside) => Ok(outside),
            None => {
                table.reopen(now, key, &outside, weight, &self.limit)?;
                let moved = routes.peer(peer).and_then(|routes| routes.moved(moved));
                if let Some(moved) = moved.filter(|_| parsed.kind().has_ports()) {
                    let at = moved.counted(key.protocol, parsed.kind(), moved_port);
                    table.count_as(&outside, at);
                }
                Ok(outside)
            }
        }
    }

    /// The flow that a packet of this side continues, though its addresses and ports have none.
    #[cold]
    fn earlier(&self, now: Instant, key: &Inside, parsed: &Parsed) -> Result<Outside, DropReason> {
        let routes = self.routes.load();
        // What a program sends that is bound to a moved address is no client's.
        if outgoing::is_bound(&routes, key) {
            return Err(DropReason::NoFlow);
        }
        match self.related(now, key, parsed)? {
            Some(related) => Ok(related),
            // Nor what a rule takes: it says from which address, and whether at all.
            None if outgoing::precedes_answers(&routes, key, parsed) => Err(DropReason::NoFlow),
            None if Self::can_only_call(&routes, key, parsed) => Err(DropReason::NoFlow),
            None => self.reopen(now, key, parsed),
        }
    }

    /// Whether a datagram asks what is served here and answers no client: clients do not speak from
    /// the ports of services (RFC 6335 section 6). Any other may be an answer, whoever says that
    /// its destination has moved.
    fn can_only_call(routes: &Routes, key: &Inside, parsed: &Parsed) -> bool {
        parsed.kind() == Kind::Udp
            && key.client_port < FIRST_CLIENT_PORT
            && key.delivery_port >= FIRST_CLIENT_PORT
            && matches!(
                routes.inside(key.client, key.protocol, Kind::Udp, key.client_port),
                Some(Ok(_))
            )
    }

    /// As [`begin`](Self::begin). The kernel has entered what a rule of ports takes among its flows
    /// before it is decided here; of one that is refused it is told that it ended.
    #[cold]
    fn begin_or_tell(
        &self,
        now: Instant,
        key: &Inside,
        parsed: &Parsed,
    ) -> Result<Outside, Dropped> {
        self.begin(now, key, parsed).inspect_err(|drop| {
            // What is under way without a session may go on with one. Its entry is how the kernel
            // and a later daemon know it.
            let is_new = if parsed.kind() == Kind::Tcp {
                parsed.tcp_flags() & (SYN | ACK) == SYN
            } else {
                drop.reason != DropReason::NoSession
            };
            if is_new && outgoing::is_by_port(&self.routes.load(), key) {
                self.table(key.client).tell_ended(*key);
            }
        })
    }

    /// Begins a flow with a packet of this side, or continues one after a restart.
    #[cold]
    fn begin(&self, now: Instant, key: &Inside, parsed: &Parsed) -> Result<Outside, Dropped> {
        let (peer, moved) =
            outgoing::origin(&self.routes.load(), &self.refused_outgoing, key, parsed)?;
        let wanted = Outside {
            peer,
            protocol: key.protocol,
            client: key.client,
            client_port: key.client_port,
            moved,
            moved_port: key.delivery_port,
        };
        let weight = Weight::of(parsed);
        self.make_space(now, peer, key.client);
        let mut table = self.table(key.client);
        // Another lane may have been faster.
        match table.application_packet(now, key, weight, &self.limit) {
            Some(outside) => Ok(outside),
            None => table
                .begin(now, key, &wanted, weight, &self.limit)
                .map_err(|reason| Dropped::of(peer, reason)),
        }
    }

    /// All flows, for the daemon that takes over. Call it when no lane runs.
    pub fn put_flows(&self, now: Instant, out: &mut Vec<u8>) {
        for shard in &self.shards {
            lock(&shard.0).put(now, out);
        }
    }

    /// Takes up the flows of this host itself, and of those behind it, that another daemon had.
    pub fn take_up_inside(&self, now: Instant, handed: &[HandedFlow]) {
        let routes = self.routes.load();
        (handed.iter()).for_each(|flow| self.take_up(now, &routes, flow));
    }

    /// Takes up a flow that another daemon had.
    fn take_up(&self, now: Instant, routes: &Routes, flow: &HandedFlow) {
        let Outside {
            peer,
            protocol,
            moved,
            moved_port,
            ..
        } = flow.outside;
        let kind = match protocol {
            TCP => Kind::Tcp,
            UDP => Kind::Udp,
            _ => Kind::Other,
        };
        let moved = routes.peer(peer).and_then(|routes| routes.moved(moved));
        let at = moved
            .filter(|_| flow.counts)
            .map(|moved| moved.counted(protocol, kind, moved_port));
        (self.table_of(&flow.outside)).take_up(now, flow, at, &self.limit);
    }

    /// When the daemon started, for one that takes over: so long ago.
    pub fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.start)
    }

    /// Makes a flow again that began on this side under an earlier daemon, if it is one.
    fn resume(&self, now: Instant, routes: &Routes, peer: PeerId, flow: &HostFlow) {
        let key = Inside {
            protocol: flow.protocol,
            client: flow.remote.ip().into(),
            client_port: flow.remote.port(),
            delivery: flow.local.ip().into(),
            delivery_port: flow.local.port(),
        };
        let Some(moved) = outgoing::earlier_origin(routes, peer, &key) else {
            return;
        };
        let outside = Outside {
            peer,
            protocol: key.protocol,
            client: key.client,
            client_port: key.client_port,
            moved,
            moved_port: key.delivery_port,
        };
        let mut table = self.table(key.client);
        if table.peek_inside(&key).is_none() {
            // Where there is no room, its own packets make it anew.
            let _ = table.reopen(now, &key, &outside, ACK, &self.limit);
        }
    }

    /// If there is no space for a new flow, evicts one. Nothing is locked but the shard that is
    /// looked at.
    ///
    /// A source that holds much has all of it in one shard, so the fullest shard is asked first for
    /// floods and large holders. What nobody is using is first sought where the new flow will be.
    pub(super) fn make_space(&self, now: Instant, peer: PeerId, client: Addr) {
        if !self.limit.is_full() {
            return;
        }
        let turn = self.limit.turn(peer, client);
        let evict =
            |shard: usize, stage| lock(&self.shards[shard].0).evict(now, stage, &turn, &self.limit);
        let fullest = self.fullest();
        if [Stage::Flood, Stage::Holder]
            .into_iter()
            .any(|stage| evict(fullest, stage))
        {
            return;
        }
        let own = self.shard(client);
        let all = || (0..self.shards.len()).map(|step| (own + step) % self.shards.len());
        let _ = all().any(|shard| evict(shard, Stage::Idle))
            || (turn.is_guest && all().any(|shard| evict(shard, Stage::InUse)));
    }

    /// The shard with most flows, as of a moment ago.
    fn fullest(&self) -> usize {
        if self.turns.fetch_add(1, Relaxed).is_multiple_of(TURNS) {
            let live = |&shard: &usize| lock(&self.shards[shard].0).live();
            let fullest = (0..self.shards.len()).max_by_key(live);
            self.fullest.store(fullest.unwrap_or(0), Relaxed);
        }
        self.fullest.load(Relaxed)
    }

    /// The table with a flow: its client is known there as the application sees it.
    pub(super) fn table_of(&self, flow: &Outside) -> MutexGuard<'_, FlowTable> {
        self.table(seen_client(flow))
    }

    #[inline]
    fn table(&self, client: Addr) -> MutexGuard<'_, FlowTable> {
        lock(&self.shards[self.shard(client)].0)
    }

    #[inline]
    fn shard(&self, client: Addr) -> usize {
        // The high half: the low bits choose other things.
        (self.seed.source(client) >> 32) as usize & (self.shards.len() - 1)
    }

    fn change(&self, change: impl FnOnce(&mut Routes)) {
        self.change_first(change, |_| {});
    }

    /// Changes the routes, and does something with the new ones before any packet sees them.
    fn change_first(&self, change: impl FnOnce(&mut Routes), first: impl FnOnce(&Routes)) {
        let _one_at_a_time = lock(&self.changing);
        let mut routes = Routes::clone(&self.routes.load());
        change(&mut routes);
        routes.resolve();
        first(&routes);
        self.routes.store(Arc::new(routes));
    }
}

impl std::fmt::Debug for Translator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Translator")
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::testing::{one_port, translator};
    use crate::packet::testing::{Plan, assert_sums, complete, fragments, plans, reply, too_big};
    use crate::packet::{FIN, RST};

    use proptest::prelude::*;

    const PEER: PeerId = PeerId(1);
    const CLIENT: &str = "203.0.113.9";
    const MOVED: &str = "192.0.2.5";
    const DELIVERY: &str = "198.51.100.2";
    const CLIENT6: &str = "2001:db8:c::9";
    const MOVED6: &str = "2001:db8:a::5";
    const DELIVERY6: &str = "2001:db8:b::2";

    struct Bed {
        translator: Translator,
        now: Instant,
    }

    impl Bed {
        fn new(moves: &[&str], delivery: Delivery) -> Self {
            let (translator, now) = translator(PEER, moves, delivery);
            translator.set_own_addresses(&["198.51.100.77".parse().unwrap()]);
            Self { translator, now }
        }

        fn simple() -> Self {
            Self::new(&[MOVED, MOVED6], delivery())
        }

        fn inbound(&self, bytes: &mut [u8]) -> Result<(), DropReason> {
            self.inbound_of(PEER, bytes)
        }

        fn inbound_of(&self, peer: PeerId, bytes: &mut [u8]) -> Result<(), DropReason> {
            let mut parsed = Parsed::parse(bytes)?;
            self.translator
                .inbound(self.now, peer, bytes, &mut parsed, false)?;
            assert_eq!(Parsed::parse(bytes), Ok(parsed));
            Ok(())
        }

        fn outbound(&self, bytes: &mut [u8]) -> Result<PeerId, DropReason> {
            let mut parsed = Parsed::parse(bytes)?;
            let peer = self
                .translator
                .outbound(self.now, bytes, &mut parsed, false)
                .map_err(|drop| drop.reason)?;
            assert_eq!(Parsed::parse(bytes), Ok(parsed));
            Ok(peer)
        }
    }

    fn delivery() -> Delivery {
        Delivery {
            v4: Some(DELIVERY.parse().unwrap()),
            v6: Some(DELIVERY6.parse().unwrap()),
            ..Delivery::default()
        }
    }

    fn request(kind: Kind) -> Plan {
        Plan {
            flags: SYN,
            ..Plan::new(kind, CLIENT, MOVED)
        }
    }

    /// The answer to a datagram that was delivered, from another address or port of this host.
    fn answered_from(delivered: &[u8], addr: &str, port: u16) -> Vec<u8> {
        let parsed = Parsed::parse(delivered).unwrap();
        let client = IpAddr::from(parsed.src(delivered)).to_string();
        let mut plan = Plan::new(Kind::Udp, addr, &client);
        (plan.src_port, plan.dst_port) = (port, parsed.src_port());
        plan.build()
    }

    #[test]
    fn a_client_is_answered_from_the_moved_address_whichever_address_answers() {
        for (client, moved, delivered_to, answers) in [
            (CLIENT, MOVED, DELIVERY, "198.51.100.77"),
            (CLIENT6, MOVED6, DELIVERY6, "2001:db8:b::77"),
        ] {
            let bed = Bed::simple();
            let asked = Plan::new(Kind::Udp, client, moved);
            let mut packet = asked.build();
            bed.inbound(&mut packet).unwrap();
            assert_eq!(
                IpAddr::from(Parsed::parse(&packet).unwrap().dst(&packet)),
                delivered_to.parse::<IpAddr>().unwrap()
            );
            let mut answer = answered_from(&packet, answers, asked.dst_port);
            assert_eq!(bed.outbound(&mut answer), Ok(PEER));
            let parsed = Parsed::parse(&answer).unwrap();
            let from = (IpAddr::from(parsed.src(&answer)), parsed.src_port());
            assert_eq!(from, (asked.dst, asked.dst_port));
            assert_sums(&answer);
            assert_eq!(bed.translator.stats().live, 1, "it is the same flow");
            // The client is heard where it was answered from.
            let mut next = asked.build();
            bed.inbound(&mut next).unwrap();
            let to = IpAddr::from(Parsed::parse(&next).unwrap().dst(&next));
            assert_eq!(to, answers.parse::<IpAddr>().unwrap());
            assert_eq!(
                bed.outbound(&mut answered_from(&next, answers, asked.dst_port)),
                Ok(PEER)
            );
            // No other protocol's.
            let tcp = Plan {
                flags: ACK,
                ..Plan::new(Kind::Tcp, answers, client)
            };
            assert_eq!(bed.outbound(&mut tcp.build()), Err(DropReason::NoFlow));
        }
    }

    #[test]
    fn an_answer_from_another_port_is_the_beginning_of_a_flow() {
        for from in [DELIVERY, "198.51.100.77"] {
            let bed = Bed::new(&["192.0.2.5:69/udp", "192.0.2.5:40000-50000"], delivery());
            let mut asked = Plan::new(Kind::Udp, CLIENT, MOVED);
            asked.dst_port = 69;
            let mut packet = asked.build();
            bed.inbound(&mut packet).unwrap();
            let mut answer = answered_from(&packet, from, 45_000);
            assert_eq!(bed.outbound(&mut answer), Ok(PEER));
            let parsed = Parsed::parse(&answer).unwrap();
            assert_eq!(
                (parsed.src_port(), parsed.dst_port()),
                (45_000, asked.src_port)
            );
            assert_eq!(IpAddr::from(parsed.src(&answer)), asked.dst);
            assert_sums(&answer);
            // The client goes on with it, to where it was answered from.
            asked.dst_port = 45_000;
            let mut next = asked.build();
            bed.inbound(&mut next).unwrap();
            let parsed = Parsed::parse(&next).unwrap();
            let to = (IpAddr::from(parsed.dst(&next)), parsed.dst_port());
            assert_eq!(to, (from.parse().unwrap(), 45_000));
            assert_eq!(bed.translator.stats().live, 2);
            // A port that has not moved is somebody else's to the client.
            for _ in 0..2 {
                let mut answer = answered_from(&packet, from, 50_001);
                let outcome = bed.outbound(&mut answer);
                assert_eq!(outcome, Err(DropReason::UnmovedPort));
            }
            let unmoved = UnmovedPort {
                moved: MOVED.parse().unwrap(),
                asked: 45_000,
                answered: 50_001,
            };
            assert_eq!(bed.translator.take_unmoved_ports(), [(PEER, unmoved)]);
            assert!(bed.translator.take_unmoved_ports().is_empty());
        }
    }

    #[test]
    fn of_a_peer_that_is_gone_the_next_in_its_place_hears_nothing() {
        let bed = Bed::simple();
        bed.inbound(&mut request(Kind::Tcp).build()).unwrap();
        let elsewhere = Plan {
            dst: "192.0.2.77".parse().unwrap(),
            ..request(Kind::Tcp)
        };
        let bytes = elsewhere.build();
        let parsed = Parsed::parse(&bytes).unwrap();
        let why = DropReason::NotMoved;
        (bed.translator).turned_away(bed.now, PEER, &parsed, &bytes, why);
        bed.translator.forget_peer(PEER);
        let seen = bed.translator.observe(bed.now, PEER);
        assert_eq!(seen, Observations::default());
    }

    #[test]
    fn flows_without_a_connection_go_where_the_delivery_address_is_now() {
        let host = |all: &[&str]| all.iter().map(|it| it.parse().unwrap()).collect::<Vec<_>>();
        let to = |addr: &str| Delivery {
            v4: Some(addr.parse().unwrap()),
            ..delivery()
        };
        const OTHER: &str = "198.51.100.77";
        for (there, udp_goes_to) in [(&[OTHER][..], OTHER), (&[OTHER, DELIVERY][..], DELIVERY)] {
            let bed = Bed::simple();
            let delivered = |kind| {
                let mut packet = request(kind).build();
                bed.inbound(&mut packet).unwrap();
                IpAddr::from(Parsed::parse(&packet).unwrap().dst(&packet)).to_string()
            };
            let both = || [Kind::Udp, Kind::Tcp].map(delivered);
            bed.translator.set_own_addresses(&host(&[DELIVERY, OTHER]));
            assert_eq!(both(), [DELIVERY, DELIVERY]);
            bed.translator.set_own_addresses(&host(there));
            bed.translator.set_delivery(PEER, to(OTHER));
            assert_eq!(both(), [udp_goes_to, DELIVERY]);
        }
    }

    #[test]
    fn an_answer_from_where_another_port_leads_is_from_that_port() {
        let moved = MOVED.parse().unwrap();
        let with_map = Delivery {
            maps: vec![one_port(moved, 1_069, DELIVERY, 45_000)],
            ..delivery()
        };
        let bed = Bed::new(&[MOVED], with_map);
        let asked = Plan::new(Kind::Udp, CLIENT, MOVED);
        let mut packet = asked.build();
        bed.inbound(&mut packet).unwrap();
        let mut answer = answered_from(&packet, DELIVERY, 45_000);
        assert_eq!(bed.outbound(&mut answer), Ok(PEER));
        assert_eq!(Parsed::parse(&answer).unwrap().src_port(), 1_069);
    }

    #[test]
    fn a_flow_goes_on_after_a_restart_whichever_address_answers() {
        let bed = Bed::simple();
        let asked = Plan::new(Kind::Udp, CLIENT, MOVED);
        let mut packet = moved_to(&asked, DELIVERY).build();
        let mut answer = answered_from(&packet, "198.51.100.77", asked.dst_port);
        assert_eq!(bed.outbound(&mut answer), Ok(PEER));
        let parsed = Parsed::parse(&answer).unwrap();
        assert_eq!(IpAddr::from(parsed.src(&answer)), asked.dst);
        packet = asked.build();
        bed.inbound(&mut packet).unwrap();
        assert_eq!(bed.translator.stats().live, 1);
    }

    fn moved_to(plan: &Plan, dst: &str) -> Plan {
        Plan {
            dst: dst.parse().unwrap(),
            ..plan.clone()
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Announce(Vec<Move>),
        FromClient(Plan),
        FromApplication(Plan),
    }

    /// Addresses that a peer may name: clients, the host's own, another peer's address …
    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let addr = prop::sample::select(vec![
            "203.0.113.8",
            CLIENT,
            "[2001:db8:c::9]",
            DELIVERY,
            "192.0.2.66",
        ]);
        // A port of the victim's, delivered to one place, is theirs alone only if `accept` says so.
        let ports = prop::sample::select(vec!["", ":81", ":1-79/tcp", ":80/udp", ":443,8000-9000"]);
        let moved = (addr, ports).prop_map(|(addr, ports)| format!("{addr}{ports}"));
        let moves = prop::collection::vec(moved.prop_map(|text| text.parse().unwrap()), 0..4);
        let packet = (
            prop::sample::select(vec!["203.0.113.8", CLIENT]),
            1u16..4,
            78u16..83,
        )
            .prop_map(|(client, src_port, dst_port)| Plan {
                src_port,
                dst_port,
                flags: ACK,
                ..Plan::new(Kind::Tcp, client, MOVED)
            });
        let step = prop_oneof![
            moves.prop_map(Step::Announce),
            packet.clone().prop_map(Step::FromClient),
            packet.prop_map(Step::FromApplication),
        ];
        prop::collection::vec(step, 1..40)
    }

    proptest! {
        #[test]
        fn no_announcement_of_another_peer_changes_what_a_client_gets(steps in steps()) {
            let alone = Bed::new(&["192.0.2.5:80/tcp"], delivery());
            let shared = Bed::new(&["192.0.2.5:80/tcp"], delivery());
            shared.translator.set_delivery(PeerId(0), delivery());
            for step in steps {
                let mut bytes = match &step {
                    Step::Announce(moves) => {
                        shared.translator.set_moves(PeerId(0), moves);
                        continue;
                    }
                    Step::FromClient(plan) => plan.build(),
                    Step::FromApplication(plan) => reply(&moved_to(plan, DELIVERY)).build(),
                };
                let mut same = bytes.clone();
                if matches!(step, Step::FromClient(_)) {
                    prop_assert_eq!(alone.inbound(&mut bytes), shared.inbound(&mut same));
                } else {
                    // What belongs to nobody without the other peer may become the other peer's.
                    let (wanted, got) = (alone.outbound(&mut bytes), shared.outbound(&mut same));
                    if wanted.is_err() {
                        prop_assert_ne!(got, Ok(PEER));
                        continue;
                    }
                    prop_assert_eq!(wanted, got);
                }
                prop_assert_eq!(bytes, same);
            }
        }

        #[test]
        fn there_and_back_is_the_identity(
            plan in plans(), partial in any::<bool>(), keep in any::<bool>(),
            mapped in any::<bool>(),
        ) {
            if plan.kind == Kind::IcmpReply { return Ok(()); }
            let v4 = plan.src.is_ipv4();
            let plan = moved_to(&plan, if v4 { MOVED } else { MOVED6 });
            let partial = partial && plan.kind != Kind::IcmpQuery;
            let to = if v4 { DELIVERY } else { DELIVERY6 };
            let mut wanted = if keep { plan.clone() } else { moved_to(&plan, to) };
            let mut maps = Vec::new();
            if mapped {
                maps.push(one_port(plan.dst, plan.dst_port, &wanted.dst.to_string(), 8080));
                if plan.kind != Kind::IcmpQuery { wanted.dst_port = 8080; }
            }
            let bed = Bed::new(&[MOVED, MOVED6], Delivery { keep, maps, ..delivery() });
            let build = |plan: &Plan| if partial { plan.build_partial() } else { plan.build() };

            let mut bytes = build(&plan);
            let mut parsed = Parsed::parse(&bytes).unwrap();
            bed.translator.inbound(bed.now, PEER, &mut bytes, &mut parsed, partial).unwrap();
            prop_assert_eq!(&bytes, &build(&wanted));
            prop_assert_eq!(parsed, Parsed::parse(&bytes).unwrap());

            let mut bytes = build(&reply(&wanted));
            let mut parsed = Parsed::parse(&bytes).unwrap();
            let peer = bed.translator.outbound(bed.now, &mut bytes, &mut parsed, partial);
            prop_assert_eq!(peer, Ok(PEER));
            prop_assert_eq!(&bytes, &build(&reply(&plan)));
            prop_assert_eq!(parsed, Parsed::parse(&bytes).unwrap());
            if partial { complete(&mut bytes); }
            assert_sums(&bytes);
        }

        #[test]
        fn errors_are_translated_inside_and_out(
            plan in plans(), keep_quote in any::<prop::sample::Index>(), whole in any::<bool>(),
        ) {
            if plan.kind == Kind::IcmpReply { return Ok(()); }
            let v4 = plan.src.is_ipv4();
            let plan = moved_to(&plan, if v4 { MOVED } else { MOVED6 });
            let delivered = moved_to(&plan, if v4 { DELIVERY } else { DELIVERY6 });
            let router: IpAddr = if v4 { "192.0.2.99" } else { "2001:db8::99" }.parse().unwrap();
            let bed = Bed::simple();
            bed.inbound(&mut plan.build()).unwrap();

            // From a router on the client's side, about the reply.
            let back = reply(&plan).build();
            let back_inside = reply(&delivered).build();
            let least = if v4 { 28 } else { 48 };
            let less = least + keep_quote.index(back.len() - least + 1);
            let len = if whole { back.len() } else { less };
            // Half a checksum says nothing and is left as it is.
            let half_a_checksum = plan.kind == Kind::Tcp && len == least - 8 + 17;
            let len = len + usize::from(half_a_checksum);
            let mut error = too_big(&back, len, router);
            bed.inbound(&mut error).unwrap();
            prop_assert_eq!(error, too_big(&back_inside, len, router));

            // From the application's host, about the request. The client gets it from the moved
            // address.
            let request = plan.build();
            let request_inside = delivered.build();
            let len = len.min(request.len());
            let mut error = too_big(&request_inside, len, delivered.dst);
            prop_assert_eq!(bed.outbound(&mut error), Ok(PEER));
            prop_assert_eq!(error, too_big(&request, len, plan.dst));
        }
    }

    #[test]
    fn each_reply_comes_from_the_address_that_was_asked() {
        let bed = Bed::new(&[MOVED, "192.0.2.6"], delivery());
        for kind in [Kind::Tcp, Kind::Udp, Kind::IcmpQuery] {
            for dst in [MOVED, "192.0.2.6"] {
                let plan = moved_to(&request(kind), dst);
                let mut bytes = plan.build();
                bed.inbound(&mut bytes).unwrap();
                let parsed = Parsed::parse(&bytes).unwrap();
                let arrived = Plan {
                    src_port: parsed.src_port(),
                    ..moved_to(&plan, DELIVERY)
                };
                assert_eq!(bytes, arrived.build());
                let mut back = reply(&arrived).build();
                bed.outbound(&mut back).unwrap();
                assert_eq!(back, reply(&plan).build());
            }
        }
        let stats = bed.translator.stats();
        assert_eq!((stats.live, stats.collisions), (6, 3));
    }

    #[test]
    fn nothing_else_passes() {
        let bed = Bed::new(&["192.0.2.5:80/tcp"], delivery());
        let with = |change: &dyn Fn(&mut Plan)| {
            let mut plan = request(Kind::Tcp);
            change(&mut plan);
            bed.inbound(&mut plan.build())
        };
        assert_eq!(with(&|_| ()), Ok(()));
        assert_eq!(with(&|p| p.dst_port = 81), Err(DropReason::NotMoved));
        assert_eq!(with(&|p| p.kind = Kind::Udp), Err(DropReason::NotMoved));
        assert_eq!(
            with(&|p| p.dst = DELIVERY.parse().unwrap()),
            Err(DropReason::NotMoved)
        );
        let own = Err(DropReason::BadSource);
        assert_eq!(with(&|p| p.src = DELIVERY.parse().unwrap()), own);
        assert_eq!(with(&|p| p.src = "198.51.100.77".parse().unwrap()), own);
        let mut parsed = Parsed::parse(&request(Kind::Tcp).build()).unwrap();
        let mut bytes = request(Kind::Tcp).build();
        for peer in [PeerId(0), PeerId(9)] {
            let got = bed
                .translator
                .inbound(bed.now, peer, &mut bytes, &mut parsed, false);
            assert_eq!(got, Err(DropReason::NotMoved), "another peer's");
        }
        let v4_only = Delivery {
            v6: None,
            ..delivery()
        };
        let bed = Bed::new(&[MOVED6], v4_only);
        let v6 = Plan::new(Kind::Tcp, CLIENT6, MOVED6);
        assert_eq!(bed.inbound(&mut v6.build()), Err(DropReason::NoDelivery));
        assert_eq!(
            bed.inbound(&mut request(Kind::IcmpReply).build()),
            Err(DropReason::NotMoved)
        );
    }

    #[test]
    fn the_datagrams_of_a_tunnel_answer_no_client() {
        for (here, peer) in [(DELIVERY, "192.0.2.1"), (DELIVERY6, "2001:db8:a::1")] {
            let bed = Bed::simple();
            let datagram = |from: u16, to: &str, port: u16| {
                let plan = Plan {
                    src_port: from,
                    dst_port: port,
                    ..Plan::new(Kind::Udp, here, to)
                };
                bed.outbound(&mut plan.build())
            };
            let to = SocketAddr::new(peer.parse().unwrap(), 51_850);
            bed.translator.set_tunnel(PEER, to, 51_851);
            assert_eq!(datagram(51_851, peer, 51_850), Err(DropReason::NoFlow));
            // Others may be answers to clients of an earlier daemon, who may be there as well.
            assert_eq!(datagram(51_851, peer, 51_849), Ok(PEER));
            assert_eq!(datagram(51_850, peer, 51_850), Ok(PEER));
            // It roams.
            let to = SocketAddr::new(peer.parse().unwrap(), 40_000);
            bed.translator.set_tunnel(PEER, to, 51_851);
            assert_eq!(datagram(51_851, peer, 40_000), Err(DropReason::NoFlow));
            assert_eq!(datagram(51_851, peer, 51_850), Ok(PEER));
        }
    }

    #[test]
    fn no_flow_begins_with_a_client_from_a_network_of_this_server() {
        let bed = Bed::simple();
        let own = |text: &str| OwnNetwork {
            prefix: text.parse().unwrap(),
            interface: "eth1".into(),
        };
        let networks = || vec![own("203.0.113.0/24"), own("2001:db8:c::/64")];
        let known = Plan {
            src_port: 1,
            ..request(Kind::Tcp)
        };
        bed.inbound(&mut known.build()).unwrap();
        bed.translator.set_own_networks(networks());
        let refused = Err(DropReason::MartianSource);
        for plan in [
            request(Kind::Tcp),
            request(Kind::Udp),
            request(Kind::IcmpQuery),
            Plan::new(Kind::Udp, CLIENT6, MOVED6),
        ] {
            assert_eq!(bed.inbound(&mut plan.build()), refused);
            if plan.kind == Kind::Udp {
                let [mut first, mut second] = fragments(&plan.build(), 16, 7);
                assert_eq!(bed.inbound(&mut second), refused);
                assert_eq!(bed.inbound(&mut first), refused);
            }
            // Nor does the application begin one by itself.
            let delivered = moved_to(
                &plan,
                if plan.src.is_ipv4() {
                    DELIVERY
                } else {
                    DELIVERY6
                },
            );
            let back = Plan {
                flags: ACK,
                ..reply(&delivered)
            };
            assert_eq!(bed.outbound(&mut back.build()), Err(DropReason::NoFlow));
        }
        let told = bed.translator.take_refused_sources();
        assert_eq!(told.keys().copied().collect::<Vec<_>>(), [PEER]);
        // What was under way goes on, and its ICMP errors reach it.
        bed.inbound(&mut known.build()).unwrap();
        let router = "203.0.113.1".parse().unwrap();
        bed.inbound(&mut too_big(&reply(&known).build(), 28, router))
            .unwrap();
        // Whoever is let in is served.
        bed.translator
            .allow_clients(PEER, &["203.0.113.0/24".parse().unwrap()]);
        bed.inbound(&mut request(Kind::Tcp).build()).unwrap();
        let v6 = Plan::new(Kind::Udp, CLIENT6, MOVED6);
        assert_eq!(bed.inbound(&mut v6.build()), refused);
    }

    #[test]
    fn the_application_goes_on_after_a_restart() {
        let bed = Bed::new(&["192.0.2.5:80/tcp", "192.0.2.6:81/tcp"], delivery());
        let plan = request(Kind::Tcp);
        let data = Plan {
            flags: ACK,
            ..reply(&moved_to(&plan, DELIVERY))
        };
        let mut bytes = data.build();
        assert_eq!(bed.outbound(&mut bytes), Ok(PEER));
        assert_eq!(
            bytes,
            Plan {
                flags: ACK,
                ..reply(&plan)
            }
            .build()
        );
        // The client's next packet belongs to the same flow.
        bed.inbound(
            &mut Plan {
                flags: ACK,
                ..plan.clone()
            }
            .build(),
        )
        .unwrap();
        assert_eq!(bed.translator.stats().live, 1);
        // A connection that the application opens is no known flow, nor is a port that was not
        // moved.
        let syn = Plan {
            flags: SYN,
            dst_port: 9,
            ..data.clone()
        };
        assert_eq!(bed.outbound(&mut syn.build()), Err(DropReason::NoFlow));
        let other = Plan {
            src_port: 82,
            ..data.clone()
        };
        assert_eq!(bed.outbound(&mut other.build()), Err(DropReason::NoFlow));
        // Either of two moved addresses could have been asked: the daemon does not guess.
        let bed = Bed::new(&[MOVED, "192.0.2.6"], delivery());
        assert_eq!(bed.outbound(&mut data.build()), Err(DropReason::NoFlow));
        // A mapped port is found by where it is delivered, and not by its own number.
        let maps = vec![one_port(MOVED.parse().unwrap(), 80, DELIVERY, 8080)];
        let bed = Bed::new(&["192.0.2.5:80/tcp"], Delivery { maps, ..delivery() });
        assert_eq!(bed.outbound(&mut data.build()), Err(DropReason::NoFlow));
        let mut bytes = Plan {
            src_port: 8080,
            ..data.clone()
        }
        .build();
        assert_eq!(bed.outbound(&mut bytes), Ok(PEER));
        assert_eq!(
            bytes,
            Plan {
                flags: ACK,
                ..reply(&plan)
            }
            .build()
        );
        let mut reset = Plan {
            flags: RST,
            src_port: 8080,
            ..data
        }
        .build();
        assert_eq!(bed.outbound(&mut reset), Ok(PEER));
    }

    #[test]
    fn fragments_go_where_their_first_one_goes() {
        for v6 in [false, true] {
            let (client, moved, to) = if v6 {
                (CLIENT6, MOVED6, DELIVERY6)
            } else {
                (CLIENT, MOVED, DELIVERY)
            };
            let part = if v6 {
                "[2001:db8:a::5]:80/udp"
            } else {
                "192.0.2.5:80/udp"
            };
            let plan = Plan::new(Kind::Udp, client, moved);
            let arrived = moved_to(&plan, to);
            for (scope, whole) in [(moved, true), (part, false)] {
                let bed = Bed::new(&[scope], delivery());
                let [mut first, mut second] = fragments(&plan.build(), 16, 7);
                let wanted = fragments(&arrived.build(), 16, 7);
                if !whole {
                    let early = bed.inbound(&mut second.clone());
                    assert_eq!(early, Err(DropReason::FragmentUnknown));
                }
                bed.inbound(&mut first).unwrap();
                bed.inbound(&mut second).unwrap();
                assert_eq!([first, second], wanted);

                let [mut first, mut second] = fragments(&reply(&arrived).build(), 16, 9);
                let wanted = fragments(&reply(&plan).build(), 16, 9);
                let early = bed.outbound(&mut second.clone());
                assert_eq!(early, Err(DropReason::FragmentUnknown));
                assert_eq!(bed.outbound(&mut first), Ok(PEER));
                assert_eq!(bed.outbound(&mut second), Ok(PEER));
                assert_eq!([first, second], wanted);
            }
            // If the whole address was moved, a later fragment needs no first one.
            let bed = Bed::new(&[moved], delivery());
            let [_, mut second] = fragments(&plan.build(), 16, 7);
            bed.inbound(&mut second).unwrap();
            assert_eq!(second, fragments(&arrived.build(), 16, 7)[1]);
        }
    }

    #[test]
    fn errors_about_nothing_known_are_dropped() {
        let bed = Bed::simple();
        let router = "192.0.2.99".parse().unwrap();
        let about = reply(&request(Kind::Tcp)).build();
        let mut error = too_big(&about, 28, router);
        assert_eq!(bed.inbound(&mut error), Err(DropReason::IcmpUnrelated));
        bed.inbound(&mut request(Kind::Tcp).build()).unwrap();
        assert_eq!(bed.inbound(&mut error.clone()), Ok(()));
        let forged = too_big(&about, 28, DELIVERY.parse().unwrap());
        assert_eq!(bed.inbound(&mut forged.clone()), Err(DropReason::BadSource));
        let short = too_big(&about, 27, router);
        assert_eq!(
            bed.inbound(&mut short.clone()),
            Err(DropReason::IcmpUnrelated)
        );
    }

    #[test]
    fn what_a_peer_announces_shuts_out_no_client_of_another() {
        let bed = Bed::new(&["192.0.2.5:80"], delivery());
        let other = PeerId(0);
        bed.translator.set_delivery(other, delivery());
        // One after the other, far more than any table of theirs would hold.
        for round in 0..1_100u32 {
            let addr = |n: u32| IpAddr::from((0x0b00_0000 + round * 64 + n).to_be_bytes());
            let moves = (0..64).map(|n| addr(n).to_string().parse().unwrap());
            bed.translator.set_moves(other, &moves.collect::<Vec<_>>());
        }
        let whole = |addrs: &[&str]| -> Vec<Move> {
            addrs.iter().map(|addr| addr.parse().unwrap()).collect()
        };
        bed.translator
            .set_moves(other, &whole(&[CLIENT, CLIENT6, "192.0.2.77"]));
        bed.inbound(&mut request(Kind::Tcp).build()).unwrap();
        // Nor does it take what a client's conversation goes on by.
        let plan = Plan {
            flags: ACK,
            src_port: 4_000,
            ..request(Kind::Tcp)
        };
        let data = reply(&moved_to(&plan, DELIVERY)).build();
        assert_eq!(bed.outbound(&mut data.clone()), Ok(PEER));
        // What it says is its own cannot be the source of its own clients' packets.
        let own = moved_to(&request(Kind::Tcp), "192.0.2.77");
        let got = bed.inbound_of(other, &mut own.build());
        assert_eq!(got, Err(DropReason::BadSource));
    }

    #[test]
    fn a_program_of_this_host_begins_no_conversation() {
        let mut bed = Bed::simple();
        let to = |kind, client: &str, flags| {
            let asked = Plan::new(kind, client, DELIVERY);
            let packet = Plan {
                flags,
                ..reply(&asked)
            };
            packet.build()
        };
        let somebody = "203.0.113.200";
        assert_eq!(bed.outbound(&mut to(Kind::Udp, CLIENT, 0)), Ok(PEER));
        bed.now += REOPEN_FOR - Duration::from_secs(1);
        assert_eq!(bed.outbound(&mut to(Kind::Udp, somebody, 0)), Ok(PEER));
        bed.now += Duration::from_secs(1);
        for kind in [Kind::Udp, Kind::IcmpQuery] {
            let got = bed.outbound(&mut to(kind, "203.0.113.201", 0));
            assert_eq!(got, Err(DropReason::NoFlow), "{kind:?}");
        }
        // What is there goes on, and a connection may still be continued.
        assert_eq!(bed.outbound(&mut to(Kind::Udp, somebody, 0)), Ok(PEER));
        assert_eq!(bed.outbound(&mut to(Kind::Tcp, CLIENT, ACK)), Ok(PEER));
        let syn = bed.outbound(&mut to(Kind::Tcp, "203.0.113.201", SYN));
        assert_eq!(syn, Err(DropReason::NoFlow));
    }

    #[test]
    fn space_is_made_where_the_holder_is() {
        let bed = Bed::simple();
        let from = |source: u32, src_port| Plan {
            src: IpAddr::from(source.to_be_bytes()),
            src_port,
            ..request(Kind::Udp)
        };
        let converse = |plan: Plan| {
            let answer = reply(&moved_to(&plan, DELIVERY)).build();
            bed.inbound(&mut plan.build())?;
            bed.outbound(&mut answer.clone())?;
            bed.inbound(&mut plan.build())
        };
        for port in 0..1_000 {
            converse(from(0x0b00_0000, 2_000 + port)).unwrap();
        }
        // A client that is just connecting, in whichever shard, loses nothing to the next ones.
        for source in 0..300 {
            bed.inbound(&mut from(0x0c00_0000 + source, 7).build())
                .unwrap();
        }
        for source in 0..300 {
            let plan = from(0x0c00_0000 + source, 7);
            let answer = reply(&moved_to(&plan, DELIVERY)).build();
            assert_eq!(bed.outbound(&mut answer.clone()), Ok(PEER), "{source}");
        }
        let stats = bed.translator.stats();
        assert_eq!((stats.live, stats.displaced, stats.refused), (1000, 300, 0));
    }

    #[test]
    fn who_listens_hears_of_flows_that_ended() {
        let mut bed = Bed::simple();
        let arrived = |client: &str, kind| {
            let src = client.parse().unwrap();
            Plan {
                src,
                ..request(kind)
            }
        };
        let ping = Plan::new(Kind::IcmpQuery, CLIENT6, MOVED6);
        for plan in [request(Kind::Tcp), arrived("203.0.113.8", Kind::Udp), ping] {
            bed.inbound(&mut plan.build()).unwrap();
        }
        let mut ended = Vec::new();
        assert_eq!(bed.translator.take_ended(&mut ended), 0);
        assert_eq!(ended, []);
        bed.now += Duration::from_secs(239);
        bed.translator.expire(bed.now, usize::MAX);
        bed.translator.take_ended(&mut ended);
        let flow = |protocol, local: &str, remote: &str| HostFlow {
            protocol,
            local: local.parse().unwrap(),
            remote: remote.parse().unwrap(),
        };
        let plan = request(Kind::Udp);
        let (src, dst) = (plan.src_port, plan.dst_port);
        ended.sort_unstable_by_key(|flow| flow.protocol);
        let udp = flow(
            17,
            &format!("{DELIVERY}:{dst}"),
            &format!("203.0.113.8:{src}"),
        );
        let id = Parsed::parse(&Plan::new(Kind::IcmpQuery, CLIENT6, MOVED6).build())
            .unwrap()
            .src_port();
        let icmp = flow(
            58,
            &format!("[{DELIVERY6}]:0"),
            &format!("[{CLIENT6}]:{id}"),
        );
        assert_eq!(ended, [udp, icmp]);
        let tcp = flow(6, &format!("{DELIVERY}:{dst}"), &format!("{CLIENT}:{src}"));
        assert!(bed.translator.knows(&tcp) && !bed.translator.knows(&udp));
        // One that began again is not among those that ended.
        ended.clear();
        bed.now += Duration::from_secs(1);
        bed.inbound(&mut request(Kind::Tcp).build()).unwrap();
        assert_eq!((bed.translator.take_ended(&mut ended), ended.len()), (0, 0));
        // Far more than there is room for.
        for source in 0..80_000u32 {
            let client = IpAddr::from((0x0b00_0000 + source).to_be_bytes()).to_string();
            let plan = arrived(&client, Kind::Udp);
            bed.inbound(&mut plan.build()).unwrap();
        }
        let lost = bed.translator.take_ended(&mut ended);
        assert!(ended.len() <= ENDED_ROOM && lost > 0);
        assert_eq!(ended.len() as u64 + lost, bed.translator.stats().evicted);
    }

    #[test]
    fn space_is_made_in_other_shards() {
        let bed = Bed::simple();
        for source in 0..1500u32 {
            let plan = Plan {
                src: IpAddr::from((0x0b00_0000 + source).to_be_bytes()),
                ..request(Kind::Tcp)
            };
            assert_eq!(bed.inbound(&mut plan.build()), Ok(()));
        }
        let stats = bed.translator.stats();
        assert_eq!((stats.live, stats.max, stats.evicted), (1000, 1000, 500));
    }

    #[test]
    fn each_move_counts_the_conversations_that_went_on() {
        let moves = [&format!("{MOVED}:80/tcp"), &format!("{MOVED}:53"), MOVED6];
        let bed = Bed::new(&moves.map(|it: &str| it), delivery());
        let tallies = || -> Vec<[u64; 3]> {
            let all = bed.translator.tallies(PEER);
            let each = all.iter();
            each.map(|it| [it.live, it.by_tunnel, it.directly])
                .collect()
        };
        let packet = |kind, client: &str, moved: &str, ports: (u16, u16), flags| Plan {
            src_port: ports.0,
            dst_port: ports.1,
            flags,
            ..Plan::new(kind, client, moved)
        };
        // A flood: nobody goes on after the answer, if there is one.
        for port in 1..100 {
            let mut syn = packet(Kind::Tcp, CLIENT, MOVED, (port, 80), SYN).build();
            bed.inbound(&mut syn).unwrap();
            let mut answer = packet(Kind::Tcp, DELIVERY, CLIENT, (80, port), SYN | ACK).build();
            bed.outbound(&mut answer).unwrap();
        }
        assert_eq!(tallies(), [[0; 3]; 3]);
        let said = |from_client, port, flags| {
            let result = if from_client {
                let mut bytes = packet(Kind::Tcp, CLIENT, MOVED, (port, 80), flags).build();
                bed.inbound(&mut bytes)
            } else {
                let mut bytes = packet(Kind::Tcp, DELIVERY, CLIENT, (80, port), flags).build();
                bed.outbound(&mut bytes).map(drop)
            };
            result.unwrap();
        };
        for port in [1, 2, 500] {
            said(true, port, SYN);
            said(false, port, SYN | ACK);
            said(true, port, ACK);
            said(true, port, ACK);
        }
        assert_eq!(tallies()[0], [3, 3, 0]);
        said(true, 1, FIN | ACK);
        said(false, 1, FIN | ACK);
        said(false, 2, RST);
        assert_eq!(tallies()[0], [1, 3, 0]);
        // One from before this daemon lives here, and is none that came since.
        said(true, 600, ACK);
        said(false, 600, ACK);
        said(false, 601, ACK);
        said(true, 601, ACK);
        assert_eq!(tallies()[0], [3, 3, 0]);
        // UDP is answered; ICMP does not count.
        for (client, moved, here) in [(CLIENT, MOVED, DELIVERY), (CLIENT6, MOVED6, DELIVERY6)] {
            let udp = |from: &str, to: &str, ports| packet(Kind::Udp, from, to, ports, 0).build();
            bed.inbound(&mut udp(client, moved, (700, 53))).unwrap();
            bed.inbound(&mut udp(client, moved, (701, 53))).unwrap();
            bed.outbound(&mut udp(here, client, (53, 700))).unwrap();
        }
        let ping = Plan::new(Kind::IcmpQuery, CLIENT6, MOVED6);
        let mut pong = ping.build();
        bed.inbound(&mut pong).unwrap();
        bed.outbound(
            &mut reply(&Plan {
                dst: DELIVERY6.parse().unwrap(),
                ..ping
            })
            .build(),
        )
        .unwrap();
        assert_eq!(tallies(), [[3, 3, 0], [1, 1, 0], [1, 1, 0]]);
        // Its time is over, and the counts stay.
        let later = bed.now + Duration::from_secs(8_000);
        while bed.translator.expire(later, 1_000) > 0 {}
        assert_eq!(tallies(), [[0, 3, 0], [0, 1, 0], [0, 1, 0]]);
    }

    #[test]
    fn while_it_pauses_nobody_begins_and_who_has_begun_goes_on() {
        let bed = Bed::simple();
        for kind in [Kind::Tcp, Kind::Udp] {
            let plan = |port| Plan {
                src_port: port,
                ..request(kind)
            };
            bed.inbound(&mut plan(4_000).build()).unwrap();
            bed.translator.pause(true);
            let refused = bed.inbound(&mut plan(4_001).build());
            assert_eq!(refused, Err(DropReason::FlowTableGrows));
            bed.inbound(&mut plan(4_000).build()).unwrap();
            bed.translator.pause(false);
            bed.inbound(&mut plan(4_001).build()).unwrap();
        }
    }

    /// `cargo test --lib translate::tests::what_a_new_flow_costs -- --ignored --nocapture`
    #[test]
    #[ignore = "it measures"]
    #[expect(clippy::disallowed_methods, reason = "it measures")]
    fn what_a_new_flow_costs() {
        const FLOWS: u16 = 50_000;
        let (translator, now) = translator(PEER, &[MOVED], delivery());
        let translator = Translator {
            limit: Limit::new(100_000),
            ..translator
        };
        let packets: Vec<Vec<u8>> = (1..=FLOWS)
            .map(|port| {
                let mut plan = request(Kind::Tcp);
                plan.src_port = port;
                plan.build()
            })
            .collect();
        let took = |what: &str, each: &mut dyn FnMut(&[u8])| {
            let start = Instant::now();
            packets.iter().for_each(|packet| each(packet));
            println!(
                "{what}: {} ns",
                start.elapsed().as_nanos() / u128::from(FLOWS)
            );
        };
        took("a new flow", &mut |packet| {
            let mut bytes = packet.to_vec();
            let mut parsed = Parsed::parse(&bytes).unwrap();
            translator
                .inbound(now, PEER, &mut bytes, &mut parsed, false)
                .unwrap();
        });
        let routes = translator.routes.load();
        took("of that, counting", &mut |packet| {
            let parsed = Parsed::parse(packet).unwrap();
            let key = Outside {
                peer: PEER,
                protocol: TCP,
                client: parsed.src(packet),
                client_port: parsed.src_port(),
                moved: parsed.dst(packet),
                moved_port: parsed.dst_port(),
            };
            let moved = routes.peer(PEER).unwrap().moved(key.moved).unwrap();
            let at = moved.counted(TCP, Kind::Tcp, key.moved_port).begun();
            translator.table(key.client).count_as(&key, at);
        });
    }

    #[test]
    fn what_comes_directly_counts_for_whatever_is_delivered_there() {
        let to = |addr: &str, port| SocketAddr::new(addr.parse().unwrap(), port);
        let delivery = Delivery {
            maps: vec!["192.0.2.5:80=198.51.100.2:8080".parse().unwrap()],
            ..delivery()
        };
        let moves = [
            "192.0.2.5:80,81/tcp",
            "192.0.2.8/31:80-99/tcp",
            "2001:db8:a::5",
        ];
        let bed = Bed::new(&moves, delivery);
        let other = PeerId(2);
        bed.translator
            .set_moves(other, &["192.0.2.6:80".parse().unwrap()]);
        bed.translator.set_delivery(other, self::delivery());
        let count = |protocol, end, new| bed.translator.came_directly(protocol, end, new);
        count(TCP, to(DELIVERY, 8080), 1);
        count(TCP, to(DELIVERY, 80), 10);
        count(TCP, to(DELIVERY, 81), 100);
        count(UDP, to(DELIVERY, 80), 1_000);
        count(UDP, to(DELIVERY6, 999), 3);
        for nothing in [to(DELIVERY, 22), to("198.51.100.3", 81), to(MOVED, 80)] {
            count(TCP, nothing, 7_777);
        }
        let directly = |peer| -> Vec<u64> {
            let all = bed.translator.tallies(peer);
            all.iter().map(|it| it.directly).collect()
        };
        assert_eq!(directly(PEER), [101, 110, 3]);
        assert_eq!(directly(other), [1_010]);
        // A move that is announced again has what it had, wherever it stands.
        let again: Vec<Move> = [2, 0].map(|at| moves[at].parse().unwrap()).into();
        bed.translator.set_moves(PEER, &again);
        assert_eq!(directly(PEER), [3, 101]);
        // Kept, what comes to the address itself is meant.
        let kept = Delivery {
            keep: true,
            ..Delivery::default()
        };
        bed.translator.set_delivery(other, kept);
        count(TCP, to("192.0.2.6", 80), 5);
        assert_eq!(directly(other), [1_015]);
    }
}
