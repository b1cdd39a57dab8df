//! The standard lab: who is where.
//!
//! ```text
//!                                                          ┌──────────────────────────────┐
//!                                               .254 ┌─────┤ old server "A"               │
//!  ┌──────────────────┐         ┌────────────┐  ::fe │ eth0│ 192.0.2.1      2001:db8:a::1 │
//!  │ clients          │ .1  ::1 │            ├───────┘     │ 192.0.2.5 …    2001:db8:a::5 │ moved
//!  │ 203.0.113.10     ├─────────┤   router   │ old         └──────────────────────────────┘
//!  │ 203.0.113.11     │eth0     │            │ new         ┌──────────────────────────────┐
//!  │ 2001:db8:c::10   │  clients│            ├───────┐     │ new server "B"               │
//!  │ 2001:db8:c::11   │         └────────────┘  .254 │ eth0│ 198.51.100.2   2001:db8:b::2 │
//!  └──────────────────┘                         ::fe └─────┤                              │
//!                                                          └──────────────────────────────┘
//! ```
//!
//! Owns the addresses, links, routes and the sysctls that a careful administrator sets: strict
//! `rp_filter` on both servers, forwarding on the router alone. All addresses are from the blocks
//! for documentation (RFC 5737, RFC 3849). Labs do not depend on each other, so tests run side by
//! side.

use std::fs::{self, Permissions};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use netlink_packet_route::link::InfoKind;

use super::traffic::Client;
use super::wiring::Wiring;
use super::{Doing, LabError, Namespace, Result, Tap, poll_until};
use crate::kernel::netlink::{Address, Family, Netlink, NetlinkError, Route, RouteKind};

/// The first client's address.
pub const CLIENT: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// The first client's IPv6 address.
pub const CLIENT6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xc, 0, 0, 0, 0, 0x10);
/// The second client's address.
pub const SECOND_CLIENT: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 11);
/// The second client's IPv6 address.
pub const SECOND_CLIENT6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xc, 0, 0, 0, 0, 0x11);
/// The old server's own address.
pub const OLD: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// The old server's own IPv6 address.
pub const OLD6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xa, 0, 0, 0, 0, 1);
/// The moved address, configured on the old server.
pub const MOVED: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 5);
/// The moved IPv6 address, configured on the old server.
pub const MOVED6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xa, 0, 0, 0, 0, 5);
/// The new server's address.
pub const NEW: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
/// The new server's IPv6 address.
pub const NEW6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xb, 0, 0, 0, 0, 2);

/// The interface of each host but the router.
pub const UPLINK: &str = "eth0";

/// Most moved addresses of a lab: 192.0.2.5 to 192.0.2.204.
pub const MAX_MOVED: u8 = 200;

/// How long the kernel may take to bring up three links; it takes milliseconds.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(5);

const ROUTER_CLIENTS: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
const ROUTER_CLIENTS6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xc, 0, 0, 0, 0, 1);
/// The router's address on the old server's side.
pub const ROUTER_OLD: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 254);
const ROUTER_OLD6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xa, 0, 0, 0, 0, 0xfe);
/// The router's address on the new server's side.
pub const ROUTER_NEW: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 254);
const ROUTER_NEW6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xb, 0, 0, 0, 0, 0xfe);

/// One of the three links of the lab.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Leg {
    /// Between the clients and the router.
    Clients,
    /// Between the router and the old server.
    Old,
    /// Between the router and the new server.
    New,
}

impl Leg {
    /// The router's interface on this link.
    pub fn router_interface(self) -> &'static str {
        match self {
            Self::Clients => "clients",
            Self::Old => "old",
            Self::New => "new",
        }
    }
}

/// The differences from the standard lab.
#[derive(Clone, Debug)]
pub struct LabBuilder {
    mtus: Vec<(Leg, u32)>,
    moved: u8,
    rp_filter: bool,
}

impl Default for LabBuilder {
    fn default() -> Self {
        Self {
            mtus: Vec::new(),
            moved: 1,
            rp_filter: true,
        }
    }
}

impl LabBuilder {
    /// Sets the MTU of one link, at both ends (1500 otherwise).
    #[must_use]
    pub fn mtu(mut self, leg: Leg, mtu: u32) -> Self {
        self.mtus.push((leg, mtu));
        self
    }

    /// Sets how many moved addresses of each family the old server holds: 192.0.2.5, 192.0.2.6, …
    /// (1 otherwise, at most [`MAX_MOVED`]).
    #[must_use]
    pub fn moved(mut self, count: u8) -> Self {
        self.moved = count.min(MAX_MOVED);
        self
    }

    /// Builds servers without strict reverse path filtering.
    #[must_use]
    pub fn without_rp_filter(mut self) -> Self {
        self.rp_filter = false;
        self
    }

    /// Builds the lab.
    ///
    /// # Errors
    /// [`LabError::Privileges`] without the privileges to make network namespaces.
    pub fn build(self) -> Result<Lab> {
        let lab = Lab {
            clients: Namespace::new("clients")?,
            router: Namespace::new("router")?,
            old: Namespace::new("old server")?,
            new: Namespace::new("new server")?,
            dir: LabDir::new()?,
        };
        let hosts = [
            (&lab.clients, false, false),
            (&lab.router, true, false),
            (&lab.old, false, self.rp_filter),
            (&lab.new, false, self.rp_filter),
        ];
        for (host, forwarding, rp_filter) in hosts {
            // New interfaces start with the settings of `default`, which a new namespace may have
            // inherited from the machine. So we write each of them, off or on.
            let forwarding = if forwarding { "1" } else { "0" };
            let rp_filter = if rp_filter { "1" } else { "0" };
            host.set_sysctls(&[
                ("ipv4/ip_forward", forwarding),
                ("ipv6/conf/all/forwarding", forwarding),
                ("ipv6/conf/default/forwarding", forwarding),
                ("ipv4/conf/all/rp_filter", rp_filter),
                ("ipv4/conf/default/rp_filter", rp_filter),
                ("ipv6/conf/all/disable_ipv6", "0"),
                ("ipv6/conf/default/disable_ipv6", "0"),
                // Nobody advertises anything here. A late change would look like a daemon's.
                ("ipv6/conf/default/accept_ra", "0"),
                ("ipv6/conf/default/router_solicitations", "0"),
                ("ipv6/conf/all/accept_dad", "0"),
                ("ipv6/conf/default/accept_dad", "0"),
                ("ipv4/ping_group_range", "0 2147483647"),
            ])?;
            host.run(|| netlink("bring lo up", |netlink| set_up(netlink, "lo", None, &[])))?;
        }
        let moved4 = (0..self.moved).map(|n| (IpAddr::from(moved(n)), 24));
        let moved6 = (0..self.moved).map(|n| (IpAddr::from(moved6(n)), 64));
        let on_old: Vec<_> = [(OLD.into(), 24), (OLD6.into(), 64)]
            .into_iter()
            .chain(moved4)
            .chain(moved6)
            .collect();
        let on_clients = [
            (CLIENT.into(), 24),
            (SECOND_CLIENT.into(), 24),
            (CLIENT6.into(), 64),
            (SECOND_CLIENT6.into(), 64),
        ];
        let on_new = [(NEW.into(), 24), (NEW6.into(), 64)];
        let legs = [
            (Leg::Clients, &lab.clients, &on_clients[..]),
            (Leg::Old, &lab.old, &on_old[..]),
            (Leg::New, &lab.new, &on_new[..]),
        ];
        for (leg, host, addresses) in legs {
            let mtu = self.mtus.iter().rev().find(|(of, _)| *of == leg);
            let mtu = mtu.map(|&(_, mtu)| mtu);
            lab.wire(leg, host, gateways(leg), mtu)?;
            settle(host, addresses, gateways(leg), mtu)?;
        }
        for host in [&lab.clients, &lab.old, &lab.new] {
            settled(host)?;
        }
        Ok(lab)
    }
}

/// The `n`th moved address: 192.0.2.5 is number 0.
pub fn moved(n: u8) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(MOVED) + u32::from(n))
}

/// The own address of the `n`th further old server, from the block for benchmarks (RFC 2544).
pub fn more_old(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(198, 18, n, 1)
}

/// The moved address of the `n`th further old server.
pub fn more_moved(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(198, 18, n, 5)
}

/// The `n`th moved IPv6 address: 2001:db8:a::5 is number 0.
pub fn moved6(n: u8) -> Ipv6Addr {
    Ipv6Addr::from(u128::from(MOVED6) + u128::from(n))
}

/// A client, a router, an old and a new server. Everything vanishes when it is dropped.
#[derive(Debug)]
pub struct Lab {
    clients: Namespace,
    router: Namespace,
    old: Namespace,
    new: Namespace,
    dir: LabDir,
}

impl Lab {
    /// The standard lab.
    pub fn new() -> Result<Self> {
        Self::builder().build()
    }

    /// A lab that differs from the standard.
    pub fn builder() -> LabBuilder {
        LabBuilder::default()
    }

    /// The first client, [`CLIENT`].
    pub fn client(&self) -> Client<'_> {
        Client::new(&self.clients, CLIENT, CLIENT6)
    }

    /// The second client, [`SECOND_CLIENT`], on the same host.
    pub fn second_client(&self) -> Client<'_> {
        Client::new(&self.clients, SECOND_CLIENT, SECOND_CLIENT6)
    }

    /// The host of the clients.
    pub fn clients(&self) -> &Namespace {
        &self.clients
    }

    /// The router.
    pub fn router(&self) -> &Namespace {
        &self.router
    }

    /// The old server, A.
    pub fn old_server(&self) -> &Namespace {
        &self.old
    }

    /// The new server, B.
    pub fn new_server(&self) -> &Namespace {
        &self.new
    }

    /// Adds an old server, `n` from 1 to 200, at [`more_old`], with one moved address,
    /// [`more_moved`].
    pub fn add_old_server(&self, n: u8) -> Result<Namespace> {
        let host = Namespace::new(&format!("old server {n}"))?;
        host.set_sysctls(&[
            ("ipv4/conf/all/rp_filter", "1"),
            ("ipv4/conf/default/rp_filter", "1"),
        ])?;
        host.run(|| netlink("bring lo up", |netlink| set_up(netlink, "lo", None, &[])))?;
        let at_router = format!("old{n}");
        let gateway = Ipv4Addr::new(198, 18, n, 254);
        self.router.run(|| {
            netlink("connect a host to the router", |netlink| {
                netlink.add_veth(&at_router, UPLINK, Some(host.fd().as_fd()))?;
                set_up(netlink, &at_router, None, &[(gateway.into(), 24)])
            })
        })?;
        host.run(|| {
            netlink("give a host its addresses", |netlink| {
                let addresses = [(more_old(n).into(), 24), (more_moved(n).into(), 24)];
                set_up(netlink, UPLINK, None, &addresses)?;
                netlink.add_route(&Route {
                    via: Some(gateway.into()),
                    ..Route::default_of(Family::V4)
                })
            })
        })?;
        Ok(host)
    }

    /// Gives a host's uplink one more address, or takes one away.
    pub fn set_address(
        &self,
        host: &Namespace,
        interface: &str,
        addr: impl Into<IpAddr>,
        prefix: u8,
        present: bool,
    ) -> Result<()> {
        let addr = addr.into();
        host.run(|| {
            netlink("change an address", |netlink| {
                let address = Address {
                    index: index_of(netlink, interface)?,
                    addr,
                    prefix,
                };
                if present {
                    netlink.add_address(&address)
                } else {
                    netlink.delete_address(&address)
                }
            })
        })
    }

    /// Gives a host one more link, with these addresses. Nobody is at its other end.
    pub fn add_link(
        &self,
        host: &Namespace,
        interface: &str,
        addresses: &[(IpAddr, u8)],
    ) -> Result<()> {
        let end = format!("{interface}-end");
        host.run(|| {
            netlink("add a link", |netlink| {
                netlink.add_veth(interface, &end, None)?;
                set_up(netlink, &end, None, &[])?;
                set_up(netlink, interface, None, addresses)
            })
        })
    }

    /// Deletes the link between the router and a host, and makes it anew with the addresses and
    /// default routes that it had: a redial, or a network manager that builds everything again. The
    /// host is cut off for `pause`.
    pub fn remake(&self, leg: Leg, pause: Duration) -> Result<()> {
        let addresses = self.unplug(leg)?;
        std::thread::sleep(pause);
        self.plug(leg)?;
        self.configure(leg, &addresses)
    }

    /// Deletes the link between the router and a host; returns the addresses that the host had on
    /// it, with their prefix lengths.
    pub fn unplug(&self, leg: Leg) -> Result<Vec<(IpAddr, u8)>> {
        self.host(leg).run(|| {
            netlink("cut a host off", |netlink| {
                let index = index_of(netlink, UPLINK)?;
                let held = addresses_of(netlink, index)?;
                netlink.delete_interface(index)?;
                Ok(held)
            })
        })
    }

    /// Makes the link between the router and a host anew. The host has not set it up yet.
    pub fn plug(&self, leg: Leg) -> Result<()> {
        self.wire(leg, self.host(leg), gateways(leg), None)
    }

    /// Sets the link of a host up, with these addresses and default routes.
    pub fn configure(&self, leg: Leg, addresses: &[(IpAddr, u8)]) -> Result<()> {
        settle(self.host(leg), addresses, gateways(leg), None)
    }

    /// Connects a host to the router by one more link, with an interface of the same name at both
    /// ends. Each address comes with its prefix length.
    pub fn add_leg(
        &self,
        host: &Namespace,
        interface: &str,
        addresses: &[(IpAddr, u8)],
        gateways: &[(IpAddr, u8)],
    ) -> Result<()> {
        self.router.run(|| {
            netlink("connect a host to the router once more", |netlink| {
                netlink.add_veth(interface, interface, Some(host.fd().as_fd()))?;
                set_up(netlink, interface, None, gateways)
            })
        })?;
        host.run(|| {
            netlink("give a host one more link", |netlink| {
                set_up(netlink, interface, None, addresses)
            })
        })
    }

    /// Puts one more host behind a bridge of another, as a container or a virtual machine is. The
    /// bridge is made with the addresses of `gateways`, unless it is there.
    pub fn add_behind(
        &self,
        host: &Namespace,
        (bridge, port): (&str, &str),
        addresses: &[(IpAddr, u8)],
        gateways: &[(IpAddr, u8)],
    ) -> Result<Namespace> {
        let behind = Namespace::new(port)?;
        host.run(|| {
            netlink("put a host behind another", |netlink| {
                if netlink.link_by_name(bridge)?.is_none() {
                    netlink.add_interface(bridge, InfoKind::Bridge)?;
                    set_up(netlink, bridge, None, gateways)?;
                }
                netlink.add_veth(port, UPLINK, Some(behind.fd().as_fd()))?;
                netlink.set_master(index_of(netlink, port)?, index_of(netlink, bridge)?)?;
                set_up(netlink, port, None, &[])
            })
        })?;
        behind.run(|| {
            netlink("give a host its addresses", |netlink| {
                set_up(netlink, "lo", None, &[])?;
                set_up(netlink, UPLINK, None, addresses)?;
                for &(gateway, _) in gateways {
                    netlink.add_route(&Route {
                        via: Some(gateway),
                        ..Route::default_of(Family::of(gateway))
                    })?;
                }
                Ok(())
            })
        })?;
        behind.set_sysctls(&[("ipv4/ping_group_range", "0 2147483647")])?;
        Ok(behind)
    }

    /// Adds an interface that receives nothing to a host, with an address: a bridge without ports.
    pub fn add_deaf(&self, host: &Namespace, interface: &str, addr: IpAddr) -> Result<()> {
        host.run(|| {
            netlink("add an interface that receives nothing", |netlink| {
                netlink.add_interface(interface, InfoKind::Bridge)?;
                let address = (addr, Family::of(addr).bits());
                set_up(netlink, interface, None, &[address])
            })
        })
    }

    /// Makes a host's uplink the port of a new bridge, which takes over its addresses and default
    /// routes.
    pub fn put_into_bridge(&self, leg: Leg, bridge: &str) -> Result<()> {
        let gateways = gateways(leg).map(|(gateway, _)| gateway);
        self.host(leg).run(|| {
            netlink("put an uplink into a bridge", |netlink| {
                let port = index_of(netlink, UPLINK)?;
                let held = addresses_of(netlink, port)?;
                // The secondary ones first: they go with the first of their network.
                for &(addr, prefix) in held.iter().rev() {
                    netlink.delete_address(&Address {
                        index: port,
                        addr,
                        prefix,
                    })?;
                }
                netlink.add_interface(bridge, InfoKind::Bridge)?;
                let index = index_of(netlink, bridge)?;
                netlink.set_master(port, index)?;
                set_up(netlink, bridge, None, &held)?;
                for gateway in gateways {
                    let by = |dev| Route {
                        via: Some(gateway),
                        dev: Some(dev),
                        ..Route::default_of(Family::of(gateway))
                    };
                    // That of IPv4 went with its address.
                    match netlink.delete_route(&by(port)) {
                        Err(error) if !error.is_missing() => return Err(error),
                        Ok(()) | Err(_) => netlink.add_route(&by(index))?,
                    }
                }
                Ok(())
            })
        })
    }

    /// Starts a tap where a host meets the router. On the new server's link it is the router's end:
    /// at its own the new server sees clients' packets, which were never on the wire.
    pub fn tap(&self, leg: Leg) -> Result<Tap> {
        match leg {
            Leg::Clients => Tap::start(&self.clients, UPLINK),
            Leg::Old => Tap::start(&self.old, UPLINK),
            Leg::New => Tap::start(&self.router, leg.router_interface()),
        }
    }

    /// A directory for keys and run-time files. Only root can read it, and it vanishes with the
    /// lab.
    pub fn dir(&self) -> &Path {
        &self.dir.0
    }

    /// Makes the router drop everything to `addr` silently (`false`), or no longer (`true`): a path
    /// that fails somewhere far away.
    pub fn set_reachable(&self, addr: impl Into<IpAddr>, reachable: bool) -> Result<()> {
        let addr = addr.into();
        let hole = Route {
            kind: RouteKind::Blackhole,
            ..Route::to(addr, Family::of(addr).bits())
        };
        self.router.run(|| {
            netlink("block or unblock a path", |netlink| {
                if reachable {
                    netlink.delete_route(&hole)
                } else {
                    netlink.add_route(&hole)
                }
            })
        })
    }

    /// Makes the router drop everything to a whole network, as if nobody were there.
    pub fn set_unreachable_net(&self, net: Ipv4Addr, prefix: u8) -> Result<()> {
        let hole = Route {
            kind: RouteKind::Blackhole,
            ..Route::to(net.into(), prefix)
        };
        self.router
            .run(|| netlink("make a network empty", |netlink| netlink.add_route(&hole)))
    }

    /// Changes the MTU of a link while everything runs: at both ends, or at the router's alone.
    pub fn set_mtu(&self, leg: Leg, mtu: u32, both_ends: bool) -> Result<()> {
        let set = |interface: &str| {
            netlink("set an MTU", |netlink| {
                netlink.set_link_mtu(index_of(netlink, interface)?, mtu)?;
                Ok(())
            })
        };
        self.router.run(|| set(leg.router_interface()))?;
        if both_ends {
            self.host(leg).run(|| set(UPLINK))?;
        }
        Ok(())
    }

    fn host(&self, leg: Leg) -> &Namespace {
        match leg {
            Leg::Clients => &self.clients,
            Leg::Old => &self.old,
            Leg::New => &self.new,
        }
    }

    fn wire(
        &self,
        leg: Leg,
        host: &Namespace,
        gateways: [(IpAddr, u8); 2],
        mtu: Option<u32>,
    ) -> Result<()> {
        let at_router = leg.router_interface();
        self.router.run(|| {
            netlink("connect a host to the router", |netlink| {
                netlink.add_veth(at_router, UPLINK, Some(host.fd().as_fd()))?;
                set_up(netlink, at_router, mtu, &gateways)
            })
        })
    }
}

/// The router's addresses on a link, with their prefix lengths.
fn gateways(leg: Leg) -> [(IpAddr, u8); 2] {
    let (v4, v6) = match leg {
        Leg::Clients => (ROUTER_CLIENTS, ROUTER_CLIENTS6),
        Leg::Old => (ROUTER_OLD, ROUTER_OLD6),
        Leg::New => (ROUTER_NEW, ROUTER_NEW6),
    };
    [(v4.into(), 24), (v6.into(), 64)]
}

/// Gives a host's uplink its addresses, and the host its default routes.
fn settle(
    host: &Namespace,
    addresses: &[(IpAddr, u8)],
    gateways: [(IpAddr, u8); 2],
    mtu: Option<u32>,
) -> Result<()> {
    host.run(|| {
        netlink("give a host its addresses", |netlink| {
            set_up(netlink, UPLINK, mtu, addresses)?;
            for (gateway, _) in gateways {
                netlink.add_route(&Route {
                    via: Some(gateway),
                    ..Route::default_of(Family::of(gateway))
                })?;
            }
            Ok(())
        })
    })
}

/// Asks the kernel something about the calling thread's namespace.
fn netlink<T>(
    action: &'static str,
    talk: impl FnOnce(&Netlink) -> Result<T, NetlinkError>,
) -> Result<T> {
    Netlink::new()
        .and_then(|netlink| talk(&netlink))
        .map_err(|error| {
            if error.is_denied() {
                return LabError::Privileges;
            }
            LabError::Step {
                action: action.into(),
                source: io::Error::other(error),
            }
        })
}

fn set_up(
    netlink: &Netlink,
    interface: &str,
    mtu: Option<u32>,
    addresses: &[(IpAddr, u8)],
) -> Result<(), NetlinkError> {
    let index = index_of(netlink, interface)?;
    if let Some(mtu) = mtu {
        netlink.set_link_mtu(index, mtu)?;
    }
    netlink.set_link_up(index)?;
    for &(addr, prefix) in addresses {
        netlink.add_address(&Address {
            index,
            addr,
            prefix,
        })?;
    }
    Ok(())
}

/// The addresses of an interface, but those that it gives itself.
fn addresses_of(netlink: &Netlink, index: u32) -> Result<Vec<(IpAddr, u8)>, NetlinkError> {
    let link_local = |addr| matches!(addr, IpAddr::V6(addr) if addr.is_unicast_link_local());
    let held = netlink.addresses()?.into_iter();
    let held = held.filter(|held| held.index == index && !link_local(held.addr));
    Ok(held.map(|held| (held.addr, held.prefix)).collect())
}

fn index_of(netlink: &Netlink, interface: &str) -> Result<u32, NetlinkError> {
    let link = netlink.link_by_name(interface)?;
    link.map(|link| link.index)
        .ok_or_else(|| io::Error::other(format!("there is no interface {interface}")).into())
}

/// Waits until the uplink of a host has its link-local address. The kernel adds that in its own
/// time, and later changes are then somebody's doing.
fn settled(host: &Namespace) -> Result<()> {
    // linux/if_addr.h
    const IFA_F_TENTATIVE: u8 = 0x40;
    let settled = || {
        host.run(|| {
            // Address, interface index, prefix length, scope, flags, interface name.
            let addresses = fs::read_to_string("/proc/thread-self/net/if_inet6")
                .doing(|| "read the IPv6 addresses".into())?;
            let mut link_local = false;
            for line in addresses.lines() {
                let flags = line.split_ascii_whitespace().nth(4);
                let flags = flags.and_then(|flags| u8::from_str_radix(flags, 16).ok());
                if flags.is_none_or(|flags| flags & IFA_F_TENTATIVE != 0) {
                    return Ok(false);
                }
                link_local |= line.starts_with("fe80") && line.ends_with(UPLINK);
            }
            Ok(link_local)
        })
    };
    poll_until(SETTLE_TIMEOUT, Duration::from_millis(2), || {
        settled().map(|yes| yes.then_some(())).transpose()
    })
    .unwrap_or_else(|| {
        Err(LabError::unexpected(format!(
            "the addresses of the {} were not ready in {SETTLE_TIMEOUT:?}",
            host.name()
        )))
    })
}

/// A directory of its own under the system's temporary directory. Dropping it removes it.
#[derive(Debug)]
struct LabDir(PathBuf);

impl LabDir {
    fn new() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "ipmoved-lab-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        let doing = || format!("make directory {}", path.display());
        fs::create_dir(&path).doing(doing)?;
        fs::set_permissions(&path, Permissions::from_mode(0o700)).doing(doing)?;
        Ok(Self(path))
    }
}

impl Drop for LabDir {
    fn drop(&mut self) {
        // The system clears what we leave in the temporary directory.
        let _ = fs::remove_dir_all(&self.0);
    }
}
