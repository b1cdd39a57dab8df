//! The modes of a move: who gets new conversations while a service changes servers.
//!
//! Owns what a mode says, and which clients a share takes. Conversations that exist stay where they
//! are in every mode; whose they are is not decided here.
//!
//! ```text
//! here ──► shared ──► moved       the settled modes, in any order
//!   │         │         │
//!   └────► held ◄───────┘         for a time; then the settled mode from before, or another
//! ```

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Where new conversations go while nothing is held.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Settled {
    /// To the old server's own service.
    Here,
    /// Those of some clients to the new server, the others' to the old one.
    Shared(Percent),
    /// To the new server.
    #[default]
    Moved,
}

/// A share of all clients: 1 to 99.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct Percent(u8);

/// The mode of a move. `T` is a time, on whichever clock its owner has.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Mode<T> {
    /// What holds while nothing is held, and afterwards.
    pub settled: Settled,
    /// New conversations wait until then at most.
    pub held_until: Option<T>,
}

/// What the new server is told of the mode of a move. By default it has moved.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Told {
    /// So many per cent of all clients get the new server: 0 to 100.
    Percent(u8),
    /// New conversations wait.
    Held,
}

/// The secret of the shares of one old server. It lasts as long as the moves do, so that a client
/// stays where it is.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShareKey(pub [u64; 2]);

impl Settled {
    /// Its name, as in `status --json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Here => "here",
            Self::Shared(_) => "shared",
            Self::Moved => "moved",
        }
    }

    /// How many per cent of all clients get the new server: 0 to 100.
    pub fn percent(self) -> u8 {
        match self {
            Self::Here => 0,
            Self::Shared(percent) => percent.0,
            Self::Moved => 100,
        }
    }
}

impl Percent {
    /// A share of so many per cent, if it is one.
    pub fn new(percent: u8) -> Option<Self> {
        (1..100).contains(&percent).then_some(Self(percent))
    }

    /// The number.
    pub fn get(self) -> u8 {
        self.0
    }
}

impl Told {
    /// In place of a number of per cent.
    const HELD: u8 = 101;

    /// As one byte.
    pub fn byte(self) -> u8 {
        match self {
            Self::Percent(percent) => percent,
            Self::Held => Self::HELD,
        }
    }

    /// What [`byte`](Self::byte) gave.
    pub fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0..=100 => Some(Self::Percent(byte)),
            Self::HELD => Some(Self::Held),
            _ => None,
        }
    }

    /// The name of the mode, as in `status --json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Percent(0) => "here",
            Self::Percent(100) => "moved",
            Self::Percent(_) => "shared",
            Self::Held => "held",
        }
    }

    /// Whether the old server alone serves who comes now.
    pub fn is_there(self) -> bool {
        matches!(self, Self::Percent(0) | Self::Held)
    }
}

impl Default for Told {
    fn default() -> Self {
        Self::Percent(100)
    }
}

impl<T> Mode<T> {
    /// What the new server is told of it.
    pub fn told(&self) -> Told {
        match self.held_until {
            Some(_) => Told::Held,
            None => Told::Percent(self.settled.percent()),
        }
    }

    /// A mode in which nothing is held.
    pub fn settled(settled: Settled) -> Self {
        Self {
            settled,
            held_until: None,
        }
    }
}

impl ShareKey {
    /// Whether new conversations of a client get the new server, where so many per cent of all do.
    /// A client that does at one number does at every higher one.
    pub fn takes(self, client: IpAddr, percent: u8) -> bool {
        self.place(client) < u32::from(percent)
    }

    /// The place of a client among all, from 0 to 99: that of its address, or of its /64. Hosts
    /// change the rest of an IPv6 address by themselves (RFC 8981).
    ///
    /// Programs compute the same, from the same words: two rounds of multiplying and folding.
    pub fn place(self, client: IpAddr) -> u32 {
        const ROUND: u64 = 0x9e37_79b9_7f4a_7c15;
        let word = match client {
            IpAddr::V4(addr) => u64::from(addr.to_bits()),
            IpAddr::V6(addr) => (addr.to_bits() >> 64) as u64,
        };
        let [first, second] = self.0;
        let mut mixed = (word ^ first).wrapping_mul(ROUND);
        mixed ^= mixed >> 32;
        mixed = (mixed ^ second).wrapping_mul(ROUND);
        mixed ^= mixed >> 32;
        (((mixed & 0xffff_ffff) * 100) >> 32) as u32
    }
}

/// What cannot be a share.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("`{0}` is no share: it is a number from 1 to 99; without --percent all clients move")]
pub struct NoPercent(String);

impl FromStr for Percent {
    type Err = NoPercent;

    fn from_str(text: &str) -> Result<Self, NoPercent> {
        let number = text.strip_suffix('%').unwrap_or(text).parse().ok();
        number
            .and_then(Self::new)
            .ok_or_else(|| NoPercent(text.into()))
    }
}

impl TryFrom<u8> for Percent {
    type Error = NoPercent;

    fn try_from(number: u8) -> Result<Self, NoPercent> {
        Self::new(number).ok_or_else(|| NoPercent(number.to_string()))
    }
}

impl From<Percent> for u8 {
    fn from(percent: Percent) -> Self {
        percent.0
    }
}

impl fmt::Display for Settled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Here | Self::Moved => f.write_str(self.name()),
            Self::Shared(percent) => write!(f, "shared, {} % moved", percent.0),
        }
    }
}

/// Nobody's log gets the secret.
impl fmt::Debug for ShareKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ShareKey")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn clients() -> impl Strategy<Value = IpAddr> {
        prop_oneof![
            any::<u32>().prop_map(|bits| std::net::Ipv4Addr::from(bits).into()),
            any::<u128>().prop_map(|bits| std::net::Ipv6Addr::from(bits).into()),
        ]
    }

    proptest! {
        #[test]
        fn a_client_that_has_moved_stays_so_as_the_share_grows(
            key in any::<[u64; 2]>().prop_map(ShareKey), client in clients(), percent in 0_u8..100,
        ) {
            prop_assert!(!key.takes(client, percent) || key.takes(client, percent + 1));
            prop_assert!(!key.takes(client, 0));
            prop_assert!(key.takes(client, 100));
        }

        #[test]
        fn the_hosts_of_a_network_of_ipv6_go_together(
            key in any::<[u64; 2]>().prop_map(ShareKey),
            net in any::<u64>(),
            hosts in any::<[u64; 2]>(),
        ) {
            let [one, other] = hosts.map(|host| {
                let bits = u128::from(net) << 64 | u128::from(host);
                key.place(std::net::Ipv6Addr::from(bits).into())
            });
            prop_assert_eq!(one, other);
        }
    }

    #[test]
    fn a_share_takes_that_part_of_neighbours_too() {
        for (seed, percent) in [(1, 1), (2, 10), (3, 50), (4, 90)] {
            let key = ShareKey([seed, !seed]);
            let first = u32::from(std::net::Ipv4Addr::new(203, 0, 113, 0));
            let count = 100_000;
            let taken = (0..count)
                .filter(|at| key.takes(std::net::Ipv4Addr::from(first + at).into(), percent))
                .count();
            let expected = count as usize * usize::from(percent) / 100;
            let off = taken.abs_diff(expected);
            assert!(off * 8 < expected, "{percent} %: {taken} of {count}");
        }
    }

    #[test]
    fn shares_are_from_1_to_99() {
        for (text, number) in [("1", 1), ("99", 99), ("5%", 5)] {
            assert_eq!(text.parse::<Percent>().map(u8::from), Ok(number));
        }
        for text in ["0", "100", "101", "256", "-1", "x", "", "1.5"] {
            let error = text.parse::<Percent>().unwrap_err().to_string();
            assert!(error.contains("1 to 99"), "{error}");
        }
    }
}
