//! Where log lines go: to standard error.
//!
//! At first whoever logs writes the line itself, so that what goes wrong at the start is told
//! before the process ends. Once packets are carried, a thread of its own writes them: standard
//! error may be a pipe that nobody reads, and neither the control task nor a lane may wait for
//! that. Lines that find the queue full are lost, and counted.

mod journal;

use std::io::{self, IsTerminal, Write};
use std::sync::OnceLock;

use tracing_appender::non_blocking::{NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use self::journal::{Entries, Journal};

use crate::settings::args::LogFormat;

/// Variable that chooses what is logged, in the syntax of `tracing_subscriber::EnvFilter`.
const VARIABLE: &str = "IPMOVED_LOG";

/// Lines that may wait to be written: what a daemon says in some hours, and less than a megabyte.
const WAITING: usize = 4_096;

/// The journal, if the log goes there.
static JOURNAL: OnceLock<Journal> = OnceLock::new();

/// The queue, once there is one.
static QUEUE: OnceLock<NonBlocking> = OnceLock::new();

/// Starts to log: to the journal with fields and priorities, if it is at the other end and lines
/// for people are wanted; otherwise to standard error.
pub fn start(format: LogFormat) {
    let filter = EnvFilter::try_from_env(VARIABLE).unwrap_or_else(|_| EnvFilter::new("info"));
    if format == LogFormat::Text
        && journal::is_there()
        && let Ok(journal) = Journal::connect()
    {
        let _ = JOURNAL.set(journal);
        let entries = Entries(|entry: &[u8]| {
            // What cannot be said is lost; the queue counts it.
            let _ = Line::to_journal().write_all(entry);
        });
        return tracing_subscriber::registry()
            .with(filter)
            .with(entries)
            .init();
    }
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
    let builder = NonBlockingBuilder::default()
        .buffered_lines_limit(WAITING)
        .lossy(true)
        .thread_name("log");
    let (queue, guard) = match JOURNAL.get().map(Journal::try_clone) {
        Some(Ok(journal)) => builder.finish(journal),
        Some(Err(_)) | None => builder.finish(io::stderr()),
    };
    let _ = QUEUE.set(queue);
    // A thread that crashes must not wait either: the daemon could not end because of it.
    std::panic::set_hook(Box::new(
        |crash| tracing::error!(%crash, "a thread crashed"),
    ));
    guard
}

/// Lines that were lost because the queue was full.
pub(super) fn lost() -> u64 {
    let lost = |queue: &NonBlocking| queue.error_counter().dropped_lines() as u64;
    QUEUE.get().map_or(0, lost)
}

/// Makes the writers of lines.
struct Sink;

/// Writes one line, or one entry of the journal.
enum Line {
    Direct(io::Stderr),
    Entry(&'static Journal),
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

impl Line {
    /// The writer of an entry of the journal.
    fn to_journal() -> Self {
        match (QUEUE.get(), JOURNAL.get()) {
            (Some(queue), _) => Self::Queued(queue.clone()),
            (None, Some(journal)) => Self::Entry(journal),
            (None, None) => Self::Direct(io::stderr()),
        }
    }
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Direct(stderr) => stderr.write(bytes),
            Self::Entry(journal) => journal.send(bytes),
            Self::Queued(queue) => queue.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Direct(stderr) => stderr.flush(),
            Self::Entry(_) => Ok(()),
            Self::Queued(queue) => queue.flush(),
        }
    }
}
