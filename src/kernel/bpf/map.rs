//! Maps: the memory of programs.

use std::ffi::c_int;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::{BpfError, MAX_NAME, bpf_fd, object_name, with_memlock_raised};

/// Kinds of maps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum MapKind {
    /// A hash table that evicts the entries used least recently.
    LruHash = 9,
}

/// A map shared between programs and this process.
#[derive(Debug)]
pub struct Map {
    fd: OwnedFd,
}

impl Map {
    /// Makes a map. It lives as long as this value or a loaded program refers to it.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn new(
        kind: MapKind,
        name: &'static str,
        key_size: usize,
        value_size: usize,
        max_entries: u32,
    ) -> Result<Self, BpfError> {
        const BPF_MAP_CREATE: c_int = 0;
        #[repr(C)]
        struct Attr {
            map_type: u32,
            key_size: u32,
            value_size: u32,
            max_entries: u32,
            map_flags: u32,
            inner_map_fd: u32,
            numa_node: u32,
            map_name: [u8; 16],
        }
        debug_assert!(name.len() <= MAX_NAME, "the kernel would truncate it");
        let mut attr = Attr {
            map_type: kind as u32,
            key_size: key_size as u32,
            value_size: value_size as u32,
            max_entries,
            map_flags: 0,
            inner_map_fd: 0,
            numa_node: 0,
            map_name: object_name(name),
        };
        let fd = with_memlock_raised(|| {
            // SAFETY: the attribute has the layout of BPF_MAP_CREATE and holds no pointer.
            unsafe { bpf_fd(BPF_MAP_CREATE, &mut attr) }
        });
        fd?.map(|fd| Self { fd })
            .map_err(|errno| BpfError::Map { name, errno })
    }
}

impl AsFd for Map {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
