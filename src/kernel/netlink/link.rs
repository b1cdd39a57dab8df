//! Network interfaces.

use std::io;

use netlink_packet_core::NLM_F_ACK;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rustix::net::netdevice::index_to_name;

use super::{Netlink, Result, attributes, text, word};

/// See linux/if_link.h; not in every libc.
const IFLA_GRO_IPV4_MAX_SIZE: u16 = 64;

/// GRE over IPv6; not in every libc.
const ARPHRD_IP6GRE: u16 = 823;

/// A network interface.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Link {
    /// Interface index.
    pub index: u32,
    /// Interface name.
    pub name: String,
    /// Largest packet in bytes, without the link-layer header.
    pub mtu: u32,
    /// Administratively up (`IFF_UP`).
    pub up: bool,
    /// Loopback (`IFF_LOOPBACK`).
    pub loopback: bool,
    /// Link-layer type, one of `ARPHRD_*`.
    pub link_type: u16,
    /// Hardware address, where the link layer is Ethernet-like.
    pub mac: Option<[u8; 6]>,
    /// It is a port of another interface (a bridge, bond or team), which receives its packets and
    /// sends through it. A member of a VRF is none: it keeps its own packets.
    pub port: bool,
    /// Whether the kernel knows BIG TCP over IPv4: it does if it reports how long a received
    /// super-packet may become (`IFLA_GRO_IPV4_MAX_SIZE`, Linux 6.3 and kernels with the backport).
    /// Whether a TUN takes such a packet (6.6) shows only when we write one.
    pub big_tcp: bool,
    /// It is up, and a GRE tunnel that has no `remote`, or a group of many for one: each neighbour
    /// has its own end. What leaves by it has the tunnel's headers before it already where programs
    /// see it (`ipgre_header_ops`, net/ipv4/ip_gre.c).
    pub to_many: bool,
}

/// The index of an interface that is not there: the kernel gives it to none.
const PLANNED: u32 = 0;

impl Link {
    /// A TUN that is only planned.
    pub fn planned_tun(name: &str, mtu: u32) -> Self {
        Self {
            index: PLANNED,
            name: name.to_owned(),
            mtu,
            up: true,
            loopback: false,
            link_type: libc::ARPHRD_NONE,
            mac: None,
            port: false,
            big_tcp: false,
            to_many: false,
        }
    }

    /// Whether it is not there yet.
    pub fn is_planned(&self) -> bool {
        self.index == PLANNED
    }
}

/// What an interface is, beside what packets need to know.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Nature {
    /// Interface index.
    pub index: u32,
    /// The kernel's name of its kind: `bridge`, `dummy`, `wireguard`. Hardware has none.
    pub kind: Option<String>,
    /// Index of the interface that it is a port of.
    pub master: Option<u32>,
    /// Index of the interface that it stands on, as a VLAN and a macvlan do. Of a pair of
    /// interfaces it is the other one, which may be in another network namespace.
    pub lower: Option<u32>,
}

impl Netlink {
    /// What every interface is.
    pub fn natures(&self) -> Result<Vec<Nature>> {
        const IFLA_INFO_KIND: u16 = 1;
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let answers = self.dump("list interfaces", request)?;
        let read = |payload: &Vec<u8>| {
            let (header, rest) = payload.split_first_chunk::<16>()?;
            let mut nature = Nature {
                index: word(&header[4..8])?,
                kind: None,
                master: None,
                lower: None,
            };
            for (kind, value) in attributes(rest) {
                match kind {
                    libc::IFLA_MASTER => nature.master = word(value),
                    libc::IFLA_LINK => nature.lower = word(value),
                    libc::IFLA_LINKINFO => {
                        let mut info = attributes(value);
                        let kind = info.find(|&(kind, _)| kind == IFLA_INFO_KIND);
                        nature.kind = kind.map(|(_, value)| text(value));
                    }
                    _ => {}
                }
            }
            Some(nature)
        };
        Ok(answers.iter().filter_map(read).collect())
    }

    /// Every interface.
    pub fn links(&self) -> Result<Vec<Link>> {
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let answers = self.dump("list interfaces", request)?;
        Ok(answers.iter().filter_map(|a| read_link(a)).collect())
    }

    /// The interface called `name`; `None` if there is none.
    pub fn link_by_name(&self, name: &str) -> Result<Option<Link>> {
        Ok(self.links()?.into_iter().find(|link| link.name == name))
    }

    /// The interface with this index; `None` if there is none.
    pub fn link_by_index(&self, index: u32) -> Result<Option<Link>> {
        // The kernel takes 0 for no index at all.
        if index == 0 {
            return Ok(None);
        }
        // Not a dump: there may be thousands of interfaces.
        let request = RouteNetlinkMessage::GetLink(link_message(index));
        match self.exchange("look at an interface", request, NLM_F_ACK) {
            Ok(answers) => Ok(answers.iter().find_map(|a| read_link(a))),
            Err(error) if error.is_missing() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The name of the interface with this index. As quick on a host with thousands of interfaces
    /// as on any.
    ///
    /// # Errors
    /// `ENODEV` if there is none.
    pub fn link_name(&self, index: u32) -> io::Result<String> {
        Ok(index_to_name(&self.socket, index)?)
    }

    /// Sets an interface up.
    pub fn set_link_up(&self, index: u32) -> Result<()> {
        let mut message = link_message(index);
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        self.acked("set interface up", RouteNetlinkMessage::SetLink(message), 0)
    }

    /// Says that an interface carries no multicast (clears `IFF_MULTICAST`).
    pub fn clear_link_multicast(&self, index: u32) -> Result<()> {
        let mut message = link_message(index);
        message.header.change_mask = LinkFlags::Multicast;
        let request = RouteNetlinkMessage::SetLink(message);
        self.acked("set interface without multicast", request, 0)
    }

    /// Sets how many packets may wait for an interface's driver.
    pub fn set_link_queue(&self, index: u32, packets: u32) -> Result<()> {
        let mut message = link_message(index);
        message.attributes.push(LinkAttribute::TxQueueLen(packets));
        let request = RouteNetlinkMessage::SetLink(message);
        self.acked("set interface queue", request, 0)
    }

    /// Sets the MTU of an interface, in bytes.
    pub fn set_link_mtu(&self, index: u32, mtu: u32) -> Result<()> {
        let mut message = link_message(index);
        message.attributes.push(LinkAttribute::Mtu(mtu));
        let request = RouteNetlinkMessage::SetLink(message);
        self.acked("set interface MTU", request, 0)
    }
}

fn link_message(index: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message
}

fn read_link(payload: &[u8]) -> Option<Link> {
    let (header, rest) = payload.split_first_chunk::<16>()?;
    let flags = word(&header[8..12])?;
    let mut link = Link {
        index: word(&header[4..8])?,
        name: String::new(),
        mtu: 0,
        up: flags & libc::IFF_UP as u32 != 0,
        loopback: flags & libc::IFF_LOOPBACK as u32 != 0,
        link_type: u16::from_ne_bytes([header[2], header[3]]),
        mac: None,
        port: false,
        big_tcp: false,
        to_many: false,
    };
    let mut in_vrf = false;
    let (mut remote, mut by_route) = (None, false);
    for (kind, value) in attributes(rest) {
        match kind {
            libc::IFLA_IFNAME => link.name = text(value),
            libc::IFLA_MTU => link.mtu = word(value)?,
            libc::IFLA_ADDRESS => link.mac = value.try_into().ok(),
            libc::IFLA_MASTER => link.port = true,
            libc::IFLA_BROADCAST => remote = Some(value),
            libc::IFLA_LINKINFO => {
                in_vrf = slave_kind(value).as_deref() == Some("vrf");
                by_route = has_ends_by_route(value);
            }
            IFLA_GRO_IPV4_MAX_SIZE => link.big_tcp = true,
            _ => {}
        }
    }
    link.port &= !in_vrf;
    let is_gre = matches!(link.link_type, libc::ARPHRD_IPGRE | ARPHRD_IP6GRE);
    link.to_many = link.up && is_gre && !by_route && remote.is_some_and(is_many);
    Some(link)
}

/// Whether this other end of a tunnel stands for many: none, or a group (RFC 5771).
fn is_many(remote: &[u8]) -> bool {
    let is_group = remote.len() == 4 && remote[0] >> 4 == 0xe;
    is_group || remote.iter().all(|byte| *byte == 0)
}

/// Whether a GRE tunnel takes its other end from each packet's route (`external`).
fn has_ends_by_route(info: &[u8]) -> bool {
    const IFLA_INFO_DATA: u16 = 2;
    const IFLA_GRE_COLLECT_METADATA: u16 = 18;
    let mut info = attributes(info);
    let data = info.find(|&(kind, _)| kind == IFLA_INFO_DATA);
    let has = |(_, data)| attributes(data).any(|(kind, _)| kind == IFLA_GRE_COLLECT_METADATA);
    data.is_some_and(has)
}

/// What an interface is a part of, by the kernel's name of its kind.
fn slave_kind(info: &[u8]) -> Option<String> {
    const IFLA_INFO_SLAVE_KIND: u16 = 4;
    let mut info = attributes(info);
    let kind = info.find(|&(kind, _)| kind == IFLA_INFO_SLAVE_KIND);
    kind.map(|(_, value)| text(value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::testing::{attribute, delete_link, in_fresh_namespace, set_link_down, veth};
    use crate::lab::wiring::Wiring;

    #[test]
    fn a_gre_tunnel_without_remote_is_one_to_many() {
        const EXTERNAL: u16 = 18;
        let link = |link_type: u16, flags: i32, remote: &[u8], options: &[u8]| {
            let mut payload = vec![0; 16];
            payload[2..4].copy_from_slice(&link_type.to_ne_bytes());
            payload[4..8].copy_from_slice(&7_u32.to_ne_bytes());
            payload[8..12].copy_from_slice(&flags.to_ne_bytes());
            payload.extend(attribute(libc::IFLA_BROADCAST, remote));
            let kind = attribute(1, b"gre\0");
            let info = [kind, attribute(2, options)].concat();
            payload.extend(attribute(libc::IFLA_LINKINFO, &info));
            read_link(&payload).unwrap()
        };
        let (gre, gre6, up) = (libc::ARPHRD_IPGRE, ARPHRD_IP6GRE, libc::IFF_UP);
        let external = attribute(EXTERNAL, &[]);
        for (link_type, flags, remote, options, expected) in [
            (gre, up, &[0; 4][..], &[][..], true),
            (gre, up, &[239, 1, 1, 1], &[], true),
            (gre6, up, &[0; 16], &[], true),
            (gre, up, &[198, 18, 0, 2], &[], false),
            (
                gre6,
                up,
                &[32, 1, 13, 184, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
                &[],
                false,
            ),
            // The kernel's own, which is there with its driver and down.
            (gre, 0, &[0; 4], &[], false),
            (gre, up, &[0; 4], &external, false),
            (libc::ARPHRD_TUNNEL, up, &[0; 4], &[], false),
            (libc::ARPHRD_ETHER, up, &[0; 6], &[], false),
        ] {
            let link = link(link_type, flags, remote, options);
            assert_eq!(link.to_many, expected, "{link_type} {flags} {remote:?}");
        }
    }

    #[test]
    fn links_come_change_and_go() {
        in_fresh_namespace(|| {
            let netlink = Netlink::new().unwrap();
            let lo = netlink.link_by_name("lo").unwrap().unwrap();
            assert!(lo.loopback && !lo.up && lo.link_type == libc::ARPHRD_LOOPBACK);
            let link = veth(&netlink);
            assert_eq!(link.link_type, libc::ARPHRD_ETHER);
            assert!(link.mac.is_some());
            assert_eq!(netlink.link_name(link.index).unwrap(), "v0");
            netlink.set_link_queue(link.index, 77).unwrap();
            netlink.set_link_mtu(link.index, 1300).unwrap();
            set_link_down(&netlink, link.index).unwrap();
            let changed = netlink.link_by_index(link.index).unwrap().unwrap();
            assert_eq!((changed.mtu, changed.up), (1300, false));
            for link in netlink.links().unwrap() {
                let found = netlink.link_by_index(link.index).unwrap();
                assert_eq!(found, Some(link));
            }
            for missing in [0, 987_654] {
                assert_eq!(netlink.link_by_index(missing).unwrap(), None);
            }
            assert!(netlink.add_veth("v0", "v2", None).unwrap_err().is_exists());
            delete_link(&netlink, link.index).unwrap();
            assert_eq!(netlink.link_by_name("v1").unwrap(), None);
            let gone = netlink.link_name(link.index).unwrap_err();
            assert_eq!(gone.raw_os_error(), Some(libc::ENODEV));
            assert!(delete_link(&netlink, link.index).unwrap_err().is_missing());
        });
    }
}
