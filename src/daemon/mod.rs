//! The daemon: checks, sets up, runs, and leaves the host as it was.
//!
//! ```text
//!   setup ──► host checked, sockets and TUN open, kernel changed (journaled)
//!     │
//!     ├──► lanes: one thread each, or two, carrying packets    (lane)
//!     │       │ handshakes, control messages     ▲ sessions, endpoints
//!     │       ▼                                  │
//!     └──► control: one thread, everything else  (control)
//! ```
//!
//! Way 1, without a tunnel, is `nat`'s.
//!
//! Owns the order of things. What is changed in the kernel is `kernel`'s business, what a packet
//! goes through is `lane`'s.

#![expect(
    clippy::disallowed_methods,
    reason = "an edge: the process reads clocks, files and its environment"
)]

pub mod confine;
mod control;
mod nat;
mod setup;
pub mod status_socket;

use std::fmt;
use std::path::Path;

use crate::settings::config::Config;

pub use nat::run as run_nat;

/// Why the daemon did not start, or ended.
#[derive(Debug)]
pub enum DaemonError {
    /// What it was told does not fit this host; nothing was changed.
    Input(String),
    /// This host cannot do it; nothing was changed.
    System(String),
    /// Another one runs already.
    Running(String),
    /// Something broke while it ran.
    Failed(String),
}

impl fmt::Display for DaemonError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Input(text) | Self::System(text) | Self::Running(text) | Self::Failed(text) => {
                f.write_str(text)
            }
        }
    }
}

/// Runs until a signal ends it, and undoes everything then.
///
/// # Errors
/// See [`DaemonError`]; whatever it is, kernel changes of this run are undone.
pub fn run(config: Config, runtime_dir: &Path) -> Result<(), DaemonError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| DaemonError::System(format!("cannot start the event loop: {error}")))?;
    let result = runtime.block_on(async {
        let ready = setup::Ready::new(&config, runtime_dir)?;
        // Before the first thread: what is given up is given up by those that follow as well.
        confine::drop_privileges();
        control::run(config, ready).await
    });
    // A name that is being looked up would keep the process for as long as the resolver is patient.
    runtime.shutdown_background();
    result
}
