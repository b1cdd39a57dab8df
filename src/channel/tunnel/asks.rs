//! What the old server asks the new one, and is told: whether something listens where certain ports
//! of what has moved are delivered. Both ride on keepalives of their own.
//!
//! Owns their bytes. A daemon that does not know of them takes them for padding, so nothing has to
//! be agreed; whoever asks goes on asking as long as it wants to know, so one that is lost costs
//! nothing but time. What is told names what was asked, so nothing is kept here.

use crate::model::asked::{Asked, Found};
use crate::model::bytes::{put_address, take, take_address};

/// The first byte of either on a keepalive. Troubles and progress have others.
const ASKS: u8 = 3;
const TOLD: u8 = 4;

/// Most ports that are asked for at a time, so that what is told of them fits a datagram that
/// passes everywhere.
pub const MAX_ASKS: usize = 48;

/// What rides on a keepalive that asks; the first [`MAX_ASKS`].
pub(super) fn encode(asks: &[Asked]) -> Vec<u8> {
    let asks = &asks[..asks.len().min(MAX_ASKS)];
    let mut out = vec![ASKS, asks.len() as u8];
    asks.iter().for_each(|asked| put(asked, &mut out));
    out
}

/// What rides on one that tells.
pub(super) fn encode_told(told: &[(Asked, Found)]) -> Vec<u8> {
    let told = &told[..told.len().min(MAX_ASKS)];
    let mut out = vec![TOLD, told.len() as u8];
    for (asked, found) in told {
        put(asked, &mut out);
        out.push(match found {
            Found::Unknown => 0,
            Found::Yes => 1,
            Found::No => 2,
            Found::Perhaps => 3,
        });
    }
    out
}

/// Reads what asks; `None` if it is no such thing.
pub(super) fn decode(bytes: &[u8]) -> Option<Vec<Asked>> {
    read(ASKS, bytes, read_one)
}

/// Reads what tells; `None` if it is no such thing.
pub(super) fn decode_told(bytes: &[u8]) -> Option<Vec<(Asked, Found)>> {
    read(TOLD, bytes, |rest| {
        let asked = read_one(rest)?;
        let found = match take(rest)? {
            [0] => Found::Unknown,
            [1] => Found::Yes,
            [2] => Found::No,
            [3] => Found::Perhaps,
            _ => return None,
        };
        Some((asked, found))
    })
}

fn put(asked: &Asked, out: &mut Vec<u8>) {
    put_address(asked.addr, out);
    out.push(asked.protocol);
    out.extend_from_slice(&asked.port.to_be_bytes());
}

fn read<T>(kind: u8, bytes: &[u8], each: impl Fn(&mut &[u8]) -> Option<T>) -> Option<Vec<T>> {
    let mut rest = bytes;
    let rest = &mut rest;
    let [of, count] = take(rest)?;
    if of != kind || usize::from(count) > MAX_ASKS {
        return None;
    }
    (0..count).map(|_| each(rest)).collect()
}

fn read_one(rest: &mut &[u8]) -> Option<Asked> {
    let addr = take_address(rest)?;
    let [protocol] = take(rest)?;
    let port = u16::from_be_bytes(take(rest)?);
    Some(Asked {
        addr,
        protocol,
        port,
    })
}

#[cfg(test)]
mod tests {
    use super::super::{news, progress_news};
    use super::*;
    use proptest::prelude::*;

    fn asked(port: u16) -> Asked {
        Asked {
            addr: "192.0.2.5".parse().unwrap(),
            protocol: 6,
            port,
        }
    }

    #[test]
    fn golden_bytes() {
        let bytes = [3, 1, 4, 192, 0, 2, 5, 6, 0, 80];
        assert_eq!(encode(&[asked(80)]), bytes);
        assert_eq!(decode(&bytes), Some(vec![asked(80)]));
        let bytes = [4, 1, 4, 192, 0, 2, 5, 6, 0, 80, 3];
        let told = vec![(asked(80), Found::Perhaps)];
        assert_eq!(encode_told(&told), bytes);
        assert_eq!(decode_told(&bytes), Some(told));
    }

    #[test]
    fn each_is_padding_to_whoever_reads_the_others() {
        let (asks, told) = (encode(&[asked(80)]), encode_told(&[(asked(80), Found::No)]));
        assert_eq!((decode(&told), decode_told(&asks)), (None, None));
        for bytes in [&asks, &told] {
            assert_eq!(news::decode(bytes), None);
            assert_eq!(progress_news::decode(bytes), None);
        }
        for other in [&[][..], &[0; 99], &[3], &[3, 49], &[3, 1, 4, 1], &[2, 0]] {
            assert_eq!(
                (decode(other), decode_told(other)),
                (None, None),
                "{other:?}"
            );
        }
    }

    #[test]
    fn the_most_fits_a_datagram() {
        let addr = "2001:db8::5".parse().unwrap();
        let one = |port| Asked {
            addr,
            ..asked(port)
        };
        let many: Vec<_> = (0..100).map(|port| (one(port), Found::Yes)).collect();
        let bytes = encode_told(&many);
        assert!(bytes.len() <= 1_100, "{}", bytes.len());
        assert_eq!(decode_told(&bytes).unwrap(), many[..MAX_ASKS]);
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_strange(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = (decode(&bytes), decode_told(&bytes));
        }
    }
}
