//! The Internet checksum, and how it is mended where a field changes (RFC 1071, RFC 1624).

use crate::model::moved::UDP;
use crate::packet::addr::Family;
use crate::packet::field::{UDP_LITE, get, ipv4, ipv6, put};

/// A one's complement sum that is not folded yet.
///
/// It is in the byte order of the machine. Such a sum comes out with its bytes swapped; stored in
/// the same order, they are right again (RFC 1071 section 2 B). It holds some 2^32 words without
/// overflow.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(crate) struct Sum(pub(super) u64);

impl Sum {
    /// What it adds to a sum to replace `old` by `new`, both of whole words.
    #[inline]
    pub(crate) fn change<const N: usize>(old: [u8; N], new: [u8; N]) -> Self {
        const { assert!(N.is_multiple_of(2) && N > 0) };
        let mut sum = 0;
        if N == 2 {
            sum += u64::from(!u16::from_ne_bytes(get(&old, 0)));
            sum += u64::from(u16::from_ne_bytes(get(&new, 0)));
        } else {
            for at in (0..N).step_by(4) {
                sum += u64::from(!u32::from_ne_bytes(get(&old, at)));
                sum += u64::from(u32::from_ne_bytes(get(&new, at)));
            }
        }
        Self(sum)
    }

    /// Adds two sums.
    #[inline]
    pub(crate) fn and(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }

    /// Adds one more word, given as it is in memory.
    #[inline]
    pub(crate) fn word(self, word: [u8; 2]) -> Self {
        Self(self.0 + u64::from(u16::from_ne_bytes(word)))
    }

    /// Adds all of `bytes`. An odd last byte counts as if a zero followed.
    #[inline]
    pub(crate) fn add(self, bytes: &[u8]) -> Self {
        let (words, rest) = bytes.as_chunks::<4>();
        let mut sum: u64 = words
            .iter()
            .map(|word| u64::from(u32::from_ne_bytes(*word)))
            .sum();
        let (halves, rest) = rest.as_chunks::<2>();
        if let [half] = halves {
            sum += u64::from(u16::from_ne_bytes(*half));
        }
        if let [byte] = rest {
            sum += u64::from(u16::from_ne_bytes([*byte, 0]));
        }
        Self(self.0 + sum)
    }

    /// Folds the sum to 16 bits. Store it with `to_ne_bytes`.
    #[inline]
    pub(crate) fn fold(self) -> u16 {
        let sum = (self.0 & 0xffff_ffff) + (self.0 >> 32);
        let sum = (sum & 0xffff_ffff) + (sum >> 32);
        let sum = (sum & 0xffff) + (sum >> 16);
        let sum = (sum & 0xffff) + (sum >> 16);
        sum as u16
    }
}

/// The sum of a pseudo-header without its length (RFC 793, RFC 8200 section 8.1).
pub(crate) fn pseudo_sum(header: &[u8], family: Family, protocol: u8) -> Sum {
    let addrs = match family {
        Family::V4 => &header[ipv4::SRC..ipv4::HEADER_LEN],
        Family::V6 => &header[ipv6::SRC..ipv6::HEADER_LEN],
    };
    Sum::default().add(addrs).word([0, protocol])
}

/// The finished checksum of bytes that sum up to `sum`, which includes the pseudo-header but not
/// the checksum itself. Store it with `to_ne_bytes`.
///
/// `never_zero` is for UDP, where a zero would say that there is no checksum (RFC 768): the other
/// zero of one's complement stands for it.
#[inline]
pub(crate) fn finish(sum: Sum, never_zero: bool) -> u16 {
    let sum = !sum.fold();
    if sum == 0 && never_zero { 0xffff } else { sum }
}

/// Writes `new` at `at`, and returns what that adds to a sum.
#[inline]
pub(super) fn replace<const N: usize>(bytes: &mut [u8], at: usize, new: [u8; N]) -> Sum {
    let old = get(bytes, at);
    put(bytes, at, new);
    Sum::change(old, new)
}

/// Mends a full checksum (RFC 1624, equation 3).
#[inline]
pub(super) fn mend_full(bytes: &mut [u8], at: usize, delta: Sum) {
    let old = u16::from_ne_bytes(get(bytes, at));
    let new = !delta.and(Sum(u64::from(!old))).fold();
    put(bytes, at, new.to_ne_bytes());
}

/// Mends a full checksum of an upper layer where 0 may mean that there is none (RFC 768): 0 stays
/// 0, and a result of 0 is written as its equal 0xffff.
#[inline]
pub(super) fn mend_l4_full(bytes: &mut [u8], at: usize, protocol: u8, delta: Sum) {
    if protocol == UDP && get::<2>(bytes, at) == [0, 0] {
        return;
    }
    mend_full(bytes, at, delta);
    if matches!(protocol, UDP | UDP_LITE) && get::<2>(bytes, at) == [0, 0] {
        put(bytes, at, [0xff, 0xff]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::testing::checksum;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn sums_are_those_of_etherparse(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let sum = finish(Sum::default().add(&bytes), false);
            prop_assert_eq!(sum.to_ne_bytes(), checksum(&bytes));
        }

        #[test]
        fn a_mended_sum_is_the_new_one(
            mut bytes in prop::collection::vec(any::<u8>(), 12..100), new in any::<[u8; 4]>(),
            at in any::<prop::sample::Index>(),
        ) {
            // The checksum lies at the front. The bytes that are replaced lie anywhere behind it.
            bytes[..2].fill(0);
            let sum = checksum(&bytes);
            put(&mut bytes, 0, sum);
            let at = 2 + at.index((bytes.len() - 6) / 2) * 2;
            let delta = replace(&mut bytes, at, new);
            mend_full(&mut bytes, 0, delta);
            // One's complement has two zeros.
            prop_assert!(matches!(checksum(&bytes), [0, 0] | [0xff, 0xff]));
        }
    }
}
