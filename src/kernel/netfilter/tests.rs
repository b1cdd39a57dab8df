//! Rules as people and programs make them, and what becomes of a packet.

use std::process::Command;

use super::*;
use crate::kernel::testing::in_fresh_namespace;

/// A client's SYN to this port.
fn syn(port: u16) -> Packet {
    Packet {
        iif: Some((2, "eth0".into())),
        oif: None,
        addrs: (
            "203.0.113.9".parse().unwrap(),
            "198.51.100.2".parse().unwrap(),
        ),
        protocol: 6,
        ports: (40_000, port),
    }
}

fn run(program: &str, lines: &[&str]) {
    for line in lines {
        let mut command = Command::new("sh");
        let line = format!("{program} {line}");
        let output = command.args(["-c", &line]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{line}: {said}");
    }
}

fn fate(packet: &Packet) -> Fate {
    Ruleset::read().fate(Hook::Input, packet)
}

/// In which chain a packet ends, if it does.
fn ends(packet: &Packet) -> Option<String> {
    match fate(packet) {
        Fate::Ends(culprit) => Some(culprit.chain),
        Fate::Passes | Fate::Turned(_) => None,
    }
}

#[test]
fn chains_that_drop_are_found() {
    in_fresh_namespace(|| {
        assert_eq!(Ruleset::read().drop_chains(), []);
        run(
            "nft",
            &["'table inet f {
                chain in { type filter hook input priority 0; policy drop; tcp dport 22 accept; }
                chain own { tcp dport 80 counter drop; tcp dport 81 reject; }
                chain fine { tcp dport 80 counter accept; ip saddr 192.0.2.1 jump own; }
            }'"],
        );
        let found: Vec<String> = Ruleset::read()
            .drop_chains()
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(
            found,
            [
                "chain inet f in (policy drop)",
                "chain inet f own (2 rules that drop)"
            ]
        );
    });
}

#[test]
fn rules_of_nft_end_what_they_would_end() {
    in_fresh_namespace(|| {
        run(
            "nft",
            &["'table inet f {
                set open { type inet_service; flags interval; elements = { 100-110, 443 } }
                set banned { type ipv4_addr; elements = { 203.0.113.9 } }
                map acts { type inet_service : verdict; elements = { 700 : accept, 701 : drop } }
                chain services { tcp dport 300 accept; tcp dport 301 return; }
                chain in {
                    type filter hook input priority 0; policy drop;
                    ct state vmap { established : accept, related : accept, invalid : drop }
                    iifname \"lo\" accept
                    iifname \"wlan*\" accept
                    tcp dport 50 ip saddr @banned drop
                    tcp dport { 50, 80, 8000-8010 } accept
                    tcp dport @open counter accept
                    ip daddr 198.51.100.0/24 tcp dport 200 accept
                    ip daddr 198.51.0.0/24 tcp dport 201 accept
                    iif != 2 tcp dport 202 accept
                    tcp flags syn / syn,ack tcp dport 204 accept
                    tcp dport >= 60000 accept
                    tcp dport vmap @acts
                    tcp dport 302 goto services
                    meta l4proto tcp jump services
                    tcp dport 400 limit rate 1/second accept
                    udp dport 500 accept
                    tcp dport 600 ct state new reject
                }
            }'"],
        );
        let open = [
            80, 8000, 8010, 100, 105, 443, 200, 204, 60_001, 700, 300, 400,
        ];
        for port in open {
            assert_eq!(ends(&syn(port)), None, "{port}");
        }
        for port in [50, 81, 8011, 111, 201, 202, 301, 302, 500, 600, 701] {
            assert_eq!(ends(&syn(port)).as_deref(), Some("in"), "{port}");
        }
        let Fate::Ends(culprit) = fate(&syn(600)) else {
            panic!("it is rejected");
        };
        assert!(culprit.rejects && !culprit.policy, "{culprit:?}");
        let mut udp = syn(500);
        udp.protocol = 17;
        assert_eq!(ends(&udp), None);
        // The other family meets the chain as well.
        let v6 = |port| Packet {
            addrs: (
                "2001:db8:c::9".parse().unwrap(),
                "2001:db8:b::2".parse().unwrap(),
            ),
            ..syn(port)
        };
        assert_eq!(ends(&v6(80)), None);
        assert_eq!(ends(&v6(200)).as_deref(), Some("in"));
        run("nft", &["add table inet f '{ flags dormant; }'"]);
        assert_eq!(ends(&syn(81)), None, "the table sleeps");
    });
}

/// The firewall of `ufw`, and one of `firewalld`, in short.
#[test]
fn rules_of_iptables_end_what_they_would_end() {
    for program in ["iptables-nft", "iptables-legacy"] {
        let there = Command::new(program).arg("-V").output().is_ok();
        if !there {
            println!("SKIPPED: there is no {program} here");
            continue;
        }
        in_fresh_namespace(|| {
            run(
                program,
                &[
                    "-P INPUT DROP",
                    "-P FORWARD DROP",
                    "-N ufw-before-input",
                    "-N ufw-user-input",
                    "-N ufw-not-local",
                    "-A INPUT -j ufw-before-input",
                    "-A ufw-before-input -i lo -j ACCEPT",
                    "-A ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
                    "-A ufw-before-input -m conntrack --ctstate INVALID -j DROP",
                    "-A ufw-before-input -s 203.0.113.0/24 -p tcp --dport 90 -j REJECT",
                    "-A ufw-before-input ! -s 203.0.113.0/24 -p tcp --dport 91 -j ACCEPT",
                    "-A ufw-before-input -j ufw-not-local",
                    "-A ufw-not-local -m addrtype --dst-type LOCAL -j RETURN",
                    "-A ufw-not-local -m addrtype --dst-type MULTICAST -j RETURN",
                    "-A ufw-not-local -m addrtype --dst-type BROADCAST -j RETURN",
                    "-A ufw-not-local -j DROP",
                    "-A ufw-before-input -j ufw-user-input",
                    "-A ufw-user-input -p tcp -m tcp --dport 80 -j ACCEPT",
                    "-A ufw-user-input -p tcp -m multiport --dports 443,8000:8010 -j ACCEPT",
                    "-A ufw-user-input -p udp -m udp --dport 51850 -j ACCEPT",
                    "-A ufw-user-input -i eth+ -p tcp --dport 81 --syn -j ACCEPT",
                    "-A ufw-user-input -i wlan+ -p tcp --dport 82 -j ACCEPT",
                    "-A ufw-user-input -p tcp --dport 83 -m limit --limit 3/min -j ACCEPT",
                    "-A ufw-user-input -p tcp --dport 84 -m state --state NEW -j ACCEPT",
                    "-t raw -A PREROUTING -p tcp --dport 99 -j DROP",
                    "-t nat -A PREROUTING -p tcp --dport 8080 -j DNAT --to 172.17.0.2:80",
                ],
            );
            for port in [80, 443, 8005, 81, 83, 84] {
                assert_eq!(ends(&syn(port)), None, "{program}: {port}");
            }
            for (port, chain) in [(79, "INPUT"), (82, "INPUT"), (91, "INPUT")] {
                assert_eq!(
                    ends(&syn(port)).as_deref(),
                    Some(chain),
                    "{program}: {port}"
                );
            }
            let Fate::Ends(culprit) = fate(&syn(90)) else {
                panic!("{program}");
            };
            assert_eq!((culprit.base.as_str(), culprit.rejects), ("INPUT", true));
            assert_eq!(culprit.chain, "ufw-before-input");
            let mut udp = syn(51_850);
            udp.protocol = 17;
            assert_eq!(ends(&udp), None, "{program}");
            let rules = Ruleset::read();
            let before = |port| rules.fate(Hook::Prerouting, &syn(port));
            assert!(matches!(before(99), Fate::Ends(_)), "{program}");
            let to = Some("172.17.0.2:80".parse().unwrap());
            assert_eq!(before(8080), Fate::Turned(to), "{program}");
            assert!(rules.has_name(|name| name.starts_with("ufw-")));
            assert_eq!(rules.has_legacy(), program == "iptables-legacy");
        });
    }
}

#[test]
fn chains_of_legacy_tables_that_drop_are_found() {
    let there = |program| Command::new(program).arg("-V").output().is_ok();
    if !there("iptables-legacy") || !there("ip6tables-legacy") {
        return println!("SKIPPED: there is no iptables-legacy here");
    }
    in_fresh_namespace(|| {
        run(
            "iptables-legacy",
            &[
                "-P FORWARD DROP",
                "-N own",
                "-A INPUT -p tcp --dport 22 -j own",
                "-A own -s 192.0.2.1 -j DROP",
                "-A own -j REJECT",
                "-A OUTPUT -p udp -j ACCEPT",
                "-t raw -A PREROUTING -p tcp -j DROP",
            ],
        );
        run(
            "ip6tables-legacy",
            &["-t mangle -A OUTPUT -p tcp -j DROP", "-P OUTPUT ACCEPT"],
        );
        let chains = Ruleset::read().drop_chains();
        let mut found: Vec<String> = chains.iter().map(ToString::to_string).collect();
        found.sort();
        assert_eq!(
            found,
            [
                "chain ip6tables-legacy mangle OUTPUT (1 rule that drops)",
                "chain iptables-legacy filter FORWARD (policy drop)",
                "chain iptables-legacy filter own (2 rules that drop)",
                "chain iptables-legacy raw PREROUTING (1 rule that drops)",
            ]
        );
    });
}
