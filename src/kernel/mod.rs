//! Everything that the daemon asks of the kernel's network configuration.
//!
//! ```text
//!   capture, steer    what is wanted on the old and on the new server, as values
//!   keep, masquerade  the same for the ways that keep the moved address, or translate both
//!   Host              the one door: makes wanted changes, undoes them, survives a crash
//!   change            a file for each kind of change: found, made, undone, with its remedy
//!   journal           what was changed, written down first
//!   runtime_dir       where the journal lies, and the lock that keeps a second daemon out
//!   programs, bpf     the programs at the interfaces, and how they get into the kernel
//!   netlink           the conversation with the kernel
//! ```
//!
//! Nothing outside this room changes links, routes, rules, filters or sysctls; the packets' way
//! through TUN and sockets is none of its business.

pub mod bpf;
pub mod capture;
pub mod change;
mod host;
pub mod journal;
pub mod keep;
pub mod masquerade;
pub mod netlink;
pub mod programs;
mod runtime_dir;
pub mod steer;

#[cfg(test)]
mod testing;

pub use change::Change;
pub use host::{Desired, Failure, Host, HostError, Repairs, Report};
pub use runtime_dir::{RuntimeDirError, namespace_dir};
