//! The values of flags: each has one syntax, for the command line and the configuration file.
//!
//! Owns what a person types for one value, what it means, and the sentence that says what is wrong
//! with it: the value itself in backquotes, then the problem, then what would be right. Whoever
//! read the value adds the flag or the line of the file that it came from. `config` decides what
//! values mean together.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use crate::model::flow_list::MAX_LISTED;

/// The UDP port both servers use unless told otherwise.
pub const DEFAULT_PORT: u16 = 51_850;

/// Most that `--max-flows` may ask for: 2 GB of table.
pub const MAX_MAX_FLOWS: u32 = 16_000_000;

/// Most lanes `--lanes` may ask for: beyond the cores of any server this is run on, each lane costs
/// memory and keys.
pub const MAX_LANES: u8 = 64;

/// Most seconds that `--rekey-after` takes: the protocol's own number.
const MAX_REKEY_AFTER: u32 = 120;

/// Most seconds that `ipmoved hold --for` takes. A client gives a connection up after two minutes
/// (`tcp_syn_retries` of Linux), so that an hour is for tests and mistakes.
pub const MAX_HOLD: u32 = 3_600;

/// Most seconds that a step of `ipmoved cutover` may wait: two of them, and what comes around them,
/// are no longer than a hold.
const MAX_STEP: u32 = 1_200;

/// Longest interface name (`IFNAMSIZ` less the final NUL).
const MAX_INTERFACE_NAME: usize = 15;

/// Longest name DNS has (RFC 1035, section 2.3.4).
const MAX_HOST_NAME: usize = 253;

/// `--max-flows`.
pub type MaxFlows = Bounded<1, MAX_MAX_FLOWS>;

/// `--lanes`.
pub type Lanes = Bounded<1, { MAX_LANES as u32 }>;

/// `ipmoved hold --for`, in seconds.
pub type HoldSeconds = Bounded<1, MAX_HOLD>;

/// `ipmoved cutover --drain`, in seconds.
pub type DrainSeconds = Bounded<0, MAX_STEP>;

/// `ipmoved cutover --within`, in seconds.
pub type WithinSeconds = Bounded<1, MAX_STEP>;

/// `--rekey-after`, in seconds.
pub type RekeyAfter = Bounded<1, MAX_REKEY_AFTER>;

/// `--top`.
pub type Top = Bounded<1, 1_000_000>;

/// `status --watch` and `top --every`, in seconds.
pub type WatchSeconds = Bounded<1, 3_600>;

/// `flows --top`.
pub type FlowsTop = Bounded<1, MAX_LISTED>;

/// `--peer HOST[:PORT]`: an address or name with a port. A bare IPv6 address needs no brackets.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerAddr {
    /// IP address or DNS name.
    pub host: String,
    /// UDP port.
    pub port: u16,
}

impl PeerAddr {
    /// Whether the host has to be looked up.
    pub fn is_name(&self) -> bool {
        self.host.parse::<IpAddr>().is_err()
    }
}

/// Why the text of a `--peer` was refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PeerAddrError {
    /// Neither an address nor a name.
    #[error(
        "`{0}` is neither an IP address nor a host name; \
         write 198.51.100.2, [2001:db8::2]:51850 or new.example.net"
    )]
    Host(String),
    /// No port behind the colon.
    #[error("`{0}`: the part behind the colon is not a port from 1 to 65535")]
    Port(String),
    /// An address that no server has.
    #[error("`{0}` is not an address a server can be reached at")]
    Unreachable(String),
}

impl FromStr for PeerAddr {
    type Err = PeerAddrError;

    fn from_str(text: &str) -> Result<Self, PeerAddrError> {
        let in_brackets = text
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'));
        let addr = if let Ok(ip) = text.parse::<IpAddr>() {
            Some(SocketAddr::new(ip, DEFAULT_PORT))
        } else if let Some(Ok(ip)) = in_brackets.map(str::parse::<Ipv6Addr>) {
            Some(SocketAddr::new(ip.into(), DEFAULT_PORT))
        } else {
            text.parse::<SocketAddr>().ok()
        };
        if let Some(addr) = addr {
            let ip = addr.ip();
            if ip.is_unspecified() || ip.is_multicast() || addr.port() == 0 {
                return Err(PeerAddrError::Unreachable(text.into()));
            }
            return Ok(Self {
                host: ip.to_string(),
                port: addr.port(),
            });
        }
        let (host, port) = match text.split_once(':') {
            None => (text, DEFAULT_PORT),
            Some((host, port)) => match port.parse() {
                Ok(port) if port != 0 => (host, port),
                _ => return Err(PeerAddrError::Port(text.into())),
            },
        };
        let is_name = host.len() <= MAX_HOST_NAME
            && host
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
            && host.bytes().any(|b| b.is_ascii_alphabetic());
        if !is_name {
            return Err(PeerAddrError::Host(text.into()));
        }
        Ok(Self {
            host: host.into(),
            port,
        })
    }
}

impl fmt::Display for PeerAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// `--listen [ADDR:]PORT`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Listen {
    /// The only address to listen on; `None` means all addresses of both families.
    pub ip: Option<IpAddr>,
    /// The UDP port.
    pub port: u16,
}

impl Default for Listen {
    fn default() -> Self {
        Self {
            ip: None,
            port: DEFAULT_PORT,
        }
    }
}

/// The text of a `--listen` is not a port, with or without an address of a server before it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("`{0}` is not [ADDR:]PORT; write 51850, 192.0.2.1:51850 or [2001:db8::1]:51850")]
pub struct ListenError(String);

impl FromStr for Listen {
    type Err = ListenError;

    fn from_str(text: &str) -> Result<Self, ListenError> {
        let wrong = || ListenError(text.into());
        let (ip, port) = match text.parse::<SocketAddr>() {
            Ok(addr) => (Some(addr.ip()), addr.port()),
            Err(_) if text.starts_with('+') => return Err(wrong()),
            Err(_) => (None, text.parse().map_err(|_| wrong())?),
        };
        if port == 0 || ip.is_some_and(|ip| ip.is_multicast()) {
            return Err(wrong());
        }
        // `[::]` means both families, which no single address does; `0.0.0.0` means IPv4 alone.
        let ip = ip.filter(|ip| !ip.is_unspecified() || ip.is_ipv4());
        Ok(Self { ip, port })
    }
}

/// `--metrics [ADDR:]PORT`: on this host's loopback, unless an address is named.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MetricsAddr(pub SocketAddr);

/// The text of a `--metrics` is not a port, with or without an address of this server before it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("`{0}` is not [ADDR:]PORT; write 9185, 192.0.2.1:9185 or [2001:db8::1]:9185")]
pub struct MetricsAddrError(String);

impl FromStr for MetricsAddr {
    type Err = MetricsAddrError;

    fn from_str(text: &str) -> Result<Self, MetricsAddrError> {
        let wrong = || MetricsAddrError(text.into());
        let addr = match text.parse::<SocketAddr>() {
            Ok(addr) => addr,
            Err(_) if text.starts_with('+') => return Err(wrong()),
            Err(_) => (Ipv4Addr::LOCALHOST, text.parse().map_err(|_| wrong())?).into(),
        };
        if addr.port() == 0 || addr.ip().is_multicast() {
            return Err(wrong());
        }
        Ok(Self(addr))
    }
}

/// `--deliver-to ADDR|keep`: where the new server delivers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DeliverTo {
    /// To these addresses; for a family not given, the one the peer reaches us on.
    Addresses {
        /// For moved IPv4 addresses.
        v4: Option<Ipv4Addr>,
        /// For moved IPv6 addresses.
        v6: Option<Ipv6Addr>,
    },
    /// To the moved address itself, which this host holds.
    Keep,
}

impl Default for DeliverTo {
    fn default() -> Self {
        Self::Addresses { v4: None, v6: None }
    }
}

/// Why a `--deliver-to`, or several of them together, were refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DeliverToError {
    /// Neither an address nor `keep`.
    #[error("`{0}` is not an IP address of this server, as in 198.51.100.2, nor `keep`")]
    NotAnAddress(String),
    /// An address that no client's packet can be delivered to.
    #[error(
        "`{0}`: clients' packets cannot be delivered there; \
         give an address of this server's network interface"
    )]
    Undeliverable(String),
    /// `keep` and an address.
    #[error("`keep` stands alone: give either it or addresses")]
    KeepAlone,
    /// Two addresses of one family.
    #[error("{0} is the second address of its family; one of each is enough")]
    Twice(IpAddr),
}

impl DeliverTo {
    /// Takes several `--deliver-to` together.
    ///
    /// # Errors
    /// [`DeliverToError`] if they contradict each other.
    pub fn all(given: &[Self]) -> Result<Self, DeliverToError> {
        let (mut v4, mut v6) = (None, None);
        for one in given {
            let Self::Addresses {
                v4: one_v4,
                v6: one_v6,
            } = *one
            else {
                return match given {
                    [_] => Ok(Self::Keep),
                    _ => Err(DeliverToError::KeepAlone),
                };
            };
            if let (Some(_), Some(second)) = (v4, one_v4) {
                return Err(DeliverToError::Twice(second.into()));
            }
            if let (Some(_), Some(second)) = (v6, one_v6) {
                return Err(DeliverToError::Twice(second.into()));
            }
            (v4, v6) = (v4.or(one_v4), v6.or(one_v6));
        }
        Ok(Self::Addresses { v4, v6 })
    }
}

impl FromStr for DeliverTo {
    type Err = DeliverToError;

    fn from_str(text: &str) -> Result<Self, DeliverToError> {
        if text == "keep" {
            return Ok(Self::Keep);
        }
        let ip: IpAddr = text
            .parse()
            .map_err(|_| DeliverToError::NotAnAddress(text.into()))?;
        if ip.is_unspecified() || ip.is_multicast() || ip.is_loopback() {
            return Err(DeliverToError::Undeliverable(text.into()));
        }
        Ok(match ip {
            IpAddr::V4(ip) => Self::Addresses {
                v4: Some(ip),
                v6: None,
            },
            IpAddr::V6(ip) => Self::Addresses {
                v4: None,
                v6: Some(ip),
            },
        })
    }
}

/// `--to ADDR[:PORT]` of `ipmoved nat`: the new server, and its port if it is another than the one
/// that moved.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NewServer {
    /// Its address.
    pub ip: IpAddr,
    /// The port there; `None` leaves the port as it was.
    pub port: Option<u16>,
}

/// Why the text of a `--to` was refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NewServerError {
    /// Not an address.
    #[error(
        "`{0}` is not an IP address; \
         write 198.51.100.2, 198.51.100.2:8080 or [2001:db8::2]:8080"
    )]
    NotAnAddress(String),
    /// An address that no other server has.
    #[error("`{0}` is not an address another server can be reached at")]
    Unreachable(String),
}

impl FromStr for NewServer {
    type Err = NewServerError;

    fn from_str(text: &str) -> Result<Self, NewServerError> {
        let (ip, port) = match (text.parse::<IpAddr>(), text.parse::<SocketAddr>()) {
            (Ok(ip), _) => (ip, None),
            (_, Ok(addr)) => (addr.ip(), Some(addr.port())),
            _ => return Err(NewServerError::NotAnAddress(text.into())),
        };
        if ip.is_unspecified() || ip.is_multicast() || ip.is_loopback() || port == Some(0) {
            return Err(NewServerError::Unreachable(text.into()));
        }
        Ok(Self { ip, port })
    }
}

/// `--tun NAME`, `--uplink IFACE`: the name of a network interface, whether it exists or not.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct InterfaceName(String);

/// The text is a name that Linux does not take for an interface.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("`{0}` is not an interface name (1 to {MAX_INTERFACE_NAME} letters, digits, - . _)")]
pub struct InterfaceNameError(String);

impl FromStr for InterfaceName {
    type Err = InterfaceNameError;

    fn from_str(text: &str) -> Result<Self, InterfaceNameError> {
        let good = (1..=MAX_INTERFACE_NAME).contains(&text.len())
            && text != "."
            && text != ".."
            && text
                .bytes()
                .all(|b| b.is_ascii_graphic() && !matches!(b, b'/' | b':' | b'%'));
        good.then(|| Self(text.into()))
            .ok_or_else(|| InterfaceNameError(text.into()))
    }
}

impl From<InterfaceName> for String {
    fn from(name: InterfaceName) -> Self {
        name.0
    }
}

/// A whole number from `LEAST` to `MOST`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bounded<const LEAST: u32, const MOST: u32>(u32);

impl<const LEAST: u32, const MOST: u32> Bounded<LEAST, MOST> {
    /// The number.
    pub fn get(self) -> u32 {
        self.0
    }
}

/// Not a whole number between its bounds.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("`{text}` is not a number from {least} to {most}")]
pub struct BoundedError {
    text: String,
    least: u32,
    most: u32,
}

impl<const LEAST: u32, const MOST: u32> FromStr for Bounded<LEAST, MOST> {
    type Err = BoundedError;

    fn from_str(text: &str) -> Result<Self, BoundedError> {
        match text.parse() {
            Ok(number) if (LEAST..=MOST).contains(&number) => Ok(Self(number)),
            _ => Err(BoundedError {
                text: text.into(),
                least: LEAST,
                most: MOST,
            }),
        }
    }
}

/// A length of time: `90d`, `12h`, `2w`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Period(Duration);

/// The longest [`Period`]: ten years, beyond which nobody means it.
const MAX_PERIOD: Duration = Duration::from_secs(3_660 * 86_400);

impl Period {
    /// Its length.
    pub fn get(self) -> Duration {
        self.0
    }
}

/// Why the text of a [`Period`] was refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "`{0}` is no length of time; write 7d, 12h or 4w, from one minute (1m) to ten years (3660d)"
)]
pub struct PeriodError(String);

impl FromStr for Period {
    type Err = PeriodError;

    fn from_str(text: &str) -> Result<Self, PeriodError> {
        let units = [("m", 60), ("h", 3_600), ("d", 86_400), ("w", 604_800)];
        let read = |(unit, seconds): (&str, u64)| {
            let number = text.strip_suffix(unit)?;
            // Not "+7".
            let plain = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
            let count: u64 = plain.then(|| number.parse().ok())??;
            Some(Duration::from_secs(count.checked_mul(seconds)?))
        };
        let found = units.into_iter().find_map(read);
        let found = found.filter(|it| !it.is_zero() && *it <= MAX_PERIOD);
        found.map(Self).ok_or_else(|| PeriodError(text.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each text is read as the value shown, or refused with words that say why.
    fn reads<T>(table: &[(&str, Result<&str, &str>)], show: impl Fn(T) -> String)
    where
        T: FromStr<Err: fmt::Display>,
    {
        for (text, expected) in table {
            match (text.parse::<T>(), expected) {
                (Ok(value), Ok(shown)) => assert_eq!(show(value), *shown, "{text}"),
                (Err(error), Err(says)) => {
                    let error = error.to_string();
                    assert!(error.contains(says), "{text}: {error}");
                    assert!(error.contains(&format!("`{text}`")), "{text}: {error}");
                }
                (Ok(value), Err(_)) => panic!("{text} was read as {}", show(value)),
                (Err(error), Ok(_)) => panic!("{text} was refused: {error}"),
            }
        }
    }

    #[test]
    fn peers() {
        reads(
            &[
                ("192.0.2.1", Ok("192.0.2.1:51850")),
                ("192.0.2.1:7", Ok("192.0.2.1:7")),
                ("2001:db8::2", Ok("[2001:db8::2]:51850")),
                ("[2001:db8::2]", Ok("[2001:db8::2]:51850")),
                ("[2001:db8::2]:7", Ok("[2001:db8::2]:7")),
                ("new.example.net", Ok("new.example.net:51850")),
                ("new.example.net:7", Ok("new.example.net:7")),
                ("", Err("host name")),
                (":7", Err("host name")),
                ("a b", Err("host name")),
                ("1.2.3", Err("host name")),
                ("a:0", Err("not a port")),
                ("a:x", Err("not a port")),
                ("a:70000", Err("not a port")),
                ("http://a", Err("not a port")),
                ("0.0.0.0", Err("reached")),
                ("ff02::1", Err("reached")),
                ("192.0.2.1:0", Err("reached")),
            ],
            |peer: PeerAddr| peer.to_string(),
        );
    }

    #[test]
    fn addresses_to_listen_on() {
        reads(
            &[
                ("51850", Ok("None 51850")),
                ("192.0.2.1:7", Ok("Some(192.0.2.1) 7")),
                ("[2001:db8::1]:7", Ok("Some(2001:db8::1) 7")),
                ("0.0.0.0:7", Ok("Some(0.0.0.0) 7")),
                ("[::]:7", Ok("None 7")),
                ("", Err("51850")),
                ("0", Err("51850")),
                ("+7", Err("51850")),
                ("70000", Err("51850")),
                ("192.0.2.1", Err("51850")),
                ("192.0.2.1:0", Err("51850")),
                ("224.0.0.1:7", Err("51850")),
                ("nonsense", Err("51850")),
            ],
            |listen: Listen| format!("{:?} {}", listen.ip, listen.port),
        );
    }

    #[test]
    fn where_metrics_are_served() {
        reads(
            &[
                ("9185", Ok("127.0.0.1:9185")),
                ("192.0.2.1:9185", Ok("192.0.2.1:9185")),
                ("0.0.0.0:9185", Ok("0.0.0.0:9185")),
                ("[::1]:9185", Ok("[::1]:9185")),
                ("", Err("9185")),
                ("0", Err("9185")),
                ("+9185", Err("9185")),
                ("192.0.2.1", Err("9185")),
                ("224.0.0.1:9185", Err("9185")),
                ("localhost:9185", Err("9185")),
            ],
            |addr: MetricsAddr| addr.0.to_string(),
        );
    }

    #[test]
    fn deliveries() {
        reads(
            &[
                ("keep", Ok("Keep")),
                (
                    "198.51.100.2",
                    Ok("Addresses { v4: Some(198.51.100.2), v6: None }"),
                ),
                (
                    "2001:db8::2",
                    Ok("Addresses { v4: None, v6: Some(2001:db8::2) }"),
                ),
                ("", Err("keep")),
                ("Keep", Err("keep")),
                ("198.51.100.2:80", Err("as in 198.51.100.2")),
                ("127.0.0.1", Err("cannot be delivered")),
                ("::", Err("cannot be delivered")),
                ("224.0.0.1", Err("cannot be delivered")),
            ],
            |to: DeliverTo| format!("{to:?}"),
        );
        let all = |texts: &[&str]| {
            let given: Vec<DeliverTo> = texts.iter().map(|text| text.parse().unwrap()).collect();
            DeliverTo::all(&given)
        };
        assert_eq!(all(&[]), Ok(DeliverTo::default()));
        assert_eq!(all(&["keep"]), Ok(DeliverTo::Keep));
        assert_eq!(
            all(&["2001:db8::2", "198.51.100.2"]),
            Ok(DeliverTo::Addresses {
                v4: Some([198, 51, 100, 2].into()),
                v6: Some("2001:db8::2".parse().unwrap()),
            })
        );
        assert_eq!(
            all(&["keep", "198.51.100.2"]),
            Err(DeliverToError::KeepAlone)
        );
        assert_eq!(
            all(&["198.51.100.2", "keep"]),
            Err(DeliverToError::KeepAlone)
        );
        assert_eq!(
            all(&["198.51.100.2", "198.51.100.3"]),
            Err(DeliverToError::Twice([198, 51, 100, 3].into()))
        );
    }

    #[test]
    fn new_servers() {
        reads(
            &[
                ("198.51.100.2", Ok("198.51.100.2 None")),
                ("198.51.100.2:80", Ok("198.51.100.2 Some(80)")),
                ("2001:db8::2", Ok("2001:db8::2 None")),
                ("[2001:db8::2]:80", Ok("2001:db8::2 Some(80)")),
                ("www", Err("not an IP address")),
                ("127.0.0.1", Err("can be reached")),
                ("198.51.100.2:0", Err("can be reached")),
            ],
            |to: NewServer| format!("{} {:?}", to.ip, to.port),
        );
    }

    #[test]
    fn periods() {
        reads(
            &[
                ("90d", Ok("7776000")),
                ("1m", Ok("60")),
                ("12h", Ok("43200")),
                ("4w", Ok("2419200")),
                ("3660d", Ok("316224000")),
                ("0d", Err("length of time")),
                ("3661d", Err("ten years")),
                ("99999999999999999999d", Err("ten years")),
                ("7", Err("7d")),
                ("d", Err("7d")),
                ("+7d", Err("7d")),
                ("-7d", Err("7d")),
                ("1.5d", Err("7d")),
                ("7 d", Err("7d")),
                ("", Err("7d")),
            ],
            |period: Period| period.get().as_secs().to_string(),
        );
    }

    #[test]
    fn interface_names() {
        let names = [
            ("ipmoved0", Ok("ipmoved0")),
            ("eth0.17", Ok("eth0.17")),
            ("exactly-fifteen", Ok("exactly-fifteen")),
            ("sixteen-letters-", Err("1 to 15")),
            ("", Err("1 to 15")),
            (".", Err("1 to 15")),
            ("..", Err("1 to 15")),
            ("a/b", Err("1 to 15")),
            ("a b", Err("1 to 15")),
        ];
        reads(&names, |name: InterfaceName| name.into());
    }

    #[test]
    fn numbers() {
        let numbers = [
            ("1", Ok("1")),
            ("64", Ok("64")),
            ("0", Err("from 1 to 64")),
            ("65", Err("from 1 to 64")),
            ("-1", Err("from 1 to 64")),
            ("many", Err("from 1 to 64")),
            ("99999999999", Err("from 1 to 64")),
        ];
        reads(&numbers, |lanes: Lanes| lanes.get().to_string());
    }
}
