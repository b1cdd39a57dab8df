//! A server on which `ipmoved check` is tried out: what is wrong there, what is found, and what the
//! command does that is shown.
//!
//! A remedy is taken from the JSON and given to `sh`, as a person would paste it. Programs that
//! cannot run here (`ufw`, `firewall-cmd`, `ssh`, `sudo`, `systemctl`, `timedatectl`) have
//! stand-ins that do what they would.

use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use ipmoved::internals::Role;
use ipmoved::lab::{DaemonSetup, LabError, Output};
use serde_json::Value;

use crate::stage::{Result, exe};

/// How long a check may take: it waits seven seconds for a peer that says nothing.
const PATIENCE: Duration = Duration::from_secs(60);

/// The stand-ins: what each does with its arguments.
const STAND_INS: [(&str, &str); 6] = [
    // The chains of `ufw` let it through.
    (
        "ufw",
        "set -- $(echo \"$*\" | sed 's/.* proto //'); \
         exec iptables -I ufw-user-input -p $1 --dport $5 -j ACCEPT",
    ),
    (
        "firewall-cmd",
        "for word; do case $word in \
         --get-zone-of-interface=*) echo public; exit;; \
         --add-port=*) port=${word#*=}; \
         nft insert rule inet firewalld filter_IN ${port#*/} dport ${port%/*} accept;; \
         esac; done",
    ),
    // Into the other server, by its network alone.
    (
        "ssh",
        "shift; [ $# = 0 ] || exec nsenter --net=\"$OTHER\" sh -c \"$*\"",
    ),
    (
        "systemctl",
        "[ \"$*\" = 'start ipmoved' ] || exit 1
        eval \"exec $OTHERS_DAEMON\" >/dev/null 2>&1 & echo $! > \"$(dirname \"$0\")/daemon.pid\"",
    ),
    // It sets the clock of whoever is behind, which here is only told.
    (
        "timedatectl",
        "[ \"$*\" = 'set-ntp true' ] && rm \"$(dirname \"$0\")/clock\"",
    ),
    ("sudo", "exec \"$@\""),
];

/// Words, as a shell takes each for one.
fn words(words: &[String]) -> String {
    let quoted: Vec<String> = words.iter().map(|word| format!("'{word}'")).collect();
    quoted.join(" ")
}

/// A server on which checks are made.
pub(crate) struct Bench<'lab> {
    pub(crate) setup: DaemonSetup<'lab>,
    pub(crate) role: Role,
    pub(crate) bin: PathBuf,
}

/// What is done to a server, and what the check says then.
pub(crate) struct Case {
    /// What is not as it should be.
    pub(crate) breaks: &'static str,
    /// Flags beside those that the server has.
    pub(crate) flags: &'static [&'static str],
    /// The name of the check, its result, and what its object or text holds.
    pub(crate) finds: (&'static str, &'static str, &'static str),
    /// What undoes it all.
    pub(crate) heals: &'static str,
}

pub(crate) fn case(
    breaks: &'static str,
    flags: &'static [&'static str],
    finds: (&'static str, &'static str, &'static str),
    heals: &'static str,
) -> Case {
    Case {
        breaks,
        flags,
        finds,
        heals,
    }
}

/// One finding.
pub(crate) fn find<'a>(
    found: &'a Value,
    (name, result, holds): (&str, &str, &str),
) -> Option<&'a Value> {
    let checks = found["checks"].as_array()?;
    checks.iter().find(|it| {
        let says = format!("{}: {}", it["object"], it["text"]);
        it["name"] == name && it["result"] == result && says.contains(holds)
    })
}

impl<'lab> Bench<'lab> {
    pub(crate) fn new(setup: DaemonSetup<'lab>, role: Role) -> Result<Self> {
        let bin = setup.lab().dir().join(format!("bin-{role}"));
        let make = || -> std::io::Result<()> {
            std::fs::create_dir_all(&bin)?;
            let binary = bin.join("ipmoved");
            std::os::unix::fs::symlink(exe(), binary)?;
            for (name, does) in STAND_INS {
                let path = bin.join(name);
                std::fs::write(&path, format!("#!/bin/sh\n{does}\n"))?;
                std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
            }
            Ok(())
        };
        make().map_err(|error| LabError::unexpected(format!("stand-ins: {error}")))?;
        Ok(Self { setup, role, bin })
    }

    /// Gives a line to the shell, on this server.
    pub(crate) fn shell(&self, line: &str, envs: &[(&str, &str)]) -> Result<Output> {
        let path = std::env::var("PATH").unwrap_or_default();
        let mut command = self.setup.beside("sh");
        command.args(["-c", line]);
        command.env_remove("SSH_CONNECTION");
        command.env("PATH", format!("{}:{path}", self.bin.display()));
        let other = self.setup.host(self.role.other());
        let net = format!("/proc/{}/fd/{}", std::process::id(), other.fd().as_raw_fd());
        command.env("OTHER", net);
        let daemon = words(&self.setup.daemon_args(self.role.other()));
        command.env("OTHERS_DAEMON", format!("ipmoved --lanes 1 {daemon}"));
        command.envs(envs.iter().copied());
        self.setup.host(self.role).output(command, PATIENCE)
    }

    pub(crate) fn sh(&self, lines: &str) -> Result {
        let output = self.shell(&format!("set -e\n{lines}"), &[])?;
        if output.status.success() {
            return Ok(());
        }
        let text = format!("{lines}: {}{}", output.stdout, output.stderr);
        Err(LabError::unexpected(text))
    }

    /// The command line of a check.
    pub(crate) fn line(&self, flags: &[&str]) -> String {
        let mut args = self.setup.daemon_args(self.role);
        args.extend(flags.iter().map(|&flag| flag.to_owned()));
        format!("ipmoved check --json --lanes 1 {}", words(&args))
    }

    pub(crate) fn read(output: &Output) -> Result<Value> {
        serde_json::from_str(&output.stdout).map_err(|error| {
            let text = format!("{error}: {}{}", output.stdout, output.stderr);
            LabError::unexpected(text)
        })
    }

    /// What a check finds; its exit code is that of the worst.
    pub(crate) fn check(&self, line: &str, envs: &[(&str, &str)]) -> Result<Value> {
        let output = self.shell(line, envs)?;
        let found = Self::read(&output)?;
        let worst = ["ok", "warn", "fail"]
            .iter()
            .position(|it| found["result"] == *it);
        let code = output
            .status
            .code()
            .and_then(|code| usize::try_from(code).ok());
        assert_eq!(code, worst, "{found:#}");
        Ok(found)
    }

    /// Breaks something, has it found, mends it by the command that is shown, and heals the rest.
    pub(crate) fn try_out(&self, case: &Case) -> Result {
        self.sh(case.breaks)?;
        let line = self.line(case.flags);
        let found = self.check(&line, &[])?;
        let Some(finding) = find(&found, case.finds) else {
            panic!("{}: {:?} is not in {found:#}", case.breaks, case.finds);
        };
        let remedy = finding["remedy"].as_str().unwrap_or_default().to_owned();
        // One that is a check itself says that all is well now; every other one mends something.
        let mended = self.shell(&remedy, &[])?;
        let again = if remedy.contains(" check ") {
            Self::read(&mended)?
        } else {
            assert!(mended.status.success(), "{remedy}: {}", mended.stderr);
            self.check(&line, &[])?
        };
        let still = find(&again, case.finds);
        assert_eq!(still, None, "{remedy} does not mend it");
        self.sh(case.heals)
    }

    /// Breaks something that no command mends, has it found, and heals it. The command that is
    /// shown to a person runs, and prints this.
    pub(crate) fn shows(&self, case: &Case, remedy: &str, prints: &str) -> Result {
        self.sh(case.breaks)?;
        let line = self.line(case.flags);
        let found = self.check(&line, &[])?;
        let Some(finding) = find(&found, case.finds) else {
            panic!("{}: {:?} is not in {found:#}", case.breaks, case.finds);
        };
        assert_eq!(finding["remedy"], remedy);
        let shown = self.shell(remedy, &[])?;
        let all = format!("{}{}", shown.stdout, shown.stderr);
        assert!(all.contains(prints), "{remedy}: {all}");
        self.sh(case.heals)?;
        let again = self.check(&line, &[])?;
        assert_eq!(
            find(&again, case.finds),
            None,
            "{} does not heal it",
            case.heals
        );
        Ok(())
    }

    /// A check after something was done to the file system, which nobody else sees. `REMEDY` in it
    /// is this remedy.
    pub(crate) fn apart(&self, done: &str, flags: &[&str], remedy: &str) -> Result<Value> {
        let line = format!("unshare --mount sh -c '{done}; eval \"$CHECK\"'");
        let check = self.line(flags);
        self.check(&line, &[("CHECK", &check), ("REMEDY", remedy)])
    }

    /// Checks until it finds that.
    pub(crate) fn poll(&self, line: &str, finds: (&str, &str, &str)) -> Result<Value> {
        const TRIES: u32 = 20;
        let mut last = Value::Null;
        for _ in 0..TRIES {
            last = self.check(line, &[])?;
            if find(&last, finds).is_some() {
                return Ok(last);
            }
        }
        Err(LabError::unexpected(format!("{finds:?}: {last:#}")))
    }
}
