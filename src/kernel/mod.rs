//! Everything that the daemon asks of the kernel's network configuration.
//!
//! ```text
//!   plan          what is wanted for each role, as values
//!   Host          the one door: makes wanted changes, undoes them, survives a crash
//!   change        a file for each kind of change: found, made, undone, with its remedy
//!   journal       what was changed, written down first
//!   runtime_dir   where the journal lies, and the lock that keeps a second daemon out
//!   programs      the programs at the interfaces, one a file
//!   bpf           how programs are written, and how they get into the kernel
//!   netlink       the conversation with the kernel, by object
//! ```
//!
//! Nothing outside this room changes links, routes, rules, filters or sysctls; the packets' way
//! through TUN and sockets is none of its business.

#![expect(
    clippy::disallowed_methods,
    reason = "an edge: it reads and writes the kernel's files"
)]

pub mod bpf;
pub mod change;
mod host;
pub mod journal;
pub mod netlink;
pub mod plan;
pub mod programs;
mod runtime_dir;

#[cfg(test)]
mod testing;

pub use change::Change;
pub use host::{Desired, Failure, Host, HostError, Repairs, Report};
pub use plan::{capture, keep, masquerade, steer};
pub use runtime_dir::{RuntimeDirError, namespace_dir};
