//! The daemon as a service: what it tells its manager and its administrator while it runs.
//!
//! ```text
//! service manager's socket ◄── daemon on the new server ◄── old server ◄── client
//! ```

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use ipmoved::internals::{Netlink, Role};
use ipmoved::lab::daemon::{STOP_TIMEOUT, UP_TIMEOUT};
use ipmoved::lab::topology::{Leg, MOVED, NEW};
use ipmoved::lab::{Daemon, DaemonSetup, Lab, LabError, Namespace, patience, poll_until};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::Signal;
use rustix::thread::CapabilitySet;

use crate::stage::{PATIENCE, Result, moved, setup};
use crate::tracee::{Tracee, threads};

#[test]
fn the_service_manager_is_told_when_all_is_ready_what_is_up_and_when_it_ends() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let manager = Manager::new(&lab)?;
    let mut command = setup.command();
    command.args(setup.daemon_args(Role::New));
    command.env("NOTIFY_SOCKET", manager.path());
    let new = lab.new_server().spawn(command)?;
    manager.hears("READY=1\nSTATUS=tunnel to old server 192.0.2.1:51850: connecting\n")?;
    let old = setup.start(Role::Old)?;
    manager.hears("STATUS=tunnel to old server 192.0.2.1:51850: up")?;
    // It is the first line of what `status` says.
    let said = setup.run(Role::New, &["status"])?.stdout;
    let first = said.lines().next().unwrap_or_default();
    assert!(
        first.starts_with("tunnel to old server 192.0.2.1:51850: up"),
        "{said}"
    );
    old.terminate()?;
    manager.hears("STATUS=tunnel to old server 192.0.2.1:51850: stopped: its daemon")?;
    new.signal(Signal::TERM)?;
    manager.hears("STOPPING=1\n")?;
    let said = new.wait(STOP_TIMEOUT)?;
    assert!(said.status.success(), "{said:?}");
    Ok(())
}

/// What a service manager hears while a thread of a daemon hangs, whichever it is.
#[test]
fn the_watchdog_is_fed_while_every_thread_does_its_work() -> Result {
    let nat = ["nat", "--move", "192.0.2.5", "--to", "198.51.100.2"];
    for (arguments, role, hangs) in [
        (None, Role::New, ["lane-0", "ipmoved"]),
        (Some(nat), Role::Old, ["nat", "ipmoved"]),
    ] {
        let lab = Lab::new()?;
        let setup = setup(&lab)?;
        let manager = Manager::new(&lab)?;
        let mut command = setup.command();
        match arguments {
            Some(arguments) => command.args(arguments),
            None => command.args(setup.daemon_args(role)),
        };
        command.env("NOTIFY_SOCKET", manager.path());
        command.env("WATCHDOG_USEC", "1500000");
        let daemon = setup.host(role).spawn(command)?;
        for hang in hangs {
            (0..3).try_for_each(|_| manager.hears(FED))?;
            let threads = threads(daemon.id())?;
            let thread = threads.iter().find(|(_, name)| name == hang);
            let (tid, _) = thread.expect("a thread of that name");
            let stopped = Tracee::stop(*tid)?;
            manager.hears_no_more(FED)?;
            drop(stopped);
        }
        manager.hears(FED)?;
    }
    Ok(())
}

/// The word that the watchdog waits for.
const FED: &str = "WATCHDOG=1\n";

#[test]
fn a_change_that_somebody_takes_away_is_made_again_and_status_says_so() -> Result {
    moved(|on| {
        take_away(on.lab.old_server())?;
        says_so(&on.daemons.old)?;
        on.lab.client().get(MOVED)?;
        Ok(())
    })
}

#[test]
fn in_mode_nat_status_says_so_too() -> Result {
    let lab = Lab::new()?;
    let nat = ["--move", "192.0.2.5", "--to", "198.51.100.2"];
    let daemon = setup(&lab)?.start_nat(&nat)?;
    let started = poll_until(UP_TIMEOUT, Duration::from_millis(50), || {
        daemon.status().ok().map(drop)
    });
    assert!(started.is_some(), "it does not run");
    take_away(lab.old_server())?;
    says_so(&daemon)
}

/// As the systemd unit starts the daemon: without the capability to find the kernel's memory of
/// flows by itself.
#[test]
fn the_service_manager_keeps_the_memory_of_flows_over_a_crash() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let manager = Manager::new(&lab)?;
    let mut old = setup.start(Role::Old)?;
    let listen = || UdpSocket::bind((NEW, 7_000)).map_err(failed);
    let application = lab.new_server().run(listen)?;
    application
        .set_read_timeout(Some(patience(PATIENCE)))
        .map_err(failed)?;
    let client = lab.client().udp_socket((MOVED, 7_000))?;

    let first = lab
        .new_server()
        .spawn(service(&setup, Role::New, manager.path(), &[]))?;
    let kept = manager.is_given()?;
    assert!(!kept.is_empty(), "nothing to keep");
    let first_memory = maps(&kept)?;
    let up = "STATUS=tunnel to old server 192.0.2.1:51850: up";
    manager.hears(up)?;
    old.wait_until_up()?;
    client.send(b"push to me").map_err(failed)?;
    let (_, from) = application.recv_from(&mut [0; 100]).map_err(failed)?;
    first.signal(Signal::KILL)?;
    first.wait(STOP_TIMEOUT)?;

    let tap = lab.tap(Leg::New)?;
    let second = lab
        .new_server()
        .spawn(service(&setup, Role::New, manager.path(), &kept))?;
    let kept = manager.is_given()?;
    assert_eq!(maps(&kept)?, first_memory);
    manager.hears(up)?;
    // The old server may yet have to say what has moved.
    client.set_nonblocking(true).map_err(failed)?;
    let mut told = [0; 100];
    let heard = poll_until(PATIENCE, Duration::from_millis(100), || {
        application.send_to(b"pushed", from).ok()?;
        client.recv(&mut told).ok()
    });
    assert_eq!(heard, Some(b"pushed".len()));
    assert_eq!(tap.stop()?.frames_with(b"pushed"), 0);
    second.signal(Signal::TERM)?;
    second.wait(STOP_TIMEOUT)?;

    // After an orderly end nothing of it is true any more.
    let third = lab
        .new_server()
        .spawn(service(&setup, Role::New, manager.path(), &kept))?;
    let memory = maps(&manager.is_given()?)?;
    assert!(!memory.is_empty());
    assert!(memory.iter().all(|map| !first_memory.contains(map)));
    third.signal(Signal::TERM)?;
    third.wait(STOP_TIMEOUT)?;
    Ok(())
}

/// Which of the kernel's maps these are.
fn maps(descriptors: &[OwnedFd]) -> Result<Vec<String>> {
    let id = |fd: &OwnedFd| {
        let path = format!("/proc/self/fdinfo/{}", fd.as_raw_fd());
        let told = std::fs::read_to_string(path).map_err(failed)?;
        let line = told.lines().find(|line| line.starts_with("map_id:"));
        line.map(str::to_owned)
            .ok_or_else(|| failed("it is no map"))
    };
    descriptors.iter().map(id).collect()
}

/// A daemon with the descriptors that its manager, who is told at this socket, has kept.
#[allow(
    unsafe_code,
    reason = "what a service manager does between fork and exec"
)]
pub(crate) fn service<'a>(
    setup: &DaemonSetup<'_>,
    role: Role,
    manager: &Path,
    kept: impl IntoIterator<Item = &'a OwnedFd>,
) -> Command {
    /// `SD_LISTEN_FDS_START`.
    const FIRST: i32 = 3;
    // Beyond the places where they belong, so that none overwrites another.
    let beyond = |fd| rustix::io::fcntl_dupfd_cloexec(fd, 200).expect("descriptors are left");
    let kept: Vec<OwnedFd> = kept.into_iter().map(beyond).collect();
    let mut command = setup.beside("sh");
    command
        .args(["-c", r#"LISTEN_PID=$$ exec "$@""#, "sh"])
        .arg(setup.command().get_program())
        .args(setup.daemon_args(role))
        .env("NOTIFY_SOCKET", manager)
        .env("LISTEN_FDS", kept.len().to_string());
    let start = move || {
        for (fd, place) in kept.iter().zip(FIRST..) {
            // SAFETY: a plain system call; whatever stood there is not used before exec.
            if unsafe { libc::dup2(fd.as_raw_fd(), place) } < 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        // As under the unit.
        rustix::thread::remove_capability_from_bounding_set(CapabilitySet::SYS_ADMIN)?;
        Ok(())
    };
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; the closure makes
    // bare system calls.
    unsafe { command.pre_exec(start) };
    command
}

/// The socket on which a service manager hears from its service.
struct Manager(UnixDatagram, std::path::PathBuf);

impl Manager {
    fn new(lab: &Lab) -> Result<Self> {
        let path = lab.dir().join("notify");
        let socket = UnixDatagram::bind(&path).map_err(failed)?;
        socket.set_read_timeout(Some(UP_TIMEOUT)).map_err(failed)?;
        Ok(Self(socket, path))
    }

    fn path(&self) -> &Path {
        &self.1
    }

    /// Waits until this message, which came every half second, comes no more.
    fn hears_no_more(&self, wanted: &str) -> Result {
        let quiet = self.0.set_read_timeout(Some(Duration::from_secs(3)));
        quiet.map_err(failed)?;
        let mut told = [0; 1_000];
        // A hang is not believed for five seconds.
        let mut left = 20;
        while let Ok(length) = self.0.recv(&mut told) {
            left -= u32::from(told[..length] == *wanted.as_bytes());
            if left == 0 {
                return Err(LabError::unexpected("the daemon says that all is well"));
            }
        }
        self.0.set_read_timeout(Some(UP_TIMEOUT)).map_err(failed)
    }

    /// Waits until it is given descriptors to keep.
    fn is_given(&self) -> Result<Vec<OwnedFd>> {
        loop {
            let (mut text, mut space) = ([0; 1_000], [MaybeUninit::uninit(); 512]);
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut text = [IoSliceMut::new(&mut text)];
            recvmsg(&self.0, &mut text, &mut ancillary, RecvFlags::empty()).map_err(failed)?;
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(given) = message {
                    return Ok(given.collect());
                }
            }
        }
    }

    /// Waits until it receives a message that begins so.
    fn hears(&self, wanted: &str) -> Result {
        let mut told = [0; 1_000];
        loop {
            let length = self.0.recv(&mut told).map_err(failed)?;
            if told[..length].starts_with(wanted.as_bytes()) {
                return Ok(());
            }
        }
    }
}

/// Removes every program of a host, as somebody would who sets up traffic control anew.
fn take_away(host: &Namespace) -> Result {
    host.run(|| {
        let netlink = Netlink::new().map_err(failed)?;
        let links = netlink.links().map_err(failed)?;
        for link in links.iter().filter(|link| !link.loopback) {
            if netlink.has_clsact(link.index).map_err(failed)? {
                netlink.delete_clsact(link.index).map_err(failed)?;
            }
        }
        Ok(())
    })
}

/// Waits until `status` shows that the daemon has made something again.
fn says_so(daemon: &Daemon<'_>) -> Result {
    let said = poll_until(3 * PATIENCE, Duration::from_millis(200), || {
        let status = daemon.status().ok()?;
        let warnings = status.0["warnings"].as_array()?.clone();
        let said = |line: &serde_json::Value| line.to_string().contains("it is back");
        warnings.iter().any(said).then_some(())
    });
    said.ok_or_else(|| LabError::unexpected("status says nothing of it"))
}

fn failed(error: impl std::fmt::Display) -> LabError {
    LabError::unexpected(error.to_string())
}
