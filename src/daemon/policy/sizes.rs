//! How large packets may be: towards a peer, through the tunnel, and on the TUN.
//!
//! Owns the arithmetic alone. The tunnel finds out by probes what the path really carries.

use std::net::SocketAddr;

use crate::channel::wire::DATA_OVERHEAD;
use crate::packet::IPV6_MIN_MTU;

/// Smallest MTU an interface that carries IPv6 may have (RFC 8200 section 5).
const MIN_MTU: u32 = IPV6_MIN_MTU as u32;

/// Smallest IP packet that a path is taken to carry: the one that every IPv4 host takes (RFC 791).
const MIN_CARRIED: u32 = 576;

/// Largest IP packet that a path is taken to carry: the longest one of IPv4.
const MAX_CARRIED: u32 = 65_535;

/// What the kernel says about the route to a peer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::daemon) struct RouteSize {
    /// The route's own MTU, as an administrator set it.
    pub(in crate::daemon) route: Option<u32>,
    /// The MTU of the path that the kernel has learned from an ICMP error, which may be forged.
    pub(in crate::daemon) learned: Option<u32>,
    /// The MTU of the interface that the route leads out of.
    pub(in crate::daemon) link: Option<u32>,
}

/// Largest UDP payload that the route to `remote` is known to take: the limit of the tunnel's
/// probes.
pub(super) fn max_datagram(remote: SocketAddr, size: RouteSize) -> u16 {
    let mtu = size.route.filter(|&mtu| mtu > 0).or(size.link);
    payload(remote, mtu.unwrap_or(MIN_MTU))
}

/// Largest UDP payload that the path to `remote` takes if the ICMP error is true: a hint for the
/// tunnel's probes.
pub(super) fn hint(remote: SocketAddr, size: RouteSize) -> Option<u16> {
    size.learned.map(|mtu| payload(remote, mtu))
}

fn payload(remote: SocketAddr, mtu: u32) -> u16 {
    let headers = if remote.is_ipv4() { 20 + 8 } else { 40 + 8 };
    (mtu.clamp(MIN_CARRIED, MAX_CARRIED) - headers) as u16
}

/// Largest IP packet that fits one datagram, where a datagram takes `path_mtu` bytes of payload.
pub(in crate::daemon) fn tunnel_mtu(path_mtu: u16) -> usize {
    usize::from(path_mtu) - DATA_OVERHEAD
}

/// MTU of the new server's TUN: what its own uplink takes. What the link of one old server to its
/// clients takes concerns that server's flows alone ([`client_mtu`]).
pub(super) fn tun_mtu(uplink: u32) -> u32 {
    uplink.max(MIN_MTU)
}

/// MTU of an old server's link to its clients, as it says: the segments of their TCP connections
/// are made to fit it, and for all else the old server sends ICMP errors. It can say no less than
/// every link takes that carries IPv6.
pub(super) fn client_mtu(said: u16) -> usize {
    usize::from(said).max(IPV6_MIN_MTU)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_datagram_is_what_the_route_takes_less_its_headers() {
        for (remote, route, link, payload) in [
            ("192.0.2.1:51850", None, Some(1_500), 1_472),
            ("[2001:db8::1]:51850", None, Some(1_500), 1_452),
            // The MTU that an administrator gave the route counts more than that of the interface.
            ("192.0.2.1:51850", Some(1_400), Some(1_500), 1_372),
            ("192.0.2.1:51850", Some(0), Some(1_500), 1_472),
            ("192.0.2.1:51850", None, Some(9_000), 8_972),
            // Nothing is known, or the numbers are impossible.
            ("192.0.2.1:51850", None, None, 1_252),
            ("192.0.2.1:51850", Some(68), Some(1_500), 548),
            ("192.0.2.1:51850", None, Some(65_536), 65_507),
            ("[2001:db8::1]:51850", None, Some(65_536), 65_487),
        ] {
            let remote = remote.parse().unwrap();
            // Anybody can have an ICMP error say less.
            for learned in [None, Some(552)] {
                let size = RouteSize {
                    route,
                    learned,
                    link,
                };
                assert_eq!(max_datagram(remote, size), payload, "{remote} {size:?}");
            }
        }
    }

    #[test]
    fn what_an_icmp_error_said_is_a_hint() {
        for (remote, learned, payload) in [
            ("192.0.2.1:51850", None, None),
            ("192.0.2.1:51850", Some(1_400), Some(1_372)),
            ("[2001:db8::1]:51850", Some(1_280), Some(1_232)),
            ("192.0.2.1:51850", Some(552), Some(548)),
            ("192.0.2.1:51850", Some(0), Some(548)),
            ("192.0.2.1:51850", Some(u32::MAX), Some(65_507)),
        ] {
            let size = RouteSize {
                route: None,
                learned,
                link: Some(1_500),
            };
            assert_eq!(
                hint(remote.parse().unwrap(), size),
                payload,
                "{remote} {size:?}"
            );
        }
    }

    #[test]
    fn the_tun_takes_what_the_uplink_does() {
        for (uplink, mtu) in [(1_500, 1_500), (9_000, 9_000), (576, 1_280)] {
            assert_eq!(tun_mtu(uplink), mtu, "{uplink}");
        }
        for (said, mtu) in [(1_500, 1_500), (65_535, 65_535), (1_279, 1_280), (0, 1_280)] {
            assert_eq!(client_mtu(said), mtu, "{said}");
        }
    }
}
