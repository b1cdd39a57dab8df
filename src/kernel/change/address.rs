//! An address at which this host can be reached, but which the kernel never chooses as a source by
//! itself (IPv4: scope host; IPv6: deprecated).

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{
    ChangeError, Interface, Kind, Means, Presence, There, Undone, in_ip, read_sysctl, typed,
};
use crate::kernel::netlink::{Address, Family, Netlink};

/// Whether IPv6 is switched off on an interface: the kernel refuses addresses of it as if they were
/// forbidden.
fn is_without_ipv6(interface: &str) -> bool {
    read_sysctl(&format!("net/ipv6/conf/{interface}/disable_ipv6")).is_ok_and(|value| value == "1")
}

/// An address on an interface.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct QuietAddress {
    /// The interface.
    pub on: Interface,
    /// The address.
    pub addr: IpAddr,
    /// Prefix length.
    pub prefix: u8,
}

impl QuietAddress {
    fn address(&self) -> Address {
        Address {
            index: self.on.index,
            addr: self.addr,
            prefix: self.prefix,
        }
    }
}

impl QuietAddress {
    /// The address as ip takes it. `action` is what to do with it.
    fn in_ip(&self, action: &str) -> String {
        let ip = in_ip(Family::of(self.addr));
        let (addr, prefix, dev) = (self.addr, self.prefix, typed(&self.on.name));
        format!("{ip} address {action} {addr}/{prefix} dev {dev}")
    }
}

impl fmt::Display for QuietAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "address {}/{} on {}",
            self.addr, self.prefix, self.on.name
        )
    }
}

impl Kind for QuietAddress {
    fn object(&self) -> String {
        format!("address {} {}", self.on.index, self.addr)
    }

    fn to_make(&self) -> String {
        let quiet = match self.addr {
            IpAddr::V4(_) => "scope host",
            IpAddr::V6(_) => "nodad preferred_lft 0",
        };
        format!("{} {quiet}", self.in_ip("add"))
    }

    fn to_undo(&self) -> String {
        self.in_ip("del")
    }

    fn check(&self) -> Result<(), String> {
        self.on.check()
    }

    /// An administrator may hold it as well.
    fn is_unmistakable(&self) -> bool {
        false
    }

    fn present(&self, there: &There<'_>) -> Result<Presence, ChangeError> {
        let there = there.has_address(self.on.index, self.addr)?;
        Ok(Presence::of(there))
    }

    fn make(&self, with: &Means<'_>) -> Result<(), ChangeError> {
        Ok(with.netlink.add_quiet_address(&self.address())?)
    }

    fn undo(&self, netlink: &Netlink) -> Result<Undone, ChangeError> {
        netlink.delete_address(&self.address())?;
        Ok(Undone::Gone)
    }

    fn remedy(&self, error: &ChangeError) -> Option<&'static str> {
        (error.is_denied() && self.addr.is_ipv6() && is_without_ipv6(&self.on.name))
            .then_some("IPv6 is off here: `sysctl -w net.ipv6.conf.lo.disable_ipv6=0`")
    }
}
