//! What was typed: the command line as clap reads it, before anything is made of it.
//!
//! Owns the flags and their help texts. What they mean together is `config`'s business.

#![allow(rustdoc::broken_intra_doc_links)] // help texts show IPv6 addresses in brackets

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Deserialize;

use crate::channel::session::{CipherPolicy, Psk};
use crate::model::moved::Move;
use crate::model::port_map::PortMap;
use crate::settings::from_text::{many, one};
use crate::settings::values::{
    DeliverTo, InterfaceName, Lanes, Listen, MaxFlows, NewServer, PeerAddr, RekeyAfter,
};

/// The exit codes, as the help and the README document them.
const AFTER_HELP: &str = "\
Two lines do it:
  old server:  ipmoved --peer 198.51.100.2 --psk-file /etc/ipmoved/psk --move 192.0.2.5
  new server:  ipmoved --peer 192.0.2.1    --psk-file /etc/ipmoved/psk

Exit codes:
  0  done, or stopped by SIGTERM or SIGINT with everything undone
  1  failed while running
  2  bad input: a flag, address, port, key, file or interface; nothing was changed
  3  this system cannot do it: privileges, TUN or a kernel feature; nothing was changed
  4  an ipmoved runs already in this network namespace (or, for `status`, none does)";

/// Serve an address that has moved to another server.
///
/// Run it on both servers. The one that is given --move is the old server: it takes the packets
/// for the moved address and carries them, encrypted, to the new one, which hands them to the
/// application with the client's own address and brings the replies back the same way.
#[derive(Debug, Parser)]
#[command(name = "ipmoved", version, after_help = AFTER_HELP, args_conflicts_with_subcommands = true)]
pub struct Cli {
    /// What to do; without a command the tunnel is run.
    #[command(subcommand)]
    pub command: Option<Command>,

    /// How to run the tunnel.
    #[command(flatten)]
    pub run: RunArgs,
}

/// The commands beside running the tunnel.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a new key for --psk-file and print it.
    Genpsk,
    /// Translate both addresses on the old server alone: nothing runs on the new server, which sees
    /// this one's address instead of the clients', and nothing is encrypted.
    Nat(NatArgs),
    /// Show what the daemon of this network namespace is doing.
    Status {
        /// Print the stable JSON form.
        #[arg(long)]
        json: bool,
    },
    /// Undo what a killed daemon left in the kernel.
    Cleanup,
    /// Show a moved address being served, in namespaces of this machine that vanish afterwards.
    Demo,
}

/// The flags that run the tunnel.
#[derive(Debug, Default, Args)]
pub struct RunArgs {
    /// The flags about the peer.
    #[command(flatten)]
    pub peer: PeerArgs,

    /// The flags about the daemon.
    #[command(flatten)]
    pub daemon: DaemonArgs,

    /// Read the same settings from a TOML file; flags win over it.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// What is said of one peer, by flags or by a table of the configuration file.
#[derive(Debug, Default, Args, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct PeerArgs {
    /// The other server: an address or a name, with :PORT if it does not listen on 51850.
    #[arg(long, value_name = "HOST[:PORT]")]
    #[serde(deserialize_with = "one")]
    pub peer: Option<PeerAddr>,

    /// File with the key both servers share, as `ipmoved genpsk` prints it.
    #[arg(long, value_name = "FILE", conflicts_with = "psk")]
    pub psk_file: Option<PathBuf>,

    /// The key itself; other users of this host can see it on the command line. Can also be given
    /// in the environment variable IPMOVED_PSK.
    #[arg(long, value_name = "BASE64")]
    #[serde(deserialize_with = "one")]
    pub psk: Option<Psk>,

    /// An address that has moved away from this server; makes this the old server. Repeatable.
    /// Examples: 192.0.2.5 192.0.2.5:80,443/tcp [2001:db8::5]:53/udp
    #[arg(long = "move", value_name = "ADDR[:PORTS][/tcp|/udp]")]
    #[serde(rename = "move", deserialize_with = "many")]
    pub moves: Vec<Move>,

    /// Where the application listens on the new server, once per address family; `keep` leaves
    /// packets as they are, for an application that listens on the moved address itself.
    /// [default: the address the peer reaches this server on]
    #[arg(long, value_name = "ADDR|keep")]
    #[serde(deserialize_with = "many")]
    pub deliver_to: Vec<DeliverTo>,

    /// A port of a moved address that the application serves elsewhere on the new server. Repeatable.
    /// Examples: 192.0.2.5:80=198.51.100.2:8080 [2001:db8::5]:53/udp=[2001:db8::2]:5353
    #[arg(long, value_name = "MOVED:PORT[/tcp|/udp]=ADDR:PORT")]
    #[serde(deserialize_with = "many")]
    pub deliver: Vec<PortMap>,
}

/// What is said of the daemon as a whole, by flags or at the top of the configuration file.
#[derive(Debug, Default, Args, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct DaemonArgs {
    /// UDP port to listen on, with an address if only that one is to be used. [default: 51850]
    #[arg(long, value_name = "[ADDR:]PORT")]
    #[serde(deserialize_with = "one")]
    pub listen: Option<Listen>,

    /// Name of the tunnel's network interface. [default: ipmoved0]
    #[arg(long, value_name = "NAME")]
    #[serde(deserialize_with = "one")]
    pub tun: Option<InterfaceName>,

    /// The interface that clients' packets use. [default: found from the addresses and routes]
    #[arg(long, value_name = "IFACE")]
    #[serde(deserialize_with = "one")]
    pub uplink: Option<InterfaceName>,

    /// Most flows the new server remembers at once. [default: 1000000]
    #[arg(long, value_name = "N")]
    #[serde(deserialize_with = "one")]
    pub max_flows: Option<MaxFlows>,

    /// Lanes: each carries packets with a queue, a socket and a thread of its own, or two while it is busy.
    /// [default: one for each processor, at most 8]
    #[arg(long, value_name = "N")]
    #[serde(deserialize_with = "one")]
    pub lanes: Option<Lanes>,

    /// Cipher of the tunnel: auto, aes-256-gcm, chacha20-poly1305, or aegis-256x4, which is faster but not
    /// a standard yet. Two servers that say auto never use that. A server that says auto follows one that names a cipher.
    /// [default: auto, the faster standard one]
    #[arg(long, value_name = "CIPHER")]
    #[serde(deserialize_with = "one")]
    pub cipher: Option<CipherPolicy>,

    /// How to write the log. [default: text]
    #[arg(long, value_name = "FORMAT")]
    #[serde(deserialize_with = "one")]
    pub log_format: Option<LogFormat>,

    /// Answer packets that are too big for the tunnel ("fragmentation needed", "packet too big")
    /// instead of carrying them in two datagrams.
    #[arg(long)]
    pub no_split: bool,

    /// Seconds after which a session is replaced, for tests that want many. [default: 120]
    #[arg(long, value_name = "SECONDS", hide = true)]
    #[serde(deserialize_with = "one")]
    pub rekey_after: Option<RekeyAfter>,

    /// Do without an offload, to work around a driver.
    #[arg(long, value_name = "OFFLOAD", value_delimiter = ',', hide = true)]
    #[serde(deserialize_with = "many")]
    pub without: Vec<Offload>,
}

/// The flags of `ipmoved nat`.
#[derive(Debug, Default, Args)]
pub struct NatArgs {
    /// An address that has moved away from this server. Repeatable.
    /// Examples: 192.0.2.5 192.0.2.5:80,443/tcp [2001:db8::5]:53/udp
    #[arg(long = "move", value_name = "ADDR[:PORTS][/tcp|/udp]", required = true)]
    pub moves: Vec<Move>,

    /// The new server, once per address family; with a port if the one that was moved is served at
    /// another there.
    #[arg(long, value_name = "ADDR[:PORT]", required = true)]
    pub to: Vec<NewServer>,

    /// Name of the network interface that packets are taken through. [default: ipmoved0]
    #[arg(long, value_name = "NAME")]
    pub tun: Option<InterfaceName>,

    /// The interface that clients' packets use. [default: found from the addresses and routes]
    #[arg(long, value_name = "IFACE")]
    pub uplink: Option<InterfaceName>,

    /// Most flows remembered at once. [default: 1000000]
    #[arg(long, value_name = "N")]
    pub max_flows: Option<MaxFlows>,

    /// How to write the log. [default: text]
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
}

/// How log lines are written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// An offload that can be done without.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Offload {
    /// Sending several datagrams in one call.
    UdpGso,
    /// Receiving several datagrams in one call.
    UdpGro,
    /// Writing several packets to the TUN in one call.
    TunGso,
    /// Writing more to the TUN in one call than the IPv4 length field can tell.
    BigTcp,
    /// The kernel taking joined packets: each such write is refused, as some kernels do.
    JoinedWrites,
    /// The kernel taking more than 17 pages: each such write is refused, as Linux 6.3 to 6.5 do.
    LongWrites,
}

/// A word that is none of those a flag takes.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("`{text}` is none of {}", known.join(", "))]
pub struct WordError {
    text: String,
    known: Vec<String>,
}

impl FromStr for LogFormat {
    type Err = WordError;

    fn from_str(text: &str) -> Result<Self, WordError> {
        word(text)
    }
}

impl FromStr for Offload {
    type Err = WordError;

    fn from_str(text: &str) -> Result<Self, WordError> {
        word(text)
    }
}

/// Reads a word as clap does, which knows the words of a `ValueEnum` by itself.
fn word<T: ValueEnum>(text: &str) -> Result<T, WordError> {
    T::from_str(text, false).map_err(|_| WordError {
        text: text.into(),
        known: T::value_variants()
            .iter()
            .filter_map(|variant| Some(variant.to_possible_value()?.get_name().to_owned()))
            .collect(),
    })
}
