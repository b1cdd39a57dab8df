//! Which prefixes have which ports, of all that is served to those inside.
//!
//! Owns what fits: peers say how much moves, and one that names more than its share loses its own,
//! not that of others. Equal sets of ports are one, however many prefixes have them. Nothing is
//! built before it is known to fit.

use std::collections::HashMap;
use std::ops::RangeInclusive;

use crate::model::moved::{Move, TCP, UDP, merged};
use crate::model::prefix::Prefix;
use crate::model::scopes::Scopes;

/// Most parts into which ranges of ports fall, over all sets: as many as 64 sets have of 64 ranges,
/// if each range is of eight parts.
pub(super) const MAX_PARTS: usize = 1 << 15;

/// Most addresses that are still served because an earlier daemon carried calls to them.
pub(super) const MAX_INHERITED: usize = 1 << 12;

/// Most prefixes: with those that are inherited, half of what [`Moved`](super::moved::Moved) holds,
/// since it holds old and new ones together while they change.
pub(super) const MAX_PREFIXES: usize = (1 << 15) - MAX_INHERITED;

/// Bytes of the key of a part: its length in bits, the number of the set, the protocol, a zero, the
/// port.
pub(super) const PORT_KEY_BYTES: usize = 12;

/// Ports of TCP and of UDP.
pub(super) type Ports = [Vec<RangeInclusive<u16>>; 2];

/// What is served, as far as it fits.
#[derive(Debug, Default)]
pub(super) struct Plan {
    scopes: Scopes,
    /// The set of each scope; `None` for those that have moved as a whole.
    of_scopes: Vec<Option<usize>>,
    /// The sets, all different.
    pub(super) sets: Vec<Ports>,
    parts: usize,
    /// The places of those peers of which not all fits.
    pub(super) left_out: Vec<usize>,
}

impl Plan {
    /// For what each peer has moved. Peers that name least are served first.
    pub(super) fn of(of_peers: &[Vec<&Move>]) -> Self {
        if of_peers.iter().map(Vec::len).sum::<usize>() <= MAX_PREFIXES
            && let Some(all) = Self::build(of_peers.iter().flatten().copied())
        {
            return all;
        }
        // What has moved as a whole has no ports that might be too many.
        let mut whole = parts_of(of_peers, Move::is_whole);
        whole.sort_by_key(|(_, moves)| moves.len());
        let mut prefixes = MAX_PREFIXES;
        let fit = whole.into_iter().map_while(|of_peer| {
            prefixes = prefixes.checked_sub(of_peer.1.len())?;
            Some(of_peer)
        });
        let mut taken: Vec<OfPeer<'_>> = fit.collect();
        let mut limited: Vec<_> = parts_of(of_peers, |moved| !moved.is_whole())
            .into_iter()
            .filter_map(|(peer, moves)| {
                let parts = Self::build(moves.iter().copied())?.parts;
                Some((parts, (peer, moves)))
            })
            .collect();
        limited.sort_by_key(|(parts, (_, moves))| parts + moves.len());
        let mut parts = MAX_PARTS;
        let wholes = taken.len();
        taken.extend(limited.into_iter().map_while(|(of_it, of_peer)| {
            prefixes = prefixes.checked_sub(of_peer.1.len())?;
            parts = parts.checked_sub(of_it)?;
            Some(of_peer)
        }));
        // Sets of several peers may meet in more sets than they are. The last one names most.
        loop {
            let moves = taken.iter().flat_map(|(_, moves)| moves).copied();
            let built = Self::build(moves);
            if built.is_some() || taken.len() <= wholes {
                let mut plan = built.unwrap_or_default();
                plan.left_out = left_out(of_peers, &taken);
                return plan;
            }
            taken.pop();
        }
    }

    /// For these moves, unless their sets have more than [`MAX_PARTS`]. It stops as soon as that is
    /// known.
    fn build<'a>(moves: impl Iterator<Item = &'a Move>) -> Option<Self> {
        let mut plan = Self {
            scopes: Scopes::of(moves),
            ..Self::default()
        };
        let mut numbers: HashMap<Ports, usize> = HashMap::new();
        // By the set around it and its own ports: a set is joined once.
        let mut joined: HashMap<(Option<usize>, Ports), usize> = HashMap::new();
        for scope in 0..plan.scopes.len() {
            if plan.scopes.is_whole(scope) {
                plan.of_scopes.push(None);
                continue;
            }
            let around = plan.scopes.around(scope);
            let around = around.and_then(|around| plan.of_scopes[around]);
            let key = (around, plan.scopes.own_ports(scope));
            if let Some(&number) = joined.get(&key) {
                plan.of_scopes.push(Some(number));
                continue;
            }
            let [mut tcp, mut udp] = key.1.clone();
            if let Some([more_tcp, more_udp]) = around.map(|around| &plan.sets[around]) {
                tcp.extend(more_tcp.iter().cloned());
                udp.extend(more_udp.iter().cloned());
            }
            let ports = [merged(tcp), merged(udp)];
            let number = match numbers.get(&ports) {
                Some(&number) => number,
                None => {
                    let ranges = ports.iter().flatten();
                    plan.parts += ranges.map(|range| aligned(range).len()).sum::<usize>();
                    if plan.parts > MAX_PARTS {
                        return None;
                    }
                    numbers.insert(ports.clone(), plan.sets.len());
                    plan.sets.push(ports);
                    plan.sets.len() - 1
                }
            };
            joined.insert(key, number);
            plan.of_scopes.push(Some(number));
        }
        Some(plan)
    }

    /// Each prefix, and the place of its set among `sets`.
    pub(super) fn prefixes(&self) -> impl Iterator<Item = (Prefix, Option<usize>)> {
        let scopes = self.of_scopes.iter().enumerate();
        scopes.map(|(scope, &set)| (self.scopes.prefix(scope), set))
    }

    /// Whether something of an address is served.
    pub(super) fn contains(&self, addr: std::net::IpAddr) -> bool {
        self.scopes.contains(addr)
    }
}

/// Moves of the peer at a place.
type OfPeer<'a> = (usize, Vec<&'a Move>);

/// Those moves of each peer, if it has any.
fn parts_of<'a>(of_peers: &[Vec<&'a Move>], which: impl Fn(&Move) -> bool) -> Vec<OfPeer<'a>> {
    let each = of_peers.iter().enumerate().map(|(peer, moves)| {
        let those = moves.iter().copied().filter(|moved| which(moved));
        (peer, those.collect::<Vec<_>>())
    });
    each.filter(|(_, moves)| !moves.is_empty()).collect()
}

/// The peers of which not all was taken.
fn left_out(of_peers: &[Vec<&Move>], taken: &[OfPeer<'_>]) -> Vec<usize> {
    let mut missing: Vec<usize> = of_peers.iter().map(Vec::len).collect();
    for (peer, moves) in taken {
        missing[*peer] -= moves.len();
    }
    let some = missing
        .iter()
        .enumerate()
        .filter(|(_, missing)| **missing > 0);
    some.map(|(peer, _)| peer).collect()
}

/// The keys of all ports of a set that has this number.
pub(super) fn keys(number: u32, ports: &Ports) -> Vec<Vec<u8>> {
    let mut keys = Vec::new();
    for (protocol, ranges) in [TCP, UDP].into_iter().zip(ports) {
        for (port, bits) in ranges.iter().flat_map(aligned) {
            let mut key = Vec::with_capacity(PORT_KEY_BYTES);
            key.extend((48 + bits).to_ne_bytes());
            key.extend(number.to_ne_bytes());
            key.extend([protocol, 0]);
            key.extend(port.to_be_bytes());
            keys.push(key);
        }
    }
    keys
}

/// A range in parts that a prefix has: the first port of each, and the bits that are the same.
fn aligned(range: &RangeInclusive<u16>) -> Vec<(u16, u32)> {
    let (mut first, last) = (u32::from(*range.start()), u32::from(*range.end()));
    let mut parts = Vec::new();
    while first <= last {
        let mut free = first.trailing_zeros().min(16);
        while first + (1 << free) - 1 > last {
            free -= 1;
        }
        parts.push((first as u16, 16 - free));
        first += 1 << free;
    }
    parts
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;
    use crate::model::moved::{MAX_MOVES, Transport};

    fn singles(from: [u8; 4], count: usize, ports: &[RangeInclusive<u16>]) -> Vec<Move> {
        let first = u32::from_be_bytes(from);
        let each = (0..count as u32).map(|n| Move {
            prefix: std::net::IpAddr::from(Ipv4Addr::from_bits(first + n)).into(),
            ports: ports.to_vec(),
            transport: None,
        });
        each.collect()
    }

    /// Ranges that fall into as many parts as possible.
    fn awkward(shift: u16) -> Vec<RangeInclusive<u16>> {
        let ranges = (0..64u16).map(|n| (1024 * n + 1 + shift)..=(1024 * n + 1022));
        ranges.collect()
    }

    fn refs(of_peers: &[Vec<Move>]) -> Vec<Vec<&Move>> {
        of_peers
            .iter()
            .map(|moves| moves.iter().collect())
            .collect()
    }

    #[test]
    fn many_addresses_with_the_same_ports_have_one_set() {
        for ports in [vec![80..=80, 443..=443, 8000..=8100], awkward(0)] {
            let moves = [singles([192, 0, 2, 0], MAX_MOVES, &ports)];
            let plan = Plan::of(&refs(&moves));
            assert_eq!(plan.sets, [[ports.clone(), ports]]);
            assert_eq!(plan.prefixes().count(), MAX_MOVES);
            assert!(plan.left_out.is_empty());
        }
    }

    #[test]
    fn who_names_too_many_ports_loses_its_own_ports_alone() {
        let mut greedy = singles([10, 0, 0, 0], 1, &[]);
        for n in 0..200 {
            greedy.extend(singles([10, 1, n, 0], 1, &awkward(2 * u16::from(n))));
        }
        let modest = singles([192, 0, 2, 0], 16, &[80..=80, 443..=443]);
        for place in [0, 1] {
            let mut all = vec![modest.clone()];
            all.insert(place, greedy.clone());
            let plan = Plan::of(&refs(&all));
            assert_eq!(plan.left_out, [place]);
            let whole = plan.prefixes().filter(|(_, set)| set.is_none());
            assert_eq!(whole.count(), 1, "what has no ports stays");
            assert_eq!(plan.prefixes().count(), 17);
        }
    }

    #[test]
    fn too_many_prefixes_are_those_of_who_names_most() {
        let all = [
            singles([10, 0, 0, 0], MAX_MOVES, &[]),
            singles([10, 1, 0, 0], MAX_MOVES, &[80..=80]),
            singles([192, 0, 2, 5], 1, &[]),
            singles([192, 0, 2, 6], 1, &[80..=80]),
        ];
        let plan = Plan::of(&refs(&all));
        assert_eq!(plan.left_out, [1]);
        assert_eq!(plan.prefixes().count(), MAX_MOVES + 2);
    }

    /// Each prefix of one peer lies in one of another, and each meets another set there.
    #[test]
    fn sets_that_meet_in_too_many_are_left_out_before_they_are_built() {
        let around = (0..60u8).map(|n| Move {
            prefix: format!("10.{n}.0.0/16").parse().unwrap(),
            ports: awkward(u16::from(n) % 3),
            transport: Some(Transport::Tcp),
        });
        let within = (0..60u8).flat_map(|n| {
            (0..200u8).map(move |host| Move {
                prefix: format!("10.{n}.0.{host}").parse().unwrap(),
                ports: vec![1024 * u16::from(host % 60)..=1024 * u16::from(host % 60)],
                transport: Some(Transport::Tcp),
            })
        });
        let plan = Plan::of(&refs(&[within.collect(), around.collect()]));
        assert_eq!(plan.left_out.len(), 1);
        assert!(plan.parts <= MAX_PARTS);
    }

    proptest! {
        #[test]
        fn the_parts_of_a_range_are_the_range(first in any::<u16>(), more in any::<u16>()) {
            let last = first.saturating_add(more);
            let mut next = u32::from(first);
            for (port, bits) in aligned(&(first..=last)) {
                prop_assert_eq!(u32::from(port), next);
                prop_assert_eq!(u32::from(port) % (1 << (16 - bits)), 0);
                next += 1 << (16 - bits);
            }
            prop_assert_eq!(next, u32::from(last) + 1);
        }
    }
}
