//! Two TCP connections of a client with the same ports, one by the tunnel and one directly: to this
//! host both have the same addresses and ports, and its stack can have only one of them.
//!
//! So whichever comes second is *shifted*: this host sees it with another client port, from its
//! first packet to its last. The port is exchanged where its packets come in and where they leave,
//! so sockets, firewalls, connection tracking and the daemon know nothing of it.
//!
//! ```text
//! shifted    struct { u64 seen; u16 port, as on the wire; u16 0; u32 bits; }
//!            by the key of `flows`, marked in its third byte:
//!   1, 2     a client's packets by the tunnel, and directly: the port that this host sees. `bits`:
//!            4 after a FIN, 8 after a RST, 16 once the client went on after its SYN
//!   3        what leaves for that port: the client's port. `bits`: 1, 2 as above; 4 after a FIN, 8
//!            after a RST
//! shifts     one word, not 0 while there may be any: it is counted up before one is entered
//!
//! take_free_port(mark):
//!     for (port of three)
//!         if (none of flows, own, shifted[3] has it, nor a socket but a listening one) {
//!             ++shifts;
//!             update(shifted, 3 and port, { now, the client's port, mark });
//!             update(shifted, mark and the client's port, { now, port });
//!         }
//! ```
//!
//! The flow of a connection that comes by the tunnel has the key of the direct one, which must not
//! be taken for it: as long as the flow is there, the entry that says so has to be. So connections
//! are forgotten in one place, [`FlowMaps::sweep_shifted`], when they ended or fell silent.
//!
//! While any is shifted, every packet of TCP that comes to a link is read and looked up once or
//! twice, and every one that leaves without a socket that is known to send into the tunnel, once or
//! twice more than else. One client can bring that about. So what was never answered by the client
//! is forgotten after minutes, what has ended after one, and what the daemon does not know any more
//! after ten; the price is paid on only for a connection that both sides keep open, which nothing
//! here may break. A direct one is kept for two hours without a packet (RFC 5382 REQ-5): the
//! timeouts of the program that serves it end it sooner, if it has any. The price is some 40 to 60
//! ns a packet each way (`what_a_shifted_connection_costs_others`), a twentieth of a processor at a
//! million packets a second, which is not worth asking for the ends of a connection that says
//! nothing: its socket may be in a container.
//!
//! There is room for [`MAX_SHIFTED`]: beyond it a second connection gets no answer by the tunnel
//! (`direct_connection`), and directly one that its client ignores.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::time::Duration;

use Reg::{R0, R1, R2, R3, R4, R5, R7, R10};

use super::flows::{
    FlowMaps, KEY, KEY_LAST, REFRESH, enter_from, flow_of, jump_if_within, look_up, refused,
};
use super::headers::{sock, tcp};
use super::parse::{FLAGS, TRANSPORT_KEPT};
use super::phrases::PACKET;
use super::sockets::{look_up_socket, release_keeping_state};
use crate::flow::class::{TCP_ESTABLISHED, TCP_HALF_CLOSED, TCP_OPENING, TCP_RESET};
use crate::flow::ended::HostFlow;
use crate::kernel::bpf::{Alu, Assembler, BpfError, Helper, If, Label, Reg, Size};
use crate::packet::{FIN, RST, SYN};

/// Connections that may be shifted at a time. Two for each customer behind one address of a
/// provider's NAT would be many; 4,096 take less than a megabyte of kernel memory.
pub const MAX_SHIFTED: u32 = 4096;

/// Length of a value, in bytes.
pub(super) const SHIFTED_BYTES: usize = 16;

/// Where the parts of a value lie in it.
const SEEN: i16 = 0;
const PORT: i16 = 8;
const BITS: i16 = 12;

/// In the `bits`, which begin with how the client's packets come.
const COMING: i32 = 3;
const HAD_FIN: i32 = 4;
const HAD_RST: i32 = 8;
/// A client's packet came after its SYN.
const WENT_ON: i32 = 16;

/// How long a connection is kept after its last packet that has ended on both sides: as long as
/// this host keeps its socket (TIME-WAIT of Linux).
const ENDED_KEPT: Duration = Duration::from_secs(60);

/// How long one that is silent is kept that comes by the tunnel and that the daemon, which has
/// forgotten it, must have known.
const UNKNOWN_KEPT: Duration = Duration::from_secs(600);

/// What is added to the first byte of a port for one that is tried. With the highest bit it is
/// above the ports of services, and none is the client's own.
const STEPS: [i32; 3] = [1, 37, 85];
const HIGH: i32 = 0x80;

/// How a client's packets come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Coming {
    ByTunnel = 1,
    Directly = 2,
}

/// The mark of what leaves.
const LEAVING: i32 = 3;

const MARK_SHIFT: i32 = 16;
const UNMARKED: i32 = 0xffff;

/// Where the stack keeps a value that is entered, and two ports.
const SHIFTED_VALUE: i16 = -248;
const OLD_PORT: i16 = -256;
const NEW_PORT: i16 = -264;

/// Jumps to `none` if no connection is shifted.
pub(super) fn jump_unless_any(a: &mut Assembler, maps: &FlowMaps, none: Label) {
    a.load_address(R0, maps.shifts.as_fd(), 0);
    a.load(Size::W, R0, R0, 0);
    a.jump_if(R0, If::Eq, 0, none);
}

/// R0 = the address of the value of the packet in the key that comes so, or 0.
pub(super) fn look_up_coming(a: &mut Assembler, maps: &FlowMaps, coming: Coming) {
    look_up_marked(a, maps, coming as i32);
}

/// R0 = the address of the value of a packet that leaves with the key's addresses and ports, or 0.
pub(super) fn look_up_leaving(a: &mut Assembler, maps: &FlowMaps) {
    look_up_marked(a, maps, LEAVING);
}

/// Gives a client's packet the port that this host sees, if it is one of a shifted connection.
/// Otherwise jumps to `no`. R7 is lost.
pub(super) fn shift_coming(a: &mut Assembler, maps: &FlowMaps, coming: Coming, no: Label) {
    find(a, maps, coming as i32, no);
    exchange_port(a, tcp::SOURCE);
}

/// Gives a packet that leaves its client's port back, if it is one of a shifted connection; the key
/// gets it as well. Then jumps to `by_tunnel` or `directly`. R7 is lost.
pub(super) fn shift_leaving(a: &mut Assembler, maps: &FlowMaps, by_tunnel: Label, directly: Label) {
    let no = a.label();
    find(a, maps, LEAVING, no);
    a.load(Size::W, R7, R7, BITS);
    exchange_port(a, tcp::DESTINATION);
    a.load(Size::H, R0, R10, NEW_PORT);
    a.store(Size::H, R10, KEY_LAST, R0);
    a.jump_if(R7, If::Set, Coming::Directly as i32, directly);
    a.jump(by_tunnel);
    a.bind(no);
}

/// R7 = the address of the value of a packet with this mark, in which it is noted; the stack keeps
/// the port that the packet has, and the one that it gets. Jumps to `no` if there is none.
fn find(a: &mut Assembler, maps: &FlowMaps, marked: i32, no: Label) {
    let fresh = a.label();
    look_up_marked(a, maps, marked);
    a.jump_if_wide(R0, If::Eq, 0, no);
    a.mov(R7, R0);
    a.load(Size::H, R0, R7, PORT);
    a.store(Size::H, R10, NEW_PORT, R0);
    a.load(Size::H, R0, R10, KEY_LAST);
    a.store(Size::H, R10, OLD_PORT, R0);
    jump_if_within(a, (R7, SEEN), REFRESH, fresh);
    a.store(Size::Dw, R7, SEEN, R0);
    a.bind(fresh);
    note_end(a);
}

/// Notes in the value at R7 whether the packet ends its connection, goes on with it, or begins
/// another one.
fn note_end(a: &mut Assembler) {
    let (fin, rst, note, done) = (a.label(), a.label(), a.label(), a.label());
    a.load(Size::W, R0, R10, FLAGS);
    a.load(Size::W, R1, R7, BITS);
    a.jump_if(R0, If::Set, i32::from(RST), rst);
    a.jump_if(R0, If::Set, i32::from(FIN), fin);
    a.jump_if(R0, If::Set, i32::from(SYN), note);
    a.jump_if(R1, If::Set, WENT_ON, done);
    a.alu(Alu::Or, R1, WENT_ON);
    a.store(Size::W, R7, BITS, R1);
    a.jump(done);
    a.bind(rst);
    a.alu(Alu::Or, R1, HAD_RST);
    a.store(Size::W, R7, BITS, R1);
    a.jump(done);
    a.bind(fin);
    a.alu(Alu::Or, R1, HAD_FIN);
    a.store(Size::W, R7, BITS, R1);
    a.jump(done);
    a.bind(note);
    a.alu(Alu::And, R1, COMING);
    a.store(Size::W, R7, BITS, R1);
    a.bind(done);
}

/// Shifts the connection in the key, whose packets come so. Jumps to `none` if no port is free, or
/// there are too many. R7 is lost.
pub(super) fn take_free_port(a: &mut Assembler, maps: &FlowMaps, coming: Coming, none: Label) {
    let (free, failed, done) = (a.label(), a.label(), a.label());
    a.load(Size::H, R0, R10, KEY_LAST);
    a.store(Size::H, R10, OLD_PORT, R0);
    for step in STEPS {
        let next = a.label();
        a.load(Size::B, R0, R10, OLD_PORT);
        a.alu(Alu::Add, R0, step);
        a.alu(Alu::Or, R0, HIGH);
        a.store(Size::B, R10, KEY_LAST, R0);
        for map in [&maps.flows, &maps.own] {
            look_up(a, map);
            a.jump_if_wide(R0, If::Ne, 0, next);
        }
        look_up_leaving(a, maps);
        a.jump_if_wide(R0, If::Ne, 0, next);
        look_up_socket(a, Helper::SkLookupTcp);
        a.jump_if_wide(R0, If::Eq, 0, free);
        release_keeping_state(a, R7);
        a.jump_if(R7, If::Eq, sock::LISTEN, free);
        a.bind(next);
    }
    a.jump(failed);

    a.bind(free);
    a.load_address(R0, maps.shifts.as_fd(), 0);
    a.mov(R1, 1);
    a.add_word_atomically(R0, 0, R1);
    a.load(Size::H, R0, R10, KEY_LAST);
    a.store(Size::H, R10, NEW_PORT, R0);
    a.call(Helper::KtimeGetNs);
    a.store(Size::Dw, R10, SHIFTED_VALUE + SEEN, R0);
    a.load(Size::H, R0, R10, OLD_PORT);
    a.store(Size::W, R10, SHIFTED_VALUE + PORT, 0);
    a.store(Size::H, R10, SHIFTED_VALUE + PORT, R0);
    a.store(Size::W, R10, SHIFTED_VALUE + BITS, coming as i32);
    mark(a, LEAVING);
    enter_from(a, &maps.shifted, SHIFTED_VALUE);
    unmark(a);
    a.jump_if_wide(R0, If::Ne, 0, failed);
    a.load(Size::H, R0, R10, OLD_PORT);
    a.store(Size::H, R10, KEY_LAST, R0);
    a.load(Size::H, R0, R10, NEW_PORT);
    a.store(Size::H, R10, SHIFTED_VALUE + PORT, R0);
    a.store(Size::W, R10, SHIFTED_VALUE + BITS, 0);
    mark(a, coming as i32);
    enter_from(a, &maps.shifted, SHIFTED_VALUE);
    unmark(a);
    a.jump_if_wide(R0, If::Ne, 0, failed);
    a.jump(done);
    a.bind(failed);
    a.load(Size::H, R0, R10, OLD_PORT);
    a.store(Size::H, R10, KEY_LAST, R0);
    a.jump(none);
    a.bind(done);
}

/// Exchanges the port that is `at` this place of the TCP header, and mends its checksum.
fn exchange_port(a: &mut Assembler, at: u32) {
    a.mov(R1, PACKET);
    a.load(Size::W, R2, R10, TRANSPORT_KEPT);
    a.alu(Alu::Add, R2, tcp::CHECKSUM as i32);
    a.load(Size::H, R3, R10, OLD_PORT);
    a.load(Size::H, R4, R10, NEW_PORT);
    a.mov(R5, 2);
    a.call(Helper::L4CsumReplace);
    a.mov(R1, PACKET);
    a.load(Size::W, R2, R10, TRANSPORT_KEPT);
    a.alu(Alu::Add, R2, at as i32);
    a.mov(R3, R10);
    a.alu(Alu::Add, R3, i32::from(NEW_PORT));
    a.mov(R4, 2);
    a.mov(R5, 0);
    a.call(Helper::SkbStoreBytes);
}

fn look_up_marked(a: &mut Assembler, maps: &FlowMaps, with: i32) {
    mark(a, with);
    look_up(a, &maps.shifted);
    unmark(a);
}

fn mark(a: &mut Assembler, with: i32) {
    a.load(Size::W, R1, R10, KEY);
    a.alu(Alu::Or, R1, with << MARK_SHIFT);
    a.store(Size::W, R10, KEY, R1);
}

/// R0 stays.
fn unmark(a: &mut Assembler) {
    a.load(Size::W, R1, R10, KEY);
    a.alu(Alu::And, R1, UNMARKED);
    a.store(Size::W, R10, KEY, R1);
}

/// What is known of one direction of a shifted connection.
#[derive(Clone, Copy)]
struct Direction {
    seen: Duration,
    /// The port in its value, as on the wire.
    port: [u8; 2],
    bits: u32,
}

impl Direction {
    fn read(value: &[u8]) -> Option<Self> {
        let (seen, rest) = value.split_first_chunk::<8>()?;
        let (&[first, second, _, _], rest) = rest.split_first_chunk::<4>()?;
        Some(Self {
            seen: Duration::from_nanos(u64::from_ne_bytes(*seen)),
            port: [first, second],
            bits: u32::from_ne_bytes(rest.try_into().ok()?),
        })
    }

    fn has(&self, bit: i32) -> bool {
        self.bits & bit.cast_unsigned() != 0
    }

    /// The key of the other direction.
    fn twin(&self, key: &[u8]) -> Option<Vec<u8>> {
        let word = u32::from_ne_bytes(*key.first_chunk()?);
        let mark = if mark_of(key)? == LEAVING.cast_unsigned() {
            self.bits & COMING.cast_unsigned()
        } else {
            LEAVING.cast_unsigned()
        };
        let word = word & UNMARKED.cast_unsigned() | mark << MARK_SHIFT;
        let mut twin = key.to_vec();
        twin[..4].copy_from_slice(&word.to_ne_bytes());
        twin[36..38].copy_from_slice(&self.port);
        Some(twin)
    }
}

/// How long a connection is kept after its last packet. What this host resets is over at once, and
/// what anybody else resets may not be.
fn kept(leaving: &Direction, coming: &Direction, is_unknown: bool) -> Duration {
    let ended = [leaving, coming].map(|direction| direction.has(HAD_FIN));
    match ended {
        [true, true] => ENDED_KEPT,
        [true, false] | [false, true] => TCP_HALF_CLOSED,
        [false, false] if !coming.has(WENT_ON) => TCP_OPENING,
        [false, false] if is_unknown => UNKNOWN_KEPT,
        [false, false] => TCP_ESTABLISHED,
    }
}

/// The key of the flow with the same addresses and ports.
fn unmarked(key: &[u8]) -> Option<Vec<u8>> {
    let word = u32::from_ne_bytes(*key.first_chunk()?) & UNMARKED.cast_unsigned();
    let mut flow = key.to_vec();
    flow[..4].copy_from_slice(&word.to_ne_bytes());
    Some(flow)
}

fn mark_of(key: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(*key.first_chunk()?) >> MARK_SHIFT)
}

impl FlowMaps {
    /// Forgets shifted connections that ended or fell silent. The daemon, which came at the time
    /// `since`, `knows` those that came by the tunnel from then on. Call it every second.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn sweep_shifted(
        &self,
        now: Duration,
        since: Duration,
        knows: impl Fn(&HostFlow) -> bool,
    ) -> Result<(), BpfError> {
        if self.shifts.get(0) == 0 {
            return Ok(());
        }
        let mut all: HashMap<Vec<u8>, Direction> = HashMap::new();
        let look = |key: &[u8], value: &[u8]| {
            all.extend(Direction::read(value).map(|direction| (key.to_vec(), direction)));
        };
        let (counted, most) = (self.shifts.get(0), 2 * MAX_SHIFTED);
        (self.shifted.read_some(&mut None, most, look)).map_err(refused)?;
        let leaves = |key: &[u8]| mark_of(key) == Some(LEAVING.cast_unsigned());
        let gone = all.iter().filter(|&(key, direction)| {
            // One that is alone counts for both.
            let twin = direction.twin(key);
            let twin = twin.and_then(|twin| all.get_key_value(&twin));
            let (other_key, other) = twin.unwrap_or((key, direction));
            let (leaving, (coming_key, coming)) = if leaves(key) {
                (direction, (other_key, other))
            } else {
                (other, (key, direction))
            };
            let last = leaving.seen.max(coming.seen);
            let by_tunnel = mark_of(coming_key) == Some(Coming::ByTunnel as u32);
            let flow = unmarked(coming_key).filter(|_| by_tunnel && last >= since);
            let flow = flow.and_then(|flow| flow_of(&flow));
            let is_unknown = flow.is_some_and(|flow| !knows(&flow));
            let reset = leaving.has(HAD_RST) && leaving.seen + TCP_RESET < now;
            reset || last + kept(leaving, coming, is_unknown) < now
        });
        let mut left = all.len();
        for (key, _) in gone {
            let by_tunnel = mark_of(key) == Some(Coming::ByTunnel as u32);
            let flow = unmarked(key).filter(|_| by_tunnel);
            // Once more afterwards: a packet may have entered it again in between.
            let forget = || flow.iter().try_for_each(|flow| self.flows.remove(flow));
            let removed = forget()
                .and_then(|()| self.shifted.remove(key))
                .and_then(|()| forget());
            removed.map_err(refused)?;
            left -= 1;
        }
        if left == 0 {
            // If one was entered meanwhile it was counted before.
            self.shifts.clear_if(0, counted);
        }
        Ok(())
    }

    /// Tells the programs if there are shifted connections of an earlier daemon.
    pub(super) fn note_shifts(&self) -> Result<(), BpfError> {
        if !self.shifted.keys().map_err(refused)?.is_empty() {
            self.shifts.set(0, 1);
        }
        Ok(())
    }
}
