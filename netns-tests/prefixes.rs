//! Whole prefixes have moved, and thousands of single addresses. The router sends them to the old
//! server, which has none of them configured.

use std::fmt::Write as _;
use std::fs;
use std::net::IpAddr;
use std::time::Duration;

use ipmoved::internals::{Netlink, Role, Route};
use ipmoved::lab::topology::{Leg, NEW, NEW6, OLD, OLD6, UPLINK};
use ipmoved::lab::{
    Client, DaemonSetup, Lab, LabError, Probe, Service, Snapshot, UdpService, poll_until,
};

use crate::stage::{MEGABYTE, PATIENCE, RECOVERY, Result, SILENCE, join, setup, split};

const PREFIX: &str = "192.0.2.64/28";
const PREFIX6: &str = "2001:db8:a:1::/64";

/// The first, the last and a middle address of both prefixes.
const WITHIN: [&str; 6] = [
    "192.0.2.64",
    "192.0.2.70",
    "192.0.2.79",
    "2001:db8:a:1::",
    "2001:db8:a:1::5",
    "2001:db8:a:1:ffff:ffff:ffff:ffff",
];

/// The neighbours of both, which have not moved.
const OUTSIDE: [&str; 4] = [
    "192.0.2.63",
    "192.0.2.80",
    "2001:db8:a:0:ffff::",
    "2001:db8:a:2::",
];

fn addr(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// Routes a network to the old server.
fn route(lab: &Lab, network: &str, len: u8) -> Result {
    let network = addr(network);
    let via = if network.is_ipv4() {
        OLD.into()
    } else {
        OLD6.into()
    };
    lab.router().run(|| {
        let failed = |error| LabError::unexpected(format!("netlink: {error}"));
        let netlink = Netlink::new().map_err(failed)?;
        let route = Route {
            via: Some(via),
            ..Route::to(network, len)
        };
        netlink.add_route(&route).map_err(failed)
    })
}

/// A lab whose router sends both prefixes to the old server, and their neighbours, which the old
/// server has.
fn routed() -> Result<Lab> {
    let lab = Lab::new()?;
    route(&lab, "192.0.2.64", 28)?;
    route(&lab, "2001:db8:a:1::", 64)?;
    for outside in OUTSIDE.map(addr) {
        let len = if outside.is_ipv4() { 32 } else { 128 };
        route(&lab, &outside.to_string(), len)?;
        lab.set_address(lab.old_server(), UPLINK, outside, len, true)?;
    }
    Ok(lab)
}

/// What lies beside the prefixes is served by the old server itself.
fn neighbours_stay(lab: &Lab) -> Result {
    for outside in OUTSIDE.map(addr) {
        let _own = Service::start(lab.old_server(), outside)?;
        lab.client().get(outside)?.is_answered_by(outside)?;
        let _own = UdpService::start(lab.old_server(), (outside, 53))?;
        lab.client().udp((outside, 53), b"own")?;
    }
    Ok(())
}

#[test]
fn every_address_of_a_prefix_is_served() -> Result {
    let lab = routed()?;
    let setup = setup(&lab)?.moves(&[PREFIX, PREFIX6]).accept_what_moves();
    let _both = [
        Service::start(lab.new_server(), NEW)?,
        Service::start(lab.new_server(), NEW6)?,
    ];
    let _udp = [
        UdpService::start(lab.new_server(), (NEW, 53))?,
        UdpService::start(lab.new_server(), (NEW6, 53))?,
    ];
    let _daemons = setup.start_both()?;
    for moved in WITHIN.map(addr) {
        let delivery: IpAddr = if moved.is_ipv4() {
            NEW.into()
        } else {
            NEW6.into()
        };
        let client = lab.client();
        let answer = client.get(moved)?.is_answered_by(delivery)?;
        answer.for_the_client_itself()?;
        for size in [0, 1_200, 9_000] {
            client.udp((moved, 53), &vec![b'u'; size])?;
        }
        client.ping(moved, 56)?;
        let closed = client.probe_tcp((moved, 81), PATIENCE)?;
        assert_eq!(closed, Probe::Refused, "{moved}");
    }
    lab.client().download(addr(WITHIN[1]), 4 * MEGABYTE)?;
    lab.client().upload(addr(WITHIN[4]), 4 * MEGABYTE)?;
    neighbours_stay(&lab)?;
    for role in [Role::Old, Role::New] {
        let moved = setup.status(role)?.tunnel()["moved"].clone();
        assert_eq!(moved, serde_json::json!([PREFIX, PREFIX6]));
    }
    Ok(())
}

#[test]
fn ports_of_a_prefix_move_and_the_others_stay() -> Result {
    let lab = routed()?;
    // Ports of one address beside those of the prefix that it lies in.
    let setup = setup(&lab)?
        .moves(&[
            "192.0.2.64/28:80/tcp",
            "192.0.2.70:53/udp",
            "[2001:db8:a:1::]/64:80/tcp",
            "[2001:db8:a:1::5]:53/udp",
        ])
        .accept_what_moves();
    let _both = [
        Service::start(lab.new_server(), NEW)?,
        Service::start(lab.new_server(), NEW6)?,
    ];
    let _udp = [
        UdpService::start(lab.new_server(), (NEW, 53))?,
        UdpService::start(lab.new_server(), (NEW6, 53))?,
    ];
    let mut own = Vec::new();
    for moved in WITHIN.map(addr) {
        let len = if moved.is_ipv4() { 32 } else { 128 };
        lab.set_address(lab.old_server(), UPLINK, moved, len, true)?;
        own.push(Service::start(lab.old_server(), (moved, 81))?);
    }
    let _daemons = setup.start_both()?;
    for moved in WITHIN.map(addr) {
        let (delivery, named): (IpAddr, _) = if moved.is_ipv4() {
            (NEW.into(), "192.0.2.70")
        } else {
            (NEW6.into(), "2001:db8:a:1::5")
        };
        let client = lab.client();
        let answer = client.get(moved)?.is_answered_by(delivery)?;
        answer.for_the_client_itself()?;
        client.get((moved, 81))?.is_answered_by(moved)?;
        client.ping(moved, 56)?;
        if moved == addr(named) {
            client.udp((moved, 53), b"moved")?;
        } else {
            let stays = client.probe_udp((moved, 53), SILENCE)?;
            assert_eq!(stays, Probe::Refused, "{moved}");
        }
    }
    neighbours_stay(&lab)
}

#[test]
fn an_application_on_a_kept_prefix_is_served() -> Result {
    let lab = routed()?;
    let new = lab.new_server();
    // An application that binds to an address of an IPv6 prefix that no interface has.
    new.set_sysctls(&[("ipv6/ip_nonlocal_bind", "1")])?;
    let before = Snapshot::of(new)?;
    let setup = setup(&lab)?
        .moves(&[PREFIX, PREFIX6])
        .accept_what_moves()
        .args(Role::New, &["--deliver-to", "keep"]);
    let daemons = setup.start_both()?;
    for moved in WITHIN.map(addr) {
        let started = poll_until(PATIENCE, Duration::from_millis(20), || {
            Service::start(new, moved).ok()
        });
        let Some(_service) = started else {
            return Err(LabError::unexpected(format!(
                "nobody can listen on {moved}"
            )));
        };
        let _udp = UdpService::start(new, (moved, 53))?;
        let client = lab.client();
        let answer = client.get(moved)?.is_answered_by(moved)?;
        answer.for_the_client_itself()?;
        client.udp((moved, 53), &[b'u'; 1_200])?;
        client.ping(moved, 56)?;
    }
    neighbours_stay(&lab)?;
    daemons.terminate()?;
    assert_eq!(Snapshot::of(new)?, before);
    Ok(())
}

/// Either daemon is killed and comes back, then stopped and started; `serving` starts what answers
/// at an address, and says where.
fn lives_on(
    lab: &Lab,
    setup: &DaemonSetup<'_>,
    serving: impl Fn(IpAddr) -> Result<(Service, IpAddr)>,
) -> Result {
    let mut daemons = setup.start_both()?;
    let ends = [WITHIN[1], WITHIN[4]].map(addr);
    let (mut services, mut talks) = (Vec::new(), Vec::new());
    for end in ends {
        services.push(serving(end)?);
        let mut talk = lab.client().converse(end)?;
        talk.exchange(b"before", PATIENCE)?;
        talks.push(talk);
    }
    for (role, probed) in [Role::Old, Role::New].into_iter().zip(ends) {
        let tap = lab.tap(Leg::Clients)?;
        let (killed, other) = split(daemons, role);
        killed.kill()?;
        for talk in &mut talks {
            talk.say(b"meanwhile")?;
        }
        let probe = lab.client().probe_tcp(probed, SILENCE)?;
        assert_eq!(probe, Probe::Silent, "{probed} without the {role} daemon");
        let seen = tap.stop()?;
        let refusals = ends.map(|end| seen.refusals_from(end));
        assert_eq!(refusals, [0, 0], "without the {role} daemon");
        daemons = join(role, setup.start(role)?, other);
        daemons.wait_until_up()?;
        for talk in &mut talks {
            talk.hear(b"meanwhile", RECOVERY)?;
            talk.exchange(b"after", RECOVERY)?;
        }
    }
    for role in [Role::Old, Role::New] {
        let (stopped, other) = split(daemons, role);
        stopped.terminate()?;
        daemons = join(role, setup.start(role)?, other);
        daemons.wait_until_up()?;
        for (end, (_, by)) in ends.into_iter().zip(&services) {
            let served = poll_until(PATIENCE, Duration::from_millis(20), || {
                lab.client().get(end).ok()
            });
            let served = served.ok_or_else(|| LabError::unexpected(format!("no {end}")))?;
            served.is_answered_by(*by)?.for_the_client_itself()?;
        }
    }
    Ok(())
}

#[test]
fn conversations_with_a_prefix_live_on_whichever_daemon_is_killed() -> Result {
    let lab = routed()?;
    let setup = setup(&lab)?.moves(&[PREFIX, PREFIX6]).accept_what_moves();
    lives_on(&lab, &setup, |end| {
        let by: IpAddr = if end.is_ipv4() {
            NEW.into()
        } else {
            NEW6.into()
        };
        Ok((Service::start(lab.new_server(), by)?, by))
    })
}

/// Where [`PREFIX`] and [`PREFIX6`] are delivered, each address to its own.
const BESIDE: [(&str, &str); 2] = [(PREFIX, "198.51.100.32/28"), (PREFIX6, "2001:db8:b:7::/64")];

/// The address of [`BESIDE`] with the same host part.
fn beside(moved: IpAddr) -> IpAddr {
    match moved {
        IpAddr::V4(moved) => IpAddr::from((u32::from(moved) & 15 | 0xc633_6420).to_be_bytes()),
        IpAddr::V6(moved) => {
            let host = u128::from(moved) & u128::from(u64::MAX);
            IpAddr::V6((host | 0x2001_0db8_000b_0007 << 64).into())
        }
    }
}

/// The daemons where each address is delivered to its own, which the new server has.
fn delivered_beside<'lab>(lab: &'lab Lab, more: &[&str]) -> Result<DaemonSetup<'lab>> {
    let new = lab.new_server();
    new.set_sysctls(&[
        ("ipv4/ip_nonlocal_bind", "1"),
        ("ipv6/ip_nonlocal_bind", "1"),
    ])?;
    let mut args = Vec::new();
    for (moved, to) in BESIDE {
        let mut command = std::process::Command::new("ip");
        command.args(["route", "add", "local", to, "dev", "lo"]);
        let said = new.output(command, PATIENCE)?;
        assert!(said.status.success(), "{}", said.stderr);
        args.extend(["--deliver".to_owned(), format!("{moved}={to}")]);
    }
    let args: Vec<&str> = args
        .iter()
        .map(String::as_str)
        .chain(more.iter().copied())
        .collect();
    let setup = setup(lab)?.moves(&[PREFIX, PREFIX6]).accept_what_moves();
    Ok(setup.args(Role::New, &args))
}

#[test]
fn each_address_of_a_prefix_is_delivered_to_its_own() -> Result {
    for outgoing in [false, true] {
        let lab = routed()?;
        let mut more = vec![
            "--deliver",
            "192.0.2.64/28:81/tcp=198.51.100.32/28:8081",
            "--deliver",
            "192.0.2.70:82=198.51.100.2:8082",
        ];
        if outgoing {
            more.push("--outgoing");
        }
        let setup = delivered_beside(&lab, &more)?;
        let daemons = setup.start_both()?;
        let new = lab.new_server();
        let inside = Client::new(new, NEW, NEW6);
        let _beside = Service::start(new, (NEW, 8_082))?;
        for moved in WITHIN.map(addr) {
            let own = beside(moved);
            let _web = Service::start(new, own)?;
            let _dns = UdpService::start(new, (own, 53))?;
            let client = lab.client();
            let answer = client.get(moved)?.is_answered_by(own)?;
            answer.for_the_client_itself()?;
            for size in [0, 9_000] {
                client.udp((moved, 53), &vec![b'u'; size])?;
            }
            client.ping(moved, 56)?;
            client.download(moved, MEGABYTE)?;
            let closed = client.probe_udp((moved, 54), PATIENCE)?;
            assert_eq!(closed, Probe::Refused, "{moved}");
            // From inside it is the same, also where the kernel keeps it on `lo`.
            inside.get(moved)?.is_answered_by(own)?;
            inside.udp((moved, 53), b"inside")?;
            if moved.is_ipv4() {
                let _mapped = Service::start(new, (own, 8_081))?;
                for from in [client, inside] {
                    from.get((moved, 81))?.is_answered_by(own)?;
                }
            }
        }
        lab.client()
            .get((addr("192.0.2.70"), 82))?
            .is_answered_by(NEW)?;
        let status = setup.status(Role::New)?;
        let deliver = status.tunnel()["deliver"].to_string();
        assert!(
            deliver.contains("192.0.2.64/28=198.51.100.32/28"),
            "{deliver}"
        );
        assert!(status.drops("martian_source") == 0, "{status:?}");
        daemons.terminate()?;
    }
    Ok(())
}

#[test]
fn conversations_with_a_prefix_that_is_delivered_to_another_live_on_too() -> Result {
    let lab = routed()?;
    let setup = delivered_beside(&lab, &[])?;
    let new = lab.new_server();
    lives_on(&lab, &setup, |end| {
        let own = beside(end);
        Ok((Service::start(new, own)?, own))
    })
}

#[test]
fn conversations_with_a_kept_prefix_live_on_too() -> Result {
    let lab = routed()?;
    let new = lab.new_server();
    new.set_sysctls(&[
        ("ipv4/ip_nonlocal_bind", "1"),
        ("ipv6/ip_nonlocal_bind", "1"),
    ])?;
    let setup = setup(&lab)?
        .moves(&[PREFIX, PREFIX6])
        .accept_what_moves()
        .args(Role::New, &["--deliver-to", "keep"]);
    lives_on(&lab, &setup, |end| Ok((Service::start(new, end)?, end)))
}

#[test]
fn thousands_of_addresses_move_from_a_file() -> Result {
    const COUNT: u32 = 5_000;
    let nth = |n: u32| IpAddr::V4((0xc612_8000 + n).into());
    let lab = Lab::new()?;
    route(&lab, "198.18.128.0", 19)?;
    let mut text = String::from("move = [\n");
    for n in 0..COUNT {
        // Their ports differ, so that no two that are side by side are alike.
        let ports = if n % 2 == 0 { "" } else { ":53,80" };
        let _ = writeln!(text, "\"{}{ports}\",", nth(n));
    }
    text.push_str("]\n");
    let path = lab.dir().join("many.toml");
    fs::write(&path, text).map_err(|error| LabError::unexpected(error.to_string()))?;
    let path = path.display().to_string();
    let setup = setup(&lab)?
        .moves(&[])
        .args(Role::Old, &["--config", &path]);
    let _service = Service::start(lab.new_server(), NEW)?;
    let _udp = UdpService::start(lab.new_server(), (NEW, 53))?;
    let _daemons = setup.start_both()?;
    let all = poll_until(PATIENCE, Duration::from_millis(50), || {
        let status = setup.status(Role::New).ok()?;
        let moved = status.tunnel()["moved"].as_array()?.len();
        (moved == COUNT as usize).then_some(())
    });
    assert!(all.is_some(), "the new server was not told of all");
    for moved in [0, 1, COUNT / 2, COUNT - 2, COUNT - 1].map(nth) {
        let answer = lab.client().get(moved)?.is_answered_by(NEW)?;
        answer.for_the_client_itself()?;
        lab.client().udp((moved, 53), b"u")?;
    }
    let outside = nth(COUNT);
    lab.set_address(lab.old_server(), UPLINK, outside, 32, true)?;
    let _own = Service::start(lab.old_server(), outside)?;
    lab.client().get(outside)?.is_answered_by(outside)?;
    // A person is shown some of them.
    for role in [Role::Old, Role::New] {
        let shown = setup.run(role, &["status"])?.stdout;
        assert!(shown.contains(" and 4936 more"), "{shown}");
        assert!(shown.len() < 10_000, "{} bytes", shown.len());
    }
    Ok(())
}

/// So scattered that no prefix holds two of them: the new server holds each by itself.
#[test]
fn thousands_of_scattered_addresses_are_kept() -> Result {
    const COUNT: u32 = 2_000;
    let nth = |n: u32| IpAddr::V4((0xc612_8001 + 2 * n).into());
    let lab = Lab::new()?;
    route(&lab, "198.18.128.0", 19)?;
    let mut text = String::from("move = [\n");
    for n in 0..COUNT {
        let _ = writeln!(text, "\"{}\",", nth(n));
    }
    text.push_str("]\n");
    let path = lab.dir().join("scattered.toml");
    fs::write(&path, text).map_err(|error| LabError::unexpected(error.to_string()))?;
    let path = path.display().to_string();
    let new = lab.new_server();
    let before = Snapshot::of(new)?;
    let setup = setup(&lab)?
        .moves(&[])
        .args(Role::Old, &["--config", &path])
        .args(
            Role::New,
            &["--deliver-to", "keep", "--accept", "198.18.128.0/19"],
        );
    let daemons = setup.start_both()?;
    let served = |nth: IpAddr| -> Result {
        let started = poll_until(PATIENCE, Duration::from_millis(20), || {
            Service::start(new, nth).ok()
        });
        let Some(_service) = started else {
            return Err(LabError::unexpected(format!("nobody can listen on {nth}")));
        };
        lab.client().get(nth)?.is_answered_by(nth)?;
        Ok(())
    };
    for n in [COUNT - 1, COUNT / 2, 0] {
        served(nth(n))?;
    }
    // Somebody takes all of them away.
    new.run(|| {
        let failed = |error| LabError::unexpected(format!("netlink: {error}"));
        let netlink = Netlink::new().map_err(failed)?;
        for held in netlink.addresses().map_err(failed)? {
            if held.index == 1 && (0..COUNT).any(|n| nth(n) == held.addr) {
                netlink.delete_address(&held).map_err(failed)?;
            }
        }
        Ok(())
    })?;
    for n in [COUNT - 1, COUNT / 2, 0] {
        served(nth(n))?;
    }
    daemons.terminate()?;
    assert_eq!(Snapshot::of(new)?, before);
    Ok(())
}

#[test]
fn a_prefix_that_would_take_this_servers_own_address_is_refused_with_what_can_move() -> Result {
    let lab = Lab::new()?;
    let psk = setup(&lab)?.psk_file(Role::Old).display().to_string();
    let peer = NEW.to_string();
    let moving = |moved: &str| {
        let line = ["--peer", &peer, "--psk-file", &psk, "--move", moved];
        setup(&lab)?.run(Role::Old, &line)
    };
    let refused = moving("192.0.2.0/29")?;
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    let says = "192.0.2.1, the address this server itself uses to reach the peer";
    assert!(refused.stderr.contains(says), "{refused:?}");
    let beside = "--move 192.0.2.0 --move 192.0.2.2/31 --move 192.0.2.4/30";
    assert!(refused.stderr.contains(beside), "{refused:?}");
    let refused = moving("192.0.2.5/28")?;
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    assert!(
        refused.stderr.contains("the prefix is 192.0.2.0/28"),
        "{refused:?}"
    );
    Ok(())
}
