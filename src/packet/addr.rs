//! Addresses of both families as one type.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Address family of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// An address of either family in 16 bytes: IPv4 as `::ffff:a.b.c.d`, which no packet may carry on
/// the wire, so the two never meet.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Addr(pub(super) [u8; 16]);

impl Addr {
    /// The address before all others in order.
    pub(super) const FIRST: Self = Self([0; 16]);

    /// The family the address belongs to.
    #[inline]
    pub fn family(self) -> Family {
        if self.0[..12] == V4_MAPPED {
            Family::V4
        } else {
            Family::V6
        }
    }

    /// The address as it lies in memory.
    pub(crate) fn to_bytes(self) -> [u8; 16] {
        self.0
    }

    /// What [`Self::to_bytes`] gave.
    pub(crate) fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The address as two words, for hashing and comparing.
    #[inline]
    pub(crate) fn words(self) -> [u64; 2] {
        let all = u128::from_ne_bytes(self.0);
        [all as u64, (all >> 64) as u64]
    }

    /// The address that has these [`Self::words`].
    #[inline]
    pub(crate) fn of_words([low, high]: [u64; 2]) -> Self {
        Self((u128::from(high) << 64 | u128::from(low)).to_ne_bytes())
    }

    /// The address as a number, as [`scopes`](crate::model::scopes) order them.
    #[inline]
    pub(crate) fn number(self) -> u128 {
        u128::from_be_bytes(self.0)
    }

    /// What counts as one source: an IPv4 address, or the /64 that one IPv6 host can fill at will.
    #[inline]
    pub(crate) fn source(self) -> Self {
        match self.family() {
            Family::V4 => self,
            Family::V6 => {
                let mut out = self.0;
                out[8..].fill(0);
                Self(out)
            }
        }
    }

    /// Whether no client can have this address: the unspecified one, loopback, link-local,
    /// multicast, broadcast, reserved (RFC 6890, RFC 4291), or a cloud's metadata service.
    #[inline]
    pub(crate) fn is_special(self) -> bool {
        match self.family() {
            Family::V4 => {
                let [.., a, b, c, d] = self.0;
                matches!(a, 0 | 127 | 224..)
                    || (a, b) == (169, 254)
                    || METADATA_V4.contains(&[a, b, c, d])
            }
            Family::V6 => {
                let first = u16::from_be_bytes([self.0[0], self.0[1]]);
                // 0000::/16: unspecified, loopback, addresses with an IPv4 one in them.
                matches!(first, 0 | 0xfe80..=0xfebf | 0xff00..)
                    || METADATA_V6.contains(&u128::from_be_bytes(self.0))
            }
        }
    }

    #[inline]
    pub(super) fn v4(bytes: [u8; 4]) -> Self {
        let mut out = [0; 16];
        out[..12].copy_from_slice(&V4_MAPPED);
        out[12..].copy_from_slice(&bytes);
        Self(out)
    }
}

/// Metadata services that are not link-local: Alibaba's. (Azure's also probes clients' ports from
/// 168.63.129.16, so that is an address like any other.)
const METADATA_V4: [[u8; 4]; 1] = [[100, 100, 100, 200]];

/// Metadata services that are not link-local: Amazon's fd00:ec2::254, Google's fd20:ce::254.
const METADATA_V6: [u128; 2] = [
    0xfd00_0ec2_0000_0000_0000_0000_0000_0254,
    0xfd20_00ce_0000_0000_0000_0000_0000_0254,
];

pub(super) const V4_MAPPED: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];

impl From<IpAddr> for Addr {
    fn from(addr: IpAddr) -> Self {
        match addr {
            IpAddr::V4(addr) => addr.into(),
            IpAddr::V6(addr) => addr.into(),
        }
    }
}

impl From<Ipv4Addr> for Addr {
    fn from(addr: Ipv4Addr) -> Self {
        Self::v4(addr.octets())
    }
}

impl From<Ipv6Addr> for Addr {
    fn from(addr: Ipv6Addr) -> Self {
        Self(addr.octets())
    }
}

impl From<Addr> for IpAddr {
    fn from(addr: Addr) -> Self {
        Self::V6(Ipv6Addr::from(addr.0)).to_canonical()
    }
}

impl fmt::Debug for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        IpAddr::from(*self).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_client_has_a_special_address() {
        let special = |text: &str| Addr::from(text.parse::<IpAddr>().unwrap()).is_special();
        for addr in [
            "0.0.0.0",
            "0.1.2.3",
            "127.0.0.1",
            "127.255.255.255",
            "169.254.0.0",
            "169.254.169.254",
            "224.0.0.1",
            "239.255.255.255",
            "240.0.0.1",
            "255.255.255.255",
            "100.100.100.200",
            "::",
            "::1",
            "::192.0.2.1",
            "fe80::1",
            "febf::1",
            "ff02::1",
            "ff0e::1",
            "fd00:ec2::254",
            "fd20:ce::254",
        ] {
            assert!(special(addr), "{addr}");
        }
        for addr in [
            "1.0.0.1",
            "126.255.255.255",
            "128.0.0.1",
            "169.253.255.255",
            "169.255.0.1",
            "223.255.255.255",
            "10.0.0.1",
            "100.100.100.201",
            "168.63.129.16",
            "64:ff9b::1",
            "2001:db8::1",
            "fe7f::1",
            "fec0::1",
            "fd00:ec2::253",
        ] {
            assert!(!special(addr), "{addr}");
        }
    }
}
