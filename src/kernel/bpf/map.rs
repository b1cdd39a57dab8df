//! Maps: the memory of programs.

use std::ffi::c_int;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::{Timespec, poll};
use rustix::io::Errno;

use super::{BpfError, MAX_NAME, bpf, bpf_fd, object_name, supply, with_memlock_raised};

/// How often an entry is tried for which the kernel has no memory at hand, and how long it has to
/// get some each time. It takes memory for entries beforehand, where it may not wait
/// (`bpf_mem_alloc` in kernel/bpf/memalloc.c), and sees to more in an interrupt, or with PREEMPT_RT
/// in a thread.
const REFILLS: u32 = 20;
const REFILL: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 2_000_000,
};

/// Kinds of maps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MapKind {
    /// A hash table that takes memory only for what it holds.
    Hash,
    /// A hash table that has its memory from the start, so that it is full at its last entry and
    /// never before.
    ReservedHash,
    /// An array of values of 64 bits.
    Array,
    /// A hash table that evicts the entries used least recently.
    LruHash,
    /// A trie that finds the longest of the prefixes that a key begins with. A key is its length in
    /// bits (`u32`), then its bytes, the most significant first.
    LpmTrie,
    /// A value that is kept with a socket, as long as that lives.
    SkStorage,
    /// An array of programs, in which one program goes on in place of another.
    Programs,
    /// Records from programs to this process, in order. It has as many bytes as the shape has
    /// entries: a power of two, and whole pages.
    Ring,
}

impl MapKind {
    /// Its number (`enum bpf_map_type`, linux/bpf.h).
    const fn number(self) -> u32 {
        match self {
            Self::Hash | Self::ReservedHash => 1,
            Self::Array => 2,
            Self::LruHash => 9,
            Self::LpmTrie => 11,
            Self::SkStorage => 24,
            Self::Programs => 3,
            Self::Ring => 27,
        }
    }
}

/// The name and measures of a map.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    /// Its kind.
    pub kind: MapKind,
    /// Its name, which the kernel shows in `bpftool map`.
    pub name: &'static str,
    /// Bytes of a key.
    pub key_size: usize,
    /// Bytes of a value.
    pub value_size: usize,
    /// Most entries; 0 where the kind has no such limit.
    pub max_entries: u32,
}

impl Shape {
    /// `BPF_F_NO_PREALLOC`. The kernel asks it of tries, and of what is kept with sockets.
    fn flags(&self) -> u32 {
        match self.kind {
            MapKind::Hash | MapKind::LpmTrie | MapKind::SkStorage => 1,
            MapKind::ReservedHash
            | MapKind::Array
            | MapKind::LruHash
            | MapKind::Programs
            | MapKind::Ring => 0,
        }
    }
}

/// A map shared between programs and this process.
#[derive(Debug)]
pub struct Map {
    fd: OwnedFd,
    shape: Shape,
}

impl Map {
    /// Makes a map. It lives as long as this value or a loaded program refers to it.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn new(shape: Shape) -> Result<Self, BpfError> {
        let Shape { kind, name, .. } = shape;
        debug_assert!(name.len() <= MAX_NAME, "the kernel would truncate it");
        let refused = BpfError::of_map(name);
        let btf = match kind {
            MapKind::SkStorage => Some(int_btf()?.map_err(refused)?),
            MapKind::Hash
            | MapKind::ReservedHash
            | MapKind::Array
            | MapKind::LruHash
            | MapKind::LpmTrie
            | MapKind::Programs
            | MapKind::Ring => None,
        };
        // The only type that it describes.
        let int = u32::from(btf.is_some());
        let attr = Create {
            map_type: kind.number(),
            key_size: shape.key_size as u32,
            value_size: shape.value_size as u32,
            max_entries: shape.max_entries,
            map_flags: shape.flags(),
            map_name: object_name(name),
            btf_fd: btf.as_ref().map_or(0, |btf| btf.as_raw_fd() as u32),
            btf_key_type_id: int,
            btf_value_type_id: int,
            ..Create::default()
        };
        let fd = create(attr)?.map_err(refused)?;
        Ok(Self { fd, shape })
    }

    /// The map of a descriptor that somebody else made, if it has this shape.
    pub fn from_fd(fd: OwnedFd, shape: Shape) -> Option<Self> {
        Self::at_least_from_fd(fd, shape).filter(|map| map.room() == shape.max_entries)
    }

    /// The same, if it has this shape and as much room or more.
    pub fn at_least_from_fd(fd: OwnedFd, shape: Shape) -> Option<Self> {
        const NAME: std::ops::Range<usize> = 24..40;
        let mut info = [0_u8; 40];
        info_of(fd.as_fd(), &mut info).ok()?;
        let word = |at: usize| {
            let bytes = info.get(at..at + 4)?.try_into().ok()?;
            Some(u32::from_ne_bytes(bytes) as usize)
        };
        let is_it = word(0)? == shape.kind.number() as usize
            && word(8)? == shape.key_size
            && word(12)? == shape.value_size
            && word(20)? == shape.flags() as usize
            && info.get(NAME)? == object_name(shape.name);
        let room = u32::try_from(word(16)?).ok()?;
        (is_it && room >= shape.max_entries).then_some(Self {
            fd,
            shape: Shape {
                max_entries: room,
                ..shape
            },
        })
    }

    /// A value of an array; `None` if it has no such place.
    pub fn get(&self, index: u32) -> Option<u64> {
        let mut value = [0; 8];
        self.read(&index.to_ne_bytes(), &mut value)
            .then(|| u64::from_ne_bytes(value))
    }

    /// Sets a value of an array.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set(&self, index: u32, value: u64) -> Result<(), Errno> {
        self.insert(&index.to_ne_bytes(), &value.to_ne_bytes())
    }

    /// Reads the value of a key; false if it is not there.
    pub fn read(&self, key: &[u8], value: &mut [u8]) -> bool {
        const BPF_MAP_LOOKUP_ELEM: c_int = 1;
        assert_eq!(value.len(), self.shape.value_size);
        let mut attr = self.element(key, value.as_mut_ptr() as u64);
        // SAFETY: the attribute has the layout of the command; key and value outlive the call and
        // have the sizes of the map.
        unsafe { bpf(BPF_MAP_LOOKUP_ELEM, &mut attr) }.is_ok()
    }

    /// Enters a value. Waits a moment if the kernel has no memory at hand for it.
    ///
    /// # Errors
    /// If the kernel refuses, as where the map is full.
    pub fn insert(&self, key: &[u8], value: &[u8]) -> Result<(), Errno> {
        const BPF_MAP_UPDATE_ELEM: c_int = 2;
        assert_eq!(value.len(), self.shape.value_size);
        let mut attr = self.element(key, value.as_ptr() as u64);
        let mut tries = 0;
        loop {
            // SAFETY: as in `read`.
            match unsafe { bpf(BPF_MAP_UPDATE_ELEM, &mut attr) } {
                Ok(_) => return Ok(()),
                Err(Errno::NOMEM) if tries < REFILLS => {
                    tries += 1;
                    // As a sleep, which the system call filter does not know.
                    let _ = poll(&mut [], Some(&REFILL));
                }
                Err(errno) => return Err(errno),
            }
        }
    }

    /// Enters a program, in an array of them.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn insert_fd(&self, key: &[u8], program: BorrowedFd<'_>) -> Result<(), Errno> {
        self.insert(key, &program.as_raw_fd().to_ne_bytes())
    }

    /// Removes a key; it is no error if it is not there.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn remove(&self, key: &[u8]) -> Result<(), Errno> {
        const BPF_MAP_DELETE_ELEM: c_int = 3;
        let mut attr = self.element(key, 0);
        // SAFETY: as in `read`; the command reads no value.
        match unsafe { bpf(BPF_MAP_DELETE_ELEM, &mut attr) } {
            Ok(_) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    /// All keys. One that is entered or removed meanwhile may be missing, or there twice.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn keys(&self) -> Result<Vec<Vec<u8>>, Errno> {
        const BPF_MAP_GET_NEXT_KEY: c_int = 4;
        let mut keys: Vec<Vec<u8>> = Vec::new();
        loop {
            let mut next = vec![0; self.shape.key_size];
            let mut attr = match keys.last() {
                Some(last) => self.element(last, next.as_mut_ptr() as u64),
                // No key stands before the first.
                None => Element {
                    key: 0,
                    ..self.element(&next, next.as_ptr() as u64)
                },
            };
            // SAFETY: as in `read`, where the second buffer holds a key.
            match unsafe { bpf(BPF_MAP_GET_NEXT_KEY, &mut attr) } {
                Ok(_) => keys.push(next),
                Err(Errno::NOENT) => return Ok(keys),
                Err(errno) => return Err(errno),
            }
        }
    }

    /// Removes keys, which stand one behind the other; those that are not there are left out.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn remove_all(&self, keys: &[u8]) -> Result<(), Errno> {
        const BPF_MAP_DELETE_BATCH: c_int = 27;
        let mut left = keys;
        while !left.is_empty() {
            let count = left.len() / self.shape.key_size;
            let mut attr = Batch {
                keys: left.as_ptr() as u64,
                count: count as u32,
                ..self.batch()
            };
            // SAFETY: the attribute has the layout of the command; `left` outlives the call and
            // holds as many keys as the kernel is told.
            let result = unsafe { bpf(BPF_MAP_DELETE_BATCH, &mut attr) };
            let done = match result {
                Ok(_) => count,
                // The one behind those that are done is not there.
                Err(Errno::NOENT) => attr.count as usize + 1,
                Err(errno) => return Err(errno),
            };
            left = left.get(done * self.shape.key_size..).unwrap_or_default();
        }
        Ok(())
    }

    /// Reads about so many entries of a hash table, each as a key with its value, from where the
    /// last call with the same `place` ended. Returns whether there are more.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn read_some(
        &self,
        place: &mut Option<u32>,
        most: u32,
        mut each: impl FnMut(&[u8], &[u8]),
    ) -> Result<bool, Errno> {
        const BPF_MAP_LOOKUP_BATCH: c_int = 24;
        let Shape {
            key_size,
            value_size,
            ..
        } = self.shape;
        let mut keys = vec![0; key_size * most as usize];
        let mut values = vec![0; value_size * most as usize];
        let (from, mut to) = (place.unwrap_or_default(), 0_u32);
        let mut attr = Batch {
            in_batch: place.map_or(0, |_| (&raw const from) as u64),
            out_batch: (&raw mut to) as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: most,
            ..self.batch()
        };
        // SAFETY: the attribute has the layout of the command; all buffers outlive the call and
        // have room for as many entries as the kernel is told.
        let more = match unsafe { bpf(BPF_MAP_LOOKUP_BATCH, &mut attr) } {
            Ok(_) => true,
            Err(Errno::NOENT) => false,
            Err(errno) => return Err(errno),
        };
        *place = more.then_some(to);
        let entries = keys
            .chunks_exact(key_size)
            .zip(values.chunks_exact(value_size));
        for (key, value) in entries.take(attr.count as usize) {
            each(key, value);
        }
        Ok(more)
    }

    fn batch(&self) -> Batch {
        Batch {
            in_batch: 0,
            out_batch: 0,
            keys: 0,
            values: 0,
            count: 0,
            map_fd: self.fd.as_raw_fd() as u32,
            elem_flags: 0,
            flags: 0,
        }
    }

    fn element(&self, key: &[u8], value: u64) -> Element {
        assert_eq!(key.len(), self.shape.key_size);
        Element {
            map_fd: self.fd.as_raw_fd() as u32,
            pad: 0,
            key: key.as_ptr() as u64,
            value,
            flags: 0,
        }
    }
}

impl Map {
    /// The same map once more.
    ///
    /// # Errors
    /// If there is no descriptor left.
    pub fn again(&self) -> Result<Self, BpfError> {
        let fd = self.fd.try_clone().map_err(|source| BpfError::Descriptor {
            name: self.shape.name,
            source,
        })?;
        let shape = self.shape;
        Ok(Self { fd, shape })
    }

    /// The most entries that there may be.
    pub fn room(&self) -> u32 {
        self.shape.max_entries
    }
}

impl AsFd for Map {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The attribute that makes a map.
#[repr(C)]
#[derive(Default)]
pub(super) struct Create {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
    map_name: [u8; 16],
    map_ifindex: u32,
    btf_fd: u32,
    btf_key_type_id: u32,
    btf_value_type_id: u32,
}

impl Create {
    /// For an array of one value with so many bytes.
    pub(super) fn array_of_one(name: &str, bytes: usize, map_flags: u32) -> Self {
        Self {
            map_type: MapKind::Array.number(),
            key_size: size_of::<u32>() as u32,
            value_size: bytes as u32,
            max_entries: 1,
            map_flags,
            map_name: object_name(name),
            ..Self::default()
        }
    }
}

/// Makes a map.
pub(super) fn create(mut attr: Create) -> Result<Result<OwnedFd, Errno>, BpfError> {
    const BPF_MAP_CREATE: c_int = 0;
    let made = supply::next(|| {
        let made = with_memlock_raised(|| {
            // SAFETY: the attribute has the layout of BPF_MAP_CREATE and holds no pointer.
            unsafe { bpf_fd(BPF_MAP_CREATE, &mut attr) }
        });
        made.map_err(Err)?.map_err(Ok)
    });
    match made {
        Ok(map) => Ok(Ok(map)),
        Err(Ok(errno)) => Ok(Err(errno)),
        Err(Err(error)) => Err(error),
    }
}

/// The attribute of the commands for one element.
#[repr(C)]
struct Element {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// The attribute of the commands for many elements.
#[repr(C)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// The maps of a program that is loaded, by its id. It takes CAP_SYS_ADMIN, so there may be none.
pub fn of_program(id: u32) -> Vec<OwnedFd> {
    const BPF_PROG_GET_FD_BY_ID: c_int = 13;
    const BPF_MAP_GET_FD_BY_ID: c_int = 14;
    /// More than any program of ours has.
    const MAX_MAPS: usize = 32;
    /// Where `struct bpf_prog_info` has the number of maps and the address of their ids.
    const COUNT: usize = 52;
    const IDS: usize = 56;
    let by_id = |command, id: u32| {
        let mut attr = [id, 0, 0];
        // SAFETY: the attribute has the layout of both commands and holds no pointer.
        unsafe { bpf_fd(command, &mut attr) }.ok()
    };
    let mut ids = [0_u32; MAX_MAPS];
    let mut info = [0_u8; 80];
    info[COUNT..COUNT + 4].copy_from_slice(&(MAX_MAPS as u32).to_ne_bytes());
    info[IDS..IDS + 8].copy_from_slice(&(ids.as_mut_ptr() as u64).to_ne_bytes());
    let read = by_id(BPF_PROG_GET_FD_BY_ID, id).map(|fd| info_of(fd.as_fd(), &mut info));
    if !matches!(read, Some(Ok(()))) {
        return Vec::new();
    }
    ids.into_iter()
        .filter(|&id| id != 0)
        .filter_map(|id| by_id(BPF_MAP_GET_FD_BY_ID, id))
        .collect()
}

/// Reads the start of what the kernel says of a map or a program.
fn info_of(fd: BorrowedFd<'_>, info: &mut [u8]) -> Result<(), Errno> {
    const BPF_OBJ_GET_INFO_BY_FD: c_int = 15;
    #[repr(C)]
    struct Attr {
        bpf_fd: u32,
        info_len: u32,
        info: u64,
    }
    let mut attr = Attr {
        bpf_fd: fd.as_raw_fd() as u32,
        info_len: info.len() as u32,
        info: info.as_mut_ptr() as u64,
    };
    // SAFETY: the attribute has the layout of the command; `info` outlives the call and is as long
    // as the kernel is told. An address that it holds in turn is that of an array which outlives
    // the call as well.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr) }.map(drop)
}

/// A description of the type `int`, which the kernel asks of maps that keep values with sockets
/// (`Documentation/bpf/btf.rst`).
fn int_btf() -> Result<Result<OwnedFd, Errno>, BpfError> {
    const BPF_BTF_LOAD: c_int = 18;
    #[repr(C)]
    struct Attr {
        btf: u64,
        log_buf: u64,
        size: u32,
        log_size: u32,
        log_level: u32,
        pad: u32,
    }
    const MAGIC_AND_VERSION: u32 = 0x0001_eb9f;
    const HEADER_LEN: u32 = 24;
    const TYPE_LEN: u32 = 16;
    const STRINGS: &[u8] = b"\0int\0";
    const NAME_AT: u32 = 1;
    const KIND_INT: u32 = 1 << 24;
    const SIGNED_32_BITS: u32 = 1 << 24 | 32;
    let words = [
        MAGIC_AND_VERSION,
        HEADER_LEN,
        0,
        TYPE_LEN,
        TYPE_LEN,
        STRINGS.len() as u32,
        NAME_AT,
        KIND_INT,
        4,
        SIGNED_32_BITS,
    ];
    let mut raw: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
    raw.extend(STRINGS);
    let mut attr = Attr {
        btf: raw.as_ptr() as u64,
        log_buf: 0,
        size: raw.len() as u32,
        log_size: 0,
        log_level: 0,
        pad: 0,
    };
    with_memlock_raised(|| {
        // SAFETY: the attribute has the layout of the command; the bytes outlive the call.
        unsafe { bpf_fd(BPF_BTF_LOAD, &mut attr) }
    })
}
