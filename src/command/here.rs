//! What the old server still has of what has moved: how much, and how to end it.
//!
//! Commands ask the kernel for this host's sockets themselves. The daemon has no access to them, so
//! that nobody has who takes it over.

use std::collections::{BTreeSet, HashSet};
use std::io;
use std::ops::RangeInclusive;

use crate::daemon::login;
use crate::kernel::{conntrack, sockets};
use crate::model::move_index::MoveIndex;
use crate::model::moved::Move;
use crate::model::status::{ModeStatus, Status};

/// From which ports Linux begins connections, as of its documentation
/// (`Documentation/networking/ip-sysctl.rst`).
const PORT_RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";

/// Adds this host's own TCP connections to what the daemon says of hosts behind it.
pub(super) fn count(status: &mut Status) -> io::Result<()> {
    let tunnels = status.tunnels.iter_mut();
    let mut modes: Vec<&mut ModeStatus> = tunnels.flat_map(|it| &mut it.modes).collect();
    if modes.is_empty() {
        return Ok(());
    }
    let index = MoveIndex::new(modes.iter().filter_map(|it| it.what.parse().ok()).collect());
    if index.moves().len() != modes.len() {
        return Ok(());
    }
    let serving = Serving::look()?;
    let mut counts = vec![0; modes.len()];
    sockets::tcp(|it| {
        if let Some(place) = index.find(it.protocol, it.local)
            && serving.takes(&index.moves()[place], it.local.port())
        {
            counts[place] += 1;
        }
    })?;
    for (mode, count) in modes.iter_mut().zip(counts) {
        mode.here_live = Some(mode.here_live.unwrap_or(0) + count);
        mode.here_tcp = Some(mode.here_tcp.unwrap_or(0) + count);
    }
    Ok(())
}

/// From which ports this host begins connections.
pub(super) struct PortRange(RangeInclusive<u16>);

impl PortRange {
    /// As the kernel says.
    pub(super) fn read() -> Self {
        let text = std::fs::read_to_string(PORT_RANGE).unwrap_or_default();
        let mut ports = text.split_ascii_whitespace().map(str::parse);
        Self(match (ports.next(), ports.next()) {
            (Some(Ok(first)), Some(Ok(last))) => first..=last,
            _ => 32_768..=60_999,
        })
    }

    /// Whether this is one of them.
    pub(super) fn has(&self, port: u16) -> bool {
        self.0.contains(&port)
    }
}

/// Which connections clients have begun. Where all ports of an address have moved, this host's own
/// connections from there look the same, and some of them never end.
struct Serving {
    listening: BTreeSet<u16>,
    given_out: PortRange,
}

impl Serving {
    fn look() -> io::Result<Self> {
        Ok(Self {
            listening: sockets::listening()?,
            given_out: PortRange::read(),
        })
    }

    fn takes(&self, moved: &Move, port: u16) -> bool {
        !moved.ports.is_empty() || self.listening.contains(&port) || !self.given_out.has(port)
    }
}

/// What was ended.
#[derive(Default)]
pub(super) struct Ended {
    /// Sockets of this host.
    pub(super) sockets: u64,
    /// Connections of hosts behind it that the kernel tracked.
    pub(super) tracked: u64,
}

/// Ends what this host's sockets have of these moves, but for the login that the command is given
/// from, and makes the kernel's tracker forget what hosts behind it have.
pub(super) fn cut(moves: Vec<Move>) -> io::Result<Ended> {
    let index = MoveIndex::new(moves);
    let login = login::ends();
    let mut found = Vec::new();
    let is_login = |it: &sockets::Conversation| login == Some((it.remote, it.local));
    sockets::all(|it| {
        if index.find(it.protocol, it.local).is_some() && !is_login(it) {
            found.push(*it);
        }
    })?;
    let mut ended = Ended::default();
    let mut refused = None;
    for conversation in &found {
        match sockets::end(conversation) {
            Ok(()) => ended.sockets += 1,
            // The others end all the same.
            Err(error) => refused = Some(error),
        }
    }
    let wanted = |protocol, local| index.find(protocol, local).is_some();
    ended.tracked = conntrack::forget_behind(wanted).unwrap_or(0);
    match refused {
        Some(error) => Err(error),
        None => Ok(ended),
    }
}

/// The moves of these names, each once.
pub(super) fn parse(names: impl Iterator<Item = String>) -> Vec<Move> {
    let moves: HashSet<Move> = names.filter_map(|name| name.parse().ok()).collect();
    moves.into_iter().collect()
}
