//! What becomes of packets that are not just carried: fragments, and packets that do not go on.
//!
//! Owns what has to be remembered of them: fragments that wait for their first one, which bytes of
//! a fragmented packet were seen, and how many ICMP errors may still be sent. It returns what it
//! decides as a value, and the two loops carry it out. Nothing here touches the TUN, the socket or
//! a counter, and no ordinary packet comes here.
//!
//! ```text
//! TUN ──► outbound ──► tunnel    Drop, Hold, or Reply, which is written to the TUN
//! TUN ◄── inbound ◄─── tunnel    Drop, Hold, Fragment, or Reply, which goes into the tunnel
//! ```

use std::net::IpAddr;
use std::time::Instant;

use super::shared::Context;
use crate::flow::role::{Forwarder, ReplyTo};
use crate::model::drops::{DropReason, Dropped};
use crate::model::peer::PeerId;
use crate::packet::fragment::{Client, Held, HeldFragments, Key, Overlaps};
use crate::packet::icmp_reply::{IcmpError, IcmpReplies};
use crate::packet::{Family, Fragment, IPV6_MIN_MTU, Parsed};

/// What one direction of a lane remembers of packets on the slow path. It keeps a `T` with each
/// fragment that waits, which says how the fragment came.
pub(super) struct SlowPath<T> {
    replies: IcmpReplies,
    overlaps: Overlaps,
    held: HeldFragments<T>,
    /// Key of the first fragment that was noted last, until it is known whether that went on.
    first: Option<Key>,
}

/// What becomes of a packet from the TUN that is not carried.
#[derive(PartialEq, Eq, Debug)]
#[must_use]
pub(super) enum OutboundOutcome<'a> {
    /// It is dropped.
    Drop,
    /// It waits for its first fragment: [`SlowPath::hold`] it under this key.
    Hold(Key),
    /// It is dropped, and its sender is told.
    Reply {
        /// The peer that the packet belongs to.
        peer: PeerId,
        /// Who gets the ICMP error, which is written to the TUN.
        to: ReplyTo,
        /// The ICMP error.
        bytes: &'a mut [u8],
    },
    /// It is dropped. Its sender is not told, because there were too many ICMP errors of late.
    ReplyLimited,
}

/// What becomes of a packet out of the tunnel that is not written.
#[derive(PartialEq, Eq, Debug)]
#[must_use]
pub(super) enum InboundOutcome<'a> {
    /// It is dropped.
    Drop,
    /// It waits for its first fragment: [`SlowPath::hold`] it under this key.
    Hold(Key),
    /// It goes on in fragments of at most this many bytes.
    Fragment(usize),
    /// It is dropped. This ICMP error, which goes into the tunnel, tells its sender.
    Reply(&'a mut [u8]),
    /// It is dropped. Its sender is not told, because there were too many ICMP errors of late.
    ReplyLimited,
}

/// How to send a packet where none is split over several datagrams (`--no-split`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Unsplit {
    /// As it is. It may be longer than a datagram only if every IPv6 link carries its length; then
    /// it is split all the same.
    Whole,
    /// In IP fragments, each in a datagram.
    Fragment,
    /// Not at all: it is too big.
    Refuse,
}

impl<T> SlowPath<T> {
    /// Starts with nothing to remember.
    pub(super) fn new(now: Instant, client: Client) -> Self {
        Self {
            replies: IcmpReplies::new(now),
            overlaps: Overlaps::new(client),
            held: HeldFragments::new(client),
            first: None,
        }
    }

    /// Takes note of a fragment before it goes on. `peer` is the one that it came from, if it came
    /// out of the tunnel.
    ///
    /// # Errors
    /// [`DropReason::FragmentOverlap`].
    #[cold]
    pub(super) fn note_fragment(
        &mut self,
        now: Instant,
        peer: Option<PeerId>,
        parsed: &Parsed,
        packet: &[u8],
    ) -> Result<(), DropReason> {
        let key = key_of(peer, parsed, packet);
        self.overlaps.check(now, key, parsed, packet)?;
        self.first = (parsed.fragment() == Fragment::First).then_some(key);
        Ok(())
    }

    /// Whether the packet that has just gone on was a first fragment, so that there may be
    /// something to [release](Self::release).
    #[inline]
    pub(super) fn has_first(&self) -> bool {
        self.first.is_some()
    }

    /// The fragment noted last has gone on. If it was a first one, returns those that waited for
    /// it, in the order they came.
    ///
    /// They are to be judged once more and never held again: one that is unknown even now was
    /// forgotten since.
    #[must_use]
    pub(super) fn release(&mut self) -> Vec<Held<T>> {
        match self.first.take() {
            Some(first) => self.held.take(first),
            None => Vec::new(),
        }
    }

    /// Keeps a fragment until its first one comes. Returns those that it displaced.
    #[must_use]
    pub(super) fn hold(&mut self, now: Instant, key: Key, with: T, bytes: &[u8]) -> Vec<Held<T>> {
        self.held.keep(now, key, with, bytes)
    }

    /// Returns a fragment whose first one never came, as long as there is one.
    pub(super) fn expire(&mut self, now: Instant) -> Option<Held<T>> {
        self.held.expire(now)
    }

    /// Decides about a packet from the TUN that is not carried, for the reason given.
    #[cold]
    pub(super) fn refuse_outbound(
        &mut self,
        context: Context<'_>,
        forwarder: &Forwarder,
        packet: &[u8],
        drop: Dropped,
    ) -> OutboundOutcome<'_> {
        self.first = None;
        if drop.reason == DropReason::FragmentUnknown {
            return match Parsed::parse(packet) {
                Ok(parsed) => OutboundOutcome::Hold(key_of(None, &parsed, packet)),
                Err(_) => OutboundOutcome::Drop,
            };
        }
        // Nobody is told about a packet that belongs to no peer.
        let Some(peer) = drop.peer else {
            return OutboundOutcome::Drop;
        };
        let Some(about) = IcmpError::of(drop.reason, context.view.peer(peer).mtu) else {
            return OutboundOutcome::Drop;
        };
        let Ok(parsed) = Parsed::parse(packet) else {
            return OutboundOutcome::Drop;
        };
        let sent = forwarder.outbound_reply(about, &context.view.hop, &parsed, packet);
        match self.reply(context.now, about, packet, &parsed, sent.from) {
            Ok(Some(bytes)) => OutboundOutcome::Reply {
                peer,
                to: sent.to,
                bytes,
            },
            Ok(None) => OutboundOutcome::Drop,
            Err(Limited) => OutboundOutcome::ReplyLimited,
        }
    }

    /// Decides about a packet out of the tunnel, or the head of a super-packet, that is not
    /// written, for the reason given.
    #[cold]
    pub(super) fn refuse_inbound(
        &mut self,
        context: Context<'_>,
        forwarder: &Forwarder,
        packet: &[u8],
        parsed: &Parsed,
        drop: Dropped,
    ) -> InboundOutcome<'_> {
        self.first = None;
        let reason = drop.reason;
        if reason == DropReason::FragmentUnknown && parsed.fragment() != Fragment::None {
            return InboundOutcome::Hold(key_of(drop.peer, parsed, packet));
        }
        let hop = &context.view.hop;
        let Some(about) = IcmpError::of(reason, hop.mtu) else {
            return InboundOutcome::Drop;
        };
        let Some(from) = forwarder.inbound_reply_from(hop, parsed, packet) else {
            return InboundOutcome::Drop;
        };
        let is_whole = packet.len() >= parsed.total();
        if about == IcmpError::TooBig(hop.mtu) && parsed.may_fragment(packet) && is_whole {
            return InboundOutcome::Fragment(hop.mtu);
        }
        match self.reply(context.now, about, packet, parsed, from) {
            Ok(Some(bytes)) => InboundOutcome::Reply(bytes),
            Ok(None) => InboundOutcome::Drop,
            Err(Limited) => InboundOutcome::ReplyLimited,
        }
    }

    /// Makes an ICMP error about a packet, if one may be sent about such a packet.
    fn reply(
        &mut self,
        now: Instant,
        about: IcmpError,
        packet: &[u8],
        parsed: &Parsed,
        from: IpAddr,
    ) -> Result<Option<&mut [u8]>, Limited> {
        let made = self.replies.make(now, about, packet, parsed, from);
        made.map_err(|_| Limited)?;
        Ok(self.replies.take())
    }
}

/// What the fragments of one packet have in common, and the peer that they came from.
fn key_of(peer: Option<PeerId>, parsed: &Parsed, packet: &[u8]) -> Key {
    let key = Key::of(parsed, packet);
    peer.map_or(key, |peer| key.through(peer))
}

/// How to send a packet in datagrams that hold `mtu` bytes of it, where none is split.
pub(super) fn unsplit(parsed: &Parsed, packet: &[u8], mtu: usize) -> Unsplit {
    if parsed.family() == Family::V6 && packet.len() <= IPV6_MIN_MTU {
        Unsplit::Whole
    } else if parsed.may_fragment(packet) {
        Unsplit::Fragment
    } else if packet.len() > mtu {
        Unsplit::Refuse
    } else {
        Unsplit::Whole
    }
}

/// There were too many ICMP errors of late.
struct Limited;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::gate::{Gate, GateConfig};
    use crate::flow::role::Hop;
    use crate::flow::seed::Seed;
    use crate::flow::translate::{Translator, TranslatorConfig};
    use crate::lane::shared::{LaneView, PeerView};
    use crate::packet::Kind;
    use crate::packet::fragment::FRAGMENT_LIFE;
    use crate::packet::icmp_reply::REPLY_BURST;
    use crate::packet::testing::Plan;
    use crate::testing::epoch;

    const PEER: PeerId = PeerId(0);
    const CLIENT: &str = "203.0.113.9";
    const MOVED: &str = "192.0.2.5";
    const TUNNEL_MTU: usize = 1_300;
    const LINK_MTU: usize = 1_200;

    fn old() -> Forwarder {
        let moves = [MOVED.parse().unwrap()];
        let config = GateConfig {
            max_flows: 10,
            seed: Seed::new([1, 2]),
            started: epoch(),
            resumes: false,
        };
        Forwarder::Old(vec![Gate::new(&moves, config).into()])
    }

    fn new() -> Forwarder {
        Forwarder::New(Translator::new(TranslatorConfig {
            shards: 1,
            max_flows: 10,
            seed: [1, 2],
            epoch: epoch(),
            note_ended: false,
        }))
    }

    fn view() -> LaneView {
        LaneView {
            peers: vec![PeerView {
                mtu: TUNNEL_MTU,
                ..PeerView::default()
            }],
            hop: Hop {
                v4: Some([192, 0, 2, 1].into()),
                v6: None,
                mtu: LINK_MTU,
            },
            ..LaneView::default()
        }
    }

    /// An IPv4 packet of this length, which may be fragmented or may not.
    fn packet(src: &str, dst: &str, len: usize, may_fragment: bool) -> Vec<u8> {
        let mut plan = Plan::new(Kind::Udp, src, dst);
        plan.payload = vec![0; len - 28];
        let mut packet = plan.build();
        packet[6] = if may_fragment { 0 } else { 0x40 };
        packet
    }

    /// A fragment of the packet with this identification.
    fn fragment(id: u8, first: bool) -> Vec<u8> {
        let mut packet = packet(CLIENT, MOVED, 68, true);
        (packet[4], packet[5]) = (0, id);
        (packet[6], packet[7]) = if first { (0x20, 0) } else { (0, 6) };
        packet
    }

    struct Bed<'v> {
        slow_path: SlowPath<u8>,
        context: Context<'v>,
        forwarder: Forwarder,
    }

    impl<'v> Bed<'v> {
        fn new(forwarder: Forwarder, view: &'v LaneView) -> Self {
            let now = epoch();
            Self {
                slow_path: SlowPath::new(now, Client::Source),
                context: Context { now, view },
                forwarder,
            }
        }

        fn note(&mut self, packet: &[u8]) -> Result<(), DropReason> {
            let parsed = Parsed::parse(packet).unwrap();
            let now = self.context.now;
            self.slow_path.note_fragment(now, None, &parsed, packet)
        }

        fn outbound(&mut self, packet: &[u8], drop: Dropped) -> OutboundOutcome<'_> {
            (self.slow_path).refuse_outbound(self.context, &self.forwarder, packet, drop)
        }

        fn inbound(&mut self, packet: &[u8], reason: DropReason) -> InboundOutcome<'_> {
            let parsed = Parsed::parse(packet).unwrap();
            let drop = reason.into();
            (self.slow_path).refuse_inbound(self.context, &self.forwarder, packet, &parsed, drop)
        }
    }

    /// Source, destination, and type and code of an ICMP error.
    fn icmp(bytes: &[u8]) -> (String, String, [u8; 2]) {
        let parsed = Parsed::parse(bytes).unwrap();
        let addr = |addr| IpAddr::from(addr).to_string();
        let kind = [bytes[parsed.l4()], bytes[parsed.l4() + 1]];
        (addr(parsed.src(bytes)), addr(parsed.dst(bytes)), kind)
    }

    fn told(from: &str, to: &str, kind: [u8; 2]) -> (String, String, [u8; 2]) {
        (from.into(), to.into(), kind)
    }

    const TOO_BIG: [u8; 2] = [3, 4];
    const EXPIRED: [u8; 2] = [11, 0];

    #[test]
    fn fragments_wait_for_their_first_one_and_follow_it_in_order() {
        let view = view();
        let mut bed = Bed::new(old(), &view);
        let now = bed.context.now;
        let (first, later, another) = (fragment(1, true), fragment(1, false), fragment(2, false));
        for (with, packet) in [(1, &later), (2, &another), (3, &later)] {
            assert_eq!(bed.note(packet), Ok(()));
            let unknown = DropReason::FragmentUnknown.into();
            let OutboundOutcome::Hold(key) = bed.outbound(packet, unknown) else {
                panic!("not held");
            };
            assert!(bed.slow_path.hold(now, key, with, packet).is_empty());
        }
        assert!(bed.slow_path.release().is_empty(), "no first one yet");
        assert_eq!(bed.note(&first), Ok(()));
        assert!(bed.slow_path.has_first());
        let released = bed.slow_path.release();
        let order: Vec<u8> = released.iter().map(|held| held.with).collect();
        assert_eq!(order, [1, 3]);
        assert!(!bed.slow_path.has_first(), "released once");
    }

    /// Whoever sends first fragments with the identification of those that wait makes no work with
    /// them, and does not keep them alive.
    #[test]
    fn fragments_are_judged_again_for_a_first_one_of_their_own_packet_alone() {
        const HELD: usize = 60;
        let view = view();
        let mut bed = Bed::new(old(), &view);
        let start = bed.context.now;
        let later = fragment(7, false);
        for _ in 0..HELD {
            let unknown = DropReason::FragmentUnknown.into();
            let OutboundOutcome::Hold(key) = bed.outbound(&later, unknown) else {
                panic!("not held");
            };
            assert!(bed.slow_path.hold(start, key, 1, &later).is_empty());
        }
        let mut judged = 0;
        for n in 1..=250 {
            bed.context.now += FRAGMENT_LIFE / 250;
            let mut first = fragment(7, true);
            first[15] = first[15].wrapping_add(n);
            assert_eq!(bed.note(&first), Ok(()));
            judged += bed.slow_path.release().len();
        }
        assert_eq!(judged, 0, "none of them is of those packets");
        let now = start + FRAGMENT_LIFE;
        let expired = (0..).map_while(|_| bed.slow_path.expire(now)).count();
        assert_eq!(expired, HELD);
    }

    #[test]
    fn nothing_follows_a_first_fragment_that_did_not_go_on() {
        let view = view();
        let mut bed = Bed::new(old(), &view);
        let (first, later) = (fragment(1, true), fragment(1, false));
        let now = bed.context.now;
        let key = Key::of(&Parsed::parse(&later).unwrap(), &later);
        assert!(bed.slow_path.hold(now, key, 1, &later).is_empty());
        assert_eq!(bed.note(&first), Ok(()));
        let not_moved = DropReason::NotMoved.into();
        assert_eq!(bed.outbound(&first, not_moved), OutboundOutcome::Drop);
        assert!(bed.slow_path.release().is_empty());
        assert_eq!(bed.note(&first), Ok(()));
        assert_eq!(
            bed.inbound(&first, DropReason::NotMoved),
            InboundOutcome::Drop
        );
        assert!(bed.slow_path.release().is_empty());
    }

    #[test]
    fn a_fragment_that_writes_over_another_is_refused_before_it_goes_on() {
        let view = view();
        let mut bed = Bed::new(old(), &view);
        let first = fragment(1, true);
        let mut over = fragment(1, false);
        over[7] = 1;
        assert_eq!(bed.note(&first), Ok(()));
        assert_eq!(bed.note(&over), Err(DropReason::FragmentOverlap));
    }

    #[test]
    fn the_old_server_tells_clients_itself() {
        let view = view();
        let mut bed = Bed::new(old(), &view);
        let big = packet(CLIENT, MOVED, 1_400, false);
        let drop = Dropped::of(PEER, DropReason::TooBig);
        let outcome = bed.outbound(&big, drop);
        let OutboundOutcome::Reply { to, bytes, .. } = outcome else {
            panic!("{outcome:?}");
        };
        assert_eq!(to, ReplyTo::Sender);
        assert_eq!(icmp(bytes), told(MOVED, CLIENT, TOO_BIG));
        assert_eq!(bytes[26..28], (TUNNEL_MTU as u16).to_be_bytes());
        let drop = Dropped::of(PEER, DropReason::TtlExpired);
        let outcome = bed.outbound(&big, drop);
        let OutboundOutcome::Reply { to, bytes, .. } = outcome else {
            panic!("{outcome:?}");
        };
        assert_eq!(to, ReplyTo::Sender);
        assert_eq!(icmp(bytes), told("192.0.2.1", CLIENT, EXPIRED));
    }

    #[test]
    fn the_new_server_tells_the_application_in_the_clients_name() {
        let view = view();
        let mut bed = Bed::new(new(), &view);
        let big = packet(MOVED, CLIENT, 1_400, false);
        let drop = Dropped::of(PEER, DropReason::TooBig);
        let outcome = bed.outbound(&big, drop);
        let OutboundOutcome::Reply { to, bytes, .. } = outcome else {
            panic!("{outcome:?}");
        };
        assert_eq!(to, ReplyTo::Application);
        assert_eq!(icmp(bytes), told(CLIENT, MOVED, TOO_BIG));
        // The old server is the last hop of a packet out of the tunnel.
        let inbound = bed.inbound(&big, DropReason::TtlExpired);
        assert_eq!(inbound, InboundOutcome::Drop);
    }

    #[test]
    fn a_packet_too_big_for_the_link_is_fragmented_or_its_sender_told() {
        let view = view();
        let mut bed = Bed::new(old(), &view);
        let too_big = DropReason::TooBig;
        let whole = packet(MOVED, CLIENT, 1_400, true);
        assert_eq!(
            bed.inbound(&whole, too_big),
            InboundOutcome::Fragment(LINK_MTU)
        );
        let mut replied = |packet: &[u8]| {
            let parsed = Parsed::parse(&whole).unwrap();
            let (context, forwarder) = (bed.context, &bed.forwarder);
            let slow_path = &mut bed.slow_path;
            let drop = too_big.into();
            let outcome = slow_path.refuse_inbound(context, forwarder, packet, &parsed, drop);
            let InboundOutcome::Reply(bytes) = outcome else {
                panic!("{outcome:?}");
            };
            icmp(bytes)
        };
        let from_hop = told("192.0.2.1", MOVED, TOO_BIG);
        let fixed = packet(MOVED, CLIENT, 1_400, false);
        assert_eq!(replied(&fixed), from_hop);
        // Of a super-packet only the head is at hand.
        assert_eq!(replied(&whole[..1_300]), from_hop);
    }

    #[test]
    fn most_packets_are_dropped_without_a_word() {
        let view = view();
        let mut bed = Bed::new(old(), &view);
        let packet = packet(CLIENT, MOVED, 100, false);
        let drop = Dropped::of(PEER, DropReason::NoSession);
        assert_eq!(bed.outbound(&packet, drop), OutboundOutcome::Drop);
        let nobodys = DropReason::TtlExpired.into();
        assert_eq!(bed.outbound(&packet, nobodys), OutboundOutcome::Drop);
        let inbound = bed.inbound(&packet, DropReason::IcmpUnrelated);
        assert_eq!(inbound, InboundOutcome::Drop);
    }

    #[test]
    fn too_many_icmp_errors_are_not_sent() {
        let view = view();
        let mut bed = Bed::new(old(), &view);
        let packet = packet(CLIENT, MOVED, 100, false);
        let drop = Dropped::of(PEER, DropReason::TtlExpired);
        for _ in 0..REPLY_BURST {
            let outcome = bed.outbound(&packet, drop);
            assert!(matches!(outcome, OutboundOutcome::Reply { .. }));
        }
        let outcome = bed.outbound(&packet, drop);
        assert_eq!(outcome, OutboundOutcome::ReplyLimited);
        let inbound = bed.inbound(&packet, DropReason::TtlExpired);
        assert_eq!(inbound, InboundOutcome::ReplyLimited);
    }

    #[test]
    fn without_splitting_what_may_be_is_fragmented_and_ipv6_has_its_least_mtu() {
        let how = |packet: &[u8], mtu| unsplit(&Parsed::parse(packet).unwrap(), packet, mtu);
        let v4 = |may_fragment| packet(CLIENT, MOVED, 1_400, may_fragment);
        assert_eq!(how(&v4(true), 1_300), Unsplit::Fragment);
        assert_eq!(how(&v4(false), 1_300), Unsplit::Refuse);
        assert_eq!(how(&v4(false), 1_400), Unsplit::Whole);
        let v6 = |len: usize| {
            let mut plan = Plan::new(Kind::Udp, "2001:db8:c::9", "2001:db8:a::5");
            plan.payload = vec![0; len - 48];
            plan.build()
        };
        assert_eq!(how(&v6(IPV6_MIN_MTU), 1_200), Unsplit::Whole);
        assert_eq!(how(&v6(IPV6_MIN_MTU + 1), 1_200), Unsplit::Refuse);
        assert_eq!(how(&v6(IPV6_MIN_MTU + 1), 1_400), Unsplit::Whole);
    }
}
