//! What the daemon decides: who has moved what here, what is refused, where it is delivered, what
//! each peer is told, and what an administrator has to know.
//!
//! A machine without I/O. The control task hands it what it saw ([`Input`]) and does what it says
//! ([`Action`]). It reads no clock, asks no kernel and logs nothing, so every decision can be
//! tested without a network. Sessions, keys and retries are the
//! [`Tunnel`](crate::channel::tunnel::Tunnel)'s business; packets are the lanes'.
//!
//! ```text
//! tunnels: endpoint, state, announcement ─┐             ┌─► lanes: serve, deliver, hop, networks
//! kernel: addresses, routes, links, held ─┼─► Policy ──►┼─► kernel: hold, MTU of the TUN
//! lanes: sources that were refused ───────┤             ├─► tunnels: announce, probe, call
//! resolver: what a name stands for ───────┘             │
//!                                                       └─► people: warn
//! ```
//!
//! | file | decides |
//! |---|---|
//! | `claims` | whose a moved address is, when several old servers name it |
//! | `refusal` | what an old server may move here, and what nobody may |
//! | `delivery` | which addresses packets are delivered to, and which the old server speaks from |
//! | `outgoing` | what has to be known of addresses for connections that begin here |
//! | `sizes` | how large a packet may be |
//! | `names` | when a peer's name is looked up again |
//! | `progress` | how far each move has come, on either server |
//! | `silence` | which of what moved is not answered |
//! | `pace` | how often people are told the same kind of thing |
//! | `modes` | who answers new connections of each move; a machine of its own |
//! | `reload` | what of a changed configuration is another one, and what follows |
//!
//! # Where more will fit in
//!
//! * **Several new servers for one moved address**: today the old server's claims are its settings,
//!   which give each move to one peer. `claims` is the one file that knows.

// The clock is the control task's: here it is an argument, whatever the folder around allows.
#![warn(clippy::disallowed_methods)]

mod claims;
mod delivery;
pub(super) mod modes;
mod names;
mod older;
mod outgoing;
mod pace;
pub(super) mod progress;
pub(super) mod refusal;
pub(super) mod reload;
pub(super) mod silence;
mod sizes;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::claims::{Claims, Settled};
pub(super) use self::delivery::Chosen;
use self::names::Lookup;
use self::older::Older;
use self::outgoing::MovedHere;
use self::pace::Pace;
use self::refusal::{Refusal, Rules};
pub(super) use self::sizes::{RouteSize, tunnel_mtu};
use super::index;
use crate::channel::tunnel::{Announcement, Deliver, State, needs_list};
use crate::flow::gate::Refused;
use crate::flow::networks::{OwnNetwork, RefusedSource};
use crate::flow::outgoing::{OutgoingRules, RefusedOutgoing};
use crate::flow::role::Hop;
use crate::flow::routes::Delivery;
use crate::flow::translate::UnmovedPort;
use crate::kernel::Place;
use crate::model::accept::Accept;
use crate::model::delivery_map::DeliveryMap;
use crate::model::drops::DropReason;
use crate::model::moved::Move;
use crate::model::outgoing::{AllowOutgoing, Outgoing};
use crate::model::peer::{Endpoint, PeerId, Role};
use crate::model::prefix::Prefix;
use crate::model::scopes::Scopes;
use crate::settings::values::{DeliverTo, PeerAddr};

/// Addresses of a peer that those inside reach here though nobody has accepted them: a network of
/// IPv4 as people have it. More is accepted by somebody who reads the warning.
const INSIDE_UNASKED: u32 = 256;

/// What had moved to an earlier daemon counts as moved for so long after the start, if a peer does
/// not say meanwhile what it moves: it may be gone for good, and the address be another's by then.
/// As long, what is known of earlier connections is trusted. What is held longer counts longer.
const LEFT_COUNTS: Duration = Duration::from_secs(600);

/// The settings of one peer.
#[derive(Debug)]
pub(super) struct PeerRules {
    /// Where it is; with `None` this side waits until the peer calls.
    pub(super) endpoint: Option<PeerAddr>,
    /// The address that `endpoint` stands for, if that is known yet.
    pub(super) known_at: Option<IpAddr>,
    /// The moves to it (old server).
    pub(super) moves: Vec<Move>,
    /// Where to deliver what moved from it (new server).
    pub(super) deliver_to: DeliverTo,
    /// What is delivered elsewhere (new server).
    pub(super) deliver: Vec<DeliveryMap>,
    /// What it may move here; nothing accepts everything (new server).
    pub(super) accept: Vec<Accept>,
    /// Networks of this server's own that its clients may come from all the same (new server).
    pub(super) clients_from: Vec<Prefix>,
    /// What may leave from its moved addresses that answers nobody (new server).
    pub(super) outgoing: Vec<Outgoing>,
    /// What it may begin (old server).
    pub(super) allow_outgoing: Vec<AllowOutgoing>,
}

/// The facts about this host when the daemon starts.
#[derive(Debug)]
pub(super) struct HostFacts {
    /// MTU of the interface that clients' packets use.
    pub(super) uplink_mtu: u32,
    /// MTU of the TUN.
    pub(super) tun_mtu: u32,
    /// Moved addresses that an earlier run held here, and that are still here.
    pub(super) left: Vec<Prefix>,
}

/// This server's addresses, and what it sees around it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Addresses {
    /// On any interface.
    pub(super) all: Vec<IpAddr>,
    /// On the one that clients' packets use, those that stay first.
    pub(super) uplink: Vec<IpAddr>,
    /// On the links that the default routes leave by, in the same order (new server).
    pub(super) by_default: Vec<IpAddr>,
    /// The names of the interfaces that clients' packets use (new server).
    pub(super) uplinks: Vec<String>,
    /// The broadcast addresses of their networks.
    pub(super) broadcasts: Vec<IpAddr>,
    /// Moved addresses that this daemon has put on this host (new server).
    pub(super) held: Vec<Prefix>,
    /// Next hops of its routes (new server).
    pub(super) gateways: Vec<IpAddr>,
    /// Name servers that it asks (new server).
    pub(super) resolvers: Vec<IpAddr>,
    /// The networks that it is in (new server).
    pub(super) networks: Vec<OwnNetwork>,
}

/// Something that the control task has seen.
#[derive(Clone, Debug)]
pub(super) enum Input {
    /// The peer is at this endpoint from now on.
    Endpoint(PeerId, Endpoint),
    /// The address that this server speaks to the peer from, whoever begins (new server).
    SpeaksFrom(PeerId, Option<IpAddr>),
    /// The peer came or went.
    State(PeerId, State),
    /// The peer said this of itself.
    Announced(PeerId, Announcement),
    /// The result of looking up its name.
    LookedUp {
        /// Whose.
        peer: PeerId,
        /// What was looked up: by now the peer may have another one.
        name: PeerAddr,
        /// What came of it.
        found: Result<SocketAddr, String>,
    },
    /// How large a packet the route to it takes.
    Route(PeerId, RouteSize),
    /// There is a way out of this server again.
    WayOut,
    /// This server has these addresses now.
    Addresses(Addresses),
    /// The uplink has this MTU now.
    UplinkMtu(u32),
    /// The TUN has this MTU now.
    TunMtu(u32),
    /// A client of the peer claimed to be in a network of this server's own.
    RefusedSource(PeerId, RefusedSource),
    /// An application answered clients of the peer from a port that has not moved (new server).
    UnmovedPort(PeerId, UnmovedPort),
    /// Packets like this one were to leave from an address that the peer has moved here, and may
    /// not (new server).
    RefusedOutgoing(PeerId, RefusedOutgoing),
    /// The result of [`Action::Hold`].
    Held(Result<(), String>),
    /// The peer sent packets like this one, which were not let out (old server).
    Refused(PeerId, Refused),
    /// The peer says what it sees of the clients, be it nothing.
    Says(PeerId),
}

/// Something that the control task has to do.
#[derive(Clone, PartialEq, Debug)]
pub(super) enum Action {
    /// Serve this for the peer, and nothing else (new server).
    Serve(PeerId, Arc<[Move]>),
    /// Deliver packets that come through the peer there (new server).
    Deliver(PeerId, Delivery),
    /// Let this leave from the peer's moved addresses (new server).
    Outgoing(PeerId, OutgoingRules),
    /// Tell the programs this of addresses. While not `complete`, what had moved to an earlier
    /// daemon counts as moved (new server).
    Places {
        /// What is said.
        places: BTreeMap<Prefix, Place>,
        /// Every peer has said what it moved.
        complete: bool,
    },
    /// Hold these moved addresses on this host, and no others (new server).
    Hold(Vec<Prefix>),
    /// Let no client claim these addresses as its own, and let nothing out to them.
    OwnAddresses(Vec<IpAddr>),
    /// Let no client come from these networks, unless its peer may have such clients (new server).
    OwnNetworks(Vec<OwnNetwork>),
    /// Send ICMP replies like this, as a router on the path (old server).
    Hop(Hop),
    /// Give the TUN this MTU (new server).
    SetTunMtu(u32),
    /// The peer's link to its clients has this MTU (new server).
    ClientMtu(PeerId, usize),
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
    /// What an administrator was told is true no more.
    Withdraw(PeerId, Warning),
}

/// Something that an administrator has to know about a peer.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(super) enum Warning {
    /// Moves that are not served.
    #[error("{}", refusal::line(.0))]
    NotServed(Vec<Refusal>),
    /// Everything that the peer names is served.
    #[error("{}", accepts_all(.moves, *.first_come))]
    AcceptsAll {
        /// What it has moved now.
        moves: Arc<[Move]>,
        /// Other peers are not limited either.
        first_come: bool,
    },
    /// A client came from a network of this server's own.
    #[error(
        "a client's source {source} is refused: it lies in {prefix} on {interface}, a network of \
         this server, and may be forged; to let clients from there come through that old server, \
         add --clients-from {prefix}",
        source = .0.source,
        prefix = .0.network.prefix,
        interface = .0.network.interface
    )]
    RefusedSource(RefusedSource),
    /// An application answered from a port that has not moved.
    #[error(
        "the application answers clients of {at} from UDP port {answered}, which has not moved, so \
         that these answers are dropped (unmoved_port); let the old server move the ports as well \
         that it answers from, as in --move {at},{ports}/udp",
        at = SocketAddr::new(.0.moved, .0.asked),
        answered = .0.answered,
        ports = answering_ports(.0.answered)
    )]
    UnmovedPort(UnmovedPort),
    /// There is no address of the move's family to deliver to.
    #[error(
        "{0} cannot be delivered: the new server has no {family} address; \
         give it one with --deliver-to",
        family = delivery::family(.0)
    )]
    NowhereToDeliver(Move),
    /// This server has an address itself that has moved here, and that its settings do not name.
    #[error(
        "{addr} has moved here, and this server has it itself: what programs begin that are bound \
         to it leaves directly, from that address; to let nothing leave so, add --accept {moved}"
    )]
    HeldHere {
        /// The address.
        addr: IpAddr,
        /// The move that it is part of.
        moved: Move,
    },
    /// `--deliver-to keep` could not be done.
    #[error("a moved address cannot be held: {0}")]
    NotHeld(String),
    /// A `--deliver` of which nothing has moved.
    #[error("--deliver {0}: nothing of that has moved here")]
    NothingMoved(DeliveryMap),
    /// The new server cannot do its part.
    #[error("the new server says: {0}")]
    FromNewServer(String),
    /// The new server sends to somebody who is no client.
    #[error("the new server sends {refused}, {why}", why = not_let_out(.refused.reason))]
    NotLetOut {
        /// One of the packets.
        refused: Refused,
    },
    /// Something was to leave from a moved address that may not.
    #[error("{}", outgoing::not_sent(.0))]
    NotSent(RefusedOutgoing),
    /// `--outgoing` without its other half.
    #[error(
        "the old server lets no connections out that begin here, so --outgoing does nothing: add \
         --allow-outgoing there"
    )]
    OutgoingNotAllowed,
    /// The new server reads nothing of what has moved.
    #[error(
        "the new server's daemon is older than this one, and reads neither prefixes nor more than \
         64 moves: it serves nothing of this; update it"
    )]
    Older,
    /// The look-up of the peer's name failed.
    #[error("{0}; trying again")]
    NameNotFound(String),
}

/// A range of ports that an application answers from, if this is one of them: those that Linux
/// gives out (`ip_local_port_range`), or this one alone.
fn answering_ports(port: u16) -> String {
    const GIVEN_OUT: std::ops::RangeInclusive<u16> = 32_768..=60_999;
    if GIVEN_OUT.contains(&port) {
        format!("{}-{}", GIVEN_OUT.start(), GIVEN_OUT.end())
    } else {
        port.to_string()
    }
}

/// Why a packet of the new server was not let out, and how that is counted.
fn not_let_out(reason: DropReason) -> &'static str {
    if reason == DropReason::BadDestination {
        "where no client can be; such packets are dropped (bad_destination)"
    } else if reason == DropReason::OutgoingNotAllowed {
        "which no --allow-outgoing names; such packets are dropped (outgoing_not_allowed)"
    } else if reason == DropReason::OutgoingLimited {
        "and begins more connections than a server does; some are dropped (outgoing_limited)"
    } else {
        "which no client's packet asked for; such packets are dropped (unasked); if its programs \
         are to begin connections, add --allow-outgoing here and --outgoing there"
    }
}

/// What an administrator is told where nothing limits a peer, with the flags that would.
fn accepts_all(moves: &[Move], first_come: bool) -> String {
    let flags = refusal::accept_flags(moves.iter());
    let more = if moves.len() > refusal::SHOWN {
        " and so on (`ipmoved status` shows all that moved)"
    } else {
        ""
    };
    let turn = if first_come {
        "; until then the first old server to name an address has it"
    } else {
        ""
    };
    format!(
        "whatever this old server names is served, also after somebody has taken it over, and \
         what this server and its containers begin to say there goes to the application here; \
         to accept what it has moved now and no more, add{flags}{more}{turn}"
    )
}

/// The decisions for all peers.
#[derive(Debug)]
pub(super) struct Policy {
    role: Role,
    /// All that has moved, to whichever peer (old server).
    moved: Scopes,
    claims: Claims,
    peers: Vec<Peer>,
    addresses: Addresses,
    uplink_mtu: u32,
    tun_mtu: u32,
    hop: Hop,
    left: Vec<Prefix>,
    started: Instant,
    /// What the programs were told of addresses last, and whether that was complete.
    places: Option<(BTreeMap<Prefix, Place>, bool)>,
    /// What was last asked to be held.
    wanted: Option<Vec<Prefix>>,
    not_held: Option<String>,
    actions: VecDeque<Action>,
}

#[derive(Debug)]
struct Peer {
    /// Whether it is one: a place where none is any more waits for another.
    there: bool,
    addr: Option<PeerAddr>,
    deliver_to: DeliverTo,
    maps: Vec<DeliveryMap>,
    accept: Vec<Accept>,
    clients_from: Vec<Prefix>,
    outgoing: Vec<Outgoing>,
    allow_outgoing: Vec<AllowOutgoing>,
    /// Whether it lets out what begins here, once it has said so (new server).
    lets_out: Option<bool>,
    /// An administrator was told that it does not, though the settings want it.
    outgoing_refused: bool,
    /// Where the settings say it is, names looked up.
    known_at: Option<IpAddr>,
    /// `None` if the settings give an address instead of a name.
    lookup: Option<Lookup>,
    endpoint: Option<Endpoint>,
    /// Where its settings name this server, as it announced (new server).
    names_us: Option<IpAddr>,
    /// The address that this server speaks to it from (new server).
    speaks_from: Option<IpAddr>,
    state: State,
    /// Where the new server delivers, once that is known.
    deliver: Option<Deliver>,
    /// Where it delivered last, family by family, though that address may be gone now.
    chosen: Chosen,
    /// Why the new server cannot deliver everything, or says so.
    trouble: Option<Warning>,
    /// What this server has itself of what has moved here, though its settings do not name it.
    held_here: Option<Warning>,
    /// When an administrator was last told of what it sent and was not let out (old server).
    refused: Option<Instant>,
    /// How many moves were refused, each time that it named one.
    refused_moves: u64,
    /// Warnings of these kinds.
    not_served: Pace,
    accepts_all: Pace,
    refused_source: Pace,
    /// What an administrator was told last of answers from ports that have not moved.
    unmoved_port: Option<UnmovedPort>,
    not_sent: Pace,
    older: Older,
}

impl Peer {
    /// It was not heard yet.
    fn new(rules: PeerRules, now: Instant) -> Self {
        let is_name = |peer: &PeerAddr| peer.host.parse::<IpAddr>().is_err();
        let named = rules.endpoint.as_ref().is_some_and(is_name);
        Self {
            there: true,
            lookup: named.then(|| Lookup::new(now)),
            addr: rules.endpoint,
            deliver_to: rules.deliver_to,
            maps: rules.deliver,
            accept: rules.accept,
            clients_from: rules.clients_from,
            outgoing: rules.outgoing,
            allow_outgoing: rules.allow_outgoing,
            lets_out: None,
            outgoing_refused: false,
            known_at: rules.known_at,
            endpoint: None,
            names_us: None,
            speaks_from: None,
            state: State::Connecting,
            deliver: None,
            chosen: (None, None),
            trouble: None,
            held_here: None,
            refused: None,
            refused_moves: 0,
            not_served: Pace::default(),
            accepts_all: Pace::default(),
            refused_source: Pace::default(),
            unmoved_port: None,
            not_sent: Pace::default(),
            older: Older::default(),
        }
    }

    /// There is none any more.
    fn gone(now: Instant) -> Self {
        let nothing = PeerRules {
            endpoint: None,
            known_at: None,
            moves: Vec::new(),
            deliver_to: DeliverTo::default(),
            deliver: Vec::new(),
            accept: Vec::new(),
            clients_from: Vec::new(),
            outgoing: Vec::new(),
            allow_outgoing: Vec::new(),
        };
        Self {
            there: false,
            ..Self::new(nothing, now)
        }
    }
}

impl Policy {
    /// Makes the policy. It has heard of no peer yet.
    pub(super) fn new(role: Role, rules: Vec<PeerRules>, host: HostFacts, now: Instant) -> Self {
        let mut moves = Vec::new();
        let peers = rules
            .into_iter()
            .map(|rules| {
                moves.push(rules.moves.clone());
                Peer::new(rules, now)
            })
            .collect();
        Self {
            role,
            moved: Scopes::new(&moves.concat()),
            claims: Claims::new(moves),
            peers,
            addresses: Addresses::default(),
            uplink_mtu: host.uplink_mtu,
            tun_mtu: host.tun_mtu,
            hop: Hop::default(),
            left: host.left,
            started: now,
            places: None,
            wanted: None,
            not_held: None,
            actions: VecDeque::new(),
        }
    }

    /// Every peer.
    pub(super) fn peers(&self) -> impl ExactSizeIterator<Item = PeerId> + use<> {
        let there: Vec<PeerId> = (0..)
            .map(PeerId)
            .zip(&self.peers)
            .filter(|(_, peer)| peer.there)
            .map(|(id, _)| id)
            .collect();
        there.into_iter()
    }

    /// Whether there is such a peer.
    pub(super) fn is_there(&self, peer: PeerId) -> bool {
        self.peers.get(index(peer)).is_some_and(|peer| peer.there)
    }

    /// Takes in something that was seen. [`Self::poll_action`] then says what to do.
    pub(super) fn handle(&mut self, now: Instant, input: Input) {
        match input {
            Input::Endpoint(peer, endpoint) => {
                self.peers[index(peer)].endpoint = Some(endpoint);
                // Where one peer seems to be speaks against no other's moves.
                self.judge_again(now, Some(peer));
                self.deliver(peer);
                self.tell_places(now);
            }
            Input::SpeaksFrom(peer, addr) => self.peers[index(peer)].speaks_from = addr,
            Input::State(peer, state) => {
                let peer = &mut self.peers[index(peer)];
                peer.state = state;
                peer.older.is(now, state);
                if let Some(lookup) = &mut peer.lookup {
                    lookup.hurry(now);
                }
            }
            Input::Announced(peer, announcement) => self.announced(now, peer, announcement),
            Input::LookedUp { peer, name, found } => {
                let of_now = self.peers[index(peer)].addr.as_ref();
                // An answer about another name, from before a reload, tells nothing.
                if of_now == Some(&name) {
                    self.looked_up(now, peer, found);
                }
            }
            Input::Route(peer, size) => {
                if let Some(endpoint) = self.peers[index(peer)].endpoint {
                    let datagram = sizes::max_datagram(endpoint.remote, size);
                    self.actions.push_back(Action::ProbeUpTo(peer, datagram));
                    let hint = sizes::hint(endpoint.remote, size);
                    self.actions.push_back(Action::HintMtu(peer, hint));
                }
            }
            Input::WayOut => {
                let lookups = self
                    .peers
                    .iter_mut()
                    .filter_map(|peer| peer.lookup.as_mut());
                lookups.for_each(|lookup| lookup.hurry(now));
            }
            Input::Addresses(addresses) => self.have_addresses(now, addresses),
            Input::UplinkMtu(mtu) => self.uplink_has_mtu(mtu),
            Input::TunMtu(mtu) => self.tun_mtu = mtu,
            Input::RefusedSource(peer, refused) => {
                let pace = &mut self.peers[index(peer)].refused_source;
                let due = pace.offer(now, Warning::RefusedSource(refused));
                self.warn_of(peer, due);
            }
            Input::UnmovedPort(peer, unmoved) => {
                // Each answer has another port.
                let of = |it: UnmovedPort| (it.moved, it.asked, answering_ports(it.answered));
                let known = &mut self.peers[index(peer)].unmoved_port;
                if known.replace(unmoved).map(of) != Some(of(unmoved)) {
                    self.warn(peer, Warning::UnmovedPort(unmoved));
                }
            }
            Input::RefusedOutgoing(peer, refused) => {
                let pace = &mut self.peers[index(peer)].not_sent;
                let due = pace.offer(now, Warning::NotSent(refused));
                self.warn_of(peer, due);
            }
            Input::Held(result) => self.held(result.err()),
            Input::Refused(peer, refused) => self.refused(now, peer, refused),
            Input::Says(peer) => self.peers[index(peer)].older.says(),
        }
    }

    /// Does what is due: looks up again the names of peers that do not answer, gives warnings that
    /// came too early, and forgets what had moved to an earlier daemon.
    pub(super) fn handle_timeout(&mut self, now: Instant) {
        if now.saturating_duration_since(self.started) >= LEFT_COUNTS
            && matches!(self.places, Some((_, false)))
        {
            self.tell_places(now);
        }
        for id in self.peers() {
            let peer = &mut self.peers[index(id)];
            let paces = [
                &mut peer.not_served,
                &mut peer.accepts_all,
                &mut peer.refused_source,
                &mut peer.not_sent,
            ];
            for warning in paces.into_iter().filter_map(|pace| pace.due(now)) {
                self.actions.push_back(Action::Warn(id, warning));
            }
            let is_old = self.role == Role::Old;
            if is_old && peer.older.is_news(now) && needs_list(self.claims.served(id)) {
                self.actions.push_back(Action::Warn(id, Warning::Older));
            }
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

    /// What has moved by what the old server says, whether it is served or refused.
    pub(super) fn named(&self, peer: PeerId) -> Arc<[Move]> {
        let (served, refused) = (self.moves(peer), self.refusals(peer));
        if refused.is_empty() {
            return Arc::clone(served);
        }
        let refused = refused.iter().map(|refusal| &refusal.moved);
        served.iter().chain(refused).cloned().collect()
    }

    /// What this server serves to those inside as well: to itself, and to hosts behind it (new
    /// server). An address that it holds itself (`keep`) they reach anyhow.
    ///
    /// An old server that is taken over draws by this what they begin to say to an address that it
    /// names. So without `--accept` only few addresses count ([`INSIDE_UNASKED`]), and none that is
    /// in a network of this server's own: its neighbours are its databases and file servers.
    ///
    /// In the order of the peers.
    pub(super) fn served_inside(&self) -> Vec<Vec<&Move>> {
        let of_peer = |id: PeerId| {
            let peer = &self.peers[index(id)];
            let translates = matches!(peer.deliver, Some(Deliver::To { .. }));
            if !translates {
                return Vec::new();
            }
            let served = self.claims.served(id).iter();
            if !peer.accept.is_empty() {
                return served.collect();
            }
            let mut known: HashSet<Prefix> = HashSet::new();
            let mut left = INSIDE_UNASKED;
            let unasked = served.filter(|Move { prefix, .. }| {
                if known.contains(prefix) {
                    return true;
                }
                let bits = if prefix.is_ipv4() { 32 } else { 128 } - prefix.len();
                let size = 1u32.checked_shl(bits.into()).unwrap_or(u32::MAX);
                let fits = size <= left && !self.is_near(prefix);
                if fits {
                    left -= size;
                    known.insert(*prefix);
                }
                fits
            });
            unasked.collect()
        };
        (0..self.peers.len() as u16)
            .map(PeerId)
            .map(of_peer)
            .collect()
    }

    /// Whether a prefix meets an address or a network of this server's own.
    fn is_near(&self, prefix: &Prefix) -> bool {
        let Addresses { all, networks, .. } = &self.addresses;
        let meets = |own: &Prefix| own.covers(prefix) || prefix.covers(own);
        all.iter().any(|&addr| prefix.contains(addr))
            || networks.iter().any(|network| meets(&network.prefix))
    }

    /// Where the new server delivers what moved, once that is known.
    pub(super) fn delivery(&self, peer: PeerId) -> Option<Deliver> {
        self.peers[index(peer)].deliver
    }

    /// Whether this host keeps the addresses that the peer has moved (new server).
    pub(super) fn keeps(&self, peer: PeerId) -> bool {
        self.peers[index(peer)].deliver_to == DeliverTo::Keep
    }

    /// What is delivered elsewhere (new server).
    pub(super) fn maps(&self, peer: PeerId) -> &[DeliveryMap] {
        &self.peers[index(peer)].maps
    }

    /// What the peer may move here; nothing accepts everything (new server).
    pub(super) fn accept(&self, peer: PeerId) -> &[Accept] {
        &self.peers[index(peer)].accept
    }

    /// Own networks that the peer's clients may come from all the same (new server).
    pub(super) fn clients_from(&self, peer: PeerId) -> &[Prefix] {
        &self.peers[index(peer)].clients_from
    }

    /// What may leave from the peer's moved addresses that answers nobody (new server).
    pub(super) fn outgoing(&self, peer: PeerId) -> &[Outgoing] {
        &self.peers[index(peer)].outgoing
    }

    /// What the peer may begin (old server).
    pub(super) fn allow_outgoing(&self, peer: PeerId) -> &[AllowOutgoing] {
        &self.peers[index(peer)].allow_outgoing
    }

    /// Whether the peer lets out what begins here, once it has said so (new server).
    pub(super) fn lets_out(&self, peer: PeerId) -> Option<bool> {
        self.peers[index(peer)].lets_out
    }

    /// What may leave from the peer's moved addresses, and does if the peer lets it out.
    pub(super) fn outgoing_rules(&self, peer: PeerId) -> OutgoingRules {
        let peer = &self.peers[index(peer)];
        OutgoingRules {
            on: !peer.outgoing.is_empty(),
            allowed: peer.lets_out,
            by_port: outgoing::by_port(&peer.outgoing),
        }
    }

    /// The moves from the peer that are not served (new server).
    pub(super) fn refusals(&self, peer: PeerId) -> &[Refusal] {
        self.claims.refused(peer)
    }

    /// How many moves were refused, each time that the peer named one (new server).
    pub(super) fn refused_moves(&self, peer: PeerId) -> u64 {
        self.peers[index(peer)].refused_moves
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
                reached: self.peers[index(id)].known_at,
                outgoing: !self.peers[index(id)].allow_outgoing.is_empty(),
            },
            Role::New => {
                let peer = &self.peers[index(id)];
                let refused = || self.not_served(id);
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

    fn announced(&mut self, now: Instant, peer: PeerId, announcement: Announcement) {
        match (self.role, announcement) {
            (
                Role::New,
                Announcement::Old {
                    moves,
                    mtu,
                    reached,
                    outgoing,
                },
            ) => {
                self.peers[index(peer)].names_us = reached;
                self.peers[index(peer)].lets_out = Some(outgoing);
                self.set_outgoing(peer);
                self.moved_here(now, peer, moves, mtu);
            }
            (Role::Old, Announcement::New { deliver, error, .. }) => {
                let at = &mut self.peers[index(peer)];
                at.deliver = Some(deliver);
                let warning = error.map(Warning::FromNewServer);
                let before = std::mem::replace(&mut at.trouble, warning.clone());
                let over = before.filter(|before| Some(before) != warning.as_ref());
                self.withdraw(peer, over);
                self.warn_of(peer, warning);
            }
            // The handshake refuses two daemons of one role.
            (Role::Old, Announcement::Old { .. }) | (Role::New, Announcement::New { .. }) => {}
        }
    }

    /// Says what may leave from a peer's moved addresses, and whether the old server is in the way.
    fn set_outgoing(&mut self, id: PeerId) {
        let rules = self.outgoing_rules(id);
        let refused = rules.on && rules.allowed == Some(false);
        let was = std::mem::replace(&mut self.peers[index(id)].outgoing_refused, refused);
        if refused {
            self.warn(id, Warning::OutgoingNotAllowed);
        } else if was {
            self.withdraw(id, Some(Warning::OutgoingNotAllowed));
        }
        self.actions.push_back(Action::Outgoing(id, rules));
    }

    /// The old server announced what it has moved here.
    fn moved_here(&mut self, now: Instant, peer: PeerId, moves: Vec<Move>, mtu: u16) {
        let mtu = sizes::client_mtu(mtu);
        self.actions.push_back(Action::ClientMtu(peer, mtu));
        self.names(now, peer, moves);
    }

    /// A peer names these moves, and no others.
    fn names(&mut self, now: Instant, peer: PeerId, moves: Vec<Move>) {
        let rules = Rules {
            peers: &self.peers,
            addresses: &self.addresses,
            left: &self.left,
        };
        let judge = |peer, moved: &Move| rules.refuse(peer, moved);
        for settled in self.claims.announce(peer, moves, &judge) {
            self.settle(now, settled);
        }
        self.tell_places(now);
    }

    /// Holds the moves of one peer, or of all, against what is known now. What this server needs
    /// itself may have changed.
    fn judge_again(&mut self, now: Instant, whose: Option<PeerId>) {
        if self.role == Role::Old {
            return;
        }
        let rules = Rules {
            peers: &self.peers,
            addresses: &self.addresses,
            left: &self.left,
        };
        let judge = |peer, moved: &Move| rules.refuse(peer, moved);
        for settled in self.claims.judge_again(whose, &judge) {
            self.settle(now, settled);
        }
        self.tell_places(now);
    }

    /// Tells the programs what they have to know of addresses, if that is something else.
    fn tell_places(&mut self, now: Instant) {
        if self.role == Role::Old {
            return;
        }
        let by_port = |peer: &Peer| {
            let mut outgoing = peer.outgoing.iter();
            outgoing.any(|it| it.by_port().is_some())
        };
        let peers = self.peers.iter();
        let at = peers.flat_map(|peer| {
            let heard = peer.endpoint.map(|endpoint| endpoint.remote.ip());
            heard.into_iter().chain(peer.known_at)
        });
        let places = outgoing::places(
            self.moved_places(),
            &self.addresses,
            &self.left,
            at,
            self.peers.iter().any(by_port),
        );
        let announced = self.peers().all(|peer| self.claims.has_announced(peer));
        let complete = announced || now.saturating_duration_since(self.started) >= LEFT_COUNTS;
        let told = Some((places, complete));
        if self.places != told {
            self.places = told.clone();
            let action = told.map(|(places, complete)| Action::Places { places, complete });
            self.actions.extend(action);
        }
        for id in self.peers() {
            let held = self.held_here(id);
            let before = std::mem::replace(&mut self.peers[index(id)].held_here, held.clone());
            self.warn_instead(id, before, held);
        }
    }

    /// What this server has itself of what the peer has moved here, and leaves from there.
    fn held_here(&self, id: PeerId) -> Option<Warning> {
        let ends = self.ends();
        let is_held = |addr: &IpAddr| {
            let prefix = Prefix::from(*addr);
            self.addresses.held.contains(&prefix) || self.left.contains(&prefix)
        };
        let own = self.addresses.all.iter().copied();
        let own = own.filter(|addr| !addr.is_loopback() && !ends.contains(addr) && !is_held(addr));
        let mut own = own.filter_map(|addr| {
            let served = self.claims.served(id).iter();
            let mut of = served.filter(|moved| moved.prefix.contains(addr));
            Some((addr, of.find(|moved| !self.counts_as_kept(id, moved))?))
        });
        own.next().map(|(addr, moved)| Warning::HeldHere {
            addr,
            moved: moved.clone(),
        })
    }

    /// The addresses that this server speaks to its peers from.
    fn ends(&self) -> Vec<IpAddr> {
        let ends = self.peers.iter().flat_map(|peer| {
            let local = peer.endpoint.and_then(|endpoint| endpoint.local);
            local.into_iter().chain(peer.speaks_from)
        });
        ends.collect()
    }

    /// What has moved here, as far as programs are concerned. What an earlier run left is among it
    /// as long as it is held.
    fn moved_places(&self) -> impl Iterator<Item = MovedHere> {
        let of_peer = move |id: PeerId| {
            let served = self.claims.served(id).iter();
            served.map(move |moved| MovedHere {
                prefix: moved.prefix,
                kept: self.counts_as_kept(id, moved),
            })
        };
        let waits = |id| self.holds(id) && !self.claims.has_announced(id);
        let left = if self.peers().any(waits) {
            self.left.as_slice()
        } else {
            &[]
        };
        let left = left.iter().map(|&prefix| MovedHere { prefix, kept: true });
        self.peers().flat_map(of_peer).chain(left)
    }

    /// Whether what this host has of a served move by itself counts as moved: if the settings name
    /// it. With `keep` they do, or it would be refused. Otherwise nothing is refused for being this
    /// host's own, but the address that it speaks to peers from remains its own.
    fn counts_as_kept(&self, id: PeerId, moved: &Move) -> bool {
        if self.keeps(id) {
            return true;
        }
        refusal::is_named(&self.peers[index(id)].accept, moved)
            && !self
                .ends()
                .into_iter()
                .any(|end| moved.prefix.contains(end))
    }

    /// Carries out what `claims` made of the moves of one peer.
    fn settle(&mut self, now: Instant, settled: Settled) {
        let id = settled.peer;
        let refusals = self.not_served(id);
        let there = self.peers.iter().filter(|peer| peer.there);
        let open = there.filter(|peer| peer.accept.is_empty());
        let first_come = open.count() > 1;
        let peer = &mut self.peers[index(id)];
        peer.refused_moves += settled.refused as u64;
        if settled.refusals_changed {
            let (over, due) = match refusals {
                Some(warning) => peer.not_served.replace(now, warning),
                None => (peer.not_served.withdraw(), None),
            };
            self.withdraw(id, over);
            self.warn_of(id, due);
        }
        if let Some(served) = settled.served {
            let peer = &mut self.peers[index(id)];
            let (over, due) = if peer.accept.is_empty() && !served.is_empty() {
                let moves = Arc::clone(&served);
                let warning = Warning::AcceptsAll { moves, first_come };
                peer.accepts_all.replace(now, warning)
            } else {
                (peer.accepts_all.withdraw(), None)
            };
            self.withdraw(id, over);
            self.warn_of(id, due);
            self.actions.push_back(Action::Serve(id, served));
        }
        self.deliver(id);
        let served = self.claims.served(id);
        let maps = &self.peers[index(id)].maps;
        for map in delivery::not_moved(maps, served) {
            let warning = Warning::NothingMoved(map.clone());
            self.actions.push_back(Action::Warn(id, warning));
        }
    }

    /// What is refused of the peer's moves, if anything is.
    fn not_served(&self, id: PeerId) -> Option<Warning> {
        let refused = self.claims.refused(id);
        (!refused.is_empty()).then(|| Warning::NotServed(refused.to_vec()))
    }

    fn looked_up(&mut self, now: Instant, peer: PeerId, result: Result<SocketAddr, String>) {
        let Some(lookup) = &mut self.peers[index(peer)].lookup else {
            return;
        };
        let news = lookup.done(result.as_ref().err());
        match result {
            Ok(addr) => {
                let known_at = self.peers[index(peer)].known_at.replace(addr.ip());
                if known_at != Some(addr.ip()) {
                    self.judge_again(now, None);
                    if self.role == Role::Old {
                        self.announce(peer);
                    }
                }
                self.actions.push_back(Action::Call(peer, addr));
            }
            Err(error) if news => self.warn(peer, Warning::NameNotFound(error)),
            Err(_) => {}
        }
    }

    /// Tells of packets that were not let out, at times: the peer makes them as it likes, each to
    /// another address.
    fn refused(&mut self, now: Instant, id: PeerId, refused: Refused) {
        let told = &mut self.peers[index(id)].refused;
        if told.is_none_or(|told| now.saturating_duration_since(told) >= pace::PACE) {
            *told = Some(now);
            self.warn(id, Warning::NotLetOut { refused });
        }
    }

    // Delivery.

    /// Where packets from a peer are to be delivered. If this server chooses the address, `None`
    /// until the peer said where its settings name this server: before that nothing comes that
    /// could be delivered.
    fn choose(&self, id: PeerId) -> Option<(Deliver, Delivery)> {
        let peer = &self.peers[index(id)];
        let is_known = self.claims.has_announced(id) || peer.deliver_to == DeliverTo::Keep;
        let endpoint = peer.endpoint.filter(|_| is_known)?;
        let reached = delivery::Reached {
            named: peer.names_us,
            before: peer.chosen,
            from: peer.speaks_from.or(endpoint.local),
        };
        let chosen = delivery::choose(peer.deliver_to, &peer.maps, reached, &self.addresses);
        Some(chosen)
    }

    /// Where packets of each peer were delivered last, for the next daemon.
    pub(super) fn delivered(&self) -> BTreeMap<String, Chosen> {
        let each = self.peers().map(|id| (id, self.peers[index(id)].chosen));
        let chosen = each.filter(|&(_, chosen)| chosen != (None, None));
        chosen.map(|(id, at)| (self.place(id), at)).collect()
    }

    /// An earlier daemon delivered there, and was killed.
    pub(super) fn delivered_before(&mut self, known: &BTreeMap<String, Chosen>) {
        for id in self.peers() {
            if let Some(&chosen) = known.get(&self.place(id)) {
                self.peers[index(id)].chosen = chosen;
            }
        }
    }

    /// What tells a peer from others before it is heard: its address, or its turn in the settings.
    fn place(&self, id: PeerId) -> String {
        let addr = self.peers[index(id)].addr.as_ref();
        addr.map_or_else(|| format!("#{}", id.0), ToString::to_string)
    }

    /// Decides where packets from a peer are delivered, and tells the peer.
    fn deliver(&mut self, id: PeerId) {
        if self.role != Role::New || self.peers[index(id)].endpoint.is_none() {
            return;
        }
        self.hold();
        let Some((deliver, delivery)) = self.choose(id) else {
            return;
        };
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
        let peer = &self.peers[index(id)];
        let Some(deliver) = peer.deliver else {
            return;
        };
        let moved = delivery::undeliverable(deliver, &peer.maps, self.claims.served(id));
        let trouble = match deliver {
            Deliver::Keep => self.not_held.clone().map(Warning::NotHeld),
            Deliver::To { .. } => {
                let nowhere = moved.cloned().map(Warning::NowhereToDeliver);
                let holds = self.holds(id);
                nowhere.or_else(|| {
                    self.not_held
                        .clone()
                        .filter(|_| holds)
                        .map(Warning::NotHeld)
                })
            }
        };
        let before = std::mem::replace(&mut self.peers[index(id)].trouble, trouble.clone());
        self.warn_instead(id, before, trouble);
        self.announce(id);
    }

    /// Whether this host holds the addresses itself that a peer has moved: they are kept, or
    /// programs are to be bound to them. It holds none but what is accepted by name.
    fn holds(&self, id: PeerId) -> bool {
        let peer = &self.peers[index(id)];
        let bound = !peer.outgoing.is_empty() && !peer.accept.is_empty();
        peer.deliver_to == DeliverTo::Keep || bound
    }

    /// The moved addresses that this host is to hold itself (`--deliver-to keep`, `--outgoing`);
    /// `None` if no peer wants that. An address that an earlier run left stays until every such
    /// peer has said what it moved: the application may be listening there.
    fn wanted_here(&self) -> Option<Vec<Prefix>> {
        let keeping = || self.peers().filter(|&id| self.holds(id));
        keeping().next()?;
        let served = keeping().flat_map(|id| self.claims.served(id).iter());
        let mut wanted: Vec<Prefix> = served.map(|moved| moved.prefix).collect();
        if keeping().any(|id| !self.claims.has_announced(id)) {
            wanted.extend(&self.left);
        }
        wanted.sort_unstable();
        wanted.dedup();
        Some(wanted)
    }

    /// Has the moved addresses held that are to be. Once no peer wants any, all are let go.
    fn hold(&mut self) {
        let wanted = self.wanted_here();
        let lets_go = wanted.is_none() && !self.left.is_empty();
        if lets_go {
            self.left.clear();
        }
        // What was done already is not done again, though what failed is tried again.
        if wanted == self.wanted && self.not_held.is_none() && !lets_go {
            return;
        }
        self.wanted = wanted.clone();
        self.actions
            .push_back(Action::Hold(wanted.unwrap_or_default()));
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

    fn have_addresses(&mut self, now: Instant, addresses: Addresses) {
        match self.role {
            Role::New => {
                if self.addresses.all != addresses.all {
                    let all = addresses.all.clone();
                    self.actions.push_back(Action::OwnAddresses(all));
                }
                if self.addresses.networks != addresses.networks {
                    let networks = addresses.networks.clone();
                    self.actions.push_back(Action::OwnNetworks(networks));
                }
                if self.addresses != addresses {
                    self.addresses = addresses;
                    self.judge_again(now, None);
                    self.deliver_elsewhere();
                }
            }
            Role::Old => {
                self.have_special_addresses(&addresses);
                let (v4, v6) = delivery::hop(&addresses.uplink, &self.moved);
                if (self.hop.v4, self.hop.v6) != (v4, v6) {
                    (self.hop.v4, self.hop.v6) = (v4, v6);
                    self.actions.push_back(Action::Hop(self.hop));
                }
                self.addresses = addresses;
            }
        }
    }

    /// Tells the old server's gates which addresses are no client's: this server's own, and the
    /// broadcast addresses of its networks.
    fn have_special_addresses(&mut self, new: &Addresses) {
        let old = &self.addresses;
        if (&old.all, &old.broadcasts) == (&new.all, &new.broadcasts) {
            return;
        }
        let all = new.all.iter().chain(&new.broadcasts);
        let mut all: Vec<IpAddr> = all.copied().collect();
        all.sort_unstable();
        all.dedup();
        self.actions.push_back(Action::OwnAddresses(all));
    }

    /// Chooses anew for peers whose delivery address is gone, or has come.
    fn deliver_elsewhere(&mut self) {
        for id in self.peers() {
            let before = self.peers[index(id)].deliver;
            let chosen = self.choose(id).map(|(deliver, _)| deliver);
            if before.is_some() && chosen != before {
                self.deliver(id);
            }
        }
    }

    fn uplink_has_mtu(&mut self, mtu: u32) {
        self.uplink_mtu = mtu;
        let tun = sizes::tun_mtu(mtu);
        if self.role == Role::New && tun != self.tun_mtu {
            self.actions.push_back(Action::SetTunMtu(tun));
        }
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
        self.warn_of(id, Some(warning));
    }

    /// Warns of what is so now instead of what was before, if that is another thing.
    fn warn_instead(&mut self, id: PeerId, before: Option<Warning>, now: Option<Warning>) {
        if before != now {
            self.withdraw(id, before);
            self.warn_of(id, now);
        }
    }

    fn withdraw(&mut self, id: PeerId, warning: Option<Warning>) {
        let warning = warning.map(|warning| Action::Withdraw(id, warning));
        self.actions.extend(warning);
    }

    fn warn_of(&mut self, id: PeerId, warning: Option<Warning>) {
        let warning = warning.map(|warning| Action::Warn(id, warning));
        self.actions.extend(warning);
    }
}
