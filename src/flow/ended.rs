//! Flows that ended, for whoever keeps something of each flow elsewhere.
//!
//! Owns how a flow looks to this host's own stack ([`HostFlow`]), and an outbox of such flows until
//! somebody takes them. The outbox is bounded: who is late is told how much was lost, and has to
//! look at everything it keeps. Must not touch sockets, maps or the clock.

use std::net::SocketAddr;

/// Ended flows that wait to be taken, in all shards: more than a flood ends in the tenth of a
/// second after which they are taken.
pub const ENDED_ROOM: usize = 1 << 16;

/// A flow as the new server's own stack sees its packets.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct HostFlow {
    /// IP protocol number.
    pub protocol: u8,
    /// Where it is delivered. The port is 0 for protocols without, ICMP among them.
    pub local: SocketAddr,
    /// The client, and its port as the application sees it: the identifier of its queries, or 0
    /// for protocols without.
    pub remote: SocketAddr,
}

/// Flows that wait to be taken, whatever names them.
#[derive(Debug)]
pub(super) struct Outbox<T> {
    room: usize,
    waiting: Vec<T>,
    lost: u64,
}

impl<T> Outbox<T> {
    /// An empty outbox for at most `room` flows. It takes no memory until there is one.
    pub(super) fn new(room: usize) -> Self {
        Self {
            room,
            waiting: Vec::new(),
            lost: 0,
        }
    }

    /// Puts a flow in, or counts it if there is no room.
    pub(super) fn put(&mut self, flow: T) {
        if self.waiting.len() < self.room {
            self.waiting.push(flow);
        } else {
            self.lost += 1;
        }
    }

    /// Takes all flows out. The second result counts those that found no room since the last time.
    pub(super) fn take(&mut self) -> (Vec<T>, u64) {
        (
            std::mem::take(&mut self.waiting),
            std::mem::take(&mut self.lost),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_finds_no_room_is_counted_once() {
        let mut outbox = Outbox::new(2);
        for flow in 0..5 {
            outbox.put(flow);
        }
        assert_eq!(outbox.take(), (vec![0, 1], 3));
        assert_eq!(outbox.take(), (vec![], 0));
        outbox.put(5);
        assert_eq!(outbox.take(), (vec![5], 0));
    }
}
