//! Descriptors that the service manager keeps while the daemon is away (systemd's file descriptor
//! store, `sd_pid_notify_with_fds(3)`): always the memory of the kernel's programs, which a daemon
//! without privileges could not find again; and over a restart all that the next daemon
//! [goes on with](super::handover).
//!
//! The manager keeps them over a crash, and over a restart, but not if the service is stopped, on
//! every version of systemd that has a store: `FileDescriptorStorePreserve=restart`, which newer
//! ones know, is what all did before.
#![allow(
    unsafe_code,
    reason = "descriptors that a process is started with have no owner"
)]

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixStream};
use std::time::Duration;

use rustix::io::{FdFlags, fcntl_setfd};
use tracing::warn;

use super::descriptors;
use crate::settings::values::MAX_LANES;

/// What the service manager shows as their names: the memory of the programs,
const MEMORY: &str = "ipmoved-memory";
/// the queue of each lane,
const QUEUE: &str = "ipmoved-queue";
/// its socket, with its number behind,
const SOCKET: &str = "ipmoved-socket";
/// and the state of the daemon that has ended.
const STATE: &str = "ipmoved-state";

/// Most descriptors of the programs' memory that are kept or taken over.
const MOST: usize = 16;

/// Most descriptors that are taken over. The unit asks for a place for each
/// (`FileDescriptorStoreMax=`).
const MOST_OF_ALL: usize = MOST + 2 * MAX_LANES as usize + 1;

/// How long a message may wait for a service manager that does not read. The daemon's start waits
/// with it, so that a manager that is only busy, as while the host starts, still gets it.
const PATIENCE: Duration = Duration::from_secs(1);

/// How long the manager may take to store what a daemon leaves that ends, and to forget it.
const STORED: Duration = Duration::from_secs(5);

/// What the service manager has kept.
#[derive(Debug, Default)]
pub(super) struct Kept {
    /// The memory of the programs.
    pub(super) memory: Vec<OwnedFd>,
    /// The queues of the TUN.
    pub(super) queues: Vec<OwnedFd>,
    /// The sockets, in the order of the lanes.
    pub(super) sockets: Vec<OwnedFd>,
    /// What the daemon knew.
    pub(super) state: Option<OwnedFd>,
}

impl Kept {
    /// Whether an earlier daemon has left something to go on with, be it all of it or not.
    pub(super) fn is_left(&self) -> bool {
        self.state.is_some() || !self.queues.is_empty() || !self.sockets.is_empty()
    }

    /// The descriptors that this process was started with. Call it once, before anything else is
    /// opened.
    pub(super) fn taken_over() -> Self {
        let mut kept = Self::default();
        let Ok(passed) = sd_notify::listen_fds_with_names() else {
            return kept;
        };
        let mut sockets: Vec<(Option<usize>, OwnedFd)> = Vec::new();
        for (fd, name) in passed.take(MOST_OF_ALL) {
            // SAFETY: the service manager has opened it for this process, and nobody else here
            // knows of it.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            // Nothing is executed later; if it were, it should not have them.
            let _ = fcntl_setfd(&fd, FdFlags::CLOEXEC);
            match name.as_str() {
                QUEUE => kept.queues.push(fd),
                STATE => kept.state = Some(fd),
                name if name.starts_with(SOCKET) => {
                    let number = name.rsplit('-').next().and_then(|it| it.parse().ok());
                    sockets.push((number, fd));
                }
                _ if kept.memory.len() < MOST => kept.memory.push(fd),
                _ => {}
            }
        }
        sockets.sort_by_key(|&(number, _)| number);
        kept.sockets = sockets.into_iter().map(|(_, fd)| fd).collect();
        kept
    }
}

/// Whether a service manager has started this daemon and wants to be told.
pub(super) fn has_manager() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some()
}

/// Gives copies of descriptors to the service manager, in place of earlier ones. Does nothing where
/// no service manager asked to be told; one that keeps none ignores it. One that does not read gets
/// nothing: the daemon starts all the same.
pub(super) fn keep(descriptors: &[BorrowedFd<'_>]) {
    let told = manager().and_then(|manager| {
        let Some(socket) = manager else {
            return Ok(());
        };
        remove(&socket, MEMORY)?;
        let some = descriptors.get(..MOST).unwrap_or(descriptors);
        store(&socket, MEMORY, some)
    });
    if let Err(error) = told {
        warn!(
            %error,
            "the service manager does not keep the memory of flows, should the daemon crash"
        );
    }
}

/// Gives all that the next daemon goes on with to the service manager, and waits until it has it.
///
/// # Errors
/// If the manager does not take it; it may have some of it then.
pub(super) fn leave(
    queues: &[BorrowedFd<'_>],
    sockets: &[BorrowedFd<'_>],
    state: BorrowedFd<'_>,
) -> io::Result<()> {
    let socket = manager()?.ok_or_else(|| io::Error::other("there is no service manager"))?;
    // First what tells the next one that there was something: a store that is full keeps no more.
    store(&socket, STATE, &[state])?;
    // One a message: older managers drop those of a message of which the store is full.
    for queue in queues {
        store(&socket, QUEUE, &[*queue])?;
    }
    for (number, udp) in sockets.iter().enumerate() {
        store(&socket, &format!("{SOCKET}-{number}"), &[*udp])?;
    }
    wait_for(&socket)
}

/// Lets the service manager forget what it was [left](leave), and waits until it has: a queue that
/// it holds keeps the TUN there, which the next one could not make.
pub(super) fn forget() {
    let told = manager().and_then(|manager| {
        let Some(socket) = manager else {
            return Ok(());
        };
        remove(&socket, STATE)?;
        remove(&socket, QUEUE)?;
        (0..MAX_LANES).try_for_each(|number| remove(&socket, &format!("{SOCKET}-{number}")))?;
        wait_for(&socket)
    });
    if let Err(error) = told {
        warn!(%error, "the service manager keeps what is not needed any more");
    }
}

/// The socket of the service manager, if one asked to be told.
fn manager() -> io::Result<Option<UnixDatagram>> {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return Ok(None);
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address(path.as_bytes())?)?;
    socket.set_write_timeout(Some(PATIENCE))?;
    Ok(Some(socket))
}

/// The address of a path, or of an abstract name, which begins with `@`.
fn address(path: &[u8]) -> io::Result<SocketAddr> {
    match path.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(path)),
    }
}

fn remove(socket: &UnixDatagram, name: &str) -> io::Result<()> {
    send(socket, &format!("FDSTOREREMOVE=1\nFDNAME={name}"), &[])
}

fn store(socket: &UnixDatagram, name: &str, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    // Without the third line a manager looks whether they have hung up, and drops them then.
    let text = format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}");
    send(socket, &text, descriptors)
}

/// Waits until the manager has read all that was sent before (`sd_notify_barrier(3)`): then it
/// closes the descriptor that comes with this.
fn wait_for(socket: &UnixDatagram) -> io::Result<()> {
    let (mut here, there) = UnixStream::pair()?;
    send(socket, "BARRIER=1", &[there.as_fd()])?;
    drop(there);
    here.set_read_timeout(Some(STORED))?;
    here.read(&mut [0]).map(drop)
}

fn send(socket: &UnixDatagram, text: &str, given: &[BorrowedFd<'_>]) -> io::Result<()> {
    descriptors::send(socket, text.as_bytes(), given).map(drop)
}
