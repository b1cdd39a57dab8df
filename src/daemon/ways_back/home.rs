//! By which interfaces clients reach a moved address.
//!
//! Owns the questions alone, as functions of what was listed. None of them goes through all
//! addresses for each move.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::daemon::held::Held;
use crate::kernel::netlink::{Link, Nature};
use crate::model::prefix::Prefix;

/// An interface that receives packets of its own.
#[derive(Clone, Debug)]
pub(super) struct Carrier {
    pub(super) index: u32,
    pub(super) name: String,
    /// The interface by which it sends and receives, if it is another address on that (VRRP).
    pub(super) lower: Option<u32>,
}

/// The interfaces by which clients reach an address.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) enum Home {
    /// None that this host knows.
    Nowhere,
    /// The one that holds it, and the one by which that sends.
    On(Vec<u32>),
    /// It is on several.
    Several,
}

/// Prefixes, and how long they are.
pub(super) struct Nested {
    pub(super) prefixes: BTreeSet<Prefix>,
    lens: BTreeSet<u8>,
}

impl Nested {
    pub(super) fn new(prefixes: BTreeSet<Prefix>) -> Self {
        let lens = prefixes.iter().map(Prefix::len).collect();
        Self { prefixes, lens }
    }

    /// Whether one of them is longer than `len`, and has the address.
    pub(super) fn has_longer(&self, addr: IpAddr, len: u8) -> bool {
        let mut longer = self.lens.iter().filter(|&&longer| longer > len);
        longer.any(|&len| self.prefixes.contains(&Prefix::of(addr, len)))
    }

    /// Whether a shorter one covers this prefix.
    pub(super) fn covers(&self, prefix: Prefix) -> bool {
        let mut shorter = self.lens.range(..prefix.len());
        shorter.any(|&len| self.prefixes.contains(&Prefix::of(prefix.first(), len)))
    }

    /// An address that stands for one of them, but for no longer one; and whether it is held.
    pub(super) fn source(&self, prefix: Prefix, held: &Held) -> (IpAddr, bool) {
        let is_its = |addr: &IpAddr| !self.has_longer(*addr, prefix.len());
        let mut here = held.within(prefix).map(|held| held.addr);
        if let Some(addr) = here.find(is_its) {
            return (addr, true);
        }
        let ends = [prefix.first(), prefix.last()];
        let end = ends.into_iter().find(is_its).unwrap_or(prefix.first());
        (end, held.has(end))
    }
}

/// The interfaces that receive packets of their own, but the TUN.
pub(super) fn receiving(links: &[Link], natures: &[Nature], tun: u32) -> Vec<Carrier> {
    let nature = |index: u32| natures.iter().find(|nature| nature.index == index);
    let kind = |index: u32| nature(index).and_then(|nature| nature.kind.as_deref());
    let has_ports = |index: u32| natures.iter().any(|nature| nature.master == Some(index));
    let receives = |link: &&Link| match kind(link.index) {
        Some("dummy" | "ifb" | "nlmon") => false,
        Some("bridge") => has_ports(link.index),
        Some(_) | None => !link.loopback && !link.port && link.index != tun,
    };
    let carriers = links.iter().filter(receives).map(|link| Carrier {
        index: link.index,
        name: link.name.clone(),
        lower: match kind(link.index) {
            Some("macvlan" | "ipvlan") => nature(link.index).and_then(|nature| nature.lower),
            Some(_) | None => None,
        },
    });
    carriers.collect()
}

/// The networks of interfaces that receive, each once.
pub(super) struct Networks {
    nested: Nested,
    links: BTreeMap<Prefix, BTreeSet<u32>>,
}

impl Networks {
    pub(super) fn of(held: &Held, carriers: &[Carrier]) -> Self {
        let receiving: BTreeSet<u32> = carriers.iter().map(|carrier| carrier.index).collect();
        let mut links: BTreeMap<Prefix, BTreeSet<u32>> = BTreeMap::new();
        for held in held.iter().filter(|held| receiving.contains(&held.index)) {
            let network = Prefix::of(held.addr, held.prefix);
            if !network.is_single() {
                links.entry(network).or_default().insert(held.index);
            }
        }
        let nested = Nested::new(links.keys().copied().collect());
        Self { nested, links }
    }

    /// The interfaces in whose networks a prefix lies.
    pub(super) fn around(&self, prefix: Prefix) -> BTreeSet<u32> {
        let lens = self.nested.lens.range(..=prefix.len());
        let around = lens.filter_map(|&len| self.links.get(&Prefix::of(prefix.first(), len)));
        around.flatten().copied().collect()
    }
}

/// The interface that holds addresses of a prefix, or in whose network it lies.
pub(super) fn home(prefix: Prefix, held: &Held, carriers: &[Carrier], networks: &Networks) -> Home {
    let on = |index: u32| carriers.iter().find(|carrier| carrier.index == index);
    let holding = held.within(prefix).map(|held| held.index);
    let holding: BTreeSet<u32> = holding.filter(|index| on(*index).is_some()).collect();
    let indexes = if holding.is_empty() {
        networks.around(prefix)
    } else {
        holding
    };
    let found = indexes.iter().filter_map(|&index| on(index));
    let senders: BTreeSet<u32> = found.map(|it| it.lower.unwrap_or(it.index)).collect();
    match senders.len() {
        0 => Home::Nowhere,
        1 => Home::On(indexes.union(&senders).copied().collect()),
        _ => Home::Several,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::kernel::netlink::Address;

    pub(in super::super) fn carrier(index: u32, lower: Option<u32>) -> Carrier {
        Carrier {
            index,
            name: format!("eth{index}"),
            lower,
        }
    }

    fn on(links: &[u32]) -> Home {
        Home::On(links.to_vec())
    }

    #[test]
    fn an_address_is_at_home_where_it_is_held_or_in_whose_network_it_lies() {
        let carriers = [carrier(2, None), carrier(3, None), carrier(9, Some(2))];
        let held = |texts: &[(u32, &str, u8)]| {
            let address = |&(index, addr, prefix): &(u32, &str, u8)| Address {
                index,
                addr: addr.parse().unwrap(),
                prefix,
            };
            Held::new(texts.iter().map(address).collect())
        };
        let here = held(&[
            (2, "192.0.2.1", 24),
            (3, "198.51.100.1", 24),
            (3, "198.51.100.5", 32),
            (9, "192.0.2.9", 24),
            // A dummy.
            (7, "192.0.2.77", 32),
            (7, "203.0.113.7", 32),
            // One network on two interfaces.
            (2, "198.18.0.2", 24),
            (3, "198.18.0.3", 24),
        ]);
        let networks = Networks::of(&here, &carriers);
        let home = |text: &str| home(text.parse().unwrap(), &here, &carriers, &networks);
        assert_eq!(home("192.0.2.1"), on(&[2]));
        assert_eq!(home("198.51.100.5"), on(&[3]));
        assert_eq!(home("198.51.100.64/26"), on(&[3]));
        assert_eq!(home("192.0.2.9"), on(&[2, 9]), "as VRRP has it");
        assert_eq!(home("192.0.2.77"), on(&[2, 9]), "its network is there");
        assert_eq!(home("203.0.113.7"), Home::Nowhere);
        assert_eq!(home("203.0.113.0/24"), Home::Nowhere);
        assert_eq!(home("198.18.0.3"), on(&[3]));
        assert_eq!(home("198.18.0.77"), Home::Several);
    }
}
