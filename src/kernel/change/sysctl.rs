//! A setting under `/proc/sys`, in the calling thread's network namespace.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::{ChangeError, Kind, Means, Presence, Undone};
use crate::kernel::netlink::Netlink;

/// A setting and its value.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Sysctl {
    /// Path below `/proc/sys`, as in `net/ipv4/tcp_fwmark_accept`.
    pub path: String,
    /// The value before.
    pub from: String,
    /// The value that is wanted.
    pub to: String,
}

impl fmt::Display for Sysctl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // As sysctl(8) writes it: dots between the parts, and a slash for a dot within one.
        let dotted = |c| match c {
            '/' => '.',
            '.' => '/',
            c => c,
        };
        let name: String = self.path.chars().map(dotted).collect();
        write!(f, "sysctl {name}: {} → {}", self.from, self.to)
    }
}

impl Kind for Sysctl {
    fn object(&self) -> String {
        format!("sysctl {}", self.path)
    }

    /// A value that is there already may be an administrator's.
    fn is_unmistakable(&self) -> bool {
        false
    }

    fn present(&self, _netlink: &Netlink) -> Result<Presence, ChangeError> {
        Ok(Presence::of(read_sysctl(&self.path)? == self.to))
    }

    fn make(&self, _with: &Means<'_>) -> Result<(), ChangeError> {
        Ok(write_sysctl(&self.path, &self.to)?)
    }

    /// A value that is neither ours nor the earlier one is somebody else's, and stays.
    fn undo(&self, _netlink: &Netlink) -> Result<Undone, ChangeError> {
        let now = read_sysctl(&self.path)?;
        if now == self.from {
            return Ok(Undone::Gone);
        }
        if now != self.to {
            return Ok(Undone::Foreign(format!(
                "somebody has set it to {now} since; it stays so"
            )));
        }
        write_sysctl(&self.path, &self.from)?;
        Ok(Undone::Gone)
    }

    fn remedy(&self, error: &ChangeError) -> Option<&'static str> {
        if error.is_unsupported() {
            return Some("the kernel has no such setting");
        }
        (error.errno() == Some(Errno::ROFS)).then_some(
            "/proc/sys is read-only here, as in most containers; set it on the host, or run \
             ipmoved there",
        )
    }
}

/// The value of a setting, without the final newline.
pub(in crate::kernel) fn read_sysctl(path: &str) -> io::Result<String> {
    Ok(fs::read_to_string(file(path))?.trim_end().to_owned())
}

/// Writes a value with a newline: without it, an empty value would be no write at all.
fn write_sysctl(path: &str, value: &str) -> io::Result<()> {
    fs::write(file(path), format!("{value}\n"))
}

fn file(path: &str) -> PathBuf {
    Path::new("/proc/sys").join(path)
}
