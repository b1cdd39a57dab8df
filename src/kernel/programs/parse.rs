//! How the steering programs read a packet: its key, and what kind of packet it is.
//!
//! ```text
//! // R6 the packet; afterwards R7 TRANSPORT, R8 PROTOCOL, R9 FRAGMENT
//! key.family_and_protocol, key.local, key.remote = from the IP header;
//! FRAGMENT = UNFRAGMENTED, FIRST_, MIDDLE_ or LAST_FRAGMENT; identification;
//! if (FRAGMENT >= MIDDLE_FRAGMENT) goto later;        // it shows no ports
//! switch (protocol) {
//! TCP:  key.last = ports; flags; goto flow;
//! UDP:  key.last = ports; goto flow;
//! ICMP: if (a query, or the answer to one, as `Side` has it) {
//!           key.last = identifier; goto flow;
//!       }
//!       if (an error, from who answers) {
//!           key = that of the packet quoted, which the other one sent; goto quoted;
//!       }
//!       goto none;
//! else: key.last = 0; goto flow;
//! }
//! ```
//!
//! One call copies each header to the stack, since each call costs some nanoseconds.

use Reg::{R0, R1, R2, R3, R4, R7, R9, R10};

use super::flows::{
    KEY, KEY_LAST, KEY_LOCAL, KEY_REMOTE, VALUE, enter, look_up, remove, store_family,
};
use super::headers::{fragment, icmp, icmpv4, icmpv6, ipv4, ipv6, ports, tcp};
use super::phrases::{
    PACKET, PROTOCOL, TRANSPORT, branch_by_family, jump_unless_icmpv6_error, walk_extension_headers,
};
use crate::flow::modes::CLIENTS_QUERY;
use crate::kernel::bpf::{Alu, Assembler, If, Label, Map, Reg, Size};
use crate::model::moved::{TCP, UDP};
use crate::packet::{ACK, SYN};

/// The kind of fragment: one of the four below.
pub(super) const FRAGMENT: Reg = R9;

/// The order separates packets with ports from those without.
pub(super) const UNFRAGMENTED: i32 = 0;
pub(super) const FIRST_FRAGMENT: i32 = 1;
pub(super) const MIDDLE_FRAGMENT: i32 = 2;
pub(super) const LAST_FRAGMENT: i32 = 3;

/// In its place: the key is that of a packet which an ICMP error quotes.
pub(super) const QUOTED: i32 = 4;

/// Where the stack keeps the identification of a fragment, as on the wire.
const IDENTIFICATION: i16 = -60;
/// Where it keeps the flags of TCP, one byte; 0 for other protocols.
pub(super) const FLAGS: i16 = -64;
/// Where it keeps a copy of a header, up to 40 bytes; that of TCP, once the key is made.
pub(super) const HEADER: i16 = -104;

/// Where it keeps the place of the transport header of TCP, in bytes from the start of the frame.
pub(super) const TRANSPORT_KEPT: i16 = -272;

/// Who sent the packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Side {
    /// A client: it has come to this host.
    Client,
    /// This host, or one behind it, as a client is answered: it is about to leave.
    Host,
    /// This host, or one behind it, of its own accord: it is about to leave.
    Own,
    /// Whoever answers what is this host's own: it has come to this host.
    Remote,
}

impl Side {
    /// Whether the packet is about to leave, so that its source is the address here.
    fn leaves(self) -> bool {
        matches!(self, Self::Host | Self::Own)
    }

    /// Whether it belongs to a conversation that the other one began.
    fn answers(self) -> bool {
        matches!(self, Self::Host | Self::Remote)
    }
}

/// The exits.
#[derive(Clone, Copy)]
pub(super) struct Ways {
    /// The key is that of its flow.
    pub(super) flow: Label,
    /// A later fragment: the key lacks its last part.
    pub(super) later: Label,
    /// An error: the key is that of the packet quoted. Only for who answers.
    pub(super) quoted: Label,
    /// It belongs to no flow: the key lacks its last part.
    pub(super) none: Label,
    /// Not IP, or too short.
    pub(super) other: Label,
}

impl Ways {
    /// Labels for all of them.
    pub(super) fn new(a: &mut Assembler) -> Self {
        Self {
            flow: a.label(),
            later: a.label(),
            quoted: a.label(),
            none: a.label(),
            other: a.label(),
        }
    }
}

/// Reads the packet, and leaves by one of the ways.
pub(super) fn parse(a: &mut Assembler, l2: u32, side: Side, ways: Ways) {
    let (v6, transport) = (a.label(), a.label());
    for offset in (KEY..0).step_by(8) {
        a.store(Size::Dw, R10, offset, 0);
    }
    a.store(Size::Dw, R10, FLAGS, 0);
    a.store(Size::Dw, R10, TRANSPORT_KEPT, 0);
    a.mov(FRAGMENT, UNFRAGMENTED);
    branch_by_family(a, v6, ways.other);

    let header = |at: u32| HEADER + at as i16;
    let (local, remote) = (KEY_LOCAL, KEY_REMOTE);
    let (source, destination) = if side.leaves() {
        (local, remote)
    } else {
        (remote, local)
    };
    a.mov(R2, l2);
    load_header(a, ipv4::LEN, ways.other);
    a.load(Size::B, PROTOCOL, R10, header(ipv4::PROTOCOL));
    store_family(a, 4);
    copy(a, header(ipv4::SOURCE), source, 4);
    copy(a, header(ipv4::DESTINATION), destination, 4);
    ipv4_length(a, ways.other);
    a.alu(Alu::Add, TRANSPORT, l2);
    a.load(Size::H, R0, R10, header(ipv4::FLAGS_AND_OFFSET));
    let (fragmented, more, later) = (a.label(), a.label(), a.label());
    a.jump_if(R0, If::Set, wire(ipv4::FRAGMENTED), fragmented);
    a.jump(transport);
    a.bind(fragmented);
    a.load(Size::H, R1, R10, header(ipv4::IDENTIFICATION));
    a.store(Size::W, R10, IDENTIFICATION, R1);
    a.mov(FRAGMENT, LAST_FRAGMENT);
    a.jump_if(R0, If::Set, wire(ipv4::MORE_FRAGMENTS), more);
    a.jump(ways.later);
    a.bind(more);
    a.mov(FRAGMENT, MIDDLE_FRAGMENT);
    a.jump_if(R0, If::Set, wire(ipv4::OFFSET_MASK), later);
    a.mov(FRAGMENT, FIRST_FRAGMENT);
    a.jump(transport);

    a.bind(v6);
    let (fragmented, known) = (a.label(), a.label());
    a.mov(R2, l2);
    load_header(a, ipv6::LEN, ways.other);
    copy(a, header(ipv6::SOURCE), source, 16);
    copy(a, header(ipv6::DESTINATION), destination, 16);
    walk_extension_headers(a, l2, fragmented);
    a.jump(known);
    a.bind(fragmented);
    a.mov(R2, TRANSPORT);
    load_header(a, fragment::LEN, ways.other);
    a.load(Size::B, PROTOCOL, R10, header(fragment::NEXT_HEADER));
    a.load(Size::W, R1, R10, header(fragment::IDENTIFICATION));
    a.store(Size::W, R10, IDENTIFICATION, R1);
    a.alu(Alu::Add, TRANSPORT, fragment::LEN);
    a.load(Size::H, R0, R10, header(fragment::OFFSET_AND_M));
    let after = a.label();
    a.mov(FRAGMENT, FIRST_FRAGMENT);
    a.jump_if(R0, If::Set, wire(fragment::OFFSET_MASK), after);
    a.jump(known);
    a.bind(after);
    a.mov(FRAGMENT, MIDDLE_FRAGMENT);
    a.jump_if(R0, If::Set, wire(fragment::MORE), known);
    a.mov(FRAGMENT, LAST_FRAGMENT);
    a.bind(known);
    store_family(a, 6);
    a.bind(later);
    a.jump_if(FRAGMENT, If::Ge, MIDDLE_FRAGMENT, ways.later);

    a.bind(transport);
    let (tcp, udp) = (a.label(), a.label());
    let (icmp_v4, icmp_v6) = (a.label(), a.label());
    a.jump_if(PROTOCOL, If::Eq, i32::from(TCP), tcp);
    a.jump_if(PROTOCOL, If::Eq, i32::from(UDP), udp);
    a.jump_if(PROTOCOL, If::Eq, i32::from(icmpv4::PROTOCOL), icmp_v4);
    a.jump_if(PROTOCOL, If::Eq, i32::from(icmpv6::PROTOCOL), icmp_v6);
    a.jump(ways.flow);

    a.bind(tcp);
    a.store(Size::W, R10, TRANSPORT_KEPT, TRANSPORT);
    a.mov(R2, TRANSPORT);
    load_header(a, tcp::FLAGS_END, ways.none);
    a.load(Size::B, R0, R10, header(tcp::FLAGS));
    a.store(Size::W, R10, FLAGS, R0);
    store_ports(a, side.leaves());
    a.jump(ways.flow);
    a.bind(udp);
    a.mov(R2, TRANSPORT);
    load_header(a, ports::LEN, ways.none);
    store_ports(a, side.leaves());
    a.jump(ways.flow);

    for (label, v4) in [(icmp_v4, true), (icmp_v6, false)] {
        let query = a.label();
        a.bind(label);
        a.mov(R2, TRANSPORT);
        load_header(a, icmp::QUOTED, ways.none);
        a.load(Size::B, R0, R10, header(icmp::TYPE));
        let queries: &[i32] = match (v4, side.answers()) {
            (true, false) => &icmpv4::QUERIES,
            (true, true) => &icmpv4::REPLIES,
            (false, false) => &[icmpv6::ECHO_REQUEST],
            (false, true) => &[icmpv6::ECHO_REPLY],
        };
        for &kind in queries {
            a.jump_if(R0, If::Eq, kind, query);
        }
        if side.answers() {
            quoted(a, v4, side, ways);
        } else {
            a.jump(ways.none);
        }
        a.bind(query);
        store_identifier(a);
        a.jump(ways.flow);
    }
}

/// Sorts out most packets with a few loads: jumps to `tcp`, to `tunnel` for a datagram of the
/// tunnel, whose own port is at `port_at`, and to `other` for anything else.
pub(super) fn sort_out(
    a: &mut Assembler,
    l2: u32,
    port_at: u32,
    tunnel_port: u16,
    tcp: Label,
    other: Label,
    tunnel: Label,
) {
    let v6 = a.label();
    branch_by_family(a, v6, other);
    a.load_packet(Size::B, l2 + ipv4::PROTOCOL);
    a.jump_if(R0, If::Eq, i32::from(TCP), tcp);
    a.jump_if(R0, If::Ne, i32::from(UDP), other);
    a.load_packet(Size::B, l2 + ipv4::VERSION_AND_IHL);
    a.jump_if(R0, If::Ne, ipv4::WITHOUT_OPTIONS, other);
    // A later fragment shows no port.
    a.load_packet(Size::H, l2 + ipv4::FLAGS_AND_OFFSET);
    a.jump_if(R0, If::Set, ipv4::OFFSET_MASK, other);
    a.load_packet(Size::H, l2 + ipv4::LEN + port_at);
    a.jump_if(R0, If::Eq, i32::from(tunnel_port), tunnel);
    a.jump(other);
    a.bind(v6);
    a.load_packet(Size::B, l2 + ipv6::NEXT_HEADER);
    a.jump_if(R0, If::Eq, i32::from(TCP), tcp);
    a.jump_if(R0, If::Ne, i32::from(UDP), other);
    a.load_packet(Size::H, l2 + ipv6::LEN + port_at);
    a.jump_if(R0, If::Eq, i32::from(tunnel_port), tunnel);
    a.jump(other);
}

/// The key of the packet that an ICMP error quotes; R0 is the type, TRANSPORT at the ICMP header.
fn quoted(a: &mut Assembler, v4: bool, side: Side, ways: Ways) {
    let header = |at: u32| HEADER + at as i16;
    // The quoted packet went the other way.
    let left = !side.leaves();
    let (source, destination) = if left {
        (KEY_LOCAL, KEY_REMOTE)
    } else {
        (KEY_REMOTE, KEY_LOCAL)
    };
    let (error, with_ports, query) = (a.label(), a.label(), a.label());
    if v4 {
        for kind in icmpv4::ERRORS {
            a.jump_if(R0, If::Eq, kind, error);
        }
        a.jump(ways.none);
    } else {
        jump_unless_icmpv6_error(a, ways.none);
    }
    a.bind(error);
    a.alu(Alu::Add, TRANSPORT, icmp::QUOTED);
    a.mov(R2, TRANSPORT);
    if v4 {
        load_header(a, ipv4::LEN, ways.none);
        a.load(Size::H, R0, R10, header(ipv4::FLAGS_AND_OFFSET));
        a.jump_if(R0, If::Set, wire(ipv4::OFFSET_MASK), ways.none);
        a.load(Size::B, PROTOCOL, R10, header(ipv4::PROTOCOL));
        store_family(a, 4);
        copy(a, header(ipv4::SOURCE), source, 4);
        copy(a, header(ipv4::DESTINATION), destination, 4);
        a.load(Size::B, R0, R10, header(ipv4::VERSION_AND_IHL));
        a.alu(Alu::And, R0, ipv4::IHL_MASK);
        a.alu(Alu::Lsh, R0, 2);
        a.alu(Alu::Add, TRANSPORT, R0);
    } else {
        load_header(a, ipv6::LEN, ways.none);
        a.load(Size::B, PROTOCOL, R10, header(ipv6::NEXT_HEADER));
        copy(a, header(ipv6::SOURCE), source, 16);
        copy(a, header(ipv6::DESTINATION), destination, 16);
        a.alu(Alu::Add, TRANSPORT, ipv6::LEN);
        let whole = a.label();
        a.jump_if(PROTOCOL, If::Ne, i32::from(ipv6::FRAGMENT), whole);
        a.mov(R2, TRANSPORT);
        load_header(a, fragment::LEN, ways.none);
        a.load(Size::H, R0, R10, header(fragment::OFFSET_AND_M));
        a.jump_if(R0, If::Set, wire(fragment::OFFSET_MASK), ways.none);
        a.load(Size::B, PROTOCOL, R10, header(fragment::NEXT_HEADER));
        a.alu(Alu::Add, TRANSPORT, fragment::LEN);
        a.bind(whole);
        store_family(a, 6);
    }
    a.jump_if(PROTOCOL, If::Eq, i32::from(TCP), with_ports);
    a.jump_if(PROTOCOL, If::Eq, i32::from(UDP), with_ports);
    let icmp = if v4 {
        icmpv4::PROTOCOL
    } else {
        icmpv6::PROTOCOL
    };
    a.jump_if(PROTOCOL, If::Eq, i32::from(icmp), query);
    a.jump(ways.quoted);
    a.bind(with_ports);
    a.mov(R2, TRANSPORT);
    load_header(a, ports::LEN, ways.none);
    store_ports(a, left);
    a.jump(ways.quoted);
    a.bind(query);
    a.mov(R2, TRANSPORT);
    load_header(a, icmp::QUOTED, ways.none);
    store_identifier(a);
    if side == Side::Remote {
        mark_if_of_client(a, v4, ways.quoted);
    }
    a.jump(ways.quoted);
}

/// Marks the key as that of a client's ICMP query, if the header that was copied is an answer to
/// one, and goes to `marked` then.
fn mark_if_of_client(a: &mut Assembler, v4: bool, marked: Label) {
    let (is_one, no) = (a.label(), a.label());
    a.load(Size::B, R0, R10, HEADER + icmp::TYPE as i16);
    let types: &[i32] = if v4 {
        &icmpv4::REPLIES
    } else {
        &[icmpv6::ECHO_REPLY]
    };
    for &kind in types {
        a.jump_if(R0, If::Eq, kind, is_one);
    }
    a.jump(no);
    a.bind(is_one);
    mark_as_of_client(a);
    a.jump(marked);
    a.bind(no);
}

/// For what [`parse`] takes for none: makes the key of an ICMP query where it looks for answers, or
/// of an answer where it looks for queries, and jumps to `made`. That is a client's query that
/// comes, the answer of this host to one, or a query of the new server.
pub(super) fn key_of_other_query(a: &mut Assembler, side: Side, made: Label) {
    for v4 in [true, false] {
        let next = a.label();
        let icmp = if v4 {
            icmpv4::PROTOCOL
        } else {
            icmpv6::PROTOCOL
        };
        a.jump_if(PROTOCOL, If::Ne, i32::from(icmp), next);
        a.load(Size::B, R0, R10, HEADER + icmp::TYPE as i16);
        let types: &[i32] = match (v4, side.answers()) {
            (true, true) => &icmpv4::QUERIES,
            (true, false) => &icmpv4::REPLIES,
            (false, true) => &[icmpv6::ECHO_REQUEST],
            (false, false) => &[icmpv6::ECHO_REPLY],
        };
        let is_one = a.label();
        for &kind in types {
            a.jump_if(R0, If::Eq, kind, is_one);
        }
        a.jump(next);
        a.bind(is_one);
        store_identifier(a);
        if side != Side::Host {
            mark_as_of_client(a);
        }
        a.jump(made);
        a.bind(next);
    }
}

/// Marks the key of an ICMP message as that of a client's query, or of the answer to one.
pub(super) fn mark_as_of_client(a: &mut Assembler) {
    a.store(Size::H, R10, KEY_LAST + 2, i32::from(CLIENTS_QUERY.to_be()));
}

/// Copies a header, whose place R2 tells, to the stack.
fn load_header(a: &mut Assembler, length: u32, failed: Label) {
    a.mov(R1, PACKET);
    a.mov(R3, R10);
    a.alu(Alu::Add, R3, i32::from(HEADER));
    a.mov(R4, length);
    a.load_packet_bytes();
    a.jump_if_wide(R0, If::Ne, 0, failed);
}

/// TRANSPORT = the length of the IPv4 header that was copied.
fn ipv4_length(a: &mut Assembler, bad: Label) {
    a.load(
        Size::B,
        TRANSPORT,
        R10,
        HEADER + ipv4::VERSION_AND_IHL as i16,
    );
    a.mov(R0, TRANSPORT);
    a.alu(Alu::And, R0, ipv4::VERSION_MASK);
    a.jump_if(R0, If::Ne, ipv4::VERSION_4, bad);
    a.alu(Alu::And, R7, ipv4::IHL_MASK);
    a.alu(Alu::Lsh, R7, 2);
    a.jump_if(R7, If::Lt, ipv4::LEN, bad);
}

/// Copies words within the stack.
fn copy(a: &mut Assembler, from: i16, to: i16, length: i16) {
    for at in (0..length).step_by(4) {
        a.load(Size::W, R0, R10, from + at);
        a.store(Size::W, R10, to + at, R0);
    }
}

/// The ports of the header that was copied; `turned` if the first of them is the local one.
fn store_ports(a: &mut Assembler, turned: bool) {
    for (from, to) in [
        (0, if turned { 2 } else { 0 }),
        (2, if turned { 0 } else { 2 }),
    ] {
        a.load(Size::H, R0, R10, HEADER + from);
        a.store(Size::H, R10, KEY_LAST + to, R0);
    }
}

fn store_identifier(a: &mut Assembler) {
    a.load(Size::H, R0, R10, HEADER + icmp::IDENTIFIER as i16);
    a.store(Size::H, R10, KEY_LAST, R0);
}

/// R0 = which of SYN and ACK are set; of a packet that is not TCP, none.
pub(super) fn load_syn(a: &mut Assembler) {
    a.load(Size::W, R0, R10, FLAGS);
    a.alu(Alu::And, R0, i32::from(SYN | ACK));
}

/// Makes the key that of a fragmented packet under way.
pub(super) fn key_by_identification(a: &mut Assembler) {
    a.load(Size::W, R0, R10, IDENTIFICATION);
    a.store(Size::W, R10, KEY_LAST, R0);
}

/// Remembers the packet by its identification among these `fragments`, if it is a first fragment;
/// jumps to `other` if it is none. The key is lost.
pub(super) fn remember_first_fragment(a: &mut Assembler, fragments: &Map, other: Label) {
    a.jump_if(FRAGMENT, If::Ne, FIRST_FRAGMENT, other);
    key_by_identification(a);
    a.store(Size::Dw, R10, VALUE, 0);
    enter(a, fragments);
}

/// Forgets whatever used the identification before, if the packet is a first fragment; jumps to
/// `other` if it is none. The key is lost.
pub(super) fn forget_first_fragment(a: &mut Assembler, fragments: &Map, other: Label) {
    a.jump_if(FRAGMENT, If::Ne, FIRST_FRAGMENT, other);
    key_by_identification(a);
    remove(a, fragments);
}

/// Jumps to `unknown` if the first of a later fragment is not among these `fragments`. Otherwise
/// jumps to `follows`; goes on if it was the last one, which ends what was remembered. The key is
/// lost.
pub(super) fn follow_first_fragment(
    a: &mut Assembler,
    fragments: &Map,
    follows: Label,
    unknown: Label,
) {
    key_by_identification(a);
    look_up(a, fragments);
    a.jump_if_wide(R0, If::Eq, 0, unknown);
    a.jump_if(FRAGMENT, If::Ne, LAST_FRAGMENT, follows);
    remove(a, fragments);
}

/// 16 bits as on the wire, for comparison with a copy of a header.
pub(super) fn wire(bits: i32) -> i32 {
    i32::from((bits as u16).to_be())
}
