//! What has moved of each address, for the programs of the old server: all of it, or which ports.
//!
//! Owns what the number of a scope ([`Moved`]) says here, the sets of ports that it refers to, and
//! the phrase that decides by them. Neither the size of a program nor what it costs depends on how
//! many moves there are; and moves may change while programs run.
//!
//! ```text
//! u32 rights;      // bits 0 to 12: the set of TCP ports, from 1 on; 0: none
//!                  // bits 13 to 25: the set of UDP ports
//!                  // WHOLE: every protocol, whatever its ports
//!                  // TUNNEL_END: the tunnel's port of UDP is the tunnel's own there
//! u64 sets[][1024]; // one bit for each port; equal sets are one
//! ```

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::Mutex;

use rustix::io::Errno;

use Reg::{R0, R1, R10};

use super::moved::{Family, Moved};
use super::phrases::{PROTOCOL, look_up_at};
use crate::kernel::bpf::{Alu, Assembler, BpfError, If, Label, Map, MapKind, Reg, Shape, Size};
use crate::model::moved::{MAX_PORT_SETS, Move, TCP, UDP};
use crate::model::prefix::Prefix;
use crate::model::scopes::{Scopes, number_of};

/// Bits of the number of a set.
const SET_BITS: u32 = 13;
const SET: u32 = (1 << SET_BITS) - 1;

const WHOLE: u32 = 1 << 28;
const TUNNEL_END: u32 = 1 << 29;

const _: () = assert!(MAX_PORT_SETS < SET as usize);

/// Words of 64 bits of a set, as a power of two. Each is a value of the map: a program without
/// CAP_PERFMON may not add a port to the address of a longer one.
const SET_WORDS: u32 = 10;

/// Ports of a word, as a power of two.
const WORD_PORTS: u32 = 6;

/// Where the number of a word lies on the stack: below what programs have there by then.
const WORD_AT: i16 = -128;

/// What has moved.
#[derive(Debug)]
pub(super) struct Rights {
    moved: Moved,
    sets: Map,
    scopes: Scopes,
    /// What each scope has.
    of_scopes: Vec<u32>,
    /// The moved addresses at which the tunnel has an end.
    ends: Mutex<BTreeSet<IpAddr>>,
}

impl Rights {
    /// For these moves. The tunnel has no end at any of them at first.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(super) fn new(moves: &[Move]) -> Result<Self, BpfError> {
        let scopes = Scopes::new(moves);
        let mut numbers: HashMap<Vec<RangeInclusive<u16>>, u32> = HashMap::new();
        let mut of_scopes = Vec::with_capacity(scopes.len());
        for scope in 0..scopes.len() {
            if scopes.is_whole(scope) {
                of_scopes.push(WHOLE);
                continue;
            }
            let [tcp, udp] = scopes.ports(scope).map(|ports| {
                let next = numbers.len() as u32 + 1;
                if ports.is_empty() {
                    0
                } else {
                    *numbers.entry(ports).or_insert(next)
                }
            });
            of_scopes.push(tcp | udp << SET_BITS);
        }
        let name = "ipmoved_ports";
        let sets = Map::new(Shape {
            kind: MapKind::Array,
            name,
            key_size: size_of::<u32>(),
            value_size: size_of::<u64>(),
            max_entries: (numbers.len().max(1) as u32) << SET_WORDS,
        })?;
        for (ports, number) in &numbers {
            enter_set(&sets, number - 1, ports).map_err(BpfError::of_map(name))?;
        }
        let rights = Self {
            moved: Moved::new()?,
            sets,
            scopes,
            of_scopes,
            ends: Mutex::default(),
        };
        rights.moved.update(rights.entries(&BTreeSet::new()))?;
        Ok(rights)
    }

    /// From now on the tunnel's own ends are at those of these addresses that have moved.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(super) fn set_tunnel_ends(
        &self,
        addrs: impl Iterator<Item = IpAddr>,
    ) -> Result<(), BpfError> {
        let ends: BTreeSet<IpAddr> = addrs.filter(|&addr| self.scopes.contains(addr)).collect();
        let mut known = self.ends.lock().unwrap_or_else(|held| held.into_inner());
        if *known != ends {
            self.moved.update(self.entries(&ends))?;
            *known = ends;
        }
        Ok(())
    }

    /// What each prefix has. An end of the tunnel is one of its own.
    fn entries(&self, ends: &BTreeSet<IpAddr>) -> BTreeMap<Prefix, u32> {
        let scopes = (0..).zip(&self.of_scopes);
        let mut all: BTreeMap<Prefix, u32> = scopes
            .map(|(scope, &rights)| (self.scopes.prefix(scope), rights))
            .collect();
        for &end in ends {
            let scope = self.scopes.find(number_of(end));
            if let Some(rights) = scope.and_then(|scope| self.of_scopes.get(scope)) {
                all.insert(end.into(), rights | TUNNEL_END);
            }
        }
        all
    }

    /// `rights` = those of the address at this place of the stack; see [`Moved::look_up`]. Jumps to
    /// `none` if nothing of it has moved.
    pub(super) fn load(
        &self,
        a: &mut Assembler,
        (family, address_at): (Family, i16),
        rights: Reg,
        none: Label,
    ) {
        self.moved.look_up(a, family, address_at);
        a.jump_if_wide(R0, If::Eq, 0, none);
        a.load(Size::W, rights, R0, 0);
    }

    /// Jumps to `taken` if any port of PROTOCOL has moved, and to `not` if none has.
    pub(super) fn decide_by_protocol(a: &mut Assembler, rights: Reg, taken: Label, not: Label) {
        let next = a.label();
        a.jump_if(rights, If::Set, WHOLE, taken);
        a.jump_if(PROTOCOL, If::Ne, i32::from(TCP), next);
        a.jump_if(rights, If::Set, SET, taken);
        a.jump(not);
        a.bind(next);
        a.jump_if(PROTOCOL, If::Ne, i32::from(UDP), not);
        a.jump_if(rights, If::Set, SET << SET_BITS, taken);
        a.jump(not);
    }

    /// Jumps to `taken` if a port of PROTOCOL, which is TCP or UDP, has moved, and to `not` if it
    /// has not, or if it is the tunnel's own, `tunnel_port` of UDP at one of its ends.
    pub(super) fn decide_by_port(
        &self,
        a: &mut Assembler,
        rights: Reg,
        port: Reg,
        tunnel_port: Option<u16>,
        (taken, not): (Label, Label),
    ) {
        let (others, tcp) = (a.label(), a.label());
        if let Some(tunnel_port) = tunnel_port {
            a.jump_if(PROTOCOL, If::Ne, i32::from(UDP), others);
            a.jump_if(port, If::Ne, i32::from(tunnel_port), others);
            a.jump_if(rights, If::Set, TUNNEL_END, not);
        }
        a.bind(others);
        a.jump_if(rights, If::Set, WHOLE, taken);
        a.mov(R0, rights);
        a.jump_if(PROTOCOL, If::Eq, i32::from(TCP), tcp);
        a.alu(Alu::Rsh, R0, SET_BITS);
        a.bind(tcp);
        a.alu(Alu::And, R0, SET);
        a.jump_if(R0, If::Eq, 0, not);
        a.alu(Alu::Sub, R0, 1);
        a.alu(Alu::Lsh, R0, SET_WORDS);
        a.mov(R1, port);
        a.alu(Alu::Rsh, R1, WORD_PORTS);
        a.alu(Alu::Add, R0, R1);
        a.store(Size::W, R10, WORD_AT, R0);
        look_up_at(a, &self.sets, WORD_AT);
        a.jump_if_wide(R0, If::Eq, 0, not);
        a.load(Size::Dw, R0, R0, 0);
        a.mov(R1, port);
        a.alu(Alu::And, R1, (1 << WORD_PORTS) - 1);
        a.alu(Alu::Rsh, R0, R1);
        a.jump_if(R0, If::Set, 1, taken);
        a.jump(not);
    }

    /// Jumps if the address alone decides.
    pub(super) fn jump_if_by_address(a: &mut Assembler, rights: Reg, to: Label) {
        a.mov(R0, rights);
        a.alu(Alu::And, R0, WHOLE | TUNNEL_END);
        a.jump_if(R0, If::Eq, WHOLE, to);
    }

    /// Jumps if all of the address has moved.
    pub(super) fn jump_if_whole(a: &mut Assembler, rights: Reg, to: Label) {
        a.jump_if(rights, If::Set, WHOLE, to);
    }

    /// R0 = 0 unless the address at this place of the stack has moved; see [`Moved::look_up`].
    pub(super) fn look_up(&self, a: &mut Assembler, family: Family, address_at: i16) {
        self.moved.look_up(a, family, address_at);
    }
}

/// Enters the ports of a set, which is empty.
fn enter_set(sets: &Map, set: u32, ports: &[RangeInclusive<u16>]) -> Result<(), Errno> {
    for (word, bits) in (0..).zip(words(ports)) {
        if bits != 0 {
            sets.set(set << SET_WORDS | word, bits)?;
        }
    }
    Ok(())
}

/// The words of a set of ports, in order. It goes by words and not by ports: there may be thousands
/// of sets of nearly every port.
fn words(ports: &[RangeInclusive<u16>]) -> Vec<u64> {
    const LAST_BIT: u32 = (1 << WORD_PORTS) - 1;
    let mut words = vec![0_u64; 1 << SET_WORDS];
    for range in ports.iter().filter(|range| !range.is_empty()) {
        let (first, last) = (u32::from(*range.start()), u32::from(*range.end()));
        let within = first >> WORD_PORTS..=last >> WORD_PORTS;
        for (at, word) in words.iter_mut().enumerate().skip(*within.start() as usize) {
            let at = at as u32;
            if at > *within.end() {
                break;
            }
            let from = if at == *within.start() {
                first & LAST_BIT
            } else {
                0
            };
            let to = if at == *within.end() {
                last & LAST_BIT
            } else {
                LAST_BIT
            };
            *word |= u64::MAX << from & u64::MAX >> (LAST_BIT - to);
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_has_the_ports_of_its_ranges_and_no_others() {
        for ports in [
            &[][..],
            &[0..=0],
            &[0..=u16::MAX],
            &[63..=64],
            &[64..=127],
            &[
                5..=5,
                7..=9,
                60..=70,
                128..=191,
                1_000..=60_001,
                65_535..=65_535,
            ],
        ] {
            let words = words(ports);
            for port in 0..=u16::MAX {
                let word = words[usize::from(port >> WORD_PORTS)];
                let has = word >> (port % (1 << WORD_PORTS)) & 1 == 1;
                assert_eq!(
                    has,
                    ports.iter().any(|range| range.contains(&port)),
                    "{port}"
                );
            }
        }
    }
}
