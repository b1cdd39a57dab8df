//! Fragments from clients and from the application arrive, in whatever order they come.
//!
//! ```text
//!  client ── router ──┬── old server: takes fragments of moved traffic, bounces those of its own
//!                     └── new server: reassembles them
//! ```

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

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
        let status = setup.status(ipmoved::internals::Role::Old).ok()?;
        (status.drops("fragment_unknown") >= 50).then_some(())
    });
    assert!(counted.is_some(), "more waited than may");
    Ok(())
}
