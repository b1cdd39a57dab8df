//! The numbers of the headers: protocols, TCP flags, lengths, and how a field is read and written.

/// IP protocol number of ICMP for IPv4.
pub const ICMP: u8 = 1;
/// IP protocol number of ICMP for IPv6.
pub const ICMPV6: u8 = 58;

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
/// TCP flag URG.
pub const URG: u8 = 0x20;
/// TCP flag ECE (RFC 3168).
pub const ECE: u8 = 0x40;
/// TCP flag CWR (RFC 3168).
pub const CWR: u8 = 0x80;

/// Length of an IPv6 header.
pub(crate) const IPV6_HEADER: usize = 40;
/// Length of an IPv4 header without options.
pub(crate) const IPV4_HEADER: usize = 20;

pub(super) const UDP_LITE: u8 = 136;
pub(super) const DCCP: u8 = 33;

#[inline]
pub(crate) fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

#[inline]
pub(crate) fn put<const N: usize>(bytes: &mut [u8], at: usize, value: [u8; N]) {
    bytes[at..at + N].copy_from_slice(&value);
}
