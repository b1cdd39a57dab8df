//! How a program gets into the kernel.

use std::ffi::c_int;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::thread::CapabilitySet;

use super::{BpfError, bpf_fd, object_name, supply, with_memlock_raised};

/// The licence that we tell the kernel. `bpf_fib_lookup` needs a GPL-compatible one.
const LICENCE: &std::ffi::CStr = c"Dual MIT/GPL";

/// Space for the verifier's log about a refused program. The kernel truncates a longer log.
const VERIFIER_LOG_BYTES: usize = 1 << 20;

/// An assembled program of type `SCHED_CLS`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Program {
    name: &'static str,
    code: Vec<[u8; 8]>,
}

/// With either of these the verifier looks less closely (`allow_ptr_leaks`, capabilities(7)).
const LENIENT: CapabilitySet = CapabilitySet::PERFMON.union(CapabilitySet::SYS_ADMIN);

/// What to try without them: Linux 5.10 and 6.1 refuse programs that later kernels take.
const WITHOUT_PERFMON: &str = " (without CAP_PERFMON, which older kernels want for it: \
                               AmbientCapabilities or CapabilityBoundingSet of the unit, or \
                               `docker run --cap-add PERFMON`)";

impl Program {
    pub(super) fn new(name: &'static str, code: Vec<[u8; 8]>) -> Self {
        Self { name, code }
    }

    /// Its name, which the kernel shows in `tc filter` and `bpftool prog`.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Its instructions, as the kernel takes them.
    #[cfg(test)]
    pub(in crate::kernel) fn code(&self) -> &[[u8; 8]] {
        &self.code
    }

    /// Loads it into the kernel, which keeps it as long as a descriptor or a filter refers to it.
    ///
    /// # Errors
    /// If the kernel refuses; the verifier's last words are in the error.
    pub fn load(&self) -> Result<OwnedFd, BpfError> {
        supply::next(|| self.load_into_kernel())
    }

    fn load_into_kernel(&self) -> Result<OwnedFd, BpfError> {
        let errno = match with_memlock_raised(|| self.load_once(&mut []))? {
            Ok(fd) => return Ok(fd),
            Err(errno) => errno,
        };
        // The verifier writes its log only on request, and that makes loading slower. So we ask
        // only after a refusal.
        let mut log = vec![0; VERIFIER_LOG_BYTES];
        if let Ok(fd) = self.load_once(&mut log) {
            return Ok(fd);
        }
        let end = log.iter().position(|&b| b == 0).unwrap_or(log.len());
        let log = String::from_utf8_lossy(&log[..end]);
        let words = log
            .lines()
            .rev()
            .find(|line| !line.is_empty() && !line.starts_with("processed "));
        let mut words = words.unwrap_or("the verifier says nothing").to_owned();
        let held = rustix::thread::capabilities(None).map(|sets| sets.effective);
        if held.is_ok_and(|held| !held.intersects(LENIENT)) {
            words += WITHOUT_PERFMON;
        }
        Err(BpfError::Load {
            name: self.name,
            errno,
            words,
        })
    }

    fn load_once(&self, log: &mut [u8]) -> Result<OwnedFd, Errno> {
        const BPF_PROG_LOAD: c_int = 5;
        const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
        #[repr(C)]
        struct Attr {
            prog_type: u32,
            insn_cnt: u32,
            insns: u64,
            license: u64,
            log_level: u32,
            log_size: u32,
            log_buf: u64,
            kern_version: u32,
            prog_flags: u32,
            prog_name: [u8; 16],
        }
        let mut attr = Attr {
            prog_type: BPF_PROG_TYPE_SCHED_CLS,
            insn_cnt: self.code.len() as u32,
            insns: self.code.as_ptr() as u64,
            license: LICENCE.as_ptr() as u64,
            log_level: u32::from(!log.is_empty()),
            log_size: log.len() as u32,
            log_buf: if log.is_empty() {
                0
            } else {
                log.as_mut_ptr() as u64
            },
            kern_version: 0,
            prog_flags: 0,
            prog_name: object_name(self.name),
        };
        // SAFETY: the attribute has the layout of BPF_PROG_LOAD; its pointers refer to the code,
        // the licence and the log, which outlive the call and have the sizes given.
        unsafe { bpf_fd(BPF_PROG_LOAD, &mut attr) }
    }
}

#[cfg(test)]
mod tests {
    use crate::kernel::bpf::{Assembler, Reg, Size};

    #[test]
    fn the_verifiers_last_words_are_in_the_error() {
        let mut asm = Assembler::new();
        asm.load(Size::W, Reg::R0, Reg::R3, 0);
        asm.exit();
        let error = asm.finish("t").unwrap().load().unwrap_err().to_string();
        assert!(
            error.contains("R3 !read_ok"),
            "{error}; run the tests as root"
        );
    }
}
