//! What the new server accepts of a peer: addresses or prefixes, whole or only some of their ports
//! (`--accept ADDR[/LEN][:PORTS][/tcp|/udp]`).
//!
//! Owns the syntax that people type, and the question whether several of them together accept a
//! move. Whether a move that is accepted is served as well is the daemon's business.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use crate::model::moved::{
    Move, MoveError, Transport, check_addr, check_ports, merged, parse_ports, split, write_ports,
};
use crate::model::prefix::{Prefix, PrefixError};

/// Most `--accept` of one peer. Each move that a peer names is held against all of them.
pub const MAX_ACCEPTS: usize = 256;

/// One `--accept`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Accept {
    /// The addresses.
    pub prefix: Prefix,
    /// Port ranges, sorted and apart from each other; empty means every port.
    ports: Vec<RangeInclusive<u16>>,
    /// TCP or UDP alone; `None` means both if ports are named, and every IP protocol otherwise.
    transport: Option<Transport>,
}

impl Accept {
    /// Whether all of these together accept all of `moved`: no packet belongs to the move that
    /// belongs to none of them.
    pub fn all_accept(all: &[Self], moved: &Move) -> bool {
        let meets = |it: &&Self| it.prefix.overlaps(&moved.prefix);
        Self::accept_of(
            &all.iter().filter(meets).collect::<Vec<_>>(),
            moved.prefix,
            moved,
        )
    }

    /// Whether these accept what `moved` has of a prefix within it. All of them meet that.
    fn accept_of(all: &[&Self], prefix: Prefix, moved: &Move) -> bool {
        let (around, within): (Vec<&Self>, Vec<&Self>) =
            all.iter().partition(|it| it.prefix.covers(&prefix));
        if Self::accept_ports(&around, moved) {
            return true;
        }
        // What lies in one half only may complete the rest there.
        let Some(halves) = prefix.halves().filter(|_| !within.is_empty()) else {
            return false;
        };
        halves.into_iter().all(|half| {
            let meets = |it: &&&Self| it.prefix.overlaps(&half);
            let of_half: Vec<&Self> = all.iter().filter(meets).copied().collect();
            Self::accept_of(&of_half, half, moved)
        })
    }

    /// Whether these accept the move at any address that lies in all of them.
    fn accept_ports(all: &[&Self], moved: &Move) -> bool {
        if all.iter().any(|it| it.is_whole()) {
            return true;
        }
        // Beside TCP and UDP a whole move has every other protocol, and only a whole one has those.
        if moved.is_whole() {
            return false;
        }
        [Transport::Tcp, Transport::Udp]
            .into_iter()
            .filter(|&transport| moved.transport.is_none_or(|only| only == transport))
            .all(|transport| {
                let fits = |it: &&&Self| it.transport.is_none_or(|only| only == transport);
                let fitting = all.iter().filter(fits);
                let ranges = fitting.flat_map(|it| every_if_empty(&it.ports));
                let ranges = merged(ranges.collect());
                // Merged ranges are apart from each other, so a range lies in one or not at all.
                let accepted = |wanted: &RangeInclusive<u16>| {
                    let mut ranges = ranges.iter();
                    ranges.any(|it| it.contains(wanted.start()) && it.contains(wanted.end()))
                };
                every_if_empty(&moved.ports).iter().all(accepted)
            })
    }

    /// Whether it accepts every port of every protocol, ICMP included.
    fn is_whole(&self) -> bool {
        self.ports.is_empty() && self.transport.is_none()
    }
}

/// The ranges, or the one of every port there is. (Nobody can name port 0, but a packet can.)
fn every_if_empty(ports: &[RangeInclusive<u16>]) -> Vec<RangeInclusive<u16>> {
    if ports.is_empty() {
        vec![0..=u16::MAX]
    } else {
        ports.to_vec()
    }
}

/// Why the text of an `--accept` was refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AcceptError {
    /// The address part is neither an address nor a prefix.
    #[error(transparent)]
    Prefix(PrefixError),
    /// The address, the ports or the protocol would be refused in a move as well.
    #[error(transparent)]
    Move(MoveError),
}

impl FromStr for Accept {
    type Err = AcceptError;

    fn from_str(text: &str) -> Result<Self, AcceptError> {
        let (prefix, ports, transport) = split(text).map_err(AcceptError::Move)?;
        let prefix: Prefix = prefix.parse().map_err(AcceptError::Prefix)?;
        let ports = ports.map(parse_ports).transpose();
        let ports = ports.map_err(AcceptError::Move)?.unwrap_or_default();
        check_ports(&ports).map_err(AcceptError::Move)?;
        if prefix.is_single() {
            check_addr(prefix.first()).map_err(AcceptError::Move)?;
        }
        Ok(Self {
            prefix,
            ports: merged(ports),
            transport,
        })
    }
}

impl fmt::Display for Accept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.prefix.is_ipv4() || self.ports.is_empty() {
            write!(f, "{}", self.prefix)?;
        } else {
            write!(f, "[{}]", self.prefix)?;
        }
        write_ports(f, &self.ports, self.transport)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::moved::{TCP, UDP};
    use crate::testing::all;
    use proptest::prelude::*;

    fn accepts(text: &str) -> Vec<Accept> {
        all(text)
    }

    #[test]
    fn what_is_read_is_shown_again() {
        for text in [
            "192.0.2.5",
            "192.0.2.5:443/tcp",
            "192.0.2.5/udp",
            "192.0.2.0/28",
            "192.0.2.0/28:80,443-444/tcp",
            "192.0.2.0/28/tcp",
            "0.0.0.0/0",
            "2001:db8::5",
            "2001:db8::/64",
            "2001:db8::/64/udp",
            "[2001:db8::5]:53/udp",
            "[2001:db8::/64]:443/tcp",
        ] {
            let read: Accept = text
                .parse()
                .unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(read.to_string(), text);
        }
        let same = |a: &str, b: &str| assert_eq!(a.parse::<Accept>(), b.parse::<Accept>());
        same("192.0.2.5/32:80", "192.0.2.5:80");
        same("[192.0.2.0/28]:80", "192.0.2.0/28:80");
        same("[2001:db8::/64]", "2001:db8::/64");
        same("[2001:db8::]/64:53", "[2001:db8::/64]:53");
        same("192.0.2.5:443,80,81", "192.0.2.5:80-81,443");
    }

    #[test]
    fn each_mistake_is_named_with_what_would_be_right() {
        for (text, says) in [
            ("", "write 192.0.2.0/28"),
            ("www", "`www` is not an IP address or prefix"),
            ("192.0.2.5/28", "the prefix is 192.0.2.0/28"),
            ("192.0.2.5/28:443/tcp", "the prefix is 192.0.2.0/28"),
            ("[2001:db8::1/64]:443", "the prefix is 2001:db8::/64"),
            ("192.0.2.0/40", "`/40` is not a prefix length"),
            ("192.0.2.5/sctp", "only /tcp and /udp"),
            ("192.0.2.0/28/sctp", "only /tcp and /udp"),
            ("192.0.2.5:0", "`0` is not a port"),
            ("192.0.2.5:", "is not a port"),
            ("192.0.2.5:90-80", "runs backwards"),
            ("127.0.0.1", "127.0.0.1 cannot be moved"),
            ("224.0.0.1:80", "224.0.0.1 cannot be moved"),
            ("fe80::1", "fe80::1 cannot be moved"),
        ] {
            let error = text.parse::<Accept>().unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn only_what_is_accepted_altogether_is_accepted() {
        for (accept, moved, accepted) in [
            ("192.0.2.5", "192.0.2.5", true),
            ("192.0.2.5", "192.0.2.5:80,443/tcp", true),
            ("192.0.2.5", "192.0.2.6", false),
            ("192.0.2.5:443/tcp", "192.0.2.5", false),
            ("192.0.2.5:443/tcp", "192.0.2.5:443/tcp", true),
            ("192.0.2.5:443/tcp", "192.0.2.5:443", false),
            ("192.0.2.5:443/tcp 192.0.2.5:443/udp", "192.0.2.5:443", true),
            ("192.0.2.5:443", "192.0.2.5:443/udp", true),
            (
                "192.0.2.5:80-89 192.0.2.5:90-99",
                "192.0.2.5:85-95/tcp",
                true,
            ),
            (
                "192.0.2.5:80-89 192.0.2.5:91-99",
                "192.0.2.5:85-95/tcp",
                false,
            ),
            (
                "192.0.2.5:80-89/tcp 192.0.2.0/24:90-99",
                "192.0.2.5:85-95/tcp",
                true,
            ),
            (
                "192.0.2.5:80-89/tcp 192.0.2.0/24:90-99",
                "192.0.2.5:85-95",
                false,
            ),
            ("192.0.2.5/tcp 192.0.2.5/udp", "192.0.2.5:1-65535", true),
            // Together they are not every protocol.
            ("192.0.2.5/tcp 192.0.2.5/udp", "192.0.2.5", false),
            ("192.0.2.5/tcp", "192.0.2.5/tcp", true),
            ("192.0.2.5:1-65535/tcp", "192.0.2.5/tcp", false),
            ("192.0.2.0/28", "192.0.2.15", true),
            ("192.0.2.0/28", "192.0.2.16", false),
            ("192.0.2.0/28:443/tcp", "192.0.2.7:443/tcp", true),
            ("192.0.2.0/28:443/tcp", "192.0.2.7:444/tcp", false),
            ("[2001:db8::/64]:443/tcp", "[2001:db8::7]:443/tcp", true),
            ("[2001:db8::/64]:443/tcp", "[2001:db8:1::7]:443/tcp", false),
            ("0.0.0.0/0", "2001:db8::7", false),
            ("", "192.0.2.5:80", false),
        ] {
            let got = Accept::all_accept(&accepts(accept), &moved.parse().unwrap());
            assert_eq!(got, accepted, "{accept:?} of {moved}");
        }
    }

    /// Few ports and addresses, so that they meet.
    fn any_scope() -> impl Strategy<Value = String> {
        let addr = prop_oneof![Just("192.0.2.5"), Just("192.0.2.4/31"), Just("192.0.2.6")];
        let ports = prop_oneof![
            Just(String::new()),
            (1u16..6, 0u16..4).prop_map(|(first, more)| format!(":{first}-{}", first + more)),
            (1u16..6, 1u16..6).prop_map(|(one, other)| format!(":{one},{other}")),
        ];
        let transport = prop_oneof![Just(""), Just("/tcp"), Just("/udp")];
        (addr, ports, transport)
            .prop_map(|(addr, ports, transport)| format!("{addr}{ports}{transport}"))
    }

    proptest! {
        #[test]
        fn a_move_is_accepted_if_each_of_its_packets_is(
            accept in proptest::collection::vec(any_scope(), 0..6), moved in any_scope(),
        ) {
            let moved: Move = moved.replace("192.0.2.4/31", "192.0.2.4").parse().unwrap();
            let accept = accepts(&accept.join(" "));
            let packets = [TCP, UDP].into_iter().flat_map(|protocol| {
                let ports = (0..12).chain([u16::MAX]);
                ports.map(move |port| (protocol, Some(port)))
            });
            let mut packets = packets.chain([(1, None)]).filter(|&(protocol, port)| {
                moved.takes(protocol, port)
            });
            let takes = |it: &Accept, protocol, port| {
                let of = Move {
                    prefix: moved.prefix,
                    ports: it.ports.clone(),
                    transport: it.transport,
                };
                it.prefix.contains(moved.prefix.first()) && of.takes(protocol, port)
            };
            let each = packets
                .all(|(protocol, port)| accept.iter().any(|it| takes(it, protocol, port)));
            prop_assert_eq!(Accept::all_accept(&accept, &moved), each);
        }

        /// So what `status` tells an administrator to add is what it takes.
        #[test]
        fn a_move_is_accepted_by_its_own_text(moved in any_scope()) {
            let moved: Move = moved.replace("192.0.2.4/31", "2001:db8::4").parse().unwrap_or_else(
                |_| "[2001:db8::5]:1-3/udp".parse().unwrap(),
            );
            let line = moved.to_string();
            let accept: Accept = line.parse().unwrap();
            prop_assert_eq!(accept.to_string(), line);
            prop_assert!(Accept::all_accept(&[accept], &moved));
        }
    }
}
