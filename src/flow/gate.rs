//! The old server's checks: what may pass, in either direction.
//!
//! Owns what the new server may speak for. Rewrites nothing. Must not touch sockets, devices or the
//! clock.

use std::sync::Mutex;
use std::time::Instant;

use crate::flow::fragments::FragmentCache;
use crate::flow::lock;
use crate::flow::ownership::{Ownership, Verdict};
use crate::flow::seed::Seed;
use crate::model::drops::DropReason;
use crate::model::moved::Move;
use crate::packet::{Fragment, Kind, Parsed, Quoted};

/// The old server's checks. Shared by the lanes.
#[derive(Debug)]
pub struct Gate {
    ownership: Ownership,
    seed: Seed,
    returning: Mutex<FragmentCache<()>>,
}

impl Gate {
    /// A gate for what was moved.
    pub fn new(moves: &[Move], seed: Seed) -> Self {
        Self {
            ownership: Ownership::new(moves, seed),
            seed,
            returning: Mutex::new(FragmentCache::new()),
        }
    }

    /// Judges a packet that was captured on its way to a moved address.
    ///
    /// # Errors
    /// As [`Ownership::judge`].
    #[inline]
    pub fn check_captured(
        &self,
        now: Instant,
        parsed: &Parsed,
        bytes: &[u8],
    ) -> Result<Verdict, DropReason> {
        self.ownership.judge(now, parsed, bytes)
    }

    /// Judges a packet that came out of the tunnel on its way to a client: the new server may speak
    /// for what was moved, and for nothing else.
    ///
    /// # Errors
    /// [`DropReason::NotMoved`], [`DropReason::FragmentUnknown`], [`DropReason::IcmpUnrelated`].
    pub fn check_returning(
        &self,
        now: Instant,
        parsed: &Parsed,
        bytes: &[u8],
    ) -> Result<(), DropReason> {
        let src = parsed.src(bytes);
        let found = self.ownership.find(src);
        let scope = found.ok_or(DropReason::NotMoved)?;
        if scope.is_whole() {
            return Ok(());
        }
        if parsed.fragment() == Fragment::Later {
            return lock(&self.returning)
                .recall(now, &self.seed, parsed, bytes)
                .ok_or(DropReason::FragmentUnknown);
        }
        let (kind, protocol, port) = match parsed.kind() {
            // The error is about a packet that came to the moved address.
            Kind::IcmpError => {
                let quoted = Quoted::parse(bytes, parsed)?;
                if quoted.dst(bytes) != src {
                    return Err(DropReason::IcmpUnrelated);
                }
                (quoted.kind(), quoted.protocol(), quoted.dst_port())
            }
            kind @ (Kind::Tcp
            | Kind::Udp
            | Kind::IcmpQuery
            | Kind::IcmpReply
            | Kind::Other
            | Kind::LaterFragment) => (kind, parsed.protocol(), parsed.src_port()),
        };
        if !scope.takes(protocol, kind, port) {
            return Err(DropReason::NotMoved);
        }
        if parsed.fragment() == Fragment::First {
            lock(&self.returning).remember(now, &self.seed, parsed, bytes, ());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::testing::{Plan, fragments, reply, too_big};
    use crate::testing::epoch;

    const CLIENT: &str = "203.0.113.9";
    const MOVED: &str = "192.0.2.5";

    #[test]
    fn the_new_server_speaks_for_what_was_moved_alone() {
        let now = epoch();
        let gate = |moves: &[&str]| {
            let moves: Vec<_> = moves.iter().map(|text| text.parse().unwrap()).collect();
            Gate::new(&moves, Seed::new([1, 2]))
        };
        let returning = |gate: &Gate, bytes: &[u8]| {
            gate.check_returning(now, &Parsed::parse(bytes).unwrap(), bytes)
        };
        let whole = gate(&[MOVED]);
        let udp = Plan::new(Kind::Udp, CLIENT, MOVED);
        assert_eq!(returning(&whole, &reply(&udp).build()), Ok(()));
        assert_eq!(returning(&whole, &udp.build()), Err(DropReason::NotMoved));

        let part = gate(&["192.0.2.5:80/udp"]);
        let back = reply(&udp);
        let other = Plan {
            src_port: 81,
            ..back.clone()
        };
        assert_eq!(returning(&part, &back.build()), Ok(()));
        assert_eq!(returning(&part, &other.build()), Err(DropReason::NotMoved));
        let [first, second] = fragments(&back.build(), 16, 3);
        assert_eq!(returning(&part, &second), Err(DropReason::FragmentUnknown));
        assert_eq!(returning(&part, &first), Ok(()));
        assert_eq!(returning(&part, &second), Ok(()));
        let about_ours = too_big(&udp.build(), 28, MOVED.parse().unwrap());
        assert_eq!(returning(&part, &about_ours), Ok(()));
        let theirs = Plan {
            dst_port: 81,
            ..udp
        };
        let about_theirs = too_big(&theirs.build(), 28, MOVED.parse().unwrap());
        assert_eq!(returning(&part, &about_theirs), Err(DropReason::NotMoved));
    }
}
