//! A changed configuration: what of it is another one than that which runs, whether all of it can
//! be changed while the daemon runs, and what the policy makes of each peer's part.
//!
//! A machine without I/O. A [`PeerId`] stays with its peer as long as that is there, and its place
//! is another one's after that.
//!
//! ```text
//! settings that run ─┐
//!                    ├─► plan ─► refused: restart needed, for these keys
//! settings that are ─┘       └─► a step for each peer, lines for people, and what leaves
//! ```
//!
//! A move that the settings no longer have *leaves*: this server answers what is new, and what the
//! new server has goes on there until it ends. Only then is the new server told that it is gone.

use std::collections::HashSet;
use std::fmt::Display;
use std::time::Instant;

use super::{Action, Peer, PeerRules, Policy};
use crate::daemon::index;
use crate::model::moved::{MAX_MOVES, MAX_PORT_SETS, Move};
use crate::model::peer::{PeerId, Role};
use crate::model::rest::rest;
use crate::model::scopes::Scopes;
use crate::settings::config::{ClientLog, Config, PeerConfig};
use crate::settings::values::{DeliverTo, PeerAddr};

/// Items of a list that one line names.
const NAMED: usize = 8;

/// The settings that run.
#[derive(Clone, Debug)]
pub(in super::super) struct Running {
    /// Those of the daemon. Its peers are below.
    pub(in super::super) config: Config,
    /// The peers, by [`PeerId`]; `None` where there is none any more.
    pub(in super::super) peers: Vec<Option<PeerConfig>>,
    /// What the settings no longer move, and the new server still has connections of.
    pub(in super::super) leaving: Vec<(PeerId, Move)>,
    /// Whether a peer was given by name at the start: else nothing can be looked up any more.
    names: bool,
}

/// What becomes of a peer.
#[derive(Clone, PartialEq, Debug)]
pub(in super::super) enum Step {
    /// It is there from now on.
    Begins(Box<PeerConfig>),
    /// It has other settings.
    Changes {
        /// What they were.
        before: Box<PeerConfig>,
        /// What they are.
        after: Box<PeerConfig>,
    },
    /// It is gone.
    Ends,
}

/// What is to be changed.
#[derive(Debug)]
pub(in super::super) struct Plan {
    /// For each peer that is not as it was, those that end first.
    pub(in super::super) steps: Vec<(PeerId, Step)>,
    /// The settings that are to run.
    pub(in super::super) next: Running,
    /// What that is, a line each, for people.
    pub(in super::super) lines: Vec<String>,
}

impl Running {
    /// Those of a daemon that starts.
    pub(in super::super) fn new(config: &Config) -> Self {
        Self {
            peers: config.peers.iter().cloned().map(Some).collect(),
            config: Config {
                peers: Vec::new(),
                leaving: Vec::new(),
                warnings: Vec::new(),
                ..config.clone()
            },
            leaving: config.leaving.clone(),
            names: config.peers.iter().any(is_named),
        }
    }

    /// Every peer, with its settings.
    pub(in super::super) fn each(&self) -> impl Iterator<Item = (PeerId, &PeerConfig)> {
        let all = (0..).map(PeerId).zip(&self.peers);
        all.filter_map(|(id, peer)| Some((id, peer.as_ref()?)))
    }

    /// What the settings move, to whom.
    pub(in super::super) fn moves(&self) -> Vec<(PeerId, Move)> {
        let each = self.each();
        each.flat_map(|(id, peer)| peer.moves.iter().map(move |it| (id, it.clone())))
            .collect()
    }

    /// All that is captured: what the settings move, and what leaves.
    pub(in super::super) fn captured(&self) -> Vec<Move> {
        let all = self.moves().into_iter().chain(self.leaving.iter().cloned());
        all.map(|(_, moved)| moved).collect()
    }

    /// What of that the new server may begin connections from.
    pub(in super::super) fn begin(&self) -> Vec<Move> {
        let may = self
            .each()
            .filter(|(_, peer)| !peer.allow_outgoing.is_empty());
        may.flat_map(|(_, peer)| &peer.moves).cloned().collect()
    }

    /// All of it that goes to one peer.
    pub(in super::super) fn captured_for(&self, peer: PeerId) -> Vec<Move> {
        let settled = self.peers.get(index(peer)).and_then(Option::as_ref);
        let settled = settled.into_iter().flat_map(|peer| peer.moves.iter());
        let leaving = self.leaving.iter().filter(|(of, _)| *of == peer);
        settled
            .chain(leaving.map(|(_, moved)| moved))
            .cloned()
            .collect()
    }

    /// What has to be changed to have these settings.
    ///
    /// # Errors
    /// Why they cannot be had without a restart.
    pub(in super::super) fn plan(&self, config: &Config) -> Result<Plan, String> {
        self.check_fixed(config)?;
        let mut lines = self.lines_of_daemon(config);
        let mut peers = self.peers.clone();
        let mut steps = Vec::new();
        let known = self.match_peers(&config.peers);
        for (id, before) in self.each() {
            if !known.contains(&Some(id)) {
                lines.push(format!("- peer {}", name(before)));
                peers[index(id)] = None;
                steps.push((id, Step::Ends));
            }
        }
        for (after, known) in config.peers.iter().zip(known) {
            let before = known.and_then(|id| self.peers[index(id)].as_ref());
            let (Some(id), Some(before)) = (known, before) else {
                let id = free_place(&mut peers);
                peers[index(id)] = Some(after.clone());
                lines.push(format!("+ peer {}", name(after)));
                steps.push((id, Step::Begins(Box::new(after.clone()))));
                continue;
            };
            if before != after {
                lines.extend(lines_of_peer(before, after));
                peers[index(id)] = Some(after.clone());
                steps.push((
                    id,
                    Step::Changes {
                        before: Box::new(before.clone()),
                        after: Box::new(after.clone()),
                    },
                ));
            }
        }
        let mut next = Self {
            config: Config {
                peers: Vec::new(),
                leaving: Vec::new(),
                warnings: Vec::new(),
                ..config.clone()
            },
            peers,
            leaving: Vec::new(),
            names: self.names,
        };
        let named: Vec<Move> = next.moves().into_iter().map(|(_, moved)| moved).collect();
        let known: HashSet<&Move> = named.iter().collect();
        let before = self.moves().into_iter().chain(self.leaving.iter().cloned());
        for (id, moved) in before {
            // In the place of one that is gone there may be another already.
            let ended = (steps.iter()).any(|(of, step)| *of == id && *step == Step::Ends);
            let stays = !ended && next.peers.get(index(id)).is_some_and(Option::is_some);
            if stays && !known.contains(&moved) {
                let left = rest(&moved, &named).into_iter();
                next.leaving.extend(left.map(|moved| (id, moved)));
            }
        }
        next.check_room()?;
        Ok(Plan { steps, next, lines })
    }

    /// Refuses what cannot be changed while the daemon runs.
    fn check_fixed(&self, next: &Config) -> Result<(), String> {
        let now = &self.config;
        // A setting that is new has to be one of these, or its change has a line, and a user.
        let Config {
            role,
            peers: _,
            listen,
            tun,
            uplink,
            max_flows: _,
            lanes,
            cipher: _,
            start: _,
            state_dir,
            log_format,
            metrics,
            client_log: _,
            no_split,
            without,
            rekey_after: _,
            leaving: _,
            warnings: _,
            given: _,
        } = next;
        if now.role != *role {
            return Err(format!(
                "this is the {} server, and would be the {}: restart needed",
                now.role, role
            ));
        }
        if let Some(peer) = next.peers.iter().find(|peer| !self.names && is_named(peer)) {
            return Err(format!(
                "{} is a name, and no peer had one when the daemon started, so that it cannot be \
                 looked up: restart needed, or give the address",
                name(peer)
            ));
        }
        let same_port = now.listen.port == listen.port;
        let fixed = [
            ("tun", now.tun != *tun),
            ("uplink", now.uplink != *uplink),
            ("lanes", now.lanes != *lanes),
            ("state-dir", now.state_dir != *state_dir),
            ("no-split", now.no_split != *no_split),
            ("without", now.without != *without),
            ("log-format", now.log_format != *log_format),
            ("metrics", now.metrics != *metrics),
            (
                "the address of listen",
                now.listen.ip != listen.ip && same_port,
            ),
        ];
        let others = fixed.into_iter().filter(|(_, other)| *other);
        let others: Vec<&str> = others.map(|(name, _)| name).collect();
        if others.is_empty() {
            return Ok(());
        }
        Err(format!(
            "{} cannot be changed while the daemon runs: restart needed",
            others.join(", ")
        ))
    }

    /// Refuses more than there is room for while what leaves is still there.
    fn check_room(&self) -> Result<(), String> {
        let all = self.captured();
        let fits = all.len() <= MAX_MOVES && Scopes::new(&all).port_sets() <= MAX_PORT_SETS;
        if fits || self.leaving.is_empty() {
            return Ok(());
        }
        Err(
            "there is no room for what moves now beside what no longer does, as long as its \
             connections last: move fewer at a time, or restart"
                .into(),
        )
    }

    fn lines_of_daemon(&self, next: &Config) -> Vec<String> {
        let now = &self.config;
        let log = |log: Option<ClientLog>| match log {
            None => "off".to_owned(),
            Some(ClientLog { keep, names: true }) => format!("{keep}d"),
            Some(ClientLog { keep, names: false }) => format!("{keep}d, without names"),
        };
        let seconds = |time: Option<std::time::Duration>| match time {
            None => "default".to_owned(),
            Some(time) => time.as_secs().to_string(),
        };
        let listen = |config: &Config| match config.listen.ip {
            None => config.listen.port.to_string(),
            Some(ip) => std::net::SocketAddr::new(ip, config.listen.port).to_string(),
        };
        [
            ("listen", listen(now), listen(next)),
            (
                "max-flows",
                now.max_flows.to_string(),
                next.max_flows.to_string(),
            ),
            ("cipher", now.cipher.to_string(), next.cipher.to_string()),
            ("start", now.start.to_string(), next.start.to_string()),
            (
                "clients are remembered",
                log(now.client_log),
                log(next.client_log),
            ),
            (
                "rekey-after",
                seconds(now.rekey_after),
                seconds(next.rekey_after),
            ),
        ]
        .into_iter()
        .filter(|(_, before, after)| before != after)
        .map(|(name, before, after)| format!("{name}: {before} -> {after}"))
        .collect()
    }

    /// Which of those that run each of these peers is: by its key; else by its address; else, where
    /// neither has one, by its turn.
    fn match_peers(&self, next: &[PeerConfig]) -> Vec<Option<PeerId>> {
        let mut known: Vec<Option<PeerId>> = vec![None; next.len()];
        let running: Vec<(PeerId, &PeerConfig)> = self.each().collect();
        type Same<'a> = &'a dyn Fn(usize, &PeerConfig, usize, &PeerConfig) -> bool;
        let by: [Same<'_>; 3] = [
            &|_, now, _, next| now.keys == next.keys,
            &|_, now, _, next| now.endpoint.is_some() && now.endpoint == next.endpoint,
            &|turn, now, other, next| {
                turn == other && now.endpoint.is_none() && next.endpoint.is_none()
            },
        ];
        for same in by {
            for (at, peer) in next.iter().enumerate() {
                if known[at].is_some() {
                    continue;
                }
                let mut free = running.iter().enumerate();
                let found = free.find(|(turn, (id, now))| {
                    !known.contains(&Some(*id)) && same(*turn, now, at, peer)
                });
                known[at] = found.map(|(_, (id, _))| *id);
            }
        }
        known
    }
}

/// What holds whenever a daemon that runs by the first of these is given the others, one after the
/// other.
#[cfg(any(test, fuzzing))]
pub fn check_reloads(all: &[Config]) {
    let Some((first, others)) = all.split_first() else {
        return;
    };
    let mut running = Running::new(first);
    for next in others {
        let plan = match running.plan(next) {
            Ok(plan) => plan,
            // One line, for `ipmoved reload`.
            Err(why) => {
                assert!(!why.is_empty() && !why.contains('\n'), "{why}");
                continue;
            }
        };
        let Plan {
            steps,
            next: then,
            lines,
        } = plan;
        assert!(lines.iter().all(|line| !line.contains('\n')), "{lines:?}");
        assert!(
            steps.is_empty() || !lines.is_empty(),
            "no peer changes without a word"
        );
        // A place is one peer's at a time: who ends does so before another begins there.
        let ends = steps.iter().position(|(_, step)| *step != Step::Ends);
        let later = &steps[ends.unwrap_or(steps.len())..];
        assert!(later.iter().all(|(_, step)| *step != Step::Ends));
        // What is planned is what the settings say, and nothing is left to do.
        let planned: Vec<&PeerConfig> = then.each().map(|(_, peer)| peer).collect();
        assert_eq!(planned.len(), next.peers.len());
        assert!(next.peers.iter().all(|peer| planned.contains(&peer)));
        assert!(then.peers.len() <= running.peers.len().max(next.peers.len()));
        let again = then.plan(next).expect("what runs can run");
        assert!(
            again.steps.is_empty() && again.lines.is_empty(),
            "{:?}",
            again.lines
        );
        // Nothing leaves that is named, or whose peer is gone; nothing that moved is forgotten.
        let named: Vec<Move> = then.moves().into_iter().map(|(_, moved)| moved).collect();
        for (id, moved) in &then.leaving {
            assert!(!named.contains(moved), "{moved}");
            assert!(then.peers[index(*id)].is_some(), "{moved}");
        }
        let ended = |id: PeerId| steps.iter().any(|it| *it == (id, Step::Ends));
        for (id, moved) in running.moves() {
            let captured = then.captured();
            assert!(
                ended(id) || captured.iter().any(|it| it.overlaps(&moved)),
                "{moved}"
            );
        }
        assert!(then.captured().len() <= MAX_MOVES || then.leaving.is_empty());
        running = then;
    }
}

/// Whether the settings give a name for where a peer is.
fn is_named(peer: &PeerConfig) -> bool {
    peer.endpoint.as_ref().is_some_and(PeerAddr::is_name)
}

/// The first place where there is no peer.
fn free_place(peers: &mut Vec<Option<PeerConfig>>) -> PeerId {
    let place = peers.iter().position(Option::is_none).unwrap_or_else(|| {
        peers.push(None);
        peers.len() - 1
    });
    PeerId(place as u16)
}

/// A peer, as people know it.
fn name(peer: &PeerConfig) -> String {
    let named = peer.endpoint.as_ref().map(PeerAddr::to_string);
    let moves = || peer.moves.iter().map(ToString::to_string);
    let accepts = || peer.accept.iter().map(ToString::to_string);
    named
        .or_else(|| moves().next())
        .or_else(|| accepts().next())
        .unwrap_or_else(|| "(any address)".into())
}

fn lines_of_peer(before: &PeerConfig, after: &PeerConfig) -> Vec<String> {
    let PeerConfig {
        endpoint,
        keys,
        moves,
        deliver_to,
        deliver,
        accept,
        clients_from,
        outgoing,
        allow_outgoing,
    } = after;
    let mut lines = Vec::new();
    if before.endpoint != *endpoint {
        let name = |peer: &Option<PeerAddr>| match peer {
            Some(peer) => peer.to_string(),
            None => "(any address)".into(),
        };
        lines.push(format!(
            "peer {} -> {}",
            name(&before.endpoint),
            name(endpoint)
        ));
    }
    if before.keys != *keys {
        lines.push("another key; the session goes on until the next handshake".into());
    }
    if before.deliver_to != *deliver_to {
        let name = |to: DeliverTo| match to {
            DeliverTo::Keep => "keep".to_owned(),
            DeliverTo::Addresses { v4: None, v6: None } => "default".into(),
            DeliverTo::Addresses { v4, v6 } => {
                let (v4, v6) = (v4.map(|it| it.to_string()), v6.map(|it| it.to_string()));
                v4.into_iter().chain(v6).collect::<Vec<_>>().join(" ")
            }
        };
        lines.push(format!(
            "deliver-to {} -> {}",
            name(before.deliver_to),
            name(*deliver_to)
        ));
    }
    lines.extend(lists("move", &before.moves, moves));
    lines.extend(lists("deliver", &before.deliver, deliver));
    lines.extend(lists("accept", &before.accept, accept));
    lines.extend(lists("clients-from", &before.clients_from, clients_from));
    lines.extend(lists("outgoing", &before.outgoing, outgoing));
    lines.extend(lists(
        "allow-outgoing",
        &before.allow_outgoing,
        allow_outgoing,
    ));
    if lines.is_empty() {
        // The order of a list alone.
        lines.push("the order of its settings".into());
    }
    let name = name(before);
    lines
        .iter()
        .map(|line| format!("  peer {name}: {line}"))
        .collect()
}

/// What was added to a list, and what is no longer in it.
fn lists<T: PartialEq + Display>(key: &str, before: &[T], after: &[T]) -> Vec<String> {
    let line = |sign: &str, some: &[T], others: &[T]| {
        let only: Vec<String> = some
            .iter()
            .filter(|it| !others.contains(it))
            .map(ToString::to_string)
            .collect();
        let more = only.len().saturating_sub(NAMED);
        let more = if more == 0 {
            String::new()
        } else {
            format!(" and {more} more")
        };
        let named = only[..only.len().min(NAMED)].join(" ");
        (!only.is_empty()).then(|| format!("{sign} {key} {named}{more}"))
    };
    let gone = line("-", before, after);
    let new = line("+", after, before);
    gone.into_iter().chain(new).collect()
}

impl Policy {
    /// There is one more peer, or one in the place of another that is gone.
    pub(in super::super) fn begin(&mut self, now: Instant, id: PeerId, rules: PeerRules) {
        let moves = rules.moves.clone();
        let peer = Peer::new(rules, now);
        match self.peers.get_mut(index(id)) {
            Some(place) => *place = peer,
            None => self.peers.push(peer),
        }
        self.claims.begin(id, moves);
        self.is_other(now, id);
    }

    /// A peer has other settings.
    pub(in super::super) fn change(&mut self, now: Instant, id: PeerId, rules: PeerRules) {
        self.claims.set_moves(self.role, id, rules.moves.clone());
        let known = &mut self.peers[index(id)];
        let fresh = Peer::new(rules, now);
        let same_place = known.addr == fresh.addr;
        *known = Peer {
            known_at: if same_place {
                known.known_at
            } else {
                fresh.known_at
            },
            lookup: if same_place {
                known.lookup.take()
            } else {
                fresh.lookup
            },
            addr: fresh.addr,
            deliver_to: fresh.deliver_to,
            maps: fresh.maps,
            accept: fresh.accept,
            clients_from: fresh.clients_from,
            outgoing: fresh.outgoing,
            allow_outgoing: fresh.allow_outgoing,
            lets_out: known.lets_out,
            outgoing_refused: known.outgoing_refused,
            endpoint: known.endpoint,
            names_us: known.names_us,
            speaks_from: known.speaks_from,
            state: known.state,
            deliver: known.deliver,
            chosen: known.chosen,
            ..fresh
        };
        self.is_other(now, id);
    }

    /// A peer is gone. What it had may be another's from now on.
    pub(in super::super) fn end(&mut self, now: Instant, id: PeerId) {
        self.peers[index(id)] = Peer::gone(now);
        match self.role {
            Role::Old => self.claims.set_moves(Role::Old, id, Vec::new()),
            Role::New => self.names(now, id, Vec::new()),
        }
        self.is_other(now, id);
    }

    /// Draws the conclusions from other settings of a peer.
    fn is_other(&mut self, now: Instant, id: PeerId) {
        let moves: Vec<Move> = self
            .peers()
            .flat_map(|id| self.moves(id).to_vec())
            .collect();
        match self.role {
            Role::Old => {
                self.moved = Scopes::new(&moves);
                let (v4, v6) = super::delivery::hop(&self.addresses.uplink, &self.moved);
                if (self.hop.v4, self.hop.v6) != (v4, v6) {
                    (self.hop.v4, self.hop.v6) = (v4, v6);
                    self.actions.push_back(Action::Hop(self.hop));
                }
                if self.is_there(id) {
                    self.announce(id);
                }
            }
            Role::New => {
                self.set_outgoing(id);
                self.judge_again(now, None);
                self.hold();
                if self.is_there(id) {
                    self.deliver(id);
                }
                self.tell_places(now);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use clap::Args as _;

    use super::*;
    use crate::settings::args::{DaemonArgs, PeerArgs, RunArgs};
    use crate::settings::file::File;
    use crate::settings::files::{Files, Found};

    const KEYS: [&str; 3] = [
        "AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA=",
        "AgIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA=",
        "AwIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA=",
    ];

    fn config(text: &str) -> Config {
        let files = Files::Given(Found::default());
        let file = File::parse(text).unwrap();
        Config::merge(&Arc::new(RunArgs::default()), file, &files, Vec::new()).unwrap()
    }

    /// A peer with one of the keys.
    fn peer(at: &str, key: usize, more: &str) -> String {
        let at = match at {
            "" => String::new(),
            at => format!("peer = \"{at}\"\n"),
        };
        format!("[[peers]]\n{at}psk = \"{}\"\n{more}\n", KEYS[key])
    }

    fn plan(before: &str, after: &str) -> Result<Plan, String> {
        Running::new(&config(before)).plan(&config(after))
    }

    /// What becomes of each peer, as a letter and its place.
    fn steps(plan: &Plan) -> Vec<String> {
        let step = |(id, step): &(PeerId, Step)| match step {
            Step::Begins(_) => format!("+{}", id.0),
            Step::Changes { .. } => format!("~{}", id.0),
            Step::Ends => format!("-{}", id.0),
        };
        plan.steps.iter().map(step).collect()
    }

    #[test]
    fn a_peer_is_known_by_its_key_or_its_address_or_its_turn() {
        let (a, b) = (peer("192.0.2.1", 0, ""), peer("192.0.2.2", 1, ""));
        let nameless = |key| peer("", key, "");
        for (before, after, expected) in [
            (format!("{a}{b}"), format!("{b}{a}"), &[][..]),
            (a.clone(), format!("{a}{b}"), &["+1"]),
            (format!("{a}{b}"), b.clone(), &["-0"]),
            // Its place is the next one's.
            (
                format!("{a}{b}"),
                format!("{b}{}", peer("192.0.2.3", 2, "")),
                &["-0", "+0"],
            ),
            // Another key, or another address.
            (a.clone(), peer("192.0.2.1", 1, ""), &["~0"]),
            (a.clone(), peer("192.0.2.9", 0, ""), &["~0"]),
            (
                format!("{a}{b}"),
                format!("{b}{}", peer("192.0.2.1", 2, "")),
                &["~0"],
            ),
            // Two that have neither.
            (nameless(0), nameless(1), &["~0"]),
            (
                format!("{a}{}", nameless(1)),
                format!("{a}{}", nameless(2)),
                &["~1"],
            ),
            (nameless(0), peer("192.0.2.1", 1, ""), &["-0", "+0"]),
        ] {
            let plan = plan(&before, &after).unwrap();
            assert_eq!(steps(&plan), expected, "{before} {after}");
            assert_eq!(plan.steps.is_empty(), plan.lines.is_empty());
            // What was planned is what there is then.
            let again = plan.next.plan(&config(&after)).unwrap();
            assert!(again.steps.is_empty() && again.lines.is_empty(), "{after}");
        }
    }

    #[test]
    fn each_change_has_its_line() {
        let before = format!(
            "max-flows = 5\nlisten = 7\n{}",
            peer("192.0.2.1", 0, "accept = [\"192.0.2.5\", \"192.0.2.6\"]")
        );
        let after = format!(
            "max-flows = 6\ncipher = \"aes-256-gcm\"\nlisten = 8\n{}",
            peer(
                "192.0.2.9",
                0,
                "accept = [\"192.0.2.6\", \"192.0.2.7\"]\ndeliver-to = \"198.51.100.2\"\n\
                 clients-from = \"10.0.0.0/8\"\noutgoing = \"25/tcp\"\n\
                 deliver = \"192.0.2.6:80=198.51.100.2:81\""
            )
        );
        assert_eq!(
            plan(&before, &after).unwrap().lines,
            [
                "listen: 7 -> 8",
                "max-flows: 5 -> 6",
                "cipher: auto -> aes-256-gcm",
                "  peer 192.0.2.1:51850: peer 192.0.2.1:51850 -> 192.0.2.9:51850",
                "  peer 192.0.2.1:51850: deliver-to default -> 198.51.100.2",
                "  peer 192.0.2.1:51850: + deliver 192.0.2.6:80=198.51.100.2:81",
                "  peer 192.0.2.1:51850: - accept 192.0.2.5",
                "  peer 192.0.2.1:51850: + accept 192.0.2.7",
                "  peer 192.0.2.1:51850: + clients-from 10.0.0.0/8",
                "  peer 192.0.2.1:51850: + outgoing 25/tcp",
            ]
        );
    }

    #[test]
    fn what_cannot_change_is_refused_by_name() {
        let new = peer("192.0.2.1", 0, "");
        let old = peer("192.0.2.1", 0, "move = \"192.0.2.5\"");
        let with = |first: &str| format!("{first}\n{new}");
        for (after, says) in [
            (
                with("tun = \"x\"\nlanes = 63"),
                "tun, lanes cannot be changed while the daemon runs",
            ),
            (with("state-dir = \"/x\""), "state-dir cannot"),
            (
                with("uplink = \"x\"\nno-split = true"),
                "uplink, no-split cannot",
            ),
            (with("without = \"udp-gso\""), "without cannot"),
            (
                with("log-format = \"json\"\nmetrics = 9185"),
                "log-format, metrics cannot be changed while the daemon runs: restart needed",
            ),
            (
                with("listen = \"192.0.2.1:51850\""),
                "the address of listen cannot",
            ),
            (
                old,
                "this is the new server, and would be the old: restart needed",
            ),
        ] {
            let why = plan(&new, &after).unwrap_err();
            assert!(why.contains(says), "{why}");
        }
    }

    /// What becomes of each key that a file may have: the first words of its line, behind the name
    /// of the peer if it is about one; or the word by which it is refused, as it wants a restart.
    const KEYS_OF_A_FILE: [(&str, &str, bool); 27] = [
        ("peer = \"192.0.2.9\"", "peer ", false),
        ("psk = KEY", "another key", false),
        ("psk-file = KEY", "another key", false),
        ("move = \"192.0.2.6\"", "+ move 192.0.2.6", false),
        ("allow-outgoing = true", "+ allow-outgoing", false),
        ("deliver-to = \"keep\"", "deliver-to", false),
        ("deliver = \"192.0.2.5=198.51.100.3\"", "+ deliver", false),
        ("accept = \"192.0.2.6\"", "- accept", false),
        ("clients-from = \"10.0.0.0/8\"", "+ clients-from", false),
        ("outgoing = true", "+ outgoing bound", false),
        ("listen = 7", "listen: 51850 -> 7", false),
        ("max-flows = 7", "max-flows: 1000000 -> 7", false),
        (
            "cipher = \"aes-256-gcm\"",
            "cipher: auto -> aes-256-gcm",
            false,
        ),
        ("start = \"here\"", "start: moved -> here", false),
        ("keep = \"7d\"", "clients are remembered: 90d -> 7d", false),
        (
            "no-client-names = true",
            "clients are remembered: 90d -> 90d, without",
            false,
        ),
        (
            "no-client-log = true",
            "clients are remembered: 90d -> off",
            false,
        ),
        ("rekey-after = 60", "rekey-after: default -> 60", false),
        ("tun = \"x\"", "tun", true),
        ("uplink = \"x\"", "uplink", true),
        ("lanes = 63", "lanes", true),
        ("state-dir = \"/x\"", "state-dir", true),
        ("no-split = true", "no-split", true),
        ("without = \"udp-gso\"", "without", true),
        ("log-format = \"json\"", "log-format", true),
        ("metrics = 9185", "metrics", true),
        (
            "listen = \"192.0.2.1:51850\"",
            "the address of listen",
            true,
        ),
    ];

    #[test]
    fn each_key_of_a_file_is_applied_or_wants_a_restart() {
        let of_old = ["move", "allow-outgoing", "start", "keep"];
        let mut seen: Vec<&str> = Vec::new();
        for (line, says, restart) in KEYS_OF_A_FILE {
            let (key, value) = line.split_once(" = ").unwrap();
            let is_old = of_old.contains(&key) || key.starts_with("no-client");
            let own = if is_old { "move" } else { "accept" };
            let settings = |line: &str| {
                let default = [
                    ("peer", "\"192.0.2.1\"".to_owned()),
                    ("psk", format!("\"{}\"", KEYS[0])),
                    (own, "\"192.0.2.5\"".to_owned()),
                ];
                let is_other = |name: &str| line.split(" = ").next() == Some(name);
                let rest = default.iter().filter(|(name, _)| !is_other(name));
                let rest = rest.map(|(name, value)| format!("{name} = {value}\n"));
                config(&(rest.collect::<String>() + line))
            };
            let line = match value {
                "KEY" => format!("psk = \"{}\"", KEYS[1]),
                _ => line.to_owned(),
            };
            let plan = Running::new(&settings("")).plan(&settings(&line));
            match (restart, plan) {
                (false, Ok(plan)) => {
                    let peer = "  peer 192.0.2.1:51850: ";
                    let lines = plan.lines.iter();
                    let mut words = lines.map(|it| it.strip_prefix(peer).unwrap_or(it));
                    let told = words.any(|it| it.starts_with(says));
                    assert!(told, "{line}: {:?}", plan.lines);
                }
                (true, Err(why)) => {
                    let named = why.starts_with(&format!("{says} cannot be changed"));
                    assert!(named && why.ends_with("restart needed"), "{line}: {why}");
                }
                (_, plan) => panic!("{line}: {plan:?}"),
            }
            seen.push(key);
        }
        let command = DaemonArgs::augment_args(PeerArgs::augment_args(clap::Command::new("all")));
        for key in command.get_arguments().filter_map(clap::Arg::get_long) {
            assert!(seen.contains(&key), "{key} has a line here, or is no key");
        }
    }

    #[test]
    fn what_moves_no_more_leaves_unless_its_peer_is_gone_or_another_move_has_it() {
        let old = |moves: &str| peer("192.0.2.1", 0, &format!("move = {moves}"));
        let other = |moves: &str| peer("192.0.2.2", 1, &format!("move = {moves}"));
        let leaving = |running: &Running| -> Vec<String> {
            running
                .leaving
                .iter()
                .map(|(id, it)| format!("{} {it}", id.0))
                .collect()
        };
        let both = old("[\"192.0.2.5\", \"192.0.2.6:80,443/tcp\"]");
        for (after, expected) in [
            (both.clone(), &[][..]),
            (old("\"192.0.2.5\""), &["0 192.0.2.6:80,443/tcp"]),
            (
                old("[\"192.0.2.5\", \"192.0.2.6:80\"]"),
                &["0 192.0.2.6:443/tcp"],
            ),
            (old("[\"192.0.2.5\", \"192.0.2.6\"]"), &[]),
            (old("\"192.0.2.6:80,443/tcp\""), &["0 192.0.2.5"]),
            (old("\"192.0.2.4/30\""), &[]),
            (
                format!("{}{}", old("\"192.0.2.5\""), other("\"192.0.2.6:443\"")),
                &["0 192.0.2.6:80/tcp"],
            ),
            (other("\"192.0.2.9\""), &[]),
        ] {
            let plan = plan(&both, &after).unwrap();
            assert_eq!(leaving(&plan.next), expected, "{after}");
            // It still does after another change, and no more once it is back.
            let again = plan
                .next
                .plan(&config(&format!("max-flows = 9\n{after}")))
                .unwrap();
            assert_eq!(leaving(&again.next), expected, "{after}");
            let back = plan.next.plan(&config(&both)).unwrap();
            let left = leaving(&back.next);
            assert!(
                expected
                    .iter()
                    .all(|it| !left.iter().any(|left| left == it)),
                "{after}"
            );
        }
    }
}
