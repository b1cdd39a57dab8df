//! What clients ask for and nobody answers is seen, on both servers, with the cause.
//!
//! ```text
//!  client ── router ──┬── old server, 192.0.2.5:80-86 moved       a filter takes 86 before capture
//!                     │        ║
//!                     └── new server    80 served       83 dropped by nft
//!                                       81 nobody       84 answers blackholed by a rule
//!                                       82 on lo only   85 dropped by rp_filter
//! ```
//!
//! Other tests have their own ports, with what becomes of them beside it.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use ipmoved::internals::Role;
use ipmoved::lab::topology::{CLIENT, MOVED, MOVED6, NEW, NEW6};
use ipmoved::lab::{DaemonSetup, Lab, LabError, Namespace, Probe, Service, UdpService, poll_until};
use serde_json::Value;

use crate::behind_dnat::has;
use crate::stage::{Result, setup};

/// What is not answered shows within this time: a SYN that was repeated twice, and a look.
pub(crate) const SECONDS: Duration = Duration::from_secs(12);

/// Between two looks at the status.
pub(crate) const PAUSE: Duration = Duration::from_millis(200);

pub(crate) const BOTH: [Role; 2] = [Role::Old, Role::New];

/// Runs programs in a namespace, a line each.
pub(crate) fn sh(namespace: &Namespace, lines: &[&str]) -> Result {
    for line in lines {
        let mut command = Command::new("sh");
        command.args(["-c", line]);
        let output = namespace.output(command, Duration::from_secs(5))?;
        if !output.status.success() {
            let text = format!("{line}: {}", output.stderr);
            return Err(LabError::unexpected(text));
        }
    }
    Ok(())
}

pub(crate) fn at(addr: impl Into<std::net::IpAddr>, port: u16) -> SocketAddr {
    SocketAddr::new(addr.into(), port)
}

/// A client asks for these ports, and waits for none of them.
fn ask(lab: &Lab, ports: &[u16]) -> Result {
    ask_at(lab, MOVED.into(), ports)
}

fn ask_at(lab: &Lab, addr: std::net::IpAddr, ports: &[u16]) -> Result {
    let asks: Vec<String> = ports
        .iter()
        .map(|port| format!("(exec 3<>/dev/tcp/{addr}/{port}) 2>/dev/null & "))
        .collect();
    let line = format!("bash -c '{}'", asks.concat());
    sh(lab.clients(), &[&line])
}

/// The state of a port and its first cause, as `status --json` shows them.
pub(crate) fn state(setup: &DaemonSetup<'_>, role: Role, what: &str) -> Result<(String, String)> {
    let status = setup.status(role)?;
    let served = status.tunnel()["served"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    let found = served.iter().find(|served| served["what"] == what);
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    Ok(found.map_or_else(Default::default, |served| {
        (text(&served["state"]), text(&served["causes"][0]["cause"]))
    }))
}

pub(crate) fn becomes(
    setup: &DaemonSetup<'_>,
    role: Role,
    what: &str,
    wanted: (&str, &str),
) -> Result {
    let mut last = Default::default();
    let reached = poll_until(SECONDS, PAUSE, || {
        last = state(setup, role, what).ok()?;
        (last.0 == wanted.0 && last.1 == wanted.1).then_some(())
    });
    reached.ok_or_else(|| {
        let text = format!("{role}: {what} is {last:?}, not {wanted:?}");
        LabError::unexpected(text)
    })
}

/// Whether the status names a cause of what is asked for.
pub(crate) fn has_cause(
    setup: &DaemonSetup<'_>,
    role: Role,
    what: &str,
    cause: &str,
) -> Result<bool> {
    let status = setup.status(role)?;
    let all = status.tunnel()["served"].as_array().cloned();
    let all = all.unwrap_or_default();
    let of = all.iter().filter(|served| served["what"] == what);
    let causes = of.filter_map(|served| served["causes"].as_array());
    Ok(causes.flatten().any(|found| found["cause"] == cause))
}

/// Its state becomes this one, whatever the cause.
pub(crate) fn state_becomes(
    setup: &DaemonSetup<'_>,
    role: Role,
    what: &str,
    wanted: &str,
) -> Result {
    let mut last = Default::default();
    let reached = poll_until(SECONDS, PAUSE, || {
        last = state(setup, role, what).ok()?;
        (last.0 == wanted).then_some(())
    });
    reached.ok_or_else(|| LabError::unexpected(format!("{role}: {what} is {last:?}, not {wanted}")))
}

fn first_line(setup: &DaemonSetup<'_>, role: Role) -> Result<String> {
    let said = setup.run(role, &["status"])?;
    Ok(said.stdout.lines().next().unwrap_or_default().to_owned())
}

pub(crate) fn first_line_becomes(
    setup: &DaemonSetup<'_>,
    role: Role,
    wanted: impl Fn(&str) -> bool,
) -> Result {
    let mut last = String::new();
    let reached = poll_until(SECONDS, PAUSE, || {
        last = first_line(setup, role).ok()?;
        wanted(&last).then_some(())
    });
    reached.ok_or_else(|| LabError::unexpected(format!("{role}: {last}")))
}

#[test]
fn what_is_not_answered_is_seen_on_both_servers_with_its_cause_until_it_is_well_again() -> Result {
    let lab = Lab::new()?;
    let moves: Vec<String> = (80..=86)
        .map(|port| format!("{MOVED}:{port}/tcp"))
        .collect();
    let mut moves: Vec<&str> = moves.iter().map(String::as_str).collect();
    let udp = format!("{MOVED}:53/udp");
    moves.push(&udp);
    let setup = setup(&lab)?.moves(&moves);
    let new = lab.new_server();
    sh(
        lab.old_server(),
        &[
            "tc qdisc add dev eth0 clsact",
            // What such a filter finds a class for does not come to the next one.
            "tc filter add dev eth0 ingress pref 1 protocol ip u32 match ip protocol 6 0xff \
             match ip dport 86 0xffff flowid 1:1",
        ],
    )?;
    sh(
        new,
        &[
            "nft add table inet f",
            "nft 'add chain inet f i { type filter hook input priority 0; }'",
            "nft add rule inet f i tcp dport 83 drop",
        ],
    )?;
    let service = |addr: Ipv4Addr, port| Service::start(new, at(addr, port));
    let _well = [80, 83, 84, 85, 86].map(|port| service(NEW, port));
    let _on_lo = service(Ipv4Addr::LOCALHOST, 82)?;
    let _daemons = setup.start_both()?;
    lab.client().get(at(MOVED, 80))?.is_answered_by(NEW)?;
    for role in BOTH {
        first_line_becomes(&setup, role, |line| line.ends_with(": up"))?;
    }

    // Refused: the kernel resets what nobody listens for.
    ask(&lab, &[81, 82, 83])?;
    let _ = lab
        .client()
        .probe_udp(at(MOVED, 53), Duration::from_millis(50))?;
    for (what, cause) in [
        ("192.0.2.5:81/tcp", "nothing_listens"),
        ("192.0.2.5:82/tcp", "listens_on_loopback"),
        ("192.0.2.5:53/udp", "nothing_listens"),
    ] {
        becomes(&setup, Role::New, what, ("refused", cause))?;
        becomes(&setup, Role::Old, what, ("refused", "new_server"))?;
    }
    // Silent: somebody drops the packets, or the answers.
    becomes(
        &setup,
        Role::New,
        "192.0.2.5:83/tcp",
        ("silent", "firewall"),
    )?;
    becomes(
        &setup,
        Role::Old,
        "192.0.2.5:83/tcp",
        ("silent", "new_server"),
    )?;
    for role in BOTH {
        let line = first_line(&setup, role)?;
        let says = ": up, but 192.0.2.5:83/tcp is not answered: ";
        assert!(
            line.contains(says) && line.contains("a firewall on this server"),
            "{line}"
        );
        assert!(line.contains("3 more"), "{line}");
        // The command of the new server looks at the firewall itself.
        let chain = line.contains("chain inet f i (1 rule that drops)");
        assert_eq!(chain, role == Role::New, "{line}");
        let status = setup.status(role)?;
        let warnings = status.0["warnings"].to_string();
        for port in ["81/tcp", "82/tcp", "83/tcp", "53/udp"] {
            assert_eq!(
                warnings.matches(&format!(":{port} is ")).count(),
                1,
                "{warnings}"
            );
        }
        assert!(!warnings.contains(":80/tcp is "), "{warnings}");
        assert!(!warnings.contains(&CLIENT.to_string()), "{warnings}");
    }
    // The old server's filter takes what clients ask for before ipmoved sees it.
    let nothing = "192.0.2.5:86/tcp";
    becomes(&setup, Role::Old, nothing, ("nothing_in", "filter_before"))?;
    becomes(&setup, Role::New, nothing, ("nothing_in", ""))?;
    sh(lab.old_server(), &["tc filter del dev eth0 ingress pref 1"])?;

    // All is mended, and clients come back.
    let _started = [service(NEW, 81)?, service(NEW, 82)?];
    let _dns = UdpService::start(new, at(NEW, 53))?;
    sh(new, &["nft delete table inet f"])?;
    for port in [81, 82, 83] {
        lab.client().get(at(MOVED, port))?;
    }
    for role in BOTH {
        first_line_becomes(&setup, role, |line| line.ends_with(": up"))?;
        let warnings = setup.status(role)?.0["warnings"].to_string();
        assert!(!warnings.contains("is not answered"), "{warnings}");
    }

    // Answers that cannot leave, and packets that reverse path filtering drops.
    sh(
        new,
        &[
            "ip route add blackhole default table 100",
            "ip rule add to 203.0.113.11 lookup 100",
            "ip link add d0 type veth peer name d1",
            "ip link set d0 up",
            "ip link set d1 up",
            "ip route add default dev d0 table 101",
            "ip rule add ipproto tcp sport 85 lookup 101",
        ],
    )?;
    ask(&lab, &[85])?;
    let _ = lab
        .second_client()
        .probe_tcp(at(MOVED, 84), Duration::from_millis(3_500))?;
    becomes(
        &setup,
        Role::New,
        "192.0.2.5:84/tcp",
        ("silent", "no_route"),
    )?;
    becomes(
        &setup,
        Role::New,
        "192.0.2.5:85/tcp",
        ("silent", "rp_filter"),
    )?;
    becomes(
        &setup,
        Role::Old,
        "192.0.2.5:85/tcp",
        ("silent", "new_server"),
    )?;

    // The link between the servers is cut.
    sh(lab.router(), &["ip link set new down"])?;
    for role in BOTH {
        first_line_becomes(&setup, role, |line| {
            line.contains("nothing was heard of it for")
        })?;
    }
    Ok(())
}

#[test]
fn a_protocol_that_need_not_answer_and_a_scan_are_no_fault() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let new = lab.new_server();
    sh(
        new,
        &[
            "nft add table inet f",
            "nft 'add chain inet f i { type filter hook input priority 0; policy drop; }'",
            "nft add rule inet f i udp dport '{ 514, 51820-51860 }' accept",
            "nft add rule inet f i tcp dport 80 accept",
        ],
    )?;
    let _service = Service::start(new, NEW)?;
    let _daemons = setup.start_both()?;
    lab.client().get(MOVED)?.is_answered_by(NEW)?;
    let scan: Vec<u16> = (1000..1020).collect();
    ask(&lab, &scan)?;
    let socket = lab.client().udp_socket(at(MOVED, 9999))?;
    for _ in 0..45 {
        let _ = socket.send(b"one way");
        std::thread::sleep(Duration::from_millis(100));
    }
    lab.client().get(MOVED)?;
    for role in BOTH {
        let status = setup.status(role)?;
        let warnings = status.0["warnings"].to_string();
        assert!(!warnings.contains("is not answered"), "{warnings}");
        let line = first_line(&setup, role)?;
        assert!(!line.contains("but"), "{line}");
        let served = status.tunnel()["served"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let one = |what: &str| served.iter().find(|it| it["what"] == what).cloned();
        let udp = one("192.0.2.5:9999/udp").unwrap_or_default();
        assert_eq!(
            (&udp["state"], &udp["in"]),
            (&"unanswered".into(), &1.into())
        );
        let http = one("192.0.2.5:80/tcp").unwrap_or_default();
        assert_eq!(
            (&http["state"], &http["answered"]),
            (&"ok".into(), &http["in"])
        );
    }
    Ok(())
}

/// What clients ask for before anybody is there to answer, and what the daemon itself turns away.
#[test]
fn what_nobody_serves_yet_and_what_is_turned_away_is_named_on_both_servers() -> Result {
    let lab = Lab::new()?;
    let v6 = format!("[{MOVED6}]:80/tcp");
    let moves = [
        "192.0.2.5:80/tcp",
        "192.0.2.5:53/udp",
        "192.0.2.5:81/tcp",
        &v6,
    ];
    let setup = setup(&lab)?.moves(&moves);
    let accept = ["--accept", moves[0], "--accept", moves[1], "--accept", &v6];
    let setup = setup.args(Role::New, &accept);
    // The second client lies in a network of the new server's own.
    lab.add_link(
        lab.new_server(),
        "eth1",
        &[("203.0.113.12".parse().unwrap(), 30)],
    )?;
    let _daemons = setup.start_both()?;
    let says = "nothing listens on 198.51.100.2:80 yet";
    for role in BOTH {
        first_line_becomes(&setup, role, |line| {
            line.contains(": up; nothing has come for ") && line.contains("nothing listens on ")
        })?;
        becomes(&setup, role, moves[0], ("nothing_in", "nothing_listens"))?;
        becomes(&setup, role, moves[1], ("nothing_in", "nothing_listens"))?;
        becomes(&setup, role, &v6, ("nothing_in", "nothing_listens"))?;
        let text = setup.run(role, &["status"])?.stdout;
        assert!(text.contains(says), "{text}");
        let warnings = setup.status(role)?.0["warnings"].to_string();
        assert!(!warnings.contains("nothing listens"), "{warnings}");
    }
    let _application = [
        Service::start(lab.new_server(), NEW)?,
        Service::start(lab.new_server(), NEW6)?,
    ];
    let _dns = UdpService::start(lab.new_server(), at(NEW, 53))?;
    first_line_becomes(&setup, Role::Old, |line| line.ends_with(": up"))?;
    first_line_becomes(&setup, Role::New, |line| {
        line.ends_with(": up, but 192.0.2.5:81/tcp is not accepted")
    })?;

    // What is not accepted, and whom this server does not let come in.
    ask(&lab, &[81])?;
    sh(
        lab.clients(),
        &[
            "ip addr add 203.0.113.13/24 dev eth0",
            "socat -u EXEC:'sleep 8' TCP:192.0.2.5:80,bind=203.0.113.13 >/dev/null 2>&1 & ",
            "((for n in 1 2 3; do echo $n; sleep 1; done) | socat - \
              UDP:192.0.2.5:53,bind=203.0.113.13 >/dev/null 2>&1) & ",
        ],
    )?;
    for (what, cause, remedy) in [
        (moves[2], "not_accepted", "--accept 192.0.2.5:81/tcp"),
        (moves[0], "refused_source", "--clients-from 203.0.113.12/30"),
        (moves[1], "refused_source", "--clients-from 203.0.113.12/30"),
    ] {
        for role in BOTH {
            becomes(&setup, role, what, ("silent", cause))?;
            let text = setup.run(role, &["status"])?.stdout;
            assert!(text.contains(remedy), "{role} {remedy}: {text}");
            let warnings = setup.status(role)?.0["warnings"].to_string();
            assert!(!warnings.contains("lost"), "{warnings}");
        }
    }
    lab.client().get(at(MOVED, 80))?;
    for role in BOTH {
        state_becomes(&setup, role, moves[0], "ok")?;
    }
    Ok(())
}

/// Marks, routes, filters and firewalls that keep answers, or packets behind a DNAT.
#[test]
fn what_takes_the_answers_is_named() -> Result {
    if !has("iptables-legacy") {
        return Ok(());
    }
    let lab = Lab::builder().without_rp_filter().build()?;
    let moves: Vec<String> = (84..=89)
        .map(|port| format!("{MOVED}:{port}/tcp"))
        .chain([format!("[{MOVED6}]:87/tcp")])
        .collect();
    let moves: Vec<&str> = moves.iter().map(String::as_str).collect();
    let setup = setup(&lab)?.moves(&moves);
    let setup = setup.args(Role::New, &["--uplink", "eth0"]);
    let new = lab.new_server();
    let addr = |text: &str| text.parse::<std::net::IpAddr>();
    let (behind, gateway) = (addr("172.17.0.2").unwrap(), addr("172.17.0.1").unwrap());
    let container = lab.add_behind(new, ("br0", "veth0"), &[(behind, 16)], &[(gateway, 16)])?;
    let _inside = Service::start(&container, (behind, 88))?;
    let service = |addr: std::net::IpAddr, port| Service::start(new, at(addr, port));
    let _outside = [84, 85, 86, 87, 89].map(|port| service(NEW.into(), port));
    let _of_v6 = service(NEW6.into(), 87)?;
    let _daemons = setup.start_both()?;
    sh(
        new,
        &[
            "sysctl -qw net.ipv4.ip_forward=1",
            "nft add table ip f",
            "nft 'add chain ip f fw { type filter hook forward priority 0; policy drop; }'",
            "nft 'add chain ip f pre { type nat hook prerouting priority -100; }'",
            "nft add rule ip f pre tcp dport 88 dnat to 172.17.0.2",
            // The answers of 84 are dropped in output, those of 86 taken by a filter of tc.
            "nft 'add chain ip f out { type filter hook output priority 0; }'",
            "nft add rule ip f out tcp sport 84 drop",
            "tc filter add dev eth0 egress pref 1 protocol ip u32 match ip protocol 6 0xff \
             match ip sport 86 0xffff flowid 1:1",
            // Those of 87 get a mark that leads nowhere.
            "nft add table inet m",
            "nft 'add chain inet m out { type route hook output priority -150; }'",
            "nft add rule inet m out tcp sport 87 meta mark set 7",
            "ip rule add fwmark 7 lookup 107",
            "ip -6 rule add fwmark 7 lookup 107",
            "ip route add blackhole default table 107",
            "ip -6 route add unreachable default table 107",
            // Those of 85 leave by another link.
            "ip link add d0 type veth peer name d1",
            "ip link set d0 up",
            "ip link set d1 up",
            "ip route add default dev d0 table 105",
            "ip rule add ipproto tcp sport 85 lookup 105",
            "iptables-legacy -A OUTPUT -p tcp --sport 89 -j DROP",
        ],
    )?;
    ask(&lab, &[84, 85, 86, 87, 88, 89])?;
    ask_at(&lab, MOVED6.into(), &[87])?;
    let v6 = format!("[{MOVED6}]:87/tcp");
    for (what, first, also) in [
        ("192.0.2.5:84/tcp", "firewall", "firewall"),
        ("192.0.2.5:85/tcp", "route_elsewhere", "route_elsewhere"),
        ("192.0.2.5:86/tcp", "filter_before", "firewall"),
        ("192.0.2.5:87/tcp", "rule", "firewall"),
        (&v6, "rule", "firewall"),
        ("192.0.2.5:88/tcp", "nothing_listens", "firewall"),
        ("192.0.2.5:89/tcp", "firewall", "firewall"),
    ] {
        state_becomes(&setup, Role::New, what, "silent")?;
        for cause in [first, also] {
            let has = poll_until(SECONDS, PAUSE, || {
                has_cause(&setup, Role::New, what, cause)
                    .ok()?
                    .then_some(())
            });
            let found = state(&setup, Role::New, what)?;
            assert!(has.is_some(), "{what}: {found:?}, not {cause}");
        }
        // Four are told with their causes.
        state_becomes(&setup, Role::Old, what, "silent")?;
    }
    let text = setup.run(Role::New, &["status"])?.stdout;
    for part in [
        "chain ip f fw (policy drop)",
        "chain ip f out (1 rule that drops)",
        "chain iptables-legacy filter OUTPUT (1 rule that drops)",
        "iptables-legacy-save -c",
        "the mark 0x7 (ip rule 3276",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    Ok(())
}

/// One of two: the other one still carries the tunnel.
#[test]
fn a_delivery_address_that_is_gone_is_named() -> Result {
    let lab = Lab::new()?;
    let new = lab.new_server();
    sh(new, &["ip addr add 198.51.100.7/24 dev eth0"])?;
    let setup = setup(&lab)?.moves(&["192.0.2.5:80/tcp"]);
    let setup = setup.args(Role::New, &["--deliver-to", "198.51.100.7"]);
    let _daemons = setup.start_both()?;
    let delivered: std::net::IpAddr = "198.51.100.7".parse().unwrap();
    let served = Service::start(new, at(delivered, 80))?;
    lab.client().get(at(MOVED, 80))?.is_answered_by(delivered)?;
    sh(new, &["ip addr del 198.51.100.7/24 dev eth0"])?;
    ask(&lab, &[80])?;
    becomes(
        &setup,
        Role::New,
        "192.0.2.5:80/tcp",
        ("silent", "not_here"),
    )?;
    sh(new, &["ip addr add 198.51.100.7/24 dev eth0"])?;
    lab.client().get(at(MOVED, 80))?.is_answered_by(delivered)?;
    drop(served);
    Ok(())
}

/// The new server answers, and the old one cannot send it on; and nothing can come any more.
#[test]
fn what_does_not_leave_or_reach_the_old_server_is_named() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.moves(&["192.0.2.5:80/tcp", "[2001:db8:a::5]:80/tcp"]);
    let new = lab.new_server();
    let _served = [
        Service::start(new, at(NEW, 80))?,
        Service::start(new, at(NEW6, 80))?,
    ];
    let _daemons = setup.start_both()?;
    let old = lab.old_server();
    for (moved, what, by, network) in [
        (MOVED.into(), "192.0.2.5:80/tcp", "ip", "203.0.113.0/24"),
        (
            std::net::IpAddr::from(MOVED6),
            "[2001:db8:a::5]:80/tcp",
            "ip -6",
            "2001:db8:c::/64",
        ),
    ] {
        lab.client().get(moved)?.for_the_client_itself()?;
        sh(old, &[&format!("{by} route add unreachable {network}")])?;
        let probe = lab.client().probe_tcp((moved, 80), PAUSE)?;
        assert_eq!(probe, Probe::Silent);
        becomes(&setup, Role::Old, what, ("silent", "no_route"))?;
        becomes(&setup, Role::New, what, ("silent", "old_server"))?;
        sh(old, &[&format!("{by} route del unreachable {network}")])?;
        state_becomes(&setup, Role::Old, what, "ok")?;
        state_becomes(&setup, Role::New, what, "ok")?;
        lab.client().get(moved)?.for_the_client_itself()?;
    }
    let says = |lost: bool| {
        let said = poll_until(SECONDS, PAUSE, || {
            let warnings = setup.status(Role::Old).ok()?.0["warnings"].to_string();
            (warnings.contains("no longer configured on this server: 192.0.2.5") == lost)
                .then_some(())
        });
        said.ok_or_else(|| LabError::unexpected(format!("lost: {lost}")))
    };
    says(false)?;
    lab.set_address(old, "eth0", MOVED, 24, false)?;
    says(true)?;
    lab.set_address(old, "eth0", MOVED, 24, true)?;
    says(false)
}
