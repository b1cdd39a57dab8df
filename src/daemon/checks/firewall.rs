//! What this server's firewall does with the tunnel and, on the new server, with clients.
//!
//! Owns which packets are asked about, and the command that lets one through: in the words of
//! whoever the chain belongs to.

use std::net::{IpAddr, SocketAddr};

use super::words::quoted;
use crate::kernel::netfilter::{Culprit, Fate, Hook, Owner, Packet, Ruleset};
use crate::kernel::netlink::Link;
use crate::kernel::plan::PUBLIC;
use crate::model::finding::Finding;
use crate::model::moved::{TCP, UDP};

/// A port from which clients speak.
const CLIENTS_PORT: u16 = 50_000;

/// Whether the tunnel's datagrams to and from a peer pass: `own` is this server's end.
pub(super) fn tunnel(
    rules: &Ruleset,
    link: &Link,
    own: SocketAddr,
    peer: SocketAddr,
) -> Vec<Finding> {
    let by = Some((link.index, link.name.clone()));
    let packet = |from: SocketAddr, to: SocketAddr| Packet {
        iif: None,
        oif: None,
        addrs: (from.ip(), to.ip()),
        protocol: UDP,
        ports: (from.port(), to.port()),
    };
    let comes = Packet {
        iif: by.clone(),
        ..packet(peer, own)
    };
    let leaves = Packet {
        oif: by,
        ..packet(own, peer)
    };
    let object = format!("the tunnel, UDP port {} on {}", own.port(), link.name);
    let ways = [
        (&comes, Hook::Prerouting),
        (&comes, Hook::Input),
        (&leaves, Hook::Output),
        (&leaves, Hook::Postrouting),
    ];
    for (packet, hook) in ways {
        if let Fate::Ends(culprit) = rules.fate(hook, packet) {
            let text = format!(
                "{} what {} the peer",
                says(&culprit),
                match packet.oif {
                    None => "comes from",
                    Some(_) => "goes to",
                }
            );
            let remedy = lets(rules, &culprit, packet, &link.name);
            return vec![Finding::warn("firewall", object, text, remedy)];
        }
    }
    vec![Finding::ok("firewall", object, "passes")]
}

/// What becomes of a client's first packet on the new server.
pub(super) enum Arrival {
    /// It comes to a socket of this server, as far as the firewall goes.
    Here,
    /// It is sent on, to a container or virtual machine; where to may not be known.
    Beyond(Option<SocketAddr>),
    /// It is dropped.
    Ends(Finding),
}

/// Whether a client's first packet passes to where it is delivered.
pub(super) fn client(
    rules: &Ruleset,
    link: &Link,
    protocol: u8,
    to: SocketAddr,
    forwards_by: impl Fn(IpAddr) -> Option<(u32, String)>,
) -> Arrival {
    let clients = PUBLIC.into_iter();
    let Some(client) = clients.into_iter().find(|ip| ip.is_ipv4() == to.is_ipv4()) else {
        return Arrival::Here;
    };
    let mut packet = Packet {
        iif: Some((link.index, link.name.clone())),
        oif: None,
        addrs: (client, to.ip()),
        protocol,
        ports: (CLIENTS_PORT, to.port()),
    };
    let ends = |culprit: &Culprit, packet: &Packet| {
        let what = if protocol == TCP { "tcp" } else { "udp" };
        let object = format!("clients of {to}/{what} on {}", link.name);
        let text = format!("{} them", says(culprit));
        let remedy = lets(rules, culprit, packet, &link.name);
        Arrival::Ends(Finding::warn("firewall", object, text, remedy))
    };
    let beyond = match rules.fate(Hook::Prerouting, &packet) {
        Fate::Ends(culprit) => return ends(&culprit, &packet),
        Fate::Passes => {
            return match rules.fate(Hook::Input, &packet) {
                Fate::Ends(culprit) => ends(&culprit, &packet),
                Fate::Passes | Fate::Turned(_) => Arrival::Here,
            };
        }
        Fate::Turned(to) => to,
    };
    let Some(inner) = beyond else {
        return Arrival::Beyond(None);
    };
    packet.addrs.1 = inner.ip();
    if inner.port() != 0 {
        packet.ports.1 = inner.port();
    }
    packet.oif = forwards_by(inner.ip());
    match rules.fate(Hook::Forward, &packet) {
        Fate::Ends(culprit) if packet.oif.is_some() => ends(&culprit, &packet),
        Fate::Ends(_) | Fate::Passes | Fate::Turned(_) => Arrival::Beyond(beyond),
    }
}

fn says(culprit: &Culprit) -> String {
    let Culprit {
        owner,
        table,
        chain,
        policy,
        rejects,
        ..
    } = culprit;
    let does = if *rejects { "rejects" } else { "drops" };
    let policy = if *policy { " (policy)" } else { "" };
    let whose = owner.name();
    format!("chain {whose} {table} {chain}{policy} {does}")
}

/// The command that lets a packet through.
fn lets(rules: &Ruleset, culprit: &Culprit, packet: &Packet, link: &str) -> String {
    let protocol = if packet.protocol == TCP { "tcp" } else { "udp" };
    let leaves = packet.oif.is_some() && packet.iif.is_none();
    let forwarded = packet.oif.is_some() && packet.iif.is_some();
    // Of what leaves, whom it goes to is what counts.
    let port = packet.ports.1;
    let v4 = packet.addrs.0.is_ipv4();
    let link = quoted(link);
    let Culprit {
        owner, table, base, ..
    } = culprit;
    // Its own chains are reached from those of the hooks.
    let is_ufw = table == "filter" && rules.has_name(|name| name.starts_with("ufw-"));
    let way = if leaves { "-o" } else { "-i" };
    match owner {
        _ if table == "firewalld" => {
            return format!(
                "firewall-cmd --permanent --zone=$(firewall-cmd --get-zone-of-interface={link} || \
                 firewall-cmd --get-default-zone) --add-port={port}/{protocol} && \
                 firewall-cmd --reload"
            );
        }
        _ if is_ufw && forwarded => {
            return format!("ufw route allow in on {link} proto {protocol} to any port {port}");
        }
        _ if is_ufw && leaves => {
            return format!("ufw allow out on {link} proto {protocol} to any port {port}");
        }
        _ if is_ufw => {
            return format!("ufw allow in on {link} proto {protocol} to any port {port}");
        }
        Owner::Legacy(_) => {}
        Owner::Nft(_) if is_of_iptables(table, base) => {}
        Owner::Nft(family) => {
            let name = if leaves { "oifname" } else { "iifname" };
            return format!(
                "nft insert rule {family} {} {} {name} {link} {protocol} dport {port} accept",
                quoted(table),
                quoted(base)
            );
        }
    }
    let program = match owner {
        Owner::Legacy(program) => program,
        Owner::Nft(_) if v4 => "iptables",
        Owner::Nft(_) => "ip6tables",
    };
    let of_table = match table.as_str() {
        "filter" => String::new(),
        other => format!("-t {other} "),
    };
    format!("{program} {of_table}-I {base} {way} {link} -p {protocol} --dport {port} -j ACCEPT")
}

/// Whether `iptables-nft` made a chain: `nft` can make one of that name, and nobody does.
fn is_of_iptables(table: &str, base: &str) -> bool {
    let tables = ["filter", "mangle", "nat", "raw", "security"];
    let chains = ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"];
    tables.contains(&table) && chains.contains(&base)
}
