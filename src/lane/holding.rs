//! What waits for the end of a hold: kept by the lanes, and taken out by [`super::release`].
//!
//! Owns the lock around the queue ([`flow::hold`](crate::flow::hold)), and the bell that says when
//! there is something to do. Only the first packets of flows come here, and only during a hold and
//! until what waited has gone on.

use std::io;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};

use super::bell::{clear, ring};
use crate::flow::hold::Hold;
use crate::model::drops::DropReason;
use crate::model::mode::Mode;
use crate::model::moved::Move;
use crate::packet::Parsed;

/// What waits, as lanes and the control task see it.
///
/// Aligned so that what lanes ask for each packet shares no cache line with what others write.
#[derive(Debug)]
#[repr(align(64))]
pub struct Holding {
    /// Whether anything waits, so that packets need not ask for the lock.
    some: AtomicBool,
    hold: Mutex<Hold>,
    bell: OwnedFd,
}

/// The queue, to whoever has it at present.
pub(super) struct Locked<'a> {
    hold: MutexGuard<'a, Hold>,
    some: &'a AtomicBool,
}

impl Holding {
    /// For these moves, of all peers. Nothing is held.
    ///
    /// # Errors
    /// If the kernel has no descriptor left.
    pub fn new(moves: &[Move]) -> io::Result<Self> {
        Ok(Self {
            some: AtomicBool::new(false),
            hold: Mutex::new(Hold::new(moves)),
            bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// From now on these are the moves, of all peers; see [`Hold::set_moves`].
    pub fn set_moves(&self, moves: &[Move]) {
        self.lock().set_moves(moves);
    }

    /// Sets the modes of the moves, in the order of [`new`](Self::new). What is no longer held is
    /// judged anew and goes on, so whoever judges has to know the modes first.
    pub fn set_modes(&self, modes: &[Mode<Instant>]) {
        self.lock().set_modes(modes);
        ring(&self.bell);
    }

    /// How many flows of each move wait.
    pub fn waiting(&self) -> Vec<u64> {
        self.lock().waiting().to_vec()
    }

    /// Whether anything waits.
    #[inline]
    pub(super) fn has_some(&self) -> bool {
        self.some.load(Relaxed)
    }

    /// Keeps a packet with those of its flow that wait, if any do, so that it does not overtake
    /// them though it is not held itself. Whether it does: there may be no room for it.
    #[cold]
    pub(super) fn join(&self, now: Instant, parsed: &Parsed, head: &[u8], packet: &[u8]) -> bool {
        let mut hold = self.lock();
        hold.waits(parsed, packet) && hold.keep(now, parsed, &[head, packet].concat()).is_ok()
    }

    /// Keeps a packet, whose `frame` has the virtio header in front.
    ///
    /// # Errors
    /// As [`Hold::keep`].
    #[cold]
    pub(super) fn keep(
        &self,
        now: Instant,
        parsed: &Parsed,
        frame: &[u8],
    ) -> Result<(), DropReason> {
        let kept = self.lock().keep(now, parsed, frame);
        kept.map(|is_next| {
            if is_next {
                ring(&self.bell);
            }
        })
    }

    /// Forgets what waits of a client that has given up. Returns how many packets did.
    #[cold]
    pub(super) fn withdraw(&self, parsed: &Parsed, packet: &[u8]) -> usize {
        self.lock().withdraw(parsed, packet)
    }

    /// Becomes readable when there may be something to do earlier than was said.
    pub(super) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// Has heard the bell.
    pub(super) fn silence(&self) {
        clear(&self.bell);
    }

    /// The queue. Nobody may wait for anything while having it.
    pub(super) fn lock(&self) -> Locked<'_> {
        Locked {
            hold: self.hold.lock().unwrap_or_else(PoisonError::into_inner),
            some: &self.some,
        }
    }
}

impl Deref for Locked<'_> {
    type Target = Hold;

    fn deref(&self) -> &Hold {
        &self.hold
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut Hold {
        &mut self.hold
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        self.some.store(!self.hold.is_empty(), Relaxed);
    }
}
