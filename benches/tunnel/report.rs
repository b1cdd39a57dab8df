//! The report of a run: one table, the goals, JSON for machines, a picture for people.
//!
//! Owns the figures of all rounds and their medians. `target/bench/tunnel.json` has every round,
//! `target/bench/tunnel.md` the table, `target/bench/tunnel.svg` the picture. With `--page` the
//! report also puts table, profile and picture into `contrib`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;

use crate::measures::{Better, Effort, Figure, Figures, figures};

/// The page holds the table between this line and [`END`].
const BEGIN: &str = "<!-- figures: written by `cargo bench --bench tunnel -- --page` -->";
const END: &str = "<!-- end of figures -->";
/// The page holds the profile between this line and [`END_PROFILE`].
const BEGIN_PROFILE: &str = "<!-- profile: written by the same -->";
const END_PROFILE: &str = "<!-- end of profile -->";

/// The contender that the report compares with the others, and the yardsticks.
const SUBJECT: &str = "ipmoved";
/// The same with the cipher that one must ask for. Its goals stand beside the others.
const WITH_AEGIS: &str = "ipmoved, aegis";
const YARDSTICKS: [&str; 2] = ["vxlan", "wireguard-go"];

/// The figure of a goal, and whether it is enough.
type Found = (String, bool);

pub(crate) struct Report {
    rounds: usize,
    effort: Effort,
    contenders: Vec<(String, BTreeMap<&'static str, Vec<f64>>)>,
    skipped: Vec<(String, String)>,
    profiles: Vec<(String, String)>,
}

impl Report {
    pub(crate) fn new(rounds: usize, effort: Effort) -> Self {
        Self {
            rounds,
            effort,
            contenders: Vec::new(),
            skipped: Vec::new(),
            profiles: Vec::new(),
        }
    }

    /// Notes that a contender is missing.
    pub(crate) fn skipped(&mut self, name: &str, why: &str) {
        self.skipped.push((name.to_owned(), why.to_owned()));
    }

    /// Adds the profile of a contender.
    pub(crate) fn profile(&mut self, name: &str, text: String) {
        self.profiles.push((name.to_owned(), text));
    }

    /// Adds the figures of one round.
    pub(crate) fn add(&mut self, name: String, figures: Figures) {
        let at = self.contenders.iter().position(|(known, _)| *known == name);
        let at = at.unwrap_or_else(|| {
            self.contenders.push((name, BTreeMap::new()));
            self.contenders.len() - 1
        });
        for (figure, value) in figures {
            self.contenders[at].1.entry(figure).or_default().push(value);
        }
    }

    /// Prints and writes everything.
    pub(crate) fn finish(&self, took: Duration, page: bool) -> Result<()> {
        let text = self.text(took);
        println!("{text}");
        for (name, profile) in &self.profiles {
            println!("profile of {name}\n\n{profile}");
        }
        let directory = directory()?;
        write(&directory.join("tunnel.md"), &text)?;
        write(&directory.join("tunnel.json"), &self.json(took)?)?;
        write(&directory.join("tunnel.svg"), &self.svg())?;
        println!("also in {}", directory.display());
        if page {
            self.write_page(&text)?;
        }
        Ok(())
    }

    fn write_page(&self, text: &str) -> Result<()> {
        let contrib = Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib");
        let path = contrib.join("performance.md");
        let mut page =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        page = put_between(&page, BEGIN, END, text)?;
        let profile = self.profiles.iter().find(|(name, _)| name == SUBJECT);
        // Without perf the page keeps the last profile.
        if let Some((_, profile)) = profile {
            page = put_between(&page, BEGIN_PROFILE, END_PROFILE, profile)?;
        }
        write(&path, &page)?;
        write(&contrib.join("performance.svg"), &self.svg())?;
        println!("and in {}", path.display());
        Ok(())
    }

    fn median(&self, contender: &str, figure: &str) -> Option<f64> {
        let (_, figures) = self.contenders.iter().find(|(name, _)| name == contender)?;
        median(figures.get(figure)?)
    }

    fn text(&self, took: Duration) -> String {
        let mut rows = vec![self.head()];
        for figure in figures() {
            rows.extend(self.row(figure));
        }
        let mut out = aligned(&rows);
        let effort = &self.effort;
        // Writing to a String cannot fail.
        let _ = write!(
            out,
            "\nMedians of {} interleaved rounds, {} on impaired paths; {:.1} s of each TCP run, \
             {:.1} s of each flood, {} pings. {} The run took {:.0} s.\n",
            self.rounds,
            effort.impaired.min(self.rounds),
            effort.tcp.as_secs_f64(),
            effort.flood.as_secs_f64(),
            effort.pings,
            machine(),
            took.as_secs_f64()
        );
        for (name, why) in &self.skipped {
            let _ = writeln!(out, "Left out: {name} ({why}).");
        }
        let goals = self.goals();
        if !goals.is_empty() {
            let _ = write!(out, "\n{}", aligned(&goals));
        }
        out
    }

    fn head(&self) -> Vec<String> {
        let mut head = vec!["median".to_owned(), "unit".to_owned()];
        head.extend(self.contenders.iter().map(|(name, _)| name.clone()));
        head.extend(YARDSTICKS.map(|name| format!("{SUBJECT} ÷ {name}")));
        head
    }

    /// One line of the table; `None` if no contender has the figure.
    fn row(&self, figure: &Figure) -> Option<Vec<String>> {
        let values: Vec<Option<f64>> = self
            .contenders
            .iter()
            .map(|(name, _)| self.median(name, figure.name))
            .collect();
        values.iter().flatten().next()?;
        let mut row = vec![figure.name.to_owned(), figure.unit.to_owned()];
        row.extend(values.iter().map(|value| match value {
            Some(value) => format!("{value:.*}", figure.decimals),
            None => "–".to_owned(),
        }));
        row.extend(
            YARDSTICKS.map(|name| match self.ratio(SUBJECT, figure.name, name) {
                Some(ratio) => format!("{ratio:.2}"),
                None => "–".to_owned(),
            }),
        );
        Some(row)
    }

    fn ratio(&self, subject: &str, figure: &str, yardstick: &str) -> Option<f64> {
        let ratio = self.median(subject, figure)? / self.median(yardstick, figure)?;
        ratio.is_finite().then_some(ratio)
    }

    /// The project's own goals, as far as this run can tell.
    fn goals(&self) -> Vec<Vec<String>> {
        let say = |found: Option<Found>| match found {
            Some((value, true)) => format!("{value} met"),
            Some((value, false)) => format!("{value} missed"),
            None => "–".to_owned(),
        };
        let both = self.goals_of(SUBJECT).into_iter();
        let both = both.zip(self.goals_of(WITH_AEGIS));
        let mut rows: Vec<Vec<String>> = both
            .filter(|((_, found), _)| found.is_some())
            .map(|((goal, found), (_, aegis))| vec![goal.to_owned(), say(found), say(aegis)])
            .collect();
        if !rows.is_empty() {
            let head = ["goal", "found", "with aegis-256x4"].map(str::to_owned);
            rows.insert(0, head.into());
        }
        rows
    }

    fn goals_of(&self, subject: &str) -> [(&'static str, Option<Found>); 20] {
        let of = |figure| self.median(subject, figure);
        let ratio = |figure, yardstick| self.ratio(subject, figure, yardstick);
        let less = |figure, bound, unit: &'static str| {
            of(figure).map(|value| (format!("{value:.2} {unit}"), value <= bound))
        };
        let more = |figure, yardstick, bound| {
            ratio(figure, yardstick).map(|value| (format!("{value:.2}"), value >= bound))
        };
        [
            (
                "TCP forward ≥ 0.6 × VXLAN",
                more("tcp forward", "vxlan", 0.6),
            ),
            (
                "TCP reverse ≥ 0.6 × VXLAN",
                more("tcp reverse", "vxlan", 0.6),
            ),
            (
                "TCP forward ≥ 3 × wireguard-go on PATH",
                more("tcp forward", "wireguard-go", 3.0),
            ),
            (
                "TCP reverse ≥ 3 × wireguard-go on PATH",
                more("tcp reverse", "wireguard-go", 3.0),
            ),
            (
                "TCP at 1 % loss ≥ 0.9 × direct",
                more("tcp, 1 % loss", "direct", 0.9),
            ),
            (
                "TCP at 3 % loss ≥ 0.9 × direct",
                more("tcp, 3 % loss", "direct", 0.9),
            ),
            (
                "TCP left when reordered ≥ 0.9 × what direct has left",
                more("left when reordered", "direct", 0.9),
            ),
            (
                "CPU old server, forward ≤ 0.6 s/GB",
                less("cpu old, forward", 0.6, "s/GB"),
            ),
            (
                "CPU new server, forward ≤ 0.6 s/GB",
                less("cpu new, forward", 0.6, "s/GB"),
            ),
            (
                "CPU old server, reverse ≤ 0.6 s/GB",
                less("cpu old, reverse", 0.6, "s/GB"),
            ),
            (
                "CPU new server, reverse ≤ 0.6 s/GB",
                less("cpu new, reverse", 0.6, "s/GB"),
            ),
            (
                "UDP 64 B, batched, received > VXLAN",
                more("udp 64 B, batched, received", "vxlan", 1.0),
            ),
            (
                "… under 1 % dropped by daemons",
                less("udp 64 B, batched, dropped by daemons", 1.0, "%"),
            ),
            (
                "UDP 64 B, one call each, received > VXLAN",
                more("udp 64 B, one call each, received", "vxlan", 1.0),
            ),
            (
                "UDP, 1,000 flows in turn, received > VXLAN",
                more("udp, 1,000 flows in turn, received", "vxlan", 1.0),
            ),
            ("ping ≤ 0.15 ms", less("ping, median", 0.15, "ms")),
            (
                "1 M flows as fast as one",
                of("tcp forward, 1 M flows")
                    .zip(of("tcp forward, few flows"))
                    .map(|(many, one)| (format!("{:.2}", many / one), many >= 0.95 * one)),
            ),
            (
                "memory a flow ≤ 128 bytes",
                less("memory a flow", 128.0, "bytes"),
            ),
            (
                "memory old server < 64 MB",
                less("memory old, no flows", 64.0, "MB"),
            ),
            (
                "memory new server < 64 MB",
                less("memory new, no flows", 64.0, "MB"),
            ),
        ]
    }

    fn json(&self, took: Duration) -> Result<String> {
        let contenders: Vec<_> = self
            .contenders
            .iter()
            .map(|(name, figures)| {
                let figures: BTreeMap<_, _> = figures
                    .iter()
                    .map(|(figure, values)| {
                        let unit = crate::measures::figures()
                            .find(|known| known.name == *figure)
                            .map(|known| known.unit);
                        (
                            figure,
                            json!({"unit": unit, "median": median(values), "rounds": values}),
                        )
                    })
                    .collect();
                json!({"name": name, "figures": figures})
            })
            .collect();
        let skipped: Vec<_> = self
            .skipped
            .iter()
            .map(|(name, why)| json!({"name": name, "why": why}))
            .collect();
        Ok(serde_json::to_string_pretty(&json!({
            "rounds": self.rounds,
            "impaired_rounds": self.effort.impaired.min(self.rounds),
            "tcp_seconds": self.effort.tcp.as_secs_f64(),
            "took_s": took.as_secs_f64(),
            "machine": machine(),
            "contenders": contenders,
            "skipped": skipped,
        }))?)
    }

    /// Draws bars, one panel for each figure.
    fn svg(&self) -> String {
        const SHOWN: [&str; 9] = [
            "tcp forward",
            "tcp reverse",
            "tcp forward, 4 streams",
            "cpu old, forward",
            "cpu new, forward",
            "udp 64 B, batched, received",
            "udp 64 B, one call each, received",
            "ping, median",
            "connections, 1 client",
        ];
        const WIDTH: usize = 380;
        const BAR: usize = 16;
        const LABEL: usize = 110;
        let panels: Vec<&Figure> = figures()
            .filter(|figure| SHOWN.contains(&figure.name))
            .filter(|figure| self.row(figure).is_some())
            .collect();
        let height = 34 + self.contenders.len() * (BAR + 4);
        let (columns, rows) = (2, panels.len().div_ceil(2));
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{}\" \
             font-family=\"sans-serif\" font-size=\"11\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n",
            columns * WIDTH,
            rows * height + 10
        );
        for (n, figure) in panels.into_iter().enumerate() {
            let (x, y) = (n % columns * WIDTH + 10, n / columns * height + 10);
            let better = match figure.better {
                Better::More => "more is better",
                Better::Less => "less is better",
            };
            // Writing to a String cannot fail.
            let _ = writeln!(
                out,
                "<text x=\"{x}\" y=\"{}\" font-weight=\"bold\">{} ({}), {better}</text>",
                y + 12,
                escaped(figure.name),
                figure.unit
            );
            let largest = self
                .contenders
                .iter()
                .filter_map(|(name, _)| self.median(name, figure.name))
                .fold(f64::MIN_POSITIVE, f64::max);
            for (row, (name, _)) in self.contenders.iter().enumerate() {
                let top = y + 22 + row * (BAR + 4);
                let text = top + BAR - 4;
                let _ = writeln!(
                    out,
                    "<text x=\"{}\" y=\"{text}\" text-anchor=\"end\">{}</text>",
                    x + LABEL - 5,
                    escaped(name.rsplit('/').next().unwrap_or(name))
                );
                let Some(value) = self.median(name, figure.name) else {
                    continue;
                };
                let colour = if name == SUBJECT {
                    "#c2410c"
                } else {
                    "#94a3b8"
                };
                let space = (WIDTH - LABEL - 70) as f64;
                let length = value / largest * space;
                let _ = writeln!(
                    out,
                    "<rect x=\"{}\" y=\"{top}\" width=\"{length:.1}\" height=\"{BAR}\" \
                     fill=\"{colour}\"/>\
                     <text x=\"{:.1}\" y=\"{text}\">{value:.*}</text>",
                    x + LABEL,
                    (x + LABEL + 4) as f64 + length,
                    figure.decimals
                );
            }
        }
        out.push_str("</svg>\n");
        out
    }
}

/// Replaces the text between two lines of a page.
fn put_between(page: &str, begin: &str, end: &str, text: &str) -> Result<String> {
    let missing = || format!("the page has no lines `{begin}` and `{end}`");
    let (head, rest) = page.split_once(begin).with_context(missing)?;
    let (_, tail) = rest.split_once(end).with_context(missing)?;
    Ok(format!(
        "{head}{begin}\n\n{}\n\n{end}{tail}",
        text.trim_end()
    ))
}

fn median(values: &[f64]) -> Option<f64> {
    let mut sorted: Vec<f64> = values.iter().copied().filter(|v| v.is_finite()).collect();
    sorted.sort_unstable_by(f64::total_cmp);
    let (low, high) = (
        sorted.get(sorted.len().checked_sub(1)? / 2)?,
        sorted.get(sorted.len() / 2)?,
    );
    Some((low + high) / 2.0)
}

/// A Markdown table that is readable as plain text. The first row is the head.
fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let widths = rows.iter().filter_map(|row| row.get(column));
        widths.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut out = String::new();
    for (n, row) in rows.iter().enumerate() {
        for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            // Words go to the left, numbers to the right.
            let _ = match column {
                0 => write!(out, "| {cell:<width$} "),
                _ => write!(out, "| {cell:>width$} "),
            };
        }
        out.push_str("|\n");
        if n == 0 {
            for (column, &width) in widths.iter().enumerate() {
                let end = if column == 0 { '-' } else { ':' };
                let _ = write!(out, "|{}{end}", "-".repeat(width + 1));
            }
            out.push_str("|\n");
        }
    }
    out
}

/// The machine of this run.
fn machine() -> String {
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let model = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = model
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown processor", |(_, name)| name);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').nth(2).unwrap_or("?");
    format!(
        "{cpus} processors ({model}), shared by all five parties, Linux {}, load of the last \
         15 minutes {load}.",
        kernel.trim()
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// `target/bench`, wherever the target directory is. The executable lies in `target/release/deps`.
fn directory() -> Result<PathBuf> {
    let exe = std::env::current_exe()?;
    let target = exe.ancestors().nth(3).unwrap_or(Path::new("."));
    let path = target.join("bench");
    fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
    Ok(path)
}
