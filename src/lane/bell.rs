//! Event descriptors by which one thread wakes another.

use std::os::fd::OwnedFd;

/// Makes an event descriptor readable.
pub(super) fn ring(fd: &OwnedFd) {
    // It cannot fail: the counter is far from its end, and its own descriptor is open.
    let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
}

/// Makes an event descriptor unreadable.
pub(super) fn clear(fd: &OwnedFd) {
    // It fails only if the descriptor is unreadable already.
    let _ = rustix::io::read(fd, &mut [0; 8]);
}
