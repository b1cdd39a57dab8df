//! Everything that the daemon asks of the kernel's network configuration.
//!
//! ```text
//!   capture, steer    what is wanted on the old and on the new server, as values
//!   keep, masquerade  the same for the ways that keep the moved address, or translate both
//!   Host              the one door: makes wanted changes, undoes them, survives a crash
//!   journal           what was changed, written down first
//!   programs, bpf     the programs at the interfaces, and how they get into the kernel
//!   netlink           the conversation with the kernel
//! ```
//!
//! Nothing outside this room changes links, routes, rules, filters or sysctls; the packets' way
//! through TUN and sockets is none of its business.

#![expect(
    clippy::disallowed_methods,
    reason = "an edge: it reads and writes the kernel's files"
)]

pub mod bpf;
pub mod capture;
mod host;
pub mod journal;
pub mod keep;
pub mod masquerade;
pub mod netlink;
pub mod programs;
pub mod steer;

#[cfg(test)]
mod testing;

pub use host::{Desired, Failure, Host, HostError, Repairs, Report};
