//! What was typed: the command line as clap reads it, before anything is made of it.
//!
//! Owns the flags, which are the keys of the configuration file too, and their help texts. `config`
//! decides what they mean together.

#![allow(rustdoc::broken_intra_doc_links)] // help texts show IPv6 addresses in brackets

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Deserialize;

use crate::channel::session::{CipherPolicy, Psk};
use crate::model::accept::Accept;
use crate::model::delivery_map::DeliveryMap;
use crate::model::flow_list::FlowOrder;
use crate::model::mode::{Percent, Settled};
use crate::model::moved::Move;
use crate::model::outgoing::{ANY, AllowOutgoing, BOUND, Outgoing};
use crate::model::prefix::Prefix;
use crate::settings::from_text::{many, many_or_bare, one};
use crate::settings::values::{
    DeliverTo, DrainSeconds, FlowsTop, HoldSeconds, InterfaceName, Lanes, Listen, MaxFlows,
    MetricsAddr, NewServer, PeerAddr, Period, RekeyAfter, Top, WatchSeconds, WithinSeconds,
};

/// The end of the help: the two lines that do it, and the exit codes of the README.
const AFTER_HELP: &str = "\
Two lines do it:
  old server:  ipmoved --peer 198.51.100.2 --psk-file /etc/ipmoved/psk --move 192.0.2.5
  new server:  ipmoved --peer 192.0.2.1    --psk-file /etc/ipmoved/psk --accept 192.0.2.5

Exit codes:
  0  done, or stopped by SIGTERM or SIGINT with everything undone
  1  failed while running, `cutover` went back, or `reload` was refused
  2  bad input: a flag, address, port, key, file or interface; nothing was changed
  3  this system cannot do it: privileges, TUN or a kernel feature; nothing was changed
  4  an ipmoved runs already in this network namespace (or, for commands to it, none does)
`ipmoved check` ends with 0 if all is well, with 1 if something may not work, with 2 if something
cannot, bad flags included.
`ipmoved verdict` ends with 0 if the old server can be switched off, with 1 if it cannot be yet.";

/// Serve an address that has moved to another server.
///
/// Run it on both servers. The one that is given --move is the old server: it takes the packets
/// for the moved address and carries them, encrypted, to the new one, which hands them to the
/// application with the client's own address and brings the replies back the same way.
#[derive(Debug, Parser)]
#[command(
    name = "ipmoved",
    version = env!("IPMOVED_VERSION"),
    after_help = AFTER_HELP,
    args_conflicts_with_subcommands = true
)]
pub struct Cli {
    /// What to do; without a command the tunnel is run.
    #[command(subcommand)]
    pub command: Option<Command>,

    /// How to run the tunnel.
    #[command(flatten)]
    pub run: RunArgs,

    /// Whether to run it at all.
    #[command(flatten)]
    pub dry_run: DryRunArgs,
}

/// The commands beside running the tunnel.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a new key and print it, for the --psk-file of both servers.
    Genpsk,
    /// Translate both addresses on the old server alone. Nothing runs on the new server,
    /// which sees this server's address instead of the clients', and nothing is encrypted.
    Nat(NatArgs),
    /// Say whether it will work on this server, with the flags or the file of the daemon: what is
    /// well, what may not work and what cannot, each with a command that mends it. Changes nothing,
    /// and may run beside the daemon.
    Check(Box<CheckArgs>),
    /// Show what the daemon of this network namespace is doing: first what is wrong and what to do.
    Status(StatusArgs),
    /// Show the connections and other flows that the daemon carries at the moment.
    Flows(FlowsArgs),
    /// Show throughput, flows, drops, modes and problems on the whole screen, as they change.
    Top(TopArgs),
    /// On the old server: send new connections to the new server. What the old server has goes on
    /// here until it ends.
    Move(MoveArgs),
    /// On the old server: let new connections wait, unanswered. What either server has goes on.
    /// Afterwards they go where they went before, or where `move` or `back` says.
    Hold(HoldArgs),
    /// On the old server: roll back. New connections go to the service here; what the new server
    /// has goes on there.
    Back(BackArgs),
    /// On the old server: change servers, a step after the other, so that nobody is refused. New
    /// connections wait while those here end, the service here is stopped and the new one starts;
    /// then the new server gets them. If a step fails it goes back and says why.
    Cutover(CutoverArgs),
    /// Read the configuration file again, and the key files that it names, without dropping a
    /// connection. What is wrong is refused as a whole, with its line, and the daemon goes on as
    /// before; so is what cannot change while it runs. SIGHUP does the same.
    Reload {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show who still comes to what has moved away from this server: how often, how regularly, when
    /// last, and by which name.
    Stragglers(StragglersArgs),
    /// Say whether this old server can be switched off: exit code 0 if it is safe, 1 if not yet.
    Verdict(VerdictArgs),
    /// Write a page to show others: the decline, who is left, and the verdict.
    Report(ReportArgs),
    /// Undo what a killed daemon left in the kernel.
    Cleanup,
    /// End the daemon without undoing anything, and leave its connections to the one that the
    /// service manager starts next. The systemd unit calls this at `systemctl restart ipmoved`.
    Handover,
    /// Show a moved address being served, in network namespaces that vanish afterwards.
    Demo,
    /// Write what packages carry beside the binary, made from the flags' own definition.
    #[command(hide = true)]
    Generate {
        /// What to write.
        what: Generated,
        /// Where to.
        dir: PathBuf,
    },
}

/// What packages carry beside the binary.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Generated {
    /// Manual pages.
    Man,
    /// Completions for bash, zsh and fish.
    Completions,
    /// The settings' file with every key, none of them set.
    Config,
}

/// The flags of `ipmoved check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// The daemon's flags.
    #[command(flatten)]
    pub run: RunArgs,

    /// Print the stable JSON form.
    #[arg(long)]
    pub json: bool,
}

/// The flags of `ipmoved status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Print the stable JSON form; with --watch one object a line.
    #[arg(long)]
    pub json: bool,

    /// Look again every so many seconds until ^C, and show how fast things grow (not with
    /// --json). [default: 2]
    #[arg(long, value_name = "SECONDS", num_args = 0..=1)]
    pub watch: Option<Option<WatchSeconds>>,
}

/// The flags of `ipmoved flows`.
#[derive(Debug, Args)]
pub struct FlowsArgs {
    /// Only those of clients with such an address, as in 203.0.113.0/24.
    #[arg(long, value_name = "CIDR")]
    pub client: Option<Prefix>,

    /// Which come first: those with most bytes, the oldest (age), or the fastest (rate).
    #[arg(long, value_name = "bytes|age|rate", default_value_t)]
    pub sort: FlowOrder,

    /// How many to show. [default: 20]
    #[arg(long, value_name = "N")]
    pub top: Option<FlowsTop>,

    /// Print a JSON document.
    #[arg(long)]
    pub json: bool,
}

/// The flags of `ipmoved top`.
#[derive(Debug, Args)]
pub struct TopArgs {
    /// Look again every so many seconds. [default: 1]
    #[arg(long, value_name = "SECONDS")]
    pub every: Option<WatchSeconds>,
}

/// The flags of `ipmoved move`.
#[derive(Debug, Args)]
pub struct MoveArgs {
    /// What to move, as given to --move; left out, all of it.
    #[arg(value_name = "WHAT")]
    pub what: Vec<Move>,

    /// Move this part of all clients only, 1 to 99 per cent: always the same clients, and with a
    /// greater number these and more.
    #[arg(long, value_name = "N")]
    pub percent: Option<Percent>,

    /// End what the old server still has of it: its connections are reset.
    #[arg(long, conflicts_with = "percent")]
    pub cut: bool,
}

/// The flags of `ipmoved hold`.
#[derive(Debug, Args)]
pub struct HoldArgs {
    /// What to hold, as given to --move; left out, all of it.
    #[arg(value_name = "WHAT")]
    pub what: Vec<Move>,

    /// For how long at most. [default: 60]
    #[arg(long = "for", value_name = "SECONDS")]
    pub seconds: Option<HoldSeconds>,
}

/// The flags of `ipmoved back`.
#[derive(Debug, Args)]
pub struct BackArgs {
    /// What to take back, as given to --move; left out, all of it.
    #[arg(value_name = "WHAT")]
    pub what: Vec<Move>,
}

/// The flags of `ipmoved cutover`.
#[derive(Debug, Args)]
pub struct CutoverArgs {
    /// What to move, as given to --move; left out, all of it.
    #[arg(value_name = "WHAT")]
    pub what: Vec<Move>,

    /// How long the connections of the old server have to end by themselves. [default: 30]
    #[arg(long, value_name = "SECONDS")]
    pub drain: Option<DrainSeconds>,

    /// How long it may take until something listens on the new server, --stop included.
    /// [default: 60]
    #[arg(long, value_name = "SECONDS")]
    pub within: Option<WithinSeconds>,

    /// Command that stops the service here, as in --stop "systemctl stop nginx". The shell runs it.
    #[arg(long, value_name = "COMMAND")]
    pub stop: Option<String>,

    /// Command that starts the service here again, as in --restart "systemctl start nginx". It is
    /// run if the cut-over fails after --stop.
    #[arg(long, value_name = "COMMAND", requires = "stop")]
    pub restart: Option<String>,

    /// Print one JSON object a line.
    #[arg(long)]
    pub json: bool,
}

/// The flags that run the tunnel.
#[derive(Clone, Debug, Default, Args)]
pub struct RunArgs {
    /// The flags about the peer.
    #[command(flatten)]
    pub peer: PeerArgs,

    /// The flags about the daemon.
    #[command(flatten)]
    pub daemon: DaemonArgs,

    /// TOML file with the same settings: its keys are the flags' names without the dashes. A flag
    /// wins over the file.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Take over from the daemon that runs in this network namespace, without losing a connection:
    /// after an upgrade, or with other settings (not --tun, --lanes, --listen, nor the other role).
    /// If this one cannot, that one goes on. A service does the same at `systemctl restart
    /// ipmoved`. Where no daemon runs, this one just starts.
    #[arg(long)]
    pub takeover: bool,
}

/// The flags that tell what would be changed. They are no settings, so the file does not have them.
#[derive(Clone, Copy, Debug, Default, Args)]
pub struct DryRunArgs {
    /// Print every kernel change that a start would make, in order, as commands, and what undoes
    /// it; then end. Nothing is changed. It needs the privileges of a start, since the kernel
    /// checks the programs.
    #[arg(long, group = "looks")]
    pub dry_run: bool,

    /// Print JSON, of --dry-run and, with `nat`, of --check.
    #[arg(long, requires = "looks")]
    pub json: bool,
}

/// The settings of one peer, from flags or from a table of the configuration file.
#[derive(Clone, Debug, Default, Args, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct PeerArgs {
    /// The other server: its address or name, with :PORT if it does not listen on 51850. One of the
    /// two servers may leave this out and wait for the other.
    #[arg(long, value_name = "HOST[:PORT]")]
    #[serde(deserialize_with = "one")]
    pub peer: Option<PeerAddr>,

    /// File with the key that both servers share; `ipmoved genpsk` makes one.
    #[arg(long, value_name = "FILE", conflicts_with = "psk")]
    pub psk_file: Option<PathBuf>,

    /// The key itself. Other users of this host can see it on the command line: use --psk-file, or
    /// the environment variable IPMOVED_PSK.
    #[arg(long, value_name = "BASE64")]
    #[serde(deserialize_with = "one")]
    pub psk: Option<Psk>,

    /// An address or prefix that has moved away from this server, whole or only some of its ports.
    /// Makes this the old server. Repeatable.
    /// Examples: 192.0.2.5 192.0.2.5:80,443/tcp [2001:db8::5]:53/udp 192.0.2.0/28
    /// [2001:db8:a:1::/64]:443/tcp
    #[arg(long = "move", value_name = "ADDR[/LEN][:PORTS][/tcp|/udp]")]
    #[serde(rename = "move", deserialize_with = "many")]
    pub moves: Vec<Move>,

    /// On the new server: the address the application listens on. Can be given once for IPv4 and
    /// once for IPv6. `keep` leaves packets as they are: the application listens on the
    /// moved address itself. [default: the address the peer reaches this server on]
    #[arg(long, value_name = "ADDR|keep")]
    #[serde(deserialize_with = "many")]
    pub deliver_to: Vec<DeliverTo>,

    /// On the new server: deliver a moved address, or one port of it, to another address or port
    /// than the rest. Of a prefix each address goes to the one with the same host part of a prefix
    /// of the same length. Repeatable; one that names a port counts before one that names none.
    /// Examples: 192.0.2.5:80=198.51.100.2:8080 [2001:db8::5]:53/udp=[2001:db8::2]:5353
    /// 192.0.2.6=198.51.100.6 192.0.2.16/28=198.51.100.32/28
    #[arg(long, value_name = "MOVED[/LEN][:PORT[/tcp|/udp]]=ADDR[/LEN][:PORT]")]
    #[serde(deserialize_with = "many")]
    pub deliver: Vec<DeliveryMap>,

    /// On the new server: what this old server may move here, as addresses or prefixes, whole or
    /// only some of their ports; a move is served if these accept all of it. Repeatable. Without
    /// it everything is accepted, with a warning; `--deliver-to keep` needs it.
    /// Examples: 192.0.2.5 192.0.2.0/28:443/tcp [2001:db8::/64]:53/udp
    #[arg(long, value_name = "ADDR[/LEN][:PORTS][/tcp|/udp]")]
    #[serde(deserialize_with = "many")]
    pub accept: Vec<Accept>,

    /// On the new server: lets clients of this old server have addresses of these networks, though
    /// the new server is in them itself. Without it such a source counts as forged. Repeatable.
    /// Examples: 10.0.0.0/24 2001:db8:b::/64
    #[arg(long, value_name = "PREFIX")]
    #[serde(deserialize_with = "many")]
    pub clients_from: Vec<Prefix>,

    /// On the new server: what programs here send from a moved address to somebody who did not ask
    /// for it leaves through the old server, which needs --allow-outgoing. Without a value: of
    /// programs that are bound to a moved address. With one also of others, chosen by port, the
    /// programs untouched: PORTS are those that are asked for, from:PORTS the program's own; the
    /// options narrow it to a user or control group, and name the moved address if there are
    /// several. Repeatable. Without this flag nothing leaves here from a moved address but replies.
    /// Examples: --outgoing   --outgoing 25/tcp,user=postfix   --outgoing from:20/tcp,as=192.0.2.5
    #[arg(
        long,
        value_name = "[from:]PORTS[/tcp|/udp][,user=NAME][,cgroup=PATH][,as=ADDR]",
        num_args = 0..=1,
        default_missing_value = BOUND
    )]
    #[serde(deserialize_with = "many_or_bare")]
    pub outgoing: Vec<Outgoing>,

    /// On the old server: lets connections out that begin on this new server, as what has moved to
    /// it (--outgoing there). Without a value all of them, with one only these: PORTS are those
    /// that are asked for, from:PORTS those at the moved address, `ping` is ICMP queries.
    /// Repeatable. Without this flag only replies leave; whoever takes the new server over speaks
    /// as the moved address to no one else.
    /// Examples: --allow-outgoing   --allow-outgoing 25/tcp   --allow-outgoing from:20/tcp
    #[arg(
        long,
        value_name = "[from:]PORTS[/tcp|/udp]|ping",
        num_args = 0..=1,
        default_missing_value = ANY
    )]
    #[serde(deserialize_with = "many_or_bare")]
    pub allow_outgoing: Vec<AllowOutgoing>,
}

impl PeerArgs {
    /// Fills what these leave out from `file`.
    pub(super) fn over(self, file: Self) -> Self {
        // These two flags are one setting.
        let (psk, psk_file) = if self.psk.is_some() || self.psk_file.is_some() {
            (self.psk, self.psk_file)
        } else {
            (file.psk, file.psk_file)
        };
        Self {
            peer: self.peer.or(file.peer),
            psk_file,
            psk,
            moves: first_given(self.moves, file.moves),
            deliver_to: first_given(self.deliver_to, file.deliver_to),
            deliver: first_given(self.deliver, file.deliver),
            accept: first_given(self.accept, file.accept),
            clients_from: first_given(self.clients_from, file.clients_from),
            outgoing: first_given(self.outgoing, file.outgoing),
            allow_outgoing: first_given(self.allow_outgoing, file.allow_outgoing),
        }
    }

    /// The keys of those that are given.
    pub(super) fn named(&self) -> Vec<&'static str> {
        let all = [
            ("peer", self.peer.is_some()),
            ("psk-file", self.psk_file.is_some()),
            ("psk", self.psk.is_some()),
            ("move", !self.moves.is_empty()),
            ("deliver-to", !self.deliver_to.is_empty()),
            ("deliver", !self.deliver.is_empty()),
            ("accept", !self.accept.is_empty()),
            ("clients-from", !self.clients_from.is_empty()),
            ("outgoing", !self.outgoing.is_empty()),
            ("allow-outgoing", !self.allow_outgoing.is_empty()),
        ];
        let given = all.into_iter().filter(|(_, given)| *given);
        given.map(|(name, _)| name).collect()
    }

    /// Whether none of the peer's settings is given.
    pub(super) fn is_empty(&self) -> bool {
        let Self {
            peer,
            psk_file,
            psk,
            moves,
            deliver_to,
            deliver,
            accept,
            clients_from,
            outgoing,
            allow_outgoing,
        } = self;
        peer.is_none()
            && psk_file.is_none()
            && psk.is_none()
            && moves.is_empty()
            && deliver_to.is_empty()
            && deliver.is_empty()
            && accept.is_empty()
            && clients_from.is_empty()
            && outgoing.is_empty()
            && allow_outgoing.is_empty()
    }
}

/// The settings of the daemon as a whole, from flags or from the top of the configuration file.
#[derive(Clone, Debug, Default, Args, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct DaemonArgs {
    /// UDP port for the tunnel, with an address to use only that one. [default: 51850]
    #[arg(long, value_name = "[ADDR:]PORT")]
    #[serde(deserialize_with = "one")]
    pub listen: Option<Listen>,

    /// Name of the tunnel's network interface. [default: ipmoved0]
    #[arg(long, value_name = "NAME")]
    #[serde(deserialize_with = "one")]
    pub tun: Option<InterfaceName>,

    /// Network interface that clients' packets use. [default: found from the addresses and routes]
    #[arg(long, value_name = "IFACE")]
    #[serde(deserialize_with = "one")]
    pub uplink: Option<InterfaceName>,

    /// Most flows remembered at once; on the old server, for each peer. [default: 1000000]
    #[arg(long, value_name = "N")]
    #[serde(deserialize_with = "one")]
    pub max_flows: Option<MaxFlows>,

    /// Number of lanes. Each carries packets with a TUN queue, a UDP socket and a thread of its
    /// own; a busy one gets a helper thread. [default: one for each processor, at most 8]
    #[arg(long, value_name = "N")]
    #[serde(deserialize_with = "one")]
    pub lanes: Option<Lanes>,

    /// Cipher of the tunnel: auto, aes-256-gcm, chacha20-poly1305 or aegis-256x4. With auto on both
    /// servers, they use AES-256-GCM if both have hardware for it, else ChaCha20-Poly1305. With
    /// auto on one, it uses the cipher that the other names. aegis-256x4 is the fastest, but not a
    /// standard yet: it is only used if a server names it. [default: auto]
    #[arg(long, value_name = "CIPHER")]
    #[serde(deserialize_with = "one")]
    pub cipher: Option<CipherPolicy>,

    /// On the old server: who answers new connections of a move that the daemon sees for the first
    /// time: here, the service of this server, or moved, the new server. `ipmoved move`, `back` and
    /// `cutover` change it, and the daemon remembers. [default: moved]
    #[arg(long, value_name = "here|moved")]
    #[serde(deserialize_with = "one")]
    pub start: Option<Start>,

    /// Directory for what the daemon remembers over restarts. [default: /var/lib/ipmoved]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,

    /// How to write the log. [default: text]
    #[arg(long, value_name = "FORMAT")]
    #[serde(deserialize_with = "one")]
    pub log_format: Option<LogFormat>,

    /// Serve metrics for Prometheus at http://ADDR:PORT/metrics, unencrypted and to whoever asks;
    /// with a port alone to this server only (127.0.0.1). [default: none are served]
    #[arg(long, value_name = "[ADDR:]PORT")]
    #[serde(deserialize_with = "one")]
    pub metrics: Option<MetricsAddr>,

    /// On the old server: how long to remember who still comes, in whole days (`ipmoved
    /// stragglers`). [default: 90d]
    #[arg(long, value_name = "DAYS")]
    #[serde(deserialize_with = "one")]
    pub keep: Option<Period>,

    /// On the old server: do not look for the names that clients ask for (TLS, HTTP).
    #[arg(long)]
    pub no_client_names: bool,

    /// On the old server: do not record who still comes. `ipmoved stragglers` and `ipmoved verdict`
    /// cannot tell then.
    #[arg(long)]
    pub no_client_log: bool,

    /// Do not split a packet that is too big for one datagram over several. It is fragmented if its
    /// sender allows that; otherwise its sender is told "fragmentation needed" or "packet too big".
    #[arg(long)]
    pub no_split: bool,

    /// Seconds after which a session is replaced, for tests that want many. [default: 120]
    #[arg(long, value_name = "SECONDS", hide = true)]
    #[serde(deserialize_with = "one")]
    pub rekey_after: Option<RekeyAfter>,

    /// Do without an offload, to work around a driver.
    #[arg(long, value_name = "OFFLOAD", value_delimiter = ',', hide = true)]
    #[serde(deserialize_with = "many")]
    pub without: Vec<Without>,
}

impl DaemonArgs {
    /// The keys of those that are given and that a mistake may be about.
    pub(super) fn named(&self) -> Vec<&'static str> {
        let all = [
            ("start", self.start.is_some()),
            ("state-dir", self.state_dir.is_some()),
            ("keep", self.keep.is_some()),
            ("no-client-names", self.no_client_names),
            ("no-client-log", self.no_client_log),
        ];
        let given = all.into_iter().filter(|(_, given)| *given);
        given.map(|(name, _)| name).collect()
    }

    /// Fills what these leave out from `file`.
    pub(super) fn over(self, file: Self) -> Self {
        Self {
            listen: self.listen.or(file.listen),
            tun: self.tun.or(file.tun),
            uplink: self.uplink.or(file.uplink),
            max_flows: self.max_flows.or(file.max_flows),
            lanes: self.lanes.or(file.lanes),
            cipher: self.cipher.or(file.cipher),
            start: self.start.or(file.start),
            state_dir: self.state_dir.or(file.state_dir),
            log_format: self.log_format.or(file.log_format),
            metrics: self.metrics.or(file.metrics),
            keep: self.keep.or(file.keep),
            no_client_names: self.no_client_names || file.no_client_names,
            no_client_log: self.no_client_log || file.no_client_log,
            no_split: self.no_split || file.no_split,
            rekey_after: self.rekey_after.or(file.rekey_after),
            without: first_given(self.without, file.without),
        }
    }
}

/// A list from the command line replaces that of the file.
fn first_given<T>(flags: Vec<T>, file: Vec<T>) -> Vec<T> {
    if flags.is_empty() { file } else { flags }
}

/// The flags of `ipmoved nat`.
#[derive(Debug, Default, Args)]
pub struct NatArgs {
    /// An address that has moved away from this server, whole or only some of its ports.
    /// Repeatable.
    /// Examples: 192.0.2.5 192.0.2.5:80,443/tcp [2001:db8::5]:53/udp
    #[arg(long = "move", value_name = "ADDR[:PORTS][/tcp|/udp]", required = true)]
    pub moves: Vec<Move>,

    /// The new server's address. Can be given once for IPv4 and once for IPv6. With a port, if the
    /// application listens on another port there than the one that moved.
    #[arg(long, value_name = "ADDR[:PORT]", required = true)]
    pub to: Vec<NewServer>,

    /// Name of the network interface that packets pass through. [default: ipmoved0]
    #[arg(long, value_name = "NAME")]
    pub tun: Option<InterfaceName>,

    /// Network interface that clients' packets use. [default: found from the addresses and routes]
    #[arg(long, value_name = "IFACE")]
    pub uplink: Option<InterfaceName>,

    /// Most flows remembered at once. [default: 1000000]
    #[arg(long, value_name = "N")]
    pub max_flows: Option<MaxFlows>,

    /// How to write the log. [default: text]
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,

    /// Serve metrics for Prometheus at http://ADDR:PORT/metrics, unencrypted and to whoever asks;
    /// with a port alone to this server only (127.0.0.1). [default: none are served]
    #[arg(long, value_name = "[ADDR:]PORT")]
    pub metrics: Option<MetricsAddr>,

    /// Say whether it will work, as `ipmoved check` does for the tunnel, and whether the
    /// application answers this server; then end. Nothing is changed.
    #[arg(long, group = "looks")]
    pub check: bool,

    /// Whether to run it at all.
    #[command(flatten)]
    pub dry_run: DryRunArgs,
}

/// The flags of `ipmoved stragglers`.
#[derive(Debug, Args)]
pub struct StragglersArgs {
    /// How far to look back: 12h, 7d, 4w. Counts are those of whole days (UTC).
    #[arg(long, value_name = "TIME", default_value = "7d")]
    pub since: Period,

    /// How many to show: those who come most often. [default: 20; all with --json and --csv]
    #[arg(long, value_name = "N")]
    pub top: Option<Top>,

    /// Print JSON.
    #[arg(long, conflicts_with = "csv")]
    pub json: bool,

    /// Print CSV.
    #[arg(long)]
    pub csv: bool,

    /// The directory that the daemon was given. [default: /var/lib/ipmoved]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
}

/// The flags of `ipmoved verdict`.
#[derive(Debug, Args)]
pub struct VerdictArgs {
    /// For how long no client may have come: 12h, 7d, 4w; no longer than the daemon's --keep.
    #[arg(long, value_name = "TIME", default_value = "7d")]
    pub quiet: Period,

    /// Clients that do not count: your own monitors, for example. An address of IPv6 means the /64
    /// that it lies in. Repeatable.
    #[arg(long, value_name = "CIDR")]
    pub ignore: Vec<Prefix>,

    /// Print JSON.
    #[arg(long)]
    pub json: bool,

    /// The directory that the daemon was given. [default: /var/lib/ipmoved]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
}

/// The flags of `ipmoved report`.
#[derive(Debug, Args)]
pub struct ReportArgs {
    /// The file to write: one page of HTML that needs nothing else. It is replaced if it is there.
    /// `-` writes it to standard output.
    #[arg(value_name = "FILE.html")]
    pub file: PathBuf,

    /// For how long no client may have come: 12h, 7d, 4w; no longer than the daemon's --keep.
    /// Clients are listed as far back.
    #[arg(long, value_name = "TIME", default_value = "7d")]
    pub quiet: Period,

    /// Clients that do not count: your own monitors, for example. An address of IPv6 means the /64
    /// that it lies in. Repeatable.
    #[arg(long, value_name = "CIDR")]
    pub ignore: Vec<Prefix>,

    /// How many clients to list: those who come most often.
    #[arg(long, value_name = "N", default_value = "100")]
    pub top: Top,

    /// The directory that the daemon was given. [default: /var/lib/ipmoved]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
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

/// Who answers new connections of a move that was not there before.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
pub enum Start {
    /// The old server's own service.
    Here,
    /// The new server.
    #[default]
    Moved,
}

impl From<Start> for Settled {
    fn from(start: Start) -> Self {
        match start {
            Start::Here => Self::Here,
            Start::Moved => Self::Moved,
        }
    }
}

/// An offload to do without.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Without {
    /// Sending several datagrams in one call.
    UdpGso,
    /// Receiving several datagrams in one call.
    UdpGro,
    /// Writing several packets to the TUN in one call.
    TunGso,
    /// Writing more to the TUN in one call than the IPv4 length field can say.
    BigTcp,
    /// Writing coalesced packets: each such write is refused, as some kernels do.
    JoinedWrites,
    /// Writing more than 17 pages: each such write is refused, as Linux 6.3 to 6.5 do.
    LongWrites,
}

/// A word that the flag does not take.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("`{text}` is none of {}", known.join(", "))]
pub struct WordError {
    text: String,
    known: Vec<String>,
}

impl FromStr for Start {
    type Err = WordError;

    fn from_str(text: &str) -> Result<Self, WordError> {
        word(text)
    }
}

impl FromStr for LogFormat {
    type Err = WordError;

    fn from_str(text: &str) -> Result<Self, WordError> {
        word(text)
    }
}

impl FromStr for Without {
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
