//! Packets that nobody should send are dropped and counted by reason, and never delivered.
//!
//! ```text
//!  router ── raw ──► old server ══► new server: a watch on ipmoved0 sees delivered packets
//!                    or an impostor with the key
//! ```

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use ipmoved::internals::{Flags, Role};
use ipmoved::lab::topology::{CLIENT, CLIENT6, MOVED, MOVED6, NEW, NEW6, OLD};
use ipmoved::lab::{Lab, UdpService, Watch, Wire, packets, poll_until};

use crate::impostor::Impostor;
use crate::stage::{FAMILIES, PATIENCE, Result, setup};

/// The payload of every bad packet that has one.
const WORDS: &[u8] = b"a packet that must not arrive";

/// What is wrong with a bad packet, its drop reason, and the packet.
type Bad = (&'static str, &'static str, Vec<u8>);

fn udp4(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut packet = packets::udp((CLIENT.into(), 4_000), (MOVED.into(), 53), WORDS);
    change(&mut packet);
    packet
}

/// Corrects the header checksum, so that only the daemon can object.
fn mended(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut packet = udp4(change);
    packets::mend(&mut packet);
    packet
}

fn udp6(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut packet = packets::udp((CLIENT6.into(), 4_000), (MOVED6.into(), 53), WORDS);
    change(&mut packet);
    packet
}

fn from4(source: Ipv4Addr) -> Vec<u8> {
    packets::udp((source.into(), 53), (MOVED.into(), 53), WORDS)
}

/// Packets that are wrong wherever they come from.
fn bad() -> Vec<Bad> {
    let syn = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut packet = packets::syn((CLIENT, 4_000), (MOVED, 80));
        change(&mut packet);
        packet
    };
    let icmp = |payload: &[u8]| packets::ip(CLIENT, MOVED, 1, payload);
    let with_option = |kind: u8, len: u8| {
        mended(|packet| {
            packet.splice(20..20, [kind, len, 4, 0]);
            packet[0] = 0x46;
            packet[3] += 4;
        })
    };
    let mut v6_loop = udp6(|_| ());
    v6_loop.copy_within(24..40, 8);
    vec![
        ("truncated", "ip_malformed", udp4(|p| p.truncate(30))),
        ("truncated IPv6", "ip_malformed", udp6(|p| p.truncate(60))),
        (
            "a length beyond its end",
            "ip_malformed",
            mended(|p| p[2] = 9),
        ),
        (
            "a header longer than all",
            "ip_malformed",
            mended(|p| p[3] = 16),
        ),
        (
            "a UDP length beyond its end",
            "l4_malformed",
            udp4(|p| p[25] = 200),
        ),
        (
            "a UDP length below its header",
            "l4_malformed",
            udp4(|p| p[25] = 7),
        ),
        (
            "UDP without a header",
            "l4_malformed",
            packets::ip(CLIENT, MOVED, 17, b"short"),
        ),
        (
            "TCP without a header",
            "l4_malformed",
            packets::ip(CLIENT, MOVED, 6, WORDS.get(..12).unwrap_or(WORDS)),
        ),
        (
            "a TCP offset below its header",
            "l4_malformed",
            syn(&|p| p[32] = 0x40),
        ),
        (
            "a TCP offset beyond its end",
            "l4_malformed",
            syn(&|p| p[32] = 0xf0),
        ),
        ("a loose source route", "ip_malformed", with_option(131, 3)),
        ("a strict source route", "ip_malformed", with_option(137, 3)),
        (
            "an option that runs out",
            "ip_malformed",
            with_option(7, 40),
        ),
        (
            "a redirect",
            "icmp_unsupported",
            icmp(&[5, 1, 0, 0, 1, 2, 3, 4]),
        ),
        (
            "an ICMP error about nothing",
            "icmp_unrelated",
            icmp(&[&[3, 3][..], &[0; 34]].concat()),
        ),
        ("itself as its source", "bad_source", from4(MOVED)),
        ("itself as its source in IPv6", "bad_source", v6_loop),
        (
            "a loopback source",
            "bad_source",
            from4(Ipv4Addr::LOCALHOST),
        ),
        (
            "a multicast source",
            "bad_source",
            from4(Ipv4Addr::new(224, 0, 0, 1)),
        ),
        (
            "a broadcast source",
            "bad_source",
            from4(Ipv4Addr::BROADCAST),
        ),
        ("no source", "bad_source", from4(Ipv4Addr::UNSPECIFIED)),
        ("a tiny fragment's second", "ip_malformed", {
            let syn = packets::syn((CLIENT, 4_000), (MOVED, 80));
            packets::fragment(&syn, 8, &syn[28..], false, 7)
        }),
        ("a fragment beyond the end", "ip_malformed", {
            packets::fragment(&udp4(|_| ()), 65_528, WORDS, false, 8)
        }),
        (
            "an empty fragment",
            "ip_malformed",
            packets::fragment(&udp4(|_| ()), 16, b"", true, 9),
        ),
        (
            "a ragged fragment",
            "ip_malformed",
            packets::fragment(&udp4(|_| ()), 16, b"odd", true, 9),
        ),
        (
            "a chain of headers without end",
            "ip_malformed",
            udp6(|p| {
                let chain = [60, 0, 1, 4, 0, 0, 0, 0].repeat(20);
                p[5] += chain.len() as u8;
                p[6] = 60;
                p.splice(40..40, chain);
            }),
        ),
        (
            "a routing header that goes on",
            "ip_malformed",
            udp6(|p| {
                p[5] += 8;
                p[6] = 43;
                p.splice(40..40, [17, 0, 0, 1, 0, 0, 0, 0]);
            }),
        ),
    ]
}

#[test]
fn bad_packets_from_clients_are_counted_and_not_delivered() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.moves(&FAMILIES);
    let echo = UdpService::start(lab.new_server(), (NEW, 53))?;
    let _daemons = setup.start_both()?;
    let wire = Wire::new(lab.router(), "old", lab.old_server(), "eth0")?;
    let watch = Watch::start(lab.new_server(), "ipmoved0")?;
    let both = |reason: &str| -> Result<u64> {
        let count = |role| setup.status(role).map(|status| status.drops(reason));
        Ok(count(Role::Old)? + count(Role::New)?)
    };
    for (what, reason, packet) in bad() {
        let before = both(reason)?;
        wire.send(&packet)?;
        let counted = poll_until(PATIENCE, Duration::from_millis(5), || {
            both(reason)
                .is_ok_and(|now| now == before + 1)
                .then_some(())
        });
        assert!(counted.is_some(), "{what} is not counted as {reason}");
    }
    assert_eq!(
        watch.count(Duration::from_millis(50), |packet| !packet.is_empty())?,
        0
    );
    assert!(echo.peers().is_empty(), "{:?}", echo.peers());
    Ok(())
}

#[test]
fn overlapping_fragments_are_counted_and_not_delivered() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.moves(&FAMILIES);
    let echoes = [
        UdpService::start(lab.new_server(), (NEW, 53))?,
        UdpService::start(lab.new_server(), (NEW6, 53))?,
    ];
    let _daemons = setup.start_both()?;
    let wire = Wire::new(lab.router(), "old", lab.old_server(), "eth0")?;
    for (client, moved) in [
        (IpAddr::from(CLIENT), IpAddr::from(MOVED)),
        (CLIENT6.into(), MOVED6.into()),
    ] {
        let packet = packets::udp((client, 4_000), (moved, 53), &[b'o'; 2_000]);
        let [first, second] = &packets::fragments(&packet, 1_008, 77)[..] else {
            panic!("two fragments");
        };
        let over = packets::fragment(&packet, 1_000, &[b'x'; 16], true, 77);
        for fragment in [first, &over, second] {
            wire.send(fragment)?;
        }
    }
    let counted = poll_until(PATIENCE, Duration::from_millis(10), || {
        let status = setup.status(Role::Old).ok()?;
        (status.drops("fragment_overlap") == 4).then_some(())
    });
    assert!(counted.is_some(), "{:?}", setup.status(Role::Old));
    for echo in &echoes {
        assert!(echo.peers().is_empty(), "{:?}", echo.peers());
    }
    Ok(())
}

#[test]
fn a_bad_old_server_delivers_nothing_it_must_not() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let echo = UdpService::start(lab.new_server(), (NEW, 53))?;
    let mut daemon = setup.start(Role::New)?;
    let impostor = Impostor::new(&lab, &["192.0.2.5", "[2001:db8:a::5]:53/udp"])?;
    daemon.wait_until_up()?;
    let watch = Watch::start(lab.new_server(), "ipmoved0")?;
    let to4 = |source: IpAddr, to: IpAddr| packets::udp((source, 4_000), (to, 53), WORDS);
    let client = IpAddr::from(CLIENT);
    let mut all = vec![
        ("its own address as source", "bad_source", from4(NEW)),
        (
            "another of its addresses",
            "bad_source",
            to4(NEW6.into(), MOVED6.into()),
        ),
        (
            "an address that has not moved",
            "not_moved",
            to4(client, Ipv4Addr::new(192, 0, 2, 6).into()),
        ),
        (
            "the new server's own address",
            "not_moved",
            to4(client, NEW.into()),
        ),
        (
            "the old server's own address",
            "not_moved",
            to4(client, OLD.into()),
        ),
        (
            "loopback",
            "not_moved",
            to4(client, Ipv4Addr::LOCALHOST.into()),
        ),
        ("a port that has not moved", "not_moved", {
            packets::udp((CLIENT6.into(), 4_000), (MOVED6.into(), 54), WORDS)
        }),
        (
            "another protocol of a port",
            "not_moved",
            packets::ip(CLIENT6, MOVED6, 47, WORDS),
        ),
        ("nothing at all", "ip_malformed", Vec::new()),
        (
            "no IP packet",
            "ip_malformed",
            b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        ),
    ];
    all.extend(bad());
    let count = |reason: &str| setup.status(Role::New).map(|status| status.drops(reason));
    for (what, reason, packet) in all {
        let before = count(reason)?;
        impostor.send(&packet)?;
        let counted = poll_until(PATIENCE, Duration::from_millis(5), || {
            count(reason)
                .is_ok_and(|now| now == before + 1)
                .then_some(())
        });
        assert!(
            counted.is_some(),
            "{what} is not counted as {reason}: {:?}",
            setup.status(Role::New)
        );
    }
    // UDP-Lite, whose checksum is of another kind, and a fragment, which has none of its own.
    let lite = packets::ip(CLIENT, MOVED, 136, WORDS);
    let whole = to4(client, MOVED.into());
    let fragment = packets::fragments(&whole, 16, 7).swap_remove(0);
    for (counted, packet) in [(1, lite), (2, fragment)] {
        impostor.send_with(Flags::CSUM_PARTIAL, &packet)?;
        let seen = poll_until(PATIENCE, Duration::from_millis(5), || {
            (count("bad_checksum_flag").ok()? == counted).then_some(())
        });
        assert!(seen.is_some(), "{:?}", setup.status(Role::New));
    }
    assert_eq!(
        watch.count(Duration::from_millis(50), |packet| !packet.is_empty())?,
        0
    );
    // The daemon still delivers packets that a peer may send.
    impostor.send(&to4(client, MOVED.into()))?;
    let seen = poll_until(PATIENCE, Duration::from_millis(10), || echo.peers().pop());
    assert_eq!(seen.map(|peer| peer.ip()), Some(client));
    Ok(())
}
