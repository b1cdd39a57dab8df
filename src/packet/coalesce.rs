//! Coalescing: adjacent segments become one super-packet again, which the kernel takes in one
//! write.
//!
//! Owns what may be coalesced. Must not touch a device, and nothing here allocates: payloads stay
//! where they lie and are gathered by `writev`.
//!
//! By hand, and not by tun-rs's GRO: that one copies every packet to the heap and looks its flow up
//! in a table. Segments of one super-packet arrive side by side here, so that no table is needed,
//! and with partial checksums, so that nothing is summed up.
//!
//! ```text
//! slab:       headers│p1 … headers│p2 … headers│p3                (opened in place)
//! TUN write:  vnet │ headers p1 │ p2 │ p3                         (gathered, headers patched)
//! ```

use std::ops::Range;

use crate::packet::field::{get, get_u16, get_u32, ipv4, ipv6, put, tcp, udp};
use crate::packet::segment::PLAIN_FLAGS;
use crate::packet::vnet::{GSO_ECN, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, VnetHdr};
use crate::packet::{ACK, CWR, FIN, Family, Fragment, Kind, PSH, Parsed};

/// Most TCP segments in a super-packet: [`MAX_BIG`] of them at the MSS of a tunnel over
/// Ethernet, 1,388 bytes, are 188.
pub const MAX_PARTS: usize = 192;

/// Most datagrams in a super-packet of UDP: the kernel takes no more (`UDP_MAX_SEGMENTS`, 64
/// before Linux 6.9).
const MAX_DATAGRAMS: usize = 64;

/// Largest super-packet that is made: the IPv4 length field, which the kernel applies to IPv6 too
/// (`GSO_LEGACY_MAX_SIZE`).
pub const MAX_SUPER: usize = 65_535;

/// Largest super-packet that is made where the kernel takes BIG TCP: four times as long. 128 KiB
/// would gain half as much. The kernel takes 512 KiB (17 page fragments of 32 KiB, Linux 6.6 on),
/// but all of it has to lie in the receive buffer, which should stay in the processor's cache.
pub const MAX_BIG: usize = 4 * 65_535;

/// What became of a packet given to the [`Coalescer`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Push {
    /// It is the first of a new super-packet.
    Started,
    /// It continues the super-packet.
    Coalesced,
    /// It does not belong to what is held: write that ([`Coalescer::finish`]) and push it again.
    MustFlush,
}

/// Coalesces adjacent packets of one buffer, without moving a byte of payload.
///
/// What may be coalesced follows the kernel's own receive offload (`tcp_gro_receive`,
/// `inet_gro_receive`): the same headers but for length, identification, sequence number, PSH and
/// FIN; sequence numbers without a gap; equal payloads, of which only the last may be shorter. Only
/// packets with a partial checksum are coalesced: they were authenticated as a whole on the way,
/// and their sums follow from their lengths.
///
/// More is possible for packets that end on this host ([`Reach::Here`]). The kernel's BIG TCP over
/// IPv4 (`iph_totlen` in `linux/ip.h`, Linux 6.3 on; the TUN takes it from 6.6 on) is a
/// super-packet that is longer than the length field can tell, which then says zero. Each write
/// runs the receiving TCP and is acknowledged on its own, so that a quarter of the writes costs
/// both servers less. Nor does PSH end a super-packet there: what follows is handed to the
/// application together with it, and nobody segments it again.
///
/// One round: [`push`](Self::push) until [`Push::MustFlush`] or the buffer's end,
/// [`finish`](Self::finish), write. If the kernel refused the write,
/// [`take_apart`](Self::take_apart) and write each packet.
#[derive(Debug)]
pub struct Coalescer {
    uso: bool,
    reach: Reach,
    parts: [Range<usize>; MAX_PARTS],
    count: usize,
    state: State,
    head: Option<Parsed>,
    partial: bool,
    /// Payload bytes of the first packet.
    size: usize,
    total: usize,
    next_seq: u32,
    last_flags: u8,
    id: u16,
    /// Set once a second packet was looked at.
    likeness: Likeness,
}

/// Where super-packets go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reach {
    /// To this host's own TCP, which takes BIG TCP.
    Here,
    /// On to a link, where they are segmented again, or to a kernel that knows no BIG TCP.
    Further,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Empty,
    Open,
    /// Nothing more can follow: a short or pushed segment, or one that is never coalesced.
    Closed,
    /// Handed out; the next push starts anew.
    Finished,
    /// Handed out and taken apart again.
    Apart,
}

/// What a [`Coalescer`] held, ready to be written.
#[derive(Debug)]
pub struct Super<'a> {
    /// The virtio header to write in front.
    pub vnet: VnetHdr,
    /// What to gather: the whole first packet, then the payloads of the others.
    pub parts: &'a [Range<usize>],
    /// How many packets it is made of.
    pub packets: usize,
    /// The super-packet's fields. Use them with the bytes of the first part, which hold all its
    /// headers.
    pub parsed: Parsed,
    /// Whether its checksum is partial.
    pub partial: bool,
}

impl Coalescer {
    /// An empty coalescer. `uso`: the TUN takes UDP super-packets (`TUN_F_USO4 | TUN_F_USO6`).
    pub fn new(uso: bool, reach: Reach) -> Self {
        Self {
            uso,
            reach,
            parts: [const { 0..0 }; MAX_PARTS],
            count: 0,
            state: State::Empty,
            head: None,
            partial: false,
            size: 0,
            total: 0,
            next_seq: 0,
            last_flags: 0,
            id: 0,
            likeness: Likeness::NONE,
        }
    }

    /// Sets where super-packets go, from the next one on.
    pub fn set_reach(&mut self, reach: Reach) {
        self.reach = reach;
    }

    /// Whether nothing waits to be finished.
    #[inline]
    fn is_empty(&self) -> bool {
        matches!(self.state, State::Empty | State::Finished | State::Apart)
    }

    /// Where the first packet that waits to be finished lies in the buffer.
    #[inline]
    pub fn held_from(&self) -> Option<usize> {
        (!self.is_empty()).then_some(self.parts[0].start)
    }

    /// Takes the packet at `slab[range]`, whose fields are `parsed`.
    #[inline]
    pub fn push(
        &mut self,
        slab: &[u8],
        range: Range<usize>,
        parsed: &Parsed,
        csum_partial: bool,
    ) -> Push {
        match self.state {
            State::Empty | State::Finished | State::Apart => {
                self.start(slab, range, parsed, csum_partial);
                Push::Started
            }
            State::Closed => Push::MustFlush,
            State::Open => match self.coalesce(slab, &range, parsed, csum_partial) {
                Some(()) => Push::Coalesced,
                None => Push::MustFlush,
            },
        }
    }

    /// Patches the headers of what is held and hands it out; `None` if nothing is held.
    #[inline]
    pub fn finish(&mut self, slab: &mut [u8]) -> Option<Super<'_>> {
        if self.is_empty() {
            return None;
        }
        self.state = State::Finished;
        let mut parsed = self.head?;
        let mut vnet = VnetHdr::single(&parsed, self.partial);
        if self.count > 1 {
            let head = &mut slab[self.parts[0].clone()];
            parsed.set_total(head, self.total, true);
            vnet.gso_size = self.size as u16;
            vnet.hdr_len = parsed.payload() as u16;
            vnet.gso_type = match (parsed.kind(), parsed.family()) {
                (Kind::Tcp, family) => {
                    parsed.add_tcp_flags(head, self.last_flags & (FIN | PSH));
                    let cwr = parsed.tcp_flags() & CWR != 0;
                    let ecn = if cwr { GSO_ECN } else { 0 };
                    ecn | match family {
                        Family::V4 => GSO_TCPV4,
                        Family::V6 => GSO_TCPV6,
                    }
                }
                _ => GSO_UDP_L4,
            };
        }
        Some(Super {
            vnet,
            parts: &self.parts[..self.count],
            packets: self.count,
            parsed,
            partial: self.partial,
        })
    }

    /// Makes single packets again of what [`finish`](Self::finish) last handed out, for a kernel
    /// that refuses it. Each is one range of the slab, and all go with the same virtio header.
    ///
    /// Each part still has space for its headers in front of its payload, where its own lay. They
    /// are made anew from the head, so that a rewrite of the head in between reaches all parts.
    pub fn take_apart(&mut self, slab: &mut [u8]) -> (VnetHdr, &[Range<usize>]) {
        let Some(parsed) = self.head else {
            return (VnetHdr::default(), &[]);
        };
        let vnet = VnetHdr::single(&parsed, self.partial);
        let (header, l4) = (parsed.payload(), parsed.l4());
        if self.count > 1 && self.state == State::Finished {
            self.state = State::Apart;
            let start = self.parts[0].start;
            let is_tcp = parsed.kind() == Kind::Tcp;
            let id = get_u16(slab, start + ipv4::ID);
            let (seq, flags) = if is_tcp {
                let seq = get_u32(slab, start + l4 + tcp::SEQ);
                (seq, slab[start + l4 + tcp::FLAGS])
            } else {
                (0, 0)
            };
            // Last to first, since the first is what the others are copied from.
            for index in (0..self.count).rev() {
                if index > 0 {
                    let at = self.parts[index].start - header;
                    slab.copy_within(start..start + header, at);
                    self.parts[index].start = at;
                }
                let packet = &mut slab[self.parts[index].clone()];
                let mut shrunk = parsed.with_total(self.total);
                shrunk.set_total(packet, packet.len(), true);
                if index > 0 {
                    shrunk.set_ipv4_id(packet, id.wrapping_add(index as u16));
                }
                if is_tcp {
                    let seq = seq.wrapping_add((index * self.size) as u32);
                    put(packet, l4 + tcp::SEQ, seq.to_be_bytes());
                    let mut flags = flags;
                    if index + 1 < self.count {
                        flags &= !(FIN | PSH);
                    }
                    if index > 0 {
                        flags &= !CWR;
                    }
                    packet[l4 + tcp::FLAGS] = flags;
                }
            }
        }
        (vnet, &self.parts[..self.count])
    }

    #[inline]
    fn start(&mut self, slab: &[u8], range: Range<usize>, parsed: &Parsed, partial: bool) {
        let range = range.start..range.start + parsed.total();
        let packet = &slab[range.clone()];
        let plain_ip = match parsed.family() {
            Family::V4 => parsed.l4() == ipv4::HEADER_LEN,
            Family::V6 => parsed.l4() == ipv6::HEADER_LEN,
        };
        let coalescable = partial
            && plain_ip
            && parsed.fragment() == Fragment::None
            && parsed.payload_len() > 0
            && match parsed.kind() {
                Kind::Tcp => {
                    let flags = parsed.tcp_flags();
                    flags & !PLAIN_FLAGS == 0 && flags & ACK != 0 && flags & self.last() == 0
                }
                Kind::Udp => self.uso && udp_fills(&packet[parsed.l4()..]),
                Kind::IcmpQuery
                | Kind::IcmpReply
                | Kind::IcmpError
                | Kind::Other
                | Kind::LaterFragment => false,
            };
        self.state = if coalescable {
            State::Open
        } else {
            State::Closed
        };
        self.parts[0] = range;
        self.count = 1;
        self.head = Some(*parsed);
        self.partial = partial;
        self.total = parsed.total();
        self.last_flags = 0;
        if coalescable {
            self.size = parsed.payload_len();
            self.id = get_u16(packet, ipv4::ID);
            if parsed.kind() == Kind::Tcp {
                self.next_seq = tcp_seq(packet, parsed).wrapping_add(self.size as u32);
            }
        }
    }

    #[inline]
    fn coalesce(
        &mut self,
        slab: &[u8],
        range: &Range<usize>,
        parsed: &Parsed,
        partial: bool,
    ) -> Option<()> {
        let head = self.head?;
        // Each field lies at the same place, so that only the bytes themselves are left to compare.
        let alike = parsed.kind() == head.kind()
            && parsed.family() == head.family()
            && parsed.fragment() == Fragment::None
            && parsed.l4() == head.l4()
            && parsed.payload() == head.payload();
        if !alike || !partial {
            return None;
        }
        self.append(slab, range.start..range.start + parsed.total())
    }

    /// Appends the packet at `slab[range]` without parsing it, if it is a TCP packet that continues
    /// the super-packet and is as long as its first: then all that parsing would find is known.
    ///
    /// [`push`](Self::push) may still append what this does not.
    #[inline]
    pub fn follow(&mut self, slab: &[u8], range: Range<usize>, csum_partial: bool) -> bool {
        let Some(head) = self.head else {
            return false;
        };
        if self.state != State::Open || head.kind() != Kind::Tcp || !csum_partial {
            return false;
        }
        let first = &slab[self.parts[0].clone()];
        let packet = &slab[range.clone()];
        let same = |field| get::<2>(packet, field) == get::<2>(first, field);
        let as_long = packet.len() == first.len()
            && match head.family() {
                Family::V4 => same(ipv4::TOTAL_LEN),
                Family::V6 => same(ipv6::PAYLOAD_LEN),
            };
        as_long && self.append(slab, range).is_some()
    }

    /// Appends the packet at `slab[range]`, whose fields lie where those of the first lie.
    #[inline]
    fn append(&mut self, slab: &[u8], range: Range<usize>) -> Option<()> {
        let head = self.head?;
        let (l4, header) = (head.l4(), head.payload());
        let payload = range.len() - header;
        let (parts, bytes) = match (head.kind(), head.family(), self.reach) {
            (Kind::Tcp, Family::V4, Reach::Here) => (MAX_PARTS, MAX_BIG),
            (Kind::Tcp, _, _) => (MAX_PARTS, MAX_SUPER),
            _ => (MAX_DATAGRAMS, MAX_SUPER),
        };
        let fits = self.count < parts
            && payload > 0
            && payload <= self.size
            && self.total + payload <= bytes;
        if fits && self.count == 1 {
            self.likeness = Likeness::of(&slab[self.parts[0].clone()][..header], &head);
        }
        let packet = &slab[range.clone()];
        if !fits || !self.likeness.holds(&slab[range.start..]) || !self.id_follows(packet, &head) {
            return None;
        }
        let fields = &packet[l4..];
        let mut closes = payload < self.size;
        if head.kind() == Kind::Tcp {
            let flags = fields[tcp::FLAGS];
            if flags & CWR != 0 || get_u32(fields, tcp::SEQ) != self.next_seq {
                return None;
            }
            self.next_seq = self.next_seq.wrapping_add(payload as u32);
            self.last_flags |= flags;
            closes |= flags & self.last() != 0;
        } else if !udp_fills(fields) {
            return None;
        }
        self.parts[self.count] = range.start + header..range.end;
        self.count += 1;
        self.total += payload;
        if closes {
            self.state = State::Closed;
        }
        Some(())
    }

    /// The flags behind which nothing may be appended.
    #[inline]
    fn last(&self) -> u8 {
        match self.reach {
            Reach::Here => FIN,
            Reach::Further => FIN | PSH,
        }
    }

    /// Whether this IPv4 identification may come next.
    #[inline]
    fn id_follows(&self, packet: &[u8], head: &Parsed) -> bool {
        let id = get_u16(packet, ipv4::ID);
        head.family() == Family::V6
            || id == self.id.wrapping_add(self.count as u16)
            // The identification of an atomic datagram says nothing (RFC 6864 section 4).
            || id == self.id && get_u16(packet, ipv4::FRAGMENT) & ipv4::DONT_FRAGMENT != 0
    }
}

/// Words of the longest headers that are compared: IPv6 without extensions and TCP with all
/// options.
const HEADER_WORDS: usize = (ipv6::HEADER_LEN + tcp::MAX_HEADER_LEN).div_ceil(8);

/// What the headers of all packets of one super-packet have in common, compared in words.
#[derive(Clone, Copy, Debug)]
struct Likeness {
    words: usize,
    mask: [u64; HEADER_WORDS],
    wanted: [u64; HEADER_WORDS],
}

impl Likeness {
    const NONE: Self = Self {
        words: 0,
        mask: [0; HEADER_WORDS],
        wanted: [0; HEADER_WORDS],
    };

    /// The likeness of packets whose header is like this one. It has no IP options.
    fn of(header: &[u8], parsed: &Parsed) -> Self {
        let mut mask = [0; HEADER_WORDS * 8];
        let mut wanted = [0; HEADER_WORDS * 8];
        let Some(wanted_header) = wanted.get_mut(..header.len()) else {
            return Self::NONE;
        };
        wanted_header.copy_from_slice(header);
        mask[..header.len()].fill(0xff);
        match parsed.family() {
            Family::V4 => {
                mask[ipv4::TOTAL_LEN..ipv4::FRAGMENT].fill(0);
                mask[ipv4::CHECKSUM..ipv4::SRC].fill(0);
            }
            Family::V6 => mask[ipv6::PAYLOAD_LEN..ipv6::NEXT_HEADER].fill(0),
        }
        let l4 = &mut mask[parsed.l4()..];
        if parsed.kind() == Kind::Tcp {
            l4[tcp::SEQ..tcp::ACK_NUMBER].fill(0);
            l4[tcp::FLAGS] = !(CWR | FIN | PSH);
            l4[tcp::CHECKSUM..tcp::URGENT].fill(0);
        } else {
            l4[udp::LEN..udp::HEADER_LEN].fill(0);
        }
        let word = |bytes: &[u8], index: usize| u64::from_ne_bytes(get(bytes, index * 8));
        let mask = std::array::from_fn(|index| word(&mask, index));
        Self {
            words: header.len().div_ceil(8),
            mask,
            wanted: std::array::from_fn(|index| word(&wanted, index) & mask[index]),
        }
    }

    /// Whether the bytes here are alike. They are not if the buffer ends within the last word.
    #[inline]
    fn holds(&self, bytes: &[u8]) -> bool {
        let Some(bytes) = bytes.get(..self.words * 8) else {
            return false;
        };
        let differing = bytes
            .chunks_exact(8)
            .zip(self.mask.iter().zip(&self.wanted))
            .fold(0, |sum, (bytes, (mask, wanted))| {
                sum | (u64::from_ne_bytes(get(bytes, 0)) & mask ^ wanted)
            });
        self.words > 0 && differing == 0
    }
}

/// The sequence number of a TCP packet.
#[inline]
pub(crate) fn tcp_seq(packet: &[u8], parsed: &Parsed) -> u32 {
    get_u32(packet, parsed.l4() + tcp::SEQ)
}

/// Whether the UDP length is that of the datagram up to the packet's end: no surplus behind it.
#[inline]
fn udp_fills(datagram: &[u8]) -> bool {
    usize::from(get_u16(datagram, udp::LEN)) == datagram.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::moved::TCP;
    use crate::packet::testing::{
        Plan, assert_sums, checksum, complete, plan, pseudo_header, segments, vnet,
    };
    use crate::packet::vnet::{GSO_NONE, NEEDS_CSUM};
    use crate::packet::{Addr, RST, SYN};
    use proptest::prelude::*;
    use std::net::Ipv4Addr;

    /// Puts packets into one slab, as a receive buffer has them.
    fn slab(packets: &[Vec<u8>]) -> (Vec<u8>, Vec<Range<usize>>) {
        let mut slab = Vec::new();
        let mut ranges = Vec::new();
        for packet in packets {
            slab.extend([0xee; 16]);
            ranges.push(slab.len()..slab.len() + packet.len());
            slab.extend(packet);
        }
        // A receive buffer goes on behind the last packet: headers are compared in words.
        slab.extend([0xee; 16]);
        (slab, ranges)
    }

    #[test]
    fn a_header_that_ends_with_the_buffer_is_not_compared_beyond_it() {
        let first = plan(Kind::Tcp, true, 3);
        let second = Plan {
            seq: first.seq.wrapping_add(3),
            ..plan(Kind::Tcp, true, 3)
        };
        let (mut slab, ranges) = slab(&[first.build_partial(), second.build_partial()]);
        for wanted in [Push::Coalesced, Push::MustFlush] {
            let mut coalescer = Coalescer::new(true, Reach::Further);
            assert_eq!(push(&mut coalescer, &slab, &ranges[0], true), Push::Started);
            assert_eq!(push(&mut coalescer, &slab, &ranges[1], true), wanted);
            slab.truncate(ranges[1].end);
        }
    }

    fn push(coalescer: &mut Coalescer, slab: &[u8], range: &Range<usize>, partial: bool) -> Push {
        let parsed = Parsed::parse(&slab[range.clone()]).unwrap();
        coalescer.push(slab, range.clone(), &parsed, partial)
    }

    proptest! {
        #[test]
        fn segmented_and_coalesced_is_what_it_was(
            udp in any::<bool>(), v6 in any::<bool>(), size in 100u16..1400, count in 2usize..40,
            short in 1u16..100, seq in any::<u32>(),
            flags in prop::sample::select(vec![ACK, ACK | PSH, ACK | FIN, ACK | PSH | CWR]),
        ) {
            let kind = if udp { Kind::Udp } else { Kind::Tcp };
            let payload = (usize::from(size) * count - usize::from(short)).min(65_000);
            let plan = Plan { flags, seq, ..plan(kind, v6, payload) };
            let mut packet = plan.build_partial();
            let parsed = Parsed::parse(&packet).unwrap();
            let vnet = vnet(&parsed, size, true);
            let all = segments(&mut packet, &vnet, 1500);
            prop_assert_eq!(all.len(), payload.div_ceil(size.into()));
            let mut stream: Vec<u8> = Vec::new();
            for (segment, partial) in &all {
                prop_assert!(*partial);
                let mut whole = segment.clone();
                complete(&mut whole);
                assert_sums(&whole);
                stream.extend(&segment[parsed.payload()..]);
            }
            prop_assert_eq!(&stream, &plan.payload);

            let packets: Vec<_> = all.into_iter().map(|(segment, _)| segment).collect();
            let (mut slab, ranges) = slab(&packets);
            let mut coalescer = Coalescer::new(true, Reach::Further);
            for (index, range) in ranges.iter().enumerate() {
                let wanted = if index == 0 { Push::Started } else { Push::Coalesced };
                prop_assert_eq!(push(&mut coalescer, &slab, range, true), wanted);
            }
            let whole = coalescer.finish(&mut slab).unwrap();
            prop_assert_eq!(whole.packets, packets.len());
            if packets.len() > 1 { prop_assert_eq!(whole.vnet, vnet); }
            prop_assert_eq!(whole.parsed, parsed);
            let parts = whole.parts.iter();
            let gathered: Vec<u8> = parts.flat_map(|part| slab[part.clone()].to_vec()).collect();
            prop_assert_eq!(&gathered, &packet);

            // A rewrite of the head reaches all packets that the super-packet is taken apart into.
            let head = whole.parts[0].clone();
            let other: Addr = Ipv4Addr::new(8, 8, 4, 4).into();
            let addr = if v6 { parsed.src(&packet) } else { other };
            whole.parsed.set_src(&mut slab[head], addr, true);
            let mut rewritten = packet.clone();
            parsed.set_src(&mut rewritten, addr, true);
            let wanted = segments(&mut rewritten, &vnet, 1500);
            for _ in 0..2 {
                let (single, parts) = coalescer.take_apart(&mut slab);
                prop_assert_eq!(single, VnetHdr::single(&parsed, true));
                let bytes = parts.iter().map(|part| slab[part.clone()].to_vec());
                let singles: Vec<_> = bytes.map(|bytes| (bytes, true)).collect();
                prop_assert_eq!(&singles, &wanted);
            }
        }
    }

    #[test]
    fn what_does_not_follow_is_not_coalesced() {
        let first = plan(Kind::Tcp, false, 100);
        let second = Plan {
            seq: first.seq + 100,
            ..first.clone()
        };
        let coalesce = |first: &Plan, second: &Plan, change: &dyn Fn(&mut [u8]), partial| {
            let mut next = second.build_partial();
            if next[0] >> 4 == 4 {
                let mut parsed = Parsed::parse(&next).unwrap();
                parsed.set_ipv4_id(&mut next, 1);
            }
            change(&mut next);
            let (slab, ranges) = slab(&[first.build_partial(), next]);
            let mut coalescer = Coalescer::new(true, Reach::Further);
            assert_eq!(push(&mut coalescer, &slab, &ranges[0], true), Push::Started);
            push(&mut coalescer, &slab, &ranges[1], partial) == Push::Coalesced
        };
        let none: &dyn Fn(&mut [u8]) = &|_| ();
        assert!(coalesce(&first, &second, none, true));
        assert!(!coalesce(&first, &second, none, false), "a full checksum");
        for (name, at) in [
            ("TOS", 1),
            ("id", 4),
            ("TTL", 8),
            ("source", 15),
            ("destination", 19),
            ("source port", 21),
            ("destination port", 23),
            ("sequence", 27),
            ("acknowledgement", 31),
            ("window", 35),
            ("urgent", 39),
        ] {
            assert!(!coalesce(&first, &second, &|b| b[at] ^= 4, true), "{name}");
        }
        for flag in [SYN, RST, CWR] {
            assert!(
                !coalesce(&first, &second, &|b| b[33] |= flag, true),
                "{flag}"
            );
        }
        assert!(coalesce(&first, &second, &|b| b[33] |= PSH | FIN, true));
        let longer = plan(Kind::Tcp, false, 101).payload;
        assert!(!coalesce(
            &first,
            &Plan {
                payload: longer,
                ..second.clone()
            },
            none,
            true
        ));
        let pushed = Plan {
            flags: ACK | PSH,
            ..first.clone()
        };
        assert!(!coalesce(&pushed, &second, none, true));
        let empty = Plan {
            payload: Vec::new(),
            ..first.clone()
        };
        assert!(
            !coalesce(
                &empty,
                &Plan {
                    seq: first.seq,
                    ..empty.clone()
                },
                none,
                true
            ),
            "bare ACKs"
        );
        // UDP without USO, and with it.
        let udp = plan(Kind::Udp, true, 100);
        assert!(coalesce(&udp, &udp, none, true));
        let (slab, ranges) = slab(&[udp.build_partial(), udp.build_partial()]);
        let mut coalescer = Coalescer::new(false, Reach::Further);
        assert_eq!(push(&mut coalescer, &slab, &ranges[0], true), Push::Started);
        assert_eq!(
            push(&mut coalescer, &slab, &ranges[1], true),
            Push::MustFlush
        );
    }

    #[test]
    fn a_super_packet_has_bounds() {
        let packets: Vec<_> = (0..=MAX_PARTS as u32)
            .map(|index| {
                Plan {
                    seq: index * 100,
                    ..plan(Kind::Tcp, true, 100)
                }
                .build_partial()
            })
            .collect();
        let (mut slab, ranges) = slab(&packets);
        let mut coalescer = Coalescer::new(false, Reach::Further);
        for range in &ranges[..MAX_PARTS] {
            assert_ne!(push(&mut coalescer, &slab, range, true), Push::MustFlush);
        }
        assert_eq!(
            push(&mut coalescer, &slab, &ranges[MAX_PARTS], true),
            Push::MustFlush
        );
        assert_eq!(coalescer.finish(&mut slab).unwrap().packets, MAX_PARTS);
        assert!(coalescer.is_empty() && coalescer.finish(&mut slab).is_none());
        assert_eq!(
            push(&mut coalescer, &slab, &ranges[MAX_PARTS], true),
            Push::Started
        );
        let alone = coalescer.finish(&mut slab).unwrap();
        assert_eq!((alone.packets, alone.vnet.gso_type), (1, GSO_NONE));
        assert_eq!((alone.vnet.flags, alone.vnet.csum_start), (NEEDS_CSUM, 40));
    }

    proptest! {
        /// Appending without parsing makes the same super-packet as appending with it.
        #[test]
        fn following_is_pushing(
            v6 in any::<bool>(), here in any::<bool>(), size in 1usize..1_400, at in 0usize..60,
            bit in 0u8..8, second in 1usize..4,
        ) {
            let reach = if here { Reach::Here } else { Reach::Further };
            let mut packets = stream(4, size, v6);
            let at = at.min(packets[second].len() - 1);
            packets[second][at] ^= 1 << bit;
            let (slab, ranges) = slab(&packets);
            let mut parsing = Coalescer::new(true, reach);
            let mut following = Coalescer::new(true, reach);
            for range in &ranges {
                let Ok(parsed) = Parsed::parse(&slab[range.clone()]) else {
                    prop_assert!(!following.follow(&slab, range.clone(), true));
                    break;
                };
                let wanted = parsing.push(&slab, range.clone(), &parsed, true);
                if following.follow(&slab, range.clone(), true) {
                    prop_assert_eq!(wanted, Push::Coalesced);
                } else {
                    prop_assert_eq!(following.push(&slab, range.clone(), &parsed, true), wanted);
                }
                if wanted == Push::MustFlush {
                    break;
                }
            }
            let (mut one, mut other) = (slab.clone(), slab);
            let one = format!("{:?}", parsing.finish(&mut one));
            prop_assert_eq!(one, format!("{:?}", following.finish(&mut other)));
        }
    }

    /// Adjacent packets of one stream, `count` of `size` bytes.
    fn stream(count: u32, size: usize, v6: bool) -> Vec<Vec<u8>> {
        let first = plan(Kind::Tcp, v6, size);
        let packet = |index: u32| {
            let plan = Plan {
                seq: first.seq.wrapping_add(index * size as u32),
                ..first.clone()
            };
            plan.build_partial()
        };
        (0..count).map(packet).collect()
    }

    /// How many of `packets` make one super-packet.
    fn coalesced(packets: &[Vec<u8>], reach: Reach) -> usize {
        let (slab, ranges) = slab(packets);
        let mut coalescer = Coalescer::new(true, reach);
        let mut taken = |range| push(&mut coalescer, &slab, range, true) != Push::MustFlush;
        ranges
            .iter()
            .map_while(|range| taken(range).then_some(()))
            .count()
    }

    #[test]
    fn more_than_the_length_field_can_tell_is_coalesced_only_where_it_ends() {
        let packets = stream(200, 1_388, false);
        assert_eq!(coalesced(&packets, Reach::Further), 47);
        assert_eq!(coalesced(&packets, Reach::Here), 188);
        assert_eq!(
            coalesced(&stream(200, 1_368, true), Reach::Here),
            47,
            "IPv6"
        );
        assert_eq!(coalesced(&stream(300, 100, false), Reach::Here), MAX_PARTS);

        let (mut slab, ranges) = slab(&packets[..100]);
        let mut coalescer = Coalescer::new(true, Reach::Here);
        for range in &ranges {
            assert_ne!(push(&mut coalescer, &slab, range, true), Push::MustFlush);
        }
        let whole = coalescer.finish(&mut slab).unwrap();
        assert_eq!(whole.parsed.total(), 40 + 100 * 1_388);
        assert_eq!(whole.vnet.gso_size, 1_388);
        let head = &slab[whole.parts[0].clone()];
        assert_eq!(
            head[2..4],
            [0, 0],
            "the kernel takes its length from the packet itself"
        );
        assert_eq!(checksum(&head[..20]), [0, 0], "that of the IP header");
        // The pseudo-header has the whole length (tcp_gso_segment takes it from there).
        let pseudo = pseudo_header(head, TCP, 20 + 100 * 1_388);
        assert_eq!(head[36..38], pseudo);

        // The kernel refused it: each packet is as it was, but its identification now counts up.
        let (_, parts) = coalescer.take_apart(&mut slab);
        assert_eq!(parts.len(), 100);
        for (index, (part, packet)) in parts.iter().zip(&packets).enumerate() {
            let single = &slab[part.clone()];
            assert_eq!(checksum(&single[..20]), [0, 0]);
            assert_eq!(single[2..4], packet[2..4]);
            assert_eq!(get_u16(single, ipv4::ID), index as u16);
            assert_eq!(single[12..], packet[12..]);
        }
    }

    #[test]
    fn a_push_ends_nothing_where_the_stream_ends() {
        let mut packets = stream(6, 1_000, false);
        packets[1][33] |= PSH;
        packets[4][33] |= FIN;
        assert_eq!(coalesced(&packets, Reach::Further), 2);
        assert_eq!(coalesced(&packets, Reach::Here), 5);
        let (mut slab, ranges) = slab(&packets[..4]);
        let mut coalescer = Coalescer::new(true, Reach::Here);
        for range in &ranges {
            assert_ne!(push(&mut coalescer, &slab, range, true), Push::MustFlush);
        }
        let whole = coalescer.finish(&mut slab).unwrap();
        assert_eq!(slab[whole.parts[0].start + 33], ACK | PSH);
    }

    #[test]
    fn a_full_checksum_is_written_plain() {
        let (mut slab, ranges) = slab(&[plan(Kind::Tcp, false, 100).build()]);
        let before = slab.clone();
        let mut coalescer = Coalescer::new(false, Reach::Further);
        assert_eq!(
            push(&mut coalescer, &slab, &ranges[0], false),
            Push::Started
        );
        let alone = coalescer.finish(&mut slab).unwrap();
        assert_eq!(alone.vnet, VnetHdr::default());
        assert_eq!(slab, before);
    }
}
