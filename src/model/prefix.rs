//! A network prefix: an address and how many of its leading bits count (`ADDR/LEN`).
//!
//! Owns the syntax that people type, and the questions what lies in a prefix. Knows nothing of
//! routes, interfaces or what a prefix is good for.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// A network prefix, with no bit set behind its length. A single address is one of full length.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Prefix {
    addr: IpAddr,
    len: u8,
}

impl Prefix {
    /// The prefix of this length that `addr` lies in. A longer length than the family has counts as
    /// the whole address.
    pub fn of(addr: IpAddr, len: u8) -> Self {
        let len = len.min(bits(addr));
        let addr = match addr {
            IpAddr::V4(addr) => IpAddr::V4((u32::from(addr) & mask_v4(len)).into()),
            IpAddr::V6(addr) => IpAddr::V6((u128::from(addr) & mask_v6(len)).into()),
        };
        Self { addr, len }
    }

    /// Its length in bits.
    pub fn len(&self) -> u8 {
        self.len
    }

    /// Whether it is one address.
    pub fn is_single(&self) -> bool {
        self.len == bits(self.addr)
    }

    /// Whether it is one of IPv4.
    pub fn is_ipv4(&self) -> bool {
        self.addr.is_ipv4()
    }

    /// Its lowest address.
    pub fn first(&self) -> IpAddr {
        self.addr
    }

    /// Its highest address.
    pub fn last(&self) -> IpAddr {
        match self.addr {
            IpAddr::V4(addr) => IpAddr::V4((u32::from(addr) | !mask_v4(self.len)).into()),
            IpAddr::V6(addr) => IpAddr::V6((u128::from(addr) | !mask_v6(self.len)).into()),
        }
    }

    /// Whether the address lies in it. No IPv4 address lies in an IPv6 prefix.
    pub fn contains(&self, addr: IpAddr) -> bool {
        self.is_ipv4() == addr.is_ipv4() && Self::of(addr, self.len).addr == self.addr
    }

    /// Whether all of `other` lies in it.
    pub fn covers(&self, other: &Self) -> bool {
        self.len <= other.len && self.contains(other.addr)
    }

    /// The address in it that has the host part of another address of its family.
    pub fn with_host_of(&self, addr: IpAddr) -> IpAddr {
        match (self.addr, addr) {
            (IpAddr::V4(own), IpAddr::V4(addr)) => {
                IpAddr::V4((u32::from(own) | u32::from(addr) & !mask_v4(self.len)).into())
            }
            (IpAddr::V6(own), IpAddr::V6(addr)) => {
                IpAddr::V6((u128::from(own) | u128::from(addr) & !mask_v6(self.len)).into())
            }
            (own, _) => own,
        }
    }

    /// Its addresses, in order.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        let next = |addr: &IpAddr| match *addr {
            IpAddr::V4(addr) => u32::from(addr)
                .checked_add(1)
                .map(|it| IpAddr::V4(it.into())),
            IpAddr::V6(addr) => u128::from(addr)
                .checked_add(1)
                .map(|it| IpAddr::V6(it.into())),
        };
        let last = self.last();
        std::iter::successors(Some(self.first()), next).take_while(move |&addr| addr <= last)
    }

    /// The two prefixes that it consists of; `None` for a single address.
    pub fn halves(&self) -> Option<[Self; 2]> {
        (!self.is_single()).then(|| {
            let len = self.len + 1;
            [self.addr, self.last()].map(|addr| Self::of(addr, len))
        })
    }

    /// Whether some address lies in both.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.covers(other) || other.covers(self)
    }
}

/// Bits of an address of this family.
fn bits(addr: IpAddr) -> u8 {
    match addr {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

fn mask_v4(len: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(len)).unwrap_or(0)
}

fn mask_v6(len: u8) -> u128 {
    u128::MAX.checked_shl(128 - u32::from(len)).unwrap_or(0)
}

impl From<IpAddr> for Prefix {
    fn from(addr: IpAddr) -> Self {
        Self {
            addr,
            len: bits(addr),
        }
    }
}

/// Why the text of a prefix was refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PrefixError {
    /// The part before the slash is no IP address.
    #[error("`{0}` is not an IP address or prefix; write 192.0.2.0/28, 192.0.2.5 or 2001:db8::/64")]
    Address(String),
    /// The part behind the slash is no length of that family.
    #[error("`/{len}` is not a prefix length; it is a number from 0 to {most}")]
    Length {
        /// What stands there.
        len: String,
        /// The family's bits.
        most: u8,
    },
    /// Bits are set behind the length.
    #[error("`{text}` has bits set behind its length; the prefix is {prefix}")]
    HostBits {
        /// What was typed.
        text: String,
        /// What was probably meant.
        prefix: Prefix,
    },
}

impl FromStr for Prefix {
    type Err = PrefixError;

    fn from_str(text: &str) -> Result<Self, PrefixError> {
        let (addr, len) = match text.split_once('/') {
            Some((addr, len)) => (addr, Some(len)),
            None => (text, None),
        };
        let parsed = addr.parse::<IpAddr>();
        let addr = parsed.map_err(|_| PrefixError::Address(text.into()))?;
        let Some(len) = len else {
            return Ok(addr.into());
        };
        let most = bits(addr);
        let number = len.bytes().all(|b| b.is_ascii_digit());
        let parsed = number.then(|| len.parse().ok()).flatten();
        let Some(bits) = parsed.filter(|&bits| bits <= most) else {
            let len = len.into();
            return Err(PrefixError::Length { len, most });
        };
        let prefix = Self::of(addr, bits);
        if prefix.addr != addr {
            let text = text.into();
            return Err(PrefixError::HostBits { text, prefix });
        }
        Ok(prefix)
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_single() {
            write!(f, "{}", self.addr)
        } else {
            write!(f, "{}/{}", self.addr, self.len)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn prefix(text: &str) -> Prefix {
        text.parse().unwrap()
    }

    #[test]
    fn what_is_read_is_shown_again() {
        for text in [
            "192.0.2.0/28",
            "192.0.2.5",
            "0.0.0.0/0",
            "2001:db8::/64",
            "2001:db8::5",
            "::/0",
        ] {
            assert_eq!(prefix(text).to_string(), text);
        }
        assert_eq!(prefix("192.0.2.5/32"), prefix("192.0.2.5"));
        assert_eq!(prefix("2001:db8::5/128").to_string(), "2001:db8::5");
    }

    #[test]
    fn each_mistake_is_named_with_what_would_be_right() {
        for (text, says) in [
            ("", "write 192.0.2.0/28"),
            ("www", "`www` is not an IP address or prefix"),
            ("192.0.2/24", "`192.0.2/24` is not"),
            (
                "192.0.2.0/33",
                "`/33` is not a prefix length; it is a number from 0 to 32",
            ),
            ("192.0.2.0/", "`/` is not a prefix length"),
            ("192.0.2.0/+8", "`/+8` is not"),
            ("192.0.2.0/24/8", "`/24/8` is not"),
            ("2001:db8::/129", "from 0 to 128"),
            ("192.0.2.5/28", "the prefix is 192.0.2.0/28"),
            ("2001:db8::5/64", "the prefix is 2001:db8::/64"),
            ("192.0.2.5/0", "the prefix is 0.0.0.0/0"),
        ] {
            let error = text.parse::<Prefix>().unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn families_never_meet() {
        let v4_mapped = "::ffff:192.0.2.5".parse().unwrap();
        assert!(!prefix("192.0.2.0/24").contains(v4_mapped));
        assert!(!prefix("::/0").contains("192.0.2.5".parse().unwrap()));
        assert!(!prefix("::/0").overlaps(&prefix("0.0.0.0/0")));
    }

    fn any_addr() -> impl Strategy<Value = IpAddr> {
        // Neighbours, so that prefixes meet.
        let v4 = (0u32..64).prop_map(|host| IpAddr::V4((0xc000_0200 + host).into()));
        let v6 = (0u128..64).prop_map(|host| IpAddr::V6(((0x2001_0db8 << 96) + host).into()));
        prop_oneof![
            v4,
            v6,
            any::<u32>().prop_map(|addr| IpAddr::V4(addr.into()))
        ]
    }

    proptest! {
        #[test]
        fn an_address_lies_between_the_first_and_the_last(
            addr in any_addr(), len in 0u8..=128, other in any_addr(),
        ) {
            let prefix = Prefix::of(addr, len);
            prop_assert!(prefix.contains(addr));
            prop_assert_eq!(prefix.to_string().parse(), Ok(prefix));
            let between = addr.is_ipv4() == other.is_ipv4()
                && (prefix.first()..=prefix.last()).contains(&other);
            prop_assert_eq!(prefix.contains(other), between);
        }

        #[test]
        fn overlapping_is_having_an_address_in_common(
            one in (any_addr(), 0u8..=128), other in (any_addr(), 0u8..=128),
        ) {
            let (one, other) = (Prefix::of(one.0, one.1), Prefix::of(other.0, other.1));
            let both = one.is_ipv4() == other.is_ipv4()
                && one.first() <= other.last()
                && other.first() <= one.last();
            prop_assert_eq!(one.overlaps(&other), both);
            let inside = one.contains(other.first()) && one.contains(other.last());
            prop_assert_eq!(one.covers(&other), inside);
        }
    }
}
