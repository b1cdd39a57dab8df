//! The last step into this host, which both directions of a lane take: rewriting a packet and
//! writing it to the TUN.
//!
//! Owns no state. Single packets are written here. Super-packets, which are most, are coalesced and
//! written by [`super::inbound`].

use std::io::IoSlice;

use tracing::debug;

use super::shared::{Context, LaneParts};
use crate::io::tun::VNET_HDR_LEN;
use crate::model::drops::{DropReason, Dropped};
use crate::model::peer::PeerId;
use crate::packet::fragment::Fragments;
use crate::packet::vnet::VnetHdr;
use crate::packet::{Parsed, ecn};

/// How a packet came out of the tunnel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arrival {
    /// The peer that it came from.
    pub(super) peer: PeerId,
    /// Whether its checksum is partial.
    pub(super) partial: bool,
    /// ECN field of the outer header of its datagram.
    pub(super) outer_ecn: u8,
}

/// Checks and rewrites a packet, or the head of a super-packet, that came out of the tunnel.
#[inline]
pub(super) fn rewrite(
    context: Context<'_>,
    peer: PeerId,
    packet: &mut [u8],
    parsed: &mut Parsed,
    partial: bool,
) -> Result<(), Dropped> {
    let (now, hop) = (context.now, &context.view.hop);
    (context.view.forwarder)
        .inbound(now, hop, peer, packet, parsed, partial)
        .map_err(|reason| Dropped::of(peer, reason))?;
    context.view.peer(peer).clamp_mss(packet, parsed, partial);
    Ok(())
}

/// Rewrites one packet that was not coalesced with others and writes it to the TUN.
pub(super) fn deliver(
    parts: &LaneParts,
    context: Context<'_>,
    packet: &mut [u8],
    arrival: Arrival,
) -> Result<(), Dropped> {
    let Arrival { peer, partial, .. } = arrival;
    let known = |reason| Dropped::of(peer, reason);
    let mut parsed = Parsed::parse(packet).map_err(known)?;
    if partial && !parsed.may_be_partial() {
        return Err(known(DropReason::BadChecksumFlag));
    }
    ecn::carry_over(packet, &parsed, arrival.outer_ecn).map_err(known)?;
    let vnet = VnetHdr::single(&parsed, partial).to_bytes();
    rewrite(context, peer, packet, &mut parsed, partial)?;
    let packet = &packet[..parsed.total()];
    write(parts, &vnet, packet).map_err(known)?;
    parts.counters.peers[usize::from(peer.0)]
        .rx
        .add(1, packet.len());
    Ok(())
}

/// Writes one packet to the TUN as it is.
pub(super) fn write_as_is(parts: &LaneParts, packet: &[u8]) -> Result<(), DropReason> {
    write(parts, &[0; VNET_HDR_LEN], packet)
}

/// Writes an IPv4 packet, which is rewritten already, to the TUN in fragments of at most `mtu`
/// bytes.
pub(super) fn write_fragments(
    parts: &LaneParts,
    packet: &mut [u8],
    parsed: &Parsed,
    arrival: Arrival,
    mtu: usize,
) -> Result<(), Dropped> {
    let known = |reason| Dropped::of(arrival.peer, reason);
    if arrival.partial {
        parsed.finish_checksum(packet);
    }
    let mut fragments = Fragments::new(parsed, packet, mtu).ok_or(known(DropReason::TooBig))?;
    let mut fragment = vec![0; mtu];
    while let Some(len) = fragments.next_into(&mut fragment) {
        write_as_is(parts, &fragment[..len]).map_err(known)?;
    }
    parts.counters.peers[usize::from(arrival.peer.0)]
        .rx
        .add(1, parsed.total());
    Ok(())
}

fn write(parts: &LaneParts, vnet: &[u8], packet: &[u8]) -> Result<(), DropReason> {
    let sent = parts.tun.send(&[IoSlice::new(vnet), IoSlice::new(packet)]);
    sent.map_err(|error| {
        debug!(%error, "the TUN refused a packet");
        DropReason::TunWriteFailed
    })
}
