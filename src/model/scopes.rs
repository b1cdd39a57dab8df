//! What has moved of which address, made ready for lookup, and which moves overlap.
//!
//! Moves may lie within each other: some ports of a prefix, and other ports of one of its
//! addresses. A *scope* is everything that has moved of the addresses of one prefix, but for those
//! of longer prefixes within it, which are scopes of their own and have what the shorter ones have
//! as well.
//!
//! Owns the order of prefixes and their nesting, so that neither a lookup nor a check of moves
//! against each other goes through all of them. Knows nothing of packets.

use std::collections::HashSet;
use std::net::IpAddr;
use std::ops::{Range, RangeInclusive};

use crate::model::moved::{Move, TCP, Transport, UDP, merged};
use crate::model::prefix::Prefix;

/// Everything that has moved, by address.
#[derive(Clone, Debug, Default)]
pub struct Scopes {
    /// The first address of each segment, in order. Segments are apart from each other.
    firsts: Vec<u128>,
    /// The last address of each, and its scope.
    segments: Vec<(u128, u32)>,
    scopes: Vec<Scope>,
}

/// Everything that has moved of the addresses of a prefix.
#[derive(Clone, Debug)]
pub struct Scope {
    prefix: Prefix,
    rights: Rights,
    /// The next shorter prefix around it.
    around: Option<u32>,
}

impl Scopes {
    /// For these moves.
    pub fn new(moves: &[Move]) -> Self {
        Self::of(moves.iter())
    }

    /// For these moves, wherever they are.
    pub fn of<'a>(moves: impl Iterator<Item = &'a Move>) -> Self {
        let mut nodes = nested(moves);
        for node in &mut nodes {
            node.rights.settle();
        }
        let mut out = Self::default();
        // The scopes around the place that was reached.
        let mut open: Vec<(u128, u32)> = Vec::new();
        let mut at = 0;
        for (number, node) in (0..).zip(&nodes) {
            let (first, last) = (
                number_of(node.prefix.first()),
                number_of(node.prefix.last()),
            );
            while let Some(&(end, scope)) = open.last()
                && end < first
            {
                out.push(at, end, scope);
                at = end.saturating_add(1);
                open.pop();
            }
            if let (Some(&(_, scope)), Some(end)) = (open.last(), first.checked_sub(1)) {
                out.push(at, end, scope);
            }
            at = first;
            open.push((last, number));
        }
        while let Some((end, scope)) = open.pop() {
            out.push(at, end, scope);
            at = end.saturating_add(1);
        }
        let scope = |node: Node| Scope {
            prefix: node.prefix,
            rights: node.rights,
            around: node.around,
        };
        out.scopes = nodes.into_iter().map(scope).collect();
        for number in 0..out.scopes.len() {
            let around = out.scopes[number].around;
            let whole = around.and_then(|around| out.scopes[around as usize].rights.whole);
            let rights = &mut out.scopes[number].rights;
            rights.whole = rights.whole.or(whole);
        }
        out
    }

    fn push(&mut self, first: u128, last: u128, scope: u32) {
        if first <= last {
            self.firsts.push(first);
            self.segments.push((last, scope));
        }
    }

    /// The number of the scope that an address lies in; `addr` is as in [`number_of`].
    #[inline]
    pub fn find(&self, addr: u128) -> Option<usize> {
        let behind = self.firsts.partition_point(|&first| first <= addr);
        let &(last, scope) = self.segments.get(behind.checked_sub(1)?)?;
        (addr <= last).then_some(scope as usize)
    }

    /// Whether something of an address has moved.
    pub fn contains(&self, addr: IpAddr) -> bool {
        self.find(number_of(addr)).is_some()
    }

    /// Whether something has moved of some address of a prefix.
    pub fn meets(&self, prefix: &Prefix) -> bool {
        let (first, last) = (number_of(prefix.first()), number_of(prefix.last()));
        let at = self.segments.partition_point(|&(end, _)| end < first);
        self.firsts.get(at).is_some_and(|&start| start <= last)
    }

    /// Whether all of an address has moved.
    pub fn is_whole_at(&self, addr: IpAddr) -> bool {
        self.find(number_of(addr))
            .is_some_and(|scope| self.is_whole(scope))
    }

    /// How many scopes there are.
    pub fn len(&self) -> usize {
        self.scopes.len()
    }

    /// The prefix of a scope.
    pub fn prefix(&self, scope: usize) -> Prefix {
        self.scopes[scope].prefix
    }

    /// Whether all has moved of each address of a scope.
    #[inline]
    pub fn is_whole(&self, scope: usize) -> bool {
        self.scopes[scope].rights.whole.is_some()
    }

    /// Whether some ports have moved of a scope by a move of its own.
    pub fn has_parts(&self, scope: usize) -> bool {
        let mut at = Some(scope as u32);
        while let Some(scope) = at {
            let scope = &self.scopes[scope as usize];
            if !scope.rights.tcp.is_empty() || !scope.rights.udp.is_empty() {
                return true;
            }
            at = scope.around;
        }
        false
    }

    /// Whether a packet belongs to a scope that has this IP protocol, and this port at an address
    /// of it; see [`Move::takes`].
    #[inline]
    pub fn takes(&self, scope: usize, protocol: u8, port: Option<u16>) -> bool {
        self.is_whole(scope) || self.names(scope, protocol, port)
    }

    /// Whether a move names the port by number.
    pub fn names(&self, scope: usize, protocol: u8, port: Option<u16>) -> bool {
        let Some(port) = port else { return false };
        let mut at = Some(scope as u32);
        while let Some(scope) = at {
            let scope = &self.scopes[scope as usize];
            if scope
                .rights
                .of(protocol)
                .is_some_and(|parts| holds(parts, port))
            {
                return true;
            }
            at = scope.around;
        }
        false
    }

    /// Which move takes a packet that belongs to a scope: the one that names its port, or else the
    /// one of everything. It is counted from 0, as the moves were given.
    pub fn taker(&self, scope: usize, protocol: u8, port: Option<u16>) -> Option<usize> {
        let up = |scope: &usize| self.around(*scope);
        let mut chain = std::iter::successors(Some(scope), up);
        let named = port.and_then(|port| {
            chain.find_map(|scope| {
                let parts = self.scopes[scope].rights.of(protocol)?;
                Some(holder(parts, port)?.by)
            })
        });
        let by = named.or(self.scopes[scope].rights.whole)?;
        Some(by as usize)
    }

    /// How many different sets of ports the scopes have that have moved in part.
    pub fn port_sets(&self) -> usize {
        let in_part = (0..self.len()).filter(|&scope| !self.is_whole(scope));
        let sets: HashSet<_> = in_part.flat_map(|scope| self.ports(scope)).collect();
        sets.iter().filter(|ports| !ports.is_empty()).count()
    }

    /// The next shorter scope around one, which has a lower number.
    pub fn around(&self, scope: usize) -> Option<usize> {
        self.scopes[scope].around.map(|around| around as usize)
    }

    /// The ports of TCP and of UDP that moves of the very prefix of a scope name.
    pub fn own_ports(&self, scope: usize) -> [Vec<RangeInclusive<u16>>; 2] {
        [TCP, UDP].map(|protocol| {
            let parts = self.scopes[scope].rights.of(protocol).unwrap_or_default();
            parts.iter().map(|part| part.first..=part.last).collect()
        })
    }

    /// The ports of TCP and of UDP that have moved of a scope in part.
    pub fn ports(&self, scope: usize) -> [Vec<RangeInclusive<u16>>; 2] {
        [TCP, UDP].map(|protocol| {
            let mut ranges = Vec::new();
            let mut at = Some(scope as u32);
            while let Some(scope) = at {
                let scope = &self.scopes[scope as usize];
                let parts = scope.rights.of(protocol).unwrap_or_default();
                ranges.extend(parts.iter().map(|part| part.first..=part.last));
                at = scope.around;
            }
            merged(ranges)
        })
    }
}

/// An address as a number: the order of numbers is that of addresses. IPv4 is as `::ffff:a.b.c.d`,
/// which no IPv6 packet may carry and no move may hold, so the two never meet.
pub fn number_of(addr: IpAddr) -> u128 {
    match addr {
        IpAddr::V4(addr) => addr.to_ipv6_mapped().to_bits(),
        IpAddr::V6(addr) => addr.to_bits(),
    }
}

/// The first move that overlaps another one, and that one.
pub fn first_overlap<'a>(moves: &[&'a Move]) -> Option<(&'a Move, &'a Move)> {
    let mut nodes = nested(moves.iter().copied());
    for number in 0..nodes.len() {
        let pair = nodes[number].rights.settle();
        let node = &nodes[number];
        let pair = pair
            .or_else(|| above(&nodes, node).find_map(|other| other.rights.overlap(&node.rights)));
        if let Some((a, b)) = pair {
            let (a, b) = (a.min(b) as usize, a.max(b) as usize);
            return moves.get(a).copied().zip(moves.get(b).copied());
        }
    }
    None
}

/// For each of `moves`, whether it overlaps one of `others`.
pub fn overlapping<'a>(
    moves: impl Iterator<Item = &'a Move> + Clone,
    others: impl Iterator<Item = &'a Move> + Clone,
) -> Vec<bool> {
    let mut found = vec![false; moves.clone().count()];
    let mut nodes = nested(others.clone());
    for node in &mut nodes {
        node.rights.settle();
    }
    let mut asked: Vec<(usize, &Move)> = moves.enumerate().collect();
    asked.sort_by_key(|(_, moved)| order(moved.prefix));
    // What was met within the prefixes behind, and which of the nodes that is: those within the
    // next prefix are part of what is within it. So nothing is looked at once for each prefix
    // around it, of which there may be a hundred.
    let mut known: Vec<(Range<usize>, Rights)> = Vec::new();
    let mut shared = Around::default();
    for same in asked.chunk_by(|(_, a), (_, b)| a.prefix == b.prefix).rev() {
        let Some((_, Move { prefix, .. })) = same.first() else {
            continue;
        };
        let start = nodes.partition_point(|node| order(node.prefix) < order(*prefix));
        let (before, behind) = nodes.split_at(start);
        let end = start + behind.partition_point(|node| prefix.covers(&node.prefix));
        let mut within = Rights::default();
        let mut at = start;
        while let Some((part, rights)) = known.pop_if(|(part, _)| part.start < end) {
            for node in &nodes[at..part.start] {
                within.add(&node.rights);
            }
            within.add(&rights);
            at = part.end;
        }
        for node in &nodes[at..end] {
            within.add(&node.rights);
        }
        within.settle();
        let around = before.last().into_iter().flat_map(|last| {
            let itself = last.prefix.covers(prefix).then_some(last);
            itself.into_iter().chain(above(&nodes, last))
        });
        shared.set(around.filter(|node| node.prefix.covers(prefix)).collect());
        for &(number, moved) in same {
            let mut alone = Rights::default();
            alone.enter(0, moved);
            found[number] = within.overlap(&alone).is_some() || shared.overlap(&alone);
        }
        if start < end {
            known.push((start..end, within));
        }
    }
    found
}

/// The nodes around a prefix, mostly those around the next one as well.
#[derive(Default)]
struct Around<'a> {
    nodes: Vec<&'a Node>,
    /// How many parts were compared.
    compared: usize,
    /// The rights of all of them, once it has cost more to do without.
    all: Option<Rights>,
}

impl<'a> Around<'a> {
    fn set(&mut self, nodes: Vec<&'a Node>) {
        // The innermost one says which the others are.
        let innermost = |nodes: &[&Node]| nodes.first().map(|node| node.prefix);
        if innermost(&nodes) != innermost(&self.nodes) {
            *self = Self {
                nodes,
                ..Self::default()
            };
        }
    }

    fn overlap(&mut self, rights: &Rights) -> bool {
        if self.all.is_none() && self.compared > self.nodes.iter().map(|it| it.rights.len()).sum() {
            let mut all = Rights::default();
            for node in &self.nodes {
                all.add(&node.rights);
            }
            all.settle();
            self.all = Some(all);
        }
        if let Some(all) = &self.all {
            return all.overlap(rights).is_some();
        }
        self.compared += self.nodes.len() * (1 + rights.len());
        (self.nodes.iter()).any(|node| node.rights.overlap(rights).is_some())
    }
}

/// A prefix among others.
struct Node {
    prefix: Prefix,
    rights: Rights,
    /// The next shorter prefix around it.
    around: Option<u32>,
}

/// The prefixes of moves in order, each with what has moved of it, and nested.
fn nested<'a>(moves: impl Iterator<Item = &'a Move>) -> Vec<Node> {
    let mut sorted: Vec<(u32, &Move)> = (0..).zip(moves).collect();
    sorted.sort_by_key(|(_, moved)| order(moved.prefix));
    let mut nodes: Vec<Node> = Vec::new();
    // Those around the last one, and that itself.
    let mut open: Vec<u32> = Vec::new();
    for (number, moved) in sorted {
        let known = nodes.last().is_some_and(|node| node.prefix == moved.prefix);
        if !known {
            while let Some(&last) = open.last()
                && !nodes[last as usize].prefix.covers(&moved.prefix)
            {
                open.pop();
            }
            nodes.push(Node {
                prefix: moved.prefix,
                rights: Rights::default(),
                around: open.last().copied(),
            });
            open.push(nodes.len() as u32 - 1);
        }
        if let Some(node) = nodes.last_mut() {
            node.rights.enter(number, moved);
        }
    }
    nodes
}

/// A prefix stands before those within it, and behind those around it.
fn order(prefix: Prefix) -> (u128, u8) {
    (number_of(prefix.first()), prefix.len())
}

/// The nodes around one.
fn above<'a>(nodes: &'a [Node], node: &'a Node) -> impl Iterator<Item = &'a Node> {
    let up = |node: &&'a Node| node.around.map(|around| &nodes[around as usize]);
    std::iter::successors(up(&node), up)
}

/// Ports that have moved.
#[derive(Clone, Copy, Debug)]
struct Part {
    first: u16,
    last: u16,
    /// The number of the move.
    by: u32,
}

/// What has moved of a prefix.
#[derive(Clone, Default, Debug)]
struct Rights {
    /// A move of everything.
    whole: Option<u32>,
    /// Two such moves.
    twice: Option<(u32, u32)>,
    tcp: Vec<Part>,
    udp: Vec<Part>,
}

impl Rights {
    fn enter(&mut self, by: u32, moved: &Move) {
        if moved.is_whole() {
            self.twice = self.twice.or(self.whole.map(|first| (first, by)));
            self.whole = self.whole.or(Some(by));
            return;
        }
        let everything = [0..=u16::MAX];
        let ports = if moved.ports.is_empty() {
            &everything[..]
        } else {
            &moved.ports
        };
        let parts = ports.iter().map(|ports| Part {
            first: *ports.start(),
            last: *ports.end(),
            by,
        });
        if moved.transport != Some(Transport::Udp) {
            self.tcp.extend(parts.clone());
        }
        if moved.transport != Some(Transport::Tcp) {
            self.udp.extend(parts);
        }
    }

    /// How many parts there are.
    fn len(&self) -> usize {
        self.tcp.len() + self.udp.len()
    }

    fn add(&mut self, other: &Self) {
        self.whole = self.whole.or(other.whole);
        self.tcp.extend(&other.tcp);
        self.udp.extend(&other.udp);
    }

    /// Sorts the parts, and merges those that overlap. Returns two moves that do, if any.
    fn settle(&mut self) -> Option<(u32, u32)> {
        let mut pair = self.twice;
        for parts in [&mut self.tcp, &mut self.udp] {
            parts.sort_by_key(|part| part.first);
            parts.dedup_by(|part, before| {
                let meet = part.first <= before.last;
                if meet {
                    pair = pair.or(Some((before.by, part.by)));
                    before.last = before.last.max(part.last);
                }
                meet
            });
        }
        let some = self.tcp.first().or(self.udp.first());
        pair.or(self.whole.zip(some.map(|part| part.by)))
    }

    fn of(&self, protocol: u8) -> Option<&[Part]> {
        match protocol {
            TCP => Some(&self.tcp),
            UDP => Some(&self.udp),
            _ => None,
        }
    }

    /// Two moves of both that overlap. These rights are settled.
    fn overlap(&self, other: &Self) -> Option<(u32, u32)> {
        let some = |rights: &Self| {
            let part = rights.tcp.first().or(rights.udp.first());
            rights.whole.or(part.map(|part| part.by))
        };
        if self.whole.is_some() || other.whole.is_some() {
            return some(self).zip(some(other));
        }
        for (ours, theirs) in [(&self.tcp, &other.tcp), (&self.udp, &other.udp)] {
            for part in theirs {
                let behind = ours.partition_point(|it| it.first <= part.last);
                let before = behind.checked_sub(1).and_then(|at| ours.get(at));
                if let Some(it) = before.filter(|it| it.last >= part.first) {
                    return Some((it.by, part.by));
                }
            }
        }
        None
    }
}

/// Whether a port is among parts that are settled.
fn holds(parts: &[Part], port: u16) -> bool {
    holder(parts, port).is_some()
}

/// The one among parts that are settled that has a port.
fn holder(parts: &[Part], port: u16) -> Option<&Part> {
    let behind = parts.partition_point(|part| part.first <= port);
    let before = behind.checked_sub(1).and_then(|at| parts.get(at));
    before.filter(|part| port <= part.last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::moved::MAX_MOVES;
    use crate::testing::all;
    use proptest::prelude::*;

    fn moves(text: &str) -> Vec<Move> {
        all(text)
    }

    #[test]
    fn an_address_has_what_has_moved_of_it_and_of_the_prefixes_around_it() {
        let scopes = Scopes::new(&moves(
            "192.0.2.0/28:80/tcp 192.0.2.4/30:53/udp 192.0.2.5:443/tcp 192.0.2.9 2001:db8::/64",
        ));
        let takes = |addr: &str, protocol, port| {
            let found = scopes.find(number_of(addr.parse().unwrap()));
            found.is_some_and(|scope| scopes.takes(scope, protocol, Some(port)))
        };
        for (addr, tcp_80, udp_53, tcp_443) in [
            ("192.0.2.0", true, false, false),
            ("192.0.2.4", true, true, false),
            ("192.0.2.5", true, true, true),
            ("192.0.2.8", true, false, false),
            ("192.0.2.9", true, true, true),
            ("192.0.2.15", true, false, false),
            ("192.0.2.16", false, false, false),
            ("192.0.1.255", false, false, false),
            ("2001:db8::ffff", true, true, true),
            ("2001:db8:0:1::", false, false, false),
        ] {
            assert_eq!(takes(addr, TCP, 80), tcp_80, "{addr}");
            assert_eq!(takes(addr, UDP, 53), udp_53, "{addr}");
            assert_eq!(takes(addr, TCP, 443), tcp_443, "{addr}");
        }
        assert!(scopes.is_whole_at("192.0.2.9".parse().unwrap()));
        assert!(!scopes.is_whole_at("192.0.2.5".parse().unwrap()));
    }

    #[test]
    fn the_pair_that_overlaps_is_named() {
        for (all, pair) in [
            (
                "192.0.2.5 192.0.2.6 192.0.2.5:80",
                Some("192.0.2.5 192.0.2.5:80"),
            ),
            (
                "192.0.2.5:80 192.0.2.0/28",
                Some("192.0.2.5:80 192.0.2.0/28"),
            ),
            (
                "192.0.2.0/28:80 192.0.2.5:81 192.0.2.5:70-80/udp",
                Some("192.0.2.0/28:80 192.0.2.5:70-80/udp"),
            ),
            (
                "192.0.2.0/28:80/tcp 192.0.2.5:80/udp 192.0.2.5:81 192.0.2.16",
                None,
            ),
            (
                "192.0.2.0/28 192.0.2.16/28 2001:db8::/64 2001:db8:0:1::/64",
                None,
            ),
        ] {
            let all = moves(all);
            let all: Vec<&Move> = all.iter().collect();
            let pair = pair.map(moves);
            let pair = pair.as_ref().map(|pair| (&pair[0], &pair[1]));
            assert_eq!(first_overlap(&all), pair);
        }
    }

    #[test]
    fn many_moves_are_checked_and_looked_up_without_going_through_all() {
        // It would take far longer than all other tests if each was held against each.
        let single = |n: u32| format!("10.{}.{}.{}:80", n >> 16, n >> 8 & 255, n & 255);
        let all: Vec<Move> = (0..65_536).map(|n| single(n).parse().unwrap()).collect();
        let refs: Vec<&Move> = all.iter().collect();
        assert_eq!(first_overlap(&refs), None);
        assert!(overlapping(all.iter(), all.iter()).iter().all(|&it| it));
        let of_one: Vec<Move> = (1..=65_535_u16)
            .map(|port| format!("10.0.0.0/8:{port}/udp").parse().unwrap())
            .collect();
        let found = overlapping(of_one.iter(), all.iter());
        assert_eq!(found.iter().filter(|&&it| it).count(), 1);
        let scopes = Scopes::new(&all);
        assert_eq!(
            scopes.find(number_of("10.0.255.255".parse().unwrap())),
            Some(65_535)
        );
    }

    fn any_move() -> impl Strategy<Value = Move> {
        let addr = prop_oneof![
            (0u8..32).prop_map(|host| (IpAddr::from([192, 0, 2, host]), 27)),
            (0u16..32)
                .prop_map(|host| { (IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, host]), 123) }),
        ];
        let ports = proptest::collection::vec((1u16..12, 0u16..4), 0..3);
        (addr, 0u8..=5, ports, 0usize..3).prop_map(|((addr, shortest), more, ports, transport)| {
            let ranges = ports.into_iter().map(|(first, more)| first..=first + more);
            Move {
                prefix: Prefix::of(addr, shortest + more),
                ports: merged(ranges.collect()),
                transport: [None, Some(Transport::Tcp), Some(Transport::Udp)][transport],
            }
        })
    }

    #[test]
    fn one_address_that_has_moved_twice_is_named() {
        let twice = moves("192.0.2.5 192.0.2.6 192.0.2.5");
        let refs: Vec<&Move> = twice.iter().collect();
        assert_eq!(first_overlap(&refs), Some((&twice[0], &twice[2])));
    }

    #[test]
    #[ignore = "a measurement: cargo test --lib -- --ignored --nocapture what_overlapping_costs"]
    #[expect(clippy::disallowed_methods, reason = "a measurement")]
    fn what_overlapping_costs() {
        let nth = |n: u128| IpAddr::V6(((0x2001_0db8 << 96) + n).into());
        // Of one peer: as many single addresses as may be, whole, of two ports, and of 64 ranges.
        let singles = |ports: u16| -> Vec<Move> {
            let one = |n: usize| Move {
                prefix: nth((n as u128) << 1).into(),
                ports: (0..ports).map(|n| 1000 + 2 * n..=1000 + 2 * n).collect(),
                transport: None,
            };
            (0..MAX_MOVES).map(one).collect()
        };
        // Of another: the same beside them, and prefixes around prefixes, of a port beside theirs.
        let beside = |moves: &[Move]| -> Vec<Move> {
            let another = |moved: &Move| Move {
                ports: moved
                    .ports
                    .iter()
                    .map(|it| it.start() + 1..=it.end() + 1)
                    .collect(),
                ..moved.clone()
            };
            moves.iter().map(another).collect()
        };
        let nested: Vec<Move> = (0..MAX_MOVES)
            .map(|n| Move {
                prefix: Prefix::of(nth((n as u128 / 96) << 7), 32 + (n % 96) as u8),
                ports: vec![1 + (n / 96) as u16..=1 + (n / 96) as u16],
                transport: None,
            })
            .collect();
        for ports in [0, 2, 64] {
            let known = singles(ports);
            let next = beside(&known);
            for (name, asked) in [("beside", &next), ("nested", &nested)] {
                for (one, other) in [(asked, &known), (&known, asked)] {
                    let start = std::time::Instant::now();
                    let found = overlapping(one.iter(), other.iter());
                    let met = found.iter().filter(|it| **it).count();
                    eprintln!("{ports} ports, {name}: {met} met, {:?}", start.elapsed());
                }
            }
        }
    }

    proptest! {
        #[test]
        fn a_lookup_finds_what_a_walk_through_all_moves_finds(
            all in proptest::collection::vec(any_move(), 0..12),
            addr in any_move().prop_map(|moved| moved.prefix.first()),
            protocol in proptest::sample::select(vec![TCP, UDP, 1]), port in 0u16..16,
        ) {
            let scopes = Scopes::new(&all);
            let mut of_addr = all.iter().filter(|moved| moved.prefix.contains(addr));
            let found = scopes.find(number_of(addr));
            prop_assert_eq!(found.is_some(), of_addr.clone().next().is_some());
            prop_assert_eq!(
                scopes.is_whole_at(addr),
                of_addr.clone().any(Move::is_whole)
            );
            let longest = of_addr.clone().map(|moved| moved.prefix.len()).max();
            prop_assert_eq!(found.map(|scope| scopes.prefix(scope).len()), longest);
            let port = (protocol != 1).then_some(port);
            let takes = found.is_some_and(|scope| scopes.takes(scope, protocol, port));
            prop_assert_eq!(takes, of_addr.any(|moved| moved.takes(protocol, port)));
            if let Some(scope) = found.filter(|&scope| !scopes.is_whole(scope)) {
                let [tcp, udp] = scopes.ports(scope);
                let ports = if protocol == TCP { tcp } else { udp };
                let named = port.is_some_and(|port| ports.iter().any(|it| it.contains(&port)));
                prop_assert_eq!(named, takes);
            }
        }

        #[test]
        fn overlaps_are_those_that_holding_each_against_each_finds(
            one in proptest::collection::vec(any_move(), 0..8),
            other in proptest::collection::vec(any_move(), 0..8),
        ) {
            let each = one.iter().map(|a| other.iter().any(|b| a.overlaps(b)));
            prop_assert_eq!(overlapping(one.iter(), other.iter()), each.collect::<Vec<_>>());
            let refs: Vec<&Move> = one.iter().collect();
            let found = first_overlap(&refs);
            let any = (0..one.len()).any(|a| one[a + 1..].iter().any(|b| one[a].overlaps(b)));
            prop_assert_eq!(found.is_some(), any);
            prop_assert!(found.is_none_or(|(a, b)| a.overlaps(b)));
        }
    }
}
