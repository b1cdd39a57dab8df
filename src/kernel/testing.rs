//! A throwaway network namespace for this room's tests.

use std::fmt::Debug;

use rustix::thread::UnshareFlags;

/// Runs `test` on a thread of its own in a fresh network namespace, which vanishes with it.
///
/// # Panics
/// If `test` does, or without the privileges to make a namespace.
#[allow(unsafe_code, reason = "unshare(2)")]
pub(crate) fn in_fresh_namespace<T: Send + Debug + 'static>(
    test: impl FnOnce() -> T + Send + 'static,
) -> T {
    let thread = std::thread::spawn(move || {
        // SAFETY: CLONE_NEWNET concerns only this thread, which shares no descriptor table
        // invariants with anybody: no descriptor is unshared.
        let unshared = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) };
        if let Err(error) = unshared {
            panic!("cannot make a network namespace: {error}; run the tests as root");
        }
        test()
    });
    match thread.join() {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}
