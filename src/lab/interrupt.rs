//! SIGINT and SIGTERM for commands that must take down what they set up: a long command ends
//! between two of its steps.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;

/// For the whole process, as signals are.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Exit code of a command that a second signal ends at once: 128 plus the number of SIGINT.
const EXIT_AT_ONCE: i32 = 130;

/// From now on catches SIGINT and SIGTERM. A second one ends the process at once.
pub fn watch() {
    thread::spawn(|| -> io::Result<()> {
        use tokio::signal::unix::{SignalKind, signal};
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()?;
        runtime.block_on(async {
            let mut int = signal(SignalKind::interrupt())?;
            let mut term = signal(SignalKind::terminate())?;
            loop {
                tokio::select! {
                    _ = int.recv() => {}
                    _ = term.recv() => {}
                }
                if INTERRUPTED.swap(true, Relaxed) {
                    std::process::exit(EXIT_AT_ONCE);
                }
            }
        })
    });
}

/// Whether a signal came.
pub fn came() -> bool {
    INTERRUPTED.load(Relaxed)
}
