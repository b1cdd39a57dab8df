//! A network namespace without a name, and the threads and processes inside it.
//!
//! Owns the namespace's life. A thread of its own, the keeper, makes it and stays inside. It
//! vanishes with the last thread, process and descriptor in it. The lab mounts nothing and writes
//! nothing to `/run/netns`, so nothing stays behind, however the program ends.
//!
//! ```text
//!  keeper thread ── unshare(CLONE_NEWNET) ── starts processes (they die with it: PR_SET_PDEATHSIG)
//!       │ descriptor of /proc/thread-self/ns/net
//!       ├── run():    a scoped thread that enters, does one thing and ends
//!       └── thread(): a thread that enters and stays (services, taps)
//! ```
//!
//! No function here changes the namespace of the thread that calls it. `/proc/sys/net` shows the
//! namespace of the thread that opens it, so a sysctl is a file access inside [`Namespace::run`].

#![allow(
    unsafe_code,
    reason = "unshare() and pre_exec() are unsafe to call; each call explains itself"
)]

use std::collections::VecDeque;
use std::ffi::{CString, OsString};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::panic::resume_unwind;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::mount::{MountPropagationFlags, mount_bind, mount_change};
use rustix::process::{Pid, Signal};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use super::{Doing, LabError, Result, poll_until};

/// Most bytes that we keep of a process's output on one stream; the oldest go first. A daemon that
/// logs at TRACE for a minute must not eat the machine, and the end explains a failure.
const MAX_OUTPUT: usize = 4 << 20;

/// How long a process may take to die of SIGKILL before we give up (it is in the kernel then).
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// How often we check whether a process has ended.
const WAIT_PAUSE: Duration = Duration::from_millis(5);

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace of its own, which vanishes with its last user.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    net: Arc<OwnedFd>,
    keeper: Option<(mpsc::Sender<Job>, JoinHandle<()>)>,
}

impl Namespace {
    /// Makes a namespace with nothing in it but a `lo` that is down. `name` is for messages only.
    ///
    /// # Errors
    /// [`LabError::Privileges`] without CAP_SYS_ADMIN.
    pub fn new(name: &str) -> Result<Self> {
        let (net_out, net_in) = mpsc::channel();
        let (jobs_in, jobs) = mpsc::channel::<Job>();
        let keeper = thread::Builder::new()
            .name(format!("netns {name}"))
            .spawn(move || {
                if net_out.send(unshare_net()).is_ok() {
                    for job in jobs {
                        job();
                    }
                }
            })
            .doing(|| format!("start the thread of namespace {name}"))?;
        let made = net_in
            .recv()
            .map_err(|_| LabError::unexpected("the thread of a namespace died"))?;
        let net = made.map_err(|source| match source.raw_os_error() {
            Some(libc::EPERM) => LabError::Privileges,
            _ => LabError::Step {
                action: format!("make network namespace {name}"),
                source,
            },
        })?;
        Ok(Self {
            name: name.into(),
            net: Arc::new(net),
            keeper: Some((jobs_in, keeper)),
        })
    }

    /// The namespace's name in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its descriptor, by which links move into it.
    pub fn fd(&self) -> &Arc<OwnedFd> {
        &self.net
    }

    /// Runs `task` in a thread inside the namespace, and returns its result. A panic of the task
    /// goes on in the caller.
    pub fn run<T: Send>(&self, task: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    enter(&self.net)?;
                    task()
                })
                .join()
                .unwrap_or_else(|panic| resume_unwind(panic))
        })
    }

    /// Starts a thread that lives inside the namespace.
    pub fn thread<T: Send + 'static>(
        &self,
        name: &str,
        task: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<JoinHandle<Result<T>>> {
        let net = Arc::clone(&self.net);
        thread::Builder::new()
            .name(name.into())
            .spawn(move || {
                enter(&net)?;
                task()
            })
            .doing(|| format!("start thread {name}"))
    }

    /// Starts a process inside the namespace. Dropping the [`Process`] kills it, and so does the
    /// kernel if the namespace or this program ends first.
    pub fn spawn(&self, mut command: Command) -> Result<Process> {
        let program = command.get_program().to_owned();
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        // SAFETY: between fork and exec only async-signal-safe calls are allowed; the closure makes
        // one bare system call (prctl) and allocates nothing.
        unsafe {
            command.pre_exec(|| {
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
                    .map_err(io::Error::from)
            });
        }
        let (out, answer) = mpsc::channel();
        let job: Job = Box::new(move || {
            // The receiver waits below. If it does not, the child goes with the value.
            let _ = out.send(command.spawn());
        });
        let sent = self.keeper.as_ref().map(|(jobs, _)| jobs.send(job));
        let (Some(Ok(())), Ok(child)) = (sent, answer.recv()) else {
            return Err(LabError::unexpected("the namespace's thread has ended"));
        };
        let mut child = child.doing(|| format!("start {}", program.display()))?;
        Ok(Process {
            stdout: Tail::of(child.stdout.take()),
            stderr: Tail::of(child.stderr.take()),
            child,
            program,
        })
    }

    /// Runs a command to its end.
    pub fn output(&self, command: Command, timeout: Duration) -> Result<Output> {
        self.spawn(command)?.wait(timeout)
    }

    /// Reads a file under `/proc/sys/net`; `key` as in `ipv4/ip_forward`.
    pub fn sysctl(&self, key: &str) -> Result<String> {
        self.run(|| {
            fs::read_to_string(format!("/proc/sys/net/{key}"))
                .map(|text| text.trim_end().to_owned())
                .doing(|| format!("read sysctl net/{key}"))
        })
    }

    /// Writes files under `/proc/sys/net`, in order.
    pub fn set_sysctls(&self, settings: &[(&str, &str)]) -> Result<()> {
        self.run(|| {
            for (key, value) in settings {
                fs::write(format!("/proc/sys/net/{key}"), value)
                    .doing(|| format!("set sysctl net/{key} to {value}"))?;
            }
            Ok(())
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Some((jobs, keeper)) = self.keeper.take() {
            drop(jobs);
            // The panic hook has reported its panic, if there was one.
            let _ = keeper.join();
        }
    }
}

/// Gives a process a file of its own in the place of `/etc/hosts`, and no name server that answers.
pub(super) fn with_hosts(command: &mut Command, hosts: &Path) -> Result<()> {
    let path = |path: &Path| {
        CString::new(path.as_os_str().as_bytes()).doing(|| format!("use {}", path.display()))
    };
    let resolv = hosts.with_extension("resolv");
    if !resolv.exists() {
        // Nobody listens at this address, and the kernel says so at once.
        let nobody = "nameserver 127.0.0.1\n";
        fs::write(&resolv, nobody).doing(|| format!("write {}", resolv.display()))?;
    }
    let (hosts, resolv) = (path(hosts)?, path(&resolv)?);
    // SAFETY: between fork and exec only async-signal-safe calls are allowed. The closure makes
    // bare system calls (unshare, mount) with strings that exist already, and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            rustix::thread::unshare_unsafe(UnshareFlags::NEWNS)?;
            let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
            mount_change(c"/", private)?;
            mount_bind(&*hosts, c"/etc/hosts")?;
            mount_bind(&*resolv, c"/etc/resolv.conf")?;
            Ok(())
        });
    }
    Ok(())
}

/// Moves the calling thread into a new namespace, and returns the namespace's descriptor.
fn unshare_net() -> io::Result<OwnedFd> {
    // SAFETY: only CLONE_FILES would be unsound (descriptors could then be closed in one thread
    // and used in another); CLONE_NEWNET concerns the network namespace of this thread alone.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
    Ok(File::open("/proc/thread-self/ns/net")?.into())
}

/// Moves the calling thread into a namespace, for good.
fn enter(net: &OwnedFd) -> Result<()> {
    rustix::thread::move_into_link_name_space(net.as_fd(), Some(LinkNameSpaceType::Network))
        .doing(|| "enter a network namespace".into())
}

/// A process inside a namespace; killed on drop.
#[derive(Debug)]
pub struct Process {
    child: Child,
    program: OsString,
    stdout: Tail,
    stderr: Tail,
}

/// How a process ended, and its output.
#[derive(Clone, Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output (the last [`MAX_OUTPUT`] bytes).
    pub stdout: String,
    /// Its standard error (the last [`MAX_OUTPUT`] bytes).
    pub stderr: String,
}

impl Process {
    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Its standard output so far.
    pub fn stdout(&self) -> String {
        self.stdout.text()
    }

    /// Its standard error so far.
    pub fn stderr(&self) -> String {
        self.stderr.text()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        // Only a call that takes `self` by value waits for the child, so the id is still the
        // child's.
        rustix::process::kill_process(Pid::from_child(&self.child), signal)
            .doing(|| format!("signal {}", self.program.display()))
    }

    /// Its exit status, if it has ended.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Waits for it to end by itself.
    ///
    /// # Errors
    /// If it has not ended within `timeout`. Then this kills it, and the error has its output.
    pub fn wait(mut self, timeout: Duration) -> Result<Output> {
        let Some(status) = poll_until(timeout, WAIT_PAUSE, || self.exited()) else {
            return Err(LabError::unexpected(format!(
                "{} has not ended within {timeout:?}; it said: {}{}",
                self.program.display(),
                self.stdout(),
                self.stderr()
            )));
        };
        Ok(Output {
            status,
            stdout: self.stdout.finished(),
            stderr: self.stderr.finished(),
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.exited().is_none() {
            // The process may have ended by itself just now; the wait below finds out.
            let _ = self.child.kill();
            poll_until(KILL_TIMEOUT, WAIT_PAUSE, || self.exited());
        }
    }
}

/// The last part of the output in a pipe. A thread reads it, so that the process never blocks.
#[derive(Debug)]
struct Tail {
    text: Arc<Mutex<VecDeque<u8>>>,
    reader: Option<JoinHandle<()>>,
}

impl Tail {
    fn of(pipe: Option<impl Read + Send + 'static>) -> Self {
        let text = Arc::new(Mutex::new(VecDeque::new()));
        let kept = Arc::clone(&text);
        let reader = pipe.map(|mut pipe| {
            thread::spawn(move || {
                let mut chunk = [0; 4096];
                while let Ok(n @ 1..) = pipe.read(&mut chunk) {
                    let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                    kept.extend(&chunk[..n]);
                    let excess = kept.len().saturating_sub(MAX_OUTPUT);
                    kept.drain(..excess);
                }
            })
        });
        Self { text, reader }
    }

    fn text(&self) -> String {
        let mut text = self.text.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(text.make_contiguous()).into_owned()
    }

    /// The text once the pipe is closed. It does not wait long for a grandchild that holds it open.
    fn finished(&self) -> String {
        if let Some(reader) = &self.reader {
            poll_until(Duration::from_secs(1), Duration::from_millis(1), || {
                reader.is_finished().then_some(())
            });
        }
        self.text()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net_of_this_thread() -> String {
        fs::read_link("/proc/thread-self/ns/net")
            .unwrap()
            .display()
            .to_string()
    }

    #[test]
    fn a_task_runs_inside_and_the_caller_stays_outside() {
        let before = net_of_this_thread();
        let ns = Namespace::new("test").unwrap();
        let inside = ns.run(|| Ok(net_of_this_thread())).unwrap();
        assert_ne!(inside, before);
        assert_eq!(net_of_this_thread(), before);
        assert_eq!(ns.run(|| Ok(net_of_this_thread())).unwrap(), inside);
    }

    #[test]
    fn a_process_starts_inside_and_dies_with_its_handle() {
        let ns = Namespace::new("test").unwrap();
        let mut readlink = Command::new("readlink");
        readlink.arg("/proc/self/ns/net");
        let said = ns.output(readlink, Duration::from_secs(5)).unwrap();
        assert!(said.status.success());
        assert_eq!(
            said.stdout.trim(),
            ns.run(|| Ok(net_of_this_thread())).unwrap()
        );

        let mut sleep = Command::new("sleep");
        sleep.arg("60");
        let sleeper = ns.spawn(sleep).unwrap();
        let proc = format!("/proc/{}", sleeper.id());
        assert!(fs::exists(&proc).unwrap());
        drop(sleeper);
        assert!(!fs::exists(&proc).unwrap());
    }

    #[test]
    fn a_process_does_not_outlive_its_namespace() {
        let ns = Namespace::new("test").unwrap();
        let mut sleep = Command::new("sleep");
        sleep.arg("60");
        let mut sleeper = ns.spawn(sleep).unwrap();
        drop(ns);
        let ended = poll_until(Duration::from_secs(5), WAIT_PAUSE, || sleeper.exited());
        assert!(ended.is_some());
    }

    #[test]
    fn sysctls_are_the_namespaces_own() {
        let (one, other) = (
            Namespace::new("one").unwrap(),
            Namespace::new("other").unwrap(),
        );
        one.set_sysctls(&[("ipv4/ip_default_ttl", "77")]).unwrap();
        assert_eq!(one.sysctl("ipv4/ip_default_ttl").unwrap(), "77");
        assert_eq!(other.sysctl("ipv4/ip_default_ttl").unwrap(), "64");
    }

    #[test]
    fn a_process_that_hangs_is_an_error_with_its_words() {
        let ns = Namespace::new("test").unwrap();
        let mut hang = Command::new("sh");
        hang.args(["-c", "echo why >&2; sleep 60"]);
        let error = ns.output(hang, Duration::from_millis(300)).unwrap_err();
        assert!(error.to_string().contains("why"), "{error}");
    }
}
