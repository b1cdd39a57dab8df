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

    /// The address as two words, for hashing and comparing.
    #[inline]
    pub(crate) fn words(self) -> [u64; 2] {
        let all = u128::from_ne_bytes(self.0);
        [all as u64, (all >> 64) as u64]
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

    #[inline]
    pub(super) fn v4(bytes: [u8; 4]) -> Self {
        let mut out = [0; 16];
        out[..12].copy_from_slice(&V4_MAPPED);
        out[12..].copy_from_slice(&bytes);
        Self(out)
    }
}

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
