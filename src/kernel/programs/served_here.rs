//! Who is served by the old server itself, while not everything is moved: what there is to know of
//! each conversation goes to the daemon, which lists who still comes.
//!
//! Owns two programs and their memory. Both go on where another one ends that lets a packet pass
//! ([`stays`](super::stays), [`note_own`](super::note_own())), and only where some move is not in
//! mode `moved`, so that nothing is slower otherwise. They change nothing about any packet.
//!
//! ```text
//! came      struct { u64 told; u32 looks; u32 pad; }
//!           clients' conversations: when the daemon was told last; or FOREIGN, of what this host
//!           has begun itself
//! records   struct { u64 at; u32 flags; u32 captured; u8 packet[]; }: a ring
//! counts    u32 openings, u32 lost
//!
//! ingress:  parse();                                       // later, quoted, other: pass
//!           if (SYN) { openings++; pass; }
//!           if (!(c = lookup(came, key))) {
//!               if (!TCP) pass;                            // see egress
//!               s = skc_lookup_tcp(); if (!s || it is not established) pass;
//!               c = update(came, key, somebody listens at the port ? now : FOREIGN);
//!           }
//!           if (FOREIGN) pass;
//!           if (FIN || RST || looks++ < LOOKS || now - told > TOLD) tell, as FIRST if never told;
//! egress:   // the first answer to a client without TCP
//!           parse(); update(came, key, now); tell, as ANSWER and FIRST;
//! ```
//!
//! * Of TCP only what is established counts: whoever forges a source leaves no trace but a count.
//!   Connections of hosts behind this one are entered by [`stays`](super::stays), once a client has
//!   acknowledged what such a host has sent.
//! * Without TCP a conversation is a client's if it was asked before it was answered, which
//!   [`own`](super::own) knows.
//! * A ring that is full is counted, and delays nothing.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;
use std::time::Duration;

use Reg::{R0, R1, R2, R3, R4, R7, R9, R10};

use super::flows::{KEY_LAST, VALUE, enter, look_up};
use super::headers::{ipv4, ipv6, skb, sock, tcp_sock};
use super::parse::{FLAGS, Side, Ways, key_of_other_query, load_syn, parse};
use super::phrases::{PACKET, PROTOCOL, TC_ACT_UNSPEC, branch_by_family, keep_packet, verdict};
use super::sockets::{look_up_socket, release_keeping_state};
use crate::kernel::bpf::{
    Alu, Assembler, BpfError, Helper, If, Label, Map, MapKind, Program, Reg, Ring, Shape, Size,
    Words,
};
use crate::model::moved::TCP;
use crate::packet::{FIN, RST, SYN};

/// Conversations of which it is known when they were told of. The one used least recently gives
/// way, and is told of anew; 65,536 take some 8 MB of kernel memory.
const MAX_CAME: u32 = 65_536;

/// Bytes of records that wait for the daemon, which reads them once in [`READ_EVERY`]: of a
/// thousand new connections, with the first bytes of each.
const RING: u32 = 4 << 20;

/// How often the daemon should read.
pub const READ_EVERY: Duration = Duration::from_millis(100);

/// So often a conversation that goes on is told of.
const TOLD: Duration = Duration::from_secs(4);

/// Packets of a client that are told of before that: the first bytes are in them.
const LOOKS: i32 = 4;

/// Bytes of a packet that a record has: headers alone, or the first bytes of a connection as well.
const SMALL: i32 = 128;
const LARGE: i32 = 2_048;

/// Segments that a connection has received, at most, when it is seen for the first time, unless it
/// is older than this memory.
const YOUNG: i32 = 4;

/// In place of the time: this host has begun it.
const FOREIGN: i32 = -1;

const KEY_BYTES: usize = 40;
const CAME_BYTES: usize = 16;
const CAME: Shape = Shape {
    kind: MapKind::LruHash,
    name: "ipmoved_came",
    key_size: KEY_BYTES,
    value_size: CAME_BYTES,
    max_entries: MAX_CAME,
};
const PROGRAMS: Shape = Shape {
    kind: MapKind::Programs,
    name: "ipmoved_served",
    key_size: size_of::<u32>(),
    value_size: size_of::<u32>(),
    max_entries: 4,
};

/// Where the parts of a value lie in it.
const CAME_TOLD: i16 = 0;
const CAME_LOOKS: i16 = 8;

/// Where the parts of a record lie in it.
const RECORD_AT: i16 = 0;
const RECORD_FLAGS: i16 = 8;
const RECORD_CAPTURED: i16 = 12;
const RECORD_PACKET: i16 = 16;

/// The flags of a record.
const FIRST: i32 = 1;
const ANSWER: i32 = 2;

/// The words.
const OPENINGS: usize = 0;
const LOST: usize = 1;

/// `BPF_RB_NO_WAKEUP`: the daemon looks by itself.
const NO_WAKEUP: i32 = 1;

/// Where the stack keeps what the record's flags will be, whether it is large, and the ports.
const FLAGS_KEPT: i16 = -280;
const LARGE_KEPT: i16 = -284;
const SEGMENTS: i16 = -288;
const PORTS_KEPT: i16 = -292;

/// An entry of a map, a socket or a record, once the packet is read.
const FOUND: Reg = R7;

/// Bytes of the packet that the record has.
const CAPTURED: Reg = R9;

/// The ends of a link at which a program goes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum End {
    Ingress,
    Egress,
}

/// What the programs tell of one packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Served<'a> {
    /// When it passed, on the clock of [`now`](super::now).
    pub at: Duration,
    /// It is this host's answer; else the client has sent it.
    pub is_answer: bool,
    /// It is the first of its conversation.
    pub is_first: bool,
    /// The packet's first bytes, from the IP header on.
    pub head: &'a [u8],
}

/// The memory of both programs, and the programs while they are in the kernel.
#[derive(Debug)]
pub struct ServedHere {
    came: Map,
    ring: Ring,
    counts: Words,
    programs: Map,
    state: Mutex<State>,
}

/// What the daemon has set, and what it has read.
#[derive(Debug, Default)]
struct State {
    /// Each with its place.
    loaded: Vec<(u32, OwnedFd)>,
    on: bool,
    read: [u32; 2],
}

impl ServedHere {
    /// An empty memory, or one with what an earlier daemon has told.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(super) fn new(find: impl FnOnce(Shape) -> Option<Map>) -> Result<Self, BpfError> {
        Ok(Self {
            came: match find(CAME) {
                Some(map) => map,
                None => Map::new(CAME)?,
            },
            ring: Ring::new("ipmoved_records", RING)?,
            counts: Words::new("ipmoved_count", 2)?,
            programs: Map::new(PROGRAMS)?,
            state: Mutex::default(),
        })
    }

    /// What outlives the daemon.
    pub(super) fn lasting(&self) -> BorrowedFd<'_> {
        self.came.as_fd()
    }

    /// Loads the programs for links with these link-layer headers, unless they are there. They do
    /// nothing yet.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn load(&self, l2_headers: &[u32]) -> Result<(), BpfError> {
        let mut state = self.state.lock().unwrap_or_else(|held| held.into_inner());
        if !state.loaded.is_empty() {
            return Ok(());
        }
        for &l2 in l2_headers {
            for end in [End::Ingress, End::Egress] {
                let program = served_here(self, l2, end)?.load()?;
                state.loaded.push((place(l2, end) as u32, program));
            }
        }
        Ok(())
    }

    /// From now on the programs tell who comes, or no longer do.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set(&self, on: bool) -> Result<(), BpfError> {
        let mut state = self.state.lock().unwrap_or_else(|held| held.into_inner());
        if state.on == on {
            return Ok(());
        }
        for (place, program) in &state.loaded {
            let key = place.to_ne_bytes();
            let done = match on {
                true => self.programs.insert_fd(&key, program.as_fd()),
                false => self.programs.remove(&key),
            };
            done.map_err(BpfError::of_map(PROGRAMS.name))?;
        }
        state.on = on;
        Ok(())
    }

    /// Reads what the programs have told since the last time. Returns how many connections have
    /// begun since, and how much was lost since the ring was full.
    pub fn take(&self, mut each: impl FnMut(Served<'_>)) -> [u64; 2] {
        let mut state = self.state.lock().unwrap_or_else(|held| held.into_inner());
        self.ring.read(|record| each_of(record, &mut each));
        let counts = [OPENINGS, LOST].map(|at| self.counts.get(at));
        let before = std::mem::replace(&mut state.read, counts);
        [0, 1].map(|at| u64::from(counts[at].wrapping_sub(before[at])))
    }

    /// Goes on with one of these programs, if there is one; goes on here otherwise.
    pub(super) fn go_on(&self, a: &mut Assembler, l2: u32, end: End) {
        a.mov(R1, PACKET);
        a.load_map(R2, self.programs.as_fd());
        a.mov(R3, place(l2, end));
        a.call(Helper::TailCall);
    }

    /// Enters the conversation with this key as a client's, of which nothing was told yet.
    pub(super) fn enter_client(&self, a: &mut Assembler) {
        a.store(Size::Dw, R10, VALUE + CAME_TOLD, 0);
        a.store(Size::Dw, R10, VALUE + CAME_LOOKS, 0);
        enter(a, &self.came);
    }

    fn count(&self, a: &mut Assembler, word: usize) {
        a.load_address(R1, self.counts.as_fd(), Words::offset(word));
        a.mov(R2, 1);
        a.add_word_atomically(R1, 0, R2);
    }
}

/// Where a program lies among those that others go on with.
fn place(l2: u32, end: End) -> i32 {
    i32::from(l2 != 0) * 2 + i32::from(end == End::Egress)
}

/// Takes a record apart.
fn each_of(record: &[u8], each: &mut impl FnMut(Served<'_>)) {
    let word = |at: i16| {
        let bytes = record.get(at as usize..)?.first_chunk()?;
        Some(u32::from_ne_bytes(*bytes))
    };
    let (Some(at), Some(flags), Some(captured)) = (
        record.first_chunk().map(|&bytes| u64::from_ne_bytes(bytes)),
        word(RECORD_FLAGS),
        word(RECORD_CAPTURED),
    ) else {
        return;
    };
    let packet = RECORD_PACKET as usize;
    if let Some(head) = record.get(packet..packet + captured as usize) {
        each(Served {
            at: Duration::from_nanos(at),
            is_answer: flags & ANSWER as u32 != 0,
            is_first: flags & FIRST as u32 != 0,
            head,
        });
    }
}

/// The program for this end of links with such a link-layer header.
///
/// # Errors
/// If the program is too large.
pub(super) fn served_here(maps: &ServedHere, l2: u32, end: End) -> Result<Program, BpfError> {
    let (mut asm, side) = match end {
        End::Ingress => (Assembler::arriving(l2), Side::Remote),
        End::Egress => (Assembler::new(), Side::Own),
    };
    let a = &mut asm;
    let (ways, done) = (Ways::new(a), a.label());
    keep_packet(a);
    parse(a, l2, side, ways);
    a.bind(ways.none);
    key_of_other_query(a, side, ways.flow);
    a.jump(done);
    a.bind(ways.flow);
    match end {
        End::Ingress => look_at_clients(a, maps, l2, done),
        End::Egress => {
            a.jump_if(PROTOCOL, If::Eq, i32::from(TCP), done);
            a.store(Size::W, R10, FLAGS_KEPT, FIRST | ANSWER);
            a.store(Size::W, R10, LARGE_KEPT, 0);
            enter_told(a, maps);
            tell(a, maps, l2, done);
        }
    }
    for label in [ways.later, ways.quoted, ways.other, done] {
        a.bind(label);
    }
    verdict(a, TC_ACT_UNSPEC);
    asm.finish("ipmoved_served")
}

fn look_at_clients(a: &mut Assembler, maps: &ServedHere, l2: u32, done: Label) {
    let (known, begins, tells) = (a.label(), a.label(), a.label());
    load_syn(a);
    a.jump_if(R0, If::Eq, i32::from(SYN), begins);
    look_up(a, &maps.came);
    a.jump_if_wide(R0, If::Ne, 0, known);
    a.jump_if(PROTOCOL, If::Ne, i32::from(TCP), done);
    look_at_socket(a, maps, tells, done);

    a.bind(begins);
    maps.count(a, OPENINGS);
    a.jump(done);

    // FLAGS_KEPT, LARGE_KEPT and what is in the map, of one that is known.
    a.bind(known);
    let (told_before, looks, now, large) = (a.label(), a.label(), a.label(), a.label());
    a.mov(FOUND, R0);
    a.store(Size::W, R10, FLAGS_KEPT, FIRST);
    a.store(Size::W, R10, LARGE_KEPT, 0);
    a.load(Size::Dw, R1, FOUND, CAME_TOLD);
    a.jump_if_wide(R1, If::Eq, FOREIGN, done);
    a.jump_if_wide(R1, If::Eq, 0, looks);
    a.bind(told_before);
    a.store(Size::W, R10, FLAGS_KEPT, 0);
    a.load(Size::W, R0, R10, FLAGS);
    a.jump_if(R0, If::Set, i32::from(FIN | RST), now);
    a.bind(looks);
    a.load(Size::W, R0, FOUND, CAME_LOOKS);
    a.jump_if(R0, If::Lt, LOOKS, large);
    a.call(Helper::KtimeGetNs);
    a.load(Size::Dw, R1, FOUND, CAME_TOLD);
    a.mov_wide(R2, TOLD.as_nanos() as u64);
    a.alu(Alu::Add, R1, R2);
    a.jump_if_wide(R1, If::Gt, R0, done);
    a.jump(now);
    a.bind(large);
    a.alu(Alu::Add, R0, 1);
    a.store(Size::W, FOUND, CAME_LOOKS, R0);
    a.store(Size::W, R10, LARGE_KEPT, 1);
    a.bind(now);
    a.call(Helper::KtimeGetNs);
    a.store(Size::Dw, FOUND, CAME_TOLD, R0);
    a.bind(tells);
    tell(a, maps, l2, done);
}

/// Enters a connection that is new, by the socket that has it. Jumps to `tells` if it is a client's
/// and to `done` if it is none, or is not established.
fn look_at_socket(a: &mut Assembler, maps: &ServedHere, tells: Label, done: Label) {
    let (release, client, foreign, young) = (a.label(), a.label(), a.label(), a.label());
    a.store(Size::W, R10, SEGMENTS, -1);
    look_up_socket(a, Helper::SkcLookupTcp);
    a.jump_if_wide(R0, If::Eq, 0, done);
    a.mov(FOUND, R0);
    a.mov(R1, FOUND);
    a.call(Helper::TcpSock);
    // What stands for a connection that is opening, or was closed, is no whole socket.
    a.jump_if_wide(R0, If::Eq, 0, release);
    a.load(Size::W, R0, R0, tcp_sock::SEGS_IN);
    a.store(Size::W, R10, SEGMENTS, R0);
    a.bind(release);
    a.mov(R0, FOUND);
    release_keeping_state(a, FOUND);
    a.load(Size::W, R0, R10, SEGMENTS);
    a.jump_if(R0, If::Eq, -1, done);
    let established = a.label();
    for state in [sock::ESTABLISHED].into_iter().chain(sock::HALF_CLOSED) {
        a.jump_if(FOUND, If::Eq, state, established);
    }
    a.jump(done);

    // Whoever connects to a port where nobody listens was called from there.
    a.bind(established);
    a.load(Size::W, R0, R10, KEY_LAST);
    a.store(Size::W, R10, PORTS_KEPT, R0);
    a.store(Size::H, R10, KEY_LAST, 0);
    look_up_socket(a, Helper::SkcLookupTcp);
    a.load(Size::W, R1, R10, PORTS_KEPT);
    a.store(Size::W, R10, KEY_LAST, R1);
    a.jump_if_wide(R0, If::Eq, 0, foreign);
    release_keeping_state(a, FOUND);
    a.jump_if(FOUND, If::Eq, sock::LISTEN, client);
    a.bind(foreign);
    a.mov(R0, FOREIGN);
    a.store(Size::Dw, R10, VALUE + CAME_TOLD, R0);
    a.store(Size::Dw, R10, VALUE + CAME_LOOKS, 0);
    enter(a, &maps.came);
    a.jump(done);

    a.bind(client);
    a.store(Size::W, R10, FLAGS_KEPT, FIRST);
    a.load(Size::W, R0, R10, SEGMENTS);
    a.jump_if(R0, If::Le, YOUNG, young);
    a.store(Size::W, R10, FLAGS_KEPT, 0);
    a.bind(young);
    a.store(Size::W, R10, LARGE_KEPT, 1);
    enter_told(a, maps);
    a.jump(tells);
}

/// Enters the conversation as told of now, and looked at once.
fn enter_told(a: &mut Assembler, maps: &ServedHere) {
    a.store(Size::Dw, R10, VALUE + CAME_LOOKS, 0);
    a.store(Size::W, R10, VALUE + CAME_LOOKS, 1);
    a.call(Helper::KtimeGetNs);
    a.store(Size::Dw, R10, VALUE + CAME_TOLD, R0);
    enter(a, &maps.came);
}

/// Hands the packet's first bytes to the daemon, and jumps to `done`.
fn tell(a: &mut Assembler, maps: &ServedHere, l2: u32, done: Label) {
    let (small, large, lost) = (a.label(), a.label(), a.label());
    let (fits, whole) = (a.label(), a.label());
    load_length(a, l2);
    // The kernel wants to see the bounds of a length on each way.
    a.load(Size::W, R0, R10, LARGE_KEPT);
    a.jump_if(R0, If::Ne, 0, large);
    a.bind(small);
    a.jump_if_wide(CAPTURED, If::Le, SMALL, fits);
    a.mov(CAPTURED, SMALL);
    a.bind(fits);
    hand_over(a, maps, l2, SMALL, lost, done);
    a.bind(large);
    a.jump_if_wide(CAPTURED, If::Le, SMALL, small);
    a.jump_if_wide(CAPTURED, If::Le, LARGE, whole);
    a.mov(CAPTURED, LARGE);
    a.bind(whole);
    hand_over(a, maps, l2, LARGE, lost, done);
    a.bind(lost);
    maps.count(a, LOST);
    a.jump(done);
}

/// Loads the packet's length into CAPTURED, from its IP header on. Without a link-layer header the
/// kernel's own length may count from a tunnel's headers before that, so that the packet's is
/// asked.
fn load_length(a: &mut Assembler, l2: u32) {
    a.load(Size::W, CAPTURED, PACKET, skb::LEN);
    if l2 != 0 {
        a.alu(Alu::Sub, CAPTURED, l2);
        return;
    }
    let (v6, told, done) = (a.label(), a.label(), a.label());
    branch_by_family(a, v6, done);
    a.load_packet(Size::H, ipv4::TOTAL_LENGTH);
    a.jump(told);
    a.bind(v6);
    a.load_packet(Size::H, ipv6::PAYLOAD_LENGTH);
    a.alu(Alu::Add, R0, ipv6::LEN);
    a.bind(told);
    a.jump_if_wide(R0, If::Gt, CAPTURED, done);
    a.mov(CAPTURED, R0);
    a.bind(done);
}

/// The same in a record with room for so many bytes.
fn hand_over(a: &mut Assembler, maps: &ServedHere, l2: u32, room: i32, lost: Label, done: Label) {
    let failed = a.label();
    a.jump_if_wide(CAPTURED, If::Lt, 1, done);
    a.load_map(R1, maps.ring.as_fd());
    a.mov(R2, i32::from(RECORD_PACKET) + room);
    a.mov(R3, 0);
    a.call(Helper::RingReserve);
    a.jump_if_wide(R0, If::Eq, 0, lost);
    a.mov(FOUND, R0);
    a.call(Helper::KtimeGetNs);
    a.store(Size::Dw, FOUND, RECORD_AT, R0);
    a.load(Size::W, R0, R10, FLAGS_KEPT);
    a.store(Size::W, FOUND, RECORD_FLAGS, R0);
    a.store(Size::W, FOUND, RECORD_CAPTURED, CAPTURED);
    a.mov(R1, PACKET);
    a.mov(R2, l2);
    a.mov(R3, FOUND);
    a.alu(Alu::Add, R3, i32::from(RECORD_PACKET));
    a.mov(R4, CAPTURED);
    a.load_packet_bytes();
    a.jump_if_wide(R0, If::Ne, 0, failed);
    a.mov(R1, FOUND);
    a.mov(R2, NO_WAKEUP);
    a.call(Helper::RingSubmit);
    a.jump(done);
    a.bind(failed);
    a.mov(R1, FOUND);
    a.mov(R2, NO_WAKEUP);
    a.call(Helper::RingDiscard);
    a.jump(done);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::bpf::test_run::nanoseconds;
    use crate::kernel::programs::testing::{L2, OldServer, Packet, ago, frame, moves, ports, tcp};
    use crate::kernel::programs::{Facts, now};
    use crate::kernel::testing::{capabilities_of_the_unit, in_fresh_namespace, keep_only};
    use crate::model::mode::{Mode, Settled, ShareKey};
    use crate::model::moved::UDP;
    use crate::packet::ACK;

    const ENDS: [(&str, &str); 2] = [
        ("192.0.2.5", "203.0.113.7"),
        ("2001:db8:a::5", "2001:db8:c::7"),
    ];

    /// From which two whole addresses are to move, and which tells whom it serves itself.
    fn old_server(settled: Settled) -> OldServer {
        let facts = Facts::new(&moves(&ENDS.map(|it| it.0))).expect("run the tests as root");
        facts.own.begin_at(Duration::ZERO);
        facts.beat().unwrap();
        let modes = vec![Mode::settled(settled); ENDS.len()];
        // For long: the daemon is not asked any more.
        let since = ago(Duration::from_secs(1_000));
        facts.modes.set_at(&modes, ShareKey([1, 2]), since).unwrap();
        facts.served().load(&[0, L2]).unwrap();
        facts.served().set(true).unwrap();
        OldServer::new(facts)
    }

    /// What was told: whether it is an answer, and the first, and how long the packet's head is.
    fn told(old: &OldServer) -> Vec<(bool, bool, usize)> {
        let mut all = Vec::new();
        let counts = old.facts.served().take(|it| {
            assert!(it.at <= now());
            all.push((it.is_answer, it.is_first, it.head.len()));
        });
        assert_eq!(counts[1], 0, "nothing is lost");
        all
    }

    #[test]
    fn the_kernel_takes_both_programs_with_what_the_unit_leaves() {
        in_fresh_namespace(|| {
            let served = ServedHere::new(|_| None).unwrap();
            keep_only(capabilities_of_the_unit());
            served.load(&[0, L2]).unwrap();
            for on in [true, false, true] {
                served.set(on).unwrap();
            }
        });
    }

    #[test]
    fn a_client_without_tcp_is_told_of_once_it_is_answered() {
        in_fresh_namespace(|| {
            let old = old_server(Settled::Here);
            for (moved, client) in ENDS {
                let header = if moved.contains('.') { 20 } else { 40 };
                let asks = Packet::new(client, moved, UDP, ports(4_000, 53));
                let answers = Packet::new(moved, client, UDP, ports(53, 4_000));
                assert!(!old.is_taken(&asks));
                assert!(told(&old).is_empty());
                old.sends(&answers);
                assert_eq!(told(&old), [(true, true, header + 24)]);
                for _ in 0..LOOKS - 1 {
                    assert!(!old.is_taken(&asks));
                    assert_eq!(told(&old), [(false, false, header + 24)]);
                }
                // Then now and again.
                assert!(!old.is_taken(&asks));
                assert!(told(&old).is_empty());
                // What this host asks for itself is no client.
                old.sends(&Packet::new(moved, client, UDP, ports(5_000, 53)));
                assert!(!old.is_taken(&Packet::new(client, moved, UDP, ports(53, 5_000))));
                assert!(told(&old).is_empty());
            }
        });
    }

    #[test]
    fn a_client_of_a_host_behind_is_told_of_once_it_has_acknowledged_the_answer() {
        in_fresh_namespace(|| {
            let old = old_server(Settled::Here);
            for (moved, client) in ENDS {
                let from = |flags| Packet::new(client, moved, TCP, tcp(4_000, 80, flags));
                let mut ack = from(ACK);
                ack.payload[8..12].copy_from_slice(&1_u32.to_be_bytes());
                assert!(!old.is_taken(&from(SYN)));
                old.sends(&Packet::new(moved, client, TCP, tcp(80, 4_000, SYN | ACK)));
                assert!(told(&old).is_empty());
                assert!(!old.is_taken(&ack));
                assert!(!old.is_taken(&from(ACK | FIN)));
                let all = told(&old);
                assert_eq!(all.len(), 2, "{all:?}");
                assert!(all[0].1 && !all[1].1, "{all:?}");
                // One that the host behind has begun is none.
                let back = |flags| Packet::new(client, moved, TCP, tcp(443, 5_000, flags));
                old.sends(&Packet::new(moved, client, TCP, tcp(5_000, 443, SYN)));
                let mut accepts = back(SYN | ACK);
                accepts.payload[8..12].copy_from_slice(&1_u32.to_be_bytes());
                assert!(!old.is_taken(&accepts));
                assert!(!old.is_taken(&back(ACK)));
                assert!(told(&old).is_empty());
            }
        });
    }

    #[test]
    fn where_all_has_moved_or_nobody_records_nothing_is_told() {
        in_fresh_namespace(|| {
            let old = old_server(Settled::Here);
            let (moved, client) = ENDS[0];
            let asks = |port| Packet::new(client, moved, UDP, ports(port, 53));
            old.facts.served().set(false).unwrap();
            assert!(!old.is_taken(&asks(4_000)));
            old.sends(&Packet::new(moved, client, UDP, ports(53, 4_000)));
            assert!(!old.is_taken(&asks(4_000)));
            assert!(told(&old).is_empty());
            old.facts.served().set(true).unwrap();
            let all = vec![Mode::default(); ENDS.len()];
            old.facts.set_modes(&all, ShareKey([1, 2])).unwrap();
            assert!(old.is_taken(&asks(4_001)));
            assert!(told(&old).is_empty());
        });
    }

    #[test]
    fn a_full_ring_is_counted_and_keeps_no_packet() {
        in_fresh_namespace(|| {
            let old = old_server(Settled::Here);
            let (moved, _) = ENDS[0];
            // Each is answered once.
            let room = RING / (SMALL as u32 + RECORD_PACKET as u32 + 8);
            for n in 0..room + 10 {
                let client = std::net::Ipv4Addr::from(0x0a00_0000 + n).to_string();
                assert!(!old.is_taken(&Packet::new(&client, moved, UDP, ports(9, 53))));
                old.sends(&Packet::new(moved, &client, UDP, ports(53, 9)));
            }
            let mut read = 0;
            let [_, lost] = old.facts.served().take(|_| read += 1);
            assert_eq!(read + lost, u64::from(room) + 10);
            assert!(lost > 0 && read > u64::from(room) / 2, "{read} {lost}");
        });
    }

    #[test]
    #[ignore = "a measurement: cargo test --lib -- --ignored --nocapture whom_it_serves_costs"]
    fn to_tell_whom_it_serves_costs() {
        in_fresh_namespace(|| {
            let old = old_server(Settled::Here);
            let (moved, client) = ENDS[0];
            let asks = Packet::new(client, moved, UDP, ports(4_000, 53));
            assert!(!old.is_taken(&asks));
            old.sends(&Packet::new(moved, client, UDP, ports(53, 4_000)));
            for on in [false, true] {
                old.facts.served().set(on).unwrap();
                let cost = nanoseconds(old.capture.as_fd(), &frame(&asks.bytes()));
                eprintln!("told {on}: {cost} ns");
            }
        });
    }
}
