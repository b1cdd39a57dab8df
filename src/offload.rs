//! Super-packets: what the kernel hands over as one packet with a virtio header, cut into segments
//! ([`Segments`]), and adjacent segments joined to one such packet again ([`Coalescer`]).
//!
//! Owns the virtio-net header, how TCP and UDP are cut, and what may be joined. Must not touch a
//! device, and nothing here allocates: segments are written where the caller says, joined payloads
//! stay where they lie and are gathered by `writev`.
//!
//! ```text
//! TUN read:   vnet │ headers │ payload ........................ │
//!                      └─ cut ─┬──────────┬──────────┐
//!             out:     headers│p1   headers│p2   headers│p3       (each into the send batch)
//!
//! slab:       headers│p1 … headers│p2 … headers│p3                (opened in place)
//! TUN write:  vnet │ headers p1 │ p2 │ p3                         (gathered, headers patched)
//! ```

use std::ops::Range;

use crate::drops::DropReason;
use crate::packet::{
    ACK, CWR, ECE, FIN, Family, Fragment, IPV4_HEADER, IPV6_HEADER, Kind, PSH, Parsed, Sum, field,
    pseudo_sum, put,
};

/// Length of [`VnetHdr`] on a TUN with `IFF_VNET_HDR` (`struct virtio_net_hdr`; the longer forms
/// are asked for with `TUNSETVNETHDRSZ`).
pub const VNET_LEN: usize = 10;

/// Checksum not finished: sum up from `csum_start`, store at `csum_offset` behind it
/// (`VIRTIO_NET_HDR_F_NEEDS_CSUM`, virtio 1.2 section 5.1.6).
pub const NEEDS_CSUM: u8 = 1;
/// Checksum found right by the device (`VIRTIO_NET_HDR_F_DATA_VALID`).
pub const DATA_VALID: u8 = 2;
/// Not a super-packet (`VIRTIO_NET_HDR_GSO_NONE`).
pub const GSO_NONE: u8 = 0;
/// TCP over IPv4 (`VIRTIO_NET_HDR_GSO_TCPV4`).
pub const GSO_TCPV4: u8 = 1;
/// TCP over IPv6 (`VIRTIO_NET_HDR_GSO_TCPV6`).
pub const GSO_TCPV6: u8 = 4;
/// UDP, cut into datagrams (`VIRTIO_NET_HDR_GSO_UDP_L4`, USO).
pub const GSO_UDP_L4: u8 = 5;
/// Or-ed to the TCP types: CWR is set and belongs to the first segment
/// (`VIRTIO_NET_HDR_GSO_ECN`).
pub const GSO_ECN: u8 = 0x80;

/// Most packets that are joined to one: the kernel takes no more datagrams in one UDP super-packet
/// (`UDP_MAX_SEGMENTS`, 64 before Linux 6.9), and a full one of TCP has 47.
pub const MAX_PARTS: usize = 64;

/// Largest packet that is joined: the IPv4 length field, which the kernel applies to IPv6 too
/// (`GSO_LEGACY_MAX_SIZE`).
pub const MAX_SUPER: usize = 65_535;

/// Least payload a TCP cut may have. A tunnel that carries less than this beside the headers is
/// better served by splitting packets.
const MIN_CUT: usize = 64;

/// TCP flags that may appear in a packet that is cut or joined.
const PLAIN_FLAGS: u8 = ACK | PSH | FIN | ECE | CWR;

/// `struct virtio_net_hdr`, in the machine's own byte order, which is what a TUN uses unless told
/// otherwise (`TUNSETVNETLE`; linux/virtio_net.h, Documentation/networking/tuntap.rst).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VnetHdr {
    /// [`NEEDS_CSUM`], [`DATA_VALID`].
    pub flags: u8,
    /// [`GSO_NONE`] and its like, perhaps with [`GSO_ECN`].
    pub gso_type: u8,
    /// Length of all headers. A hint: the kernel sets it to the whole first buffer at times.
    pub hdr_len: u16,
    /// Payload bytes per segment.
    pub gso_size: u16,
    /// Where the checksum's range begins.
    pub csum_start: u16,
    /// Where the checksum lies behind `csum_start`.
    pub csum_offset: u16,
}

impl VnetHdr {
    /// Reads the header from the front of what a TUN gave.
    #[inline]
    pub fn read(bytes: &[u8; VNET_LEN]) -> Self {
        let word = |at| u16::from_ne_bytes(field(bytes, at));
        Self {
            flags: bytes[0],
            gso_type: bytes[1],
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
        }
    }

    /// The header as a TUN takes it.
    #[inline]
    pub fn to_bytes(self) -> [u8; VNET_LEN] {
        let mut out = [self.flags, self.gso_type, 0, 0, 0, 0, 0, 0, 0, 0];
        put(&mut out, 2, self.hdr_len.to_ne_bytes());
        put(&mut out, 4, self.gso_size.to_ne_bytes());
        put(&mut out, 6, self.csum_start.to_ne_bytes());
        put(&mut out, 8, self.csum_offset.to_ne_bytes());
        out
    }

    /// The header of one packet that is no super-packet.
    #[inline]
    pub fn single(parsed: &Parsed, partial: bool) -> Self {
        match parsed.csum_at() {
            Some(at) if partial => Self {
                flags: NEEDS_CSUM,
                gso_type: GSO_NONE,
                hdr_len: 0,
                gso_size: 0,
                csum_start: parsed.l4() as u16,
                csum_offset: (at - parsed.l4()) as u16,
            },
            _ => Self::default(),
        }
    }
}

/// What a packet's virtio header says, held against the packet and found true.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Offload {
    /// Payload bytes per segment, of a super-packet.
    cut: Option<u16>,
    partial: bool,
}

impl Offload {
    /// Holds `vnet` against the packet it came with.
    ///
    /// A `NEEDS_CSUM` that means something else than the packet's own TCP or UDP checksum (that of a
    /// packet inside, say) is satisfied here, in `packet`.
    ///
    /// # Errors
    /// [`DropReason::BadOffload`] where the two contradict each other.
    pub fn accept(vnet: &VnetHdr, packet: &mut [u8], parsed: &Parsed) -> Result<Self, DropReason> {
        let total = parsed.total();
        if usize::from(vnet.hdr_len) > total {
            return Err(DropReason::BadOffload);
        }
        let needs_csum = vnet.flags & NEEDS_CSUM != 0;
        let start = usize::from(vnet.csum_start);
        let at = start + usize::from(vnet.csum_offset);
        let partial = needs_csum
            && matches!(parsed.kind(), Kind::Tcp | Kind::Udp)
            && parsed.fragment() == Fragment::None
            && start == parsed.l4()
            && parsed.csum_at() == Some(at);
        if needs_csum && !partial {
            let headers_end = match parsed.family() {
                Family::V4 => IPV4_HEADER,
                Family::V6 => IPV6_HEADER,
            };
            if vnet.gso_type != GSO_NONE || start < headers_end || at + 2 > total {
                return Err(DropReason::BadOffload);
            }
            // The field is inside the range and holds the pseudo-header's sum already.
            let sum = !Sum::default().add(&packet[start..total]).fold();
            let sum = if sum == 0 { 0xffff } else { sum };
            put(packet, at, sum.to_ne_bytes());
        }
        let wanted = match vnet.gso_type & !GSO_ECN {
            GSO_NONE if vnet.gso_type == GSO_NONE => return Ok(Self { cut: None, partial }),
            GSO_TCPV4 => (Kind::Tcp, Some(Family::V4)),
            GSO_TCPV6 => (Kind::Tcp, Some(Family::V6)),
            GSO_UDP_L4 if vnet.gso_type == GSO_UDP_L4 => (Kind::Udp, None),
            _ => return Err(DropReason::BadOffload),
        };
        let right_kind = parsed.kind() == wanted.0
            && wanted.1.is_none_or(|family| family == parsed.family())
            && parsed.fragment() == Fragment::None;
        if !right_kind || vnet.gso_size == 0 {
            return Err(DropReason::BadOffload);
        }
        Ok(Self {
            cut: Some(vnet.gso_size),
            partial,
        })
    }

    /// Whether the packet's TCP or UDP checksum is partial.
    #[inline]
    pub fn partial(&self) -> bool {
        self.partial
    }
}

/// One packet that [`Segments`] wrote.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segment {
    /// Its length. More than `max_segment` only where cutting is not allowed: the caller splits.
    pub len: usize,
    /// Whether its TCP or UDP checksum is partial.
    pub csum_partial: bool,
}

/// The segments of one packet, written one by one where the caller wants them.
///
/// Headers and payload are copied once. TCP is cut at `gso_size`, or smaller where the tunnel
/// carries less (any cut of a byte stream is as good); a single plain TCP packet that is too large
/// and has a partial checksum is cut just so. UDP is cut where its sender said and nowhere else.
#[derive(Debug)]
pub struct Segments<'a> {
    header: &'a [u8],
    payload: &'a [u8],
    /// Payload bytes per segment; all of it if the packet goes out as it is.
    size: usize,
    left: usize,
    shape: Shape,
    partial: bool,
    first: bool,
    family: Family,
    l4: usize,
    csum_at: usize,
    id: u16,
    seq: u32,
    flags: u8,
    /// Sum of the IPv4 header without length, identification and checksum.
    ip: Sum,
    /// Sum of the pseudo-header without length.
    pseudo: Sum,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Shape {
    /// Copied byte for byte.
    Whole,
    Tcp,
    Udp,
    /// UDP over IPv4 without a checksum.
    BareUdp,
}

impl<'a> Segments<'a> {
    /// Prepares to cut `packet`, of which no segment shall be longer than `max_segment` bytes.
    #[inline]
    pub fn new(offload: Offload, packet: &'a [u8], parsed: &Parsed, max_segment: usize) -> Self {
        let packet = &packet[..parsed.total()];
        let (header, payload) = packet.split_at(parsed.payload());
        let room = max_segment.saturating_sub(header.len());
        let is_tcp = parsed.kind() == Kind::Tcp;
        let size = match offload.cut {
            Some(size) if is_tcp && room >= MIN_CUT => usize::from(size).min(room),
            Some(size) => usize::from(size),
            None if packet.len() > max_segment
                && is_tcp
                && offload.partial
                && parsed.fragment() == Fragment::None
                && parsed.tcp_flags() & !PLAIN_FLAGS == 0
                && room >= MIN_CUT =>
            {
                room
            }
            None => usize::MAX,
        };
        let shape = match parsed.csum_at() {
            _ if size == usize::MAX => Shape::Whole,
            _ if is_tcp => Shape::Tcp,
            Some(at)
                if !offload.partial
                    && parsed.family() == Family::V4
                    && field::<2>(packet, at) == [0, 0] =>
            {
                Shape::BareUdp
            }
            _ => Shape::Udp,
        };
        let mut out = Self {
            header,
            payload,
            size,
            left: payload.len().div_ceil(size).max(1),
            shape,
            partial: offload.partial,
            first: true,
            family: parsed.family(),
            l4: parsed.l4(),
            csum_at: parsed.csum_at().unwrap_or(0),
            id: 0,
            seq: 0,
            flags: parsed.tcp_flags(),
            ip: Sum::default(),
            pseudo: Sum::default(),
        };
        if shape == Shape::Whole {
            return out;
        }
        if out.family == Family::V4 {
            out.id = u16::from_be_bytes(field(header, 4));
            out.ip = Sum::default()
                .add(&header[..2])
                .add(&header[6..10])
                .add(&header[12..out.l4]);
        }
        if is_tcp {
            out.seq = u32::from_be_bytes(field(header, out.l4 + 4));
        }
        out.pseudo = pseudo_sum(header, out.family, parsed.protocol());
        out
    }

    /// How many segments are still to come.
    #[inline]
    pub fn remaining(&self) -> usize {
        self.left
    }

    /// Length of the next segment: what [`Self::next_into`] needs room for.
    #[inline]
    pub fn next_len(&self) -> Option<usize> {
        (self.left > 0).then(|| self.header.len() + self.payload.len().min(self.size))
    }

    /// Writes the next segment to the front of `out`.
    ///
    /// # Panics
    /// If `out` is shorter than [`Self::next_len`].
    #[inline]
    pub fn next_into(&mut self, out: &mut [u8]) -> Option<Segment> {
        let len = self.next_len()?;
        let out = &mut out[..len];
        let (payload, rest) = self.payload.split_at(len - self.header.len());
        self.payload = rest;
        self.left -= 1;
        let (head, body) = out.split_at_mut(self.header.len());
        head.copy_from_slice(self.header);
        body.copy_from_slice(payload);
        if self.shape != Shape::Whole {
            self.patch(out, payload.len());
        }
        self.first = false;
        Some(Segment {
            len,
            csum_partial: self.partial,
        })
    }

    #[inline]
    fn patch(&mut self, out: &mut [u8], payload: usize) {
        let l4_len = ((out.len() - self.l4) as u16).to_be_bytes();
        match self.family {
            Family::V4 => {
                let len = (out.len() as u16).to_be_bytes();
                let id = self.id.to_be_bytes();
                put(out, 2, len);
                put(out, 4, id);
                put(out, 10, (!self.ip.word(len).word(id).fold()).to_ne_bytes());
                self.id = self.id.wrapping_add(1);
            }
            Family::V6 => put(out, 4, ((out.len() - IPV6_HEADER) as u16).to_be_bytes()),
        }
        match self.shape {
            Shape::Whole => return,
            Shape::Tcp => {
                put(out, self.l4 + 4, self.seq.to_be_bytes());
                self.seq = self.seq.wrapping_add(payload as u32);
                let mut flags = self.flags;
                if self.left > 0 {
                    flags &= !(FIN | PSH);
                }
                if !self.first {
                    flags &= !CWR;
                }
                out[self.l4 + 13] = flags;
            }
            Shape::Udp => put(out, self.l4 + 4, l4_len),
            Shape::BareUdp => return put(out, self.l4 + 4, l4_len),
        }
        let pseudo = self.pseudo.word(l4_len);
        let sum = if self.partial {
            pseudo.fold()
        } else {
            put(out, self.csum_at, [0, 0]);
            let sum = !pseudo.add(&out[self.l4..]).fold();
            if sum == 0 && self.shape == Shape::Udp {
                0xffff
            } else {
                sum
            }
        };
        put(out, self.csum_at, sum.to_ne_bytes());
    }
}

/// What became of a packet given to the [`Coalescer`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Push {
    /// It is the first of a new super-packet.
    Started,
    /// It continues the super-packet.
    Joined,
    /// It does not belong to what is held: write that ([`Coalescer::finish`]) and push again.
    MustFlush,
}

/// Joins adjacent packets of one buffer to a super-packet, without moving a byte of payload.
///
/// What may be joined follows the kernel's own receive offload (`tcp_gro_receive`,
/// `inet_gro_receive`): the same headers but for length, identification, sequence number, PSH and
/// FIN; sequence numbers without a gap; equal payloads, of which only the last may be shorter.
/// Only packets with a partial checksum are joined: they were authenticated as a whole on the way,
/// and their sums follow from their lengths.
///
/// One round: [`push`](Self::push) until [`Push::MustFlush`] or the buffer's end,
/// [`finish`](Self::finish), write, and, if the kernel refused the write with `EINVAL`,
/// [`unjoin`](Self::unjoin) and write each.
#[derive(Debug)]
pub struct Coalescer {
    uso: bool,
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
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Empty,
    Open,
    /// Nothing more can follow: a short or pushed segment, or one that is never joined.
    Closed,
    /// Handed out; the next push starts anew.
    Finished,
    /// Handed out and taken apart again.
    Unjoined,
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
    /// The super-packet's fields: to be used with the bytes of the first part, which hold all its
    /// headers.
    pub parsed: Parsed,
    /// Whether its checksum is partial.
    pub partial: bool,
}

impl Coalescer {
    /// An empty one. `uso`: the TUN takes UDP super-packets (`TUN_F_USO4 | TUN_F_USO6`).
    pub fn new(uso: bool) -> Self {
        Self {
            uso,
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
        }
    }

    /// Whether nothing waits to be finished.
    #[inline]
    pub fn is_empty(&self) -> bool {
        matches!(self.state, State::Empty | State::Finished | State::Unjoined)
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
            State::Empty | State::Finished | State::Unjoined => {
                self.start(slab, range, parsed, csum_partial);
                Push::Started
            }
            State::Closed => Push::MustFlush,
            State::Open => match self.join(slab, &range, parsed, csum_partial) {
                Some(()) => Push::Joined,
                None => Push::MustFlush,
            },
        }
    }

    /// Patches the headers of what is held and hands it out; `None` if nothing is.
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
                    let flags = &mut head[parsed.l4() + 13];
                    *flags |= self.last_flags & (FIN | PSH);
                    let ecn = if *flags & CWR != 0 { GSO_ECN } else { 0 };
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

    /// Makes single packets again out of what [`finish`](Self::finish) last handed out, for a
    /// kernel that refuses it: each is one range of the slab, all go with the same virtio header.
    ///
    /// Each part still has room for its headers in front of its payload, where its own lay; they
    /// are made anew from the head, so that a rewrite of the head in between reaches all.
    pub fn unjoin(&mut self, slab: &mut [u8]) -> (VnetHdr, &[Range<usize>]) {
        let Some(parsed) = self.head else {
            return (VnetHdr::default(), &[]);
        };
        let vnet = VnetHdr::single(&parsed, self.partial);
        let (header, l4) = (parsed.payload(), parsed.l4());
        if self.count > 1 && self.state == State::Finished {
            self.state = State::Unjoined;
            let start = self.parts[0].start;
            let is_tcp = parsed.kind() == Kind::Tcp;
            let id = u16::from_be_bytes(field(slab, start + 4));
            let (seq, flags) = if is_tcp {
                let seq = u32::from_be_bytes(field(slab, start + l4 + 4));
                (seq, slab[start + l4 + 13])
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
                if parsed.family() == Family::V4 && index > 0 {
                    let new = id.wrapping_add(index as u16);
                    shrunk.set_ipv4_id(packet, new);
                }
                if is_tcp {
                    let seq = seq.wrapping_add((index * self.size) as u32);
                    put(packet, l4 + 4, seq.to_be_bytes());
                    let mut flags = flags;
                    if index + 1 < self.count {
                        flags &= !(FIN | PSH);
                    }
                    if index > 0 {
                        flags &= !CWR;
                    }
                    packet[l4 + 13] = flags;
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
            Family::V4 => parsed.l4() == IPV4_HEADER,
            Family::V6 => parsed.l4() == IPV6_HEADER,
        };
        let joinable = partial
            && plain_ip
            && parsed.fragment() == Fragment::None
            && parsed.payload_len() > 0
            && match parsed.kind() {
                Kind::Tcp => {
                    let flags = parsed.tcp_flags();
                    flags & !PLAIN_FLAGS == 0 && flags & ACK != 0 && flags & (PSH | FIN) == 0
                }
                Kind::Udp => self.uso && udp_fills(packet, parsed),
                Kind::Request | Kind::Reply | Kind::Error | Kind::Other | Kind::Hidden => false,
            };
        self.state = if joinable { State::Open } else { State::Closed };
        self.parts[0] = range;
        self.count = 1;
        self.head = Some(*parsed);
        self.partial = partial;
        self.total = parsed.total();
        self.last_flags = 0;
        if joinable {
            self.size = parsed.payload_len();
            self.id = u16::from_be_bytes(field(packet, 4));
            if parsed.kind() == Kind::Tcp {
                self.next_seq = tcp_seq(packet, parsed).wrapping_add(self.size as u32);
            }
        }
    }

    #[inline]
    fn join(
        &mut self,
        slab: &[u8],
        range: &Range<usize>,
        parsed: &Parsed,
        partial: bool,
    ) -> Option<()> {
        let head = self.head?;
        let payload = parsed.payload_len();
        let fits = partial
            && self.count < MAX_PARTS
            && payload > 0
            && payload <= self.size
            && self.total + payload <= MAX_SUPER;
        // The same place for every field, which leaves only the bytes themselves to compare.
        let alike = parsed.kind() == head.kind()
            && parsed.family() == head.family()
            && parsed.fragment() == Fragment::None
            && parsed.l4() == head.l4()
            && parsed.payload() == head.payload();
        if !fits || !alike {
            return None;
        }
        let first = &slab[self.parts[0].clone()];
        let packet = &slab[range.start..range.start + parsed.total()];
        if !self.same_ip(first, packet, parsed.family()) {
            return None;
        }
        let l4 = parsed.l4();
        let (a, b) = (&first[l4..parsed.payload()], &packet[l4..parsed.payload()]);
        let mut closes = payload < self.size;
        if parsed.kind() == Kind::Tcp {
            let flags = parsed.tcp_flags();
            let same = a[..4] == b[..4]
                && a[8..13] == b[8..13]
                && (a[13] ^ flags) & !(CWR | FIN | PSH) == 0
                && flags & CWR == 0
                && a[14..16] == b[14..16]
                && a[18..] == b[18..];
            if !same || tcp_seq(packet, parsed) != self.next_seq {
                return None;
            }
            self.next_seq = self.next_seq.wrapping_add(payload as u32);
            self.last_flags = flags;
            closes |= flags & (PSH | FIN) != 0;
        } else if a[..4] != b[..4] || !udp_fills(packet, parsed) {
            return None;
        }
        let start = range.start + parsed.payload();
        self.parts[self.count] = start..start + payload;
        self.count += 1;
        self.total += payload;
        if closes {
            self.state = State::Closed;
        }
        Some(())
    }

    /// Whether two IP headers without options may stand for one.
    #[inline]
    fn same_ip(&self, first: &[u8], packet: &[u8], family: Family) -> bool {
        const DONT_FRAGMENT: u8 = 0x40;
        match family {
            Family::V4 => {
                let id = u16::from_be_bytes(field(packet, 4));
                let counts = id == self.id.wrapping_add(self.count as u16);
                // An atomic datagram's identification says nothing (RFC 6864 section 4).
                let constant = id == self.id && packet[6] & DONT_FRAGMENT != 0;
                first[1] == packet[1]
                    && first[6..10] == packet[6..10]
                    && first[12..20] == packet[12..20]
                    && (counts || constant)
            }
            Family::V6 => first[..4] == packet[..4] && first[6..40] == packet[6..40],
        }
    }
}

#[inline]
fn tcp_seq(packet: &[u8], parsed: &Parsed) -> u32 {
    u32::from_be_bytes(field(packet, parsed.l4() + 4))
}

/// Whether the UDP length is that of the packet: no surplus behind the datagram.
#[inline]
fn udp_fills(packet: &[u8], parsed: &Parsed) -> bool {
    let len = u16::from_be_bytes(field(packet, parsed.l4() + 4));
    usize::from(len) == parsed.total() - parsed.l4()
}
