//! Who comes to what has moved: from the gates to the thread that records it, once a second.
//!
//! Owns when that is done, and what an administrator is told of it. No packet waits for it.

use std::time::{Duration, Instant, SystemTime};

use super::warnings::Warnings;
use crate::flow::role::Forwarder;
use crate::settings::config::Config;
use crate::stragglers::writer::{Settings, Writer};

/// How often the gates are asked.
const EVERY: Duration = Duration::from_secs(1);

/// The recording of who comes.
#[derive(Debug)]
pub(super) struct Visitors {
    writer: Option<Writer>,
    /// Why there is no writer.
    failed: Option<String>,
    next: Instant,
    /// Everything is the new server's: clients that this one serves are not seen here.
    all: bool,
    /// Conversations that the gates had no place for.
    missed: u64,
}

impl Visitors {
    /// Starts to record who comes, if that is wanted, and the directory is not `refused`.
    pub(super) fn start(config: &Config, refused: Option<&str>, now: Instant) -> Option<Self> {
        let settings = Settings {
            dir: config.state_dir.clone(),
            keep: config.client_log?.keep,
        };
        let started = match refused {
            Some(why) => Err(why.to_owned()),
            None => Writer::start(settings).map_err(|error| error.to_string()),
        };
        let (writer, failed) = match started {
            Ok(writer) => (Some(writer), None),
            Err(error) => (None, Some(format!("clients are not recorded: {error}"))),
        };
        Some(Self {
            writer,
            failed,
            next: now + EVERY,
            all: true,
            missed: 0,
        })
    }

    /// When to look.
    pub(super) fn next(&self) -> Instant {
        self.next
    }

    /// Asks the gates. Call it when it is [time](Self::next). `all`: everything is the new
    /// server's, and gets there.
    pub(super) fn look(
        &mut self,
        now: Instant,
        all: bool,
        forwarder: &Forwarder,
        warnings: &mut Warnings,
    ) {
        self.next = now + EVERY;
        self.all = all;
        self.tell(now, forwarder, false);
        let trouble = self.writer.as_ref().and_then(Writer::trouble);
        for text in self.failed.iter().cloned().chain(trouble) {
            warnings.warn(now, text);
        }
        let Some(writer) = &self.writer else {
            return;
        };
        for text in writer.take_notes() {
            warnings.warn(now, text);
        }
        forwarder.know(&writer.take_known());
    }

    /// Conversations that were too many to look at or to record.
    pub(super) fn unrecorded(&self) -> u64 {
        self.missed + self.writer.as_ref().map_or(0, Writer::lost)
    }

    /// Tells what is left, for the thread to write.
    pub(super) fn end(&mut self, now: Instant, forwarder: &Forwarder) {
        self.tell(now, forwarder, true);
        if let Some(writer) = &mut self.writer {
            writer.end();
        }
    }

    /// Waits until it is written.
    pub(super) fn wait(&mut self) {
        if let Some(writer) = &mut self.writer {
            writer.end();
            writer.wait();
        }
    }

    fn tell(&mut self, now: Instant, forwarder: &Forwarder, last: bool) {
        let visited = forwarder.visited(now, last);
        self.missed += visited.missed;
        if let Some(writer) = &self.writer {
            writer.tell(visited, self.all, now, SystemTime::now());
        }
    }
}
