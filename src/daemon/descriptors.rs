//! Descriptors that go from one process to another, beside bytes (`unix(7)`, `SCM_RIGHTS`): to and
//! from the helper process, another daemon, and a service manager.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Most descriptors that one message carries (`SCM_MAX_FD`, include/net/scm.h). 64 lanes have 128.
pub(super) const MOST: usize = 253;

/// Sends bytes, and [`MOST`] descriptors with them at the most. Returns how many bytes went.
///
/// # Errors
/// If the socket refuses, or there are too many descriptors.
pub(super) fn send(
    socket: impl AsFd,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("too many descriptors"));
    }
    let parts = [IoSlice::new(bytes)];
    let sent = sendmsg(socket, &parts, &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(sent)
}

/// Receives bytes, and appends the descriptors that come with them. Returns how many bytes came.
///
/// # Errors
/// If the socket refuses.
pub(super) fn receive(
    socket: impl AsFd,
    bytes: &mut [u8],
    given: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(bytes)];
    let received = recvmsg(socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            given.extend(descriptors);
        }
    }
    Ok(received.bytes)
}
