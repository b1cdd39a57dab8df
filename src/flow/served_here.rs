//! Which clients the old server serves itself, as its programs tell of some of their packets.
//!
//! The conversations are followed as those that the [gates](super::gate) carry, in
//! [`visits`](super::visits). What differs: a packet is a copy, cut off behind its first bytes, and
//! somebody else has seen already how far its conversation has come.

use std::net::IpAddr;
use std::time::Instant;

use crate::flow::class::{Seen, Side};
use crate::flow::clients::{Change, Flow};
use crate::flow::seed::Seed;
use crate::flow::visits::Visits;
use crate::flow::weight::Weight;
use crate::model::moved::TCP;
use crate::model::visit::{ServedBy, Visited};
use crate::packet::{Addr, FIN, Kind, Parsed, SYN};

/// The conversations of the last minute.
#[derive(Debug)]
pub struct ServedHere {
    seed: Seed,
    visits: Visits,
    openings: u64,
    lost: u64,
    /// A packet as long as it was.
    whole: Vec<u8>,
}

/// Which packet it was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Passed {
    /// When it passed.
    pub at: Instant,
    /// This server has answered with it; else the client has sent it.
    pub is_answer: bool,
    /// It is the first of its conversation.
    pub is_first: bool,
}

impl ServedHere {
    /// Nobody has come yet. `names`: the first bytes are wanted.
    pub fn new(seed: Seed, names: bool) -> Self {
        Self {
            seed,
            visits: Visits::new(seed, names),
            openings: 0,
            lost: 0,
            whole: Vec::new(),
        }
    }

    /// A packet has passed that began with `head`. Of TCP its connection is established.
    pub fn passed(&mut self, passed: Passed, head: &[u8]) {
        // Lengths are checked against those of the packet.
        let Some(total) = total(head) else { return };
        self.whole.clear();
        self.whole.extend_from_slice(head);
        self.whole.resize(total.max(head.len()), 0);
        let Ok(parsed) = Parsed::parse(&self.whole) else {
            return;
        };
        if head.len() < parsed.payload() {
            return;
        }
        let side = if passed.is_answer {
            Side::Application
        } else {
            Side::Client
        };
        let Some(flow) = self.flow(&parsed, head, side) else {
            return;
        };
        let change = change(&parsed, passed);
        (self.visits).spoke(passed.at, side, &parsed, head, &flow, change, false);
    }

    /// So many connections have begun, and of so many conversations nothing was told since there
    /// were too many.
    pub fn count(&mut self, openings: u64, lost: u64) {
        self.openings += openings;
        self.lost += lost;
    }

    /// What there is to tell since the last time: with `all`, everything that is known.
    pub fn take(&mut self, now: Instant, all: bool) -> Visited<Instant> {
        let mut visited = self.visits.take(now, all);
        for visit in &mut visited.visits {
            visit.served_by = ServedBy::Old;
        }
        visited.openings += std::mem::take(&mut self.openings);
        visited.missed += std::mem::take(&mut self.lost);
        visited
    }

    /// Conversations that will be told of once they have settled.
    pub fn settling(&self) -> u64 {
        self.visits.settling()
    }

    /// From now on the first bytes are wanted, or no longer are.
    pub fn set_names(&mut self, names: bool) {
        self.visits.set_names(names);
    }

    /// These clients have come before.
    pub fn know(&self, clients: &[IpAddr]) {
        clients
            .iter()
            .for_each(|&client| self.visits.know(client.into()));
    }

    /// The packet's flow; `None` of what belongs to none.
    fn flow(&self, parsed: &Parsed, head: &[u8], side: Side) -> Option<Flow> {
        let (client, moved) = match side {
            Side::Client => (parsed.src(head), parsed.dst(head)),
            Side::Application => (parsed.dst(head), parsed.src(head)),
        };
        let [from, to] = match side {
            Side::Client => [parsed.src_port(), parsed.dst_port()],
            Side::Application => [parsed.dst_port(), parsed.src_port()],
        };
        let ports = match parsed.kind() {
            Kind::Tcp | Kind::Udp => u64::from(from) << 16 | u64::from(to),
            Kind::IcmpQuery | Kind::IcmpReply => u64::from(from),
            Kind::Other => 0,
            Kind::IcmpError | Kind::LaterFragment => return None,
        };
        let protocol = parsed.protocol();
        let between: [Addr; 2] = [client, moved];
        let hash = self.seed.flow(between, ports, protocol);
        Some(Flow::new(hash, protocol, Weight::of(parsed)))
    }
}

/// The length of a packet, as its header says.
fn total(head: &[u8]) -> Option<usize> {
    let word = |at: usize| {
        Some(usize::from(u16::from_be_bytes(
            *head.get(at..)?.first_chunk()?,
        )))
    };
    match head.first()? >> 4 {
        4 => word(2),
        6 => Some(word(4)? + 40),
        _ => None,
    }
}

/// How far a conversation has come with this packet.
fn change(parsed: &Parsed, passed: Passed) -> Change {
    let protocol = parsed.protocol();
    let after = |seen: Seen, side, flags| seen.after(protocol, side, flags);
    let asked = after(Seen::default(), Side::Client, SYN);
    let answered = after(asked, Side::Application, 0);
    if passed.is_answer {
        return Change {
            before: asked,
            after: answered,
        };
    }
    let before = match passed.is_first {
        true => answered,
        false => after(answered, Side::Client, 0),
    };
    let mut now = after(before, Side::Client, parsed.tcp_flags());
    if protocol == TCP && parsed.tcp_flags() & FIN != 0 {
        // What this server sends is not seen: it has closed, or will.
        now = after(now, Side::Application, FIN);
    }
    Change { before, after: now }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::packet::ACK;
    use crate::packet::testing::{Plan, reply};
    use crate::testing::epoch;

    const HELLO: &[u8] = b"GET / HTTP/1.1\r\nHost: www.example.net\r\n\r\n";

    fn served() -> ServedHere {
        ServedHere::new(Seed::new([1, 2]), true)
    }

    fn passed(after: u64, is_first: bool) -> Passed {
        Passed {
            at: epoch() + Duration::from_secs(after),
            is_answer: false,
            is_first,
        }
    }

    fn sends(port: u16, seq: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
        let plan = Plan {
            src_port: port,
            seq,
            flags,
            payload: payload.to_vec(),
            ..Plan::new(Kind::Tcp, "203.0.113.7", "192.0.2.5")
        };
        plan.build()
    }

    #[test]
    fn a_connection_is_one_visit_with_its_name_and_bytes() {
        let mut served = served();
        served.passed(passed(0, true), &sends(4_000, 1_000, ACK, HELLO));
        let end = 1_000 + HELLO.len() as u32;
        served.passed(passed(1, false), &sends(4_000, end, ACK | FIN, b""));
        let told = served.take(epoch() + Duration::from_secs(1), false);
        let [visit] = &told.visits[..] else {
            panic!("{told:?}");
        };
        assert_eq!(visit.served_by, ServedBy::Old);
        assert!(visit.began.is_some() && visit.answered && visit.went_on && !visit.bare);
        assert_eq!(visit.bytes_in, HELLO.len() as u64);
        assert_eq!(visit.first_bytes, HELLO);
        let later = epoch() + Duration::from_secs(100);
        assert!(served.take(later, true).visits.is_empty());
    }

    #[test]
    fn one_that_is_older_did_not_begin_and_the_head_of_a_long_packet_will_do() {
        let mut served = served();
        let long = sends(4_001, 5_000, ACK, &[b'x'; 9_000]);
        served.passed(passed(0, false), &long[..100]);
        let told = served.take(epoch() + Duration::from_secs(4), false);
        let [visit] = &told.visits[..] else {
            panic!("{told:?}");
        };
        assert_eq!((visit.began, visit.bytes_in), (None, 9_000));
    }

    #[test]
    fn a_question_and_its_answer_are_bare_until_the_client_goes_on() {
        let mut served = served();
        let asks = Plan {
            dst_port: 53,
            ..Plan::new(Kind::Udp, "203.0.113.7", "192.0.2.5")
        };
        let answer = Passed {
            is_answer: true,
            ..passed(0, true)
        };
        served.passed(answer, &reply(&asks).build());
        let told = served.take(epoch() + Duration::from_secs(3), false);
        let [visit] = &told.visits[..] else {
            panic!("{told:?}");
        };
        assert!(visit.began.is_some() && visit.answered && visit.bare);
        assert_eq!(visit.asked.port, 53);
        served.passed(passed(5, false), &asks.build());
        let told = served.take(epoch() + Duration::from_secs(8), true);
        assert!(told.visits[0].began.is_none() && !told.visits[0].bare);
    }

    #[test]
    fn what_is_no_packet_is_nothing() {
        let mut served = served();
        let whole = sends(4_002, 1, ACK | SYN, b"");
        for length in 0..whole.len() {
            served.passed(passed(0, true), &whole[..length]);
        }
        served.passed(passed(0, true), &[0xff; 100]);
        served.count(3, 2);
        let told = served.take(epoch() + Duration::from_secs(9), true);
        assert_eq!((told.openings, told.missed), (3, 2));
    }
}
