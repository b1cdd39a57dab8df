//! The daemon as a service: what it tells its manager and its administrator while it runs.
//!
//! ```text
//! service manager's socket ◄── daemon on the new server ◄── old server ◄── client
//! ```

use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use ipmoved::internals::{Netlink, Role};
use ipmoved::lab::daemon::{STOP_TIMEOUT, UP_TIMEOUT};
use ipmoved::lab::{Daemon, Lab, LabError, Namespace, poll_until};
use rustix::process::Signal;

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
    manager.hears("READY=1\nSTATUS=new server, 0 of 1 tunnels up\n")?;
    let _old = setup.start(Role::Old)?;
    manager.hears("STATUS=new server, 1 of 1 tunnels up\n")?;
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
        on.lab.client().get(ipmoved::lab::topology::MOVED)?;
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

/// The socket on which a service manager hears from its service.
struct Manager(UnixDatagram, std::path::PathBuf);

impl Manager {
    fn new(lab: &Lab) -> Result<Self> {
        let path = lab.dir().join("notify");
        let socket = UnixDatagram::bind(&path).map_err(failed)?;
        socket.set_read_timeout(Some(UP_TIMEOUT)).map_err(failed)?;
        Ok(Self(socket, path))
    }

    fn path(&self) -> &std::path::Path {
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

    /// Waits until it receives this message.
    fn hears(&self, wanted: &str) -> Result {
        let mut told = [0; 1_000];
        loop {
            let length = self.0.recv(&mut told).map_err(failed)?;
            if told[..length] == *wanted.as_bytes() {
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
