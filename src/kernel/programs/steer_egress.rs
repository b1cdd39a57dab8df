//! Redirects replies of known flows into the TUN: for the egress of the new server's uplinks.
//!
//! All fragments of a reply follow the first. TCP and ICMP pass (they go by their mark), and so
//! does every UDP packet from the tunnel's own port.
//!
//! ```text
//! if (skb->vlan_present || !IP || TCP || ICMP) pass;
//! fragment = UNFRAGMENTED, FIRST_, MIDDLE_ or LAST_FRAGMENT;
//! if (fragment < MIDDLE_FRAGMENT && UDP) {
//!     if (source == tunnel_port) pass;
//!     ports = destination << 16 | source;
//! }
//! key = { family, protocol, ip.saddr, ip.daddr, ports };
//! if (fragment < MIDDLE_FRAGMENT) {
//!     if ((value = lookup(flows, key)) && now - value->seen <= REPLY_IDLE) {
//!         value->seen = now;
//!         if (fragment == FIRST_FRAGMENT) update(fragments, key by identification);
//!         take;
//!     }
//!     // A first fragment of another flow ends the entry for its identification.
//!     if (fragment == FIRST_FRAGMENT) delete(fragments, key by identification);
//!     pass;
//! }
//! if (!lookup(fragments, key by identification)) pass;
//! if (fragment == LAST_FRAGMENT) delete(fragments, key by identification);
//! take:   return redirect(tun, 0);
//! pass:   return TC_ACT_UNSPEC;
//! ```

use std::time::Duration;

use Reg::{R0, R1, R2, R3, R7, R9, R10};

use super::flows::{
    FlowMaps, KEY_LOCAL, KEY_PORTS, KEY_REMOTE, VALUE, enter, look_up, remove, store_address,
    store_family, zero_key,
};
use super::headers::{fragment, icmpv4, icmpv6, ipv4, ipv6, ports};
use super::phrases::{
    PROTOCOL, TC_ACT_UNSPEC, TRANSPORT, branch_by_family, jump_if_v6, keep_packet,
    load_ipv4_header_end, pass_if_tagged, redirect_to, verdict, walk_extension_headers,
};
use crate::kernel::bpf::{Alu, Assembler, BpfError, Helper, If, Program, Reg, Size};
use crate::model::moved::{TCP, UDP};

/// How long the map keeps a flow without TCP after its last packet in either direction. RFC 4787
/// REQ-5 asks for two minutes at least and recommends five.
pub const REPLY_IDLE: Duration = Duration::from_secs(300);

/// The kind of fragment: one of the four below.
const FRAGMENT: Reg = R9;

/// The order separates packets with ports from those without.
const UNFRAGMENTED: i32 = 0;
const FIRST_FRAGMENT: i32 = 1;
const MIDDLE_FRAGMENT: i32 = 2;
const LAST_FRAGMENT: i32 = 3;

/// The flow's value in the map, once the program has read the transport header.
const FLOW: Reg = R7;

/// Where the stack keeps the identification of a fragment.
const IDENTIFICATION: i16 = -44;

/// The program for an uplink and the TUN. `tunnel_port` is the tunnel's own on this host.
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
    keep_packet(a);
    pass_if_tagged(a, pass);
    zero_key(a);
    a.mov(FRAGMENT, UNFRAGMENTED);
    branch_by_family(a, v6, pass);

    a.load_packet(Size::B, l2_header + ipv4::PROTOCOL);
    a.mov(PROTOCOL, R0);
    a.jump_if(PROTOCOL, If::Eq, i32::from(TCP), pass);
    a.jump_if(PROTOCOL, If::Eq, i32::from(icmpv4::PROTOCOL), pass);
    store_family(a, 4);
    load_ipv4_header_end(a, l2_header, pass);
    a.load_packet(Size::H, l2_header + ipv4::IDENTIFICATION);
    a.store(Size::W, R10, IDENTIFICATION, R0);
    a.load_packet(Size::H, l2_header + ipv4::FLAGS_AND_OFFSET);
    let (fragmented, more) = (a.label(), a.label());
    a.jump_if(R0, If::Set, ipv4::FRAGMENTED, fragmented);
    a.jump(transport);
    a.bind(fragmented);
    a.mov(FRAGMENT, LAST_FRAGMENT);
    a.jump_if(R0, If::Set, ipv4::MORE_FRAGMENTS, more);
    a.jump(build_v4);
    a.bind(more);
    a.mov(FRAGMENT, MIDDLE_FRAGMENT);
    a.jump_if(R0, If::Set, ipv4::OFFSET_MASK, build_v4);
    a.mov(FRAGMENT, FIRST_FRAGMENT);
    a.jump(transport);

    a.bind(v6);
    let (fragmented, known) = (a.label(), a.label());
    walk_extension_headers(a, l2_header, fragmented);
    a.jump(known);
    a.bind(fragmented);
    a.load_packet_at(Size::B, TRANSPORT, fragment::NEXT_HEADER);
    a.mov(PROTOCOL, R0);
    a.load_packet_at(Size::W, TRANSPORT, fragment::IDENTIFICATION);
    a.store(Size::W, R10, IDENTIFICATION, R0);
    a.load_packet_at(Size::H, TRANSPORT, fragment::OFFSET_AND_M);
    a.alu(Alu::Add, TRANSPORT, fragment::LEN);
    a.mov(FRAGMENT, FIRST_FRAGMENT);
    a.jump_if(R0, If::Lt, fragment::SECOND, known);
    a.mov(FRAGMENT, MIDDLE_FRAGMENT);
    a.jump_if(R0, If::Set, fragment::MORE, known);
    a.mov(FRAGMENT, LAST_FRAGMENT);
    a.bind(known);
    a.jump_if(PROTOCOL, If::Eq, i32::from(TCP), pass);
    a.jump_if(PROTOCOL, If::Eq, i32::from(icmpv6::PROTOCOL), pass);
    store_family(a, 6);
    a.jump_if(FRAGMENT, If::Ge, MIDDLE_FRAGMENT, build_v6);

    a.bind(transport);
    let build = a.label();
    a.jump_if(PROTOCOL, If::Ne, i32::from(UDP), build);
    a.load_packet_at(Size::W, TRANSPORT, ports::SOURCE);
    a.mov(R1, R0);
    a.alu(Alu::Rsh, R1, 16);
    a.jump_if(R1, If::Eq, i32::from(tunnel_port), pass);
    a.alu(Alu::Lsh, R0, 16);
    a.alu(Alu::Or, R0, R1);
    a.store(Size::W, R10, KEY_PORTS, R0);
    a.bind(build);
    jump_if_v6(a, build_v6);
    a.bind(build_v4);
    store_address(a, l2_header + ipv4::SOURCE, KEY_LOCAL, 4, pass);
    store_address(a, l2_header + ipv4::DESTINATION, KEY_REMOTE, 4, pass);
    let look = a.label();
    a.jump(look);
    a.bind(build_v6);
    store_address(a, l2_header + ipv6::SOURCE, KEY_LOCAL, 16, pass);
    store_address(a, l2_header + ipv6::DESTINATION, KEY_REMOTE, 16, pass);
    a.bind(look);
    a.jump_if(FRAGMENT, If::Ge, MIDDLE_FRAGMENT, later);

    // A packet with ports: is its flow known?
    let (hit, miss, redirect) = (a.label(), a.label(), a.label());
    look_up(a, &maps.flows);
    a.jump_if_wide(R0, If::Eq, 0, miss);
    a.mov(FLOW, R0);
    a.call(Helper::KtimeGetNs);
    a.load(Size::Dw, R1, FLOW, 0);
    a.mov(R2, R0);
    a.alu(Alu::Sub, R2, R1);
    a.mov_wide(R3, REPLY_IDLE.as_nanos() as u64);
    a.jump_if_wide(R2, If::Le, R3, hit);
    a.jump(miss);
    a.bind(hit);
    a.store(Size::Dw, FLOW, 0, R0);
    a.jump_if(FRAGMENT, If::Eq, UNFRAGMENTED, redirect);
    key_by_identification(a);
    a.store(Size::Dw, R10, VALUE, 0);
    enter(a, &maps.fragments);
    a.bind(redirect);
    redirect_to(a, tun_ifindex);
    // A first fragment of another flow ends the entry for its identification.
    a.bind(miss);
    a.jump_if(FRAGMENT, If::Eq, UNFRAGMENTED, pass);
    key_by_identification(a);
    remove(a, &maps.fragments);
    a.jump(pass);

    // A fragment without ports goes where the first one went.
    a.bind(later);
    let more = a.label();
    key_by_identification(a);
    look_up(a, &maps.fragments);
    a.jump_if_wide(R0, If::Eq, 0, pass);
    a.jump_if(FRAGMENT, If::Eq, MIDDLE_FRAGMENT, more);
    remove(a, &maps.fragments);
    a.bind(more);
    redirect_to(a, tun_ifindex);

    a.bind(pass);
    verdict(a, TC_ACT_UNSPEC);
    asm.finish("ipmoved_reply")
}

fn key_by_identification(a: &mut Assembler) {
    a.load(Size::W, R0, R10, IDENTIFICATION);
    a.store(Size::W, R10, KEY_PORTS, R0);
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, OwnedFd};

    use super::*;
    use crate::kernel::bpf::test_run::run;
    use crate::kernel::programs::steer_ingress::steer_ingress_behind;
    use crate::kernel::programs::testing::{L2, Packet, frame, ports, taken};
    use crate::packet::MAX_EXTENSION_HEADERS;

    const MARK: u32 = 0x6970_6d76;

    /// Runs the marking program on a request, and tells whether its reply would be steered.
    struct Steering {
        mark: OwnedFd,
        egress: OwnedFd,
    }

    impl Steering {
        fn new() -> Self {
            let maps = FlowMaps::new(1000).expect("run the tests as root");
            Self {
                mark: steer_ingress_behind(L2, MARK, &maps, None)
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
            let icmp = if client.contains(':') {
                icmpv6::PROTOCOL
            } else {
                icmpv4::PROTOCOL
            };
            for protocol in [TCP, icmp] {
                steering.arrives(&Packet::new(client, here, protocol, ports(1, 80)));
                assert!(!steering.is_steered(&Packet::new(here, client, protocol, ports(80, 1))));
            }
            steering.arrives(&Packet::new(client, here, 47, ports(1, 2)));
            assert!(steering.is_steered(&Packet::new(here, client, 47, ports(3, 4))));
        }
    }

    #[test]
    fn replies_are_steered_whatever_headers_the_request_had() {
        let steering = Steering::new();
        let (client, here) = ENDS[1];
        let request = Packet::new(client, here, UDP, ports(40_000, 53));
        steering.arrives(&request.behind_options(MAX_EXTENSION_HEADERS));
        assert!(steering.is_steered(&Packet::new(here, client, UDP, ports(53, 40_000))));
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
            // The last fragment ends the entry.
            assert!(!steering.is_steered(&fragment(noise(), 5, 3, true)));
            // So does a direct packet that uses the identification again.
            assert!(steering.is_steered(&fragment(ours(), 5, 0, true)));
            assert!(!steering.is_steered(&fragment(ports(99, 40_000), 5, 0, true)));
            assert!(!steering.is_steered(&fragment(noise(), 5, 3, true)));
        }
    }
}
