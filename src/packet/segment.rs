//! Segmentation: what the kernel hands over as one super-packet becomes packets that the tunnel
//! carries.
//!
//! Owns how TCP and UDP are segmented. Must not touch a device, and nothing here allocates:
//! segments are written where the caller says.
//!
//! By hand, and not by tun-rs's `gso_split`: that one finishes the checksum of every segment. Here
//! a partial one stays partial across the tunnel, so the payload is copied once and never summed
//! up.
//!
//! ```text
//! TUN read:   vnet │ headers │ payload ........................ │
//!                      └───────┬──────────┬──────────┐
//!             out:     headers│p1   headers│p2   headers│p3       (each into the send batch)
//! ```

use crate::packet::checksum::{Sum, finish, pseudo_sum};
use crate::packet::field::{get, get_u16, get_u32, ipv4, ipv6, put, tcp, udp};
use crate::packet::vnet::Offload;
use crate::packet::{ACK, CWR, ECE, FIN, Family, Fragment, Kind, PSH, Parsed};

/// Least payload of a TCP segment that is made smaller than its sender wanted. A tunnel that
/// carries less than this beside the headers is better served by splitting packets.
const MIN_SEGMENT_PAYLOAD: usize = 64;

/// TCP flags that may appear in a packet that is segmented or coalesced.
pub(super) const PLAIN_FLAGS: u8 = ACK | PSH | FIN | ECE | CWR;

/// One packet that [`Segments`] wrote.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segment {
    /// Its length. If it is more than `max_segment`, segmenting is not allowed and the caller
    /// splits.
    pub len: usize,
    /// Whether its TCP or UDP checksum is partial.
    pub csum_partial: bool,
}

/// The segments of one packet, written one by one where the caller wants them.
///
/// Headers and payload are copied once. TCP is segmented by `gso_size`, or smaller where the tunnel
/// carries less: a byte stream has no boundaries to keep. A single plain TCP packet that is too
/// large and has a partial checksum is segmented too. UDP is segmented only where its sender said.
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
    /// Prepares to segment `packet` into segments of at most `max_segment` bytes.
    #[inline]
    pub fn new(offload: Offload, packet: &'a [u8], parsed: &Parsed, max_segment: usize) -> Self {
        let packet = &packet[..parsed.total()];
        let (header, payload) = packet.split_at(parsed.payload());
        let space = max_segment.saturating_sub(header.len());
        let is_tcp = parsed.kind() == Kind::Tcp;
        let size = match offload.segment_size {
            Some(size) if is_tcp && space >= MIN_SEGMENT_PAYLOAD => usize::from(size).min(space),
            Some(size) => usize::from(size),
            None if packet.len() > max_segment
                && is_tcp
                && offload.partial
                && parsed.fragment() == Fragment::None
                && parsed.tcp_flags() & !PLAIN_FLAGS == 0
                && space >= MIN_SEGMENT_PAYLOAD =>
            {
                space
            }
            None => usize::MAX,
        };
        let shape = match parsed.csum_at() {
            _ if size == usize::MAX => Shape::Whole,
            _ if is_tcp => Shape::Tcp,
            Some(at)
                if !offload.partial
                    && parsed.family() == Family::V4
                    && get::<2>(packet, at) == [0, 0] =>
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
            out.id = get_u16(header, ipv4::ID);
            out.ip = Sum::default()
                .add(&header[..ipv4::TOTAL_LEN])
                .add(&header[ipv4::FRAGMENT..ipv4::CHECKSUM])
                .add(&header[ipv4::SRC..out.l4]);
        }
        if is_tcp {
            out.seq = get_u32(header, out.l4 + tcp::SEQ);
        }
        out.pseudo = pseudo_sum(header, out.family, parsed.protocol());
        out
    }

    /// How many segments are still to come.
    #[inline]
    pub fn remaining(&self) -> usize {
        self.left
    }

    /// Length of the next segment: how much space [`Self::next_into`] needs.
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
                put(out, ipv4::TOTAL_LEN, len);
                put(out, ipv4::ID, id);
                let sum = finish(self.ip.word(len).word(id), false);
                put(out, ipv4::CHECKSUM, sum.to_ne_bytes());
                self.id = self.id.wrapping_add(1);
            }
            Family::V6 => {
                let len = ((out.len() - ipv6::HEADER_LEN) as u16).to_be_bytes();
                put(out, ipv6::PAYLOAD_LEN, len);
            }
        }
        match self.shape {
            Shape::Whole => return,
            Shape::Tcp => {
                put(out, self.l4 + tcp::SEQ, self.seq.to_be_bytes());
                self.seq = self.seq.wrapping_add(payload as u32);
                let mut flags = self.flags;
                if self.left > 0 {
                    flags &= !(FIN | PSH);
                }
                if !self.first {
                    flags &= !CWR;
                }
                out[self.l4 + tcp::FLAGS] = flags;
            }
            Shape::Udp => put(out, self.l4 + udp::LEN, l4_len),
            Shape::BareUdp => return put(out, self.l4 + udp::LEN, l4_len),
        }
        let pseudo = self.pseudo.word(l4_len);
        let sum = if self.partial {
            pseudo.fold()
        } else {
            put(out, self.csum_at, [0, 0]);
            finish(pseudo.add(&out[self.l4..]), self.shape == Shape::Udp)
        };
        put(out, self.csum_at, sum.to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::SYN;
    use crate::packet::testing::{Plan, assert_sums, plan, segments, vnet};
    use crate::packet::vnet::{VNET_HDR_LEN, VnetHdr};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn without_partial_sums_they_are_computed(
            udp in any::<bool>(), v6 in any::<bool>(), size in 1u16..1400, payload in 1usize..5000,
        ) {
            let kind = if udp { Kind::Udp } else { Kind::Tcp };
            let mut packet = plan(kind, v6, payload).build();
            let parsed = Parsed::parse(&packet).unwrap();
            for (segment, partial) in segments(&mut packet, &vnet(&parsed, size, false), 1500) {
                prop_assert!(!partial);
                assert_sums(&segment);
            }
        }

        #[test]
        fn no_virtio_header_makes_it_panic(
            udp in any::<bool>(), v6 in any::<bool>(), vnet in any::<[u8; VNET_HDR_LEN]>(),
            near in any::<bool>(), payload in 0usize..300, max in 0usize..400,
        ) {
            let kind = if udp { Kind::Udp } else { Kind::Tcp };
            let mut packet = plan(kind, v6, payload).build();
            let parsed = Parsed::parse(&packet).unwrap();
            let mut vnet = VnetHdr::read(&vnet);
            prop_assert_eq!(VnetHdr::read(&vnet.to_bytes()), vnet);
            if near {
                vnet.hdr_len %= 80;
                vnet.csum_start %= 100;
                vnet.csum_offset %= 100;
                vnet.gso_type %= 8;
            }
            if let Ok(offload) = Offload::accept(&vnet, &mut packet, &parsed) {
                let mut left = Segments::new(offload, &packet, &parsed, max);
                let mut out = [0; 2000];
                while let Some(segment) = left.next_into(&mut out) {
                    prop_assert!(Parsed::parse(&out[..segment.len]).is_ok());
                }
            }
        }
    }

    #[test]
    fn tcp_segments_are_smaller_where_the_tunnel_carries_less() {
        let mut packet = plan(Kind::Tcp, false, 5000).build_partial();
        let parsed = Parsed::parse(&packet).unwrap();
        let lens = |all: Vec<(Vec<u8>, bool)>| -> Vec<usize> {
            all.iter().map(|(segment, _)| segment.len()).collect()
        };
        let all = segments(&mut packet, &vnet(&parsed, 1460, true), 1400);
        assert_eq!(lens(all), [1400, 1400, 1400, 960]);
        // A single large packet too, but only if its sum is partial and it is plain data.
        let single = VnetHdr::single(&parsed, true);
        assert_eq!(
            lens(segments(&mut packet, &single, 1400)),
            [1400, 1400, 1400, 960]
        );
        let mut full = plan(Kind::Tcp, false, 2000).build();
        assert_eq!(lens(segments(&mut full, &VnetHdr::default(), 1400)), [2040]);
        let mut syn = Plan {
            flags: SYN,
            ..plan(Kind::Tcp, false, 2000)
        }
        .build_partial();
        assert_eq!(lens(segments(&mut syn, &single, 1400)), [2040]);
        // UDP keeps its boundaries: the caller splits.
        let mut udp = plan(Kind::Udp, false, 3000).build_partial();
        let parsed = Parsed::parse(&udp).unwrap();
        assert_eq!(
            lens(segments(&mut udp, &vnet(&parsed, 1472, true), 1400)),
            [1500, 1500, 84]
        );
    }

    #[test]
    fn flags_stay_where_they_belong() {
        let mut packet = Plan {
            flags: ACK | PSH | FIN | CWR,
            ..plan(Kind::Tcp, true, 300)
        }
        .build_partial();
        let parsed = Parsed::parse(&packet).unwrap();
        let flags: Vec<u8> = segments(&mut packet, &vnet(&parsed, 100, true), 1400)
            .iter()
            .map(|(segment, _)| Parsed::parse(segment).unwrap().tcp_flags())
            .collect();
        assert_eq!(flags, [ACK | CWR, ACK, ACK | PSH | FIN]);
    }
}
