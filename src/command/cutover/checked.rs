//! What `ipmoved check` says before a cut-over changes anything.
//!
//! It is run with the arguments, the environment and the working directory of the daemon that runs,
//! as the kernel shows them, so that it looks at what that one has been given.

use std::ffi::OsString;
use std::fs;
use std::io::Read;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use serde::Deserialize;

/// How long it may take: names that are looked up, peers that do not answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// Findings that are shown of each kind.
const SHOWN: usize = 8;

/// What it found.
#[derive(PartialEq, Eq, Debug, Default)]
pub(super) struct Checked {
    /// What may not work, a line each.
    pub(super) warnings: Vec<String>,
    /// What cannot.
    pub(super) failures: Vec<String>,
}

/// What `check --json` prints.
#[derive(Deserialize)]
struct Said {
    checks: Vec<Finding>,
}

/// A finding of it.
#[derive(Deserialize)]
struct Finding {
    name: String,
    result: String,
    object: String,
    text: String,
    remedy: Option<String>,
}

/// Runs it for the daemon with this process id.
///
/// # Errors
/// Why it could not look.
pub(super) fn look(pid: u32) -> Result<Checked, String> {
    let cannot = |what: &str, error: &dyn std::fmt::Display| format!("{what}: {error}");
    let line = fs::read(format!("/proc/{pid}/cmdline"))
        .map_err(|error| cannot("the daemon's arguments cannot be read", &error))?;
    let words = words(&line)?;
    let mut check = Command::new("/proc/self/exe");
    check
        .args(["check", "--json"])
        .args(words)
        .current_dir(format!("/proc/{pid}/cwd"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        // ^C is for us alone.
        .process_group(0);
    let mut child = check
        .spawn()
        .map_err(|error| cannot("it cannot be run", &error))?;
    let (done, result) = mpsc::channel();
    let mut output = child.stdout.take();
    std::thread::spawn(move || {
        let mut said = Vec::new();
        let read = output.as_mut().map(|it| it.read_to_end(&mut said));
        let _ = done.send(matches!(read, Some(Ok(_))).then_some(said));
    });
    let said = result.recv_timeout(PATIENCE).ok().flatten();
    if said.is_none() {
        // It may have ended by itself.
        let _ = child.kill();
    }
    let _ = child.wait();
    match said {
        Some(said) => read(&said),
        None => Err(format!("it has not ended within {} s", PATIENCE.as_secs())),
    }
}

/// The daemon's arguments, without its name.
fn words(line: &[u8]) -> Result<Vec<OsString>, String> {
    let mut words: Vec<&[u8]> = line.split(|&byte| byte == 0).skip(1).collect();
    // Behind the last one is a zero, too.
    words.pop_if(|it| it.is_empty());
    let is_key = |word: &&[u8]| *word == b"--psk" || word.starts_with(b"--psk=");
    if words.iter().any(is_key) {
        // The daemon has overwritten it.
        return Err(
            "the key was given on the command line, where nobody can read it any more; \
                    --psk-file is better"
                .into(),
        );
    }
    Ok(words
        .into_iter()
        .map(|it| OsString::from_vec(it.to_vec()))
        .collect())
}

/// What it has said.
fn read(said: &[u8]) -> Result<Checked, String> {
    let said: Said =
        serde_json::from_slice(said).map_err(|_| "it has not said what it found".to_owned())?;
    let lines = |result: &str| {
        let each = said.checks.iter().filter(|it| it.result == result);
        let mut lines: Vec<String> = each.map(Finding::line).collect();
        let more = lines.len().saturating_sub(SHOWN);
        if more > 0 {
            lines.truncate(SHOWN);
            lines.push(format!("and {more} more: `ipmoved check`"));
        }
        lines
    };
    Ok(Checked {
        warnings: lines("warn"),
        failures: lines("fail"),
    })
}

impl Finding {
    fn line(&self) -> String {
        let Self {
            name,
            object,
            text,
            remedy,
            ..
        } = self;
        let line = match remedy {
            Some(remedy) => format!("{name}: {object}: {text}; run: {remedy}"),
            None => format!("{name}: {object}: {text}"),
        };
        line.replace(char::is_control, " ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_daemons_arguments_are_read_unless_its_key_is_among_them() {
        let of = |line: &[u8]| words(line).map_err(|error| error.chars().take(7).collect());
        let all = |words: &[&str]| Ok::<_, String>(words.iter().map(OsString::from).collect());
        assert_eq!(of(b"ipmoved\0--config\0a b\0"), all(&["--config", "a b"]));
        assert_eq!(of(b"ipmoved\0--tun\0\0"), all(&["--tun", ""]));
        assert_eq!(of(b"ipmoved\0"), all(&[]));
        for given in [&b"ipmoved\0--psk\0xxxx\0"[..], b"ipmoved\0--psk=xxxx\0"] {
            assert_eq!(of(given), Err("the key".into()));
        }
    }

    #[test]
    fn what_it_found_is_told_by_how_bad_it_is() {
        let finding = |result: &str, remedy: &str| {
            format!(
                r#"{{"name": "peer", "result": "{result}", "object": "192.0.2.1",
                     "text": "is away", "remedy": {remedy}, "more": 1}}"#
            )
        };
        let all = [
            finding("fail", r#""ping\n192.0.2.1""#),
            finding("ok", "null"),
        ];
        let warns = vec![finding("warn", "null"); SHOWN + 2];
        let said = format!(r#"{{"checks": [{}, {}]}}"#, all.join(","), warns.join(","));
        let found = read(said.as_bytes()).unwrap();
        assert_eq!(
            found.failures,
            ["peer: 192.0.2.1: is away; run: ping 192.0.2.1"]
        );
        assert_eq!(found.warnings.len(), SHOWN + 1);
        assert_eq!(found.warnings[SHOWN], "and 2 more: `ipmoved check`");
        assert!(read(b"").is_err());
    }
}
