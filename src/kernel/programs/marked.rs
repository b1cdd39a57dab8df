//! By which mark the replies of a moved address leave, for the [return path](super::return_path()).
//!
//! A host with several ways out may tell by a mark on its connections (`CONNMARK`) which of them
//! its answers take. Nothing of a moved address has a connection or a mark on this host, and a
//! program can ask the kernel for the route of a mark only since Linux 6.10. But the kernel itself
//! goes by the mark that a packet bears when it is sent out of an interface that is known. So the
//! daemon finds out which mark leads out by which interface, and the program sets it where the
//! route without a mark leads elsewhere.
//!
//! Owns the memory, and the phrases by which a program reads it.
//!
//! ```text
//! trie  u32 family, prefix  ->  u32 link, mark;  { u32 link, has_gateway; u8 gateway[16]; } [4]
//! ```
//!
//! What would leave by the same interface as the route without a mark, but not by its gateway, has
//! a route of its own: a client in that network, or behind another router there. It gets no mark.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Mutex;

use Reg::{R0, R1, R2, R10};

use super::headers::{fib, skb};
use super::moved::{Family, octets};
use super::phrases::{PACKET, look_up_at};
use crate::kernel::bpf::{Assembler, BpfError, If, Label, Map, MapKind, Reg, Shape, Size};
use crate::model::prefix::Prefix;

/// Most next hops that the routes without a mark lead to: ways to the Internet among which one
/// route chooses by itself.
pub const MAX_INSTEAD: usize = 4;

/// Where a route leads next: an interface (0 if no route leads anywhere), and the gateway, if there
/// is one.
pub type Hop = (u32, Option<IpAddr>);

/// No interface has this index.
const NO_LINK: u32 = u32::MAX;

/// Where a value has its parts.
const LINK: i16 = 0;
const MARK: i16 = 4;
const INSTEAD_OF: i16 = 8;
const VALUE: usize = INSTEAD_OF as usize + HOP * MAX_INSTEAD;

/// Where a hop has its parts: its interface comes first.
const HAS_GATEWAY: i16 = 4;
const GATEWAY: i16 = 8;
const HOP: usize = GATEWAY as usize + ADDRESS_LEN;

/// Where the address lies in a key: behind its length in bits, and the family.
const ADDRESS: i16 = 8;
const ADDRESS_LEN: usize = 16;

/// How replies of an address leave.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MarkedWay {
    /// The interface by which they leave; 0 for [`NONE`](Self::NONE).
    pub link: u32,
    /// The mark by which a rule leads there; 0 if none is wanted.
    pub mark: u32,
    /// Where they would leave without it. What would leave by any other interface or gateway does.
    /// A hop without a gateway stands for all that leaves by its interface: none tells the default
    /// route from others there.
    pub instead_of: [Option<Hop>; MAX_INSTEAD],
}

impl MarkedWay {
    /// The replies leave as they are, whatever is so of the prefix around them.
    pub const NONE: Self = Self {
        link: 0,
        mark: 0,
        instead_of: [None; MAX_INSTEAD],
    };

    fn value(&self) -> Vec<u8> {
        let mut value: Vec<u8> = [self.link, self.mark]
            .into_iter()
            .flat_map(u32::to_ne_bytes)
            .collect();
        for hop in self.instead_of {
            let (link, gateway) = hop.unwrap_or((NO_LINK, None));
            value.extend(link.to_ne_bytes());
            value.extend(u32::from(gateway.is_some()).to_ne_bytes());
            let end = value.len() + ADDRESS_LEN;
            value.extend(gateway.map(octets).unwrap_or_default());
            value.resize(end, 0);
        }
        value
    }
}

/// The memory.
#[derive(Debug)]
pub(super) struct Marked {
    map: Map,
    /// What is in it.
    known: Mutex<BTreeMap<Prefix, MarkedWay>>,
}

impl Marked {
    /// Nothing leaves by a mark at first.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(super) fn new() -> Result<Self, BpfError> {
        let map = Map::new(Shape {
            kind: MapKind::LpmTrie,
            name: "ipmoved_marked",
            key_size: ADDRESS as usize + ADDRESS_LEN,
            value_size: VALUE,
            // The kernel takes memory only for what there is.
            max_entries: 65_536,
        })?;
        Ok(Self {
            map,
            known: Mutex::default(),
        })
    }

    /// From now on replies of these prefixes leave so.
    ///
    /// # Errors
    /// If the kernel refuses. Some of it may be in effect then; the next call makes good for it.
    pub(super) fn update(&self, to: &BTreeMap<Prefix, MarkedWay>) -> Result<(), BpfError> {
        let refused = BpfError::of_map("ipmoved_marked");
        let mut known = self.known.lock().unwrap_or_else(|held| held.into_inner());
        for (&prefix, way) in to {
            if known.get(&prefix) != Some(way) {
                let entered = self.map.insert(&key(prefix), &way.value());
                entered.map_err(refused)?;
                known.insert(prefix, way.clone());
            }
        }
        let gone: Vec<Prefix> = known
            .keys()
            .filter(|it| !to.contains_key(it))
            .copied()
            .collect();
        for prefix in gone {
            self.map.remove(&key(prefix)).map_err(refused)?;
            known.remove(&prefix);
        }
        Ok(())
    }

    /// If the source of a question that was asked for a route, at this place of the stack, and that
    /// was [looked up](Self::look_up), leaves by a mark instead of by the interface `ifindex` and
    /// the next hop that the kernel has left in place of the destination: sets the mark, makes
    /// `ifindex` the right one, and jumps. Destroys R1 and R2.
    pub(super) fn jump_if_instead(a: &mut Assembler, question: i16, ifindex: Reg, marked: Label) {
        let (instead, no) = (a.label(), a.label());
        a.jump_if_wide(R0, If::Eq, 0, no);
        for at in (0..MAX_INSTEAD as i16).map(|number| INSTEAD_OF + HOP as i16 * number) {
            let next = a.label();
            a.load(Size::W, R1, R0, at);
            a.jump_if(R1, If::Ne, ifindex, next);
            a.load(Size::W, R1, R0, at + HAS_GATEWAY);
            a.jump_if(R1, If::Eq, 0, instead);
            // Behind an IPv4 address there are zeros, unless the gateway is one of IPv6.
            for word in (0..ADDRESS_LEN as i16).step_by(4) {
                a.load(Size::W, R1, R0, at + GATEWAY + word);
                a.load(Size::W, R2, R10, question + fib::DESTINATION + word);
                a.jump_if(R1, If::Ne, R2, next);
            }
            a.jump(instead);
            a.bind(next);
        }
        a.jump(no);
        a.bind(instead);
        a.load(Size::W, R1, R0, MARK);
        a.store(Size::W, PACKET, skb::MARK, R1);
        a.load(Size::W, ifindex, R0, LINK);
        a.jump(marked);
        a.bind(no);
    }

    /// If the address that stands as the source of a question leaves by a mark: makes `ifindex` the
    /// interface by which it does, which is the one by which it is reached.
    pub(super) fn find_link(
        &self,
        a: &mut Assembler,
        (family, question): (Family, i16),
        ifindex: Reg,
    ) {
        let no = a.label();
        self.look_up(a, family, question);
        a.jump_if_wide(R0, If::Eq, 0, no);
        a.load(Size::W, R1, R0, LINK);
        a.jump_if(R1, If::Eq, 0, no);
        a.mov(ifindex, R1);
        a.bind(no);
    }

    /// R0 = where the way stands of the address that is the source of a question, or 0. Destroys R1
    /// to R5 and what the question had between its family and its addresses.
    pub(super) fn look_up(&self, a: &mut Assembler, family: Family, question: i16) {
        // The question has its source where the key has the address, with zeros behind a short one.
        let key_at = question + fib::SOURCE - ADDRESS;
        let [b0, b1, b2, b3] = (32 + 8 * ADDRESS_LEN as u32).to_ne_bytes();
        let [b4, b5, b6, b7] = number(family == Family::V4).to_ne_bytes();
        a.mov_wide(R0, u64::from_ne_bytes([b0, b1, b2, b3, b4, b5, b6, b7]));
        a.store(Size::Dw, R10, key_at, R0);
        look_up_at(a, &self.map, key_at);
    }
}

/// The family in a key.
fn number(is_ipv4: bool) -> u32 {
    let family = if is_ipv4 {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    family.cast_unsigned()
}

fn key(prefix: Prefix) -> Vec<u8> {
    let mut key = Vec::from((32 + u32::from(prefix.len())).to_ne_bytes());
    key.extend(number(prefix.is_ipv4()).to_ne_bytes());
    key.extend(octets(prefix.first()));
    key.resize(ADDRESS as usize + ADDRESS_LEN, 0);
    key
}
