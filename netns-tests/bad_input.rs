//! Bad input is refused before anything is changed: an exit code, one line, the object, the remedy.
//!
//! ```text
//!  old server 192.0.2.1 and 192.0.2.5 on eth0, no daemon
//! ```

#![allow(
    unsafe_code,
    reason = "pre_exec() is unsafe to call; it takes privileges and devices away"
)]

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use ipmoved::internals::Role;
use ipmoved::lab::daemon::COMMAND_TIMEOUT;
use ipmoved::lab::{DaemonSetup, Lab, LabError, Output, Snapshot, poll_until};
use rustix::mount::MountFlags;
use rustix::process::Signal;
use rustix::thread::{CapabilitiesSecureBits, UnshareFlags};

use crate::stage::{Result, exe, moved, setup};

/// It was not done.
const FAILED: i32 = 1;
/// A flag, address, port, key, file or interface.
const BAD_INPUT: i32 = 2;
/// Privileges, TUN or a kernel feature.
const SYSTEM: i32 = 3;
/// An ipmoved runs already.
const OTHER_DAEMON: i32 = 4;

/// How often something is asked that takes a moment.
const PAUSE: Duration = Duration::from_millis(20);

const KEY: &str = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";

#[test]
fn every_kind_of_bad_input_is_refused_with_one_line() -> Result {
    let lab = Lab::new()?;
    let dir = lab.dir().display().to_string();
    let write = |name: &str, text: &str| {
        let path = lab.dir().join(name);
        fs::write(&path, text).expect("the lab's directory is writable");
        path.display().to_string()
    };
    let psk = write("key", KEY);
    let rubbish = write("rubbish", "this is no key\n");
    let short = write("short", "AAECAwQFBgcICQoLDA0ODw==\n");
    let empty = write("empty", "");
    let unknown = write(
        "unknown.toml",
        "peer = \"198.51.100.2\"\ncolour = \"blue\"\n",
    );
    let broken = write("broken.toml", "peer = \n");
    let nowhere = format!("{dir}/nowhere");
    let nowhere_toml = format!("{dir}/nowhere.toml");
    let key = ["--peer", "198.51.100.2", "--psk-file", &psk];
    let moving = [&key[..], &["--move", "192.0.2.5"]].concat();

    // The arguments, and a word that the line must contain.
    let after_key: &[(&[&str], &str)] = &[
        (&["--move", "192.0.2"], "192.0.2"),
        (&["--move", "www.example.org"], "www.example.org"),
        (&["--move", ""], "--move"),
        (&["--move", "192.0.2.5:0"], "0"),
        (&["--move", "192.0.2.5:99999"], "99999"),
        (&["--move", "192.0.2.5:90-80"], "90"),
        (&["--move", "192.0.2.5/sctp"], "sctp"),
        (&["--move", "127.0.0.1"], "127.0.0.1"),
        (&["--move", "224.0.0.1"], "224.0.0.1"),
        (
            &["--move", "192.0.2.5", "--move", "192.0.2.5:80"],
            "192.0.2.5:80",
        ),
        (
            &["--move", "192.0.2.5", "--deliver-to", "198.51.100.2"],
            "--deliver-to",
        ),
        (&["--deliver-to", "nonsense"], "nonsense"),
        (&["--deliver-to", "keep"], "add --accept 192.0.2.5"),
        (&["--accept", "192.0.2.5/28"], "192.0.2.0/28"),
        (&["--accept", "www"], "www"),
        (&["--clients-from", "10.0.0.1/24"], "10.0.0.0/24"),
        (
            &["--move", "192.0.2.5", "--accept", "192.0.2.5"],
            "--accept",
        ),
        (
            &["--move", "192.0.2.5", "--clients-from", "10.0.0.0/24"],
            "--clients-from",
        ),
        (&["--no-client-log"], "belongs on the old server"),
        (&["--no-client-names"], "belongs on the old server"),
        (&["--keep", "90d"], "belongs on the old server"),
        // The address of the administrator's own login, whole or all of its TCP.
        (&["--move", "192.0.2.1"], "your login"),
        (&["--move", "192.0.2.1/tcp"], "your login"),
        // Who answers is the old server's business.
        (&["--start", "here"], "--start"),
    ];
    let after_move: &[(&[&str], &str)] = &[
        (&["--uplink", "eth7"], "eth7"),
        (
            &["--uplink", "a-name-much-too-long-for-linux"],
            "a-name-much",
        ),
        (&["--tun", "a-name-much-too-long-for-linux"], "a-name-much"),
        (&["--tun", "not/a/name"], "not/a/name"),
        (&["--tun", "eth0"], "eth0"),
        (&["--listen", "99999"], "99999"),
        (&["--listen", "203.0.113.99:51850"], "203.0.113.99"),
        (&["--listen", "nonsense"], "nonsense"),
        (&["--metrics", "localhost:9185"], "localhost"),
        (
            &["--metrics", "203.0.113.99:9185"],
            "not an address of this",
        ),
        (&["--max-flows", "0"], "--max-flows"),
        (&["--max-flows", "many"], "many"),
        (&["--cipher", "rot13"], "rot13"),
        (&["--log-format", "xml"], "xml"),
        (&["--start", "there"], "there"),
        (&["--state-dir", "state"], "does not begin with a slash"),
        (&["--state-dir", &psk], "is not a directory"),
        (&["--keep", "90"], "`90` is no length of time"),
        (&["--keep", "36h"], "whole days"),
        (&["--colour", "blue"], "--colour"),
    ];
    let alone: &[(&[&str], &str)] = &[
        (&[], "--peer"),
        (&["--peer", "198.51.100.2"], "--psk-file"),
        (&["--peer", "", "--psk-file", &psk], "--peer"),
        (&["--peer", "0.0.0.0", "--psk-file", &psk], "0.0.0.0"),
        (&["--peer", "224.0.0.1", "--psk-file", &psk], "224.0.0.1"),
        (
            &["--peer", "198.51.100.2:99999", "--psk-file", &psk],
            "99999",
        ),
        (
            &["--peer", "198.51.100.2", "--psk-file", &nowhere],
            &nowhere,
        ),
        (&["--peer", "198.51.100.2", "--psk-file", &dir], &dir),
        (
            &["--peer", "198.51.100.2", "--psk-file", &rubbish],
            &rubbish,
        ),
        (&["--peer", "198.51.100.2", "--psk-file", &short], &short),
        (&["--peer", "198.51.100.2", "--psk-file", &empty], &empty),
        (&["--peer", "198.51.100.2", "--psk", "too short"], "--psk"),
        // The same, without a known address of the peer.
        (&["--psk-file", &psk, "--move", "192.0.2.1"], "your login"),
        (&["--config", &nowhere_toml], &nowhere_toml),
        (&["--config", &unknown], "colour"),
        (&["--config", &broken], &broken),
        (&["frobnicate"], "frobnicate"),
        (&["stragglers", "--since", "yesterday"], "yesterday"),
        (&["stragglers", "--top", "0"], "--top"),
        (&["stragglers", "--json", "--csv"], "cannot both be given"),
        (&["verdict", "--quiet", "0d"], "--quiet"),
        (&["verdict", "--ignore", "monitors"], "monitors"),
    ];
    let typed = (after_key
        .iter()
        .map(|(args, names)| ([&key[..], args].concat(), *names)))
    .chain(
        after_move
            .iter()
            .map(|(args, names)| ([&moving[..], args].concat(), *names)),
    )
    .chain(alone.iter().map(|(args, names)| (args.to_vec(), *names)));

    let setup = setup(&lab)?;
    let before = Snapshot::of(lab.old_server())?;
    let mut complaints = Vec::new();
    for (args, names) in typed {
        let said = setup.run(Role::Old, &args);
        let complaint = match &said {
            Ok(said) => complaint(said, BAD_INPUT, names),
            Err(error) => Some(format!("was not refused: {error}")),
        };
        if let Some(complaint) = complaint {
            complaints.push(format!("ipmoved {}\n    {complaint}", args.join(" ")));
        }
    }
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
    Snapshot::of(lab.old_server())?.is_same_as(&before)
}

#[test]
fn a_status_socket_that_cannot_be_made_changes_nothing() -> Result {
    let lab = Lab::new()?;
    let before = Snapshot::of(lab.old_server())?;
    let setup = setup(&lab)?;
    let mut command = Command::new(exe());
    // This is longer than a socket's name may be.
    let deep = lab.dir().join("x".repeat(100));
    command
        .args(setup.daemon_args(Role::Old))
        .env("IPMOVED_RUNTIME_DIR", &deep);
    let said = lab.old_server().output(command, COMMAND_TIMEOUT)?;
    assert_eq!(complaint(&said, SYSTEM, "status.sock"), None);
    Snapshot::of(lab.old_server())?.is_same_as(&before)
}

#[test]
fn a_second_daemon_in_one_namespace_is_refused() -> Result {
    moved(|on| {
        for role in [Role::Old, Role::New] {
            let before = Snapshot::of(on.setup.host(role))?;
            let args = on.setup.daemon_args(role);
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            let said = on.setup.run(role, &args)?;
            assert_eq!(complaint(&said, OTHER_DAEMON, "ipmoved"), None);
            Snapshot::of(on.setup.host(role))?.is_same_as(&before)?;
        }
        Ok(())
    })
}

#[test]
fn cleanup_leaves_a_running_daemon_alone() -> Result {
    moved(|on| {
        let before = Snapshot::of(on.lab.old_server())?;
        let said = on.setup.run(Role::Old, &["cleanup"])?;
        assert_eq!(complaint(&said, OTHER_DAEMON, "ipmoved"), None);
        Snapshot::of(on.lab.old_server())?.is_same_as(&before)
    })
}

#[test]
fn without_privileges_one_line_says_so() -> Result {
    let said = started_after(|| {
        // The process keeps root's user id without root's powers, also after exec.
        rustix::thread::set_capabilities_secure_bits(
            CapabilitiesSecureBits::NO_ROOT | CapabilitiesSecureBits::NO_ROOT_LOCKED,
        )?;
        Ok(())
    })?;
    assert_eq!(complaint(&said, SYSTEM, "CAP_NET_ADMIN"), None);
    Ok(())
}

#[test]
fn who_is_not_root_is_told_so() -> Result {
    moved(|on| {
        let dir = on.lab.dir().display().to_string();
        let database = format!("{dir}/stragglers.sqlite");
        fs::write(&database, "for root alone").expect("the lab's directory is writable");
        let mode = fs::Permissions::from_mode(0o600);
        fs::set_permissions(&database, mode).expect("it is ours");
        let args = on.setup.daemon_args(Role::Old);
        let daemon: Vec<&str> = args.iter().map(String::as_str).collect();
        for (args, code) in [
            (&daemon[..], BAD_INPUT),
            (&["status"], SYSTEM),
            (&["move"], SYSTEM),
            (&["reload"], SYSTEM),
            (&["flows"], SYSTEM),
            (&["cleanup"], SYSTEM),
            (&["stragglers", "--state-dir", &dir], SYSTEM),
            (&["verdict", "--state-dir", &dir], SYSTEM),
        ] {
            let mut command = on.setup.beside("setpriv");
            command.args(["--reuid", "65534", "--clear-groups"]);
            command.arg(exe()).args(args);
            let said = on.lab.old_server().output(command, COMMAND_TIMEOUT)?;
            assert_eq!(complaint(&said, code, "try sudo"), None, "{args:?}");
        }
        Ok(())
    })
}

#[test]
fn without_a_tun_device_one_line_says_so() -> Result {
    let said = started_after(|| {
        // SAFETY: CLONE_NEWNS concerns the mounts of this process, which is about to exec.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }?;
        rustix::mount::mount_change(
            "/",
            rustix::mount::MountPropagationFlags::PRIVATE
                | rustix::mount::MountPropagationFlags::REC,
        )?;
        rustix::mount::mount("none", "/dev/net", "tmpfs", MountFlags::empty(), None)?;
        Ok(())
    })?;
    assert_eq!(complaint(&said, SYSTEM, "/dev/net/tun"), None);
    Ok(())
}

#[test]
fn a_new_key_works_at_once() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let said = setup.run(Role::Old, &["genpsk"])?;
    assert!(said.status.success(), "{said:?}");
    assert_eq!(said.stdout.trim_end().len(), 44, "32 bytes in base64");
    fs::write(lab.dir().join("psk"), said.stdout).expect("the lab's directory is writable");
    setup.start_both()?.terminate()
}

#[test]
fn a_command_that_cannot_be_done_is_one_line_and_changes_nothing() -> Result {
    const MOVED: &str = "192.0.2.5";
    let lab = Lab::new()?;
    let setup = setup(&lab)?.args(Role::Old, &["--start", "here"]);
    let refused = |role, args: &[&str], code, names| match setup.run(role, args) {
        Ok(said) => complaint(&said, code, names)
            .map(|complaint| format!("ipmoved {} ({role})\n    {complaint}", args.join(" "))),
        Err(error) => Some(format!("was not refused: {error}")),
    };
    let mut complaints = Vec::new();
    for command in ["move", "hold", "cutover"] {
        let none = "no ipmoved runs in this network namespace";
        complaints.extend(refused(Role::Old, &[command], OTHER_DAEMON, none));
    }
    let nat = setup.start_nat(&["--move", MOVED, "--to", "198.51.100.2"])?;
    let answers = || setup.status(Role::Old).ok();
    poll_until(COMMAND_TIMEOUT, PAUSE, answers).expect("`ipmoved nat` says how it is");
    complaints.extend(refused(
        Role::Old,
        &["move"],
        BAD_INPUT,
        "`ipmoved nat` runs here",
    ));
    nat.terminate()?;

    let daemons = setup.start_both()?;
    for command in ["move", "hold", "cutover"] {
        let there = "run it on the old server (192.0.2.1";
        complaints.extend(refused(Role::New, &[command], BAD_INPUT, there));
        let what = [command, "203.0.113.9"];
        complaints.extend(refused(
            Role::Old,
            &what,
            BAD_INPUT,
            "`203.0.113.9` is not moved here",
        ));
        let part = [command, "192.0.2.5:80"];
        complaints.extend(refused(
            Role::Old,
            &part,
            BAD_INPUT,
            "name it as --move does: 192.0.2.5",
        ));
        complaints.extend(refused(
            Role::Old,
            &[command, "www"],
            BAD_INPUT,
            "is a name",
        ));
    }
    for (args, names) in [
        (&["move", "--percent", "0"][..], "1 to 99"),
        (
            &["move", "--percent", "100"],
            "without --percent all clients move",
        ),
        (&["move", "--percent", "101"], "1 to 99"),
        (&["move", "--percent", "5", "--cut"], "cannot both be given"),
        (&["hold", "--for", "0"], "from 1 to 3600"),
        (&["hold", "--for", "3601"], "from 1 to 3600"),
        (&["cutover", "--drain", "x"], "from 0 to 1200"),
        (&["cutover", "--within", "0"], "from 1 to 1200"),
        (&["cutover", "--restart", "true"], "missing: --stop"),
    ] {
        complaints.extend(refused(Role::Old, args, BAD_INPUT, names));
    }
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
    assert_eq!(mode(&setup)?, "here", "nothing has changed");

    // One that runs keeps others from changing the same, until it is ended.
    let mut command = setup.command();
    command.args(["cutover", "--drain", "0", "--stop", "sleep 60"]);
    let running = lab.old_server().spawn(command)?;
    poll_until(COMMAND_TIMEOUT, PAUSE, || {
        running.stdout().contains("sleep 60").then_some(())
    })
    .expect("it runs --stop");
    for command in ["move", "hold", "cutover"] {
        let runs = "a cutover of 192.0.2.5 is running";
        complaints.extend(refused(Role::Old, &[command], FAILED, runs));
    }
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
    assert_eq!(mode(&setup)?, "held");
    running.signal(Signal::INT)?;
    let said = running.wait(COMMAND_TIMEOUT)?;
    assert_eq!(
        complaint(&said, FAILED, "not moved: it was interrupted"),
        None
    );
    assert!(
        said.stderr.contains("start the service here again"),
        "{}",
        said.stderr
    );
    assert_eq!(mode(&setup)?, "here");

    // Commands of the administrator's that go wrong.
    for (args, names) in [
        (&["--stop", "exit 3"][..], "--stop failed: exit status: 3"),
        (
            &["--within", "1", "--stop", "sleep 60"],
            "--stop has not ended within 1 s",
        ),
    ] {
        let args = [&["cutover", "--drain", "0"], args].concat();
        complaints.extend(refused(Role::Old, &args, FAILED, names));
        assert_eq!(mode(&setup)?, "here", "{args:?}");
    }
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
    daemons.terminate()
}

/// The mode of the only move.
fn mode(setup: &DaemonSetup<'_>) -> Result<String> {
    let status = setup.status(Role::Old)?;
    let mode = status.tunnel()["modes"][0]["mode"].as_str();
    Ok(mode.unwrap_or_default().to_owned())
}

#[test]
fn where_modes_cannot_be_kept_it_is_said_and_the_daemon_goes_on() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.args(Role::Old, &["--start", "here"]);
    let modes = lab.dir().join("state/modes.json");
    let failed = |error: io::Error| LabError::unexpected(error.to_string());
    let mut old = setup.start(Role::Old)?;
    old.wait_for_state("connecting", COMMAND_TIMEOUT)?;
    let run = |args: &[&str]| setup.run(Role::Old, args);
    assert!(run(&["move"])?.status.success());
    old.kill()?;

    // What is kept counts, not what the settings say, and of what is damaged the copy does;
    // somebody else's file is left as it is.
    let copy = modes.with_extension("json.copy");
    let newer = "{\"version\":2}";
    let warnings = || -> Result<String> { Ok(setup.status(Role::Old)?.0["warnings"].to_string()) };
    let forgets = |args: &[&str]| -> Result {
        let said = run(args)?;
        assert!(said.status.success(), "{said:?}");
        assert!(said.stderr.contains("a restart forgets this"), "{said:?}");
        assert!(warnings()?.contains("are not kept over a restart"));
        Ok(())
    };
    for (text, of_copy, start, aside) in [
        (None, None, "moved", false),
        (Some(newer), None, "moved", false),
        (Some("{"), None, "moved", true),
        (Some("{"), Some(""), "here", true),
    ] {
        for (file, text) in [(&modes, text), (&copy, of_copy)] {
            let written = text.map(|text| fs::write(file, text));
            written.transpose().map_err(failed)?;
        }
        let mut old = setup.start(Role::Old)?;
        old.wait_for_state("connecting", COMMAND_TIMEOUT)?;
        assert_eq!(mode(&setup)?, start);
        let said = warnings()?;
        assert_eq!(said.contains("modes.json"), text.is_some(), "{said}");
        assert_eq!(said.contains("modes.json.aside"), aside, "{said}");
        assert_eq!(
            said.contains("nobody knows the mode"),
            of_copy.is_some(),
            "{said}"
        );
        if text == Some(newer) {
            forgets(&["back"])?;
            forgets(&["move"])?;
            assert_eq!(fs::read_to_string(&modes).map_err(failed)?, newer);
        }
        if of_copy.is_some() {
            assert!(run(&["back"])?.status.success());
            assert!(!warnings()?.contains("nobody knows the mode"));
        }
        old.kill()?;
    }

    // Something in the way of what is written, for a while.
    let mut old = setup.start(Role::Old)?;
    old.wait_for_state("connecting", COMMAND_TIMEOUT)?;
    let in_the_way = modes.with_extension("json.next");
    fs::create_dir(&in_the_way).map_err(failed)?;
    for args in [&["back"][..], &["hold"], &["move"]] {
        forgets(args)?;
    }
    assert_eq!(mode(&setup)?, "moved");
    fs::remove_dir(&in_the_way).map_err(failed)?;
    assert!(!run(&["back"])?.stderr.contains("forgets"));
    assert!(!warnings()?.contains("are not kept"));
    old.terminate().map(drop)
}

/// Runs the old server's daemon in a process after `lose` has taken something away from it.
fn started_after(lose: impl FnMut() -> io::Result<()> + Send + Sync + 'static) -> Result<Output> {
    let lab = Lab::new()?;
    let before = Snapshot::of(lab.old_server())?;
    let setup = setup(&lab)?;
    let mut command = Command::new(exe());
    command
        .args(setup.daemon_args(Role::Old))
        .env("IPMOVED_RUNTIME_DIR", lab.dir().join("run"));
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; the closures above
    // make bare system calls with constant arguments.
    unsafe { command.pre_exec(lose) };
    let said = lab.old_server().output(command, COMMAND_TIMEOUT)?;
    Snapshot::of(lab.old_server())?.is_same_as(&before)?;
    Ok(said)
}

/// Says what is wrong with a refusal; `None` if nothing is.
fn complaint(said: &Output, code: i32, names: &str) -> Option<String> {
    let lines = said.stderr.lines().count();
    if said.status.code() != Some(code) {
        Some(format!(
            "ended with {}, not {code}: {}",
            said.status, said.stderr
        ))
    } else if lines != 1 {
        Some(format!("{lines} lines:\n{}", said.stderr))
    } else if !said.stderr.contains(names) {
        Some(format!("does not name {names}: {}", said.stderr))
    } else {
        None
    }
}
