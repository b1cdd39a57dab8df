//! What a scraper gets: the status as metrics.
//!
//! Owns the names, units, labels and help texts of all metrics, which stay the same. They are made
//! from one [`Status`], so that a scrape, `status` and `top` never disagree, and nothing is counted
//! twice. `prometheus-client` writes the two text forms.

#[cfg(test)]
mod tests;

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, prometheus_text, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

use crate::model::drops::DropReason;
use crate::model::peer::Role;
use crate::model::problems::Severity;
use crate::model::progress::Listens;
use crate::model::status::{Answers, State, Status, Traffic, TunnelStatus, Way};

/// Moves of one peer that have series of their own: ten series each, and nobody draws more lines.
/// How many there are is a series too.
const MAX_MOVES: usize = 256;

/// Peers for which a reason that has dropped nothing yet has a series, too: one that begins at zero
/// shows the first drop as an increase. With more peers there would be thousands of them.
const ALL_REASONS: usize = 16;

/// The label of flows that no peer has alone.
const ALL_PEERS: &str = "all";

/// The modes of a move, as `status` names them.
const MODES: [&str; 4] = ["here", "held", "shared", "moved"];

/// The forms that a scraper may ask for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Form {
    /// `text/plain; version=0.0.4`, which everybody reads.
    Prometheus,
    /// `application/openmetrics-text; version=1.0.0`.
    OpenMetrics,
}

impl Form {
    /// What the scraper is told that it gets.
    pub(super) fn content_type(self) -> &'static str {
        match self {
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }

    /// The form that a request's `Accept` asks for: OpenMetrics, if it names that and does not
    /// refuse it, or want the other one more (RFC 9110, section 12.5.1). Who refuses everything
    /// gets what everybody reads.
    pub(super) fn asked_for(accept: &str) -> Self {
        let mut wanted = [None, None];
        for range in accept.split(',') {
            let mut parts = range.split(';').map(str::trim);
            let kind = parts.next().unwrap_or_default().to_ascii_lowercase();
            let weight = parts.find_map(weight).unwrap_or(1.0);
            let place = match kind.as_str() {
                "application/openmetrics-text" => 0,
                "text/plain" | "text/*" | "*/*" => 1,
                _ => continue,
            };
            let before = wanted[place].unwrap_or(0.0);
            wanted[place] = Some(weight.max(before));
        }
        match wanted {
            [Some(open), plain] if open > 0.0 && open >= plain.unwrap_or(0.0) => Self::OpenMetrics,
            _ => Self::Prometheus,
        }
    }
}

/// What a parameter says if it is a weight: 1 where it is no number, as if it was not there.
fn weight(parameter: &str) -> Option<f32> {
    let (name, value) = parameter.split_once('=')?;
    let weight = || {
        value
            .trim()
            .parse()
            .ok()
            .filter(|it| (0.0..=1.0).contains(it))
    };
    name.trim()
        .eq_ignore_ascii_case("q")
        .then(|| weight().unwrap_or(1.0))
}

/// Writes the metrics of a status.
pub(super) fn write(status: &Status, form: Form) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("ipmoved");
    registry.register_collector(Box::new(Families::of(status)));
    let mut out = String::new();
    match form {
        Form::Prometheus => prometheus_text::encode(&mut out, &registry)?,
        Form::OpenMetrics => text::encode(&mut out, &registry)?,
    }
    Ok(out)
}

type Labels = Vec<(&'static str, String)>;

/// All metrics with what they are at one moment.
#[derive(Debug, Default)]
struct Families(Vec<Family>);

/// One metric.
#[derive(Debug)]
struct Family {
    name: &'static str,
    unit: Option<Unit>,
    kind: Kind,
    help: &'static str,
    samples: Vec<(Labels, f64)>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Counter,
    Gauge,
}

impl Collector for Families {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for family in self.0.iter().filter(|family| !family.samples.is_empty()) {
            let (kind, help) = (
                match family.kind {
                    Kind::Counter => MetricType::Counter,
                    Kind::Gauge => MetricType::Gauge,
                },
                family.help,
            );
            let unit = family.unit.as_ref();
            let mut metric = encoder.encode_descriptor(family.name, help, unit, kind)?;
            for (labels, value) in &family.samples {
                let mut sample = metric.encode_family(labels)?;
                match family.kind {
                    Kind::Counter => {
                        sample.encode_counter::<Labels, u64, f64>(&(*value as u64), None)?
                    }
                    Kind::Gauge => sample.encode_gauge(value)?,
                }
            }
        }
        Ok(())
    }
}

/// A counter is exact up to 2⁵³, as in Prometheus itself.
fn count(value: u64) -> f64 {
    value as f64
}

/// Prometheus has it in the singular.
fn ratio() -> Unit {
    Unit::Other("ratio".into())
}

fn flag(is_so: bool) -> f64 {
    f64::from(u8::from(is_so))
}

impl Families {
    fn of(status: &Status) -> Self {
        let mut all = Self::default();
        all.daemon(status);
        all.drops(status);
        all.flows(status);
        for tunnel in &status.tunnels {
            all.peer(tunnel);
            all.moves(tunnel);
            all.answers(tunnel);
        }
        all
    }

    fn add(
        &mut self,
        (kind, name, unit): (Kind, &'static str, Option<Unit>),
        help: &'static str,
        labels: Labels,
        value: f64,
    ) {
        let known = |it: &&mut Family| (it.name, &it.unit) == (name, &unit);
        let found = self.0.iter_mut().find(known);
        match found {
            Some(family) => family.samples.push((labels, value)),
            None => self.0.push(Family {
                name,
                unit,
                kind,
                help,
                samples: vec![(labels, value)],
            }),
        }
    }

    fn counter(&mut self, name: &'static str, help: &'static str, labels: Labels, value: u64) {
        self.add((Kind::Counter, name, None), help, labels, count(value));
    }

    fn gauge(&mut self, name: &'static str, help: &'static str, labels: Labels, value: f64) {
        self.add((Kind::Gauge, name, None), help, labels, value);
    }

    fn in_unit(
        &mut self,
        (name, unit): (&'static str, Unit),
        help: &'static str,
        labels: Labels,
        value: f64,
    ) {
        self.add((Kind::Gauge, name, Some(unit)), help, labels, value);
    }

    /// What concerns the daemon as a whole.
    fn daemon(&mut self, status: &Status) {
        let role = match (status.way, status.tunnels.first().map(|it| it.role)) {
            (Way::Nat, _) => "nat",
            (Way::Tunnel, Some(Role::New)) => "new",
            (Way::Tunnel, Some(Role::Old) | None) => "old",
        };
        let build = vec![
            ("version", status.version.clone()),
            ("role", role.to_owned()),
        ];
        self.gauge("build_info", "The daemon that runs; always 1", build, 1.0);
        let up = count(status.uptime_s);
        let help = "How long the daemon has been running";
        self.in_unit(("uptime", Unit::Seconds), help, Vec::new(), up);
        let problems = status.problems();
        for severity in Severity::ALL {
            let many = problems.iter().filter(|it| it.severity == severity).count();
            let labels = vec![("severity", severity.name().to_owned())];
            let help = "What `ipmoved status` shows as wrong at the moment";
            self.gauge("problems", help, labels, many as f64);
        }
        let warnings = status.warnings.len() as f64;
        let help = "Warnings that `ipmoved status` still shows";
        self.gauge("warnings", help, Vec::new(), warnings);
        for (name, help, value) in [
            (
                "log_lines_lost",
                "Log lines that nobody took in time",
                status.log_lines_lost,
            ),
            (
                "stayed_packets",
                "Packets to what has moved that stayed on the old server, being its own",
                status.stayed,
            ),
            (
                "own_conversations_unprotected",
                "Times that 65536 conversations of hosts behind the old server were kept already",
                status.own_full,
            ),
            (
                "visits_unrecorded",
                "Conversations that were too many to record who came",
                status.unrecorded,
            ),
        ] {
            self.counter(name, help, Vec::new(), value);
        }
        let off = &status.offloads;
        for (name, is_used) in [
            ("udp_gso", off.udp_gso),
            ("udp_gro", off.udp_gro),
            ("tun_tso", off.tun_tso),
            ("tun_uso", off.tun_uso),
            ("tun_big_tcp", off.tun_big_tcp),
        ] {
            let labels = vec![("offload", name.to_owned())];
            let help = "Whether a kernel offload is in use";
            self.gauge("offload_active", help, labels, flag(is_used));
        }
        for (name, times) in [
            ("udp_gso", off.udp_gso_fallbacks),
            ("tun_gso", off.tun_gso_fallbacks),
        ] {
            let labels = vec![("offload", name.to_owned())];
            let help = "Batches that the kernel refused, so that they were taken apart";
            self.counter("offload_fallbacks", help, labels, times);
        }
    }

    /// What was dropped, of each peer, and of strangers.
    fn drops(&mut self, status: &Status) {
        let all_reasons = status.tunnels.len() <= ALL_REASONS;
        let help = "Datagrams of strangers that were dropped";
        for reason in DropReason::ALL.iter().map(|reason| reason.name()) {
            let dropped = status.drops.get(reason).copied();
            let labels = vec![("reason", reason.to_owned())];
            if status.way == Way::Tunnel
                && let Some(dropped) = dropped
            {
                self.counter("strangers_dropped", help, labels, dropped);
            }
        }
        // Those are shown with the only peer as well.
        let shown_with_it = status.tunnels.len() == 1;
        let help = "Packets and datagrams that were dropped";
        for tunnel in &status.tunnels {
            for reason in DropReason::ALL.iter().map(|reason| reason.name()) {
                let mut dropped = tunnel.drops.get(reason).copied();
                if shown_with_it {
                    let strangers = status.drops.get(reason).copied().unwrap_or(0);
                    dropped = dropped.map(|all| all.saturating_sub(strangers));
                }
                let dropped = dropped.or(all_reasons.then_some(0));
                if let Some(dropped) = dropped {
                    let mut labels = of(tunnel);
                    labels.push(("reason", reason.to_owned()));
                    self.counter("dropped", help, labels, dropped);
                }
            }
        }
    }

    /// The flow tables: on the old server one for each peer, elsewhere one for all.
    fn flows(&mut self, status: &Status) {
        let shared = status.way == Way::Nat || status.is_new();
        let tables = match shared {
            true => status.tunnels.get(..1).unwrap_or_default(),
            false => status.tunnels.as_slice(),
        };
        for tunnel in tables {
            let labels = || match shared {
                true => vec![("peer", ALL_PEERS.to_owned())],
                false => of(tunnel),
            };
            let flows = tunnel.flows;
            for (name, help, value) in [
                ("flows", "Flows that are remembered", flows.live),
                (
                    "flows_max",
                    "Most flows that may be (--max-flows)",
                    flows.max,
                ),
            ] {
                self.gauge(name, help, labels(), count(value));
            }
            for (name, help, value) in [
                (
                    "flows_evicted",
                    "Flows that were given up before their time to make space",
                    flows.evicted,
                ),
                (
                    "flows_displaced",
                    "Those of the evicted that were in use, of who held most",
                    flows.displaced,
                ),
                (
                    "flow_collisions",
                    "Flows that got another client port to tell them from one that was there",
                    flows.collisions,
                ),
                (
                    "flows_refused",
                    "New flows that were refused because the table was full",
                    flows.refused,
                ),
            ] {
                self.counter(name, help, labels(), value);
            }
        }
    }

    /// A peer, and what goes to it and comes from it.
    fn peer(&mut self, tunnel: &TunnelStatus) {
        let mut info = of(tunnel);
        info.push(("role", tunnel.role.other().to_string()));
        info.push(("cipher", tunnel.cipher.clone().unwrap_or_default()));
        self.gauge(
            "peer_info",
            "A peer that is configured; always 1",
            info,
            1.0,
        );
        let up = flag(tunnel.state == State::Up);
        self.gauge(
            "peer_up",
            "Whether packets pass to the peer",
            of(tunnel),
            up,
        );
        for (name, help, seconds) in [
            (
                "peer_unheard",
                "For how long nothing was heard of a peer that is up",
                tunnel.unheard_s.map(count),
            ),
            (
                "peer_round_trip",
                "Round trip over the tunnel",
                tunnel.rtt_ms.map(|ms| ms / 1_000.0),
            ),
            (
                "peer_key_age",
                "Age of the keys in use",
                tunnel.handshake_age_s.map(count),
            ),
        ] {
            if let Some(seconds) = seconds {
                self.in_unit((name, Unit::Seconds), help, of(tunnel), seconds);
            }
        }
        let help = "Largest IP packet that fits one datagram to the peer";
        let mtu = tunnel.mtu as f64;
        self.in_unit(("peer_mtu", Unit::Bytes), help, of(tunnel), mtu);
        let hints = tunnel.mtu_hints;
        let help = "Times that an ICMP error said that less fits, and the peer was asked";
        self.counter("peer_mtu_hints", help, of(tunnel), hints.asked);
        let help = "Times that the size in use passed nevertheless";
        self.counter("peer_mtu_hints_refuted", help, of(tunnel), hints.refuted);
        let Traffic { packets, bytes } = tunnel.rx;
        let help = "IP packets that came out of the tunnel (nat: went to clients)";
        self.counter("received_packets", help, of(tunnel), packets);
        let help = "Bytes of the IP packets that came out of the tunnel (nat: went to clients)";
        let received = (Kind::Counter, "received", Some(Unit::Bytes));
        self.add(received, help, of(tunnel), count(bytes));
        let Traffic { packets, bytes } = tunnel.tx;
        let help = "IP packets that went into the tunnel (nat: to the new server)";
        self.counter("sent_packets", help, of(tunnel), packets);
        let help = "Bytes of the IP packets that went into the tunnel (nat: to the new server)";
        let sent = (Kind::Counter, "sent", Some(Unit::Bytes));
        self.add(sent, help, of(tunnel), count(bytes));
        let help = "Times that the peer named a move that is not accepted here";
        self.counter("moves_refused", help, of(tunnel), tunnel.refused_moves);
    }

    /// What has moved: mode and progress of each.
    fn moves(&mut self, tunnel: &TunnelStatus) {
        let many = tunnel.moved.len() as f64;
        self.gauge("moves", "Moves to or from a peer", of(tunnel), many);
        let many = tunnel.refused.len() as f64;
        let help = "Moves that the peer names and that are not accepted here";
        self.gauge("moves_not_accepted", help, of(tunnel), many);
        let of_move = |what: &String| {
            let mut labels = of(tunnel);
            labels.push(("move", what.clone()));
            labels
        };
        for mode in tunnel.modes.iter().take(MAX_MOVES) {
            for name in MODES {
                let mut labels = of_move(&mode.what);
                labels.push(("mode", name.to_owned()));
                let help = "Who answers new conversations: 1 for the mode that a move is in";
                self.gauge("move_mode", help, labels, flag(mode.mode == name));
            }
            let part = match mode.mode.as_str() {
                "here" => 0.0,
                "moved" => 1.0,
                _ => f64::from(mode.percent) / 100.0,
            };
            let help = "Part of all clients that the new server gets, or gets again after a hold";
            self.in_unit(("move_share", ratio()), help, of_move(&mode.what), part);
            for (name, help, value) in [
                (
                    "move_waiting",
                    "Conversations that wait for the end of a hold",
                    Some(mode.waiting),
                ),
                (
                    "move_conversations_here",
                    "Conversations of hosts behind the old server",
                    mode.here_live,
                ),
            ] {
                if let Some(value) = value {
                    self.gauge(name, help, of_move(&mode.what), count(value));
                }
            }
        }
        for of in tunnel.progress.iter().take(MAX_MOVES) {
            for (way, conversations) in [
                ("tunnel", of.progress.by_tunnel),
                ("direct", of.progress.directly),
            ] {
                let mut labels = of_move(&of.what);
                labels.push(("way", way.to_owned()));
                let help = "Conversations that came to the new server by either way";
                self.counter("move_arrivals", help, labels, conversations);
            }
            let help = "Conversations that came by the tunnel and live";
            let live = count(of.progress.live);
            self.gauge("move_conversations", help, of_move(&of.what), live);
            let listens = match of.progress.listens {
                Listens::Yes => Some(true),
                Listens::No => Some(false),
                Listens::Unknown => None,
            };
            if let Some(listens) = listens {
                let help = "Whether something listens on the new server, where that is known";
                self.gauge("move_listens", help, of_move(&of.what), flag(listens));
            }
        }
    }

    /// What clients ask for, and whether it is answered. What only a scan asks for has no series.
    fn answers(&mut self, tunnel: &TunnelStatus) {
        let waiting: u64 = tunnel.served.iter().map(|served| served.clients).sum();
        let help = "Clients that wait for an answer";
        self.gauge("clients_waiting", help, of(tunnel), count(waiting));
        for served in tunnel.served.iter().filter(|served| served.expected) {
            let mut labels = of(tunnel);
            labels.push(("service", served.what.clone()));
            let is_bad = match served.state {
                Answers::Silent | Answers::Refused => true,
                Answers::NothingIn | Answers::Unanswered | Answers::Ok => false,
            };
            let help = "Whether clients of a service get no answer, or are refused";
            self.gauge("service_failing", help, labels, flag(is_bad));
        }
    }
}

fn of(tunnel: &TunnelStatus) -> Labels {
    vec![("peer", tunnel.peer.clone())]
}
