//! A new server that was taken over, or a user on it, gets nowhere through the old one: out goes
//! what answers a client that came.
//!
//! ```text
//!                                        ┌──(tap)── old server 192.0.2.1: the daemon
//!  clients (and third parties) ─ router ─┤              ║ tunnel
//!                                        └── new server: an impostor with the key, or a daemon
//!                                            and somebody who may bind to ipmoved0
//! ```

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use ipmoved::internals::Role;
use ipmoved::lab::topology::{
    CLIENT, Leg, MOVED, MOVED6, NEW, OLD, OLD6, SECOND_CLIENT, SECOND_CLIENT6, moved as moved_addr,
};
use ipmoved::lab::{DaemonSetup, Lab, LabError, Service, UdpService, Wire, packets, poll_until};
use rustix::process::Uid;
use rustix::thread::set_thread_res_uid;
use socket2::{Domain, Socket, Type};

use crate::impostor::Impostor;
use crate::stage::{FAMILIES, PATIENCE, Result, moved, setup, warnings};

const WORDS: &[u8] = b"whom nobody has asked";

/// The metadata service of most clouds.
const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// What the new server sends, how it is counted, and the packet.
type Bad = (&'static str, &'static str, Vec<u8>);

/// Packets that have no business outside, whoever came.
fn bad() -> Vec<Bad> {
    let udp = |to: IpAddr, port| {
        let from = if to.is_ipv4() {
            IpAddr::from(MOVED)
        } else {
            MOVED6.into()
        };
        packets::udp((from, 53), (to, port), WORDS)
    };
    let v6 = |text: &str| IpAddr::from(text.parse::<Ipv6Addr>().unwrap_or(Ipv6Addr::UNSPECIFIED));
    let echo_request = [8, 0, 0, 0, 0, 7, 0, 1];
    let unreachable = {
        let about = packets::udp((SECOND_CLIENT.into(), 4_000), (MOVED.into(), 53), WORDS);
        let error = [&[3, 3, 0, 0, 0, 0, 0, 0][..], &about].concat();
        packets::ip(MOVED, SECOND_CLIENT, 1, &error)
    };
    vec![
        (
            "a SYN",
            "unasked",
            packets::syn((MOVED, 4_000), (SECOND_CLIENT, 80)),
        ),
        ("a datagram", "unasked", udp(SECOND_CLIENT.into(), 53)),
        (
            "a datagram of IPv6",
            "unasked",
            udp(SECOND_CLIENT6.into(), 53),
        ),
        (
            "a ping",
            "unasked",
            packets::ip(MOVED, SECOND_CLIENT, 1, &echo_request),
        ),
        (
            "GRE",
            "unasked",
            packets::ip(MOVED, SECOND_CLIENT, 47, WORDS),
        ),
        ("an ICMP error about nothing", "icmp_unrelated", unreachable),
        (
            "a SYN to the metadata",
            "bad_destination",
            packets::syn((MOVED, 4_000), (METADATA, 80)),
        ),
        (
            "a datagram to the metadata",
            "bad_destination",
            udp(METADATA.into(), 53),
        ),
        (
            "GRE to the metadata",
            "bad_destination",
            packets::ip(MOVED, METADATA, 47, WORDS),
        ),
        (
            "to the metadata of IPv6",
            "bad_destination",
            udp(v6("fd00:ec2::254"), 80),
        ),
        (
            "to everybody on the link",
            "bad_destination",
            udp(v6("ff02::1"), 5_353),
        ),
        (
            "to a neighbour's link-local address",
            "bad_destination",
            udp(v6("fe80::1"), 53),
        ),
        (
            "multicast",
            "bad_destination",
            udp(Ipv4Addr::new(224, 0, 0, 251).into(), 5_353),
        ),
        (
            "broadcast",
            "bad_destination",
            udp(Ipv4Addr::BROADCAST.into(), 67),
        ),
        ("to the network's broadcast address", "bad_destination", {
            udp(Ipv4Addr::new(192, 0, 2, 255).into(), 9)
        }),
        (
            "to the old server itself",
            "bad_destination",
            udp(OLD.into(), 9_999),
        ),
        (
            "to itself in IPv6",
            "bad_destination",
            udp(OLD6.into(), 9_999),
        ),
        (
            "to another moved address",
            "bad_destination",
            udp(moved_addr(1).into(), 9_999),
        ),
        (
            "to loopback",
            "bad_destination",
            udp(Ipv4Addr::LOCALHOST.into(), 9_999),
        ),
    ]
}

/// Waits until one more packet is counted for this reason on the old server.
fn counted(setup: &DaemonSetup<'_>, reason: &str, before: u64) -> bool {
    let counted = poll_until(PATIENCE, Duration::from_millis(5), || {
        let status = setup.status(Role::Old).ok()?;
        (status.drops(reason) == before + 1).then_some(())
    });
    counted.is_some()
}

#[test]
fn a_bad_new_server_reaches_nobody_but_clients() -> Result {
    let lab = Lab::builder().moved(2).build()?;
    // Of the second address a port has moved; the old server serves the others.
    let setup = setup(&lab)?.moves(&["192.0.2.5", "192.0.2.6:53", "2001:db8:a::5"]);
    let own = UdpService::start(lab.old_server(), (moved_addr(1), 9_999))?;
    let mut daemon = setup.start(Role::Old)?;
    let impostor = Impostor::on_the_new_server(&lab)?;
    daemon.wait_until_up()?;
    // A client makes a way to itself, and to nobody else.
    let client = lab.client().udp_socket((MOVED, 53))?;
    client.send(b"a question").map_err(unexpected)?;
    let known = poll_until(PATIENCE, Duration::from_millis(5), || {
        let status = setup.status(Role::Old).ok()?;
        (status.live_flows() == 1).then_some(())
    });
    assert!(known.is_some(), "{:?}", setup.status(Role::Old));

    let tap = lab.tap(Leg::Old)?;
    for (what, reason, packet) in bad() {
        let before = setup.status(Role::Old)?.drops(reason);
        impostor.send(&packet)?;
        let status = || setup.status(Role::Old);
        assert!(counted(&setup, reason, before), "{what}: {:?}", status());
    }
    let port = client.local_addr().map_err(unexpected)?.port();
    impostor.send(&packets::udp(
        (MOVED.into(), 69),
        (CLIENT.into(), port),
        WORDS,
    ))?;
    // The socket is connected to port 53; the tap sees the answer from another port as well.
    impostor.send(&packets::udp(
        (MOVED.into(), 53),
        (CLIENT.into(), port),
        WORDS,
    ))?;
    let mut heard = [0; 64];
    let len = client.recv(&mut heard).map_err(unexpected)?;
    assert_eq!(heard.get(..len), Some(WORDS));
    let seen = tap.stop()?;
    let left: Vec<_> = seen
        .packets()
        .filter(|packet| [IpAddr::from(MOVED), MOVED6.into()].contains(&packet.source))
        .filter(|packet| !packet.kind.is_neighbour_talk())
        .map(|packet| packet.destination)
        .collect();
    assert_eq!(left, [IpAddr::from(CLIENT); 2], "what left the old server");
    assert_eq!(own.peers(), [], "what came to the old server itself");

    // People are told of one of them, a minute.
    let warned = poll_until(PATIENCE, Duration::from_millis(50), || {
        let lines = warnings(&setup, Role::Old).ok()?;
        (!lines.is_empty()).then_some(lines)
    });
    let said = "the new server sends TCP to 203.0.113.11 port 80, which no client's packet asked \
                for; such packets are dropped (unasked)";
    let remedy = "; if its programs are to begin connections, add --allow-outgoing here and \
                  --outgoing there";
    let warned = warned.unwrap_or_default();
    let [warning] = &warned[..] else {
        return Err(LabError::unexpected(format!("not one warning: {warned:?}")));
    };
    assert!(warning.ends_with(&format!("{said}{remedy}")), "{warning}");
    Ok(())
}

fn unexpected(error: io::Error) -> LabError {
    LabError::unexpected(error.to_string())
}

/// Since Linux 5.7 everybody may bind a socket to an interface.
#[test]
fn a_user_of_the_new_server_gets_nowhere_through_the_old_one() -> Result {
    let nobody = Uid::from_raw(65_534);
    moved(|on| {
        let tap = on.lab.tap(Leg::Old)?;
        let before = on.daemons.old.status()?.tunnel()["rx"]["packets"].as_u64();
        for to in [METADATA, SECOND_CLIENT, OLD] {
            on.lab.new_server().run(|| {
                set_thread_res_uid(nobody, nobody, nobody).map_err(|e| unexpected(e.into()))?;
                let socket = Socket::new(Domain::IPV4, Type::DGRAM, None).map_err(unexpected)?;
                socket.bind_device(Some(b"ipmoved0")).map_err(unexpected)?;
                let from = SocketAddr::from((NEW, 5_353));
                socket.bind(&from.into()).map_err(unexpected)?;
                let to = SocketAddr::from((to, 1_053));
                socket
                    .send_to(WORDS, &to.into())
                    .map_err(unexpected)
                    .map(drop)
            })?;
        }
        // Either server refuses them.
        let refused = poll_until(PATIENCE, Duration::from_millis(10), || {
            let count = |role, reason| {
                let status = on.setup.status(role);
                status.map_or(0, |status| status.drops(reason))
            };
            let old = count(Role::Old, "bad_destination") + count(Role::Old, "unasked");
            (old + count(Role::New, "no_flow") == 3).then_some(())
        });
        assert!(refused.is_some(), "{:?}", on.setup.status(Role::Old));
        let seen = tap.stop()?;
        assert_eq!(seen.packets_with(METADATA), 0);
        assert_eq!(seen.packets_with(SECOND_CLIENT), 0);
        assert_eq!(seen.frames_with(WORDS), 0);
        let after = on.daemons.old.status()?.tunnel()["rx"]["packets"].as_u64();
        assert_eq!(before, after, "what the old server wrote to its TUN");
        Ok(())
    })
}

#[test]
fn nobody_becomes_a_client_under_an_address_that_no_client_has() -> Result {
    let lab = Lab::builder().moved(2).build()?;
    let setup = setup(&lab)?.moves(&["192.0.2.5", "192.0.2.6:53", "2001:db8:a::5"]);
    let echo = UdpService::start(lab.new_server(), (NEW, 53))?;
    let _daemons = setup.start_both()?;
    let wire = Wire::new(lab.router(), "old", lab.old_server(), "eth0")?;
    let forged = |from: IpAddr| {
        let to = if from.is_ipv4() {
            IpAddr::from(MOVED)
        } else {
            MOVED6.into()
        };
        packets::udp((from, 53), (to, 53), WORDS)
    };
    for from in [
        IpAddr::from(METADATA),
        OLD.into(),
        OLD6.into(),
        moved_addr(1).into(),
        Ipv4Addr::new(192, 0, 2, 255).into(),
    ] {
        let before = setup.status(Role::Old)?.drops("bad_source");
        wire.send(&forged(from))?;
        let status = || setup.status(Role::Old);
        assert!(
            counted(&setup, "bad_source", before),
            "{from}: {:?}",
            status()
        );
    }
    assert_eq!(echo.peers(), []);
    // A neighbour of the old server is a client like others.
    wire.send(&forged(Ipv4Addr::new(192, 0, 2, 77).into()))?;
    let came = poll_until(PATIENCE, Duration::from_millis(10), || echo.peers().pop());
    let came = came.map(|peer| peer.ip());
    assert_eq!(came, Some(Ipv4Addr::new(192, 0, 2, 77).into()));
    Ok(())
}

#[test]
fn the_old_server_shows_the_flows_of_its_clients() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?
        .moves(&FAMILIES)
        .args(Role::Old, &["--max-flows", "5000"]);
    let _application = Service::start(lab.new_server(), NEW)?;
    let daemons = setup.start_both()?;
    let flows = || {
        daemons
            .old
            .status()
            .map(|status| status.tunnel()["flows"].clone())
    };
    let before = flows()?;
    assert_eq!(
        (&before["live"], &before["max"]),
        (&0.into(), &5_000.into())
    );
    lab.client().get(MOVED)?.is_answered_by(NEW)?;
    lab.second_client().get(MOVED)?.is_answered_by(NEW)?;
    assert_eq!(flows()?["live"], 2);
    Ok(())
}
