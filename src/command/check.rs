//! `ipmoved check`: whether it will work, before anything is changed.

use std::ffi::OsString;

use clap::Parser;

use super::{FAILED, Failure, print, print_json};
use crate::channel::session::Psk;
use crate::daemon::checks::{self, Given, Words};
use crate::io::entropy;
use crate::model::finding::{Findings, Grade};
use crate::settings::args::{CheckArgs, Cli, Command, NatArgs, RunArgs};
use crate::settings::config::{self, Config, ConfigError, KEY_IS_SEEN, NatSettings};

/// Looks at everything, and says it.
pub(super) fn run(args: Box<CheckArgs>) -> Result<(), Failure> {
    let json = args.json;
    let words = Words::of_this_process();
    let found = match settings(args) {
        Ok((config, psk_file, has_key)) => {
            // Nothing that is looked at is to be logged beside what is said of it.
            let given = Given {
                config: &config,
                words,
                runtime_dir: &config::runtime_dir(),
                psk_file,
                has_key,
            };
            checks::look(&given)
        }
        Err(mistake) => checks::without_settings(&words, &mistake),
    };
    end(&found, json)
}

/// The same for `ipmoved nat --check`.
pub(super) fn of_nat(args: NatArgs) -> Result<(), Failure> {
    let json = args.dry_run.json;
    let words = Words::of_this_process();
    let found = match NatSettings::new(args) {
        Ok(settings) => checks::look_nat(&settings, &words, &config::runtime_dir()),
        Err(mistake) => checks::without_settings(&words, &mistake),
    };
    end(&found, json)
}

/// Says what was found. The exit code is that of the worst.
fn end(found: &Findings, json: bool) -> Result<(), Failure> {
    say(found, json)?;
    match found.result {
        Grade::Ok => Ok(()),
        Grade::Warn | Grade::Fail => Err(Failure {
            code: found.result.exit_code(),
            // It has been said.
            message: String::new(),
        }),
    }
}

fn say(found: &Findings, json: bool) -> Result<(), Failure> {
    let said = if json {
        print_json(found)
    } else {
        print(&found.to_text())
    };
    said.map_err(|Failure { message, .. }| Failure::new(FAILED, message))
}

/// What of settings can be had.
type Settings = (Config, Option<std::path::PathBuf>, bool);

/// The settings, where the key is, and whether that could be read: without it the rest can be
/// looked at all the same.
fn settings(args: Box<CheckArgs>) -> Result<Settings, ConfigError> {
    let psk_file = args.run.peer.psk_file.clone();
    let mistake = match Config::new(args.run) {
        Ok(config) => return Ok((config, psk_file, true)),
        Err(mistake) => mistake,
    };
    let denied = if let ConfigError::File { path, error, .. } = &mistake {
        let denied = error.kind() == std::io::ErrorKind::PermissionDenied;
        denied && psk_file.as_ref() == Some(path)
    } else {
        false
    };
    let again = denied.then(again).flatten().ok_or(mistake)?;
    let mut config = Config::new(again)?;
    // Nobody has typed that key.
    config.warnings.retain(|warning| warning != KEY_IS_SEEN);
    Ok((config, psk_file, false))
}

/// What was typed, with a key that nobody has in the place of the one that cannot be read.
fn again() -> Option<RunArgs> {
    let words: Vec<OsString> = std::env::args_os().collect();
    let Some(Command::Check(args)) = Cli::try_parse_from(words).ok()?.command else {
        return None;
    };
    let mut run = args.run;
    run.peer.psk_file = None;
    run.peer.psk = Psk::generate(&entropy::system()).ok();
    Some(run)
}
