//! From settings to a host that is ready: first every check, then every change.
//!
//! Nothing is changed before all that can be known to be wrong has been refused.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::os::unix::net::UnixListener;
use std::path::Path;

use tracing::warn;

use super::DaemonError;
use crate::config::{Config, DeliverTo, PeerAddr};
use crate::io::tun::{TunError, TunFeatures, TunQueue};
use crate::io::udp::{UdpOptions, UdpSocket};
use crate::kernel::netlink::{Link, Netlink};
use crate::kernel::{Host, capture, steer};
use crate::cli::Offload;
use crate::moved::Move;
use crate::peer::Role;
use crate::status::SOCKET;

/// A host that is ready to carry packets.
pub(super) struct Ready {
    /// The door to kernel changes, holding those that were made.
    pub(super) host: Host,
    /// Asks the kernel.
    pub(super) netlink: Netlink,
    /// Where `ipmoved status` connects.
    pub(super) status: UnixListener,
    /// One queue a lane.
    pub(super) queues: Vec<TunQueue>,
    /// What the TUN can do.
    pub(super) features: TunFeatures,
    /// The TUN.
    pub(super) tun: Link,
    /// One socket a lane.
    pub(super) sockets: Vec<UdpSocket>,
    /// The interface that clients' packets use.
    pub(super) uplink: Link,
    /// Where each peer is, if its address is known or its name resolved.
    pub(super) endpoints: Vec<Option<SocketAddr>>,
}

impl Ready {
    /// Checks everything, then changes what has to be changed.
    pub(super) fn new(config: &Config, runtime_dir: &Path) -> Result<Self, DaemonError> {
        let netlink = Netlink::new().map_err(system)?;
        let mut host = Host::open(runtime_dir)?;
        let endpoints = config
            .peers
            .iter()
            .map(|peer| peer.endpoint.as_ref().and_then(resolve))
            .collect::<Vec<_>>();
        let found = Found::new(&netlink, config, &endpoints)?;
        let sockets = vec![bind(config)?];
        let (queues, features) =
            TunQueue::create(&config.tun, sockets.len()).map_err(|error| match error {
                TunError::Exists(_) => DaemonError::Input(error.to_string()),
                TunError::Permission(_) | TunError::NoDriver | TunError::Other(..) => {
                    DaemonError::System(error.to_string())
                }
            })?;
        let tun = raise_tun(&netlink, &config.tun, found.uplink.mtu)?;
        let port = sockets[0].port().map_err(system)?;
        found.change(&mut host, &netlink, config, &tun, port)?;
        let status = listen(&host)?;
        Ok(Self {
            host,
            netlink,
            status,
            queues,
            features,
            tun,
            sockets,
            uplink: found.uplink,
            endpoints,
        })
    }
}
