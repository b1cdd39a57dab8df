//! What the new server's programs know of addresses: which have moved, which are this host's own,
//! and what lies near.
//!
//! Owns the memory, one trie for both families, and the phrase by which a program asks it. The most
//! specific prefix counts, and says all there is to say of an address. The daemon fills it at any
//! time, and it outlives the daemon: so nothing leaves from a moved address while there is none.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use Reg::{R0, R1, R2, R10};

use super::headers::{fib, ipv4, ipv6, skb};
use super::moved::word;
use super::phrases::{PACKET, begin_route_lookup, branch_by_family, load_bytes, look_up_at};
use crate::kernel::bpf::{Assembler, BpfError, If, Label, Map, MapKind, Reg, Shape, Size, Words};
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
    /// It is in a network of this host's own: what is forwarded may go there with a moved address.
    pub const NETWORK: Self = Self(16);

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
    /// Between which words the sources lie that have moved ([`Self::pass_unless_moved_may_be`]).
    bounds: Words,
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
            bounds: bounds(&BTreeSet::new())?,
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
        let refused = BpfError::of_map(PLACES.name);
        let mut left = BTreeSet::new();
        for key in map.keys().map_err(refused)? {
            let mut value = [0; 4];
            let moved =
                map.read(&key, &mut value) && Place(u32::from_ne_bytes(value)).has(Place::MOVED);
            left.extend(prefix_of(&key).filter(|_| moved));
        }
        let bounds = bounds(&left)?;
        Ok(Self { map, bounds, left })
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
        let refused = BpfError::of_map(PLACES.name);
        if complete {
            self.left.clear();
        }
        let mut places = places.clone();
        for &prefix in &self.left {
            let place = places.entry(prefix).or_default();
            *place = place.and(Place::MOVED);
        }
        let all = places.iter().filter(|(_, place)| place.has(Place::MOVED));
        let all: BTreeSet<Prefix> = all.map(|(&prefix, _)| prefix).collect();
        set_bounds(&self.bounds, &all);
        let moved = [false, true].map(|v4| all.iter().any(|prefix| prefix.is_ipv4() == v4));
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
            load_bytes(a, l2 + at, key + LAST_WORD, 4);
            a.jump_if_wide(R0, If::Ne, 0, other);
        }
        a.jump(done);
        a.bind(v6);
        for (key, at) in keys.into_iter().zip([ipv6::SOURCE, ipv6::DESTINATION]) {
            load_bytes(a, l2 + at, key + ADDRESS, 16);
            a.jump_if_wide(R0, If::Ne, 0, other);
        }
        a.bind(done);
    }

    /// Lets pass what cannot have a moved address for its source, or has no address: most of what
    /// leaves, where few addresses have moved. That is told by the first four bytes.
    pub(super) fn pass_unless_moved_may_be(&self, a: &mut Assembler, l2: u32, pass: Label) {
        let (v6, asked) = (a.label(), a.label());
        branch_by_family(a, v6, pass);
        for (first, source) in [(FIRST_V4, ipv4::SOURCE), (FIRST_V6, ipv6::SOURCE)] {
            if first == FIRST_V6 {
                a.bind(v6);
            }
            a.load_packet(Size::W, l2 + source);
            a.load_address(R1, self.bounds.as_fd(), Words::offset(first));
            a.load(Size::W, R2, R1, 0);
            a.jump_if(R0, If::Lt, R2, pass);
            a.load(Size::W, R2, R1, 4);
            a.jump_if(R0, If::Gt, R2, pass);
            if first == FIRST_V4 {
                a.jump(asked);
            }
        }
        a.bind(asked);
    }

    /// Makes a request for the route back to where the packet comes from, after [`Self::read`]. It
    /// is asked as if it came by the link that the packet is about to leave by.
    pub(super) fn begin_way_back(a: &mut Assembler, at: i16, other: Label) {
        let (v6, done) = (a.label(), a.label());
        begin_route_lookup(a, at, 0);
        a.load(Size::W, R0, PACKET, skb::IFINDEX);
        a.store(Size::W, R10, at + fib::IFINDEX, R0);
        branch_by_family(a, v6, other);
        for (family, words) in [
            (libc::AF_INET, LAST_WORD..ADDRESS + 16),
            (libc::AF_INET6, ADDRESS..ADDRESS + 16),
        ] {
            if family == libc::AF_INET6 {
                a.bind(v6);
            }
            a.store(Size::B, R10, at + fib::FAMILY, family);
            for (from, to) in [
                (SOURCE_KEY, fib::DESTINATION),
                (DESTINATION_KEY, fib::SOURCE),
            ] {
                for word in words.clone().step_by(4) {
                    a.load(Size::W, R0, R10, from + word);
                    a.store(Size::W, R10, at + to + word - words.start, R0);
                }
            }
            if family == libc::AF_INET {
                a.jump(done);
            }
        }
        a.bind(done);
    }

    /// R0 = where it stands what is said of an address of the packet (`u32`), or 0.
    pub(super) fn look_up(&self, a: &mut Assembler, which: Which) {
        let key = match which {
            Which::Source => SOURCE_KEY,
            Which::Destination => DESTINATION_KEY,
        };
        look_up_at(a, &self.map, key);
    }
}

/// The words of [`Places::bounds`]: the first and the last source of each family, by its first four
/// bytes.
const FIRST_V4: usize = 0;
const FIRST_V6: usize = 2;
const BOUNDS: usize = 4;

fn bounds(moved: &BTreeSet<Prefix>) -> Result<Words, BpfError> {
    let bounds = Words::new("ipmoved_bounds", BOUNDS)?;
    set_bounds(&bounds, moved);
    Ok(bounds)
}

/// Nothing lies between them if nothing has moved.
fn set_bounds(bounds: &Words, moved: &BTreeSet<Prefix>) {
    for (at, v4) in [(FIRST_V4, true), (FIRST_V6, false)] {
        let of_family = || moved.iter().filter(|prefix| prefix.is_ipv4() == v4);
        let first = of_family().map(|prefix| word(prefix.first(), 0)).min();
        let last = of_family().map(|prefix| word(prefix.last(), 0)).max();
        bounds.set(at, first.unwrap_or(u32::MAX));
        bounds.set(at + 1, last.unwrap_or(0));
    }
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
