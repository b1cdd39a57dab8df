//! Where in the receive buffer the next batch of datagrams goes.
//!
//! Packets are opened where they were received, and lie there until the super-packet that they are
//! coalesced into is written. Batches follow one another in the buffer and around its end, so that
//! many small ones can be coalesced as well as a few large ones. Where a batch would meet packets
//! that still lie there, those have to be written first.

use crate::io::udp::RECV_SLOT;

/// The part of a receive buffer that the next batch may take.
#[derive(Debug)]
pub(super) struct ReceiveRing {
    size: usize,
    /// Where the last batch ended.
    end: usize,
}

impl ReceiveRing {
    /// For a buffer of `size` bytes, at least [`RECV_SLOT`].
    pub(super) fn new(size: usize) -> Self {
        debug_assert!(size >= RECV_SLOT);
        Self { size, end: 0 }
    }

    /// Where the next batch may begin, [`RECV_SLOT`] bytes long. `held` is where the first packet
    /// lies that is still in the buffer. Returns `None` if there is no space until that is written.
    ///
    /// If the buffer holds no packet, the batch begins at its start, which is the likeliest to be
    /// in the processor's cache.
    #[inline]
    pub(super) fn next(&self, held: Option<usize>) -> Option<usize> {
        let Some(held) = held else {
            return Some(0);
        };
        if self.end <= held {
            // The batches have gone around the end already, and must not do so twice: what lies at
            // the start still lies there.
            return (self.end + RECV_SLOT <= held).then_some(self.end);
        }
        if self.end + RECV_SLOT <= self.size {
            return Some(self.end);
        }
        (RECV_SLOT <= held).then_some(0)
    }

    /// A batch of `len` bytes was received at `start`.
    #[inline]
    pub(super) fn took(&mut self, start: usize, len: usize) {
        self.end = start + len;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Length of a batch: a stray datagram, full, or anything.
    fn len() -> impl Strategy<Value = usize> {
        prop_oneof![0..=1_472usize, RECV_SLOT - 1_472..=RECV_SLOT, 0..=RECV_SLOT]
    }

    /// How many of the batches that lie there are written.
    fn written() -> impl Strategy<Value = usize> {
        prop_oneof![2 => Just(0usize), 1 => 0usize..8]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        /// Whatever arrives, and whenever it is written, no batch is received over what still lies
        /// there.
        #[test]
        fn held_packets_are_never_received_over(
            slots in 1usize..5, extra in 0usize..RECV_SLOT,
            batches in prop::collection::vec(
                (len(), written(), any::<prop::sample::Index>()), 1..60,
            ),
        ) {
            let size = slots * RECV_SLOT + extra;
            let mut ring = ReceiveRing::new(size);
            // Batches that were received and not yet written, oldest first.
            let mut lying: Vec<std::ops::Range<usize>> = Vec::new();
            for (len, written, from) in batches {
                let held = lying.first().map(|range| range.start);
                let start = ring.next(held).unwrap_or_else(|| {
                    lying.clear();
                    ring.next(None).unwrap()
                });
                prop_assert!(start + RECV_SLOT <= size);
                for range in &lying {
                    prop_assert!(start >= range.end || start + RECV_SLOT <= range.start);
                }
                ring.took(start, len);
                if len > 0 {
                    lying.push(start..start + len);
                }
                // The coalescer stopped in the middle of the last batch, or somewhere before.
                let written = written.min(lying.len());
                lying.drain(..written);
                if written > 0 && let Some(first) = lying.first_mut() {
                    first.start += from.index(first.len());
                }
            }
        }
    }

    #[test]
    fn nothing_goes_around_the_end_twice() {
        let mut ring = ReceiveRing::new(2 * RECV_SLOT);
        let held = Some(126_608);
        ring.took(126_592, 2_944);
        assert_eq!(ring.next(held), Some(0));
        ring.took(0, 1_211);
        assert_eq!(ring.next(held), Some(1_211));
        ring.took(1_211, 64_716);
        assert_eq!(ring.next(held), None, "the batch at 1,211 still lies there");
    }

    #[test]
    fn small_batches_follow_one_another() {
        let mut ring = ReceiveRing::new(2 * RECV_SLOT);
        let mut held = None;
        let mut starts = Vec::new();
        while let Some(start) = ring.next(held) {
            ring.took(start, 1_472);
            held = Some(0);
            starts.push(start);
        }
        assert_eq!(starts.len(), 1 + RECV_SLOT / 1_472);
    }

    #[test]
    fn full_batches_go_around_the_end() {
        let mut ring = ReceiveRing::new(2 * RECV_SLOT);
        ring.took(0, RECV_SLOT);
        assert_eq!(ring.next(Some(10)), Some(RECV_SLOT));
        ring.took(RECV_SLOT, RECV_SLOT);
        assert_eq!(
            ring.next(Some(10)),
            None,
            "coalesced over both: to be written first"
        );
        assert_eq!(ring.next(Some(RECV_SLOT)), Some(0));
        assert_eq!(ring.next(None), Some(0));
    }
}
