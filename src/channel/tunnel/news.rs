//! What each side tells the other of what is not answered: it rides on keepalives.
//!
//! Owns its bytes, and when they are sent again. Bytes behind a keepalive's type are padding to a
//! daemon that does not know of them, so nothing has to be agreed. Each message says everything, so
//! that one which is lost costs nothing but time.

use crate::model::asked::{Asked, Trouble, Verdict};
use crate::model::bytes::{put_address, take, take_address};

/// The first byte of what rides on a keepalive. Padding is zero.
const VERSION: u8 = 1;

/// Most troubles that are told. Whoever sees these looks at the other server.
pub const MAX_TROUBLES: usize = 4;

/// Most bytes of the text of one, so that all fit a datagram that passes everywhere.
const MAX_WHY: usize = 220;

/// How often news are sent beyond the first time if nothing is wrong any more.
const REPEATS: u8 = 3;

/// What we tell the peer.
#[derive(Debug)]
pub(super) struct Outgoing {
    bytes: Vec<u8>,
    /// Repeats that are still to come.
    left: u8,
    /// The run of the peer that they go to.
    peer_run: Option<u64>,
}

impl Outgoing {
    /// Nothing is wrong. The peer is to know that we would say so.
    pub(super) fn new() -> Self {
        Self {
            bytes: encode(&[]),
            left: REPEATS,
            peer_run: None,
        }
    }

    /// Tells this run of the peer from now on. A new one has heard nothing.
    pub(super) fn tell(&mut self, peer_run: u64) {
        if self.peer_run.replace(peer_run) != Some(peer_run) {
            self.left = REPEATS;
        }
    }

    /// Replaces what we tell; whether that is new.
    pub(super) fn replace(&mut self, troubles: &[Trouble]) -> bool {
        let bytes = encode(troubles);
        if bytes == self.bytes {
            return false;
        }
        self.bytes = bytes;
        self.left = REPEATS;
        true
    }

    /// What rides on a keepalive.
    pub(super) fn bytes(&self) -> Vec<u8> {
        self.bytes.clone()
    }

    /// Whether it is to be sent again. Ask as often as it may be.
    pub(super) fn again(&mut self) -> bool {
        let nothing_wrong = self.bytes == encode(&[]);
        let again = !nothing_wrong || self.left > 0;
        self.left = self.left.saturating_sub(1);
        again
    }
}

fn encode(troubles: &[Trouble]) -> Vec<u8> {
    let told = &troubles[..troubles.len().min(MAX_TROUBLES)];
    let mut out = vec![VERSION, told.len() as u8];
    for Trouble {
        asked,
        verdict,
        why,
    } in told
    {
        put_address(asked.addr, &mut out);
        out.push(asked.protocol);
        out.extend_from_slice(&asked.port.to_be_bytes());
        out.push(match verdict {
            Verdict::Well => 0,
            Verdict::Unanswered => 1,
            Verdict::Refused => 2,
            Verdict::Silent => 3,
        });
        let why = &why[..super::messages::boundary(why, MAX_WHY)];
        out.push(why.len() as u8);
        out.extend_from_slice(why.as_bytes());
    }
    out
}

/// Reads what rode on a keepalive; `None` if it is padding, or nothing that this version knows.
pub(super) fn decode(bytes: &[u8]) -> Option<Vec<Trouble>> {
    let mut rest = bytes;
    let rest = &mut rest;
    let [version, count] = take(rest)?;
    if version != VERSION || usize::from(count) > MAX_TROUBLES {
        return None;
    }
    (0..count).map(|_| decode_one(rest)).collect()
}

fn decode_one(rest: &mut &[u8]) -> Option<Trouble> {
    let addr = take_address(rest)?;
    let [protocol, high, low, verdict, length] = take(rest)?;
    let verdict = match verdict {
        1 => Verdict::Unanswered,
        2 => Verdict::Refused,
        3 => Verdict::Silent,
        _ => return None,
    };
    let (why, tail) = rest.split_at_checked(length.into())?;
    *rest = tail;
    // It will stand in a log and on a terminal.
    let why = std::str::from_utf8(why).ok()?;
    Some(Trouble {
        asked: Asked {
            addr,
            protocol,
            port: u16::from_be_bytes([high, low]),
        },
        verdict,
        why: why.replace(char::is_control, " "),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn trouble(addr: &str, why: &str) -> Trouble {
        Trouble {
            asked: Asked {
                addr: addr.parse().unwrap(),
                protocol: 6,
                port: 80,
            },
            verdict: Verdict::Silent,
            why: why.into(),
        }
    }

    #[test]
    fn golden_bytes() {
        let bytes = encode(&[trouble("192.0.2.5", "why")]);
        let expected = [1, 1, 4, 192, 0, 2, 5, 6, 0, 80, 3, 3, b'w', b'h', b'y'];
        assert_eq!(bytes, expected);
        assert_eq!(encode(&[]), [1, 0]);
        assert_eq!(decode(&[]), None, "a daemon that does not know of it");
        assert_eq!(decode(&[0; 99]), None, "padding");
    }

    #[test]
    fn all_of_it_fits_a_message_and_the_text_is_cut() {
        let long = trouble("2001:db8::5", &"ü".repeat(200));
        let many = vec![long; 9];
        let bytes = encode(&many);
        assert!(
            bytes.len() <= super::super::messages::PART_LEN,
            "{}",
            bytes.len()
        );
        let read = decode(&bytes).unwrap();
        assert_eq!(read.len(), MAX_TROUBLES);
        assert_eq!(read[0].why.len(), MAX_WHY);
    }

    #[test]
    fn it_is_repeated_while_something_is_wrong_and_a_few_times_after() {
        let mut outgoing = Outgoing::new();
        let count = |outgoing: &mut Outgoing| (0..20).filter(|_| outgoing.again()).count();
        assert_eq!(count(&mut outgoing), 3);
        assert!(outgoing.replace(&[trouble("192.0.2.5", "")]));
        assert!(!outgoing.replace(&[trouble("192.0.2.5", "")]));
        assert_eq!(count(&mut outgoing), 20);
        assert!(outgoing.replace(&[]));
        assert_eq!(count(&mut outgoing), 3);
    }

    proptest! {
        #[test]
        fn it_comes_back_as_it_went(
            some in proptest::collection::vec((any::<[u8; 4]>(), any::<u8>(), any::<u16>(),
                "[a-z ]{0,99}"), 0..=MAX_TROUBLES),
        ) {
            let trouble = |(addr, protocol, port, why): ([u8; 4], u8, u16, String)| Trouble {
                asked: Asked { addr: addr.into(), protocol, port },
                verdict: Verdict::Refused,
                why,
            };
            let troubles: Vec<Trouble> = some.into_iter().map(trouble).collect();
            let mut bytes = encode(&troubles);
            bytes.extend([0; 40]);
            prop_assert_eq!(decode(&bytes), Some(troubles));
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut bytes = bytes;
            bytes.insert(0, VERSION);
            for trouble in decode(&bytes).unwrap_or_default() {
                prop_assert!(!trouble.why.contains(char::is_control));
            }
        }
    }
}
