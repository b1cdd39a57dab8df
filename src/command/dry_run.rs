//! `ipmoved --dry-run`: what a start would change in the kernel, as commands.

use std::fmt::Write as _;

use serde::Serialize;

use super::{Failure, ended, print, print_json, refuse};
use crate::daemon::{self, DryRun, log};
use crate::kernel::Step;
use crate::settings::args::{NatArgs, RunArgs};
use crate::settings::config::{self, Config, NatSettings};

/// The stable JSON form.
#[derive(Serialize)]
struct Told {
    /// At the start, in order.
    would_do: Vec<Step>,
    /// Once the old server says that what `--accept` names has moved, in order.
    when_moved: Vec<Step>,
    /// At the end, in order.
    at_exit: Vec<Step>,
}

/// Tells what running the tunnel would change.
pub(super) fn of_tunnel(args: RunArgs, json: bool) -> Result<(), Failure> {
    let config = Config::new(args).map_err(refuse)?;
    log::start(config.log_format);
    for warning in &config.warnings {
        super::warn(warning);
    }
    tell(
        daemon::dry_run(&config, &config::runtime_dir()).map_err(ended)?,
        json,
    )
}

/// Tells what `ipmoved nat` would change.
pub(super) fn of_nat(args: NatArgs) -> Result<(), Failure> {
    let json = args.dry_run.json;
    let settings = NatSettings::new(args).map_err(refuse)?;
    log::start(settings.log_format);
    tell(
        daemon::dry_run_nat(&settings, &config::runtime_dir()).map_err(ended)?,
        json,
    )
}

fn tell(dry_run: DryRun, json: bool) -> Result<(), Failure> {
    let DryRun {
        at_start,
        when_moved,
        at_exit,
    } = dry_run;
    let told = Told {
        would_do: at_start,
        when_moved,
        at_exit,
    };
    if json {
        print_json(&told)
    } else {
        print(&told.to_text())
    }
}

impl Told {
    /// Commands, with the rest as comments of a shell.
    fn to_text(&self) -> String {
        let mut text = String::new();
        for (title, steps) in [
            ("would do, in this order", &self.would_do),
            (
                "then, once the old server says that this has moved: no more than --accept names",
                &self.when_moved,
            ),
            ("at exit, or `ipmoved cleanup` after a crash", &self.at_exit),
        ] {
            if steps.is_empty() {
                continue;
            }
            if !text.is_empty() {
                text.push('\n');
            }
            // Writing to a String cannot fail.
            let _ = writeln!(text, "# {title}");
            let mut noted = None;
            for step in steps {
                // The same note stands above the first of a row.
                if let Some(note) = step.note.filter(|_| step.note != noted) {
                    let _ = writeln!(text, "# {note}:");
                }
                noted = step.note.or(noted);
                let _ = writeln!(text, "{}", step.command);
            }
        }
        text
    }
}
