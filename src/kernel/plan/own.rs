//! The memory of what is the old server's own: that of a killed daemon, or a new one, which takes
//! in the connections that the kernel's connection tracker knows of hosts behind this one.

use std::net::IpAddr;
use std::os::fd::OwnedFd;

use tracing::debug;

use super::{FILTER_HANDLE, PlanError, filter_from};
use crate::kernel::bpf;
use crate::kernel::change::Change;
use crate::kernel::conntrack;
use crate::kernel::netlink::{Direction, Link, Netlink, NetlinkError};
use crate::kernel::programs::{CAPTURE, NOTE_OWN, Own};
use crate::model::moved::{Move, Transport};
use crate::model::scopes::Scopes;

/// What is to be said of an interface that hides what leaves by it from the programs.
pub const NOT_NOTED_TO_MANY: &str = "is a GRE tunnel to many (without `remote`): what this server \
     itself sends there from a moved address cannot be noted, unless it is TCP or a connected UDP \
     socket; make a tunnel to each other end (`ip link add NAME type gre local ADDRESS remote \
     ADDRESS`)";

/// Takes over the memory of a killed daemon, or makes it. It is found among the descriptors that
/// somebody `kept`, or through the programs that still stand on `links` (for which this process
/// needs CAP_SYS_ADMIN).
///
/// # Errors
/// If the kernel refuses.
pub fn memory(netlink: &Netlink, links: &[Link], kept: &[OwnedFd]) -> Result<Own, PlanError> {
    if let Some(found) = Own::found(kept)? {
        return Ok(found);
    }
    for link in links {
        // None of the two has all of it.
        let mut maps = Vec::new();
        for (direction, name) in [(Direction::Egress, NOTE_OWN), (Direction::Ingress, CAPTURE)] {
            let filters = netlink.filters(link.index, direction)?;
            let ours = filters.iter().filter(|it| it.name.as_deref() == Some(name));
            let programs = ours.filter_map(|filter| filter.program_id);
            maps.extend(programs.flat_map(bpf::of_program));
        }
        if let Some(found) = Own::found(&maps)? {
            return Ok(found);
        }
    }
    Ok(Own::new()?)
}

/// Takes in the connections of hosts behind this one that could be captured by these moves, as far
/// as the kernel can tell, unless the memory is a killed daemon's. Call it when what notes new ones
/// stands on every link, and nothing is captured yet: the connection tracker knows a packet before
/// it reaches the egress of a link, so none is lost in between.
///
/// # Errors
/// If the kernel refuses.
pub fn note_older(netlink: &Netlink, own: &Own, moves: &[Move]) -> Result<(), PlanError> {
    if own.resumes() {
        return Ok(());
    }
    note_others(netlink, own, moves)
}

/// The same, of moves that were not there before, whoever had the memory first.
///
/// # Errors
/// If the kernel refuses.
pub fn note_others(netlink: &Netlink, own: &Own, moves: &[Move]) -> Result<(), PlanError> {
    let held: Vec<IpAddr> = netlink.addresses()?.iter().map(|held| held.addr).collect();
    let has_tcp = |moved: &&Move| moved.transport != Some(Transport::Udp);
    let moves: Vec<Move> = moves.iter().filter(has_tcp).cloned().collect();
    let scopes = Scopes::new(&moves);
    let moved = |addr| scopes.contains(addr);
    match conntrack::behind(moved, |addr| held.contains(&addr), Own::ROOM) {
        Ok(connections) => own.note(connections)?,
        Err(error) => debug!(%error, "no connections of hosts behind this one are known"),
    }
    Ok(())
}

/// The place for the program that notes this host's own on a link. It may stand beside the new
/// server's, which has the same preference.
///
/// # Errors
/// If there is none.
pub fn place(netlink: &Netlink, link: &Link) -> Result<Change, PlanError> {
    filter_from(
        netlink,
        link,
        Direction::Egress,
        NOTE_OWN,
        FILTER_HANDLE + 1,
    )
}

/// Whether the program that notes this host's own stands on a link. Beside an older ingress qdisc
/// there is no place for it.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn is_noted(netlink: &Netlink, link: &Link) -> Result<bool, NetlinkError> {
    let filters = netlink.filters(link.index, Direction::Egress)?;
    Ok((filters.iter()).any(|filter| filter.name.as_deref() == Some(NOTE_OWN)))
}
