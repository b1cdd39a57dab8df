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

use crate::model::visit::Visited;

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

/// What was told, and when.
struct Batch {
    visited: Visited<i64>,
    moves: Moves,
    arrived: Vec<(String, Arrived)>,
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

    /// Tells who came, and how conversations of each move came to the new server, at this time.
    ///
    /// `moves` says which of them are watched: of others some clients are not seen. `last`: nothing
    /// that came until now is left to be told.
    pub fn tell(
        &self,
        visited: Visited<Instant>,
        arrived: Vec<(String, Arrived)>,
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
            arrived,
            at,
            all: last,
        };
        self.shared.unwritten.fetch_add(told, Relaxed);
        let sent = self.batches.as_ref().map(|it| it.try_send(batch));
        if !matches!(sent, Some(Ok(()))) {
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
            arrived,
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
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::model::visit::Visit;
    use crate::stragglers::history::History;
    use crate::stragglers::store::FILE;
    use crate::stragglers::tests::{NOON, Scratch, visit};
    use crate::stragglers::verdict::{Reason, Verdict};

    fn keeper(dir: &Path) -> Keeper {
        let settings = Settings {
            dir: dir.into(),
            keep: 90,
        };
        let mut keeper = Keeper::new(settings, Arc::default());
        keeper.clock.at = NOON;
        tell(&mut keeper, NOON, Vec::new());
        keeper
    }

    /// Tells who came, and that one move is watched.
    fn tell(keeper: &mut Keeper, at: i64, visits: Vec<Visit<i64>>) {
        thread_local! {
            static MOVES: Moves = Arc::new([("192.0.2.5".to_owned(), true)]);
        }
        keeper
            .shared
            .unwritten
            .fetch_add(visits.len() as u64, Relaxed);
        let visited = Visited {
            openings: visits.len() as u64,
            visits,
            ..Visited::default()
        };
        keeper.add(Batch {
            visited,
            moves: MOVES.with(Arc::clone),
            arrived: Vec::new(),
            at,
            all: true,
        });
    }

    fn add(keeper: &mut Keeper, client: &str, at: i64) {
        tell(keeper, at, vec![visit(client, 443, at)]);
    }

    /// When somebody watched, in order.
    fn watched(dir: &Path) -> Vec<(i64, i64)> {
        let store = Store::to_read(dir).unwrap();
        let query = "SELECT since, until FROM watched ORDER BY since";
        let row = |row: &rusqlite::Row<'_>| Ok(Some((row.get(0)?, row.get(1)?)));
        store.read(query, [], row).unwrap()
    }

    fn count(dir: &Path, table: &str) -> i64 {
        let store = Store::to_read(dir).unwrap();
        let query = format!("SELECT count(*) FROM {table}");
        store.read(&query, [], |row| row.get(0).map(Some)).unwrap()[0]
    }

    fn trouble(keeper: &Keeper) -> String {
        lock(&keeper.shared.trouble).clone().unwrap_or_default()
    }

    #[test]
    fn what_came_is_there_after_a_restart_and_counts_go_on() {
        let scratch = Scratch::new("restart");
        for at in [NOON, NOON + 60] {
            let mut keeper = keeper(scratch.dir());
            let begun = keeper.clock.started;
            keeper.clock.at = at;
            keeper.watch.begin_anew(at);
            add(&mut keeper, "203.0.113.9", at);
            keeper.write(begun, at);
            assert_eq!(trouble(&keeper), "");
            // Killed here: nothing is closed in order.
            std::mem::forget(keeper);
        }
        let store = Store::to_read(scratch.dir()).unwrap();
        let query = "SELECT connections, first, last FROM visits";
        let row = |row: &rusqlite::Row<'_>| Ok(Some((row.get(0)?, row.get(1)?, row.get(2)?)));
        let rows: Vec<(i64, i64, i64)> = store.read(query, [], row).unwrap();
        assert_eq!(rows, [(2, NOON, NOON + 60)]);
        assert_eq!(count(scratch.dir(), "watched"), 2);
        let mut again = keeper(scratch.dir());
        again.write(again.clock.started, NOON);
        let known = std::mem::take(&mut *lock(&again.shared.known));
        assert_eq!(known, ["203.0.113.9".parse::<IpAddr>().unwrap()]);
    }

    #[test]
    fn nobody_else_reads_it() {
        use std::os::unix::fs::PermissionsExt;
        let scratch = Scratch::new("modes");
        let dir = scratch.dir().join("made/for/it");
        let mut keeper = keeper(&dir);
        add(&mut keeper, "203.0.113.9", NOON);
        keeper.write(keeper.clock.started, NOON);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&dir), 0o700);
        for file in fs::read_dir(&dir).unwrap() {
            assert_eq!(mode(&file.unwrap().path()), 0o600);
        }
    }

    #[test]
    fn a_damaged_database_is_put_aside() {
        let scratch = Scratch::new("damaged");
        fs::write(scratch.dir().join(FILE), [7; 8_192]).unwrap();
        let mut keeper = keeper(scratch.dir());
        add(&mut keeper, "203.0.113.9", NOON);
        keeper.write(keeper.clock.started, NOON);
        let notes = std::mem::take(&mut *lock(&keeper.shared.notes));
        assert!(notes[0].contains("is damaged"), "{notes:?}");
        keeper.write(keeper.clock.started, NOON);
        assert_eq!(
            (trouble(&keeper).as_str(), count(scratch.dir(), "visits")),
            ("", 1)
        );
        assert!(scratch.dir().join("stragglers.sqlite.damaged").exists());
    }

    #[test]
    fn pages_that_are_damaged_while_it_runs_are_noticed() {
        let scratch = Scratch::new("pages");
        let mut first = keeper(scratch.dir());
        for n in 0..200 {
            add(&mut first, &format!("203.0.113.{n}"), NOON);
        }
        first.write(first.clock.started, NOON);
        drop(first);
        let path = scratch.dir().join(FILE);
        let mut bytes = fs::read(&path).unwrap();
        bytes[4_096..].fill(0x5a);
        fs::write(&path, bytes).unwrap();
        let mut keeper = keeper(scratch.dir());
        add(&mut keeper, "203.0.113.9", NOON);
        keeper.write(keeper.clock.started, NOON);
        keeper.write(keeper.clock.started, NOON);
        assert_eq!(
            (trouble(&keeper).as_str(), count(scratch.dir(), "visits")),
            ("", 1)
        );
    }

    #[test]
    fn one_of_a_newer_version_or_of_others_stays_as_it_is() {
        let scratch = Scratch::new("newer");
        let mut first = keeper(scratch.dir());
        add(&mut first, "203.0.113.9", NOON);
        first.write(first.clock.started, NOON);
        drop(first);
        let path = scratch.dir().join(FILE);
        for (change, says) in [
            ("PRAGMA user_version = 3", "newer ipmoved (form 3"),
            ("PRAGMA application_id = 7", "not a database of ipmoved"),
        ] {
            let db = rusqlite::Connection::open(&path).unwrap();
            db.execute_batch(change).unwrap();
            drop(db);
            let before = fs::read(&path).unwrap();
            let mut keeper = keeper(scratch.dir());
            add(&mut keeper, "203.0.113.10", NOON);
            keeper.write(keeper.clock.started, NOON);
            assert!(trouble(&keeper).contains(says), "{}", trouble(&keeper));
            assert_eq!(fs::read(&path).unwrap(), before);
            assert!(
                Store::to_read(scratch.dir())
                    .unwrap_err()
                    .to_string()
                    .contains(says)
            );
        }
    }

    #[test]
    fn what_could_not_be_written_is_written_later() {
        let scratch = Scratch::new("later");
        // A file where the directory should be.
        let dir = scratch.dir().join("state");
        fs::write(&dir, "").unwrap();
        let mut keeper = keeper(&dir);
        add(&mut keeper, "203.0.113.9", NOON);
        keeper.write(keeper.clock.started, NOON);
        assert!(
            trouble(&keeper).contains("--state-dir"),
            "{}",
            trouble(&keeper)
        );
        fs::remove_file(&dir).unwrap();
        add(&mut keeper, "203.0.113.10", NOON);
        keeper.write(keeper.clock.started, NOON);
        assert_eq!((trouble(&keeper).as_str(), count(&dir, "visits")), ("", 2));
        let notes = lock(&keeper.shared.notes).join("");
        assert!(notes.contains("recorded again"), "{notes}");
    }

    #[test]
    fn a_link_is_not_followed() {
        let scratch = Scratch::new("link");
        let other = scratch.dir().join("other");
        std::os::unix::fs::symlink(&other, scratch.dir().join(FILE)).unwrap();
        let mut keeper = keeper(scratch.dir());
        add(&mut keeper, "203.0.113.9", NOON);
        keeper.write(keeper.clock.started, NOON);
        assert!(
            trouble(&keeper).contains("symbolic link"),
            "{}",
            trouble(&keeper)
        );
        assert!(!other.exists());
    }

    /// A keeper and its clocks: so many seconds after the begin, with the clock off by some.
    struct Timed {
        keeper: Keeper,
        begun: Instant,
    }

    impl Timed {
        fn new(dir: &Path) -> Self {
            let keeper = keeper(dir);
            let begun = keeper.clock.started;
            Self { keeper, begun }
        }

        fn write(&mut self, after: i64, off: i64) {
            let now = self.begun + Duration::from_secs(after as u64);
            tell(&mut self.keeper, NOON + after + off, Vec::new());
            self.keeper.write(now, NOON + after + off);
            assert_eq!(trouble(&self.keeper), "");
        }
    }

    #[test]
    fn a_clock_that_is_set_begins_the_time_of_watching_anew_and_forgets_nothing() {
        let scratch = Scratch::new("clock");
        let mut timed = Timed::new(scratch.dir());
        add(&mut timed.keeper, "203.0.113.9", NOON);
        timed.write(0, 0);
        timed.write(3_600, 0);
        // Somebody sets it far ahead.
        let ahead = 200 * DAY;
        timed.write(3_670, ahead);
        timed.write(3_690, ahead);
        assert_eq!(watched(scratch.dir()).len(), 2);
        timed.write(3_690 + 23 * 3_600, ahead);
        assert_eq!(count(scratch.dir(), "visits"), 1, "it may be set again");
        let again = 4_000 + 23 * 3_600;
        timed.write(again, 0);
        timed.write(again + 20, 0);
        assert_eq!(watched(scratch.dir()).len(), 3);
        // It stays right for 200 days.
        timed.write(again + ahead, 0);
        assert_eq!(count(scratch.dir(), "visits"), 0);
    }

    #[test]
    fn what_came_while_the_clock_was_ahead_has_come_and_that_time_was_not_watched() {
        let scratch = Scratch::new("ahead");
        let mut timed = Timed::new(scratch.dir());
        timed.write(0, 0);
        timed.write(10 * 3_600, 0);
        let ahead = 30 * DAY;
        timed.write(10 * 3_600 + 1, ahead);
        add(&mut timed.keeper, "203.0.113.9", NOON + 36_001 + ahead);
        timed.write(11 * 3_600, ahead);
        timed.write(11 * 3_600 + 1, 0);
        timed.write(11 * 3_600 + 100, 0);
        assert_eq!(watched(scratch.dir()).len(), 3);
        // Once the clock was right for long enough.
        let right = 11 * 3_600 + 1 + DAY;
        timed.write(right, 0);
        let until = watched(scratch.dir()).iter().map(|it| it.1).max();
        assert_eq!(until, Some(NOON + right));
        let seconds: i64 = watched(scratch.dir()).iter().map(|it| it.1 - it.0).sum();
        assert_eq!(seconds, 10 * 3_600 + DAY);
        let store = Store::to_read(scratch.dir()).unwrap();
        let last = store.read("SELECT day, last FROM visits", [], |row| {
            Ok(Some((row.get(0)?, row.get(1)?)))
        });
        let last: Vec<(String, i64)> = last.unwrap();
        assert_eq!(last, [(Day::of(NOON + right).to_string(), NOON + right)]);
    }

    #[test]
    fn a_clock_that_is_behind_makes_nobody_forget() {
        let scratch = Scratch::new("behind");
        let mut timed = Timed::new(scratch.dir());
        add(&mut timed.keeper, "203.0.113.9", NOON);
        timed.write(0, 0);
        timed.write(30 * DAY, 0);
        // As a machine without a clock of its own begins.
        let behind = -NOON;
        for hour in 0..20 {
            timed.write(30 * DAY + 10 + hour * 2 * 3_600, behind);
        }
        let notes = std::mem::take(&mut *lock(&timed.keeper.shared.notes));
        assert!(
            notes.iter().any(|it| it.contains("clock is behind")),
            "{notes:?}"
        );
        assert_eq!(count(scratch.dir(), "visits"), 1);
        let seconds: i64 = watched(scratch.dir()).iter().map(|it| it.1 - it.0).sum();
        assert!(seconds > 30 * DAY, "{seconds}");
    }

    #[test]
    fn one_that_is_removed_while_it_runs_is_made_again_and_knows_nothing_of_before() {
        let scratch = Scratch::new("removed");
        let mut timed = Timed::new(scratch.dir());
        add(&mut timed.keeper, "203.0.113.9", NOON);
        timed.write(0, 0);
        fs::remove_file(scratch.dir().join(FILE)).unwrap();
        add(&mut timed.keeper, "203.0.113.9", NOON + 100);
        timed.write(100, 0);
        timed.write(200, 0);
        let notes = std::mem::take(&mut *lock(&timed.keeper.shared.notes));
        assert!(notes[0].contains("removed or replaced"), "{notes:?}");
        assert_eq!(watched(scratch.dir()), [(NOON + 100, NOON + 200)]);
        assert_eq!(count(scratch.dir(), "visits"), 1);
    }

    #[test]
    fn what_the_thread_had_no_time_for_is_counted_as_lost() {
        let scratch = Scratch::new("lost");
        let mut timed = Timed::new(scratch.dir());
        timed.keeper.shared.lost.store(7, Relaxed);
        timed.write(0, 0);
        timed.write(20, 0);
        let store = Store::to_read(scratch.dir()).unwrap();
        let lost = store.read("SELECT lost FROM days", [], |row| {
            row.get::<_, i64>(0).map(Some)
        });
        assert_eq!(lost.unwrap(), [7_i64]);
    }

    #[test]
    fn one_of_the_form_before_is_brought_up_to_date() {
        let scratch = Scratch::new("form-1");
        let mut first = keeper(scratch.dir());
        add(&mut first, "203.0.113.9", NOON);
        first.write(first.clock.started, NOON);
        drop(first);
        let db = rusqlite::Connection::open(scratch.dir().join(FILE)).unwrap();
        db.execute_batch(
            "DROP TABLE watched; DROP TABLE moves; DROP TABLE arrived;
             CREATE TABLE watched (since INTEGER PRIMARY KEY, until INTEGER NOT NULL) STRICT;
             INSERT INTO watched VALUES (1, 1795867200);
             ALTER TABLE days DROP COLUMN lost; ALTER TABLE days DROP COLUMN displaced;
             PRAGMA user_version = 1;",
        )
        .unwrap();
        drop(db);
        let older = Store::to_read(scratch.dir()).unwrap_err().to_string();
        assert!(older.contains("older ipmoved (form 1)"), "{older}");
        let mut timed = Timed::new(scratch.dir());
        timed.write(100, 0);
        assert_eq!(watched(scratch.dir()), [(NOON, NOON + 100)]);
        assert_eq!(count(scratch.dir(), "visits"), 1);
        // It has what a new one has.
        let new = Scratch::new("form-2");
        Timed::new(new.dir()).write(0, 0);
        let forms = [scratch.dir(), new.dir()].map(|dir| {
            let store = Store::to_read(dir).unwrap();
            let columns = "SELECT m.name || '.' || c.name || ' ' || c.type || c.pk || c.\"notnull\"
                           FROM sqlite_schema m, pragma_table_info(m.name) c ORDER BY 1";
            let columns: Vec<String> = store.read(columns, [], |row| row.get(0).map(Some)).unwrap();
            columns
        });
        assert_eq!(forms[0], forms[1]);
    }

    #[test]
    fn what_is_forgotten_gives_its_room_back() {
        let scratch = Scratch::new("room");
        let mut timed = Timed::new(scratch.dir());
        for n in 0..20_000_u32 {
            let client = std::net::Ipv4Addr::from(0x0a00_0000 + n).to_string();
            add(&mut timed.keeper, &client, NOON);
        }
        timed.write(0, 0);
        let pages = |timed: &Timed| {
            let store = timed.keeper.store.as_ref().unwrap();
            let pages: Vec<i64> =
                (store.read("PRAGMA page_count", [], |row| row.get(0).map(Some))).unwrap();
            pages[0]
        };
        let before = pages(&timed);
        timed.write(200 * DAY, 0);
        assert!(pages(&timed) < before / 10, "{} of {before}", pages(&timed));
    }

    #[test]
    fn a_full_disk_is_said_and_survived() {
        let scratch = Scratch::new("full");
        let Some(disk) = scratch.small_disk(64) else {
            // Without the privilege to mount one there is nothing to fill.
            return;
        };
        let mut keeper = keeper(disk.path());
        keeper.write(keeper.clock.started, NOON);
        fs::write(disk.path().join("others"), vec![0; 1 << 20]).unwrap_err();
        for n in 0..4_000_u32 {
            let client = std::net::Ipv4Addr::from(0x0a00_0000 + n).to_string();
            add(&mut keeper, &client, NOON);
        }
        keeper.write(keeper.clock.started, NOON);
        assert!(
            trouble(&keeper).contains("make room"),
            "{}",
            trouble(&keeper)
        );
        fs::remove_file(disk.path().join("others")).unwrap();
        disk.grow(8_192);
        keeper.write(keeper.clock.started, NOON);
        assert_eq!(
            (trouble(&keeper).as_str(), count(disk.path(), "visits")),
            ("", 4_000)
        );
    }

    #[test]
    fn a_read_only_disk_is_said_and_can_be_read() {
        let scratch = Scratch::new("read-only");
        let Some(disk) = scratch.small_disk(4_096) else {
            return;
        };
        let mut first = keeper(disk.path());
        add(&mut first, "203.0.113.9", NOON);
        first.write(first.clock.started, NOON);
        drop(first);
        disk.make_read_only();
        let mut keeper = keeper(disk.path());
        add(&mut keeper, "203.0.113.10", NOON);
        keeper.write(keeper.clock.started, NOON);
        assert!(
            trouble(&keeper).contains("cannot use"),
            "{}",
            trouble(&keeper)
        );
        assert_eq!(count(disk.path(), "visits"), 1);
    }

    #[test]
    fn a_database_at_its_bound_gives_up_the_oldest_days() {
        let scratch = Scratch::new("bound");
        let mut keeper = keeper(scratch.dir());
        keeper.watch.begin_anew(NOON - 29 * DAY);
        for day in (0..30).rev() {
            for n in 0..50 {
                add(&mut keeper, &format!("203.0.113.{n}"), NOON - day * 86_400);
            }
        }
        keeper.write(keeper.clock.started, NOON);
        if let Some(store) = &keeper.store {
            store.bound_here();
        }
        for n in 50..250 {
            add(&mut keeper, &format!("203.0.113.{n}"), NOON);
            add(&mut keeper, &format!("198.51.100.{n}"), NOON);
        }
        keeper.write(keeper.clock.started, NOON);
        assert_eq!(trouble(&keeper), "");
        let notes = lock(&keeper.shared.notes).join("");
        assert!(notes.contains("are forgotten"), "{notes}");
        // Nor does the next write say that somebody has watched then.
        tell(&mut keeper, NOON, Vec::new());
        keeper.write(keeper.clock.started, NOON);
        let oldest = watched(scratch.dir()).first().map(|it| it.0);
        assert!(oldest > Some(NOON - 29 * DAY), "{oldest:?}");
        let store = Store::to_read(scratch.dir()).unwrap();
        let days = store.read("SELECT DISTINCT day FROM visits", [], |row| {
            row.get(0).map(Some)
        });
        let days: Vec<String> = days.unwrap();
        assert!(
            days.len() < 30 && days.contains(&Day::of(NOON).to_string()),
            "{days:?}"
        );
    }

    #[test]
    fn a_million_forged_sources_are_bounded_on_the_disk_and_known_clients_stay_listed() {
        let scratch = Scratch::new("flood");
        let mut timed = Timed::new(scratch.dir());
        let clients = ["203.0.113.9", "2001:db8:1:2::9"];
        for client in clients {
            add(&mut timed.keeper, client, NOON);
        }
        timed.write(0, 0);
        for part in 0..20_u32 {
            let at = NOON + 2 + i64::from(part);
            let flood = (0..50_000_u32).map(|n| {
                let mut forged = visit("203.0.113.9", 443, at);
                let source = std::net::Ipv4Addr::from(0x2000_0000 + part * 50_000 + n);
                forged.client = IpAddr::from(source).into();
                forged
            });
            tell(&mut timed.keeper, at, flood.collect());
            timed.write(2 + i64::from(part), 0);
        }
        for client in clients {
            add(&mut timed.keeper, client, NOON + 60);
        }
        timed.write(60, 0);
        let bytes = fs::metadata(scratch.dir().join(FILE)).unwrap().len();
        assert!(bytes < 16 << 20, "{bytes}");
        let store = Store::to_read(scratch.dir()).unwrap();
        let query = "SELECT count(*) FROM visits WHERE connections = 2";
        let twice = store.read(query, [], |row| row.get::<_, i64>(0).map(Some));
        assert_eq!(twice.unwrap(), [2]);
        let history = History::open(
            scratch.dir(),
            UNIX_EPOCH + Duration::from_secs(NOON as u64 + 60),
            None,
        );
        let verdict = Verdict::of(&history.unwrap(), 60, &[]).unwrap();
        let much = verdict
            .reasons
            .iter()
            .any(|it| matches!(it, Reason::TooMuch { .. }));
        assert!(!verdict.safe && much, "{:?}", verdict.reasons);
    }

    #[test]
    fn the_thread_writes_by_itself_and_at_the_end() {
        let scratch = Scratch::new("thread");
        let settings = Settings {
            dir: scratch.dir().into(),
            keep: 90,
        };
        let mut writer = Writer::start(settings).unwrap();
        let now = Instant::now();
        let visited = Visited {
            visits: vec![visit("203.0.113.9", 443, NOON).map(|_| now)],
            ..Visited::default()
        };
        let moves: Moves = Arc::new([("192.0.2.5".to_owned(), true)]);
        writer.tell(visited, Vec::new(), &moves, now, SystemTime::now(), true);
        writer.end();
        writer.wait();
        assert_eq!((writer.trouble(), writer.lost()), (None, 0));
        assert_eq!(writer.unwritten(), 0);
        assert_eq!(count(scratch.dir(), "visits"), 1);
    }
}
