//! The bytes of which several messages are made: an address, and whatever has a fixed length.
//!
//! Owns how to write them and how to take them off the front of what came. Knows no message.

use std::net::IpAddr;

/// Takes so many bytes off the front; `None` if there are fewer.
pub fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (head, tail) = rest.split_first_chunk::<N>()?;
    *rest = tail;
    Some(*head)
}

/// Appends the family of an address, 4 or 6, and the address.
pub fn put_address(addr: IpAddr, out: &mut Vec<u8>) {
    match addr {
        IpAddr::V4(addr) => {
            out.push(4);
            out.extend_from_slice(&addr.octets());
        }
        IpAddr::V6(addr) => {
            out.push(6);
            out.extend_from_slice(&addr.octets());
        }
    }
}

/// Takes such an address off the front; `None` if there is none.
pub fn take_address(rest: &mut &[u8]) -> Option<IpAddr> {
    match take(rest)? {
        [4] => Some(take::<4>(rest)?.into()),
        [6] => Some(take::<16>(rest)?.into()),
        _ => None,
    }
}
