//! The packet that an ICMP error quotes, read and rewritten.

use crate::model::drops::DropReason;
use crate::model::moved::{TCP, UDP};
use crate::packet::addr::{Addr, Family};
use crate::packet::checksum::{Sum, mend_full, mend_l4_full, replace};
use crate::packet::field::{
    DCCP, ICMP, ICMPV6, UDP_LITE, get, get_u16, icmp, ipv4, ipv6, tcp, udp,
};
use crate::packet::headers::{Chain, Fragment};
use crate::packet::kind::{Kind, icmp_kind, icmp_ports};
use crate::packet::parsed::Parsed;

/// The packet that an ICMP error quotes: as much of it as there is.
///
/// Offsets are those of the whole ICMP packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Quoted {
    at: u16,
    end: u16,
    l4: u16,
    csum_at: u16,
    src_port: u16,
    dst_port: u16,
    family: Family,
    protocol: u8,
    kind: Kind,
}

/// What to change in a quoted packet; `None` leaves a field alone.
#[derive(Clone, Copy, Default, Debug)]
pub struct Rewrite {
    /// Source address.
    pub src: Option<Addr>,
    /// Destination address.
    pub dst: Option<Addr>,
    /// Source port, or identifier of a query.
    pub src_port: Option<u16>,
    /// Destination port, or identifier of a reply.
    pub dst_port: Option<u16>,
}

impl Quoted {
    /// Reads the quotation of an ICMP error.
    ///
    /// # Errors
    /// [`DropReason::IcmpUnrelated`] if no flow can be found by what is quoted: another family, a
    /// later fragment, an ICMP error, or less than the ports.
    pub fn parse(bytes: &[u8], error: &Parsed) -> Result<Self, DropReason> {
        Self::read(bytes, error).ok_or(DropReason::IcmpUnrelated)
    }

    fn read(bytes: &[u8], error: &Parsed) -> Option<Self> {
        if error.kind() != Kind::IcmpError {
            return None;
        }
        let at = error.payload();
        let bytes = &bytes[..error.total()];
        let quote = &bytes[at..];
        let (l4, protocol) = match error.family() {
            Family::V4 => {
                let header = quote.first_chunk::<{ ipv4::HEADER_LEN }>()?;
                let len = ipv4::header_len(header[ipv4::VERSION_IHL]);
                let later = get_u16(header, ipv4::FRAGMENT) & ipv4::FRAGMENT_OFFSET != 0;
                if header[ipv4::VERSION_IHL] >> 4 != 4
                    || len < ipv4::HEADER_LEN
                    || len > quote.len()
                    || later
                {
                    return None;
                }
                (at + len, header[ipv4::PROTOCOL])
            }
            Family::V6 => {
                let header = quote.first_chunk::<{ ipv6::HEADER_LEN }>()?;
                if header[ipv6::VERSION_CLASS] >> 4 != 6 {
                    return None;
                }
                let chain =
                    Chain::walk(bytes, at + ipv6::HEADER_LEN, header[ipv6::NEXT_HEADER]).ok()?;
                if chain.fragment == Fragment::Later {
                    return None;
                }
                (chain.l4, chain.protocol)
            }
        };
        let mut out = Self {
            at: u16::try_from(at).ok()?,
            end: u16::try_from(bytes.len()).ok()?,
            l4: u16::try_from(l4).ok()?,
            csum_at: 0,
            src_port: 0,
            dst_port: 0,
            family: error.family(),
            protocol,
            kind: Kind::Other,
        };
        let l4 = &bytes[l4..];
        let csum = match (protocol, error.family()) {
            (TCP | UDP, _) => {
                let ports = l4.first_chunk::<8>()?;
                out.src_port = get_u16(ports, udp::SRC_PORT);
                out.dst_port = get_u16(ports, udp::DST_PORT);
                out.kind = if protocol == TCP {
                    Kind::Tcp
                } else {
                    Kind::Udp
                };
                if protocol == TCP {
                    tcp::CHECKSUM
                } else {
                    udp::CHECKSUM
                }
            }
            (ICMP, Family::V4) | (ICMPV6, Family::V6) => {
                let header = l4.first_chunk::<8>()?;
                out.kind = icmp_kind(error.family(), header[icmp::TYPE])
                    .filter(|&kind| kind != Kind::IcmpError)?;
                (out.src_port, out.dst_port) = icmp_ports(out.kind, l4);
                icmp::CHECKSUM
            }
            (UDP_LITE | DCCP, _) => udp::CHECKSUM,
            _ => return Some(out),
        };
        // Eight bytes are all that RFC 792 promises; the checksum of TCP lies behind them.
        if l4.len() >= csum + 2 {
            out.csum_at = out.l4 + csum as u16;
        }
        Some(out)
    }

    /// IP protocol number of the quoted packet.
    pub fn protocol(&self) -> u8 {
        self.protocol
    }

    /// What the quoted packet is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Source port of the quoted packet, or identifier of a query.
    pub fn src_port(&self) -> u16 {
        self.src_port
    }

    /// Destination port of the quoted packet, or identifier of a reply.
    pub fn dst_port(&self) -> u16 {
        self.dst_port
    }

    /// Source address of the quoted packet.
    pub fn src(&self, bytes: &[u8]) -> Addr {
        match self.family {
            Family::V4 => Addr::v4(get(bytes, usize::from(self.at) + ipv4::SRC)),
            Family::V6 => Addr(get(bytes, usize::from(self.at) + ipv6::SRC)),
        }
    }

    /// Destination address of the quoted packet.
    pub fn dst(&self, bytes: &[u8]) -> Addr {
        match self.family {
            Family::V4 => Addr::v4(get(bytes, usize::from(self.at) + ipv4::DST)),
            Family::V6 => Addr(get(bytes, usize::from(self.at) + ipv6::DST)),
        }
    }

    /// Changes the quoted packet. Mends its checksums as far as they are quoted, and the checksum
    /// of the error around it.
    pub fn rewrite(&self, bytes: &mut [u8], error: &Parsed, change: &Rewrite) {
        // Everything that can change lies between the quoted IP header and the end of the longest
        // plain transport header; the difference of its sums is what the error's checksum needs.
        let reach =
            usize::from(self.at)..usize::from(self.end).min(usize::from(self.l4) + tcp::HEADER_LEN);
        let before = Sum::default().add(&bytes[reach.clone()]);
        let (src_at, dst_at) = match self.family {
            Family::V4 => (ipv4::SRC, ipv4::DST),
            Family::V6 => (ipv6::SRC, ipv6::DST),
        };
        self.set_addr(bytes, src_at, change.src);
        self.set_addr(bytes, dst_at, change.dst);
        let (src_at, dst_at) = match self.kind {
            Kind::Tcp | Kind::Udp => (Some(udp::SRC_PORT), Some(udp::DST_PORT)),
            Kind::IcmpQuery => (Some(icmp::ID), None),
            Kind::IcmpReply => (None, Some(icmp::ID)),
            Kind::IcmpError | Kind::Other | Kind::LaterFragment => (None, None),
        };
        for (at, port) in [(src_at, change.src_port), (dst_at, change.dst_port)] {
            if let (Some(at), Some(port)) = (at, port) {
                let delta = replace(bytes, usize::from(self.l4) + at, port.to_be_bytes());
                self.mend(bytes, delta);
            }
        }
        let after = Sum::default().add(&bytes[reach]);
        let delta = Sum::change(before.fold().to_ne_bytes(), after.fold().to_ne_bytes());
        // Every ICMP error has a checksum.
        if let Some(at) = error.csum_at() {
            mend_full(bytes, at, delta);
        }
    }

    fn set_addr(&self, bytes: &mut [u8], offset: usize, addr: Option<Addr>) {
        let Some(addr) = addr else { return };
        let at = usize::from(self.at);
        match self.family {
            Family::V4 => {
                let [.., a, b, c, d] = addr.0;
                let delta = replace(bytes, at + offset, [a, b, c, d]);
                mend_full(bytes, at + ipv4::CHECKSUM, delta);
                if self.protocol != ICMP {
                    self.mend(bytes, delta);
                }
            }
            Family::V6 => {
                let delta = replace(bytes, at + offset, addr.0);
                self.mend(bytes, delta);
            }
        }
    }

    fn mend(&self, bytes: &mut [u8], delta: Sum) {
        if self.csum_at != 0 {
            mend_l4_full(bytes, usize::from(self.csum_at), self.protocol, delta);
        }
    }
}
