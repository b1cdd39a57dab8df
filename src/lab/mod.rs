//! The lab: a client, a router, the old server and the new one, in throwaway network namespaces of
//! this machine.
//!
//! Owns everything that stands for the world around the daemon: namespaces, links, clients,
//! services, taps. `ipmoved demo`, the namespace tests and the benches use it, so the demo shows
//! the same thing that the tests check. It uses no external command.
//!
//! Must not touch the network of the machine it runs on. So every thread that changes something has
//! entered one of the lab's own namespaces before, and its changes vanish with the namespace. The
//! daemon is a black box here: the lab starts the binary and reads its output.
//!
//! | file | owns |
//! |---|---|
//! | [`namespace`] | a namespace, threads and processes inside it |
//! | [`topology`] | who is where: addresses, links, routes |
//! | [`wiring`] | the requests to the kernel that only a lab makes |
//! | [`traffic`] | clients and services with real sockets |
//! | [`tap`] | a tap on an interface, and questions about the packets it saw |
//! | [`raw`] | packets of any protocol, source and damage |
//! | [`snapshot`] | the state of a namespace as comparable text |
//! | [`daemon`] | `ipmoved` processes: start, wait, signal, read `status` |
//! | [`interrupt`] | SIGINT and SIGTERM, for commands that must take down what they set up |
//! | [`mod@demo`] | `ipmoved demo`: the story, step by step |

#![allow(
    clippy::disallowed_methods,
    reason = "an edge: the lab waits for real kernels and real processes"
)]

use std::fmt;
use std::io;
use std::sync::LazyLock;
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

/// Why something failed in the lab, in words for the person who started it.
#[derive(thiserror::Error)]
pub enum LabError {
    /// Namespaces cannot be made without privileges.
    #[error("network namespaces need root (CAP_NET_ADMIN and CAP_SYS_ADMIN): run with sudo")]
    Privileges,
    /// The kernel refused a step, or the network did not do it in time.
    #[error("cannot {action}: {source}")]
    Step {
        /// The attempted action.
        action: String,
        /// The kernel's error.
        source: io::Error,
    },
    /// We saw something that should not be, or did not see something that should.
    #[error("{0}")]
    Unexpected(String),
}

/// Prints the sentence itself, since a test that returns the error prints it this way.
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

/// The result of the lab's operations.
pub type Result<T, E = LabError> = std::result::Result<T, E>;

/// Adds the attempted action to a kernel's error.
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

/// Says how many times longer than usual whoever waits in a lab waits, on a machine that is slow,
/// such as an emulated one.
pub const SLOWNESS: &str = "IPMOVED_TEST_SLOWNESS";

/// How long to wait for something on this machine that takes `usual` at most on a common one.
pub fn patience(usual: Duration) -> Duration {
    static FACTOR: LazyLock<u32> = LazyLock::new(|| {
        let said = std::env::var(SLOWNESS).ok();
        said.and_then(|said| said.parse().ok()).unwrap_or(1)
    });
    usual * *FACTOR
}

/// Tries again every `pause` until there is a value; `None` if there was none within `timeout`, or
/// what that is on this machine ([`patience`]).
pub fn poll_until<T>(
    timeout: Duration,
    pause: Duration,
    mut ask: impl FnMut() -> Option<T>,
) -> Option<T> {
    let deadline = Instant::now() + patience(timeout);
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
