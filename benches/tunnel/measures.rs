//! The measurements of a contender in a round.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::contenders::Contender;
use crate::counters::{cpu_of, cpu_of_machine, queue_drops, resident, socket_drops};
use crate::exchange::{self, Messages};
use crate::flood::{self, Buffer, Calls, Datagrams, Flood};
use crate::impair::{Impairment, impaired};
use crate::load::{self, Clients, Direction, Streams};

/// How much time each measurement takes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    pub(crate) tcp: Duration,
    pub(crate) flood: Duration,
    pub(crate) round_trips: Duration,
    pub(crate) connections: Duration,
    pub(crate) pings: usize,
    /// Steps of the search for the highest rate without loss; 0 leaves it out.
    pub(crate) search: usize,
    /// Most rounds that also measure impaired paths; 0 leaves these out.
    pub(crate) impaired: usize,
}

impl Effort {
    /// For figures that will be quoted.
    pub(crate) const FULL: Self = Self {
        tcp: Duration::from_secs(2),
        flood: Duration::from_secs(1),
        round_trips: Duration::from_secs(1),
        connections: Duration::from_secs(1),
        pings: 400,
        search: 5,
        impaired: 3,
    };
    /// For a quick look.
    pub(crate) const QUICK: Self = Self {
        tcp: Duration::from_millis(500),
        flood: Duration::from_millis(300),
        round_trips: Duration::from_millis(300),
        connections: Duration::from_millis(300),
        pings: 100,
        search: 0,
        impaired: 1,
    };
}

/// Which figures are measured: those whose name contains one of these, or all.
#[derive(Clone, Debug)]
pub(crate) struct Wanted(pub(crate) Vec<String>);

impl Wanted {
    /// Whether one of these is measured.
    pub(crate) fn any(&self, names: &[&str]) -> bool {
        let is_wanted = |name: &&str| self.0.iter().any(|part| name.contains(part.as_str()));
        self.0.is_empty() || names.iter().any(is_wanted)
    }

    /// Whether something is left out.
    pub(crate) fn is_some(&self) -> bool {
        !self.0.is_empty()
    }
}

/// One step of the search for the highest rate without loss.
const SEARCH_STEP: Duration = Duration::from_millis(350);
/// Loss that counts as none.
const CLEAN: f64 = 0.01;

/// Flows of the large table.
const FLOWS: usize = 1_000_000;
/// How fast they begin, in flows a second: below the rate that the tunnel carries without loss even
/// when it must wait for a processor.
const FLOW_PACE: f64 = 40_000.0;

/// One stream in each direction, and several.
const FORWARD: Streams = Streams::new(1, Direction::Forward);
const REVERSE: Streams = Streams::new(1, Direction::Reverse);
const FOUR: Streams = Streams::new(4, Direction::Forward);
/// Streams on impaired paths. One stream has a loss only now and then; so many have enough in two
/// seconds for figures that scatter by some per cent.
const MANY: Streams = Streams::new(16, Direction::Forward).loss_based();

/// Number of runs, with few flows and with many. The figures are their medians.
const REPEATED: usize = 5;

/// Queries to a resolver by somebody who asks much.
const QUERIES: Messages = Messages {
    payload: 64,
    outstanding: 32,
};
/// Requests to a busy service: two packets of one connection hardly ever follow each other.
const REQUESTS: Messages = Messages {
    payload: 100,
    outstanding: 256,
};

/// The impairments of the path, the figure of each, and the figure of its share of the first one.
const IMPAIRMENTS: [(Impairment, &str, Option<&str>); 4] = [
    (Impairment::Nothing, "tcp, packets segmented", None),
    (
        Impairment::Loss { per_mille: 10 },
        "tcp, 1 % loss",
        Some("left at 1 % loss"),
    ),
    (
        Impairment::Loss { per_mille: 30 },
        "tcp, 3 % loss",
        Some("left at 3 % loss"),
    ),
    (
        Impairment::Reordering,
        "tcp, reordered",
        Some("left when reordered"),
    ),
];

/// The lines of the table, in its order.
pub(crate) fn figures() -> impl Iterator<Item = &'static Figure> {
    let floods = FLOODS.iter().flat_map(|(_, figures)| figures);
    STREAMS.iter().chain(floods).chain(OTHERS)
}

/// Figures of TCP streams.
const STREAMS: &[Figure] = &[
    figure("tcp forward", "Gbit/s", Better::More, 2),
    figure("tcp reverse", "Gbit/s", Better::More, 2),
    figure("tcp forward, 4 streams", "Gbit/s", Better::More, 2),
    figure("tcp, packets segmented", "Gbit/s", Better::More, 2),
    figure("tcp, 1 % loss", "Gbit/s", Better::More, 3),
    figure("tcp, 3 % loss", "Gbit/s", Better::More, 3),
    figure("tcp, reordered", "Gbit/s", Better::More, 2),
    figure("left at 1 % loss", "%", Better::More, 1),
    figure("left at 3 % loss", "%", Better::More, 1),
    figure("left when reordered", "%", Better::More, 1),
    figure("cpu old, forward", "s/GB", Better::Less, 2),
    figure("cpu new, forward", "s/GB", Better::Less, 2),
    figure("cpu old, reverse", "s/GB", Better::Less, 2),
    figure("cpu new, reverse", "s/GB", Better::Less, 2),
    figure("cpu machine, forward", "s/GB", Better::Less, 2),
];

/// The figures of a flood.
macro_rules! flood_figures {
    ($flood:literal) => {
        [
            figure(concat!($flood, ", received"), "kpps", Better::More, 0),
            figure(concat!($flood, ", offered"), "kpps", Better::More, 0),
            figure(concat!($flood, ", lost"), "%", Better::Less, 1),
            figure(
                concat!($flood, ", dropped by daemons"),
                "%",
                Better::Less,
                2,
            ),
            figure(concat!($flood, ", overran queues"), "%", Better::Less, 1),
            figure(
                concat!($flood, ", overran the receiver"),
                "%",
                Better::Less,
                1,
            ),
            figure(concat!($flood, ", without loss"), "kpps", Better::More, 0),
        ]
    };
}

/// The floods and their figures. [`flooded`] measures them.
const FLOODS: [(Datagrams, [Figure; 7]); 6] = [
    (
        Datagrams {
            payload: [64; 2],
            calls: Calls::Batched,
            buffer: Buffer::Large,
            flows: 1,
        },
        flood_figures!("udp 64 B, batched"),
    ),
    (
        Datagrams {
            payload: [64; 2],
            calls: Calls::OneEach,
            buffer: Buffer::Default,
            flows: 1,
        },
        flood_figures!("udp 64 B, one call each"),
    ),
    (
        Datagrams {
            payload: [64; 2],
            calls: Calls::OneEach,
            buffer: Buffer::Large,
            flows: 1,
        },
        flood_figures!("udp 64 B, one call each, large buffer"),
    ),
    (
        Datagrams {
            payload: [64, 200],
            calls: Calls::OneEach,
            buffer: Buffer::Default,
            flows: 1_000,
        },
        flood_figures!("udp, 1,000 flows in turn"),
    ),
    (
        Datagrams {
            payload: [1_200; 2],
            calls: Calls::Batched,
            buffer: Buffer::Large,
            flows: 1,
        },
        flood_figures!("udp 1200 B, batched"),
    ),
    (
        Datagrams {
            payload: [1_200; 2],
            calls: Calls::OneEach,
            buffer: Buffer::Default,
            flows: 1,
        },
        flood_figures!("udp 1200 B, one call each"),
    ),
];

/// All other figures.
const OTHERS: &[Figure] = &[
    figure("round trips, udp 64 B, 32 at a time", "/s", Better::More, 0),
    figure(
        "round trips, tcp 100 B, 256 connections",
        "/s",
        Better::More,
        0,
    ),
    figure("ping, median", "ms", Better::Less, 3),
    figure("ping, 90 %", "ms", Better::Less, 3),
    figure("ping, 99 %", "ms", Better::Less, 3),
    figure("connections, 1 client", "/s", Better::More, 0),
    figure("connections, 250 clients", "/s", Better::More, 0),
    figure("memory old, no flows", "MB", Better::Less, 1),
    figure("memory new, no flows", "MB", Better::Less, 1),
    figure("flows opened", "", Better::More, 0),
    figure("memory a flow", "bytes", Better::Less, 0),
    figure("tcp forward, few flows", "Gbit/s", Better::More, 2),
    figure("tcp forward, 1 M flows", "Gbit/s", Better::More, 2),
];

/// One line of the table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Figure {
    pub(crate) name: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) better: Better,
    pub(crate) decimals: usize,
}

/// Which direction is better.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Better {
    More,
    Less,
}

const fn figure(name: &'static str, unit: &'static str, better: Better, decimals: usize) -> Figure {
    Figure {
        name,
        unit,
        better,
        decimals,
    }
}

/// The results: name and value.
pub(crate) type Figures = Vec<(&'static str, f64)>;

/// The measurements before any traffic.
pub(crate) fn at_rest(contender: &Contender<'_>) -> Result<Figures> {
    let Some([old, new]) = contender.pids() else {
        return Ok(vec![]);
    };
    Ok(vec![
        ("memory old, no flows", resident(old)? / 1e6),
        ("memory new, no flows", resident(new)? / 1e6),
    ])
}

/// The measurements of each round.
pub(crate) fn round(
    contender: &Contender<'_>,
    effort: &Effort,
    wanted: &Wanted,
) -> Result<Figures> {
    let (lab, target) = (contender.lab(), contender.target());
    let mut figures = Figures::new();
    for (streams, rate, daemons, machine) in [
        (
            FORWARD,
            "tcp forward",
            Some(["cpu old, forward", "cpu new, forward"]),
            Some("cpu machine, forward"),
        ),
        (
            REVERSE,
            "tcp reverse",
            Some(["cpu old, reverse", "cpu new, reverse"]),
            None,
        ),
        (FOUR, "tcp forward, 4 streams", None, None),
    ] {
        let names = [rate].into_iter().chain(daemons.into_iter().flatten());
        if !wanted.any(&names.chain(machine).collect::<Vec<_>>()) {
            continue;
        }
        let stream = stream(contender, streams, effort.tcp)?;
        figures.push((rate, stream.gbit_per_s));
        if let (Some(names), Some(times)) = (daemons, stream.daemons) {
            figures.extend(names.into_iter().zip(times));
        }
        figures.extend(machine.map(|name| (name, stream.machine)));
    }

    for (datagrams, of_flood) in FLOODS {
        let names = of_flood.map(|figure| figure.name);
        if wanted.any(&names) {
            figures.extend(flooded(contender, datagrams, names, effort)?);
        }
    }

    let udp = "round trips, udp 64 B, 32 at a time";
    if wanted.any(&[udp]) {
        let rate = exchange::udp(lab, target, QUERIES, effort.round_trips)?;
        figures.push((udp, rate));
    }
    let tcp = "round trips, tcp 100 B, 256 connections";
    if wanted.any(&[tcp]) {
        let rate = exchange::tcp(lab, target, REQUESTS, effort.round_trips)?;
        figures.push((tcp, rate));
    }

    let pings = [
        ("ping, median", 0.5),
        ("ping, 90 %", 0.9),
        ("ping, 99 %", 0.99),
    ];
    if wanted.any(&pings.map(|(name, _)| name)) {
        let trips = load::pings(lab, target, effort.pings)?;
        figures.extend(pings.map(|(name, share)| {
            let at = (trips.len() as f64 * share) as usize;
            let trip = trips
                .get(at.min(trips.len().saturating_sub(1)))
                .map_or(f64::NAN, |trip| trip.as_secs_f64() * 1e3);
            (name, trip)
        }));
    }
    for (clients, name) in [
        (Clients::One, "connections, 1 client"),
        (Clients::Many, "connections, 250 clients"),
    ] {
        if wanted.any(&[name]) {
            let rate = load::connections(lab, target, clients, effort.connections)?;
            figures.push((name, rate));
        }
    }
    Ok(figures)
}

/// Throughput on impaired paths, and its share of the contender's own on a sound path.
pub(crate) fn impaired_paths(contender: &Contender<'_>, effort: &Effort) -> Result<Figures> {
    let mut figures = Figures::new();
    if !contender.is_impaired() {
        return Ok(figures);
    }
    let mut sound = f64::NAN;
    for (impairment, name, left) in IMPAIRMENTS {
        let stream = impaired(contender.lab(), impairment, || {
            stream(contender, MANY, effort.tcp)
        })
        .context(name)?;
        figures.push((name, stream.gbit_per_s));
        match left {
            None => sound = stream.gbit_per_s,
            Some(left) => figures.push((left, stream.gbit_per_s / sound * 100.0)),
        }
    }
    Ok(figures)
}

/// Memory with a million flows, and throughput with few and with many of them in turn. Two pairs of
/// daemons do it, so that a disturbance of the machine disturbs both.
pub(crate) fn many_flows(
    few: &Contender<'_>,
    many: &Contender<'_>,
    effort: &Effort,
) -> Result<Figures> {
    let (Some(daemons), Some([_, new])) = (many.daemons(), many.pids()) else {
        return Ok(vec![]);
    };
    let mut figures = Figures::new();
    // One run comes first, because a pair of daemons also fills buffers that are no flows.
    stream(many, FORWARD, effort.tcp)?;
    let (before, flows) = (resident(new)?, daemons.new.status()?.live_flows());
    let (lab, target) = (many.lab(), many.target());
    load::open_flows(lab, target, FLOWS, FLOW_PACE, || {
        let opened = daemons.new.status()?.live_flows().saturating_sub(flows);
        Ok(opened as f64 > FLOWS as f64 * 0.99)
    })?;
    let live = daemons.new.status()?.live_flows();
    let grown = resident(new)? - before;
    let opened = live.saturating_sub(flows) as f64;
    figures.extend([("flows opened", opened), ("memory a flow", grown / opened)]);
    for _ in 0..REPEATED {
        for (contender, name) in [
            (few, "tcp forward, few flows"),
            (many, "tcp forward, 1 M flows"),
        ] {
            let stream = stream(contender, FORWARD, effort.tcp)?;
            figures.push((name, stream.gbit_per_s));
        }
    }
    let left = daemons.new.status()?.live_flows();
    if left < live / 2 {
        bail!("of {live} flows only {left} were there at the end");
    }
    Ok(figures)
}

struct Stream {
    gbit_per_s: f64,
    /// CPU seconds for 10⁹ bytes of payload: of the old server's process, and of the new server's.
    daemons: Option<[f64; 2]>,
    /// The same for the whole machine, generators and everybody else included.
    machine: f64,
}

fn stream(contender: &Contender<'_>, streams: Streams, time: Duration) -> Result<Stream> {
    let mut readings = Vec::new();
    let at = || {
        let daemons = match contender.pids() {
            Some([old, new]) => Some([cpu_of(old)?, cpu_of(new)?]),
            None => None,
        };
        readings.push((daemons, cpu_of_machine()?));
        Ok(())
    };
    let (lab, target) = (contender.lab(), contender.target());
    let (bytes, took) = load::tcp(lab, target, streams, time, at)?;
    let [before, after] = &readings[..] else {
        bail!("the counters are read twice");
    };
    let gigabytes = bytes as f64 / 1e9;
    let daemons = before.0.zip(after.0);
    Ok(Stream {
        gbit_per_s: bytes as f64 * 8e-9 / took.as_secs_f64(),
        daemons: daemons
            .map(|(before, after)| [0, 1].map(|side| (after[side] - before[side]) / gigabytes)),
        machine: (after.1 - before.1) / gigabytes,
    })
}

/// Measures a flood as fast as one thread can send it, and the highest pace that arrives whole.
fn flooded(
    contender: &Contender<'_>,
    datagrams: Datagrams,
    [
        received,
        offered,
        lost,
        dropped,
        overran,
        at_receiver,
        clean,
    ]: [&'static str; 7],
    effort: &Effort,
) -> Result<Figures> {
    let (lab, target) = (contender.lab(), contender.target());
    let before = losses(contender)?;
    let flood = flood::flood(lab, target, datagrams, None, effort.flood)?;
    let after = losses(contender)?;
    let share = |count: u64| count as f64 / flood.sent.max(1) as f64 * 100.0;
    let mut figures = vec![
        (received, flood.rate / 1e3),
        (offered, flood.offered / 1e3),
        (lost, flood.loss() * 100.0),
        (at_receiver, share(flood.overran)),
    ];
    if let (Some(before), Some(after)) = (before.dropped, after.dropped) {
        figures.push((dropped, share(after - before)));
    }
    if let (Some(before), Some(after)) = (before.overran, after.overran) {
        figures.push((overran, share(after - before)));
    }
    if effort.search > 0 && contender.is_searched() {
        figures.push((
            clean,
            search(contender, datagrams, &flood, effort.search)? / 1e3,
        ));
    }
    Ok(figures)
}

/// Halves the interval that contains the highest pace without loss.
fn search(
    contender: &Contender<'_>,
    datagrams: Datagrams,
    flood: &Flood,
    steps: usize,
) -> Result<f64> {
    let (lab, target) = (contender.lab(), contender.target());
    let (mut low, mut high) = (0.0, flood.offered);
    // Under a flood the receiver starves. Without one, more may arrive than arrived then.
    let mut pace = flood.rate.min(flood.offered * 0.9);
    for _ in 0..steps {
        let tried = flood::flood(lab, target, datagrams, Some(pace), SEARCH_STEP)?;
        if tried.loss() < CLEAN && tried.offered > pace * 0.9 {
            low = pace;
        } else {
            high = pace;
        }
        pace = (low + high) / 2.0;
    }
    Ok(low)
}

/// Packets that did not get through the tunnel.
struct Losses {
    /// Packets that the daemons report as dropped.
    dropped: Option<u64>,
    /// Packets that the kernel dropped in front of a process: in the TUN's queue or the socket's
    /// buffer.
    overran: Option<u64>,
}

fn losses(contender: &Contender<'_>) -> Result<Losses> {
    let dropped = match contender.daemons() {
        None => None,
        Some(daemons) => {
            Some(all_drops(&daemons.old.status()?.0) + all_drops(&daemons.new.status()?.0))
        }
    };
    let lab = contender.lab();
    let overran = match contender.queues() {
        None => None,
        Some(([old, _], port)) => {
            Some(queue_drops(lab.old_server(), old)? + socket_drops(lab.new_server(), port)?)
        }
    };
    Ok(Losses { dropped, overran })
}

/// The sum of all counters in all `drops` objects.
fn all_drops(status: &Value) -> u64 {
    let sum = |drops: &Value| {
        drops
            .as_object()
            .map_or(0, |all| all.values().filter_map(Value::as_u64).sum())
    };
    let tunnels = status["tunnels"].as_array();
    sum(&status["drops"]) + tunnels.map_or(0, |all| all.iter().map(|one| sum(&one["drops"])).sum())
}
