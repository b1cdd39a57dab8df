//! What outlives the daemon and a boot, in the state directory: the modes of its moves.
//!
//! ```text
//! /var/lib/ipmoved/       or --state-dir
//!     lock                held with flock(2) while an old server's daemon lives
//!     modes.json          the modes of its moves, and the key of their shares
//!     modes.json.copy     the same, for the case that the other is damaged
//!     modes.json.aside    one that was not understood, for a person to read
//! ```
//!
//! Owns the files: whether they can be read and kept, and that one that is kept is there whole
//! after a crash. A file in the way never keeps packets waiting: the daemon goes on, and says so.
//!
//! A move whose mode nobody knows begins as `--start` says. Nothing that the daemon could look at
//! instead knows better: when a server starts, its services do not run yet. So there are two files,
//! and where neither is understood that is said until somebody has named the modes.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::policy::modes::Record;

const LOCK: &str = "lock";
const MODES: &str = "modes.json";
const NEXT: &str = "modes.json.next";
const COPY: &str = "modes.json.copy";
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

/// What was there at the start.
#[derive(Debug, Default)]
pub(super) struct Opened {
    /// The modes, if they are known.
    pub(super) record: Option<Record>,
    /// What an administrator has to know.
    pub(super) warnings: Vec<String>,
    /// What there was could not be read, and nobody knows the modes.
    pub(super) lost: bool,
    /// It has to be written anew.
    pub(super) stale: bool,
}

/// The state directory, as far as it can be used.
#[derive(Debug)]
pub(super) struct StateDir {
    path: PathBuf,
    /// Why nothing can be kept here, until the next start.
    unusable: Option<String>,
    lock: Option<File>,
}

impl StateDir {
    /// Opens the directory, makes it if necessary, and reads what is there.
    ///
    /// A daemon that is about to hand over shares its lock.
    pub(super) fn open(path: &Path, shared: Option<OwnedFd>) -> (Self, Opened) {
        let mut dir = Self {
            path: path.into(),
            unusable: None,
            lock: None,
        };
        let mut opened = Opened::default();
        match lock(path, shared) {
            Ok(lock) => dir.lock = Some(lock),
            Err(why) => dir.unusable = Some(why),
        }
        let (why, is_ours) = match read(&path.join(MODES)) {
            Ok(record) => {
                opened.record = record;
                dir.say_if_unusable(&mut opened);
                return (dir, opened);
            }
            Err(Unread::Garbled(why)) => {
                let is_not = format!("{} is not understood", path.join(MODES).display());
                (format!("{is_not} ({why}){}", dir.set_aside()), true)
            }
            Err(Unread::Foreign(why)) => (why, false),
        };
        opened.stale = is_ours;
        let then = match read(&path.join(COPY)) {
            Ok(Some(copy)) => {
                opened.record = Some(copy);
                "its copy is, and says which mode each move is in"
            }
            Ok(None) | Err(_) => {
                opened.lost = true;
                "until then every move begins as --start says"
            }
        };
        if is_ours {
            opened.warnings.push(match opened.lost {
                false => format!("{why}; {then}"),
                true => why,
            });
        } else {
            opened.warnings.push(format!("{why}; {then}"));
            dir.unusable = Some(why);
        }
        dir.say_if_unusable(&mut opened);
        (dir, opened)
    }

    fn say_if_unusable(&self, opened: &mut Opened) {
        if let Some(why) = self
            .unusable
            .as_ref()
            .filter(|_| opened.warnings.is_empty())
        {
            opened.warnings.push(unkept(why));
        }
    }

    /// What is kept there, for whoever changes nothing.
    pub(super) fn look(path: &Path) -> Option<Record> {
        let kept = |name| read(&path.join(name)).ok().flatten();
        [MODES, COPY].into_iter().find_map(kept)
    }

    /// Keeps what is not understood for a person, and says where. Another daemon's it leaves alone.
    fn set_aside(&self) -> String {
        if self.lock.is_none() {
            return String::new();
        }
        let aside = self.path.join(ASIDE);
        // There is one at most, the newest. The file itself stays until another takes its place.
        let _ = fs::remove_file(&aside);
        match fs::hard_link(self.path.join(MODES), &aside) {
            Ok(()) => format!("; it is kept as {}", aside.display()),
            Err(error) => format!("; it cannot be set aside: {error}"),
        }
    }

    /// Why nothing in it is this daemon's to write, as where another one uses it.
    pub(super) fn refused(&self) -> Option<&str> {
        match self.lock {
            Some(_) => None,
            None => self.unusable.as_deref(),
        }
    }

    /// A second handle to its lock, if this daemon has it.
    ///
    /// # Errors
    /// If there is no descriptor left.
    pub(super) fn lock(&self) -> io::Result<Option<OwnedFd>> {
        let lock = self.lock.as_ref();
        lock.map(|lock| Ok(lock.try_clone()?.into())).transpose()
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
        let next = self.path.join(NEXT);
        let file = Versioned {
            version: VERSION,
            record: record.clone(),
        };
        let kept = |place: &Path| {
            let text = serde_json::to_string_pretty(&file)?;
            let mut file = private().truncate(true).open(&next)?;
            file.write_all(text.as_bytes())?;
            file.write_all(b"\n")?;
            file.sync_all()?;
            fs::rename(&next, place)?;
            File::open(&self.path)?.sync_all()
        };
        // One after the other: whenever the host crashes, one of them is whole.
        [MODES, COPY].into_iter().try_for_each(|name| {
            let place = self.path.join(name);
            kept(&place).map_err(|error| refused(&place, &error))
        })
    }
}

/// What it means that modes are not kept.
pub(super) fn unkept(why: &str) -> String {
    format!("the modes of moves are not kept over a restart: {why}")
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

/// Makes the directory if it is not there, and locks it, unless another daemon shares its lock.
fn lock(path: &Path, shared: Option<OwnedFd>) -> Result<File, String> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|error| refused(path, &error))?;
    let path_of_lock = path.join(LOCK);
    let file = private().open(&path_of_lock);
    let file = file.map_err(|error| refused(&path_of_lock, &error))?;
    let inode = |file: &File| file.metadata().map(|it| (it.dev(), it.ino())).ok();
    if let Some(shared) = shared.map(File::from)
        && inode(&shared) == inode(&file)
    {
        return Ok(shared);
    }
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
            carried: Vec::new(),
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
        let (state, opened) = StateDir::open(&dir.0.join("deep"), None);
        assert_eq!((opened.record, opened.warnings), (None, Vec::new()));
        state.keep(&record()).unwrap();
        drop(state);
        let (state, opened) = StateDir::open(&dir.0.join("deep"), None);
        assert_eq!(
            (opened.record, opened.warnings),
            (Some(record()), Vec::new())
        );
        assert!(!opened.lost && !opened.stale);
        assert_eq!(fs::read_dir(state.path()).unwrap().count(), 3);
    }

    #[test]
    fn a_directory_has_one_user() {
        let dir = Dir::new("state-user");
        let (first, ..) = StateDir::open(&dir.0, None);
        first.keep(&record()).unwrap();
        let (second, opened) = StateDir::open(&dir.0, None);
        assert_eq!(opened.record, Some(record()));
        let warnings = opened.warnings;
        assert!(warnings[0].contains("another ipmoved uses"), "{warnings:?}");
        assert!(second.keep(&record()).unwrap_err().contains("--state-dir"));
        // And the other one's business is its own.
        fs::write(dir.modes(), "{").unwrap();
        drop(second);
        let (_, opened) = StateDir::open(&dir.0, None);
        assert_eq!(opened.record, Some(record()), "there is a copy");
        assert_eq!(fs::read_to_string(dir.modes()).unwrap(), "{");
        assert!(!dir.0.join(ASIDE).exists());
        drop(first);
    }

    const DAMAGED: [&str; 5] = [
        "",
        "{",
        "{\"version\":1}",
        "{\"version\":1,\"moves\":3}",
        "\u{0}",
    ];

    #[test]
    fn a_file_that_is_not_understood_is_set_aside_and_its_copy_counts() {
        for text in DAMAGED {
            let dir = Dir::new("state-garbled");
            let (state, ..) = StateDir::open(&dir.0, None);
            state.keep(&record()).unwrap();
            drop(state);
            fs::write(dir.modes(), text).unwrap();
            for _ in 0..2 {
                let (_, opened) = StateDir::open(&dir.0, None);
                assert_eq!(opened.record, Some(record()), "{text}");
                assert!(opened.stale && !opened.lost);
                let [warning] = &opened.warnings[..] else {
                    panic!("{opened:?}");
                };
                assert!(
                    warning.contains("modes.json.aside; its copy is"),
                    "{warning}"
                );
                assert_eq!(fs::read_to_string(dir.0.join(ASIDE)).unwrap(), text);
            }
            let (state, _) = StateDir::open(&dir.0, None);
            state.keep(&record()).unwrap();
            drop(state);
            let (_, opened) = StateDir::open(&dir.0, None);
            assert_eq!((opened.warnings, opened.stale), (Vec::new(), false));
            assert_eq!(fs::read_to_string(dir.0.join(ASIDE)).unwrap(), text);
        }
    }

    #[test]
    fn where_nobody_knows_the_modes_that_is_known() {
        for text in DAMAGED {
            for copy in [None, Some(text)] {
                let dir = Dir::new("state-lost");
                fs::create_dir(&dir.0).unwrap();
                fs::write(dir.modes(), text).unwrap();
                if let Some(copy) = copy {
                    fs::write(dir.0.join(COPY), copy).unwrap();
                }
                let (_, opened) = StateDir::open(&dir.0, None);
                assert_eq!((opened.record, opened.lost), (None, true), "{text}");
                assert_eq!(opened.warnings.len(), 1);
            }
        }
    }

    #[test]
    fn a_file_of_a_newer_version_is_left_alone() {
        let dir = Dir::new("state-newer");
        fs::create_dir(&dir.0).unwrap();
        let text = "{\"version\":2,\"moves\":\"elsewhere\"}";
        fs::write(dir.modes(), text).unwrap();
        let (state, opened) = StateDir::open(&dir.0, None);
        let warnings = opened.warnings;
        assert_eq!((opened.record, warnings.len()), (None, 1));
        assert!(opened.lost && !opened.stale);
        assert!(warnings[0].contains("of a newer ipmoved"), "{warnings:?}");
        assert!(state.keep(&record()).unwrap_err().contains("newer"));
        assert_eq!(fs::read_to_string(dir.modes()).unwrap(), text);
    }

    #[test]
    fn where_nothing_can_be_written_it_is_said_with_the_remedy() {
        // Root may write everywhere but where there is no directory.
        let dir = Dir::new("state-file");
        fs::write(&dir.0, "").unwrap();
        let (state, opened) = StateDir::open(&dir.0, None);
        let warnings = opened.warnings;
        assert_eq!((opened.record, warnings.len()), (None, 1), "{warnings:?}");
        assert!(state.keep(&record()).unwrap_err().contains("--state-dir"));
        fs::remove_file(&dir.0).unwrap();
        let (state, ..) = StateDir::open(&dir.0, None);
        fs::remove_dir_all(&dir.0).unwrap();
        let why = state.keep(&record()).unwrap_err();
        assert!(
            why.contains("modes.json") && why.contains("--state-dir"),
            "{why}"
        );
    }
}
