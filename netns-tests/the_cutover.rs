//! A cut-over and everything in between: ^C, kill -9 of either daemon and of the command, at each
//! step, and another command that goes back.
//!
//! ```text
//!                                ┌── old server: its service runs all the time
//!  clients, all the time ── router ──┤              ║ tunnel
//!                                └── new server: its service is there, or not yet
//! ```

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Shutdown};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ipmoved::internals::Role;
use ipmoved::lab::topology::{MOVED, NEW};
use ipmoved::lab::traffic::Conversation;
use ipmoved::lab::{DaemonSetup, Daemons, Lab, LabError, Probe, Process, Service, poll_until};
use rustix::process::Signal;

use crate::behind_dnat::shell;
use crate::stage::{PATIENCE, Result, setup};
use crate::the_move::{
    Asked, CUTOVER, PAUSE, Script, Services, ask_all_the_time, modes, run, start,
};

/// Where a cut-over is when something happens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum At {
    /// A client's connection is still there.
    Drain,
    /// `--stop` runs.
    Stop,
    /// Nothing listens on the new server yet.
    Listen,
    /// The daemon is about to be asked to send what waits to the new server.
    Deliver,
    /// Nobody was answered there yet.
    Watch,
}

/// What happens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fault {
    /// ^C.
    Interrupt,
    /// The old server's daemon is killed, and started again.
    OldDaemon,
    /// The same of the new server's.
    NewDaemon,
    /// The command itself is killed.
    Command,
    /// Somebody else goes back.
    Back,
    /// The tunnel is gone.
    Tunnel,
}

/// The moves: with named ports the new server can tell whether something listens.
const MOVES: [&str; 2] = ["192.0.2.5:80/tcp", "[2001:db8:a::5]:80/tcp"];

/// What keeps clients of the new server from being answered.
const DEAF: &str = "nft 'table inet deaf {
    chain in { type filter hook input priority 0; tcp dport 80 drop; }
}'";

/// What stands between the command and the daemon, and keeps back the order by which what waits is
/// delivered.
struct Between {
    socket: PathBuf,
    real: PathBuf,
    order: Arc<Order>,
}

/// The order that is kept back.
#[derive(Default)]
struct Order {
    has_come: AtomicBool,
    passes: AtomicBool,
    /// It never comes: the command was killed before.
    is_lost: AtomicBool,
}

impl Between {
    /// Takes the place of the control socket of the old server's daemon, until that is started
    /// again.
    fn new(lab: &Lab) -> Result<Self> {
        let inode = lab.old_server().run(|| {
            let found = fs::metadata("/proc/thread-self/ns/net").map_err(unexpected)?;
            Ok(found.ino())
        })?;
        let socket = lab.dir().join(format!("run/net-{inode}/control.sock"));
        let real = socket.with_extension("real");
        fs::rename(&socket, &real).map_err(unexpected)?;
        let listener = UnixListener::bind(&socket).map_err(unexpected)?;
        let order = Arc::<Order>::default();
        let (daemon, of_all) = (real.clone(), Arc::clone(&order));
        // It ends with the test.
        std::thread::spawn(move || {
            for command in listener.incoming().filter_map(std::result::Result::ok) {
                let (daemon, order) = (daemon.clone(), Arc::clone(&of_all));
                std::thread::spawn(move || pass(command, &daemon, &order));
            }
        });
        Ok(Self {
            socket,
            real,
            order,
        })
    }
}

impl Drop for Between {
    fn drop(&mut self) {
        // Another daemon has made its own.
        if UnixStream::connect(&self.real).is_ok() {
            let _ = fs::rename(&self.real, &self.socket);
        }
    }
}

/// Passes on what a command asks the daemon, and its answers.
fn pass(command: UnixStream, daemon: &Path, order: &Order) -> Option<()> {
    let mut daemon = UnixStream::connect(daemon).ok()?;
    let (mut to_command, mut from_daemon) = (command.try_clone().ok()?, daemon.try_clone().ok()?);
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut from_daemon, &mut to_command);
        let _ = to_command.shutdown(Shutdown::Both);
    });
    for line in BufReader::new(command).lines() {
        let line = line.ok()?;
        if line.contains(r#""order":"move""#) {
            order.has_come.store(true, SeqCst);
            let passes = || order.passes.load(SeqCst).then_some(());
            let _ = poll_until(CUTOVER, PAUSE, passes);
            if order.is_lost.load(SeqCst) {
                break;
            }
        }
        daemon.write_all(format!("{line}\n").as_bytes()).ok()?;
    }
    daemon.shutdown(Shutdown::Both).ok()
}

fn unexpected(error: std::io::Error) -> LabError {
    LabError::unexpected(error.to_string())
}

/// Clients stop to ask, also if the test fails.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

/// A cut-over that stays at one step until it is let go.
struct Pinned<'lab> {
    at: At,
    lab: &'lab Lab,
    cutover: Process,
    script: Script,
    lasting: Option<Conversation>,
    new: Option<Services>,
    between: Option<Between>,
}

impl<'lab> Pinned<'lab> {
    fn new(lab: &'lab Lab, setup: &DaemonSetup<'lab>, at: At, number: usize) -> Result<Self> {
        let script = Script {
            dir: lab.dir().join(number.to_string()),
        };
        let made = fs::create_dir(&script.dir);
        made.map_err(|error| LabError::unexpected(error.to_string()))?;
        let mut lasting = None;
        let mut new = None;
        let mut between = None;
        let stop = script.line("stop");
        let args = match at {
            At::Drain => {
                let conversation = lasting.insert(lab.client().converse(MOVED)?);
                conversation.exchange(b"still there?", PATIENCE)?;
                vec!["cutover", "--drain", "60"]
            }
            At::Stop => vec!["cutover", "--drain", "0", "--stop", &stop],
            At::Listen => vec!["cutover", "--drain", "0"],
            At::Deliver => {
                new = Some(Services::new(lab)?);
                between = Some(Between::new(lab)?);
                vec!["cutover", "--drain", "0"]
            }
            At::Watch => {
                new = Some(Services::new(lab)?);
                shell(lab.new_server(), DEAF)?;
                vec!["cutover", "--drain", "0"]
            }
        };
        let cutover = start(setup, &args)?;
        let there = match at {
            At::Drain => "new connections wait",
            At::Stop => "running: ",
            At::Listen => " drain ",
            At::Deliver => " listen ",
            At::Watch => " deliver ",
        };
        let has_come = || {
            let between = between.as_ref();
            between.is_none_or(|it: &Between| it.order.has_come.load(SeqCst))
        };
        let is_there = || (cutover.stdout().contains(there) && has_come()).then_some(());
        poll_until(CUTOVER, PAUSE, is_there)
            .ok_or_else(|| LabError::unexpected(format!("{at:?}: {}", cutover.stdout())))?;
        Ok(Self {
            at,
            lab,
            cutover,
            script,
            lasting,
            new,
            between,
        })
    }

    /// It goes on to the end.
    fn let_go(&mut self) -> Result {
        self.lasting = None;
        if self.at == At::Stop {
            self.script.is_done("stop")?;
        }
        self.hear_again()?;
        self.pass_on(Fault::NewDaemon);
        if self.new.is_none() {
            self.new = Some(Services::new(self.lab)?);
        }
        Ok(())
    }

    /// What was kept back is passed on, or lost.
    fn pass_on(&self, fault: Fault) {
        if let Some(Between { order, .. }) = &self.between {
            order.is_lost.store(fault == Fault::Command, SeqCst);
            order.passes.store(true, SeqCst);
        }
    }

    fn hear_again(&self) -> Result {
        match self.at {
            At::Watch => shell(self.lab.new_server(), "nft delete table inet deaf || true"),
            At::Drain | At::Stop | At::Listen | At::Deliver => Ok(()),
        }
    }
}

fn until_modes(setup: &DaemonSetup<'_>, wanted: &str) -> Result {
    let are = || (modes(setup).ok()? == [wanted, wanted]).then_some(());
    poll_until(CUTOVER, PAUSE, are)
        .ok_or_else(|| LabError::unexpected(format!("{:?}, not {wanted}", modes(setup))))
}

/// Somebody who begins now is answered by the old server.
fn is_served_here(asked: &Mutex<Vec<Asked>>) -> Result {
    let since = Instant::now();
    let served = || {
        let all = asked.lock().ok()?;
        let mut of_now = all.iter().filter(|it| it.begun >= since);
        let server = of_now.find_map(|it| it.server.as_ref().ok().copied())?;
        drop(all);
        Some(server)
    };
    let server = poll_until(CUTOVER, PAUSE, served);
    let here: [IpAddr; 2] = [MOVED.into(), ipmoved::lab::topology::MOVED6.into()];
    match server {
        Some(server) if here.contains(&server) => Ok(()),
        other => Err(LabError::unexpected(format!("served by {other:?}"))),
    }
}

/// One cut-over to which something happens at a step. What it ends in is what was promised.
fn one<'lab>(
    setup: &DaemonSetup<'lab>,
    daemons: Daemons<'lab>,
    (at, fault, number): (At, Fault, usize),
) -> Result<Daemons<'lab>> {
    let lab = setup.lab();
    let Daemons { mut old, mut new } = daemons;
    let mut pinned = Pinned::new(lab, setup, at, number)?;
    match fault {
        Fault::Interrupt => pinned.cutover.signal(Signal::INT)?,
        Fault::OldDaemon => {
            old.kill()?;
            old = setup.start(Role::Old)?;
            old.wait_until_up()?;
        }
        Fault::NewDaemon => {
            new.kill()?;
            new = setup.start(Role::New)?;
            new.wait_until_up()?;
            pinned.let_go()?;
        }
        Fault::Command => pinned.cutover.signal(Signal::KILL)?,
        Fault::Back => {
            let said = run(setup, &["back"])?;
            // Nobody watches for longer than ten seconds.
            assert!(
                at == At::Watch || said.stderr.contains("has ended the cutover of process"),
                "{said:?}"
            );
            assert_eq!(modes(setup)?, ["here", "here"], "at once");
        }
        Fault::Tunnel => {
            new.terminate()?;
            pinned.pass_on(fault);
            let notices = || pinned.cutover.stdout().contains("going back").then_some(());
            poll_until(CUTOVER, PAUSE, notices).expect("it notices");
            new = setup.start(Role::New)?;
        }
    }
    let goes_on = fault == Fault::NewDaemon;
    if !goes_on {
        pinned.hear_again()?;
        pinned.pass_on(fault);
    }
    let said = pinned.cutover.wait(CUTOVER)?;
    match fault {
        // On a slow machine it is away for too long.
        Fault::NewDaemon => {
            let ends = if said.status.success() {
                "moved"
            } else {
                "here"
            };
            assert_eq!(modes(setup)?, [ends, ends], "{said:?}");
        }
        Fault::Command => {
            // Nobody else ends what it has run.
            pinned.script.is_done("stop")?;
            let left = modes(setup)?;
            match at {
                At::Watch => assert_ne!(left, ["held", "held"]),
                At::Drain | At::Stop | At::Listen | At::Deliver => {
                    assert_eq!(left, ["held", "held"]);
                }
            }
        }
        Fault::Interrupt | Fault::OldDaemon | Fault::Back | Fault::Tunnel => {
            assert_eq!(said.status.code(), Some(1), "{said:?}");
            assert_eq!(said.stderr.lines().count(), 1, "{said:?}");
        }
    }
    if goes_on || fault == Fault::Command {
        run(setup, &["back"])?;
    }
    until_modes(setup, "here")?;
    old.wait_until_up()?;
    Ok(Daemons { old, new })
}

#[test]
fn whatever_happens_at_whichever_step_nobody_is_refused() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?
        .moves(&MOVES)
        .args(Role::Old, &["--start", "here"]);
    let _old = Services::old(&lab)?;
    let mut daemons = setup.start_both()?;
    let (over, asked) = (AtomicBool::new(false), Mutex::default());
    let result = std::thread::scope(|scope| -> Result<_> {
        scope.spawn(|| ask_all_the_time(lab.client(), &over, &asked));
        let _ends = Ends(&over);
        let mut number = 0;
        for fault in [
            Fault::Interrupt,
            Fault::OldDaemon,
            Fault::NewDaemon,
            Fault::Command,
            Fault::Back,
            Fault::Tunnel,
        ] {
            for at in [At::Drain, At::Stop, At::Listen, At::Deliver, At::Watch] {
                number += 1;
                let what = |error| LabError::unexpected(format!("{fault:?} at {at:?}: {error}"));
                daemons = one(&setup, daemons, (at, fault, number)).map_err(what)?;
                is_served_here(&asked).map_err(what)?;
            }
        }
        Ok(daemons)
    });
    let daemons = result?;
    let asked = asked.into_inner().unwrap_or_default();
    // Who waits for a daemon to be started again may give up on a slow machine.
    let refused = |error: &&String| !error.contains("timed out");
    let errors = asked.iter().filter_map(|it| it.server.as_ref().err());
    let refused: Vec<&String> = errors.filter(refused).collect();
    assert!(refused.is_empty(), "{refused:?} of {}", asked.len());
    daemons.terminate()
}

#[test]
fn whoever_is_refused_by_the_new_server_is_not_told_and_served_by_the_old_one() -> Result {
    let lab = Lab::new()?;
    // A whole address, and a new server that forwards: nobody can tell whether something listens.
    let setup = setup(&lab)?.args(Role::Old, &["--start", "here"]);
    let old = Service::start(lab.old_server(), MOVED)?;
    let host = lab.new_server();
    host.set_sysctls(&[("ipv4/ip_forward", "1")])?;
    let daemons = setup.start_both()?;
    let client = lab.client();
    for (number, comes) in [false, true].into_iter().enumerate() {
        let script = Script {
            dir: lab.dir().join(number.to_string()),
        };
        let made = fs::create_dir(&script.dir);
        made.map_err(|error| LabError::unexpected(error.to_string()))?;
        let within = if comes { "60" } else { "5" };
        let stop = script.line("stop");
        let args = [
            "cutover", "--drain", "0", "--within", within, "--stop", &stop,
        ];
        let cutover = start(&setup, &args)?;
        script.runs("stop")?;
        let before = old.peers().len();
        let application = std::thread::scope(|scope| -> Result<_> {
            let asks = scope.spawn(|| client.probe_tcp(MOVED, CUTOVER));
            let status = || setup.status(Role::Old).ok();
            let waits = || (status()?.tunnel()["modes"][0]["waiting"] == 1).then_some(());
            poll_until(CUTOVER, PAUSE, waits).expect("it waits");
            script.is_done("stop")?;
            let drops = || Some(status()?.drops("refusal_withheld"));
            let known = drops().unwrap_or_default();
            // Again and again.
            let refused = || (drops()? >= known + 2).then_some(());
            poll_until(CUTOVER, PAUSE, refused).expect("it is refused");
            let application = comes.then(|| Service::start(host, NEW)).transpose()?;
            let said = cutover.wait(CUTOVER)?;
            assert_eq!(said.status.success(), comes, "{said:?}");
            assert!(
                said.stdout
                    .contains("nothing was found at 192.0.2.5:80/tcp"),
                "{said:?}"
            );
            assert_eq!(asks.join().expect("it does not panic")?, Probe::Open);
            Ok(application)
        })?;
        // A connection is open before the service has accepted it.
        let counts = || {
            let there = application.as_ref().map_or(0, |it| it.peers().len());
            [old.peers().len() - before, there]
        };
        poll_until(PATIENCE, PAUSE, || (counts() != [0, 0]).then_some(()));
        assert_eq!(counts(), [usize::from(!comes), usize::from(comes)]);
        run(&setup, &["back"])?;
    }
    // Where nothing can be behind, it waits for the ports that the old service serves.
    host.set_sysctls(&[("ipv4/ip_forward", "0")])?;
    let moves = start(&setup, &["cutover", "--drain", "0"])?;
    let held = || (modes(&setup).ok()? == ["held"]).then_some(());
    poll_until(CUTOVER, PAUSE, held).expect("it holds");
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(modes(&setup)?, ["held"]);
    let _application = Service::start(host, NEW)?;
    let said = moves.wait(CUTOVER)?;
    assert!(said.status.success(), "{said:?}");
    assert!(
        said.stdout.contains("something listens on the new server"),
        "{said:?}"
    );
    daemons.terminate()
}
