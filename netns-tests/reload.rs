//! A changed configuration, read again by a daemon that carries packets.
//!
//! ```text
//!            ┌── old server 192.0.2.1, holds 192.0.2.5, 192.0.2.6 (moved or not) ══╗
//!  clients ──┤                                                                     ╠══ new server
//!            └── old server 1: 198.18.1.1, holds 198.18.1.5 (moved) ═══════════════╝ 198.51.100.2
//! ```

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use ipmoved::internals::Role;
use ipmoved::lab::daemon::write_psk;
use ipmoved::lab::topology::{
    CLIENT, MOVED, MOVED6, NEW, OLD, more_moved, more_old, moved as nth_moved,
};
use ipmoved::lab::{
    Client, Conversation, Lab, LabError, Output, Probe, Process, Service, Snapshot, poll_until,
};
use rustix::process::Signal;
use serde_json::Value;

use crate::stage::{MEGABYTE, PATIENCE, RECOVERY, Result, setup};

const OFTEN: Duration = Duration::from_millis(20);

/// How long a daemon may take to start, or what leaves to be gone.
const SOON: Duration = Duration::from_secs(20);

/// Both servers, each with a configuration file.
struct Bed<'lab> {
    lab: &'lab Lab,
    /// The old server's daemon.
    old: Process,
    /// The new server's daemon.
    new: Process,
}

fn psk(lab: &Lab, name: &str) -> Result<PathBuf> {
    let path = lab.dir().join(format!("psk-{name}"));
    if !path.exists() {
        write_psk(&path)?;
    }
    Ok(path)
}

fn file(lab: &Lab, role: Role) -> PathBuf {
    lab.dir().join(format!("{role}.toml"))
}

/// Writes a configuration as careful editors do: in place of the one before, by one of another
/// name.
fn write(lab: &Lab, role: Role, text: &str) -> Result {
    let failed = |error: std::io::Error| LabError::unexpected(error.to_string());
    let next = lab.dir().join("next.toml");
    fs::write(&next, text).map_err(failed)?;
    fs::set_permissions(&next, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    fs::rename(&next, file(lab, role)).map_err(failed)
}

/// A peer's settings: where it is, the name of its key, and more.
fn peer(lab: &Lab, at: impl Into<IpAddr>, key: &str, more: &str) -> Result<String> {
    let (at, key) = (at.into(), psk(lab, key)?);
    Ok(format!(
        "[[peers]]\npeer = \"{at}\"\npsk-file = {key:?}\n{more}\n"
    ))
}

/// The settings of the old server that moves these to the new one.
fn moves(lab: &Lab, moves: &[Ipv4Addr]) -> Result<String> {
    let names: Vec<String> = moves.iter().map(|it| format!("{it}")).collect();
    peer(lab, NEW, "a", &format!("move = {names:?}"))
}

/// The settings of the new server that accepts these of the old one.
fn accepts(lab: &Lab, accept: &[Ipv4Addr]) -> Result<String> {
    let names: Vec<String> = accept.iter().map(|it| format!("{it}")).collect();
    peer(lab, OLD, "a", &format!("accept = {names:?}"))
}

impl<'lab> Bed<'lab> {
    fn start(lab: &'lab Lab, old: &str, new: &str) -> Result<Self> {
        let run = |role, text| {
            write(lab, role, text)?;
            let mut command = setup(lab)?.command();
            command.arg("--config").arg(file(lab, role));
            setup(lab)?.host(role).spawn(command)
        };
        let bed = Self {
            lab,
            old: run(Role::Old, old)?,
            new: run(Role::New, new)?,
        };
        bed.wait(Role::Old, |tunnels| {
            tunnels.iter().any(|it| it["state"] == "up")
        })?;
        bed.wait(Role::New, |tunnels| {
            tunnels.iter().any(|it| it["moved"][0].is_string())
        })?;
        Ok(bed)
    }

    fn tunnels(&self, role: Role) -> Result<Vec<Value>> {
        let status = setup(self.lab)?.status(role)?;
        Ok(status.0["tunnels"].as_array().cloned().unwrap_or_default())
    }

    fn wait(&self, role: Role, is: impl Fn(&[Value]) -> bool) -> Result {
        let reached = poll_until(SOON, OFTEN, || {
            let tunnels = self.tunnels(role).ok()?;
            is(&tunnels).then_some(())
        });
        reached.ok_or_else(|| {
            LabError::unexpected(format!(
                "{:#?}\nold: {}\nnew: {}",
                self.tunnels(role),
                self.old.stderr(),
                self.new.stderr()
            ))
        })
    }

    /// Writes a configuration, and has it read. Returns what was printed.
    fn reload(&self, role: Role, text: &str) -> Result<String> {
        write(self.lab, role, text)?;
        let said = self.ask(role)?;
        if !said.status.success() {
            return Err(LabError::unexpected(format!(
                "{} {}\n{}{}",
                said.status,
                said.stderr,
                self.old.stderr(),
                self.new.stderr()
            )));
        }
        Ok(said.stdout)
    }

    fn ask(&self, role: Role) -> Result<Output> {
        setup(self.lab)?.run(role, &["reload"])
    }

    /// Everything that moves of the first tunnel.
    fn moved(&self, role: Role) -> Result<Vec<String>> {
        let tunnels = self.tunnels(role)?;
        let moved = tunnels[0]["moved"].as_array().cloned().unwrap_or_default();
        Ok(moved
            .iter()
            .map(|it| it.as_str().unwrap_or_default().to_owned())
            .collect())
    }
}

/// What goes on through a tunnel while something else changes.
struct Load(Vec<Conversation>);

impl Load {
    fn start(lab: &Lab, to: Ipv4Addr) -> Result<Self> {
        let mut conversations = Vec::new();
        for words in [&b"one"[..], b"two"] {
            let mut conversation = lab.client().converse(to)?;
            conversation.exchange(words, PATIENCE)?;
            conversations.push(conversation);
        }
        Ok(Self(conversations))
    }

    fn goes_on(&mut self) -> Result {
        for conversation in &mut self.0 {
            conversation.exchange(&[7; 10_000], RECOVERY)?;
        }
        Ok(())
    }
}

/// Does something while transfers run in both directions, of which none may fail.
fn under_load(lab: &Lab, to: Ipv4Addr, work: impl FnOnce() -> Result) -> Result {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let down = scope.spawn(|| -> Result {
            while !stop.load(Relaxed) {
                lab.client().download(to, 4 * MEGABYTE)?;
            }
            Ok(())
        });
        let up = scope.spawn(|| -> Result {
            while !stop.load(Relaxed) {
                lab.client().upload(to, 4 * MEGABYTE)?;
            }
            Ok(())
        });
        let result = work();
        stop.store(true, Relaxed);
        for transfer in [down, up] {
            transfer.join().expect("no panic")?;
        }
        result
    })
}

#[test]
fn moves_come_and_go_and_what_goes_on_is_not_disturbed() -> Result {
    let lab = Lab::builder().moved(2).build()?;
    let before = Snapshot::of(lab.old_server())?;
    let (first, second) = (MOVED, nth_moved(1));
    let bed = Bed::start(&lab, &moves(&lab, &[first])?, &accepts(&lab, &[first])?)?;
    let _application = Service::start(lab.new_server(), NEW)?;
    let _first = Service::start(lab.old_server(), first)?;
    let _second = Service::start(lab.old_server(), second)?;
    let mut load = Load::start(&lab, first)?;
    // It is the old server's own, and stays so when its address moves.
    let mut own = lab.client().converse(second)?;
    own.exchange(b"here", PATIENCE)?;

    let both = [first, second];
    under_load(&lab, first, || {
        let said = bed.reload(Role::New, &accepts(&lab, &both)?)?;
        assert_eq!(said, format!("  peer {OLD}:51850: + accept {second}\n"));
        let said = bed.reload(Role::Old, &moves(&lab, &both)?)?;
        assert_eq!(said, format!("  peer {NEW}:51850: + move {second}\n"));
        Ok(())
    })?;
    lab.client().get(second)?.is_answered_by(NEW)?;
    own.exchange(b"still here", PATIENCE)?;
    load.goes_on()?;
    let again = bed.ask(Role::Old)?;
    assert_eq!(again.stdout, "nothing has changed\n");

    // The first moves no more: what is new stays here, what the new server has goes on there.
    let said = bed.reload(Role::Old, &moves(&lab, &[second])?)?;
    assert_eq!(said, format!("  peer {NEW}:51850: - move {first}\n"));
    load.goes_on()?;
    lab.client().get(first)?.is_answered_by(first)?;
    lab.client().download(second, MEGABYTE)?;
    let leaving = |tunnels: &[Value]| {
        let modes = tunnels[0]["modes"].as_array();
        modes.is_some_and(|modes| {
            modes
                .iter()
                .any(|it| it["what"] == first.to_string() && it["leaving"] == true)
        })
    };
    bed.wait(Role::Old, leaving)?;
    load.goes_on()?;
    drop(load);
    bed.wait(Role::Old, |tunnels| !leaving(tunnels))?;
    assert_eq!(bed.moved(Role::Old)?, [second.to_string()]);
    bed.wait(Role::New, |tunnels| {
        tunnels[0]["moved"] == serde_json::json!([second.to_string()])
    })?;
    lab.client().get(first)?.is_answered_by(first)?;
    lab.client().get(second)?.is_answered_by(NEW)?;
    own.exchange(b"and still", PATIENCE)?;
    // Back again, as it was.
    bed.reload(Role::Old, &moves(&lab, &both)?)?;
    bed.wait(Role::New, |tunnels| {
        tunnels[0]["moved"].as_array().map(Vec::len) == Some(2)
    })?;
    lab.client().get(first)?.is_answered_by(NEW)?;

    bed.old.signal(Signal::TERM)?;
    let mut old = bed.old;
    let ended = poll_until(SOON, OFTEN, || old.exited());
    assert!(
        ended.is_some_and(|status| status.success()),
        "{}",
        old.stderr()
    );
    Snapshot::of(lab.old_server())?.is_same_as(&before)
}

#[test]
fn peers_come_and_go_on_either_server_and_the_others_go_on() -> Result {
    let lab = Lab::builder().moved(2).build()?;
    let host = lab.add_old_server(1)?;
    let old = moves(&lab, &[MOVED])?;
    let new = accepts(&lab, &[MOVED])?;
    let bed = Bed::start(&lab, &old, &new)?;
    let _application = Service::start(lab.new_server(), NEW)?;
    let _other = Service::start(lab.old_server(), nth_moved(1))?;
    let mut load = Load::start(&lab, MOVED)?;

    // The new server gets another old one.
    let more = peer(
        &lab,
        more_old(1),
        "b",
        &format!("accept = \"{}\"", more_moved(1)),
    )?;
    let mut command = setup(&lab)?.command();
    command.args([
        "--peer",
        &NEW.to_string(),
        "--move",
        &more_moved(1).to_string(),
    ]);
    command.arg("--psk-file").arg(psk(&lab, "b")?);
    command.env("IPMOVED_STATE_DIR", lab.dir().join("state-1"));
    let _third = host.spawn(command)?;
    let came = format!("+ peer {}:51850\n", more_old(1));
    let up = |tunnels: &[Value]| tunnels.len() == 2 && tunnels[1]["moved"][0].is_string();
    under_load(&lab, MOVED, || {
        assert_eq!(bed.reload(Role::New, &format!("{new}{more}"))?, came);
        bed.wait(Role::New, up)
    })?;
    let mut other = lab.client().converse(more_moved(1))?;
    other.exchange(b"by the other", PATIENCE)?;
    load.goes_on()?;
    // It goes, and comes back in the same place.
    under_load(&lab, MOVED, || {
        let gone = format!("- peer {}:51850\n", more_old(1));
        assert_eq!(bed.reload(Role::New, &new)?, gone);
        bed.wait(Role::New, |tunnels| tunnels.len() == 1)
    })?;
    load.goes_on()?;
    assert_eq!(bed.reload(Role::New, &format!("{more}{new}"))?, came);
    bed.wait(Role::New, up)?;
    lab.client().get(more_moved(1))?.is_answered_by(NEW)?;
    load.goes_on()?;

    // The old server moves something to one more new server, which is not there yet.
    let second = nth_moved(1);
    let more = peer(&lab, more_old(9), "c", &format!("move = \"{second}\""))?;
    under_load(&lab, MOVED, || {
        let came = format!("+ peer {}:51850\n", more_old(9));
        assert_eq!(bed.reload(Role::Old, &format!("{old}{more}"))?, came);
        bed.wait(Role::Old, |tunnels| tunnels.len() == 2)
    })?;
    let probe = lab.client().probe_tcp(second, Duration::from_millis(300))?;
    assert_eq!(probe, Probe::Silent);
    load.goes_on()?;
    under_load(&lab, MOVED, || {
        let gone = format!("- peer {}:51850\n", more_old(9));
        assert_eq!(bed.reload(Role::Old, &old)?, gone);
        bed.wait(Role::Old, |tunnels| tunnels.len() == 1)
    })?;
    lab.client().get(second)?.is_answered_by(second)?;
    load.goes_on()
}

/// Waits until something is so that follows from what the other server was told.
fn until(what: &str, is: impl Fn() -> Result<bool>) -> Result {
    let reached = poll_until(SOON, OFTEN, || is().ok().filter(|&it| it));
    reached
        .map(drop)
        .ok_or_else(|| LabError::unexpected(what.to_owned()))
}

#[test]
fn other_settings_change_under_load_and_do_what_they_say() -> Result {
    let lab = Lab::builder().moved(1).build()?;
    let (old, new) = (moves(&lab, &[MOVED])?, accepts(&lab, &[MOVED])?);
    let bed = Bed::start(&lab, &old, &new)?;
    // What the new server changes beside the moved address that it holds.
    let settings = || {
        let names = ["lo/accept_local", "eth0/arp_ignore", "eth0/arp_announce"];
        let read = |name: &str| lab.new_server().sysctl(&format!("ipv4/conf/{name}"));
        names.into_iter().map(read).collect::<Result<Vec<_>>>()
    };
    let before = settings()?;
    let _application = Service::start(lab.new_server(), NEW)?;
    let _beside = Service::start(lab.new_server(), (NEW, 8_081))?;
    let mail = (CLIENT, 25);
    let _mail = Service::start(lab.clients(), mail)?;
    let mut load = Load::start(&lab, MOVED)?;
    let program = Client::new(lab.new_server(), MOVED, MOVED6);
    let on_lo = || {
        lab.new_server()
            .run(|| Ok(std::net::UdpSocket::bind((MOVED, 0)).is_ok()))
    };
    under_load(&lab, MOVED, || {
        // Room, and who is remembered.
        let fewer = format!("max-flows = 2000\n{old}");
        assert_eq!(
            bed.reload(Role::Old, &fewer)?,
            "max-flows: 1000000 -> 2000\n"
        );
        let fewer = format!("max-flows = 3000\n{new}");
        assert_eq!(
            bed.reload(Role::New, &fewer)?,
            "max-flows: 1000000 -> 3000\n"
        );
        for (role, max) in [(Role::Old, 2_000), (Role::New, 3_000)] {
            let tunnels = bed.tunnels(role)?;
            assert_eq!(tunnels[0]["flows"]["max"], max, "{tunnels:#?}");
        }
        // More than there was ever room for.
        let most = format!("max-flows = 2000000\n{new}");
        assert_eq!(
            bed.reload(Role::New, &most)?,
            "max-flows: 3000 -> 2000000\n"
        );
        for (first, says) in [
            ("no-client-names = true\n", "90d -> 90d, without names"),
            ("keep = \"30d\"\n", "90d, without names -> 30d"),
            ("no-client-log = true\n", "30d -> off"),
            ("", "off -> 90d"),
        ] {
            let said = bed.reload(Role::Old, &format!("{first}max-flows = 2000\n{old}"))?;
            assert_eq!(said, format!("clients are remembered: {says}\n"));
        }
        // Where a port is delivered.
        let delivers = format!("{new}deliver = \"{MOVED}:81={NEW}:8081\"\n");
        bed.reload(Role::New, &delivers)?;
        lab.client().get((MOVED, 81))?.is_answered_by(NEW)?;
        // What the new server begins.
        bed.reload(Role::New, &format!("{new}outgoing = true\n"))?;
        until("the moved address can be bound", on_lo)?;
        assert_ne!(settings()?, before);
        assert!(
            program.get(mail).is_err(),
            "the old server does not let it out"
        );
        bed.reload(Role::Old, &format!("{old}allow-outgoing = [\"25/tcp\"]\n"))?;
        until("it is let out", || {
            let seen = program.get(mail)?.client_seen;
            Ok(seen.ip() == MOVED)
        })?;
        bed.reload(Role::Old, &format!("{old}allow-outgoing = [\"587/tcp\"]\n"))?;
        assert!(program.get(mail).is_err(), "not this port any more");
        bed.reload(Role::Old, &old)?;
        bed.reload(Role::New, &new).map(drop)
    })?;
    // Nothing of it is left on the new server, and nobody is told to let anything out any more.
    let as_before = || Ok(!on_lo()? && settings()? == before);
    until("the new server is as before", as_before)?;
    let warnings = setup(&lab)?.status(Role::New)?.0["warnings"].to_string();
    assert!(
        !warnings.contains("so --outgoing does nothing"),
        "{warnings}"
    );
    load.goes_on()?;
    // The moved address becomes the new server's own, and is none of its own again.
    bed.reload(Role::New, &format!("{new}deliver-to = \"keep\"\n"))?;
    until("the moved address can be bound", on_lo)?;
    let kept = Service::start(lab.new_server(), MOVED)?;
    lab.client().get(MOVED)?.is_answered_by(MOVED)?;
    load.goes_on()?;
    drop(kept);
    bed.reload(Role::New, &new)?;
    until("the new server is as before", as_before)?;
    lab.client().get(MOVED)?.is_answered_by(NEW)?;
    load.goes_on()
}

#[test]
fn what_cannot_be_is_refused_whole() -> Result {
    let lab = Lab::builder().moved(2).build()?;
    let (old, new) = (moves(&lab, &[MOVED])?, accepts(&lab, &[MOVED])?);
    let bed = Bed::start(&lab, &old, &new)?;
    let _application = Service::start(lab.new_server(), NEW)?;
    let mut load = Load::start(&lab, MOVED)?;
    let second = nth_moved(1);
    let more = format!("move = [\"{MOVED}\", \"{second}\"]");
    let key = psk(&lab, "a")?;
    let with = |first: &str| {
        format!(
            "{first}\n{}",
            peer(&lab, NEW, "a", &more).unwrap_or_default()
        )
    };
    for (role, text, says) in [
        (
            Role::Old,
            with("max-flow = 7"),
            "old.toml: line 1, column 1: `max-flow` is not a known key",
        ),
        (
            Role::Old,
            with("listen = 70000"),
            "line 1, column 10: listen: `70000` is not [ADDR:]PORT",
        ),
        (
            Role::Old,
            with("tun = \"other0\"\nlanes = 7"),
            "tun, lanes cannot be changed while the daemon runs",
        ),
        (Role::Old, format!("{more}\n"), "old.toml: peer is missing"),
        (
            Role::Old,
            "peer = ".to_owned(),
            "old.toml: line 1, column 8: ",
        ),
        (
            Role::Old,
            with("max-flows = 7").replace("psk-a", "psk-none"),
            "psk-none: No such file or directory",
        ),
        (
            Role::Old,
            format!(
                "{}{}",
                with(""),
                peer(&lab, more_old(9), "b", "move = \"192.0.2.4/30\"")?
            ),
            "line 9, column 8: move: 192.0.2.5 and 192.0.2.4/30 overlap",
        ),
        (
            Role::Old,
            format!(
                "{}{}",
                with(""),
                peer(&lab, more_old(9), "a", "move = \"192.0.2.9\"")?
            ),
            "two peers have the same key",
        ),
        // What only the host can tell.
        (
            Role::Old,
            peer(&lab, NEW, "a", &format!("move = \"{OLD}\""))?,
            "would take every new connection",
        ),
        (
            Role::Old,
            new.clone(),
            "this is the old server, and would be the new",
        ),
        (
            Role::New,
            peer(&lab, OLD, "a", "deliver-to = \"198.51.100.77\"")?,
            "is not an address of this server",
        ),
        (
            Role::New,
            peer(&lab, OLD, "a", "outgoing = \"25,user=nobody-here\"")?,
            "nobody-here",
        ),
    ] {
        let before = bed.moved(role)?;
        write(&lab, role, &text)?;
        let said = bed.ask(role)?;
        assert_eq!(said.status.code(), Some(1), "{text}\n{said:?}");
        assert!(said.stderr.contains(says), "{text}\n{}", said.stderr);
        assert_eq!(said.stderr.lines().count(), 1, "{}", said.stderr);
        assert_eq!(bed.moved(role)?, before, "{text}");
        load.goes_on()?;
        write(&lab, role, if role == Role::Old { &old } else { &new })?;
    }
    let json = setup(&lab)?.run(Role::Old, &["reload", "--json"])?;
    let said: Value = serde_json::from_str(&json.stdout).expect("JSON");
    assert_eq!(
        (&said["reloaded"], said["changes"].as_array().map(Vec::len)),
        (&true.into(), Some(0))
    );
    // A signal says the same in the log.
    fs::remove_file(file(&lab, Role::Old)).expect("removed");
    bed.old.signal(Signal::HUP)?;
    let told = poll_until(SOON, OFTEN, || {
        bed.old
            .stderr()
            .contains("old.toml: No such file")
            .then_some(())
    });
    assert!(told.is_some(), "{}", bed.old.stderr());
    assert!(key.exists());
    load.goes_on()
}

#[test]
fn the_key_and_the_port_become_others_while_connections_go_on() -> Result {
    let lab = Lab::new()?;
    let bed = Bed::start(&lab, &moves(&lab, &[MOVED])?, &accepts(&lab, &[MOVED])?)?;
    let _application = Service::start(lab.new_server(), NEW)?;
    let mut load = Load::start(&lab, MOVED)?;
    // One server after the other. Between them the session goes on.
    let (old, new) = (
        peer(&lab, NEW, "z", &format!("move = \"{MOVED}\""))?,
        peer(&lab, OLD, "z", &format!("accept = \"{MOVED}\""))?,
    );
    under_load(&lab, MOVED, || {
        let said = bed.reload(Role::Old, &old)?;
        assert!(said.contains("another key"), "{said}");
        load.goes_on()?;
        let said = bed.reload(Role::New, &new)?;
        assert!(said.contains("another key"), "{said}");
        Ok(())
    })?;
    load.goes_on()?;
    // A daemon that knows the new key alone is heard: the old one is of no use any more.
    drop(bed.old);
    let mut command = setup(&lab)?.command();
    command.arg("--config").arg(file(&lab, Role::Old));
    let old_daemon = lab.old_server().spawn(command)?;
    let bed = Bed {
        old: old_daemon,
        ..bed
    };
    bed.wait(Role::Old, |tunnels| {
        tunnels.first().is_some_and(|it| it["state"] == "up")
    })?;
    load.goes_on()?;

    // The new server's port: the old one hears where it is.
    under_load(&lab, MOVED, || {
        let said = bed.reload(Role::New, &format!("listen = 51999\n{new}"))?;
        assert_eq!(said, "listen: 51850 -> 51999\n");
        let there = format!("{NEW}:51999");
        bed.wait(Role::Old, |tunnels| {
            tunnels[0]["endpoint"] == there.as_str()
        })
    })?;
    load.goes_on()?;
    // The old server's port, of which its own programs have to know, too.
    under_load(&lab, MOVED, || {
        bed.reload(
            Role::Old,
            &format!(
                "listen = 51998\n{}",
                old.replace(&NEW.to_string(), &format!("{NEW}:51999"))
            ),
        )?;
        let there = format!("{OLD}:51998");
        bed.wait(Role::New, |tunnels| {
            tunnels[0]["endpoint"] == there.as_str()
        })
    })?;
    load.goes_on()?;
    lab.client().get(MOVED)?.is_answered_by(NEW)?;
    Ok(())
}

#[test]
fn a_storm_of_signals_disturbs_nothing_and_the_last_word_counts() -> Result {
    let lab = Lab::builder().moved(2).build()?;
    let bed = Bed::start(
        &lab,
        &moves(&lab, &[MOVED])?,
        &accepts(&lab, &[MOVED, nth_moved(1)])?,
    )?;
    let _application = Service::start(lab.new_server(), NEW)?;
    let mut load = Load::start(&lab, MOVED)?;
    let both = [MOVED, nth_moved(1)];
    under_load(&lab, MOVED, || {
        for number in 0..100 {
            let text = moves(&lab, &both[..1 + number % 2])?;
            write(&lab, Role::Old, &text)?;
            bed.old.signal(Signal::HUP)?;
            bed.new.signal(Signal::HUP)?;
        }
        let all: Vec<String> = both.iter().map(ToString::to_string).collect();
        bed.wait(Role::Old, |tunnels| {
            tunnels[0]["moved"] == serde_json::json!(all)
        })
    })?;
    load.goes_on()?;
    lab.client().get(both[1])?.is_answered_by(NEW)?;
    Ok(())
}
