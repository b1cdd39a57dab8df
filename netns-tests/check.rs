//! `ipmoved check`: each line is made to fail on a real server, and mended by the command that it
//! shows.
//!
//! ```text
//!  old server  192.0.2.5 moves          new server  198.51.100.2
//!     what is asked ──► check              check ◄── what is asked
//!     daemon of the other side: runs       daemon of the other side: runs
//! ```
//!
//! What a peer says is in [`check_peer`](crate::check_peer).

use std::net::{IpAddr, SocketAddr};

use ipmoved::internals::Role;
use ipmoved::lab::topology::NEW;
use ipmoved::lab::{Lab, Service};

use crate::check_bench::{Bench, Case, case, find};
use crate::stage::{Result, setup};

/// What can be wrong on either server.
fn of_both() -> Vec<Case> {
    vec![
        case(
            "nft 'table inet f {
                chain own { udp dport 500 accept; }
                chain in { type filter hook input priority 0; policy drop;
                    ct state established,related accept; icmpv6 type != 0 accept; jump own; }
            }'",
            &[],
            (
                "firewall",
                "warn",
                "chain inet f in (policy) drops what comes from",
            ),
            "nft delete table inet f",
        ),
        case(
            "nft 'table inet firewalld {
                chain filter_IN { tcp dport 22 accept; }
                chain filter_INPUT { type filter hook input priority 10;
                    ct state { established, related } accept; iifname eth0 jump filter_IN;
                    reject with icmpx admin-prohibited; }
            }'",
            &[],
            (
                "firewall",
                "warn",
                "firewalld filter_INPUT rejects what comes",
            ),
            "nft delete table inet firewalld",
        ),
        case(
            "iptables -N ufw-before-input; iptables -N ufw-user-input
            iptables -A INPUT -j ufw-before-input
            iptables -A ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
            iptables -N ufw-not-local; iptables -A ufw-before-input -j ufw-not-local
            iptables -A ufw-not-local -m addrtype --dst-type LOCAL -j RETURN
            iptables -A ufw-not-local -m addrtype --dst-type MULTICAST -j RETURN
            iptables -A ufw-not-local -j DROP
            iptables -A ufw-before-input -j ufw-user-input; iptables -P INPUT DROP",
            &[],
            ("firewall", "warn", "INPUT (policy) drops what comes from"),
            "iptables -P INPUT ACCEPT; iptables -F; iptables -X",
        ),
        case(
            "iptables -A OUTPUT -p udp --dport 51850 -j DROP",
            &[],
            ("firewall", "warn", "OUTPUT drops what goes to the peer"),
            "iptables -F",
        ),
        case(
            "ip tuntap add ipmoved0 mode tun",
            &[],
            ("name", "fail", "exists already"),
            "ip link del ipmoved0",
        ),
        case(
            "socat -u UDP4-RECV:51850 /dev/null >/dev/null 2>&1 &
            echo $! > \"$(command -v ssh).pid\"
            until grep -q ':CA8A ' /proc/net/udp; do :; done",
            &[],
            ("port", "fail", "another program's"),
            "kill $(cat \"$(command -v ssh).pid\")",
        ),
        case(
            "ip link add d0 type bridge",
            &["--uplink", "d0"],
            ("uplink", "fail", "is down"),
            "ip link del d0",
        ),
        case(
            "",
            &["--uplink", "eth9"],
            ("uplink", "fail", "does not exist"),
            "",
        ),
        case(
            "",
            &["--listen", "192.0.2.99:51850"],
            ("port", "fail", "not an address"),
            "",
        ),
    ]
}

#[test]
fn what_is_wrong_on_the_old_server_is_found_and_mended_by_what_is_shown() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.accept_what_moves();
    let bench = Bench::new(setup.clone(), Role::Old)?;
    // Nothing listens there yet.
    let found = bench.check(&bench.line(&[]), &[])?;
    let alone = ("peer", "warn", "nothing listens on its UDP port");
    assert!(find(&found, alone).is_some(), "{found:#}");
    let _new = setup.start(Role::New)?;
    let ready = bench.poll(&bench.line(&[]), ("peer", "ok", "has the same key"))?;
    for well in [
        ("privileges", "ok", ""),
        ("tun", "ok", "can be made"),
        ("bpf", "ok", "load"),
        ("tc", "ok", "can be made"),
        ("accept", "ok", "accepts what moves"),
        ("clock", "ok", "the same time"),
        ("version", "ok", "as here"),
        ("mtu", "ok", "1500"),
    ] {
        assert!(find(&ready, well).is_some(), "{well:?}: {ready:#}");
    }
    assert_eq!(ready["result"], "ok", "{ready:#}");
    let mut cases = of_both();
    cases.extend([
        case(
            "ip link add wg0 type bridge; ip link set wg0 up
            ip route add default dev wg0 table 51820
            ip rule add pref 32764 not fwmark 51820 lookup 51820
            ip rule add pref 32763 lookup main suppress_prefixlength 0",
            &[],
            ("way", "warn", "by wg0, not by eth0"),
            "ip link del wg0; for it in 32764 32763 32762; do ip rule del pref $it; done",
        ),
        case(
            "ip addr del 192.0.2.5/24 dev eth0",
            &[],
            ("address", "warn", "is on no interface"),
            "ip addr add 192.0.2.5/24 dev eth0; ip addr del 192.0.2.5/32 dev eth0",
        ),
        case(
            "",
            &["--move", "2001:db8:a::5:80/tcp"],
            ("address", "warn", "stands in brackets, [2001:db8:a::5]:80"),
            "",
        ),
        case(
            "",
            &["--move", "192.0.2.1"],
            ("own", "fail", "your login included"),
            "",
        ),
        case(
            "",
            &["--move", "192.0.2.32/28"],
            ("address", "warn", "192.0.2.32/28"),
            "ip route del local 192.0.2.32/28 dev lo",
        ),
        case(
            "ip rule add pref 100 from 192.0.2.5 blackhole",
            &[],
            ("route", "fail", "192.0.2.5"),
            "ip rule del pref 100; ip rule del pref 99",
        ),
        case(
            "tc qdisc add dev eth0 ingress",
            &[],
            ("qdisc", "warn", "ingress qdisc of others"),
            "tc qdisc del dev eth0 clsact",
        ),
        case(
            "tc qdisc add dev eth0 clsact
            tc filter add dev eth0 ingress pref 1 protocol ip u32 match ip dport 86 0xffff \
             flowid 1:1",
            &[],
            ("filters", "warn", "pref 1"),
            "tc qdisc del dev eth0 clsact",
        ),
    ]);
    for case in &cases {
        bench.try_out(case)?;
    }
    for (case, remedy, prints) in [
        (
            case(
                "ip route del default",
                &[],
                ("way", "fail", "no route to it"),
                "ip route add default via 192.0.2.254",
            ),
            "ip route show table all",
            "192.0.2.0/24 dev eth0",
        ),
        (
            case(
                "ip route del default",
                &[],
                ("route", "fail", "no way to clients"),
                "ip route add default via 192.0.2.254",
            ),
            "ip route",
            "192.0.2.0/24 dev eth0",
        ),
        (
            case(
                "ip route change default via 192.0.2.254 mtu 1200",
                &[],
                ("mtu", "warn", "split over several"),
                "ip route change default via 192.0.2.254",
            ),
            "ping -c 3 -M do -s 1252 198.51.100.2",
            "1200",
        ),
    ] {
        bench.shows(&case, remedy, prints)?;
    }
    // A key that others can read.
    let psk = setup.psk_file(Role::Old).display();
    bench.sh(&format!("chmod 644 '{psk}'"))?;
    let open = ("settings", "warn", "open to other users");
    bench.try_out(&case("", &[], open, ""))?;
    // A cloud's public address, which is on no interface.
    bench.sh(
        "ip addr add 10.0.0.7/24 dev eth0; ip addr del 192.0.2.5/24 dev eth0
        ip addr del 192.0.2.1/24 dev eth0; ip route replace default via 10.0.0.254 dev eth0",
    )?;
    let cloud = Bench {
        setup: setup.clone().moves(&["203.0.113.77:80/tcp"]),
        role: Role::Old,
        bin: bench.bin.clone(),
    };
    cloud.try_out(&case(
        "",
        &[],
        ("nat", "warn", "packets come for 10.0.0.7"),
        "ip route del default; ip addr del 10.0.0.7/24 dev eth0
        ip addr add 192.0.2.1/24 dev eth0; ip addr add 192.0.2.5/24 dev eth0
        ip route add default via 192.0.2.254",
    ))?;
    // Where it is, and what that means, is told and is no fault.
    for (place, heals, says) in [
        (
            "ip addr change 192.0.2.5/24 dev eth0 valid_lft 900 preferred_lft 900",
            "ip addr change 192.0.2.5/24 dev eth0 valid_lft forever preferred_lft forever",
            "with a lease (DHCP",
        ),
        (
            "ip addr del 192.0.2.5/24 dev eth0
            ip link add br7 type bridge; ip addr add 192.0.2.5/32 dev br7",
            "ip link del br7; ip addr add 192.0.2.5/24 dev eth0",
            "a bridge without ports, where nothing arrives",
        ),
    ] {
        bench.sh(place)?;
        let found = bench.check(&bench.line(&[]), &[])?;
        assert!(find(&found, ("address", "ok", says)).is_some(), "{found:#}");
        bench.sh(heals)?;
    }
    // The login that one is sitting on.
    let by = |server: &'static str| [("SSH_CONNECTION", server)];
    let login = bench.check(&bench.line(&[]), &by("203.0.113.10 5000 192.0.2.5 22"))?;
    let warned = find(
        &login,
        ("login", "warn", "your login comes in by what moves"),
    );
    let warned = warned.expect("it is warned of");
    assert_eq!(warned["remedy"], "ssh 192.0.2.1");
    let login = bench.check(&bench.line(&[]), &by("203.0.113.10 5000 192.0.2.1 22"))?;
    assert_eq!(find(&login, ("login", "warn", "")), None);
    // What a killed daemon has left, and one that runs.
    let mut old = setup.start(Role::Old)?;
    old.wait_until_up()?;
    let found = bench.check(&bench.line(&[]), &[])?;
    assert_eq!(found["result"], "ok", "{found:#}");
    for known in [("daemon", "ok", "runs here"), ("tunnel", "ok", "is up")] {
        assert!(find(&found, known).is_some(), "{found:#}");
    }
    let status = setup.status(Role::New)?;
    assert_eq!(
        status.tunnel()["state"],
        "up",
        "the check has displaced nothing"
    );
    old.kill()?;
    bench.try_out(&case("", &[], ("left", "warn", "journal"), ""))
}

#[test]
fn what_the_system_refuses_is_found_and_mended_by_what_is_shown() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.accept_what_moves();
    let bench = Bench::new(setup.clone(), Role::Old)?;
    let _new = setup.start(Role::New)?;
    let ready = bench.poll(&bench.line(&[]), ("peer", "ok", "has the same key"))?;
    // A disk that cannot be written, and a system without TUN.
    let state = lab.dir().join("read-only").display().to_string();
    bench.sh(&format!("mkdir '{state}'"))?;
    let flags = ["--state-dir", &*state];
    let mounts = format!("mount -t tmpfs -o ro none {state}");
    let forgets = ("state", "warn", "cannot be written");
    let found = bench.apart(&mounts, &flags, "")?;
    let finding = find(&found, forgets).unwrap_or_else(|| panic!("{found:#}"));
    let remedy = finding["remedy"].as_str().unwrap_or_default();
    let found = bench.apart(&format!("{mounts}; eval \"$REMEDY\""), &flags, remedy)?;
    assert_eq!(find(&found, forgets), None, "{remedy}");
    let found = bench.apart("mount -t tmpfs none /dev/net", &[], "")?;
    let no_tun = ("tun", "fail", "no /dev/net/tun");
    let finding = find(&found, no_tun).unwrap_or_else(|| panic!("{found:#}"));
    let remedy = finding["remedy"].as_str().unwrap_or_default();
    let made = "mount -t tmpfs none /dev/net; eval \"$REMEDY\"";
    let found = bench.apart(made, &[], remedy)?;
    assert_eq!(find(&found, no_tun), None, "{remedy}");
    // A kernel of before everything was tried. No command makes it another one.
    let release = lab.dir().join("release").display().to_string();
    bench.sh(&format!("echo 5.4.0-150-generic > '{release}'"))?;
    let older = format!("mount --bind {release} /proc/sys/kernel/osrelease");
    let found = bench.apart(&older, &[], "")?;
    let old_kernel = ("kernel", "warn", "5.4.0-150-generic");
    assert!(find(&found, old_kernel).is_some(), "{found:#}");
    assert_eq!(find(&ready, ("kernel", "warn", "")), None, "{ready:#}");
    // Root in a container without privileges has them in there alone, and the kernel loads nothing
    // for it. The remedy is one that it is given them.
    let line = bench.line(&[]);
    let found = bench.check(&format!("unshare --user --map-root-user {line}"), &[])?;
    let refused = ("bpf", "fail", "root has not CAP_BPF");
    let finding = find(&found, refused).unwrap_or_else(|| panic!("{found:#}"));
    let remedy = finding["remedy"].as_str().unwrap_or_default();
    assert!(remedy.contains("--cap-add BPF"), "{remedy}");
    let given = "setpriv --bounding-set=-all,+net_admin,+bpf,+perfmon,+sys_admin";
    let found = bench.check(&format!("{given} {line}"), &[])?;
    assert!(find(&found, ("bpf", "ok", "")).is_some(), "{found:#}");
    // A start says the same, and ends.
    let args = setup.daemon_args(Role::Old).join("' '");
    let started = bench.shell(
        "unshare --user --map-root-user --net sh -c '
        ip link add eth0 type veth peer name e1; ip addr add 192.0.2.1/24 dev eth0
        ip link set e1 up; ip link set eth0 up; ip route add default via 192.0.2.254
        eval \"$START\"'",
        &[("START", &format!("ipmoved '{args}'"))],
    )?;
    assert_eq!(started.status.code(), Some(3), "{started:?}");
    assert!(
        started.stderr.contains("root has not CAP_BPF"),
        "{started:?}"
    );
    Ok(())
}

#[test]
fn what_is_wrong_on_the_new_server_is_found_and_mended_by_what_is_shown() -> Result {
    let lab = Lab::new()?;
    let web = ["--accept", "192.0.2.5:80/tcp"];
    let setup = setup(&lab)?
        .moves(&["192.0.2.5:80/tcp"])
        .args(Role::New, &web);
    let bench = Bench::new(setup.clone(), Role::New)?;
    let _old = setup.start(Role::Old)?;
    let nobody = ("listener", "warn", "nothing listens on 198.51.100.2:80");
    let found = bench.poll(&bench.line(&[]), ("peer", "ok", "has the same key"))?;
    assert!(find(&found, nobody).is_some(), "{found:#}");
    // A container is not meant, since nothing is forwarded.
    bench.try_out(&case(
        "",
        &[],
        ("forwarding", "warn", "ip_forward is 0"),
        "sysctl -qw net.ipv4.ip_forward=0",
    ))?;
    let at = |addr: IpAddr| SocketAddr::new(addr, 80);
    let on_lo = Service::start(lab.new_server(), at([127, 0, 0, 1].into()))?;
    let found = bench.check(&bench.line(&[]), &[])?;
    let on_lo_alone = ("listener", "warn", "listens on 127.0.0.1 alone");
    assert!(find(&found, on_lo_alone).is_some(), "{found:#}");
    drop(on_lo);
    bench.sh("socat TCP6-LISTEN:80,ipv6only=1 /dev/null >/dev/null 2>&1 &
        echo $! > \"$(command -v ssh).pid\"")?;
    let only_v6 = ("listener", "warn", "on [::] for IPv6 alone");
    bench.poll(&bench.line(&[]), only_v6)?;
    bench.sh("kill $(cat \"$(command -v ssh).pid\")")?;
    let _application = Service::start(lab.new_server(), at(NEW.into()))?;
    let found = bench.check(&bench.line(&[]), &[])?;
    assert_eq!(found["result"], "ok", "{found:#}");
    let mut cases = of_both();
    cases.extend([
        case(
            "nft 'table inet f {
                chain in { type filter hook input priority 0; tcp dport { 80, 443 } drop; }
            }'",
            &[],
            ("firewall", "warn", "clients of 198.51.100.2:80/tcp"),
            "nft delete table inet f",
        ),
        case(
            "ip6tables -P INPUT DROP; iptables-legacy -A INPUT -p tcp --syn --dport 80 -j REJECT",
            &[],
            ("firewall", "warn", "iptables-legacy filter INPUT rejects"),
            "ip6tables -P INPUT ACCEPT; iptables-legacy -F",
        ),
        // A container behind Docker's rules, and what is forwarded to it.
        case(
            "ip link add docker0 type bridge; ip addr add 172.17.0.1/16 dev docker0
            ip link set docker0 up; sysctl -qw net.ipv4.ip_forward=1
            iptables -t nat -N DOCKER; iptables -t nat -A PREROUTING -j DOCKER
            iptables -t nat -A DOCKER ! -i docker0 -p tcp --dport 80 -j DNAT --to 172.17.0.2:8080
            iptables -P FORWARD DROP",
            &[],
            ("firewall", "warn", "FORWARD (policy) drops"),
            "iptables -P FORWARD ACCEPT; iptables -F; sysctl -qw net.ipv4.ip_forward=0",
        ),
        case(
            "",
            &[],
            ("forwarding", "fail", "ip_forward is 0"),
            "iptables -t nat -F; iptables -t nat -X; ip link del docker0
            sysctl -qw net.ipv4.ip_forward=0",
        ),
        case(
            "ip rule add pref 100 from 198.51.100.2 unreachable",
            &[],
            ("route", "fail", "198.51.100.2"),
            "ip rule del pref 100; ip rule del pref 99",
        ),
        case(
            "nft 'table inet m {
                chain out { type route hook output priority 0; meta mark set ct mark; }
            }'
            ip rule add pref 100 fwmark 0x1 unreachable",
            &[],
            ("rules", "warn", "the mark 0x1 (ip rule 100)"),
            "ip rule del pref 100; ip rule del pref 99; nft delete table inet m",
        ),
        case(
            "ip link add d0 type veth peer name d1; ip link set d0 up; ip link set d1 up
            ip route add default dev d0 table 101
            ip rule add ipproto tcp sport 80 lookup 101",
            &[],
            ("rp_filter", "fail", "eth0"),
            "ip rule del lookup 101; ip link del d0; sysctl -qw net.ipv4.conf.eth0.rp_filter=1",
        ),
        case(
            "",
            &["--deliver-to", "198.51.100.9"],
            ("delivery", "fail", "not an address of this server"),
            "ip addr del 198.51.100.9/32 dev eth0",
        ),
        case(
            "tc qdisc add dev eth0 ingress",
            &[],
            ("qdisc", "fail", "ingress qdisc of others"),
            "tc qdisc del dev eth0 clsact",
        ),
    ]);
    for case in &cases {
        bench.try_out(case)?;
    }
    // Nothing says what may move here.
    let open = Bench {
        setup: crate::stage::setup(&lab)?.moves(&["192.0.2.5:80/tcp"]),
        role: Role::New,
        bin: bench.bin.clone(),
    };
    let all = ("accept", "warn", "no --accept says");
    open.try_out(&case("", &[], all, ""))?;
    // By the remedy the network may give it an address again; here none does.
    bench.shows(
        &case(
            "sysctl -qw net.ipv6.conf.all.disable_ipv6=1",
            &["--accept", "[2001:db8:a::5]:80/tcp"],
            ("delivery", "fail", "give it one"),
            "ip addr add 2001:db8:b::2/64 dev eth0 nodad",
        ),
        "sysctl -w net.ipv6.conf.all.disable_ipv6=0; ip -6 addr",
        "inet6 fe80:",
    )?;
    whole_moves(&open)?;
    // A cloud's public address, which is on no interface.
    bench.try_out(&case(
        "ip addr add 10.0.0.7/24 dev eth0; ip addr del 198.51.100.2/24 dev eth0
        ip route replace default via 10.0.0.254 dev eth0",
        &["--deliver-to", "203.0.113.77"],
        ("nat", "fail", "own address is 10.0.0.7"),
        "",
    ))
}

/// An address that moves with all its ports: who listens there for whichever.
fn whole_moves(open: &Bench<'_>) -> Result {
    let whole = Bench {
        setup: open.setup.clone().moves(&["192.0.2.6"]),
        role: Role::New,
        bin: open.bin.clone(),
    };
    let line = whole.line(&["--accept", "192.0.2.6", "--deliver-to", "198.51.100.12"]);
    whole.sh("ip addr add 198.51.100.12/24 dev eth0
        socat TCP4-LISTEN:8080,bind=127.0.0.1 /dev/null >/dev/null 2>&1 &
        echo $! > \"$(command -v ssh).pid\"
        until grep -q ':1F90 ' /proc/net/tcp; do :; done")?;
    let nobody = ("listener", "warn", "nothing listens on 198.51.100.12");
    let found = whole.check(&line, &[])?;
    let finding = find(&found, nobody).unwrap_or_else(|| panic!("{found:#}"));
    let text = finding["text"].as_str().unwrap_or_default();
    assert!(text.contains("127.0.0.1:8080"), "{text}");
    let remedy = finding["remedy"].as_str().unwrap_or_default();
    let shown = whole.shell(remedy, &[])?;
    assert!(shown.stdout.contains("127.0.0.1:8080"), "{shown:?}");
    whole.sh("kill $(cat \"$(command -v ssh).pid\")
        socat TCP6-LISTEN:8080 /dev/null >/dev/null 2>&1 &
        echo $! > \"$(command -v ssh).pid\"
        until grep -q ':1F90 ' /proc/net/tcp6; do :; done")?;
    let found = whole.check(&line, &[])?;
    let well = ("listener", "ok", "8080/tcp");
    assert!(find(&found, well).is_some(), "{found:#}");
    whole.sh("kill $(cat \"$(command -v ssh).pid\"); ip addr del 198.51.100.12/24 dev eth0")
}

#[test]
fn nat_is_looked_at_as_well_and_whether_the_application_answers() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let bench = Bench::new(setup.clone(), Role::Old)?;
    let flags = ["--move", "192.0.2.5:80/tcp", "--to", "198.51.100.2"];
    let line = format!("ipmoved nat --check --json {}", flags.join(" "));
    let found = bench.check(&line, &[])?;
    let object = ("listener", "warn", "198.51.100.2:80/tcp");
    let finding = find(&found, object).unwrap_or_else(|| panic!("{found:#}"));
    let says = finding["text"].as_str().unwrap_or_default();
    assert!(says.contains("nothing listens there"), "{finding}");
    let shown = bench.shell(finding["remedy"].as_str().unwrap_or_default(), &[])?;
    assert!(shown.status.success(), "{shown:?}");
    let _application = Service::start(lab.new_server(), NEW)?;
    // The new server's firewall does not know this server.
    let there = Bench {
        setup: setup.clone(),
        role: Role::New,
        bin: bench.bin.clone(),
    };
    there.sh("nft 'table inet f {
        chain in { type filter hook input priority 0; ip saddr 192.0.2.1 tcp dport 80 drop; }
    }'")?;
    let found = bench.check(&line, &[])?;
    let silent = ("listener", "warn", "its firewall has to let this server in");
    let finding = find(&found, silent).unwrap_or_else(|| panic!("{found:#}"));
    let remedy = finding["remedy"].as_str().unwrap_or_default();
    let shown = bench.shell(remedy, &[])?;
    assert!(shown.stdout.contains("tcp dport 80 drop"), "{shown:?}");
    there.sh("nft delete table inet f")?;
    let found = bench.check(&line, &[])?;
    assert_eq!(found["result"], "ok", "{found:#}");
    for well in [
        ("privileges", "ok", ""),
        ("tun", "ok", "can be made"),
        ("bpf", "ok", "load"),
        ("tc", "ok", "can be made"),
        ("uplink", "ok", "eth0"),
        ("way", "ok", "from 192.0.2.1"),
        ("listener", "ok", "answers this server"),
    ] {
        assert!(find(&found, well).is_some(), "{well:?}: {found:#}");
    }
    bench.try_out(&case(
        "ip addr del 192.0.2.5/24 dev eth0",
        &[],
        ("address", "warn", "is on no interface"),
        "ip addr add 192.0.2.5/24 dev eth0; ip addr del 192.0.2.5/32 dev eth0",
    ))?;
    let to_itself = line.replace("198.51.100.2", "192.0.2.1");
    let found = bench.check(&to_itself, &[])?;
    let itself = ("way", "fail", "is an address of this server itself");
    assert!(find(&found, itself).is_some(), "{found:#}");
    // A port that is to stand for clients is somebody's.
    bench.sh(
        "socat UDP4:198.51.100.2:9,sourceport=41000 PIPE >/dev/null 2>&1 &
        echo $! > \"$(command -v ssh).pid\"
        until grep -q ':A028 ' /proc/net/udp; do :; done",
    )?;
    let found = bench.check(&line, &[])?;
    let used = ("port", "fail", "is in use on this server");
    assert!(find(&found, used).is_some(), "{found:#}");
    bench.sh("kill $(cat \"$(command -v ssh).pid\")
        while grep -q ':A028 ' /proc/net/udp; do :; done")?;
    // What a daemon here has made is not held against it.
    let mut daemon = setup.start_nat(&flags)?;
    daemon.wait_until_up()?;
    let found = bench.check(&line, &[])?;
    assert_eq!(found["result"], "ok", "{found:#}");
    assert!(find(&found, ("daemon", "ok", "runs here")).is_some());
    Ok(())
}
