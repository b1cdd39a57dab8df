//! Connections in each state that there is, by the hundred, go on over every change of mode: those
//! that open, those that are established, and those that one side has closed.
//!
//! ```text
//!                                ┌── old server ── docker0 ── container, behind DNAT
//!  clients, all the time ── router ──┤      ║ tunnel
//!                                └── new server
//! ```

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use ipmoved::internals::Role;
use ipmoved::lab::topology::{MOVED, MOVED6, NEW, NEW6};
use ipmoved::lab::traffic::{Client, Conversation};
use ipmoved::lab::{Lab, LabError, Namespace, Service, UdpService, poll_until};

use crate::behind_dnat::{has, shell};
use crate::stage::{FAMILIES, Result, setup};
use crate::the_move::{PAUSE, run};

/// Where the container is.
const BEHIND: [&str; 2] = ["172.17.0.2", "fd00:d0c::2"];

/// Ports of the old server itself, and of its container.
const PORTS: [(u16, u16); 2] = [(80, 53), (8_080, 5_353)];

/// Connections in each state, of each family and to each port, that are made in each mode. With two
/// of either that is a hundred in each state, and as many senders of datagrams.
const EACH: usize = 25;

/// Clients that open connections while the mode changes, and how many each opens at least.
const RUSH: usize = 24;
const OPENED: usize = 4;

/// How long something may take that waits for nothing: also a machine that stands still.
const PATIENT: Duration = Duration::from_secs(60);

/// More than a client's kernel takes before the client reads, so that the server has to send yet.
const STREAM: usize = 300_000;

/// Docker's rules for what is published, as `iptables-nft` writes them.
const DNAT: &str = "echo 1 > /proc/sys/net/ipv4/ip_forward
    echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
    nft 'table ip nat {
        chain in {
            type nat hook prerouting priority -100;
            iifname != docker0 tcp dport 8080 dnat to 172.17.0.2:8080
            iifname != docker0 udp dport 5353 dnat to 172.17.0.2:5353
        }
    }'
    nft 'table ip6 nat {
        chain in {
            type nat hook prerouting priority -100;
            iifname != docker0 tcp dport 8080 dnat to [fd00:d0c::2]:8080
            iifname != docker0 udp dport 5353 dnat to [fd00:d0c::2]:5353
        }
    }'";

fn failed(error: std::io::Error) -> LabError {
    LabError::unexpected(error.to_string())
}

fn parsed(addr: &str) -> IpAddr {
    addr.parse().expect("it is an address")
}

/// What serves all ports, in both families, on one server.
struct Serves {
    tcp: Vec<Service>,
    udp: Vec<UdpService>,
}

impl Serves {
    fn new(each: &[(&Namespace, [IpAddr; 2], (u16, u16))]) -> Result<Self> {
        let mut all = Self {
            tcp: Vec::new(),
            udp: Vec::new(),
        };
        for &(host, addrs, (tcp, udp)) in each {
            for addr in addrs {
                all.tcp.push(Service::start(host, (addr, tcp))?);
                all.udp.push(UdpService::start(host, (addr, udp))?);
            }
        }
        Ok(all)
    }

    /// How many connections and datagrams came.
    fn came(&self) -> usize {
        let tcp: usize = self.tcp.iter().map(|it| it.peers().len()).sum();
        tcp + self.udp.iter().map(|it| it.peers().len()).sum::<usize>()
    }

    /// Whether somebody came from there, to UDP.
    fn heard(&self, from: SocketAddr) -> bool {
        self.udp.iter().any(|it| it.peers().contains(&from))
    }
}

/// Connections and flows that were begun in one mode.
struct Cohort {
    established: Vec<Conversation>,
    /// The client has sent all, and the server has much to say yet.
    closed_by_client: Vec<TcpStream>,
    /// The server has said all, and the client is still there.
    closed_by_server: Vec<TcpStream>,
    flows: Vec<UdpSocket>,
}

fn targets() -> impl Iterator<Item = ((IpAddr, u16), (IpAddr, u16))> {
    let families = [IpAddr::from(MOVED), MOVED6.into()];
    let of = move |(tcp, udp)| families.map(|addr| ((addr, tcp), (addr, udp)));
    PORTS.into_iter().flat_map(of)
}

/// Asks for this over a connection.
fn request(stream: &mut TcpStream, path: &str) -> Result {
    let line = format!("GET {path} HTTP/1.1\r\nHost: lab\r\n\r\n");
    stream.write_all(line.as_bytes()).map_err(failed)?;
    stream.set_read_timeout(Some(PATIENT)).map_err(failed)
}

/// Everything that the server says.
fn rest(mut stream: TcpStream) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    stream.read_to_end(&mut all).map_err(failed)?;
    Ok(all)
}

impl Cohort {
    fn begin(client: Client<'_>) -> Result<Self> {
        let mut all = Self {
            established: Vec::new(),
            closed_by_client: Vec::new(),
            closed_by_server: Vec::new(),
            flows: Vec::new(),
        };
        for (tcp, udp) in targets() {
            for _ in 0..EACH {
                all.established.push(client.converse(tcp)?);
                let mut closes = client.connect(tcp)?;
                request(&mut closes, &format!("/stream/7/{STREAM}"))?;
                closes.shutdown(Shutdown::Write).map_err(failed)?;
                all.closed_by_client.push(closes);
                let mut closed = client.connect(tcp)?;
                request(&mut closed, "/")?;
                all.closed_by_server.push(closed);
                let flow = client.udp_socket(udp)?;
                flow.set_read_timeout(Some(PATIENT)).map_err(failed)?;
                all.flows.push(flow);
            }
        }
        all.talk()?;
        Ok(all)
    }

    /// Who has not ended goes on.
    fn talk(&mut self) -> Result {
        for conversation in &mut self.established {
            conversation.say(b"still there?")?;
        }
        for conversation in &mut self.established {
            conversation.hear(b"still there?", PATIENT)?;
        }
        for flow in &self.flows {
            flow.send(b"still there?").map_err(failed)?;
        }
        for flow in &self.flows {
            let mut heard = [0; 64];
            let length = flow.recv(&mut heard).map_err(failed)?;
            assert_eq!(&heard[..length], b"still there?");
        }
        Ok(())
    }

    /// Everything ends as it should.
    fn end(mut self) -> Result {
        self.talk()?;
        for stream in self.closed_by_client {
            let said = rest(stream)?;
            let head = said.windows(4).position(|it| it == b"\r\n\r\n");
            let body = said.len() - head.map_or(said.len(), |at| at + 4);
            assert_eq!(body, STREAM, "bytes");
        }
        for stream in self.closed_by_server {
            let said = rest(stream)?;
            assert!(said.windows(7).any(|it| it == b"server "), "{said:?}");
        }
        Ok(())
    }
}

/// Opens connections while `changes` does something, and at least so many behind it: each is
/// answered.
fn rush(client: Client<'_>, changes: impl FnOnce() -> Result) -> Result {
    let (opened, ends) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let ask = |number: usize| -> Result {
        let all: Vec<_> = targets().collect();
        let mut left = OPENED;
        while left > 0 {
            let (tcp, _) = all[(number + left) % all.len()];
            let mut stream = client.connect_within(tcp, PATIENT)?;
            request(&mut stream, "/")?;
            let said = rest(stream)?;
            assert!(said.windows(7).any(|it| it == b"server "), "{said:?}");
            opened.fetch_add(1, SeqCst);
            left -= usize::from(ends.load(SeqCst) > 0);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let asking: Vec<_> = (0..RUSH)
            .map(|number| scope.spawn(move || ask(number)))
            .collect();
        // Some are on their way.
        let some = || (opened.load(SeqCst) > RUSH).then_some(());
        let come = poll_until(PATIENT, PAUSE, some);
        let changed = changes();
        ends.store(1, SeqCst);
        for thread in asking {
            thread.join().expect("it does not panic")?;
        }
        assert!(come.is_some(), "nobody was answered before");
        changed
    })
}

/// What the kernel of a host has counted of TCP: connections that ended by a reset, and attempts
/// that failed. What it sends itself says nothing: a FIN that comes twice gets a reset as well.
fn resets(host: &Namespace) -> Result<[u64; 2]> {
    let text =
        host.run(|| std::fs::read_to_string("/proc/thread-self/net/snmp").map_err(failed))?;
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, values) = (lines.next().unwrap_or(""), lines.next().unwrap_or(""));
    let value = |wanted: &str| {
        let at = names.split(' ').position(|name| name == wanted)?;
        values.split(' ').nth(at)?.parse().ok()
    };
    Ok(["EstabResets", "AttemptFails"].map(|name| value(name).unwrap_or(0)))
}

#[test]
fn hundreds_of_connections_in_each_state_go_on_over_every_change_of_mode() -> Result {
    if !has("nft") {
        return Ok(());
    }
    let lab = Lab::new()?;
    let setup = setup(&lab)?
        .moves(&FAMILIES)
        .args(Role::Old, &["--start", "here"]);
    let (old, new) = (lab.old_server(), lab.new_server());
    let behind = BEHIND.map(parsed);
    let container = lab.add_behind(
        old,
        ("docker0", "port0"),
        &[(behind[0], 16), (behind[1], 64)],
        &[(parsed("172.17.0.1"), 16), (parsed("fd00:d0c::1"), 64)],
    )?;
    shell(old, DNAT)?;
    for host in [old, new, &container] {
        // Nobody gives up what the other side has not closed while a test takes long.
        host.set_sysctls(&[("ipv4/tcp_fin_timeout", "600")])?;
    }
    let moved = [IpAddr::from(MOVED), MOVED6.into()];
    let at = [IpAddr::from(NEW), NEW6.into()];
    let here = Serves::new(&[(old, moved, PORTS[0]), (&container, behind, PORTS[1])])?;
    let there = Serves::new(&[(new, at, PORTS[0]), (new, at, PORTS[1])])?;
    let daemons = setup.start_both()?;
    let client = lab.client();
    let before = resets(lab.clients())?;
    let mut cohorts = Vec::new();
    for (args, to) in [
        (&["back"][..], Some([true, false])),
        (&["move", "--percent", "50"], None),
        (&["move"], Some([false, true])),
        (&["move", "--percent", "50"], None),
        (&["back"], Some([true, false])),
    ] {
        let told = |error: LabError| LabError::unexpected(format!("{args:?}: {error}"));
        // Clients wait in between, as many as come in that time.
        let holds = args[0] == "move" && args.len() == 1;
        let changes = || -> Result {
            if holds {
                run(&setup, &["hold", "--for", "600"])?;
                let waiting = || {
                    let status = setup.status(Role::Old).ok()?;
                    let modes = status.tunnel()["modes"].as_array()?.clone();
                    let all: u64 = modes.iter().filter_map(|it| it["waiting"].as_u64()).sum();
                    (all >= RUSH as u64).then_some(())
                };
                poll_until(PATIENT, PAUSE, waiting)
                    .ok_or_else(|| LabError::unexpected("not all of them wait"))?;
                cohorts.iter_mut().try_for_each(Cohort::talk)?;
            }
            run(&setup, args).map(drop)
        };
        rush(client, changes).map_err(told)?;
        let came = [&here, &there].map(Serves::came);
        let cohort = Cohort::begin(client).map_err(told)?;
        let comes = [&here, &there].map(Serves::came);
        let grew = [comes[0] > came[0], comes[1] > came[1]];
        if let Some(to) = to {
            assert_eq!(grew, to, "{args:?}");
        }
        for flow in &cohort.flows {
            let from = flow.local_addr().map_err(failed)?;
            let heard = [&here, &there].map(|it| it.heard(from));
            assert_ne!(
                heard[0], heard[1],
                "{args:?}: {from} is answered by one server"
            );
        }
        cohorts.push(cohort);
        cohorts
            .iter_mut()
            .try_for_each(Cohort::talk)
            .map_err(told)?;
    }
    let senders: Vec<SocketAddr> = (cohorts.iter())
        .flat_map(|it| &it.flows)
        .map(UdpSocket::local_addr)
        .collect::<std::result::Result<_, _>>()
        .map_err(failed)?;
    for cohort in cohorts {
        cohort.end()?;
    }
    for from in senders {
        let heard = [&here, &there].map(|it| it.heard(from));
        assert_ne!(heard[0], heard[1], "{from} has changed servers");
    }
    assert_eq!(resets(lab.clients())?, before, "resets, and refusals");
    daemons.terminate()
}
