//! The programs of way 1, where the old server translates both addresses:
//!
//! ```text
//!   uplink ingress ── answers ──► TUN      (beside capture, which takes the clients' packets)
//!   TUN ingress ── way_out ──► uplinks, or back into this host's own stack
//! ```
//!
//! [`answers`] takes more than it can know to be translated: fragments, which do not show their port,
//! and echo replies, whose identifiers the host's own pings choose freely. What turns out to be the
//! host's own is *bounced*: [`way_out`] puts it back where it came from, at the ingress of its
//! interface, so that reverse path filters and firewalls see it as they would have; a mark lets it
//! pass the captures there.

use std::net::IpAddr;
use std::ops::RangeInclusive;

use super::{
    Assembler, BOUNCED, BpfError, FRAGMENT, Helper, ICMP, ICMPV6, IPV6_HEADER, If, Label, Program,
    R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, R10, SKB_MARK, SKB_PKT_TYPE, SKB_PROTOCOL,
    SKB_VLAN_PRESENT, Size, TC_ACT_UNSPEC, TCP, UDP, ethertype, jump_unless_v6_destination,
    load_ipv4_header_end, load_v6_destination, redirect_to, verdict, walk_extension_headers,
};
use crate::kernel::bpf::Alu;

/// Most captures at one interface: of moved addresses and of answers. They run in any order.
const MAX_CAPTURES: u32 = 2;

/// Length of an Ethernet header, and where [`bounce`] makes one on the stack.
const ETHERNET: i32 = 14;
const ETHERNET_AT: i16 = -16;

/// `BPF_F_INGRESS` of `bpf_redirect`.
const INGRESS: i32 = 1;

/// An interface, as a program has to know it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Way {
    /// Its index.
    pub ifindex: u32,
    /// Length of its link-layer header: of Ethernet, or none.
    pub l2_header: u32,
    /// Its own link-layer address, where it has one.
    pub mac: Option<[u8; 6]>,
    /// How many captures stand at its ingress (at most two).
    pub captures: u32,
}

/// From whom the new server is asked, and where it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pair {
    /// The old server's own address.
    pub own: IpAddr,
    /// The new server's, of the same family.
    pub to: IpAddr,
}

/// Takes what the new server answers to borrowed `ports`, and ICMP errors about packets from there:
/// for the ingress of the interface that leads to it.
///
/// # Errors
/// If the program is too large.
pub fn answers(
    pairs: &[Pair],
    ports: &RangeInclusive<u16>,
    l2_header: u32,
    tun_ifindex: u32,
) -> Result<Program, BpfError> {
    let mut asm = Assembler::new();
    let a = &mut asm;
    let (v6, pass, redirect) = (a.label(), a.label(), a.label());
    a.mov(R6, R1);
    pass_bounced(a);
    a.load(Size::W, R0, R6, SKB_PKT_TYPE);
    a.jump_if(R0, If::Ne, i32::from(libc::PACKET_HOST), pass);
    a.load(Size::W, R0, R6, SKB_VLAN_PRESENT);
    a.jump_if(R0, If::Ne, 0, pass);
    a.load(Size::W, R0, R6, SKB_PROTOCOL);
    a.jump_if(R0, If::Eq, ethertype(libc::ETH_P_IPV6), v6);
    a.jump_if(R0, If::Ne, ethertype(libc::ETH_P_IP), pass);
    for pair in pairs {
        if let (IpAddr::V4(own), IpAddr::V4(to)) = (pair.own, pair.to) {
            let next = a.label();
            a.load_packet(Size::W, l2_header + 16);
            a.jump_if(R0, If::Ne, own.to_bits(), next);
            answers_v4(
                a,
                l2_header,
                [own.to_bits(), to.to_bits()],
                ports,
                redirect,
                pass,
            );
            a.bind(next);
        }
    }
    a.jump(pass);
    a.bind(v6);
    for pair in pairs {
        if let (IpAddr::V6(own), IpAddr::V6(to)) = (pair.own, pair.to) {
            let next = a.label();
            load_v6_destination(a, l2_header);
            jump_unless_v6_destination(a, own, next);
            answers_v6(
                a,
                l2_header,
                [own.to_bits(), to.to_bits()],
                ports,
                redirect,
                pass,
            );
            a.bind(next);
        }
    }
    a.bind(pass);
    verdict(a, TC_ACT_UNSPEC);
    a.bind(redirect);
    redirect_to(a, tun_ifindex);
    asm.finish("ipmoved_nat")
}

/// Sends what the daemon writes to its TUN where it belongs: to the new server, to clients through
/// `uplink`, or, to one of the `local` addresses, up into the host's own stack as if it came in on
/// their interface. For the ingress of the TUN; see [`return_path`](super::return_path).
///
/// # Errors
/// If the program is too large.
pub fn way_out(
    uplink: Way,
    servers: &[(IpAddr, Way)],
    local: &[(IpAddr, Way)],
) -> Result<Program, BpfError> {
    let mut asm = Assembler::new();
    let a = &mut asm;
    let (v6, out, pass) = (a.label(), a.label(), a.label());
    let local: Vec<(IpAddr, Way, Label)> = local
        .iter()
        .map(|&(ip, way)| (ip, way, a.label()))
        .collect();
    let servers: Vec<(IpAddr, Way, Label)> = servers
        .iter()
        .map(|&(ip, way)| (ip, way, a.label()))
        .collect();
    a.mov(R6, R1);
    a.load(Size::W, R0, R6, SKB_PROTOCOL);
    a.jump_if(R0, If::Eq, ethertype(libc::ETH_P_IPV6), v6);
    a.jump_if(R0, If::Ne, ethertype(libc::ETH_P_IP), pass);
    a.load_packet(Size::W, 16);
    for (ip, _, label) in local.iter().chain(&servers) {
        if let IpAddr::V4(addr) = ip {
            a.jump_if(R0, If::Eq, addr.to_bits(), *label);
        }
    }
    a.jump(out);
    a.bind(v6);
    load_v6_destination(a, 0);
    for (ip, _, label) in local.iter().chain(&servers) {
        if let IpAddr::V6(addr) = ip {
            let next = a.label();
            jump_unless_v6_destination(a, *addr, next);
            a.jump(*label);
            a.bind(next);
        }
    }
    a.bind(out);
    send(a, uplink);
    for (_, way, label) in servers {
        a.bind(label);
        send(a, way);
    }
    for (_, way, label) in local {
        a.bind(label);
        bounce(a, way);
    }
    a.bind(pass);
    verdict(a, TC_ACT_UNSPEC);
    asm.finish("ipmoved_return")
}

/// Lets a bounced packet pass, as if it had never been captured; goes on with any other.
pub(super) fn pass_bounced(a: &mut Assembler) {
    for left in 0..MAX_CAPTURES {
        let next = a.label();
        a.load(Size::W, R0, R6, SKB_MARK);
        a.jump_if(R0, If::Ne, BOUNCED + left, next);
        a.mov(R0, if left == 0 { 0 } else { BOUNCED + left - 1 });
        a.store(Size::W, R6, SKB_MARK, R0);
        // Without the uplink's address in its header it would count as another host's.
        a.mov(R1, R6);
        a.mov(R2, i32::from(libc::PACKET_HOST));
        a.call(Helper::SkbChangeType);
        verdict(a, TC_ACT_UNSPEC);
        a.bind(next);
    }
}

/// A packet to the address of the pair, IPv4. R9: whether it is from the other.
fn answers_v4(
    a: &mut Assembler,
    l2: u32,
    [own, to]: [u32; 2],
    ports: &RangeInclusive<u16>,
    redirect: Label,
    pass: Label,
) {
    let (from_elsewhere, icmp, error, by_port) = (a.label(), a.label(), a.label(), a.label());
    a.mov(R9, 0);
    a.load_packet(Size::W, l2 + 12);
    a.jump_if(R0, If::Ne, to, from_elsewhere);
    a.mov(R9, 1);
    a.bind(from_elsewhere);
    load_ipv4_header_end(a, l2, pass);
    a.load_packet(Size::B, l2 + 9);
    a.mov(R8, R0);
    let (whole, known) = (a.label(), a.label());
    for protocol in [TCP, UDP, ICMP] {
        a.jump_if(R8, If::Eq, i32::from(protocol), known);
    }
    a.jump(pass);
    a.bind(known);
    a.load_packet(Size::H, l2 + 6);
    a.alu(Alu::And, R0, 0x3fff);
    a.jump_if(R0, If::Eq, 0, whole);
    a.jump_if(R9, If::Eq, 1, redirect);
    a.jump(pass);
    a.bind(whole);
    a.jump_if(R8, If::Eq, i32::from(ICMP), icmp);
    a.jump_if(R9, If::Ne, 1, pass);
    a.load_packet_at(Size::H, R7, 2);
    a.jump(by_port);

    a.bind(icmp);
    a.load_packet_at(Size::B, R7, 0);
    // Destination unreachable, time exceeded, parameter problem (RFC 792).
    for kind in [3, 11, 12] {
        a.jump_if(R0, If::Eq, kind, error);
    }
    let reply = a.label();
    // Echo reply, timestamp reply.
    for kind in [0, 14] {
        a.jump_if(R0, If::Eq, kind, reply);
    }
    a.jump(pass);
    a.bind(reply);
    a.jump_if(R9, If::Ne, 1, pass);
    a.load_packet_at(Size::H, R7, 4);
    a.jump(by_port);

    a.bind(error);
    a.load_packet_at(Size::W, R7, 8 + 12);
    a.jump_if(R0, If::Ne, own, pass);
    a.load_packet_at(Size::W, R7, 8 + 16);
    a.jump_if(R0, If::Ne, to, pass);
    a.load_packet_at(Size::H, R7, 8 + 6);
    a.jump_if(R0, If::Set, 0x1fff, pass);
    a.load_packet_at(Size::B, R7, 8 + 9);
    a.mov(R8, R0);
    a.load_packet_at(Size::B, R7, 8);
    a.alu(Alu::And, R0, 0xf);
    a.alu(Alu::Lsh, R0, 2);
    a.alu(Alu::Add, R7, R0);
    quoted_port(a, 8, ICMP, by_port, pass);
    a.bind(by_port);
    in_range(a, ports, redirect, pass);
}

/// A packet to the address of the pair, IPv6. R9: whether it is from the other.
fn answers_v6(
    a: &mut Assembler,
    l2: u32,
    [own, to]: [u128; 2],
    ports: &RangeInclusive<u16>,
    redirect: Label,
    pass: Label,
) {
    let (from_elsewhere, fragment, icmp, by_port) = (a.label(), a.label(), a.label(), a.label());
    a.mov(R9, 0);
    for (word, bits) in (0..).zip(words(to)) {
        a.load_packet(Size::W, l2 + 8 + 4 * word);
        a.jump_if(R0, If::Ne, bits, from_elsewhere);
    }
    a.mov(R9, 1);
    a.bind(from_elsewhere);
    walk_extension_headers(a, l2, fragment);
    a.jump_if(R8, If::Eq, i32::from(ICMPV6), icmp);
    a.jump_if(R9, If::Ne, 1, pass);
    let transport = a.label();
    for protocol in [TCP, UDP] {
        a.jump_if(R8, If::Eq, i32::from(protocol), transport);
    }
    a.jump(pass);
    a.bind(transport);
    a.load_packet_at(Size::H, R7, 2);
    a.jump(by_port);
    a.bind(fragment);
    a.jump_if(R9, If::Eq, 1, redirect);
    a.jump(pass);

    a.bind(icmp);
    let (reply, whole) = (a.label(), a.label());
    a.load_packet_at(Size::B, R7, 0);
    a.jump_if(R0, If::Eq, 129, reply);
    // The errors are 1 to 4 (RFC 4443).
    a.jump_if(R0, If::Eq, 0, pass);
    a.jump_if(R0, If::Gt, 4, pass);
    for (address, at) in [(own, 8), (to, 24)] {
        for (word, bits) in (0..).zip(words(address)) {
            a.load_packet_at(Size::W, R7, 8 + at + 4 * word);
            a.jump_if(R0, If::Ne, bits, pass);
        }
    }
    a.load_packet_at(Size::B, R7, 8 + 6);
    a.mov(R8, R0);
    a.jump_if(R8, If::Ne, i32::from(FRAGMENT), whole);
    a.load_packet_at(Size::H, R7, 8 + IPV6_HEADER + 2);
    a.jump_if(R0, If::Set, 0xfff8, pass);
    a.load_packet_at(Size::B, R7, 8 + IPV6_HEADER);
    a.mov(R8, R0);
    a.alu(Alu::Add, R7, 8);
    a.bind(whole);
    quoted_port(a, 8 + IPV6_HEADER, ICMPV6, by_port, pass);
    a.bind(reply);
    a.jump_if(R9, If::Ne, 1, pass);
    a.load_packet_at(Size::H, R7, 4);
    a.bind(by_port);
    in_range(a, ports, redirect, pass);
}

/// R0 = source port or identifier of a quoted packet of protocol R8 whose transport header lies
/// `at` behind R7, then to `known`.
fn quoted_port(a: &mut Assembler, at: u32, icmp: u8, known: Label, pass: Label) {
    let (port, identifier) = (a.label(), a.label());
    a.jump_if(R8, If::Eq, i32::from(TCP), port);
    a.jump_if(R8, If::Eq, i32::from(UDP), port);
    a.jump_if(R8, If::Eq, i32::from(icmp), identifier);
    a.jump(pass);
    a.bind(identifier);
    a.load_packet_at(Size::H, R7, at + 4);
    a.jump(known);
    a.bind(port);
    a.load_packet_at(Size::H, R7, at);
    a.jump(known);
}

/// By the port in R0.
fn in_range(a: &mut Assembler, ports: &RangeInclusive<u16>, hit: Label, miss: Label) {
    a.jump_if(R0, If::Lt, i32::from(*ports.start()), miss);
    a.jump_if(R0, If::Le, i32::from(*ports.end()), hit);
    a.jump(miss);
}

fn words(address: u128) -> [u32; 4] {
    [96, 64, 32, 0].map(|shift| (address >> shift) as u32)
}

/// Out of an interface; the kernel finds the neighbour.
fn send(a: &mut Assembler, way: Way) {
    if way.l2_header > 0 {
        a.mov(R1, R6);
        a.mov(R2, way.l2_header);
        a.mov(R3, 0);
        a.call(Helper::SkbChangeHead);
        a.mov(R1, way.ifindex);
        a.mov(R2, 0);
        a.mov(R3, 0);
        a.mov(R4, 0);
        a.call(Helper::RedirectNeigh);
    } else {
        a.mov(R1, way.ifindex);
        a.mov(R2, 0);
        a.call(Helper::Redirect);
    }
    a.exit();
}

/// In at an interface, once more.
fn bounce(a: &mut Assembler, way: Way) {
    if way.l2_header > 0 {
        let mac = way.mac.unwrap_or_default();
        a.mov(R1, R6);
        a.mov(R2, way.l2_header);
        a.mov(R3, 0);
        a.call(Helper::SkbChangeHead);
        // To the interface's own address and from it: the one that matters is the destination.
        let mut header = [0; 16];
        header[..6].copy_from_slice(&mac);
        header[6..12].copy_from_slice(&mac);
        for (index, word) in header.chunks_exact(4).take(3).enumerate() {
            let word = u32::from_ne_bytes([word[0], word[1], word[2], word[3]]);
            a.mov(R0, word);
            a.store(Size::W, R10, ETHERNET_AT + 4 * index as i16, R0);
        }
        a.load(Size::W, R0, R6, SKB_PROTOCOL);
        a.store(Size::H, R10, ETHERNET_AT + 12, R0);
        a.mov(R1, R6);
        a.mov(R2, 0);
        a.mov(R3, R10);
        a.alu(Alu::Add, R3, i32::from(ETHERNET_AT));
        a.mov(R4, ETHERNET);
        a.mov(R5, 0);
        a.call(Helper::SkbStoreBytes);
    }
    debug_assert!(
        (1..=MAX_CAPTURES).contains(&way.captures),
        "or it comes back"
    );
    a.mov(R0, BOUNCED + way.captures - 1);
    a.store(Size::W, R6, SKB_MARK, R0);
    a.mov(R1, way.ifindex);
    a.mov(R2, INGRESS);
    a.call(Helper::Redirect);
    a.exit();
}
