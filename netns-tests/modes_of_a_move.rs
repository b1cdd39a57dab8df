//! Whose a conversation is stays so from mode to mode: TCP, UDP and pings, of sockets of the old
//! server and of a container behind it, in both families, by hundreds.
//!
//! ```text
//!                                ┌── old server: ports 81 and 54 ── container: ports 80 and 53
//!  clients ────────────── router ─┤              ║ tunnel
//!                                └── new server: all of them
//! ```

use std::collections::HashSet;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, UdpSocket};

use ipmoved::internals::Role;
use ipmoved::lab::topology::{MOVED, MOVED6, NEW, NEW6};
use ipmoved::lab::traffic::{Client, Conversation, TIMEOUT};
use ipmoved::lab::{DaemonSetup, Lab, LabError, Namespace, Service, UdpService};
use socket2::{Domain, Protocol, Socket, Type};

use crate::own::{container, run};
use crate::stage::{FAMILIES, PATIENCE, RECOVERY, Result, setup};

/// Ports of TCP and of UDP: of the container, and of the old server itself.
const TCP: [u16; 2] = [80, 81];
const UDP: [u16; 2] = [53, 54];

const MOVED_ENDS: [IpAddr; 2] = [IpAddr::V4(MOVED), IpAddr::V6(MOVED6)];
const NEW_ENDS: [IpAddr; 2] = [IpAddr::V4(NEW), IpAddr::V6(NEW6)];

/// Conversations that are begun in a mode, of each kind with each port.
const EACH: usize = 30;

/// The services of one server.
#[derive(Default)]
struct Services {
    tcp: Vec<Service>,
    udp: Vec<UdpService>,
}

impl Services {
    fn start(&mut self, host: &Namespace, ends: [IpAddr; 2], number: usize) -> Result {
        for end in ends {
            self.tcp.push(Service::start(host, (end, TCP[number]))?);
            self.udp.push(UdpService::start(host, (end, UDP[number]))?);
        }
        Ok(())
    }

    /// Who has spoken to them over UDP.
    fn peers(&self) -> HashSet<SocketAddr> {
        self.udp.iter().flat_map(UdpService::peers).collect()
    }
}

/// What was begun in one mode.
#[derive(Default)]
struct Begun {
    tcp: Vec<Conversation>,
    udp: Vec<UdpSocket>,
    pings: Vec<(IpAddr, Socket)>,
}

impl Begun {
    fn begin(lab: &Lab, client: Client<'_>) -> Result<Self> {
        let mut begun = Self::default();
        for moved in MOVED_ENDS {
            for _ in 0..EACH {
                for port in TCP {
                    begun.tcp.push(client.converse((moved, port))?);
                }
                for port in UDP {
                    begun.udp.push(client.udp_socket((moved, port))?);
                }
            }
            let socket = lab.clients().run(|| {
                let (domain, protocol) = match moved {
                    IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
                    IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
                };
                let socket =
                    Socket::new(domain, Type::DGRAM, Some(protocol)).map_err(unexpected)?;
                let (end, patience) = (SocketAddr::new(moved, 0), Some(TIMEOUT));
                socket.set_read_timeout(patience).map_err(unexpected)?;
                socket.connect(&end.into()).map_err(unexpected)?;
                Ok(socket)
            })?;
            begun.pings.push((moved, socket));
        }
        Ok(begun)
    }

    /// Everybody speaks, and is answered.
    fn go_on(&mut self, when: &str) -> Result {
        let failed = |what: String, error: &dyn std::fmt::Display| {
            LabError::unexpected(format!("{when}: {what}: {error}"))
        };
        for (number, it) in self.tcp.iter_mut().enumerate() {
            let said = it.say(b"still there?");
            said.map_err(|error| failed(format!("TCP {number}"), &error))?;
        }
        for (number, it) in self.tcp.iter_mut().enumerate() {
            let heard = it.hear(b"still there?", RECOVERY);
            heard.map_err(|error| failed(format!("TCP {number}"), &error))?;
        }
        // Twice: the first answer tells whose it is.
        for _ in 0..2 {
            for it in &self.udp {
                it.send(b"still there?").map_err(unexpected)?;
            }
            for it in &self.udp {
                let to = it.peer_addr().map_err(unexpected)?;
                let heard = it.recv(&mut [0; 100]);
                heard.map_err(|error| failed(format!("UDP to {to}"), &error))?;
            }
        }
        for (moved, socket) in &mut self.pings {
            let heard = ping(*moved, socket);
            heard.map_err(|error| failed(format!("ping to {moved}"), &error))?;
        }
        Ok(())
    }

    fn udp_ends(&self) -> HashSet<SocketAddr> {
        self.udp
            .iter()
            .filter_map(|it| it.local_addr().ok())
            .collect()
    }
}

fn unexpected(error: std::io::Error) -> LabError {
    LabError::unexpected(error.to_string())
}

/// One more echo request with the same identifier.
fn ping(moved: IpAddr, socket: &mut Socket) -> std::io::Result<()> {
    let request = if moved.is_ipv4() { 8 } else { 128 };
    socket.write_all(&[request, 0, 0, 0, 0, 0, 0, 1])?;
    socket.read(&mut [0; 100]).map(drop)
}

fn order(setup: &DaemonSetup<'_>, args: &[&str]) -> Result {
    let said = setup.run(Role::Old, args)?;
    if !said.status.success() {
        return Err(LabError::unexpected(format!("{args:?}: {said:?}")));
    }
    Ok(())
}

#[test]
fn whose_a_conversation_is_stays_so_whatever_the_mode() -> Result {
    let lab = Lab::new()?;
    let (behind, _inside) = container(&lab)?;
    run(
        lab.old_server(),
        "nft '
         table inet more {
             chain pre {
                 type nat hook prerouting priority -101;
                 iifname eth0 ip daddr 192.0.2.5 udp dport 53 dnat ip to 10.8.0.2
                 iifname eth0 ip6 daddr 2001:db8:a::5 udp dport 53 dnat ip6 to fd00:8::2
             }
         }'",
    )?;
    let inside = ["10.8.0.2", "fd00:8::2"].map(|addr| addr.parse().expect("an address"));
    let (mut old, mut new) = (Services::default(), Services::default());
    old.start(&behind, inside, 0)?;
    old.start(lab.old_server(), MOVED_ENDS, 1)?;
    for number in 0..2 {
        new.start(lab.new_server(), NEW_ENDS, number)?;
    }
    let setup = setup(&lab)?
        .moves(&FAMILIES)
        .args(Role::Old, &["--start", "here"]);
    let daemons = setup.start_both()?;
    let client = lab.client();

    let mut all: Vec<(Begun, Option<bool>)> = Vec::new();
    for (args, begins) in [
        (&[][..], Some(Some(true))),
        (&["move", "--percent", "50"], Some(None)),
        (&["hold", "--for", "60"], None),
        (&["move"], Some(Some(false))),
        (&["hold", "--for", "60"], None),
        (&["back"], Some(Some(true))),
        (&["move"], None),
    ] {
        if !args.is_empty() {
            order(&setup, args)?;
        }
        for (begun, _) in &mut all {
            begun.go_on(&format!("after {args:?}"))?;
        }
        if let Some(here) = begins {
            let mut begun = Begun::begin(&lab, client)?;
            begun.go_on(&format!("begun after {args:?}"))?;
            all.push((begun, here));
        }
    }
    // The daemon's memory goes, and that of its programs stays.
    daemons.old.kill()?;
    let mut again = setup.start(Role::Old)?;
    again.wait_until_up()?;
    for (begun, _) in &mut all {
        begun.go_on("after a crash")?;
    }
    let (at_old, at_new) = (old.peers(), new.peers());
    for (number, (begun, here)) in all.iter().enumerate() {
        for end in begun.udp_ends() {
            let at = [at_old.contains(&end), at_new.contains(&end)];
            assert_ne!(at[0], at[1], "{number}: {end} is one server's: {at:?}");
            assert!(
                here.is_none_or(|here| here == at[0]),
                "{number}: {end}: {at:?}"
            );
        }
    }
    // Pings that the old server answers still are when the new one answers none, and only those.
    for family in ["ipv4/icmp_echo_ignore_all", "ipv6/icmp/echo_ignore_all"] {
        lab.new_server().set_sysctls(&[(family, "1")])?;
    }
    for (begun, here) in &mut all {
        for (moved, socket) in &mut begun.pings {
            socket
                .set_read_timeout(Some(PATIENCE / 20))
                .map_err(unexpected)?;
            let answered = ping(*moved, socket).is_ok();
            assert!(here.is_none_or(|here| here == answered), "{moved} {here:?}");
        }
    }
    again.terminate()?;
    daemons.new.terminate().map(drop)
}
