//! Code that several programs share, each phrase once.
//!
//! Registers, in all programs: R0 holds the result of the last load or call; calls and packet loads
//! destroy R1 to R5. The four others have names: [`PACKET`], [`TRANSPORT`], [`PROTOCOL`], and R9,
//! which each program names for itself.
//!
//! A packet load past the packet's end ends the program with verdict 0: the packet passes. So every
//! phrase that loads may end the program.

use std::net::Ipv6Addr;
use std::os::fd::AsFd;

use Reg::{R0, R1, R2, R3, R4, R5, R6, R7, R8, R10};

use super::headers::{
    ethernet, extension, fib, fragment, icmp, icmpv4, icmpv6, ipv4, ipv6, skb, vlan,
};
use crate::kernel::bpf::{Alu, Assembler, Helper, If, Label, Reg, Size};
use crate::model::moved::{TCP, UDP};
use crate::packet::MAX_EXTENSION_HEADERS;

/// The packet, `struct __sk_buff *`. Packet loads expect it in this register.
pub(super) const PACKET: Reg = R6;

/// Where the transport header begins, in bytes from the start of the frame.
pub(super) const TRANSPORT: Reg = R7;

/// The IP protocol of the transport header.
pub(super) const PROTOCOL: Reg = R8;

/// Verdict of a direct-action filter: go on with the next filter, if there is one. (A packet that
/// ends too early gets verdict 0 instead, and passes at once.)
pub(super) const TC_ACT_UNSPEC: i32 = -1;

/// Verdict: drop.
pub(super) const TC_ACT_SHOT: i32 = 2;

/// Flag of `bpf_redirect`: the packet arrives at the interface, as if from the wire.
pub(super) const BPF_F_INGRESS: i32 = 1;

/// Where [`load_v6_destination`] keeps the destination on the stack, as four words (of IPv4: in the
/// last one).
pub(super) const DESTINATION_KEPT: [i16; 4] = [-16, -12, -8, -4];

/// Where [`write_ethernet_header`] makes the header on the stack.
const ETHERNET_MADE: i16 = -16;

/// The mark of a packet on its way from the TUN to the uplink's ingress: "ipmb". The program there
/// removes it, and no packet comes from the wire with a mark. A packet that has another capture to
/// pass before bears the next number.
pub(super) const BOUNCED: u32 = 0x6970_6d62;

/// The mark of a packet on its way from the TUN to the ingress of a link of the new server: "ipmd".
/// The program there removes it, and no packet comes from the wire with a mark.
pub(super) const DELIVERED: u32 = 0x6970_6d64;

/// Most captures at one interface: one of moved addresses, one of replies. They run in any order.
pub(super) const MAX_CAPTURES: u32 = 2;

// The choice of packets.

/// Goes on, without the mark, if the packet was sent here by the program of the TUN; jumps to
/// `other` otherwise.
pub(super) fn jump_unless_delivered(a: &mut Assembler, other: Label) {
    a.load(Size::W, R0, PACKET, skb::MARK);
    a.jump_if(R0, If::Ne, DELIVERED, other);
    // Kernels before 6.5 take no constant there.
    a.mov(R0, 0);
    a.store(Size::W, PACKET, skb::MARK, R0);
}

/// How every program begins: keeps the context where packet loads expect it.
pub(super) fn keep_packet(a: &mut Assembler) {
    a.mov(PACKET, R1);
    a.pull_headers();
}

/// Jumps to `pass`, unless the packet is for this host and belongs to no VLAN. A tag that has a
/// priority only (VLAN 0) does not count, as the kernel sees it; [`take`] removes it.
pub(super) fn pass_unless_for_this_host(a: &mut Assembler, pass: Label) {
    let untagged = a.label();
    a.load(Size::W, R0, PACKET, skb::PKT_TYPE);
    a.jump_if(R0, If::Ne, i32::from(libc::PACKET_HOST), pass);
    a.load(Size::W, R0, PACKET, skb::VLAN_PRESENT);
    a.jump_if(R0, If::Eq, 0, untagged);
    a.load(Size::W, R0, PACKET, skb::VLAN_TCI);
    a.jump_if(R0, If::Set, vlan::ID_MASK, pass);
    a.bind(untagged);
}

pub(super) fn pass_if_tagged(a: &mut Assembler, pass: Label) {
    a.load(Size::W, R0, PACKET, skb::VLAN_PRESENT);
    a.jump_if(R0, If::Ne, 0, pass);
}

/// Goes on for IPv4; jumps to `v6` for IPv6, and to `other` for anything else.
pub(super) fn branch_by_family(a: &mut Assembler, v6: Label, other: Label) {
    jump_if_v6(a, v6);
    a.jump_if(R0, If::Ne, ethertype(libc::ETH_P_IP), other);
}

/// Jumps to `v6` if R0, the EtherType as the context has it, is that of IPv6.
pub(super) fn jump_if_v6(a: &mut Assembler, v6: Label) {
    a.load(Size::W, R0, PACKET, skb::PROTOCOL);
    a.jump_if(R0, If::Eq, ethertype(libc::ETH_P_IPV6), v6);
}

/// Lets a bounced packet pass, as if no program had ever captured it; goes on with any other.
pub(super) fn pass_bounced(a: &mut Assembler) {
    for left in 0..MAX_CAPTURES {
        let next = a.label();
        a.load(Size::W, R0, PACKET, skb::MARK);
        a.jump_if(R0, If::Ne, BOUNCED + left, next);
        a.mov(R0, if left == 0 { 0 } else { BOUNCED + left - 1 });
        a.store(Size::W, PACKET, skb::MARK, R0);
        // Without the uplink's address in its header the packet would count as another host's.
        count_as_for_this_host(a);
        verdict(a, TC_ACT_UNSPEC);
        a.bind(next);
    }
}

pub(super) fn count_as_for_this_host(a: &mut Assembler) {
    a.mov(R1, PACKET);
    a.mov(R2, i32::from(libc::PACKET_HOST));
    a.call(Helper::SkbChangeType);
}

// Reading a packet.

/// TRANSPORT = the end of the IPv4 header. Jumps to `bad` if there is none.
pub(super) fn load_ipv4_header_end(a: &mut Assembler, l2: u32, bad: Label) {
    a.load_packet(Size::B, l2 + ipv4::VERSION_AND_IHL);
    a.mov(TRANSPORT, R0);
    a.alu(Alu::And, R0, ipv4::VERSION_MASK);
    a.jump_if(R0, If::Ne, ipv4::VERSION_4, bad);
    a.alu(Alu::And, TRANSPORT, ipv4::IHL_MASK);
    a.alu(Alu::Lsh, TRANSPORT, 2);
    a.jump_if(TRANSPORT, If::Lt, ipv4::LEN, bad);
    a.alu(Alu::Add, TRANSPORT, l2);
}

/// TRANSPORT = the start of the header after the extension headers, PROTOCOL = its number. Jumps to
/// `fragmented` at the fragment header of a real fragment, with TRANSPORT there.
///
/// Skips as many headers as the daemon does: a program must find every flow that the daemon can
/// read, or replies would go elsewhere than requests. With more, PROTOCOL is an extension header.
pub(super) fn walk_extension_headers(a: &mut Assembler, l2: u32, fragmented: Label) {
    let done = a.label();
    a.load_packet(Size::B, l2 + ipv6::NEXT_HEADER);
    a.mov(PROTOCOL, R0);
    a.mov(TRANSPORT, l2 + ipv6::LEN);
    for _ in 0..MAX_EXTENSION_HEADERS {
        let (options, fragment_header, next) = (a.label(), a.label(), a.label());
        a.jump_if(PROTOCOL, If::Eq, i32::from(ipv6::FRAGMENT), fragment_header);
        for header in [ipv6::HOP_BY_HOP, ipv6::ROUTING, ipv6::DESTINATION_OPTIONS] {
            a.jump_if(PROTOCOL, If::Eq, i32::from(header), options);
        }
        a.jump(done);
        a.bind(options);
        a.load_packet_at(Size::B, TRANSPORT, extension::NEXT_HEADER);
        a.mov(PROTOCOL, R0);
        a.load_packet_at(Size::B, TRANSPORT, extension::LENGTH);
        a.alu(Alu::Add, R0, 1);
        a.alu(Alu::Lsh, R0, 3);
        a.alu(Alu::Add, TRANSPORT, R0);
        a.jump(next);
        a.bind(fragment_header);
        a.load_packet_at(Size::H, TRANSPORT, fragment::OFFSET_AND_M);
        a.jump_if(R0, If::Set, fragment::FRAGMENTED, fragmented);
        a.load_packet_at(Size::B, TRANSPORT, fragment::NEXT_HEADER);
        a.mov(PROTOCOL, R0);
        a.alu(Alu::Add, TRANSPORT, fragment::LEN);
        a.bind(next);
    }
    a.bind(done);
}

/// R1 to R4 = the words of the IPv6 destination. The stack keeps them as well.
pub(super) fn load_v6_destination(a: &mut Assembler, l2: u32) {
    for (word, slot) in (0..).zip(DESTINATION_KEPT) {
        a.load_packet(Size::W, l2 + ipv6::DESTINATION + 4 * word);
        a.store(Size::W, R10, slot, R0);
    }
    for (reg, slot) in [R1, R2, R3, R4].into_iter().zip(DESTINATION_KEPT) {
        a.load(Size::W, reg, R10, slot);
    }
}

/// For use after [`load_v6_destination`]. The last word tells most addresses apart.
pub(super) fn jump_unless_v6_destination(a: &mut Assembler, addr: Ipv6Addr, other: Label) {
    let bits = addr.to_bits();
    for (reg, shift) in [(R4, 0), (R3, 32), (R2, 64), (R1, 96)] {
        a.jump_if(reg, If::Ne, (bits >> shift) as u32, other);
    }
}

/// Jumps to `to` if R0, an ICMPv6 type, is the link's own business.
pub(super) fn jump_if_link_scoped_icmpv6(a: &mut Assembler, to: Label) {
    let no = a.label();
    a.jump_if(R0, If::Eq, icmpv6::LISTENER_REPORT_V2, to);
    a.jump_if(R0, If::Lt, icmpv6::FIRST_OF_LINK, no);
    a.jump_if(R0, If::Le, icmpv6::LAST_OF_LINK, to);
    a.bind(no);
}

/// Jumps to `other` unless R0, an ICMPv6 type, is that of an error.
pub(super) fn jump_unless_icmpv6_error(a: &mut Assembler, other: Label) {
    a.jump_if(R0, If::Eq, 0, other);
    a.jump_if(R0, If::Gt, icmpv6::LAST_ERROR, other);
}

/// The expected value of an address in a quoted packet, word by word.
#[derive(Clone, Copy)]
pub(super) enum Expected<'a> {
    /// These words.
    Is(&'a [u32]),
    /// The words at these places of the stack.
    Kept(&'a [i16]),
}

/// Reads the IPv4 packet that an ICMP error quotes; TRANSPORT is at the ICMP header. Jumps to
/// `other` if the quoted packet has other addresses than expected, or is a fragment without ports.
/// Afterwards PROTOCOL is the quoted packet's, and its transport header lies behind TRANSPORT by
/// the returned number of bytes.
#[must_use]
pub(super) fn quoted_flow_v4(
    a: &mut Assembler,
    addresses: &[(u32, Expected<'_>)],
    other: Label,
) -> u32 {
    const AT: u32 = icmp::QUOTED;
    for &(address, expected) in addresses {
        jump_unless_quoted_address(a, AT + address, expected, other);
    }
    a.load_packet_at(Size::H, TRANSPORT, AT + ipv4::FLAGS_AND_OFFSET);
    a.jump_if(R0, If::Set, ipv4::OFFSET_MASK, other);
    a.load_packet_at(Size::B, TRANSPORT, AT + ipv4::PROTOCOL);
    a.mov(PROTOCOL, R0);
    a.load_packet_at(Size::B, TRANSPORT, AT + ipv4::VERSION_AND_IHL);
    a.alu(Alu::And, R0, ipv4::IHL_MASK);
    a.alu(Alu::Lsh, R0, 2);
    a.alu(Alu::Add, TRANSPORT, R0);
    AT
}

/// As [`quoted_flow_v4`] for IPv6. It skips a fragment header, but no other extension header.
#[must_use]
pub(super) fn quoted_flow_v6(
    a: &mut Assembler,
    addresses: &[(u32, Expected<'_>)],
    other: Label,
) -> u32 {
    const AT: u32 = icmp::QUOTED;
    const FRAGMENT_AT: u32 = AT + ipv6::LEN;
    for &(address, expected) in addresses {
        jump_unless_quoted_address(a, AT + address, expected, other);
    }
    let whole = a.label();
    a.load_packet_at(Size::B, TRANSPORT, AT + ipv6::NEXT_HEADER);
    a.mov(PROTOCOL, R0);
    a.jump_if(PROTOCOL, If::Ne, i32::from(ipv6::FRAGMENT), whole);
    a.load_packet_at(Size::H, TRANSPORT, FRAGMENT_AT + fragment::OFFSET_AND_M);
    a.jump_if(R0, If::Set, fragment::OFFSET_MASK, other);
    a.load_packet_at(Size::B, TRANSPORT, FRAGMENT_AT + fragment::NEXT_HEADER);
    a.mov(PROTOCOL, R0);
    a.alu(Alu::Add, TRANSPORT, fragment::LEN);
    a.bind(whole);
    AT + ipv6::LEN
}

fn jump_unless_quoted_address(a: &mut Assembler, at: u32, expected: Expected<'_>, other: Label) {
    match expected {
        Expected::Is(words) => {
            for (word, &bits) in (0..).zip(words) {
                a.load_packet_at(Size::W, TRANSPORT, at + 4 * word);
                a.jump_if(R0, If::Ne, bits, other);
            }
        }
        Expected::Kept(slots) => {
            for (word, &slot) in (0..).zip(slots) {
                a.load_packet_at(Size::W, TRANSPORT, at + 4 * word);
                a.load(Size::W, R1, R10, slot);
                a.jump_if(R0, If::Ne, R1, other);
            }
        }
    }
}

/// The words of an address, as packet loads give them.
pub(super) fn words(addr: Ipv6Addr) -> [u32; 4] {
    [96, 64, 32, 0].map(|shift| (addr.to_bits() >> shift) as u32)
}

/// Jumps to `to` if PROTOCOL is TCP or UDP.
pub(super) fn jump_if_it_has_ports(a: &mut Assembler, to: Label) {
    for protocol in [TCP, UDP] {
        a.jump_if(PROTOCOL, If::Eq, i32::from(protocol), to);
    }
}

/// R0 = the address of the value in a map that belongs to the key at this place of the stack, or 0.
pub(super) fn look_up_at(a: &mut Assembler, map: &impl AsFd, key_at: i16) {
    a.load_map(R1, map.as_fd());
    a.mov(R2, R10);
    a.alu(Alu::Add, R2, i32::from(key_at));
    a.call(Helper::MapLookup);
}

/// Copies so many bytes of the packet to the stack. R0 is not 0 if the packet ends before.
pub(super) fn load_bytes(a: &mut Assembler, at: u32, to: i16, length: u32) {
    a.mov(R1, PACKET);
    a.mov(R2, at);
    a.mov(R3, R10);
    a.alu(Alu::Add, R3, i32::from(to));
    a.mov(R4, length);
    a.load_packet_bytes();
}

/// Jumps if PROTOCOL is ICMP of either family.
pub(super) fn jump_if_icmp(a: &mut Assembler, icmp: Label) {
    for protocol in [icmpv4::PROTOCOL, icmpv6::PROTOCOL] {
        a.jump_if(PROTOCOL, If::Eq, i32::from(protocol), icmp);
    }
}

// The end of a packet's journey.

pub(super) fn verdict(a: &mut Assembler, verdict: i32) {
    a.mov(R0, verdict);
    a.exit();
}

/// Sends a packet that an interface has received into the TUN. A TUN would write a tag that is left
/// into the packet.
pub(super) fn take(a: &mut Assembler, tun_ifindex: u32) {
    let untagged = a.label();
    a.load(Size::W, R0, PACKET, skb::VLAN_PRESENT);
    a.jump_if(R0, If::Eq, 0, untagged);
    a.mov(R1, PACKET);
    a.call(Helper::SkbVlanPop);
    a.bind(untagged);
    redirect_to(a, tun_ifindex);
}

/// Sends the packet into the TUN, or out of any other interface as it is.
pub(super) fn redirect_to(a: &mut Assembler, ifindex: u32) {
    a.mov(R1, ifindex);
    a.mov(R2, 0);
    a.call(Helper::Redirect);
    a.exit();
}

/// Sends a packet from the TUN, where it has no link-layer header, out of an interface. The kernel
/// finds the neighbour.
pub(super) fn send_out(a: &mut Assembler, ifindex: u32, l2_header: u32) {
    if l2_header == 0 {
        redirect_to(a, ifindex);
        return;
    }
    add_empty_header(a, l2_header);
    a.mov(R1, ifindex);
    a.mov(R2, 0);
    a.mov(R3, 0);
    a.mov(R4, 0);
    a.call(Helper::RedirectNeigh);
    a.exit();
}

/// Lets a packet, which must have its link-layer header already, arrive at an interface with a
/// mark.
pub(super) fn arrive_at(a: &mut Assembler, ifindex: u32, mark: u32) {
    a.mov(R0, mark);
    a.store(Size::W, PACKET, skb::MARK, R0);
    a.mov(R1, ifindex);
    a.mov(R2, BPF_F_INGRESS);
    a.call(Helper::Redirect);
    a.exit();
}

/// Begins a question for a route, `struct bpf_fib_lookup` at this place of the stack: everything
/// but the family and the addresses.
pub(super) fn begin_route_lookup(a: &mut Assembler, at: i16, tun_ifindex: u32) {
    clear_route_lookup(a, at);
    a.store(Size::W, R10, at + fib::IFINDEX, tun_ifindex);
}

/// The same question with nothing in it.
pub(super) fn clear_route_lookup(a: &mut Assembler, at: i16) {
    for word in (at..at + fib::LEN).step_by(8) {
        a.store(Size::Dw, R10, word, 0);
    }
}

/// Asks the kernel for that route. Jumps to `found` if there is one; otherwise R0 says why not.
pub(super) fn look_up_route(a: &mut Assembler, at: i16, found: Label) {
    a.mov(R1, PACKET);
    a.mov(R2, R10);
    a.alu(Alu::Add, R2, i32::from(at));
    a.mov(R3, i32::from(fib::LEN));
    a.mov(R4, 0);
    a.call(Helper::FibLookup);
    for result in fib::FOUND {
        a.jump_if(R0, If::Eq, result, found);
    }
}

/// Adds a link-layer header of zeros before the packet.
pub(super) fn add_empty_header(a: &mut Assembler, l2_header: u32) {
    a.mov(R1, PACKET);
    a.mov(R2, l2_header);
    a.mov(R3, 0);
    a.call(Helper::SkbChangeHead);
}

/// For use after [`add_empty_header`]: writes an Ethernet header with the packet's own EtherType.
pub(super) fn write_ethernet_header(a: &mut Assembler, to: [u8; 6], from: [u8; 6]) {
    let addresses = [to, from].concat();
    for (slot, word) in (ETHERNET_MADE..).step_by(4).zip(addresses.chunks_exact(4)) {
        let word = u32::from_ne_bytes([word[0], word[1], word[2], word[3]]);
        a.store(Size::W, R10, slot, word);
    }
    finish_ethernet_header(a);
}

/// As [`write_ethernet_header`], to the address at `base + offset`, from nobody's.
pub(super) fn store_ethernet_header(a: &mut Assembler, base: Reg, offset: i16) {
    for at in (0..ethernet::TYPE as i16).step_by(4) {
        a.store(Size::W, R10, ETHERNET_MADE + at, 0);
    }
    a.load(Size::W, R0, base, offset);
    a.store(Size::W, R10, ETHERNET_MADE, R0);
    a.load(Size::H, R0, base, offset + 4);
    a.store(Size::H, R10, ETHERNET_MADE + 4, R0);
    finish_ethernet_header(a);
}

fn finish_ethernet_header(a: &mut Assembler) {
    a.load(Size::W, R0, PACKET, skb::PROTOCOL);
    a.store(Size::H, R10, ETHERNET_MADE + ethernet::TYPE as i16, R0);
    a.mov(R1, PACKET);
    a.mov(R2, 0);
    a.mov(R3, R10);
    a.alu(Alu::Add, R3, i32::from(ETHERNET_MADE));
    a.mov(R4, ethernet::LEN);
    a.mov(R5, 0);
    a.call(Helper::SkbStoreBytes);
}

/// An EtherType as `__sk_buff.protocol` holds it, in network order.
pub(super) fn ethertype(protocol: i32) -> i32 {
    i32::from((protocol as u16).to_be())
}
