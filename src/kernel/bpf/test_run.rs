//! Runs loaded programs on packets, without an interface.

use std::ffi::c_int;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::bpf;

/// What a program did with a packet.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::kernel) struct Outcome {
    pub(in crate::kernel) verdict: i32,
    pub(in crate::kernel) mark: u32,
    /// The frame afterwards.
    pub(in crate::kernel) frame: Vec<u8>,
}

/// Runs a loaded program on a frame (`BPF_PROG_TEST_RUN`), as if the frame had arrived on `lo`.
pub(in crate::kernel) fn run(program: BorrowedFd<'_>, frame: &[u8]) -> Outcome {
    run_marked(program, frame, 0)
}

/// As [`run`], for a frame that bears a mark.
pub(in crate::kernel) fn run_marked(program: BorrowedFd<'_>, frame: &[u8], mark: u32) -> Outcome {
    repeat(program, frame, [mark, 0], 1).0
}

/// As [`run`], for a frame that came by another interface and is about to leave by `lo`.
pub(in crate::kernel) fn run_forwarded(
    program: BorrowedFd<'_>,
    frame: &[u8],
    came_by: u32,
) -> Outcome {
    repeat(program, frame, [0, came_by], 1).0
}

/// How long a run takes, as the kernel counts: the least mean of several long series.
pub(in crate::kernel) fn nanoseconds(program: BorrowedFd<'_>, frame: &[u8]) -> u32 {
    let series = (0..7).map(|_| repeat(program, frame, [0; 2], 200_000).1);
    series.min().unwrap_or_default()
}

/// Runs a program so often on the same frame, with this mark and ingress interface. Returns the last outcome, and the mean duration in
/// nanoseconds.
fn repeat(program: BorrowedFd<'_>, frame: &[u8], with: [u32; 2], times: u32) -> (Outcome, u32) {
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
    /// Bytes that a program may add before the frame.
    const ROOM: usize = 64;
    let mut after = vec![0; frame.len() + ROOM];
    let mut context = [0_u32; 48];
    let mut before = context;
    [before[MARK], before[INGRESS_IFINDEX]] = with;
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
    unsafe { bpf(BPF_PROG_TEST_RUN, &mut attr) }.expect("BPF_PROG_TEST_RUN");
    after.truncate(attr.data_size_out as usize);
    let outcome = Outcome {
        frame: after,
        verdict: attr.retval.cast_signed(),
        mark: context[MARK],
    };
    (outcome, attr.duration)
}
