//! Where the new server delivers: whether that is its own, whether somebody is there, and whether
//! packets get there and answers back.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use rustix::io::Errno;

use super::firewall::{self, Arrival};
use super::links::{before, ip};
use super::moved::Place;
use super::words::{Words, quoted};
use crate::daemon::causes;
use crate::daemon::setup::Uplinks;
use crate::daemon::silence::{forwarding_off, no_way_back, nobody_there};
use crate::kernel::look::{self, Listener, Listeners};
use crate::kernel::netfilter::Ruleset;
use crate::kernel::netlink::{Family, Link, Netlink, RouteQuery};
use crate::kernel::plan::PUBLIC;
use crate::kernel::sockets;
use crate::model::asked::Asked;
use crate::model::delivery_map::DeliveryMap;
use crate::model::finding::Finding;
use crate::model::moved::{Move, TCP, UDP};
use crate::model::status::Cause;
use crate::settings::config::PeerConfig;
use crate::settings::values::DeliverTo;

/// Ports that are looked at, of all peers: each has a line of its own if it is not well.
const MAX_PORTS: usize = 64;

/// What of a peer is delivered, as far as this server's settings or its daemon tell.
pub(super) struct Delivered<'a> {
    pub(super) config: &'a PeerConfig,
    /// What moves here, or may.
    pub(super) moves: Vec<Move>,
    /// The addresses at which the peer reaches this server.
    pub(super) reached_at: Vec<IpAddr>,
}

impl Delivered<'_> {
    /// Where something that moves is delivered.
    pub(super) fn to(&self, asked: &Asked) -> Option<SocketAddr> {
        // One that names the port counts before one that names none.
        let about = |map: &&DeliveryMap| map.about().takes(asked.protocol, Some(asked.port));
        let maps = self.config.deliver.iter();
        let own = maps
            .filter(|map| map.moved.contains(asked.addr))
            .filter(about)
            .max_by_key(|map| (map.port.is_some(), map.moved.len()));
        if let Some(map) = own {
            return Some(map.place(asked.addr, asked.port).into());
        }
        let of_family = |addr: &&IpAddr| addr.is_ipv4() == asked.addr.is_ipv4();
        let addr = match self.config.deliver_to {
            DeliverTo::Keep => asked.addr,
            DeliverTo::Addresses { v4, v6 } => {
                let given = match asked.addr {
                    IpAddr::V4(_) => v4.map(IpAddr::V4),
                    IpAddr::V6(_) => v6.map(IpAddr::V6),
                };
                given.or_else(|| self.reached_at.iter().find(of_family).copied())?
            }
        };
        Some(SocketAddr::new(addr, asked.port))
    }
}

/// Whether what the settings name is this server's own.
pub(super) fn own(delivered: &Delivered<'_>, place: &Place<'_>, words: &Words) -> Vec<Finding> {
    let mut found = Vec::new();
    let config = delivered.config;
    let keeps = config.deliver_to == DeliverTo::Keep;
    let mut wanted: Vec<IpAddr> = (config.deliver.iter())
        .filter(|map| !(keeps && map.to == map.moved))
        .flat_map(|map| [map.to.first(), map.to.last()])
        .collect();
    if let DeliverTo::Addresses { v4, v6 } = config.deliver_to {
        wanted.extend(v4.map(IpAddr::V4).into_iter().chain(v6.map(IpAddr::V6)));
    }
    wanted.sort_unstable();
    wanted.dedup();
    for addr in wanted {
        if place.held.has(addr) {
            found.push(Finding::ok("delivery", addr, "is this server's own"));
            continue;
        }
        if let Some(private) = place.behind_nat(addr) {
            let text = format!(
                "is on no interface: where a provider translates it (1:1 NAT), this server's own \
                 address is {private}"
            );
            let remedy = words.replacing(&addr.to_string(), &private.to_string());
            found.push(Finding::fail("nat", addr, text, remedy));
            continue;
        }
        let by = place.uplinks.and_then(Uplinks::first);
        let by = by.map_or("lo", |link| link.name.as_str());
        let bits = if addr.is_ipv4() { 32 } else { 128 };
        let text = "is not an address of this server, and packets are delivered to no other one";
        let remedy = format!("ip addr add {addr}/{bits} dev {}", quoted(by));
        found.push(Finding::fail("delivery", addr, text, remedy));
    }
    if keeps {
        return found;
    }
    found.extend(
        [true, false]
            .into_iter()
            .filter_map(|v4| no_address(delivered, v4)),
    );
    if !found.is_empty() {
        return found;
    }
    found.extend(delivered.reached_at.iter().map(|addr| {
        let text = "packets are delivered there, where the old server reaches this one";
        Finding::ok("delivery", addr, text)
    }));
    found
}

/// That what moves has addresses of a family, and this server none to deliver to.
fn no_address(delivered: &Delivered<'_>, v4: bool) -> Option<Finding> {
    let moves = delivered.moves.iter().any(|it| it.prefix.is_ipv4() == v4);
    let DeliverTo::Addresses { v4: to4, v6: to6 } = delivered.config.deliver_to else {
        return None;
    };
    let given = if v4 { to4.is_some() } else { to6.is_some() };
    let reached = delivered.reached_at.iter().any(|it| it.is_ipv4() == v4);
    if !moves || given || reached {
        return None;
    }
    let (object, remedy) = match v4 {
        true => ("IPv4", "ip -4 addr"),
        false => (
            "IPv6",
            "sysctl -w net.ipv6.conf.all.disable_ipv6=0; ip -6 addr",
        ),
    };
    let text = "what moves has such addresses, and this server has none to deliver to: give it one";
    Some(Finding::fail("delivery", object, text, remedy))
}

/// Whether the old server is let in with what it moves.
pub(super) fn accepted(delivered: &Delivered<'_>, words: &Words) -> Option<Finding> {
    let config = delivered.config;
    if !config.accept.is_empty() {
        return None;
    }
    let named: Vec<String> = delivered.moves.iter().map(ToString::to_string).collect();
    let text = "whatever the old server names is served, since no --accept says what may move here";
    let remedy = match named.as_slice() {
        [] => words.with("accept", &["192.0.2.5".into()]),
        some => words.with("accept", some),
    };
    let text = match named.is_empty() {
        true => format!("{text}; give the address that has moved"),
        false => text.into(),
    };
    Some(Finding::warn("accept", "--accept", text, remedy))
}

/// Each port that moves: who listens, and whether clients get there.
pub(super) fn ports(
    netlink: &Netlink,
    delivered: &Delivered<'_>,
    rules: &Ruleset,
    way: &dyn Fn(IpAddr) -> Option<Link>,
    own: &dyn Fn(IpAddr) -> bool,
) -> Vec<Finding> {
    let mut found = Vec::new();
    let mut listeners = Listeners::default();
    let mut missing = [false; 2];
    let mut beyond = [false; 2];
    for asked in asked(&delivered.moves) {
        let Some(to) = delivered.to(&asked) else {
            continue;
        };
        let family = usize::from(!to.is_ipv4());
        let by = way(to.ip());
        if let Some(filtered) = by
            .as_ref()
            .and_then(|by| rp_filter(netlink, to, &asked, by))
        {
            found.push(filtered);
            continue;
        }
        let arrival = by.map_or(Arrival::Here, |uplink| {
            let by = |addr| {
                let oif = netlink.route_get(addr, None, None).ok()?.oif?;
                Some((oif, netlink.link_name(oif).ok()?))
            };
            firewall::client(rules, &uplink, asked.protocol, to, by)
        });
        match arrival {
            Arrival::Ends(finding) => {
                found.push(finding);
                continue;
            }
            Arrival::Beyond(end) => {
                beyond[family] = true;
                let end = end.map_or_else(|| "elsewhere".into(), |end| end.to_string());
                let text = format!("is sent on to {end} by address translation");
                found.push(Finding::ok("listener", asked, text));
                continue;
            }
            Arrival::Here => {}
        }
        // Nothing listens yet at an address that will be held here.
        let will_be = delivered.config.deliver_to == DeliverTo::Keep;
        if !own(to.ip()) && !will_be {
            continue;
        }
        let Some(listener) = listeners.listener(Instant::now(), asked.protocol, to) else {
            continue;
        };
        found.push(listens(&listener, to, &asked, &mut missing[family]));
    }
    for (family, v4) in [true, false].into_iter().enumerate() {
        let needed = beyond[family] || missing[family];
        if needed && look::forwards(v4) == Some(false) {
            found.push(forwards_not(v4, beyond[family]));
        }
    }
    found
}

/// What of these names a port, once for each protocol.
fn asked(moves: &[Move]) -> Vec<Asked> {
    let of = |moved: &Move| {
        let addr = moved.prefix.first();
        let ports = moved.ports.iter().cloned().flatten().take(MAX_PORTS);
        let each = |port| {
            let both = [TCP, UDP].into_iter();
            let taken = both.filter(move |&it| moved.transport.is_some() || it == TCP);
            taken.map(move |protocol| Asked {
                addr,
                protocol,
                port,
            })
        };
        let all: Vec<Asked> = ports.flat_map(each).collect();
        let takes = |it: &Asked| moved.takes(it.protocol, Some(it.port));
        all.into_iter().filter(takes).collect::<Vec<_>>()
    };
    moves.iter().flat_map(of).take(MAX_PORTS).collect()
}

/// Whether it takes what is delivered. A socket of IPv6 takes IPv4 as well, unless it was told not
/// to (`IPV6_V6ONLY`, ipv6(7)).
pub(super) fn is_there(listener: &Listener, protocol: u8, port: u16) -> bool {
    match listener {
        Listener::Here => true,
        Listener::OnIpv6 => !sockets::only_v6(protocol, port).unwrap_or(false),
        Listener::At(_) | Listener::Nobody => false,
    }
}

fn listens(listener: &Listener, to: SocketAddr, asked: &Asked, missing: &mut bool) -> Finding {
    let cause = if is_there(listener, asked.protocol, to.port()) {
        None
    } else {
        nobody_there(listener, to, asked, true)
    };
    let Some(cause) = cause else {
        return Finding::ok("listener", asked, format!("something listens on {to}"));
    };
    *missing = *listener == Listener::Nobody;
    let show = if asked.protocol == TCP {
        "-ltnp"
    } else {
        "-lunp"
    };
    let show = format!("ss {show} 'sport = :{}'", to.port());
    let bind = match listener {
        Listener::Nobody => "start the application, or name the port where it listens (--deliver)",
        Listener::At(_) | Listener::Here | Listener::OnIpv6 => "let it listen there, or on any",
    };
    Finding::warn("listener", asked, format!("{}: {bind}", cause.text), show)
}

fn forwards_not(v4: bool, certain: bool) -> Finding {
    let Cause { text, remedy, .. } = forwarding_off(v4);
    let object = if v4 { "IPv4" } else { "IPv6" };
    let command = in_backticks(&remedy);
    if certain {
        return Finding::fail("forwarding", object, text, command);
    }
    let text = format!("{text}; if the application is to run in one");
    Finding::warn("forwarding", object, text, command)
}

/// The command within a remedy for people.
fn in_backticks(remedy: &str) -> String {
    remedy.split('`').nth(1).unwrap_or(remedy).to_owned()
}

/// Whether answers to clients come to ipmoved.
pub(super) fn ways(
    netlink: &Netlink,
    rules: &Ruleset,
    addr: IpAddr,
    carries: &dyn Fn(u32) -> bool,
) -> Vec<Finding> {
    let Some(client) = PUBLIC.into_iter().find(|it| it.is_ipv4() == addr.is_ipv4()) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    // Where there is none, ipmoved makes one.
    let has_default = netlink.route_get(client, None, None).is_ok();
    let others = netlink.rules(Family::of(client)).unwrap_or_default();
    let by_main = || {
        let pref = before(&others);
        format!("{} rule add pref {pref} from {addr} lookup main", ip(addr))
    };
    let query = RouteQuery {
        dst: client,
        src: Some(addr),
        mark: None,
        from: None,
    };
    if let Some(Cause { text, .. }) = no_way_back(query, netlink, carries).filter(|_| has_default) {
        found.push(Finding::fail("route", addr, text, by_main()));
    } else if has_default {
        let (astray, dropped) = causes::by_mark(query, netlink, carries);
        let marks = astray.into_iter().chain(dropped).next();
        if let Some(Cause { text, .. }) = marks.filter(|_| rules.sets_marks()) {
            found.push(Finding::warn("rules", addr, text, by_main()));
        }
    }
    if found.is_empty() {
        let text = "what is answered from there comes to ipmoved";
        found.push(Finding::ok("route", addr, text));
    }
    found
}

/// Whether the kernel drops what clients send, since by its rules the way back to them is another
/// than the one by which ipmoved delivers.
fn rp_filter(netlink: &Netlink, to: SocketAddr, asked: &Asked, by: &Link) -> Option<Finding> {
    let mut clients = PUBLIC.into_iter().filter(|_| to.is_ipv4());
    let query = RouteQuery {
        dst: clients.find(IpAddr::is_ipv4)?,
        src: Some(to.ip()),
        mark: None,
        from: Some((asked.protocol, to.port())),
    };
    let error = netlink.takes(query, by.index).err()?;
    // The kernel says EXDEV, and from Linux 6.13 on EINVAL, as of other addresses that cannot be.
    let refused = matches!(error.errno(), Some(Errno::XDEV | Errno::INVAL));
    let filters = look::rp_filters(std::slice::from_ref(by));
    let (name, settings) = filters.into_iter().next().filter(|_| refused)?;
    let text = format!(
        "reverse path filtering drops clients' packets to {to}: by this server's rules the way \
         back is not {name}"
    );
    let remedy = format!("sysctl -w {settings}");
    Some(Finding::fail("rp_filter", name, text, remedy))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::finding::Grade;

    fn web() -> Asked {
        Asked {
            addr: "192.0.2.5".parse().unwrap(),
            protocol: TCP,
            port: 80,
        }
    }

    #[test]
    fn who_listens_is_told_by_port() {
        let to: SocketAddr = "198.51.100.2:80".parse().unwrap();
        let mut missing = false;
        let mut says = |listener: Listener| listens(&listener, to, &web(), &mut missing);
        assert_eq!(says(Listener::Here).result, Grade::Ok);
        assert_eq!(says(Listener::OnIpv6).result, Grade::Ok);
        let on_lo = says(Listener::At("127.0.0.1".parse().unwrap()));
        assert_eq!(on_lo.result, Grade::Warn);
        assert!(on_lo.text.contains("on 127.0.0.1 alone"), "{}", on_lo.text);
        let nobody = says(Listener::Nobody);
        let show = "ss -ltnp 'sport = :80'";
        assert_eq!(nobody.remedy.as_deref(), Some(show));
        assert!(missing);
    }

    #[test]
    fn ports_that_move_are_asked_for_each_once() {
        let of = |text: &str| {
            let asked = asked(&[text.parse().unwrap()]);
            asked.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        let http = ["192.0.2.5:80/tcp", "192.0.2.5:81/tcp"];
        assert_eq!(of("192.0.2.5:80-81/tcp"), http);
        assert_eq!(of("192.0.2.5:80-81"), http, "of both one is enough");
        assert_eq!(of("192.0.2.5:53/udp"), ["192.0.2.5:53/udp"]);
        assert!(of("192.0.2.5").is_empty());
        assert_eq!(of("192.0.2.5:1-60000").len(), MAX_PORTS);
    }

    #[test]
    fn a_command_is_found_within_a_remedy() {
        let Cause { remedy, .. } = forwarding_off(true);
        assert_eq!(in_backticks(&remedy), "sysctl -w net.ipv4.ip_forward=1");
    }
}
