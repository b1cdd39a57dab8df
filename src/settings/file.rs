//! The configuration file: the flags' names without the dashes, and `[[peers]]` for several.
//!
//! Fills the same two structs as the command line. Every mistake is reported with line and column.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use clap::{Arg, Args, Command};
use serde::Deserialize;
use toml::Spanned;
use toml::de::{DeTable, DeValue, Deserializer};

use crate::settings::args::{DaemonArgs, PeerArgs};
use crate::settings::config::{ConfigError, wants_root};
use crate::settings::files::Files;
use crate::settings::psk::exposed;

/// The key that several peers are written under, each as a table of its own.
const PEERS: &str = "peers";

/// The key that is easily taken for it.
const PEER: &str = "peer";

/// How similar to a known key an unknown one has to be to be taken for a typo: clap's number.
const LIKE: f64 = 0.7;

/// The contents of the file.
#[derive(Debug, Default)]
pub(crate) struct File {
    /// Where it lies; empty if there is none.
    pub(crate) path: PathBuf,
    /// The daemon's settings.
    pub(crate) daemon: DaemonArgs,
    /// The one peer whose settings stand at the top.
    pub(crate) peer: PeerArgs,
    /// The peers that have a table each.
    pub(crate) peers: Vec<PeerTable>,
    /// Where the keys at the top stand.
    pub(crate) places: Places,
}

/// One `[[peers]]`.
#[derive(Debug)]
pub(crate) struct PeerTable {
    /// The line it begins on.
    pub(crate) line: usize,
    /// Its settings.
    pub(crate) peer: PeerArgs,
    /// Where its keys stand.
    pub(crate) places: Places,
}

/// A line and a column, from 1.
pub(crate) type Place = (usize, usize);

/// Where the keys of a table stand, for what can only be judged once all is read.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Places(BTreeMap<String, KeyPlaces>);

/// Where a key stands, and each of its values.
#[derive(Clone, PartialEq, Eq, Debug)]
struct KeyPlaces {
    key: Place,
    values: Vec<Place>,
}

impl Places {
    fn of(text: &str, table: &DeTable<'_>) -> Self {
        let each = table.iter().map(|(key, value)| {
            let at = |span: Range<usize>| position(text, span.start);
            let values = match value.get_ref() {
                DeValue::Array(list) => list.iter().map(|value| at(value.span())).collect(),
                DeValue::String(_)
                | DeValue::Integer(_)
                | DeValue::Float(_)
                | DeValue::Boolean(_)
                | DeValue::Datetime(_)
                | DeValue::Table(_) => vec![at(value.span())],
            };
            let key_places = KeyPlaces {
                key: at(key.span()),
                values,
            };
            (key.get_ref().to_string(), key_places)
        });
        Self(each.collect())
    }

    /// Where this key stands, if it is there.
    pub(crate) fn key(&self, name: &str) -> Option<Place> {
        Some(self.0.get(name)?.key)
    }

    /// Where the value of a key stands that has this number among them, or else the key.
    pub(crate) fn value(&self, name: &str, number: usize) -> Option<Place> {
        let places = self.0.get(name)?;
        Some(places.values.get(number).copied().unwrap_or(places.key))
    }
}

/// What is wrong with the file, and where.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mistake {
    /// Line and column, from 1; `None` if it has no single place.
    pub at: Option<(usize, usize)>,
    /// What is wrong there, on one line.
    pub message: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((line, column)) = self.at {
            write!(f, "line {line}, column {column}: ")?;
        }
        f.write_str(&self.message)
    }
}

impl File {
    /// Reads the file. If it holds a key that others can read, `warnings` says so.
    pub(crate) fn read(
        path: &Path,
        files: &Files,
        warnings: &mut Vec<String>,
    ) -> Result<Self, ConfigError> {
        let (text, open) = files.read(path).map_err(|error| ConfigError::File {
            hint: if wants_root(&error) {
                " (--config); try sudo"
            } else {
                " (--config)"
            },
            path: path.into(),
            error,
        })?;
        let file = Self::parse(&text).map_err(|mistake| ConfigError::Toml {
            path: path.into(),
            mistake,
        })?;
        if open && file.holds_a_key() {
            warnings.push(exposed(path));
        }
        Ok(Self {
            path: path.into(),
            ..file
        })
    }

    /// Reads the text of a file.
    pub(crate) fn parse(text: &str) -> Result<Self, Mistake> {
        let locate = |slip: Slip| Mistake {
            at: slip.at.map(|offset| position(text, offset)),
            message: slip.message.replace('\n', " "),
        };
        let document = DeTable::parse(text).map_err(|error| locate(Slip::from(error)))?;
        let (whole, tables) = take_peers(document).map_err(locate)?;
        let (about_daemon, about_peer) = (names::<DaemonArgs>(), names::<PeerArgs>());
        let known = [about_daemon.clone(), about_peer.clone(), vec![PEERS.into()]].concat();
        check_keys(&whole, &known, &[]).map_err(locate)?;
        let mut peers = Vec::new();
        for table in tables {
            check_keys(&table, &about_peer, &about_daemon).map_err(locate)?;
            peers.push(PeerTable {
                line: position(text, table.span().start).0,
                places: Places::of(text, table.get_ref()),
                peer: fill(table).map_err(locate)?,
            });
        }
        let places = Places::of(text, whole.get_ref());
        Ok(Self {
            daemon: fill(whole.clone()).map_err(locate)?,
            peer: fill(whole).map_err(locate)?,
            peers,
            places,
            path: PathBuf::new(),
        })
    }

    fn holds_a_key(&self) -> bool {
        let tables = self.peers.iter().map(|table| &table.peer);
        tables.chain([&self.peer]).any(|peer| peer.psk.is_some())
    }
}

/// A mistake, with its offset in the text.
struct Slip {
    at: Option<usize>,
    message: String,
}

impl From<toml::de::Error> for Slip {
    fn from(error: toml::de::Error) -> Self {
        Self {
            at: error.span().map(|span| span.start),
            message: error.message().into(),
        }
    }
}

/// Separates the tables of peers from the rest.
fn take_peers<'i>(
    mut document: Spanned<DeTable<'i>>,
) -> Result<(Spanned<DeTable<'i>>, Vec<Spanned<DeTable<'i>>>), Slip> {
    let Some(peers) = document.get_mut().remove(PEERS) else {
        if let Some((key, _)) = (document.get_ref().iter())
            .find(|(key, value)| key.get_ref() == PEER && holds_tables(value.get_ref()))
        {
            return Err(Slip {
                at: Some(key.span().start),
                message: format!("`{PEER}` is no table; did you mean [[{PEERS}]]?"),
            });
        }
        return Ok((document, Vec::new()));
    };
    let wrong = |span: Range<usize>| Slip {
        at: Some(span.start),
        message: format!(
            "`{PEERS}` has to be tables: write [[{PEERS}]] above the settings of each"
        ),
    };
    let whole = peers.span();
    let DeValue::Array(list) = peers.into_inner() else {
        return Err(wrong(whole));
    };
    let mut tables = Vec::new();
    for entry in list {
        let span = entry.span();
        let DeValue::Table(table) = entry.into_inner() else {
            return Err(wrong(span));
        };
        tables.push(Spanned::new(span, table));
    }
    Ok((document, tables))
}

/// Whether a value is a table, or several.
fn holds_tables(value: &DeValue<'_>) -> bool {
    match value {
        DeValue::Table(table) => table.iter().next().is_some(),
        DeValue::Array(list) => {
            let mut list = list.iter();
            list.any(|value| matches!(value.get_ref(), DeValue::Table(_)))
        }
        DeValue::String(_)
        | DeValue::Integer(_)
        | DeValue::Float(_)
        | DeValue::Boolean(_)
        | DeValue::Datetime(_) => false,
    }
}

/// The keys that fill `T`: the long names of its flags.
fn names<T: Args>() -> Vec<String> {
    let command = T::augment_args(Command::new("ipmoved"));
    let names = command.get_arguments().filter_map(Arg::get_long);
    names.map(str::to_owned).collect()
}

/// Refuses keys that are not `known`. Keys in `elsewhere` belong to the top of the file.
fn check_keys(
    table: &Spanned<DeTable<'_>>,
    known: &[String],
    elsewhere: &[String],
) -> Result<(), Slip> {
    let unknown = table.get_ref().keys().filter(|key| {
        let key = key.get_ref().as_ref();
        known.iter().all(|name| name != key)
    });
    let Some(key) = unknown.min_by_key(|key| key.span().start) else {
        return Ok(());
    };
    let name = key.get_ref().as_ref();
    let is_table = table.get_ref().iter().any(|(at, value)| {
        at.get_ref() == key.get_ref() && matches!(value.get_ref(), DeValue::Table(_))
    });
    let problem = if elsewhere.iter().any(|other| other == name) {
        format!("is not a setting of one peer; write it above the first [[{PEERS}]]")
    } else if is_table {
        format!("is not a known table; there is [[{PEERS}]] alone, and other keys stand above it")
    } else if let Some(nearest) = nearest(name, known) {
        format!("is not a known key; did you mean `{nearest}`?")
    } else {
        "is not a known key; keys are the flags of `ipmoved --help` without the dashes".into()
    };
    Err(Slip {
        at: Some(key.span().start),
        message: format!("`{name}` {problem}"),
    })
}

/// The name that was probably meant.
fn nearest<'a>(typed: &str, known: &'a [String]) -> Option<&'a str> {
    known
        .iter()
        .map(|name| (strsim::jaro(typed, name), name.as_str()))
        .filter(|(likeness, _)| *likeness > LIKE)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, name)| name)
}

/// Fills one of the structs that the flags fill, from those keys of a table that it knows.
fn fill<'i, T: Deserialize<'i>>(table: Spanned<DeTable<'i>>) -> Result<T, Slip> {
    let values: Vec<(String, Range<usize>)> = table
        .get_ref()
        .iter()
        .map(|(key, value)| (key.get_ref().to_string(), value.span()))
        .collect();
    T::deserialize(Deserializer::from(table)).map_err(|error| {
        let mut slip = Slip::from(error);
        let of = |at| values.iter().find(|(_, span)| span.contains(&at));
        if let Some((key, _)) = slip.at.and_then(of) {
            slip.message = format!("{key}: {}", slip.message);
        }
        slip
    })
}

/// Line and column of a place in a text, counted from 1, in characters.
fn position(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |at| at + 1);
    let column = before[line_start..].chars().count() + 1;
    (before.matches('\n').count() + 1, column)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA=";

    fn mistake(text: &str) -> String {
        File::parse(text).unwrap_err().to_string()
    }

    #[test]
    fn every_flag_has_its_key() {
        for name in [names::<DaemonArgs>(), names::<PeerArgs>()].concat() {
            // No key takes a table. A key that nobody reads would not refuse it.
            let error = mistake(&format!("{name} = {{}}\n"));
            assert!(error.starts_with("line 1, column "), "{error}");
            assert!(error.contains(&format!(": {name}: ")), "{error}");
        }
    }

    #[test]
    fn a_key_takes_what_its_flag_takes() {
        let file = File::parse(&format!(
            "peer = \"192.0.2.1\"\npsk = \"{KEY}\"\nmove = \"192.0.2.5\"\nlisten = 7\n\
             deliver = [\"192.0.2.5:80=198.51.100.2:81\", \"192.0.2.5:90=198.51.100.2:91\"]\n\
             max-flows = 5\ncipher = \"aes-256-gcm\"\nlog-format = \"json\"\nno-split = true\n\
             without = [\"udp-gso\"]\nlanes = \"2\"\n"
        ))
        .unwrap();
        assert_eq!(file.peer.peer.unwrap().to_string(), "192.0.2.1:51850");
        assert_eq!(file.peer.moves.len(), 1);
        assert_eq!(file.peer.deliver.len(), 2);
        assert_eq!(file.daemon.listen.unwrap().port, 7);
        assert_eq!(file.daemon.max_flows.unwrap().get(), 5);
        assert_eq!(file.daemon.lanes.unwrap().get(), 2);
        assert!(file.daemon.no_split);
        assert_eq!(file.daemon.without.len(), 1);
    }

    #[test]
    fn each_mistake_is_told_with_its_place_and_its_key() {
        for (text, says) in [
            ("peer = ", "line 1, column 8: "),
            ("\n  peer = \"\"", "line 2, column 10: peer: `` is neither"),
            (
                "listen = 70000",
                "line 1, column 10: listen: `70000` is not [ADDR:]PORT",
            ),
            (
                "max-flows = 0",
                "line 1, column 13: max-flows: `0` is not a number from 1 to",
            ),
            (
                "max-flows = true",
                "column 13: max-flows: invalid type: boolean `true`",
            ),
            (
                "psk = \"abc\"",
                "line 1, column 7: psk: the key has 3 characters",
            ),
            (
                "cipher = \"des\"",
                "line 1, column 10: cipher: `des` is not a cipher",
            ),
            (
                "log-format = \"xml\"",
                "log-format: `xml` is none of text, json",
            ),
            (
                "without = [\"fun\"]",
                "column 12: without: `fun` is none of udp-gso, ",
            ),
            (
                "move = [\"192.0.2.5\",\n        \"www\"]",
                "line 2, column 9: move: `www` is a name",
            ),
            (
                "deliver-to = \"lo\"",
                "deliver-to: `lo` is not an IP address",
            ),
            ("tun = \"a/b\"", "tun: `a/b` is not an interface name"),
            (
                "peer = \"a\"\npear = 1\n",
                "line 2, column 1: `pear` is not a known key; did you mean `peer`?",
            ),
            ("psk_file = \"k\"", "did you mean `psk-file`?"),
            (
                "zebra = 1",
                "keys are the flags of `ipmoved --help` without the dashes",
            ),
            (
                "accept = [\"192.0.2.0/28\", \"192.0.2.5/28\"]",
                "column 27: accept: `192.0.2.5/28` has bits set behind its length",
            ),
            ("acept = \"192.0.2.5\"", "did you mean `accept`?"),
            (
                "client-from = \"10.0.0.0/8\"",
                "did you mean `clients-from`?",
            ),
            (
                "[peers]\npeer = \"a\"",
                "line 1, column 1: `peers` has to be tables",
            ),
            ("peers = [1]", "column 10: `peers` has to be tables"),
            (
                "[[peers]]\npeer = \"a\"\n[[peers]]\nlisten = 7",
                "line 4, column 1: `listen` is not a setting of one peer; write it above",
            ),
            (
                "[[peers]]\nmoves = \"a\"",
                "line 2, column 1: `moves` is not a known key; did you",
            ),
            (
                "[[peers]]\nmove = \"a\"",
                "line 2, column 8: move: `a` is a name",
            ),
            (
                "[[peer]]\nmove = \"192.0.2.5\"",
                "line 1, column 3: `peer` is no table; did you mean [[peers]]?",
            ),
            (
                "[daemon]\nlisten = 7",
                "line 1, column 2: `daemon` is not a known table; there is [[peers]] alone",
            ),
            (
                "max-flows = 5.5",
                "column 13: max-flows: invalid type: floating point `5.5`",
            ),
            (
                "no-split = \"yes\"",
                "column 12: no-split: invalid type: string",
            ),
            (
                "psk-file = 5",
                "column 12: psk-file: invalid type: integer `5`",
            ),
            (
                "peer = \"a\"\npeer = \"b\"",
                "line 2, column 1: duplicate key",
            ),
        ] {
            let error = mistake(text);
            assert!(error.contains(says), "{text}\n{error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
    }

    #[test]
    fn no_mistake_repeats_a_key() {
        let almost = &KEY[1..];
        for text in [
            format!("psk = \"{almost}\""),
            format!("psk = [\"{almost}\"]"),
            format!("psk = \"{almost}"),
            format!("psk = {almost}"),
            format!("[[peers]]\npsk = \"{almost}\""),
        ] {
            let error = mistake(&text);
            assert!(!error.contains(&almost[..8]), "{error}");
        }
    }

    #[test]
    fn columns_are_characters() {
        assert_eq!(position("", 0), (1, 1));
        assert_eq!(position("é = x", 5), (1, 5));
        assert_eq!(position("a\nb\n", 4), (3, 1));
        assert_eq!(position("a", 9), (1, 2));
    }
}
