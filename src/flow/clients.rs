//! Which clients came: the old server lets out only what answers one of them.
//!
//! Owns a table of flows that holds one word for each; who they are lies in [`records`], for those
//! who read it. Entries live as long as those of the new server's table
//! ([`class`](super::class)), whose states they have, so that neither server forgets a flow that
//! the other one still knows.
//!
//! ```text
//! line of 8 words, a cache line:   ┌───────────────────┬───────────┬────────┬───────┐
//! the hash of the flow chooses it, │ 40 bits of the    │ last used │ family │ seen  │
//! and is the word's tag as well    │ hash              │ 16 bits   │ 2 bits │ 6 bits│
//!                                  └───────────────────┴───────────┴────────┴───────┘
//! ```
//!
//! * Lanes share it without a lock: a word is replaced whole, or not at all.
//! * It is bounded. Where a line is full, the flow goes that is dispensable first, and of several
//!   the one that was unused for the longest time. So a flood of new flows displaces its own and no
//!   answered one, unless the line holds eight of those. A client that was displaced is known again
//!   with its next packet.
//! * A flow that is not there is taken for one that is with a probability of 2⁻³⁷ (8 words, 40
//!   bits). The hash is keyed, so nobody can look for such a flow but by sending.
//! * Last used is counted in units of four seconds, so an entry in use is written once in that time
//!   at most.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::flow::class::{
    Class, EVICTION_ORDER, ICMP_QUERY, OTHER, Seen, Side, TCP_ESTABLISHED, UDP_BOTH_WAYS,
};
use crate::flow::listing::{self, Place, Row};
use crate::flow::records::{self, Ends, Record, Records};
use crate::flow::seed::Seed;
use crate::flow::table::FlowStats;
use crate::flow::watch::Noted;
use crate::flow::weight::Weight;
use crate::model::bytes::take;
use crate::model::moved::{TCP, UDP};
use crate::model::peer::PeerId;
use crate::packet::{Addr, ICMP, ICMPV6, Kind, Parsed, Quoted, RST};

/// Words of a line: as many as a cache line holds.
const WAYS: usize = 8;

/// Lines of a page, which takes 6 KiB once the first flow falls into it.
const PAGE: usize = 64;

/// Words for each flow that there may be. The hash spreads flows unevenly: with two, 0.8 % of them
/// find no place in their line when there are as many as there may be (Poisson); with one, 14 %.
const SPARE: usize = 2;

/// Most lines: the part of the hash that chooses one must not reach into the tag.
const MAX_LINES: usize = 1 << TAG_SHIFT;

/// Seconds in a unit of time.
const UNIT: u32 = 4;

/// The tag of a word: these bits are those of the hash.
const TAG: u64 = !0 << TAG_SHIFT;
const TAG_SHIFT: u32 = 24;
const TIME_SHIFT: u32 = 8;
const FAMILY_SHIFT: u32 = 6;
const SEEN: u64 = (1 << FAMILY_SHIFT) - 1;

/// Beside the ports: a flow that the new server has begun.
const BEGUN: u64 = 1 << 32;

/// A protocol of each family of protocols that are treated alike; the last stands for all others.
const FAMILIES: [u8; 4] = [TCP, UDP, ICMP, 255];

/// The flows of clients that came. Shared by the lanes.
pub(super) struct Clients {
    seed: Seed,
    epoch: Instant,
    max: usize,
    lines: usize,
    /// What the class of a flow says, for each state that a word can have in its lowest byte.
    rules: Box<[Rule]>,
    pages: Box<[OnceLock<Box<Page>>]>,
    /// Who they are, for those who read them.
    records: Records,
    /// The line that is looked at next for entries whose time is up.
    cursor: AtomicUsize,
    live: AtomicU64,
    evicted: AtomicU64,
}

/// How long a flow is kept, and when it gives way.
#[derive(Clone, Copy)]
struct Rule {
    /// Seconds.
    timeout: u32,
    /// The lowest goes first.
    tier: u32,
}

#[derive(Default)]
#[repr(align(64))]
struct Line([AtomicU64; WAYS]);

/// Lines, and the numbers of the records of their words.
struct Page {
    lines: [Line; PAGE],
    records: [Numbers; PAGE],
}

/// The number of the record of each word of a line.
type Numbers = [AtomicU32; WAYS];

/// A packet's flow: who the client is, and with what of a moved address it talks.
///
/// Of UDP the port at the moved address is not a part, since a server may answer from another one
/// (TFTP, RFC 1350 section 4).
#[derive(Clone, Copy, Debug)]
pub(super) struct Flow {
    hash: u64,
    protocol: u8,
    tcp_flags: u8,
    packets: u16,
    bytes: u32,
}

/// What a packet is to what is known of its flow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Known {
    /// Nothing is.
    No,
    /// It tells nothing new.
    Same,
    /// It does, or it is the first one for some seconds.
    Changed(Change),
}

/// What is known of a flow, without a packet and with it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Change {
    /// Nothing, if its time was up.
    pub(super) before: Seen,
    pub(super) after: Seen,
}

impl Change {
    /// Whether a conversation begins, now that it was answered and nobody follows it. Without
    /// connections a client that speaks again after a silence begins another.
    pub(super) fn begins(self, protocol: u8, side: Side) -> bool {
        let asked = self.before.is_asked();
        match (protocol, side) {
            (TCP, _) => asked && !self.before.went_on(),
            (_, Side::Client) => asked,
            (_, Side::Application) => asked && !self.before.is_answered(),
        }
    }
}

impl Known {
    /// Whether the flow is known.
    #[inline]
    pub(super) fn is_known(self) -> bool {
        self != Self::No
    }
}

impl Flow {
    /// Tells it from others.
    pub(super) fn key(&self) -> u64 {
        self.hash
    }

    /// A flow by its hash, and what the packet counts.
    #[inline]
    pub(super) fn new(hash: u64, protocol: u8, weight: Weight) -> Self {
        Self {
            hash,
            protocol,
            tcp_flags: weight.tcp_flags,
            packets: weight.packets,
            bytes: weight.bytes,
        }
    }

    #[inline]
    fn weight(&self) -> Weight {
        Weight {
            tcp_flags: self.tcp_flags,
            packets: self.packets,
            bytes: self.bytes,
        }
    }
}

impl Clients {
    /// No client has come yet. `epoch` is when the daemon started, and not later than any `now`
    /// that follows.
    pub(super) fn new(seed: Seed, max_flows: usize, epoch: Instant) -> Self {
        let lines = (max_flows.saturating_mul(SPARE) / WAYS).clamp(PAGE, MAX_LINES);
        let lines = lines.next_power_of_two();
        Self {
            seed,
            epoch,
            max: max_flows,
            lines,
            rules: (0..=u8::MAX).map(Rule::of).collect(),
            pages: (0..lines / PAGE).map(|_| OnceLock::new()).collect(),
            records: Records::new(max_flows.min(lines * WAYS)),
            cursor: AtomicUsize::new(0),
            live: AtomicU64::new(0),
            evicted: AtomicU64::new(0),
        }
    }

    /// The flow of a client's packet to a moved address; `None` if such a packet asks for nothing:
    /// an ICMP reply or error, a later fragment.
    #[inline]
    pub(super) fn asked(&self, parsed: &Parsed, bytes: &[u8]) -> Option<Flow> {
        let ports = match parsed.kind() {
            Kind::Tcp => [parsed.src_port(), parsed.dst_port()],
            Kind::Udp | Kind::IcmpQuery => [parsed.src_port(), 0],
            Kind::Other => [0, 0],
            Kind::IcmpReply | Kind::IcmpError | Kind::LaterFragment => return None,
        };
        let protocol = parsed.protocol();
        let hash = self.hash(parsed.src(bytes), ports, parsed.dst(bytes), protocol);
        // Anybody can forge a client's RST. Whether the server believes it, its answer tells.
        let weight = Weight::of(parsed).with_flags(parsed.tcp_flags() & !RST);
        Some(Flow::new(hash, protocol, weight))
    }

    /// The flow that a packet from a moved address answers; `None` if such a packet
    /// answers nothing: an ICMP query or error, a later fragment.
    #[inline]
    pub(super) fn answered(&self, parsed: &Parsed, bytes: &[u8]) -> Option<Flow> {
        let ports = match parsed.kind() {
            Kind::Tcp => [parsed.dst_port(), parsed.src_port()],
            Kind::Udp | Kind::IcmpReply => [parsed.dst_port(), 0],
            Kind::Other => [0, 0],
            Kind::IcmpQuery | Kind::IcmpError | Kind::LaterFragment => return None,
        };
        let protocol = parsed.protocol();
        let hash = self.hash(parsed.dst(bytes), ports, parsed.src(bytes), protocol);
        Some(Flow::new(hash, protocol, Weight::of(parsed)))
    }

    /// The flow of the client's packet that an ICMP error quotes.
    pub(super) fn quoted(&self, quoted: &Quoted, bytes: &[u8]) -> Option<Flow> {
        let ports = match quoted.kind() {
            Kind::Tcp => [quoted.src_port(), quoted.dst_port()],
            Kind::Udp | Kind::IcmpQuery => [quoted.src_port(), 0],
            Kind::Other => [0, 0],
            Kind::IcmpReply | Kind::IcmpError | Kind::LaterFragment => return None,
        };
        let protocol = quoted.protocol();
        let hash = self.hash(quoted.src(bytes), ports, quoted.dst(bytes), protocol);
        Some(Flow::new(hash, protocol, Weight::from(0)))
    }

    /// The flow of a packet that the new server sends of its own accord, from a port that has not
    /// moved. Both ports are a part of it, and no client's flow is the same.
    pub(super) fn begun(&self, parsed: &Parsed, bytes: &[u8]) -> Option<Flow> {
        let ports = match parsed.kind() {
            Kind::Tcp | Kind::Udp => [parsed.dst_port(), parsed.src_port()],
            Kind::IcmpQuery => [0, parsed.src_port()],
            Kind::Other => [0, 0],
            Kind::IcmpReply | Kind::IcmpError | Kind::LaterFragment => return None,
        };
        let ends = [parsed.dst(bytes), parsed.src(bytes)];
        Some(self.begun_with(ends, ports, parsed.protocol(), Weight::of(parsed)))
    }

    /// The flow of a packet that answers such a one.
    pub(super) fn begun_answer(&self, parsed: &Parsed, bytes: &[u8]) -> Option<Flow> {
        let ports = match parsed.kind() {
            Kind::Tcp | Kind::Udp => [parsed.src_port(), parsed.dst_port()],
            Kind::IcmpReply => [0, parsed.dst_port()],
            Kind::Other => [0, 0],
            Kind::IcmpQuery | Kind::IcmpError | Kind::LaterFragment => return None,
        };
        let ends = [parsed.src(bytes), parsed.dst(bytes)];
        // Anybody can forge the remote's RST as well.
        let weight = Weight::of(parsed).with_flags(parsed.tcp_flags() & !RST);
        Some(self.begun_with(ends, ports, parsed.protocol(), weight))
    }

    /// The flow of such a packet that an ICMP error quotes.
    pub(super) fn begun_quoted(&self, quoted: &Quoted, bytes: &[u8]) -> Option<Flow> {
        let ports = match quoted.kind() {
            Kind::Tcp | Kind::Udp => [quoted.dst_port(), quoted.src_port()],
            Kind::IcmpQuery => [0, quoted.src_port()],
            Kind::Other => [0, 0],
            Kind::IcmpReply | Kind::IcmpError | Kind::LaterFragment => return None,
        };
        let ends = [quoted.dst(bytes), quoted.src(bytes)];
        Some(self.begun_with(ends, ports, quoted.protocol(), Weight::from(0)))
    }

    /// The flow of such an answer that an ICMP error quotes.
    pub(super) fn begun_answer_quoted(&self, quoted: &Quoted, bytes: &[u8]) -> Option<Flow> {
        let ports = match quoted.kind() {
            Kind::Tcp | Kind::Udp => [quoted.src_port(), quoted.dst_port()],
            Kind::Other => [0, 0],
            Kind::IcmpQuery | Kind::IcmpReply | Kind::IcmpError | Kind::LaterFragment => {
                return None;
            }
        };
        let ends = [quoted.src(bytes), quoted.dst(bytes)];
        Some(self.begun_with(ends, ports, quoted.protocol(), Weight::from(0)))
    }

    fn begun_with(&self, ends: [Addr; 2], ports: [u16; 2], protocol: u8, weight: Weight) -> Flow {
        let [remote, moved] = ports.map(u64::from);
        let ports = remote | moved << 16 | BEGUN;
        Flow::new(self.seed.flow(ends, ports, protocol), protocol, weight)
    }

    /// The flow of the client that a packet from a moved address went to, which an ICMP error
    /// quotes; `None` if it answered nothing.
    pub(super) fn quoted_answer(&self, quoted: &Quoted, bytes: &[u8]) -> Option<Flow> {
        let ports = match quoted.kind() {
            Kind::Tcp => [quoted.dst_port(), quoted.src_port()],
            Kind::Udp | Kind::IcmpReply => [quoted.dst_port(), 0],
            Kind::Other => [0, 0],
            Kind::IcmpQuery | Kind::IcmpError | Kind::LaterFragment => return None,
        };
        let protocol = quoted.protocol();
        let hash = self.hash(quoted.dst(bytes), ports, quoted.src(bytes), protocol);
        Some(Flow::new(hash, protocol, Weight::from(0)))
    }

    /// The client has sent a packet. Returns what it is to its flow.
    #[inline]
    pub(super) fn client_spoke(&self, now: Instant, flow: &Flow) -> Known {
        self.note(now, flow, Side::Client)
    }

    /// The new server has sent a packet. Returns what it is to its flow.
    #[inline]
    pub(super) fn server_spoke(&self, now: Instant, flow: &Flow) -> Known {
        self.note(now, flow, Side::Application)
    }

    /// Makes the next packet of a flow one that tells something new, by setting the time of the
    /// last one back by a unit. The flow lives shorter by that if there is no next packet.
    #[cold]
    pub(super) fn look_again(&self, flow: &Flow) {
        let slots = self
            .line(flow.hash)
            .into_iter()
            .flat_map(|(line, _)| &line.0);
        for slot in slots {
            let word = slot.load(Relaxed);
            if is_of(word, flow.hash) {
                let time = ((word >> TIME_SHIFT) as u16).wrapping_sub(1);
                let older =
                    word & !(u64::from(u16::MAX) << TIME_SHIFT) | u64::from(time) << TIME_SHIFT;
                // Another lane has written it anew, and looks by itself.
                let _ = slot.compare_exchange(word, older, Relaxed, Relaxed);
                return;
            }
        }
    }

    /// Whether a flow is known. Nothing changes by the question.
    pub(super) fn knows(&self, now: Instant, flow: &Flow) -> bool {
        let Some((line, _)) = self.line(flow.hash) else {
            return false;
        };
        let words = line.0.iter().map(|slot| slot.load(Relaxed));
        let mut own = words.filter(|&word| is_of(word, flow.hash));
        own.any(|word| self.is_alive(word, self.time(now)))
    }

    /// What is known of a flow, if anything is. Nothing changes by the question.
    pub(super) fn noted(&self, now: Instant, flow: &Flow) -> Option<Noted> {
        let time = self.time(now);
        let words = self.line(flow.hash)?.0.0.iter();
        let mut words = words.map(|slot| slot.load(Relaxed));
        let word = words.find(|&word| is_of(word, flow.hash) && self.is_alive(word, time))?;
        let used = now.checked_sub(Duration::from_secs(idle(word, time).into()));
        Some(Noted {
            seen: seen(word),
            protocol: flow.protocol,
            used: used.unwrap_or(self.epoch),
        })
    }

    /// Remembers the flow of a client's packet, of which nothing is known.
    #[cold]
    pub(super) fn remember(&self, now: Instant, flow: &Flow, ends: &Ends) {
        self.insert(now, flow, Side::Client, ends);
    }

    /// Remembers the flow of a packet of the new server, of which nothing is known.
    #[cold]
    pub(super) fn presume(&self, now: Instant, flow: &Flow, ends: &Ends) {
        self.insert(now, flow, Side::Application, ends);
    }

    /// The flow is one that the new server has answered, though that is not known here any more.
    #[cold]
    pub(super) fn take_over(&self, now: Instant, flow: &Flow, ends: &Ends) {
        let answer = Flow {
            tcp_flags: 0,
            ..*flow
        };
        if matches!(self.note(now, &answer, Side::Application), Known::No) {
            self.insert(now, &answer, Side::Application, ends);
        }
    }

    /// Whether a flow of this protocol may be older than this daemon, and not have been forgotten
    /// since.
    pub(super) fn may_be_older(&self, now: Instant, flow: &Flow) -> bool {
        let lifetime = match flow.protocol {
            TCP => TCP_ESTABLISHED,
            UDP => UDP_BOTH_WAYS,
            ICMP | ICMPV6 => ICMP_QUERY,
            _ => OTHER,
        };
        self.age(now) < lifetime
    }

    /// Forgets flows whose time is up, looking at `budget` words at most. One thread calls it,
    /// every second: so the time of no entry, which has 16 bits, comes round.
    pub(super) fn expire(&self, now: Instant, budget: usize) {
        let time = self.time(now);
        let mut at = self.cursor.load(Relaxed);
        for _ in 0..budget / WAYS {
            match self.pages[at / PAGE].get() {
                None => at = (at / PAGE + 1) * PAGE,
                Some(page) => {
                    self.sweep(&page.lines[at % PAGE], &page.records[at % PAGE], time);
                    at += 1;
                }
            }
            at %= self.lines;
        }
        self.cursor.store(at, Relaxed);
    }

    /// Appends every flow to `out`, for the daemon that takes over. Call it when no lane runs.
    pub(super) fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&(self.lines as u32).to_le_bytes());
        for (number, page) in (0_u32..).zip(&self.pages) {
            let Some(page) = page.get() else {
                continue;
            };
            out.extend_from_slice(&number.to_le_bytes());
            for (slot, number) in page.words() {
                let word = slot.load(Relaxed);
                out.extend_from_slice(&word.to_le_bytes());
                if word != 0 {
                    let record = self.records.get(number.load(Relaxed));
                    out.push(record.is_some().into());
                    record.iter().for_each(|record| record.put(out));
                }
            }
        }
        out.extend_from_slice(&u32::MAX.to_le_bytes());
    }

    /// Takes up the flows of another daemon, which had this seed and this epoch, off the front.
    /// `None` if they are not understood, or that one had room for more or fewer.
    pub(super) fn take_up(&self, rest: &mut &[u8]) -> Option<()> {
        if u32::from_le_bytes(take(rest)?) as usize != self.lines {
            return None;
        }
        loop {
            let number = u32::from_le_bytes(take(rest)?);
            if number == u32::MAX {
                return Some(());
            }
            let page = self.pages.get(number as usize)?.get_or_init(Page::boxed);
            for (slot, number) in page.words() {
                let word = u64::from_le_bytes(take(rest)?);
                if word == 0 {
                    continue;
                }
                if slot.swap(word, Relaxed) == 0 {
                    self.live.fetch_add(1, Relaxed);
                }
                if take(rest)? == [1] {
                    let own = self.records.take();
                    match self.records.get(own) {
                        Some(record) => record.take_up(rest)?,
                        // There is room for fewer, and it is read over.
                        None => Record::default().take_up(rest)?,
                    }
                    self.records.give_back(number.swap(own, Relaxed));
                }
            }
        }
    }

    /// Appends the flows of the page that the line `from` is in, as those of `peer`, and returns
    /// where the next one begins, if there are more. Nobody waits for it, however long it takes.
    pub(super) fn slice(
        &self,
        now: Instant,
        peer: PeerId,
        from: u32,
        out: &mut Vec<Row>,
    ) -> Option<u32> {
        let first = from as usize / PAGE * PAGE;
        // Most of a table that few use is not there.
        let page = self.pages.get(first / PAGE).and_then(OnceLock::get);
        let lines = page
            .iter()
            .flat_map(|page| page.lines.iter().zip(&page.records));
        for (at, (line, numbers)) in lines.enumerate() {
            let at = first + at;
            for (way, (slot, number)) in line.0.iter().zip(numbers).enumerate() {
                let place = Place {
                    part: peer.0.into(),
                    at: (at * WAYS + way) as u32,
                };
                out.extend(self.row(now, peer, place, slot, number));
            }
        }
        let next = first + PAGE;
        (next < self.lines).then_some(next as u32)
    }

    /// What a reader gets of the flow of a word, if its record is one of that flow.
    fn row(
        &self,
        now: Instant,
        peer: PeerId,
        place: Place,
        slot: &AtomicU64,
        number: &AtomicU32,
    ) -> Option<Row> {
        let word = slot.load(Relaxed);
        if !self.is_alive(word, self.time(now)) {
            return None;
        }
        let read = self.records.get(number.load(Relaxed))?.read();
        let Ends {
            client,
            moved,
            client_port,
            moved_port,
            protocol,
        } = read.ends;
        let is_icmp = matches!(protocol, ICMP | ICMPV6);
        let asked = match protocol {
            TCP => [client_port, moved_port],
            UDP | ICMP | ICMPV6 => [client_port, 0],
            _ => [0, 0],
        };
        let begun = match protocol {
            ICMP | ICMPV6 => [0, moved_port],
            _ => [client_port, moved_port],
        };
        let asked = self.hash(client, asked, moved, protocol);
        let begun = self.begun_with([client, moved], begun, protocol, Weight::from(0));
        let is_at = |hash| is_of(word, hash) && self.line_number(hash) == place.at as usize / WAYS;
        if !is_at(asked) && !is_at(begun.hash) {
            return None;
        }
        let second = self.age(now).as_secs() as u32;
        Some(Row {
            place,
            peer,
            protocol,
            client,
            client_port,
            moved,
            moved_port: if is_icmp { 0 } else { moved_port },
            delivery: None,
            state: listing::state(protocol, seen(word)),
            age: Duration::from_secs(second.saturating_sub(read.began).into()),
            idle: Duration::from_secs(idle(word, self.time(now)).into()),
            packets: read.packets,
            bytes: read.bytes,
        })
    }

    /// What the table did.
    pub(super) fn stats(&self) -> FlowStats {
        FlowStats {
            live: self.live.load(Relaxed),
            max: self.max as u64,
            evicted: self.evicted.load(Relaxed),
            ..FlowStats::default()
        }
    }

    /// Whether two packets are of one flow.
    pub(super) fn is_same(one: &Flow, other: &Flow) -> bool {
        one.hash == other.hash
    }

    #[inline]
    fn hash(&self, client: Addr, ports: [u16; 2], moved: Addr, protocol: u8) -> u64 {
        let [client_port, moved_port] = ports.map(u64::from);
        let ports = client_port | moved_port << 16;
        self.seed.flow([client, moved], ports, protocol)
    }

    /// Notes a packet of a flow, if that is known.
    #[inline]
    fn note(&self, now: Instant, flow: &Flow, side: Side) -> Known {
        let Some((line, numbers)) = self.line(flow.hash) else {
            return Known::No;
        };
        for (slot, number) in line.0.iter().zip(numbers) {
            let word = slot.load(Relaxed);
            if is_of(word, flow.hash) {
                let time = self.time(now);
                let fresh = word_of(
                    flow,
                    time,
                    seen(word).after(flow.protocol, side, flow.tcp_flags),
                );
                let record = self.records.get(number.load(Relaxed));
                if fresh == word {
                    if let Some(record) = record {
                        record.count(side as usize, flow.weight());
                    }
                    return Known::Same;
                }
                let known = self.renew(slot, word, fresh, flow, side, time);
                if let (Some(record), Known::Changed(change)) = (record, known) {
                    let over = change.before.is_closed() && !change.after.is_closed();
                    if change.before.is_nothing() || over {
                        record.restart(self.age(now).as_secs() as u32);
                    }
                    record.count(side as usize, flow.weight());
                }
                return known;
            }
        }
        Known::No
    }

    /// Puts a flow into its line, in place of whichever is dispensable first.
    fn insert(&self, now: Instant, flow: &Flow, side: Side, ends: &Ends) {
        let time = self.time(now);
        let at = self.line_number(flow.hash);
        let page = self.pages[at / PAGE].get_or_init(Page::boxed);
        let line = &page.lines[at % PAGE];
        let first = Seen::default().after(flow.protocol, side, flow.tcp_flags);
        let fresh = word_of(flow, time, first);
        // Another lane may take the place first. That happens at most once for each.
        for _ in 0..WAYS {
            let words = line.0.each_ref().map(|slot| slot.load(Relaxed));
            if words.iter().any(|&word| is_of(word, flow.hash)) {
                return;
            }
            let order = words.map(|word| self.dispensable(word, time));
            let way = (1..WAYS).fold(
                0,
                |best, way| {
                    if order[way] > order[best] { way } else { best }
                },
            );
            let replaced = line.0[way].compare_exchange(words[way], fresh, Relaxed, Relaxed);
            if replaced.is_ok() {
                if words[way] == 0 {
                    self.live.fetch_add(1, Relaxed);
                } else if self.is_alive(words[way], time) {
                    self.evicted.fetch_add(1, Relaxed);
                }
                self.record(now, flow, side, ends, &page.records[at % PAGE][way]);
                return;
            }
        }
    }

    /// Writes down who a flow is that has just got its word. The record of the one before becomes
    /// its own.
    fn record(&self, now: Instant, flow: &Flow, side: Side, ends: &Ends, number: &AtomicU32) {
        let mut own = number.load(Relaxed);
        if own == records::NONE {
            own = self.records.take();
            if number
                .compare_exchange(records::NONE, own, Relaxed, Relaxed)
                .is_err()
            {
                // Another lane has given it one, and has perhaps the place by now.
                return self.records.give_back(own);
            }
        }
        if let Some(record) = self.records.get(own) {
            record.begin(ends, self.age(now).as_secs() as u32);
            record.count(side as usize, flow.weight());
        }
    }

    fn sweep(&self, line: &Line, numbers: &Numbers, time: u16) {
        for (slot, number) in line.0.iter().zip(numbers) {
            let word = slot.load(Relaxed);
            if word == 0 || self.is_alive(word, time) {
                continue;
            }
            // The record goes first: who takes the place finds none, and never one that is free.
            let record = number.swap(records::NONE, Relaxed);
            if slot.compare_exchange(word, 0, Relaxed, Relaxed).is_ok() {
                self.live.fetch_sub(1, Relaxed);
                self.records.give_back(record);
            } else if number
                .compare_exchange(records::NONE, record, Relaxed, Relaxed)
                .is_err()
            {
                self.records.give_back(record);
            }
        }
    }

    /// Writes a word anew, unless its flow is forgotten and only the server speaks.
    #[cold]
    fn renew(
        &self,
        slot: &AtomicU64,
        word: u64,
        fresh: u64,
        flow: &Flow,
        side: Side,
        time: u16,
    ) -> Known {
        let (mut before, alive) = (seen(word), self.is_alive(word, time));
        let fresh = match side {
            _ if alive => fresh,
            Side::Client => {
                before = Seen::default();
                word_of(
                    flow,
                    time,
                    before.after(flow.protocol, side, flow.tcp_flags),
                )
            }
            Side::Application => return Known::No,
        };
        // If another lane was faster, that one has written nearly the same.
        let _ = slot.compare_exchange(word, fresh, Relaxed, Relaxed);
        let after = seen(fresh);
        Known::Changed(Change { before, after })
    }

    /// Whether a flow is not forgotten yet: at the end of its lifetime, or up to a unit later.
    fn is_alive(&self, word: u64, time: u16) -> bool {
        word != 0 && idle(word, time) < self.rule(word).timeout + UNIT
    }

    /// How dispensable a word is: the greatest goes first. No flow is idle for 2²⁰ seconds.
    fn dispensable(&self, word: u64, time: u16) -> u32 {
        if word == 0 {
            return u32::MAX;
        }
        let (rule, idle) = (self.rule(word), idle(word, time));
        let rank = if idle < rule.timeout + UNIT {
            EVICTION_ORDER.len() as u32 - rule.tier
        } else {
            u32::from(u8::MAX)
        };
        rank << 20 | idle
    }

    fn rule(&self, word: u64) -> Rule {
        self.rules[usize::from(word as u8)]
    }

    #[inline]
    fn line(&self, hash: u64) -> Option<(&Line, &Numbers)> {
        let at = self.line_number(hash);
        let page = self.pages[at / PAGE].get()?;
        Some((&page.lines[at % PAGE], &page.records[at % PAGE]))
    }

    #[inline]
    fn line_number(&self, hash: u64) -> usize {
        hash as usize & (self.lines - 1)
    }

    #[inline]
    pub(super) fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.epoch)
    }

    #[inline]
    fn time(&self, now: Instant) -> u16 {
        (self.age(now).as_secs() / u64::from(UNIT)) as u16
    }
}

impl std::fmt::Debug for Clients {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Clients")
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

impl Rule {
    fn of(state: u8) -> Self {
        let class = Class::of(
            FAMILIES[usize::from(state >> FAMILY_SHIFT)],
            seen(state.into()),
        );
        // However short it was idle: to be displaced costs a client little here.
        let tier = class.eviction_tier(u32::MAX);
        Self {
            timeout: class.timeout(),
            tier: tier.unwrap_or(EVICTION_ORDER.len()) as u32,
        }
    }
}

impl Page {
    /// Its words, each with the number of its record.
    fn words(&self) -> impl Iterator<Item = (&AtomicU64, &AtomicU32)> {
        let lines = self.lines.iter().zip(&self.records);
        lines.flat_map(|(line, numbers)| line.0.iter().zip(numbers))
    }

    fn boxed() -> Box<Self> {
        Box::new(Self {
            lines: std::array::from_fn(|_| Line::default()),
            records: std::array::from_fn(|_| [(); WAYS].map(|()| AtomicU32::new(records::NONE))),
        })
    }
}

#[inline]
fn word_of(flow: &Flow, time: u16, seen: Seen) -> u64 {
    let family = match flow.protocol {
        TCP => 0,
        UDP => 1,
        ICMP | ICMPV6 => 2,
        _ => 3,
    };
    flow.hash & TAG
        | u64::from(time) << TIME_SHIFT
        | family << FAMILY_SHIFT
        | u64::from(seen.bits())
}

/// Whether a word is that of a flow. An empty one, of which nothing was seen, is nobody's.
#[inline]
fn is_of(word: u64, hash: u64) -> bool {
    (word ^ hash) & TAG == 0 && word & SEEN != 0
}

#[inline]
fn seen(word: u64) -> Seen {
    Seen::from_bits((word & SEEN) as u8)
}

/// Seconds for which a flow was not used, counted in whole units. One lane's time may be a little
/// behind another's.
fn idle(word: u64, time: u16) -> u32 {
    let units = time.wrapping_sub((word >> TIME_SHIFT) as u16);
    if units > u16::MAX / 2 {
        0
    } else {
        u32::from(units) * UNIT
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::net::Ipv4Addr;

    use super::*;
    use crate::packet::{ACK, FIN, SYN};
    use crate::testing::epoch;
    use proptest::prelude::*;

    const SEED: [u64; 2] = [1, 2];

    /// The ends of the flow of the `n`th client.
    fn ends(n: u32, protocol: u8) -> Ends {
        Ends {
            client: Ipv4Addr::from(n).into(),
            moved: Ipv4Addr::new(192, 0, 2, 5).into(),
            client_port: 4_000,
            moved_port: 80,
            protocol,
        }
    }

    impl Clients {
        /// The flow of the `n`th client, and a packet of it with these TCP flags.
        fn flow(&self, n: u32, protocol: u8, tcp_flags: u8) -> Flow {
            let Ends { client, moved, .. } = ends(n, protocol);
            let hash = self.hash(client, [4_000, 80], moved, protocol);
            Flow::new(hash, protocol, tcp_flags.into())
        }

        /// As the gate does for a client's packet.
        fn client(&self, now: Instant, flow: &Flow) {
            if !self.client_spoke(now, flow).is_known() {
                // Whose it is matters to a reader alone.
                self.remember(now, flow, &ends(0, flow.protocol));
            }
        }

        /// A client's connection, or what stands for it.
        fn converse(&self, now: Instant, n: u32, protocol: u8) {
            self.client(now, &self.flow(n, protocol, SYN));
            assert!(
                self.server_spoke(now, &self.flow(n, protocol, SYN | ACK))
                    .is_known()
            );
            self.client(now, &self.flow(n, protocol, ACK));
        }

        fn pages_in_use(&self) -> usize {
            self.pages
                .iter()
                .filter(|page| page.get().is_some())
                .count()
        }
    }

    fn clients(max_flows: usize) -> (Clients, Instant) {
        let now = epoch();
        (Clients::new(Seed::new(SEED), max_flows, now), now)
    }

    fn seconds(seconds: u32) -> Duration {
        Duration::from_secs(seconds.into())
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Client(u32, u8),
        Server(u32, u8),
        Wait(u32),
        Expire,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let flags = || prop_oneof![Just(SYN), Just(ACK), Just(SYN | ACK), any::<u8>()];
        let who = 0..6_u32;
        let wait = prop_oneof![0..100_u32, 2_000..4_000_u32];
        prop::collection::vec(
            prop_oneof![
                (who.clone(), flags()).prop_map(|(n, flags)| Step::Client(n, flags)),
                (who, flags()).prop_map(|(n, flags)| Step::Server(n, flags)),
                wait.prop_map(|units| Step::Wait(units * UNIT)),
                Just(Step::Expire),
            ],
            0..60,
        )
    }

    proptest! {
        /// With room for all it is a map from flows to what was seen of them, and their last use.
        #[test]
        fn it_agrees_with_a_map(steps in steps(), protocol in prop_oneof![
            Just(TCP), Just(UDP), Just(ICMP), Just(47),
        ]) {
            let (table, mut now) = clients(1_000);
            let mut map: HashMap<u32, (Seen, Instant)> = HashMap::new();
            for step in steps {
                let alive = |map: &HashMap<u32, (Seen, Instant)>, n: &u32| {
                    let &(seen, used) = map.get(n)?;
                    let timeout = Class::of(protocol, seen).timeout();
                    (now - used < seconds(timeout + UNIT)).then_some(seen)
                };
                match step {
                    Step::Client(n, flags) => {
                        table.client(now, &table.flow(n, protocol, flags));
                        let seen = alive(&map, &n).unwrap_or_default();
                        map.insert(n, (seen.after(protocol, Side::Client, flags), now));
                    }
                    Step::Server(n, flags) => {
                        let known = alive(&map, &n);
                        let flow = table.flow(n, protocol, flags);
                        prop_assert_eq!(table.knows(now, &flow), known.is_some());
                        prop_assert_eq!(table.server_spoke(now, &flow).is_known(), known.is_some());
                        if let Some(seen) = known {
                            map.insert(n, (seen.after(protocol, Side::Application, flags), now));
                        }
                    }
                    Step::Wait(time) => now += seconds(time),
                    Step::Expire => {
                        table.expire(now, 1_000_000);
                        let all = (0..6).filter(|n| alive(&map, n).is_some());
                        prop_assert_eq!(table.stats().live, all.count() as u64);
                    }
                }
            }
            prop_assert_eq!(table.stats().evicted, 0);
        }
    }

    #[test]
    fn a_flood_displaces_no_answered_flow() {
        const ANSWERED: u32 = 2_000;
        let (table, now) = clients(4_000);
        for n in 0..ANSWERED {
            table.converse(now, n, if n % 2 == 0 { TCP } else { UDP });
        }
        let before = table.pages_in_use();
        let later = now + seconds(240);
        for n in 1_000_000..1_200_000 {
            table.client(later, &table.flow(n, TCP, SYN));
            table.client(later, &table.flow(n, UDP, 0));
        }
        let lost = (0..ANSWERED)
            .filter(|&n| !table.knows(later, &table.flow(n, if n % 2 == 0 { TCP } else { UDP }, 0)))
            .count();
        // Of one line of 1,024 in four hundred, eight answered flows have all the places.
        assert!(lost <= 5, "{lost} of {ANSWERED}");
        let stats = table.stats();
        assert_eq!(
            stats.live, 8_192,
            "every place is taken, and there are no more"
        );
        assert!(stats.evicted > 390_000, "{}", stats.evicted);
        assert!(before <= table.pages_in_use() && table.pages_in_use() == table.pages.len());
    }

    impl Clients {
        /// All flows, as a reader gets them.
        fn rows(&self, now: Instant) -> Vec<Row> {
            let (mut rows, mut next) = (Vec::new(), Some(0));
            while let Some(from) = next {
                next = self.slice(now, PeerId(3), from, &mut rows);
            }
            rows
        }

        /// A client's packet, with the ends that it has.
        fn comes(&self, now: Instant, n: u32, protocol: u8, weight: Weight) {
            let Ends { client, moved, .. } = ends(n, protocol);
            let ports = if protocol == TCP {
                [4_000, 80]
            } else {
                [4_000, 0]
            };
            let flow = Flow::new(self.hash(client, ports, moved, protocol), protocol, weight);
            if !self.client_spoke(now, &flow).is_known() {
                self.remember(now, &flow, &ends(n, protocol));
            }
        }
    }

    #[test]
    fn a_reader_gets_each_flow_with_its_ends_and_what_it_carried() {
        let (table, now) = clients(5_000);
        let weight = Weight {
            tcp_flags: ACK,
            packets: 2,
            bytes: 3_000,
        };
        for n in 0..4_000 {
            let protocol = if n % 2 == 0 { TCP } else { UDP };
            table.comes(now, n, protocol, weight);
            table.comes(now + seconds(1), n, protocol, weight);
        }
        let mut rows = table.rows(now + seconds(9));
        rows.sort_by_key(|row| row.client);
        assert_eq!(rows.len(), 4_000, "each once");
        for (n, row) in rows.iter().enumerate() {
            let protocol = if n % 2 == 0 { TCP } else { UDP };
            let state = if protocol == TCP {
                "opening"
            } else {
                "unanswered"
            };
            let Ends { client, moved, .. } = ends(n as u32, protocol);
            assert_eq!(
                (row.client, row.moved, row.protocol),
                (client, moved, protocol)
            );
            assert_eq!((row.client_port, row.moved_port), (4_000, 80));
            assert_eq!(
                (row.peer, row.state, row.delivery),
                (PeerId(3), state, None)
            );
            assert_eq!((row.age, row.idle), (seconds(9), seconds(8)));
            assert_eq!((row.packets, row.bytes), ([4, 0], [6_000, 0]));
        }
        // Those that are over give their records back, and others take them.
        let later = now + seconds(1_000);
        table.expire(later, 1 << 16);
        assert_eq!(table.rows(later), []);
        for n in 10_000..14_000 {
            table.comes(later, n, TCP, weight);
        }
        let rows = table.rows(later);
        assert_eq!(rows.len(), 4_000);
        assert!(
            rows.iter()
                .all(|row| row.age.is_zero() && row.bytes == [3_000, 0])
        );
    }

    #[test]
    fn another_connection_with_the_same_ports_counts_anew() {
        let (table, now) = clients(100);
        let weight = |tcp_flags| Weight {
            tcp_flags,
            packets: 1,
            bytes: 100,
        };
        let Ends { client, moved, .. } = ends(1, TCP);
        let hash = table.hash(client, [4_000, 80], moved, TCP);
        let answers = |at, flags| {
            let flow = Flow::new(hash, TCP, weight(flags));
            assert!(table.server_spoke(at, &flow).is_known());
        };
        table.comes(now, 1, TCP, weight(SYN));
        answers(now, SYN | ACK);
        table.comes(now, 1, TCP, weight(ACK));
        let row = |at| table.rows(at)[0];
        assert_eq!(
            (row(now).state, row(now).bytes),
            ("established", [200, 100])
        );
        table.comes(now, 1, TCP, weight(FIN | ACK));
        answers(now, FIN | ACK);
        let later = now + seconds(9);
        table.comes(later, 1, TCP, weight(SYN));
        let row = row(later);
        assert_eq!((row.state, row.bytes), ("opening", [100, 0]));
        assert_eq!((row.packets, row.age), ([1, 0], seconds(0)));
    }

    #[test]
    fn a_full_line_gives_up_who_is_dispensable_first() {
        let (table, now) = clients(0);
        // All in one line: the hash may differ in the tag alone.
        let flow =
            |n: u64, protocol, tcp_flags: u8| Flow::new(n << TAG_SHIFT, protocol, tcp_flags.into());
        let answered = |at: Instant, flow: Flow| {
            table.client(at, &flow);
            assert!(table.server_spoke(at, &flow).is_known());
            table.client(at, &flow);
        };
        let at = |second| now + seconds(second);
        // In the order in which they are to go.
        table.client(at(400), &flow(1, TCP, SYN));
        table.client(at(404), &flow(2, UDP, 0));
        answered(at(300), flow(3, UDP, 0));
        answered(at(304), flow(4, TCP, SYN));
        answered(at(308), flow(5, 47, 0));
        answered(at(4), flow(6, TCP, ACK));
        answered(at(8), flow(7, TCP, ACK));
        answered(at(12), flow(8, TCP, ACK));
        let known = || (1..=8).filter(|&n| table.knows(at(408), &flow(n, 0, 0)));
        assert_eq!(known().count(), 8);
        // A SYN that was answered is as dispensable as one that was not.
        for (newcomer, gone) in [4, 1, 2, 3, 5, 6].into_iter().enumerate() {
            let newcomer = flow(100 + newcomer as u64, TCP, ACK);
            answered(at(408), newcomer);
            assert!(!known().any(|n| n == gone), "{gone}");
        }
        assert_eq!(known().collect::<Vec<_>>(), [7, 8]);
        assert_eq!(table.stats().evicted, 6);
        // What is forgotten goes first, and is no loss.
        let much_later = at(8 + 7_440 + 4);
        table.client(much_later, &flow(200, UDP, 0));
        assert!(!table.knows(much_later, &flow(7, 0, 0)));
        assert!(table.knows(much_later, &flow(8, 0, 0)));
        assert_eq!(table.stats().evicted, 6);
    }

    #[test]
    fn what_is_forgotten_makes_room_in_its_own_time() {
        let (table, now) = clients(1_000);
        for n in 0..500 {
            table.client(now, &table.flow(n, UDP, 0));
        }
        table.converse(now, 1_000, UDP);
        let later = now + seconds(124);
        assert_eq!(table.stats().live, 501);
        // A thousand words in a second go through two thousand in two.
        table.expire(later, 1_024);
        table.expire(later, 1_024);
        assert_eq!(table.stats().live, 1);
        table.expire(now + seconds(304), 2_048);
        assert_eq!(table.stats().live, 0);
    }

    #[test]
    fn time_comes_round_and_lanes_disagree_a_little() {
        let (table, start) = clients(1_000);
        // Sixteen bits of units are three days.
        let round = seconds(UNIT << 16);
        for at in [
            start,
            start + round - seconds(2),
            start + round + seconds(2),
        ] {
            table.client(at, &table.flow(7, ICMP, 0));
            assert!(
                table
                    .server_spoke(at + seconds(4), &table.flow(7, ICMP, 0))
                    .is_known()
            );
            assert!(
                table.server_spoke(at, &table.flow(7, ICMP, 0)).is_known(),
                "a lane behind"
            );
            let late = at + seconds(72);
            assert!(!table.server_spoke(late, &table.flow(7, ICMP, 0)).is_known());
            table.expire(late, 2_048);
            assert_eq!(table.stats().live, 0);
        }
    }

    #[test]
    fn nobody_can_tell_which_flows_share_a_line() {
        let lines = |seed| {
            let table = Clients::new(Seed::new(seed), 1_000_000, epoch());
            let flows = (0..1_000).map(|n| table.line_number(table.flow(n, UDP, 0).hash));
            flows.collect::<Vec<_>>()
        };
        let (one, other) = (lines([1, 2]), lines([3, 4]));
        let same = one.iter().zip(&other).filter(|(one, other)| one == other);
        assert!(same.count() < 5);
    }

    #[test]
    fn it_takes_no_memory_until_somebody_comes_and_a_bounded_amount_then() {
        let (table, now) = clients(16_000_000);
        assert_eq!(table.pages_in_use(), 0);
        assert!(!table.server_spoke(now, &table.flow(1, UDP, 0)).is_known());
        table.expire(now, 1_024);
        assert_eq!(table.pages_in_use(), 0);
        table.client(now, &table.flow(1, UDP, 0));
        assert_eq!(table.pages_in_use(), 1);
        assert_eq!(size_of::<Page>(), 6_144);
        // 16 million flows in 384 MiB, and their records, which come as they are needed.
        assert_eq!(table.pages.len(), 65_536);
        assert_eq!(clients(usize::MAX).0.lines, MAX_LINES);
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "the threads of lanes")]
    fn lanes_share_it() {
        const LANES: u32 = 4;
        const EACH: u32 = 2_000;
        let (table, now) = clients(1_000_000);
        std::thread::scope(|scope| {
            for lane in 0..LANES {
                let table = &table;
                scope.spawn(move || {
                    for n in 0..EACH {
                        // Every lane has its own flows, and one of everybody's.
                        table.converse(now, 1_000_000 * lane + n, TCP);
                        table.client(now + seconds(n), &table.flow(u32::MAX, UDP, 0));
                    }
                });
            }
        });
        let all = (0..LANES).flat_map(|lane| (0..EACH).map(move |n| 1_000_000 * lane + n));
        let known = all.filter(|&n| table.knows(now, &table.flow(n, TCP, 0)));
        assert_eq!(known.count() as u32, LANES * EACH);
        let live = table.stats().live;
        assert!(live >= u64::from(LANES * EACH + 1), "{live}");
    }

    #[test]
    fn the_next_daemon_lists_the_flows_that_it_was_left() {
        let list = |table: &Clients, now| {
            let (mut rows, mut next) = (Vec::new(), Some(0));
            while let Some(from) = next {
                next = table.slice(now, PeerId(3), from, &mut rows);
            }
            rows.iter()
                .map(|row| format!("{row:?}"))
                .collect::<Vec<_>>()
        };
        let (before, start) = clients(100);
        for n in 0..50 {
            let flow = before.flow(n, TCP, SYN);
            before.remember(start, &flow, &ends(n, TCP));
            before.server_spoke(start, &before.flow(n, TCP, SYN | ACK));
        }
        let now = start + seconds(9);
        let known = list(&before, now);
        assert_eq!(known.len(), 50);
        let mut bytes = Vec::new();
        before.put(&mut bytes);
        // One that has room for fewer records knows the flows all the same.
        for (room, listed) in [(100, 50), (20, 20)] {
            let mut rest = &*bytes;
            let after = Clients::new(Seed::new(SEED), room, start);
            assert_eq!((after.take_up(&mut rest), rest), (Some(()), &[][..]));
            assert_eq!(after.stats().live, 50);
            let rows = list(&after, now);
            assert_eq!(rows.len(), listed);
            assert!(rows.iter().all(|row| known.contains(row)), "{rows:?}");
            // Their records are its own, and it has room for more where they were fewer.
            assert_eq!(after.records.take() == records::NONE, room == 20);
        }
        for end in (0..bytes.len()).step_by(97) {
            assert_eq!(clients(100).0.take_up(&mut &bytes[..end]), None, "{end}");
        }
    }
}
