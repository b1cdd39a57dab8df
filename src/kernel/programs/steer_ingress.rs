//! Marks packets from the TUN, and remembers flows other than TCP and ICMP: for the ingress of the
//! new server's TUN.
//!
//! The kernel itself carries the mark into accepted sockets (`tcp_fwmark_accept`) and into resets
//! and ICMP replies (`fwmark_reflect`). A UDP socket has nowhere to keep it; hence
//! [`steer_egress`](super::steer_egress()).
//!
//! The kernel routes a reply without TCP to the uplink before the other program redirects it, and
//! learns the path MTU for a route. So an ICMP error that says a packet was too big arrives on the
//! uplink instead, without a mark, unless that packet was TCP or ICMP, whose replies are routed by
//! the mark.
//!
//! ```text
//! skb->mark = mark;
//! if (!IP || TCP) goto done;
//! if (ICMP) {
//!     if (it says "too big" about anything but TCP and ICMP) goto enter;
//!     goto done;
//! }
//! if (UDP && a later fragment) goto done;           // it shows no ports
//! key = { family, protocol, ip.daddr, ip.saddr, UDP ? ports : 0 };
//! if ((value = lookup(flows, key))) value->seen = now;   // takes no lock
//! else update(flows, key, { now });
//! done:   return TC_ACT_UNSPEC;
//!
//! enter:  write an Ethernet header to the uplink's own address;
//!         skb->mark = 0;
//!         return redirect(uplink, BPF_F_INGRESS);
//! ```

use Reg::{R0, R7, R10};

use super::flows::{
    FlowMaps, KEY_LOCAL, KEY_PORTS, KEY_REMOTE, VALUE, enter, look_up, store_address, store_family,
    zero_key,
};
use super::headers::{fragment, icmp, icmpv4, icmpv6, ipv4, ipv6, ports, skb};
use super::phrases::{
    PACKET, PROTOCOL, TC_ACT_UNSPEC, TRANSPORT, add_empty_header, arrive_at, branch_by_family,
    keep_packet, load_ipv4_header_end, verdict, walk_extension_headers, write_ethernet_header,
};
use crate::kernel::bpf::{Alu, Assembler, BpfError, Helper, If, Program, Reg, Size};
use crate::model::moved::{TCP, UDP};

/// The present time, once the program has read the transport header.
const NOW: Reg = R7;

/// An interface at which the program lets packets arrive.
#[derive(Clone, Copy, Debug)]
pub struct Entrance {
    /// Its index.
    pub ifindex: u32,
    /// Length of its link-layer header, in bytes.
    pub l2_header: u32,
    /// Its hardware address, if it has such a header.
    pub mac: [u8; 6],
}

/// The program for a mark, and the uplink at which "too big" errors arrive.
///
/// # Errors
/// If the program is too large.
pub fn steer_ingress(
    mark: u32,
    maps: &FlowMaps,
    uplink: Option<Entrance>,
) -> Result<Program, BpfError> {
    steer_ingress_behind(0, mark, maps, uplink)
}

/// The same program for packets with a link-layer header of this length. A TUN has none, but
/// BPF_PROG_TEST_RUN asks for one.
pub(super) fn steer_ingress_behind(
    l2_header: u32,
    mark: u32,
    maps: &FlowMaps,
    uplink: Option<Entrance>,
) -> Result<Program, BpfError> {
    let mut asm = Assembler::new();
    let a = &mut asm;
    let (v6, done, transport) = (a.label(), a.label(), a.label());
    let (icmp_v4, icmp_v6, to_uplink) = (a.label(), a.label(), a.label());
    let remember = a.label();
    keep_packet(a);
    a.mov(R0, mark);
    a.store(Size::W, PACKET, skb::MARK, R0);
    zero_key(a);
    branch_by_family(a, v6, done);

    a.load_packet(Size::B, l2_header + ipv4::PROTOCOL);
    a.mov(PROTOCOL, R0);
    a.jump_if(PROTOCOL, If::Eq, i32::from(TCP), done);
    a.jump_if(PROTOCOL, If::Eq, i32::from(icmpv4::PROTOCOL), icmp_v4);
    store_family(a, 4);
    store_address(a, l2_header + ipv4::DESTINATION, KEY_LOCAL, 4, done);
    store_address(a, l2_header + ipv4::SOURCE, KEY_REMOTE, 4, done);
    load_ipv4_header_end(a, l2_header, done);
    a.jump_if(PROTOCOL, If::Ne, i32::from(UDP), remember);
    a.load_packet(Size::H, l2_header + ipv4::FLAGS_AND_OFFSET);
    a.jump_if(R0, If::Set, ipv4::OFFSET_MASK, done);
    a.jump(transport);

    a.bind(v6);
    let (fragmented, known) = (a.label(), a.label());
    walk_extension_headers(a, l2_header, fragmented);
    a.jump(known);
    a.bind(fragmented);
    a.load_packet_at(Size::B, TRANSPORT, fragment::NEXT_HEADER);
    a.mov(PROTOCOL, R0);
    a.load_packet_at(Size::H, TRANSPORT, fragment::OFFSET_AND_M);
    a.alu(Alu::Add, TRANSPORT, fragment::LEN);
    a.jump_if(R0, If::Lt, fragment::SECOND, known);
    a.jump_if(PROTOCOL, If::Eq, i32::from(UDP), done);
    a.bind(known);
    a.jump_if(PROTOCOL, If::Eq, i32::from(TCP), done);
    a.jump_if(PROTOCOL, If::Eq, i32::from(icmpv6::PROTOCOL), icmp_v6);
    store_family(a, 6);
    store_address(a, l2_header + ipv6::DESTINATION, KEY_LOCAL, 16, done);
    store_address(a, l2_header + ipv6::SOURCE, KEY_REMOTE, 16, done);
    a.jump_if(PROTOCOL, If::Ne, i32::from(UDP), remember);

    a.bind(transport);
    a.load_packet_at(Size::W, TRANSPORT, ports::SOURCE);
    a.store(Size::W, R10, KEY_PORTS, R0);
    a.bind(remember);
    a.call(Helper::KtimeGetNs);
    a.mov(NOW, R0);
    let new = a.label();
    look_up(a, &maps.flows);
    a.jump_if_wide(R0, If::Eq, 0, new);
    // To update a known flow takes no lock.
    a.store(Size::Dw, R0, 0, NOW);
    a.jump(done);
    a.bind(new);
    a.store(Size::Dw, R10, VALUE, NOW);
    enter(a, &maps.flows);
    a.jump(done);

    a.bind(icmp_v4);
    load_ipv4_header_end(a, l2_header, done);
    a.load_packet_at(Size::H, TRANSPORT, icmp::TYPE_AND_CODE);
    a.jump_if(R0, If::Ne, icmpv4::TOO_BIG, done);
    a.load_packet_at(Size::B, TRANSPORT, icmp::QUOTED + ipv4::PROTOCOL);
    a.jump_if(R0, If::Eq, i32::from(TCP), done);
    a.jump_if(R0, If::Ne, i32::from(icmpv4::PROTOCOL), to_uplink);
    a.jump(done);
    a.bind(icmp_v6);
    a.load_packet_at(Size::H, TRANSPORT, icmp::TYPE_AND_CODE);
    a.jump_if(R0, If::Ne, icmpv6::TOO_BIG, done);
    a.load_packet_at(Size::B, TRANSPORT, icmp::QUOTED + ipv6::NEXT_HEADER);
    a.jump_if(R0, If::Eq, i32::from(TCP), done);
    a.jump_if(R0, If::Ne, i32::from(icmpv6::PROTOCOL), to_uplink);
    a.jump(done);
    a.bind(to_uplink);
    if let Some(uplink) = uplink {
        if uplink.l2_header > 0 {
            add_empty_header(a, uplink.l2_header);
            // The destination is the interface's own address, the source nobody's.
            write_ethernet_header(a, uplink.mac, [0; 6]);
        }
        arrive_at(a, uplink.ifindex, 0);
    }
    a.bind(done);
    verdict(a, TC_ACT_UNSPEC);
    asm.finish("ipmoved_mark")
}
