//! The application runs in a container behind Docker's rules, whatever else the host is set to.
//!
//! ```text
//!  client ── router ──┬── old server ✝        ║
//!                     └── new server ✝ ── docker0 ── container, 172.17.0.2
//!                          nat: DNAT to it, filter: FORWARD, raw
//! ```

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::time::Duration;

use ipmoved::internals::Role;
use ipmoved::lab::daemon::COMMAND_TIMEOUT;
use ipmoved::lab::topology::{CLIENT, CLIENT6, Leg, MOVED, MOVED6};
use ipmoved::lab::{Daemon, Lab, LabError, Namespace, Process, RawSocket, patience, poll_until};
use rustix::process::Signal;

use crate::stage::{FAMILIES, PATIENCE, RECOVERY, Result, setup};

/// ESP: what conntrack and a translation know by its addresses alone.
const ESP: u8 = 50;

/// The published ports: of TCP, and of UDP.
pub(crate) const PORTS: [u16; 2] = [80, 53];

/// Both families: where the client is, what it asks, and where the container is.
fn ends() -> [[IpAddr; 3]; 2] {
    let container = |addr: &str| addr.parse().expect("an address");
    [
        [CLIENT.into(), MOVED.into(), container("172.17.0.2")],
        [CLIENT6.into(), MOVED6.into(), container("fd00:d0c::2")],
    ]
}

/// Docker's rules for one family, as `iptables-nft` writes them: a published port and, as
/// `docker run` cannot and an administrator can, a protocol.
pub(crate) fn docker_rules(
    family: &str,
    bridge_net: &str,
    container: &str,
    forward: &str,
) -> String {
    let icmp = if family == "ip" { "icmp" } else { "ipv6-icmp" };
    let to = |port: u16| match family {
        "ip" => format!("{container}:{port}"),
        _ => format!("[{container}]:{port}"),
    };
    let [tcp, udp] = PORTS;
    let (to_tcp, to_udp) = (to(tcp), to(udp));
    format!(
        "table {family} nat {{
            chain DOCKER {{
                iifname docker0 return
                iifname != docker0 tcp dport {tcp} dnat to {to_tcp}
                iifname != docker0 udp dport {udp} dnat to {to_udp}
                iifname != docker0 meta l4proto {ESP} dnat to {container}
            }}
            chain PREROUTING {{
                type nat hook prerouting priority -100; policy accept;
                fib daddr type local jump DOCKER
            }}
            chain OUTPUT {{
                type nat hook output priority -100; policy accept;
                fib daddr type local jump DOCKER
            }}
            chain POSTROUTING {{
                type nat hook postrouting priority 100; policy accept;
                oifname != docker0 {family} saddr {bridge_net} masquerade
            }}
        }}
        table {family} raw {{
            chain PREROUTING {{
                type filter hook prerouting priority -300; policy accept;
                iifname != docker0 {family} daddr {container} drop
            }}
        }}
        table {family} filter {{
            chain DOCKER {{
                {family} daddr {container} iifname != docker0 oifname docker0 tcp dport {tcp} accept
                {family} daddr {container} iifname != docker0 oifname docker0 udp dport {udp} accept
                {family} daddr {container} iifname != docker0 oifname docker0 \
                    meta l4proto {ESP} accept
            }}
            chain FORWARD {{
                type filter hook forward priority 0; policy {forward};
                oifname docker0 ct state related,established accept
                oifname docker0 jump DOCKER
                iifname docker0 oifname != docker0 accept
                iifname docker0 oifname docker0 accept
                meta l4proto {icmp} accept
            }}
        }}\n"
    )
}

/// Runs a script of a shell on a host; an error has its words.
pub(crate) fn shell(host: &Namespace, script: &str) -> Result {
    let mut command = Command::new("sh");
    command.args(["-ec", script]);
    let said = host.output(command, COMMAND_TIMEOUT)?;
    if said.status.success() {
        return Ok(());
    }
    Err(LabError::unexpected(format!("{script}: {said:?}")))
}

/// Whether a program is there. A test without it prints that it was skipped.
pub(crate) fn has(program: &str) -> bool {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("command -v {program} || test -x {program}")]);
    let there = command.output().is_ok_and(|said| said.status.success());
    if !there {
        println!("SKIPPED in part: there is no {program} here");
    }
    there
}

/// A container behind a bridge of the new server, without rules.
pub(crate) struct Container {
    pub(crate) namespace: Namespace,
    _init: Process,
}

impl Container {
    pub(crate) fn new(lab: &Lab) -> Result<Self> {
        let namespace = Namespace::new("container")?;
        let mut sleep = Command::new("sleep");
        sleep.arg("600");
        let init = namespace.spawn(sleep)?;
        let pid = init.id();
        shell(
            lab.new_server(),
            &format!(
                "ip link add docker0 type bridge
                ip addr add 172.17.0.1/16 dev docker0
                ip addr add fd00:d0c::1/64 dev docker0 nodad
                ip link set docker0 up
                ip link add port0 type veth peer name eth0 netns {pid}
                ip link set port0 master docker0 up
                echo 1 > /proc/sys/net/ipv4/ip_forward
                echo 1 > /proc/sys/net/ipv6/conf/all/forwarding"
            ),
        )?;
        shell(
            &namespace,
            "ip link set lo up
            ip addr add 172.17.0.2/16 dev eth0
            ip addr add fd00:d0c::2/64 dev eth0 nodad
            ip link set eth0 up
            ip route add default via 172.17.0.1
            ip route add default via fd00:d0c::1",
        )?;
        Ok(Self {
            namespace,
            _init: init,
        })
    }
}

/// Kills a daemon, so that it cannot undo anything.
pub(crate) fn killed(daemon: &mut Daemon<'_>) -> Result {
    daemon.process().signal(Signal::KILL)?;
    let ended = poll_until(PATIENCE, Duration::from_millis(1), || {
        daemon.process().exited()
    });
    ended.map_or_else(|| Err(LabError::unexpected("it lives on")), |_| Ok(()))
}

fn failed(error: std::io::Error) -> LabError {
    LabError::unexpected(error.to_string())
}

/// What an application hears of a client, over a connection, in datagrams, and over a protocol
/// without ports; the application is the next to speak on each.
pub(crate) struct Talks {
    client: IpAddr,
    moved: IpAddr,
    near: TcpStream,
    far: TcpStream,
    asking: UdpSocket,
    answering: UdpSocket,
    from: SocketAddr,
    raw: [RawSocket; 2],
}

impl Talks {
    /// Begins, with the application at an address of a host or of its container.
    pub(crate) fn begin(lab: &Lab, host: &Namespace, ends: [IpAddr; 3]) -> Result<Self> {
        let [client, moved, at] = ends;
        let [tcp, udp] = PORTS;
        // A process that somebody starts at this moment has the sockets of earlier ones until it
        // runs its program.
        let bound = poll_until(PATIENCE, Duration::from_millis(20), || {
            let bind = || {
                let listener = TcpListener::bind((at, tcp)).map_err(failed)?;
                Ok((listener, UdpSocket::bind((at, udp)).map_err(failed)?))
            };
            host.run(bind).ok()
        });
        let unbound = || LabError::unexpected("the application's ports are not free");
        let (listener, answering) = bound.ok_or_else(unbound)?;
        answering
            .set_read_timeout(Some(patience(PATIENCE)))
            .map_err(failed)?;
        let near = lab.client().connect((moved, tcp))?;
        let (far, _) = listener.accept().map_err(failed)?;
        for stream in [&near, &far] {
            stream.set_read_timeout(Some(RECOVERY)).map_err(failed)?;
        }
        let asking = lab.client().udp_socket((moved, udp))?;
        let raw = [
            RawSocket::open(lab.clients(), client, ESP)?,
            RawSocket::open(host, at, ESP)?,
        ];
        let from = SocketAddr::new(client, 0);
        let mut talks = Self {
            client,
            moved,
            near,
            far,
            asking,
            answering,
            from,
            raw,
        };
        talks.ask(b"first")?;
        Ok(talks)
    }

    /// The client speaks, and the application hears who it is.
    pub(crate) fn ask(&mut self, words: &[u8]) -> Result {
        self.near.write_all(words).map_err(failed)?;
        let mut heard = vec![0; words.len()];
        self.far.read_exact(&mut heard).map_err(failed)?;
        assert_eq!(heard, words);
        // A datagram of the moment in which a daemon starts may be lost.
        let wait = Some(Duration::from_millis(300));
        self.answering.set_read_timeout(wait).map_err(failed)?;
        let from = poll_until(PATIENCE, Duration::ZERO, || {
            self.asking.send(words).ok()?;
            let mut heard = [0; 100];
            let (length, from) = self.answering.recv_from(&mut heard).ok()?;
            (&heard[..length] == words).then_some(from)
        });
        self.from = from.ok_or_else(|| LabError::unexpected("no datagram arrives"))?;
        assert_eq!(self.from.ip(), self.client);
        let [near, far] = &self.raw;
        let heard = poll_until(PATIENCE, Duration::ZERO, || {
            near.send(self.moved, words).ok()?;
            far.expect(Duration::from_millis(300), |heard| heard == words)
                .ok()
        });
        let (from, _) = heard.ok_or_else(|| LabError::unexpected("no ESP arrives"))?;
        assert_eq!(from, self.client);
        Ok(())
    }

    /// The application speaks, while the client has said nothing.
    pub(crate) fn push(&mut self, words: &[u8]) -> Result {
        self.far.write_all(words).map_err(failed)?;
        let mut heard = vec![0; words.len()];
        self.near.read_exact(&mut heard).map_err(failed)?;
        assert_eq!(heard, words);
        let wait = Some(Duration::from_millis(300));
        self.asking.set_read_timeout(wait).map_err(failed)?;
        let heard = poll_until(PATIENCE, Duration::ZERO, || {
            self.answering.send_to(words, self.from).ok()?;
            let mut heard = [0; 100];
            let length = self.asking.recv(&mut heard).ok()?;
            (&heard[..length] == words).then_some(())
        });
        heard.ok_or_else(|| LabError::unexpected(format!("no datagram of {}", self.moved)))?;
        let [near, far] = &self.raw;
        let heard = poll_until(PATIENCE, Duration::ZERO, || {
            far.send(self.client, words).ok()?;
            near.expect(Duration::from_millis(300), |heard| heard == words)
                .ok()
        });
        let (from, _) = heard.ok_or_else(|| LabError::unexpected("no ESP comes back"))?;
        assert_eq!(from, self.moved);
        Ok(())
    }
}

/// The words of an answer, which must never be seen on the new server's link.
const ANSWER: &[u8] = b"an answer of the application";

/// Says once on a link of the new server whether anything of that left in the clear.
pub(crate) fn nothing_leaks<T>(lab: &Lab, during: impl FnOnce() -> Result<T>) -> Result<T> {
    let tap = lab.tap(Leg::New)?;
    let done = during()?;
    assert_eq!(tap.stop()?.frames_with(ANSWER), 0, "it left by itself");
    Ok(done)
}

/// Every cell of the table: reverse path filtering × the policy of FORWARD × (undisturbed, the new
/// server's daemon killed, the old server's killed, the old server's restarted) × protocol ×
/// family.
#[test]
fn an_application_behind_dockers_rules_is_served_however_the_host_is_set() -> Result {
    if !has("nft") {
        return Ok(());
    }
    let lab = Lab::builder().without_rp_filter().build()?;
    let container = Container::new(&lab)?;
    let setup = setup(&lab)?.moves(&FAMILIES);
    let mut daemons = setup.start_both()?;
    let rules = |forward: &str| {
        let v4 = docker_rules("ip", "172.17.0.0/16", "172.17.0.2", forward);
        let v6 = docker_rules("ip6", "fd00:d0c::/64", "fd00:d0c::2", forward);
        shell(
            lab.new_server(),
            &format!("nft -f - <<RULES\nflush ruleset\n{v4}{v6}\nRULES"),
        )
    };
    rules("accept")?;
    let mut both = Vec::new();
    for ends in ends() {
        both.push(Talks::begin(&lab, &container.namespace, ends)?);
    }
    for rp_filter in ["0", "1", "2"] {
        for host in [lab.old_server(), lab.new_server()] {
            // The stricter one counts, of this and the interface's own, which is 0.
            host.set_sysctls(&[("ipv4/conf/all/rp_filter", rp_filter)])?;
        }
        for forward in ["accept", "drop"] {
            rules(forward)?;
            let cell = |words: &str| format!("{rp_filter} {forward} {words}").into_bytes();
            nothing_leaks(&lab, || {
                for talks in &mut both {
                    talks.ask(&cell("asked"))?;
                    talks.push(ANSWER)?;
                }
                killed(&mut daemons.new)?;
                for talks in &mut both {
                    talks.far.write_all(b"!").map_err(failed)?;
                    let _ = talks.answering.send_to(ANSWER, talks.from);
                    let _ = talks.raw[1].send(talks.client, ANSWER);
                }
                daemons.new = setup.start(Role::New)?;
                daemons.new.wait_until_up()?;
                for talks in &mut both {
                    talks.near.read_exact(&mut [0]).map_err(failed)?;
                    talks.push(ANSWER)?;
                    talks.ask(&cell("after the kill"))?;
                }
                Ok(())
            })?;
        }
        // Without its memory it lets out only what answers a question.
        if rp_filter == "1" {
            daemons.old.terminate()?;
        } else {
            daemons.old.kill()?;
        }
        daemons.old = setup.start(Role::Old)?;
        daemons.wait_until_up()?;
        nothing_leaks(&lab, || {
            for talks in &mut both {
                talks.ask(b"after the old server's daemon")?;
                talks.push(ANSWER)?;
            }
            Ok(())
        })?;
    }
    shell(lab.new_server(), "nft flush ruleset")
}
