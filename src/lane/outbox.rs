//! ICMP errors that the inbound direction has made and the outbound direction has to send.
//!
//! Owns the queue between the two and its bound. One thread runs both or two do
//! ([`super::helper`]). Wakes nobody: whoever runs the inbound direction says that something is
//! there.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use crate::model::drops::DropReason;

/// Most that wait. A burst may be as long as the limit of their rate allows
/// ([`REPLY_BURST`](crate::packet::icmp_reply::REPLY_BURST), 50), and some more may come while the
/// outbound direction is busy with other packets.
const OUTBOX: usize = 64;

/// Where the inbound direction puts its ICMP errors.
pub(super) struct Outbox {
    posted: SyncSender<Vec<u8>>,
    has_news: bool,
}

/// Where the outbound direction finds the ICMP errors of the inbound one.
pub(super) struct Posted(Receiver<Vec<u8>>);

impl Outbox {
    /// An empty outbox, and its other end.
    pub(super) fn pair() -> (Self, Posted) {
        let (posted, receiver) = sync_channel(OUTBOX);
        let outbox = Self {
            posted,
            has_news: false,
        };
        (outbox, Posted(receiver))
    }

    /// Puts a copy of `packet` into the outbox.
    ///
    /// # Errors
    /// [`DropReason::ReplyLimited`] if it is full.
    #[cold]
    pub(super) fn post(&mut self, packet: &[u8]) -> Result<(), DropReason> {
        let posted = self.posted.try_send(packet.to_vec());
        self.has_news |= posted.is_ok();
        posted.map_err(|_| DropReason::ReplyLimited)
    }

    /// Whether something was posted since the last call.
    #[inline]
    pub(super) fn take_news(&mut self) -> bool {
        std::mem::take(&mut self.has_news)
    }
}

impl Posted {
    /// What was posted, oldest first. Does not wait for more.
    pub(super) fn drain(&self) -> impl Iterator<Item = Vec<u8>> {
        self.0.try_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_posted_is_found_in_order_and_told_once() {
        let (mut outbox, posted) = Outbox::pair();
        assert!(!outbox.take_news());
        assert_eq!(outbox.post(b"one"), Ok(()));
        assert_eq!(outbox.post(b"two"), Ok(()));
        assert!(outbox.take_news());
        assert!(!outbox.take_news());
        assert_eq!(posted.drain().collect::<Vec<_>>(), [b"one", b"two"]);
        assert_eq!(posted.drain().count(), 0);
    }

    #[test]
    fn a_full_outbox_refuses_and_takes_again_once_it_was_emptied() {
        let (mut outbox, posted) = Outbox::pair();
        let fill = |outbox: &mut Outbox| {
            (0..2 * OUTBOX)
                .filter(|_| outbox.post(&[0]).is_ok())
                .count()
        };
        assert_eq!(fill(&mut outbox), OUTBOX);
        assert_eq!(outbox.post(&[1]), Err(DropReason::ReplyLimited));
        assert_eq!(posted.drain().count(), OUTBOX);
        assert_eq!(fill(&mut outbox), OUTBOX);
    }
}
