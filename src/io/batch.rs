//! The send batch: sealed datagrams side by side, as one `UDP_SEGMENT` send wants them.
//!
//! Reserve, write, commit: a datagram is sealed where it will be sent from, and what is not
//! committed is not there. All datagrams of a batch go to one destination and have the length of
//! the first, but for the last, which may be shorter.

use crate::io::udp::{MAX_BATCH, MAX_SEGMENTS};
use crate::model::peer::{Path, PeerId};

/// Where a batch goes, and how it is marked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Destination {
    /// The peer.
    pub peer: PeerId,
    /// Its address and ours.
    pub path: Path,
    /// ECN field of the outer header (RFC 6040).
    pub ecn: u8,
}

/// Datagrams that wait to be sent together.
pub struct SendBatch {
    buffer: Box<[u8]>,
    len: usize,
    stride: usize,
    count: usize,
    /// A shorter datagram was committed: it has to be the last.
    closed: bool,
    destination: Option<Destination>,
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
            len: 0,
            stride: 0,
            count: 0,
            closed: false,
            destination: None,
        }
    }

    /// Whether a datagram of `len` bytes to `destination` can join what waits.
    pub fn fits(&self, len: usize, destination: &Destination) -> bool {
        match &self.destination {
            None => len <= MAX_BATCH,
            Some(current) => {
                current == destination
                    && !self.closed
                    && len <= self.stride
                    && self.count < MAX_SEGMENTS
                    && self.len + len <= MAX_BATCH
            }
        }
    }

    /// Room for a datagram of `len` bytes, for which [`fits`](Self::fits) holds.
    pub fn slot(&mut self, len: usize) -> &mut [u8] {
        &mut self.buffer[self.len..self.len + len]
    }

    /// Adds the datagram of `len` bytes that was written to the slot.
    pub fn commit(&mut self, len: usize, destination: Destination) {
        if self.destination.is_none() {
            self.destination = Some(destination);
            self.stride = len;
        }
        self.closed = len < self.stride;
        self.len += len;
        self.count += 1;
    }

    /// Empties the batch: where it goes, its bytes, the length of each datagram, and how many.
    pub fn take(&mut self) -> Option<(Destination, &[u8], usize, usize)> {
        let destination = self.destination.take()?;
        let (len, count) = (self.len, self.count);
        (self.len, self.count, self.closed) = (0, 0, false);
        Some((destination, &self.buffer[..len], self.stride, count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn destination(port: u16) -> Destination {
        Destination {
            peer: PeerId(0),
            path: Path {
                remote: ([192, 0, 2, 1], port).into(),
                local: None,
            },
            ecn: 0,
        }
    }

    fn push(batch: &mut SendBatch, len: usize, to: Destination) -> bool {
        let fits = batch.fits(len, &to);
        if fits {
            batch.slot(len).fill(len as u8);
            batch.commit(len, to);
        }
        fits
    }

    #[test]
    fn equal_datagrams_then_one_shorter() {
        let (mut batch, to) = (SendBatch::new(), destination(1));
        assert!(batch.take().is_none());
        assert!(push(&mut batch, 100, to) && push(&mut batch, 100, to));
        assert!(!push(&mut batch, 101, to), "longer than the first");
        assert!(!push(&mut batch, 100, destination(2)), "to somebody else");
        assert!(push(&mut batch, 7, to));
        assert!(!push(&mut batch, 7, to), "behind a shorter one");
        let (_, bytes, stride, count) = batch.take().unwrap();
        assert_eq!((bytes.len(), stride, count), (207, 100, 3));
        assert!(push(&mut batch, 101, to), "empty again");
    }

    #[test]
    fn never_more_than_one_send_can_hold() {
        let (mut batch, to) = (SendBatch::new(), destination(1));
        while push(&mut batch, 1_472, to) {}
        let (_, bytes, ..) = batch.take().unwrap();
        assert_eq!(bytes.len() / 1_472, 44);
        while push(&mut batch, 80, to) {}
        assert_eq!(batch.take().unwrap().3, MAX_SEGMENTS);
        let (_, stride) = (assert!(!batch.fits(MAX_BATCH + 1, &to)), batch.stride);
        assert_eq!(stride, 80);
    }
}
