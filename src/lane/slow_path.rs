//! What is out of the ordinary: packets that are answered instead of carried, and fragments.
//!
//! Owns the way of such packets through the lane, so that the loops stay straight. Nothing here is
//! on the path of an ordinary packet.
//!
//! An answer goes back the way the packet came: on the old server about a client's packet straight to
//! the TUN, which leads to the uplink; about the application's packet into the tunnel, where the new
//! server translates it like a router's. On the new server it takes the way of a client's packet, so
//! that what it quotes is what the application's host has sent.

use std::io::IoSlice;
use std::sync::Arc;
use std::time::Instant;

use super::inbound::{Inbound, Plain, pass_in};
use super::outbound::{Outbound, Sealed, Sealing, checksum_flag};
use super::shared::{Context, LaneParts};
use crate::channel::wire::Flags;
use crate::flow::role::ReplyTo;
use crate::io::tun::VNET_HDR_LEN;
use crate::model::drops::{DropReason, Dropped};
use crate::model::peer::PeerId;
use crate::packet::fragment::{Cut, Overlaps, Waiting, complete, is_first, may_cut};
use crate::packet::icmp_reply::{About, Answers};
use crate::packet::offload::{Segments, VnetHdr};
use crate::packet::{Family, Parsed};

/// Every link that carries IPv6 carries this much; one that does not must cut and join below it
/// (RFC 8200 section 5).
const IPV6_MIN_MTU: usize = 1_280;

/// What one direction of a lane keeps for the extraordinary; fragments wait with a `T` each.
pub(super) struct Aside<T> {
    answers: Answers,
    overlaps: Overlaps,
    /// Frames from the TUN, or packets out of the tunnel.
    waiting: Waiting<T>,
    /// A first fragment passed, which others may have waited for.
    first: Option<u32>,
}

/// How a packet came out of the tunnel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arriving {
    pub(super) peer: PeerId,
    pub(super) partial: bool,
    pub(super) outer_ecn: u8,
}

impl<T> Aside<T> {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            answers: Answers::new(now),
            overlaps: Overlaps::default(),
            waiting: Waiting::default(),
            first: None,
        }
    }

    /// Takes note of a fragment that comes by.
    #[cold]
    pub(super) fn note_piece(
        &mut self,
        context: Context<'_>,
        parsed: &Parsed,
        packet: &[u8],
    ) -> Result<(), DropReason> {
        self.overlaps.check(context.now, parsed, packet)?;
        self.first = is_first(parsed).then(|| parsed.fragment_id());
        Ok(())
    }

    /// Whether there is something to do after a packet that left without a reason to drop it.
    #[inline]
    pub(super) fn has_news(&self) -> bool {
        self.first.is_some()
    }
}

impl Aside<Arriving> {
    /// Like [`pass_in`], for a packet that is a fragment or was put together.
    pub(super) fn pass_in(
        &mut self,
        parts: &LaneParts,
        context: Context<'_>,
        packet: &mut [u8],
        how: Arriving,
    ) -> Result<(), Dropped> {
        let known = |reason| Dropped::of(how.peer, reason);
        let parsed = Parsed::parse(packet).map_err(known)?;
        let is_piece = parsed.fragment() != crate::packet::Fragment::None;
        if is_piece {
            self.note_piece(context, &parsed, packet).map_err(known)?;
        }
        let first = self.first.take();
        let Err(drop) = pass_in(parts, context, how.peer, packet, how.partial, how.outer_ecn)
        else {
            if let Some(id) = first {
                self.release_arriving(parts, context, id);
            }
            return Ok(());
        };
        if is_piece && drop.reason == DropReason::FragmentUnknown {
            let id = parsed.fragment_id();
            for given_up in self.waiting.keep(context.now, id, how, packet) {
                parts.count(Dropped::of(given_up.with.peer, drop.reason));
            }
            return Ok(());
        }
        self.refuse_in(parts, context, packet, &parsed, how, drop)
    }

    /// What came before its first fragment can be told now.
    fn release_arriving(&mut self, parts: &LaneParts, context: Context<'_>, id: u32) {
        for mut held in self.waiting.take(id) {
            let how = held.with;
            let packet = &mut held.bytes;
            match pass_in(parts, context, how.peer, packet, how.partial, how.outer_ecn) {
                Err(drop) if drop.reason == DropReason::FragmentUnknown => {
                    // Another packet's with the same identification.
                    self.waiting.keep(context.now, id, how, packet);
                }
                Err(drop) => parts.count(drop),
                Ok(()) => {}
            }
        }
    }

    /// A packet for a client goes no further: cut it or answer it, if that may be. The answer
    /// waits in `answers`.
    #[cold]
    pub(super) fn refuse_in(
        &mut self,
        parts: &LaneParts,
        context: Context<'_>,
        packet: &mut [u8],
        parsed: &Parsed,
        how: Arriving,
        drop: Dropped,
    ) -> Result<(), Dropped> {
        let forwarder = &parts.shared.translation;
        let Some(from) = forwarder.inbound_reply_from(&context.view.hop, parsed, packet) else {
            return Err(drop);
        };
        let mtu = context.view.hop.mtu;
        let Some(about) = About::of(drop.reason, mtu) else {
            return Err(drop);
        };
        let is_whole = packet.len() >= parsed.total();
        if about == About::TooBig(mtu) && may_cut(parsed, packet) && is_whole {
            return write_cut(parts, packet, parsed, how, mtu);
        }
        let made = self.answers.make(context.now, about, packet, parsed, from);
        if let Err(reason) = made {
            parts.count(Dropped::of(how.peer, reason));
        }
        Err(drop)
    }
}

impl Aside<()> {
    /// A packet from the TUN goes no further: answer it, if that may be.
    fn refuse_out(
        &mut self,
        parts: &LaneParts,
        context: Context<'_>,
        packet: &[u8],
        peer: PeerId,
        reason: DropReason,
    ) {
        let Some(about) = About::of(reason, context.view.peer(peer).mtu) else {
            return;
        };
        let Ok(parsed) = Parsed::parse(packet) else {
            return;
        };
        let forwarder = &parts.shared.translation;
        let path = forwarder.outbound_reply(about, &context.view.hop, &parsed, packet);
        match (self.answers).make(context.now, about, packet, &parsed, path.from) {
            Ok(_) => {}
            Err(reason) => return parts.count(Dropped::of(peer, reason)),
        }
        let Some(answer) = self.answers.take() else {
            return;
        };
        let sent = match path.to {
            ReplyTo::Client => parts
                .tun
                .send(&[IoSlice::new(&[0; VNET_HDR_LEN]), IoSlice::new(answer)])
                .map_err(|_| Dropped::of(peer, DropReason::TunWriteFailed)),
            ReplyTo::Application => pass_in(parts, context, peer, answer, false, 0),
        };
        if let Err(drop) = sent {
            parts.count(drop);
        }
    }
}

/// Writes an IPv4 packet to the TUN in pieces that the uplink takes.
fn write_cut(
    parts: &LaneParts,
    packet: &mut [u8],
    parsed: &Parsed,
    how: Arriving,
    mtu: usize,
) -> Result<(), Dropped> {
    let known = |reason| Dropped::of(how.peer, reason);
    if how.partial {
        complete(parsed, packet);
    }
    let mut cut = Cut::new(parsed, packet, mtu).ok_or(known(DropReason::TooBig))?;
    let mut piece = vec![0; mtu];
    while let Some(len) = cut.next_into(&mut piece) {
        parts
            .tun
            .send(&[
                IoSlice::new(&[0; VNET_HDR_LEN]),
                IoSlice::new(&piece[..len]),
            ])
            .map_err(|_| known(DropReason::TunWriteFailed))?;
    }
    parts.counters.peers[usize::from(how.peer.0)]
        .rx
        .add(1, parsed.total());
    Ok(())
}

impl Outbound {
    /// What is left to do after the frame in `self.frame[..len]`.
    #[cold]
    pub(super) fn after_frame(
        &mut self,
        context: Context<'_>,
        len: usize,
        result: Result<(), Dropped>,
    ) {
        let first = self.aside.first.take();
        let packet = self.frame.get(VNET_HDR_LEN..len).unwrap_or_default();
        match (result, first) {
            (Ok(()), Some(id)) => self.release(context, id),
            (Ok(()), None) => {}
            (Err(drop), _) if drop.reason == DropReason::FragmentUnknown => {
                let Ok(parsed) = Parsed::parse(packet) else {
                    return;
                };
                let (id, frame) = (parsed.fragment_id(), &self.frame[..len]);
                for _ in self.aside.waiting.keep(context.now, id, (), frame) {
                    self.parts.count(drop);
                }
            }
            (Err(drop), _) => {
                self.parts.count(drop);
                if let Some(peer) = drop.peer {
                    self.aside
                        .refuse_out(&self.parts, context, packet, peer, drop.reason);
                }
            }
        }
    }

    /// What came before its first fragment can be told now.
    fn release(&mut self, context: Context<'_>, id: u32) {
        for held in self.aside.waiting.take(id) {
            let len = held.bytes.len();
            self.frame[..len].copy_from_slice(&held.bytes);
            match self.route(context, len) {
                Err(drop) if drop.reason == DropReason::FragmentUnknown => {
                    // Another packet's with the same identification.
                    self.aside.waiting.keep(context.now, id, (), &held.bytes);
                }
                Err(drop) => self.parts.count(drop),
                Ok(()) => {}
            }
        }
        self.aside.first = None;
    }

    /// Takes an answer about a packet that came out of the tunnel back into it.
    #[cold]
    fn send_back(&mut self, context: Context<'_>, answer: &[u8]) {
        let len = VNET_HDR_LEN + answer.len();
        self.frame[..VNET_HDR_LEN].copy_from_slice(&VnetHdr::default().to_bytes());
        self.frame[VNET_HDR_LEN..len].copy_from_slice(answer);
        if let Err(drop) = self.route(context, len) {
            self.parts.count(drop);
        }
        self.flush();
    }

    /// Gives up fragments whose first never came.
    pub(super) fn tick(&mut self, now: Instant) {
        while self.aside.waiting.expire(now).is_some() {
            self.parts.count(DropReason::FragmentUnknown.into());
        }
    }
}

impl Inbound {
    /// Writes a fragment that came out of the tunnel.
    pub(super) fn deliver_piece(
        &mut self,
        context: Context<'_>,
        plain: &Plain,
        outer_ecn: u8,
    ) -> Result<(), Dropped> {
        // What came before it goes first.
        self.flush(context);
        let how = Arriving {
            peer: plain.peer,
            partial: plain.flags.has(Flags::CSUM_PARTIAL),
            outer_ecn,
        };
        let packet = &mut self.slab[plain.range.clone()];
        let result = self.aside.pass_in(&self.parts, context, packet, how);
        self.send_answer(context);
        result
    }

    /// Sends an answer about a packet that came out of the tunnel back into it.
    #[inline]
    pub(super) fn send_answer(&mut self, context: Context<'_>) {
        if let Some(answer) = self.aside.answers.take() {
            self.answering
                .get_or_insert_with(|| {
                    Box::new(Outbound::new(Arc::clone(&self.parts), context.now))
                })
                .send_back(context, answer);
        }
    }

    /// Gives up fragments whose first never came.
    pub(super) fn expire_pieces(&mut self, now: Instant) {
        while let Some(held) = self.aside.waiting.expire(now) {
            let unknown = Dropped::of(held.with.peer, DropReason::FragmentUnknown);
            self.parts.count(unknown);
        }
    }
}

impl Sealing<'_> {
    /// Packets that are too big for a datagram where splitting is switched off: cut as a router does,
    /// or refused.
    #[cold]
    pub(super) fn seal_cuts(
        &mut self,
        segments: &mut Segments<'_>,
        scratch: &mut [u8],
        sealed: &mut Sealed,
    ) -> Result<(), DropReason> {
        while let Some(len) = segments.next_len() {
            let Some(segment) = segments.next_into(scratch) else {
                break;
            };
            let packet = &mut scratch[..segment.len];
            let parsed = Parsed::parse(packet)?;
            if parsed.family() == Family::V6 && len <= IPV6_MIN_MTU {
                self.seal_parts(packet, checksum_flag(segment.csum_partial))?;
            } else if may_cut(&parsed, packet) {
                if segment.csum_partial {
                    complete(&parsed, packet);
                }
                let mut cut = Cut::new(&parsed, packet, self.mtu).ok_or(DropReason::TooBig)?;
                let mut piece = vec![0; self.mtu];
                while let Some(len) = cut.next_into(&mut piece) {
                    self.seal_parts(&piece[..len], Flags::NONE)?;
                }
            } else if segment.len > self.mtu {
                return Err(DropReason::TooBig);
            } else {
                self.seal_parts(packet, checksum_flag(segment.csum_partial))?;
            }
            sealed.packets += 1;
            sealed.bytes += len;
        }
        Ok(())
    }
}
