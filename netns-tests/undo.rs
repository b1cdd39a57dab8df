//! The kernel is left as it was found.
//!
//! ```text
//!                          ┌── old server   (snapshot before and after)
//!  clients ────── router ──┤       ║ tunnel
//!                          └── new server   (snapshot before and after)
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use ipmoved::internals::Role;
use ipmoved::lab::daemon::STOP_TIMEOUT;
use ipmoved::lab::topology::{MOVED, NEW, OLD};
use ipmoved::lab::{Daemons, Lab, LabError, Service, Snapshot, poll_until};
use rustix::process::Signal;

use crate::stage::{MEGABYTE, PATIENCE, Result, setup};

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
fn after_sigkill_a_start_in_the_other_role_undoes_what_was_left() -> Result {
    undone(|lab, daemons| {
        daemons.old.kill()?;
        daemons.new.kill()?;
        let setup = setup(lab)?;
        for (role, peer, moves) in [(Role::Old, NEW, "--accept"), (Role::New, OLD, "--move")] {
            let mut command = setup.command();
            command.args(["--peer", &peer.to_string(), moves, "203.0.113.77"]);
            command.arg("--psk-file").arg(setup.psk_file(role));
            let daemon = setup.host(role).spawn(command)?;
            let runs = poll_until(PATIENCE, Duration::from_millis(20), || {
                setup.status(role).ok()
            });
            let status = runs.ok_or_else(|| {
                LabError::unexpected(format!("it does not start: {}", daemon.stderr()))
            })?;
            assert_eq!(status.tunnel()["role"], role.other().to_string());
            daemon.signal(Signal::TERM)?;
            let said = daemon.wait(PATIENCE)?;
            assert!(said.status.success(), "{said:?}");
        }
        Ok(())
    })
}

#[test]
fn cleanup_writes_nothing_that_a_journal_names_outside_of_net() -> Result {
    // Whoever took the daemon over wrote this: the file is to get the value "0".
    edited(1, |file| {
        format!(r#"{{"change":"sysctl","path":{file:?},"from":"0","to":"1"}},"#)
    })
}

#[test]
fn cleanup_undoes_what_it_knows_of_a_newer_journal() -> Result {
    edited(2, |_| {
        r#"{"change":"nft_table","name":"x","on":{"index":1,"name":"lo"}},"#.to_owned()
    })
}

/// Puts an entry into the journal of a killed daemon, as if of this version, and cleans up.
fn edited(version: u32, entry: impl FnOnce(&Path) -> String) -> Result {
    undone(|lab, daemons| {
        let file = lab.dir().join("somebodys");
        fs::write(&file, "1\n").map_err(failed)?;
        daemons.old.terminate()?;
        daemons.new.kill()?;
        let journal = journal(&lab.dir().join("run"))?;
        let text = fs::read_to_string(&journal).map_err(failed)?;
        let text = text
            .replace(
                r#""changes": ["#,
                &format!(r#""changes": [{}"#, entry(&file)),
            )
            .replace(r#""version": 1"#, &format!(r#""version": {version}"#));
        fs::write(&journal, &text).map_err(failed)?;
        let said = setup(lab)?.run(Role::New, &["cleanup"])?;
        assert_eq!(fs::read_to_string(&file).map_err(failed)?, "1\n");
        assert_eq!(
            said.status.code(),
            Some(1),
            "something was skipped: {said:?}"
        );
        assert!(said.stdout.contains("bpf ipmoved_reply"));
        let of_another = format!("the journal is of version {version}");
        assert_eq!(said.stderr.contains(&of_another), version != 1, "{said:?}");
        for line in [
            "entry 1 of the journal is skipped",
            "journal is kept as journal.aside",
        ] {
            assert!(said.stderr.contains(line), "{said:?}");
        }
        let aside = journal.with_file_name("journal.aside");
        assert_eq!(fs::read_to_string(aside).map_err(failed)?, text);
        let again = setup(lab)?.run(Role::New, &["cleanup"])?;
        assert!(again.status.success(), "a second time: {again:?}");
        Ok(())
    })
}

/// The only journal below a directory of run-time files.
fn journal(run: &Path) -> Result<PathBuf> {
    let dirs = fs::read_dir(run).map_err(failed)?;
    let mut journals = dirs.filter_map(|dir| Some(dir.ok()?.path().join("journal")));
    journals
        .find(|path| path.exists())
        .ok_or_else(|| LabError::unexpected("there is no journal"))
}

fn failed(error: std::io::Error) -> LabError {
    LabError::unexpected(error.to_string())
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
