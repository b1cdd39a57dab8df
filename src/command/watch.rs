//! `status --watch`: looks again and again, and says how fast things grow.
//!
//! On a terminal the screen is drawn anew; elsewhere each look is a block with a blank line behind
//! it, or a line of JSON. A daemon that goes is waited for, and one that is started anew is said.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use ratatui::crossterm::terminal;
use tokio::signal::unix::{SignalKind, signal};

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
    runtime.block_on(watch(every, json))
}

async fn watch(every: Duration, json: bool) -> Result<(), Failure> {
    let failed = |error| Failure::new(FAILED, error);
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut resized = signal(SignalKind::window_change()).map_err(failed)?;
    let mut looks = Looks::default();
    let mut screen = Screen::new(every, json);
    loop {
        let shown = match orders::status() {
            Ok(status) => screen.show(&looks.take(Instant::now(), show::prepared(status))),
            // Without a first look it is the same as `status`. Later it may be that the daemon ends
            // in the middle of an answer.
            Err(error) if looks.is_first() => return Err(error),
            Err(error) => screen.show(&looks.gone(error.message)),
        };
        match shown {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            Err(error) => return Err(failed(error)),
        }
        tokio::select! {
            () = tokio::time::sleep(every) => {}
            _ = resized.recv() => {}
            _ = interrupt.recv() => return Ok(()),
            _ = terminate.recv() => return Ok(()),
        }
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
    fn what_does_not_fit_the_screen_is_counted() {
        let text = "1\n2\n3 and more\n4\n";
        assert_eq!(fitting(text, (80, 24), "end").last().unwrap(), "end");
        let lines = fitting(text, (5, 5), "end");
        assert_eq!(lines, ["1", "2", "3 and", " more", "1 mor"]);
        assert_eq!(fitting("", (80, 24), "end"), ["end"]);
        assert_eq!(fitting("1\n2\n", (0, 0), "end").len(), 2);
    }
}
