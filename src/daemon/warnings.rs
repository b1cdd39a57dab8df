//! What an administrator should know: which lines `status` still shows, and when one is logged
//! again.
//!
//! Owns the newest few lines of the daemon itself and of each peer, and how many lines about a peer
//! are logged: what one peer causes takes no place of another's. It reads no clock and logs
//! nothing: the caller logs a line if told to.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::index;
use tracing::warn;

use crate::model::peer::PeerId;

/// Warnings of one peer, or of the daemon itself, that `status` still shows.
const KEPT: usize = 8;

/// A line that is still kept is logged at most once in this time, so that a peer that repeats
/// itself does not fill the disk.
const PACE: Duration = Duration::from_secs(60);

/// Lines about one peer that are logged in a [`PACE`]. A peer whose path fails again and again
/// causes fewer.
const LINES: u64 = 12;

/// The newest warnings.
#[derive(Debug, Default)]
pub(super) struct Warnings {
    own: Lines,
    /// By [`PeerId`].
    peers: Vec<Peer>,
}

#[derive(Debug, Default)]
struct Peer {
    lines: Lines,
    /// When the first line of this [`PACE`] was logged.
    since: Option<Instant>,
    /// Lines that were wanted since then.
    wanted: u64,
}

#[derive(Debug, Default)]
struct Lines(VecDeque<Kept>);

#[derive(Debug)]
struct Kept {
    line: String,
    said: Instant,
    logged: Instant,
}

impl Warnings {
    /// Starts with none, for so many peers.
    pub(super) fn new(peers: usize) -> Self {
        Self {
            own: Lines::default(),
            peers: (0..peers).map(|_| Peer::default()).collect(),
        }
    }

    /// There is one more peer, or another one in the place of one that is gone.
    pub(super) fn begin(&mut self, peer: PeerId) {
        match self.peers.get_mut(index(peer)) {
            Some(place) => *place = Peer::default(),
            None => self.peers.push(Peer::default()),
        }
    }

    /// Keeps `line` as the newest one of the daemon itself; true if the caller has to log it.
    #[must_use]
    pub(super) fn keep(&mut self, now: Instant, line: String) -> bool {
        self.own.keep(now, line)
    }

    /// Keeps `line` as the newest one of the daemon itself, and logs it if it is due.
    pub(super) fn warn(&mut self, now: Instant, line: String) {
        if self.keep(now, line.clone()) {
            warn!(warning = %line, "an administrator should know");
        }
    }

    /// Keeps `line` as the newest one of a peer; true if the caller has to log it.
    #[must_use]
    pub(super) fn keep_of(&mut self, now: Instant, peer: PeerId, line: String) -> bool {
        self.peers[index(peer)].lines.keep(now, line) && self.may_log(now, peer)
    }

    /// A line of a peer is no longer true.
    pub(super) fn withdraw(&mut self, peer: PeerId, line: &str) {
        let lines = &mut self.peers[index(peer)].lines.0;
        lines.retain(|kept| kept.line != line);
    }

    /// Lines of the daemon itself that are no longer true.
    pub(super) fn withdraw_own(&mut self, is_over: impl Fn(&str) -> bool) {
        self.own.0.retain(|kept| !is_over(&kept.line));
    }

    /// Warns of these, which are all lines of their kind that are true now.
    pub(super) fn warn_of_all(
        &mut self,
        now: Instant,
        is_of_kind: impl Fn(&str) -> bool,
        lines: Vec<String>,
    ) {
        self.withdraw_own(|line| is_of_kind(line) && !lines.iter().any(|it| it == line));
        for line in lines {
            self.warn(now, line);
        }
    }

    /// Whether one more line about a peer may be logged. If not, it is counted.
    #[must_use]
    pub(super) fn may_log(&mut self, now: Instant, peer: PeerId) -> bool {
        let peer = &mut self.peers[index(peer)];
        peer.since.get_or_insert(now);
        peer.wanted += 1;
        peer.wanted <= LINES
    }

    /// The peers about whom lines were not logged, and how many, once that time is over.
    pub(super) fn take_unlogged(&mut self, now: Instant) -> Vec<(PeerId, u64)> {
        let mut unlogged = Vec::new();
        for (peer, id) in self.peers.iter_mut().zip(0..) {
            let over = |since| now.saturating_duration_since(since) >= PACE;
            if peer.since.is_some_and(over) {
                peer.since = None;
                let wanted = std::mem::take(&mut peer.wanted);
                if wanted > LINES {
                    unlogged.push((PeerId(id), wanted - LINES));
                }
            }
        }
        unlogged
    }

    /// The lines that are kept, newest last.
    pub(super) fn lines(&self) -> Vec<String> {
        let of_peers = self.peers.iter().flat_map(|peer| &peer.lines.0);
        let mut all: Vec<&Kept> = self.own.0.iter().chain(of_peers).collect();
        all.sort_by_key(|kept| kept.said);
        all.into_iter().map(|kept| kept.line.clone()).collect()
    }
}

impl Lines {
    fn keep(&mut self, now: Instant, line: String) -> bool {
        let known = self.0.iter().position(|kept| kept.line == line);
        let before = known.and_then(|at| self.0.remove(at));
        let fresh = before
            .as_ref()
            .is_none_or(|kept| now.saturating_duration_since(kept.logged) >= PACE);
        let logged = before.map_or(now, |kept| if fresh { now } else { kept.logged });
        if self.0.len() == KEPT {
            self.0.pop_front();
        }
        let said = now;
        self.0.push_back(Kept { line, said, logged });
        fresh
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::epoch;

    const MAD: PeerId = PeerId(0);
    const SANE: PeerId = PeerId(1);

    #[test]
    fn the_newest_are_kept_each_once() {
        let (mut warnings, now) = (Warnings::default(), epoch());
        for number in 0..20 {
            assert!(warnings.keep(now, format!("line {number}")));
        }
        assert!(!warnings.keep(now, "line 15".into()));
        let lines = warnings.lines();
        assert_eq!(lines.len(), KEPT);
        assert_eq!(lines.first().unwrap(), "line 12");
        assert_eq!(lines.last().unwrap(), "line 15");
    }

    #[test]
    fn the_same_line_is_logged_once_a_minute() {
        let (mut warnings, now) = (Warnings::default(), epoch());
        let logged = (0..600)
            .filter(|&seconds| {
                let at = now + Duration::from_secs(seconds);
                warnings.keep(at, "again and again".into())
            })
            .count();
        assert_eq!(logged, 10);
        assert_eq!(warnings.lines(), ["again and again"]);
    }

    #[test]
    fn a_peer_that_is_never_short_of_words_takes_no_line_of_others() {
        let (mut warnings, start) = (Warnings::new(2), epoch());
        assert!(warnings.keep(start, "the daemon's own".into()));
        assert!(warnings.keep_of(start, SANE, "a quiet peer's".into()));
        let (mut logged, mut unlogged) = (0, 0);
        for second in 0..600 {
            let now = start + Duration::from_secs(second);
            logged += u64::from(warnings.keep_of(now, MAD, format!("word {second}")));
            logged += u64::from(warnings.may_log(now, MAD));
            for (peer, lines) in warnings.take_unlogged(now) {
                assert_eq!(peer, MAD);
                unlogged += lines;
            }
        }
        // Nothing else than these lines, and one a minute that says how many there were.
        assert_eq!(logged, 10 * LINES);
        assert!((960..1_080).contains(&unlogged), "{unlogged}");
        let now = start + Duration::from_secs(600);
        assert!(warnings.may_log(now, SANE));
        let lines = warnings.lines();
        assert_eq!(lines[..2], ["the daemon's own", "a quiet peer's"]);
        assert_eq!(lines.len(), KEPT + 2);
    }
}
