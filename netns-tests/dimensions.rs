//! Who speaks with whom × how the servers are set × what becomes of the daemons: the application on
//! the host and in a container, calls from inside and out, both families, TCP, UDP and protocols
//! without ports.
//!
//! ```text
//!  clients, and servers of others ── router ──┬── old server ✝        ║
//!                                             └── new server ✝ ── docker0 ── container
//!                                                 nat: DNAT to it, filter: FORWARD
//! ```

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use ipmoved::internals::Role;
use ipmoved::lab::topology::{CLIENT, CLIENT6, Leg, MOVED, MOVED6, NEW, NEW6};
use ipmoved::lab::{
    Client, DaemonSetup, Daemons, Lab, LabError, Namespace, RawSocket, patience, poll_until,
};
use socket2::{Domain, Protocol, Socket, Type};

use crate::behind_dnat::{Container, PORTS, docker_rules, has, shell};
use crate::outgoing::until_bound;
use crate::stage::{FAMILIES, PATIENCE, RECOVERY, Result, join, setup, split};
use crate::takeover::take_over;

/// What begins every message. None may be seen on the new server's link.
const WORDS: &str = "only the tunnel carries this";

/// How long a datagram is waited for before it is sent again.
const AGAIN: Duration = Duration::from_millis(300);

/// Whose conversations: the two hosts with the addresses that they are bound to, what is called,
/// and who the called one sees.
struct Situation<'lab> {
    name: &'static str,
    near: (&'lab Namespace, IpAddr),
    calls: IpAddr,
    far: (&'lab Namespace, IpAddr),
    seen: IpAddr,
    /// Where TCP and UDP are called, and the protocol without ports.
    ports: [u16; 2],
    raw: Option<u8>,
}

/// All of one family.
fn situations<'lab>(
    lab: &'lab Lab,
    container: &'lab Namespace,
    [client, moved, new, behind]: [IpAddr; 4],
) -> Vec<Situation<'lab>> {
    let (clients, host) = (lab.clients(), lab.new_server());
    let to = |name, near, far, seen, ports, raw| Situation {
        name,
        near,
        calls: moved,
        far,
        seen,
        ports,
        raw,
    };
    let out = |name, near, ports, raw| Situation {
        name,
        near,
        calls: client,
        far: (clients, client),
        seen: moved,
        ports,
        raw,
    };
    let [of_client, of_host, of_container] = [(clients, client), (host, new), (container, behind)];
    vec![
        to("client", of_client, of_host, client, [7_001; 2], Some(253)),
        // ESP is what leads to the container.
        to(
            "client of a container",
            of_client,
            of_container,
            client,
            PORTS,
            Some(50),
        ),
        // The kernel answers pings; other protocols stay on `lo` with `--outgoing`.
        to("host", of_host, of_host, new, [7_002; 2], None),
        to(
            "container",
            of_container,
            of_host,
            behind,
            [7_003; 2],
            Some(253),
        ),
        out("bound", (host, moved), [7_004; 2], Some(254)),
        out("by port", of_host, [2_501, 2_502], None),
        out("by port, container", of_container, [2_503, 2_504], None),
    ]
}

/// The conversations of one situation.
struct Talk<'lab> {
    of: Situation<'lab>,
    tcp: [TcpStream; 2],
    udp: [UdpSocket; 2],
    /// Where the datagrams come from, as the called one sees it.
    from: SocketAddr,
    raw: Option<[RawSocket; 2]>,
}

fn failed(error: std::io::Error) -> LabError {
    LabError::unexpected(error.to_string())
}

/// A socket of a host that is bound to an address and connected.
fn connected(host: &Namespace, from: IpAddr, kind: Type, to: SocketAddr) -> Result<Socket> {
    host.run(|| {
        let protocol = match kind {
            Type::STREAM => Protocol::TCP,
            _ => Protocol::UDP,
        };
        let socket = Socket::new(Domain::for_address(to), kind, Some(protocol)).map_err(failed)?;
        socket
            .bind(&SocketAddr::new(from, 0).into())
            .map_err(failed)?;
        let within = patience(PATIENCE);
        socket.connect_timeout(&to.into(), within).map_err(failed)?;
        Ok(socket)
    })
}

impl<'lab> Talk<'lab> {
    fn begin(of: Situation<'lab>) -> Result<Self> {
        let [to_tcp, to_udp] = of.ports.map(|port| SocketAddr::new(of.calls, port));
        let (near, near_addr) = of.near;
        let (far, far_addr) = of.far;
        let (listener, answers) = far.run(|| {
            let listener = TcpListener::bind((far_addr, of.ports[0])).map_err(failed)?;
            let answers = UdpSocket::bind((far_addr, of.ports[1])).map_err(failed)?;
            Ok((listener, answers))
        })?;
        let asks = connected(near, near_addr, Type::STREAM, to_tcp)?;
        let (accepted, who) = listener.accept().map_err(failed)?;
        assert_eq!(who.ip(), of.seen, "{}", of.name);
        let tcp = [asks.into(), accepted];
        for stream in &tcp {
            let wait = Some(patience(RECOVERY));
            TcpStream::set_read_timeout(stream, wait).map_err(failed)?;
        }
        let udp = [
            connected(near, near_addr, Type::DGRAM, to_udp)?.into(),
            answers,
        ];
        for socket in &udp {
            UdpSocket::set_read_timeout(socket, Some(AGAIN)).map_err(failed)?;
        }
        let raw = of.raw.map(|protocol| {
            Ok::<_, LabError>([
                RawSocket::open(near, near_addr, protocol)?,
                RawSocket::open(far, far_addr, protocol)?,
            ])
        });
        let mut talk = Self {
            from: SocketAddr::new(of.seen, 0),
            raw: raw.transpose()?,
            of,
            tcp,
            udp,
        };
        talk.ask("first")?;
        talk.push("first back")?;
        Ok(talk)
    }

    fn words(&self, words: &str) -> Vec<u8> {
        format!("{WORDS}: {}, {words}", self.of.name).into_bytes()
    }

    fn is_missing(&self, what: &str) -> LabError {
        LabError::unexpected(format!("{}: no {what}, {}", self.of.name, self.of.calls))
    }

    /// What one end wrote into the connection comes to the other.
    fn comes(&mut self, to: usize, words: &[u8]) -> Result {
        let mut heard = vec![0; words.len()];
        self.tcp[to].read_exact(&mut heard).map_err(|error| {
            let name = self.of.name;
            LabError::unexpected(format!("{name}: {}: TCP: {error}", self.of.calls))
        })?;
        assert_eq!(heard, words);
        Ok(())
    }

    /// Who called speaks, and the other end hears who that is.
    fn ask(&mut self, words: &str) -> Result {
        let words = self.words(words);
        self.tcp[0].write_all(&words).map_err(failed)?;
        self.comes(1, &words)?;
        let [asks, answers] = &self.udp;
        let from = poll_until(PATIENCE, Duration::ZERO, || {
            asks.send(&words).ok()?;
            heard(answers, &words)
        });
        self.from = from.ok_or_else(|| self.is_missing("datagram"))?;
        assert_eq!(self.from.ip(), self.of.seen, "{}", self.of.name);
        if let Some([near, far]) = &self.raw {
            let from = poll_until(PATIENCE, Duration::ZERO, || {
                near.send(self.of.calls, &words).ok()?;
                far.expect(AGAIN, |heard| heard == words).ok()
            });
            let (from, _) = from.ok_or_else(|| self.is_missing("packet without ports"))?;
            assert_eq!(from, self.of.seen, "{}", self.of.name);
        }
        Ok(())
    }

    /// The other end speaks, to whom it saw, and is who was called.
    fn push(&mut self, words: &str) -> Result {
        let words = self.words(words);
        self.tcp[1].write_all(&words).map_err(failed)?;
        self.comes(0, &words)?;
        let [asks, answers] = &self.udp;
        let from = poll_until(PATIENCE, Duration::ZERO, || {
            answers.send_to(&words, self.from).ok()?;
            heard(asks, &words)
        });
        let from = from.ok_or_else(|| self.is_missing("datagram back"))?;
        assert_eq!(from.ip(), self.of.calls, "{}", self.of.name);
        if let Some([near, far]) = &self.raw {
            let from = poll_until(PATIENCE, Duration::ZERO, || {
                far.send(self.of.seen, &words).ok()?;
                near.expect(AGAIN, |heard| heard == words).ok()
            });
            let (from, _) = from.ok_or_else(|| self.is_missing("packet without ports back"))?;
            assert_eq!(from, self.of.calls, "{}", self.of.name);
        }
        Ok(())
    }

    /// Both ends speak while nobody may hear it.
    fn say_meanwhile(&mut self) -> Result {
        let words = self.words("meanwhile");
        for stream in &mut self.tcp {
            stream.write_all(&words).map_err(failed)?;
        }
        let [asks, answers] = &self.udp;
        let _ = asks.send(&words);
        let _ = answers.send_to(&words, self.from);
        if let Some([near, far]) = &self.raw {
            let _ = near.send(self.of.calls, &words);
            let _ = far.send(self.of.seen, &words);
        }
        Ok(())
    }

    /// What was said of the connection meanwhile arrives.
    fn hear_of_meanwhile(&mut self) -> Result {
        let words = self.words("meanwhile");
        self.comes(1, &words)?;
        self.comes(0, &words)
    }
}

/// Who sent these words to the socket, if they come.
fn heard(socket: &UdpSocket, words: &[u8]) -> Option<SocketAddr> {
    let mut heard = [0; 200];
    let (length, from) = socket.recv_from(&mut heard).ok()?;
    (&heard[..length] == words).then_some(from)
}

/// The daemon of a server is killed, so that it undoes nothing, and another one starts; or another
/// one takes over.
fn away<'lab>(
    setup: &DaemonSetup<'lab>,
    daemons: Daemons<'lab>,
    (role, crashes): (Role, bool),
    talks: &mut [Talk<'_>],
) -> Result<Daemons<'lab>> {
    let (one, other) = split(daemons, role);
    let next = if crashes {
        one.kill()?;
        for talk in &mut *talks {
            talk.say_meanwhile()?;
        }
        setup.start(role)?
    } else {
        take_over(setup, role, one)?
    };
    let mut daemons = join(role, next, other);
    daemons.wait_until_up()?;
    until_bound(setup.lab())?;
    for talk in talks {
        if crashes {
            talk.hear_of_meanwhile()?;
        }
        talk.ask("after")?;
        talk.push("after, back")?;
    }
    Ok(daemons)
}

#[test]
fn whoever_speaks_to_whom_goes_on_however_the_servers_are_set() -> Result {
    if !has("nft") {
        return Ok(());
    }
    let lab = Lab::builder().without_rp_filter().build()?;
    let container = Container::new(&lab)?;
    let ping = [("ipv4/ping_group_range", "0 2147483647")];
    for host in [lab.new_server(), &container.namespace] {
        host.set_sysctls(&ping)?;
    }
    let setup = (setup(&lab)?.moves(&FAMILIES).accept_what_moves())
        .args(Role::New, &["--outgoing", "2500-2599"])
        .args(Role::Old, &["--allow-outgoing"]);
    let mut daemons = setup.start_both()?;
    until_bound(&lab)?;
    let forward = |policy: &str| {
        let v4 = docker_rules("ip", "172.17.0.0/16", "172.17.0.2", policy);
        let v6 = docker_rules("ip6", "fd00:d0c::/64", "fd00:d0c::2", policy);
        let rules = |rules: &str| format!("nft -f - <<RULES\nflush ruleset\n{rules}\nRULES");
        shell(lab.new_server(), &rules(&format!("{v4}{v6}")))?;
        let chain = format!("type filter hook forward priority 0; policy {policy};");
        let old = format!("table inet filter {{\nchain FORWARD {{\n{chain}\n}}\n}}");
        shell(lab.old_server(), &rules(&old))
    };
    forward("accept")?;
    let behind = |text: &str| text.parse().expect("an address");
    let families = [
        [
            CLIENT.into(),
            MOVED.into(),
            NEW.into(),
            behind("172.17.0.2"),
        ],
        [
            CLIENT6.into(),
            MOVED6.into(),
            NEW6.into(),
            behind("fd00:d0c::2"),
        ],
    ];
    let mut talks = Vec::new();
    for ends in families {
        for of in situations(&lab, &container.namespace, ends) {
            talks.push(Talk::begin(of)?);
        }
    }
    let tap = lab.tap(Leg::New)?;
    for rp_filter in ["0", "1", "2"] {
        for host in [lab.old_server(), lab.new_server()] {
            // The stricter one counts, of this and the interface's own, which is 0.
            host.set_sysctls(&[("ipv4/conf/all/rp_filter", rp_filter)])?;
        }
        for policy in ["accept", "drop"] {
            forward(policy)?;
            let row = format!("rp_filter {rp_filter}, FORWARD {policy}");
            println!("{row}");
            for talk in &mut talks {
                talk.ask(&row)?;
                talk.push(&row)?;
            }
            for ends in families {
                for mut of in situations(&lab, &container.namespace, ends) {
                    // The ports of the container are those that are published.
                    if of.ports != PORTS {
                        of.ports = of.ports.map(|port| port + 10);
                        Talk::begin(of)?;
                    }
                }
            }
            for moved in [MOVED.into(), IpAddr::from(MOVED6)] {
                Client::new(lab.new_server(), NEW, NEW6).ping(moved, 56)?;
                lab.client().ping(moved, 56)?;
            }
            for role in [Role::New, Role::Old] {
                let how = (role, policy == "accept");
                daemons = away(&setup, daemons, how, &mut talks)?;
            }
        }
    }
    assert_eq!(
        tap.stop()?.frames_with(WORDS.as_bytes()),
        0,
        "it left by itself"
    );
    for host in [lab.old_server(), lab.new_server()] {
        shell(host, "nft flush ruleset")?;
    }
    daemons.terminate()
}
