//! The parts of this folder's tests, on top of the lab's namespaces: an uplink, a router that sees
//! the packets that leave it, a TUN, and everything a daemon may change as comparable text.

use std::fs;
use std::io::Read;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rustix::thread::{CapabilitySet, CapabilitySets};
use tun_rs::{DeviceBuilder, SyncDevice};

use super::netlink::{Address, Direction, Family, Link, Netlink, NetlinkError, Route};
use crate::lab::wiring::Wiring;
use crate::lab::{Namespace, poll_until};

/// How long a test waits for something, whether it should come or not.
const PATIENCE: Duration = Duration::from_millis(250);

/// Runs `test` in a fresh network namespace, which vanishes with it.
///
/// # Panics
/// If `test` does, or without the privileges to make a namespace.
pub(super) fn in_fresh_namespace<T: Send>(test: impl FnOnce() -> T + Send) -> T {
    let namespace = Namespace::new("test").expect("run the tests as root");
    inside(&namespace, test)
}

fn inside<T: Send>(namespace: &Namespace, run: impl FnOnce() -> T + Send) -> T {
    namespace.run(|| Ok(run())).unwrap()
}

/// An attribute as the kernel writes it (`struct nlattr`, linux/netlink.h).
pub(super) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::from((4 + value.len() as u16).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// The capabilities that the systemd unit in `contrib` leaves the daemon. Later the daemon gives up
/// more by itself.
pub(super) fn capabilities_of_the_unit() -> CapabilitySet {
    const UNIT: &str = include_str!("../../contrib/ipmoved.service");
    let line = UNIT
        .lines()
        .find_map(|line| line.strip_prefix("CapabilityBoundingSet="))
        .expect("the unit bounds the daemon's capabilities");
    line.split_whitespace()
        .map(|name| {
            let known = name.strip_prefix("CAP_").and_then(CapabilitySet::from_name);
            known.unwrap_or_else(|| panic!("{name} is no capability"))
        })
        .collect()
}

/// Takes every other capability from the calling thread, for good. Call it in a [fresh
/// namespace](in_fresh_namespace), which has a thread of its own. If the tests run without some of
/// `capabilities`, as in many containers, the thread goes without them too.
pub(super) fn keep_only(capabilities: CapabilitySet) {
    let held = rustix::thread::capabilities(None).unwrap().permitted;
    let sets = CapabilitySets {
        effective: held & capabilities,
        permitted: held & capabilities,
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, sets).expect("run the tests as root");
}

/// A name for a directory that vanishes with the test.
pub(super) struct Scratch(pub(super) PathBuf);

impl Scratch {
    pub(super) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "ipmoved-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Relaxed)
        );
        let dir = std::env::temp_dir().join(name);
        let _ = fs::remove_dir_all(&dir);
        Self(dir)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Makes a pair of connected interfaces in this namespace, both up, and returns the first.
pub(super) fn veth(netlink: &Netlink) -> Link {
    uplink(netlink, "v0", &[])
}

pub(super) fn set_link_down(netlink: &Netlink, index: u32) -> Result<(), NetlinkError> {
    let mut message = link_message(index);
    message.header.change_mask = LinkFlags::Up;
    let request = RouteNetlinkMessage::SetLink(message);
    netlink.acked("set interface down", request, 0)
}

pub(super) fn rename_link(netlink: &Netlink, index: u32, name: &str) -> Result<(), NetlinkError> {
    let mut message = link_message(index);
    message.attributes.push(LinkAttribute::IfName(name.into()));
    let request = RouteNetlinkMessage::SetLink(message);
    netlink.acked("rename interface", request, 0)
}

pub(super) fn delete_link(netlink: &Netlink, index: u32) -> Result<(), NetlinkError> {
    let request = RouteNetlinkMessage::DelLink(link_message(index));
    netlink.acked("delete interface", request, 0)
}

fn link_message(index: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message
}

/// Makes a veth pair in this namespace and returns one end, up and with addresses. The other end,
/// called `far`, is up as well.
pub(super) fn uplink(netlink: &Netlink, name: &str, addrs: &[(&str, u8)]) -> Link {
    let far = match name {
        "v0" => "v1".to_owned(),
        name => format!("{name}far"),
    };
    netlink.add_veth(name, &far, None).unwrap();
    let far = netlink.link_by_name(&far).unwrap().unwrap();
    let link = netlink.link_by_name(name).unwrap().unwrap();
    netlink.set_link_up(far.index).unwrap();
    netlink.set_link_up(link.index).unwrap();
    for &(addr, prefix) in addrs {
        let addr: IpAddr = addr.parse().unwrap();
        let index = link.index;
        netlink
            .add_address(&Address {
                index,
                addr,
                prefix,
            })
            .unwrap();
    }
    netlink.link_by_index(link.index).unwrap().unwrap()
}

pub(super) fn sysctl(path: &str, value: &str) {
    fs::write(format!("/proc/sys/{path}"), value).unwrap();
}

/// Sets strict reverse path filtering on every interface, present and future.
pub(super) fn strict_rp_filter() {
    for entry in fs::read_dir("/proc/sys/net/ipv4/conf").unwrap() {
        fs::write(entry.unwrap().path().join("rp_filter"), "1").unwrap();
    }
}

/// Everything that a daemon may change, as text.
pub(super) fn snapshot(netlink: &Netlink) -> Vec<String> {
    let mut out = Vec::new();
    for link in netlink.links().unwrap() {
        let qdiscs = netlink.qdiscs(link.index).unwrap();
        out.push(format!("{} {qdiscs:?}", link.name));
        for direction in [Direction::Ingress, Direction::Egress] {
            for filter in netlink.filters(link.index, direction).unwrap() {
                out.push(format!("{} {direction} {filter:?}", link.name));
            }
        }
    }
    for family in [Family::V4, Family::V6] {
        for rule in netlink.rules(family).unwrap() {
            out.push(format!("{rule:?}"));
        }
        for route in netlink.routes(family, 254).unwrap() {
            // The kernel adds link-local routes in its own time.
            if route.dst.0.to_string() == "fe80::" {
                continue;
            }
            out.push(format!("{route:?}"));
        }
    }
    for path in [
        "net/ipv4/tcp_fwmark_accept",
        "net/ipv4/fwmark_reflect",
        "net/ipv6/fwmark_reflect",
        "net/ipv4/ip_forward",
        "net/ipv4/conf/lo/forwarding",
        "net/ipv6/conf/lo/forwarding",
        "net/ipv4/conf/all/rp_filter",
        "net/ipv4/conf/all/src_valid_mark",
    ] {
        let value = fs::read_to_string(format!("/proc/sys/{path}")).unwrap();
        out.push(format!("{path} = {value:?}"));
    }
    out
}

/// A TUN that is up.
pub(super) struct Tun {
    device: SyncDevice,
    pub(super) link: Link,
    /// Length of the virtio header before each packet.
    header: usize,
}

impl Tun {
    /// With `offload` the kernel may hand over super-packets.
    pub(super) fn new(netlink: &Netlink, name: &str, offload: bool) -> Self {
        let device = DeviceBuilder::new()
            .name(name)
            .enable(false)
            .offload(offload)
            .build_sync()
            .expect("cannot make a TUN");
        device.set_nonblocking(true).unwrap();
        let link = netlink.link_by_name(name).unwrap().unwrap();
        netlink.set_link_mtu(link.index, 1420).unwrap();
        netlink.set_link_up(link.index).unwrap();
        Self {
            device,
            link: netlink.link_by_index(link.index).unwrap().unwrap(),
            header: if offload { 10 } else { 0 },
        }
    }

    pub(super) fn write(&self, packet: &[u8]) {
        let mut bytes = vec![0; self.header];
        bytes.extend(packet);
        let written = self.device.send(&bytes).unwrap();
        assert_eq!(written, bytes.len());
    }

    /// Returns the next packet that `wanted` accepts, and its virtio header.
    pub(super) fn read(&self, wanted: impl Fn(&[u8]) -> bool) -> Option<(Vec<u8>, Vec<u8>)> {
        let mut buffer = vec![0; 70_000];
        loop {
            let next = || self.device.recv(&mut buffer).ok();
            let length = poll_until(PATIENCE, Duration::from_millis(1), next)?;
            let (header, packet) = buffer[..length].split_at(self.header);
            if wanted(packet) {
                return Some((header.to_vec(), packet.to_vec()));
            }
        }
    }
}

/// A router beyond the uplink: a namespace of its own at the other end of a veth pair, which sees
/// the packets that leave the uplink.
pub(super) struct Router {
    namespace: Namespace,
    /// The uplink's end in the calling thread's namespace.
    pub(super) uplink: Link,
    sniffer: socket2::Socket,
}

impl Router {
    /// Connects an interface `up0` with `addrs` to a router with `.1`/`::1` of the same networks,
    /// which is the default gateway.
    pub(super) fn new(netlink: &Netlink, addrs: &[(&str, u8)], gateways: &[(&str, u8)]) -> Self {
        let namespace = Namespace::new("router").unwrap();
        let there = Some(namespace.fd().as_fd());
        netlink.add_veth("up0", "far0", there).unwrap();
        let far: Vec<(IpAddr, u8)> = parsed(gateways);
        let sniffer = inside(&namespace, || {
            let netlink = Netlink::new().unwrap();
            let link = netlink.link_by_name("far0").unwrap().unwrap();
            let index = link.index;
            netlink.set_link_up(1).unwrap();
            netlink.set_link_up(index).unwrap();
            for (addr, prefix) in far {
                netlink
                    .add_address(&Address {
                        index,
                        addr,
                        prefix,
                    })
                    .unwrap();
            }
            let all = socket2::Protocol::from(i32::from((libc::ETH_P_ALL as u16).to_be()));
            let socket =
                socket2::Socket::new(socket2::Domain::PACKET, socket2::Type::RAW, Some(all));
            let socket = socket.unwrap();
            socket.set_nonblocking(true).unwrap();
            socket
        });
        let uplink = netlink.link_by_name("up0").unwrap().unwrap();
        let index = uplink.index;
        netlink.set_link_up(1).unwrap();
        netlink.set_link_up(index).unwrap();
        for (addr, prefix) in parsed(addrs) {
            netlink
                .add_address(&Address {
                    index,
                    addr,
                    prefix,
                })
                .unwrap();
        }
        for (gateway, _) in parsed(gateways) {
            let route = Route {
                via: Some(gateway),
                dev: Some(index),
                ..Route::default_of(Family::of(gateway))
            };
            // IPv6 takes a moment to notice that the link is up.
            let mut tries = 0;
            while let Err(error) = netlink.add_route(&route) {
                tries += 1;
                assert!(tries < 100, "{error}");
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        Self {
            namespace,
            uplink: netlink.link_by_index(index).unwrap().unwrap(),
            sniffer,
        }
    }

    /// A UDP socket of the router.
    pub(super) fn udp(&self, addr: &str) -> UdpSocket {
        let addr: SocketAddr = addr.parse().unwrap();
        inside(&self.namespace, || bound(addr))
    }

    /// A TCP listener of the router.
    pub(super) fn listen(&self, addr: &str) -> TcpListener {
        let addr: SocketAddr = addr.parse().unwrap();
        inside(&self.namespace, || TcpListener::bind(addr).unwrap())
    }

    /// Whether a packet that contains `needle` has arrived from the uplink. It forgets all that
    /// came.
    pub(super) fn has_seen(&self, needle: &[u8]) -> bool {
        std::thread::sleep(Duration::from_millis(50));
        let mut buffer = vec![0; 70_000];
        let mut seen = false;
        while let Ok(length) = (&self.sniffer).read(&mut buffer) {
            seen |= buffer[..length]
                .windows(needle.len())
                .any(|part| part == needle);
        }
        seen
    }
}

/// A UDP socket that waits a quarter second for a datagram.
pub(super) fn bound(addr: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind(addr).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

fn parsed(addrs: &[(&str, u8)]) -> Vec<(IpAddr, u8)> {
    addrs
        .iter()
        .map(|&(addr, prefix)| (addr.parse().unwrap(), prefix))
        .collect()
}
