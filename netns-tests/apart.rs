//! On the new server, answers that come from elsewhere than was asked, and clients that use both
//! addresses at once.
//!
//! ```text
//!  client ── router ──┬── old server ══╗
//!                     └── new server ──╝ 198.51.100.2, and .3 beside it
//!                             services on any address, and some that answer from a new port
//! ```

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use ipmoved::internals::Role;
use ipmoved::lab::topology::{Leg, MOVED, MOVED6, NEW, NEW6, SECOND_CLIENT, UPLINK};
use ipmoved::lab::{
    Client, Daemon, Lab, LabError, Namespace, Service, Wire, packets, patience, poll_until,
};

use crate::stage::{FAMILIES, PATIENCE, RECOVERY, Result, SILENCE, setup};

/// An address beside the new server's own, of each family.
const BESIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 3);
const BESIDE6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xb, 0, 0, 0, 0, 3);

/// The new server's address and the moved one, of each family.
const ENDS: [[IpAddr; 2]; 2] = [
    [IpAddr::V4(NEW), IpAddr::V4(MOVED)],
    [IpAddr::V6(NEW6), IpAddr::V6(MOVED6)],
];

fn failed(error: std::io::Error) -> LabError {
    LabError::unexpected(error.to_string())
}

/// A socket on any address of this family.
fn any(host: &Namespace, like: IpAddr, port: u16) -> Result<UdpSocket> {
    let any = match like {
        IpAddr::V4(_) => IpAddr::from(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::from(Ipv6Addr::UNSPECIFIED),
    };
    host.run(|| {
        let socket = UdpSocket::bind((any, port)).map_err(failed)?;
        socket
            .set_read_timeout(Some(patience(PATIENCE)))
            .map_err(failed)?;
        Ok(socket)
    })
}

/// A client's socket that hears whoever speaks to it.
fn open(client: &Client<'_>, towards: IpAddr) -> Result<UdpSocket> {
    let from = client.address_towards((towards, 0));
    client.namespace().run(|| {
        let socket = UdpSocket::bind((from, 0)).map_err(failed)?;
        socket
            .set_read_timeout(Some(patience(PATIENCE)))
            .map_err(failed)?;
        Ok(socket)
    })
}

/// What comes next, which has to be these words; and from where.
fn hears(socket: &UdpSocket, words: &[u8]) -> Result<SocketAddr> {
    let mut told = [0; 100];
    let (length, from) = socket.recv_from(&mut told).map_err(failed)?;
    assert_eq!(&told[..length], words);
    Ok(from)
}

/// As TFTP does (RFC 1350 section 4), with a socket that is connected to its client and one that is
/// not, over a crash of the new server's daemon.
#[test]
fn answers_from_a_new_port_find_the_tunnel_and_the_client_goes_on_with_it() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.moves(&FAMILIES);
    let daemons = setup.start_both()?;
    let tap = lab.tap(Leg::New)?;
    let mut transfers = Vec::new();
    for [here, moved] in ENDS {
        let service = any(lab.new_server(), here, 69)?;
        for connected in [true, false] {
            let client = open(&lab.client(), moved)?;
            client.send_to(b"read", (moved, 69)).map_err(failed)?;
            let from = hears(&service, b"read")?;
            let transfer = any(lab.new_server(), here, 0)?;
            if connected {
                transfer.connect(from).map_err(failed)?;
            }
            let say = |words: &[u8]| match connected {
                true => transfer.send(words),
                false => transfer.send_to(words, from),
            };
            say(b"block-one").map_err(failed)?;
            let at = hears(&client, b"block-one")?;
            let port = transfer.local_addr().map_err(failed)?.port();
            assert_eq!(at, SocketAddr::new(moved, port));
            for _ in 0..2 {
                client.send_to(b"acknowledged", at).map_err(failed)?;
                hears(&transfer, b"acknowledged")?;
                say(b"block-next").map_err(failed)?;
                assert_eq!(hears(&client, b"block-next")?, at);
            }
            transfers.push((transfer, client, from, at, connected));
        }
    }
    daemons.new.kill()?;
    let mut again = setup.start(Role::New)?;
    again.wait_until_up()?;
    for (transfer, client, from, at, connected) in &transfers {
        let sent = match connected {
            true => transfer.send(b"block-last"),
            false => transfer.send_to(b"block-last", from),
        };
        sent.map_err(failed)?;
        assert_eq!(hears(client, b"block-last")?, *at);
    }
    let seen = tap.stop()?;
    assert_eq!(
        seen.frames_with(b"block-"),
        0,
        "it left with its own address"
    );
    Ok(())
}

/// Signalling says where media goes, and either side may be the first to send some.
#[test]
fn media_that_the_new_server_sends_first_goes_through_the_tunnel_once_its_client_speaks() -> Result
{
    let lab = Lab::new()?;
    let ports = "5060,10000-10063/udp";
    let moves = [format!("{MOVED}:{ports}"), format!("[{MOVED6}]:{ports}")];
    let moves = moves.each_ref().map(String::as_str);
    let setup = setup(&lab)?.moves(&moves).accept_what_moves();
    let daemons = setup.start_both()?;
    let bind = |host: &Namespace, addr: IpAddr, port| {
        host.run(|| {
            let socket = UdpSocket::bind((addr, port)).map_err(failed)?;
            let wait = Some(Duration::from_millis(300));
            socket.set_read_timeout(wait).map_err(failed)?;
            Ok(socket)
        })
    };
    for [new, moved] in ENDS {
        let client = lab.client().address_towards(moved);
        let hear = |socket: &UdpSocket| {
            let (length, from) = socket.recv_from(&mut [0; 100]).ok()?;
            (length > 0).then_some(from)
        };
        for (called, port) in [(moved, 10_000), (new, 10_002)] {
            let media = bind(lab.new_server(), new, port)?;
            let phone = bind(lab.clients(), client, 40_000 + port / 10)?;
            let to = phone.local_addr().map_err(failed)?;
            // It comes from an address that may not have been called.
            for _ in 0..2 {
                media.send_to(b"early", to).map_err(failed)?;
                hear(&phone).ok_or_else(|| LabError::unexpected("it does not leave"))?;
            }
            let heard = poll_until(PATIENCE, Duration::ZERO, || {
                phone.send_to(b"media", (called, port)).ok()?;
                hear(&media)
            });
            assert_eq!(heard, Some(to), "{called}");
            // Nothing is on its way any more that was sent before.
            while hear(&media).is_some() {}
            for _ in 0..3 {
                let from = poll_until(PATIENCE, Duration::ZERO, || {
                    media.send_to(b"late", to).ok()?;
                    hear(&phone)
                });
                assert_eq!(from, Some(SocketAddr::new(called, port)));
            }
        }
    }
    daemons.terminate()
}

/// The socket answers from the address that the route prefers, which is not the one that clients'
/// packets are delivered to.
#[test]
fn a_service_on_any_address_answers_from_the_moved_one() -> Result {
    let lab = Lab::new()?;
    lab.set_address(lab.new_server(), UPLINK, BESIDE, 24, true)?;
    lab.set_address(lab.new_server(), UPLINK, BESIDE6, 64, true)?;
    // With IPv6 the kernel may prefer either.
    for to6 in [NEW6, BESIDE6] {
        let to = [BESIDE.to_string(), to6.to_string()];
        let setup = setup(&lab)?
            .moves(&FAMILIES)
            .args(Role::New, &["--deliver-to", &to[0], "--deliver-to", &to[1]]);
        let daemons = setup.start_both()?;
        let tap = lab.tap(Leg::New)?;
        let mut talks = Vec::new();
        for ([here, moved], port) in ENDS.into_iter().zip([7_777, 7_778]) {
            let service = any(lab.new_server(), here, port)?;
            let client = open(&lab.client(), moved)?;
            for _ in 0..3 {
                client.send_to(b"question", (moved, port)).map_err(failed)?;
                let from = hears(&service, b"question")?;
                service.send_to(b"the-answer", from).map_err(failed)?;
                let at = hears(&client, b"the-answer")?;
                assert_eq!(at, SocketAddr::new(moved, port));
            }
            // As iperf3 does, with a socket that is connected to the client once that has asked.
            let (own, asked) = (any(lab.new_server(), here, port + 10)?, port + 10);
            let other = open(&lab.client(), moved)?;
            other.send_to(b"question", (moved, asked)).map_err(failed)?;
            let from = hears(&own, b"question")?;
            own.connect(from).map_err(failed)?;
            for _ in 0..2 {
                own.send(b"the-answer").map_err(failed)?;
                let at = hears(&other, b"the-answer")?;
                assert_eq!(at, SocketAddr::new(moved, asked));
                other.send_to(b"question", at).map_err(failed)?;
                hears(&own, b"question")?;
            }
            let from = client.local_addr().map_err(failed)?;
            talks.push((service, client, from, SocketAddr::new(moved, port)));
        }
        daemons.new.kill()?;
        let mut again = setup.start(Role::New)?;
        again.wait_until_up()?;
        for (service, client, from, asked) in &talks {
            service.send_to(b"the-answer", from).map_err(failed)?;
            let at = hears(client, b"the-answer")?;
            assert_eq!(at, *asked);
        }
        let seen = tap.stop()?;
        assert_eq!(
            seen.frames_with(b"the-answer"),
            0,
            "it left with its own address"
        );
        again.terminate()?;
        daemons.old.terminate()?;
    }
    Ok(())
}

#[test]
fn an_answer_from_a_port_that_has_not_moved_goes_nowhere_and_is_told() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.moves(&["192.0.2.5:69/udp"]);
    let daemons = setup.start_both()?;
    let service = any(lab.new_server(), NEW.into(), 69)?;
    let client = open(&lab.client(), MOVED.into())?;
    let tap = lab.tap(Leg::New)?;
    for _ in 0..3 {
        client.send_to(b"read", (MOVED, 69)).map_err(failed)?;
        let from = hears(&service, b"read")?;
        let transfer = any(lab.new_server(), NEW.into(), 0)?;
        transfer.send_to(b"block-one", from).map_err(failed)?;
    }
    client.set_read_timeout(Some(SILENCE)).map_err(failed)?;
    assert!(client.recv_from(&mut [0; 100]).is_err());
    assert_eq!(tap.stop()?.frames_with(b"block-"), 0);
    let told = poll_until(PATIENCE, Duration::from_millis(100), || {
        let status = daemons.new.status().ok()?;
        let warnings = status.0["warnings"].to_string();
        let says = "--move 192.0.2.5:69,32768-60999/udp";
        (warnings.contains(says) && status.all_drops().get("unmoved_port") == Some(&3))
            .then_some(())
    });
    assert!(told.is_some(), "{:?}", daemons.new.status());
    Ok(())
}

/// The stranger speaks through the tunnel in the name of somebody that the new server asks itself.
#[test]
fn no_forged_datagram_makes_answers_of_what_the_new_server_begins() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let _daemons = setup.start_both()?;
    let stranger = Wire::new(lab.router(), "old", lab.old_server(), UPLINK)?;
    let waits = any(lab.new_server(), NEW.into(), 5_060)?;
    for (port, known) in [(53, false), (3_478, true)] {
        let far = lab.clients().run(|| {
            let far = UdpSocket::bind((SECOND_CLIENT, port)).map_err(failed)?;
            far.set_read_timeout(Some(patience(PATIENCE)))
                .map_err(failed)?;
            Ok(far)
        })?;
        let ask = || {
            let own = any(lab.new_server(), NEW.into(), 0)?;
            own.send_to(b"my own", (SECOND_CLIENT, port))
                .map_err(failed)?;
            let from = hears(&far, b"my own")?;
            assert_eq!(from.ip(), IpAddr::from(NEW));
            Ok::<_, LabError>(())
        };
        if known {
            ask()?;
        }
        for _ in 0..3 {
            let forged = packets::udp(
                (SECOND_CLIENT.into(), port),
                (MOVED.into(), 5_060),
                b"forged",
            );
            stranger.send(&forged)?;
            hears(&waits, b"forged")?;
            ask()?;
        }
    }
    Ok(())
}

/// Whichever comes first, with data both ways, over a crash of either daemon.
#[test]
fn a_client_has_connections_with_the_same_ports_to_both_addresses_at_once() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.moves(&FAMILIES);
    let services = [
        Service::start(lab.new_server(), NEW)?,
        Service::start(lab.new_server(), NEW6)?,
    ];
    let daemons = setup.start_both()?;
    let mut talks = Vec::new();
    for (port, swapped) in [(45_000, false), (33_000, true)] {
        let client = lab.client().from_port(port);
        for [here, moved] in ENDS {
            let order = if swapped {
                [here, moved]
            } else {
                [moved, here]
            };
            for to in order {
                let mut talk = client.converse(to)?;
                talk.exchange(b"hello", PATIENCE)?;
                talks.push(talk);
            }
        }
    }
    let mut all_go_on = |patience| -> Result<()> {
        for _ in 0..2 {
            for talk in &mut talks {
                talk.exchange(&[b'x'; 5_000], patience)?;
            }
        }
        Ok(())
    };
    all_go_on(PATIENCE)?;
    // The application sees the client itself each time.
    for service in &services {
        let peers = service.peers();
        let same = peers.iter().all(|peer| peer.ip() == peers[0].ip());
        assert!(same && peers.len() >= 4, "{peers:?}");
    }
    daemons.new.kill()?;
    let mut again = setup.start(Role::New)?;
    again.wait_until_up()?;
    all_go_on(RECOVERY)?;
    daemons.old.kill()?;
    let mut old = setup.start(Role::Old)?;
    old.wait_until_up()?;
    all_go_on(RECOVERY)?;
    // They end, and the next ones have the same ports again, once the client's own kernel gives
    // these out.
    lab.client()
        .namespace()
        .set_sysctls(&[("ipv4/tcp_tw_reuse", "1")])?;
    drop(talks);
    let client = lab.client().from_port(45_000);
    for to in ENDS.into_iter().flatten() {
        let answer = poll_until(PATIENCE, Duration::from_millis(200), || {
            client.get((to, 80)).ok()
        });
        assert!(answer.is_some(), "{:?}", client.get((to, 80)));
    }
    Ok(())
}

#[test]
fn packets_are_delivered_to_where_the_old_servers_settings_name_the_new_one() -> Result {
    let lab = Lab::new()?;
    lab.set_address(lab.new_server(), UPLINK, BESIDE, 24, true)?;
    let setup = setup(&lab)?.peer(Role::Old, BESIDE);
    let _application = Service::start(lab.new_server(), BESIDE)?;
    let is_delivered_to = |daemon: &Daemon<'_>, addr: Ipv4Addr| {
        let there = poll_until(PATIENCE, Duration::from_millis(50), || {
            let status = daemon.status().ok()?;
            (status.tunnel()["deliver_to"] == addr.to_string()).then_some(())
        });
        assert!(there.is_some(), "{:?}", daemon.status());
    };
    // Whoever is started later begins the handshake.
    let mut old = setup.start(Role::Old)?;
    let mut new = setup.start(Role::New)?;
    old.wait_until_up()?;
    new.wait_until_up()?;
    is_delivered_to(&new, BESIDE);
    let mut talk = lab.client().converse(MOVED)?;
    talk.exchange(b"hello", PATIENCE)?;
    for _ in 0..2 {
        old.kill()?;
        old = setup.start(Role::Old)?;
        old.wait_until_up()?;
        is_delivered_to(&new, BESIDE);
        talk.exchange(b"again", RECOVERY)?;
        new.kill()?;
        new = setup.start(Role::New)?;
        new.wait_until_up()?;
        is_delivered_to(&new, BESIDE);
        talk.exchange(b"again", RECOVERY)?;
    }
    // It goes: the next one takes its place at once.
    lab.set_address(lab.new_server(), UPLINK, BESIDE, 24, false)?;
    is_delivered_to(&new, NEW);
    Ok(())
}
