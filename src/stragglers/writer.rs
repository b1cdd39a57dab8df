//! The thread that writes who came, and what becomes of it when it cannot.
//!
//! Owns the order: what is told is added up, and written every two seconds. Whoever tells it never
//! waits: what the thread has no room for is counted as lost. Clocks are read here alone.
//!
//! | what goes wrong | what becomes of it |
//! |---|---|
//! | the disk is full, or read-only | said; what came is kept, up to a bound, and tried again |
//! | the database is damaged | put aside, said, and a new one made |
//! | a newer version has written it | said; it stays as it is, and nothing is written |
//! | somebody removes or replaces it | said; the one that is there is used, or a new one made |
//! | the clock steps | the time of watching begins anew; nothing is forgotten for an hour, |
//! | | and for a day if it is far from what was written before |

use std::net::IpAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::model::visit::{InVain, Visited};

use super::store::{FileId, Store, StoreError};
use super::tally::{Arrived, Others, Tally};
use super::time::{DAY, Day};
use super::watch::{Moves, Watch};

/// Batches of a second that may wait for the thread: more than it is ever behind unless the disk
/// hangs.
const WAITING: usize = 16;

/// So often is written what came: what a killed daemon loses.
const WRITE_EVERY: Duration = Duration::from_secs(2);

/// So often is written that somebody watches, if nobody comes.
const WATCHED_EVERY: Duration = Duration::from_secs(20);

/// So often is tried again what failed.
const AGAIN_AFTER: Duration = Duration::from_secs(30);

/// A clock that is off by so much from the time that has passed was set.
const STEP: i64 = 60;

/// Nothing is forgotten before the clock was steady for so long: at boot it may be wrong by years.
const STEADY: Duration = Duration::from_secs(3_600);

/// The same where it shows a time that is more than a day from what was written last. By then a
/// clock that can be set was.
const STEADY_FAR: Duration = Duration::from_secs(DAY as u64);

/// How long the end waits for the last words to be written.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// How the writer is run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Settings {
    /// The state directory.
    pub dir: PathBuf,
    /// Days for which clients are remembered.
    pub keep: i64,
}

/// The writer, as the control task has it.
#[derive(Debug)]
pub struct Writer {
    batches: Option<SyncSender<Batch>>,
    shared: Arc<Shared>,
    ended: Receiver<()>,
}

/// What is told of moves, beside who came.
#[derive(Debug, Default)]
pub struct MoveNews {
    /// How conversations of each move came to the new server.
    pub arrived: Vec<(String, Arrived)>,
    /// What clients have asked for, and whether anybody was answered, as far as that is news.
    pub in_vain: Vec<InVain>,
}

/// What was told, and when.
struct Batch {
    visited: Visited<i64>,
    moves: Moves,
    news: MoveNews,
    at: i64,
    /// Everything that came until now is in it.
    all: bool,
}

/// What the thread tells.
#[derive(Debug, Default)]
struct Shared {
    /// Why nothing is written at present.
    trouble: Mutex<Option<String>>,
    /// What an administrator should know once.
    notes: Mutex<Vec<String>>,
    known: Mutex<Vec<IpAddr>>,
    lost: AtomicU64,
    /// Visits that were told of and are not written.
    unwritten: AtomicU64,
}

impl Writer {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system has no thread.
    pub fn start(settings: Settings) -> std::io::Result<Self> {
        let (batches, told) = sync_channel(WAITING);
        let (end, ended) = sync_channel(1);
        let shared = Arc::new(Shared::default());
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("stragglers".into());
        thread.spawn(move || {
            let mut keeper = Keeper::new(settings, Arc::clone(&of_thread));
            // Packets do not wait for this thread, so it must not end the daemon either.
            if catch_unwind(AssertUnwindSafe(|| keeper.run(&told))).is_err() {
                let text = "the thread that records clients crashed, which is a bug of ipmoved";
                *lock(&of_thread.trouble) = Some(text.into());
            }
            let _ = end.try_send(());
        })?;
        Ok(Self {
            batches: Some(batches),
            shared,
            ended,
        })
    }

    /// Tells who came, and what else is to be recorded, at this time.
    ///
    /// `moves` says which of them are watched: of others some clients are not seen. `last`: nothing
    /// that came until now is left to be told.
    pub fn tell(
        &self,
        visited: Visited<Instant>,
        news: MoveNews,
        moves: &Moves,
        now: Instant,
        wall: SystemTime,
        last: bool,
    ) {
        let at = unix(wall);
        let since = |then: Instant| now.saturating_duration_since(then).as_secs() as i64;
        let told = visited.visits.len() as u64;
        let missed = visited.missed;
        let visits = visited.visits.into_iter();
        let visited = Visited {
            visits: visits.map(|it| it.map(|then| at - since(then))).collect(),
            openings: visited.openings,
            missed: visited.missed,
            unnamed: visited.unnamed,
        };
        let batch = Batch {
            visited,
            moves: Arc::clone(moves),
            news,
            at,
            all: last,
        };
        self.shared.unwritten.fetch_add(told, Relaxed);
        let batches = self.batches.as_ref();
        if batches.is_none_or(|it| it.try_send(batch).is_err()) {
            self.shared.unwritten.fetch_sub(told, Relaxed);
            self.shared.lost.fetch_add(told + missed, Relaxed);
        }
    }

    /// Clients that became known since this was asked last: one address of each.
    pub fn take_known(&self) -> Vec<IpAddr> {
        std::mem::take(&mut lock(&self.shared.known))
    }

    /// Why nothing is written at present, if that is so.
    pub fn trouble(&self) -> Option<String> {
        lock(&self.shared.trouble).clone()
    }

    /// What an administrator should know, each once.
    pub fn take_notes(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.shared.notes))
    }

    /// Conversations that nobody had time to record.
    pub fn lost(&self) -> u64 {
        self.shared.lost.load(Relaxed)
    }

    /// Conversations that were told of and are not written yet.
    pub fn unwritten(&self) -> u64 {
        self.shared.unwritten.load(Relaxed)
    }

    /// Nothing more is told: the thread writes what is left.
    pub fn end(&mut self) {
        self.batches = None;
    }

    /// Waits until all is written after the [end](Self::end), though not for long.
    pub fn wait(&mut self) {
        let _ = self.ended.recv_timeout(LAST_WORDS);
    }
}

/// What the thread has.
struct Keeper {
    settings: Settings,
    shared: Arc<Shared>,
    store: Option<Store>,
    tally: Tally,
    /// The database's memory was taken over.
    resumed: bool,
    clock: Clock,
    watch: Watch,
    /// The database that was found whole.
    whole: Option<FileId>,
    /// Somebody has removed or replaced it, and that was not said yet.
    replaced: bool,
    /// What was lost of what was told, as far as it is counted there.
    lost: u64,
    /// Visits that were told of since the last write.
    added: u64,
    /// When something was told last.
    told: i64,
    /// All that came until then was told.
    all: bool,
    next_write: Instant,
    next_watched: Instant,
    next_forget: Instant,
}

/// The clock on the wall, and whether it goes as time does.
struct Clock {
    started: Instant,
    /// What it showed then.
    at: i64,
}

impl Clock {
    fn new(now: Instant, wall: i64) -> Self {
        Self {
            started: now,
            at: wall,
        }
    }

    /// Whether it was set since it was made.
    fn has_stepped(&self, now: Instant, wall: i64) -> bool {
        let passed = now.saturating_duration_since(self.started).as_secs() as i64;
        (wall - self.at - passed).abs() > STEP
    }
}

impl Keeper {
    fn new(settings: Settings, shared: Arc<Shared>) -> Self {
        let now = Instant::now();
        Self {
            settings,
            shared,
            store: None,
            tally: Tally::default(),
            resumed: false,
            clock: Clock::new(now, unix(SystemTime::now())),
            watch: Watch::default(),
            whole: None,
            replaced: false,
            lost: 0,
            added: 0,
            told: i64::MAX,
            all: false,
            next_write: now,
            next_watched: now,
            next_forget: now + STEADY,
        }
    }

    fn run(&mut self, told: &Receiver<Batch>) {
        loop {
            let now = Instant::now();
            if now >= self.next_write {
                self.write(now, unix(SystemTime::now()));
            }
            let wait = self.next_write.saturating_duration_since(now);
            match told.recv_timeout(wait) {
                Ok(batch) => self.add(batch),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        self.next_watched = Instant::now();
        self.write(Instant::now(), unix(SystemTime::now()));
    }

    fn add(&mut self, batch: Batch) {
        let Batch {
            visited,
            moves,
            news: MoveNews { arrived, in_vain },
            at,
            all,
        } = batch;
        (self.told, self.all) = (at, all);
        if self.watch.set(&moves, at) {
            // It is due.
            self.next_watched = self.clock.started;
        }
        for (what, more) in arrived {
            self.tally.add_arrived(at, &what, more);
        }
        for it in in_vain {
            self.tally.add_in_vain(at, it);
        }
        self.added += visited.visits.len() as u64;
        for visit in visited.visits {
            self.tally.add(visit);
        }
        let others = Others {
            openings: visited.openings,
            missed: visited.missed,
            unnamed: visited.unnamed,
            ..Others::default()
        };
        self.tally.add_others(at, others);
        self.pass_known();
    }

    fn pass_known(&mut self) {
        let known = self.tally.take_known();
        if !known.is_empty() {
            lock(&self.shared.known).extend(known.iter().map(|client| client.first()));
        }
    }

    /// Writes what waits, if something does.
    fn write(&mut self, now: Instant, wall: i64) {
        self.next_write = now + WRITE_EVERY;
        if self.clock.has_stepped(now, wall) {
            self.begin_anew(now, wall);
            self.next_forget = now + STEADY;
            self.tally.clock_was_set();
            // Which rows this day has.
            self.resumed = false;
        }
        let lost = self.shared.lost.load(Relaxed);
        let more = Others {
            lost: lost - self.lost,
            ..Others::default()
        };
        self.tally.add_others(wall, more);
        self.lost = lost;
        let waits = !self.tally.waiting().is_empty() || self.added > 0;
        if !waits && now < self.next_watched {
            return;
        }
        match self.try_write(now, wall) {
            Ok(()) => {
                self.tally.written();
                self.watch.written();
                let added = std::mem::take(&mut self.added);
                self.shared.unwritten.fetch_sub(added, Relaxed);
                self.next_watched = now + WATCHED_EVERY;
                if lock(&self.shared.trouble).take().is_some() {
                    let text = "clients are recorded again, those of meanwhile, too";
                    lock(&self.shared.notes).push(text.into());
                }
            }
            Err(error) => {
                self.next_write = now + AGAIN_AFTER;
                self.suffer(now, wall, &error);
            }
        }
        self.pass_known();
    }

    fn try_write(&mut self, now: Instant, wall: i64) -> Result<(), StoreError> {
        let mut store = self.open(now, wall)?;
        let written = self.write_to(&mut store, now, wall);
        // Whatever is wrong with it, it may be another one the next time; unless there is no room.
        if matches!(written, Ok(()) | Err(StoreError::Full { .. })) {
            self.store = Some(store);
        }
        written
    }

    /// The database, open.
    fn open(&mut self, now: Instant, wall: i64) -> Result<Store, StoreError> {
        match self.store.take() {
            Some(store) if store.is_there() => return Ok(store),
            // The next file may get its number.
            Some(_) => (self.replaced, self.whole) = (true, None),
            None => {}
        }
        let store = Store::to_write(&self.settings.dir, self.whole)?;
        self.replaced |= self.whole.is_some_and(|whole| whole != store.file());
        self.whole = Some(store.file());
        if std::mem::take(&mut self.replaced) {
            let text = "the database of clients was removed or replaced: who came before is known \
                        from the one that is there now, if at all, and nobody has watched before";
            lock(&self.shared.notes).push(text.into());
            self.begin_anew(now, wall);
        }
        Ok(store)
    }

    fn write_to(&mut self, store: &mut Store, now: Instant, wall: i64) -> Result<(), StoreError> {
        if !self.resumed {
            let (known, rows) = store.memory(Day::of(wall))?;
            self.tally.resume(known, rows);
            self.resumed = true;
            let last = store.last_watched()?;
            if last.is_some_and(|last| (wall - last).abs() > DAY) {
                self.next_forget = now + STEADY_FAR;
            }
        }
        // What is forgotten was not watched.
        let oldest = Day(Day::of(wall).0 - self.settings.keep);
        self.watch.forget_before(oldest.start());
        // What nobody has told was not watched either.
        let (at, all) = (wall.min(self.told), self.all);
        let mut written = store.write(self.tally.waiting(), &self.watch, at, all);
        while matches!(written, Err(StoreError::Full { .. })) && store.is_at_its_bound() {
            let Some(until) = store.give_up_oldest()? else {
                break;
            };
            self.watch.forget_before(until.start());
            let text = format!("too many clients: those of before {until} are forgotten");
            lock(&self.shared.notes).push(text);
            written = store.write(self.tally.waiting(), &self.watch, at, all);
        }
        written?;
        if now >= self.next_forget {
            self.next_forget = now + STEADY;
            if store.pull_back(wall)? {
                let text = "the clock is behind what was recorded of clients: is it right? As long \
                            as it is, nothing of that is forgotten, and it counts as of now";
                lock(&self.shared.notes).push(text.into());
            } else {
                store.forget(wall, self.settings.keep)?;
            }
        }
        Ok(())
    }

    /// What was watched until now says nothing of the time from now on.
    fn begin_anew(&mut self, now: Instant, wall: i64) {
        self.clock = Clock::new(now, wall);
        self.watch.begin_anew(wall);
        self.next_watched = now;
    }

    /// Says why nothing was written, and does what helps.
    fn suffer(&mut self, now: Instant, wall: i64, error: &StoreError) {
        if let StoreError::Damaged { .. } = error
            && let Ok(aside) = Store::put_aside(&self.settings.dir)
        {
            let text = format!(
                "{error}; it lies in {} now, and a new one is made",
                aside.display()
            );
            lock(&self.shared.notes).push(text);
            // The new one knows nothing of what was watched before.
            self.whole = None;
            self.begin_anew(now, wall);
            self.next_write = now;
            return;
        }
        let text = format!("clients are not recorded, which is tried again: {error}");
        *lock(&self.shared.trouble) = Some(text);
    }
}

/// Seconds since 1970.
pub(super) fn unix(wall: SystemTime) -> i64 {
    match wall.duration_since(UNIX_EPOCH) {
        Ok(since) => since.as_secs() as i64,
        Err(before) => -(before.duration().as_secs() as i64),
    }
}

/// What it guards is whole between any two calls.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
