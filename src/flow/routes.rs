//! What is configured on the new server, made ready for lookup: who moved what, and where it is
//! delivered.
//!
//! Must not touch packets, sockets or the clock.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::flow::table::AddrId;
use crate::model::drops::DropReason;
use crate::model::moved::{Move, Transport};
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

/// Everything that is configured, made ready for lookup. It is replaced as a whole.
#[derive(Clone, Default)]
pub(super) struct Routes {
    /// Addresses by [`AddrId`]. It only ever grows.
    pub(super) addrs: Vec<Addr>,
    /// The same addresses, sorted for search.
    ids: Vec<(Addr, AddrId)>,
    pub(super) own: Vec<Addr>,
    /// By [`PeerId`].
    pub(super) peers: Vec<PeerRoutes>,
}

#[derive(Clone, Default)]
pub(super) struct PeerRoutes {
    pub(super) moves: Vec<Move>,
    pub(super) delivery: Delivery,
    /// The moved addresses, sorted; made from the two above.
    resolved: Vec<Moved>,
}

/// One moved address of one peer.
#[derive(Clone)]
pub(super) struct Moved {
    addr: Addr,
    pub(super) id: AddrId,
    pub(super) is_whole: bool,
    pub(super) moves: Vec<Move>,
    /// Where it is delivered, unless a port map says otherwise.
    pub(super) delivery: Option<AddrId>,
    pub(super) ports: Vec<MappedPort>,
}

#[derive(Clone, Copy)]
pub(super) struct MappedPort {
    transport: Option<Transport>,
    port: u16,
    to: AddrId,
    to_port: u16,
}

impl Routes {
    #[inline]
    pub(super) fn addr(&self, id: AddrId) -> Addr {
        self.addrs[usize::from(id.0)]
    }

    #[inline]
    pub(super) fn id(&self, addr: Addr) -> Option<AddrId> {
        self.ids
            .binary_search_by_key(&addr, |&(addr, _)| addr)
            .ok()
            .map(|at| self.ids[at].1)
    }

    pub(super) fn is_own(&self, addr: Addr) -> bool {
        self.own.binary_search(&addr).is_ok() || self.id(addr).is_some()
    }

    pub(super) fn peer_mut(&mut self, peer: PeerId) -> &mut PeerRoutes {
        let index = usize::from(peer.0);
        if self.peers.len() <= index {
            self.peers.resize(index + 1, PeerRoutes::default());
        }
        &mut self.peers[index]
    }

    /// What a packet that leaves from `delivery` may reply to: peer, moved address, port.
    pub(super) fn origins(
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

    /// Derives what is looked up from what is configured.
    pub(super) fn resolve(&mut self) -> Result<(), RouteError> {
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
    pub(super) fn moved(&self, addr: Addr) -> Option<&Moved> {
        self.resolved
            .binary_search_by_key(&addr, |moved| moved.addr)
            .ok()
            .map(|at| &self.resolved[at])
    }
}

impl Moved {
    #[inline]
    pub(super) fn takes(&self, protocol: u8, kind: Kind, port: u16) -> bool {
        self.is_whole
            || self
                .moves
                .iter()
                .any(|moved| moved.takes(protocol, kind.has_ports().then_some(port)))
    }

    /// Where a packet of this kind to `port` goes.
    pub(super) fn delivery(&self, kind: Kind, port: u16) -> Result<(AddrId, u16), DropReason> {
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
