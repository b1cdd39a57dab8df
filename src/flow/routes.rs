//! What is configured on the new server, made ready for lookup: who moved what, and where it is
//! delivered.
//!
//! Must not touch packets, sockets or the clock.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use crate::flow::outgoing::OutgoingRules;
use crate::flow::tally::Counted;
use crate::model::drops::DropReason;
use crate::model::moved::{Move, Transport, UDP};
use crate::model::peer::PeerId;
use crate::model::port_map::PortMap;
use crate::model::scopes::Scopes;
use crate::packet::{Addr, Family, Kind};

/// Where to deliver the packets that come through one peer.
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

/// Everything that is configured, made ready for lookup. It is replaced as a whole.
#[derive(Clone, Default)]
pub(super) struct Routes {
    /// This host's addresses, sorted.
    pub(super) host: Vec<Addr>,
    /// Those, and the addresses that this server's settings have packets delivered to, sorted.
    own: Vec<Addr>,
    /// Addresses that packets are delivered to, sorted; of moved ones that are kept, the first few.
    pub(super) deliveries: Vec<Addr>,
    /// By [`PeerId`].
    pub(super) peers: Vec<PeerRoutes>,
}

#[derive(Clone, Default)]
pub(super) struct PeerRoutes {
    moved: Arc<ByAddress>,
    pub(super) delivery: Delivery,
    pub(super) outgoing: OutgoingRules,
    /// Ports that are delivered elsewhere, by moved address; made from the two above.
    maps: Vec<MappedPort>,
    /// Where conversations count, for each move.
    counted: Arc<[Counted]>,
}

/// What one peer has moved.
#[derive(Default)]
struct ByAddress {
    scopes: Scopes,
    /// Scopes of which ports have moved.
    in_part: Vec<usize>,
    /// The others, which have moved whole, by family.
    whole: [Vec<usize>; 2],
}

/// One moved address of one peer.
#[derive(Clone, Copy)]
pub(super) struct Moved<'r> {
    pub(super) addr: Addr,
    scope: usize,
    routes: &'r PeerRoutes,
}

#[derive(Clone, Copy)]
struct MappedPort {
    moved: Addr,
    transport: Option<Transport>,
    port: u16,
    to: Addr,
    to_port: u16,
}

/// What a reply may belong to: how closely that is named, and what it is if it is alone.
type Candidate = (Named, Option<(PeerId, Addr, u16)>);

/// Prefixes that are kept whose ends are listed among the delivery addresses. An answer from
/// another address of this host is held against each of those.
const LISTED: usize = 64;

/// How closely the settings name what a reply may belong to.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Named {
    /// A `--deliver` of this server leads to the very port.
    ByMap,
    /// The port has moved by number.
    ByPort,
    /// The whole address has moved.
    Whole,
}

impl Routes {
    /// Whether no client of `peer` may have this address: it is this host's, or one that `peer`
    /// itself says has moved.
    ///
    /// What *another* peer says has moved may well be a client's: else that peer could shut out
    /// whomever it names.
    pub(super) fn is_own(&self, peer: PeerId, addr: Addr) -> bool {
        let moved = |routes: &PeerRoutes| routes.moved(addr).is_some();
        self.own.binary_search(&addr).is_ok() || self.peer(peer).is_some_and(moved)
    }

    /// Whether it is an address of this host.
    pub(super) fn is_host(&self, addr: Addr) -> bool {
        self.host.binary_search(&addr).is_ok()
    }

    /// What serves a packet that comes to a moved address from inside: from this host or one behind
    /// it. `None` if the address has not moved, or if it is this host's own now (`keep`).
    ///
    /// # Errors
    /// [`DropReason::NotMoved`] if others of its ports have moved.
    pub(super) fn inside(
        &self,
        addr: Addr,
        protocol: u8,
        kind: Kind,
        port: u16,
    ) -> Option<Result<Moved<'_>, DropReason>> {
        let translating = self.peers.iter().filter(|peer| !peer.delivery.keep);
        let mut of_addr = translating.filter_map(|peer| peer.moved(addr)).peekable();
        of_addr.peek()?;
        let takes = |moved: &Moved<'_>| moved.takes(protocol, kind, port);
        Some(of_addr.find(takes).ok_or(DropReason::NotMoved))
    }

    /// Whether packets are delivered there.
    pub(super) fn is_delivery(&self, addr: Addr) -> bool {
        let kept = |routes: &PeerRoutes| routes.delivery.keep && routes.moved(addr).is_some();
        self.deliveries.binary_search(&addr).is_ok() || self.peers.iter().any(kept)
    }

    /// What may leave from the moved addresses of `peer` that answers nobody.
    pub(super) fn outgoing(&self, peer: PeerId) -> &OutgoingRules {
        static NOTHING: OutgoingRules = OutgoingRules {
            on: false,
            allowed: None,
            by_port: Vec::new(),
        };
        self.peer(peer).map_or(&NOTHING, |routes| &routes.outgoing)
    }

    /// Every peer.
    pub(super) fn peer_ids(&self) -> impl Iterator<Item = PeerId> + use<> {
        (0..self.peers.len() as u16).map(PeerId)
    }

    /// The peers that have moved this address here, or a part of it.
    pub(super) fn peers_of(&self, addr: Addr) -> impl Iterator<Item = PeerId> {
        self.peer_ids()
            .filter(move |&peer| self.has_moved(peer, addr))
    }

    /// Whether `peer` has moved this address here, or a part of it.
    pub(super) fn has_moved(&self, peer: PeerId, addr: Addr) -> bool {
        self.peer(peer)
            .is_some_and(|routes| routes.moved(addr).is_some())
    }

    /// The one address of this family that `peer` has moved here; `None` if there are several.
    pub(super) fn only_moved(&self, peer: PeerId, v4: bool) -> Option<Addr> {
        let scopes = &self.peer(peer)?.moved.scopes;
        let mut prefixes = (0..scopes.len())
            .map(|scope| scopes.prefix(scope))
            .filter(|it| it.is_ipv4() == v4);
        let first = prefixes.next()?;
        let only = first.is_single() && prefixes.all(|prefix| prefix == first);
        only.then(|| first.first().into())
    }

    #[inline]
    pub(super) fn peer(&self, peer: PeerId) -> Option<&PeerRoutes> {
        self.peers.get(usize::from(peer.0))
    }

    pub(super) fn peer_mut(&mut self, peer: PeerId) -> &mut PeerRoutes {
        let index = usize::from(peer.0);
        if self.peers.len() <= index {
            self.peers.resize(index + 1, PeerRoutes::default());
        }
        &mut self.peers[index]
    }

    /// What a packet that leaves from `delivery` replies to, if only one peer, moved address and
    /// port is possible.
    ///
    /// Who names the port counts before who has the whole address, and this server's own settings
    /// count before both. So a peer that announces one more address, whole, makes nobody else's
    /// ports ambiguous.
    pub(super) fn origin(
        &self,
        protocol: u8,
        kind: Kind,
        delivery: Addr,
        port: u16,
    ) -> Option<(PeerId, Addr, u16)> {
        let peers = || (0..).map(PeerId).zip(&self.peers);
        let mut best = None;
        for (peer, routes) in peers() {
            let leads_there = |map: &&MappedPort| map.to == delivery && map.to_port == port;
            for map in routes.maps.iter().filter(leads_there) {
                let asked = (map.moved, map.port);
                let named = routes.asked(protocol, kind, asked, (delivery, port));
                best = better(
                    best,
                    named.map(|named| (named, Some((peer, asked.0, asked.1)))),
                );
            }
        }
        for (peer, routes) in peers() {
            let candidate = |addr| {
                let named = routes.asked(protocol, kind, (addr, port), (delivery, port))?;
                Some((named, Some((peer, addr, port))))
            };
            if routes.delivery.keep {
                best = better(best, candidate(delivery));
                continue;
            }
            if routes.delivery.of(delivery.family()) != Some(delivery) {
                continue;
            }
            let moved = &routes.moved;
            let whole = match delivery.family() {
                Family::V4 => &moved.whole[0],
                Family::V6 => &moved.whole[1],
            };
            for &scope in moved.in_part.iter().chain(whole) {
                // Nothing that follows can be named more closely than this.
                let several = best.filter(|(_, alone)| alone.is_none());
                match several.map(|(named, _)| named) {
                    Some(Named::ByMap | Named::ByPort) => break,
                    Some(Named::Whole) if !moved.scopes.has_parts(scope) => break,
                    Some(Named::Whole) | None => {}
                }
                let prefix = moved.scopes.prefix(scope);
                if Addr::from(prefix.first()).family() != delivery.family() {
                    continue;
                }
                // Two addresses are several.
                for addr in [prefix.first(), prefix.last()] {
                    best = better(best, candidate(addr.into()));
                }
            }
        }
        best?.1
    }

    /// Derives what is looked up from what is configured.
    pub(super) fn resolve(&mut self) {
        self.deliveries.clear();
        self.own.clone_from(&self.host);
        for peer in &mut self.peers {
            let Delivery { v4, v6, ports, .. } = &peer.delivery;
            let both = || v4.map(Addr::from).into_iter().chain(v6.map(Addr::from));
            self.own.extend(both());
            self.own.extend(ports.iter().map(|map| Addr::from(map.to)));
            // Both sides of a map are of one family, or nobody could have written it.
            let usable = ports.iter().filter(|map| {
                map.moved.is_ipv4() == map.to.is_ipv4() && peer.moved.scopes.contains(map.moved)
            });
            peer.maps = usable.map(MappedPort::new).collect();
            // The first that fits counts.
            peer.maps.sort_by_key(|map| map.moved);
            self.deliveries.extend(peer.maps.iter().map(|map| map.to));
            if peer.delivery.keep {
                let scopes = &peer.moved.scopes;
                let prefixes = (0..scopes.len().min(LISTED)).map(|scope| scopes.prefix(scope));
                let ends = prefixes.flat_map(|prefix| [prefix.first(), prefix.last()]);
                self.deliveries.extend(ends.map(Addr::from));
            } else {
                self.deliveries.extend(both());
            }
        }
        for addrs in [&mut self.own, &mut self.deliveries] {
            addrs.sort_unstable();
            addrs.dedup();
        }
    }
}

/// The one that is named more closely; if both are alike, and not the same, neither is alone.
fn better(best: Option<Candidate>, other: Option<Candidate>) -> Option<Candidate> {
    match (best, other) {
        (Some((named, origin)), Some((also, other))) if named == also => {
            Some((named, origin.filter(|_| origin == other)))
        }
        (Some(best), Some(other)) => Some(if best.0 < other.0 { best } else { other }),
        (best, other) => best.or(other),
    }
}

impl Delivery {
    /// The delivery address for a family, unless moved addresses are kept.
    fn of(&self, family: Family) -> Option<Addr> {
        match family {
            Family::V4 => self.v4.map(Addr::from),
            Family::V6 => self.v6.map(Addr::from),
        }
    }
}

impl MappedPort {
    fn new(map: &PortMap) -> Self {
        Self {
            moved: map.moved.into(),
            transport: map.transport,
            port: map.port,
            to: map.to.into(),
            to_port: map.to_port,
        }
    }
}

impl ByAddress {
    fn new(moves: &[Move]) -> Self {
        let scopes = Scopes::new(moves);
        let (mut in_part, mut whole) = (Vec::new(), [Vec::new(), Vec::new()]);
        for scope in 0..scopes.len() {
            if scopes.has_parts(scope) {
                in_part.push(scope);
            } else {
                whole[usize::from(!scopes.prefix(scope).is_ipv4())].push(scope);
            }
        }
        Self {
            scopes,
            in_part,
            whole,
        }
    }
}

impl PeerRoutes {
    /// Sets what has moved, and where the conversations of each move count.
    pub(super) fn set_moves(&mut self, moves: &[Move], counted: Arc<[Counted]>) {
        self.moved = Arc::new(ByAddress::new(moves));
        self.counted = counted;
    }

    /// Where conversations count, for each move.
    pub(super) fn counted(&self) -> &[Counted] {
        &self.counted
    }

    /// The moves of which a new conversation with `end` of this host would be one if it had come by
    /// the tunnel, each once.
    pub(super) fn delivered_to(&self, protocol: u8, kind: Kind, end: (Addr, u16)) -> Vec<Counted> {
        let (addr, port) = end;
        let family = addr.family();
        let mut found = Vec::new();
        let mut look = |moved: Moved<'_>, port| {
            let at = moved.counted(protocol, kind, port);
            if moved.delivery(kind, port) == Ok(end) && at != Counted::NOWHERE {
                found.push(at);
            }
        };
        for map in self.maps.iter().filter(|map| (map.to, map.to_port) == end) {
            if let Some(moved) = self.moved(map.moved) {
                look(moved, map.port);
            }
        }
        if self.delivery.keep {
            if let Some(moved) = self.moved(addr) {
                look(moved, port);
            }
        } else if self.delivery.of(family) == Some(addr) {
            let scopes = &self.moved.scopes;
            for scope in 0..scopes.len() {
                let first = Addr::from(scopes.prefix(scope).first());
                if first.family() == family {
                    let moved = Moved {
                        addr: first,
                        scope,
                        routes: self,
                    };
                    look(moved, port);
                }
            }
        }
        found.sort_unstable();
        found.dedup();
        found
    }

    #[inline]
    pub(super) fn moved(&self, addr: Addr) -> Option<Moved<'_>> {
        let scope = self.moved.scopes.find(addr.number())?;
        Some(Moved {
            addr,
            scope,
            routes: self,
        })
    }

    /// How closely the settings name this address and port, if a client that asks there is
    /// delivered to `from`, from where the application replies.
    fn asked(
        &self,
        protocol: u8,
        kind: Kind,
        (addr, port): (Addr, u16),
        from: (Addr, u16),
    ) -> Option<Named> {
        let moved = self.moved(addr)?;
        let forwards = moved.delivery(kind, port) == Ok(from);
        if !forwards || !moved.takes(protocol, kind, port) {
            return None;
        }
        let named = kind.has_ports().then_some(port);
        Some(match () {
            () if port != from.1 || moved.all_to() != Some(from.0) => Named::ByMap,
            () if self.moved.scopes.names(moved.scope, protocol, named) => Named::ByPort,
            () => Named::Whole,
        })
    }
}

impl Moved<'_> {
    /// Whether every packet of the address is delivered to one place, and to which.
    pub(super) fn one_place(&self) -> Option<Option<Addr>> {
        let is_one = self.routes.moved.scopes.is_whole(self.scope) && self.maps().is_empty();
        is_one.then(|| self.all_to())
    }

    /// The port that a client goes on with which is answered by UDP from `port` of this host's
    /// `addr`, if that has moved.
    pub(super) fn asked_port(&self, addr: Addr, port: u16) -> Option<u16> {
        let leads_there = |map: &&MappedPort| {
            let udp = map.transport != Some(Transport::Tcp);
            udp && map.to == addr && map.to_port == port
        };
        let mapped = self.maps().iter().find(leads_there).map(|map| map.port);
        let asked = mapped.unwrap_or(port);
        self.takes(UDP, Kind::Udp, asked).then_some(asked)
    }

    /// Where it is delivered, unless a port map says otherwise.
    fn all_to(&self) -> Option<Addr> {
        if self.routes.delivery.keep {
            return Some(self.addr);
        }
        self.routes.delivery.of(self.addr.family())
    }

    /// Its ports that are delivered elsewhere.
    fn maps(&self) -> &[MappedPort] {
        let maps = &self.routes.maps;
        let first = maps.partition_point(|map| map.moved < self.addr);
        let behind = maps.partition_point(|map| map.moved <= self.addr);
        maps.get(first..behind).unwrap_or_default()
    }

    #[inline]
    pub(super) fn takes(&self, protocol: u8, kind: Kind, port: u16) -> bool {
        let port = kind.has_ports().then_some(port);
        self.routes.moved.scopes.takes(self.scope, protocol, port)
    }

    /// Where a conversation with `port` counts.
    pub(super) fn counted(&self, protocol: u8, kind: Kind, port: u16) -> Counted {
        let port = kind.has_ports().then_some(port);
        let taker = self.routes.moved.scopes.taker(self.scope, protocol, port);
        let at = taker.and_then(|taker| self.routes.counted.get(taker));
        at.copied().unwrap_or(Counted::NOWHERE)
    }

    /// Where a packet of this kind to `port` goes.
    pub(super) fn delivery(&self, kind: Kind, port: u16) -> Result<(Addr, u16), DropReason> {
        let transport = match kind {
            Kind::Tcp => Some(Transport::Tcp),
            Kind::Udp => Some(Transport::Udp),
            Kind::IcmpQuery
            | Kind::IcmpReply
            | Kind::IcmpError
            | Kind::Other
            | Kind::LaterFragment => None,
        };
        let mapped = self.maps().iter().find(|map| {
            transport.is_some()
                && map.port == port
                && (map.transport.is_none() || map.transport == transport)
        });
        match (mapped, self.all_to()) {
            (Some(map), _) => Ok((map.to, map.to_port)),
            (None, Some(delivery)) => Ok((delivery, port)),
            (None, None) => Err(DropReason::NoDelivery),
        }
    }
}
