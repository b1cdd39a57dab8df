//! A whole address carries every IP protocol. If only ports have moved, everything else stays.
//!
//! ```text
//!  client ── router ──┬── old server: 192.0.2.5, ports that stay
//!                     └── new server: protocols and ports that moved
//! ```

use std::net::IpAddr;

use ipmoved::lab::topology::{CLIENT, CLIENT6, MOVED, MOVED6, NEW, NEW6};
use ipmoved::lab::{Lab, RawSocket, Service, UdpService, Watch};

use crate::stage::{FAMILIES, PATIENCE, Result, SILENCE, setup};

/// GRE, ESP, SCTP, UDP-Lite, and one that means nothing (RFC 3692).
const PROTOCOLS: [u8; 5] = [47, 50, 132, 136, 253];

#[test]
fn every_ip_protocol_is_carried_both_ways() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.moves(&FAMILIES);
    let _daemons = setup.start_both()?;
    for (client, moved, new) in [
        (IpAddr::from(CLIENT), IpAddr::from(MOVED), IpAddr::from(NEW)),
        (CLIENT6.into(), MOVED6.into(), NEW6.into()),
    ] {
        for protocol in PROTOCOLS {
            let application = RawSocket::open(lab.new_server(), new, protocol)?;
            let asking = RawSocket::open(lab.clients(), client, protocol)?;
            asking.send(moved, b"question of a client")?;
            let (from, question) = application.expect(PATIENCE, |words| words.len() > 8)?;
            assert_eq!(from, client, "protocol {protocol}");
            // UDP-Lite's checksum covers the addresses, so it has changed.
            let same = |words: &[u8]| protocol == 136 || words == b"question of a client";
            assert!(same(&question), "protocol {protocol}");
            application.send(client, b"the answer is yes")?;
            let (from, answer) = asking.expect(PATIENCE, |words| words.len() == 17)?;
            assert_eq!(from, moved, "protocol {protocol}");
            assert!(protocol == 136 || answer == b"the answer is yes");
        }
    }
    Ok(())
}

#[test]
fn other_protocols_stay_where_only_ports_have_moved() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.moves(&["192.0.2.5:80,443", "[2001:db8:a::5]:80,443"]);
    let _daemons = setup.start_both()?;
    let tunnel = Watch::start(lab.old_server(), "ipmoved0")?;
    for (client, moved) in [
        (IpAddr::from(CLIENT), IpAddr::from(MOVED)),
        (CLIENT6.into(), MOVED6.into()),
    ] {
        for protocol in PROTOCOLS {
            let own = RawSocket::open(lab.old_server(), moved, protocol)?;
            let asking = RawSocket::open(lab.clients(), client, protocol)?;
            asking.send(moved, b"question of a client")?;
            let (from, _) = own.expect(PATIENCE, |words| words.len() > 8)?;
            assert_eq!(from, client, "protocol {protocol}");
        }
    }
    assert_eq!(
        tunnel.count(std::time::Duration::from_millis(50), |_| true)?,
        0
    );
    Ok(())
}

#[test]
fn exactly_the_ports_that_were_named_move() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.moves(&[
        "192.0.2.5:80,8000-8002/tcp",
        "192.0.2.5:53/udp",
        "[2001:db8:a::5]:80,8000-8002/tcp",
        "[2001:db8:a::5]:53/udp",
    ]);
    // Both servers have a service on each port, so the reply shows whose the port is.
    let mut services = Vec::new();
    let mut echoes = Vec::new();
    let moved = [IpAddr::from(MOVED), MOVED6.into()];
    let new = [IpAddr::from(NEW), NEW6.into()];
    for port in [79, 80, 81, 53, 7999, 8000, 8002, 8003] {
        for index in 0..2 {
            services.push(Service::start(lab.old_server(), (moved[index], port))?);
            services.push(Service::start(lab.new_server(), (new[index], port))?);
        }
    }
    for index in 0..2 {
        for port in [53, 80] {
            let own = UdpService::start(lab.old_server(), (moved[index], port))?;
            let theirs = UdpService::start(lab.new_server(), (new[index], port))?;
            echoes.push((own, theirs));
        }
    }
    let _daemons = setup.start_both()?;
    for index in 0..2 {
        for (port, has_moved) in [
            (79, false),
            (80, true),
            (81, false),
            (53, false),
            (7999, false),
            (8000, true),
            (8002, true),
            (8003, false),
        ] {
            let whose = if has_moved { new[index] } else { moved[index] };
            let answer = lab.client().get((moved[index], port))?;
            answer.is_answered_by(whose)?.for_the_client_itself()?;
        }
        lab.client().udp((moved[index], 53), b"moved")?;
        lab.client().udp((moved[index], 80), b"stays")?;
        let (ours, other) = (&echoes[2 * index], &echoes[2 * index + 1]);
        let counts = [&ours.0, &ours.1, &other.0, &other.1].map(|echo| echo.peers().len());
        assert_eq!(counts, [0, 1, 1, 0]);
        // The old server has not moved the ping, so it replies itself.
        lab.client().ping(moved[index], 1_400)?;
    }
    let closed = lab.client().probe_tcp((MOVED, 8001), SILENCE)?;
    assert_eq!(closed, ipmoved::lab::Probe::Refused);
    Ok(())
}
