//! What was typed, and what it means.

#![expect(
    clippy::disallowed_methods,
    reason = "an edge: it reads files and the environment"
)]

pub mod args;
pub mod config;
