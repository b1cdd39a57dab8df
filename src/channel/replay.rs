//! Which packets of a lane were already received: the sliding window of RFC 6479.
//!
//! The window is a ring of 64-bit words. Sliding forward clears whole words instead of shifting
//! bits, so one word of the ring is always spare: [`WINDOW`] counters behind the newest are
//! remembered.
//!
//! ```text
//!   counter / 64         126   127 │ 128   129   130        newest counter in word 130
//!   word in the ring     126   127 │   0     1     2        word 3 is the oldest that is kept,
//!                              wraps at 128                 cleared when the newest reaches 131
//! ```
//!
//! It does not decide who wrote a packet. Call [`Window::accept`] only after the AEAD tag was
//! verified: otherwise a forged counter would close the window for real packets.

use crate::model::bytes::take;

/// Words of the ring: a power of two, so that a word is found with a mask.
const WORDS: usize = 128;
const BITS: u64 = u64::BITS as u64;

/// How far behind the newest counter a late packet can still be told from a replay: 8,128, as
/// WireGuard has it.
pub const WINDOW: u64 = (WORDS as u64 - 1) * BITS;

/// The counters that were received on one lane of one session.
#[derive(Debug)]
pub struct Window {
    ring: [u64; WORDS],
    /// One past the newest counter that was accepted; 0 at the start.
    next: u64,
}

impl Default for Window {
    fn default() -> Self {
        Self {
            ring: [0; WORDS],
            next: 0,
        }
    }
}

/// What [`Window::accept`] says about a packet that was not seen before.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fresh {
    /// It is newer than every packet before it.
    Newest,
    /// A newer one arrived before it.
    Late,
}

impl Window {
    /// Takes note of an authenticated packet; `None` if it was seen before or is too old to tell.
    pub fn accept(&mut self, counter: u64) -> Option<Fresh> {
        let next = counter.checked_add(1)?;
        let fresh = if next > self.next {
            self.slide_to(counter / BITS);
            self.next = next;
            Fresh::Newest
        } else if self.next - next > WINDOW {
            return None;
        } else {
            Fresh::Late
        };
        let word = &mut self.ring[place(counter / BITS)];
        let bit = 1 << (counter % BITS);
        let seen = *word & bit != 0;
        *word |= bit;
        (!seen).then_some(fresh)
    }

    /// Appends what was received, for the daemon that takes over.
    pub fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.next.to_le_bytes());
        for word in self.ring {
            out.extend_from_slice(&word.to_le_bytes());
        }
    }

    /// Takes that off the front.
    pub fn take(rest: &mut &[u8]) -> Option<Self> {
        let mut window = Self {
            next: u64::from_le_bytes(take(rest)?),
            ..Self::default()
        };
        for word in &mut window.ring {
            *word = u64::from_le_bytes(take(rest)?);
        }
        Some(window)
    }

    /// Clears the words between the newest so far and `word`, which becomes the newest.
    fn slide_to(&mut self, word: u64) {
        let newest = self.next.saturating_sub(1) / BITS;
        let steps = (word - newest).min(WORDS as u64);
        for step in 1..=steps {
            self.ring[place(newest + step)] = 0;
        }
    }
}

fn place(word: u64) -> usize {
    (word % WORDS as u64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    /// Remembers everything and forgets what lies behind the window.
    #[derive(Default)]
    struct Model {
        seen: HashSet<u64>,
        newest: Option<u64>,
    }

    impl Model {
        fn accept(&mut self, counter: u64) -> Option<Fresh> {
            if counter == u64::MAX {
                return None;
            }
            let newest = self.newest.unwrap_or(0);
            if counter < newest && newest - counter > WINDOW {
                return None;
            }
            if !self.seen.insert(counter) {
                return None;
            }
            if self.newest.is_none_or(|newest| counter > newest) {
                self.newest = Some(counter);
                return Some(Fresh::Newest);
            }
            Some(Fresh::Late)
        }
    }

    #[test]
    fn the_window_is_as_wide_as_promised() {
        const { assert!(WINDOW >= 8_128) };
        let mut window = Window::default();
        assert_eq!(window.accept(100_000), Some(Fresh::Newest));
        assert_eq!(window.accept(100_000 - WINDOW), Some(Fresh::Late));
        assert_eq!(window.accept(100_000 - WINDOW), None);
        assert_eq!(window.accept(100_000 - WINDOW - 1), None);
    }

    #[test]
    fn the_first_counter_and_the_last() {
        let mut window = Window::default();
        assert_eq!(window.accept(0), Some(Fresh::Newest));
        assert_eq!(window.accept(0), None);
        assert_eq!(window.accept(u64::MAX), None, "it has no successor");
        assert_eq!(window.accept(u64::MAX - 1), Some(Fresh::Newest));
        assert_eq!(window.accept(u64::MAX - 1), None);
        assert_eq!(window.accept(1), None);
    }

    fn counters() -> impl Strategy<Value = Vec<u64>> {
        // A walk: mostly around a point that moves, with jumps of every size up to several windows.
        let step = prop_oneof![
            8 => -200i64..200,
            4 => -9_000i64..9_000,
            1 => 0i64..100_000,
            1 => Just(i64::MAX / 4),
        ];
        proptest::collection::vec(step, 0..400).prop_map(|steps| {
            let mut at = 0u64;
            steps
                .into_iter()
                .map(|step| {
                    at = at.saturating_add_signed(step);
                    at
                })
                .collect()
        })
    }

    proptest! {
        #[test]
        fn agrees_with_a_model_that_remembers_everything(counters in counters()) {
            let mut window = Window::default();
            let mut model = Model::default();
            for counter in counters {
                prop_assert_eq!(window.accept(counter), model.accept(counter), "{}", counter);
            }
        }
    }
}
