//! Where the channel's random bytes come from.

use std::fmt;
#[cfg(test)]
use std::sync::{Arc, Mutex};

/// Where random bytes come from: the system, or in tests a source that gives the same ones each run.
#[derive(Clone)]
pub struct Entropy(Source);

#[derive(Clone)]
enum Source {
    System,
    #[cfg(test)]
    Test(TestSource),
}

#[cfg(test)]
type TestSource = Arc<Mutex<dyn FnMut(&mut [u8]) + Send>>;

/// The system had no randomness to give.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the system's random number generator failed")]
pub struct NoEntropy;

impl Entropy {
    /// The system's random number generator.
    pub fn system() -> Self {
        Self(Source::System)
    }

    /// Fills `bytes`.
    ///
    /// # Errors
    /// [`NoEntropy`] if the source failed.
    pub fn fill(&self, bytes: &mut [u8]) -> Result<(), NoEntropy> {
        match &self.0 {
            Source::System => aws_lc_rs::rand::fill(bytes).map_err(|_| NoEntropy),
            #[cfg(test)]
            Source::Test(source) => {
                (source.lock().unwrap())(bytes);
                Ok(())
            }
        }
    }

    pub(crate) fn u64(&self) -> Result<u64, NoEntropy> {
        let mut bytes = [0; 8];
        self.fill(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    #[cfg(test)]
    pub(crate) fn of(source: impl FnMut(&mut [u8]) + Send + 'static) -> Self {
        Self(Source::Test(Arc::new(Mutex::new(source))))
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
