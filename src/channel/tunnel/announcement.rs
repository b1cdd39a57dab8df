//! The transfer of an announcement, which may be larger than a datagram, part by part.
//!
//! Owns which parts were acknowledged and which came in, each of them for one run of the peer: a
//! peer that was restarted knows nothing. What an announcement says is written in `messages`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::messages::{Announcement, PART_LEN};

/// Pace of re-sending parts that were not acknowledged.
const RETRY: Duration = Duration::from_secs(1);

/// Our announcement, on its way.
pub(super) struct Outgoing {
    /// Rises with each announcement.
    id: u32,
    parts: Vec<Part>,
    /// The run of the peer that acknowledged parts.
    peer_run: Option<u64>,
    send_at: Instant,
}

struct Part {
    bytes: Arc<[u8]>,
    acked: bool,
}

impl Outgoing {
    /// The first announcement of this run.
    pub(super) fn new(announcement: &Announcement, now: Instant) -> Self {
        Self {
            id: 1,
            parts: split(announcement),
            peer_run: None,
            send_at: now,
        }
    }

    /// Another announcement takes the place of this one.
    pub(super) fn replace(&mut self, announcement: &Announcement, now: Instant) {
        *self = Self {
            id: self.id.wrapping_add(1),
            ..Self::new(announcement, now)
        };
    }

    /// This run of the peer is sent to from now on: if it is another one, it is told everything.
    pub(super) fn send_to(&mut self, peer_run: u64, now: Instant) {
        if self.peer_run != Some(peer_run) {
            self.peer_run = Some(peer_run);
            self.parts.iter_mut().for_each(|part| part.acked = false);
            self.send_at = now;
        }
    }

    /// When parts are to be sent; `None` when all are acknowledged.
    pub(super) fn due(&self) -> Option<Instant> {
        let open = self.parts.iter().any(|part| !part.acked);
        open.then_some(self.send_at)
    }

    /// The parts that are to be sent now, each with its place.
    pub(super) fn take_due(&mut self, now: Instant, peer_run: Option<u64>) -> Vec<(u8, Arc<[u8]>)> {
        self.send_at = now + RETRY;
        self.peer_run = peer_run;
        (0..self.count())
            .zip(&self.parts)
            .filter(|(_, part)| !part.acked)
            .map(|(at, part)| (at, Arc::clone(&part.bytes)))
            .collect()
    }

    pub(super) fn id(&self) -> u32 {
        self.id
    }

    /// Of how many parts it is.
    pub(super) fn count(&self) -> u8 {
        self.parts.len() as u8
    }

    /// This run of the peer has a part.
    pub(super) fn acked(&mut self, peer_run: u64, id: u32, part: u8) {
        let ours = id == self.id && self.peer_run == Some(peer_run);
        if let Some(part) = self.parts.get_mut(usize::from(part)).filter(|_| ours) {
            part.acked = true;
        }
    }
}

fn split(announcement: &Announcement) -> Vec<Part> {
    let bytes = announcement.encode();
    let part = |bytes: &[u8]| Part {
        bytes: bytes.into(),
        acked: false,
    };
    bytes.chunks(PART_LEN).map(part).collect()
}

/// The peer's announcement, as far as it came in.
#[derive(Default)]
pub(super) struct Incoming {
    peer_run: u64,
    /// The last that was complete, 0 if none.
    done: u32,
    id: u32,
    parts: Vec<Option<Vec<u8>>>,
}

impl Incoming {
    /// Takes a part; gives the bytes of the whole announcement when it was the last one missing.
    pub(super) fn push(
        &mut self,
        peer_run: u64,
        id: u32,
        part: u8,
        parts: u8,
        bytes: &[u8],
    ) -> Option<Vec<u8>> {
        if self.peer_run != peer_run {
            *self = Self {
                peer_run,
                ..Self::default()
            };
        }
        if id <= self.done || id < self.id {
            return None;
        }
        if id > self.id || self.parts.len() != usize::from(parts) {
            self.id = id;
            self.parts = vec![None; usize::from(parts)];
        }
        self.parts[usize::from(part)] = Some(bytes.to_vec());
        let whole = self.parts.iter().cloned().collect::<Option<Vec<_>>>()?;
        self.done = id;
        self.parts.clear();
        Some(whole.concat())
    }
}
