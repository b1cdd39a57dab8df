//! What other programs do to rules, routes, marks and addresses of the servers.
//!
//! ```text
//!  client ── router ──┬── old server ✝: systemd-networkd, keepalived
//!                     └── new server ✝: marks, firewalls, systemd-networkd, a bound socket
//! ```

use std::fs;
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use ipmoved::internals::Role;
use ipmoved::lab::topology::{CLIENT, CLIENT6, MOVED, MOVED6, NEW, NEW6};
use ipmoved::lab::{Lab, LabError, Namespace, Process, Service, patience, poll_until};
use rustix::process::Signal;
use socket2::{Domain, Socket, Type};

use crate::behind_dnat::{Talks, has, killed, nothing_leaks, shell};
use crate::stage::{FAMILIES, PATIENCE, Result, setup};

/// Both families: where the client is, what it asks, and where the application is.
fn ends() -> [[IpAddr; 3]; 2] {
    [
        [CLIENT.into(), MOVED.into(), NEW.into()],
        [CLIENT6.into(), MOVED6.into(), NEW6.into()],
    ]
}

/// Rules that a new server has, and what removes them. Each family has its own routes.
fn marks() -> Vec<(&'static str, String, &'static str)> {
    let nft = |rules: &str| format!("nft -f - <<RULES\n{rules}\nRULES\n");
    let restore = |mask: &str| {
        nft(&format!(
            "table inet marks {{
                chain prerouting {{
                    type filter hook prerouting priority mangle;
                    meta mark set ct mark & {mask}
                }}
                chain output {{
                    type route hook output priority mangle;
                    meta mark set ct mark & {mask}
                }}
            }}"
        ))
    };
    // What came by the uplink is answered by another one, but for the tunnel itself.
    let multi_wan = nft("table inet marks {
            chain prerouting {
                type filter hook prerouting priority mangle;
                udp dport 51850 return
                ct mark != 0 meta mark set ct mark
                iifname eth0 meta mark 0 meta mark set 0x100
                ct mark set meta mark
            }
            chain output {
                type route hook output priority mangle;
                udp sport 51850 return
                meta mark set ct mark
            }
        }")
        + "ip link add wan1 type bridge
            ip addr add 10.99.0.1/24 dev wan1
            ip addr add fd00:99::1/64 dev wan1 nodad
            ip link set wan1 up
            ip neigh add 10.99.0.254 lladdr 02:00:00:00:00:fe dev wan1
            ip neigh add fd00:99::fe lladdr 02:00:00:00:00:fe dev wan1
            ip route add default via 10.99.0.254 table 100
            ip -6 route add default via fd00:99::fe table 100
            ip rule add pref 50 fwmark 0x100/0x3f00 lookup 100
            ip -6 rule add pref 50 fwmark 0x100/0x3f00 lookup 100";
    // Every packet of another mark goes into a VPN.
    let full_tunnel = "ip link add wg0 type bridge
            ip addr add 10.98.0.2/24 dev wg0
            ip addr add fd00:98::2/64 dev wg0 nodad
            ip link set wg0 arp off up
            ip route add default dev wg0 table 51820
            ip -6 route add default dev wg0 table 51820
            ip rule add pref 32764 not fwmark 51820 lookup 51820
            ip -6 rule add pref 32764 not fwmark 51820 lookup 51820
            ip rule add pref 32763 lookup main suppress_prefixlength 0
            ip -6 rule add pref 32763 lookup main suppress_prefixlength 0
            ip route add 192.0.2.0/24 via 198.51.100.254
            ip -6 route add 2001:db8:a::/64 via 2001:db8:b::fe
            echo 1 > /proc/sys/net/ipv4/conf/all/src_valid_mark"
        .to_owned();
    let no_marks = "nft delete table inet marks";
    vec![
        ("restored marks", restore("0xffffffff"), no_marks),
        ("mwan3's bits", restore("0x3f00"), no_marks),
        ("Tailscale's bits", restore("0x00ff0000"), no_marks),
        (
            "a multi-WAN recipe",
            multi_wan,
            "nft delete table inet marks
            ip rule del pref 50
            ip -6 rule del pref 50
            ip link del wan1",
        ),
        (
            "wg-quick for everything",
            full_tunnel,
            "ip rule del pref 32763
            ip -6 rule del pref 32763
            ip rule del pref 32764
            ip -6 rule del pref 32764
            ip route del 192.0.2.0/24
            ip -6 route del 2001:db8:a::/64
            ip link del wg0
            echo 0 > /proc/sys/net/ipv4/conf/all/src_valid_mark",
        ),
        // As squid, HAProxy, Istio and go-mmproxy have it.
        (
            "a transparent proxy's table",
            nft("table inet marks {
                chain prerouting {
                    type filter hook prerouting priority mangle;
                    tcp dport 3129 meta mark set 1
                }
            }") + "ip rule add pref 50 fwmark 1 lookup 100
            ip -6 rule add pref 50 fwmark 1 lookup 100
            ip route add local default dev lo table 100
            ip -6 route add local default dev lo table 100",
            "nft delete table inet marks
            ip rule del pref 50
            ip -6 rule del pref 50
            ip route del local default dev lo table 100
            ip -6 route del local default dev lo table 100",
        ),
        (
            "kube-proxy's bits",
            nft("table inet marks {
                chain masq { meta mark set meta mark | 0x4000; }
                chain prerouting {
                    type filter hook prerouting priority mangle;
                    iifname eth0 ct state new jump masq
                }
                chain postrouting {
                    type nat hook postrouting priority srcnat;
                    meta mark & 0x4000 == 0 return
                    meta mark set meta mark ^ 0x4000
                    masquerade
                }
                chain input {
                    type filter hook input priority filter;
                    ct state invalid drop
                }
            }"),
            no_marks,
        ),
        // firewalld 1.3 and 2: strict reverse path filtering for IPv6, here for IPv4 too, and what
        // it lets in.
        (
            "firewalld's rules",
            nft("table inet marks {
                chain prerouting {
                    type filter hook prerouting priority mangle + 10;
                    icmpv6 type { nd-router-advert, nd-neighbor-solicit } accept
                    fib saddr . mark . iif oif missing drop
                    fib saddr . iif oif missing drop
                }
                chain input {
                    type filter hook input priority filter + 10;
                    ct state { established, related } accept
                    ct state invalid drop
                    iifname lo accept
                    iifname eth0 tcp dport 80 accept
                    iifname eth0 udp dport { 53, 51850 } accept
                    iifname eth0 meta l4proto { 50, icmp, ipv6-icmp } accept
                    reject with icmpx admin-prohibited
                }
                chain output {
                    type filter hook output priority filter + 10;
                    ct state { established, related } accept
                    oifname lo accept
                    ip6 daddr { ::/96, ::ffff:0.0.0.0/96 } reject
                }
            }"),
            no_marks,
        ),
    ]
}

/// The words of answers; see [`nothing_leaks`].
const ANSWER: &[u8] = b"an answer of the application";

#[test]
fn no_mark_rule_or_firewall_diverts_an_answer() -> Result {
    if !has("nft") {
        return Ok(());
    }
    let lab = Lab::builder().without_rp_filter().build()?;
    let setup = setup(&lab)?.moves(&FAMILIES);
    let mut daemons = setup.start_both()?;
    let new = lab.new_server();
    for (number, (name, make, remove)) in marks().into_iter().enumerate() {
        // 0, 1, 2, 0, …
        let rp_filter = (number % 3).to_string();
        new.set_sysctls(&[("ipv4/conf/all/rp_filter", &rp_filter)])?;
        let told = |error: LabError| LabError::unexpected(format!("{name}: {error}"));
        // What was begun before the rules came, and what comes after them.
        let mut all = Vec::new();
        for ends in ends() {
            all.push(Talks::begin(&lab, new, ends).map_err(told)?);
        }
        shell(new, &make)?;
        nothing_leaks(&lab, || {
            for talks in &mut all {
                talks.push(ANSWER)?;
                talks.ask(b"under the rules")?;
                talks.push(ANSWER)?;
            }
            killed(&mut daemons.new)?;
            daemons.new = setup.start(Role::New)?;
            daemons.new.wait_until_up()?;
            for talks in &mut all {
                talks.push(ANSWER)?;
                talks.ask(b"after a kill")?;
            }
            drop(all);
            for ends in ends() {
                let mut talks = Talks::begin(&lab, new, ends)?;
                talks.push(ANSWER)?;
            }
            Ok(())
        })
        .map_err(told)?;
        shell(new, remove)?;
    }
    Ok(())
}

/// A service that is bound to an interface, as `systemd` units and VRFs do (SO_BINDTODEVICE).
#[test]
fn a_service_that_is_bound_to_the_uplink_is_served() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.moves(&FAMILIES);
    let mut daemons = setup.start_both()?;
    let failed = |error: std::io::Error| LabError::unexpected(error.to_string());
    for [_, moved, at] in ends() {
        let bound = |kind: Type| {
            lab.new_server().run(|| {
                let at = SocketAddr::new(at, 80);
                let socket = Socket::new(Domain::for_address(at), kind, None).map_err(failed)?;
                socket.bind_device(Some(b"eth0")).map_err(failed)?;
                socket.bind(&at.into()).map_err(failed)?;
                socket
                    .set_read_timeout(Some(patience(PATIENCE)))
                    .map_err(failed)?;
                Ok(socket)
            })
        };
        let (listener, echo) = (bound(Type::STREAM)?, bound(Type::DGRAM)?);
        listener.listen(8).map_err(failed)?;
        let echo: std::net::UdpSocket = echo.into();
        for round in 0..2 {
            let near = lab.client().connect((moved, 80))?;
            let (far, _) = listener.accept().map_err(failed)?;
            let asking = lab.client().udp_socket((moved, 80))?;
            asking.send(b"?").map_err(failed)?;
            let (_, from) = echo.recv_from(&mut [0; 9]).map_err(failed)?;
            if round == 0 {
                daemons.new.kill()?;
                daemons.new = setup.start(Role::New)?;
                daemons.new.wait_until_up()?;
            }
            echo.send_to(b"!", from).map_err(failed)?;
            assert_eq!(asking.recv(&mut [0; 9]).map_err(failed)?, 1);
            let mut far: std::net::TcpStream = far.into();
            far.write_all(b"!").map_err(failed)?;
            let mut heard = [0];
            std::io::Read::read_exact(&mut &near, &mut heard).map_err(failed)?;
            assert_eq!(&heard, b"!");
        }
    }
    Ok(())
}

/// systemd-networkd, where Debian has it.
const NETWORKD: &str = "/usr/lib/systemd/systemd-networkd";

/// Starts a real systemd-networkd on a host, with directories of its own. It takes eth0 over as it
/// is.
fn networkd(
    host: &Namespace,
    dir: &Path,
    addresses: &[&str],
    gateways: [&str; 2],
) -> Result<Process> {
    let mut config = "[Match]\nName=eth0\n[Network]\n".to_owned();
    for address in addresses {
        config += &format!("Address={address}\n");
    }
    for gateway in gateways {
        config += &format!("Gateway={gateway}\n");
    }
    config += "IPv6AcceptRA=no\nLinkLocalAddressing=ipv6\nDHCP=no\n";
    let file = dir.join(format!("{}.network", host.name()));
    fs::write(&file, config).map_err(|error| LabError::unexpected(error.to_string()))?;
    let script = format!(
        "mount -t tmpfs none /run
        mkdir -p /run/systemd/netif/links /run/systemd/netif/leases /run/systemd/network /run/dbus
        mount -t tmpfs none /etc/systemd
        mkdir -p /etc/systemd/network
        chown -R systemd-network:systemd-network /run/systemd/netif
        cp '{}' /etc/systemd/network/10-eth0.network
        touch /run/systemd/container
        mount -o remount,ro /sys
        exec {NETWORKD}",
        file.display()
    );
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-ec", &script]);
    host.spawn(command)
}

/// It removes foreign rules and routes whenever it starts, on either server, and goes on serving.
#[test]
fn systemd_networkd_may_start_and_restart_on_either_server() -> Result {
    if !has(NETWORKD) || !has("unshare") {
        return Ok(());
    }
    let lab = Lab::new()?;
    let setup = setup(&lab)?.moves(&FAMILIES);
    let _daemons = setup.start_both()?;
    let mut all = Vec::new();
    for ends in ends() {
        all.push(Talks::begin(&lab, lab.new_server(), ends)?);
    }
    for round in 0..2 {
        let old = networkd(
            lab.old_server(),
            lab.dir(),
            &[
                "192.0.2.1/24",
                "192.0.2.5/24",
                "2001:db8:a::5/64",
                "192.0.2.77/32",
            ],
            ["192.0.2.254", "2001:db8:a::fe"],
        )?;
        let new = networkd(
            lab.new_server(),
            lab.dir(),
            &["198.51.100.2/24", "2001:db8:b::2/64", "198.51.100.77/32"],
            ["198.51.100.254", "2001:db8:b::fe"],
        )?;
        // Each has taken its interface over once it has given it what it did not have.
        let configured = poll_until(3 * PATIENCE, Duration::from_millis(50), || {
            let has = |host, addr| shell(host, &format!("ip addr | grep -q {addr}")).ok();
            has(lab.old_server(), "192.0.2.77").and(has(lab.new_server(), "198.51.100.77"))
        });
        if configured.is_none() {
            return Err(LabError::unexpected(format!(
                "networkd configures nothing: {}{}",
                old.stderr(),
                new.stderr()
            )));
        }
        nothing_leaks(&lab, || {
            for talks in &mut all {
                talks.push(ANSWER)?;
                talks.ask(format!("with networkd, round {round}").as_bytes())?;
                talks.push(ANSWER)?;
            }
            Ok(())
        })?;
        for process in [old, new] {
            process.signal(Signal::TERM)?;
            process.wait(PATIENCE)?;
        }
        shell(lab.old_server(), "ip addr del 192.0.2.77/32 dev eth0")?;
        shell(lab.new_server(), "ip addr del 198.51.100.77/32 dev eth0")?;
    }
    Ok(())
}

/// keepalived takes the moved address to an interface of its own (VRRP's virtual MAC address), and
/// gives it up again.
#[test]
fn keepalived_may_hold_the_moved_address_on_an_interface_of_its_own() -> Result {
    if !has("keepalived") {
        return Ok(());
    }
    let lab = Lab::builder().without_rp_filter().build()?;
    let old = lab.old_server();
    lab.set_address(old, "eth0", MOVED, 24, false)?;
    let setup = setup(&lab)?;
    let _service = Service::start(lab.new_server(), NEW)?;
    let _daemons = setup.start_both()?;
    let config = lab.dir().join("keepalived.conf");
    let text = "global_defs {
            vrrp_version 3
            vrrp_garp_master_delay 0
        }
        vrrp_instance moved {
            state MASTER
            interface eth0
            use_vmac
            vmac_xmit_base
            virtual_router_id 51
            priority 200
            advert_int 0.1
            virtual_ipaddress { 192.0.2.5/24 }
        }
";
    fs::write(&config, text).map_err(|error| LabError::unexpected(error.to_string()))?;
    let mut talk = None;
    for _ in 0..2 {
        let mut command = Command::new("keepalived");
        command.args(["-n", "-l", "-P", "-f"]).arg(&config);
        for (flag, file) in [("-p", "pid"), ("-r", "vrrp")] {
            command.arg(flag).arg(lab.dir().join(file));
        }
        let keepalived = old.spawn(command)?;
        let holds = poll_until(2 * PATIENCE, Duration::from_millis(50), || {
            shell(old, "ip addr show | grep -q 'inet 192.0.2.5/'").ok()
        });
        if holds.is_none() {
            let said = format!("{}{}", keepalived.stdout(), keepalived.stderr());
            return Err(LabError::unexpected(format!("no master: {said}")));
        }
        // The new interface is captured some milliseconds after it came.
        let answered = poll_until(PATIENCE, Duration::from_millis(50), || {
            lab.client().get(MOVED).ok()?.is_answered_by(NEW).ok()
        });
        if answered.is_none() {
            return Err(LabError::unexpected("not served"));
        }
        let talk = match &mut talk {
            Some(talk) => talk,
            none => none.insert(lab.client().converse(MOVED)?),
        };
        talk.exchange(b"while keepalived holds it", 2 * PATIENCE)?;
        keepalived.signal(Signal::TERM)?;
        keepalived.wait(PATIENCE)?;
    }
    Ok(())
}
