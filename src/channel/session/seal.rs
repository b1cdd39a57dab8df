//! Sealing and opening of datagrams, lane by lane.
//!
//! Owns the counters of sent datagrams and the windows of received ones. `aead` owns the AEAD
//! itself.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::aead::LaneKey;
use super::{Session, at_lane};
use crate::channel::replay::{Fresh, Window};
use crate::channel::wire::{DATA_HEADER_LEN, Data, Flags, TAG_LEN};
use crate::model::drops::DropReason;

/// Set in a lane's counter when its session has ended: every reservation fails from then on.
const RETIRED: u64 = 1 << 63;

/// Seals what one lane sends. Aligned so that the counters of two lanes never share a cache line,
/// nor the pair of lines that x86 fetches together.
#[repr(align(128))]
pub struct Sealer {
    key: LaneKey,
    lane: u8,
    remote: u32,
    limit: u64,
    next: AtomicU64,
}

/// The right to seal one datagram. It cannot be copied, so no nonce is used twice.
#[derive(Debug)]
pub struct Counter(u64);

/// Consecutive counters of one lane.
#[derive(Debug)]
pub struct Reserved(Range<u64>);

impl Iterator for Reserved {
    type Item = Counter;

    fn next(&mut self) -> Option<Counter> {
        self.0.next().map(Counter)
    }
}

/// A datagram that could not be sealed: its buffer is too short for header and tag. It must not be
/// sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("no space for header and tag")]
pub struct NotSealed;

impl Sealer {
    /// Seals on `lane` for the peer's session `remote`, at most `limit` datagrams.
    pub(super) fn new(key: LaneKey, lane: u8, remote: u32, limit: u64) -> Self {
        Self {
            key,
            lane,
            remote,
            limit,
            next: AtomicU64::new(0),
        }
    }

    /// Reserves `count` consecutive counters; `None` once the key is used up or the session has
    /// ended.
    ///
    /// Two threads that share a lane never get the same counter.
    pub fn reserve(&self, count: u32) -> Option<Reserved> {
        let first = self.next.fetch_add(u64::from(count), Relaxed);
        let end = first + u64::from(count);
        (end <= self.limit).then_some(Reserved(first..end))
    }

    /// Seals in place: `datagram` is 16 bytes for the header, the plaintext, and 16 bytes for the
    /// tag.
    ///
    /// # Errors
    /// [`NotSealed`] if it is too short for that.
    pub fn seal(
        &self,
        counter: Counter,
        flags: Flags,
        datagram: &mut [u8],
    ) -> Result<(), NotSealed> {
        let (header, body) = datagram
            .split_first_chunk_mut::<DATA_HEADER_LEN>()
            .ok_or(NotSealed)?;
        let (plaintext, tag) = body.split_last_chunk_mut::<TAG_LEN>().ok_or(NotSealed)?;
        let nonce = counter.0;
        *header = self.header(counter, flags);
        *tag = self.key.seal(nonce, header, plaintext).ok_or(NotSealed)?;
        Ok(())
    }

    /// How many counters lanes asked for, whether or not they got them.
    pub(super) fn reserved(&self) -> u64 {
        self.next.load(Relaxed) & !RETIRED
    }

    /// Goes on behind what another daemon has sealed under the same key. It must not seal any more.
    pub(super) fn go_on_at(&self, next: u64) {
        self.next.store(next, Relaxed);
    }

    /// From now on every reservation fails.
    pub(super) fn retire(&self) {
        self.next.fetch_or(RETIRED, Relaxed);
    }

    fn header(&self, counter: Counter, flags: Flags) -> [u8; DATA_HEADER_LEN] {
        Data {
            flags,
            lane: self.lane,
            receiver: self.remote,
            counter: counter.0,
        }
        .encode()
    }
}

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sealer")
            .field("lane", &self.lane)
            .field("next", &self.next)
            .finish_non_exhaustive()
    }
}

/// Opens what one lane of the peer sent.
#[repr(align(128))]
pub(super) struct Opener {
    key: LaneKey,
    window: Mutex<Window>,
}

impl Opener {
    pub(super) fn new(key: LaneKey) -> Self {
        Self {
            key,
            window: Mutex::default(),
        }
    }

    /// What was received.
    pub(super) fn window(&self) -> MutexGuard<'_, Window> {
        self.window.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Opener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Opener(..)")
    }
}

/// A datagram that was opened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Opened {
    /// How to read the plaintext.
    pub flags: Flags,
    /// The peer's lane.
    pub lane: u8,
    /// The peer's counter on that lane.
    pub counter: u64,
    /// Where the plaintext lies in the datagram.
    pub plaintext: Range<usize>,
    /// It is the newest of its lane, so the peer is now where it came from.
    pub newest: bool,
    /// It is the first on its session, and the tunnel needs to know.
    pub first: bool,
}

/// Opens datagrams of one session. It may hold the lock of a lane's window, so drop it at the end
/// of the batch.
#[derive(Debug)]
pub struct OpenBatch<'a> {
    session: &'a Session,
    window: Option<(u8, MutexGuard<'a, Window>)>,
}

impl<'a> OpenBatch<'a> {
    pub(super) fn new(session: &'a Session) -> Self {
        Self {
            session,
            window: None,
        }
    }

    /// Opens `datagram` in place; `data` is its header, read from it.
    ///
    /// # Errors
    /// [`DropReason::SessionUnknown`] if it is for another session, [`DropReason::SessionExpired`]
    /// after the session's end, [`DropReason::OpenAuth`] if the peer did not make it,
    /// [`DropReason::Replay`] if it came before or is too old to tell.
    pub fn open(&mut self, data: Data, datagram: &mut [u8]) -> Result<Opened, DropReason> {
        let session = self.session;
        if data.receiver != session.index() {
            return Err(DropReason::SessionUnknown);
        }
        if session.retired.load(Relaxed) {
            return Err(DropReason::SessionExpired);
        }
        // A lane that the peer did not announce has no key: forging one costs no derivation.
        let opener = at_lane(&session.openers, data.lane).ok_or(DropReason::OpenAuth)?;
        let (header, body) = datagram
            .split_first_chunk_mut::<DATA_HEADER_LEN>()
            .ok_or(DropReason::WireMalformed)?;
        let length = opener
            .key
            .open(data.counter, header, body)
            .ok_or(DropReason::OpenAuth)?;
        let fresh = self
            .window_of(data.lane, opener)
            .accept(data.counter)
            .ok_or(DropReason::Replay)?;
        let first = !session.heard.load(Relaxed) && !session.heard.swap(true, Relaxed);
        Ok(Opened {
            flags: data.flags,
            lane: data.lane,
            counter: data.counter,
            plaintext: DATA_HEADER_LEN..DATA_HEADER_LEN + length,
            newest: fresh == Fresh::Newest,
            first,
        })
    }

    fn window_of(&mut self, lane: u8, opener: &'a Opener) -> &mut Window {
        // The lock is released before the next is taken, so two threads never wait for each other.
        if self.window.as_ref().is_some_and(|(held, _)| *held != lane) {
            self.window = None;
        }
        let (_, window) = self.window.get_or_insert_with(|| {
            let window = opener.window.lock().unwrap_or_else(PoisonError::into_inner);
            (lane, window)
        });
        window
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::super::cipher::{Cipher, REJECT_AFTER_AES};
    use super::super::tests::ends;
    use super::*;
    use crate::channel::wire::DATA_OVERHEAD;

    #[test]
    #[expect(clippy::disallowed_methods, reason = "two threads that share a lane")]
    fn nonces_do_not_repeat_over_threads_and_end_at_the_limit() {
        let [old, _] = ends(Cipher::Aes256Gcm, 1);
        let sealer = old.sealer(0).unwrap();
        let counters = std::thread::scope(|scope| {
            let take = || {
                let reserve = |n: u32| sealer.reserve(n % 5 + 1).unwrap().map(|counter| counter.0);
                (0..1_000).flat_map(reserve).collect::<Vec<_>>()
            };
            let threads = [scope.spawn(take), scope.spawn(take)];
            threads.map(|thread| thread.join().unwrap()).concat()
        });
        let unique = counters.iter().collect::<HashSet<_>>();
        assert_eq!((unique.len(), counters.len()), (6_000, 6_000));
        sealer.next.store(REJECT_AFTER_AES - 2, Relaxed);
        assert!(sealer.reserve(2).is_some());
        assert!(sealer.reserve(1).is_none());
        assert!(sealer.reserve(1).is_none());
    }

    #[test]
    fn a_buffer_too_short_for_header_and_tag_is_refused() {
        let [old, _] = ends(Cipher::Aes256Gcm, 1);
        let sealer = old.sealer(0).unwrap();
        let mut counters = sealer.reserve(100).unwrap();
        for length in 0..DATA_OVERHEAD {
            let counter = counters.next().unwrap();
            assert_eq!(
                sealer.seal(counter, Flags::NONE, &mut vec![0; length]),
                Err(NotSealed)
            );
        }
    }
}
