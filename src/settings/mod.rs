//! What was typed, and what it means.

pub mod args;
pub mod config;
mod file;
mod psk;
