//! The moved addresses, for programs: which scope an address lies in.
//!
//! Owns what holds them, and the phrase by which a program asks. What a number stands for is the
//! business of whoever fills it. The most specific prefix counts.
//!
//! ```text
//! ranges   the lowest and the highest value of some words of all that has moved (`Words`)
//! singles  a hash table a family, from addresses to numbers
//! prefixes a trie a family, from shorter prefixes to numbers
//!
//! for each word: if (address.word < range.lowest || address.word > range.highest) return 0;
//! return lookup(singles, address) ?: range.prefixes ? lookup(prefixes, address) : 0;
//! ```
//!
//! So most addresses that have not moved cost no call, and single ones the same however many they
//! are. (As BPF_PROG_TEST_RUN counts: an address out of the ranges 3 ns, a single one 18 ns; a trie
//! 9 ns, and 3 ns more each time that the number of its prefixes doubles.)
//!
//! It may be filled anew at any time, while programs run. An entry is entered or given a new number
//! in one step, and what goes is removed last, so an entry that stays is never missing.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::Mutex;

use rustix::io::Errno;

use Reg::{R0, R1, R2, R10};

use super::phrases::look_up_at;
use crate::kernel::bpf::{Assembler, BpfError, If, Map, MapKind, Reg, Shape, Size, Words};
use crate::model::prefix::Prefix;

/// Most entries of each map: far more than there may be of old and new ones together while they
/// change. The kernel takes memory only for what there is.
const MAX_ENTRIES: u32 = 65_536;

/// Size of the length that keys of tries begin with.
const LENGTH: usize = size_of::<u32>();

/// A family of addresses, as programs tell them apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    fn of(prefix: Prefix) -> Self {
        if prefix.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// Bytes of an address.
    pub(super) fn bytes(self) -> u32 {
        match self {
            Self::V4 => 4,
            Self::V6 => 16,
        }
    }

    /// The words of an address that have a range, as bytes from its start: of IPv6 the last word,
    /// which tells most addresses of a network apart, and the one that tells most networks apart.
    fn words(self) -> &'static [u32] {
        match self {
            Self::V4 => &[0],
            Self::V6 => &[12, 4],
        }
    }

    /// Its first word among those of the ranges: `prefixes`, then the lowest and the highest value
    /// of each of its words.
    fn first_range(self) -> usize {
        match self {
            Self::V4 => 0,
            Self::V6 => 3,
        }
    }
}

/// Words of the ranges.
const RANGES: usize = 8;

/// The moved addresses that programs ask for.
#[derive(Debug)]
pub struct Moved {
    ranges: Words,
    v4: Maps,
    v6: Maps,
    /// What is in them.
    entries: Mutex<BTreeMap<Prefix, u32>>,
}

/// The maps of a family.
#[derive(Debug)]
struct Maps {
    singles: Map,
    prefixes: Map,
}

impl Maps {
    fn new(family: Family) -> Result<Self, BpfError> {
        let map = |kind, name, key_size| {
            Map::new(Shape {
                kind,
                name,
                key_size,
                value_size: size_of::<u32>(),
                max_entries: MAX_ENTRIES,
            })
        };
        let [singles, prefixes] = match family {
            Family::V4 => ["ipmoved_single4", "ipmoved_prefix4"],
            Family::V6 => ["ipmoved_single6", "ipmoved_prefix6"],
        };
        let length = family.bytes() as usize;
        Ok(Self {
            singles: map(MapKind::Hash, singles, length)?,
            prefixes: map(MapKind::LpmTrie, prefixes, LENGTH + length)?,
        })
    }

    fn enter(&self, prefix: Prefix, scope: u32) -> Result<(), Errno> {
        let (map, key) = self.place(prefix);
        map.insert(&key, &scope.to_ne_bytes())
    }

    fn remove(&self, prefix: Prefix) -> Result<(), Errno> {
        let (map, key) = self.place(prefix);
        map.remove(&key)
    }

    fn place(&self, prefix: Prefix) -> (&Map, Vec<u8>) {
        if prefix.is_single() {
            return (&self.singles, octets(prefix.first()));
        }
        let mut key = Vec::from(u32::from(prefix.len()).to_ne_bytes());
        key.extend(octets(prefix.first()));
        (&self.prefixes, key)
    }
}

impl Moved {
    /// Nothing has moved at first.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn new() -> Result<Self, BpfError> {
        let moved = Self {
            ranges: Words::new("ipmoved_ranges", RANGES)?,
            v4: Maps::new(Family::V4)?,
            v6: Maps::new(Family::V6)?,
            entries: Mutex::default(),
        };
        moved.set_ranges([].iter());
        Ok(moved)
    }

    /// From now on these prefixes have moved, each with the number of its scope.
    ///
    /// # Errors
    /// If the kernel refuses. Some of it may be in effect then; the next call makes good for it.
    pub fn update(&self, to: impl IntoIterator<Item = (Prefix, u32)>) -> Result<(), BpfError> {
        let refused = BpfError::of_map("ipmoved_moved");
        let to: BTreeMap<Prefix, u32> = to.into_iter().collect();
        let mut now = self.entries.lock().unwrap_or_else(|held| held.into_inner());
        self.set_ranges(now.keys().chain(to.keys()));
        for (&prefix, &scope) in &to {
            if now.get(&prefix) != Some(&scope) {
                (self.maps(prefix).enter(prefix, scope)).map_err(refused)?;
                now.insert(prefix, scope);
            }
        }
        let gone = now.keys().filter(|it| !to.contains_key(it));
        for prefix in gone.copied().collect::<Vec<_>>() {
            self.maps(prefix).remove(prefix).map_err(refused)?;
            now.remove(&prefix);
        }
        self.set_ranges(to.keys());
        Ok(())
    }

    /// Sets the ranges to those of these prefixes.
    fn set_ranges<'a>(&self, prefixes: impl Iterator<Item = &'a Prefix> + Clone) {
        for family in [Family::V4, Family::V6] {
            let of_family = prefixes.clone().filter(|&&it| Family::of(it) == family);
            let tries = of_family.clone().any(|prefix| !prefix.is_single());
            self.ranges.set(family.first_range(), u32::from(tries));
            for (number, &at) in family.words().iter().enumerate() {
                let (mut lowest, mut highest) = (u32::MAX, 0);
                for prefix in of_family.clone() {
                    lowest = lowest.min(word(prefix.first(), at));
                    highest = highest.max(word(prefix.last(), at));
                }
                let place = family.first_range() + 1 + 2 * number;
                self.ranges.set(place, lowest);
                self.ranges.set(place + 1, highest);
            }
        }
    }

    /// R0 = where the number of the scope stands (`u32`) that the most specific prefix with this
    /// address has, or 0 if the address has not moved.
    ///
    /// The address lies on the stack, in bytes as on the wire, and the word before it is this
    /// phrase's to write. Destroys R1 to R5.
    pub(super) fn look_up(&self, a: &mut Assembler, family: Family, address_at: i16) {
        let maps = match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        };
        let (none, done) = (a.label(), a.label());
        a.load_address(R2, self.ranges.as_fd(), Words::offset(family.first_range()));
        for (number, &at) in (0..).zip(family.words()) {
            let range = Words::offset(1 + 2 * number) as i16;
            a.load(Size::W, R0, R10, address_at + at as i16);
            a.swap_if_little_endian(R0);
            a.load(Size::W, R1, R2, range);
            a.jump_if(R0, If::Lt, R1, none);
            a.load(Size::W, R1, R2, range + Words::offset(1) as i16);
            a.jump_if(R0, If::Gt, R1, none);
        }
        look_up_at(a, &maps.singles, address_at);
        a.jump_if_wide(R0, If::Ne, 0, done);
        a.load_address(R2, self.ranges.as_fd(), Words::offset(family.first_range()));
        a.load(Size::W, R1, R2, 0);
        a.jump_if(R1, If::Eq, 0, none);
        let key_at = address_at - LENGTH as i16;
        a.store(Size::W, R10, key_at, 8 * family.bytes());
        look_up_at(a, &maps.prefixes, key_at);
        a.jump(done);
        a.bind(none);
        a.mov(R0, 0);
        a.bind(done);
    }

    fn maps(&self, prefix: Prefix) -> &Maps {
        match Family::of(prefix) {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }
}

pub(super) fn octets(addr: IpAddr) -> Vec<u8> {
    match addr {
        IpAddr::V4(addr) => addr.octets().into(),
        IpAddr::V6(addr) => addr.octets().into(),
    }
}

/// The word of an address that begins so many bytes behind its start.
pub(super) fn word(addr: IpAddr, at: u32) -> u32 {
    match addr {
        IpAddr::V4(addr) => addr.to_bits(),
        IpAddr::V6(addr) => (addr.to_bits() >> (96 - 8 * at)) as u32,
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

    use proptest::prelude::*;
    use proptest::test_runner::TestRunner;

    use Reg::{R3, R4};

    use super::*;
    use crate::kernel::bpf::test_run::{nanoseconds, run};
    use crate::kernel::bpf::{Alu, Helper};
    use crate::kernel::programs::headers::{ipv4, ipv6};
    use crate::kernel::programs::phrases::{PACKET, branch_by_family, keep_packet, verdict};
    use crate::kernel::programs::testing::{L2, Packet, frame, ports};
    use crate::kernel::testing::{capabilities_of_the_unit, in_fresh_namespace, keep_only};
    use crate::model::moved::UDP;

    /// No scope has this number.
    const NONE: u32 = 0xffff;

    /// A program whose verdict is the scope of a packet's destination, or [`NONE`].
    fn scope_of_destination(moved: &Moved) -> OwnedFd {
        let mut asm = Assembler::new();
        let a = &mut asm;
        let (v6, found, none) = (a.label(), a.label(), a.label());
        keep_packet(a);
        branch_by_family(a, v6, none);
        let ask = |a: &mut Assembler, family: Family, offset| {
            a.mov(R1, PACKET);
            a.mov(R2, L2 + offset);
            a.mov(R3, R10);
            a.alu(Alu::Add, R3, -16);
            a.mov(R4, family.bytes());
            a.call(Helper::SkbLoadBytes);
            moved.look_up(a, family, -16);
            a.jump_if_wide(R0, If::Ne, 0, found);
            a.jump(none);
        };
        ask(a, Family::V4, ipv4::DESTINATION);
        a.bind(v6);
        ask(a, Family::V6, ipv6::DESTINATION);
        a.bind(found);
        a.load(Size::W, R0, R0, 0);
        a.exit();
        a.bind(none);
        verdict(a, NONE as i32);
        asm.finish("ipmoved_test").unwrap().load().unwrap()
    }

    fn packet_to(addr: IpAddr) -> Vec<u8> {
        let from = if addr.is_ipv4() {
            "203.0.113.7"
        } else {
            "2001:db8::99"
        };
        frame(&Packet::new(from, &addr.to_string(), UDP, ports(1, 2)).bytes())
    }

    fn scope(program: &OwnedFd, addr: IpAddr) -> Option<u32> {
        let verdict = run(program.as_fd(), &packet_to(addr)).verdict as u32;
        (verdict != NONE).then_some(verdict)
    }

    fn prefix(text: &str) -> Prefix {
        text.parse().unwrap()
    }

    #[test]
    fn the_most_specific_prefix_counts_and_changes_are_seen_at_once() {
        in_fresh_namespace(|| {
            keep_only(capabilities_of_the_unit());
            let moved = Moved::new().unwrap();
            let program = scope_of_destination(&moved);
            let at = |addr: &str| scope(&program, addr.parse().unwrap());
            assert_eq!((at("192.0.2.5"), at("2001:db8::5")), (None, None));
            let all = [
                (prefix("192.0.2.0/28"), 1),
                (prefix("192.0.2.5"), 2),
                (prefix("2001:db8::/64"), 3),
                (prefix("2001:db8::5"), 4),
            ];
            moved.update(all).unwrap();
            assert_eq!((at("192.0.2.0"), at("192.0.2.15")), (Some(1), Some(1)));
            assert_eq!((at("192.0.2.5"), at("192.0.2.16")), (Some(2), None));
            assert_eq!((at("2001:db8::1"), at("2001:db8::5")), (Some(3), Some(4)));
            assert_eq!(at("2001:db8:0:1::5"), None);
            moved.update([all[0], (prefix("2001:db8::5"), 7)]).unwrap();
            assert_eq!((at("192.0.2.5"), at("2001:db8::5")), (Some(1), Some(7)));
            assert_eq!(at("2001:db8::1"), None);
            moved.update([(prefix("0.0.0.0/0"), 9)]).unwrap();
            assert_eq!((at("192.0.2.5"), at("2001:db8::5")), (Some(9), None));
        });
    }

    #[test]
    fn it_answers_as_a_walk_through_all_prefixes_would() {
        let addr = prop_oneof![
            (0u32..64).prop_map(|host| IpAddr::V4((0xc000_0200 + host).into())),
            (0u128..64).prop_map(|host| IpAddr::V6(((0x2001_0db8 << 96) + (host << 61)).into())),
        ];
        let prefixes = || {
            let one = (addr.clone(), 0u8..=128, 0u32..1000);
            proptest::collection::vec(one, 0..20)
        };
        in_fresh_namespace(|| {
            let moved = Moved::new().unwrap();
            let program = scope_of_destination(&moved);
            let mut runner = TestRunner::new(ProptestConfig::with_cases(40));
            let strategy = (prefixes(), proptest::collection::vec(addr.clone(), 1..20));
            runner
                .run(&strategy, |(set, addrs)| {
                    let set: BTreeMap<Prefix, u32> = set
                        .into_iter()
                        .map(|(addr, len, scope)| (Prefix::of(addr, len), scope))
                        .collect();
                    moved.update(set.clone()).unwrap();
                    for addr in addrs {
                        let holding = set.iter().filter(|(prefix, _)| prefix.contains(addr));
                        let expected = holding.max_by_key(|(prefix, _)| prefix.len());
                        let expected = expected.map(|(_, &scope)| scope);
                        prop_assert_eq!(scope(&program, addr), expected, "{}", addr);
                    }
                    Ok(())
                })
                .unwrap();
        });
    }

    #[test]
    fn what_stays_is_never_missing_while_all_else_changes() {
        in_fresh_namespace(|| {
            let moved = Moved::new().unwrap();
            let program = scope_of_destination(&moved);
            let stays = (prefix("192.0.2.5"), 5);
            moved.update([stays]).unwrap();
            let done = AtomicBool::new(false);
            std::thread::scope(|threads| {
                threads.spawn(|| {
                    while !done.load(Relaxed) {
                        assert_eq!(scope(&program, "192.0.2.5".parse().unwrap()), Some(5));
                    }
                });
                let single = |n: u32| (Prefix::from(IpAddr::V4((0xc000_0200 + n).into())), n);
                for round in 0..100 {
                    let others = (0..64).filter(|n| n % 2 == round % 2 && *n != 5);
                    let all = others.map(single).chain([stays]);
                    moved
                        .update(all.chain([(prefix("192.0.2.0/24"), round)]))
                        .unwrap();
                    moved.update([stays]).unwrap();
                }
                done.store(true, Relaxed);
            });
        });
    }

    #[test]
    #[ignore = "a measurement: cargo test --lib -- --ignored --nocapture what_a_lookup_costs"]
    fn what_a_lookup_costs() {
        in_fresh_namespace(|| {
            let moved = Moved::new().unwrap();
            let program = scope_of_destination(&moved);
            for count in [0, 1, 64, 4096, 16384] {
                // Every second address, of both families.
                let v4 = |n: u32| IpAddr::V4((0x0a14_0000 + 2 * n).into());
                let v6 = |n: u32| {
                    let network = 0x2001_0db8_u128 << 96;
                    IpAddr::V6((network + u128::from(2 * n)).into())
                };
                let all = (0..count).flat_map(|n| [(v4(n), n), (v6(n), n)]);
                let all = all.map(|(addr, n)| (Prefix::from(addr), n));
                moved.update(all).unwrap();
                let packets = ["192.0.2.5", "10.20.0.255", "10.20.0.0"];
                let packets = packets
                    .into_iter()
                    .chain(["2001:db8::ffff:0:0", "2001:db8::"]);
                for to in packets {
                    let packet = packet_to(to.parse().unwrap());
                    let cost = nanoseconds(program.as_fd(), &packet);
                    eprintln!("{count} single addresses, packet to {to}: {cost} ns");
                }
            }
        });
    }
}
