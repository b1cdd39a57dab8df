//! What the daemon does when nobody takes what it has to say: the uplink, who reads its log, the
//! service manager. It answers `status` all the same, and ends when it is told to.
//!
//! ```text
//! log reader, service manager ─╳─ new server: application, daemon ── slow uplink ──╳── client
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::net::UdpSocket;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use ipmoved::internals::Role;
use ipmoved::lab::daemon::UP_TIMEOUT;
use ipmoved::lab::topology::{MOVED, NEW, UPLINK};
use ipmoved::lab::{DaemonSetup, Lab, LabError, Process, patience, poll_until};
use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};

use crate::stage::{Moved, PATIENCE, Result, moved, setup};

/// How long a daemon may take to answer, and to end, on a machine that is busy with other tests.
const SOON: Duration = Duration::from_secs(3);

fn failed(error: impl std::fmt::Display) -> LabError {
    LabError::unexpected(error.to_string())
}

/// Asks for the status, and expects it soon.
fn answers(setup: &DaemonSetup<'_>) -> Result<ipmoved::lab::daemon::Status> {
    let asked = Instant::now();
    let status = setup.status(Role::New)?;
    let took = asked.elapsed();
    assert!(took < patience(SOON), "status took {took:?}");
    Ok(status)
}

/// Tells a daemon to end, and expects that it does so soon.
fn ends(daemon: Process) -> Result {
    let told = Instant::now();
    daemon.signal(Signal::TERM)?;
    let said = daemon.wait(Duration::from_secs(20))?;
    let took = told.elapsed();
    assert!(
        took < patience(SOON + Duration::from_secs(2)),
        "the end took {took:?}"
    );
    assert!(said.status.success(), "{said:?}");
    Ok(())
}

/// Stops a loop when it is dropped, whatever the reason.
struct Until<'a>(&'a AtomicBool);

impl Drop for Until<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

#[test]
fn an_uplink_that_is_full_holds_up_neither_status_nor_the_end() -> Result {
    moved(|on: Moved<'_>| {
        let (lab, setup_of) = (on.lab, &on.setup);
        let mut tc = Command::new("tc");
        tc.args(["qdisc", "add", "dev", UPLINK, "root", "tbf"]);
        // Next to nothing leaves: what has filled the buffer keeps it full.
        tc.args(["rate", "64bit", "burst", "2k", "limit", "100mb"]);
        let said = lab.new_server().output(tc, PATIENCE)?;
        assert!(said.status.success(), "{said:?}");
        // Enough flows that some are of each lane: the control task shares the first one's socket.
        let mut flows = Vec::new();
        for port in 5_000..5_032 {
            let server = (lab.new_server()).run(|| UdpSocket::bind((NEW, port)).map_err(failed))?;
            let client = lab.client().udp_socket((MOVED, port))?;
            client.send(b"go").map_err(failed)?;
            server
                .set_read_timeout(Some(patience(PATIENCE)))
                .map_err(failed)?;
            let (_, asker) = server.recv_from(&mut [0; 8]).map_err(failed)?;
            server.set_nonblocking(true).map_err(failed)?;
            flows.push((server, client, asker));
        }
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Relaxed) {
                    for (server, _, asker) in &flows {
                        let _ = server.send_to(&[0; 1_400], asker);
                    }
                    thread::sleep(Duration::from_micros(100));
                }
            });
            let _until = Until(&done);
            // The socket's buffer is full once no more goes into the tunnel than comes out: nearly
            // nothing, as of a network card that stands still.
            let mut sent = Vec::new();
            let full = poll_until(4 * PATIENCE, Duration::from_millis(500), || {
                let status = setup_of.status(Role::New).ok()?;
                sent.push(status.tunnel()["tx"]["bytes"].as_u64()?);
                let last = sent.last()?;
                let slow = sent
                    .iter()
                    .rev()
                    .nth(2)
                    .is_some_and(|it| last - it < 512 << 10);
                (slow && last > &(4 << 20)).then_some(())
            });
            assert!(full.is_some(), "the buffer is not full: {sent:?}");
            // Meanwhile the control task has something to send each second.
            for _ in 0..12 {
                thread::sleep(Duration::from_millis(300));
                answers(setup_of)?;
            }
            assert!(setup_of.status(Role::New)?.drops("control_unsent") > 0);
            let told = Instant::now();
            on.daemons.new.terminate()?;
            let took = told.elapsed();
            assert!(took < patience(SOON), "the end took {took:?}");
            Ok(())
        })
    })
}

/// A pipe that nobody reads, and that is full.
struct FullPipe {
    path: PathBuf,
    end: File,
}

impl FullPipe {
    fn new(lab: &Lab) -> Result<Self> {
        let path = lab.dir().join("log");
        let mode = rustix::fs::Mode::from(0o600);
        let kind = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, &path, kind, mode, 0).map_err(failed)?;
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK);
        let end = options.open(&path).map_err(failed)?;
        Ok(Self { path, end })
    }

    fn fill(&mut self) {
        for size in [4_096, 1] {
            while self.end.write(&vec![b'x'; size]).is_ok() {}
        }
    }
}

#[test]
fn a_log_that_nobody_reads_holds_up_neither_status_nor_the_end() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let mut pipe = FullPipe::new(&lab)?;
    let daemon = setup.command();
    let mut command = setup.beside("sh");
    command.args(["-c", "exec 2>\"$LOG\"; exec \"$0\" \"$@\""]);
    command
        .arg(daemon.get_program())
        .args(setup.daemon_args(Role::New));
    // Every timer says something.
    command.env("LOG", &pipe.path).env("IPMOVED_LOG", "trace");
    let new = lab.new_server().spawn(command)?;
    let runs = || setup.status(Role::New).ok().map(drop);
    let runs = poll_until(UP_TIMEOUT, Duration::from_millis(50), runs);
    assert!(runs.is_some(), "it does not run");
    pipe.fill();
    // The peer comes and goes.
    for _ in 0..3 {
        let mut old = setup.start(Role::Old)?;
        old.wait_until_up()?;
        answers(&setup)?;
        old.terminate()?;
        answers(&setup)?;
    }
    ends(new)
}

#[test]
fn a_service_manager_that_does_not_read_holds_up_neither_status_nor_the_end() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let path = lab.dir().join("notify");
    let _manager = UnixDatagram::bind(&path).map_err(failed)?;
    let full = UnixDatagram::unbound().map_err(failed)?;
    full.set_nonblocking(true).map_err(failed)?;
    full.connect(&path).map_err(failed)?;
    while full.send(b"STATUS=busy").is_ok() {}
    let mut command = setup.command();
    command.args(setup.daemon_args(Role::New));
    command.env("NOTIFY_SOCKET", &path);
    let new = lab.new_server().spawn(command)?;
    let mut old = setup.start(Role::Old)?;
    old.wait_until_up()?;
    answers(&setup)?;
    old.terminate()?;
    answers(&setup)?;
    ends(new)
}

/// The status socket of the only daemon whose runtime files lie below `dir`.
fn status_socket(dir: &Path) -> Option<PathBuf> {
    let mut entries = fs::read_dir(dir).ok()?.flatten().map(|entry| entry.path());
    entries.find_map(|path| match path.is_dir() {
        true => status_socket(&path),
        false => path
            .file_name()
            .is_some_and(|name| name == "status.sock")
            .then_some(path),
    })
}

/// Clock ticks of processor time that a process has used.
fn ticks(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = text
        .rsplit_once(')')
        .map(|(_, fields)| fields)
        .unwrap_or_default();
    let times = fields.split_ascii_whitespace().skip(11).take(2);
    times.filter_map(|field| field.parse::<u64>().ok()).sum()
}

#[test]
fn without_descriptors_the_status_socket_waits_and_does_not_spin() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let tunnel = setup.start(Role::New);
    let nat = setup.start_nat(&["--move", "192.0.2.5", "--to", "198.51.100.2"]);
    let run = lab.dir().join("run");
    for (role, mut daemon) in [(Role::New, tunnel?), (Role::Old, nat?)] {
        let runs = poll_until(UP_TIMEOUT, Duration::from_millis(50), || {
            setup.status(role).ok().map(drop)
        });
        assert!(runs.is_some(), "it does not run");
        let pid = daemon.process().id();
        let limit = |limit: Rlimit| {
            let of = Pid::from_raw(pid as i32);
            prlimit(of, Resource::Nofile, limit).map_err(failed)
        };
        let few = |current| Rlimit {
            current: Some(current),
            maximum: Some(4_096),
        };
        // Enough for those that `poll` is given at once, and fewer than are open.
        limit(few(8))?;
        let dirs = fs::read_dir(&run).map_err(failed)?.flatten();
        let mut clients = Vec::new();
        for dir in dirs {
            let socket = status_socket(&dir.path()).ok_or_else(|| failed("no status socket"))?;
            clients.extend(UnixStream::connect(socket));
        }
        assert!(!clients.is_empty());
        let used = ticks(pid);
        thread::sleep(Duration::from_secs(2));
        let used = ticks(pid) - used;
        // Two seconds are 200 ticks.
        assert!(used < 40, "{used} ticks");
        let said = daemon.process().stderr();
        let lines = said
            .lines()
            .filter(|line| line.contains("takes nobody"))
            .count();
        assert_eq!(lines, 1, "{said}");
        limit(few(1_024))?;
        setup.status(role)?;
    }
    Ok(())
}
