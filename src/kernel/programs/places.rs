//! What the new server's programs know of addresses: which have moved, which are this host's own,
//! and what lies near.
//!
//! Owns the memory, one trie for both families, and the phrase by which a program asks it. The most
//! specific prefix counts, and says all there is to say of an address. The daemon fills it at any
//! time, and it outlives the daemon: so nothing leaves from a moved address while there is none.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;

use Reg::{R0, R1, R2, R3, R4, R10};

use super::headers::{ipv4, ipv6};
use super::phrases::{PACKET, branch_by_family};
use crate::kernel::bpf::{Alu, Assembler, BpfError, Helper, Label, Map, MapKind, Reg, Shape, Size};
use crate::model::prefix::Prefix;

/// Most prefixes: all that may have moved, and the networks of a large cluster. The kernel takes
/// memory only for what there is.
const MAX_PLACES: u32 = 1 << 16;

/// A key is its length in bits, then its bytes.
const LENGTH: usize = 4;
const KEY_BYTES: usize = LENGTH + 16;

/// IPv4 addresses stand behind this prefix (RFC 4291 section 2.5.5.2), whose length it is.
const MAPPED: u32 = 96;

const PLACES: Shape = Shape {
    kind: MapKind::LpmTrie,
    name: "ipmoved_places",
    key_size: KEY_BYTES,
    value_size: 4,
    max_entries: MAX_PLACES,
};

/// Where the keys of the packet's addresses lie on the stack.
const SOURCE_KEY: i16 = -304;
const DESTINATION_KEY: i16 = -328;
/// Where the addresses lie in a key: that of IPv4 is its last word.
const ADDRESS: i16 = LENGTH as i16;
const LAST_WORD: i16 = ADDRESS + 12;

/// What is said of an address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Place(u32);

impl Place {
    /// It has moved here, or a part of it.
    pub const MOVED: Self = Self(1);
    /// It is this host's own.
    pub const OWN: Self = Self(2);
    /// It is in a network of this host's own, or special: what is chosen by its port does not leave
    /// from a moved address to there.
    pub const NEAR: Self = Self(4);
    /// It is in a network behind this host: what has a moved address itself may go there as it is.
    pub const BEHIND: Self = Self(8);

    /// Both.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Without the other.
    #[must_use]
    pub fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Whether all of the other is said.
    pub fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// For programs.
    pub(super) fn bits(self) -> i32 {
        self.0.cast_signed()
    }
}

/// An address of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Which {
    /// Where it comes from.
    Source,
    /// Where it goes.
    Destination,
}

/// The memory.
#[derive(Debug)]
pub struct Places {
    map: Map,
    /// The prefixes that had moved to an earlier daemon.
    left: BTreeSet<Prefix>,
}

impl Places {
    /// Nothing is known at first.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn new() -> Result<Self, BpfError> {
        Ok(Self {
            map: Map::new(PLACES)?,
            left: BTreeSet::new(),
        })
    }

    /// The memory among these descriptors, if it is there; otherwise a new one.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(super) fn found(descriptors: &[OwnedFd]) -> Result<Self, BpfError> {
        let mut all = descriptors.iter().filter_map(|fd| fd.try_clone().ok());
        let Some(map) = all.find_map(|fd| Map::from_fd(fd, PLACES)) else {
            return Self::new();
        };
        let mut left = BTreeSet::new();
        for key in map.keys().map_err(refused)? {
            let mut value = [0; 4];
            let moved =
                map.read(&key, &mut value) && Place(u32::from_ne_bytes(value)).has(Place::MOVED);
            left.extend(prefix_of(&key).filter(|_| moved));
        }
        Ok(Self { map, left })
    }

    /// The descriptor, for the next daemon.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.map.as_fd()
    }

    /// From now on this is said of addresses. While it is not `complete`, what had moved to an
    /// earlier daemon counts as moved. Of a family of which nothing has moved no address is
    /// [`Place::OWN`].
    ///
    /// # Errors
    /// If the kernel refuses. Some of it may be in effect then.
    pub fn update(
        &mut self,
        places: &BTreeMap<Prefix, Place>,
        complete: bool,
    ) -> Result<(), BpfError> {
        if complete {
            self.left.clear();
        }
        let mut places = places.clone();
        for &prefix in &self.left {
            let place = places.entry(prefix).or_default();
            *place = place.and(Place::MOVED);
        }
        let moved = |v4: bool| {
            let mut moved = places.iter().filter(|(_, place)| place.has(Place::MOVED));
            moved.any(|(prefix, _)| prefix.is_ipv4() == v4)
        };
        let moved = [moved(false), moved(true)];
        let mut stale: BTreeSet<Vec<u8>> = self.map.keys().map_err(refused)?.into_iter().collect();
        for (&prefix, &place) in &places {
            let place = match moved[usize::from(prefix.is_ipv4())] {
                true => place,
                false => place.without(Place::OWN),
            };
            let key = key_of(prefix);
            (self.map.insert(&key, &place.0.to_ne_bytes())).map_err(refused)?;
            stale.remove(&key[..]);
        }
        for gone in stale {
            self.map.remove(&gone).map_err(refused)?;
        }
        Ok(())
    }

    /// Reads the addresses of the packet, for [`Self::look_up`]. Jumps to `other` if it has none.
    pub(super) fn read(a: &mut Assembler, l2: u32, other: Label) {
        let (v6, done) = (a.label(), a.label());
        let keys = [SOURCE_KEY, DESTINATION_KEY];
        for key in keys {
            a.store(Size::W, R10, key, 8 * 16);
        }
        branch_by_family(a, v6, other);
        for (key, at) in keys.into_iter().zip([ipv4::SOURCE, ipv4::DESTINATION]) {
            a.store(Size::W, R10, key + ADDRESS, 0);
            a.store(Size::W, R10, key + ADDRESS + 4, 0);
            a.store(
                Size::W,
                R10,
                key + ADDRESS + 8,
                i32::from_ne_bytes([0, 0, 0xff, 0xff]),
            );
            load_bytes(a, l2 + at, key + LAST_WORD, 4, other);
        }
        a.jump(done);
        a.bind(v6);
        for (key, at) in keys.into_iter().zip([ipv6::SOURCE, ipv6::DESTINATION]) {
            load_bytes(a, l2 + at, key + ADDRESS, 16, other);
        }
        a.bind(done);
    }

    /// R0 = where it stands what is said of an address of the packet (`u32`), or 0.
    pub(super) fn look_up(&self, a: &mut Assembler, which: Which) {
        let key = match which {
            Which::Source => SOURCE_KEY,
            Which::Destination => DESTINATION_KEY,
        };
        a.load_map(R1, self.map.as_fd());
        a.mov(R2, R10);
        a.alu(Alu::Add, R2, i32::from(key));
        a.call(Helper::MapLookup);
    }
}

fn load_bytes(a: &mut Assembler, at: u32, to: i16, length: u32, failed: Label) {
    a.mov(R1, PACKET);
    a.mov(R2, at);
    a.mov(R3, R10);
    a.alu(Alu::Add, R3, i32::from(to));
    a.mov(R4, length);
    a.call(Helper::SkbLoadBytes);
    a.jump_if_wide(R0, crate::kernel::bpf::If::Ne, 0, failed);
}

fn key_of(prefix: Prefix) -> Vec<u8> {
    let (length, address) = match prefix.first() {
        IpAddr::V4(addr) => (MAPPED + u32::from(prefix.len()), addr.to_ipv6_mapped()),
        IpAddr::V6(addr) => (u32::from(prefix.len()), addr),
    };
    let mut key = Vec::from(length.to_ne_bytes());
    key.extend(address.octets());
    key
}

fn prefix_of(key: &[u8]) -> Option<Prefix> {
    let (length, address) = key.split_first_chunk::<LENGTH>()?;
    let length = u32::from_ne_bytes(*length);
    let address = Ipv6Addr::from(<[u8; 16]>::try_from(address).ok()?);
    let mapped = address.to_ipv4_mapped().filter(|_| length >= MAPPED);
    Some(match mapped {
        Some(address) => {
            let length = u8::try_from(length - MAPPED).ok()?;
            Prefix::of(IpAddr::V4(address), length)
        }
        None => Prefix::of(IpAddr::V6(address), u8::try_from(length).ok()?),
    })
}

fn refused(errno: Errno) -> BpfError {
    let name = PLACES.name;
    BpfError::Map { name, errno }
}
