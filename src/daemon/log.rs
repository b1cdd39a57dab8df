//! Where log lines go: to standard error.
//!
//! At first whoever logs writes the line itself, so that what goes wrong at the start is told
//! before the process ends. Once packets are carried, a thread of its own writes them: standard
//! error may be a pipe that nobody reads, and neither the control task nor a lane may wait for
//! that. Lines that find the queue full are lost, and counted.

use std::io::{self, IsTerminal, Write};
use std::sync::OnceLock;

use tracing_appender::non_blocking::{NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::settings::args::LogFormat;

/// Variable that chooses what is logged, in the syntax of `tracing_subscriber::EnvFilter`.
const VARIABLE: &str = "IPMOVED_LOG";

/// Lines that may wait to be written: what a daemon says in some hours, and less than a megabyte.
const WAITING: usize = 4_096;

/// The queue, once there is one.
static QUEUE: OnceLock<NonBlocking> = OnceLock::new();

/// Starts to log.
pub fn start(format: LogFormat) {
    let filter = EnvFilter::try_from_env(VARIABLE).unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_writer(Sink);
    match format {
        LogFormat::Text => log.with_ansi(io::stderr().is_terminal()).init(),
        LogFormat::Json => log.json().flatten_event(true).init(),
    }
}

/// Leaves the writing to a thread from now on. What waits is written when the returned value is
/// dropped, if that takes no more than a second.
///
/// Call it after privileges were given up, since the thread keeps those that there are.
pub(super) fn queue() -> WorkerGuard {
    let (queue, guard) = NonBlockingBuilder::default()
        .buffered_lines_limit(WAITING)
        .lossy(true)
        .thread_name("log")
        .finish(io::stderr());
    let _ = QUEUE.set(queue);
    // A thread that crashes must not wait either: the daemon could not end because of it.
    std::panic::set_hook(Box::new(|crash| tracing::error!("{crash}")));
    guard
}

/// Lines that were lost because the queue was full.
pub(super) fn lost() -> u64 {
    let lost = |queue: &NonBlocking| queue.error_counter().dropped_lines() as u64;
    QUEUE.get().map_or(0, lost)
}

/// Makes the writers of lines.
struct Sink;

/// Writes one line.
enum Line {
    Direct(io::Stderr),
    Queued(NonBlocking),
}

impl<'a> MakeWriter<'a> for Sink {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        match QUEUE.get() {
            Some(queue) => Line::Queued(queue.clone()),
            None => Line::Direct(io::stderr()),
        }
    }
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Direct(stderr) => stderr.write(bytes),
            Self::Queued(queue) => queue.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Direct(stderr) => stderr.flush(),
            Self::Queued(queue) => queue.flush(),
        }
    }
}
