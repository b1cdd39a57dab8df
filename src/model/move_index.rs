//! Which move of a list an end of a conversation belongs to.

use std::collections::HashMap;
use std::net::SocketAddr;

use crate::model::moved::Move;
use crate::model::prefix::Prefix;

/// Finds the move of an end, whatever the number of moves.
#[derive(Debug, Default)]
pub struct MoveIndex {
    moves: Vec<Move>,
    /// The places of the moves of each prefix.
    places: HashMap<Prefix, Vec<usize>>,
    /// The lengths that there are, of IPv4 and of IPv6, the longest first.
    lengths: [Vec<u8>; 2],
}

impl MoveIndex {
    /// For these moves.
    pub fn new(moves: Vec<Move>) -> Self {
        let mut index = Self::default();
        for (place, moved) in moves.iter().enumerate() {
            let prefix = moved.prefix;
            index.places.entry(prefix).or_default().push(place);
            let lengths = &mut index.lengths[usize::from(!prefix.is_ipv4())];
            if !lengths.contains(&prefix.len()) {
                lengths.push(prefix.len());
                lengths.sort_unstable_by(|a, b| b.cmp(a));
            }
        }
        index.moves = moves;
        index
    }

    /// The place of the move that takes this end: of those that do the one with the longest prefix,
    /// then the first of the list.
    pub fn find(&self, protocol: u8, end: SocketAddr) -> Option<usize> {
        let addr = end.ip();
        let lengths = self.lengths[usize::from(!addr.is_ipv4())].iter();
        let mut of_prefixes = lengths.filter_map(|&len| self.places.get(&Prefix::of(addr, len)));
        of_prefixes.find_map(|places| {
            let mut places = places.iter().copied();
            places.find(|&place| self.moves[place].takes(protocol, Some(end.port())))
        })
    }

    /// The moves.
    pub fn moves(&self) -> &[Move] {
        &self.moves
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::moved::{TCP, UDP};

    const MOVES: [&str; 7] = [
        "192.0.2.0/28:80",
        "192.0.2.5:443/tcp",
        "192.0.2.5:53/udp",
        "192.0.2.5:53/tcp",
        "192.0.2.6",
        "2001:db8::/32",
        "[2001:db8::5]:80/tcp",
    ];

    proptest! {
        #[test]
        fn it_is_the_move_that_takes_the_end(
            last in 0_u8..20, v6 in any::<bool>(), udp in any::<bool>(),
            port in prop::sample::select(vec![53_u16, 80, 443, 1]),
        ) {
            let moves: Vec<Move> = MOVES.iter().map(|text| text.parse().unwrap()).collect();
            let addr: std::net::IpAddr = match v6 {
                true => std::net::Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, last.into()).into(),
                false => std::net::Ipv4Addr::new(192, 0, 2, last).into(),
            };
            let protocol = if udp { UDP } else { TCP };
            let takes = |moved: &Move| {
                moved.prefix.contains(addr) && moved.takes(protocol, Some(port))
            };
            let expected = (0..MOVES.len())
                .filter(|&place| takes(&moves[place]))
                .max_by_key(|&place| (moves[place].prefix.len(), std::cmp::Reverse(place)));
            let found = MoveIndex::new(moves.clone()).find(protocol, SocketAddr::new(addr, port));
            prop_assert_eq!(found, expected);
        }
    }
}
