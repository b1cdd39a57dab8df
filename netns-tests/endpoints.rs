//! A daemon learns its peer's address from authenticated datagrams, and follows it.
//!
//! ```text
//!  old server 192.0.2.1 ── router, or a relay on it ── new server 198.51.100.2
//!                                                      (in one test also .3)
//! ```

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::thread;
use std::time::Duration;

use ipmoved::internals::Role;
use ipmoved::lab::tap::PacketKind;
use ipmoved::lab::topology::{Leg, MOVED, NEW, OLD, UPLINK};
use ipmoved::lab::{Lab, LabError, Service, Tap, UdpService, patience, poll_until};

use crate::relay::{Fate, PORT, Relay};
use crate::stage::{PATIENCE, Result, SILENCE, moved, setup};
use crate::stream::Stream;

/// A second address of the new server.
const NEW_SECOND: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 3);
/// The address that replaces the old server's own.
const OLD_NEXT: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 250);

fn endpoint_changes(setup: &ipmoved::lab::DaemonSetup<'_>, from: &str) -> Result<String> {
    let changed = poll_until(PATIENCE, Duration::from_millis(20), || {
        let endpoint = setup.status(Role::New).ok()?.endpoint().to_owned();
        (endpoint != from).then_some(endpoint)
    });
    changed.ok_or_else(|| LabError::unexpected(format!("the endpoint is still {from}")))
}

#[test]
fn replies_follow_a_peer_whose_nat_gives_it_another_port() -> Result {
    let lab = Lab::new()?;
    let relay = Relay::start(&lab)?;
    let setup = Relay::setup(&lab)?.without_peer(Role::New);
    let _application = Service::start(lab.new_server(), NEW)?;
    let _daemons = setup.start_both()?;
    let mut conversation = lab.client().converse(MOVED)?;
    conversation.exchange(b"before", PATIENCE)?;
    for _ in 0..3 {
        let before = setup.status(Role::New)?.endpoint().to_owned();
        relay.record();
        relay.rebind(Role::New);
        thread::sleep(Duration::from_millis(50));
        let took = conversation.exchange(b"after", PATIENCE)?;
        assert!(took < patience(Duration::from_secs(1)), "{took:?}");
        let after = endpoint_changes(&setup, &before)?;
        // Recorded datagrams that are sent again from elsewhere move nothing.
        let stranger = lab.client().udp_socket((NEW, PORT))?;
        for (_, bytes) in relay.recorded() {
            let _ = stranger.send(&bytes);
        }
        thread::sleep(Duration::from_millis(200));
        assert_eq!(setup.status(Role::New)?.endpoint(), after);
        conversation.exchange(b"still", PATIENCE)?;
    }
    Ok(())
}

#[test]
fn a_message_that_was_kept_back_does_not_move_the_endpoint() -> Result {
    let lab = Lab::new()?;
    let relay = Relay::start(&lab)?;
    let setup = Relay::setup(&lab)?;
    let _daemons = setup.start_both()?;
    let before = setup.status(Role::New)?.endpoint().to_owned();
    // The relay holds one control message of the old server, and later ones overtake it.
    let mut taken = 0;
    relay.rule(move |from, bytes| {
        let control = from == Role::Old && bytes[0] == 4 && bytes[2] == 255;
        taken += u32::from(control);
        match control && taken == 1 {
            true => Fate::Hold,
            false => Fate::Pass,
        }
    });
    relay.record();
    let overtaken = poll_until(Duration::from_secs(12), Duration::from_millis(50), || {
        let held = relay.held().first()?.1.clone();
        let counter = |bytes: &[u8]| {
            bytes[8..16]
                .iter()
                .rev()
                .fold(0u64, |n, &b| n << 8 | u64::from(b))
        };
        let record = relay.recorded();
        let newer = record.iter().any(|(from, bytes)| {
            *from == Role::Old
                && bytes[0] == 4
                && bytes[2] == 255
                && bytes[4..8] == held[4..8]
                && counter(bytes) > counter(&held)
        });
        relay.record();
        newer.then_some(held)
    })
    .ok_or_else(|| LabError::unexpected("no control message overtook another"))?;
    let stranger = lab.client().udp_socket((NEW, PORT))?;
    stranger.send(&overtaken).expect("sent");
    thread::sleep(Duration::from_millis(300));
    assert_eq!(setup.status(Role::New)?.endpoint(), before);
    // It did arrive, so it is a replay now.
    stranger.send(&overtaken).expect("sent");
    let counted = poll_until(PATIENCE, Duration::from_millis(20), || {
        (setup.status(Role::New).ok()?.drops("replay") > 0).then_some(())
    });
    assert!(counted.is_some(), "it was not accepted the first time");
    Ok(())
}

#[test]
fn a_server_that_changes_its_own_address_is_followed_at_once() -> Result {
    moved(|on| {
        let old = on.lab.old_server();
        // The second address becomes the first when the first goes.
        old.set_sysctls(&[("ipv4/conf/all/promote_secondaries", "1")])?;
        let mut conversation = on.lab.client().converse(MOVED)?;
        conversation.exchange(b"before", PATIENCE)?;
        on.lab.set_address(old, UPLINK, OLD_NEXT, 24, true)?;
        on.lab.set_address(old, UPLINK, OLD, 24, false)?;
        let took = conversation.exchange(&[9; 20_000], PATIENCE)?;
        assert!(took < patience(Duration::from_secs(2)), "{took:?}");
        let endpoint = on.daemons.new.status()?.endpoint().to_owned();
        assert!(!endpoint.starts_with(&format!("{OLD}:")), "{endpoint}");
        assert!(endpoint.starts_with("192.0.2."), "{endpoint}");
        Ok(())
    })
}

#[test]
fn either_side_may_leave_out_where_the_other_is() -> Result {
    for silent in [Role::Old, Role::New] {
        let lab = Lab::new()?;
        let setup = setup(&lab)?.without_peer(silent);
        let _application = Service::start(lab.new_server(), NEW)?;
        let mut waiting = setup.start(silent)?;
        waiting.wait_for_state("connecting", PATIENCE)?;
        let mut calling = setup.start(silent.other())?;
        calling.wait_until_up()?;
        waiting.wait_until_up()?;
        lab.client().get(MOVED)?.is_answered_by(NEW)?;
        // The tunnel comes back after a restart of the side that waits.
        waiting.kill()?;
        let mut again = setup.start(silent)?;
        again.wait_until_up()?;
        lab.client().get(MOVED)?.is_answered_by(NEW)?;
    }
    Ok(())
}

#[test]
fn the_reply_leaves_from_the_address_it_was_sent_to() -> Result {
    let lab = Lab::new()?;
    lab.set_address(lab.new_server(), UPLINK, NEW_SECOND, 24, true)?;
    let setup = setup(&lab)?
        .peer(Role::Old, NEW_SECOND)
        .without_peer(Role::New)
        .args(Role::New, &["--deliver-to", &NEW.to_string()]);
    let _application = Service::start(lab.new_server(), NEW)?;
    let tap = lab.tap(Leg::New)?;
    let _daemons = setup.start_both()?;
    lab.client().get(MOVED)?.is_answered_by(NEW)?;
    let seen = tap.stop()?;
    let tunnel = |kind| match kind {
        PacketKind::Udp { source_port, .. } => source_port == PORT,
        PacketKind::Arp | PacketKind::Tcp { .. } | PacketKind::Icmp { .. } | PacketKind::Other => {
            false
        }
    };
    let sources: BTreeSet<IpAddr> = seen
        .packets()
        .filter(|packet| tunnel(packet.kind))
        .map(|packet| packet.source)
        .collect();
    assert_eq!(sources, BTreeSet::from([OLD.into(), NEW_SECOND.into()]));
    Ok(())
}

#[test]
fn a_name_is_looked_up_again_while_there_is_no_answer() -> Result {
    let lab = Lab::new()?;
    let hosts = lab.dir().join("hosts");
    let write = |text: &str| {
        fs::write(&hosts, text).map_err(|error| LabError::unexpected(error.to_string()))
    };
    // Nobody is there at first.
    write("198.51.100.77 new.example\n")?;
    let setup = setup(&lab)?
        .without_peer(Role::New)
        .peer_by_name(Role::Old, "new.example", &hosts);
    let _application = Service::start(lab.new_server(), NEW)?;
    let mut new = setup.start(Role::New)?;
    let mut old = setup.start(Role::Old)?;
    thread::sleep(Duration::from_secs(2));
    assert_eq!(old.status()?.state(), "connecting");
    write(&format!("{NEW} new.example\n"))?;
    old.wait_for_state("up", Duration::from_secs(13))?;
    new.wait_until_up()?;
    assert_eq!(old.status()?.tunnel()["peer"], "new.example:51850");
    lab.client().get(MOVED)?.is_answered_by(NEW)?;
    Ok(())
}

#[test]
fn the_outer_header_shows_congestion_marks_but_no_traffic_class() -> Result {
    const WORDS: &[u8] = b"of which class are these words";
    /// Expedited forwarding (RFC 3246), ECN-capable.
    const CLASS: u8 = 0xb8 | 0x02;
    moved(|on| {
        let _echo = UdpService::start(on.lab.new_server(), (NEW, 53))?;
        let outside = on.lab.tap(Leg::Old)?;
        let inside = Tap::start(on.lab.new_server(), "ipmoved0")?;
        let socket = socket2::Socket::from(on.lab.client().udp_socket((MOVED, 53))?);
        socket.set_tos_v4(u32::from(CLASS)).expect("a class");
        for _ in 0..20 {
            socket.send(WORDS).expect("sent");
        }
        thread::sleep(SILENCE);
        let inner: BTreeSet<u8> = inside
            .stop()?
            .frames()
            .filter(|frame| frame.windows(WORDS.len()).any(|words| words == WORDS))
            .filter(|frame| frame[16..20] == NEW.octets())
            .map(|frame| frame[1])
            .collect();
        assert_eq!(inner, BTreeSet::from([CLASS]), "it arrives as it was sent");
        // Ethernet, then IPv4 from the old server's own address.
        let outer: BTreeSet<u8> = outside
            .stop()?
            .frames()
            .filter(|frame| frame.len() > 34 && frame[26..30] == OLD.octets())
            .filter(|frame| frame[23] == 17)
            .map(|frame| frame[15])
            .collect();
        assert!(
            outer.contains(&0x02),
            "ECN-capable, as what is inside: {outer:?}"
        );
        assert!(outer.iter().all(|class| class & !3 == 0), "{outer:?}");
        Ok(())
    })
}

#[test]
fn a_client_that_claims_the_peers_own_address_and_port_does_not_bend_the_tunnel() -> Result {
    moved(|on| {
        let _application = &on.application;
        let mut conversation = on.lab.client().converse(MOVED)?;
        conversation.exchange(b"before", PATIENCE)?;
        // From the clients' side, with the old server's and then the new server's own address and
        // port.
        for liar in [OLD, NEW] {
            on.lab.set_address(on.lab.clients(), "lo", liar, 32, true)?;
            on.lab.clients().run(|| {
                let doing = |error: std::io::Error| LabError::unexpected(error.to_string());
                let socket = UdpSocket::bind((liar, PORT)).map_err(doing)?;
                for _ in 0..50 {
                    socket.send_to(b"bend", (MOVED, PORT)).map_err(doing)?;
                    socket.send_to(b"bend", (MOVED, 53)).map_err(doing)?;
                }
                Ok(())
            })?;
            on.lab
                .set_address(on.lab.clients(), "lo", liar, 32, false)?;
            thread::sleep(Duration::from_millis(300));
            let took = conversation.exchange(&[5; 50_000], PATIENCE)?;
            assert!(took < patience(Duration::from_secs(2)), "{took:?}");
        }
        let stream = {
            let _echo = UdpService::start(on.lab.new_server(), (NEW, 53))?;
            let stream =
                Stream::start(on.lab.client(), (MOVED, 53), 100, Duration::from_millis(2))?;
            thread::sleep(Duration::from_secs(1));
            stream.stop()?
        };
        stream.complete()?;
        for role in [Role::Old, Role::New] {
            assert_eq!(on.setup.status(role)?.state(), "up");
        }
        Ok(())
    })
}
