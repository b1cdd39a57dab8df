//! The database: its file, its form, and what may be wrong with it.
//!
//! It is SQLite, with a write-ahead log, so that whoever asks does not wait for the writer, and a
//! killed writer loses what it was about to write and nothing else. What is written is added to
//! what is there, so that several daemons of one host can share it.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OpenFlags};

use crate::model::asked::Asked;
use crate::model::moved::{TCP, UDP};
use crate::model::prefix::Prefix;
use crate::model::visit::ServedBy;
use crate::packet::{ICMP, ICMPV6};

use super::rows;
use super::tally::{self, Key, Waiting};
use super::time::Day;
use super::watch::Watch;

/// The database in the state directory.
pub const FILE: &str = "stragglers.sqlite";

/// Where a database that was damaged is put; the one before it is replaced.
const DAMAGED: &str = "stragglers.sqlite.damaged";

/// What tells ours from other databases: `ipmv`.
const APPLICATION: i32 = 0x6970_6d76;

/// The form that this version writes and reads.
const VERSION: i32 = 3;

/// The form of the database.
const SCHEMA: &str = include_str!("schema.sql");

/// From each older form to the next one, from form 1 on.
const UPGRADES: [&str; VERSION as usize - 1] =
    [include_str!("upgrade_1.sql"), include_str!("upgrade_2.sql")];

/// How long to wait for another process that writes.
const BUSY: Duration = Duration::from_secs(2);

/// Pages of 4 KiB that the database may have: 256 MiB, for 90 days of ten thousand clients each.
/// It is full then, as a disk is.
const MAX_PAGES: i64 = 65_536;

/// Seconds by which a time may lie ahead: another clock may be a little ahead.
pub(super) const AHEAD: i64 = 3_600;

/// Days that are given up at a time when it is full.
const GIVEN_UP: i64 = 7;

/// Why the database cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is none.
    #[error(
        "{path} does not exist: the daemon of the old server writes it, unless it is started with \
         --no-client-log; if it has another --state-dir, give that here, too",
        path = .0.display()
    )]
    None(PathBuf),
    /// The directory cannot be used.
    #[error("cannot use {path}: {error} (--state-dir)", path = .path.display())]
    Dir {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The file belongs to something else.
    #[error("{path} is not a database of ipmoved; move it away", path = .0.display())]
    NotOurs(PathBuf),
    /// A newer version has written it.
    #[error(
        "{path} was written by a newer ipmoved (form {found}, this one knows {VERSION}): use that \
         version, or move the file away",
        path = .path.display()
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// The number of its form.
        found: i32,
    },
    /// An older version has written it, and no daemon of this one was started since.
    #[error(
        "{path} was written by an older ipmoved (form {found}): the daemon of this version brings \
         it up to date; restart it",
        path = .path.display()
    )]
    Older {
        /// The file.
        path: PathBuf,
        /// The number of its form.
        found: i32,
    },
    /// It is damaged.
    #[error("{path} is damaged: {error}", path = .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What SQLite said.
        error: String,
    },
    /// The disk, or the database, is full.
    #[error("{path} cannot grow: {error}; make room on its disk", path = .path.display())]
    Full {
        /// The file.
        path: PathBuf,
        /// What SQLite said.
        error: String,
    },
    /// It cannot be read or written.
    #[error("cannot use {path}: {error}", path = .path.display())]
    Other {
        /// The file.
        path: PathBuf,
        /// What SQLite said.
        error: String,
    },
}

/// The database, open.
#[derive(Debug)]
pub(super) struct Store {
    path: PathBuf,
    db: Connection,
    /// Which file it is.
    file: FileId,
}

/// Which file something is: its device, and its number there.
pub(super) type FileId = (u64, u64);

impl Store {
    /// Opens the database to write, and makes it if there is none. Clients' addresses are in it, so
    /// nobody else may read it. All of it is read to see whether it is whole, unless it is the file
    /// that was found `whole` before.
    pub(super) fn to_write(dir: &Path, whole: Option<FileId>) -> Result<Self, StoreError> {
        let of_dir = |error| StoreError::Dir {
            path: dir.into(),
            error,
        };
        if !dir.is_dir() {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
            made.map_err(of_dir)?;
        }
        let path = fs::canonicalize(dir).map_err(of_dir)?.join(FILE);
        // SQLite gives its other files the mode of this one.
        let mut file = OpenOptions::new();
        let file = file.write(true).create(true).truncate(false).mode(0o600);
        let opened = file.custom_flags(libc::O_NOFOLLOW).open(&path);
        drop(opened.map_err(|error| StoreError::Other {
            path: path.clone(),
            error: error.to_string(),
        })?);
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let store = Self::open(path, flags)?;
        store.of(store.prepare(whole != Some(store.file)))??;
        Ok(store)
    }

    /// Which file it is.
    pub(super) fn file(&self) -> FileId {
        self.file
    }

    /// Whether that file is still where it was opened: somebody may have removed or replaced it,
    /// and what is written to it then is lost.
    pub(super) fn is_there(&self) -> bool {
        file_id(&self.path).is_ok_and(|file| file == self.file)
    }

    /// Opens the database to read, if there is one.
    pub(super) fn to_read(dir: &Path) -> Result<Self, StoreError> {
        let path = dir.join(FILE);
        match fs::metadata(&path) {
            Ok(found) if found.len() > 0 => {}
            Ok(_) => return Err(StoreError::None(path)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(StoreError::None(path));
            }
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                let error = format!("{error}; try sudo");
                return Err(StoreError::Other { path, error });
            }
            Err(error) => {
                let error = error.to_string();
                return Err(StoreError::Other { path, error });
            }
        }
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let store = Self::open(path.clone(), flags)?;
        match store.check() {
            Ok(Ok(())) => Ok(store),
            Ok(Err(error)) => Err(error),
            // On a disk that is read-only, its log cannot be made. If there is none, all is there.
            Err(error)
                if !path.with_extension("sqlite-wal").exists()
                    && error.sqlite_error_code() == Some(ErrorCode::CannotOpen) =>
            {
                let uri = format!("file:{}?immutable=1", escaped(&path));
                let db = Connection::open_with_flags(uri, flags | OpenFlags::SQLITE_OPEN_URI);
                let store = Self {
                    db: db.map_err(|error| said(&path, &error))?,
                    file: file_id(&path)?,
                    path,
                };
                store.of(store.check())??;
                Ok(store)
            }
            Err(error) => Err(said(&path, &error)),
        }
    }

    /// Puts a damaged database aside, so that a new one can be made.
    pub(super) fn put_aside(dir: &Path) -> io::Result<PathBuf> {
        let aside = dir.join(DAMAGED);
        fs::rename(dir.join(FILE), &aside)?;
        for more in ["-wal", "-shm"] {
            let _ = fs::rename(
                dir.join(format!("{FILE}{more}")),
                dir.join(format!("{DAMAGED}{more}")),
            );
        }
        Ok(aside)
    }

    fn open(path: PathBuf, flags: OpenFlags) -> Result<Self, StoreError> {
        let db = Connection::open_with_flags(&path, flags).map_err(|error| said(&path, &error))?;
        let file = file_id(&path)?;
        let store = Self { path, db, file };
        store.of(store.db.busy_timeout(BUSY))?;
        Ok(store)
    }

    /// Makes it ready to be written. `look`: sees whether it is whole.
    fn prepare(&self, look: bool) -> rusqlite::Result<Result<(), StoreError>> {
        let tables = "SELECT count(*) FROM sqlite_schema";
        let is_new = self.db.query_row(tables, [], |row| row.get::<_, i64>(0))? == 0;
        if is_new && self.pragma("application_id")? == 0 {
            // As long as nothing is in it.
            self.db.pragma_update(None, "auto_vacuum", "INCREMENTAL")?;
        }
        self.db
            .query_row("PRAGMA journal_mode = WAL", [], |_| Ok(()))?;
        self.db.execute_batch(
            "PRAGMA synchronous = NORMAL; PRAGMA temp_store = MEMORY; PRAGMA cache_size = -2000;",
        )?;
        for (name, value) in [
            ("journal_size_limit", 4 << 20),
            ("max_page_count", MAX_PAGES),
        ] {
            let set = format!("PRAGMA {name} = {value}");
            self.db.query_row(&set, [], |_| Ok(()))?;
        }
        if is_new && self.pragma("application_id")? == 0 {
            self.db.execute_batch(&format!(
                "BEGIN IMMEDIATE; {SCHEMA} PRAGMA application_id = {APPLICATION}; \
                 PRAGMA user_version = {VERSION}; COMMIT;"
            ))?;
        }
        if let Err(error) = self.identify()? {
            return Ok(Err(error));
        }
        if look {
            let found: String =
                (self.db).query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
            if found != "ok" {
                return Ok(Err(StoreError::Damaged {
                    path: self.path.clone(),
                    error: found,
                }));
            }
        }
        let found = self.pragma("user_version")?;
        for (form, upgrade) in (1..).zip(UPGRADES).filter(|(form, _)| *form >= found) {
            self.db.execute_batch(&format!(
                "BEGIN IMMEDIATE; {upgrade} PRAGMA user_version = {}; COMMIT;",
                form + 1
            ))?;
        }
        Ok(Ok(()))
    }

    /// Whether it can be read: it is ours, and of the form that is known.
    fn check(&self) -> rusqlite::Result<Result<(), StoreError>> {
        let identified = self.identify()?;
        let found = self.pragma("user_version")?;
        if identified.is_ok() && found < VERSION {
            let path = self.path.clone();
            return Ok(Err(StoreError::Older { path, found }));
        }
        Ok(identified)
    }

    /// Whether it is ours, and of no newer form.
    fn identify(&self) -> rusqlite::Result<Result<(), StoreError>> {
        let path = self.path.clone();
        if self.pragma("application_id")? != APPLICATION {
            return Ok(Err(StoreError::NotOurs(path)));
        }
        let found = self.pragma("user_version")?;
        if found > VERSION {
            return Ok(Err(StoreError::Newer { path, found }));
        }
        Ok(Ok(()))
    }

    fn pragma(&self, name: &str) -> rusqlite::Result<i32> {
        self.db.pragma_query_value(None, name, |row| row.get(0))
    }

    /// What went wrong with this database, for people.
    fn of<T>(&self, result: rusqlite::Result<T>) -> Result<T, StoreError> {
        result.map_err(|error| said(&self.path, &error))
    }

    // What the writer does.

    /// The clients that came last, and the rows of a day, as the tally has them.
    pub(super) fn memory(&self, day: Day) -> Result<(Vec<Prefix>, Vec<Key>), StoreError> {
        let known = || {
            let mut query = self.db.prepare(
                "SELECT client FROM visits GROUP BY client ORDER BY max(last) DESC LIMIT ?1",
            )?;
            let clients = query.query_map([tally::MAX_KNOWN as i64], |row| row.get(0))?;
            clients.collect::<rusqlite::Result<Vec<String>>>()
        };
        let rows = || {
            let mut query = self.db.prepare(
                "SELECT client, address, port, protocol, served_by FROM visits WHERE day = ?1",
            )?;
            let rows = query.query_map([day.to_string()], |row| {
                let served_by: String = row.get(4)?;
                Ok((who(row)?, served_by))
            })?;
            rows.collect::<rusqlite::Result<Vec<_>>>()
        };
        let known = self.of(known())?;
        let rows = self.of(rows())?.into_iter().filter_map(|(who, served_by)| {
            Some(Key {
                day,
                who: who?,
                served_by: served(&served_by),
            })
        });
        let known = known.iter().filter_map(|client| client.parse().ok());
        Ok((known.collect(), rows.collect()))
    }

    /// Adds what waits, and which moves somebody has watched. All of it, or nothing. `all`: what
    /// came until now is in it.
    pub(super) fn write(
        &mut self,
        waiting: &Waiting,
        watch: &Watch,
        now: i64,
        all: bool,
    ) -> Result<(), StoreError> {
        let path = self.path.clone();
        let mut write = || -> rusqlite::Result<()> {
            let change = self.db.transaction()?;
            rows::write_watch(&change, watch, now, all)?;
            rows::write_visits(&change, waiting)?;
            rows::write_arrivals(&change, waiting)?;
            rows::write_names(&change, waiting)?;
            rows::write_days(&change, waiting)?;
            rows::write_arrived(&change, waiting)?;
            rows::write_unanswered(&change, waiting)?;
            change.commit()
        };
        write().map_err(|error| said(&path, &error))
    }

    /// When somebody watched last, as the clock was then.
    pub(super) fn last_watched(&self) -> Result<Option<i64>, StoreError> {
        let last = "SELECT max(until) FROM watched";
        self.of(self.db.query_row(last, [], |row| row.get(0)))
    }

    /// Forgets what is older than `keep` days. `now` has to be right.
    pub(super) fn forget(&mut self, now: i64, keep: i64) -> Result<(), StoreError> {
        self.forget_before(Day(Day::of(now).0 - keep))
    }

    /// What was written while the clock was ahead counts as come now, and as not watched. It is
    /// left alone if more was watched after `now` than before: then the clock is behind, or it was
    /// right less often than wrong. Returns whether that is so.
    pub(super) fn pull_back(&mut self, now: i64) -> Result<bool, StoreError> {
        let path = self.path.clone();
        let mut pull = || -> rusqlite::Result<bool> {
            let latest = now.saturating_add(AHEAD);
            let ahead = "SELECT EXISTS (SELECT 1 FROM visits WHERE last > ?1)
                         OR EXISTS (SELECT 1 FROM watched WHERE until > ?1)
                         OR EXISTS (SELECT 1 FROM names WHERE last > ?1)";
            if !self.db.query_row(ahead, [latest], |row| row.get(0))? {
                return Ok(false);
            }
            let shares = "SELECT total(max(0, min(until, ?1) - since)),
                                 total(max(0, until - max(since, ?1))) FROM watched";
            let (before, after): (f64, f64) =
                (self.db).query_row(shares, [latest], |row| Ok((row.get(0)?, row.get(1)?)))?;
            if after > before {
                return Ok(true);
            }
            let change = self.db.transaction()?;
            change.execute_batch(&rows::brought_back(now, latest))?;
            change.commit()?;
            Ok(false)
        };
        pull().map_err(|error| said(&path, &error))
    }

    /// Whether it has as many pages as it may have, so that the disk is not what is full.
    pub(super) fn is_at_its_bound(&self) -> bool {
        let of = |name| {
            self.db
                .pragma_query_value(None, name, |row| row.get::<_, i64>(0))
        };
        // A change may want some pages at a time.
        matches!((of("page_count"), of("max_page_count")), (Ok(has), Ok(may)) if has + 64 >= may)
    }

    /// Lets it grow no more.
    #[cfg(test)]
    pub(super) fn bound_here(&self) {
        let has: i64 = self
            .db
            .pragma_query_value(None, "page_count", |row| row.get(0))
            .unwrap();
        let set = format!("PRAGMA max_page_count = {has}");
        self.db.query_row(&set, [], |_| Ok(())).unwrap();
    }

    /// Makes room by giving up the oldest days. Returns up to which.
    pub(super) fn give_up_oldest(&mut self) -> Result<Option<Day>, StoreError> {
        let oldest = "SELECT min(day) FROM visits";
        let oldest = self
            .db
            .query_row(oldest, [], |row| row.get::<_, Option<String>>(0));
        let Some(oldest) = self.of(oldest)?.and_then(|day| Day::parse(&day)) else {
            return Ok(None);
        };
        let until = Day(oldest.0 + GIVEN_UP);
        self.forget_before(until)?;
        Ok(Some(until))
    }

    fn forget_before(&mut self, oldest: Day) -> Result<(), StoreError> {
        let path = self.path.clone();
        let mut forget = || -> rusqlite::Result<()> {
            let change = self.db.transaction()?;
            for table in ["visits", "days", "arrived"] {
                let forget = format!("DELETE FROM {table} WHERE day < ?1");
                change.execute(&forget, [oldest.to_string()])?;
            }
            for forget in [
                "DELETE FROM names WHERE last < ?1",
                "DELETE FROM unanswered WHERE last < ?1",
                "DELETE FROM moves WHERE until < ?1",
                "DELETE FROM watched WHERE until < ?1",
                "UPDATE OR REPLACE watched SET since = ?1 WHERE since < ?1",
            ] {
                change.execute(forget, [oldest.start()])?;
            }
            change.execute(
                "DELETE FROM arrivals WHERE NOT EXISTS (
                     SELECT 1 FROM visits WHERE visits.client = arrivals.client
                     AND visits.address = arrivals.address AND visits.port = arrivals.port
                     AND visits.protocol = arrivals.protocol)",
                [],
            )?;
            change.commit()?;
            // Pages that are free go back to the disk, one with each step.
            let mut vacuum = self.db.prepare("PRAGMA incremental_vacuum")?;
            let mut freed = vacuum.query([])?;
            while freed.next()?.is_some() {}
            Ok(())
        };
        forget().map_err(|error| said(&path, &error))
    }

    // What those who ask read.

    /// Reads rows, of which each gives a `T`, or nothing.
    pub(super) fn read<T>(
        &self,
        query: &str,
        params: impl rusqlite::Params,
        row: impl FnMut(&rusqlite::Row<'_>) -> rusqlite::Result<Option<T>>,
    ) -> Result<Vec<T>, StoreError> {
        let read = || {
            let mut query = self.db.prepare(query)?;
            let rows = query.query_map(params, row)?;
            rows.filter_map(Result::transpose).collect()
        };
        self.of(read())
    }
}

/// Reads a client and what it asks for from the first four columns; `None` if a person has put
/// something else there.
pub(super) fn who(row: &rusqlite::Row<'_>) -> rusqlite::Result<Option<tally::Who>> {
    let (client, address): (String, String) = (row.get(0)?, row.get(1)?);
    let (port, protocol): (i64, String) = (row.get(2)?, row.get(3)?);
    let asked = || {
        Some(Asked {
            addr: address.parse().ok()?,
            protocol: protocol_number(&protocol)?,
            port: u16::try_from(port).ok()?,
        })
    };
    Ok(client.parse().ok().zip(asked()))
}

/// The times in a list of them.
pub(super) fn times(list: &str) -> Vec<i64> {
    list.split(' ').filter_map(|at| at.parse().ok()).collect()
}

/// Which server that is.
fn served(name: &str) -> ServedBy {
    if name == ServedBy::Old.name() {
        ServedBy::Old
    } else {
        ServedBy::New
    }
}

/// How a protocol is called: by its number if it is none of those that move by name.
pub(super) fn protocol(number: u8) -> String {
    match number {
        TCP => "tcp".into(),
        UDP => "udp".into(),
        ICMP => "icmp".into(),
        ICMPV6 => "icmpv6".into(),
        other => other.to_string(),
    }
}

fn protocol_number(name: &str) -> Option<u8> {
    match name {
        "tcp" => Some(TCP),
        "udp" => Some(UDP),
        "icmp" => Some(ICMP),
        "icmpv6" => Some(ICMPV6),
        other => other.parse().ok(),
    }
}

/// What SQLite said, for people.
fn said(path: &Path, error: &rusqlite::Error) -> StoreError {
    let path = path.to_owned();
    let text = error.to_string();
    match error.sqlite_error_code() {
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
            StoreError::Damaged { path, error: text }
        }
        Some(ErrorCode::DiskFull) => StoreError::Full { path, error: text },
        // What it cannot write beside the database fails without saying why.
        Some(ErrorCode::SystemIoFailure) if is_full(&path) => {
            StoreError::Full { path, error: text }
        }
        Some(ErrorCode::CannotOpen | ErrorCode::PermissionDenied)
            if !rustix::process::geteuid().is_root() =>
        {
            let error = format!("{text}; try sudo");
            StoreError::Other { path, error }
        }
        Some(ErrorCode::ReadOnly | ErrorCode::CannotOpen | ErrorCode::PermissionDenied) => {
            let error = format!(
                "{text}; is its disk mounted read-only, or does the file belong to somebody else? \
                 Name another directory with --state-dir, or mend that"
            );
            StoreError::Other { path, error }
        }
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => StoreError::Other {
            path,
            error: format!("{text}: another program writes to it"),
        },
        _ => StoreError::Other { path, error: text },
    }
}

/// Which file lies there.
fn file_id(path: &Path) -> Result<FileId, StoreError> {
    let found = fs::metadata(path).map_err(|error| StoreError::Other {
        path: path.into(),
        error: error.to_string(),
    })?;
    Ok((found.dev(), found.ino()))
}

/// Whether the disk of a file has no room left for a few pages.
fn is_full(path: &Path) -> bool {
    /// What SQLite needs beside the database: an index of 32 KiB, and pages of its log.
    const LITTLE: u64 = 64 << 10;
    let disk = rustix::fs::statvfs(path.parent().unwrap_or(path));
    disk.is_ok_and(|disk| disk.f_bavail.saturating_mul(disk.f_frsize) < LITTLE)
}

/// A path in a URI.
fn escaped(path: &Path) -> String {
    let mut text = String::new();
    for &byte in path.as_os_str().as_encoded_bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' | b'-' | b'_' => {
                text.push(char::from(byte));
            }
            other => text.push_str(&format!("%{other:02X}")),
        }
    }
    text
}
