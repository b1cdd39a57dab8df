//! `status --watch`: looks again and again, and says how fast things grow.
//!
//! On a terminal the screen is drawn anew; elsewhere each look is a block with a blank line behind
//! it, or a line of JSON. A daemon that goes is waited for, and one that is started anew is said.
//! Whatever waits, for the daemon or for who reads, does so on another thread: ^C is heard at once.

use std::io::{self, IsTerminal, Write};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use ratatui::crossterm::terminal;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{FAILED, Failure, orders, show};
use crate::model::rates::{Rates, is_another};
use crate::model::status::Status;

/// Time between two looks, unless told otherwise.
const EVERY: u32 = 2;

/// A terminal whose size nobody can tell (RFC 1184's lines are as old as that).
const USUAL_SIZE: (u16, u16) = (80, 24);

/// To the first line, and away with everything.
const CLEAR: &str = "\x1b[H\x1b[2J";
/// To the first line.
const HOME: &str = "\x1b[H";
/// Away with the rest of this line.
const TO_LINE_END: &str = "\x1b[K";
/// Away with everything below.
const TO_SCREEN_END: &str = "\x1b[J";

/// Looks until a signal comes, or nobody reads any more.
pub(super) fn run(seconds: Option<u32>, json: bool) -> Result<(), Failure> {
    let every = Duration::from_secs(seconds.unwrap_or(EVERY).into());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.map_err(|error| Failure::new(FAILED, error))?;
    let watched = runtime.block_on(watch(every, json));
    // A thread that still waits for the daemon, or for who reads, ends with the process.
    runtime.shutdown_background();
    watched
}

async fn watch(every: Duration, json: bool) -> Result<(), Failure> {
    let failed = |error| Failure::new(FAILED, error);
    let mut ends = Ends {
        interrupt: signal(SignalKind::interrupt()).map_err(failed)?,
        terminate: signal(SignalKind::terminate()).map_err(failed)?,
    };
    let mut resized = signal(SignalKind::window_change()).map_err(failed)?;
    let mut turn = Turn {
        looks: Looks::default(),
        screen: Screen::new(every, json),
    };
    loop {
        let Some((next, shown)) = unless(ends.came(), move || turn.take()).await? else {
            return Ok(());
        };
        turn = next;
        if shown?.is_break() {
            return Ok(());
        }
        tokio::select! {
            () = tokio::time::sleep(every) => {}
            _ = resized.recv() => {}
            () = ends.came() => return Ok(()),
        }
    }
}

/// What ends it.
struct Ends {
    interrupt: Signal,
    terminate: Signal,
}

impl Ends {
    async fn came(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// Does something that may wait, for a daemon that hangs or a reader that does not read, and gives
/// it up once the end has come.
async fn unless<T: Send + 'static>(
    end: impl Future<Output = ()>,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<Option<T>, Failure> {
    tokio::select! {
        biased;
        () = end => Ok(None),
        done = tokio::task::spawn_blocking(work) => match done {
            Ok(done) => Ok(Some(done)),
            Err(error) => Err(Failure::new(FAILED, error)),
        },
    }
}

/// One look after the other.
struct Turn {
    looks: Looks,
    screen: Screen,
}

impl Turn {
    /// Looks and shows it; it breaks off where nobody reads any more.
    fn take(mut self) -> (Self, Result<ControlFlow<()>, Failure>) {
        let shown = match orders::status() {
            Ok(status) => {
                let look = self.looks.take(Instant::now(), show::prepared(status));
                self.screen.show(&look)
            }
            // Without a first look it is the same as `status`. Later it may be that the daemon ends
            // in the middle of an answer.
            Err(error) if self.looks.is_first() => return (self, Err(error)),
            Err(error) => {
                let look = self.looks.gone(error.message);
                self.screen.show(&look)
            }
        };
        let shown = match shown {
            Ok(()) => Ok(ControlFlow::Continue(())),
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(ControlFlow::Break(())),
            Err(error) => Err(Failure::new(FAILED, error)),
        };
        (self, shown)
    }
}

/// What was seen at the last look.
#[derive(Default)]
pub(super) struct Looks {
    last: Option<(Instant, Status)>,
    is_gone: bool,
}

/// What is to be shown of a look.
pub(super) enum Look {
    /// The daemon runs.
    Runs {
        /// What it says.
        status: Box<Status>,
        /// How fast it grows, if there was a look before.
        rates: Option<Rates>,
        /// What has become of the daemon since the last look.
        news: Option<String>,
    },
    /// It does not.
    Gone {
        /// How that shows.
        why: String,
        /// It did not at the last look either.
        as_before: bool,
    },
}

impl Looks {
    /// Whether there was none yet.
    fn is_first(&self) -> bool {
        self.last.is_none()
    }

    /// Takes a look.
    pub(super) fn take(&mut self, now: Instant, status: Status) -> Look {
        let before = self.last.as_ref();
        let rates = before.and_then(|(then, before)| {
            Rates::between(before, &status, now.saturating_duration_since(*then))
        });
        let anew = before.filter(|(_, before)| is_another(before, &status));
        let news = anew.map(|(_, before)| {
            let (old, new) = (before.pid, status.pid);
            format!("ipmoved was started anew (process {old}, now {new}): it counts from zero")
        });
        self.last = Some((now, status.clone()));
        self.is_gone = false;
        Look::Runs {
            status: Box::new(status),
            rates,
            news,
        }
    }

    /// Nobody answered.
    pub(super) fn gone(&mut self, why: String) -> Look {
        let as_before = std::mem::replace(&mut self.is_gone, true);
        Look::Gone { why, as_before }
    }
}

/// Where looks are shown.
struct Screen {
    is_terminal: bool,
    json: bool,
    every: Duration,
    is_new: bool,
}

impl Screen {
    fn new(every: Duration, json: bool) -> Self {
        Self {
            is_terminal: io::stdout().is_terminal(),
            json,
            every,
            is_new: true,
        }
    }

    fn show(&mut self, look: &Look) -> io::Result<()> {
        let mut out = io::stdout().lock();
        let text = match look {
            Look::Runs { status, .. } if self.json => {
                serde_json::to_writer(&mut out, &show::as_json(status))?;
                return writeln!(out).and_then(|()| out.flush());
            }
            // A reader of JSON sees it by the silence.
            Look::Gone { .. } if self.json => return Ok(()),
            Look::Gone {
                as_before: true, ..
            } if !self.is_terminal => return Ok(()),
            Look::Runs {
                status,
                rates,
                news,
            } => {
                let news = news
                    .as_ref()
                    .map_or_else(String::new, |it| format!("{it}\n"));
                news + &status.to_text_with(rates.as_ref())
            }
            Look::Gone { why, .. } => format!("{why}; waiting for it\n"),
        };
        if self.is_terminal {
            let size = terminal::size().unwrap_or(USUAL_SIZE);
            let start = if std::mem::take(&mut self.is_new) {
                CLEAR
            } else {
                HOME
            };
            let end = format!("every {} s, ^C ends it", self.every.as_secs());
            let lines = fitting(&text, size, &end);
            write!(out, "{start}")?;
            // The last one has no line end, which would move the first out of sight.
            let lines: Vec<String> = lines
                .iter()
                .map(|it| format!("{it}{TO_LINE_END}"))
                .collect();
            write!(out, "{}{TO_SCREEN_END}", lines.join("\r\n"))?;
        } else {
            if !std::mem::take(&mut self.is_new) {
                writeln!(out)?;
            }
            write!(out, "{text}")?;
        }
        out.flush()
    }
}

/// The lines that fit a screen of so many columns and rows, with `end` as the last one. A line that
/// is too long goes on in the next row.
fn fitting(text: &str, (columns, rows): (u16, u16), end: &str) -> Vec<String> {
    let (columns, rows) = (usize::from(columns).max(1), usize::from(rows).max(2));
    let mut lines = Vec::new();
    let mut all = text.lines().flat_map(|line| wrapped(line, columns));
    for line in all.by_ref().take(rows - 1) {
        lines.push(line);
    }
    let last = match all.count() {
        0 => end.to_owned(),
        more => format!("{more} more lines: `ipmoved status`; {end}"),
    };
    lines.push(last.chars().take(columns).collect());
    lines
}

/// A line in rows of so many columns.
fn wrapped(line: &str, columns: usize) -> Vec<String> {
    let all: Vec<char> = line.chars().collect();
    match all.as_slice() {
        [] => vec![String::new()],
        some => some
            .chunks(columns)
            .map(|row| row.iter().collect())
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_is_heard_while_a_look_waits() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        // A daemon that never answers.
        let (answer, waits) = std::sync::mpsc::channel::<()>();
        let ended = runtime.block_on(unless(async {}, move || waits.recv()));
        assert!(matches!(ended, Ok(None)));
        let never = std::future::pending();
        let done = runtime.block_on(unless(never, || 7));
        assert!(matches!(done, Ok(Some(7))));
        runtime.shutdown_background();
        drop(answer);
    }

    #[test]
    fn what_does_not_fit_the_screen_is_counted() {
        let text = "1\n2\n3 and more\n4\n";
        assert_eq!(fitting(text, (80, 24), "end").last().unwrap(), "end");
        let lines = fitting(text, (5, 5), "end");
        assert_eq!(lines, ["1", "2", "3 and", " more", "1 mor"]);
        assert_eq!(fitting("", (80, 24), "end"), ["end"]);
        assert_eq!(fitting("1\n2\n", (0, 0), "end").len(), 2);
    }
}
