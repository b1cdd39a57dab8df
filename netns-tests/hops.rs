//! The old server is one hop on the path, and ICMP errors reach the host that they concern.
//!
//! ```text
//!  client ── router 203.0.113.1 ── old server 192.0.2.1 ══ new server, which is 192.0.2.5
//!    hop:          1                      2                       3
//! ```

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use ipmoved::internals::Role;
use ipmoved::lab::topology::{CLIENT, CLIENT6, MOVED, MOVED6, NEW, NEW6, OLD, OLD6};
use ipmoved::lab::{Lab, LabError, Probe, RawSocket, Service, UdpService, Watch, patience};
use socket2::SockRef;

use crate::stage::{FAMILIES, PATIENCE, Result, SILENCE, setup};

/// A family's addresses and ICMP numbers.
struct Family {
    client: IpAddr,
    router: IpAddr,
    old: IpAddr,
    moved: IpAddr,
    new: IpAddr,
    icmp: u8,
    expired: u8,
    /// Type and code of "port unreachable".
    closed: [u8; 2],
    request: u8,
    reply: u8,
}

fn families() -> [Family; 2] {
    [
        Family {
            client: CLIENT.into(),
            router: Ipv4Addr::new(203, 0, 113, 1).into(),
            old: OLD.into(),
            moved: MOVED.into(),
            new: NEW.into(),
            icmp: 1,
            expired: 11,
            closed: [3, 3],
            request: 8,
            reply: 0,
        },
        Family {
            client: CLIENT6.into(),
            router: Ipv6Addr::new(0x2001, 0xdb8, 0xc, 0, 0, 0, 0, 1).into(),
            old: OLD6.into(),
            moved: MOVED6.into(),
            new: NEW6.into(),
            icmp: 58,
            expired: 3,
            closed: [1, 4],
            request: 128,
            reply: 129,
        },
    ]
}

/// A protocol that no kernel handles (RFC 3692 reserves it for experiments).
const EXPERIMENT: u8 = 253;

fn set_hops(socket: &UdpSocket, to: IpAddr, hops: u32) -> Result {
    let socket = SockRef::from(socket);
    let set = if to.is_ipv4() {
        socket.set_ttl_v4(hops)
    } else {
        socket.set_unicast_hops_v6(hops)
    };
    set.map_err(|error| LabError::unexpected(format!("cannot set a hop limit: {error}")))
}

#[test]
fn one_hop_is_taken_in_each_direction() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.moves(&FAMILIES);
    let _daemons = setup.start_both()?;
    for family in families() {
        let hops = |wanted: u8| {
            move |packet: &[u8]| match packet[0] >> 4 {
                4 => packet[9] == EXPERIMENT && packet[8] == wanted,
                _ => packet[6] == EXPERIMENT && packet[7] == wanted,
            }
        };
        let application = RawSocket::open(lab.new_server(), family.new, EXPERIMENT)?;
        let client = RawSocket::open(lab.clients(), family.client, EXPERIMENT)?;
        let at_new = Watch::start(lab.new_server(), "ipmoved0")?;
        let at_client = Watch::start(lab.clients(), "eth0")?;
        client.set_hops(64)?;
        application.set_hops(64)?;
        client.send(family.moved, b"there")?;
        application.expect(PATIENCE, |words| words == b"there")?;
        application.send(family.client, b"back")?;
        client.expect(PATIENCE, |words| words == b"back")?;
        let pause = Duration::from_millis(50);
        assert_eq!(at_new.count(pause, hops(62))?, 1, "router and old server");
        assert_eq!(at_client.count(pause, hops(62))?, 1);
    }
    Ok(())
}

#[test]
fn traceroute_shows_the_router_the_old_server_and_the_moved_address() -> Result {
    for moves in [
        FAMILIES,
        ["192.0.2.5:33434-33440", "[2001:db8:a::5]:33434-33440/udp"],
    ] {
        let lab = Lab::new()?;
        let setup = setup(&lab)?.moves(&moves);
        let _daemons = setup.start_both()?;
        for family in families() {
            let heard = RawSocket::open(lab.clients(), family.client, family.icmp)?;
            let expired = [family.expired, 0];
            for (hops, from, says) in [
                (1, family.router, expired),
                (2, family.old, expired),
                (3, family.moved, family.closed),
            ] {
                let probe = lab.client().udp_socket((family.moved, 33_434))?;
                set_hops(&probe, family.moved, hops)?;
                probe.send(b"traceroute").unwrap();
                let (answers, _) = heard.expect(PATIENCE, |message| message.starts_with(&says))?;
                assert_eq!(answers, from, "hop {hops}");
            }
        }
    }
    Ok(())
}

#[test]
fn traceroute_with_echo_requests_shows_the_same() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.moves(&FAMILIES);
    let _daemons = setup.start_both()?;
    for family in families() {
        let socket = RawSocket::open(lab.clients(), family.client, family.icmp)?;
        let mut echo = vec![family.request, 0, 0, 0, 0x12, 0x34, 0, 1];
        if family.icmp == 1 {
            // The kernel writes the checksum of ICMPv6, but not that of ICMP.
            let sum = !(u32::from(family.request) * 256 + 0x1234 + 1) as u16;
            echo[2..4].copy_from_slice(&sum.to_be_bytes());
        }
        for (hops, from, says) in [
            (1, family.router, family.expired),
            (2, family.old, family.expired),
            (3, family.moved, family.reply),
        ] {
            socket.set_hops(hops)?;
            socket.send(family.moved, &echo)?;
            let (answers, _) = socket.expect(PATIENCE, |message| message[0] == says)?;
            assert_eq!(answers, from, "hop {hops}");
        }
    }
    Ok(())
}

#[test]
fn the_application_hears_that_its_packets_expire() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.moves(&FAMILIES);
    let _daemons = setup.start_both()?;
    for family in families() {
        let addr = SocketAddr::new(family.new, 53);
        let application = lab.new_server().run(|| {
            UdpSocket::bind(addr).map_err(|error| LabError::unexpected(error.to_string()))
        })?;
        application
            .set_read_timeout(Some(patience(PATIENCE)))
            .unwrap();
        let heard = RawSocket::open(lab.new_server(), family.new, family.icmp)?;
        let client = lab.client().udp_socket((family.moved, 53))?;
        client.send(b"?").unwrap();
        let (_, asker) = application.recv_from(&mut [0; 10]).unwrap();
        set_hops(&application, family.new, 1)?;
        application.send_to(b"!", asker).unwrap();
        let says = [family.expired, 0];
        let (from, _) = heard.expect(PATIENCE, |message| message.starts_with(&says))?;
        assert_eq!(from, family.old);
    }
    Ok(())
}

#[test]
fn icmp_replies_are_limited() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let _daemons = setup.start_both()?;
    let probe = lab.client().udp_socket((MOVED, 33_434))?;
    set_hops(&probe, MOVED.into(), 2)?;
    for _ in 0..1_000 {
        // This call may return the ICMP error about an earlier one.
        let _ = probe.send(b"traceroute");
    }
    std::thread::sleep(Duration::from_millis(200));
    let status = setup.status(Role::Old)?;
    assert!(status.drops("ttl_expired") > 500, "{status:?}");
    assert!(status.drops("answer_limited") > 0, "{status:?}");
    Ok(())
}

#[test]
fn a_closed_udp_port_is_refused_by_whoever_has_it() -> Result {
    for moves in [FAMILIES, ["192.0.2.5:53/udp", "[2001:db8:a::5]:53/udp"]] {
        let lab = Lab::new()?;
        let setup = setup(&lab)?.moves(&moves);
        // If a daemon sent the probe to the other server, that one would reply.
        let _decoys = [
            UdpService::start(lab.old_server(), (MOVED, 53))?,
            UdpService::start(lab.old_server(), (MOVED6, 53))?,
        ];
        let _daemons = setup.start_both()?;
        for moved in [IpAddr::from(MOVED), MOVED6.into()] {
            let probe = lab.client().probe_udp((moved, 53), PATIENCE)?;
            assert_eq!(probe, Probe::Refused, "{moved}");
        }
    }
    Ok(())
}

#[test]
fn ports_that_stay_are_refused_by_the_old_server() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.moves(&["192.0.2.5:53/udp", "[2001:db8:a::5]:53/udp"]);
    let _decoys = [
        UdpService::start(lab.new_server(), (NEW, 54))?,
        UdpService::start(lab.new_server(), (NEW6, 54))?,
        UdpService::start(lab.new_server(), (NEW, 53))?,
    ];
    let _tcp = Service::start(lab.new_server(), (NEW, 53))?;
    let _daemons = setup.start_both()?;
    for moved in [IpAddr::from(MOVED), MOVED6.into()] {
        let probe = lab.client().probe_udp((moved, 54), PATIENCE)?;
        assert_eq!(probe, Probe::Refused, "{moved}");
        let probe = lab.client().probe_tcp((moved, 53), SILENCE)?;
        assert_eq!(probe, Probe::Refused, "{moved}");
    }
    lab.client().udp((MOVED, 53), b"moved").map(drop)
}
