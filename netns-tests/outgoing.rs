//! Connections that begin on the new server, and what never leaves its uplink.
//!
//! ```text
//!                                          ┌── old server 192.0.2.1 ─── lets connections out
//!  servers of others 203.0.113.10 ─ router ┤              ║ tunnel
//!    ports 25, 587, 27010 …                └─(tap)─ new server 198.51.100.2, programs bound to
//!                                                   192.0.2.5, or to nothing
//! ```

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use ipmoved::internals::{DEFAULT_PORT, Role};
use ipmoved::lab::topology::{CLIENT, CLIENT6, Leg, MOVED, MOVED6, NEW, NEW6, OLD, ROUTER_NEW};
use ipmoved::lab::{
    Capture, Client, DaemonSetup, Daemons, Lab, LabError, Probe, RawSocket, Service, UdpService,
    poll_until,
};
use socket2::{Domain, Socket, Type};

use crate::behind_dnat::shell;
use crate::hairpin::{self, docker, run_container};
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

pub(crate) fn until_bound(lab: &Lab) -> Result {
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

/// How curl is told of a server.
fn url((addr, port): (IpAddr, u16)) -> String {
    format!("http://{}/", SocketAddr::new(addr, port))
}

/// As [`seen`], where a command of the new server asks.
fn seen_by(lab: &Lab, command: &mut Command) -> Result<IpAddr> {
    let command = std::mem::replace(command, Command::new("true"));
    let said = lab.new_server().output(command, PATIENCE)?;
    let mut lines = said.stdout.lines();
    let client = lines.find_map(|it| it.strip_prefix("client "));
    let addr = client.and_then(|it| it.trim().parse::<SocketAddr>().ok());
    addr.map(|it| it.ip())
        .ok_or_else(|| LabError::unexpected(format!("{said:?}")))
}

/// Somebody answers a socket that is bound to a moved address and to the uplink.
fn answers_on_the_uplink(lab: &Lab, (moved, kind): (IpAddr, Type), to: SocketAddr) -> Result {
    let failed = |error: std::io::Error| LabError::unexpected(format!("{to}: {error}"));
    let socket = lab.new_server().run(|| {
        let socket = Socket::new(Domain::for_address(to), kind, None).map_err(failed)?;
        socket.bind_device(Some(b"eth0")).map_err(failed)?;
        (socket.bind(&SocketAddr::new(moved, 0).into())).map_err(failed)?;
        socket.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
        Ok(socket)
    })?;
    (socket.connect_timeout(&to.into(), PATIENCE)).map_err(failed)?;
    if kind == Type::DGRAM {
        socket.send(b"by the uplink").map_err(failed)?;
        let mut told = &socket;
        std::io::Read::read(&mut told, &mut [0; 64]).map_err(failed)?;
    }
    Ok(())
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
            // One that is bound to the interface as well.
            for kind in [Type::STREAM, Type::DGRAM] {
                let port = if kind == Type::STREAM { 25 } else { 27_010 };
                answers_on_the_uplink(&lab, (moved, kind), (other, port).into())?;
            }
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
            let mut curl = Command::new("curl");
            curl.args(["-sS", "-m", "5", &url((other, 587))]);
            seen_by(&lab, curl.uid(user).gid(user))
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
        (&[], &[], "outgoing_off", "--outgoing"),
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
        if new.is_empty() {
            // Somebody else holds it here, and packets are delivered to another address.
            let hold = "ip link add held type bridge; ip link set held up
                ip addr add 192.0.2.5/32 dev held; ip addr add 2001:db8:a::5/128 dev held nodad";
            shell(lab.new_server(), hold)?;
        }
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
            let raw = RawSocket::open(lab.new_server(), bound(&lab).address_towards(other), 253)?;
            raw.send(other, b"without ports")?;
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

/// Port 80 has moved, and some of UDP of one family; the rest is the old server's.
const PORTS: [&str; 3] = [
    "192.0.2.5:80/tcp",
    "[2001:db8:a::5]:80/tcp",
    "192.0.2.5:53/udp",
];

#[test]
fn single_ports_may_have_moved_and_the_old_server_keeps_the_others() -> Result {
    let lab = Lab::new()?;
    let new = ["--outgoing", "25/tcp", "--outgoing", "from:20/tcp"];
    let setup = setup(&lab)?.moves(&PORTS).accept_what_moves();
    let setup = setup.args(Role::New, &new);
    let setup = setup.args(Role::Old, &["--allow-outgoing"]);
    let Daemons { mut old, new } = start(&setup)?;
    let _application = [
        Service::start(lab.new_server(), NEW)?,
        Service::start(lab.new_server(), NEW6)?,
    ];
    let tap = lab.tap(Leg::New)?;
    let old_server = Client::new(lab.old_server(), MOVED, MOVED6);
    for killed in [false, true] {
        let mut talks = Vec::new();
        for (other, moved, own) in OTHERS {
            let mail = Service::start(lab.clients(), (other, 25))?;
            let web = Service::start(lab.clients(), (other, 8_020))?;
            let games = UdpService::start(lab.clients(), (other, 27_010))?;
            let program = bound(&lab);
            assert_eq!(seen(&program, (other, 25))?.0, moved);
            program.download((other, 25), MEGABYTE)?;
            program.upload((other, 25), MEGABYTE)?;
            for size in [8, 1_372, 9_000] {
                program.udp((other, 27_010), &vec![b'u'; size])?;
            }
            assert!(games.peers().iter().all(|peer| peer.ip() == moved));
            program.ping(other, 56)?;
            program.ping(other, 4_000)?;
            assert_eq!(program.probe_tcp((other, 26), PATIENCE)?, Probe::Refused);
            assert_eq!(program.probe_udp((other, 26), PATIENCE)?, Probe::Refused);
            // By port, without touching a program.
            let program = unmoved(&lab);
            assert_eq!(seen(&program, (other, 25))?.0, moved);
            let from_20 = seen(&program.from_port(20), (other, 8_020))?;
            assert_eq!(from_20, (moved, 20));
            assert_eq!(seen(&program, (other, 8_020))?.0, own);
            // What the old server serves and asks itself, from the same address.
            let _ssh = Service::start(lab.old_server(), (moved, 22))?;
            let _dns = UdpService::start(lab.old_server(), (moved, 54))?;
            lab.client().get((moved, 22))?.is_answered_by(moved)?;
            lab.client().udp((moved, 54), &[b'd'; 3_000])?;
            lab.client().ping(moved, 4_000)?;
            lab.client().get(moved)?.for_the_client_itself()?;
            assert_eq!(seen(&old_server, (other, 25))?.0, moved);
            old_server.udp((other, 27_010), b"register")?;
            old_server.ping(other, 56)?;
            // Its own connection has the very addresses and ports: it goes on, alone.
            let mut own = old_server.from_port(40_000).converse((other, 25))?;
            let again = bound(&lab).from_port(40_000);
            assert_eq!(again.probe_tcp((other, 25), SILENCE)?, Probe::Silent);
            own.exchange(b"still here", PATIENCE)?;
            talks.push((bound(&lab).converse((other, 25))?, mail, web));
        }
        if killed {
            old.terminate()?;
            break;
        }
        let status = poll_until(PATIENCE, Duration::from_millis(50), || {
            let status = old.status().ok()?;
            (status.drops("outgoing_taken") > 0).then_some(())
        });
        assert!(status.is_some(), "{:?}", old.status());
        old.kill()?;
        for (talk, ..) in &mut talks {
            talk.say(b"meanwhile")?;
        }
        old = setup.start(Role::Old)?;
        old.wait_until_up()?;
        for (talk, ..) in &mut talks {
            talk.hear(b"meanwhile", RECOVERY)?;
            talk.exchange(b"after", PATIENCE)?;
        }
    }
    is_not_bare(&tap.stop()?);
    new.terminate().map(drop)
}

#[test]
fn containers_leave_from_the_moved_address_by_their_port() -> Result {
    let lab = Lab::new()?;
    // Each end of the tunnel has its port at one address.
    let [listen, old_listens] = [NEW, OLD].map(|addr| format!("{addr}:{DEFAULT_PORT}"));
    let new = [
        "--outgoing",
        "25/tcp",
        "--outgoing",
        "27000-27050/udp",
        "--listen",
        &listen,
    ];
    let old = ["--allow-outgoing", "--listen", &old_listens];
    let daemons = both(&lab, &new, &old)?.start_both()?;
    until_bound(&lab)?;
    let behind = run_container(&lab, lab.new_server(), 2)?;
    docker(lab.new_server())?;
    let container = hairpin::client(&behind, hairpin::FIRST);
    let tap = lab.tap(Leg::New)?;
    for (other, moved, own) in OTHERS {
        let mail = Service::start(lab.clients(), (other, 25))?;
        let _web = Service::start(lab.clients(), (other, 443))?;
        assert_eq!(container.get((other, 25))?.client_seen.ip(), moved);
        assert_eq!(container.get((other, 443))?.client_seen.ip(), own);
        container.download((other, 25), MEGABYTE)?;
        container.upload((other, 25), MEGABYTE)?;
        let mut talk = container.converse((other, 25))?;
        talk.exchange(b"no socket here tells of it", PATIENCE)?;
        // The tunnel's own port is one like others, of a container and at another address.
        let games = UdpService::start(lab.clients(), (other, 27_010))?;
        for program in [container, bound(&lab)] {
            let from_there = program.from_port(DEFAULT_PORT);
            for size in [8, 3_000] {
                from_there.udp((other, 27_010), &vec![b'u'; size])?;
            }
            container.udp((other, 27_010), b"register")?;
        }
        assert!(
            games.peers().iter().all(|peer| peer.ip() == moved),
            "{:?}",
            games.peers()
        );
        // Its resets come back, and those of the other end.
        drop(mail);
        assert_eq!(container.probe_tcp((other, 25), PATIENCE)?, Probe::Refused);
        assert_eq!(
            container.probe_udp((other, 27_011), PATIENCE)?,
            Probe::Refused
        );
    }
    // Near is near for containers as well.
    let near = Service::start(lab.router(), (ROUTER_NEW, 25))?;
    let seen = container.get((ROUTER_NEW, 25))?.client_seen.ip();
    assert_eq!(seen, IpAddr::from(NEW));
    drop(near);
    is_not_bare(&tap.stop()?);
    daemons.terminate()
}

/// A control group of a test, which goes with it.
struct Cgroup(PathBuf);

impl Cgroup {
    /// Where control groups of version 2 are, if this test may make some.
    fn mount() -> Option<&'static Path> {
        let mounts = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
        let mut mounts = mounts.into_iter().map(Path::new);
        mounts.find(|it| it.join("cgroup.controllers").exists())
    }

    fn new(path: PathBuf) -> std::io::Result<Self> {
        fs::create_dir(&path)?;
        Ok(Self(path))
    }

    /// A command that runs in it.
    fn run(&self, command: &str) -> Command {
        let mut sh = Command::new("sh");
        let group = self.0.display();
        sh.args([
            "-ec",
            &format!("echo $$ > {group}/cgroup.procs; exec {command}"),
        ]);
        sh
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn connections_of_a_control_group_leave_from_the_moved_address() -> Result {
    let name = format!("ipmoved-test-{}", std::process::id());
    let probe = Cgroup::mount().map(|mount| (mount, Cgroup::new(mount.join(&name))));
    let Some((mount, Ok(probe))) = probe else {
        println!("SKIPPED: no control group of version 2 can be made here");
        return Ok(());
    };
    drop(probe);
    let lab = Lab::new()?;
    let rule = format!("25/tcp,cgroup=/{name}");
    let daemons = both(&lab, &["--outgoing", &rule], &["--allow-outgoing"])?.start_both()?;
    until_bound(&lab)?;
    let made =
        |path: &str| Cgroup::new(mount.join(path)).map_err(|e| LabError::unexpected(e.to_string()));
    for round in 0..2 {
        // A service stops and comes back: its group is another one.
        let group = made(&name)?;
        let inner = made(&format!("{name}/worker"))?;
        let beside = made(&format!("{name}-beside"))?;
        for (other, moved, own) in OTHERS {
            let _mail = Service::start(lab.clients(), (other, 25))?;
            let curl = format!("curl -sS -m 5 {}", url((other, 25)));
            let is_moved = || {
                let seen = seen_by(&lab, &mut group.run(&curl)).ok()?;
                (seen == moved).then_some(())
            };
            let found = poll_until(PATIENCE, Duration::from_millis(100), is_moved);
            assert!(found.is_some(), "round {round}: the group is not found");
            assert_eq!(seen_by(&lab, &mut inner.run(&curl))?, moved);
            assert_eq!(seen_by(&lab, &mut beside.run(&curl))?, own);
            assert_eq!(seen(&unmoved(&lab), (other, 25))?.0, own);
        }
        drop((inner, beside));
    }
    daemons.terminate()
}
