//! The moved address from inside: packets that this host, or one behind it, sends to a moved
//! address that it serves itself.
//!
//! They never enter the tunnel. The translator turns them round: what calls the moved address goes
//! on to where its packets are delivered, and the answer goes back to the caller from the moved
//! address. Both leave by the TUN again, like packets out of the tunnel.
//!
//! ```text
//! caller ── to the moved address ──► call   ── to the delivery address ──► application
//! caller ◄─ from the moved address ─ answer ◄── to the caller ──────────── application
//! ```
//!
//! A host behind this one (a container, a virtual machine) keeps its address. What this host itself
//! sends has the moved address as its source instead: a kernel takes no packet from a link that
//! claims to be from itself. So does a host that *is* the delivery address; and one whose
//! connections stay unanswered, since an answer that finds a shorter way than through this host
//! (application and caller on one bridge, behind DNAT) would not come from the moved address.
//!
//! Owns which flows begin here and how their packets are rewritten. They are in the translator's
//! tables, with [`PeerId::SELF`] and [`PeerId::BEHIND`] in place of a peer, so that they have a
//! share of their own when flows run out. Must not touch sockets, devices or the clock.

use std::time::Instant;

use crate::flow::ended::HostFlow;
use crate::flow::lock;
use crate::flow::routes::{Moved, Routes};
use crate::flow::table::{Inside, Outside};
use crate::flow::translate::Translator;
use crate::flow::weight::Weight;
use crate::model::drops::DropReason;
use crate::model::moved::{TCP, UDP};
use crate::model::peer::PeerId;
use crate::packet::{ACK, Addr, Fragment, ICMP, ICMPV6, Kind, Parsed, Quoted, RST, Rewrite, SYN};

/// The addresses of a packet that was turned round, for its later fragments.
#[derive(Clone, Copy, Debug)]
pub(super) struct Turned {
    /// Whose call it is, or answers.
    peer: PeerId,
    src: Addr,
    dst: Addr,
}

impl Translator {
    /// Turns a packet to a moved address that this host serves round; `None` if it is to no such
    /// address.
    ///
    /// TCP that may as well be an application's answer begins nothing: which caller it answers is
    /// not known any more.
    #[cold]
    pub(super) fn call(
        &self,
        now: Instant,
        bytes: &mut [u8],
        parsed: &mut Parsed,
        partial: bool,
    ) -> Option<Result<PeerId, DropReason>> {
        let routes = self.routes.load();
        let (protocol, kind, port) = (parsed.protocol(), parsed.kind(), parsed.dst_port());
        let moved = routes.inside(parsed.dst(bytes), protocol, kind, port)?;
        Some(moved.and_then(|moved| self.turn_call(now, &routes, &moved, bytes, parsed, partial)))
    }

    fn turn_call(
        &self,
        now: Instant,
        routes: &Routes,
        moved: &Moved,
        bytes: &mut [u8],
        parsed: &mut Parsed,
        partial: bool,
    ) -> Result<PeerId, DropReason> {
        let (delivery, port) = moved.delivery(parsed.kind(), parsed.dst_port())?;
        let client = parsed.src(bytes);
        let key = Outside {
            peer: caller(routes, client, delivery),
            protocol: parsed.protocol(),
            client,
            client_port: parsed.src_port(),
            moved: parsed.dst(bytes),
            moved_port: parsed.dst_port(),
        };
        let (flags, weight) = (parsed.tcp_flags(), Weight::of(parsed));
        let opens = parsed.kind() == Kind::Tcp && flags & (SYN | ACK) == SYN;
        let (key, inside) = match self.called(now, key, weight, opens) {
            Ok(found) => found,
            Err(key) => {
                let may_answer = parsed.kind() == Kind::Tcp
                    && !opens
                    && (flags & (SYN | RST) != 0 || routes.is_delivery(client));
                if may_answer || parsed.kind() == Kind::IcmpReply {
                    return Err(DropReason::NoFlow);
                }
                self.make_space(now, key.peer, key.client);
                (key, self.open_call(now, &key, delivery, port, weight)?)
            }
        };
        let turned = Turned {
            peer: key.peer,
            src: inside.client,
            dst: inside.delivery,
        };
        self.turn(now, turned, bytes, parsed, partial);
        if inside.client_port != key.client_port {
            parsed.set_src_port(bytes, inside.client_port, partial);
        }
        if inside.delivery_port != key.moved_port {
            parsed.set_dst_port(bytes, inside.delivery_port, partial);
        }
        Ok(key.peer)
    }

    /// The flow of a call, if there is one; else the key with which it is to begin.
    fn called(
        &self,
        now: Instant,
        key: Outside,
        weight: Weight,
        opens: bool,
    ) -> Result<(Outside, Inside), Outside> {
        let find = |key: Outside| {
            let mut table = self.table_of(&key);
            let found = table.client_packet(now, &key, weight, &self.limit);
            found.map(|inside| (key, inside))
        };
        let without_address = Outside {
            peer: PeerId::SELF,
            ..key
        };
        let found = find(key).or_else(|| find(without_address)).ok_or(key)?;
        if opens && found.0.peer == PeerId::BEHIND {
            let mut table = self.table_of(&key);
            if table.is_unanswered(&key) {
                table.forget(&key, &self.limit);
                return Err(without_address);
            }
        }
        Ok(found)
    }

    /// Opens the flow of a call.
    fn open_call(
        &self,
        now: Instant,
        key: &Outside,
        delivery: Addr,
        port: u16,
        weight: Weight,
    ) -> Result<Inside, DropReason> {
        let mut table = self.table_of(key);
        // Another lane may have been faster.
        match table.client_packet(now, key, weight, &self.limit) {
            Some(inside) => Ok(inside),
            None => table.open(now, key, delivery, port, weight, &self.limit),
        }
    }

    /// Turns an application's answer to such a call round.
    #[cold]
    pub(super) fn answer(
        &self,
        now: Instant,
        (outside, inside): (&Outside, &Inside),
        bytes: &mut [u8],
        parsed: &mut Parsed,
        partial: bool,
    ) -> PeerId {
        let turned = Turned {
            peer: outside.peer,
            src: outside.moved,
            dst: outside.client,
        };
        self.turn(now, turned, bytes, parsed, partial);
        if outside.moved_port != inside.delivery_port {
            parsed.set_src_port(bytes, outside.moved_port, partial);
        }
        if outside.client_port != inside.client_port {
            parsed.set_dst_port(bytes, outside.client_port, partial);
        }
        outside.peer
    }

    fn turn(&self, now: Instant, turned: Turned, bytes: &mut [u8], parsed: &Parsed, partial: bool) {
        if parsed.fragment() == Fragment::First {
            let mut cache = lock(&self.turned_fragments);
            cache.remember_of(turned.peer, now, &self.seed, parsed, bytes, turned);
        }
        parsed.set_src(bytes, turned.src, partial);
        parsed.set_dst(bytes, turned.dst, partial);
    }

    /// Turns a later fragment round like its first one.
    #[cold]
    pub(super) fn turn_later_fragment(
        &self,
        now: Instant,
        bytes: &mut [u8],
        parsed: &Parsed,
    ) -> Result<PeerId, DropReason> {
        let known = lock(&self.turned_fragments).recall(now, &self.seed, parsed, bytes);
        let turned = known.ok_or(DropReason::FragmentUnknown)?;
        parsed.set_src(bytes, turned.src, false);
        parsed.set_dst(bytes, turned.dst, false);
        Ok(turned.peer)
    }

    /// Finishes an ICMP error about a call, which has the moved address as its source already: it
    /// goes to the caller, and quotes what that has sent.
    #[cold]
    pub(super) fn turn_error(
        &self,
        outside: &Outside,
        quoted: &Quoted,
        bytes: &mut [u8],
        parsed: &Parsed,
        partial: bool,
    ) {
        parsed.set_dst(bytes, outside.client, partial);
        let change = Rewrite {
            src: Some(outside.client),
            ..Rewrite::default()
        };
        quoted.rewrite(bytes, parsed, &change);
    }

    /// Turns a caller's ICMP error about an answer round, if it is one.
    #[cold]
    pub(super) fn callers_error(
        &self,
        quoted: &Quoted,
        bytes: &mut [u8],
        parsed: &Parsed,
        partial: bool,
    ) -> Option<PeerId> {
        let find = |peer| {
            let key = Outside {
                peer,
                protocol: quoted.protocol(),
                client: quoted.dst(bytes),
                client_port: quoted.dst_port(),
                moved: quoted.src(bytes),
                moved_port: quoted.src_port(),
            };
            let inside = self.table_of(&key).peek_outside(&key)?;
            Some((key, inside))
        };
        let (key, inside) = find(PeerId::BEHIND).or_else(|| find(PeerId::SELF))?;
        if key.client == parsed.src(bytes) {
            parsed.set_src(bytes, inside.client, partial);
        }
        parsed.set_dst(bytes, inside.delivery, partial);
        let change = Rewrite {
            src: Some(inside.delivery),
            src_port: Some(inside.delivery_port),
            dst: Some(inside.client),
            dst_port: Some(inside.client_port),
        };
        quoted.rewrite(bytes, parsed, &change);
        Some(key.peer)
    }

    /// Begins flows anew that an earlier daemon had: each from a caller (`local`) to a moved
    /// address (`remote`). Leaves those in the list whose address is not served, as long as it is
    /// not, or is delivered nowhere.
    pub fn restore_calls(&self, now: Instant, calls: &mut Vec<HostFlow>) {
        let routes = self.routes.load();
        calls.retain(|call| {
            let kind = match call.protocol {
                TCP => Kind::Tcp,
                UDP => Kind::Udp,
                ICMP | ICMPV6 => Kind::IcmpQuery,
                _ => Kind::Other,
            };
            let (client, addr) = (call.local.ip().into(), call.remote.ip().into());
            let Some(found) = routes.inside(addr, call.protocol, kind, call.remote.port()) else {
                return true;
            };
            let delivery = found.and_then(|moved| moved.delivery(kind, call.remote.port()));
            if delivery == Err(DropReason::NoDelivery) {
                // It is not known yet, or has gone for a moment.
                return true;
            }
            if let Ok((delivery, port)) = delivery {
                let key = Outside {
                    peer: caller(&routes, client, delivery),
                    protocol: call.protocol,
                    client,
                    client_port: call.local.port(),
                    moved: addr,
                    moved_port: call.remote.port(),
                };
                // Without room the caller's next packet begins it, where one can.
                let _ = self.open_call(now, &key, delivery, port, ACK.into());
            }
            false
        });
    }
}

/// In place of which peer somebody calls.
fn caller(routes: &Routes, client: Addr, delivery: Addr) -> PeerId {
    if client == delivery || routes.is_host(client) {
        PeerId::SELF
    } else {
        PeerId::BEHIND
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::routes::Delivery;
    use crate::flow::testing::{one_port, translator};

    use crate::packet::FIN;
    use crate::packet::testing::{Plan, assert_sums, fragments, plans, reply, too_big};

    use proptest::prelude::*;

    /// Of each family: this host, a container on it, the moved address, where it is delivered.
    const ENDS: [[&str; 4]; 2] = [
        ["198.51.100.2", "172.17.0.5", "192.0.2.5", "198.51.100.2"],
        ["2001:db8:b::2", "fd00::5", "2001:db8:a::5", "2001:db8:b::2"],
    ];
    const PEER: PeerId = PeerId(1);

    struct Bed {
        translator: Translator,
        now: Instant,
    }

    impl Bed {
        fn new(delivery: Delivery) -> Self {
            Self::moving(&["192.0.2.5", "2001:db8:a::5"], delivery)
        }

        fn moving(moves: &[&str], delivery: Delivery) -> Self {
            let (translator, now) = translator(PEER, moves, delivery);
            translator.set_own_addresses(&ENDS.map(|[host, ..]| host.parse().unwrap()));
            Self { translator, now }
        }

        fn sends(&self, plan: &Plan) -> Result<(PeerId, Vec<u8>), DropReason> {
            let mut bytes = plan.build();
            self.turns(&mut bytes).map(|peer| (peer, bytes))
        }

        fn turns(&self, bytes: &mut [u8]) -> Result<PeerId, DropReason> {
            let mut parsed = Parsed::parse(bytes)?;
            let peer = self
                .translator
                .outbound(self.now, bytes, &mut parsed, false)
                .map_err(|dropped| dropped.reason)?;
            assert_eq!(Parsed::parse(bytes), Ok(parsed));
            if parsed.fragment() == Fragment::None {
                assert_sums(bytes);
            }
            Ok(peer)
        }
    }

    fn delivery() -> Delivery {
        Delivery {
            v4: Some(ENDS[0][3].parse().unwrap()),
            v6: Some(ENDS[1][3].parse().unwrap()),
            ..Delivery::default()
        }
    }

    fn call(kind: Kind, from: &str, to: &str) -> Plan {
        Plan {
            flags: SYN,
            ..Plan::new(kind, from, to)
        }
    }

    fn with(plan: &Plan, src: &str, dst: &str) -> Plan {
        Plan {
            src: src.parse().unwrap(),
            dst: dst.parse().unwrap(),
            ..plan.clone()
        }
    }

    const KINDS: [Kind; 3] = [Kind::Tcp, Kind::Udp, Kind::IcmpQuery];

    #[test]
    fn a_call_is_delivered_and_answered_from_the_moved_address() {
        for [host, container, moved, to] in ENDS {
            for (from, seen, peer) in [
                (host, moved, PeerId::SELF),
                (container, container, PeerId::BEHIND),
            ] {
                for kind in KINDS {
                    let bed = Bed::new(delivery());
                    let plan = call(kind, from, moved);
                    let delivered = with(&plan, seen, to);
                    assert_eq!(bed.sends(&plan), Ok((peer, delivered.build())), "{plan:?}");
                    let answer = reply(&delivered);
                    let heard = with(&answer, moved, from);
                    assert_eq!(bed.sends(&answer), Ok((peer, heard.build())), "{answer:?}");
                    assert_eq!(bed.translator.stats().live, 1);
                }
            }
        }
    }

    proptest! {
        #[test]
        fn there_and_back_is_the_identity(
            plan in plans(), partial in any::<bool>(), behind in any::<bool>(),
            mapped in any::<bool>(),
        ) {
            prop_assume!(plan.kind != Kind::IcmpReply);
            let ends = if plan.src.is_ipv4() { ENDS[0] } else { ENDS[1] };
            let [host, container, moved, to] = ends;
            let from = if behind { container } else { host };
            let plan = Plan { flags: SYN, ..with(&plan, from, moved) };
            let partial = partial && plan.kind != Kind::IcmpQuery;
            let mut delivery = delivery();
            if mapped {
                delivery.maps.push(one_port(plan.dst, plan.dst_port, to, 8080));
            }
            let mut wanted = with(&plan, if behind { container } else { moved }, to);
            if mapped && plan.kind != Kind::IcmpQuery { wanted.dst_port = 8080; }
            let bed = Bed::new(delivery);
            let build = |plan: &Plan| if partial { plan.build_partial() } else { plan.build() };
            let turned = |plan: &Plan| {
                let mut bytes = build(plan);
                let mut parsed = Parsed::parse(&bytes).unwrap();
                let peer = bed.translator.outbound(bed.now, &mut bytes, &mut parsed, partial);
                assert_eq!(parsed, Parsed::parse(&bytes).unwrap());
                (peer, bytes)
            };
            let peer = if behind { PeerId::BEHIND } else { PeerId::SELF };
            prop_assert_eq!(turned(&plan), (Ok(peer), build(&wanted)));
            prop_assert_eq!(turned(&reply(&wanted)), (Ok(peer), build(&reply(&plan))));
        }
    }

    #[test]
    fn two_callers_that_would_look_alike_have_ports_of_their_own() {
        let bed = Bed::new(delivery());
        let others = [
            "198.51.100.2".parse().unwrap(),
            "198.51.100.3".parse().unwrap(),
        ];
        bed.translator.set_own_addresses(&others);
        let port = |from: &str| {
            let (_, bytes) = bed.sends(&call(Kind::Tcp, from, "192.0.2.5")).unwrap();
            Parsed::parse(&bytes).unwrap().src_port()
        };
        let (one, other) = (port("198.51.100.2"), port("198.51.100.3"));
        assert_eq!(one, 40_000);
        assert_ne!(other, one);
        for (from, seen) in [("198.51.100.2", one), ("198.51.100.3", other)] {
            let mut answer = Plan::new(Kind::Tcp, "198.51.100.2", "192.0.2.5");
            (answer.src_port, answer.dst_port, answer.flags) = (80, seen, SYN | ACK);
            let mut heard = with(&answer, "192.0.2.5", from);
            heard.dst_port = 40_000;
            assert_eq!(bed.sends(&answer), Ok((PeerId::SELF, heard.build())));
        }
    }

    #[test]
    fn who_is_the_delivery_address_itself_cannot_keep_its_own() {
        let to = Delivery {
            v4: Some("172.17.0.5".parse().unwrap()),
            ..Delivery::default()
        };
        let bed = Bed::new(to);
        let plan = call(Kind::Udp, "172.17.0.5", "192.0.2.5");
        let delivered = with(&plan, "192.0.2.5", "172.17.0.5");
        assert_eq!(bed.sends(&plan), Ok((PeerId::SELF, delivered.build())));
    }

    #[test]
    fn a_connection_that_stays_unanswered_is_tried_again_in_the_moved_addresss_name() {
        let bed = Bed::new(delivery());
        let [_, container, moved, to] = ENDS[0];
        let plan = call(Kind::Tcp, container, moved);
        let kept = with(&plan, container, to).build();
        let instead = with(&plan, moved, to);
        assert_eq!(bed.sends(&plan), Ok((PeerId::BEHIND, kept)));
        assert_eq!(bed.sends(&plan), Ok((PeerId::SELF, instead.build())));
        assert_eq!(bed.translator.stats().live, 1);
        let answer = Plan {
            flags: SYN | ACK,
            ..reply(&instead)
        };
        let heard = with(&answer, moved, container).build();
        assert_eq!(bed.sends(&answer), Ok((PeerId::SELF, heard)));
        let goes_on = Plan { flags: ACK, ..plan };
        assert!(bed.sends(&goes_on).is_ok());
        // One that is answered keeps its address, if its first packet comes again.
        let bed = Bed::new(delivery());
        let mut plan = call(Kind::Tcp, container, moved);
        let (_, delivered) = bed.sends(&plan).unwrap();
        let mut answer = reply(&with(&plan, container, to));
        answer.flags = SYN | ACK;
        bed.sends(&answer).unwrap();
        assert_eq!(bed.sends(&plan), Ok((PeerId::BEHIND, delivered)));
        // And what is no connection keeps it.
        plan.kind = Kind::Udp;
        let kept = with(&plan, container, to).build();
        for _ in 0..3 {
            assert_eq!(bed.sends(&plan), Ok((PeerId::BEHIND, kept.clone())));
        }
    }

    #[test]
    fn what_may_be_an_answer_begins_no_connection() {
        let bed = Bed::new(delivery());
        for [host, container, moved, _] in ENDS {
            for (from, flags, opens) in [
                (host, ACK, false),
                (host, FIN | ACK, false),
                (container, SYN | ACK, false),
                (container, RST, false),
                (container, ACK, true),
            ] {
                let plan = Plan {
                    flags,
                    ..Plan::new(Kind::Tcp, from, moved)
                };
                let expected = if opens {
                    None
                } else {
                    Some(DropReason::NoFlow)
                };
                assert_eq!(bed.sends(&plan).err(), expected, "{plan:?}");
            }
            let pong = Plan::new(Kind::IcmpReply, container, moved);
            assert_eq!(bed.sends(&pong).err(), Some(DropReason::NoFlow));
        }
    }

    #[test]
    fn only_what_is_served_here_and_translated_is_turned_round() {
        let bed = Bed::moving(&["192.0.2.5:80/tcp", "192.0.2.6"], delivery());
        let result = |kind, to: &str| bed.sends(&call(kind, ENDS[0][1], to)).map(|(peer, _)| peer);
        assert_eq!(result(Kind::Tcp, "192.0.2.5"), Ok(PeerId::BEHIND));
        assert_eq!(result(Kind::Udp, "192.0.2.5"), Err(DropReason::NotMoved));
        assert_eq!(
            result(Kind::IcmpQuery, "192.0.2.5"),
            Err(DropReason::NotMoved)
        );
        assert_eq!(result(Kind::Udp, "192.0.2.6"), Ok(PeerId::BEHIND));
        assert_eq!(result(Kind::Tcp, "192.0.2.7"), Err(DropReason::NoFlow));
        let keep = Delivery {
            keep: true,
            ..Delivery::default()
        };
        bed.translator.set_delivery(PEER, keep);
        assert_eq!(result(Kind::Tcp, "192.0.2.6"), Err(DropReason::NoFlow));
    }

    #[test]
    fn a_datagram_to_what_is_served_here_is_no_answer_to_another_peers_client() {
        let bed = Bed::moving(&["192.0.2.5:53/udp"], delivery());
        let other = PeerId(2);
        bed.translator
            .set_moves(other, &["192.0.2.6".parse().unwrap()]);
        bed.translator.set_delivery(other, delivery());
        let [host, _, moved, to] = ENDS[0];
        let mut asked = call(Kind::Udp, host, moved);
        (asked.src_port, asked.dst_port) = (40_000, 53);
        let (peer, there) = bed.sends(&asked).unwrap();
        assert_eq!(peer, PeerId::SELF);
        let parsed = Parsed::parse(&there).unwrap();
        assert_eq!(
            parsed.dst(&there),
            to.parse::<std::net::IpAddr>().unwrap().into()
        );
        // What may be an answer to a client is one, whoever says that its address has moved.
        let mut answers = call(Kind::Udp, host, moved);
        let claimed = "192.0.2.5:40001/udp".parse().unwrap();
        bed.translator.set_moves(PEER, &[claimed]);
        (answers.src_port, answers.dst_port) = (53, 40_001);
        assert_eq!(bed.sends(&answers).unwrap().0, other);
    }

    #[test]
    fn errors_go_to_whom_they_concern_with_what_that_has_sent() {
        for [host, container, moved, to] in ENDS {
            for (from, seen) in [(host, moved), (container, container)] {
                let bed = Bed::new(delivery());
                let sent = call(Kind::Udp, from, moved);
                let delivered = with(&sent, seen, to);
                bed.sends(&sent).unwrap();
                // The application's host about the call.
                let about = |packet: &Plan, from: &str| {
                    let bytes = packet.build();
                    too_big(&bytes, bytes.len(), from.parse().unwrap())
                };
                let mut error = about(&delivered, to);
                assert!(bed.turns(&mut error).unwrap().is_inside());
                assert_eq!(error, about(&sent, moved));
                // The caller about the answer.
                let answer = reply(&delivered);
                let heard = reply(&sent);
                let mut error = about(&heard, from);
                assert!(bed.turns(&mut error).unwrap().is_inside());
                assert_eq!(error, about(&answer, seen));
            }
        }
    }

    #[test]
    fn later_fragments_go_where_the_first_went() {
        for [host, container, moved, to] in ENDS {
            for (from, seen) in [(container, container), (host, moved)] {
                let bed = Bed::new(delivery());
                let mut sent = call(Kind::Udp, from, moved);
                sent.payload = (0..3_000).map(|i| i as u8).collect();
                let delivered = with(&sent, seen, to);
                for (id, plan, wanted) in [
                    (7, sent.clone(), delivered.clone()),
                    (8, reply(&delivered), reply(&sent)),
                ] {
                    let mut parts = fragments(&plan.build(), 1_000, id);
                    let mut later = parts[1].clone();
                    let unknown = Err(DropReason::FragmentUnknown);
                    assert_eq!(bed.turns(&mut later), unknown);
                    for part in &mut parts {
                        assert!(bed.turns(part).unwrap().is_inside());
                    }
                    assert_eq!(parts, fragments(&wanted.build(), 1_000, id));
                }
            }
        }
    }

    #[test]
    fn flows_of_an_earlier_daemon_are_there_once_their_address_is_served() {
        let bed = Bed::moving(&[], Delivery::default());
        let [host, container, moved, to] = ENDS[0];
        let one = |from: &str| HostFlow {
            protocol: TCP,
            local: format!("{from}:40000").parse().unwrap(),
            remote: format!("{moved}:80").parse().unwrap(),
        };
        let mut calls = vec![one(host), one(container)];
        bed.translator.restore_calls(bed.now, &mut calls);
        assert_eq!(calls.len(), 2);
        bed.translator.set_moves(PEER, &[moved.parse().unwrap()]);
        bed.translator.restore_calls(bed.now, &mut calls);
        assert_eq!(calls.len(), 2, "nobody knows where to");
        bed.translator.set_delivery(PEER, delivery());
        bed.translator.restore_calls(bed.now, &mut calls);
        assert!(calls.is_empty());
        for (from, seen) in [(host, moved), (container, container)] {
            let answer = reply(&with(&Plan::new(Kind::Tcp, from, moved), seen, to));
            let heard = with(&answer, moved, from).build();
            assert_eq!(bed.sends(&answer).map(|(_, bytes)| bytes), Ok(heard));
        }
    }

    #[test]
    fn flows_from_inside_are_told_when_they_end() {
        let bed = Bed::new(delivery());
        let [host, _, moved, to] = ENDS[0];
        bed.sends(&call(Kind::Udp, host, moved)).unwrap();
        let flow = HostFlow {
            protocol: UDP,
            local: format!("{to}:80").parse().unwrap(),
            remote: format!("{moved}:40000").parse().unwrap(),
        };
        assert!(bed.translator.knows(&flow));
        let later = bed.now + std::time::Duration::from_secs(1_000);
        bed.translator.expire(later, usize::MAX);
        let mut ended = Vec::new();
        bed.translator.take_ended(&mut ended);
        assert_eq!(ended, [flow]);
    }
}
