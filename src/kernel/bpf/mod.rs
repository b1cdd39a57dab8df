//! A tiny eBPF assembler and the few `bpf(2)` calls that the capture and steering programs need.
//!
//! ```text
//!   assembler   instructions and labels ──► a program
//!   load        a program ──► the kernel, with the verifier's words if it refuses
//!   map         the memory of programs, shared between them and this process
//! ```
//!
//! This file owns the system call itself. What the programs do is the business of
//! [`programs`](super::programs). The assembler knows no BTF, no loops and no relocations, so its
//! programs load on kernels from 5.10 on.
#![allow(unsafe_code, reason = "bpf(2) has no safe wrapper")]

mod assembler;
mod load;
mod map;
#[cfg(test)]
pub(super) mod test_run;

use std::ffi::c_int;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, setrlimit};

pub use assembler::{Alu, Assembler, Helper, If, Label, Reg, Size};
pub use load::Program;
pub use map::{Map, MapKind};

/// Longest name of a program or map that the kernel keeps (`BPF_OBJ_NAME_LEN` less the final NUL).
const MAX_NAME: usize = 15;

/// Why a program or a map could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BpfError {
    /// No privileges.
    #[error(
        "the kernel lets only privileged processes load BPF programs; run as root, or with CAP_BPF \
         and CAP_NET_ADMIN"
    )]
    Denied,
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
    /// The program is too large for its jumps.
    #[error("BPF program {name} is too large; move fewer addresses or ports, or whole addresses")]
    Jump {
        /// The program's name.
        name: &'static str,
    },
}

impl From<Errno> for BpfError {
    fn from(errno: Errno) -> Self {
        if errno == Errno::NOSYS {
            Self::Absent
        } else {
            Self::Denied
        }
    }
}

/// Raises `RLIMIT_MEMLOCK` if `make` fails with `EPERM`, and tries again: kernels before 5.11
/// charge maps and programs to that limit.
fn with_memlock_raised<T>(mut make: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    match make() {
        Err(Errno::PERM) => {
            let unlimited = Rlimit {
                current: None,
                maximum: None,
            };
            setrlimit(Resource::Memlock, unlimited)?;
            make()
        }
        other => other,
    }
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
