//! The kernel is left as it was found.
//!
//! ```text
//!                          ┌── old server   (snapshot before and after)
//!  clients ────── router ──┤       ║ tunnel
//!                          └── new server   (snapshot before and after)
//! ```

use std::thread;
use std::time::Duration;

use ipmoved::internals::Role;
use ipmoved::lab::daemon::STOP_TIMEOUT;
use ipmoved::lab::topology::{MOVED, NEW};
use ipmoved::lab::{Daemons, Lab, Service, Snapshot, poll_until};
use rustix::process::Signal;

use crate::stage::{MEGABYTE, Result, setup};

#[test]
fn after_sigterm_everything_is_as_before() -> Result {
    undone(|_, daemons| daemons.terminate())
}

#[test]
fn after_sigint_everything_is_as_before() -> Result {
    undone(|_, daemons| {
        daemons.new.stop_by(Signal::INT)?;
        daemons.old.stop_by(Signal::INT).map(drop)
    })
}

#[test]
fn after_sigterm_at_any_moment_of_the_start_everything_is_as_before() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let before = [lab.old_server(), lab.new_server()].map(Snapshot::of);
    for millis in (0..60).step_by(4) {
        for role in [Role::Old, Role::New] {
            let mut daemon = setup.start(role)?;
            thread::sleep(Duration::from_millis(millis));
            daemon.process().signal(Signal::TERM)?;
            poll_until(STOP_TIMEOUT, Duration::from_millis(1), || {
                daemon.process().exited()
            })
            .expect("SIGTERM ends it");
        }
    }
    same(&lab, before)
}

#[test]
fn after_sigterm_no_file_is_left() -> Result {
    let lab = Lab::new()?;
    setup(&lab)?.start_both()?.terminate()?;
    assert!(!lab.dir().join("run").exists());
    Ok(())
}

#[test]
fn after_sigkill_cleanup_leaves_everything_as_before() -> Result {
    undone(|lab, daemons| {
        daemons.old.kill()?;
        daemons.new.kill()?;
        let setup = setup(lab)?;
        for role in [Role::Old, Role::New] {
            let said = setup.run(role, &["cleanup"])?;
            assert!(said.status.success(), "{said:?}");
            let again = setup.run(role, &["cleanup"])?;
            assert!(again.status.success(), "a second time: {again:?}");
        }
        assert!(!lab.dir().join("run").exists(), "a file is left");
        Ok(())
    })
}

#[test]
fn after_sigkill_the_next_start_undoes_what_was_left() -> Result {
    undone(|lab, daemons| {
        daemons.old.kill()?;
        daemons.new.kill()?;
        setup(lab)?.start_both()?.terminate()
    })
}

#[test]
fn what_the_administrator_had_before_stays() -> Result {
    let lab = Lab::new()?;
    for host in [lab.old_server(), lab.new_server()] {
        host.set_sysctls(&[
            ("ipv4/tcp_fwmark_accept", "1"),
            ("ipv4/fwmark_reflect", "1"),
            ("ipv4/conf/default/src_valid_mark", "1"),
        ])?;
    }
    let before = [lab.old_server(), lab.new_server()].map(Snapshot::of);
    setup(&lab)?.start_both()?.terminate()?;
    same(&lab, before)
}

/// Serves for a while, then lets `stop` end it.
fn undone(stop: impl FnOnce(&Lab, Daemons<'_>) -> Result) -> Result {
    let lab = Lab::new()?;
    let _application = Service::start(lab.new_server(), NEW)?;
    let before = [lab.old_server(), lab.new_server()].map(Snapshot::of);
    let daemons = setup(&lab)?.start_both()?;
    lab.client().get(MOVED)?.is_answered_by(NEW)?;
    lab.client().download(MOVED, MEGABYTE)?;
    for (host, before) in [lab.old_server(), lab.new_server()].iter().zip(&before) {
        let before = before.as_ref().expect("taken before");
        Snapshot::of(host)?.is_not_the_same_as(before)?;
    }
    stop(&lab, daemons)?;
    same(&lab, before)
}

fn same(lab: &Lab, before: [Result<Snapshot>; 2]) -> Result {
    for (host, before) in [lab.old_server(), lab.new_server()].iter().zip(before) {
        Snapshot::of(host)?.is_same_as(&before?)?;
    }
    Ok(())
}
