//! A tiny eBPF assembler and the few `bpf(2)` calls that the capture and steering programs need.
//!
//! ```text
//!   assembler   instructions and labels ──► a program
//!   load        a program ──► the kernel, with the verifier's words if it refuses
//!   loaded      programs that are in the kernel already, to be attached once more
//!   map         the memory of programs, shared between them and this process
//!   ring        records that programs hand to this process
//!   stack       what a program reads of its stack is what it has written (in tests)
//!   words       memory that this process can write without a system call
//!   supply      maps and programs that another process makes for this one
//! ```
//!
//! This file owns the system call itself. What the programs do is the business of
//! [`programs`](super::programs). The assembler knows no BTF, no loops and no relocations, so its
//! programs load on kernels from 5.10 on.
#![allow(unsafe_code, reason = "bpf(2) has no safe wrapper")]

mod assembler;
mod load;
mod loaded;
mod map;
mod ring;
#[cfg(test)]
mod stack;
pub(in crate::kernel) mod supply;
pub(super) mod test_run;
mod words;

use std::ffi::c_int;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::LazyLock;

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::CapabilitySet;

use crate::io::privileges;

pub use assembler::{Alu, Assembler, Helper, If, Label, Operand, Reg, Size};
pub use load::Program;
pub use loaded::Loaded;
pub use map::{Map, MapKind, Shape, of_program};
pub use ring::Ring;
pub use words::Words;

/// Longest name of a program or map that the kernel keeps (`BPF_OBJ_NAME_LEN` less the final NUL).
const MAX_NAME: usize = 15;

/// Why a program or a map could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BpfError {
    /// No privileges.
    #[error(
        "the kernel lets only privileged processes load BPF programs; {remedy}",
        remedy = privileges::remedy(
            "CAP_BPF and CAP_NET_ADMIN",
            "--cap-add BPF --cap-add NET_ADMIN"
        )
    )]
    Denied,
    /// The limit of locked memory is too low, on a kernel before 5.11.
    #[error(
        "this kernel counts BPF programs and maps as locked memory (before Linux 5.11), the limit \
         is too low, and raising it needs CAP_SYS_RESOURCE: raise it for ipmoved (`ulimit -l \
         unlimited`, LimitMEMLOCK=infinity, `docker run --ulimit memlock=-1`), or run it with that \
         capability"
    )]
    LockedMemory,
    /// The kernel has no `bpf(2)`.
    #[error("this kernel has no bpf(2) system call; it needs CONFIG_BPF_SYSCALL")]
    Absent,
    /// The kernel's verifier refused the program.
    #[error(
        "the kernel refuses BPF program {name}: {errno}: {words}; kernels from 5.10 on should take \
         it"
    )]
    Load {
        /// The program's name.
        name: &'static str,
        /// The kernel's error number.
        errno: Errno,
        /// The verifier's last line.
        words: String,
    },
    /// The map could not be made.
    #[error("the kernel refuses BPF map {name}: {errno}")]
    Map {
        /// The map's name.
        name: &'static str,
        /// The kernel's error number.
        errno: Errno,
    },
    /// Its descriptor cannot be had twice.
    #[error("cannot use BPF program or map {name} once more: {source}")]
    Descriptor {
        /// The name of the program or map.
        name: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The program is too large for its jumps.
    #[error("BPF program {name} is too large; move fewer addresses or ports, or whole addresses")]
    Jump {
        /// The program's name.
        name: &'static str,
    },
}

impl BpfError {
    /// What the kernel's error number says of the map with this name.
    pub(in crate::kernel) fn of_map(name: &'static str) -> impl Fn(Errno) -> Self + Copy {
        move |errno| Self::Map { name, errno }
    }
}

/// Raises `RLIMIT_MEMLOCK` if `make` fails with `EPERM` or `ENOMEM`, and tries again: kernels
/// before 5.11 charge maps and programs to that limit. A program that finds it exceeded while it
/// grows, as one with `LD_ABS` does, is told `ENOMEM` (`bpf_prog_realloc`).
///
/// # Errors
/// If this process may not make any. The error inside is about this one.
fn with_memlock_raised<T>(
    make: impl FnMut() -> Result<T, Errno>,
) -> Result<Result<T, Errno>, BpfError> {
    let unlimited = Rlimit {
        current: None,
        maximum: None,
    };
    with_limit_raised(make, || setrlimit(Resource::Memlock, unlimited).is_ok())
}

/// The same, with whatever raises the limit and says whether that went well.
fn with_limit_raised<T>(
    mut make: impl FnMut() -> Result<T, Errno>,
    raise: impl FnOnce() -> bool,
) -> Result<Result<T, Errno>, BpfError> {
    let mut result = make();
    let mut raised = None;
    if let Err(Errno::PERM | Errno::NOMEM) = result {
        raised = Some(raise());
        if raised == Some(true) {
            result = make();
        }
    }
    match result {
        Err(Errno::NOSYS) => Err(BpfError::Absent),
        Err(Errno::PERM) if raised == Some(false) => {
            let held = rustix::thread::capabilities(None).map(|sets| sets.effective);
            Err(why_denied(
                &release(),
                held.unwrap_or(CapabilitySet::empty()),
            ))
        }
        Err(Errno::PERM) => Err(BpfError::Denied),
        Err(Errno::NOMEM) if raised == Some(false) && counts_locked_memory(&release()) => {
            Err(BpfError::LockedMemory)
        }
        other => Ok(other),
    }
}

/// Why a process was refused that could not raise the limit: `EPERM` means either.
fn why_denied(release: &str, held: CapabilitySet) -> BpfError {
    let may = held.intersects(CapabilitySet::BPF | CapabilitySet::SYS_ADMIN);
    if may && counts_locked_memory(release) {
        BpfError::LockedMemory
    } else {
        BpfError::Denied
    }
}

/// This kernel's release, or nothing.
fn release() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default()
}

/// Whether a kernel of this release counts programs and maps as locked memory.
fn counts_locked_memory(release: &str) -> bool {
    is_older(release, (5, 11))
}

/// Whether this kernel sends packets without a link-layer header to a GRE tunnel over IPv6, as it
/// does to other tunnels: Linux 5.16 and newer. Before, it drops what `bpf_redirect` brings there,
/// since it misses an Ethernet header (`dev_is_mac_header_xmit`, include/linux/if_arp.h). Asked
/// once, since a confined daemon does not see the release.
pub fn redirects_to_ip6gre() -> bool {
    static DOES: LazyLock<bool> = LazyLock::new(|| !is_older(&release(), (5, 16)));
    *DOES
}

/// Whether a release is one of before this version; not if it cannot be read.
fn is_older(release: &str, version: (u32, u32)) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut number = || numbers.next()?.parse::<u32>().ok();
    number().zip(number()).is_some_and(|it| it < version)
}

fn object_name(name: &str) -> [u8; 16] {
    let mut out = [0; 16];
    let length = name.len().min(MAX_NAME);
    out[..length].copy_from_slice(&name.as_bytes()[..length]);
    out
}

/// As [`bpf`], for the commands that return a descriptor (which is close-on-exec).
///
/// # Safety
/// As [`bpf`].
unsafe fn bpf_fd<A>(command: c_int, attr: &mut A) -> Result<OwnedFd, Errno> {
    // SAFETY: as the caller promises.
    let fd = unsafe { bpf(command, attr) }?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Calls `bpf(2)`.
///
/// # Safety
/// `A` must have the layout of `union bpf_attr` for `command`, and its pointers must be valid.
unsafe fn bpf<A>(command: c_int, attr: &mut A) -> Result<c_int, Errno> {
    let attr: *mut A = attr;
    // SAFETY: as the caller promises; the kernel reads no more of the attribute than its size.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attr, size_of::<A>()) };
    if result < 0 {
        let error = io::Error::last_os_error();
        return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO));
    }
    Ok(result as c_int)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_that_is_too_low_is_told_from_missing_privileges() {
        let (bpf, none) = (CapabilitySet::BPF, CapabilitySet::NET_ADMIN);
        for (release, held, is_limit) in [
            ("5.10.0-28-amd64", bpf, true),
            ("5.10.0-28-amd64", CapabilitySet::SYS_ADMIN, true),
            ("5.10.0-28-amd64", none, false),
            ("5.11.0", bpf, false),
            ("6.18.1+", bpf, false),
            ("", bpf, false),
        ] {
            let error = why_denied(release, held);
            assert_eq!(
                matches!(error, BpfError::LockedMemory),
                is_limit,
                "{release}"
            );
        }
        // Some other error, and success, are not looked at.
        let other = with_memlock_raised(|| Err::<(), _>(Errno::INVAL));
        assert!(matches!(other, Ok(Err(Errno::INVAL))));
        assert!(matches!(with_memlock_raised(|| Ok(7)), Ok(Ok(7))));
        // A program that has grown beyond the limit is made once more, with a higher one.
        let mut answers = [Ok(7), Err(Errno::NOMEM)].into_iter().rev();
        let grown = with_limit_raised(|| answers.next().unwrap_or(Err(Errno::IO)), || true);
        assert!(matches!(grown, Ok(Ok(7))), "{grown:?}");
        let absent = with_memlock_raised(|| Err::<(), _>(Errno::NOSYS));
        assert!(matches!(absent, Err(BpfError::Absent)));
    }
}
