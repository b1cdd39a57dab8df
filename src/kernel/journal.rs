//! What the daemon has changed in the kernel, written down before it is done.
//!
//! Owns the vocabulary of changes, the directory of the network namespace under `/run`, the lock
//! that keeps a second daemon out, and the journal file. Makes and undoes nothing: that is the
//! business of [`Host`](super::Host).
//!
//! ```text
//! /run/ipmoved/net-4026531833/   one directory per network namespace, by its inode
//!     lock                       held with flock(2) while a daemon lives; its pid
//!     journal                    boot id, namespace cookie, changes in the order they were made
//!     status.sock                where `ipmoved status` asks; the daemon's, removed with the rest
//! ```
#![allow(
    unsafe_code,
    reason = "getsockopt(SO_NETNS_COOKIE) has no safe wrapper"
)]

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::netlink::{Direction, Family};
use crate::model::runtime::STATUS_SOCKET;

const JOURNAL: &str = "journal";
/// The journal while it is being written.
const JOURNAL_NEXT: &str = "journal.next";
const LOCK: &str = "lock";

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Version of the journal's format; a journal of another version is not understood.
const VERSION: u32 = 1;

/// An interface, known by its index; the name is for people.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Interface {
    /// Interface index.
    pub index: u32,
    /// Its name when it was looked up.
    pub name: String,
}

/// One change to the kernel's state.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "change", rename_all = "snake_case")]
pub enum Change {
    /// The clsact qdisc on an interface, which carries filters and does nothing of itself.
    Clsact {
        /// The interface.
        on: Interface,
    },
    /// A BPF program as a direct-action filter on a clsact qdisc.
    Filter {
        /// The interface.
        on: Interface,
        /// Its side.
        direction: Direction,
        /// Preference; the lower runs first.
        priority: u16,
        /// Handle within the preference.
        handle: u32,
        /// Name of the program.
        program: String,
    },
    /// A policy routing rule `fwmark MARK lookup TABLE`.
    Rule {
        /// IPv4 or IPv6.
        family: Family,
        /// The mark, compared whole.
        mark: u32,
        /// The table.
        table: u32,
        /// Preference; the lower is asked first.
        priority: u32,
    },
    /// A default route into an interface, or without one into nothing.
    Default {
        /// IPv4 or IPv6.
        family: Family,
        /// The table.
        table: u32,
        /// The interface; `None` is a blackhole.
        dev: Option<Interface>,
        /// Metric; the lower is preferred.
        metric: u32,
    },
    /// A setting under `/proc/sys`.
    Sysctl {
        /// Path below `/proc/sys`, as in `net/ipv4/tcp_fwmark_accept`.
        path: String,
        /// The value before.
        from: String,
        /// The value that is wanted.
        to: String,
    },
    /// An address that this host is reached at and never speaks from unasked (IPv4: scope host;
    /// IPv6: deprecated).
    Address {
        /// The interface.
        on: Interface,
        /// The address.
        addr: IpAddr,
        /// Prefix length.
        prefix: u8,
    },
}

impl Change {
    /// Whether both concern the same object, perhaps with other values.
    pub fn same_object(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Clsact { on: a }, Self::Clsact { on: b }) => a.index == b.index,
            (
                Self::Filter {
                    on: a,
                    direction: a_direction,
                    program: a_program,
                    ..
                },
                Self::Filter {
                    on: b,
                    direction: b_direction,
                    program: b_program,
                    ..
                },
            ) => (a.index, a_direction, a_program) == (b.index, b_direction, b_program),
            (Self::Sysctl { path: a, .. }, Self::Sysctl { path: b, .. }) => a == b,
            (Self::Address { on: a, addr: x, .. }, Self::Address { on: b, addr: y, .. }) => {
                (a.index, x) == (b.index, y)
            }
            _ => self == other,
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Clsact { on } => write!(f, "qdisc clsact on {}", on.name),
            Self::Filter {
                on,
                direction,
                priority,
                handle,
                program,
            } => write!(
                f,
                "filter on {} {direction} pref {priority} handle {handle:#x}: bpf {program}",
                on.name
            ),
            Self::Rule {
                family,
                mark,
                table,
                priority,
            } => write!(
                f,
                "{family} rule pref {priority}: fwmark {mark:#x} lookup {table}"
            ),
            Self::Default {
                family,
                table,
                dev: Some(dev),
                metric,
            } => write!(
                f,
                "{family} route in table {table}: default dev {} metric {metric}",
                dev.name
            ),
            Self::Default {
                family,
                table,
                dev: None,
                metric,
            } => write!(
                f,
                "{family} route in table {table}: blackhole default metric {metric}"
            ),
            Self::Sysctl { path, from, to } => {
                // As sysctl(8) writes it: dots between, a slash for a dot within.
                let name: String = path
                    .chars()
                    .map(|c| match c {
                        '/' => '.',
                        '.' => '/',
                        c => c,
                    })
                    .collect();
                write!(f, "sysctl {name}: {from} → {to}")
            }
            Self::Address { on, addr, prefix } => {
                write!(f, "address {addr}/{prefix} on {}", on.name)
            }
        }
    }
}

/// Why the journal or its directory could not be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Another daemon holds the lock.
    #[error("ipmoved (pid {pid}) is already running in this network namespace; stop it first")]
    Locked {
        /// Its process id, as it wrote it.
        pid: String,
    },
    /// A directory that others may write to.
    #[error("{0} is not a directory of root's own; remove it")]
    Foreign(PathBuf),
    /// A file that could not be read or written.
    #[error("cannot {what} {}: {error}", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The error.
        error: io::Error,
    },
    /// A journal that makes no sense.
    #[error("{} cannot be understood: {error}; remove it, and what an earlier ipmoved left in the kernel", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The error.
        error: serde_json::Error,
    },
}

/// The directory of the calling thread's network namespace, below `base`. It need not exist.
///
/// # Errors
/// If `/proc` is not there.
pub fn namespace_dir(base: &Path) -> Result<PathBuf, JournalError> {
    const NAMESPACE: &str = "/proc/thread-self/ns/net";
    let inode = fs::metadata(NAMESPACE)
        .map_err(|error| file_error("read", Path::new(NAMESPACE), error))?
        .ino();
    Ok(base.join(format!("net-{inode}")))
}

/// The locked journal of one network namespace.
#[derive(Debug)]
pub(super) struct Journal {
    dir: PathBuf,
    _lock: File,
    identity: Identity,
}

/// What tells one network namespace from every other one, earlier ones of the same inode included.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Identity {
    boot_id: String,
    /// `SO_NETNS_COOKIE`, where the kernel has it (5.14).
    netns_cookie: Option<u64>,
}

#[derive(Serialize, Deserialize)]
struct Contents {
    version: u32,
    #[serde(flatten)]
    identity: Identity,
    changes: Vec<Change>,
}

impl Journal {
    /// Locks the journal of the calling thread's network namespace and reads what an earlier daemon
    /// left there.
    pub(super) fn open(base: &Path) -> Result<(Self, Vec<Change>), JournalError> {
        let dir = namespace_dir(base)?;
        let lock = lock(base, &dir)?;
        let journal = Self {
            dir,
            _lock: lock,
            identity: Identity::of_this_namespace()?,
        };
        let changes = journal.read()?;
        Ok((journal, changes))
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Replaces the journal: a reader sees the old one or the new one, whole.
    pub(super) fn write(&self, changes: &[Change]) -> Result<(), JournalError> {
        let path = self.dir.join(JOURNAL);
        let next = self.dir.join(JOURNAL_NEXT);
        let contents = Contents {
            version: VERSION,
            identity: self.identity.clone(),
            changes: changes.to_vec(),
        };
        let write = || {
            let mut file = private_file().truncate(true).open(&next)?;
            file.write_all(&serde_json::to_vec_pretty(&contents)?)?;
            // No fsync: after a crash of the machine there is nothing left to undo.
            fs::rename(&next, &path)
        };
        write().map_err(|error| file_error("write", &path, error))
    }

    /// Removes the journal: nothing is changed.
    pub(super) fn clear(&self) {
        for ours in [JOURNAL, JOURNAL_NEXT] {
            let _ = fs::remove_file(self.dir.join(ours));
        }
    }

    /// Removes the journal, and its directory if nobody else has put anything there.
    pub(super) fn remove(&self) {
        // While we hold the lock; whoever waits for it sees that the file is no longer there.
        for ours in [JOURNAL, JOURNAL_NEXT, STATUS_SOCKET, LOCK] {
            let _ = fs::remove_file(self.dir.join(ours));
        }
        let _ = fs::remove_dir(&self.dir);
        if let Some(base) = self.dir.parent() {
            let _ = fs::remove_dir(base);
        }
    }

    fn read(&self) -> Result<Vec<Change>, JournalError> {
        let path = self.dir.join(JOURNAL);
        let text = match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(|error| file_error("read", &path, error))?,
        };
        let contents: Contents =
            serde_json::from_str(&text).map_err(|error| JournalError::Malformed {
                path: path.clone(),
                error,
            })?;
        if contents.version != VERSION {
            let error = serde::de::Error::custom(format!("version {}", contents.version));
            return Err(JournalError::Malformed { path, error });
        }
        // Of another boot, or of a namespace that is gone and whose inode was used again: what it
        // tells of went with it.
        let ours = contents.identity == self.identity;
        Ok(if ours { contents.changes } else { Vec::new() })
    }
}

impl Identity {
    fn of_this_namespace() -> Result<Self, JournalError> {
        let boot_id = fs::read_to_string(BOOT_ID)
            .map_err(|error| file_error("read", Path::new(BOOT_ID), error))?;
        Ok(Self {
            boot_id: boot_id.trim().to_owned(),
            netns_cookie: netns_cookie(),
        })
    }
}

/// The random identity of this boot of the machine; `None` if `/proc` is not there.
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

fn lock(base: &Path, dir: &Path) -> Result<File, JournalError> {
    let path = dir.join(LOCK);
    loop {
        for dir in [base, dir] {
            private_dir(dir)?;
        }
        let mut file = match private_file().open(&path) {
            // Removed by its last holder between the two steps.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => other.map_err(|error| file_error("open", &path, error))?,
        };
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let mut pid = String::new();
                let _ = file.read_to_string(&mut pid);
                return Err(JournalError::Locked {
                    pid: pid.trim().to_owned(),
                });
            }
            Err(errno) => return Err(file_error("lock", &path, errno.into())),
        }
        // The lock counts only if it is still the file that others would open.
        let inode = |metadata: io::Result<fs::Metadata>| metadata.map(|m| m.ino()).ok();
        if inode(file.metadata()) != inode(fs::metadata(&path)) {
            continue;
        }
        file.set_len(0)
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .map_err(|error| file_error("write", &path, error))?;
        return Ok(file);
    }
}

fn private_dir(dir: &Path) -> Result<(), JournalError> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(file_error("create", dir, error));
        }
        _ => {}
    }
    let metadata = fs::symlink_metadata(dir).map_err(|error| file_error("read", dir, error))?;
    let ours = metadata.is_dir()
        && metadata.uid() == rustix::process::geteuid().as_raw()
        && metadata.mode() & 0o022 == 0;
    if ours {
        Ok(())
    } else {
        Err(JournalError::Foreign(dir.to_owned()))
    }
}

fn private_file() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).mode(0o600);
    options
}

fn file_error(what: &'static str, path: &Path, error: io::Error) -> JournalError {
    JournalError::File {
        what,
        path: path.to_owned(),
        error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::testing::Scratch;

    fn sysctl() -> Change {
        Change::Sysctl {
            path: "net/ipv4/conf/eth0.5/src_valid_mark".into(),
            from: "0".into(),
            to: "1".into(),
        }
    }

    #[test]
    fn changes_read_as_people_write_them() {
        let eth0 = Interface {
            index: 2,
            name: "eth0".into(),
        };
        for (change, text) in [
            (Change::Clsact { on: eth0.clone() }, "qdisc clsact on eth0"),
            (
                Change::Filter {
                    on: eth0.clone(),
                    direction: Direction::Ingress,
                    priority: 40,
                    handle: 1,
                    program: "ipmoved_capture".into(),
                },
                "filter on eth0 ingress pref 40 handle 0x1: bpf ipmoved_capture",
            ),
            (
                Change::Rule {
                    family: Family::V6,
                    mark: 0x6970_6d76,
                    table: 7,
                    priority: 100,
                },
                "IPv6 rule pref 100: fwmark 0x69706d76 lookup 7",
            ),
            (
                Change::Default {
                    family: Family::V4,
                    table: 7,
                    dev: None,
                    metric: 4_000_000,
                },
                "IPv4 route in table 7: blackhole default metric 4000000",
            ),
            (
                Change::Sysctl {
                    path: "net/ipv4/tcp_fwmark_accept".into(),
                    from: "0".into(),
                    to: "1".into(),
                },
                "sysctl net.ipv4.tcp_fwmark_accept: 0 → 1",
            ),
            (
                sysctl(),
                "sysctl net.ipv4.conf.eth0/5.src_valid_mark: 0 → 1",
            ),
            (
                Change::Address {
                    on: eth0,
                    addr: "192.0.2.5".parse().unwrap(),
                    prefix: 32,
                },
                "address 192.0.2.5/32 on eth0",
            ),
        ] {
            assert_eq!(change.to_string(), text);
        }
    }

    #[test]
    fn what_was_written_is_read_by_the_next_daemon() {
        let scratch = Scratch::new();
        let (journal, changes) = Journal::open(&scratch.0).unwrap();
        assert_eq!(changes, []);
        journal.write(&[sysctl()]).unwrap();
        drop(journal);
        let (journal, changes) = Journal::open(&scratch.0).unwrap();
        assert_eq!(changes, [sysctl()]);
        journal.remove();
        drop(journal);
        assert!(!scratch.0.exists());
        assert_eq!(Journal::open(&scratch.0).unwrap().1, []);
    }

    /// A journal as version 1 has always written it, whatever the types inside are called.
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
        let contents: Contents = serde_json::from_str(VERSION_1).unwrap();
        assert_eq!(contents.changes.len(), 7);
        assert_eq!(serde_json::to_string_pretty(&contents).unwrap(), VERSION_1);
    }

    #[test]
    fn a_second_daemon_is_told_the_pid_of_the_first() {
        let scratch = Scratch::new();
        let first = Journal::open(&scratch.0).unwrap();
        let error = Journal::open(&scratch.0).unwrap_err().to_string();
        let pid = format!("(pid {})", std::process::id());
        assert!(error.contains(&pid), "{error}");
        drop(first);
        Journal::open(&scratch.0).unwrap();
    }

    #[test]
    fn a_journal_of_another_boot_or_namespace_is_not_undone() {
        let scratch = Scratch::new();
        let (mut journal, _) = Journal::open(&scratch.0).unwrap();
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
            assert_eq!(journal.read().unwrap(), []);
        }
    }

    #[test]
    fn a_directory_of_others_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let scratch = Scratch::new();
        fs::create_dir(&scratch.0).unwrap();
        fs::set_permissions(&scratch.0, fs::Permissions::from_mode(0o777)).unwrap();
        let error = Journal::open(&scratch.0).unwrap_err();
        assert!(matches!(error, JournalError::Foreign(_)), "{error}");
    }

    #[test]
    fn rubbish_is_not_taken_for_a_journal() {
        let scratch = Scratch::new();
        let (journal, _) = Journal::open(&scratch.0).unwrap();
        fs::write(journal.dir.join(JOURNAL), "{").unwrap();
        let error = journal.read().unwrap_err();
        assert!(matches!(error, JournalError::Malformed { .. }), "{error}");
    }
}
