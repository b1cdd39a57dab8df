//! What the role of a server makes of a packet: whose it is, under which addresses it goes on, and
//! who tells its sender when it does not.
//!
//! Owns the difference between the old server's checks ([`Gate`]) and the new server's rewriting
//! ([`Translator`]), so that whoever carries packets asks once and need not know which server this
//! is. Must not touch sockets, devices or the clock.
//!
//! ```text
//!                        old server                       new server
//! TUN ──► judge          a gate takes it, or bounces it   always taken
//!         rewrite        hop limit                        Translator::outbound
//! TUN ◄── inbound        gate, hop limit, link MTU        Translator::inbound
//! ```

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Instant;

use crate::flow::gate::{Gate, Refused, begun};
use crate::flow::hold::Awaits;
use crate::flow::listing::{Flows, Place, Row};
use crate::flow::modes::Taken;
use crate::flow::ownership::Verdict;
use crate::flow::table::FlowStats;
use crate::flow::translate::Translator;
use crate::flow::watch::Observations;
use crate::model::drops::{DropReason, Dropped};
use crate::model::mode::{Mode, ShareKey};
use crate::model::peer::PeerId;
use crate::model::visit::Visited;
use crate::packet::fragment::Client;
use crate::packet::icmp_reply::IcmpError;
use crate::packet::{Family, Parsed};

/// Sends packets on as the role of this server wants it. Shared by the lanes.
#[allow(
    clippy::large_enum_variant,
    reason = "there is one for the whole daemon, and a box would cost every packet"
)]
pub enum Forwarder {
    /// The old server: nothing is rewritten, but only moved addresses pass, and out goes only what
    /// answers a client. One gate for each peer, so that none takes another's places.
    Old(Vec<Arc<Gate>>),
    /// The new server: the flow table rewrites.
    New(Translator),
}

/// Who owns a packet from the TUN.
#[must_use]
pub enum Judgement<'a> {
    /// The tunnel's.
    Carry(Outgoing<'a>),
    /// This host's own: it is written back to the TUN as it is.
    Bounce,
    /// It waits until a hold ends, and is judged once more then.
    Hold,
}

/// How to make a packet that the tunnel takes ready for it.
#[must_use]
pub enum Outgoing<'a> {
    /// It was captured on its way to an address that moved to this peer.
    Captured(PeerId),
    /// The application's host sent it, and the flow table says to whom.
    Returning(&'a Translator),
}

/// What this host is to packets that only pass through it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Hop {
    /// Its own address of each family, which has not moved.
    pub v4: Option<Ipv4Addr>,
    /// See `v4`.
    pub v6: Option<Ipv6Addr>,
    /// MTU of the link to the clients, in bytes; 0 while it is not known.
    pub mtu: usize,
}

/// How the sender of a packet from the TUN is told that it does not go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReplyPath {
    /// Source of the ICMP error.
    pub from: IpAddr,
    /// Who gets it.
    pub to: ReplyTo,
}

/// Who gets an ICMP error about a packet from the TUN. It goes back to the TUN either way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReplyTo {
    /// Whoever has sent it: the error is written as it is. On the old server it leaves through the
    /// uplink.
    Sender,
    /// The application: the error is translated like a client's packet, so that it quotes what the
    /// application's host has sent.
    Application,
}

impl Flows for Forwarder {
    fn slice(&self, now: Instant, from: Place, out: &mut Vec<Row>) -> Option<Place> {
        match self {
            Self::Old(gates) => {
                let Place { part, at } = from;
                let gate = gates.get(part as usize)?;
                let next = gate.slice(now, PeerId(part as u16), at, out);
                match next {
                    Some(at) => Some(Place { part, at }),
                    None if part as usize + 1 < gates.len() => Some(Place {
                        part: part + 1,
                        at: 0,
                    }),
                    None => None,
                }
            }
            Self::New(translator) => translator.slice(now, from, out),
        }
    }
}

impl Default for Forwarder {
    /// That of an old server without peers.
    fn default() -> Self {
        Self::Old(Vec::new())
    }
}

impl Forwarder {
    /// Judges a packet that was read from the TUN, before anything in it is changed.
    ///
    /// # Errors
    /// Those of [`Gate::check_captured`], on the old server.
    #[inline]
    pub fn judge(
        &self,
        now: Instant,
        parsed: &Parsed,
        packet: &[u8],
    ) -> Result<Judgement<'_>, DropReason> {
        match self {
            Self::Old(gates) => judge_captured(gates, now, parsed, packet),
            Self::New(translator) => Ok(Judgement::Carry(Outgoing::Returning(translator))),
        }
    }

    /// Checks and rewrites a packet of `peer`, or the head of a super-packet, that came out of the
    /// tunnel. `partial` says whether its checksum is partial.
    ///
    /// # Errors
    /// Why to drop the packet, which may be rewritten in part then.
    #[inline]
    pub fn inbound(
        &self,
        now: Instant,
        hop: &Hop,
        peer: PeerId,
        packet: &mut [u8],
        parsed: &mut Parsed,
        partial: bool,
    ) -> Result<(), DropReason> {
        match self {
            Self::Old(gates) => gates[usize::from(peer.0)]
                .check_returning(now, parsed, packet, gates)
                .and_then(|()| parsed.decrement_ttl(packet))
                .and_then(|()| fits_link(packet, parsed, hop.mtu)),
            Self::New(translator) => {
                let result = translator.inbound(now, peer, packet, parsed, partial);
                if let Err(reason) = result {
                    translator.turned_away(now, peer, parsed, packet, reason);
                }
                result
            }
        }
    }

    /// How the sender of a packet that was read from the TUN is told why it does not go on.
    pub fn outbound_reply(
        &self,
        about: IcmpError,
        hop: &Hop,
        parsed: &Parsed,
        packet: &[u8],
    ) -> ReplyPath {
        let asked = IpAddr::from(parsed.dst(packet));
        match (self, about) {
            // This server is a hop on the path, which traceroute shows under the server's own
            // address.
            (Self::Old(_), IcmpError::Expired) => ReplyPath {
                from: hop.addr(parsed.family()).unwrap_or(asked),
                to: ReplyTo::Sender,
            },
            // The moved address speaks.
            (Self::Old(_), IcmpError::TooBig(_)) => ReplyPath {
                from: asked,
                to: ReplyTo::Sender,
            },
            // On the new server it began there and has no flow, so nothing has to be translated.
            (_, IcmpError::Prohibited) => ReplyPath {
                from: asked,
                to: ReplyTo::Sender,
            },
            // As far as the application's host can tell, the client speaks. That is the one address
            // that is sure to pass whatever let the client in.
            (Self::New(_), _) => ReplyPath {
                from: asked,
                to: ReplyTo::Application,
            },
        }
    }

    /// The address from which the sender of a packet that came out of the tunnel is told why it
    /// does not go on. The ICMP error goes back into the tunnel. `None` on the new server: what
    /// came there has arrived, and its host speaks for itself.
    pub fn inbound_reply_from(&self, hop: &Hop, parsed: &Parsed, packet: &[u8]) -> Option<IpAddr> {
        match self {
            // The new server's host takes it for a router's, whichever of this server's addresses
            // it comes from.
            Self::Old(_) => Some(
                hop.addr(parsed.family())
                    .unwrap_or_else(|| parsed.src(packet).into()),
            ),
            Self::New(_) => None,
        }
    }

    /// Which end of a packet from the TUN is a client.
    pub fn outbound_client(&self) -> Client {
        match self {
            Self::Old(_) => Client::Source,
            Self::New(_) => Client::Destination,
        }
    }

    /// Which end of a packet out of the tunnel is a client.
    pub fn inbound_client(&self) -> Client {
        match self {
            Self::Old(_) => Client::Destination,
            Self::New(_) => Client::Source,
        }
    }

    /// Lets flows expire, examining at most `budget` of each shard or gate.
    pub fn expire(&self, now: Instant, budget: usize) {
        match self {
            Self::Old(gates) => gates.iter().for_each(|gate| gate.expire(now, budget)),
            Self::New(translator) => {
                translator.expire(now, budget);
            }
        }
    }

    /// Sets this host's own addresses, which no client may have.
    pub fn set_own_addresses(&self, own: &[IpAddr]) {
        match self {
            Self::Old(gates) => gates.iter().for_each(|gate| gate.set_own_addresses(own)),
            Self::New(translator) => translator.set_own_addresses(own),
        }
    }

    /// Sets the modes of a peer's moves, in the order of the settings (old server).
    pub fn set_modes(&self, peer: PeerId, modes: &[Mode<Instant>], key: ShareKey) {
        match self {
            Self::Old(gates) => gates[usize::from(peer.0)].set_modes(modes, key),
            Self::New(_) => {}
        }
    }

    /// Sets until when refusals are kept from the clients of each of a peer's moves, in the order
    /// of the settings (old server).
    pub fn set_shields(&self, peer: PeerId, until: &[Option<Instant>]) {
        match self {
            Self::Old(gates) => gates[usize::from(peer.0)].set_shields(until),
            Self::New(_) => {}
        }
    }

    /// What capture has noted, for whoever judges what it hands over.
    pub fn set_taken(&self, taken: &Arc<dyn Taken>) {
        match self {
            Self::Old(gates) => gates
                .iter()
                .for_each(|gate| gate.set_taken(Arc::clone(taken))),
            Self::New(_) => {}
        }
    }

    /// An example of what `peer` sent and the old server did not let out, since this was asked
    /// last.
    pub fn take_refused(&self, peer: PeerId) -> Option<Refused> {
        match self {
            Self::Old(gates) => gates[usize::from(peer.0)].take_refused(),
            Self::New(_) => None,
        }
    }

    /// The new server's rewriting; `None` on the old server, which has none.
    pub fn translator(&self) -> Option<&Translator> {
        match self {
            Self::Old(_) => None,
            Self::New(translator) => Some(translator),
        }
    }

    /// What a client waits for whose packet went to a peer.
    pub fn awaits_answer(&self, now: Instant, parsed: &Parsed, packet: &[u8]) -> Awaits {
        match self {
            Self::Old(gates) => gates
                .iter()
                .map(|gate| gate.awaits_answer(now, parsed, packet))
                .find(|awaits| *awaits != Awaits::Nothing)
                .unwrap_or(Awaits::Nothing),
            Self::New(_) => Awaits::Nothing,
        }
    }

    /// Whether what clients ask for may be held here.
    pub fn holds(&self) -> bool {
        match self {
            Self::Old(_) => true,
            Self::New(_) => false,
        }
    }

    /// What has become of the newest conversations of `peer`'s clients. Call it every second.
    pub fn observe(&self, now: Instant, peer: PeerId) -> Observations {
        match self {
            Self::Old(gates) => gates[usize::from(peer.0)].observe(now),
            Self::New(translator) => translator.observe(now, peer),
        }
    }

    /// Who came to what has moved (old server), each conversation as [`Gate::visited`] tells it.
    pub fn visited(&self, now: Instant, all: bool) -> Visited<Instant> {
        let mut whole = Visited::default();
        if let Self::Old(gates) = self {
            (gates.iter()).for_each(|gate| whole.add(gate.visited(now, all)));
        }
        whole
    }

    /// How many conversations will be told of once they have settled (old server).
    pub fn settling(&self) -> u64 {
        match self {
            Self::Old(gates) => gates.iter().map(|gate| gate.settling()).sum(),
            Self::New(_) => 0,
        }
    }

    /// These clients came before (old server): see [`Gate::know`].
    pub fn know(&self, clients: &[IpAddr]) {
        if let Self::Old(gates) = self {
            gates.iter().for_each(|gate| gate.know(clients));
        }
    }

    /// Counters of the flows: on the old server of those that go to `peer`, on the new one of all.
    pub fn flow_stats(&self, peer: PeerId) -> FlowStats {
        match self {
            Self::Old(gates) => gates[usize::from(peer.0)].stats(),
            Self::New(translator) => translator.stats(),
        }
    }
}

impl Outgoing<'_> {
    /// Rewrites the packet for the tunnel, and returns the peer that it goes to. `partial`: whether
    /// its checksum is.
    ///
    /// # Errors
    /// Why to drop the packet, which may be rewritten in part then.
    #[inline]
    pub fn rewrite(
        self,
        now: Instant,
        packet: &mut [u8],
        parsed: &mut Parsed,
        partial: bool,
    ) -> Result<PeerId, Dropped> {
        match self {
            Self::Captured(peer) => match parsed.decrement_ttl(packet) {
                Ok(()) => Ok(peer),
                Err(reason) => Err(Dropped::of(peer, reason)),
            },
            Self::Returning(translator) => translator.outbound(now, packet, parsed, partial),
        }
    }
}

impl Hop {
    /// The address that this host speaks from.
    pub fn addr(&self, family: Family) -> Option<IpAddr> {
        match family {
            Family::V4 => self.v4.map(IpAddr::V4),
            Family::V6 => self.v6.map(IpAddr::V6),
        }
    }
}

/// Finds the peer that a captured packet's destination moved to.
#[inline]
fn judge_captured(
    gates: &[Arc<Gate>],
    now: Instant,
    parsed: &Parsed,
    packet: &[u8],
) -> Result<Judgement<'static>, DropReason> {
    let carry = |index: usize| Judgement::Carry(Outgoing::Captured(PeerId(index as u16)));
    if let Some(index) = begun::whose(gates, now, parsed, packet)? {
        return Ok(carry(index));
    }
    let mut outcome = Err(DropReason::NotMoved);
    for (index, gate) in gates.iter().enumerate() {
        match gate.check_moved(now, parsed, packet) {
            Ok(Verdict::Carry) => return Ok(carry(index)),
            // Another part of the address may have moved to another peer.
            Ok(Verdict::Bounce) => outcome = Ok(Judgement::Bounce),
            Ok(Verdict::Hold) => return Ok(Judgement::Hold),
            Err(reason @ DropReason::FragmentUnknown) if outcome.is_err() => outcome = Err(reason),
            // It belongs to this peer, and to none.
            Err(reason @ DropReason::BadSource) => return Err(reason),
            Err(_) => {}
        }
    }
    outcome
}

/// Whether a packet, or each that the head of a super-packet stands for, fits the link to the
/// clients. Nothing else on the path there checks it.
#[inline]
fn fits_link(packet: &[u8], parsed: &Parsed, mtu: usize) -> Result<(), DropReason> {
    if packet.len().min(parsed.total()) > mtu && mtu > 0 {
        return Err(DropReason::TooBig);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::gate::GateConfig;
    use crate::flow::routes::Delivery;
    use crate::flow::seed::Seed;
    use crate::flow::translate::TranslatorConfig;
    use crate::packet::Kind;
    use crate::packet::testing::Plan;
    use crate::testing::epoch;

    const CLIENT: &str = "203.0.113.9";
    const MOVED: &str = "192.0.2.5";
    const DELIVERY: &str = "198.51.100.2";
    const HOP: Hop = Hop {
        v4: Some(Ipv4Addr::new(192, 0, 2, 1)),
        v6: None,
        mtu: 1_500,
    };

    /// The old server, each of whose peers has been given these moves.
    fn old(moves: &[&[&str]]) -> Forwarder {
        let config = GateConfig {
            max_flows: 10,
            seed: Seed::new([1, 2]),
            started: epoch(),
            resumes: false,
        };
        let gate = |moves: &&[&str]| {
            let moves: Vec<_> = moves.iter().map(|text| text.parse().unwrap()).collect();
            Arc::new(Gate::new(&moves, config))
        };
        Forwarder::Old(moves.iter().map(gate).collect())
    }

    /// The new server, to which its only peer has moved [`MOVED`].
    fn new() -> Forwarder {
        let translator = Translator::new(TranslatorConfig {
            shards: 1,
            max_flows: 10,
            seed: [1, 2],
            epoch: epoch(),
            note_ended: false,
        });
        let delivery = Delivery {
            v4: Some(DELIVERY.parse().unwrap()),
            ..Delivery::default()
        };
        let moves = vec![MOVED.parse().unwrap()];
        translator.set_moves(PeerId(0), &moves);
        translator.set_delivery(PeerId(0), delivery);
        Forwarder::New(translator)
    }

    fn request(port: u16) -> Vec<u8> {
        let mut plan = Plan::new(Kind::Udp, CLIENT, MOVED);
        plan.dst_port = port;
        plan.build()
    }

    /// Who owns a packet from the TUN: a peer, or this host (`None`).
    fn judged(forwarder: &Forwarder, packet: &mut [u8]) -> Result<Option<PeerId>, DropReason> {
        let (now, mut parsed) = (epoch(), Parsed::parse(packet)?);
        match forwarder.judge(now, &parsed, packet)? {
            Judgement::Carry(outgoing) => outgoing
                .rewrite(now, packet, &mut parsed, false)
                .map(Some)
                .map_err(|dropped| dropped.reason),
            Judgement::Bounce => Ok(None),
            Judgement::Hold => Err(DropReason::HoldFull),
        }
    }

    #[test]
    fn the_old_server_finds_the_peer_a_port_has_moved_to() {
        let forwarder = old(&[&["192.0.2.5:80"], &["192.0.2.5:443"]]);
        let whose = |port| judged(&forwarder, &mut request(port));
        assert_eq!(whose(80), Ok(Some(PeerId(0))));
        assert_eq!(whose(443), Ok(Some(PeerId(1))));
        assert_eq!(whose(22), Ok(None), "no peer's, so this host's own");
        let elsewhere = Plan::new(Kind::Udp, CLIENT, "192.0.2.6").build();
        assert_eq!(
            judged(&forwarder, &mut elsewhere.clone()),
            Err(DropReason::NotMoved)
        );
    }

    #[test]
    fn the_old_server_says_whose_an_expired_packet_was() {
        let forwarder = old(&[&["192.0.2.6"], &[MOVED]]);
        let mut packet = request(80);
        packet[8] = 1;
        let mut parsed = Parsed::parse(&packet).unwrap();
        let Ok(Judgement::Carry(outgoing)) = forwarder.judge(epoch(), &parsed, &packet) else {
            panic!("not taken");
        };
        assert_eq!(
            outgoing.rewrite(epoch(), &mut packet, &mut parsed, false),
            Err(Dropped::of(PeerId(1), DropReason::TtlExpired))
        );
    }

    #[test]
    fn the_new_server_takes_replies_of_a_flow() {
        let forwarder = new();
        let mut packet = request(80);
        let mut parsed = Parsed::parse(&packet).unwrap();
        let inbound = |packet: &mut [u8], parsed: &mut Parsed| {
            forwarder.inbound(epoch(), &HOP, PeerId(0), packet, parsed, false)
        };
        assert_eq!(inbound(&mut packet, &mut parsed), Ok(()));
        assert_eq!(
            IpAddr::from(parsed.dst(&packet)),
            DELIVERY.parse::<IpAddr>().unwrap()
        );
        let mut plan = Plan::new(Kind::Udp, DELIVERY, CLIENT);
        (plan.src_port, plan.dst_port) = (parsed.dst_port(), parsed.src_port());
        assert_eq!(judged(&forwarder, &mut plan.build()), Ok(Some(PeerId(0))));
        // From another of its addresses, too; but no connection changes its address.
        plan.src = "198.51.100.3".parse().unwrap();
        assert_eq!(judged(&forwarder, &mut plan.build()), Ok(Some(PeerId(0))));
        let tcp = Plan::new(Kind::Tcp, "198.51.100.3", CLIENT);
        assert_eq!(
            judged(&forwarder, &mut tcp.build()),
            Err(DropReason::NoFlow)
        );
        assert_eq!(forwarder.flow_stats(PeerId(0)).live, 1);
    }

    #[test]
    fn a_forged_source_is_refused_whoever_has_the_rest_of_the_address() {
        let forwarder = old(&[&["192.0.2.5:80"], &["192.0.2.5:443"]]);
        forwarder.set_own_addresses(&["192.0.2.1".parse().unwrap()]);
        let from_own = |port| {
            let mut plan = Plan::new(Kind::Udp, "192.0.2.1", MOVED);
            plan.dst_port = port;
            judged(&forwarder, &mut plan.build())
        };
        assert_eq!(from_own(80), Err(DropReason::BadSource));
        assert_eq!(from_own(443), Err(DropReason::BadSource));
        assert_eq!(from_own(22), Ok(None), "no peer's, so this host's own");
    }

    #[test]
    fn each_gate_counts_its_own_flows() {
        let forwarder = old(&[&["192.0.2.5:80"], &["192.0.2.5:443"]]);
        assert_eq!(judged(&forwarder, &mut request(80)), Ok(Some(PeerId(0))));
        let live = [0, 1].map(|peer| forwarder.flow_stats(PeerId(peer)).live);
        assert_eq!(live, [1, 0]);
    }

    #[test]
    fn the_old_server_lets_out_only_what_answers_from_a_moved_address_and_fits_the_link() {
        let forwarder = old(&[&[MOVED]]);
        let mut asked = Plan::new(Kind::Udp, CLIENT, MOVED);
        asked.src_port = 80;
        assert_eq!(judged(&forwarder, &mut asked.build()), Ok(Some(PeerId(0))));
        let narrow = Hop { mtu: 40, ..HOP };
        let unknown = Hop { mtu: 0, ..HOP };
        let leaves = |hop: &Hop, src: &str, payload: usize| {
            let mut plan = Plan::new(Kind::Udp, src, CLIENT);
            plan.payload = vec![0; payload];
            let mut packet = plan.build();
            let mut parsed = Parsed::parse(&packet).unwrap();
            forwarder.inbound(epoch(), hop, PeerId(0), &mut packet, &mut parsed, false)
        };
        assert_eq!(leaves(&HOP, MOVED, 100), Ok(()));
        assert_eq!(leaves(&HOP, "192.0.2.6", 100), Err(DropReason::NotMoved));
        assert_eq!(leaves(&narrow, MOVED, 12), Ok(()));
        assert_eq!(leaves(&narrow, MOVED, 13), Err(DropReason::TooBig));
        assert_eq!(leaves(&unknown, MOVED, 100), Ok(()));
    }

    #[test]
    fn who_speaks_about_a_packet_that_does_not_go_on() {
        let packet = request(80);
        let parsed = Parsed::parse(&packet).unwrap();
        let path = |from: &str, to| ReplyPath {
            from: from.parse().unwrap(),
            to,
        };
        let (old, new, nobody) = (old(&[&[MOVED]]), new(), Hop::default());
        let outbound = |forwarder: &Forwarder, about, hop| {
            forwarder.outbound_reply(about, hop, &parsed, &packet)
        };
        let (hop, expired, big) = ("192.0.2.1", IcmpError::Expired, IcmpError::TooBig(1_300));
        assert_eq!(outbound(&old, expired, &HOP), path(hop, ReplyTo::Sender));
        assert_eq!(
            outbound(&old, expired, &nobody),
            path(MOVED, ReplyTo::Sender)
        );
        assert_eq!(outbound(&old, big, &HOP), path(MOVED, ReplyTo::Sender));
        assert_eq!(outbound(&new, big, &HOP), path(MOVED, ReplyTo::Application));
        let inbound = |forwarder: &Forwarder, hop| {
            let from = forwarder.inbound_reply_from(hop, &parsed, &packet);
            from.map(|addr| addr.to_string())
        };
        assert_eq!(inbound(&old, &HOP).as_deref(), Some(hop));
        assert_eq!(inbound(&old, &nobody).as_deref(), Some(CLIENT));
        assert_eq!(inbound(&new, &HOP), None);
    }
}
