//! The decisions as a whole: inputs go in, actions come out.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "a test asks for one kind of action among many"
)]

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::testing::all;
use crate::testing::epoch;

const OLD: PeerId = PeerId(0);
const OTHER_OLD: PeerId = PeerId(1);

fn moves(text: &str) -> Vec<Move> {
    all(text)
}

fn addresses(text: &str) -> Vec<IpAddr> {
    all(text)
}

fn rules(deliver_to: DeliverTo) -> PeerRules {
    PeerRules {
        endpoint: None,
        known_at: None,
        moves: Vec::new(),
        deliver_to,
        deliver: Vec::new(),
        accept: accept("0.0.0.0/0 ::/0"),
        clients_from: Vec::new(),
        outgoing: Vec::new(),
        allow_outgoing: Vec::new(),
    }
}

fn accept(text: &str) -> Vec<Accept> {
    all(text)
}

/// A peer that may move no more than this here.
fn accepting(deliver_to: DeliverTo, text: &str) -> PeerRules {
    PeerRules {
        accept: accept(text),
        ..rules(deliver_to)
    }
}

/// A peer that the settings know under this address.
fn at(addr: &str, rules: PeerRules) -> PeerRules {
    PeerRules {
        known_at: Some(addr.parse().unwrap()),
        ..rules
    }
}

fn own_addresses(all: Vec<IpAddr>, uplink: Vec<IpAddr>) -> Addresses {
    Addresses {
        all,
        uplink,
        ..Addresses::default()
    }
}

/// A server with a gateway and a resolver of its own.
fn facts() -> Addresses {
    Addresses {
        gateways: addresses("198.51.100.254 2001:db8:b::fe"),
        resolvers: addresses("192.0.2.53 127.0.0.53"),
        ..own_addresses(
            addresses("127.0.0.1 198.51.100.2 10.9.0.1 2001:db8:b::9"),
            addresses("198.51.100.2"),
        )
    }
}

const ANYWHERE: DeliverTo = DeliverTo::Addresses { v4: None, v6: None };

/// A policy and its clock.
struct Machine {
    policy: Policy,
    now: Instant,
}

impl Machine {
    fn new(role: Role, rules: Vec<PeerRules>, left: &str) -> Self {
        let host = HostFacts {
            uplink_mtu: 1_500,
            tun_mtu: 1_500,
            left: prefixes(left),
        };
        let now = epoch();
        let policy = Policy::new(role, rules, host, now);
        Self { policy, now }
    }

    /// A new server at 198.51.100.2 to which every peer has found its way.
    fn reached(rules: Vec<PeerRules>, left: &str) -> Self {
        let mut machine = Self::new(Role::New, rules, left);
        let uplink = addresses("198.51.100.2");
        let all = addresses("127.0.0.1 198.51.100.2");
        machine.does(Input::Addresses(own_addresses(all, uplink)));
        for peer in machine.policy.peers() {
            machine.does(Input::Endpoint(peer, endpoint()));
        }
        machine
    }

    /// The actions that follow from an input.
    fn does(&mut self, input: Input) -> Vec<Action> {
        self.policy.handle(self.now, input);
        self.actions()
    }

    fn moves(&mut self, peer: PeerId, text: &str) -> Vec<Action> {
        let moves = moves(text);
        let announcement = Announcement::Old {
            moves,
            mtu: 1_500,
            reached: None,
            outgoing: false,
        };
        self.does(Input::Announced(peer, announcement))
    }

    /// The actions that are due after some time.
    fn after(&mut self, time: Duration) -> Vec<Action> {
        self.now += time;
        self.policy.handle_timeout(self.now);
        self.actions()
    }

    /// Those that are about connections which begin here have a test of their own.
    fn actions(&mut self) -> Vec<Action> {
        let mut actions = self.all_actions();
        actions.retain(|it| !matches!(it, Action::Places { .. } | Action::Outgoing(..)));
        actions
    }

    fn all_actions(&mut self) -> Vec<Action> {
        std::iter::from_fn(|| self.policy.poll_action()).collect()
    }
}

fn endpoint() -> Endpoint {
    Endpoint {
        remote: "192.0.2.1:51850".parse().unwrap(),
        local: Some("198.51.100.2".parse().unwrap()),
    }
}

fn warnings(actions: &[Action]) -> Vec<String> {
    actions
        .iter()
        .filter_map(|action| match action {
            Action::Warn(_, warning) => Some(warning.to_string()),
            _ => None,
        })
        .collect()
}

fn no_longer_so(actions: &[Action]) -> Vec<String> {
    let no_more = actions.iter().filter_map(|action| match action {
        Action::Withdraw(_, warning) => Some(warning.to_string()),
        _ => None,
    });
    no_more.collect()
}

/// The last announcement to each peer: its number, and why not everything is delivered.
fn told(actions: &[Action]) -> Vec<(PeerId, Option<String>)> {
    actions
        .iter()
        .filter_map(|action| match action {
            Action::Announce(peer, Announcement::New { error, .. }) => Some((*peer, error.clone())),
            _ => None,
        })
        .collect()
}

fn served(actions: &[Action]) -> Vec<(PeerId, Vec<Move>)> {
    actions
        .iter()
        .filter_map(|action| match action {
            Action::Serve(peer, moves) => Some((*peer, moves.to_vec())),
            _ => None,
        })
        .collect()
}

fn prefixes(text: &str) -> Vec<Prefix> {
    addresses(text).into_iter().map(Prefix::from).collect()
}

fn held(actions: &[Action]) -> Option<Vec<Prefix>> {
    actions.iter().rev().find_map(|action| match action {
        Action::Hold(wanted) => Some(wanted.clone()),
        _ => None,
    })
}

#[test]
fn moves_of_an_old_server_are_served_and_delivered_where_it_reaches_us() {
    let mut new = Machine::reached(vec![rules(ANYWHERE)], "");
    let actions = new.moves(OLD, "192.0.2.5");
    assert_eq!(served(&actions), [(OLD, moves("192.0.2.5"))]);
    let v4 = Some("198.51.100.2".parse().unwrap());
    let deliver = Deliver::To { v4, v6: None };
    let announcement = Announcement::New {
        deliver,
        mtu: 1_500,
        error: None,
    };
    assert_eq!(actions.last(), Some(&Action::Announce(OLD, announcement)));
    assert_eq!(new.policy.delivery(OLD), Some(deliver));
    assert!(warnings(&actions).is_empty());
    // The same announcement again changes nothing.
    assert!(served(&new.moves(OLD, "192.0.2.5")).is_empty());
    // After a withdrawal nothing is served any more.
    assert_eq!(served(&new.moves(OLD, "")), [(OLD, Vec::new())]);
}

#[test]
fn the_delivery_address_is_where_the_peers_settings_name_this_server() {
    let all = || addresses("127.0.0.1 198.51.100.2 198.51.100.3");
    let here = || own_addresses(all(), addresses("198.51.100.2 198.51.100.3"));
    let to = |addr: &str| Deliver::To {
        v4: Some(addr.parse().unwrap()),
        v6: None,
    };
    // Whoever began the handshake, and from wherever this server speaks.
    for local in ["198.51.100.2", "198.51.100.3"] {
        let mut new = Machine::new(Role::New, vec![rules(ANYWHERE)], "");
        new.does(Input::Addresses(here()));
        let from = Some("198.51.100.2".parse().unwrap());
        new.does(Input::SpeaksFrom(OLD, from));
        let local = Some(local.parse().unwrap());
        let endpoint = Endpoint {
            local,
            ..endpoint()
        };
        new.does(Input::Endpoint(OLD, endpoint));
        assert_eq!(new.policy.delivery(OLD), None, "that is not known yet");
        let announce = |new: &mut Machine, reached: &str| {
            new.does(Input::Announced(
                OLD,
                Announcement::Old {
                    moves: moves("192.0.2.5"),
                    mtu: 1_500,
                    reached: addresses(reached).first().copied(),
                    outgoing: false,
                },
            ));
            new.policy.delivery(OLD)
        };
        // Behind a router that translates addresses: where this server speaks from.
        for reached in ["203.0.113.1", ""] {
            assert_eq!(announce(&mut new, reached), Some(to("198.51.100.2")));
        }
        assert_eq!(announce(&mut new, "198.51.100.3"), Some(to("198.51.100.3")));
        // It goes, and comes back.
        let without = own_addresses(
            addresses("127.0.0.1 198.51.100.2"),
            addresses("198.51.100.2"),
        );
        new.does(Input::Addresses(without));
        assert_eq!(new.policy.delivery(OLD), Some(to("198.51.100.2")));
        new.does(Input::Addresses(here()));
        assert_eq!(new.policy.delivery(OLD), Some(to("198.51.100.3")));
    }
}

#[test]
fn a_second_claim_is_refused_on_both_sides_until_the_first_is_gone() {
    let mut new = Machine::reached(vec![rules(ANYWHERE), rules(ANYWHERE)], "");
    new.moves(OLD, "192.0.2.5");
    let actions = new.moves(OTHER_OLD, "192.0.2.5:80 192.0.2.7");
    let refusal = "192.0.2.5:80 has moved here from another old server already; \
                   it is not served for this one";
    assert_eq!(served(&actions), [(OTHER_OLD, moves("192.0.2.7"))]);
    assert_eq!(warnings(&actions), [refusal]);
    assert_eq!(told(&actions), [(OTHER_OLD, Some(refusal.into()))]);
    let actions = new.moves(OLD, "192.0.2.6");
    let now_served = [
        (OLD, moves("192.0.2.6")),
        (OTHER_OLD, moves("192.0.2.5:80 192.0.2.7")),
    ];
    assert_eq!(served(&actions), now_served);
    assert_eq!(told(&actions), [(OLD, None), (OTHER_OLD, None)]);
    assert!(warnings(&actions).is_empty());
}

#[test]
fn what_is_not_accepted_is_refused_on_both_sides_with_the_flag_to_add() {
    let mut new = Machine::reached(vec![accepting(ANYWHERE, "192.0.2.5:443/tcp")], "");
    let actions = new.moves(OLD, "192.0.2.5:443/tcp 192.0.2.5:22 2001:db8::5");
    let why = "192.0.2.5:22, 2001:db8::5 are not accepted; to serve them, give the new server \
               --accept 192.0.2.5:22 --accept 2001:db8::5";
    assert_eq!(served(&actions), [(OLD, moves("192.0.2.5:443/tcp"))]);
    assert_eq!(warnings(&actions), [why]);
    assert_eq!(told(&actions), [(OLD, Some(why.into()))]);
    assert_eq!(new.policy.refused_moves(OLD), 2);
    // A move is not cut down to what is accepted of it.
    let actions = new.moves(OLD, "192.0.2.5");
    assert_eq!(served(&actions), [(OLD, Vec::new())]);
    assert_eq!(new.policy.refused_moves(OLD), 3);
    let refused = new.policy.refusals(OLD)[0].to_string();
    let says = "192.0.2.5 is not accepted; to serve it, give the new server --accept 192.0.2.5";
    assert_eq!(refused, says);
    assert_eq!(told(&actions), [(OLD, Some(says.into()))]);
    // People hear of it once a minute, and then of what is so by then.
    assert!(warnings(&actions).is_empty());
    assert!(warnings(&new.moves(OLD, "192.0.2.6")).is_empty());
    assert!(warnings(&new.after(Duration::from_secs(59))).is_empty());
    let late = warnings(&new.after(Duration::from_secs(1)));
    assert_eq!(late.len(), 1);
    assert!(late[0].ends_with("--accept 192.0.2.6"), "{late:?}");
    // What is mended meanwhile is not complained of.
    new.moves(OLD, "192.0.2.7");
    let actions = new.moves(OLD, "192.0.2.5:443/tcp");
    assert_eq!(told(&actions), [(OLD, None)]);
    assert!(warnings(&new.after(Duration::from_secs(90))).is_empty());
}

#[test]
fn without_a_limit_everything_is_served_with_the_flags_that_would_limit_it() {
    let unlimited = || accepting(ANYWHERE, "");
    let mut new = Machine::reached(vec![unlimited()], "");
    let actions = new.moves(OLD, "192.0.2.5:443/tcp 2001:db8::5");
    let moved = moves("192.0.2.5:443/tcp 2001:db8::5");
    assert_eq!(served(&actions), [(OLD, moved)]);
    let limit = "whatever this old server names is served, also after somebody has taken it \
                 over, and what this server and its containers begin to say there goes to the \
                 application here; to accept what it has moved now and no more, add \
                 --accept 192.0.2.5:443/tcp --accept 2001:db8::5";
    assert_eq!(warnings(&actions)[0], limit);
    let again = new.moves(OLD, "192.0.2.5:443/tcp 2001:db8::5");
    assert!(!warnings(&again).contains(&limit.into()));
    // Where several are unlimited, one can take what another has moved, once this server has
    // started again.
    let mut new = Machine::reached(vec![unlimited(), unlimited()], "");
    let actions = new.moves(OLD, "192.0.2.5");
    assert!(warnings(&actions)[0].ends_with("the first old server to name an address has it"));
    let mut new = Machine::reached(vec![unlimited(), rules(ANYWHERE)], "");
    assert!(warnings(&new.moves(OLD, "192.0.2.5"))[0].ends_with("--accept 192.0.2.5"));
}

#[test]
fn without_accept_few_addresses_are_served_to_those_inside() {
    // Together they are 256 addresses. A prefix counts once, whatever ports of it have moved.
    let few = "192.0.2.5 192.0.2.128/25:80 192.0.2.128/25:443 203.0.113.0/26 2001:db8:9::/127";
    let few = format!("{few} 192.0.2.64/27 192.0.2.8/29 2001:db8:9::10:0/124 192.0.2.6");
    let many = "198.18.0.0/24 2001:db8:7::/120 2001:db8:8::/64 10.9.1.0/29";
    // Its own networks, parts of them and what they are part of, and its own addresses.
    let near = "10.9.0.5 10.9.0.0/25 10.8.0.0/31 2001:db8:b::/127 198.51.100.2:81";
    let network = |text: &str| OwnNetwork {
        prefix: text.parse().unwrap(),
        interface: "eth1".into(),
    };
    let networks = ["10.9.0.0/24", "10.8.0.1", "2001:db8:b::/64"].map(network);
    let all = format!("{near} {few} {many}");
    for (accept, expected) in [("", &few), ("0.0.0.0/0 ::/0", &all)] {
        let mut new = Machine::reached(vec![accepting(ANYWHERE, accept)], "");
        let mut here = new.policy.addresses.clone();
        here.networks = networks.to_vec();
        new.does(Input::Addresses(here.clone()));
        assert!(new.policy.served_inside().concat().is_empty());
        let actions = new.moves(OLD, &all);
        let [(_, served)] = &served(&actions)[..] else {
            panic!("{actions:?}");
        };
        let expected: Vec<Move> = moves(expected);
        let expected: Vec<&Move> = served.iter().filter(|it| expected.contains(it)).collect();
        assert!(expected.len() > 8);
        assert_eq!(new.policy.served_inside(), [expected]);
        // A network that comes takes its addresses back, and who serves them hears of it.
        here.networks.push(network("192.0.2.0/28"));
        let actions = new.does(Input::Addresses(here));
        assert!(matches!(actions[0], Action::OwnNetworks(_)));
        let still = new.policy.served_inside()[0].contains(&&moves("192.0.2.5")[0]);
        assert_eq!(still, !accept.is_empty());
    }
    // What this server holds itself is reached anyhow.
    let mut new = Machine::reached(vec![accepting(DeliverTo::Keep, "192.0.2.5")], "");
    new.moves(OLD, "192.0.2.5");
    assert!(new.policy.served_inside().concat().is_empty());
}

#[test]
fn what_this_server_needs_itself_is_never_served() {
    for (moved, says, translated_too) in [
        ("198.51.100.254", "a gateway", true),
        ("[2001:db8:b::fe]:80/tcp", "a gateway", true),
        ("192.0.2.53:53", "a resolver", true),
        ("203.0.113.77", "another peer's own address", true),
        ("203.0.113.77:80/tcp", "another peer's own address", true),
        ("169.254.169.254", "link-local", true),
        ("169.254.1.1:80", "link-local", true),
        ("fd00:ec2::254", "metadata", true),
        ("[fd00:ec2::253]:53", "metadata", true),
        ("100.100.100.200:80/tcp", "metadata", true),
        ("168.63.129.16", "metadata", true),
        // Both ends of the tunnel itself: an old server may speak from what it has moved.
        ("192.0.2.1", "an end of this tunnel itself", false),
        ("192.0.2.1:80/tcp", "an end of this tunnel itself", false),
        ("198.51.100.2:80", "an end of this tunnel itself", false),
        // Others of this server's own addresses.
        ("10.9.0.1", "an address of the new server already", false),
        (
            "2001:db8:b::9",
            "an address of the new server already",
            false,
        ),
    ] {
        for (rules, translates) in [
            (rules(DeliverTo::Keep), false),
            (rules(ANYWHERE), true),
            (accepting(ANYWHERE, ""), true),
        ] {
            let other = at("203.0.113.77", accepting(ANYWHERE, ""));
            let mut new = Machine::reached(vec![at("192.0.2.1", rules), other], "");
            new.does(Input::Addresses(facts()));
            let actions = new.moves(OLD, moved);
            if translates && !translated_too {
                assert_eq!(served(&actions), [(OLD, moves(moved))], "{moved}");
                continue;
            }
            assert!(served(&actions).is_empty(), "{moved}");
            let why = told(&actions)[0].1.clone().unwrap_or_default();
            assert!(why.contains(says), "{moved}: {why}");
            assert!(held(&actions).unwrap_or_default().is_empty(), "{moved}");
        }
    }
}

/// What the programs were told of an address last, and whether that was complete.
fn told_of(actions: &[Action], addr: &str) -> Option<(Option<Place>, bool)> {
    let addr: Prefix = addr.parse().unwrap();
    actions.iter().rev().find_map(|action| match action {
        Action::Places { places, complete } => Some((places.get(&addr).copied(), *complete)),
        _ => None,
    })
}

#[test]
fn a_peer_that_names_this_servers_own_address_does_not_cut_it_off() {
    let own = Some((Some(Place::OWN.and(Place::NEAR)), true));
    let moved = Some((Some(Place::MOVED), true));
    let outgoing = |accept: &str| PeerRules {
        outgoing: vec!["bound".parse().unwrap()],
        ..accepting(ANYWHERE, accept)
    };
    let keep = || accepting(DeliverTo::Keep, "10.9.0.1");
    for (rules, named, addr, expected) in [
        (rules(ANYWHERE), "198.51.100.2:80", "198.51.100.2", own),
        (accepting(ANYWHERE, ""), "198.51.100.2", "198.51.100.2", own),
        (rules(ANYWHERE), "10.9.0.1", "10.9.0.1", own),
        // It is kept because the settings name it.
        (keep(), "10.9.0.1", "10.9.0.1", moved),
        (outgoing("10.9.0.1"), "10.9.0.1", "10.9.0.1", moved),
        (outgoing("10.9.0.0/24"), "10.9.0.1", "10.9.0.1", own),
        // The tunnel's own end is not.
        (
            outgoing("198.51.100.2"),
            "198.51.100.2",
            "198.51.100.2",
            own,
        ),
    ] {
        let mut new = Machine::reached(vec![rules], "");
        new.does(Input::Addresses(facts()));
        let announcement = Announcement::Old {
            moves: moves(named),
            mtu: 1_500,
            reached: None,
            outgoing: false,
        };
        (new.policy).handle(new.now, Input::Announced(OLD, announcement));
        let actions = new.all_actions();
        assert_eq!(served(&actions), [(OLD, moves(named))], "{named}");
        assert_eq!(told_of(&actions, addr), expected, "{named}");
    }
}

#[test]
fn what_had_moved_to_an_earlier_daemon_counts_for_a_while() {
    for (rules, left) in [
        (vec![rules(ANYWHERE), rules(ANYWHERE)], None),
        // It is held here until that peer says what it moves.
        (
            vec![rules(ANYWHERE), rules(DeliverTo::Keep)],
            Some(Place::MOVED),
        ),
    ] {
        let mut new = Machine::new(Role::New, rules, "192.0.2.6");
        let mut seen = facts();
        seen.all.extend(addresses("192.0.2.6"));
        new.policy.handle(new.now, Input::Addresses(seen));
        assert_eq!(
            told_of(&new.all_actions(), "192.0.2.6"),
            Some((left, false))
        );
        // One of two peers speaks.
        new.moves(OLD, "192.0.2.5");
        new.now += LEFT_COUNTS - Duration::from_secs(1);
        new.policy.handle_timeout(new.now);
        assert_eq!(told_of(&new.all_actions(), "192.0.2.6"), None);
        new.now += Duration::from_secs(1);
        new.policy.handle_timeout(new.now);
        assert_eq!(told_of(&new.all_actions(), "192.0.2.6"), Some((left, true)));
        new.policy.handle_timeout(new.now);
        assert!(new.all_actions().is_empty());
    }
}

#[test]
fn an_old_server_that_is_also_the_router_moves_its_ports_but_no_more() {
    for (deliver_to, moved, is_served) in [
        (ANYWHERE, "198.51.100.254:80/tcp", true),
        (ANYWHERE, "198.51.100.254", false),
        (DeliverTo::Keep, "198.51.100.254:80/tcp", false),
    ] {
        let peer = at("198.51.100.254", rules(deliver_to));
        let mut new = Machine::reached(vec![peer], "");
        new.does(Input::Addresses(facts()));
        assert_eq!(
            !served(&new.moves(OLD, moved)).is_empty(),
            is_served,
            "{moved}"
        );
    }
    // To seem to be there is not enough.
    let mut new = Machine::reached(vec![rules(ANYWHERE)], "");
    new.does(Input::Addresses(facts()));
    let forged = Endpoint {
        remote: "198.51.100.254:51850".parse().unwrap(),
        local: None,
    };
    new.does(Input::Endpoint(OLD, forged));
    assert!(served(&new.moves(OLD, "198.51.100.254:80/tcp")).is_empty());
}

#[test]
fn an_address_that_this_server_has_is_kept_if_it_is_accepted_by_itself() {
    for (accept, is_served) in [("10.9.0.0/24", false), ("10.9.0.1 10.9.0.0/24", true)] {
        let mut new = Machine::reached(vec![accepting(DeliverTo::Keep, accept)], "");
        new.does(Input::Addresses(facts()));
        let actions = new.moves(OLD, "10.9.0.1");
        assert_eq!(!served(&actions).is_empty(), is_served, "{accept}");
        let flag = warnings(&actions).concat().contains("--accept 10.9.0.1");
        assert_eq!(flag, !is_served);
    }
    // One that this daemon has put there, in this run or an earlier one, is no address of its own.
    let keep = accepting(DeliverTo::Keep, "192.0.2.0/24");
    let mut new = Machine::reached(vec![keep], "192.0.2.6");
    let mut seen = facts();
    seen.all.extend(addresses("192.0.2.5 192.0.2.6"));
    seen.held = prefixes("192.0.2.5");
    new.does(Input::Addresses(seen));
    let actions = new.moves(OLD, "192.0.2.5 192.0.2.6");
    assert_eq!(served(&actions), [(OLD, moves("192.0.2.5 192.0.2.6"))]);
}

#[test]
fn what_this_server_needs_later_is_withdrawn_and_served_again_afterwards() {
    let keep = accepting(DeliverTo::Keep, "192.0.2.0/24");
    let named = PeerRules {
        endpoint: Some(PeerAddr {
            host: "old.example".into(),
            port: 51_850,
        }),
        ..rules(ANYWHERE)
    };
    let mut new = Machine::reached(vec![keep, named], "");
    new.moves(OLD, "192.0.2.5 192.0.2.6 192.0.2.7");
    let mut later = facts();
    later.gateways = addresses("192.0.2.5");
    let actions = new.does(Input::Addresses(later));
    assert_eq!(served(&actions), [(OLD, moves("192.0.2.6 192.0.2.7"))]);
    assert_eq!(held(&actions), Some(prefixes("192.0.2.6 192.0.2.7")));
    assert!(warnings(&actions)[0].contains("192.0.2.5 is a gateway"));
    let why = told(&actions)[0].1.clone().unwrap_or_default();
    assert!(why.contains("gateway"), "{why}");
    assert_eq!(new.policy.refused_moves(OLD), 1);
    // A name of the settings leads to another one.
    let found = "192.0.2.6:51850".parse().unwrap();
    let actions = new.does(looked_up(OTHER_OLD, "old.example", Ok(found)));
    assert_eq!(served(&actions), [(OLD, moves("192.0.2.7"))]);
    let actions = new.does(Input::Addresses(facts()));
    assert_eq!(served(&actions), [(OLD, moves("192.0.2.5 192.0.2.7"))]);
}

#[test]
fn a_peer_that_seems_to_be_at_anothers_moved_address_does_not_take_it_away() {
    let mut new = Machine::reached(vec![rules(ANYWHERE), rules(ANYWHERE)], "");
    new.moves(OLD, "192.0.2.5");
    let forged = Endpoint {
        remote: "192.0.2.5:51850".parse().unwrap(),
        local: Some("198.51.100.2".parse().unwrap()),
    };
    let actions = new.does(Input::Endpoint(OTHER_OLD, forged));
    assert!(served(&actions).is_empty());
    assert_eq!(**new.policy.moves(OLD), moves("192.0.2.5"));
}

#[test]
fn a_refused_source_is_told_once_a_minute_with_the_flag_to_add() {
    let mut new = Machine::reached(vec![rules(ANYWHERE), rules(ANYWHERE)], "");
    let refused = |peer, source: &str| {
        let network = OwnNetwork {
            prefix: "10.9.0.0/24".parse().unwrap(),
            interface: "eth1".into(),
        };
        let source = source.parse().unwrap();
        Input::RefusedSource(peer, RefusedSource { source, network })
    };
    let warning = "a client's source 10.9.0.7 is refused: it lies in 10.9.0.0/24 on eth1, a \
                   network of this server, and may be forged; to let clients from there come \
                   through that old server, add --clients-from 10.9.0.0/24";
    assert_eq!(warnings(&new.does(refused(OLD, "10.9.0.7"))), [warning]);
    for host in 1..50 {
        let actions = new.does(refused(OLD, &format!("10.9.0.{host}")));
        assert!(warnings(&actions).is_empty());
    }
    let other = new.does(refused(OTHER_OLD, "10.9.0.7"));
    assert_eq!(warnings(&other), [warning]);
    let later = warnings(&new.after(Duration::from_secs(60)));
    assert_eq!(later.len(), 1);
    assert!(later[0].contains("10.9.0.49"), "{later:?}");
}

#[test]
fn the_lanes_hear_of_own_networks_when_they_change() {
    let mut new = Machine::reached(vec![rules(ANYWHERE)], "");
    let networks = vec![OwnNetwork {
        prefix: "10.9.0.0/24".parse().unwrap(),
        interface: "eth1".into(),
    }];
    let mut seen = facts();
    new.does(Input::Addresses(seen.clone()));
    seen.networks = networks.clone();
    let actions = new.does(Input::Addresses(seen.clone()));
    assert_eq!(actions, [Action::OwnNetworks(networks)]);
    assert!(new.does(Input::Addresses(seen)).is_empty());
}

#[test]
fn without_an_address_of_its_family_a_move_is_not_delivered_and_both_are_told() {
    let mut new = Machine::reached(vec![rules(ANYWHERE)], "");
    let why = "2001:db8::5 cannot be delivered: the new server has no IPv6 address; \
               give it one with --deliver-to";
    let actions = new.moves(OLD, "192.0.2.5 2001:db8::5");
    assert_eq!(warnings(&actions), [why]);
    assert_eq!(told(&actions), [(OLD, Some(why.into()))]);
    // The warning comes once, even if the peer announces the same again.
    let actions = new.moves(OLD, "192.0.2.5 2001:db8::5");
    assert!(warnings(&actions).is_empty());
    assert_eq!(told(&actions), [(OLD, Some(why.into()))]);
    // The host gets one.
    let both = addresses("198.51.100.2 2001:db8::2");
    let all = both.clone();
    let actions = new.does(Input::Addresses(own_addresses(all, both)));
    assert_eq!(told(&actions), [(OLD, None)]);
    assert_eq!(no_longer_so(&actions), [why]);
    // Nor does the old server go on saying so.
    let mut old = Machine::new(Role::Old, vec![rules(ANYWHERE)], "");
    let mut says = |error: Option<&str>| {
        let announcement = Announcement::New {
            deliver: Deliver::To { v4: None, v6: None },
            mtu: 1_500,
            error: error.map(str::to_owned),
        };
        old.does(Input::Announced(OLD, announcement))
    };
    let said = format!("the new server says: {why}");
    assert_eq!(warnings(&says(Some(why))), [&*said]);
    assert!(no_longer_so(&says(Some(why))).is_empty());
    let actions = says(None);
    assert!(warnings(&actions).is_empty());
    assert_eq!(no_longer_so(&actions), [said]);
}

#[test]
fn what_this_server_has_itself_of_a_move_leaves_from_there_unless_its_settings_name_it() {
    let has = |text: &str| {
        let (all, uplink) = (addresses(text), addresses("198.51.100.2"));
        Input::Addresses(own_addresses(all, uplink))
    };
    let both = "127.0.0.1 198.51.100.2 192.0.2.5";
    for accept in ["", "192.0.2.0/24"] {
        let mut new = Machine::reached(vec![accepting(ANYWHERE, accept)], "");
        new.does(has(both));
        let actions = new.moves(OLD, "192.0.2.5");
        let said = warnings(&actions);
        let [.., said] = &said[..] else {
            panic!("{accept}: {actions:?}")
        };
        assert!(said.starts_with("192.0.2.5 has moved here, and this server has it"));
        assert!(said.ends_with("add --accept 192.0.2.5"), "{said}");
        assert!(warnings(&new.does(has(both))).is_empty(), "once");
        // It has it no more, or the peer names it no more.
        let actions = new.does(has("127.0.0.1 198.51.100.2"));
        assert_eq!(no_longer_so(&actions), [&**said]);
        new.does(has(both));
        assert!(no_longer_so(&new.moves(OLD, "192.0.2.6")).contains(said));
    }
    // Where it speaks to its peers from is its own, whatever they name.
    let mut new = Machine::reached(vec![accepting(ANYWHERE, "192.0.2.5 198.51.100.2")], "");
    new.does(has(both));
    assert!(warnings(&new.moves(OLD, "192.0.2.5 198.51.100.2")).is_empty());
}

#[test]
fn a_delivery_address_that_goes_is_replaced_at_once() {
    let mut new = Machine::reached(vec![rules(ANYWHERE)], "");
    new.moves(OLD, "192.0.2.5");
    let has = |text: &str| {
        let (all, uplink) = (addresses(text), addresses(text));
        Input::Addresses(own_addresses(all, uplink))
    };
    let delivered = |actions: &[Action]| {
        actions.iter().find_map(|action| match action {
            Action::Deliver(OLD, delivery) => Some(delivery.v4),
            _ => None,
        })
    };
    // Another one comes first: nothing changes.
    let actions = new.does(has("198.51.100.1 198.51.100.2"));
    assert_eq!(delivered(&actions), None);
    let actions = new.does(has("198.51.100.1"));
    assert_eq!(delivered(&actions), Some("198.51.100.1".parse().ok()));
    assert_eq!(told(&actions), [(OLD, None)]);
    // A link that is made anew has none for a moment, and then the same one.
    let all = addresses("127.0.0.1");
    let uplink = Vec::new();
    new.does(Input::Addresses(own_addresses(all, uplink)));
    let actions = new.does(has("198.51.100.2 198.51.100.1"));
    assert_eq!(delivered(&actions), Some("198.51.100.1".parse().ok()));
}

#[test]
fn nothing_is_delivered_before_it_is_known_where() {
    let mut new = Machine::new(Role::New, vec![rules(ANYWHERE)], "");
    let actions = new.moves(OLD, "192.0.2.5");
    assert_eq!(served(&actions), [(OLD, moves("192.0.2.5"))]);
    assert!(told(&actions).is_empty());
    let actions = new.does(Input::Endpoint(OLD, endpoint()));
    assert_eq!(told(&actions), [(OLD, None)]);
    assert_eq!(held(&actions), None, "nothing is kept here");
}

#[test]
fn a_deliver_without_a_move_is_warned_of() {
    let rules = PeerRules {
        deliver: all("192.0.2.5:80=198.51.100.2:8080"),
        ..rules(ANYWHERE)
    };
    let mut new = Machine::reached(vec![rules], "");
    let actions = new.moves(OLD, "192.0.2.5:443");
    let warning = "--deliver 192.0.2.5:80=198.51.100.2:8080: nothing of that has moved here";
    assert_eq!(warnings(&actions), [warning]);
    assert!(warnings(&new.moves(OLD, "192.0.2.5")).is_empty());
}

#[test]
fn addresses_held_by_an_earlier_run_stay_until_every_peer_that_keeps_has_spoken() {
    let keep = || rules(DeliverTo::Keep);
    let rules = vec![keep(), keep(), rules(ANYWHERE)];
    let mut new = Machine::new(Role::New, rules, "192.0.2.5 192.0.2.6");
    let at_first = new.does(Input::Endpoint(OLD, endpoint()));
    assert_eq!(held(&at_first), Some(prefixes("192.0.2.5 192.0.2.6")));
    new.does(Input::Endpoint(OTHER_OLD, endpoint()));
    new.does(Input::Endpoint(PeerId(2), endpoint()));
    // What is held already is not held anew.
    let actions = new.moves(OLD, "192.0.2.5:80 192.0.2.5:443");
    assert_eq!(held(&actions), None);
    let actions = new.moves(OTHER_OLD, "192.0.2.7");
    assert_eq!(held(&actions), Some(prefixes("192.0.2.5 192.0.2.7")));
    // The third peer's moves are delivered to another address, and not held.
    let actions = new.moves(PeerId(2), "192.0.2.8");
    assert_eq!(held(&actions), None);
    // What failed is tried again.
    new.does(Input::Held(Err("no loopback".into())));
    let actions = new.moves(PeerId(2), "192.0.2.8");
    assert_eq!(held(&actions), Some(prefixes("192.0.2.5 192.0.2.7")));
    new.does(Input::Held(Ok(())));
    let actions = new.moves(OLD, "");
    assert_eq!(held(&actions), Some(prefixes("192.0.2.7")));
}

#[test]
fn an_address_is_held_before_anything_is_delivered_to_it() {
    let mut new = Machine::reached(vec![rules(DeliverTo::Keep)], "");
    let actions = new.moves(OLD, "192.0.2.5");
    let at = |wanted: fn(&Action) -> bool| actions.iter().position(wanted).unwrap();
    let hold = at(|action| matches!(action, Action::Hold(_)));
    let deliver = at(|action| matches!(action, Action::Deliver(..)));
    let announce = at(|action| matches!(action, Action::Announce(..)));
    assert!(hold < deliver && deliver < announce, "{actions:?}");
}

#[test]
fn peers_hear_once_of_an_address_that_cannot_be_held() {
    let both = vec![rules(DeliverTo::Keep), rules(ANYWHERE)];
    let mut new = Machine::reached(both, "");
    new.moves(OLD, "192.0.2.5");
    new.moves(OTHER_OLD, "192.0.2.6");
    let why = "a moved address cannot be held: no loopback";
    let failed = || Input::Held(Err("no loopback".into()));
    let actions = new.does(failed());
    assert_eq!(warnings(&actions), [why]);
    assert_eq!(told(&actions)[0], (OLD, Some(why.into())));
    assert_eq!(told(&actions)[1], (OTHER_OLD, None));
    assert!(new.does(failed()).is_empty());
    let actions = new.does(Input::Held(Ok(())));
    assert!(warnings(&actions).is_empty());
    assert_eq!(told(&actions)[0], (OLD, None));
}

#[test]
fn a_small_link_of_one_peer_to_its_clients_is_no_concern_of_others() {
    let mut new = Machine::reached(vec![rules(ANYWHERE), rules(ANYWHERE)], "");
    let says = |mtu: u16| Announcement::Old {
        moves: Vec::new(),
        mtu,
        reached: None,
        outgoing: false,
    };
    let sizes = |actions: Vec<Action>| {
        let is_size =
            |action: &Action| matches!(action, Action::SetTunMtu(_) | Action::ClientMtu(..));
        actions.into_iter().filter(is_size).collect::<Vec<_>>()
    };
    for (said, mtu) in [(1_280, 1_280), (1_500, 1_500), (68, 1_280), (9_000, 9_000)] {
        let actions = sizes(new.does(Input::Announced(OLD, says(said))));
        assert_eq!(actions, [Action::ClientMtu(OLD, mtu)]);
    }
    // The TUN takes what this server's own uplink does. Until it was set, that is asked for again.
    for _ in 0..2 {
        let actions = sizes(new.does(Input::UplinkMtu(1_400)));
        assert_eq!(actions, [Action::SetTunMtu(1_400)]);
    }
    new.does(Input::TunMtu(1_400));
    assert!(sizes(new.does(Input::UplinkMtu(1_400))).is_empty());
}

#[test]
fn the_lanes_hear_of_own_addresses_when_they_change() {
    let mut new = Machine::reached(vec![rules(ANYWHERE)], "");
    let have = |text: &str| {
        let all = addresses(text);
        Input::Addresses(own_addresses(all, Vec::new()))
    };
    let both = addresses("198.51.100.2 203.0.113.1");
    let actions = new.does(have("198.51.100.2 203.0.113.1"));
    assert_eq!(actions, [Action::OwnAddresses(both)]);
    assert!(new.does(have("198.51.100.2 203.0.113.1")).is_empty());
}

/// An old server that moved something to one peer.
fn old(moved: &str) -> Machine {
    let rules = PeerRules {
        moves: moves(moved),
        ..rules(ANYWHERE)
    };
    Machine::new(Role::Old, vec![rules], "")
}

#[test]
fn the_old_server_announces_its_moves_and_its_link() {
    let mut old = old("192.0.2.5:80/tcp");
    let announcement = |mtu| Announcement::Old {
        moves: moves("192.0.2.5:80/tcp"),
        mtu,
        reached: None,
        outgoing: false,
    };
    assert_eq!(old.policy.announcement(OLD), announcement(1_500));
    let hop = |mtu| Hop {
        mtu,
        ..Hop::default()
    };
    let actions = old.does(Input::UplinkMtu(1_400));
    assert_eq!(
        actions,
        [
            Action::Hop(hop(1_400)),
            Action::Announce(OLD, announcement(1_400))
        ]
    );
    assert!(old.does(Input::UplinkMtu(1_400)).is_empty());
    // An announcement holds no more than 16 bits, and needs no more.
    old.does(Input::UplinkMtu(65_536));
    assert_eq!(old.policy.announcement(OLD), announcement(u16::MAX));
}

#[test]
fn the_old_servers_lanes_hear_which_addresses_are_no_clients() {
    let given = |moved: &str| PeerRules {
        moves: moves(moved),
        ..rules(ANYWHERE)
    };
    let peers = vec![given("192.0.2.5:80/tcp"), given("192.0.2.6")];
    let mut old = Machine::new(Role::Old, peers, "");
    let have = |broadcasts: &str| {
        Input::Addresses(Addresses {
            all: addresses("192.0.2.1 192.0.2.5"),
            broadcasts: addresses(broadcasts),
            ..Addresses::default()
        })
    };
    let actions = old.does(have("192.0.2.0 192.0.2.255"));
    let all = addresses("192.0.2.0 192.0.2.1 192.0.2.5 192.0.2.255");
    assert_eq!(actions, [Action::OwnAddresses(all)]);
    assert!(old.does(have("192.0.2.0 192.0.2.255")).is_empty());
    let all = addresses("192.0.2.1 192.0.2.5");
    assert_eq!(old.does(have("")), [Action::OwnAddresses(all)]);
}

#[test]
fn what_is_not_let_out_is_told_once_a_minute_for_each_peer() {
    let mut old = Machine::new(Role::Old, vec![rules(ANYWHERE), rules(ANYWHERE)], "");
    let refused = |reason, to: &str| Refused {
        reason,
        to: to.parse().unwrap(),
        protocol: 17,
        port: Some(53),
    };
    let unasked = refused(DropReason::Unasked, "203.0.113.7");
    let actions = old.does(Input::Refused(OLD, unasked));
    let said = "the new server sends UDP to 203.0.113.7 port 53, which no client's packet asked \
                for; such packets are dropped (unasked); if its programs are to begin \
                connections, add --allow-outgoing here and --outgoing there";
    assert_eq!(warnings(&actions), [said]);
    let metadata = refused(DropReason::BadDestination, "169.254.169.254");
    for second in 0..60 {
        assert!(
            old.does(Input::Refused(OLD, metadata)).is_empty(),
            "{second}"
        );
        old.now += Duration::from_secs(1);
    }
    let actions = old.does(Input::Refused(PeerId(1), unasked));
    assert_eq!(warnings(&actions), [said], "another peer's");
    let actions = old.does(Input::Refused(OLD, metadata));
    let said = "the new server sends UDP to 169.254.169.254 port 53, where no client can be; such \
                packets are dropped (bad_destination)";
    assert_eq!(warnings(&actions), [said]);
}

#[test]
fn the_old_server_speaks_from_an_address_that_stayed() {
    let mut old = old("192.0.2.5");
    let uplink = addresses("192.0.2.5 192.0.2.1 fe80::1 2001:db8::1");
    let seen = Input::Addresses(own_addresses(Vec::new(), uplink));
    let hop = Hop {
        v4: Some("192.0.2.1".parse().unwrap()),
        v6: Some("2001:db8::1".parse().unwrap()),
        mtu: 0,
    };
    assert_eq!(old.does(seen.clone()), [Action::Hop(hop)]);
    assert!(old.does(seen).is_empty());
}

#[test]
fn the_old_server_repeats_what_the_new_one_complains_of() {
    let mut old = old("192.0.2.5");
    let says = |error: Option<&str>| {
        let announcement = Announcement::New {
            deliver: Deliver::Keep,
            mtu: 1_500,
            error: error.map(Into::into),
        };
        Input::Announced(OLD, announcement)
    };
    assert!(old.does(says(None)).is_empty());
    assert_eq!(old.policy.delivery(OLD), Some(Deliver::Keep));
    let actions = old.does(says(Some("no such address")));
    assert_eq!(warnings(&actions), ["the new server says: no such address"]);
}

#[test]
fn a_peer_of_the_same_role_decides_nothing() {
    let mut new = Machine::reached(vec![rules(ANYWHERE)], "");
    let announcement = Announcement::New {
        deliver: Deliver::Keep,
        mtu: 1_500,
        error: Some("nonsense".into()),
    };
    assert!(new.does(Input::Announced(OLD, announcement)).is_empty());
    assert!(old("192.0.2.5").moves(OLD, "192.0.2.6").is_empty());
}

#[test]
fn the_tunnel_probes_as_far_as_the_route_goes() {
    let mut old = old("192.0.2.5");
    let size = RouteSize {
        route: Some(1_400),
        learned: Some(1_300),
        link: Some(1_500),
    };
    assert!(
        old.does(Input::Route(OLD, size)).is_empty(),
        "towards where?"
    );
    old.does(Input::Endpoint(OLD, endpoint()));
    let actions = old.does(Input::Route(OLD, size));
    let hint = Action::HintMtu(OLD, Some(1_272));
    assert_eq!(actions, [Action::ProbeUpTo(OLD, 1_372), hint]);
}

/// What came of looking a name up.
fn looked_up(peer: PeerId, host: &str, found: Result<SocketAddr, String>) -> Input {
    Input::LookedUp {
        peer,
        name: PeerAddr {
            host: host.into(),
            port: 51_850,
        },
        found,
    }
}

#[test]
fn a_name_is_looked_up_while_nobody_answers_there() {
    let peer = |host: &str| PeerRules {
        endpoint: Some(PeerAddr {
            host: host.into(),
            port: 51_850,
        }),
        ..rules(ANYWHERE)
    };
    let both = vec![peer("old.example"), peer("192.0.2.1")];
    let mut new = Machine::new(Role::New, both, "");
    let second = Duration::from_secs(1);
    let turn = |actions: Vec<Action>| match actions.as_slice() {
        [] => None,
        [
            Action::LookUp {
                peer: OLD, turn, ..
            },
        ] => Some(*turn),
        other => panic!("{other:?}"),
    };
    assert_eq!(
        turn(new.after(second)),
        None,
        "it was looked up at the start"
    );
    assert_eq!(turn(new.after(9 * second)), Some(1));
    assert_eq!(turn(new.after(60 * second)), None, "one at a time");
    let unknown = || looked_up(OLD, "old.example", Err("cannot look up old.example".into()));
    assert_eq!(
        warnings(&new.does(unknown())),
        ["cannot look up old.example; trying again"]
    );
    assert_eq!(turn(new.after(second)), Some(2));
    assert!(new.does(unknown()).is_empty(), "that is no news");
    assert_eq!(turn(new.after(10 * second)), Some(3));
    let addr = "192.0.2.1:51850".parse().unwrap();
    // Of another name, which the settings had before.
    let late = looked_up(
        OLD,
        "older.example",
        Ok("203.0.113.9:51850".parse().unwrap()),
    );
    assert!(new.does(late).is_empty());
    assert_eq!(turn(new.after(60 * second)), None, "this one still runs");
    let actions = new.does(looked_up(OLD, "old.example", Ok(addr)));
    assert_eq!(actions, [Action::Call(OLD, addr)]);
    new.does(Input::State(OLD, State::Up));
    assert_eq!(turn(new.after(60 * second)), None, "it answers");
    new.does(Input::State(OLD, State::Down));
    assert_eq!(turn(new.after(Duration::ZERO)), Some(4), "no time is lost");
}

#[test]
fn a_peer_is_named_as_the_settings_have_it() {
    let mut rules = vec![rules(ANYWHERE), rules(ANYWHERE)];
    rules[1].endpoint = Some(PeerAddr {
        host: "2001:db8::1".into(),
        port: 4_000,
    });
    let mut new = Machine::new(Role::New, rules, "");
    assert_eq!(new.policy.name(OLD), "(any address)");
    assert_eq!(new.policy.name(OTHER_OLD), "[2001:db8::1]:4000");
    for peer in [OLD, OTHER_OLD] {
        new.does(Input::Endpoint(peer, endpoint()));
    }
    assert_eq!(new.policy.name(OLD), "192.0.2.1:51850");
    assert_eq!(new.policy.name(OTHER_OLD), "[2001:db8::1]:4000");
}

proptest! {
    /// The lanes learn of one peer's moves after the other's, and carry packets in between.
    #[test]
    fn at_no_moment_do_the_lanes_serve_one_packet_for_two_peers(
        announcements in proptest::collection::vec((0..3u16, any_moves()), 1..30),
    ) {
        let everybody = (0..3).map(|_| rules(ANYWHERE)).collect();
        let mut new = Machine::reached(everybody, "");
        let mut lanes: Vec<Vec<Move>> = vec![Vec::new(); 3];
        for (peer, text) in announcements {
            for (peer, moves) in served(&new.moves(PeerId(peer), &text)) {
                lanes[index(peer)] = moves;
                for (one, other) in [(0, 1), (0, 2), (1, 2)] {
                    let overlaps = |moved: &Move| lanes[one].iter().any(|it| it.overlaps(moved));
                    prop_assert!(!lanes[other].iter().any(overlaps), "{lanes:?}");
                }
            }
            for peer in new.policy.peers() {
                prop_assert_eq!(&**new.policy.moves(peer), &*lanes[index(peer)]);
            }
        }
    }
}

fn any_moves() -> impl Strategy<Value = String> {
    const MOVES: [&str; 6] = [
        "192.0.2.5",
        "192.0.2.5:80",
        "192.0.2.5:80-90/tcp",
        "192.0.2.5:85/udp",
        "192.0.2.6",
        "2001:db8::5",
    ];
    proptest::sample::subsequence(&MOVES[..], 0..4).prop_map(|moves| moves.join(" "))
}

#[test]
fn connections_begin_here_once_both_servers_were_told_so() {
    let outgoing = |text: &str| PeerRules {
        outgoing: all(text),
        ..accepting(ANYWHERE, "192.0.2.5")
    };
    let old = PeerId(0);
    let mut machine = Machine::reached(vec![outgoing("bound 25/tcp")], "");
    let said = |outgoing| {
        let announcement = Announcement::Old {
            moves: moves("192.0.2.5"),
            mtu: 1_500,
            reached: None,
            outgoing,
        };
        Input::Announced(old, announcement)
    };
    assert_eq!(machine.policy.lets_out(old), None);
    machine.policy.handle(machine.now, said(false));
    let actions = machine.all_actions();
    let rules = |actions: &[Action]| {
        let mut rules = actions.iter().filter_map(|action| match action {
            Action::Outgoing(_, rules) => Some((rules.on, rules.allowed, rules.by_port.len())),
            _ => None,
        });
        rules.next()
    };
    assert_eq!(rules(&actions), Some((true, Some(false), 1)));
    assert!(actions.contains(&Action::Warn(old, Warning::OutgoingNotAllowed)));
    // Programs can be bound to it, and nothing leaves from it by itself.
    assert!(actions.contains(&Action::Hold(prefixes("192.0.2.5"))));
    let moved = "192.0.2.5".parse().unwrap();
    let places = |actions: &[Action]| {
        let mut all = actions.iter().filter_map(|action| match action {
            Action::Places { places, complete } => Some((places.get(&moved).copied(), *complete)),
            _ => None,
        });
        all.next_back()
    };
    assert_eq!(places(&actions), Some((Some(Place::MOVED), true)));
    machine.policy.handle(machine.now, said(true));
    let actions = machine.all_actions();
    assert_eq!(rules(&actions), Some((true, Some(true), 1)));
    assert!(!actions.iter().any(|it| matches!(it, Action::Warn(..))));
    let warning = Warning::OutgoingNotAllowed;
    assert!(actions.contains(&Action::Withdraw(old, warning.clone())));
    // Without the flag in other settings what was held is let go, and nothing is missed any more.
    machine.policy.handle(machine.now, said(false));
    let actions = machine.all_actions();
    assert!(actions.contains(&Action::Warn(old, warning.clone())));
    let without = accepting(ANYWHERE, "192.0.2.5");
    machine.policy.change(machine.now, old, without);
    let actions = machine.all_actions();
    assert!(actions.contains(&Action::Hold(Vec::new())), "{actions:?}");
    assert!(actions.contains(&Action::Withdraw(old, warning.clone())));
    (machine.policy).change(machine.now, old, outgoing("bound 25/tcp"));
    let actions = machine.all_actions();
    assert!(actions.contains(&Action::Hold(prefixes("192.0.2.5"))));
    assert!(actions.contains(&Action::Warn(old, warning)));
    // What an earlier run left is let go too, though the old server has not been heard yet.
    let mut new = Machine::new(Role::New, vec![outgoing("bound")], "192.0.2.5");
    let without = accepting(ANYWHERE, "192.0.2.5");
    new.policy.change(new.now, old, without);
    assert_eq!(held(&new.all_actions()), Some(Vec::new()));
    // Without the flag nothing is held, but nothing leaves either.
    let mut machine = Machine::reached(vec![accepting(ANYWHERE, "192.0.2.5")], "");
    machine.policy.handle(machine.now, said(true));
    let actions = machine.all_actions();
    assert_eq!(rules(&actions), Some((false, Some(true), 0)));
    assert!(!actions.iter().any(|it| matches!(it, Action::Hold(_))));
    assert_eq!(places(&actions), Some((Some(Place::MOVED), true)));
    // Nor is anything held that no setting names.
    let mut open = outgoing("bound");
    open.accept.clear();
    let mut machine = Machine::reached(vec![open], "");
    machine.policy.handle(machine.now, said(true));
    assert!(
        !machine
            .all_actions()
            .iter()
            .any(|it| matches!(it, Action::Hold(_)))
    );
}

#[test]
fn the_old_server_says_that_the_new_one_is_too_old_for_what_has_moved() {
    let seconds = Duration::from_secs;
    for (moved, warned) in [("192.0.2.0/28", true), ("192.0.2.5 2001:db8::5", false)] {
        for says in [false, true] {
            let mut old = old(moved);
            old.does(Input::State(OLD, State::Up));
            if says {
                old.does(Input::Says(OLD));
            }
            let mut later = |after| {
                old.now += seconds(after);
                old.policy.handle_timeout(old.now);
                warnings(&old.actions()).len()
            };
            assert_eq!(later(29), 0);
            assert_eq!(later(1), usize::from(warned && !says), "{moved} {says}");
            assert_eq!(later(600), 0, "once");
            // It goes, and another version comes.
            old.does(Input::State(OLD, State::Down));
            old.does(Input::State(OLD, State::Up));
            old.now += seconds(30);
            old.policy.handle_timeout(old.now);
            assert_eq!(warnings(&old.actions()).len(), usize::from(warned));
        }
    }
}

#[test]
fn the_next_daemon_delivers_where_a_killed_one_did() {
    let here = |uplink: &str| {
        let all = addresses(&format!("127.0.0.1 {uplink}"));
        Input::Addresses(own_addresses(all, addresses(uplink)))
    };
    let start = |uplink: &str, known: &BTreeMap<String, Chosen>| {
        let mut new = Machine::new(Role::New, vec![at("192.0.2.1", rules(ANYWHERE))], "");
        new.policy.delivered_before(known);
        new.does(here(uplink));
        new.moves(OLD, "2001:db8:a::5");
        let actions = new.does(Input::Endpoint(OLD, endpoint()));
        let delivery = actions.iter().find_map(|action| match action {
            Action::Deliver(_, delivery) => Some(delivery.v6),
            _ => None,
        });
        (delivery.flatten(), new.policy.delivered())
    };
    let addr = |text: &str| Some(text.parse().unwrap());
    let (first, known) = start("198.51.100.2 2001:db8:b::2", &BTreeMap::new());
    assert_eq!(first, addr("2001:db8:b::2"));
    let more = "198.51.100.2 2001:db8:b::1 2001:db8:b::2";
    assert_eq!(start(more, &BTreeMap::new()).0, addr("2001:db8:b::1"));
    let (next, kept) = start(more, &known);
    assert_eq!(next, first);
    assert_eq!(kept, known);
    // It has gone meanwhile.
    assert_eq!(
        start("198.51.100.2 2001:db8:b::1", &known).0,
        addr("2001:db8:b::1")
    );
}
