//! Which way replies leave an old server with several ways out: its routing rules say, whatever
//! they go by.
//!
//! ```text
//!                     ┌─ wan1: its default route, and a dead end
//!  client ── router ──┤
//!                     └─ eth0 ── old server ═══ new server
//!                        holds 192.0.2.5; table 102 leads out here
//! ```

use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use ipmoved::internals::Role;
use ipmoved::lab::daemon::COMMAND_TIMEOUT;
use ipmoved::lab::topology::{MOVED, MOVED6, NEW, NEW6};
use ipmoved::lab::{Client, DaemonSetup, Lab, LabError, Probe, Service, UdpService, poll_until};

use crate::behind_dnat::shell;
use crate::stage::{FAMILIES, PATIENCE, Result, SILENCE, setup, warnings};

/// A port of the UDP service.
const DNS: u16 = 53;

/// Two ways out, of which the default route takes the wrong one.
const TWO_WAYS: &str = "
    ip link add wan1 type bridge
    ip addr add 10.99.0.1/24 dev wan1
    ip addr add fd00:99::1/64 dev wan1 nodad
    ip link set wan1 up
    ip neigh add 10.99.0.254 lladdr 02:00:00:00:00:fe dev wan1
    ip neigh add fd00:99::fe lladdr 02:00:00:00:00:fe dev wan1
    ip route add 198.51.100.0/24 via 192.0.2.254
    ip -6 route add 2001:db8:b::/64 via 2001:db8:a::fe
    ip route del default
    ip -6 route del default
    ip route add default via 10.99.0.254
    ip -6 route add default via fd00:99::fe
    ip route add default via 10.99.0.254 table 101
    ip -6 route add default via fd00:99::fe table 101
    ip route add default via 192.0.2.254 table 102
    ip -6 route add default via 2001:db8:a::fe table 102";

/// Rules by which replies find their way, those of IPv4 and of IPv6.
const RULES: [(&str, &[&str], &[&str]); 8] = [
    (
        "what this host sends, by source",
        &["iif lo from 192.0.2.5 lookup 102"],
        &["iif lo from 2001:db8:a::5 lookup 102"],
    ),
    (
        "what this host sends, by destination",
        &["iif lo to 203.0.113.0/24 lookup 102"],
        &["iif lo to 2001:db8:c::/64 lookup 102"],
    ),
    (
        "what this host sends, but for its networks",
        &[
            "iif lo lookup main suppress_prefixlength 0",
            "iif lo lookup 102",
        ],
        &[
            "iif lo lookup main suppress_prefixlength 0",
            "iif lo lookup 102",
        ],
    ),
    (
        "ports of the service",
        &[
            "ipproto tcp sport 80 lookup 102",
            "ipproto udp sport 53 lookup 102",
        ],
        &[
            "ipproto tcp sport 80 lookup 102",
            "ipproto udp sport 53 lookup 102",
        ],
    ),
    (
        "ports of clients",
        &[
            "ipproto tcp dport 1024-65534 lookup 102",
            "ipproto udp dport 1024-65534 lookup 102",
        ],
        &[
            "ipproto tcp dport 1024-65534 lookup 102",
            "ipproto udp dport 1024-65534 lookup 102",
        ],
    ),
    (
        "protocols, of what this host sends",
        &[
            "iif lo ipproto tcp lookup 102",
            "iif lo ipproto udp lookup 102",
        ],
        &[
            "iif lo ipproto tcp lookup 102",
            "iif lo ipproto udp lookup 102",
        ],
    ),
    (
        "a mark for each way",
        &["fwmark 1 lookup 101", "fwmark 2 lookup 102"],
        &["fwmark 1 lookup 101", "fwmark 2 lookup 102"],
    ),
    (
        "mwan3's bits",
        &[
            "fwmark 0x100/0x3f00 lookup 101",
            "fwmark 0x200/0x3f00 lookup 102",
        ],
        &[
            "fwmark 0x100/0x3f00 lookup 101",
            "fwmark 0x200/0x3f00 lookup 102",
        ],
    ),
];

/// Both families have moved from an old server with two ways out.
fn with_two_ways(test: impl FnOnce(&Lab, &DaemonSetup<'_>) -> Result) -> Result {
    let lab = Lab::builder().without_rp_filter().build()?;
    shell(lab.old_server(), TWO_WAYS)?;
    let setup = setup(&lab)?.moves(&FAMILIES);
    let _services = [
        Service::start(lab.new_server(), NEW)?,
        Service::start(lab.new_server(), NEW6)?,
    ];
    let udp = |addr: IpAddr| UdpService::start(lab.new_server(), SocketAddr::new(addr, DNS));
    let _udp_services = [udp(NEW.into())?, udp(NEW6.into())?];
    let _daemons = setup.start_both()?;
    test(&lab, &setup)
}

/// Types rules of both families, with preferences from 100 on; or takes them away.
fn type_rules(lab: &Lab, action: &str, (v4, v6): (&[&str], &[&str])) -> Result {
    for (ip, rules) in [("ip", v4), ("ip -6", v6)] {
        for (pref, rule) in (100..).zip(rules) {
            let line = format!("{ip} rule {action} pref {pref} {rule}");
            shell(lab.old_server(), &line)?;
        }
    }
    Ok(())
}

/// Clients get answers from there, by UDP and TCP, as soon as the daemon has looked.
fn is_served(lab: &Lab, addr: IpAddr) -> Result {
    let server = if addr.is_ipv4() {
        NEW.into()
    } else {
        IpAddr::from(NEW6)
    };
    let patience = Duration::from_millis(200);
    let answered = poll_until(PATIENCE, Duration::from_millis(20), || {
        let probe = lab.client().probe_udp((addr, DNS), patience).ok()?;
        (probe == Probe::Open).then_some(())
    });
    answered.ok_or_else(|| LabError::unexpected(format!("UDP to {addr} is not answered")))?;
    lab.client().get(addr)?.is_answered_by(server).map(drop)
}

#[test]
fn replies_leave_by_the_way_that_the_rules_have_for_them() -> Result {
    let [inside, inside6]: [IpAddr; 2] = [[10, 5, 0, 2].into(), "fd00:5::2".parse().map_err(bad)?];
    let [gateway, gateway6]: [IpAddr; 2] =
        [[10, 5, 0, 1].into(), "fd00:5::1".parse().map_err(bad)?];
    with_two_ways(|lab, setup| {
        let behind = lab.add_behind(
            lab.old_server(),
            ("br9", "port9"),
            &[(inside, 24), (inside6, 64)],
            &[(gateway, 24), (gateway6, 64)],
        )?;
        let lost = lab.client().probe_udp((MOVED, DNS), SILENCE)?;
        assert_eq!(lost, Probe::Silent, "the default route leads somewhere");
        for (name, v4, v6) in RULES {
            let told = |error: LabError| LabError::unexpected(format!("{name}: {error}"));
            type_rules(lab, "add", (v4, v6))?;
            for addr in [IpAddr::from(MOVED), MOVED6.into()] {
                is_served(lab, addr).map_err(told)?;
            }
            // Its own network has no mark.
            let by_mark = v4[0].starts_with("fwmark");
            if let (IpAddr::V4(v4), IpAddr::V6(v6), true) = (inside, inside6, by_mark) {
                let beside = Client::new(&behind, v4, v6);
                for addr in [IpAddr::from(MOVED), MOVED6.into()] {
                    let probe = beside.probe_udp((addr, DNS), PATIENCE)?;
                    assert_eq!(probe, Probe::Open, "{name}: not in its own network");
                }
            }
            assert_eq!(warnings(setup, Role::Old)?, [""; 0], "{name}");
            type_rules(lab, "del", (v4, v6))?;
        }
        let lost = lab.client().probe_udp((MOVED, DNS), SILENCE)?;
        assert_eq!(lost, Probe::Silent, "the rules are gone");
        Ok(())
    })
}

fn bad(error: std::net::AddrParseError) -> LabError {
    LabError::unexpected(error.to_string())
}

/// The one warning about ways that the old server shows, as soon as it does.
fn warning_of_ways(setup: &DaemonSetup<'_>) -> Result<String> {
    let shown = poll_until(PATIENCE, Duration::from_millis(50), || {
        let all = warnings(setup, Role::Old).ok()?;
        all.into_iter()
            .find(|line| line.starts_with("replies may leave"))
    });
    shown.ok_or_else(|| LabError::unexpected("no warning"))
}

/// What `check` says on the old server.
fn checked(setup: &DaemonSetup<'_>, mut command: Command) -> Result<String> {
    command.arg("check").args(setup.daemon_args(Role::Old));
    let said = setup.host(Role::Old).output(command, COMMAND_TIMEOUT)?;
    Ok(said.stdout)
}

/// What it says to do helps, and it is withdrawn.
fn remedy_helps(lab: &Lab, setup: &DaemonSetup<'_>, warning: &str, addr: IpAddr) -> Result {
    let remedy = warning.rsplit_once(": ").map(|(_, remedy)| remedy);
    shell(lab.old_server(), remedy.unwrap_or_default())?;
    is_served(lab, addr)?;
    let withdrawn = poll_until(PATIENCE, Duration::from_millis(50), || {
        warnings(setup, Role::Old).ok()?.is_empty().then_some(())
    });
    withdrawn.ok_or_else(|| LabError::unexpected("the warning stays"))
}

#[test]
fn where_a_mark_may_mean_several_ways_or_none_it_is_said_what_to_do() -> Result {
    with_two_ways(|lab, setup| {
        let old = lab.old_server();
        shell(
            old,
            "ip route add default via 192.0.2.253 table 103
            ip rule add pref 100 fwmark 2 lookup 102
            ip rule add pref 101 fwmark 3 lookup 103",
        )?;
        let warning = warning_of_ways(setup)?;
        assert!(
            warning.contains("192.0.2.5 would answer by another"),
            "{warning}"
        );
        assert!(warning.contains("`ip rule` 100 (fwmark 0x2)"), "{warning}");
        let check = setup.command();
        let said = checked(setup, check)?;
        assert!(
            said.contains("192.0.2.5: would answer by another"),
            "{said}"
        );
        remedy_helps(lab, setup, &warning, MOVED.into())
    })?;
    // An address that is on no way, and is routed here.
    let lab = Lab::builder().without_rp_filter().build()?;
    shell(lab.old_server(), TWO_WAYS)?;
    shell(lab.router(), "ip route add 198.18.77.5 via 192.0.2.1")?;
    let addr: IpAddr = "198.18.77.5".parse().map_err(bad)?;
    lab.add_deaf(lab.old_server(), "deaf0", addr)?;
    shell(
        lab.old_server(),
        "ip rule add pref 90 not fwmark 51820 lookup main suppress_prefixlength 0
        ip rule add pref 91 fwmark 0x80000/0xff0000 lookup main",
    )?;
    let setup = setup(&lab)?.moves(&["198.18.77.5", "192.0.2.5"]);
    let udp = SocketAddr::new(NEW.into(), DNS);
    let _services = (
        Service::start(lab.new_server(), NEW)?,
        UdpService::start(lab.new_server(), udp)?,
    );
    let _daemons = setup.start_both()?;
    // A look is over once it shows that another address is gone.
    shell(lab.old_server(), "ip addr del 192.0.2.5/24 dev eth0")?;
    let shown = poll_until(PATIENCE, Duration::from_millis(50), || {
        let all = warnings(&setup, Role::Old).ok()?;
        (!all.is_empty()).then_some(all)
    });
    let shown = shown.unwrap_or_default();
    let [lost] = shown.as_slice() else {
        let text = format!("a VPN's rules are no reason: {shown:?}");
        return Err(LabError::unexpected(text));
    };
    assert!(lost.starts_with("no longer configured"), "{lost}");
    shell(
        lab.old_server(),
        "ip addr add 192.0.2.5/24 dev eth0
        ip rule add pref 100 fwmark 2 lookup 102",
    )?;
    let warning = warning_of_ways(&setup)?;
    assert!(
        warning.contains("198.18.77.5 is on no interface"),
        "{warning}"
    );
    assert!(warning.contains("leads out by eth0"), "{warning}");
    remedy_helps(&lab, &setup, &warning, addr)
}
