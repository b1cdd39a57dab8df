//! Sends packets that the daemon writes to its TUN out of the uplink: for the ingress of the old
//! server's TUN.
//!
//! The daemon writes packets to a moved address only if it bounces them: what came out of the
//! tunnel for one it drops ([`flow::gate`](crate::flow::gate)).
//!
//! The kernel resolves the neighbour. No forwarding, sysctl or netfilter hook takes part, and the
//! TTL stays. Packets *to* a moved address (bounced ones) arrive on the uplink once more, where
//! [`capture`](super::capture()) lets them pass. So this host's own stack sees them as it would
//! without a daemon, and strict reverse path filtering and firewall rules for the uplink judge them
//! alike.
//!
//! ```text
//! if (!IP) return TC_ACT_UNSPEC;
//! if (ip.daddr in moves) {
//!     skb_change_head(l2_header); ethernet.type = skb->protocol;
//!     skb->mark = BOUNCED;
//!     return redirect(uplink, BPF_F_INGRESS);
//! }
//! skb_change_head(l2_header);
//! return redirect_neigh(uplink);           // without link-layer header: redirect(uplink, 0)
//! ```

use std::net::IpAddr;

use Reg::{R0, R1, R2, R3, R4, R5, R10};

use super::headers::{ethernet, ipv4, skb};
use super::phrases::{
    BOUNCED, PACKET, TC_ACT_UNSPEC, add_empty_header, arrive_at, branch_by_family,
    jump_unless_v6_destination, keep_packet, load_v6_destination, send_out, verdict,
};
use crate::kernel::bpf::{Alu, Assembler, BpfError, Helper, If, Program, Reg, Size};
use crate::model::moved::Move;

/// Where the EtherType lies on the stack.
const ETHERTYPE: i16 = -8;

/// The program for `moves` and an uplink.
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
    keep_packet(a);
    branch_by_family(a, v6, other);
    a.load_packet(Size::W, ipv4::DESTINATION);
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
    send_out(a, uplink_ifindex, uplink_l2_header);
    a.bind(bounced);
    if uplink_l2_header > 0 {
        add_empty_header(a, uplink_l2_header);
        write_ethertype(a);
    }
    arrive_at(a, uplink_ifindex, BOUNCED);
    a.bind(other);
    verdict(a, TC_ACT_UNSPEC);
    asm.finish("ipmoved_return")
}

/// The new header is all zeros. The kernel looks only at its EtherType.
fn write_ethertype(a: &mut Assembler) {
    a.load(Size::W, R0, PACKET, skb::PROTOCOL);
    a.store(Size::H, R10, ETHERTYPE, R0);
    a.mov(R1, PACKET);
    a.mov(R2, ethernet::TYPE);
    a.mov(R3, R10);
    a.alu(Alu::Add, R3, i32::from(ETHERTYPE));
    a.mov(R4, 2);
    a.mov(R5, 0);
    a.call(Helper::SkbStoreBytes);
}
