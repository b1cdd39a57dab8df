//! The journal of the daemon's changes to the kernel, written before each of them.
//!
//! Owns the journal file. A reader sees the old file or the new one, whole. It does not believe a
//! journal from before a reboot of the machine, or from a namespace that is gone. The journal
//! itself makes and undoes nothing: that is the business of [`Host`](super::Host). Only whoever
//! holds the lock of the [directory](super::runtime_dir) has a journal there.
//!
//! ```text
//! journal   version, boot id, namespace cookie, changes in the order they were made
//! ```
#![allow(
    unsafe_code,
    reason = "getsockopt(SO_NETNS_COOKIE) has no safe wrapper"
)]

use std::fs;
use std::io::{self, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::change::Change;
use super::runtime_dir::{RuntimeDir, RuntimeDirError, private_file};

const JOURNAL: &str = "journal";
/// The journal while it is being written.
const JOURNAL_NEXT: &str = "journal.next";

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Version of the journal's format. We do not read any other version.
const VERSION: u32 = 1;

/// Why the journal could not be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// A file could not be read or written.
    #[error(transparent)]
    File(#[from] RuntimeDirError),
    /// The journal makes no sense.
    #[error(
        "{} cannot be understood: {error}; remove it, and what an earlier ipmoved left in the \
         kernel",
        path.display()
    )]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The error.
        error: serde_json::Error,
    },
}

/// The journal of one network namespace.
#[derive(Debug)]
pub(super) struct Journal {
    dir: PathBuf,
    identity: Identity,
}

/// Tells one network namespace from every other, even from earlier ones of the same inode.
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
    /// Reads what an earlier daemon left in the directory of the calling thread's network
    /// namespace.
    pub(super) fn open(dir: &RuntimeDir) -> Result<(Self, Vec<Change>), JournalError> {
        let journal = Self {
            dir: dir.path().to_owned(),
            identity: Identity::of_this_namespace()?,
        };
        let changes = journal.read()?;
        Ok((journal, changes))
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
            // It needs no fsync: after a crash of the machine there is nothing left to undo.
            fs::rename(&next, &path)
        };
        write().map_err(|error| RuntimeDirError::file("write", &path, error).into())
    }

    /// Removes the journal: there is nothing to undo.
    pub(super) fn clear(&self) {
        for ours in [JOURNAL, JOURNAL_NEXT] {
            let _ = fs::remove_file(self.dir.join(ours));
        }
    }

    fn read(&self) -> Result<Vec<Change>, JournalError> {
        let path = self.dir.join(JOURNAL);
        let text = match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(|error| RuntimeDirError::file("read", &path, error))?,
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
        // It is from before a reboot, or from a namespace that is gone and whose inode is in use
        // again. In both cases the changes in it are gone as well.
        let ours = contents.identity == self.identity;
        Ok(if ours { contents.changes } else { Vec::new() })
    }
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
        })
    }

    #[test]
    fn the_next_daemon_reads_what_one_has_written() {
        let scratch = Scratch::new();
        let dir = RuntimeDir::open(&scratch.0).unwrap();
        let (journal, changes) = Journal::open(&dir).unwrap();
        assert_eq!(changes, []);
        journal.write(&[sysctl()]).unwrap();
        let (journal, changes) = Journal::open(&dir).unwrap();
        assert_eq!(changes, [sysctl()]);
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
        let contents: Contents = serde_json::from_str(VERSION_1).unwrap();
        assert_eq!(contents.changes.len(), 7);
        assert_eq!(serde_json::to_string_pretty(&contents).unwrap(), VERSION_1);
    }

    #[test]
    fn a_journal_of_another_boot_or_namespace_is_not_undone() {
        let scratch = Scratch::new();
        let dir = RuntimeDir::open(&scratch.0).unwrap();
        let (mut journal, _) = Journal::open(&dir).unwrap();
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
    fn rubbish_is_not_taken_for_a_journal() {
        let scratch = Scratch::new();
        let dir = RuntimeDir::open(&scratch.0).unwrap();
        let (journal, _) = Journal::open(&dir).unwrap();
        fs::write(journal.dir.join(JOURNAL), "{").unwrap();
        let error = journal.read().unwrap_err();
        assert!(matches!(error, JournalError::Malformed { .. }), "{error}");
    }
}
