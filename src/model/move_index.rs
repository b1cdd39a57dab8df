//! Which move of a list an end of a conversation belongs to.

use std::net::SocketAddr;

use crate::model::moved::Move;
use crate::model::owners::Owners;
use crate::model::scopes::{Scopes, number_of};

/// Finds the move of an end, whatever the number of moves.
#[derive(Clone, Debug)]
pub struct MoveIndex {
    moves: Vec<Move>,
    scopes: Scopes,
    owners: Owners,
}

impl MoveIndex {
    /// For these moves.
    pub fn new(moves: Vec<Move>) -> Self {
        let scopes = Scopes::new(&moves);
        Self {
            owners: Owners::new(&moves, &scopes),
            scopes,
            moves,
        }
    }

    /// The place of the move that takes this end.
    pub fn find(&self, protocol: u8, end: SocketAddr) -> Option<usize> {
        self.owner(number_of(end.ip()), protocol, Some(end.port()))
    }

    /// The place of the move that takes what shows this port of an address, if it shows one; `addr`
    /// is as in [`number_of`].
    pub fn owner(&self, addr: u128, protocol: u8, port: Option<u16>) -> Option<usize> {
        let scope = self.scopes.find(addr)?;
        self.owners.find(&self.scopes, scope, protocol, port)
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
