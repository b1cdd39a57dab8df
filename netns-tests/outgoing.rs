//! Connections that begin on the new server, and what never leaves its uplink.
//!
//! ```text
//!                                          ┌── old server 192.0.2.1 ─── lets connections out
//!  servers of others 203.0.113.10 ─ router ┤              ║ tunnel
//!    ports 25, 587, 27010 …                └─(tap)─ new server 198.51.100.2, programs bound to
//!                                                   192.0.2.5, or to nothing
//! ```

use std::net::IpAddr;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use ipmoved::internals::Role;
use ipmoved::lab::topology::{CLIENT, CLIENT6, Leg, MOVED, MOVED6, NEW, NEW6};
use ipmoved::lab::{
    Capture, Client, DaemonSetup, Daemons, Lab, LabError, Probe, Service, UdpService, poll_until,
};

use crate::stage::{FAMILIES, MEGABYTE, PATIENCE, RECOVERY, Result, SILENCE, setup};

/// The servers of others, each with its own moved address and the new server's own.
const OTHERS: [(IpAddr, IpAddr, IpAddr); 2] = [
    (IpAddr::V4(CLIENT), IpAddr::V4(MOVED), IpAddr::V4(NEW)),
    (IpAddr::V6(CLIENT6), IpAddr::V6(MOVED6), IpAddr::V6(NEW6)),
];

/// Both daemons with these flags on the new server, and on the old one.
fn both<'lab>(lab: &'lab Lab, new: &[&str], old: &[&str]) -> Result<DaemonSetup<'lab>> {
    let setup = setup(lab)?.moves(&FAMILIES).accept_what_moves();
    Ok(setup.args(Role::New, new).args(Role::Old, old))
}

/// Starts both, and waits until programs of the new server can be bound to the moved addresses.
fn start<'lab>(setup: &DaemonSetup<'lab>) -> Result<Daemons<'lab>> {
    let daemons = setup.start_both()?;
    until_bound(setup.lab())?;
    Ok(daemons)
}

fn until_bound(lab: &Lab) -> Result {
    let bound = |addr: IpAddr| {
        let socket = lab
            .new_server()
            .run(|| Ok(std::net::UdpSocket::bind((addr, 0)).is_ok()));
        socket.unwrap_or(false)
    };
    let both = || (bound(MOVED.into()) && bound(MOVED6.into())).then_some(());
    poll_until(PATIENCE, Duration::from_millis(20), both)
        .ok_or_else(|| LabError::unexpected("no program can be bound to the moved addresses"))
}

/// A program on the new server that is bound to the moved address.
fn bound(lab: &Lab) -> Client<'_> {
    Client::new(lab.new_server(), MOVED, MOVED6)
}

/// One that is bound to the new server's own address.
fn unmoved(lab: &Lab) -> Client<'_> {
    Client::new(lab.new_server(), NEW, NEW6)
}

/// Whom somebody else's server sees when this program asks.
fn seen(program: &Client<'_>, to: (IpAddr, u16)) -> Result<(IpAddr, u16)> {
    let seen = program.get(to)?.client_seen;
    Ok((seen.ip(), seen.port()))
}

/// Nothing had a moved address on the new server's uplink.
fn is_not_bare(seen: &Capture) {
    for addr in [IpAddr::from(MOVED), MOVED6.into()] {
        let bare: Vec<_> = seen.packets().filter(|it| it.source == addr).collect();
        assert!(bare.is_empty(), "{bare:?}");
    }
}

#[test]
fn programs_bound_to_the_moved_address_speak_as_it() -> Result {
    for mode in [&["--outgoing"][..], &["--outgoing", "--deliver-to", "keep"]] {
        let lab = Lab::new()?;
        let setup = both(&lab, mode, &["--allow-outgoing"])?;
        let daemons = start(&setup)?;
        let application = match mode {
            [_] => [
                Service::start(lab.new_server(), NEW)?,
                Service::start(lab.new_server(), NEW6)?,
            ],
            _ => [MOVED.into(), IpAddr::from(MOVED6)]
                .map(|it| Service::start(lab.new_server(), it))
                .into_iter()
                .collect::<Result<Vec<_>>>()?
                .try_into()
                .unwrap(),
        };
        let tap = lab.tap(Leg::New)?;
        for (other, moved, _) in OTHERS {
            let mail = Service::start(lab.clients(), (other, 25))?;
            let games = UdpService::start(lab.clients(), (other, 27_010))?;
            let program = bound(&lab);
            assert_eq!(seen(&program, (other, 25))?.0, moved);
            program.download((other, 25), 2 * MEGABYTE)?;
            program.upload((other, 25), 2 * MEGABYTE)?;
            for size in [8, 1_372, 9_000] {
                program.udp((other, 27_010), &vec![b'u'; size])?;
            }
            assert!(games.peers().iter().all(|peer| peer.ip() == moved));
            program.ping(other, 56)?;
            // What it cannot reach says so.
            assert_eq!(program.probe_tcp((other, 26), PATIENCE)?, Probe::Refused);
            assert_eq!(program.probe_udp((other, 26), PATIENCE)?, Probe::Refused);
            // Clients are served as ever, one with the very port included that answers us.
            let client = lab.client();
            client.get(moved)?.for_the_client_itself()?;
            drop(mail);
            client.from_port(25).get(moved)?.for_the_client_itself()?;
        }
        is_not_bare(&tap.stop()?);
        drop(application);
        daemons.terminate()?;
    }
    Ok(())
}

#[test]
fn connections_leave_from_the_moved_address_by_their_port() -> Result {
    let lab = Lab::new()?;
    let new = [
        "--outgoing",
        "25/tcp",
        "--outgoing",
        "from:20/tcp",
        "--outgoing",
        "27000-27050/udp",
        "--outgoing",
        "587/tcp,user=8",
    ];
    let daemons = both(&lab, &new, &["--allow-outgoing"])?.start_both()?;
    until_bound(&lab)?;
    for (other, moved, own) in OTHERS {
        let servers =
            [25, 443, 587, 8_020].map(|port| Service::start(lab.clients(), (other, port)));
        let servers = servers.into_iter().collect::<Result<Vec<_>>>()?;
        let program = unmoved(&lab);
        assert_eq!(seen(&program, (other, 25))?.0, moved);
        program.download((other, 25), MEGABYTE)?;
        program.upload((other, 25), MEGABYTE)?;
        assert_eq!(
            seen(&program.from_port(20), (other, 8_020))?,
            (moved, 20),
            "active FTP"
        );
        assert_eq!(seen(&program, (other, 443))?.0, own);
        // Mail of one user, and that of others.
        let ask = |user: u32| {
            let host = if other.is_ipv4() {
                other.to_string()
            } else {
                format!("[{other}]")
            };
            let mut curl = Command::new("curl");
            curl.args(["-sS", "-m", "5", &format!("http://{host}:587/")])
                .uid(user)
                .gid(user);
            let said = lab.new_server().output(curl, PATIENCE)?;
            let client = said
                .stdout
                .lines()
                .find_map(|it| it.strip_prefix("client "));
            let addr = client.and_then(|it| it.trim().parse::<std::net::SocketAddr>().ok());
            addr.map(|it| it.ip())
                .ok_or_else(|| LabError::unexpected(format!("{said:?}")))
        };
        assert_eq!((ask(8)?, ask(9)?), (moved, own));
        // Datagrams, of which nobody has said that they are the first.
        let games = UdpService::start(lab.clients(), (other, 27_010))?;
        let others = UdpService::start(lab.clients(), (other, 27_051))?;
        for _ in 0..2 {
            program.udp((other, 27_010), &[b'r'; 3_000])?;
            program.udp((other, 27_051), b"register")?;
        }
        assert!(
            games.peers().iter().all(|peer| peer.ip() == moved),
            "{:?}",
            games.peers()
        );
        assert!(
            others.peers().iter().all(|peer| peer.ip() == own),
            "{:?}",
            others.peers()
        );
        assert_eq!(
            program.probe_udp((other, 27_011), PATIENCE)?,
            Probe::Refused
        );
        drop(servers);
        assert_eq!(program.probe_tcp((other, 25), PATIENCE)?, Probe::Refused);
    }
    daemons.terminate()
}

#[test]
fn outgoing_connections_live_on_when_a_daemon_is_killed() -> Result {
    let lab = Lab::new()?;
    let setup = both(&lab, &["--outgoing", "25/tcp"], &["--allow-outgoing"])?;
    let Daemons { mut old, mut new } = start(&setup)?;
    let _mail = Service::start(lab.clients(), (CLIENT, 25))?;
    let mut talks = [
        bound(&lab).converse((CLIENT, 25))?,
        unmoved(&lab).converse((CLIENT, 25))?,
    ];
    let tap = lab.tap(Leg::New)?;
    for role in [Role::New, Role::Old] {
        for talk in &mut talks {
            talk.exchange(b"before", PATIENCE)?;
        }
        let (killed, other) = if role == Role::New {
            (new, old)
        } else {
            (old, new)
        };
        killed.kill()?;
        for talk in &mut talks {
            talk.say(b"meanwhile")?;
        }
        let again = setup.start(role)?;
        (new, old) = if role == Role::New {
            (again, other)
        } else {
            (other, again)
        };
        new.wait_until_up()?;
        old.wait_until_up()?;
        for talk in &mut talks {
            talk.hear(b"meanwhile", RECOVERY)?;
        }
        until_bound(&lab)?;
        assert_eq!(
            seen(&bound(&lab), (CLIENT.into(), 25))?.0,
            IpAddr::from(MOVED)
        );
    }
    let seen = tap.stop()?;
    is_not_bare(&seen);
    let direct = seen.packets().filter(|it| it.source == IpAddr::from(NEW));
    let direct = direct
        .filter(|it| it.destination == IpAddr::from(CLIENT))
        .count();
    assert_eq!(direct, 0, "what was begun through the tunnel stays there");
    Ok(())
}

#[test]
fn what_is_not_allowed_fails_at_once_and_never_leaves_bare() -> Result {
    let cases = [
        (
            &["--deliver-to", "keep"][..],
            &[][..],
            "outgoing_off",
            "--outgoing",
        ),
        (
            &["--outgoing"],
            &[],
            "outgoing_not_allowed",
            "--allow-outgoing",
        ),
        (
            &["--outgoing"],
            &["--allow-outgoing", "587/tcp"],
            "",
            "--allow-outgoing",
        ),
    ];
    for (new, old, reason, flag) in cases {
        let lab = Lab::new()?;
        let setup = both(&lab, new, old)?;
        let Daemons { old, new } = start(&setup)?;
        let tap = lab.tap(Leg::New)?;
        for (other, ..) in OTHERS {
            let _mail = Service::start(lab.clients(), (other, 25))?;
            let begun = Instant::now();
            let probe = bound(&lab).probe_tcp((other, 25), PATIENCE)?;
            assert_eq!(probe, Probe::Unreachable, "{reason}");
            assert!(begun.elapsed() < SILENCE);
            assert!(bound(&lab).ping(other, 56).is_err());
            assert_ne!(bound(&lab).probe_udp((other, 25), SILENCE)?, Probe::Open);
        }
        let where_seen = if reason.is_empty() { &old } else { &new };
        let counted = if reason.is_empty() {
            "outgoing_not_allowed"
        } else {
            reason
        };
        let told = poll_until(PATIENCE, Duration::from_millis(50), || {
            let status = where_seen.status().ok()?;
            let said = format!("{status:?}").contains(flag);
            (status.drops(counted) > 0 && said).then_some(())
        });
        assert!(told.is_some(), "{:?}", where_seen.status());
        // Nor while nobody is there to carry it.
        new.kill()?;
        for (other, ..) in OTHERS {
            let _ = bound(&lab).probe_tcp((other, 25), Duration::from_millis(100))?;
            let _ = bound(&lab).probe_udp((other, 25), Duration::from_millis(100));
        }
        is_not_bare(&tap.stop()?);
    }
    Ok(())
}
