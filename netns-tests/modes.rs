//! The three ways to deliver, and the exact place of delivery.
//!
//! ```text
//!                                        ┌── old server 192.0.2.1, holds 192.0.2.5 … (moved)
//!  clients 203.0.113.10, .11 ── router ──┤              ║ tunnel, or none (`ipmoved nat`)
//!                                        └── new server 198.51.100.2; keep: 192.0.2.5 on lo
//! ```

use std::net::IpAddr;
use std::time::Duration;

use ipmoved::internals::{Address, Netlink, Role};
use ipmoved::lab::topology::{
    CLIENT, CLIENT6, Leg, MOVED, MOVED6, NEW, NEW6, OLD, OLD6, moved as nth_moved,
    moved6 as nth_moved6,
};
use ipmoved::lab::{
    Daemon, DaemonSetup, Daemons, Lab, LabError, Namespace, Probe, Service, Snapshot, UdpService,
    poll_until,
};

use crate::stage::{MEGABYTE, PATIENCE, RECOVERY, Result, SILENCE, setup};

const KEEP: &[&str] = &[
    "--deliver-to",
    "keep",
    "--accept",
    "192.0.2.5",
    "--accept",
    "192.0.2.6",
    "--accept",
    "2001:db8:a::5",
];

// `keep`.

/// Starts both daemons, the new one with `keep`, and waits until it holds the addresses `held`.
fn keeping<'lab>(setup: &DaemonSetup<'lab>, held: &[IpAddr]) -> Result<Daemons<'lab>> {
    let daemons = setup.clone().args(Role::New, KEEP).start_both()?;
    until_held(setup.lab().new_server(), held)?;
    Ok(daemons)
}

fn until_held(host: &Namespace, wanted: &[IpAddr]) -> Result {
    let same = poll_until(PATIENCE, Duration::from_millis(20), || {
        (quiet(host).ok()? == wanted).then_some(())
    });
    same.ok_or_else(|| {
        LabError::unexpected(format!("wanted {wanted:?} on lo, found {:?}", quiet(host)))
    })
}

/// The addresses of `lo` that only some hosts have, sorted.
fn quiet(host: &Namespace) -> Result<Vec<IpAddr>> {
    let mut all: Vec<IpAddr> = addresses(host)?
        .into_iter()
        .filter(|held| held.index == 1 && !held.addr.is_loopback())
        .map(|held| held.addr)
        .collect();
    all.sort_unstable();
    Ok(all)
}

fn addresses(host: &Namespace) -> Result<Vec<Address>> {
    let failed = |error| LabError::unexpected(format!("netlink: {error}"));
    host.run(|| Netlink::new().map_err(failed)?.addresses().map_err(failed))
}

#[test]
fn an_application_on_the_kept_address_is_served() -> Result {
    let lab = Lab::builder().moved(2).build()?;
    let moves = [nth_moved(0).to_string(), nth_moved(1).to_string()];
    let moves6 = [nth_moved6(0).to_string()];
    let all: Vec<&str> = moves.iter().chain(&moves6).map(String::as_str).collect();
    let setup = setup(&lab)?.moves(&all);
    let held: [IpAddr; 3] = [nth_moved(0).into(), nth_moved(1).into(), MOVED6.into()];
    let _daemons = keeping(&setup, &held)?;
    for addr in held {
        let service = Service::start(lab.new_server(), addr)?;
        let echo = UdpService::start(lab.new_server(), (addr, 53))?;
        let client = lab.client();
        (client.get(addr)?.is_answered_by(addr)?).for_the_client_itself()?;
        client.download(addr, 4 * MEGABYTE)?;
        client.upload(addr, 4 * MEGABYTE)?;
        for size in [0, 1200, 1372, 9_000] {
            client.udp((addr, 53), &vec![b'u'; size])?;
        }
        client.ping(addr, 56)?;
        let expected: IpAddr = if addr.is_ipv4() {
            CLIENT.into()
        } else {
            CLIENT6.into()
        };
        assert!(service.peers().iter().all(|peer| peer.ip() == expected));
        assert!(echo.peers().iter().all(|peer| peer.ip() == expected));
        let closed = lab.client().probe_tcp((addr, 81), PATIENCE)?;
        assert_eq!(closed, Probe::Refused);
        let closed = lab.client().probe_udp((addr, 54), PATIENCE)?;
        assert_eq!(closed, Probe::Refused);
    }
    let status = setup.status(Role::New)?;
    assert_eq!(status.tunnel()["deliver_to"], "keep", "{status:?}");
    Ok(())
}

#[test]
fn a_kept_address_goes_when_it_is_withdrawn() -> Result {
    let lab = Lab::builder().moved(2).build()?;
    let both = setup(&lab)?.moves(&["192.0.2.5", "192.0.2.6"]);
    let daemons = keeping(&both, &[nth_moved(0).into(), nth_moved(1).into()])?;
    daemons.old.terminate()?;
    // The old server is away, but has not withdrawn the address: the application goes on listening.
    std::thread::sleep(SILENCE);
    until_held(
        lab.new_server(),
        &[nth_moved(0).into(), nth_moved(1).into()],
    )?;
    let one = setup(&lab)?.moves(&["192.0.2.6"]);
    let mut old = one.start(Role::Old)?;
    old.wait_until_up()?;
    until_held(lab.new_server(), &[nth_moved(1).into()])?;
    daemons.new.terminate()?;
    until_held(lab.new_server(), &[])
}

#[test]
fn keeping_leaves_nothing_behind() -> Result {
    let lab = Lab::new()?;
    let before = Snapshot::of(lab.new_server())?;
    let setup = setup(&lab)?.moves(&["192.0.2.5", "2001:db8:a::5"]);
    let held = [MOVED.into(), MOVED6.into()];
    keeping(&setup, &held)?.terminate()?;
    Snapshot::of(lab.new_server())?.is_same_as(&before)?;

    let daemons = keeping(&setup, &held)?;
    daemons.new.kill()?;
    until_held(lab.new_server(), &held)?;
    let said = setup.run(Role::New, &["cleanup"])?;
    assert!(said.status.success(), "{said:?}");
    Snapshot::of(lab.new_server())?.is_same_as(&before)?;

    // The next start undoes it too, if it does not keep.
    drop(daemons.old);
    let daemons = keeping(&setup, &held)?;
    daemons.new.kill()?;
    let mut new = setup.start(Role::New)?;
    new.wait_until_up()?;
    until_held(lab.new_server(), &[])?;
    new.terminate()?;
    Snapshot::of(lab.new_server())?.is_same_as(&before)
}

#[test]
fn an_address_that_the_new_server_has_of_itself_stays() -> Result {
    let lab = Lab::new()?;
    lab.set_address(lab.new_server(), "lo", MOVED, 32, true)?;
    let before = Snapshot::of(lab.new_server())?;
    let setup = setup(&lab)?;
    let _application = Service::start(lab.new_server(), MOVED)?;
    let daemons = keeping(&setup, &[MOVED.into()])?;
    lab.client().get(MOVED)?.is_answered_by(MOVED)?;
    daemons.terminate()?;
    Snapshot::of(lab.new_server())?.is_same_as(&before)
}

#[test]
fn a_connection_to_a_kept_address_survives_a_crash() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let mut daemons = keeping(&setup, &[MOVED.into()])?;
    let _application = Service::start(lab.new_server(), MOVED)?;
    let mut conversation = lab.client().converse(MOVED)?;
    conversation.exchange(b"before", PATIENCE)?;
    let tap = lab.tap(Leg::Clients)?;
    daemons.new.kill()?;
    conversation.say(b"meanwhile")?;
    assert_eq!(lab.client().probe_tcp(MOVED, SILENCE)?, Probe::Silent);
    assert_eq!(tap.stop()?.refusals_from(MOVED), 0);
    let mut again = setup.clone().args(Role::New, KEEP).start(Role::New)?;
    again.wait_until_up()?;
    daemons.old.wait_until_up()?;
    conversation.hear(b"meanwhile", RECOVERY)?;
    conversation.exchange(b"after", RECOVERY)?;
    lab.client().get(MOVED)?.is_answered_by(MOVED)?;
    Ok(())
}

// `nat`.

/// The arguments of `ipmoved nat` as in the README, for both families.
pub(crate) const NAT: &[&str] = &[
    "--move",
    "192.0.2.5",
    "--to",
    "198.51.100.2",
    "--move",
    "2001:db8:a::5",
    "--to",
    "2001:db8:b::2",
];

pub(crate) fn nat<'lab>(setup: &DaemonSetup<'lab>, args: &[&str]) -> Result<Daemon<'lab>> {
    let mut daemon = setup.start_nat(args)?;
    daemon.wait_until_up()?;
    Ok(daemon)
}

#[test]
fn in_mode_nat_the_application_sees_the_old_server() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let daemon = nat(&setup, NAT)?;
    let ends: [(IpAddr, IpAddr, IpAddr); 2] = [
        (MOVED.into(), NEW.into(), OLD.into()),
        (MOVED6.into(), NEW6.into(), OLD6.into()),
    ];
    for (moved, new, old) in ends {
        let application = Service::start(lab.new_server(), new)?;
        let echo = UdpService::start(lab.new_server(), (new, 53))?;
        for client in [lab.client(), lab.second_client()] {
            client.get(moved)?.is_answered_by(new)?;
            client.download(moved, 8 * MEGABYTE + 5)?;
            client.upload(moved, 8 * MEGABYTE + 5)?;
            for size in [0, 1, 1200, 1400] {
                client.udp((moved, 53), &vec![b'u'; size])?;
            }
            client.ping(moved, 56)?;
            client.ping(moved, 1400)?;
        }
        for peer in application.peers().iter().chain(&echo.peers()) {
            assert_eq!(peer.ip(), old);
            assert!(ipmoved::internals::PORTS.contains(&peer.port()), "{peer}");
        }
        // The new server's stack refuses, and the moved address tells the client.
        let probe = lab.client().probe_tcp((moved, 81), PATIENCE)?;
        assert_eq!(probe, Probe::Refused);
        let probe = lab.client().probe_udp((moved, 54), PATIENCE)?;
        assert_eq!(probe, Probe::Refused);
    }
    let status = daemon.status()?;
    assert_eq!(status.0["way"], "nat");
    assert_eq!(status.tunnel()["role"], "old");
    assert!(status.live_flows() > 10, "{status:?}");
    assert!(status.tunnel()["rx"]["bytes"].as_u64() > Some(16 * MEGABYTE));
    let text = setup.run(Role::Old, &["status"])?.stdout;
    assert!(text.contains("nothing is encrypted"), "{text}");
    Ok(())
}

#[test]
fn in_mode_nat_large_datagrams_arrive_in_fragments() -> Result {
    let lab = Lab::new()?;
    let _daemon = nat(&setup(&lab)?, NAT)?;
    for (moved, new) in [
        (IpAddr::from(MOVED), IpAddr::from(NEW)),
        (MOVED6.into(), NEW6.into()),
    ] {
        let _echo = UdpService::start(lab.new_server(), (new, 53))?;
        for size in [1_473, 9_000, 60_000] {
            lab.client().udp((moved, 53), &vec![b'f'; size])?;
            lab.second_client().udp((moved, 53), &vec![b'g'; size])?;
        }
        lab.client().ping(moved, 5_000)?;
    }
    Ok(())
}

#[test]
fn in_mode_nat_a_narrow_path_is_told_to_the_client() -> Result {
    let lab = Lab::new()?;
    let daemon = nat(&setup(&lab)?, NAT)?;
    for (moved, new) in [
        (IpAddr::from(MOVED), IpAddr::from(NEW)),
        (MOVED6.into(), NEW6.into()),
    ] {
        let _application = Service::start(lab.new_server(), new)?;
        let mut conversation = lab.client().converse(moved)?;
        conversation.exchange(&[b'w'; 100_000], PATIENCE)?;
        // Between the servers, where neither end of the connection sees it.
        lab.set_mtu(Leg::New, 1_300, false)?;
        conversation.exchange(&[b'n'; 100_000], RECOVERY)?;
        lab.client().upload(moved, MEGABYTE)?;
        lab.set_mtu(Leg::New, 1_500, false)?;
    }
    let status = daemon.status()?;
    assert_eq!(status.drops("icmp_unrelated"), 0, "{status:?}");
    Ok(())
}

#[test]
fn in_mode_nat_many_connections_are_answered() -> Result {
    let lab = Lab::new()?;
    let daemon = nat(&setup(&lab)?, NAT)?;
    let _application = Service::start(lab.new_server(), NEW)?;
    for answer in lab.client().get_many(MOVED, 500)? {
        answer.is_answered_by(NEW)?;
    }
    let mut conversations = (0..200)
        .map(|_| lab.client().converse(MOVED))
        .collect::<Result<Vec<_>>>()?;
    for round in 0..3 {
        for (number, conversation) in conversations.iter_mut().enumerate() {
            let words = format!("round {round} of conversation {number}");
            conversation.exchange(words.as_bytes(), PATIENCE)?;
        }
    }
    let status = daemon.status()?;
    assert_eq!(status.drops("ports_exhausted"), 0, "{status:?}");
    Ok(())
}

#[test]
fn in_mode_nat_the_old_servers_own_traffic_is_its_own() -> Result {
    let lab = Lab::new()?;
    let _daemon = nat(&setup(&lab)?, NAT)?;
    let application = Service::start(lab.new_server(), NEW)?;
    let _echo = UdpService::start(lab.new_server(), (NEW, 53))?;
    let own = ipmoved::lab::Client::new(lab.old_server(), OLD, OLD6);
    lab.old_server()
        .set_sysctls(&[("ipv4/ping_group_range", "0 2147483647")])?;
    for _ in 0..20 {
        own.get(NEW)?.is_answered_by(NEW)?.for_the_client_itself()?;
        own.udp((NEW, 53), b"question")?;
    }
    own.udp((NEW, 53), &[b'f'; 9_000])?;
    // Some of their identifiers are in the range of the borrowed ports.
    for _ in 0..20 {
        own.ping(NEW, 56)?;
        own.ping(NEW6, 56)?;
        own.ping(NEW, 5_000)?;
    }
    for peer in application.peers() {
        assert!(!ipmoved::internals::PORTS.contains(&peer.port()), "{peer}");
    }
    let _own = Service::start(lab.old_server(), OLD)?;
    lab.client().get(OLD)?.is_answered_by(OLD)?;
    lab.client().ping(OLD, 56)?;
    Ok(())
}

#[test]
fn in_mode_nat_a_port_may_go_to_another() -> Result {
    let lab = Lab::new()?;
    let args = ["--move", "192.0.2.5:80/tcp", "--to", "198.51.100.2:8080"];
    let _daemon = nat(&setup(&lab)?, &args)?;
    let _application = Service::start(lab.new_server(), (NEW, 8080))?;
    let _rest = Service::start(lab.old_server(), (MOVED, 81))?;
    let _echo = UdpService::start(lab.old_server(), (MOVED, 80))?;
    lab.client().get(MOVED)?.is_answered_by(NEW)?;
    lab.client().get((MOVED, 81))?.is_answered_by(MOVED)?;
    lab.client().udp((MOVED, 80), b"stays")?;
    lab.client().udp((MOVED, 80), &[b'f'; 5_000])?;
    lab.client().ping(MOVED, 56)?;
    Ok(())
}

#[test]
fn in_mode_nat_nothing_is_left_behind() -> Result {
    let lab = Lab::new()?;
    let old = lab.old_server();
    for reserved in ["", "8080,50000-60000"] {
        old.set_sysctls(&[("ipv4/ip_local_reserved_ports", &format!("{reserved}\n"))])?;
        let before = [old, lab.new_server()].map(Snapshot::of);
        let setup = setup(&lab)?;
        let daemon = nat(&setup, NAT)?;
        let held = old.sysctl("ipv4/ip_local_reserved_ports")?;
        assert!(held.contains("40960-"), "{held}");
        Snapshot::of(lab.new_server())?.is_same_as(before[1].as_ref().expect("taken"))?;
        daemon.terminate()?;
        Snapshot::of(old)?.is_same_as(before[0].as_ref().expect("taken"))?;

        nat(&setup, NAT)?.kill()?;
        let said = setup.run(Role::Old, &["cleanup"])?;
        assert!(said.status.success(), "{said:?}");
        Snapshot::of(old)?.is_same_as(before[0].as_ref().expect("taken"))?;

        nat(&setup, NAT)?.kill()?;
        nat(&setup, NAT)?.terminate()?;
        Snapshot::of(old)?.is_same_as(before[0].as_ref().expect("taken"))?;
    }
    Ok(())
}

#[test]
fn in_mode_nat_a_connection_survives_a_crash() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let daemon = nat(&setup, NAT)?;
    let _application = Service::start(lab.new_server(), NEW)?;
    let mut conversation = lab.client().converse(MOVED)?;
    conversation.exchange(b"before", PATIENCE)?;
    let (clients, servers) = (lab.tap(Leg::Clients)?, lab.tap(Leg::New)?);
    daemon.kill()?;
    conversation.say(b"meanwhile")?;
    assert_eq!(lab.client().probe_tcp(MOVED, SILENCE)?, Probe::Silent);
    let _again = nat(&setup, NAT)?;
    conversation.hear(b"meanwhile", RECOVERY)?;
    conversation.exchange(b"after", RECOVERY)?;
    assert_eq!(clients.stop()?.refusals_from(MOVED), 0);
    assert_eq!(servers.stop()?.refusals_from(OLD), 0);
    Ok(())
}

#[test]
fn in_mode_nat_ports_that_are_in_use_are_not_taken() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let before = Snapshot::of(lab.old_server())?;
    for tcp in [true, false] {
        let _service;
        let _echo;
        if tcp {
            _service = Service::start(lab.old_server(), (OLD, 41_000))?;
        } else {
            _echo = UdpService::start(lab.old_server(), (OLD, 41_000))?;
        }
        let said = setup.start_nat(NAT)?.stop_by_itself()?;
        assert_eq!(said.status.code(), Some(2), "{said:?}");
        assert!(said.stderr.contains("port 41000"), "{said:?}");
    }
    Snapshot::of(lab.old_server())?.is_same_as(&before)?;
    for (args, says) in [
        (["--move", "192.0.2.5", "--to", "192.0.2.1"], "itself"),
        (["--move", "192.0.2.1", "--to", "198.51.100.2"], "login"),
    ] {
        let said = setup.start_nat(&args)?.stop_by_itself()?;
        assert_eq!(said.status.code(), Some(2), "{said:?}");
        assert!(said.stderr.contains(says), "{said:?}");
    }
    Snapshot::of(lab.old_server())?.is_same_as(&before)
}

// The place of delivery.

#[test]
fn a_port_may_be_delivered_to_another() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?
        .moves(&["192.0.2.5", "[2001:db8:a::5]:80/tcp"])
        .args(
            Role::New,
            &[
                "--deliver",
                "192.0.2.5:80=198.51.100.2:8080",
                "--deliver",
                "192.0.2.5:53/udp=198.51.100.2:5353",
                "--deliver",
                "[2001:db8:a::5]:80=[2001:db8:b::2]:8080",
            ],
        );
    let _daemons = setup.start_both()?;
    let _mapped = Service::start(lab.new_server(), (NEW, 8080))?;
    let _mapped6 = Service::start(lab.new_server(), (NEW6, 8080))?;
    let _other = Service::start(lab.new_server(), (NEW, 81))?;
    let _echo = UdpService::start(lab.new_server(), (NEW, 5353))?;
    let client = lab.client();
    client.get(MOVED)?.for_the_client_itself()?;
    client.download(MOVED, 4 * MEGABYTE)?;
    client.get(MOVED6)?.for_the_client_itself()?;
    client.get((MOVED, 81))?.for_the_client_itself()?;
    for size in [1, 1200, 9_000] {
        client.udp((MOVED, 53), &vec![b'u'; size])?;
    }
    // Port 8080 itself works as well, also from a client port that is connected to the other one.
    let client = client.from_port(5_000);
    let mut mapped = client.converse((MOVED, 80))?;
    let mut plain = client.converse((MOVED, 8080))?;
    mapped.exchange(b"to port 80", PATIENCE)?;
    plain.exchange(b"to port 8080", PATIENCE)?;
    mapped.exchange(b"to port 80 again", PATIENCE)?;
    let status = setup.status(Role::New)?;
    assert_eq!(status.tunnel()["flows"]["collisions"], 1, "{status:?}");
    assert_eq!(
        status.tunnel()["deliver"][0],
        "192.0.2.5:80=198.51.100.2:8080"
    );
    Ok(())
}

#[test]
fn a_kept_address_may_be_served_at_another_port() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.args(Role::New, &["--deliver", "192.0.2.5:80=192.0.2.5:8080"]);
    let _daemons = keeping(&setup, &[MOVED.into()])?;
    let _application = Service::start(lab.new_server(), (MOVED, 8080))?;
    lab.client().get(MOVED)?.for_the_client_itself()?;
    Ok(())
}

#[test]
fn nothing_is_delivered_to_another_host() -> Result {
    let lab = Lab::new()?;
    let before = Snapshot::of(lab.new_server())?;
    for (map, named) in [
        (
            "192.0.2.5:80=198.51.100.9:8080",
            "198.51.100.9 is not an address of this server",
        ),
        (
            "192.0.2.0/30=198.51.100.0/30",
            "ip route add local 198.51.100.0/30 dev lo",
        ),
    ] {
        let setup = setup(&lab)?.args(Role::New, &["--deliver", map]);
        let said = setup.start(Role::New)?.stop_by_itself()?;
        assert_eq!(said.status.code(), Some(2), "{said:?}");
        assert!(said.stderr.contains(named), "{said:?}");
    }
    Snapshot::of(lab.new_server())?.is_same_as(&before)
}

#[test]
fn one_port_of_a_client_at_two_moved_addresses_is_two_flows() -> Result {
    let lab = Lab::builder().moved(3).build()?;
    let setup = setup(&lab)?.moves(&["192.0.2.5", "192.0.2.6", "192.0.2.7"]);
    let application = Service::start(lab.new_server(), NEW)?;
    let echo = UdpService::start(lab.new_server(), (NEW, 53))?;
    let daemons = setup.start_both()?;
    let client = lab.client().from_port(5_000);
    let mut conversations = (0..3)
        .map(|n| client.converse(nth_moved(n)))
        .collect::<Result<Vec<_>>>()?;
    for round in 0..3 {
        for (number, conversation) in conversations.iter_mut().enumerate() {
            let words = format!("round {round} with moved address {number}");
            conversation.exchange(words.as_bytes(), PATIENCE)?;
        }
    }
    // Connected sockets receive nothing from other addresses than that of their request.
    let sockets = (0..3)
        .map(|n| client.udp_socket((nth_moved(n), 53)))
        .collect::<Result<Vec<_>>>()?;
    for round in 0..3 {
        for (number, socket) in sockets.iter().enumerate() {
            let words = format!("round {round} with moved address {number}");
            socket.send(words.as_bytes()).expect("sent");
            let mut back = [0; 100];
            let length = socket.recv(&mut back).expect("answered");
            assert_eq!(&back[..length], words.as_bytes());
        }
    }
    for peers in [application.peers(), echo.peers()] {
        assert!(peers.iter().all(|peer| peer.ip() == CLIENT));
        let mut ports: Vec<u16> = peers.iter().map(|peer| peer.port()).collect();
        ports.sort_unstable();
        ports.dedup();
        assert_eq!(ports.len(), 3, "{peers:?}");
        assert!(ports.contains(&5_000));
    }
    let status = daemons.new.status()?;
    assert_eq!(status.tunnel()["flows"]["collisions"], 4, "{status:?}");
    assert_eq!(status.drops("flow_collision"), 0);
    Ok(())
}
