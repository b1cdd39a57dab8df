//! Where packets of each peer were delivered last, for the next daemon if this one is killed: no
//! connection survives another address, and this host may have got one by then that comes first.
//!
//! Owns the file in the runtime directory. An orderly end removes it with the directory, and the
//! next daemon chooses anew. Whoever takes a running daemon over can write there, and gains
//! nothing: only addresses that this host has count.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use tracing::debug;

use super::policy::Chosen;
use crate::model::runtime::{DELIVERED, DELIVERED_NEXT};

/// Most bytes that are read: for each of 256 peers a name and two addresses take less than 400.
const MAX_FILE: u64 = 128 << 10;

/// By what tells a peer from others.
pub(super) type ByPeer = BTreeMap<String, Chosen>;

/// The file, and what is in it.
#[derive(Debug)]
pub(super) struct Delivered {
    dir: PathBuf,
    known: ByPeer,
}

impl Delivered {
    /// What a killed daemon left in the directory, if there was one: otherwise nothing.
    pub(super) fn read(dir: &Path, resumes: bool) -> Self {
        let known = if resumes { read(dir) } else { ByPeer::new() };
        Self {
            dir: dir.to_owned(),
            known,
        }
    }

    /// What is in the file.
    pub(super) fn known(&self) -> &ByPeer {
        &self.known
    }

    /// From now on this is in the file.
    pub(super) fn keep(&mut self, now: ByPeer) {
        if self.known == now {
            return;
        }
        if let Err(error) = write(&self.dir, &now) {
            // Only what the next daemon chooses after a crash depends on it.
            debug!(%error, "cannot keep where packets are delivered");
        }
        self.known = now;
    }
}

/// What is not understood counts as nothing.
fn read(dir: &Path) -> ByPeer {
    let mut text = Vec::new();
    let read = File::open(dir.join(DELIVERED))
        .and_then(|file| file.take(MAX_FILE).read_to_end(&mut text))
        .and_then(|_| Ok(serde_json::from_slice(&text)?));
    read.unwrap_or_default()
}

/// A reader sees the old file or the new one, whole.
fn write(dir: &Path, known: &ByPeer) -> io::Result<()> {
    let next = dir.join(DELIVERED_NEXT);
    fs::write(&next, serde_json::to_vec(known)?)?;
    fs::rename(next, dir.join(DELIVERED))
}

#[cfg(test)]
mod tests {
    use super::*;
    #[test]
    fn the_next_daemon_reads_it_if_the_last_one_was_killed() {
        let dir = std::env::temp_dir().join(format!("ipmoved-delivered-{}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        let some = (Some("198.51.100.2".parse().unwrap()), None);
        let all = ByPeer::from([("192.0.2.1:51850".to_owned(), some)]);
        let mut first = Delivered::read(&dir, true);
        assert!(first.known().is_empty());
        first.keep(all.clone());
        first.keep(all.clone());
        assert_eq!(*Delivered::read(&dir, true).known(), all);
        assert!(Delivered::read(&dir, false).known().is_empty());
        for rubbish in ["", "{", "[1]", r#"{"a":["x",null]}"#] {
            fs::write(dir.join(DELIVERED), rubbish).unwrap();
            assert!(Delivered::read(&dir, true).known().is_empty());
        }
        fs::remove_dir_all(&dir).unwrap();
    }
}
