//! The moved address from inside: the new server, its containers, and those of the old server reach
//! the application under it.
//!
//! ```text
//!  client ── router ──┬── old server ══╗        docker0 ── a container
//!                     │                ║ tunnel
//!                     └── new server ══╝        docker0 ── a container, another container
//!                         (application)
//! ```

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::Command;

use ipmoved::internals::Role;
use ipmoved::lab::topology::{CLIENT, Leg, MOVED, MOVED6, NEW, NEW6, UPLINK};
use ipmoved::lab::{
    Client, Conversation, Lab, LabError, Namespace, Probe, RawSocket, Service, Snapshot, UdpService,
};

use crate::outgoing;
use crate::stage::{FAMILIES, MEGABYTE, PATIENCE, RECOVERY, Result, SILENCE, setup};

/// The gateway of the containers, and the containers themselves.
const BRIDGE: Ipv4Addr = Ipv4Addr::new(172, 17, 0, 1);
const BRIDGE6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xd0c, 0, 0, 0, 0, 0, 1);
pub(crate) const FIRST: (Ipv4Addr, Ipv6Addr) = container(2);
const SECOND: (Ipv4Addr, Ipv6Addr) = container(3);

const fn container(n: u8) -> (Ipv4Addr, Ipv6Addr) {
    (
        Ipv4Addr::new(172, 17, 0, n),
        Ipv6Addr::new(0xfd00, 0xd0c, 0, 0, 0, 0, 0, n as u16),
    )
}

/// The moved address of each family, and the one that it is delivered to.
fn ends() -> [(IpAddr, IpAddr); 2] {
    [(MOVED.into(), NEW.into()), (MOVED6.into(), NEW6.into())]
}

/// A container on a host, on the bridge that Docker makes.
pub(crate) fn run_container(lab: &Lab, host: &Namespace, n: u8) -> Result<Namespace> {
    let (v4, v6) = container(n);
    let addresses = [(v4.into(), 16), (v6.into(), 64)];
    let gateways = [(BRIDGE.into(), 16), (BRIDGE6.into(), 64)];
    let port = format!("veth{n}");
    lab.add_behind(host, ("docker0", &port), &addresses, &gateways)
}

pub(crate) fn client(host: &Namespace, (v4, v6): (Ipv4Addr, Ipv6Addr)) -> Client<'_> {
    Client::new(host, v4, v6)
}

fn new_server(lab: &Lab) -> Result<Client<'_>> {
    let ping = [("ipv4/ping_group_range", "0 2147483647")];
    lab.new_server().set_sysctls(&ping)?;
    Ok(Client::new(lab.new_server(), NEW, NEW6))
}

fn shell(host: &Namespace, script: &str) -> Result {
    let mut sh = Command::new("sh");
    sh.args(["-e", "-c", script]);
    let said = host.output(sh, PATIENCE)?;
    if said.status.success() {
        return Ok(());
    }
    Err(LabError::unexpected(format!("{script}: {said:?}")))
}

/// What Docker makes of netfilter where it publishes no port: containers speak to the world in the
/// host's name, and what is forwarded to them has to answer them.
pub(crate) fn docker(host: &Namespace) -> Result {
    shell(
        host,
        "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
         for ipt in iptables ip6tables; do
           net=172.17.0.0/16; [ $ipt = iptables ] || net=fd00:d0c::/64
           $ipt -w -P FORWARD DROP
           $ipt -w -A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
           $ipt -w -A FORWARD -i docker0 ! -o docker0 -j ACCEPT
           $ipt -w -A FORWARD -i docker0 -o docker0 -j ACCEPT
           $ipt -w -t nat -A POSTROUTING -s $net ! -o docker0 -j MASQUERADE
         done",
    )
}

/// A host's own services let in who asks for them, and what answers the host.
fn firewall(host: &Namespace) -> Result {
    shell(
        host,
        "for ipt in iptables ip6tables; do
           $ipt -w -P INPUT DROP
           $ipt -w -A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
           $ipt -w -A INPUT -m conntrack --ctstate INVALID -j DROP
           for protocol in tcp udp; do
             $ipt -w -A INPUT -p $protocol --dport 80 -j ACCEPT
             $ipt -w -A INPUT -p $protocol --dport 53 -j ACCEPT
             $ipt -w -A INPUT -p $protocol --dport 81 -j ACCEPT
           done
           $ipt -w -A INPUT -p udp --dport 51850 -j ACCEPT
         done
         iptables -w -A INPUT -p icmp -j ACCEPT
         ip6tables -w -A INPUT -p icmpv6 -j ACCEPT
         iptables -w -A INPUT -p 253 -j ACCEPT
         ip6tables -w -A INPUT -p 253 -j ACCEPT",
    )
}

/// Everything that a caller may want of the application, which sees it as `seen`.
fn reaches(caller: Client<'_>, lab: &Lab, (moved, to): (IpAddr, IpAddr), seen: IpAddr) -> Result {
    let application = Service::start(lab.new_server(), to)?;
    let echo = UdpService::start(lab.new_server(), (to, 53))?;
    caller.get(moved)?.is_answered_by(to)?;
    caller.download(moved, 8 * MEGABYTE)?;
    caller.upload(moved, 8 * MEGABYTE)?;
    for size in [0, 1_200, 9_000] {
        caller.udp((moved, 53), &vec![b'u'; size])?;
    }
    caller.ping(moved, 56)?;
    caller.ping(moved, 4_000)?;
    for peer in application.peers().iter().chain(&echo.peers()) {
        assert_eq!(peer.ip(), seen, "of {:?}", caller.address_towards(moved));
    }
    assert_eq!(caller.probe_tcp((moved, 81), PATIENCE)?, Probe::Refused);
    Ok(())
}

/// The application, at the delivery address of each family.
fn applications(lab: &Lab) -> Result<[Service; 2]> {
    Ok([
        Service::start(lab.new_server(), NEW)?,
        Service::start(lab.new_server(), NEW6)?,
    ])
}

/// Callers speak while a daemon is away.
fn say_meanwhile(conversations: &mut [Conversation]) -> Result {
    for conversation in conversations {
        conversation.say(b"meanwhile")?;
    }
    Ok(())
}

/// What they said arrives once it is back, and their connections live.
fn go_on(conversations: &mut [Conversation]) -> Result {
    for conversation in conversations {
        conversation.hear(b"meanwhile", RECOVERY)?;
        conversation.exchange(b"after", RECOVERY)?;
    }
    Ok(())
}

#[test]
fn the_new_server_reaches_the_application_under_the_moved_address() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.moves(&FAMILIES);
    firewall(lab.new_server())?;
    let mut daemons = setup.start_both()?;
    let caller = new_server(&lab)?;
    for rp_filter in ["0", "1", "2"] {
        let all = [
            ("ipv4/conf/all/rp_filter", rp_filter),
            ("ipv4/conf/eth0/rp_filter", rp_filter),
        ];
        lab.new_server().set_sysctls(&all)?;
        for (moved, to) in ends() {
            reaches(caller, &lab, (moved, to), moved)?;
            // A client outside is served as ever.
            let _application = Service::start(lab.new_server(), to)?;
            (lab.client().get(moved)?.is_answered_by(to)?).for_the_client_itself()?;
        }
    }
    for (moved, to) in ends() {
        assert_eq!(
            caller.probe_udp((moved, 54), SILENCE)?,
            Probe::Silent,
            "the firewall"
        );
        let (one, other) = (
            RawSocket::open(lab.new_server(), to, 253)?,
            RawSocket::open(lab.new_server(), to, 253)?,
        );
        one.send(moved, b"of any protocol")?;
        let (from, _) = other.expect(PATIENCE, |payload| payload == b"of any protocol")?;
        assert_eq!(from, moved);
    }
    // Nothing of it is on the wire, and connections outlive the daemon.
    let applications = applications(&lab)?;
    let mut conversations = vec![caller.converse(MOVED)?, caller.converse(MOVED6)?];
    let tap = lab.tap(Leg::New)?;
    for conversation in &mut conversations {
        conversation.exchange(b"before", PATIENCE)?;
    }
    daemons.new.kill()?;
    say_meanwhile(&mut conversations)?;
    std::thread::sleep(SILENCE);
    let mut again = setup.start(Role::New)?;
    again.wait_until_up()?;
    daemons.old.wait_until_up()?;
    go_on(&mut conversations)?;
    let status = setup.status(Role::New)?;
    assert_eq!(status.drops("bad_source"), 0, "{status:?}");
    assert!(status.live_flows() >= 2, "{status:?}");
    assert_eq!(tap.stop()?.frames_with(b"before"), 0);
    drop(applications);
    Ok(())
}

#[test]
fn containers_of_the_new_server_reach_it_with_their_own_addresses() -> Result {
    let lab = Lab::new()?;
    let behind = run_container(&lab, lab.new_server(), 2)?;
    docker(lab.new_server())?;
    firewall(lab.new_server())?;
    let setup = setup(&lab)?.moves(&FAMILIES);
    let mut daemons = setup.start_both()?;
    let caller = client(&behind, FIRST);
    for rp_filter in ["0", "1", "2"] {
        let path = |link: &str| format!("ipv4/conf/{link}/rp_filter");
        for link in ["all", "eth0", "docker0"] {
            lab.new_server().set_sysctls(&[(&path(link), rp_filter)])?;
        }
        for (moved, to) in ends() {
            reaches(caller, &lab, (moved, to), caller.address_towards(moved))?;
        }
    }
    // It reaches everything else as before.
    let elsewhere = Service::start(lab.clients(), CLIENT)?;
    let far = elsewhere.addr();
    caller.get(far)?.is_answered_by(far.ip())?;
    assert!(elsewhere.peers().iter().all(|peer| peer.ip() == NEW));
    let applications = applications(&lab)?;
    let mut conversations = vec![caller.converse(MOVED)?, caller.converse(MOVED6)?];
    daemons.new.kill()?;
    say_meanwhile(&mut conversations)?;
    let mut again = setup.start(Role::New)?;
    again.wait_until_up()?;
    daemons.old.wait_until_up()?;
    go_on(&mut conversations)?;
    drop(applications);
    Ok(())
}

/// Until the peer speaks again, nothing says what is served here. The old server, which has its
/// address back meanwhile, resets what it does not know.
#[test]
fn a_containers_connection_outlives_a_killed_daemon_whose_peer_comes_late() -> Result {
    let lab = Lab::new()?;
    let behind = run_container(&lab, lab.new_server(), 2)?;
    docker(lab.new_server())?;
    let setup = setup(&lab)?.moves(&FAMILIES);
    let daemons = setup.start_both()?;
    let caller = client(&behind, FIRST);
    let _applications = applications(&lab)?;
    let mut conversations = vec![caller.converse(MOVED)?, caller.converse(MOVED6)?];
    for conversation in &mut conversations {
        conversation.exchange(b"before", PATIENCE)?;
    }
    daemons.new.kill()?;
    daemons.old.terminate()?;
    let mut new = setup.start(Role::New)?;
    say_meanwhile(&mut conversations)?;
    std::thread::sleep(SILENCE);
    let mut old = setup.start(Role::Old)?;
    old.wait_until_up()?;
    new.wait_until_up()?;
    go_on(&mut conversations)?;
    Ok(())
}

/// Only the uplink has programs, so the container is seen in the host's name.
#[test]
fn with_a_named_uplink_a_container_reaches_it_in_the_new_servers_name() -> Result {
    let lab = Lab::new()?;
    let behind = run_container(&lab, lab.new_server(), 2)?;
    docker(lab.new_server())?;
    let setup = setup(&lab)?
        .moves(&FAMILIES)
        .args(Role::New, &["--uplink", UPLINK]);
    let _daemons = setup.start_both()?;
    for (moved, to) in ends() {
        reaches(client(&behind, FIRST), &lab, (moved, to), moved)?;
    }
    Ok(())
}

/// Who publishes the port of the application's container: Docker with its proxy switched off or
/// Podman, with a rule for containers that come back to themselves; and a rule made by hand,
/// which leaves it out.
#[test]
fn an_application_in_a_container_is_reached_by_its_host_its_sibling_and_itself() -> Result {
    let lab = Lab::new()?;
    let behind = run_container(&lab, lab.new_server(), 2)?;
    let sibling = run_container(&lab, lab.new_server(), 3)?;
    docker(lab.new_server())?;
    shell(
        lab.new_server(),
        "iptables -w -t nat -A PREROUTING -p tcp --dport 80 -m addrtype --dst-type LOCAL \
           -j DNAT --to 172.17.0.2:8080
         iptables -w -A FORWARD -d 172.17.0.2 -p tcp --dport 8080 -j ACCEPT
         ip6tables -w -t nat -A PREROUTING -p tcp --dport 80 -m addrtype --dst-type LOCAL \
           -j DNAT --to [fd00:d0c::2]:8080
         ip6tables -w -A FORWARD -d fd00:d0c::2 -p tcp --dport 8080 -j ACCEPT",
    )?;
    let setup = setup(&lab)?.moves(&FAMILIES);
    let _daemons = setup.start_both()?;
    let applications = [
        Service::start(&behind, (FIRST.0, 8080))?,
        Service::start(&behind, (FIRST.1, 8080))?,
    ];
    let host = new_server(&lab)?;
    for caller in [
        lab.client(),
        host,
        client(&sibling, SECOND),
        client(&behind, FIRST),
    ] {
        for (application, (moved, _)) in applications.iter().zip(ends()) {
            caller.get(moved)?.is_answered_by(application.addr().ip())?;
            caller.download(moved, MEGABYTE)?;
        }
    }
    Ok(())
}

#[test]
fn a_kept_address_is_reached_by_the_new_server_and_its_containers() -> Result {
    let lab = Lab::new()?;
    let behind = run_container(&lab, lab.new_server(), 2)?;
    docker(lab.new_server())?;
    let setup = setup(&lab)?.moves(&FAMILIES).accept_what_moves();
    let setup = setup.args(Role::New, &["--deliver-to", "keep"]);
    let _daemons = setup.start_both()?;
    lab.client().ping(MOVED, 56)?;
    lab.client().ping(MOVED6, 56)?;
    for (moved, _) in ends() {
        for caller in [new_server(&lab)?, client(&behind, FIRST)] {
            reaches(caller, &lab, (moved, moved), caller.address_towards(moved))?;
        }
    }
    Ok(())
}

#[test]
fn what_is_not_served_here_goes_where_it_went() -> Result {
    let lab = Lab::new()?;
    let behind = run_container(&lab, lab.new_server(), 2)?;
    docker(lab.new_server())?;
    let setup = setup(&lab)?.moves(&["192.0.2.5:80-90/tcp", "[2001:db8:a::5]:80-90/tcp"]);
    let before = Service::start(lab.old_server(), (MOVED, 80))?;
    let caller = new_server(&lab)?;
    // A connection from before stays where it is.
    let mut old = caller.converse(MOVED)?;
    let _daemons = setup.start_both()?;
    lab.client().probe_tcp((MOVED, 88), PATIENCE)?;
    let application = [
        Service::start(lab.new_server(), NEW)?,
        Service::start(lab.new_server(), NEW6)?,
    ];
    for (moved, to) in ends() {
        let other = Service::start(lab.old_server(), (moved, 91))?;
        let echo = UdpService::start(lab.old_server(), (moved, 80))?;
        for caller in [caller, client(&behind, FIRST)] {
            caller.get(moved)?.is_answered_by(to)?;
            caller.get(other.addr())?.is_answered_by(moved)?;
            caller.udp(echo.addr(), b"to the old server")?;
            caller.ping(moved, 56)?;
        }
        assert!(!echo.peers().is_empty());
    }
    let tap = lab.tap(Leg::New)?;
    old.say(b"to whom it was begun with")?;
    std::thread::sleep(SILENCE);
    assert!(tap.stop()?.frames_with(b"to whom it was begun with") > 0);
    drop((before, application));
    Ok(())
}

/// A container that forges a source does not come in as somebody else by another link.
#[test]
fn a_container_calls_in_no_other_name_than_its_own() -> Result {
    let lab = Lab::new()?;
    let behind = run_container(&lab, lab.new_server(), 2)?;
    docker(lab.new_server())?;
    lab.new_server().set_sysctls(&[
        ("ipv4/conf/all/rp_filter", "0"),
        ("ipv4/conf/docker0/rp_filter", "0"),
    ])?;
    let trusted: [IpAddr; 2] = [
        "10.9.0.7".parse().unwrap(),
        "2001:db8:9::7".parse().unwrap(),
    ];
    let here = [
        "10.9.0.1".parse().unwrap(),
        "2001:db8:9::1".parse().unwrap(),
    ];
    lab.add_link(lab.new_server(), "eth1", &[(here[0], 24), (here[1], 64)])?;
    let _daemons = setup(&lab)?.moves(&FAMILIES).start_both()?;
    for (addr, (moved, to)) in trusted.into_iter().zip(ends()) {
        let echo = UdpService::start(lab.new_server(), (to, 53))?;
        client(&behind, FIRST).udp((moved, 53), b"in my own name")?;
        let prefix = if addr.is_ipv4() { 32 } else { 128 };
        lab.set_address(&behind, UPLINK, addr, prefix, true)?;
        let forger = match addr {
            IpAddr::V4(addr) => Client::new(&behind, addr, FIRST.1),
            IpAddr::V6(addr) => Client::new(&behind, FIRST.0, addr),
        };
        assert_eq!(forger.probe_udp((moved, 53), SILENCE)?, Probe::Silent);
        assert!(
            echo.peers().iter().all(|peer| peer.ip() != addr),
            "{:?}",
            echo.peers()
        );
    }
    Ok(())
}

#[test]
fn who_is_beside_or_behind_the_old_server_reaches_it() -> Result {
    let lab = Lab::new()?;
    let behind = run_container(&lab, lab.old_server(), 2)?;
    docker(lab.old_server())?;
    let _daemons = setup(&lab)?.moves(&FAMILIES).start_both()?;
    lab.router()
        .set_sysctls(&[("ipv4/ping_group_range", "0 2147483647")])?;
    for rp_filter in ["0", "1", "2"] {
        for link in ["all", "eth0", "docker0"] {
            let path = format!("ipv4/conf/{link}/rp_filter");
            lab.old_server().set_sysctls(&[(&path, rp_filter)])?;
        }
        for (moved, to) in ends() {
            // The router is on the link.
            let beside = Client::new(
                lab.router(),
                ipmoved::lab::topology::ROUTER_OLD,
                "2001:db8:a::fe".parse().unwrap(),
            );
            for caller in [beside, client(&behind, FIRST)] {
                reaches(caller, &lab, (moved, to), caller.address_towards(moved))?;
            }
        }
    }
    Ok(())
}

/// The new server holds the moved addresses itself (`--outgoing`), so that the kernel keeps its
/// calls of them on `lo`. The firewall lets in there nothing but what is let in elsewhere.
#[test]
fn a_new_server_that_holds_the_moved_address_reaches_the_application_too() -> Result {
    let lab = Lab::new()?;
    new_server(&lab)?;
    firewall(lab.new_server())?;
    shell(
        lab.new_server(),
        "for ipt in iptables ip6tables; do
           for protocol in tcp udp; do
             $ipt -w -A INPUT -p $protocol --dport 8082 -j ACCEPT
             $ipt -w -A INPUT -p $protocol --dport 2222 -j ACCEPT
           done
         done",
    )?;
    let before = Snapshot::of(lab.new_server())?;
    let maps = ends().map(|(moved, to)| {
        let [moved, to] = [(moved, 82), (to, 8082)].map(|it| SocketAddr::from(it).to_string());
        format!("{moved}={to}")
    });
    let [map, map6] = maps.each_ref().map(String::as_str);
    let setup = setup(&lab)?.moves(&FAMILIES).accept_what_moves();
    let setup = setup
        .args(
            Role::New,
            &["--outgoing", "--deliver", map, "--deliver", map6],
        )
        .args(Role::Old, &["--allow-outgoing"]);
    let mut daemons = setup.start_both()?;
    outgoing::until_bound(&lab)?;
    // From the address that the kernel takes, if a caller names none, and from the other one.
    let [unnamed, named] = [(MOVED, MOVED6), (NEW, NEW6)].map(|it| client(lab.new_server(), it));
    // As it was, in the end.
    for rp_filter in ["0", "2", "1"] {
        let all = [("ipv4/conf/all/rp_filter", rp_filter)];
        lab.new_server().set_sysctls(&all)?;
        for (moved, to) in ends() {
            for caller in [unnamed, named] {
                reaches(caller, &lab, (moved, to), caller.address_towards(moved))?;
                let _application = Service::start(lab.new_server(), (to, 8082))?;
                let _echo = UdpService::start(lab.new_server(), (to, 8082))?;
                caller.get((moved, 82))?.is_answered_by(to)?;
                caller.udp((moved, 82), b"by its map")?;
            }
            // Who is bound to the moved address reaches everything else, and a client the same.
            let (other, echo) = ((to, 2222), (to, 2222));
            let _others = Service::start(lab.new_server(), other)?;
            let _echo = UdpService::start(lab.new_server(), echo)?;
            unnamed.get(other)?.is_answered_by(to)?;
            unnamed.udp(echo, b"not moved")?;
            let _application = Service::start(lab.new_server(), to)?;
            (lab.client().get(moved)?.is_answered_by(to)?).for_the_client_itself()?;
        }
    }
    for (moved, to) in ends() {
        // Nobody is there.
        let refused = unnamed.probe_udp((moved, 53), PATIENCE)?;
        assert_eq!(refused, Probe::Refused, "{to}");
    }
    // A program that is bound to the moved address speaks with others meanwhile.
    let far = Service::start(lab.clients(), (CLIENT, 25))?;
    unnamed.download(far.addr(), MEGABYTE)?;
    assert!(
        far.peers()
            .iter()
            .all(|peer| peer.ip() == IpAddr::from(MOVED))
    );
    // Connections outlive the daemon, and new ones need none.
    let applications = applications(&lab)?;
    let mut conversations = vec![
        unnamed.converse(MOVED)?,
        unnamed.converse(MOVED6)?,
        named.converse(MOVED)?,
        named.converse(MOVED6)?,
    ];
    for conversation in &mut conversations {
        conversation.exchange(b"before", PATIENCE)?;
    }
    daemons.new.kill()?;
    for conversation in &mut conversations {
        conversation.exchange(b"meanwhile", PATIENCE)?;
    }
    unnamed.get(MOVED)?.is_answered_by(NEW)?;
    let mut again = setup.start(Role::New)?;
    again.wait_until_up()?;
    daemons.old.wait_until_up()?;
    for conversation in &mut conversations {
        conversation.exchange(b"after", RECOVERY)?;
    }
    unnamed.get(MOVED6)?.is_answered_by(NEW6)?;
    drop((applications, conversations));
    again.terminate()?;
    Snapshot::of(lab.new_server())?.is_same_as(&before)?;
    Ok(())
}
