//! What is configured on the new server, made ready for lookup: who moved what, and where it is
//! delivered.
//!
//! Must not touch packets, sockets or the clock.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::flow::outgoing::OutgoingRules;
use crate::model::drops::DropReason;
use crate::model::moved::{Move, Transport, UDP};
use crate::model::peer::PeerId;
use crate::model::port_map::PortMap;
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
    /// Addresses that packets are delivered to, sorted.
    pub(super) deliveries: Vec<Addr>,
    /// By [`PeerId`].
    pub(super) peers: Vec<PeerRoutes>,
}

#[derive(Clone, Default)]
pub(super) struct PeerRoutes {
    pub(super) moves: Vec<Move>,
    pub(super) delivery: Delivery,
    pub(super) outgoing: OutgoingRules,
    /// The moved addresses, sorted; made from the two above.
    resolved: Vec<Moved>,
}

/// One moved address of one peer.
#[derive(Clone)]
pub(super) struct Moved {
    pub(super) addr: Addr,
    pub(super) is_whole: bool,
    pub(super) moves: Vec<Move>,
    /// Where it is delivered, unless a port map says otherwise.
    pub(super) delivery: Option<Addr>,
    pub(super) ports: Vec<MappedPort>,
}

#[derive(Clone, Copy)]
pub(super) struct MappedPort {
    transport: Option<Transport>,
    port: u16,
    to: Addr,
    to_port: u16,
}

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
    ) -> Option<Result<&Moved, DropReason>> {
        let translating = self.peers.iter().filter(|peer| !peer.delivery.keep);
        let mut of_addr = translating.filter_map(|peer| peer.moved(addr)).peekable();
        of_addr.peek()?;
        let takes = |moved: &&Moved| moved.takes(protocol, kind, port);
        Some(of_addr.find(takes).ok_or(DropReason::NotMoved))
    }

    /// Whether packets are delivered there.
    pub(super) fn is_delivery(&self, addr: Addr) -> bool {
        self.deliveries.binary_search(&addr).is_ok()
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
        let moves = self.peer(peer)?.moves.iter();
        let mut prefixes = moves
            .map(|moved| moved.prefix)
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
        let mut best: Option<(Named, (PeerId, Addr, u16))> = None;
        let mut alone = false;
        for (peer, routes) in self.peers.iter().enumerate() {
            for moved in &routes.resolved {
                for (named, moved_port) in moved.asked(protocol, kind, delivery, port) {
                    match best {
                        Some((other, _)) if other < named => {}
                        Some((other, _)) if other == named => alone = false,
                        _ => {
                            best = Some((named, (PeerId(peer as u16), moved.addr, moved_port)));
                            alone = true;
                        }
                    }
                }
            }
        }
        best.filter(|_| alone).map(|(_, origin)| origin)
    }

    /// Derives what is looked up from what is configured.
    pub(super) fn resolve(&mut self) {
        self.deliveries.clear();
        self.own.clone_from(&self.host);
        for peer in &mut self.peers {
            let mut addrs: Vec<Addr> = peer
                .moves
                .iter()
                .map(|moved| moved.prefix.first().into())
                .collect();
            addrs.sort_unstable();
            addrs.dedup();
            peer.resolved = addrs
                .into_iter()
                .map(|addr| Moved::resolve(addr, &peer.moves, &peer.delivery))
                .collect();
            let Delivery { v4, v6, ports, .. } = &peer.delivery;
            self.own.extend(v4.map(Addr::from));
            self.own.extend(v6.map(Addr::from));
            self.own.extend(ports.iter().map(|map| Addr::from(map.to)));
            for moved in &peer.resolved {
                let mapped = moved.ports.iter().map(|map| map.to);
                self.deliveries.extend(mapped.chain(moved.delivery));
            }
        }
        for addrs in [&mut self.own, &mut self.deliveries] {
            addrs.sort_unstable();
            addrs.dedup();
        }
    }
}

impl PeerRoutes {
    #[inline]
    pub(super) fn moved(&self, addr: Addr) -> Option<&Moved> {
        self.resolved
            .binary_search_by_key(&addr, |moved| moved.addr)
            .ok()
            .map(|at| &self.resolved[at])
    }
}

impl Moved {
    fn resolve(addr: Addr, moves: &[Move], delivery: &Delivery) -> Self {
        let ip = IpAddr::from(addr);
        let of_addr = moves.iter().filter(|moved| moved.prefix.first() == ip);
        let moves: Vec<Move> = of_addr.cloned().collect();
        // Both sides of a map are of one family, or nobody could have written it.
        let of_family = |map: &&PortMap| map.moved == ip && map.to.is_ipv4() == ip.is_ipv4();
        let mapped = |map: &PortMap| MappedPort {
            transport: map.transport,
            port: map.port,
            to: map.to.into(),
            to_port: map.to_port,
        };
        Self {
            addr,
            is_whole: moves.iter().any(Move::is_whole),
            moves,
            delivery: match addr.family() {
                _ if delivery.keep => Some(addr),
                Family::V4 => delivery.v4.map(Addr::from),
                Family::V6 => delivery.v6.map(Addr::from),
            },
            ports: (delivery.ports.iter().filter(of_family))
                .map(mapped)
                .collect(),
        }
    }

    /// The ports that a client may have asked for, if the application replies from `port` of
    /// `delivery`.
    fn asked(
        &self,
        protocol: u8,
        kind: Kind,
        delivery: Addr,
        port: u16,
    ) -> impl Iterator<Item = (Named, u16)> {
        let leads_there = move |map: &&MappedPort| map.to == delivery && map.to_port == port;
        let mapped = self.ports.iter().filter(leads_there).map(|map| map.port);
        mapped
            .chain(std::iter::once(port))
            .enumerate()
            .filter(move |&(index, asked)| {
                let first = index == 0 || asked != port;
                let forwards = self.delivery(kind, asked) == Ok((delivery, port));
                first && forwards && self.takes(protocol, kind, asked)
            })
            .map(move |(_, asked)| {
                let named = match () {
                    () if asked != port || self.delivery != Some(delivery) => Named::ByMap,
                    () if self.names(protocol, kind, asked) => Named::ByPort,
                    () => Named::Whole,
                };
                (named, asked)
            })
    }

    /// The port that a client goes on with which is answered by UDP from `port` of this host's
    /// `addr`, if that has moved.
    pub(super) fn asked_port(&self, addr: Addr, port: u16) -> Option<u16> {
        let leads_there = |map: &&MappedPort| {
            let udp = map.transport != Some(Transport::Tcp);
            udp && map.to == addr && map.to_port == port
        };
        let mapped = self.ports.iter().find(leads_there).map(|map| map.port);
        let asked = mapped.unwrap_or(port);
        self.takes(UDP, Kind::Udp, asked).then_some(asked)
    }

    /// Whether a move names the port by number.
    fn names(&self, protocol: u8, kind: Kind, port: u16) -> bool {
        let port = kind.has_ports().then_some(port);
        self.moves
            .iter()
            .any(|moved| !moved.is_whole() && moved.takes(protocol, port))
    }

    #[inline]
    pub(super) fn takes(&self, protocol: u8, kind: Kind, port: u16) -> bool {
        self.is_whole
            || self
                .moves
                .iter()
                .any(|moved| moved.takes(protocol, kind.has_ports().then_some(port)))
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
