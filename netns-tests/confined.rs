//! The privileges, keys and means of escape that a running daemon still has.
//!
//! ```text
//!  old server and new server, both daemons up; /proc shows what they hold
//! ```

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ipmoved::internals::Role;
use ipmoved::lab::daemon::read_psk;
use ipmoved::lab::topology::{NEW, OLD};
use ipmoved::lab::{Lab, LabError, poll_until};

use crate::independent_peer::IndependentPeer;
use crate::protocol_text::socket_to;
use crate::stage::{PATIENCE, Result, SILENCE, moved, setup};

/// `CAP_NET_ADMIN` and `CAP_BPF`.
const NEEDED: u64 = 1 << 12 | 1 << 39;

/// `SECCOMP_MODE_FILTER`.
const FILTERED: u64 = 2;

fn failed(error: std::io::Error) -> LabError {
    LabError::unexpected(error.to_string())
}

/// A number from the `status` file of each thread in `/proc`.
fn of_all_threads(pid: u32, field: &str, radix: u32) -> Result<Vec<u64>> {
    let mut found = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task")).map_err(failed)? {
        let path = task.map_err(failed)?.path().join("status");
        let text = fs::read_to_string(path).map_err(failed)?;
        let line = text.lines().find_map(|line| line.strip_prefix(field));
        let number = line.and_then(|line| u64::from_str_radix(line.trim(), radix).ok());
        found.push(number.ok_or_else(|| LabError::unexpected(format!("no {field}")))?);
    }
    Ok(found)
}

/// The children of a process.
fn children(pid: u32) -> Result<Vec<u32>> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let told = fs::read_to_string(path).map_err(failed)?;
    Ok(told
        .split_whitespace()
        .filter_map(|it| it.parse().ok())
        .collect())
}

/// Counts `needle` in the memory that a process can write to.
fn occurrences(pid: u32, needle: &[u8]) -> Result<usize> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).map_err(failed)?;
    let memory = File::open(format!("/proc/{pid}/mem")).map_err(failed)?;
    let mut found = 0;
    for line in maps.lines() {
        let mut words = line.split_ascii_whitespace();
        let (Some(range), Some(rights)) = (words.next(), words.next()) else {
            continue;
        };
        if !rights.starts_with("rw") {
            continue;
        }
        let (start, end) = range.split_once('-').unwrap_or_default();
        let number = |text| u64::from_str_radix(text, 16).unwrap_or_default();
        let (mut at, end) = (number(start), number(end));
        let mut chunk = vec![0; (1 << 20) + needle.len()];
        while at < end {
            let length = (end - at).min(chunk.len() as u64) as usize;
            // Guard pages cannot be read.
            if memory.read_exact_at(&mut chunk[..length], at).is_ok() {
                let first = needle[0];
                found += (0..=length.saturating_sub(needle.len()))
                    .filter(|&i| chunk[i] == first && chunk[i..length].starts_with(needle))
                    .count();
            }
            at += 1 << 20;
        }
    }
    Ok(found)
}

#[test]
fn the_daemon_holds_two_privileges_and_cannot_get_others() -> Result {
    moved(|on| {
        let mut daemons = on.daemons;
        for daemon in [&mut daemons.old, &mut daemons.new] {
            let pid = daemon.process().id();
            for field in ["CapEff:", "CapPrm:", "CapBnd:"] {
                let held = of_all_threads(pid, field, 16)?;
                assert!(held.len() >= 2, "threads");
                assert!(held.iter().all(|&held| held == NEEDED), "{field} {held:x?}");
            }
            for field in ["CapInh:", "CapAmb:"] {
                let held = of_all_threads(pid, field, 16)?;
                assert!(held.iter().all(|&held| held == 0), "{field} {held:x?}");
            }
            let stuck = of_all_threads(pid, "NoNewPrivs:", 10)?;
            assert!(stuck.iter().all(|&stuck| stuck == 1));
            let filtered = of_all_threads(pid, "Seccomp:", 10)?;
            assert!(filtered.iter().all(|&filtered| filtered == FILTERED));
        }
        // The privilege is enough to undo everything.
        daemons.old.terminate()?;
        daemons.new.terminate()?;
        Ok(())
    })
}

#[test]
fn the_key_is_not_in_the_memory_of_a_daemon_that_runs() -> Result {
    moved(|on| {
        let mut daemons = on.daemons;
        let text = read_psk(on.setup.psk_file(Role::Old))?;
        let raw = STANDARD.decode(&text).expect("a key");
        for daemon in [&mut daemons.old, &mut daemons.new] {
            let pid = daemon.process().id();
            assert_eq!(occurrences(pid, &raw)?, 0, "the key itself");
            assert_eq!(occurrences(pid, text.as_bytes())?, 0, "its text");
            // This shows that the search finds something.
            assert!(occurrences(pid, b"ipmoved0")? > 0);
        }
        Ok(())
    })
}

#[test]
fn keys_of_sessions_that_ended_are_not_in_memory() -> Result {
    ["auto", "aegis-256x4"]
        .into_iter()
        .try_for_each(|cipher| no_keys_of_sessions_that_ended(cipher, false))
}

/// Nor are those of sessions that another daemon had made.
#[test]
fn keys_that_were_taken_over_are_not_in_memory_once_their_sessions_have_ended() -> Result {
    no_keys_of_sessions_that_ended("auto", true)
}

fn no_keys_of_sessions_that_ended(cipher: &str, taken_over: bool) -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?
        .without_peer(Role::New)
        .args(Role::New, &["--cipher", cipher]);
    let mut daemon = setup.start(Role::New)?;
    daemon.wait_for_state("connecting", PATIENCE)?;
    let psk = read_psk(setup.psk_file(Role::New))?;
    let mut second = IndependentPeer::new(socket_to(lab.old_server(), NEW)?, &psk, 1);
    let mut secrets = Vec::new();
    for _ in 0..3 {
        second.shake_hands()?;
        second.control(&[2, 7, 0, 0, 0]);
        second.serve(PATIENCE, |it| it.heard(&[3]))?;
        second.others.clear();
        secrets.extend(second.session.as_ref().expect("a session").secrets());
    }
    daemon.wait_until_up()?;
    if taken_over {
        daemon = crate::takeover::take_over(&setup, Role::New, daemon)?;
        daemon.wait_until_up()?;
    }
    let pid = daemon.process().id();
    let forges = children(pid)?;
    assert_eq!(forges.len(), 1, "the process that keeps the privileges");
    let count = |secrets: &[[u8; 32]]| -> Result<usize> {
        let mut found = 0;
        for secret in secrets {
            found += occurrences(pid, secret)?;
            for &forge in &forges {
                assert_eq!(occurrences(forge, secret)?, 0, "in the other process");
            }
        }
        Ok(found)
    };
    assert!(
        occurrences(forges[0], b"ipmoved0")? > 0,
        "nothing is found at all"
    );
    // An AES key is the start of its own schedule, so the search must find that of the session in
    // use.
    assert!(count(&secrets)? > 0, "the search finds nothing at all");
    second.control(&[6]);
    daemon.wait_for_state("down", PATIENCE)?;
    std::thread::sleep(SILENCE);
    // A lane lets go of the sessions it saw last when the next datagram comes.
    for _ in 0..3 {
        second.socket().send(b"wake up").expect("sent");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(count(&secrets)?, 0, "keys of sessions that ended");
    Ok(())
}

#[test]
fn a_key_given_on_the_command_line_or_in_the_environment_is_not_shown_for_long() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let key = read_psk(setup.psk_file(Role::New))?;
    for by_environment in [false, true] {
        let mut command = setup.command();
        command.args(["--peer", &OLD.to_string()]);
        if by_environment {
            command.env("IPMOVED_PSK", &key);
        } else {
            command.args(["--psk", &key]);
        }
        let process = lab.new_server().spawn(command)?;
        let pid = process.id();
        let started = poll_until(PATIENCE, Duration::from_millis(20), || {
            setup.status(Role::New).ok().map(drop)
        });
        assert!(started.is_some(), "{}", process.stderr());
        for file in ["cmdline", "environ"] {
            let shown = fs::read(format!("/proc/{pid}/{file}")).map_err(failed)?;
            let shown = String::from_utf8_lossy(&shown).into_owned();
            assert!(!shown.contains(&key), "{file}: {shown}");
            if file == "cmdline" {
                assert!(shown.contains("--peer"), "{shown}");
            }
        }
        assert!(!process.stderr().contains(&key));
    }
    Ok(())
}

#[test]
fn a_key_file_that_others_can_read_is_warned_of() -> Result {
    for (mode, warned) in [(0o600, false), (0o640, true), (0o644, true), (0o400, false)] {
        let lab = Lab::new()?;
        let setup = setup(&lab)?;
        let file = setup.psk_file(Role::New);
        fs::set_permissions(file, fs::Permissions::from_mode(mode)).map_err(failed)?;
        let mut daemon = setup.start(Role::New)?;
        let words = format!("close it: chmod 600 {}", file.display());
        // The daemon warns before it says which server it is.
        let said = poll_until(PATIENCE, Duration::from_millis(20), || {
            let said = daemon.process().stderr();
            said.contains("this is the new server").then_some(said)
        });
        let said = said.ok_or_else(|| LabError::unexpected("it did not start"))?;
        assert_eq!(said.contains(&words), warned, "{mode:o}: {said}");
    }
    Ok(())
}
