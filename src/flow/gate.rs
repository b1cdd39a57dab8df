//! The old server's checks: what may pass, in either direction.
//!
//! Owns what the new server may do on the old one: speak for what was moved, and to nobody but a
//! client that came. Rewrites nothing. Must not touch sockets, devices or the clock.
//!
//! ```text
//! client ──► captured ──► the tunnel's? a client's address? ──► noted in Clients ──► tunnel
//! client ◄──────────────────── does it answer a client? ◄── of what was moved? ◄──── tunnel
//! ```
//!
//! What the new server sends is let out if its flow is in [`Clients`]. If it is not, the flow may
//! be older than this daemon, so for as long after the start as a flow of its protocol may be
//! silent, a packet makes the entry itself: of TCP always, since nobody takes up a conversation
//! that begins without a SYN; of anything else only after a predecessor was killed. One that was
//! stopped has given the address back to this server's own stack.
//!
//! Unless it is allowed, what begins a conversation never leaves, whether its flow is known or not:
//! a SYN (a server does not answer one with another), an echo request and its like. No SYN-ACK
//! leaves for a client whose SYN came before the start; the client sends it again. Nothing leaves
//! for an address that no client can have.
//!
//! While not everything is moved ([`modes`](crate::flow::modes)), what the new server has answered
//! goes on there, and the mode decides about the rest. What it has not answered is not its own yet:
//! a client that tries again is served by whoever serves now.
//!
//! Connections that the new server may begin ([`Gate::allow_outgoing`]) are let out in
//! [`Gate::may_go_on`], and are then flows like others. From a port that has not moved they are
//! flows of their own kind ([`begun`]): nothing but their answers comes to that port for the new
//! server, and from there it answers nobody.

pub(super) mod begun;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;

use crate::flow::allowed::Allowed;
use crate::flow::class::Side;
use crate::flow::clients::{Change, Clients, Flow, Known};
use crate::flow::ended::HostFlow;
use crate::flow::fragments::FragmentCache;
use crate::flow::hold::Awaits;
use crate::flow::listing::Row;
use crate::flow::lock;
use crate::flow::modes::{CLIENTS_QUERY, Modes, Says, Taken};
use crate::flow::ownership::{Ownership, Verdict};
use crate::flow::records::Ends;
use crate::flow::seed::Seed;
use crate::flow::shield::Shields;
use crate::flow::table::FlowStats;
use crate::flow::visits::Visits;
use crate::flow::watch::{self, Observations, Watch};
use crate::model::bytes::take;
use crate::model::drops::DropReason;
use crate::model::mode::{Mode, ShareKey};
use crate::model::moved::{Move, TCP};
use crate::model::outgoing::AllowOutgoing;
use crate::model::owners::Owners;
use crate::model::peer::PeerId;
use crate::model::scopes::Scopes;
use crate::model::visit::Visited;
use crate::packet::{ACK, Addr, Fragment, Kind, Parsed, ProtocolName, Quoted, RST, SYN};

/// The old server's checks for one peer. Shared by the lanes.
#[derive(Debug)]
pub struct Gate {
    /// What has moved, in the order in which it was given.
    moves: Box<[Move]>,
    ownership: Ownership,
    clients: Arc<Clients>,
    resumes: bool,
    allowed: Allowed,
    /// Something may begin from a port that has not moved.
    begins_anywhere: bool,
    /// This server's own addresses, sorted, and others that no client can have here.
    own: ArcSwap<Vec<Addr>>,
    /// What has moved to other peers.
    elsewhere: Option<Arc<Scopes>>,
    seed: Seed,
    returning: Mutex<FragmentCache<()>>,
    refusals: Refusals,
    watch: Arc<Watch<Flow>>,
    modes: Modes,
    shields: Shields,
    owners: Owners,
    /// What the modes said of first fragments, for the later ones.
    decided: Mutex<FragmentCache<Verdict>>,
    taken: OnceLock<Arc<dyn Taken>>,
    /// What tells this gate from others that may begin something from the same address.
    name: Option<NonZeroU64>,
    /// Who comes, if that is noted.
    visits: Option<Arc<Visits>>,
}

/// How a gate is made.
#[derive(Clone, Copy, Debug)]
pub struct GateConfig {
    /// Most flows at a time (`--max-flows`).
    pub max_flows: usize,
    /// The secret of the hashes.
    pub seed: Seed,
    /// When the daemon started: not later than any `now` that follows.
    pub started: Instant,
    /// A predecessor was killed, and clients may be in the middle of what it carried.
    pub resumes: bool,
}

/// A packet of the new server that was not let out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Refused {
    /// Why.
    pub reason: DropReason,
    /// Its destination.
    pub to: IpAddr,
    /// Its IP protocol.
    pub protocol: u8,
    /// Its destination port, if it has one.
    pub port: Option<u16>,
}

/// An example of what was refused of late, for people.
#[derive(Debug, Default)]
struct Refusals {
    /// Whether there is one, so that a flood of them takes no lock.
    noted: AtomicBool,
    example: Mutex<Option<Refused>>,
}

impl GateConfig {
    /// Of a gate that goes on with the clients of another daemon's, which handed itself over
    /// `then`; `None` if that is not understood.
    pub fn taken_over(max_flows: usize, then: Instant, rest: &mut &[u8]) -> Option<Self> {
        let [resumes] = take(rest)?;
        let age = Duration::from_nanos(u64::from_le_bytes(take(rest)?));
        Some(Self {
            max_flows,
            seed: Seed::take(rest)?,
            started: then.checked_sub(age)?,
            resumes: resumes == 1,
        })
    }
}

impl Gate {
    /// Appends what the daemon that takes over goes on with: which clients came, and how long ago
    /// the first of the daemons started. Call it when no lane runs.
    pub fn put(&self, now: Instant, out: &mut Vec<u8>) {
        out.push(u8::from(self.resumes));
        let age = self.clients.age(now);
        out.extend_from_slice(&(age.as_nanos() as u64).to_le_bytes());
        self.seed.put(out);
        let name = self.name.map_or(0, NonZeroU64::get);
        out.extend_from_slice(&name.to_le_bytes());
        self.clients.put(out);
    }

    /// Takes up the clients of another daemon's gate, with whose [`GateConfig`] this one was made,
    /// and its name, by which the kernel knows what it has begun. `None` if that is not understood.
    pub fn take_up(mut self, rest: &mut &[u8]) -> Option<Self> {
        self.name = NonZeroU64::new(u64::from_le_bytes(take(rest)?));
        self.clients.take_up(rest)?;
        Some(self)
    }

    /// A gate for what was moved. No client has come yet.
    pub fn new(moves: &[Move], config: GateConfig) -> Self {
        let seed = config.seed;
        let ownership = Ownership::new(moves, seed);
        Self {
            moves: moves.into(),
            owners: Owners::new(moves, ownership.scopes()),
            ownership,
            clients: Arc::new(Clients::new(seed, config.max_flows, config.started)),
            resumes: config.resumes,
            allowed: Allowed::new(Vec::new()),
            begins_anywhere: false,
            own: ArcSwap::default(),
            elsewhere: None,
            seed,
            returning: Mutex::new(FragmentCache::new()),
            refusals: Refusals::default(),
            watch: Arc::new(Watch::new(seed)),
            modes: Modes::default(),
            shields: Shields::default(),
            decided: Mutex::new(FragmentCache::new()),
            taken: OnceLock::new(),
            name: None,
            visits: None,
        }
    }

    /// From now on the moves are in these modes, in the order in which they were given. All are
    /// moved at first.
    pub fn set_modes(&self, modes: &[Mode<Instant>], key: ShareKey) {
        self.modes.set(modes, key);
    }

    /// From now on clients of each move, in the order in which they were given, are told of no
    /// refusal of the new server until then. Nobody is shielded at first.
    pub fn set_shields(&self, until: &[Option<Instant>]) {
        self.shields.set(until);
    }

    /// What capture has noted, which is asked where this gate knows nothing. It is set once.
    pub fn set_taken(&self, taken: Arc<dyn Taken>) {
        // The first one stays: there is one capture.
        let _ = self.taken.set(taken);
    }

    /// The same gate, which notes who comes; with `names`, also the first bytes of each connection.
    #[must_use]
    pub fn noting_visits(mut self, names: bool) -> Self {
        self.visits = Some(Arc::new(Visits::new(self.seed, names)));
        self
    }

    /// A gate for other moves, which knows the clients that this one knows, and notes who comes as
    /// this one does. It lets out nothing that begins. Of modes it knows what this one was told of
    /// these moves, and for how long clients count as just moved.
    pub fn again(&self, moves: &[Move]) -> Self {
        let ownership = Ownership::new(moves, self.seed);
        Self {
            moves: moves.into(),
            owners: Owners::new(moves, ownership.scopes()),
            ownership,
            clients: Arc::clone(&self.clients),
            resumes: self.resumes,
            allowed: Allowed::new(Vec::new()),
            begins_anywhere: false,
            own: ArcSwap::new(self.own.load_full()),
            elsewhere: None,
            seed: self.seed,
            returning: Mutex::new(FragmentCache::new()),
            refusals: Refusals::default(),
            watch: Arc::clone(&self.watch),
            modes: self.modes.again(&self.moves, moves),
            decided: Mutex::new(FragmentCache::new()),
            taken: OnceLock::new(),
            shields: Shields::default(),
            name: self.name,
            visits: self.visits.clone(),
        }
    }

    /// The same gate, which knows the addresses that no client can have as another one does.
    #[must_use]
    pub fn among_addresses_of(self, other: &Self) -> Self {
        self.own.store(other.own.load_full());
        self
    }

    /// The same gate with room for another number of flows. As after a restart, connections that go
    /// on are taken up by their next packet.
    #[must_use]
    pub fn with_room(mut self, max_flows: usize, now: Instant) -> Self {
        self.clients = Arc::new(Clients::new(self.seed, max_flows, now));
        self.resumes = true;
        self
    }

    /// The same gate, which notes nobody.
    #[must_use]
    pub fn noting_nobody(mut self) -> Self {
        self.visits = None;
        self
    }

    /// The same gate, which lets connections out that the new server begins, if one of the rules
    /// takes them.
    #[must_use]
    pub fn allow_outgoing(mut self, rules: &[AllowOutgoing]) -> Self {
        self.allowed = Allowed::new(rules.to_vec());
        self.begins_anywhere = self.allowed.is_any() && !self.ownership.is_all_whole();
        self
    }

    /// The same, where all this has moved, to whichever peer: no client can have such an address
    /// either.
    #[must_use]
    pub fn among(mut self, all: Arc<Scopes>) -> Self {
        self.elsewhere = Some(all);
        self
    }

    /// Sets which addresses no client can have: this server's own, and the broadcast addresses of
    /// its networks. What was moved is one of them in any case.
    pub fn set_own_addresses(&self, own: &[IpAddr]) {
        let mut own: Vec<Addr> = own.iter().map(|&addr| addr.into()).collect();
        own.sort_unstable();
        own.dedup();
        self.own.store(own.into());
    }

    /// Judges a packet that was captured on its way to a moved address, and notes its flow if it is
    /// the tunnel's.
    ///
    /// # Errors
    /// As [`Ownership::judge`]; [`DropReason::BadSource`] if it asks for an answer to an address
    /// that no client can have.
    #[inline]
    pub fn check_captured(
        &self,
        now: Instant,
        parsed: &Parsed,
        bytes: &[u8],
    ) -> Result<Verdict, DropReason> {
        match begun::whose(std::slice::from_ref(self), now, parsed, bytes)? {
            Some(_) => Ok(Verdict::Carry),
            None => self.check_moved(now, parsed, bytes),
        }
    }

    /// As [`check_captured`](Self::check_captured), of a packet that answers nothing which
    /// [was begun](begun) from a port that has not moved.
    ///
    /// # Errors
    /// The same.
    #[inline]
    pub(super) fn check_moved(
        &self,
        now: Instant,
        parsed: &Parsed,
        bytes: &[u8],
    ) -> Result<Verdict, DropReason> {
        let found = self.ownership.find(parsed.dst(bytes));
        let scope = found.ok_or(DropReason::NotMoved)?;
        let verdict = self.ownership.judge_for(scope, now, parsed, bytes)?;
        if self.modes.apply() && verdict == Verdict::Carry {
            return self.check_by_mode(scope, now, parsed, bytes);
        }
        if verdict == Verdict::Carry
            && let Some(flow) = self.clients.asked(parsed, bytes)
            && !self.client_spoke(now, parsed, bytes, &flow)
        {
            self.admit(now, parsed, bytes, &flow)?;
        }
        Ok(verdict)
    }

    /// Judges a packet that came out of the tunnel on its way to a client: the new server may speak
    /// for what was moved, to a client that came, and neither for nor to anybody else. `gates` are
    /// those of all peers, if there are others.
    ///
    /// # Errors
    /// [`DropReason::NotMoved`], [`DropReason::BadDestination`], [`DropReason::Unasked`],
    /// [`DropReason::FragmentUnknown`], [`DropReason::IcmpUnrelated`];
    /// [`DropReason::OutgoingNotAllowed`], [`DropReason::OutgoingLimited`],
    /// [`DropReason::OutgoingTaken`]; [`DropReason::RefusalWithheld`].
    #[inline]
    pub fn check_returning(
        &self,
        now: Instant,
        parsed: &Parsed,
        bytes: &[u8],
        gates: &[Arc<Self>],
    ) -> Result<(), DropReason> {
        let found = self.ownership.find(parsed.src(bytes));
        let scope = found.ok_or(DropReason::NotMoved)?;
        if parsed.dst(bytes).is_special() {
            return Err(self.refuse(DropReason::BadDestination, parsed, bytes));
        }
        if parsed.fragment() == Fragment::Later {
            return lock(&self.returning)
                .recall(now, &self.seed, parsed, bytes)
                .ok_or(DropReason::FragmentUnknown);
        }
        if parsed.kind() == Kind::IcmpError {
            return self.check_error(now, parsed, bytes);
        }
        let (protocol, port) = (parsed.protocol(), parsed.src_port());
        if self.ownership.takes(scope, protocol, parsed.kind(), port) {
            if parsed.tcp_flags() & RST != 0 && self.shields.apply() {
                self.withhold_reset(scope, now, parsed, bytes)?;
            }
            let flow = self.clients.answered(parsed, bytes);
            match &flow {
                Some(flow) if !begins(parsed) => match self.clients.server_spoke(now, flow) {
                    Known::Same => {}
                    Known::Changed(change) => {
                        self.changed(now, Side::Application, parsed, bytes, flow, change);
                    }
                    Known::No => self.may_go_on(now, parsed, bytes, Some(flow))?,
                },
                _ => self.may_go_on(now, parsed, bytes, flow.as_ref())?,
            }
        } else {
            self.check_begun(now, parsed, bytes, gates)?;
        }
        if parsed.fragment() == Fragment::First {
            lock(&self.returning).remember(now, &self.seed, parsed, bytes, ());
        }
        Ok(())
    }

    /// An example of what was not let out since this was asked last.
    pub fn take_refused(&self) -> Option<Refused> {
        if !self.refusals.noted.load(Relaxed) {
            return None;
        }
        let refused = lock(&self.refusals.example).take();
        self.refusals.noted.store(false, Relaxed);
        refused
    }

    /// What a client waits for whose packet was let in.
    pub fn awaits_answer(&self, now: Instant, parsed: &Parsed, bytes: &[u8]) -> Awaits {
        let flow = self.clients.asked(parsed, bytes);
        let Some(noted) = flow.and_then(|flow| self.clients.noted(now, &flow)) else {
            return Awaits::Nothing;
        };
        let is_shielded = || {
            let scope = self.ownership.find(parsed.dst(bytes));
            scope.is_some_and(|scope| {
                self.shields(scope, now, noted.protocol, parsed.kind(), parsed.dst_port())
            })
        };
        match noted.seen.answer(noted.protocol) {
            Some(true) => Awaits::Nothing,
            None if !is_shielded() => Awaits::Answer,
            Some(false) if !is_shielded() => Awaits::Nothing,
            None | Some(false) => Awaits::Chance,
        }
    }

    /// Lets flows expire, looking at `budget` of them at most. One thread calls it, every second.
    pub fn expire(&self, now: Instant, budget: usize) {
        self.clients.expire(now, budget);
        self.modes.expire(now);
    }

    /// What has become of the newest conversations. Call it every second.
    pub fn observe(&self, now: Instant) -> Observations {
        self.watch.take(now, |flow| self.clients.noted(now, flow))
    }

    /// Who came, and what there is to add about those who came before; with `all`, everything that
    /// is known. Call it every second.
    pub fn visited(&self, now: Instant, all: bool) -> Visited<Instant> {
        let visits = self.visits.as_deref();
        visits.map_or_else(Visited::default, |visits| visits.take(now, all))
    }

    /// How many conversations [`visited`](Self::visited) will tell of once they have settled.
    pub fn settling(&self) -> u64 {
        self.visits.as_ref().map_or(0, |visits| visits.settling())
    }

    /// These clients are known: what they begin is noted before that of others.
    pub fn know(&self, clients: &[IpAddr]) {
        if let Some(visits) = &self.visits {
            clients
                .iter()
                .for_each(|&client| visits.know(client.into()));
        }
    }

    /// Appends the flows of the next few places from `from` on, as those of `peer`, and returns
    /// where the next ones are, if there are more.
    pub(super) fn slice(
        &self,
        now: Instant,
        peer: PeerId,
        from: u32,
        out: &mut Vec<Row>,
    ) -> Option<u32> {
        self.clients.slice(now, peer, from, out)
    }

    /// Counters of the flows.
    pub fn stats(&self) -> FlowStats {
        self.clients.stats()
    }

    /// A client's packet of which no flow is known.
    #[cold]
    fn admit(
        &self,
        now: Instant,
        parsed: &Parsed,
        bytes: &[u8],
        flow: &Flow,
    ) -> Result<(), DropReason> {
        let client = parsed.src(bytes);
        if client.is_special() || self.is_own(client) {
            return Err(DropReason::BadSource);
        }
        self.clients
            .remember(now, flow, &Ends::of_client(parsed, bytes));
        if let Some(visits) = &self.visits
            && (parsed.protocol() != TCP || begins(parsed))
        {
            visits.opened(now, parsed, bytes, flow);
        }
        if let Some(asked) = watch::asked(parsed, parsed.dst(bytes)) {
            self.watch.opened(now, asked, client, *flow);
        }
        Ok(())
    }

    /// As [`check_captured`](Self::check_captured), of what has moved, while not everything is in
    /// the mode that says so.
    #[inline(never)]
    fn check_by_mode(
        &self,
        scope: usize,
        now: Instant,
        parsed: &Parsed,
        bytes: &[u8],
    ) -> Result<Verdict, DropReason> {
        if parsed.fragment() == Fragment::Later {
            let decided = lock(&self.decided).recall(now, &self.seed, parsed, bytes);
            return decided.ok_or(DropReason::FragmentUnknown);
        }
        let verdict = match self.clients.asked(parsed, bytes) {
            Some(flow) => self.judge_flow(scope, now, parsed, bytes, &flow)?,
            None => self.judge_answer(scope, now, parsed, bytes),
        };
        if parsed.fragment() == Fragment::First {
            lock(&self.decided).remember(now, &self.seed, parsed, bytes, verdict);
        }
        Ok(verdict)
    }

    /// Judges a client's packet that asks for something.
    fn judge_flow(
        &self,
        scope: usize,
        now: Instant,
        parsed: &Parsed,
        bytes: &[u8],
        flow: &Flow,
    ) -> Result<Verdict, DropReason> {
        let tcp = parsed.kind() == Kind::Tcp;
        let begins = tcp && begins(parsed);
        let noted = self.clients.noted(now, flow);
        let goes_on =
            noted.is_some_and(|it| it.seen.is_answered() && !(begins && it.seen.is_over()));
        if goes_on && self.client_spoke(now, parsed, bytes, flow) {
            // It is a system call, so not for every packet.
            let anew = noted.is_some_and(|it| it.used < now || !it.seen.has_gone_on());
            if tcp && !begins && anew {
                self.note_taken(&host_flow(parsed, bytes));
            }
            return Ok(Verdict::Carry);
        }
        let client = parsed.src(bytes);
        let bad = client.is_special() || self.is_own(client);
        let may_be_older = if tcp {
            !begins
        } else {
            self.resumes && self.clients.may_be_older(now, flow)
        };
        if may_be_older && !bad && self.has_taken(&host_flow(parsed, bytes)) {
            self.clients
                .take_over(now, flow, &Ends::of_client(parsed, bytes));
            return Ok(Verdict::Carry);
        }
        let number = self.owner(scope, parsed.protocol(), parsed.kind(), parsed.dst_port());
        let says = if tcp && !begins {
            let cookie = noted.is_none() && self.modes.may_have_cookie(number);
            match self.modes.of_old(number, client.into()) {
                Says::There if cookie => Says::Here,
                says @ (Says::There | Says::Here | Says::Waits) => says,
            }
        } else {
            self.modes.of_new(now, number, client.into())
        };
        match says {
            Says::Here => Ok(Verdict::Bounce),
            Says::Waits | Says::There if bad => Err(DropReason::BadSource),
            Says::Waits => Ok(Verdict::Hold),
            Says::There if self.client_spoke(now, parsed, bytes, flow) => Ok(Verdict::Carry),
            Says::There => self
                .admit(now, parsed, bytes, flow)
                .map(|()| Verdict::Carry),
        }
    }

    /// Judges what a client sends about something else: an ICMP error, or a reply.
    fn judge_answer(&self, scope: usize, now: Instant, parsed: &Parsed, bytes: &[u8]) -> Verdict {
        let client = parsed.src(bytes);
        let (number, client, is_known) = match Quoted::parse(bytes, parsed) {
            Ok(quoted) if parsed.kind() == Kind::IcmpError => {
                let flow = self.clients.quoted_answer(&quoted, bytes);
                let (protocol, port) = (quoted.protocol(), quoted.src_port());
                let is_known = flow.is_some_and(|flow| self.clients.knows(now, &flow))
                    || protocol == TCP && self.has_taken(&quoted_host_flow(&quoted, bytes));
                let number = self.owner(scope, protocol, quoted.kind(), port);
                (number, quoted.dst(bytes), is_known)
            }
            Ok(_) | Err(_) => {
                let is_known = self.has_taken(&host_flow(parsed, bytes));
                let number = self.owner(scope, parsed.protocol(), parsed.kind(), 0);
                (number, client, is_known)
            }
        };
        match self.modes.of_old(number, client.into()) {
            Says::Here if !is_known => Verdict::Bounce,
            Says::Here | Says::There | Says::Waits => Verdict::Carry,
        }
    }

    /// Whether refusals of the new server are kept from clients of this port.
    fn shields(&self, scope: usize, now: Instant, protocol: u8, kind: Kind, port: u16) -> bool {
        self.shields.apply()
            && self
                .shields
                .cover(now, self.owner(scope, protocol, kind, port))
    }

    /// Keeps a reset from a client that nobody has answered yet, if its move is shielded.
    #[cold]
    fn withhold_reset(
        &self,
        scope: usize,
        now: Instant,
        parsed: &Parsed,
        bytes: &[u8],
    ) -> Result<(), DropReason> {
        let Some(flow) = self.clients.answered(parsed, bytes) else {
            return Ok(());
        };
        let noted = self.clients.noted(now, &flow);
        let is_new = noted.is_some_and(|it| it.seen.answer(TCP) != Some(true));
        if !is_new || !self.shields(scope, now, TCP, parsed.kind(), parsed.src_port()) {
            return Ok(());
        }
        // Whoever watches is to know.
        if let Known::Changed(change) = self.clients.server_spoke(now, &flow) {
            self.changed(now, Side::Application, parsed, bytes, &flow, change);
        }
        Err(DropReason::RefusalWithheld)
    }

    /// The number of the move that a packet belongs to.
    fn owner(&self, scope: usize, protocol: u8, kind: Kind, port: u16) -> Option<usize> {
        let port = kind.has_ports().then_some(port);
        self.owners
            .find(self.ownership.scopes(), scope, protocol, port)
    }

    /// Tells capture of a flow of the new server that it may have had to ask about: when that goes
    /// on for the first time, and then once in a few seconds at most.
    #[cold]
    fn note_taken(&self, flow: &HostFlow) {
        if let Some(taken) = self.taken.get() {
            taken.note(flow);
        }
    }

    /// Whether capture knows a flow as the new server's.
    #[cold]
    fn has_taken(&self, flow: &HostFlow) -> bool {
        self.taken.get().is_some_and(|taken| taken.has(flow))
    }

    /// Notes that a client has sent a packet. Returns whether its flow is known.
    #[inline]
    fn client_spoke(&self, now: Instant, parsed: &Parsed, bytes: &[u8], flow: &Flow) -> bool {
        match self.clients.client_spoke(now, flow) {
            Known::Same => true,
            Known::Changed(change) => {
                self.changed(now, Side::Client, parsed, bytes, flow, change);
                true
            }
            Known::No => false,
        }
    }

    /// A packet has told something new of its flow.
    #[cold]
    fn changed(
        &self,
        now: Instant,
        side: Side,
        parsed: &Parsed,
        bytes: &[u8],
        flow: &Flow,
        change: Change,
    ) {
        let refused = parsed.protocol() == TCP && change.before.answer(TCP) == Some(false);
        if refused
            && side == Side::Client
            && let Some(asked) = watch::asked(parsed, parsed.dst(bytes))
        {
            // It tries once more.
            self.watch.opened(now, asked, parsed.src(bytes), *flow);
        }
        let Some(visits) = &self.visits else {
            return;
        };
        if change.before.is_nothing() && (parsed.protocol() != TCP || begins(parsed)) {
            visits.opened(now, parsed, bytes, flow);
        } else if visits.spoke(
            now,
            side,
            parsed,
            bytes,
            flow,
            change,
            self.allowed.is_any(),
        ) {
            self.clients.look_again(flow);
        }
    }

    /// Whether a packet of the new server leaves that answers nobody, as far as is known.
    #[cold]
    fn may_go_on(
        &self,
        now: Instant,
        parsed: &Parsed,
        bytes: &[u8],
        flow: Option<&Flow>,
    ) -> Result<(), DropReason> {
        if self.is_own(parsed.dst(bytes)) {
            return Err(self.refuse(DropReason::BadDestination, parsed, bytes));
        }
        let goes_on = match parsed.kind() {
            Kind::Tcp => parsed.tcp_flags() & SYN == 0,
            Kind::Udp | Kind::IcmpReply | Kind::Other => self.resumes,
            Kind::IcmpQuery | Kind::IcmpError | Kind::LaterFragment => false,
        };
        let older = flow.filter(|flow| goes_on && self.clients.may_be_older(now, flow));
        let ends = Ends::of_server(parsed, bytes);
        if let Some(flow) = older {
            self.clients.presume(now, flow, &ends);
            return Ok(());
        }
        match self.allowed.judge(now, parsed) {
            // A query makes no flow: its reply goes to what has moved, as a client's packets do.
            Some(Ok(())) => {
                if let Some(flow) = flow {
                    self.clients.presume(now, flow, &ends);
                    self.visits.iter().for_each(|visits| visits.called(flow));
                }
            }
            Some(Err(reason)) => return Err(self.refuse(reason, parsed, bytes)),
            None => return Err(self.refuse(DropReason::Unasked, parsed, bytes)),
        }
        Ok(())
    }

    /// Judges an ICMP error of the new server: it has to be about a client's packet, and to go to
    /// that client. It makes no flow and keeps none alive.
    #[cold]
    fn check_error(&self, now: Instant, parsed: &Parsed, bytes: &[u8]) -> Result<(), DropReason> {
        let quoted = Quoted::parse(bytes, parsed)?;
        let (src, dst) = (quoted.src(bytes), quoted.dst(bytes));
        if dst != parsed.src(bytes) || src != parsed.dst(bytes) {
            return Err(DropReason::IcmpUnrelated);
        }
        let found = self.ownership.find(dst);
        let scope = found.ok_or(DropReason::NotMoved)?;
        let (protocol, port) = (quoted.protocol(), quoted.dst_port());
        if !self.ownership.takes(scope, protocol, quoted.kind(), port) {
            let begun = self.clients.begun_answer_quoted(&quoted, bytes);
            let known = begun.is_some_and(|flow| self.clients.knows(now, &flow));
            return known.then_some(()).ok_or(DropReason::NotMoved);
        }
        let flow = self.clients.quoted(&quoted, bytes);
        match flow.filter(|flow| self.clients.knows(now, flow)) {
            Some(flow) => {
                let is_it = |known: &Flow| Clients::is_same(known, &flow);
                self.watch.error(parsed, bytes, is_it);
                let answer = |it: watch::Noted| it.seen.answer(protocol);
                let is_new = self
                    .clients
                    .noted(now, &flow)
                    .is_some_and(|it| answer(it).is_none());
                if is_new
                    && watch::says_unreachable(parsed, bytes)
                    && self.shields(scope, now, protocol, quoted.kind(), port)
                {
                    // The same conversation may be answered yet.
                    let asked = (dst, protocol, port);
                    self.watch.opened(now, asked, parsed.dst(bytes), flow);
                    return Err(DropReason::RefusalWithheld);
                }
                Ok(())
            }
            None => Err(DropReason::IcmpUnrelated),
        }
    }

    /// Whether what belongs there has moved to another peer: no port of that is free.
    #[cold]
    fn is_of_another(&self, addr: Addr, protocol: u8, kind: Kind, port: u16) -> bool {
        let port = kind.has_ports().then_some(port);
        self.elsewhere.as_ref().is_some_and(|all| {
            let scope = all.find(addr.number());
            scope.is_some_and(|scope| all.takes(scope, protocol, port))
        })
    }

    fn is_own(&self, addr: Addr) -> bool {
        let elsewhere = self.elsewhere.as_ref();
        self.own.load().binary_search(&addr).is_ok()
            || self.ownership.is_moved(addr)
            || elsewhere.is_some_and(|all| all.find(addr.number()).is_some())
    }

    /// Keeps a packet that is refused as an example, unless there is one.
    #[cold]
    fn refuse(&self, reason: DropReason, parsed: &Parsed, bytes: &[u8]) -> DropReason {
        if !self.refusals.noted.load(Relaxed) && !self.refusals.noted.swap(true, Relaxed) {
            *lock(&self.refusals.example) = Some(Refused {
                reason,
                to: parsed.dst(bytes).into(),
                protocol: parsed.protocol(),
                port: parsed.kind().has_ports().then_some(parsed.dst_port()),
            });
        }
        reason
    }
}

/// Whether a packet of the new server begins a conversation, by what it is.
#[inline]
fn begins(parsed: &Parsed) -> bool {
    parsed.tcp_flags() & (SYN | ACK) == SYN
}

/// How this host's own stack sees the flow of a client's packet.
fn host_flow(parsed: &Parsed, bytes: &[u8]) -> HostFlow {
    let [local, remote] = match parsed.kind() {
        Kind::Tcp | Kind::Udp => [parsed.dst_port(), parsed.src_port()],
        Kind::IcmpQuery => [CLIENTS_QUERY, parsed.src_port()],
        Kind::IcmpReply => [0, parsed.dst_port()],
        Kind::IcmpError | Kind::Other | Kind::LaterFragment => [0, 0],
    };
    HostFlow {
        protocol: parsed.protocol(),
        local: SocketAddr::new(parsed.dst(bytes).into(), local),
        remote: SocketAddr::new(parsed.src(bytes).into(), remote),
    }
}

/// The same of a packet with ports that went to a client, and that an ICMP error quotes.
fn quoted_host_flow(quoted: &Quoted, bytes: &[u8]) -> HostFlow {
    HostFlow {
        protocol: quoted.protocol(),
        local: SocketAddr::new(quoted.src(bytes).into(), quoted.src_port()),
        remote: SocketAddr::new(quoted.dst(bytes).into(), quoted.dst_port()),
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {}", ProtocolName(self.protocol), self.to)?;
        match self.port {
            Some(port) => write!(f, " port {port}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::flow::class::{ICMP_QUERY, OTHER, TCP_ESTABLISHED, UDP_BOTH_WAYS, UDP_ONE_WAY};
    use crate::packet::testing::{Plan, fragments, plans, reply, too_big};
    use crate::packet::{FIN, RST};
    use crate::testing::epoch;
    use proptest::prelude::*;

    pub(in crate::flow::gate) const CLIENT: &str = "203.0.113.9";
    pub(in crate::flow::gate) const MOVED: &str = "192.0.2.5";
    pub(in crate::flow::gate) const OWN: &str = "192.0.2.1";
    pub(in crate::flow::gate) const GRE: u8 = 47;

    /// A gate, and the time that it is told.
    pub(in crate::flow::gate) struct Bed {
        pub(in crate::flow::gate) gate: Gate,
        pub(in crate::flow::gate) now: Instant,
    }

    impl Bed {
        /// Just started after a crash.
        pub(in crate::flow::gate) fn new(moves: &[&str]) -> Self {
            Self::started(moves, true)
        }

        pub(in crate::flow::gate) fn started(moves: &[&str], resumes: bool) -> Self {
            let moves: Vec<_> = moves.iter().map(|text| text.parse().unwrap()).collect();
            let now = epoch();
            let config = GateConfig {
                max_flows: 1_000,
                seed: Seed::new([1, 2]),
                started: now,
                resumes,
            };
            let gate = Gate::new(&moves, config);
            gate.set_own_addresses(&[OWN.parse().unwrap(), "192.0.2.255".parse().unwrap()]);
            Self { gate, now }
        }

        /// Started so long ago that every flow began since.
        pub(in crate::flow::gate) fn settled(moves: &[&str]) -> Self {
            Self::new(moves).later(TCP_ESTABLISHED)
        }

        pub(in crate::flow::gate) fn later(mut self, by: Duration) -> Self {
            self.now += by;
            self
        }

        pub(in crate::flow::gate) fn captured(&self, bytes: &[u8]) -> Result<Verdict, DropReason> {
            let parsed = Parsed::parse(bytes)?;
            self.gate.check_captured(self.now, &parsed, bytes)
        }

        pub(in crate::flow::gate) fn returning(&self, bytes: &[u8]) -> Result<(), DropReason> {
            let parsed = Parsed::parse(bytes)?;
            self.gate.check_returning(self.now, &parsed, bytes, &[])
        }
    }

    pub(in crate::flow::gate) const CARRY: Result<Verdict, DropReason> = Ok(Verdict::Carry);
    const UNASKED: Result<(), DropReason> = Err(DropReason::Unasked);

    pub(in crate::flow::gate) fn request(kind: Kind) -> Plan {
        Plan::new(kind, CLIENT, MOVED)
    }

    impl Bed {
        fn allowing(rules: &[&str]) -> Self {
            Self::settled(&[MOVED]).allow(rules)
        }

        pub(in crate::flow::gate) fn allow(self, rules: &[&str]) -> Self {
            let rules: Vec<_> = rules.iter().map(|text| text.parse().unwrap()).collect();
            let Self { gate, now } = self;
            Self {
                gate: gate.allow_outgoing(&rules),
                now,
            }
        }
    }

    /// What the new server sends to begin a conversation with somebody's port 25.
    pub(in crate::flow::gate) fn outgoing(kind: Kind) -> Plan {
        Plan {
            flags: SYN,
            src_port: 40_000,
            dst_port: 25,
            ..Plan::new(kind, MOVED, CLIENT)
        }
    }

    #[test]
    fn a_gate_for_other_moves_knows_the_clients_of_the_one_before() {
        let other = "192.0.2.6";
        let bed = Bed::settled(&[MOVED, other]);
        let (first, second) = (request(Kind::Tcp), Plan::new(Kind::Tcp, CLIENT, other));
        for plan in [&first, &second] {
            assert_eq!(bed.captured(&plan.build()), CARRY);
            assert_eq!(bed.returning(&reply(plan).build()), Ok(()));
        }
        let moves: Vec<Move> = vec![MOVED.parse().unwrap(), "192.0.2.7".parse().unwrap()];
        let gate = bed.gate.again(&moves);
        let bed = Bed { gate, ..bed };
        assert_eq!(bed.returning(&reply(&first).build()), Ok(()));
        let not_moved = Err(DropReason::NotMoved);
        assert_eq!(bed.returning(&reply(&second).build()), not_moved);
        let new = Plan::new(Kind::Tcp, CLIENT, "192.0.2.7");
        assert_eq!(bed.returning(&reply(&new).build()), UNASKED);
        assert_eq!(bed.captured(&new.build()), CARRY);
        let to_own = Plan::new(Kind::Tcp, OWN, MOVED);
        assert_eq!(bed.captured(&to_own.build()), Err(DropReason::BadSource));
        // With room for another number of flows it is as after a restart.
        let gate = bed.gate.again(&moves).with_room(2_000, bed.now);
        assert_eq!(gate.stats().max, 2_000);
        let bed = Bed { gate, ..bed };
        let goes_on = Plan {
            flags: ACK,
            ..reply(&first)
        };
        assert_eq!(bed.returning(&goes_on.build()), Ok(()));
    }

    #[test]
    fn what_may_begin_on_the_new_server_is_let_out_and_answered() {
        for kind in [Kind::Tcp, Kind::Udp, Kind::IcmpQuery] {
            let bed = Bed::allowing(&["any"]);
            let begins = outgoing(kind);
            assert_eq!(bed.returning(&begins.build()), Ok(()), "{kind:?}");
            assert_eq!(bed.returning(&begins.build()), Ok(()), "sent again");
            let answer = reply(&begins).build();
            assert_eq!(bed.captured(&answer), CARRY);
            if kind != Kind::IcmpQuery {
                assert_eq!(bed.returning(&with(&begins, |p| p.flags = ACK)), Ok(()));
                let about = too_big(&answer, answer.len(), MOVED.parse().unwrap());
                assert_eq!(bed.returning(&about), Ok(()), "an error about the answer");
            }
            for (to, from) in [(OWN, MOVED), ("224.0.0.1", MOVED), ("127.0.0.1", MOVED)] {
                let special = with(&begins, |p| {
                    (p.src, p.dst) = (from.parse().unwrap(), to.parse().unwrap());
                });
                assert_eq!(bed.returning(&special), Err(DropReason::BadDestination));
            }
            let not_moved = with(&begins, |p| p.src = OWN.parse().unwrap());
            assert_eq!(bed.returning(&not_moved), Err(DropReason::NotMoved));
        }
        let bed = Bed::allowing(&["any"]);
        let answers = with(&outgoing(Kind::Tcp), |p| p.flags = SYN | ACK);
        assert_eq!(bed.returning(&answers), UNASKED, "it begins nothing");
        assert_eq!(bed.returning(&other(MOVED, CLIENT, GRE)), Ok(()));
    }

    #[test]
    fn a_flow_awaits_its_answer_until_that_has_come() {
        let bed = Bed::settled(&[MOVED]);
        let asks = Plan {
            flags: SYN,
            ..request(Kind::Tcp)
        };
        let waits = |bed: &Bed| {
            let bytes = asks.build();
            let parsed = Parsed::parse(&bytes).unwrap();
            bed.gate.awaits_answer(bed.now, &parsed, &bytes) == Awaits::Answer
        };
        assert!(!waits(&bed), "nobody asked");
        assert_eq!(bed.captured(&asks.build()), CARRY);
        assert!(waits(&bed));
        let answer = with(&reply(&asks), |p| p.flags = SYN | ACK);
        assert_eq!(bed.returning(&answer), Ok(()));
        assert!(!waits(&bed));
    }

    #[test]
    fn only_what_is_named_may_begin() {
        let not_allowed = Err(DropReason::OutgoingNotAllowed);
        let bed = Bed::allowing(&["25/tcp", "from:5060/udp"]);
        assert_eq!(bed.returning(&outgoing(Kind::Tcp).build()), Ok(()));
        let elsewhere = with(&outgoing(Kind::Tcp), |p| p.dst_port = 26);
        assert_eq!(bed.returning(&elsewhere), not_allowed);
        assert_eq!(bed.returning(&outgoing(Kind::Udp).build()), not_allowed);
        let sip = with(&outgoing(Kind::Udp), |p| p.src_port = 5060);
        assert_eq!(bed.returning(&sip), Ok(()));
        assert_eq!(
            bed.returning(&outgoing(Kind::IcmpQuery).build()),
            not_allowed
        );
        let refused = bed.gate.take_refused().unwrap();
        assert_eq!(refused.reason, DropReason::OutgoingNotAllowed);
        let bed = Bed::allowing(&["ping"]);
        assert_eq!(bed.returning(&outgoing(Kind::IcmpQuery).build()), Ok(()));
        assert_eq!(bed.returning(&outgoing(Kind::Tcp).build()), not_allowed);
    }

    #[test]
    fn a_flood_of_new_connections_is_limited_and_clients_are_not() {
        let bed = Bed::allowing(&["any"]);
        assert_eq!(bed.captured(&request(Kind::Tcp).build()), CARRY);
        assert_eq!(bed.returning(&next(Kind::Tcp)), Ok(()));
        assert_eq!(
            bed.captured(&with(&request(Kind::Tcp), |p| p.flags = ACK)),
            CARRY
        );
        let all = (1..=10_000u16).map(|port| with(&outgoing(Kind::Tcp), |p| p.src_port = port));
        let passed = all.filter(|packet| bed.returning(packet) == Ok(())).count();
        assert_eq!(passed, 4_000);
        let limited = with(&outgoing(Kind::Udp), |p| p.src_port = 7);
        assert_eq!(bed.returning(&limited), Err(DropReason::OutgoingLimited));
        assert_eq!(bed.returning(&next(Kind::Tcp)), Ok(()));
        let later = bed.later(Duration::from_secs(1));
        assert_eq!(later.returning(&outgoing(Kind::Tcp).build()), Ok(()));
    }

    /// The server's next packet in the conversation of such a request.
    fn next(kind: Kind) -> Vec<u8> {
        with(&reply(&request(kind)), |p| p.flags = ACK)
    }

    pub(in crate::flow::gate) fn with(plan: &Plan, change: impl FnOnce(&mut Plan)) -> Vec<u8> {
        let mut plan = plan.clone();
        change(&mut plan);
        plan.build()
    }

    /// A packet of a protocol without ports.
    pub(in crate::flow::gate) fn other(src: &str, dst: &str, protocol: u8) -> Vec<u8> {
        let mut packet = Plan::new(Kind::Udp, src, dst).build();
        packet[9] = protocol;
        packet
    }

    proptest! {
        /// Whatever a client asks, its answer leaves, and nothing like it to anybody else.
        #[test]
        fn out_goes_what_answers_a_client(
            plan in plans(), another in plans(), whole in any::<bool>(),
        ) {
            if plan.kind == Kind::IcmpReply { return Ok(()); }
            let has_ports = plan.kind.has_ports();
            if has_ports && plan.dst_port == 0 { return Ok(()); }
            let moved = match plan.dst {
                _ if whole || !has_ports => plan.dst.to_string(),
                IpAddr::V4(addr) => format!("{addr}:{}", plan.dst_port),
                IpAddr::V6(addr) => format!("[{addr}]:{}", plan.dst_port),
            };
            let bed = Bed::settled(&[&moved]);
            let mut back = reply(&plan);
            back.flags = ACK;
            prop_assert_eq!(bed.returning(&back.build()), UNASKED);
            prop_assert_eq!(bed.captured(&plan.build()), CARRY);
            prop_assert_eq!(bed.returning(&back.build()), Ok(()));
            if another.src.is_ipv4() == plan.src.is_ipv4() && another.src != plan.src {
                back.dst = another.src;
                prop_assert_eq!(bed.returning(&back.build()), UNASKED);
            }
        }
    }

    #[test]
    fn nobody_is_answered_who_did_not_ask() {
        let bed = Bed::settled(&[MOVED]);
        for kind in [Kind::Tcp, Kind::Udp, Kind::IcmpQuery] {
            let plan = request(kind);
            assert_eq!(bed.returning(&reply(&plan).build()), UNASKED);
            assert_eq!(bed.captured(&plan.build()), CARRY);
            let back = reply(&plan);
            assert_eq!(bed.returning(&back.build()), Ok(()));
            let refused = |change: &dyn Fn(&mut Plan)| {
                assert_eq!(bed.returning(&with(&back, change)), UNASKED, "{kind:?}");
            };
            refused(&|p| p.dst = "203.0.113.10".parse().unwrap());
            refused(&|p| p.dst_port += 1);
            let from_another_port = with(&back, |p| p.src_port += 1);
            // A server of TFTP answers so.
            let wanted = if kind == Kind::Tcp { UNASKED } else { Ok(()) };
            assert_eq!(bed.returning(&from_another_port), wanted, "{kind:?}");
        }
        let gre = bed.returning(&other(MOVED, CLIENT, GRE));
        assert_eq!(gre, UNASKED);
        assert_eq!(bed.captured(&other(CLIENT, MOVED, GRE)), CARRY);
        assert_eq!(bed.returning(&other(MOVED, CLIENT, GRE)), Ok(()));
        assert_eq!(bed.returning(&other(MOVED, CLIENT, GRE + 1)), UNASKED);
    }

    #[test]
    fn the_new_server_speaks_for_what_was_moved_alone() {
        let bed = Bed::settled(&["192.0.2.5:80/udp"]);
        let udp = request(Kind::Udp);
        assert_eq!(bed.captured(&udp.build()), CARRY);
        let not_moved = Err(DropReason::NotMoved);
        let back = reply(&udp);
        assert_eq!(bed.returning(&back.build()), Ok(()));
        assert_eq!(bed.returning(&with(&back, |p| p.src_port = 81)), not_moved);
        let from_own = with(&back, |p| p.src = OWN.parse().unwrap());
        assert_eq!(bed.returning(&from_own), not_moved);
        assert_eq!(bed.returning(&other(MOVED, CLIENT, GRE)), not_moved);
    }

    #[test]
    fn a_packet_that_stays_with_the_old_server_makes_no_flow() {
        let bed = Bed::settled(&["192.0.2.5:80/udp"]);
        let theirs = with(&request(Kind::Udp), |p| p.dst_port = 81);
        assert_eq!(bed.captured(&theirs), Ok(Verdict::Bounce));
        assert_eq!(bed.gate.stats().live, 0);
        // The key of UDP does not say which port was asked.
        assert_eq!(bed.returning(&reply(&request(Kind::Udp)).build()), UNASKED);
    }

    #[test]
    fn the_new_server_begins_no_conversation_whoever_came() {
        for bed in [Bed::new(&[MOVED]), Bed::settled(&[MOVED])] {
            let tcp = request(Kind::Tcp);
            assert_eq!(bed.captured(&tcp.build()), CARRY);
            assert_eq!(bed.captured(&request(Kind::IcmpQuery).build()), CARRY);
            let back = reply(&tcp);
            let flags = |flags| bed.returning(&with(&back, |p| p.flags = flags));
            assert_eq!(flags(SYN), UNASKED);
            assert_eq!(flags(SYN | RST), UNASKED);
            assert_eq!(flags(SYN | ACK), Ok(()));
            assert_eq!(flags(FIN | ACK), Ok(()));
            let ping = Plan::new(Kind::IcmpQuery, MOVED, CLIENT).build();
            assert_eq!(bed.returning(&ping), UNASKED);
            let mut timestamp = ping;
            timestamp[20] = 13;
            assert_eq!(bed.returning(&timestamp), UNASKED);
            // Whom it has asked there, no answer makes a client.
            let answer = Plan::new(Kind::IcmpReply, "203.0.113.77", MOVED);
            assert_eq!(bed.captured(&answer.build()), CARRY);
            let back = Plan::new(Kind::IcmpReply, MOVED, "203.0.113.77").build();
            assert_eq!(bed.later(ICMP_QUERY).returning(&back), UNASKED);
        }
    }

    #[test]
    fn what_may_be_older_than_the_daemon_goes_on_for_as_long_as_it_may_be_silent() {
        let gre = other(MOVED, CLIENT, GRE);
        let [ack, udp, pong] = [Kind::Tcp, Kind::Udp, Kind::IcmpQuery].map(next);
        for (packet, silent) in [
            (&ack, TCP_ESTABLISHED),
            (&udp, UDP_BOTH_WAYS),
            (&pong, ICMP_QUERY),
            (&gre, OTHER),
        ] {
            let moment = Duration::from_secs(1);
            assert_eq!(Bed::new(&[MOVED]).later(silent).returning(packet), UNASKED);
            let bed = Bed::new(&[MOVED]).later(silent - moment);
            assert_eq!(bed.returning(packet), Ok(()));
            assert_eq!(
                bed.later(2 * moment).returning(packet),
                Ok(()),
                "it is known"
            );
            // Where nobody was killed, connections alone may be older.
            let fresh = Bed::started(&[MOVED], false).returning(packet);
            assert_eq!(fresh, if packet == &ack { Ok(()) } else { UNASKED });
        }
        let begins = with(&reply(&request(Kind::Tcp)), |p| p.flags = SYN | ACK);
        assert_eq!(Bed::new(&[MOVED]).returning(&begins), UNASKED);
        let error = too_big(&request(Kind::Udp).build(), 28, MOVED.parse().unwrap());
        let unrelated = Err(DropReason::IcmpUnrelated);
        assert_eq!(Bed::new(&[MOVED]).returning(&error), unrelated);
    }

    #[test]
    fn a_connection_is_known_again_by_any_packet_of_its_client() {
        let bed = Bed::settled(&[MOVED]);
        let push = next(Kind::Tcp);
        assert_eq!(bed.returning(&push), UNASKED);
        assert_eq!(bed.captured(&request(Kind::Tcp).build()), CARRY);
        assert_eq!(bed.returning(&push), Ok(()));
        let bed = bed.later(TCP_ESTABLISHED);
        assert_eq!(bed.returning(&push), Ok(()), "silent for two hours");
        let bed = bed.later(TCP_ESTABLISHED + Duration::from_secs(4));
        assert_eq!(bed.returning(&push), UNASKED);
    }

    #[test]
    fn a_forged_reset_ends_no_flow_and_the_servers_does() {
        let bed = Bed::settled(&[MOVED]);
        let tcp = request(Kind::Tcp);
        let push = next(Kind::Tcp);
        assert_eq!(bed.captured(&tcp.build()), CARRY);
        assert_eq!(bed.returning(&push), Ok(()));
        assert_eq!(bed.captured(&with(&tcp, |p| p.flags = RST)), CARRY);
        let bed = bed.later(TCP_ESTABLISHED / 2);
        assert_eq!(bed.returning(&push), Ok(()));
        assert_eq!(
            bed.returning(&with(&reply(&tcp), |p| p.flags = RST)),
            Ok(())
        );
        let bed = bed.later(Duration::from_secs(60));
        assert_eq!(bed.returning(&push), UNASKED);
    }

    #[test]
    fn a_client_that_was_not_answered_is_forgotten_sooner() {
        let bed = Bed::settled(&[MOVED]);
        let udp = request(Kind::Udp);
        assert_eq!(bed.captured(&udp.build()), CARRY);
        let forgotten = UDP_ONE_WAY + Duration::from_secs(4);
        let bed = bed.later(forgotten);
        assert_eq!(bed.returning(&reply(&udp).build()), UNASKED);
        assert_eq!(bed.captured(&udp.build()), CARRY);
        assert_eq!(bed.returning(&reply(&udp).build()), Ok(()));
        let bed = bed.later(forgotten);
        assert_eq!(bed.returning(&reply(&udp).build()), Ok(()));
    }

    #[test]
    fn nothing_leaves_for_an_address_that_no_client_has() {
        const NOWHERE: [&str; 9] = [
            "169.254.169.254",
            "127.0.0.1",
            "224.0.0.251",
            "255.255.255.255",
            "0.0.0.0",
            "100.100.100.200",
            // The gate's own: the server's, its network's broadcast address, another that moved.
            OWN,
            "192.0.2.255",
            "192.0.2.6",
        ];
        for bed in [
            Bed::new(&[MOVED, "192.0.2.6:80"]),
            Bed::settled(&[MOVED, "192.0.2.6:80"]),
        ] {
            for to in NOWHERE {
                for kind in [Kind::Tcp, Kind::Udp, Kind::IcmpQuery, Kind::IcmpReply] {
                    let packet = Plan::new(kind, MOVED, to).build();
                    let bad = Err(DropReason::BadDestination);
                    assert_eq!(bed.returning(&packet), bad, "{kind:?} to {to}");
                }
                // Nor does anybody make one of them a client.
                let forged = Plan::new(Kind::Udp, to, MOVED).build();
                assert_eq!(bed.captured(&forged), Err(DropReason::BadSource), "{to}");
            }
            assert_eq!(bed.gate.stats().live, 0);
        }
        let bed = Bed::new(&["2001:db8:a::5"]);
        for to in ["ff02::1", "fe80::1", "::1", "fd00:ec2::254"] {
            let packet = Plan::new(Kind::Udp, "2001:db8:a::5", to).build();
            assert_eq!(
                bed.returning(&packet),
                Err(DropReason::BadDestination),
                "{to}"
            );
        }
    }

    #[test]
    fn a_client_next_door_is_a_client() {
        let bed = Bed::settled(&[MOVED]);
        let next_door = Plan::new(Kind::Udp, "192.0.2.77", MOVED);
        assert_eq!(bed.captured(&next_door.build()), CARRY);
        assert_eq!(bed.returning(&reply(&next_door).build()), Ok(()));
    }

    #[test]
    fn routers_report_from_any_address_and_become_no_clients() {
        let bed = Bed::settled(&[MOVED]);
        let udp = request(Kind::Udp);
        assert_eq!(bed.captured(&udp.build()), CARRY);
        for router in [OWN, "169.254.1.1", "203.0.113.1"] {
            let error = too_big(&reply(&udp).build(), 28, router.parse().unwrap());
            assert_eq!(bed.captured(&error), CARRY, "{router}");
        }
        assert_eq!(bed.gate.stats().live, 1);
    }

    #[test]
    fn an_error_leaves_if_it_tells_a_client_of_its_own_packet() {
        let bed = Bed::settled(&["192.0.2.5:80"]);
        let from = MOVED.parse().unwrap();
        let unrelated = Err(DropReason::IcmpUnrelated);
        for kind in [Kind::Tcp, Kind::Udp] {
            let plan = request(kind);
            let error = too_big(&plan.build(), 28, from);
            assert_eq!(bed.returning(&error), unrelated, "nobody came");
            assert_eq!(bed.captured(&plan.build()), CARRY);
            assert_eq!(bed.returning(&error), Ok(()));
            let elsewhere = with(&plan, |p| p.dst_port = 81);
            let elsewhere = too_big(&elsewhere, 28, from);
            assert_eq!(bed.returning(&elsewhere), Err(DropReason::NotMoved));
            // To somebody else, about this client's packet.
            let mut astray = error;
            astray[19] += 1;
            assert_eq!(bed.returning(&astray), unrelated);
        }
        // It keeps no flow alive.
        let error = too_big(&request(Kind::Udp).build(), 28, from);
        let bed = bed.later(UDP_ONE_WAY / 2);
        assert_eq!(bed.returning(&error), Ok(()));
        let bed = bed.later(UDP_ONE_WAY / 2 + Duration::from_secs(4));
        assert_eq!(bed.returning(&error), unrelated);
    }

    #[test]
    fn fragments_follow_their_first_one_out() {
        for moved in [MOVED, "192.0.2.5:80/udp"] {
            let bed = Bed::settled(&[moved]);
            let udp = request(Kind::Udp);
            let [first, second] = fragments(&reply(&udp).build(), 16, 3);
            let unknown = Err(DropReason::FragmentUnknown);
            assert_eq!(bed.returning(&first), UNASKED);
            assert_eq!(bed.returning(&second), unknown);
            let [asked, _] = fragments(&udp.build(), 16, 4);
            assert_eq!(bed.captured(&asked), CARRY);
            assert_eq!(bed.returning(&second), unknown);
            assert_eq!(bed.returning(&first), Ok(()));
            assert_eq!(bed.returning(&second), Ok(()));
        }
    }

    #[test]
    fn an_example_of_what_was_refused_is_kept_until_it_is_taken() {
        let bed = Bed::settled(&[MOVED]);
        assert_eq!(bed.gate.take_refused(), None);
        for port in [53, 54] {
            let to = with(&reply(&request(Kind::Udp)), |p| p.dst_port = port);
            assert_eq!(bed.returning(&to), UNASKED);
        }
        let refused = bed.gate.take_refused().unwrap();
        assert_eq!(refused.to_string(), "UDP to 203.0.113.9 port 53");
        assert_eq!(bed.gate.take_refused(), None);
        assert_eq!(
            bed.returning(&other(MOVED, "169.254.169.254", GRE)),
            Err(DropReason::BadDestination)
        );
        let refused = bed.gate.take_refused().unwrap();
        assert_eq!(refused.reason, DropReason::BadDestination);
        assert_eq!(refused.to_string(), "IP protocol 47 to 169.254.169.254");
    }
}
