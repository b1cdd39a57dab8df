//! What tests and fuzzers share.

pub mod fuzz;
