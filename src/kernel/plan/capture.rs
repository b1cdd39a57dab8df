//! The kernel changes of the old server: packets to moved addresses go into the TUN, and packets
//! that the daemon writes to the TUN leave by the uplink.
//!
//! Owns the order of the two. The addresses stay configured where they are, so the host goes on
//! answering ARP and neighbour discovery. The filter on the uplink outlives the daemon and then
//! leads into nothing: moved addresses fall silent instead of replying with resets.

use std::net::SocketAddr;

use super::{PlanError, clsact, filter, l2_header};
use crate::kernel::Desired;
use crate::kernel::netlink::{Direction, Link, Netlink};
use crate::kernel::programs;
use crate::model::moved::Move;

/// The changes for the old server: capture on `uplink`, and the return path from `tun`.
///
/// `tunnel` are the tunnel's own ends on this host; the program never captures their datagrams. The
/// TUN must exist. This changes nothing yet, but it loads the programs into the kernel.
///
/// # Errors
/// If the kernel refuses a program, or the programs cannot work on an interface like `uplink`.
pub fn plan(
    netlink: &Netlink,
    moves: &[Move],
    uplink: &Link,
    tun: &Link,
    tunnel: &[SocketAddr],
) -> Result<Vec<Desired>, PlanError> {
    let l2 = l2_header(uplink)?;
    let back = programs::return_path(moves, l2, uplink.index)?;
    let capture = programs::capture(moves, l2, tun.index, tunnel)?;
    let on_tun = filter(netlink, tun, Direction::Ingress, back.name())?;
    let on_uplink = filter(netlink, uplink, Direction::Ingress, capture.name())?;
    Ok(vec![
        // The return path comes first: captured packets may get replies at once.
        Desired::with_tun(clsact(tun)),
        Desired::with_tun(on_tun).program(back.load()?),
        Desired::lasting(clsact(uplink)),
        Desired::lasting(on_uplink).program(capture.load()?),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::Host;
    use crate::kernel::testing::{
        Router, Scratch, Tun, bound, in_fresh_namespace, strict_rp_filter,
    };

    const HERE: [(&str, u8); 4] = [
        ("192.0.2.1", 24),
        ("192.0.2.5", 24),
        ("2001:db8:a::1", 64),
        ("2001:db8:a::5", 64),
    ];
    const GATEWAYS: [(&str, u8); 2] = [("192.0.2.254", 24), ("2001:db8:a::fe", 64)];
    /// Family by family: the moved address, and the router's address.
    const ENDS: [(&str, &str); 2] = [
        ("192.0.2.5", "192.0.2.254"),
        ("2001:db8:a::5", "2001:db8:a::fe"),
    ];

    fn end(addr: &str, port: u16) -> SocketAddr {
        SocketAddr::new(addr.parse().unwrap(), port)
    }

    /// The same packet on its way back. Exchanging its ends leaves every checksum right.
    fn turned(packet: &[u8]) -> Vec<u8> {
        let mut out = packet.to_vec();
        let (addrs, length, l4) = if packet[0] >> 4 == 4 {
            (12, 4, 20)
        } else {
            (8, 16, 40)
        };
        out[addrs..addrs + length].copy_from_slice(&packet[addrs + length..addrs + 2 * length]);
        out[addrs + length..addrs + 2 * length].copy_from_slice(&packet[addrs..addrs + length]);
        out[l4..l4 + 2].copy_from_slice(&packet[l4 + 2..l4 + 4]);
        out[l4 + 2..l4 + 4].copy_from_slice(&packet[l4..l4 + 2]);
        out
    }

    #[test]
    fn a_moved_address_is_captured_and_its_replies_leave_by_the_uplink() {
        in_fresh_namespace(|| {
            strict_rp_filter();
            let netlink = Netlink::new().unwrap();
            let router = Router::new(&netlink, &HERE, &GATEWAYS);
            let tun = Tun::new(&netlink, "tun0", false);
            strict_rp_filter();
            let moves: Vec<Move> = vec![
                "192.0.2.5:53".parse().unwrap(),
                "2001:db8:a::5".parse().unwrap(),
            ];
            let scratch = Scratch::new();
            let mut host = Host::open(&scratch.0).unwrap();
            let desired = plan(&netlink, &moves, &router.uplink, &tun.link, &[]).unwrap();
            host.reconcile(desired).unwrap();

            for (moved, gateway) in ENDS {
                let own = bound(end(moved, 53));
                let client = router.udp(&end(gateway, 4000).to_string());
                // The router finds the address by ARP or neighbour discovery, which A still
                // answers.
                client.send_to(b"question", end(moved, 53)).unwrap();
                let (_, packet) = tun.read(|p| p.ends_with(b"question")).expect("captured");
                assert!(
                    own.recv(&mut [0; 100]).is_err(),
                    "A's own stack must not see it"
                );
                tun.write(&turned(&packet));
                let mut buffer = [0; 100];
                let (length, from) = client.recv_from(&mut buffer).expect("the way back");
                assert_eq!(
                    (&buffer[..length], from),
                    (&b"question"[..], end(moved, 53))
                );
            }
            // The other ports of the first address are still A's.
            let own = bound(end("192.0.2.5", 54));
            let client = router.udp("192.0.2.254:4001");
            client.send_to(b"for A", end("192.0.2.5", 54)).unwrap();
            assert_eq!(own.recv(&mut [0; 100]).unwrap(), 5);

            // A kill: the capture leads into nothing, and nothing replies.
            drop((tun, host));
            let own = bound(end("192.0.2.5", 53));
            client.send_to(b"question", end("192.0.2.5", 53)).unwrap();
            assert!(own.recv(&mut [0; 100]).is_err());
            Host::cleanup(&scratch.0).unwrap();
            client.send_to(b"question", end("192.0.2.5", 53)).unwrap();
            assert_eq!(own.recv(&mut [0; 100]).unwrap(), 8);
        });
    }

    #[test]
    fn a_bounced_packet_goes_up_into_the_hosts_own_stack() {
        in_fresh_namespace(|| {
            strict_rp_filter();
            let netlink = Netlink::new().unwrap();
            let router = Router::new(&netlink, &HERE, &GATEWAYS);
            let tun = Tun::new(&netlink, "tun0", false);
            strict_rp_filter();
            let moves = ["192.0.2.5", "2001:db8:a::5"];
            let moves: Vec<Move> = moves.iter().map(|text| text.parse().unwrap()).collect();
            let scratch = Scratch::new();
            let mut host = Host::open(&scratch.0).unwrap();
            let desired = plan(&netlink, &moves, &router.uplink, &tun.link, &[]).unwrap();
            host.reconcile(desired).unwrap();
            for (moved, gateway) in ENDS {
                let own = bound(end(moved, 53));
                let client = router.udp(&end(gateway, 4000).to_string());
                client.send_to(b"question", end(moved, 53)).unwrap();
                let (_, packet) = tun.read(|p| p.ends_with(b"question")).expect("captured");
                tun.write(&packet);
                assert_eq!(own.recv(&mut [0; 100]).unwrap(), 8, "{moved}");
            }
            host.undo_all().unwrap();
        });
    }
}
