//! What programs remember.

use std::ffi::c_int;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;

use super::{BpfError, MAX_NAME, bpf, bpf_fd, object_name, with_memlock_raised};

/// Kinds of maps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum MapKind {
    /// A hash table that refuses what is beyond its size.
    Hash = 1,
    /// A hash table that forgets what was used least recently.
    LruHash = 9,
}

/// A map shared between programs and this process.
#[derive(Debug)]
pub struct Map {
    fd: OwnedFd,
    key_size: usize,
    value_size: usize,
}

impl Map {
    /// Makes a map; it lives as long as this value or a loaded program refers to it.
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
        debug_assert!(name.len() <= MAX_NAME, "the kernel would cut it");
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
        match fd {
            Ok(fd) => Ok(Self {
                fd,
                key_size,
                value_size,
            }),
            Err(errno @ (Errno::PERM | Errno::NOSYS)) => Err(BpfError::from(errno)),
            Err(errno) => Err(BpfError::Map { name, errno }),
        }
    }

    /// The value of a key; `None` if it is not there.
    pub fn lookup(&self, key: &[u8]) -> Option<Vec<u8>> {
        const BPF_MAP_LOOKUP_ELEM: c_int = 1;
        let mut value = vec![0; self.value_size];
        self.element(BPF_MAP_LOOKUP_ELEM, key, &mut value).ok()?;
        Some(value)
    }

    /// Sets the value of a key.
    ///
    /// # Errors
    /// If the kernel refuses, as when a hash is full.
    pub fn update(&self, key: &[u8], value: &[u8]) -> Result<(), Errno> {
        const BPF_MAP_UPDATE_ELEM: c_int = 2;
        self.element(BPF_MAP_UPDATE_ELEM, key, &mut value.to_vec())
    }

    /// Removes a key.
    ///
    /// # Errors
    /// `ENOENT` if it is not there.
    pub fn delete(&self, key: &[u8]) -> Result<(), Errno> {
        const BPF_MAP_DELETE_ELEM: c_int = 3;
        self.element(BPF_MAP_DELETE_ELEM, key, &mut [])
    }

    fn element(&self, command: c_int, key: &[u8], value: &mut [u8]) -> Result<(), Errno> {
        #[repr(C)]
        struct Attr {
            map_fd: u32,
            pad: u32,
            key: u64,
            value: u64,
            flags: u64,
        }
        if key.len() != self.key_size || ![0, self.value_size].contains(&value.len()) {
            return Err(Errno::INVAL);
        }
        let mut attr = Attr {
            map_fd: self.fd.as_raw_fd() as u32,
            pad: 0,
            key: key.as_ptr() as u64,
            value: if value.is_empty() {
                0
            } else {
                value.as_mut_ptr() as u64
            },
            flags: 0,
        };
        // SAFETY: the attribute has the layout of BPF_MAP_*_ELEM; key and value have the sizes with
        // which the map was made (no value is a null pointer) and outlive the call.
        unsafe { bpf(command, &mut attr) }.map(drop)
    }
}

impl AsFd for Map {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_keeps_what_it_is_told() {
        let map = Map::new(MapKind::Hash, "t", 4, 8, 1).expect("run the tests as root");
        assert_eq!(map.lookup(&[1; 4]), None);
        map.update(&[1; 4], &[2; 8]).unwrap();
        assert_eq!(map.lookup(&[1; 4]), Some(vec![2; 8]));
        assert_eq!(map.update(&[3; 4], &[2; 8]), Err(Errno::TOOBIG));
        map.delete(&[1; 4]).unwrap();
        assert_eq!(map.delete(&[1; 4]), Err(Errno::NOENT));
    }
}
