//! What was moved: an address or a prefix, whole or a part of its ports
//! (`--move ADDR[/LEN][:PORTS][/tcp|/udp]`).
//!
//! Owns the syntax that people type, the question "does this packet belong to it", and the bytes
//! that tell the new server about it. Knows nothing of packets, sockets or the kernel.

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::str::FromStr;

use crate::model::bytes::{put_address, take, take_address};
use crate::model::prefix::{Prefix, PrefixError};

/// Most port ranges one `--move` may name. Each is told to the new server by number.
pub const MAX_PORT_RANGES: usize = 64;

/// Most `--move` one old server may have. Told to the new server, that many take 280 KB, a few
/// seconds of its control messages; both servers keep a few hundred bytes for each. A network of
/// 16,384 addresses (a /18) of which each moves for itself is more than one server has.
pub const MAX_MOVES: usize = 16_384;

/// Most different sets of ports, of TCP and of UDP, that addresses of one old server may have: the
/// kernel keeps 8 KiB for each.
pub const MAX_PORT_SETS: usize = 4_096;

/// Most `--move` of `ipmoved nat`, whose programs compare addresses one by one.
pub const MAX_NAT_MOVES: usize = 64;

/// IP protocol number of TCP.
pub const TCP: u8 = 6;
/// IP protocol number of UDP.
pub const UDP: u8 = 17;

/// A transport named in `--move`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Transport {
    /// TCP alone.
    Tcp,
    /// UDP alone.
    Udp,
}

/// Moved addresses, whole or in part.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Move {
    /// The moved addresses.
    pub prefix: Prefix,
    /// Port ranges, sorted and apart from each other; empty means every port.
    pub ports: Vec<RangeInclusive<u16>>,
    /// TCP or UDP alone; `None` means both if ports are named, and every IP protocol otherwise.
    pub transport: Option<Transport>,
}

impl Move {
    /// All of these addresses.
    pub fn whole(prefix: Prefix) -> Self {
        Self {
            prefix,
            ports: Vec::new(),
            transport: None,
        }
    }

    /// Whether all of each address moved: every port of every protocol, ICMP included.
    pub fn is_whole(&self) -> bool {
        self.ports.is_empty() && self.transport.is_none()
    }

    /// Whether a packet of IP protocol `protocol` with port `port` at a moved address belongs to
    /// it.
    ///
    /// `port` is `None` where the protocol has none or it is not known (ICMP, a later fragment):
    /// then only a whole move takes the packet.
    pub fn takes(&self, protocol: u8, port: Option<u16>) -> bool {
        if self.is_whole() {
            return true;
        }
        let transport = match protocol {
            TCP => Transport::Tcp,
            UDP => Transport::Udp,
            _ => return false,
        };
        if self.transport.is_some_and(|only| only != transport) {
            return false;
        }
        let Some(port) = port else { return false };
        self.ports.is_empty() || self.ports.iter().any(|range| range.contains(&port))
    }

    /// Whether some packet would belong to both.
    pub fn overlaps(&self, other: &Self) -> bool {
        let transports = match (self.transport, other.transport) {
            (Some(a), Some(b)) => a == b,
            _ => true,
        };
        let ports = self.ports.is_empty()
            || other.ports.is_empty()
            || have_one_in_common(&self.ports, &other.ports);
        self.prefix.overlaps(&other.prefix) && transports && ports
    }

    /// Appends the wire form of a single address: address family (4 or 6), address, transport (0, 6
    /// or 17), number of ranges (one byte), then first and last port of each, big-endian. Prefixes
    /// have another one ([`moved_list`](super::moved_list)).
    pub fn encode(&self, out: &mut Vec<u8>) {
        put_address(self.prefix.first(), out);
        self.encode_ports(out);
    }

    /// Appends transport and port ranges, as they stand in either form.
    pub(super) fn encode_ports(&self, out: &mut Vec<u8>) {
        out.push(match self.transport {
            None => 0,
            Some(Transport::Tcp) => TCP,
            Some(Transport::Udp) => UDP,
        });
        debug_assert!(self.ports.len() <= MAX_PORT_RANGES, "refused when parsed");
        out.push(self.ports.len() as u8);
        for range in &self.ports {
            out.extend_from_slice(&range.start().to_be_bytes());
            out.extend_from_slice(&range.end().to_be_bytes());
        }
    }

    /// Takes one move off the front of `bytes`; `None` if it is not well-formed.
    pub fn decode(bytes: &mut &[u8]) -> Option<Self> {
        let addr = take_address(bytes)?;
        let (transport, ports) = Self::decode_ports(bytes)?;
        let moved = Self {
            prefix: addr.into(),
            ports,
            transport,
        };
        moved.is_well_formed().then_some(moved)
    }

    /// Takes transport and port ranges off the front of `bytes`. The ranges are yet to be checked.
    pub(super) fn decode_ports(
        bytes: &mut &[u8],
    ) -> Option<(Option<Transport>, Vec<RangeInclusive<u16>>)> {
        let transport = match take::<1>(bytes)? {
            [0] => None,
            [TCP] => Some(Transport::Tcp),
            [UDP] => Some(Transport::Udp),
            _ => return None,
        };
        let [count] = take::<1>(bytes)?;
        let mut ports = Vec::new();
        for _ in 0..count {
            let first = u16::from_be_bytes(take::<2>(bytes)?);
            let last = u16::from_be_bytes(take::<2>(bytes)?);
            ports.push(first..=last);
        }
        Some((transport, ports))
    }

    /// Whether text could have said it, in the form that it has then.
    pub(super) fn is_well_formed(&self) -> bool {
        self.check().is_ok() && self.ports_are_sorted()
    }

    fn ports_are_sorted(&self) -> bool {
        self.ports
            .windows(2)
            .all(|pair| u32::from(*pair[0].end()) + 1 < u32::from(*pair[1].start()))
    }

    /// Refuses what no move may be, however it was made.
    fn check(&self) -> Result<(), MoveError> {
        check_prefix(self.prefix)?;
        check_ports(&self.ports)
    }
}

/// Whether some port is in ranges of both.
pub(super) fn have_one_in_common(a: &[RangeInclusive<u16>], b: &[RangeInclusive<u16>]) -> bool {
    let meet = |a: &RangeInclusive<u16>, b: &RangeInclusive<u16>| {
        a.start() <= b.end() && b.start() <= a.end()
    };
    a.iter().any(|a| b.iter().any(|b| meet(a, b)))
}

/// Refuses an address that no other host can have reached a server at.
pub(super) fn check_addr(addr: IpAddr) -> Result<(), MoveError> {
    let unusable = match addr {
        IpAddr::V4(addr) => {
            addr.is_unspecified()
                || addr.is_loopback()
                || addr.is_multicast()
                || addr.is_broadcast()
                || addr.octets()[0] == 0
        }
        IpAddr::V6(addr) => {
            addr.is_unspecified()
                || addr.is_loopback()
                || addr.is_multicast()
                || addr.is_unicast_link_local()
                || addr.to_ipv4_mapped().is_some()
        }
    };
    if unusable {
        return Err(MoveError::NotUnicast(addr));
    }
    Ok(())
}

/// Refuses a prefix with such addresses in it.
fn check_prefix(prefix: Prefix) -> Result<(), MoveError> {
    let block = |a: [u16; 8], len| Prefix::of(IpAddr::from(a), len);
    let unusable = [
        Prefix::of(IpAddr::from([0, 0, 0, 0]), 8),
        Prefix::of(IpAddr::from([127, 0, 0, 0]), 8),
        Prefix::of(IpAddr::from([224, 0, 0, 0]), 4),
        Prefix::from(IpAddr::from([255, 255, 255, 255])),
        block([0; 8], 127),
        block([0, 0, 0, 0, 0, 0xffff, 0, 0], 96),
        block([0xfe80, 0, 0, 0, 0, 0, 0, 0], 10),
        block([0xff00, 0, 0, 0, 0, 0, 0, 0], 8),
    ];
    let mut met = unusable.into_iter().filter(|it| it.overlaps(&prefix));
    match met.next() {
        None => Ok(()),
        Some(_) if prefix.is_single() => Err(MoveError::NotUnicast(prefix.first())),
        Some(block) => Err(MoveError::NotAllUnicast(prefix, block)),
    }
}

/// Refuses ranges that are too many, run backwards or name port 0.
pub(super) fn check_ports(ports: &[RangeInclusive<u16>]) -> Result<(), MoveError> {
    if ports.len() > MAX_PORT_RANGES {
        return Err(MoveError::TooManyRanges(ports.len()));
    }
    for range in ports {
        if *range.start() == 0 {
            return Err(MoveError::Port("0".into()));
        }
        if range.start() > range.end() {
            return Err(MoveError::Range(*range.start(), *range.end()));
        }
    }
    Ok(())
}

/// Why the text of a `--move` was refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MoveError {
    /// The address part is no IP address.
    #[error(
        "`{0}` is not an IP address or prefix; write 192.0.2.5, 192.0.2.0/28, \
         192.0.2.5:80,443/tcp or [2001:db8::5]:53/udp"
    )]
    Address(String),
    /// The address part is a name.
    #[error("`{0}` is a name; give the moved address itself, as in 192.0.2.5")]
    Name(String),
    /// The address cannot have been a server's: loopback, multicast, unspecified, link-local.
    #[error("{0} cannot be moved: it is not an address that clients on other hosts can reach")]
    NotUnicast(IpAddr),
    /// The prefix holds such addresses.
    #[error("{0} cannot be moved: it holds addresses of {1}, which clients cannot reach")]
    NotAllUnicast(Prefix, Prefix),
    /// Not a port number.
    #[error("`{0}` is not a port; ports are numbers from 1 to 65535, as in 80,443 or 8000-8100")]
    Port(String),
    /// A range that runs backwards.
    #[error("port range {0}-{1} runs backwards; write {1}-{0}")]
    Range(u16, u16),
    /// More ranges than [`MAX_PORT_RANGES`].
    #[error(
        "{0} port ranges are more than {max}; move the whole address, or merge ranges",
        max = MAX_PORT_RANGES
    )]
    TooManyRanges(usize),
    /// The length of a prefix is none, or bits are set behind it.
    #[error(transparent)]
    Prefix(PrefixError),
    /// Something other than `/tcp` or `/udp`.
    #[error("`/{0}` is not known; only /tcp and /udp can be moved on their own")]
    Transport(String),
}

impl FromStr for Move {
    type Err = MoveError;

    fn from_str(text: &str) -> Result<Self, MoveError> {
        let (prefix, ports, transport) = split(text)?;
        let prefix = prefix.parse().map_err(|error| match error {
            PrefixError::Address(addr)
                if addr.contains(|c: char| c.is_ascii_alphabetic()) && !addr.contains(':') =>
            {
                MoveError::Name(addr)
            }
            PrefixError::Address(addr) => MoveError::Address(addr),
            error @ (PrefixError::Length { .. } | PrefixError::HostBits { .. }) => {
                MoveError::Prefix(error)
            }
        })?;
        let moved = Self {
            prefix,
            ports: ports.map(parse_ports).transpose()?.unwrap_or_default(),
            transport,
        };
        moved.check()?;
        Ok(Self {
            ports: merged(moved.ports),
            ..moved
        })
    }
}

/// What stands in a move: the address or prefix, the ports, the protocol.
type Pieces<'a> = (Cow<'a, str>, Option<&'a str>, Option<Transport>);

/// Splits `ADDR[/LEN][:PORTS][/tcp|/udp]`; an IPv6 address stands in brackets if ports follow, with
/// its length inside or behind them.
pub(super) fn split(text: &str) -> Result<Pieces<'_>, MoveError> {
    let (rest, transport) = match text.rsplit_once('/') {
        Some((rest, "tcp")) => (rest, Some(Transport::Tcp)),
        Some((rest, "udp")) => (rest, Some(Transport::Udp)),
        // A prefix length is a number, with a port or a bracket behind it at most.
        Some((_, other)) if other.starts_with(|c: char| c.is_ascii_alphabetic()) => {
            return Err(MoveError::Transport(other.into()));
        }
        _ => (text, None),
    };
    let (prefix, ports) = split_ports(rest);
    Ok((prefix, ports, transport))
}

fn split_ports(text: &str) -> (Cow<'_, str>, Option<&str>) {
    if let Some((addr, behind)) = text.strip_prefix('[').and_then(|it| it.split_once(']')) {
        let (len, ports) = match behind.split_once(':') {
            Some((len, ports)) => (len, Some(ports)),
            None => (behind, None),
        };
        return match len {
            "" => (addr.into(), ports),
            len if len.starts_with('/') => (format!("{addr}{len}").into(), ports),
            _ => (text.into(), None),
        };
    }
    match text.split_once(':') {
        // More than one colon: an IPv6 address without ports.
        Some((_, rest)) if rest.contains(':') => (text.into(), None),
        Some((addr, ports)) => (addr.into(), Some(ports)),
        None => (text.into(), None),
    }
}

/// Reads ranges as they stand behind the colon: `80,443,8000-8100`.
pub(super) fn parse_ports(text: &str) -> Result<Vec<RangeInclusive<u16>>, MoveError> {
    let port = |text: &str| {
        text.bytes()
            .all(|b| b.is_ascii_digit())
            .then(|| text.parse::<u16>().ok())
            .flatten()
            .ok_or_else(|| MoveError::Port(text.into()))
    };
    text.split(',')
        .map(|item| match item.split_once('-') {
            Some((first, last)) => Ok(port(first)?..=port(last)?),
            None => port(item).map(|port| port..=port),
        })
        .collect()
}

/// Sorts ranges and merges those that touch.
pub(crate) fn merged(mut ranges: Vec<RangeInclusive<u16>>) -> Vec<RangeInclusive<u16>> {
    ranges.sort_by_key(|range| *range.start());
    let mut out: Vec<RangeInclusive<u16>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match out.last_mut() {
            Some(last) if u32::from(*range.start()) <= u32::from(*last.end()) + 1 => {
                *last = *last.start()..=*last.end().max(range.end());
            }
            _ => out.push(range),
        }
    }
    out
}

impl fmt::Display for Move {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.prefix.is_ipv4() || self.ports.is_empty() {
            write!(f, "{}", self.prefix)?;
        } else {
            write!(f, "[{}]", self.prefix)?;
        }
        write_ports(f, &self.ports, self.transport)
    }
}

/// Shows what stands behind the address: `:80,443/tcp`.
pub(super) fn write_ports(
    f: &mut fmt::Formatter<'_>,
    ports: &[RangeInclusive<u16>],
    transport: Option<Transport>,
) -> fmt::Result {
    for (index, range) in ports.iter().enumerate() {
        f.write_str(if index == 0 { ":" } else { "," })?;
        if range.start() == range.end() {
            write!(f, "{}", range.start())?;
        } else {
            write!(f, "{}-{}", range.start(), range.end())?;
        }
    }
    match transport {
        None => Ok(()),
        Some(Transport::Tcp) => f.write_str("/tcp"),
        Some(Transport::Udp) => f.write_str("/udp"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Result<Move, MoveError> {
        text.parse()
    }

    #[test]
    fn reads_what_the_contract_shows() {
        let moved = parse("192.0.2.5:80,443/tcp").unwrap();
        assert_eq!(moved.ports, vec![80..=80, 443..=443]);
        assert_eq!(moved.transport, Some(Transport::Tcp));
        let moved = parse("[2001:db8::5]:53/udp").unwrap();
        assert_eq!(moved.prefix, "2001:db8::5".parse().unwrap());
        assert_eq!(moved.to_string(), "[2001:db8::5]:53/udp");
        let moved = parse("192.0.2.0/28:443,80/tcp").unwrap();
        assert_eq!(moved.prefix, "192.0.2.0/28".parse().unwrap());
        assert_eq!(moved.to_string(), "192.0.2.0/28:80,443/tcp");
        for text in ["[2001:db8:a:1::]/64:53/udp", "[2001:db8:a:1::/64]:53/udp"] {
            let moved = parse(text).unwrap();
            assert_eq!(moved.to_string(), "[2001:db8:a:1::/64]:53/udp");
        }
        assert!(parse("2001:db8:a:1::/64").unwrap().is_whole());
        assert_eq!(parse("192.0.2.5/32"), parse("192.0.2.5"));
        assert!(parse("192.0.2.5").unwrap().is_whole());
        assert!(parse("2001:db8::5").unwrap().is_whole());
        assert_eq!(
            parse("192.0.2.5:8001-8010,8000,8011").unwrap().ports,
            vec![8000..=8011]
        );
    }

    #[test]
    fn refuses_with_a_reason() {
        assert_eq!(parse("www"), Err(MoveError::Name("www".into())));
        assert_eq!(parse("192.0.2"), Err(MoveError::Address("192.0.2".into())));
        assert_eq!(parse(""), Err(MoveError::Address(String::new())));
        assert_eq!(parse("192.0.2.5:0"), Err(MoveError::Port("0".into())));
        assert_eq!(
            parse("192.0.2.5:99999"),
            Err(MoveError::Port("99999".into()))
        );
        assert_eq!(parse("192.0.2.5:"), Err(MoveError::Port(String::new())));
        assert_eq!(parse("192.0.2.5:+80"), Err(MoveError::Port("+80".into())));
        assert_eq!(parse("192.0.2.5:9-8"), Err(MoveError::Range(9, 8)));
        assert_eq!(
            parse("192.0.2.5/sctp"),
            Err(MoveError::Transport("sctp".into()))
        );
        for (text, says) in [
            ("192.0.2.5/28", "the prefix is 192.0.2.0/28"),
            ("192.0.2.0/40:80", "`/40` is not a prefix length"),
            ("[2001:db8::5]/64:53/udp", "the prefix is 2001:db8::/64"),
            ("[2001:db8::/64]/64:53", "is not a prefix length"),
            ("64.0.0.0/2", "it holds addresses of 127.0.0.0/8"),
            ("0.0.0.0/0", "it holds addresses of 0.0.0.0/8"),
            ("::/0", "it holds addresses of ::/127"),
            ("::/64:80", "`/64:80` is not a prefix length"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
        for addr in ["127.0.0.1", "0.0.0.0", "224.0.0.1", "::1", "fe80::1"] {
            assert!(
                matches!(parse(addr), Err(MoveError::NotUnicast(_))),
                "{addr}"
            );
        }
    }

    #[test]
    fn a_part_takes_only_its_own_packets() {
        let moved = parse("192.0.2.5:80-81/tcp").unwrap();
        assert!(moved.takes(TCP, Some(81)));
        assert!(!moved.takes(TCP, Some(82)));
        assert!(!moved.takes(UDP, Some(80)));
        assert!(!moved.takes(1, None));
        assert!(!moved.takes(TCP, None));
        assert!(parse("192.0.2.5").unwrap().takes(47, None));
        assert!(parse("192.0.2.5/udp").unwrap().takes(UDP, Some(1)));
        assert!(!parse("192.0.2.5/udp").unwrap().takes(TCP, Some(1)));
    }

    #[test]
    fn overlaps_are_seen() {
        let overlap = |a: &str, b: &str| parse(a).unwrap().overlaps(&parse(b).unwrap());
        assert!(overlap("192.0.2.5", "192.0.2.5:80"));
        assert!(overlap("192.0.2.5:80", "192.0.2.5:70-90/tcp"));
        assert!(!overlap("192.0.2.5:80/tcp", "192.0.2.5:80/udp"));
        assert!(!overlap("192.0.2.5:80", "192.0.2.6:80"));
        assert!(overlap("192.0.2.0/28:80", "192.0.2.5"));
        assert!(!overlap("192.0.2.0/28:80", "192.0.2.5:81"));
        assert!(!overlap("192.0.2.0/28", "192.0.2.16/28"));
        assert!(!overlap("192.0.2.5:80", "192.0.2.5:81"));
    }

    proptest! {
        #[test]
        fn text_and_bytes_both_come_back(
            v6 in any::<bool>(), host in 1u8..255, len in 8u8..=128,
            ports in proptest::collection::vec((1u16.., 0u16..100), 0..6),
            transport in 0usize..3,
        ) {
            let addr = if v6 {
                format!("2001:db8::{host:x}").parse().unwrap()
            } else {
                IpAddr::from([192, 0, 2, host])
            };
            let ranges = ports.into_iter();
            let ranges = ranges.map(|(first, more)| first..=first.saturating_add(more));
            let ports = merged(ranges.collect());
            let transport = [None, Some(Transport::Tcp), Some(Transport::Udp)][transport];
            let moved = Move { prefix: addr.into(), ports, transport };
            let prefix = Prefix::of(moved.prefix.first(), if v6 { len } else { len % 25 + 8 });
            let of_prefix = Move { prefix, ..moved.clone() };
            prop_assert_eq!(of_prefix.to_string().parse::<Move>().unwrap(), of_prefix);
            prop_assert_eq!(moved.to_string().parse::<Move>().unwrap(), moved.clone());
            let mut bytes = Vec::new();
            moved.encode(&mut bytes);
            let mut rest = &bytes[..];
            prop_assert_eq!(Move::decode(&mut rest), Some(moved));
            prop_assert!(rest.is_empty());
        }

        #[test]
        fn no_bytes_make_decode_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Some(moved) = Move::decode(&mut &bytes[..]) {
                prop_assert_eq!(moved.to_string().parse::<Move>().unwrap(), moved);
            }
        }

        #[test]
        fn no_text_makes_parse_panic(text in "\\PC*") {
            let _ = text.parse::<Move>();
        }
    }
}
