//! The modes of all moves, for the programs of the old server: whose a packet is that belongs to no
//! conversation which is known.
//!
//! Owns the memory, its layout, and the phrase that decides. The daemon writes it at any time,
//! without a new program. While everything is moved, the phrase is a look at one word; what is
//! noted as the new server's never comes to it.
//!
//! ```text
//! words   u32 some;       // not 0: something is not moved, or was not of late
//!         u32 heartbeat;  // when the daemon was last alive, in ticks (ALIVE_TICK)
//!         u64 key[2];     // of the shares
//! scopes  trie by address (IPv4 as ::ffff:a.b.c.d): u32 scope
//! owners  trie by { u32 scope; u8 protocol; u8 shows_no_port; u16 port }: u32 number of a move
//! modes   by number: struct {
//!     u64 held_until;     // a time, or 0
//!     u64 asked_until;    // the daemon is asked until then what it knows of an unknown packet,
//!     u64 greeted_until;  // and of a SYN
//!     u32 percent;        // of all clients that have moved, while nothing is held
//! }
//!
//! m = modes[owners[scopes[local], protocol, port]], or goto moved;
//! if (m->held_until > now) {
//!     if (it begins something, or does not tell) ask;
//!     if (alive) ask;
//! }
//! if (m->percent >= 100 || place(remote) < m->percent) {
//!     if (TCP && it goes on && m->asked_until > now && alive) ask;
//!     goto moved;
//! }
//! if (it does not tell) goto here;
//! if (TCP ? it goes on || m->greeted_until > now : m->asked_until > now && alive) ask;
//! goto here;
//! ```
//!
//! "Ask" is to hand the packet to the daemon and note nothing: it knows exactly which conversations
//! the new server has ([`flow::gate`](crate::flow::gate)), bounces what is none of them, and holds
//! what has to wait. A daemon that is not alive is not asked; a hold ends by itself.

use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::Mutex;
use std::time::Duration;

use rustix::io::Errno;

use Reg::{R0, R1, R2, R3, R7, R10};

use super::flows::{KEY, KEY_LAST, KEY_LOCAL, KEY_REMOTE, now};
use super::parse::{FRAGMENT, LAST_FRAGMENT, MIDDLE_FRAGMENT, QUOTED, load_syn};
use super::phrases::{PROTOCOL, jump_if_icmp, look_up_at};
use crate::flow::class::UDP_BOTH_WAYS;
use crate::flow::modes::COOKIES;
use crate::kernel::bpf::{
    Alu, Assembler, BpfError, Helper, If, Label, Map, MapKind, Reg, Shape, Size, Words,
};
use crate::model::inherited::inherited;
use crate::model::mode::{Mode, ShareKey};
use crate::model::moved::{Move, TCP, UDP};
use crate::model::owners::{Owners, Part};
use crate::model::scopes::Scopes;
use crate::packet::SYN;

/// How long after clients have gone back to this server the daemon is asked about what is not TCP:
/// as long as such a conversation of the new server may be silent.
const ASKED: Duration = UDP_BOTH_WAYS;

/// How long after that the daemon is asked about every SYN: the new server may have answered the
/// one that it repeats. No answer is under way for longer.
const GREETED: Duration = Duration::from_secs(10);

/// A tick of the heartbeat, as a power of two in nanoseconds: 1.07 s.
const ALIVE_TICK: i32 = 30;

/// Ticks without a heartbeat after which the daemon counts as dead. It beats once a second.
const ALIVE_TICKS: i32 = 3;

/// The words.
const SOME: usize = 0;
const HEARTBEAT: usize = 1;
const SHARE_KEY: usize = 2;
const WORDS: usize = 6;

/// Where the parts of a mode lie in it.
const HELD_UNTIL: i16 = 0;
const ASKED_UNTIL: i16 = 8;
const GREETED_UNTIL: i16 = 16;
const PERCENT: i16 = 24;
const MODE_BYTES: usize = 32;

/// Most entries of `owners`: a range of ports is 30 prefixes at most, of two protocols, and there
/// may be 16,384 moves. The kernel takes memory only for what there is.
const MAX_OWNERS: u32 = 1 << 20;

/// Keys of the tries: their length in bits (`u32`), then what is looked for.
const SCOPE_KEY_BYTES: usize = 20;
const OWNER_KEY_BYTES: usize = 12;

/// Bits of an owner's key in front of the port.
const UP_TO_PORT: u32 = 48;

/// Where the keys lie on the stack, below what else there is by then.
const SCOPE_KEY: i16 = -196;
const OWNER_KEY: i16 = -208;
/// The number of the move.
const MOVE: i16 = -212;
/// What the packet tells: one of the three below.
pub(super) const TELLS: i16 = -216;
/// The time.
const NOW: i16 = -232;

/// It belongs to a conversation that has begun.
const GOES_ON: i32 = 0;
/// It begins one.
pub(super) const BEGINS: i32 = 1;
/// It tells nothing: a later fragment, or what is none of these.
pub(super) const TELLS_NOTHING: i32 = 2;

/// The memory of the modes.
#[derive(Debug)]
pub(super) struct Modes {
    words: Words,
    scopes: Map,
    owners: Map,
    modes: Map,
    state: Mutex<State>,
}

/// What is in it.
#[derive(Debug)]
struct State {
    moves: Box<[Move]>,
    /// Whether the tries are filled: as long as nothing was set, nobody asks them.
    filled: bool,
    values: Vec<Value>,
    /// Programs have to look until then; `None` where no end is known.
    needed_until: Option<Duration>,
}

/// A mode, as programs see it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Value {
    held_until: Duration,
    asked_until: Duration,
    greeted_until: Duration,
    percent: u8,
}

impl Value {
    const MOVED: Self = Self {
        held_until: Duration::ZERO,
        asked_until: Duration::ZERO,
        greeted_until: Duration::ZERO,
        percent: 100,
    };

    /// The same, which was also another one: whoever asks because of either goes on asking.
    fn with(self, other: Self) -> Self {
        Self {
            held_until: self.held_until.max(other.held_until),
            asked_until: self.asked_until.max(other.asked_until),
            greeted_until: self.greeted_until.max(other.greeted_until),
            percent: self.percent.min(other.percent),
        }
    }

    /// After it, from `now` on.
    fn followed_by(self, mode: &Mode<Duration>, now: Duration) -> Self {
        let percent = mode.settled.percent();
        let mut next = Self {
            held_until: mode.held_until.unwrap_or_default(),
            percent,
            ..self
        };
        if percent < self.percent {
            next.asked_until = next.asked_until.max(now + ASKED);
            next.greeted_until = now + GREETED;
        } else if percent > self.percent {
            next.asked_until = next.asked_until.max(now + COOKIES);
        }
        next
    }

    /// Programs have to look until then; `None` where no end is known.
    fn needed_until(&self) -> Option<Duration> {
        let until = self.held_until.max(self.asked_until);
        (self.percent >= 100).then_some(until)
    }

    fn bytes(&self) -> [u8; MODE_BYTES] {
        let mut bytes = [0; MODE_BYTES];
        for (at, time) in [
            (HELD_UNTIL, self.held_until),
            (ASKED_UNTIL, self.asked_until),
            (GREETED_UNTIL, self.greeted_until),
        ] {
            let at = at as usize;
            bytes[at..at + 8].copy_from_slice(&(time.as_nanos() as u64).to_ne_bytes());
        }
        let percent = PERCENT as usize;
        bytes[percent..percent + 4].copy_from_slice(&u32::from(self.percent).to_ne_bytes());
        bytes
    }
}

impl Modes {
    /// Everything is moved.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(super) fn new(moves: &[Move]) -> Result<Self, BpfError> {
        let trie = |name, key_size, max_entries| Shape {
            kind: MapKind::LpmTrie,
            name,
            key_size,
            value_size: size_of::<u32>(),
            max_entries,
        };
        let modes = Shape {
            kind: MapKind::Array,
            name: "ipmoved_modes",
            key_size: size_of::<u32>(),
            value_size: MODE_BYTES,
            max_entries: moves.len().max(1) as u32,
        };
        let scopes = trie("ipmoved_scopes", SCOPE_KEY_BYTES, moves.len().max(1) as u32);
        Ok(Self {
            words: Words::new("ipmoved_share", WORDS)?,
            scopes: Map::new(scopes)?,
            owners: Map::new(trie("ipmoved_owners", OWNER_KEY_BYTES, MAX_OWNERS))?,
            modes: Map::new(modes)?,
            state: Mutex::new(State {
                moves: moves.into(),
                filled: false,
                values: vec![Value::MOVED; moves.len()],
                needed_until: Some(Duration::ZERO),
            }),
        })
    }

    /// The modes of these moves were those of others before: for how long the daemon is to be asked
    /// goes on. Nobody asks before the next [`set`](Self::set).
    pub(super) fn follow(&self, before: &Self) {
        let earlier = before.state.lock().unwrap_or_else(|held| held.into_inner());
        let known = earlier.moves.iter().zip(&earlier.values);
        let known: Vec<(&Move, Value)> = known
            .filter(|(_, value)| **value != Value::MOVED)
            .map(|(moved, value)| (moved, *value))
            .collect();
        let mut state = self.state.lock().unwrap_or_else(|held| held.into_inner());
        let inherited = inherited(&known, &state.moves, Value::with);
        for (value, known) in state.values.iter_mut().zip(inherited) {
            *value = known.unwrap_or(Value::MOVED);
        }
    }

    /// From now on the moves are in these modes, in their order; those beyond are left alone. Times
    /// are the kernel's ([`now`]).
    ///
    /// # Errors
    /// If the kernel refuses. Some of it may be in effect then.
    pub(super) fn set(&self, modes: &[Mode<Duration>], key: ShareKey) -> Result<(), BpfError> {
        self.set_at(modes, key, now())
    }

    /// As [`set`](Self::set), at this time.
    pub(super) fn set_at(
        &self,
        modes: &[Mode<Duration>],
        key: ShareKey,
        now: Duration,
    ) -> Result<(), BpfError> {
        let mut state = self.state.lock().unwrap_or_else(|held| held.into_inner());
        let State {
            moves,
            filled,
            values,
            needed_until,
        } = &mut *state;
        let halves = key.0.map(|word| [word as u32, (word >> 32) as u32]);
        for (at, half) in (SHARE_KEY..).zip(ordered(halves)) {
            self.words.set(at, half);
        }
        let plain = Mode::default();
        let some = |value: &Value| *value != Value::MOVED;
        if !*filled && (modes.iter().any(|mode| *mode != plain) || values.iter().any(some)) {
            self.fill(moves, values)?;
            *filled = true;
        }
        let refused = BpfError::of_map("ipmoved_modes");
        for (number, (value, mode)) in (0_u32..).zip(values.iter_mut().zip(modes)) {
            let next = value.followed_by(mode, now);
            if next != *value {
                (self.modes.insert(&number.to_ne_bytes(), &next.bytes())).map_err(refused)?;
                *value = next;
            }
        }
        *needed_until = values
            .iter()
            .map(Value::needed_until)
            .try_fold(Duration::ZERO, |latest, until| Some(latest.max(until?)));
        let some = needed_until.is_none_or(|until| until > now);
        self.words.set(SOME, u32::from(some));
        Ok(())
    }

    /// The daemon is alive. Call it every second.
    pub(super) fn beat(&self) {
        self.beat_at(now());
    }

    fn beat_at(&self, now: Duration) {
        self.words
            .set(HEARTBEAT, (now.as_nanos() >> ALIVE_TICK) as u32);
        let state = self.state.lock().unwrap_or_else(|held| held.into_inner());
        if state.needed_until.is_some_and(|until| until <= now) {
            self.words.set(SOME, 0);
        }
    }

    /// No mode has changed of late.
    #[cfg(test)]
    fn forget_changes(&self) {
        let mut state = self.state.lock().unwrap();
        for (number, value) in (0_u32..).zip(&mut state.values) {
            (value.asked_until, value.greeted_until) = Default::default();
            let bytes = value.bytes();
            self.modes.insert(&number.to_ne_bytes(), &bytes).unwrap();
        }
    }

    /// Fills the tries.
    fn fill(&self, moves: &[Move], values: &[Value]) -> Result<(), BpfError> {
        let scopes = Scopes::new(moves);
        let owners = Owners::new(moves, &scopes);
        for scope in 0..scopes.len() {
            let prefix = scopes.prefix(scope);
            let (addr, more) = match prefix.first() {
                IpAddr::V4(addr) => (addr.to_ipv6_mapped(), 96),
                IpAddr::V6(addr) => (addr, 0),
            };
            let mut key = Vec::from((u32::from(prefix.len()) + more).to_ne_bytes());
            key.extend(addr.octets());
            let number = (scope as u32).to_ne_bytes();
            (self.scopes.insert(&key, &number)).map_err(BpfError::of_map("ipmoved_scopes"))?;
            self.fill_owners(scope as u32, &owners, &scopes)
                .map_err(BpfError::of_map("ipmoved_owners"))?;
        }
        for (number, value) in (0_u32..).zip(values) {
            let filled = self.modes.insert(&number.to_ne_bytes(), &value.bytes());
            filled.map_err(BpfError::of_map("ipmoved_modes"))?;
        }
        Ok(())
    }

    fn fill_owners(&self, scope: u32, owners: &Owners, scopes: &Scopes) -> Result<(), Errno> {
        let owned = owners.owned(scopes, scope as usize);
        let enter = |protocol: u8, no_port: bool, port: u16, bits: u32, by: u32| {
            let mut key = Vec::from((UP_TO_PORT + bits).to_ne_bytes());
            key.extend(scope.to_ne_bytes());
            key.extend([protocol, u8::from(no_port)]);
            key.extend(port.to_be_bytes());
            self.owners.insert(&key, &by.to_ne_bytes())
        };
        let ports = |protocol, parts: &[Part]| {
            for (ports, by) in parts {
                for (port, bits) in prefixes(*ports.start(), *ports.end()) {
                    enter(protocol, false, port, bits, *by)?;
                }
            }
            Ok(())
        };
        ports(TCP, &owned.tcp)?;
        ports(UDP, &owned.udp)?;
        for (protocol, by) in [TCP, UDP].into_iter().zip(owned.fragments) {
            if let Some(by) = by {
                enter(protocol, true, 0, 0, by)?;
            }
        }
        if let Some(by) = owned.other {
            enter(0, false, 0, 0, by)?;
        }
        Ok(())
    }

    /// Jumps to `plain` if everything is moved, and was for some time. Destroys R0 alone.
    pub(super) fn jump_if_plain(&self, a: &mut Assembler, plain: Label) {
        self.load(a, R0, SOME);
        a.jump_if(R0, If::Eq, 0, plain);
    }

    /// [`TELLS`] = whether a packet begins a conversation, whose key is made.
    pub(super) fn tell(a: &mut Assembler) {
        let (icmp, begins, done) = (a.label(), a.label(), a.label());
        a.store(Size::W, R10, TELLS, GOES_ON);
        a.jump_if(FRAGMENT, If::Eq, QUOTED, done);
        jump_if_icmp(a, icmp);
        a.jump_if(PROTOCOL, If::Ne, i32::from(TCP), begins);
        load_syn(a);
        a.jump_if(R0, If::Eq, i32::from(SYN), begins);
        a.jump(done);
        a.bind(icmp);
        a.load(Size::H, R0, R10, KEY_LAST + 2);
        a.jump_if(R0, If::Eq, 0, done);
        a.bind(begins);
        a.store(Size::W, R10, TELLS, BEGINS);
        a.bind(done);
    }

    /// Decides about a packet of an unknown conversation, whose key is made and of which [`TELLS`]
    /// is told: see above. The key and [`TELLS`] stay as they are.
    pub(super) fn decide(&self, a: &mut Assembler, ask: Label, moved: Label, here: Label) {
        const MODE: Reg = R7;
        self.look_up_scope(a, KEY_LOCAL);
        a.jump_if_wide(R0, If::Eq, 0, moved);
        a.load(Size::W, R0, R0, 0);
        self.look_up_owner(a);
        a.jump_if_wide(R0, If::Eq, 0, moved);
        a.load(Size::W, R0, R0, 0);
        a.store(Size::W, R10, MOVE, R0);
        look_up_at(a, &self.modes, MOVE);
        a.jump_if_wide(R0, If::Eq, 0, moved);
        a.mov(MODE, R0);
        a.call(Helper::KtimeGetNs);
        a.store(Size::Dw, R10, NOW, R0);
        // `until > now`; goes on otherwise.
        let jump_if_before = |a: &mut Assembler, until: i16, to: Label| {
            a.load(Size::Dw, R1, MODE, until);
            a.load(Size::Dw, R2, R10, NOW);
            a.jump_if_wide(R1, If::Gt, R2, to);
        };

        let (held, settled, gone, stays) = (a.label(), a.label(), a.label(), a.label());
        jump_if_before(a, HELD_UNTIL, held);
        a.bind(settled);
        a.load(Size::W, R0, MODE, PERCENT);
        a.jump_if(R0, If::Eq, 0, stays);
        a.jump_if(R0, If::Ge, 100, gone);
        self.load_place(a);
        a.load(Size::W, R1, MODE, PERCENT);
        a.jump_if(R0, If::Lt, R1, gone);

        a.bind(stays);
        let (tcp, ask_if_alive) = (a.label(), a.label());
        a.load(Size::W, R0, R10, TELLS);
        a.jump_if(R0, If::Eq, TELLS_NOTHING, here);
        a.jump_if(PROTOCOL, If::Eq, i32::from(TCP), tcp);
        jump_if_before(a, ASKED_UNTIL, ask_if_alive);
        a.jump(here);
        a.bind(tcp);
        a.jump_if(R0, If::Ne, BEGINS, ask_if_alive);
        jump_if_before(a, GREETED_UNTIL, ask_if_alive);
        a.jump(here);
        a.bind(ask_if_alive);
        self.jump_if_alive(a, ask);
        a.jump(here);

        a.bind(held);
        a.load(Size::W, R0, R10, TELLS);
        a.jump_if(R0, If::Ne, GOES_ON, ask);
        self.jump_if_alive(a, ask);
        a.jump(settled);

        a.bind(gone);
        let ask_of_moved = a.label();
        a.jump_if(PROTOCOL, If::Ne, i32::from(TCP), moved);
        a.load(Size::W, R0, R10, TELLS);
        a.jump_if(R0, If::Ne, GOES_ON, moved);
        jump_if_before(a, ASKED_UNTIL, ask_of_moved);
        a.jump(moved);
        a.bind(ask_of_moved);
        self.jump_if_alive(a, ask);
        a.jump(moved);
    }

    /// R0 = where the number of the scope stands that the address at this place of the key lies in,
    /// or 0.
    pub(super) fn look_up_scope(&self, a: &mut Assembler, address_at: i16) {
        const ADDRESS: i16 = SCOPE_KEY + 4;
        let (v6, made) = (a.label(), a.label());
        a.store(Size::W, R10, SCOPE_KEY, 128);
        jump_unless_v4_key(a, v6);
        a.store(Size::Dw, R10, ADDRESS, 0);
        a.store(Size::W, R10, ADDRESS + 8, 0xffff_u32.to_be());
        a.load(Size::W, R0, R10, address_at);
        a.store(Size::W, R10, ADDRESS + 12, R0);
        a.jump(made);
        a.bind(v6);
        for word in (0..16).step_by(4) {
            a.load(Size::W, R0, R10, address_at + word);
            a.store(Size::W, R10, ADDRESS + word, R0);
        }
        a.bind(made);
        look_up_at(a, &self.scopes, SCOPE_KEY);
    }

    /// R0 = where the number of the move stands that the packet belongs to, or 0. R0 is the scope.
    fn look_up_owner(&self, a: &mut Assembler) {
        let (has_port, made) = (a.label(), a.label());
        a.store(Size::W, R10, OWNER_KEY, 64);
        a.store(Size::W, R10, OWNER_KEY + 4, R0);
        a.store(Size::W, R10, OWNER_KEY + 8, 0);
        for protocol in [TCP, UDP] {
            a.jump_if(PROTOCOL, If::Eq, i32::from(protocol), has_port);
        }
        a.jump(made);
        a.bind(has_port);
        a.store(Size::B, R10, OWNER_KEY + 8, PROTOCOL);
        for later in [MIDDLE_FRAGMENT, LAST_FRAGMENT] {
            let next = a.label();
            a.jump_if(FRAGMENT, If::Ne, later, next);
            a.store(Size::B, R10, OWNER_KEY + 9, 1);
            a.jump(made);
            a.bind(next);
        }
        a.load(Size::H, R0, R10, KEY_LAST + 2);
        a.store(Size::H, R10, OWNER_KEY + 10, R0);
        a.bind(made);
        look_up_at(a, &self.owners, OWNER_KEY);
    }

    /// R0 = the client's [place](ShareKey::place), in the same steps. Destroys R1 to R3.
    fn load_place(&self, a: &mut Assembler) {
        const ROUND: u64 = 0x9e37_79b9_7f4a_7c15;
        let (v6, known) = (a.label(), a.label());
        jump_unless_v4_key(a, v6);
        a.load(Size::W, R0, R10, KEY_REMOTE);
        a.swap_if_little_endian(R0);
        a.jump(known);
        a.bind(v6);
        a.load(Size::W, R0, R10, KEY_REMOTE);
        a.swap_if_little_endian(R0);
        a.alu(Alu::Lsh, R0, 32);
        a.load(Size::W, R1, R10, KEY_REMOTE + 4);
        a.swap_if_little_endian(R1);
        a.alu(Alu::Or, R0, R1);
        a.bind(known);
        a.load_address(R3, self.words.as_fd(), Words::offset(SHARE_KEY));
        a.mov_wide(R2, ROUND);
        for half in [0, 8] {
            a.load(Size::Dw, R1, R3, half);
            a.alu(Alu::Xor, R0, R1);
            a.alu(Alu::Mul, R0, R2);
            a.mov(R1, R0);
            a.alu(Alu::Rsh, R1, 32);
            a.alu(Alu::Xor, R0, R1);
        }
        a.alu(Alu::Lsh, R0, 32);
        a.alu(Alu::Rsh, R0, 32);
        a.alu(Alu::Mul, R0, 100);
        a.alu(Alu::Rsh, R0, 32);
    }

    /// Jumps if the daemon was alive of late; [`NOW`] is the time. Destroys R0 and R1.
    fn jump_if_alive(&self, a: &mut Assembler, to: Label) {
        self.load(a, R1, HEARTBEAT);
        a.load(Size::Dw, R0, R10, NOW);
        a.alu(Alu::Rsh, R0, ALIVE_TICK);
        a.alu(Alu::Sub, R0, R1);
        // A beat may be later than the time by a little.
        a.alu(Alu::Add, R0, 1);
        a.jump_if(R0, If::Le, ALIVE_TICKS + 1, to);
    }

    fn load(&self, a: &mut Assembler, dst: Reg, word: usize) {
        a.load_address(dst, self.words.as_fd(), Words::offset(word));
        a.load(Size::W, dst, dst, 0);
    }
}

/// Jumps if the key is not one of IPv4. Destroys R0.
fn jump_unless_v4_key(a: &mut Assembler, to: Label) {
    a.load(Size::W, R0, R10, KEY);
    a.alu(Alu::And, R0, 0xff00);
    a.jump_if(R0, If::Ne, 4 << 8, to);
}

/// The halves of two words in the order in which this host keeps them.
fn ordered(halves: [[u32; 2]; 2]) -> impl Iterator<Item = u32> {
    let in_order = |[low, high]: [u32; 2]| {
        if cfg!(target_endian = "little") {
            [low, high]
        } else {
            [high, low]
        }
    };
    halves.into_iter().flat_map(in_order)
}

/// Ports from first to last as prefixes: the first port of each, and its length in bits.
fn prefixes(first: u16, last: u16) -> Vec<(u16, u32)> {
    let (mut next, last) = (u32::from(first), u32::from(last));
    let mut out = Vec::new();
    while next <= last {
        // The longest run that begins here, and does not end too late.
        let aligned = if next == 0 { 16 } else { next.trailing_zeros() };
        let fits = (last - next + 1).ilog2();
        let bits = aligned.min(fits);
        out.push((next as u16, 16 - bits));
        next += 1 << bits;
    }
    out
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpListener, TcpStream};
    use std::os::fd::AsFd;

    use super::*;
    use crate::flow::ended::HostFlow;
    use crate::kernel::bpf::test_run::{nanoseconds, run};
    use crate::kernel::netlink::{Address, Netlink};
    use crate::kernel::programs::phrases::{TC_ACT_UNSPEC, keep_packet, verdict};
    use crate::kernel::programs::stays::note_bounced;
    use crate::kernel::programs::testing::{
        L2, OldServer, Packet, ago, frame, icmp, moves, ports, tcp,
    };
    use crate::kernel::programs::{Facts, Own};
    use crate::kernel::testing::in_fresh_namespace;
    use crate::lab::wiring::Wiring;
    use crate::model::mode::{Percent, Settled};
    use crate::packet::{ACK, FIN, PSH, RST};
    use proptest::prelude::*;

    const SHARES: ShareKey = ShareKey([0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210]);
    const LONG_AGO: Duration = Duration::from_secs(1000);

    /// An old server, with so many moves.
    struct Server {
        programs: OldServer,
        moves: usize,
    }

    impl std::ops::Deref for Server {
        type Target = OldServer;

        fn deref(&self) -> &OldServer {
            &self.programs
        }
    }

    impl Server {
        /// From which two whole addresses have moved, running for long.
        fn new() -> Self {
            Self::of(&["192.0.2.5", "2001:db8:a::5"])
        }

        fn of(texts: &[&str]) -> Self {
            Self::with(&moves(texts))
        }

        fn with(moves: &[Move]) -> Self {
            let facts = Facts::new(moves).expect("run the tests as root");
            facts.own.begin_at(Duration::ZERO);
            facts.beat().unwrap();
            Self {
                programs: OldServer::new(facts),
                moves: moves.len(),
            }
        }

        /// All moves are in this mode, and were for long.
        fn be(&self, mode: Mode<Duration>) {
            let modes = vec![mode; self.moves];
            self.facts.modes.forget_changes();
            let set = self.facts.modes.set_at(&modes, SHARES, ago(LONG_AGO));
            set.unwrap();
            // In case of a hold, which may be over by then.
            self.facts.modes.words.set(SOME, 1);
        }

        /// All moves are in this mode from now on.
        fn turn(&self, mode: Mode<Duration>) {
            let modes = vec![mode; self.moves];
            self.facts.set_modes(&modes, SHARES).unwrap();
        }

        fn die(&self) {
            let long_ago = ago(LONG_AGO).as_nanos() >> ALIVE_TICK;
            self.facts.modes.words.set(HEARTBEAT, long_ago as u32);
        }

        /// The daemon bounces it.
        fn bounces(&self, packet: &Packet) {
            // The TUN has no link-layer header, but BPF_PROG_TEST_RUN wants one.
            let mut asm = Assembler::new();
            keep_packet(&mut asm);
            note_bounced(&mut asm, L2, &self.facts);
            verdict(&mut asm, TC_ACT_UNSPEC);
            let program = asm.finish("ipmoved_test").unwrap().load().unwrap();
            let outcome = run(program.as_fd(), &frame(&packet.bytes()));
            assert_eq!(outcome.verdict, TC_ACT_UNSPEC, "{packet:?}");
        }
    }

    fn here() -> Mode<Duration> {
        Mode::settled(Settled::Here)
    }

    fn moved() -> Mode<Duration> {
        Mode::settled(Settled::Moved)
    }

    fn shared(percent: u8) -> Mode<Duration> {
        Mode::settled(Settled::Shared(Percent::new(percent).unwrap()))
    }

    fn held(mode: Mode<Duration>) -> Mode<Duration> {
        let until = now() + Duration::from_secs(60);
        Mode {
            held_until: Some(until),
            ..mode
        }
    }

    /// The moved address, somebody else's, and the protocol of ICMP with its echo.
    const ENDS: [(&str, &str, u8, [u8; 2]); 2] = [
        ("192.0.2.5", "203.0.113.7", 1, [8, 0]),
        ("2001:db8:a::5", "2001:db8:c::7", 58, [128, 129]),
    ];

    /// A client's first packet of each kind but TCP, and the answer to it.
    fn requests(at: usize, port: u16) -> [(Packet, Packet); 3] {
        let (moved, remote, icmp_protocol, [ping, pong]) = ENDS[at];
        let pair = |protocol, request, answer| {
            (
                Packet::new(remote, moved, protocol, request),
                Packet::new(moved, remote, protocol, answer),
            )
        };
        [
            pair(17, ports(port, 53), ports(53, port)),
            pair(icmp_protocol, icmp(ping, port), icmp(pong, port)),
            pair(47, ports(port, 1), ports(1, port)),
        ]
    }

    fn tcp_in(at: usize, port: u16, flags: u8) -> Packet {
        let (moved, remote, ..) = ENDS[at];
        Packet::new(remote, moved, TCP, tcp(port, 80, flags))
    }

    fn tcp_out(at: usize, port: u16, flags: u8) -> Packet {
        let (moved, remote, ..) = ENDS[at];
        Packet::new(moved, remote, TCP, tcp(80, port, flags))
    }

    #[test]
    fn the_mode_says_who_gets_a_new_conversation() {
        for at in [0, 1] {
            for (mode, expected) in [
                (moved(), true),
                (here(), false),
                (held(here()), true),
                (held(moved()), true),
            ] {
                let server = Server::new();
                server.be(mode);
                for (request, _) in requests(at, 4000) {
                    assert_eq!(server.is_taken(&request), expected, "{mode:?} {request:?}");
                }
                assert_eq!(
                    server.is_taken(&tcp_in(at, 4000, SYN)),
                    expected,
                    "{mode:?}"
                );
                if mode.held_until.is_some() {
                    // What was held leaves no memory.
                    server.be(here());
                    for (request, _) in requests(at, 4000) {
                        assert!(!server.is_taken(&request), "{request:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_share_is_the_one_that_the_daemon_takes() {
        let server = Server::new();
        for percent in [1, 10, 50, 99] {
            server.be(shared(percent));
            for n in 0..300_u32 {
                let v4 = IpAddr::V4((0xcb00_7100 + 7919 * n).into());
                let v6 = (0x2001_0db8_u128 << 96) + (u128::from(n) << 64 | u128::from(n));
                for (client, moved) in [(v4, ENDS[0].0), (IpAddr::V6(v6.into()), ENDS[1].0)] {
                    let udp = Packet::new(&client.to_string(), moved, UDP, ports(9, 9));
                    let expected = SHARES.takes(client, percent);
                    assert_eq!(server.is_taken(&udp), expected, "{client} {percent}");
                }
            }
            // Begin anew, since who was taken goes on.
            server.facts.own.forget_taken();
        }
    }

    #[test]
    fn what_this_host_has_answered_goes_on_here_through_every_mode() {
        for at in [0, 1] {
            let server = Server::new();
            server.be(here());
            for (request, answer) in requests(at, 4000) {
                assert!(!server.is_taken(&request));
                server.sends(&answer);
            }
            // A container behind DNAT.
            assert!(!server.is_taken(&tcp_in(at, 4000, SYN)));
            server.sends(&tcp_out(at, 4000, SYN | ACK));
            for mode in [
                shared(99),
                held(shared(99)),
                moved(),
                held(here()),
                here(),
                moved(),
            ] {
                server.turn(mode);
                for (request, answer) in requests(at, 4000) {
                    assert!(!server.is_taken(&request), "{mode:?} {request:?}");
                    let error = Packet::icmp_error(&request.src.to_string(), &answer);
                    assert!(!server.is_taken(&error), "{mode:?} {error:?}");
                    server.sends(&answer);
                }
                for flags in [ACK, ACK | PSH, FIN | ACK] {
                    assert!(
                        !server.is_taken(&tcp_in(at, 4000, flags)),
                        "{mode:?} {flags}"
                    );
                }
                server.sends(&tcp_out(at, 4000, ACK | PSH));
            }
            // So it does when nothing was changed for long.
            server.be(moved());
            server.facts.modes.words.set(SOME, 0);
            server.facts.own.age(ago(Duration::from_secs(100)));
            for (request, answer) in requests(at, 4000) {
                assert!(!server.is_taken(&request), "{request:?}");
                server.sends(&answer);
            }
            server.facts.own.age_by(Duration::from_secs(100));
            for (request, _) in requests(at, 4000) {
                assert!(!server.is_taken(&request), "it was refreshed: {request:?}");
            }
            for (request, _) in &requests(at, 4001)[..2] {
                assert!(server.is_taken(request), "{request:?}");
            }
            assert!(server.is_taken(&tcp_in(at, 4001, SYN)));
            assert!(server.is_taken(&tcp_in(at, 4001, ACK)));
        }
    }

    #[test]
    fn what_the_new_server_has_goes_on_there_through_every_mode() {
        for at in [0, 1] {
            let server = Server::new();
            for (request, answer) in requests(at, 4000) {
                assert!(server.is_taken(&request));
                server.answers(&answer);
            }
            assert!(server.is_taken(&tcp_in(at, 4000, SYN)));
            assert!(server.is_taken(&tcp_in(at, 4000, ACK)));
            for mode in [here(), held(here()), shared(1), moved(), here()] {
                server.turn(mode);
                for (request, answer) in requests(at, 4000) {
                    // Pings were not noted while everything was moved: the daemon knows.
                    assert!(server.is_taken(&request), "{mode:?} {request:?}");
                    server.answers(&answer);
                    if request.protocol == 17 {
                        let error = Packet::icmp_error(&request.src.to_string(), &answer);
                        assert!(server.is_taken(&error), "{mode:?} {error:?}");
                    }
                }
                for flags in [ACK, ACK | PSH, FIN | ACK] {
                    assert!(
                        server.is_taken(&tcp_in(at, 4000, flags)),
                        "{mode:?} {flags}"
                    );
                }
            }
            // What was answered is known by itself when the daemon is not asked any more.
            server.be(here());
            for (request, _) in requests(at, 4000) {
                assert!(server.is_taken(&request), "{request:?}");
            }
            for (request, _) in &requests(at, 4001)[..2] {
                assert!(!server.is_taken(request), "{request:?}");
            }
        }
    }

    #[test]
    fn the_daemon_is_asked_as_long_as_only_it_can_know_and_it_is_alive() {
        for at in [0, 1] {
            let server = Server::new();
            let [(udp, _), (ping, _), (gre, _)] = requests(at, 4000);
            server.turn(here());
            assert!(server.is_taken(&tcp_in(at, 1, SYN)), "it may be repeated");
            for packet in [&udp, &ping, &gre] {
                assert!(server.is_taken(packet), "{packet:?}");
            }
            server.die();
            assert!(!server.is_taken(&tcp_in(at, 1, SYN)));
            for packet in [&udp, &ping, &gre] {
                assert!(!server.is_taken(packet), "nothing was noted: {packet:?}");
            }
            assert!(!server.is_taken(&tcp_in(at, 1, ACK)));
            let server = Server::new();
            server.be(here());
            assert!(!server.is_taken(&tcp_in(at, 1, SYN)));
            assert!(server.is_taken(&tcp_in(at, 1, ACK)), "always");
            let quoted = Packet::icmp_error(ENDS[at].1, &tcp_out(at, 1, ACK));
            assert!(server.is_taken(&quoted), "always");
            server.die();
            assert!(!server.is_taken(&tcp_in(at, 1, ACK)));
            assert!(!server.is_taken(&quoted));

            // Clients have moved: a cookie may be this host's.
            let server = Server::new();
            server.be(here());
            server.turn(moved());
            assert!(server.is_taken(&tcp_in(at, 2, ACK)));
            server.be(here());
            server.die();
            assert!(!server.is_taken(&tcp_in(at, 2, ACK)), "nothing was noted");
        }
    }

    #[test]
    fn programs_for_other_moves_go_on_asking_as_long_as_those_before() {
        let before = Server::new();
        before.be(here());
        before.turn(moved());
        let (ends, unknown) = (["192.0.2.5:80/tcp", "2001:db8:a::5"], "192.0.2.6");
        let server = Server::of(&[unknown, ends[0], ends[1]]);
        server.facts.follow_modes(&before.facts);
        server.turn(moved());
        for at in [0, 1] {
            assert!(server.is_taken(&tcp_in(at, 2, ACK)), "it may be a cookie's");
        }
        // Nobody has told these that clients had ever been here.
        let server = Server::of(&[ends[0], ends[1]]);
        server.turn(moved());
        let asks = |server: &Server| server.facts.modes.state.lock().unwrap().values.clone();
        assert_eq!(asks(&server), [Value::MOVED; 2]);
    }

    #[test]
    fn a_hold_ends_by_itself() {
        let server = Server::new();
        for (mode, afterwards) in [(here(), false), (moved(), true)] {
            server.be(mode);
            let mut waits = held(mode);
            server.turn(waits);
            server.die();
            for at in [0, 1] {
                assert!(server.is_taken(&tcp_in(at, 1, SYN)));
                assert!(server.is_taken(&requests(at, 1)[0].0));
            }
            waits.held_until = Some(now());
            server.turn(waits);
            for at in [0, 1] {
                assert_eq!(server.is_taken(&tcp_in(at, 1, SYN)), afterwards);
                assert_eq!(server.is_taken(&requests(at, 1)[0].0), afterwards);
            }
        }
    }

    #[test]
    fn what_is_bounced_is_not_the_new_servers_any_more() {
        for at in [0, 1] {
            let server = Server::new();
            assert!(server.is_taken(&tcp_in(at, 1, SYN)));
            assert!(server.is_taken(&tcp_in(at, 1, ACK)), "noted");
            let [(udp, answer), ..] = requests(at, 1);
            assert!(server.is_taken(&udp));
            server.be(here());
            for packet in [tcp_in(at, 1, SYN), udp.clone()] {
                assert!(server.is_taken(&packet), "it has a flow");
                server.bounces(&packet);
                assert!(!server.is_taken(&packet));
            }
            server.sends(&answer);
            server.be(moved());
            assert!(!server.is_taken(&udp), "this host has answered it");
        }
    }

    #[test]
    fn fragments_follow_the_first_whoever_has_it() {
        for at in [0, 1] {
            let server = Server::new();
            let [(theirs, _), ..] = requests(at, 1);
            let [(mine, _), ..] = requests(at, 2);
            assert!(server.is_taken(&theirs));
            server.be(here());
            let part = |packet: &Packet, id, offset, more| Packet {
                fragment: Some((id, offset, more)),
                ..packet.clone()
            };
            let [(noise, _), ..] = requests(at, 9);
            for (packet, id, expected) in [(&theirs, 5, true), (&mine, 6, false)] {
                assert!(
                    !server.is_taken(&part(&noise, id, 3, true)),
                    "not known yet"
                );
                assert_eq!(server.is_taken(&part(packet, id, 0, true)), expected);
                assert_eq!(server.is_taken(&part(&noise, id, 3, true)), expected);
                assert_eq!(server.is_taken(&part(&noise, id, 6, false)), expected);
                assert!(
                    !server.is_taken(&part(&noise, id, 3, true)),
                    "that was the last"
                );
            }
            server.be(held(here()));
            assert!(server.is_taken(&part(&noise, 7, 3, true)), "it has to wait");
        }
    }

    #[test]
    fn a_flood_displaces_nothing_that_both_sides_go_on_with() {
        in_fresh_namespace(|| {
            let server = Server::new();
            server.be(here());
            let [(udp, answer), ..] = requests(0, 4000);
            for _ in 0..2 {
                assert!(!server.is_taken(&udp));
                server.sends(&answer);
            }
            // TCP of a container, whose client has acknowledged what only it can know.
            let mut syn_ack = tcp_out(0, 4000, SYN | ACK);
            syn_ack.payload[4..8].copy_from_slice(&7_000_000_u32.to_be_bytes());
            let mut ack = tcp_in(0, 4000, ACK);
            ack.payload[8..12].copy_from_slice(&7_000_001_u32.to_be_bytes());
            assert!(!server.is_taken(&tcp_in(0, 4000, SYN)));
            server.sends(&syn_ack);
            assert_eq!(server.facts.own.kept(), 1);
            assert!(!server.is_taken(&tcp_in(0, 4000, ACK)), "a guess");
            assert_eq!(server.facts.own.kept(), 1);
            assert!(!server.is_taken(&ack));
            assert_eq!(server.facts.own.kept(), 2);
            // An outgoing connection of a host behind this one.
            let mut begins = tcp_out(0, 4001, SYN);
            begins.payload[4..8].copy_from_slice(&u32::MAX.to_be_bytes());
            server.sends(&begins);
            let accepts = tcp_in(0, 4001, SYN | ACK);
            assert!(!server.is_taken(&accepts));
            assert_eq!(server.facts.own.kept(), 3);
            // Each source is answered once; those of UDP ask again.
            for n in 0..100_000_u32 {
                let source = std::net::Ipv4Addr::from(0x0a00_0000 + n).to_string();
                if n % 2 == 0 {
                    let syn_ack = Packet::new(ENDS[0].0, &source, TCP, tcp(80, 9, SYN | ACK));
                    server.sends(&syn_ack);
                    continue;
                }
                let asks = Packet::new(&source, ENDS[0].0, UDP, ports(9, 53));
                server.sends(&Packet::new(ENDS[0].0, &source, UDP, ports(53, 9)));
                assert!(!server.is_taken(&asks));
            }
            assert_eq!(server.facts.own.kept(), 3);
            server.be(moved());
            assert!(!server.is_taken(&udp));
            assert!(!server.is_taken(&ack));
            assert!(!server.is_taken(&accepts));
        });
    }

    #[test]
    fn connections_that_close_leave_room_to_those_that_go_on() {
        in_fresh_namespace(|| {
            let server = Server::new();
            server.be(here());
            let own = &server.facts.own;
            let establish = |port: u16| {
                let mut syn_ack = tcp_out(0, port, SYN | ACK);
                syn_ack.payload[4..8].copy_from_slice(&7_000_000_u32.to_be_bytes());
                let mut ack = tcp_in(0, port, ACK);
                ack.payload[8..12].copy_from_slice(&7_000_001_u32.to_be_bytes());
                assert!(!server.is_taken(&tcp_in(0, port, SYN)));
                server.sends(&syn_ack);
                assert!(!server.is_taken(&ack));
            };
            let first = own.kept();
            for (port, ending) in [(4000, FIN | ACK), (4001, RST)] {
                establish(port);
                assert_eq!(own.kept(), first + 1);
                match ending {
                    RST => assert!(!server.is_taken(&tcp_in(0, port, RST))),
                    _ => server.sends(&tcp_out(0, port, FIN | ACK)),
                }
                assert_eq!(own.kept(), first, "{port}");
                let left = || {
                    own.live()
                        .unwrap()
                        .iter()
                        .any(|it| it.remote.port() == port)
                };
                assert!(left(), "for a moment");
                own.age_by(Duration::from_secs(4));
                assert!(!left(), "it does not count as left");
                // Its last packets are its host's all the same.
                server.be(moved());
                assert!(!server.is_taken(&tcp_in(0, port, ACK)), "{port}");
                server.be(here());
            }
            // A reset that was forged ends nothing: its host goes on, and it is kept again.
            establish(4002);
            assert!(!server.is_taken(&tcp_in(0, 4002, RST)));
            assert_eq!(own.kept(), first);
            server.sends(&tcp_out(0, 4002, ACK));
            assert_eq!(own.kept(), first + 1);
            own.age_by(Duration::from_secs(4));
            assert!(
                own.live()
                    .unwrap()
                    .iter()
                    .any(|it| it.remote.port() == 4002)
            );
        });
    }

    #[test]
    fn where_there_is_no_room_the_newest_is_counted_and_remembered_as_before() {
        in_fresh_namespace(|| {
            let server = Server::new();
            server.be(here());
            let conversation = |n: u32| {
                let source = std::net::Ipv4Addr::from(0x0a00_0000 + n).to_string();
                let asks = Packet::new(&source, ENDS[0].0, UDP, ports(9, 53));
                let answers = Packet::new(ENDS[0].0, &source, UDP, ports(53, 9));
                for _ in 0..2 {
                    assert!(!server.is_taken(&asks));
                    server.sends(&answers);
                }
                asks
            };
            let first = conversation(0);
            let room = Own::ROOM as u32;
            let older = (1..room).map(|n| HostFlow {
                protocol: TCP,
                local: SocketAddr::new(ENDS[0].0.parse().unwrap(), 80),
                remote: SocketAddr::new(IpAddr::V4((0x0b00_0000 + n).into()), 9),
            });
            server.facts.own.note(older).unwrap();
            assert_eq!(
                (server.facts.own.kept(), server.facts.own.full()),
                (room as usize, 0)
            );
            let last = conversation(room);
            assert_eq!(
                (server.facts.own.kept(), server.facts.own.full()),
                (room as usize, 1)
            );
            server.be(moved());
            assert!(!server.is_taken(&first));
            assert!(!server.is_taken(&last));
            let live = server.facts.own.live().unwrap();
            assert_eq!(live.len(), room as usize + 1);
            let udp = |flow: &HostFlow| flow.protocol == UDP;
            assert_eq!(server.facts.own.forget_all(udp).unwrap(), 2);
            assert!(server.is_taken(&first));
            // They make room when they are over.
            server.facts.own.age(ago(8 * LONG_AGO));
            for _ in 0..20 {
                server.facts.beat().unwrap();
            }
            assert_eq!(server.facts.own.kept(), 0);
        });
    }

    #[test]
    fn sockets_of_this_host_are_asked_in_every_mode() {
        in_fresh_namespace(|| {
            let netlink = Netlink::new().unwrap();
            netlink.set_link_up(1).unwrap();
            for (moved, ..) in ENDS {
                let addr = moved.parse().unwrap();
                let prefix = if moved.contains(':') { 128 } else { 32 };
                let address = Address {
                    index: 1,
                    addr,
                    prefix,
                };
                netlink.add_address(&address).unwrap();
            }
            let server = Server::new();
            for (at, (addr, ..)) in ENDS.into_iter().enumerate() {
                let end = SocketAddr::new(addr.parse().unwrap(), 80);
                let _service = TcpListener::bind(end).unwrap();
                let client = TcpStream::connect(end).unwrap();
                let from = client.local_addr().unwrap();
                let there = from.ip().to_string();
                for mode in [moved(), here(), held(here()), shared(99), moved()] {
                    server.turn(mode);
                    for flags in [SYN, ACK, FIN | ACK, RST] {
                        let packet = Packet::new(&there, addr, TCP, tcp(from.port(), 80, flags));
                        assert!(!server.is_taken(&packet), "{mode:?} {flags}");
                    }
                }
                server.be(here());
                assert!(!server.is_taken(&tcp_in(at, 4000, SYN)));
                assert!(
                    server.is_taken(&tcp_in(at, 4000, ACK)),
                    "a cookie or not: it is asked"
                );
            }
        });
    }

    #[test]
    fn ports_are_covered_by_prefixes_exactly() {
        for (first, last) in [
            (0, 65_535),
            (1, 65_535),
            (80, 80),
            (1, 2),
            (7, 1_000),
            (0, 1),
        ] {
            let all = prefixes(first, last);
            let covered = all.iter().flat_map(|&(port, bits)| {
                let port = u32::from(port);
                port..port + (1 << (16 - bits))
            });
            assert!(
                covered.eq(u32::from(first)..=u32::from(last)),
                "{first} {last}"
            );
            assert!(all.len() <= 30);
        }
    }

    fn any_mode() -> impl Strategy<Value = Mode<Duration>> {
        prop_oneof![
            Just(here()),
            Just(moved()),
            (1u8..100).prop_map(shared),
            Just(held(here())),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Overlapping moves in any modes, and new conversations of every kind.
        #[test]
        fn the_programs_decide_as_the_moves_say(
            picks in proptest::collection::vec((0usize..10, any_mode()), 1..8),
            packets in proptest::collection::vec((0u8..8, 0u8..4, 0usize..6, 0usize..4), 40),
        ) {
            const MOVES: [&str; 10] = [
                "192.0.2.0/29", "192.0.2.5", "192.0.2.5:80/tcp", "192.0.2.5:53",
                "192.0.2.4/31:80-90",
                "192.0.2.5:1-100/udp", "192.0.2.6/tcp", "192.0.2.6:443", "192.0.2.2/31:8080",
                "192.0.2.0/29:50-60/udp",
            ];
            let all: Vec<Move> = picks.iter().map(|(at, _)| MOVES[*at].parse().unwrap()).collect();
            let modes: Vec<_> = picks.iter().map(|(_, mode)| *mode).collect();
            let server = Server::with(&all);
            server.facts.modes.set_at(&modes, SHARES, ago(LONG_AGO)).unwrap();
            for (n, (host, client, port, kind)) in packets.into_iter().enumerate() {
                let dst: IpAddr = [192, 0, 2, host].into();
                let src: IpAddr = [203, 0, client, 7].into();
                let port = [53, 55, 80, 85, 443, 8080][port];
                // Each is a new one, but for what has no ports.
                let from = 1000 + n as u16;
                let (protocol, port, payload) = match kind {
                    0 => (TCP, Some(port), tcp(from, port, SYN)),
                    1 => (UDP, Some(port), ports(from, port)),
                    2 => (1, None, icmp(8, from)),
                    _ => (100 + n as u8, None, ports(1, 2)),
                };
                let takes = |moved: &&(usize, &Move)| {
                    moved.1.prefix.contains(dst) && moved.1.takes(protocol, port)
                };
                let owners: Vec<_> = all.iter().enumerate().collect();
                let owner = owners.iter().filter(takes).max_by_key(|(number, moved)| {
                    (moved.prefix.len(), usize::MAX - number)
                });
                let expected = owner.is_some_and(|&(number, _)| {
                    let mode = &modes[number];
                    let percent = mode.settled.percent();
                    mode.held_until.is_some() || SHARES.takes(src, percent)
                });
                let packet = Packet::new(&src.to_string(), &dst.to_string(), protocol, payload);
                prop_assert_eq!(server.is_taken(&packet), expected, "{:?}", packet);
            }
        }
    }

    #[test]
    #[ignore = "a measurement"]
    fn what_the_modes_cost() {
        in_fresh_namespace(|| {
            let server = Server::new();
            let cost =
                |packet: &Packet| nanoseconds(server.capture.as_fd(), &frame(&packet.bytes()));
            for at in [0, 1] {
                let known = tcp_in(at, 4000, ACK);
                let syn = tcp_in(at, 4001, SYN);
                let ack = tcp_in(at, 4002, ACK);
                let [(udp, answer), ..] = requests(at, 4003);
                server.turn(moved());
                server.be(moved());
                server.facts.modes.words.set(SOME, 0);
                assert!(server.is_taken(&known));
                eprintln!("moved: known {} syn {}", cost(&known), cost(&syn));
                server.be(here());
                eprintln!(
                    "here: known {} syn {} ack {}",
                    cost(&known),
                    cost(&syn),
                    cost(&ack)
                );
                eprintln!("here: a request {}", cost(&udp));
                for _ in 0..2 {
                    assert!(!server.is_taken(&udp));
                    server.sends(&answer);
                }
                eprintln!("here: own {}", cost(&udp));
                server.be(shared(50));
                eprintln!("shared: known {} syn {}", cost(&known), cost(&syn));
                server.be(held(here()));
                eprintln!("held: known {} syn {}", cost(&known), cost(&syn));
            }
        });
    }
}
