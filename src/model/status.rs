//! What the daemon says of itself: the stable JSON of `ipmoved status --json`, and its text form.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use crate::model::asked::Found;
use crate::model::peer::Role;
use crate::model::problems::Severity;
use crate::model::progress::{Listens, Progress, lacking};
use crate::model::rates::{DropRates, Rates, TrafficRate, TunnelRates, short};

/// Everything the daemon says of itself.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Status {
    /// How packets get to the new server.
    #[serde(default)]
    pub way: Way,
    /// One for each peer.
    pub tunnels: Vec<TunnelStatus>,
    /// The tunnel interface.
    pub tun: String,
    /// The UDP port listened on.
    pub port: u16,
    /// The daemon's version.
    pub version: String,
    /// The daemon's process.
    pub pid: u32,
    /// Seconds since it started.
    pub uptime_s: u64,
    /// Which kernel offloads are in use.
    pub offloads: Offloads,
    /// What was dropped that belongs to no peer: strangers' datagrams.
    pub drops: BTreeMap<String, u64>,
    /// What an administrator should know, newest last.
    pub warnings: Vec<String>,
    /// Log lines that were lost, because what reads them was too slow.
    #[serde(default)]
    pub log_lines_lost: u64,
    /// Packets to what has moved that stayed here: answers to what this server does itself, or one
    /// behind it, and connections that it still has (old server).
    #[serde(default)]
    pub stayed: u64,
    /// How often a conversation of a host behind this server could not be kept from giving way to
    /// new ones, since 65,536 were kept already (old server).
    #[serde(default)]
    pub own_full: u64,
    /// Conversations that were too many to record who came (old server).
    #[serde(default)]
    pub unrecorded: u64,
    /// Conversations of the last seconds that are not recorded yet (old server).
    #[serde(default)]
    pub unwritten: u64,
}

/// How packets get to the new server.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Way {
    /// Through the encrypted tunnel to its daemon.
    #[default]
    Tunnel,
    /// With both addresses translated on the old server (`ipmoved nat`): no daemon on the new one,
    /// no tunnel.
    Nat,
}

/// One peer and what goes to and from it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct TunnelStatus {
    /// The peer's number in the daemon, which those that come and go leave as it is.
    #[serde(skip)]
    pub place: u16,
    /// The peer as configured, or its address if it is not.
    pub peer: String,
    /// The address it was last heard from.
    pub endpoint: Option<String>,
    /// What this daemon is: the old or the new server.
    pub role: Role,
    /// Whether packets pass.
    pub state: State,
    /// The cipher in use.
    pub cipher: Option<String>,
    /// Round trip over the tunnel, in milliseconds.
    pub rtt_ms: Option<f64>,
    /// Seconds since the keys in use were agreed.
    pub handshake_age_s: Option<u64>,
    /// Largest IP packet that fits one datagram, in bytes; larger ones are carried in several.
    pub mtu: usize,
    /// ICMP errors that said that less fits.
    #[serde(default)]
    pub mtu_hints: MtuHints,
    /// Seconds for which nothing was heard of the peer, though it is `up`. It is asked every five.
    #[serde(default)]
    pub unheard_s: Option<u64>,
    /// How long ago the peer's daemon was stopped, in seconds; left out unless it said so and has
    /// not come back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped_s: Option<u64>,
    /// What clients ask for, and whether it is answered: what is not well first, at most
    /// [`MAX_SERVED`].
    #[serde(default)]
    pub served: Vec<Served>,
    /// How far each move has come, as the new server says; on the old one nothing until it has.
    #[serde(default)]
    pub progress: Vec<ProgressOf>,
    /// What a cut-over looks for on the new server, while one runs (old server).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub looked_for: Vec<LookedFor>,
    /// What was moved.
    pub moved: Vec<String>,
    /// Who answers new conversations of each move (old server).
    #[serde(default)]
    pub modes: Vec<ModeStatus>,
    /// Which mode each move is in that has not moved wholly, as the old server says (new server).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub peer_modes: Vec<PeerMode>,
    /// Where the new server delivers: an address, one of each family, or `keep`.
    pub deliver_to: Option<String>,
    /// What is delivered elsewhere, as `--deliver` names it (new server).
    #[serde(default)]
    pub deliver: Vec<String>,
    /// What the peer may move here, as `--accept` names it; empty accepts everything (new server).
    #[serde(default)]
    pub accept: Vec<String>,
    /// Own networks that the peer's clients may come from, as `--clients-from` names them (new
    /// server).
    #[serde(default)]
    pub clients_from: Vec<String>,
    /// What may leave from a moved address that answers nobody, as `--outgoing` names it; empty
    /// lets nothing out (new server).
    #[serde(default)]
    pub outgoing: Vec<String>,
    /// What the new server may begin, as `--allow-outgoing` names it; empty lets nothing out (old
    /// server).
    #[serde(default)]
    pub allow_outgoing: Vec<String>,
    /// Whether the old server lets connections out that begin here, once it has said so (new
    /// server).
    #[serde(default)]
    pub peer_allows_outgoing: Option<bool>,
    /// Moves that the peer names and that are not served (new server).
    #[serde(default)]
    pub refused: Vec<RefusedMove>,
    /// How many moves were refused, each time that the peer named one (new server).
    #[serde(default)]
    pub refused_moves: u64,
    /// The flow table (new server).
    pub flows: Flows,
    /// IP packets that came out of the tunnel.
    pub rx: Traffic,
    /// IP packets that went into the tunnel.
    pub tx: Traffic,
    /// What was dropped, by reason.
    pub drops: BTreeMap<String, u64>,
}

/// The mode of a move, as the new server knows it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PeerMode {
    /// The move, as `--move` names it.
    pub what: String,
    /// `here`, `held` or `shared`.
    pub mode: String,
    /// How many per cent of all clients the new server gets; `null` while it is held.
    pub percent: Option<u8>,
}

impl PeerMode {
    /// The mode in words.
    fn says(&self) -> String {
        match (self.mode.as_str(), self.percent) {
            ("here", _) => "here: the old server still serves it itself".into(),
            (mode, Some(percent)) => format!("{mode}: {percent} % of all clients come here"),
            (mode, None) => format!("{mode}: new connections wait on the old server"),
        }
    }
}

/// A port that the old server serves, and whether something listens for it on the new one.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LookedFor {
    /// The port: `192.0.2.5:80/tcp`.
    pub what: String,
    /// Whether something listens where it is delivered.
    pub listens: Found,
}

/// The mode of a move, and how much of it is on either server.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ModeStatus {
    /// The move, as `--move` names it.
    pub what: String,
    /// `here`, `held`, `shared` or `moved`.
    pub mode: String,
    /// How many per cent of all clients the new server gets, or gets again after a hold.
    pub percent: u8,
    /// While it is held: the mode afterwards, if nothing else is said.
    pub then: Option<String>,
    /// While it is held: for how many seconds at most.
    pub held_s: Option<u64>,
    /// Conversations that wait.
    pub waiting: u64,
    /// Conversations that the old server has, or a host behind it; `null` if nobody can tell.
    pub here_live: Option<u64>,
    /// Those of them that are TCP, and end by themselves.
    #[serde(default)]
    pub here_tcp: Option<u64>,
    /// Conversations that the new server has; `null` if it does not say.
    pub there_live: Option<u64>,
    /// The settings no longer have it: it is gone once the new server has nothing of it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub leaving: bool,
    /// Since when it is in this mode (RFC 3339).
    pub since: String,
    /// The process of the cut-over that is under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cutover: Option<i32>,
}

impl ModeStatus {
    /// Whether it is no more than an address that has moved, and all that came before is over.
    fn is_plain(&self) -> bool {
        self.mode == "moved" && self.here_live.unwrap_or(0) == 0 && self.waiting == 0
    }

    /// The mode in words.
    pub fn says(&self) -> String {
        match (&self.then, self.held_s) {
            (Some(then), Some(left)) => format!("held for {left} s at most, then {then}"),
            _ if self.mode == "shared" => format!("shared, {} % moved", self.percent),
            _ => self.mode.clone(),
        }
    }
}

/// Most entries of [`TunnelStatus::served`].
pub const MAX_SERVED: usize = 64;

/// A peer that is asked every five seconds has answered within this time, unless something is lost.
pub const UNHEARD: u64 = 8;

/// What clients ask for: a port of a moved address, or a move of which nobody asked for anything.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Served {
    /// `192.0.2.5:80/tcp`; of a move of which nothing was asked, as `--move` names it.
    pub what: String,
    /// Whether it is answered.
    pub state: Answers,
    /// Somebody is meant to serve it: a move names the port, something listens, or it has answered
    /// before. What a scan asks for is not.
    pub expected: bool,
    /// Seconds since when.
    pub since_s: u64,
    /// Conversations that were watched: of each port at most the first four of a second.
    #[serde(rename = "in")]
    pub asked: u64,
    /// Those of them that were answered.
    pub answered: u64,
    /// Those of them that were refused: TCP RST, ICMP "unreachable".
    pub refused: u64,
    /// Clients that wait for an answer now.
    pub clients: u64,
    /// Why it is not answered, the likeliest first.
    pub causes: Vec<Cause>,
}

/// How often clients have to ask for something in vain before that says anything: where an answer
/// need not be what is asked for (UDP), so often nobody asks who only scans.
pub fn many_in_vain(what: &str) -> u64 {
    if what.ends_with("/tcp") { 1 } else { 8 }
}

/// Whether what clients ask for is answered.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answers {
    /// Packets go in, and nothing comes out.
    Silent,
    /// The server says that nothing is there.
    Refused,
    /// Nothing has come in, though the address is moved. That is a fault only if there is a cause.
    NothingIn,
    /// No answer yet. That is no fault of the protocol: UDP need not answer.
    Unanswered,
    /// Answered.
    Ok,
}

/// Why something is not answered.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Cause {
    /// Its name, which stays the same.
    pub cause: String,
    /// What it is, for people.
    pub text: String,
    /// What to do about it.
    pub remedy: String,
}

impl Served {
    /// Whether an administrator has to know.
    pub(super) fn is_bad(&self) -> bool {
        match self.state {
            Answers::Silent | Answers::Refused => true,
            Answers::NothingIn => !self.causes.is_empty() && !self.is_early(),
            Answers::Unanswered | Answers::Ok => false,
        }
    }

    /// Nobody has asked yet, and would not be answered: it is to be seen, and no fault yet.
    pub(super) fn is_early(&self) -> bool {
        let early = |cause: &Cause| cause.cause != "filter_before";
        self.state == Answers::NothingIn && self.causes.first().is_some_and(early)
    }

    /// What is wrong, in a few words.
    pub(super) fn says(&self) -> String {
        let what = &self.what;
        let says = match self.state {
            Answers::Silent => format!("{what} is not answered"),
            Answers::Refused => format!("{what} is refused"),
            Answers::NothingIn => format!("nothing has come for {what}"),
            Answers::Unanswered => format!("no answer yet from {what}"),
            Answers::Ok => format!("{what} is answered"),
        };
        match self.causes.first() {
            Some(cause) => format!("{says}: {}", cause.text),
            None => says,
        }
    }

    /// How many clients wait.
    pub(super) fn waiting(&self) -> String {
        match self.clients {
            0 => String::new(),
            1 => " (1 client waits)".into(),
            many => format!(" ({many} clients wait)"),
        }
    }
}

/// How far one move has come.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ProgressOf {
    /// The move.
    pub what: String,
    /// `listens`, `live`, `by_tunnel` and `directly`.
    #[serde(flatten)]
    pub progress: Progress,
}

impl ProgressOf {
    /// In a line, for people.
    fn says(&self) -> String {
        let Progress {
            listens,
            live,
            by_tunnel,
            directly,
        } = self.progress;
        let share = match self.progress.percent_directly() {
            None => "no new connections yet".into(),
            Some(percent) => format!(
                "{percent} % of new connections arrive directly ({directly} of {})",
                directly.saturating_add(by_tunnel)
            ),
        };
        let live = match live {
            0 => String::new(),
            live => format!(", {live} live by the tunnel"),
        };
        let listens = match listens {
            Listens::Yes => "; something listens on the new server".into(),
            Listens::No => format!("; {}", lacking(&self.what)),
            Listens::Unknown => String::new(),
        };
        format!("{}: {share}{live}{listens}", self.what)
    }
}

/// A move that is not served.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RefusedMove {
    /// The move.
    pub moved: String,
    /// Why it is not served, and what to do about it.
    pub why: String,
}

/// Whether packets pass.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Packets do not pass yet.
    Connecting,
    /// Packets pass.
    Up,
    /// Packets no longer pass: the peer fell silent or said goodbye.
    Down,
}

/// ICMP errors that said that the path to the peer takes less than the size in use. Anybody can
/// send them, so they make the daemon ask the peer, and change nothing by themselves.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct MtuHints {
    /// Times that the daemon asked because of one.
    pub asked: u64,
    /// Times that the size in use passed nevertheless.
    pub refuted: u64,
}

/// The counters of the flows: on the new server of its flow table, which all peers share; on the
/// old one of the clients that came for what has moved to this peer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Flows {
    /// Flows remembered now.
    pub live: u64,
    /// Most that may be (`--max-flows`).
    pub max: u64,
    /// Flows given up before their time to make space.
    pub evicted: u64,
    /// Those of them that were in use, of a client or peer that held more than others.
    #[serde(default)]
    pub displaced: u64,
    /// Flows that got another client port, since the same client used one port at two moved
    /// addresses that are delivered to one.
    #[serde(default)]
    pub collisions: u64,
    /// New flows that were refused because the table was full.
    #[serde(default)]
    pub refused: u64,
}

/// IP packets and their bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Traffic {
    /// IP packets, each segment of a super-packet counted.
    pub packets: u64,
    /// Bytes of these, IP header included.
    pub bytes: u64,
}

/// Which kernel offloads are in use; where one is not, the daemon does the work itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Offloads {
    /// Batches of datagrams sent in one call.
    pub udp_gso: bool,
    /// Batches of datagrams received in one call.
    pub udp_gro: bool,
    /// TCP super-packets written to the TUN.
    pub tun_tso: bool,
    /// UDP super-packets exchanged with the TUN (Linux 6.2 on).
    pub tun_uso: bool,
    /// TCP super-packets over IPv4 of more than 64 KiB written to the TUN (Linux 6.6 on). Only on
    /// the new server, where they end; switched off when the kernel refuses one.
    pub tun_big_tcp: bool,
    /// Batches that the kernel refused, so that they were sent datagram by datagram.
    pub udp_gso_fallbacks: u64,
    /// Super-packets that the kernel refused, so that they were written packet by packet.
    pub tun_gso_fallbacks: u64,
}

impl Status {
    /// The text form, for people: the verdict in one line, what is wrong and what to do, the rest.
    pub fn to_text(&self) -> String {
        self.to_text_with(None)
    }

    /// The same, with how fast what is counted grows.
    pub fn to_text_with(&self, rates: Option<&Rates>) -> String {
        let mut out = String::new();
        // Writing to a String cannot fail.
        let _ = self.write_text(&mut out, rates);
        out
    }

    /// The verdict, in one line.
    pub fn verdict(&self) -> String {
        let problems = self.problems();
        let of_first = |tunnel: &&TunnelStatus| {
            let first = problems.iter().find(|it| it.severity <= Severity::Limit);
            first.is_some_and(|first| first.peer.as_ref() == Some(&tunnel.peer))
        };
        match self.tunnels.as_slice() {
            [] => "no peer is known".into(),
            [only] => only.title(self.way),
            all => match all.iter().find(of_first) {
                None => format!("all {} tunnels: up", all.len()),
                Some(worst) => worst.title(self.way),
            },
        }
    }

    /// Whether this is the new server.
    pub fn is_new(&self) -> bool {
        self.tunnels.iter().any(|tunnel| tunnel.role == Role::New)
    }

    fn write_text(&self, out: &mut String, rates: Option<&Rates>) -> std::fmt::Result {
        writeln!(out, "{}", self.verdict())?;
        for problem in self.problems() {
            let about = match &problem.peer {
                Some(peer) if self.tunnels.len() > 1 => format!("{peer}: "),
                Some(_) | None => String::new(),
            };
            writeln!(out, "  problem    {about}{}", problem.text)?;
            for remedy in &problem.remedies {
                writeln!(out, "             → {remedy}")?;
            }
        }
        for warning in &self.warnings {
            writeln!(out, "  warning    {warning}")?;
        }
        for (at, tunnel) in self.tunnels.iter().enumerate() {
            if self.tunnels.len() > 1 {
                writeln!(out, "{}", tunnel.title(self.way))?;
            }
            tunnel.write_text(out, self.way, rates.and_then(|it| it.tunnels.get(at)))?;
        }
        if self.way == Way::Nat {
            return writeln!(
                out,
                "ipmoved {} nat (pid {}), up {}, interface {}, nothing is encrypted",
                self.version,
                self.pid,
                duration(self.uptime_s),
                self.tun
            );
        }
        writeln!(
            out,
            "ipmoved {} (pid {}), up {}, interface {}, UDP port {}",
            self.version,
            self.pid,
            duration(self.uptime_s),
            self.tun,
            self.port
        )?;
        let off = &self.offloads;
        let missing: Vec<&str> = [
            (off.udp_gso, "UDP GSO"),
            (off.udp_gro, "UDP GRO"),
            (off.tun_tso, "TUN TSO"),
            (off.tun_uso, "TUN USO"),
            (off.tun_big_tcp || !self.is_new(), "BIG TCP"),
        ]
        .into_iter()
        .filter_map(|(there, name)| (!there).then_some(name))
        .collect();
        match missing.as_slice() {
            [] => write!(out, "  offloads   all in use")?,
            _ => write!(out, "  offloads   without {} (slower)", missing.join(", "))?,
        }
        match off.udp_gso_fallbacks + off.tun_gso_fallbacks {
            0 => writeln!(out)?,
            refused => writeln!(out, ", refused by the kernel and taken apart: {refused}")?,
        }
        if self.stayed > 0 {
            writeln!(
                out,
                "  stayed     {} packets of this server's own connections",
                self.stayed
            )?;
        }
        if self.own_full > 0 {
            writeln!(
                out,
                "  own        {} times one behind this server was not protected: too many",
                self.own_full
            )?;
        }
        if self.unrecorded > 0 {
            writeln!(
                out,
                "  unrecorded {} conversations, which were too many to record who came",
                self.unrecorded
            )?;
        }
        write_drops(out, "strangers", &self.drops, rates.map(|it| &it.drops))
    }
}

impl TunnelStatus {
    /// Which tunnel it is, and how it is.
    fn title(&self, way: Way) -> String {
        let (other, state) = (self.role.other(), self.headline());
        match way {
            Way::Tunnel => format!("tunnel to {other} server {}: {state}", self.peer),
            Way::Nat => format!("translating to {other} server {}: {state}", self.peer),
        }
    }

    /// The state, and what an administrator has to know first.
    fn headline(&self) -> String {
        let state = match self.state {
            State::Connecting => "connecting",
            State::Up => "up",
            State::Down => "down",
        };
        if let (State::Down, Some(stopped)) = (self.state, self.stopped_s) {
            return format!("stopped: its daemon was stopped {} ago", duration(stopped));
        }
        if let Some(unheard) = self.unheard_s.filter(|&unheard| unheard >= UNHEARD) {
            return format!("{state}, but nothing was heard of it for {unheard} s");
        }
        // A filter that takes one thing may well let others pass, of which some are asked for.
        let nothing_in = |served: &Served| served.state == Answers::NothingIn;
        let all_quiet = self.served.iter().all(nothing_in);
        let is_bad = |it: &&Served| it.is_bad() && (all_quiet || !nothing_in(it));
        let bad: Vec<&Served> = self.served.iter().filter(is_bad).collect();
        let soft = |served: &&Served| {
            served.is_early() || served.expected && served.state == Answers::Unanswered
        };
        match (bad.as_slice(), self.served.iter().find(soft)) {
            ([], Some(first)) => format!("{state}; {}", first.says()),
            ([], None) => match self.refused.as_slice() {
                [] => state.into(),
                [only] => format!("{state}, but {} is not accepted", only.moved),
                some => format!("{state}, but {} moves are not accepted", some.len()),
            },
            ([only], _) => format!("{state}, but {}{}", only.says(), only.waiting()),
            ([first, more @ ..], _) => format!(
                "{state}, but {}{}; {} more, see below",
                first.says(),
                first.waiting(),
                more.len()
            ),
        }
    }

    /// The mode of each move, but of those of which there is nothing to say.
    fn write_modes(&self, out: &mut String) -> std::fmt::Result {
        let shown = self.modes.iter().filter(|it| !it.is_plain());
        for mode in shown.clone().take(SHOWN) {
            write!(out, "  mode       {}: {}", mode.what, mode.says())?;
            if mode.waiting > 0 {
                write!(out, "; {} wait", mode.waiting)?;
            }
            for (count, server) in [(mode.here_live, "old"), (mode.there_live, "new")] {
                if let Some(count) = count {
                    write!(out, "; {server} server has {count}")?;
                }
            }
            writeln!(out, "; since {}", mode.since)?;
        }
        for mode in self.peer_modes.iter().take(SHOWN) {
            writeln!(out, "  mode       {}: {}", mode.what, mode.says())?;
        }
        let more = [shown.count(), self.peer_modes.len()].map(|it| it.saturating_sub(SHOWN));
        match more.into_iter().sum() {
            0 => Ok(()),
            more => writeln!(
                out,
                "  mode       and {more} more, see `ipmoved status --json`"
            ),
        }
    }

    /// What nobody has asked for yet, and how much is answered.
    fn write_served(&self, out: &mut String) -> std::fmt::Result {
        let quiet =
            |served: &&Served| served.state == Answers::NothingIn && served.causes.is_empty();
        let unasked: Vec<&str> = self
            .served
            .iter()
            .filter(quiet)
            .map(|it| it.what.as_str())
            .collect();
        match unasked.as_slice() {
            [] => {}
            [first, second, third, more @ ..] => {
                let some = format!("{first} {second} {third}");
                let more = match more.len() {
                    0 => String::new(),
                    more => format!(" and {more} more"),
                };
                writeln!(out, "  unasked    nothing has come yet for {some}{more}")?;
            }
            few => writeln!(
                out,
                "  unasked    nothing has come yet for {}",
                few.join(" ")
            )?,
        }
        let asked: u64 = self.served.iter().map(|served| served.asked).sum();
        let answered: u64 = self.served.iter().map(|served| served.answered).sum();
        if asked > 0 {
            writeln!(
                out,
                "  answers    {answered} of {asked} conversations watched"
            )?;
        }
        Ok(())
    }

    fn write_text(
        &self,
        out: &mut String,
        way: Way,
        rates: Option<&TunnelRates>,
    ) -> std::fmt::Result {
        let endpoint = self.endpoint.as_deref().unwrap_or("not heard from yet");
        if way == Way::Tunnel {
            writeln!(out, "  endpoint   {endpoint}")?;
        }
        if let (Some(cipher), Some(age)) = (&self.cipher, self.handshake_age_s) {
            let age = duration(age);
            write!(out, "  session    {cipher}, keys {age} old")?;
            match self.rtt_ms {
                Some(rtt) => writeln!(out, ", round trip {rtt:.2} ms")?,
                None => writeln!(out)?,
            }
        }
        let moved = match self.moved.as_slice() {
            [] => "nothing yet (the old server names it with --move)".to_owned(),
            some => first_of(some),
        };
        match &self.deliver_to {
            Some(to) => writeln!(out, "  moved      {moved} → {to}")?,
            None => writeln!(out, "  moved      {moved}")?,
        }
        self.write_modes(out)?;
        if !self.deliver.is_empty() {
            writeln!(out, "  deliver    {}", self.deliver.join(" "))?;
        }
        if self.role == Role::New {
            match self.accept.as_slice() {
                [] => writeln!(
                    out,
                    "  accept     whatever the old server names (limit: --accept)"
                )?,
                some => writeln!(out, "  accept     {}", some.join(" "))?,
            }
        }
        if self.refused_moves > 0 {
            writeln!(out, "  refused    {} moves so far", self.refused_moves)?;
        }
        self.write_served(out)?;
        for of in self.progress.iter().take(SHOWN) {
            writeln!(out, "  progress   {}", of.says())?;
        }
        if let Some(more) = self.progress.len().checked_sub(SHOWN + 1) {
            let more = more + 1;
            writeln!(
                out,
                "  progress   of {more} more, see `ipmoved status --json`"
            )?;
        }
        if !self.clients_from.is_empty() {
            writeln!(
                out,
                "  clients    also from {}",
                self.clients_from.join(" ")
            )?;
        }
        if !self.outgoing.is_empty() {
            let said = match self.peer_allows_outgoing {
                Some(true) => "",
                Some(false) => " (not allowed by the old server: add --allow-outgoing there)",
                None => " (the old server has not said yet whether it allows that)",
            };
            writeln!(out, "  outgoing   {}{said}", self.outgoing.join(" "))?;
        }
        if !self.allow_outgoing.is_empty() {
            let allowed = self.allow_outgoing.join(" ");
            writeln!(out, "  outgoing   the new server may begin: {allowed}")?;
        }
        write!(out, "  mtu        {} bytes", self.mtu)?;
        match self.mtu_hints {
            MtuHints { asked: 0, .. } => writeln!(out)?,
            MtuHints { asked, refuted } => writeln!(
                out,
                ", ICMP errors that said less: {asked}, of these untrue: {refuted}"
            )?,
        }
        if self.role == Role::New || way == Way::Nat {
            let Flows {
                live,
                max,
                evicted,
                displaced,
                collisions,
                refused,
            } = self.flows;
            write!(out, "  flows      {live} of {max}, {evicted} evicted")?;
            for (count, what) in [
                (displaced, "of who held most"),
                (collisions, "told apart by port"),
                (refused, "refused"),
            ] {
                if count > 0 {
                    write!(out, ", {count} {what}")?;
                }
            }
            writeln!(out)?;
        }
        let line = |traffic: Traffic, rate: Option<TrafficRate>| {
            let Traffic { packets, bytes } = traffic;
            let fast = rate.map_or_else(String::new, |rate| format!(" ({rate})"));
            format!("{packets} packets, {}{fast}", size(bytes))
        };
        let (from, to) = match way {
            Way::Tunnel => ("received", "sent"),
            Way::Nat => ("to clients", "to server"),
        };
        let (rx, tx) = (rates.map(|it| it.rx), rates.map(|it| it.tx));
        writeln!(out, "  {from:<10} {}", line(self.rx, rx))?;
        writeln!(out, "  {to:<10} {}", line(self.tx, tx))?;
        write_drops(out, "dropped", &self.drops, rates.map(|it| &it.drops))
    }
}

fn write_drops(
    out: &mut String,
    label: &str,
    drops: &BTreeMap<String, u64>,
    rates: Option<&DropRates>,
) -> std::fmt::Result {
    if drops.is_empty() {
        return Ok(());
    }
    let fast = |reason: &String| {
        let rate = rates.and_then(|rates| rates.get(reason)).copied();
        let rate = rate.filter(|&rate| rate > 0.0);
        rate.map_or_else(String::new, |rate| format!(" (+{}/s)", short(rate)))
    };
    let list: Vec<String> = drops
        .iter()
        .map(|(reason, count)| format!("{reason} {count}{}", fast(reason)))
        .collect();
    writeln!(out, "  {label:<10} {}", list.join(", "))
}

/// A time in seconds, for people.
pub fn duration(seconds: u64) -> String {
    let (days, hours) = (seconds / 86_400, seconds / 3_600 % 24);
    let (minutes, seconds) = (seconds / 60 % 60, seconds % 60);
    if days > 0 {
        format!("{days} d {hours} h")
    } else if hours > 0 {
        format!("{hours} h {minutes} min")
    } else if minutes > 0 {
        format!("{minutes} min {seconds} s")
    } else {
        format!("{seconds} s")
    }
}

/// A number of bytes, for people.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["bytes", "KB", "MB", "GB", "TB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1_000.0 && unit + 1 < UNITS.len() {
        value /= 1_000.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{bytes} bytes")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// Moves that a person is shown; `--json` has all.
const SHOWN: usize = 64;

/// The first few of many names, and how many more there are.
fn first_of(names: &[String]) -> String {
    match names.split_at_checked(SHOWN) {
        Some((first, rest)) if !rest.is_empty() => format!(
            "{} and {} more, see `ipmoved status --json`",
            first.join(" "),
            rest.len()
        ),
        _ => names.join(" "),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    fn mode(what: &str, mode: &str, waiting: u64) -> ModeStatus {
        let is_held = mode == "held";
        ModeStatus {
            what: what.into(),
            mode: mode.into(),
            percent: 5,
            then: is_held.then(|| "here".into()),
            held_s: is_held.then_some(9),
            waiting,
            here_live: Some(2),
            here_tcp: Some(1),
            leaving: false,
            there_live: (mode == "shared").then_some(1),
            since: "2026-11-28T04:00:00Z".into(),
            cutover: None,
        }
    }

    /// A new server's status with something of everything.
    pub(crate) fn example() -> Status {
        Status {
            way: Way::Tunnel,
            tunnels: vec![TunnelStatus {
                place: 0,
                peer: "192.0.2.1:51850".into(),
                endpoint: Some("192.0.2.1:51850".into()),
                role: Role::New,
                state: State::Up,
                cipher: Some("aes-256-gcm".into()),
                rtt_ms: Some(0.17),
                handshake_age_s: Some(61),
                mtu: 1440,
                mtu_hints: MtuHints {
                    asked: 3,
                    refuted: 2,
                },
                unheard_s: Some(1),
                stopped_s: None,
                served: Vec::new(),
                progress: vec![ProgressOf {
                    what: "192.0.2.5".into(),
                    progress: Progress {
                        listens: Listens::No,
                        live: 3,
                        by_tunnel: 190,
                        directly: 810,
                    },
                }],
                looked_for: Vec::new(),
                peer_modes: Vec::new(),
                moved: vec!["192.0.2.5".into()],
                modes: vec![
                    mode("192.0.2.5", "held", 3),
                    mode("192.0.2.6", "shared", 0),
                    mode("192.0.2.7", "moved", 0),
                ],
                deliver_to: Some("198.51.100.2".into()),
                deliver: vec!["192.0.2.5:80=198.51.100.2:8080".into()],
                accept: vec!["192.0.2.0/28".into(), "2001:db8::5".into()],
                clients_from: vec!["10.0.0.0/24".into()],
                outgoing: vec!["bound".into(), "25/tcp".into()],
                allow_outgoing: Vec::new(),
                peer_allows_outgoing: Some(true),
                refused: vec![RefusedMove {
                    moved: "192.0.2.77".into(),
                    why: "192.0.2.77 is not accepted; give it --accept 192.0.2.77".into(),
                }],
                refused_moves: 3,
                flows: Flows {
                    live: 3,
                    max: 10,
                    evicted: 0,
                    displaced: 0,
                    collisions: 2,
                    refused: 0,
                },
                rx: Traffic {
                    packets: 2,
                    bytes: 3_000,
                },
                tx: Traffic::default(),
                drops: BTreeMap::from([("replay".into(), 1)]),
            }],
            tun: "ipmoved0".into(),
            port: 51_850,
            version: "0.1.0".into(),
            pid: 1,
            uptime_s: 3_700,
            offloads: Offloads::default(),
            drops: BTreeMap::new(),
            warnings: vec!["the peer says no".into()],
            log_lines_lost: 0,
            stayed: 7,
            own_full: 0,
            unrecorded: 3,
            unwritten: 0,
        }
    }

    #[test]
    fn the_json_has_the_names_of_the_contract() {
        let json = serde_json::to_value(example()).unwrap();
        let tunnel = json["tunnels"][0].as_object().unwrap();
        let mut names: Vec<&str> = tunnel.keys().map(String::as_str).collect();
        names.sort_unstable();
        let mut contract = [
            "peer",
            "endpoint",
            "role",
            "state",
            "cipher",
            "rtt_ms",
            "handshake_age_s",
            "mtu",
            "moved",
            "deliver_to",
            "flows",
            "rx",
            "tx",
            "drops",
        ];
        let added = [
            "deliver",
            "mtu_hints",
            "accept",
            "clients_from",
            "outgoing",
            "allow_outgoing",
            "peer_allows_outgoing",
            "refused",
            "refused_moves",
            "served",
            "modes",
            "progress",
            "unheard_s",
        ];
        contract.sort_unstable();
        names.retain(|name| !added.contains(name));
        assert_eq!(names, contract);
        let mode = tunnel["modes"][0].as_object().unwrap();
        let contract = "what mode percent waiting here_live there_live since";
        assert!(
            contract.split(' ').all(|name| mode.contains_key(name)),
            "{mode:?}"
        );
        assert_eq!(tunnel["role"], "new");
        assert_eq!(tunnel["state"], "up");
        let progress = serde_json::json!([{
            "what": "192.0.2.5", "listens": "no", "live": 3, "by_tunnel": 190, "directly": 810,
        }]);
        assert_eq!(tunnel["progress"], progress);
        assert_eq!(serde_json::from_value::<Status>(json).unwrap(), example());
    }

    #[test]
    fn the_text_says_what_matters() {
        let text = example().to_text();
        for part in [
            "tunnel to old server 192.0.2.1:51850: up, but 192.0.2.77 is not accepted\n",
            "192.0.2.5 → 198.51.100.2",
            "deliver    192.0.2.5:80=198.51.100.2:8080",
            "accept     192.0.2.0/28 2001:db8::5\n",
            "problem    192.0.2.77 is not accepted; give it --accept 192.0.2.77\n",
            "refused    3 moves so far\n",
            "clients    also from 10.0.0.0/24\n",
            "progress   192.0.2.5: 81 % of new connections arrive directly (810 of 1000), 3 live \
             by the tunnel; nothing listens on the new server\n",
            "mtu        1440 bytes, ICMP errors that said less: 3, of these untrue: 2\n",
            "3 of 10, 0 evicted, 2 told apart by port\n",
            "keys 1 min 1 s old, round trip 0.17 ms",
            "mode       192.0.2.5: held for 9 s at most, then here; 3 wait; old server has 2; \
             since 2026-11-28T04:00:00Z\n",
            "mode       192.0.2.6: shared, 5 % moved; old server has 2; new server has 1; since",
            "mode       192.0.2.7: moved; old server has 2;",
            "replay 1",
            "without UDP GSO",
            "unrecorded 3 conversations",
            "warning    the peer says no",
            "3.0 KB",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
    }

    fn served(what: &str, state: Answers, causes: &[&str]) -> Served {
        Served {
            what: what.into(),
            state,
            expected: true,
            since_s: 5,
            asked: 3,
            answered: 0,
            refused: 0,
            clients: 2,
            causes: causes
                .iter()
                .map(|text| Cause {
                    cause: "nothing_listens".into(),
                    text: (*text).into(),
                    remedy: "start it".into(),
                })
                .collect(),
        }
    }

    #[test]
    fn the_first_line_says_what_is_not_answered() {
        let first = |served: Vec<Served>| {
            let mut status = example();
            status.tunnels[0].refused.clear();
            status.tunnels[0].served = served;
            let text = status.to_text();
            text.lines().next().unwrap().to_owned()
        };
        let up = "tunnel to old server 192.0.2.1:51850: up";
        assert_eq!(first(vec![served("a", Answers::Ok, &[])]), up);
        assert_eq!(first(vec![served("a", Answers::NothingIn, &[])]), up);
        let silent = served("192.0.2.5:80/tcp", Answers::Silent, &["nothing listens"]);
        let says = ", but 192.0.2.5:80/tcp is not answered: nothing listens (2 clients wait)";
        assert_eq!(first(vec![silent.clone()]), format!("{up}{says}"));
        let refused = served("b", Answers::Refused, &[]);
        let more = first(vec![silent, refused]);
        assert_eq!(more, format!("{up}{says}; 1 more, see below"));
        let udp = served("192.0.2.5:514/udp", Answers::Unanswered, &[]);
        assert_eq!(
            first(vec![udp.clone()]),
            format!("{up}; no answer yet from 192.0.2.5:514/udp")
        );
        let scanned = Served {
            expected: false,
            ..udp
        };
        assert_eq!(first(vec![scanned]), up);
        let early = served("192.0.2.5:80", Answers::NothingIn, &["nobody there"]);
        let says = "; nothing has come for 192.0.2.5:80: nobody there";
        assert_eq!(first(vec![early]), format!("{up}{says}"), "no alarm yet");
        let mut nothing = served("192.0.2.5", Answers::NothingIn, &["a filter takes it"]);
        nothing.causes[0].cause = "filter_before".into();
        let well = served("192.0.2.6", Answers::Ok, &[]);
        assert_eq!(
            first(vec![nothing.clone(), well]),
            up,
            "not everything is taken"
        );
        let says = ", but nothing has come for 192.0.2.5: a filter takes it (2 clients wait)";
        assert_eq!(first(vec![nothing]), format!("{up}{says}"));
    }

    #[test]
    fn the_first_line_says_that_the_peer_is_not_heard() {
        let mut status = example();
        status.tunnels[0].unheard_s = Some(9);
        let text = status.to_text();
        let first = text.lines().next().unwrap();
        assert!(
            first.ends_with(": up, but nothing was heard of it for 9 s"),
            "{first}"
        );
    }

    #[test]
    fn of_several_tunnels_the_first_line_says_what_is_worst() {
        let mut status = example();
        status.tunnels[0].refused.clear();
        status.tunnels[0].modes.clear();
        let mut other = status.tunnels[0].clone();
        other.peer = "192.0.2.9:51850".into();
        status.tunnels.push(other);
        let text = |status: &Status| status.to_text();
        assert!(
            text(&status).starts_with("all 2 tunnels: up\n"),
            "{}",
            text(&status)
        );
        status.tunnels[1].state = State::Down;
        let said = text(&status);
        let lines: Vec<&str> = said.lines().collect();
        assert_eq!(lines[0], "tunnel to old server 192.0.2.9:51850: down");
        assert_eq!(
            lines[1],
            "  problem    192.0.2.9:51850: no packet comes: 192.0.2.9:51850, the old server, does \
             not answer"
        );
        assert!(lines[2].starts_with("             → on the old server: `systemctl status"));
        let sections = said
            .matches("tunnel to old server 192.0.2.1:51850: up\n")
            .count();
        assert_eq!(sections, 1, "{said}");
    }

    #[test]
    fn rates_stand_beside_what_they_are_of() {
        let before = example();
        let mut after = example();
        (after.tunnels[0].rx.packets, after.tunnels[0].rx.bytes) = (1_002, 1_253_000);
        after.tunnels[0].drops.insert("replay".into(), 5);
        let rates = Rates::between(&before, &after, std::time::Duration::from_secs(2));
        let text = after.to_text_with(rates.as_ref());
        let received = "received   1002 packets, 1.3 MB (500 packets/s, 5.0 Mbit/s)\n";
        assert!(text.contains(received), "{text}");
        assert!(text.contains("dropped    replay 5 (+2/s)\n"), "{text}");
        let mut anew = after.clone();
        anew.pid += 1;
        assert_eq!(
            Rates::between(&before, &anew, std::time::Duration::from_secs(2)),
            None
        );
    }

    #[test]
    fn what_is_wrong_stands_with_its_remedy() {
        let mut status = example();
        let causes = ["nothing listens", "a firewall"];
        status.tunnels[0].served = vec![served("a", Answers::Silent, &causes)];
        let text = status.to_text();
        for line in [
            "  problem    a is not answered: nothing listens (2 clients wait), for 5 s",
            "             → start it",
            "             → or a firewall: start it",
            "  answers    0 of 3 conversations watched",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
        let unasked = |what: &str| served(what, Answers::NothingIn, &[]);
        status.tunnels[0].served = ["a", "b", "c", "d", "e"].map(unasked).into();
        let text = status.to_text();
        let line = "  unasked    nothing has come yet for a b c and 2 more\n";
        {
            assert!(text.contains(line), "{line}: {text}");
        }
    }
}
