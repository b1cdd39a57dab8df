//! First packets that wait while what they ask for is held, and the order and pace in which they go
//! on afterwards.
//!
//! Owns the queue, its bounds and its schedule. What becomes of a packet that has waited is not
//! decided here: it is judged anew. Must not touch sockets, devices or the clock.
//!
//! ```text
//! keep() ──► flow ──► line of what it asks for ──► at the end of the hold, first come first out:
//!            one SYN, or a few datagrams           a few at once, then one in each step ──► take()
//! ```
//!
//! * Of TCP the newest SYN of a flow waits, in the place of its first one: by its timestamp the
//!   client will measure the round trip (RFC 7323 section 4), and if the client began anew from the
//!   same port, its sequence number is the one that counts. Of anything else the first few packets
//!   wait.
//! * A released packet is as it came, with its virtio header in front: nothing is segmented, and no
//!   checksum finished.
//! * Those who ask for the same address and port wait in one line. An application takes new
//!   connections no faster than it can, and the kernel keeps only so many for it, so a line moves
//!   at a pace. Lines do not wait for each other: a flood to one port holds up no other.
//! * A SYN that goes unanswered all the same goes on again, long before its client would send it.
//! * Who has been silent for longer than a client is patient is forgotten.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::model::drops::DropReason;
use crate::model::mode::Mode;
use crate::model::move_index::MoveIndex;
use crate::model::moved::{Move, TCP};
use crate::packet::fragment::Key;
use crate::packet::vnet::VNET_HDR_LEN;
use crate::packet::{ACK, Addr, Fragment, Kind, Parsed, RST, SYN, tcp_seq};

/// Most packets that wait. As many SYNs take 30 MB, and no server that is moved gets more in a
/// minute but from a flood.
const MAX_PACKETS: usize = 65_536;

/// Most bytes that wait: [`MAX_PACKETS`] of 512, which few first packets are longer than.
const MAX_BYTES: usize = 32 << 20;

/// What of these one source may have, an IPv4 address or an IPv6 /64: a quarter. It is not less,
/// since all clients may come from one address: that of a proxy, or of a network behind NAT.
const SHARE: usize = 4;

/// Most packets of a flow without TCP, the later fragments of each aside: a client that is not
/// answered has sent as many again after some seconds (RFC 9002 section 6.2.1; resolvers give up
/// after 2 to 4).
const MAX_FIRST: u8 = 4;

/// So long after its last packet a client has given up. Linux sends a SYN again for the last time
/// after 63 s, and waits 64 s more (`tcp_syn_retries`); others are less patient.
const PATIENCE: Duration = Duration::from_secs(64);

/// Flows of a line that go on at once when its hold ends.
const AT_ONCE: usize = 32;

/// How long one flow of a line goes on after the other. The kernel keeps as many connections for an
/// application as that has asked for: 100 (Tomcat, Postfix), 128 (sshd) or 511 (nginx, Apache), and
/// as many whose client has not answered yet (net/ipv4/tcp_input.c, `tcp_conn_request`). Beyond
/// that it drops SYNs, whose clients may try again a minute later. At a thousand a second 80
/// clients at a time have not answered yet if they are 80 ms away.
const STEP: Duration = Duration::from_millis(1);

/// So long after the end of a hold its last flow goes on, however many there are: a flood must not
/// keep others waiting for minutes.
const WITHIN: Duration = Duration::from_secs(4);

/// A line that could not go on in time makes up for so much: some turns of whoever takes out.
const SLACK: Duration = Duration::from_millis(10);

/// A SYN that went on and was not answered goes on again after this time, then after twice that,
/// and once more: the application had no place for it, or it was lost. The client would try again
/// too, but the longer it has waited, the later: up to a minute. A server answers a SYN that it has
/// seen before as it did the first time (RFC 9293 section 3.10.7.4).
const AGAIN: Duration = Duration::from_millis(500);

/// How often a SYN goes on at most, unless the new server is watched: then until that is over.
const TIMES: u32 = 4;

/// What a client waits for whose SYN went on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Awaits {
    /// It has its answer, or has gone.
    Nothing,
    /// An answer to what was sent.
    Answer,
    /// That somebody answers what is sent: whoever does not, or refuses, may soon
    /// ([`Gate::set_shields`](crate::flow::gate::Gate::set_shields)).
    Chance,
}

/// The first packets that wait.
#[derive(Debug)]
pub struct Hold {
    index: MoveIndex,
    /// For each move, how long its flows wait; `None` if they do not.
    until: Vec<Option<Instant>>,
    /// For each move, how many flows wait.
    waiting: Vec<u64>,
    /// In the order they came.
    flows: BTreeMap<u64, Waiting>,
    numbers: BTreeMap<Flow, u64>,
    /// The flows of packets whose first fragment waits.
    fragments: BTreeMap<Key, u64>,
    /// When each flow was last heard.
    heard: BTreeSet<(Instant, u64)>,
    lines: BTreeMap<Asked, Line>,
    /// When each line goes on; `None` is at once.
    schedule: BTreeSet<(Option<Instant>, Asked)>,
    /// SYNs that went on, by when to look whether they were answered: at most [`MAX_PACKETS`].
    sent: BTreeMap<(Instant, u64), Sent>,
    sources: BTreeMap<Addr, Room>,
    all: Room,
    next: u64,
}

/// What tells one conversation from another.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Flow {
    client: Addr,
    client_port: u16,
    asked: Asked,
}

/// What a client asks for: a line of its own.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Asked {
    addr: Addr,
    /// `None` where the protocol has none.
    port: Option<u16>,
    protocol: u8,
}

/// A flow that waits.
#[derive(Debug)]
struct Waiting {
    flow: Flow,
    frames: Vec<Box<[u8]>>,
    /// How many of the frames are no later fragments.
    first: u8,
    /// The fragmented packets among them.
    fragments: Vec<Key>,
    /// The sequence numbers that a TCP client may end it with.
    ends: Option<(u32, u32)>,
    heard: Instant,
}

/// A SYN that went on.
#[derive(Debug)]
struct Sent {
    frame: Box<[u8]>,
    times: u32,
}

/// Flows that ask for the same.
#[derive(Debug)]
struct Line {
    /// The move that takes them. What belongs to none is never held.
    moved: Option<usize>,
    flows: BTreeSet<u64>,
    at: Option<Instant>,
    /// How long one goes on after the other, once the first has.
    step: Option<Duration>,
}

/// What is in use of the room.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
struct Room {
    packets: usize,
    bytes: usize,
}

impl Room {
    fn add(&mut self, frame: &[u8]) {
        self.packets += 1;
        self.bytes += frame.len();
    }

    fn remove(&mut self, frame: &[u8]) {
        self.packets -= 1;
        self.bytes -= frame.len();
    }

    /// Whether there is room for a frame, in one part of so many.
    fn has(&self, parts: usize, frame: &[u8]) -> bool {
        self.packets < MAX_PACKETS / parts && self.bytes + frame.len() <= MAX_BYTES / parts
    }
}

impl Hold {
    /// For these moves. Nothing is held.
    pub fn new(moves: &[Move]) -> Self {
        Self {
            index: MoveIndex::new(moves.to_vec()),
            until: vec![None; moves.len()],
            waiting: vec![0; moves.len()],
            flows: BTreeMap::new(),
            numbers: BTreeMap::new(),
            fragments: BTreeMap::new(),
            heard: BTreeSet::new(),
            lines: BTreeMap::new(),
            schedule: BTreeSet::new(),
            sent: BTreeMap::new(),
            sources: BTreeMap::new(),
            all: Room::default(),
            next: 0,
        }
    }

    /// Sets the modes of the moves, in the order of [`new`](Self::new). What is no longer held goes
    /// on from now on.
    pub fn set_modes(&mut self, modes: &[Mode<Instant>]) {
        let until = modes.iter().map(|mode| mode.held_until);
        let before = std::mem::replace(&mut self.until, until.collect());
        for (asked, line) in &mut self.lines {
            let of = |all: &[Option<Instant>]| all.get(line.moved?).copied().flatten();
            let (was, until) = (of(&before), of(&self.until));
            // What goes on already keeps its pace.
            if was == until || until.is_none() && line.step.is_some() {
                continue;
            }
            self.schedule.remove(&(line.at, *asked));
            (line.at, line.step) = (until, None);
            self.schedule.insert((line.at, *asked));
        }
    }

    /// From now on these are the moves. What waits goes on waiting, if one of them takes it; else
    /// it goes on at once, and is judged anew. The modes have to be set again.
    pub fn set_moves(&mut self, moves: &[Move]) {
        let before = std::mem::take(&mut self.until);
        self.index = MoveIndex::new(moves.to_vec());
        self.until = vec![None; moves.len()];
        self.waiting = vec![0; moves.len()];
        for (asked, line) in &mut self.lines {
            let was = line
                .moved
                .and_then(|moved| before.get(moved).copied().flatten());
            line.moved = (self.index).owner(asked.addr.number(), asked.protocol, asked.port);
            if let Some(moved) = line.moved {
                self.waiting[moved] += line.flows.len() as u64;
                // It is as it was until the modes are told.
                self.until[moved] = self.until[moved].max(was);
            } else if was.is_some() {
                self.schedule.remove(&(line.at, *asked));
                (line.at, line.step) = (None, None);
                self.schedule.insert((line.at, *asked));
            }
        }
    }

    /// How many flows of each move wait.
    pub fn waiting(&self) -> &[u64] {
        &self.waiting
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.flows.is_empty()
    }

    /// Keeps a packet of a client, whose `frame` has the virtio header in front. Returns whether
    /// there is something to do earlier now than [`next`](Self::next) has said.
    ///
    /// # Errors
    /// [`DropReason::HoldFull`]; [`DropReason::FragmentUnknown`] if it is a later fragment, and the
    /// first one does not wait.
    pub fn keep(
        &mut self,
        now: Instant,
        parsed: &Parsed,
        frame: &[u8],
    ) -> Result<bool, DropReason> {
        let packet = frame.get(VNET_HDR_LEN..).ok_or(DropReason::IpMalformed)?;
        if parsed.fragment() == Fragment::Later {
            let known = self.fragments.get(&Key::of(parsed, packet));
            let number = *known.ok_or(DropReason::FragmentUnknown)?;
            return self.push(number, frame).map(|()| false);
        }
        let flow = Flow::of(parsed, packet);
        let Some(&number) = self.numbers.get(&flow) else {
            return self.begin(now, flow, parsed, frame);
        };
        if parsed.protocol() == TCP {
            self.renew(number, frame)?;
        } else {
            let waits = self.flows.get(&number);
            if waits.is_none_or(|it| it.first == MAX_FIRST) {
                return Err(DropReason::HoldFull);
            }
            self.push(number, frame)?;
        }
        self.note(now, number, parsed, packet);
        Ok(false)
    }

    /// Whether others of a packet's flow wait that it must not overtake, if it begins it too.
    pub fn waits(&self, parsed: &Parsed, packet: &[u8]) -> bool {
        match (parsed.fragment(), parsed.kind()) {
            (Fragment::Later, _) => self.fragments.contains_key(&Key::of(parsed, packet)),
            (Fragment::None | Fragment::First, Kind::Tcp)
                if parsed.tcp_flags() & (SYN | ACK) != SYN =>
            {
                false
            }
            (Fragment::None | Fragment::First, _) => {
                self.numbers.contains_key(&Flow::of(parsed, packet))
            }
        }
    }

    /// Forgets a flow if this packet of its client says that the client has given up: a RST that
    /// knows its sequence number. Returns how many packets waited.
    pub fn withdraw(&mut self, parsed: &Parsed, packet: &[u8]) -> usize {
        if parsed.tcp_flags() & RST == 0 || parsed.fragment() != Fragment::None {
            return 0;
        }
        let Some(&number) = self.numbers.get(&Flow::of(parsed, packet)) else {
            return 0;
        };
        let ends = self.flows.get(&number).and_then(|it| it.ends);
        let seq = tcp_seq(packet, parsed);
        let fits =
            ends.is_some_and(|(first, last)| seq.wrapping_sub(first) <= last.wrapping_sub(first));
        if !fits {
            return 0;
        }
        self.remove(number).len()
    }

    /// When there is something to do, if anything waits.
    pub fn next(&self, now: Instant) -> Option<Instant> {
        let line = self.schedule.first().map(|&(at, _)| at.unwrap_or(now));
        let silent = self.heard.first().map(|&(heard, _)| heard + PATIENCE);
        let sent = self.sent.first_key_value().map(|(&(at, _), _)| at);
        line.into_iter().chain(silent).chain(sent).min()
    }

    /// Takes out the frames of flows that go on by now, in order: of `most` flows, or of a few
    /// more. Returns of how many.
    pub fn take(&mut self, now: Instant, most: usize, out: &mut Vec<Box<[u8]>>) -> usize {
        let mut taken = 0;
        while taken < most
            && let Some(&(at, asked)) = self.schedule.first()
            && at <= Some(now)
        {
            self.schedule.remove(&(at, asked));
            let Some(line) = self.lines.get_mut(&asked) else {
                continue;
            };
            let (step, from, count) = match (line.step, at) {
                (Some(step), Some(at)) => (step, at.max(now.checked_sub(SLACK).unwrap_or(at)), 1),
                (Some(step), None) => (step, now, 1),
                (None, _) => {
                    let flows = u32::try_from(line.flows.len()).unwrap_or(u32::MAX);
                    (STEP.min(WITHIN / flows.max(1)), now, AT_ONCE)
                }
            };
            (line.step, line.at) = (Some(step), Some(from + step));
            self.schedule.insert((line.at, asked));
            let numbers: Vec<u64> = line.flows.iter().take(count).copied().collect();
            taken += numbers.len();
            for number in numbers {
                let frames = self.remove(number);
                if asked.protocol == TCP
                    && let [frame] = &frames[..]
                {
                    self.sent(now, number, 1, frame);
                }
                out.extend(frames);
            }
        }
        taken
    }

    /// Takes out the frames of SYNs that went on before and that nobody has answered by now, in
    /// order. `awaits` says of a packet what it waits for.
    pub fn again(
        &mut self,
        now: Instant,
        awaits: impl Fn(&[u8]) -> Awaits,
        out: &mut Vec<Box<[u8]>>,
    ) {
        while let Some(entry) = self.sent.first_entry()
            && entry.key().0 <= now
        {
            let ((_, number), sent) = entry.remove_entry();
            let times = match awaits(&sent.frame[VNET_HDR_LEN..]) {
                Awaits::Nothing => continue,
                Awaits::Answer => sent.times + 1,
                Awaits::Chance => (sent.times + 1).min(TIMES - 1),
            };
            self.sent(now, number, times, &sent.frame);
            out.push(sent.frame);
        }
    }

    /// Forgets a flow whose client has been silent for too long, as long as there is one. Returns
    /// how many packets of it waited.
    pub fn expire(&mut self, now: Instant) -> Option<usize> {
        let &(heard, number) = self.heard.first()?;
        (now.saturating_duration_since(heard) >= PATIENCE).then(|| self.remove(number).len())
    }

    /// Begins a flow.
    fn begin(
        &mut self,
        now: Instant,
        flow: Flow,
        parsed: &Parsed,
        frame: &[u8],
    ) -> Result<bool, DropReason> {
        self.make_room(flow.client, frame)?;
        let number = self.next;
        self.next += 1;
        let before = self.schedule.first().copied();
        if !self.lines.contains_key(&flow.asked) {
            let moved = self.moved(&flow.asked);
            let at = moved.and_then(|moved| *self.until.get(moved)?);
            let line = Line {
                moved,
                flows: BTreeSet::new(),
                at,
                step: None,
            };
            self.lines.insert(flow.asked, line);
            self.schedule.insert((at, flow.asked));
        }
        if let Some(line) = self.lines.get_mut(&flow.asked) {
            line.flows.insert(number);
            let waiting = line.moved.and_then(|moved| self.waiting.get_mut(moved));
            if let Some(waiting) = waiting {
                *waiting += 1;
            }
        }
        self.numbers.insert(flow, number);
        self.heard.insert((now, number));
        let waits = Waiting {
            flow,
            frames: vec![frame.into()],
            first: 0,
            fragments: Vec::new(),
            ends: None,
            heard: now,
        };
        self.flows.insert(number, waits);
        self.note(now, number, parsed, &frame[VNET_HDR_LEN..]);
        Ok(before != self.schedule.first().copied())
    }

    /// Puts a newer SYN in the place of the one that waits.
    fn renew(&mut self, number: u64, frame: &[u8]) -> Result<(), DropReason> {
        let Some(waits) = self.flows.get_mut(&number) else {
            return Err(DropReason::HoldFull);
        };
        let client = waits.flow.client;
        let old = std::mem::replace(&mut waits.frames, vec![frame.into()]);
        old.iter().for_each(|old| self.free(client, old));
        let made = self.make_room(client, frame);
        let Some(waits) = self.flows.get_mut(&number) else {
            return made;
        };
        if made.is_err() {
            waits.frames.clone_from(&old);
            old.iter().for_each(|old| self.occupy(client, old));
            return made;
        }
        for key in std::mem::take(&mut waits.fragments) {
            self.fragments.remove(&key);
        }
        waits.first = 0;
        made
    }

    /// Adds a packet to a flow.
    fn push(&mut self, number: u64, frame: &[u8]) -> Result<(), DropReason> {
        let client = self.flows.get(&number).map(|it| it.flow.client);
        self.make_room(client.ok_or(DropReason::HoldFull)?, frame)?;
        if let Some(waits) = self.flows.get_mut(&number) {
            waits.frames.push(frame.into());
        }
        Ok(())
    }

    /// Notes what a packet that was kept says of its flow.
    fn note(&mut self, now: Instant, number: u64, parsed: &Parsed, packet: &[u8]) {
        let Some(waits) = self.flows.get_mut(&number) else {
            return;
        };
        self.heard.remove(&(waits.heard, number));
        waits.heard = now;
        waits.first += 1;
        self.heard.insert((now, number));
        if parsed.kind() == Kind::Tcp && parsed.fragment() == Fragment::None {
            let seq = tcp_seq(packet, parsed);
            // Of a SYN with data (RFC 7413) the client may have begun to count.
            let last = seq.wrapping_add(1 + parsed.payload_len() as u32);
            waits.ends = Some((seq, last));
        }
        if parsed.fragment() == Fragment::First {
            let key = Key::of(parsed, packet);
            if self.fragments.insert(key, number) != Some(number) {
                waits.fragments.push(key);
            }
        }
    }

    /// Takes note of a SYN that goes on for so many times now.
    fn sent(&mut self, now: Instant, number: u64, times: u32, frame: &[u8]) {
        if times < TIMES && self.sent.len() < MAX_PACKETS {
            let at = now + AGAIN * times;
            let frame = frame.into();
            self.sent.insert((at, number), Sent { frame, times });
        }
    }

    /// Takes a flow out. Returns its frames, in the order they came.
    fn remove(&mut self, number: u64) -> Vec<Box<[u8]>> {
        let Some(gone) = self.flows.remove(&number) else {
            return Vec::new();
        };
        self.numbers.remove(&gone.flow);
        self.heard.remove(&(gone.heard, number));
        for key in &gone.fragments {
            // Another flow may have begun a packet of the same key since.
            if self.fragments.get(key) == Some(&number) {
                self.fragments.remove(key);
            }
        }
        for frame in &gone.frames {
            self.free(gone.flow.client, frame);
        }
        let asked = gone.flow.asked;
        if let Some(line) = self.lines.get_mut(&asked) {
            line.flows.remove(&number);
            let waiting = line.moved.and_then(|moved| self.waiting.get_mut(moved));
            if let Some(waiting) = waiting {
                *waiting -= 1;
            }
            if line.flows.is_empty() {
                self.schedule.remove(&(line.at, asked));
                self.lines.remove(&asked);
            }
        }
        gone.frames
    }

    /// Takes room for a frame, if there is any.
    fn make_room(&mut self, client: Addr, frame: &[u8]) -> Result<(), DropReason> {
        let of_source = self.sources.get(&client.source());
        let of_source = of_source.copied().unwrap_or_default();
        if !self.all.has(1, frame) || !of_source.has(SHARE, frame) {
            return Err(DropReason::HoldFull);
        }
        self.occupy(client, frame);
        Ok(())
    }

    fn occupy(&mut self, client: Addr, frame: &[u8]) {
        self.all.add(frame);
        self.sources.entry(client.source()).or_default().add(frame);
    }

    fn free(&mut self, client: Addr, frame: &[u8]) {
        self.all.remove(frame);
        if let Some(of_source) = self.sources.get_mut(&client.source()) {
            of_source.remove(frame);
            if of_source.packets == 0 {
                self.sources.remove(&client.source());
            }
        }
    }

    /// The move that takes it.
    fn moved(&self, asked: &Asked) -> Option<usize> {
        (self.index).owner(asked.addr.number(), asked.protocol, asked.port)
    }
}

impl Flow {
    fn of(parsed: &Parsed, packet: &[u8]) -> Self {
        let has_port = parsed.kind().has_ports();
        Self {
            client: parsed.src(packet),
            client_port: parsed.src_port(),
            asked: Asked {
                addr: parsed.dst(packet),
                port: has_port.then_some(parsed.dst_port()),
                protocol: parsed.protocol(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::mode::Settled;
    use crate::packet::testing::{Plan, fragments};
    use crate::testing::{all, epoch};
    use proptest::prelude::*;

    const MOVED: &str = "192.0.2.5";
    const SECOND: Duration = Duration::from_secs(1);

    /// A queue, and the time that it is told.
    struct Bed {
        hold: Hold,
        now: Instant,
    }

    impl Bed {
        /// All of these moves are held for a minute.
        fn new(moves: &str) -> Self {
            let moves: Vec<Move> = all(moves);
            let mut bed = Self {
                hold: Hold::new(&moves),
                now: epoch(),
            };
            bed.hold_all(Some(bed.now + 60 * SECOND));
            bed
        }

        fn hold_all(&mut self, held_until: Option<Instant>) {
            let mode = Mode {
                held_until,
                ..Mode::settled(Settled::Moved)
            };
            let modes = vec![mode; self.hold.waiting.len()];
            self.hold.set_modes(&modes);
        }

        fn keep(&mut self, packet: &[u8]) -> Result<bool, DropReason> {
            let parsed = Parsed::parse(packet).unwrap();
            self.hold.keep(self.now, &parsed, &frame(packet))
        }

        /// Packets that go on by now.
        fn take(&mut self) -> Vec<Vec<u8>> {
            let mut frames = Vec::new();
            while self.hold.take(self.now, 16, &mut frames) > 0 {}
            let packets = frames.iter().map(|frame| frame[VNET_HDR_LEN..].to_vec());
            packets.collect()
        }

        /// Packets that go on after this time.
        fn take_after(&mut self, time: Duration) -> Vec<Vec<u8>> {
            self.now += time;
            self.take()
        }

        /// Everything, taken out whenever the queue says. All is answered.
        fn take_all(&mut self) -> Vec<Vec<u8>> {
            let mut out = self.take();
            self.settle();
            while let Some(next) = self.hold.next(self.now) {
                self.now = next;
                out.extend(self.take());
                self.settle();
            }
            out
        }

        /// What went on was answered.
        fn settle(&mut self) {
            self.hold.sent.clear();
        }

        /// Packets that go on again by now, of those which this says wait.
        fn again(&mut self, awaits: impl Fn(&[u8]) -> Awaits) -> Vec<Vec<u8>> {
            let mut frames = Vec::new();
            self.hold.again(self.now, awaits, &mut frames);
            let packets = frames.iter().map(|frame| frame[VNET_HDR_LEN..].to_vec());
            packets.collect()
        }
    }

    fn frame(packet: &[u8]) -> Vec<u8> {
        [&[0; VNET_HDR_LEN], packet].concat()
    }

    fn client(number: u32) -> String {
        std::net::Ipv4Addr::from(0xcb00_7100 + number).to_string()
    }

    fn plan(kind: Kind, number: u32) -> Plan {
        Plan {
            flags: SYN,
            payload: Vec::new(),
            ..Plan::new(kind, &client(number), MOVED)
        }
    }

    fn syn(number: u32) -> Vec<u8> {
        plan(Kind::Tcp, number).build()
    }

    #[test]
    fn what_waits_goes_on_in_order_once_its_hold_ends() {
        let mut bed = Bed::new(MOVED);
        for number in 0..20 {
            assert_eq!(bed.keep(&syn(number)), Ok(number == 0), "{number}");
        }
        assert_eq!(bed.take_after(59 * SECOND), Vec::<Vec<u8>>::new());
        assert_eq!(bed.hold.waiting(), [20]);
        bed.hold_all(None);
        assert_eq!(bed.hold.next(bed.now), Some(bed.now), "at once");
        assert_eq!(bed.take(), (0..20).map(syn).collect::<Vec<_>>());
        assert_eq!((bed.hold.waiting(), bed.hold.is_empty()), (&[0][..], true));
        bed.settle();
        assert_eq!(bed.hold.next(bed.now), None);
    }

    #[test]
    fn a_hold_that_nobody_ends_ends_by_itself() {
        let mut bed = Bed::new(MOVED);
        let end = bed.now + 60 * SECOND;
        bed.keep(&syn(1)).unwrap();
        assert_eq!(bed.hold.next(bed.now), Some(end));
        assert_eq!(bed.take_all(), [syn(1)]);
        assert_eq!(bed.now, end);
        assert_eq!(
            bed.keep(&syn(2)),
            Ok(true),
            "one that was judged just before"
        );
        assert_eq!(bed.take(), [syn(2)]);
    }

    #[test]
    fn only_what_is_no_longer_held_goes_on() {
        let mut bed = Bed::new("192.0.2.5:80 192.0.2.5:443 192.0.2.0/24 2001:db8::/64");
        let to = |port, number| {
            let mut plan = plan(Kind::Tcp, number);
            plan.dst_port = port;
            plan.build()
        };
        for (port, number) in [(80, 1), (443, 2), (25, 3), (443, 4)] {
            bed.keep(&to(port, number)).unwrap();
        }
        let ping = plan(Kind::IcmpQuery, 5).build();
        bed.keep(&ping).unwrap();
        let six = Plan::new(Kind::Udp, "2001:db8:1::1", "2001:db8::5").build();
        bed.keep(&six).unwrap();
        assert_eq!(bed.hold.waiting(), [1, 2, 2, 1]);
        let held = Mode {
            held_until: Some(bed.now + 60 * SECOND),
            ..Mode::settled(Settled::Moved)
        };
        let open = Mode::settled(Settled::Moved);
        bed.hold.set_modes(&[held, open, held, open]);
        let mut out = bed.take();
        out.sort_by_key(|packet| packet[0] >> 4);
        assert_eq!(out, [to(443, 2), to(443, 4), six]);
        assert_eq!(bed.hold.waiting(), [1, 0, 2, 0]);
    }

    #[test]
    fn the_newest_syn_of_a_flow_waits_in_the_place_of_its_first() {
        let mut bed = Bed::new(MOVED);
        let again = |seq| {
            let mut plan = plan(Kind::Tcp, 1);
            plan.seq = seq;
            plan.build()
        };
        for packet in [again(5), syn(2), again(5), again(9)] {
            bed.keep(&packet).unwrap();
        }
        assert_eq!(bed.hold.waiting(), [2]);
        bed.hold_all(None);
        assert_eq!(bed.take(), [again(9), syn(2)]);
    }

    #[test]
    fn a_few_first_datagrams_of_a_flow_wait() {
        let mut bed = Bed::new(MOVED);
        let datagram = |number: u8| {
            let mut plan = plan(Kind::Udp, 1);
            plan.payload = vec![number];
            plan.build()
        };
        for number in 0..MAX_FIRST {
            assert!(bed.keep(&datagram(number)).is_ok());
        }
        let more = bed.keep(&datagram(MAX_FIRST));
        assert_eq!(more, Err(DropReason::HoldFull));
        assert_eq!(bed.hold.waiting(), [1]);
        bed.hold_all(None);
        let all: Vec<_> = (0..MAX_FIRST).map(datagram).collect();
        assert_eq!(bed.take(), all);
    }

    #[test]
    fn later_fragments_wait_with_their_first_one() {
        let mut bed = Bed::new(MOVED);
        let whole = |number| {
            let mut plan = plan(Kind::Udp, number);
            plan.payload = vec![number as u8; 64];
            plan.build()
        };
        let [first, later] = fragments(&whole(1), 16, 7);
        assert_eq!(bed.keep(&later), Err(DropReason::FragmentUnknown));
        bed.keep(&first).unwrap();
        bed.keep(&whole(2)).unwrap();
        assert_eq!(bed.keep(&later), Ok(false));
        bed.hold_all(None);
        assert_eq!(bed.take(), [first, later.clone(), whole(2)]);
        assert_eq!(bed.keep(&later), Err(DropReason::FragmentUnknown));
        assert!(bed.hold.fragments.is_empty());
    }

    #[test]
    fn what_begins_a_flow_that_waits_must_not_overtake_it() {
        let mut bed = Bed::new(MOVED);
        let [first, later] = fragments(
            &Plan {
                payload: vec![0; 64],
                ..plan(Kind::Udp, 2)
            }
            .build(),
            16,
            7,
        );
        bed.keep(&syn(1)).unwrap();
        bed.keep(&first).unwrap();
        let waits =
            |bed: &Bed, packet: &[u8]| bed.hold.waits(&Parsed::parse(packet).unwrap(), packet);
        let with = |flags| {
            Plan {
                flags,
                ..plan(Kind::Tcp, 1)
            }
            .build()
        };
        let others = plan(Kind::Udp, 2).build();
        for (packet, expected) in [
            (&syn(1), true),
            (&others, true),
            (&later, true),
            (&syn(2), false),
            (&with(RST), false),
            (&with(ACK), false),
            (&with(SYN | ACK), false),
        ] {
            assert_eq!(waits(&bed, packet), expected, "{packet:?}");
        }
        bed.hold_all(None);
        assert_eq!(bed.take().len(), 2);
        assert!(!waits(&bed, &syn(1)) && !waits(&bed, &others) && !waits(&bed, &later));
    }

    #[test]
    fn a_client_that_gives_up_waits_no_longer() {
        let mut bed = Bed::new(MOVED);
        bed.keep(&syn(1)).unwrap();
        bed.keep(&syn(2)).unwrap();
        let mut ends = |number, flags, seq| {
            let mut plan = plan(Kind::Tcp, number);
            (plan.flags, plan.seq) = (flags, seq);
            let packet = plan.build();
            bed.hold.withdraw(&Parsed::parse(&packet).unwrap(), &packet)
        };
        assert_eq!(ends(1, RST, 999), 0, "a guess");
        assert_eq!(ends(1, RST | ACK, 1_002), 0);
        assert_eq!(ends(1, ACK, 1_001), 0);
        assert_eq!(ends(3, RST, 1_001), 0, "nobody's");
        assert_eq!(ends(1, RST | ACK, 1_001), 1);
        assert_eq!(ends(1, RST, 1_001), 0, "gone");
        bed.hold_all(None);
        assert_eq!(bed.take(), [syn(2)]);
    }

    #[test]
    fn who_has_been_silent_for_too_long_is_forgotten() {
        let mut bed = Bed::new(MOVED);
        bed.hold_all(Some(bed.now + 600 * SECOND));
        bed.keep(&syn(1)).unwrap();
        bed.keep(&syn(2)).unwrap();
        assert_eq!(bed.hold.next(bed.now), Some(bed.now + PATIENCE));
        bed.now += PATIENCE - SECOND;
        assert_eq!(bed.hold.expire(bed.now), None);
        bed.keep(&syn(2)).unwrap();
        bed.now += SECOND;
        assert_eq!(bed.hold.expire(bed.now), Some(1));
        assert_eq!(bed.hold.expire(bed.now), None);
        bed.hold_all(None);
        assert_eq!(bed.take(), [syn(2)]);
    }

    #[test]
    fn a_line_goes_on_at_a_pace_and_no_line_waits_for_another() {
        let mut bed = Bed::new("192.0.2.0/24");
        let web: Vec<_> = (0..2_000).map(syn).collect();
        let mail = |number| {
            let mut plan = plan(Kind::Tcp, number);
            plan.dst_port = 25;
            plan.build()
        };
        for packet in web.iter().cloned().chain((0..3).map(mail)) {
            bed.keep(&packet).unwrap();
        }
        bed.hold_all(None);
        let mut out = bed.take();
        assert_eq!(out.len(), AT_ONCE + 3);
        out.retain(|packet| packet[22..24] == 80u16.to_be_bytes());
        // Between two looks.
        assert_eq!(bed.take_after(STEP / 2), Vec::<Vec<u8>>::new());
        let some = bed.take_after(5 * STEP);
        assert_eq!(some.len(), 5);
        out.extend(some);
        // Nobody looked for a while: it makes up for some of that, and not for all.
        let late = bed.take_after(SECOND);
        let most = (SLACK.as_micros() / STEP.as_micros()) as usize;
        assert!((most..=most + 1).contains(&late.len()), "{}", late.len());
        out.extend(late);
        let begun = bed.now;
        out.extend(bed.take_all());
        assert!(bed.now - begun <= STEP * 2_000);
        assert_eq!(out, web);
    }

    #[test]
    fn a_syn_that_is_not_answered_goes_on_again_a_few_times() {
        let mut bed = Bed::new(MOVED);
        for number in 0..3 {
            bed.keep(&syn(number)).unwrap();
        }
        let datagram = plan(Kind::Udp, 1).build();
        bed.keep(&datagram).unwrap();
        bed.hold_all(None);
        assert_eq!(bed.take().len(), 4);
        let begun = bed.now;
        let mut seen = Vec::new();
        while let Some(next) = bed.hold.next(bed.now) {
            bed.now = next;
            // The first one is answered at once, the next one after it went on again.
            let (one, two) = (syn(0), syn(1));
            let late = bed.now > begun + AGAIN;
            let again = bed.again(|packet| match packet != one && !(late && packet == two) {
                true => Awaits::Answer,
                false => Awaits::Nothing,
            });
            seen.extend(again.into_iter().map(|packet| (bed.now - begun, packet)));
        }
        let expected = [
            (AGAIN, syn(1)),
            (AGAIN, syn(2)),
            (AGAIN * 3, syn(2)),
            (AGAIN * 6, syn(2)),
        ];
        assert_eq!(seen, expected);
    }

    #[test]
    fn a_syn_goes_on_again_as_long_as_somebody_may_yet_answer() {
        let mut bed = Bed::new(MOVED);
        bed.keep(&syn(0)).unwrap();
        bed.hold_all(None);
        assert_eq!(bed.take().len(), 1);
        let begun = bed.now;
        let mut seen = Vec::new();
        while let Some(next) = bed.hold.next(bed.now) {
            bed.now = next;
            let awaits = match bed.now < begun + AGAIN * 20 {
                true => Awaits::Chance,
                false => Awaits::Nothing,
            };
            seen.extend(bed.again(|_| awaits).iter().map(|_| bed.now - begun));
        }
        let expected = [1, 3, 6, 9, 12, 15, 18].map(|times| AGAIN * times);
        assert_eq!(seen, expected);
    }

    #[test]
    fn a_flood_is_over_in_time() {
        let mut bed = Bed::new(MOVED);
        let count = 60_000;
        for number in 0..count {
            bed.keep(&syn(number)).unwrap();
        }
        bed.hold_all(None);
        let begun = bed.now;
        assert_eq!(bed.take_all().len(), count as usize);
        assert!(bed.now - begun <= WITHIN);
    }

    #[test]
    fn a_hold_that_begins_anew_keeps_what_has_not_gone_on() {
        let mut bed = Bed::new(MOVED);
        for number in 0..100 {
            bed.keep(&syn(number)).unwrap();
        }
        bed.hold_all(None);
        let mut out = bed.take();
        bed.settle();
        bed.hold_all(None);
        assert_eq!(bed.take(), Vec::<Vec<u8>>::new(), "said twice");
        let end = bed.now + 30 * SECOND;
        bed.hold_all(Some(end));
        bed.keep(&syn(100)).unwrap();
        assert_eq!(bed.take_after(29 * SECOND), Vec::<Vec<u8>>::new());
        assert_eq!(bed.hold.next(bed.now), Some(end));
        out.extend(bed.take_all());
        assert_eq!(out, (0..=100).map(syn).collect::<Vec<_>>());
    }

    #[test]
    fn one_source_does_not_take_the_room_of_others() {
        let mut bed = Bed::new(MOVED);
        let from_one = |at: u32| {
            let mut plan = plan(Kind::Tcp, 9);
            (plan.src_port, plan.dst_port) = (at as u16, 80 + (at >> 16) as u16);
            plan.build()
        };
        let share = (MAX_PACKETS / SHARE) as u32;
        for at in 0..share {
            assert!(bed.keep(&from_one(at)).is_ok(), "{at}");
        }
        assert_eq!(bed.keep(&from_one(share)), Err(DropReason::HoldFull));
        assert!(bed.keep(&from_one(0)).is_ok(), "it waits already");
        for at in share..MAX_PACKETS as u32 {
            assert!(bed.keep(&syn(at)).is_ok(), "{at}");
        }
        assert_eq!(bed.keep(&syn(0)), Err(DropReason::HoldFull));
        let long = Plan {
            payload: vec![0; 60_000],
            ..plan(Kind::Udp, 7)
        };
        let mut bed = Bed::new(MOVED);
        let kept = |bed: &mut Bed, client| {
            let mut plan = long.clone();
            plan.src = client;
            let packet = |port| Plan {
                src_port: port,
                ..plan.clone()
            };
            (1..1_000)
                .take_while(|&port| bed.keep(&packet(port).build()).is_ok())
                .count()
        };
        let each = MAX_BYTES / SHARE / (60_000 + 28 + VNET_HDR_LEN);
        for (last, count) in [(1, each), (2, each), (3, each), (4, each)] {
            assert_eq!(kept(&mut bed, [203, 0, 113, last].into()), count);
        }
        assert!(kept(&mut bed, [203, 0, 113, 5].into()) <= 4);
    }

    /// What comes of a client: a kind, who it is, which port it asks for, and its size.
    fn packets() -> impl Strategy<Value = Vec<u8>> {
        (0u8..4, 0u32..6, 0u16..3, 0usize..60).prop_map(|(kind, number, port, size)| {
            let kind = [Kind::Tcp, Kind::Udp, Kind::IcmpQuery, Kind::Udp][usize::from(kind)];
            let mut plan = plan(kind, number);
            plan.dst_port = if kind == Kind::IcmpQuery {
                0
            } else {
                80 + port
            };
            plan.payload = vec![port as u8; size];
            plan.build()
        })
    }

    #[derive(Clone, Debug)]
    enum Step {
        Keep(Vec<u8>),
        Fragment(Vec<u8>, u8, bool),
        Held(Vec<bool>),
        Pass(u64),
        Expire,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            8 => packets().prop_map(Step::Keep),
            2 => (packets(), 0u8..3, any::<bool>())
                .prop_map(|(packet, id, later)| Step::Fragment(packet, id, later)),
            1 => prop::collection::vec(any::<bool>(), 3).prop_map(Step::Held),
            2 => (0u64..3_000).prop_map(Step::Pass),
            1 => Just(Step::Expire),
        ];
        prop::collection::vec(step, 0..120)
    }

    proptest! {
        /// Whatever comes, accounts are right, nothing that is held goes on, and everything that
        /// was kept goes on once or is accounted for: as replaced, or as forgotten.
        #[test]
        fn nothing_is_lost_and_nothing_held_goes_on(steps in steps()) {
            let mut bed = Bed::new("192.0.2.5:80 192.0.2.5:81/udp 192.0.2.5");
            bed.hold_all(Some(bed.now + 36_000 * SECOND));
            let (mut kept, mut gone, mut replaced) = (0, 0, 0);
            let mut held = vec![true; 3];
            for step in steps {
                match step {
                    Step::Keep(packet) => {
                        let before = bed.hold.all.packets;
                        if bed.keep(&packet).is_ok() {
                            kept += 1;
                            replaced += before + 1 - bed.hold.all.packets;
                        }
                    }
                    Step::Fragment(packet, id, later) => {
                        if packet.len() < 60 {
                            continue;
                        }
                        let packet = &fragments(&packet, 24, id)[usize::from(later)];
                        let before = bed.hold.all.packets;
                        if Parsed::parse(packet).is_ok() && bed.keep(packet).is_ok() {
                            kept += 1;
                            replaced += before + 1 - bed.hold.all.packets;
                        }
                    }
                    Step::Held(now) => {
                        let mode = |&held: &bool| Mode {
                            held_until: held.then_some(bed.now + 36_000 * SECOND),
                            ..Mode::settled(Settled::Moved)
                        };
                        bed.hold.set_modes(&now.iter().map(mode).collect::<Vec<_>>());
                        held = now;
                    }
                    Step::Pass(millis) => {
                        let before: Vec<u64> = bed.hold.waiting().to_vec();
                        gone += bed.take_after(Duration::from_millis(millis)).len();
                        for (at, _) in held.iter().enumerate().filter(|(_, held)| **held) {
                            prop_assert_eq!(bed.hold.waiting()[at], before[at]);
                        }
                    }
                    Step::Expire => {
                        bed.now += PATIENCE / 2;
                        while let Some(count) = bed.hold.expire(bed.now) {
                            gone += count;
                        }
                    }
                }
                let hold = &bed.hold;
                let frames = hold.flows.values().flat_map(|it| &it.frames);
                let all = frames.fold(Room::default(), |mut all, frame| { all.add(frame); all });
                prop_assert_eq!(hold.all, all);
                prop_assert_eq!(kept, gone + replaced + all.packets);
                let of_sources = hold.sources.values().map(|it| it.packets).sum::<usize>();
                prop_assert_eq!(of_sources, all.packets);
                let flows = hold.flows.len();
                prop_assert_eq!(hold.waiting().iter().sum::<u64>(), flows as u64);
                prop_assert_eq!((hold.numbers.len(), hold.heard.len()), (flows, flows));
                let lined = hold.lines.values().map(|it| it.flows.len()).sum::<usize>();
                prop_assert_eq!(lined, flows);
                prop_assert!(hold.lines.values().all(|it| !it.flows.is_empty()));
                prop_assert_eq!(hold.schedule.len(), hold.lines.len());
                prop_assert!(hold.flows.values().all(|it| it.first <= MAX_FIRST));
            }
            bed.hold_all(None);
            gone += bed.take_all().len();
            prop_assert_eq!(kept, gone + replaced);
            prop_assert!(bed.hold.is_empty() && bed.hold.fragments.is_empty());
            prop_assert!(bed.hold.sources.is_empty() && bed.hold.schedule.is_empty());
        }

        /// Of those who ask for the same, nobody overtakes another, and no more go on in a time
        /// than the pace allows.
        #[test]
        fn a_line_keeps_its_order_and_its_pace(
            count in 1u32..300, pauses in prop::collection::vec(0u64..40, 1..200),
        ) {
            let mut bed = Bed::new(MOVED);
            for number in 0..count {
                bed.keep(&syn(number)).unwrap();
            }
            bed.hold_all(None);
            let mut out = bed.take();
            let begun = bed.now;
            for millis in pauses {
                out.extend(bed.take_after(Duration::from_millis(millis)));
                let steps = (bed.now - begun).as_micros() / STEP.as_micros();
                prop_assert!(out.len() <= AT_ONCE + 1 + steps as usize);
            }
            out.extend(bed.take_all());
            prop_assert_eq!(out, (0..count).map(syn).collect::<Vec<_>>());
        }
    }

    #[test]
    fn other_moves_let_go_what_is_no_longer_theirs_and_keep_the_rest() {
        let other = "192.0.2.6";
        let to_other = |number| {
            Plan {
                flags: SYN,
                payload: Vec::new(),
                ..Plan::new(Kind::Tcp, &client(number), other)
            }
            .build()
        };
        let mut bed = Bed::new("192.0.2.5 192.0.2.6");
        for number in 0..3 {
            bed.keep(&syn(number)).unwrap();
            bed.keep(&to_other(number)).unwrap();
        }
        assert_eq!(bed.hold.waiting(), [3, 3]);
        // The second is the first of those that are left.
        bed.hold.set_moves(&all::<Move>("192.0.2.6 192.0.2.7"));
        assert_eq!(bed.hold.waiting(), [3, 0]);
        assert_eq!(bed.take().len(), 3, "those to what has not moved go on");
        bed.hold_all(Some(bed.now + 60 * SECOND));
        assert!(bed.take_after(SECOND).is_empty());
        bed.hold_all(None);
        assert_eq!(bed.take(), (0..3).map(to_other).collect::<Vec<_>>());
    }
}
