//! `status`: what the daemon says of itself, with what only this command can find out.

use serde::Serialize;

use super::{Failure, here, name_firewalls, orders, print, print_json, watch};
use crate::model::problems::Problem;
use crate::model::status::Status;
use crate::settings::args::StatusArgs;
use crate::settings::values::WatchSeconds;

/// Shows it once, or again and again.
pub(super) fn run(args: StatusArgs) -> Result<(), Failure> {
    if let Some(seconds) = args.watch {
        return watch::run(seconds.map(WatchSeconds::get), args.json);
    }
    let status = prepared(orders::status()?);
    if args.json {
        print_json(&as_json(&status))
    } else {
        print(&status.to_text())
    }
}

/// The status with what the daemon may not look at itself.
pub(super) fn prepared(mut status: Status) -> Status {
    name_firewalls(&mut status);
    // Without it the old server's own connections are not counted.
    let _ = here::count(&mut status);
    status
}

/// What `--json` shows.
#[derive(Serialize)]
pub(super) struct AsJson<'a> {
    /// The same as the first line of the text.
    verdict: String,
    /// What is wrong, the worst first.
    problems: Vec<Problem>,
    #[serde(flatten)]
    status: &'a Status,
}

/// The stable form for programs.
pub(super) fn as_json(status: &Status) -> AsJson<'_> {
    AsJson {
        verdict: status.verdict(),
        problems: status.problems(),
        status,
    }
}
