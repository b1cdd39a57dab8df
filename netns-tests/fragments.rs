//! Fragments from clients and from the application arrive, in whatever order they come.
//!
//! ```text
//!  client ── router ──┬── old server: takes fragments of moved traffic, bounces those of its own
//!                     └── new server: reassembles them
//! ```

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use ipmoved::internals::Role;
use ipmoved::lab::topology::{CLIENT, CLIENT6, MOVED, MOVED6, NEW, NEW6};
use ipmoved::lab::{Lab, UdpService, Wire, packets, poll_until};

use crate::stage::{FAMILIES, PATIENCE, Result, setup};

const PORTS: [&str; 2] = ["192.0.2.5:53/udp", "[2001:db8:a::5]:53/udp"];

fn echoes(lab: &Lab, port: u16) -> Result<[UdpService; 2]> {
    Ok([
        UdpService::start(lab.new_server(), (NEW, port))?,
        UdpService::start(lab.new_server(), (NEW6, port))?,
    ])
}

#[test]
fn udp_of_every_size_is_echoed() -> Result {
    for moves in [FAMILIES, PORTS] {
        let lab = Lab::new()?;
        let setup = setup(&lab)?.moves(&moves);
        let _echoes = echoes(&lab, 53)?;
        let _daemons = setup.start_both()?;
        for moved in [IpAddr::from(MOVED), MOVED6.into()] {
            for size in [
                1, 2, 1_139, 1_140, 1_392, 1_440, 1_452, 1_453, 1_472, 1_473, 2_000, 2_960, 4_096,
                8_192, 16_384, 30_001, 50_000, 65_000, 65_506, 65_507,
            ] {
                let payload: Vec<u8> = (0..size).map(|at: usize| (at * 31 / 7) as u8).collect();
                lab.client().udp((moved, 53), &payload)?;
            }
        }
    }
    Ok(())
}

/// The fragments of a datagram of 4,000 bytes to port `port` of the moved address, last to first.
fn reversed(from: IpAddr, to: IpAddr, port: u16, id: u16) -> Vec<Vec<u8>> {
    let packet = packets::udp((from, 4_000 + id), (to, port), &[b'r'; 4_000]);
    let mut all = packets::fragments(&packet, 1_440, id);
    assert_eq!(all.len(), 3);
    all.reverse();
    all
}

fn arrive_reversed(lab: &Lab, echoes: &[UdpService; 2], port: u16) -> Result {
    let wire = Wire::new(lab.router(), "old", lab.old_server(), "eth0")?;
    for (echo, (client, moved)) in echoes.iter().zip([
        (IpAddr::from(CLIENT), IpAddr::from(MOVED)),
        (CLIENT6.into(), MOVED6.into()),
    ]) {
        for id in 1..=3 {
            for fragment in reversed(client, moved, port, id) {
                wire.send(&fragment)?;
            }
            let expected = SocketAddr::new(client, 4_000 + id);
            let seen = poll_until(PATIENCE, Duration::from_millis(10), || {
                echo.peers().contains(&expected).then_some(())
            });
            assert!(seen.is_some(), "{moved}: {:?}", echo.peers());
        }
    }
    Ok(())
}

#[test]
fn fragments_in_reverse_order_arrive_at_the_new_server() -> Result {
    for moves in [FAMILIES, PORTS] {
        let lab = Lab::new()?;
        let setup = setup(&lab)?.moves(&moves);
        let echoes = echoes(&lab, 53)?;
        let _daemons = setup.start_both()?;
        arrive_reversed(&lab, &echoes, 53)?;
    }
    Ok(())
}

#[test]
fn fragments_for_ports_that_stay_arrive_at_the_old_server() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.moves(&PORTS);
    let own = [
        UdpService::start(lab.old_server(), (MOVED, 5353))?,
        UdpService::start(lab.old_server(), (MOVED6, 5353))?,
    ];
    let _decoys = echoes(&lab, 5353)?;
    let _daemons = setup.start_both()?;
    for moved in [IpAddr::from(MOVED), MOVED6.into()] {
        for size in [1_473, 4_000, 65_507] {
            lab.client().udp((moved, 5353), &vec![b'o'; size])?;
        }
    }
    arrive_reversed(&lab, &own, 5353)?;
    // Reverse path filtering is as strict as before.
    for key in ["all", "eth0", "ipmoved0"] {
        let filter = lab
            .old_server()
            .sysctl(&format!("ipv4/conf/{key}/rp_filter"))?;
        assert_eq!(filter, "1", "{key}");
    }
    Ok(())
}

#[test]
fn a_first_fragment_that_never_comes_is_counted() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.moves(&PORTS);
    let _daemons = setup.start_both()?;
    let wire = Wire::new(lab.router(), "old", lab.old_server(), "eth0")?;
    for id in 1..=200 {
        let fragments = reversed(CLIENT.into(), MOVED.into(), 53, id);
        wire.send(&fragments[0])?;
    }
    let counted = poll_until(PATIENCE, Duration::from_millis(50), || {
        let status = setup.status(Role::Old).ok()?;
        (status.drops("fragment_unknown") >= 50).then_some(())
    });
    assert!(counted.is_some(), "more waited than may");
    Ok(())
}

/// Sends later fragments of one host, and first fragments of others with the same identification,
/// until it is told to stop. The first ones are the old server's own.
fn flood_with_fragments(wire: &Wire, id: u16, stop: &AtomicBool) -> Result {
    /// So many of each, with a pause after them.
    const BURST: u32 = 20;
    const PAUSE: Duration = Duration::from_millis(5);
    let datagram = |from: u32, len| {
        let from = IpAddr::from(Ipv4Addr::from(0x0a00_0001 + from));
        packets::udp((from, 9), (MOVED.into(), 5353), &vec![b'f'; len])
    };
    let later = datagram(0, 1_480);
    for n in (1..).take_while(|_| !stop.load(Relaxed)) {
        for k in 1..=BURST {
            let at = 1_480 * k as usize;
            wire.send(&packets::fragment(&later, at, &later[28..], true, id))?;
            let first = datagram(n * BURST + k, 8);
            wire.send(&packets::fragment(&first, 0, &first[20..], true, id))?;
        }
        thread::sleep(PAUSE);
    }
    Ok(())
}

#[test]
fn a_flood_of_fragments_takes_none_from_another_client() -> Result {
    /// Some with the identification of the flood.
    const DATAGRAMS: u16 = 20;
    /// Within which the flood sends more fragments than may wait.
    const PAUSE: Duration = Duration::from_millis(30);
    let lab = Lab::new()?;
    let setup = setup(&lab)?
        .moves(&PORTS)
        .args(Role::Old, &["--lanes", "1"]);
    let echoes = echoes(&lab, 53)?;
    let _daemons = setup.start_both()?;
    let wire = || Wire::new(lab.router(), "old", lab.old_server(), "eth0");
    let (floods, wire) = (wire()?, wire()?);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let flood = scope.spawn(|| flood_with_fragments(&floods, 7, &stop));
        let result = (|| {
            for id in 1..=DATAGRAMS {
                for fragment in reversed(CLIENT.into(), MOVED.into(), 53, id) {
                    wire.send(&fragment)?;
                    thread::sleep(PAUSE);
                }
                lab.second_client().udp((MOVED, 53), &[b'e'; 4_000])?;
            }
            Ok(())
        })();
        stop.store(true, Relaxed);
        flood.join().unwrap()?;
        result
    })?;
    let seen = || {
        let peers = echoes[0].peers();
        let came = |&id: &u16| peers.contains(&SocketAddr::new(CLIENT.into(), 4_000 + id));
        (1..=DATAGRAMS).filter(came).count()
    };
    let all = poll_until(PATIENCE, Duration::from_millis(10), || {
        (seen() == usize::from(DATAGRAMS)).then_some(())
    });
    assert!(all.is_some(), "{} of {DATAGRAMS} datagrams arrived", seen());
    assert!(setup.status(Role::Old)?.drops("fragment_unknown") > 1_000);
    Ok(())
}
