//! Which of several moves a packet belongs to, so that it can be treated in that one's way.
//!
//! Moves may overlap. The longest prefix counts, and of several moves of one prefix the first one
//! that takes the port. What is asked here has moved: whether it has is the business of
//! [`Scopes`].

use std::collections::{BTreeMap, HashMap};
use std::ops::RangeInclusive;

use crate::model::moved::{Move, TCP, Transport, UDP};
use crate::model::prefix::Prefix;
use crate::model::scopes::Scopes;

/// Ports that belong to one move, by its number.
pub type Part = (RangeInclusive<u16>, u32);

/// The moves, by what they take.
#[derive(Clone, Debug)]
pub struct Owners {
    /// By the number of the scope, what moves of its very prefix take.
    of_scopes: Vec<Taken>,
}

/// What moves take of a prefix.
#[derive(Clone, Debug, Default)]
struct Taken {
    tcp: Vec<Part>,
    udp: Vec<Part>,
    /// The move of everything.
    whole: Option<u32>,
    /// The first move of some ports of TCP, and of UDP.
    first: [Option<u32>; 2],
}

/// What of a scope belongs to which move, those of shorter prefixes included.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Owned {
    /// Ports of TCP, in order.
    pub tcp: Vec<Part>,
    /// Ports of UDP, in order.
    pub udp: Vec<Part>,
    /// Whatever has no port.
    pub other: Option<u32>,
    /// Fragments of TCP and of UDP that show no port.
    pub fragments: [Option<u32>; 2],
}

impl Owners {
    /// For these moves, and the scopes of the same.
    pub fn new(moves: &[Move], scopes: &Scopes) -> Self {
        let mut of_prefixes: HashMap<Prefix, Vec<u32>> = HashMap::new();
        for (number, moved) in (0..).zip(moves) {
            of_prefixes.entry(moved.prefix).or_default().push(number);
        }
        let of_scope = |scope| {
            let numbers = of_prefixes.get(&scopes.prefix(scope));
            taken_by(moves, numbers.map_or(&[][..], Vec::as_slice))
        };
        Self {
            of_scopes: (0..scopes.len()).map(of_scope).collect(),
        }
    }

    /// The move that a packet belongs to, whose destination lies in this scope: by its IP protocol,
    /// and its port at the moved address, if it shows one.
    pub fn find(
        &self,
        scopes: &Scopes,
        scope: usize,
        protocol: u8,
        port: Option<u16>,
    ) -> Option<usize> {
        let around = std::iter::successors(Some(scope), |&scope| scopes.around(scope));
        let mut taken = around.filter_map(|scope| self.of_scopes.get(scope));
        let found = taken.find_map(|taken| taken.owner(protocol, port));
        found.map(|number| number as usize)
    }

    /// All that belongs to somebody in a scope.
    pub fn owned(&self, scopes: &Scopes, scope: usize) -> Owned {
        let around = std::iter::successors(Some(scope), |&scope| scopes.around(scope));
        let (mut tcp, mut udp) = (BTreeMap::new(), BTreeMap::new());
        let mut owned = Owned::default();
        for taken in around.filter_map(|scope| self.of_scopes.get(scope)) {
            for (ports, by) in &taken.tcp {
                give(&mut tcp, ports, *by);
            }
            for (ports, by) in &taken.udp {
                give(&mut udp, ports, *by);
            }
            owned.other = owned.other.or(taken.whole);
            for (mine, first) in owned.fragments.iter_mut().zip(taken.first) {
                *mine = mine.or(first);
            }
        }
        (owned.tcp, owned.udp) = (parts(tcp), parts(udp));
        owned
    }
}

impl Taken {
    fn owner(&self, protocol: u8, port: Option<u16>) -> Option<u32> {
        let (parts, first) = match protocol {
            TCP => (&self.tcp, self.first[0]),
            UDP => (&self.udp, self.first[1]),
            _ => return self.whole,
        };
        let Some(port) = port else { return first };
        let behind = parts.partition_point(|(ports, _)| *ports.start() <= port);
        let (ports, by) = parts.get(behind.checked_sub(1)?)?;
        ports.contains(&port).then_some(*by)
    }
}

/// What these moves take, which are of one prefix.
fn taken_by(moves: &[Move], numbers: &[u32]) -> Taken {
    let everything = [0..=u16::MAX];
    let (mut tcp, mut udp) = (BTreeMap::new(), BTreeMap::new());
    let mut taken = Taken::default();
    for &number in numbers {
        let Some(moved) = moves.get(number as usize) else {
            continue;
        };
        let ports = if moved.ports.is_empty() {
            &everything[..]
        } else {
            &moved.ports
        };
        if moved.transport != Some(Transport::Udp) {
            ports.iter().for_each(|ports| give(&mut tcp, ports, number));
            taken.first[0] = taken.first[0].or(Some(number));
        }
        if moved.transport != Some(Transport::Tcp) {
            ports.iter().for_each(|ports| give(&mut udp, ports, number));
            taken.first[1] = taken.first[1].or(Some(number));
        }
        if moved.is_whole() {
            taken.whole = taken.whole.or(Some(number));
        }
    }
    (taken.tcp, taken.udp) = (parts(tcp), parts(udp));
    taken
}

/// Ports that are given away, by the first: the last, and to whom.
type Given = BTreeMap<u16, (u16, u32)>;

/// Gives those of these ports to a move that nobody has.
fn give(given: &mut Given, ports: &RangeInclusive<u16>, by: u32) {
    let last = *ports.end();
    let mut next = Some(*ports.start());
    while let Some(first) = next.filter(|&first| first <= last) {
        let before = given.range(..=first).next_back();
        if let Some((_, &(end, _))) = before.filter(|&(_, &(end, _))| end >= first) {
            next = end.checked_add(1);
            continue;
        }
        let behind = given.range(first..=last).next().map(|(&start, _)| start);
        let end = behind.map_or(last, |start| start - 1);
        given.insert(first, (end, by));
        next = end.checked_add(1);
    }
}

fn parts(given: Given) -> Vec<Part> {
    let part = |(first, (last, by))| (first..=last, by);
    given.into_iter().map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::scopes::number_of;
    use crate::packet::ICMP;
    use crate::testing::all;
    use proptest::prelude::*;
    use std::net::IpAddr;

    /// The number of the move of a packet by the rule, from all moves.
    fn owner(moves: &[Move], addr: IpAddr, protocol: u8, port: u16) -> Option<usize> {
        let takes = |moved: &Move| moved.takes(protocol, Some(port));
        let all = moves.iter().enumerate();
        let taking = all.filter(|(_, moved)| moved.prefix.contains(addr) && takes(moved));
        let best = taking.max_by_key(|&(number, moved)| (moved.prefix.len(), usize::MAX - number));
        best.map(|(number, _)| number)
    }

    fn find(moves: &[Move], addr: IpAddr, protocol: u8, port: u16) -> Option<usize> {
        let scopes = Scopes::new(moves);
        let owners = Owners::new(moves, &scopes);
        let scope = scopes.find(number_of(addr))?;
        owners.find(&scopes, scope, protocol, Some(port))
    }

    #[test]
    fn the_longest_prefix_and_then_the_first_move_counts() {
        let moves = all(
            "192.0.2.0/28 192.0.2.5:80-90/tcp 192.0.2.5:85-99 192.0.2.9 192.0.2.9:53/udp \
             [2001:db8::/64]:80",
        );
        let at = |addr: &str, protocol, port| find(&moves, addr.parse().unwrap(), protocol, port);
        assert_eq!(at("192.0.2.1", TCP, 80), Some(0));
        assert_eq!(at("192.0.2.5", TCP, 80), Some(1));
        assert_eq!(at("192.0.2.5", TCP, 85), Some(1), "the first in the list");
        assert_eq!(at("192.0.2.5", TCP, 91), Some(2));
        assert_eq!(at("192.0.2.5", UDP, 85), Some(2));
        assert_eq!(at("192.0.2.5", UDP, 80), Some(0), "the prefix around it");
        assert_eq!(at("192.0.2.5", ICMP, 0), Some(0));
        assert_eq!(at("192.0.2.9", UDP, 53), Some(3));
        assert_eq!(at("2001:db8::7", UDP, 80), Some(5));
        assert_eq!(at("2001:db8::7", UDP, 81), None);
    }

    fn any_move() -> impl Strategy<Value = Move> {
        let ports = proptest::collection::vec((1u16..24, 0u16..6), 0..3);
        (0u8..8, 27u8..=32, ports, 0usize..3).prop_map(|(host, len, ports, transport)| Move {
            prefix: Prefix::of(IpAddr::from([192, 0, 2, host]), len),
            ports: crate::model::moved::merged(
                ports.into_iter().map(|(at, more)| at..=at + more).collect(),
            ),
            transport: [None, Some(Transport::Tcp), Some(Transport::Udp)][transport],
        })
    }

    proptest! {
        #[test]
        fn it_finds_what_a_walk_through_all_moves_finds(
            moves in proptest::collection::vec(any_move(), 1..12), host in 0u8..8,
            protocol in proptest::sample::select(vec![TCP, UDP, ICMP]), port in 0u16..32,
        ) {
            let addr = IpAddr::from([192, 0, 2, host]);
            let expected = owner(&moves, addr, protocol, port);
            prop_assert_eq!(find(&moves, addr, protocol, port), expected);
            let scopes = Scopes::new(&moves);
            let owners = Owners::new(&moves, &scopes);
            if let Some(scope) = scopes.find(number_of(addr)) {
                let owned = owners.owned(&scopes, scope);
                let parts = match protocol { TCP => owned.tcp, UDP => owned.udp, _ => Vec::new() };
                let part = parts.iter().find(|(ports, _)| ports.contains(&port));
                let by = if protocol == ICMP { owned.other } else { part.map(|&(_, by)| by) };
                prop_assert_eq!(by.map(|by| by as usize), expected);
            }
        }
    }
}
