//! What nobody answers stays named while daemons go and come back, and is well again once it is
//! mended.
//!
//! ```text
//!  clients, who ─ router ──┬── old server, 192.0.2.5:80-88 moved    a filter takes 88 first
//!  never give up           │        ║
//!                          └── new server    80 served          84 answers get a mark that a rule
//!                                            81 nobody             leads into nothing
//!                                            82 dropped by nft  85 dropped by rp_filter
//!                                            83 asked for from where a link of its own leads
//!                                            86 answers taken by a filter of tc
//!                                            87 a container, its packets dropped in FORWARD
//! ```

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use ipmoved::internals::Role;
use ipmoved::lab::topology::{MOVED, MOVED6, NEW, NEW6, UPLINK};
use ipmoved::lab::{DaemonSetup, Lab, LabError, Service, poll_until};
use socket2::{Domain, Socket, Type};

use crate::silence::{
    BOTH, PAUSE, SECONDS, at, becomes, first_line_becomes, has_cause, sh, state, state_becomes,
};
use crate::stage::{Result, join, setup, split};

/// A client in a network of the new server's own.
const ASTRAY: &str = "203.0.113.13";

fn addr(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// Clients that ask for the same again and again. The kernel repeats each SYN twice before it is
/// given up.
struct Callers {
    stop: Arc<AtomicBool>,
}

impl Callers {
    fn start(lab: &Lab, asked: Vec<(Option<SocketAddr>, SocketAddr)>) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        lab.clients().thread("callers", move || {
            let mut calls = VecDeque::new();
            while !stopped.load(Relaxed) {
                let begun = asked.iter().filter_map(|&(from, to)| {
                    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).ok()?;
                    if let Some(from) = from {
                        socket.bind(&from.into()).ok()?;
                    }
                    socket.set_nonblocking(true).ok()?;
                    let _ = socket.connect(&to.into());
                    Some(socket)
                });
                calls.push_back(begun.collect::<Vec<_>>());
                if calls.len() > 8 {
                    calls.pop_front();
                }
                std::thread::sleep(Duration::from_millis(500));
            }
            Ok(())
        })?;
        Ok(Self { stop })
    }
}

impl Drop for Callers {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
    }
}

/// A moved port that is not answered, the state on the new server, and a cause there. The kernel
/// counts for all of IPv4 what `rp_filter` drops, which may explain 82 there as well.
fn faults() -> Vec<(String, &'static str, &'static str)> {
    let v4 = |port: u16| format!("{MOVED}:{port}/tcp");
    let v6 = |port: u16| format!("[{MOVED6}]:{port}/tcp");
    vec![
        (v4(81), "refused", "nothing_listens"),
        (v6(81), "refused", "nothing_listens"),
        (v6(82), "silent", "firewall"),
        (v4(83), "silent", "no_neighbour"),
        (v4(84), "silent", "rule"),
        (v6(84), "silent", "rule"),
        (v4(85), "silent", "rp_filter"),
        (v4(86), "silent", "filter_before"),
        (v4(87), "silent", "firewall"),
    ]
}

/// Eight warnings about a peer are kept, and 82 has one, too.
const WARNED: usize = 7;

/// What the old server's filter takes before capture.
const TAKEN: &str = "192.0.2.5:88/tcp";

/// Each fault is named on both servers: in its state, with its cause, in a warning, and in the
/// first line.
fn all_are_named(setup: &DaemonSetup<'_>) -> Result {
    for (what, state, cause) in faults() {
        state_becomes(setup, Role::New, &what, state)?;
        let named = poll_until(SECONDS, PAUSE, || {
            has_cause(setup, Role::New, &what, cause)
                .ok()?
                .then_some(())
        });
        named.ok_or_else(|| {
            let status = setup.status(Role::New);
            LabError::unexpected(format!("{what}: no cause {cause}: {status:?}"))
        })?;
        state_becomes(setup, Role::Old, &what, state)?;
    }
    // The new server tells why; of what it has no room for it says that it has come.
    for (what, ..) in faults() {
        let told = poll_until(SECONDS, PAUSE, || {
            has_cause(setup, Role::Old, &what, "new_server")
                .ok()?
                .then_some(())
        });
        told.ok_or_else(|| {
            let found = state(setup, Role::Old, &what);
            LabError::unexpected(format!("the old server knows {what} as {found:?}"))
        })?;
    }
    becomes(setup, Role::Old, TAKEN, ("nothing_in", "filter_before"))?;
    for role in BOTH {
        first_line_becomes(setup, role, |line| line.contains(": up, but "))?;
        let warned = poll_until(SECONDS, PAUSE, || {
            let warnings = setup.status(role).ok()?.0["warnings"].to_string();
            let faults = faults();
            let named = faults.iter().filter(|(what, ..)| warnings.contains(what));
            (named.count() >= WARNED).then_some(())
        });
        warned.ok_or_else(|| LabError::unexpected(format!("{role}: too few warnings")))?;
    }
    Ok(())
}

#[test]
fn silence_stays_named_while_daemons_are_restarted_and_killed_until_it_is_mended() -> Result {
    let lab = Lab::new()?;
    let moves = (80..=88).map(|port| format!("{MOVED}:{port}/tcp"));
    let moves6 = [81, 82, 84].map(|port| format!("[{MOVED6}]:{port}/tcp"));
    let moves: Vec<String> = moves.chain(moves6).collect();
    let moves: Vec<&str> = moves.iter().map(String::as_str).collect();
    let setup = setup(&lab)?.moves(&moves);
    let setup = setup.args(Role::New, &["--clients-from", "203.0.113.12/30"]);
    let new = lab.new_server();
    // A network that the new server has as well, though nobody of it is there.
    lab.set_address(lab.clients(), UPLINK, addr(ASTRAY), 24, true)?;
    lab.add_link(new, "eth1", &[(addr("203.0.113.14"), 30)])?;
    let (behind, gateway) = (addr("172.17.0.2"), addr("172.17.0.1"));
    let container = lab.add_behind(new, ("br0", "veth0"), &[(behind, 16)], &[(gateway, 16)])?;
    let _inside = Service::start(&container, (behind, 87))?;
    let service = |addr: IpAddr, port| Service::start(new, at(addr, port));
    let _well = [80, 82, 83, 84, 85, 86, 88].map(|port| service(NEW.into(), port));
    let _well6 = [82, 84].map(|port| service(NEW6.into(), port));
    sh(
        lab.old_server(),
        &[
            "tc qdisc add dev eth0 clsact",
            "tc filter add dev eth0 ingress pref 1 protocol ip u32 match ip protocol 6 0xff \
             match ip dport 88 0xffff flowid 1:1",
        ],
    )?;
    sh(
        new,
        &[
            "sysctl -qw net.ipv4.ip_forward=1",
            "nft add table inet f",
            "nft 'add chain inet f i { type filter hook input priority 0; }'",
            "nft add rule inet f i tcp dport 82 drop",
            "nft 'add chain inet f fw { type filter hook forward priority 0; policy drop; }'",
            "nft 'add chain inet f out { type route hook output priority -150; }'",
            "nft add rule inet f out tcp sport 84 meta mark set 7",
            "nft add table ip n",
            "nft 'add chain ip n pre { type nat hook prerouting priority -100; }'",
            "nft add rule ip n pre tcp dport 87 dnat to 172.17.0.2",
            "ip rule add fwmark 7 lookup 107",
            "ip -6 rule add fwmark 7 lookup 107",
            "ip route add blackhole default table 107",
            "ip -6 route add unreachable default table 107",
            "ip link add d0 type veth peer name d1",
            "ip link set d0 up",
            "ip link set d1 up",
            "ip route add default dev d0 table 105",
            "ip rule add ipproto tcp sport 85 lookup 105",
            "tc qdisc add dev eth0 clsact",
            "tc filter add dev eth0 egress pref 1 protocol ip u32 match ip protocol 6 0xff \
             match ip sport 86 0xffff flowid 1:1",
        ],
    )?;
    let mut daemons = setup.start_both()?;
    let asked = (80..=88).map(|port| at(MOVED, port));
    let asked = asked.chain([81, 82, 84].map(|port| at(MOVED6, port)));
    let from = |asked: SocketAddr| (asked.port() == 83).then(|| at(addr(ASTRAY), 0));
    let asked = asked.map(|asked| (from(asked), asked));
    let _callers = Callers::start(&lab, asked.collect())?;
    all_are_named(&setup)?;
    for role in BOTH {
        let (killed, other) = split(daemons, role);
        killed.kill()?;
        daemons = join(role, setup.start(role)?, other);
        daemons.wait_until_up()?;
        all_are_named(&setup)?;
    }
    // One is stopped, and the other one goes on to say what it knows, beside that one being away.
    for role in BOTH {
        let (stopped, other) = split(daemons, role);
        stopped.terminate()?;
        let stays = if role == Role::Old {
            Role::New
        } else {
            Role::Old
        };
        first_line_becomes(&setup, stays, |line| {
            !line.contains(": up") || line.contains("nothing was heard")
        })?;
        for (what, bad, _) in faults() {
            assert_eq!(
                state(&setup, stays, &what)?.0,
                bad,
                "{what} without the {role}"
            );
        }
        daemons = join(role, setup.start(role)?, other);
        daemons.wait_until_up()?;
        all_are_named(&setup)?;
    }
    // All is mended, and the clients are still there.
    sh(
        new,
        &[
            "nft delete table inet f",
            "ip link del eth1",
            "ip rule del fwmark 7",
            "ip -6 rule del fwmark 7",
            "ip rule del ipproto tcp sport 85 lookup 105",
            "tc filter del dev eth0 egress pref 1",
        ],
    )?;
    sh(lab.old_server(), &["tc filter del dev eth0 ingress pref 1"])?;
    let _mended = [service(NEW.into(), 81)?, service(NEW6.into(), 81)?];
    for role in BOTH {
        for what in &moves {
            state_becomes(&setup, role, what, "ok")?;
        }
        first_line_becomes(&setup, role, |line| line.ends_with(": up"))?;
        let warnings = setup.status(role)?.0["warnings"].to_string();
        assert!(!warnings.contains("is not answered"), "{warnings}");
    }
    Ok(())
}
