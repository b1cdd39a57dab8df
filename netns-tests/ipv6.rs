//! IPv6 throughout: clients, moved addresses, delivery and the tunnel itself, in any mixture.
//!
//! ```text
//!  2001:db8:c::10 ── router ──┬── old server 2001:db8:a::1, holds 2001:db8:a::5 (moved)
//!                             └── new server 2001:db8:b::2
//! ```

use std::net::{IpAddr, Ipv6Addr};

use ipmoved::internals::Role;
use ipmoved::lab::topology::{CLIENT6, MOVED, MOVED6, NEW, NEW6, OLD, OLD6};
use ipmoved::lab::{Lab, Probe, RawSocket, Service, UdpService};

use crate::stage::{FAMILIES, MEGABYTE, PATIENCE, Result, setup};

#[test]
fn both_families_are_served_through_a_tunnel_of_either() -> Result {
    // The kernel would choose the newest of several IPv6 addresses, which here is the moved one.
    for (new, old, listen) in [
        (IpAddr::from(NEW), IpAddr::from(OLD), "192.0.2.1:51850"),
        (NEW6.into(), OLD6.into(), "[2001:db8:a::1]:51850"),
    ] {
        let lab = Lab::new()?;
        let setup = (setup(&lab)?.moves(&FAMILIES))
            .args(Role::Old, &["--listen", listen])
            .peer(Role::Old, new)
            .peer(Role::New, old);
        let _applications = [
            Service::start(lab.new_server(), NEW)?,
            Service::start(lab.new_server(), NEW6)?,
        ];
        let _echo = UdpService::start(lab.new_server(), (NEW6, 53))?;
        let daemons = setup.start_both()?;
        for (moved, delivered) in [
            (IpAddr::from(MOVED), IpAddr::from(NEW)),
            (MOVED6.into(), NEW6.into()),
        ] {
            let answer = lab.client().get(moved)?;
            answer.is_answered_by(delivered)?.for_the_client_itself()?;
            lab.client().download(moved, 2 * MEGABYTE + 1)?;
            lab.client().upload(moved, 2 * MEGABYTE + 1)?;
            lab.client().ping(moved, 1_400)?;
            let closed = lab.client().probe_tcp((moved, 81), PATIENCE)?;
            assert_eq!(closed, Probe::Refused);
        }
        lab.client().udp((MOVED6, 53), b"six")?;
        daemons.terminate()?;
    }
    Ok(())
}

#[test]
fn an_ipv6_address_moves_alone() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.moves(&["2001:db8:a::5"]);
    let _application = Service::start(lab.new_server(), NEW6)?;
    let _own = Service::start(lab.old_server(), MOVED)?;
    let _daemons = setup.start_both()?;
    lab.client().get(MOVED6)?.is_answered_by(NEW6)?;
    lab.client().get(MOVED)?.is_answered_by(MOVED).map(drop)
}

#[test]
fn a_client_uses_the_direct_and_the_moved_ipv6_address_at_once() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.moves(&FAMILIES);
    let _application = Service::start(lab.new_server(), NEW6)?;
    let _echo = UdpService::start(lab.new_server(), (NEW6, 53))?;
    let _daemons = setup.start_both()?;
    for to in [MOVED6, NEW6, MOVED6, NEW6] {
        lab.client().get(to)?.is_answered_by(NEW6)?;
        lab.client().udp((to, 53), b"from where?")?;
        lab.client().ping(to, 56)?;
    }
    Ok(())
}

#[test]
fn neighbour_discovery_stays_with_the_old_server() -> Result {
    // RFC 4861, sections 4.3 and 4.4.
    const SOLICITATION: u8 = 135;
    const ADVERTISEMENT: u8 = 136;
    for moves in [FAMILIES, ["192.0.2.5:80", "[2001:db8:a::5]:80/tcp"]] {
        let lab = Lab::new()?;
        let setup = setup(&lab)?.moves(&moves);
        let _daemons = setup.start_both()?;
        let router = Ipv6Addr::new(0x2001, 0xdb8, 0xa, 0, 0, 0, 0, 0xfe);
        let socket = RawSocket::open(lab.router(), router, 58)?;
        socket.set_hops(255)?;
        let mut question = vec![SOLICITATION, 0, 0, 0, 0, 0, 0, 0];
        question.extend(MOVED6.octets());
        socket.send(MOVED6, &question)?;
        let about_it = |message: &[u8]| {
            message[0] == ADVERTISEMENT && message.get(8..24) == Some(&MOVED6.octets())
        };
        let (from, _) = socket.expect(PATIENCE, about_it)?;
        assert_eq!(from, IpAddr::from(MOVED6), "{moves:?}");
    }
    Ok(())
}

#[test]
fn the_application_sees_an_ipv6_clients_own_address() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.moves(&FAMILIES);
    let application = Service::start(lab.new_server(), NEW6)?;
    let _daemons = setup.start_both()?;
    lab.client().get(MOVED6)?.for_the_client_itself()?;
    let seen: Vec<IpAddr> = application.peers().iter().map(|peer| peer.ip()).collect();
    assert_eq!(seen, [IpAddr::from(CLIENT6)]);
    Ok(())
}
