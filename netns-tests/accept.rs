//! What the new server takes from an old one that was taken over: moves that it never accepted, and
//! clients that are in its own networks.
//!
//! ```text
//!                                         ┌── old server 192.0.2.1, or an impostor with its key
//!  clients 203.0.113.10, 10.9.0.7 ── router              ║ tunnel
//!                                         └── new server 198.51.100.2 on eth0 (gateway .254),
//!                                                        10.9.0.1/24 on eth1
//! ```

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use ipmoved::internals::{Netlink, Role};
use ipmoved::lab::daemon::write_psk;
use ipmoved::lab::topology::{
    CLIENT, CLIENT6, MOVED, MOVED6, NEW, NEW6, ROUTER_NEW, more_moved, more_old,
};
use ipmoved::lab::{
    Client, DaemonSetup, Lab, LabError, Namespace, Probe, Process, Service, UdpService, Watch,
    packets, poll_until,
};
use serde_json::Value;

use crate::impostor::Impostor;
use crate::stage::{PATIENCE, Result, SILENCE, setup, warnings};

/// How long the new server may take to notice that its gateways or resolvers are others.
const NOTICED: Duration = Duration::from_secs(12);

fn failed(error: impl std::fmt::Display) -> LabError {
    LabError::unexpected(error.to_string())
}

/// Waits until `status` warns of something on one server.
fn warned(setup: &DaemonSetup<'_>, role: Role, text: &str) -> Result {
    let says = || {
        let warnings = warnings(setup, role).ok()?;
        let mut about = warnings.iter().filter(|warning| warning.contains(text));
        about.next().map(drop)
    };
    poll_until(PATIENCE, Duration::from_millis(50), says).ok_or_else(|| {
        let found = warnings(setup, role);
        LabError::unexpected(format!(
            "the {role} server does not warn of {text}: {found:?}"
        ))
    })
}

/// The moves that are refused, each with its reason, as the first tunnel of the new server has
/// them.
fn refused(tunnel: &Value) -> Vec<(String, String)> {
    let all = tunnel["refused"].as_array().map_or(&[][..], Vec::as_slice);
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    all.iter()
        .map(|it| (text(&it["moved"]), text(&it["why"])))
        .collect()
}

/// The addresses on `lo` of a host that only some hosts have.
fn held(host: &Namespace) -> Result<Vec<IpAddr>> {
    host.run(|| {
        let all = Netlink::new().and_then(|netlink| netlink.addresses());
        let quiet = all.map_err(failed)?.into_iter();
        let quiet = quiet.filter(|it| it.index == 1 && !it.addr.is_loopback());
        Ok(quiet.map(|it| it.addr).collect())
    })
}

#[test]
fn what_is_not_accepted_is_refused_and_both_servers_say_what_to_add() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?
        .moves(&["192.0.2.5:80/tcp", "192.0.2.5:53/udp", "2001:db8:a::5"])
        .args(Role::New, &["--accept", "192.0.2.0/28:80,443/tcp"]);
    let _application = Service::start(lab.new_server(), NEW)?;
    let _application6 = Service::start(lab.new_server(), NEW6)?;
    let echo = UdpService::start(lab.new_server(), (NEW, 53))?;
    let mut daemons = setup.start_both()?;
    let flags = "--accept 192.0.2.5:53/udp --accept 2001:db8:a::5";
    for role in [Role::New, Role::Old] {
        warned(&setup, role, flags)?;
    }
    (lab.client().get(MOVED)?.is_answered_by(NEW)?).for_the_client_itself()?;
    let silent = lab.client().probe_udp((MOVED, 53), SILENCE)?;
    assert_eq!(silent, Probe::Silent);
    let silent = lab.client().probe_tcp((MOVED6, 80), SILENCE)?;
    assert_eq!(silent, Probe::Silent);
    assert!(echo.peers().is_empty());

    let status = setup.status(Role::New)?;
    let tunnel = status.tunnel();
    assert_eq!(tunnel["accept"][0], "192.0.2.0/28:80,443/tcp");
    assert_eq!(tunnel["moved"], serde_json::json!(["192.0.2.5:80/tcp"]));
    assert_eq!(tunnel["refused_moves"], 2, "{tunnel}");
    let [(udp, why), (v6, _)] = &refused(tunnel)[..] else {
        panic!("{tunnel}");
    };
    assert_eq!(
        (udp.as_str(), v6.as_str()),
        ("192.0.2.5:53/udp", "2001:db8:a::5")
    );
    assert!(
        why.ends_with("give the new server --accept 192.0.2.5:53/udp"),
        "{why}"
    );
    assert!(status.drops("not_moved") > 0);
    let text = setup.run(Role::New, &["status"])?.stdout;
    assert!(text.contains("--accept 2001:db8:a::5"), "{text}");
    for daemon in [&mut daemons.old, &mut daemons.new] {
        let log = daemon.process().stderr();
        assert!(log.contains(flags), "{log}");
    }

    // The line helps, and then nobody complains any more.
    daemons.new.terminate()?;
    let flags: Vec<&str> = flags.split(' ').collect();
    let setup = setup.args(Role::New, &flags);
    let mut new = setup.start(Role::New)?;
    new.wait_until_up()?;
    daemons.old.wait_until_up()?;
    lab.client().get((MOVED6, 80))?.is_answered_by(NEW6)?;
    lab.client().udp((MOVED, 53), b"now")?;
    assert_eq!(warnings(&setup, Role::New)?, [""; 0]);
    Ok(())
}

#[test]
fn without_accept_all_is_served_and_the_new_server_warns() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.moves(&["192.0.2.5:80/tcp", "2001:db8:a::5"]);
    let _application = Service::start(lab.new_server(), NEW)?;
    let _daemons = setup.start_both()?;
    warned(
        &setup,
        Role::New,
        "--accept 192.0.2.5:80/tcp --accept 2001:db8:a::5",
    )?;
    lab.client().get(MOVED)?.is_answered_by(NEW)?;
    assert_eq!(warnings(&setup, Role::Old)?, [""; 0]);
    let text = setup.run(Role::New, &["status"])?.stdout;
    assert!(text.contains("whatever the old server names"), "{text}");
    Ok(())
}

#[test]
fn an_impostor_does_not_get_at_ports_that_are_not_accepted() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.args(
        Role::New,
        &[
            "--accept",
            "192.0.2.5:443/tcp",
            "--accept",
            "[2001:db8:a::5]:443/tcp",
        ],
    );
    let echo = UdpService::start(lab.new_server(), (NEW, 53))?;
    let mut daemon = setup.start(Role::New)?;
    let impostor = Impostor::new(&lab, &["192.0.2.5", "[2001:db8:a::5]:53"])?;
    daemon.wait_until_up()?;
    let watch = Watch::start(lab.new_server(), "ipmoved0")?;
    let words = b"let me in";
    let ask = |from: IpAddr, to: IpAddr| packets::udp((from, 4_000), (to, 53), words);
    impostor.send(&ask(CLIENT.into(), MOVED.into()))?;
    impostor.send(&ask(CLIENT6.into(), MOVED6.into()))?;
    let counted = || {
        let status = setup.status(Role::New).ok()?;
        (status.drops("not_moved") >= 2).then_some(status)
    };
    let status = poll_until(PATIENCE, Duration::from_millis(50), counted);
    let status = status.ok_or_else(|| failed("the packets were not counted"))?;
    assert_eq!(status.tunnel()["moved"], serde_json::json!([]));
    assert_eq!(refused(status.tunnel()).len(), 2, "{status:?}");
    let seen = watch.count(SILENCE, |packet| {
        packet.windows(words.len()).any(|window| window == words)
    })?;
    assert_eq!(seen, 0);
    assert!(echo.peers().is_empty());
    Ok(())
}

/// A new server that would accept everything, and keep it: its settings have a first peer whose
/// place the impostor takes, and a second one at 203.0.113.77.
fn keeps_everything(lab: &Lab, setup: &DaemonSetup<'_>) -> Result<Process> {
    let second = lab.dir().join("psk-2");
    write_psk(&second)?;
    let text = format!(
        "[[peers]]\npeer = \"192.0.2.1\"\npsk-file = {:?}\ndeliver-to = \"keep\"\n\
         accept = [\"0.0.0.0/0\", \"::/0\"]\n\
         [[peers]]\npeer = \"203.0.113.77\"\npsk-file = {second:?}\naccept = \"192.0.2.77\"\n",
        setup.psk_file(Role::New)
    );
    let mut command = setup.command();
    command
        .arg("--config")
        .arg(written(lab, "keep.toml", &text)?);
    lab.new_server().spawn(command)
}

fn written(lab: &Lab, name: &str, text: &str) -> Result<PathBuf> {
    let path = lab.dir().join(name);
    fs::write(&path, text).map_err(failed)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(path)
}

#[test]
fn what_the_new_server_needs_itself_is_never_held() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    lab.add_link(
        lab.new_server(),
        "eth1",
        &[(Ipv4Addr::new(10, 9, 0, 1).into(), 24)],
    )?;
    let daemon = keeps_everything(&lab, &setup)?;
    let needed = [
        ("198.51.100.254", "gateway"),
        ("2001:db8:b::fe", "gateway"),
        ("203.0.113.77", "another peer"),
        ("192.0.2.1", "this tunnel"),
        ("198.51.100.2:443/tcp", "this tunnel"),
        ("10.9.0.1", "an address of the new server already"),
        ("169.254.169.254", "link-local"),
        ("fd00:ec2::254", "metadata"),
    ];
    let moves: Vec<&str> = needed.iter().map(|&(moved, _)| moved).collect();
    let moves = [&moves[..], &["192.0.2.5", "2001:db8:a::5"]].concat();
    let _impostor = Impostor::new(&lab, &moves)?;
    let served = || {
        let held = held(lab.new_server()).ok()?;
        (held.len() == 2).then_some(held)
    };
    let held = poll_until(PATIENCE, Duration::from_millis(50), served);
    let held = held.ok_or_else(|| failed(format!("not held: {}", daemon.stderr())))?;
    assert_eq!(held, [IpAddr::from(MOVED), IpAddr::from(MOVED6)]);
    let status = setup.status(Role::New)?;
    let refused = refused(status.tunnel());
    assert_eq!(refused.len(), needed.len(), "{refused:?}");
    for ((moved, says), (refused, why)) in needed.iter().zip(&refused) {
        assert_eq!(moved, refused);
        assert!(why.contains(says), "{why}");
    }
    assert_eq!(status.tunnel()["refused_moves"], needed.len());
    // The new server still finds its way out.
    let new = Client::new(lab.new_server(), NEW, NEW6);
    new.ping(ROUTER_NEW, 56)?;
    new.ping(CLIENT, 56)?;
    Ok(())
}

#[test]
fn a_resolver_is_never_served_also_if_it_becomes_one_later() -> Result {
    let lab = Lab::builder().moved(2).build()?;
    let hosts = written(&lab, "hosts", "192.0.2.1 old.example\n")?;
    let resolv = written(&lab, "hosts.resolv", "nameserver 192.0.2.6\n")?;
    let setup = setup(&lab)?
        .moves(&["192.0.2.5", "192.0.2.6"])
        .peer_by_name(Role::New, "old.example", &hosts)
        .args(Role::New, &["--accept", "192.0.2.0/28"]);
    let _application = Service::start(lab.new_server(), NEW)?;
    let _daemons = setup.start_both()?;
    warned(
        &setup,
        Role::Old,
        "192.0.2.6 is a resolver of the new server",
    )?;
    lab.client().get(MOVED)?.is_answered_by(NEW)?;
    // Written in place: the daemon sees this very file.
    fs::write(&resolv, "nameserver 192.0.2.5\n").map_err(failed)?;
    let moved = || {
        setup
            .status(Role::New)
            .map(|status| status.tunnel()["moved"].clone())
    };
    let other = || (moved().ok()? == serde_json::json!(["192.0.2.6"])).then_some(());
    let swapped = poll_until(NOTICED, Duration::from_millis(100), other);
    assert!(swapped.is_some(), "{:?}", setup.status(Role::New));
    assert_eq!(lab.client().probe_tcp(MOVED, SILENCE)?, Probe::Silent);
    lab.client()
        .get(Ipv4Addr::new(192, 0, 2, 6))?
        .is_answered_by(NEW)?;
    warned(
        &setup,
        Role::Old,
        "192.0.2.5 is a resolver of the new server",
    )
}

#[test]
fn the_first_to_name_an_address_does_not_get_what_is_accepted_of_another() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let second = lab.dir().join("psk-2");
    write_psk(&second)?;
    let text = format!(
        "[[peers]]\npeer = \"192.0.2.1\"\npsk-file = {:?}\naccept = \"192.0.2.5\"\n\
         [[peers]]\npeer = \"{}\"\npsk-file = {second:?}\naccept = \"{}\"\n",
        setup.psk_file(Role::New),
        more_old(1),
        more_moved(1)
    );
    let mut command = setup.command();
    command
        .arg("--config")
        .arg(written(&lab, "two.toml", &text)?);
    let new = lab.new_server().spawn(command)?;
    let _application = Service::start(lab.new_server(), NEW)?;
    let _impostor = Impostor::new(&lab, &[&more_moved(1).to_string()])?;
    let host = lab.add_old_server(1)?;
    let mut command = setup.command();
    command
        .args(["--peer", &NEW.to_string(), "--psk-file"])
        .arg(&second);
    command.args(["--move", &more_moved(1).to_string()]);
    let _old = host.spawn(command)?;
    let served = || {
        let status = setup.status(Role::New).ok()?;
        let moved = &status.0["tunnels"][1]["moved"];
        (moved[0] == more_moved(1).to_string()).then_some(())
    };
    let served = poll_until(PATIENCE * 3, Duration::from_millis(50), served);
    assert!(
        served.is_some(),
        "{:?} {}",
        setup.status(Role::New),
        new.stderr()
    );
    lab.client().get(more_moved(1))?.is_answered_by(NEW)?;
    Ok(())
}

const NEIGHBOUR: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 7);
const NEIGHBOUR6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 9, 0, 0, 0, 0, 7);

/// A lab in which a network on a second link of the new server has the same addresses as one behind
/// the old server.
fn twins(rp_filter: &str) -> Result<Lab> {
    let lab = Lab::new()?;
    lab.new_server().set_sysctls(&[
        ("ipv4/conf/all/rp_filter", rp_filter),
        ("ipv4/conf/default/rp_filter", rp_filter),
        ("ipv4/conf/eth0/rp_filter", rp_filter),
    ])?;
    let own = [
        (IpAddr::from(Ipv4Addr::new(10, 9, 0, 1)), 24),
        (
            IpAddr::from(Ipv6Addr::new(0x2001, 0xdb8, 9, 0, 0, 0, 0, 1)),
            64,
        ),
    ];
    lab.add_link(lab.new_server(), "eth1", &own)?;
    for (host, interface, v4, v6) in [
        (lab.clients(), "eth0", NEIGHBOUR, NEIGHBOUR6),
        (
            lab.router(),
            "clients",
            Ipv4Addr::new(10, 9, 0, 254),
            Ipv6Addr::new(0x2001, 0xdb8, 9, 0, 0, 0, 0, 0xfe),
        ),
    ] {
        lab.set_address(host, interface, v4, 24, true)?;
        lab.set_address(host, interface, v6, 64, true)?;
    }
    Ok(lab)
}

#[test]
fn no_client_claims_an_address_of_the_new_servers_own_networks() -> Result {
    for rp_filter in ["0", "1", "2"] {
        let lab = twins(rp_filter)?;
        let setup = setup(&lab)?
            .moves(&["192.0.2.5", "2001:db8:a::5"])
            .accept_what_moves();
        let applications = [
            Service::start(lab.new_server(), NEW)?,
            Service::start(lab.new_server(), NEW6)?,
        ];
        let echo = UdpService::start(lab.new_server(), (NEW, 53))?;
        let mut daemons = setup.start_both()?;
        let neighbour = Client::new(lab.clients(), NEIGHBOUR, NEIGHBOUR6);
        for moved in [IpAddr::from(MOVED), MOVED6.into()] {
            let silent = neighbour.probe_tcp(moved, SILENCE)?;
            assert_eq!(silent, Probe::Silent, "{moved}, rp_filter {rp_filter}");
        }
        assert_eq!(neighbour.probe_udp((MOVED, 53), SILENCE)?, Probe::Silent);
        lab.client().get(MOVED)?.is_answered_by(NEW)?;
        assert!(applications.iter().all(|it| {
            it.peers()
                .iter()
                .all(|peer| peer.ip() != IpAddr::from(NEIGHBOUR))
        }));
        assert!(echo.peers().is_empty());
        let status = setup.status(Role::New)?;
        assert!(status.drops("martian_source") >= 3, "{status:?}");
        assert_eq!(status.drops("bad_source"), 0);
        warned(
            &setup,
            Role::New,
            "10.9.0.7 is refused: it lies in 10.9.0.0/24 on eth1",
        )?;
        warned(&setup, Role::New, "add --clients-from 10.9.0.0/24")?;

        daemons.new.terminate()?;
        let clients = [
            "--clients-from",
            "10.9.0.0/24",
            "--clients-from",
            "2001:db8:9::/64",
        ];
        // Somebody there has the client's address: or replies do not come as far as the link.
        for address in [IpAddr::from(NEIGHBOUR), NEIGHBOUR6.into()] {
            let mut ip = Command::new("ip");
            ip.args(["neighbour", "add", &address.to_string(), "dev", "eth1"]);
            ip.args(["lladdr", "02:00:00:00:00:07", "nud", "permanent"]);
            let said = lab.new_server().output(ip, PATIENCE)?;
            assert!(said.status.success(), "{said:?}");
        }
        let setup = setup.args(Role::New, &clients);
        let mut new = setup.start(Role::New)?;
        new.wait_until_up()?;
        daemons.old.wait_until_up()?;
        (neighbour.get(MOVED)?.is_answered_by(NEW)?).for_the_client_itself()?;
        (neighbour.get(MOVED6)?.is_answered_by(NEW6)?).for_the_client_itself()?;
        let probe = neighbour.probe_udp((MOVED, 53), PATIENCE)?;
        assert_eq!(probe, Probe::Open);
        assert!(echo.peers().iter().any(|peer| peer.ip() == NEIGHBOUR));
        let status = setup.status(Role::New)?;
        assert_eq!(status.drops("martian_source"), 0, "{status:?}");
        assert_eq!(status.tunnel()["clients_from"][0], "10.9.0.0/24");
    }
    Ok(())
}
