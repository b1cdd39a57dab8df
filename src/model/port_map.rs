//! Where one port of a moved address is delivered, if not where the others are (`--deliver`).

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use crate::model::moved::Transport;

/// One port of a moved address that is delivered to another address or port.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PortMap {
    /// TCP or UDP alone.
    pub transport: Option<Transport>,
    /// The moved address.
    pub moved: IpAddr,
    /// The port there.
    pub port: u16,
    /// The delivery address, of the same family.
    pub to: IpAddr,
    /// The port there.
    pub to_port: u16,
}

impl fmt::Display for PortMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let transport = match self.transport {
            None => "",
            Some(Transport::Tcp) => "/tcp",
            Some(Transport::Udp) => "/udp",
        };
        let (moved, to) = (
            SocketAddr::new(self.moved, self.port),
            SocketAddr::new(self.to, self.to_port),
        );
        write!(f, "{moved}{transport}={to}")
    }
}
