//! Connections that begin on the new server: from which moved address they leave, if they may.
//!
//! Owns the decision about a packet of this host of which no flow is known, and the words for those
//! that are refused. The table makes the flow; from then on it is one like any other. Must not
//! touch sockets, devices or the clock.
//!
//! ```text
//! source is a moved address ──► its peer ─────────────┐ --outgoing here? --allow-outgoing there?
//! source is this host's own ──► the rule of its port ─┴─► moved address, and the program's port if
//!     (--outgoing PORTS)                                  that is free at the other end
//! ```
//!
//! The kernel's program chose what comes here by its port, and by user and control group where the
//! rule names them; here the port alone tells which rule it was. So the settings let no two rules
//! send one port to different addresses.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use crate::flow::lock;
use crate::flow::routes::Routes;
use crate::flow::table::Inside;
use crate::model::drops::{DropReason, Dropped};
use crate::model::moved::{TCP, UDP};
use crate::model::outgoing::{ByPort, PortEnd};
use crate::model::peer::PeerId;
use crate::packet::{ACK, Addr, Kind, Parsed, ProtocolName, RST, SYN};

/// What may leave from the moved addresses of one peer that answers nobody.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct OutgoingRules {
    /// `--outgoing` is given: programs may speak that are bound to a moved address.
    pub on: bool,
    /// Whether the old server lets such connections out, once it has said so.
    pub allowed: Option<bool>,
    /// What leaves from a moved address because of its port.
    pub by_port: Vec<ByPort>,
}

/// A packet of this host that was to leave from a moved address, and may not.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RefusedOutgoing {
    /// Why.
    pub reason: DropReason,
    /// Its source.
    pub from: IpAddr,
    /// Its destination.
    pub to: IpAddr,
    /// Its IP protocol.
    pub protocol: u8,
    /// Its destination port, if it has one.
    pub port: Option<u16>,
}

/// An example of what was refused of late for each peer, for people.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    /// Whether there is one, so that a flood of them takes no lock.
    noted: AtomicBool,
    examples: Mutex<BTreeMap<PeerId, RefusedOutgoing>>,
}

impl Refusals {
    /// Keeps a packet as an example, unless its peer has one.
    fn note(&self, peer: PeerId, refused: RefusedOutgoing) {
        if self.noted.load(Relaxed)
            && let Ok(examples) = self.examples.try_lock()
            && examples.contains_key(&peer)
        {
            return;
        }
        lock(&self.examples).entry(peer).or_insert(refused);
        self.noted.store(true, Relaxed);
    }

    /// An example for each peer since the last call.
    pub(super) fn take(&self) -> BTreeMap<PeerId, RefusedOutgoing> {
        if !self.noted.swap(false, Relaxed) {
            return BTreeMap::new();
        }
        std::mem::take(&mut lock(&self.examples))
    }
}

/// Through whom, and from which moved address, a connection leaves that begins with this packet, or
/// goes on with it after a restart.
///
/// # Errors
/// [`DropReason::NoFlow`] if it is none that could; [`DropReason::BadDestination`],
/// [`DropReason::OutgoingOff`], [`DropReason::OutgoingNotAllowed`],
/// [`DropReason::OutgoingNoAddress`] if it may not; [`DropReason::NoSession`] if nobody knows yet.
#[cold]
pub(super) fn origin(
    routes: &Routes,
    refusals: &Refusals,
    key: &Inside,
    parsed: &Parsed,
) -> Result<(PeerId, Addr), Dropped> {
    if !may_begin(parsed) {
        return Err(DropReason::NoFlow.into());
    }
    let (peer, from) = match bound(routes, key.delivery) {
        Some(peer) => (peer, Some(key.delivery)),
        None => by_port(routes, key).ok_or(DropReason::NoFlow)?,
    };
    let rules = routes.outgoing(peer);
    let reason = match from {
        _ if !rules.on => DropReason::OutgoingOff,
        // It is tried again, and nobody is told that it cannot be.
        _ if rules.allowed.is_none() => return Err(Dropped::of(peer, DropReason::NoSession)),
        _ if rules.allowed == Some(false) => DropReason::OutgoingNotAllowed,
        None => DropReason::OutgoingNoAddress,
        Some(_) if key.client.is_special() || routes.is_own(peer, key.client) => {
            return Err(Dropped::of(peer, DropReason::BadDestination));
        }
        Some(from) => return Ok((peer, from)),
    };
    let refused = RefusedOutgoing {
        reason,
        from: key.delivery.into(),
        to: key.client.into(),
        protocol: key.protocol,
        port: parsed.kind().has_ports().then_some(key.client_port),
    };
    refusals.note(peer, refused);
    Err(Dropped::of(peer, reason))
}

/// Whether a program sends that is bound to a moved address, where packets are delivered to others.
pub(super) fn is_bound(routes: &Routes, key: &Inside) -> bool {
    !routes.is_delivery(key.delivery) && routes.peers_of(key.delivery).next().is_some()
}

/// Whether a rule names the packet's ports.
pub(super) fn is_by_port(routes: &Routes, key: &Inside) -> bool {
    by_port(routes, key).is_some()
}

/// Whether a rule names the packet's ports, so that it is no answer of an earlier daemon's flow.
///
/// Of TCP a rule of destinations does: its connections go to ports from which no client speaks. By
/// their source, a server's answers look the same as what it begins.
pub(super) fn precedes_answers(routes: &Routes, key: &Inside, parsed: &Parsed) -> bool {
    let Some((_, rule)) = rule_of(routes, key) else {
        return false;
    };
    let by_destination = rule.ports.end == PortEnd::Destination;
    let surely = parsed.kind() == Kind::Udp || (by_destination && may_begin(parsed));
    surely || !routes.is_delivery(key.delivery)
}

/// As [`origin`], of a flow through this peer that began here under an earlier daemon; `None` if it
/// did not begin here.
pub(super) fn earlier_origin(routes: &Routes, peer: PeerId, key: &Inside) -> Option<Addr> {
    if !routes.outgoing(peer).on {
        return None;
    }
    if routes.has_moved(peer, key.delivery) {
        return Some(key.delivery);
    }
    let (of, from) = by_port(routes, key)?;
    from.filter(|_| of == peer)
}

/// Whether a packet may be the first that is seen of a connection of this side. Of TCP it may be
/// any but an answer: the connection may be older than this daemon.
fn may_begin(parsed: &Parsed) -> bool {
    match parsed.kind() {
        Kind::Tcp => {
            let flags = parsed.tcp_flags();
            flags & RST == 0 && flags & (SYN | ACK) != SYN | ACK
        }
        Kind::Udp | Kind::IcmpQuery | Kind::Other => true,
        Kind::IcmpReply | Kind::IcmpError | Kind::LaterFragment => false,
    }
}

/// The peer that has moved this address here. Where several have moved parts of it, one that may
/// begin connections comes first.
fn bound(routes: &Routes, source: Addr) -> Option<PeerId> {
    let of_address = routes.peers_of(source);
    of_address.max_by_key(|&peer| {
        let rules = routes.outgoing(peer);
        // Of those that are equal the first one.
        (rules.on, rules.allowed, std::cmp::Reverse(peer))
    })
}

/// The peer whose rule the packet's ports fit, and the moved address that the rule means; `None` in
/// its place if it is not clear.
fn by_port(routes: &Routes, key: &Inside) -> Option<(PeerId, Option<Addr>)> {
    let (peer, rule) = rule_of(routes, key)?;
    let from = match rule.from {
        Some(from) => Some(Addr::from(from)).filter(|&from| routes.has_moved(peer, from)),
        None => routes.only_moved(peer, IpAddr::from(key.delivery).is_ipv4()),
    };
    Some((peer, from))
}

/// The rule that the packet's ports fit, and its peer.
fn rule_of<'r>(routes: &'r Routes, key: &Inside) -> Option<(PeerId, &'r ByPort)> {
    let has_ports = matches!(key.protocol, TCP | UDP);
    if !has_ports || !routes.is_host(key.delivery) {
        return None;
    }
    let is_v4 = IpAddr::from(key.delivery).is_ipv4();
    let (source, destination) = (key.delivery_port, key.client_port);
    let fits = |rule: &&ByPort| {
        rule.from.is_none_or(|from| from.is_ipv4() == is_v4)
            && rule.ports.takes(key.protocol, source, destination)
    };
    routes.peer_ids().find_map(|peer| {
        let rule = routes.outgoing(peer).by_port.iter().find(fits)?;
        Some((peer, rule))
    })
}

impl fmt::Display for RefusedOutgoing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = ProtocolName(self.protocol);
        write!(f, "{protocol} from {} to {}", self.from, self.to)?;
        match self.port {
            Some(port) => write!(f, " port {port}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::flow::ended::HostFlow;
    use crate::flow::routes::Delivery;
    use crate::flow::testing::translator;
    use crate::flow::translate::Translator;
    use crate::packet::testing::{Plan, assert_sums, reply, too_big};

    const PEER: PeerId = PeerId(0);
    const REMOTE: &str = "203.0.113.9";
    const MOVED: &str = "192.0.2.5";
    const HERE: &str = "198.51.100.2";
    const OTHER_HERE: &str = "198.51.100.77";

    struct Bed {
        translator: Translator,
        now: Instant,
    }

    impl Bed {
        /// Everything is allowed, and these rules are given.
        fn new(moves: &[&str], rules: &[&str]) -> Self {
            let delivery = Delivery {
                v4: Some(HERE.parse().unwrap()),
                ..Delivery::default()
            };
            let (translator, now) = translator(PEER, moves, delivery);
            translator.set_own_addresses(&[HERE, OTHER_HERE].map(|it| it.parse().unwrap()));
            let by_port = rules.iter().map(|text| match text.parse().unwrap() {
                crate::model::outgoing::Outgoing::ByPort(by_port) => by_port,
                other => panic!("{other}"),
            });
            let rules = OutgoingRules {
                on: true,
                allowed: Some(true),
                by_port: by_port.collect(),
            };
            translator.set_outgoing(PEER, rules);
            Self { translator, now }
        }

        fn outbound(&self, bytes: &mut [u8]) -> Result<PeerId, DropReason> {
            let mut parsed = Parsed::parse(bytes)?;
            let result = self
                .translator
                .outbound(self.now, bytes, &mut parsed, false);
            let peer = result.map_err(|drop| drop.reason)?;
            assert_eq!(Parsed::parse(bytes), Ok(parsed));
            Ok(peer)
        }

        fn inbound(&self, bytes: &mut [u8]) -> Result<(), DropReason> {
            let mut parsed = Parsed::parse(bytes)?;
            (self.translator).inbound(self.now, PEER, bytes, &mut parsed, false)?;
            assert_eq!(Parsed::parse(bytes), Ok(parsed));
            Ok(())
        }

        /// Sends out; returns the source address and port that the remote sees.
        fn seen_as(&self, plan: &Plan) -> (String, u16) {
            let mut bytes = plan.build();
            assert_eq!(self.outbound(&mut bytes), Ok(PEER), "{plan:?}");
            assert_sums(&bytes);
            let parsed = Parsed::parse(&bytes).unwrap();
            let from = IpAddr::from(parsed.src(&bytes)).to_string();
            (from, parsed.src_port())
        }
    }

    /// The first packet to the remote's port 25 from port 40000 here.
    fn begins(kind: Kind, from: &str) -> Plan {
        Plan {
            flags: SYN,
            src_port: 40_000,
            dst_port: 25,
            ..Plan::new(kind, from, REMOTE)
        }
    }

    /// Its answer, as the remote sends it to where it saw the packet come from.
    fn answer(plan: &Plan, seen: &(String, u16)) -> Plan {
        let mut plan = plan.clone();
        (plan.src, plan.src_port) = (seen.0.parse().unwrap(), seen.1);
        let mut answer = reply(&plan);
        answer.flags = SYN | ACK;
        answer
    }

    #[test]
    fn what_begins_here_leaves_from_the_moved_address_and_is_answered() {
        for (rules, source) in [
            (&[][..], MOVED),
            (&["25"][..], HERE),
            (&["25"][..], OTHER_HERE),
        ] {
            for kind in [Kind::Tcp, Kind::Udp, Kind::IcmpQuery] {
                if kind == Kind::IcmpQuery && source != MOVED {
                    continue;
                }
                let bed = Bed::new(&[MOVED], rules);
                let plan = begins(kind, source);
                let seen = bed.seen_as(&plan);
                assert_eq!(seen, (MOVED.to_owned(), 40_000));
                assert_eq!(bed.seen_as(&plan), seen, "once more");
                let mut back = answer(&plan, &seen).build();
                assert_eq!(bed.inbound(&mut back), Ok(()));
                assert_sums(&back);
                let parsed = Parsed::parse(&back).unwrap();
                assert_eq!(IpAddr::from(parsed.dst(&back)).to_string(), source);
                assert_eq!(parsed.dst_port(), 40_000);
                // An error about it finds its way as well, and quotes what was sent.
                let mut sent = plan.build();
                bed.outbound(&mut sent).unwrap();
                let mut error = too_big(&sent, sent.len(), "203.0.113.1".parse().unwrap());
                assert_eq!(bed.inbound(&mut error), Ok(()));
                let parsed = Parsed::parse(&error).unwrap();
                assert_eq!(IpAddr::from(parsed.dst(&error)).to_string(), source);
            }
        }
    }

    #[test]
    fn a_client_with_the_same_ports_keeps_its_own_and_the_program_gets_another() {
        let bed = Bed::new(&[MOVED], &["25/tcp"]);
        // The remote is a client of our port 40000, from its port 25.
        let mut request = answer(&begins(Kind::Tcp, MOVED), &(MOVED.into(), 40_000));
        request.flags = SYN;
        let mut bytes = request.build();
        assert_eq!(bed.inbound(&mut bytes), Ok(()));
        for source in [MOVED, OTHER_HERE] {
            let plan = begins(Kind::Tcp, source);
            let seen = bed.seen_as(&plan);
            assert_eq!(seen.0, MOVED);
            assert_ne!(seen.1, 40_000);
            let mut back = answer(&plan, &seen).build();
            assert_eq!(bed.inbound(&mut back), Ok(()));
            let parsed = Parsed::parse(&back).unwrap();
            assert_eq!(IpAddr::from(parsed.dst(&back)).to_string(), source);
            assert_eq!(parsed.dst_port(), 40_000);
        }
        // The client is still one.
        let mut bytes = request.build();
        assert_eq!(bed.inbound(&mut bytes), Ok(()));
        let parsed = Parsed::parse(&bytes).unwrap();
        assert_eq!(IpAddr::from(parsed.dst(&bytes)).to_string(), HERE);
    }

    #[test]
    fn answers_come_to_a_port_that_has_not_moved() {
        let bed = Bed::new(&["192.0.2.5:25/tcp"], &[]);
        let plan = begins(Kind::Tcp, MOVED);
        let mut early = answer(&plan, &(MOVED.into(), 40_000)).build();
        assert_eq!(bed.inbound(&mut early), Err(DropReason::NotMoved));
        let seen = bed.seen_as(&plan);
        assert_eq!(bed.inbound(&mut answer(&plan, &seen).build()), Ok(()));
    }

    #[test]
    fn what_may_not_leave_is_refused_with_its_reason_and_noted() {
        let bed = Bed::new(&[MOVED, "192.0.2.6"], &["25/tcp", "587/tcp,as=192.0.2.6"]);
        let rules = |on, allowed| OutgoingRules {
            on,
            allowed,
            by_port: vec![],
        };
        let refused = |plan: &Plan| bed.outbound(&mut plan.build()).unwrap_err();
        bed.translator.set_outgoing(PEER, rules(true, None));
        assert_eq!(refused(&begins(Kind::Tcp, MOVED)), DropReason::NoSession);
        assert!(bed.translator.take_refused_outgoing().is_empty());
        let bed = Bed::new(&[MOVED, "192.0.2.6"], &["25/tcp", "587/tcp,as=192.0.2.6"]);
        let refused = |plan: &Plan| bed.outbound(&mut plan.build()).unwrap_err();
        // By port: which of the two?
        assert_eq!(
            refused(&begins(Kind::Tcp, HERE)),
            DropReason::OutgoingNoAddress
        );
        let mut submission = begins(Kind::Tcp, HERE);
        submission.dst_port = 587;
        assert_eq!(bed.seen_as(&submission).0, "192.0.2.6");
        let mut web = submission.clone();
        web.dst_port = 443;
        assert_eq!(refused(&web), DropReason::NoFlow, "it is nobody's");
        for kind in [Kind::Tcp, Kind::Udp, Kind::IcmpQuery] {
            let mut special = begins(kind, MOVED);
            special.dst = "224.0.0.9".parse().unwrap();
            assert_eq!(refused(&special), DropReason::BadDestination);
            special.dst = HERE.parse().unwrap();
            assert_eq!(refused(&special), DropReason::BadDestination);
        }
        let taken = bed.translator.take_refused_outgoing();
        assert_eq!(taken[&PEER].reason, DropReason::OutgoingNoAddress);
        for (rules, reason) in [
            (rules(false, Some(true)), DropReason::OutgoingOff),
            (rules(true, Some(false)), DropReason::OutgoingNotAllowed),
        ] {
            bed.translator.set_outgoing(PEER, rules);
            for kind in [Kind::Tcp, Kind::IcmpQuery] {
                let mut plan = begins(kind, MOVED);
                plan.src_port = 41_000;
                assert_eq!(refused(&plan), reason);
            }
            let taken = bed.translator.take_refused_outgoing();
            assert_eq!(taken[&PEER].reason, reason);
            assert!(bed.translator.take_refused_outgoing().is_empty());
        }
        bed.translator.set_outgoing(PEER, rules(true, Some(true)));
        for flags in [SYN | ACK, RST, RST | ACK] {
            let mut plan = begins(Kind::Tcp, MOVED);
            (plan.flags, plan.src_port) = (flags, 42_000);
            assert_eq!(refused(&plan), DropReason::NoFlow, "it answers somebody");
        }
    }

    #[test]
    fn what_is_refused_by_its_port_ends_for_the_kernel_as_well() {
        let rules = ["25/tcp", "53/udp"];
        let ended = |bed: &Bed| {
            let mut ended = Vec::new();
            assert_eq!(bed.translator.take_ended(&mut ended), 0);
            ended
        };
        let set = |bed: &Bed, allowed, by_port| {
            let rules = OutgoingRules {
                on: true,
                allowed,
                by_port,
            };
            bed.translator.set_outgoing(PEER, rules);
        };
        let by_port = || -> Vec<ByPort> {
            let parse = |text: &str| match text.parse().unwrap() {
                crate::model::outgoing::Outgoing::ByPort(by_port) => by_port,
                other => panic!("{other}"),
            };
            rules.map(parse).into()
        };
        for (kind, port) in [(Kind::Tcp, 25), (Kind::Udp, 53)] {
            for source in [HERE, OTHER_HERE] {
                let mut plan = begins(kind, source);
                plan.dst_port = port;
                let flow = HostFlow {
                    protocol: plan.build()[9],
                    local: format!("{source}:40000").parse().unwrap(),
                    remote: format!("{REMOTE}:{port}").parse().unwrap(),
                };
                let refused = |bed: &Bed, plan: &Plan| bed.outbound(&mut plan.build()).unwrap_err();
                let bed = Bed::new(&[MOVED], &rules);
                set(&bed, Some(false), by_port());
                assert_eq!(refused(&bed, &plan), DropReason::OutgoingNotAllowed);
                assert_eq!(ended(&bed), [flow]);
                let bed = Bed::new(&[MOVED, "192.0.2.6"], &rules);
                assert_eq!(refused(&bed, &plan), DropReason::OutgoingNoAddress);
                assert_eq!(ended(&bed), [flow]);
                let mut special = plan.clone();
                special.dst = "224.0.0.9".parse().unwrap();
                let bed = Bed::new(&[MOVED], &rules);
                assert_eq!(refused(&bed, &special), DropReason::BadDestination);
                assert_eq!(ended(&bed).len(), 1);
                // Without a session only what is surely new: the rest may go on with one.
                set(&bed, None, by_port());
                assert_eq!(refused(&bed, &plan), DropReason::NoSession);
                assert_eq!(ended(&bed).len(), usize::from(kind == Kind::Tcp));
                plan.flags = ACK;
                assert_eq!(refused(&bed, &plan), DropReason::NoSession);
                assert_eq!(ended(&bed), []);
                // What is taken in the end has not ended.
                plan.flags = SYN;
                assert_eq!(refused(&bed, &plan), DropReason::NoSession);
                set(&bed, Some(true), by_port());
                assert_eq!(bed.seen_as(&plan).0, MOVED);
                assert_eq!(ended(&bed), []);
            }
        }
        // What is bound to the moved address has no entry there.
        let bed = Bed::new(&[MOVED], &rules);
        set(&bed, Some(false), by_port());
        assert!(bed.outbound(&mut begins(Kind::Tcp, MOVED).build()).is_err());
        assert_eq!(ended(&bed), []);
    }

    #[test]
    fn what_a_rule_names_leaves_as_it_says_right_after_the_start_too() {
        for (kind, port, flags) in [(Kind::Udp, 53, 0), (Kind::Tcp, 25, ACK)] {
            let rules = ["53/udp,as=192.0.2.6", "25/tcp,as=192.0.2.6"];
            let bed = Bed::new(&[MOVED, "192.0.2.6:26/tcp"], &rules);
            let mut plan = begins(kind, HERE);
            (plan.dst_port, plan.flags) = (port, flags);
            assert_eq!(bed.seen_as(&plan).0, "192.0.2.6");
            let bed = Bed::new(&[MOVED, "192.0.2.6:26/tcp"], &rules);
            let mut rules = OutgoingRules {
                on: true,
                allowed: Some(false),
                by_port: vec![],
            };
            for text in ["53/udp,as=192.0.2.6", "25/tcp,as=192.0.2.6"] {
                if let crate::model::outgoing::Outgoing::ByPort(it) = text.parse().unwrap() {
                    rules.by_port.push(it);
                }
            }
            bed.translator.set_outgoing(PEER, rules);
            let refused = bed.outbound(&mut plan.build());
            assert_eq!(refused, Err(DropReason::OutgoingNotAllowed));
        }
        // A server's answer is one, though a rule names its port as that of what it begins.
        let bed = Bed::new(&[MOVED, "192.0.2.6:26/tcp"], &["from:20/tcp,as=192.0.2.6"]);
        let mut answers = begins(Kind::Tcp, HERE);
        (answers.src_port, answers.dst_port, answers.flags) = (20, 50_000, ACK);
        assert_eq!(bed.seen_as(&answers).0, MOVED);
    }

    #[test]
    fn a_second_flow_to_the_same_remote_end_is_no_answer_from_an_unmoved_port() {
        let bed = Bed::new(&["192.0.2.5:25/tcp"], &["53/udp"]);
        let mut plan = begins(Kind::Udp, HERE);
        plan.dst_port = 53;
        for port in [40_000, 40_001, 40_002] {
            plan.src_port = port;
            assert_eq!(bed.seen_as(&plan).0, MOVED);
        }
        assert!(bed.translator.take_unmoved_ports().is_empty());
    }

    #[test]
    fn connections_of_this_side_outlive_a_restart() {
        let later = Bed::new(&[MOVED], &["25/tcp"]);
        for source in [MOVED, OTHER_HERE] {
            let mut plan = begins(Kind::Tcp, source);
            plan.flags = ACK;
            assert_eq!(later.seen_as(&plan).0, MOVED);
        }
    }

    #[test]
    fn the_remote_may_be_the_first_to_speak_after_a_restart() {
        let later = Bed::new(&[MOVED], &["25/tcp"]);
        let flow = |local: &str| HostFlow {
            protocol: TCP,
            local: format!("{local}:40000").parse().unwrap(),
            remote: format!("{REMOTE}:25").parse().unwrap(),
        };
        let delivered_to = |bed: &Bed| {
            let mut plan = answer(&begins(Kind::Tcp, MOVED), &(MOVED.into(), 40_000));
            plan.flags = ACK;
            let mut bytes = plan.build();
            assert_eq!(bed.inbound(&mut bytes), Ok(()));
            IpAddr::from(Parsed::parse(&bytes).unwrap().dst(&bytes)).to_string()
        };
        for local in [MOVED, OTHER_HERE] {
            let moves = vec![MOVED.parse().unwrap()];
            let later = Bed::new(&[], &["25/tcp"]);
            let kept = [flow(local), flow("198.51.100.3")];
            later
                .translator
                .set_moves_again(later.now, PEER, &moves, &[], &kept);
            assert_eq!(delivered_to(&later), local);
            assert_eq!(later.translator.stats().live, 1);
        }
        assert_eq!(
            delivered_to(&later),
            HERE,
            "without memory it is taken for a client's"
        );
    }
}
