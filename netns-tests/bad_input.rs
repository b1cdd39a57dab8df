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
use std::os::unix::process::CommandExt;
use std::process::Command;

use ipmoved::internals::Role;
use ipmoved::lab::daemon::COMMAND_TIMEOUT;
use ipmoved::lab::{Lab, Output, Snapshot};
use rustix::mount::MountFlags;
use rustix::thread::{CapabilitiesSecureBits, UnshareFlags};

use crate::stage::{Result, exe, moved, setup};

/// A flag, address, port, key, file or interface.
const BAD_INPUT: i32 = 2;
/// Privileges, TUN or a kernel feature.
const SYSTEM: i32 = 3;
/// An ipmoved runs already.
const OTHER_DAEMON: i32 = 4;

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
        (&["--max-flows", "0"], "--max-flows"),
        (&["--max-flows", "many"], "many"),
        (&["--cipher", "rot13"], "rot13"),
        (&["--log-format", "xml"], "xml"),
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
