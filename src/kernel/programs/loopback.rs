//! Brings this host's own calls of a moved address to the application under it, where the host
//! holds that address itself (`--outgoing`) and the kernel would keep them on the loopback
//! interface: for the egress of `lo`.
//!
//! A client that asks for a moved address is delivered to the delivery address, and so is who calls
//! it here, whatever else is bound to the moved address. The caller hears from whom it called. The
//! daemon has no part in it.
//!
//! ```text
//! struct call { u8 address[16]; u16 port; u16 kind; }
//! calls      by the key of a packet: LEADS, its destination becomes this; ANSWERS, its source
//!            becomes this; PLAIN, it stays as it is
//! targets    by moved prefix, or by moved address, protocol and port: where it is delivered, a
//!            port of 0 for the same one, and which bits of the destination stay in the address
//!
//! if (not IP || ip.daddr in 127.0.0.0/8 or ::/32) pass;
//! parse();                                     // not TCP or UDP, or a fragment: pass
//! call = TCP && SYN && !ACK ? 0 : lookup(calls, key);
//! if (!call) {
//!     if (TCP && not a SYN) pass;
//!     if (!served(inside, ip.daddr, port) || !(target = lookup(targets, ip.daddr, port))) {
//!         // Who answers this is not answering a call, though a moved address asks.
//!         if (lookup(calls, key of the answer) is ANSWERS) delete(calls, key of that call);
//!         else if (ip.saddr is no moved address) pass;
//!         update(calls, key of the answer, PLAIN);
//!         pass;
//!     }
//!     update(calls, key, { target, LEADS });
//!     update(calls, key of the answer, { ip.daddr, port, ANSWERS });
//! }
//! LEADS:   rewrite the destination; if (ip.saddr == what was called) arrive; else pass;
//! ANSWERS: rewrite the source; arrive;
//! quoted:  if (lookup(calls, key of the answer) is ANSWERS) rewrite both places; arrive;
//! arrive:  return redirect(lo, BPF_F_INGRESS);    // connection tracking sees a new packet
//! pass:    return TC_ACT_UNSPEC;
//! ```
//!
//! A packet that passes keeps its route, which is that to this host, and what connection tracking
//! knew of it before. One that arrives anew is seen as what it is now, so that an answer is one for
//! a firewall; for that IPv4 wants `accept_local` of `lo`. A call from another address of this host
//! passes, since a strict `rp_filter` wants such by their own interface.
//!
//! Fragments stay: `lo` takes 65,536 bytes at once. Ping does as well: the kernel answers it.
//!
//! As BPF_PROG_TEST_RUN counts: a packet to 127.0.0.1 or ::1 costs 8 ns, one between other
//! addresses of this host 65 to 100 ns, a call or an answer 175 to 195 ns.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, PoisonError};

use Reg::{R0, R1, R2, R3, R4, R5, R8, R9, R10};

use super::flows::{
    FlowMaps, KEY, KEY_LAST, KEY_LOCAL, KEY_REMOTE, enter_from, flow_of, look_up, remove, shape,
};
use super::headers::{icmp, icmpv6, ipv4, ipv6, ports, skb, tcp, udp};
use super::inside::{ADDRESS, branch_if_served};
use super::moved::Family;
use super::parse::{FRAGMENT, HEADER, Side, UNFRAGMENTED, Ways, load_syn, parse};
use super::phrases::{
    BPF_F_INGRESS, PACKET, PROTOCOL, TC_ACT_UNSPEC, TRANSPORT, branch_by_family, jump_if_v6,
    keep_packet, load_bytes, look_up_at, verdict,
};
use crate::flow::routes::Delivery;
use crate::kernel::bpf::{
    Alu, Assembler, BpfError, Helper, If, Label, Map, MapKind, Program, Reg, Shape, Size,
};
use crate::model::delivery_map::DeliveryMap;
use crate::model::moved::{Move, TCP, Transport, UDP};
use crate::model::prefix::Prefix;
use crate::packet::SYN;

/// The program's name.
pub const LOOPBACK: &str = "ipmoved_lo";

/// Entries for calls, two each. The one used least recently gives way: its UDP goes on as a new
/// call, its TCP connection ends. 131,072 take 16 MB, as far as they are in use.
const MAX_ENTRIES: u32 = 131_072;

/// Most targets: prefixes and mapped ports of all peers, old and new ones while they change. The
/// kernel takes memory only for what there is.
const MAX_TARGETS: u32 = 1 << 16;

/// What becomes of a packet.
const LEADS: u16 = 1;
const ANSWERS: u16 = 2;
const PLAIN: u16 = 3;

/// Where the parts of a call's value lie in it.
const CALL_PORT: i16 = 16;
const CALL_KIND: i16 = 18;
const CALL_BYTES: usize = 20;

/// A target's key is its length in bits, then a word for the family, the address, and what names
/// one port.
const LENGTH: usize = 4;
const TARGET_KEY_BYTES: usize = LENGTH + 24;
const FAMILY_BITS: u32 = 32;
const PORT_BITS: u32 = FAMILY_BITS + 128 + 32;
/// A target is an address, a port, and a mask of the address.
const TARGET_BYTES: usize = TARGET_MASK as usize + 16;
const TARGET_MASK: i16 = CALL_BYTES as i16;

/// Most addresses of a prefix of which a port is delivered elsewhere, each of which is a target of
/// its own: the key has the port behind the address. Calls to that port of a longer list go to the
/// same port.
const MAX_EXPANDED: usize = 256;

/// Where the stack keeps the key of the answer, that of a target, and a call's value.
const TURNED: i16 = -144;
const TURNED_LOCAL: i16 = TURNED + (KEY_LOCAL - KEY);
const TURNED_REMOTE: i16 = TURNED + (KEY_REMOTE - KEY);
const TURNED_LAST: i16 = TURNED + (KEY_LAST - KEY);
const TARGET_KEY: i16 = -176;
const TARGET: i16 = -200;

/// `lo` has Ethernet headers.
const L2: u32 = 14;

/// Flags of `bpf_l4_csum_replace`: what changes is part of the pseudo header; a checksum of zero
/// means that there is none.
const BPF_F_PSEUDO_HDR: i32 = 0x10;
const BPF_F_MARK_MANGLED_0: i32 = 0x20;

const CALLS: Shape = shape(MapKind::LruHash, "ipmoved_calls", CALL_BYTES, MAX_ENTRIES);
const TARGETS: Shape = Shape {
    kind: MapKind::LpmTrie,
    name: "ipmoved_targets",
    key_size: TARGET_KEY_BYTES,
    value_size: TARGET_BYTES,
    max_entries: MAX_TARGETS,
};

/// What a peer has moved here, and where that is delivered.
#[derive(Clone, Copy, Debug)]
pub struct PeerTargets<'a> {
    /// What has moved.
    pub moves: &'a [&'a Move],
    /// Where to.
    pub to: &'a Delivery,
}

/// Targets, by their keys.
type Targets = BTreeMap<[u8; TARGET_KEY_BYTES], [u8; TARGET_BYTES]>;

/// What the program knows.
#[derive(Debug)]
pub struct Loopback {
    calls: Map,
    targets: Map,
    /// What is in `targets`, unless that failed.
    last: Mutex<Option<Targets>>,
}

impl Loopback {
    /// The memory of calls is among `found`, if it is there. Nothing has a target at first.
    pub(super) fn new(found: impl FnOnce(Shape) -> Option<Map>) -> Result<Self, BpfError> {
        Ok(Self {
            calls: match found(CALLS) {
                Some(map) => map,
                None => Map::new(CALLS)?,
            },
            targets: Map::new(TARGETS)?,
            last: Mutex::default(),
        })
    }

    /// The descriptor of the memory, for the next daemon.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.calls.as_fd()
    }

    /// From now on calls are delivered so. Connections of TCP stay where they are.
    ///
    /// # Errors
    /// If the kernel refuses. Some of it may be in effect then; the next call makes good for it.
    pub fn deliver(&self, peers: &[PeerTargets<'_>]) -> Result<(), BpfError> {
        let refused = BpfError::of_map(TARGETS.name);
        let to = targets(peers);
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.as_ref() == Some(&to) {
            return Ok(());
        }
        *last = None;
        for (key, target) in &to {
            self.targets.insert(key, target).map_err(refused)?;
        }
        for gone in self.targets.keys().map_err(refused)? {
            if !to.contains_key(&gone[..]) {
                self.targets.remove(&gone).map_err(refused)?;
            }
        }
        self.forget_led_elsewhere()?;
        *last = Some(to);
        Ok(())
    }

    /// Forgets calls of UDP that lead elsewhere than new ones do: nothing ends them.
    fn forget_led_elsewhere(&self) -> Result<(), BpfError> {
        let refused = BpfError::of_map(CALLS.name);
        for key in self.calls.keys().map_err(refused)? {
            let (mut call, mut target) = ([0; CALL_BYTES], [0; TARGET_BYTES]);
            let Some(flow) = flow_of(&key).filter(|flow| flow.protocol == UDP) else {
                continue;
            };
            let port = flow.remote.port();
            let of_port = port_key(flow.remote.ip(), UDP, port);
            let known =
                self.calls.read(&key, &mut call) && self.targets.read(&of_port, &mut target);
            let (leads, anew) = (call_parts(&call), place_of(&target, flow.remote.ip()));
            let anew_port = if anew.1 == 0 { port } else { anew.1 };
            if known && leads.2 == LEADS && (leads.0, leads.1) != (anew.0, anew_port) {
                // It may have given way meanwhile.
                let _ = self.calls.remove(&key);
            }
        }
        Ok(())
    }
}

/// Where a call of this address is delivered by a target.
fn place_of(target: &[u8; TARGET_BYTES], called: IpAddr) -> ([u8; 16], u16) {
    let mut call = [0; CALL_BYTES];
    call.copy_from_slice(&target[..CALL_BYTES]);
    let (mut addr, port, _) = call_parts(&call);
    let mask = &target[TARGET_MASK as usize..];
    for ((byte, own), mask) in addr.iter_mut().zip(octets(called)).zip(mask) {
        *byte |= own & mask;
    }
    (addr, port)
}

/// Address, port and kind of a value.
fn call_parts(value: &[u8; CALL_BYTES]) -> ([u8; 16], u16, u16) {
    let mut addr = [0; 16];
    addr.copy_from_slice(&value[..16]);
    let port = u16::from_be_bytes([value[16], value[17]]);
    let kind = u16::from_ne_bytes([value[18], value[19]]);
    (addr, port, kind)
}

/// Where everything is delivered. A prefix that peers have delivered to different addresses, or
/// that lies in one which another peer has delivered elsewhere, has no target: which of them moved
/// a port is more than a prefix tells.
fn targets(peers: &[PeerTargets<'_>]) -> Targets {
    let mut prefixes: BTreeMap<Prefix, Of> = BTreeMap::new();
    let mut out = Targets::new();
    for (number, PeerTargets { moves, to }) in peers.iter().enumerate() {
        if to.keep {
            continue;
        }
        let (of_ports, whole): (Vec<_>, Vec<_>) =
            to.maps.iter().partition(|map| map.port.is_some());
        for moved in *moves {
            let within = whole.iter().filter(|map| moved.prefix.covers(&map.moved));
            let parts = within.map(|map| map.moved).filter(|it| *it != moved.prefix);
            for prefix in parts.chain([moved.prefix]) {
                let map = whole.iter().find(|map| map.moved.covers(&prefix));
                let to = match map {
                    Some(map) => Some(target(map.to, 0)),
                    None if prefix.is_ipv4() => to.v4.map(|to| target(IpAddr::V4(to).into(), 0)),
                    None => to.v6.map(|to| target(IpAddr::V6(to).into(), 0)),
                };
                let of = Of {
                    number,
                    to,
                    agreed: true,
                };
                let known = prefixes.entry(prefix).or_insert(of);
                known.agreed &= known.to == to;
            }
        }
        for map in of_ports {
            let transports: &[u8] = match map.port.and_then(|port| port.transport) {
                Some(Transport::Tcp) => &[TCP],
                Some(Transport::Udp) => &[UDP],
                None => &[TCP, UDP],
            };
            for &protocol in transports {
                expand(&mut out, moves, map, protocol);
            }
        }
    }
    // A prefix stands behind those that it lies in.
    let mut around: Vec<(Prefix, Of)> = Vec::new();
    for (prefix, of) in prefixes {
        while around
            .last()
            .is_some_and(|(outer, _)| !outer.covers(&prefix))
        {
            around.pop();
        }
        let agreed = of.agreed
            && around.last().is_none_or(|(_, outer)| {
                outer.agreed && (outer.to == of.to || outer.number == of.number)
            });
        around.push((prefix, Of { agreed, ..of }));
        let to = of.to.filter(|_| agreed);
        out.insert(prefix_key(prefix), to.unwrap_or([0; TARGET_BYTES]));
    }
    out
}

/// What is delivered of a prefix.
#[derive(Clone, Copy)]
struct Of {
    /// The peer's place among all.
    number: usize,
    /// None if there is no address of its family.
    to: Option<[u8; TARGET_BYTES]>,
    /// No other peer has anything of it delivered elsewhere.
    agreed: bool,
}

/// Enters the targets of a port that is delivered elsewhere, as far as it has moved.
fn expand(out: &mut Targets, moves: &[&Move], map: &DeliveryMap, protocol: u8) {
    let Some(mapped) = map.port else { return };
    let some = map.moved.addresses().take(MAX_EXPANDED + 1);
    let some: Vec<IpAddr> = some.collect();
    if some.len() > MAX_EXPANDED {
        return;
    }
    for addr in some {
        let takes =
            |moved: &&Move| moved.prefix.contains(addr) && moved.takes(protocol, Some(mapped.from));
        if moves.iter().copied().any(|moved| takes(&moved)) {
            let (to, port) = map.place(addr, mapped.from);
            out.entry(port_key(addr, protocol, mapped.from))
                .or_insert_with(|| target(to.into(), port));
        }
    }
}

/// Leads to the addresses of a prefix, each by its host part.
fn target(to: Prefix, port: u16) -> [u8; TARGET_BYTES] {
    let mut value = [0; TARGET_BYTES];
    put(&mut value[..16], to.first());
    value[16..18].copy_from_slice(&port.to_be_bytes());
    // The last address of a prefix is the first one with all bits of the host part.
    let ends = octets(to.first()).into_iter().zip(octets(to.last()));
    for (byte, (first, last)) in value[TARGET_MASK as usize..].iter_mut().zip(ends) {
        *byte = first ^ last;
    }
    value
}

/// The bytes of an address, IPv4 in the first four.
fn octets(addr: IpAddr) -> [u8; 16] {
    let mut out = [0; 16];
    put(&mut out, addr);
    out
}

fn prefix_key(prefix: Prefix) -> [u8; TARGET_KEY_BYTES] {
    key_of(prefix.first(), FAMILY_BITS + u32::from(prefix.len()))
}

fn port_key(addr: IpAddr, protocol: u8, port: u16) -> [u8; TARGET_KEY_BYTES] {
    let mut key = key_of(addr, PORT_BITS);
    key[24] = protocol;
    key[26..].copy_from_slice(&port.to_be_bytes());
    key
}

fn key_of(addr: IpAddr, bits: u32) -> [u8; TARGET_KEY_BYTES] {
    let mut key = [0; TARGET_KEY_BYTES];
    key[..4].copy_from_slice(&bits.to_ne_bytes());
    key[4] = if addr.is_ipv4() { 4 } else { 6 };
    put(&mut key[8..24], addr);
    key
}

/// An address, at the start of its room.
fn put(room: &mut [u8], addr: IpAddr) {
    match addr {
        IpAddr::V4(addr) => room[..4].copy_from_slice(&addr.octets()),
        IpAddr::V6(addr) => room[..16].copy_from_slice(&addr.octets()),
    }
}

/// The program. It lets IPv4 packets arrive anew only if `lo` accepts such as are from this host.
///
/// # Errors
/// If the program is too large.
pub fn loopback(maps: &FlowMaps, accepts_local: bool) -> Result<Program, BpfError> {
    let mut asm = Assembler::new();
    let a = &mut asm;
    let ways = Ways::new(a);
    let Loopback { calls, targets, .. } = &maps.loopback;
    let (v6, read, pass, arrive) = (a.label(), a.label(), a.label(), a.label());
    keep_packet(a);
    branch_by_family(a, v6, pass);
    a.load_packet(Size::B, L2 + ipv4::DESTINATION);
    a.jump_if(R0, If::Eq, 127, pass);
    a.jump(read);
    a.bind(v6);
    a.load_packet(Size::W, L2 + ipv6::DESTINATION);
    a.jump_if(R0, If::Eq, 0, pass);
    a.bind(read);
    parse(a, L2, Side::Host, ways);

    a.bind(ways.flow);
    let (ported, asked, new, served, other) =
        (a.label(), a.label(), a.label(), a.label(), a.label());
    let (leads, answers) = (a.label(), a.label());
    a.jump_if(FRAGMENT, If::Ne, UNFRAGMENTED, pass);
    for protocol in [TCP, UDP] {
        a.jump_if(PROTOCOL, If::Eq, i32::from(protocol), ported);
    }
    a.jump(pass);
    a.bind(ported);
    a.jump_if(PROTOCOL, If::Ne, i32::from(TCP), asked);
    load_syn(a);
    a.jump_if(R0, If::Eq, i32::from(SYN), new);
    a.bind(asked);
    look_up(a, calls);
    let unknown = a.label();
    a.jump_if_wide(R0, If::Eq, 0, unknown);
    a.load(Size::H, R1, R0, CALL_KIND);
    a.jump_if(R1, If::Eq, i32::from(PLAIN), pass);
    keep_target(a);
    a.jump_if(R1, If::Eq, i32::from(LEADS), leads);
    a.jump(answers);
    a.bind(unknown);
    a.jump_if(PROTOCOL, If::Eq, i32::from(TCP), pass);

    a.bind(new);
    branch_if_served(a, &maps.inside, served, other);
    a.bind(served);
    key_of_target(a);
    look_up_at(a, targets, TARGET_KEY);
    a.jump_if_wide(R0, If::Eq, 0, other);
    a.load(Size::W, R1, R0, 0);
    a.jump_if(R1, If::Eq, 0, other);
    keep_target(a);
    for word in (0..16).step_by(4) {
        a.load(Size::W, R1, R0, TARGET_MASK + word);
        a.load(Size::W, R2, R10, KEY_REMOTE + word);
        a.alu(Alu::And, R2, R1);
        a.load(Size::W, R1, R10, TARGET + word);
        a.alu(Alu::Or, R1, R2);
        a.store(Size::W, R10, TARGET + word, R1);
    }
    let mapped = a.label();
    a.load(Size::H, R1, R10, TARGET + CALL_PORT);
    a.jump_if(R1, If::Ne, 0, mapped);
    a.load(Size::H, R1, R10, KEY_LAST);
    a.store(Size::H, R10, TARGET + CALL_PORT, R1);
    a.bind(mapped);
    a.store(Size::H, R10, TARGET + CALL_KIND, i32::from(LEADS));
    enter_from(a, calls, TARGET);
    a.jump_if_wide(R0, If::Ne, 0, pass);
    turn_key(a, TARGET, TARGET + CALL_PORT);
    // What answers is the moved address and its port; the key of a target has room for it.
    copy(a, KEY_REMOTE, TARGET_KEY, 16);
    a.load(Size::H, R0, R10, KEY_LAST);
    a.store(Size::H, R10, TARGET_KEY + CALL_PORT, R0);
    a.store(Size::H, R10, TARGET_KEY + CALL_KIND, i32::from(ANSWERS));
    enter_turned(a, calls, TARGET_KEY);
    a.jump_if_wide(R0, If::Ne, 0, pass);
    a.bind(leads);
    rewrite(a, Which::Destination);
    for word in (0..16).step_by(4) {
        a.load(Size::W, R0, R10, KEY_LOCAL + word);
        a.load(Size::W, R1, R10, KEY_REMOTE + word);
        a.jump_if(R0, If::Ne, R1, pass);
    }
    a.jump(arrive);
    a.bind(answers);
    rewrite(a, Which::Source);
    a.jump(arrive);

    a.bind(other);
    let (plain, unasked) = (a.label(), a.label());
    turn_key(a, KEY_REMOTE, KEY_LAST);
    look_up_at(a, calls, TURNED);
    a.jump_if_wide(R0, If::Eq, 0, unasked);
    a.load(Size::H, R1, R0, CALL_KIND);
    a.jump_if(R1, If::Ne, i32::from(ANSWERS), pass);
    // The call ends with that.
    keep_target(a);
    copy(a, TARGET, KEY_REMOTE, 16);
    a.load(Size::H, R0, R10, TARGET + CALL_PORT);
    a.store(Size::H, R10, KEY_LAST, R0);
    remove(a, calls);
    a.jump(plain);
    a.bind(unasked);
    jump_unless_source_has_moved(a, maps, pass);
    a.bind(plain);
    for word in (0..CALL_BYTES as i16).step_by(4) {
        a.store(Size::W, R10, TARGET + word, 0);
    }
    a.store(Size::H, R10, TARGET + CALL_KIND, i32::from(PLAIN));
    enter_turned(a, calls, TARGET);
    a.jump(pass);

    a.bind(ways.quoted);
    a.jump_if(FRAGMENT, If::Ne, UNFRAGMENTED, pass);
    look_up(a, calls);
    a.jump_if_wide(R0, If::Eq, 0, pass);
    a.load(Size::H, R1, R0, CALL_KIND);
    a.jump_if(R1, If::Ne, i32::from(ANSWERS), pass);
    keep_target(a);
    rewrite_error(a, pass);

    a.bind(arrive);
    if !accepts_local {
        let v6 = a.label();
        jump_if_v6(a, v6);
        a.jump(pass);
        a.bind(v6);
    }
    a.load(Size::W, R1, PACKET, skb::IFINDEX);
    a.mov(R2, BPF_F_INGRESS);
    a.call(Helper::Redirect);
    a.exit();
    for label in [pass, ways.later, ways.none, ways.other] {
        a.bind(label);
    }
    verdict(a, TC_ACT_UNSPEC);
    asm.finish(LOOPBACK)
}

/// An end of a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Which {
    /// Where it comes from.
    Source,
    /// Where it goes.
    Destination,
}

impl Which {
    /// Where the key has the address and the port, and where the header has the port.
    fn places(self) -> (i16, i16, u32) {
        match self {
            Self::Source => (KEY_LOCAL, KEY_LAST + 2, ports::SOURCE),
            Self::Destination => (KEY_REMOTE, KEY_LAST, ports::DESTINATION),
        }
    }

    /// Where the header of a family has the address.
    fn address(self, family: Family) -> u32 {
        match (self, family) {
            (Self::Source, Family::V4) => ipv4::SOURCE,
            (Self::Destination, Family::V4) => ipv4::DESTINATION,
            (Self::Source, Family::V6) => ipv6::SOURCE,
            (Self::Destination, Family::V6) => ipv6::DESTINATION,
        }
    }
}

/// Copies the entry at R0 to the stack. R1 stays.
fn keep_target(a: &mut Assembler) {
    for word in (0..CALL_BYTES as i16).step_by(4) {
        a.load(Size::W, R2, R0, word);
        a.store(Size::W, R10, TARGET + word, R2);
    }
}

/// Copies words within the stack.
fn copy(a: &mut Assembler, from: i16, to: i16, length: i16) {
    for at in (0..length).step_by(4) {
        a.load(Size::W, R0, R10, from + at);
        a.store(Size::W, R10, to + at, R0);
    }
}

/// Makes the key of the target that the packet's destination has.
fn key_of_target(a: &mut Assembler) {
    a.store(Size::W, R10, TARGET_KEY, PORT_BITS);
    a.load(Size::W, R0, R10, KEY);
    a.alu(Alu::Rsh, R0, 8);
    a.store(Size::W, R10, TARGET_KEY + 4, 0);
    a.store(Size::B, R10, TARGET_KEY + 4, R0);
    copy(a, KEY_REMOTE, TARGET_KEY + 8, 16);
    a.store(Size::W, R10, TARGET_KEY + 24, 0);
    a.store(Size::B, R10, TARGET_KEY + 24, PROTOCOL);
    a.load(Size::H, R0, R10, KEY_LAST);
    a.store(Size::H, R10, TARGET_KEY + 26, R0);
}

/// Makes the key of what answers the packet from this address and port.
fn turn_key(a: &mut Assembler, addr: i16, port: i16) {
    copy(a, KEY, TURNED, 4);
    copy(a, addr, TURNED_LOCAL, 16);
    copy(a, KEY_LOCAL, TURNED_REMOTE, 16);
    a.load(Size::H, R0, R10, KEY_LAST + 2);
    a.store(Size::H, R10, TURNED_LAST, R0);
    a.load(Size::H, R0, R10, port);
    a.store(Size::H, R10, TURNED_LAST + 2, R0);
}

/// Enters that key, with the value that lies there. R0 = 0, or what is wrong.
fn enter_turned(a: &mut Assembler, calls: &Map, value: i16) {
    a.load_map(R1, calls.as_fd());
    a.mov(R2, R10);
    a.alu(Alu::Add, R2, i32::from(TURNED));
    a.mov(R3, R10);
    a.alu(Alu::Add, R3, i32::from(value));
    a.mov(R4, 0);
    a.call(Helper::MapUpdate);
}

/// Goes on if the packet comes from a moved address that is served here, of whatever port.
fn jump_unless_source_has_moved(a: &mut Assembler, maps: &FlowMaps, no: Label) {
    let (v6, looked) = (a.label(), a.label());
    copy(a, KEY_LOCAL, ADDRESS, 16);
    jump_if_v6(a, v6);
    maps.inside.moved.look_up(a, Family::V4, ADDRESS);
    a.jump(looked);
    a.bind(v6);
    maps.inside.moved.look_up(a, Family::V6, ADDRESS);
    a.bind(looked);
    a.jump_if_wide(R0, If::Eq, 0, no);
}

/// Where the program keeps the place of a checksum.
const CHECKSUM: Reg = R9;
/// And flags for it, since PROTOCOL is needed no more.
const FLAGS: Reg = R8;

/// Gives one end of the packet the address and port at [`TARGET`]. TRANSPORT is at its header.
fn rewrite(a: &mut Assembler, which: Which) {
    let (of_udp, ready, v6, port) = (a.label(), a.label(), a.label(), a.label());
    let (addr_at, port_at, in_header) = which.places();
    a.mov(CHECKSUM, TRANSPORT);
    a.jump_if(PROTOCOL, If::Eq, i32::from(UDP), of_udp);
    a.alu(Alu::Add, CHECKSUM, tcp::CHECKSUM);
    a.mov(FLAGS, 0);
    a.jump(ready);
    a.bind(of_udp);
    a.alu(Alu::Add, CHECKSUM, udp::CHECKSUM);
    a.mov(FLAGS, BPF_F_MARK_MANGLED_0);
    a.bind(ready);
    jump_if_v6(a, v6);
    replace_word_of_header(a, L2, addr_at);
    a.mov(R1, PACKET);
    a.mov(R2, CHECKSUM);
    a.load(Size::W, R3, R10, addr_at);
    a.load(Size::W, R4, R10, TARGET);
    a.mov(R5, FLAGS);
    a.alu(Alu::Or, R5, BPF_F_PSEUDO_HDR | 4);
    a.call(Helper::L4CsumReplace);
    store_bytes(a, L2 + which.address(Family::V4), TARGET, 4);
    a.jump(port);
    a.bind(v6);
    difference(a, addr_at);
    a.mov(R4, R0);
    a.mov(R1, PACKET);
    a.mov(R2, CHECKSUM);
    a.mov(R3, 0);
    a.mov(R5, FLAGS);
    a.alu(Alu::Or, R5, BPF_F_PSEUDO_HDR);
    a.call(Helper::L4CsumReplace);
    store_bytes(a, L2 + which.address(Family::V6), TARGET, 16);
    a.bind(port);
    a.mov(R1, PACKET);
    a.mov(R2, CHECKSUM);
    a.load(Size::H, R3, R10, port_at);
    a.load(Size::H, R4, R10, TARGET + CALL_PORT);
    a.mov(R5, FLAGS);
    a.alu(Alu::Or, R5, 2);
    a.call(Helper::L4CsumReplace);
    a.mov(R2, TRANSPORT);
    a.alu(Alu::Add, R2, in_header);
    store_bytes_at_r2(a, TARGET + CALL_PORT, 2);
}

/// Gives an ICMP error about a call, and the packet that it quotes, what was called in place of who
/// answers. TRANSPORT is at the quoted transport header, the key that of the answer. Jumps to
/// `pass` if there is more than an IP header before the message.
fn rewrite_error(a: &mut Assembler, pass: Label) {
    let (v6, done) = (a.label(), a.label());
    branch_by_family(a, v6, pass);
    for family in [Family::V4, Family::V6] {
        let (at, length, bytes) = match family {
            Family::V4 => (L2 + ipv4::LEN, ipv4::LEN, 4),
            Family::V6 => (L2 + ipv6::LEN, ipv6::LEN, 16),
        };
        let checksum = at + icmp::CHECKSUM;
        let quoted = at + icmp::QUOTED;
        let inner = quoted + Which::Destination.address(family);
        let outer = L2 + Which::Source.address(family);
        let from_elsewhere = a.label();
        match family {
            Family::V4 => {
                a.load_packet(Size::B, L2 + ipv4::VERSION_AND_IHL);
                a.jump_if(R0, If::Ne, ipv4::WITHOUT_OPTIONS, pass);
            }
            Family::V6 => {
                a.bind(v6);
                a.load_packet(Size::B, L2 + ipv6::NEXT_HEADER);
                a.jump_if(R0, If::Ne, i32::from(icmpv6::PROTOCOL), pass);
            }
        }
        debug_assert_eq!(at, L2 + length, "nothing before the message");
        // The port.
        a.mov(R1, PACKET);
        a.mov(R2, checksum);
        a.load(Size::H, R3, R10, KEY_LAST + 2);
        a.load(Size::H, R4, R10, TARGET + CALL_PORT);
        a.mov(R5, 2);
        a.call(Helper::L4CsumReplace);
        a.mov(R2, TRANSPORT);
        a.alu(Alu::Add, R2, ports::DESTINATION);
        store_bytes_at_r2(a, TARGET + CALL_PORT, 2);
        // The quoted address. The checksum of a quoted IPv4 header makes up for it.
        match family {
            Family::V4 => replace_word_of_header(a, quoted, KEY_LOCAL),
            Family::V6 => replace_difference(a, checksum, 0),
        }
        store_bytes(a, inner, TARGET, bytes);
        // The address that the error comes from, if it is the same.
        load_bytes(a, outer, HEADER, bytes);
        a.jump_if_wide(R0, If::Ne, 0, from_elsewhere);
        for word in (0..bytes as i16).step_by(4) {
            a.load(Size::W, R0, R10, HEADER + word);
            a.load(Size::W, R1, R10, KEY_LOCAL + word);
            a.jump_if(R0, If::Ne, R1, from_elsewhere);
        }
        match family {
            Family::V4 => replace_word_of_header(a, L2, KEY_LOCAL),
            Family::V6 => replace_difference(a, checksum, BPF_F_PSEUDO_HDR),
        }
        store_bytes(a, outer, TARGET, bytes);
        a.bind(from_elsewhere);
        if family == Family::V4 {
            a.jump(done);
        }
    }
    a.bind(done);
}

/// Mends the checksum of the IPv4 header that begins there: the word at that place of the stack
/// becomes that at [`TARGET`].
fn replace_word_of_header(a: &mut Assembler, header: u32, from: i16) {
    a.mov(R1, PACKET);
    a.mov(R2, header + ipv4::CHECKSUM);
    a.load(Size::W, R3, R10, from);
    a.load(Size::W, R4, R10, TARGET);
    a.mov(R5, 4);
    a.call(Helper::L3CsumReplace);
}

/// Mends a checksum at a fixed place: the local address of the key becomes that at [`TARGET`].
fn replace_difference(a: &mut Assembler, checksum: u32, flags: i32) {
    difference(a, KEY_LOCAL);
    a.mov(R4, R0);
    a.mov(R1, PACKET);
    a.mov(R2, checksum);
    a.mov(R3, 0);
    a.mov(R5, flags);
    a.call(Helper::L4CsumReplace);
}

/// R0 = what a checksum changes by if the IPv6 address at this place becomes that at [`TARGET`].
fn difference(a: &mut Assembler, from: i16) {
    a.mov(R1, R10);
    a.alu(Alu::Add, R1, i32::from(from));
    a.mov(R2, 16);
    a.mov(R3, R10);
    a.alu(Alu::Add, R3, i32::from(TARGET));
    a.mov(R4, 16);
    a.mov(R5, 0);
    a.call(Helper::CsumDiff);
}

/// Writes bytes of the stack into the packet. If the kernel has no room for that, the checksum is
/// wrong, and the packet is lost.
fn store_bytes(a: &mut Assembler, at: u32, from: i16, length: u32) {
    a.mov(R2, at);
    store_bytes_at_r2(a, from, length);
}

fn store_bytes_at_r2(a: &mut Assembler, from: i16, length: u32) {
    a.mov(R1, PACKET);
    a.mov(R3, R10);
    a.alu(Alu::Add, R3, i32::from(from));
    a.mov(R4, length);
    a.mov(R5, 0);
    a.call(Helper::SkbStoreBytes);
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;
    use crate::kernel::bpf::test_run::run;
    use crate::kernel::programs::testing::{
        Packet, TC_ACT_REDIRECT, frame, moves, ports as ports_of, tcp as tcp_of,
    };
    use crate::packet::ACK;

    /// The moved address, where it is delivered, and another address of this host.
    const ENDS: [[&str; 3]; 2] = [
        ["192.0.2.5", "198.51.100.2", "198.51.100.3"],
        ["2001:db8:a::5", "2001:db8:b::2", "2001:db8:b::3"],
    ];

    fn delivery(to: [&str; 2], maps: &[&str]) -> Delivery {
        let map = |text: &&str| text.parse::<DeliveryMap>().unwrap();
        Delivery {
            v4: to[0].parse().ok(),
            v6: to[1].parse().ok(),
            keep: false,
            maps: maps.iter().map(map).collect(),
        }
    }

    fn deliver(maps: &FlowMaps, moved: &[&str], to: &Delivery) {
        let moved = moves(moved);
        let moved: Vec<&Move> = moved.iter().collect();
        maps.inside().serve(std::slice::from_ref(&moved)).unwrap();
        let peer = PeerTargets { moves: &moved, to };
        maps.loopback().deliver(&[peer]).unwrap();
    }

    fn with(moved: &[&str], mapped: &[&str]) -> (FlowMaps, OwnedFd) {
        let maps = FlowMaps::new(1000).expect("run the tests as root");
        deliver(&maps, moved, &delivery([ENDS[0][1], ENDS[1][1]], mapped));
        let program = loopback(&maps, true).unwrap().load().unwrap();
        (maps, program)
    }

    /// UDP with a checksum.
    fn datagram(src: u16, dst: u16) -> Vec<u8> {
        let mut out = ports_of(src, dst);
        out[6..8].copy_from_slice(&[0x12, 0x34]);
        out
    }

    /// The sum that a checksum makes a certain one, wherever it lies among these bytes.
    fn sum(parts: &[&[u8]]) -> u32 {
        let words = parts.iter().flat_map(|part| part.chunks(2));
        let words =
            words.map(|it| u32::from(u16::from_be_bytes([it[0], *it.get(1).unwrap_or(&0)])));
        words.sum::<u32>() % 0xffff
    }

    /// What must not change: the sums of the header, of what lies under a checksum of the transport
    /// layer, and of a quoted header.
    fn sums(packet: &[u8]) -> [u32; 3] {
        match packet[0] >> 4 {
            4 => {
                let (header, rest) = packet.split_at(20);
                let error = header[9] == 1;
                let pseudo = if error { &[][..] } else { &header[12..] };
                let quoted = if error { &rest[8..28] } else { &[] };
                [sum(&[header]), sum(&[pseudo, rest]), sum(&[quoted])]
            }
            _ => [0, sum(&[&packet[8..]]), 0],
        }
    }

    /// Whether the packet arrives anew or passes, and what it is then.
    #[track_caller]
    fn becomes(program: &OwnedFd, packet: &Packet) -> (bool, Vec<u8>) {
        let outcome = run(program.as_fd(), &frame(&packet.bytes()));
        let after = outcome.frame[L2 as usize..].to_vec();
        assert_eq!(sums(&after), sums(&packet.bytes()), "of {packet:?}");
        (outcome.verdict == TC_ACT_REDIRECT, after)
    }

    /// The packet between other ends, as far as addresses and ports go.
    #[track_caller]
    fn is_between(after: &[u8], from: (&str, u16), to: (&str, u16)) {
        let (addresses, length, header) = match after[0] >> 4 {
            4 => (12, 4, 20),
            _ => (8, 16, 40),
        };
        let addr = |at: usize| -> IpAddr {
            let bytes = &after[at..at + length];
            match length {
                4 => <[u8; 4]>::try_from(bytes).unwrap().into(),
                _ => <[u8; 16]>::try_from(bytes).unwrap().into(),
            }
        };
        let port = |at: usize| u16::from_be_bytes([after[header + at], after[header + at + 1]]);
        let ends = [
            (addr(addresses), port(0)),
            (addr(addresses + length), port(2)),
        ];
        let expected = [from, to].map(|(addr, port)| (addr.parse().unwrap(), port));
        assert_eq!(ends, expected);
    }

    fn passes(program: &OwnedFd, packet: &Packet) {
        assert_eq!(
            becomes(program, packet),
            (false, packet.bytes()),
            "{packet:?}"
        );
    }

    /// Ports and the payload that has them, of both protocols.
    fn begin(protocol: u8, src: u16, dst: u16) -> Vec<u8> {
        if protocol == TCP {
            tcp_of(src, dst, SYN)
        } else {
            datagram(src, dst)
        }
    }

    fn answer(protocol: u8, src: u16, dst: u16) -> Vec<u8> {
        if protocol == TCP {
            tcp_of(src, dst, SYN | ACK)
        } else {
            datagram(src, dst)
        }
    }

    #[test]
    fn a_call_reaches_the_application_and_hears_from_whom_it_called() {
        for [moved, to, other] in ENDS {
            let bracketed = |addr: &str| {
                if addr.contains(':') {
                    format!("[{addr}]")
                } else {
                    addr.into()
                }
            };
            let map = format!("{}:82={}:8082", bracketed(moved), bracketed(other));
            let (_maps, program) = with(&[moved], &[&map]);
            for protocol in [TCP, UDP] {
                // The kernel names the moved address as the source, if the caller does not.
                for (caller, port) in [(moved, 40_000), (to, 40_001), (other, 40_002)] {
                    for (asked, at) in [(80, (to, 80)), (82, (other, 8082))] {
                        let call =
                            Packet::new(caller, moved, protocol, begin(protocol, port, asked));
                        let (anew, after) = becomes(&program, &call);
                        assert_eq!(anew, caller == moved, "rp_filter");
                        is_between(&after, (caller, port), at);
                        let answers = answer(protocol, at.1, port);
                        let answers = Packet::new(at.0, caller, protocol, answers);
                        let (anew, after) = becomes(&program, &answers);
                        assert!(anew);
                        is_between(&after, (moved, asked), (caller, port));
                        if protocol == TCP {
                            let more = tcp_of(port, asked, ACK);
                            let (_, after) =
                                becomes(&program, &Packet::new(caller, moved, TCP, more));
                            is_between(&after, (caller, port), at);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn each_address_of_a_prefix_is_called_at_its_own() {
        for (moved, map, called, to) in [
            (
                "192.0.2.16/28",
                "192.0.2.16/28=198.51.100.32/28",
                "192.0.2.21",
                "198.51.100.37",
            ),
            // Single moves within it, and a part of a longer move.
            (
                "192.0.2.21",
                "192.0.2.16/28=198.51.100.32/28",
                "192.0.2.21",
                "198.51.100.37",
            ),
            (
                "192.0.2.0/24",
                "192.0.2.16/28=198.51.100.32/28",
                "192.0.2.31",
                "198.51.100.47",
            ),
            (
                "192.0.2.0/24",
                "192.0.2.16/28=198.51.100.32/28",
                "192.0.2.32",
                "198.51.100.2",
            ),
            (
                "2001:db8:a::/64",
                "2001:db8:a::/64=2001:db8:b:7::/64",
                "2001:db8:a:0:1::5",
                "2001:db8:b:7:1::5",
            ),
        ] {
            let (maps, program) = with(&[moved], &[map]);
            for protocol in [TCP, UDP] {
                let call = Packet::new(called, called, protocol, begin(protocol, 40_000, 80));
                let (anew, after) = becomes(&program, &call);
                assert!(anew, "{moved} {map}");
                is_between(&after, (called, 40_000), (to, 80));
                let answers = Packet::new(to, called, protocol, answer(protocol, 80, 40_000));
                let (_, after) = becomes(&program, &answers);
                is_between(&after, (called, 80), (called, 40_000));
            }
            // What leads where it leads now is not forgotten.
            let calls = || maps.loopback().calls.keys().unwrap().len();
            let before = calls();
            maps.loopback().forget_led_elsewhere().unwrap();
            assert_eq!(calls(), before);
        }
        let (_maps, program) = with(
            &["192.0.2.16/28"],
            &["192.0.2.16/28:80=198.51.100.32/28:8080"],
        );
        let call = Packet::new("192.0.2.21", "192.0.2.21", TCP, tcp_of(40_000, 80, SYN));
        let (_, after) = becomes(&program, &call);
        is_between(&after, ("192.0.2.21", 40_000), ("198.51.100.37", 8080));
    }

    #[test]
    fn what_is_no_call_stays_as_it_is() {
        for [moved, to, other] in ENDS {
            let port_80 = if moved.contains(':') {
                format!("[{moved}]:80")
            } else {
                format!("{moved}:80")
            };
            let (maps, program) = with(&[&port_80], &[]);
            for packet in [
                Packet::new(to, moved, TCP, tcp_of(40_000, 81, SYN)),
                Packet::new(moved, moved, UDP, datagram(40_000, 81)),
                Packet::new(to, other, TCP, tcp_of(40_000, 80, SYN)),
                // Of a connection that is older than the program.
                Packet::new(to, moved, TCP, tcp_of(40_000, 80, ACK)),
                Packet::new(to, moved, 47, ports_of(40_000, 80)),
                Packet {
                    fragment: Some((7, 0, true)),
                    ..Packet::new(to, moved, UDP, datagram(1, 80))
                },
                Packet {
                    fragment: Some((7, 3, false)),
                    ..Packet::new(to, moved, UDP, datagram(1, 80))
                },
            ] {
                passes(&program, &packet);
            }
            // Nothing is known of where it is delivered.
            let call = Packet::new(to, moved, UDP, datagram(40_000, 80));
            assert_ne!(becomes(&program, &call).1, call.bytes());
            deliver(&maps, &[&port_80], &delivery(["", ""], &[]));
            maps.loopback()
                .calls
                .remove_all(&maps.loopback().calls.keys().unwrap().concat())
                .unwrap();
            passes(&program, &call);
        }
    }

    /// The address has moved whole, so every port of a program bound to it is one that is served.
    #[test]
    fn who_is_bound_to_the_moved_address_hears_from_whom_it_asks() {
        for [moved, to, other] in ENDS {
            let (_maps, program) = with(&[moved], &[]);
            for protocol in [TCP, UDP] {
                for asked in [other, to] {
                    let asks = Packet::new(moved, asked, protocol, begin(protocol, 40_000, 53));
                    passes(&program, &asks);
                    let hears = Packet::new(asked, moved, protocol, answer(protocol, 53, 40_000));
                    passes(&program, &hears);
                }
                // The same ports to the moved address: whoever spoke last is answered.
                let call = Packet::new(moved, moved, protocol, begin(protocol, 40_000, 53));
                let answers = Packet::new(to, moved, protocol, answer(protocol, 53, 40_000));
                becomes(&program, &call);
                is_between(&becomes(&program, &answers).1, (moved, 53), (moved, 40_000));
                passes(
                    &program,
                    &Packet::new(moved, to, protocol, begin(protocol, 40_000, 53)),
                );
                passes(&program, &answers);
                becomes(&program, &call);
                is_between(&becomes(&program, &answers).1, (moved, 53), (moved, 40_000));
            }
        }
    }

    #[test]
    fn an_error_about_a_call_is_about_what_was_called() {
        for [moved, to, other] in ENDS {
            let (_maps, program) = with(&[moved], &[]);
            let call = Packet::new(moved, moved, UDP, datagram(40_000, 53));
            becomes(&program, &call);
            let arrived = Packet::new(moved, to, UDP, datagram(40_000, 53));
            for (from, seen) in [(to, moved), (other, other)] {
                let (anew, after) = becomes(&program, &Packet::icmp_error(from, &arrived));
                assert!(anew);
                let expected = Packet::icmp_error(seen, &call).bytes();
                let plain = |bytes: &[u8]| {
                    // But for the checksums of the headers and of the message.
                    let mut bytes = bytes.to_vec();
                    let at: &[usize] = if bytes[0] >> 4 == 4 {
                        &[10, 22, 38]
                    } else {
                        &[42]
                    };
                    for &at in at {
                        bytes[at..at + 2].fill(0);
                    }
                    bytes
                };
                assert_eq!(plain(&after), plain(&expected));
            }
            passes(
                &program,
                &Packet::icmp_error(to, &Packet::new(moved, other, UDP, datagram(1, 2))),
            );
        }
    }

    #[test]
    fn calls_outlive_the_daemon_and_udp_follows_the_delivery_address() {
        let [moved, to, other] = ENDS[0];
        let (maps, program) = with(&[moved], &[]);
        for protocol in [TCP, UDP] {
            becomes(
                &program,
                &Packet::new(moved, moved, protocol, begin(protocol, 7, 80)),
            );
        }
        let lasting: Vec<OwnedFd> = (maps.lasting().iter())
            .map(|fd| fd.try_clone_to_owned().unwrap())
            .collect();
        let maps = FlowMaps::found(&lasting, 1000).unwrap().unwrap();
        let program = loopback(&maps, true).unwrap().load().unwrap();
        let more = |protocol| {
            let payload = if protocol == TCP {
                tcp_of(7, 80, ACK)
            } else {
                datagram(7, 80)
            };
            becomes(&program, &Packet::new(moved, moved, protocol, payload)).1
        };
        // Before anybody has said what moves.
        for protocol in [TCP, UDP] {
            is_between(&more(protocol), (moved, 7), (to, 80));
        }
        deliver(&maps, &[moved], &delivery([other, ""], &[]));
        is_between(&more(TCP), (moved, 7), (to, 80));
        is_between(&more(UDP), (moved, 7), (other, 80));
    }

    #[test]
    fn peers_that_share_an_address_have_a_target_where_they_agree() {
        let (one, other) = (
            delivery(["198.51.100.2", ""], &[]),
            delivery(["198.51.100.3", ""], &[]),
        );
        let texts = [
            moves(&["192.0.2.5:80", "192.0.2.64/28", "192.0.2.96/28"]),
            moves(&["192.0.2.5:81", "192.0.2.66:80", "192.0.2.7"]),
        ];
        let refs: Vec<Vec<&Move>> = texts.iter().map(|it| it.iter().collect()).collect();
        let of = |to: [&Delivery; 2]| {
            let peers = [0, 1].map(|at| PeerTargets {
                moves: &refs[at],
                to: to[at],
            });
            let targets = targets(&peers);
            [
                "192.0.2.5/32",
                "192.0.2.64/28",
                "192.0.2.66/32",
                "192.0.2.96/28",
                "192.0.2.7/32",
            ]
            .map(|it| targets[&prefix_key(it.parse().unwrap())][3])
        };
        assert_eq!(of([&one, &one]), [2, 2, 2, 2, 2]);
        assert_eq!(of([&one, &other]), [0, 2, 0, 2, 3]);
    }
}
