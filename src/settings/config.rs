//! What the settings mean: those of one daemon, complete and consistent.
//!
//! Merges flags, environment and configuration file, and checks everything that can be checked
//! without touching the system. Each mistake is told in one line, with what to do about it.
//! `values`, and the types that share its work, decide what a single value may be.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::channel::session::{CipherPolicy, PeerKeys, PskError};
use crate::channel::tunnel::{Announcement, MAX_ANNOUNCEMENT};
use crate::model::accept::{Accept, MAX_ACCEPTS};
use crate::model::delivery_map::DeliveryMap;
use crate::model::mode::Settled;
use crate::model::moved::{MAX_MOVES, MAX_NAT_MOVES, MAX_PORT_SETS, Move};
use crate::model::outgoing::{AllowOutgoing, ByPort, MAX_ALLOW_OUTGOING, MAX_OUTGOING, Outgoing};
use crate::model::peer::{MAX_PEERS, PeerId, Role};
use crate::model::prefix::Prefix;
use crate::model::runtime::{BASE_DIR, STATE_DIR};
use crate::model::scopes::{self, Scopes};
use crate::settings::args::{DaemonArgs, LogFormat, NatArgs, PeerArgs, RunArgs, Without};
use crate::settings::file::{File, Mistake, Place, Places};
use crate::settings::files::Files;
use crate::settings::psk;
use crate::settings::values::{Bounded, DeliverTo, Listen, MetricsAddr, NewServer, PeerAddr};

/// A key was typed.
pub const KEY_IS_SEEN: &str =
    "the key on the command line can be read by every user of this host; use --psk-file";

/// The tunnel interface's name unless told otherwise.
pub const DEFAULT_TUN: &str = "ipmoved0";

/// Flows remembered unless told otherwise: a busy service's clients of a day, at most 128 MB.
pub const DEFAULT_MAX_FLOWS: u32 = 1_000_000;

/// Most lanes unless told otherwise.
const MAX_DEFAULT_LANES: u8 = 8;

/// Most `--deliver` of one peer: each is held against all others, and for replies that belong to no
/// flow they are searched one by one.
pub const MAX_DELIVERY_MAPS: usize = 256;

/// Most `--clients-from` of one peer: they are searched one by one for every new flow that comes
/// from a network of the new server's own.
pub const MAX_CLIENTS_FROM: usize = 256;

/// The environment variable that moves the runtime directory, for several installations on one
/// host.
pub const RUNTIME_DIR_VARIABLE: &str = "IPMOVED_RUNTIME_DIR";

/// The environment variable that moves the state directory where no flag does.
pub const STATE_DIR_VARIABLE: &str = "IPMOVED_STATE_DIR";

/// Days for which clients are remembered unless told otherwise: a quarter of a year, in which who
/// comes once a month comes three times.
const DEFAULT_KEEP: i64 = 90;

/// Where the daemon keeps what outlives it: what was given, the variable, or the default.
pub fn state_dir(given: Option<PathBuf>) -> PathBuf {
    let variable = || std::env::var_os(STATE_DIR_VARIABLE).filter(|dir| !dir.is_empty());
    given.unwrap_or_else(|| variable().map_or_else(|| STATE_DIR.into(), PathBuf::from))
}

/// Where the daemon keeps its socket, lock and journal.
pub fn runtime_dir() -> PathBuf {
    std::env::var_os(RUNTIME_DIR_VARIABLE)
        .filter(|dir| !dir.is_empty())
        .map_or_else(|| BASE_DIR.into(), PathBuf::from)
}

/// The settings of one daemon.
#[derive(Clone, Debug)]
pub struct Config {
    /// Old if anything was moved away from here.
    pub role: Role,
    /// The other servers; at least one.
    pub peers: Vec<PeerConfig>,
    /// Where to listen.
    pub listen: Listen,
    /// Name of the tunnel interface.
    pub tun: String,
    /// The interface that clients' packets use; `None` finds it from addresses and routes.
    pub uplink: Option<String>,
    /// Most flows remembered.
    pub max_flows: u32,
    /// Lanes that carry packets; each is a thread, or two while it is busy.
    pub lanes: u8,
    /// Which ciphers may be used.
    pub cipher: CipherPolicy,
    /// Who answers new connections of a move that was not there before (old server).
    pub start: Settled,
    /// Where the daemon keeps what outlives a boot.
    pub state_dir: PathBuf,
    /// How log lines are written.
    pub log_format: LogFormat,
    /// Where metrics are served, if they are.
    pub metrics: Option<MetricsAddr>,
    /// How who still comes is recorded; `None` if it is not (old server).
    pub client_log: Option<ClientLog>,
    /// Do not split packets that are too big for one datagram.
    pub no_split: bool,
    /// Offloads to do without.
    pub without: Vec<Without>,
    /// How long a session is used before the next one is asked for; `None` as the protocol says.
    pub rekey_after: Option<Duration>,
    /// What an earlier daemon has moved, and these settings do not: this server answers what is
    /// new, and what the new server has goes on there. The state directory says so, no setting.
    pub leaving: Vec<(PeerId, Move)>,
    /// Warnings about these settings, for an administrator.
    pub warnings: Vec<String>,
    /// What was typed, to make settings of again when the file has changed.
    pub given: Arc<RunArgs>,
}

/// How who still comes is recorded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ClientLog {
    /// Days for which clients are remembered.
    pub keep: i64,
    /// The names that they ask for are, too.
    pub names: bool,
}

/// One peer's settings.
#[derive(Clone, PartialEq, Debug)]
pub struct PeerConfig {
    /// Where it is; with `None` this side waits until the peer calls.
    pub endpoint: Option<PeerAddr>,
    /// The keys derived from the one that is shared with it, which itself is gone by now.
    pub keys: PeerKeys,
    /// The moves to it (old server).
    pub moves: Vec<Move>,
    /// Where to deliver what moved from it (new server).
    pub deliver_to: DeliverTo,
    /// What is delivered elsewhere (new server).
    pub deliver: Vec<DeliveryMap>,
    /// What it may move here; nothing accepts everything (new server).
    pub accept: Vec<Accept>,
    /// Networks of this server's own that its clients may come from all the same (new server).
    pub clients_from: Vec<Prefix>,
    /// What may leave from its moved addresses that answers nobody; nothing lets nothing out (new
    /// server).
    pub outgoing: Vec<Outgoing>,
    /// What it may begin; nothing lets nothing out (old server).
    pub allow_outgoing: Vec<AllowOutgoing>,
}

/// Why the settings were refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Neither peer nor key.
    #[error(
        "{0} is missing: give the other server's address or name, \
         and the key that both share (--psk-file FILE)"
    )]
    NoPeer(Setting),
    /// No key.
    #[error(
        "{0} is missing: give the file with the key that both servers share \
         (`ipmoved genpsk` makes one)"
    )]
    NoPsk(Setting),
    /// A key that is not valid.
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
        /// What the system said.
        error: std::io::Error,
        /// What to do.
        hint: &'static str,
    },
    /// A configuration file that is not well-formed, or one value in it.
    #[error("{path}: {mistake}", path = path.display())]
    Toml {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        mistake: Mistake,
    },
    /// Two moves that overlap: some packet would belong to both.
    #[error("{0} and {1} overlap: a packet can only move once")]
    Overlap(Move, Move),
    /// Too many moves.
    #[error("{0} moves are more than {MAX_MOVES}: name prefixes, as in 192.0.2.0/28")]
    TooManyMoves(usize),
    /// More different sets of ports than [`MAX_PORT_SETS`].
    #[error(
        "{0} different sets of ports of the moved addresses are more than {MAX_PORT_SETS}: \
         let more of them have the same ports, or move whole addresses"
    )]
    TooManyPortSets(usize),
    /// More than an announcement holds.
    #[error(
        "what moves takes {0} bytes to tell the new server, more than {MAX_ANNOUNCEMENT}: \
         name prefixes, and fewer ranges of ports"
    )]
    TooMuchToTell(usize),
    /// What `nat` cannot do.
    #[error(
        "`ipmoved nat` moves single addresses only, {MAX_NAT_MOVES} at most; \
         with ipmoved on the new server as well, prefixes and more addresses can move"
    )]
    NatMoves,
    /// Too many peers.
    #[error("{0} peers are more than {MAX_PEERS}, the most that one daemon serves")]
    TooManyPeers(usize),
    /// Too many connections that are chosen by port.
    #[error("{0} `outgoing` are more than {MAX_OUTGOING}: name lists and ranges of ports")]
    TooManyOutgoing(usize),
    /// The same ports leave from two addresses.
    #[error(
        "--outgoing {} and {} overlap: a connection can only leave from one address of its \
         family; name it with as=ADDR in both",
        .0.0,
        .0.1
    )]
    OutgoingTwice(Box<(ByPort, ByPort)>),
    /// Peers that moves go to beside peers that moves come from.
    #[error(
        "one daemon is either the old server for all its peers or the new one for all; \
         give every peer a `move`, or none"
    )]
    BothRoles,
    /// Two peers with the same key.
    #[error("two peers have the same key; give each its own (`ipmoved genpsk`)")]
    SameKey,
    /// A setting that does not go with the others.
    #[error("{setting}: {problem}")]
    Setting {
        /// The setting.
        setting: Setting,
        /// What is wrong, and what would be right.
        problem: String,
    },
}

impl ConfigError {
    /// Whether root may read what could not be read.
    pub fn wants_root(&self) -> bool {
        matches!(self, Self::File { error, .. } if wants_root(error))
    }
}

/// Whether that was refused to somebody who is not root.
pub(super) fn wants_root(error: &std::io::Error) -> bool {
    let denied = error.kind() == std::io::ErrorKind::PermissionDenied;
    denied && !rustix::process::geteuid().is_root()
}

/// A setting, named as whoever gave it finds it again: a flag, or a key of the file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Setting {
    path: Option<PathBuf>,
    within: Within,
    name: &'static str,
}

/// Where in the file a setting is, or would be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Within {
    /// It was typed.
    Nowhere,
    /// Somewhere at its top.
    Top,
    /// In the `[[peers]]` that begins on this line.
    Table(usize),
    /// Here.
    Place(Place),
}

/// Where the settings of the daemon, or of a peer, were given.
#[derive(Clone, Debug, Default)]
struct Origin {
    /// Keys whose value was typed.
    typed: Vec<&'static str>,
    /// The file, if they, or some, are from there.
    path: Option<PathBuf>,
    /// The line on which its `[[peers]]` begins, if it has one.
    table: Option<usize>,
    /// Where the keys stand.
    places: Places,
    /// Whether anything of the kind is in the file.
    some: bool,
}

impl Origin {
    /// At the top of the file, but for what was `typed`.
    fn top(typed: Vec<&'static str>, file: &File) -> Self {
        Self {
            some: !file.peer.is_empty(),
            typed,
            path: Some(file.path.clone()).filter(|path| !path.as_os_str().is_empty()),
            table: None,
            places: file.places.clone(),
        }
    }

    /// Whether a key that is not there would be written into the file.
    fn is_file(&self) -> bool {
        self.path.is_some() && self.typed.is_empty() && self.some
    }

    fn setting(&self, name: &'static str) -> Setting {
        self.place(name, self.places.key(name))
    }

    /// The value with this number among those of a key.
    fn value(&self, name: &'static str, number: usize) -> Setting {
        self.place(name, self.places.value(name, number))
    }

    fn place(&self, name: &'static str, place: Option<Place>) -> Setting {
        let typed = self.typed.contains(&name) || place.is_none() && !self.is_file();
        let within = match (place, self.table) {
            _ if typed => Within::Nowhere,
            (Some(place), _) => Within::Place(place),
            (None, Some(line)) => Within::Table(line),
            (None, None) => Within::Top,
        };
        Setting {
            path: self.path.clone(),
            within,
            name,
        }
    }

    fn refuse(&self, name: &'static str, problem: impl ToString) -> ConfigError {
        ConfigError::Setting {
            setting: self.setting(name),
            problem: problem.to_string(),
        }
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name;
        let Some(path) = self.path.as_ref().map(|path| path.display()) else {
            return write!(f, "--{name}");
        };
        match self.within {
            Within::Nowhere => write!(f, "--{name}"),
            Within::Top => write!(f, "{path}: {name}"),
            Within::Table(line) => write!(f, "{path}: [[peers]] on line {line}: {name}"),
            Within::Place((line, column)) => {
                write!(f, "{path}: line {line}, column {column}: {name}")
            }
        }
    }
}

impl Config {
    /// Merges what was typed, the environment and the configuration file.
    ///
    /// # Errors
    /// [`ConfigError`] says which setting is wrong, and what would be right.
    pub fn new(mut args: RunArgs) -> Result<Self, ConfigError> {
        let mut warnings = Vec::new();
        if args.peer.psk.is_some() {
            warnings.push(KEY_IS_SEEN.into());
        } else if args.peer.psk_file.is_none() {
            // A flag wins over the variable, the variable over the file.
            args.peer.psk = psk::from_variable()?;
        }
        Self::with(&Arc::new(args), &Files::on_disk(), warnings)
    }

    /// Makes settings again of what was typed, and of the files as they are now.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub(crate) fn again(given: &Arc<RunArgs>, files: &Files) -> Result<Self, ConfigError> {
        Self::with(given, files, Vec::new())
    }

    fn with(
        given: &Arc<RunArgs>,
        files: &Files,
        mut warnings: Vec<String>,
    ) -> Result<Self, ConfigError> {
        let file = match &given.config {
            Some(path) => File::read(path, files, &mut warnings)?,
            None => File::default(),
        };
        Self::merge(given, file, files, warnings)
    }

    /// Lets flags win over the file.
    pub(crate) fn merge(
        given: &Arc<RunArgs>,
        file: File,
        files: &Files,
        mut warnings: Vec<String>,
    ) -> Result<Self, ConfigError> {
        let args = RunArgs::clone(given);
        // A mistake is named where it was made.
        let of_daemon = Origin::top(args.daemon.named(), &file);
        let origin = Origin::top(args.peer.named(), &file);
        for places in [&file.places]
            .into_iter()
            .chain(file.peers.iter().map(|it| &it.places))
        {
            if let (Some(_), Some(at)) = (places.key("psk-file"), places.key("psk")) {
                let message = "psk: the same peer has a psk-file; one of them is enough".into();
                let at = Some(at);
                let path = file.path.clone();
                let mistake = Mistake { at, message };
                return Err(ConfigError::Toml { path, mistake });
            }
        }
        let top = args.peer.over(file.peer);
        check_peer(&top, &origin)?;
        let mut peers = Vec::new();
        let mut origins = Vec::new();
        if file.peers.is_empty() || !top.is_empty() {
            peers.push(PeerConfig::new(top, &origin, files, &mut warnings)?);
            origins.push(origin);
        }
        for table in file.peers {
            let origin = Origin {
                typed: Vec::new(),
                path: Some(file.path.clone()),
                table: Some(table.line),
                places: table.places,
                some: true,
            };
            peers.push(PeerConfig::new(table.peer, &origin, files, &mut warnings)?);
            origins.push(origin);
        }
        check_peers(&peers, &origins)?;
        let daemon = args.daemon.over(file.daemon);
        let origin = of_daemon;
        let role = if peers.iter().any(|peer| !peer.moves.is_empty()) {
            Role::Old
        } else {
            Role::New
        };
        if daemon.start.is_some() && role == Role::New {
            let problem = "belongs on the old server, beside `move`; who answers is decided there";
            return Err(origin.refuse("start", problem));
        }
        if let Some(dir) = daemon.state_dir.as_ref().filter(|dir| !dir.is_absolute()) {
            let problem = format!(
                "`{}` does not begin with a slash; name the whole path, as in {STATE_DIR}",
                dir.display()
            );
            return Err(origin.refuse("state-dir", problem));
        }
        let client_log = check_client_log(&daemon, role, &origin)?;
        Ok(Self {
            role,
            peers,
            listen: daemon.listen.unwrap_or_default(),
            tun: daemon.tun.map_or(DEFAULT_TUN.into(), String::from),
            uplink: daemon.uplink.map(String::from),
            max_flows: daemon.max_flows.map_or(DEFAULT_MAX_FLOWS, Bounded::get),
            lanes: daemon
                .lanes
                .map_or_else(default_lanes, |lanes| lanes.get() as u8),
            cipher: daemon.cipher.unwrap_or_default(),
            start: daemon.start.unwrap_or_default().into(),
            log_format: daemon.log_format.unwrap_or_default(),
            metrics: daemon.metrics,
            state_dir: state_dir(daemon.state_dir),
            client_log,
            no_split: daemon.no_split,
            without: daemon.without,
            rekey_after: daemon
                .rekey_after
                .map(|seconds| Duration::from_secs(seconds.get().into())),
            leaving: Vec::new(),
            warnings,
            given: Arc::clone(given),
        })
    }
}

impl PeerConfig {
    fn new(
        given: PeerArgs,
        origin: &Origin,
        files: &Files,
        warnings: &mut Vec<String>,
    ) -> Result<Self, ConfigError> {
        if given.peer.is_none() && given.psk.is_none() && given.psk_file.is_none() {
            return Err(ConfigError::NoPeer(origin.setting("peer")));
        }
        let deliver_to = check_peer(&given, origin)?;
        if !given.outgoing.is_empty() && given.accept.is_empty() {
            warnings.push(format!(
                "{}: programs here can be bound to a moved address only if the settings say which \
                 addresses may move here: add --accept with the address, as in --accept 192.0.2.5",
                origin.setting("outgoing")
            ));
        }
        let psk = match (given.psk, given.psk_file) {
            (Some(psk), _) => psk,
            (None, Some(path)) => psk::read(&path, files, warnings)?,
            (None, None) => return Err(ConfigError::NoPsk(origin.setting("psk-file"))),
        };
        Ok(Self {
            endpoint: given.peer,
            keys: PeerKeys::derive(&psk),
            moves: given.moves,
            deliver_to,
            deliver: given.deliver,
            accept: given.accept,
            clients_from: given.clients_from,
            outgoing: given.outgoing,
            allow_outgoing: given.allow_outgoing,
        })
    }
}

/// Checks the settings of one peer against each other; returns where it delivers.
fn check_peer(given: &PeerArgs, origin: &Origin) -> Result<DeliverTo, ConfigError> {
    for (name, is_given) in [
        ("deliver-to", !given.deliver_to.is_empty()),
        ("deliver", !given.deliver.is_empty()),
        ("accept", !given.accept.is_empty()),
        ("clients-from", !given.clients_from.is_empty()),
        ("outgoing", !given.outgoing.is_empty()),
    ] {
        if is_given && !given.moves.is_empty() {
            let problem = "belongs on the new server; this one is the old server, \
                           since `move` is given";
            return Err(origin.refuse(name, problem));
        }
    }
    if !given.allow_outgoing.is_empty() && given.moves.is_empty() {
        let problem = "belongs on the old server, beside `move`; on the new one it is `outgoing`";
        return Err(origin.refuse("allow-outgoing", problem));
    }
    for (name, given, most, what) in [
        (
            "deliver",
            given.deliver.len(),
            MAX_DELIVERY_MAPS,
            "are more than can be delivered elsewhere; name prefixes",
        ),
        (
            "accept",
            given.accept.len(),
            MAX_ACCEPTS,
            "are more than one peer can have; name prefixes and ranges of ports",
        ),
        (
            "clients-from",
            given.clients_from.len(),
            MAX_CLIENTS_FROM,
            "are more than one peer can have; name shorter prefixes",
        ),
        (
            "outgoing",
            given.outgoing.len(),
            MAX_OUTGOING,
            "are more than a server can have; name lists and ranges of ports",
        ),
        (
            "allow-outgoing",
            given.allow_outgoing.len(),
            MAX_ALLOW_OUTGOING,
            "are more than one peer can have; name lists and ranges of ports",
        ),
    ] {
        if given > most {
            let problem = format!("{given} {what} (at most {most})");
            return Err(origin.refuse(name, problem));
        }
    }
    for (index, a) in given.deliver.iter().enumerate() {
        if let Some(b) = given.deliver[..index].iter().find(|b| a.overlaps(b)) {
            let problem = format!("`{a}`: {b} already says where that is delivered");
            return Err(ConfigError::Setting {
                setting: origin.value("deliver", index),
                problem,
            });
        }
    }
    let deliver_to = DeliverTo::all(&given.deliver_to);
    let deliver_to = deliver_to.map_err(|error| origin.refuse("deliver-to", error))?;
    if deliver_to == DeliverTo::Keep && given.accept.is_empty() {
        let problem = format!(
            "`keep` puts the addresses that the old server names on this server, so say which \
             these may be: add {}, with the address that has moved",
            if origin.is_file() {
                "accept = [\"192.0.2.5\"]"
            } else {
                "--accept 192.0.2.5"
            }
        );
        return Err(origin.refuse("deliver-to", problem));
    }
    Ok(deliver_to)
}

/// Checks how who still comes is recorded, which is the old server's business.
fn check_client_log(
    given: &DaemonArgs,
    role: Role,
    origin: &Origin,
) -> Result<Option<ClientLog>, ConfigError> {
    let given_on_new = [
        ("keep", given.keep.is_some()),
        ("no-client-names", given.no_client_names),
        ("no-client-log", given.no_client_log),
    ];
    let given_on_new = given_on_new.into_iter().find(|(_, given)| *given);
    if let Some((name, _)) = given_on_new.filter(|_| role == Role::New) {
        let problem = "belongs on the old server, beside `move`: it records who still comes";
        return Err(origin.refuse(name, problem));
    }
    let keep = match given.keep.map(|keep| keep.get().as_secs()) {
        Some(seconds) if seconds % 86_400 != 0 => {
            let problem = "clients are remembered for whole days; write 90d or 4w";
            return Err(origin.refuse("keep", problem));
        }
        Some(seconds) => (seconds / 86_400) as i64,
        None => DEFAULT_KEEP,
    };
    let names = !given.no_client_names;
    Ok((role == Role::Old && !given.no_client_log).then_some(ClientLog { keep, names }))
}

/// Checks the peers against each other.
fn check_peers(peers: &[PeerConfig], origins: &[Origin]) -> Result<(), ConfigError> {
    if peers.len() > MAX_PEERS {
        return Err(ConfigError::TooManyPeers(peers.len()));
    }
    // What is wrong with two of them stands where the second is written.
    let at = |peer: usize, name: &'static str, number: usize, error: ConfigError| {
        let setting = origins.get(peer).map(|origin| origin.value(name, number));
        match setting {
            Some(setting) if matches!(setting.within, Within::Place(_)) => ConfigError::Setting {
                setting,
                problem: error.to_string(),
            },
            _ => error,
        }
    };
    check_moves(peers.iter().flat_map(|peer| &peer.moves)).map_err(|error| {
        let ConfigError::Overlap(a, b) = &error else {
            return error;
        };
        let mut all = peers.iter().enumerate().flat_map(|(peer, config)| {
            let moves = config.moves.iter().enumerate();
            moves.map(move |(number, moved)| (peer, number, moved))
        });
        let last = all.rfind(|(_, _, moved)| *moved == a || *moved == b);
        match last {
            Some((peer, number, _)) => at(peer, "move", number, error),
            None => error,
        }
    })?;
    check_outgoing(peers)?;
    check_announcements(peers)?;
    let old = peers.iter().filter(|peer| !peer.moves.is_empty()).count();
    if old != 0 && old != peers.len() {
        let first = peers.iter().position(|peer| !peer.moves.is_empty());
        let error = ConfigError::BothRoles;
        return Err(at(first.unwrap_or(0), "move", usize::MAX, error));
    }
    for (index, b) in peers.iter().enumerate() {
        if peers[..index].iter().any(|a| a.keys == b.keys) {
            let has = |name| {
                origins
                    .get(index)
                    .is_some_and(|it| it.places.key(name).is_some())
            };
            let name = if has("psk") { "psk" } else { "psk-file" };
            return Err(at(index, name, usize::MAX, ConfigError::SameKey));
        }
    }
    Ok(())
}

/// Checks what leaves by its port: each connection has one moved address to leave from, whoever
/// begins it, since the ports are all that the daemon sees of it.
fn check_outgoing(peers: &[PeerConfig]) -> Result<(), ConfigError> {
    let of_peers = peers.iter().enumerate();
    let all: Vec<(usize, &ByPort)> = of_peers
        .flat_map(|(peer, config)| {
            let rules = config.outgoing.iter().filter_map(Outgoing::by_port);
            rules.map(move |by_port| (peer, by_port))
        })
        .collect();
    if all.len() > MAX_OUTGOING {
        return Err(ConfigError::TooManyOutgoing(all.len()));
    }
    for (index, (peer, a)) in all.iter().enumerate() {
        // One of each family may be meant.
        let clash = |(other, b): &&(usize, &ByPort)| match (a.from, b.from) {
            _ if !a.ports.overlaps(&b.ports) => false,
            (Some(a), Some(b)) => a != b && a.is_ipv4() == b.is_ipv4(),
            (a, b) => other != peer || a != b,
        };
        if let Some((_, b)) = all[..index].iter().find(clash) {
            return Err(ConfigError::OutgoingTwice(Box::new((
                (*b).clone(),
                (*a).clone(),
            ))));
        }
    }
    Ok(())
}

/// Checks the moves against each other.
fn check_moves<'a>(moves: impl Iterator<Item = &'a Move>) -> Result<(), ConfigError> {
    let moves: Vec<&Move> = moves.collect();
    if moves.len() > MAX_MOVES {
        return Err(ConfigError::TooManyMoves(moves.len()));
    }
    if let Some((a, b)) = scopes::first_overlap(&moves) {
        return Err(ConfigError::Overlap(a.clone(), b.clone()));
    }
    let all: Vec<Move> = moves.into_iter().cloned().collect();
    let sets = Scopes::new(&all).port_sets();
    if sets > MAX_PORT_SETS {
        return Err(ConfigError::TooManyPortSets(sets));
    }
    Ok(())
}

/// Checks whether what has moved to each peer can be told to it.
fn check_announcements(peers: &[PeerConfig]) -> Result<(), ConfigError> {
    for peer in peers {
        let announcement = Announcement::Old {
            moves: peer.moves.clone(),
            mtu: 0,
            // The longest.
            reached: Some(IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED)),
            outgoing: false,
        };
        let bytes = announcement.encode().len();
        if bytes > MAX_ANNOUNCEMENT {
            return Err(ConfigError::TooMuchToTell(bytes));
        }
    }
    Ok(())
}

/// One for each processor. A lane that carries nothing costs its buffers and a sleeping thread. Two
/// lanes on two processors, which client, router and both servers shared, carried four streams 1.2
/// times as fast as one lane, and one stream as fast.
fn default_lanes() -> u8 {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    processors.clamp(1, MAX_DEFAULT_LANES.into()) as u8
}

/// The settings of `ipmoved nat`.
#[derive(Debug)]
pub struct NatSettings {
    /// The moves.
    pub moves: Vec<Move>,
    /// The new server, at most once of each family.
    pub to: Vec<NewServer>,
    /// Name of the TUN interface.
    pub tun: String,
    /// The interface that clients' packets use; `None` finds it from addresses and routes.
    pub uplink: Option<String>,
    /// Most flows remembered.
    pub max_flows: u32,
    /// How log lines are written.
    pub log_format: LogFormat,
    /// Where metrics are served, if they are.
    pub metrics: Option<MetricsAddr>,
}

impl NatSettings {
    /// Checks what was typed, and says what it means.
    ///
    /// # Errors
    /// [`ConfigError`] says which flag is wrong, and what would be right.
    pub fn new(args: NatArgs) -> Result<Self, ConfigError> {
        let single = args.moves.iter().all(|moved| moved.prefix.is_single());
        if !single || args.moves.len() > MAX_NAT_MOVES {
            return Err(ConfigError::NatMoves);
        }
        check_moves(args.moves.iter())?;
        let is_for =
            |moved: &Move, to: &NewServer| moved.prefix.first().is_ipv4() == to.ip.is_ipv4();
        for (index, to) in args.to.iter().enumerate() {
            let mut others = args.to[..index].iter();
            if others.any(|other| other.ip.is_ipv4() == to.ip.is_ipv4()) {
                let problem = format!(
                    "{} is the second address of its family; one of each family is enough",
                    to.ip
                );
                return Err(Origin::default().refuse("to", problem));
            }
        }
        for moved in &args.moves {
            let refuse = |problem| {
                let problem = format!("{moved} {problem}");
                Err(Origin::default().refuse("move", problem))
            };
            let Some(to) = args.to.iter().find(|to| is_for(moved, to)) else {
                return refuse(match moved.prefix.first() {
                    IpAddr::V4(_) => "has no IPv4 address to be translated to; add one with --to",
                    IpAddr::V6(_) => "has no IPv6 address to be translated to; add one with --to",
                });
            };
            if moved.prefix.first() == to.ip {
                return refuse("is the new server's own address; give the one clients still use");
            }
            let one_port =
                matches!(moved.ports.as_slice(), [range] if range.start() == range.end());
            if to.port.is_some() && !one_port {
                return refuse("has to name one port, as in 192.0.2.5:80, since --to names a port");
            }
        }
        // Packets from a new server that nothing is translated to would be captured for nothing.
        let mut to = args.to;
        to.retain(|to| args.moves.iter().any(|moved| is_for(moved, to)));
        Ok(Self {
            moves: args.moves,
            to,
            tun: args.tun.map_or(DEFAULT_TUN.into(), String::from),
            uplink: args.uplink.map(String::from),
            max_flows: args.max_flows.map_or(DEFAULT_MAX_FLOWS, Bounded::get),
            log_format: args.log_format.unwrap_or_default(),
            metrics: args.metrics,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::args::{Cli, Command};
    use clap::Parser as _;

    const KEY: &str = "AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA=";

    fn config(line: &str) -> Result<Config, String> {
        config_with(line, "")
    }

    fn config_with(line: &str, file: &str) -> Result<Config, String> {
        let cli = parse("ipmoved", line)?;
        let file = File::parse(file).map_err(|mistake| mistake.to_string())?;
        let file = File {
            path: "x.toml".into(),
            ..file
        };
        let files = Files::on_disk();
        Config::merge(&Arc::new(cli.run), file, &files, Vec::new())
            .map_err(|error| error.to_string())
    }

    fn nat(line: &str) -> Result<NatSettings, String> {
        match parse("ipmoved nat", line)?.command {
            Some(Command::Nat(args)) => NatSettings::new(args).map_err(|error| error.to_string()),
            other => panic!("{other:?}"),
        }
    }

    fn parse(command: &str, line: &str) -> Result<Cli, String> {
        let words = command.split(' ').chain(line.split_whitespace());
        Cli::try_parse_from(words).map_err(|error| error.to_string())
    }

    #[test]
    fn the_two_lines_of_the_contract() {
        let a = config(&format!("--peer 198.51.100.2 --psk {KEY} --move 192.0.2.5")).unwrap();
        assert_eq!(a.role, Role::Old);
        assert_eq!(a.peers[0].moves[0].to_string(), "192.0.2.5");
        assert_eq!((a.listen.ip, a.listen.port), (None, 51_850));
        assert_eq!(a.tun, "ipmoved0");
        assert_eq!(a.max_flows, DEFAULT_MAX_FLOWS);
        let b = config(&format!("--peer 192.0.2.1 --psk {KEY}")).unwrap();
        assert_eq!(b.role, Role::New);
        let endpoint = b.peers[0].endpoint.as_ref().unwrap();
        assert_eq!(endpoint.to_string(), "192.0.2.1:51850");
        assert_eq!(b.peers[0].deliver_to, DeliverTo::default());
    }

    #[test]
    fn each_mistake_is_named_with_its_remedy() {
        let peer = "--peer 192.0.2.1";
        let key = format!("--psk {KEY}");
        for (line, says) in [
            (String::new(), "--peer is missing"),
            (peer.into(), "--psk-file is missing"),
            (format!("{peer} --psk abc"), "--psk"),
            (format!("{peer} --psk-file /nonexistent"), "genpsk"),
            (
                format!("{key} {peer} --move 192.0.2.5 --move 192.0.2.5:80"),
                "overlap",
            ),
            (format!("{key} {peer} --move www.example.net"), "is a name"),
            (
                format!("{key} {peer} --move 192.0.2.5 --deliver-to keep"),
                "--deliver-to: belongs on the new server",
            ),
            (
                format!("{key} {peer} --move 192.0.2.5 --deliver 192.0.2.5:1=198.51.100.2:2"),
                "--deliver: belongs on the new server",
            ),
            (
                format!("{key} {peer} --deliver-to keep --deliver-to 198.51.100.2"),
                "--deliver-to: `keep` stands alone",
            ),
            (
                format!("{key} {peer} --move 192.0.2.5 --accept 192.0.2.5"),
                "--accept: belongs on the new server",
            ),
            (
                format!("{key} {peer} --move 192.0.2.5 --clients-from 10.0.0.0/8"),
                "--clients-from: belongs on the new server",
            ),
            (
                format!("{key} {peer} --deliver-to keep"),
                "--deliver-to: `keep` puts the addresses that the old server names on this \
                 server, so say which these may be: add --accept 192.0.2.5,",
            ),
            (
                format!("{key} {peer} --accept 192.0.2.5/28"),
                "--accept <ADDR[/LEN][:PORTS][/tcp|/udp]>': `192.0.2.5/28` has bits set behind \
                 its length; the prefix is 192.0.2.0/28",
            ),
            (
                format!("{key} {peer} --clients-from 10.0.0.1/24"),
                "the prefix is 10.0.0.0/24",
            ),
            (
                format!(
                    "{key} {peer}{}",
                    " --accept 192.0.2.5".repeat(MAX_ACCEPTS + 1)
                ),
                "--accept: 257 are more than one peer can have",
            ),
            (
                format!(
                    "{key} {peer}{}",
                    " --clients-from ::/0".repeat(MAX_CLIENTS_FROM + 1)
                ),
                "--clients-from: 257 are more than",
            ),
            (
                format!(
                    "{key} {peer} --deliver 192.0.2.5:80=198.51.100.2:1 \
                         --deliver 192.0.2.5:80/udp=198.51.100.2:2"
                ),
                "already",
            ),
            (
                format!(
                    "{key} {peer} --deliver 192.0.2.0/28=198.51.100.0/28 \
                         --deliver 192.0.2.5=198.51.100.99"
                ),
                "--deliver: `192.0.2.5=198.51.100.99`: 192.0.2.0/28=198.51.100.0/28 already says \
                 where that is delivered",
            ),
            (
                format!("{key} {peer} --deliver-to 127.0.0.1"),
                "--deliver-to",
            ),
            (format!("{key} {peer} --listen 0"), "--listen"),
            (format!("{key} {peer} --listen 70000"), "--listen"),
            (format!("{key} {peer} --tun a/b"), "--tun"),
            (format!("{key} {peer} --tun sixteen-letters-x"), "--tun"),
            (format!("{key} {peer} --max-flows 0"), "--max-flows"),
            (format!("{key} {peer} --lanes 0"), "--lanes"),
            (format!("{key} {peer} --lanes 65"), "--lanes"),
            (format!("{key} {peer} --rekey-after 121"), "--rekey-after"),
            (format!("{key} {peer} --cipher des"), "cipher"),
        ] {
            let error = config(&line).unwrap_err();
            assert!(error.contains(says), "{line}: {error}");
        }
    }

    #[test]
    fn translating_has_one_line_too() {
        let good = nat("--move 192.0.2.5 --to 198.51.100.2 --to 2001:db8::2").unwrap();
        assert_eq!(good.to, ["198.51.100.2".parse().unwrap()]);
        let good = nat("--move [2001:db8::5]:80/tcp --to [2001:db8::2]:8080").unwrap();
        assert_eq!(good.to, ["[2001:db8::2]:8080".parse().unwrap()]);
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
    fn outgoing_needs_no_value_and_one_address_for_each_port() {
        let good = |line: &str| config(&format!("--psk {KEY} {line}")).unwrap();
        let shown = |line: &str| {
            let config = good(line);
            let all = config.peers[0].outgoing.iter().map(ToString::to_string);
            (
                all.collect::<Vec<_>>().join(" "),
                config.peers[0].endpoint.is_some(),
            )
        };
        assert_eq!(shown("--outgoing --peer a.example"), ("bound".into(), true));
        let all = "--outgoing 25/tcp,user=8 --outgoing --peer a.example --outgoing from:20/tcp";
        assert_eq!(shown(all), ("25/tcp,user=8 bound from:20/tcp".into(), true));
        let old = good("--allow-outgoing --move 192.0.2.5 --allow-outgoing 25/tcp");
        assert_eq!(old.peers[0].allow_outgoing.len(), 2);
        for (text, count) in [
            ("outgoing = true", 1),
            ("outgoing = false", 0),
            ("outgoing = \"25/tcp\"", 1),
            ("outgoing = 25", 1),
            ("outgoing = [\"bound\", \"25/tcp\", \"from:20\"]", 3),
        ] {
            let config = config_with(&format!("--psk {KEY}"), text).unwrap();
            assert_eq!(config.peers[0].outgoing.len(), count, "{text}");
        }
        let peer = format!("--psk {KEY} --peer 192.0.2.1");
        let many = " --outgoing 25".repeat(MAX_OUTGOING + 1);
        let many_allowed = " --allow-outgoing 25".repeat(MAX_ALLOW_OUTGOING + 1);
        for (line, says) in [
            (
                "--move 192.0.2.5 --outgoing".to_owned(),
                "belongs on the new server",
            ),
            ("--allow-outgoing".to_owned(), "belongs on the old server"),
            (
                format!("--move 192.0.2.5{many_allowed}"),
                "65 are more than",
            ),
            (many, "65 are more than"),
            ("--outgoing smtp".to_owned(), "`smtp` is not a port"),
            (
                "--outgoing 25,as=192.0.2.5 --outgoing 20-30,as=192.0.2.6".to_owned(),
                "overlap",
            ),
        ] {
            let error = config(&format!("{peer} {line}")).unwrap_err();
            assert!(error.contains(says), "{line}: {error}");
        }
        good("--allow-outgoing --move 192.0.2.5:25/tcp");
        good("--outgoing 25,as=192.0.2.5 --outgoing 25,as=2001:db8::5");
        good("--outgoing 25/tcp,user=8 --outgoing 25/tcp,user=9");
        good("--deliver 192.0.2.0/28=198.51.100.0/28 --deliver 192.0.2.5:80=198.51.100.2:8080");
    }

    #[test]
    fn flags_win_over_the_file_one_by_one() {
        let other = "AgIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA=";
        let file = format!(
            "peer = \"192.0.2.1\"\npsk = \"{KEY}\"\ndeliver-to = \"198.51.100.2\"\n\
             deliver = [\"192.0.2.5:1=198.51.100.2:2\", \"192.0.2.5:2=198.51.100.2:3\"]\n\
             outgoing = [\"bound\", \"25/tcp\"]\n\
             accept = \"192.0.2.5\"\nclients-from = [\"10.0.0.0/8\", \"10.1.0.0/16\"]\n\
             listen = 7\ntun = \"file0\"\nuplink = \"file1\"\nmax-flows = 5\nlanes = 3\n\
             cipher = \"aes-256-gcm\"\nlog-format = \"json\"\nrekey-after = 60\n\
             metrics = 9185\n\
             without = [\"udp-gso\", \"udp-gro\"]\n"
        );
        // All of the settings, as one text.
        let shown = |config: &Config| {
            let peer = &config.peers[0];
            [
                peer.endpoint.as_ref().unwrap().to_string(),
                format!("{:?}", peer.deliver_to),
                format!("{}", peer.deliver.len()),
                format!("{}", peer.accept[0]),
                format!("{}", peer.clients_from.len()),
                format!("{}", peer.outgoing.len()),
                format!("{}", config.listen.port),
                config.tun.clone(),
                format!("{:?}", config.uplink),
                format!("{}", config.max_flows),
                format!("{}", config.lanes),
                format!("{}", config.cipher),
                format!("{:?}", config.log_format),
                format!("{:?}", config.metrics),
                format!("{:?}", config.rekey_after),
                format!("{}", config.without.len()),
            ]
        };
        let from_file = shown(&config_with("", &file).unwrap());
        let flags = [
            "--peer 192.0.2.9",
            "--deliver-to keep",
            "--deliver 192.0.2.5:9=198.51.100.2:9",
            "--accept 192.0.2.9",
            "--clients-from ::/0",
            "--outgoing",
            "--listen 9",
            "--tun flag0",
            "--uplink flag1",
            "--max-flows 9",
            "--lanes 9",
            "--cipher chacha20-poly1305",
            "--log-format text",
            "--metrics 9186",
            "--rekey-after 9",
            "--without big-tcp",
        ];
        for (index, flag) in flags.into_iter().enumerate() {
            let merged = shown(&config_with(flag, &file).unwrap());
            for (at, (merged, from_file)) in merged.iter().zip(&from_file).enumerate() {
                assert_eq!(merged != from_file, at == index, "{flag}: {merged}");
            }
        }
        let keys = |line: &str| config_with(line, &file).unwrap().peers.remove(0).keys;
        assert!(keys("") == keys(&format!("--psk {KEY}")));
        assert!(keys("") != keys(&format!("--psk {other}")));
        let error = config_with("--psk-file /nonexistent", &file).unwrap_err();
        assert!(error.contains("/nonexistent"), "{error}");
        let moved = config_with("", &format!("psk = \"{KEY}\"\nmove = \"192.0.2.5\"")).unwrap();
        assert_eq!(moved.role, Role::Old);
    }

    #[test]
    fn several_peers_each_with_a_key_of_its_own() {
        let other = "AgIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA=";
        let file = |second: &str, more: &str| {
            format!(
                "[[peers]]\npeer = \"192.0.2.1\"\npsk = \"{KEY}\"\n{more}\n\
                 [[peers]]\npsk = \"{second}\"\n"
            )
        };
        assert_eq!(config_with("", &file(other, "")).unwrap().peers.len(), 2);
        for (text, says) in [
            (
                file(KEY, ""),
                "x.toml: line 6, column 1: psk: two peers have the same key",
            ),
            (
                file(other, "move = \"192.0.2.5\""),
                "x.toml: line 4, column 1: move: one daemon is either",
            ),
            (
                format!(
                    "{}move = [\"192.0.2.9\",\n  \"192.0.2.4/30\"]",
                    file(other, "move = \"192.0.2.5\"")
                ),
                "x.toml: line 8, column 3: move: 192.0.2.5 and 192.0.2.4/30 overlap",
            ),
            (
                file(
                    other,
                    "deliver = [\"192.0.2.5:1=198.51.100.2:2\",\n\"192.0.2.5:1=198.51.100.2:3\"]",
                ),
                "x.toml: line 5, column 1: deliver: `192.0.2.5:1=198.51.100.2:3`: 192.0.2.5:1=",
            ),
            (
                format!("keep = \"36h\"\n{}", file(other, "")),
                "x.toml: line 1, column 1: keep: belongs on the old server",
            ),
            (
                file(other, "psk-file = \"/x\""),
                "x.toml: line 3, column 1: psk: the same peer has a psk-file",
            ),
            (
                format!("start = \"here\"\nstate-dir = \"x\"\n{}", file(other, "")),
                "x.toml: line 1, column 1: start: belongs on the old server",
            ),
            (
                file(other, "deliver-to = [\"keep\", \"198.51.100.2\"]"),
                "x.toml: line 4, column 1: deliver-to: `keep` stands alone",
            ),
            (
                file(other, "deliver-to = \"keep\""),
                "x.toml: line 4, column 1: deliver-to: `keep` puts the addresses that the old \
                 server names on this server, so say which these may be: add \
                 accept = [\"192.0.2.5\"]",
            ),
            (
                format!("[[peers]]\npeer = \"a\"\n{}", file(other, "")),
                "x.toml: [[peers]] on line 1: psk-file is missing",
            ),
            (
                format!(
                    "deliver-to = \"keep\"\nmove = \"192.0.2.5\"\n{}",
                    file(other, "")
                ),
                "x.toml: line 1, column 1: deliver-to: belongs on the new server",
            ),
        ] {
            let error = config_with("", &text).unwrap_err();
            assert!(error.contains(says), "{text}\n{error}");
        }
    }
    #[test]
    fn what_the_readme_and_the_unit_show_is_read() {
        let readme = include_str!("../../README.md");
        let blocks = |language: &str| {
            let begin = format!("```{language}\n");
            let rest = readme.split(begin.as_str()).skip(1);
            rest.map(|rest| rest.split("```").next().unwrap())
                .collect::<Vec<_>>()
        };
        let files = blocks("toml");
        assert!(files.len() >= 2, "{files:?}");
        for text in files {
            let file = File::parse(text).unwrap_or_else(|mistake| panic!("{text}\n{mistake}"));
            assert!(file.peer.peer.is_some() || !file.peers.is_empty(), "{text}");
        }
        let lines = blocks("sh").concat();
        let lines = lines.lines().filter(|line| line.starts_with("ipmoved "));
        let unit = include_str!("../../contrib/ipmoved.service");
        let started = unit
            .lines()
            .filter_map(|line| line.strip_prefix("ExecStart=/usr/local/sbin/"));
        let typed: Vec<&str> = lines.chain(started).collect();
        assert!(typed.len() >= 3, "{typed:?}");
        for line in typed {
            let words = line.split('#').next().unwrap().split_whitespace();
            Cli::try_parse_from(words).unwrap_or_else(|error| panic!("{line}\n{error}"));
        }
    }
}
