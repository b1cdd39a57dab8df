//! The directory of a network namespace under `/run`, and the lock that keeps a second daemon out.
//!
//! Owns who may use it: root alone, one daemon at a time. The files in it are the business of those
//! who put them there.
//!
//! ```text
//! /run/ipmoved/net-4026531833/   one directory per network namespace, by its inode
//!     lock                       held with flock(2) while a daemon lives; contains its pid
//!     journal                    see `journal`
//!     journal.aside              a journal that was not understood whole, for a person to read
//!     status.sock                where `ipmoved status` asks; the daemon owns it
//!     flows.sock                 where `ipmoved flows` and `top` ask; the daemon owns it
//!     control.sock               where commands to the old server ask; its daemon owns it
//!     handover.sock              where the next daemon takes over; the daemon owns it
//! ```

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::model::runtime::{
    CONTROL_SOCKET, DELIVERED, DELIVERED_NEXT, FLOWS_SOCKET, HANDOVER_SOCKET, STATUS_SOCKET,
};

const LOCK: &str = "lock";

/// Why the directory of a namespace could not be used.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeDirError {
    /// Another daemon holds the lock.
    #[error(
        "ipmoved (pid {pid}) is already running in this network namespace; stop it first: \
         `systemctl stop ipmoved`, or `kill {pid}` if no unit has started it"
    )]
    Locked {
        /// Its process id, as it wrote it.
        pid: String,
    },
    /// Others may write to the directory.
    #[error("{0} is not a directory of root's own; remove it")]
    Foreign(PathBuf),
    /// Whoever runs this is not root.
    #[error("only root may use {0}; try sudo")]
    NotRoot(PathBuf),
    /// A file could not be read or written.
    #[error("cannot {what} {}: {error}", path.display())]
    File {
        /// The attempted operation.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The error.
        error: io::Error,
    },
}

impl RuntimeDirError {
    pub(super) fn file(what: &'static str, path: &Path, error: io::Error) -> Self {
        Self::File {
            what,
            path: path.to_owned(),
            error,
        }
    }
}

/// The directory of the calling thread's network namespace, below `base`. It may not exist yet.
///
/// # Errors
/// If `/proc` is not there.
pub fn namespace_dir(base: &Path) -> Result<PathBuf, RuntimeDirError> {
    const NAMESPACE: &str = "/proc/thread-self/ns/net";
    let inode = fs::metadata(NAMESPACE)
        .map_err(|error| RuntimeDirError::file("read", Path::new(NAMESPACE), error))?
        .ino();
    Ok(base.join(format!("net-{inode}")))
}

/// The file whose lock the daemon of the calling thread's network namespace holds. It may not exist
/// yet.
///
/// # Errors
/// If `/proc` is not there.
pub fn lock_path(base: &Path) -> Result<PathBuf, RuntimeDirError> {
    Ok(namespace_dir(base)?.join(LOCK))
}

/// The locked directory of one network namespace.
#[derive(Debug)]
pub(super) struct RuntimeDir {
    path: PathBuf,
    /// `None` for a rehearsal, which may not exist and changes nothing in it.
    lock: Option<File>,
}

impl RuntimeDir {
    /// Locks the directory of the calling thread's network namespace, and makes it if necessary.
    pub(super) fn open(base: &Path) -> Result<Self, RuntimeDirError> {
        let path = namespace_dir(base)?;
        let lock = lock(base, &path)?;
        sweep(base, &path);
        Ok(Self {
            path,
            lock: Some(lock),
        })
    }

    /// The directory as it is, for a rehearsal: nothing in it is changed.
    ///
    /// # Errors
    /// If a daemon has locked it.
    pub(super) fn look(base: &Path) -> Result<Self, RuntimeDirError> {
        let path = namespace_dir(base)?;
        if let Ok(mut file) = OpenOptions::new().read(true).open(path.join(LOCK))
            && flock(&file, FlockOperation::NonBlockingLockShared) == Err(Errno::WOULDBLOCK)
        {
            return Err(locked(&mut file));
        }
        Ok(Self { path, lock: None })
    }

    /// The directory of the calling thread's network namespace, whose `lock` another daemon holds
    /// and shares.
    pub(super) fn inherit(base: &Path, lock: OwnedFd) -> Result<Self, RuntimeDirError> {
        let path = namespace_dir(base)?;
        private_dir(&path)?;
        let lock = File::from(lock);
        let inode = |metadata: io::Result<fs::Metadata>| metadata.map(|m| (m.dev(), m.ino())).ok();
        if inode(lock.metadata()) != inode(fs::metadata(path.join(LOCK))) {
            return Err(RuntimeDirError::Foreign(path));
        }
        Ok(Self {
            path,
            lock: Some(lock),
        })
    }

    /// A second handle to the lock, which is free once all are closed.
    pub(super) fn lock(&self) -> io::Result<OwnedFd> {
        match &self.lock {
            Some(lock) => lock.try_clone().map(OwnedFd::from),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Says that this process holds the lock now.
    pub(super) fn sign(&self) -> Result<(), RuntimeDirError> {
        let signed = self.lock.as_ref().map_or(Ok(()), sign);
        signed.map_err(|error| RuntimeDirError::file("write", &self.path, error))
    }

    /// Whether nothing in it may be changed.
    pub(super) fn is_rehearsed(&self) -> bool {
        self.lock.is_none()
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the directory, unless somebody else has put a file there.
    pub(super) fn remove(&self) {
        if self.is_rehearsed() {
            return;
        }
        // We still hold the lock. Whoever waits for it will see that the file is no longer there.
        for ours in [
            STATUS_SOCKET,
            FLOWS_SOCKET,
            CONTROL_SOCKET,
            HANDOVER_SOCKET,
            DELIVERED_NEXT,
            DELIVERED,
            LOCK,
        ] {
            let _ = fs::remove_file(self.path.join(ours));
        }
        let _ = fs::remove_dir(&self.path);
        if let Some(base) = self.path.parent() {
            let _ = fs::remove_dir(base);
        }
    }
}

/// Removes the directories of network namespaces that are gone: what was to be undone in them is
/// gone, too, and the kernel may give their numbers to others.
fn sweep(base: &Path, own: &Path) {
    let entries = fs::read_dir(base).into_iter().flatten().flatten();
    let mut others: Vec<(PathBuf, u64)> = entries
        .filter_map(|entry| {
            let inode = entry
                .file_name()
                .to_str()?
                .strip_prefix("net-")?
                .parse()
                .ok()?;
            Some((entry.path(), inode))
        })
        .filter(|(path, _)| path != own)
        .collect();
    if others.is_empty() {
        return;
    }
    let Some(living) = living_namespaces() else {
        return;
    };
    others.retain(|(_, inode)| !living.contains(inode));
    for (path, _) in others {
        let Ok(file) = private_file().open(path.join(LOCK)) else {
            continue;
        };
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            continue;
        }
        let files = fs::read_dir(&path).into_iter().flatten().flatten();
        for file in files
            .map(|file| file.path())
            .filter(|file| !file.ends_with(LOCK))
        {
            let _ = fs::remove_file(file);
        }
        let _ = fs::remove_file(path.join(LOCK));
        let _ = fs::remove_dir(&path);
    }
}

/// The network namespaces that somebody is in, holds open or has mounted; `None` if not everybody
/// can be asked, as in a container.
fn living_namespaces() -> Option<BTreeSet<u64>> {
    // `PROC_PID_INIT_INO`: the namespace in which every process is seen.
    const ALL_PROCESSES: u64 = 0xefff_fffc;
    if fs::metadata("/proc/self/ns/pid").ok()?.ino() != ALL_PROCESSES {
        return None;
    }
    // But not where those of others are hidden (`hidepid=`, `ProtectProc=invisible` in the unit).
    if !Path::new("/proc/1").exists() {
        return None;
    }
    let mut living = BTreeSet::new();
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let is_process = |name: &str| name.bytes().all(|byte| byte.is_ascii_digit());
        if process.file_name().to_str().is_some_and(is_process)
            && let Err(error) = namespaces_of(&process.path(), &mut living)
            // It has ended meanwhile.
            && !matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
        {
            return None;
        }
    }
    Some(living)
}

/// Adds the network namespaces of a process: of its threads, descriptors and mounts.
fn namespaces_of(process: &Path, living: &mut BTreeSet<u64>) -> io::Result<()> {
    let inode = |text: &str| {
        text.strip_prefix("net:[")?
            .strip_suffix("]")?
            .parse::<u64>()
            .ok()
    };
    // Without privileges nobody is told of those who have more.
    let mut note = |link: &Path| match fs::read_link(link) {
        Ok(target) => {
            living.extend(target.to_str().and_then(inode));
            Ok(())
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(error),
        // It is gone.
        Err(_) => Ok(()),
    };
    for thread in fs::read_dir(process.join("task"))?.flatten() {
        note(&thread.path().join("ns/net"))?;
    }
    for descriptor in fs::read_dir(process.join("fd"))?.flatten() {
        note(&descriptor.path())?;
    }
    let mounts = match fs::read_to_string(process.join("mountinfo")) {
        // A process that is ending has none (EINVAL), and needs none.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(()),
        read => read?,
    };
    living.extend(mounts.split_ascii_whitespace().filter_map(inode));
    Ok(())
}

/// Another daemon holds the lock, and wrote who it is.
fn locked(file: &mut File) -> RuntimeDirError {
    let mut pid = String::new();
    let _ = file.read_to_string(&mut pid);
    RuntimeDirError::Locked {
        pid: pid.trim().to_owned(),
    }
}

fn lock(base: &Path, dir: &Path) -> Result<File, RuntimeDirError> {
    let path = dir.join(LOCK);
    loop {
        for dir in [base, dir] {
            private_dir(dir)?;
        }
        let mut file = match private_file().open(&path) {
            // Its last holder removed it between the two steps.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => other.map_err(|error| RuntimeDirError::file("open", &path, error))?,
        };
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                return Err(locked(&mut file));
            }
            Err(errno) => return Err(RuntimeDirError::file("lock", &path, errno.into())),
        }
        // The lock counts only if it is still the file that others would open.
        let inode = |metadata: io::Result<fs::Metadata>| metadata.map(|m| m.ino()).ok();
        if inode(file.metadata()) != inode(fs::metadata(&path)) {
            continue;
        }
        sign(&file).map_err(|error| RuntimeDirError::file("write", &path, error))?;
        return Ok(file);
    }
}

/// Writes this process's id into the lock. Another one may have left its place behind what it
/// wrote.
fn sign(mut lock: &File) -> io::Result<()> {
    lock.rewind()?;
    lock.set_len(0)?;
    writeln!(lock, "{}", std::process::id())
}

fn private_dir(dir: &Path) -> Result<(), RuntimeDirError> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied && !is_root() => {
            return Err(RuntimeDirError::NotRoot(dir.to_owned()));
        }
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(RuntimeDirError::file("create", dir, error));
        }
        _ => {}
    }
    let metadata =
        fs::symlink_metadata(dir).map_err(|error| RuntimeDirError::file("read", dir, error))?;
    let ours = metadata.is_dir()
        && metadata.uid() == rustix::process::geteuid().as_raw()
        && metadata.mode() & 0o022 == 0;
    if ours {
        Ok(())
    } else if metadata.uid() == 0 && !is_root() {
        Err(RuntimeDirError::NotRoot(dir.to_owned()))
    } else {
        Err(RuntimeDirError::Foreign(dir.to_owned()))
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Options for opening a file that only root may read. A link in its place is not followed: a
/// daemon that was taken over could lead whoever cleans up after it to any file.
pub(super) fn private_file() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).mode(0o600);
    options.custom_flags(libc::O_NOFOLLOW);
    options
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::testing::Scratch;

    #[test]
    fn a_second_daemon_is_told_the_pid_of_the_first() {
        let scratch = Scratch::new();
        let first = RuntimeDir::open(&scratch.0).unwrap();
        let error = RuntimeDir::open(&scratch.0).unwrap_err().to_string();
        let pid = format!("(pid {})", std::process::id());
        assert!(error.contains(&pid), "{error}");
        drop(first);
        RuntimeDir::open(&scratch.0).unwrap();
    }

    #[test]
    fn the_directory_of_a_namespace_goes_with_it() {
        use crate::lab::Namespace;
        let scratch = Scratch::new();
        let [dies, lives] = ["dies", "lives"].map(|name| Namespace::new(name).unwrap());
        let leave = |namespace: &Namespace| {
            let dir = namespace.run(|| {
                let dir = RuntimeDir::open(&scratch.0).unwrap();
                fs::write(dir.path().join("journal"), "something").unwrap();
                // As after a crash: nothing is removed.
                Ok(dir.path().to_owned())
            });
            dir.unwrap()
        };
        let (gone, stays) = (leave(&dies), leave(&lives));
        let foreign = scratch.0.join("net-x");
        fs::create_dir(&foreign).unwrap();
        drop(RuntimeDir::open(&scratch.0).unwrap());
        assert!(gone.exists() && stays.exists());
        drop(dies);
        if living_namespaces().is_none() {
            // A security module hides somebody from root as well, who may be in any of them.
            drop(RuntimeDir::open(&scratch.0).unwrap());
            assert!(gone.exists() && stays.exists());
            return;
        }
        let swept = crate::lab::poll_until(
            std::time::Duration::from_secs(5),
            std::time::Duration::from_millis(20),
            || {
                drop(RuntimeDir::open(&scratch.0).unwrap());
                (!gone.exists()).then_some(())
            },
        );
        assert!(swept.is_some());
        assert!(stays.join("journal").exists() && foreign.exists());
    }

    /// As the systemd unit starts the daemon: what it cannot see may live all the same.
    #[test]
    fn who_does_not_see_every_process_removes_nothing() {
        use crate::kernel::testing::{capabilities_of_the_unit, in_fresh_namespace, keep_only};
        in_fresh_namespace(|| {
            // Process 1 has more, as whoever is in a container has.
            keep_only(capabilities_of_the_unit());
            assert_eq!(living_namespaces(), None);
        });
    }

    #[test]
    fn the_lock_is_free_once_the_last_of_those_who_share_it_is_gone() {
        let scratch = Scratch::new();
        let first = RuntimeDir::open(&scratch.0).unwrap();
        let second = RuntimeDir::inherit(&scratch.0, first.lock().unwrap()).unwrap();
        drop(first);
        assert!(RuntimeDir::open(&scratch.0).is_err(), "it is shared");
        second.sign().unwrap();
        let error = RuntimeDir::open(&scratch.0).unwrap_err().to_string();
        assert!(
            error.contains(&format!("(pid {})", std::process::id())),
            "{error}"
        );
        let other = File::open("/dev/null").unwrap();
        assert!(
            RuntimeDir::inherit(&scratch.0, other.into()).is_err(),
            "another file"
        );
        drop(second);
        RuntimeDir::open(&scratch.0).unwrap();
    }

    #[test]
    fn a_directory_of_others_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let scratch = Scratch::new();
        fs::create_dir(&scratch.0).unwrap();
        fs::set_permissions(&scratch.0, fs::Permissions::from_mode(0o777)).unwrap();
        let error = RuntimeDir::open(&scratch.0).unwrap_err();
        assert!(matches!(error, RuntimeDirError::Foreign(_)), "{error}");
    }
}
