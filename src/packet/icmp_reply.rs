//! ICMP replies: errors about packets that cannot go on, and how many of them.
//!
//! Owns which error it is ([`IcmpError`]), the buffer that it is written to, and the limit of their
//! rate. [`icmp`] knows what an error looks like, and the lane where to send it.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::model::drops::DropReason;
use crate::packet::Parsed;
use crate::packet::icmp::{self, MAX_V6};

/// ICMP errors that one direction of a lane sends in a second: what Linux allows itself
/// (`net.ipv4.icmp_msgs_per_sec`; RFC 1812 section 4.3.2.8 and RFC 4443 section 2.4 f ask for a
/// limit).
pub const REPLIES_PER_SECOND: u32 = 1_000;

/// ICMP errors that may follow each other at once (`net.ipv4.icmp_msgs_burst`).
pub const REPLY_BURST: u32 = 50;

/// Why a packet does not go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IcmpError {
    /// It is longer than this many bytes, and may not be fragmented.
    TooBig(usize),
    /// Its hop limit is used up.
    Expired,
    /// An administrator did not allow it.
    Prohibited,
}

impl IcmpError {
    /// The error that tells why a packet was dropped, if one does. `mtu` is what would have fitted.
    pub fn of(reason: DropReason, mtu: usize) -> Option<Self> {
        const OUTGOING: [DropReason; 3] = [
            DropReason::OutgoingOff,
            DropReason::OutgoingNotAllowed,
            DropReason::OutgoingNoAddress,
        ];
        if reason == DropReason::TooBig {
            Some(Self::TooBig(mtu))
        } else if reason == DropReason::TtlExpired {
            Some(Self::Expired)
        } else {
            OUTGOING.contains(&reason).then_some(Self::Prohibited)
        }
    }
}

/// Makes ICMP errors, but not too many.
#[derive(Debug)]
pub struct IcmpReplies {
    tokens: u32,
    refilled: Instant,
    out: Box<[u8]>,
    len: usize,
}

impl IcmpReplies {
    /// Ready for a burst.
    pub fn new(now: Instant) -> Self {
        Self {
            tokens: REPLY_BURST,
            refilled: now,
            out: vec![0; MAX_V6].into_boxed_slice(),
            len: 0,
        }
    }

    /// Writes an error about `packet`, to its source and from `from`. The error is kept until
    /// [`Self::take`]. Returns `false` if no error may be sent about such a packet.
    ///
    /// # Errors
    /// [`DropReason::ReplyLimited`] if there were too many.
    pub fn make(
        &mut self,
        now: Instant,
        about: IcmpError,
        packet: &[u8],
        parsed: &Parsed,
        from: IpAddr,
    ) -> Result<bool, DropReason> {
        let made = match about {
            IcmpError::TooBig(mtu) => {
                icmp::too_big(&mut self.out, packet, parsed, from, mtu as u32)
            }
            IcmpError::Expired => icmp::time_exceeded(&mut self.out, packet, parsed, from),
            IcmpError::Prohibited => icmp::prohibited(&mut self.out, packet, parsed, from),
        };
        let Some(len) = made else { return Ok(false) };
        if !self.may_speak(now) {
            return Err(DropReason::ReplyLimited);
        }
        self.len = len;
        Ok(true)
    }

    /// Takes the error that was made. It can be taken once.
    #[inline]
    pub fn take(&mut self) -> Option<&mut [u8]> {
        let len = std::mem::take(&mut self.len);
        (len > 0).then(|| &mut self.out[..len])
    }

    /// A token bucket.
    fn may_speak(&mut self, now: Instant) -> bool {
        let pace = Duration::from_secs(1) / REPLIES_PER_SECOND;
        let passed = now.saturating_duration_since(self.refilled);
        let fresh = (passed.as_nanos() / pace.as_nanos()).min(u128::from(REPLY_BURST)) as u32;
        if fresh > 0 {
            self.tokens = (self.tokens + fresh).min(REPLY_BURST);
            self.refilled = now;
        }
        let speaks = self.tokens > 0;
        self.tokens -= u32::from(speaks);
        speaks
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::Kind;
    use crate::packet::testing::Plan;
    use crate::testing::epoch;

    #[test]
    fn a_burst_and_then_a_pace() {
        let now = epoch();
        let mut replies = IcmpReplies::new(now);
        let packet = Plan::new(Kind::Udp, "203.0.113.9", "192.0.2.5").build();
        let parsed = Parsed::parse(&packet).unwrap();
        let from = "192.0.2.1".parse().unwrap();
        let mut ask = |now| replies.make(now, IcmpError::Expired, &packet, &parsed, from);
        for _ in 0..REPLY_BURST {
            assert_eq!(ask(now), Ok(true));
        }
        assert_eq!(ask(now), Err(DropReason::ReplyLimited));
        assert_eq!(ask(now + Duration::from_millis(1)), Ok(true));
        let given = (0..5_000u64)
            .filter(|&at| ask(now + Duration::from_micros(2_000 + at * 200)).is_ok())
            .count();
        assert!((900..=1_100).contains(&given), "{given} in a second");
    }

    #[test]
    fn a_reply_is_taken_once() {
        let now = epoch();
        let mut replies = IcmpReplies::new(now);
        let packet = Plan::new(Kind::Udp, "203.0.113.9", "192.0.2.5").build();
        let parsed = Parsed::parse(&packet).unwrap();
        let from = "192.0.2.5".parse().unwrap();
        assert_eq!(
            replies.make(now, IcmpError::TooBig(1300), &packet, &parsed, from),
            Ok(true)
        );
        assert!(replies.take().is_some_and(|reply| reply[20..22] == [3, 4]));
        assert!(replies.take().is_none());
        let other = "2001:db8::1".parse().unwrap();
        assert_eq!(
            replies.make(now, IcmpError::Expired, &packet, &parsed, other),
            Ok(false)
        );
    }
}
