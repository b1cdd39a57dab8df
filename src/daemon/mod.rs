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

pub mod confine;
mod control;
mod nat;
mod service;
mod setup;
pub mod status_socket;
mod warnings;

use std::path::Path;

use crate::settings::config::Config;

pub use nat::run as run_nat;
pub use service::{Cause, DaemonError};

/// Runs until a signal ends it, and undoes everything then.
///
/// # Errors
/// See [`DaemonError`]; whatever it is, kernel changes of this run are undone.
pub fn run(config: Config, runtime_dir: &Path) -> Result<(), DaemonError> {
    service::block_on(async {
        let ready = setup::Ready::new(&config, runtime_dir)?;
        // Before the first thread: what is given up is given up by those that follow as well.
        confine::drop_privileges();
        control::run(config, ready).await
    })
}
