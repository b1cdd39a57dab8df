//! Wires and addresses: the requests to the kernel that only a lab makes.
//!
//! The daemon never makes an interface by netlink, and gives none an address from which the host
//! speaks. A lab needs both.

use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkInfo, LinkMessage,
};

use crate::kernel::netlink::{Address, Netlink, NetlinkError, address_message};

/// The lab's requests to the kernel beyond the daemon's.
pub(crate) trait Wiring {
    /// Creates a pair of connected Ethernet interfaces. If a network namespace is given, the peer
    /// starts in it.
    fn add_veth(
        &self,
        name: &str,
        peer: &str,
        netns: Option<BorrowedFd<'_>>,
    ) -> Result<(), NetlinkError>;

    /// Creates an interface of a kind that needs nothing else, such as a dummy or a bridge.
    fn add_interface(&self, name: &str, kind: InfoKind) -> Result<(), NetlinkError>;

    /// Makes an interface a port of another, such as a bridge.
    fn set_master(&self, index: u32, master: u32) -> Result<(), NetlinkError>;

    /// Deletes an interface, and the other end of a pair with it.
    fn delete_interface(&self, index: u32) -> Result<(), NetlinkError>;

    /// Adds an address; an IPv6 address is usable at once (no duplicate address detection).
    fn add_address(&self, address: &Address) -> Result<(), NetlinkError>;
}

impl Wiring for Netlink {
    fn add_veth(
        &self,
        name: &str,
        peer: &str,
        netns: Option<BorrowedFd<'_>>,
    ) -> Result<(), NetlinkError> {
        let mut other = LinkMessage::default();
        other.attributes.push(LinkAttribute::IfName(peer.into()));
        let netns = netns.map(|netns| LinkAttribute::NetNsFd(netns.as_raw_fd()));
        other.attributes.extend(netns);
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(name.into()),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Veth),
                LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(other))),
            ]),
        ];
        let request = RouteNetlinkMessage::NewLink(message);
        self.acked("create veth pair", request, NLM_F_CREATE | NLM_F_EXCL)
    }

    fn add_interface(&self, name: &str, kind: InfoKind) -> Result<(), NetlinkError> {
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(name.into()),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)]),
        ];
        let request = RouteNetlinkMessage::NewLink(message);
        self.acked("create interface", request, NLM_F_CREATE | NLM_F_EXCL)
    }

    fn set_master(&self, index: u32, master: u32) -> Result<(), NetlinkError> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes.push(LinkAttribute::Controller(master));
        self.acked("set master", RouteNetlinkMessage::SetLink(message), 0)
    }

    fn delete_interface(&self, index: u32) -> Result<(), NetlinkError> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        let request = RouteNetlinkMessage::DelLink(message);
        self.acked("delete interface", request, 0)
    }

    fn add_address(&self, address: &Address) -> Result<(), NetlinkError> {
        let request = RouteNetlinkMessage::NewAddress(address_message(address));
        self.acked("add address", request, NLM_F_CREATE | NLM_F_EXCL)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::lab::{LabError, Namespace};

    #[test]
    fn a_peer_is_made_in_another_namespace() {
        let (one, other) = (
            Namespace::new("one").unwrap(),
            Namespace::new("other").unwrap(),
        );
        let failed = |error: NetlinkError| LabError::unexpected(error.to_string());
        let found = |name: &str| {
            let link = Netlink::new().and_then(|netlink| netlink.link_by_name(name));
            link.map_err(failed)
        };
        let veth = || {
            Netlink::new()
                .and_then(|netlink| netlink.add_veth("v0", "v1", Some(other.fd().as_fd())))
                .map_err(failed)
        };
        one.run(veth).unwrap();
        assert!(one.run(|| found("v0")).unwrap().is_some());
        assert_eq!(one.run(|| found("v1")).unwrap(), None);
        assert!(other.run(|| found("v1")).unwrap().is_some());
    }
}
