//! Where the two daemons spend their time under one TCP stream, as `perf` sees it.
//!
//! It samples the process clock, which works in virtual machines without counters of their own.
//! There, a sample of code that runs with interrupts off is taken where they are switched on again:
//! wake-ups show as `_raw_spin_unlock_irqrestore` and `finish_task_switch`. The kernel does some
//! network work in a daemon's time, in a lab also that of the router and the other hosts. It counts
//! as the daemon's.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::contenders::Contender;
use crate::load::{self, Direction, Streams};

/// How long to sample.
const TIME: Duration = Duration::from_secs(4);
/// Samples a second.
const RATE: &str = "1999";
/// Number of symbols to name.
const NAMED: usize = 8;

/// The part that a symbol belongs to: the first of these with a word that occurs in its name.
const PARTS: &[(&str, &[&str])] = &[
    (
        "sealing and opening",
        &[
            "gcm",
            "aead",
            "aes_",
            "chacha",
            "poly1305",
            "EVP_",
            "CRYPTO_",
            "iv_len",
            "Sealer",
            "OpenBatch",
            "aws_lc",
        ],
    ),
    ("this project's own code", &["ipmoved"]),
    (
        "copying",
        &[
            "_copy_",
            "copy_page",
            "memcpy",
            "memmove",
            "object_size",
            "iov_iter",
        ],
    ),
    (
        "waiting and waking",
        &[
            "schedule",
            "task_switch",
            "irqrestore",
            "poll",
            "wake",
            "select",
            "idle",
        ],
    ),
];
const REST: [(&str, &str); 2] = [
    ("[k]", "the kernel's network stack and the rest of it"),
    ("", "the rest of the process"),
];

/// The function that runs softirqs, by today's name and by that before Linux 6.11.
const SOFTIRQS: [&str; 2] = ["handle_softirqs", "__do_softirq"];

/// Samples both daemons, one direction after the other, and returns text for the page.
pub(crate) fn of(contender: &Contender<'_>, scratch: &Path) -> Result<String> {
    let Some(pids) = contender.pids() else {
        bail!("no process carries it");
    };
    let mut out = String::new();
    for (direction, name) in [
        (Direction::Forward, "forward, from client to application"),
        (Direction::Reverse, "reverse, from application to client"),
    ] {
        // There is one recording each. In one of both, perf credits one daemon with the kernel code
        // that both run.
        let data = ["old", "new"].map(|side| scratch.join(format!("perf-{side}.data")));
        record(contender, direction, pids, &data)?;
        for (data, side) in data.iter().zip(["old", "new"]) {
            let symbols = report(data, "--no-children")?;
            let within = report(data, "--children")?;
            // Writing to a String cannot fail.
            let _ = writeln!(out, "{side} server, {name}:\n");
            for (part, share) in parts(&symbols) {
                let _ = writeln!(out, "* {share:.0} % {part}");
            }
            let most: Vec<String> = symbols
                .iter()
                .take(NAMED)
                .map(|(share, name)| {
                    let name = name.trim_start_matches("[.] ").trim_start_matches("[k] ");
                    format!("`{name}` {share:.1}")
                })
                .collect();
            let _ = writeln!(out, "* most: {}", most.join(", "));
            let softirqs = within
                .iter()
                .find(|(_, name)| SOFTIRQS.iter().any(|one| name.contains(one)));
            if let Some((share, _)) = softirqs {
                let _ = writeln!(out, "* {share:.0} % of all that within softirqs");
            }
            out.push('\n');
        }
    }
    Ok(out)
}

fn record(
    contender: &Contender<'_>,
    direction: Direction,
    pids: [u32; 2],
    data: &[PathBuf; 2],
) -> Result<()> {
    let mut perfs: Vec<Command> = pids
        .iter()
        .zip(data)
        .map(|(pid, data)| {
            let mut perf = Command::new("perf");
            perf.args(["record", "-q", "-g", "-F", RATE, "-e", "cpu-clock", "-p"])
                .arg(pid.to_string())
                .arg("-o")
                .arg(data)
                .args(["--", "sleep"])
                .arg(TIME.as_secs().to_string());
            perf
        })
        .collect();
    let mut recordings = Vec::new();
    // It begins when the stream has found its speed.
    let at = || {
        let started = perfs.drain(..);
        recordings.extend(started.map(|mut perf| thread::spawn(move || perf.output())));
        Ok(())
    };
    let (lab, target) = (contender.lab(), contender.target());
    let streams = Streams::new(1, direction);
    load::tcp(lab, target, streams, TIME + TIME / 8, at)?;
    for recording in recordings {
        let said = recording.join().ok().context("perf crashed")?;
        let said = said.context("cannot start perf")?;
        if !said.status.success() {
            bail!("perf: {}", String::from_utf8_lossy(&said.stderr).trim());
        }
    }
    Ok(())
}

/// Share in per cent and name of each symbol, largest first. The share is that of samples in the
/// symbol itself, or with `--children` also in the functions that it called.
fn report(data: &Path, children: &str) -> Result<Vec<(f64, String)>> {
    let said = Command::new("perf")
        .args(["report", "--stdio", children, "-g", "none", "-i"])
        .arg(data)
        .args(["--percentage", "relative", "--sort", "sym"])
        .output()
        .context("cannot start perf")?;
    let text = String::from_utf8_lossy(&said.stdout);
    let symbols: Vec<(f64, String)> = text
        .lines()
        .filter_map(|line| {
            let (share, rest) = line.trim_start().split_once('%')?;
            // With children, the share of the symbol itself comes second.
            let name = rest.rsplit_once('%').map_or(rest, |(_, name)| name);
            Some((share.parse().ok()?, name.trim().to_owned()))
        })
        .collect();
    if symbols.is_empty() {
        bail!(
            "perf saw nothing: {}",
            String::from_utf8_lossy(&said.stderr).trim()
        );
    }
    Ok(symbols)
}

fn parts(symbols: &[(f64, String)]) -> Vec<(&'static str, f64)> {
    let names = PARTS.iter().map(|&(part, _)| part);
    let names = names.chain(REST.map(|(_, part)| part));
    let mut shares: Vec<(&'static str, f64)> = names.map(|part| (part, 0.0)).collect();
    for (share, name) in symbols {
        let known = PARTS
            .iter()
            .position(|(_, words)| words.iter().any(|word| name.contains(word)));
        let at = known.unwrap_or_else(|| {
            let rest = REST.iter().position(|(mark, _)| name.starts_with(mark));
            PARTS.len() + rest.unwrap_or(1)
        });
        shares[at].1 += share;
    }
    shares.sort_unstable_by(|one, other| other.1.total_cmp(&one.1));
    shares
}
