//! Both ends of the status socket, over which `ipmoved status` asks the daemon.
//!
//! The socket lies in the runtime directory of the daemon's network namespace, which only root can
//! enter, so that daemons in different namespaces never meet. A client connects and reads one JSON
//! document; the daemon reads nothing from it.

use std::io::{self, Read};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tracing::{debug, warn};

use super::service::{Result, cannot};
use crate::model::runtime::STATUS_SOCKET;
use crate::model::status::Status;

/// How long `ipmoved status` waits for a daemon that does not answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long a client of the daemon may take to read.
const READ_PATIENCE: Duration = Duration::from_secs(5);

/// Pause after a client could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Least time between two warnings of that.
const WARNING_PACE: Duration = Duration::from_secs(60);

/// Longest status that is read: 256 peers with 64 moves of 64 port ranges each stay below it.
const MAX_STATUS: u64 = 16 << 20;

/// Why there is no status.
#[derive(Debug, thiserror::Error)]
pub enum StatusError {
    /// Nothing listens.
    #[error(
        "no ipmoved runs in this network namespace ({} does not answer); `systemctl start ipmoved` \
         starts it, and `journalctl -u ipmoved` says why it ended",
        .0.display()
    )]
    NotRunning(PathBuf),
    /// Not root.
    #[error("only root may ask: {} is not readable for this user; try sudo", .0.display())]
    Permission(PathBuf),
    /// The daemon's answer broke off or is not understood.
    #[error("the daemon's answer is not understood: {0}")]
    Answer(#[source] io::Error),
    /// The daemon is there, and says nothing.
    #[error(
        "the daemon runs, but does not answer: is it stopped, or waiting for a disk? (`systemctl \
         kill -s KILL ipmoved` ends it; started again it goes on, and resets no connection)"
    )]
    Silent,
}

impl StatusError {
    /// What an answer that does not come, or breaks off, tells of the daemon.
    pub(super) fn of_answer(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EAGAIN | libc::ETIMEDOUT) => Self::Silent,
            _ => Self::Answer(error),
        }
    }
}

/// Asks the daemon that listens at `socket`.
pub fn ask(socket: &Path) -> Result<Status, StatusError> {
    let mut stream = connect(socket)?;
    let mut text = String::new();
    stream
        .set_read_timeout(Some(PATIENCE))
        .and_then(|()| (&mut stream).take(MAX_STATUS).read_to_string(&mut text))
        .map_err(StatusError::of_answer)?;
    serde_json::from_str(&text).map_err(|error| StatusError::Answer(error.into()))
}

/// Connects to a socket of the daemon.
pub(super) fn connect(socket: &Path) -> Result<UnixStream, StatusError> {
    UnixStream::connect(socket).map_err(|error| match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => StatusError::Permission(socket.into()),
        Some(libc::ENOENT | libc::ECONNREFUSED) => StatusError::NotRunning(socket.into()),
        _ => StatusError::Answer(error),
    })
}

/// Opens the daemon's end in the directory of its namespace, whose lock it holds.
pub(super) fn listen(dir: &Path) -> Result<UnixListener> {
    listen_at(&dir.join(STATUS_SOCKET))
}

/// Opens a socket in a directory whose lock this daemon holds: one that lies there already is a
/// dead predecessor's.
pub(super) fn listen_at(path: &Path) -> Result<UnixListener> {
    let opened = || {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    opened().map_err(|error| cannot(format!("listen on {}", path.display()), error))
}

/// The daemon's end while it runs.
pub(super) struct StatusListener {
    listener: tokio::net::UnixListener,
    /// After an error nobody is accepted before this.
    again_at: Option<tokio::time::Instant>,
    warned: Option<tokio::time::Instant>,
}

impl StatusListener {
    /// Takes the socket into the event loop.
    pub(super) fn new(listener: UnixListener) -> io::Result<Self> {
        Ok(Self {
            listener: tokio::net::UnixListener::from_std(listener)?,
            again_at: None,
            warned: None,
        })
    }

    /// Waits for a client. A failure, as for want of descriptors, is not the client's: it is
    /// still there, so accepting it at once would fail again, without end.
    pub(super) async fn accept(&mut self) -> tokio::net::UnixStream {
        loop {
            if let Some(again_at) = self.again_at {
                tokio::time::sleep_until(again_at).await;
            }
            let error = match self.listener.accept().await {
                Ok((client, _)) => return client,
                Err(error) => error,
            };
            let now = tokio::time::Instant::now();
            self.again_at = Some(now + ACCEPT_PAUSE);
            if self.warned.is_none_or(|at| now >= at + WARNING_PACE) {
                self.warned = Some(now);
                warn!(%error, "a socket for commands takes nobody; trying again");
            }
        }
    }
}

/// Sends the status to a client that connected, and hangs up. It gives up a client that does not
/// read.
pub(super) fn send_status(mut stream: tokio::net::UnixStream, status: impl FnOnce() -> Status) {
    let text = match serde_json::to_vec(&status()) {
        Ok(text) => text,
        Err(error) => return warn!(%error, "cannot write the status"),
    };
    tokio::spawn(async move {
        let sent = tokio::time::timeout(READ_PATIENCE, stream.write_all(&text)).await;
        if !matches!(sent, Ok(Ok(()))) {
            debug!("a client of the status socket went away");
        }
    });
}
