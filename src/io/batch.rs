//! The send batch: sealed datagrams side by side, as one `UDP_SEGMENT` send wants them.
//!
//! Reserve, write, commit: a datagram is sealed where it will be sent from, and only what is
//! committed is sent. All datagrams of a batch go to one destination. They have the length of the
//! first, but for the last, which may be shorter.

use std::ops::{Deref, DerefMut};

use crate::io::udp::{MAX_BATCH, MAX_SEGMENTS};
use crate::model::peer::{Endpoint, PeerId};

/// Where a batch goes, and how it is marked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Destination {
    /// The peer.
    pub peer: PeerId,
    /// Its address and ours.
    pub endpoint: Endpoint,
    /// ECN field of the outer header (RFC 6040).
    pub ecn: u8,
}

/// Datagrams that wait to be sent together.
pub struct SendBatch {
    buffer: Box<[u8]>,
    filled: Filled,
}

/// How much of a batch's buffer is in use.
#[derive(Default)]
struct Filled {
    len: usize,
    stride: usize,
    count: usize,
    /// A shorter datagram was committed. It has to be the last.
    closed: bool,
    destination: Option<Destination>,
}

/// Space in a batch for one datagram, to be written into. If it is dropped without having been
/// [committed](Self::commit), it leaves nothing behind.
#[must_use]
pub struct Reservation<'a> {
    slot: &'a mut [u8],
    filled: &'a mut Filled,
    destination: &'a Destination,
}

/// Datagrams that are sent together.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// Where they go.
    pub destination: Destination,
    /// Their bytes, side by side.
    pub bytes: &'a [u8],
    /// Length of each but the last, which may be shorter.
    pub stride: usize,
    /// How many there are.
    pub count: usize,
}

impl Default for SendBatch {
    fn default() -> Self {
        Self::new()
    }
}

impl SendBatch {
    /// An empty batch.
    pub fn new() -> Self {
        Self {
            buffer: vec![0; MAX_BATCH].into_boxed_slice(),
            filled: Filled::default(),
        }
    }

    /// Reserves space for a datagram of `len` bytes, at most [`MAX_BATCH`], to `destination`. Hands
    /// to `send` first what the datagram cannot be sent with.
    #[inline]
    pub fn reserve<'a>(
        &'a mut self,
        len: usize,
        destination: &'a Destination,
        send: impl FnOnce(Batch<'_>),
    ) -> Reservation<'a> {
        if !self.filled.fits(len, destination)
            && let Some(batch) = self.take()
        {
            send(batch);
        }
        let start = self.filled.len;
        Reservation {
            slot: &mut self.buffer[start..start + len],
            filled: &mut self.filled,
            destination,
        }
    }

    /// Empties the batch; `None` if nothing waits.
    pub fn take(&mut self) -> Option<Batch<'_>> {
        let filled = std::mem::take(&mut self.filled);
        Some(Batch {
            destination: filled.destination?,
            bytes: &self.buffer[..filled.len],
            stride: filled.stride,
            count: filled.count,
        })
    }
}

impl Reservation<'_> {
    /// Adds the datagram that was written here to the batch.
    #[inline]
    pub fn commit(self) {
        let Self {
            slot,
            filled,
            destination,
        } = self;
        if filled.destination.is_none() {
            filled.destination = Some(*destination);
            filled.stride = slot.len();
        }
        filled.closed = slot.len() < filled.stride;
        filled.len += slot.len();
        filled.count += 1;
    }
}

impl Deref for Reservation<'_> {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        self.slot
    }
}

impl DerefMut for Reservation<'_> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        self.slot
    }
}

impl Filled {
    /// Whether a datagram of `len` bytes to `destination` can be sent with what waits.
    #[inline]
    fn fits(&self, len: usize, destination: &Destination) -> bool {
        match &self.destination {
            None => true,
            Some(current) => {
                current == destination
                    && !self.closed
                    && len <= self.stride
                    && self.count < MAX_SEGMENTS
                    && self.len + len <= MAX_BATCH
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn destination(port: u16) -> Destination {
        Destination {
            peer: PeerId(0),
            endpoint: Endpoint {
                remote: ([192, 0, 2, 1], port).into(),
                local: None,
            },
            ecn: 0,
        }
    }

    /// Adds a datagram. Returns whether it could be sent with what waited.
    fn push(batch: &mut SendBatch, len: usize, to: Destination) -> bool {
        let mut fits = true;
        let mut slot = batch.reserve(len, &to, |_| fits = false);
        slot.fill(len as u8);
        slot.commit();
        fits
    }

    fn fits(batch: &SendBatch, len: usize, to: Destination) -> bool {
        batch.filled.fits(len, &to)
    }

    #[test]
    fn equal_datagrams_then_one_shorter() {
        let (mut batch, to) = (SendBatch::new(), destination(1));
        assert!(batch.take().is_none());
        assert!(push(&mut batch, 100, to) && push(&mut batch, 100, to));
        assert!(!fits(&batch, 101, to), "longer than the first");
        assert!(!fits(&batch, 100, destination(2)), "to somebody else");
        assert!(push(&mut batch, 7, to));
        assert!(!fits(&batch, 7, to), "behind a shorter one");
        let taken = batch.take().unwrap();
        assert_eq!(
            (taken.bytes.len(), taken.stride, taken.count),
            (207, 100, 3)
        );
        assert!(push(&mut batch, 101, to), "empty again");
    }

    #[test]
    fn what_is_in_the_way_is_sent_first() {
        let mut batch = SendBatch::new();
        push(&mut batch, 100, destination(1));
        let mut sent = None;
        let to = destination(2);
        let slot = batch.reserve(300, &to, |batch| {
            sent = Some((batch.destination, batch.bytes.len()));
        });
        slot.commit();
        assert_eq!(sent, Some((destination(1), 100)));
        let taken = batch.take().unwrap();
        assert_eq!((taken.destination, taken.bytes.len()), (to, 300));
    }

    #[test]
    fn an_uncommitted_datagram_is_not_sent() {
        let (mut batch, to) = (SendBatch::new(), destination(1));
        batch.reserve(100, &to, |_| ()).fill(1);
        assert!(batch.take().is_none());
        assert!(push(&mut batch, 80, to));
        batch.reserve(70, &to, |_| ()).fill(1);
        assert!(push(&mut batch, 80, to), "not closed by a shorter one");
        let taken = batch.take().unwrap();
        assert_eq!((taken.bytes, taken.count), (&[80; 160][..], 2));
    }

    #[test]
    fn never_more_than_one_send_can_hold() {
        let (mut batch, to) = (SendBatch::new(), destination(1));
        while fits(&batch, 1_472, to) {
            push(&mut batch, 1_472, to);
        }
        assert_eq!(batch.take().unwrap().bytes.len() / 1_472, 44);
        while fits(&batch, 80, to) {
            push(&mut batch, 80, to);
        }
        assert_eq!(batch.take().unwrap().count, MAX_SEGMENTS);
        assert!(push(&mut batch, MAX_BATCH, to));
    }
}
