//! What outlives the daemon and a boot, in the state directory: the modes of its moves.
//!
//! ```text
//! /var/lib/ipmoved/       or --state-dir
//!     lock                held with flock(2) while an old server's daemon lives
//!     modes.json          the modes of its moves, and the key of their shares
//!     modes.json.aside    one that was not understood, for a person to read
//! ```
//!
//! Owns the files: whether they can be read and kept, and that one that is kept is there whole
//! after a crash. A file in the way never keeps packets waiting: the daemon goes on, and says so.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::policy::modes::Record;

const LOCK: &str = "lock";
const MODES: &str = "modes.json";
const NEXT: &str = "modes.json.next";
const ASIDE: &str = "modes.json.aside";

/// The version of the file that is written, and the newest one that is understood.
const VERSION: u32 = 1;

/// The file: its version first.
#[derive(Serialize, Deserialize)]
struct Versioned {
    version: u32,
    #[serde(flatten)]
    record: Record,
}

/// The version alone, of whatever else is in the file.
#[derive(Deserialize)]
struct AnyVersion {
    version: u32,
}

/// The state directory, as far as it can be used.
#[derive(Debug)]
pub(super) struct StateDir {
    path: PathBuf,
    /// Why nothing can be kept here, until the next start.
    unusable: Option<String>,
    _lock: Option<File>,
}

impl StateDir {
    /// Opens the directory, makes it if necessary, and reads what is there. It returns what an
    /// administrator has to know, too.
    pub(super) fn open(path: &Path) -> (Self, Option<Record>, Vec<String>) {
        let mut dir = Self {
            path: path.into(),
            unusable: None,
            _lock: None,
        };
        let mut warnings = Vec::new();
        match lock(path) {
            Ok(lock) => dir._lock = Some(lock),
            Err(why) => dir.unusable = Some(why),
        }
        let record = match read(&path.join(MODES)) {
            Ok(record) => record,
            Err(Unread::Garbled(why)) => {
                let aside = path.join(ASIDE);
                let moved = fs::rename(path.join(MODES), &aside);
                let where_it_is = match moved {
                    Ok(()) => format!("it is kept as {}", aside.display()),
                    Err(error) => format!("it cannot be set aside: {error}"),
                };
                warnings.push(format!(
                    "{} is not understood ({why}): every move begins as --start says, see `ipmoved \
                     status`; {where_it_is}",
                    path.join(MODES).display()
                ));
                None
            }
            Err(Unread::Foreign(why)) => {
                warnings.push(format!(
                    "{why}; until then every move begins as --start says, and no command changes \
                     that but `back`"
                ));
                dir.unusable = Some(why);
                None
            }
        };
        if let Some(why) = dir.unusable.as_ref().filter(|_| warnings.is_empty()) {
            warnings.push(format!(
                "the modes of moves are not kept over a restart: {why}"
            ));
        }
        (dir, record, warnings)
    }

    /// Why nothing in it is this daemon's to write, as where another one uses it.
    pub(super) fn refused(&self) -> Option<&str> {
        match self._lock {
            Some(_) => None,
            None => self.unusable.as_deref(),
        }
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Keeps this. If the host crashes meanwhile, what was kept before is still there.
    ///
    /// # Errors
    /// Why it cannot be kept, and what to do.
    pub(super) fn keep(&self, record: &Record) -> Result<(), String> {
        if let Some(why) = &self.unusable {
            return Err(why.clone());
        }
        let (modes, next) = (self.path.join(MODES), self.path.join(NEXT));
        let file = Versioned {
            version: VERSION,
            record: record.clone(),
        };
        let kept = || {
            let text = serde_json::to_string_pretty(&file)?;
            let mut file = private().truncate(true).open(&next)?;
            file.write_all(text.as_bytes())?;
            file.write_all(b"\n")?;
            file.sync_all()?;
            fs::rename(&next, &modes)?;
            File::open(&self.path)?.sync_all()
        };
        kept().map_err(|error| refused(&modes, &error))
    }
}

fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.write(true).create(true).mode(0o600);
    options
}

/// Why a file cannot be written, and what to do.
fn refused(path: &Path, error: &io::Error) -> String {
    let remedy = match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => "make room there",
        Some(libc::EROFS | libc::EACCES | libc::EPERM) => {
            "let the daemon write there (StateDirectory= in a systemd unit), and restart it"
        }
        _ => "mend that",
    };
    format!(
        "cannot write {}: {error}; {remedy}, or name another directory with --state-dir",
        path.display()
    )
}

/// Makes the directory if it is not there, and locks it.
fn lock(path: &Path) -> Result<File, String> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|error| refused(path, &error))?;
    let path_of_lock = path.join(LOCK);
    let file = private().open(&path_of_lock);
    let file = file.map_err(|error| refused(&path_of_lock, &error))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(_) => Err(format!(
            "another ipmoved uses {}; give this one a directory of its own with --state-dir",
            path.display()
        )),
    }
}

/// Why there is a file, but no record.
enum Unread {
    /// Nobody understands it.
    Garbled(String),
    /// Somebody else may.
    Foreign(String),
}

fn read(path: &Path) -> Result<Option<Record>, Unread> {
    let text = match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        // Nothing can be there: it is said where it is to be written.
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => return Ok(None),
        Err(error) => {
            return Err(Unread::Foreign(format!(
                "cannot read {}: {error}; mend that, or remove the file, and restart the daemon",
                path.display()
            )));
        }
        Ok(text) => text,
    };
    let garbled = |error: serde_json::Error| Unread::Garbled(error.to_string());
    let AnyVersion { version } = serde_json::from_slice(&text).map_err(garbled)?;
    if version > VERSION {
        return Err(Unread::Foreign(format!(
            "{} is of a newer ipmoved (version {version}, this one reads up to {VERSION}); run \
             that one, or remove the file and restart the daemon",
            path.display()
        )));
    }
    let Versioned { record, .. } = serde_json::from_slice(&text).map_err(garbled)?;
    Ok(Some(record))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::policy::modes::Kept;
    use crate::model::mode::{Settled, ShareKey};

    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("ipmoved-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            Self(path)
        }

        fn modes(&self) -> PathBuf {
            self.0.join(MODES)
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn record() -> Record {
        Record {
            share_key: ShareKey([u64::MAX, 2]),
            boot: "boot".into(),
            moves: vec![Kept {
                moved: "192.0.2.5".into(),
                mode: Settled::Here,
                since: 3,
                held: None,
            }],
        }
    }

    #[test]
    fn what_is_kept_is_there_again() {
        let dir = Dir::new("state-again");
        let (state, found, warnings) = StateDir::open(&dir.0.join("deep"));
        assert_eq!((found, warnings), (None, Vec::new()));
        state.keep(&record()).unwrap();
        drop(state);
        let (state, found, warnings) = StateDir::open(&dir.0.join("deep"));
        assert_eq!((found, warnings), (Some(record()), Vec::new()));
        assert_eq!(fs::read_dir(state.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_directory_has_one_user() {
        let dir = Dir::new("state-user");
        let (first, ..) = StateDir::open(&dir.0);
        first.keep(&record()).unwrap();
        let (second, found, warnings) = StateDir::open(&dir.0);
        assert_eq!(found, Some(record()));
        assert!(warnings[0].contains("another ipmoved uses"), "{warnings:?}");
        assert!(second.keep(&record()).unwrap_err().contains("--state-dir"));
    }

    #[test]
    fn a_file_that_is_not_understood_is_set_aside_and_said() {
        for text in [
            "",
            "{",
            "{\"version\":1}",
            "{\"version\":1,\"moves\":3}",
            "\u{0}",
        ] {
            let dir = Dir::new("state-garbled");
            fs::create_dir(&dir.0).unwrap();
            fs::write(dir.modes(), text).unwrap();
            let (state, found, warnings) = StateDir::open(&dir.0);
            assert_eq!((found, warnings.len()), (None, 1), "{text}");
            assert!(warnings[0].contains("modes.json.aside"), "{warnings:?}");
            assert_eq!(fs::read_to_string(dir.0.join(ASIDE)).unwrap(), text);
            state.keep(&record()).unwrap();
        }
    }

    #[test]
    fn a_file_of_a_newer_version_is_left_alone() {
        let dir = Dir::new("state-newer");
        fs::create_dir(&dir.0).unwrap();
        let text = "{\"version\":2,\"moves\":\"elsewhere\"}";
        fs::write(dir.modes(), text).unwrap();
        let (state, found, warnings) = StateDir::open(&dir.0);
        assert_eq!((found, warnings.len()), (None, 1));
        assert!(warnings[0].contains("of a newer ipmoved"), "{warnings:?}");
        assert!(state.keep(&record()).unwrap_err().contains("newer"));
        assert_eq!(fs::read_to_string(dir.modes()).unwrap(), text);
    }

    #[test]
    fn where_nothing_can_be_written_it_is_said_with_the_remedy() {
        // Root may write everywhere but where there is no directory.
        let dir = Dir::new("state-file");
        fs::write(&dir.0, "").unwrap();
        let (state, found, warnings) = StateDir::open(&dir.0);
        assert_eq!((found, warnings.len()), (None, 1), "{warnings:?}");
        assert!(state.keep(&record()).unwrap_err().contains("--state-dir"));
        fs::remove_file(&dir.0).unwrap();
        let (state, ..) = StateDir::open(&dir.0);
        fs::remove_dir_all(&dir.0).unwrap();
        let why = state.keep(&record()).unwrap_err();
        assert!(
            why.contains("modes.json") && why.contains("--state-dir"),
            "{why}"
        );
    }
}
