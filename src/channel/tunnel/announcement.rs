//! The transfer of an announcement, part by part, since it may be larger than a datagram.
//!
//! Owns which of our parts the peer acknowledged, and which of its parts came in. Both belong to
//! one run of the peer: after a restart it knows nothing. `messages` knows what an announcement
//! says.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::messages::{Announcement, PART_LEN};

/// Time after which parts that were not acknowledged are sent again.
const RETRY: Duration = Duration::from_secs(1);

/// Parts that are sent at a time, and how long the next ones wait: the peer takes 256 control
/// messages a second.
const AT_A_TIME: usize = 32;
const PAUSE: Duration = Duration::from_millis(250);

/// Our announcement, on its way to the peer.
pub(super) struct Outgoing {
    /// Rises with each announcement.
    id: u32,
    parts: Vec<Part>,
    /// The run of the peer that acknowledged the parts.
    peer_run: Option<u64>,
    send_at: Instant,
}

struct Part {
    bytes: Arc<[u8]>,
    acked: bool,
    /// When it is to be sent; at once if it was not yet.
    send_at: Option<Instant>,
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

    /// Replaces this announcement with another one.
    pub(super) fn replace(&mut self, announcement: &Announcement, now: Instant) {
        *self = Self {
            id: self.id.wrapping_add(1),
            ..Self::new(announcement, now)
        };
    }

    /// Sends to this run of the peer from now on. A new run is told everything again; whether it
    /// may be one.
    pub(super) fn send_to(&mut self, peer_run: u64, now: Instant) -> bool {
        let anew = self.peer_run != Some(peer_run);
        if anew {
            self.peer_run = Some(peer_run);
            for part in &mut self.parts {
                (part.acked, part.send_at) = (false, None);
            }
            self.send_at = now;
        }
        anew
    }

    /// When parts are due; `None` when all are acknowledged.
    pub(super) fn due(&self) -> Option<Instant> {
        let open = self.parts.iter().any(|part| !part.acked);
        open.then_some(self.send_at)
    }

    /// The parts that are due now, each with its place.
    pub(super) fn take_due(&mut self, now: Instant, peer_run: Option<u64>) -> Vec<(u8, Arc<[u8]>)> {
        self.peer_run = peer_run;
        let is_due = |part: &Part| !part.acked && part.send_at.is_none_or(|at| at <= now);
        let mut due = Vec::new();
        for (at, part) in (0..).zip(&mut self.parts) {
            if is_due(part) && due.len() < AT_A_TIME {
                part.send_at = Some(now + RETRY);
                due.push((at, Arc::clone(&part.bytes)));
            }
        }
        let open = self.parts.iter().filter(|part| !part.acked);
        let next = open.map(|part| part.send_at.unwrap_or(now)).min();
        self.send_at = next.map_or(now + RETRY, |next| next.max(now + PAUSE));
        due
    }

    pub(super) fn id(&self) -> u32 {
        self.id
    }

    /// How many parts it has.
    pub(super) fn count(&self) -> u8 {
        self.parts.len() as u8
    }

    /// This run of the peer acknowledged a part.
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
        send_at: None,
    };
    bytes.chunks(PART_LEN).map(part).collect()
}

/// The peer's announcement, as far as it came in.
#[derive(Default)]
pub(super) struct Incoming {
    peer_run: u64,
    /// Id of the last announcement that was complete, 0 if none was.
    done: u32,
    id: u32,
    parts: Vec<Option<Vec<u8>>>,
}

impl Incoming {
    /// Takes a part. Returns the bytes of the whole announcement if this was the last part missing.
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
        if self.parts.iter().any(Option::is_none) {
            return None;
        }
        self.done = id;
        let whole: Vec<Vec<u8>> = self.parts.drain(..).flatten().collect();
        Some(whole.concat())
    }
}
