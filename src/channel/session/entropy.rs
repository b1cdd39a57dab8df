//! The channel's random bytes. It has no source of its own: whoever makes a tunnel brings one.

use std::fmt;
use std::sync::Arc;
#[cfg(test)]
use std::sync::Mutex;

/// A source of random bytes: `io::entropy::system`, or in tests one that gives the same each time.
#[derive(Clone)]
pub struct Entropy(Arc<Source>);

type Source = dyn Fn(&mut [u8]) -> Result<(), NoEntropy> + Send + Sync;

/// The system had no randomness to give.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the system's random number generator failed")]
pub struct NoEntropy;

impl Entropy {
    /// The bytes that `source` gives.
    pub fn new(
        source: impl Fn(&mut [u8]) -> Result<(), NoEntropy> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(source))
    }

    /// Fills `bytes`.
    ///
    /// # Errors
    /// [`NoEntropy`] if the source failed.
    pub fn fill(&self, bytes: &mut [u8]) -> Result<(), NoEntropy> {
        (self.0)(bytes)
    }

    /// A random word.
    pub(crate) fn u64(&self) -> Result<u64, NoEntropy> {
        let mut bytes = [0; 8];
        self.fill(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    #[cfg(test)]
    pub(crate) fn of(source: impl FnMut(&mut [u8]) + Send + 'static) -> Self {
        let source = Mutex::new(source);
        Self::new(move |bytes| {
            (source.lock().unwrap())(bytes);
            Ok(())
        })
    }

    /// SplitMix64 (Steele, Lea, Flood, 2014).
    #[cfg(test)]
    pub(crate) fn seeded(mut state: u64) -> Self {
        Self::of(move |bytes| {
            for chunk in bytes.chunks_mut(8) {
                state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
                let mut z = state;
                z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
                let word = (z ^ (z >> 31)).to_le_bytes();
                chunk.copy_from_slice(&word[..chunk.len()]);
            }
        })
    }
}

impl fmt::Debug for Entropy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Entropy(..)")
    }
}
