//! What goes on when a daemon takes over from another: what was read again, and what leaves because
//! of it; the mode of each move; who came; connections that begin on the new server; and whoever
//! looks at the daemon meanwhile.
//!
//! ```text
//!                                  ┌── old server, holds 192.0.2.5 and 192.0.2.6 ──► next daemon
//!  clients ─(tap)───────── router ─┤              ║
//!                                  └── new server 198.51.100.2 ──► next daemon
//! ```

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use ipmoved::internals::Role;
use ipmoved::lab::daemon::{STOP_TIMEOUT, UP_TIMEOUT};
use ipmoved::lab::topology::{
    CLIENT, Leg, MOVED, MOVED6, NEW, SECOND_CLIENT, UPLINK, moved as nth_moved,
};
use ipmoved::lab::{
    Client, DaemonSetup, Lab, LabError, Namespace, Process, Service, Snapshot, poll_until,
};
use rustix::process::Signal;
use serde_json::Value;

use crate::outgoing::until_bound;
use crate::stage::{FAMILIES, PATIENCE, RECOVERY, Result, setup, split};
use crate::takeover::{Manager, failed, take_over};

const PAUSE: Duration = Duration::from_millis(50);

/// How long what leaves may take to be gone.
const SOON: Duration = Duration::from_secs(20);

/// Waits until something is so.
fn until(what: &str, patience: Duration, is: impl Fn() -> Result<bool>) -> Result {
    let reached = poll_until(patience, PAUSE, || is().ok()?.then_some(()));
    reached.ok_or_else(|| LabError::unexpected(format!("not so: {what}")))
}

/// The mode of each move of the only tunnel.
fn modes(setup: &DaemonSetup<'_>) -> Result<Vec<Value>> {
    let status = setup.status(Role::Old)?;
    let modes = status.tunnel()["modes"].as_array();
    Ok(modes.cloned().unwrap_or_default())
}

fn succeeds(setup: &DaemonSetup<'_>, role: Role, args: &[&str]) -> Result<String> {
    let said = setup.run(role, args)?;
    match said.status.success() {
        true => Ok(said.stdout),
        false => Err(LabError::unexpected(format!("{args:?}: {said:?}"))),
    }
}

/// The old server with a configuration file, whose daemon takes over, is killed, and starts again.
struct Old<'lab> {
    setup: DaemonSetup<'lab>,
    file: std::path::PathBuf,
}

impl Old<'_> {
    fn write(&self, moves: &[Ipv4Addr]) -> Result {
        let names: Vec<String> = moves.iter().map(ToString::to_string).collect();
        let text = format!(
            "[[peers]]\npeer = \"{NEW}\"\npsk-file = {:?}\nmove = {names:?}\n",
            self.setup.psk_file(Role::Old)
        );
        std::fs::write(&self.file, text).map_err(failed)?;
        let private = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(&self.file, private).map_err(failed)
    }

    fn start(&self, args: &[&str]) -> Result<Process> {
        let mut command = self.setup.command();
        command.arg("--config").arg(&self.file).args(args);
        self.setup.host(Role::Old).spawn(command)
    }

    /// Waits until this process is the daemon that runs, and its tunnel is up.
    fn until_up(&self, process: &Process) -> Result {
        until("a tunnel that is up", UP_TIMEOUT, || {
            let status = self.setup.status(Role::Old)?;
            Ok(status.0["pid"] == process.id() && status.state() == "up")
        })
    }
}

#[test]
fn what_was_read_again_goes_on_and_so_does_what_leaves() -> Result {
    let lab = Lab::builder().moved(2).build()?;
    let before = Snapshot::of(lab.old_server())?;
    let setup = setup(&lab)?;
    let (first, second) = (MOVED, nth_moved(1));
    let old = Old {
        setup: setup.clone(),
        file: lab.dir().join("old.toml"),
    };
    old.write(&[first])?;
    let mut new = setup.start(Role::New)?;
    let daemon = old.start(&[])?;
    old.until_up(&daemon)?;
    new.wait_until_up()?;
    let _application = Service::start(lab.new_server(), NEW)?;
    let _own = Service::start(lab.old_server(), first)?;
    let mut leaves = lab.client().converse(first)?;
    leaves.exchange(b"before", PATIENCE)?;

    // The first moves no more, and the second does.
    old.write(&[second])?;
    succeeds(&setup, Role::Old, &["reload"])?;
    let mut stays = lab.client().converse(second)?;
    stays.exchange(b"reloaded", PATIENCE)?;
    let leaving = || -> Result<bool> {
        let is = |it: &Value| it["what"] == first.to_string() && it["leaving"] == true;
        Ok(modes(&setup)?.iter().any(is))
    };
    assert!(leaving()?, "{:?}", modes(&setup)?);
    let tap = lab.tap(Leg::Clients)?;

    let next = old.start(&["--takeover"])?;
    let ended = daemon.wait(STOP_TIMEOUT)?;
    assert!(ended.status.success(), "{ended:?}");
    old.until_up(&next)?;
    assert!(leaving()?, "{:?}", modes(&setup)?);
    for conversation in [&mut leaves, &mut stays] {
        conversation.exchange(b"taken over", PATIENCE)?;
    }
    lab.client().get(first)?.is_answered_by(first)?;
    lab.client().get(second)?.is_answered_by(NEW)?;

    // A crash changes nothing of it either.
    next.signal(Signal::KILL)?;
    next.wait(STOP_TIMEOUT)?;
    let last = old.start(&[])?;
    old.until_up(&last)?;
    assert!(leaving()?, "{:?}", modes(&setup)?);
    for conversation in [&mut leaves, &mut stays] {
        conversation.exchange(b"after a crash", RECOVERY)?;
    }
    lab.client().get(first)?.is_answered_by(first)?;
    assert_eq!(tap.stop()?.refusals_from(first), 0);

    // It ends with what the new server has of it.
    drop(leaves);
    until("nothing leaves any more", SOON, || Ok(!leaving()?))?;
    stays.exchange(b"still", PATIENCE)?;
    last.signal(Signal::TERM)?;
    let ended = last.wait(STOP_TIMEOUT)?;
    assert!(ended.status.success(), "{ended:?}");
    Snapshot::of(lab.old_server())?.is_same_as(&before)
}

#[test]
fn a_daemon_that_is_stopped_leaves_nothing_to_the_next_one() -> Result {
    let lab = Lab::builder().moved(2).build()?;
    let setup = setup(&lab)?;
    let (first, second) = (MOVED, nth_moved(1));
    let old = Old {
        setup: setup.clone(),
        file: lab.dir().join("old.toml"),
    };
    let _new = setup.start(Role::New)?;
    old.write(&[first, second])?;
    let daemon = old.start(&[])?;
    old.until_up(&daemon)?;
    daemon.signal(Signal::TERM)?;
    daemon.wait(STOP_TIMEOUT)?;
    old.write(&[second])?;
    let next = old.start(&[])?;
    old.until_up(&next)?;
    let modes = modes(&setup)?;
    let named: Vec<&Value> = modes.iter().map(|it| &it["what"]).collect();
    assert_eq!(named, [&Value::from(second.to_string())]);
    Ok(())
}

/// By systemd's way, the one of the two that allows it: whoever waits asks again by themselves.
#[test]
fn a_hold_lasts_over_a_restart_and_a_share_keeps_its_clients() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let manager = Manager::start(&lab)?;
    let mut new = setup.start(Role::New)?;
    let service = manager.starts(&setup, Role::Old)?;
    new.wait_until_up()?;
    let _there = Service::start(lab.new_server(), NEW)?;
    let _here = Service::start(lab.old_server(), MOVED)?;
    let restart = |service: Process| -> Result<Process> {
        succeeds(&setup, Role::Old, &["handover"])?;
        service.wait(STOP_TIMEOUT)?;
        let service = manager.starts(&setup, Role::Old)?;
        until("up", UP_TIMEOUT, || {
            Ok(setup.status(Role::Old)?.state() == "up")
        })?;
        Ok(service)
    };

    succeeds(&setup, Role::Old, &["hold", "--for", "600"])?;
    let waits = std::thread::scope(|scope| -> Result<_> {
        let client = lab.client();
        let waits = scope.spawn(move || client.converse(MOVED)?.exchange(b"served", RECOVERY));
        until("somebody waits", PATIENCE, || {
            Ok(modes(&setup)?[0]["waiting"] == 1)
        })?;
        let service = restart(service)?;
        let mode = modes(&setup)?.remove(0);
        assert_eq!(mode["mode"], "held", "{mode}");
        assert!(mode["held_s"].as_u64() > Some(300), "{mode}");
        succeeds(&setup, Role::Old, &["move"])?;
        waits.join().expect("no panic")?;
        Ok(service)
    });
    let service = waits?;

    let addresses: Vec<Ipv4Addr> = (100..112).map(|n| Ipv4Addr::new(203, 0, 113, n)).collect();
    for &addr in &addresses {
        lab.set_address(lab.clients(), UPLINK, addr, 24, true)?;
    }
    succeeds(&setup, Role::Old, &["move", "--percent", "50"])?;
    let servers = || -> Result<Vec<_>> {
        let client = |&addr| Client::new(lab.clients(), addr, MOVED6);
        let answers = addresses.iter().map(|addr| client(addr).get(MOVED));
        answers.map(|answer| Ok(answer?.server)).collect()
    };
    let before = servers()?;
    let _service = restart(service)?;
    assert_eq!(modes(&setup)?[0]["mode"], "shared");
    assert_eq!(servers()?, before);
    Ok(())
}

/// Asks again and again until it is to stop; how often that was.
fn again_and_again(stop: &AtomicBool, mut ask: impl FnMut() -> Result) -> Result<u32> {
    let mut asked = 0;
    while !stop.load(Relaxed) {
        ask()?;
        asked += 1;
    }
    Ok(asked)
}

fn scrape(host: &Namespace) -> Result {
    let metrics = SocketAddr::from(([127, 0, 0, 1], 9_185));
    host.run(|| {
        let mut stream = TcpStream::connect_timeout(&metrics, PATIENCE).map_err(failed)?;
        stream.set_read_timeout(Some(RECOVERY)).map_err(failed)?;
        (stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")).map_err(failed)?;
        let mut text = String::new();
        stream.read_to_string(&mut text).map_err(failed)?;
        match text.starts_with("HTTP/1.1 200 ") && text.contains("\nipmoved_") {
            true => Ok(()),
            false => Err(LabError::unexpected(format!("a scraper reads {text:?}"))),
        }
    })
}

/// Whoever comes in between waits for the next daemon, and whoever was let in gets an answer.
#[test]
fn nobody_who_looks_at_a_daemon_meanwhile_is_turned_away() -> Result {
    for role in [Role::Old, Role::New] {
        let lab = Lab::new()?;
        let setup = setup(&lab)?.args(role, &["--metrics", "9185"]);
        let _application = Service::start(lab.new_server(), NEW)?;
        let daemons = setup.start_both()?;
        let mut talk = lab.client().converse(MOVED)?;
        talk.exchange(b"a flow", PATIENCE)?;
        let (one, _other) = split(daemons, role);
        let stop = AtomicBool::new(false);
        let asked = std::thread::scope(|scope| -> Result<_> {
            let flows = scope.spawn(|| {
                again_and_again(&stop, || {
                    let said = succeeds(&setup, role, &["flows", "--json"])?;
                    match said.contains("\"established\"") {
                        true => Ok(()),
                        false => Err(LabError::unexpected(said)),
                    }
                })
            });
            let status = scope
                .spawn(|| again_and_again(&stop, || succeeds(&setup, role, &["status"]).map(drop)));
            let scraper = scope.spawn(|| again_and_again(&stop, || scrape(setup.host(role))));
            // A command is done, or refused with what to do; the new server has none of these.
            let commands = scope.spawn(|| {
                again_and_again(&stop, || {
                    let said = setup.run(role, &["move"])?;
                    let refused = said.stderr.contains("about to take over: try again");
                    match said.status.success() || refused || role == Role::New {
                        true => Ok(()),
                        false => Err(LabError::unexpected(format!("{said:?}"))),
                    }
                })
            });
            let work = || -> Result<_> {
                scrape(setup.host(role))?;
                let mut next = take_over(&setup, role, one)?;
                next.wait_until_up()?;
                talk.exchange(b"goes on", PATIENCE)?;
                let next = take_over(&setup, role, next)?;
                succeeds(&setup, role, &["flows"])?;
                Ok(next)
            };
            let last = work();
            stop.store(true, Relaxed);
            let all = [flows, status, scraper, commands];
            let asked = all.map(|it| it.join().expect("no panic"));
            last?;
            asked.into_iter().collect::<Result<Vec<_>>>()
        })?;
        assert!(asked.iter().all(|&asked| asked > 0), "{asked:?}");
    }
    Ok(())
}

/// Their bytes are those of the last look at each, some seconds before.
#[test]
fn who_came_is_recorded_once_whenever_they_began() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let _application = Service::start(lab.new_server(), NEW)?;
    let daemons = setup.start_both()?;
    let who = |client: &str| -> Result<Value> {
        let said = succeeds(&setup, Role::Old, &["stragglers", "--json"])?;
        let json: Value = serde_json::from_str(&said).map_err(failed)?;
        let mut all = json["stragglers"].as_array().into_iter().flatten();
        Ok(all
            .find(|it| it["client"] == client)
            .cloned()
            .unwrap_or_default())
    };
    let client = CLIENT.to_string();
    let mut known = lab.client().converse(MOVED)?;
    known.exchange(&[1; 1_000], PATIENCE)?;
    until("the first one is recorded", SOON, || {
        Ok(who(&client)?["connections"] == 1)
    })?;
    // Nothing of the second one is in the database when the next daemon takes over.
    let mut begun = lab.client().converse(MOVED)?;
    begun.exchange(&[2; 1_000], PATIENCE)?;
    let (old, _new) = split(daemons, Role::Old);
    let mut next = take_over(&setup, Role::Old, old)?;
    next.wait_until_up()?;
    for talk in [&mut known, &mut begun] {
        talk.exchange(&[3; 1_000], PATIENCE)?;
    }
    // Whoever comes last is recorded last.
    lab.second_client().get(MOVED)?;
    until("the last one is recorded", SOON, || {
        Ok(who(&SECOND_CLIENT.to_string())?["connections"] == 1)
    })?;
    let who = who(&client)?;
    for field in ["connections", "answered", "went_on"] {
        assert_eq!(who[field], 2, "{field}: {who}");
    }
    Ok(())
}

#[test]
fn connections_that_begin_on_the_new_server_go_on() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?
        .moves(&FAMILIES)
        .accept_what_moves()
        .args(Role::New, &["--outgoing"])
        .args(Role::Old, &["--allow-outgoing"]);
    let mut daemons = setup.start_both()?;
    until_bound(&lab)?;
    let _mail = Service::start(lab.clients(), (CLIENT, 25))?;
    let program = Client::new(lab.new_server(), MOVED, MOVED6);
    let mut talk = program.converse((CLIENT, 25))?;
    talk.exchange(b"before", PATIENCE)?;
    let listener = lab
        .clients()
        .run(|| std::net::TcpListener::bind((CLIENT, 27)).map_err(failed))?;
    let silent = program.connect((CLIENT, 27))?;
    let (mut remote, from) = listener.accept().map_err(failed)?;
    assert_eq!(from.ip(), MOVED);
    let tap = lab.tap(Leg::New)?;
    for (round, role) in [Role::Old, Role::New, Role::Old].into_iter().enumerate() {
        let (one, other) = split(daemons, role);
        let next = take_over(&setup, role, one)?;
        daemons = crate::stage::join(role, next, other);
        daemons.wait_until_up()?;
        // The remote speaks first, and is no client.
        let word = [round as u8; 100];
        remote.write_all(&word).map_err(failed)?;
        silent.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
        let mut heard = [0; 100];
        (&silent).read_exact(&mut heard).map_err(failed)?;
        assert_eq!(heard, word);
        talk.exchange(b"goes on", PATIENCE)?;
        assert_eq!(program.get((CLIENT, 25))?.client_seen.ip(), MOVED);
    }
    let bare = tap.stop()?.packets_with(MOVED);
    assert_eq!(
        bare, 0,
        "nothing leaves the new server's uplink as the moved address"
    );
    Ok(())
}
