//! Either daemon may come first, go, crash and come back.
//!
//! ```text
//!                                        ┌── old server 192.0.2.1, daemon ✝
//!  client ─(tap)─────────────── router ──┤              ║
//!                                        └── new server 198.51.100.2, daemon ✝
//! ```

use std::thread;
use std::time::Duration;

use ipmoved::internals::Role;
use ipmoved::lab::topology::{Leg, MOVED, NEW};
use ipmoved::lab::{Daemon, Daemons, Lab, Probe, Service};

use crate::stage::{MEGABYTE, Moved, PATIENCE, RECOVERY, Result, SILENCE, moved, setup};

#[test]
fn the_old_server_may_start_first() -> Result {
    either_first(Role::Old)
}

#[test]
fn the_new_server_may_start_first() -> Result {
    either_first(Role::New)
}

fn either_first(first: Role) -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let _application = Service::start(lab.new_server(), NEW)?;
    let mut first_daemon = setup.start(first)?;
    first_daemon.wait_for_state("connecting", PATIENCE)?;
    // Longer than its first message waits for a response.
    thread::sleep(Duration::from_millis(1500));
    let mut second_daemon = setup.start(first.other())?;
    second_daemon.wait_until_up()?;
    first_daemon.wait_until_up()?;
    lab.client().get(MOVED)?.is_answered_by(NEW)?;
    Ok(())
}

#[test]
fn the_old_servers_daemon_may_be_stopped_and_started() -> Result {
    moved(|on| restarted(on, Role::Old))
}

#[test]
fn the_new_servers_daemon_may_be_stopped_and_started() -> Result {
    moved(|on| restarted(on, Role::New))
}

fn restarted(on: Moved<'_>, role: Role) -> Result {
    on.lab.client().get(MOVED)?.is_answered_by(NEW)?;
    let (stopped, mut other) = split(on.daemons, role);
    stopped.terminate()?;
    let mut again = on.setup.start(role)?;
    again.wait_until_up()?;
    other.wait_until_up()?;
    on.lab.client().get(MOVED)?.is_answered_by(NEW)?;
    on.lab.client().download(MOVED, MEGABYTE)?;
    Ok(())
}

#[test]
fn a_connection_lives_on_when_the_old_servers_daemon_is_killed() -> Result {
    moved(|on| lives_on(on, Role::Old))
}

#[test]
fn a_connection_lives_on_when_the_new_servers_daemon_is_killed() -> Result {
    moved(|on| lives_on(on, Role::New))
}

/// Kills and restarts the daemon. Meanwhile the moved address is silent: no reset, no ICMP.
fn lives_on(on: Moved<'_>, role: Role) -> Result {
    let mut conversation = on.lab.client().converse(MOVED)?;
    conversation.exchange(b"before", PATIENCE)?;
    let (killed, mut other) = split(on.daemons, role);
    let tap = on.lab.tap(Leg::Clients)?;
    killed.kill()?;
    conversation.say(b"meanwhile")?;
    let probe = on.lab.client().probe_tcp(MOVED, SILENCE)?;
    assert_eq!(probe, Probe::Silent);
    let probe = on.lab.client().probe_udp((MOVED, 53), SILENCE)?;
    assert_eq!(probe, Probe::Silent);
    let seen = tap.stop()?;
    assert_eq!(
        seen.refusals_from(MOVED),
        0,
        "the moved address was not silent"
    );
    assert_eq!(
        seen.refusals_from(NEW),
        0,
        "the new server gave itself away"
    );
    let mut again = on.setup.start(role)?;
    again.wait_until_up()?;
    other.wait_until_up()?;
    conversation.hear(b"meanwhile", RECOVERY)?;
    conversation.exchange(b"after", RECOVERY)?;
    on.lab.client().get(MOVED)?.is_answered_by(NEW)?;
    Ok(())
}

#[test]
fn a_connection_on_which_only_the_server_speaks_lives_on_too() -> Result {
    moved(|on| {
        let mut conversation = on.lab.client().converse(MOVED)?;
        conversation.exchange(b"before", PATIENCE)?;
        // The echo is on its way back when the daemon is gone.
        let (killed, _other) = split(on.daemons, Role::New);
        let words = vec![b'w'; 600_000];
        conversation.say(&words[..300_000])?;
        killed.kill()?;
        let mut again = on.setup.start(Role::New)?;
        again.wait_until_up()?;
        conversation.hear(&words[..300_000], RECOVERY)
    })
}

#[test]
fn a_download_survives_a_crash_on_the_old_server() -> Result {
    moved(|on| download_through_a_crash(on, Role::Old))
}

#[test]
fn a_download_survives_a_crash_on_the_new_server() -> Result {
    moved(|on| download_through_a_crash(on, Role::New))
}

fn download_through_a_crash(on: Moved<'_>, role: Role) -> Result {
    let client = on.lab.client();
    let (killed, _other) = split(on.daemons, role);
    thread::scope(|scope| {
        let download = scope.spawn(|| client.download(MOVED, 400 * MEGABYTE));
        thread::sleep(Duration::from_millis(150));
        assert!(!download.is_finished(), "too fast to be interrupted");
        killed.kill()?;
        let mut again = on.setup.start(role)?;
        again.wait_until_up()?;
        let done = download.join();
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            .map(drop)
    })
}

#[test]
fn both_daemons_may_be_killed_at_once() -> Result {
    moved(|on| {
        let mut conversation = on.lab.client().converse(MOVED)?;
        conversation.exchange(b"before", PATIENCE)?;
        on.daemons.old.kill()?;
        on.daemons.new.kill()?;
        conversation.say(b"meanwhile")?;
        let _daemons = on.setup.start_both()?;
        conversation.hear(b"meanwhile", RECOVERY)
    })
}

#[test]
fn a_path_that_was_cut_comes_back_by_itself() -> Result {
    moved(|on| {
        let mut conversation = on.lab.client().converse(MOVED)?;
        conversation.exchange(b"before", PATIENCE)?;
        on.lab.set_reachable(NEW, false)?;
        conversation.say(b"meanwhile")?;
        thread::sleep(Duration::from_secs(2));
        on.lab.set_reachable(NEW, true)?;
        conversation.hear(b"meanwhile", RECOVERY)
    })
}

/// Returns the daemon of that role, and the other.
fn split(daemons: Daemons<'_>, role: Role) -> (Daemon<'_>, Daemon<'_>) {
    match role {
        Role::Old => (daemons.old, daemons.new),
        Role::New => (daemons.new, daemons.old),
    }
}
