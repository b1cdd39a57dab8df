//! The four programs that stand at the interfaces, generated for the addresses and ports at hand.
//!
//! ```text
//!            old server                                      new server
//!   uplink ingress ── capture ──► TUN              TUN ingress ── steer_mark ──► stack (marked)
//!   TUN ingress ── return_path ──► uplink          uplink egress ── steer_egress ──► TUN
//!                   └─ bounced: uplink ingress, past capture
//! ```
//!
//! Owns what each program decides about a packet. Attaching them is the business of
//! [`capture`](super::capture) and [`steer`](super::steer).
//!
//! All packet reads go through `LD_ABS`/`LD_IND`, which reach into non-linear packets and let a
//! packet pass that ends too early. A packet that is none of a program's business costs a handful of
//! loads and one comparison per moved address: 40 to 50 ns as BPF_PROG_TEST_RUN counts, on the
//! machine of the design's measurements; a UDP packet on the new server costs 200 ns.
//!
//! Size: at most [`MAX_MOVES`](crate::model::moved::MAX_MOVES) addresses are compared one by one; ports are
//! found in a balanced tree, so that no path through the program has more than some hundred
//! branches (the verifier gives up at 8,192 open ones, and at a million instructions looked at;
//! 64 moves of 64 ranges each are 11,500 instructions, of which it looks at 50,000).

mod masquerade;

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use super::bpf::{Alu, Assembler, BpfError, Helper, If, Label, Map, MapKind, Program, Reg, Size};
use crate::model::moved::{Move, TCP, Transport, UDP, joined};

pub use masquerade::{Pair, Way, answers, way_out};

use Reg::{R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, R10};

/// Start of the names of all programs, by which the daemon recognises its own filters.
pub const NAME_PREFIX: &str = "ipmoved_";

/// How long a flow without TCP is remembered after its last packet in either direction. RFC 4787
/// REQ-5 asks for two minutes at least and recommends five.
pub const REPLY_IDLE: Duration = Duration::from_secs(300);

/// Fragmented replies under way at one time. A reply of 64 KB is 45 fragments sent in one go, so
/// an entry lives for microseconds.
pub const MAX_FRAGMENTED: u32 = 4096;

/// IPv6 extension headers that are skipped to find the transport header (RFC 8200 section 4.1
/// recommends an order with four before it that may be skipped; more are not a client's traffic).
const MAX_EXTENSION_HEADERS: usize = 6;

/// Length of the IPv4 header without options, and of the IPv6 header without extensions, in bytes.
const IPV4_HEADER: u32 = 20;
const IPV6_HEADER: u32 = 40;

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;

/// Verdict of a direct-action filter: go on with the next filter, if there is one. (A packet that ends
/// too early gets verdict 0 instead, which is to pass it at once.)
const TC_ACT_UNSPEC: i32 = -1;

/// The mark of a packet on its way from the TUN to the uplink's ingress: "ipmb". It is taken off
/// there, and no packet comes from the wire with a mark. With another capture to pass before, it is
/// the next number.
const BOUNCED: u32 = 0x6970_6d62;

/// `bpf_redirect`: as if the packet had arrived there.
const BPF_F_INGRESS: i32 = 1;

/// Offset of the EtherType in an Ethernet header.
const ETHERTYPE_AT: i32 = 12;

/// Offsets in `struct __sk_buff`.
const SKB_PKT_TYPE: i16 = 4;
const SKB_MARK: i16 = 8;
const SKB_PROTOCOL: i16 = 16;
const SKB_VLAN_PRESENT: i16 = 20;

/// Captures packets to moved addresses: for the ingress of the old server's uplink.
///
/// * A whole move takes every packet to the address but neighbour discovery and multicast listener
///   discovery, which stay with the kernel that holds the address.
/// * A move of ports takes TCP and UDP packets by destination port, ICMP errors that quote a
///   packet from such a port, and every fragment of the transports concerned, since only the first
///   one shows its port.
/// * A packet that the daemon gave back ([`return_path`]) passes.
/// * Only packets for this host without a VLAN tag; and never a UDP datagram to an address and port
///   in `tunnel` (unspecified address: any), nor an ICMP error about one from there.
///
/// # Errors
/// If the program is too large.
pub fn capture(
    moves: &[Move],
    l2_header: u32,
    tun_ifindex: u32,
    tunnel: &[SocketAddr],
) -> Result<Program, BpfError> {
    Capture {
        asm: Assembler::new(),
        l2: l2_header,
        tun_ifindex,
        scopes: scopes(moves, tunnel),
    }
    .assemble()
}

/// Sends what the daemon writes to its TUN out of the uplink: for the ingress of the old server's TUN.
///
/// The neighbour is resolved by the kernel; no forwarding, sysctl or netfilter hook takes part, and
/// the TTL stays. Packets *to* a moved address (bounced ones) arrive on the uplink once more, where
/// [`capture`] lets them pass: this host's own stack sees them as it would without a daemon, so that
/// strict reverse path filtering and firewall rules for the uplink judge them alike.
///
/// # Errors
/// If the program is too large.
pub fn return_path(
    moves: &[Move],
    uplink_l2_header: u32,
    uplink_ifindex: u32,
) -> Result<Program, BpfError> {
    let mut asm = Assembler::new();
    let a = &mut asm;
    let (v6, send, bounced, other) = (a.label(), a.label(), a.label(), a.label());
    a.mov(R6, R1);
    a.load(Size::W, R0, R6, SKB_PROTOCOL);
    a.jump_if(R0, If::Eq, ethertype(libc::ETH_P_IPV6), v6);
    a.jump_if(R0, If::Ne, ethertype(libc::ETH_P_IP), other);
    a.load_packet(Size::W, 16);
    for moved in moves {
        if let IpAddr::V4(addr) = moved.addr {
            a.jump_if(R0, If::Eq, addr.to_bits(), bounced);
        }
    }
    a.jump(send);
    a.bind(v6);
    load_v6_destination(a, 0);
    for moved in moves {
        if let IpAddr::V6(addr) = moved.addr {
            let next = a.label();
            jump_unless_v6_destination(a, addr, next);
            a.jump(bounced);
            a.bind(next);
        }
    }
    a.bind(send);
    if uplink_l2_header > 0 {
        a.mov(R1, R6);
        a.mov(R2, uplink_l2_header);
        a.mov(R3, 0);
        a.call(Helper::SkbChangeHead);
        a.mov(R1, uplink_ifindex);
        a.mov(R2, 0);
        a.mov(R3, 0);
        a.mov(R4, 0);
        a.call(Helper::RedirectNeigh);
    } else {
        a.mov(R1, uplink_ifindex);
        a.mov(R2, 0);
        a.call(Helper::Redirect);
    }
    a.exit();
    a.bind(bounced);
    if uplink_l2_header > 0 {
        a.mov(R1, R6);
        a.mov(R2, uplink_l2_header);
        a.mov(R3, 0);
        a.call(Helper::SkbChangeHead);
        // The new header is all zeros; of it only the EtherType is looked at.
        a.load(Size::W, R0, R6, SKB_PROTOCOL);
        a.store(Size::H, R10, -8, R0);
        a.mov(R1, R6);
        a.mov(R2, ETHERTYPE_AT);
        a.mov(R3, R10);
        a.alu(Alu::Add, R3, -8);
        a.mov(R4, 2);
        a.mov(R5, 0);
        a.call(Helper::SkbStoreBytes);
    }
    a.mov(R0, BOUNCED);
    a.store(Size::W, R6, SKB_MARK, R0);
    a.mov(R1, uplink_ifindex);
    a.mov(R2, BPF_F_INGRESS);
    a.call(Helper::Redirect);
    a.exit();
    a.bind(other);
    verdict(a, TC_ACT_UNSPEC);
    asm.finish("ipmoved_return")
}

/// What the two steering programs remember: the flows that came out of the tunnel, and the replies
/// that are being sent in fragments.
#[derive(Debug)]
pub struct FlowMaps {
    flows: Map,
    fragments: Map,
}

impl FlowMaps {
    /// Room for `max_flows` flows without TCP; the one used least recently gives way.
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

/// Marks what comes out of the TUN and remembers flows without TCP and ICMP: for the ingress of the
/// new server's TUN.
///
/// The kernel itself carries the mark into accepted sockets (`tcp_fwmark_accept`) and into resets and
/// ICMP answers (`fwmark_reflect`); a UDP socket has nowhere to keep it, hence [`steer_egress`].
///
/// A reply without TCP is routed to `uplink` before it is redirected, and what the kernel learns of the
/// path MTU belongs to a route: so ICMP that says a packet was too big, of any protocol but TCP and
/// ICMP, whose replies are routed by the mark, arrives on `uplink` instead, without a mark.
///
/// # Errors
/// If the program is too large.
pub fn steer_mark(
    mark: u32,
    maps: &FlowMaps,
    uplink: Option<Entrance>,
) -> Result<Program, BpfError> {
    steer_mark_at(mark, maps, 0, uplink)
}

/// An interface on which packets are let in.
#[derive(Clone, Copy, Debug)]
pub struct Entrance {
    /// Its index.
    pub ifindex: u32,
    /// Length of its link-layer header, in bytes.
    pub l2_header: u32,
    /// Its hardware address, if it has such a header.
    pub mac: [u8; 6],
}

/// Redirects replies of remembered flows into the TUN: for the egress of the new server's uplinks.
///
/// All fragments of a reply follow the first. TCP and ICMP pass (they go by their mark), and so does
/// every UDP packet from `tunnel_port`, the tunnel itself.
///
/// # Errors
/// If the program is too large.
pub fn steer_egress(
    maps: &FlowMaps,
    l2_header: u32,
    tun_ifindex: u32,
    tunnel_port: u16,
) -> Result<Program, BpfError> {
    let mut asm = Assembler::new();
    let a = &mut asm;
    let (v6, pass, transport) = (a.label(), a.label(), a.label());
    let (build_v4, build_v6, later) = (a.label(), a.label(), a.label());
    a.mov(R6, R1);
    a.load(Size::W, R0, R6, SKB_VLAN_PRESENT);
    a.jump_if(R0, If::Ne, 0, pass);
    zero_key(a);
    // R9 says what is known of fragments; the identification is kept on the stack.
    a.mov(R9, UNFRAGMENTED);
    a.load(Size::W, R0, R6, SKB_PROTOCOL);
    a.jump_if(R0, If::Eq, ethertype(libc::ETH_P_IPV6), v6);
    a.jump_if(R0, If::Ne, ethertype(libc::ETH_P_IP), pass);

    a.load_packet(Size::B, l2_header + 9);
    a.mov(R8, R0);
    a.jump_if(R8, If::Eq, i32::from(TCP), pass);
    a.jump_if(R8, If::Eq, i32::from(ICMP), pass);
    store_family(a, 4);
    load_ipv4_header_end(a, l2_header, pass);
    a.load_packet(Size::H, l2_header + 4);
    a.store(Size::W, R10, IDENTIFICATION, R0);
    a.load_packet(Size::H, l2_header + 6);
    let (fragment, more) = (a.label(), a.label());
    a.jump_if(R0, If::Set, 0x3fff, fragment);
    a.jump(transport);
    a.bind(fragment);
    a.mov(R9, LAST_FRAGMENT);
    a.jump_if(R0, If::Set, 0x2000, more);
    a.jump(build_v4);
    a.bind(more);
    a.mov(R9, MIDDLE_FRAGMENT);
    a.jump_if(R0, If::Set, 0x1fff, build_v4);
    a.mov(R9, FIRST_FRAGMENT);
    a.jump(transport);

    a.bind(v6);
    let (fragment, known) = (a.label(), a.label());
    walk_extension_headers(a, l2_header, fragment);
    a.jump(known);
    a.bind(fragment);
    a.load_packet_at(Size::B, R7, 0);
    a.mov(R8, R0);
    a.load_packet_at(Size::W, R7, 4);
    a.store(Size::W, R10, IDENTIFICATION, R0);
    a.load_packet_at(Size::H, R7, 2);
    a.alu(Alu::Add, R7, 8);
    a.mov(R9, FIRST_FRAGMENT);
    a.jump_if(R0, If::Lt, 8, known);
    a.mov(R9, MIDDLE_FRAGMENT);
    a.jump_if(R0, If::Set, 1, known);
    a.mov(R9, LAST_FRAGMENT);
    a.bind(known);
    a.jump_if(R8, If::Eq, i32::from(TCP), pass);
    a.jump_if(R8, If::Eq, i32::from(ICMPV6), pass);
    store_family(a, 6);
    a.jump_if(R9, If::Ge, MIDDLE_FRAGMENT, build_v6);

    // R7: where the ports are; R8: protocol.
    a.bind(transport);
    let build = a.label();
    a.jump_if(R8, If::Ne, i32::from(UDP), build);
    a.load_packet_at(Size::W, R7, 0);
    a.mov(R1, R0);
    a.alu(Alu::Rsh, R1, 16);
    a.jump_if(R1, If::Eq, i32::from(tunnel_port), pass);
    a.alu(Alu::Lsh, R0, 16);
    a.alu(Alu::Or, R0, R1);
    a.store(Size::W, R10, KEY_PORTS, R0);
    a.bind(build);
    a.load(Size::W, R0, R6, SKB_PROTOCOL);
    a.jump_if(R0, If::Eq, ethertype(libc::ETH_P_IPV6), build_v6);
    a.bind(build_v4);
    load_bytes(a, l2_header + 12, KEY_LOCAL, 4, pass);
    load_bytes(a, l2_header + 16, KEY_REMOTE, 4, pass);
    let look = a.label();
    a.jump(look);
    a.bind(build_v6);
    load_bytes(a, l2_header + 8, KEY_LOCAL, 16, pass);
    load_bytes(a, l2_header + 24, KEY_REMOTE, 16, pass);
    a.bind(look);
    a.jump_if(R9, If::Ge, MIDDLE_FRAGMENT, later);

    // With its ports: known or not.
    let (hit, miss, redirect) = (a.label(), a.label(), a.label());
    map_and_key(a, &maps.flows);
    a.call(Helper::MapLookup);
    a.jump_if_wide(R0, If::Eq, 0, miss);
    a.mov(R7, R0);
    a.call(Helper::KtimeGetNs);
    a.load(Size::Dw, R1, R7, 0);
    a.mov(R2, R0);
    a.alu(Alu::Sub, R2, R1);
    a.mov_wide(R3, REPLY_IDLE.as_nanos() as u64);
    a.jump_if_wide(R2, If::Le, R3, hit);
    a.jump(miss);
    a.bind(hit);
    a.store(Size::Dw, R7, 0, R0);
    a.jump_if(R9, If::Eq, UNFRAGMENTED, redirect);
    key_by_identification(a);
    a.store(Size::Dw, R10, VALUE, 0);
    map_and_key(a, &maps.fragments);
    a.mov(R3, R10);
    a.alu(Alu::Add, R3, i32::from(VALUE));
    a.mov(R4, 0);
    a.call(Helper::MapUpdate);
    a.bind(redirect);
    redirect_to(a, tun_ifindex);
    // A first fragment that is none of ours ends what an earlier packet with its identification said.
    a.bind(miss);
    a.jump_if(R9, If::Eq, UNFRAGMENTED, pass);
    key_by_identification(a);
    map_and_key(a, &maps.fragments);
    a.call(Helper::MapDelete);
    a.jump(pass);

    // Without ports: as the first fragment went.
    a.bind(later);
    let more = a.label();
    key_by_identification(a);
    map_and_key(a, &maps.fragments);
    a.call(Helper::MapLookup);
    a.jump_if_wide(R0, If::Eq, 0, pass);
    a.jump_if(R9, If::Eq, MIDDLE_FRAGMENT, more);
    map_and_key(a, &maps.fragments);
    a.call(Helper::MapDelete);
    a.bind(more);
    redirect_to(a, tun_ifindex);

    a.bind(pass);
    verdict(a, TC_ACT_UNSPEC);
    asm.finish("ipmoved_reply")
}

/// R9 of [`steer_egress`], in an order that separates what has ports from what has not.
const UNFRAGMENTED: i32 = 0;
const FIRST_FRAGMENT: i32 = 1;
const MIDDLE_FRAGMENT: i32 = 2;
const LAST_FRAGMENT: i32 = 3;

/// The key of both maps, at the end of the stack: family and protocol (u32), address of this host
/// and of the remote one (16 bytes each, IPv4 in the first four), and a last word: remote port × 2^16
/// + local port for flows, the identification for fragments.
const KEY_BYTES: usize = 40;
const KEY: i16 = -40;
const KEY_LOCAL: i16 = -36;
const KEY_REMOTE: i16 = -20;
const KEY_PORTS: i16 = -4;
/// The value: when the flow was last seen, in the kernel's nanoseconds; unused for fragments.
const VALUE_BYTES: usize = 8;
const VALUE: i16 = -56;
/// Where [`steer_egress`] keeps the identification of a fragment.
const IDENTIFICATION: i16 = -44;

fn steer_mark_at(
    mark: u32,
    maps: &FlowMaps,
    l2_header: u32,
    uplink: Option<Entrance>,
) -> Result<Program, BpfError> {
    // Destination unreachable with fragmentation needed (RFC 1191); packet too big (RFC 4443).
    const TOO_BIG_V4: i32 = 0x0304;
    const TOO_BIG_V6: i32 = 0x0200;
    let mut asm = Assembler::new();
    let a = &mut asm;
    let (v6, done, transport) = (a.label(), a.label(), a.label());
    let (icmp_v4, icmp_v6, enter) = (a.label(), a.label(), a.label());
    let build = a.label();
    a.mov(R6, R1);
    a.mov(R0, mark);
    a.store(Size::W, R6, SKB_MARK, R0);
    zero_key(a);
    a.load(Size::W, R0, R6, SKB_PROTOCOL);
    a.jump_if(R0, If::Eq, ethertype(libc::ETH_P_IPV6), v6);
    a.jump_if(R0, If::Ne, ethertype(libc::ETH_P_IP), done);

    a.load_packet(Size::B, l2_header + 9);
    a.mov(R8, R0);
    a.jump_if(R8, If::Eq, i32::from(TCP), done);
    a.jump_if(R8, If::Eq, i32::from(ICMP), icmp_v4);
    store_family(a, 4);
    load_bytes(a, l2_header + 16, KEY_LOCAL, 4, done);
    load_bytes(a, l2_header + 12, KEY_REMOTE, 4, done);
    load_ipv4_header_end(a, l2_header, done);
    a.jump_if(R8, If::Ne, i32::from(UDP), build);
    a.load_packet(Size::H, l2_header + 6);
    a.jump_if(R0, If::Set, 0x1fff, done);
    a.jump(transport);

    a.bind(v6);
    let (fragment, known) = (a.label(), a.label());
    walk_extension_headers(a, l2_header, fragment);
    a.jump(known);
    a.bind(fragment);
    a.load_packet_at(Size::B, R7, 0);
    a.mov(R8, R0);
    a.load_packet_at(Size::H, R7, 2);
    a.alu(Alu::Add, R7, 8);
    a.jump_if(R0, If::Lt, 8, known);
    a.jump_if(R8, If::Eq, i32::from(UDP), done);
    a.bind(known);
    a.jump_if(R8, If::Eq, i32::from(TCP), done);
    a.jump_if(R8, If::Eq, i32::from(ICMPV6), icmp_v6);
    store_family(a, 6);
    load_bytes(a, l2_header + 24, KEY_LOCAL, 16, done);
    load_bytes(a, l2_header + 8, KEY_REMOTE, 16, done);
    a.jump_if(R8, If::Ne, i32::from(UDP), build);

    a.bind(transport);
    a.load_packet_at(Size::W, R7, 0);
    a.store(Size::W, R10, KEY_PORTS, R0);
    a.bind(build);
    a.call(Helper::KtimeGetNs);
    a.mov(R7, R0);
    let new = a.label();
    map_and_key(a, &maps.flows);
    a.call(Helper::MapLookup);
    a.jump_if_wide(R0, If::Eq, 0, new);
    // A flow that is known takes no lock.
    a.store(Size::Dw, R0, 0, R7);
    a.jump(done);
    a.bind(new);
    a.store(Size::Dw, R10, VALUE, R7);
    map_and_key(a, &maps.flows);
    a.mov(R3, R10);
    a.alu(Alu::Add, R3, i32::from(VALUE));
    a.mov(R4, 0);
    a.call(Helper::MapUpdate);
    a.jump(done);

    a.bind(icmp_v4);
    load_ipv4_header_end(a, l2_header, done);
    a.load_packet_at(Size::H, R7, 0);
    a.jump_if(R0, If::Ne, TOO_BIG_V4, done);
    a.load_packet_at(Size::B, R7, 8 + 9);
    a.jump_if(R0, If::Eq, i32::from(TCP), done);
    a.jump_if(R0, If::Ne, i32::from(ICMP), enter);
    a.jump(done);
    a.bind(icmp_v6);
    a.load_packet_at(Size::H, R7, 0);
    a.jump_if(R0, If::Ne, TOO_BIG_V6, done);
    a.load_packet_at(Size::B, R7, 8 + 6);
    a.jump_if(R0, If::Eq, i32::from(TCP), done);
    a.jump_if(R0, If::Ne, i32::from(ICMPV6), enter);
    a.jump(done);
    a.bind(enter);
    if let Some(uplink) = uplink {
        enter_by(a, uplink);
    }
    a.bind(done);
    verdict(a, TC_ACT_UNSPEC);
    asm.finish("ipmoved_mark")
}

/// What was moved of one address, from all its moves.
struct Scope {
    addr: IpAddr,
    whole: bool,
    tcp: Vec<RangeInclusive<u16>>,
    udp: Vec<RangeInclusive<u16>>,
    /// UDP ports of the tunnel's own end at this address.
    tunnel_ports: Vec<u16>,
}

impl Scope {
    /// Whether the address alone decides.
    fn by_address(&self) -> bool {
        self.whole && self.tunnel_ports.is_empty()
    }
}

fn scopes(moves: &[Move], tunnel: &[SocketAddr]) -> Vec<Scope> {
    let mut scopes: Vec<Scope> = Vec::new();
    for moved in moves {
        let index = scopes.iter().position(|scope| scope.addr == moved.addr);
        let index = index.unwrap_or_else(|| {
            let at_addr = |end: &&SocketAddr| {
                end.ip() == moved.addr
                    || end.ip().is_unspecified() && (end.is_ipv6() || moved.addr.is_ipv4())
            };
            let mut ports: Vec<_> = tunnel
                .iter()
                .filter(at_addr)
                .map(SocketAddr::port)
                .collect();
            ports.sort_unstable();
            ports.dedup();
            scopes.push(Scope {
                addr: moved.addr,
                whole: false,
                tcp: Vec::new(),
                udp: Vec::new(),
                tunnel_ports: ports,
            });
            scopes.len() - 1
        });
        let scope = &mut scopes[index];
        scope.whole |= moved.is_whole();
        let ports = if moved.ports.is_empty() {
            vec![0..=u16::MAX]
        } else {
            moved.ports.clone()
        };
        if moved.transport != Some(Transport::Udp) {
            scope.tcp.extend(ports.iter().cloned());
        }
        if moved.transport != Some(Transport::Tcp) {
            scope.udp.extend(ports);
        }
    }
    for scope in &mut scopes {
        scope.tcp = joined(std::mem::take(&mut scope.tcp));
        scope.udp = joined(std::mem::take(&mut scope.udp));
    }
    scopes
}

/// The capture program in the making. R6 is the packet, R7 where its transport header begins and
/// later the port that decides, R8 the protocol, R9 the index of the scope.
struct Capture {
    asm: Assembler,
    l2: u32,
    tun_ifindex: u32,
    scopes: Vec<Scope>,
}

/// The ways out of the address and header part of the capture program.
#[derive(Clone, Copy)]
struct Ways {
    pass: Label,
    redirect: Label,
    /// R7 is a port of TCP or UDP at the moved address, R8 says which.
    port: Label,
    /// A fragment; R8 is its protocol.
    fragment: Label,
    /// A packet without ports.
    other: Label,
}

/// Where [`Capture`] keeps the destination on the stack, as four words (IPv4: the last).
const DESTINATION: [i16; 4] = [-16, -12, -8, -4];

impl Capture {
    fn assemble(mut self) -> Result<Program, BpfError> {
        let a = &mut self.asm;
        let v6 = a.label();
        let ways = Ways {
            pass: a.label(),
            redirect: a.label(),
            port: a.label(),
            fragment: a.label(),
            other: a.label(),
        };
        a.mov(R6, R1);
        masquerade::pass_bounced(a);
        a.load(Size::W, R0, R6, SKB_PKT_TYPE);
        a.jump_if(R0, If::Ne, i32::from(libc::PACKET_HOST), ways.pass);
        a.load(Size::W, R0, R6, SKB_VLAN_PRESENT);
        a.jump_if(R0, If::Ne, 0, ways.pass);
        a.load(Size::W, R0, R6, SKB_PROTOCOL);
        a.jump_if(R0, If::Eq, ethertype(libc::ETH_P_IPV6), v6);
        a.jump_if(R0, If::Ne, ethertype(libc::ETH_P_IP), ways.pass);
        self.ipv4(ways);
        self.asm.bind(v6);
        self.ipv6(ways);
        self.asm.bind(ways.redirect);
        redirect_to(&mut self.asm, self.tun_ifindex);
        self.asm.bind(ways.pass);
        verdict(&mut self.asm, TC_ACT_UNSPEC);
        self.decide_other(ways.other);
        self.decide_fragment(ways.fragment);
        self.decide_port(ways.port);
        self.asm.finish("ipmoved_capture")
    }

    fn ipv4(&mut self, ways: Ways) {
        let (a, l2) = (&mut self.asm, self.l2);
        let parse = a.label();
        a.load_packet(Size::W, l2 + 16);
        for (index, scope) in self.scopes.iter().enumerate() {
            let IpAddr::V4(addr) = scope.addr else {
                continue;
            };
            if scope.by_address() {
                a.jump_if(R0, If::Eq, addr.to_bits(), ways.redirect);
            } else {
                a.mov(R9, index as i32);
                a.jump_if(R0, If::Eq, addr.to_bits(), parse);
            }
        }
        a.jump(ways.pass);

        a.bind(parse);
        a.store(Size::W, R10, DESTINATION[3], R0);
        load_ipv4_header_end(a, l2, ways.pass);
        a.load_packet(Size::B, l2 + 9);
        a.mov(R8, R0);
        a.load_packet(Size::H, l2 + 6);
        a.jump_if(R0, If::Set, 0x3fff, ways.fragment);
        let destination_port = a.label();
        a.jump_if(R8, If::Eq, i32::from(TCP), destination_port);
        a.jump_if(R8, If::Eq, i32::from(UDP), destination_port);
        a.jump_if(R8, If::Ne, i32::from(ICMP), ways.other);
        // Destination unreachable, time exceeded, parameter problem (RFC 792).
        let error = a.label();
        a.load_packet_at(Size::B, R7, 0);
        for kind in [3, 11, 12] {
            a.jump_if(R0, If::Eq, kind, error);
        }
        a.jump(ways.other);
        a.bind(error);
        a.load_packet_at(Size::W, R7, 8 + 12);
        a.load(Size::W, R1, R10, DESTINATION[3]);
        a.jump_if(R0, If::Ne, R1, ways.other);
        a.load_packet_at(Size::H, R7, 8 + 6);
        a.jump_if(R0, If::Set, 0x1fff, ways.other);
        let source_port = a.label();
        a.load_packet_at(Size::B, R7, 8 + 9);
        a.mov(R8, R0);
        a.jump_if(R8, If::Eq, i32::from(TCP), source_port);
        a.jump_if(R8, If::Ne, i32::from(UDP), ways.other);
        a.bind(source_port);
        a.load_packet_at(Size::B, R7, 8);
        a.alu(Alu::And, R0, 0xf);
        a.alu(Alu::Lsh, R0, 2);
        a.alu(Alu::Add, R7, R0);
        a.load_packet_at(Size::H, R7, 8);
        a.mov(R7, R0);
        a.jump(ways.port);
        a.bind(destination_port);
        a.load_packet_at(Size::H, R7, 2);
        a.mov(R7, R0);
        a.jump(ways.port);
    }

    fn ipv6(&mut self, ways: Ways) {
        let (a, l2) = (&mut self.asm, self.l2);
        let (by_address, parse, icmp) = (a.label(), a.label(), a.label());
        load_v6_destination(a, l2);
        for (index, scope) in self.scopes.iter().enumerate() {
            let IpAddr::V6(addr) = scope.addr else {
                continue;
            };
            let next = a.label();
            jump_unless_v6_destination(a, addr, next);
            a.mov(R9, index as i32);
            a.jump(if scope.by_address() {
                by_address
            } else {
                parse
            });
            a.bind(next);
        }
        a.jump(ways.pass);

        a.bind(by_address);
        a.load_packet(Size::B, l2 + 6);
        a.jump_if(R0, If::Ne, i32::from(ICMPV6), ways.redirect);
        a.load_packet(Size::B, l2 + IPV6_HEADER);
        jump_if_link_scoped_icmpv6(a, ways.pass);
        a.jump(ways.redirect);

        a.bind(parse);
        let fragment = a.label();
        walk_extension_headers(a, l2, fragment);
        let destination_port = a.label();
        a.jump_if(R8, If::Eq, i32::from(TCP), destination_port);
        a.jump_if(R8, If::Eq, i32::from(UDP), destination_port);
        a.jump_if(R8, If::Eq, i32::from(ICMPV6), icmp);
        a.jump(ways.other);
        a.bind(fragment);
        a.load_packet_at(Size::B, R7, 0);
        a.mov(R8, R0);
        a.jump(ways.fragment);
        a.bind(icmp);
        a.load_packet_at(Size::B, R7, 0);
        jump_if_link_scoped_icmpv6(a, ways.pass);
        // The errors are 1 to 4 (RFC 4443).
        a.jump_if(R0, If::Eq, 0, ways.other);
        a.jump_if(R0, If::Gt, 4, ways.other);
        for (word, slot) in (0..).zip(DESTINATION) {
            a.load_packet_at(Size::W, R7, 8 + 8 + 4 * word);
            a.load(Size::W, R1, R10, slot);
            a.jump_if(R0, If::Ne, R1, ways.other);
        }
        let (transport, source_port) = (a.label(), a.label());
        a.load_packet_at(Size::B, R7, 8 + 6);
        a.mov(R8, R0);
        a.jump_if(R8, If::Ne, i32::from(FRAGMENT), transport);
        a.load_packet_at(Size::H, R7, 8 + IPV6_HEADER + 2);
        a.jump_if(R0, If::Set, 0xfff8, ways.other);
        a.load_packet_at(Size::B, R7, 8 + IPV6_HEADER);
        a.mov(R8, R0);
        a.alu(Alu::Add, R7, 8);
        a.bind(transport);
        a.jump_if(R8, If::Eq, i32::from(TCP), source_port);
        a.jump_if(R8, If::Ne, i32::from(UDP), ways.other);
        a.bind(source_port);
        a.load_packet_at(Size::H, R7, 8 + IPV6_HEADER);
        a.mov(R7, R0);
        a.jump(ways.port);
        a.bind(destination_port);
        a.load_packet_at(Size::H, R7, 2);
        a.mov(R7, R0);
        a.jump(ways.port);
    }

    fn decide_other(&mut self, other: Label) {
        let a = &mut self.asm;
        let take = a.label();
        a.bind(other);
        for (index, scope) in self.scopes.iter().enumerate() {
            if scope.whole && !scope.by_address() {
                a.jump_if(R9, If::Eq, index as i32, take);
            }
        }
        verdict(a, TC_ACT_UNSPEC);
        a.bind(take);
        redirect_to(a, self.tun_ifindex);
    }

    fn decide_fragment(&mut self, fragment: Label) {
        let a = &mut self.asm;
        let take = a.label();
        a.bind(fragment);
        for (index, scope) in self.scopes.iter().enumerate() {
            if scope.by_address() {
                continue;
            }
            let next = a.label();
            a.jump_if(R9, If::Ne, index as i32, next);
            if scope.whole {
                a.jump(take);
            }
            for (protocol, ranges) in [(TCP, &scope.tcp), (UDP, &scope.udp)] {
                if !ranges.is_empty() {
                    a.jump_if(R8, If::Eq, i32::from(protocol), take);
                }
            }
            a.bind(next);
        }
        verdict(a, TC_ACT_UNSPEC);
        a.bind(take);
        redirect_to(a, self.tun_ifindex);
    }

    /// The trees stand last, each with its own ways out, so that no jump spans more than one tree.
    fn decide_port(&mut self, port: Label) {
        self.asm.bind(port);
        for (index, scope) in self.scopes.iter().enumerate() {
            if scope.by_address() {
                continue;
            }
            let a = &mut self.asm;
            let everything = [0..=u16::MAX];
            let (tcp, udp) = if scope.whole {
                (&everything[..], &everything[..])
            } else {
                (&scope.tcp[..], &scope.udp[..])
            };
            if !scope.tunnel_ports.is_empty() {
                let (next, own) = (a.label(), a.label());
                a.jump_if(R9, If::Ne, index as i32, next);
                a.jump_if(R8, If::Ne, i32::from(UDP), next);
                for &port in &scope.tunnel_ports {
                    a.jump_if(R7, If::Eq, i32::from(port), own);
                }
                a.jump(next);
                a.bind(own);
                verdict(a, TC_ACT_UNSPEC);
                a.bind(next);
            }
            if tcp == udp {
                tree(a, index, None, tcp, self.tun_ifindex);
            } else {
                tree(a, index, Some(TCP), tcp, self.tun_ifindex);
                tree(a, index, Some(UDP), udp, self.tun_ifindex);
            }
        }
        verdict(&mut self.asm, TC_ACT_UNSPEC);
    }
}

/// Decides for one scope (and protocol) by the port in R7; goes on behind it for any other.
fn tree(
    a: &mut Assembler,
    scope: usize,
    protocol: Option<u8>,
    ranges: &[RangeInclusive<u16>],
    tun_ifindex: u32,
) {
    fn node(a: &mut Assembler, ranges: &[RangeInclusive<u16>], hit: Label, miss: Label) {
        let middle = ranges.len() / 2;
        let Some(range) = ranges.get(middle) else {
            a.jump(miss);
            return;
        };
        let below = if middle == 0 { miss } else { a.label() };
        a.jump_if(R7, If::Lt, i32::from(*range.start()), below);
        a.jump_if(R7, If::Le, i32::from(*range.end()), hit);
        node(a, &ranges[middle + 1..], hit, miss);
        if middle > 0 {
            a.bind(below);
            node(a, &ranges[..middle], hit, miss);
        }
    }
    let (next, hit, miss) = (a.label(), a.label(), a.label());
    a.jump_if(R9, If::Ne, scope as i32, next);
    if let Some(protocol) = protocol {
        a.jump_if(R8, If::Ne, i32::from(protocol), next);
    }
    node(a, ranges, hit, miss);
    a.bind(hit);
    redirect_to(a, tun_ifindex);
    a.bind(miss);
    verdict(a, TC_ACT_UNSPEC);
    a.bind(next);
}

// Phrases that several programs share.

/// `__sk_buff.protocol` holds the EtherType in network order.
fn ethertype(protocol: i32) -> i32 {
    i32::from((protocol as u16).to_be())
}

fn verdict(a: &mut Assembler, verdict: i32) {
    a.mov(R0, verdict);
    a.exit();
}

fn redirect_to(a: &mut Assembler, ifindex: u32) {
    a.mov(R1, ifindex);
    a.mov(R2, 0);
    a.call(Helper::Redirect);
    a.exit();
}

/// The packet, which has no link-layer header, arrives on another interface, without a mark.
fn enter_by(a: &mut Assembler, at: Entrance) {
    if at.l2_header > 0 {
        a.mov(R1, R6);
        a.mov(R2, at.l2_header);
        a.mov(R3, 0);
        a.call(Helper::SkbChangeHead);
        // To the interface's own address, from nobody's.
        let [a0, a1, a2, a3, a4, a5] = at.mac;
        a.store(Size::W, R10, -16, u32::from_ne_bytes([a0, a1, a2, a3]));
        a.store(Size::H, R10, -12, i32::from(u16::from_ne_bytes([a4, a5])));
        a.store(Size::H, R10, -10, 0);
        a.store(Size::W, R10, -8, 0);
        a.load(Size::W, R0, R6, SKB_PROTOCOL);
        a.store(Size::H, R10, -4, R0);
        a.mov(R1, R6);
        a.mov(R2, 0);
        a.mov(R3, R10);
        a.alu(Alu::Add, R3, -16);
        a.mov(R4, at.l2_header);
        a.mov(R5, 0);
        a.call(Helper::SkbStoreBytes);
    }
    a.mov(R0, 0);
    a.store(Size::W, R6, SKB_MARK, R0);
    a.mov(R1, at.ifindex);
    a.mov(R2, BPF_F_INGRESS);
    a.call(Helper::Redirect);
    a.exit();
}

/// R7 = where the IPv4 header ends; to `bad` if it is none.
fn load_ipv4_header_end(a: &mut Assembler, l2: u32, bad: Label) {
    a.load_packet(Size::B, l2);
    a.mov(R7, R0);
    a.alu(Alu::And, R0, 0xf0);
    a.jump_if(R0, If::Ne, 0x40, bad);
    a.alu(Alu::And, R7, 0xf);
    a.alu(Alu::Lsh, R7, 2);
    a.jump_if(R7, If::Lt, IPV4_HEADER, bad);
    a.alu(Alu::Add, R7, l2);
}

/// R1 to R4 = the words of the IPv6 destination, which are on the stack as well.
fn load_v6_destination(a: &mut Assembler, l2: u32) {
    for (word, slot) in (0..).zip(DESTINATION) {
        a.load_packet(Size::W, l2 + 24 + 4 * word);
        a.store(Size::W, R10, slot, R0);
    }
    for (reg, slot) in [R1, R2, R3, R4].into_iter().zip(DESTINATION) {
        a.load(Size::W, reg, R10, slot);
    }
}

/// After [`load_v6_destination`]; the last word tells most addresses apart.
fn jump_unless_v6_destination(a: &mut Assembler, addr: Ipv6Addr, other: Label) {
    let bits = addr.to_bits();
    for (reg, shift) in [(R4, 0), (R3, 32), (R2, 64), (R1, 96)] {
        a.jump_if(reg, If::Ne, (bits >> shift) as u32, other);
    }
}

/// R0 is an ICMPv6 type: multicast listener discovery and neighbour discovery are the link's
/// business (130–137 and 143; RFC 2710, 4861, 3810).
fn jump_if_link_scoped_icmpv6(a: &mut Assembler, to: Label) {
    let no = a.label();
    a.jump_if(R0, If::Eq, 143, to);
    a.jump_if(R0, If::Lt, 130, no);
    a.jump_if(R0, If::Le, 137, to);
    a.bind(no);
}

/// R7 = where the header after the extension headers begins, R8 = its protocol. At the fragment
/// header of a real fragment: to `fragment`, with R7 there.
fn walk_extension_headers(a: &mut Assembler, l2: u32, fragment: Label) {
    let done = a.label();
    a.load_packet(Size::B, l2 + 6);
    a.mov(R8, R0);
    a.mov(R7, l2 + IPV6_HEADER);
    for _ in 0..MAX_EXTENSION_HEADERS {
        let (options, fragmented, next) = (a.label(), a.label(), a.label());
        a.jump_if(R8, If::Eq, i32::from(FRAGMENT), fragmented);
        for header in [HOP_BY_HOP, ROUTING, DESTINATION_OPTIONS] {
            a.jump_if(R8, If::Eq, i32::from(header), options);
        }
        a.jump(done);
        a.bind(options);
        a.load_packet_at(Size::B, R7, 0);
        a.mov(R8, R0);
        a.load_packet_at(Size::B, R7, 1);
        a.alu(Alu::Add, R0, 1);
        a.alu(Alu::Lsh, R0, 3);
        a.alu(Alu::Add, R7, R0);
        a.jump(next);
        a.bind(fragmented);
        a.load_packet_at(Size::H, R7, 2);
        a.jump_if(R0, If::Set, 0xfff9, fragment);
        // An atomic fragment (RFC 6946) is a whole packet.
        a.load_packet_at(Size::B, R7, 0);
        a.mov(R8, R0);
        a.alu(Alu::Add, R7, 8);
        a.bind(next);
    }
    a.bind(done);
}

fn zero_key(a: &mut Assembler) {
    for offset in (KEY..0).step_by(8) {
        a.store(Size::Dw, R10, offset, 0);
    }
}

/// The key's first word, from R8.
fn store_family(a: &mut Assembler, version: i32) {
    a.mov(R0, R8);
    a.alu(Alu::Or, R0, version << 8);
    a.store(Size::W, R10, KEY, R0);
}

fn key_by_identification(a: &mut Assembler) {
    a.load(Size::W, R0, R10, IDENTIFICATION);
    a.store(Size::W, R10, KEY_PORTS, R0);
}

fn load_bytes(a: &mut Assembler, from: u32, to: i16, length: i32, failed: Label) {
    a.mov(R1, R6);
    a.mov(R2, from);
    a.mov(R3, R10);
    a.alu(Alu::Add, R3, i32::from(to));
    a.mov(R4, length);
    a.call(Helper::SkbLoadBytes);
    a.jump_if_wide(R0, If::Ne, 0, failed);
}

fn map_and_key(a: &mut Assembler, map: &Map) {
    use std::os::fd::AsFd;
    let map: BorrowedFd<'_> = map.as_fd();
    a.load_map(R1, map);
    a.mov(R2, R10);
    a.alu(Alu::Add, R2, i32::from(KEY));
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::os::fd::AsFd;

    use proptest::prelude::*;

    use super::*;
    use crate::kernel::bpf::test_run::run;
    use crate::model::moved::{MAX_MOVES, MAX_PORT_RANGES};

    const TC_ACT_REDIRECT: i32 = 7;
    const L2: u32 = 14;
    const MARK: u32 = 0x6970_6d76;

    fn moves(texts: &[&str]) -> Vec<Move> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    /// A frame for this host, as `lo` would receive it.
    fn frame(packet: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend(if packet[0] >> 4 == 4 {
            [8, 0]
        } else {
            [0x86, 0xdd]
        });
        frame.extend(packet);
        frame
    }

    #[derive(Clone, Debug)]
    struct Packet {
        src: IpAddr,
        dst: IpAddr,
        protocol: u8,
        /// Words of IPv4 options, or 8-byte units of an IPv6 destination options header.
        options: u8,
        /// Identification, offset in units of 8 bytes, more to come.
        fragment: Option<(u16, u16, bool)>,
        payload: Vec<u8>,
    }

    impl Packet {
        fn new(src: &str, dst: &str, protocol: u8, payload: Vec<u8>) -> Self {
            Self {
                src: src.parse().unwrap(),
                dst: dst.parse().unwrap(),
                protocol,
                options: 0,
                fragment: None,
                payload,
            }
        }

        fn bytes(&self) -> Vec<u8> {
            let mut out = Vec::new();
            match (self.src, self.dst) {
                (IpAddr::V4(src), IpAddr::V4(dst)) => {
                    let header = 20 + 4 * usize::from(self.options);
                    let total = (header + self.payload.len()) as u16;
                    let (id, offset, more) = self.fragment.unwrap_or((7, 0, false));
                    out.extend([0x40 | (header / 4) as u8, 0]);
                    out.extend(total.to_be_bytes());
                    out.extend(id.to_be_bytes());
                    out.extend((offset | u16::from(more) << 13).to_be_bytes());
                    out.extend([64, self.protocol, 0, 0]);
                    out.extend(src.octets());
                    out.extend(dst.octets());
                    out.resize(header, 1);
                }
                (IpAddr::V6(src), IpAddr::V6(dst)) => {
                    let mut headers = Vec::new();
                    let mut next = self.protocol;
                    if let Some((id, offset, more)) = self.fragment {
                        let mut header = vec![next, 0];
                        header.extend((offset << 3 | u16::from(more)).to_be_bytes());
                        header.extend(u32::from(id).to_be_bytes());
                        headers = header;
                        next = FRAGMENT;
                    }
                    if self.options > 0 {
                        let mut header = vec![1; 8 * usize::from(self.options)];
                        header[0] = next;
                        header[1] = self.options - 1;
                        header.extend(headers);
                        headers = header;
                        next = DESTINATION_OPTIONS;
                    }
                    let length = (headers.len() + self.payload.len()) as u16;
                    out.extend([0x60, 0, 0, 0]);
                    out.extend(length.to_be_bytes());
                    out.extend([next, 64]);
                    out.extend(src.octets());
                    out.extend(dst.octets());
                    out.extend(headers);
                }
                _ => panic!("mixed families"),
            }
            out.extend(&self.payload);
            out
        }

        fn icmp_error(from: &str, quoted: &Self) -> Self {
            let dst = quoted.src.to_string();
            let (protocol, kind) = if quoted.src.is_ipv4() {
                (ICMP, 3)
            } else {
                (ICMPV6, 1)
            };
            let mut payload = vec![kind, 3, 0, 0, 0, 0, 0, 0];
            payload.extend(quoted.bytes());
            Self::new(from, &dst, protocol, payload)
        }
    }

    fn ports(src: u16, dst: u16) -> Vec<u8> {
        let mut out = Vec::from(src.to_be_bytes());
        out.extend(dst.to_be_bytes());
        out.resize(24, 0);
        out
    }

    /// What the capture program should decide, from [`Move::takes`].
    fn should_take(moves: &[Move], tunnel: Option<SocketAddr>, packet: &Packet) -> bool {
        let of_tunnel = |port: u16, protocol: u8| {
            tunnel
                .is_some_and(|end| end.ip() == packet.dst && end.port() == port && protocol == UDP)
        };
        let icmp_type = packet.payload.first().copied().unwrap_or(0);
        let first = packet
            .fragment
            .is_none_or(|(_, offset, more)| offset == 0 && !more);
        let icmp6 = packet.protocol == ICMPV6 && packet.dst.is_ipv6();
        // Where the address alone decides, extension headers are not walked: none of the link's own
        // messages to a unicast address has any.
        let bare = packet.options == 0 && packet.fragment.is_none();
        let walked = tunnel.is_some_and(|end| end.ip() == packet.dst);
        if icmp6 && (bare || first && walked) && matches!(icmp_type, 130..=137 | 143) {
            return false;
        }
        let word = |at: usize| u16::from_be_bytes([packet.payload[at], packet.payload[at + 1]]);
        let port = (first && [TCP, UDP].contains(&packet.protocol)).then(|| word(2));
        if port.is_some_and(|port| of_tunnel(port, packet.protocol)) {
            return false;
        }
        moves.iter().filter(|m| m.addr == packet.dst).any(|moved| {
            moved.takes(packet.protocol, port)
                || !first && (1..=u16::MAX).any(|port| moved.takes(packet.protocol, Some(port)))
        })
    }

    fn taken(program: BorrowedFd<'_>, packet: &Packet) -> bool {
        match run(program, &frame(&packet.bytes())).verdict {
            TC_ACT_REDIRECT => true,
            TC_ACT_UNSPEC => false,
            other => panic!("verdict {other} for {packet:?}"),
        }
    }

    fn packets() -> impl Strategy<Value = Packet> {
        let host = prop::sample::select(vec![1_u8, 5, 6, 7, 8]);
        let protocol = prop::sample::select(vec![TCP, UDP, ICMP, ICMPV6, 47, 132]);
        let port = prop_oneof![
            prop::sample::select(vec![
                22_u16, 53, 79, 80, 81, 443, 8000, 8100, 8101, 51820, 65535
            ]),
            any::<u16>()
        ];
        let fragment = prop::option::weighted(0.3, (any::<u16>(), 0_u16..100, any::<bool>()));
        (
            any::<bool>(),
            host,
            protocol,
            port,
            0_u8..4,
            fragment,
            any::<u8>(),
        )
            .prop_map(|(v6, host, protocol, port, options, fragment, kind)| {
                let (src, dst) = if v6 {
                    ("2001:db8::99".into(), format!("2001:db8::{host}"))
                } else {
                    ("203.0.113.7".to_owned(), format!("192.0.2.{host}"))
                };
                let mut payload = ports(1234, port);
                if [ICMP, ICMPV6].contains(&protocol) {
                    // Errors need a quoted packet; they have a test of their own.
                    let errors = if protocol == ICMP {
                        &[3, 11, 12][..]
                    } else {
                        &[1, 2, 3, 4]
                    };
                    payload[0] = if errors.contains(&kind) { 128 } else { kind };
                }
                Packet {
                    options,
                    fragment,
                    ..Packet::new(&src, &dst, protocol, payload)
                }
            })
    }

    #[test]
    fn capture_takes_what_was_moved_and_nothing_else() {
        let moves = moves(&[
            "192.0.2.5",
            "192.0.2.6:80,443,8000-8100/tcp",
            "192.0.2.6:53/udp",
            "192.0.2.7/udp",
            "192.0.2.8",
            "2001:db8::5",
            "[2001:db8::6]:80,443,8000-8100",
            "2001:db8::7/tcp",
            "2001:db8::8",
        ]);
        for tunnel in [None, Some("192.0.2.8:51820"), Some("[2001:db8::8]:443")] {
            let tunnel: Option<SocketAddr> = tunnel.map(|end| end.parse().unwrap());
            let program = capture(&moves, L2, 1, tunnel.as_slice()).unwrap();
            let program = program.load().expect("run the tests as root");
            proptest!(|(packet in packets())| {
                let expected = should_take(&moves, tunnel, &packet);
                prop_assert_eq!(taken(program.as_fd(), &packet), expected, "{:?}", packet);
            });
        }
    }

    #[test]
    fn icmp_errors_go_where_their_flow_lives() {
        let moves = moves(&["192.0.2.6:80/tcp", "[2001:db8::6]:80/tcp", "192.0.2.8"]);
        let tunnel = ["192.0.2.8:51820".parse().unwrap()];
        let program = capture(&moves, L2, 1, &tunnel).unwrap().load().unwrap();
        for (router, client, moved) in [
            ("198.51.100.1", "203.0.113.7", "192.0.2.6"),
            ("2001:db8:1::1", "2001:db8:2::1", "2001:db8::6"),
        ] {
            for (protocol, source, options, expected) in [
                (TCP, 80, 0, true),
                (TCP, 81, 0, false),
                (UDP, 80, 0, false),
                (47, 80, 0, false),
                (TCP, 80, 2, moved.contains('.')),
            ] {
                let mut quoted = Packet::new(moved, client, protocol, ports(source, 999));
                quoted.options = options;
                let error = Packet::icmp_error(router, &quoted);
                assert_eq!(taken(program.as_fd(), &error), expected, "{error:?}");
            }
            let mut quoted = Packet::new(moved, client, TCP, ports(80, 999));
            quoted.fragment = Some((1, 0, true));
            assert!(taken(program.as_fd(), &Packet::icmp_error(router, &quoted)));
            quoted.fragment = Some((1, 8, true));
            assert!(!taken(
                program.as_fd(),
                &Packet::icmp_error(router, &quoted)
            ));
            // Someone else's packet in the quote.
            let mut error =
                Packet::icmp_error(router, &Packet::new(client, moved, TCP, ports(80, 9)));
            error.dst = moved.parse().unwrap();
            assert!(!taken(program.as_fd(), &error));
        }
        // Path MTU of the tunnel itself, which ends at an address that moved whole.
        let own = Packet::new("192.0.2.8", "198.51.100.2", UDP, ports(51820, 51820));
        assert!(!taken(
            program.as_fd(),
            &Packet::icmp_error("198.51.100.1", &own)
        ));
        let other = Packet::new("192.0.2.8", "198.51.100.2", UDP, ports(53, 51820));
        assert!(taken(
            program.as_fd(),
            &Packet::icmp_error("198.51.100.1", &other)
        ));
    }

    #[test]
    fn truncated_and_foreign_frames_pass() {
        let moves = moves(&["192.0.2.6:80", "[2001:db8::6]:80", "2001:db8::5"]);
        let program = capture(&moves, L2, 1, &[]).unwrap().load().unwrap();
        for packet in [
            Packet::new("203.0.113.7", "192.0.2.6", TCP, ports(1, 80)),
            Packet::new("2001:db8::99", "2001:db8::6", TCP, ports(1, 80)),
        ] {
            assert!(taken(program.as_fd(), &packet));
            let whole = frame(&packet.bytes());
            let needed = whole.len() - 20;
            // BPF_PROG_TEST_RUN wants the IP header whole.
            let headers = if packet.dst.is_ipv4() { 34 } else { 54 };
            for length in headers..needed {
                let verdict = run(program.as_fd(), &whole[..length]).verdict;
                assert_ne!(verdict, TC_ACT_REDIRECT, "{length} bytes");
            }
            let mut foreign = whole.clone();
            foreign[0] = 2; // another host's MAC address
            assert_eq!(run(program.as_fd(), &foreign).verdict, TC_ACT_UNSPEC);
            let mut arp = whole;
            arp[12..14].copy_from_slice(&[8, 6]);
            assert_eq!(run(program.as_fd(), &arp).verdict, TC_ACT_UNSPEC);
        }
    }

    #[test]
    fn as_many_moves_as_may_be_asked_for_load() {
        let ranges: Vec<_> = (0..MAX_PORT_RANGES as u16)
            .map(|n| 4 * n + 1..=4 * n + 2)
            .collect();
        let each = |spread: bool, v6: bool| -> Vec<Move> {
            (0..MAX_MOVES as u16)
                .map(|n| Move {
                    addr: match (spread, v6) {
                        (true, false) => Ipv4Addr::new(192, 0, 2, n as u8).into(),
                        (true, true) => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, n).into(),
                        (false, _) => Ipv4Addr::new(192, 0, 2, 1).into(),
                    },
                    ports: ranges
                        .iter()
                        .map(|r| r.start() + 512 * n..=r.end() + 512 * n)
                        .collect(),
                    transport: (n == 0).then_some(Transport::Udp),
                })
                .collect()
        };
        for moves in [each(true, false), each(true, true), each(false, false)] {
            let tunnel = ["192.0.2.1:1".parse().unwrap()];
            let program = capture(&moves, L2, 1, &tunnel).unwrap();
            let loaded = program.load().unwrap();
            let last = &moves[MAX_MOVES - 1];
            let src = if last.addr.is_ipv4() {
                "203.0.113.7"
            } else {
                "2001:db8::99"
            };
            let at = |port| Packet::new(src, &last.addr.to_string(), TCP, ports(1, port));
            for range in &last.ports {
                assert!(taken(loaded.as_fd(), &at(*range.start())));
                assert!(taken(loaded.as_fd(), &at(*range.end())));
                assert!(!taken(loaded.as_fd(), &at(range.end() + 1)));
            }
            return_path(&moves, L2, 1).unwrap().load().unwrap();
            return_path(&moves, 0, 1).unwrap().load().unwrap();
        }
    }

    /// Shows a request to the marking program and says whether its reply would be steered.
    struct Steering {
        mark: std::os::fd::OwnedFd,
        egress: std::os::fd::OwnedFd,
    }

    impl Steering {
        fn new() -> Self {
            let maps = FlowMaps::new(1000).expect("run the tests as root");
            Self {
                mark: steer_mark_at(MARK, &maps, L2, None)
                    .unwrap()
                    .load()
                    .unwrap(),
                egress: steer_egress(&maps, L2, 1, 51820).unwrap().load().unwrap(),
            }
        }

        fn arrives(&self, packet: &Packet) {
            let outcome = run(self.mark.as_fd(), &frame(&packet.bytes()));
            assert_eq!(outcome.mark, MARK);
        }

        fn is_steered(&self, packet: &Packet) -> bool {
            taken(self.egress.as_fd(), packet)
        }
    }

    const ENDS: [(&str, &str); 2] = [
        ("203.0.113.7", "198.51.100.2"),
        ("2001:db8:c::7", "2001:db8:b::2"),
    ];

    #[test]
    fn replies_of_flows_from_the_tunnel_are_steered() {
        let steering = Steering::new();
        for (client, here) in ENDS {
            for options in [0, 2] {
                let client_port = 40_000 + u16::from(options);
                let mut request = Packet::new(client, here, UDP, ports(client_port, 53));
                request.options = options;
                let reply = Packet::new(here, client, UDP, ports(53, client_port));
                assert!(!steering.is_steered(&reply));
                steering.arrives(&request);
                assert!(steering.is_steered(&reply));
                let elsewhere = Packet::new(here, client, UDP, ports(53, 41_000));
                assert!(!steering.is_steered(&elsewhere));
                let turned = Packet::new(client, here, UDP, ports(client_port, 53));
                assert!(!steering.is_steered(&turned));
                let gre = Packet::new(here, client, 47, ports(53, client_port));
                assert!(!steering.is_steered(&gre));
            }
            let icmp = if client.contains(':') { ICMPV6 } else { ICMP };
            for protocol in [TCP, icmp] {
                steering.arrives(&Packet::new(client, here, protocol, ports(1, 80)));
                assert!(!steering.is_steered(&Packet::new(here, client, protocol, ports(80, 1))));
            }
            steering.arrives(&Packet::new(client, here, 47, ports(1, 2)));
            assert!(steering.is_steered(&Packet::new(here, client, 47, ports(3, 4))));
        }
    }

    #[test]
    fn the_tunnels_own_datagrams_are_left_alone() {
        let steering = Steering::new();
        for (client, here) in ENDS {
            steering.arrives(&Packet::new(client, here, UDP, ports(51820, 51820)));
            let own = Packet::new(here, client, UDP, ports(51820, 51820));
            assert!(!steering.is_steered(&own));
        }
    }

    #[test]
    fn fragments_of_a_reply_follow_the_first() {
        let steering = Steering::new();
        for (client, here) in ENDS {
            let mut request = Packet::new(client, here, UDP, ports(40_000, 53));
            request.fragment = Some((9, 0, true));
            steering.arrives(&request);
            request.fragment = Some((9, 8, false));
            request.payload = ports(7, 7);
            steering.arrives(&request);
            assert!(!steering.is_steered(&Packet::new(here, client, UDP, ports(7, 7))));

            let fragment = |ports, id, offset, more| Packet {
                fragment: Some((id, offset, more)),
                ..Packet::new(here, client, UDP, ports)
            };
            let ours = || ports(53, 40_000);
            let noise = || ports(1, 2);
            assert!(!steering.is_steered(&fragment(noise(), 5, 3, true)));
            assert!(steering.is_steered(&fragment(ours(), 5, 0, true)));
            assert!(steering.is_steered(&fragment(noise(), 5, 3, true)));
            assert!(!steering.is_steered(&fragment(noise(), 6, 3, true)));
            assert!(steering.is_steered(&fragment(noise(), 5, 6, false)));
            // The last fragment ends it.
            assert!(!steering.is_steered(&fragment(noise(), 5, 3, true)));
            // And so does a direct packet that uses the identification again.
            assert!(steering.is_steered(&fragment(ours(), 5, 0, true)));
            assert!(!steering.is_steered(&fragment(ports(99, 40_000), 5, 0, true)));
            assert!(!steering.is_steered(&fragment(noise(), 5, 3, true)));
        }
    }
}
