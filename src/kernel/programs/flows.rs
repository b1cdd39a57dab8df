//! The memory of the steering programs: who speaks to whom by the tunnel, and who directly.
//!
//! Owns the maps, what is in their keys and values, and the phrases by which programs look a key
//! up. Keys are made by [`parse`](super::parse).
//!
//! ```text
//! struct key {                 // 40 bytes, at the end of the stack
//!     u32 family_and_protocol; // 4 or 6 in the second byte, the protocol in the first
//!     u8  local[16];           // the address here; IPv4 in the first four bytes
//!     u8  remote[16];          // the address of the client
//!     u8  last[4];             // as on the wire: remote port, local port; or the identifier of
//! };                           // an ICMP query; or a fragment's identification
//! flows      struct { u64 seen; u64 heard; u64 asked_directly; u32 entrance;
//!                     u32 opening_or_unawaited; }
//!            what came out of the tunnel: when the flow was last used, when its client was last
//!            heard there, and when it last came directly since (or 0); the link by which it is
//!            delivered (0: the TUN itself); of TCP whether a SYN was the last of it that tells
//!            anything, of UDP whether no socket of this host has waited for it (1), or whether it
//!            began here (2). Of TCP `asked_directly` says whether a host behind this one answers
//! own        struct { u64 seen_or_closed; }
//!            conversations of this host, and of hosts behind it, that never went by the tunnel;
//!            without TCP the lowest bit says whether its other end has spoken directly
//!            also, without their local end, the remote ends of UDP to which it spoke first
//! in         u64 unawaited_or_answered
//!            requests that came directly: bits of whether no socket waited for it, and whether its
//!            answer was counted, see `directly`
//! directly   u64, by local end: conversations that came directly, see `directly`
//! related    by remote end of UDP: which flow from the tunnel it has, see `related`
//! links      by index, or FIRST: struct { u32 ifindex; u32 header; u8 mac[6]; u8 pad[2]; }
//!            the links at which what comes out of the tunnel may arrive
//! shifted    second connections of a client with the same ports, see `shifted`
//! named      by the upper bits of a port: u64, see `named`
//! places     by prefix: u32, see `places`
//!            addresses that have moved, that are this host's own, or near
//! cgroups    u64, by rule of `--outgoing`: the control group that it names, or 0
//! fragments  u64, unused
//!            fragmented replies under way, by identification
//! sockets    u32, for each TCP socket whose connection came by the tunnel: 1, or 2 if shifted; for
//!            each of the tunnel's own: 3
//! counters   u64, see `Counter`
//! callers    see [`inside`](super::inside)
//! ```
//!
//! Times are the kernel's nanoseconds since boot. `flows` takes 16 bytes for each flow that there
//! may be, and some hundred more for each that there is.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};

use Reg::{R0, R1, R2, R3, R4, R10};

use super::directly::DIRECTLY;
use super::headers::{fib, icmpv4, icmpv6};
use super::inside::Inside;
use super::loopback::Loopback;
use super::named::Named;
use super::phrases::{PROTOCOL, begin_route_lookup, jump_if_v6, look_up_at, look_up_route};
use super::places::{Place, Places};
use super::related::RELATED_BYTES;
use super::shifted::{MAX_SHIFTED, SHIFTED_BYTES};
use super::sockets::OF_TUNNEL;
use crate::flow::class::{ICMP_QUERY, OTHER, TCP_ESTABLISHED, UDP_BOTH_WAYS};
use crate::flow::ended::{ENDED_ROOM, HostFlow};
use crate::kernel::bpf::{
    Alu, Assembler, BpfError, Helper, If, Label, Map, MapKind, Reg, Shape, Size, Words,
};
use crate::model::moved::{TCP, UDP};
use crate::model::outgoing::MAX_OUTGOING;
use crate::model::prefix::Prefix;

/// Fragmented replies under way at the same time. A reply of 64 KB is 45 fragments sent in one go,
/// so an entry lives for microseconds.
const MAX_FRAGMENTED: u32 = 4096;

/// Direct conversations that are remembered, of either kind. The one used least recently gives way,
/// and its next packet enters it again; 65,536 take some 8 MB of kernel memory.
const MAX_DIRECT: u32 = 65_536;

/// How long nothing that comes out of the tunnel takes over a conversation of this host after its
/// last packet: as long as an idle TCP connection is kept (RFC 5382 REQ-5). A clock synchronised
/// once an hour stays out of reach that way.
pub const OWN_KEPT: Duration = Duration::from_secs(7440);

/// How long replies without TCP go into the tunnel after the flow's last packet in either
/// direction: as long as the daemon keeps any such flow. The daemon ends most of them sooner.
pub const REPLY_IDLE: Duration = Duration::from_secs(600);

/// How long what answers a client without TCP leaves directly after it came directly, though its
/// flow lives in the tunnel. Who sends one datagram in its name takes its answers no longer.
pub const ANSWERED_DIRECTLY: Duration = Duration::from_secs(1);

/// A flow without TCP whose client was not heard in the tunnel for this long ends when the client
/// comes directly: those that keep a mapping alive speak every 25 s or oftener (RFC 4787 REQ-5,
/// RFC 8085 section 3.5).
pub const GONE_OVER: Duration = Duration::from_secs(30);

/// Flows that one sweep looks at. A million are looked at in a few minutes, a second a sweep.
const SWEPT: u32 = 4096;

/// How long a flow that this daemon does not know was not used, if it ended and that was not told:
/// the daemon knows a flow before the kernel does.
const UNTOLD: Duration = Duration::from_secs(2);

/// An entry in use gets a new time, and a flow a new look at the route to its client, this often.
pub(super) const REFRESH: Duration = Duration::from_secs(1);

const KEY_BYTES: usize = 40;
const FLOW_BYTES: usize = 32;

/// Where the parts of a key lie on the stack.
pub(super) const KEY: i16 = -40;
pub(super) const KEY_LOCAL: i16 = -36;
pub(super) const KEY_REMOTE: i16 = -20;
pub(super) const KEY_LAST: i16 = -4;

/// Where a value lies on the stack.
pub(super) const VALUE: i16 = -56;

/// Where that of a flow does.
pub(super) const FLOW_VALUE: i16 = -200;

/// Where the parts of a flow's value lie in it.
pub(super) const FLOW_SEEN: i16 = 0;
pub(super) const FLOW_HEARD: i16 = 8;
pub(super) const FLOW_ASKED_DIRECTLY: i16 = 16;
pub(super) const FLOW_ENTRANCE: i16 = 24;
/// In the same place, since only TCP has it: not 0 if a host behind this one answers.
pub(super) const FLOW_BEHIND: i16 = FLOW_ASKED_DIRECTLY;
pub(super) const FLOW_OPENING: i16 = 28;
/// In the same place, since only UDP has it.
pub(super) const FLOW_UNAWAITED: i16 = FLOW_OPENING;
/// There: a flow of UDP that began on this host. No answer to anybody is among its packets.
pub(super) const BEGUN_HERE: i32 = 2;

/// In place of the time, in the entry of a TCP conversation of a host behind this one that is
/// closing: it may be taken over.
pub(super) const CLOSED: i32 = 1;

/// Links that are known. With more, those beyond count as the first.
const MAX_LINKS: u32 = 4096;

const LINK_BYTES: usize = 16;

/// Where the parts of a link's value lie in it.
pub(super) const LINK_IFINDEX: i16 = 0;
pub(super) const LINK_HEADER: i16 = 4;
pub(super) const LINK_MAC: i16 = 8;

/// The name of the word that says whether any connection is shifted.
const SHIFTS: &str = "ipmoved_shifts";

/// In place of an index: the link to use where the right one is not known.
pub(super) const LINK_FIRST: u32 = u32::MAX;

/// A link at which what comes out of the tunnel may arrive.
#[derive(Clone, Copy, Debug)]
pub struct Entrance {
    /// Its index.
    pub ifindex: u32,
    /// Length of its link-layer header, in bytes.
    pub l2_header: u32,
    /// Its hardware address, if it has such a header.
    pub mac: [u8; 6],
}

/// What the programs count or are told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Counter {
    /// Packets of new flows that were dropped because the memory is full.
    Full = 0,
    /// TCP packets from the tunnel with the addresses and ports of a direct connection, dropped.
    Direct = 1,
    /// Until this time, connections may be older than this memory.
    Grace = 2,
    /// Entries made in `in`.
    Came = 3,
    /// Whether `in` forgets so much that what is not in it may have been.
    Pressed = 4,
}

impl Counter {
    const COUNT: u32 = 5;
}

/// The maps of all steering programs.
#[derive(Debug)]
pub struct FlowMaps {
    pub(super) flows: Map,
    pub(super) own: Map,
    pub(super) direct: Map,
    pub(super) directly: Map,
    pub(super) related: Map,
    pub(super) shifted: Map,
    pub(super) shifts: Words,
    pub(super) links: Map,
    pub(super) fragments: Map,
    pub(super) counters: Map,
    /// Who calls a moved address from inside.
    pub(super) inside: Inside,
    /// What of that the kernel keeps on `lo`.
    pub(super) loopback: Loopback,
    pub(super) places: Places,
    /// Ports of this host that are named by what has moved.
    pub(super) named: Named,
    pub(super) cgroups: Map,
    /// None where the kernel has no such maps.
    pub(super) sockets: Option<Map>,
}

pub(super) const fn shape(
    kind: MapKind,
    name: &'static str,
    value_size: usize,
    max_entries: u32,
) -> Shape {
    Shape {
        kind,
        name,
        key_size: KEY_BYTES,
        value_size,
        max_entries,
    }
}

/// The shapes, by name.
const fn flows(max_flows: u32) -> Shape {
    let room = max_flows.saturating_add(ENDED_ROOM as u32);
    shape(MapKind::Hash, "ipmoved_flows", FLOW_BYTES, room)
}
const OWN: Shape = shape(MapKind::LruHash, "ipmoved_own", 8, MAX_DIRECT);
const DIRECT: Shape = shape(MapKind::LruHash, "ipmoved_in", 8, MAX_DIRECT);
const RELATED: Shape = shape(
    MapKind::LruHash,
    "ipmoved_related",
    RELATED_BYTES,
    MAX_DIRECT,
);
const SHIFTED: Shape = shape(
    MapKind::Hash,
    "ipmoved_shifted",
    SHIFTED_BYTES,
    2 * MAX_SHIFTED,
);
const LINKS: Shape = Shape {
    kind: MapKind::Hash,
    name: "ipmoved_links",
    key_size: 4,
    value_size: LINK_BYTES,
    max_entries: MAX_LINKS,
};
const FRAGMENTS: Shape = shape(MapKind::LruHash, "ipmoved_frags", 8, MAX_FRAGMENTED);
const COUNTERS: Shape = Shape {
    kind: MapKind::Array,
    name: "ipmoved_counts",
    key_size: 4,
    value_size: 8,
    max_entries: Counter::COUNT,
};
const CGROUPS: Shape = Shape {
    kind: MapKind::Array,
    name: "ipmoved_cgroups",
    key_size: 4,
    value_size: 8,
    max_entries: MAX_OUTGOING as u32,
};
const SOCKETS: Shape = Shape {
    kind: MapKind::SkStorage,
    name: "ipmoved_socks",
    key_size: 4,
    value_size: 4,
    max_entries: 0,
};

impl FlowMaps {
    /// Empty maps, for `max_flows` flows and those that have ended, as long as that is not told.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn new(max_flows: u32) -> Result<Self, BpfError> {
        Self::of(flows(max_flows))
    }

    #[cfg(test)]
    pub(super) fn with_room(entries: u32) -> Result<Self, BpfError> {
        Self::of(Shape {
            max_entries: entries,
            ..flows(0)
        })
    }

    fn of(flows: Shape) -> Result<Self, BpfError> {
        Ok(Self {
            flows: Map::new(flows)?,
            own: Map::new(OWN)?,
            direct: Map::new(DIRECT)?,
            directly: Map::new(DIRECTLY)?,
            related: Map::new(RELATED)?,
            shifted: Map::new(SHIFTED)?,
            shifts: Words::new(SHIFTS, 1)?,
            links: Map::new(LINKS)?,
            fragments: Map::new(FRAGMENTS)?,
            counters: Map::new(COUNTERS)?,
            inside: Inside::new(|_| None)?,
            loopback: Loopback::new(|_| None)?,
            places: Places::new()?,
            named: Named::new()?,
            cgroups: Map::new(CGROUPS)?,
            sockets: sockets()?,
        })
    }

    /// The maps among these descriptors, if those that remember something are there with the same
    /// measures. The others are made.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn found(descriptors: &[OwnedFd], max_flows: u32) -> Result<Option<Self>, BpfError> {
        let all = || descriptors.iter().filter_map(|fd| fd.try_clone().ok());
        let find = |shape: Shape| all().find_map(|fd| Map::from_fd(fd, shape));
        // It has more room if there were to be more of them once: see `with_room_for`.
        let flows = flows(max_flows);
        let found = (
            all().find_map(|fd| Map::at_least_from_fd(fd, flows)),
            find(OWN),
            find(DIRECT),
            find(FRAGMENTS),
        );
        let (Some(flows), Some(own), Some(direct), Some(fragments)) = found else {
            return Ok(None);
        };
        let found = Self {
            flows,
            own,
            direct,
            directly: Map::new(DIRECTLY)?,
            fragments,
            shifted: match find(SHIFTED) {
                Some(map) => map,
                None => Map::new(SHIFTED)?,
            },
            shifts: Words::new(SHIFTS, 1)?,
            related: match find(RELATED) {
                Some(map) => map,
                None => Map::new(RELATED)?,
            },
            links: Map::new(LINKS)?,
            counters: Map::new(COUNTERS)?,
            inside: Inside::new(find)?,
            loopback: Loopback::new(find)?,
            places: Places::found(descriptors)?,
            named: Named::new()?,
            cgroups: Map::new(CGROUPS)?,
            sockets: match find(SOCKETS) {
                Some(map) => Some(map),
                None => sockets()?,
            },
        };
        found.note_shifts()?;
        Ok(Some(found))
    }

    /// The maps that remember something, for [`found`](Self::found).
    pub fn lasting(&self) -> Vec<BorrowedFd<'_>> {
        let Self {
            flows,
            own,
            direct,
            related,
            shifted,
            fragments,
            ..
        } = self;
        [flows, own, direct, related, shifted, fragments]
            .into_iter()
            .chain([&self.inside.callers])
            .chain(&self.sockets)
            .map(AsFd::as_fd)
            .chain([self.places.fd(), self.loopback.fd()])
            .collect()
    }

    /// What the programs know of calls from inside.
    pub fn inside(&self) -> &Inside {
        &self.inside
    }

    /// What they know of such calls that the kernel keeps on `lo`.
    pub fn loopback(&self) -> &Loopback {
        &self.loopback
    }

    /// Names the links at which packets may arrive, the first of which stands for any other.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_links(&self, links: &[Entrance]) -> Result<(), BpfError> {
        let key = |index: u32| index.to_ne_bytes();
        let mut stale = self.links.keys().map_err(refused)?;
        let named = links.iter().map(|link| (link.ifindex, link));
        let first = links.first().map(|link| (LINK_FIRST, link));
        for (index, link) in named.chain(first).take(MAX_LINKS as usize) {
            let mut value = [0; LINK_BYTES];
            value[..4].copy_from_slice(&link.ifindex.to_ne_bytes());
            value[4..8].copy_from_slice(&link.l2_header.to_ne_bytes());
            value[8..14].copy_from_slice(&link.mac);
            stale.retain(|known| known[..] != key(index));
            self.links.insert(&key(index), &value).map_err(refused)?;
        }
        for gone in stale {
            self.links.remove(&gone).map_err(refused)?;
        }
        Ok(())
    }

    /// Says what addresses are from now on ([`Places::update`]).
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_places(
        &mut self,
        places: &BTreeMap<Prefix, Place>,
        complete: bool,
    ) -> Result<(), BpfError> {
        self.places.update(places, complete)
    }

    /// From now on this is the control group that a rule names; 0 if there is none.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_cgroup(&self, rule: u32, id: u64) -> Result<(), BpfError> {
        self.cgroups.set(rule, id).map_err(refused)
    }

    /// What this socket sends is the tunnel's own from now on.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_of_tunnel(&self, socket: BorrowedFd<'_>) -> Result<(), BpfError> {
        let Some(sockets) = &self.sockets else {
            return Ok(());
        };
        let key = socket.as_raw_fd().to_ne_bytes();
        (sockets.insert(&key, &OF_TUNNEL.to_ne_bytes())).map_err(refused)
    }

    /// An empty map of flows, if there is to be room for more than there is; see
    /// [`replace_flows`](Self::replace_flows). For fewer the map stays as it is: the kernel takes
    /// memory for what is in it, and who opens flows has a limit of its own.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn with_room_for(&self, max_flows: u32) -> Result<Option<Map>, BpfError> {
        let shape = flows(max_flows);
        let more = shape.max_entries > self.flows.room();
        more.then(|| Map::new(shape)).transpose()
    }

    /// Remembers flows there from now on, and returns where they were.
    pub fn replace_flows(&mut self, flows: Map) -> Map {
        std::mem::replace(&mut self.flows, flows)
    }

    /// Takes in the flows that are remembered there and not here. Those for which there is no room
    /// are left out.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn take_over(&self, earlier: &Map) -> Result<(), BpfError> {
        let (mut place, mut known) = (None, [0; FLOW_BYTES]);
        let mut look = |key: &[u8], value: &[u8]| {
            if !self.flows.read(key, &mut known) {
                // Where it is full, there are newer ones.
                let _ = self.flows.insert(key, value);
            }
        };
        while (earlier.read_some(&mut place, SWEPT, &mut look)).map_err(refused)? {}
        Ok(())
    }

    /// Forgets flows.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn forget(&self, flows: &[HostFlow]) -> Result<(), BpfError> {
        let keys: Vec<u8> = flows.iter().flat_map(key_of).collect();
        self.flows.remove_all(&keys).map_err(refused)
    }

    /// Looks at some flows, from where the last look at the same `place` ended, and forgets those
    /// that have not been used for as long as any flow of their kind is kept and that nobody
    /// `knows`: an earlier daemon knew them. What began here and was never answered is not kept so
    /// long: this daemon has refused it, and did not tell.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn sweep(
        &self,
        place: &mut Option<u32>,
        knows: impl Fn(&HostFlow) -> bool,
    ) -> Result<(), BpfError> {
        self.sweep_at(now(), place, knows)
    }

    fn sweep_at(
        &self,
        now: Duration,
        place: &mut Option<u32>,
        knows: impl Fn(&HostFlow) -> bool,
    ) -> Result<(), BpfError> {
        self.forget_some(place, SWEPT, |flow, seen, heard| {
            let kept = match flow.protocol {
                TCP | UDP if heard.is_zero() => UNTOLD,
                TCP => TCP_ESTABLISHED,
                UDP => UDP_BOTH_WAYS,
                icmpv4::PROTOCOL | icmpv6::PROTOCOL => ICMP_QUERY,
                _ => OTHER,
            };
            seen + kept < now && !knows(flow)
        })
    }

    /// As [`sweep`](Self::sweep), at many flows and whatever their kind: forgets those used since
    /// the time `since`, when this daemon came, that nobody `knows`.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn sweep_untold(
        &self,
        since: Duration,
        place: &mut Option<u32>,
        knows: impl Fn(&HostFlow) -> bool,
    ) -> Result<(), BpfError> {
        let now = now();
        self.forget_some(place, 8 * SWEPT, |flow, seen, _| {
            seen >= since && seen + UNTOLD < now && !knows(flow)
        })
    }

    fn forget_some(
        &self,
        place: &mut Option<u32>,
        most: u32,
        is_stale: impl Fn(&HostFlow, Duration, Duration) -> bool,
    ) -> Result<(), BpfError> {
        let mut stale = Vec::new();
        let look = |key: &[u8], value: &[u8]| {
            let times = time(value, FLOW_SEEN).zip(time(value, FLOW_HEARD));
            if let Some((flow, (seen, heard))) = flow_of(key).zip(times)
                && is_stale(&flow, seen, heard)
            {
                stale.extend_from_slice(key);
            }
        };
        self.flows.read_some(place, most, look).map_err(refused)?;
        self.flows.remove_all(&stale).map_err(refused)
    }

    /// The flows that are remembered, as far as they are `wanted`.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn flows(&self, wanted: impl Fn(&HostFlow) -> bool) -> Result<Vec<HostFlow>, BpfError> {
        let (mut flows, mut place) = (Vec::new(), None);
        let mut look = |key: &[u8], _: &[u8]| flows.extend(flow_of(key).filter(&wanted));
        while (self.flows.read_some(&mut place, SWEPT, &mut look)).map_err(refused)? {}
        Ok(flows)
    }

    /// The value of a counter.
    pub fn count(&self, counter: Counter) -> u64 {
        self.counters.get(counter as u32).unwrap_or(0)
    }

    /// For this long, connections of which nothing is known may be those of the tunnel, if the
    /// client knows where they stand: their memory was lost with an earlier daemon.
    pub fn trust_for(&self, time: Duration) {
        // Without it connections from before are lost, which is no reason not to start.
        let _ = self
            .counters
            .set(Counter::Grace as u32, (now() + time).as_nanos() as u64);
    }

    /// Tells the programs whether requests that came directly are forgotten too soon.
    pub fn set_pressed(&self, pressed: bool) {
        // Without it they go by what they have.
        let _ = self
            .counters
            .set(Counter::Pressed as u32, u64::from(pressed));
    }
}

/// Asks for the route between the addresses of the key, from the first of these places of it to the
/// second, as if the packet came by the TUN; `at` is where the stack keeps the question. Jumps to
/// `found` with the answer there; otherwise R0 says why not.
pub(super) fn look_up_route_of_key(
    a: &mut Assembler,
    at: i16,
    tun_ifindex: u32,
    (source, destination): (i16, i16),
    found: Label,
) {
    let (v6, look) = (a.label(), a.label());
    begin_route_lookup(a, at, tun_ifindex);
    jump_if_v6(a, v6);
    for (length, family) in [(4, libc::AF_INET), (16, libc::AF_INET6)] {
        if family == libc::AF_INET6 {
            a.bind(v6);
        }
        a.store(Size::B, R10, at + fib::FAMILY, family);
        for word in (0..length).step_by(4) {
            for (from, to) in [(source, fib::SOURCE), (destination, fib::DESTINATION)] {
                a.load(Size::W, R0, R10, from + word);
                a.store(Size::W, R10, at + to + word, R0);
            }
        }
        a.jump(look);
    }
    a.bind(look);
    look_up_route(a, at, found);
}

pub(super) fn refused(errno: Errno) -> BpfError {
    BpfError::of_map("of steering")(errno)
}

/// The kernel's time, as programs see it.
pub fn now() -> Duration {
    let now = clock_gettime(ClockId::Monotonic);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec as u32)
}

/// One of the times in a flow's value.
fn time(value: &[u8], at: i16) -> Option<Duration> {
    let at = usize::try_from(at).ok()?;
    let bytes = value.get(at..at + 8)?.try_into().ok()?;
    Some(Duration::from_nanos(u64::from_ne_bytes(bytes)))
}

/// The key of a flow, as programs make it.
pub(super) fn key_of(flow: &HostFlow) -> [u8; KEY_BYTES] {
    let mut key = [0; KEY_BYTES];
    let family: u32 = if flow.local.is_ipv4() { 4 } else { 6 };
    let word = family << 8 | u32::from(flow.protocol);
    key[..4].copy_from_slice(&word.to_ne_bytes());
    for (at, addr) in [(4, flow.local.ip()), (20, flow.remote.ip())] {
        match addr {
            IpAddr::V4(addr) => key[at..at + 4].copy_from_slice(&addr.octets()),
            IpAddr::V6(addr) => key[at..at + 16].copy_from_slice(&addr.octets()),
        }
    }
    key[36..38].copy_from_slice(&flow.remote.port().to_be_bytes());
    key[38..].copy_from_slice(&flow.local.port().to_be_bytes());
    key
}

/// The flow of a key.
pub(super) fn flow_of(key: &[u8]) -> Option<HostFlow> {
    let [protocol, family] = {
        let bytes: [u8; 4] = key.get(..4)?.try_into().ok()?;
        let word = u32::from_ne_bytes(bytes);
        [word as u8, (word >> 8) as u8]
    };
    let addr = |at: usize| -> Option<IpAddr> {
        Some(match family {
            4 => <[u8; 4]>::try_from(key.get(at..at + 4)?).ok()?.into(),
            _ => <[u8; 16]>::try_from(key.get(at..at + 16)?).ok()?.into(),
        })
    };
    let port = |at: usize| {
        let bytes = key.get(at..at + 2)?.try_into().ok()?;
        Some(u16::from_be_bytes(bytes))
    };
    Some(HostFlow {
        protocol,
        local: SocketAddr::new(addr(4)?, port(38)?),
        remote: SocketAddr::new(addr(20)?, port(36)?),
    })
}

/// None where the kernel has no such maps.
fn sockets() -> Result<Option<Map>, BpfError> {
    match Map::new(SOCKETS) {
        Ok(map) => Ok(Some(map)),
        Err(BpfError::Map { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The key's first word, from PROTOCOL.
pub(super) fn store_family(a: &mut Assembler, version: i32) {
    a.mov(R0, PROTOCOL);
    a.alu(Alu::Or, R0, version << 8);
    a.store(Size::W, R10, KEY, R0);
}

/// R0 = the address of the key's value in a map, or 0.
pub(super) fn look_up(a: &mut Assembler, map: &Map) {
    map_and_key(a, map);
    a.call(Helper::MapLookup);
}

/// Enters the key into a map, with the value at [`VALUE`]. R0 = 0, or what is wrong.
pub(super) fn enter(a: &mut Assembler, map: &Map) {
    enter_from(a, map, VALUE);
}

/// Enters the key into a map, with the value that lies there. R0 = 0, or what is wrong.
pub(super) fn enter_from(a: &mut Assembler, map: &Map, value: i16) {
    map_and_key(a, map);
    a.mov(R3, R10);
    a.alu(Alu::Add, R3, i32::from(value));
    a.mov(R4, 0);
    a.call(Helper::MapUpdate);
}

/// Enters the key into a map with the present time.
pub(super) fn enter_now(a: &mut Assembler, map: &Map) {
    a.call(Helper::KtimeGetNs);
    a.store(Size::Dw, R10, VALUE, R0);
    enter(a, map);
}

pub(super) fn remove(a: &mut Assembler, map: &Map) {
    map_and_key(a, map);
    a.call(Helper::MapDelete);
}

/// R0 = the present time. Jumps to `fresh` if a time of the entry is no older than this.
pub(super) fn jump_if_within(
    a: &mut Assembler,
    (entry, at): (Reg, i16),
    age: Duration,
    fresh: Label,
) {
    a.call(Helper::KtimeGetNs);
    a.load(Size::Dw, R1, entry, at);
    // Another processor may have written a time that is later by a little.
    a.mov_wide(R2, age.as_nanos() as u64);
    a.alu(Alu::Add, R1, R2);
    a.jump_if_wide(R1, If::Ge, R0, fresh);
}

/// Counts.
pub(super) fn count(a: &mut Assembler, maps: &FlowMaps, counter: Counter) {
    let gone = a.label();
    counter_at(a, maps, counter, gone);
    a.mov(R1, 1);
    a.add_atomically(R0, 0, R1);
    a.bind(gone);
}

/// R0 = the address of a counter. Jumps to `gone` if there is none, which the verifier wants to
/// see.
pub(super) fn counter_at(a: &mut Assembler, maps: &FlowMaps, counter: Counter, gone: Label) {
    a.store(Size::W, R10, VALUE, counter as i32);
    look_up_at(a, &maps.counters, VALUE);
    a.jump_if_wide(R0, If::Eq, 0, gone);
}

fn map_and_key(a: &mut Assembler, map: &Map) {
    a.load_map(R1, map.as_fd());
    a.mov(R2, R10);
    a.alu(Alu::Add, R2, i32::from(KEY));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_names_its_flow() {
        for (local, remote) in [
            ("198.51.100.2:53", "203.0.113.7:40000"),
            ("[2001:db8::2]:53", "[2001:db8::7]:40000"),
        ] {
            let flow = HostFlow {
                protocol: 17,
                local: local.parse().unwrap(),
                remote: remote.parse().unwrap(),
            };
            assert_eq!(flow_of(&key_of(&flow)), Some(flow));
        }
    }

    fn flow(port: u16) -> HostFlow {
        HostFlow {
            protocol: 17,
            local: "198.51.100.2:53".parse().unwrap(),
            remote: SocketAddr::new("203.0.113.7".parse().unwrap(), port),
        }
    }

    #[test]
    fn only_for_more_flows_is_there_another_map_and_a_larger_one_is_found() {
        let maps = FlowMaps::new(100).expect("run the tests as root");
        let room = |max| maps.with_room_for(max).unwrap().map(|map| map.room());
        assert_eq!((room(100), room(10)), (None, None));
        assert_eq!(room(101), Some(maps.flows.room() + 1));
        let left: Vec<OwnedFd> = (maps.lasting().into_iter())
            .map(|fd| fd.try_clone_to_owned().unwrap())
            .collect();
        for (max, found) in [(10, true), (100, true), (101, false)] {
            assert_eq!(FlowMaps::found(&left, max).unwrap().is_some(), found);
        }
    }

    fn enter(maps: &FlowMaps, flow: &HostFlow, seen: Duration) {
        enter_heard(maps, flow, seen, seen);
    }

    fn enter_heard(maps: &FlowMaps, flow: &HostFlow, seen: Duration, heard: Duration) {
        let mut value = [0; FLOW_BYTES];
        value[..8].copy_from_slice(&(seen.as_nanos() as u64).to_ne_bytes());
        value[8..16].copy_from_slice(&(heard.as_nanos() as u64).to_ne_bytes());
        maps.flows.insert(&key_of(flow), &value).unwrap();
    }

    fn known(maps: &FlowMaps) -> usize {
        maps.flows.keys().unwrap().len()
    }

    #[test]
    fn flows_that_ended_are_forgotten_together() {
        let maps = FlowMaps::new(1000).expect("run the tests as root");
        for port in 0..10 {
            enter(&maps, &flow(port), now());
        }
        // Some of them are not there.
        let ended: Vec<_> = (5..20).rev().map(flow).collect();
        maps.forget(&ended).unwrap();
        assert_eq!(known(&maps), 5);
        maps.forget(&[]).unwrap();
    }

    #[test]
    fn what_ended_untold_is_swept_at_once() {
        let maps = FlowMaps::new(1000).expect("run the tests as root");
        let since = now();
        let ago = |time: u64| now().saturating_sub(Duration::from_secs(time));
        let came = ago(100);
        enter(&maps, &flow(1), ago(1));
        enter(&maps, &flow(2), ago(50));
        enter(&maps, &flow(3), ago(50));
        enter(&maps, &flow(4), ago(150));
        let knows = |flow: &HostFlow| flow.remote.port() == 3;
        maps.sweep_untold(since, &mut None, knows).unwrap();
        assert_eq!(known(&maps), 4, "all are of an earlier daemon");
        // In use, known, and of an earlier daemon.
        maps.sweep_untold(came, &mut None, knows).unwrap();
        assert_eq!(known(&maps), 3);
        let mut kept = maps.flows.keys().unwrap();
        kept.retain(|key| flow_of(key) == Some(flow(2)));
        assert!(kept.is_empty());
    }

    #[test]
    fn what_began_here_unanswered_and_nobody_knows_is_swept_soon() {
        let maps = FlowMaps::new(1000).expect("run the tests as root");
        let (then, never) = (Duration::from_secs(100), Duration::ZERO);
        for protocol in [TCP, UDP] {
            let of = |port| HostFlow {
                protocol,
                ..flow(port)
            };
            enter_heard(&maps, &of(1), then, never);
            enter_heard(&maps, &of(2), then, never);
            enter_heard(&maps, &of(3), then, then);
        }
        let knows = |flow: &HostFlow| flow.remote.port() == 2;
        let sweep = |later| {
            maps.sweep_at(then + later, &mut None, knows).unwrap();
            known(&maps)
        };
        assert_eq!(sweep(UNTOLD / 2), 6, "the daemon may be about to know it");
        assert_eq!(sweep(UNTOLD * 2), 4);
    }

    #[test]
    fn what_nobody_knows_is_swept_once_it_is_old() {
        let maps = FlowMaps::new(100_000).expect("run the tests as root");
        let total = 3 * SWEPT as u16;
        let (old, new) = (Duration::from_secs(1), Duration::from_secs(3));
        for port in 0..total {
            enter(&maps, &flow(port), if port % 2 == 0 { old } else { new });
        }
        let later = old + UDP_BOTH_WAYS + Duration::from_secs(1);
        let mut place = None;
        let mut sweeps = 0;
        loop {
            let knows = |flow: &HostFlow| flow.remote.port() < 100;
            maps.sweep_at(later, &mut place, knows).unwrap();
            sweeps += 1;
            if place.is_none() {
                break;
            }
        }
        assert!(sweeps >= 3, "{sweeps}");
        // Even ports are old, and the lowest hundred are known.
        assert_eq!(known(&maps), usize::from(total / 2) + 50);
    }
}
