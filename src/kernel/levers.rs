//! Whether this kernel can do what the daemon needs: it is tried out in a network namespace that
//! vanishes with the try.
//!
//! Owns that nothing of this server is changed by it.

#![allow(unsafe_code, reason = "unshare() is unsafe to call")]

use std::io;
use std::os::fd::AsFd;

use rustix::thread::UnshareFlags;

use super::Desired;
use super::change::Means;
use super::netlink::Netlink;

/// Does `work` in a network namespace of its own, with nothing in it but a `lo` that is down.
///
/// # Errors
/// Without `CAP_SYS_ADMIN`.
pub fn apart<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let apart = scope.spawn(|| {
            // SAFETY: only CLONE_FILES would be unsound; CLONE_NEWNET concerns the network
            // namespace of this thread alone, which ends with it.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
            Ok(work())
        });
        let crashed = |_| Err(io::Error::other("the try crashed"));
        apart.join().unwrap_or_else(crashed)
    })
}

/// Makes changes where they vanish; the first that fails, with why.
///
/// # Errors
/// What cannot be made, and what to do about it.
pub fn try_out(netlink: &Netlink, desired: &[Desired]) -> Result<(), (String, String)> {
    for Desired {
        change, program, ..
    } in desired
    {
        let with = Means {
            netlink,
            program: program.as_ref().map(AsFd::as_fd),
        };
        match change.make(&with) {
            Err(error) if !error.is_exists() => {
                return Err((change.to_string(), change.remedy(&error)));
            }
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

/// The kernel's version, as `uname -r` prints it.
pub fn release() -> io::Result<String> {
    let text = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    Ok(text.trim_end().to_owned())
}
