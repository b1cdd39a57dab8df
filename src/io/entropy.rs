//! The system's randomness, for everything that takes it as an argument.

use crate::channel::session::{Entropy, NoEntropy};

/// The system's random number generator.
pub fn system() -> Entropy {
    Entropy::new(|bytes| aws_lc_rs::rand::fill(bytes).map_err(|_| NoEntropy))
}
