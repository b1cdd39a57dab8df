//! Tells the binary which commit it is built from, for `ipmoved --version`.
//!
//! The commit is what `IPMOVED_COMMIT` says, for those who build from an archive; else that of the
//! git repository whose root this is; else the one that `cargo package` has written down. Without
//! any of these the version is that of Cargo.toml alone. Nothing of the time or the machine goes
//! in, so that the same sources make the same binary.

#![allow(
    clippy::disallowed_methods,
    reason = "an edge: it reads the environment and asks git"
)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// Where `cargo package` writes the commit down.
const PACKAGED: &str = ".cargo_vcs_info.json";

/// Digits of a commit that tell it from every other.
const DIGITS: usize = 12;

fn main() {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    println!("cargo::rerun-if-env-changed=IPMOVED_COMMIT");
    let given = env::var("IPMOVED_COMMIT").ok().filter(|it| !it.is_empty());
    let commit = given
        .or_else(|| of_repository(&root))
        .or_else(|| of_package(&root));
    let version = env::var("CARGO_PKG_VERSION").unwrap_or_default();
    let version = match commit {
        Some(commit) => format!("{version} ({commit})"),
        None => version,
    };
    println!("cargo::rustc-env=IPMOVED_VERSION={version}");
}

/// Commit and day of the repository, with a mark if a file differs from it.
fn of_repository(root: &Path) -> Option<String> {
    let git = |args: &[&str]| {
        // It may refresh the index of a repository that is only read otherwise.
        let mut git = Command::new("git");
        let git = git.arg("--no-optional-locks").args(args).current_dir(root);
        let said = git.output().ok().filter(|said| said.status.success())?;
        let text = String::from_utf8(said.stdout).ok()?;
        Some(text.trim().to_owned())
    };
    // An archive may lie within a repository of something else.
    let top = git(&["rev-parse", "--show-toplevel"])?;
    if fs::canonicalize(top).ok()? != fs::canonicalize(root).ok()? {
        return None;
    }
    // A debug build names the state of the sources that it was made from, and is not made anew
    // because they were committed. One for release names the commit.
    let is_release = env::var("PROFILE").is_ok_and(|profile| profile == "release");
    // Each commit, merge and checkout is noted in the first; where there is none, the others tell.
    let mut watched = vec!["logs/HEAD".to_owned(), "HEAD".to_owned()];
    watched.extend(git(&["symbolic-ref", "--quiet", "HEAD"]));
    for name in watched.into_iter().filter(|_| is_release) {
        let path = git(&["rev-parse", "--git-path", &name]).map(|path| root.join(path));
        // One that is not there would count as changed each time.
        for path in path.into_iter().filter(|path| path.exists()) {
            println!("cargo::rerun-if-changed={}", path.display());
        }
    }
    for name in ["build.rs", "Cargo.toml", "Cargo.lock", "src"] {
        println!("cargo::rerun-if-changed={name}");
    }
    let digits = format!("--abbrev={DIGITS}");
    let commit = git(&["describe", "--always", "--dirty", "--exclude=*", &digits])?;
    let day = git(&["show", "--no-patch", "--format=%cs", "HEAD"])?;
    Some(format!("{commit} {day}"))
}

/// The commit that `cargo package` noted: `{"git": {"sha1": "…"}, …}`.
fn of_package(root: &Path) -> Option<String> {
    let text = fs::read_to_string(root.join(PACKAGED)).ok()?;
    let (_, rest) = text.split_once("\"sha1\"")?;
    let commit = rest.split('"').nth(1)?;
    let is_commit = commit.len() >= DIGITS && commit.bytes().all(|c| c.is_ascii_hexdigit());
    is_commit.then(|| commit[..DIGITS].to_owned())
}
