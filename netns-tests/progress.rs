//! The new server tells the old one how far a move has come: who listens, and who comes which way.
//!
//! ```text
//!  client ── router ──┬── old server, 192.0.2.5 moved by ports
//!             │       │        ║
//!             └───────┴── new server, 198.51.100.2: the same service
//! ```

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use ipmoved::internals::Role;
use ipmoved::lab::topology::{MOVED, MOVED6, NEW, NEW6};
use ipmoved::lab::{DaemonSetup, Lab, LabError, Namespace, Service, UdpService, poll_until};
use ipmoved::lab::{Wire, packets};
use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};

use crate::behind_dnat::{Container, has, shell};
use crate::stage::{PATIENCE, RECOVERY, Result, setup};

/// What changes on the new server is known on the old one within this time. The contract is a
/// second; the rest is that of a busy machine, and of the look itself.
const SOON: Duration = Duration::from_millis(1_500);

/// Between two looks at the status.
const PAUSE: Duration = Duration::from_millis(50);

/// What a server says of a move.
fn of(setup: &DaemonSetup<'_>, role: Role, what: &str) -> Result<Value> {
    let status = setup.status(role)?;
    let progress = status.tunnel()["progress"].as_array().cloned();
    let found = progress
        .unwrap_or_default()
        .into_iter()
        .find(|it| it["what"] == what);
    Ok(found.unwrap_or_default())
}

/// Waits until a server says that of a move.
fn becomes(
    setup: &DaemonSetup<'_>,
    role: Role,
    within: Duration,
    what: &str,
    wanted: &[(&str, Value)],
) -> Result {
    let mut last = Value::Null;
    let reached = poll_until(within, PAUSE, || {
        last = of(setup, role, what).ok()?;
        let said = |(name, value): &(&str, Value)| last[*name] == *value;
        wanted.iter().all(said).then_some(())
    });
    reached.ok_or_else(|| LabError::unexpected(format!("{role}: {what} is {last}, not {wanted:?}")))
}

fn listens(setup: &DaemonSetup<'_>, what: &str, wanted: &str) -> Result {
    becomes(setup, Role::Old, SOON, what, &[("listens", json!(wanted))])
}

/// A socket of the new server that waits for clients, as a program would open it.
fn open(host: &Namespace, kind: Type, at: SocketAddr, only_v6: bool) -> Result<Socket> {
    let failed = |error: std::io::Error| LabError::unexpected(format!("{at}: {error}"));
    host.run(|| {
        let socket = Socket::new(Domain::for_address(at), kind, None).map_err(failed)?;
        socket.set_reuse_address(true).map_err(failed)?;
        if at.is_ipv6() {
            socket.set_only_v6(only_v6).map_err(failed)?;
        }
        socket.bind(&at.into()).map_err(failed)?;
        if kind == Type::STREAM {
            socket.listen(8).map_err(failed)?;
        }
        Ok(socket)
    })
}

#[test]
fn the_old_server_knows_within_a_second_whether_something_listens() -> Result {
    let lab = Lab::new()?;
    let web = format!("{MOVED}:80/tcp");
    let mapped = format!("{MOVED}:81/tcp");
    let both = format!("{MOVED}:1000,1002/tcp");
    let dns = format!("{MOVED}:53/udp");
    let either = format!("{MOVED}:54");
    let web6 = format!("[{MOVED6}]:80/tcp");
    let range = format!("{MOVED}:2000-4000/tcp");
    let moves: [&str; 7] = [&web, &mapped, &both, &dns, &either, &web6, &range];
    let map = format!("{MOVED}:81/tcp={NEW}:8081");
    let setup = setup(&lab)?
        .moves(&moves)
        .args(Role::New, &["--deliver", &map]);
    let _daemons = setup.start_both()?;
    let new = lab.new_server();
    for what in [&web, &mapped, &both, &dns, &either, &web6] {
        listens(&setup, what, "no")?;
    }
    listens(&setup, &range, "unknown")?;

    let any6 = |port| SocketAddr::new("::".parse().expect("an address"), port);
    let any = |port| SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port);
    let here = |port| SocketAddr::new(NEW.into(), port);
    let here6 = |port| SocketAddr::new(NEW6.into(), port);
    let (stream, datagram) = (Type::STREAM, Type::DGRAM);
    for (kind, at, only_v6, what, other) in [
        (stream, here(80), false, &web, Some(&web6)),
        (stream, any(80), false, &web, Some(&web6)),
        (stream, any6(80), true, &web6, Some(&web)),
        (stream, here6(80), false, &web6, Some(&web)),
        (stream, here(8081), false, &mapped, None),
        (datagram, here(53), false, &dns, None),
        (datagram, any6(53), false, &dns, None),
        (datagram, any(54), false, &either, None),
        (stream, any(54), false, &either, None),
    ] {
        let socket = open(new, kind, at, only_v6)?;
        listens(&setup, what, "yes")
            .map_err(|error| LabError::unexpected(format!("{at}, only IPv6 {only_v6}: {error}")))?;
        if let Some(other) = other {
            listens(&setup, other, "no")?;
        }
        drop(socket);
        listens(&setup, what, "no")?;
    }
    // `::` takes both families.
    let dual = open(new, stream, any6(80), false)?;
    listens(&setup, &web, "yes")?;
    listens(&setup, &web6, "yes")?;
    drop(dual);
    listens(&setup, &web, "no")?;
    // Elsewhere, and with the port that the map is from.
    let _elsewhere = open(
        new,
        stream,
        SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 80),
        false,
    )?;
    let _unmapped = open(new, stream, here(81), false)?;
    let one = open(new, stream, here(1000), false)?;
    let other = open(new, stream, here(1002), false)?;
    listens(&setup, &both, "yes")?;
    drop(one);
    listens(&setup, &both, "no")?;
    drop(other);
    for what in [&web, &mapped] {
        listens(&setup, what, "no")?;
    }
    // What is not there may be in a container.
    new.set_sysctls(&[("ipv4/ip_forward", "1")])?;
    listens(&setup, &web, "unknown")?;
    let _web = open(new, stream, here(80), false)?;
    listens(&setup, &web, "yes")?;
    let said = setup.run(Role::Old, &["status"])?;
    let line = format!("progress   {web}: no new connections yet; something listens");
    if !said.stdout.contains(&line) {
        return Err(LabError::unexpected(said.stdout));
    }
    Ok(())
}

#[test]
fn a_kept_address_is_looked_at_itself() -> Result {
    let lab = Lab::new()?;
    let web = format!("{MOVED}:80/tcp");
    let all = format!("{MOVED6}");
    let setup = setup(&lab)?
        .moves(&[&web, &all])
        .accept_what_moves()
        .args(Role::New, &["--deliver-to", "keep"]);
    let _daemons = setup.start_both()?;
    let new = lab.new_server();
    let at = |addr: IpAddr| SocketAddr::new(addr, 80);
    listens(&setup, &web, "no")?;
    listens(&setup, &all, "unknown")?;
    let elsewhere = open(new, Type::STREAM, at(NEW.into()), false)?;
    listens(&setup, &web, "no")?;
    drop(elsewhere);
    let _here = open(new, Type::STREAM, at(MOVED.into()), false)?;
    listens(&setup, &web, "yes")
}

/// Real clients, by the tunnel and directly, a flood beside them, and restarts.
#[test]
fn both_servers_count_who_comes_by_the_tunnel_and_who_directly() -> Result {
    let lab = Lab::new()?;
    let web = format!("{MOVED}:80/tcp");
    let dns = format!("{MOVED}:53/udp");
    let whole6 = format!("{MOVED6}");
    let setup = setup(&lab)?.moves(&[&web, &dns, &whole6]);
    let new = lab.new_server();
    let (_web, _web6) = (Service::start(new, NEW)?, Service::start(new, NEW6)?);
    let (_dns, _dns6) = (
        UdpService::start(new, (NEW, 53))?,
        UdpService::start(new, (NEW6, 53))?,
    );
    let mut daemons = setup.start_both()?;
    let client = lab.client();
    let count = |by_tunnel: u64, directly: u64| {
        [
            ("by_tunnel", json!(by_tunnel)),
            ("directly", json!(directly)),
        ]
    };
    let both = |what: &str, by_tunnel, directly| -> Result {
        for role in [Role::New, Role::Old] {
            becomes(&setup, role, PATIENCE, what, &count(by_tunnel, directly))?;
        }
        Ok(())
    };
    for _ in 0..3 {
        client.get(MOVED)?.is_answered_by(NEW)?;
        client.get(MOVED6)?.is_answered_by(NEW6)?;
        client.udp((MOVED, 53), b"by the tunnel")?;
    }
    for _ in 0..5 {
        client.get(NEW)?;
        client.get(NEW6)?;
        client.udp((NEW, 53), b"directly")?;
        client.udp((NEW6, 53), b"directly")?;
    }
    client.ping(NEW6, 8)?;
    // Who is refused is nobody's client.
    client.probe_tcp((NEW, 81), PATIENCE)?;
    both(&web, 3, 5)?;
    both(&dns, 3, 5)?;
    both(&whole6, 3, 10)?;

    // A flood that nobody goes on with, by either way.
    lab.set_unreachable_net(Ipv4Addr::new(10, 0, 0, 0), 8)?;
    let directly = Wire::new(lab.router(), "new", new, "eth0")?;
    let by_tunnel = Wire::new(lab.router(), "old", lab.old_server(), "eth0")?;
    for n in 0..2_000 {
        let from = (Ipv4Addr::from(0x0a00_0001 + n), 1_024 + n as u16);
        directly.send(&packets::syn(from, (NEW, 80)))?;
        by_tunnel.send(&packets::syn(from, (MOVED, 80)))?;
    }
    // Some live on, and one that began before counts as living, not as new.
    let mut talks = [client.converse(MOVED)?, client.converse(MOVED)?];
    let live = |live: u64| [("live", json!(live)), ("by_tunnel", json!(5))];
    becomes(&setup, Role::Old, PATIENCE, &web, &live(2))?;
    both(&web, 5, 5)?;
    let said = setup.run(Role::Old, &["status"])?;
    let line = format!(
        "progress   {web}: 50 % of new connections arrive directly (5 of 10), 2 live by the tunnel\
         ; something listens on the new server\n"
    );
    if !said.stdout.contains(&line) {
        return Err(LabError::unexpected(said.stdout));
    }

    // Another old daemon hears all of it; another new one counts anew.
    daemons.old.kill()?;
    daemons.old = setup.start(Role::Old)?;
    daemons.old.wait_until_up()?;
    for what in [&web, &dns] {
        becomes(
            &setup,
            Role::Old,
            2 * PATIENCE,
            what,
            &[("directly", json!(5))],
        )?;
    }
    daemons.new.kill()?;
    let down = [("listens", json!("unknown"))];
    daemons.new = setup.start(Role::New)?;
    daemons.new.wait_until_up()?;
    for talk in &mut talks {
        talk.exchange(b"still there", RECOVERY)?;
    }
    client.get(NEW)?;
    client.get(MOVED)?;
    both(&web, 1, 1)?;
    becomes(&setup, Role::Old, PATIENCE, &web, &[("live", json!(2))])?;
    // Who is away says nothing of who listens now.
    daemons.new.terminate()?;
    becomes(&setup, Role::Old, PATIENCE, &web, &down)
}

#[test]
fn what_containers_serve_is_counted_and_nobody_says_that_it_is_missing() -> Result {
    if !has("nft") {
        return Ok(());
    }
    let lab = Lab::new()?;
    let whole6 = format!("{MOVED6}");
    let moves = [format!("{MOVED}:80/tcp"), format!("{MOVED}:53/udp"), whole6];
    let moves: Vec<&str> = moves.iter().map(String::as_str).collect();
    let setup = setup(&lab)?.moves(&moves);
    let container = Container::new(&lab)?;
    let rules: String = [("ip", "172.17.0.2"), ("ip6", "fd00:d0c::2")]
        .map(|(family, to)| {
            format!(
                "add table {family} t
                add chain {family} t p {{ type nat hook prerouting priority -100; }}
                add rule {family} t p iifname != docker0 tcp dport 80 dnat to {to}
                add rule {family} t p iifname != docker0 udp dport 53 dnat to {to}\n"
            )
        })
        .concat();
    shell(
        lab.new_server(),
        &format!("nft -f - <<RULES\n{rules}\nRULES"),
    )?;
    let inside: [IpAddr; 2] = ["172.17.0.2", "fd00:d0c::2"].map(|it| it.parse().expect("address"));
    let [_web, _web6] = inside.map(|at| Service::start(&container.namespace, at));
    let [_dns, _dns6] = inside.map(|at| UdpService::start(&container.namespace, (at, 53)));
    let _daemons = setup.start_both()?;
    let client = lab.client();
    let ends: [(IpAddr, IpAddr); 2] = [(MOVED.into(), NEW.into()), (MOVED6.into(), NEW6.into())];
    for (moved, here) in ends {
        for _ in 0..2 {
            client.get(moved)?;
            client.udp((moved, 53), b"by the tunnel")?;
        }
        for _ in 0..3 {
            client.get(here)?;
            client.udp((here, 53), b"directly")?;
        }
        // One that goes on for longer is one.
        let mut talk = client.converse(here)?;
        for _ in 0..3 {
            talk.exchange(b"still there", PATIENCE)?;
        }
    }
    for (what, by_tunnel, directly) in [(moves[0], 2, 4), (moves[1], 2, 3), (moves[2], 4, 7)] {
        let wanted = [
            ("by_tunnel", json!(by_tunnel)),
            ("directly", json!(directly)),
            ("listens", json!("unknown")),
        ];
        becomes(&setup, Role::Old, PATIENCE, what, &wanted)?;
    }
    shell(lab.new_server(), "nft flush ruleset")
}
