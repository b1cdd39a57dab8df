//! Everything that the daemon asks of the kernel's network configuration.
//!
//! ```text
//!   plan          the changes that each role needs, as values
//!   Host          makes all changes, undoes them, survives a crash
//!   change        a file for each kind of change: how to find, make and undo it, with its remedy
//!   journal       the record of changes, written before each of them
//!   rehearsal     the same changes as commands, instead of being made
//!   tun           how the TUN is set up
//!   runtime_dir   where the journal lies, and the lock that keeps a second daemon out
//!   programs      the programs at the interfaces, one a file
//!   bpf           how programs are written, and how they get into the kernel
//!   netfilter     what the firewall does with a packet, for commands and at the start
//!   sockets       the conversations of this host's own sockets, for commands
//!   levers        whether the kernel can do it: tried out where it vanishes
//!   processes     which programs run beside this one
//!   look          who listens where, and what the kernel counts: for the causes of silence
//!   netlink       the conversation with the kernel, by object
//!   conntrack     which connections the kernel tracks of hosts behind this one
//! ```
//!
//! No other folder changes links, routes, rules, filters or sysctls. The packets' path through TUN
//! and sockets is none of this one's business.

#![expect(
    clippy::disallowed_methods,
    reason = "an edge: it reads and writes the kernel's files"
)]

pub mod bpf;
pub mod change;
pub mod conntrack;
mod host;
pub mod journal;
pub mod levers;
pub mod look;
pub mod netfilter;
pub mod netlink;
pub mod plan;
pub mod processes;
pub mod programs;
mod rehearsal;
mod runtime_dir;
pub mod sockets;
pub mod tun;

#[cfg(test)]
mod testing;

pub use bpf::supply::{given as supplied, recorded};
pub use change::Change;
pub use host::{Cleanup, Desired, Failure, Host, HostError, Repairs, Report};
pub use plan::{capture, keep, loopback, masquerade, steer};
pub use programs::{Place, named_ports};
pub use rehearsal::Step;
pub use runtime_dir::{RuntimeDirError, lock_path, namespace_dir};
