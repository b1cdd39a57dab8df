//! The end of a daemon that cannot hand itself over.
//!
//! Owns whom that may hit: the process that holds the lock of this network namespace, whatever pid
//! the file names, and none that carries no tunnel.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, pidfd_send_signal};
use tracing::warn;

use super::taking::{OF_A_MANAGER, process, running};
use crate::daemon::service::Result;

/// How long a killed daemon may take to be gone.
const GONE: Timespec = Timespec {
    tv_sec: 10,
    tv_nsec: 0,
};

/// Ends a daemon that cannot hand itself over, and holds this `lock`: what it has made in the
/// kernel stays, as after a crash, so that nothing is reset. The file names `pid`, which another
/// process may have by now, or in another PID namespace.
///
/// # Errors
/// If that cannot be done, or somebody would start it again.
pub(in crate::daemon) fn end(lock: &Path, pid: &str) -> Result<()> {
    let failed = |why: String| running(format!("the daemon that runs (pid {pid}): {why}"));
    let file = std::fs::metadata(lock).map_err(|error| failed(error.to_string()))?;
    let number: u32 = pid
        .parse()
        .map_err(|_| failed("its process is not known".into()))?;
    let process = process(number).map_err(|error| failed(error.to_string()))?;
    // From here on the number is that of this very process, while it lives.
    if !holds(number, &file) {
        let lock = lock.display();
        return Err(failed(format!(
            "this process does not hold {lock}, so nothing is killed; `lslocks | grep {lock}` \
             names the process that does: stop that, and start this one without --takeover"
        )));
    }
    let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    let mut variables = environment.split(|&byte| byte == 0);
    if variables.any(|it| it.starts_with(b"NOTIFY_SOCKET=")) {
        return Err(failed(OF_A_MANAGER.into()));
    }
    if is_of_nat(number) {
        return Err(failed(
            "it is one of `ipmoved nat`, which nothing can take over from: stop it, and \
             start this one without --takeover"
                .into(),
        ));
    }
    warn!(
        pid,
        "the daemon that runs is another version, which cannot hand itself over: killing it and \
         starting as after a crash; connections go on after a pause"
    );
    let killed = pidfd_send_signal(&process, Signal::KILL);
    killed.map_err(|error| failed(error.to_string()))?;
    let mut ended = [PollFd::new(&process, PollFlags::IN)];
    match poll(&mut ended, Some(&GONE)) {
        Ok(1..) => Ok(()),
        Ok(0) | Err(_) => Err(failed("it does not end".into())),
    }
}

/// Whether a process holds the lock of this file (proc_pid_fdinfo(5)).
fn holds(pid: u32, file: &Metadata) -> bool {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd"));
    let mut entries = entries.into_iter().flatten().flatten();
    entries.any(|entry| {
        let open = std::fs::metadata(entry.path());
        let is_it = open.is_ok_and(|it| (it.dev(), it.ino()) == (file.dev(), file.ino()));
        let number = entry.file_name();
        let info = Path::new("/proc").join(pid.to_string()).join("fdinfo");
        let told = || std::fs::read_to_string(info.join(number)).unwrap_or_default();
        let is_lock = |line: &str| line.starts_with("lock:") && line.contains("FLOCK");
        is_it && told().lines().any(is_lock)
    })
}

/// Whether it is a daemon of `ipmoved nat`. No flag can stand before that word.
fn is_of_nat(pid: u32) -> bool {
    let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    words.split(|&byte| byte == 0).nth(1) == Some(b"nat")
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use rustix::fs::{FlockOperation, flock};

    use super::*;

    #[test]
    fn only_who_holds_the_lock_is_ended() {
        let this = std::process::id();
        let path = std::env::temp_dir().join(format!("ipmoved-lock-{this}"));
        let file = File::create(&path).unwrap();
        let metadata = file.metadata().unwrap();
        assert!(!holds(this, &metadata), "open, and free");
        let refused = end(&path, &this.to_string()).unwrap_err().to_string();
        assert!(refused.contains("nothing is killed"), "{refused}");
        flock(&file, FlockOperation::LockExclusive).unwrap();
        assert!(holds(this, &metadata));
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        assert!(!holds(child.id(), &metadata), "another process");
        child.kill().and_then(|()| child.wait().map(drop)).unwrap();
        drop(file);
        std::fs::remove_file(&path).unwrap();
    }
}
