//! The headers by name: where each field lies, and the numbers that may stand in it.
//!
//! A module for each header, named as its RFC names it. An offset counts from the beginning of its
//! own header; a field reaches up to the next one, and the type that is read or written says how
//! wide it is. `HEADER_LEN` is the length without options.

/// IP protocol number of ICMP for IPv4.
pub const ICMP: u8 = 1;
/// IP protocol number of ICMP for IPv6.
pub const ICMPV6: u8 = 58;
/// IP protocol number of UDP-Lite (RFC 3828).
pub(super) const UDP_LITE: u8 = 136;
/// IP protocol number of DCCP (RFC 4340).
pub(super) const DCCP: u8 = 33;

/// Every link that carries IPv6 carries packets of this size. One that cannot has to fragment and
/// reassemble them below IPv6 (RFC 8200 section 5).
pub const IPV6_MIN_MTU: usize = 1_280;

/// TCP flag FIN.
pub const FIN: u8 = 0x01;
/// TCP flag SYN.
pub const SYN: u8 = 0x02;
/// TCP flag RST.
pub const RST: u8 = 0x04;
/// TCP flag PSH.
pub const PSH: u8 = 0x08;
/// TCP flag ACK.
pub const ACK: u8 = 0x10;
/// TCP flag ECE (RFC 3168).
pub const ECE: u8 = 0x40;
/// TCP flag CWR (RFC 3168).
pub const CWR: u8 = 0x80;

/// The IPv4 header (RFC 791).
pub(crate) mod ipv4 {
    /// Version, and the header's length in words of four bytes.
    pub(crate) const VERSION_IHL: usize = 0;
    /// DSCP and ECN.
    pub(crate) const TRAFFIC_CLASS: usize = 1;
    pub(crate) const TOTAL_LEN: usize = 2;
    pub(crate) const ID: usize = 4;
    /// Two flags, and the offset in units of eight bytes.
    pub(crate) const FRAGMENT: usize = 6;
    pub(crate) const TTL: usize = 8;
    pub(crate) const PROTOCOL: usize = 9;
    pub(crate) const CHECKSUM: usize = 10;
    pub(crate) const SRC: usize = 12;
    pub(crate) const DST: usize = 16;
    pub(crate) const HEADER_LEN: usize = 20;

    /// Flag in `FRAGMENT`: no router may fragment the packet.
    pub(crate) const DONT_FRAGMENT: u16 = 0x4000;
    /// Flag in `FRAGMENT`: this is not the last one.
    pub(crate) const MORE_FRAGMENTS: u16 = 0x2000;
    /// The rest of `FRAGMENT`.
    pub(crate) const FRAGMENT_OFFSET: u16 = 0x1fff;

    /// Length of the header that begins with `first`, options included.
    #[inline]
    pub(crate) fn header_len(first: u8) -> usize {
        usize::from(first & 0x0f) * 4
    }
}

/// The IPv6 header (RFC 8200 section 3).
pub(crate) mod ipv6 {
    /// Version, traffic class and flow label: DSCP and ECN lie across the first two bytes.
    pub(crate) const VERSION_CLASS: usize = 0;
    pub(crate) const PAYLOAD_LEN: usize = 4;
    pub(crate) const NEXT_HEADER: usize = 6;
    pub(crate) const HOP_LIMIT: usize = 7;
    pub(crate) const SRC: usize = 8;
    pub(crate) const DST: usize = 24;
    pub(crate) const HEADER_LEN: usize = 40;
}

/// The fragment header of IPv6 (RFC 8200 section 4.5).
pub(crate) mod ipv6_fragment {
    /// The offset in bytes, and one flag.
    pub(crate) const FRAGMENT: usize = 2;
    pub(crate) const ID: usize = 4;
    pub(crate) const HEADER_LEN: usize = 8;

    /// Flag in `FRAGMENT`: this is not the last one.
    pub(crate) const MORE_FRAGMENTS: u16 = 0x0001;
    /// The offset in `FRAGMENT`.
    pub(crate) const FRAGMENT_OFFSET: u16 = 0xfff8;
}

/// The TCP header (RFC 9293 section 3.1). Its ports lie where UDP has them.
pub(crate) mod tcp {
    pub(crate) const SEQ: usize = 4;
    pub(crate) const ACK_NUMBER: usize = 8;
    /// The header's length in words of four bytes, in the upper half.
    pub(crate) const DATA_OFFSET: usize = 12;
    pub(crate) const FLAGS: usize = 13;
    pub(crate) const CHECKSUM: usize = 16;
    pub(crate) const URGENT: usize = 18;
    pub(crate) const HEADER_LEN: usize = 20;
    /// With all options there may be.
    pub(crate) const MAX_HEADER_LEN: usize = 60;
}

/// The UDP header (RFC 768). UDP-Lite and DCCP have ports and checksum at the same places.
pub(crate) mod udp {
    pub(crate) const SRC_PORT: usize = 0;
    pub(crate) const DST_PORT: usize = 2;
    pub(crate) const LEN: usize = 4;
    pub(crate) const CHECKSUM: usize = 6;
    pub(crate) const HEADER_LEN: usize = 8;
}

/// The ICMP header of both families (RFC 792, RFC 4443).
pub(crate) mod icmp {
    pub(crate) const TYPE: usize = 0;
    pub(crate) const CHECKSUM: usize = 2;
    /// Identifier of a query or of its reply.
    pub(crate) const ID: usize = 4;
    pub(crate) const HEADER_LEN: usize = 8;
}

/// Reads the `N` bytes at `at`.
#[inline]
pub(crate) fn get<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

/// Reads a 16-bit field.
#[inline]
pub(crate) fn get_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(get(bytes, at))
}

/// Reads a 32-bit field.
#[inline]
pub(crate) fn get_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(get(bytes, at))
}

/// Writes `value` at `at`.
#[inline]
pub(crate) fn put<const N: usize>(bytes: &mut [u8], at: usize, value: [u8; N]) {
    bytes[at..at + N].copy_from_slice(&value);
}
