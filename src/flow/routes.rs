//! What is configured on the new server, made ready for lookup: who moved what, and where it is
//! delivered.
//!
//! Must not touch packets, sockets or the clock.

mod maps;

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use crate::flow::outgoing::OutgoingRules;
use crate::flow::routes::maps::Maps;
use crate::flow::tally::Counted;
use crate::model::delivery_map::DeliveryMap;
use crate::model::drops::DropReason;
use crate::model::moved::{Move, UDP};
use crate::model::peer::PeerId;
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
    /// What is delivered elsewhere. With `keep` too.
    pub maps: Vec<DeliveryMap>,
}

/// Everything that is configured, made ready for lookup. It is replaced as a whole.
#[derive(Clone, Default)]
pub(super) struct Routes {
    /// This host's addresses, sorted.
    pub(super) host: Vec<Addr>,
    /// Those, and the addresses that this server's settings have packets delivered to, sorted;
    /// prefixes aside.
    own: Vec<Addr>,
    /// Prefixes that the settings have packets delivered to, and their addresses.
    own_prefixes: Arc<Scopes>,
    /// Addresses that packets are delivered to, sorted; of prefixes the first few.
    pub(super) deliveries: Vec<Addr>,
    /// By [`PeerId`].
    pub(super) peers: Vec<PeerRoutes>,
}

#[derive(Clone, Default)]
pub(super) struct PeerRoutes {
    moved: Arc<ByAddress>,
    pub(super) delivery: Delivery,
    pub(super) outgoing: OutgoingRules,
    /// The tunnel itself.
    pub(super) tunnel: Option<Tunnel>,
    /// What is delivered elsewhere; made from the two above.
    maps: Arc<Maps>,
    /// Where conversations count, for each move.
    counted: Arc<[Counted]>,
}

/// The outer datagrams of a tunnel: where they go, and from which port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Tunnel {
    pub(super) to: (Addr, u16),
    pub(super) from: u16,
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

/// What a reply may belong to: how closely that is named, and what it is if it is alone.
type Candidate = (Named, Option<(PeerId, Addr, u16)>);

/// Prefixes that are kept whose ends are listed among the delivery addresses, and addresses of each
/// prefix that is delivered to another. An answer from another address of this host is held against
/// each of those.
const LISTED: usize = 64;

/// How closely the settings name what a reply may belong to.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Named {
    /// A `--deliver` of this server leads there.
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
        self.own.binary_search(&addr).is_ok()
            || self.own_prefixes.find(addr.number()).is_some()
            || self.peer(peer).is_some_and(moved)
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
        let beyond_the_list = |routes: &PeerRoutes| {
            routes.delivery.keep && routes.moved(addr).is_some() || routes.maps.lead_to(addr)
        };
        self.deliveries.binary_search(&addr).is_ok() || self.peers.iter().any(beyond_the_list)
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
            for asked in routes.maps.origins(delivery, port) {
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
                if routes.maps.divide(prefix) {
                    // How many addresses are left is more than this tells.
                    let moved = routes.of_scope(scope, prefix.first().into());
                    let rest = (moved.takes(protocol, kind, port))
                        .then(|| (moved.named(protocol, kind, port), None));
                    best = better(best, rest);
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
        let mut own_prefixes = Vec::new();
        for peer in &mut self.peers {
            let Delivery { v4, v6, maps, .. } = &peer.delivery;
            let both = || v4.map(Addr::from).into_iter().chain(v6.map(Addr::from));
            self.own.extend(both());
            for map in maps {
                if map.to.is_single() {
                    self.own.push(map.to.first().into());
                } else {
                    own_prefixes.push(Move::whole(map.to));
                }
            }
            let of_moved = |map: &&DeliveryMap| peer.moved.scopes.meets(&map.moved);
            peer.maps = Arc::new(Maps::new(maps.iter().filter(of_moved).cloned().collect()));
            self.deliveries.extend(peer.maps.listed(LISTED));
            if peer.delivery.keep {
                let scopes = &peer.moved.scopes;
                let prefixes = (0..scopes.len().min(LISTED)).map(|scope| scopes.prefix(scope));
                let ends = prefixes.flat_map(|prefix| [prefix.first(), prefix.last()]);
                self.deliveries.extend(ends.map(Addr::from));
            } else {
                self.deliveries.extend(both());
            }
        }
        self.own_prefixes = Arc::new(Scopes::new(&own_prefixes));
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
        for (asked, port) in self.maps.origins(addr, port) {
            if let Some(moved) = self.moved(asked) {
                look(moved, port);
            }
        }
        if self.delivery.keep {
            if let Some(moved) = self.moved(addr) {
                look(moved, port);
            }
        } else if self.delivery.of(family) == Some(addr) {
            let scopes = &self.moved.scopes;
            for scope in 0..scopes.len() {
                let prefix = scopes.prefix(scope);
                // One of them may be delivered elsewhere.
                for end in [prefix.first(), prefix.last()].map(Addr::from) {
                    if end.family() == family {
                        look(self.of_scope(scope, end), port);
                    }
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
        Some(self.of_scope(scope, addr))
    }

    /// An address of a scope.
    #[inline]
    fn of_scope(&self, scope: usize, addr: Addr) -> Moved<'_> {
        Moved {
            addr,
            scope,
            routes: self,
        }
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
        Some(match moved.map(kind, port) {
            Some(_) => Named::ByMap,
            None => moved.named(protocol, kind, port),
        })
    }
}

impl Moved<'_> {
    /// Whether every packet of the address is delivered to one place, and to which.
    pub(super) fn one_place(&self) -> Option<Option<Addr>> {
        let Self { addr, routes, .. } = self;
        let is_one = routes.moved.scopes.is_whole(self.scope) && !routes.maps.name_ports_of(*addr);
        is_one.then(|| self.all_to())
    }

    /// The port that a client goes on with which is answered by UDP from `port` of this host's
    /// `addr`, if that has moved.
    pub(super) fn asked_port(&self, addr: Addr, port: u16) -> Option<u16> {
        let mut asked = self.routes.maps.origins(addr, port);
        let leads_there = |&(moved, from): &(Addr, u16)| {
            moved == self.addr && self.delivery(Kind::Udp, from) == Ok((addr, port))
        };
        let mapped = asked.find(leads_there).map(|(_, port)| port);
        let asked = mapped.unwrap_or(port);
        self.takes(UDP, Kind::Udp, asked).then_some(asked)
    }

    /// Where it is delivered, but for its ports that are delivered elsewhere.
    fn all_to(&self) -> Option<Addr> {
        if let Some(map) = self.map(Kind::Other, 0) {
            return Some(map.place(self.addr.into(), 0).0.into());
        }
        if self.routes.delivery.keep {
            return Some(self.addr);
        }
        self.routes.delivery.of(self.addr.family())
    }

    /// The `--deliver` that counts for a packet of this kind to `port`, if any does.
    fn map(&self, kind: Kind, port: u16) -> Option<&DeliveryMap> {
        self.routes.maps.find(self.addr, kind, port)
    }

    /// How closely moves name this port.
    fn named(&self, protocol: u8, kind: Kind, port: u16) -> Named {
        let port = kind.has_ports().then_some(port);
        match self.routes.moved.scopes.names(self.scope, protocol, port) {
            true => Named::ByPort,
            false => Named::Whole,
        }
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
        if let Some(map) = self.map(kind, port) {
            let (addr, port) = map.place(self.addr.into(), port);
            return Ok((addr.into(), port));
        }
        let delivery = self.all_to().ok_or(DropReason::NoDelivery)?;
        Ok((delivery, port))
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;
    use std::time::Instant;

    use super::*;
    use crate::flow::testing::translator;
    use crate::flow::translate::Translator;
    use crate::packet::testing::{Plan, fragments, reply};
    use crate::packet::{ACK, Parsed, SYN};
    use crate::testing::all;
    use proptest::prelude::*;

    const PEER: PeerId = PeerId(1);
    const CLIENT: &str = "203.0.113.9";

    struct Bed {
        translator: Translator,
        now: Instant,
    }

    impl Bed {
        fn new(moves: &str, maps: &str, keep: bool) -> Self {
            let moves: Vec<&str> = moves.split_whitespace().collect();
            let delivery = Delivery {
                v4: Some([198, 51, 100, 2].into()),
                v6: Some("2001:db8:b::2".parse().unwrap()),
                keep,
                maps: all(maps),
            };
            let (translator, now) = translator(PEER, &moves, delivery);
            Self { translator, now }
        }

        /// Where a client's packet goes.
        fn delivered(&self, bytes: &mut [u8]) -> Result<(IpAddr, u16), DropReason> {
            let mut parsed = Parsed::parse(bytes)?;
            (self.translator).inbound(self.now, PEER, bytes, &mut parsed, false)?;
            Ok((parsed.dst(bytes).into(), parsed.dst_port()))
        }

        /// From where the application's packet leaves.
        fn left(&self, plan: &Plan) -> Result<(IpAddr, u16), DropReason> {
            let mut bytes = plan.build();
            let mut parsed = Parsed::parse(&bytes)?;
            let sent = (self.translator).outbound(self.now, &mut bytes, &mut parsed, false);
            sent.map_err(|dropped| dropped.reason)?;
            Ok((parsed.src(&bytes).into(), parsed.src_port()))
        }

        fn asks(&self, kind: Kind, moved: &str, port: u16) -> Result<(IpAddr, u16), DropReason> {
            self.delivered(&mut asked(kind, moved, port).build())
        }
    }

    fn asked(kind: Kind, moved: &str, port: u16) -> Plan {
        let client = if moved.contains(':') {
            "2001:db8:c::9"
        } else {
            CLIENT
        };
        let mut plan = Plan::new(kind, client, moved);
        (plan.dst_port, plan.flags) = (port, SYN);
        plan
    }

    fn end(addr: &str, port: u16) -> (IpAddr, u16) {
        (addr.parse().unwrap(), port)
    }

    const MAPS: &str = "192.0.2.16/28=198.51.100.32/28 192.0.2.16/28:80/tcp=198.51.100.48/28:8080 \
                        2001:db8:a:1::/64=2001:db8:b:7::/64 192.0.2.17:81=198.51.100.9:8181";

    #[test]
    fn each_address_of_a_prefix_is_delivered_to_its_own_and_answers_from_it() {
        for keep in [false, true] {
            let bed = Bed::new("192.0.2.0/24 2001:db8:a:1::/64", MAPS, keep);
            for (kind, moved, port, to, to_port) in [
                (Kind::Udp, "192.0.2.16", 53, "198.51.100.32", 53),
                (Kind::Tcp, "192.0.2.31", 443, "198.51.100.47", 443),
                (Kind::Tcp, "192.0.2.31", 80, "198.51.100.63", 8080),
                (Kind::Udp, "192.0.2.31", 80, "198.51.100.47", 80),
                (Kind::Tcp, "192.0.2.17", 81, "198.51.100.9", 8181),
                (Kind::Udp, "2001:db8:a:1::", 53, "2001:db8:b:7::", 53),
                (Kind::Tcp, "2001:db8:a:1:f::5", 80, "2001:db8:b:7:f::5", 80),
            ] {
                let plan = asked(kind, moved, port);
                let mut bytes = plan.build();
                assert_eq!(bed.delivered(&mut bytes), Ok(end(to, to_port)), "{moved}");
                let mut answer = reply(&plan);
                (answer.src, answer.src_port) = end(to, to_port);
                answer.flags = SYN | ACK;
                assert_eq!(bed.left(&answer), Ok(end(moved, port)));
            }
            let (ping, to) = (
                Plan::new(Kind::IcmpQuery, CLIENT, "192.0.2.18"),
                "198.51.100.34",
            );
            let delivered = bed.delivered(&mut ping.build()).unwrap();
            assert_eq!(delivered.0, to.parse::<IpAddr>().unwrap());
            // Beside the prefix it is as ever.
            let to = if keep { "192.0.2.32" } else { "198.51.100.2" };
            assert_eq!(bed.asks(Kind::Tcp, "192.0.2.32", 80), Ok(end(to, 80)));
        }
    }

    #[test]
    fn a_later_fragment_needs_its_first_one_only_where_a_port_is_delivered_elsewhere() {
        let bed = Bed::new("192.0.2.0/24 2001:db8:a:1::/64", MAPS, false);
        for (moved, to) in [
            ("192.0.2.17", None),
            ("2001:db8:a:1::5", Some("2001:db8:b:7::5")),
            ("192.0.2.32", Some("198.51.100.2")),
        ] {
            let [_, mut second] = fragments(&asked(Kind::Udp, moved, 53).build(), 16, 7);
            let delivered = bed.delivered(&mut second).map(|(addr, _)| addr);
            let wanted = to.map(|to| to.parse().unwrap());
            assert_eq!(
                delivered,
                wanted.ok_or(DropReason::FragmentUnknown),
                "{moved}"
            );
        }
    }

    #[test]
    fn an_answer_of_an_earlier_daemons_flow_leaves_from_the_address_that_leads_there() {
        let bed = Bed::new("192.0.2.16/28 2001:db8:a:1::/64", MAPS, false);
        let answers = |from: &str, port| {
            let client = if from.contains(':') {
                "2001:db8:c::9"
            } else {
                CLIENT
            };
            let mut plan = Plan::new(Kind::Tcp, from, client);
            (plan.src_port, plan.flags) = (port, ACK);
            bed.left(&plan)
        };
        assert_eq!(answers("198.51.100.37", 443), Ok(end("192.0.2.21", 443)));
        assert_eq!(answers("198.51.100.53", 8080), Ok(end("192.0.2.21", 80)));
        assert_eq!(answers("198.51.100.9", 8181), Ok(end("192.0.2.17", 81)));
        assert_eq!(
            answers("2001:db8:b:7::9", 22),
            Ok(end("2001:db8:a:1::9", 22))
        );
        // Its port 80 is delivered elsewhere, and nothing of it to the address of all others.
        for (from, port) in [("198.51.100.37", 80), ("198.51.100.2", 443)] {
            assert_eq!(
                answers(from, port),
                Err(DropReason::NoFlow),
                "{from} {port}"
            );
        }
        // Of a prefix of which some are delivered elsewhere, which of the others it was is not
        // known.
        let bed = Bed::new("192.0.2.16/28", "192.0.2.16/29=198.51.100.32/29", false);
        let mut plan = Plan::new(Kind::Tcp, "198.51.100.2", CLIENT);
        plan.flags = ACK;
        assert_eq!(bed.left(&plan), Err(DropReason::NoFlow));
    }

    #[test]
    fn no_client_has_an_address_that_something_is_delivered_to() {
        let bed = Bed::new("192.0.2.0/24", MAPS, false);
        for (client, wanted) in [
            ("198.51.100.35", Err(DropReason::BadSource)),
            ("198.51.100.9", Err(DropReason::BadSource)),
            ("198.51.100.77", Ok(end("198.51.100.32", 53))),
        ] {
            let mut plan = asked(Kind::Udp, "192.0.2.16", 53);
            plan.src = client.parse().unwrap();
            assert_eq!(bed.delivered(&mut plan.build()), wanted, "{client}");
        }
    }

    proptest! {
        /// The lookup agrees with a look at each.
        #[test]
        fn what_counts_is_what_a_look_at_each_finds(
            host in 0u8..64, port in 79u16..83, tcp in any::<bool>(),
        ) {
            let maps: Vec<DeliveryMap> = all(MAPS);
            let addr = IpAddr::from([192, 0, 2, host]);
            let kind = if tcp { Kind::Tcp } else { Kind::Udp };
            let protocol = if tcp { 6 } else { 17 };
            let about = maps.iter().filter(|map| {
                map.moved.contains(addr) && map.about().takes(protocol, Some(port))
            });
            let counts = about.max_by_key(|map| map.port.is_some());
            let found = Maps::new(maps.clone());
            prop_assert_eq!(found.find(addr.into(), kind, port), counts);
        }
    }
}
