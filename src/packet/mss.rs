//! The maximum segment size that the two ends of a TCP connection tell each other.

use crate::packet::addr::Family;
use crate::packet::checksum::Sum;
use crate::packet::field::{SYN, get, put, tcp};
use crate::packet::kind::Kind;
use crate::packet::parsed::Parsed;

/// Lowers the MSS option of a SYN or SYN-ACK to `max_v4` or `max_v6`, by the packet's family, and
/// mends the checksum. Returns whether anything was changed.
///
/// Nothing is added where the option is absent: the sender's peer assumes 536 or 1220 then
/// (RFC 9293 section 3.7.1), which any tunnel carries.
pub fn clamp_mss(
    bytes: &mut [u8],
    parsed: &Parsed,
    max_v4: u16,
    max_v6: u16,
    partial: bool,
) -> bool {
    if parsed.kind() != Kind::Tcp || parsed.tcp_flags() & SYN == 0 {
        return false;
    }
    let max = match parsed.family() {
        Family::V4 => max_v4,
        Family::V6 => max_v6,
    };
    let Some(at) = find_mss(&bytes[..parsed.payload()], parsed.l4() + tcp::HEADER_LEN) else {
        return false;
    };
    let old: [u8; 2] = get(bytes, at);
    if u16::from_be_bytes(old) <= max {
        return false;
    }
    let new = max.to_be_bytes();
    put(bytes, at, new);
    // Options have no alignment: at an odd offset the two bytes lie in two words of the sum, where
    // they count as if they were swapped.
    let delta = if (at - parsed.l4()).is_multiple_of(2) {
        Sum::change(old, new)
    } else {
        Sum::change([old[1], old[0]], [new[1], new[0]])
    };
    parsed.mend_l4(bytes, Sum::default(), delta, partial);
    true
}

/// Where the value of the MSS option lies, among the options from `at` to the end of `header`.
fn find_mss(header: &[u8], mut at: usize) -> Option<usize> {
    const END: u8 = 0;
    const NOP: u8 = 1;
    const MSS: u8 = 2;
    while at < header.len() {
        match header[at] {
            END => return None,
            NOP => at += 1,
            kind => {
                let len = usize::from(*header.get(at + 1)?);
                if kind == MSS && len == 4 && at + 4 <= header.len() {
                    return Some(at + 2);
                }
                at += len.max(2);
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::testing::{Plan, plans};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn mss_is_clamped_and_the_sum_stays_right(plan in plans(), max in 500u16..1400) {
            let mut bytes = plan.build();
            let parsed = Parsed::parse(&bytes).unwrap();
            let changed = clamp_mss(&mut bytes, &parsed, max, max, false);
            let is_tcp = plan.kind == Kind::Tcp;
            prop_assert_eq!(changed, is_tcp && plan.mss.is_some_and(|mss| mss > max));
            let wanted = Plan { mss: plan.mss.map(|mss| mss.min(max)), ..plan };
            prop_assert_eq!(bytes, wanted.build());
        }
    }
}
