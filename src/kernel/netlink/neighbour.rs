//! Neighbours: whether the next host on a link is found there (ARP, neighbour discovery).

use std::net::IpAddr;

use netlink_packet_core::NLM_F_ACK;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage};

use super::{Family, Netlink, NetlinkError, Result};

/// `NUD_INCOMPLETE` and `NUD_FAILED` of linux/neighbour.h.
const UNANSWERED: u16 = 0x01 | 0x20;

impl Netlink {
    /// Whether the kernel looks for this host on a link, or has, and nobody says to be it. What it
    /// has not looked for of late it does not know.
    pub fn is_missed(&self, index: u32, addr: IpAddr) -> Result<bool> {
        const WHAT: &str = "look at a neighbour";
        let mut message = NeighbourMessage::default();
        message.header.family = Family::of(addr).raw();
        message.header.ifindex = index;
        let destination = NeighbourAttribute::Destination(addr.into());
        message.attributes.push(destination);
        let request = RouteNetlinkMessage::GetNeighbour(message);
        let answers = match self.exchange(WHAT, request, NLM_F_ACK) {
            Err(error) if error.is_missing() => return Ok(false),
            answers => answers?,
        };
        // struct ndmsg: family, padding, index of the link (4 bytes), state.
        let state = |answer: &Vec<u8>| Some(u16::from_ne_bytes(*answer.get(8..)?.first_chunk()?));
        let state = answers.iter().find_map(state);
        let state = state.ok_or(NetlinkError::Malformed { request: WHAT })?;
        Ok(state & UNANSWERED != 0)
    }
}
