//! One door for bytes: an IP packet is checked here, once, and everything after relies on it.
//!
//! Owns what an IPv4 or IPv6 packet may look like, where its fields lie, and how its checksums are
//! mended when a field changes (RFC 1624). Knows nothing of flows, tunnels or the kernel.
//!
//! [`Parsed`] is a small `Copy` table of offsets; the bytes stay with the caller, who hands both to
//! the setters. A checksum is in one of two states, and every setter is told which:
//!
//! * *full*: the field is the finished checksum, as on the wire;
//! * *partial* (`VIRTIO_NET_HDR_F_NEEDS_CSUM`): the field holds the folded, non-complemented sum of
//!   the pseudo-header alone, and whoever needs the finished one sums up the rest.
//!
//! Setters mend and never recompute: a packet that came with a wrong checksum leaves with a wrong
//! one, so that the receiver still sees the damage.
//!
//! | file | owns |
//! |---|---|
//! | `addr` | addresses of both families as one type |
//! | `field` | where the fields of the headers lie, and what may stand in them |
//! | `kind`, `headers` | what follows the IP header, and what may stand in between |
//! | `parsed` | the check, and the setters |
//! | `quoted` | the packet that an ICMP error quotes |
//! | `checksum` | the sum, and how it is mended |
//! | `mss`, [`ecn`] | what a tunnel has to change in a packet that passes |
//! | [`fragment`] | fragments that wait, contradict each other, or are made here |
//! | `shares` | the memory that clients share for that |
//! | [`vnet`], [`segment`], [`coalesce`] | super-packets, segmented and coalesced again |
//! | [`icmp`], [`icmp_reply`] | ICMP errors that the daemon itself sends, and how many |

mod addr;
mod checksum;
pub mod coalesce;
pub mod ecn;
mod field;
pub mod fragment;
mod headers;
pub mod icmp;
pub mod icmp_reply;
mod kind;
mod mss;
mod parsed;
mod quoted;
pub mod segment;
mod shares;
#[cfg(test)]
pub(crate) mod testing;
pub mod vnet;

pub use addr::{Addr, Family};
pub(crate) use coalesce::tcp_seq;
pub use field::{ACK, CWR, ECE, FIN, ICMP, ICMPV6, IPV6_MIN_MTU, PSH, RST, SYN};
pub use headers::{Fragment, MAX_EXTENSION_HEADERS};
pub use kind::{Kind, ProtocolName};
pub use mss::clamp_mss;
pub use parsed::Parsed;
pub use quoted::{Quoted, Rewrite};
