//! Whether anybody serves an address that moves with all its ports.
//!
//! No port is named, so that nobody knows which one clients will ask for. Owns what is said of all
//! that listens where it is delivered: a server on which nothing does but the login is not ready.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use super::delivered::{Delivered, is_there};
use crate::daemon::held::first_of;
use crate::kernel::look::{self, Listener, Listeners};
use crate::model::asked::Asked;
use crate::model::finding::Finding;
use crate::model::moved::{TCP, UDP};
use crate::model::prefix::Prefix;
use crate::settings::values::DeliverTo;

/// The login's port: who listens there is no service that moves.
const SSH: u16 = 22;

/// UDP ports of what a system has for itself: leases, time, names of the link (IANA's registry).
const OF_THE_SYSTEM: [u16; 7] = [68, 123, 323, 546, 547, 5353, 5355];

/// From here on, UDP ports are mostly those of programs that ask others
/// (`net.ipv4.ip_local_port_range`), but a service may have one: WireGuard has 51820.
const EPHEMERAL: u16 = 32_768;

/// Ports that are named in a line.
const NAMED: usize = 8;

/// Moves that have a line of their own.
const SHOWN: usize = 16;

/// Whoever listens where an address is delivered that moves whole: `tunnel` is the port of this
/// server's end of the tunnel.
pub(super) fn served(
    delivered: &Delivered<'_>,
    tunnel: u16,
    own: &dyn Fn(IpAddr) -> bool,
) -> Vec<Finding> {
    let mut listeners = Listeners::default();
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    let whole = delivered.moves.iter().filter(|it| it.ports.is_empty());
    for moved in whole.take(SHOWN) {
        let asked = Asked {
            addr: moved.prefix.first(),
            protocol: TCP,
            port: 0,
        };
        let Some(to) = delivered.to(&asked).map(|to| to.ip()) else {
            continue;
        };
        // One that will be held here is bound to in time.
        let will_be = delivered.config.deliver_to == DeliverTo::Keep;
        if !(own(to) || will_be) || !seen.insert(to) {
            continue;
        }
        let mut at = |protocol| listeners.all(Instant::now(), protocol, to);
        let (Some(tcp), Some(udp)) = (at(TCP), at(UDP)) else {
            continue;
        };
        let all = Listening {
            tcp: here(TCP, &tcp),
            udp: here(UDP, &udp),
            elsewhere: elsewhere(&tcp),
            forwards: look::forwards(to.is_ipv4()) == Some(true),
        };
        found.extend(judge(moved.prefix, to, tunnel, &all));
    }
    found
}

/// What listens on this server.
#[derive(Default)]
struct Listening {
    /// The ports at which it does where packets are delivered.
    tcp: Vec<u16>,
    udp: Vec<u16>,
    /// Where it does at other addresses alone.
    elsewhere: Vec<SocketAddr>,
    /// Containers and virtual machines can be reached.
    forwards: bool,
}

fn here(protocol: u8, all: &[(u16, Listener)]) -> Vec<u16> {
    let here = |(port, listener): &&(u16, Listener)| is_there(listener, protocol, *port);
    let here = all.iter().filter(here);
    here.map(|(port, _)| *port).collect()
}

fn elsewhere(all: &[(u16, Listener)]) -> Vec<SocketAddr> {
    let at = |(port, listener): &(u16, Listener)| match listener {
        Listener::At(ip) => Some(SocketAddr::new(*ip, *port)),
        Listener::Here | Listener::OnIpv6 | Listener::Nobody => None,
    };
    all.iter().filter_map(at).collect()
}

fn judge(moved: Prefix, to: IpAddr, tunnel: u16, all: &Listening) -> Option<Finding> {
    const NAME: &str = "listener";
    let tcp = all.tcp.iter().filter(|&&port| port != SSH);
    let others = |port: &&u16| !OF_THE_SYSTEM.contains(port) && **port != tunnel;
    let udp = all.udp.iter().filter(others);
    let (udp, unclear): (Vec<u16>, Vec<u16>) = udp.copied().partition(|&port| port < EPHEMERAL);
    let tcp = tcp.map(|port| format!("{port}/tcp"));
    let in_words = |port: &u16| format!("{port}/udp");
    let open: Vec<String> = tcp.chain(udp.iter().map(in_words)).collect();
    if !open.is_empty() {
        let text = format!("what listens on {to}: {}", first_of(&open, NAMED));
        return Some(Finding::ok(NAME, moved, text));
    }
    // Whoever answers may be in a container, behind address translation.
    if all.forwards {
        return None;
    }
    let but = if all.tcp.contains(&SSH) {
        ", but for logins"
    } else {
        ""
    };
    let bind = match all.elsewhere.as_slice() {
        [] => "start the application".to_owned(),
        some => format!(
            "start the application, or let it listen there (what listens elsewhere: {})",
            first_of(some, NAMED)
        ),
    };
    let unclear: Vec<String> = unclear.iter().map(in_words).collect();
    let unless = match unclear.as_slice() {
        [] => String::new(),
        some => format!(", unless {} is the application", first_of(some, NAMED)),
    };
    let text = format!("nothing listens on {to}{but}{unless}: {bind}");
    Some(Finding::warn(NAME, moved, text, "ss -ltunp"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::finding::Grade;

    fn says(all: &Listening) -> Option<Finding> {
        let to = "198.51.100.2".parse().unwrap();
        judge("192.0.2.5/32".parse().unwrap(), to, 51_850, all)
    }

    #[test]
    fn a_server_on_which_nothing_listens_but_the_login_is_not_ready() {
        let login = Listening {
            tcp: vec![SSH],
            udp: vec![68, 123, 51_850, 40_000],
            ..Listening::default()
        };
        let found = says(&login).unwrap();
        assert_eq!(found.result, Grade::Warn);
        let but = "but for logins, unless 40000/udp is the application: start";
        assert!(found.text.contains(but), "{found:?}");
        let on_lo = Listening {
            elsewhere: vec!["127.0.0.1:8080".parse().unwrap()],
            ..Listening::default()
        };
        let found = says(&on_lo).unwrap();
        assert!(found.text.contains("127.0.0.1:8080"), "{found:?}");
        // A container may answer.
        let forwards = true;
        assert!(says(&Listening { forwards, ..on_lo }).is_none());
        for (tcp, udp, shows) in [
            (vec![22, 443], vec![], "443/tcp"),
            (vec![22], vec![53, 123], "53/udp"),
            ((1..20).collect(), vec![], "8/tcp and 11 more"),
        ] {
            let found = says(&Listening {
                tcp,
                udp,
                ..Listening::default()
            })
            .unwrap();
            assert_eq!(found.result, Grade::Ok);
            assert!(found.text.ends_with(shows), "{found:?}");
        }
    }
}
