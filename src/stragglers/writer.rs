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
//! | the clock steps | the time of watching begins anew; nothing is forgotten for an hour |

use std::net::IpAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::model::visit::Visited;

use super::store::{Store, StoreError};
use super::tally::{Others, Tally};
use super::time::Day;

/// Batches of a second that may wait for the thread: more than it is ever behind unless the disk
/// hangs.
const WAITING: usize = 16;

/// So often is written what came: what a killed daemon loses.
const WRITE_EVERY: Duration = Duration::from_secs(2);

/// So often is written that somebody watches, if nobody comes.
const WATCHED_EVERY: Duration = Duration::from_secs(60);

/// So often is tried again what failed.
const AGAIN_AFTER: Duration = Duration::from_secs(30);

/// A clock that is off by so much from the time that has passed was set.
const STEP: i64 = 60;

/// Nothing is forgotten before the clock was steady for so long: at boot it may be wrong by years.
const STEADY: Duration = Duration::from_secs(3_600);

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
    all: bool,
    at: i64,
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

    /// Tells who came, at this time.
    ///
    /// `all`: everything is the new server's. Else this server serves clients of which nothing is
    /// noted, so the time does not count as watched.
    pub fn tell(&self, visited: Visited<Instant>, all: bool, now: Instant, wall: SystemTime) {
        let at = unix(wall);
        let since = |then: Instant| now.saturating_duration_since(then).as_secs() as i64;
        let count = visited.visits.len() as u64;
        let visits = visited.visits.into_iter();
        let visited = Visited {
            visits: visits.map(|it| it.map(|then| at - since(then))).collect(),
            openings: visited.openings,
            missed: visited.missed,
            unnamed: visited.unnamed,
        };
        let sent = self
            .batches
            .as_ref()
            .map(|it| it.try_send(Batch { visited, all, at }));
        if !matches!(sent, Some(Ok(()))) {
            self.shared.lost.fetch_add(count, Relaxed);
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
    /// When somebody has watched since.
    clock: Clock,
    /// Everything is the new server's.
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
            all: true,
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
        let Batch { visited, all, at } = batch;
        if all != self.all {
            let now = Instant::now();
            if all {
                self.clock = Clock::new(now, unix(SystemTime::now()));
            } else {
                self.next_watched = now;
                self.write(now, unix(SystemTime::now()));
            }
            self.all = all;
        }
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
            self.clock = Clock::new(now, wall);
            self.next_forget = now + STEADY;
            self.next_watched = now;
        }
        let waits = !self.tally.waiting().is_empty();
        if !waits && now < self.next_watched {
            return;
        }
        match self.try_write(now, wall) {
            Ok(()) => {
                self.tally.written();
                self.next_watched = now + WATCHED_EVERY;
                *lock(&self.shared.trouble) = None;
            }
            Err(error) => {
                self.store = None;
                self.next_write = now + AGAIN_AFTER;
                self.suffer(&error);
            }
        }
        self.pass_known();
    }

    fn try_write(&mut self, now: Instant, wall: i64) -> Result<(), StoreError> {
        let mut store = match self.store.take() {
            Some(store) => store,
            None => Store::to_write(&self.settings.dir)?,
        };
        if !self.resumed {
            let (known, rows) = store.memory(Day::of(wall))?;
            self.tally.resume(known, rows);
            self.resumed = true;
        }
        // What is forgotten was not watched.
        let oldest = Day(Day::of(wall).0 - self.settings.keep).start();
        let since = self.all.then_some(self.clock.at.max(oldest));
        let write = |store: &mut Store| store.write(self.tally.waiting(), since, wall);
        let mut written = write(&mut store);
        while matches!(written, Err(StoreError::Full { .. })) && store.is_at_its_bound() {
            let Some(until) = store.give_up_oldest()? else {
                break;
            };
            let text = format!("too many clients: those of before {until} are forgotten");
            lock(&self.shared.notes).push(text);
            written = write(&mut store);
        }
        written?;
        if now >= self.next_forget {
            self.next_forget = now + STEADY;
            store.forget(wall, self.settings.keep)?;
        }
        self.store = Some(store);
        Ok(())
    }

    /// Says why nothing was written, and does what helps.
    fn suffer(&mut self, error: &StoreError) {
        if let StoreError::Damaged { .. } = error
            && let Ok(aside) = Store::put_aside(&self.settings.dir)
        {
            let text = format!(
                "{error}; it lies in {} now, and a new one is made",
                aside.display()
            );
            lock(&self.shared.notes).push(text);
            // The new one knows nothing of what was watched before.
            self.clock = Clock::new(Instant::now(), unix(SystemTime::now()));
            self.next_write = Instant::now();
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
    use crate::stragglers::store::FILE;
    use crate::stragglers::tests::{NOON, Scratch, visit};

    fn keeper(dir: &Path) -> Keeper {
        let settings = Settings {
            dir: dir.into(),
            keep: 90,
        };
        let mut keeper = Keeper::new(settings, Arc::default());
        keeper.clock.at = NOON;
        keeper
    }

    fn add(keeper: &mut Keeper, client: &str, at: i64) {
        let visited = Visited {
            visits: vec![visit(client, 443, at)],
            openings: 1,
            ..Visited::default()
        };
        keeper.add(Batch {
            visited,
            all: true,
            at,
        });
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
            ("PRAGMA user_version = 2", "newer ipmoved (form 2"),
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

    #[test]
    fn a_clock_that_is_set_begins_the_time_of_watching_anew_and_forgets_nothing() {
        let scratch = Scratch::new("clock");
        let mut keeper = keeper(scratch.dir());
        let begun = keeper.clock.started;
        let hours = |n: u64| begun + Duration::from_secs(n * 3_600);
        add(&mut keeper, "203.0.113.9", NOON);
        keeper.write(begun, NOON);
        // At boot the clock was behind, or somebody sets it far ahead.
        let ahead = NOON + 200 * 86_400;
        keeper.write(begun + Duration::from_secs(70), ahead);
        assert_eq!(count(scratch.dir(), "watched"), 2);
        assert_eq!(count(scratch.dir(), "visits"), 1);
        keeper.write(hours(2), NOON + 7_200);
        assert_eq!(count(scratch.dir(), "visits"), 1, "it was set again");
        // That nobody will have watched in the future is forgotten, once the clock is right.
        keeper.write(hours(4), NOON + 4 * 3_600);
        assert_eq!(count(scratch.dir(), "watched"), 2);
        // It stays right for 200 days.
        keeper.write(hours(24 * 200), ahead);
        assert_eq!(count(scratch.dir(), "visits"), 0);
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
        writer.tell(visited, true, now, SystemTime::now());
        writer.end();
        writer.wait();
        assert_eq!((writer.trouble(), writer.lost()), (None, 0));
        assert_eq!(count(scratch.dir(), "visits"), 1);
    }
}
