//! The log in the journal's own protocol, so that it keeps fields and priorities: `journalctl -u
//! ipmoved IPMOVED_PEER=192.0.2.1:51850 -p warning`.
//!
//! Owns when it is used and what an entry is made of. `tracing-journald` sends each entry from the
//! thread that has something to say, and waits while the journal is full: a lane would. So an entry
//! is one buffer here, which goes into the queue that all lines go into, and is sent as one
//! datagram (systemd's `docs/JOURNAL_NATIVE_PROTOCOL.md`).

use std::fmt::{self, Write as _};
use std::io::{self, Write};
use std::os::unix::net::UnixDatagram;
use std::path::Path;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

/// Where the journal listens.
const SOCKET: &str = "/run/systemd/journal/socket";

/// Names the pipe to the journal that a service's standard error is, as `DEVICE:INODE`
/// (systemd.exec(5)).
const VARIABLE: &str = "JOURNAL_STREAM";

/// Longest value of a field: an entry is one datagram, which the kernel takes up to 200 KiB.
const MAX_VALUE: usize = 16_384;

/// Most fields of an entry beside its message: no event of ours has half as many.
const MAX_FIELDS: usize = 32;

/// Whether standard error goes to the journal.
pub(super) fn is_there() -> bool {
    let Ok(named) = std::env::var(VARIABLE) else {
        return false;
    };
    let own = rustix::fs::fstat(io::stderr());
    own.is_ok_and(|own| format!("{}:{}", own.st_dev, own.st_ino) == named)
}

/// The journal.
#[derive(Debug)]
pub(super) struct Journal(UnixDatagram);

impl Journal {
    /// Connects to it.
    pub(super) fn connect() -> io::Result<Self> {
        Self::connect_to(Path::new(SOCKET))
    }

    fn connect_to(socket: &Path) -> io::Result<Self> {
        let own = UnixDatagram::unbound()?;
        own.connect(socket)?;
        Ok(Self(own))
    }

    /// Sends an entry.
    pub(super) fn send(&self, entry: &[u8]) -> io::Result<usize> {
        self.0.send(entry)
    }

    /// A second handle, for another thread.
    pub(super) fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }
}

/// Each write is an entry.
impl Write for Journal {
    fn write(&mut self, entry: &[u8]) -> io::Result<usize> {
        self.send(entry)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Makes an entry of each event, and hands it on.
pub(super) struct Entries<F>(pub(super) F);

impl<S: Subscriber, F: Fn(&[u8]) + 'static> Layer<S> for Entries<F> {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut said = Said::default();
        event.record(&mut said);
        self.0(&said.into_entry(*event.metadata().level()));
    }
}

/// What an event says.
#[derive(Default)]
struct Said {
    message: String,
    fields: Vec<(String, String)>,
}

impl Said {
    fn into_entry(mut self, level: Level) -> Vec<u8> {
        let priority = match level {
            Level::ERROR => "3",
            Level::WARN => "4",
            Level::INFO => "6",
            _ => "7",
        };
        // What `journalctl` shows unless told otherwise: it reads as on a terminal.
        for (name, value) in &self.fields {
            // Writing to a String cannot fail.
            let _ = write!(self.message, " {}={value}", name.to_lowercase());
        }
        let mut entry = Vec::new();
        put(&mut entry, "PRIORITY", priority);
        put(&mut entry, "SYSLOG_IDENTIFIER", "ipmoved");
        put(&mut entry, "MESSAGE", &self.message);
        for (name, value) in &self.fields {
            put(&mut entry, &format!("IPMOVED_{name}"), value);
        }
        entry
    }

    fn add(&mut self, field: &Field, value: String) {
        if field.name() == "message" {
            self.message = value;
        } else if self.fields.len() < MAX_FIELDS {
            self.fields.push((field.name().to_uppercase(), value));
        }
    }
}

impl Visit for Said {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.add(field, format!("{value:?}"));
    }
}

/// Adds a field. A value with line ends has its length before it.
fn put(entry: &mut Vec<u8>, name: &str, value: &str) {
    let mut end = value.len().min(MAX_VALUE);
    while !value.is_char_boundary(end) {
        end -= 1;
    }
    let value = &value.as_bytes()[..end];
    entry.extend_from_slice(name.as_bytes());
    if value.contains(&b'\n') {
        entry.push(b'\n');
        entry.extend_from_slice(&(value.len() as u64).to_le_bytes());
    } else {
        entry.push(b'=');
    }
    entry.extend_from_slice(value);
    entry.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};
    use tracing_subscriber::layer::SubscriberExt as _;

    #[test]
    fn an_entry_has_priority_message_and_fields() {
        let entries = Arc::new(Mutex::new(Vec::new()));
        let all = Arc::clone(&entries);
        let layer = Entries(move |entry: &[u8]| all.lock().unwrap().push(entry.to_vec()));
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            tracing::warn!(peer = "192.0.2.1:51850", lines = 3, "more lines");
            tracing::error!(crash = %"one\ntwo", "a thread crashed");
        });
        let entries = entries.lock().unwrap();
        assert_eq!(
            String::from_utf8_lossy(&entries[0]),
            "PRIORITY=4\nSYSLOG_IDENTIFIER=ipmoved\n\
             MESSAGE=more lines peer=192.0.2.1:51850 lines=3\n\
             IPMOVED_PEER=192.0.2.1:51850\nIPMOVED_LINES=3\n"
        );
        let crash = b"IPMOVED_CRASH\n\x07\0\0\0\0\0\0\0one\ntwo\n";
        assert!(entries[1].starts_with(b"PRIORITY=3\n") && entries[1].ends_with(crash));
    }

    #[test]
    fn an_entry_is_one_datagram() {
        let dir = std::env::temp_dir().join(format!("ipmoved-journal-{}", std::process::id()));
        let _ = std::fs::remove_file(&dir);
        let journal = UnixDatagram::bind(&dir).unwrap();
        let mut own = Journal::connect_to(&dir).unwrap();
        let mut entry = Vec::new();
        put(&mut entry, "MESSAGE", &"ä".repeat(MAX_VALUE));
        own.write_all(&entry).unwrap();
        let mut got = vec![0; 2 * MAX_VALUE];
        let len = journal.recv(&mut got).unwrap();
        std::fs::remove_file(&dir).unwrap();
        assert_eq!(got[..len], entry);
        assert_eq!(len, "MESSAGE=\n".len() + MAX_VALUE);
    }
}
