//! A daemon that leaves itself to its service manager ends, whether whoever asked for that hears it
//! or not.
//!
//! ```text
//!  who asks ──► conversation ──► control task ──► service manager's store
//!                  ✋ stands still     ends all the same
//! ```

use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use ipmoved::internals::Role;
use ipmoved::lab::daemon::STOP_TIMEOUT;
use ipmoved::lab::{Lab, poll_until};

use crate::stage::{PATIENCE, Result, setup};
use crate::takeover::{Manager, failed};
use crate::tracee::{Tracee, threads};

/// How often it is tried to stop a conversation in time: it waits five seconds for its first word.
const TRIES: usize = 5;

/// How long something is looked for.
const LOOK: Duration = Duration::from_millis(10);

#[test]
fn who_does_not_hear_that_it_is_done_keeps_no_daemon_from_ending() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let manager = Manager::start(&lab)?;
    let service = manager.starts(&setup, Role::Old)?;
    let netns = || std::fs::metadata("/proc/thread-self/ns/net").map_err(failed);
    let inode = setup.host(Role::Old).run(|| Ok(netns()?.ino()))?;
    let dir = lab.dir().join("run").join(format!("net-{inode}"));
    let stopped = (0..TRIES).find_map(|_| stands_still(&dir.join("handover.sock"), service.id()));
    let stopped = stopped.ok_or_else(|| failed("no conversation could be stopped"))?;
    // It leaves everything, and ends. What is left of it then waits for whoever traces it.
    let ended = poll_until(PATIENCE, LOOK, || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", service.id())).ok()?;
        let state = stat.rsplit_once(") ")?.1.chars().next()?;
        (state == 'Z').then_some(())
    });
    drop(stopped);
    assert!(ended.is_some(), "it waits for who does not hear it");
    let ended = service.wait(STOP_TIMEOUT)?;
    assert!(ended.status.success(), "{ended:?}");
    let next = manager.starts(&setup, Role::Old)?;
    let log = next.stderr();
    assert!(log.contains("took over"), "{log}");
    Ok(())
}

/// Asks the daemon to leave itself to its manager, and stops the thread that is to say that it is
/// done, before it can; `None` if it was too late for that.
fn stands_still(socket: &Path, daemon: u32) -> Option<(Tracee, UnixStream)> {
    let mut asks = UnixStream::connect(socket).ok()?;
    let in_call = |number: libc::c_long| {
        let number = number.to_string();
        let in_it = |tid: libc::pid_t| {
            let call = std::fs::read_to_string(format!("/proc/{daemon}/task/{tid}/syscall"));
            call.is_ok_and(|call| call.split(' ').next() == Some(&*number))
        };
        poll_until(PATIENCE, LOOK, || {
            let all = threads(daemon).ok()?;
            all.into_iter().map(|(tid, _)| tid).find(|&tid| in_it(tid))
        })
    };
    // The conversation alone receives in a call that waits.
    let conversation = in_call(libc::SYS_recvmsg)?;
    let all = Tracee::stop(libc::pid_t::try_from(daemon).ok()?).ok()?;
    writeln!(asks, r#"{{"ask":"store"}}"#).ok()?;
    // It has heard it, and waits for the control task.
    let waits = poll_until(PATIENCE, LOOK, || {
        let path = format!("/proc/{daemon}/task/{conversation}/syscall");
        let call = std::fs::read_to_string(path).ok()?;
        (call.split(' ').next() == Some(&*libc::SYS_futex.to_string())).then_some(())
    });
    waits?;
    let stopped = Tracee::stop(conversation).ok()?;
    drop(all);
    Some((stopped, asks))
}
