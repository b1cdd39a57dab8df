//! Links, addresses, routes and filters come and go, and both daemons go along.
//!
//! ```text
//!                          ┌─ eth1 ─┐
//!  client ───────── router ┤        ├── old server, 192.0.2.5 on eth0, on a bridge
//!                          ├─ eth0 ─┘              ║
//!                          ├─ eth0 ─┐              ║
//!                          │        ├── new server
//!                          └─ eth1 ─┘
//! ```

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use ipmoved::internals::{Direction, Netlink, Role, Route};
use ipmoved::lab::raw::{Wire, packets};
use ipmoved::lab::topology::{CLIENT, Leg, MOVED, MOVED6, NEW, NEW6, OLD, OLD6, UPLINK};
use ipmoved::lab::{Lab, LabError, Namespace, Probe, Service, UdpService, patience, poll_until};

use crate::stage::{MEGABYTE, Moved, PATIENCE, Result, moved, setup};

/// Long before the daemon would look by itself, and long enough for a busy machine.
const AT_ONCE: Duration = Duration::from_secs(2);

/// A port of the UDP service.
const DNS: u16 = 53;

/// These addresses are served, over TCP and UDP, in both directions.
pub(crate) fn all_is_served(lab: &Lab, addrs: &[IpAddr]) -> Result {
    for &addr in addrs {
        let server = if addr.is_ipv4() {
            NEW.into()
        } else {
            IpAddr::from(NEW6)
        };
        // A datagram of the moment in which an interface comes may be lost.
        let patience = Duration::from_millis(200);
        let answered = poll_until(PATIENCE, Duration::from_millis(50), || {
            let probe = lab.client().probe_udp((addr, DNS), patience).ok()?;
            (probe == Probe::Open).then_some(())
        });
        answered.ok_or_else(|| LabError::unexpected(format!("UDP to {addr} is not answered")))?;
        lab.client().get(addr)?.is_answered_by(server)?;
        lab.client().download(addr, MEGABYTE)?;
        lab.client().upload(addr, MEGABYTE)?;
    }
    Ok(())
}

/// The services of both families on the new server, but that of TCP over IPv4.
pub(crate) fn services(lab: &Lab) -> Result<(Service, [UdpService; 2])> {
    let udp = |addr: IpAddr| UdpService::start(lab.new_server(), SocketAddr::new(addr, DNS));
    Ok((
        Service::start(lab.new_server(), NEW6)?,
        [udp(NEW.into())?, udp(NEW6.into())?],
    ))
}

/// Both families have moved, and both daemons are up.
pub(crate) fn both_families(
    test: impl FnOnce(&Lab) -> Result,
    prepare: impl FnOnce(&Lab) -> Result,
) -> Result {
    let lab = Lab::builder().without_rp_filter().build()?;
    prepare(&lab)?;
    let setup = setup(&lab)?.moves(&["192.0.2.5", "2001:db8:a::5"]);
    let _v4 = Service::start(lab.new_server(), NEW)?;
    let _others = services(&lab)?;
    let _daemons = setup.start_both()?;
    test(&lab)
}

#[test]
fn an_uplink_of_the_new_server_that_is_made_anew_serves_again() -> Result {
    remade(Leg::New)
}

#[test]
fn an_uplink_of_the_old_server_that_is_made_anew_is_captured_again() -> Result {
    remade(Leg::Old)
}

fn remade(leg: Leg) -> Result {
    let addrs = [MOVED.into(), MOVED6.into()];
    both_families(
        |lab| {
            all_is_served(lab, &addrs)?;
            lab.remake(leg, Duration::from_millis(300))?;
            all_is_served(lab, &addrs)
        },
        |_| Ok(()),
    )
}

#[test]
fn a_named_uplink_that_is_gone_is_waited_for() -> Result {
    for (role, leg) in [(Role::Old, Leg::Old), (Role::New, Leg::New)] {
        let lab = Lab::new()?;
        let setup = setup(&lab)?.args(role, &["--uplink", UPLINK]);
        let _application = Service::start(lab.new_server(), NEW)?;
        let _udp = UdpService::start(lab.new_server(), (NEW, DNS))?;
        let mut daemons = setup.start_both()?;
        all_is_served(&lab, &[MOVED.into()])?;
        // Longer than the looks by the clock are apart, whatever else this machine does meanwhile.
        lab.remake(leg, Duration::from_secs(6))?;
        let said = daemons_warnings(&setup.status(role)?.0);
        assert!(said.contains("waiting for it to come back"), "{said}");
        daemons.wait_until_up()?;
        all_is_served(&lab, &[MOVED.into()])?;
    }
    Ok(())
}

fn daemons_warnings(status: &serde_json::Value) -> String {
    status["warnings"].to_string()
}

#[test]
fn replies_that_leave_by_an_uplink_that_came_later_go_through_the_tunnel() -> Result {
    both_families(
        |lab| {
            all_is_served(lab, &[MOVED.into()])?;
            let new = lab.new_server();
            let (here, gateway) = (
                Ipv4Addr::new(198, 51, 101, 2),
                Ipv4Addr::new(198, 51, 101, 254),
            );
            lab.add_leg(new, "eth1", &[(here.into(), 24)], &[(gateway.into(), 24)])?;
            new.run(|| {
                let netlink = Netlink::new().map_err(failed)?;
                let before = Route {
                    via: Some("198.51.100.254".parse().map_err(failed)?),
                    ..Route::to(Ipv4Addr::UNSPECIFIED.into(), 0)
                };
                netlink.delete_route(&before).map_err(failed)?;
                let now = Route {
                    via: Some(gateway.into()),
                    ..before
                };
                netlink.add_route(&now).map_err(failed)
            })?;
            all_is_served(lab, &[MOVED.into()])
        },
        |_| Ok(()),
    )
}

/// Without a default route everything leads into the TUN, the tunnel's own datagrams included.
#[test]
fn the_tunnel_does_not_go_through_itself_where_nothing_leads_to_its_peer() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let _udp = UdpService::start(lab.new_server(), (NEW, DNS))?;
    let daemons = setup.start_both()?;
    all_udp_is_served(&lab)?;
    let default = Route {
        via: Some("198.51.100.254".parse().map_err(failed)?),
        ..Route::to(Ipv4Addr::UNSPECIFIED.into(), 0)
    };
    let change = |there: bool| {
        lab.new_server().run(|| {
            let netlink = Netlink::new().map_err(failed)?;
            let done = match there {
                true => netlink.add_route(&default),
                false => netlink.delete_route(&default),
            };
            done.map_err(failed)
        })
    };
    change(false)?;
    let asks = lab.client().udp_socket((MOVED, DNS))?;
    let turned_away = poll_until(patience(PATIENCE), Duration::from_millis(100), || {
        asks.send(b"nobody hears the answer").ok()?;
        let status = daemons.new.status().ok()?;
        (status.all_drops().get("no_flow") > Some(&0)).then_some(status)
    });
    let status = turned_away.ok_or_else(|| LabError::unexpected("they do not come back"))?;
    let sent = status.tunnel()["tx"]["packets"].as_u64();
    change(true)?;
    all_udp_is_served(&lab)?;
    let asked = status.tunnel()["rx"]["packets"].as_u64();
    assert!(sent <= asked, "{status:?}");
    Ok(())
}

fn all_udp_is_served(lab: &Lab) -> Result {
    let answered = poll_until(PATIENCE, Duration::ZERO, || {
        let probe = lab
            .client()
            .probe_udp((MOVED, DNS), Duration::from_millis(500));
        (probe.ok()? == Probe::Open).then_some(())
    });
    answered.ok_or_else(|| LabError::unexpected("UDP is not answered"))
}

#[test]
fn a_filter_that_somebody_removes_is_back_at_once() -> Result {
    moved(|on| {
        for host in [on.lab.old_server(), on.lab.new_server()] {
            let before = filters(host)?;
            assert!(before > 0, "the daemon has filters there");
            let removed = Instant::now();
            host.run(|| {
                let netlink = Netlink::new().map_err(failed)?;
                let link = netlink.link_by_name(UPLINK).map_err(failed)?;
                let index = link.ok_or_else(|| LabError::unexpected("no uplink"))?.index;
                netlink.delete_clsact(index).map_err(failed)
            })?;
            let back = poll_until(AT_ONCE, Duration::from_millis(2), || {
                (filters(host).ok()? == before).then(|| removed.elapsed())
            });
            let Some(took) = back else {
                return Err(LabError::unexpected(format!("not back in {AT_ONCE:?}")));
            };
            println!("the filters on the {} were back in {took:?}", host.name());
        }
        on.lab.client().get(MOVED)?.is_answered_by(NEW)?;
        Ok(())
    })
}

/// How many filters the uplink of a host has.
fn filters(host: &Namespace) -> Result<usize> {
    host.run(|| {
        let netlink = Netlink::new().map_err(failed)?;
        let link = netlink.link_by_name(UPLINK).map_err(failed)?;
        let index = link.ok_or_else(|| LabError::unexpected("no uplink"))?.index;
        let mut count = 0;
        for direction in [Direction::Ingress, Direction::Egress] {
            count += netlink.filters(index, direction).map_err(failed)?.len();
        }
        Ok(count)
    })
}

#[test]
fn a_moved_address_on_an_interface_that_receives_nothing_is_served() -> Result {
    let addrs = [IpAddr::from(MOVED), MOVED6.into()];
    let via = [IpAddr::from(OLD), OLD6.into()];
    both_families(
        |lab| all_is_served(lab, &addrs),
        |lab| {
            let old = lab.old_server();
            for (number, addr) in addrs.into_iter().enumerate() {
                let prefix = if addr.is_ipv4() { 24 } else { 64 };
                lab.set_address(old, UPLINK, addr, prefix, false)?;
                lab.add_deaf(old, &format!("deaf{number}"), addr)?;
                lab.router().run(|| {
                    let netlink = Netlink::new().map_err(failed)?;
                    let route = Route {
                        via: Some(via[number]),
                        ..Route::to(addr, if addr.is_ipv4() { 32 } else { 128 })
                    };
                    netlink.add_route(&route).map_err(failed)
                })?;
            }
            Ok(())
        },
    )
}

#[test]
fn a_moved_address_that_goes_to_another_link_is_served_there() -> Result {
    both_families(
        |lab| {
            all_is_served(lab, &[MOVED.into()])?;
            let old = lab.old_server();
            lab.set_address(old, UPLINK, MOVED, 24, false)?;
            lab.add_deaf(old, "deaf0", MOVED.into())?;
            all_is_served(lab, &[MOVED.into()])
        },
        |_| Ok(()),
    )
}

#[test]
fn each_family_may_come_by_a_link_of_its_own() -> Result {
    let addrs = [IpAddr::from(MOVED), MOVED6.into()];
    both_families(
        |lab| all_is_served(lab, &addrs),
        |lab| {
            let old = lab.old_server();
            lab.set_address(old, UPLINK, MOVED6, 64, false)?;
            let (here, gateway): (IpAddr, IpAddr) = (
                "2001:db8:a6::1".parse().map_err(failed)?,
                "2001:db8:a6::fe".parse().map_err(failed)?,
            );
            lab.add_leg(
                old,
                "eth1",
                &[(here, 64), (MOVED6.into(), 128)],
                &[(gateway, 64)],
            )?;
            lab.router().run(|| {
                let netlink = Netlink::new().map_err(failed)?;
                let route = Route {
                    via: Some(here),
                    ..Route::to(MOVED6.into(), 128)
                };
                netlink.add_route(&route).map_err(failed)
            })?;
            old.run(|| {
                let netlink = Netlink::new().map_err(failed)?;
                let clients = Route {
                    via: Some(gateway),
                    ..Route::to("2001:db8:c::".parse().map_err(failed)?, 64)
                };
                netlink.add_route(&clients).map_err(failed)
            })
        },
    )
}

#[test]
fn packets_of_a_bridge_are_captured_there_and_not_at_its_port() -> Result {
    let addrs = [IpAddr::from(MOVED), MOVED6.into()];
    both_families(
        |lab| {
            all_is_served(lab, &addrs)?;
            assert_eq!(filters(lab.old_server())?, 0, "at the port");
            Ok(())
        },
        |lab| lab.put_into_bridge(Leg::Old, "br0"),
    )
}

#[test]
fn a_tag_that_has_a_priority_only_counts_as_none() -> Result {
    moved(|on| {
        let Moved { lab, .. } = on;
        let service = UdpService::start(lab.new_server(), (NEW, DNS))?;
        let wire = Wire::new(
            lab.router(),
            Leg::Old.router_interface(),
            lab.old_server(),
            UPLINK,
        )?;
        let client = lab.client().udp_socket((MOVED, DNS))?;
        let from = client.local_addr().map_err(failed)?;
        assert_eq!(from.ip(), IpAddr::from(CLIENT));
        let packet = packets::udp((from.ip(), from.port()), (MOVED.into(), DNS), b"tagged");
        // One of VLAN 7 is none of this host's, which has no such VLAN.
        wire.send_tagged(&packet, 7, 3)?;
        thread::sleep(Duration::from_millis(200));
        assert_eq!(service.peers(), []);
        wire.send_tagged(&packet, 0, 3)?;
        let mut answer = [0; 100];
        client
            .set_read_timeout(Some(patience(PATIENCE)))
            .map_err(failed)?;
        let length = client.recv(&mut answer).map_err(failed)?;
        assert!(length > 0);
        assert_eq!(service.peers(), [from]);
        Ok(())
    })
}

fn failed(error: impl std::fmt::Display) -> LabError {
    LabError::unexpected(error.to_string())
}
