//! What is the old server's own: the memory of conversations that this host has itself, or a host
//! behind it, from or at an address that has moved.
//!
//! Owns the maps, what is in their values, and how they outlive the daemon. Keys are those of
//! [`flows`](super::flows). [`stays`](super::stays) asks it about packets that come,
//! [`note_own`](super::note_own()) fills it with those that leave.
//!
//! ```text
//! own        struct { u64 seen; u32 kind; u32 stage; }
//!            what this host has begun or answered: when it last sent; by what (`KIND_*`); how far
//!            it has come (`STAGE_*`), but of `KIND_ASKED`, when that was, in ticks
//!            (`ASKED_TICK`), and of `KIND_OPENING` the number that the other one has to
//!            acknowledge
//! kept       the same, of conversations in which both have gone on: a flood of new ones displaces
//!            none of them. Where it is full, what is new remains in `own`
//! keeps      u32 tick, not 0: `kept` may hold something
//! taken      u64 answered
//!            flows of clients that were captured: when the new server last answered, or 0. Of TCP
//!            and ICMP it is not noted
//! others     u64 seen
//!            UDP from ports that have not moved, beside others of the address that have: its first
//!            fragments stay, since all fragments are captured. Without it the daemon bounces them
//! elsewhere  u64 until
//!            who may speak to which port here from any port, see `another_port`
//! fragments  u64 taken
//!            fragmented packets under way, by identification: those of own conversations, and
//!            while not everything is moved those that were taken as well
//! begun      struct { u64 seen; u64 by; }
//!            what the new server has begun from ports that have not moved, see `begun`; where
//!            several may, which of them has, as the daemon notes it with the first answer
//! noted      by a hash of the flow: u64 hash_and_time
//!            where the new server's answer was noted of late, so that it need not be noted again
//! facts      struct { u64 since; u64 stayed; u64 full; }
//!            when this memory began; packets to what has moved that stayed here; how often `kept`
//!            was full
//! ```
//!
//! TCP of this host needs no memory: its sockets are asked.

use std::num::NonZeroU64;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::io::Errno;

use Reg::{R0, R1, R2, R10};

use super::flows::{VALUE, enter, flow_of, key_of, look_up, now, remove};
use super::served_here::ServedHere;
use crate::flow::class::{TCP_ESTABLISHED, TCP_HALF_CLOSED, UDP_ONE_WAY};
use crate::flow::ended::HostFlow;
use crate::flow::modes::Taken;
use crate::kernel::bpf::{
    Alu, Assembler, BpfError, Helper, If, Label, Map, MapKind, Operand, Reg, Shape, Size, Words,
};
use crate::model::moved::TCP;

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

/// Connections of the new server from ports that have not moved that are remembered: a minute of
/// the fastest pace at which it may begin them. The one used least recently gives way.
const MAX_BEGUN: u32 = 65_536;

/// Conversations that are kept from giving way. They take as much memory, from the start: a program
/// gets none while the kernel is short of it.
const MAX_KEPT: u32 = 65_536;

/// So long a connection that is closing counts as one that is left: what its host has sent last
/// may have to be sent once more.
const CLOSING: Duration = Duration::from_secs(3);

/// Of these, one sweep looks at so many.
const SWEPT: u32 = 4096;

/// Ticks without a new one, after which `kept` may be found empty.
const QUIET_TICKS: u32 = 10;

/// Fragmented packets under way at the same time; see [`flows`](super::flows).
const MAX_FRAGMENTED: u32 = 4096;

/// Conversations of ports that have not moved which are remembered for their fragments: 4,096 take
/// half a megabyte.
const MAX_OTHERS: u32 = 4096;

/// Ends that may be spoken to from another port at the same time: a resolver here asks some hundred
/// times a second, each of which is remembered for ten; the one used least recently gives way.
const MAX_ELSEWHERE: u32 = 4096;

/// Flows whose answers need not be noted at the same time, a power of two. Where two share a place,
/// both are noted more often.
pub(super) const MAX_NOTED: u32 = 4096;

/// Where the parts of an own conversation's value lie in it.
pub(super) const OWN_SEEN: i16 = 0;
pub(super) const OWN_KIND: i16 = 8;
pub(super) const OWN_STAGE: i16 = 12;

/// This host has sent, and the other one has not, as far as is known.
pub(super) const STAGE_PLAIN: i32 = 0;
/// It was first seen so soon after the start that it may be an answer to what came before.
pub(super) const STAGE_YOUNG: i32 = 1;
/// The other one has gone on. If this host does too, it is kept.
pub(super) const STAGE_HEARD: i32 = 2;
/// It is in `kept`.
pub(super) const STAGE_KEPT: i32 = 3;
/// A client has asked this host, which has not answered: it is nobody's conversation yet.
pub(super) const STAGE_REQUEST: i32 = 4;

/// TCP that the other one has reset, and that its host has not gone on with since.
pub(super) const STAGE_RESET: i32 = 5;

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
/// TCP of a host behind this one that has sent a SYN, or has answered one. Whoever acknowledges it
/// has seen it: the other's address is not forged, and the connection is established.
pub(super) const KIND_OPENING: i32 = 6;

/// A tick of the time when it was asked, as a power of two in nanoseconds: 1.07 s.
pub(super) const ASKED_TICK: i32 = 30;

/// Ticks within which it answers: more than one has passed by then, as between a client's first two
/// SYNs (RFC 6298 section 2).
pub(super) const ASKED_TICKS: i32 = 2;

/// Where the facts lie.
const SINCE: u32 = 0;
const STAYED: u32 = 8;
const FULL: u32 = 16;

const KEY_BYTES: usize = 40;
const OWN_BYTES: usize = 16;
const BEGUN_BYTES: usize = 16;
const FACTS_BYTES: usize = 24;

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
const KEPT: Shape = Shape {
    kind: MapKind::ReservedHash,
    ..table("ipmoved_ownkept", OWN_BYTES, MAX_KEPT)
};
const TAKEN: Shape = table("ipmoved_taken", 8, MAX_OWN);
const OTHERS: Shape = table("ipmoved_ownrest", 8, MAX_OTHERS);
const ELSEWHERE: Shape = table("ipmoved_ownany", 8, MAX_ELSEWHERE);
const FRAGMENTS: Shape = table("ipmoved_ownfrag", 8, MAX_FRAGMENTED);
const BEGUN: Shape = table("ipmoved_begun", BEGUN_BYTES, MAX_BEGUN);
const NOTED: Shape = Shape {
    kind: MapKind::Array,
    name: "ipmoved_noted",
    key_size: 4,
    value_size: 8,
    max_entries: MAX_NOTED,
};
/// The name of the words that say whether anything is kept, and whether anything ever came to be
/// in `elsewhere`.
const KEEPS: &str = "ipmoved_keeps";
const KEEPS_WORDS: usize = 2;
const ANY_ELSEWHERE: usize = 1;
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
    own: Map,
    pub(super) kept: Map,
    keeps: Words,
    sweep: Mutex<Sweep>,
    pub(super) taken: Arc<Map>,
    pub(super) others: Map,
    pub(super) elsewhere: Map,
    pub(super) fragments: Map,
    pub(super) noted: Map,
    /// None while the new server may begin nothing from such a port.
    pub(super) begun: Option<Arc<Map>>,
    facts: Map,
    /// Who is served here; none while no program may tell.
    pub(super) served: Option<Rc<ServedHere>>,
    /// A daemon that was killed had it before.
    resumes: bool,
}

/// How far the look at all that is kept has come.
#[derive(Debug, Default)]
struct Sweep {
    place: Option<u32>,
    /// What `keeps` was when it began.
    keeps: u32,
    /// Whether it has found anything that goes on.
    found: bool,
}

/// What capture has noted of the flows that it hands over.
#[derive(Debug)]
struct TakenMap {
    taken: Arc<Map>,
    begun: Option<Arc<Map>>,
}

impl Taken for TakenMap {
    fn has(&self, flow: &HostFlow) -> bool {
        let mut answered = [0; 8];
        self.taken.read(&key_of(flow), &mut answered)
            && (flow.protocol == TCP || answered != [0; 8])
    }

    fn note(&self, flow: &HostFlow) {
        // The daemon knows it all the same, as long as it lives.
        let _ = self.taken.insert(&key_of(flow), &[0; 8]);
    }

    fn begun_by(&self, flow: &HostFlow) -> Option<NonZeroU64> {
        let mut value = [0; BEGUN_BYTES];
        let found = self.begun.as_ref()?.read(&key_of(flow), &mut value);
        let by = u64::from_ne_bytes(*value.last_chunk()?);
        NonZeroU64::new(by).filter(|_| found)
    }

    fn note_begun(&self, flow: &HostFlow, by: NonZeroU64) {
        let Some(begun) = &self.begun else { return };
        let (key, mut value) = (key_of(flow), [0; BEGUN_BYTES]);
        let is_told = |value: &[u8; BEGUN_BYTES]| value.ends_with(&by.get().to_ne_bytes());
        // Whoever answers is in there; without it only the next daemon would miss something.
        if begun.read(&key, &mut value) && !is_told(&value) {
            value[BEGUN_BYTES - 8..].copy_from_slice(&by.get().to_ne_bytes());
            let _ = begun.insert(&key, &value);
        }
    }
}

impl Own {
    /// Most conversations that are remembered.
    pub const ROOM: usize = MAX_KEPT as usize;

    /// An empty memory, which begins now.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn new() -> Result<Self, BpfError> {
        let memory = Self {
            own: Map::new(OWN)?,
            kept: Map::new(KEPT)?,
            keeps: Words::new(KEEPS, KEEPS_WORDS)?,
            sweep: Mutex::default(),
            taken: Arc::new(Map::new(TAKEN)?),
            others: Map::new(OTHERS)?,
            elsewhere: Map::new(ELSEWHERE)?,
            fragments: Map::new(FRAGMENTS)?,
            noted: Map::new(NOTED)?,
            begun: None,
            facts: Map::new(FACTS)?,
            served: None,
            resumes: false,
        };
        memory.begin_at(now());
        Ok(memory)
    }

    /// The memory among these descriptors, if what tells whose a conversation is is there with the
    /// same measures. The rest is made.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn found(descriptors: &[OwnedFd]) -> Result<Option<Self>, BpfError> {
        let find = |shape: Shape| {
            descriptors
                .iter()
                .filter_map(|fd| fd.try_clone().ok())
                .find_map(|fd| Map::from_fd(fd, shape))
        };
        let found = (find(OWN), find(KEPT), find(TAKEN), find(FACTS));
        let (Some(own), Some(kept), Some(taken), Some(facts)) = found else {
            return Ok(None);
        };
        let find_or_make = |shape| find(shape).map_or_else(|| Map::new(shape), Ok);
        let keeps = Words::new(KEEPS, KEEPS_WORDS)?;
        // Until a sweep has looked.
        keeps.set(0, 1);
        keeps.set(ANY_ELSEWHERE, 1);
        Ok(Some(Self {
            own,
            kept,
            keeps,
            sweep: Mutex::default(),
            taken: Arc::new(taken),
            facts,
            others: find_or_make(OTHERS)?,
            elsewhere: find_or_make(ELSEWHERE)?,
            fragments: find_or_make(FRAGMENTS)?,
            noted: find_or_make(NOTED)?,
            begun: find(BEGUN).map(Arc::new),
            served: Some(Rc::new(ServedHere::new(find)?)),
            resumes: true,
        }))
    }

    /// The same memory once more, for other programs.
    ///
    /// # Errors
    /// If there is no descriptor left.
    pub fn again(&self) -> Result<Self, BpfError> {
        Ok(Self {
            own: self.own.again()?,
            kept: self.kept.again()?,
            keeps: self.keeps.again(KEEPS)?,
            sweep: Mutex::default(),
            taken: Arc::new(self.taken.again()?),
            others: self.others.again()?,
            elsewhere: self.elsewhere.again()?,
            fragments: self.fragments.again()?,
            noted: self.noted.again()?,
            begun: self.begun.clone(),
            facts: self.facts.again()?,
            served: self.served.clone(),
            resumes: self.resumes,
        })
    }

    /// Who is served here, from now on at the latest.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(super) fn served_here(&mut self) -> Result<Rc<ServedHere>, BpfError> {
        if let Some(served) = &self.served {
            return Ok(Rc::clone(served));
        }
        let served = Rc::new(ServedHere::new(|_| None)?);
        self.served = Some(Rc::clone(&served));
        Ok(served)
    }

    /// Makes room for what the new server begins from ports that have not moved, unless there is.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(super) fn remember_begun(&mut self) -> Result<(), BpfError> {
        if self.begun.is_none() {
            self.begun = Some(Arc::new(Map::new(BEGUN)?));
        }
        Ok(())
    }

    /// All of it, for [`found`](Self::found).
    pub fn lasting(&self) -> Vec<BorrowedFd<'_>> {
        let Self {
            own,
            kept,
            taken,
            others,
            elsewhere,
            fragments,
            noted,
            begun,
            facts,
            served,
            keeps: _,
            sweep: _,
            resumes: _,
        } = self;
        [
            own, kept, &**taken, others, elsewhere, fragments, noted, facts,
        ]
        .into_iter()
        .chain(begun.as_deref())
        .map(AsFd::as_fd)
        .chain(served.as_deref().map(ServedHere::lasting))
        .collect()
    }

    /// What capture has noted of the flows that it hands over.
    pub fn taken(&self) -> Arc<dyn Taken> {
        Arc::new(TakenMap {
            taken: Arc::clone(&self.taken),
            begun: self.begun.clone(),
        })
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
            self.keeps.set(0, tick(now()));
            let entered = self.kept.insert(&key_of(&flow), &value);
            entered.map_err(BpfError::of_map(KEPT.name))?;
        }
        Ok(())
    }

    /// The conversations that this host, or one behind it, has begun or answered of late, but for
    /// TCP and UDP of which a socket can be asked.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn live(&self) -> Result<Vec<HostFlow>, BpfError> {
        let now = now();
        let mut live = Vec::new();
        for (map, name) in [(&self.kept, KEPT.name), (&self.own, OWN.name)] {
            let mut place = None;
            let mut more = true;
            while more {
                let read = map.read_some(&mut place, SWEPT, |key, value| {
                    let Some(flow) = flow_of(key) else { return };
                    let request = flow.protocol != TCP && word(value, OWN_STAGE) == STAGE_REQUEST;
                    let closing = is_closing(&flow, value) && !was_seen_within(CLOSING, value, now);
                    if !request && !closing && !is_over(&flow, value, now) {
                        live.push(flow);
                    }
                });
                more = read.map_err(BpfError::of_map(name))?;
            }
        }
        Ok(live)
    }

    /// Forgets those of them that are `wanted`, and returns how many there were. Whoever speaks
    /// first from then on decides anew.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn forget_all(&self, wanted: impl Fn(&HostFlow) -> bool) -> Result<u64, BpfError> {
        let live = self.live()?;
        let keys: Vec<u8> = live
            .iter()
            .filter(|it| wanted(it))
            .flat_map(key_of)
            .collect();
        for (map, name) in [(&self.kept, KEPT.name), (&self.own, OWN.name)] {
            map.remove_all(&keys).map_err(BpfError::of_map(name))?;
        }
        Ok((keys.len() / KEY_BYTES) as u64)
    }

    /// How often a conversation went on that could not be kept, since too many are.
    pub fn full(&self) -> u64 {
        self.fact(FULL)
    }

    /// Forgets what is over of that which is kept, a part of it at a time. Call it every second.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn sweep(&self) -> Result<(), BpfError> {
        self.sweep_at(now()).map_err(BpfError::of_map(KEPT.name))
    }

    fn sweep_at(&self, now: Duration) -> Result<(), Errno> {
        let mut sweep = self.sweep.lock().unwrap_or_else(|held| held.into_inner());
        if sweep.place.is_none() {
            (sweep.keeps, sweep.found) = (self.keeps.get(0), false);
        }
        if sweep.keeps == 0 {
            return Ok(());
        }
        let Sweep {
            place,
            found,
            keeps,
        } = &mut *sweep;
        let mut over = Vec::new();
        let more = self.kept.read_some(place, SWEPT, |key, value| {
            match flow_of(key).filter(|flow| !is_over(flow, value, now)) {
                Some(_) => *found = true,
                None => over.extend(key),
            }
        })?;
        self.kept.remove_all(&over)?;
        // A program writes the word before it enters something. If it has not for so long, nothing
        // can have come that this pass has not seen.
        if !more && !*found && tick(now).saturating_sub(*keeps) >= QUIET_TICKS {
            self.keeps.clear_if(0, *keeps);
        }
        Ok(())
    }

    /// Packets to what has moved that stayed here, since this memory began.
    pub fn stayed(&self) -> u64 {
        self.fact(STAYED)
    }

    fn fact(&self, at: u32) -> u64 {
        let mut value = [0; FACTS_BYTES];
        if !self.facts.read(&0_u32.to_ne_bytes(), &mut value) {
            return 0;
        }
        let bytes = value.as_chunks().0.get(at as usize / size_of::<u64>());
        bytes.map_or(0, |&bytes| u64::from_ne_bytes(bytes))
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
        self.change(|value| {
            value[..8].copy_from_slice(&(seen.as_nanos() as u64).to_ne_bytes());
        });
    }

    /// Every conversation was seen so much earlier.
    #[cfg(test)]
    pub(super) fn age_by(&self, by: Duration) {
        self.change(|value| {
            let seen = u64::from_ne_bytes(value[..8].try_into().unwrap());
            let seen = seen.wrapping_sub(by.as_nanos() as u64);
            value[..8].copy_from_slice(&seen.to_ne_bytes());
        });
    }

    #[cfg(test)]
    fn change(&self, mut change: impl FnMut(&mut [u8; OWN_BYTES])) {
        for map in [&self.own, &self.kept] {
            for key in map.keys().unwrap() {
                let mut value = [0; OWN_BYTES];
                assert!(map.read(&key, &mut value));
                change(&mut value);
                map.insert(&key, &value).unwrap();
            }
        }
    }

    /// Every conversation that was asked was so this many ticks earlier.
    #[cfg(test)]
    pub(super) fn asked_earlier(&self, ticks: i32) {
        let asked = OWN_STAGE as usize;
        self.change(|value| {
            let at = i32::from_ne_bytes(value[asked..].try_into().unwrap());
            value[asked..].copy_from_slice(&(at - ticks).to_ne_bytes());
        });
    }

    /// How many conversations are remembered.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.own.keys().unwrap().len() + self.kept()
    }

    /// How many of them are kept.
    #[cfg(test)]
    pub(super) fn kept(&self) -> usize {
        self.kept.keys().unwrap().len()
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

    /// Jumps to `found` if a conversation with this key is remembered, with R0 where its value
    /// lies.
    pub(super) fn look_up(&self, a: &mut Assembler, found: Label) {
        let new = a.label();
        a.load_address(R0, self.keeps.as_fd(), 0);
        a.load(Size::W, R0, R0, 0);
        a.jump_if(R0, If::Eq, 0, new);
        look_up(a, &self.kept);
        a.jump_if_wide(R0, If::Ne, 0, found);
        a.bind(new);
        look_up(a, &self.own);
        a.jump_if_wide(R0, If::Ne, 0, found);
    }

    /// Forgets the conversation with this key.
    pub(super) fn forget(&self, a: &mut Assembler) {
        remove(a, &self.kept);
        remove(a, &self.own);
    }

    /// The map with the word that is not 0 once `elsewhere` had an entry, and where it lies there.
    pub(super) fn any_elsewhere(&self) -> (BorrowedFd<'_>, u32) {
        (self.keeps.as_fd(), Words::offset(ANY_ELSEWHERE))
    }

    /// Keeps the conversation with this key, with the value that lies at [`VALUE`]. Jumps to `full`
    /// if there is no room.
    pub(super) fn keep(&self, a: &mut Assembler, full: Label) {
        let kept = a.label();
        a.call(Helper::KtimeGetNs);
        a.alu(Alu::Rsh, R0, ASKED_TICK);
        a.alu(Alu::Or, R0, 1);
        a.load_address(R1, self.keeps.as_fd(), 0);
        a.store(Size::W, R1, 0, R0);
        enter(a, &self.kept);
        a.jump_if_wide(R0, If::Eq, 0, kept);
        a.load_address(R1, self.facts.as_fd(), FULL);
        a.mov(R2, 1);
        a.add_atomically(R1, 0, R2);
        a.jump(full);
        a.bind(kept);
        remove(a, &self.own);
    }

    /// The value at [`VALUE`] is that of a conversation of this kind and stage, seen now.
    pub(super) fn make_value(
        a: &mut Assembler,
        kind: impl Into<Operand>,
        stage: impl Into<Operand>,
    ) {
        a.store(Size::W, R10, VALUE + OWN_KIND, kind);
        a.store(Size::W, R10, VALUE + OWN_STAGE, stage);
        a.call(Helper::KtimeGetNs);
        a.store(Size::Dw, R10, VALUE + OWN_SEEN, R0);
    }

    /// Enters the key with the value that lies at [`VALUE`].
    pub(super) fn enter_value(&self, a: &mut Assembler) {
        enter(a, &self.own);
    }

    /// Enters the key as an own conversation of the kind that the register says, seen now. Soon
    /// after the start none is lasting.
    pub(super) fn enter_own(&self, a: &mut Assembler, kind: Reg) {
        let (old, short) = (a.label(), a.label());
        Self::make_value(a, kind, STAGE_PLAIN);
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
        a.store(Size::W, R10, VALUE + OWN_STAGE, STAGE_YOUNG);
        a.bind(old);
        enter(a, &self.own);
    }
}

/// A word of a conversation's value.
fn word(value: &[u8], at: i16) -> i32 {
    let at = at as usize;
    let bytes = value
        .get(at..at + 4)
        .and_then(|bytes| bytes.try_into().ok());
    bytes.map_or(0, i32::from_ne_bytes)
}

/// Whether a conversation with this value is over: nobody takes it for this host's own any more.
fn is_over(flow: &HostFlow, value: &[u8], now: Duration) -> bool {
    let idle = match word(value, OWN_KIND) {
        _ if is_closing(flow, value) => TCP_HALF_CLOSED,
        KIND_LASTING => OWN_LASTING,
        _ if flow.protocol == TCP => OWN_IDLE_TCP,
        _ => OWN_IDLE,
    };
    !was_seen_within(idle, value, now)
}

/// Whether a connection with this value was closed by its host, or reset by the other one.
fn is_closing(flow: &HostFlow, value: &[u8]) -> bool {
    let (kind, stage) = (word(value, OWN_KIND), word(value, OWN_STAGE));
    let reset = kind == KIND_BEHIND && stage == STAGE_RESET;
    flow.protocol == TCP && (kind == KIND_CLOSED || reset)
}

/// Whether a conversation with this value was seen so lately.
fn was_seen_within(idle: Duration, value: &[u8], now: Duration) -> bool {
    let seen = value
        .first_chunk()
        .map_or(0, |&bytes| u64::from_ne_bytes(bytes));
    Duration::from_nanos(seen) + idle >= now
}

/// A time in the ticks of the memory, never 0.
fn tick(time: Duration) -> u32 {
    (time.as_nanos() >> ASKED_TICK) as u32 | 1
}
