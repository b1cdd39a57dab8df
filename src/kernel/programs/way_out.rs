//! Sends each packet that the daemon writes to its TUN with `nat` to its destination: for the
//! ingress of the old server's TUN.
//!
//! The packet goes to the new server, or to a client through the uplink, or, if its destination is
//! an address of this host, up into the host's own stack as if it came in on its interface. The
//! daemon *bounces* packets for which it has no flow, since they are the host's own: they go back
//! where they came from, the ingress of their interface, so that reverse path filters and firewalls
//! see them as they would have. A mark lets them pass the captures there.
//!
//! ```text
//! if (!IP) return TC_ACT_UNSPEC;
//! if (ip.daddr == one of local) {
//!     write an Ethernet header from and to the interface's own address;
//!     skb->mark = BOUNCED + captures - 1;
//!     return redirect(local.ifindex, BPF_F_INGRESS);
//! }
//! way = ip.daddr == one of servers ? server : uplink;
//! skb_change_head(way.l2_header);
//! return redirect_neigh(way.ifindex);      // without link-layer header: redirect(way.ifindex, 0)
//! ```

use std::net::IpAddr;

use Reg::R0;

use super::headers::ipv4;
use super::own::Own;
use super::phrases::{
    BOUNCED, MAX_CAPTURES, TC_ACT_UNSPEC, add_empty_header, arrive_at, branch_by_family,
    jump_unless_v6_destination, keep_packet, load_v6_destination, send_out, verdict,
    write_ethernet_header,
};
use super::stays::note_answered;
use crate::kernel::bpf::{Assembler, BpfError, If, Label, Program, Reg, Size};

/// An interface, with what a program needs to know of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Way {
    /// Its index.
    pub ifindex: u32,
    /// Length of its link-layer header: that of Ethernet, or 0.
    pub l2_header: u32,
    /// Its own link-layer address, where it has one.
    pub mac: Option<[u8; 6]>,
    /// How many captures stand at its ingress (at most two).
    pub captures: u32,
}

/// The program for an uplink, the new servers and this host's own addresses. What is answered to
/// clients is noted beside what is this host's own.
///
/// # Errors
/// If the program is too large.
pub fn way_out(
    uplink: Way,
    servers: &[(IpAddr, Way)],
    local: &[(IpAddr, Way)],
    own: &Own,
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
    keep_packet(a);
    note_answered(a, 0, own, None);
    branch_by_family(a, v6, pass);
    a.load_packet(Size::W, ipv4::DESTINATION);
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
    send_out(a, uplink.ifindex, uplink.l2_header);
    for (_, way, label) in servers {
        a.bind(label);
        send_out(a, way.ifindex, way.l2_header);
    }
    for (_, way, label) in local {
        a.bind(label);
        bounce(a, way);
    }
    a.bind(pass);
    verdict(a, TC_ACT_UNSPEC);
    asm.finish("ipmoved_return")
}

/// Lets the packet arrive at an interface once more.
fn bounce(a: &mut Assembler, way: Way) {
    if way.l2_header > 0 {
        let mac = way.mac.unwrap_or_default();
        add_empty_header(a, way.l2_header);
        // Only the destination address matters.
        write_ethernet_header(a, mac, mac);
    }
    debug_assert!(
        (1..=MAX_CAPTURES).contains(&way.captures),
        "or it comes back"
    );
    arrive_at(a, way.ifindex, BOUNCED + way.captures - 1);
}
