//! Two tunnels in one process, under a virtual clock and a network that can do to datagrams what
//! the internet does and more.
//!
//! ```text
//!   Side 0: old ──┐   loss, duplication, delay, reordering, cut   ┌── Side 1: new
//!   192.0.2.1     └── Pair: one clock, one queue of datagrams ────┘   198.51.100.2
//! ```

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap, HashSet};

use proptest::prelude::*;

use super::sessions::{MAX_UNCONFIRMED, MAX_USABLE};
use super::*;
use crate::channel::session::{
    Cipher, CipherPolicy, Entropy, MacCheck, PeerKeys, Psk, SessionIndexes,
};
use crate::channel::wire::{
    self, Data, INITIATION_LEN, RESPONSE_LEN, TYPE_DATA, TYPE_INITIATION, TYPE_RESPONSE,
};
use crate::model::asked::{Asked, Found, Trouble, Verdict};
use crate::model::drops::Drops;
use crate::model::mode::Told;
use crate::model::peer::PeerId;
use crate::model::progress::Listens;
use crate::testing::epoch;

const OLD: usize = 0;
const NEW: usize = 1;
const YEAR: i64 = 365 * 86_400;
/// 2026, so that a year back is still after 1970.
const WALL: u64 = 1_770_000_000;

fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn millis(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn role(side: usize) -> Role {
    [Role::Old, Role::New][side]
}

fn addr(side: usize) -> SocketAddr {
    ["192.0.2.1:51820", "198.51.100.2:51820"][side]
        .parse()
        .unwrap()
}

fn psk(byte: u8) -> Psk {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD
        .encode([byte; 32])
        .parse()
        .unwrap()
}

fn announcement(role: Role) -> Announcement {
    match role {
        Role::Old => Announcement::Old {
            moves: vec!["192.0.2.5".parse().unwrap()],
            mtu: 1500,
            reached: None,
            outgoing: true,
        },
        Role::New => Announcement::New {
            deliver: Deliver::To {
                v4: Some("198.51.100.2".parse().unwrap()),
                v6: None,
            },
            mtu: 1400,
            error: None,
        },
    }
}

/// What the daemon around a tunnel holds: the lanes' tables and the counters.
struct Side {
    config: TunnelConfig,
    addr: SocketAddr,
    wall_offset: i64,
    tunnel: Option<Tunnel>,
    mac_check: MacCheck,
    table: HashMap<u32, Arc<Session>>,
    send_on: Option<Arc<Session>>,
    endpoint: Option<Endpoint>,
    drops: Drops,
    got: Vec<u64>,
    states: Vec<State>,
    configs: Vec<Announcement>,
    seen: Vec<Trouble>,
    progress: Vec<(u64, Vec<(MoveName, Progress)>)>,
    modes: Vec<PeerModes>,
    asks: Vec<Vec<Asked>>,
    told: Vec<Vec<(Asked, Found)>>,
    warnings: Vec<Warning>,
    rtts: Vec<Duration>,
    path_mtus: Vec<u16>,
    arrivals: Vec<Endpoint>,
    installs: usize,
}

impl Side {
    fn tunnel(&self) -> &Tunnel {
        self.tunnel.as_ref().unwrap()
    }

    fn drops(&self, reason: DropReason) -> u64 {
        self.drops.get(reason)
    }

    fn all_drops(&self) -> BTreeMap<&'static str, u64> {
        self.drops
            .iter()
            .map(|(reason, count)| (reason.name(), count))
            .collect()
    }
}

#[derive(Clone)]
struct Flying {
    at: Instant,
    order: u64,
    from: SocketAddr,
    to: SocketAddr,
    bytes: Vec<u8>,
}

#[derive(Clone, Copy)]
struct Link {
    delay: Duration,
    jitter: Duration,
    /// Per thousand.
    loss: u64,
    /// Per thousand.
    duplicate: u64,
    cut: bool,
    /// Larger datagrams disappear.
    mtu: usize,
}

struct Pair {
    now: Instant,
    start: Instant,
    sides: [Side; 2],
    flying: Vec<Flying>,
    order: u64,
    link: Link,
    random: Entropy,
    /// Everything that was ever sent: (side, bytes).
    record: Vec<(usize, Vec<u8>)>,
    next_id: u64,
    idle_steps: Cell<u32>,
}

impl Pair {
    /// Neither side runs yet.
    fn new(seed: u64) -> Self {
        let now = epoch();
        let side = |side: usize| {
            let keys = PeerKeys::derive(&psk(7));
            Side {
                config: TunnelConfig {
                    peer: PeerId(0),
                    keys: keys.clone(),
                    role: role(side),
                    lanes: 2,
                    offer: Offer {
                        ciphers: CipherPolicy::Auto.into(),
                        aes_hardware: true,
                    },
                    endpoint: Some(addr(1 - side)),
                    announcement: announcement(role(side)),
                    max_datagram: Some(1472),
                    timers: Timers::default(),
                    indexes: SessionIndexes::default(),
                    entropy: Entropy::seeded(seed * 2 + side as u64),
                },
                addr: addr(side),
                wall_offset: 0,
                tunnel: None,
                mac_check: MacCheck::new(role(side), [keys]),
                table: HashMap::new(),
                send_on: None,
                endpoint: None,
                drops: Drops::default(),
                got: Vec::new(),
                states: Vec::new(),
                configs: Vec::new(),
                seen: Vec::new(),
                progress: Vec::new(),
                modes: Vec::new(),
                asks: Vec::new(),
                told: Vec::new(),
                warnings: Vec::new(),
                rtts: Vec::new(),
                path_mtus: Vec::new(),
                arrivals: Vec::new(),
                installs: 0,
            }
        };
        Self {
            now,
            start: now,
            sides: [side(OLD), side(NEW)],
            flying: Vec::new(),
            order: 0,
            link: Link {
                delay: millis(20),
                jitter: Duration::ZERO,
                loss: 0,
                duplicate: 0,
                cut: false,
                mtu: 1472,
            },
            random: Entropy::seeded(seed ^ 0xdead),
            record: Vec::new(),
            next_id: 0,
            idle_steps: Cell::new(0),
        }
    }

    /// Both run and have found each other.
    fn up(seed: u64) -> Self {
        let mut pair = Self::new(seed);
        pair.start(OLD);
        pair.start(NEW);
        pair.run(secs(2));
        pair.assert_agreed();
        pair
    }

    fn start(&mut self, side: usize) {
        let tunnel = Tunnel::new(self.sides[side].config.clone(), self.now).unwrap();
        self.sides[side].tunnel = Some(tunnel);
    }

    /// `kill -9`: everything in memory is gone.
    fn kill(&mut self, side: usize) {
        let side = &mut self.sides[side];
        side.tunnel = None;
        side.table.clear();
        side.send_on = None;
        side.endpoint = None;
        side.mac_check = MacCheck::new(side.config.role, [side.config.keys.clone()]);
    }

    fn restart(&mut self, side: usize) {
        self.kill(side);
        self.start(side);
    }

    fn chance(&self, per_thousand: u64) -> bool {
        self.random.u64().unwrap() % 1000 < per_thousand
    }

    fn wall(&self, side: usize) -> SystemTime {
        let wall = SystemTime::UNIX_EPOCH + secs(WALL) + (self.now - self.start);
        let offset = self.sides[side].wall_offset;
        if offset < 0 {
            wall - secs(offset.unsigned_abs())
        } else {
            wall + secs(offset as u64)
        }
    }

    fn send(&mut self, side: usize, to: SocketAddr, bytes: Vec<u8>) {
        self.record.push((side, bytes.clone()));
        let copies = 1 + usize::from(self.chance(self.link.duplicate));
        for _ in 0..copies {
            let too_big = bytes.len() > self.link.mtu;
            if self.link.cut || too_big || self.chance(self.link.loss) {
                continue;
            }
            let jitter = self.link.jitter.as_micros() as u64;
            let late = self.random.u64().unwrap() % (jitter + 1);
            let at = self.now + self.link.delay + Duration::from_micros(late);
            self.inject(at, self.sides[side].addr, to, bytes.clone());
        }
    }

    fn inject(&mut self, at: Instant, from: SocketAddr, to: SocketAddr, bytes: Vec<u8>) {
        self.order += 1;
        self.flying.push(Flying {
            at,
            order: self.order,
            from,
            to,
            bytes,
        });
    }

    /// A lane sends a packet with a number of its own; `None` if there was no session to send it
    /// on.
    fn send_data(&mut self, side: usize) -> Option<u64> {
        let id = self.next_id;
        self.next_id += 1;
        let lane = (id % 2) as u8;
        let session = self.sides[side].send_on.clone()?;
        let to = self.sides[side].endpoint?.remote;
        let sealer = session.sealer(lane).unwrap();
        let mut datagram = vec![0; DATA_OVERHEAD + 8];
        datagram[16..24].copy_from_slice(&id.to_le_bytes());
        let counter = sealer.reserve(1)?.next().unwrap();
        sealer.seal(counter, Flags::NONE, &mut datagram).unwrap();
        session.activity().data_sent(self.now);
        self.send(side, to, datagram);
        Some(id)
    }

    /// Does what happens next, if that is not after `until`.
    fn step(&mut self, until: Instant) -> bool {
        let timeout = |side: usize| {
            let due = self.sides[side].tunnel.as_ref()?.next_timeout()?;
            Some((due.max(self.now), side))
        };
        let arrival =
            (0..self.flying.len()).min_by_key(|&i| (self.flying[i].at, self.flying[i].order));
        let timer = [timeout(OLD), timeout(NEW)].into_iter().flatten().min();
        let arrives = arrival.map(|i| self.flying[i].at.max(self.now));
        let at = [timer.map(|(at, _)| at), arrives]
            .into_iter()
            .flatten()
            .min();
        let Some(at) = at.filter(|&at| at <= until) else {
            self.now = until;
            return false;
        };
        let steps = if at == self.now {
            self.idle_steps.get() + 1
        } else {
            0
        };
        self.idle_steps.set(steps);
        assert!(steps < 10_000, "a timer that is always due");
        self.now = at;
        match (arrival, timer) {
            (Some(i), _) if arrives == Some(at) => {
                let flying = self.flying.remove(i);
                self.arrive(flying);
            }
            (_, Some((_, side))) => {
                let wall = self.wall(side);
                let now = self.now;
                self.sides[side]
                    .tunnel
                    .as_mut()
                    .unwrap()
                    .handle_timeout(now, wall);
                self.drain(side);
            }
            _ => unreachable!(),
        }
        true
    }

    fn run(&mut self, time: Duration) {
        let until = self.now + time;
        while self.step(until) {}
    }

    /// Runs until both sides send on one session; returns how long that took.
    fn run_until_agreed(&mut self, most: Duration) -> Duration {
        let began = self.now;
        while !self.agreed() {
            assert!(
                self.step(began + most),
                "no agreement within {most:?}: {}",
                self.drops()
            );
        }
        self.now - began
    }

    fn arrive(&mut self, flying: Flying) {
        let Some(side) = (0..2).find(|&side| self.sides[side].addr == flying.to) else {
            return;
        };
        let now = self.now;
        let at = &mut self.sides[side];
        if at.tunnel.is_none() {
            return;
        }
        if let Err(reason) = receive(at, now, flying.from, flying.bytes) {
            at.drops.count(reason);
        }
        self.drain(side);
    }

    fn drain(&mut self, side: usize) {
        let at = &mut self.sides[side];
        let tunnel = at.tunnel.as_mut().unwrap();
        while let Some(event) = tunnel.poll_event() {
            match event {
                Event::SessionInstalled(session) => {
                    at.installs += 1;
                    assert!(at.table.insert(session.index(), session).is_none());
                }
                Event::SessionRemoved(index) => assert!(at.table.remove(&index).is_some()),
                Event::SendOn(session) => {
                    assert!(
                        at.table.contains_key(&session.index()),
                        "receive before send"
                    );
                    at.send_on = Some(session);
                }
                Event::SendOff => at.send_on = None,
                Event::Endpoint(endpoint) => at.endpoint = Some(endpoint),
                Event::Arrived(endpoint) => at.arrivals.push(endpoint),
                Event::State(state) => at.states.push(state),
                Event::PeerConfig(config) => at.configs.push(config),
                Event::PeerSees { news, .. } => at.seen = news.troubles,
                Event::PeerModes { modes, .. } => at.modes.push(modes),
                Event::PeerAsks(asks) => at.asks.push(asks),
                Event::PeerTells(told) => at.told.push(told),
                Event::PeerProgress { run, progress } => at.progress.push((run, progress)),
                Event::Rtt(rtt) => at.rtts.push(rtt),
                Event::PathMtu(size) => at.path_mtus.push(size),
                Event::Warning(warning) => at.warnings.push(warning),
            }
        }
        assert!(at.table.len() <= MAX_USABLE + MAX_UNCONFIRMED, "bounded");
        let mut out = Vec::new();
        while let Some(transmit) = tunnel.poll_transmit() {
            out.push(transmit);
        }
        for transmit in out {
            self.send(side, transmit.to.remote, transmit.datagram);
        }
    }

    /// Both send on the same session, and both know that the other can.
    fn agreed(&self) -> bool {
        let [old, new] = &self.sides;
        let (Some(a), Some(b)) = (&old.send_on, &new.send_on) else {
            return false;
        };
        a.index() == b.remote_index()
            && b.index() == a.remote_index()
            && a.is_heard()
            && b.is_heard()
            && old.tunnel().state() == State::Up
            && new.tunnel().state() == State::Up
    }

    fn assert_agreed(&self) {
        assert!(self.agreed(), "{}", self.drops());
        let [old, new] = [OLD, NEW].map(|side| self.sides[side].send_on.as_ref().unwrap());
        assert_eq!(old.initiator(), new.initiator());
        assert_eq!(old.cipher(), new.cipher());
    }

    fn drops(&self) -> String {
        format!(
            "old {:?} new {:?}",
            self.sides[OLD].all_drops(),
            self.sides[NEW].all_drops()
        )
    }

    fn assert_no_drops(&self) {
        for side in &self.sides {
            assert!(side.all_drops().is_empty(), "{}", self.drops());
        }
    }

    /// A packet in each direction arrives.
    fn assert_carries(&mut self) {
        for side in [OLD, NEW] {
            let id = self.send_data(side).expect("a session to send on");
            self.run(self.link.delay + self.link.jitter);
            assert!(self.sides[1 - side].got.contains(&id), "{}", self.drops());
        }
    }

    /// The last datagram that a side sent of a type.
    fn last(&self, side: usize, kind: u8) -> Vec<u8> {
        let last = self
            .record
            .iter()
            .rev()
            .find(|(from, bytes)| *from == side && bytes[0] == kind);
        last.unwrap().1.clone()
    }

    fn sent(&self, side: usize, kind: u8) -> usize {
        self.record
            .iter()
            .filter(|(from, bytes)| *from == side && bytes[0] == kind)
            .count()
    }

    fn deliver(&mut self, side: usize, from: SocketAddr, bytes: Vec<u8>) {
        let to = self.sides[side].addr;
        self.arrive(Flying {
            at: self.now,
            order: 0,
            from,
            to,
            bytes,
        });
    }
}

/// What a lane does with a datagram.
fn receive(
    at: &mut Side,
    now: Instant,
    from: SocketAddr,
    mut bytes: Vec<u8>,
) -> Result<(), DropReason> {
    let tunnel = at.tunnel.as_mut().unwrap();
    let from = Endpoint {
        remote: from,
        local: Some(at.addr.ip()),
    };
    match Message::parse(&bytes)? {
        Message::Initiation(_) | Message::Response(_) => {
            let admitted = at.mac_check.admit(now, from.remote, &bytes);
            let admitted = admitted.map_err(|dropped| dropped.reason)?;
            assert_eq!(admitted.peer(), PeerId(0));
            tunnel.handle_handshake(now, from, &admitted)
        }
        Message::Data(data) => {
            let session = at
                .table
                .get(&data.receiver)
                .ok_or(DropReason::SessionUnknown)?;
            let session = Arc::clone(session);
            let opened = session.open(data, &mut bytes)?;
            session.activity().data_received(now);
            if opened.first || opened.newest && at.endpoint != Some(from) {
                tunnel.session_heard(now, &session, from);
            }
            let plaintext = &bytes[opened.plaintext];
            if opened.flags.has(Flags::CONTROL) {
                return tunnel.handle_control(now, &session, plaintext);
            }
            at.got
                .push(u64::from_le_bytes(plaintext.try_into().unwrap()));
            Ok(())
        }
    }
}

// Finding each other.

#[test]
fn either_may_start_first() {
    for (seed, (first, second)) in [(OLD, NEW), (NEW, OLD)].into_iter().enumerate() {
        for wait in [0, 10, 900, 5_000, 3_600_000] {
            let mut pair = Pair::new(seed as u64);
            pair.start(first);
            pair.run(millis(wait));
            pair.start(second);
            let took = pair.run_until_agreed(secs(10));
            assert!(took <= millis(150), "after {wait} ms: {took:?}");
            pair.run(secs(3));
            pair.assert_agreed();
            pair.assert_carries();
            // Nothing is dropped but late responses to what both asked at once.
            for side in &pair.sides {
                let unexpected = side.drops(DropReason::HandshakeUnexpected);
                assert_eq!(side.drops.iter().map(|(_, n)| n).sum::<u64>(), unexpected);
            }
        }
    }
}

#[test]
fn a_side_without_an_endpoint_waits_and_is_found() {
    for waiting in [OLD, NEW] {
        let mut pair = Pair::new(3);
        pair.sides[waiting].config.endpoint = None;
        pair.start(waiting);
        pair.run(secs(60));
        assert!(pair.record.is_empty(), "it knows nobody to talk to");
        pair.start(1 - waiting);
        assert!(pair.run_until_agreed(secs(2)) <= millis(100));
        pair.assert_carries();
        pair.assert_no_drops();
        // After a restart it has to wait until the other misses it.
        pair.restart(waiting);
        let took = pair.run_until_agreed(secs(30));
        assert!(took > secs(10) && took <= secs(17), "{took:?}");
        assert!(pair.sides[waiting].drops(DropReason::SessionUnknown) > 0);
        // The other restarts: it knows the address, so this side is found at once.
        pair.restart(1 - waiting);
        assert!(pair.run_until_agreed(secs(5)) <= millis(100));
    }
}

#[test]
fn announcements_arrive_once_and_when_they_change() {
    let mut pair = Pair::up(4);
    pair.run(secs(400));
    assert_eq!(pair.sides[NEW].configs, [announcement(Role::Old)]);
    assert_eq!(pair.sides[OLD].configs, [announcement(Role::New)]);
    let many = Announcement::Old {
        moves: (1..=64)
            .map(|n| {
                let ports = (0..64).map(|p| format!("{}-{}", 9 + 10 * p, 10 + 10 * p));
                let ports = ports.collect::<Vec<_>>().join(",");
                format!("[2001:db8::{n:x}]:{ports}").parse().unwrap()
            })
            .collect(),
        mtu: 9000,
        reached: None,
        outgoing: false,
    };
    pair.link.loss = 300;
    let now = pair.now;
    let tunnel = pair.sides[OLD].tunnel.as_mut().unwrap();
    tunnel.set_announcement(now, many.clone());
    tunnel.set_announcement(now, many.clone());
    pair.run(secs(20));
    assert_eq!(&pair.sides[NEW].configs[1..], std::slice::from_ref(&many));
    pair.link.loss = 0;
    pair.restart(NEW);
    pair.run(secs(3));
    assert_eq!(pair.sides[NEW].configs[2..], [many], "it was forgotten");
    assert_eq!(pair.sides[OLD].configs.len(), 2, "told by the new run");
}

#[test]
fn one_announcement_a_second_is_looked_at_and_the_newest_in_the_end() {
    let mut pair = Pair::up(41);
    pair.run(secs(5));
    let before = pair.sides[NEW].configs.len();
    let says = |n: u64| Announcement::Old {
        moves: vec![format!("192.0.2.{}", n % 2 + 1).parse().unwrap()],
        mtu: 1_280 + n as u16,
        reached: None,
        outgoing: false,
    };
    for n in 0..100 {
        let now = pair.now;
        let tunnel = pair.sides[OLD].tunnel.as_mut().unwrap();
        tunnel.set_announcement(now, says(n));
        pair.run(millis(50));
    }
    pair.run(secs(2));
    let heard = &pair.sides[NEW].configs[before..];
    assert!((5..=7).contains(&heard.len()), "{}", heard.len());
    assert_eq!(heard.last(), Some(&says(99)));
}

#[test]
fn a_peer_that_seems_to_move_all_the_time_is_acted_on_once_a_second() {
    let mut pair = Pair::up(42);
    pair.run(secs(5));
    assert_eq!(pair.sides[NEW].tunnel().path_mtu(), 1_472);
    let before = pair.sides[NEW].arrivals.len();
    let searches = pair.sides[NEW].path_mtus.len();
    // A relay on the path sends each datagram on from another address.
    for n in 0..500u32 {
        let at = pair.record.len();
        pair.link.cut = true;
        pair.send_data(OLD).unwrap();
        let (_, datagram) = pair.record[at].clone();
        pair.link.cut = false;
        let relay = SocketAddr::from(([203, 0, 113, 1 + (n % 2) as u8], 51_820));
        pair.deliver(NEW, relay, datagram);
        assert_eq!(
            pair.sides[NEW].endpoint.unwrap().remote,
            relay,
            "lanes follow"
        );
        pair.run(millis(10));
    }
    pair.run(secs(1));
    let arrivals = &pair.sides[NEW].arrivals[before..];
    assert!((5..=8).contains(&arrivals.len()), "{}", arrivals.len());
    assert_eq!(arrivals.last().copied(), pair.sides[NEW].endpoint);
    // The path was searched from the beginning once: down to where a search begins, and up.
    let fell = |sizes: &[u16]| sizes.windows(2).filter(|pair| pair[1] < pair[0]).count();
    let sizes = &pair.sides[NEW].path_mtus[searches - 1..];
    assert!(fell(sizes) <= 1, "{sizes:?}");
    // At rest it comes to an end.
    pair.run(secs(30));
    assert_eq!(pair.sides[NEW].tunnel().path_mtu(), 1_472);
    assert_eq!(pair.sides[NEW].endpoint.unwrap().remote, addr(OLD));
}

#[test]
fn a_peer_that_shakes_hands_without_end_is_answered_a_few_times_a_second() {
    let mut pair = Pair::new(43);
    pair.start(NEW);
    let config = pair.sides[OLD].config.clone();
    for n in 0..1_000u64 {
        let now = pair.now + millis(n);
        // Each of them is a new initiation of a peer that has the key.
        let wall = SystemTime::UNIX_EPOCH + secs(1_000_000) + millis(n);
        let mut mad = Tunnel::new(config.clone(), now).unwrap();
        mad.handle_timeout(now, wall);
        let initiation = mad.poll_transmit().unwrap().datagram;
        pair.deliver(NEW, addr(OLD), initiation);
        pair.run(millis(1));
    }
    let new = &pair.sides[NEW];
    assert!(new.installs as u32 <= 2 + ANSWERED.at_once + 2 * ANSWERED.per_second);
    assert!(new.installs as u32 >= ANSWERED.at_once);
    assert!(new.drops(DropReason::HandshakeLimited) > 500);
}

#[test]
fn round_trips_are_measured() {
    let mut pair = Pair::up(5);
    pair.run(secs(20));
    for side in &pair.sides {
        assert!(side.rtts.len() >= 4);
        assert!(
            side.rtts.iter().all(|&rtt| rtt == millis(40)),
            "{:?}",
            side.rtts
        );
    }
}

// Ciphers.

#[test]
fn the_cipher_is_the_faster_one_for_both() {
    let auto = CipherPolicy::Auto;
    let aes = CipherPolicy::Only(Cipher::Aes256Gcm);
    let chacha = CipherPolicy::Only(Cipher::ChaCha20Poly1305);
    let aegis = CipherPolicy::Only(Cipher::Aegis256X4);
    let cases = [
        ((auto, true), (auto, true), Some(Cipher::Aes256Gcm)),
        ((auto, true), (auto, false), Some(Cipher::ChaCha20Poly1305)),
        ((auto, false), (auto, false), Some(Cipher::ChaCha20Poly1305)),
        ((chacha, true), (auto, true), Some(Cipher::ChaCha20Poly1305)),
        ((auto, false), (aes, true), Some(Cipher::Aes256Gcm)),
        ((aes, true), (chacha, true), None),
        ((auto, true), (aegis, true), Some(Cipher::Aegis256X4)),
        ((auto, false), (aegis, false), Some(Cipher::Aegis256X4)),
        ((aes, true), (aegis, true), None),
    ];
    for (old, new, expected) in cases {
        for (old, new) in [(old, new), (new, old)] {
            let mut pair = Pair::new(6);
            for (side, (policy, aes_hardware)) in [(OLD, old), (NEW, new)] {
                pair.sides[side].config.offer = Offer {
                    ciphers: policy.into(),
                    aes_hardware,
                };
                pair.start(side);
            }
            pair.run(secs(30));
            for side in [OLD, NEW] {
                let session = pair.sides[side].tunnel().session();
                assert_eq!(session.map(|session| session.cipher()), expected);
                let warned = pair.sides[side]
                    .warnings
                    .iter()
                    .any(|warning| matches!(warning, Warning::NoCommonCipher { .. }));
                assert_eq!(warned, expected.is_none());
                assert!(pair.sides[side].warnings.len() <= 1, "rate-limited");
                if expected.is_none() {
                    assert_eq!(pair.sides[side].installs, 0);
                    assert!(pair.sent(side, TYPE_INITIATION) < 15, "at a slow pace");
                }
            }
            if expected.is_some() {
                pair.assert_carries();
            }
        }
    }
}

// Strangers, and holders of the key.

#[test]
fn another_key_gets_no_reply() {
    let mut pair = Pair::new(7);
    let keys = PeerKeys::derive(&psk(8));
    pair.sides[NEW].config.keys = keys.clone();
    pair.sides[NEW].mac_check = MacCheck::new(Role::New, [keys]);
    pair.start(OLD);
    pair.start(NEW);
    pair.run(secs(60));
    for side in [OLD, NEW] {
        let tried = pair.sent(1 - side, TYPE_INITIATION) as u64;
        assert!(tried > 20);
        assert_eq!(pair.sides[side].drops(DropReason::HandshakeAuth), tried);
        assert_eq!(pair.sent(side, TYPE_RESPONSE), 0);
        assert_eq!(pair.sides[side].installs, 0);
    }
}

#[test]
fn a_key_that_passes_the_mac_check_but_not_the_handshake() {
    let mut pair = Pair::new(8);
    pair.start(OLD);
    // Right mac, wrong Noise message: only a bug or a holder of the PSK can make this.
    let mut forged = Initiation::write(Role::New, 5).to_vec();
    let signed = INITIATION_LEN - wire::MAC_LEN;
    let tag = pair.sides[NEW].config.keys.mac_of(&forged[..signed]);
    forged[signed..].copy_from_slice(&tag);
    pair.deliver(OLD, addr(NEW), forged);
    assert_eq!(pair.sides[OLD].drops(DropReason::HandshakeAuth), 1);
    assert_eq!(pair.sent(OLD, TYPE_RESPONSE), 0);
}

#[test]
fn the_same_role_is_refused_with_a_warning() {
    let mut pair = Pair::new(9);
    pair.sides[NEW].config.role = Role::Old;
    pair.start(OLD);
    pair.start(NEW);
    pair.run(secs(30));
    for side in &pair.sides {
        assert!(side.drops(DropReason::HandshakeRole) > 10);
        assert_eq!(side.warnings, [Warning::SameRole(Role::Old)]);
        assert_eq!(side.installs, 0);
    }
    assert_eq!(
        pair.sent(OLD, TYPE_RESPONSE) + pair.sent(NEW, TYPE_RESPONSE),
        0
    );
}

#[test]
fn another_version_gets_no_reply() {
    let mut pair = Pair::up(10);
    for kind in [TYPE_INITIATION, TYPE_RESPONSE] {
        let side = usize::from(pair.sent(OLD, kind) == 0);
        let mut bytes = pair.last(side, kind);
        bytes[1] = 2;
        let before = pair.record.len();
        pair.deliver(1 - side, addr(side), bytes.clone());
        pair.deliver(1 - side, addr(side), bytes[..2].to_vec());
        assert_eq!(pair.sides[1 - side].drops(DropReason::WireVersion), 2);
        assert_eq!(pair.record.len(), before);
        pair.sides[1 - side].drops = Drops::default();
    }
}

#[test]
fn reflected_messages_are_refused() {
    let mut pair = Pair::up(11);
    pair.run(secs(130));
    let agreed = pair.sides[OLD].send_on.as_ref().unwrap().index();
    let before = pair.record.len();
    let record = pair.record.clone();
    let mut expected = [[0; 2]; 2];
    for (side, bytes) in record {
        let handshake = usize::from(bytes[0] != TYPE_DATA);
        expected[side][handshake] += 1;
        pair.deliver(side, addr(1 - side), bytes);
    }
    for side in [OLD, NEW] {
        let at = &pair.sides[side];
        assert!(expected[side][0] > 10 && expected[side][1] >= 1);
        assert_eq!(at.drops(DropReason::SessionUnknown), expected[side][0]);
        assert_eq!(at.drops(DropReason::HandshakeRole), expected[side][1]);
    }
    assert_eq!(pair.record.len(), before, "no reply");
    assert_eq!(pair.sides[OLD].send_on.as_ref().unwrap().index(), agreed);
    pair.assert_carries();
}

#[test]
fn the_role_is_bound_by_the_handshake_too() {
    // A reflected initiation whose header claims the other role, with a right mac: only a holder of
    // the PSK can make this.
    let mut pair = Pair::new(12);
    pair.start(OLD);
    pair.run(millis(1));
    let mut bytes = pair.last(OLD, TYPE_INITIATION);
    bytes[2] = 2;
    let signed = INITIATION_LEN - wire::MAC_LEN;
    let tag = pair.sides[OLD].config.keys.mac_of(&bytes[..signed]);
    bytes[signed..].copy_from_slice(&tag);
    pair.deliver(OLD, addr(NEW), bytes);
    assert_eq!(pair.sides[OLD].drops(DropReason::HandshakeAuth), 1);
    assert_eq!(pair.sides[OLD].installs, 0);
}

#[test]
fn every_byte_of_every_message_counts() {
    let mut pair = Pair::new(13);
    pair.start(NEW);
    pair.run(millis(1));
    pair.start(OLD);
    pair.link.cut = true;
    pair.run(millis(1));
    let tampered = |bytes: &[u8], at: usize, bit: usize| {
        let mut bytes = bytes.to_vec();
        bytes[at] ^= 1 << bit;
        bytes
    };
    let refused = |pair: &mut Pair, side: usize, bytes: &[u8]| {
        let before = (
            pair.record.len(),
            pair.sides[side].installs,
            pair.sides[side].got.len(),
        );
        let mut count = 0;
        for at in 0..bytes.len() {
            for bit in 0..8 {
                pair.deliver(side, addr(1 - side), tampered(bytes, at, bit));
                count += 1;
            }
        }
        for length in 0..bytes.len() {
            pair.deliver(side, addr(1 - side), bytes[..length].to_vec());
            count += 1;
        }
        let side = &pair.sides[side];
        assert_eq!(before, (pair.record.len(), side.installs, side.got.len()));
        assert_eq!(side.drops.iter().map(|(_, n)| n).sum::<u64>(), count);
        assert_eq!(
            side.drops(DropReason::HandshakeReplay) + side.drops(DropReason::Replay),
            0
        );
    };
    let initiation = pair.last(OLD, TYPE_INITIATION);
    refused(&mut pair, NEW, &initiation);
    pair.deliver(NEW, addr(OLD), initiation);
    assert_eq!(pair.sides[NEW].installs, 1, "unharmed it is accepted");
    let response = pair.last(NEW, TYPE_RESPONSE);
    assert_eq!(response.len(), RESPONSE_LEN);
    refused(&mut pair, OLD, &response);
    pair.deliver(OLD, addr(NEW), response);
    assert_eq!(pair.sides[OLD].installs, 1, "unharmed it is accepted");
    pair.sides[NEW].drops = Drops::default();
    pair.send_data(OLD).unwrap();
    let data = pair.last(OLD, TYPE_DATA);
    refused(&mut pair, NEW, &data);
    assert!(
        !pair.sides[NEW]
            .table
            .values()
            .any(|session| session.is_heard())
    );
    pair.deliver(NEW, addr(OLD), data);
    assert_eq!(pair.sides[NEW].got.len(), 1, "unharmed it is accepted");
}

proptest! {
    #[test]
    fn garbage_costs_a_count_and_nothing_else(
        start in proptest::collection::vec(any::<u8>(), 0..4),
        rest in proptest::collection::vec(any::<u8>(), 0..200),
        kind in 0u8..6,
    ) {
        thread_local!(static PAIR: RefCell<Pair> = RefCell::new(Pair::up(14)));
        PAIR.with_borrow_mut(|pair| {
            let mut bytes = [&start[..], &rest[..]].concat();
            let before = (pair.record.len(), pair.sides[NEW].installs);
            let count = |pair: &Pair| pair.sides[NEW].drops.iter().map(|(_, n)| n).sum::<u64>();
            let dropped = count(pair);
            pair.deliver(NEW, addr(OLD), bytes.clone());
            for (byte, value) in bytes.iter_mut().zip([kind, wire::VERSION, 1, 0]) {
                *byte = value;
            }
            let length = match kind { 1 => INITIATION_LEN, 2 => RESPONSE_LEN, _ => bytes.len() };
            bytes.resize(length, 0x55);
            pair.deliver(NEW, addr(OLD), bytes.clone());
            if bytes.len() >= DATA_OVERHEAD {
                let index = *pair.sides[NEW].table.keys().next().unwrap();
                bytes[4..8].copy_from_slice(&index.to_le_bytes());
                bytes[0] = TYPE_DATA;
                pair.deliver(NEW, addr(OLD), bytes.clone());
            }
            prop_assert_eq!(before, (pair.record.len(), pair.sides[NEW].installs));
            prop_assert!(count(pair) >= dropped + 2);
            Ok(())
        })?;
    }
}

// Replay.

#[test]
fn a_replayed_session_changes_nothing() {
    let mut pair = Pair::up(15);
    for _ in 0..50 {
        pair.send_data(OLD);
        pair.send_data(NEW);
        pair.run(secs(3));
    }
    assert!(pair.sides[OLD].installs >= 2, "over a rekey");
    let stranger = "203.0.113.9:1".parse().unwrap();
    let record = pair.record.clone();
    let got = [OLD, NEW].map(|side| pair.sides[side].got.clone());
    let index = pair.sides[OLD].send_on.as_ref().unwrap().index();
    let mut handshakes = [0; 2];
    for (side, bytes) in &record {
        handshakes[1 - side] += u64::from(bytes[0] != TYPE_DATA);
        pair.deliver(1 - side, stranger, bytes.clone());
    }
    assert_eq!(pair.record.len(), record.len(), "not a byte in reply");
    for side in [OLD, NEW] {
        let at = &pair.sides[side];
        assert_eq!(at.got, got[side]);
        assert_eq!(at.drops(DropReason::HandshakeReplay), handshakes[side]);
        assert!(at.drops(DropReason::Replay) > 50);
        assert_eq!(at.endpoint.unwrap().remote, addr(1 - side));
    }
    pair.run(secs(2));
    assert_eq!(pair.sides[OLD].send_on.as_ref().unwrap().index(), index);
    // The tunnel also refuses those that the MAC check has forgotten, each for a reason of its own.
    for side in [OLD, NEW] {
        let at = &mut pair.sides[side];
        at.mac_check = MacCheck::new(at.config.role, [at.config.keys.clone()]);
        at.drops = Drops::default();
    }
    let length = pair.record.len();
    let mut kinds = [[0; 2]; 2];
    for (side, bytes) in &record {
        if bytes[0] != TYPE_DATA {
            kinds[1 - side][usize::from(bytes[0] == TYPE_RESPONSE)] += 1;
            pair.deliver(1 - side, stranger, bytes.clone());
        }
    }
    assert_eq!(pair.record.len(), length, "not a byte in reply");
    for side in [OLD, NEW] {
        let at = &pair.sides[side];
        assert_eq!(at.drops(DropReason::HandshakeReplay), kinds[side][0]);
        assert_eq!(at.drops(DropReason::HandshakeUnexpected), kinds[side][1]);
    }
    pair.assert_carries();
}

#[test]
fn a_replay_to_a_restarted_side_moves_nothing() {
    // The new run knows no timestamp. It responds, but does not move the endpoint without a proof.
    let mut pair = Pair::up(16);
    let from = usize::from(pair.sent(OLD, TYPE_INITIATION) == 0);
    let captured = pair.last(from, TYPE_INITIATION);
    let victim = 1 - from;
    pair.kill(victim);
    pair.sides[victim].config.endpoint = None;
    pair.sides[victim].installs = 0;
    pair.start(victim);
    let stranger = "203.0.113.9:1".parse().unwrap();
    pair.deliver(victim, stranger, captured.clone());
    pair.deliver(victim, stranger, captured);
    let at = &pair.sides[victim];
    assert_eq!(at.installs, 1);
    assert_eq!(at.drops(DropReason::HandshakeReplay), 1);
    assert!(at.send_on.is_none() && at.endpoint.is_none());
    assert_eq!(at.tunnel().endpoint(), None);
    // The real peer still comes through.
    pair.run_until_agreed(secs(30));
    assert_eq!(pair.sides[victim].endpoint.unwrap().remote, addr(from));
    pair.assert_carries();
}

// Crossing, loss, order.

#[test]
fn crossed_initiations_end_in_the_old_servers_session() {
    let mut pair = Pair::new(17);
    pair.start(OLD);
    pair.start(NEW);
    pair.run(millis(30));
    assert_eq!(pair.sent(OLD, TYPE_INITIATION), 1);
    assert_eq!(pair.sent(NEW, TYPE_INITIATION), 1, "they crossed");
    assert_eq!((pair.sides[OLD].installs, pair.sides[NEW].installs), (1, 1));
    pair.run(secs(1));
    pair.assert_agreed();
    assert_eq!(
        pair.sides[OLD].send_on.as_ref().unwrap().initiator(),
        Role::Old
    );
    pair.assert_carries();
    pair.assert_no_drops();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever the network does, once it behaves again both sides send on one session within
    /// seconds.
    #[test]
    fn any_schedule_converges(
        seed in any::<u32>(), loss in 0u64..400, duplicate in 0u64..300,
        delay in 1u64..400, jitter in 0u64..800,
        actions in proptest::collection::vec((0usize..6, 0usize..2, 1u64..9_000), 1..12),
    ) {
        let mut pair = Pair::new(u64::from(seed));
        pair.link = Link {
            delay: millis(delay), jitter: millis(jitter), loss, duplicate, cut: false, mtu: 1400,
        };
        pair.start(NEW);
        pair.start(OLD);
        for (action, side, wait) in actions {
            match action {
                0 => pair.restart(side),
                1 => {
                    pair.sides[side].wall_offset -= YEAR / 4;
                    pair.restart(side);
                }
                2 => pair.sides[side].wall_offset += YEAR / 2,
                3 => {
                    let now = pair.now;
                    pair.sides[side].tunnel.as_mut().unwrap().forced = true;
                    pair.sides[side].tunnel.as_mut().unwrap().next_attempt = now;
                }
                4 => pair.link.cut = !pair.link.cut,
                _ => {
                    pair.send_data(side);
                }
            }
            pair.run(millis(wait));
        }
        pair.link = Link {
            delay: millis(20), jitter: millis(0), loss: 0, duplicate: 0, cut: false, mtu: 1400,
        };
        pair.run(secs(40));
        prop_assert!(pair.agreed(), "{}", pair.drops());
        pair.assert_carries();
        // Authentic, undamaged datagrams never fail to authenticate.
        for side in &pair.sides {
            prop_assert_eq!(side.drops(DropReason::OpenAuth), 0);
            prop_assert_eq!(side.drops(DropReason::HandshakeAuth), 0);
            prop_assert_eq!(side.drops(DropReason::WireMalformed), 0);
            let once = side.got.iter().collect::<HashSet<_>>();
            prop_assert_eq!(once.len(), side.got.len(), "a packet was delivered twice");
        }
    }

    /// Two sessions compare the same way from both ends, and the comparison has no ties and no
    /// cycles among sessions that one pair of runs can make.
    #[test]
    fn both_ends_prefer_the_same_session(
        schedule in proptest::collection::vec(any::<(bool, bool)>(), 3..10),
    ) {
        let (mut clock, mut known) = (0, [0u64; 2]);
        let mut last = [0u64; 2];
        let mut origins = Vec::new();
        for (by_new, heard) in schedule {
            let side = usize::from(by_new);
            if heard {
                known[side] = last[1 - side];
            }
            clock += 10;
            last[side] = clock;
            origins.push(Origin { initiator: role(side), timestamp: clock, seen: known[side] });
        }
        for (i, a) in origins.iter().enumerate() {
            for (j, b) in origins.iter().enumerate() {
                prop_assert_eq!(a.supersedes(b), i != j && !b.supersedes(a));
                for c in &origins {
                    if a.supersedes(b) && b.supersedes(c) {
                        prop_assert!(a.supersedes(c));
                    }
                }
            }
        }
    }
}

#[test]
fn a_long_path_still_gets_its_response() {
    let mut pair = Pair::new(18);
    pair.link.delay = millis(1_500);
    pair.start(OLD);
    pair.start(NEW);
    pair.run_until_agreed(secs(15));
    pair.run(secs(60));
    pair.assert_agreed();
}

#[test]
fn a_lost_confirmation_is_repeated_quickly() {
    let mut pair = Pair::new(37);
    pair.sides[NEW].config.endpoint = None;
    pair.start(NEW);
    pair.start(OLD);
    pair.run(millis(25));
    pair.link.cut = true;
    pair.run(millis(315));
    assert!(pair.sides[OLD].send_on.is_some() && pair.sides[NEW].send_on.is_none());
    pair.link.cut = false;
    let took = pair.run_until_agreed(secs(2));
    assert!(took <= millis(250) + millis(40), "{took:?}");
    // Once it was heard, it stops.
    pair.run(secs(1));
    let before = pair.record.len();
    pair.run(secs(3));
    assert_eq!(pair.record.len(), before);
}

#[test]
fn a_session_that_the_peer_forgot_before_it_was_used_is_asked_for_again() {
    let mut pair = Pair::new(38);
    pair.sides[NEW].config.endpoint = None;
    pair.start(NEW);
    pair.start(OLD);
    pair.run(millis(25));
    pair.restart(NEW);
    let took = pair.run_until_agreed(secs(20));
    assert!(took >= secs(4) && took <= secs(6), "{took:?}");
}

// Time.

#[test]
fn rekeying_under_load_loses_nothing() {
    let mut pair = Pair::new(19);
    for side in &mut pair.sides {
        side.config.timers = Timers::with_rekey_after(secs(1));
    }
    pair.link.jitter = millis(30);
    pair.start(OLD);
    pair.start(NEW);
    pair.run_until_agreed(secs(3));
    let mut sent: [Vec<u64>; 2] = Default::default();
    for _ in 0..6_000 {
        for (side, sent) in sent.iter_mut().enumerate() {
            sent.push(pair.send_data(side).expect("never without a session"));
        }
        pair.run(millis(10));
    }
    pair.run(secs(1));
    for side in [OLD, NEW] {
        let mut got = pair.sides[side].got.clone();
        got.sort_unstable();
        assert_eq!(got, sent[1 - side], "{}", pair.drops());
        assert!(
            pair.sides[side].installs >= 50,
            "{}",
            pair.sides[side].installs
        );
        assert_eq!(pair.sides[side].states, [State::Up]);
    }
    pair.assert_no_drops();
}

#[test]
fn the_initiator_rekeys_by_time_and_the_responder_in_its_place() {
    let mut pair = Pair::new(20);
    pair.sides[NEW].config.endpoint = None;
    pair.start(NEW);
    pair.start(OLD);
    pair.run(secs(2));
    let first = Arc::clone(pair.sides[OLD].send_on.as_ref().unwrap());
    let initiator = usize::from(!first.is_initiator());
    pair.run(secs(117));
    assert_eq!(
        pair.sides[OLD].send_on.as_ref().unwrap().index(),
        first.index()
    );
    let sent = pair.sent(1 - initiator, TYPE_INITIATION);
    pair.run(secs(3));
    let second = Arc::clone(pair.sides[OLD].send_on.as_ref().unwrap());
    assert_ne!(second.index(), first.index());
    assert_eq!(second.initiator(), first.initiator());
    assert_eq!(
        pair.sent(1 - initiator, TYPE_INITIATION),
        sent,
        "one side only"
    );
    // The old session still receives until it expires, and then is gone on both sides.
    assert_eq!(pair.sides[OLD].table.len(), 2);
    pair.run(secs(62));
    assert_eq!(pair.sides[OLD].table.len(), 1);
    assert_eq!(pair.sides[NEW].table.len(), 1);
    assert!(first.sealer(0).unwrap().reserve(1).is_none(), "hard expiry");
    // The initiator is held up, so the responder asks.
    pair.sides[initiator].config.timers.rekey_after = secs(10_000);
    pair.sides[initiator]
        .tunnel
        .as_mut()
        .unwrap()
        .config
        .timers
        .rekey_after = secs(10_000);
    pair.run(secs(100));
    let third = pair.sides[OLD].send_on.as_ref().unwrap();
    assert_ne!(third.initiator(), first.initiator());
    pair.assert_no_drops();
}

#[test]
fn rekeying_by_count() {
    let mut pair = Pair::up(21);
    let first = Arc::clone(pair.sides[OLD].send_on.as_ref().unwrap());
    assert_eq!(first.cipher(), Cipher::Aes256Gcm);
    let sealer = first.sealer(1).unwrap();
    while first.messages() < first.cipher().rekey_after() {
        sealer.reserve(1 << 27).unwrap();
    }
    pair.run(secs(6));
    assert_ne!(
        pair.sides[OLD].send_on.as_ref().unwrap().index(),
        first.index()
    );
    pair.assert_agreed();
    pair.assert_no_drops();
}

#[test]
fn a_session_ends_after_180_seconds_whatever_happens() {
    let mut pair = Pair::up(22);
    pair.link.cut = true;
    pair.run(secs(175));
    assert!(pair.send_data(OLD).is_some());
    pair.run(secs(6));
    for side in &pair.sides {
        assert!(side.send_on.is_none() && side.table.is_empty());
        assert_eq!(side.states, [State::Up, State::Down]);
        assert!(
            side.config.indexes.len() <= MAX_PENDING,
            "indexes are free again"
        );
    }
    assert!(pair.send_data(OLD).is_none());
    pair.link.cut = false;
    pair.run_until_agreed(secs(8));
    pair.assert_carries();
}

#[test]
fn late_datagrams_of_an_expired_session_are_counted() {
    let mut pair = Pair::up(23);
    let session = Arc::clone(pair.sides[NEW].send_on.as_ref().unwrap());
    pair.send_data(OLD).unwrap();
    let mut datagram = pair.last(OLD, TYPE_DATA);
    pair.flying.clear();
    pair.link.cut = true;
    pair.run(secs(190));
    pair.link.cut = false;
    pair.deliver(NEW, addr(OLD), datagram.clone());
    assert_eq!(pair.sides[NEW].drops(DropReason::SessionUnknown), 1);
    // A lane that still holds the session cannot open it either.
    let data = Data::parse(&datagram).unwrap();
    assert_eq!(
        session.open(data, &mut datagram),
        Err(DropReason::SessionExpired)
    );
}

#[test]
fn silence_is_noticed_and_ends() {
    let mut pair = Pair::up(24);
    pair.run(secs(60));
    assert_eq!(pair.sides[OLD].states, [State::Up], "quiet but there");
    let tried = pair.sent(OLD, TYPE_INITIATION);
    pair.link.cut = true;
    pair.run(secs(12));
    assert_eq!(pair.sent(OLD, TYPE_INITIATION), tried, "patience");
    pair.run(secs(18));
    for side in &pair.sides {
        assert_eq!(side.states, [State::Up, State::Down]);
        assert!(side.send_on.is_some(), "it may come back");
    }
    assert!(pair.sent(OLD, TYPE_INITIATION) > tried);
    pair.run(secs(30));
    pair.link.cut = false;
    let took = pair.run_until_agreed(secs(7));
    assert!(took <= secs(7), "{took:?}");
    pair.run(secs(1));
    assert_eq!(pair.sides[OLD].states, [State::Up, State::Down, State::Up]);
    pair.assert_carries();
}

#[test]
fn keepalives_flow_when_nothing_else_does() {
    let mut pair = Pair::new(25);
    for side in &mut pair.sides {
        side.config.timers.ping = secs(100_000);
        side.config.max_datagram = None;
    }
    pair.start(OLD);
    pair.start(NEW);
    pair.run(secs(3));
    let before = pair.record.len();
    pair.run(secs(100));
    let sent = pair.record.len() - before;
    assert!(
        (18..=22).contains(&sent),
        "one each way in ten seconds: {sent}"
    );
    assert_eq!(pair.sides[OLD].states, [State::Up]);
}

// What is not answered.

#[test]
fn each_side_hears_what_the_other_sees_also_after_a_restart() {
    let trouble = |port| Trouble {
        asked: Asked {
            addr: "192.0.2.5".parse().unwrap(),
            protocol: 6,
            port,
        },
        verdict: Verdict::Silent,
        cause: "nothing_listens".into(),
        why: "nothing listens".into(),
        age: Duration::from_secs(4),
    };
    for side in [OLD, NEW] {
        let mut pair = Pair::up(31);
        let tell = |pair: &mut Pair, troubles: &[Trouble]| {
            let now = pair.now;
            pair.sides[side].tunnel.as_mut().unwrap().set_news(
                now,
                &News {
                    troubles: troubles.to_vec(),
                    views: Vec::new(),
                },
            );
            pair.drain(side);
        };
        let seen = |pair: &Pair| pair.sides[1 - side].seen.clone();
        tell(&mut pair, &[trouble(80)]);
        pair.run(millis(500));
        assert_eq!(seen(&pair), [trouble(80)], "at once");
        pair.restart(1 - side);
        pair.sides[1 - side].seen.clear();
        pair.run(secs(8));
        assert_eq!(seen(&pair), [trouble(80)], "another run is told, too");
        tell(&mut pair, &[]);
        pair.run(secs(8));
        assert_eq!(seen(&pair), []);
    }
}

// How far moves have come.

fn tell_progress(pair: &mut Pair, all: &[(MoveName, Progress)]) {
    let now = pair.now;
    let new = pair.sides[NEW].tunnel.as_mut().unwrap();
    new.set_progress(now, all);
    pair.drain(NEW);
}

fn with_listens(listens: Listens) -> Progress {
    Progress {
        listens,
        live: 1,
        by_tunnel: 2,
        directly: 3,
    }
}

fn named(count: u8) -> Vec<MoveName> {
    let name = |host| MoveName::of(&format!("192.0.2.{host}:80/tcp").parse().unwrap());
    (0..count).map(|at| name(at + 1)).collect()
}

#[test]
fn the_new_side_knows_the_modes_also_after_a_restart() {
    let mut pair = Pair::up(43);
    let said = |pair: &mut Pair| std::mem::take(&mut pair.sides[NEW].modes);
    let (now, here) = (pair.now, Told::Percent(0));
    let all: Vec<_> = named(2).into_iter().map(|name| (name, here)).collect();
    let old = pair.sides[OLD].tunnel.as_mut().unwrap();
    old.set_modes(now, &all);
    pair.drain(OLD);
    pair.run(millis(100));
    assert_eq!(
        said(&mut pair),
        [PeerModes::All(here)],
        "within a round trip"
    );
    pair.restart(NEW);
    pair.run(secs(8));
    assert!(said(&mut pair).contains(&PeerModes::All(here)));
}

#[test]
fn what_the_old_side_asks_is_told_if_both_are_there() {
    let mut pair = Pair::up(42);
    let asked = |port| Asked {
        addr: "192.0.2.5".parse().unwrap(),
        protocol: 6,
        port,
    };
    let now = pair.now;
    let old = pair.sides[OLD].tunnel.as_mut().unwrap();
    old.ask(now, &[asked(80), asked(443)]);
    pair.drain(OLD);
    pair.run(millis(100));
    assert_eq!(pair.sides[NEW].asks, [[asked(80), asked(443)]]);
    let told = vec![(asked(80), Found::Yes), (asked(443), Found::No)];
    let now = pair.now;
    let new = pair.sides[NEW].tunnel.as_mut().unwrap();
    new.tell(now, &told);
    pair.drain(NEW);
    pair.run(millis(100));
    assert_eq!(pair.sides[OLD].told, [told]);
}

#[test]
fn the_old_side_hears_how_far_moves_have_come_within_a_round_trip() {
    let mut pair = Pair::up(41);
    let [one, other]: [MoveName; 2] = named(2).try_into().unwrap();
    let all = |listens| {
        [
            (one, with_listens(listens)),
            (other, with_listens(Listens::No)),
        ]
    };
    tell_progress(&mut pair, &all(Listens::No));
    pair.run(millis(900));
    pair.sides[OLD].progress.clear();
    tell_progress(&mut pair, &all(Listens::Yes));
    pair.run(millis(100));
    let heard = std::mem::take(&mut pair.sides[OLD].progress);
    let run = heard[0].0;
    assert_eq!(heard.len(), 1, "{heard:?}");
    assert_eq!(
        heard[0].1[0],
        (one, with_listens(Listens::Yes)),
        "what changed comes first"
    );
    // Another run of the old side knows nothing, and is told all of it.
    pair.restart(OLD);
    pair.sides[OLD].progress.clear();
    pair.run(secs(8));
    let heard: BTreeMap<MoveName, Progress> = std::mem::take(&mut pair.sides[OLD].progress)
        .into_iter()
        .flat_map(|(_, some)| some)
        .collect();
    assert_eq!(heard, all(Listens::Yes).into_iter().collect());
    // Another run of the new side counts anew, and says so.
    pair.restart(NEW);
    pair.run(secs(8));
    assert_eq!(pair.sides[OLD].progress, [], "it has not looked yet");
    tell_progress(&mut pair, &all(Listens::No));
    pair.run(millis(100));
    assert_ne!(pair.sides[OLD].progress[0].0, run);
    pair.assert_no_drops();
}

#[test]
fn progress_that_is_lost_is_told_again_and_that_of_many_moves_comes_in_turn() {
    let mut pair = Pair::up(42);
    let names = named(200);
    let all: Vec<(MoveName, Progress)> = names
        .iter()
        .map(|&name| (name, with_listens(Listens::Yes)))
        .collect();
    pair.link.cut = true;
    for _ in 0..20 {
        tell_progress(&mut pair, &all);
        pair.run(millis(500));
    }
    assert_eq!(pair.sides[OLD].progress, []);
    pair.link.cut = false;
    let before = pair.record.len();
    // Nothing is news any more.
    pair.run(secs(15));
    let heard: BTreeMap<MoveName, Progress> = std::mem::take(&mut pair.sides[OLD].progress)
        .into_iter()
        .flat_map(|(_, some)| some)
        .collect();
    assert_eq!(heard.len(), names.len());
    let sent = pair.record[before..]
        .iter()
        .filter(|(side, _)| *side == NEW);
    assert!(sent.count() < 60, "it costs a few datagrams each ping");
    // A side without moves of the other has nothing to say.
    let mut pair = Pair::up(43);
    tell_progress(&mut pair, &[]);
    pair.run(secs(20));
    assert_eq!(pair.sides[OLD].progress, []);
}

// Restarts and clocks.

#[test]
fn a_restarted_side_is_back_at_once() {
    for side in [OLD, NEW] {
        let mut pair = Pair::up(26);
        for _ in 0..5 {
            pair.run(millis(700));
            pair.restart(side);
            let took = pair.run_until_agreed(secs(5));
            assert!(took <= millis(100), "{took:?}");
            pair.assert_carries();
        }
        pair.run(secs(300));
        pair.assert_agreed();
    }
}

#[test]
fn a_clean_shutdown_is_seen_at_once() {
    let mut pair = Pair::up(27);
    let now = pair.now;
    pair.sides[OLD].tunnel.as_mut().unwrap().close(now);
    pair.drain(OLD);
    assert!(pair.sides[OLD].table.is_empty() && pair.sides[OLD].send_on.is_none());
    pair.run(millis(100));
    assert_eq!(pair.sides[NEW].states, [State::Up, State::Down]);
    assert!(pair.sides[NEW].tunnel().stopped().is_some());
    assert!(pair.sides[NEW].send_on.is_none() && pair.sides[NEW].table.is_empty());
    let tried = pair.sent(NEW, TYPE_INITIATION);
    pair.run(secs(60));
    let tried = pair.sent(NEW, TYPE_INITIATION) - tried;
    assert!((7..=12).contains(&tried), "slowly: {tried}");
    assert!(pair.sides[OLD].drops(DropReason::HandshakeUnexpected) > 0);
    pair.restart(OLD);
    assert!(pair.run_until_agreed(secs(2)) <= millis(100));
    assert_eq!(pair.sides[NEW].tunnel().stopped(), None);
    // One that crashes says nothing.
    pair.kill(OLD);
    pair.run(secs(60));
    assert_eq!(pair.sides[NEW].tunnel().state(), State::Down);
    assert_eq!(pair.sides[NEW].tunnel().stopped(), None);
}

#[test]
fn a_clock_set_back_locks_nobody_out() {
    for side in [OLD, NEW] {
        for other_knows_endpoint in [true, false] {
            let mut pair = Pair::new(28);
            if !other_knows_endpoint {
                // Then it has learned the endpoint from the session before the restart.
                pair.sides[1 - side].config.endpoint = None;
            }
            pair.start(OLD);
            pair.start(NEW);
            pair.run(secs(5));
            pair.assert_agreed();
            pair.kill(side);
            pair.sides[side].wall_offset = -YEAR;
            pair.run(secs(2));
            pair.start(side);
            let took = pair.run_until_agreed(secs(5));
            assert!(took <= millis(200), "{took:?}");
            assert!(pair.sides[1 - side].drops(DropReason::HandshakeReplay) >= 1);
            pair.assert_carries();
            // From now on it exceeds the timestamp that the other had seen.
            let before = pair.sides[1 - side].drops(DropReason::HandshakeReplay);
            pair.run(secs(400));
            pair.assert_agreed();
            // It also does so when it is the one to ask.
            let now = pair.now;
            let tunnel = pair.sides[side].tunnel.as_mut().unwrap();
            (tunnel.forced, tunnel.next_attempt) = (true, now);
            pair.run(secs(1));
            let session = pair.sides[1 - side].send_on.as_ref().unwrap();
            assert_eq!(session.initiator(), role(side));
            assert!(session.created() >= now);
            assert_eq!(
                pair.sides[1 - side].drops(DropReason::HandshakeReplay),
                before
            );
        }
    }
}

#[test]
fn a_clock_that_steps_while_running_changes_nothing() {
    let mut pair = Pair::up(29);
    for (side, step) in [
        (OLD, -YEAR),
        (NEW, -2 * YEAR),
        (OLD, 3 * YEAR),
        (NEW, 5 * YEAR),
        (OLD, 0),
        (NEW, 0),
    ] {
        pair.sides[side].wall_offset = step;
        pair.run(secs(150));
        pair.assert_agreed();
    }
    pair.assert_no_drops();
    assert_eq!(pair.sides[OLD].states, [State::Up]);
    // A restart after the clock stepped forward and back again.
    for side in [OLD, NEW] {
        pair.restart(side);
        assert!(pair.run_until_agreed(secs(5)) <= millis(200));
    }
}

#[test]
fn stale_messages_make_us_talk_only_now_and_then_and_only_to_the_peer() {
    let mut pair = Pair::up(30);
    // Messages of an earlier run of the peer: authentic, and this run cannot see that they are
    // stale.
    let side = usize::from(pair.sent(OLD, TYPE_INITIATION) == 0);
    let captured = pair.last(side, TYPE_INITIATION);
    pair.restart(side);
    pair.run(secs(20));
    let victim = 1 - side;
    let stranger: SocketAddr = "203.0.113.9:1".parse().unwrap();
    let initiations = pair.sent(victim, TYPE_INITIATION);
    let replays = pair.sides[victim].drops(DropReason::HandshakeReplay);
    for _ in 0..100 {
        // An attacker with more recordings than the MAC check remembers.
        let keys = pair.sides[victim].config.keys.clone();
        pair.sides[victim].mac_check = MacCheck::new(role(victim), [keys]);
        pair.deliver(victim, stranger, captured.clone());
        pair.run(millis(100));
        assert!(pair.flying.iter().all(|flying| flying.to != stranger));
    }
    assert_eq!(
        pair.sides[victim].drops(DropReason::HandshakeReplay),
        replays + 100
    );
    let initiations = pair.sent(victim, TYPE_INITIATION) - initiations;
    assert!(
        (1..=2).contains(&initiations),
        "in ten seconds: {initiations}"
    );
    pair.assert_agreed();
    pair.assert_carries();
}

// Checks.

/// What `ipmoved check` sends at such a time on that side.
fn check(pair: &Pair, side: usize, timestamp: u64) -> Vec<u8> {
    let config = &pair.sides[side].config;
    let payload = InitiationPayload {
        timestamp,
        seen: 0,
        run: 77,
        offer: config.offer,
        checks: true,
        lanes: 1,
        question: None,
    };
    let entropy = Entropy::seeded(timestamp);
    let index = SessionIndexes::default().draw(&entropy).unwrap();
    let begun = Initiating::begin(&config.keys, role(side), index, &payload, &entropy);
    begun.unwrap().1.to_vec()
}

#[test]
fn a_check_leaves_nothing_and_with_a_clock_that_is_ahead_shuts_nobody_out() {
    let mut pair = Pair::new(32);
    // It does not know where the old server is, so that it can tell it nothing.
    pair.sides[NEW].config.endpoint = None;
    pair.start(NEW);
    let checker: SocketAddr = "192.0.2.1:40000".parse().unwrap();
    let answers = |pair: &Pair| pair.flying.iter().filter(|it| it.to == checker).count();
    let wall = pair
        .wall(OLD)
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap();
    let right = wall.as_nanos() as u64;
    let ahead = right + secs(YEAR as u64).as_nanos() as u64;
    let checks = [ahead, right, ahead + 1].map(|at| check(&pair, OLD, at));
    for (sent, bytes) in (1..).zip(&checks) {
        pair.deliver(NEW, checker, bytes.clone());
        assert_eq!(answers(&pair), sent, "each is answered");
    }
    let at = &pair.sides[NEW];
    assert!(at.table.is_empty() && at.warnings.is_empty() && at.states.is_empty());
    assert_eq!((at.endpoint, at.installs), (None, 0));
    // Played back, where the check of the mac has forgotten them.
    let keys = pair.sides[NEW].config.keys.clone();
    pair.sides[NEW].mac_check = MacCheck::new(Role::New, [keys]);
    for bytes in checks {
        pair.deliver(NEW, checker, bytes);
    }
    assert_eq!(answers(&pair), 3, "none is answered twice");
    assert_eq!(pair.sides[NEW].drops(DropReason::HandshakeReplay), 3);
    // The daemon of that server has the right clock.
    pair.start(OLD);
    assert!(pair.run_until_agreed(secs(5)) <= millis(200));
    assert_eq!(pair.sides[NEW].installs, 1);
    // A daemon that takes over is another run: it answers one once more, and nothing comes of it.
    let recorded = check(&pair, OLD, ahead);
    pair.take_over(NEW);
    let (sent, installs) = (answers(&pair), pair.sides[NEW].installs);
    for _ in 0..2 {
        let keys = pair.sides[NEW].config.keys.clone();
        pair.sides[NEW].mac_check = MacCheck::new(Role::New, [keys]);
        pair.deliver(NEW, checker, recorded.clone());
    }
    assert_eq!(answers(&pair), sent + 1);
    assert_eq!(pair.sides[NEW].installs, installs);
    let id = pair.send_data(OLD).unwrap();
    pair.run(millis(50));
    assert!(pair.sides[NEW].got.contains(&id));
}

#[test]
fn checks_that_are_played_back_take_no_answer_of_the_peer() {
    let mut pair = Pair::new(33);
    pair.sides[NEW].config.endpoint = None;
    pair.start(NEW);
    let stranger: SocketAddr = "203.0.113.9:1".parse().unwrap();
    // Recorded while an earlier run lived.
    for at in 1..200 {
        let recorded = check(&pair, OLD, at);
        let keys = pair.sides[NEW].config.keys.clone();
        pair.sides[NEW].mac_check = MacCheck::new(Role::New, [keys]);
        pair.deliver(NEW, stranger, recorded);
    }
    assert!(pair.sides[NEW].drops(DropReason::HandshakeLimited) > 0);
    pair.start(OLD);
    assert!(pair.run_until_agreed(secs(5)) <= millis(200));
}

// Endpoints.

#[test]
fn the_endpoint_follows_the_last_authenticated_packet() {
    let mut pair = Pair::up(31);
    pair.sides[OLD].addr = "203.0.113.77:4000".parse().unwrap();
    let sent = pair.record.len();
    let id = pair.send_data(OLD).unwrap();
    let (_, data) = pair.record[sent].clone();
    pair.run(millis(50));
    assert!(pair.sides[NEW].got.contains(&id));
    assert_eq!(
        pair.sides[NEW].endpoint.unwrap().remote,
        pair.sides[OLD].addr
    );
    pair.assert_carries();
    // A replay of it from elsewhere does not take the endpoint away.
    pair.deliver(NEW, "203.0.113.9:1".parse().unwrap(), data);
    assert_eq!(
        pair.sides[NEW].endpoint.unwrap().remote,
        pair.sides[OLD].addr
    );
    assert_eq!(pair.sides[NEW].drops(DropReason::Replay), 1);
    // Nor does a late one from where the peer was.
    let late = pair.record.len();
    pair.link.cut = true;
    pair.send_data(OLD).unwrap();
    let (_, overtaken) = pair.record[late].clone();
    pair.link.cut = false;
    pair.send_data(OLD).unwrap();
    pair.send_data(OLD).unwrap();
    pair.run(millis(50));
    pair.deliver(NEW, addr(OLD), overtaken);
    assert_eq!(
        pair.sides[NEW].endpoint.unwrap().remote,
        pair.sides[OLD].addr
    );
    pair.run(secs(200));
    pair.assert_agreed();
}

#[test]
fn the_reply_leaves_from_the_address_it_was_sent_to() {
    let pair = Pair::up(32);
    for side in [OLD, NEW] {
        let endpoint = pair.sides[side].tunnel().endpoint().unwrap();
        assert_eq!(endpoint.local, Some(addr(side).ip()));
    }
}

#[test]
fn a_name_that_resolves_anew_is_tried() {
    let mut pair = Pair::up(33);
    // The new server moves, and is restarted there without an address to call.
    pair.kill(NEW);
    pair.sides[NEW].addr = "203.0.113.50:51820".parse().unwrap();
    pair.sides[NEW].config.endpoint = None;
    pair.start(NEW);
    pair.run(secs(40));
    assert!(!pair.agreed());
    let (now, there) = (pair.now, pair.sides[NEW].addr);
    pair.sides[OLD]
        .tunnel
        .as_mut()
        .unwrap()
        .set_endpoint(now, Some(there));
    let took = pair.run_until_agreed(secs(5));
    assert!(took <= secs(2), "{took:?}");
    pair.assert_carries();
}

// Path MTU.

/// A side that sends big packets hears nothing but the replies to its pings, and those within the
/// millisecond: a transfer that is stuck, to a peer nearby.
#[test]
fn a_path_that_narrows_is_noticed_in_time_though_only_replies_are_heard() {
    for step in 0..40 {
        let mut pair = Pair::up(step);
        pair.link.delay = Duration::from_micros(150);
        pair.run(secs(1) + Duration::from_micros(25_025 * step));
        assert_eq!(pair.sides[NEW].tunnel().path_mtu(), 1472);
        pair.link.mtu = 1_300;
        let narrowed = pair.now;
        while pair.sides[NEW].tunnel().path_mtu() == 1472 {
            pair.send_data(NEW);
            pair.run(millis(50));
            let took = pair.now - narrowed;
            assert!(took < secs(2), "{took:?} and more, at {step}");
        }
    }
}

/// Pings and replies are lost as well: after one silence it asks again.
#[test]
fn a_path_that_narrows_and_loses_datagrams_is_noticed_as_soon() {
    let mut took: Vec<Duration> = (0..101)
        .map(|seed| {
            let mut pair = Pair::up(seed);
            assert_eq!(pair.sides[NEW].tunnel().path_mtu(), 1472);
            (pair.link.mtu, pair.link.loss) = (1_300, 250);
            let narrowed = pair.now;
            while pair.sides[NEW].tunnel().path_mtu() == 1472 {
                pair.send_data(NEW);
                pair.run(millis(50));
                assert!(pair.now < narrowed + secs(60), "never, with {seed}");
            }
            pair.now - narrowed
        })
        .collect();
    took.sort_unstable();
    assert!(took[50] < secs(2), "{took:?}");
    assert!(took[100] < secs(6), "{took:?}");
}

#[test]
fn the_path_mtu_is_found_and_followed_in_both_directions() {
    let mut pair = Pair::up(34);
    pair.run(secs(1));
    for side in &pair.sides {
        assert_eq!(side.tunnel().path_mtu(), 1472, "the first guess");
        assert_eq!(side.path_mtus, [1472]);
    }
    // The path narrows silently: the tunnel notices, searches and settles.
    pair.link.mtu = 1330;
    pair.run(secs(60));
    for side in &pair.sides {
        let found = usize::from(side.tunnel().path_mtu());
        assert!((1322..=1330).contains(&found), "{:?}", side.path_mtus);
        assert_eq!(side.path_mtus[1], pmtu::BASE, "safe in the meantime");
        assert_eq!(side.states, [State::Up]);
    }
    // The path widens again: the next search for a larger size finds it.
    pair.link.mtu = 1472;
    pair.run(secs(700));
    for side in &pair.sides {
        assert_eq!(side.tunnel().path_mtu(), 1472);
    }
    pair.assert_no_drops();
}

/// The kernel of one side learns from an ICMP error what the path takes, be it true or not.
fn hint(pair: &mut Pair, side: usize, size: u16) {
    let now = pair.now;
    let tunnel = pair.sides[side].tunnel.as_mut().unwrap();
    tunnel.set_mtu_hint(now, Some(size));
}

#[test]
fn a_forged_icmp_error_is_refuted_within_a_round_trip() {
    for side in [OLD, NEW] {
        let mut pair = Pair::up(37);
        pair.run(secs(1));
        hint(&mut pair, side, 548);
        pair.run(2 * pair.link.delay + millis(1));
        let once = pmtu::Hints {
            asked: 1,
            refuted: 1,
        };
        assert_eq!(pair.sides[side].tunnel().mtu_hints(), once);
        pair.run(secs(60));
        assert_eq!(pair.sides[side].path_mtus, [1472]);
        pair.assert_no_drops();
    }
}

/// Nothing is carried, so that without the error it would take five seconds more.
#[test]
fn a_path_that_narrows_is_followed_within_a_second_of_the_routers_word() {
    for (mtu, within) in [(1_272, secs(1)), (848, secs(2))] {
        let mut pair = Pair::up(38);
        pair.run(secs(1));
        pair.link.mtu = usize::from(mtu);
        hint(&mut pair, NEW, mtu);
        pair.run(within);
        assert_eq!(pair.sides[NEW].tunnel().path_mtu(), mtu);
        assert_eq!(pair.sides[NEW].tunnel().mtu_hints().refuted, 0);
        assert_eq!(pair.sides[NEW].states, [State::Up]);
    }
}

/// A peer that is away does not confirm anything, and what a stranger says then counts no more.
#[test]
fn a_forged_icmp_error_while_the_peer_is_away_lowers_nothing() {
    let mut pair = Pair::up(39);
    pair.run(secs(1));
    pair.link.cut = true;
    hint(&mut pair, OLD, 548);
    pair.run(secs(100));
    pair.link.cut = false;
    pair.run_until_agreed(secs(8));
    pair.run(secs(20));
    assert_eq!(pair.sides[OLD].path_mtus, [1472]);
}

#[test]
fn probes_are_padded_to_their_size_and_marked() {
    let mut pair = Pair::new(35);
    pair.start(OLD);
    pair.start(NEW);
    pair.run(secs(1));
    let largest = pair.record.iter().map(|(_, bytes)| bytes.len()).max();
    assert_eq!(largest, Some(1472));
    // The kernel says at once that it is too big: the next guess follows without waiting.
    pair.restart(OLD);
    pair.run(secs(1));
    let now = pair.now;
    let tunnel = pair.sides[OLD].tunnel.as_mut().unwrap();
    tunnel.set_max_datagram(now, 8_972);
    while let Some(due) = tunnel.next_timeout().filter(|&due| due <= now) {
        tunnel.handle_timeout(due.max(now), SystemTime::UNIX_EPOCH + secs(WALL));
        let mut probes = 0;
        while let Some(transmit) = tunnel.poll_transmit() {
            probes += usize::from(transmit.probe);
            if transmit.probe {
                tunnel.probe_refused(now, transmit.datagram.len());
            }
        }
        assert!(probes <= 1);
    }
    assert_eq!(tunnel.path_mtu(), 1472);
}

#[test]
fn a_peer_that_is_away_says_nothing_about_the_path() {
    let mut pair = Pair::up(36);
    pair.run(secs(1));
    pair.link.cut = true;
    pair.run(secs(100));
    pair.link.cut = false;
    pair.run_until_agreed(secs(8));
    pair.run(secs(20));
    assert_eq!(pair.sides[OLD].path_mtus, [1472]);
    assert_eq!(pair.sides[NEW].path_mtus, [1472]);
}

impl Pair {
    /// Another daemon takes over from the one of that side, which knew nothing of it before.
    fn take_over(&mut self, side: usize) {
        let now = self.now;
        let handed = self.sides[side].tunnel().hand_over(now);
        self.restart(side);
        let tunnel = self.sides[side].tunnel.as_mut().unwrap();
        assert!(tunnel.take_over(now, now, &handed));
        self.drain(side);
        for end in (0..handed.len()).step_by(13) {
            let mut config = self.sides[side].config.clone();
            config.indexes = SessionIndexes::default();
            let mut other = Tunnel::new(config, now).unwrap();
            assert!(!other.take_over(now, now, &handed[..end]), "{end}");
            assert!(other.poll_event().is_none());
        }
    }
}

#[test]
fn a_tunnel_that_is_taken_over_loses_nothing_and_tells_everything_anew() {
    for side in [OLD, NEW] {
        let mut pair = Pair::up(90 + side as u64);
        pair.run(secs(30));
        let mtu = pair.sides[side].tunnel().path_mtu();
        assert!(mtu > pmtu::BASE, "{mtu}");
        for at in 0..2 {
            let (configs, installs) = (
                pair.sides[1 - side].configs.len(),
                pair.sides[side].installs,
            );
            let heard = pair.sides[side].configs.len();
            for of in &mut pair.sides {
                of.got.clear();
                of.states.clear();
            }
            let mut sent = [Vec::new(), Vec::new()];
            for millisecond in 0..500 {
                for side in [OLD, NEW] {
                    sent[side].extend(pair.send_data(side));
                }
                pair.run(millis(1));
                if millisecond == 100 {
                    pair.take_over(side);
                }
                let path_mtu = pair.sides[side].tunnel().path_mtu();
                assert!(path_mtu >= mtu, "{path_mtu}");
            }
            pair.run(secs(1));
            assert_eq!([sent[OLD].len(), sent[NEW].len()], [500; 2], "{at}");
            for (side, sent) in [NEW, OLD].into_iter().zip(&mut sent) {
                pair.sides[side].got.sort_unstable();
                assert_eq!(pair.sides[side].got, *sent);
            }
            let states = &pair.sides[side].states;
            assert!(!states.contains(&State::Down), "{states:?}");
            assert_eq!(pair.sides[1 - side].states, [], "the peer noticed");
            // It has a session of its own by now, and has told what it announces on that.
            assert!(pair.sides[side].installs > installs);
            assert!(pair.sides[side].tunnel().tells());
            assert_eq!(pair.sides[1 - side].configs.len(), configs + 1);
            // Of the peer's it hears twice: as it was left, and anew.
            assert_eq!(pair.sides[side].configs.len(), heard + 2);
            pair.assert_agreed();
        }
    }
}

#[test]
fn a_daemon_that_takes_over_knows_that_its_peer_was_stopped() {
    let mut pair = Pair::up(94);
    let now = pair.now;
    pair.sides[OLD].tunnel.as_mut().unwrap().close(now);
    pair.drain(OLD);
    pair.run(secs(5));
    let stopped = pair.sides[NEW].tunnel().stopped();
    assert!(stopped.is_some());
    pair.take_over(NEW);
    assert_eq!(pair.sides[NEW].tunnel().state(), State::Down);
    assert_eq!(pair.sides[NEW].tunnel().stopped(), stopped);
    pair.restart(OLD);
    pair.run_until_agreed(secs(60));
    assert_eq!(pair.sides[NEW].tunnel().stopped(), None);
}

#[test]
fn a_daemon_that_was_not_taken_over_from_after_all_agrees_anew() {
    let mut pair = Pair::up(95);
    let handed = pair.sides[OLD].tunnel().hand_over(pair.now);
    drop(handed);
    let now = pair.now;
    pair.sides[OLD]
        .tunnel
        .as_mut()
        .unwrap()
        .give_up_sessions(now);
    assert!(pair.sides[OLD].tunnel().session().is_none());
    pair.run(secs(2));
    pair.assert_agreed();
    pair.assert_carries();
}
