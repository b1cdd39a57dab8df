//! How `ipmoved status` asks the daemon.
//!
//! The socket lies in the runtime directory of the daemon's network namespace, which only root can
//! enter, so that daemons in different namespaces never meet. A client connects and reads one JSON
//! document; nothing is ever read from it.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::model::status::Status;

/// How long `ipmoved status` waits for a daemon that does not answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Longest answer read: 256 peers with 64 moves of 64 port ranges each stay below it.
const MAX_ANSWER: u64 = 16 << 20;

/// Why there is no status.
#[derive(Debug, thiserror::Error)]
pub enum StatusError {
    /// Nothing listens.
    #[error("no ipmoved runs in this network namespace ({} does not answer)", .0.display())]
    NotRunning(PathBuf),
    /// Not root.
    #[error("only root may ask: {} is not readable for this user; try sudo", .0.display())]
    Permission(PathBuf),
    /// The daemon's answer broke off or is not understood.
    #[error("the daemon's answer is not understood: {0}")]
    Answer(#[source] io::Error),
}

/// Asks the daemon that listens at `socket`.
pub fn ask(socket: &Path) -> Result<Status, StatusError> {
    let mut stream = UnixStream::connect(socket).map_err(|error| match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => StatusError::Permission(socket.into()),
        Some(libc::ENOENT | libc::ECONNREFUSED) => StatusError::NotRunning(socket.into()),
        _ => StatusError::Answer(error),
    })?;
    let mut text = String::new();
    stream
        .set_read_timeout(Some(PATIENCE))
        .and_then(|()| (&mut stream).take(MAX_ANSWER).read_to_string(&mut text))
        .map_err(StatusError::Answer)?;
    serde_json::from_str(&text).map_err(|error| StatusError::Answer(error.into()))
}
