//! What the new server knows of itself: its addresses, the networks it is in, and the hosts that it
//! cannot do without.
//!
//! Owns the reading, and what counts as a network of this server's own. What follows from it is
//! `policy`'s business.
//!
//! A network is this server's own if it is connected to it, or if it is private and has a route:
//!
//! | route | own |
//! |---|---|
//! | on a link with neighbours (Ethernet, bridges), without a gateway | yes |
//! | made by the kernel, because of an address on any link | yes |
//! | on another link (WireGuard, PPP), without a gateway | if private |
//! | by a gateway, wherever | if private |
//! | shorter than /8 or /16 (half of the Internet, as VPNs have it), not private | no |
//! | more than one address that is local (`local 192.0.2.0/24 dev lo`) | yes |
//! | the same in a table of its own, as of transparent proxies, or too short | no |
//!
//! Behind a link without neighbours may lie what is behind its other end, the whole Internet in a
//! hundred pieces included.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use tracing::debug;

use super::policy::Addresses;
use super::setup::Uplinks;
use crate::flow::networks::OwnNetwork;
use crate::kernel::netlink::{
    Address, Family, Link, ListedRoute, Netlink, NetlinkError, RouteKind, TABLE_LOCAL, TABLE_MAIN,
};
use crate::kernel::plan::PUBLIC;
use crate::model::prefix::Prefix;

/// How long what was read of routes and resolvers is good for.
const GOOD_FOR: Duration = Duration::from_secs(5);

/// Routes are read again no sooner than this many times what reading them took. The tables of a
/// router in the default-free zone take a second, and everything else waits meanwhile.
const REST: u32 = 100;

/// Most networks of its own that a server has: more than one for each node of a large cluster.
/// Beyond it all private addresses count as this server's own, and further public ones do not.
const MAX_NETWORKS: usize = 4_096;

/// Most gateways that are protected: more than an Internet exchange has members. Further ones are
/// not.
const MAX_GATEWAYS: usize = 4_096;

/// Most resolvers that are protected; the C library asks three.
const MAX_RESOLVERS: usize = 32;

/// Most bytes that are read of a list of resolvers.
const MAX_RESOLV_CONF: u64 = 64 << 10;

/// Where the resolvers stand. systemd-resolved names itself in the first, and in the second those
/// that it asks.
const RESOLV_CONF: [&str; 2] = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];

/// The prefixes that everybody may use at home: RFC 1918, RFC 6598 (providers' NAT), RFC 4193.
const PRIVATE: [(IpAddr, u8); 5] = [
    (IpAddr::V4(Ipv4Addr::new(10, 0, 0, 0)), 8),
    (IpAddr::V4(Ipv4Addr::new(172, 16, 0, 0)), 12),
    (IpAddr::V4(Ipv4Addr::new(192, 168, 0, 0)), 16),
    (IpAddr::V4(Ipv4Addr::new(100, 64, 0, 0)), 10),
    (IpAddr::V6(Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0)), 7),
];

/// Reads the facts, and keeps those that take long.
#[derive(Debug, Default)]
pub(super) struct Facts {
    gateways: Vec<IpAddr>,
    networks: Vec<OwnNetwork>,
    /// The beginnings of the lists of resolvers.
    resolv_conf: [String; RESOLV_CONF.len()],
    /// There were more routes than are taken in.
    too_many: bool,
    /// Why the routes could not be read the last time.
    unread: Option<NetlinkError>,
    again: Option<Instant>,
}

/// What the routes say.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Routed {
    gateways: BTreeSet<IpAddr>,
    /// Own networks, each with the index of its interface.
    networks: BTreeMap<Prefix, u32>,
    /// There were more than [`MAX_NETWORKS`] or [`MAX_GATEWAYS`].
    too_many: bool,
    /// All private addresses count as own.
    all_private: bool,
}

impl Facts {
    /// Reads everything: addresses anew, routes and resolvers if they were not read a moment ago.
    ///
    /// `listed` are this host's addresses, `ways_out` the links of its default routes, and `held`
    /// those moved ones among the addresses that this daemon itself has put there. If the kernel
    /// cannot be asked for the routes, what was read of them before stays, and there is a
    /// [`Self::warning`].
    pub(super) fn read(
        &mut self,
        netlink: &Netlink,
        listed: &[Address],
        uplinks: &Uplinks,
        ways_out: &[u32],
        tun: &Link,
        held: Vec<Prefix>,
    ) -> Addresses {
        let mut addresses = Self::addresses(listed, uplinks);
        addresses.held = held;
        let by_default = of_default_routes(netlink, tun);
        let on_them = (listed.iter()).filter(|held| by_default.contains(&held.index));
        addresses.by_default = on_them.map(|held| held.addr).collect();
        addresses.uplinks = names_of(netlink, uplinks, ways_out);
        let now = Instant::now();
        if self.again.is_none_or(|again| again <= now) {
            self.unread = self.read_routes(netlink, tun).err();
            self.read_resolvers();
            self.again = Some(now + GOOD_FOR.max(now.elapsed() * REST));
        }
        addresses.gateways = self.gateways.clone();
        addresses.resolvers = resolvers(&self.resolv_conf);
        addresses.networks = self.networks.clone();
        addresses
    }

    /// A file that cannot be read any more stays as it was: it may have been replaced by one that
    /// this process may not open.
    fn read_resolvers(&mut self) {
        for (path, text) in RESOLV_CONF.into_iter().zip(&mut self.resolv_conf) {
            match beginning(path) {
                Ok(read) => *text = read,
                Err(error) => debug!(path, %error, "cannot read the resolvers"),
            }
        }
    }

    fn read_routes(&mut self, netlink: &Netlink, tun: &Link) -> Result<(), NetlinkError> {
        let links = netlink.links()?;
        let mut routed = Routed::default();
        for family in [Family::V4, Family::V6] {
            netlink.for_each_route(family, &mut |listed| routed.add(&listed, &links, tun))?;
        }
        let name = |index: u32| links.iter().find(|link| link.index == index);
        let network = |(&prefix, &index): (&Prefix, &u32)| OwnNetwork {
            prefix,
            interface: name(index).map_or_else(String::new, |link| link.name.clone()),
        };
        self.networks = routed.networks.iter().map(network).collect();
        self.gateways = routed.gateways.into_iter().collect();
        self.too_many = routed.too_many;
        Ok(())
    }

    /// The addresses alone: all that the old server needs.
    pub(super) fn addresses(listed: &[Address], uplinks: &Uplinks) -> Addresses {
        let of_uplink = listed.iter().filter(|held| uplinks.contains(held.index));
        Addresses {
            uplink: of_uplink.map(|held| held.addr).collect(),
            all: listed.iter().map(|held| held.addr).collect(),
            broadcasts: listed
                .iter()
                .filter_map(Address::broadcasts)
                .flatten()
                .collect(),
            ..Addresses::default()
        }
    }

    /// What an administrator has to know of a host whose routes cannot all be taken in.
    pub(super) fn warning(&self) -> Option<String> {
        if let Some(error) = &self.unread {
            return Some(format!(
                "cannot list this server's routes: {error}; its gateways and networks are not \
                 protected as long as they are not known"
            ));
        }
        self.too_many.then(|| {
            format!(
                "this server has more than {MAX_NETWORKS} networks or gateways of its own: \
                 clients with private addresses are refused unless --clients-from lets them in, \
                 and not every gateway is protected against being moved here"
            )
        })
    }
}

impl Routed {
    /// Takes in one route.
    fn add(&mut self, listed: &ListedRoute, links: &[Link], tun: &Link) {
        let route = &listed.route;
        if route.dev == Some(tun.index) {
            return;
        }
        if let Some(via) = route.via.filter(|_| route.kind == RouteKind::Unicast)
            && !self.gateways.contains(&via)
        {
            if self.gateways.len() < MAX_GATEWAYS {
                self.gateways.insert(via);
            } else {
                self.too_many = true;
            }
        }
        if let Some((prefix, index)) = own(listed, links) {
            self.add_network(prefix, index);
        }
    }

    fn add_network(&mut self, prefix: Prefix, index: u32) {
        if self.networks.contains_key(&prefix) || self.all_private && is_private(&prefix) {
            return;
        }
        if self.networks.len() >= MAX_NETWORKS && !self.all_private {
            (self.too_many, self.all_private) = (true, true);
            self.networks.retain(|network, _| !is_private(network));
            // The interface of one of them stands for all.
            let all = private().map(|block| (block, index));
            self.networks.extend(all);
            return self.add_network(prefix, index);
        }
        if self.networks.len() < MAX_NETWORKS + PRIVATE.len() {
            self.networks.insert(prefix, index);
        }
    }
}

/// The links that the default routes of both families leave by: clients are there, though the route
/// to the peer may leave by another. The daemon's own way out of last resort is none.
pub(super) fn of_default_routes(netlink: &Netlink, tun: &Link) -> Vec<u32> {
    let links = PUBLIC.map(|far| netlink.route_get(far, None, None).ok()?.oif);
    let mut links: Vec<u32> = links.into_iter().flatten().collect();
    links.retain(|&link| link != tun.index);
    links.dedup();
    links
}

/// The names of the uplinks, and of those that the default routes leave by.
fn names_of(netlink: &Netlink, uplinks: &Uplinks, ways_out: &[u32]) -> Vec<String> {
    let names = uplinks.iter().map(|link| link.name.clone());
    let others = ways_out.iter().filter(|&&index| !uplinks.contains(index));
    let link = |&index: &u32| netlink.link_by_index(index).ok().flatten();
    names
        .chain(others.filter_map(link).map(|link| link.name))
        .collect()
}

/// The network of this server's own that a route leads to, and its interface.
fn own(listed: &ListedRoute, links: &[Link]) -> Option<(Prefix, u32)> {
    let route = &listed.route;
    let prefix = Prefix::of(route.dst.0, route.dst.1);
    let index = route.dev?;
    let link = links.iter().find(|link| link.index == index)?;
    let shortest = if prefix.is_ipv4() { 8 } else { 16 };
    let is_network = prefix.len() >= shortest || is_private(&prefix);
    let own = match route.kind {
        // Each single one is among the addresses. What transparent proxies take lies in a table of
        // theirs, mostly all addresses there are, behind a mark: these are somebody else's.
        RouteKind::Local => {
            let for_all = matches!(route.table, TABLE_LOCAL | TABLE_MAIN);
            for_all && is_network && !prefix.is_single() && !prefix.first().is_loopback()
        }
        RouteKind::Unicast if link.loopback => false,
        RouteKind::Unicast => {
            let has_neighbours = listed.by_kernel || link.mac.is_some();
            let connected = route.via.is_none() && has_neighbours && is_network;
            connected || is_private(&prefix)
        }
        RouteKind::Blackhole | RouteKind::Other(_) => false,
    };
    own.then_some((prefix, index))
}

fn private() -> impl Iterator<Item = Prefix> {
    PRIVATE.iter().map(|&(addr, len)| Prefix::of(addr, len))
}

fn is_private(prefix: &Prefix) -> bool {
    private().any(|block| block.covers(prefix))
}

/// The name servers in these texts (resolv.conf(5)).
fn resolvers(texts: &[String]) -> Vec<IpAddr> {
    let named = texts
        .iter()
        .flat_map(|text| text.lines())
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let addr = words.next().filter(|&word| word == "nameserver");
            let addr = addr.and(words.next())?;
            // An IPv6 address may have its interface behind it.
            addr.split('%').next()?.parse().ok()
        });
    let mut all: Vec<IpAddr> = Vec::new();
    for addr in named {
        if !all.contains(&addr) && all.len() < MAX_RESOLVERS {
            all.push(addr);
        }
    }
    all
}

/// The beginning of a file; nothing if there is none.
fn beginning(path: &str) -> io::Result<String> {
    let file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(String::new()),
        opened => opened?,
    };
    let mut bytes = Vec::new();
    file.take(MAX_RESOLV_CONF).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::setup::find_uplinks;
    use crate::kernel::netlink::Route;
    use crate::lab::Namespace;
    use crate::lab::wiring::Wiring;

    const ETH: u32 = 2;
    const WIREGUARD: u32 = 3;
    const TUN: u32 = 4;

    fn link(index: u32, mac: Option<[u8; 6]>) -> Link {
        Link {
            index,
            name: format!("link{index}"),
            mtu: 1_500,
            up: true,
            loopback: index == 1,
            link_type: libc::ARPHRD_ETHER,
            mac,
            port: false,
            big_tcp: false,
            to_many: false,
        }
    }

    fn links() -> [Link; 4] {
        let mac = Some([2, 0, 0, 0, 0, 1]);
        let [lo, eth] = [link(1, Some([0; 6])), link(ETH, mac)];
        [lo, eth, link(WIREGUARD, None), link(TUN, None)]
    }

    fn route(dst: &str, via: Option<&str>, dev: u32, by_kernel: bool) -> ListedRoute {
        let dst: Prefix = dst.parse().unwrap();
        ListedRoute {
            route: Route {
                via: via.map(|via| via.parse().unwrap()),
                dev: Some(dev),
                ..Route::to(dst.first(), dst.len())
            },
            by_kernel,
        }
    }

    fn routed(routes: &[ListedRoute]) -> Routed {
        let mut routed = Routed::default();
        for listed in routes {
            routed.add(listed, &links(), &links()[3]);
        }
        routed
    }

    #[test]
    fn networks_are_own_that_are_connected_or_private() {
        let gateway = Some("198.51.100.254");
        for (dst, via, dev, by_kernel, own) in [
            ("198.51.100.0/24", None, ETH, true, true),
            ("203.0.113.5", None, ETH, false, true),
            ("2001:db8:b::/64", None, ETH, true, true),
            ("10.9.0.0/24", None, ETH, true, true),
            // By a gateway: the Internet (a router has all of it, in a million routes), or private.
            ("0.0.0.0/0", gateway, ETH, false, false),
            ("203.0.113.0/24", gateway, ETH, false, false),
            ("10.0.0.0/8", gateway, ETH, false, true),
            ("172.31.0.0/16", gateway, ETH, false, true),
            ("172.32.0.0/16", gateway, ETH, false, false),
            ("100.64.7.0/24", gateway, ETH, false, true),
            ("fd00::/8", Some("2001:db8:b::fe"), ETH, false, true),
            ("fc00::/7", Some("2001:db8:b::fe"), ETH, false, true),
            ("2001:db8:f::/48", Some("2001:db8:b::fe"), ETH, false, false),
            // A tunnel that takes everything, as `wg-quick` and OpenVPN write it.
            ("0.0.0.0/0", None, WIREGUARD, false, false),
            ("0.0.0.0/1", None, WIREGUARD, false, false),
            ("128.0.0.0/1", None, ETH, false, false),
            ("8000::/1", None, ETH, false, false),
            ("11.0.0.0/8", None, WIREGUARD, false, false),
            ("192.169.0.0/16", None, WIREGUARD, false, false),
            ("2000::/3", None, ETH, false, false),
            // A tunnel to another site, and to one peer.
            ("10.8.0.0/24", None, WIREGUARD, false, true),
            ("203.0.113.77", None, WIREGUARD, true, true),
            // The daemon's own.
            ("10.0.0.0/8", None, TUN, false, false),
        ] {
            let networks = routed(&[route(dst, via, dev, by_kernel)]).networks;
            let own = own.then(|| (dst.parse().unwrap(), dev));
            assert_eq!(networks, BTreeMap::from_iter(own), "{dst} {via:?} {dev}");
        }
        let of_kind = |dst: &str, kind| {
            let mut listed = route(dst, None, 1, false);
            listed.route.kind = kind;
            routed(&[listed]).networks.len()
        };
        assert_eq!(of_kind("192.0.2.0/24", RouteKind::Local), 1);
        assert_eq!(of_kind("192.0.2.5", RouteKind::Local), 0);
        assert_eq!(of_kind("127.0.0.0/8", RouteKind::Local), 0);
        assert_eq!(of_kind("10.0.0.0/8", RouteKind::Blackhole), 0);
        // What transparent proxies, meshes and PROXY-protocol daemons take.
        assert_eq!(of_kind("0.0.0.0/0", RouteKind::Local), 0);
        assert_eq!(of_kind("2000::/3", RouteKind::Local), 0);
        let mut listed = route("203.0.113.0/24", None, 1, false);
        (listed.route.kind, listed.route.table) = (RouteKind::Local, 133);
        assert!(routed(&[listed]).networks.is_empty());
        assert_eq!(of_kind("10.0.0.0/8", RouteKind::Unicast), 0, "on lo");
    }

    #[test]
    fn every_next_hop_is_a_gateway() {
        let routed = routed(&[
            route("0.0.0.0/0", Some("198.51.100.254"), ETH, false),
            route("203.0.113.0/24", Some("2001:db8:b::fe"), ETH, false),
            route("203.0.113.0/24", Some("198.51.100.253"), ETH, false),
            route("10.0.0.0/8", Some("10.1.1.1"), TUN, false),
            route("198.51.100.0/24", None, ETH, true),
        ]);
        let gateways: Vec<String> = routed.gateways.iter().map(ToString::to_string).collect();
        assert_eq!(
            gateways,
            ["198.51.100.253", "198.51.100.254", "2001:db8:b::fe"]
        );
        assert!(!routed.too_many);
    }

    #[test]
    fn beyond_the_limit_all_private_addresses_are_own() {
        let nodes = (0..MAX_NETWORKS as u32 + 100).map(|node| {
            let dst = Ipv4Addr::from(0x0a00_0000 + (node << 8));
            route(&format!("{dst}/24"), Some("198.51.100.9"), ETH, false)
        });
        let mut routes = vec![route("198.51.100.0/24", None, ETH, true)];
        routes.extend(nodes);
        routes.push(route("203.0.113.0/24", None, ETH, true));
        let routed = routed(&routes);
        assert!(routed.too_many);
        let mut expected: Vec<Prefix> = private().collect();
        let public = ["198.51.100.0/24", "203.0.113.0/24"];
        expected.extend(public.map(|prefix| prefix.parse::<Prefix>().unwrap()));
        expected.sort_unstable();
        assert!(routed.networks.keys().eq(expected.iter()), "{routed:?}");
    }

    #[test]
    fn resolvers_are_found_in_both_files() {
        let stub = "# made by systemd-resolved\nnameserver 127.0.0.53\noptions edns0\n";
        let real = "nameserver\t192.0.2.53\nnameserver fe80::1%eth0\n;nameserver 192.0.2.54\n\
                    nameservers 192.0.2.55\nnameserver\nnameserver www\nnameserver 127.0.0.53\n";
        let found = resolvers(&[stub.into(), real.into()]);
        let found: Vec<String> = found.iter().map(ToString::to_string).collect();
        assert_eq!(found, ["127.0.0.53", "192.0.2.53", "fe80::1"]);
        let many: String = (0..99)
            .map(|n| format!("nameserver 192.0.2.{n}\n"))
            .collect();
        assert_eq!(resolvers(&[many]).len(), MAX_RESOLVERS);
        assert_eq!(beginning("/nonexistent").unwrap(), "");
        assert!(beginning("/proc/self/mem").is_err());
    }

    #[test]
    fn clients_are_where_the_default_routes_leave_though_the_peer_is_elsewhere() {
        let namespace = Namespace::new("facts").expect("run the tests as root");
        let look = || {
            let netlink = Netlink::new().unwrap();
            let link = |name: &str, addr: &str| {
                netlink.add_veth(name, &format!("{name}far"), None).unwrap();
                for name in [format!("{name}far"), name.to_owned()] {
                    let link = netlink.link_by_name(&name).unwrap().unwrap();
                    netlink.set_link_up(link.index).unwrap();
                }
                let index = netlink.link_by_name(name).unwrap().unwrap().index;
                let address = Address {
                    index,
                    addr: addr.parse().unwrap(),
                    prefix: 24,
                };
                netlink.add_address(&address).unwrap();
                index
            };
            let (public, _) = (link("pub0", "198.51.100.2"), link("priv0", "10.0.0.2"));
            let route = Route {
                dev: Some(public),
                ..Route::default_of(Family::V4)
            };
            netlink.add_route(&route).unwrap();
            let peer = "10.0.0.9".parse().unwrap();
            let uplinks = find_uplinks(&netlink, None, &[], &[peer], "tun").unwrap();
            let ways_out = of_default_routes(&netlink, &self::link(99, None));
            assert_eq!(ways_out, [public]);
            assert_eq!(names_of(&netlink, &uplinks, &[]), ["priv0"]);
            assert_eq!(names_of(&netlink, &uplinks, &ways_out), ["priv0", "pub0"]);
            // The last resort is the daemon's own.
            assert!(of_default_routes(&netlink, &self::link(public, None)).is_empty());
            Ok(())
        };
        namespace.run(look).unwrap();
    }
}
