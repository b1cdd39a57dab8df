//! What others on the path can see, and what strangers get.
//!
//! ```text
//!                                        ┌── old server 192.0.2.1, UDP port 51850
//!  clients (and strangers) ──── router ──┤              ║ tunnel
//!                                        └──(tap)── new server 198.51.100.2, UDP port 51850
//! ```

use ipmoved::internals::Role;
use ipmoved::lab::daemon::{UP_TIMEOUT, read_psk};
use ipmoved::lab::tap::PacketKind;
use ipmoved::lab::topology::{CLIENT, Leg, MOVED, NEW, OLD};
use ipmoved::lab::{Lab, Probe, Service, UdpService, poll_until};

use crate::stage::{MEGABYTE, PATIENCE, RECOVERY, Result, SILENCE, moved, setup};

/// The UDP port that both daemons listen on by default.
const PORT: u16 = 51_850;

const SECRET: &[u8] = b"nobody on the way may read this sentence";

#[test]
fn nothing_readable_and_no_moved_address_is_on_the_new_servers_uplink() -> Result {
    moved(|on| {
        let _echo = UdpService::start(on.lab.new_server(), (NEW, 53))?;
        let tap = on.lab.tap(Leg::New)?;
        let mut conversation = on.lab.client().converse(MOVED)?;
        for _ in 0..20 {
            conversation.exchange(SECRET, PATIENCE)?;
        }
        on.lab.client().get(MOVED)?;
        on.lab.client().download(MOVED, MEGABYTE)?;
        on.lab.client().upload(MOVED, MEGABYTE)?;
        on.lab.client().udp((MOVED, 53), SECRET)?;
        on.lab.client().ping(MOVED, 56)?;
        let seen = tap.stop()?;
        assert_eq!(seen.frames_with(SECRET), 0);
        assert_eq!(seen.frames_with(b"HTTP/1.1"), 0);
        assert_eq!(seen.packets_with(MOVED), 0);
        assert_eq!(seen.packets_with(CLIENT), 0);
        let tunnel = |kind| match kind {
            PacketKind::Udp {
                source_port,
                destination_port,
            } => source_port == PORT && destination_port == PORT,
            PacketKind::Arp => true,
            PacketKind::Tcp { .. } => false,
            PacketKind::Icmp { .. } | PacketKind::Other => kind.is_neighbour_talk(),
        };
        let others: Vec<_> = seen.packets().filter(|p| !tunnel(p.kind)).collect();
        assert_eq!(others, [], "only the tunnel is to be seen");
        assert!(seen.packets_with(OLD) > 50, "{}", seen.packets_with(OLD));
        Ok(())
    })
}

#[test]
fn the_key_is_nowhere_to_be_seen() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let tap = lab.tap(Leg::New)?;
    let mut daemons = setup.start_both()?;
    let psk = read_psk(&lab.dir().join("psk"))?;
    let command = setup.run(Role::New, &["status", "--json"])?.stdout;
    assert!(!command.contains(&psk));
    let said = daemons.new.process().stderr();
    assert!(!said.contains(&psk), "{said}");
    assert_eq!(tap.stop()?.frames_with(psk.as_bytes()), 0);
    Ok(())
}

#[test]
fn with_a_wrong_key_nothing_comes_up_and_the_drop_is_counted() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.another_key(Role::New)?;
    let _application = Service::start(lab.new_server(), NEW)?;
    let _old = setup.start(Role::Old)?;
    let _new = setup.start(Role::New)?;
    let counted = poll_until(UP_TIMEOUT, SILENCE, || {
        let dropped = |role| {
            let status = setup.status(role).ok()?;
            assert_ne!(status.state(), "up");
            (status.drops("handshake_auth") > 0).then_some(())
        };
        dropped(Role::Old).or_else(|| dropped(Role::New))
    });
    assert_eq!(counted, Some(()), "no drop was counted");
    assert!(lab.client().get(MOVED).is_err());
    lab.client().get(NEW)?.is_answered_by(NEW)?;
    Ok(())
}

#[test]
fn a_stranger_gets_no_byte_back() -> Result {
    moved(|on| {
        let tap = on.lab.tap(Leg::Clients)?;
        for server in [OLD, NEW] {
            let socket = on.lab.client().udp_socket((server, PORT))?;
            for length in (0..200).chain([500, 1200, 1472, 9000, 65_000]) {
                for first in [0, 1, 2, 3, 4, 0xff] {
                    let mut datagram = vec![0x5a; length];
                    if let Some(byte) = datagram.first_mut() {
                        *byte = first;
                    }
                    // If the buffer is full, the datagram is lost.
                    let _ = socket.send(&datagram);
                }
            }
            let probe = on.lab.client().probe_udp((server, PORT), SILENCE)?;
            assert_eq!(probe, Probe::Silent);
        }
        let seen = tap.stop()?;
        let back = seen
            .packets()
            .filter(|packet| packet.destination == CLIENT)
            .filter(|packet| packet.kind != PacketKind::Arp)
            .count();
        assert_eq!(back, 0, "packets came back");
        assert!(seen.packets_with(NEW) > 1000);
        on.lab.client().get(MOVED)?.is_answered_by(NEW)?;
        let status = on.daemons.new.status()?;
        let counted: u64 = [
            "wire_malformed",
            "wire_version",
            "handshake_auth",
            "session_unknown",
        ]
        .iter()
        .map(|reason| status.drops(reason))
        .sum();
        assert!(counted > 0, "{status:?}");
        Ok(())
    })
}

#[test]
fn a_recording_that_is_played_back_changes_nothing() -> Result {
    moved(|on| {
        let tap = on.lab.tap(Leg::New)?;
        let mut conversation = on.lab.client().converse(MOVED)?;
        conversation.exchange(SECRET, PATIENCE)?;
        let recorded = tap.stop()?.udp_payloads(PORT);
        assert!(recorded.len() > 3);
        for server in [NEW, OLD] {
            let stranger = on.lab.client().udp_socket((server, PORT))?;
            for datagram in &recorded {
                // A refusal would be an ICMP error, and the next test is about that.
                let _ = stranger.send(datagram);
            }
        }
        conversation.exchange(SECRET, RECOVERY)?;
        let status = on.daemons.new.status()?;
        assert!(status.drops("replay") > 0, "{status:?}");
        assert_eq!(status.state(), "up");
        let endpoint = status.tunnel()["endpoint"].as_str().unwrap_or_default();
        assert!(endpoint.starts_with(&OLD.to_string()), "{endpoint}");
        Ok(())
    })
}
