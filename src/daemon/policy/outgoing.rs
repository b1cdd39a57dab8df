//! Connections that begin on this side: what the programs have to know of addresses for them, and
//! what people are told.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::Addresses;
use crate::flow::outgoing::RefusedOutgoing;
use crate::kernel::Place;
use crate::model::drops::DropReason;
use crate::model::outgoing::{ByPort, Outgoing};
use crate::model::prefix::Prefix;

/// Nothing that is chosen by its port leaves to there from a moved address: this host, this link,
/// and many at once.
const SPECIAL: [(IpAddr, u8); 7] = [
    (IpAddr::V4(Ipv4Addr::new(0, 0, 0, 0)), 8),
    (IpAddr::V4(Ipv4Addr::new(127, 0, 0, 0)), 8),
    (IpAddr::V4(Ipv4Addr::new(169, 254, 0, 0)), 16),
    (IpAddr::V4(Ipv4Addr::new(224, 0, 0, 0)), 3),
    (IpAddr::V6(Ipv6Addr::LOCALHOST), 128),
    (IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0)), 10),
    (IpAddr::V6(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0)), 8),
];

/// What leaves because of its port, among the settings of a peer.
pub(super) fn by_port(outgoing: &[Outgoing]) -> Vec<ByPort> {
    let by_port = outgoing.iter().filter_map(Outgoing::by_port);
    by_port.cloned().collect()
}

/// A prefix that has moved here.
#[derive(Clone, Copy, Debug)]
pub(super) struct MovedHere {
    /// The prefix.
    pub(super) prefix: Prefix,
    /// What this host has of it by itself counts as moved as well: the settings name the prefix
    /// alone for a peer whose addresses are held here.
    pub(super) kept: bool,
}

/// What is said of a prefix alone.
#[derive(Clone, Copy, Default, Debug)]
struct Said {
    place: Place,
    /// This host has it without anybody having moved it, so it has not moved though a prefix around
    /// it has. Whoever takes an old server over can name any address, and what leaves from one that
    /// has moved goes into the tunnel: this host's logins, its DNS, and all of a network behind it.
    own: bool,
}

/// What the programs of the new server have to know of addresses.
///
/// `moved` has moved here, `left` is held since an earlier run, and `peers` are where the old
/// servers are. If it is not wanted `by_port`, less is said of what such connections ask for.
pub(super) fn places(
    moved: impl Iterator<Item = MovedHere>,
    here: &Addresses,
    left: &[Prefix],
    peers: impl Iterator<Item = IpAddr>,
    by_port: bool,
) -> BTreeMap<Prefix, Place> {
    let mut alone: BTreeMap<Prefix, Said> = BTreeMap::new();
    let mut say = |prefix: Prefix, place: Place, own: bool| {
        let said = alone.entry(prefix).or_default();
        (said.place, said.own) = (said.place.and(place), said.own || own);
    };
    let mut kept: BTreeSet<Prefix> = BTreeSet::new();
    for MovedHere { prefix, kept: it } in moved {
        say(prefix, Place::MOVED, false);
        kept.extend(it.then_some(prefix));
    }
    let held: BTreeSet<&Prefix> = here.held.iter().chain(left).collect();
    // Few lengths occur.
    let lengths_of_kept: BTreeSet<u8> = kept.iter().map(Prefix::len).collect();
    let is_kept = |prefix: Prefix| around(prefix, &lengths_of_kept).any(|it| kept.contains(&it));
    for network in &here.networks {
        if held.contains(&network.prefix) || kept.contains(&network.prefix) {
            continue;
        }
        let own = !is_kept(network.prefix);
        say(network.prefix, Place::NEAR.and(Place::NETWORK), own);
        if !here.uplinks.contains(&network.interface) {
            say(network.prefix, Place::BEHIND, own);
        }
    }
    for &addr in here.all.iter().filter(|addr| !addr.is_loopback()) {
        let prefix = Prefix::from(addr);
        if held.contains(&prefix) {
            continue;
        }
        if is_kept(prefix) {
            // The next daemon finds it by itself, and will not take it for its host's own.
            say(prefix, Place::MOVED, false);
        } else {
            say(prefix, Place::OWN.and(Place::NEAR), true);
        }
    }
    if by_port {
        let near = peers.map(Prefix::from);
        let special = SPECIAL.map(|(addr, len)| Prefix::of(addr, len));
        for prefix in near.chain(special) {
            say(prefix, Place::NEAR, false);
        }
    }
    // The most specific prefix has to say what those around it would.
    let lengths: BTreeSet<u8> = alone.keys().map(Prefix::len).collect();
    let whole = |&prefix: &Prefix| {
        let around = around(prefix, &lengths).filter_map(|prefix| alone.get(&prefix));
        let whole = around.fold(Place::default(), |all, said| {
            let all = all.and(said.place);
            match said.own {
                true => all.without(Place::MOVED),
                false => all,
            }
        });
        (prefix, whole)
    };
    alone.keys().map(whole).collect()
}

/// The prefixes of these lengths that the prefix lies in, the widest first.
fn around(prefix: Prefix, lengths: &BTreeSet<u8>) -> impl Iterator<Item = Prefix> {
    let lengths = lengths.range(..=prefix.len());
    lengths.map(move |&len| Prefix::of(prefix.first(), len))
}

/// What a person is told of a packet that did not leave.
pub(super) fn not_sent(refused: &RefusedOutgoing) -> String {
    let reason = refused.reason.name();
    let remedy = if refused.reason == DropReason::OutgoingNotAllowed {
        "the old server lets no connections out that begin here; to let it do so, add \
         --allow-outgoing there"
    } else if refused.reason == DropReason::OutgoingNoAddress {
        "several addresses have moved, or the one that is named has not; say in --outgoing which \
         it is, with as=ADDR"
    } else {
        "nothing but replies leaves this server from a moved address; to let programs begin \
         connections from it, through the old server, add --outgoing here and --allow-outgoing \
         there"
    };
    format!("{refused} is not sent ({reason}): {remedy}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::networks::OwnNetwork;

    fn prefix(text: &str) -> Prefix {
        text.parse().unwrap()
    }

    /// A server with an uplink, a network of containers, and one that it holds for a peer.
    fn here() -> Addresses {
        let network = |prefix: &str, interface: &str| OwnNetwork {
            prefix: prefix.parse().unwrap(),
            interface: interface.into(),
        };
        Addresses {
            all: ["127.0.0.1", "198.51.100.2", "192.0.2.5", "172.17.0.1"]
                .map(|addr| addr.parse().unwrap())
                .into(),
            held: vec![prefix("192.0.2.5")],
            networks: vec![
                network("198.51.100.0/24", "eth0"),
                network("172.17.0.0/16", "docker0"),
            ],
            uplinks: vec!["eth0".into()],
            ..Addresses::default()
        }
    }

    fn moved(text: &str, kept: bool) -> impl Iterator<Item = MovedHere> {
        let of = move |prefix| MovedHere { prefix, kept };
        text.split_whitespace().map(prefix).map(of)
    }

    const NEAR: Place = Place::NEAR;

    #[test]
    fn each_prefix_says_what_those_around_it_do() {
        let here = here();
        let peers = || ["172.17.0.9".parse().unwrap()].into_iter();
        let all = places(moved("192.0.2.5", false), &here, &[], peers(), true);
        let at = |addr: &str| all.get(&prefix(addr)).copied();
        let network = NEAR.and(Place::NETWORK);
        let behind = Some(network.and(Place::BEHIND));
        let own = Place::OWN.and(network);
        assert_eq!(at("192.0.2.5"), Some(Place::MOVED));
        assert_eq!(at("198.51.100.2"), Some(own));
        assert_eq!(at("198.51.100.0/24"), Some(network));
        assert_eq!(at("172.17.0.0/16"), behind);
        assert_eq!(at("172.17.0.1"), Some(own.and(Place::BEHIND)));
        assert_eq!(at("172.17.0.9"), behind);
        assert_eq!(at("127.0.0.1"), None);
        assert_eq!(at("224.0.0.0/3"), Some(NEAR));
        let few = places(moved("192.0.2.5", false), &here, &[], peers(), false);
        assert_eq!(few.len(), 5, "{few:?}");
    }

    #[test]
    fn what_this_host_has_by_itself_has_not_moved_whatever_a_peer_names() {
        let here = here();
        let at = |moves: &str, kept: bool, left: &str, addr: &str| {
            let left: Vec<Prefix> = left.split_whitespace().map(prefix).collect();
            let peers = ["172.17.0.9".parse().unwrap()].into_iter();
            let all = places(moved(moves, kept), &here, &left, peers, true);
            // As the kernel finds it.
            let addr = prefix(addr);
            let around = all.iter().filter(|(prefix, _)| prefix.covers(&addr));
            let found = around.max_by_key(|(prefix, _)| prefix.len());
            found.is_some_and(|(_, place)| place.has(Place::MOVED))
        };
        for (moves, addr, has_moved) in [
            // By itself, as a part, and as all there is.
            ("198.51.100.2", "198.51.100.2", false),
            ("198.51.100.0/25", "198.51.100.2", false),
            ("0.0.0.0/0", "198.51.100.2", false),
            ("198.51.100.0/25", "198.51.100.9", true),
            ("198.51.100.0/24", "198.51.100.9", false),
            ("0.0.0.0/0", "198.51.100.9", false),
            ("0.0.0.0/0", "203.0.113.9", true),
            // Containers, and a peer among them.
            ("172.16.0.0/12", "172.17.0.2", false),
            ("172.16.0.0/12", "172.17.0.1", false),
            ("172.16.0.0/12", "172.17.0.9", false),
            ("172.16.0.0/12", "172.18.0.9", true),
            // One of them has moved here by itself.
            ("172.16.0.0/12 172.17.0.5", "172.17.0.5", true),
            // A neighbour on the uplink has.
            ("198.51.100.7", "198.51.100.7", true),
            // It is held here.
            ("192.0.2.5", "192.0.2.5", true),
            ("192.0.2.0/24", "192.0.2.5", true),
        ] {
            assert_eq!(at(moves, false, "", addr), has_moved, "{moves} {addr}");
        }
        // The administrator has put it there, and accepts it by itself to have it kept.
        for (moves, addr) in [
            ("198.51.100.2", "198.51.100.2"),
            ("198.51.100.0/24", "198.51.100.2"),
            ("198.51.100.0/24", "198.51.100.9"),
            ("172.16.0.0/12", "172.17.0.2"),
        ] {
            assert!(at(moves, true, "", addr), "{moves} {addr}");
        }
        // An earlier run has put it there.
        assert!(at("198.51.100.2", false, "198.51.100.2", "198.51.100.2"));
    }
}
