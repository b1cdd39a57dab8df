//! `ipmoved` processes on the two servers of a lab, started with the command lines of the README.
//!
//! Owns how to start them, wait for them, signal them and ask them. It knows the binary only by its
//! commands: arguments, exit code, output and `status --json`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use rustix::process::Signal;
use serde_json::Value;

use super::topology::{MOVED, NEW, OLD};
use super::{Doing, Lab, LabError, Namespace, Output, Process, Result, poll_until};
use crate::model::peer::Role;

/// How long two daemons may take to find each other. They send a lost first message again after 5 s
/// (WireGuard's REKEY_TIMEOUT), twice.
pub const UP_TIMEOUT: Duration = Duration::from_secs(15);

/// How long a command other than a daemon may take.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a daemon may take to undo its changes after SIGTERM.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// How often `status` is asked while waiting.
const STATUS_PAUSE: Duration = Duration::from_millis(25);

/// The settings of two daemons that have not been started yet.
#[derive(Clone, Debug)]
pub struct DaemonSetup<'lab> {
    lab: &'lab Lab,
    exe: PathBuf,
    runtime_dir: Option<PathBuf>,
    old: Side,
    new: Side,
}

#[derive(Clone, Debug)]
struct Side {
    peer: Option<String>,
    psk_file: PathBuf,
    args: Vec<String>,
    hosts: Option<PathBuf>,
}

impl<'lab> DaemonSetup<'lab> {
    /// Both daemons as the README writes them, with a key of their own, moving [`MOVED`].
    /// `exe` is the `ipmoved` binary. Their run-time files are in the lab's directory.
    pub fn new(lab: &'lab Lab, exe: &Path) -> Result<Self> {
        let psk_file = lab.dir().join("psk");
        if !psk_file.exists() {
            write_psk(&psk_file)?;
        }
        let side = |peer: IpAddr, args: &[String]| Side {
            peer: Some(peer.to_string()),
            psk_file: psk_file.clone(),
            args: args.to_vec(),
            hosts: None,
        };
        Ok(Self {
            lab,
            exe: exe.into(),
            runtime_dir: Some(lab.dir().join("run")),
            old: side(NEW.into(), &["--move".into(), MOVED.to_string()]),
            new: side(OLD.into(), &[]),
        })
    }

    /// Moves these addresses (`ADDR[:PORTS][/tcp|/udp]`) instead of [`MOVED`].
    #[must_use]
    pub fn moves(mut self, moves: &[&str]) -> Self {
        let option = |moved: &&str| ["--move".to_owned(), (*moved).to_owned()];
        self.old.args = moves.iter().flat_map(option).collect();
        self
    }

    /// Lets the new server accept what is moved now, and nothing else.
    #[must_use]
    pub fn accept_what_moves(mut self) -> Self {
        let accept = |arg: &String| match arg.as_str() {
            "--move" => "--accept".to_owned(),
            other => other.to_owned(),
        };
        let args = self.old.args.iter().map(accept);
        self.new.args.extend(args);
        self
    }

    /// Gives one side more arguments.
    #[must_use]
    pub fn args(mut self, role: Role, args: &[&str]) -> Self {
        let more = args.iter().map(|&arg| arg.to_owned());
        self.side_mut(role).args.extend(more);
        self
    }

    /// Lets one side expect its peer at another address.
    #[must_use]
    pub fn peer(mut self, role: Role, peer: impl Into<IpAddr>) -> Self {
        self.side_mut(role).peer = Some(peer.into().to_string());
        self
    }

    /// Starts one side without its peer's address, so that it waits until the peer finds it.
    #[must_use]
    pub fn without_peer(mut self, role: Role) -> Self {
        self.side_mut(role).peer = None;
        self
    }

    /// Gives one side its peer's address as a name. A file of its own in the place of `/etc/hosts`
    /// resolves that name, and no name server answers. A file beside it, which ends in `.resolv`,
    /// stands in the place of `/etc/resolv.conf`; it is made unless it is there.
    #[must_use]
    pub fn peer_by_name(mut self, role: Role, name: &str, hosts: &Path) -> Self {
        let side = self.side_mut(role);
        side.peer = Some(name.into());
        side.hosts = Some(hosts.into());
        self
    }

    /// The file with one side's key.
    pub fn psk_file(&self, role: Role) -> &Path {
        &self.side(role).psk_file
    }

    /// Gives one side a new key, which the other does not have.
    pub fn another_key(mut self, role: Role) -> Result<Self> {
        let path = self.lab.dir().join(format!("psk-of-{role}"));
        write_psk(&path)?;
        self.side_mut(role).psk_file = path;
        Ok(self)
    }

    /// Lets the daemons choose the directory of their run-time files, as on a real host.
    #[must_use]
    pub fn default_runtime_dir(mut self) -> Self {
        self.runtime_dir = None;
        self
    }

    /// The lab of the daemons.
    pub fn lab(&self) -> &'lab Lab {
        self.lab
    }

    /// The server on which the daemon of that role runs.
    pub fn host(&self, role: Role) -> &'lab Namespace {
        match role {
            Role::Old => self.lab.old_server(),
            Role::New => self.lab.new_server(),
        }
    }

    /// The arguments of one side's daemon.
    pub fn daemon_args(&self, role: Role) -> Vec<String> {
        let side = self.side(role);
        let mut args = Vec::new();
        if let Some(peer) = &side.peer {
            args.extend(["--peer".to_owned(), peer.clone()]);
        }
        args.extend(["--psk-file".to_owned(), side.psk_file.display().to_string()]);
        args.extend_from_slice(&side.args);
        args
    }

    /// The command line as a person would type it.
    pub fn command_line(&self, role: Role) -> String {
        let mut line = "ipmoved".to_owned();
        for arg in self.daemon_args(role) {
            // Writing to a String cannot fail.
            let _ = write!(line, " {arg}");
        }
        line
    }

    /// Starts one side's daemon without waiting for it.
    pub fn start(&self, role: Role) -> Result<Daemon<'lab>> {
        let mut command = self.command();
        command.args(self.daemon_args(role));
        if let Some(hosts) = &self.side(role).hosts {
            super::namespace::with_hosts(&mut command, hosts)?;
        }
        Ok(Daemon {
            process: self.host(role).spawn(command)?,
            role,
            setup: self.clone(),
        })
    }

    /// Starts `ipmoved nat` with these arguments on the old server; nothing runs on the new one.
    pub fn start_nat(&self, args: &[&str]) -> Result<Daemon<'lab>> {
        let mut command = self.command();
        command.arg("nat").args(args);
        Ok(Daemon {
            process: self.host(Role::Old).spawn(command)?,
            role: Role::Old,
            setup: self.clone(),
        })
    }

    /// Starts both daemons, and waits until each says that it is up.
    pub fn start_both(&self) -> Result<Daemons<'lab>> {
        let mut daemons = Daemons {
            old: self.start(Role::Old)?,
            new: self.start(Role::New)?,
        };
        daemons.wait_until_up()?;
        Ok(daemons)
    }

    /// Runs a command of the binary to its end on one server: `["status", "--json"]`, for example.
    pub fn run(&self, role: Role, args: &[&str]) -> Result<Output> {
        let mut command = self.command();
        command.args(args);
        self.host(role).output(command, COMMAND_TIMEOUT)
    }

    /// What `status --json` says on one server.
    pub fn status(&self, role: Role) -> Result<Status> {
        let said = self.run(role, &["status", "--json"])?;
        if !said.status.success() {
            return Err(LabError::unexpected(format!(
                "`ipmoved status --json` on the {role} server ended with {}: {}",
                said.status,
                said.stderr.trim_end()
            )));
        }
        serde_json::from_str(&said.stdout)
            .map(Status)
            .map_err(io::Error::from)
            .doing(|| format!("read the status of the {role} server: {}", said.stdout))
    }

    /// The binary, ready for arguments, with its run-time files in this lab's directory.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.exe);
        command.env_remove("IPMOVED_PSK");
        command.env("IPMOVED_STATE_DIR", self.lab.dir().join("state"));
        match &self.runtime_dir {
            Some(dir) => command.env("IPMOVED_RUNTIME_DIR", dir),
            None => command.env_remove("IPMOVED_RUNTIME_DIR"),
        };
        command
    }

    /// Another program, in the environment of [`command`](Self::command): it finds the daemons.
    pub fn beside(&self, program: &str) -> Command {
        let mut beside = Command::new(program);
        for (name, value) in self.command().get_envs() {
            match value {
                Some(value) => beside.env(name, value),
                None => beside.env_remove(name),
            };
        }
        beside
    }

    fn side(&self, role: Role) -> &Side {
        match role {
            Role::Old => &self.old,
            Role::New => &self.new,
        }
    }

    fn side_mut(&mut self, role: Role) -> &mut Side {
        match role {
            Role::Old => &mut self.old,
            Role::New => &mut self.new,
        }
    }
}

/// A running daemon; killed when dropped.
#[derive(Debug)]
pub struct Daemon<'lab> {
    process: Process,
    role: Role,
    setup: DaemonSetup<'lab>,
}

impl Daemon<'_> {
    /// Waits until its only tunnel is up.
    ///
    /// # Errors
    /// If it ends before that (the error has its output), or if it takes longer than
    /// [`UP_TIMEOUT`].
    pub fn wait_until_up(&mut self) -> Result<()> {
        self.wait_for_state("up", UP_TIMEOUT)
    }

    /// Waits until the state of its only tunnel is `state`: `connecting`, `up` or `down`.
    pub fn wait_for_state(&mut self, state: &str, patience: Duration) -> Result<()> {
        let mut last = None;
        let reached = poll_until(patience, STATUS_PAUSE, || {
            if let Some(status) = self.process.exited() {
                return Some(Err(LabError::unexpected(format!(
                    "the daemon of the {} server ended with {status}: {}",
                    self.role,
                    self.process.stderr().trim_end()
                ))));
            }
            let status = self.setup.status(self.role);
            if status.as_ref().is_ok_and(|status| status.state() == state) {
                return Some(Ok(()));
            }
            last = Some(status);
            None
        });
        reached.unwrap_or_else(|| {
            Err(LabError::unexpected(format!(
                "the daemon of the {} server is not {state} after {patience:?}: {last:?}; it said: \
                 {}",
                self.role,
                self.process.stderr().trim_end()
            )))
        })
    }

    /// The output of `status --json`.
    pub fn status(&self) -> Result<Status> {
        self.setup.status(self.role)
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Stops it as an administrator does (SIGTERM), and expects exit code 0.
    pub fn terminate(self) -> Result<Output> {
        self.stop_by(Signal::TERM)
    }

    /// Stops it by a signal that it can act on, and expects exit code 0.
    pub fn stop_by(self, signal: Signal) -> Result<Output> {
        let role = self.role;
        self.process.signal(signal)?;
        let said = self.process.wait(STOP_TIMEOUT)?;
        if !said.status.success() {
            return Err(LabError::unexpected(format!(
                "the daemon of the {role} server ended with {} after {signal:?}: {}",
                said.status, said.stderr
            )));
        }
        Ok(said)
    }

    /// Waits for a daemon that refuses to run, and returns its output.
    pub fn stop_by_itself(self) -> Result<Output> {
        self.process.wait(STOP_TIMEOUT)
    }

    /// Kills it, so that it cannot undo anything (SIGKILL).
    pub fn kill(self) -> Result<()> {
        self.process.signal(Signal::KILL)?;
        self.process.wait(STOP_TIMEOUT).map(drop)
    }
}

/// Both daemons of a lab.
#[derive(Debug)]
pub struct Daemons<'lab> {
    /// On the old server.
    pub old: Daemon<'lab>,
    /// On the new server.
    pub new: Daemon<'lab>,
}

impl Daemons<'_> {
    /// Waits until both say that they are up.
    pub fn wait_until_up(&mut self) -> Result<()> {
        self.old.wait_until_up()?;
        self.new.wait_until_up()?;
        // What has moved is named a moment later: a packet before that is turned away, or, where
        // the address is kept, finds nobody who has it.
        let named = || {
            let status = self.new.status().ok()?;
            let some = |list: &str| {
                let list = status.tunnel()[list].as_array();
                list.is_some_and(|list| !list.is_empty())
            };
            (some("moved") || some("refused")).then_some(())
        };
        poll_until(UP_TIMEOUT, STATUS_PAUSE, named);
        Ok(())
    }

    /// Stops both.
    pub fn terminate(self) -> Result<()> {
        self.old.terminate()?;
        self.new.terminate().map(drop)
    }
}

/// The output of `status --json`.
#[derive(Clone, PartialEq, Debug)]
pub struct Status(pub Value);

impl Status {
    /// The first tunnel; `Null` if there is none.
    pub fn tunnel(&self) -> &Value {
        &self.0["tunnels"][0]
    }

    /// Its state: `connecting`, `up` or `down`; empty if there is none.
    pub fn state(&self) -> &str {
        self.tunnel()["state"].as_str().unwrap_or_default()
    }

    /// Every drop that the daemon has counted, by reason, whoever the sender was.
    pub fn all_drops(&self) -> BTreeMap<String, u64> {
        let tunnels = self.0["tunnels"].as_array().map_or(&[][..], Vec::as_slice);
        // With a single tunnel, status shows strangers' drops with its own.
        let strangers = (tunnels.len() > 1).then_some(&self.0);
        let mut all = BTreeMap::new();
        for of in tunnels.iter().chain(strangers) {
            for (reason, count) in of["drops"].as_object().into_iter().flatten() {
                *all.entry(reason.clone()).or_default() += count.as_u64().unwrap_or_default();
            }
        }
        all
    }

    /// The address of the first tunnel's peer; empty if it is not known.
    pub fn endpoint(&self) -> &str {
        self.tunnel()["endpoint"].as_str().unwrap_or_default()
    }

    /// The number of live flows.
    pub fn live_flows(&self) -> u64 {
        self.tunnel()["flows"]["live"].as_u64().unwrap_or_default()
    }

    /// The number of packets or datagrams dropped for a reason, whoever the sender was.
    pub fn drops(&self, reason: &str) -> u64 {
        self.all_drops().get(reason).copied().unwrap_or_default()
    }
}

/// Writes a new key as `ipmoved genpsk` prints it, readable by its owner alone.
pub fn write_psk(path: &Path) -> Result<()> {
    let doing = || format!("write key {}", path.display());
    let mut key = [0; 32];
    aws_lc_rs::rand::fill(&mut key)
        .map_err(|_| io::Error::other("no randomness"))
        .doing(doing)?;
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .doing(doing)?;
    writeln!(file, "{}", BASE64.encode(key)).doing(doing)
}

/// Reads a key file back, for tests that search for the key where it must not be.
pub fn read_psk(path: &Path) -> Result<String> {
    fs::read_to_string(path)
        .map(|text| text.trim_end().to_owned())
        .doing(|| format!("read key {}", path.display()))
}
