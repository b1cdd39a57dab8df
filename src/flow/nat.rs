//! `ipmoved nat`: both addresses of a packet are translated, on the old server alone.
//!
//! Owns what becomes of a packet that one of the two captures took (moved addresses from clients,
//! borrowed ports from the new server). [`table`](crate::flow::table) owns flows, their states,
//! timeouts and limits, and borrows the ports. Must not touch sockets, devices or the clock.
//!
//! ```text
//! client:cport → moved:port   ──►   own:borrowed → new server:port
//! client:cport ← moved:port   ◄──   own:borrowed ← new server:port
//! ```
//!
//! It carries TCP, UDP, ICMP queries (their identifier is the port), ICMP errors about any of these
//! in both directions, and fragments behind their first one. Other protocols have nothing that
//! would tell the replies to two clients apart; they are dropped and counted.
//!
//! IPv4 fragments get identifications of the daemon's own: from here on many clients' packets share
//! one source address, and RFC 6864 wants them apart. (IPv6 ones have 32 random bits; they stay.)

use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::Mutex;
use std::time::Instant;

use crate::flow::fairness::Limit;
use crate::flow::fragments::FragmentCache;
use crate::flow::listing::{Flows, Place, Row};
use crate::flow::lock;
use crate::flow::ownership::{Ownership, Verdict};
use crate::flow::seed::Seed;
use crate::flow::table::{FlowStats, FlowTable, Inside, Masquerade, Outside};
use crate::flow::weight::Weight;
use crate::model::drops::DropReason;
use crate::model::moved::Move;
use crate::model::peer::PeerId;
use crate::packet::{Addr, Family, Fragment, Kind, Parsed, Quoted, Rewrite};

/// The ports that are borrowed: two blocks of 8,192. They lie above what services use, and inside
/// the range that Linux gives its own connections (32768–60999), a good part of which stays free.
/// Their bounds are multiples of the block, so that any packet filter can name them.
pub const PORTS: RangeInclusive<u16> = 40_960..=57_343;

/// The only peer: the new server.
const PEER: PeerId = PeerId(0);

/// Where moved addresses of one family are translated to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Target {
    /// The new server.
    pub to: IpAddr,
    /// Its port, if it is not the one that the client asked for.
    pub port: Option<u16>,
    /// The old server's own address, from which packets go to the new server.
    pub own: IpAddr,
}

/// What a translation needs to know.
#[derive(Clone, Debug)]
pub struct NatConfig {
    /// What was moved.
    pub moves: Vec<Move>,
    /// At most one target of each family; every move's family has one.
    pub targets: Vec<Target>,
    /// Most flows at a time (`--max-flows`).
    pub max_flows: usize,
    /// Keys of the flow table's hashes.
    pub seed: Seed,
    /// Key by which ports are chosen; the same after a restart.
    pub port_seed: Seed,
    /// A time not later than any `now` that follows.
    pub epoch: Instant,
}

/// What to do with a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Outcome {
    /// Out, to the new server.
    ToServer,
    /// Out, to the client.
    ToClient,
    /// Up, into the old server's own stack: the packet is its own, and unchanged.
    Bounce,
}

/// The translation of one daemon.
pub struct Nat {
    ownership: Ownership,
    seed: Seed,
    table: FlowTable,
    limit: Limit,
    targets: Vec<Target>,
    fragments_to_server: FragmentCache<u16>,
    fragments_to_client: FragmentCache<Back>,
    /// The identification of the next IPv4 packet in fragments.
    next_id: u16,
}

/// Where later fragments of a reply go.
#[derive(Clone, Copy, Debug)]
struct Back {
    moved: Addr,
    client: Addr,
    id: u16,
}

/// A reader waits for the packets of a turn, and a turn for a slice.
impl Flows for Mutex<Nat> {
    fn slice(&self, now: Instant, from: Place, out: &mut Vec<Row>) -> Option<Place> {
        let next = lock(self).table.slice(now, 0, from.at, out)?;
        Some(Place { part: 0, at: next })
    }
}

impl Nat {
    /// A translation without flows.
    pub fn new(config: NatConfig) -> Self {
        let own = |v4: bool| {
            let target = config.targets.iter().find(|t| t.own.is_ipv4() == v4);
            // A family without a target has no moves either.
            let none = if v4 {
                IpAddr::from([0; 4])
            } else {
                IpAddr::from([0; 16])
            };
            target.map_or(none, |target| target.own).into()
        };
        let masquerade = Masquerade {
            v4: own(true),
            v6: own(false),
            ports: PORTS,
            seed: config.port_seed,
        };
        Self {
            ownership: Ownership::new(&config.moves, config.seed),
            seed: config.seed,
            table: FlowTable::masquerading(config.seed, config.epoch, masquerade),
            limit: Limit::new(config.max_flows),
            targets: config.targets,
            fragments_to_server: FragmentCache::new(),
            fragments_to_client: FragmentCache::new(),
            next_id: 0,
        }
    }

    /// Translates a packet that either capture took. `parsed` was made from `bytes`, which are the
    /// head of a super-packet if it is one. `partial` says whether its checksum is partial.
    ///
    /// # Errors
    /// Why to drop it. After [`DropReason::TtlExpired`] the packet is unchanged, and its sender has
    /// to be told.
    pub fn translate(
        &mut self,
        now: Instant,
        bytes: &mut [u8],
        parsed: &mut Parsed,
        partial: bool,
    ) -> Result<Outcome, DropReason> {
        let dst = IpAddr::from(parsed.dst(bytes));
        match self.targets.iter().find(|target| target.own == dst) {
            // If only ports of an address were moved, the old server may also ask the new one from
            // it.
            Some(&target) if self.is_reply(now, &target, bytes, parsed) => {
                self.server_packet(now, target, bytes, parsed, partial)
            }
            Some(_) if !self.ownership.is_moved(dst.into()) => Ok(Outcome::Bounce),
            _ => self.client_packet(now, bytes, parsed, partial),
        }
    }

    /// Forgets flows whose time is up, examining at most `budget`.
    pub fn expire(&mut self, now: Instant, budget: usize) {
        self.table.expire(now, budget, &self.limit);
    }

    /// Counters of the flows.
    pub fn stats(&self) -> FlowStats {
        FlowStats {
            max: self.limit.max() as u64,
            ..self.table.stats()
        }
    }

    /// Translates a client's packet to a moved address.
    fn client_packet(
        &mut self,
        now: Instant,
        bytes: &mut [u8],
        parsed: &mut Parsed,
        partial: bool,
    ) -> Result<Outcome, DropReason> {
        match self.ownership.judge(now, parsed, bytes)? {
            Verdict::Carry => {}
            Verdict::Bounce | Verdict::Hold => return Ok(Outcome::Bounce),
        }
        let (src, moved) = (parsed.src(bytes), parsed.dst(bytes));
        let target = *self.target(parsed.family()).ok_or(DropReason::NoDelivery)?;
        if self.is_own(src) {
            return Err(DropReason::BadSource);
        }
        if parsed.fragment() == Fragment::Later {
            let known = self
                .fragments_to_server
                .recall(now, &self.seed, parsed, bytes);
            let id = known.ok_or(DropReason::FragmentUnknown)?;
            parsed.decrement_ttl(bytes)?;
            parsed.set_ipv4_id(bytes, id);
            parsed.set_src(bytes, target.own.into(), false);
            parsed.set_dst(bytes, target.to.into(), false);
            return Ok(Outcome::ToServer);
        }
        match parsed.kind() {
            Kind::Tcp | Kind::Udp | Kind::IcmpQuery => {}
            Kind::IcmpError => return self.client_error(moved, target, bytes, parsed, partial),
            // It replies to a query that nobody here sent.
            Kind::IcmpReply => return Err(DropReason::NoFlow),
            Kind::Other | Kind::LaterFragment => return Err(DropReason::NoPorts),
        }
        let key = Outside {
            peer: PEER,
            protocol: parsed.protocol(),
            client: src,
            client_port: parsed.src_port(),
            moved,
            moved_port: parsed.dst_port(),
        };
        let weight = Weight::of(parsed);
        let mut inside = self.table.client_packet(now, &key, weight, &self.limit);
        if inside.is_none() {
            let port = match parsed.kind() {
                Kind::Tcp | Kind::Udp => target.port.unwrap_or(key.moved_port),
                Kind::IcmpQuery
                | Kind::IcmpReply
                | Kind::IcmpError
                | Kind::Other
                | Kind::LaterFragment => 0,
            };
            let to = target.to.into();
            let opened = self.table.open(now, &key, to, port, weight, &self.limit);
            inside = Some(opened?);
        }
        let inside = inside.ok_or(DropReason::NoFlow)?;
        parsed.decrement_ttl(bytes)?;
        if parsed.fragment() == Fragment::First {
            let id = self.fragment_id();
            self.fragments_to_server
                .remember(now, &self.seed, parsed, bytes, id);
            parsed.set_ipv4_id(bytes, id);
        }
        parsed.set_src(bytes, inside.client, partial);
        parsed.set_dst(bytes, target.to.into(), partial);
        parsed.set_src_port(bytes, inside.client_port, partial);
        parsed.set_dst_port(bytes, inside.delivery_port, partial);
        Ok(Outcome::ToServer)
    }

    /// Translates an ICMP error from the client's side about a reply. The new server gets it from
    /// the old one.
    fn client_error(
        &self,
        moved: Addr,
        target: Target,
        bytes: &mut [u8],
        parsed: &Parsed,
        partial: bool,
    ) -> Result<Outcome, DropReason> {
        let quoted = Quoted::parse(bytes, parsed)?;
        if quoted.src(bytes) != parsed.dst(bytes) {
            return Err(DropReason::IcmpUnrelated);
        }
        let key = Outside {
            peer: PEER,
            protocol: quoted.protocol(),
            client: quoted.dst(bytes),
            client_port: quoted.dst_port(),
            moved,
            moved_port: quoted.src_port(),
        };
        let inside = self.table.peek_outside(&key);
        let inside = inside.ok_or(DropReason::IcmpUnrelated)?;
        parsed.decrement_ttl(bytes)?;
        parsed.set_src(bytes, target.own.into(), partial);
        parsed.set_dst(bytes, target.to.into(), partial);
        let change = Rewrite {
            src: Some(target.to.into()),
            src_port: Some(inside.delivery_port),
            dst: Some(target.own.into()),
            dst_port: Some(inside.client_port),
        };
        quoted.rewrite(bytes, parsed, &change);
        Ok(Outcome::ToServer)
    }

    /// Whether a packet to the old server's own address may be a reply to a translated one.
    fn is_reply(&self, now: Instant, target: &Target, bytes: &[u8], parsed: &Parsed) -> bool {
        match parsed.kind() {
            Kind::IcmpError => Quoted::parse(bytes, parsed).is_ok_and(|quoted| {
                quoted.src(bytes) == target.own.into() && quoted.dst(bytes) == target.to.into()
            }),
            Kind::Tcp | Kind::Udp => {
                parsed.src(bytes) == target.to.into() && PORTS.contains(&parsed.dst_port())
            }
            Kind::IcmpReply => parsed.src(bytes) == target.to.into(),
            // It goes where its first fragment went.
            Kind::LaterFragment => {
                let known = self
                    .fragments_to_client
                    .recall(now, &self.seed, parsed, bytes);
                known.is_some()
            }
            Kind::IcmpQuery | Kind::Other => false,
        }
    }

    /// Translates a packet from the new server to a borrowed port of the old one's own address, or
    /// an error about one.
    fn server_packet(
        &mut self,
        now: Instant,
        target: Target,
        bytes: &mut [u8],
        parsed: &mut Parsed,
        partial: bool,
    ) -> Result<Outcome, DropReason> {
        let delivery = target.to.into();
        match parsed.kind() {
            Kind::Tcp | Kind::Udp | Kind::IcmpReply => {}
            Kind::IcmpError => return self.server_error(delivery, target, bytes, parsed, partial),
            Kind::LaterFragment => {
                let Some(back) = self
                    .fragments_to_client
                    .recall(now, &self.seed, parsed, bytes)
                else {
                    return Ok(Outcome::Bounce);
                };
                parsed.decrement_ttl(bytes)?;
                parsed.set_ipv4_id(bytes, back.id);
                parsed.set_src(bytes, back.moved, false);
                parsed.set_dst(bytes, back.client, false);
                return Ok(Outcome::ToClient);
            }
            Kind::IcmpQuery | Kind::Other => return Ok(Outcome::Bounce),
        }
        let key = Inside {
            protocol: parsed.protocol(),
            client: parsed.dst(bytes),
            client_port: parsed.dst_port(),
            delivery,
            delivery_port: parsed.src_port(),
        };
        let weight = Weight::of(parsed);
        let found = self
            .table
            .application_packet(now, &key, weight, &self.limit);
        let outside = match (found, parsed.kind()) {
            (Some(outside), _) => outside,
            // The old server's own pings have identifiers from anywhere.
            (None, Kind::IcmpReply) => return Ok(Outcome::Bounce),
            // It belongs to a flow from before a restart, whose client will speak again. The old
            // server's own stack knows nothing of the flow, and its reset would end it.
            (None, _) => return Err(DropReason::NoFlow),
        };
        parsed.decrement_ttl(bytes)?;
        if parsed.fragment() == Fragment::First {
            let back = Back {
                moved: outside.moved,
                client: outside.client,
                id: self.fragment_id(),
            };
            self.fragments_to_client
                .remember(now, &self.seed, parsed, bytes, back);
            parsed.set_ipv4_id(bytes, back.id);
        }
        parsed.set_src(bytes, outside.moved, partial);
        parsed.set_dst(bytes, outside.client, partial);
        parsed.set_src_port(bytes, outside.moved_port, partial);
        parsed.set_dst_port(bytes, outside.client_port, partial);
        Ok(Outcome::ToClient)
    }

    /// Translates an ICMP error about a translated packet, whoever sent it. The client gets it from
    /// the moved address, since the old server may speak for no other.
    fn server_error(
        &self,
        delivery: Addr,
        target: Target,
        bytes: &mut [u8],
        parsed: &Parsed,
        partial: bool,
    ) -> Result<Outcome, DropReason> {
        let quoted = Quoted::parse(bytes, parsed)?;
        let key = Inside {
            protocol: quoted.protocol(),
            client: target.own.into(),
            client_port: quoted.src_port(),
            delivery,
            delivery_port: quoted.dst_port(),
        };
        let Some(outside) = self.table.peek_inside(&key) else {
            return Ok(Outcome::Bounce);
        };
        parsed.decrement_ttl(bytes)?;
        let moved = outside.moved;
        parsed.set_src(bytes, moved, partial);
        parsed.set_dst(bytes, outside.client, partial);
        let change = Rewrite {
            src: Some(outside.client),
            src_port: Some(outside.client_port),
            dst: Some(moved),
            dst_port: Some(outside.moved_port),
        };
        quoted.rewrite(bytes, parsed, &change);
        Ok(Outcome::ToClient)
    }

    fn target(&self, family: Family) -> Option<&Target> {
        let v4 = family == Family::V4;
        self.targets.iter().find(|target| target.to.is_ipv4() == v4)
    }

    /// Whether a source is ours, so that no client may have it.
    fn is_own(&self, addr: Addr) -> bool {
        let ours = self.targets.iter().any(|target| addr == target.own.into());
        ours || self.ownership.is_moved(addr)
    }

    fn fragment_id(&mut self) -> u16 {
        self.next_id = self.next_id.wrapping_add(1);
        self.next_id
    }
}

impl std::fmt::Debug for Nat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Nat")
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::table::RECENT_PORT;
    use crate::packet::icmp;
    use crate::packet::testing::{Plan, assert_sums, complete, plans, reply, set_ipv4_checksum};
    use crate::packet::{ACK, SYN};
    use crate::testing::epoch;
    use proptest::prelude::*;
    use std::time::Duration;

    const CLIENT: &str = "203.0.113.9";
    const MOVED: &str = "192.0.2.5";
    const MOVED6: &str = "2001:db8:a::5";
    const OWN: &str = "192.0.2.1";
    const SERVER: &str = "198.51.100.2";

    fn targets(port: Option<u16>) -> Vec<Target> {
        [(SERVER, OWN), ("2001:db8:b::2", "2001:db8:a::1")]
            .map(|(to, own)| Target {
                to: to.parse().unwrap(),
                port,
                own: own.parse().unwrap(),
            })
            .to_vec()
    }

    fn bed(moves: &[&str], port: Option<u16>, max_flows: usize) -> (Nat, Instant) {
        let now = epoch();
        let nat = Nat::new(NatConfig {
            moves: moves.iter().map(|text| text.parse().unwrap()).collect(),
            targets: targets(port),
            max_flows,
            seed: Seed::new([1, 2]),
            port_seed: Seed::new([3, 4]),
            epoch: now,
        });
        (nat, now)
    }

    fn pass(nat: &mut Nat, now: Instant, bytes: &mut [u8]) -> Result<Outcome, DropReason> {
        let mut parsed = Parsed::parse(bytes)?;
        let outcome = nat.translate(now, bytes, &mut parsed, false);
        if outcome.is_ok() {
            assert_eq!(Parsed::parse(bytes), Ok(parsed));
        }
        outcome
    }

    fn syn(client_port: u16) -> Plan {
        Plan {
            flags: SYN,
            src_port: client_port,
            ..Plan::new(Kind::Tcp, CLIENT, MOVED)
        }
    }

    fn later(plan: &Plan, hops: u8) -> Plan {
        Plan {
            ttl: plan.ttl - hops,
            ..plan.clone()
        }
    }

    /// An ICMP error that quotes all of `about`.
    fn error(about: &[u8], from: IpAddr) -> Vec<u8> {
        let parsed = Parsed::parse(about).unwrap();
        let mut out = [0; icmp::MAX_V6];
        let len = icmp::too_big(&mut out, about, &parsed, from, 1300).unwrap();
        out[..len].to_vec()
    }

    proptest! {
        #[test]
        fn there_and_back_is_the_identity_but_for_the_hops(
            plan in plans(), partial in any::<bool>(), mapped in any::<bool>(),
        ) {
            if plan.kind == Kind::IcmpReply { return Ok(()); }
            let v4 = plan.src.is_ipv4();
            let plan = Plan {
                dst: if v4 { MOVED } else { MOVED6 }.parse().unwrap(),
                ttl: plan.ttl.max(3),
                ..plan
            };
            let partial = partial && plan.kind != Kind::IcmpQuery;
            let port = mapped.then_some(8080);
            let (mut nat, now) = bed(&[MOVED, MOVED6], port, 1000);
            let build = |plan: &Plan| if partial { plan.build_partial() } else { plan.build() };
            let target = targets(port)[usize::from(!v4)];

            let mut bytes = build(&plan);
            let mut parsed = Parsed::parse(&bytes).unwrap();
            let outcome = nat.translate(now, &mut bytes, &mut parsed, partial);
            prop_assert_eq!(outcome, Ok(Outcome::ToServer));
            prop_assert!(PORTS.contains(&parsed.src_port()));
            let mut seen = Plan {
                src: target.own,
                dst: target.to,
                src_port: parsed.src_port(),
                ..later(&plan, 1)
            };
            if mapped && plan.kind != Kind::IcmpQuery { seen.dst_port = 8080; }
            prop_assert_eq!(&bytes, &build(&seen));
            prop_assert_eq!(parsed, Parsed::parse(&bytes).unwrap());

            let mut bytes = build(&reply(&seen));
            let mut parsed = Parsed::parse(&bytes).unwrap();
            let outcome = nat.translate(now, &mut bytes, &mut parsed, partial);
            prop_assert_eq!(outcome, Ok(Outcome::ToClient));
            prop_assert_eq!(&bytes, &build(&later(&reply(&plan), 2)));
            prop_assert_eq!(parsed, Parsed::parse(&bytes).unwrap());
            if partial { complete(&mut bytes); }
            assert_sums(&bytes);
        }

        #[test]
        fn errors_are_translated_inside_and_out(plan in plans()) {
            if plan.kind == Kind::IcmpReply { return Ok(()); }
            let v4 = plan.src.is_ipv4();
            let router: IpAddr = if v4 { "192.0.2.99" } else { "2001:db8::99" }.parse().unwrap();
            let dst: IpAddr = if v4 { MOVED } else { MOVED6 }.parse().unwrap();
            let plan = Plan { dst, ttl: plan.ttl.max(3), ..plan };
            let (mut nat, now) = bed(&[MOVED, MOVED6], None, 1000);
            let target = targets(None)[usize::from(!v4)];
            let mut seen = plan.build();
            prop_assert_eq!(pass(&mut nat, now, &mut seen), Ok(Outcome::ToServer));
            let hop = |mut bytes: Vec<u8>| {
                Parsed::parse(&bytes).unwrap().decrement_ttl(&mut bytes).unwrap();
                bytes
            };

            // A router towards the server reports the request. The client gets it from the moved
            // address.
            let mut bytes = error(&seen, router);
            prop_assert_eq!(pass(&mut nat, now, &mut bytes), Ok(Outcome::ToClient));
            prop_assert_eq!(bytes, hop(error(&later(&plan, 1).build(), dst)));

            // A router towards the client reports the reply. The new server gets it from the old
            // server.
            let ports = Parsed::parse(&seen).unwrap();
            let back = reply(&Plan {
                src: target.own,
                dst: target.to,
                src_port: ports.src_port(),
                dst_port: ports.dst_port(),
                ..plan.clone()
            });
            if plan.kind != Kind::IcmpQuery {
                let mut bytes = error(&reply(&plan).build(), router);
                prop_assert_eq!(pass(&mut nat, now, &mut bytes), Ok(Outcome::ToServer));
                prop_assert_eq!(bytes, hop(error(&back.build(), target.own)));
            }
        }
    }

    #[test]
    fn the_old_servers_own_packets_are_bounced_as_they_are() {
        let (mut nat, now) = bed(&["192.0.2.5:80/tcp"], None, 1000);
        let mut bounced = |plan: Plan| {
            let before = plan.build();
            let mut bytes = before.clone();
            assert_eq!(pass(&mut nat, now, &mut bytes), Ok(Outcome::Bounce));
            assert_eq!(bytes, before);
        };
        // A reply to a ping of the old server's own, whatever the identifier.
        let id = *PORTS.start();
        bounced(Plan {
            dst_port: id,
            ..Plan::new(Kind::IcmpReply, SERVER, OWN)
        });
        // What the server sends to another port, as a whole packet.
        bounced(Plan {
            dst_port: 53,
            ..Plan::new(Kind::Udp, SERVER, OWN)
        });
        // Another port of the moved address.
        bounced(Plan {
            dst_port: 81,
            ..Plan::new(Kind::Tcp, CLIENT, MOVED)
        });
        // An error about a packet that the old server sent itself.
        let own = Plan {
            src_port: id,
            ..Plan::new(Kind::Tcp, OWN, SERVER)
        };
        let before = error(&own.build(), "192.0.2.99".parse().unwrap());
        let mut bytes = before.clone();
        assert_eq!(pass(&mut nat, now, &mut bytes), Ok(Outcome::Bounce));
        assert_eq!(bytes, before);
    }

    #[test]
    fn what_cannot_be_translated_is_dropped_with_a_reason() {
        let (mut nat, now) = bed(&[MOVED], None, 1000);
        let mut dropped = |plan: Plan| pass(&mut nat, now, &mut plan.build());
        // A packet of an unknown flow: a reset would end the flow.
        let unknown = Plan {
            dst_port: *PORTS.end(),
            ..Plan::new(Kind::Tcp, SERVER, OWN)
        };
        assert_eq!(dropped(unknown), Err(DropReason::NoFlow));
        let reply = Plan::new(Kind::IcmpReply, CLIENT, MOVED);
        assert_eq!(dropped(reply), Err(DropReason::NoFlow));
        let own = Plan::new(Kind::Tcp, OWN, MOVED);
        assert_eq!(dropped(own), Err(DropReason::BadSource));
        let worn = Plan { ttl: 1, ..syn(1) };
        assert_eq!(dropped(worn), Err(DropReason::TtlExpired));
        let mut gre = Plan::new(Kind::Udp, CLIENT, MOVED).build();
        gre[9] = 47;
        set_ipv4_checksum(&mut gre);
        assert_eq!(pass(&mut nat, now, &mut gre), Err(DropReason::NoPorts));
    }

    #[test]
    fn ports_are_the_same_after_a_restart() {
        let ports = || -> Vec<u16> {
            let (mut nat, now) = bed(&[MOVED], None, 1000);
            let mut port = |client_port| {
                let mut bytes = syn(client_port).build();
                assert_eq!(pass(&mut nat, now, &mut bytes), Ok(Outcome::ToServer));
                Parsed::parse(&bytes).unwrap().src_port()
            };
            (1000..1010).map(&mut port).collect()
        };
        let mut first = ports();
        assert_eq!(first, ports());
        first.sort_unstable();
        first.dedup();
        assert_eq!(first.len(), 10, "told apart");
    }

    #[test]
    fn a_flood_takes_no_port_that_is_in_use() {
        let (mut nat, now) = bed(&[MOVED], None, 100_000);
        let mut established = Vec::new();
        for port in 2000..2100 {
            let plan = syn(port);
            let mut bytes = plan.build();
            let _ = pass(&mut nat, now, &mut bytes).unwrap();
            let borrowed = Parsed::parse(&bytes).unwrap().src_port();
            let mut back = Plan {
                dst_port: borrowed,
                flags: SYN | ACK,
                ..Plan::new(Kind::Tcp, SERVER, OWN)
            };
            back.src_port = 80;
            let _ = pass(&mut nat, now, &mut back.build()).unwrap();
            let ack = Plan { flags: ACK, ..plan };
            let _ = pass(&mut nat, now, &mut ack.build()).unwrap();
            established.push((ack, borrowed));
        }
        for source in 0..40_000_u32 {
            let plan = Plan {
                src: IpAddr::from((0x0b00_0000 + source).to_be_bytes()),
                ..syn(3000)
            };
            let _ = pass(&mut nat, now, &mut plan.build()).unwrap();
        }
        let stats = nat.stats();
        assert!(stats.live <= 16_384, "{stats:?}");
        assert!(stats.evicted > 20_000, "{stats:?}");
        for (plan, borrowed) in established {
            let mut bytes = plan.build();
            let _ = pass(&mut nat, now, &mut bytes).unwrap();
            assert_eq!(Parsed::parse(&bytes).unwrap().src_port(), borrowed);
        }
    }

    #[test]
    fn one_host_cannot_use_up_the_ports() {
        for kind in [Kind::Udp, Kind::Tcp] {
            let (mut nat, mut now) = bed(&[MOVED], None, 100_000);
            let mut converse = |now, source: &str, src_port| {
                let plan = Plan {
                    src: source.parse().unwrap(),
                    src_port,
                    flags: SYN,
                    ..Plan::new(kind, CLIENT, MOVED)
                };
                let mut bytes = plan.build();
                let _ = pass(&mut nat, now, &mut bytes)?;
                let mut back = Plan {
                    dst_port: Parsed::parse(&bytes).unwrap().src_port(),
                    flags: SYN | ACK,
                    ..Plan::new(kind, SERVER, OWN)
                };
                back.src_port = plan.dst_port;
                let there = pass(&mut nat, now, &mut back.build())?;
                let ack = Plan { flags: ACK, ..plan };
                let _ = pass(&mut nat, now, &mut ack.build())?;
                Ok::<_, DropReason>(there)
            };
            let greedy = (10_000..30_000)
                .filter(|&port| converse(now, "203.0.113.66", port).is_ok())
                .count();
            assert!(greedy > 15_000, "nobody else wanted them: {greedy}");
            // All in use this very moment, and yet there is one for each other host.
            for client in 0..100 {
                let source = format!("198.18.0.{client}");
                assert_eq!(
                    converse(now, &source, 4_000),
                    Ok(Outcome::ToClient),
                    "{kind:?} {client}"
                );
            }
            now += RECENT_PORT;
            assert!(
                converse(now, "203.0.113.66", 40_000).is_ok(),
                "idle ones go"
            );
            let stats = nat.stats();
            assert!(stats.displaced >= 90, "{stats:?}");
        }
    }

    #[test]
    fn when_all_ports_are_in_use_the_next_is_turned_away() {
        let (mut nat, now) = bed(&[MOVED], None, 100_000);
        let mut udp = |source: u32, dst_port: u16| {
            let plan = Plan {
                src: IpAddr::from((0x0b00_0000 + source).to_be_bytes()),
                dst_port,
                ..Plan::new(Kind::Udp, CLIENT, MOVED)
            };
            let mut bytes = plan.build();
            let _ = pass(&mut nat, now, &mut bytes)?;
            let borrowed = Parsed::parse(&bytes).unwrap().src_port();
            let back = Plan {
                src_port: dst_port,
                dst_port: borrowed,
                ..Plan::new(Kind::Udp, SERVER, OWN)
            };
            let answered = pass(&mut nat, now, &mut back.build());
            // The client goes on, so it is no forged one.
            let _ = pass(&mut nat, now, &mut plan.build())?;
            answered
        };
        let refused = (0..20_000)
            .filter(|&source| udp(source, 53).is_err())
            .count();
        assert!((3_616..4_000).contains(&refused), "{refused}");
        assert_eq!(
            udp(30_000, 54),
            Ok(Outcome::ToClient),
            "another port is free"
        );
        assert_eq!(udp(30_001, 53), Err(DropReason::PortsExhausted));
        // Idle flows give way.
        let mut bytes = Plan::new(Kind::Udp, CLIENT, MOVED);
        bytes.dst_port = 53;
        let late = now + Duration::from_secs(11);
        assert_eq!(
            pass(&mut nat, late, &mut bytes.build()),
            Ok(Outcome::ToServer)
        );
    }
}
