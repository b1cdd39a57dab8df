//! What the writer does with a disk, a clock and a flood.

use std::fs;
use std::path::Path;

use super::*;
use crate::model::visit::Visit;
use crate::stragglers::history::History;
use crate::stragglers::store::FILE;
use crate::stragglers::tally::MAX_UNANSWERED;
use crate::stragglers::tests::{NOON, Scratch, visit, wall};
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
        news: MoveNews::default(),
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

/// Where the next one writes.
const WRITES_TO: &str = "IPMOVED_TEST_WRITES_TO";

#[test]
#[ignore = "another test runs it in a process of its own, and kills that"]
fn it_writes_until_it_is_killed() {
    let Some(dir) = std::env::var_os(WRITES_TO) else {
        return;
    };
    let mut timed = Timed::new(Path::new(&dir));
    for n in 0..u32::MAX {
        let client = std::net::Ipv4Addr::from(0x0a00_0000 + n % 20_000).to_string();
        add(&mut timed.keeper, &client, NOON);
        if n % 7 == 0 {
            timed.write(0, 0);
        }
    }
}

#[test]
fn a_kill_while_it_writes_leaves_all_of_a_write_or_nothing() {
    let scratch = Scratch::new("kill");
    let mut before = 0;
    for _ in 0..4 {
        let mut test = std::process::Command::new(std::env::current_exe().unwrap());
        let name = "stragglers::writer::tests::it_writes_until_it_is_killed";
        test.args(["--exact", name, "--ignored", "--test-threads=1"]);
        test.env(WRITES_TO, scratch.dir());
        test.stdout(std::process::Stdio::null());
        let mut writes = test.spawn().unwrap();
        let sum = |of: &str| -> Option<i64> {
            let store = Store::to_read(scratch.dir()).ok()?;
            let sums = store.read(of, [], |row| row.get(0));
            sums.ok()?.first().copied()
        };
        let visits = "SELECT sum(connections) FROM visits";
        let patience = Instant::now() + Duration::from_secs(60);
        while sum(visits).is_none_or(|sum| sum <= before + 100) {
            assert!(Instant::now() < patience, "it writes nothing");
            std::thread::sleep(Duration::from_millis(1));
        }
        // This is SIGKILL.
        writes.kill().unwrap();
        writes.wait().unwrap();
        // It is looked at whole.
        drop(Store::to_write(scratch.dir(), None).unwrap());
        before = sum(visits).unwrap();
        let openings = sum("SELECT sum(openings) FROM days").unwrap();
        assert_eq!(before, openings);
    }
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
        ("PRAGMA user_version = 4", "newer ipmoved (form 4"),
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
fn one_of_an_older_form_is_brought_up_to_date() {
    let to_form_2 = "DROP TABLE unanswered; PRAGMA user_version = 2;";
    let to_form_1 = "DROP TABLE unanswered; DROP TABLE watched; DROP TABLE moves;
         DROP TABLE arrived;
         CREATE TABLE watched (since INTEGER PRIMARY KEY, until INTEGER NOT NULL) STRICT;
         INSERT INTO watched VALUES (1, 1795867200);
         ALTER TABLE days DROP COLUMN lost; ALTER TABLE days DROP COLUMN displaced;
         PRAGMA user_version = 1;";
    for (form, change) in [(1, to_form_1), (2, to_form_2)] {
        let scratch = Scratch::new(&format!("form-{form}"));
        let mut first = keeper(scratch.dir());
        add(&mut first, "203.0.113.9", NOON);
        first.write(first.clock.started, NOON);
        drop(first);
        let db = rusqlite::Connection::open(scratch.dir().join(FILE)).unwrap();
        db.execute_batch(change).unwrap();
        drop(db);
        let older = Store::to_read(scratch.dir()).unwrap_err().to_string();
        assert!(
            older.contains(&format!("older ipmoved (form {form})")),
            "{older}"
        );
        let mut timed = Timed::new(scratch.dir());
        timed.write(100, 0);
        assert_eq!(watched(scratch.dir()).last(), Some(&(NOON, NOON + 100)));
        assert_eq!(count(scratch.dir(), "visits"), 1);
        // It has what a new one has.
        let new = Scratch::new(&format!("new-{form}"));
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
}

#[test]
fn what_nobody_was_answered_outlives_the_daemon_until_somebody_is() {
    let scratch = Scratch::new("in-vain");
    let tell = |timed: &mut Timed, what: &str, answered| {
        let what = what.to_owned();
        timed
            .keeper
            .tally
            .add_in_vain(NOON, InVain { what, answered });
        timed.write(0, 0);
    };
    let kept = |now: i64| {
        let history = History::open(scratch.dir(), wall(now), None).unwrap();
        history.unanswered(now - 1_000).unwrap()
    };
    let mut timed = Timed::new(scratch.dir());
    for what in ["192.0.2.5:81/tcp", "192.0.2.5:82/tcp"] {
        tell(&mut timed, what, false);
    }
    assert_eq!(kept(NOON), ["192.0.2.5:81/tcp", "192.0.2.5:82/tcp"]);
    drop(timed);
    let mut timed = Timed::new(scratch.dir());
    tell(&mut timed, "192.0.2.5:82/tcp", true);
    assert_eq!(kept(NOON), ["192.0.2.5:81/tcp"]);
    // Nobody asks for it any more.
    assert_eq!(kept(NOON + 2_000), [""; 0]);
    // A scan of everything takes no more room than this.
    for port in 0..2 * MAX_UNANSWERED {
        tell(&mut timed, &format!("192.0.2.5:{}/udp", port + 1), false);
    }
    assert_eq!(kept(NOON).len(), MAX_UNANSWERED);
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
    writer.tell(
        visited,
        MoveNews::default(),
        &moves,
        now,
        SystemTime::now(),
        true,
    );
    writer.end();
    writer.wait();
    assert_eq!((writer.trouble(), writer.lost()), (None, 0));
    assert_eq!(writer.unwritten(), 0);
    assert_eq!(count(scratch.dir(), "visits"), 1);
}
