//! Which clients still come to what has moved, and what is known of each conversation.
//!
//! Owns the conversations of the last minute, until the control task has been told of them. It sees
//! no packet that changes nothing: [`Clients`](super::clients) writes the word of a flow anew when
//! its state changes, or once in some seconds while it is in use, and only then a packet comes
//! here. So a packet on the fast path costs nothing more, and a new flow costs a look at a bitmap.
//!
//! ```text
//! new flow ─────── opened() ──► counted; noted if its client is known
//! word changed ─── spoke() ───► noted once it was answered and went on ──┐
//!                    │                                                   ▼
//!                    └─ its first bytes are wanted: look again        followed
//!                                                                        │
//! control task ──────────────────────── take(), every second ◄───────────┘
//! ```
//!
//! * What counts is the answer, and that the client went on after it. Who forges a source does not
//!   see the answer: a server resets a connection whose SYN-ACK is acknowledged with a number that
//!   is not its own, by a segment without ACK (RFC 9293 section 3.5.2), and such a conversation is
//!   forgotten again.
//! * Bytes of TCP are the difference of sequence numbers, exact up to the last look. A connection
//!   that carries more than 2 GiB between two looks, some seconds, is told too little of.
//! * Whoever the new server has called is no client, however long they talk.
//! * Clients that are known have places of their own, which a flood of others cannot take.
//! * Conversations that the old server itself serves no gate carries:
//!   [`served_here`](super::served_here) has them followed in the same way.

use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use hashbrown::HashTable;

use crate::flow::class::{Class, Seen, Side};
use crate::flow::clients::{Change, Flow};
use crate::flow::lock;
use crate::flow::seed::Seed;
use crate::model::asked::Asked;
use crate::model::moved::TCP;
use crate::model::visit::{ServedBy, Visit, Visited, client};
use crate::packet::{ACK, Addr, FIN, Parsed, RST, SYN};

/// Parts that lanes seldom want at the same time.
const SHARDS: usize = 16;

/// Conversations of one part that are followed at a time, of clients that are known and as many of
/// others: 32,768 of each in all parts, some 5 MB.
const MAX_FOLLOWED: usize = 2_048;

/// Conversations of one part whose first bytes are collected at a time: 8 MiB in all parts.
const MAX_READING: usize = 128;

/// Bytes of the map of known clients, as a power of two of bits: 2²⁰ in 128 KiB. With 50,000 of
/// them in it, one of twenty others looks like one.
const KNOWN_BITS: usize = 1 << 20;

/// So long a conversation is kept before it is told of: whether it is reset, and what name was
/// asked for, shows in this time.
const SETTLES: Duration = Duration::from_secs(2);

/// So long the first bytes are waited for.
const READS: Duration = Duration::from_secs(5);

/// So often a conversation that goes on is told of.
const TOLD_EVERY: Duration = Duration::from_secs(4);

/// A conversation that was silent for so long is followed no more. Its next packet is seen again.
const FOLLOWED: Duration = Duration::from_secs(60);

/// So long the answer to a known client is waited for. A client that is not answered asks again
/// after 1, 3, 7 and 15 s (RFC 6298 section 2, and Linux's `tcp_syn_retries`).
const ANSWERED_WITHIN: Duration = Duration::from_secs(16);

/// Without connections, a client that was silent for so long begins a new conversation: time and
/// name servers are asked from the same port for days.
const SILENCE: Duration = Duration::from_secs(30);

/// From here on up, ports are those that a host gives its own connections (Linux's
/// `ip_local_port_range`). Where the new server may begin some, a conversation whose begin was not
/// seen, at such a port of a moved address, is taken for one of them.
const FIRST_OWN_PORT: u16 = 32_768;

/// Conversations of one part that the new server has begun and that are remembered as such, in each
/// of two generations: 131,072 in all parts, which take 1 MiB. Of more it is not known who began.
const MAX_CALLED: usize = 4_096;

/// First bytes that are kept. A TLS ClientHello with post-quantum keys has 1,800.
const MAX_FIRST_BYTES: usize = 4_096;

/// Packets of a conversation that are looked at for its first bytes.
const MAX_LOOKS: u8 = 16;

/// Pieces of the first bytes that came before those in front of them.
const MAX_PIECES: usize = 4;

/// The conversations of the last minute. Shared by the lanes.
pub(super) struct Visits {
    seed: Seed,
    /// The first bytes are wanted.
    names: bool,
    known: Box<[AtomicU64]>,
    shards: Box<[Mutex<Shard>]>,
    /// The new server has begun something.
    calls: AtomicBool,
    openings: AtomicU64,
    missed: AtomicU64,
    unnamed: AtomicU64,
}

#[derive(Default)]
struct Shard {
    followed: HashTable<Followed>,
    /// How many there are of others and of known clients.
    count: [usize; 2],
    reading: usize,
    /// What the new server has begun, the younger ones and the older ones.
    called: [HashSet<u64>; 2],
}

/// A conversation that is followed.
struct Followed {
    hash: u64,
    client: Addr,
    asked: (Addr, u8, u16),
    known: bool,
    /// When it was first noted.
    noted: Instant,
    last: Instant,
    told: Option<Instant>,
    answered: bool,
    went_on: bool,
    ended: bool,
    /// Its begin was seen.
    began: bool,
    /// A byte has followed the handshake.
    payload: bool,
    /// The server knows nothing of it.
    doubted: bool,
    /// What was not told yet.
    untold: Untold,
    /// The next sequence number of either side, until its FIN.
    next: [Option<u32>; 2],
    reading: Option<Box<Reading>>,
}

#[derive(Default)]
struct Untold {
    began: Option<Instant>,
    answered: bool,
    went_on: bool,
    bytes: [u64; 2],
    news: bool,
    first_bytes: Vec<u8>,
}

/// The first bytes of a connection, as far as they are here.
struct Reading {
    /// Sequence number of the first.
    first: u32,
    bytes: Vec<u8>,
    /// What came too early, and at which place.
    pieces: Vec<(u32, Vec<u8>)>,
    looks: u8,
}

/// How far a conversation has come.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Waits,
    Answered,
    WentOn,
    Reset,
}

impl Visits {
    /// Nobody has come yet. `names`: the first bytes are wanted.
    pub(super) fn new(seed: Seed, names: bool) -> Self {
        Self {
            seed,
            names,
            known: (0..KNOWN_BITS / 64).map(|_| AtomicU64::new(0)).collect(),
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            calls: AtomicBool::new(false),
            openings: AtomicU64::new(0),
            missed: AtomicU64::new(0),
            unnamed: AtomicU64::new(0),
        }
    }

    /// From now on the first bytes are wanted, or no longer are.
    pub(super) fn set_names(&mut self, names: bool) {
        self.names = names;
    }

    /// This client has come before: whatever it opens is noted.
    pub(super) fn know(&self, client: Addr) {
        let (word, bit) = self.place(client);
        self.known[word].fetch_or(bit, Relaxed);
    }

    /// The new server has begun a conversation.
    pub(super) fn called(&self, flow: &Flow) {
        lock(self.shard(flow.key())).note_called(flow.key());
        self.calls.store(true, Relaxed);
    }

    /// A client's packet has opened a conversation.
    #[cold]
    pub(super) fn opened(&self, now: Instant, parsed: &Parsed, bytes: &[u8], flow: &Flow) {
        self.openings.fetch_add(1, Relaxed);
        if self.calls.load(Relaxed) {
            // A client has the same ports now.
            lock(self.shard(flow.key())).forget_called(flow.key());
        }
        let client = parsed.src(bytes);
        if !self.is_known(client) {
            return;
        }
        let mut shard = lock(self.shard(flow.key()));
        if shard.find(flow.key()).is_none() {
            let asked = (
                parsed.dst(bytes),
                parsed.protocol(),
                port(parsed.dst_port(), parsed),
            );
            let mut followed = Followed::new(now, flow.key(), client, asked, true);
            followed.begin(now);
            self.follow(&mut shard, followed);
        }
    }

    /// A packet from one side has changed what is known of its flow. `outgoing`: the new server may
    /// begin conversations as well. Returns whether the next packet of this flow is wanted, too.
    #[cold]
    #[expect(
        clippy::too_many_arguments,
        reason = "a packet, its flow, and what changed"
    )]
    pub(super) fn spoke(
        &self,
        now: Instant,
        side: Side,
        parsed: &Parsed,
        bytes: &[u8],
        flow: &Flow,
        change: Change,
        outgoing: bool,
    ) -> bool {
        let stage = match Stage::of(parsed.protocol(), change.after) {
            Stage::Waits => return false,
            // The table does not believe a client's reset, which anybody can forge. Behind the
            // first answer it is a scan's.
            _ if side == Side::Client && parsed.tcp_flags() & RST != 0 => Stage::Reset,
            stage @ (Stage::Answered | Stage::WentOn | Stage::Reset) => stage,
        };
        let mut shard = lock(self.shard(flow.key()));
        if shard.find(flow.key()).is_none() {
            if stage == Stage::Reset {
                return false;
            }
            let (client, moved, at) = match side {
                Side::Client => (parsed.src(bytes), parsed.dst(bytes), parsed.dst_port()),
                Side::Application => (parsed.dst(bytes), parsed.src(bytes), parsed.src_port()),
            };
            let asked = (moved, parsed.protocol(), port(at, parsed));
            let begins = change.begins(parsed.protocol(), side);
            // Of TCP the begin tells who has begun.
            let shows = begins && parsed.protocol() == TCP;
            let called = outgoing && !shows && shard.was_called(flow.key());
            let begins = begins && !called;
            let own = outgoing && asked.2 >= FIRST_OWN_PORT;
            // A SYN-ACK that is repeated goes to a scan.
            if !begins && (called || own || parsed.tcp_flags() & SYN != 0) {
                return false;
            }
            let known = self.is_known(client);
            let mut followed = Followed::new(now, flow.key(), client, asked, known);
            if begins {
                followed.begin(now);
            } else {
                // That was told before, or by an earlier daemon.
                (followed.answered, followed.went_on) = (true, true);
            }
            if !self.follow(&mut shard, followed) {
                return false;
            }
        }
        let may_read = self.names && shard.reading < MAX_READING;
        let Some(followed) = shard.find(flow.key()) else {
            return false;
        };
        let begins = !followed.went_on && followed.untold.began.is_some();
        followed.spoke(now, side, parsed, bytes, stage, change.after);
        let read_before = followed.reading.is_some();
        let starts = stage == Stage::WentOn && begins && side == Side::Client;
        if starts && parsed.protocol() == TCP {
            if may_read {
                let first = parsed.tcp_numbers(bytes)[0];
                followed.reading = Some(Box::new(Reading::new(first)));
            } else if self.names {
                self.unnamed.fetch_add(1, Relaxed);
            }
        }
        let wanted = followed.read(side, parsed, bytes);
        match (read_before, wanted) {
            (false, true) => shard.reading += 1,
            (true, false) => shard.reading = shard.reading.saturating_sub(1),
            (false, false) | (true, true) => {}
        }
        wanted
    }

    /// What there is to tell since the last time: with `all`, everything that is known. Call it
    /// every second.
    pub(super) fn take(&self, now: Instant, all: bool) -> Visited<Instant> {
        let mut visited = Visited {
            visits: Vec::new(),
            openings: self.openings.swap(0, Relaxed),
            missed: self.missed.swap(0, Relaxed),
            unnamed: self.unnamed.swap(0, Relaxed),
        };
        for shard in &self.shards {
            let mut shard = lock(shard);
            let (mut count, mut reading) = ([0; 2], 0);
            shard.followed.retain(|followed| {
                let stays = followed.tell(now, all, &mut visited.visits);
                if stays {
                    count[usize::from(followed.known)] += 1;
                    reading += usize::from(followed.reading.is_some());
                }
                stays
            });
            (shard.count, shard.reading) = (count, reading);
        }
        visited
    }

    /// Conversations that will be told of once they have settled.
    pub(super) fn settling(&self) -> u64 {
        let of = |shard: &Mutex<Shard>| {
            let shard = lock(shard);
            let untold = shard.followed.iter();
            let is_news = |it: &&Followed| it.untold.news || it.untold.began.is_some();
            untold.filter(is_news).filter(|it| !it.doubted).count() as u64
        };
        self.shards.iter().map(of).sum()
    }

    /// Follows a conversation, if there is a place for it.
    fn follow(&self, shard: &mut Shard, followed: Followed) -> bool {
        let count = &mut shard.count[usize::from(followed.known)];
        if *count >= MAX_FOLLOWED {
            self.missed.fetch_add(1, Relaxed);
            return false;
        }
        *count += 1;
        let hash = followed.hash;
        shard.followed.insert_unique(hash, followed, |it| it.hash);
        true
    }

    fn is_known(&self, client: Addr) -> bool {
        let (word, bit) = self.place(client);
        self.known[word].load(Relaxed) & bit != 0
    }

    /// The word and the bit of a client in the map of those that are known.
    fn place(&self, client: Addr) -> (usize, u64) {
        let at = self.seed.source(client) as usize % KNOWN_BITS;
        (at / 64, 1 << (at % 64))
    }

    fn shard(&self, hash: u64) -> &Mutex<Shard> {
        // The table takes its buckets from the low bits and its tags from the highest ones.
        &self.shards[(hash >> 40) as usize % SHARDS]
    }
}

impl Shard {
    fn find(&mut self, hash: u64) -> Option<&mut Followed> {
        self.followed.find_mut(hash, |it| it.hash == hash)
    }

    /// Remembers what the new server has begun. The older ones are forgotten when there are too
    /// many younger ones.
    fn note_called(&mut self, hash: u64) {
        let [younger, older] = &mut self.called;
        if younger.len() >= MAX_CALLED {
            *older = std::mem::take(younger);
        }
        younger.insert(hash);
    }

    /// Whether the new server has begun it.
    fn was_called(&mut self, hash: u64) -> bool {
        if self.called[1].remove(&hash) {
            self.note_called(hash);
        }
        self.called[0].contains(&hash)
    }

    fn forget_called(&mut self, hash: u64) {
        self.called.iter_mut().for_each(|called| {
            called.remove(&hash);
        });
    }
}

impl Stage {
    fn of(protocol: u8, seen: Seen) -> Self {
        match Class::of(protocol, seen) {
            Class::TcpOpening | Class::UdpOneWay => Self::Waits,
            Class::IcmpOneWay | Class::OtherOneWay if !seen.is_answered() => Self::Waits,
            Class::UdpAnswered | Class::IcmpOneWay | Class::OtherOneWay => Self::Answered,
            Class::TcpReset => Self::Reset,
            Class::TcpEstablished
            | Class::TcpHalfClosed
            | Class::TcpClosing
            | Class::Udp
            | Class::Icmp
            | Class::Other => Self::WentOn,
        }
    }
}

impl Followed {
    fn new(now: Instant, hash: u64, client: Addr, asked: (Addr, u8, u16), known: bool) -> Self {
        Self {
            hash,
            client,
            asked,
            known,
            noted: now,
            last: now,
            told: None,
            answered: false,
            went_on: false,
            ended: false,
            began: false,
            payload: false,
            doubted: false,
            untold: Untold::default(),
            next: [None; 2],
            reading: None,
        }
    }

    /// It begins now.
    fn begin(&mut self, now: Instant) {
        self.began = true;
        self.untold.began = Some(now);
    }

    /// Notes a packet.
    fn spoke(
        &mut self,
        now: Instant,
        side: Side,
        parsed: &Parsed,
        bytes: &[u8],
        stage: Stage,
        seen: Seen,
    ) {
        let silent = now.saturating_duration_since(self.last);
        let tcp = parsed.protocol() == TCP;
        self.last = self.last.max(now);
        self.untold.news = true;
        if stage == Stage::Reset && side == Side::Client {
            return;
        }
        if stage == Stage::Reset {
            let flags = parsed.tcp_flags();
            let unknown = flags & (RST | ACK) == RST;
            // Of one that was told of, or whose end was seen, it is the end.
            self.doubted = unknown && self.told.is_none() && self.next[1].is_some();
            self.ended = true;
            return;
        }
        if !tcp && side == Side::Client && self.answered && silent >= SILENCE {
            (self.answered, self.went_on) = (false, false);
            self.begin(now);
        }
        (self.ended, self.doubted) = (tcp && seen.is_closed(), false);
        if !self.answered {
            (self.answered, self.untold.answered) = (true, true);
            // Whether it settles is seen from here on.
            self.noted = now;
        }
        if stage == Stage::WentOn && !self.went_on {
            (self.went_on, self.untold.went_on) = (true, true);
        }
        if tcp {
            self.count(side, parsed, bytes);
            self.payload |= self.untold.bytes != [0; 2];
        } else {
            self.untold.bytes[side as usize] += parsed.payload_len() as u64;
        }
    }

    /// Counts bytes of TCP by the numbers in a packet.
    fn count(&mut self, side: Side, parsed: &Parsed, bytes: &[u8]) {
        let [number, acknowledged] = parsed.tcp_numbers(bytes);
        let (own, other) = match side {
            Side::Client => (0, 1),
            Side::Application => (1, 0),
        };
        if parsed.tcp_flags() & ACK != 0 {
            self.advance(other, acknowledged, acknowledged);
        }
        self.advance(
            own,
            number,
            number.wrapping_add(parsed.payload_len() as u32),
        );
        if parsed.tcp_flags() & FIN != 0 {
            // The FIN has a number of its own, which is no byte.
            self.next[own] = None;
        }
    }

    /// One side has come to `end`. Before anything was known of it, it was at `start`.
    fn advance(&mut self, side: usize, start: u32, end: u32) {
        let before = match self.next[side] {
            Some(next) => next,
            None if self.told.is_none() && !self.ended && self.untold.bytes[side] == 0 => start,
            None => return,
        };
        let more = end.wrapping_sub(before);
        if more <= u32::MAX / 2 {
            self.untold.bytes[side] += u64::from(more);
            self.next[side] = Some(end);
        }
    }

    /// Collects the first bytes. Returns whether more of them are wanted.
    fn read(&mut self, side: Side, parsed: &Parsed, bytes: &[u8]) -> bool {
        let Some(reading) = &mut self.reading else {
            return false;
        };
        if side == Side::Client {
            let number = parsed.tcp_numbers(bytes)[0];
            // Of a super-packet there may be the head alone.
            let end = parsed.total().min(bytes.len());
            reading.add(number, bytes.get(parsed.payload()..end).unwrap_or_default());
        }
        reading.looks += 1;
        if !self.ended && reading.wants_more() {
            return true;
        }
        self.untold.first_bytes = std::mem::take(&mut reading.bytes);
        self.reading = None;
        false
    }

    /// Tells what is due. Returns whether it is still followed.
    fn tell(&mut self, now: Instant, all: bool, visits: &mut Vec<Visit<Instant>>) -> bool {
        if self.doubted {
            return false;
        }
        let since = |then: Instant| now.saturating_duration_since(then);
        if !self.answered {
            let given_up = all || since(self.noted) >= ANSWERED_WITHIN || self.ended;
            if given_up && self.untold.began.is_some() {
                visits.push(self.visit());
            }
            return !given_up;
        }
        if let Some(reading) = &mut self.reading
            && (all || self.ended || since(self.noted) >= READS)
        {
            self.untold.first_bytes = std::mem::take(&mut reading.bytes);
            self.reading = None;
        }
        let settled = since(self.noted) >= SETTLES && self.reading.is_none();
        let due = match self.told {
            None => settled,
            Some(told) => since(told) >= TOLD_EVERY,
        };
        if self.untold.news && (due || self.ended || all) {
            visits.push(self.visit());
            self.told = Some(now);
        }
        self.untold.news || !self.ended && since(self.last) < FOLLOWED
    }

    /// What was not told yet.
    fn visit(&mut self) -> Visit<Instant> {
        let untold = std::mem::take(&mut self.untold);
        let (addr, protocol, port) = self.asked;
        let says_more = if protocol == TCP {
            self.payload
        } else {
            self.went_on
        };
        Visit {
            client: client(self.client.into()),
            asked: Asked {
                addr: addr.into(),
                protocol,
                port,
            },
            served_by: ServedBy::New,
            began: untold.began,
            last: self.last,
            answered: untold.answered,
            went_on: untold.went_on,
            bare: self.began && !says_more,
            bytes_in: untold.bytes[Side::Client as usize],
            bytes_out: untold.bytes[Side::Application as usize],
            first_bytes: untold.first_bytes,
        }
    }
}

impl Reading {
    fn new(first: u32) -> Self {
        Self {
            first,
            bytes: Vec::new(),
            pieces: Vec::new(),
            looks: 0,
        }
    }

    /// Takes a piece, in whichever order they come.
    fn add(&mut self, number: u32, piece: &[u8]) {
        let at = number.wrapping_sub(self.first);
        if piece.is_empty() || at as usize >= MAX_FIRST_BYTES {
            return;
        }
        let room = MAX_FIRST_BYTES - at as usize;
        let piece = &piece[..piece.len().min(room)];
        if self.pieces.len() < MAX_PIECES || at as usize <= self.bytes.len() {
            self.pieces.push((at, piece.to_vec()));
        }
        self.pieces.sort_unstable_by_key(|(at, _)| *at);
        let bytes = &mut self.bytes;
        self.pieces.retain(|(at, piece)| {
            let Some(known) = bytes.len().checked_sub(*at as usize) else {
                return true;
            };
            bytes.extend_from_slice(piece.get(known..).unwrap_or_default());
            false
        });
    }

    /// Whether a name may be in what follows.
    fn wants_more(&self) -> bool {
        if self.looks >= MAX_LOOKS || self.bytes.len() >= MAX_FIRST_BYTES {
            return false;
        }
        match self.bytes[..] {
            [] => true,
            // A record of TLS, a handshake message: RFC 8446 section 5.1.
            [22] => true,
            [22, 3, ..] => match self.bytes.get(3..5) {
                Some(&[high, low]) => {
                    self.bytes.len() < 5 + usize::from(u16::from_be_bytes([high, low]))
                }
                _ => true,
            },
            // A method of HTTP: RFC 9110 section 9.
            [b'A'..=b'Z', ..] => match self.bytes.iter().position(|&byte| byte == b'\n') {
                Some(line) => {
                    let is_http = (self.bytes[..line].windows(6)).any(|it| it == b"HTTP/1");
                    is_http && !self.bytes.windows(4).any(|it| it == b"\r\n\r\n")
                }
                None => true,
            },
            _ => false,
        }
    }
}

/// The port that was asked for; ICMP has none.
fn port(port: u16, parsed: &Parsed) -> u16 {
    if parsed.kind().has_ports() { port } else { 0 }
}

impl std::fmt::Debug for Visits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Visits(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::gate::{Gate, GateConfig};
    use crate::packet::Kind;
    use crate::packet::testing::{Plan, reply};
    use crate::testing::epoch;
    use proptest::prelude::*;

    const MOVED: &str = "192.0.2.5";
    const HELLO: &[u8] = b"GET / HTTP/1.1\r\nHost: www.example.net\r\n\r\n";

    /// A gate that notes who comes, and the time.
    struct Bed {
        gate: Gate,
        now: Instant,
    }

    impl Bed {
        fn new() -> Self {
            let config = GateConfig {
                max_flows: 100_000,
                seed: Seed::new([1, 2]),
                started: epoch(),
                resumes: false,
            };
            let now = config.started;
            let gate = Gate::new(&[MOVED.parse().unwrap()], config).noting_visits(true);
            Self { gate, now }
        }

        fn wait(&mut self, seconds: u64) {
            self.now += Duration::from_secs(seconds);
        }

        fn captured(&self, plan: &Plan) {
            let bytes = plan.build();
            let parsed = Parsed::parse(&bytes).unwrap();
            let result = self.gate.check_captured(self.now, &parsed, &bytes);
            assert!(result.is_ok(), "{result:?}");
        }

        fn returning(&self, plan: &Plan) {
            let bytes = plan.build();
            let parsed = Parsed::parse(&bytes).unwrap();
            let result = self.gate.check_returning(self.now, &parsed, &bytes, &[]);
            assert_eq!(result, Ok(()));
        }

        fn take(&self) -> Visited<Instant> {
            self.gate.visited(self.now, false)
        }

        /// SYN, SYN-ACK and ACK of a connection from there.
        fn connects(&self, from: &Plan) {
            self.captured(&Plan {
                flags: SYN,
                seq: 999,
                payload: Vec::new(),
                ..from.clone()
            });
            self.returning(&answer(from, SYN | ACK, b""));
            self.captured(&Plan {
                seq: 1_000,
                payload: Vec::new(),
                ..from.clone()
            });
        }

        /// The client sends this, from this number on.
        fn sends(&self, from: &Plan, seq: u32, payload: &[u8]) {
            self.captured(&Plan {
                seq,
                payload: payload.to_vec(),
                ..from.clone()
            });
        }
    }

    fn from(client: &str) -> Plan {
        Plan::new(Kind::Tcp, client, MOVED)
    }

    /// What the server sends to a client: from number 76 on, since a client acknowledges 77.
    fn answer(to: &Plan, flags: u8, payload: &[u8]) -> Plan {
        let seq = if flags & SYN != 0 { 76 } else { 77 };
        Plan {
            flags,
            seq,
            payload: payload.to_vec(),
            ..reply(to)
        }
    }

    #[test]
    fn a_connection_is_told_of_with_its_name_and_its_bytes() {
        let mut bed = Bed::new();
        let client = from("203.0.113.9");
        bed.connects(&client);
        bed.sends(&client, 1_000, HELLO);
        bed.wait(1);
        let visited = bed.take();
        assert_eq!(
            (visited.openings, visited.visits.len()),
            (1, 0),
            "it may still be reset"
        );
        assert_eq!(bed.gate.settling(), 1);
        bed.wait(4);
        bed.returning(&answer(&client, ACK, &[0; 1_000]));
        let visited = bed.take();
        assert_eq!(visited.visits.len(), 1);
        let visit = &visited.visits[0];
        assert_eq!(
            (visit.client.to_string(), visit.asked.port),
            ("203.0.113.9".into(), 80)
        );
        assert_eq!((visit.answered, visit.went_on), (true, true));
        assert_eq!(visit.began, Some(bed.now - Duration::from_secs(5)));
        assert_eq!(visit.first_bytes, HELLO);
        assert_eq!(
            (visit.bytes_in, visit.bytes_out),
            (HELLO.len() as u64, 1_000)
        );
        bed.wait(1);
        bed.captured(&Plan {
            flags: FIN | ACK,
            seq: 1_000 + HELLO.len() as u32,
            payload: vec![],
            ..client.clone()
        });
        let mut last = answer(&client, FIN | ACK, &[0; 500]);
        last.seq = 1_077;
        bed.returning(&last);
        let visits = bed.take().visits;
        assert_eq!(visits.len(), 1);
        assert_eq!(
            (visits[0].began, visits[0].answered),
            (None, false),
            "it was counted"
        );
        assert_eq!((visits[0].bytes_in, visits[0].bytes_out), (0, 500));
        bed.wait(100);
        assert!(bed.take().visits.is_empty());
        assert_eq!(bed.gate.settling(), 0);
    }

    #[test]
    fn first_bytes_may_come_in_pieces_and_out_of_order() {
        for order in [[0, 1, 2], [2, 1, 0], [1, 0, 2]] {
            let mut bed = Bed::new();
            let client = from("203.0.113.9");
            bed.connects(&client);
            // A record of 30 bytes.
            let mut hello = vec![22, 3, 1, 0, 25];
            hello.extend(5..30);
            for piece in order {
                let at = piece * 10;
                bed.sends(&client, 1_000 + at as u32, &hello[at..at + 10]);
                bed.returning(&answer(&client, ACK, b""));
            }
            bed.sends(&client, 1_030, b"what follows");
            bed.wait(3);
            let visits = bed.take().visits;
            assert_eq!(visits[0].first_bytes, hello, "{order:?}");
        }
    }

    #[test]
    fn scans_and_forged_acknowledgements_are_no_visits() {
        let mut bed = Bed::new();
        // Nobody answers, the port is closed, the client resets, the answer goes to a stranger.
        for (client, answers, goes_on) in [
            ("203.0.113.1", None, None),
            ("203.0.113.2", Some(RST | ACK), None),
            ("203.0.113.3", Some(SYN | ACK), Some(RST)),
            ("203.0.113.4", Some(SYN | ACK), Some(ACK)),
        ] {
            let client = Plan {
                payload: vec![],
                ..from(client)
            };
            bed.captured(&Plan {
                flags: SYN,
                seq: 999,
                ..client.clone()
            });
            if let Some(flags) = answers {
                bed.returning(&answer(&client, flags, b""));
            }
            if let Some(flags) = goes_on {
                bed.captured(&Plan {
                    flags,
                    ..client.clone()
                });
            }
            match goes_on {
                Some(ACK) => bed.returning(&answer(&client, RST, b"")),
                Some(_) => {
                    bed.wait(5);
                    bed.returning(&answer(&client, SYN | ACK, b""));
                }
                None => {}
            }
        }
        for _ in 0..100 {
            bed.wait(1);
            assert!(bed.take().visits.is_empty());
        }
    }

    #[test]
    fn a_million_forged_sources_take_no_place_of_clients() {
        let mut bed = Bed::new();
        let known: Vec<Plan> = (1..=100).map(|n| from(&format!("203.0.113.{n}"))).collect();
        for plan in &known {
            bed.gate.know(&[plan.src]);
        }
        let mut packet = Plan {
            flags: SYN,
            payload: vec![],
            ..from("10.0.0.1")
        }
        .build();
        let mut acknowledges = Plan {
            payload: vec![],
            ..from("10.0.0.1")
        }
        .build();
        let mut back = answer(&from("10.0.0.1"), SYN | ACK, b"").build();
        for n in 0..1_000_000_u32 {
            let source = (0x2000_0000 + n).to_be_bytes();
            packet[12..16].copy_from_slice(&source);
            acknowledges[12..16].copy_from_slice(&source);
            back[16..20].copy_from_slice(&source);
            let parsed = Parsed::parse(&packet).unwrap();
            let _ = bed.gate.check_captured(bed.now, &parsed, &packet);
            // Of some the sender guesses that they are answered, and the server has not said no.
            if n % 8 == 0 {
                let parsed = Parsed::parse(&back).unwrap();
                let _ = bed.gate.check_returning(bed.now, &parsed, &back, &[]);
                let parsed = Parsed::parse(&acknowledges).unwrap();
                let _ = bed.gate.check_captured(bed.now, &parsed, &acknowledges);
            }
        }
        for client in &known {
            bed.connects(client);
        }
        bed.wait(5);
        let visited = bed.take();
        assert!(visited.visits.len() <= 2 * MAX_FOLLOWED * SHARDS);
        assert_eq!(visited.openings, 1_000_100);
        assert!(visited.missed > 0);
        for client in &known {
            let came = visited
                .visits
                .iter()
                .any(|it| it.client.first() == client.src);
            assert!(came, "{}", client.src);
        }
    }

    #[test]
    fn without_a_connection_an_answer_counts_and_silence_ends_a_conversation() {
        let mut bed = Bed::new();
        let query = Plan::new(Kind::Udp, "203.0.113.9", MOVED);
        let again = |bed: &Bed| {
            bed.captured(&query);
            bed.returning(&reply(&query));
        };
        again(&bed);
        bed.wait(3);
        let visits = bed.take().visits;
        assert_eq!((visits[0].answered, visits[0].went_on), (true, false));
        assert!(visits[0].bare);
        assert_eq!(
            (visits[0].began.is_some(), visits[0].asked.port),
            (true, 80)
        );
        for (pause, begins) in [(8, false), (40, true), (70, true), (400, true)] {
            bed.wait(pause);
            bed.take();
            again(&bed);
            bed.wait(4);
            let visits = bed.take().visits;
            assert_eq!(visits.len(), 1, "after {pause} s");
            assert_eq!(visits[0].began.is_some(), begins, "after {pause} s");
        }
    }

    #[test]
    fn what_a_known_client_asks_in_vain_is_told() {
        let mut bed = Bed::new();
        bed.gate.know(&["2001:db8::9".parse().unwrap()]);
        let gate = Gate::new(
            &["2001:db8:5::5".parse().unwrap()],
            GateConfig {
                max_flows: 10,
                seed: Seed::new([1, 2]),
                started: bed.now,
                resumes: false,
            },
        );
        bed.gate = gate.noting_visits(false);
        bed.gate.know(&["2001:db8::9".parse().unwrap()]);
        // From the same /64, which is one client.
        let mut client = Plan::new(Kind::Tcp, "2001:db8::77", "2001:db8:5::5");
        client.flags = SYN;
        bed.captured(&client);
        bed.wait(10);
        assert!(bed.take().visits.is_empty());
        bed.wait(6);
        let visits = bed.take().visits;
        assert_eq!(
            (visits[0].began.is_some(), visits[0].answered),
            (true, false)
        );
        assert_eq!(visits[0].client.to_string(), "2001:db8::/64");
    }

    #[test]
    fn a_connection_that_lasts_is_seen_for_as_long() {
        let mut bed = Bed::new();
        let client = from("203.0.113.9");
        bed.connects(&client);
        let mut last = bed.now;
        for hour in 0..3 {
            bed.wait(3_600);
            bed.take();
            bed.sends(&client, 1_000 + hour * 10, &[1; 10]);
            bed.wait(5);
            let visits = bed.take().visits;
            assert_eq!(visits.len(), 1);
            assert!(visits[0].last > last);
            assert_eq!((visits[0].began, visits[0].went_on), (None, false));
            assert_eq!(visits[0].bytes_in, 10);
            last = visits[0].last;
        }
    }

    #[test]
    fn whoever_the_new_server_calls_is_no_client() {
        let mut bed = Bed::new();
        let gate = std::mem::replace(&mut bed.gate, Bed::new().gate);
        bed.gate = gate.allow_outgoing(&["any".parse().unwrap()]);
        let mut call = Plan::new(Kind::Tcp, MOVED, "203.0.113.9");
        (call.src_port, call.dst_port) = (40_000, 25);
        bed.returning(&Plan {
            flags: SYN,
            ..call.clone()
        });
        bed.captured(&Plan {
            flags: SYN | ACK,
            ..reply(&call)
        });
        for _ in 0..20 {
            bed.wait(5);
            bed.returning(&call);
            bed.captured(&reply(&call));
            assert!(bed.take().visits.is_empty());
        }
    }

    #[test]
    fn that_holds_for_low_ports_and_without_connections_too() {
        for (kind, port) in [(Kind::Tcp, 20), (Kind::Udp, 123)] {
            let mut bed = Bed::new();
            let gate = std::mem::replace(&mut bed.gate, Bed::new().gate);
            bed.gate = gate.allow_outgoing(&["any".parse().unwrap()]);
            let mut call = Plan::new(kind, MOVED, "203.0.113.9");
            (call.src_port, call.dst_port) = (port, 123);
            let first = Plan {
                flags: SYN,
                ..call.clone()
            };
            bed.returning(&first);
            bed.captured(&Plan {
                flags: SYN | ACK,
                ..reply(&call)
            });
            for pause in [1, 5, 70, 200] {
                bed.wait(pause);
                bed.returning(&call);
                bed.captured(&reply(&call));
                bed.wait(5);
                assert_eq!(bed.take().visits, [], "{kind:?} after {pause} s");
            }
        }
    }

    #[test]
    fn what_goes_on_since_before_the_start_is_a_client_whoever_speaks_first() {
        for kind in [Kind::Tcp, Kind::Udp] {
            for outgoing in [false, true] {
                let config = GateConfig {
                    max_flows: 1_000,
                    seed: Seed::new([1, 2]),
                    started: epoch(),
                    resumes: true,
                };
                let mut bed = Bed::new();
                let gate = Gate::new(&[MOVED.parse().unwrap()], config).noting_visits(true);
                bed.gate = match outgoing {
                    true => gate.allow_outgoing(&["any".parse().unwrap()]),
                    false => gate,
                };
                let client = Plan::new(kind, "203.0.113.9", MOVED);
                let mut seen = 0;
                for _ in 0..3 {
                    bed.returning(&answer(&client, ACK, b"x"));
                    bed.captured(&client);
                    bed.wait(5);
                    seen += bed.take().visits.len();
                }
                assert!(seen > 0, "{kind:?} {outgoing}");
            }
        }
    }

    #[test]
    fn a_connection_that_carries_nothing_says_so_until_it_does() {
        let mut bed = Bed::new();
        let client = from("203.0.113.9");
        bed.connects(&client);
        // So long its first bytes are waited for.
        bed.wait(6);
        let visits = bed.take().visits;
        assert_eq!((visits[0].went_on, visits[0].bare), (true, true));
        bed.wait(5);
        bed.sends(&client, 1_000, b"EHLO\r\n");
        bed.wait(5);
        let visits = bed.take().visits;
        assert_eq!((visits[0].began, visits[0].bare), (None, false));
    }

    #[test]
    fn at_the_end_everything_is_told() {
        let bed = Bed::new();
        let client = from("203.0.113.9");
        bed.connects(&client);
        let visits = bed.gate.visited(bed.now, true).visits;
        assert_eq!(visits.len(), 1);
        assert!(bed.gate.visited(bed.now, true).visits.is_empty());
    }

    proptest! {
        #[test]
        fn pieces_in_any_order_make_the_whole(
            cuts in proptest::collection::vec(1_usize..60, 1..=MAX_PIECES), seed in any::<u64>(),
        ) {
            let whole: Vec<u8> = (0..=u8::MAX).cycle().take(cuts.iter().sum()).collect();
            let mut pieces = Vec::new();
            let mut at = 0;
            for len in cuts {
                pieces.push((at, &whole[at..at + len]));
                at += len;
            }
            pieces.sort_by_key(|(at, _)| (*at as u64 + 1).wrapping_mul(seed | 1));
            let mut reading = Reading::new(u32::MAX - 20);
            for (at, piece) in pieces {
                reading.add((u32::MAX - 20).wrapping_add(at as u32), piece);
            }
            prop_assert_eq!(&reading.bytes, &whole);
        }

        #[test]
        fn any_segments_are_bounded(
            segments in proptest::collection::vec((any::<u32>(), 0_usize..9_000), 0..40),
        ) {
            let mut reading = Reading::new(0);
            for (number, len) in segments {
                reading.add(number % 10_000, &vec![1; len]);
                prop_assert!(reading.bytes.len() <= MAX_FIRST_BYTES);
                prop_assert!(reading.pieces.len() <= MAX_PIECES);
            }
        }
    }
}
