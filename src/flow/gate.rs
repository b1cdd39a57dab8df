//! The old server's checks: what may pass, in either direction.
//!
//! Owns which of the captured packets are the tunnel's and which the old server's own, and what the
//! new server may speak for. Rewrites nothing. Must not touch sockets, devices or the clock.

use std::net::IpAddr;
use std::sync::Mutex;
use std::time::Instant;

use crate::flow::fragments::FragmentCache;
use crate::flow::lock;
use crate::flow::seed::Seed;
use crate::model::drops::DropReason;
use crate::model::moved::Move;
use crate::packet::{Addr, Fragment, Kind, Parsed, Quoted};

/// Who owns a packet that the capture on the old server handed over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Verdict {
    /// The tunnel's.
    Carry,
    /// The old server's own: it is written back to the TUN as it is, for local delivery.
    Bounce,
}

/// The old server's checks. Shared by the lanes.
#[derive(Debug)]
pub struct Gate {
    /// A copy of its own: a shared one costs each packet five instructions more.
    moves: Vec<Move>,
    seed: Seed,
    captured: Mutex<FragmentCache<Verdict>>,
    returning: Mutex<FragmentCache<()>>,
}

impl Gate {
    /// A gate for what was moved.
    pub fn new(moves: &[Move], seed: Seed) -> Self {
        Self {
            moves: moves.to_vec(),
            seed,
            captured: Mutex::new(FragmentCache::new()),
            returning: Mutex::new(FragmentCache::new()),
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
    pub fn check_captured(
        &self,
        now: Instant,
        parsed: &Parsed,
        bytes: &[u8],
    ) -> Result<Verdict, DropReason> {
        let addr = IpAddr::from(parsed.dst(bytes));
        let mut known = false;
        for moved in self.moves.iter().filter(|moved| moved.addr == addr) {
            if moved.is_whole() {
                return Ok(Verdict::Carry);
            }
            known = true;
        }
        if !known {
            return Err(DropReason::NotMoved);
        }
        if parsed.fragment() == Fragment::Later {
            let cache = lock(&self.captured);
            let verdict = cache.recall(now, &self.seed, parsed, bytes);
            return verdict.ok_or(DropReason::FragmentUnknown);
        }
        let ours = match parsed.kind() {
            // The error is about a packet that left from the moved address.
            Kind::IcmpError => Quoted::parse(bytes, parsed).is_ok_and(|quoted| {
                self.takes(
                    quoted.src(bytes),
                    quoted.protocol(),
                    quoted.kind(),
                    quoted.src_port(),
                )
            }),
            kind @ (Kind::Tcp
            | Kind::Udp
            | Kind::IcmpQuery
            | Kind::IcmpReply
            | Kind::Other
            | Kind::LaterFragment) => {
                self.takes(addr.into(), parsed.protocol(), kind, parsed.dst_port())
            }
        };
        let verdict = if ours {
            Verdict::Carry
        } else {
            Verdict::Bounce
        };
        if parsed.fragment() == Fragment::First {
            lock(&self.captured).remember(now, &self.seed, parsed, bytes, verdict);
        }
        Ok(verdict)
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
        let addr = IpAddr::from(src);
        if self
            .moves
            .iter()
            .any(|moved| moved.addr == addr && moved.is_whole())
        {
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
        if !self.takes(src, protocol, kind, port) {
            return Err(DropReason::NotMoved);
        }
        if parsed.fragment() == Fragment::First {
            lock(&self.returning).remember(now, &self.seed, parsed, bytes, ());
        }
        Ok(())
    }

    /// Whether anything of an address was moved.
    pub fn is_moved(&self, addr: Addr) -> bool {
        let addr = IpAddr::from(addr);
        self.moves.iter().any(|moved| moved.addr == addr)
    }

    fn takes(&self, addr: Addr, protocol: u8, kind: Kind, port: u16) -> bool {
        let addr = IpAddr::from(addr);
        self.moves.iter().any(|moved| {
            moved.addr == addr && moved.takes(protocol, kind.has_ports().then_some(port))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::testing::{Plan, fragments, reply, too_big};
    use crate::testing::epoch;

    const CLIENT: &str = "203.0.113.9";
    const MOVED: &str = "192.0.2.5";
    const DELIVERY: &str = "198.51.100.2";

    fn moved_to(plan: &Plan, dst: &str) -> Plan {
        Plan {
            dst: dst.parse().unwrap(),
            ..plan.clone()
        }
    }

    #[test]
    fn the_gate_knows_what_is_whose() {
        let now = epoch();
        let gate = |moves: &[&str]| {
            let moves: Vec<_> = moves.iter().map(|text| text.parse().unwrap()).collect();
            Gate::new(&moves, Seed::new([1, 2]))
        };
        let captured = |gate: &Gate, bytes: &[u8]| {
            gate.check_captured(now, &Parsed::parse(bytes).unwrap(), bytes)
        };
        let returning = |gate: &Gate, bytes: &[u8]| {
            gate.check_returning(now, &Parsed::parse(bytes).unwrap(), bytes)
        };
        let (carry, bounce) = (Ok(Verdict::Carry), Ok(Verdict::Bounce));
        let whole = gate(&[MOVED]);
        let udp = Plan::new(Kind::Udp, CLIENT, MOVED);
        assert_eq!(captured(&whole, &udp.build()), carry);
        assert_eq!(captured(&whole, &fragments(&udp.build(), 16, 1)[1]), carry);
        assert_eq!(
            captured(&whole, &moved_to(&udp, DELIVERY).build()),
            Err(DropReason::NotMoved)
        );
        assert_eq!(returning(&whole, &reply(&udp).build()), Ok(()));
        assert_eq!(returning(&whole, &udp.build()), Err(DropReason::NotMoved));

        let part = gate(&["192.0.2.5:80/udp"]);
        let ours = udp.build();
        let theirs = Plan {
            dst_port: 81,
            ..udp.clone()
        }
        .build();
        assert_eq!(captured(&part, &ours), carry);
        assert_eq!(captured(&part, &theirs), bounce);
        let [first, second] = fragments(&ours, 16, 1);
        let unknown = Err(DropReason::FragmentUnknown);
        assert_eq!(captured(&part, &second), unknown, "not known yet");
        assert_eq!(captured(&part, &first), carry);
        assert_eq!(captured(&part, &second), carry);
        let [first, second] = fragments(&theirs, 16, 2);
        assert_eq!(captured(&part, &first), bounce);
        assert_eq!(captured(&part, &second), bounce);
        // An error goes to whoever sent what it quotes.
        let router = "192.0.2.99".parse().unwrap();
        assert_eq!(
            captured(&part, &too_big(&reply(&udp).build(), 28, router)),
            carry
        );
        let other = Plan {
            src_port: 81,
            ..reply(&udp)
        };
        assert_eq!(
            captured(&part, &too_big(&other.build(), 28, router)),
            bounce
        );

        let back = reply(&udp);
        assert_eq!(returning(&part, &back.build()), Ok(()));
        assert_eq!(returning(&part, &other.build()), Err(DropReason::NotMoved));
        let [first, second] = fragments(&back.build(), 16, 3);
        assert_eq!(returning(&part, &second), Err(DropReason::FragmentUnknown));
        assert_eq!(returning(&part, &first), Ok(()));
        assert_eq!(returning(&part, &second), Ok(()));
        let about_ours = too_big(&ours, 28, MOVED.parse().unwrap());
        assert_eq!(returning(&part, &about_ours), Ok(()));
        let about_theirs = too_big(&theirs, 28, MOVED.parse().unwrap());
        assert_eq!(returning(&part, &about_theirs), Err(DropReason::NotMoved));
    }
}
