//! What each side tells the other of what is not answered: it rides on keepalives.
//!
//! Owns its bytes, and when they are sent again. Bytes behind a keepalive's type are padding to a
//! daemon that does not know of them, so nothing has to be agreed. Each message says everything, so
//! that one which is lost costs nothing but time.

use std::time::Duration;

use crate::model::asked::{Asked, News, Trouble, Verdict, View};
use crate::model::bytes::{put_address, take, take_address};

/// The first byte of what rides on a keepalive. Padding is zero.
const VERSION: u8 = 1;

/// Most troubles that are told. Whoever sees these looks at the other server.
pub const MAX_TROUBLES: usize = 4;

/// Most bytes of the text of one, so that all fit a datagram that passes everywhere.
const MAX_WHY: usize = 190;

/// Most bytes of the name of a cause.
const MAX_CAUSE: usize = 24;

/// The unit of ages.
const TICK: Duration = Duration::from_millis(100);

/// What a view says, as bits.
const CAME: u8 = 1;
const ANSWERED: u8 = 2;

/// How often news are sent beyond the first time if nothing is wrong any more.
const REPEATS: u8 = 3;

/// What we tell the peer.
#[derive(Debug)]
pub(super) struct Outgoing {
    bytes: Vec<u8>,
    /// Repeats that are still to come.
    left: u8,
}

impl Outgoing {
    /// Nothing is wrong. The peer is to know that we would say so.
    pub(super) fn new() -> Self {
        Self {
            bytes: encode(&News::default()),
            left: REPEATS,
        }
    }

    /// Replaces what we tell; whether that is new.
    pub(super) fn replace(&mut self, news: &News) -> bool {
        let bytes = encode(news);
        if bytes == self.bytes {
            return false;
        }
        self.bytes = bytes;
        self.left = REPEATS;
        true
    }

    /// The peer has started anew, and knows nothing of what it was told.
    pub(super) fn tell_anew(&mut self) {
        self.left = REPEATS;
    }

    /// What rides on a keepalive.
    pub(super) fn bytes(&self) -> Vec<u8> {
        self.bytes.clone()
    }

    /// Whether it is to be sent again. Ask as often as it may be.
    pub(super) fn again(&mut self) -> bool {
        let nothing_wrong = self.bytes == encode(&News::default());
        let again = !nothing_wrong || self.left > 0;
        self.left = self.left.saturating_sub(1);
        again
    }
}

fn encode(news: &News) -> Vec<u8> {
    let told = &news.troubles[..news.troubles.len().min(MAX_TROUBLES)];
    let mut out = vec![VERSION, told.len() as u8];
    for trouble in told {
        put_asked(&trouble.asked, &mut out);
        out.push(match trouble.verdict {
            Verdict::Well => 0,
            Verdict::Unanswered => 1,
            Verdict::Refused => 2,
            Verdict::Silent => 3,
        });
        put_text(&trouble.why, MAX_WHY, &mut out);
    }
    // A daemon that does not know of what follows reads no further.
    let is_plain = |it: &Trouble| it.cause.is_empty() && it.age < TICK;
    if news.views.is_empty() && told.iter().all(is_plain) {
        return out;
    }
    for trouble in told {
        put_text(&trouble.cause, MAX_CAUSE, &mut out);
        let ticks = trouble.age.as_millis() / TICK.as_millis();
        let ticks = u16::try_from(ticks).unwrap_or(u16::MAX);
        out.extend_from_slice(&ticks.to_be_bytes());
    }
    let seen = &news.views[..news.views.len().min(MAX_TROUBLES)];
    out.push(seen.len() as u8);
    for view in seen {
        put_asked(&view.asked, &mut out);
        let came = if view.came { CAME } else { 0 };
        let answered = if view.answered { ANSWERED } else { 0 };
        out.push(came | answered);
    }
    out
}

fn put_asked(asked: &Asked, out: &mut Vec<u8>) {
    put_address(asked.addr, out);
    out.push(asked.protocol);
    out.extend_from_slice(&asked.port.to_be_bytes());
}

fn put_text(text: &str, most: usize, out: &mut Vec<u8>) {
    let text = &text[..super::messages::boundary(text, most)];
    out.push(text.len() as u8);
    out.extend_from_slice(text.as_bytes());
}

/// Reads what rode on a keepalive; `None` if it is padding, or nothing that this version knows.
pub(super) fn decode(bytes: &[u8]) -> Option<News> {
    let mut rest = bytes;
    let rest = &mut rest;
    let [version, count] = take(rest)?;
    if version != VERSION || usize::from(count) > MAX_TROUBLES {
        return None;
    }
    let troubles: Option<Vec<Trouble>> = (0..count).map(|_| decode_one(rest)).collect();
    let mut troubles = troubles?;
    // An older daemon says no more.
    let views = decode_rest(rest, &mut troubles).unwrap_or_default();
    Some(News { troubles, views })
}

fn decode_one(rest: &mut &[u8]) -> Option<Trouble> {
    let asked = take_asked(rest)?;
    let [verdict] = take(rest)?;
    let verdict = match verdict {
        1 => Verdict::Unanswered,
        2 => Verdict::Refused,
        3 => Verdict::Silent,
        _ => return None,
    };
    let why = take_text(rest)?;
    Some(Trouble {
        asked,
        verdict,
        cause: String::new(),
        why: why.replace(char::is_control, " "),
        age: Duration::ZERO,
    })
}

/// The names of the causes, the ages, and what the peer sees of our troubles.
fn decode_rest(rest: &mut &[u8], troubles: &mut [Trouble]) -> Option<Vec<View>> {
    let mut one = || Some((take_text(rest)?, u16::from_be_bytes(take(rest)?)));
    let all: Option<Vec<(&str, u16)>> = troubles.iter().map(|_| one()).collect();
    for (trouble, (name, ticks)) in troubles.iter_mut().zip(all?) {
        trouble.age = TICK * u32::from(ticks);
        // It is a name of the status, where others may be compared with it.
        if name
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte == b'_')
        {
            trouble.cause = name.into();
        }
    }
    let [count] = take(rest)?;
    let mut view = || {
        let asked = take_asked(rest)?;
        let [bits] = take(rest)?;
        Some(View {
            asked,
            came: bits & CAME != 0,
            answered: bits & ANSWERED != 0,
        })
    };
    (0..usize::from(count).min(MAX_TROUBLES))
        .map(|_| view())
        .collect()
}

fn take_asked(rest: &mut &[u8]) -> Option<Asked> {
    let addr = take_address(rest)?;
    let [protocol, high, low] = take(rest)?;
    Some(Asked {
        addr,
        protocol,
        port: u16::from_be_bytes([high, low]),
    })
}

/// A text behind its length. It will stand in a log and on a terminal.
fn take_text<'a>(rest: &mut &'a [u8]) -> Option<&'a str> {
    let [length] = take(rest)?;
    let (text, tail) = rest.split_at_checked(length.into())?;
    *rest = tail;
    std::str::from_utf8(text).ok()
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
            cause: String::new(),
            why: why.into(),
            age: Duration::ZERO,
        }
    }

    fn news(troubles: Vec<Trouble>) -> News {
        let views = Vec::new();
        News { troubles, views }
    }

    #[test]
    fn golden_bytes() {
        let mut all = news(vec![trouble("192.0.2.5", "why")]);
        let first = [1, 1, 4, 192, 0, 2, 5, 6, 0, 80, 3, 3, b'w', b'h', b'y'];
        assert_eq!(encode(&all), first);
        let asked = all.troubles[0].asked;
        all.troubles[0].cause = "x_y".into();
        all.troubles[0].age = TICK * 260;
        all.views = vec![View {
            asked,
            came: true,
            answered: false,
        }];
        let more = [3, b'x', b'_', b'y', 1, 4, 1, 4, 192, 0, 2, 5, 6, 0, 80, 1];
        let bytes = encode(&all);
        assert_eq!(bytes, [&first[..], &more[..]].concat());
        assert_eq!(decode(&bytes), Some(all));
        let of_older = decode(&first).unwrap();
        assert_eq!(of_older, news(vec![trouble("192.0.2.5", "why")]));
        assert_eq!(encode(&News::default()), [1, 0]);
        assert_eq!(decode(&[]), None, "a daemon that does not know of it");
        assert_eq!(decode(&[0; 99]), None, "padding");
    }

    #[test]
    fn all_of_it_fits_a_message_and_the_text_is_cut() {
        let long = trouble("2001:db8::5", &"ü".repeat(200));
        let cause = "c".repeat(99);
        let many = vec![Trouble { cause, ..long }; 9];
        let view = View {
            asked: many[0].asked,
            came: true,
            answered: true,
        };
        let bytes = encode(&News {
            troubles: many,
            views: vec![view; 9],
        });
        assert!(
            bytes.len() <= super::super::messages::PART_LEN,
            "{}",
            bytes.len()
        );
        let read = decode(&bytes).unwrap();
        assert_eq!(
            [read.troubles.len(), read.views.len()],
            [MAX_TROUBLES, MAX_TROUBLES]
        );
        assert_eq!(read.troubles[0].why.len(), MAX_WHY);
        assert_eq!(read.troubles[0].cause.len(), MAX_CAUSE);
    }

    #[test]
    fn it_is_repeated_while_something_is_wrong_and_a_few_times_after() {
        let mut outgoing = Outgoing::new();
        let count = |outgoing: &mut Outgoing| (0..20).filter(|_| outgoing.again()).count();
        assert_eq!(count(&mut outgoing), 3);
        let wrong = news(vec![trouble("192.0.2.5", "")]);
        assert!(outgoing.replace(&wrong));
        assert!(!outgoing.replace(&wrong));
        assert_eq!(count(&mut outgoing), 20);
        assert!(outgoing.replace(&News::default()));
        assert_eq!(count(&mut outgoing), 3);
        outgoing.tell_anew();
        assert_eq!(count(&mut outgoing), 3);
    }

    proptest! {
        #[test]
        fn it_comes_back_as_it_went(
            some in proptest::collection::vec((any::<[u8; 4]>(), any::<u8>(), any::<u16>(),
                "[a-z ]{0,99}", "[a-z_]{0,24}", any::<u16>()), 0..=MAX_TROUBLES),
            seen in proptest::collection::vec((any::<u16>(), any::<bool>(), any::<bool>()),
                0..=MAX_TROUBLES),
        ) {
            type One = ([u8; 4], u8, u16, String, String, u16);
            let trouble = |(addr, protocol, port, why, cause, age): One| Trouble {
                asked: Asked { addr: addr.into(), protocol, port },
                verdict: Verdict::Refused,
                cause,
                why,
                age: TICK * u32::from(age),
            };
            let view = |(port, came, answered)| {
                let addr = [192, 0, 2, 5].into();
                View { asked: Asked { addr, protocol: 6, port }, came, answered }
            };
            let troubles: Vec<Trouble> = some.into_iter().map(trouble).collect();
            let news = News { troubles, views: seen.into_iter().map(view).collect() };
            let mut bytes = encode(&news);
            bytes.extend([0; 40]);
            prop_assert_eq!(decode(&bytes), Some(news));
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut bytes = bytes;
            bytes.insert(0, VERSION);
            for trouble in decode(&bytes).unwrap_or_default().troubles {
                prop_assert!(!trouble.why.contains(char::is_control));
            }
        }
    }
}
