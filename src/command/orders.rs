//! `move`, `hold`, `back` and `reload`: what they ask of the daemon, and what they print.

use std::time::Duration;

use serde::Serialize;

use crate::daemon::control_socket::Client;
use crate::daemon::status_socket::{self, StatusError};
use crate::kernel::namespace_dir;
use crate::model::moved::Move;
use crate::model::request::{Answer, Changed, Request};
use crate::model::runtime::{CONTROL_SOCKET, STATUS_SOCKET};
use crate::model::status::{Status, Way};
use crate::settings::args::{BackArgs, HoldArgs, MoveArgs};
use crate::settings::config;
use crate::settings::values::HoldSeconds;

use super::{BAD_INPUT, FAILED, Failure, OTHER_DAEMON, SYSTEM, here, print, print_json, warn};

/// How long a hold lasts unless told otherwise: a service restarts meanwhile, and clients are still
/// patient.
const HOLD: u32 = 60;

/// How long a reload may take: files on a slow disk, names that are looked up.
const RELOAD: Duration = Duration::from_secs(180);

/// What `reload --json` prints.
#[derive(Debug, Serialize)]
struct Reloaded {
    /// Whether the configuration that lies there now is in use.
    reloaded: bool,
    /// What is another one than before, a line each.
    changes: Vec<String>,
    warnings: Vec<String>,
    /// Why it is not in use.
    error: Option<String>,
}

/// Reads the configuration again.
pub(super) fn reload(json: bool) -> Result<(), Failure> {
    let mut daemon = connect()?.patient(RELOAD).map_err(unanswered)?;
    let (told, failed) = match ask(&mut daemon, &Request::Reload)? {
        Answer::Reloaded { changes, warnings } => {
            let reloaded = Reloaded {
                reloaded: true,
                changes,
                warnings,
                error: None,
            };
            (reloaded, false)
        }
        Answer::Refused { why, .. } => {
            let refused = Reloaded {
                reloaded: false,
                changes: Vec::new(),
                warnings: Vec::new(),
                error: Some(why),
            };
            (refused, true)
        }
        Answer::Done { .. } => return Err(Failure::new(FAILED, "another answer was expected")),
    };
    if json {
        print_json(&told)?;
    } else {
        told.warnings.iter().for_each(|text| warn(text));
        let text = match told.changes.is_empty() {
            true => "nothing has changed\n".into(),
            false => told
                .changes
                .iter()
                .map(|line| format!("{line}\n"))
                .collect::<String>(),
        };
        if !failed {
            print(&text)?;
        }
    }
    match told.error {
        None => Ok(()),
        Some(_) if json => Err(Failure::new(FAILED, "")),
        Some(why) => Err(Failure::new(
            FAILED,
            format!("not reloaded; everything goes on as before: {why}"),
        )),
    }
}

/// The names of what a command is about.
pub(super) fn names(what: &[Move]) -> Vec<String> {
    what.iter().map(ToString::to_string).collect()
}

/// Sends new conversations to the new server.
pub(super) fn move_away(args: MoveArgs) -> Result<(), Failure> {
    let mut daemon = connect()?;
    let (what, percent) = (names(&args.what), args.percent);
    let changed = give(&mut daemon, &Request::Move { what, percent })?;
    tell(&changed)?;
    if args.cut {
        cut(&mut daemon, &changed)?;
    }
    Ok(())
}

/// Lets new conversations wait.
pub(super) fn hold(args: HoldArgs) -> Result<(), Failure> {
    let what = names(&args.what);
    let seconds = args.seconds.map_or(HOLD, HoldSeconds::get);
    tell(&give(&mut connect()?, &Request::Hold { what, seconds })?)
}

/// Sends new conversations to the service here.
pub(super) fn back(args: BackArgs) -> Result<(), Failure> {
    let what = names(&args.what);
    tell(&give(&mut connect()?, &Request::Back { what })?)
}

/// Ends what the old server still has.
fn cut(daemon: &mut Client, changed: &[Changed]) -> Result<(), Failure> {
    let names = changed.iter().map(|it| it.what.clone());
    let ended = here::cut(here::parse(names.clone())).map_err(|error| {
        let remedy = match error.raw_os_error() {
            Some(libc::EOPNOTSUPP) => {
                "this kernel cannot do that (CONFIG_INET_DIAG_DESTROY); stop the service here"
            }
            Some(libc::EPERM | libc::EACCES) => "try sudo",
            _ => "stop the service here",
        };
        let why = "it has moved, but the connections of this server could not be ended";
        Failure::new(FAILED, format!("{why}: {error}; {remedy}"))
    })?;
    let forget = Request::Forget {
        what: names.collect(),
    };
    let forgotten = match ask(daemon, &forget)? {
        Answer::Done { forgotten, .. } => forgotten,
        Answer::Refused { why, .. } => return Err(Failure::new(FAILED, why)),
        Answer::Reloaded { .. } => 0,
    };
    let behind = forgotten.max(ended.tracked);
    print(&format!(
        "ended: {} conversations of this server, {behind} of hosts behind it\n",
        ended.sockets
    ))
}

/// Gives a command, and prints what the daemon wants to be known.
pub(super) fn give(daemon: &mut Client, request: &Request) -> Result<Vec<Changed>, Failure> {
    match ask(daemon, request)? {
        Answer::Done {
            moves, warnings, ..
        } => {
            warnings.iter().for_each(|text| warn(text));
            Ok(moves)
        }
        Answer::Reloaded { .. } => Ok(Vec::new()),
        Answer::Refused { input, why } => {
            Err(Failure::new(if input { BAD_INPUT } else { FAILED }, why))
        }
    }
}

fn ask(daemon: &mut Client, request: &Request) -> Result<Answer, Failure> {
    daemon.ask(request).map_err(unanswered)
}

fn tell(changed: &[Changed]) -> Result<(), Failure> {
    let mut text = String::new();
    for Changed { what, before, mode } in changed {
        text.push_str(&match before == mode {
            true => format!("{what}: {mode}, as before\n"),
            false => format!("{what}: {mode} (before: {before})\n"),
        });
    }
    print(&text)
}

/// Why there is no answer.
pub(super) fn unanswered(error: StatusError) -> Failure {
    let code = match &error {
        StatusError::NotRunning(_) => OTHER_DAEMON,
        StatusError::Permission(_) => SYSTEM,
        StatusError::Answer(_) | StatusError::Silent => FAILED,
    };
    Failure::new(code, error)
}

/// What the daemon says of itself.
pub(super) fn status() -> Result<Status, Failure> {
    let socket = dir()?.join(STATUS_SOCKET);
    status_socket::ask(&socket).map_err(unanswered)
}

pub(super) fn dir() -> Result<std::path::PathBuf, Failure> {
    namespace_dir(&config::runtime_dir()).map_err(|error| Failure::new(SYSTEM, error))
}

/// Connects to the old server's daemon.
pub(super) fn connect() -> Result<Client, Failure> {
    let error = match Client::connect(&dir()?.join(CONTROL_SOCKET)) {
        Ok(daemon) => return Ok(daemon),
        Err(error) => unanswered(error),
    };
    if error.code != OTHER_DAEMON {
        return Err(error);
    }
    let status = status()?;
    Err(match status.way {
        Way::Nat => Failure::new(
            BAD_INPUT,
            "`ipmoved nat` runs here, which sends all of it to the new server as long as it runs: \
             stop it to go back; modes are for ipmoved with a tunnel",
        ),
        Way::Tunnel => Failure::new(
            FAILED,
            "the daemon that runs here does not know this command; restart it",
        ),
    })
}
