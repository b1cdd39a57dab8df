//! Runs loaded programs on packets, without an interface.

use std::ffi::c_int;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;

use super::bpf;

/// What a program did with a packet.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::kernel) struct Outcome {
    pub(in crate::kernel) verdict: i32,
    pub(in crate::kernel) mark: u32,
    /// The frame afterwards.
    pub(in crate::kernel) frame: Vec<u8>,
}

/// The verdict of a loaded program about a frame, as if that had arrived by the interface with this
/// index; 0: by `lo`.
///
/// # Errors
/// If the kernel refuses.
pub(in crate::kernel) fn ask(
    program: BorrowedFd<'_>,
    frame: &[u8],
    ifindex: u32,
) -> Result<i32, Errno> {
    Ok(repeat(program, frame, [0, 0, ifindex], 1)?.0.verdict)
}

/// Runs a loaded program on a frame (`BPF_PROG_TEST_RUN`), as if the frame had arrived on `lo`.
#[cfg(test)]
pub(in crate::kernel) fn run(program: BorrowedFd<'_>, frame: &[u8]) -> Outcome {
    run_marked(program, frame, 0)
}

/// As [`run`], for a frame that bears a mark.
#[cfg(test)]
pub(in crate::kernel) fn run_marked(program: BorrowedFd<'_>, frame: &[u8], mark: u32) -> Outcome {
    repeat(program, frame, [mark, 0, 0], 1)
        .expect("BPF_PROG_TEST_RUN")
        .0
}

/// As [`run`], for a frame that came by another interface and is about to leave by `lo`.
#[cfg(test)]
pub(in crate::kernel) fn run_forwarded(
    program: BorrowedFd<'_>,
    frame: &[u8],
    came_by: u32,
) -> Outcome {
    repeat(program, frame, [0, came_by, 0], 1)
        .expect("BPF_PROG_TEST_RUN")
        .0
}

/// How long a run takes, as the kernel counts: the least mean of several long series.
#[cfg(test)]
pub(in crate::kernel) fn nanoseconds(program: BorrowedFd<'_>, frame: &[u8]) -> u32 {
    let series = (0..7).map(|_| {
        let (_, took) = repeat(program, frame, [0; 3], 200_000).expect("BPF_PROG_TEST_RUN");
        took
    });
    series.min().unwrap_or_default()
}

/// Runs a program so often on the same frame, with this mark, the interface that it came by, and
/// the one where it is. Returns the last outcome, and the mean duration in nanoseconds.
fn repeat(
    program: BorrowedFd<'_>,
    frame: &[u8],
    with: [u32; 3],
    times: u32,
) -> Result<(Outcome, u32), Errno> {
    #[repr(C)]
    struct Attr {
        prog_fd: u32,
        retval: u32,
        data_size_in: u32,
        data_size_out: u32,
        data_in: u64,
        data_out: u64,
        repeat: u32,
        duration: u32,
        ctx_size_in: u32,
        ctx_size_out: u32,
        ctx_in: u64,
        ctx_out: u64,
    }
    const BPF_PROG_TEST_RUN: c_int = 10;
    /// Where `struct __sk_buff` has the mark.
    const MARK: usize = 2;
    /// And the interface that the packet came by.
    const INGRESS_IFINDEX: usize = 9;
    /// And where it is.
    const IFINDEX: usize = 10;
    /// Bytes that a program may add before the frame.
    const ROOM: usize = 64;
    let mut after = vec![0; frame.len() + ROOM];
    let mut context = [0_u32; 48];
    let mut before = context;
    [before[MARK], before[INGRESS_IFINDEX], before[IFINDEX]] = with;
    let mut attr = Attr {
        prog_fd: program.as_raw_fd() as u32,
        retval: 0,
        data_size_in: frame.len() as u32,
        data_size_out: after.len() as u32,
        data_in: frame.as_ptr() as u64,
        data_out: after.as_mut_ptr() as u64,
        repeat: times,
        duration: 0,
        ctx_size_in: size_of_val(&before) as u32,
        ctx_size_out: size_of_val(&context) as u32,
        ctx_in: before.as_ptr() as u64,
        ctx_out: context.as_mut_ptr() as u64,
    };
    // SAFETY: the attribute has the layout of BPF_PROG_TEST_RUN; frames and contexts outlive
    // the call.
    unsafe { bpf(BPF_PROG_TEST_RUN, &mut attr) }?;
    after.truncate(attr.data_size_out as usize);
    let outcome = Outcome {
        frame: after,
        verdict: attr.retval.cast_signed(),
        mark: context[MARK],
    };
    Ok((outcome, attr.duration))
}
