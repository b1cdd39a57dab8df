//! Records that programs hand to this process, one after the other (`BPF_MAP_TYPE_RINGBUF`, Linux
//! 5.8, `Documentation/bpf/ringbuf.rst`).
//!
//! The kernel counts the bytes that it has written and this process those that it has read; both
//! counts stand on pages of their own in front of the records. The records are mapped twice, one
//! copy behind the other, so that one which reaches over the end lies there in one piece. There is
//! one reader.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::io::Errno;

use super::BpfError;
use super::map::{Map, MapKind, Shape};

/// `BPF_RINGBUF_BUSY_BIT`: whoever reserved the record has not handed it over yet.
const BUSY: u32 = 1 << 31;

/// `BPF_RINGBUF_DISCARD_BIT`: the record is none.
const DISCARDED: u32 = 1 << 30;

/// `BPF_RINGBUF_HDR_SZ`: in front of each record, its length in four bytes, and four of the
/// kernel's own.
const HEADER: usize = 8;

/// Records begin at multiples of so many bytes.
const ALIGNMENT: usize = 8;

/// A ring of records, and its only reader.
#[derive(Debug)]
pub struct Ring {
    map: Map,
    /// What this process has read: it writes that page alone.
    read: Mutex<Mapping>,
    /// What the kernel has written, then the records, twice.
    written: Mapping,
    bytes: usize,
    page: usize,
}

/// A part of the ring in this process's memory.
#[derive(Debug)]
struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
}

impl Ring {
    /// A ring of so many bytes, a power of two and at least a page.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn new(name: &'static str, bytes: u32) -> Result<Self, BpfError> {
        let map = Map::new(Shape {
            kind: MapKind::Ring,
            name,
            key_size: 0,
            value_size: 0,
            max_entries: bytes,
        })?;
        let refused = BpfError::of_map(name);
        // SAFETY: it asks for a number.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        let page = usize::try_from(page).map_err(|_| refused(Errno::INVAL))?;
        let bytes = bytes as usize;
        let read = Mapping::of(&map, 0, page, libc::PROT_READ | libc::PROT_WRITE);
        let written = Mapping::of(&map, page, page + 2 * bytes, libc::PROT_READ);
        Ok(Self {
            read: Mutex::new(read.map_err(refused)?),
            written: written.map_err(refused)?,
            map,
            bytes,
            page,
        })
    }

    /// Reads what has come, at most as much as the ring holds.
    pub fn read(&self, mut each: impl FnMut(&[u8])) {
        let reader = self.read.lock().unwrap_or_else(|held| held.into_inner());
        let first = reader.count().load(Ordering::Relaxed);
        let mut at = first;
        // The kernel writes a record's length before it counts it.
        let end = self.written.count().load(Ordering::Acquire);
        while at < end && at - first < self.bytes as u64 {
            let place = self.page + (at as usize & (self.bytes - 1));
            let length = self.written.word(place).load(Ordering::Acquire);
            if length & BUSY != 0 {
                break;
            }
            let is_one = length & DISCARDED == 0;
            let length = (length & !DISCARDED) as usize;
            if is_one && length <= self.bytes - HEADER {
                each(self.written.slice(place + HEADER, length));
            }
            at += (HEADER + length).next_multiple_of(ALIGNMENT) as u64;
            reader.count().store(at, Ordering::Release);
        }
    }
}

impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.map.as_fd()
    }
}

impl Mapping {
    fn of(map: &Map, from: usize, bytes: usize, access: libc::c_int) -> Result<Self, Errno> {
        let fd = map.as_fd().as_raw_fd();
        let from = from as libc::off_t;
        let anywhere = std::ptr::null_mut();
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let start = unsafe { libc::mmap(anywhere, bytes, access, libc::MAP_SHARED, fd, from) };
        match NonNull::new(start.cast()) {
            Some(start_at) if start != libc::MAP_FAILED => Ok(Self {
                start: start_at,
                bytes,
            }),
            Some(_) | None => {
                let error = std::io::Error::last_os_error();
                Err(Errno::from_io_error(&error).unwrap_or(Errno::NOMEM))
            }
        }
    }

    /// The count at the start.
    fn count(&self) -> &AtomicU64 {
        // SAFETY: every mapping has a page at least and begins with one, at an aligned place; the
        // kernel reads and writes it whole.
        unsafe { self.start.cast().as_ref() }
    }

    /// The word of a record's length, at this place, a multiple of eight bytes.
    fn word(&self, place: usize) -> &AtomicU32 {
        assert!(place + HEADER <= self.bytes);
        // SAFETY: it lies in the mapping, aligned; the kernel reads and writes it whole.
        unsafe { self.start.add(place).cast().as_ref() }
    }

    /// A record, which nobody writes until it counts as read.
    fn slice(&self, place: usize, length: usize) -> &[u8] {
        assert!(place + length <= self.bytes);
        // SAFETY: it lies in the mapping. The kernel has handed it over, and writes there again
        // only when this process has counted it as read, which the caller does afterwards.
        unsafe { std::slice::from_raw_parts(self.start.add(place).as_ptr(), length) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nobody has a reference into the mapping, which has this place and size.
        let _ = unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::bpf::test_run::run;
    use crate::kernel::bpf::{Assembler, Helper, If, Reg, Size};
    use crate::kernel::testing::in_fresh_namespace;

    const BYTES: u32 = 65_536;
    const RECORD: i32 = 1_000;

    #[test]
    fn records_come_in_order_also_over_the_end_and_a_full_ring_takes_none() {
        in_fresh_namespace(|| {
            let ring = Ring::new("ipmoved_test", BYTES).unwrap();
            // Hands over a record that begins with the length of the packet, unless it is 100 bytes
            // long: then it discards one. Its verdict is 0 if there was no room.
            let mut asm = Assembler::new();
            let a = &mut asm;
            let (none, discard, done) = (a.label(), a.label(), a.label());
            a.mov(Reg::R6, Reg::R1);
            a.load_map(Reg::R1, ring.as_fd());
            a.mov(Reg::R2, RECORD);
            a.mov(Reg::R3, 0);
            a.call(Helper::RingReserve);
            a.jump_if_wide(Reg::R0, If::Eq, 0, none);
            a.load(Size::W, Reg::R2, Reg::R6, 0);
            a.store(Size::W, Reg::R0, 0, Reg::R2);
            a.mov(Reg::R1, Reg::R0);
            a.jump_if(Reg::R2, If::Eq, 100, discard);
            a.mov(Reg::R2, 0);
            a.call(Helper::RingSubmit);
            a.jump(done);
            a.bind(discard);
            a.mov(Reg::R2, 0);
            a.call(Helper::RingDiscard);
            a.bind(done);
            a.mov(Reg::R0, 1);
            a.bind(none);
            a.exit();
            let program = asm.finish("ipmoved_test").unwrap().load().unwrap();
            let hand_over = |length: usize| run(program.as_fd(), &vec![0; length]).verdict != 0;
            let read = || {
                let mut lengths = Vec::new();
                ring.read(|record| {
                    assert_eq!(record.len(), RECORD as usize);
                    lengths.push(u32::from_ne_bytes(*record.first_chunk().unwrap()));
                });
                lengths
            };
            assert_eq!(read(), [0_u32; 0]);
            let room = BYTES as usize / (RECORD as usize + HEADER);
            for round in 0..3_u32 {
                // The second round begins in the midst, and reaches over the end.
                let expected: Vec<u32> = (0..room as u32).map(|n| 200 + 10 * round + n).collect();
                assert!(expected.iter().all(|&length| hand_over(length as usize)));
                assert!(!hand_over(300), "there is no room left");
                assert_eq!(read(), expected);
                assert!(hand_over(100));
                assert_eq!(read(), [0_u32; 0]);
            }
        });
    }
}
