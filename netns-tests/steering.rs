//! On the new server, exactly what came by the tunnel goes back into it.
//!
//! ```text
//!  client ─────────┐            ┌── old server ══╗
//!                  ├── router ──┤                ║
//!  second client ──┘            └── new server ──╝ application, and conversations of its own
//!       the stranger speaks in the name of the second client
//! ```

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use ipmoved::internals::Role;
use ipmoved::lab::topology::{
    Leg, MOVED, MOVED6, NEW, NEW6, SECOND_CLIENT, SECOND_CLIENT6, UPLINK,
};
use ipmoved::lab::{
    DaemonSetup, Lab, LabError, Namespace, RawSocket, UdpService, Wire, packets, patience,
    poll_until,
};
use socket2::{Domain, Socket, Type};

use crate::stage::{PATIENCE, Result, SILENCE, setup};

/// The new server's address, the second client's, and the moved one, of each family.
fn ends() -> [[IpAddr; 3]; 2] {
    [
        [NEW.into(), SECOND_CLIENT.into(), MOVED.into()],
        [NEW6.into(), SECOND_CLIENT6.into(), MOVED6.into()],
    ]
}

fn failed(error: std::io::Error) -> LabError {
    LabError::unexpected(error.to_string())
}

fn udp(host: &Namespace, addr: IpAddr, port: u16) -> Result<UdpSocket> {
    host.run(|| {
        let socket = UdpSocket::bind((addr, port)).map_err(failed)?;
        socket
            .set_read_timeout(Some(patience(PATIENCE)))
            .map_err(failed)?;
        Ok(socket)
    })
}

/// Runs a test while an address of each family has moved.
fn both_moved(test: impl FnOnce(&Lab, &DaemonSetup<'_>) -> Result<()>) -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.moves(&["192.0.2.5", "2001:db8:a::5"]);
    let daemons = setup.start_both()?;
    // Both are served.
    for [here, _, moved] in ends() {
        let _echo = UdpService::start(lab.new_server(), (here, 9))?;
        lab.client().udp((moved, 9), b"served")?;
    }
    test(&lab, &setup)?;
    drop(daemons);
    Ok(())
}

/// What the stranger sends, so that the router hands it to the old server.
fn stranger(lab: &Lab) -> Result<Wire> {
    Wire::new(lab.router(), "old", lab.old_server(), UPLINK)
}

#[test]
fn a_stranger_diverts_no_datagram_of_the_new_server() -> Result {
    both_moved(|lab, _| {
        let stranger = stranger(lab)?;
        for [here, remote, moved] in ends() {
            let own = udp(lab.new_server(), here, 123)?;
            let far = udp(lab.clients(), remote, 123)?;
            for round in 0..20 {
                own.send_to(&[round], (remote, 123)).map_err(failed)?;
                let mut told = [0; 100];
                let (_, from) = far.recv_from(&mut told).map_err(failed)?;
                assert_eq!((from, told[0]), (SocketAddr::new(here, 123), round));
                stranger.send(&packets::udp((remote, 123), (moved, 123), b"forged"))?;
            }
        }
        Ok(())
    })
}

/// The stranger names every port that a program of the new server may open next.
#[test]
fn a_stranger_that_comes_first_diverts_nothing_of_who_opens_the_port_later() -> Result {
    both_moved(|lab, _| {
        let stranger = stranger(lab)?;
        let ports = || 30_000..30_020;
        for [here, remote, moved] in ends() {
            let far = udp(lab.clients(), remote, 53)?;
            let listen = || TcpListener::bind((remote, 443)).map_err(failed);
            let listener = lab.clients().run(listen)?;
            for port in ports() {
                stranger.send(&packets::udp((remote, 53), (moved, port), b"forged"))?;
                // Directly, too, so that the server seems to answer.
                let direct = Wire::new(lab.router(), "new", lab.new_server(), UPLINK)?;
                direct.send(&packets::udp((remote, 53), (here, port), b"forged"))?;
                if let (IpAddr::V4(remote), IpAddr::V4(moved)) = (remote, moved) {
                    stranger.send(&packets::syn((remote, 443), (moved, port)))?;
                }
            }
            std::thread::sleep(SILENCE);
            for port in ports() {
                let own = udp(lab.new_server(), here, port)?;
                let mut told = [0; 100];
                for round in 0..3 {
                    own.send_to(&[round], (remote, 53)).map_err(failed)?;
                    let (_, from) = far.recv_from(&mut told).map_err(failed)?;
                    assert_eq!((from, told[0]), (SocketAddr::new(here, port), round));
                    stranger.send(&packets::udp((remote, 53), (moved, port), b"forged"))?;
                }
                let connect = || connect_from(SocketAddr::new(here, port), (remote, 443).into());
                let _own = lab.new_server().run(connect)?;
                let (_, from) = listener.accept().map_err(failed)?;
                assert_eq!(from, SocketAddr::new(here, port));
            }
            // A service that is opened after a client's first question answers the next one.
            let client = udp(lab.clients(), remote, 40_000)?;
            client
                .send_to(b"too early", (moved, 5061))
                .map_err(failed)?;
            std::thread::sleep(SILENCE);
            let _echo = UdpService::start(lab.new_server(), (here, 5061))?;
            client.set_nonblocking(true).map_err(failed)?;
            let mut told = [0; 100];
            let answer = poll_until(PATIENCE, Duration::from_millis(100), || {
                client.send_to(b"again", (moved, 5061)).ok()?;
                client.recv_from(&mut told).ok()
            });
            assert_eq!(
                answer.map(|(_, from)| from),
                Some(SocketAddr::new(moved, 5061))
            );
        }
        Ok(())
    })
}

/// A TCP connection from this address and port.
fn connect_from(from: SocketAddr, to: SocketAddr) -> Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).map_err(failed)?;
    socket.bind(&from.into()).map_err(failed)?;
    socket
        .connect_timeout(&to.into(), PATIENCE)
        .map_err(failed)?;
    Ok(socket.into())
}

#[test]
fn a_stranger_diverts_no_protocol_without_ports() -> Result {
    both_moved(|lab, _| {
        let stranger = stranger(lab)?;
        for [here, remote, moved] in ends() {
            for protocol in [50, 47] {
                let own = RawSocket::open(lab.new_server(), here, protocol)?;
                let far = RawSocket::open(lab.clients(), remote, protocol)?;
                for round in 0..5 {
                    let words = [b'o', b'w', b'n', round];
                    own.send(remote, &words)?;
                    let (from, _) = far.expect(PATIENCE, |seen| seen == words)?;
                    assert_eq!(from, here, "protocol {protocol}");
                    stranger.send(&packets::ip(remote, moved, protocol, b"forged"))?;
                }
            }
        }
        Ok(())
    })
}

#[test]
fn a_stranger_diverts_no_connection_of_the_new_server() -> Result {
    both_moved(|lab, setup| {
        let stranger = stranger(lab)?;
        let (here, remote) = (NEW, SECOND_CLIENT);
        let listen = || TcpListener::bind((remote, 443)).map_err(failed);
        let listener = lab.clients().run(listen)?;
        let connect = || TcpStream::connect((remote, 443)).map_err(failed);
        let mut own = lab.new_server().run(connect)?;
        let (mut far, from) = listener.accept().map_err(failed)?;
        assert_eq!(from.ip(), IpAddr::from(here));
        far.set_read_timeout(Some(patience(PATIENCE)))
            .map_err(failed)?;
        for round in 0..10 {
            let (ends, to) = ((remote, 443), (MOVED, from.port()));
            // A SYN begins another connection, to which this host sees what follows.
            let forged = match round < 5 {
                true => packets::blind(ends, to, b"forged"),
                false => packets::syn(ends, to),
            };
            stranger.send(&forged)?;
            std::thread::sleep(Duration::from_millis(50));
            own.write_all(&[round]).map_err(failed)?;
            let mut told = [0];
            far.read_exact(&mut told).map_err(failed)?;
            assert_eq!(told, [round]);
        }
        // The daemon asks the kernel every second.
        let counted = poll_until(PATIENCE, Duration::from_millis(100), || {
            let drops = setup.status(Role::New).ok()?.all_drops();
            drops
                .get("direct_connection")
                .copied()
                .filter(|&count| count >= 5)
        });
        assert!(counted.is_some(), "it is not counted");
        Ok(())
    })
}

#[test]
fn a_peer_with_a_fixed_port_is_answered_by_the_address_that_it_asks() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.moves(&["192.0.2.5", "2001:db8:a::5"]);
    let _application = ipmoved::lab::Service::start(lab.new_server(), NEW)?;
    let _echoes = [
        UdpService::start(lab.new_server(), (NEW, 5060))?,
        UdpService::start(lab.new_server(), (NEW6, 5060))?,
    ];
    let _daemons = setup.start_both()?;
    let peer = lab.client().from_port(5060);
    for _ in 0..3 {
        for [new, _, moved] in ends() {
            peer.udp((moved, 5060), b"by the tunnel")?;
            peer.udp((new, 5060), b"directly")?;
        }
    }
    for (port, [first, second]) in [(45_000, [MOVED, NEW]), (45_001, [NEW, MOVED])] {
        let client = lab.client().from_port(port);
        client.get(first)?.is_answered_by(NEW)?;
        client.get(second)?.is_answered_by(NEW)?;
    }
    Ok(())
}

#[test]
fn what_an_application_pushes_over_a_crash_never_leaves_with_its_own_address() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.moves(&["192.0.2.5", "2001:db8:a::5"]);
    let daemons = setup.start_both()?;
    let mut talks = Vec::new();
    for [here, _, moved] in ends() {
        let application = udp(lab.new_server(), here, 7_000)?;
        let client = lab.client().udp_socket((moved, 7_000))?;
        client.send(b"push to me").map_err(failed)?;
        let (_, from) = application.recv_from(&mut [0; 100]).map_err(failed)?;
        talks.push((application, client, from));
    }
    let tap = lab.tap(Leg::New)?;
    daemons.new.kill()?;
    for (application, _, from) in &talks {
        let _ = application.send_to(b"nobody hears this", from);
    }
    std::thread::sleep(SILENCE);
    let mut again = setup.start(Role::New)?;
    again.wait_until_up()?;
    for (application, client, from) in &talks {
        application.send_to(b"heard again", from).map_err(failed)?;
        let mut told = [0; 100];
        let length = client.recv(&mut told).map_err(failed)?;
        assert_eq!(&told[..length], b"heard again");
    }
    let seen = tap.stop()?;
    for words in [&b"nobody hears this"[..], b"heard again"] {
        assert_eq!(seen.frames_with(words), 0, "it left with its own address");
    }
    Ok(())
}

/// A stream to a client that says nothing for a while, and a stranger who comes in its name.
#[test]
fn a_forged_direct_datagram_takes_a_client_for_a_second_at_most() -> Result {
    both_moved(|lab, _| {
        for [here, _, moved] in ends() {
            let application = udp(lab.new_server(), here, 5_004)?;
            let client = lab.client().udp_socket((moved, 5_004))?;
            client.send(b"stream to me").map_err(failed)?;
            let (_, from) = application.recv_from(&mut [0; 100]).map_err(failed)?;
            let push = |words: &[u8]| application.send_to(words, from).map_err(failed);
            let hears = |words: &[u8]| {
                let mut told = [0; 100];
                let length = client.recv(&mut told).map_err(failed)?;
                assert_eq!(&told[..length], words);
                Ok::<_, LabError>(())
            };
            push(b"before")?;
            hears(b"before")?;
            let direct = Wire::new(lab.router(), "new", lab.new_server(), UPLINK)?;
            let ends = (from.ip(), from.port());
            direct.send(&packets::udp(ends, (here, 5_004), b"forged"))?;
            application.recv_from(&mut [0; 100]).map_err(failed)?;
            // Who really came directly is answered from there.
            let tap = lab.tap(Leg::New)?;
            push(b"an answer")?;
            std::thread::sleep(Duration::from_millis(1_200));
            assert!(tap.stop()?.frames_with(b"an answer") > 0);
            push(b"after")?;
            hears(b"after")?;
            // The client itself ends it at once.
            direct.send(&packets::udp(ends, (here, 5_004), b"forged"))?;
            application.recv_from(&mut [0; 100]).map_err(failed)?;
            client.send(b"still here").map_err(failed)?;
            application.recv_from(&mut [0; 100]).map_err(failed)?;
            push(b"at once")?;
            hears(b"at once")?;
        }
        Ok(())
    })
}

/// Nothing of the first daemon is left, so the second one has to go by where connections stand.
#[test]
fn established_connections_outlive_a_restart_without_memory() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let _application = ipmoved::lab::Service::start(lab.new_server(), NEW)?;
    let daemons = setup.start_both()?;
    let mut talk = lab.client().converse(MOVED)?;
    talk.exchange(b"before", PATIENCE)?;
    // One that never went by the tunnel.
    let listen = || TcpListener::bind((SECOND_CLIENT, 443)).map_err(failed);
    let listener = lab.clients().run(listen)?;
    let connect = || TcpStream::connect((SECOND_CLIENT, 443)).map_err(failed);
    let mut own = lab.new_server().run(connect)?;
    let (mut far, from) = listener.accept().map_err(failed)?;
    far.set_read_timeout(Some(patience(PATIENCE)))
        .map_err(failed)?;
    // Without a daemon the server would send again, directly, what nobody has acknowledged yet.
    std::thread::sleep(SILENCE);
    daemons.new.terminate()?;
    let mut again = setup.start(Role::New)?;
    again.wait_until_up()?;
    talk.exchange(b"after", PATIENCE)?;
    let stranger = stranger(&lab)?;
    for round in 0..5 {
        let ends = ((SECOND_CLIENT, 443), (MOVED, from.port()));
        stranger.send(&packets::blind(ends.0, ends.1, b"forged"))?;
        std::thread::sleep(Duration::from_millis(50));
        own.write_all(&[round]).map_err(failed)?;
        let mut told = [0];
        far.read_exact(&mut told).map_err(failed)?;
        assert_eq!(told, [round]);
    }
    Ok(())
}
