//! Copies of the key in the arguments and the environment, where the kernel shows them to others.
//!
//! The copies that `clap`, `toml` and the standard library made of arguments and file, on the heap
//! and on the stack, are out of reach. They are freed, and overwritten only by what comes next. A
//! key in a file of its own (`--psk-file`) is read into one buffer that is wiped.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use tracing::debug;
use zeroize::Zeroizing;

use crate::settings::psk::PSK_VARIABLE;

/// Overwrites the key where the kernel shows it to others: in the arguments (`ps`) and in the
/// environment (`/proc/PID/environ`) that the process was started with.
///
/// Call it while there is one thread, after the settings have been read.
pub fn forget_command_line() {
    if let Err(error) = forget() {
        debug!(%error, "arguments and environment of this process stay readable");
    }
}

fn forget() -> io::Result<()> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let [arguments, environment] = areas(&stat).ok_or(io::ErrorKind::InvalidData)?;
    // The process writes to itself through the file that the kernel has for that. Nobody holds the
    // strings that it overwrites: the standard library hands out copies.
    let memory = File::options()
        .read(true)
        .write(true)
        .open("/proc/self/mem")?;
    for (area, secrets) in [
        (arguments, secret_arguments as fn(&[u8]) -> _),
        (environment, secret_variables),
    ] {
        let mut bytes = Zeroizing::new(vec![0; (area.end - area.start) as usize]);
        memory.read_exact_at(&mut bytes, area.start)?;
        for secret in secrets(&bytes) {
            let blank = vec![b'x'; secret.len()];
            memory.write_all_at(&blank, area.start + secret.start as u64)?;
        }
    }
    Ok(())
}

/// Where arguments and environment lie: fields 48 to 51 of `/proc/PID/stat` (proc_pid_stat(5)).
fn areas(stat: &str) -> Option<[Range<u64>; 2]> {
    // The name in parentheses may hold anything; the fields behind it start with the third.
    let (_, fields) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    let area = |first: usize| {
        let (start, end) = (field(first)?, field(first + 1)?);
        (start != 0 && start <= end).then_some(start..end)
    };
    Some([area(48)?, area(50)?])
}

/// The strings of such an area, each with its range.
fn strings(bytes: &[u8]) -> impl Iterator<Item = (Range<usize>, &[u8])> {
    let mut start = 0;
    bytes.split(|&byte| byte == 0).map(move |text| {
        let range = start..start + text.len();
        start = range.end + 1;
        (range, text)
    })
}

fn secret_arguments(bytes: &[u8]) -> Vec<Range<usize>> {
    const FLAG: &[u8] = b"--psk";
    let mut secrets = Vec::new();
    let mut follows = false;
    for (range, text) in strings(bytes) {
        if follows {
            secrets.push(range);
        } else if text.starts_with(b"--psk=") {
            secrets.push(range.start + FLAG.len() + 1..range.end);
        }
        follows = !follows && text == FLAG;
    }
    secrets
}

fn secret_variables(bytes: &[u8]) -> Vec<Range<usize>> {
    let name = format!("{PSK_VARIABLE}=");
    strings(bytes)
        .filter(|(_, text)| text.starts_with(name.as_bytes()))
        .map(|(range, _)| range.start + name.len()..range.end)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(bytes: &[u8], secrets: fn(&[u8]) -> Vec<Range<usize>>) -> Vec<&[u8]> {
        secrets(bytes)
            .into_iter()
            .map(|range| &bytes[range])
            .collect()
    }

    #[test]
    fn the_key_is_found_among_the_arguments() {
        let line = b"ipmoved\0--psk\0KEY\0--peer\0--psk-file\0--psk=OTHER\0--psk\0--psk\0x\0";
        let expected: [&[u8]; 3] = [b"KEY", b"OTHER", b"--psk"];
        assert_eq!(found(line, secret_arguments), expected);
        assert!(found(b"ipmoved\0--psk-file\0/etc/psk\0", secret_arguments).is_empty());
        assert!(found(b"", secret_arguments).is_empty());
    }

    #[test]
    fn the_key_is_found_in_the_environment() {
        let environment = b"A=1\0IPMOVED_PSK=KEY\0IPMOVED_PSK_FILE=x\0B=2\0";
        assert_eq!(found(environment, secret_variables), [b"KEY"]);
    }

    #[test]
    fn the_areas_are_those_that_the_kernel_shows() {
        let stat = fs::read_to_string("/proc/self/stat").unwrap();
        let [arguments, environment] = areas(&stat).unwrap();
        let memory = File::open("/proc/self/mem").unwrap();
        for (area, file) in [
            (arguments, "/proc/self/cmdline"),
            (environment, "/proc/self/environ"),
        ] {
            let mut bytes = vec![0; (area.end - area.start) as usize];
            memory.read_exact_at(&mut bytes, area.start).unwrap();
            assert_eq!(bytes, fs::read(file).unwrap(), "{file}");
        }
        assert!(areas("1 (a) b) S 1").is_none());
    }
}
