//! The virtio-net header in front of every packet of a TUN: what the kernel says of the packet, and
//! whether that is true.

use crate::model::drops::DropReason;
use crate::packet::checksum::{Sum, finish};
use crate::packet::field::{get, ipv4, ipv6, put};
use crate::packet::{Family, Fragment, Kind, Parsed};

/// Length of [`VnetHdr`] on a TUN with `IFF_VNET_HDR` (`struct virtio_net_hdr`; the longer forms
/// are asked for with `TUNSETVNETHDRSZ`).
pub const VNET_HDR_LEN: usize = 10;

/// Checksum not finished: sum up from `csum_start`, store at `csum_offset` behind it
/// (`VIRTIO_NET_HDR_F_NEEDS_CSUM`, virtio 1.2 section 5.1.6).
pub const NEEDS_CSUM: u8 = 1;
/// Not a super-packet (`VIRTIO_NET_HDR_GSO_NONE`).
pub const GSO_NONE: u8 = 0;
/// TCP over IPv4 (`VIRTIO_NET_HDR_GSO_TCPV4`).
pub const GSO_TCPV4: u8 = 1;
/// TCP over IPv6 (`VIRTIO_NET_HDR_GSO_TCPV6`).
pub const GSO_TCPV6: u8 = 4;
/// UDP, segmented into datagrams (`VIRTIO_NET_HDR_GSO_UDP_L4`, USO).
pub const GSO_UDP_L4: u8 = 5;
/// Or-ed to the TCP types: CWR is set and belongs to the first segment
/// (`VIRTIO_NET_HDR_GSO_ECN`).
pub const GSO_ECN: u8 = 0x80;

/// `struct virtio_net_hdr`, in the machine's own byte order, which is what a TUN uses unless told
/// otherwise (`TUNSETVNETLE`; linux/virtio_net.h, Documentation/networking/tuntap.rst).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VnetHdr {
    /// [`NEEDS_CSUM`] or nothing that matters here.
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
    pub fn read(bytes: &[u8; VNET_HDR_LEN]) -> Self {
        let word = |at| u16::from_ne_bytes(get(bytes, at));
        Self {
            flags: bytes[0],
            gso_type: bytes[1],
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
        }
    }

    /// How many packets a packet with so much payload stands for.
    #[inline]
    pub fn packets(&self, payload_len: usize) -> u16 {
        if self.gso_type == GSO_NONE || self.gso_size == 0 {
            return 1;
        }
        let packets = payload_len.div_ceil(usize::from(self.gso_size));
        packets.clamp(1, u16::MAX.into()) as u16
    }

    /// The header as a TUN takes it.
    #[inline]
    pub fn to_bytes(self) -> [u8; VNET_HDR_LEN] {
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

/// What a packet's virtio header says, checked against the packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Offload {
    /// Payload bytes per segment, of a super-packet.
    pub(super) segment_size: Option<u16>,
    pub(super) partial: bool,
}

impl Offload {
    /// Checks `vnet` against the packet it came with.
    ///
    /// `NEEDS_CSUM` may mean another checksum than the packet's own TCP or UDP checksum (that of a
    /// packet inside, say). That one is finished here, in `packet`.
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
            && parsed.may_be_partial()
            && start == parsed.l4()
            && parsed.csum_at() == Some(at);
        if needs_csum && !partial {
            let headers_end = match parsed.family() {
                Family::V4 => ipv4::HEADER_LEN,
                Family::V6 => ipv6::HEADER_LEN,
            };
            if vnet.gso_type != GSO_NONE || start < headers_end || at + 2 > total {
                return Err(DropReason::BadOffload);
            }
            // The field is inside the range and holds the pseudo-header's sum already. Whichever
            // protocol it belongs to, no receiver minds the other zero.
            let sum = Sum::default().add(&packet[start..total]);
            put(packet, at, finish(sum, true).to_ne_bytes());
        }
        let wanted = match vnet.gso_type & !GSO_ECN {
            GSO_NONE if vnet.gso_type == GSO_NONE => {
                return Ok(Self {
                    segment_size: None,
                    partial,
                });
            }
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
            segment_size: Some(vnet.gso_size),
            partial,
        })
    }

    /// Whether segments or a checksum are still left to whoever gets the packet.
    pub fn is_unfinished(&self) -> bool {
        self.partial || self.segment_size.is_some()
    }

    /// Whether the packet's TCP or UDP checksum is partial.
    #[inline]
    pub fn partial(&self) -> bool {
        self.partial
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::testing::{Plan, make_partial, plan, vnet};

    #[test]
    fn contradictions_are_refused() {
        let packet = plan(Kind::Tcp, false, 300).build_partial();
        let parsed = Parsed::parse(&packet).unwrap();
        let good = vnet(&parsed, 100, true);
        let accept = |change: &dyn Fn(&mut VnetHdr)| {
            let mut vnet = good;
            change(&mut vnet);
            Offload::accept(&vnet, &mut packet.clone(), &parsed).err()
        };
        assert_eq!(accept(&|_| ()), None);
        let bad = Some(DropReason::BadOffload);
        assert_eq!(accept(&|v| v.gso_size = 0), bad);
        assert_eq!(accept(&|v| v.gso_type = GSO_TCPV6), bad);
        assert_eq!(accept(&|v| v.gso_type = GSO_UDP_L4), bad);
        assert_eq!(accept(&|v| v.gso_type = 3), bad, "UFO was not asked for");
        assert_eq!(accept(&|v| v.csum_start = 9000), bad);
        assert_eq!(accept(&|v| v.csum_offset = 6), bad);
        assert_eq!(accept(&|v| v.hdr_len = 341), bad);
        assert_eq!(accept(&|v| v.hdr_len = 340), None);
    }

    #[test]
    fn a_sum_that_is_not_the_packets_own_is_finished() {
        // The inner checksum of a UDP tunnel.
        let mut inner = plan(Kind::Udp, false, 100).build();
        let wanted = inner.clone();
        make_partial(&mut inner);
        let outer = Plan {
            payload: inner.clone(),
            ..plan(Kind::Udp, false, 0)
        };
        let mut packet = outer.build();
        let parsed = Parsed::parse(&packet).unwrap();
        let vnet = VnetHdr {
            flags: NEEDS_CSUM,
            csum_start: 28 + 20,
            csum_offset: 6,
            ..VnetHdr::default()
        };
        let offload = Offload::accept(&vnet, &mut packet, &parsed).unwrap();
        assert!(!offload.partial());
        assert_eq!(packet[28..], wanted);
    }
}
