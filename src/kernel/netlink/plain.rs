//! One request over a socket of its own, to a part of the kernel whose messages no crate knows:
//! connection tracking, and sockets.
//!
//! Owns the header and the reading of answers. What is in the messages is the business of whoever
//! asks.

use std::io;

use netlink_packet_core::{NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer};
use netlink_sys::Socket;

/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;

/// Sends a request of this kind, and hands over the payload of each answer up to the last one, or
/// until `go_on` says no.
///
/// # Errors
/// If the kernel refuses, with its error code, or cannot be asked.
pub fn ask(
    protocol: isize,
    kind: u16,
    flags: u16,
    payload: &[u8],
    mut go_on: impl FnMut(&[u8]) -> bool,
) -> io::Result<()> {
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    let mut request = Vec::from(((HEADER + payload.len()) as u32).to_ne_bytes());
    request.extend(kind.to_ne_bytes());
    request.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    // Sequence and port.
    request.extend([0; 8]);
    request.extend(payload);
    socket.send(&request, 0)?;
    loop {
        let (datagram, _) = match socket.recv_from_full() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            other => other?,
        };
        let mut rest = &datagram[..];
        while !rest.is_empty() {
            let Ok(message) = NetlinkBuffer::new_checked(rest) else {
                return Err(io::ErrorKind::InvalidData.into());
            };
            let payload = message.payload();
            match message.message_type() {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => {
                    let code = payload.get(..4).and_then(|bytes| bytes.try_into().ok());
                    return match code.map_or(0, i32::from_ne_bytes) {
                        0 => Ok(()),
                        errno => Err(io::Error::from_raw_os_error(errno.wrapping_neg())),
                    };
                }
                _ => {
                    if !go_on(payload) {
                        return Ok(());
                    }
                }
            }
            let next = (message.length() as usize).next_multiple_of(4);
            rest = rest.get(next..).unwrap_or_default();
        }
    }
}
