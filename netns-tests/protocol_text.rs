//! `contrib/protocol.md` is complete: a second implementation made from it works with the daemon.
//!
//! ```text
//!                                        ┌── old server 192.0.2.1:
//!                                        │   second implementation, or daemon
//!  client ─────────────────── router ────┤              ║ tunnel
//!                                        └── new server 198.51.100.2:
//!                                            daemon, or second implementation
//! ```

use std::net::UdpSocket;
use std::time::Duration;

use blake2::{Blake2s256, Digest as _};
use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use ipmoved::internals::Role;
use ipmoved::lab::daemon::read_psk;
use ipmoved::lab::topology::{CLIENT, MOVED, NEW, OLD};
use ipmoved::lab::{Lab, LabError, Namespace, UdpService, poll_until};

use crate::independent_peer::IndependentPeer;
use crate::stage::{PATIENCE, Result, SILENCE, setup};

/// The UDP port that daemons listen on by default.
const PORT: u16 = 51_850;

/// A socket on a host, connected to a daemon.
pub(crate) fn socket_to(host: &Namespace, daemon: std::net::Ipv4Addr) -> Result<UdpSocket> {
    host.run(|| {
        UdpSocket::bind("0.0.0.0:0")
            .and_then(|socket| socket.connect((daemon, PORT)).map(|()| socket))
            .map_err(|error| LabError::unexpected(format!("no socket: {error}")))
    })
}

/// Section 6: the announcement of an old server that has moved these addresses, whole.
pub(crate) fn old_announcement(id: u32, moved: &[std::net::Ipv4Addr]) -> Vec<u8> {
    let mut message = vec![4];
    message.extend(id.to_le_bytes());
    message.extend([0, 1]);
    message.push(1);
    message.extend(1500u16.to_le_bytes());
    message.push(moved.len() as u8);
    for addr in moved {
        message.push(4);
        message.extend(addr.octets());
        message.extend([0, 0]);
    }
    message
}

/// Section 6: the beginning of progress with one entry, about this address, moved whole.
fn progress_of(moved: std::net::Ipv4Addr) -> Vec<u8> {
    let bytes = [&[4][..], &moved.octets(), &[0, 0, 32]].concat();
    let name = Blake2s256::digest(&bytes);
    [&[1, 2, 1], &name[..8]].concat()
}

#[test]
fn it_can_be_the_old_server_of_our_daemon() -> Result {
    for cipher in ["aes-256-gcm", "chacha20-poly1305", "aegis-256x4"] {
        let lab = Lab::new()?;
        let setup = setup(&lab)?
            .without_peer(Role::New)
            .args(Role::New, &["--cipher", cipher]);
        let _echo = UdpService::start(lab.new_server(), (NEW, 53))?;
        let mut daemon = setup.start(Role::New)?;
        daemon.wait_for_state("connecting", PATIENCE)?;
        let psk = read_psk(setup.psk_file(Role::New))?;
        let mut peer = IndependentPeer::new(socket_to(lab.old_server(), NEW)?, &psk, 1);
        peer.shake_hands()?;
        daemon.wait_until_up()?;
        assert_eq!(daemon.status()?.tunnel()["cipher"], cipher);

        peer.control(&old_announcement(1, &[MOVED]));
        // It says at once who it is, and where it delivers as soon as that is clear.
        let delivers = |told: &Vec<u8>| told[3] & 1 == 1;
        peer.serve(PATIENCE, |it| {
            it.heard(&[5, 1, 0, 0, 0, 0]) && it.announcement.get(&0).is_some_and(delivers)
        })?;
        // Role, MTU, flags (IPv4 and IPv6 here), and the address to deliver IPv4 to.
        let told = &peer.announcement[&0];
        assert_eq!((told[0], &told[1..3]), (2, &1500u16.to_le_bytes()[..]));
        assert_eq!(told[3] & 0b1101, 1, "{told:?}");
        assert_eq!(told[4..8], NEW.octets());

        peer.control(&[2, 7, 0, 0, 0]);
        peer.serve(PATIENCE, |it| it.heard(&[3, 7, 0, 0, 0]))?;
        let mut probe = vec![0; 1_300 - 32];
        probe[..3].copy_from_slice(&[7, 0x14, 0x05]);
        peer.control(&probe);
        peer.serve(PATIENCE, |it| it.heard(&[8, 0x14, 0x05]))?;

        // A packet there, and the application's reply back, with the moved address as its source.
        for round in 0..3u8 {
            let mut packet = Vec::new();
            PacketBuilder::ipv4(CLIENT.octets(), MOVED.octets(), 60)
                .udp(4000, 53)
                .write(&mut packet, &[round; 30])
                .expect("a packet");
            peer.packets.clear();
            peer.packet(&packet);
            peer.serve(PATIENCE, |it| !it.packets.is_empty())?;
            let replies = std::mem::take(&mut peer.packets);
            let reply = SlicedPacket::from_ip(&replies[0]).expect("an IP packet");
            let Some(NetSlice::Ipv4(ip)) = &reply.net else {
                panic!("not IPv4: {reply:?}");
            };
            assert_eq!(ip.header().source_addr(), MOVED);
            assert_eq!(ip.header().destination_addr(), CLIENT);
            let Some(TransportSlice::Udp(udp)) = &reply.transport else {
                panic!("not UDP: {reply:?}");
            };
            assert_eq!((udp.source_port(), udp.destination_port()), (53, 4000));
            assert_eq!(udp.payload(), [round; 30]);
            // The next round uses a session of its own.
            peer.shake_hands()?;
        }
        // One conversation, since no port is named nobody says who listens.
        let counts = [
            [0; 1].as_slice(),
            &[0, 0, 0, 1],
            &[0, 0, 0, 0, 0, 0, 0, 1],
            &[0; 8],
        ];
        let told = [progress_of(MOVED), counts.concat()].concat();
        peer.serve(PATIENCE, |it| it.heard(&told))?;
        let status = daemon.status()?;
        assert_eq!(status.all_drops().len(), 0, "{:?}", status.all_drops());
        assert_eq!(status.state(), "up");
        assert_eq!(status.tunnel()["moved"][0], MOVED.to_string());

        peer.control(&[6]);
        daemon.wait_for_state("down", PATIENCE)?;
    }
    Ok(())
}

#[test]
fn it_can_be_the_new_server_of_our_daemon() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.without_peer(Role::New);
    let psk = read_psk(setup.psk_file(Role::New))?;
    // The old server's daemon expects its peer at this port.
    let socket = lab.new_server().run(|| {
        UdpSocket::bind((NEW, PORT))
            .and_then(|socket| socket.connect((OLD, PORT)).map(|()| socket))
            .map_err(|error| LabError::unexpected(format!("no socket: {error}")))
    })?;
    let mut peer = IndependentPeer::new(socket, &psk, 2);
    let mut daemon = setup.start(Role::Old)?;
    peer.grant()?;
    // The initiator shows its keys by a keepalive; after that we may send.
    peer.serve(PATIENCE, |it| it.heard(&[1]))?;
    let told = [&[4, 1, 0, 0, 0, 0, 1, 2, 0xdc, 5, 1][..], &NEW.octets()].concat();
    peer.control(&told);
    peer.serve(PATIENCE, |it| {
        it.heard(&[5, 1, 0, 0, 0, 0]) && it.announcement.contains_key(&0)
    })?;
    daemon.wait_until_up()?;
    let moved = &peer.announcement[&0];
    assert_eq!((moved[0], moved[3]), (1, 1), "one move");
    // The move, the address of the new server, and that nothing else is let out.
    let rest = [&[4][..], &MOVED.octets(), &[0, 0, 4], &NEW.octets(), &[0]];
    assert_eq!(moved[4..], rest.concat());
    assert_eq!(daemon.status()?.tunnel()["deliver_to"], NEW.to_string());

    // How far the move has come; then what is malformed, or is about another move.
    let counts = [
        &[1][..],
        &[0, 0, 0, 9],
        &[0, 0, 0, 0, 0, 0, 1, 0],
        &[0; 7],
        &[5],
    ]
    .concat();
    let progress = [progress_of(MOVED), counts.clone()].concat();
    peer.control(&progress);
    peer.control(&progress[..progress.len() - 1]);
    peer.control(&[&progress_of(MOVED)[..], &[3][..], &counts[1..]].concat());
    peer.control(&[&progress_of(NEW)[..], &counts[..]].concat());
    peer.control(&[1, 2, 37]);
    peer.control(&[2, 9, 0, 0, 0]);
    peer.serve(PATIENCE, |it| it.heard(&[3, 9, 0, 0, 0]))?;
    let status = daemon.status()?;
    let moved = MOVED.to_string();
    let expected = serde_json::json!([{
        "what": moved, "listens": "yes", "live": 9, "by_tunnel": 256, "directly": 5,
    }]);
    assert_eq!(status.tunnel()["progress"], expected);
    assert_eq!(status.all_drops().len(), 0, "{:?}", status.all_drops());

    // A client asks the moved address. The second implementation plays the application, too.
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| lab.client().udp((MOVED, 53), b"anybody there?"));
        peer.serve(PATIENCE, |it| !it.packets.is_empty())?;
        let packets = std::mem::take(&mut peer.packets);
        let asked = SlicedPacket::from_ip(&packets[0]).expect("an IP packet");
        let Some(TransportSlice::Udp(udp)) = &asked.transport else {
            panic!("not UDP: {asked:?}");
        };
        assert_eq!(udp.payload(), b"anybody there?");
        let mut reply = Vec::new();
        PacketBuilder::ipv4(MOVED.octets(), CLIENT.octets(), 60)
            .udp(53, udp.source_port())
            .write(&mut reply, b"anybody there?")
            .expect("a packet");
        peer.packet(&reply);
        let answered = asking.join();
        answered.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok(())
    })
}

#[test]
fn what_the_text_refuses_is_refused_and_counted() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.without_peer(Role::New);
    let mut daemon = setup.start(Role::New)?;
    daemon.wait_for_state("connecting", PATIENCE)?;
    let psk = read_psk(setup.psk_file(Role::New))?;
    let mut peer = IndependentPeer::new(socket_to(lab.old_server(), NEW)?, &psk, 1);
    peer.shake_hands()?;
    daemon.wait_until_up()?;
    let refused = |what: &str, reason: &str, datagram: Vec<u8>| -> Result {
        let before = setup.status(Role::New)?.drops(reason);
        peer.socket().send(&datagram).expect("sent");
        let counted = poll_until(PATIENCE, Duration::from_millis(20), || {
            let status = setup.status(Role::New).ok()?;
            (status.drops(reason) > before).then_some(())
        });
        counted.ok_or(LabError::unexpected(format!("{what}: no {reason}")))
    };
    let mut other = IndependentPeer::new(socket_to(lab.old_server(), NEW)?, &psk, 1);
    other.shake_hands()?;
    let replayed = other.seal(8, 255, &[1]);
    other.socket().send(&replayed).expect("sent");
    refused("a replay", "replay", replayed)?;
    let good = other.seal(0, 0, &[0; 40]);
    let changed = |at: usize, to: u8| {
        let mut datagram = good.clone();
        datagram[at] = to;
        datagram
    };
    refused("an unknown flag", "wire_malformed", changed(1, 16))?;
    refused("a reserved byte", "wire_malformed", changed(3, 1))?;
    refused("a changed flag", "open_auth", changed(1, 1))?;
    refused("another counter", "open_auth", changed(8, 77))?;
    refused("a lane not announced", "open_auth", changed(2, 9))?;
    refused("another index", "session_unknown", {
        let mut datagram = good.clone();
        datagram[4] ^= 1;
        datagram
    })?;
    refused("no IP packet", "ip_malformed", good.clone())?;
    refused(
        "an unknown message",
        "wire_malformed",
        other.seal(8, 255, &[99]),
    )?;
    refused(
        "an empty message",
        "wire_malformed",
        other.seal(8, 255, &[]),
    )?;
    let stale = other.initiation();
    let newer = other.initiation();
    other.socket().send(&newer.bytes).expect("sent");
    std::thread::sleep(SILENCE);
    refused("an older initiation", "handshake_replay", stale.bytes)?;
    let mut version = other.initiation().bytes;
    version[1] = 2;
    refused("another version", "wire_version", version)?;
    let mut tampered = other.initiation().bytes;
    tampered[50] ^= 1;
    refused("a changed initiation", "handshake_auth", tampered)?;
    let mut same_role = IndependentPeer::new(socket_to(lab.old_server(), NEW)?, &psk, 2);
    let initiation = same_role.initiation();
    refused("the same role", "handshake_role", initiation.bytes)?;
    Ok(())
}
