//! What every mode needs of the service around it: the reasons for which it ends, the event loop,
//! the signals that end it, messages to the service manager, the threads that carry packets, and
//! the undoing of kernel changes.
//!
//! Owns no decision and no packet. `control` (the tunnel) and `nat` both use it.

use std::any::Any;
use std::error::Error;
use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tracing::{debug, error, info, warn};

use super::warnings::Warnings;
use super::watchdog::{Watchdog, Word};
use crate::io::tun::TunError;
use crate::kernel::{Change, Failure, Host, HostError, Repairs, Report, RuntimeDirError};

/// How often to look at this server's links, addresses and routes, and whether the daemon's changes
/// are still there, though no event asks for it. Some settings change without one.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(5);

/// The cause of a [`DaemonError`]: its text is what the user reads.
pub type Cause = Box<dyn Error + Send + Sync>;

/// Why the daemon did not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Its settings do not fit this host; nothing was changed.
    #[error(transparent)]
    Input(Cause),
    /// This host cannot do it; nothing was changed.
    #[error(transparent)]
    System(Cause),
    /// Another daemon runs already.
    #[error(transparent)]
    Running(Cause),
    /// Something broke while it ran.
    #[error(transparent)]
    Failed(Cause),
    /// One of its threads crashed. The kernel is left as it is, as after a kill: the next start
    /// goes on from there, and meanwhile nothing resets what is established.
    #[error("{0}; the next start goes on from here, and `ipmoved cleanup` undoes what is left")]
    Crashed(Cause),
    /// It could not take over from the daemon that runs. The kernel is left to that one, which may
    /// have died meanwhile.
    #[error(
        "cannot take over, and the daemon that ran goes on, if it still runs (`ipmoved status` \
         asks it): {0}"
    )]
    NotTakenOver(Cause),
}

pub(super) type Result<T, E = DaemonError> = std::result::Result<T, E>;

/// The settings do not fit this host.
pub(super) fn input(cause: impl Into<Cause>) -> DaemonError {
    DaemonError::Input(cause.into())
}

/// This host cannot do it.
pub(super) fn system(cause: impl Into<Cause>) -> DaemonError {
    DaemonError::System(cause.into())
}

/// Something broke while the daemon ran.
pub(super) fn failed(cause: impl Into<Cause>) -> DaemonError {
    DaemonError::Failed(cause.into())
}

/// This host cannot do `what`, because of `source`.
pub(super) fn cannot(what: String, source: io::Error) -> DaemonError {
    #[derive(Debug, thiserror::Error)]
    #[error("cannot {what}: {source}")]
    struct Cannot {
        what: String,
        source: io::Error,
    }
    system(Cannot { what, source })
}

impl From<HostError> for DaemonError {
    fn from(error: HostError) -> Self {
        match error {
            HostError::RuntimeDir(RuntimeDirError::Locked { .. }) => Self::Running(error.into()),
            HostError::RuntimeDir(_)
            | HostError::Journal(_)
            | HostError::Netlink(_)
            | HostError::Refused { .. } => Self::System(error.into()),
        }
    }
}

impl From<TunError> for DaemonError {
    fn from(error: TunError) -> Self {
        match error {
            TunError::Exists(_) => Self::Input(error.into()),
            TunError::Permission(_) | TunError::NoDriver | TunError::Other(..) => {
                Self::System(error.into())
            }
        }
    }
}

/// Does `work` in an event loop of one thread.
pub(super) fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| cannot("start the event loop".into(), error))?;
    let result = runtime.block_on(work);
    // A look-up in progress would keep the process alive for as long as the resolver is patient.
    runtime.shutdown_background();
    result
}

/// What somebody wants by a signal.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Wish {
    /// The daemon is to end.
    End,
    /// It is to read its configuration again.
    Reload,
}

/// The signals that the daemon hears.
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    /// Catches the signals from now on: they wait to be received. Call it inside the event loop.
    pub(super) fn new() -> Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).map_err(failed)?,
            interrupt: signal(SignalKind::interrupt()).map_err(failed)?,
            hangup: signal(SignalKind::hangup()).map_err(failed)?,
        })
    }

    /// Waits for one of them. Those that came meanwhile of one kind are one.
    pub(super) async fn recv(&mut self) -> Wish {
        tokio::select! {
            _ = self.terminate.recv() => Wish::End,
            _ = self.interrupt.recv() => Wish::End,
            _ = self.hangup.recv() => Wish::Reload,
        }
    }
}

/// Tells the service manager that everything is set up, and the state of things in one line.
pub(super) fn notify_ready(status: &str) {
    notify(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// Tells the service manager that the configuration is read again, until the next
/// [`notify_ready`] (`Type=notify-reload`, systemd.service(5)).
pub(super) fn notify_reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => notify(&[NotifyState::Reloading, now]),
        Err(error) => debug!(%error, "the service manager does not hear of this"),
    }
}

/// How often to look whether the service manager has to be told another line. To write the status
/// of thousands of moves takes some milliseconds.
const TELL_EVERY: Duration = Duration::from_secs(5);

/// The state of things in one line, as the service manager knows it: the first of `ipmoved status`.
#[derive(Debug)]
pub(super) struct Told {
    line: String,
    next: Instant,
}

impl Told {
    /// Of a daemon that is about to be ready; `None` if no service manager asked to be told.
    pub(super) fn new(now: Instant) -> Option<Self> {
        std::env::var_os("NOTIFY_SOCKET").map(|_| Self {
            line: String::new(),
            next: now + TELL_EVERY,
        })
    }

    /// When to [tell](Self::tell) it again.
    pub(super) fn next(&self) -> Instant {
        self.next
    }

    /// Something has changed that it may say.
    pub(super) fn hurry(&mut self, now: Instant) {
        self.next = now;
    }

    /// Tells the service manager, if that is news.
    pub(super) fn tell(&mut self, now: Instant, line: String) {
        self.next = now + TELL_EVERY;
        if line != self.line {
            notify(&[NotifyState::Status(&line)]);
            self.line = line;
        }
    }
}

/// After how long without a word from us the service manager acts, if it asked for any.
pub(super) fn watchdog(now: Instant) -> Option<Watchdog> {
    sd_notify::watchdog_enabled().map(|patience| Watchdog::new(now, patience))
}

/// Tells the service manager that the daemon does its work, while each loop in `turns` does.
pub(super) fn watch(watchdog: &mut Option<Watchdog>, turns: impl Iterator<Item = u64>) {
    let Some(watchdog) = watchdog else {
        return;
    };
    match watchdog.look(Instant::now(), turns) {
        Word::NotYet => {}
        Word::Well => notify(&[NotifyState::Watchdog]),
        Word::Hangs(number) => error!(
            number,
            "a thread that carries packets hangs, which is a bug of ipmoved; the service manager \
             is not told that all is well"
        ),
    }
}

/// Tells the service manager, and the log, that the daemon is ending.
pub(super) fn notify_stopping() {
    info!("stopping");
    notify_last(&[NotifyState::Stopping]);
}

/// Messages to the service manager that may wait. Only the first and the last ones matter.
const NOTES: usize = 16;

/// How long the last message may take.
const LAST_NOTE: Duration = Duration::from_secs(1);

/// A message to the service manager, and whom to tell that it was sent.
type Note = (String, Option<SyncSender<()>>);

/// Where messages wait for the thread that sends them; `None` if it could not be started.
static NOTEBOOK: OnceLock<Option<SyncSender<Note>>> = OnceLock::new();

/// Does nothing where no service manager asked to be told (`sd_notify(3)`). Never waits for one
/// that does not read: the socket's queue is short, so a thread of its own writes to it.
fn notify(states: &[NotifyState<'_>]) {
    pass_note(states, None);
}

/// As [`notify`], and waits until it was sent, though not for long.
fn notify_last(states: &[NotifyState<'_>]) {
    let (sent, wait) = sync_channel(1);
    pass_note(states, Some(sent));
    let _ = wait.recv_timeout(LAST_NOTE);
}

fn pass_note(states: &[NotifyState<'_>], sent: Option<SyncSender<()>>) {
    if std::env::var_os("NOTIFY_SOCKET").is_none() {
        return;
    }
    let lines: Vec<String> = states.iter().map(ToString::to_string).collect();
    let notebook = NOTEBOOK.get_or_init(|| {
        let (notebook, notes) = sync_channel::<Note>(NOTES);
        let thread = std::thread::Builder::new().name("notify".into());
        thread.spawn(move || send_notes(&notes)).ok()?;
        Some(notebook)
    });
    let passed = (notebook.as_ref()).map(|it| it.try_send((lines.join("\n"), sent)));
    if !matches!(passed, Some(Ok(()))) {
        debug!("a message to the service manager is lost");
    }
}

fn send_notes(notes: &Receiver<Note>) {
    for (text, sent) in notes {
        if let Err(error) = sd_notify::notify(&[NotifyState::Custom(&text)]) {
            warn!(%error, "cannot notify the service manager");
        }
        if let Some(sent) = sent {
            let _ = sent.send(());
        }
    }
}

/// The threads that carry packets, each with a descriptor that tells it to stop.
pub(super) struct Threads {
    running: Vec<JoinHandle<()>>,
    stops: Vec<OwnedFd>,
    crashes: mpsc::Receiver<Crash>,
    tell: mpsc::Sender<Crash>,
}

/// A thread panicked. Nobody carries its share of the packets any more, while the kernel goes on
/// to give them to it, so the daemon ends; the service manager starts it again.
#[derive(Debug, thiserror::Error)]
#[error("thread {thread} crashed, which is a bug of ipmoved: {cause}")]
struct Crash {
    thread: String,
    cause: String,
}

impl Crash {
    fn new(thread: String, cause: &(dyn Any + Send)) -> Self {
        let text = cause.downcast_ref::<&str>().copied();
        let text = text.or_else(|| cause.downcast_ref::<String>().map(String::as_str));
        Self {
            thread,
            cause: text.unwrap_or("it did not say why").to_owned(),
        }
    }
}

impl Default for Threads {
    fn default() -> Self {
        // The first crash ends the daemon, so the others need no place.
        let (tell, crashes) = mpsc::channel(1);
        Self {
            running: Vec::new(),
            stops: Vec::new(),
            crashes,
            tell,
        }
    }
}

impl Threads {
    /// Starts a thread. The descriptor that it is given becomes readable when it is to stop.
    pub(super) fn start(
        &mut self,
        name: String,
        run: impl FnOnce(OwnedFd) + Send + 'static,
    ) -> Result<()> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(failed)?;
        let told = stop.try_clone().map_err(failed)?;
        let thread = std::thread::Builder::new().name(name.clone());
        let tell = self.tell.clone();
        let watched = move || {
            // Nothing of what it worked on is used again but what it shared under a lock, and the
            // daemon is about to end.
            if let Err(cause) = catch_unwind(AssertUnwindSafe(|| run(told))) {
                let _ = tell.try_send(Crash::new(name, &*cause));
            }
        };
        self.running.push(thread.spawn(watched).map_err(failed)?);
        self.stops.push(stop);
        Ok(())
    }

    /// Waits for one to crash.
    pub(super) async fn crashed(&mut self) -> DaemonError {
        match self.crashes.recv().await {
            Some(crash) => DaemonError::Crashed(crash.into()),
            // It cannot be: we hold the other end ourselves.
            None => std::future::pending().await,
        }
    }

    /// Stops all of them, and waits until they have.
    pub(super) fn stop(mut self) {
        for stop in &self.stops {
            if let Err(error) = rustix::io::write(stop, &1u64.to_ne_bytes()) {
                warn!(%error, "cannot stop a lane");
            }
        }
        for thread in self.running {
            let _ = thread.join();
        }
        if let Ok(crash) = self.crashes.try_recv() {
            warn!(%crash, "a thread crashed");
        }
    }
}

/// Looks after the kernel changes while the daemon runs.
#[derive(Default)]
pub(super) struct Repairer {
    /// Changes that somebody has taken away and that cannot be made again, and whether that was
    /// told. What goes with its interface is wanted no more by the next look.
    broken: Vec<(Change, bool)>,
}

impl Repairer {
    /// Makes changes again that others have removed; returns what is still missing.
    pub(super) fn repair(
        &mut self,
        now: Instant,
        host: &mut Host,
        known: &mut Warnings,
    ) -> Vec<Change> {
        self.tell(now, host.repair(), known)
    }

    fn tell(&mut self, now: Instant, repairs: Repairs, known: &mut Warnings) -> Vec<Change> {
        let Repairs { made, failed } = repairs;
        for change in made {
            if known.keep(now, format!("somebody removed {change}; it is back")) {
                warn!(%change, "somebody removed a kernel change; it is back");
            }
        }
        let before = std::mem::take(&mut self.broken);
        for (change, _) in before.iter().filter(|(_, told)| *told) {
            if !failed.iter().any(|failure| failure.change == *change) {
                let line = cannot_be_made(change);
                known.withdraw_own(|it| it.starts_with(&line));
            }
        }
        for Failure { change, reason } in failed {
            let known_before = before.iter().find(|(it, _)| *it == change);
            if matches!(known_before, Some((_, false)))
                && known.keep(now, format!("{}: {reason}", cannot_be_made(&change)))
            {
                warn!(%change, reason, "a kernel change is gone and cannot be made again");
            }
            self.broken.push((change, known_before.is_some()));
        }
        self.broken
            .iter()
            .map(|(change, _)| change.clone())
            .collect()
    }
}

/// How an administrator is told of it.
fn cannot_be_made(change: &Change) -> String {
    format!("{change} is gone and cannot be made again")
}

/// Warns of what was not understood of an earlier run's journal.
pub(super) fn warn_of_unread(host: &Host) {
    for note in &host.unread().notes {
        warn!(warning = %note, "an administrator should know");
    }
}

/// Warns of what an earlier run left and could not undo.
pub(super) fn warn_of_left(report: &Report) {
    for Failure { change, reason } in &report.left {
        warn!(%change, reason, "left by an earlier run and still there");
    }
}

/// How a daemon ends that does not fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum End {
    /// It was stopped.
    Stopped,
    /// Another one goes on.
    HandedOver,
}

/// Undoes every kernel change at the daemon's end, unless a thread crashed or another daemon goes
/// on.
///
/// # Errors
/// Why the daemon ends, or else what could not be undone.
pub(super) fn end(result: Result<End>, host: &mut Host) -> Result<()> {
    match result {
        Ok(End::HandedOver) => Ok(()),
        Err(error @ (DaemonError::Crashed(_) | DaemonError::NotTakenOver(_))) => Err(error),
        Ok(End::Stopped) => undo(host),
        Err(error) => {
            // What could not be undone is in the log.
            let _ = undo(host);
            Err(error)
        }
    }
}

/// Undoes every kernel change.
fn undo(host: &mut Host) -> Result<()> {
    let left = host.undo_all().map_err(failed)?.left;
    if left.is_empty() {
        return Ok(());
    }
    for Failure { change, reason } in &left {
        error!(%change, reason, "cannot undo a kernel change");
    }
    Err(failed(
        "not everything could be undone; `ipmoved cleanup` tries again",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::change::Sysctl;

    #[test]
    fn an_error_says_what_its_cause_says_and_leads_to_it() {
        let refused = || io::Error::from_raw_os_error(libc::EADDRINUSE);
        let error = cannot("open UDP port 51850".into(), refused());
        assert_eq!(
            error.to_string(),
            format!("cannot open UDP port 51850: {}", refused())
        );
        let cause = error.source().expect("what the kernel said");
        assert_eq!(cause.to_string(), refused().to_string());
        assert_eq!(
            failed("all lanes have ended").to_string(),
            "all lanes have ended"
        );
    }

    #[test]
    fn who_is_to_blame_decides_the_exit_code() {
        let exists = DaemonError::from(TunError::Exists("ipmoved0".into()));
        assert!(matches!(exists, DaemonError::Input(_)), "{exists:?}");
        let denied = DaemonError::from(TunError::Permission("ipmoved0".into()));
        assert!(matches!(denied, DaemonError::System(_)), "{denied:?}");
    }

    #[test]
    fn what_cannot_be_made_again_is_told_from_the_second_look_on_and_while_it_is_so() {
        let (now, mut repairer, mut known) =
            (Instant::now(), Repairer::default(), Warnings::new(0));
        let change = |path: &str| {
            Change::Sysctl(Sysctl {
                path: path.into(),
                from: "0".into(),
                to: "1".into(),
                on: None,
            })
        };
        let mut look = |failed: &[&str]| {
            let failed = failed.iter().map(|path| Failure {
                change: change(path),
                reason: "the interface is gone".into(),
            });
            let repairs = Repairs {
                made: Vec::new(),
                failed: failed.collect(),
            };
            let broken = repairer.tell(now, repairs, &mut known);
            (broken.len(), known.lines().len())
        };
        assert_eq!(
            look(&["a", "b"]),
            (2, 0),
            "they may go with their interface"
        );
        assert_eq!(look(&["b"]), (1, 1));
        assert_eq!(look(&["b", "c"]), (2, 1));
        assert_eq!(look(&["c"]), (1, 1), "one is over, and another one is not");
        assert_eq!(look(&[]), (0, 0));
    }

    /// Runs until told to stop.
    fn until_told(stop: OwnedFd) {
        let _ = rustix::io::read(&stop, &mut [0; 8]);
    }

    #[test]
    fn a_thread_that_crashes_is_told_whichever_it_is() {
        for crashes in 0..3u8 {
            let result: Result<()> = block_on(async {
                let mut threads = Threads::default();
                for number in 0..3u8 {
                    let run = move |stop| {
                        assert!(number != crashes, "{number} as the test wants it");
                        until_told(stop);
                    };
                    threads.start(format!("test-{number}"), run).unwrap();
                }
                let patience = Duration::from_secs(5);
                let error = tokio::time::timeout(patience, threads.crashed()).await;
                threads.stop();
                Err(error.expect("told"))
            });
            let error = result.unwrap_err();
            assert!(matches!(error, DaemonError::Crashed(_)), "{error:?}");
            let text = error.to_string();
            let says = format!("thread test-{crashes} crashed");
            assert!(text.starts_with(&says), "{text}");
            assert!(
                text.contains(&format!(": {crashes} as the test wants it; ")),
                "{text}"
            );
        }
    }

    #[test]
    fn threads_stop_when_they_are_told() {
        let mut threads = Threads::default();
        let (say, said) = std::sync::mpsc::channel();
        for number in 0..3u8 {
            let say = say.clone();
            let run = move |stop: OwnedFd| {
                let mut one = [0; 8];
                let told = rustix::io::read(&stop, &mut one).is_ok();
                let _ = say.send((number, told));
            };
            threads.start(format!("test-{number}"), run).unwrap();
        }
        assert!(said.try_recv().is_err(), "nobody told them yet");
        threads.stop();
        let mut stopped: Vec<_> = said.try_iter().collect();
        stopped.sort_unstable();
        assert_eq!(stopped, [(0, true), (1, true), (2, true)]);
    }
}
