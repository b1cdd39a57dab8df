//! How the TUN is set up beyond what makes it: as settings, each of which can be made or told.

use std::fs;

use tracing::debug;

use super::change::{to_set, typed};
use super::netlink::{Link, Netlink, NetlinkError};
use super::rehearsal::Step;
use crate::packet::IPV6_MIN_MTU;

/// Packets that wait in the kernel for the daemon to read them. A burst of small packets brings
/// more between two wake-ups than the default of 500.
const TX_QUEUE_LEN: u32 = 1_000;

/// What comes with an interface that is up and open.
const BY_ITSELF: &str =
    "the kernel itself adds qdiscs of its queues and, with IPv6, multicast ff00::/8 in table local";

/// One setting of the TUN.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TunSetting {
    /// It carries no multicast.
    NoMulticast,
    /// Its MTU, in bytes.
    Mtu(u32),
    /// It gets no link-local address.
    NoLinkLocal,
    /// Packets that may wait for the daemon.
    Queue(u32),
    /// It is up.
    Up,
}

/// Brings the TUN up, without addresses, and keeps the kernel from sending on it of its own accord.
///
/// Where the interface forwards IPv6, the kernel joins the groups of all routers and reports so
/// (MLD, RFC 3810), unless the interface has no multicast. Programs that look for links to announce
/// themselves on (mDNS, LLMNR) leave it out then, too. On a host that forwards, it has joined
/// already: IPv6 ends below its least MTU, and begins anew above.
pub fn settings(mtu: u32) -> [TunSetting; 6] {
    let ends_ipv6 = IPV6_MIN_MTU as u32 - 1;
    [
        TunSetting::NoMulticast,
        TunSetting::Mtu(ends_ipv6),
        TunSetting::Mtu(mtu),
        TunSetting::NoLinkLocal,
        TunSetting::Queue(TX_QUEUE_LEN),
        TunSetting::Up,
    ]
}

impl TunSetting {
    /// Makes it.
    ///
    /// # Errors
    /// If the kernel refuses what the daemon cannot do without.
    pub fn make(self, netlink: &Netlink, tun: &Link) -> Result<(), NetlinkError> {
        match self {
            Self::NoMulticast => netlink.clear_link_multicast(tun.index),
            Self::Mtu(mtu) => netlink.set_link_mtu(tun.index, mtu),
            Self::NoLinkLocal => {
                // No link-local address, hence no router solicitations: an interface without IPv6
                // has no such file, and needs none.
                let path = format!("/proc/sys/{}", addr_gen_mode(tun));
                let _ = fs::write(path, "1");
                Ok(())
            }
            Self::Queue(packets) => {
                // Not when it is made: that request (SIOCSIFTXQLEN) is for the host's own root
                // alone, while this one will do in a container too.
                if let Err(error) = netlink.set_link_queue(tun.index, packets) {
                    debug!(%error, "the TUN keeps the queue that it has");
                }
                Ok(())
            }
            Self::Up => netlink.set_link_up(tun.index),
        }
    }

    /// The same as a command for an interface that is not there yet; `None` if it does nothing.
    pub fn step(self, tun: &Link) -> Option<Step> {
        let name = typed(&tun.name);
        let set = |what: &str| format!("ip link set dev {name} {what}");
        let (change, command) = match self {
            Self::NoMulticast => ("no multicast".to_owned(), set("multicast off")),
            Self::Mtu(mtu) => (format!("MTU {mtu}"), set(&format!("mtu {mtu}"))),
            Self::NoLinkLocal => {
                let has_ipv6 = fs::exists("/proc/sys/net/ipv6/conf/default").unwrap_or_default();
                if tun.mtu < IPV6_MIN_MTU as u32 || !has_ipv6 {
                    return None;
                }
                let command = to_set(&addr_gen_mode(tun), "1");
                ("no link-local address".to_owned(), command)
            }
            Self::Queue(packets) => {
                let command = set(&format!("txqueuelen {packets}"));
                (format!("a queue of {packets} packets"), command)
            }
            Self::Up => ("up".to_owned(), set("up")),
        };
        let note = (self == Self::Up).then_some(BY_ITSELF);
        Some(Step {
            note,
            ..Step::new(format!("{}: {change}", tun.name), command)
        })
    }
}

/// Making a TUN with so many queues, as a command.
pub fn step_to_make(tun: &Link, queues: usize) -> Step {
    let several = if queues > 1 { " multi_queue" } else { "" };
    let command = format!(
        "ip tuntap add dev {} mode tun vnet_hdr{several}",
        typed(&tun.name)
    );
    Step {
        note: Some("the interface belongs to the process, as does everything on it"),
        ..Step::new(format!("the TUN {}", tun.name), command)
    }
}

/// The end of the TUN, as a command.
pub fn step_to_end(tun: &Link) -> Step {
    let command = format!("ip link del dev {}", typed(&tun.name));
    Step {
        note: Some("the interface goes with the process, however that ends, and all on it with it"),
        ..Step::new(format!("the TUN {}", tun.name), command)
    }
}

fn addr_gen_mode(tun: &Link) -> String {
    format!("net/ipv6/conf/{}/addr_gen_mode", tun.name)
}
