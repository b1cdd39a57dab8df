//! The cases of the micro benches: one packet, one super-packet or one flow at a time, through the
//! same public functions that a lane calls.
//!
//! Owns the cases alone. `micro.rs` times them and `instructions.rs` counts them, so both speak of
//! the same work. A case repeats one step. [`Work::prepare`] renews what the steps use up, every
//! [`Case::round`] steps, and is neither timed nor counted.

#![allow(
    clippy::disallowed_methods,
    reason = "a bench is an edge: tables and sessions are made as of now"
)]

use std::hint::black_box;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use etherparse::PacketBuilder;

use ipmoved::internals::{
    ACK, Announcement, Cipher, CipherPolicy, Client, Coalescer, DATA_HEADER_LEN, DATA_OVERHEAD,
    Deliver, Delivery, Destination, DropReason, Endpoint, Event, Flags, FlowTable, FragmentKey,
    GSO_TCPV4, Gate, GateConfig, HeldFragments, Inside, Limit, MAX_PARTS, MacCheck, Message, Move,
    NEEDS_CSUM, Offer, Offload, Outside, Overlaps, Parsed, PeerId, PeerKeys, Psk, Push, RST, Reach,
    Role, Seed, Segments, SendBatch, Session, SessionIndexes, TCP, TCP_RESET, Timers, Translator,
    TranslatorConfig, Tunnel, TunnelConfig, VnetHdr, entropy,
};

/// Work that a bench repeats.
pub(crate) trait Work {
    /// Renews what the next round of steps uses up.
    fn prepare(&mut self) -> Result<()> {
        Ok(())
    }

    /// The measured step. Runs only after [`prepare`](Self::prepare), at most as often as a round
    /// has steps.
    fn step(&mut self);
}

/// One line of the benches.
pub(crate) struct Case {
    /// The form is `what/of what`.
    pub(crate) name: &'static str,
    /// Bytes of IP packet that one step handles, or 0 if that means nothing.
    pub(crate) bytes: u64,
    /// Steps for which one preparation is enough.
    pub(crate) round: u32,
    /// Makes the case.
    pub(crate) build: fn() -> Result<Box<dyn Work>>,
}

/// An IP packet that fits a datagram on a path of 1,500 bytes.
const PACKET: usize = 1_440;
/// A small packet: an ACK with timestamps is not much smaller.
const SMALL: usize = 64;
/// Segments of the super-packet: as many as the kernel makes of 64 KB.
const SEGMENTS: usize = 48;
/// Payload of each of its segments.
const MSS: usize = 1_350;
/// Steps of a round that uses something up: enough to be long against the clock's resolution.
const ROUND: u32 = 4_096;

/// Flows of a table that is full, and steps on it: not so many that they look like a flood.
const FULL: usize = 32_768;
const FULL_ROUND: u32 = 2_048;

const FEW: usize = 1_000;
const MANY: usize = 1_000_000;

type End = (Ipv4Addr, u16);
const CLIENT: End = (Ipv4Addr::new(203, 0, 113, 10), 40_000);
const MOVED: End = (Ipv4Addr::new(192, 0, 2, 5), 80);
const NEW: End = (Ipv4Addr::new(198, 51, 100, 2), 80);

/// Every case.
pub(crate) fn all() -> Vec<Case> {
    let case = |name, bytes: usize, round, build| Case {
        name,
        bytes: bytes as u64,
        round,
        build,
    };
    vec![
        case("seal/1440 aes-256-gcm", PACKET, ROUND, || {
            Seal::build(Cipher::Aes256Gcm, PACKET)
        }),
        case("seal/64 aes-256-gcm", SMALL, ROUND, || {
            Seal::build(Cipher::Aes256Gcm, SMALL)
        }),
        case("seal/1440 chacha20-poly1305", PACKET, ROUND, || {
            Seal::build(Cipher::ChaCha20Poly1305, PACKET)
        }),
        case("seal/1440 aegis-256x4", PACKET, ROUND, || {
            Seal::build(Cipher::Aegis256X4, PACKET)
        }),
        case("open/1440 aes-256-gcm", PACKET, ROUND, || {
            Open::build(Cipher::Aes256Gcm, PACKET)
        }),
        case("open/64 aes-256-gcm", SMALL, ROUND, || {
            Open::build(Cipher::Aes256Gcm, SMALL)
        }),
        case("open/1440 chacha20-poly1305", PACKET, ROUND, || {
            Open::build(Cipher::ChaCha20Poly1305, PACKET)
        }),
        case("open/1440 aegis-256x4", PACKET, ROUND, || {
            Open::build(Cipher::Aegis256X4, PACKET)
        }),
        case("parse/tcp", 0, ROUND, || {
            Ok(Box::new(Parse(tcp(CLIENT, MOVED, 0, &[0; 1_400], true)?)))
        }),
        case("check/captured", 0, ROUND, || Check::build(Way::Captured)),
        case("check/returning", 0, ROUND, || Check::build(Way::Returning)),
        case("check/new clients", 0, ROUND, || Check::build(Way::New)),
        case("check/unasked", 0, ROUND, || Check::build(Way::Unasked)),
        case("fragments/first, 128 wait", 0, ROUND, FirstFragment::build),
        case("rewrite/inbound", 0, ROUND, || Rewrite::build(true)),
        case("rewrite/outbound", 0, ROUND, || Rewrite::build(false)),
        case("segment/48", SEGMENTS * MSS, ROUND, || {
            Ok(Box::new(Segment::new()?))
        }),
        case("segment and seal/48", SEGMENTS * MSS, ROUND, || {
            Ok(Box::new(SegmentAndSeal::new()?))
        }),
        case("coalesce/44", COALESCED * MSS, ROUND, || {
            Ok(Box::new(Coalesce::new()?))
        }),
        case("flow lookup/1 k", 0, ROUND, || Lookup::build(FEW)),
        case("flow lookup/1 M", 0, ROUND, || Lookup::build(MANY)),
        case("flow insert/1 k", 0, ROUND, || Insert::build(FEW)),
        case("flow insert/1 M", 0, ROUND, || Insert::build(MANY)),
        case("flow insert/full, refused", 0, FULL_ROUND, || {
            Full::build(false)
        }),
        case("flow insert/full, displaced", 0, FULL_ROUND, || {
            Full::build(true)
        }),
        case("flow expiry/1 k", 0, ROUND, || Expire::build(FEW)),
        case("flow expiry/1 M", 0, ROUND, || Expire::build(MANY)),
    ]
}

// Sealing and opening.

struct Seal {
    pair: Pair,
    datagram: Vec<u8>,
}

impl Seal {
    fn build(cipher: Cipher, len: usize) -> Result<Box<dyn Work>> {
        Ok(Box::new(Self {
            pair: Pair::with(cipher)?,
            datagram: vec![0; len + DATA_OVERHEAD],
        }))
    }
}

impl Work for Seal {
    fn prepare(&mut self) -> Result<()> {
        seal(&self.pair.from, &mut self.datagram).context("a datagram was not sealed")
    }

    fn step(&mut self) {
        black_box(seal(&self.pair.from, &mut self.datagram));
    }
}

struct Open {
    pair: Pair,
    sealed: Vec<u8>,
    stride: usize,
    at: usize,
}

impl Open {
    fn build(cipher: Cipher, len: usize) -> Result<Box<dyn Work>> {
        let stride = len + DATA_OVERHEAD;
        Ok(Box::new(Self {
            pair: Pair::with(cipher)?,
            sealed: vec![0; stride * ROUND as usize],
            stride,
            at: 0,
        }))
    }
}

impl Work for Open {
    fn prepare(&mut self) -> Result<()> {
        self.at = 0;
        for datagram in self.sealed.chunks_exact_mut(self.stride) {
            seal(&self.pair.from, datagram).context("a datagram was not sealed")?;
        }
        let mut another = vec![0; self.stride];
        seal(&self.pair.from, &mut another).context("a datagram was not sealed")?;
        match open(&self.pair.to, &mut another) {
            Ok(_) => Ok(()),
            Err(reason) => bail!("a datagram was not opened: {}", reason.name()),
        }
    }

    fn step(&mut self) {
        let datagram = &mut self.sealed[self.at..self.at + self.stride];
        self.at += self.stride;
        let _ = black_box(open(&self.pair.to, datagram));
    }
}

fn seal(session: &Session, datagram: &mut [u8]) -> Option<()> {
    let sealer = session.sealer(0)?;
    let counter = sealer.reserve(1)?.next()?;
    sealer.seal(counter, Flags::CSUM_PARTIAL, datagram).ok()
}

fn open(session: &Session, datagram: &mut [u8]) -> Result<usize, DropReason> {
    let Message::Data(data) = Message::parse(datagram)? else {
        return Err(DropReason::WireMalformed);
    };
    let opened = session.open(data, datagram)?;
    Ok(opened.plaintext.len())
}

/// A session as both sides hold it, from a handshake of two tunnels in this process. It ends when
/// either of them goes.
struct Pair {
    from: Arc<Session>,
    to: Arc<Session>,
    _tunnels: [Tunnel; 2],
}

impl Pair {
    fn with(cipher: Cipher) -> Result<Self> {
        let (now, wall) = (Instant::now(), SystemTime::now());
        let keys = PeerKeys::derive(&Psk::generate(&entropy::system())?);
        let addr = |role| -> SocketAddr {
            match role {
                Role::Old => ([192, 0, 2, 1], 51_850).into(),
                Role::New => (NEW.0, 51_850).into(),
            }
        };
        let tunnel = |role: Role| {
            let config = TunnelConfig {
                peer: PeerId(0),
                keys: keys.clone(),
                role,
                lanes: 1,
                offer: Offer::of_this_machine(CipherPolicy::Only(cipher)),
                // One side begins, so that initiations do not cross.
                endpoint: (role == Role::Old).then(|| addr(role.other())),
                announcement: match role {
                    Role::Old => Announcement::Old {
                        moves: vec![],
                        mtu: 1_500,
                        reached: None,
                        outgoing: false,
                    },
                    Role::New => Announcement::New {
                        deliver: Deliver::Keep,
                        mtu: 1_500,
                        error: None,
                    },
                },
                max_datagram: None,
                timers: Timers::default(),
                indexes: SessionIndexes::default(),
                entropy: entropy::system(),
            };
            Tunnel::new(config, now)
        };
        let (mut old, mut new) = (tunnel(Role::Old)?, tunnel(Role::New)?);
        let mac_checks = [Role::Old, Role::New].map(|role| MacCheck::new(role, [keys.clone()]));
        let pass = |from: &mut Tunnel, to: &mut Tunnel| -> Result<()> {
            let sent = from.poll_transmit().context("nothing was sent")?;
            let endpoint = Endpoint {
                remote: addr(from.role()),
                local: None,
            };
            let mac_check = &mac_checks[usize::from(to.role() == Role::New)];
            let Ok(admitted) = mac_check.admit(now, endpoint.remote, &sent.datagram) else {
                bail!("the handshake was not admitted");
            };
            if to.handle_handshake(now, endpoint, &admitted).is_err() {
                bail!("the handshake was not accepted");
            }
            Ok(())
        };
        old.handle_timeout(now, wall);
        pass(&mut old, &mut new)?;
        pass(&mut new, &mut old)?;
        let session = |tunnel: &mut Tunnel| loop {
            match tunnel.poll_event() {
                Some(Event::SessionInstalled(session)) => break Ok(session),
                Some(_) => {}
                None => bail!("the handshake came to no session"),
            }
        };
        Ok(Self {
            from: session(&mut old)?,
            to: session(&mut new)?,
            _tunnels: [old, new],
        })
    }
}

// Packets.

struct Parse(Vec<u8>);

impl Work for Parse {
    fn step(&mut self) {
        let _ = black_box(Parsed::parse(black_box(&self.0)));
    }
}

/// Parses a packet and lets the old server check it.
struct Check {
    gate: Gate,
    packet: Vec<u8>,
    way: Way,
    /// Clients that came so far, if each step's is another.
    clients: u32,
    now: Instant,
}

/// Which packet is checked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// A packet of a client that is known.
    Captured,
    /// A packet to a client that is known.
    Returning,
    /// The first packet of a client, where the table is full of others.
    New,
    /// A packet to nobody who asked for it.
    Unasked,
}

impl Check {
    fn build(way: Way) -> Result<Box<dyn Work>> {
        let start = Instant::now();
        let there = tcp(CLIENT, MOVED, 0, &[0; 1_400], true)?;
        let back = tcp(MOVED, CLIENT, 0, &[0; 1_400], true)?;
        let mut work = Self {
            gate: gate(whole(MOVED.0), start),
            packet: there,
            way,
            clients: 0,
            // After the time in which flows may be older than the daemon.
            now: start + Duration::from_secs(100_000),
        };
        if way == Way::New {
            for _ in 0..4 * FEW {
                work.check()?;
            }
        } else if way != Way::Unasked {
            work.check()?;
        }
        if matches!(way, Way::Returning | Way::Unasked) {
            work.packet = back;
        }
        Ok(Box::new(work))
    }

    fn check(&mut self) -> Result<()> {
        if self.way == Way::New {
            let source = Ipv4Addr::from(0x0a00_0000 + self.clients % 0x00ff_0000);
            self.packet[12..16].copy_from_slice(&source.octets());
            self.clients += 1;
        }
        let Ok(parsed) = Parsed::parse(&self.packet) else {
            bail!("the bench's packet is not understood");
        };
        let verdict = (self.gate).check_captured(self.now, &parsed, &self.packet);
        if black_box(verdict).is_err() {
            bail!("the bench's packet is not captured");
        }
        Ok(())
    }
}

impl Work for Check {
    fn step(&mut self) {
        match self.way {
            Way::Captured | Way::New => {
                let _ = black_box(self.check());
            }
            Way::Returning | Way::Unasked => {
                if let Ok(parsed) = Parsed::parse(&self.packet) {
                    let result = self
                        .gate
                        .check_returning(self.now, &parsed, &self.packet, &[]);
                    let _ = black_box(result);
                }
            }
        }
    }
}

/// Fragments that wait for a first one which never comes.
const WAITING: u16 = 128;

/// A first fragment while others wait, all with one identification. Each step sends it from another
/// address, and none of those that wait can follow it.
struct FirstFragment {
    gate: Gate,
    overlaps: Overlaps,
    held: HeldFragments<()>,
    first: Vec<u8>,
    frame: Vec<u8>,
    n: u32,
    now: Instant,
}

impl FirstFragment {
    const PAYLOAD: u16 = 1_480;

    fn build() -> Result<Box<dyn Work>> {
        let mut part = whole(MOVED.0);
        part.ports = vec![MOVED.1..=MOVED.1];
        let mut work = Self {
            gate: gate(part, Instant::now()),
            overlaps: Overlaps::new(Client::Source),
            held: HeldFragments::new(Client::Source),
            first: tcp(CLIENT, MOVED, 7, &[0; 44], false)?,
            frame: vec![0; 2_000],
            n: 0,
            now: Instant::now(),
        };
        work.first[6..8].copy_from_slice(&0x2000_u16.to_be_bytes());
        let mut later = tcp(CLIENT, MOVED, 7, &[0; Self::PAYLOAD as usize - 20], false)?;
        for n in 0..WAITING {
            // They are of several packets, since one is not long enough.
            later[15] = 1 + (n / 32) as u8;
            let word = 0x2000 + Self::PAYLOAD / 8 * (n % 32 + 1);
            later[6..8].copy_from_slice(&word.to_be_bytes());
            let Ok(parsed) = Parsed::parse(&later) else {
                bail!("the bench's fragment is not understood");
            };
            let key = FragmentKey::of(&parsed, &later);
            work.held.keep(work.now, key, (), &later);
        }
        Ok(Box::new(work))
    }

    fn pass(&mut self) -> Result<(), DropReason> {
        let source = Ipv4Addr::from(0x0a00_0000 + self.n % 0x00ff_0000);
        self.n += 1;
        self.first[12..16].copy_from_slice(&source.octets());
        let parsed = Parsed::parse(&self.first)?;
        let key = FragmentKey::of(&parsed, &self.first);
        self.overlaps.check(self.now, key, &parsed, &self.first)?;
        let verdict = self.gate.check_captured(self.now, &parsed, &self.first)?;
        let _ = black_box(verdict);
        for held in self.held.take(FragmentKey::of(&parsed, &self.first)) {
            let packet = &mut self.frame[..held.bytes.len()];
            packet.copy_from_slice(&held.bytes);
            let parsed = Parsed::parse(packet)?;
            let key = FragmentKey::of(&parsed, packet);
            let _ = black_box(self.overlaps.check(self.now, key, &parsed, packet));
            let _ = black_box(self.gate.check_captured(self.now, &parsed, packet));
        }
        Ok(())
    }
}

impl Work for FirstFragment {
    fn step(&mut self) {
        let passed = self.pass();
        debug_assert!(passed.is_ok());
        let _ = black_box(passed);
    }
}

/// Parses, looks up and rewrites a packet. Each step restores the packet: it copies 20 bytes of the
/// header.
struct Rewrite {
    translator: Translator,
    now: Instant,
    inbound: bool,
    fresh: Vec<u8>,
    packet: Vec<u8>,
}

impl Rewrite {
    fn build(inbound: bool) -> Result<Box<dyn Work>> {
        let now = Instant::now();
        let translator = Translator::new(TranslatorConfig {
            shards: 1,
            max_flows: FEW,
            seed: [1, 2],
            epoch: now,
            note_ended: false,
        });
        translator.set_moves(PeerId(0), &[whole(MOVED.0)]);
        let delivery = Delivery {
            v4: Some(NEW.0),
            ..Delivery::default()
        };
        translator.set_delivery(PeerId(0), delivery);
        let mut there = tcp(CLIENT, MOVED, 0, &[0; 1_400], true)?;
        let fresh = if inbound {
            there.clone()
        } else {
            tcp(NEW, CLIENT, 0, &[0; 1_400], true)?
        };
        let mut work = Self {
            translator,
            now,
            inbound,
            packet: fresh.clone(),
            fresh,
        };
        // The client's packet opens the flow.
        let Ok(mut parsed) = Parsed::parse(&there) else {
            bail!("the bench's packet is not understood");
        };
        let opened = work
            .translator
            .inbound(now, PeerId(0), &mut there, &mut parsed, true);
        if opened.is_err() || work.rewrite().is_err() {
            bail!("the bench's packet is not translated: {opened:?}");
        }
        Ok(Box::new(work))
    }

    fn rewrite(&mut self) -> Result<(), DropReason> {
        const HEADERS: usize = 40;
        self.packet[..HEADERS].copy_from_slice(&self.fresh[..HEADERS]);
        let (now, packet) = (self.now, &mut self.packet[..]);
        let mut parsed = Parsed::parse(packet)?;
        if self.inbound {
            self.translator
                .inbound(now, PeerId(0), packet, &mut parsed, true)
        } else {
            let carried = self.translator.outbound(now, packet, &mut parsed, true);
            let peer = carried.map_err(|drop| drop.reason)?;
            debug_assert_eq!(peer, PeerId(0));
            Ok(())
        }
    }
}

impl Work for Rewrite {
    fn step(&mut self) {
        let _ = black_box(self.rewrite());
    }
}

// Super-packets.

struct Segment {
    vnet: VnetHdr,
    packet: Vec<u8>,
    out: Vec<u8>,
}

impl Segment {
    fn new() -> Result<Self> {
        let payload = vec![0x5a; SEGMENTS * MSS];
        let packet = tcp(CLIENT, MOVED, 0, &payload, true)?;
        Ok(Self {
            vnet: VnetHdr {
                flags: NEEDS_CSUM,
                gso_type: GSO_TCPV4,
                hdr_len: 40,
                gso_size: MSS as u16,
                csum_start: 20,
                csum_offset: 16,
            },
            packet,
            out: vec![0; MSS + 40],
        })
    }

    /// Segments the super-packet, and calls `each` for each segment with its length.
    fn segment(
        vnet: &VnetHdr,
        packet: &mut [u8],
        mut each: impl FnMut(&mut Segments<'_>, usize),
    ) -> Result<(), DropReason> {
        let parsed = Parsed::parse(packet)?;
        let offload = Offload::accept(vnet, packet, &parsed)?;
        let mut segments = Segments::new(offload, packet, &parsed, PACKET);
        while let Some(len) = segments.next_len() {
            each(&mut segments, len);
        }
        Ok(())
    }
}

impl Work for Segment {
    fn prepare(&mut self) -> Result<()> {
        let mut count = 0;
        let segmented = Self::segment(&self.vnet, &mut self.packet, |segments, len| {
            segments.next_into(&mut self.out[..len]);
            count += 1;
        });
        if segmented.is_err() || count != SEGMENTS {
            bail!("the super-packet became {count} segments: {segmented:?}");
        }
        Ok(())
    }

    fn step(&mut self) {
        let segmented = Self::segment(&self.vnet, &mut self.packet, |segments, len| {
            black_box(segments.next_into(&mut self.out[..len]));
        });
        debug_assert!(segmented.is_ok());
    }
}

/// The old server's work on a super-packet between the two system calls.
struct SegmentAndSeal {
    segment: Segment,
    pair: Pair,
    batch: SendBatch,
    to: Destination,
}

impl SegmentAndSeal {
    fn new() -> Result<Self> {
        Ok(Self {
            segment: Segment::new()?,
            pair: Pair::with(Cipher::Aes256Gcm)?,
            batch: SendBatch::new(),
            to: Destination {
                peer: PeerId(0),
                endpoint: Endpoint {
                    remote: (NEW.0, 51_850).into(),
                    local: None,
                },
                ecn: 0,
            },
        })
    }
}

impl Work for SegmentAndSeal {
    fn prepare(&mut self) -> Result<()> {
        self.segment.prepare()?;
        seal(&self.pair.from, &mut [0; PACKET]).context("a datagram was not sealed")
    }

    fn step(&mut self) {
        let Self {
            segment: Segment { vnet, packet, .. },
            pair,
            batch,
            to,
        } = self;
        let segmented = Segment::segment(vnet, packet, |segments, len| {
            let mut slot = batch.reserve(len + DATA_OVERHEAD, to, |full| {
                black_box(full);
            });
            segments.next_into(&mut slot[DATA_HEADER_LEN..]);
            if seal(&pair.from, &mut slot).is_some() {
                slot.commit();
            }
        });
        black_box(batch.take());
        debug_assert!(segmented.is_ok());
    }
}

/// Most packets that one receive gives: 44 datagrams of a path of 1,500 bytes.
const COALESCED: usize = 44;

/// Plaintexts side by side, which each step parses and coalesces. It restores the head first.
struct Coalesce {
    slab: Vec<u8>,
    head: Vec<u8>,
    stride: usize,
    coalescer: Coalescer,
}

impl Coalesce {
    fn new() -> Result<Self> {
        const { assert!(COALESCED <= MAX_PARTS) };
        let mut slab = Vec::new();
        for n in 0..COALESCED {
            slab.extend(tcp(CLIENT, MOVED, n as u32, &[0; MSS], true)?);
        }
        let stride = slab.len() / COALESCED;
        let mut work = Self {
            head: slab[..stride].to_vec(),
            slab,
            stride,
            coalescer: Coalescer::new(true, Reach::Further),
        };
        if work.coalesce() != Some(COALESCED) {
            bail!("the packets were not coalesced into one");
        }
        Ok(work)
    }

    fn coalesce(&mut self) -> Option<usize> {
        self.slab[..40].copy_from_slice(&self.head[..40]);
        for at in (0..self.slab.len()).step_by(self.stride) {
            let range = at..at + self.stride;
            if self.coalescer.follow(&self.slab, range.clone(), true) {
                continue;
            }
            let parsed = Parsed::parse(&self.slab[range.clone()]).ok()?;
            if self.coalescer.push(&self.slab, range, &parsed, true) == Push::MustFlush {
                return None;
            }
        }
        let coalesced = self.coalescer.finish(&mut self.slab)?;
        Some(coalesced.packets)
    }
}

impl Work for Coalesce {
    fn step(&mut self) {
        black_box(self.coalesce());
    }
}

// Flows.

/// A table of flows with replies, as it is in operation.
struct Flows {
    table: FlowTable,
    limit: Limit,
    now: Instant,
    epoch: Instant,
    count: usize,
}

impl Flows {
    fn new(count: usize) -> Result<Self> {
        let now = Instant::now();
        let mut flows = Self {
            table: FlowTable::new(Seed::new([1, 2]), now),
            limit: Limit::new(2 * MANY),
            now,
            epoch: now,
            count,
        };
        for n in 0..count {
            let inside = flows.open(n, ACK)?;
            let limit = &flows.limit;
            flows.table.application_packet(now, &inside, ACK, limit);
        }
        Ok(flows)
    }

    fn open(&mut self, n: usize, tcp_flags: u8) -> Result<Inside> {
        self.table
            .open(
                self.now,
                &outside(n),
                NEW.0.into(),
                80,
                tcp_flags,
                &self.limit,
            )
            .map_err(|reason| anyhow::anyhow!("flow {n} was not opened: {}", reason.name()))
    }

    /// Drops the flows beyond the first `count`, which were reset. The other flows outlive some
    /// hundred such calls; then this makes a new table.
    fn clear(&mut self) -> Result<()> {
        self.now += TCP_RESET + Duration::from_secs(1);
        self.table.expire(self.now, usize::MAX, &self.limit);
        if self.now.duration_since(self.epoch) > Duration::from_secs(3_600) {
            *self = Self::new(self.count)?;
        }
        Ok(())
    }
}

/// Flow number `n`: 256 ports on each client address.
fn outside(n: usize) -> Outside {
    let client = Ipv4Addr::from(0x0a00_0000 + (n >> 8) as u32);
    Outside {
        peer: PeerId(0),
        protocol: TCP,
        client: client.into(),
        client_port: 1_024 + (n & 0xff) as u16,
        moved: MOVED.0.into(),
        moved_port: 80,
    }
}

struct Lookup {
    flows: Flows,
    n: usize,
}

impl Lookup {
    fn build(count: usize) -> Result<Box<dyn Work>> {
        let flows = Flows::new(count)?;
        Ok(Box::new(Self { flows, n: 0 }))
    }
}

impl Work for Lookup {
    fn step(&mut self) {
        // The stride has no factor in common with the count: it visits each flow, and none next to
        // the last one.
        self.n = (self.n + 611_953) % self.flows.count;
        let Flows {
            table, limit, now, ..
        } = &mut self.flows;
        let found = table.client_packet(*now, &outside(self.n), ACK, limit);
        debug_assert!(found.is_some());
        black_box(found);
    }
}

struct Insert {
    flows: Flows,
    n: usize,
}

impl Insert {
    fn build(count: usize) -> Result<Box<dyn Work>> {
        let flows = Flows::new(count)?;
        Ok(Box::new(Self { flows, n: 0 }))
    }
}

impl Work for Insert {
    fn prepare(&mut self) -> Result<()> {
        self.n = self.flows.count;
        self.flows.clear()
    }

    fn step(&mut self) {
        self.n += 1;
        let opened = self.flows.open(self.n, RST);
        debug_assert!(opened.is_ok());
        let _ = black_box(opened);
    }
}

/// A new flow where all flows are in use: of hosts that have one each, or half of them of one host.
struct Full {
    flows: Flows,
    has_holder: bool,
    n: u32,
}

impl Full {
    fn build(has_holder: bool) -> Result<Box<dyn Work>> {
        let mut work = Self {
            flows: Flows::new(0)?,
            has_holder,
            n: 0,
        };
        work.prepare()?;
        Ok(Box::new(work))
    }

    fn outside(&self, n: u32) -> Outside {
        let client = if self.has_holder && n.is_multiple_of(2) && n < FULL as u32 {
            CLIENT.0
        } else {
            Ipv4Addr::from(0x0a00_0000 + n)
        };
        Outside {
            client: client.into(),
            client_port: n as u16,
            ..outside(0)
        }
    }

    fn open(&mut self, n: u32) -> Result<Inside, DropReason> {
        let (key, flows) = (self.outside(n), &mut self.flows);
        let (now, to) = (flows.now, NEW.0.into());
        flows.table.open(now, &key, to, 80, ACK, &flows.limit)
    }
}

impl Work for Full {
    fn prepare(&mut self) -> Result<()> {
        self.flows = Flows::new(0)?;
        self.flows.limit = Limit::new(FULL);
        self.n = FULL as u32;
        for n in 0..self.n {
            let Ok(inside) = self.open(n) else {
                bail!("flow {n} was not opened");
            };
            let (now, flows) = (self.flows.now, &mut self.flows);
            (flows.table).application_packet(now, &inside, ACK, &flows.limit);
        }
        Ok(())
    }

    fn step(&mut self) {
        self.n += 1;
        let opened = self.open(self.n);
        debug_assert_eq!(opened.is_ok(), self.has_holder);
        let _ = black_box(opened);
    }
}

struct Expire {
    flows: Flows,
}

impl Expire {
    fn build(count: usize) -> Result<Box<dyn Work>> {
        let flows = Flows::new(count)?;
        Ok(Box::new(Self { flows }))
    }
}

impl Work for Expire {
    fn prepare(&mut self) -> Result<()> {
        self.flows.clear()?;
        for n in 0..ROUND as usize {
            self.flows.open(self.flows.count + n, RST)?;
        }
        self.flows.now += TCP_RESET + Duration::from_secs(1);
        Ok(())
    }

    fn step(&mut self) {
        let Flows {
            table, limit, now, ..
        } = &mut self.flows;
        let removed = table.expire(*now, 1, limit);
        debug_assert_eq!(removed, 1);
        black_box(removed);
    }
}

// Parts of the cases.

/// The old server's checks for what has moved, since `start`.
fn gate(moved: Move, start: Instant) -> Gate {
    let config = GateConfig {
        max_flows: FEW,
        seed: Seed::new([1, 2]),
        started: start,
        resumes: false,
    };
    // As the daemon does unless told otherwise.
    Gate::new(&[moved], config).noting_visits(true)
}

/// A move of a whole address.
fn whole(addr: Ipv4Addr) -> Move {
    Move {
        prefix: std::net::IpAddr::from(addr).into(),
        ports: vec![],
        transport: None,
    }
}

/// A segment of a TCP connection, the `n`th in order; its checksum partial or complete.
fn tcp(src: End, dst: End, n: u32, payload: &[u8], partial: bool) -> Result<Vec<u8>> {
    let mut packet = Vec::new();
    let seq = 1 + n * payload.len() as u32;
    PacketBuilder::ipv4(src.0.octets(), dst.0.octets(), 64)
        .tcp(src.1, dst.1, seq, 65_535)
        .ack(1)
        .write(&mut packet, payload)?;
    // Senders give consecutive segments consecutive identifications. The header's sum follows.
    packet[4..6].copy_from_slice(&(n as u16).to_be_bytes());
    packet[10..12].fill(0);
    let header = !sum(&packet[..20], 0);
    packet[10..12].copy_from_slice(&header.to_be_bytes());
    if partial {
        let length = (packet.len() - 20) as u32;
        let pseudo = sum(&packet[12..20], u32::from(TCP) + length);
        packet[36..38].copy_from_slice(&pseudo.to_be_bytes());
    }
    Ok(packet)
}

/// One's complement sum (RFC 1071) of an even number of bytes.
fn sum(bytes: &[u8], start: u32) -> u16 {
    let words = bytes.chunks_exact(2);
    let mut sum = words.fold(start, |sum, word| {
        sum + u32::from(u16::from_be_bytes([word[0], word[1]]))
    });
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
