//! Whose a captured packet is: the tunnel's, or the old server's own.
//!
//! Owns what has moved of which address, and which captured packets belong to it. Knows no flows.
//! Must not touch sockets, devices or the clock.

use std::sync::Mutex;
use std::time::Instant;

use crate::flow::fragments::FragmentCache;
use crate::flow::lock;
use crate::flow::seed::Seed;
use crate::model::drops::DropReason;
use crate::model::moved::Move;
use crate::model::scopes::Scopes;
use crate::packet::{Addr, Fragment, Kind, Parsed, Quoted};

/// Who owns a packet that the capture on the old server handed over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Verdict {
    /// The tunnel's.
    Carry,
    /// The old server's own: it is written back to the TUN as it is, for local delivery.
    Bounce,
    /// Nobody's yet: it waits until it is decided ([`gate`](crate::flow::gate)).
    Hold,
}

/// What has moved. Shared by the lanes.
#[derive(Debug)]
pub struct Ownership {
    /// A copy of its own: a shared one costs each packet five instructions more.
    scopes: Scopes,
    seed: Seed,
    fragments: Mutex<FragmentCache<Verdict>>,
}

impl Ownership {
    /// For what was moved.
    pub fn new(moves: &[Move], seed: Seed) -> Self {
        Self {
            scopes: Scopes::new(moves),
            seed,
            fragments: Mutex::new(FragmentCache::new()),
        }
    }

    /// Judges a packet that was captured on its way to a moved address.
    ///
    /// If an address was moved in part, later fragments follow their first one, and ICMP errors
    /// follow the flow that they quote. A packet that cannot be attributed stays with the old
    /// server.
    ///
    /// # Errors
    /// [`DropReason::NotMoved`] if no part of the destination was moved;
    /// [`DropReason::FragmentUnknown`] if the first fragment has not been seen yet.
    pub fn judge(
        &self,
        now: Instant,
        parsed: &Parsed,
        bytes: &[u8],
    ) -> Result<Verdict, DropReason> {
        let found = self.find(parsed.dst(bytes));
        let scope = found.ok_or(DropReason::NotMoved)?;
        self.judge_for(scope, now, parsed, bytes)
    }

    /// Whether anything of an address was moved.
    pub fn is_moved(&self, addr: Addr) -> bool {
        self.find(addr).is_some()
    }

    /// What was moved of which address.
    pub(super) fn scopes(&self) -> &Scopes {
        &self.scopes
    }

    /// The scope of an address, if something of it was moved.
    #[inline]
    pub(super) fn find(&self, addr: Addr) -> Option<usize> {
        self.scopes.find(addr.number())
    }

    /// Whether a packet belongs to what was moved of a scope that is of this kind and protocol, and
    /// has this port at the moved address.
    #[inline]
    pub(super) fn takes(&self, scope: usize, protocol: u8, kind: Kind, port: u16) -> bool {
        let port = kind.has_ports().then_some(port);
        self.scopes.takes(scope, protocol, port)
    }

    /// Whether all of every scope has moved.
    pub(super) fn is_all_whole(&self) -> bool {
        (0..self.scopes.len()).all(|scope| self.scopes.is_whole(scope))
    }

    /// The later fragments of this packet are the tunnel's, if it is a first fragment.
    pub(super) fn carry_fragments(&self, now: Instant, parsed: &Parsed, bytes: &[u8]) {
        if parsed.fragment() == Fragment::First {
            lock(&self.fragments).remember(now, &self.seed, parsed, bytes, Verdict::Carry);
        }
    }

    /// The later fragments of this packet are not the tunnel's, if it is a first fragment.
    pub(super) fn leave_fragments(&self, now: Instant, parsed: &Parsed, bytes: &[u8]) {
        if parsed.fragment() == Fragment::First {
            lock(&self.fragments).remember(now, &self.seed, parsed, bytes, Verdict::Bounce);
        }
    }

    /// [`Self::judge`] for the scope of the packet's destination.
    #[inline]
    pub(super) fn judge_for(
        &self,
        scope: usize,
        now: Instant,
        parsed: &Parsed,
        bytes: &[u8],
    ) -> Result<Verdict, DropReason> {
        if self.scopes.is_whole(scope) {
            return Ok(Verdict::Carry);
        }
        if parsed.fragment() == Fragment::Later {
            let cache = lock(&self.fragments);
            let verdict = cache.recall(now, &self.seed, parsed, bytes);
            return verdict.ok_or(DropReason::FragmentUnknown);
        }
        let ours = match parsed.kind() {
            // The error is about a packet that left from the moved address.
            Kind::IcmpError => Quoted::parse(bytes, parsed).is_ok_and(|quoted| {
                let (protocol, port) = (quoted.protocol(), quoted.src_port());
                let scope = self.find(quoted.src(bytes));
                scope.is_some_and(|scope| self.takes(scope, protocol, quoted.kind(), port))
            }),
            kind @ (Kind::Tcp
            | Kind::Udp
            | Kind::IcmpQuery
            | Kind::IcmpReply
            | Kind::Other
            | Kind::LaterFragment) => self.takes(scope, parsed.protocol(), kind, parsed.dst_port()),
        };
        let verdict = if ours {
            Verdict::Carry
        } else {
            Verdict::Bounce
        };
        if parsed.fragment() == Fragment::First {
            lock(&self.fragments).remember(now, &self.seed, parsed, bytes, verdict);
        }
        Ok(verdict)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::testing::{Plan, fragments, reply, too_big};
    use crate::testing::epoch;

    const CLIENT: &str = "203.0.113.9";
    const MOVED: &str = "192.0.2.5";
    const ELSEWHERE: &str = "192.0.2.6";

    fn ownership(moves: &[&str]) -> Ownership {
        let moves: Vec<_> = moves.iter().map(|text| text.parse().unwrap()).collect();
        Ownership::new(&moves, Seed::new([1, 2]))
    }

    fn judged(ownership: &Ownership, bytes: &[u8]) -> Result<Verdict, DropReason> {
        ownership.judge(epoch(), &Parsed::parse(bytes).unwrap(), bytes)
    }

    const CARRY: Result<Verdict, DropReason> = Ok(Verdict::Carry);
    const BOUNCE: Result<Verdict, DropReason> = Ok(Verdict::Bounce);

    #[test]
    fn a_whole_move_takes_all_of_its_address_and_nothing_of_another() {
        let whole = ownership(&[MOVED]);
        let udp = Plan::new(Kind::Udp, CLIENT, MOVED);
        assert_eq!(judged(&whole, &udp.build()), CARRY);
        assert_eq!(judged(&whole, &fragments(&udp.build(), 16, 1)[1]), CARRY);
        let elsewhere = Plan::new(Kind::Udp, CLIENT, ELSEWHERE);
        assert_eq!(
            judged(&whole, &elsewhere.build()),
            Err(DropReason::NotMoved)
        );
        assert!(whole.is_moved(Addr::from(MOVED.parse::<std::net::IpAddr>().unwrap())));
    }

    #[test]
    fn a_move_of_ports_takes_these_and_bounces_the_others() {
        let part = ownership(&["192.0.2.5:80/udp", "192.0.2.5:443/tcp"]);
        let with = |kind, port| {
            let mut plan = Plan::new(kind, CLIENT, MOVED);
            plan.dst_port = port;
            judged(&part, &plan.build())
        };
        assert_eq!(with(Kind::Udp, 80), CARRY);
        assert_eq!(with(Kind::Tcp, 443), CARRY);
        assert_eq!(with(Kind::Udp, 443), BOUNCE);
        assert_eq!(with(Kind::Tcp, 80), BOUNCE);
        assert_eq!(with(Kind::IcmpQuery, 0), BOUNCE);
    }

    #[test]
    fn later_fragments_follow_their_first_one() {
        let part = ownership(&["192.0.2.5:80/udp"]);
        for (port, verdict, id) in [(80, CARRY, 1), (81, BOUNCE, 2)] {
            let mut plan = Plan::new(Kind::Udp, CLIENT, MOVED);
            plan.dst_port = port;
            let [first, second] = fragments(&plan.build(), 16, id);
            let unknown = Err(DropReason::FragmentUnknown);
            assert_eq!(judged(&part, &second), unknown, "not known yet");
            assert_eq!(judged(&part, &first), verdict);
            assert_eq!(judged(&part, &second), verdict);
        }
    }

    #[test]
    fn an_error_goes_to_whoever_sent_what_it_quotes() {
        let part = ownership(&["192.0.2.5:80/udp"]);
        let router = "192.0.2.99".parse().unwrap();
        for (port, verdict) in [(80, CARRY), (81, BOUNCE)] {
            let mut plan = reply(&Plan::new(Kind::Udp, CLIENT, MOVED));
            plan.src_port = port;
            let error = too_big(&plan.build(), 28, router);
            assert_eq!(judged(&part, &error), verdict);
        }
    }
}
