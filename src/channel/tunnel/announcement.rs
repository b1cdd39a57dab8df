//! The transfer of an announcement, which may be larger than a datagram, part by part.

use std::time::{Duration, Instant};

use super::messages::{Announcement, PART_LEN};

/// Pace of re-sending an announcement that was not acknowledged.
pub(super) const CONFIG_RETRY: Duration = Duration::from_secs(1);

/// Our announcement, on its way.
pub(super) struct Outgoing {
    pub(super) id: u32,
    pub(super) parts: Vec<Vec<u8>>,
    pub(super) acked: Vec<bool>,
    /// The run of the peer that `acked` is about.
    pub(super) peer_run: Option<u64>,
    pub(super) send_at: Instant,
}

impl Outgoing {
    pub(super) fn new(id: u32, announcement: &Announcement, now: Instant) -> Self {
        let parts = announcement
            .encode()
            .chunks(PART_LEN)
            .map(<[u8]>::to_vec)
            .collect::<Vec<_>>();
        Self {
            id,
            acked: vec![false; parts.len()],
            parts,
            peer_run: None,
            send_at: now,
        }
    }
}

/// The peer's announcement, as far as it came in.
#[derive(Default)]
pub(super) struct Incoming {
    pub(super) peer_run: u64,
    /// The last that was complete, 0 if none.
    pub(super) done: u32,
    pub(super) id: u32,
    pub(super) parts: Vec<Option<Vec<u8>>>,
}
