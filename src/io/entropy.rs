//! The system's randomness, for everything that takes it as an argument.

use std::hash::{BuildHasher, RandomState};

use crate::channel::session::{Entropy, NoEntropy};
use crate::flow::seed::Seed;

/// The system's random number generator.
pub fn system() -> Entropy {
    Entropy::new(|bytes| aws_lc_rs::rand::fill(bytes).map_err(|_| NoEntropy))
}

/// A secret for the hashes of flows, from the standard library's own source of random keys.
pub fn seed() -> Seed {
    let keys = RandomState::new();
    Seed::new([keys.hash_one(1), keys.hash_one(2)])
}
