//! Keeps the modes on a thread of its own, so that a disk which hangs keeps nobody else waiting:
//! neither keepalives nor the next command.
//!
//! ```text
//! control task ── keep() ──► the newest modes ──► thread: StateDir::keep() ──► whoever waits
//!                                                    └── and again, as long as it fails
//! ```
//!
//! A command's modes hold at once, and are kept before its answer is sent. Owns what is still to be
//! kept, who waits for that, and why it is not.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tracing::{info, warn};

use super::policy::modes::Record;
use super::state_dir::StateDir;

/// What could not be kept is tried again after this time: somebody may have made room.
const AGAIN: Duration = Duration::from_secs(10);

/// How long a command waits for the disk before it is answered all the same, and how long the
/// daemon's end does.
pub(super) const PATIENCE: Duration = Duration::from_secs(3);

/// Whether it is kept, or why not.
type Kept = Result<(), String>;

/// The thread, as the control task sees it.
#[derive(Debug)]
pub(super) struct Keeper {
    desk: Arc<Desk>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Desk {
    state: Mutex<State>,
    bell: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The newest modes, as long as nobody has begun to write them.
    next: Option<Record>,
    /// Who waits for those.
    waiting: Vec<oneshot::Sender<Kept>>,
    /// Since when modes are being written.
    begun: Option<Instant>,
    /// Why the last were not.
    failed: Option<String>,
    over: bool,
}

impl Keeper {
    /// Starts the thread. `failed` says why what is there already is not kept.
    ///
    /// # Errors
    /// If the system has no thread left.
    pub(super) fn start(dir: Arc<StateDir>, failed: Option<String>) -> std::io::Result<Self> {
        let desk = Arc::new(Desk::default());
        desk.lock().failed = failed;
        let of_thread = Arc::clone(&desk);
        let thread = std::thread::Builder::new().name("modes".into());
        let keep = move |record: &Record| dir.keep(record);
        Ok(Self {
            thread: Some(thread.spawn(move || of_thread.run(keep))?),
            desk,
        })
    }

    /// Keeps these modes in place of what was to be kept. Whoever has the receiver learns of it.
    pub(super) fn keep(&self, record: Record) -> oneshot::Receiver<Kept> {
        let (waiting, kept) = oneshot::channel();
        let mut state = self.desk.lock();
        // Who has given up meanwhile is not told.
        state.waiting.retain(|it| !it.is_closed());
        state.waiting.push(waiting);
        state.next = Some(record);
        self.desk.bell.notify_all();
        kept
    }

    /// Why the modes that hold are not kept, if that is so.
    pub(super) fn unkept(&self) -> Option<String> {
        let state = self.desk.lock();
        let hangs = state.begun.is_some_and(|begun| begun.elapsed() >= PATIENCE);
        match hangs {
            true => Some("the disk does not answer".into()),
            false => state.failed.clone(),
        }
    }

    /// Waits until everything is written, but for no longer than is bearable.
    pub(super) fn end(&mut self) {
        let until = Instant::now() + PATIENCE;
        let mut state = self.desk.lock();
        state.over = true;
        self.desk.bell.notify_all();
        while state.begun.is_some() || state.next.is_some() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                warn!("the last modes are not kept: the disk does not answer");
                return;
            }
            let waited = self.desk.bell.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(state);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the thread that keeps modes had crashed");
        }
    }
}

impl Desk {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps what there is to keep, until it is over.
    fn run(&self, keep: impl Fn(&Record) -> Kept) {
        // What has failed, to be tried again.
        let mut last: Option<Record> = None;
        loop {
            let mut state = self.lock();
            let record = loop {
                if let Some(next) = state.next.take() {
                    break next;
                }
                if state.over {
                    return;
                }
                let waited = self.bell.wait_timeout(state, AGAIN);
                let (again, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
                state = again;
                if timeout.timed_out()
                    && !state.over
                    && state.next.is_none()
                    && let Some(last) = last.take()
                {
                    break last;
                }
            };
            state.begun = Some(Instant::now());
            let waiting = std::mem::take(&mut state.waiting);
            drop(state);
            let kept = keep(&record);
            let mut state = self.lock();
            state.begun = None;
            let failed = kept.clone().err();
            if failed != state.failed {
                match &failed {
                    Some(why) => warn!("the modes of moves are not kept over a restart: {why}"),
                    None => info!("the modes of moves are kept again"),
                }
            }
            last = failed.is_some().then_some(record);
            state.failed = failed;
            self.bell.notify_all();
            drop(state);
            for waiting in waiting {
                // It may have given up.
                let _ = waiting.send(kept.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::model::mode::ShareKey;

    fn record(number: u64) -> Record {
        Record {
            carried: Vec::new(),
            share_key: ShareKey([number, 0]),
            boot: String::new(),
            moves: Vec::new(),
        }
    }

    /// A keeper whose disk is the test: it sees what is to be written, and says what becomes of it.
    fn keeper() -> (Keeper, mpsc::Receiver<u64>, mpsc::Sender<Kept>) {
        let desk = Arc::new(Desk::default());
        let ((written, seen), (says, result)) = (mpsc::channel(), mpsc::channel());
        let of_thread = Arc::clone(&desk);
        let keep = move |record: &Record| {
            let _ = written.send(record.share_key.0[0]);
            result.recv().unwrap_or_else(|_| Err("no disk".into()))
        };
        let thread = Some(std::thread::spawn(move || of_thread.run(keep)));
        (Keeper { desk, thread }, seen, says)
    }

    #[test]
    fn the_newest_is_kept_and_whoever_waits_is_told() {
        let (mut keeper, seen, says) = keeper();
        let first = keeper.keep(record(1));
        assert_eq!(seen.recv(), Ok(1));
        // The disk is busy meanwhile; nobody is kept waiting.
        let others = [2, 3].map(|number| keeper.keep(record(number)));
        says.send(Ok(())).unwrap();
        assert_eq!(first.blocking_recv(), Ok(Ok(())));
        assert_eq!(seen.recv(), Ok(3), "the newest");
        says.send(Err("full".into())).unwrap();
        for other in others {
            assert_eq!(other.blocking_recv(), Ok(Err("full".into())));
        }
        assert_eq!(keeper.unkept(), Some("full".into()));
        let kept = keeper.keep(record(4));
        says.send(Ok(())).unwrap();
        assert_eq!(kept.blocking_recv(), Ok(Ok(())));
        assert_eq!(keeper.unkept(), None);
        drop(keeper.keep(record(5)));
        says.send(Ok(())).unwrap();
        keeper.end();
        assert_eq!(seen.try_iter().collect::<Vec<_>>(), [4, 5]);
    }

    #[test]
    fn a_disk_that_hangs_shows() {
        let (keeper, seen, _says) = keeper();
        let _first = keeper.keep(record(1));
        seen.recv().unwrap();
        assert_eq!(keeper.unkept(), None);
        let long_ago = Instant::now().checked_sub(PATIENCE);
        keeper.desk.lock().begun = long_ago;
        assert_eq!(keeper.unkept(), Some("the disk does not answer".into()));
    }
}
