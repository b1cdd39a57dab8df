//! What the old server does itself stays its own, though the address has moved from which it does
//! so: look-ups, downloads, pings, a lease; and what hosts behind it do.
//!
//! ```text
//!                                      ┌── old server, holds 192.0.2.5 (moved) ── container
//!  client, which serves too ── router ─┤              ║ tunnel                     10.8.0.2
//!                                      └── new server, runs the application
//! ```

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::process::Command;
use std::time::Duration;

use ipmoved::internals::Role;
use ipmoved::lab::topology::{
    CLIENT, CLIENT6, MOVED, MOVED6, NEW, NEW6, OLD, ROUTER_OLD, SECOND_CLIENT, SECOND_CLIENT6,
    UPLINK,
};
use ipmoved::lab::traffic::{Client, Conversation};
use ipmoved::lab::{Lab, LabError, Namespace, Process, RawSocket, Service, UdpService, poll_until};

use crate::stage::{FAMILIES, MEGABYTE, PATIENCE, Result, setup};

/// The moved address, the client's and the new server's, family by family.
const ENDS: [(IpAddr, IpAddr, IpAddr); 2] = [
    (IpAddr::V4(MOVED), IpAddr::V4(CLIENT), IpAddr::V4(NEW)),
    (IpAddr::V6(MOVED6), IpAddr::V6(CLIENT6), IpAddr::V6(NEW6)),
];

/// A protocol without ports that no kernel handles (RFC 3692).
const EXPERIMENT: u8 = 253;

const DNS: u16 = 53;

fn unexpected(error: impl std::fmt::Display) -> LabError {
    LabError::unexpected(error.to_string())
}

/// Servers elsewhere that the old server asks: a download, a resolver.
struct Elsewhere {
    _downloads: [Service; 2],
    _resolvers: [UdpService; 2],
}

impl Elsewhere {
    fn start(lab: &Lab) -> Result<Self> {
        let clients = lab.clients();
        Ok(Self {
            _downloads: [
                Service::start(clients, CLIENT)?,
                Service::start(clients, CLIENT6)?,
            ],
            _resolvers: [
                UdpService::start(clients, (CLIENT, DNS))?,
                UdpService::start(clients, (CLIENT6, DNS))?,
            ],
        })
    }
}

/// The application on the new server, in both families.
struct Application {
    _tcp: [Service; 2],
    udp: [UdpService; 2],
}

impl Application {
    fn start(lab: &Lab, port: u16) -> Result<Self> {
        let host = lab.new_server();
        Ok(Self {
            _tcp: [Service::start(host, NEW)?, Service::start(host, NEW6)?],
            udp: [
                UdpService::start(host, (NEW, port))?,
                UdpService::start(host, (NEW6, port))?,
            ],
        })
    }
}

/// The old server as a client elsewhere, from the moved addresses.
fn itself(lab: &Lab) -> Client<'_> {
    Client::new(lab.old_server(), MOVED, MOVED6)
}

/// A socket on a host.
fn bound(host: &Namespace, addr: SocketAddr) -> Result<UdpSocket> {
    host.run(|| {
        let socket = UdpSocket::bind(addr).map_err(unexpected)?;
        let patience = Some(Duration::from_secs(2));
        socket.set_read_timeout(patience).map_err(unexpected)?;
        Ok(socket)
    })
}

/// Asks a resolver, and hears its answer.
fn asks(socket: &UdpSocket, to: SocketAddr, question: &[u8]) -> Result {
    socket.send_to(question, to).map_err(unexpected)?;
    let mut buffer = vec![0; 65_536];
    let (length, from) = socket
        .recv_from(&mut buffer)
        .map_err(|error| LabError::unexpected(format!("no answer from {to}: {error}")))?;
    assert_eq!((&buffer[..length], from), (question, to));
    Ok(())
}

/// Hears these words on a socket.
fn hears(socket: &UdpSocket, words: &[u8]) -> Result {
    let mut heard = [0; 64];
    let (length, _) = socket.recv_from(&mut heard).map_err(unexpected)?;
    assert_eq!(&heard[..length], words);
    Ok(())
}

/// Everything that the old server does itself with the other families' ends.
fn all_is_answered(lab: &Lab, times: usize) -> Result {
    let old = itself(lab);
    for (moved, remote, _) in ENDS {
        let resolver = SocketAddr::new(remote, DNS);
        for _ in 0..times {
            // As resolvers do it: from a new port each time, with and without connect(2).
            asks(
                &bound(lab.old_server(), SocketAddr::new(moved, 0))?,
                resolver,
                b"question",
            )?;
            old.udp(resolver, b"question")?;
        }
        // In fragments.
        old.udp(resolver, &[7; 4000])?;
        old.download(remote, MEGABYTE)?;
        old.ping(remote, 56)?;
    }
    Ok(())
}

/// Clients get the new server.
fn clients_are_served(lab: &Lab, port: u16) -> Result {
    for (moved, _, new) in ENDS {
        // The tunnel may have come up this moment, and lose a datagram.
        let asked = poll_until(PATIENCE, Duration::from_millis(10), || {
            lab.client().udp((moved, port), b"request").ok()
        });
        asked.ok_or_else(|| LabError::unexpected(format!("{moved} is not served by UDP")))?;
        lab.client().get(moved)?.is_answered_by(new)?;
    }
    Ok(())
}

#[test]
fn what_the_old_server_asks_is_answered_in_any_state_of_the_daemon() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.moves(&FAMILIES);
    let _elsewhere = Elsewhere::start(&lab)?;
    let application = Application::start(&lab, DNS)?;
    let mut downloads = Vec::new();
    for (_, remote, _) in ENDS {
        downloads.push(itself(&lab).converse(remote)?);
    }
    let mut goes_on = |patience| -> Result {
        for conversation in &mut downloads {
            conversation.exchange(b"still here", patience)?;
        }
        all_is_answered(&lab, 3)
    };
    goes_on(PATIENCE)?;
    let daemons = setup.start_both()?;
    goes_on(PATIENCE)?;
    clients_are_served(&lab, DNS)?;
    // The same port of the same host, as a client.
    let (moved, remote, _) = ENDS[0];
    let fixed = bound(lab.old_server(), SocketAddr::new(moved, 123))?;
    let server = bound(lab.clients(), SocketAddr::new(remote, 123))?;
    let ntp = || {
        fixed.send_to(b"time?", (remote, 123)).map_err(unexpected)?;
        hears(&server, b"time?")?;
        server.send_to(b"12:00", (moved, 123)).map_err(unexpected)?;
        hears(&fixed, b"12:00")
    };
    ntp()?;
    // A protocol without ports, which the kernel counts by its addresses.
    let second = [IpAddr::from(SECOND_CLIENT), SECOND_CLIENT6.into()];
    for ((moved, _, _), remote) in ENDS.into_iter().zip(second) {
        let here = RawSocket::open(lab.old_server(), moved, EXPERIMENT)?;
        let there = RawSocket::open(lab.clients(), remote, EXPERIMENT)?;
        here.send(remote, b"hello")?;
        there.expect(PATIENCE, |words| words == b"hello")?;
        there.send(moved, b"hello yourself")?;
        here.expect(PATIENCE, |words| words == b"hello yourself")?;
    }
    let stayed = |role| Ok::<_, LabError>(setup.status(role)?.0["stayed"].as_u64());
    assert!(stayed(Role::Old)? > Some(20));
    assert_eq!(stayed(Role::New)?, Some(0));
    let asked = application.udp.iter().flat_map(UdpService::peers);
    let own = asked.filter(|peer| peer.ip() == MOVED || peer.ip() == MOVED6);
    assert_eq!(own.count(), 0, "the new server was asked for the old one");

    daemons.old.kill()?;
    goes_on(PATIENCE)?;
    ntp()?;
    let mut old = setup.start(Role::Old)?;
    old.wait_until_up()?;
    goes_on(PATIENCE)?;
    ntp()?;
    clients_are_served(&lab, DNS)?;
    old.terminate()?;
    goes_on(PATIENCE)
}

#[test]
fn in_mode_nat_too_what_the_old_server_asks_is_answered() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let _elsewhere = Elsewhere::start(&lab)?;
    let _application = Application::start(&lab, DNS)?;
    let mut old = setup.start_nat(&[
        "--move",
        FAMILIES[0],
        "--move",
        FAMILIES[1],
        "--to",
        "198.51.100.2",
        "--to",
        "2001:db8:b::2",
    ])?;
    old.wait_until_up()?;
    clients_are_served(&lab, DNS)?;
    all_is_answered(&lab, 3)?;
    old.kill()?;
    all_is_answered(&lab, 1)
}

#[test]
fn the_only_address_of_the_old_server_may_be_moved_in_part() -> Result {
    for (transport, port) in [("", 50_000), ("/udp", 50_000)] {
        let lab = Lab::new()?;
        lab.set_address(lab.old_server(), UPLINK, MOVED, 24, false)?;
        let moved = format!("{OLD}:1024-65535{transport}");
        let setup = setup(&lab)?.moves(&[&moved]);
        let _elsewhere = Elsewhere::start(&lab)?;
        let _served = UdpService::start(lab.new_server(), (NEW, port))?;
        let _daemons = setup.start_both()?;
        let old = Client::new(lab.old_server(), OLD, MOVED6);
        for _ in 0..10 {
            let any = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0);
            let question = bound(lab.old_server(), any)?;
            asks(&question, (CLIENT, DNS).into(), b"question")?;
            old.udp((CLIENT, DNS), b"question")?;
            old.get(CLIENT)?.is_answered_by(CLIENT)?;
        }
        lab.client().udp((OLD, port), b"request")?;
    }
    Ok(())
}

#[test]
fn connections_of_the_old_service_go_on_and_new_ones_are_the_new_servers() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.moves(&FAMILIES);
    let _application = Application::start(&lab, DNS)?;
    let mut open = Vec::new();
    let mut services = Vec::new();
    for (moved, ..) in ENDS {
        services.push(Service::start(lab.old_server(), moved)?);
        open.push(lab.client().converse(moved)?);
        // Closed by the service first, which has to remember it.
        let listener = lab.old_server().run(|| {
            let listener = TcpListener::bind((moved, 8080)).map_err(unexpected)?;
            Ok(listener)
        })?;
        let client = lab.client().from_port(40_404).connect((moved, 8080))?;
        drop(listener.accept().map_err(unexpected)?);
        drop(client);
    }
    // A client with a fixed port, which the old service has just answered.
    let mut fixed = Vec::new();
    for (moved, client, _) in ENDS {
        let service = bound(lab.old_server(), SocketAddr::new(moved, DNS))?;
        let phone = lab.client().from_port(5060).udp_socket((moved, DNS))?;
        phone.send(b"register").map_err(unexpected)?;
        hears(&service, b"register")?;
        service.send_to(b"ok", (client, 5060)).map_err(unexpected)?;
        hears(&phone, b"ok")?;
        fixed.push((service, phone));
    }
    let _daemons = setup.start_both()?;
    for ((moved, client, new), conversation) in ENDS.into_iter().zip(&mut open) {
        conversation.exchange(b"go on", PATIENCE)?;
        lab.client().get(moved)?.is_answered_by(new)?;
        // From the port of the closed connection.
        let served = Service::start(lab.new_server(), (new, 8080))?;
        let again = lab.client().from_port(40_404).get((moved, 8080))?;
        again.is_answered_by(new)?;
        drop(served);
        let (service, phone) = &fixed[usize::from(moved.is_ipv6())];
        phone.send(b"register again").map_err(unexpected)?;
        hears(phone, b"register again")?;
        // The old service still runs, and has something to say.
        service
            .send_to(b"a call", (client, 5060))
            .map_err(unexpected)?;
        hears(phone, b"a call")?;
        phone.send(b"and again").map_err(unexpected)?;
        hears(phone, b"and again")?;
        service.set_nonblocking(true).map_err(unexpected)?;
        assert!(service.recv_from(&mut [0; 64]).is_err(), "it has moved");
        conversation.exchange(b"and on", PATIENCE)?;
    }
    Ok(())
}

/// Runs a command on a host.
pub(crate) fn run(host: &Namespace, line: &str) -> Result {
    let mut command = Command::new("sh");
    command.args(["-ec", line]);
    let said = host.output(command, PATIENCE)?;
    if !said.status.success() {
        return Err(LabError::unexpected(format!("{line}: {said:?}")));
    }
    Ok(())
}

/// A container on the old server whose address is translated to the moved one in both directions,
/// and the process that has its namespace.
pub(crate) fn container(lab: &Lab) -> Result<(Namespace, Process)> {
    let container = Namespace::new("container")?;
    let old = lab.old_server();
    let mut sleep = Command::new("sleep");
    sleep.arg("60");
    let inside = container.spawn(sleep)?;
    let pid = inside.id();
    old.set_sysctls(&[("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")])?;
    run(
        old,
        &format!(
            "ip link add cbr type veth peer name eth0 netns {pid}
             ip addr add 10.8.0.1/24 dev cbr; ip addr add fd00:8::1/64 dev cbr nodad
             ip link set cbr up"
        ),
    )?;
    container.set_sysctls(&[("ipv4/ping_group_range", "0 2147483647")])?;
    run(
        &container,
        "ip link set lo up; ip link set eth0 up
         ip addr add 10.8.0.2/24 dev eth0; ip addr add fd00:8::2/64 dev eth0 nodad
         ip route add default via 10.8.0.1; ip -6 route add default via fd00:8::1",
    )?;
    run(
        old,
        "nft '
         table inet docker {
             chain pre {
                 type nat hook prerouting priority -100;
                 iifname eth0 ip daddr 192.0.2.5 tcp dport 80 dnat ip to 10.8.0.2
                 iifname eth0 ip6 daddr 2001:db8:a::5 tcp dport 80 dnat ip6 to fd00:8::2
             }
             chain post {
                 type nat hook postrouting priority 100;
                 oifname eth0 ip saddr 10.8.0.0/24 snat ip to 192.0.2.5
                 oifname eth0 ip6 saddr fd00:8::/64 snat ip6 to 2001:db8:a::5
             }
         }'",
    )?;
    Ok((container, inside))
}

#[test]
fn what_a_container_has_behind_the_moved_address_stays_its_own() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.moves(&FAMILIES);
    let _elsewhere = Elsewhere::start(&lab)?;
    let _application = Application::start(&lab, DNS)?;
    let (container, _inside) = container(&lab)?;
    let inside = (
        Ipv4Addr::new(10, 8, 0, 2),
        Ipv6Addr::new(0xfd00, 8, 0, 0, 0, 0, 0, 2),
    );
    let itself = Client::new(&container, inside.0, inside.1);
    let mut open = Vec::new();
    let mut services = Vec::new();
    for ((moved, remote, _), inside) in ENDS.into_iter().zip([inside.0.into(), inside.1.into()]) {
        services.push(Service::start(&container, IpAddr::clone(&inside))?);
        // IPv6 may take a moment to find its neighbour.
        let served = poll_until(PATIENCE, Duration::from_millis(10), || {
            lab.client().get(moved).ok()
        });
        let served = served.ok_or_else(|| LabError::unexpected("the container is not served"))?;
        served.is_answered_by(inside)?;
        open.push(lab.client().converse(moved)?);
        open.push(itself.converse(remote)?);
    }
    let goes_on = |open: &mut Vec<Conversation>| -> Result {
        for conversation in open {
            conversation.exchange(b"still here", PATIENCE)?;
        }
        for (_, remote, _) in ENDS {
            for _ in 0..3 {
                itself.udp((remote, DNS), b"question")?;
            }
            itself.udp((remote, DNS), &[7; 4000])?;
            itself.ping(remote, 56)?;
            itself.download(remote, MEGABYTE)?;
        }
        Ok(())
    };
    goes_on(&mut open)?;
    let daemons = setup.start_both()?;
    goes_on(&mut open)?;
    clients_are_served(&lab, DNS)?;
    daemons.old.kill()?;
    goes_on(&mut open)?;
    let mut old = setup.start(Role::Old)?;
    old.wait_until_up()?;
    goes_on(&mut open)?;
    clients_are_served(&lab, DNS)?;

    // Until somebody ends what is here.
    let live = || -> Result<[Option<u64>; 2]> {
        let status = setup.status(Role::Old)?;
        Ok([0, 1].map(|at| status.tunnel()["modes"][at]["here_tcp"].as_u64()))
    };
    // It is counted once a second.
    let pause = Duration::from_millis(50);
    let reaches = |is: &dyn Fn(u64) -> bool| {
        let all = || {
            live()
                .ok()?
                .into_iter()
                .all(|it| it.is_some_and(is))
                .then_some(())
        };
        poll_until(PATIENCE, pause, all)
            .ok_or_else(|| LabError::unexpected(format!("the old server has {:?}", live())))
    };
    reaches(&|count| count > 0)?;
    let said = setup.run(Role::Old, &["move", "--cut"])?;
    assert!(said.status.success(), "{said:?}");
    reaches(&|count| count == 0)?;
    for conversation in open.iter_mut().step_by(2) {
        let over = conversation.exchange(b"still here", PATIENCE);
        assert!(over.is_err(), "the new server has no such connection");
    }
    clients_are_served(&lab, DNS)
}

#[test]
fn connections_of_the_old_server_that_it_translates_itself_stay_its_own() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.moves(&FAMILIES);
    let _elsewhere = Elsewhere::start(&lab)?;
    let _application = Application::start(&lab, DNS)?;
    let old = lab.old_server();
    run(
        old,
        "nft '
         table inet own {
             chain pre {
                 type nat hook prerouting priority -100;
                 ip daddr 192.0.2.5 tcp dport 8081 redirect to :80
             }
             chain post {
                 type nat hook postrouting priority 100;
                 oifname eth0 ip saddr 192.0.2.1 ip daddr 203.0.113.10 snat ip to 192.0.2.5
             }
         }'",
    )?;
    let itself = Client::new(old, OLD, MOVED6);
    let _service = Service::start(old, OLD)?;
    let mut before = itself.converse(CLIENT)?;
    let mut served = lab.client().converse((MOVED, 8081))?;
    let daemons = setup.start_both()?;
    before.exchange(b"still here", PATIENCE)?;
    served.exchange(b"served here", PATIENCE)?;
    for _ in 0..3 {
        itself.get(CLIENT)?.is_answered_by(CLIENT)?;
        itself.udp((CLIENT, DNS), b"question")?;
    }
    itself.download(CLIENT, MEGABYTE)?;
    clients_are_served(&lab, DNS)?;
    daemons.old.kill()?;
    before.exchange(b"and here", PATIENCE)?;
    Ok(())
}

#[test]
fn a_lease_of_the_moved_address_is_renewed() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.moves(&FAMILIES);
    let _daemons = setup.start_both()?;
    // The server may speak first, and it may answer in fragments.
    let client = bound(lab.old_server(), SocketAddr::new(MOVED.into(), 68))?;
    let server = bound(lab.router(), SocketAddr::new(ROUTER_OLD.into(), 67))?;
    server.send_to(b"renew", (MOVED, 68)).map_err(unexpected)?;
    hears(&client, b"renew")?;
    client
        .send_to(b"request", (ROUTER_OLD, 67))
        .map_err(unexpected)?;
    hears(&server, b"request")?;
    server
        .send_to(&[9; 1600], (MOVED, 68))
        .map_err(unexpected)?;
    assert_eq!(
        client.recv_from(&mut [0; 2000]).map_err(unexpected)?.0,
        1600
    );
    Ok(())
}

/// As a TFTP server does (RFC 1350 section 4), and as VXLAN, whose datagrams go to one port in both
/// directions, from ports that say what is inside.
#[test]
fn what_comes_from_another_port_than_was_asked_stays_its_own() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.moves(&FAMILIES);
    let _application = Application::start(&lab, 40_069)?;
    let daemons = setup.start_both()?;
    clients_are_served(&lab, 40_069)?;
    let old = lab.old_server();
    let transfers = || -> Result {
        for (moved, remote, _) in ENDS {
            let far = bound(lab.clients(), SocketAddr::new(remote, 69))?;
            let asks = bound(old, SocketAddr::new(moved, 0))?;
            asks.send_to(b"read", (remote, 69)).map_err(unexpected)?;
            hears(&far, b"read")?;
            let from = asks.local_addr().map_err(unexpected)?;
            let transfer = bound(lab.clients(), SocketAddr::new(remote, 0))?;
            for _ in 0..2 {
                transfer.send_to(b"block", from).map_err(unexpected)?;
                hears(&asks, b"block")?;
                let to = transfer.local_addr().map_err(unexpected)?;
                asks.send_to(b"acknowledged", to).map_err(unexpected)?;
                hears(&transfer, b"acknowledged")?;
            }
            // A service of the old server's at such a port, which has not asked this client.
            let waits = bound(old, SocketAddr::new(moved, 40_069));
            lab.client().udp((moved, 40_069), b"request")?;
            drop(waits);
        }
        Ok(())
    };
    transfers()?;
    let tunnel = |host: &Namespace, local, remote, inside| {
        let line = format!(
            "ip link add vx0 type vxlan id 7 local {local} remote {remote} dstport 4789
             ip addr add {inside}/24 dev vx0; ip link set vx0 up"
        );
        run(host, &line)
    };
    if run(
        old,
        "ip link add vx9 type vxlan id 9 dstport 4790; ip link del vx9",
    )
    .is_err()
    {
        return Ok(());
    }
    tunnel(old, MOVED, CLIENT, "10.78.0.1")?;
    tunnel(lab.clients(), CLIENT, MOVED, "10.78.0.2")?;
    let ends = [[10, 78, 0, 1], [10, 78, 0, 2]].map(Ipv4Addr::from);
    // Who is on the other side speaks first, before anything has shown that it is a tunnel.
    let far = Client::new(lab.clients(), ends[1], CLIENT6);
    let _ = far.probe_udp((ends[0], 7), Duration::from_millis(100));
    let near = Client::new(old, ends[0], MOVED6);
    let through = |patience| -> Result {
        let services = [
            Service::start(old, ends[0])?,
            Service::start(lab.clients(), ends[1])?,
        ];
        for (who, to) in [(&near, ends[1]), (&far, ends[0])] {
            let served = poll_until(patience, Duration::from_millis(50), || who.get(to).ok());
            served.ok_or_else(|| LabError::unexpected(format!("{to} is not reached")))?;
        }
        drop(services);
        Ok(())
    };
    through(PATIENCE)?;
    daemons.old.kill()?;
    through(PATIENCE)?;
    let mut again = setup.start(Role::Old)?;
    again.wait_until_up()?;
    through(PATIENCE)?;
    clients_are_served(&lab, 40_069)
}
