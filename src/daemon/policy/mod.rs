//! What the daemon decides: who has moved what here, what is refused, where it is delivered, what
//! each peer is told, and what an administrator has to know.
//!
//! A machine without I/O. The control task hands it what it saw ([`Input`]) and does what it says
//! ([`Action`]). It reads no clock, asks no kernel and logs nothing, so every decision can be
//! tested without a network. Sessions, keys and retries are the
//! [`Tunnel`](crate::channel::tunnel::Tunnel)'s business; packets are the lanes'.
//!
//! ```text
//! tunnels: endpoint, state, announcement ─┐             ┌─► lanes: serve, deliver, hop
//! kernel: addresses, routes, links, held ─┼─► Policy ──►┼─► kernel: hold, MTU of the TUN
//! resolver: what a name stands for ───────┘             ├─► tunnels: announce, probe, call
//!                                                       └─► people: warn
//! ```
//!
//! | file | decides |
//! |---|---|
//! | `claims` | whose a moved address is, when several old servers name it |
//! | `delivery` | which addresses packets are delivered to, and which the old server speaks from |
//! | `sizes` | how large a packet may be |
//! | `names` | when a peer's name is looked up again |
//!
//! # Where more will fit in
//!
//! * **A mode for each move** (the old server's own service answers, new clients wait, a share of
//!   them moves): an administrator's command becomes one more [`Input`]; the mode belongs to the
//!   entry of [`Claims`], and what the kernel has to capture becomes one more [`Action`].
//! * **A changed configuration**: one more [`Input`] with the new [`PeerRules`], held against those
//!   that are here. A [`PeerId`] stays with its peer, so a peer that goes leaves its place empty.
//! * **Several new servers for one moved address**: today the old server's claims are its settings,
//!   which give each move to one peer. `claims` is the one file that knows.
//! * **What the new server accepts of a peer**: [`Claims::announce`] refuses what another peer has;
//!   what the settings do not accept is refused in the same place, with a [`Warning`] of its own.

// The clock is the control task's: here it is an argument, whatever the folder around allows.
#![warn(clippy::disallowed_methods)]

mod claims;
mod delivery;
mod names;
mod sizes;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use self::claims::{Claims, Settled};
use self::names::Lookup;
pub(super) use self::sizes::{RouteSize, tunnel_mtu};
use super::index;
use crate::channel::tunnel::{Announcement, Deliver, State};
use crate::flow::role::Hop;
use crate::flow::routes::Delivery;
use crate::model::moved::Move;
use crate::model::peer::{Endpoint, PeerId, Role};
use crate::model::port_map::PortMap;
use crate::settings::values::{DeliverTo, PeerAddr};

/// The settings of one peer.
#[derive(Debug)]
pub(super) struct PeerRules {
    /// Where it is; with `None` this side waits until the peer calls.
    pub(super) endpoint: Option<PeerAddr>,
    /// The moves to it (old server).
    pub(super) moves: Vec<Move>,
    /// Where to deliver what moved from it (new server).
    pub(super) deliver_to: DeliverTo,
    /// Ports that are delivered elsewhere (new server).
    pub(super) deliver: Vec<PortMap>,
}

/// The facts about this host when the daemon starts.
#[derive(Debug)]
pub(super) struct HostFacts {
    /// MTU of the interface that clients' packets use.
    pub(super) uplink_mtu: u32,
    /// MTU of the TUN.
    pub(super) tun_mtu: u32,
    /// Moved addresses that an earlier run held here, and that are still here.
    pub(super) left: Vec<IpAddr>,
}

/// This server's addresses, as the kernel lists them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Addresses {
    /// On any interface.
    pub(super) all: Vec<IpAddr>,
    /// On the one that clients' packets use, in the kernel's order.
    pub(super) uplink: Vec<IpAddr>,
}

/// Something that the control task has seen.
#[derive(Clone, Debug)]
pub(super) enum Input {
    /// The peer is at this endpoint from now on.
    Endpoint(PeerId, Endpoint),
    /// The peer came or went.
    State(PeerId, State),
    /// The peer said this of itself.
    Announced(PeerId, Announcement),
    /// The result of looking up its name.
    LookedUp(PeerId, Result<SocketAddr, String>),
    /// How large a packet the route to it takes.
    Route(PeerId, RouteSize),
    /// This server has these addresses now.
    Addresses(Addresses),
    /// The uplink has this MTU now.
    UplinkMtu(u32),
    /// The TUN has this MTU now.
    TunMtu(u32),
    /// The result of [`Action::Hold`].
    Held(Result<(), String>),
}

/// Something that the control task has to do.
#[derive(Clone, PartialEq, Debug)]
pub(super) enum Action {
    /// Serve this for the peer, and nothing else (new server).
    Serve(PeerId, Arc<[Move]>),
    /// Deliver packets that come through the peer there (new server).
    Deliver(PeerId, Delivery),
    /// Hold these moved addresses on this host, and no others (new server).
    Hold(Vec<IpAddr>),
    /// Let no client claim these addresses as its own (new server).
    OwnAddresses(Vec<IpAddr>),
    /// Send ICMP replies like this, as a router on the path (old server).
    Hop(Hop),
    /// Give the TUN this MTU (new server).
    SetTunMtu(u32),
    /// Tell the peer this of ourselves.
    Announce(PeerId, Announcement),
    /// Search the path to the peer up to this size: bytes of a UDP payload.
    ProbeUpTo(PeerId, u16),
    /// An ICMP error said that the path to the peer takes this size, or nobody says so any more.
    HintMtu(PeerId, Option<u16>),
    /// Look the peer's name up; `turn` counts how often that was wanted.
    LookUp {
        /// Whose name.
        peer: PeerId,
        /// The name.
        name: PeerAddr,
        /// Which of several addresses is wanted.
        turn: usize,
    },
    /// Call the peer there.
    Call(PeerId, SocketAddr),
    /// Tell an administrator.
    Warn(PeerId, Warning),
}

/// Something that an administrator has to know about a peer.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(super) enum Warning {
    /// Another old server was first.
    #[error("{0} has moved here from another old server already; it is not served for this one")]
    Taken(Move),
    /// There is no address of the move's family to deliver to.
    #[error(
        "{0} cannot be delivered: the new server has no {family} address; \
         give it one with --deliver-to",
        family = delivery::family(.0)
    )]
    NowhereToDeliver(Move),
    /// `--deliver-to keep` could not be done.
    #[error("a moved address cannot be held: {0}")]
    NotHeld(String),
    /// A `--deliver` for a port that has not moved.
    #[error("--deliver {0}: that port has not moved here")]
    PortNotMoved(PortMap),
    /// The new server cannot do its part.
    #[error("the new server says: {0}")]
    FromNewServer(String),
    /// The look-up of the peer's name failed.
    #[error("{0}; trying again")]
    NameNotFound(String),
}

/// The decisions for all peers.
#[derive(Debug)]
pub(super) struct Policy {
    role: Role,
    claims: Claims,
    peers: Vec<Peer>,
    addresses: Addresses,
    uplink_mtu: u32,
    tun_mtu: u32,
    hop: Hop,
    left: Vec<IpAddr>,
    not_held: Option<String>,
    actions: VecDeque<Action>,
}

#[derive(Debug)]
struct Peer {
    addr: Option<PeerAddr>,
    deliver_to: DeliverTo,
    ports: Vec<PortMap>,
    /// `None` if the settings give an address instead of a name.
    lookup: Option<Lookup>,
    endpoint: Option<Endpoint>,
    state: State,
    /// Where the new server delivers, once that is known.
    deliver: Option<Deliver>,
    /// Where it delivered last, family by family, though that address may be gone now.
    chosen: delivery::Chosen,
    /// Why it cannot deliver everything (new server).
    trouble: Option<Warning>,
    /// MTU of the old server's link to its clients (new server).
    client_mtu: Option<u32>,
}

impl Policy {
    /// Makes the policy. It has heard of no peer yet.
    pub(super) fn new(role: Role, rules: Vec<PeerRules>, host: HostFacts, now: Instant) -> Self {
        let mut moves = Vec::new();
        let peers = rules
            .into_iter()
            .map(|rules| {
                moves.push(rules.moves);
                let is_name = |peer: &PeerAddr| peer.host.parse::<IpAddr>().is_err();
                let named = rules.endpoint.as_ref().is_some_and(is_name);
                Peer {
                    lookup: named.then(|| Lookup::new(now)),
                    addr: rules.endpoint,
                    deliver_to: rules.deliver_to,
                    ports: rules.deliver,
                    endpoint: None,
                    state: State::Connecting,
                    deliver: None,
                    chosen: (None, None),
                    trouble: None,
                    client_mtu: None,
                }
            })
            .collect();
        Self {
            role,
            claims: Claims::new(moves),
            peers,
            addresses: Addresses::default(),
            uplink_mtu: host.uplink_mtu,
            tun_mtu: host.tun_mtu,
            hop: Hop::default(),
            left: host.left,
            not_held: None,
            actions: VecDeque::new(),
        }
    }

    /// Every peer.
    pub(super) fn peers(&self) -> impl ExactSizeIterator<Item = PeerId> + use<> {
        (0..self.peers.len() as u16).map(PeerId)
    }

    /// Takes in something that was seen. [`Self::poll_action`] then says what to do.
    pub(super) fn handle(&mut self, now: Instant, input: Input) {
        match input {
            Input::Endpoint(peer, endpoint) => {
                self.peers[index(peer)].endpoint = Some(endpoint);
                self.deliver(peer);
            }
            Input::State(peer, state) => {
                let peer = &mut self.peers[index(peer)];
                peer.state = state;
                if let Some(lookup) = &mut peer.lookup {
                    lookup.hurry(now);
                }
            }
            Input::Announced(peer, announcement) => self.announced(peer, announcement),
            Input::LookedUp(peer, result) => self.looked_up(peer, result),
            Input::Route(peer, size) => {
                if let Some(endpoint) = self.peers[index(peer)].endpoint {
                    let datagram = sizes::max_datagram(endpoint.remote, size);
                    self.actions.push_back(Action::ProbeUpTo(peer, datagram));
                    let hint = sizes::hint(endpoint.remote, size);
                    self.actions.push_back(Action::HintMtu(peer, hint));
                }
            }
            Input::Addresses(addresses) => self.have_addresses(addresses),
            Input::UplinkMtu(mtu) => self.uplink_has_mtu(mtu),
            Input::TunMtu(mtu) => self.tun_mtu = mtu,
            Input::Held(result) => self.held(result.err()),
        }
    }

    /// Does what is due: looks up again the names of peers that do not answer.
    pub(super) fn handle_timeout(&mut self, now: Instant) {
        for id in self.peers() {
            let peer = &mut self.peers[index(id)];
            let up = peer.state == State::Up;
            let (Some(lookup), Some(name)) = (&mut peer.lookup, &peer.addr) else {
                continue;
            };
            if let Some(turn) = lookup.due(now, up) {
                self.actions.push_back(Action::LookUp {
                    peer: id,
                    name: name.clone(),
                    turn,
                });
            }
        }
    }

    /// The next action. Carry them out in this order.
    pub(super) fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// The peer's name, as configured or as heard.
    pub(super) fn name(&self, peer: PeerId) -> String {
        let peer = &self.peers[index(peer)];
        match (&peer.addr, peer.endpoint) {
            (Some(addr), _) => addr.to_string(),
            (None, Some(endpoint)) => endpoint.remote.to_string(),
            (None, None) => "(any address)".into(),
        }
    }

    /// Whether the peer is there.
    pub(super) fn state(&self, peer: PeerId) -> State {
        self.peers[index(peer)].state
    }

    /// The moves to the peer, or those from it that are served here.
    pub(super) fn moves(&self, peer: PeerId) -> &Arc<[Move]> {
        self.claims.served(peer)
    }

    /// Where the new server delivers what moved, once that is known.
    pub(super) fn delivery(&self, peer: PeerId) -> Option<Deliver> {
        self.peers[index(peer)].deliver
    }

    /// Ports that are delivered elsewhere (new server).
    pub(super) fn ports(&self, peer: PeerId) -> &[PortMap] {
        &self.peers[index(peer)].ports
    }

    /// Our announcement to the peer.
    pub(super) fn announcement(&self, id: PeerId) -> Announcement {
        let mtu = self.uplink_mtu.min(u32::from(u16::MAX)) as u16;
        match self.role {
            // The new server's application must not send larger packets than the clients' link
            // takes.
            Role::Old => Announcement::Old {
                moves: self.claims.served(id).to_vec(),
                mtu,
            },
            Role::New => {
                let peer = &self.peers[index(id)];
                let refused = || self.claims.refused(id).first().cloned().map(Warning::Taken);
                Announcement::New {
                    deliver: peer.deliver.unwrap_or(Deliver::To { v4: None, v6: None }),
                    mtu,
                    error: peer
                        .trouble
                        .clone()
                        .or_else(refused)
                        .map(|why| why.to_string()),
                }
            }
        }
    }

    // Peers.

    fn announced(&mut self, peer: PeerId, announcement: Announcement) {
        match (self.role, announcement) {
            (Role::New, Announcement::Old { moves, mtu }) => self.moved_here(peer, moves, mtu),
            (Role::Old, Announcement::New { deliver, error, .. }) => {
                self.peers[index(peer)].deliver = Some(deliver);
                if let Some(error) = error {
                    self.warn(peer, Warning::FromNewServer(error));
                }
            }
            // The handshake refuses two daemons of one role.
            (Role::Old, Announcement::Old { .. }) | (Role::New, Announcement::New { .. }) => {}
        }
    }

    /// The old server announced what it has moved here.
    fn moved_here(&mut self, peer: PeerId, moves: Vec<Move>, mtu: u16) {
        for settled in self.claims.announce(peer, moves) {
            self.settle(settled);
        }
        self.peers[index(peer)].client_mtu = Some(u32::from(mtu));
        let links = self.peers.iter().filter_map(|peer| peer.client_mtu);
        let mtu = sizes::tun_mtu(links, self.uplink_mtu);
        if mtu != self.tun_mtu {
            self.actions.push_back(Action::SetTunMtu(mtu));
        }
    }

    /// Carries out what `claims` made of an announcement.
    fn settle(&mut self, settled: Settled) {
        let Settled {
            peer,
            served_changed,
            refused,
        } = settled;
        for moved in refused {
            self.warn(peer, Warning::Taken(moved));
        }
        let served = Arc::clone(self.claims.served(peer));
        if served_changed {
            let action = Action::Serve(peer, Arc::clone(&served));
            self.actions.push_back(action);
        }
        self.deliver(peer);
        let ports = &self.peers[index(peer)].ports;
        for map in delivery::not_moved(ports, &served) {
            let warning = Warning::PortNotMoved(map.clone());
            self.actions.push_back(Action::Warn(peer, warning));
        }
    }

    fn looked_up(&mut self, peer: PeerId, result: Result<SocketAddr, String>) {
        let Some(lookup) = &mut self.peers[index(peer)].lookup else {
            return;
        };
        let news = lookup.done(result.as_ref().err());
        match result {
            Ok(addr) => self.actions.push_back(Action::Call(peer, addr)),
            Err(error) if news => self.warn(peer, Warning::NameNotFound(error)),
            Err(_) => {}
        }
    }

    // Delivery.

    /// Decides where packets from a peer are delivered, and tells the peer.
    fn deliver(&mut self, id: PeerId) {
        let peer = &self.peers[index(id)];
        let (Role::New, Some(endpoint)) = (self.role, peer.endpoint) else {
            return;
        };
        let (deliver, delivery) = delivery::choose(
            peer.deliver_to,
            &peer.ports,
            peer.chosen,
            endpoint.local,
            &self.addresses,
        );
        if let Some(wanted) = self.wanted_here() {
            self.actions.push_back(Action::Hold(wanted));
        }
        self.actions.push_back(Action::Deliver(id, delivery));
        let peer = &mut self.peers[index(id)];
        peer.deliver = Some(deliver);
        if let Deliver::To { v4, v6 } = deliver {
            let (before_v4, before_v6) = peer.chosen;
            peer.chosen = (v4.or(before_v4), v6.or(before_v6));
        }
        self.tell_delivery(id);
    }

    /// Tells a peer where its packets are delivered, and why some are not. An administrator is told
    /// why as well.
    fn tell_delivery(&mut self, id: PeerId) {
        let Some(deliver) = self.peers[index(id)].deliver else {
            return;
        };
        let moved = delivery::undeliverable(deliver, self.claims.served(id));
        let trouble = match deliver {
            Deliver::Keep => self.not_held.clone().map(Warning::NotHeld),
            Deliver::To { .. } => moved.cloned().map(Warning::NowhereToDeliver),
        };
        let news = trouble != self.peers[index(id)].trouble;
        if let Some(warning) = trouble.clone().filter(|_| news) {
            self.warn(id, warning);
        }
        self.peers[index(id)].trouble = trouble;
        self.announce(id);
    }

    /// The moved addresses that this host is to hold itself (`--deliver-to keep`); `None` if no
    /// peer wants that. An address that an earlier run left stays until every such peer has said
    /// what it moved: the application may be listening there.
    fn wanted_here(&self) -> Option<Vec<IpAddr>> {
        let keeping = || {
            self.peers()
                .filter(|&id| self.peers[index(id)].deliver_to == DeliverTo::Keep)
        };
        keeping().next()?;
        let mut wanted: Vec<IpAddr> = keeping()
            .flat_map(|id| self.claims.served(id).iter().map(|moved| moved.addr))
            .collect();
        if keeping().any(|id| !self.claims.has_announced(id)) {
            wanted.extend(&self.left);
        }
        wanted.sort_unstable();
        wanted.dedup();
        Some(wanted)
    }

    fn held(&mut self, failure: Option<String>) {
        if self.not_held == failure {
            return;
        }
        self.not_held = failure;
        for id in self.peers() {
            self.tell_delivery(id);
        }
    }

    // The host.

    fn have_addresses(&mut self, addresses: Addresses) {
        match self.role {
            Role::New if self.addresses.all != addresses.all => {
                let all = addresses.all.clone();
                self.actions.push_back(Action::OwnAddresses(all));
            }
            Role::New => {}
            Role::Old => {
                let (v4, v6) = delivery::hop(&addresses.uplink, self.claims.all());
                if (self.hop.v4, self.hop.v6) != (v4, v6) {
                    (self.hop.v4, self.hop.v6) = (v4, v6);
                    self.actions.push_back(Action::Hop(self.hop));
                }
            }
        }
        let others = self.addresses != addresses;
        self.addresses = addresses;
        if others {
            self.deliver_elsewhere();
        }
    }

    /// Chooses anew for peers whose delivery address is gone, or has come.
    fn deliver_elsewhere(&mut self) {
        for id in self.peers() {
            let peer = &self.peers[index(id)];
            let (Some(before), Some(endpoint)) = (peer.deliver, peer.endpoint) else {
                continue;
            };
            let (deliver, _) = delivery::choose(
                peer.deliver_to,
                &peer.ports,
                peer.chosen,
                endpoint.local,
                &self.addresses,
            );
            if self.role == Role::New && deliver != before {
                self.deliver(id);
            }
        }
    }

    fn uplink_has_mtu(&mut self, mtu: u32) {
        self.uplink_mtu = mtu;
        if self.role == Role::Old && self.hop.mtu != mtu as usize {
            self.hop.mtu = mtu as usize;
            self.actions.push_back(Action::Hop(self.hop));
            for id in self.peers() {
                self.announce(id);
            }
        }
    }

    fn announce(&mut self, id: PeerId) {
        let announcement = self.announcement(id);
        self.actions.push_back(Action::Announce(id, announcement));
    }

    fn warn(&mut self, id: PeerId, warning: Warning) {
        self.actions.push_back(Action::Warn(id, warning));
    }
}
