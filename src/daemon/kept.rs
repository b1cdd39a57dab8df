//! Descriptors that the service manager keeps while the daemon is away (systemd's file descriptor
//! store, `sd_pid_notify_with_fds(3)`): the memory of the kernel's programs. A daemon without
//! privileges could not find it again.
#![allow(
    unsafe_code,
    reason = "descriptors that a process is started with have no owner"
)]

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tracing::warn;

/// What the service manager shows as their name.
const NAME: &str = "ipmoved-memory";

/// Most descriptors that are kept or taken over.
const MOST: usize = 16;

/// How long a message may wait for a service manager that does not read. The daemon's start waits
/// with it, so that a manager that is only busy, as while the host starts, still gets it.
const PATIENCE: Duration = Duration::from_secs(1);

/// The descriptors that this process was started with. Call it once, before anything else is
/// opened.
pub(super) fn taken_over() -> Vec<OwnedFd> {
    let Ok(passed) = sd_notify::listen_fds() else {
        return Vec::new();
    };
    let own = |fd| {
        // SAFETY: the service manager has opened it for this process, and nobody else here knows
        // of it.
        unsafe { OwnedFd::from_raw_fd(fd) }
    };
    let passed: Vec<OwnedFd> = passed.take(MOST).map(own).collect();
    for fd in &passed {
        // Nothing is executed later; if it were, it should not have them.
        let _ = fcntl_setfd(fd, FdFlags::CLOEXEC);
    }
    passed
}

/// Gives copies of descriptors to the service manager, in place of earlier ones. Does nothing where
/// no service manager asked to be told; one that keeps none ignores it. One that does not read gets
/// nothing: the daemon starts all the same.
pub(super) fn keep(descriptors: &[BorrowedFd<'_>]) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let told = address(path.as_bytes()).and_then(|manager| {
        let socket = UnixDatagram::unbound()?;
        socket.connect_addr(&manager)?;
        socket.set_write_timeout(Some(PATIENCE))?;
        let forget = format!("FDSTOREREMOVE=1\nFDNAME={NAME}");
        send(&socket, &forget, &[])?;
        let keep = format!("FDSTORE=1\nFDPOLL=0\nFDNAME={NAME}");
        send(
            &socket,
            &keep,
            descriptors.get(..MOST).unwrap_or(descriptors),
        )
    });
    if let Err(error) = told {
        warn!(
            %error,
            "the service manager does not keep the memory of flows, should the daemon crash"
        );
    }
}

/// The address of a path, or of an abstract name, which begins with `@`.
fn address(path: &[u8]) -> io::Result<SocketAddr> {
    match path.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(path)),
    }
}

fn send(socket: &UnixDatagram, text: &str, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    let text = [IoSlice::new(text.as_bytes())];
    sendmsg(socket, &text, &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}
