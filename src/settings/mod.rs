//! What was typed, and what it means.
//!
//! A flag lives in three places: a field of [`args`] (its name on the command line and in the file,
//! its help, its type) with its line of `over`, which lets it win over the file; a field of
//! [`config::Config`]; and the code that uses that. If its value has a syntax of its own, the type
//! is in [`values`], with the one `FromStr` that reads it from both.

#![expect(
    clippy::disallowed_methods,
    reason = "an edge: it reads files and the environment"
)]

pub mod args;
pub mod config;
pub(crate) mod file;
pub(crate) mod files;
mod from_text;
pub(crate) mod psk;
pub mod values;
