//! Two new servers for ports of one address, both of which may begin connections from the others.
//!
//! ```text
//!                                        ┌── old server 192.0.2.1, holds 192.0.2.5 (moved)
//!                                        │              ║ ║ tunnels
//!  servers of others 203.0.113.10 ─ router ── new server 198.51.100.2, has 192.0.2.5:80
//!    ports 25, 26, 27010                 │                ║
//!                                        └── second new server 198.18.9.2, has 192.0.2.5:443
//! ```

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener};
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::time::Duration;

use ipmoved::internals::Role;
use ipmoved::lab::daemon::write_psk;
use ipmoved::lab::topology::{CLIENT, CLIENT6, MOVED, MOVED6, NEW, NEW6, OLD, OLD6};
use ipmoved::lab::{
    Client, DaemonSetup, Lab, LabError, Namespace, Probe, Process, RawSocket, Service, UdpService,
    poll_until,
};

use crate::stage::{MEGABYTE, PATIENCE, RECOVERY, Result, SILENCE, setup};

/// The second new server, and the router beside it.
const SECOND: Ipv4Addr = Ipv4Addr::new(198, 18, 9, 2);
const SECOND6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xe, 0, 0, 0, 0, 2);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(198, 18, 9, 254);
const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xe, 0, 0, 0, 0, 0xfe);

/// GRE has no ports.
const GRE: u8 = 47;

/// The servers of others, and the moved address that they see.
const OTHERS: [(IpAddr, IpAddr); 2] = [
    (IpAddr::V4(CLIENT), IpAddr::V4(MOVED)),
    (IpAddr::V6(CLIENT6), IpAddr::V6(MOVED6)),
];

fn failed(error: impl std::fmt::Display) -> LabError {
    LabError::unexpected(error.to_string())
}

/// The second new server, without a daemon.
fn second_host(lab: &Lab) -> Result<Namespace> {
    let host = Namespace::new("second new server")?;
    host.set_sysctls(&[
        ("ipv6/conf/all/disable_ipv6", "0"),
        ("ipv6/conf/default/disable_ipv6", "0"),
        ("ipv6/conf/default/accept_dad", "0"),
        ("ipv4/ping_group_range", "0 2147483647"),
    ])?;
    lab.add_leg(
        &host,
        "second",
        &[(SECOND.into(), 24), (SECOND6.into(), 64)],
        &[(GATEWAY.into(), 24), (GATEWAY6.into(), 64)],
    )?;
    let lines = format!(
        "ip link set lo up; ip route add default via {GATEWAY}; \
         ip -6 route add default via {GATEWAY6}"
    );
    let mut command = Command::new("sh");
    command.args(["-ec", &lines]);
    let said = host.output(command, PATIENCE)?;
    match said.status.success() {
        true => Ok(host),
        false => Err(failed(said.stderr)),
    }
}

/// The daemons' command lines: of the old server, and of both new ones.
struct Setup<'lab> {
    common: DaemonSetup<'lab>,
    second: &'lab Namespace,
}

impl Setup<'_> {
    fn new<'lab>(lab: &'lab Lab, second: &'lab Namespace) -> Result<Setup<'lab>> {
        let common = setup(lab)?;
        let psk = lab.dir().join("psk-2");
        write_psk(&psk)?;
        let mut text = String::new();
        for (peer, psk, port) in [
            (NEW, common.psk_file(Role::Old), 80),
            (SECOND, psk.as_path(), 443),
        ] {
            text += &format!(
                "[[peers]]\npeer = \"{peer}\"\npsk-file = {psk:?}\nallow-outgoing = true\n\
                 move = [\"{MOVED}:{port}/tcp\", \"[{MOVED6}]:{port}/tcp\"]\n"
            );
        }
        let path = lab.dir().join("two.toml");
        fs::write(&path, text).map_err(failed)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
        Ok(Setup { common, second })
    }

    fn start_old(&self) -> Result<Process> {
        let lab = self.common.lab();
        let mut command = self.common.command();
        command.arg("--config").arg(lab.dir().join("two.toml"));
        lab.old_server().spawn(command)
    }

    fn start_new(&self, host: &Namespace, psk: &str) -> Result<Process> {
        let mut command = self.common.command();
        command.args(["--peer", &OLD.to_string(), "--psk-file"]);
        command.arg(self.common.lab().dir().join(psk));
        command.args(["--accept", "192.0.2.5", "--accept", "2001:db8:a::5"]);
        command.arg("--outgoing");
        host.spawn(command)
    }

    /// Waits until both tunnels are up, and programs can be bound on both new servers.
    fn wait(&self, old: &Process) -> Result {
        let hosts = [self.common.lab().new_server(), self.second];
        let ready = || {
            let status = self.common.status(Role::Old).ok()?;
            let tunnels = status.0["tunnels"].as_array()?;
            let up = tunnels.len() == 2 && tunnels.iter().all(|it| it["state"] == "up");
            let bound = |host: &Namespace| {
                OTHERS.iter().all(|&(_, moved)| {
                    let bind = || Ok(std::net::UdpSocket::bind((moved, 0)).is_ok());
                    host.run(bind).unwrap_or(false)
                })
            };
            (up && hosts.into_iter().all(bound)).then_some(())
        };
        let waited = poll_until(RECOVERY, Duration::from_millis(50), ready);
        waited.ok_or_else(|| failed(old.stderr()))
    }
}

/// A connection that a new server begins, and the other end of it.
struct Talk {
    own: std::net::TcpStream,
    other: std::net::TcpStream,
}

impl Talk {
    fn begin(program: &Client<'_>, listener: &TcpListener) -> Result<Self> {
        let own = program.connect(listener.local_addr().map_err(failed)?)?;
        let (other, _) = listener.accept().map_err(failed)?;
        for end in [&own, &other] {
            end.set_read_timeout(Some(RECOVERY)).map_err(failed)?;
        }
        let mut talk = Self { own, other };
        talk.own.write_all(b"ehlo").map_err(failed)?;
        talk.other.read_exact(&mut [0; 4]).map_err(failed)?;
        talk.answers()?;
        Ok(talk)
    }

    /// The other end speaks, and the new server has not for a while.
    fn answers(&mut self) -> Result {
        self.other.write_all(b"250 ok").map_err(failed)?;
        self.own.read_exact(&mut [0; 6]).map_err(failed)
    }
}

#[test]
fn each_new_server_has_the_answers_to_what_it_begins_from_ports_that_have_not_moved() -> Result {
    let lab = Lab::new()?;
    let second = second_host(&lab)?;
    let setup = Setup::new(&lab, &second)?;
    let mut old = setup.start_old()?;
    let _new = [
        setup.start_new(lab.new_server(), "psk")?,
        setup.start_new(&second, "psk-2")?,
    ];
    setup.wait(&old)?;
    let hosts = [lab.new_server(), &second];
    let own = [(NEW, NEW6), (SECOND, SECOND6)];
    let programs = hosts.map(|host| Client::new(host, MOVED, MOVED6));
    let at_old = Client::new(lab.old_server(), OLD, OLD6);
    let mut talks = Vec::new();
    for (other, moved) in OTHERS {
        let mail = Service::start(lab.clients(), (other, 25))?;
        let games = UdpService::start(lab.clients(), (other, 27_010))?;
        let listener = lab
            .clients()
            .run(|| TcpListener::bind((other, 26)).map_err(failed))?;
        let there = RawSocket::open(lab.clients(), other, GRE)?;
        for (number, program) in programs.iter().enumerate() {
            assert_eq!(program.get((other, 25))?.client_seen.ip(), moved);
            program.download((other, 25), MEGABYTE)?;
            program.upload((other, 25), MEGABYTE)?;
            for size in [8, 9_000] {
                program.udp((other, 27_010), &vec![b'u'; size])?;
            }
            program.ping(other, 56)?;
            program.ping(other, 4_000)?;
            // The errors come back, too.
            assert_eq!(program.probe_tcp((other, 27), PATIENCE)?, Probe::Refused);
            assert_eq!(program.probe_udp((other, 27), PATIENCE)?, Probe::Refused);
            talks.push(Talk::begin(program, &listener)?);
            // Whoever was first has what has no ports.
            let here = RawSocket::open(hosts[number], moved, GRE)?;
            here.send(other, b"is it mine?")?;
            let heard = there.hear(SILENCE, |it| it == b"is it mine?")?;
            assert_eq!(heard.is_some(), number == 0, "{heard:?}");
            if number == 0 {
                there.send(moved, b"it is yours")?;
                here.expect(PATIENCE, |it| it == b"it is yours")?;
            }
        }
        // Each has its own port, and one connection has one owner.
        let clients_own = hosts.iter().zip([80, 443]).zip(own);
        for ((&host, port), (v4, v6)) in clients_own {
            let addr = if moved.is_ipv4() {
                v4.into()
            } else {
                IpAddr::from(v6)
            };
            let _application = Service::start(host, (addr, port))?;
            let answer = lab.client().get((moved, port))?.is_answered_by(addr)?;
            answer.for_the_client_itself()?;
        }
        let mut first = programs[0].from_port(40_000).converse((other, 25))?;
        let again = programs[1].from_port(40_000);
        assert_eq!(again.probe_tcp((other, 25), SILENCE)?, Probe::Silent);
        first.exchange(b"still here", PATIENCE)?;
        assert!(games.peers().iter().all(|peer| peer.ip() == moved));
        // What the old server begins itself is its own.
        at_old.get((other, 25))?;
        drop(mail);
    }
    let taken = poll_until(PATIENCE, Duration::from_millis(50), || {
        let status = setup.common.status(Role::Old).ok()?;
        let all = status.all_drops();
        (all.get("outgoing_taken").is_some_and(|&count| count > 1)).then_some(())
    });
    assert!(taken.is_some(), "{:?}", setup.common.status(Role::Old));
    for _ in 0..2 {
        drop(old);
        // Nobody of the new servers speaks meanwhile.
        for talk in &mut talks {
            talk.other.write_all(b"220 ready").map_err(failed)?;
        }
        old = setup.start_old()?;
        for talk in &mut talks {
            talk.own.read_exact(&mut [0; 9]).map_err(failed)?;
            talk.answers()?;
        }
    }
    setup.wait(&old)
}
