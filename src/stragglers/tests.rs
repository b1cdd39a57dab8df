//! What the tests of this room share: a visit, a directory, a small disk.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::mount::{MountFlags, UnmountFlags};

use crate::model::asked::Asked;
use crate::model::moved::TCP;
use crate::model::visit::{ServedBy, Visit, client};

use super::watch::Watch;

/// A day at noon.
pub(super) const NOON: i64 = 1_795_867_200;

/// That time, as a clock shows it.
pub(super) fn wall(at: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(at.unsigned_abs())
}

/// A conversation with a port of a moved address that was answered and went on.
pub(super) fn visit(from: &str, port: u16, at: i64) -> Visit<i64> {
    Visit {
        client: client(from.parse().unwrap()),
        asked: Asked {
            addr: "192.0.2.5".parse().unwrap(),
            protocol: TCP,
            port,
        },
        served_by: ServedBy::New,
        began: Some(at),
        last: at,
        answered: true,
        went_on: true,
        bare: false,
        bytes_in: 100,
        bytes_out: 1_000,
        first_bytes: Vec::new(),
    }
}

/// What was watched: one move, since then.
pub(super) fn watch(since: i64) -> Watch {
    watch_of(&[("192.0.2.5", true)], since)
}

/// These moves, each watched or not, since then.
pub(super) fn watch_of(moves: &[(&str, bool)], since: i64) -> Watch {
    let mut watch = Watch::default();
    let moves = moves
        .iter()
        .map(|&(what, watched)| (what.to_owned(), watched));
    watch.set(&moves.collect(), since);
    watch
}

/// A directory that goes when the test does.
pub(super) struct Scratch(PathBuf);

impl Scratch {
    pub(super) fn new(name: &str) -> Self {
        let name = format!("ipmoved-stragglers-{name}-{}", std::process::id());
        let dir = std::env::temp_dir().join(name);
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    pub(super) fn dir(&self) -> &Path {
        &self.0
    }

    /// A disk of so many KiB, if this process may mount one.
    pub(super) fn small_disk(&self, kib: u32) -> Option<Disk> {
        let path = self.0.join("disk");
        fs::create_dir_all(&path).unwrap();
        let size = std::ffi::CString::new(format!("size={kib}k")).unwrap();
        let flags = MountFlags::empty();
        rustix::mount::mount("none", &path, "tmpfs", flags, size.as_c_str()).ok()?;
        Some(Disk(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A small disk.
pub(super) struct Disk(PathBuf);

impl Disk {
    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    pub(super) fn grow(&self, kib: u32) {
        let size = std::ffi::CString::new(format!("size={kib}k")).unwrap();
        rustix::mount::mount_remount(&self.0, MountFlags::empty(), size.as_c_str()).unwrap();
    }

    pub(super) fn make_read_only(&self) {
        rustix::mount::mount_remount(&self.0, MountFlags::RDONLY, c"").unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, UnmountFlags::DETACH);
    }
}
