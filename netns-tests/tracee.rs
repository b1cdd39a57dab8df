//! A thread of another process, stopped as a debugger does it: to see what the others do without
//! it, or what the kernel answers if somebody who has taken it over makes a system call.
#![allow(unsafe_code, reason = "ptrace(2) has no safe wrapper")]

use std::fs;
use std::io;
#[cfg(target_arch = "x86_64")]
use std::os::unix::fs::FileExt;
use std::ptr;

use ipmoved::lab::LabError;

use crate::stage::Result;

/// A stopped thread. It goes on when this is dropped, on the thread that stopped it.
pub(crate) struct Tracee {
    tid: libc::pid_t,
}

/// The threads of a process, with their names.
pub(crate) fn threads(pid: u32) -> Result<Vec<(libc::pid_t, String)>> {
    let mut found = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task")).map_err(failed)? {
        let task = task.map_err(failed)?;
        let name = fs::read_to_string(task.path().join("comm")).map_err(failed)?;
        let tid = task.file_name().to_string_lossy().parse();
        found.push((tid.map_err(failed)?, name.trim().to_owned()));
    }
    Ok(found)
}

impl Tracee {
    /// Stops a thread.
    pub(crate) fn stop(tid: libc::pid_t) -> Result<Self> {
        let tracee = Self { tid };
        tracee.request(libc::PTRACE_SEIZE, 0)?;
        tracee.request(libc::PTRACE_INTERRUPT, 0)?;
        tracee.wait()?;
        Ok(tracee)
    }

    fn request(&self, request: libc::c_uint, data: usize) -> Result {
        // SAFETY: none of these requests reads or writes this process's memory but those of
        // `registers` and `set_registers`, which pass a pointer to a structure of the right type.
        let result = unsafe { libc::ptrace(request, self.tid, ptr::null_mut::<u8>(), data) };
        if result == -1 {
            return Err(failed(io::Error::last_os_error()));
        }
        Ok(())
    }

    /// Waits until it has stopped.
    fn wait(&self) -> Result {
        let mut status = 0;
        // SAFETY: the kernel writes to `status` alone.
        let result = unsafe { libc::waitpid(self.tid, &raw mut status, libc::__WALL) };
        if result != self.tid || !libc::WIFSTOPPED(status) {
            return Err(LabError::unexpected(format!(
                "waitpid gave {result}, status {status:x}"
            )));
        }
        Ok(())
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        // It fails if the process is gone, which then waits to be told so.
        if self.request(libc::PTRACE_DETACH, 0).is_err() {
            let dead = libc::__WALL | libc::WNOHANG;
            // SAFETY: nothing is written through a null pointer.
            let _ = unsafe { libc::waitpid(self.tid, ptr::null_mut(), dead) };
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl Tracee {
    /// Lets the thread make a system call, and returns what the kernel answered: a value, or an
    /// error number.
    ///
    /// The thread has to be in a system call already, as every thread of an idle daemon is: what it
    /// makes is the same instruction once more.
    pub(crate) fn call(&self, number: i64, arguments: [u64; 6]) -> Result<Answer> {
        let before = self.registers()?;
        let [rdi, rsi, rdx, r10, r8, r9] = arguments;
        let instruction = before.rip - 2;
        let mut code = [0; 2];
        self.memory()?
            .read_exact_at(&mut code, instruction)
            .map_err(failed)?;
        if code != [0x0f, 0x05] {
            return Err(LabError::unexpected("the thread is not in a system call"));
        }
        self.set_registers(libc::user_regs_struct {
            rip: instruction,
            rax: number as u64,
            // The call that it was in is not begun again now.
            orig_rax: u64::MAX,
            rdi,
            rsi,
            rdx,
            r10,
            r8,
            r9,
            ..before
        })?;
        self.request(libc::PTRACE_SINGLESTEP, 0)?;
        self.wait()?;
        let answer = self.registers()?.rax as i64;
        self.set_registers(before)?;
        Ok(match answer {
            -4095..=-1 => Err(-answer as i32),
            value => Ok(value),
        })
    }

    /// The same, for a call that takes a path in the place of the argument `at`.
    pub(crate) fn call_with_path(
        &self,
        number: i64,
        path: &str,
        at: usize,
        mut arguments: [u64; 6],
    ) -> Result<Answer> {
        // Far below what the thread uses of its stack.
        let place = self.registers()?.rsp - 1_024;
        let text = [path.as_bytes(), &[0]].concat();
        self.memory()?.write_all_at(&text, place).map_err(failed)?;
        arguments[at] = place;
        self.call(number, arguments)
    }

    fn memory(&self) -> Result<fs::File> {
        let path = format!("/proc/{}/mem", self.tid);
        let mut options = fs::File::options();
        options.read(true).write(true).open(path).map_err(failed)
    }

    fn registers(&self) -> Result<libc::user_regs_struct> {
        // SAFETY: it consists of integers.
        let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
        self.request(libc::PTRACE_GETREGS, &raw mut registers as usize)?;
        Ok(registers)
    }

    fn set_registers(&self, registers: libc::user_regs_struct) -> Result {
        self.request(libc::PTRACE_SETREGS, &raw const registers as usize)
    }
}

/// What the kernel answered to a system call.
#[cfg(target_arch = "x86_64")]
pub(crate) type Answer = std::result::Result<i64, i32>;

fn failed(error: impl std::fmt::Display) -> LabError {
    LabError::unexpected(error.to_string())
}
