//! The moved address from inside: which packets call one that this server serves, and by which way
//! a caller gets its answers.
//!
//! Owns the memory of that and the phrases by which programs ask it. A call is taken into the TUN
//! where it is seen first: at the egress of a link, where this host sends it, by
//! [`take_replies`](super::take_replies()); at the ingress of a link that hosts behind this one
//! use, before anything has translated its source, by [`callers`](super::callers()).
//!
//! ```text
//! struct caller { u32 ifindex; u32 leaves; u64 seen; }
//!            `leaves`: the answer leaves by that link, past the stack, as the call came in past
//!            it. Otherwise it arrives there, where the stack, which has sent the call, and its
//!            connection tracking expect it.
//! callers    by the key of a flow, from the caller to the moved address; for those whose answers
//!            leave, also by the addresses alone (protocol and the last part are 0)
//! moved      the number of the set of ports that have moved, by prefix; WHOLE for everything
//! ports      by that number, the protocol and the port: something, if it has moved
//! ```
//!
//! A TCP connection is a call if its SYN was one. So one that is older than the move of its address
//! stays where it is.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use Reg::{R0, R1, R2, R3, R10};

use super::flows::{
    FlowMaps, KEY, KEY_LAST, KEY_LOCAL, KEY_REMOTE, OWN_KEPT, REFRESH, VALUE, enter, flow_of,
    jump_if_within, look_up, look_up_route_of_key, now, shape,
};
use super::headers::{fib, icmp, icmpv4, icmpv6, skb};
use super::inports::{MAX_INHERITED, MAX_PARTS, PORT_KEY_BYTES, Plan, Ports, keys};
use super::moved::{Family, Moved};
use super::parse::{HEADER, load_syn};
use super::phrases::{PACKET, PROTOCOL, jump_if_icmp, jump_if_v6, look_up_at};
use super::sockets::{load_tcp_socket, remember_as_it_is};
use crate::flow::ended::HostFlow;
use crate::kernel::bpf::{
    Alu, Assembler, BpfError, Helper, If, Label, Map, MapKind, Reg, Shape, Size,
};
use crate::model::moved::{Move, TCP, UDP};
use crate::packet::SYN;

/// Calls that are remembered. The one used least recently gives way; its next packet enters it
/// again, but TCP of a host behind this one goes on only after a new SYN. 65,536 take 8 MB.
const MAX_CALLS: u32 = 65_536;

/// How long after the start what an earlier daemon carried calls to counts as served: its peer may
/// have to be called, and each try takes 5 s.
const INHERITED_FOR: Duration = Duration::from_secs(60);

/// How a caller's answers get to it.
const CALLER_IFINDEX: i16 = 0;
const CALLER_LEAVES: i16 = 4;
const CALLER_SEEN: i16 = 8;
const CALLER_BYTES: usize = 16;

/// In place of a number: everything has moved.
const WHOLE: u32 = 0;

/// Where the stack keeps a moved address that is looked up, behind a word for its length; and the
/// key of a port. The transport header, which lies there, is lost.
pub(super) const ADDRESS: i16 = HEADER + 4;
const PORT_KEY: i16 = HEADER;

/// Where it keeps `struct bpf_fib_lookup`.
pub(super) const ROUTE: i16 = -168;

const CALLERS: Shape = shape(MapKind::LruHash, "ipmoved_callers", CALLER_BYTES, MAX_CALLS);
const PORTS: Shape = Shape {
    kind: MapKind::LpmTrie,
    name: "ipmoved_inports",
    key_size: PORT_KEY_BYTES,
    value_size: 4,
    // Old and new ones together, while they change.
    max_entries: 2 * MAX_PARTS as u32,
};

/// By which way a call comes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Way {
    /// It leaves this host's stack. Its answer arrives at the same link.
    OutOfTheStack,
    /// It comes in. Its answer leaves by the same link.
    PastTheStack,
}

/// What the programs know of calls.
#[derive(Debug)]
pub struct Inside {
    pub(super) moved: Moved,
    ports: Map,
    served: Mutex<Served>,
    pub(super) callers: Map,
}

/// What is in `moved` and in `ports`.
#[derive(Debug, Default)]
struct Served {
    /// What was asked for last, of each peer, unless it failed.
    last: Option<Vec<Vec<Move>>>,
    /// The peers of which not all fits.
    left_out: Vec<usize>,
    /// The sets of ports and their numbers. A set keeps its number, and its number has no other
    /// ports, so what stays served is served at every moment.
    sets: HashMap<Ports, u32>,
    used_numbers: HashSet<u32>,
    last_number: u32,
    /// What an earlier daemon carried calls to, until a peer says anew what moves.
    inherited: BTreeSet<IpAddr>,
    /// When that ends.
    inherited_until: Duration,
}

impl Served {
    /// A number that no set has.
    fn new_number(&mut self) -> u32 {
        loop {
            self.last_number = self.last_number.wrapping_add(1);
            if self.last_number != WHOLE && !self.used_numbers.contains(&self.last_number) {
                return self.last_number;
            }
        }
    }

    fn is_last(&self, of_peers: &[Vec<&Move>]) -> bool {
        self.last.as_ref().is_some_and(|last| {
            let same = |(a, b): (&Vec<Move>, &Vec<&Move>)| a.iter().eq(b.iter().copied());
            last.len() == of_peers.len() && last.iter().zip(of_peers).all(same)
        })
    }
}

impl Inside {
    /// Nothing is served at first, but for the addresses that an earlier daemon carried calls to:
    /// the packets of these calls are not to end up elsewhere before their peer is there again.
    ///
    /// The memory of callers is among `found`, if it is there.
    pub(super) fn new(found: impl FnOnce(Shape) -> Option<Map>) -> Result<Self, BpfError> {
        let found = found(CALLERS);
        let inherits = found.is_some();
        let inside = Self {
            moved: Moved::new()?,
            ports: Map::new(PORTS)?,
            served: Mutex::default(),
            callers: match found {
                Some(map) => map,
                None => Map::new(CALLERS)?,
            },
        };
        if inherits {
            let called: BTreeSet<IpAddr> = (inside.calls()?.iter())
                .map(|call| call.remote.ip())
                .collect();
            let mut served = inside.lock();
            served.inherited = called.into_iter().take(MAX_INHERITED).collect();
            served.inherited_until = now() + INHERITED_FOR;
            let whole = served.inherited.iter().map(|&addr| (addr.into(), WHOLE));
            inside.moved.update(whole)?;
            drop(served);
        }
        Ok(inside)
    }

    fn lock(&self) -> MutexGuard<'_, Served> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether something is served only because an earlier daemon served it. Then
    /// [`serve`](Self::serve) wants to be called now and then.
    pub fn inherits(&self) -> bool {
        !self.lock().inherited.is_empty()
    }

    /// From now on this is served, of each peer, and nothing else but what is inherited. Returns
    /// the places of those peers of which not all fits.
    ///
    /// # Errors
    /// If the kernel refuses. Some of it may be in effect then; the next call makes good for it.
    pub fn serve(&self, of_peers: &[Vec<&Move>]) -> Result<Vec<usize>, BpfError> {
        let mut served = self.lock();
        let ends = !served.inherited.is_empty() && now() >= served.inherited_until;
        if served.is_last(of_peers) && !ends {
            return Ok(served.left_out.clone());
        }
        served.last = None;
        let plan = Plan::of(of_peers);
        // An address is known only while its ports are.
        let mut numbers = Vec::with_capacity(plan.sets.len());
        for ports in &plan.sets {
            let number = match served.sets.get(ports) {
                Some(&number) => number,
                None => {
                    let number = served.new_number();
                    self.enter_ports(number, ports)?;
                    served.used_numbers.insert(number);
                    served.sets.insert(ports.clone(), number);
                    number
                }
            };
            numbers.push(number);
        }
        if ends {
            served.inherited.clear();
        }
        served.inherited.retain(|&addr| !plan.contains(addr));
        let inherited = served.inherited.iter().map(|&addr| (addr.into(), WHOLE));
        let planned = plan.prefixes().map(|(prefix, set)| {
            let number = set.map_or(WHOLE, |set| numbers[set]);
            (prefix, number)
        });
        self.moved.update(inherited.chain(planned))?;
        let wanted: HashSet<&Ports> = plan.sets.iter().collect();
        let gone = served.sets.keys().filter(|ports| !wanted.contains(ports));
        for ports in gone.cloned().collect::<Vec<_>>() {
            if let Some(number) = served.sets.remove(&ports) {
                self.remove_ports(number, &ports);
                served.used_numbers.remove(&number);
            }
        }
        let cloned = of_peers
            .iter()
            .map(|moves| moves.iter().copied().cloned().collect());
        served.last = Some(cloned.collect());
        served.left_out.clone_from(&plan.left_out);
        Ok(plan.left_out)
    }

    /// Enters the ports of a set, or none of them.
    fn enter_ports(&self, number: u32, ports: &Ports) -> Result<(), BpfError> {
        for key in keys(number, ports) {
            if let Err(errno) = self.ports.insert(&key, &[1, 0, 0, 0]) {
                self.remove_ports(number, ports);
                return Err(BpfError::of_map(PORTS.name)(errno));
            }
        }
        Ok(())
    }

    /// Removes the ports of a set, as far as they are there.
    fn remove_ports(&self, number: u32, ports: &Ports) {
        for key in keys(number, ports) {
            let _ = self.ports.remove(&key);
        }
    }

    /// The calls that were in use of late: each from a caller (`local`) to a moved address.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn calls(&self) -> Result<Vec<HostFlow>, BpfError> {
        let now = now();
        let mut calls = Vec::new();
        for key in (self.callers.keys()).map_err(BpfError::of_map(CALLERS.name))? {
            let mut value = [0; CALLER_BYTES];
            if !self.callers.read(&key, &mut value) {
                continue;
            }
            let seen = value[CALLER_SEEN as usize..].first_chunk::<8>();
            let seen = seen.map_or(0, |bytes| u64::from_ne_bytes(*bytes));
            let call = flow_of(&key).filter(|call| call.protocol != 0);
            if u128::from(seen) + OWN_KEPT.as_nanos() >= now.as_nanos() {
                calls.extend(call);
            }
        }
        Ok(calls)
    }
}

/// Jumps to `yes` if the remote address of the key is a moved one that is served, with what else
/// the key says; to `no` otherwise. The transport header on the stack is lost.
pub(super) fn branch_if_served(a: &mut Assembler, inside: &Inside, yes: Label, no: Label) {
    let (some, v6, look) = (a.label(), a.label(), a.label());
    jump_if_v6(a, v6);
    for family in [Family::V4, Family::V6] {
        if family == Family::V6 {
            a.bind(v6);
        }
        for word in (0..family.bytes() as i16).step_by(4) {
            a.load(Size::W, R0, R10, KEY_REMOTE + word);
            a.store(Size::W, R10, ADDRESS + word, R0);
        }
        inside.moved.look_up(a, family, ADDRESS);
        a.jump(look);
    }
    a.bind(look);
    a.jump_if_wide(R0, If::Eq, 0, no);
    a.load(Size::W, R1, R0, 0);
    a.jump_if(R1, If::Eq, WHOLE, yes);
    for protocol in [TCP, UDP] {
        a.jump_if(PROTOCOL, If::Eq, i32::from(protocol), some);
    }
    a.jump(no);
    a.bind(some);
    a.store(Size::W, R10, PORT_KEY, 64);
    a.store(Size::W, R10, PORT_KEY + 4, R1);
    a.store(Size::H, R10, PORT_KEY + 8, 0);
    a.store(Size::B, R10, PORT_KEY + 8, PROTOCOL);
    a.load(Size::H, R0, R10, KEY_LAST);
    a.store(Size::H, R10, PORT_KEY + 10, R0);
    look_up_at(a, &inside.ports, PORT_KEY);
    a.jump_if_wide(R0, If::Eq, 0, no);
    a.jump(yes);
}

/// Looks where a route leads to the caller of the key. Jumps to `found` with the interface in the
/// answer ([`ROUTE`]); otherwise R0 says why not.
pub(super) fn look_up_way_to_caller(a: &mut Assembler, tun_ifindex: u32, found: Label) {
    look_up_route_of_key(a, ROUTE, tun_ifindex, (KEY_REMOTE, KEY_LOCAL), found);
}

/// If the packet with this key, which is about to leave, is a call of this host: jumps to `hit`.
/// Goes on if it is not.
///
/// What it forwards is its call only if it bears its address: then something has translated the
/// source, and translates the answer back. A socket of TCP is asked no more after its SYN.
pub(super) fn jump_if_call(a: &mut Assembler, maps: &FlowMaps, tun_ifindex: u32, hit: Label) {
    let inside = &maps.inside;
    let (no, ask, served) = (a.label(), a.label(), a.label());
    let (own, begins, new) = (a.label(), a.label(), a.label());
    // What of ICMP belongs to a flow answers a query, and is none.
    jump_if_icmp(a, no);
    a.load(Size::W, R0, PACKET, skb::INGRESS_IFINDEX);
    a.jump_if(R0, If::Ne, 0, ask);
    a.jump_if(PROTOCOL, If::Ne, i32::from(TCP), ask);
    if maps.sockets.is_some() {
        load_tcp_socket(a, ask, no);
        jump_if_it_begins(a, ask);
        a.jump(no);
    }
    a.bind(ask);
    branch_if_served(a, inside, served, no);
    a.bind(served);
    a.load(Size::W, R0, PACKET, skb::INGRESS_IFINDEX);
    a.jump_if(R0, If::Ne, 0, own);
    if let Some(sockets) = &maps.sockets {
        load_tcp_socket(a, own, no);
        remember_as_it_is(a, sockets);
        note_caller(a, inside, Way::OutOfTheStack);
        a.jump(hit);
    }
    a.bind(own);
    jump_if_it_begins(a, begins);
    look_up(a, &inside.callers);
    a.jump_if_wide(R0, If::Ne, 0, hit);
    a.jump(no);
    a.bind(begins);
    // It may answer somebody who came directly, whoever says that this address has moved.
    look_up(a, &maps.direct);
    a.jump_if_wide(R0, If::Ne, 0, no);
    a.load(Size::W, R0, PACKET, skb::INGRESS_IFINDEX);
    a.jump_if(R0, If::Eq, 0, new);
    look_up_way_to_caller(a, tun_ifindex, no);
    a.jump_if(R0, If::Ne, fib::NOT_FORWARDED, no);
    a.bind(new);
    note_caller_once(a, inside, Way::OutOfTheStack);
    a.jump(hit);
    a.bind(no);
}

/// As [`jump_if_call`] for an ICMP query, whose header is on the stack. Its answer needs no memory.
pub(super) fn jump_if_query(
    a: &mut Assembler,
    inside: &Inside,
    tun_ifindex: u32,
    hit: Label,
    no: Label,
) {
    let served = a.label();
    jump_unless_query(a, no);
    branch_if_served(a, inside, served, no);
    a.bind(served);
    a.load(Size::W, R0, PACKET, skb::INGRESS_IFINDEX);
    a.jump_if(R0, If::Eq, 0, hit);
    look_up_way_to_caller(a, tun_ifindex, no);
    a.jump_if(R0, If::Eq, fib::NOT_FORWARDED, hit);
    a.jump(no);
}

/// Goes on if the packet of a host is an ICMP query, whose header is on the stack; jumps to `other`
/// otherwise.
pub(super) fn jump_unless_query(a: &mut Assembler, other: Label) {
    let (v4, query) = (a.label(), a.label());
    a.load(Size::B, R0, R10, HEADER + icmp::TYPE as i16);
    a.jump_if(PROTOCOL, If::Eq, i32::from(icmpv4::PROTOCOL), v4);
    a.jump_if(PROTOCOL, If::Ne, i32::from(icmpv6::PROTOCOL), other);
    a.jump_if(R0, If::Eq, icmpv6::ECHO_REQUEST, query);
    a.jump(other);
    a.bind(v4);
    for kind in icmpv4::QUERIES {
        a.jump_if(R0, If::Eq, kind, query);
    }
    a.jump(other);
    a.bind(query);
}

/// Jumps to `begins` if the packet is the first of a TCP connection, or is not TCP.
pub(super) fn jump_if_it_begins(a: &mut Assembler, begins: Label) {
    a.jump_if(PROTOCOL, If::Ne, i32::from(TCP), begins);
    load_syn(a);
    a.jump_if(R0, If::Eq, i32::from(SYN), begins);
}

/// Remembers by which way the caller of the key gets its answers: the interface is `ifindex`.
/// Destroys R1 to R5.
pub(super) fn note_caller(a: &mut Assembler, inside: &Inside, way: Way) {
    a.load(Size::W, R0, PACKET, skb::IFINDEX);
    a.store(Size::W, R10, VALUE + CALLER_IFINDEX, R0);
    let leaves = i32::from(way == Way::PastTheStack);
    a.store(Size::W, R10, VALUE + CALLER_LEAVES, leaves);
    a.call(Helper::KtimeGetNs);
    a.store(Size::Dw, R10, VALUE + CALLER_SEEN, R0);
    enter(a, &inside.callers);
}

/// As [`note_caller`], unless it is remembered: a packet of most calls writes nothing.
pub(super) fn note_caller_once(a: &mut Assembler, inside: &Inside, way: Way) {
    let (new, known) = (a.label(), a.label());
    look_up(a, &inside.callers);
    a.jump_if_wide(R0, If::Eq, 0, new);
    a.load(Size::W, R1, R0, CALLER_IFINDEX);
    a.load(Size::W, R2, PACKET, skb::IFINDEX);
    a.jump_if(R1, If::Eq, R2, known);
    a.bind(new);
    note_caller(a, inside, way);
    a.bind(known);
}

/// The key's addresses alone.
pub(super) fn key_by_addresses(a: &mut Assembler) {
    a.load(Size::W, R0, R10, KEY);
    a.alu(Alu::And, R0, 0xff00);
    a.store(Size::W, R10, KEY, R0);
    a.store(Size::W, R10, KEY_LAST, 0);
}

/// If the packet with this key, which comes from the TUN, answers a call: jumps to `arrives` with
/// `link` = the link where it arrives, or to `leaves` with that by which it leaves. Goes on if it
/// does not. `entry` is destroyed.
pub(super) fn jump_if_answer(
    a: &mut Assembler,
    inside: &Inside,
    (entry, link): (Reg, Reg),
    arrives: Label,
    leaves: Label,
) {
    let (no, fresh) = (a.label(), a.label());
    look_up(a, &inside.callers);
    a.jump_if_wide(R0, If::Eq, 0, no);
    a.mov(entry, R0);
    jump_if_within(a, (entry, CALLER_SEEN), REFRESH, fresh);
    a.store(Size::Dw, entry, CALLER_SEEN, R0);
    a.bind(fresh);
    a.load(Size::W, link, entry, CALLER_IFINDEX);
    a.load(Size::W, R3, entry, CALLER_LEAVES);
    a.jump_if(R3, If::Ne, 0, leaves);
    a.jump(arrives);
    a.bind(no);
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, OwnedFd};

    use proptest::prelude::*;
    use proptest::test_runner::TestRunner;

    use super::*;
    use crate::kernel::bpf::test_run::run;
    use crate::kernel::programs::parse::{Side, Ways, parse};
    use crate::kernel::programs::phrases::{TC_ACT_UNSPEC, keep_packet, verdict};
    use crate::kernel::programs::take_replies;
    use crate::kernel::programs::testing::icmp as icmp_message;
    use crate::kernel::programs::testing::{L2, Packet, frame, moves, ports, taken, tcp};
    use crate::kernel::testing::{capabilities_of_the_unit, in_fresh_namespace, keep_only};
    use crate::model::moved::{Transport, merged};

    /// Serves this, as that of one peer.
    fn serve(inside: &Inside, moves: &[Move]) {
        assert!(inside.serve(&[moves.iter().collect()]).unwrap().is_empty());
    }

    /// A program that takes what is served.
    fn served(inside: &Inside) -> OwnedFd {
        let mut asm = Assembler::new();
        let a = &mut asm;
        let ways = Ways::new(a);
        let (yes, no) = (a.label(), a.label());
        keep_packet(a);
        parse(a, L2, Side::Host, ways);
        a.bind(ways.none);
        jump_unless_query(a, no);
        a.jump(ways.flow);
        a.bind(ways.flow);
        branch_if_served(a, inside, yes, no);
        a.bind(yes);
        verdict(a, 7);
        for label in [no, ways.later, ways.quoted, ways.other] {
            a.bind(label);
        }
        verdict(a, TC_ACT_UNSPEC);
        asm.finish("ipmoved_test").unwrap().load().unwrap()
    }

    fn any_move() -> impl Strategy<Value = Move> {
        let prefix = prop::sample::select(vec![
            "192.0.2.0/28",
            "192.0.2.5",
            "192.0.2.6",
            "2001:db8::/124",
            "2001:db8::5",
        ]);
        let ports = prop::collection::vec((1u16..40, 0u16..20), 0..4);
        let transport =
            prop::sample::select(vec![None, Some(Transport::Tcp), Some(Transport::Udp)]);
        (prefix, ports, transport).prop_map(|(prefix, ports, transport)| Move {
            prefix: prefix.parse().unwrap(),
            ports: merged(
                ports
                    .iter()
                    .map(|&(first, more)| first..=first + more)
                    .collect(),
            ),
            transport,
        })
    }

    fn any_packet() -> impl Strategy<Value = Packet> {
        let protocol = prop::sample::select(vec![TCP, UDP, 47]);
        (any::<bool>(), 0u8..20, protocol, 0u16..64).prop_map(|(v6, host, protocol, port)| {
            let (src, dst) = if v6 {
                ("2001:db8:b::2".into(), format!("2001:db8::{host:x}"))
            } else {
                ("198.51.100.2".to_owned(), format!("192.0.2.{host}"))
            };
            Packet::new(&src, &dst, protocol, ports(40_000, port))
        })
    }

    #[test]
    fn what_is_served_is_what_has_moved() {
        in_fresh_namespace(|| {
            keep_only(capabilities_of_the_unit());
            let inside = Inside::new(|_| None).unwrap();
            let program = served(&inside);
            let strategy = (
                prop::collection::vec(any_move(), 0..6),
                prop::collection::vec(any_packet(), 1..40),
            );
            let mut runner = TestRunner::new(ProptestConfig::with_cases(60));
            runner
                .run(&strategy, |(moves, packets)| {
                    serve(&inside, &moves);
                    for packet in packets {
                        let port = (packet.protocol != 47)
                            .then(|| u16::from_be_bytes([packet.payload[2], packet.payload[3]]));
                        let expected = moves.iter().any(|moved| {
                            moved.prefix.contains(packet.dst) && moved.takes(packet.protocol, port)
                        });
                        prop_assert_eq!(taken(program.as_fd(), &packet), expected, "{:?}", packet);
                    }
                    Ok(())
                })
                .unwrap();
        });
    }

    /// The new server's program at the egress of a link, and what it serves.
    fn at_egress(served: &[&str]) -> (FlowMaps, OwnedFd) {
        let maps = FlowMaps::new(1000).expect("run the tests as root");
        serve(maps.inside(), &moves(served));
        let program = take_replies(&maps, L2, 1, 51820, &[])
            .unwrap()
            .load()
            .unwrap();
        (maps, program)
    }

    const ENDS: [[&str; 3]; 2] = [
        ["198.51.100.2", "192.0.2.5", "192.0.2.6"],
        ["2001:db8:b::2", "2001:db8:a::5", "2001:db8:a::6"],
    ];

    #[test]
    fn calls_are_taken_and_what_belongs_to_others_is_not() {
        for [here, moved, other] in ENDS {
            let (_maps, program) = at_egress(&[moved]);
            let takes = |packet: &Packet| taken(program.as_fd(), packet);
            let (icmp, query, answer) = if here.contains(':') {
                (icmpv6::PROTOCOL, 128, 129)
            } else {
                (icmpv4::PROTOCOL, 8, 0)
            };
            for (protocol, payload, expected) in [
                (TCP, tcp(40_000, 80, SYN), true),
                (UDP, ports(40_000, 53), true),
                (47, ports(1, 2), true),
                (icmp, icmp_message(query, 7), true),
                (icmp, icmp_message(answer, 7), false),
                // Not the tunnel's own: no socket of it sends that.
                (UDP, ports(51820, 51820), true),
            ] {
                let packet = Packet::new(here, moved, protocol, payload);
                assert_eq!(takes(&packet), expected, "{packet:?}");
                let elsewhere = Packet {
                    dst: other.parse().unwrap(),
                    ..packet
                };
                assert!(!takes(&elsewhere), "{elsewhere:?}");
            }
            // Neighbour discovery asks the address itself.
            if here.contains(':') {
                for kind in [130, 133, 135, 136, 143] {
                    let packet = Packet::new(here, moved, icmp, icmp_message(kind, 0));
                    assert!(!takes(&packet), "{kind}");
                }
            }
            // An error about the answer to a call goes where the call went.
            let heard = Packet::new(moved, here, UDP, ports(53, 40_000));
            assert!(takes(&Packet::icmp_error(here, &heard)));
            let heard = Packet::new(moved, here, UDP, ports(53, 40_001));
            assert!(!takes(&Packet::icmp_error(here, &heard)));
        }
    }

    #[test]
    fn all_fragments_of_a_call_are_taken() {
        for [here, moved, _] in ENDS {
            let (_maps, program) = at_egress(&[moved]);
            let takes = |offset, more| {
                let packet = Packet::new(here, moved, UDP, ports(40_000, 53));
                let fragment = Some((7, offset, more));
                taken(program.as_fd(), &Packet { fragment, ..packet })
            };
            assert!(!takes(3, true));
            assert!(takes(0, true) && takes(3, true) && takes(6, false));
            assert!(!takes(3, true), "the last one has gone");
        }
    }

    #[test]
    fn whoever_came_directly_is_answered_directly_whoever_names_its_address() {
        for [here, moved, _] in ENDS {
            let (maps, program) = at_egress(&[]);
            let arrivals = crate::kernel::programs::arrivals(&maps, L2, 51820).unwrap();
            let arrivals = arrivals.load().unwrap();
            let asks = Packet::new(moved, here, UDP, ports(40_000, 53));
            assert!(!taken(arrivals.as_fd(), &asks));
            serve(maps.inside(), &moves(&[moved]));
            let answers = Packet::new(here, moved, UDP, ports(53, 40_000));
            assert!(!taken(program.as_fd(), &answers));
            let calls = Packet::new(here, moved, UDP, ports(53, 40_001));
            assert!(taken(program.as_fd(), &calls));
        }
    }

    #[test]
    fn calls_are_found_again_and_others_are_not_asked_about() {
        let (maps, program) = at_egress(&["192.0.2.5"]);
        let [here, moved, other] = ENDS[0];
        for to in [moved, other] {
            run(
                program.as_fd(),
                &frame(&Packet::new(here, to, UDP, ports(7, 53)).bytes()),
            );
        }
        let call = HostFlow {
            protocol: UDP,
            local: format!("{here}:7").parse().unwrap(),
            remote: format!("{moved}:53").parse().unwrap(),
        };
        assert_eq!(maps.inside().calls().unwrap(), [call]);
        let lasting: Vec<OwnedFd> = (maps.lasting().iter())
            .map(|fd| fd.try_clone_to_owned().unwrap())
            .collect();
        let next = FlowMaps::found(&lasting, 1000).unwrap().unwrap();
        assert_eq!(next.inside().calls().unwrap(), [call]);
    }

    /// The daemon was killed, and its peer has not said yet what moves.
    #[test]
    fn what_an_earlier_daemon_carried_calls_to_is_served_until_its_peer_speaks() {
        let [here, moved, other] = ENDS[0];
        let (maps, program) = at_egress(&[moved]);
        let call = Packet::new(here, moved, UDP, ports(7, 53));
        assert!(taken(program.as_fd(), &call));
        let lasting: Vec<OwnedFd> = (maps.lasting().iter())
            .map(|fd| fd.try_clone_to_owned().unwrap())
            .collect();
        let next = || {
            let next = FlowMaps::found(&lasting, 1000).unwrap().unwrap();
            let program = take_replies(&next, L2, 1, 51820, &[]).unwrap();
            (next, program.load().unwrap())
        };
        let elsewhere = Packet::new(here, other, UDP, ports(7, 53));
        let (maps, program) = next();
        assert!(maps.inside().inherits());
        for served in [&[][..], &[other][..]] {
            // Another peer was there first.
            serve(maps.inside(), &moves(served));
            assert!(taken(program.as_fd(), &call));
            assert_eq!(taken(program.as_fd(), &elsewhere), !served.is_empty());
        }
        serve(maps.inside(), &moves(&["192.0.2.5:54"]));
        assert!(!maps.inside().inherits() && !taken(program.as_fd(), &call));
        // A peer that does not come back keeps nobody here for ever.
        let (maps, program) = next();
        serve(maps.inside(), &[]);
        maps.inside().lock().inherited_until = now();
        assert!(taken(program.as_fd(), &call));
        serve(maps.inside(), &[]);
        assert!(!maps.inside().inherits() && !taken(program.as_fd(), &call));
    }

    #[test]
    fn what_stays_keeps_its_number_and_what_did_not_change_is_not_written_again() {
        in_fresh_namespace(|| {
            let inside = Inside::new(|_| None).unwrap();
            serve(&inside, &moves(&["192.0.2.5:80", "192.0.2.6:443"]));
            let sets = inside.lock().sets.clone();
            serve(&inside, &moves(&["192.0.2.4:22", "192.0.2.6:443"]));
            let kept = inside.lock().sets.clone();
            let same = kept
                .iter()
                .filter(|(ports, at)| sets.get(*ports) == Some(*at));
            assert_eq!((kept.len(), same.count()), (2, 1));
            assert_eq!(inside.ports.keys().unwrap().len(), 4);
            // Behind its back, to see whether it looks.
            for key in inside.ports.keys().unwrap() {
                inside.ports.remove(&key).unwrap();
            }
            serve(&inside, &moves(&["192.0.2.4:22", "192.0.2.6:443"]));
            assert!(inside.ports.keys().unwrap().is_empty());
        });
    }

    /// 16,384 moves, and one peer that has more ports than there is space for.
    #[test]
    fn a_peer_that_names_too_much_does_not_keep_others_from_being_served() {
        in_fresh_namespace(|| {
            let inside = Inside::new(|_| None).unwrap();
            let program = served(&inside);
            let greedy: Vec<Move> = (0..4000u32)
                .map(|n| Move {
                    prefix: IpAddr::from(std::net::Ipv4Addr::from_bits(0x0a00_0000 + n)).into(),
                    ports: (0..16)
                        .map(|i| 4001 * i + n as u16..=4001 * i + n as u16)
                        .collect(),
                    transport: None,
                })
                .collect();
            let modest = moves(&["192.0.2.5:80"]);
            let of_peers = [greedy.iter().collect(), modest.iter().collect()];
            assert_eq!(inside.serve(&of_peers).unwrap(), [0]);
            let to = |dst, port| Packet::new("198.51.100.2", dst, TCP, ports(40_000, port));
            assert!(taken(program.as_fd(), &to("192.0.2.5", 80)));
            assert!(!taken(program.as_fd(), &to("10.0.0.0", 0)));
        });
    }
}
