//! The lab: a client, a router, the old server and the new one, in throwaway network namespaces of
//! this machine.
//!
//! Owns everything that stands in for the world around the daemon: namespaces, links, clients,
//! services, taps. `ipmoved demo`, the namespace tests and the benches are built from it, so that
//! what the demo shows and what the tests hold are the same thing. It uses no external command.
//!
//! Must not touch the network of the machine it runs on: every thread that changes something has
//! entered one of the lab's own namespaces before, and what it made goes with the namespace.
//! The daemon is a black box here: the lab starts the binary and reads what it prints.
//!
//! | room | owns |
//! |---|---|
//! | [`namespace`] | a namespace, threads and processes inside it |
//! | [`topology`] | who is where: addresses, links, routes |
//! | [`wiring`] | the requests to the kernel that only a lab makes |
//! | [`traffic`] | clients and services with real sockets |
//! | [`tap`] | a tap on an interface, and questions about what passed |
//! | [`raw`] | packets of any protocol, source and damage |
//! | [`snapshot`] | the state of a namespace as comparable text |
//! | [`daemon`] | `ipmoved` processes: start, wait, signal, read `status` |
//! | [`interrupt`] | SIGINT and SIGTERM, for commands that take down what they set up |
//! | [`mod@demo`] | `ipmoved demo`: the story, step by step |

#![allow(
    clippy::disallowed_methods,
    reason = "an edge: the lab waits for real kernels and real processes"
)]

use std::fmt;
use std::io;
use std::time::{Duration, Instant};

pub mod daemon;
pub mod demo;
pub mod interrupt;
pub mod namespace;
pub mod raw;
pub mod snapshot;
pub mod tap;
pub mod topology;
pub mod traffic;
pub(crate) mod wiring;

pub use daemon::{Daemon, DaemonSetup, Daemons};
pub use demo::{DemoError, demo};
pub use namespace::{Namespace, Output, Process};
pub use raw::{RawSocket, Watch, Wire, packets};
pub use snapshot::Snapshot;
pub use tap::{Capture, Tap};
pub use topology::{Lab, LabBuilder};
pub use traffic::{Answer, Client, Conversation, Probe, Service, UdpService};

/// What went wrong in the lab, in words for the person who started it.
#[derive(thiserror::Error)]
pub enum LabError {
    /// Namespaces cannot be made without privileges.
    #[error("network namespaces need root (CAP_NET_ADMIN and CAP_SYS_ADMIN): run with sudo")]
    Privileges,
    /// The kernel refused a step, or the network did not do it in time.
    #[error("cannot {action}: {source}")]
    Step {
        /// What was tried.
        action: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Something was seen that should not be, or was not seen that should.
    #[error("{0}")]
    Unexpected(String),
}

/// The sentence itself: it is what a test that returns the error prints.
impl fmt::Debug for LabError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl LabError {
    /// An error made of a sentence.
    pub fn unexpected(what: impl Into<String>) -> Self {
        Self::Unexpected(what.into())
    }
}

/// What the lab's operations return.
pub type Result<T, E = LabError> = std::result::Result<T, E>;

/// Adds to a kernel's error what was being done.
pub(crate) trait Doing<T> {
    /// `action` completes the sentence "cannot …".
    fn doing(self, action: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Doing<T> for std::result::Result<T, E> {
    fn doing(self, action: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| LabError::Step {
            action: action(),
            source: error.into(),
        })
    }
}

/// Asks again every `pause` until there is an answer; `None` if there was none within `timeout`.
pub fn poll_until<T>(
    timeout: Duration,
    pause: Duration,
    mut ask: impl FnMut() -> Option<T>,
) -> Option<T> {
    let deadline = Instant::now() + timeout;
    loop {
        if let Some(answer) = ask() {
            return Some(answer);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(pause);
    }
}
