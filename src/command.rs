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

mod check;
mod cutover;
mod dry_run;
mod flows;
mod generate;
mod here;
mod orders;
mod show;
mod stragglers;
mod top;
mod watch;

use std::error::Error as _;
use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::error::{ContextKind, ErrorKind};
use clap::{CommandFactory, Parser};

use crate::channel::session::Psk;
use crate::daemon::{self, DaemonError, HandoverError, confine, log};
use crate::io::entropy;
use crate::kernel::netfilter::Ruleset;
use crate::kernel::{Cleanup, Host, HostError, RuntimeDirError, namespace_dir};
use crate::lab::{DemoError, LabError};
use crate::model::status::Status;
use crate::settings::args::{Cli, Command, NatArgs, RunArgs};
use crate::settings::config::{self, Config, NatSettings};

/// Failed while running.
const FAILED: u8 = 1;
/// Bad input; clap uses the same.
const BAD_INPUT: u8 = 2;
/// The system cannot do it.
const SYSTEM: u8 = 3;
/// A daemon runs already, or none does.
const OTHER_DAEMON: u8 = 4;

/// How long the last words may take, where nobody reads them.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Runs the command line.
pub fn main() -> ExitCode {
    // The words are looked at again only after a mistake: a key may be among them.
    let refused = |error| explain(&error, &std::env::args_os().collect::<Vec<_>>());
    let result = Cli::try_parse().map_or_else(refused, |cli| match cli.command {
        None if cli.dry_run.dry_run => dry_run::of_tunnel(cli.run, cli.dry_run.json),
        None => run(cli.run),
        Some(Command::Nat(args)) if args.dry_run.dry_run => dry_run::of_nat(args),
        Some(Command::Nat(args)) if args.check => check::of_nat(args),
        Some(Command::Nat(args)) => nat(args),
        Some(Command::Genpsk) => genpsk(),
        Some(Command::Check(args)) => check::run(args),
        Some(Command::Status(args)) => show::run(args),
        Some(Command::Flows(args)) => flows::run(args),
        Some(Command::Top(args)) => top::run(args),
        Some(Command::Move(args)) => orders::move_away(args),
        Some(Command::Hold(args)) => orders::hold(args),
        Some(Command::Back(args)) => orders::back(args),
        Some(Command::Cutover(args)) => cutover::run(args),
        Some(Command::Reload { json }) => orders::reload(json),
        Some(Command::Stragglers(args)) => stragglers::show(args),
        Some(Command::Verdict(args)) => stragglers::judge(args),
        Some(Command::Report(args)) => stragglers::report(args),
        Some(Command::Cleanup) => cleanup(),
        Some(Command::Handover) => hand_over(),
        Some(Command::Demo) => demo(),
        Some(Command::Generate { what, dir }) => generate::run(what, &dir),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure { code, message }) => {
            if !message.is_empty() {
                say(message);
            }
            ExitCode::from(code)
        }
    }
}

/// Says why the command failed. If nobody reads it, the process ends all the same: somebody may be
/// waiting to start it again.
fn say(message: String) {
    let (said, wait) = std::sync::mpsc::channel();
    let speaker = std::thread::Builder::new().spawn(move || {
        eprintln!("ipmoved: {message}");
        let _ = said.send(());
    });
    if speaker.is_ok() {
        let _ = wait.recv_timeout(LAST_WORDS);
    }
}

/// Says something that an administrator should know though it worked.
fn warn(text: &str) {
    eprintln!("ipmoved: {text}");
}

/// What a person reads, and the exit code for a script.
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
fn explain(error: &clap::Error, words: &[OsString]) -> Result<(), Failure> {
    if matches!(
        error.kind(),
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
    ) {
        return print(&error.to_string());
    }
    Err(refuse(mistake(error, &help_for(words))))
}

/// Where the flags of the command in `words` are listed.
fn help_for(words: &[OsString]) -> String {
    let name = words.get(1).and_then(|word| word.to_str());
    match name.filter(|name| Cli::command().find_subcommand(name).is_some()) {
        Some(name) => format!("see `ipmoved {name} --help`"),
        None => "see `ipmoved --help`".into(),
    }
}

/// Says what is wrong with the command line. Only a value's own type may repeat the value, so that
/// a key is never printed.
fn mistake(error: &clap::Error, help: &str) -> String {
    let said = |kind| error.get(kind).map(ToString::to_string);
    let arg = said(ContextKind::InvalidArg).unwrap_or_default();
    // What clap shows is the flag with its placeholder: `--listen <[ADDR:]PORT>`.
    let flag = arg.split(' ').next().unwrap_or_default();
    let value = said(ContextKind::InvalidValue).unwrap_or_default();
    let instead =
        |kind| said(kind).map_or_else(|| help.into(), |it| format!("did you mean `{it}`?"));
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "kinds that no flag of ours leads to are told in clap's own words"
    )]
    match error.kind() {
        ErrorKind::ValueValidation => {
            let problem = error
                .source()
                .map_or_else(|| help.into(), ToString::to_string);
            format!("{flag}: {problem}")
        }
        ErrorKind::InvalidValue if value.is_empty() => format!("{flag} needs a value: {arg}"),
        ErrorKind::InvalidValue => {
            let valid = said(ContextKind::ValidValue).unwrap_or_default();
            format!("{flag}: `{value}` is none of {valid}")
        }
        ErrorKind::UnknownArgument => {
            let instead = instead(ContextKind::SuggestedArg);
            format!("`{flag}` is not a flag of this command; {instead}")
        }
        ErrorKind::InvalidSubcommand => {
            let name = said(ContextKind::InvalidSubcommand).unwrap_or_default();
            let instead = instead(ContextKind::SuggestedSubcommand);
            format!("`{name}` is not a command; {instead}")
        }
        ErrorKind::ArgumentConflict => {
            let prior = said(ContextKind::PriorArg).unwrap_or_default();
            match said(ContextKind::InvalidSubcommand) {
                Some(name) => format!("`{name}` follows flags; a command comes first; {help}"),
                None if prior == arg => format!("{flag} can be given only once"),
                None => format!("{arg} and {prior} cannot both be given; choose one"),
            }
        }
        ErrorKind::MissingRequiredArgument => format!("missing: {arg}; {help}"),
        other => format!("{other} {arg}; {help}"),
    }
}

/// Bad input, in one line whatever was typed.
fn refuse(mistake: impl ToString) -> Failure {
    let mut line = String::new();
    for c in mistake.to_string().chars() {
        match c {
            c if c.is_control() => line.extend(c.escape_default()),
            c => line.push(c),
        }
    }
    Failure::new(BAD_INPUT, line)
}

fn run(args: RunArgs) -> Result<(), Failure> {
    let takeover = args.takeover;
    let config = Config::new(args).map_err(refuse)?;
    log::start(config.log_format);
    confine::forget_command_line();
    daemon::run(config, &config::runtime_dir(), takeover).map_err(ended)
}

fn hand_over() -> Result<(), Failure> {
    let dir = namespace_dir(&config::runtime_dir());
    let dir = dir.map_err(|error| Failure::new(SYSTEM, error))?;
    daemon::store(&dir).map_err(|error| {
        let code = match &error {
            HandoverError::None(_) => OTHER_DAEMON,
            HandoverError::Refused(_) | HandoverError::Broken(_) => FAILED,
        };
        Failure::new(code, error)
    })
}

fn nat(args: NatArgs) -> Result<(), Failure> {
    let settings = NatSettings::new(args).map_err(refuse)?;
    log::start(settings.log_format);
    daemon::run_nat(settings, &config::runtime_dir()).map_err(ended)
}

fn ended(error: DaemonError) -> Failure {
    Failure {
        code: match &error {
            DaemonError::Input(_) => BAD_INPUT,
            DaemonError::System(_) => SYSTEM,
            DaemonError::Running(_) => OTHER_DAEMON,
            DaemonError::Failed(_) | DaemonError::Crashed(_) | DaemonError::NotTakenOver(_) => {
                FAILED
            }
        },
        message: error.to_string(),
    }
}

fn genpsk() -> Result<(), Failure> {
    let psk = Psk::generate(&entropy::system()).map_err(|error| Failure::new(FAILED, error))?;
    print(&format!("{}\n", *psk.to_base64()))
}

fn print_json(value: &impl serde::Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value);
    print(&format!(
        "{}\n",
        text.map_err(|error| Failure::new(FAILED, error))?
    ))
}

/// Where the daemon says that a firewall likely drops packets, names the chains that drop any. The
/// daemon itself has no access to the firewall, so that nobody has who takes it over.
fn name_firewalls(status: &mut Status) {
    /// More than a person looks at.
    const SHOWN: usize = 4;
    let served = status
        .tunnels
        .iter_mut()
        .flat_map(|tunnel| &mut tunnel.served);
    let causes = served.flat_map(|served| &mut served.causes);
    let mut firewalls = causes.filter(|cause| cause.cause == "firewall").peekable();
    if firewalls.peek().is_none() {
        return;
    }
    let rules = Ruleset::read();
    let (chains, is_legacy) = (rules.drop_chains(), rules.has_legacy());
    let chains: Vec<String> = chains.iter().map(ToString::to_string).collect();
    if chains.is_empty() {
        return;
    }
    let shown = chains
        .iter()
        .take(SHOWN)
        .cloned()
        .collect::<Vec<_>>()
        .join(", ");
    for cause in firewalls {
        cause.text = format!("{}: {shown}", cause.text);
        if is_legacy {
            cause
                .remedy
                .push_str(", and at `iptables-legacy-save -c` and `ip6tables-legacy-save -c`");
        }
    }
}

fn cleanup() -> Result<(), Failure> {
    let Cleanup { report, unread } = Host::cleanup(&config::runtime_dir()).map_err(|error| {
        let code = match &error {
            HostError::RuntimeDir(RuntimeDirError::Locked { .. }) => OTHER_DAEMON,
            HostError::RuntimeDir(_)
            | HostError::Journal(_)
            | HostError::Netlink(_)
            | HostError::Refused { .. } => SYSTEM,
        };
        Failure::new(code, error)
    })?;
    let is_nothing = report.undone.is_empty() && report.left.is_empty();
    if is_nothing && unread.notes.is_empty() {
        return print("nothing was left to clean up\n");
    }
    for change in report.undone {
        print(&format!("undone: {change}\n"))?;
    }
    for note in &unread.notes {
        eprintln!("ipmoved: {note}");
    }
    match report.left.first() {
        None if unread.is_incomplete => Err(Failure::new(
            FAILED,
            "not everything that an earlier ipmoved left could be undone, as said above",
        )),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(line: &str) -> Failure {
        let words = ["ipmoved"].into_iter().chain(line.split(' '));
        let words: Vec<OsString> = words.map(OsString::from).collect();
        explain(&Cli::try_parse_from(&words).unwrap_err(), &words).unwrap_err()
    }

    #[test]
    fn a_mistake_of_the_command_line_is_one_line() {
        let mut wrong = Vec::new();
        for (line, says) in [
            (
                "--move 192.0.2",
                "--move: `192.0.2` is not an IP address or prefix; write 192.0.2.5",
            ),
            (
                "--move www",
                "--move: `www` is a name; give the moved address itself, as in 192.0.2.5",
            ),
            (
                "--log-format xml",
                "--log-format: `xml` is none of text, json",
            ),
            (
                "--log-format ",
                "--log-format needs a value: --log-format <FORMAT>",
            ),
            (
                "--move",
                "--move needs a value: --move <ADDR[/LEN][:PORTS][/tcp|/udp]>",
            ),
            ("--psk-file ", "--psk-file needs a value: --psk-file <FILE>"),
            (
                "--per 192.0.2.1",
                "`--per` is not a flag of this command; did you mean `--peer`?",
            ),
            (
                "--colour",
                "`--colour` is not a flag of this command; see `ipmoved --help`",
            ),
            (
                "nat --peer a",
                "`--peer` is not a flag of this command; see `ipmoved nat --help`",
            ),
            (
                "frobnicate",
                "`frobnicate` is not a command; see `ipmoved --help`",
            ),
            ("stats", "`stats` is not a command; did you mean `status`?"),
            (
                "--tun a status",
                "`status` follows flags; a command comes first; see `ipmoved --help`",
            ),
            ("--tun a --tun b", "--tun can be given only once"),
            (
                "--psk AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA= --psk-file b",
                "--psk <BASE64> and --psk-file <FILE> cannot both be given; choose one",
            ),
            (
                "nat --move 192.0.2.5",
                "missing: --to <ADDR[:PORT]>; see `ipmoved nat --help`",
            ),
            ("--no-split=yes", "unexpected value"),
            (
                "--move a\nb\u{1b}[2J",
                "--move: `a\\nb\\u{1b}[2J` is a name",
            ),
        ] {
            let Failure { code, message } = refused(line);
            assert_eq!(code, BAD_INPUT, "{line}");
            assert_eq!(message.lines().count(), 1, "{message}");
            if !message.starts_with(says) {
                wrong.push(format!("{line}\n    {message}\n    {says}"));
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }
}
