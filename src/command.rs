//! The commands, as a person meets them: what is printed, and the exit code.
//!
//! The binary's edge: the one place that prints, and that turns every error into one line saying
//! what failed, on which object, and what to do.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::disallowed_methods,
    reason = "an edge: the command line's own voice"
)]

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;
use tracing_subscriber::EnvFilter;

use crate::channel::session::Psk;
use crate::daemon::confine;
use crate::daemon::status_socket::{self, StatusError};
use crate::daemon::{self, DaemonError};
use crate::io::entropy;
use crate::kernel::journal::{self, JournalError};
use crate::kernel::{Host, HostError};
use crate::lab::{DemoError, LabError};
use crate::model::runtime::STATUS_SOCKET;
use crate::settings::args::{Cli, Command, LogFormat, NatArgs, RunArgs};
use crate::settings::config::{self, Config, NatSettings};

/// Failed while running.
const FAILED: u8 = 1;
/// Bad input; clap uses the same.
const BAD_INPUT: u8 = 2;
/// The system cannot do it.
const SYSTEM: u8 = 3;
/// A daemon runs already, or none does.
const OTHER_DAEMON: u8 = 4;

/// Variable that chooses what is logged, in the syntax of `tracing_subscriber::EnvFilter`.
const LOG_VARIABLE: &str = "IPMOVED_LOG";

/// Runs the command line.
pub fn main() -> ExitCode {
    let result = Cli::try_parse().map_or_else(explain, |cli| match cli.command {
        None => run(cli.run),
        Some(Command::Nat(args)) => nat(args),
        Some(Command::Genpsk) => genpsk(),
        Some(Command::Status { json }) => show_status(json),
        Some(Command::Cleanup) => cleanup(),
        Some(Command::Demo) => demo(),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure { code, message }) => {
            eprintln!("ipmoved: {message}");
            ExitCode::from(code)
        }
    }
}

/// What a person is told, and what a script is.
struct Failure {
    code: u8,
    message: String,
}

impl Failure {
    fn new(code: u8, message: impl ToString) -> Self {
        Self {
            code,
            message: message.to_string(),
        }
    }
}

/// Help goes to standard output; a mistake becomes one line, like every other refusal.
fn explain(error: clap::Error) -> Result<(), Failure> {
    if matches!(
        error.kind(),
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
    ) {
        return print(&error.to_string());
    }
    let text = error.to_string();
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:"))
        .filter(|line| !line.is_empty() && !line.starts_with("For more information"))
        .collect();
    let line = lines.join("; ").replace(":; ", ": ");
    let line = line.strip_prefix("error: ").unwrap_or(&line);
    Err(Failure::new(
        BAD_INPUT,
        format!("{line}; see `ipmoved --help`"),
    ))
}

fn run(args: RunArgs) -> Result<(), Failure> {
    let config = Config::new(args).map_err(|error| Failure::new(BAD_INPUT, error))?;
    start_log(config.log_format);
    confine::forget_command_line();
    daemon::run(config, &config::runtime_dir()).map_err(ended)
}

fn nat(args: NatArgs) -> Result<(), Failure> {
    let settings = NatSettings::new(args).map_err(|error| Failure::new(BAD_INPUT, error))?;
    start_log(settings.log_format);
    daemon::run_nat(settings, &config::runtime_dir()).map_err(ended)
}

fn ended(error: DaemonError) -> Failure {
    Failure {
        code: match &error {
            DaemonError::Input(_) => BAD_INPUT,
            DaemonError::System(_) => SYSTEM,
            DaemonError::Running(_) => OTHER_DAEMON,
            DaemonError::Failed(_) => FAILED,
        },
        message: error.to_string(),
    }
}

fn start_log(format: LogFormat) {
    let filter = EnvFilter::try_from_env(LOG_VARIABLE).unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_writer(io::stderr);
    match format {
        LogFormat::Text => log.with_ansi(io::stderr().is_terminal()).init(),
        LogFormat::Json => log.json().flatten_event(true).init(),
    }
}

fn genpsk() -> Result<(), Failure> {
    let psk = Psk::generate(&entropy::system()).map_err(|error| Failure::new(FAILED, error))?;
    print(&format!("{}\n", *psk.to_base64()))
}

fn show_status(json: bool) -> Result<(), Failure> {
    let namespace = journal::namespace_dir(&config::runtime_dir())
        .map_err(|error| Failure::new(SYSTEM, error))?;
    let status = status_socket::ask(&namespace.join(STATUS_SOCKET)).map_err(|error| {
        let code = match &error {
            StatusError::NotRunning(_) => OTHER_DAEMON,
            StatusError::Permission(_) => SYSTEM,
            StatusError::Answer(_) => FAILED,
        };
        Failure::new(code, error)
    })?;
    if json {
        let text = serde_json::to_string_pretty(&status);
        print(&format!(
            "{}\n",
            text.map_err(|error| Failure::new(FAILED, error))?
        ))
    } else {
        print(&status.to_text())
    }
}

fn cleanup() -> Result<(), Failure> {
    let report = Host::cleanup(&config::runtime_dir()).map_err(|error| {
        let code = match &error {
            HostError::Journal(JournalError::Locked { .. }) => OTHER_DAEMON,
            HostError::Journal(_) | HostError::Netlink(_) | HostError::Refused { .. } => SYSTEM,
        };
        Failure::new(code, error)
    })?;
    if report.undone.is_empty() && report.left.is_empty() {
        return print("nothing was left to clean up\n");
    }
    for change in report.undone {
        print(&format!("undone: {change}\n"))?;
    }
    match report.left.first() {
        None => Ok(()),
        Some(failure) => Err(Failure::new(
            FAILED,
            format!("still there: {}: {}", failure.change, failure.reason),
        )),
    }
}

fn demo() -> Result<(), Failure> {
    let exe = std::env::current_exe().map_err(|error| Failure::new(FAILED, error))?;
    crate::lab::demo(&exe).map_err(|error| {
        let privileges = matches!(error, DemoError::Lab(LabError::Privileges));
        Failure::new(if privileges { SYSTEM } else { FAILED }, error)
    })
}

/// Writes to standard output; a reader that has gone away (`| head`) is no error.
fn print(text: &str) -> Result<(), Failure> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Failure::new(FAILED, error)),
        _ => Ok(()),
    }
}
