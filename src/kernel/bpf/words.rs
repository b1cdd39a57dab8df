//! Words that this process writes and programs read.
//!
//! An array can be mapped (`BPF_F_MMAPABLE`, Linux 5.5): writing it is no system call and needs no
//! privilege, and a program reads it without one of the kernel's functions.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use rustix::io::Errno;

use super::BpfError;
use super::map::{Create, create};

/// `BPF_F_MMAPABLE`, linux/bpf.h.
const MMAPABLE: u32 = 1 << 10;

/// Size of a word, in bytes.
const WORD: usize = size_of::<u32>();

/// Words of 32 bits, zero at first. A program sees each one either old or new.
#[derive(Debug)]
pub struct Words {
    map: OwnedFd,
    start: NonNull<AtomicU32>,
    count: usize,
}

impl Words {
    /// Makes `count` words, at least one.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn new(name: &'static str, count: usize) -> Result<Self, BpfError> {
        let count = count.max(1);
        let map = create(Create::array_of_one(name, count * WORD, MMAPABLE))?;
        Self::mapped(map.map_err(BpfError::of_map(name))?, name, count)
    }

    /// The same words once more.
    ///
    /// # Errors
    /// If there is no descriptor left, or no memory.
    pub fn again(&self, name: &'static str) -> Result<Self, BpfError> {
        let map = self.map.try_clone();
        let map = map.map_err(|source| BpfError::Descriptor { name, source })?;
        Self::mapped(map, name, self.count)
    }

    fn mapped(map: OwnedFd, name: &'static str, count: usize) -> Result<Self, BpfError> {
        // SAFETY: a new mapping of a map of this size, at an address that the kernel chooses.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                count * WORD,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                0,
            )
        };
        let mapped = NonNull::new(start).filter(|_| start != libc::MAP_FAILED);
        let Some(start) = mapped else {
            let error = std::io::Error::last_os_error();
            let errno = Errno::from_io_error(&error).unwrap_or(Errno::NOMEM);
            return Err(BpfError::of_map(name)(errno));
        };
        Ok(Self {
            map,
            start: start.cast(),
            count,
        })
    }

    /// Writes the word with number `at`. One that is not there is left alone.
    pub fn set(&self, at: usize, value: u32) {
        debug_assert!(at < self.count, "there is no such word");
        if at < self.count {
            // SAFETY: the mapping has `count` aligned words and lives as long as this value. Others
            // read and write it whole.
            unsafe { self.start.add(at).as_ref() }.store(value, Relaxed);
        }
    }

    /// Reads the word with number `at`; 0 if it is not there.
    pub fn get(&self, at: usize) -> u32 {
        if at >= self.count {
            return 0;
        }
        // SAFETY: as in `set`.
        unsafe { self.start.add(at).as_ref() }.load(Relaxed)
    }

    /// Sets the word with number `at` to 0, if it is still `value`; whether it was.
    pub fn clear_if(&self, at: usize, value: u32) -> bool {
        if at >= self.count {
            return false;
        }
        // SAFETY: as in `set`.
        let word = unsafe { self.start.add(at).as_ref() };
        word.compare_exchange(value, 0, Relaxed, Relaxed).is_ok()
    }

    /// Where the word with number `at` lies, in bytes from the first one.
    pub fn offset(at: usize) -> u32 {
        (at * WORD) as u32
    }
}

impl AsFd for Words {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.map.as_fd()
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: nobody has a reference into the mapping, which has this place and size.
        let _ = unsafe { libc::munmap(self.start.as_ptr().cast(), self.count * WORD) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::bpf::test_run::run;
    use crate::kernel::bpf::{Assembler, Reg, Size};
    use crate::kernel::testing::in_fresh_namespace;

    #[test]
    fn a_program_sees_what_is_written_later() {
        in_fresh_namespace(|| {
            let words = Words::new("ipmoved_test", 3).unwrap();
            let mut asm = Assembler::new();
            asm.load_address(Reg::R1, words.as_fd(), Words::offset(2));
            asm.load(Size::W, Reg::R0, Reg::R1, 0);
            asm.exit();
            let program = asm.finish("ipmoved_test").unwrap().load().unwrap();
            let verdict = || run(program.as_fd(), &[0; 64]).verdict;
            assert_eq!(verdict(), 0);
            words.set(1, 5);
            words.set(2, 7);
            assert_eq!(verdict(), 7);
            // The program keeps the memory.
            drop(words);
            assert_eq!(verdict(), 7);
        });
    }
}
