//! What somebody who has taken a running daemon over can do with it: each of its threads is made to
//! try, and the kernel's answers are read from its registers.
//!
//! ```text
//!  old server and new server, both daemons up; a debugger in the place of the intruder
//! ```

use ipmoved::lab::LabError;
use ipmoved::lab::topology::MOVED;

use crate::stage::{Result, moved};
use crate::tracee::{Tracee, threads};

/// Whoever takes the daemon over has its threads. Each is made to try.
#[test]
fn whoever_is_in_the_daemons_place_gets_nowhere() -> Result {
    moved(|on| {
        let mut daemons = on.daemons;
        for daemon in [&mut daemons.old, &mut daemons.new] {
            let pid = daemon.process().id();
            let threads = threads(pid)?;
            assert!(threads.len() >= 3, "{threads:?}");
            for (tid, name) in threads {
                let thread = Tracee::stop(tid)?;
                assert_eq!(
                    thread.call(libc::SYS_getpid, [0; 6])?,
                    Ok(pid.into()),
                    "{name}"
                );
                tries_files(&thread, &name)?;
                tries_calls(&thread, &name)?;
            }
        }
        // What it needs, it has: to go on, and to undo everything.
        on.lab.client().get(MOVED)?;
        daemons.old.terminate()?;
        daemons.new.terminate()?;
        Ok(())
    })
}

fn tries_files(thread: &Tracee, name: &str) -> Result {
    let open = |path: &str, flags: i32| {
        let arguments = [libc::AT_FDCWD as u64, 0, flags as u64, 0o600, 0, 0];
        thread.call_with_path(libc::SYS_openat, path, 1, arguments)
    };
    let new = libc::O_WRONLY | libc::O_CREAT;
    for (path, flags) in [
        ("/proc/sys/kernel/core_pattern", libc::O_WRONLY),
        ("/proc/sys/vm/drop_caches", libc::O_WRONLY),
        ("/etc/cron.d/ipmoved-test", new),
        ("/root/ipmoved-test", new),
        ("/run/ipmoved-test", new),
        ("/etc/passwd", libc::O_RDWR),
        ("/etc/shadow", libc::O_RDONLY),
        ("/proc/1/environ", libc::O_RDONLY),
        ("/dev/net/tun", libc::O_RDWR),
    ] {
        assert_eq!(open(path, flags)?, Err(libc::EACCES), "{name}: {path}");
    }
    let ours = open("/proc/sys/net/ipv4/fwmark_reflect", libc::O_RDWR)?;
    let ours = ours.map_err(|errno| LabError::unexpected(format!("{name}: errno {errno}")))?;
    assert_eq!(
        thread.call(libc::SYS_close, [ours as u64, 0, 0, 0, 0, 0])?,
        Ok(0)
    );
    Ok(())
}

fn tries_calls(thread: &Tracee, name: &str) -> Result {
    let chmod = thread.call_with_path(libc::SYS_chmod, "/bin/sh", 0, [0, 0o4755, 0, 0, 0, 0])?;
    assert_eq!(chmod, Err(libc::EPERM), "{name}: a set-user-id shell");
    let execve = thread.call_with_path(libc::SYS_execve, "/bin/sh", 0, [0; 6])?;
    assert_eq!(execve, Err(libc::EPERM), "{name}: a program");
    let netfilter = libc::NETLINK_NETFILTER as u64;
    for (call, [a, b, c]) in [
        (libc::SYS_unshare, [libc::CLONE_NEWUSER as u64, 0, 0]),
        (libc::SYS_clone, [libc::SIGCHLD as u64, 0, 0]),
        (libc::SYS_mount, [0; 3]),
        (libc::SYS_ptrace, [0; 3]),
        (libc::SYS_kill, [1, 0, 0]),
        (libc::SYS_socket, [libc::AF_NETLINK as u64, 2, netfilter]),
        (libc::SYS_bpf, [5, 0, 0]),
        // `getpid` by its x32 number.
        (libc::SYS_getpid | 0x4000_0000, [0; 3]),
    ] {
        let answer = thread.call(call, [a, b, c, 0, 0, 0])?;
        assert_eq!(answer, Err(libc::EPERM), "{name}: call {call}");
    }
    let clone3 = thread.call(libc::SYS_clone3, [0; 6])?;
    assert_eq!(clone3, Err(libc::ENOSYS), "{name}");
    Ok(())
}
