//! The files that settings are made of, as they were when they were read.
//!
//! A daemon that runs cannot read them any more ([`daemon::confine`](crate::daemon::confine)). What
//! reads them for it hands over what it found, and the daemon makes settings of that as it would of
//! the files: so a mistake is told in the same words.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, Zeroizing};

/// Longest file that is read: 16,384 moves in it take less than a megabyte.
pub(crate) const MAX_FILE: u64 = 4 << 20;

/// Where files are read.
#[derive(Debug)]
pub(crate) enum Files {
    /// On the disk. What was found is remembered.
    Disk(RefCell<Found>),
    /// Elsewhere: this was found.
    Given(Found),
}

/// What was found in each file.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Found(BTreeMap<PathBuf, Result<Text, Unread>>);

/// The text of a file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Text {
    text: String,
    /// Other users can read or write it, too.
    open: bool,
}

/// Why there is no text.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Unread {
    /// The number of the error, if it has one.
    errno: Option<i32>,
    text: String,
}

impl Drop for Text {
    fn drop(&mut self) {
        // It may be a key.
        self.text.zeroize();
    }
}

impl Files {
    /// On the disk.
    pub(crate) fn on_disk() -> Self {
        Self::Disk(RefCell::default())
    }

    /// What was found so far.
    pub(crate) fn into_found(self) -> Found {
        match self {
            Self::Disk(found) => found.into_inner(),
            Self::Given(found) => found,
        }
    }

    /// The text of a file, and whether other users can read or write it.
    ///
    /// # Errors
    /// If it cannot be read, or is no text.
    pub(crate) fn read(&self, path: &Path) -> io::Result<(Zeroizing<String>, bool)> {
        let found = match self {
            Self::Disk(found) => {
                let read = read(path).map_err(|error| Unread {
                    errno: error.raw_os_error(),
                    text: error.to_string(),
                });
                found.borrow_mut().0.insert(path.into(), read.clone());
                Some(read)
            }
            Self::Given(found) => found.0.get(path).cloned(),
        };
        match found {
            Some(Ok(found)) => Ok((Zeroizing::new(found.text.clone()), found.open)),
            Some(Err(Unread { errno, text })) => Err(match errno {
                Some(errno) => io::Error::from_raw_os_error(errno),
                None => io::Error::new(io::ErrorKind::InvalidData, text),
            }),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

fn read(path: &Path) -> io::Result<Text> {
    /// Read or write for the group or for everybody.
    const OTHERS: u32 = 0o066;
    let file = fs::File::open(path)?;
    let open = file.metadata()?.permissions().mode() & OTHERS != 0;
    let mut text = Zeroizing::new(String::new());
    file.take(MAX_FILE + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_FILE {
        let error = format!("it is longer than {MAX_FILE} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, error));
    }
    Ok(Text {
        text: text.to_string(),
        open,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_found_reads_as_the_files_did() {
        let dir = std::env::temp_dir().join(format!("ipmoved-found-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let [text, garbled, absent] = ["text", "garbled", "absent"].map(|name| dir.join(name));
        fs::write(&text, "peer = 1\n").unwrap();
        fs::write(&garbled, [0xff, 0xfe]).unwrap();
        let disk = Files::on_disk();
        let before = [&text, &garbled, &absent].map(|path| disk.read(path));
        let found = serde_json::to_string(&disk.into_found()).unwrap();
        fs::remove_dir_all(&dir).unwrap();
        let given = Files::Given(serde_json::from_str(&found).unwrap());
        let after = [&text, &garbled, &absent].map(|path| given.read(path));
        for (before, after) in before.iter().zip(&after) {
            assert_eq!(format!("{before:?}"), format!("{after:?}"));
        }
        assert!(before[0].is_ok() && before[1].is_err());
        assert_eq!(
            after[2].as_ref().unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
        let never = given.read(Path::new("/etc/shadow")).unwrap_err();
        assert_eq!(never.kind(), io::ErrorKind::NotFound, "it was not read");
    }
}
