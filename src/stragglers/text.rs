//! Who still comes, and the verdict, for people at a terminal of 80 columns, and as CSV.
//!
//! Times are those of UTC, so that both servers say the same.

use std::fmt::Write as _;

use crate::model::asked::Asked;

use super::findings::{Findings, Straggler};
use super::history::{MoveWatched, STILL, Watched};
use super::store::protocol;
use super::time::{DAY, minute, span};
use super::trend::Trend;
use super::verdict::{Reason, Verdict};

/// Columns of a terminal.
const WIDTH: usize = 80;

/// The columns of the CSV.
const COLUMNS: &str = "client,address,port,protocol,names,connections,by_old,by_new,answered,\
                       went_on,bytes_in,bytes_out,first_seen,last_seen,days,every_s,spread_s";

impl Findings {
    /// For people.
    pub fn to_text(&self) -> String {
        let mut out = format!(
            "Since {} UTC: {}\n",
            minute(self.since),
            clients(self.clients)
        );
        unwatched(&mut out, &self.moves, &self.watched, self.at);
        if !self.stragglers.is_empty() {
            out.push('\n');
        }
        for straggler in &self.stragglers {
            straggler.write(&mut out, self.at);
        }
        if self.more > 0 {
            line(
                &mut out,
                &format!("… and {} more (--top)", number(self.more as u64)),
            );
        }
        let beside = &self.beside;
        let others = [
            (
                self.others,
                "conversations of scans, floods, and whoever was not answered or did not go on",
            ),
            (
                beside.unlisted,
                "conversations of clients that were too many to list",
            ),
            (beside.missed, "conversations that were too many to look at"),
            (
                beside.lost,
                "conversations of clients that could not be written in time",
            ),
            (
                beside.displaced,
                "senders that were answered once and were too many to remember",
            ),
            (
                beside.unnamed,
                "connections that were too many to look for a name in",
            ),
        ];
        if others.iter().any(|(count, _)| *count > 0) {
            out.push_str("\nBeside them:\n");
        }
        for (count, what) in others.into_iter().filter(|(count, _)| *count > 0) {
            line(&mut out, &format!("  {} {what}", number(count)));
        }
        out
    }

    /// As CSV (RFC 4180).
    pub fn to_csv(&self) -> String {
        let mut out = format!("{COLUMNS}\r\n");
        for it in &self.stragglers {
            let (every, spread) = (it.rhythm)
                .map(|rhythm| (rhythm.every_s.to_string(), rhythm.spread_s.to_string()))
                .unwrap_or_default();
            let fields = [
                it.client.to_string(),
                it.asked.addr.to_string(),
                it.asked.port.to_string(),
                protocol(it.asked.protocol),
                cell(&it.names.join(" ")),
                it.connections.to_string(),
                it.by_old.to_string(),
                it.by_new.to_string(),
                it.answered.to_string(),
                it.went_on.to_string(),
                it.bytes_in.to_string(),
                it.bytes_out.to_string(),
                it.first_seen.to_string(),
                it.last_seen.to_string(),
                it.days.to_string(),
                every,
                spread,
            ];
            // Writing to a String cannot fail.
            let _ = write!(out, "{}\r\n", fields.join(","));
        }
        out
    }
}

/// A verdict in sentences.
pub(super) struct Sentences {
    /// Whether it is safe.
    pub(super) headline: String,
    /// What that rests on.
    pub(super) because: Vec<String>,
    /// Where the number of clients leads.
    pub(super) trend: String,
}

impl Verdict {
    /// For people.
    pub fn to_text(&self) -> String {
        let quiet = span(self.watched.to - self.watched.from);
        let mut out = String::new();
        if self.safe {
            line(&mut out, &format!("safe to switch off: {}", self.nobody()));
        } else {
            let reasons: Vec<String> = self.reasons.iter().map(|it| it.say(self)).collect();
            line(&mut out, &format!("not yet: {}", reasons.join("; ")));
        }
        line(&mut out, &format!("  trend: {}", self.trend()));
        line(
            &mut out,
            &format!("  watched: {} of the last {quiet}", percent(&self.watched)),
        );
        for note in self.notes() {
            line(&mut out, &format!("  {note}"));
        }
        if !self.stragglers.is_empty() {
            out.push_str("\nWho still comes:\n");
        }
        for straggler in &self.stragglers {
            straggler.write(&mut out, self.at);
        }
        let more = self.clients.saturating_sub(self.stragglers.len());
        if more > 0 {
            out.push_str("… `ipmoved stragglers --top 1000` shows more\n");
        }
        out
    }

    /// What a page says of it.
    pub(super) fn to_sentences(&self) -> Sentences {
        let quiet = span(self.watched.to - self.watched.from);
        let headline = if self.safe {
            format!("Safe to switch off: {}", self.nobody())
        } else {
            "Not yet".into()
        };
        let mut because: Vec<String> = self.reasons.iter().map(|it| it.say(self)).collect();
        because.push(format!(
            "watched: {} of the last {quiet}",
            percent(&self.watched)
        ));
        because.extend(self.notes());
        Sentences {
            headline,
            because,
            trend: self.trend(),
        }
    }

    /// That nobody came, and who came all the same.
    fn nobody(&self) -> String {
        let quiet = span(self.watched.to - self.watched.from);
        let passers = match self.passers_by.len() {
            0 => String::new(),
            1 => ", but 1 passer-by".into(),
            count => format!(", but {} passers-by", number(count as u64)),
        };
        let ignored = match self.ignored {
            0 => String::new(),
            count => format!(", but {} of --ignore", clients(count)),
        };
        format!("for {quiet} no client came{passers}{ignored}")
    }

    /// What a person has to know beside.
    fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        let quiet = self.watched.to - self.watched.from;
        if quiet < DAY {
            notes.push(format!(
                "who comes less often than every {} is not seen (--quiet 7d)",
                span(quiet)
            ));
        }
        if self.newcomers > 0 {
            notes.push(format!(
                "new among them: {}, which came for an hour at most: if these are scanners, leave \
                 them out with --ignore",
                clients(self.newcomers)
            ));
        }
        if self.ignored > 0 {
            notes.push(format!("left out by --ignore: {}", clients(self.ignored)));
        }
        if !self.passers_by.is_empty() {
            let (shown, more) = some(&self.passers_by);
            notes.push(format!(
                "passers-by, not counted: {shown}{more}; each came for the first time, for an hour \
                 at most, and asked for no name, as scanners do"
            ));
        }
        if self.others > 0 {
            notes.push(format!(
                "not counted: {} conversations of scans, floods, and whoever was not answered or \
                 did not go on",
                number(self.others)
            ));
        }
        if self.answered_once > 0 {
            notes.push(format!(
                "answered once, not counted: {} conversations whose senders came only once",
                number(self.answered_once)
            ));
        }
        if !self.gone.is_empty() {
            let (shown, more) = some(&self.gone);
            notes.push(format!("no longer moved, and not judged: {shown}{more}"));
        }
        notes
    }

    fn trend(&self) -> String {
        match (self.trend, self.around) {
            (Trend::TooFewDays { days, needed }, _) => {
                format!("too early to say: {days} of {needed} whole days were watched")
            }
            (Trend::NoDecline, _) => "no decline can be told from chance".into(),
            (Trend::Declines { halves_in_days, .. }, around) => {
                let date = match around {
                    Some(day) => format!("at this pace it is safe around {day}"),
                    None => "at this pace it takes more than a year".into(),
                };
                format!("clients halve in {halves_in_days:.1} days; {date}")
            }
        }
    }
}

impl Reason {
    fn say(&self, verdict: &Verdict) -> String {
        match *self {
            Self::Clients { count, last_seen } => format!(
                "{} came, the last one {}",
                clients(count),
                ago(verdict.at - last_seen)
            ),
            Self::NotWatched {
                ref what,
                last: Some(last),
            } => format!(
                "nobody has watched{} since {} UTC: the daemon does not run, or its tunnel is down \
                 (`ipmoved status`)",
                named(what.as_deref()),
                minute(last)
            ),
            Self::NotWatched {
                ref what,
                last: None,
            } => format!(
                "nobody has watched{}: the daemon does, while its tunnel is up (`ipmoved status`)",
                named(what.as_deref())
            ),
            Self::WatchedTooLittle {
                ref what,
                seconds,
                of,
            } => {
                format!(
                    "somebody watched{} for {} of {} only",
                    named(what.as_deref()),
                    span(seconds),
                    span(of)
                )
            }
            Self::NotMoved { ref what, ref mode } => format!(
                "{what} is in mode {mode}: this server still serves clients itself (`ipmoved move`)"
            ),
            Self::NotRecorded { ref what } => format!(
                "who comes to {what} is not in this database (`ipmoved status`; --state-dir as \
                 the daemon's)"
            ),
            Self::NotAnswered { ref what } => format!(
                "clients ask for {what} and are not answered, so nobody knows who they are \
                 (`ipmoved status`)"
            ),
            Self::StillHere { conversations } => format!(
                "{} conversations are still on this server (`ipmoved status`)",
                number(conversations)
            ),
            Self::HereUnknown { ref why } => format!(
                "what this server still has itself cannot be counted ({why}): ask as root, where \
                 the daemon runs"
            ),
            Self::TooMuch { conversations } => format!(
                "{} conversations were too many to record; clients may be among them",
                number(conversations)
            ),
        }
    }
}

impl Straggler {
    /// Two lines.
    fn write(&self, out: &mut String, now: i64) {
        let often = match (self.connections, self.rhythm) {
            (1, _) => "once".into(),
            (count, None) => format!("{} times", number(count)),
            (count, Some(rhythm)) => {
                format!("{} times, every {}", number(count), span(rhythm.every_s))
            }
        };
        line(
            out,
            &format!(
                "{:<24} {often}, last {}",
                self.client.to_string(),
                ago(now - self.last_seen)
            ),
        );
        let mut what = format!("    {}", place(&self.asked));
        if let Some(name) = self.names.first() {
            // A name may be as long as three lines.
            let short: String = name.chars().take(40).collect();
            let dots = if short.len() < name.len() { "…" } else { "" };
            let _ = write!(what, " as {short}{dots}");
        }
        if self.names.len() > 1 {
            let _ = write!(what, " and {} more", self.names.len() - 1);
        }
        let _ = write!(what, ", {} out", bytes(self.bytes_out));
        if self.by_old > 0 {
            let _ = write!(what, ", {} served here", number(self.by_old));
        }
        line(out, &what);
    }
}

/// Appends a line, broken where the terminal ends.
fn line(out: &mut String, text: &str) {
    let indent = text.len() - text.trim_start().len();
    let mut column = 0;
    for word in text.trim_start().split(' ') {
        let width = word.chars().count();
        if column > 0 && column + 1 + width > WIDTH {
            out.push('\n');
            column = 0;
            out.push_str(&" ".repeat(indent + 2));
            column += indent + 2;
        } else if column > 0 {
            out.push(' ');
            column += 1;
        } else {
            out.push_str(&" ".repeat(indent));
            column += indent;
        }
        out.push_str(word);
        column += width;
    }
    out.push('\n');
}

/// Says that not all of the time was watched, if that is so.
fn unwatched(out: &mut String, moves: &[MoveWatched], least: &Watched, now: i64) {
    if moves.iter().all(|it| it.watched == *least) {
        if least.share() < 0.99 {
            let part = format!("  only {} of this time was watched", percent(least));
            line(out, &part);
        }
    } else {
        let little: Vec<String> = (moves.iter())
            .filter(|it| it.watched.share() < 0.99)
            .map(|it| format!("{} ({})", it.what, percent(&it.watched)))
            .collect();
        if !little.is_empty() {
            let (shown, more) = some(&little);
            line(out, &format!("  watched only in part: {shown}{more}"));
        }
    }
    match least.last {
        Some(last) if now - last > STILL => line(
            out,
            &format!("  nobody has watched since {} UTC", minute(last)),
        ),
        Some(_) => {}
        None => line(
            out,
            "  nobody has watched yet: the daemon does, while its tunnel is up (`ipmoved status`)",
        ),
    }
}

/// A few of them, and how many more there are.
fn some(all: &[String]) -> (String, String) {
    const SOME: usize = 4;
    let shown = all[..all.len().min(SOME)].join(", ");
    let more = match all.len().saturating_sub(SOME) {
        0 => String::new(),
        more => format!(" and {} more", number(more as u64)),
    };
    (shown, more)
}

/// What is meant, if not all is.
fn named(what: Option<&str>) -> String {
    what.map_or_else(String::new, |what| format!(" {what}"))
}

/// A text as a cell (RFC 4180). One that a spreadsheet takes for a formula begins with an
/// apostrophe: whoever asks for a name chooses it.
fn cell(text: &str) -> String {
    let formula = text.starts_with(['=', '+', '-', '@', '\t', '\r', '\n']);
    let text = if formula {
        format!("'{text}")
    } else {
        text.into()
    };
    if text.contains([',', '"', '\r', '\n']) {
        format!("\"{}\"", text.replace('"', "\"\""))
    } else {
        text
    }
}

/// The part that was watched, rounded down: what is not all of it does not look so.
fn percent(watched: &Watched) -> String {
    format!("{} %", (watched.share() * 100.0) as i64)
}

fn clients(count: usize) -> String {
    match count {
        0 => "no client".into(),
        1 => "1 client".into(),
        count => format!("{} clients", number(count as u64)),
    }
}

pub(super) fn place(asked: &Asked) -> String {
    asked.to_string()
}

pub(super) fn ago(seconds: i64) -> String {
    if seconds < 2 {
        return "just now".into();
    }
    format!("{} ago", span(seconds))
}

/// A number with its thousands apart.
pub(super) fn number(count: u64) -> String {
    let digits = count.to_string();
    let mut out = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

fn bytes(count: u64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB"];
    let mut size = count as f64;
    let mut unit = 0;
    while size >= 999.5 && unit + 1 < units.len() {
        size /= 1_000.0;
        unit += 1;
    }
    if unit == 0 || size >= 9.95 {
        format!("{size:.0} {}", units[unit])
    } else {
        format!("{size:.1} {}", units[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stragglers::history::History;
    use crate::stragglers::store::Store;
    use crate::stragglers::tally::{Others, Tally};
    use crate::stragglers::tests::{NOON, Scratch, visit, wall, watch};

    fn findings(scratch: &Scratch) -> (Findings, Verdict) {
        let mut tally = Tally::default();
        for n in 0..12 {
            let mut monitor = visit("203.0.113.9", 443, NOON - n * 300);
            monitor.first_bytes = b"GET / HTTP/1.1\r\nHost: www.example.net\r\n\r\n".to_vec();
            tally.add(monitor);
        }
        let mut person = visit("2001:db8:aaaa:bbbb:1:2:3:4", 22, NOON - 7_200);
        person.bytes_out = 123_456_789;
        person.asked.addr = "2001:db8:ffff:ffff:ffff:ffff:ffff:ffff".parse().unwrap();
        tally.add(person);
        let mut long = visit("198.51.100.77", 80, NOON - 60);
        let name = format!("{0}.{0}.{0}.example", "a".repeat(60));
        long.first_bytes = format!("GET / HTTP/1.1\r\nHost: {name}\r\n\r\n").into_bytes();
        tally.add(long);
        tally.add_others(
            NOON,
            Others {
                openings: 1_000_014,
                missed: 7,
                ..Others::default()
            },
        );
        let mut store = Store::to_write(scratch.dir(), None).unwrap();
        let watch = watch(NOON - 86_400);
        store.write(tally.waiting(), &watch, NOON, true).unwrap();
        let history = History::open(scratch.dir(), wall(NOON + 30), None).unwrap();
        (
            Findings::of(&history, NOON - 86_400, 2, &[]).unwrap(),
            Verdict::of(&history, 7 * 86_400, &[]).unwrap(),
        )
    }

    #[test]
    fn people_read_two_lines_a_client() {
        let (findings, verdict) = findings(&Scratch::new("text"));
        assert_eq!(
            findings.to_text(),
            "\
Since 2026-11-27 12:00 UTC: 3 clients

203.0.113.9              12 times, every 5 min, last 30 s ago
    192.0.2.5:443/tcp as www.example.net, 12 kB out
198.51.100.77            once, last 2 min ago
    192.0.2.5:80/tcp as aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa…, 1.0 kB out
… and 1 more (--top)

Beside them:
  1,000,000 conversations of scans, floods, and whoever was not answered or did
    not go on
  7 conversations that were too many to look at
"
        );
        let text = verdict.to_text();
        assert!(
            text.starts_with("not yet: 3 clients came, the last one 30 s ago; 7"),
            "{text}"
        );
        assert!(text.contains("0 of 5 whole days were watched"), "{text}");
        assert!(!text.contains("new among them"), "{text}");
        for line in findings.to_text().lines().chain(text.lines()) {
            assert!(line.chars().count() <= WIDTH, "{line}");
        }
    }

    #[test]
    fn the_csv_has_as_many_fields_in_each_line() {
        let (findings, _) = findings(&Scratch::new("csv"));
        let csv = findings.to_csv();
        let columns = COLUMNS.split(',').count();
        let lines: Vec<&str> = csv.split_terminator("\r\n").collect();
        assert_eq!(lines.len(), 3);
        assert!(
            lines.iter().all(|line| line.split(',').count() == columns),
            "{csv}"
        );
        let first = "203.0.113.9,192.0.2.5,443,tcp,www.example.net,12,0,12,12,12,1200,12000,";
        assert!(
            lines[1].starts_with(first) && lines[1].ends_with(",1,300,0"),
            "{csv}"
        );
    }

    #[test]
    fn the_json_names_what_the_database_does() {
        let (findings, verdict) = findings(&Scratch::new("json"));
        let json = serde_json::to_value(&findings).unwrap();
        let first = &json["stragglers"][0];
        assert_eq!(first["client"], "203.0.113.9");
        assert_eq!(
            (&first["port"], &first["protocol"]),
            (&443.into(), &"tcp".into())
        );
        assert_eq!(first["rhythm"]["every_s"], 300);
        assert_eq!(json["others"], 1_000_000);
        let json = serde_json::to_value(&verdict).unwrap();
        assert_eq!(
            (&json["safe"], &json["trend"]),
            (&false.into(), &"too_few_days".into())
        );
        assert_eq!(json["reasons"][0]["reason"], "clients");
    }

    #[test]
    fn no_cell_is_a_formula_or_two() {
        for (text, shown) in [
            ("www.example.net", "www.example.net"),
            ("(none)", "(none)"),
            ("-2+3.example", "'-2+3.example"),
            (
                "=HYPERLINK(\"a\",\"b\")",
                "\"'=HYPERLINK(\"\"a\"\",\"\"b\"\")\"",
            ),
            ("@a", "'@a"),
            ("+1", "'+1"),
            ("a,b", "\"a,b\""),
            ("", ""),
        ] {
            assert_eq!(cell(text), shown);
        }
    }

    #[test]
    fn numbers_are_easy_to_read() {
        assert_eq!(
            [0, 999, 1_000, 1_234_567].map(number),
            ["0", "999", "1,000", "1,234,567"]
        );
        let sizes = [0, 999, 1_000, 9_999, 123_456, 5_000_000_000].map(bytes);
        assert_eq!(
            sizes,
            ["0 B", "999 B", "1.0 kB", "10 kB", "123 kB", "5.0 GB"]
        );
    }
}
