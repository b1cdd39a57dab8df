//! The memory of the two steering programs: the flows that came out of the tunnel, and the
//! fragmented replies under way.
//!
//! Owns the maps, their keys, and the phrases by which programs make a key and look it up. Programs
//! make a key on the stack:
//!
//! ```text
//! struct key {                 // 40 bytes, at the end of the stack
//!     u32 family_and_protocol; // 4 or 6 in the second byte, the protocol in the first
//!     u8  local[16];           // address of this host; IPv4 in the first four bytes
//!     u8  remote[16];          // address of the client
//!     u32 last;                // flows: remote port << 16 | local port; fragments: identification
//! };
//! struct value { u64 seen; };  // flows: the kernel's nanoseconds; fragments: unused
//! ```

use std::os::fd::AsFd;

use Reg::{R0, R1, R2, R3, R4, R10};

use super::phrases::{PACKET, PROTOCOL};
use crate::kernel::bpf::{Alu, Assembler, BpfError, Helper, If, Label, Map, MapKind, Reg, Size};

/// Fragmented replies under way at the same time. A reply of 64 KB is 45 fragments sent in one go,
/// so an entry lives for microseconds.
pub const MAX_FRAGMENTED: u32 = 4096;

const KEY_BYTES: usize = 40;
const VALUE_BYTES: usize = 8;

/// Where the parts of a key lie on the stack.
const KEY: i16 = -40;
pub(super) const KEY_LOCAL: i16 = -36;
pub(super) const KEY_REMOTE: i16 = -20;
pub(super) const KEY_PORTS: i16 = -4;

/// Where a value lies on the stack.
pub(super) const VALUE: i16 = -56;

/// The maps of one pair of programs.
#[derive(Debug)]
pub struct FlowMaps {
    pub(super) flows: Map,
    pub(super) fragments: Map,
}

impl FlowMaps {
    /// Maps for `max_flows` flows without TCP. A full map evicts the flow used least recently.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn new(max_flows: u32) -> Result<Self, BpfError> {
        let map = |name, entries| Map::new(MapKind::LruHash, name, KEY_BYTES, VALUE_BYTES, entries);
        Ok(Self {
            flows: map("ipmoved_flows", max_flows)?,
            fragments: map("ipmoved_frags", MAX_FRAGMENTED)?,
        })
    }
}

pub(super) fn zero_key(a: &mut Assembler) {
    for offset in (KEY..0).step_by(8) {
        a.store(Size::Dw, R10, offset, 0);
    }
}

/// The key's first word, from PROTOCOL.
pub(super) fn store_family(a: &mut Assembler, version: i32) {
    a.mov(R0, PROTOCOL);
    a.alu(Alu::Or, R0, version << 8);
    a.store(Size::W, R10, KEY, R0);
}

/// Copies an address of the packet, at `from`, into the key at `to`.
pub(super) fn store_address(a: &mut Assembler, from: u32, to: i16, length: i32, failed: Label) {
    a.mov(R1, PACKET);
    a.mov(R2, from);
    a.mov(R3, R10);
    a.alu(Alu::Add, R3, i32::from(to));
    a.mov(R4, length);
    a.call(Helper::SkbLoadBytes);
    a.jump_if_wide(R0, If::Ne, 0, failed);
}

/// R0 = the address of the key's value in a map, or 0.
pub(super) fn look_up(a: &mut Assembler, map: &Map) {
    map_and_key(a, map);
    a.call(Helper::MapLookup);
}

/// Enters the key into a map, with the value at [`VALUE`].
pub(super) fn enter(a: &mut Assembler, map: &Map) {
    map_and_key(a, map);
    a.mov(R3, R10);
    a.alu(Alu::Add, R3, i32::from(VALUE));
    a.mov(R4, 0);
    a.call(Helper::MapUpdate);
}

pub(super) fn remove(a: &mut Assembler, map: &Map) {
    map_and_key(a, map);
    a.call(Helper::MapDelete);
}

fn map_and_key(a: &mut Assembler, map: &Map) {
    a.load_map(R1, map.as_fd());
    a.mov(R2, R10);
    a.alu(Alu::Add, R2, i32::from(KEY));
}
