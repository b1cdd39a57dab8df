//! `stragglers`, `verdict` and `report`: who still comes, and whether the old server can be
//! switched off.
//!
//! Owns what is asked of whom: the database tells what was, the daemon and this host what is. All
//! of it is said, too, while no daemon runs.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use crate::model::asked::Asked;
use crate::model::peer::Role;
use crate::model::prefix::Prefix;
use crate::model::status::{Answers, Served, Status, TunnelStatus, many_in_vain};
use crate::settings::args::{ReportArgs, StragglersArgs, VerdictArgs};
use crate::settings::config;
use crate::stragglers::findings::Findings;
use crate::stragglers::history::History;
use crate::stragglers::report::Page;
use crate::stragglers::store::StoreError;
use crate::stragglers::time::Day;
use crate::stragglers::verdict::{Now, Verdict};

use super::{BAD_INPUT, FAILED, Failure, SYSTEM, here, orders, print, print_json};

/// What was asked for in so many seconds is served, as far as a socket is there for it.
const LATELY: i64 = 7 * 86_400;

/// The old server cannot be switched off yet (`verdict`).
const NOT_YET: u8 = 1;

/// Clients that a person is shown unless more are asked for.
const SHOWN: usize = 20;

/// So long after it came everything is recorded, but for what comes without an end.
const SETTLES: Duration = Duration::from_secs(20);

/// How often is looked meanwhile.
const AGAIN: Duration = Duration::from_millis(500);

/// The name for standard output.
const STDOUT: &str = "-";

/// Shows who comes.
pub(super) fn show(args: StragglersArgs) -> Result<(), Failure> {
    let history = history(args.state_dir, daemon().as_ref())?;
    let since = history.now() - args.since.get().as_secs() as i64;
    // What a program reads is whole.
    let all = if args.json || args.csv {
        usize::MAX
    } else {
        SHOWN
    };
    let top = args.top.map_or(all, |top| top.get() as usize);
    let findings = Findings::of(&history, since, top, &[]).map_err(unreadable)?;
    if args.json {
        print_json(&findings)
    } else if args.csv {
        print(&findings.to_csv())
    } else {
        print(&findings.to_text())
    }
}

/// Says whether the old server can be switched off. Every failure but "not yet" has another exit
/// code than that.
pub(super) fn judge(args: VerdictArgs) -> Result<(), Failure> {
    let asked = Instant::now();
    let quiet = args.quiet.get().as_secs() as i64;
    let verdict = loop {
        let mut daemon = daemon();
        let history = history(args.state_dir.clone(), daemon.as_ref())?;
        let verdict = verdict(&history, quiet, &args.ignore, daemon.as_mut())?;
        // Somebody may have come just now.
        let unwritten = daemon.is_some_and(|daemon| daemon.unwritten > 0);
        if !verdict.safe || !unwritten || asked.elapsed() >= SETTLES {
            break verdict;
        }
        std::thread::sleep(AGAIN);
    };
    let printed = if args.json {
        print_json(&verdict)
    } else {
        print(&verdict.to_text())
    };
    printed.map_err(|Failure { message, .. }| Failure::new(SYSTEM, message))?;
    if verdict.safe {
        Ok(())
    } else {
        Err(Failure {
            code: NOT_YET,
            // It has been said.
            message: String::new(),
        })
    }
}

/// Writes a page to show others.
pub(super) fn report(args: ReportArgs) -> Result<(), Failure> {
    let mut daemon = daemon();
    let history = history(args.state_dir, daemon.as_ref())?;
    let quiet = args.quiet.get().as_secs() as i64;
    let verdict = verdict(&history, quiet, &args.ignore, daemon.as_mut())?;
    let (since, top) = (history.now() - quiet, args.top.get() as usize);
    let findings = Findings::of(&history, since, top, &args.ignore).map_err(unreadable)?;
    let moved: Vec<String> = verdict.moves.iter().map(|it| it.what.clone()).collect();
    let arrived = history.arrived(Day::of(0)).map_err(unreadable)?;
    let page = Page {
        moved: &moved,
        verdict: &verdict,
        findings: &findings,
        arrived: &arrived,
    };
    let html = page
        .to_html()
        .map_err(|error| Failure::new(FAILED, error))?;
    if args.file == Path::new(STDOUT) {
        return print(&html);
    }
    write_whole(&args.file, html.as_bytes())?;
    print(&format!("{} is written\n", args.file.display()))
}

/// Writes a file that is there whole, or as it was. Whatever else has that name stays: through a
/// link, root would write where somebody else wants it.
fn write_whole(file: &Path, text: &[u8]) -> Result<(), Failure> {
    let shown = file.display();
    match fs::symlink_metadata(file) {
        Ok(found) if !found.is_file() => {
            let what = if found.is_symlink() {
                "a symbolic link"
            } else if found.is_dir() {
                "a directory"
            } else {
                "no regular file"
            };
            let why = format!("{shown} is {what}; name a file, or `-` for standard output");
            return Err(Failure::new(BAD_INPUT, why));
        }
        Ok(_) | Err(_) => {}
    }
    let Some(name) = file.file_name() else {
        return Err(Failure::new(BAD_INPUT, format!("{shown} names no file")));
    };
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(format!(".{}", std::process::id()));
    let next = file.with_file_name(hidden);
    let write = || -> io::Result<()> {
        let mut open = OpenOptions::new();
        let mut open = open.write(true).create_new(true).mode(0o644).open(&next)?;
        open.write_all(text)?;
        open.sync_all()?;
        fs::rename(&next, file)
    };
    write().map_err(|error| {
        if error.kind() != io::ErrorKind::AlreadyExists {
            let _ = fs::remove_file(&next);
        }
        let remedy = match error.raw_os_error() {
            Some(libc::ENOENT) => "; make its directory first",
            Some(libc::ENOSPC | libc::EDQUOT) => "; make room there",
            Some(libc::EROFS | libc::EACCES | libc::EPERM) => "; name one elsewhere, as in /tmp",
            Some(_) | None => "",
        };
        Failure::new(FAILED, format!("cannot write {shown}: {error}{remedy}"))
    })
}

/// What clients have asked for in the last days, as far as that is recorded.
pub(super) fn asked_for(daemon: &Status) -> BTreeSet<Asked> {
    let asked = history(None, Some(daemon)).and_then(|history| {
        let since = history.now() - LATELY;
        history.asked_for(since).map_err(unreadable)
    });
    // Without a record this server's sockets tell.
    asked.unwrap_or_default()
}

/// What the daemon of this server says, if one runs.
fn daemon() -> Option<Status> {
    // The new server's has nothing to say of who comes.
    let status = orders::status().ok()?;
    let old = status.tunnels.iter().any(|tunnel| !tunnel.modes.is_empty());
    old.then_some(status)
}

/// The verdict, with what this server still has itself, as far as its daemon runs and can tell.
fn verdict(
    history: &History,
    quiet: i64,
    ignored: &[Prefix],
    daemon: Option<&mut Status>,
) -> Result<Verdict, Failure> {
    let verdict = Verdict::of(history, quiet, ignored).map_err(unreadable)?;
    let Some(status) = daemon else {
        return Ok(verdict);
    };
    let counted = here::count(status);
    let modes = || status.tunnels.iter().flat_map(|tunnel| &tunnel.modes);
    let here = match counted {
        Ok(()) => Ok(modes().filter_map(|mode| mode.here_live).sum()),
        Err(error) => Err(error.to_string()),
    };
    let served = status.tunnels.iter().flat_map(|tunnel| &tunnel.served);
    // What is not asked for any more at the moment is forgotten after a while; that nobody was ever
    // answered is not. Whoever was not answered is not recorded.
    let bad = [Answers::Silent, Answers::Refused, Answers::Unanswered];
    let never = |it: &Served| it.answered == 0 && it.asked >= many_in_vain(&it.what);
    let unanswered = served.filter(|it| it.expected && (bad.contains(&it.state) || never(it)));
    let unanswered = unanswered.map(|it| it.what.clone()).collect();
    let each = modes().map(|mode| (mode.what.clone(), mode.mode.clone()));
    Ok(verdict.with(Now {
        modes: each.collect(),
        unanswered,
        here,
    }))
}

fn history(state_dir: Option<PathBuf>, daemon: Option<&Status>) -> Result<History, Failure> {
    let dir = config::state_dir(state_dir);
    let runs = daemon.map(|status| Duration::from_secs(status.uptime_s));
    History::open(&dir, SystemTime::now(), runs).map_err(|error| match (&error, new_server()) {
        (StoreError::None(_), Some(old)) => Failure::new(
            BAD_INPUT,
            format!(
                "this is the new server; who comes is recorded on the old one: run it there ({old})"
            ),
        ),
        _ => unreadable(error),
    })
}

/// If this is the new server: where its old servers are.
fn new_server() -> Option<String> {
    let status = orders::status().ok()?;
    let is_new = |it: &&TunnelStatus| it.role == Role::New;
    let old: Vec<String> = (status.tunnels.iter())
        .filter(is_new)
        .map(|it| it.peer.clone())
        .collect();
    (!old.is_empty()).then(|| old.join(", "))
}

fn unreadable(error: StoreError) -> Failure {
    Failure::new(SYSTEM, error)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn a_page_is_there_whole_and_no_link_is_followed() {
        let dir = std::env::temp_dir().join(format!("ipmoved-whole-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        let (page, link) = (dir.join("page.html"), dir.join("link.html"));
        let refused = |file: &Path| write_whole(file, b"no").err().map(|it| it.message);
        for text in ["one", "two"] {
            assert!(write_whole(&page, text.as_bytes()).is_ok());
            assert_eq!(fs::read(&page).unwrap(), text.as_bytes());
        }
        let mode = fs::metadata(&page).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode & !0o644, 0, "{mode:o}");
        symlink(&page, &link).unwrap();
        assert!(refused(&link).unwrap().contains("a symbolic link"));
        assert!(refused(&dir).unwrap().contains("a directory"));
        let nowhere = refused(&dir.join("none/page.html")).unwrap();
        assert!(nowhere.contains("make its directory first"), "{nowhere}");
        assert_eq!(fs::read(&page).unwrap(), b"two");
        assert_eq!(
            fs::read_dir(&dir).unwrap().count(),
            2,
            "nothing is left behind"
        );
        fs::remove_dir_all(&dir).unwrap();
    }
}
