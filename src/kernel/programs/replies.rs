//! Takes the new server's replies to borrowed ports, and ICMP errors about packets from there, with
//! `nat`: for the ingress of the old server's interface to the new one.
//!
//! It cannot know of every packet whether the daemon translates it. So it also takes fragments,
//! which do not show their port, and echo replies, whose identifiers the host's own pings choose
//! freely. The daemon bounces those that turn out to be the host's own; see
//! [`way_out`](super::way_out()).
//!
//! ```text
//! pass_bounced();
//! if (skb->pkt_type != PACKET_HOST || skb->vlan_tci & 0xfff) pass;
//! for each pair of the packet's family: if (ip.daddr == pair.own) {
//!     from_server = ip.saddr == pair.to;
//!     if (not TCP, UDP or ICMP) pass;
//!     if (fragment) { if (from_server) take; else pass; }
//!     if (TCP or UDP) { if (!from_server) pass; port = destination; }
//!     else if (ICMP reply) { if (!from_server) pass; port = identifier; }
//!     else if (ICMP error && quoted.saddr == pair.own && quoted.daddr == pair.to)
//!         port = quoted source port or identifier;       // from any router on the path
//!     else pass;
//!     if (port in ports) take; else pass;
//! }
//! pass:   return TC_ACT_UNSPEC;
//! take:   skb_vlan_pop(); return redirect(tun, 0);
//! ```

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use Reg::{R0, R9};

use super::headers::{icmp, icmpv4, icmpv6, ipv4, ipv6, ports};
use super::phrases::{
    Expected, PROTOCOL, TC_ACT_UNSPEC, TRANSPORT, branch_by_family, jump_if_it_has_ports,
    jump_unless_icmpv6_error, jump_unless_v6_destination, keep_packet, load_ipv4_header_end,
    load_v6_destination, pass_bounced, pass_unless_for_this_host, quoted_flow_v4, quoted_flow_v6,
    take, verdict, walk_extension_headers, words,
};
use crate::kernel::bpf::{Alu, Assembler, BpfError, If, Label, Program, Reg, Size};

/// Whether the packet comes from the new server: 1 or 0.
const FROM_SERVER: Reg = R9;

/// The two addresses of the translated packets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pair {
    /// The old server's own address.
    pub own: IpAddr,
    /// The new server's address, of the same family.
    pub to: IpAddr,
}

/// The program for an interface, and borrowed `ports`.
///
/// # Errors
/// If the program is too large.
pub fn replies(
    pairs: &[Pair],
    ports: &RangeInclusive<u16>,
    l2_header: u32,
    tun_ifindex: u32,
) -> Result<Program, BpfError> {
    let mut asm = Assembler::arriving(l2_header);
    let a = &mut asm;
    let (v6, pass, redirect) = (a.label(), a.label(), a.label());
    keep_packet(a);
    pass_bounced(a);
    pass_unless_for_this_host(a, pass);
    branch_by_family(a, v6, pass);
    for pair in pairs {
        if let (IpAddr::V4(own), IpAddr::V4(to)) = (pair.own, pair.to) {
            let next = a.label();
            a.load_packet(Size::W, l2_header + ipv4::DESTINATION);
            a.jump_if(R0, If::Ne, own.to_bits(), next);
            replies_v4(a, l2_header, [own, to], ports, [redirect, pass]);
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
            replies_v6(a, l2_header, [own, to], ports, [redirect, pass]);
            a.bind(next);
        }
    }
    a.bind(pass);
    verdict(a, TC_ACT_UNSPEC);
    a.bind(redirect);
    take(a, tun_ifindex);
    asm.finish("ipmoved_nat")
}

/// Handles an IPv4 packet to the address of the pair.
fn replies_v4(
    a: &mut Assembler,
    l2: u32,
    [own, to]: [Ipv4Addr; 2],
    ports: &RangeInclusive<u16>,
    [redirect, pass]: [Label; 2],
) {
    let (from_elsewhere, message, error, by_port) = (a.label(), a.label(), a.label(), a.label());
    a.mov(FROM_SERVER, 0);
    a.load_packet(Size::W, l2 + ipv4::SOURCE);
    a.jump_if(R0, If::Ne, to.to_bits(), from_elsewhere);
    a.mov(FROM_SERVER, 1);
    a.bind(from_elsewhere);
    load_ipv4_header_end(a, l2, pass);
    a.load_packet(Size::B, l2 + ipv4::PROTOCOL);
    a.mov(PROTOCOL, R0);
    let (whole, known) = (a.label(), a.label());
    jump_if_it_has_ports(a, known);
    a.jump_if(PROTOCOL, If::Eq, i32::from(icmpv4::PROTOCOL), known);
    a.jump(pass);
    a.bind(known);
    a.load_packet(Size::H, l2 + ipv4::FLAGS_AND_OFFSET);
    a.alu(Alu::And, R0, ipv4::FRAGMENTED);
    a.jump_if(R0, If::Eq, 0, whole);
    a.jump_if(FROM_SERVER, If::Eq, 1, redirect);
    a.jump(pass);
    a.bind(whole);
    a.jump_if(PROTOCOL, If::Eq, i32::from(icmpv4::PROTOCOL), message);
    a.jump_if(FROM_SERVER, If::Ne, 1, pass);
    a.load_packet_at(Size::H, TRANSPORT, ports::DESTINATION);
    a.jump(by_port);

    a.bind(message);
    a.load_packet_at(Size::B, TRANSPORT, icmp::TYPE);
    for kind in icmpv4::ERRORS {
        a.jump_if(R0, If::Eq, kind, error);
    }
    let reply = a.label();
    for kind in icmpv4::REPLIES {
        a.jump_if(R0, If::Eq, kind, reply);
    }
    a.jump(pass);
    a.bind(reply);
    a.jump_if(FROM_SERVER, If::Ne, 1, pass);
    a.load_packet_at(Size::H, TRANSPORT, icmp::IDENTIFIER);
    a.jump(by_port);

    a.bind(error);
    let from = (ipv4::SOURCE, Expected::Is(&[own.to_bits()]));
    let to = (ipv4::DESTINATION, Expected::Is(&[to.to_bits()]));
    let quoted = quoted_flow_v4(a, &[from, to], pass);
    load_port_of_quoted(a, quoted, icmpv4::PROTOCOL, by_port, pass);
    a.bind(by_port);
    take_in_range(a, ports, redirect, pass);
}

/// Handles an IPv6 packet to the address of the pair.
fn replies_v6(
    a: &mut Assembler,
    l2: u32,
    [own, to]: [Ipv6Addr; 2],
    ports: &RangeInclusive<u16>,
    [redirect, pass]: [Label; 2],
) {
    let (from_elsewhere, fragmented, message, by_port) =
        (a.label(), a.label(), a.label(), a.label());
    a.mov(FROM_SERVER, 0);
    for (word, bits) in (0..).zip(words(to)) {
        a.load_packet(Size::W, l2 + ipv6::SOURCE + 4 * word);
        a.jump_if(R0, If::Ne, bits, from_elsewhere);
    }
    a.mov(FROM_SERVER, 1);
    a.bind(from_elsewhere);
    walk_extension_headers(a, l2, fragmented);
    a.jump_if(PROTOCOL, If::Eq, i32::from(icmpv6::PROTOCOL), message);
    a.jump_if(FROM_SERVER, If::Ne, 1, pass);
    let transport = a.label();
    jump_if_it_has_ports(a, transport);
    a.jump(pass);
    a.bind(transport);
    a.load_packet_at(Size::H, TRANSPORT, ports::DESTINATION);
    a.jump(by_port);
    a.bind(fragmented);
    a.jump_if(FROM_SERVER, If::Eq, 1, redirect);
    a.jump(pass);

    a.bind(message);
    let reply = a.label();
    a.load_packet_at(Size::B, TRANSPORT, icmp::TYPE);
    a.jump_if(R0, If::Eq, icmpv6::ECHO_REPLY, reply);
    jump_unless_icmpv6_error(a, pass);
    let from = (ipv6::SOURCE, Expected::Is(&words(own)));
    let to = (ipv6::DESTINATION, Expected::Is(&words(to)));
    let quoted = quoted_flow_v6(a, &[from, to], pass);
    load_port_of_quoted(a, quoted, icmpv6::PROTOCOL, by_port, pass);
    a.bind(reply);
    a.jump_if(FROM_SERVER, If::Ne, 1, pass);
    a.load_packet_at(Size::H, TRANSPORT, icmp::IDENTIFIER);
    a.bind(by_port);
    take_in_range(a, ports, redirect, pass);
}

/// R0 = source port or identifier of a quoted packet whose transport header is `at` behind
/// TRANSPORT; then jumps to `known`.
fn load_port_of_quoted(a: &mut Assembler, at: u32, icmp: u8, known: Label, pass: Label) {
    let (port, identifier) = (a.label(), a.label());
    jump_if_it_has_ports(a, port);
    a.jump_if(PROTOCOL, If::Eq, i32::from(icmp), identifier);
    a.jump(pass);
    a.bind(identifier);
    a.load_packet_at(Size::H, TRANSPORT, at + icmp::IDENTIFIER);
    a.jump(known);
    a.bind(port);
    a.load_packet_at(Size::H, TRANSPORT, at + ports::SOURCE);
    a.jump(known);
}

/// Jumps by the port in R0: to `hit` if it is in `ports`, else to `miss`.
fn take_in_range(a: &mut Assembler, ports: &RangeInclusive<u16>, hit: Label, miss: Label) {
    a.jump_if(R0, If::Lt, i32::from(*ports.start()), miss);
    a.jump_if(R0, If::Le, i32::from(*ports.end()), hit);
    a.jump(miss);
}
