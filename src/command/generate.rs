//! `ipmoved generate`: what packages carry beside the binary, made from the flags' own definition.
//!
//! ```text
//!   man           ipmoved.1, a page for each command, and ipmoved.toml.5
//!   completions   for bash, zsh and fish
//!   config        ipmoved.toml with every key, none of them set
//! ```

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::path::Path;

use clap::{Arg, ArgAction, Args, Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, italic, roman};

use super::{FAILED, Failure};
use crate::model::runtime::{BASE_DIR, STATE_DIR};
use crate::settings::args::{Cli, DaemonArgs, Generated, PeerArgs};
use crate::settings::config::{RUNTIME_DIR_VARIABLE, STATE_DIR_VARIABLE};

/// The name of the binary, and of all that belongs to it.
const NAME: &str = "ipmoved";

/// What the manual calls itself.
const MANUAL: &str = "ipmoved";

/// Where packages put the settings.
const CONFIG: &str = "/etc/ipmoved/ipmoved.toml";

/// Longest line of the settings' file, in characters.
const WIDTH: usize = 96;

/// The key itself is better kept in a file of its own.
const NOT_IN_FILE: &str = "psk";

/// Writes these files into a directory, which is made if necessary.
pub(super) fn run(what: Generated, dir: &Path) -> Result<(), Failure> {
    let write = || -> io::Result<()> {
        fs::create_dir_all(dir)?;
        match what {
            Generated::Man => write_pages(dir),
            Generated::Completions => {
                for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
                    clap_complete::generate_to(shell, &mut cli(), NAME, dir)?;
                }
                Ok(())
            }
            Generated::Config => fs::write(dir.join("ipmoved.toml"), config()),
        }
    };
    write().map_err(|error| {
        Failure::new(
            FAILED,
            format!("cannot write to {}: {error}", dir.display()),
        )
    })
}

/// The command line, without clap's own `help`.
fn cli() -> Command {
    Cli::command().disable_help_subcommand(true)
}

fn write_pages(dir: &Path) -> io::Result<()> {
    let mut cli = cli();
    cli.build();
    let mut pages = vec![format!("{NAME}.toml(5)")];
    for command in cli.get_subcommands().filter(|it| !it.is_hide_set()) {
        let name = command.get_display_name().unwrap_or(command.get_name());
        pages.push(format!("{name}(1)"));
        let man = Man::new(command.clone()).manual(MANUAL);
        let mut page = Vec::new();
        man.render(&mut page)?;
        see_also(&format!("{NAME}(1)")).to_writer(&mut page)?;
        fs::write(dir.join(man.get_filename()), page)?;
    }
    fs::write(dir.join(format!("{NAME}.1")), main_page(&cli, &pages)?)?;
    fs::write(dir.join(format!("{NAME}.toml.5")), page_of_settings()?)
}

/// The page of the daemon, which names all others.
fn main_page(cli: &Command, pages: &[String]) -> io::Result<Vec<u8>> {
    let mut page = Vec::new();
    let man = Man::new(cli.clone()).manual(MANUAL);
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    man.render_subcommands_section(&mut page)?;
    let mut roff = Roff::new();
    let after = cli.get_after_help().map(ToString::to_string);
    for block in after.unwrap_or_default().split("\n\n") {
        let (title, lines) = block.split_once('\n').unwrap_or((block, ""));
        roff.control("SH", [title.trim_end_matches(':').to_uppercase().as_str()]);
        roff.control("nf", []);
        for line in lines.lines() {
            roff.text([roman(line)]);
        }
        roff.control("fi", []);
    }
    for (title, entries) in [
        (
            "ENVIRONMENT",
            &[
                ("IPMOVED_PSK", "The key, where no flag names one."),
                (
                    STATE_DIR_VARIABLE,
                    "The directory for what the daemon remembers, where no flag names one.",
                ),
                (
                    RUNTIME_DIR_VARIABLE,
                    "The directory for sockets and the journal of kernel changes.",
                ),
                (
                    "IPMOVED_LOG",
                    "What is logged, as in \"debug\" or \"warn,ipmoved=debug\".",
                ),
            ][..],
        ),
        (
            "FILES",
            &[
                (
                    CONFIG,
                    "The settings that the service reads: ipmoved.toml(5).",
                ),
                (
                    BASE_DIR,
                    "Sockets, and the journal by which a killed daemon's changes are undone.",
                ),
                (STATE_DIR, "Modes, and who still comes (stragglers.sqlite)."),
            ],
        ),
    ] {
        roff.control("SH", [title]);
        for (name, about) in entries {
            roff.control("TP", []);
            roff.text([bold(*name)]);
            roff.text([roman(*about)]);
        }
    }
    roff.to_writer(&mut page)?;
    see_also(&pages.join(", ")).to_writer(&mut page)?;
    Ok(page)
}

fn see_also(pages: &str) -> Roff {
    let mut roff = Roff::new();
    roff.control("SH", ["SEE ALSO"]);
    roff.text([roman(pages)]);
    roff
}

/// The page of the settings' file.
fn page_of_settings() -> io::Result<Vec<u8>> {
    let mut roff = Roff::new();
    let source = format!("{NAME} {}", env!("CARGO_PKG_VERSION"));
    roff.control("TH", ["ipmoved.toml", "5", "", &source, MANUAL]);
    roff.control("SH", ["NAME"]);
    roff.text([roman("ipmoved.toml - settings of ipmoved")]);
    roff.control("SH", ["DESCRIPTION"]);
    roff.text([roman(
        "A TOML file for --config. Its keys are the flags of ipmoved(1) without the dashes; a flag \
         that can be repeated takes a list. A flag wins over the file. An unknown key, or a value \
         that is wrong, is refused with its line and column.",
    )]);
    roff.control("PP", []);
    roff.text([roman(
        "Each of several peers has a table [[peers]] with the keys of one peer, below all others.",
    )]);
    for (title, keys) in [
        ("KEYS OF THE DAEMON", keys::<DaemonArgs>()),
        ("KEYS OF ONE PEER", keys::<PeerArgs>()),
    ] {
        roff.control("SH", [title]);
        for key in keys {
            roff.control("TP", []);
            let value = match value_name(&key) {
                Some(name) => vec![roman(" = "), italic(name)],
                None => vec![roman(" = true")],
            };
            roff.text([vec![bold(name(&key))], value].concat());
            roff.text([roman(explained(&key))]);
        }
    }
    roff.control("SH", ["EXAMPLE"]);
    roff.control("nf", []);
    for line in EXAMPLES.lines() {
        roff.text([roman(line)]);
    }
    roff.control("fi", []);
    let mut page = Vec::new();
    roff.to_writer(&mut page)?;
    see_also(&format!("{NAME}(1)")).to_writer(&mut page)?;
    page.flush()?;
    Ok(page)
}

/// The settings of the two servers, as the README has them.
const EXAMPLES: &str = "\
On the old server:

peer = \"198.51.100.2\"
psk-file = \"/etc/ipmoved/psk\"
move = [\"192.0.2.5\"]

On the new server:

peer = \"192.0.2.1\"
psk-file = \"/etc/ipmoved/psk\"
accept = [\"192.0.2.5\"]";

/// The keys that `T` fills, but for those that the help does not show.
fn keys<T: Args>() -> Vec<Arg> {
    let command = T::augment_args(Command::new(NAME));
    let shown = command.get_arguments().filter(|arg| !arg.is_hide_set());
    shown
        .filter(|arg| arg.get_long().is_some())
        .cloned()
        .collect()
}

fn name(key: &Arg) -> String {
    key.get_long().unwrap_or_default().to_owned()
}

/// What stands for the value of a key; `None` if the flag takes none.
fn value_name(key: &Arg) -> Option<String> {
    let is_switch = matches!(key.get_action(), ArgAction::SetTrue);
    let names = key.get_value_names().unwrap_or_default();
    (!is_switch).then(|| names.join(" "))
}

/// The help of a key, on one line.
fn help(key: &Arg) -> String {
    let help = key.get_long_help().or_else(|| key.get_help());
    let text = help.map(ToString::to_string).unwrap_or_default();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The help of a key, and how a file says what the flag says without a value.
fn explained(key: &Arg) -> String {
    let help = help(key);
    let may_be_bare = key.get_num_args().is_some_and(|it| it.min_values() == 0);
    match value_name(key).filter(|_| may_be_bare) {
        Some(_) => format!(
            "{help}. In this file `{} = true` is that without a value",
            name(key)
        ),
        None => help,
    }
}

/// A value as the help gives one: an example, else the default, else what stands for it.
fn value(key: &Arg) -> String {
    let Some(stands) = value_name(key) else {
        return "true".to_owned();
    };
    let help = help(key);
    let example = help.split_once("Examples: ").and_then(|(_, examples)| {
        let mut words = examples.split_whitespace();
        words.find(|word| !word.starts_with("--"))
    });
    if let Some(example) = example {
        return format!("[\"{example}\"]");
    }
    let default = help.split_once("[default: ").and_then(|(_, rest)| {
        let (default, _) = rest.split_once(']')?;
        (!default.contains(' ')).then_some(default)
    });
    match default {
        Some(number) if number.bytes().all(|c| c.is_ascii_digit()) => number.to_owned(),
        Some(default) => format!("\"{default}\""),
        None => format!("\"{stands}\""),
    }
}

/// The settings' file with every key, none of them set.
fn config() -> String {
    let mut text = String::new();
    let mut say = |line: &str| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{line}");
    };
    say("# Settings of ipmoved: `man ipmoved.toml`. Nothing is set here yet.");
    say("#");
    say("# Make a key once and put the same file on both servers, for root alone:");
    say("#   (umask 077; ipmoved genpsk > /etc/ipmoved/psk)");
    say("# When the settings are right: systemctl enable --now ipmoved");
    say("#");
    for line in EXAMPLES.lines() {
        say(format!("# {line}").trim_end());
    }
    for (title, keys) in [
        ("The peer", keys::<PeerArgs>()),
        ("The daemon", keys::<DaemonArgs>()),
    ] {
        say("");
        say(&format!("### {title}"));
        for key in keys.iter().filter(|key| name(key) != NOT_IN_FILE) {
            say("");
            for line in wrapped(&explained(key), WIDTH - 2) {
                say(&format!("# {line}"));
            }
            say(&format!("#{} = {}", name(key), value(key)));
        }
    }
    text
}

/// Text in lines of at most so many characters, as far as its words allow.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::file::File;

    /// A directory that goes with the test.
    struct Dir(std::path::PathBuf);

    impl Dir {
        fn of(what: Generated, name: &str) -> Self {
            let name = format!("ipmoved-generate-{name}-{}", std::process::id());
            let dir = Self(std::env::temp_dir().join(name));
            let done = run(what, &dir.0);
            assert!(done.is_ok_and(|()| dir.0.exists()));
            dir
        }

        fn text(&self, file: &str) -> String {
            fs::read_to_string(self.0.join(file)).unwrap()
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    /// The flags of a command that its help shows.
    fn shown(command: &Command) -> impl Iterator<Item = &str> {
        let shown = command.get_arguments().filter(|arg| !arg.is_hide_set());
        shown.filter_map(Arg::get_long)
    }

    #[test]
    fn every_command_has_its_page_and_every_flag_is_in_it() {
        let dir = Dir::of(Generated::Man, "man");
        let mut cli = cli();
        cli.build();
        let flag = |long: &str| format!("\\-\\-{}", long.replace('-', "\\-"));
        let main = dir.text("ipmoved.1");
        for section in [
            "NAME",
            "SYNOPSIS",
            "OPTIONS",
            "EXIT CODES",
            "FILES",
            "SEE ALSO",
        ] {
            let heading = [format!(".SH {section}"), format!(".SH \"{section}\"")];
            assert!(heading.iter().any(|it| main.contains(it)), "{section}");
        }
        for long in shown(&cli) {
            assert!(main.contains(&flag(long)), "{long}");
        }
        for command in cli.get_subcommands() {
            let file = format!("ipmoved-{}.1", command.get_name());
            assert_eq!(dir.0.join(&file).exists(), !command.is_hide_set(), "{file}");
            if command.is_hide_set() {
                continue;
            }
            let page = dir.text(&file);
            for long in shown(command) {
                assert!(page.contains(&flag(long)), "{file}: {long}");
            }
            let name = command.get_name().replace('-', "\\-");
            assert!(main.contains(&format!("ipmoved\\-{name}(1)")), "{file}");
        }
        let settings = dir.text("ipmoved.toml.5");
        for key in [keys::<DaemonArgs>(), keys::<PeerArgs>()].concat() {
            let name = name(&key).replace('-', "\\-");
            assert!(settings.contains(&format!("\\fB{name}\\fR")), "{name}");
        }
    }

    #[test]
    fn every_shell_completes_every_command_and_flag() {
        let dir = Dir::of(Generated::Completions, "completions");
        let mut cli = cli();
        cli.build();
        for file in ["ipmoved.bash", "_ipmoved", "ipmoved.fish"] {
            let text = dir.text(file);
            for command in cli.get_subcommands().filter(|it| !it.is_hide_set()) {
                assert!(text.contains(command.get_name()), "{file}");
            }
            for long in shown(&cli) {
                assert!(text.contains(long), "{file}: {long}");
            }
        }
    }

    #[test]
    fn the_settings_file_has_every_key_and_sets_none() {
        let dir = Dir::of(Generated::Config, "config");
        let text = dir.text("ipmoved.toml");
        assert!(
            text.lines()
                .all(|line| line.is_empty() || line.starts_with('#'))
        );
        assert!(File::parse(&text).is_ok());
        for key in [keys::<DaemonArgs>(), keys::<PeerArgs>()].concat() {
            let line = format!("\n#{} = ", name(&key));
            assert_eq!(text.contains(&line), name(&key) != NOT_IN_FILE, "{line}");
        }
        let words = text.replace("\n# ", " ");
        for bare in ["outgoing = true", "allow-outgoing = true"] {
            assert!(words.contains(&format!("In this file `{bare}`")), "{bare}");
            assert!(File::parse(bare).is_ok(), "{bare}");
        }
        let lines = text.lines().filter_map(|line| line.strip_prefix('#'));
        for line in lines.filter(|line| !line.starts_with([' ', '#']) && line.contains('=')) {
            // What only stands for a value is in capitals.
            let is_given = !line.contains(|c: char| c.is_ascii_uppercase());
            let parsed = File::parse(line);
            assert!(parsed.is_ok() || !is_given, "{line}: {parsed:?}");
        }
    }
}
