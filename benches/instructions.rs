//! Counts the instructions of the cases of [`cases`]: `cargo bench --bench instructions`.
//!
//! Each case runs once more in this program under `valgrind --tool=callgrind`, which collects
//! inside [`counted`] alone. Counts do not depend on other load of the machine, so they show a
//! regression of one per cent where times differ by ten. The program compares them with those of
//! the last run, in `target/bench/instructions.json`. With `--limit PERCENT` a greater increase is
//! a failure.
//!
//! Valgrind knows neither AVX-512 nor VAES, so it counts AES-GCM on its AVX2 or AES-NI path. The
//! cost of the bytes differs from that on the processor; the cost of everything around them does
//! not.

#![allow(
    clippy::missing_docs_in_private_items,
    reason = "nothing here is used elsewhere"
)]
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::disallowed_methods,
    reason = "a command"
)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

mod cases;

/// Steps to count. The result is the mean of some hundred, because lists and windows have periods.
const STEPS: u32 = 512;

/// This argument tells the program that it runs under valgrind.
const COUNT: &str = "--count";

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let Some(at) = args.iter().position(|arg| arg == COUNT) {
        count(args.get(at + 1).context("--count NAME")?)?;
        return Ok(ExitCode::SUCCESS);
    }
    // `cargo test --benches` starts benches as well, but without this argument.
    if !args.iter().any(|arg| arg == "--bench") {
        println!("to be run by `cargo bench --bench instructions`");
        return Ok(ExitCode::SUCCESS);
    }
    let limit = match args.iter().position(|arg| arg == "--limit") {
        Some(at) => {
            let percent = args.get(at + 1).context("--limit PERCENT")?;
            Some(percent.parse::<f64>().context("--limit PERCENT")?)
        }
        None => None,
    };
    if Command::new("valgrind").arg("--version").output().is_err() {
        println!("skipped: valgrind is not on PATH (Debian: apt-get install valgrind)");
        return Ok(ExitCode::SUCCESS);
    }
    compare(limit)
}

fn compare(limit: Option<f64>) -> Result<ExitCode> {
    let file = directory()?.join("instructions.json");
    let before: BTreeMap<String, u64> = fs::read(&file)
        .ok()
        .and_then(|text| serde_json::from_slice(&text).ok())
        .unwrap_or_default();
    let mut now = BTreeMap::new();
    let mut worst = 0.0_f64;
    println!(
        "{:<32}{:>14}{:>12}{:>14}",
        "instructions", "a step", "a byte", "last run"
    );
    for case in cases::all() {
        let count = collect(case.name)?;
        let change = before.get(case.name).map(|&last| {
            let change = (count as f64 / last as f64 - 1.0) * 100.0;
            worst = worst.max(change);
            format!("{change:+.1} %")
        });
        let a_byte = (case.bytes > 0).then(|| format!("{:.3}", count as f64 / case.bytes as f64));
        println!(
            "{:<32}{count:>14}{:>12}{:>14}",
            case.name,
            a_byte.unwrap_or_default(),
            change.unwrap_or_default()
        );
        now.insert(case.name.to_owned(), count);
    }
    if let Some(limit) = limit
        && worst > limit
    {
        println!("more than {limit} % above the last run, which stays the measure");
        return Ok(ExitCode::FAILURE);
    }
    fs::write(&file, serde_json::to_vec_pretty(&now)?)
        .with_context(|| format!("cannot write {}", file.display()))?;
    Ok(ExitCode::SUCCESS)
}

/// Counts the instructions of one step of a case.
fn collect(name: &str) -> Result<u64> {
    let said = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg("--toggle-collect=*counted*")
        .arg(std::env::current_exe()?)
        .args([COUNT, name])
        .output()
        .context("cannot start valgrind")?;
    let text = String::from_utf8_lossy(&said.stderr);
    let collected = text.lines().find_map(|line| {
        line.split_once("Collected : ")?
            .1
            .trim()
            .parse::<u64>()
            .ok()
    });
    match collected {
        Some(total) if said.status.success() && total > 0 => Ok(total / u64::from(STEPS)),
        _ => bail!("{name}: valgrind counted nothing: {text}"),
    }
}

/// Runs a case under valgrind.
fn count(name: &str) -> Result<()> {
    let case = cases::all()
        .into_iter()
        .find(|case| case.name == name)
        .context("no such case")?;
    let mut work = (case.build)()?;
    work.prepare()?;
    counted(work.as_mut(), STEPS.min(case.round));
    Ok(())
}

#[inline(never)]
fn counted(work: &mut dyn cases::Work, steps: u32) {
    for _ in 0..steps {
        work.step();
    }
}

/// `target/bench`, wherever the target directory is. The executable lies in `target/release/deps`.
fn directory() -> Result<PathBuf> {
    let exe = std::env::current_exe()?;
    let target = exe.ancestors().nth(3).unwrap_or(Path::new("."));
    let path = target.join("bench");
    fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
    Ok(path)
}
