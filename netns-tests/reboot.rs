//! A server reboots: its daemon starts before its network, and the clients notice a pause.
//!
//! ```text
//!  client ─(tap)─ router ─ ✂ ─ old server, daemon: no link, no address, no route yet
//!                   │                     ║
//!                   └── ✂ ── new server, daemon
//! ```

use std::fs::Permissions;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::thread;
use std::time::Duration;

use ipmoved::internals::{Direction, Netlink, Role};
use ipmoved::lab::daemon::{STOP_TIMEOUT, UP_TIMEOUT};
use ipmoved::lab::topology::{CLIENT, Leg, MOVED, MOVED6, NEW, NEW6, OLD, UPLINK};
use ipmoved::lab::{
    Capture, Conversation, Daemon, DaemonSetup, Lab, LabError, Process, RawSocket, Service, Tap,
    poll_until,
};

use crate::behind_dnat::has;
use crate::stage::{FAMILIES, PATIENCE, RECOVERY, Result, setup};

/// One conversation with each moved address, begun.
fn conversations(lab: &Lab) -> Result<[Conversation; 2]> {
    let mut both = [
        lab.client().converse(MOVED)?,
        lab.client().converse(MOVED6)?,
    ];
    for conversation in &mut both {
        conversation.exchange(b"before", PATIENCE)?;
    }
    Ok(both)
}

/// Both go on, and new ones are served. Returns what was seen before the first of them ended: a
/// server whose connection is gone refuses what comes late.
fn go_on(lab: &Lab, mut conversations: [Conversation; 2], tap: Tap) -> Result<Capture> {
    for conversation in &mut conversations {
        conversation.hear(b"meanwhile", RECOVERY)?;
        conversation.exchange(b"after", RECOVERY)?;
    }
    let seen = tap.stop()?;
    lab.client().get(MOVED)?.is_answered_by(NEW)?;
    lab.client().get(MOVED6)?.is_answered_by(NEW6)?;
    Ok(seen)
}

fn services(lab: &Lab) -> Result<[Service; 2]> {
    let start = |addr| Service::start(lab.new_server(), addr);
    Ok([start(IpAddr::from(NEW))?, start(NEW6.into())?])
}

/// Waits until a daemon that started without a network says so.
fn says_that_it_waits(daemon: &Daemon<'_>, words: &str) {
    let said = poll_until(UP_TIMEOUT, Duration::from_millis(20), || {
        let warnings = daemon.status().ok()?.0["warnings"].to_string();
        warnings.contains(words).then_some(())
    });
    assert!(said.is_some(), "{:?}", daemon.status());
}

/// The kernel begins anew without anything that a daemon made.
fn forget(setup: &DaemonSetup<'_>, role: Role) -> Result {
    let said = setup.run(role, &["cleanup"])?;
    assert!(said.status.success(), "{said:?}");
    Ok(())
}

/// Waits until the old server's daemon has its program on the uplink.
fn captures(lab: &Lab) -> Result {
    let found = poll_until(PATIENCE, Duration::from_millis(1), || {
        let filters = lab.old_server().run(|| {
            let failed = |error| LabError::unexpected(format!("{error}"));
            let netlink = Netlink::new().map_err(failed)?;
            let link = netlink.link_by_name(UPLINK).map_err(failed)?;
            let index = link.ok_or_else(|| LabError::unexpected("no uplink"))?.index;
            netlink.filters(index, Direction::Ingress).map_err(failed)
        });
        filters
            .is_ok_and(|filters| !filters.is_empty())
            .then_some(())
    });
    found.ok_or_else(|| LabError::unexpected("the new link has no program"))
}

/// A segment of a connection that the old server's own stack does not know (RFC 9293 section 3.1):
/// ports 4000 and 80, some numbers, ACK.
const SEGMENT: [u8; 20] = [
    0x0f, 0xa0, 0, 80, 0, 0, 1, 0, 0, 0, 2, 0, 0x50, 0x10, 0x10, 0, 0, 0, 0, 0,
];

#[test]
fn no_reset_leaves_the_old_server_while_its_network_comes_up() -> Result {
    for (args, waits_for) in [
        (&[][..], "the network is not up yet"),
        (&["--uplink", "eth0"], "eth0 (--uplink) does not exist yet"),
        (
            &["--listen", "192.0.2.1:51850"],
            "the network is not up yet",
        ),
    ] {
        let lab = Lab::new()?;
        let setup = setup(&lab)?.moves(&FAMILIES).args(Role::Old, args);
        let _services = services(&lab)?;
        let daemons = setup.start_both()?;
        let mut talks = conversations(&lab)?;
        let tap = lab.tap(Leg::Clients)?;
        daemons.old.kill()?;
        let addresses = lab.unplug(Leg::Old)?;
        for talk in &mut talks {
            talk.say(b"meanwhile")?;
        }
        forget(&setup, Role::Old)?;
        let mut again = setup.start(Role::Old)?;
        says_that_it_waits(&again, waits_for);
        let ends = &RawSocket::open(lab.clients(), CLIENT, 6)?;
        thread::scope(|scope| {
            // Packets come as soon as the link carries them.
            let flood = scope.spawn(|| flood(ends, 1_000));
            // As a network manager does, which sees a link before it sets it up.
            lab.plug(Leg::Old)?;
            captures(&lab)?;
            lab.configure(Leg::Old, &addresses)?;
            again.wait_until_up()?;
            flood.join().expect("it does not panic");
            Ok(())
        })?;
        let seen = go_on(&lab, talks, tap)?;
        assert_eq!(seen.refusals_from(MOVED), 0, "{args:?}: a reset left");
        assert_eq!(seen.refusals_from(MOVED6), 0, "{args:?}: a reset left");
    }
    Ok(())
}

/// Sends so many segments to the moved address, two in a millisecond.
fn flood(ends: &RawSocket, segments: u32) {
    for _ in 0..segments {
        // Until the router knows the way there is an error.
        let _ = ends.send(MOVED, &SEGMENT);
        thread::sleep(Duration::from_micros(500));
    }
}

/// The router leases this address to whoever asks.
fn lease(lab: &Lab, addr: Ipv4Addr) -> Result<Process> {
    let mut server = Command::new("dnsmasq");
    let file = |name: &str| lab.dir().join(name).display().to_string();
    server.args([
        "-k",
        "-p",
        "0",
        "--conf-file=/dev/null",
        "--no-ping",
        "--user=root",
    ]);
    server.args(["-i", Leg::Old.router_interface(), "--bind-interfaces"]);
    server.args([
        format!("--dhcp-range={addr},{addr},255.255.255.0,2m"),
        format!("--dhcp-leasefile={}", file("leases")),
        format!("--pid-file={}", file("dnsmasq.pid")),
    ]);
    lab.router().spawn(server)
}

/// The old server asks for its address, and takes it.
fn take_lease(lab: &Lab) -> Result {
    let script = lab.dir().join("leased");
    let text = "#!/bin/sh\n[ \"$1\" != bound ] || ip addr add \"$ip/24\" dev \"$interface\"\n";
    std::fs::write(&script, text)
        .and_then(|()| std::fs::set_permissions(&script, Permissions::from_mode(0o755)))
        .map_err(|error| LabError::unexpected(error.to_string()))?;
    let mut client = Command::new("udhcpc");
    client.args(["-f", "-n", "-q", "-t", "5", "-T", "1", "-i", UPLINK, "-s"]);
    client.arg(script);
    let said = lab.old_server().output(client, PATIENCE)?;
    if !said.status.success() {
        return Err(LabError::unexpected(format!("no lease: {said:?}")));
    }
    Ok(())
}

/// What comes by DHCP comes long after the daemon and the link: the old server's own address, or
/// the moved one.
#[test]
fn a_late_lease_resets_nothing() -> Result {
    if !has("dnsmasq") || !has("udhcpc") {
        return Ok(());
    }
    for leased in [OLD, MOVED] {
        let lab = Lab::new()?;
        let setup = setup(&lab)?.moves(&FAMILIES);
        let _services = services(&lab)?;
        let daemons = setup.start_both()?;
        let mut talks = conversations(&lab)?;
        let tap = lab.tap(Leg::Clients)?;
        daemons.old.kill()?;
        let mut addresses = lab.unplug(Leg::Old)?;
        addresses.retain(|&(held, _)| held != leased);
        for talk in &mut talks {
            talk.say(b"meanwhile")?;
        }
        forget(&setup, Role::Old)?;
        let mut again = setup.start(Role::Old)?;
        says_that_it_waits(&again, "the network is not up yet");
        lab.plug(Leg::Old)?;
        captures(&lab)?;
        let _server = lease(&lab, leased)?;
        lab.configure(Leg::Old, &addresses)?;
        let ends = &RawSocket::open(lab.clients(), CLIENT, 6)?;
        thread::scope(|scope| {
            let flood = scope.spawn(|| flood(ends, 3_000));
            thread::sleep(Duration::from_secs(1));
            take_lease(&lab)?;
            again.wait_until_up()?;
            flood.join().expect("it does not panic");
            Ok(())
        })?;
        let seen = go_on(&lab, talks, tap)?;
        let refusals = [MOVED.into(), MOVED6.into()].map(|addr: IpAddr| seen.refusals_from(addr));
        assert_eq!(refusals, [0, 0], "a lease of {leased}: a reset left");
    }
    Ok(())
}

#[test]
fn the_new_servers_daemon_waits_for_the_address_that_it_delivers_to() -> Result {
    for (args, waits_for) in [
        (&[][..], "the network is not up yet"),
        (
            &[
                "--deliver-to",
                "198.51.100.2",
                "--deliver-to",
                "2001:db8:b::2",
            ],
            "the network is not up yet",
        ),
    ] {
        let lab = Lab::new()?;
        let setup = setup(&lab)?.moves(&FAMILIES).args(Role::New, args);
        let mut old = setup.start(Role::Old)?;
        let addresses = lab.unplug(Leg::New)?;
        let mut new = setup.start(Role::New)?;
        says_that_it_waits(&new, waits_for);
        lab.plug(Leg::New)?;
        lab.configure(Leg::New, &addresses)?;
        new.wait_until_up()?;
        old.wait_until_up()?;
        let _services = services(&lab)?;
        for addr in [MOVED.into(), MOVED6.into()] {
            let answer: IpAddr = addr;
            let server: IpAddr = if answer.is_ipv4() {
                NEW.into()
            } else {
                NEW6.into()
            };
            lab.client().get(answer)?.is_answered_by(server)?;
        }
    }
    Ok(())
}

/// What would have been refused with the network up, since it locks the administrator out, is
/// refused as soon as it is known.
#[test]
fn an_address_that_must_not_move_is_refused_once_the_network_is_up() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.moves(&["192.0.2.1"]);
    let addresses = lab.unplug(Leg::Old)?;
    let old = setup.start(Role::Old)?;
    says_that_it_waits(&old, "the network is not up yet");
    lab.plug(Leg::Old)?;
    lab.configure(Leg::Old, &addresses)?;
    // It waits until addresses and routes have settled.
    thread::sleep(Duration::from_secs(10));
    let said = old.stop_by_itself()?;
    assert_eq!(said.status.code(), Some(2), "{said:?}");
    assert!(said.stderr.contains("your login"), "{said:?}");
    Ok(())
}

/// A service manager has nobody whom it could ask to type something else.
#[test]
fn under_a_service_manager_what_is_missing_is_waited_for() -> Result {
    let lab = Lab::new()?;
    for (role, args, waits_for) in [
        (
            Role::Old,
            &["--uplink", "eth7"][..],
            "eth7 (--uplink) does not exist yet",
        ),
        (
            Role::New,
            &["--uplink", "eth7"],
            "eth7 (--uplink) does not exist yet",
        ),
    ] {
        let setup = setup(&lab)?.args(role, args);
        let manager = std::os::unix::net::UnixDatagram::bind(lab.dir().join(format!("{role}")))
            .map_err(|error| LabError::unexpected(error.to_string()))?;
        let mut command = setup.command();
        command.args(setup.daemon_args(role));
        command.env("NOTIFY_SOCKET", lab.dir().join(format!("{role}")));
        let daemon = setup.host(role).spawn(command)?;
        let said = poll_until(UP_TIMEOUT, Duration::from_millis(20), || {
            let warnings = setup.status(role).ok()?.0["warnings"].to_string();
            warnings.contains(waits_for).then_some(())
        });
        assert!(said.is_some(), "{}", daemon.stderr());
        daemon.signal(rustix::process::Signal::TERM)?;
        daemon.wait(STOP_TIMEOUT)?;
        drop(manager);
    }
    Ok(())
}
