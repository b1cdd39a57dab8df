//! What it means: the settings of one daemon, complete and consistent.
//!
//! Joins command line, environment and configuration file, checks everything that can be checked
//! without touching the system, and says in one line what is wrong and what to do about it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use zeroize::Zeroizing;

use crate::channel::session::{CipherPolicy, PeerKeys, Psk, PskError};
use crate::model::moved::{MAX_MOVES, Move, MoveError};
use crate::model::peer::Role;
use crate::model::port_map::PortMap;
use crate::model::runtime::BASE_DIR;
use crate::settings::args::{LogFormat, NatArgs, Offload, RunArgs};
use crate::settings::file::{FileConfig, Listen, OneOrMany, Secret};
use crate::settings::psk::read_psk;

/// The UDP port both servers use unless told otherwise.
pub const DEFAULT_PORT: u16 = 51_850;

/// The tunnel interface's name unless told otherwise.
pub const DEFAULT_TUN: &str = "ipmoved0";

/// Flows remembered unless told otherwise: a busy service's clients of a day, at most 128 MB.
pub const DEFAULT_MAX_FLOWS: u32 = 1_000_000;

/// Most that `--max-flows` may ask for: 2 GB of table.
pub const MAX_MAX_FLOWS: u32 = 16_000_000;

/// Most peers one daemon serves: a stranger's datagram costs one hash a peer.
pub const MAX_PEERS: usize = 256;

/// Most lanes `--lanes` may ask for: beyond the cores of any server this is run on, each lane costs
/// memory and keys.
pub const MAX_LANES: u8 = 64;

/// Most lanes taken unless told otherwise.
const MAX_DEFAULT_LANES: usize = 8;
/// Least and most seconds that `--rekey-after` takes; the most is the protocol's own number.
const MIN_REKEY_AFTER: u64 = 1;
const MAX_REKEY_AFTER: u64 = 120;

/// Longest interface name (`IFNAMSIZ` less the final NUL).
const MAX_IFNAME: usize = 15;

/// Most `--deliver` of one peer: they are searched one by one for every new flow.
pub const MAX_PORT_MAPS: usize = 256;

/// The environment variable that may hold the key.
pub const PSK_VARIABLE: &str = "IPMOVED_PSK";

/// The environment variable that moves the runtime directory, for several installations on one host.
pub const RUNTIME_DIR_VARIABLE: &str = "IPMOVED_RUNTIME_DIR";

/// Where the daemon keeps its socket, lock and journal.
pub fn runtime_dir() -> PathBuf {
    std::env::var_os(RUNTIME_DIR_VARIABLE)
        .filter(|dir| !dir.is_empty())
        .map_or_else(|| BASE_DIR.into(), PathBuf::from)
}

/// The settings of one daemon.
#[derive(Debug)]
pub struct Config {
    /// Old if anything was moved away from here.
    pub role: Role,
    /// The other servers; at least one.
    pub peers: Vec<PeerConfig>,
    /// Where to listen; `None` for the address means all addresses of both families.
    pub listen: (Option<IpAddr>, u16),
    /// Name of the tunnel interface.
    pub tun: String,
    /// The interface clients' packets use, if it is not to be found.
    pub uplink: Option<String>,
    /// Most flows remembered.
    pub max_flows: u32,
    /// Threads that carry packets.
    pub lanes: u8,
    /// Which ciphers may be used.
    pub cipher: CipherPolicy,
    /// How log lines are written.
    pub log_format: LogFormat,
    /// Packets too big for one datagram go in several.
    pub split: bool,
    /// Offloads to do without.
    pub without: Vec<Offload>,
    /// How long a session is used before the next is asked for, if not as the protocol says.
    pub rekey_after: Option<Duration>,
    /// What an administrator should know of these settings.
    pub warnings: Vec<String>,
}

/// One peer's settings.
#[derive(Debug)]
pub struct PeerConfig {
    /// Where it is; `None` waits for it to call.
    pub endpoint: Option<PeerAddr>,
    /// What the key shared with it became. The key itself is gone by now.
    pub keys: PeerKeys,
    /// What moved to it (old server).
    pub moves: Vec<Move>,
    /// Where to deliver what moved from it (new server).
    pub deliver_to: DeliverTo,
    /// Ports that are delivered elsewhere (new server).
    pub deliver: Vec<PortMap>,
}

/// An address or name with a port.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerAddr {
    /// IP address or DNS name.
    pub host: String,
    /// UDP port.
    pub port: u16,
}

impl std::fmt::Display for PeerAddr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// Where the new server delivers.
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

/// Why the settings were refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// No peer at all.
    #[error(
        "who is the other server? give --peer HOST (only one of the two may leave it out) and a key: {0}"
    )]
    NoPeer(&'static str),
    /// No key.
    #[error(
        "no key: give --psk-file FILE (make one with `ipmoved genpsk`), the same on both servers"
    )]
    NoPsk,
    /// A key that is none.
    #[error("{origin}: {error}")]
    Psk {
        /// Where it was given.
        origin: String,
        /// What is wrong with it.
        error: PskError,
    },
    /// A file that cannot be read.
    #[error("cannot read {path}: {error}{hint}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's word.
        error: std::io::Error,
        /// What to do.
        hint: &'static str,
    },
    /// A configuration file that is not well-formed.
    #[error("{path}: {message}", path = path.display())]
    Toml {
        /// The file.
        path: PathBuf,
        /// What the parser said, on one line.
        message: String,
    },
    /// A moved address in the file that is none.
    #[error("move `{0}`: {1}")]
    Move(String, MoveError),
    /// Two moves that some packet would belong to both of.
    #[error("{0} and {1} overlap: a packet can only move once")]
    Overlap(Move, Move),
    /// Too many moves.
    #[error("{0} moved addresses are more than {max}: use ranges, or move whole addresses", max = MAX_MOVES)]
    TooManyMoves(usize),
    /// Any other flag.
    #[error("{flag} {value}: {problem}")]
    Flag {
        /// The flag.
        flag: &'static str,
        /// Its value.
        value: String,
        /// What is wrong, and what would be right.
        problem: String,
    },
}

impl Config {
    /// Joins what was typed, the environment and the configuration file.
    pub fn new(args: RunArgs) -> Result<Self, ConfigError> {
        let mut warnings = Vec::new();
        let file = match &args.config {
            Some(path) => FileConfig::read(path, &mut warnings)?,
            None => FileConfig::default(),
        };
        let variable = std::env::var(PSK_VARIABLE)
            .ok()
            .filter(|text| !text.is_empty())
            .map(Zeroizing::new);
        Self::join(args, file, variable, warnings)
    }

    fn join(
        args: RunArgs,
        file: FileConfig,
        variable: Option<Zeroizing<String>>,
        mut warnings: Vec<String>,
    ) -> Result<Self, ConfigError> {
        if args.psk.is_some() {
            warnings.push(
                "the key on the command line can be read by every user of this host; use --psk-file"
                    .into(),
            );
        }
        // A flag wins over the variable, the variable over the file.
        let (psk, psk_file) = match (args.psk, args.psk_file, variable) {
            (Some(text), _, _) => (Some(("--psk", Zeroizing::new(text))), None),
            (None, Some(path), _) => (None, Some(path)),
            (None, None, Some(text)) => (Some((PSK_VARIABLE, text)), None),
            (None, None, None) => (file.psk.map(|Secret(text)| ("psk", text)), file.psk_file),
        };
        let moves = if args.moves.is_empty() {
            parse_moves(&file.moves)?
        } else {
            args.moves
        };
        let deliver_to = if args.deliver_to.is_empty() {
            file.deliver_to.map(OneOrMany::into_vec).unwrap_or_default()
        } else {
            args.deliver_to
        };
        let deliver = if args.deliver.is_empty() {
            file.deliver.into_vec()
        } else {
            args.deliver
        };
        let top = PeerSettings {
            peer: args.peer.or(file.peer),
            psk: psk.map(|(origin, text)| (origin.to_owned(), text)),
            psk_file,
            moves,
            deliver_to,
            deliver,
        };
        let mut peers = Vec::new();
        if file.peers.is_empty() || top.is_any() {
            peers.push(top.resolve(&mut warnings)?);
        }
        for peer in file.peers {
            peers.push(
                PeerSettings {
                    peer: peer.peer,
                    psk: peer.psk.map(|Secret(text)| ("psk".to_owned(), text)),
                    psk_file: peer.psk_file,
                    moves: parse_moves(&peer.moves)?,
                    deliver_to: peer.deliver_to.map(OneOrMany::into_vec).unwrap_or_default(),
                    deliver: peer.deliver.into_vec(),
                }
                .resolve(&mut warnings)?,
            );
        }
        check_peers(&peers)?;
        let role = if peers.iter().any(|peer| !peer.moves.is_empty()) {
            Role::Old
        } else {
            Role::New
        };
        let max_flows = check_max_flows(args.max_flows.or(file.max_flows))?;
        let lanes = args.lanes.or(file.lanes).unwrap_or_else(default_lanes);
        if !(1..=MAX_LANES).contains(&lanes) {
            let problem = format!("must be from 1 to {MAX_LANES}");
            return Err(flag("--lanes", lanes, problem));
        }
        Ok(Self {
            role,
            peers,
            listen: parse_listen(args.listen.or(file.listen.map(Listen::into_text)))?,
            tun: check_ifname("--tun", args.tun.or(file.tun))?.unwrap_or(DEFAULT_TUN.into()),
            uplink: check_ifname("--uplink", args.uplink.or(file.uplink))?,
            max_flows,
            lanes,
            cipher: args.cipher.or(file.cipher).unwrap_or_default(),
            log_format: args.log_format.or(file.log_format).unwrap_or_default(),
            split: !(args.no_split || file.no_split),
            without: if args.without.is_empty() {
                file.without
            } else {
                args.without
            },
            rekey_after: parse_rekey_after(args.rekey_after.or(file.rekey_after))?,
            warnings,
        })
    }
}

/// The settings of `ipmoved nat`.
#[derive(Debug)]
pub struct NatSettings {
    /// What moved.
    pub moves: Vec<Move>,
    /// The new server, at most once of each family, and its port if that is another.
    pub to: Vec<(IpAddr, Option<u16>)>,
    /// Name of the TUN interface.
    pub tun: String,
    /// The interface clients' packets use, if it is not to be found.
    pub uplink: Option<String>,
    /// Most flows remembered.
    pub max_flows: u32,
    /// How log lines are written.
    pub log_format: LogFormat,
}

impl NatSettings {
    /// Makes sense of what was typed.
    pub fn new(args: NatArgs) -> Result<Self, ConfigError> {
        check_moves(&args.moves.iter().collect::<Vec<_>>())?;
        let mut to: Vec<(IpAddr, Option<u16>)> = Vec::new();
        for text in &args.to {
            let (ip, port) = parse_to(text)?;
            if to.iter().any(|(other, _)| other.is_ipv4() == ip.is_ipv4()) {
                let problem = "one address of each family is enough".into();
                return Err(flag("--to", text, problem));
            }
            to.push((ip, port));
        }
        for moved in &args.moves {
            let family = if moved.addr.is_ipv4() { "IPv4" } else { "IPv6" };
            let Some((ip, port)) = to
                .iter()
                .find(|(ip, _)| ip.is_ipv4() == moved.addr.is_ipv4())
            else {
                let problem = format!("there is no {family} address to translate it to; add --to");
                return Err(flag("--move", moved, problem));
            };
            if moved.addr == *ip {
                let problem = "is the new server's own address; give the one clients still use";
                return Err(flag("--move", moved, problem.into()));
            }
            let one_port =
                matches!(moved.ports.as_slice(), [range] if range.start() == range.end());
            if port.is_some() && !one_port {
                let problem = "--to names a port, so this has to name one too, as in 192.0.2.5:80";
                return Err(flag("--move", moved, problem.into()));
            }
        }
        // A way that nothing moves along would capture for nothing.
        to.retain(|(ip, _)| {
            args.moves
                .iter()
                .any(|moved| moved.addr.is_ipv4() == ip.is_ipv4())
        });
        Ok(Self {
            moves: args.moves,
            to,
            tun: check_ifname("--tun", args.tun)?.unwrap_or(DEFAULT_TUN.into()),
            uplink: check_ifname("--uplink", args.uplink)?,
            max_flows: check_max_flows(args.max_flows)?,
            log_format: args.log_format.unwrap_or_default(),
        })
    }
}

/// One peer as it was written.
struct PeerSettings {
    peer: Option<String>,
    psk: Option<(String, Zeroizing<String>)>,
    psk_file: Option<PathBuf>,
    moves: Vec<Move>,
    deliver_to: Vec<String>,
    deliver: Vec<String>,
}

impl PeerSettings {
    fn is_any(&self) -> bool {
        self.peer.is_some()
            || self.psk.is_some()
            || self.psk_file.is_some()
            || !self.moves.is_empty()
            || !self.deliver_to.is_empty()
            || !self.deliver.is_empty()
    }

    fn resolve(self, warnings: &mut Vec<String>) -> Result<PeerConfig, ConfigError> {
        if self.peer.is_none() && self.psk.is_none() && self.psk_file.is_none() {
            return Err(ConfigError::NoPeer("--psk-file FILE"));
        }
        for (name, values) in [
            ("--deliver-to", &self.deliver_to),
            ("--deliver", &self.deliver),
        ] {
            if !self.moves.is_empty() && !values.is_empty() {
                return Err(flag(
                    name,
                    values.join(" "),
                    "belongs on the new server; this one is the old server, since it is given --move"
                        .into(),
                ));
            }
        }
        Ok(PeerConfig {
            endpoint: self.peer.as_deref().map(parse_peer).transpose()?,
            keys: PeerKeys::derive(&match (self.psk, self.psk_file) {
                (Some((origin, text)), _) => text
                    .parse::<Psk>()
                    .map_err(|error| ConfigError::Psk { origin, error })?,
                (None, Some(path)) => read_psk(&path, warnings)?,
                (None, None) => return Err(ConfigError::NoPsk),
            }),
            moves: self.moves,
            deliver_to: parse_deliver_to(&self.deliver_to)?,
            deliver: parse_deliver(&self.deliver)?,
        })
    }
}

/// One a processor: a lane without packets costs nothing but its buffers and two threads that sleep. Two lanes on two processors
/// that client, router and both servers share carried four streams 1.2 times as fast as one lane, and
/// one stream as fast.
fn default_lanes() -> u8 {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    processors.clamp(1, MAX_DEFAULT_LANES) as u8
}

fn flag(flag: &'static str, value: impl ToString, problem: String) -> ConfigError {
    ConfigError::Flag {
        flag,
        value: value.to_string(),
        problem,
    }
}

fn parse_moves(texts: &OneOrMany) -> Result<Vec<Move>, ConfigError> {
    texts
        .as_slice()
        .iter()
        .map(|text| {
            text.parse()
                .map_err(|error| ConfigError::Move(text.clone(), error))
        })
        .collect()
}

/// Checks that hold between peers.
fn check_peers(peers: &[PeerConfig]) -> Result<(), ConfigError> {
    if peers.len() > MAX_PEERS {
        return Err(flag(
            "peers",
            peers.len(),
            format!("one daemon serves at most {MAX_PEERS} peers"),
        ));
    }
    check_moves(
        &peers
            .iter()
            .flat_map(|peer| &peer.moves)
            .collect::<Vec<_>>(),
    )?;
    let old = peers.iter().filter(|peer| !peer.moves.is_empty()).count();
    if old != 0 && old != peers.len() {
        return Err(flag(
            "move",
            "",
            "one daemon is either the old server for all its peers or the new one for all; \
             give every peer a `move`, or none"
                .into(),
        ));
    }
    for (index, a) in peers.iter().enumerate() {
        if peers[index + 1..].iter().any(|b| a.keys == b.keys) {
            return Err(flag(
                "psk",
                "",
                "two peers have the same key; give each its own (`ipmoved genpsk`)".into(),
            ));
        }
    }
    Ok(())
}

/// Seconds from one session to the next: no faster than an initiation is repeated, no slower than the
/// protocol has it.
fn parse_rekey_after(seconds: Option<u64>) -> Result<Option<Duration>, ConfigError> {
    match seconds {
        Some(wrong) if !(MIN_REKEY_AFTER..=MAX_REKEY_AFTER).contains(&wrong) => Err(flag(
            "--rekey-after",
            wrong,
            format!("must be from {MIN_REKEY_AFTER} to {MAX_REKEY_AFTER} seconds"),
        )),
        seconds => Ok(seconds.map(Duration::from_secs)),
    }
}

fn check_moves(moves: &[&Move]) -> Result<(), ConfigError> {
    if moves.len() > MAX_MOVES {
        return Err(ConfigError::TooManyMoves(moves.len()));
    }
    for (index, a) in moves.iter().enumerate() {
        if let Some(b) = moves[index + 1..].iter().find(|b| a.overlaps(b)) {
            return Err(ConfigError::Overlap((*a).clone(), (*b).clone()));
        }
    }
    Ok(())
}

fn check_max_flows(wanted: Option<u32>) -> Result<u32, ConfigError> {
    let max_flows = wanted.unwrap_or(DEFAULT_MAX_FLOWS);
    if (1..=MAX_MAX_FLOWS).contains(&max_flows) {
        Ok(max_flows)
    } else {
        Err(flag(
            "--max-flows",
            max_flows,
            format!("must be from 1 to {MAX_MAX_FLOWS}"),
        ))
    }
}

/// Reads `ADDR[:PORT]` of `ipmoved nat --to`.
fn parse_to(text: &str) -> Result<(IpAddr, Option<u16>), ConfigError> {
    let (ip, port) = match (text.parse::<IpAddr>(), text.parse::<SocketAddr>()) {
        (Ok(ip), _) => (ip, None),
        (_, Ok(addr)) => (addr.ip(), Some(addr.port())),
        _ => {
            return Err(flag(
                "--to",
                text,
                "is not an IP address; write 198.51.100.2, 198.51.100.2:8080 or [2001:db8::2]:8080"
                    .into(),
            ));
        }
    };
    if ip.is_unspecified() || ip.is_multicast() || ip.is_loopback() || port == Some(0) {
        return Err(flag(
            "--to",
            text,
            "is not an address another server can be reached at".into(),
        ));
    }
    Ok((ip, port))
}

/// Reads `HOST[:PORT]`; a bare IPv6 address needs no brackets.
fn parse_peer(text: &str) -> Result<PeerAddr, ConfigError> {
    let wrong = |problem: &str| flag("--peer", text, problem.into());
    if let Ok(ip) = text.parse::<IpAddr>() {
        return check_peer_ip(ip, DEFAULT_PORT, text);
    }
    if let Ok(addr) = text.parse::<SocketAddr>() {
        return check_peer_ip(addr.ip(), addr.port(), text);
    }
    if let Some(inner) = text
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
        && let Ok(ip) = inner.parse::<Ipv6Addr>()
    {
        return check_peer_ip(ip.into(), DEFAULT_PORT, text);
    }
    let (host, port) = match text.split_once(':') {
        None => (text, DEFAULT_PORT),
        Some((host, port)) => (
            host,
            port.parse()
                .ok()
                .filter(|&port| port != 0)
                .ok_or_else(|| wrong("the part behind the colon is not a port from 1 to 65535"))?,
        ),
    };
    let is_name = !host.is_empty()
        && host.len() <= 253
        && host
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
        && host.bytes().any(|b| b.is_ascii_alphabetic());
    if !is_name {
        return Err(wrong(
            "is neither an IP address nor a host name; write 198.51.100.2, [2001:db8::2]:51850 or new.example.net",
        ));
    }
    Ok(PeerAddr {
        host: host.into(),
        port,
    })
}

fn check_peer_ip(ip: IpAddr, port: u16, text: &str) -> Result<PeerAddr, ConfigError> {
    if ip.is_unspecified() || ip.is_multicast() || port == 0 {
        return Err(flag(
            "--peer",
            text,
            "is not an address a server can be reached at".into(),
        ));
    }
    Ok(PeerAddr {
        host: ip.to_string(),
        port,
    })
}

fn parse_listen(text: Option<String>) -> Result<(Option<IpAddr>, u16), ConfigError> {
    let Some(text) = text else {
        return Ok((None, DEFAULT_PORT));
    };
    let wrong = || {
        flag(
            "--listen",
            &text,
            "is not [ADDR:]PORT; write 51850, 192.0.2.1:51850 or [2001:db8::1]:51850".into(),
        )
    };
    let (ip, port) = match text.parse::<SocketAddr>() {
        Ok(addr) => (Some(addr.ip()), addr.port()),
        Err(_) if text.bytes().all(|b| b.is_ascii_digit()) => {
            (None, text.parse::<u16>().map_err(|_| wrong())?)
        }
        Err(_) => return Err(wrong()),
    };
    if port == 0 || ip.is_some_and(|ip| ip.is_multicast()) {
        return Err(wrong());
    }
    Ok((ip.filter(|ip| !ip.is_unspecified() || ip.is_ipv4()), port))
}

fn parse_deliver_to(texts: &[String]) -> Result<DeliverTo, ConfigError> {
    let wrong = |text: &str, problem: &str| flag("--deliver-to", text, problem.into());
    if texts.iter().any(|text| text == "keep") {
        return match texts {
            [_] => Ok(DeliverTo::Keep),
            _ => Err(wrong(&texts.join(" "), "`keep` stands alone")),
        };
    }
    let (mut v4, mut v6) = (None, None);
    for text in texts {
        let ip = text.parse::<IpAddr>().map_err(|_| {
            wrong(
                text,
                "is not an IP address of this server, as in 198.51.100.2, nor `keep`",
            )
        })?;
        if ip.is_unspecified() || ip.is_multicast() || ip.is_loopback() {
            return Err(wrong(
                text,
                "clients' packets cannot be delivered there; give an address of this server's network interface",
            ));
        }
        let twice = match ip {
            IpAddr::V4(ip) => v4.replace(ip).is_some(),
            IpAddr::V6(ip) => v6.replace(ip).is_some(),
        };
        if twice {
            return Err(wrong(text, "one address of each family is enough"));
        }
    }
    Ok(DeliverTo::Addresses { v4, v6 })
}

/// Reads every `MOVED:PORT[/tcp|/udp]=ADDR:PORT`; no packet may belong to two of them.
fn parse_deliver(texts: &[String]) -> Result<Vec<PortMap>, ConfigError> {
    if texts.len() > MAX_PORT_MAPS {
        return Err(flag(
            "--deliver",
            texts.len(),
            format!("at most {MAX_PORT_MAPS} ports can be delivered elsewhere"),
        ));
    }
    let mut maps: Vec<(Move, PortMap)> = Vec::new();
    for text in texts {
        let wrong = |problem: String| flag("--deliver", text, problem);
        let Some((from, to)) = text.split_once('=') else {
            return Err(wrong(
                "says not where to; write 192.0.2.5:80=198.51.100.2:8080".into(),
            ));
        };
        let moved: Move = from.parse().map_err(|error| wrong(format!("{error}")))?;
        let port = match moved.ports.as_slice() {
            [range] if range.start() == range.end() => *range.start(),
            _ => {
                return Err(wrong(
                    "has to name one port of a moved address on the left, as in 192.0.2.5:80"
                        .into(),
                ));
            }
        };
        let to: SocketAddr = to.parse().map_err(|_| {
            wrong(format!(
                "`{to}` is not an address and port of this server, as in 198.51.100.2:8080 or [2001:db8::2]:8080"
            ))
        })?;
        let host = to.ip();
        if to.port() == 0 || host.is_unspecified() || host.is_multicast() || host.is_loopback() {
            return Err(wrong(
                "clients' packets cannot be delivered there; give an address of this server's network interface, and a port"
                    .into(),
            ));
        }
        if host.is_ipv4() != moved.addr.is_ipv4() {
            return Err(wrong(
                "joins IPv4 with IPv6; both have to be the same".into(),
            ));
        }
        if let Some((other, _)) = maps.iter().find(|(other, _)| other.overlaps(&moved)) {
            return Err(wrong(format!("{other} is delivered elsewhere already")));
        }
        let map = PortMap {
            transport: moved.transport,
            moved: moved.addr,
            port,
            to: host,
            to_port: to.port(),
        };
        maps.push((moved, map));
    }
    Ok(maps.into_iter().map(|(_, map)| map).collect())
}

fn check_ifname(name: &'static str, value: Option<String>) -> Result<Option<String>, ConfigError> {
    let Some(value) = value else { return Ok(None) };
    let good = !value.is_empty()
        && value.len() <= MAX_IFNAME
        && value != "."
        && value != ".."
        && value
            .bytes()
            .all(|b| b.is_ascii_graphic() && !matches!(b, b'/' | b':' | b'%'));
    if good {
        Ok(Some(value))
    } else {
        Err(flag(
            name,
            value,
            format!("is not an interface name (1 to {MAX_IFNAME} letters, digits, - . _)"),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    const KEY: &str = "AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA=";

    fn config(line: &str) -> Result<Config, String> {
        config_with(line, "")
    }

    fn config_with(line: &str, file: &str) -> Result<Config, String> {
        let words = ["ipmoved"].into_iter().chain(line.split_whitespace());
        let cli =
            crate::settings::args::Cli::try_parse_from(words).map_err(|error| error.to_string())?;
        let file = FileConfig::parse(file)?;
        Config::join(cli.run, file, None, Vec::new()).map_err(|error| error.to_string())
    }

    #[test]
    fn the_two_lines_of_the_contract() {
        let a = config(&format!("--peer 198.51.100.2 --psk {KEY} --move 192.0.2.5")).unwrap();
        assert_eq!(a.role, Role::Old);
        assert_eq!(a.peers[0].moves[0].to_string(), "192.0.2.5");
        assert_eq!(a.listen, (None, DEFAULT_PORT));
        assert_eq!(a.tun, "ipmoved0");
        let b = config(&format!("--peer 192.0.2.1 --psk {KEY}")).unwrap();
        assert_eq!(b.role, Role::New);
        assert_eq!(
            b.peers[0].endpoint.clone().unwrap().to_string(),
            "192.0.2.1:51850"
        );
    }

    #[test]
    fn peers_are_read_in_every_form() {
        let peer = |text: &str| parse_peer(text).map(|peer| peer.to_string());
        assert_eq!(peer("2001:db8::2").unwrap(), "[2001:db8::2]:51850");
        assert_eq!(peer("[2001:db8::2]").unwrap(), "[2001:db8::2]:51850");
        assert_eq!(peer("[2001:db8::2]:7").unwrap(), "[2001:db8::2]:7");
        assert_eq!(peer("new.example.net:7").unwrap(), "new.example.net:7");
        for wrong in [
            "", ":7", "a:0", "a:x", "a:70000", "0.0.0.0", "a b", "1.2.3", "ff02::1", "http://a",
        ] {
            assert!(peer(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn each_mistake_is_named_with_its_remedy() {
        let key = format!("--psk {KEY}");
        for (line, says) in [
            (String::new(), "--peer"),
            ("--peer 192.0.2.1".into(), "--psk-file"),
            ("--peer 192.0.2.1 --psk abc".into(), "--psk"),
            ("--peer 192.0.2.1 --psk-file /nonexistent".into(), "genpsk"),
            (
                format!("{key} --peer 192.0.2.1 --move 192.0.2.5 --move 192.0.2.5:80"),
                "overlap",
            ),
            (
                format!("{key} --peer 192.0.2.1 --move www.example.net"),
                "is a name",
            ),
            (
                format!("{key} --peer 192.0.2.1 --move 192.0.2.5 --deliver-to keep"),
                "new server",
            ),
            (
                format!("{key} --peer 192.0.2.1 --deliver-to 127.0.0.1"),
                "--deliver-to",
            ),
            (format!("{key} --peer 192.0.2.1 --listen 0"), "--listen"),
            (format!("{key} --peer 192.0.2.1 --listen 70000"), "--listen"),
            (format!("{key} --peer 192.0.2.1 --tun a/b"), "--tun"),
            (
                format!("{key} --peer 192.0.2.1 --tun sixteen-letters-x"),
                "--tun",
            ),
            (
                format!("{key} --peer 192.0.2.1 --max-flows 0"),
                "--max-flows",
            ),
            (format!("{key} --peer 192.0.2.1 --lanes 0"), "--lanes"),
            (format!("{key} --peer 192.0.2.1 --lanes 65"), "--lanes"),
            (format!("{key} --peer 192.0.2.1 --cipher des"), "cipher"),
        ] {
            let error = config(&line).unwrap_err();
            assert!(error.contains(says), "{line}: {error}");
        }
    }

    fn nat(line: &str) -> Result<NatSettings, String> {
        let words = ["ipmoved", "nat"]
            .into_iter()
            .chain(line.split_whitespace());
        let cli =
            crate::settings::args::Cli::try_parse_from(words).map_err(|error| error.to_string())?;
        match cli.command {
            Some(crate::settings::args::Command::Nat(args)) => {
                NatSettings::new(args).map_err(|error| error.to_string())
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn way_one_has_one_line_too() {
        let good = nat("--move 192.0.2.5 --to 198.51.100.2 --to 2001:db8::2").unwrap();
        assert_eq!(good.to, [("198.51.100.2".parse().unwrap(), None)]);
        let good = nat("--move [2001:db8::5]:80/tcp --to [2001:db8::2]:8080").unwrap();
        assert_eq!(good.to, [("2001:db8::2".parse().unwrap(), Some(8080))]);
        for (line, says) in [
            ("--move 192.0.2.5", "--to"),
            ("--to 198.51.100.2", "--move"),
            ("--move 192.0.2.5 --to www", "not an IP address"),
            ("--move 192.0.2.5 --to 127.0.0.1", "can be reached"),
            ("--move 192.0.2.5 --to 2001:db8::2", "no IPv4 address"),
            ("--move 192.0.2.5 --to 192.0.2.5", "own address"),
            ("--move 192.0.2.5 --to 198.51.100.2:80", "names a port"),
            (
                "--move 192.0.2.5 --move 192.0.2.5:1 --to 198.51.100.2",
                "overlap",
            ),
            (
                "--move 192.0.2.5 --to 198.51.100.2 --to 198.51.100.3",
                "each family",
            ),
            (
                "--move 192.0.2.5 --to 198.51.100.2 --max-flows 0",
                "--max-flows",
            ),
        ] {
            let error = nat(line).unwrap_err();
            assert!(error.contains(says), "{line}: {error}");
        }
    }

    #[test]
    fn a_port_may_be_delivered_elsewhere() {
        let line = format!("--peer 192.0.2.1 --psk {KEY}");
        let read = |more: &str| config(&format!("{line} {more}"));
        let good = read(
            "--deliver 192.0.2.5:80=198.51.100.2:8080 --deliver [2001:db8::5]:53/udp=[2001:db8::2]:5353",
        )
        .unwrap();
        let shown: Vec<String> = (good.peers[0].deliver.iter().map(ToString::to_string)).collect();
        assert_eq!(
            shown,
            [
                "192.0.2.5:80=198.51.100.2:8080",
                "[2001:db8::5]:53/udp=[2001:db8::2]:5353"
            ]
        );
        let file = "deliver = [\"192.0.2.5:80/tcp=198.51.100.2:8080\"]";
        assert_eq!(config_with(&line, file).unwrap().peers[0].deliver.len(), 1);
        for (text, says) in [
            ("192.0.2.5:80", "where to"),
            ("192.0.2.5=198.51.100.2:80", "one port"),
            ("192.0.2.5:80-81=198.51.100.2:80", "one port"),
            ("192.0.2.5:0=198.51.100.2:80", "not a port"),
            ("192.0.2.5:80=198.51.100.2", "address and port"),
            ("192.0.2.5:80=198.51.100.2:0", "cannot be delivered"),
            ("192.0.2.5:80=127.0.0.1:80", "cannot be delivered"),
            ("192.0.2.5:80=[2001:db8::2]:80", "IPv6"),
            (
                "192.0.2.5:80=198.51.100.2:1 --deliver 192.0.2.5:80/udp=198.51.100.2:2",
                "already",
            ),
        ] {
            let error = read(&format!("--deliver {text}")).unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
        let old = format!("{line} --move 192.0.2.5 --deliver 192.0.2.5:80=198.51.100.2:8080");
        assert!(config(&old).unwrap_err().contains("new server"));
    }

    #[test]
    fn the_file_has_the_flags_names_and_flags_win() {
        let file = format!(
            "peer = \"192.0.2.1\"\npsk = \"{KEY}\"\nmove = \"192.0.2.5\"\nlisten = 7\nmax-flows = 5\n"
        );
        let config = config_with("--max-flows 6", &file).unwrap();
        assert_eq!((config.max_flows, config.listen.1), (6, 7));
        assert_eq!(config.role, Role::Old);
        let error = config_with("", "pear = 1\n").unwrap_err();
        assert!(
            error.contains("line 1") && error.contains("pear"),
            "{error}"
        );
    }

    #[test]
    fn several_peers_each_with_a_key_of_its_own() {
        let other = "AgIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA=";
        let file = |second: &str| {
            format!(
                "[[peers]]\npeer = \"192.0.2.1\"\npsk = \"{KEY}\"\n[[peers]]\npsk = \"{second}\"\n"
            )
        };
        assert_eq!(config_with("", &file(other)).unwrap().peers.len(), 2);
        let error = config_with("", &file(KEY)).unwrap_err();
        assert!(error.contains("same key"), "{error}");
    }
}
