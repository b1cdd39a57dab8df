//! What is the old server's own: the memory of conversations that this host has itself, or a host
//! behind it, from or at an address that has moved.
//!
//! Owns the maps, what is in their values, and how they outlive the daemon. Keys are those of
//! [`flows`](super::flows). [`stays`](super::stays) asks it about packets that come,
//! [`note_own`](super::note_own()) fills it with those that leave.
//!
//! ```text
//! own        struct { u64 seen; u32 kind; u32 young; }
//!            what this host has begun: when it last sent; by what (`KIND_*`); whether it was first
//!            seen so soon after the start that it may be an answer to what came before; of
//!            `KIND_ASKED`, when that was, in ticks (`ASKED_TICK`)
//! taken      u64 answered
//!            flows of clients that were captured: when the new server last answered, or 0. Of TCP
//!            and ICMP it is not noted
//! others     u64 seen
//!            UDP from ports that have not moved, beside others of the address that have: its first
//!            fragments stay, since all fragments are captured. Without it the daemon bounces them
//! fragments  u64, unused
//!            fragmented packets of own conversations under way, by identification
//! noted      by a hash of the flow: u64 hash_and_time
//!            where the new server's answer was noted of late, so that it need not be noted again
//! facts      struct { u64 since; u64 stayed; }
//!            when this memory began; packets to what has moved that stayed here
//! ```
//!
//! TCP of this host needs no memory: its sockets are asked.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use Reg::{R0, R1, R2, R10};

use super::flows::{VALUE, enter, key_of, now};
use crate::flow::class::{TCP_ESTABLISHED, UDP_ONE_WAY};
use crate::flow::ended::HostFlow;
use crate::kernel::bpf::{Alu, Assembler, BpfError, Helper, If, Map, MapKind, Reg, Shape, Size};

/// How long a conversation without TCP is this host's own after it last sent: what a mapping of UDP
/// lasts at least (RFC 4787 REQ-5), and in Linux's connection tracker. A client with a fixed port
/// that the old service served last moves within this time, once that is silent.
pub const OWN_IDLE: Duration = UDP_ONE_WAY;

/// The same of TCP behind this host (RFC 5382 REQ-5).
pub(super) const OWN_IDLE_TCP: Duration = TCP_ESTABLISHED;

/// The same of what a UDP socket of this host has begun, while there is one at its port: a peer
/// with a fixed port (IKE, SIP, WireGuard without keepalives) may be the next to speak, much later.
pub(super) const OWN_LASTING: Duration = TCP_ESTABLISHED;

/// How long what the new server answered is the tunnel's, whatever this host sends there.
pub(super) const ANSWERED: Duration = UDP_ONE_WAY;

/// What leaves so soon after the start may answer a request that came before: the time for which
/// applications wait for an answer, and then ask again.
const YOUNG: Duration = Duration::from_secs(1);

/// How long such a conversation is taken for this host's own, however often it is heard. If it is,
/// it will have been heard first after that.
pub(super) const YOUNG_IDLE: Duration = Duration::from_secs(5);

/// Conversations that are remembered, of either kind. The one used least recently gives way; 65,536
/// take some 8 MB of kernel memory.
const MAX_OWN: u32 = 65_536;

/// Fragmented packets under way at the same time; see [`flows`](super::flows).
const MAX_FRAGMENTED: u32 = 4096;

/// Conversations of ports that have not moved which are remembered for their fragments: 4,096 take
/// half a megabyte.
const MAX_OTHERS: u32 = 4096;

/// Flows whose answers need not be noted at the same time, a power of two. Where two share a place,
/// both are noted more often.
pub(super) const MAX_NOTED: u32 = 4096;

/// Where the parts of an own conversation's value lie in it.
pub(super) const OWN_SEEN: i16 = 0;
pub(super) const OWN_KIND: i16 = 8;
pub(super) const OWN_YOUNG: i16 = 12;

/// A UDP socket of this host sends it, from the port that others see. It ends with the socket.
pub(super) const KIND_SOCKET: i32 = 1;
/// A host behind this one sends it, or a socket whose address is translated, or the kernel.
pub(super) const KIND_BEHIND: i32 = 2;
/// TCP of a host behind this one that is closing: nothing but a new connection ends it.
pub(super) const KIND_CLOSED: i32 = 3;
/// TCP of a host behind this one that was silent when somebody began anew. If it lives it answers
/// with a challenge (RFC 5961 section 4); it is over if it has not by the next SYN.
pub(super) const KIND_ASKED: i32 = 4;
/// As [`KIND_SOCKET`], of a socket that is connected to nobody, and begun by it. For that, no
/// request may have come before: from the start on each is either in `taken` or in `own` before it
/// can be answered, and one from before the start was answered within [`OWN_IDLE`], or never. What
/// a socket connected to somebody sends is kept no longer than it: the next one at its port may be
/// a service that waits for everybody.
pub(super) const KIND_LASTING: i32 = 5;

/// A tick of the time when it was asked, as a power of two in nanoseconds: 1.07 s.
pub(super) const ASKED_TICK: i32 = 30;

/// Ticks within which it answers: more than one has passed by then, as between a client's first two
/// SYNs (RFC 6298 section 2).
pub(super) const ASKED_TICKS: i32 = 2;

/// Where the facts lie.
const SINCE: u32 = 0;
const STAYED: u32 = 8;

const KEY_BYTES: usize = 40;
const OWN_BYTES: usize = 16;
const FACTS_BYTES: usize = 16;

const fn table(name: &'static str, value_size: usize, max_entries: u32) -> Shape {
    Shape {
        kind: MapKind::LruHash,
        name,
        key_size: KEY_BYTES,
        value_size,
        max_entries,
    }
}

/// The shapes, by name.
const OWN: Shape = table("ipmoved_own", OWN_BYTES, MAX_OWN);
const TAKEN: Shape = table("ipmoved_taken", 8, MAX_OWN);
const OTHERS: Shape = table("ipmoved_ownrest", 8, MAX_OTHERS);
const FRAGMENTS: Shape = table("ipmoved_ownfrag", 8, MAX_FRAGMENTED);
const NOTED: Shape = Shape {
    kind: MapKind::Array,
    name: "ipmoved_noted",
    key_size: 4,
    value_size: 8,
    max_entries: MAX_NOTED,
};
const FACTS: Shape = Shape {
    kind: MapKind::Array,
    name: "ipmoved_since",
    key_size: 4,
    value_size: FACTS_BYTES,
    max_entries: 1,
};

/// The memory of one old server.
#[derive(Debug)]
pub struct Own {
    pub(super) own: Map,
    pub(super) taken: Map,
    pub(super) others: Map,
    pub(super) fragments: Map,
    pub(super) noted: Map,
    facts: Map,
    /// A daemon that was killed had it before.
    resumes: bool,
}

impl Own {
    /// Most conversations that are remembered.
    pub const ROOM: usize = MAX_OWN as usize;

    /// An empty memory, which begins now.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn new() -> Result<Self, BpfError> {
        let memory = Self {
            own: Map::new(OWN)?,
            taken: Map::new(TAKEN)?,
            others: Map::new(OTHERS)?,
            fragments: Map::new(FRAGMENTS)?,
            noted: Map::new(NOTED)?,
            facts: Map::new(FACTS)?,
            resumes: false,
        };
        memory.begin_at(now());
        Ok(memory)
    }

    /// The memory among these descriptors, if all of it is there with the same measures.
    pub fn found(descriptors: &[OwnedFd]) -> Option<Self> {
        let find = |shape: Shape| {
            descriptors
                .iter()
                .filter_map(|fd| fd.try_clone().ok())
                .find_map(|fd| Map::from_fd(fd, shape))
        };
        Some(Self {
            own: find(OWN)?,
            taken: find(TAKEN)?,
            others: find(OTHERS)?,
            fragments: find(FRAGMENTS)?,
            noted: find(NOTED)?,
            facts: find(FACTS)?,
            resumes: true,
        })
    }

    /// All of it, for [`found`](Self::found).
    pub fn lasting(&self) -> Vec<BorrowedFd<'_>> {
        let Self {
            own,
            taken,
            others,
            fragments,
            noted,
            facts,
            resumes: _,
        } = self;
        [own, taken, others, fragments, noted, facts]
            .map(AsFd::as_fd)
            .into()
    }

    /// Whether a daemon that was killed had this memory before.
    pub fn resumes(&self) -> bool {
        self.resumes
    }

    /// Enters conversations of hosts behind this one that are older than this memory.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn note(&self, older: impl IntoIterator<Item = HostFlow>) -> Result<(), BpfError> {
        let mut value = [0; OWN_BYTES];
        value[..8].copy_from_slice(&(now().as_nanos() as u64).to_ne_bytes());
        value[8..12].copy_from_slice(&KIND_BEHIND.to_ne_bytes());
        for flow in older.into_iter().take(Self::ROOM) {
            let entered = self.own.insert(&key_of(&flow), &value);
            entered.map_err(BpfError::of_map(OWN.name))?;
        }
        Ok(())
    }

    /// Packets to what has moved that stayed here, since this memory began.
    pub fn stayed(&self) -> u64 {
        let mut value = [0; FACTS_BYTES];
        if !self.facts.read(&0_u32.to_ne_bytes(), &mut value) {
            return 0;
        }
        let [.., a, b, c, d, e, f, g, h] = value;
        u64::from_ne_bytes([a, b, c, d, e, f, g, h])
    }

    pub(super) fn begin_at(&self, since: Duration) {
        let mut value = [0; FACTS_BYTES];
        value[..8].copy_from_slice(&(since.as_nanos() as u64).to_ne_bytes());
        // Without it nothing counts as young.
        let _ = self.facts.insert(&0_u32.to_ne_bytes(), &value);
    }

    /// Every conversation was seen last at this time.
    #[cfg(test)]
    pub(super) fn age(&self, seen: Duration) {
        for key in self.own.keys().unwrap() {
            let mut value = [0; OWN_BYTES];
            assert!(self.own.read(&key, &mut value));
            value[..8].copy_from_slice(&(seen.as_nanos() as u64).to_ne_bytes());
            self.own.insert(&key, &value).unwrap();
        }
    }

    /// Every conversation that was asked was so this many ticks earlier.
    #[cfg(test)]
    pub(super) fn asked_earlier(&self, ticks: i32) {
        let asked = OWN_YOUNG as usize;
        for key in self.own.keys().unwrap() {
            let mut value = [0; OWN_BYTES];
            assert!(self.own.read(&key, &mut value));
            let at = i32::from_ne_bytes(value[asked..].try_into().unwrap());
            value[asked..].copy_from_slice(&(at - ticks).to_ne_bytes());
            self.own.insert(&key, &value).unwrap();
        }
    }

    /// How many conversations are remembered.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.own.keys().unwrap().len()
    }

    /// How many conversations of other ports are.
    #[cfg(test)]
    pub(super) fn others(&self) -> usize {
        self.others.keys().unwrap().len()
    }

    /// No client was captured.
    #[cfg(test)]
    pub(super) fn forget_taken(&self) {
        for key in self.taken.keys().unwrap() {
            self.taken.remove(&key).unwrap();
        }
    }

    /// Counts a packet that stays.
    pub(super) fn count_stayed(&self, a: &mut Assembler) {
        a.load_address(R1, self.facts.as_fd(), STAYED);
        a.mov(R2, 1);
        a.add_atomically(R1, 0, R2);
    }

    /// Enters the key as an own conversation of the kind that the register says, seen now. Soon
    /// after the start none is lasting.
    pub(super) fn enter_own(&self, a: &mut Assembler, kind: Reg) {
        let (old, short) = (a.label(), a.label());
        a.store(Size::W, R10, VALUE + OWN_KIND, kind);
        a.store(Size::W, R10, VALUE + OWN_YOUNG, 0);
        a.call(Helper::KtimeGetNs);
        a.store(Size::Dw, R10, VALUE + OWN_SEEN, R0);
        a.load_address(R1, self.facts.as_fd(), SINCE);
        a.load(Size::Dw, R1, R1, 0);
        a.mov_wide(R2, OWN_IDLE.as_nanos() as u64);
        a.alu(Alu::Add, R2, R1);
        a.jump_if_wide(R0, If::Gt, R2, old);
        a.jump_if(kind, If::Ne, KIND_LASTING, short);
        a.store(Size::W, R10, VALUE + OWN_KIND, KIND_SOCKET);
        a.bind(short);
        a.mov_wide(R2, YOUNG.as_nanos() as u64);
        a.alu(Alu::Add, R1, R2);
        a.jump_if_wide(R0, If::Gt, R1, old);
        a.store(Size::W, R10, VALUE + OWN_YOUNG, 1);
        a.bind(old);
        enter(a, &self.own);
    }
}
