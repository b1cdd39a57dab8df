//! Addresses on interfaces.

use std::net::{IpAddr, Ipv4Addr};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{
    AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope, CacheInfo,
};

use super::{Family, Netlink, Result, attributes, ip, word};

/// An address on an interface.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Address {
    /// Index of the interface that holds it.
    pub index: u32,
    /// The address.
    pub addr: IpAddr,
    /// Prefix length.
    pub prefix: u8,
}

impl Address {
    /// The broadcast addresses of its network: the last one, and the first, which some hosts take
    /// for one too (RFC 1122 section 3.3.6). IPv6 has none, nor has a network of two addresses or
    /// one (RFC 3021).
    pub fn broadcasts(&self) -> Option<[IpAddr; 2]> {
        let IpAddr::V4(addr) = self.addr else {
            return None;
        };
        let hosts = u32::MAX.checked_shr(self.prefix.into())?;
        let ends = [addr.to_bits() & !hosts, addr.to_bits() | hosts];
        (hosts > 1).then(|| ends.map(|end| Ipv4Addr::from_bits(end).into()))
    }
}

impl Netlink {
    /// The addresses that end by themselves unless somebody renews them, as those of DHCP.
    pub fn leased(&self) -> Result<Vec<IpAddr>> {
        let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let answers = self.dump("list addresses", request)?;
        let read = |payload: &Vec<u8>| {
            let (header, rest) = payload.split_first_chunk::<8>()?;
            let flags = attributes(rest).find(|&(kind, _)| kind == libc::IFA_FLAGS);
            let flags = flags.and_then(|(_, value)| word(value));
            let flags = flags.unwrap_or_else(|| header[2].into());
            let (address, _) = read_address(payload)?;
            (flags & libc::IFA_F_PERMANENT == 0).then_some(address.addr)
        };
        Ok(answers.iter().filter_map(read).collect())
    }

    /// Every address of both families. Those that will not stay or may not be used come last: of
    /// temporary ones another one takes the place within a day (RFC 8981), deprecated ones are on
    /// their way out (RFC 4862), and tentative ones may turn out to be somebody else's.
    ///
    /// IPv4 ones are in the kernel's order, the primary one of a network first. IPv6 ones are not,
    /// since the kernel names the newest first: global ones come before local ones (RFC 4193), and
    /// the lowest before others, so that one more changes little.
    pub fn addresses(&self) -> Result<Vec<Address>> {
        let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let answers = self.dump("list addresses", request)?;
        let mut found: Vec<_> = answers.iter().filter_map(|a| read_address(a)).collect();
        found.sort_by_key(|&(address, passing)| {
            let rank = match address.addr {
                IpAddr::V4(_) => None,
                IpAddr::V6(addr) => Some((addr.is_unique_local(), addr)),
            };
            (passing, rank)
        });
        Ok(found.into_iter().map(|(address, _)| address).collect())
    }

    /// Adds an address that this host replies from, but does not choose as the source of anything
    /// else: of scope host (IPv4), or deprecated (IPv6, RFC 4862 section 5.5.4).
    pub fn add_quiet_address(&self, address: &Address) -> Result<()> {
        let mut message = address_message(address);
        match address.addr {
            IpAddr::V4(_) => message.header.scope = AddressScope::Host,
            IpAddr::V6(_) => {
                let mut lifetimes = CacheInfo::default();
                lifetimes.ifa_valid = u32::MAX;
                lifetimes.ifa_preferred = 0;
                let attributes = &mut message.attributes;
                attributes.push(AddressAttribute::CacheInfo(lifetimes));
            }
        }
        let request = RouteNetlinkMessage::NewAddress(message);
        self.acked("add address", request, NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Deletes an address.
    pub fn delete_address(&self, address: &Address) -> Result<()> {
        let request = RouteNetlinkMessage::DelAddress(address_message(address));
        self.acked("delete address", request, 0)
    }
}

/// The message that tells the kernel of an address. An IPv6 address is usable at once (no duplicate
/// address detection).
pub(crate) fn address_message(address: &Address) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = Family::of(address.addr).raw();
    message.header.prefix_len = address.prefix;
    message.header.index = address.index;
    message.attributes = match address.addr {
        IpAddr::V4(_) => vec![
            AddressAttribute::Local(address.addr),
            AddressAttribute::Address(address.addr),
        ],
        IpAddr::V6(_) => {
            message.header.flags = AddressHeaderFlags::Nodad;
            vec![AddressAttribute::Address(address.addr)]
        }
    };
    message
}

/// An address, and whether it will not stay or may not be used.
fn read_address(payload: &[u8]) -> Option<(Address, bool)> {
    const PASSING: u32 = libc::IFA_F_TEMPORARY
        | libc::IFA_F_DEPRECATED
        | libc::IFA_F_TENTATIVE
        | libc::IFA_F_DADFAILED;
    let (header, rest) = payload.split_first_chunk::<8>()?;
    let (mut addr, mut local) = (None, None);
    let mut flags = u32::from(header[2]);
    for (kind, value) in attributes(rest) {
        match kind {
            libc::IFA_ADDRESS => addr = ip(value),
            libc::IFA_LOCAL => local = ip(value),
            libc::IFA_FLAGS => flags = word(value)?,
            _ => {}
        }
    }
    let address = Address {
        index: word(&header[4..8])?,
        // On a point-to-point link IFA_ADDRESS is the other end's address.
        addr: local.or(addr)?,
        prefix: header[1],
    };
    // The bit of temporary addresses means "secondary" for IPv4, whose secondary ones stay.
    let passing = if address.addr.is_ipv4() { 0 } else { PASSING };
    Some((address, flags & passing != 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::testing::{in_fresh_namespace, uplink};

    #[test]
    fn what_will_not_stay_comes_last() {
        in_fresh_namespace(|| {
            let netlink = Netlink::new().unwrap();
            let link = uplink(&netlink, "up0", &[]);
            let at = |addr: &str, prefix| Address {
                index: link.index,
                addr: addr.parse().unwrap(),
                prefix,
            };
            // Deprecated.
            netlink.add_quiet_address(&at("2001:db8::1", 64)).unwrap();
            for address in [
                at("fd00::1", 64),
                at("2001:db8::2", 64),
                at("2001:db8::3", 64),
                at("192.0.2.1", 24),
                at("192.0.2.2", 24),
            ] {
                crate::lab::wiring::Wiring::add_address(&netlink, &address).unwrap();
            }
            let global = |addr: &IpAddr| match addr {
                IpAddr::V4(_) => true,
                IpAddr::V6(addr) => !addr.is_unicast_link_local(),
            };
            let found: Vec<String> = netlink
                .addresses()
                .unwrap()
                .iter()
                .filter(|held| held.index == link.index && global(&held.addr))
                .map(|held| held.addr.to_string())
                .collect();
            assert_eq!(
                found,
                [
                    "192.0.2.1",
                    "192.0.2.2",
                    "2001:db8::2",
                    "2001:db8::3",
                    "fd00::1",
                    "2001:db8::1"
                ]
            );
        });
    }

    #[test]
    fn a_network_has_two_broadcast_addresses_if_it_is_large_enough() {
        let of = |addr: &str, prefix| {
            let addr = addr.parse().unwrap();
            let address = Address {
                index: 1,
                addr,
                prefix,
            };
            address
                .broadcasts()
                .map(|both| both.map(|addr| addr.to_string()))
        };
        let both = |first: &str, last: &str| Some([first.to_owned(), last.to_owned()]);
        assert_eq!(of("192.0.2.1", 24), both("192.0.2.0", "192.0.2.255"));
        assert_eq!(of("192.0.2.9", 30), both("192.0.2.8", "192.0.2.11"));
        assert_eq!(of("10.1.2.3", 8), both("10.0.0.0", "10.255.255.255"));
        assert_eq!(of("192.0.2.9", 31), None);
        assert_eq!(of("192.0.2.9", 32), None);
        assert_eq!(of("2001:db8::1", 64), None);
    }
}
