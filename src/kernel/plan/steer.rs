//! The kernel changes of the new server: replies to packets from the TUN go back into it, and
//! everything else takes its ordinary route.
//!
//! ```text
//! TUN ingress: mark
//!   ├─► TCP: tcp_fwmark_accept hands the mark to the accepted socket ─┐
//!   ├─► RST, ICMP replies: fwmark_reflect ────────────────────────────┴─► ip rule
//!   │                                                          ─► table: default dev TUN
//!   ├─► UDP and the rest: the map keeps the flow ─► uplink egress: redirect ─► TUN
//!   └─► "too big" about UDP and the rest: uplink ingress, so that its route learns the path MTU
//! ```
//!
//! Owns the mark, the table and their places. A rule that selects by mark touches only replies of
//! tunnelled flows, so a client may use the new server directly at the same time. When the daemon
//! dies, the TUN and its route vanish. The blackhole behind that route keeps replies from leaving
//! with the new server's own address, which would reset the client's connection.

use std::net::IpAddr;
use std::path::Path;

use super::{PlanError, clsact, default_routes, filter, l2_header};
use crate::kernel::Desired;
use crate::kernel::change::{Change, DefaultRoute, Interface, MarkRule, Sysctl, read_sysctl};
use crate::kernel::netlink::{Direction, Family, Link, Netlink, NetlinkError, Rule, TABLE_LOCAL};
use crate::kernel::programs::{self, Entrance, FlowMaps};

/// The mark of packets from the TUN: "ipmv". We compare it whole, so that it never meets the single
/// bits that others use.
pub const MARK: u32 = 0x6970_6d76;

/// The routing table of the mark; the same number.
pub const TABLE: u32 = MARK;

/// Preference of the rule, unless others force a lower one.
pub const RULE_PRIORITY: u32 = 100;

/// Metrics of the two default routes in the table: into the TUN, and behind it into nothing.
const TUN_METRIC: u32 = 1;
const BLACKHOLE_METRIC: u32 = 4_000_000;

/// Flows without TCP that the map keeps by default; 65,536 take some 10 MB of kernel memory.
pub const MAX_FLOWS: u32 = 65_536;

/// What outlives a new plan: the memory of the programs, and the numbers that they hold.
#[derive(Debug)]
pub struct Steering {
    maps: FlowMaps,
    tunnel_port: u16,
}

impl Steering {
    /// Makes the memory. `tunnel_port` is the tunnel's own UDP port on this host; `max_flows`
    /// bounds the flows without TCP.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn new(
        _netlink: &Netlink,
        _uplinks: &[Link],
        tunnel_port: u16,
        max_flows: u32,
    ) -> Result<Self, PlanError> {
        Ok(Self {
            maps: FlowMaps::new(max_flows)?,
            tunnel_port,
        })
    }

    /// The changes for the new server: marks on `tun`, the route back into it, and on every one of
    /// `uplinks` the redirection of replies without TCP. Call it again when the links are others.
    ///
    /// The TUN must be up. This changes nothing yet, but it loads the programs into the kernel.
    ///
    /// # Errors
    /// If the kernel refuses a program, or an interface or rule is in the way.
    pub fn plan(
        &self,
        netlink: &Netlink,
        uplinks: &[Link],
        tun: &Link,
    ) -> Result<Vec<Desired>, PlanError> {
        let mut desired = Vec::new();
        // The mark must lead somewhere before any packet bears it: rules and routes first, the marking
        // program last.
        for family in [Family::V4, Family::V6] {
            if family == Family::V6 && !has_ipv6(tun) {
                continue;
            }
            let default = |dev, metric| {
                Change::Route(DefaultRoute {
                    family,
                    table: TABLE,
                    dev,
                    metric,
                })
            };
            desired.push(Desired::lasting(default(None, BLACKHOLE_METRIC)));
            desired.push(Desired::with_tun(default(
                Some(Interface::from(tun)),
                TUN_METRIC,
            )));
            desired.push(Desired::lasting(Change::Rule(MarkRule {
                family,
                mark: MARK,
                table: TABLE,
                priority: rule_priority(family, &netlink.rules(family)?)?,
            })));
            let reflect = match family {
                Family::V4 => "net/ipv4/fwmark_reflect",
                Family::V6 => "net/ipv6/fwmark_reflect",
            };
            desired.push(Desired::lasting(sysctl(reflect.to_owned())));
        }
        desired.push(Desired::lasting(sysctl(
            "net/ipv4/tcp_fwmark_accept".to_owned(),
        )));
        // Strict rp_filter then looks the source up with the mark, that is, in our table.
        let valid_mark = format!("net/ipv4/conf/{}/src_valid_mark", tun.name);
        desired.push(Desired::with_tun(sysctl(valid_mark)));

        let Self { maps, tunnel_port } = self;
        for uplink in uplinks {
            let reply = programs::steer_egress(maps, l2_header(uplink)?, tun.index, *tunnel_port)?;
            let place = filter(netlink, uplink, Direction::Egress, reply.name())?;
            desired.push(Desired::lasting(clsact(uplink)));
            desired.push(Desired::lasting(place).program(reply.load()?));
        }
        let entrance = uplinks.first().map(|uplink| {
            l2_header(uplink).map(|l2_header| Entrance {
                ifindex: uplink.index,
                l2_header,
                mac: uplink.mac.unwrap_or_default(),
            })
        });
        let mark = programs::steer_ingress(MARK, maps, entrance.transpose()?)?;
        let place = filter(netlink, tun, Direction::Ingress, mark.name())?;
        desired.push(Desired::with_tun(clsact(tun)));
        desired.push(Desired::with_tun(place).program(mark.load()?));
        Ok(desired)
    }
}

/// The interfaces on which replies may leave: those of the default routes, the one towards the
/// peer, and every other one with an address, since any of these may have a route to some clients.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn uplinks(netlink: &Netlink, peer: Option<IpAddr>) -> Result<Vec<Link>, NetlinkError> {
    let held: Vec<u32> = netlink
        .addresses()?
        .into_iter()
        .filter(|held| !is_link_local(held.addr))
        .map(|held| held.index)
        .collect();
    let mut indices = default_routes(netlink, Family::V4)?;
    indices.extend(default_routes(netlink, Family::V6)?);
    if let Some(peer) = peer
        && let Ok(answer) = netlink.route_get(peer, None, None)
    {
        indices.extend(answer.oif);
    }
    let links = netlink.links()?;
    Ok(links
        .into_iter()
        .filter(|link| {
            // An interface that the programs cannot use matters only if we need it.
            let other = held.contains(&link.index) && l2_header(link).is_ok();
            !link.loopback && (indices.contains(&link.index) || other)
        })
        .collect())
}

/// Every interface that is up has such an IPv6 address, and reaches no client from it.
fn is_link_local(addr: IpAddr) -> bool {
    match addr {
        IpAddr::V4(addr) => addr.is_link_local(),
        IpAddr::V6(addr) => addr.is_unicast_link_local(),
    }
}

/// Whether the kernel routes IPv6 into the TUN.
fn has_ipv6(tun: &Link) -> bool {
    read_sysctl(&format!("net/ipv6/conf/{}/disable_ipv6", tun.name)).is_ok_and(|value| value == "0")
}

/// Switches a setting on. If we cannot read it we write it anyway, and the kernel says why not.
fn sysctl(path: String) -> Change {
    debug_assert!(Path::new(&path).is_relative(), "below /proc/sys");
    Change::Sysctl(Sysctl {
        from: read_sysctl(&path).unwrap_or_default(),
        to: "1".to_owned(),
        path,
        on: None,
    })
}

/// A preference behind the rule for local addresses (or marked packets would not reach this host)
/// and before every other rule.
fn rule_priority(family: Family, rules: &[Rule]) -> Result<u32, PlanError> {
    let local = rules
        .iter()
        .filter(|rule| rule.table == Some(TABLE_LOCAL) && !rule.selects_more)
        .map(|rule| rule.priority)
        .min()
        .unwrap_or(0);
    let own = |rule: &&Rule| rule.mark == Some((MARK, u32::MAX)) && rule.table == Some(TABLE);
    let next = rules
        .iter()
        .filter(|rule| !own(rule) && rule.priority > local)
        .map(|rule| rule.priority)
        .min();
    let next = next.unwrap_or(u32::MAX);
    // A rule that an earlier daemon left stays where it is, if that place will do.
    let left = rules.iter().find(own).map(|rule| rule.priority);
    if let Some(left) = left
        && local < left
        && left < next
    {
        return Ok(left);
    }
    let wanted = RULE_PRIORITY.max(local.saturating_add(1)).min(next - 1);
    if wanted > local {
        Ok(wanted)
    } else {
        Err(PlanError::NoRulePriority(family, next))
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::net::{SocketAddr, TcpListener};
    use std::os::fd::AsRawFd;

    use etherparse::{Icmpv4Type, Icmpv6Type, PacketBuilder, PacketBuilderStep, SlicedPacket};
    use etherparse::{IpNumber, TransportSlice};

    use super::*;
    use crate::kernel::Host;
    use crate::kernel::testing::{
        Router, Scratch, Tun, bound, in_fresh_namespace, strict_rp_filter, uplink,
    };

    const HERE: [(&str, u8); 2] = [("198.51.100.2", 24), ("2001:db8:b::2", 64)];
    const GATEWAYS: [(&str, u8); 2] = [("198.51.100.1", 24), ("2001:db8:b::1", 64)];
    const CLIENTS: [&str; 2] = ["203.0.113.7", "2001:db8:c::7"];

    /// The new server, steering, under strict reverse path filtering.
    struct NewServer {
        tun: Tun,
        router: Router,
        host: Host,
        _scratch: Scratch,
    }

    impl NewServer {
        fn new(offload: bool) -> Self {
            strict_rp_filter();
            let netlink = Netlink::new().unwrap();
            let router = Router::new(&netlink, &HERE, &GATEWAYS);
            let tun = Tun::new(&netlink, "tun0", offload);
            strict_rp_filter();
            let scratch = Scratch::new();
            let mut host = Host::open(&scratch.0).unwrap();
            let uplinks = uplinks(&netlink, None).unwrap();
            assert_eq!(uplinks, std::slice::from_ref(&router.uplink));
            let steering = Steering::new(&netlink, &uplinks, 51820, 1000).unwrap();
            let desired = steering.plan(&netlink, &uplinks, &tun.link).unwrap();
            host.reconcile(desired).unwrap();
            Self {
                tun,
                router,
                host,
                _scratch: scratch,
            }
        }
    }

    fn ip(src: &str, dst: &str) -> PacketBuilderStep<etherparse::IpHeaders> {
        use etherparse::{IpHeaders, Ipv4Header, Ipv6FlowLabel, Ipv6Header};
        let header = match (src.parse().unwrap(), dst.parse().unwrap()) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let mut header = Ipv4Header::new(0, 60, IpNumber::UDP, src.octets(), dst.octets());
                header.as_mut().unwrap().dont_fragment = true;
                IpHeaders::Ipv4(header.unwrap(), etherparse::Ipv4Extensions::default())
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let header = Ipv6Header {
                    traffic_class: 0,
                    flow_label: Ipv6FlowLabel::ZERO,
                    payload_length: 0,
                    next_header: IpNumber::UDP,
                    hop_limit: 60,
                    source: src.octets(),
                    destination: dst.octets(),
                };
                IpHeaders::Ipv6(header, etherparse::Ipv6Extensions::default())
            }
            _ => panic!("mixed families"),
        };
        PacketBuilder::ip(header)
    }

    fn udp(src: &str, src_port: u16, dst: &str, dst_port: u16, payload: &[u8]) -> Vec<u8> {
        let mut packet = Vec::new();
        let builder = ip(src, dst).udp(src_port, dst_port);
        builder.write(&mut packet, payload).unwrap();
        packet
    }

    /// Whether a packet goes to `client`; for a UDP packet also its payload.
    fn goes_to(packet: &[u8], client: &str) -> bool {
        let dst: IpAddr = match packet[0] >> 4 {
            4 => <[u8; 4]>::try_from(&packet[16..20]).unwrap().into(),
            _ => <[u8; 16]>::try_from(&packet[24..40]).unwrap().into(),
        };
        dst == client.parse::<IpAddr>().unwrap()
    }

    fn socket_addr(addr: &str, port: u16) -> SocketAddr {
        SocketAddr::new(addr.parse().unwrap(), port)
    }

    #[test]
    fn udp_replies_go_back_into_the_tun_and_direct_ones_do_not() {
        in_fresh_namespace(|| {
            let b = NewServer::new(false);
            for ((here, _), (gateway, client)) in HERE
                .into_iter()
                .zip(GATEWAYS.map(|g| g.0).into_iter().zip(CLIENTS))
            {
                let server = bound(socket_addr(here, 53));
                b.tun.write(&udp(client, 4000, here, 53, b"question"));
                let mut buffer = [0; 100];
                let (length, from) = server.recv_from(&mut buffer).expect("the stack takes it");
                assert_eq!(
                    (&buffer[..length], from),
                    (&b"question"[..], socket_addr(client, 4000))
                );
                b.router.has_seen(b"forget what came");

                server.send_to(b"an unconnected answer", from).unwrap();
                let (_, packet) = b.tun.read(|p| goes_to(p, client)).expect("steered");
                let sliced = SlicedPacket::from_ip(&packet).unwrap();
                let Some(TransportSlice::Udp(reply)) = sliced.transport else {
                    panic!("{packet:02x?}")
                };
                assert_eq!((reply.source_port(), reply.destination_port()), (53, 4000));
                assert_eq!(reply.payload(), b"an unconnected answer");

                let connected = server.try_clone().unwrap();
                connected.connect(from).unwrap();
                connected.send(b"a connected answer").unwrap();
                assert!(b.tun.read(|p| goes_to(p, client)).is_some());
                assert!(!b.router.has_seen(b"nected answer"));
                drop((connected, server));

                // A client that comes directly, and a port from which nobody has sent a request.
                let server = bound(socket_addr(here, 53));
                let direct = b.router.udp(&socket_addr(gateway, 4001).to_string());
                direct
                    .send_to(b"direct question", socket_addr(here, 53))
                    .unwrap();
                let (_, from) = server.recv_from(&mut buffer).unwrap();
                server.send_to(b"direct answer", from).unwrap();
                assert_eq!(direct.recv(&mut buffer).unwrap(), 13);
                server
                    .send_to(b"an unasked one", socket_addr(client, 4002))
                    .unwrap();
                assert!(b.tun.read(|p| goes_to(p, client)).is_none());
                assert!(b.router.has_seen(b"an unasked one"));
            }
        });
    }

    #[test]
    fn every_interface_that_may_lead_to_clients_is_an_uplink() {
        in_fresh_namespace(|| {
            let netlink = Netlink::new().unwrap();
            let router = Router::new(&netlink, &HERE, &GATEWAYS);
            let tun = Tun::new(&netlink, "tun0", false);
            let second = uplink(&netlink, "second", &[("10.1.0.2", 24)]);
            let _bare = uplink(&netlink, "bare", &[]);
            netlink.set_link_up(tun.link.index).unwrap();
            let names = |links: Vec<Link>| links.into_iter().map(|link| link.name).collect();
            let found: Vec<String> = names(uplinks(&netlink, None).unwrap());
            assert_eq!(found, [router.uplink.name.clone(), second.name]);
        });
    }

    #[test]
    fn replies_of_sixty_thousand_bytes_are_steered_fragment_by_fragment() {
        in_fresh_namespace(|| {
            let b = NewServer::new(false);
            for ((here, _), client) in HERE.into_iter().zip(CLIENTS) {
                let server = bound(socket_addr(here, 53));
                b.tun.write(&udp(client, 4000, here, 53, b"question"));
                let (_, from) = server.recv_from(&mut [0; 100]).unwrap();
                let answer = vec![0xa5; 60_000];
                server.send_to(&answer, from).unwrap();
                let mut seen = 0;
                while let Some((_, packet)) = b.tun.read(|p| goes_to(p, client)) {
                    seen += packet.iter().filter(|&&byte| byte == 0xa5).count();
                    if seen >= answer.len() {
                        break;
                    }
                }
                assert!(seen >= answer.len(), "{seen} bytes");
                assert!(!b.router.has_seen(&[0xa5; 100]));
            }
        });
    }

    #[test]
    #[allow(unsafe_code, reason = "setsockopt(UDP_SEGMENT)")]
    fn a_super_packet_of_the_application_arrives_whole() {
        in_fresh_namespace(|| {
            let segment: libc::c_int = 1200;
            let b = NewServer::new(true);
            for ((here, _), client) in HERE.into_iter().zip(CLIENTS) {
                let server = bound(socket_addr(here, 53));
                b.tun.write(&udp(client, 4000, here, 53, b"question"));
                let (_, from) = server.recv_from(&mut [0; 100]).unwrap();
                // SAFETY: the option's value is an int, and the kernel reads no more.
                let result = unsafe {
                    libc::setsockopt(
                        server.as_raw_fd(),
                        libc::SOL_UDP,
                        libc::UDP_SEGMENT,
                        (&raw const segment).cast(),
                        size_of::<libc::c_int>() as libc::socklen_t,
                    )
                };
                assert_eq!(result, 0);
                server.send_to(&[0x5a; 12_000], from).unwrap();
                let (header, packet) = b.tun.read(|p| goes_to(p, client)).expect("steered");
                let headers = if here.contains(':') { 48 } else { 28 };
                const NEEDS_CSUM: u8 = 1;
                const GSO_UDP_L4: u8 = 5;
                assert_eq!(packet.len(), headers + 12_000);
                assert_eq!((header[0], header[1]), (NEEDS_CSUM, GSO_UDP_L4));
                assert_eq!(u16::from_le_bytes([header[4], header[5]]), 1200);
                assert!(!b.router.has_seen(&[0x5a; 100]));
            }
        });
    }

    #[test]
    fn tcp_and_icmp_replies_go_by_their_mark() {
        in_fresh_namespace(|| {
            let b = NewServer::new(false);
            for ((here, _), client) in HERE.into_iter().zip(CLIENTS) {
                let _listener = TcpListener::bind(socket_addr(here, 80)).unwrap();
                for (port, flag) in [(80, "SYN-ACK"), (81, "RST")] {
                    let mut syn = Vec::new();
                    let builder = ip(client, here).tcp(4000, port, 1000, 64_000).syn();
                    builder.write(&mut syn, &[]).unwrap();
                    b.tun.write(&syn);
                    let (_, packet) = b.tun.read(|p| goes_to(p, client)).expect(flag);
                    let sliced = SlicedPacket::from_ip(&packet).unwrap();
                    let Some(TransportSlice::Tcp(tcp)) = sliced.transport else {
                        panic!("{packet:02x?}")
                    };
                    assert_eq!((tcp.syn(), tcp.rst()), (port == 80, port == 81));
                }
                // A closed UDP port.
                b.tun.write(&udp(client, 4000, here, 9, b"anybody?"));
                let (_, packet) = b
                    .tun
                    .read(|p| goes_to(p, client))
                    .expect("port unreachable");
                let sliced = SlicedPacket::from_ip(&packet).unwrap();
                match sliced.transport {
                    Some(TransportSlice::Icmpv4(icmp)) => {
                        assert!(matches!(
                            icmp.icmp_type(),
                            Icmpv4Type::DestinationUnreachable(_)
                        ));
                    }
                    Some(TransportSlice::Icmpv6(icmp)) => {
                        assert!(matches!(
                            icmp.icmp_type(),
                            Icmpv6Type::DestinationUnreachable(_)
                        ));
                    }
                    other => panic!("{other:?}"),
                }
                // Ping.
                let mut ping = Vec::new();
                if here.contains(':') {
                    let builder = ip(client, here).icmpv6_echo_request(7, 1);
                    builder.write(&mut ping, b"ping").unwrap();
                } else {
                    let builder = ip(client, here).icmpv4_echo_request(7, 1);
                    builder.write(&mut ping, b"ping").unwrap();
                }
                b.tun.write(&ping);
                assert!(
                    b.tun
                        .read(|p| goes_to(p, client) && p.ends_with(b"ping"))
                        .is_some()
                );
            }
        });
    }

    #[test]
    fn after_a_crash_replies_fall_silent() {
        in_fresh_namespace(|| {
            let b = NewServer::new(false);
            let (here, client) = (HERE[0].0, CLIENTS[0]);
            let server = bound(socket_addr(here, 53));
            b.tun.write(&udp(client, 4000, here, 53, b"question"));
            let (_, from) = server.recv_from(&mut [0; 100]).unwrap();
            // A kill: TUN and lock go, everything else stays.
            drop((b.tun, b.host));
            let _ = server.send_to(b"a late answer", from);
            assert!(!b.router.has_seen(b"a late answer"));
            let netlink = Netlink::new().unwrap();
            let refused = netlink.route_get(client.parse().unwrap(), Some(MARK), None);
            assert_eq!(
                refused.unwrap_err().errno().map(|errno| errno.kind()),
                Some(ErrorKind::InvalidInput)
            );
        });
    }

    fn rule(priority: u32, table: u32) -> Rule {
        Rule {
            family: Family::V4,
            priority,
            mark: None,
            table: Some(table),
            selects_more: false,
        }
    }

    #[test]
    fn the_rule_stands_behind_local_and_before_all_others() {
        let priority = |rules: &[Rule]| rule_priority(Family::V4, rules).ok();
        let (local, main) = (rule(0, 255), rule(32766, 254));
        assert_eq!(priority(&[local.clone(), main.clone()]), Some(100));
        assert_eq!(
            priority(&[local.clone(), rule(50, 7), main.clone()]),
            Some(49)
        );
        assert_eq!(priority(&[local.clone(), rule(1, 7), main.clone()]), None);
        assert_eq!(
            priority(&[rule(5, 9), rule(200, 255), main.clone()]),
            Some(201)
        );
        let left = Rule {
            mark: Some((MARK, u32::MAX)),
            ..rule(60, TABLE)
        };
        assert_eq!(
            priority(&[local.clone(), left.clone(), main.clone()]),
            Some(60)
        );
        assert_eq!(priority(&[local, rule(50, 7), left, main]), Some(49));
    }
}
