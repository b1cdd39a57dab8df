//! What begins on the new server: phrases of the program at the egress of its links
//! ([`take_replies`](super::take_replies())) for packets of which no flow is known.
//!
//! Nothing leaves from a moved address but through the tunnel, whatever it is: what is neither a
//! reply nor allowed goes there as well, and the daemon drops, counts and explains it. So it holds
//! while the tunnel is down (the daemon drops it) and while the daemon is dead (the TUN is gone,
//! and the kernel drops what is redirected there). Only what goes to a network behind this host,
//! such as a container that asks for the moved address, goes there as it is.
//!
//! What leaves from an address of this host's own is taken if a rule of `--outgoing` names its
//! port, and from then on its flow is known like that of a client. Of TCP the first packet decides,
//! so connections that are direct stay direct. What answers somebody who came directly is not
//! taken.
//!
//! ```text
//! miss:    // before anything is remembered of a direct conversation
//!     if (!(TCP with SYN, without ACK) && !UDP) no;
//!     for each rule: if (protocol, port, uid and cgroup fit) goto fits;
//!     no;
//! fits:
//!     if (UDP && come = lookup(in, key)) {
//!         if (!come->unawaited || !from a socket at this port) no;
//!     } else if (UDP && !lookup(own, key) && it is related) hit;  // see `related`
//!     if (!(places[ip.saddr] & OWN) || places[ip.daddr] & NEAR) no;
//!     delete(own, key); update(own, remote end, now);
//!     if (update(flows, key, { now, 0, 0, 0, UDP ? BEGUN_HERE : 0 })) { count; drop; }
//!     if (it is from a TCP socket) storage(sockets) = 1;
//!     hit;
//!
//! leaves:  // of every kind, before it passes
//!     if (ip.saddr is not within the bounds of all that has moved) pass;
//!     if (!(places[ip.saddr] & MOVED) || own neighbour discovery) pass;
//!     if (!forwarded) { if (places[ip.daddr] & BEHIND) pass; }
//!     else if (places[ip.daddr] & NETWORK) pass;
//!     else if (fib_lookup(from ip.daddr to ip.saddr) == skb->ingress_ifindex) pass;
//!     if (TCP) delete(own, key);
//!     if (it is from a TCP socket) storage(sockets) = 1;
//!     return redirect(tun, 0);
//! ```

use Reg::{R0, R1, R2, R7, R10};

use super::directly::UNAWAITED;
use super::flows::{
    BEGUN_HERE, Counter, FLOW_ASKED_DIRECTLY, FLOW_ENTRANCE, FLOW_HEARD, FLOW_SEEN, FLOW_UNAWAITED,
    FLOW_VALUE, FlowMaps, KEY, KEY_LAST, VALUE, count, enter_from, look_up, remove,
};
use super::headers::{fib, icmp, icmpv6, ipv6, skb};
use super::inside::ROUTE;
use super::parse::load_syn;
use super::phrases::{
    PACKET, PROTOCOL, TC_ACT_SHOT, branch_by_family, jump_if_link_scoped_icmpv6, look_up_at,
    look_up_route, redirect_to, verdict,
};
use super::places::{Place, Places, Which};
use super::related::{jump_if_related, remember_remote_end};
use super::sockets::{jump_unless_from_own_port, load_port, load_tcp_socket, remember_as_it_is};
use crate::kernel::bpf::{Alu, Assembler, Helper, If, Label, Reg, Size};
use crate::model::moved::{TCP, UDP};
use crate::model::outgoing::{PortEnd, PortSet};
use crate::packet::SYN;

/// Connections that leave from a moved address because of their port.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Chosen {
    /// The ports.
    pub ports: PortSet,
    /// Only those of the user with this number.
    pub user: Option<u32>,
    /// Only those of a control group that lies so deep below the root, and of those below it.
    /// Which group that is, [`FlowMaps::set_cgroup`] says.
    pub cgroup_depth: Option<u32>,
}

/// Takes what a rule names: jumps to `taken`. Jumps to `no` if none does.
pub(super) fn take_by_port(
    a: &mut Assembler,
    maps: &FlowMaps,
    rules: &[Chosen],
    l2: u32,
    taken: Label,
    no: Label,
) {
    if rules.is_empty() {
        a.jump(no);
        return;
    }
    let (begins, fits) = (a.label(), a.label());
    a.jump_if(PROTOCOL, If::Eq, i32::from(UDP), begins);
    a.jump_if(PROTOCOL, If::Ne, i32::from(TCP), no);
    load_syn(a);
    a.jump_if(R0, If::Ne, i32::from(SYN), no);
    a.bind(begins);
    for (rule, index) in rules.iter().zip(0..) {
        let next = a.label();
        jump_unless_ports_fit(a, &rule.ports, next);
        if let Some(user) = rule.user {
            // Without a socket the kernel would name the user that stands for all others.
            a.load(Size::Dw, R1, PACKET, skb::SK);
            a.jump_if_wide(R1, If::Eq, 0, next);
            a.mov(R1, PACKET);
            a.call(Helper::GetSocketUid);
            a.jump_if(R0, If::Ne, user, next);
        }
        if let Some(depth) = rule.cgroup_depth {
            jump_unless_in_cgroup(a, maps, index, depth, next);
        }
        a.jump(fits);
        a.bind(next);
    }
    a.jump(no);

    a.bind(fits);
    let (tcp, local) = (a.label(), a.label());
    a.jump_if(PROTOCOL, If::Eq, i32::from(TCP), tcp);
    let (begun, not_come) = (a.label(), a.label());
    look_up(a, &maps.direct);
    a.jump_if_wide(R0, If::Eq, 0, not_come);
    // What came when nobody waited for it is no request that a program answers by its own port.
    a.load(Size::Dw, R0, R0, 0);
    a.alu(Alu::And, R0, UNAWAITED);
    a.jump_if_wide(R0, If::Eq, 0, no);
    jump_unless_from_own_port(a, no);
    a.jump(begun);
    a.bind(not_come);
    look_up(a, &maps.own);
    a.jump_if_wide(R0, If::Ne, 0, begun);
    jump_if_related(a, maps, taken);
    a.bind(begun);
    a.bind(tcp);
    Places::read(a, l2, no);
    maps.places.look_up(a, Which::Source);
    a.jump_if_wide(R0, If::Eq, 0, no);
    a.load(Size::W, R0, R0, 0);
    a.jump_if(R0, If::Set, Place::OWN.bits(), local);
    a.jump(no);
    a.bind(local);
    let (far, entered, not_tcp) = (a.label(), a.label(), a.label());
    maps.places.look_up(a, Which::Destination);
    a.jump_if_wide(R0, If::Eq, 0, far);
    a.load(Size::W, R0, R0, 0);
    a.jump_if(R0, If::Set, Place::NEAR.bits(), no);
    a.bind(far);
    remove(a, &maps.own);
    remember_remote_end(a, maps);
    a.store(Size::Dw, R10, FLOW_VALUE + FLOW_HEARD, 0);
    a.store(Size::Dw, R10, FLOW_VALUE + FLOW_ASKED_DIRECTLY, 0);
    // The first answer finds its entrance.
    a.store(Size::Dw, R10, FLOW_VALUE + FLOW_ENTRANCE, 0);
    a.jump_if(PROTOCOL, If::Ne, i32::from(UDP), not_tcp);
    a.store(Size::W, R10, FLOW_VALUE + FLOW_UNAWAITED, BEGUN_HERE);
    a.bind(not_tcp);
    a.call(Helper::KtimeGetNs);
    a.store(Size::Dw, R10, FLOW_VALUE + FLOW_SEEN, R0);
    enter_from(a, &maps.flows, FLOW_VALUE);
    a.jump_if_wide(R0, If::Eq, 0, entered);
    // It must not leave from this host's own address.
    count(a, maps, Counter::Full);
    verdict(a, TC_ACT_SHOT);
    a.bind(entered);
    mark_socket(a, maps);
    a.jump(taken);
}

/// Sends into the TUN what has a moved address for its source. Jumps to `pass` with anything else.
///
/// What is forwarded passes if it goes to a network of this host's own: a call that came by the
/// tunnel may have a moved address for its source, and rules of this host may send it on to an
/// application there. It also passes if the route back leads to where it came from: then this host
/// is a router on the way of the old server itself, which has the address still. An address that is
/// held here has no such route.
pub(super) fn keep_from_leaving(
    a: &mut Assembler,
    maps: &FlowMaps,
    l2: u32,
    tun_ifindex: u32,
    pass: Label,
) {
    let (moved, take, back) = (a.label(), a.label(), a.label());
    let (forwarded, asked) = (a.label(), a.label());
    maps.places.pass_unless_moved_may_be(a, l2, pass);
    Places::read(a, l2, pass);
    maps.places.look_up(a, Which::Source);
    a.jump_if_wide(R0, If::Eq, 0, pass);
    a.load(Size::W, R0, R0, 0);
    a.jump_if(R0, If::Set, Place::MOVED.bits(), moved);
    a.jump(pass);
    a.bind(moved);
    pass_neighbour_discovery(a, l2, pass);
    maps.places.look_up(a, Which::Destination);
    a.load(Size::W, R1, PACKET, skb::INGRESS_IFINDEX);
    a.jump_if(R1, If::Ne, 0, forwarded);
    a.jump_if_wide(R0, If::Eq, 0, take);
    a.load(Size::W, R0, R0, 0);
    a.jump_if(R0, If::Set, Place::BEHIND.bits(), pass);
    a.jump(take);
    a.bind(forwarded);
    a.jump_if_wide(R0, If::Eq, 0, asked);
    a.load(Size::W, R0, R0, 0);
    a.jump_if(R0, If::Set, Place::NETWORK.bits(), pass);
    a.bind(asked);
    Places::begin_way_back(a, ROUTE, take);
    look_up_route(a, ROUTE, back);
    a.jump(take);
    a.bind(back);
    a.load(Size::W, R0, R10, ROUTE + fib::IFINDEX);
    a.load(Size::W, R1, PACKET, skb::INGRESS_IFINDEX);
    a.jump_if(R0, If::Eq, R1, pass);
    a.bind(take);
    let answered = a.label();
    a.load(Size::W, R0, R10, KEY);
    a.alu(Alu::And, R0, 0xff);
    a.jump_if(R0, If::Ne, i32::from(TCP), answered);
    // Where no socket is found by the addresses, as from a container or one that is bound to an
    // interface, it was noted as direct a moment ago: the answer would not be delivered.
    remove(a, &maps.own);
    a.bind(answered);
    mark_socket(a, maps);
    redirect_to(a, tun_ifindex);
}

/// Lets this host's own neighbour discovery pass, which is the link's own business: an address that
/// is held on a link is to be found there. No router forwards what has this hop limit (RFC 4861
/// section 7.1).
fn pass_neighbour_discovery(a: &mut Assembler, l2: u32, pass: Label) {
    let (v6, other) = (a.label(), a.label());
    a.load(Size::W, R0, PACKET, skb::INGRESS_IFINDEX);
    a.jump_if(R0, If::Ne, 0, other);
    branch_by_family(a, v6, other);
    a.jump(other);
    a.bind(v6);
    a.load_packet(Size::B, l2 + ipv6::NEXT_HEADER);
    a.jump_if(R0, If::Ne, i32::from(icmpv6::PROTOCOL), other);
    a.load_packet(Size::B, l2 + ipv6::HOP_LIMIT);
    a.jump_if(R0, If::Ne, ipv6::OF_THE_LINK, other);
    a.load_packet(Size::B, l2 + ipv6::LEN + icmp::TYPE);
    jump_if_link_scoped_icmpv6(a, pass);
    a.bind(other);
}

/// From now on the TCP socket that sends the packet, if one does, sends into the tunnel.
fn mark_socket(a: &mut Assembler, maps: &FlowMaps) {
    let Some(sockets) = &maps.sockets else {
        return;
    };
    let none = a.label();
    load_tcp_socket(a, none, none);
    remember_as_it_is(a, sockets);
    a.bind(none);
}

/// Goes on if the protocol and one of the ports in the key are among these.
fn jump_unless_ports_fit(a: &mut Assembler, ports: &PortSet, no: Label) {
    let fits = a.label();
    if ports.transport.is_some() {
        let protocol = if ports.has(TCP) { TCP } else { UDP };
        a.jump_if(PROTOCOL, If::Ne, i32::from(protocol), no);
    }
    let at = match ports.end {
        PortEnd::Destination => KEY_LAST,
        PortEnd::Source => KEY_LAST + 2,
    };
    load_port(a, at);
    // Sorted: what lies below one range lies in none of those that follow.
    for range in &ports.ports {
        a.jump_if(R1, If::Lt, i32::from(*range.start()), no);
        a.jump_if(R1, If::Le, i32::from(*range.end()), fits);
    }
    a.jump(no);
    a.bind(fits);
    // What it was compared with is nothing that the verifier has to keep in mind.
    a.mov(R1, 0);
}

/// Goes on if the socket that sends the packet is in the control group of a rule.
fn jump_unless_in_cgroup(a: &mut Assembler, maps: &FlowMaps, rule: i32, depth: u32, no: Label) {
    a.load(Size::Dw, R1, PACKET, skb::SK);
    a.jump_if_wide(R1, If::Eq, 0, no);
    a.store(Size::W, R10, VALUE, rule);
    look_up_at(a, &maps.cgroups, VALUE);
    a.jump_if_wide(R0, If::Eq, 0, no);
    a.load(Size::Dw, R7, R0, 0);
    a.jump_if_wide(R7, If::Eq, 0, no);
    a.mov(R1, PACKET);
    a.mov(R2, depth);
    a.call(Helper::SkbAncestorCgroupId);
    a.jump_if_wide(R0, If::Ne, R7, no);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::os::fd::{AsFd, OwnedFd};

    use super::*;
    use crate::kernel::bpf::test_run::{run, run_forwarded, run_marked};
    use crate::kernel::netlink::{Address, Netlink, Route};
    use crate::kernel::programs::arrivals::arrivals;
    use crate::kernel::programs::deliver::deliver_behind;
    use crate::kernel::programs::headers::{icmpv4, icmpv6};
    use crate::kernel::programs::phrases::{DELIVERED, TC_ACT_UNSPEC};
    use crate::kernel::programs::take_replies::take_replies;
    use crate::kernel::programs::testing::{L2, Packet, frame, icmp, ports, taken, tcp};
    use crate::kernel::testing::{in_fresh_namespace, sysctl, uplink};
    use crate::lab::wiring::Wiring;
    use crate::model::prefix::Prefix;
    use crate::packet::ACK;

    /// All programs of a new server, to which an address of each family has moved.
    struct Bed {
        maps: FlowMaps,
        deliver: OwnedFd,
        arrivals: OwnedFd,
        egress: OwnedFd,
    }

    /// Remote, moved, own address, and somebody behind this host.
    const ENDS: [[&str; 4]; 2] = [
        ["203.0.113.7", "192.0.2.5", "198.51.100.2", "172.17.0.2"],
        ["2001:db8:c::7", "2001:db8:a::5", "2001:db8:b::2", "fd00::2"],
    ];

    fn places() -> BTreeMap<Prefix, Place> {
        let place = |text: &str, place| (text.parse().unwrap(), place);
        let network = Place::NEAR.and(Place::NETWORK);
        let behind = network.and(Place::BEHIND);
        [
            place("192.0.2.5", Place::MOVED),
            place("198.51.100.2", Place::OWN.and(network)),
            place("198.51.100.0/24", network),
            place("203.0.113.99", Place::NEAR),
            place("224.0.0.0/3", Place::NEAR),
            place("172.17.0.0/16", behind),
            place("2001:db8:a::5", Place::MOVED),
            place("2001:db8:b::2", Place::OWN.and(network)),
            place("2001:db8:b::/64", network),
            place("2001:db8:c::99", Place::NEAR),
            place("ff00::/8", Place::NEAR),
            place("fd00::/64", behind),
        ]
        .into()
    }

    impl Bed {
        fn new(rules: &[&str]) -> Self {
            let mut maps = FlowMaps::with_room(10).expect("run the tests as root");
            maps.set_places(&places(), true).unwrap();
            let chosen = |text: &&str| Chosen {
                ports: text.parse().unwrap(),
                user: None,
                cgroup_depth: None,
            };
            let rules: Vec<_> = rules.iter().map(chosen).collect();
            let deliver = deliver_behind(L2, &maps, 1).unwrap();
            Self {
                deliver: deliver.load().unwrap(),
                arrivals: arrivals(&maps, L2, 51820).unwrap().load().unwrap(),
                egress: (take_replies(&maps, L2, 1, 51820, &rules).unwrap())
                    .load()
                    .unwrap(),
                maps,
            }
        }

        /// Leaves, and is taken into the tunnel.
        fn is_taken(&self, packet: &Packet) -> bool {
            taken(self.egress.as_fd(), packet)
        }

        fn comes_directly(&self, packet: &Packet) {
            assert!(!taken(self.arrivals.as_fd(), packet));
        }

        fn is_delivered(&self, packet: &Packet) -> bool {
            run(self.deliver.as_fd(), &frame(&packet.bytes())).verdict == TC_ACT_UNSPEC
        }
    }

    #[test]
    fn nothing_leaves_from_a_moved_address_whatever_it_is() {
        let bed = Bed::new(&[]);
        for [remote, moved, own, behind] in ENDS {
            let v4 = moved.contains('.');
            let icmp_of = if v4 {
                icmpv4::PROTOCOL
            } else {
                icmpv6::PROTOCOL
            };
            let (ping, pong) = if v4 { (8, 0) } else { (128, 129) };
            let fragment = |offset, more| Packet {
                fragment: Some((9, offset, more)),
                ..Packet::new(moved, remote, UDP, ports(53, 40_000))
            };
            let client = Packet::new(remote, moved, UDP, ports(7, 7));
            let other_client = Packet::new(remote, own, UDP, ports(7, 7));
            for packet in [
                Packet::new(moved, remote, TCP, tcp(40_000, 25, SYN)),
                Packet::new(moved, remote, TCP, tcp(80, 40_000, SYN | ACK)),
                Packet::new(moved, remote, TCP, tcp(40_000, 25, ACK)),
                Packet::new(moved, remote, TCP, vec![0; 2]),
                Packet::new(moved, remote, UDP, ports(53, 40_000)),
                Packet::new(moved, remote, icmp_of, icmp(ping, 7)),
                Packet::new(moved, remote, icmp_of, icmp(pong, 7)),
                Packet::new(moved, remote, 47, vec![0; 8]),
                Packet::icmp_error(moved, &client),
                Packet::icmp_error(moved, &other_client),
                fragment(0, true),
                fragment(3, true),
                fragment(6, false),
                Packet::new(moved, "224.0.0.9", UDP, ports(53, 53)),
            ] {
                if packet.src.is_ipv4() != packet.dst.is_ipv4() {
                    continue;
                }
                assert!(bed.is_taken(&packet), "{packet:?}");
                let mut from_own = packet.clone();
                from_own.src = own.parse().unwrap();
                assert!(!bed.is_taken(&from_own), "{from_own:?}");
                let mut inside = packet.clone();
                inside.dst = behind.parse().unwrap();
                if !matches!(inside.fragment, Some((_, 3.., _))) {
                    assert!(!bed.is_taken(&inside), "{inside:?}");
                }
            }
            // Who comes directly to the moved address is not answered bare either.
            let direct = Packet::new(remote, moved, UDP, ports(9, 53));
            bed.comes_directly(&direct);
            assert!(bed.is_taken(&Packet::new(moved, remote, UDP, ports(53, 9))));
            bed.is_delivered(&direct);
            bed.comes_directly(&direct);
            assert!(bed.is_taken(&Packet::new(moved, remote, UDP, ports(53, 9))));
        }
    }

    #[test]
    fn what_answers_a_connection_from_a_moved_address_is_delivered() {
        let bed = Bed::new(&[]);
        for [remote, moved, own, _] in ENDS {
            // As of a container, or of a socket that is bound to an interface.
            let begins = |from| Packet::new(from, remote, TCP, tcp(40_000, 25, SYN));
            let answers = |to| Packet::new(remote, to, TCP, tcp(25, 40_000, SYN | ACK));
            assert!(bed.is_taken(&begins(moved)));
            assert!(bed.is_delivered(&answers(moved)));
            assert!(!bed.is_taken(&begins(own)));
            assert!(!bed.is_delivered(&answers(own)), "it is direct");
        }
    }

    #[test]
    fn answers_to_calls_leave_in_every_piece() {
        let bed = Bed::new(&[]);
        for [remote, moved, ..] in ENDS {
            let call = Packet::new(remote, moved, UDP, ports(7, 7));
            for packet in [
                Packet::new(moved, remote, UDP, ports(53, 40_000)),
                Packet {
                    fragment: Some((9, 3, false)),
                    ..Packet::new(moved, remote, UDP, ports(53, 40_000))
                },
                Packet::icmp_error(moved, &call),
            ] {
                assert!(bed.is_taken(&packet), "{packet:?}");
                let frame = frame(&packet.bytes());
                let outcome = run_marked(bed.egress.as_fd(), &frame, DELIVERED);
                assert_eq!((outcome.verdict, outcome.mark), (TC_ACT_UNSPEC, 0));
            }
        }
    }

    #[test]
    fn neighbour_discovery_of_a_moved_address_is_the_links_business() {
        let bed = Bed::new(&[]);
        let [remote, moved, ..] = ENDS[1];
        let message = |kind, hop_limit| {
            let packet = Packet::new(moved, remote, icmpv6::PROTOCOL, icmp(kind, 0));
            let mut bytes = packet.bytes();
            bytes[7] = hop_limit;
            run(bed.egress.as_fd(), &frame(&bytes)).verdict == TC_ACT_UNSPEC
        };
        for kind in [133, 135, 136] {
            assert!(message(kind, 255));
            assert!(!message(kind, 64), "it did not begin on this link");
        }
        assert!(!message(128, 255));
        let bytes = frame(&Packet::new(moved, remote, icmpv6::PROTOCOL, icmp(135, 0)).bytes());
        assert_ne!(
            run_forwarded(bed.egress.as_fd(), &bytes, 1).verdict,
            TC_ACT_UNSPEC
        );
    }

    #[test]
    fn a_server_whose_router_this_is_keeps_what_it_sends() {
        in_fresh_namespace(|| {
            let netlink = Netlink::new().unwrap();
            netlink.set_link_up(1).unwrap();
            for family in ["ipv4", "ipv6"] {
                sysctl(&format!("net/{family}/conf/all/forwarding"), "1");
            }
            let own = &[("10.0.0.1", 24), ("fd00:a::1", 64)];
            let link = uplink(&netlink, "v0", own).index;
            let bed = Bed::new(&[]);
            for [remote, moved, own, behind] in ENDS {
                let v4 = moved.contains('.');
                let passes = |to: &str, came_by| {
                    let packet = Packet::new(moved, to, UDP, ports(53, 40_000));
                    let frame = frame(&packet.bytes());
                    run_forwarded(bed.egress.as_fd(), &frame, came_by).verdict == TC_ACT_UNSPEC
                };
                assert!(!passes(remote, link), "no route leads there");
                // What is chosen by its port does not go there, but that says nothing of networks.
                let (peer, many) = if v4 {
                    ("203.0.113.99", "224.0.0.9")
                } else {
                    ("2001:db8:c::99", "ff0e::9")
                };
                assert!(!passes(peer, link) && !passes(many, link));
                let addr = moved.parse().unwrap();
                let prefix = if v4 { 32 } else { 128 };
                let route = Route {
                    dev: Some(link),
                    ..Route::to(addr, prefix)
                };
                netlink.add_route(&route).unwrap();
                assert!(passes(remote, link));
                assert!(!passes(remote, link + 100), "it did not come from there");
                assert!(!passes(remote, 0), "this host sends it itself");
                // It is held here.
                let held = Address {
                    index: 1,
                    addr,
                    prefix,
                };
                netlink.add_address(&held).unwrap();
                assert!(!passes(remote, link));
                // What came by the tunnel is sent on to applications nearby.
                let near = own.replace("::2", "::9").replace(".2", ".9");
                assert!(passes(&near, link) && passes(behind, link));
                assert!(!passes(&near, 0));
            }
        });
    }

    #[test]
    fn what_lies_within_the_bounds_has_not_moved_for_that() {
        let mut bed = Bed::new(&[]);
        let is_taken = |bed: &Bed, from: &str| {
            let to = if from.contains('.') { ENDS[0] } else { ENDS[1] }[0];
            bed.is_taken(&Packet::new(from, to, UDP, ports(53, 40_000)))
        };
        let moved = |text: &str| {
            let each = text.split_whitespace().map(|it| it.parse().unwrap());
            each.map(|prefix| (prefix, Place::MOVED)).collect()
        };
        for (prefixes, sources) in [
            (
                "",
                [("0.0.0.1", false), ("255.0.0.1", false), ("::2", false)],
            ),
            (
                "192.0.2.0/30 203.0.113.9",
                [
                    ("192.0.2.3", true),
                    ("203.0.113.9", true),
                    ("192.0.2.4", false),
                ],
            ),
            (
                "192.0.2.5 2001:db8:a::5 2001:db9::/32",
                [
                    ("2001:db8:a::5", true),
                    ("2001:db9:f::1", true),
                    ("2001:db8::1", false),
                ],
            ),
            (
                "0.0.0.0/0",
                [
                    ("0.0.0.1", true),
                    ("255.0.0.1", true),
                    ("2001:db8::1", false),
                ],
            ),
        ] {
            bed.maps.set_places(&moved(prefixes), true).unwrap();
            for (from, expected) in sources {
                assert_eq!(is_taken(&bed, from), expected, "{prefixes} {from}");
            }
        }
    }

    #[test]
    fn a_second_connection_to_a_kept_address_is_not_answered_bare() {
        for [remote, moved, _, _] in ENDS {
            let bed = Bed::new(&[]);
            let syn = Packet::new(remote, moved, TCP, tcp(40_000, 80, SYN));
            assert!(bed.is_delivered(&syn));
            let answer = |port, flags| Packet::new(moved, remote, TCP, tcp(80, port, flags));
            assert!(bed.is_taken(&answer(40_000, SYN | ACK)));
            // Somebody at the link sends the same to the moved address itself.
            let frame = run(bed.arrivals.as_fd(), &frame(&syn.bytes())).frame;
            let at = L2 as usize + syn.bytes().len() - syn.payload.len();
            let shifted = u16::from_be_bytes([frame[at], frame[at + 1]]);
            assert_ne!(shifted, 40_000);
            for flags in [SYN | ACK, ACK] {
                assert!(bed.is_taken(&answer(shifted, flags)));
            }
        }
    }

    #[test]
    fn what_is_named_by_its_port_is_taken_from_its_first_packet_on() {
        for [remote, _, own, _] in ENDS {
            let bed = Bed::new(&["25,465/tcp", "from:20/tcp", "27000-27050/udp"]);
            let out = |source, destination, flags| {
                Packet::new(own, remote, TCP, tcp(source, destination, flags))
            };
            for (source, destination, named) in [
                (40_000, 25, true),
                (40_001, 465, true),
                (20, 50_000, true),
                (40_002, 443, false),
                (25, 40_000, false),
                (50_000, 20, false),
                (40_003, 27_010, false),
            ] {
                // What is direct stays so.
                assert!(!bed.is_taken(&out(source, destination, ACK)));
                assert!(!bed.is_taken(&out(source, destination, SYN | ACK)));
                assert_eq!(bed.is_taken(&out(source, destination, SYN)), named);
                assert_eq!(bed.is_taken(&out(source, destination, ACK)), named);
                assert_eq!(bed.is_taken(&out(source, destination, SYN)), named, "again");
                if named {
                    let answer = tcp(destination, source, SYN | ACK);
                    assert!(bed.is_delivered(&Packet::new(remote, own, TCP, answer)));
                    assert!(bed.is_taken(&out(source, destination, ACK)));
                }
            }
        }
    }

    #[test]
    fn udp_by_its_port_answers_those_who_came_directly_as_before() {
        for [remote, _, own, _] in ENDS {
            let bed = Bed::new(&["27000-27050/udp", "from:5060/udp"]);
            let out =
                |source, destination| Packet::new(own, remote, UDP, ports(source, destination));
            let come =
                |source, destination| Packet::new(remote, own, UDP, ports(source, destination));
            assert!(!bed.is_taken(&out(5061, 27_051)));
            // A client that happens to have such a port.
            bed.comes_directly(&come(27_010, 53));
            assert!(!bed.is_taken(&out(53, 27_010)));
            bed.comes_directly(&come(40_000, 5060));
            assert!(!bed.is_taken(&out(5060, 40_000)));
            // A registration: nothing that comes directly in the remote's name diverts it.
            for (source, destination) in [(40_000, 27_010), (5060, 5060)] {
                for _ in 0..3 {
                    assert!(bed.is_taken(&out(source, destination)));
                    bed.comes_directly(&come(destination, source));
                    assert!(bed.is_taken(&out(source, destination)));
                    assert!(bed.is_delivered(&come(destination, source)));
                }
            }
            let fragment = |offset, more| Packet {
                fragment: Some((9, offset, more)),
                ..out(40_001, 27_011)
            };
            assert!(bed.is_taken(&fragment(0, true)));
            assert!(bed.is_taken(&fragment(3, false)));
        }
    }

    #[test]
    fn what_goes_near_or_is_nobodys_here_leaves_as_it_is() {
        let bed = Bed::new(&["25"]);
        for [remote, _, own, behind] in ENDS {
            let neighbour = if own.contains('.') {
                "198.51.100.9"
            } else {
                "2001:db8:b::9"
            };
            for (protocol, payload) in [(TCP, tcp(40_000, 25, SYN)), (UDP, ports(40_000, 25))] {
                let from_to = |from: &str, to: &str| {
                    bed.is_taken(&Packet::new(from, to, protocol, payload.clone()))
                };
                assert!(from_to(own, remote));
                assert!(!from_to(own, neighbour));
                assert!(!from_to(own, behind));
                // Forwarded with an address of its own.
                assert!(!from_to(neighbour, remote));
                assert!(!from_to(behind, remote));
            }
        }
    }

    #[test]
    fn what_finds_no_room_does_not_leave_bare() {
        let bed = Bed::new(&["25/tcp"]);
        let [remote, _, own, _] = ENDS[0];
        let verdict = |port| {
            let packet = Packet::new(own, remote, TCP, tcp(port, 25, SYN));
            run(bed.egress.as_fd(), &frame(&packet.bytes())).verdict
        };
        for port in 1..=10 {
            assert_ne!(verdict(port), TC_ACT_SHOT);
        }
        assert_eq!(verdict(11), TC_ACT_SHOT);
        assert_eq!(bed.maps.count(Counter::Full), 1);
    }

    #[test]
    fn by_port_nothing_is_taken_of_a_family_of_which_nothing_has_moved() {
        let mut bed = Bed::new(&["25/tcp"]);
        let [v4, v6] =
            ENDS.map(|[remote, _, own, _]| Packet::new(own, remote, TCP, tcp(40_000, 25, SYN)));
        let mut only_v4 = places();
        only_v4.remove(&"2001:db8:a::5".parse().unwrap());
        bed.maps.set_places(&only_v4, true).unwrap();
        assert!(bed.is_taken(&v4));
        assert!(!bed.is_taken(&v6));
    }

    #[test]
    fn what_had_moved_stays_moved_until_all_peers_have_spoken() {
        let first = Bed::new(&[]);
        let kept: Vec<_> = first.maps.lasting();
        let kept: Vec<_> = kept
            .iter()
            .map(|fd| fd.try_clone_to_owned().unwrap())
            .collect();
        let [remote, moved, ..] = ENDS[0];
        let packet = Packet::new(moved, remote, UDP, ports(1, 2));
        let mut maps = FlowMaps::with_room(10).unwrap();
        maps.places = Places::found(&kept).unwrap();
        let egress = take_replies(&maps, L2, 1, 51820, &[])
            .unwrap()
            .load()
            .unwrap();
        assert!(taken(egress.as_fd(), &packet));
        maps.set_places(&BTreeMap::new(), false).unwrap();
        assert!(taken(egress.as_fd(), &packet));
        maps.set_places(&BTreeMap::new(), true).unwrap();
        assert!(!taken(egress.as_fd(), &packet));
        maps.set_places(&BTreeMap::new(), false).unwrap();
        assert!(
            !taken(egress.as_fd(), &packet),
            "it has been told otherwise"
        );
    }

    #[test]
    fn many_rules_with_many_ranges_load() {
        let ranges: Vec<String> = (0..64).map(|n| (1000 + 2 * n).to_string()).collect();
        let ranges = format!("{}/tcp", ranges.join(","));
        let all = [ranges.as_str(); 4];
        let bed = Bed::new(&all);
        let [remote, _, own, _] = ENDS[0];
        let to = |port| Packet::new(own, remote, TCP, tcp(40_000, port, SYN));
        assert!(bed.is_taken(&to(1126)) && !bed.is_taken(&to(1125)));
    }
}
