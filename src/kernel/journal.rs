//! The journal of the daemon's changes to the kernel, written before each of them.
//!
//! Owns the journal file. A reader sees the old file or the new one, whole. It does not believe a
//! journal from before a reboot of the machine, or from a namespace that is gone. The journal
//! itself makes and undoes nothing: that is the business of [`Host`](super::Host). Only whoever
//! holds the lock of the [directory](super::runtime_dir) has a journal there.
//!
//! ```text
//! journal         version, boot id, namespace cookie, changes in the order they were made
//! journal.aside   the latest one that was not understood whole
//! ```
//!
//! Whoever takes a running daemon over can write here, and an administrator's `ipmoved cleanup` has
//! more privileges than that daemon. So what is read is believed no further than the daemon could
//! have gone ([`Change::check`]). Another version of the program may have written it, too. What is
//! not understood is skipped and told ([`Unread`]), and never keeps a daemon from starting:
//! otherwise the moved address would stay silent until somebody comes.
#![allow(
    unsafe_code,
    reason = "getsockopt(SO_NETNS_COOKIE) has no safe wrapper"
)]

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::change::Change;
use super::runtime_dir::{RuntimeDir, RuntimeDirError, private_file};

const JOURNAL: &str = "journal";
/// The journal while it is being written.
const JOURNAL_NEXT: &str = "journal.next";

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Where a journal is kept that was not understood whole.
const JOURNAL_ASIDE: &str = "journal.aside";

/// Version of the journal's format. Of any other version we read what is as in this one.
const VERSION: u32 = 1;

/// The longest journal that is read, in bytes. A change takes at most 300: this is room for more
/// than 200,000 of them, where 256 peers may announce 256 moves each.
const MAX_JOURNAL: u64 = 64 << 20;

/// Most notes about one journal. A journal of rubbish has a line for each entry, and one line says
/// how many more there were.
const MAX_NOTES: usize = 16;

/// Most characters of the journal's own text in one note.
const MAX_QUOTED: usize = 200;

/// Why the journal could not be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// A file could not be read or written.
    #[error(transparent)]
    File(#[from] RuntimeDirError),
}

/// The journal of one network namespace.
#[derive(Debug)]
pub(super) struct Journal {
    dir: PathBuf,
    identity: Identity,
    /// It is only read.
    rehearsed: bool,
}

/// Tells one network namespace from every other, even from earlier ones of the same inode.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
struct Identity {
    boot_id: String,
    /// `SO_NETNS_COOKIE`, where the kernel has it (5.14).
    netns_cookie: Option<u64>,
}

#[derive(Serialize)]
struct Contents {
    version: u32,
    #[serde(flatten)]
    identity: Identity,
    changes: Vec<Change>,
}

/// What a journal says beyond what this version of the program understands or believes.
#[derive(Default, PartialEq, Eq, Debug)]
pub struct Unread {
    /// What was met, a sentence each: at most 18.
    pub notes: Vec<String>,
    /// Something that was recorded may still be there, and nobody undoes it.
    pub is_incomplete: bool,
}

/// What a journal says, as far as it is understood and believed.
pub(crate) struct Recorded {
    identity: Identity,
    /// What can be undone, in the order in which it was made.
    pub(crate) changes: Vec<Change>,
    /// Entries that are none of `changes`.
    pub(crate) skipped: usize,
    /// What was met beyond that.
    pub(crate) notes: Notes,
}

/// At most [`MAX_NOTES`] sentences, and the number of those beyond.
#[derive(Default)]
pub(crate) struct Notes {
    lines: Vec<String>,
    more: usize,
}

impl Notes {
    fn add(&mut self, line: String) {
        if self.lines.len() < MAX_NOTES {
            self.lines.push(line);
        } else {
            self.more += 1;
        }
    }

    /// The sentences, and one more if there were too many.
    pub(crate) fn into_lines(mut self) -> Vec<String> {
        if self.more > 0 {
            self.lines
                .push(format!("the journal: {} more such notes", self.more));
        }
        self.lines
    }
}

/// Reads a journal of any version.
///
/// # Errors
/// Why it is no journal at all.
pub(crate) fn understand(bytes: &[u8]) -> Result<Recorded, String> {
    let mut contents: Value =
        serde_json::from_slice(bytes).map_err(|error| quoted(&error.to_string()))?;
    let contents = contents.as_object_mut().ok_or("it has no fields")?;
    let Some(Value::String(boot_id)) = contents.remove("boot_id") else {
        return Err("it has no boot id".into());
    };
    let Some(Value::Array(entries)) = contents.remove("changes") else {
        return Err("it has no list of changes".into());
    };
    let mut recorded = Recorded {
        identity: Identity {
            boot_id,
            netns_cookie: contents.remove("netns_cookie").and_then(|it| it.as_u64()),
        },
        changes: Vec::new(),
        skipped: 0,
        notes: Notes::default(),
    };
    let version = contents.remove("version").unwrap_or_default();
    if version.as_u64() != Some(VERSION.into()) {
        let version = quoted(&version.to_string());
        recorded.notes.add(format!(
            "the journal is of version {version}, and this ipmoved writes version {VERSION}: what \
             it understands of it is undone"
        ));
    }
    for field in contents.keys() {
        let field = quoted(field);
        recorded.notes.add(format!(
            "the journal: field `{field}` is unknown and ignored"
        ));
    }
    for (number, entry) in (1..).zip(entries) {
        recorded.understand_entry(number, entry);
    }
    Ok(recorded)
}

impl Recorded {
    fn understand_entry(&mut self, number: usize, entry: Value) {
        let mut unknown = Vec::new();
        let change = Change::deserialize(&entry).map_err(|error| quoted(&error.to_string()));
        let checked = change.and_then(|change| {
            change.check().map_err(|reason| quoted(&reason))?;
            let known = serde_json::to_value(&change).map_err(|error| error.to_string())?;
            unknown_fields(&entry, &known, &mut unknown);
            Ok(change)
        });
        match checked {
            Ok(change) => self.changes.push(change),
            Err(reason) => {
                self.skipped += 1;
                self.notes.add(format!(
                    "entry {number} of the journal is skipped: {reason}"
                ));
            }
        }
        for field in unknown {
            self.notes.add(format!(
                "entry {number} of the journal: field `{field}` is unknown and ignored"
            ));
        }
    }
}

/// The fields of `entry` that are not in `known`, which is what was understood of it.
fn unknown_fields(entry: &Value, known: &Value, unknown: &mut Vec<String>) {
    let (Value::Object(entry), Value::Object(known)) = (entry, known) else {
        return;
    };
    for (field, value) in entry {
        match known.get(field) {
            Some(known) => unknown_fields(value, known, unknown),
            None => unknown.push(quoted(field)),
        }
    }
}

/// Text of the journal's, fit for a log: of bounded length, and on one line.
fn quoted(text: &str) -> String {
    let printable = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    text.chars().take(MAX_QUOTED).map(printable).collect()
}

impl Journal {
    /// Reads what an earlier daemon left in the directory of the calling thread's network
    /// namespace.
    pub(super) fn open(dir: &RuntimeDir) -> Result<(Self, Vec<Change>, Unread), JournalError> {
        let journal = Self {
            dir: dir.path().to_owned(),
            identity: Identity::of_this_namespace()?,
            rehearsed: dir.is_rehearsed(),
        };
        let (changes, unread) = journal.read()?;
        Ok((journal, changes, unread))
    }

    /// Replaces the journal: a reader sees the old one or the new one, whole.
    pub(super) fn write(&self, changes: &[Change]) -> Result<(), JournalError> {
        if self.rehearsed {
            return Ok(());
        }
        let path = self.dir.join(JOURNAL);
        let next = self.dir.join(JOURNAL_NEXT);
        let contents = Contents {
            version: VERSION,
            identity: self.identity.clone(),
            changes: changes.to_vec(),
        };
        let write = || {
            // Whatever is there may lead elsewhere; a file of our own does not.
            match fs::remove_file(&next) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let mut file = private_file().create_new(true).open(&next)?;
            file.write_all(&serde_json::to_vec_pretty(&contents)?)?;
            // It needs no fsync: after a crash of the machine there is nothing left to undo.
            fs::rename(&next, &path)
        };
        write().map_err(|error| RuntimeDirError::file("write", &path, error).into())
    }

    /// Removes the journal: there is nothing to undo.
    pub(super) fn clear(&self) {
        if self.rehearsed {
            return;
        }
        for ours in [JOURNAL, JOURNAL_NEXT] {
            let _ = fs::remove_file(self.dir.join(ours));
        }
    }

    /// What it says now.
    pub(super) fn read(&self) -> Result<(Vec<Change>, Unread), JournalError> {
        let path = self.dir.join(JOURNAL);
        let read = match read_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok((Vec::new(), Unread::default()));
            }
            // A link, or a file with too much in it.
            Err(error) if is_no_file(&error) => Err(error.to_string()),
            Err(error) => return Err(RuntimeDirError::file("read", &path, error).into()),
            Ok(bytes) => understand(&bytes),
        };
        match read {
            Ok(recorded) => self.take(recorded),
            Err(_) if self.rehearsed => Ok((Vec::new(), Unread::default())),
            Err(reason) => {
                let aside = self.dir.join(JOURNAL_ASIDE);
                fs::rename(&path, &aside)
                    .map_err(|error| RuntimeDirError::file("move away", &path, error))?;
                let note = format!(
                    "{} was no journal ({reason}); it is kept as {JOURNAL_ASIDE}, and what an \
                     earlier ipmoved left in the kernel may still be there",
                    path.display()
                );
                let unread = Unread {
                    notes: vec![note],
                    is_incomplete: true,
                };
                Ok((Vec::new(), unread))
            }
        }
    }

    fn take(&self, recorded: Recorded) -> Result<(Vec<Change>, Unread), JournalError> {
        if !recorded.identity.may_be(&self.identity) {
            // It is from before a reboot, or from a namespace that is gone and whose inode is in
            // use again. In both cases the changes in it are gone as well.
            return Ok((Vec::new(), Unread::default()));
        }
        let mut notes = recorded.notes.into_lines();
        if recorded.skipped > 0 && !self.rehearsed {
            // The next one that is written is without these entries. It takes the place of this
            // name alone.
            let (path, aside) = (self.dir.join(JOURNAL), self.dir.join(JOURNAL_ASIDE));
            let _ = fs::remove_file(&aside);
            fs::hard_link(&path, &aside)
                .map_err(|error| RuntimeDirError::file("keep", &path, error))?;
            notes.push(format!(
                "{}: {} entries were skipped, and what they stand for may still be there; the \
                 journal is kept as {JOURNAL_ASIDE}",
                path.display(),
                recorded.skipped
            ));
        }
        let unread = Unread {
            is_incomplete: recorded.skipped > 0,
            notes,
        };
        Ok((recorded.changes, unread))
    }
}

/// Reads a plain file of bounded length. It neither follows a link nor waits for a pipe.
fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    let mut options = OpenOptions::new();
    options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let file = options.read(true).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "it is no plain file",
        ));
    }
    let mut bytes = Vec::new();
    file.take(MAX_JOURNAL + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_JOURNAL {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is too long"));
    }
    Ok(bytes)
}

/// Whether what is there is not what [`Journal::write`] writes. Opening a socket gives `ENXIO`.
fn is_no_file(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::InvalidData
        || matches!(error.raw_os_error(), Some(libc::ELOOP | libc::ENXIO))
}

impl Identity {
    fn of_this_namespace() -> Result<Self, JournalError> {
        let boot_id = fs::read_to_string(BOOT_ID)
            .map_err(|error| RuntimeDirError::file("read", Path::new(BOOT_ID), error))?;
        Ok(Self {
            boot_id: boot_id.trim().to_owned(),
            netns_cookie: netns_cookie(),
        })
    }

    /// Whether both are, as far as is known, the same namespace. A cookie is missing where the
    /// kernel has none, and where it could not be asked at that moment.
    fn may_be(&self, other: &Self) -> bool {
        let differ = |(one, another): (u64, u64)| one != another;
        self.boot_id == other.boot_id
            && !self
                .netns_cookie
                .zip(other.netns_cookie)
                .is_some_and(differ)
    }
}

/// The random id of the machine's boot; `None` if `/proc` is not there.
pub fn boot_id() -> Option<String> {
    let text = fs::read_to_string(BOOT_ID).ok()?;
    Some(text.trim().to_owned())
}

fn netns_cookie() -> Option<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    // Any socket will do; port 0 of the unspecified address is always free.
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `cookie`, which has that size.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    (result == 0).then_some(cookie)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::change::Sysctl;
    use crate::kernel::testing::Scratch;

    fn sysctl() -> Change {
        Change::Sysctl(Sysctl {
            path: "net/ipv4/conf/eth0.5/src_valid_mark".into(),
            from: "0".into(),
            to: "1".into(),
            on: None,
        })
    }

    #[test]
    fn the_next_daemon_reads_what_one_has_written() {
        let scratch = Scratch::new();
        let dir = RuntimeDir::open(&scratch.0).unwrap();
        let (journal, changes, _) = Journal::open(&dir).unwrap();
        assert_eq!(changes, []);
        journal.write(&[sysctl()]).unwrap();
        let (journal, changes, unread) = Journal::open(&dir).unwrap();
        assert_eq!(changes, [sysctl()]);
        assert_eq!(unread, Unread::default());
        journal.clear();
        assert_eq!(Journal::open(&dir).unwrap().1, []);
        dir.remove();
        drop(dir);
        assert!(!scratch.0.exists());
    }

    /// A journal as version 1 has always written it, whatever the names of the types are today.
    const VERSION_1: &str = r#"{
  "version": 1,
  "boot_id": "BOOT",
  "netns_cookie": 7,
  "changes": [
    {
      "change": "clsact",
      "on": {
        "index": 2,
        "name": "eth0"
      }
    },
    {
      "change": "filter",
      "on": {
        "index": 2,
        "name": "eth0"
      },
      "direction": "ingress",
      "priority": 40,
      "handle": 1,
      "program": "ipmoved_capture"
    },
    {
      "change": "rule",
      "family": "V4",
      "mark": 1768975734,
      "table": 1768975734,
      "priority": 100
    },
    {
      "change": "default",
      "family": "V6",
      "table": 1768975734,
      "dev": null,
      "metric": 4000000
    },
    {
      "change": "default",
      "family": "V4",
      "table": 7,
      "dev": {
        "index": 2,
        "name": "eth0"
      },
      "metric": 1
    },
    {
      "change": "sysctl",
      "path": "net/ipv4/tcp_fwmark_accept",
      "from": "0",
      "to": "1"
    },
    {
      "change": "address",
      "on": {
        "index": 1,
        "name": "lo"
      },
      "addr": "192.0.2.5",
      "prefix": 32
    }
  ]
}"#;

    #[test]
    fn a_journal_of_an_earlier_version_of_the_program_is_read_and_written_alike() {
        let recorded = understand(VERSION_1.as_bytes()).unwrap();
        assert_eq!(recorded.changes.len(), 7);
        let contents = Contents {
            version: VERSION,
            identity: recorded.identity,
            changes: recorded.changes,
        };
        assert_eq!(recorded.notes.into_lines(), [""; 0]);
        assert_eq!(serde_json::to_string_pretty(&contents).unwrap(), VERSION_1);
    }

    #[test]
    fn a_journal_of_another_boot_or_namespace_is_not_undone() {
        let scratch = Scratch::new();
        let dir = RuntimeDir::open(&scratch.0).unwrap();
        let (mut journal, ..) = Journal::open(&dir).unwrap();
        let identity = journal.identity.clone();
        for stale in [
            Identity {
                boot_id: "another".into(),
                ..identity.clone()
            },
            Identity {
                netns_cookie: Some(u64::MAX),
                ..identity.clone()
            },
        ] {
            journal.identity = stale;
            journal.write(&[sysctl()]).unwrap();
            journal.identity = identity.clone();
            assert_eq!(journal.read().unwrap().0, []);
        }
    }

    #[test]
    fn a_cookie_that_could_not_be_read_tells_nothing() {
        let known = Identity {
            boot_id: "boot".into(),
            netns_cookie: Some(7),
        };
        let unknown = Identity {
            netns_cookie: None,
            ..known.clone()
        };
        let another = Identity {
            netns_cookie: Some(8),
            ..known.clone()
        };
        assert!(known.may_be(&known) && known.may_be(&unknown) && unknown.may_be(&known));
        assert!(unknown.may_be(&unknown));
        assert!(!known.may_be(&another));
    }

    /// A journal with these entries and with a field of its own, which follows a comma.
    fn journal(version: &str, field: &str, entries: &[&str]) -> Vec<u8> {
        let entries = entries.join(",");
        format!(
            r#"{{"version":{version},"boot_id":"b","netns_cookie":7{field},"changes":[{entries}]}}"#
        )
        .into_bytes()
    }

    const GOOD: &str =
        r#"{"change":"sysctl","path":"net/ipv4/tcp_fwmark_accept","from":"0","to":"1"}"#;

    #[test]
    fn what_is_not_understood_is_skipped_and_said_and_the_rest_is_undone() {
        for (entry, says) in [
            (
                r#"{"change":"nft_table","name":"x"}"#,
                "unknown variant `nft_table`",
            ),
            (
                r#"{"change":"sysctl","path":"net/ipv4/fwmark_reflect"}"#,
                "missing field `from`",
            ),
            (
                r#"{"change":"sysctl","path":"/etc/x","from":"0","to":"1"}"#,
                "\"/etc/x\"",
            ),
            (
                r#"{"change":"sysctl","path":"net/../kernel/x","from":"0","to":"1"}"#,
                "no setting",
            ),
            (
                r#"{"change":"clsact","on":{"index":2,"name":"../../x"}}"#,
                "no name of an interface",
            ),
            (
                r#"{"change":"filter","on":{"index":2,"name":"eth0"},"direction":"ingress",
                    "priority":1,"handle":1,"program":"theirs"}"#,
                "no program of ipmoved",
            ),
            ("7", "invalid type"),
        ] {
            let recorded = understand(&journal("1", "", &[GOOD, entry, GOOD])).unwrap();
            assert_eq!(
                (recorded.changes.len(), recorded.skipped),
                (2, 1),
                "{entry}"
            );
            let notes = recorded.notes.into_lines();
            assert_eq!(notes.len(), 1, "{notes:?}");
            assert!(
                notes[0].starts_with("entry 2 of the journal is skipped: "),
                "{notes:?}"
            );
            assert!(notes[0].contains(says), "{notes:?}");
        }
    }

    #[test]
    fn another_version_and_unknown_fields_are_undone_as_far_as_known() {
        let more = r#"{"change":"clsact","on":{"index":2,"name":"eth0","alias":"x"},"since":3}"#;
        for version in ["0", "2", "1.5", r#""two""#, "null"] {
            let bytes = journal(version, r#","host":"x""#, &[GOOD, more]);
            let recorded = understand(&bytes).unwrap();
            assert_eq!((recorded.changes.len(), recorded.skipped), (2, 0));
            let notes = recorded.notes.into_lines();
            assert_eq!(notes.len(), 4, "{notes:?}");
            assert!(
                notes[0].contains(&format!("version {version}")),
                "{notes:?}"
            );
            for (note, field) in notes[1..].iter().zip(["host", "alias", "since"]) {
                assert!(note.contains(&format!("field `{field}`")), "{notes:?}");
            }
        }
    }

    #[test]
    fn a_journal_of_rubbish_says_little() {
        let long = format!(r#"{{"change":"{}"}}"#, "x\\n".repeat(10_000));
        let recorded = understand(&journal("1", "", &vec![long.as_str(); 1_000])).unwrap();
        assert_eq!((recorded.changes.len(), recorded.skipped), (0, 1_000));
        let notes = recorded.notes.into_lines();
        assert_eq!(notes.len(), MAX_NOTES + 1);
        assert!(notes.iter().all(|note| note.len() < 2 * MAX_QUOTED + 100));
        assert!(!notes.concat().contains('\n'));
        assert!(
            notes[MAX_NOTES].contains("984 more"),
            "{}",
            notes[MAX_NOTES]
        );
    }

    #[test]
    fn skipped_entries_are_kept_aside() {
        let scratch = Scratch::new();
        let dir = RuntimeDir::open(&scratch.0).unwrap();
        let (journal_, ..) = Journal::open(&dir).unwrap();
        journal_.write(&[sysctl()]).unwrap();
        let path = journal_.dir.join(JOURNAL);
        let text = fs::read_to_string(&path).unwrap();
        let text = text.replace("\"changes\": [", "\"changes\": [{\"change\": \"new\"},");
        fs::write(&path, &text).unwrap();
        let (changes, unread) = journal_.read().unwrap();
        assert_eq!(changes, [sysctl()]);
        assert!(unread.is_incomplete);
        assert_eq!(unread.notes.len(), 2, "{unread:?}");
        journal_.write(&changes).unwrap();
        let aside = fs::read_to_string(journal_.dir.join(JOURNAL_ASIDE)).unwrap();
        assert_eq!(aside, text);
        assert_eq!(journal_.read().unwrap(), (changes, Unread::default()));
    }

    #[test]
    fn a_link_in_the_journals_place_leads_nowhere() {
        let scratch = Scratch::new();
        let dir = RuntimeDir::open(&scratch.0).unwrap();
        let (journal, ..) = Journal::open(&dir).unwrap();
        let victim = dir.path().join("victim");
        fs::write(&victim, "as it was").unwrap();
        for name in [JOURNAL, JOURNAL_NEXT] {
            std::os::unix::fs::symlink(&victim, dir.path().join(name)).unwrap();
        }
        let (changes, unread) = journal.read().unwrap();
        assert_eq!(changes, []);
        assert!(unread.is_incomplete);
        journal.write(&[sysctl()]).unwrap();
        assert_eq!(journal.read().unwrap().0, [sysctl()]);
        assert_eq!(fs::read_to_string(&victim).unwrap(), "as it was");
    }

    #[test]
    fn rubbish_is_set_aside_and_does_not_keep_a_daemon_from_starting() {
        let scratch = Scratch::new();
        let dir = RuntimeDir::open(&scratch.0).unwrap();
        let (journal, ..) = Journal::open(&dir).unwrap();
        for rubbish in [
            &b"{"[..],
            b"",
            b"\xff\xfe",
            b"[]",
            b"{\"boot_id\":\"b\"}",
            b"7",
        ] {
            fs::write(journal.dir.join(JOURNAL), rubbish).unwrap();
            let (changes, unread) = journal.read().unwrap();
            assert_eq!(changes, []);
            assert!(unread.is_incomplete);
            let [note] = &unread.notes[..] else {
                panic!("{unread:?}");
            };
            assert!(note.contains("was no journal"), "{note}");
            let aside = fs::read(journal.dir.join(JOURNAL_ASIDE)).unwrap();
            assert_eq!(aside, rubbish);
            assert_eq!(journal.read().unwrap(), (Vec::new(), Unread::default()));
        }
    }
}
