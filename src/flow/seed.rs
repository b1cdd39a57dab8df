//! The secret that the hashes of all tables of flows begin with.

use std::net::IpAddr;

use crate::model::bytes::take;
use crate::packet::Addr;

/// Secret keys of the hashes, so that no one outside can choose what collides.
#[derive(Clone, Copy)]
pub struct Seed([u64; 4]);

impl Seed {
    /// From two words that are hard to guess.
    pub fn new(words: [u64; 2]) -> Self {
        let mut state = words[0] ^ 0x9e37_79b9_7f4a_7c15;
        Self(std::array::from_fn(|_| {
            state = fold(
                state ^ 0xa076_1d64_78bd_642f,
                words[1] ^ 0xe703_7ed1_a0b4_28db,
            )
            .wrapping_add(state);
            state
        }))
    }

    /// Appends the secret to `out`, and what shows whether a reader hashes as this version does.
    pub(crate) fn put(&self, out: &mut Vec<u8>) {
        for word in self.0.into_iter().chain([self.shows()]) {
            out.extend_from_slice(&word.to_le_bytes());
        }
    }

    /// Takes that off the front; `None` if whoever wrote it hashes in another way.
    pub(crate) fn take(rest: &mut &[u8]) -> Option<Self> {
        let mut word = || Some(u64::from_le_bytes(take(rest)?));
        let seed = Self([word()?, word()?, word()?, word()?]);
        (word()? == seed.shows()).then_some(seed)
    }

    /// The hash of some flow.
    fn shows(&self) -> u64 {
        let [client, moved] = [[192, 0, 2, 1], [192, 0, 2, 2]].map(|ip| IpAddr::from(ip).into());
        self.flow([client, moved], 1 << 16 | 2, 3)
    }

    /// Hash of the source that a client belongs to: every flow of an IPv4 address, or of an IPv6
    /// /64, has the same.
    #[inline]
    pub(crate) fn source(&self, client: Addr) -> u64 {
        let [a, b] = client.words();
        // An IPv4 address has nothing in the first half, an IPv6 one has its network there.
        let b = if a == 0 { b } else { 0 };
        let hash = fold(a ^ self.0[0], b ^ self.0[1]);
        fold(hash ^ self.0[2], self.0[3])
    }

    /// The `n`th of a sequence of numbers below `bound`.
    pub(crate) fn draw(&self, n: u64, bound: u32) -> u32 {
        let word = fold(n ^ self.0[2], self.0[0]) ^ self.0[1];
        (((fold(word, self.0[3]) >> 32) * u64::from(bound)) >> 32) as u32
    }

    /// Hash of a flow where `rest` holds whatever tells the flows of one client apart: ports, and
    /// which of a few addresses they lead to.
    #[inline]
    pub(crate) fn client_flow(&self, client: Addr, rest: u64, protocol: u8) -> u64 {
        let [a, b] = client.words();
        let hash = fold(a ^ self.0[1], b ^ self.0[0]);
        fold(
            hash ^ rest ^ self.0[3],
            hash.rotate_left(32) ^ self.0[2] ^ u64::from(protocol),
        )
    }

    /// Hash of a flow. `ports` holds whatever else tells the flows between two addresses apart.
    #[inline]
    pub(crate) fn flow(&self, between: [Addr; 2], ports: u64, protocol: u8) -> u64 {
        let [[a, b], [c, d]] = between.map(Addr::words);
        let one = fold(a ^ self.0[1], b ^ self.0[0]);
        let other = fold(c ^ self.0[2], d ^ self.0[3]);
        fold(
            one ^ ports ^ self.0[3],
            one.rotate_left(32) ^ other ^ self.0[2] ^ u64::from(protocol),
        )
    }
}

impl std::fmt::Debug for Seed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Seed(..)")
    }
}

/// Both halves of a product: the mixing step of the hashes.
#[inline]
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    product as u64 ^ (product >> 64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_an_ipv4_address_or_an_ipv6_64() {
        let seed = Seed::new([1, 2]);
        let of = |text: &str| seed.source(text.parse::<IpAddr>().unwrap().into());
        assert_eq!(of("2001:db8:0:1::1"), of("2001:db8:0:1:ffff::2"));
        assert_ne!(of("2001:db8:0:1::1"), of("2001:db8:0:2::1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
    }

    #[test]
    fn draws_are_below_their_bound_and_reach_everything() {
        let seed = Seed::new([1, 2]);
        let drawn: std::collections::BTreeSet<u32> = (0..2_000).map(|n| seed.draw(n, 50)).collect();
        assert_eq!(drawn.len(), 50);
        assert_eq!(drawn.last(), Some(&49));
    }
}
