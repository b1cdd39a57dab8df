//! Connections that begin on the new server: which of them leave from a moved address
//! (`--outgoing`), and which of them the old server lets out (`--allow-outgoing`).
//!
//! Owns the syntax that people type, and the question whether a packet's ports are meant. Who a
//! user or a control group is, and which addresses have moved, is the daemon's business.

use std::fmt;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::str::FromStr;

use crate::model::moved::{
    MoveError, TCP, Transport, UDP, check_ports, have_one_in_common, merged, parse_ports,
};

/// Most `--outgoing` of all peers together. The program on the new server's links compares the
/// first packet of each of its connections with all of them.
pub const MAX_OUTGOING: usize = 64;

/// Most `--allow-outgoing` of one peer. Each new connection is held against all of them.
pub const MAX_ALLOW_OUTGOING: usize = 64;

/// The word that stands for the flag without a value, in the file too.
pub const BOUND: &str = "bound";

/// The word that stands for the flag without a value, in the file too.
pub const ANY: &str = "any";

/// What `--allow-outgoing` calls echo requests and other ICMP queries.
const PING: &str = "ping";

/// Longest name of a control group: that of a path.
const MAX_CGROUP: usize = 4096;

/// One `--outgoing`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outgoing {
    /// What programs send that are bound to a moved address. Each of the others means it as well.
    Bound,
    /// What is chosen by its port, and leaves from a moved address all the same.
    ByPort(ByPort),
}

impl Outgoing {
    /// What is chosen by its port.
    pub fn by_port(&self) -> Option<&ByPort> {
        match self {
            Self::Bound => None,
            Self::ByPort(by_port) => Some(by_port),
        }
    }
}

/// Connections that are chosen by their port, and perhaps by who begins them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ByPort {
    /// The ports.
    pub ports: PortSet,
    /// Only those of this user.
    pub user: Option<User>,
    /// Only those of this control group and those below it: a path below the mount point.
    pub cgroup: Option<String>,
    /// The moved address that they leave from; `None` if there is but one of the family.
    pub from: Option<IpAddr>,
}

/// A user of this host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum User {
    /// By number.
    Id(u32),
    /// By name.
    Name(String),
}

/// One `--allow-outgoing`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum AllowOutgoing {
    /// Whatever the new server begins.
    Any,
    /// Echo requests and other ICMP queries.
    Ping,
    /// What has these ports.
    Ports(PortSet),
}

/// Ports at one end of a connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PortSet {
    /// Whose ports.
    pub end: PortEnd,
    /// The ranges, sorted and apart from each other; at least one.
    pub ports: Vec<RangeInclusive<u16>>,
    /// TCP or UDP alone.
    pub transport: Option<Transport>,
}

/// An end of a connection that begins on the new server.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PortEnd {
    /// The other end: the port that is asked for.
    Destination,
    /// The new server's own.
    Source,
}

impl PortSet {
    /// Whether a packet of this protocol with these ports is meant.
    pub fn takes(&self, protocol: u8, source: u16, destination: u16) -> bool {
        let port = match self.end {
            PortEnd::Source => source,
            PortEnd::Destination => destination,
        };
        self.has(protocol) && self.ports.iter().any(|range| range.contains(&port))
    }

    /// Whether packets of this protocol may be meant.
    pub fn has(&self, protocol: u8) -> bool {
        match self.transport {
            None => protocol == TCP || protocol == UDP,
            Some(Transport::Tcp) => protocol == TCP,
            Some(Transport::Udp) => protocol == UDP,
        }
    }

    /// Whether some port is in both, at the same end.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.end == other.end
            && [TCP, UDP]
                .into_iter()
                .any(|it| self.has(it) && other.has(it))
            && have_one_in_common(&self.ports, &other.ports)
    }
}

impl AllowOutgoing {
    /// Whether it lets out a packet of this protocol with these ports. A `query` is an ICMP one.
    pub fn takes(&self, protocol: u8, query: bool, source: u16, destination: u16) -> bool {
        match self {
            Self::Any => true,
            Self::Ping => query,
            Self::Ports(ports) => ports.takes(protocol, source, destination),
        }
    }
}

/// Why the text of an `--outgoing` or `--allow-outgoing` was refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum OutgoingError {
    /// The ports would be refused in a move as well.
    #[error(transparent)]
    Ports(MoveError),
    /// An option that there is not.
    #[error("`{0}` is none of user=NAME, cgroup=PATH and as=ADDR")]
    Option(String),
    /// An option that stands there twice.
    #[error("`{0}` is there twice; one is enough")]
    Twice(String),
    /// Not a user.
    #[error("`{0}` is not a user: write its name or number, as in user=mail or user=8")]
    User(String),
    /// Not a path of a control group.
    #[error(
        "`{0}` is not a control group: write its path below /sys/fs/cgroup, as in \
         cgroup=/system.slice/postfix.service"
    )]
    Cgroup(String),
    /// Not an address.
    #[error("`{0}` is not an IP address: write the moved address, as in as=192.0.2.5")]
    Address(String),
}

impl FromStr for PortSet {
    type Err = OutgoingError;

    fn from_str(text: &str) -> Result<Self, OutgoingError> {
        let (rest, transport) = match text.rsplit_once('/') {
            Some((rest, "tcp")) => (rest, Some(Transport::Tcp)),
            Some((rest, "udp")) => (rest, Some(Transport::Udp)),
            Some((_, other)) => {
                return Err(OutgoingError::Ports(MoveError::Transport(other.into())));
            }
            None => (text, None),
        };
        let (end, ports) = match rest.strip_prefix("from:") {
            Some(ports) => (PortEnd::Source, ports),
            None => (PortEnd::Destination, rest),
        };
        let ports = parse_ports(ports).map_err(OutgoingError::Ports)?;
        check_ports(&ports).map_err(OutgoingError::Ports)?;
        Ok(Self {
            end,
            ports: merged(ports),
            transport,
        })
    }
}

impl FromStr for Outgoing {
    type Err = OutgoingError;

    fn from_str(text: &str) -> Result<Self, OutgoingError> {
        if text == BOUND {
            return Ok(Self::Bound);
        }
        // Ports are separated by commas as well, but have no `=` in them.
        let first_option = text
            .find('=')
            .map_or(text.len(), |at| text[..at].rfind(',').unwrap_or_default());
        let (ports, options) = text.split_at(first_option);
        let mut by_port = ByPort {
            ports: ports.parse()?,
            user: None,
            cgroup: None,
            from: None,
        };
        for option in options.split(',').filter(|option| !option.is_empty()) {
            let twice = match option.split_once('=') {
                Some(("user", user)) => by_port.user.replace(user.parse()?).is_some(),
                Some(("cgroup", path)) => by_port.cgroup.replace(cgroup(path)?).is_some(),
                Some(("as", addr)) => {
                    let wrong = |_| OutgoingError::Address(addr.into());
                    by_port.from.replace(addr.parse().map_err(wrong)?).is_some()
                }
                _ => return Err(OutgoingError::Option(option.into())),
            };
            if twice {
                return Err(OutgoingError::Twice(option.into()));
            }
        }
        Ok(Self::ByPort(by_port))
    }
}

impl FromStr for User {
    type Err = OutgoingError;

    fn from_str(text: &str) -> Result<Self, OutgoingError> {
        if let Ok(id) = text.parse() {
            // The last number is nobody's (`chown(2)`).
            return match id {
                u32::MAX => Err(OutgoingError::User(text.into())),
                id => Ok(Self::Id(id)),
            };
        }
        let is_name = !text.is_empty()
            && !text.starts_with(|c: char| c == '-' || c.is_ascii_digit())
            && text
                .chars()
                .all(|c| !c.is_whitespace() && !matches!(c, ':' | '/'));
        if !is_name {
            return Err(OutgoingError::User(text.into()));
        }
        Ok(Self::Name(text.into()))
    }
}

/// The path of a control group, with one slash before it and none behind.
fn cgroup(text: &str) -> Result<String, OutgoingError> {
    let path = text.trim_matches('/');
    let mut parts = path.split('/');
    let is_path = !path.is_empty()
        && path.len() < MAX_CGROUP
        && parts.all(|part| !matches!(part, "" | "." | ".."));
    if !is_path {
        return Err(OutgoingError::Cgroup(text.into()));
    }
    Ok(format!("/{path}"))
}

impl FromStr for AllowOutgoing {
    type Err = OutgoingError;

    fn from_str(text: &str) -> Result<Self, OutgoingError> {
        match text {
            ANY => Ok(Self::Any),
            PING => Ok(Self::Ping),
            _ => text.parse().map(Self::Ports),
        }
    }
}

impl fmt::Display for PortSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.end == PortEnd::Source {
            f.write_str("from:")?;
        }
        let mut first = true;
        for range in &self.ports {
            f.write_str(if std::mem::take(&mut first) { "" } else { "," })?;
            match (range.start(), range.end()) {
                (start, end) if start == end => write!(f, "{start}")?,
                (start, end) => write!(f, "{start}-{end}")?,
            }
        }
        f.write_str(match self.transport {
            None => "",
            Some(Transport::Tcp) => "/tcp",
            Some(Transport::Udp) => "/udp",
        })
    }
}

impl fmt::Display for Outgoing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bound => f.write_str(BOUND),
            Self::ByPort(by_port) => by_port.fmt(f),
        }
    }
}

impl fmt::Display for ByPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ports.fmt(f)?;
        match &self.user {
            None => {}
            Some(User::Id(id)) => write!(f, ",user={id}")?,
            Some(User::Name(name)) => write!(f, ",user={name}")?,
        }
        if let Some(path) = &self.cgroup {
            write!(f, ",cgroup={path}")?;
        }
        match self.from {
            None => Ok(()),
            Some(addr) => write!(f, ",as={addr}"),
        }
    }
}

impl fmt::Display for AllowOutgoing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str(ANY),
            Self::Ping => f.write_str(PING),
            Self::Ports(ports) => ports.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_is_shown_again() {
        for text in [
            "bound",
            "25/tcp",
            "25,465,587/tcp",
            "from:20/tcp",
            "from:5060,5070",
            "27000-27050/udp,user=games",
            "25/tcp,user=8,cgroup=/system.slice/postfix.service,as=192.0.2.5",
            "25,587/tcp,as=2001:db8::5",
        ] {
            let read: Outgoing = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(read.to_string(), text);
        }
        for text in ["any", "ping", "25/tcp", "from:20/tcp", "1-1023"] {
            let read: AllowOutgoing = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(read.to_string(), text);
        }
        let same = |a: &str, b: &str| assert_eq!(a.parse::<Outgoing>(), b.parse::<Outgoing>());
        same("26,25/tcp", "25-26/tcp");
        same("25,cgroup=mail.slice/", "25,cgroup=/mail.slice");
    }

    #[test]
    fn each_mistake_is_named_with_what_would_be_right() {
        for (text, says) in [
            ("", "`` is not a port"),
            ("smtp", "`smtp` is not a port"),
            ("25/sctp", "only /tcp and /udp"),
            ("0/tcp", "`0` is not a port"),
            ("90-80", "runs backwards"),
            ("to:25", "`to:25` is not a port"),
            ("25/tcp,root", "only /tcp and /udp"),
            ("25/tcp,group=mail", "`group=mail` is none of user=NAME"),
            ("25/tcp,user=", "`` is not a user"),
            ("25/tcp,user=-1", "`-1` is not a user"),
            ("25/tcp,user=4294967295", "is not a user"),
            ("25/tcp,user=a,user=b", "`user=b` is there twice"),
            ("25/tcp,cgroup=/../x", "below /sys/fs/cgroup"),
            ("25/tcp,cgroup=/", "is not a control group"),
            ("25/tcp,as=www", "`www` is not an IP address"),
            ("user=mail", "is not a port"),
        ] {
            let error = text.parse::<Outgoing>().unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
        for text in ["bound", "25/tcp,user=8", "icmp"] {
            assert!(text.parse::<AllowOutgoing>().is_err(), "{text}");
        }
    }

    #[test]
    fn ports_are_those_of_the_end_that_is_named() {
        let takes = |text: &str, protocol, source, destination| {
            text.parse::<PortSet>()
                .unwrap()
                .takes(protocol, source, destination)
        };
        assert!(takes("25/tcp", TCP, 40_000, 25));
        assert!(!takes("25/tcp", TCP, 25, 40_000));
        assert!(!takes("25/tcp", UDP, 40_000, 25));
        assert!(takes("from:20/tcp", TCP, 20, 40_000));
        assert!(!takes("from:20/tcp", TCP, 40_000, 20));
        assert!(takes("5060,5080-5090", UDP, 1, 5085) && takes("5060", TCP, 1, 5060));
        assert!(!takes("5060", 132, 1, 5060));
        let overlap = |a: &str, b: &str| {
            a.parse::<PortSet>()
                .unwrap()
                .overlaps(&b.parse::<PortSet>().unwrap())
        };
        assert!(overlap("25-30/tcp", "30"));
        assert!(!overlap("25/tcp", "25/udp"));
        assert!(!overlap("25", "from:25"));
        assert!(!overlap("25,27", "26"));
        let ping: AllowOutgoing = "ping".parse().unwrap();
        assert!(ping.takes(1, true, 7, 0) && !ping.takes(17, false, 7, 53));
    }
}
