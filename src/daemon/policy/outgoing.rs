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
    let by_port = outgoing.iter().filter_map(|outgoing| match outgoing {
        Outgoing::Bound => None,
        Outgoing::ByPort(by_port) => Some(by_port.clone()),
    });
    by_port.collect()
}

/// What the programs of the new server have to know of addresses.
///
/// `moved` has moved here and `peers` are where the old servers are. If it is not wanted `by_port`,
/// nothing is said of what such connections ask for.
pub(super) fn places(
    moved: impl Iterator<Item = Prefix>,
    here: &Addresses,
    peers: impl Iterator<Item = IpAddr>,
    by_port: bool,
) -> BTreeMap<Prefix, Place> {
    let moved: BTreeSet<Prefix> = moved.collect();
    let held: BTreeSet<&Prefix> = here.held.iter().collect();
    // Few lengths occur.
    let lengths: BTreeSet<u8> = held.iter().map(|prefix| prefix.len()).collect();
    let is_held = |prefix: &Prefix| around(*prefix, &lengths).any(|it| held.contains(&it));
    let lengths_of_moved: BTreeSet<u8> = moved.iter().map(Prefix::len).collect();
    let mut said: Vec<(Prefix, Place)> = Vec::new();
    said.extend(moved.iter().map(|&prefix| (prefix, Place::MOVED)));
    for network in &here.networks {
        let held = network.prefix.is_single() && is_held(&network.prefix);
        let at_uplink = here.uplinks.contains(&network.interface);
        if held || moved.contains(&network.prefix) {
            continue;
        }
        said.push((network.prefix, Place::NEAR));
        if !at_uplink {
            said.push((network.prefix, Place::BEHIND));
        }
    }
    if by_port {
        let is_own = |addr: &&IpAddr| {
            let prefix = Prefix::from(**addr);
            let has_moved = || around(prefix, &lengths_of_moved).any(|it| moved.contains(&it));
            !is_held(&prefix) && !addr.is_loopback() && !has_moved()
        };
        for &addr in here.all.iter().filter(is_own) {
            said.push((addr.into(), Place::OWN.and(Place::NEAR)));
        }
        said.extend(peers.map(|addr| (Prefix::from(addr), Place::NEAR)));
        said.extend(SPECIAL.map(|(addr, len)| (Prefix::of(addr, len), Place::NEAR)));
    }
    let mut alone: BTreeMap<Prefix, Place> = BTreeMap::new();
    for (prefix, place) in said {
        let all = alone.entry(prefix).or_default();
        *all = all.and(place);
    }
    // The most specific prefix has to say what those around it would.
    let lengths: BTreeSet<u8> = alone.keys().map(Prefix::len).collect();
    let whole = |&prefix: &Prefix| {
        let around = around(prefix, &lengths).filter_map(|prefix| alone.get(&prefix));
        (
            prefix,
            around.fold(Place::default(), |all, &place| all.and(place)),
        )
    };
    alone.keys().map(whole).collect()
}

/// The prefixes of these lengths that the prefix lies in.
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

    #[test]
    fn each_prefix_says_what_those_around_it_do() {
        let network = |prefix: &str, interface: &str| OwnNetwork {
            prefix: prefix.parse().unwrap(),
            interface: interface.into(),
        };
        let here = Addresses {
            all: ["127.0.0.1", "198.51.100.2", "192.0.2.5", "172.17.0.1"]
                .map(|addr| addr.parse().unwrap())
                .into(),
            held: vec!["192.0.2.5".parse().unwrap()],
            networks: vec![
                network("198.51.100.0/24", "eth0"),
                network("172.17.0.0/16", "docker0"),
            ],
            uplinks: vec!["eth0".into()],
            ..Addresses::default()
        };
        let moved = || ["192.0.2.5".parse().unwrap()].into_iter();
        let peers = || ["172.17.0.9".parse().unwrap()].into_iter();
        let all = places(moved(), &here, peers(), true);
        let at = |addr: &str| all.get(&addr.parse().unwrap()).copied();
        let near = Some(Place::NEAR);
        let behind = Some(Place::NEAR.and(Place::BEHIND));
        let own = Place::OWN.and(Place::NEAR);
        assert_eq!(at("192.0.2.5"), Some(Place::MOVED));
        assert_eq!(at("198.51.100.2"), Some(own));
        assert_eq!(at("198.51.100.0/24"), near);
        assert_eq!(at("172.17.0.0/16"), behind);
        assert_eq!(at("172.17.0.1"), Some(own.and(Place::BEHIND)));
        assert_eq!(at("172.17.0.9"), behind);
        assert_eq!(at("127.0.0.1"), None);
        assert_eq!(at("224.0.0.0/3"), near);
        let few = places(moved(), &here, peers(), false);
        assert_eq!(few.len(), 3, "{few:?}");
    }
}
