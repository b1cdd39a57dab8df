//! The possible tunnel beside everything else that carries a moved address:
//! `cargo bench --bench tunnel`.
//!
//! ```text
//!                       ┌── old server 192.0.2.1, holds 192.0.2.5 (moved)
//!  client ── router ────┤              ║ the contender
//!                       └── new server 198.51.100.2: sinks and sources
//! ```
//!
//! Each contender gets a lab of its own. All labs stand at the same time, and the rounds are
//! interleaved, so a disturbance of the machine disturbs all contenders. Figures are medians over
//! the rounds. A reader should look at the ratios, since all five parties (client, router, both
//! servers, generator) share this machine's processors.
//!
//! | file | owns |
//! |---|---|
//! | [`contenders`] | how to set up each contender: by `ipmoved`, by the kernel, by other tunnels |
//! | [`counters`] | the kernel's counters |
//! | [`delay`] | a path with a length, for the impaired ones |
//! | [`exchange`] | round trips of small messages, many under way |
//! | [`flood`] | UDP as fast as it goes, or at a pace |
//! | [`impair`] | loss and reordering on the way to the new server |
//! | [`load`] | traffic: TCP streams, pings, connections |
//! | [`measures`] | the measurements of a round |
//! | [`profile`] | where the daemons' time goes, as `perf` sees it |
//! | [`report`] | table, JSON, SVG, and the page in `contrib` |
//!
//! Everything lives in namespaces without names and goes with this process, however it ends. The
//! bench needs root. Foreign programs (`ip`, `nft` or `iptables`, `wg`, `wireguard-go`, …) set up
//! the other contenders, and with `tc` the impaired paths. If one is not on PATH, the bench leaves
//! its contender out and says so. `ipmoved` and the traffic need none.

#![allow(
    clippy::missing_docs_in_private_items,
    reason = "nothing here is used elsewhere"
)]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command")]
#![allow(
    clippy::disallowed_methods,
    reason = "a bench measures real kernels by the real clock"
)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use rustix::process::{Resource, getrlimit, setrlimit};

use contenders::{Contender, Kind};
use ipmoved::lab::{Lab, interrupt};
use measures::{Effort, Wanted};
use report::Report;

mod contenders;
mod counters;
mod delay;
mod exchange;
mod flood;
mod impair;
mod load;
mod measures;
mod profile;
mod report;

#[derive(Parser)]
#[command(about = "The possible tunnel, side by side with what else carries a moved address")]
struct Args {
    /// Do less of everything: under three minutes
    #[arg(long)]
    quick: bool,
    /// Number of rounds; figures are their medians (5; with --quick 3)
    #[arg(long)]
    rounds: Option<usize>,
    /// Seconds of each TCP run (2; with --quick 0.5)
    #[arg(long)]
    seconds: Option<f64>,
    /// Only contenders whose name contains one of these (comma-separated)
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Only figures whose name contains one of these (comma-separated), on a sound path
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        conflicts_with = "page"
    )]
    figures: Vec<String>,
    /// Another ipmoved binary, as a contender of its own: before and after in one run
    #[arg(long)]
    against: Vec<PathBuf>,
    /// More arguments for both ipmoved daemons, such as "--lanes 2"
    #[arg(long, value_name = "ARGS", allow_hyphen_values = true)]
    daemon_args: Option<String>,
    /// Fill the flow table with a million flows even with --quick
    #[arg(long)]
    flows: bool,
    /// Sample the daemons with `perf` under one TCP stream (always with --page, if it is on PATH)
    #[arg(long)]
    profile: bool,
    /// Write table, profile and picture into contrib/performance.md and .svg
    #[arg(long)]
    page: bool,
    /// Passed by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    // `cargo test --benches` starts benches as well, but without this argument.
    if !args.bench {
        println!("to be run by `cargo bench --bench tunnel`");
        return ExitCode::SUCCESS;
    }
    interrupt::watch();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let started = Instant::now();
    allow_open_files();
    let mut effort = if args.quick {
        Effort::QUICK
    } else {
        Effort::FULL
    };
    if let Some(seconds) = args.seconds {
        effort.tcp = Duration::from_secs_f64(seconds);
    }
    let rounds = args.rounds.unwrap_or(if args.quick { 3 } else { 5 }).max(1);
    let wanted = |kind: &Kind| {
        let name = kind.name();
        args.only.is_empty() || args.only.iter().any(|part| name.contains(part.as_str()))
    };
    let daemon_args: Vec<String> = args
        .daemon_args
        .iter()
        .flat_map(|text| text.split_whitespace().map(str::to_owned))
        .collect();
    let kinds: Vec<Kind> = Kind::all(&args.against)
        .into_iter()
        .filter(wanted)
        .collect();
    if kinds.is_empty() {
        bail!("--only names none of the contenders");
    }
    let labs = kinds
        .iter()
        .map(|_| {
            let lab = Lab::new()?;
            load::add_clients(&lab)?;
            Ok(lab)
        })
        .collect::<Result<Vec<_>>>()?;
    let possible = impair::probe(&labs[0]);
    let measured = Wanted(args.figures.clone());
    if possible.is_err() || measured.is_some() {
        effort.impaired = 0;
    }
    let mut report = Report::new(rounds, effort);
    if let Err(error) = possible {
        report.skipped("impaired paths", &format!("{error:#}"));
    }
    let mut contenders = Vec::new();
    for (kind, lab) in kinds.iter().zip(&labs) {
        pass()?;
        let name = kind.name();
        if args.quick && args.only.is_empty() && kind.is_left_out_when_quick() {
            report.skipped(&name, "by --quick; --only names it");
            continue;
        }
        match Contender::start(kind, lab, &daemon_args) {
            Ok(contender) => contenders.push(contender),
            // The bench is for this tunnel. Without it there is nothing to say.
            Err(error) if kind.is_ipmoved() => return Err(error.context(name)),
            Err(error) => report.skipped(&name, &format!("{error:#}")),
        }
    }
    for contender in &contenders {
        report.add(contender.name(), measures::at_rest(contender)?);
    }
    for round in 1..=rounds {
        for contender in &contenders {
            eprint!(
                "\rround {round} of {rounds}: {:<24} {:>4} s ",
                contender.name(),
                started.elapsed().as_secs()
            );
            let figures = measures::round(contender, &effort, &measured)
                .with_context(|| format!("{}, round {round}", contender.name()))?;
            report.add(contender.name(), figures);
            if round <= effort.impaired {
                let figures = measures::impaired_paths(contender, &effort)
                    .with_context(|| format!("{}, round {round}", contender.name()))?;
                report.add(contender.name(), figures);
            }
        }
    }
    if args.flows || !args.quick && !measured.is_some() {
        for few in contenders.iter().filter(|one| one.is_looked_into()) {
            eprint!("\rfilling the flow table of {:<24}", few.name());
            let lab = Lab::new()?;
            let many = Contender::start(few.kind(), &lab, &daemon_args)?;
            let figures = measures::many_flows(few, &many, &effort)
                .with_context(|| format!("{}, many flows", few.name()))?;
            report.add(few.name(), figures);
            many.stop()?;
        }
    }
    if args.profile || args.page {
        for contender in contenders.iter().filter(|one| one.is_looked_into()) {
            let name = contender.name();
            eprint!("\rprofiling {name:<50}");
            match profile::of(contender, contender.lab().dir()) {
                Ok(text) => report.profile(&name, text),
                Err(error) => report.skipped(&format!("profile of {name}"), &format!("{error:#}")),
            }
        }
    }
    eprintln!("\r{:<60}", "");
    // This stops each contender rather than drop it, so that it reports one that does not end well.
    for contender in contenders {
        contender.stop()?;
    }
    drop(labs);
    report.finish(started.elapsed(), args.page)
}

/// Allows as many open files as an administrator permits. A flood of many flows has a socket for
/// each, and some machines begin with 1,024.
fn allow_open_files() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // If this is refused, the first socket too many says so.
    let _ = setrlimit(Resource::Nofile, limit);
}

/// Refuses to go on after a signal.
fn pass() -> Result<()> {
    if interrupt::came() {
        bail!("interrupted; everything has been removed");
    }
    Ok(())
}

/// Sleeps, unless interrupted.
fn rest(time: Duration) -> Result<()> {
    const STEP: Duration = Duration::from_millis(50);
    let end = Instant::now() + time;
    loop {
        pass()?;
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        std::thread::sleep(left.min(STEP));
    }
}
