//! Builds what `ipmoved status` shows from what is known.
//!
//! Owns the choice of what is shown where. It is a function of values, views and counters, and asks
//! nobody. [`model::status`](crate::model::status) owns the form.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::policy::refusal::Refusal;
use crate::channel::pmtu::Hints;
use crate::channel::tunnel::{self, Deliver};
use crate::flow::table::FlowStats;
use crate::kernel::masquerade::Towards;
use crate::lane::nat::NatCounters;
use crate::lane::shared::LaneCounters;
use crate::model::accept::Accept;
use crate::model::drops::Drops;
use crate::model::moved::Move;
use crate::model::outgoing::{AllowOutgoing, Outgoing};
use crate::model::peer::Role;
use crate::model::prefix::Prefix;
use crate::model::status::{
    Flows, LookedFor, ModeStatus, MtuHints, Offloads, PeerMode, ProgressOf, RefusedMove, Served,
    State, Status, Traffic, TunnelStatus, Way,
};
use crate::settings::config::NatSettings;
use crate::settings::values::NewServer;

/// The facts about the daemon as a whole.
pub(super) struct Daemon {
    /// Name of the TUN.
    pub(super) tun: String,
    /// The UDP port listened on; 0 where there is none.
    pub(super) port: u16,
    /// How long it has been running.
    pub(super) up: Duration,
    /// Warnings for an administrator.
    pub(super) warnings: Vec<String>,
    /// Log lines that nobody took in time.
    pub(super) log_lines_lost: u64,
    /// Packets to what has moved that stayed here.
    pub(super) stayed: u64,
    /// How often one of its conversations could not be kept from giving way to new ones.
    pub(super) own_full: u64,
    /// Conversations that nobody had time to record.
    pub(super) unrecorded: u64,
    /// Conversations that are not in the database of clients yet.
    pub(super) unwritten: u64,
}

/// The facts about one peer.
pub(super) struct Peer<'a> {
    /// Its place among the counters.
    pub(super) index: usize,
    /// Its name, as configured or as heard.
    pub(super) name: String,
    /// The daemon's role towards it.
    pub(super) role: Role,
    /// Where it was last heard from.
    pub(super) endpoint: Option<SocketAddr>,
    /// Whether it is there.
    pub(super) state: tunnel::State,
    /// The cipher in use, and the age of its keys.
    pub(super) session: Option<(String, Duration)>,
    /// The round trip.
    pub(super) rtt: Option<Duration>,
    /// Largest IP packet that fits one datagram to it.
    pub(super) mtu: usize,
    /// What came of ICMP errors about the path to it.
    pub(super) mtu_hints: Hints,
    /// For how long nothing was heard of it, though it is there.
    pub(super) unheard: Option<Duration>,
    /// How long ago it said goodbye, if it did.
    pub(super) stopped: Option<Duration>,
    /// What clients ask for, and whether it is answered.
    pub(super) served: Vec<Served>,
    /// How far each move has come.
    pub(super) progress: Vec<ProgressOf>,
    /// What a cut-over looks for on the new server.
    pub(super) looked_for: Vec<LookedFor>,
    /// Which mode each move is in (new server).
    pub(super) peer_modes: Vec<PeerMode>,
    /// The moves to it or from it.
    pub(super) moves: &'a [Move],
    /// Their modes (old server).
    pub(super) modes: Vec<ModeStatus>,
    /// Where the new server delivers.
    pub(super) deliver: Option<Deliver>,
    /// Ports that are delivered elsewhere.
    pub(super) maps: Vec<String>,
    /// Counters of its flows; on the new server, of those of all peers.
    pub(super) flows: FlowStats,
    /// What it may move here.
    pub(super) accept: &'a [Accept],
    /// Own networks that its clients may come from.
    pub(super) clients_from: &'a [Prefix],
    /// What may leave from its moved addresses that answers nobody (new server).
    pub(super) outgoing: &'a [Outgoing],
    /// What it may begin (old server).
    pub(super) allow_outgoing: &'a [AllowOutgoing],
    /// Whether it lets out what begins here, once it has said so (new server).
    pub(super) lets_out: Option<bool>,
    /// Its moves that are not served.
    pub(super) refused: &'a [Refusal],
    /// How many were refused, each time that it named one.
    pub(super) refused_moves: u64,
    /// The drops of its packets.
    pub(super) drops: &'a Drops,
}

/// The status of a daemon with tunnels: one entry for each peer, in the order of the settings.
pub(super) fn tunnels(
    daemon: Daemon,
    peers: Vec<Peer<'_>>,
    offloads: Offloads,
    lanes: &[impl AsRef<LaneCounters>],
    strangers: &Drops,
) -> Status {
    let alone = peers.len() == 1;
    let tunnel = |peer: Peer<'_>| {
        let mut drops = names(peer.drops);
        if alone {
            // With one peer, the strangers' drops are shown with it, since people look there first.
            for (reason, count) in names(strangers) {
                *drops.entry(reason).or_default() += count;
            }
        }
        let (mut rx, mut tx) = (Traffic::default(), Traffic::default());
        for lane in lanes {
            let carried = &lane.as_ref().peers[peer.index];
            carried.rx.add_to(&mut rx);
            carried.tx.add_to(&mut tx);
        }
        let (cipher, age) = peer.session.unzip();
        TunnelStatus {
            place: peer.index as u16,
            peer: peer.name,
            endpoint: peer.endpoint.map(|addr| addr.to_string()),
            role: peer.role,
            state: match peer.state {
                tunnel::State::Connecting => State::Connecting,
                tunnel::State::Up => State::Up,
                tunnel::State::Down => State::Down,
            },
            cipher,
            rtt_ms: peer.rtt.map(|rtt| rtt.as_secs_f64() * 1_000.0),
            handshake_age_s: age.map(|age| age.as_secs()),
            mtu: peer.mtu,
            mtu_hints: MtuHints {
                asked: peer.mtu_hints.asked,
                refuted: peer.mtu_hints.refuted,
            },
            unheard_s: peer.unheard.map(|unheard| unheard.as_secs()),
            stopped_s: peer.stopped.map(|stopped| stopped.as_secs()),
            served: peer.served,
            progress: peer.progress,
            looked_for: peer.looked_for,
            peer_modes: peer.peer_modes,
            moved: peer.moves.iter().map(ToString::to_string).collect(),
            modes: peer.modes,
            deliver_to: peer.deliver.and_then(|to| delivered_to(to, peer.moves)),
            deliver: peer.maps,
            flows: shown(peer.flows),
            accept: peer.accept.iter().map(ToString::to_string).collect(),
            clients_from: peer.clients_from.iter().map(ToString::to_string).collect(),
            outgoing: peer.outgoing.iter().map(ToString::to_string).collect(),
            allow_outgoing: peer
                .allow_outgoing
                .iter()
                .map(ToString::to_string)
                .collect(),
            peer_allows_outgoing: peer.lets_out,
            refused: peer.refused.iter().map(refused).collect(),
            refused_moves: peer.refused_moves,
            rx,
            tx,
            drops,
        }
    };
    let tunnels = peers.into_iter().map(tunnel).collect();
    status(Way::Tunnel, daemon, tunnels, offloads, names(strangers))
}

/// The status of `ipmoved nat`: one entry for each address that is translated to.
pub(super) fn translated(
    daemon: Daemon,
    settings: &NatSettings,
    towards: &[Towards],
    uplink_mtu: u32,
    counters: &NatCounters,
) -> Status {
    let flows = shown(counters.flows());
    let entry = |(end, to): (&Towards, &NewServer)| TunnelStatus {
        place: 0,
        peer: end.to.to_string(),
        endpoint: Some(end.to.to_string()),
        role: Role::Old,
        state: State::Up,
        cipher: None,
        rtt_ms: None,
        handshake_age_s: None,
        mtu: end.link.mtu.min(uplink_mtu) as usize,
        mtu_hints: MtuHints::default(),
        unheard_s: None,
        stopped_s: None,
        served: Vec::new(),
        progress: Vec::new(),
        looked_for: Vec::new(),
        peer_modes: Vec::new(),
        moved: (settings.moves.iter())
            .filter(|moved| moved.prefix.first().is_ipv4() == end.to.is_ipv4())
            .map(ToString::to_string)
            .collect(),
        modes: Vec::new(),
        deliver_to: Some(match to.port {
            None => end.to.to_string(),
            Some(port) => SocketAddr::new(end.to, port).to_string(),
        }),
        deliver: Vec::new(),
        accept: Vec::new(),
        clients_from: Vec::new(),
        outgoing: Vec::new(),
        allow_outgoing: Vec::new(),
        peer_allows_outgoing: None,
        refused: Vec::new(),
        refused_moves: 0,
        flows,
        rx: counters.to_clients(),
        tx: counters.to_server(),
        drops: names(&counters.drops),
    };
    let entries = towards.iter().zip(&settings.to).map(entry).collect();
    let (offloads, strangers) = (Offloads::default(), BTreeMap::new());
    status(Way::Nat, daemon, entries, offloads, strangers)
}

fn status(
    way: Way,
    daemon: Daemon,
    tunnels: Vec<TunnelStatus>,
    offloads: Offloads,
    drops: BTreeMap<String, u64>,
) -> Status {
    Status {
        way,
        tunnels,
        tun: daemon.tun,
        port: daemon.port,
        version: env!("CARGO_PKG_VERSION").into(),
        pid: std::process::id(),
        uptime_s: daemon.up.as_secs(),
        offloads,
        drops,
        warnings: daemon.warnings,
        log_lines_lost: daemon.log_lines_lost,
        stayed: daemon.stayed,
        own_full: daemon.own_full,
        unrecorded: daemon.unrecorded,
        unwritten: daemon.unwritten,
    }
}

/// Moves that one line names; `status` names all.
const NAMED: usize = 16;

/// What has moved, for a line of the log.
pub(super) fn in_short(moves: &[Move]) -> String {
    let named = moves.iter().take(NAMED).map(ToString::to_string);
    let mut named: Vec<String> = named.collect();
    if let Some(more) = moves.len().checked_sub(NAMED + 1) {
        named.push(format!("and {} more", more + 1));
    }
    named.join(" ")
}

/// Where the new server delivers, for the families of which something has moved.
fn delivered_to(deliver: Deliver, moves: &[Move]) -> Option<String> {
    match deliver {
        Deliver::Keep => Some("keep".into()),
        Deliver::To { v4, v6 } => {
            let moved = |v4: bool| {
                moves
                    .iter()
                    .any(|moved| moved.prefix.first().is_ipv4() == v4)
            };
            let v4 = v4.filter(|_| moved(true)).map(IpAddr::V4);
            let v6 = v6.filter(|_| moved(false)).map(IpAddr::V6);
            let all: Vec<String> = v4.iter().chain(&v6).map(ToString::to_string).collect();
            (!all.is_empty()).then(|| all.join(", "))
        }
    }
}

fn refused(refusal: &Refusal) -> RefusedMove {
    RefusedMove {
        moved: refusal.moved.to_string(),
        why: refusal.to_string(),
    }
}

fn shown(stats: FlowStats) -> Flows {
    Flows {
        live: stats.live,
        max: stats.max,
        evicted: stats.evicted,
        displaced: stats.displaced,
        collisions: stats.collisions,
        refused: stats.refused,
    }
}

fn names(drops: &Drops) -> BTreeMap<String, u64> {
    drops
        .iter()
        .map(|(reason, count)| (reason.name().to_owned(), count))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::model::drops::DropReason;

    fn moves(names: &[&str]) -> Vec<Move> {
        names.iter().map(|name| name.parse().unwrap()).collect()
    }

    fn peer<'a>(name: &str, moves: &'a [Move], drops: &'a Drops) -> Peer<'a> {
        Peer {
            index: 0,
            name: name.into(),
            role: Role::New,
            endpoint: Some("192.0.2.1:51850".parse().unwrap()),
            state: tunnel::State::Up,
            session: Some(("aes-256-gcm".into(), Duration::from_secs(61))),
            rtt: Some(Duration::from_micros(170)),
            mtu: 1_440,
            mtu_hints: Hints::default(),
            unheard: None,
            stopped: None,
            served: Vec::new(),
            progress: Vec::new(),
            looked_for: Vec::new(),
            peer_modes: Vec::new(),
            moves,
            modes: Vec::new(),
            deliver: Some(Deliver::To {
                v4: Some("198.51.100.2".parse().unwrap()),
                v6: Some("2001:db8::2".parse().unwrap()),
            }),
            maps: Vec::new(),
            flows: FlowStats::default(),
            accept: &[],
            clients_from: &[],
            outgoing: &[],
            allow_outgoing: &[],
            lets_out: None,
            refused: &[],
            refused_moves: 0,
            drops,
        }
    }

    fn daemon() -> Daemon {
        Daemon {
            tun: "ipmoved0".into(),
            port: 51_850,
            up: Duration::from_secs(90),
            warnings: vec!["somebody removed a filter; it is back".into()],
            log_lines_lost: 0,
            stayed: 0,
            own_full: 0,
            unrecorded: 0,
            unwritten: 0,
        }
    }

    fn report(peers: Vec<Peer<'_>>, strangers: &Drops) -> Status {
        let lanes: Vec<Arc<LaneCounters>> = (0..2)
            .map(|_| Arc::new(LaneCounters::new(peers.len())))
            .collect();
        lanes[0].peers[0].rx.add(3, 300);
        lanes[1].peers[0].rx.add(1, 100);
        lanes[1].peers[0].tx.add(2, 80);
        tunnels(daemon(), peers, Offloads::default(), &lanes, strangers)
    }

    #[test]
    fn strangers_are_shown_with_the_only_peer_but_with_none_of_several() {
        let (strangers, of_peer) = (Drops::default(), Drops::default());
        strangers.add(DropReason::HandshakeAuth, 5);
        of_peer.add(DropReason::HandshakeAuth, 2);
        of_peer.add(DropReason::NotMoved, 1);
        let moved = moves(&["192.0.2.5"]);
        let status = report(vec![peer("a", &moved, &of_peer)], &strangers);
        assert_eq!(status.tunnels[0].drops["handshake_auth"], 7);
        assert_eq!(status.tunnels[0].drops["not_moved"], 1);
        assert_eq!(status.drops["handshake_auth"], 5);
        let two = vec![peer("a", &moved, &of_peer), peer("b", &[], &of_peer)];
        let status = report(two, &strangers);
        assert_eq!(status.tunnels[0].drops["handshake_auth"], 2);
        assert_eq!(status.drops["handshake_auth"], 5);
    }

    #[test]
    fn the_counts_of_the_lanes_are_added_up() {
        let drops = Drops::default();
        let mut other = peer("b", &[], &drops);
        other.index = 1;
        let status = report(vec![peer("a", &[], &drops), other], &drops);
        let (rx, tx) = (status.tunnels[0].rx, status.tunnels[0].tx);
        assert_eq!((rx.packets, rx.bytes), (4, 400));
        assert_eq!((tx.packets, tx.bytes), (2, 80));
        assert_eq!(status.tunnels[1].rx, Traffic::default());
        assert_eq!(status.warnings, daemon().warnings);
        assert_eq!(status.uptime_s, 90);
    }

    #[test]
    fn delivery_is_shown_for_the_families_that_moved() {
        let both = Deliver::To {
            v4: Some("198.51.100.2".parse().unwrap()),
            v6: Some("2001:db8::2".parse().unwrap()),
        };
        for (deliver, moved, shown) in [
            (both, &["192.0.2.5"][..], Some("198.51.100.2")),
            (both, &["2001:db8::5"], Some("2001:db8::2")),
            (
                both,
                &["192.0.2.5", "2001:db8::5"],
                Some("198.51.100.2, 2001:db8::2"),
            ),
            (both, &[], None),
            (Deliver::To { v4: None, v6: None }, &["192.0.2.5"], None),
            (Deliver::Keep, &["192.0.2.5"], Some("keep")),
        ] {
            assert_eq!(delivered_to(deliver, &moves(moved)).as_deref(), shown);
        }
    }
}
