//! The kernel changes of the new server: what comes out of the tunnel is delivered as if it came by
//! the link that leads to its client, and replies to it are taken at the last moment before a link.
//!
//! ```text
//! TUN ingress: deliver ──► the flow is remembered ──► ingress of the link that leads to the client
//!                          ├─► (firewall, translation of addresses, socket or container) ─┐
//!                          └─► no link leads there: the stack, from the TUN               │
//! link ingress: arrivals ──► a client that comes directly is answered directly            │
//! link egress: take_replies ◄── whatever rules, routes and marks say ◄────────────────────┘
//!                  ├─► a flow that is remembered ──► TUN
//!                  ├─► a call of a moved address that is served here ──► TUN
//!                  └─► anything else ──► the link
//! ingress of links without clients: callers ──► a call of those behind this server ──► TUN
//! lo egress: loopback ──► a call of an address that is held here ──► the application, by lo
//! ```
//!
//! Owns the programs and their places. What is taken is known exactly, by protocol, addresses and
//! ports, so a client may use the new server directly at the same time. When the daemon dies its
//! TUN vanishes, and the programs that stay drop what they would send there: otherwise replies
//! would leave with the new server's own address, which resets the client's connection. The next
//! daemon takes over what they know.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::time::Duration;

use super::{
    ETHERNET_HEADER, PUBLIC, PlanError, behind, clsact, filter, filter_from, l2_header, loopback,
};
use crate::flow::ended::HostFlow;
use crate::kernel::Desired;
use crate::kernel::bpf::{self, BpfError, Map, Program};
use crate::kernel::change::{Change, DefaultRoute, Interface, OfLink, Sysctl};
use crate::kernel::netlink::{Direction, Family, Link, Netlink, TABLE_MAIN};
use crate::kernel::programs::{self, arrivals, callers, deliver, now, take_replies};
use crate::kernel::programs::{
    Chosen, Counter, Entrance, FlowMaps, LOOPBACK, Listening, PeerTargets, Place, TAKE_REPLIES,
};
use crate::model::drops::DropReason;
use crate::model::moved::Move;
use crate::model::prefix::Prefix;

/// Metric of the route into the TUN, for a family without any other default route: every other one
/// is preferred.
const LAST_RESORT: u32 = 4_000_000_000;

/// How long connections of which nothing is known may be those of the tunnel, where this daemon
/// begins without the memory of an earlier one. An idle one has to be heard in this time.
const TRUST: Duration = Duration::from_secs(600);

/// What the programs drop, besides replies when the daemon is dead.
const DROPS: [(Counter, DropReason); 2] = [
    (Counter::Full, DropReason::SteeringFull),
    (Counter::Direct, DropReason::DirectConnection),
];

/// What outlives a new plan: the programs in the kernel, and their memory.
#[derive(Debug)]
pub struct Steering {
    maps: FlowMaps,
    tunnel_port: u16,
    /// What leaves through the tunnel because of its port.
    outgoing: Vec<Chosen>,
    /// The memory is that of an earlier daemon.
    resumes: bool,
    loaded: OnceLock<Loaded>,
    /// What runs on `lo`, once somebody has asked for it.
    on_lo: OnceLock<(&'static str, OwnedFd)>,
    /// When this daemon came, by the kernel's time.
    since: Duration,
    /// Where the sweep of flows stands.
    swept: Option<u32>,
    /// Where that of flows whose end was not told stands, while there is one.
    untold: Option<Option<u32>>,
    /// What the programs had dropped when it was told last.
    told: [u64; DROPS.len()],
    came: Came,
    /// The flows that were known with room for another number of them.
    earlier: Option<Map>,
    /// None where the kernel takes no such program, or none may be asked.
    listening: Option<Listening>,
}

/// What the programs are made for, where that is not what they were made for before.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Remade {
    /// What leaves through the tunnel because of its port.
    pub outgoing: Vec<Chosen>,
    /// The tunnel's own UDP port on this host.
    pub tunnel_port: u16,
    /// Most flows.
    pub max_flows: u32,
}

/// How fast the programs' memory of requests that came directly is filled. It has room for 65,536,
/// and what was forgotten there looks as if this host had spoken first.
#[derive(Debug)]
struct Came {
    level: u64,
    counted: u64,
    looked: Duration,
}

impl Came {
    /// Entries a second that are no flood: the memory lasts for a minute then.
    const PACE: u64 = 1_000;
    /// Entries beyond that pace with which the memory is half full.
    const MOST: u64 = 32_768;

    /// Whether answers may come later than the memory lasts, now that there were so many entries;
    /// `None` if that is as before.
    fn turns(&mut self, now: Duration, counted: u64) -> Option<bool> {
        let before = self.level > Self::MOST;
        let passed = now.saturating_sub(self.looked).as_millis() as u64;
        let drained = self.level.saturating_sub(passed * Self::PACE / 1_000);
        self.level = drained + counted.saturating_sub(self.counted);
        (self.looked, self.counted) = (now, counted);
        let after = self.level > Self::MOST;
        (after != before).then_some(after)
    }
}

/// Programs in the kernel. One serves all links of its kind, so that those which come later need
/// no privilege.
#[derive(Debug)]
struct Loaded {
    /// For links with and without a link-layer header of this length.
    on_links: [(u32, [(&'static str, OwnedFd); 3]); 2],
    on_tun: (&'static str, OwnedFd),
}

impl Steering {
    /// Takes over the memory of a killed daemon, or makes it. It is found among the descriptors
    /// that somebody `kept`, or through the programs that still stand on `links` (for which this
    /// process needs CAP_SYS_ADMIN). `tunnel_port` is the tunnel's own UDP port on this host.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn new(
        netlink: &Netlink,
        links: &[Link],
        tunnel_port: u16,
        max_flows: u32,
        kept: &[OwnedFd],
    ) -> Result<Self, PlanError> {
        let programs = |link: &Link, name| {
            let filters = netlink.filters(link.index, Direction::Egress)?;
            let ours = filters
                .into_iter()
                .filter(move |filter| filter.name.as_deref() == Some(name));
            Ok::<_, PlanError>(ours.filter_map(|filter| filter.program_id))
        };
        let mut left = Vec::new();
        for link in links {
            left.extend(programs(link, TAKE_REPLIES)?);
        }
        let mut found = FlowMaps::found(kept, max_flows)?;
        if found.is_none() && !left.is_empty() {
            let mut on_lo = Vec::new();
            for lo in netlink.links()?.iter().filter(|link| link.loopback) {
                on_lo.extend(programs(lo, LOOPBACK)?);
            }
            for id in left {
                if found.is_none() {
                    let of = std::iter::once(id).chain(on_lo.iter().copied());
                    let maps: Vec<OwnedFd> = of.flat_map(bpf::of_program).collect();
                    found = FlowMaps::found(&maps, max_flows)?;
                }
            }
        }
        let resumes = found.is_some();
        let maps = match found {
            Some(maps) => maps,
            None => {
                let maps = FlowMaps::new(max_flows)?;
                maps.trust_for(TRUST);
                maps
            }
        };
        Ok(Self {
            maps,
            tunnel_port,
            outgoing: Vec::new(),
            resumes,
            loaded: OnceLock::new(),
            on_lo: OnceLock::new(),
            since: now(),
            swept: None,
            untold: None,
            told: Default::default(),
            came: Came {
                level: 0,
                counted: 0,
                looked: now(),
            },
            earlier: None,
            listening: Listening::new().ok(),
        })
    }

    /// The same steering, which takes connections into the tunnel that one of the rules names.
    #[must_use]
    pub fn with_outgoing(mut self, rules: Vec<Chosen>) -> Self {
        self.outgoing = rules;
        self
    }

    /// What leaves through the tunnel because of its port.
    pub fn outgoing(&self) -> &[Chosen] {
        &self.outgoing
    }

    /// Replaces the programs by those for other settings, which share the memory of these; what
    /// stands on links stays until it is planned anew. `lo` is given if this server's own calls
    /// want a program there. Where there is to be room for more flows, the known ones are taken
    /// along by [`carry_over`](Self::carry_over).
    ///
    /// # Errors
    /// If the kernel refuses. Everything is as before then.
    pub fn remake(
        &mut self,
        tun: &Link,
        lo: Option<&Link>,
        remade: Remade,
    ) -> Result<(), PlanError> {
        let flows = self.maps.with_room_for(remade.max_flows)?;
        let flows = flows.map(|flows| self.maps.replace_flows(flows));
        let outgoing = std::mem::replace(&mut self.outgoing, remade.outgoing);
        let port = std::mem::replace(&mut self.tunnel_port, remade.tunnel_port);
        let loaded = std::mem::take(&mut self.loaded);
        let on_lo = std::mem::take(&mut self.on_lo);
        let made = self.loaded(tun).map(drop);
        let made = made.and_then(|()| lo.map_or(Ok(()), |lo| self.loaded_on(lo).map(drop)));
        match made {
            Ok(()) => self.earlier = flows.or(self.earlier.take()),
            Err(_) => {
                (self.outgoing, self.tunnel_port) = (outgoing, port);
                (self.loaded, self.on_lo) = (loaded, on_lo);
                if let Some(flows) = flows {
                    self.maps.replace_flows(flows);
                }
            }
        }
        made
    }

    /// Whether there is room for more flows since the last [`remake`](Self::remake), so that the
    /// known ones are to be [carried over](Self::carry_over).
    pub fn carries_over(&self) -> bool {
        self.earlier.is_some()
    }

    /// Takes along what is known of flows, if there is room for more of them since the last
    /// [`remake`](Self::remake). Call it before the programs stand on links, and once more when
    /// they do: `then` nobody enters anything any more where it came from, and that is given back.
    /// In between no flow may [open](crate::flow::translate::Translator::pause): one program would
    /// enter it here and another one look for it there.
    ///
    /// # Errors
    /// If the kernel refuses. Some of it may be known here then.
    pub fn carry_over(&mut self, then: bool) -> Result<(), BpfError> {
        let Some(earlier) = self.earlier.take() else {
            return Ok(());
        };
        let taken = self.maps.take_over(&earlier);
        if !then {
            self.earlier = Some(earlier);
        }
        taken
    }

    /// What this socket sends is the tunnel's own from now on, and leaves as it is.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_of_tunnel(&self, socket: BorrowedFd<'_>) -> Result<(), BpfError> {
        self.maps.set_of_tunnel(socket)
    }

    /// The flows that an earlier daemon has left, as far as they are `wanted`.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn earlier_flows(
        &self,
        wanted: impl Fn(&HostFlow) -> bool,
    ) -> Result<Vec<HostFlow>, BpfError> {
        if !self.resumes {
            return Ok(Vec::new());
        }
        self.maps.flows(wanted)
    }

    /// Says what addresses are from now on. While it is not `complete`, what had moved to an
    /// earlier daemon counts as moved.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_places(
        &mut self,
        places: &BTreeMap<Prefix, Place>,
        complete: bool,
    ) -> Result<(), BpfError> {
        self.maps.set_places(places, complete)
    }

    /// From now on these are the UDP ports of this host that are named by what has moved, as
    /// [`named_ports`](programs::named_ports) finds them.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn name_ports(&mut self, ports: &BTreeSet<(u16, u16)>) -> Result<(), BpfError> {
        self.maps.name_ports(ports)
    }

    /// From now on this is the control group that a rule names, by its number among them; 0 if
    /// there is none.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_cgroup(&self, rule: u32, id: u64) -> Result<(), BpfError> {
        self.maps.set_cgroup(rule, id)
    }

    /// The changes for the new server: delivery from `tun` to `links`, and on every one of these
    /// the taking of replies. Call it again when the links, their addresses or routes are others.
    ///
    /// The TUN must be up, and the same each time. The first call loads the programs into the
    /// kernel. What the programs know of links changes at once, everything else is a plan.
    ///
    /// # Errors
    /// If the kernel refuses a program, or there is no place for it on an interface.
    #[cfg(test)]
    pub fn plan(
        &self,
        netlink: &Netlink,
        links: &[Link],
        tun: &Link,
    ) -> Result<Vec<Desired>, PlanError> {
        // It has a default route where nothing else has.
        let others = links.iter().filter(|link| link.index != tun.index);
        let links: Vec<Link> = others.cloned().collect();
        self.set_links(&links)?;
        let mut desired = Vec::new();
        // Replies must be taken before anything is delivered.
        for link in &links {
            desired.append(&mut self.on_link(netlink, link, tun, true)?);
        }
        desired.append(&mut self.on_tun(netlink, &links, tun)?);
        Ok(desired)
    }

    /// Tells the programs at which links packets may arrive. The first of them stands for any other
    /// that leads to a client.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_links(&self, links: &[Link]) -> Result<(), PlanError> {
        let entrances = links.iter().map(|link| {
            Ok(Entrance {
                ifindex: link.index,
                l2_header: l2_header(link)?,
                mac: link.mac.unwrap_or_default(),
            })
        });
        let entrances = entrances.collect::<Result<Vec<_>, PlanError>>()?;
        Ok(self.maps.set_links(&entrances)?)
    }

    /// The changes to one link. Hosts behind this server use it unless it `leads_to_clients`.
    ///
    /// # Errors
    /// If the kernel refuses a program, or there is no place for it on an interface.
    pub fn on_link(
        &self,
        netlink: &Netlink,
        link: &Link,
        tun: &Link,
        leads_to_clients: bool,
    ) -> Result<Vec<Desired>, PlanError> {
        if link.to_many {
            return Err(PlanError::ToMany(link.name.clone()));
        }
        let l2_header = l2_header(link)?;
        let loaded = self.loaded(tun)?;
        let of_its_kind = |(length, _): &&(u32, _)| *length == l2_header;
        let count = DIRECTIONS.len() - usize::from(leads_to_clients);
        let mut desired = vec![Desired::lasting(clsact(link))];
        for (_, programs) in loaded.on_links.iter().filter(of_its_kind) {
            let places = DIRECTIONS.into_iter().zip(programs);
            for (direction, (name, program)) in places.take(count) {
                let first = behind(desired.iter().map(|it| &it.change), direction);
                let place = filter_from(netlink, link, direction, name, first)?;
                desired.push(Desired::lasting(place).program(copy(name, program)?));
            }
        }
        Ok(desired)
    }

    /// The changes to the TUN, from which packets are delivered to these links.
    ///
    /// # Errors
    /// If the kernel refuses a program, or there is no place for it on an interface.
    pub fn on_tun(
        &self,
        netlink: &Netlink,
        links: &[Link],
        tun: &Link,
    ) -> Result<Vec<Desired>, PlanError> {
        let mut desired = Vec::new();
        let [far_v4, far_v6] = PUBLIC;
        let mut families = vec![(Family::V4, "ipv4", far_v4)];
        if has_ipv6(tun) {
            families.push((Family::V6, "ipv6", far_v6));
        }
        // One link with a default route of each family is always the right one.
        let mut one_way = links.len() == 1;
        for &(family, _, far) in &families {
            let route = netlink.route_get(far, None, None);
            let way_out = route.ok().and_then(|route| route.oif);
            if way_out.is_none_or(|oif| oif == tun.index) {
                one_way = false;
                desired.push(Desired::with_tun(Change::Route(DefaultRoute {
                    family,
                    table: TABLE_MAIN,
                    dev: Some(Interface::from(tun)),
                    metric: LAST_RESORT,
                })));
            }
        }
        // Or the kernel does not tell a program where a route leads: to a client, or to whom it
        // forwards for. With one link that is known, and only the latter are not served.
        for (_, family, _) in families {
            let forwarding = OfLink::new(tun, family, "forwarding");
            if !one_way || forwarding.may_write() {
                desired.push(Desired::with_tun(switched_on(forwarding)));
            }
        }
        let (name, program) = &self.loaded(tun)?.on_tun;
        let place = filter(netlink, tun, Direction::Ingress, name)?;
        desired.push(Desired::with_tun(clsact(tun)));
        desired.push(Desired::with_tun(place).program(copy(name, program)?));
        Ok(desired)
    }

    /// The changes to the loopback interface, where calls are that the kernel keeps here.
    ///
    /// # Errors
    /// If the kernel refuses the program, or there is no place for it.
    pub fn on_loopback(&self, netlink: &Netlink, lo: &Link) -> Result<Vec<Desired>, PlanError> {
        let (name, program) = self.loaded_on(lo)?;
        loopback::plan(netlink, lo, copy(name, program)?)
    }

    fn loaded_on(&self, lo: &Link) -> Result<&(&'static str, OwnedFd), PlanError> {
        if let Some(loaded) = self.on_lo.get() {
            return Ok(loaded);
        }
        let program = programs::loopback(&self.maps, loopback::accepts_local(lo))?;
        let loaded = (program.name(), program.load()?);
        Ok(self.on_lo.get_or_init(|| loaded))
    }

    /// From now on such calls are delivered so.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn deliver_own_calls(&self, peers: &[PeerTargets<'_>]) -> Result<(), BpfError> {
        self.maps.loopback().deliver(peers)
    }

    /// From now on this is served here, of each peer, and those inside that call it get it here.
    /// Returns the places of those peers of which not all fits.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn serve_inside(&self, of_peers: &[Vec<&Move>]) -> Result<Vec<usize>, BpfError> {
        self.maps.inside().serve(of_peers)
    }

    /// Whether something is served inside only because an earlier daemon served it.
    pub fn inherits_inside(&self) -> bool {
        self.maps.inside().inherits()
    }

    /// The calls from inside that an earlier daemon carried, as far as they are known.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn calls_from_inside(&self) -> Result<Vec<HostFlow>, BpfError> {
        self.maps.inside().calls()
    }

    /// The memory that the next daemon needs, if this one is killed.
    pub fn memory(&self) -> Vec<BorrowedFd<'_>> {
        self.maps.lasting()
    }

    /// Keeps the memory of flows as small as the daemon's own: forgets those that `ended`. If there
    /// were more of which nobody could be told, it looks for them from now on. Call it every tenth
    /// of a second.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn forget(
        &mut self,
        ended: &[HostFlow],
        more: bool,
        knows: impl Fn(&HostFlow) -> bool,
    ) -> Result<(), BpfError> {
        let came = self.maps.count(Counter::Came);
        if let Some(pressed) = self.came.turns(now(), came) {
            self.maps.set_pressed(pressed);
        }
        self.maps.forget(ended)?;
        if more {
            self.untold.get_or_insert(None);
        }
        if let Some(place) = &mut self.untold {
            self.maps.sweep_untold(self.since, place, knows)?;
            if place.is_none() {
                self.untold = None;
            }
        }
        Ok(())
    }

    /// Forgets by and by the flows of an earlier daemon that this one never came to `know`. Call it
    /// every second.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn sweep(&mut self, knows: impl Fn(&HostFlow) -> bool) -> Result<(), BpfError> {
        self.maps.sweep(&mut self.swept, &knows)?;
        self.maps.sweep_shifted(now(), self.since, knows)
    }

    /// What the programs have dropped since the last call.
    pub fn take_drops(&mut self) -> [(DropReason, u64); DROPS.len()] {
        let mut told = self.told.iter_mut();
        DROPS.map(|(counter, reason)| {
            let count = self.maps.count(counter);
            let before = told.next().map_or(0, |told| std::mem::replace(told, count));
            (reason, count.saturating_sub(before))
        })
    }

    /// How many conversations came directly to each end of this host since this daemon started, by
    /// protocol.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn came_directly(&self) -> Result<Vec<(u8, SocketAddr, u64)>, BpfError> {
        self.maps.came_directly()
    }

    /// Whether something on this host waits for what comes to this end by one of the links; `None`
    /// if that cannot be known.
    pub fn listens(&self, protocol: u8, end: SocketAddr, links: &[u32]) -> Option<bool> {
        self.listening.as_ref()?.at(protocol, end, links)
    }

    /// Loads all programs but that of the loopback interface, which otherwise waits until they are
    /// wanted.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn load_all(&self, tun: &Link) -> Result<(), PlanError> {
        self.loaded(tun).map(drop)
    }

    fn loaded(&self, tun: &Link) -> Result<&Loaded, PlanError> {
        if let Some(loaded) = self.loaded.get() {
            return Ok(loaded);
        }
        let Self {
            maps,
            tunnel_port,
            outgoing,
            ..
        } = self;
        let load = |program: Program| Ok::<_, BpfError>((program.name(), program.load()?));
        let of = |l2_header| {
            let replies = take_replies(maps, l2_header, tun.index, *tunnel_port, outgoing)?;
            let arrivals = arrivals(maps, l2_header, *tunnel_port)?;
            let callers = callers(maps, l2_header, tun.index)?;
            let all = [load(replies)?, load(arrivals)?, load(callers)?];
            Ok::<_, BpfError>((l2_header, all))
        };
        let loaded = Loaded {
            on_links: [of(0)?, of(ETHERNET_HEADER)?],
            on_tun: load(deliver(maps, tun.index)?)?,
        };
        Ok(self.loaded.get_or_init(|| loaded))
    }
}

/// Where the programs of a link stand, in their order. The last is for links without clients.
const DIRECTIONS: [Direction; 3] = [Direction::Egress, Direction::Ingress, Direction::Ingress];

fn copy(name: &'static str, program: &OwnedFd) -> Result<OwnedFd, PlanError> {
    program
        .try_clone()
        .map_err(|source| PlanError::Bpf(BpfError::Descriptor { name, source }))
}

/// Whether the kernel routes IPv6 into the TUN.
fn has_ipv6(tun: &Link) -> bool {
    let disabled = OfLink::new(tun, "ipv6", "disable_ipv6").value();
    disabled.is_ok_and(|value| value == "0")
}

/// Switches a setting on. If we cannot read it we write it anyway, and the kernel says why not.
fn switched_on(setting: OfLink) -> Change {
    Change::Sysctl(Sysctl {
        from: setting.value().unwrap_or_default(),
        to: "1".to_owned(),
        path: setting.path,
        on: None,
    })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
    use std::os::fd::{AsFd, AsRawFd};

    use etherparse::{Icmpv4Type, Icmpv6Type, PacketBuilder, PacketBuilderStep, SlicedPacket};
    use etherparse::{IpNumber, TransportSlice};

    use super::*;
    use crate::kernel::Host;
    use crate::kernel::plan::carriers;
    use crate::kernel::testing::{
        Router, Scratch, Tun, bound, delete_link, in_fresh_namespace, strict_rp_filter, uplink,
    };

    const HERE: [(&str, u8); 2] = [("198.51.100.2", 24), ("2001:db8:b::2", 64)];
    const GATEWAYS: [(&str, u8); 2] = [("198.51.100.1", 24), ("2001:db8:b::1", 64)];
    const CLIENTS: [&str; 2] = ["203.0.113.7", "2001:db8:c::7"];

    /// The new server, steering, under strict reverse path filtering.
    struct NewServer {
        tun: Tun,
        router: Router,
        steering: Steering,
        host: Host,
        _scratch: Scratch,
    }

    impl NewServer {
        fn new(offload: bool) -> Self {
            Self::with_outgoing(offload, Vec::new())
        }

        fn with_outgoing(offload: bool, rules: Vec<Chosen>) -> Self {
            strict_rp_filter();
            let netlink = Netlink::new().unwrap();
            let router = Router::new(&netlink, &HERE, &GATEWAYS);
            let tun = Tun::new(&netlink, "tun0", offload);
            strict_rp_filter();
            let scratch = Scratch::new();
            let mut host = Host::open(&scratch.0).unwrap();
            let uplinks = carriers(&netlink, &tun.link).unwrap();
            assert_eq!(uplinks, std::slice::from_ref(&router.uplink));
            let steering = Steering::new(&netlink, &uplinks, 51820, 1000, &[]).unwrap();
            let steering = steering.with_outgoing(rules);
            let desired = steering.plan(&netlink, &uplinks, &tun.link).unwrap();
            host.reconcile(desired).unwrap();
            Self {
                tun,
                router,
                steering,
                host,
                _scratch: scratch,
            }
        }
    }

    fn ip(src: &str, dst: &str) -> PacketBuilderStep<etherparse::IpHeaders> {
        use etherparse::{IpHeaders, Ipv4Header, Ipv6FlowLabel, Ipv6Header};
        let header = match (src.parse().unwrap(), dst.parse().unwrap()) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let mut header = Ipv4Header::new(0, 60, IpNumber::UDP, src.octets(), dst.octets());
                header.as_mut().unwrap().dont_fragment = true;
                IpHeaders::Ipv4(header.unwrap(), etherparse::Ipv4Extensions::default())
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let header = Ipv6Header {
                    traffic_class: 0,
                    flow_label: Ipv6FlowLabel::ZERO,
                    payload_length: 0,
                    next_header: IpNumber::UDP,
                    hop_limit: 60,
                    source: src.octets(),
                    destination: dst.octets(),
                };
                IpHeaders::Ipv6(header, etherparse::Ipv6Extensions::default())
            }
            _ => panic!("mixed families"),
        };
        PacketBuilder::ip(header)
    }

    fn udp(src: &str, src_port: u16, dst: &str, dst_port: u16, payload: &[u8]) -> Vec<u8> {
        let mut packet = Vec::new();
        let builder = ip(src, dst).udp(src_port, dst_port);
        builder.write(&mut packet, payload).unwrap();
        packet
    }

    /// Whether a packet goes to `client`; for a UDP packet also its payload.
    fn goes_to(packet: &[u8], client: &str) -> bool {
        let dst: IpAddr = match packet[0] >> 4 {
            4 => <[u8; 4]>::try_from(&packet[16..20]).unwrap().into(),
            _ => <[u8; 16]>::try_from(&packet[24..40]).unwrap().into(),
        };
        dst == client.parse::<IpAddr>().unwrap()
    }

    fn socket_addr(addr: &str, port: u16) -> SocketAddr {
        SocketAddr::new(addr.parse().unwrap(), port)
    }

    #[test]
    fn udp_replies_go_back_into_the_tun_and_direct_ones_do_not() {
        in_fresh_namespace(|| {
            let b = NewServer::new(false);
            for ((here, _), (gateway, client)) in HERE
                .into_iter()
                .zip(GATEWAYS.map(|g| g.0).into_iter().zip(CLIENTS))
            {
                let server = bound(socket_addr(here, 53));
                b.tun.write(&udp(client, 4000, here, 53, b"question"));
                let mut buffer = [0; 100];
                let (length, from) = server.recv_from(&mut buffer).expect("the stack takes it");
                assert_eq!(
                    (&buffer[..length], from),
                    (&b"question"[..], socket_addr(client, 4000))
                );
                b.router.has_seen(b"forget what came");

                server.send_to(b"an unconnected answer", from).unwrap();
                let (_, packet) = b.tun.read(|p| goes_to(p, client)).expect("steered");
                let sliced = SlicedPacket::from_ip(&packet).unwrap();
                let Some(TransportSlice::Udp(reply)) = sliced.transport else {
                    panic!("{packet:02x?}")
                };
                assert_eq!((reply.source_port(), reply.destination_port()), (53, 4000));
                assert_eq!(reply.payload(), b"an unconnected answer");

                let connected = server.try_clone().unwrap();
                connected.connect(from).unwrap();
                connected.send(b"a connected answer").unwrap();
                assert!(b.tun.read(|p| goes_to(p, client)).is_some());
                assert!(!b.router.has_seen(b"nected answer"));
                drop((connected, server));

                // A client that comes directly, and a port from which nobody has sent a request.
                let server = bound(socket_addr(here, 53));
                let direct = b.router.udp(&socket_addr(gateway, 4001).to_string());
                direct
                    .send_to(b"direct question", socket_addr(here, 53))
                    .unwrap();
                let (_, from) = server.recv_from(&mut buffer).unwrap();
                server.send_to(b"direct answer", from).unwrap();
                assert_eq!(direct.recv(&mut buffer).unwrap(), 13);
                server
                    .send_to(b"an unasked one", socket_addr(client, 4002))
                    .unwrap();
                assert!(b.tun.read(|p| goes_to(p, client)).is_none());
                assert!(b.router.has_seen(b"an unasked one"));
            }
        });
    }

    #[test]
    fn the_tunnels_own_sockets_alone_send_what_is_left_alone() {
        in_fresh_namespace(|| {
            let b = NewServer::new(false);
            for ((here, _), client) in HERE.into_iter().zip(CLIENTS) {
                let (here, client_end) = (socket_addr(here, 51820), socket_addr(client, 51820));
                let question = udp(client, 51820, &here.ip().to_string(), 51820, b"question");
                let server = bound(here);
                b.tun.write(&question);
                server.recv_from(&mut [0; 100]).expect("the stack takes it");
                server.send_to(b"an answer", client_end).unwrap();
                assert!(b.tun.read(|p| goes_to(p, client)).is_some());
                assert!(!b.router.has_seen(b"an answer"));
                drop(server);
                let tunnel = bound(here);
                b.steering.set_of_tunnel(tunnel.as_fd()).unwrap();
                tunnel.send_to(b"sealed", client_end).unwrap();
                assert!(b.router.has_seen(b"sealed"));
                assert!(b.tun.read(|p| goes_to(p, client)).is_none());
            }
        });
    }

    #[test]
    fn what_came_when_nobody_waited_diverts_nothing_that_a_rule_names() {
        in_fresh_namespace(|| {
            let rule = Chosen {
                ports: "5060/udp".parse().unwrap(),
                user: None,
                cgroup_depth: None,
            };
            let mut b = NewServer::with_outgoing(false, vec![rule]);
            let own = |(addr, _): (&str, u8)| (addr.parse().unwrap(), Place::OWN);
            let moved = |text: &str| (text.parse().unwrap(), Place::MOVED);
            let places = HERE.map(own).into_iter();
            let places = places.chain(["192.0.2.5", "2001:db8:a::5"].map(moved));
            b.steering.set_places(&places.collect(), true).unwrap();
            for ((here, _), (gateway, _)) in HERE.into_iter().zip(GATEWAYS) {
                let far = b.router.udp(&socket_addr(gateway, 5060).to_string());
                far.send_to(b"early", socket_addr(here, 5060)).unwrap();
                let phone = bound(socket_addr(here, 5060));
                for _ in 0..2 {
                    phone
                        .send_to(b"register", socket_addr(gateway, 5060))
                        .unwrap();
                    assert!(b.tun.read(|p| goes_to(p, gateway)).is_some());
                }
                assert!(!b.router.has_seen(b"register"));
                // Who is waited for is answered as before.
                let server = bound(socket_addr(here, 5061));
                far.send_to(b"question", socket_addr(here, 5061)).unwrap();
                let (_, from) = server.recv_from(&mut [0; 100]).unwrap();
                server.send_to(b"an answer", from).unwrap();
                assert!(b.tun.read(|p| goes_to(p, gateway)).is_none());
                assert!(b.router.has_seen(b"an answer"));
            }
        });
    }

    #[test]
    fn replies_of_sixty_thousand_bytes_are_steered_fragment_by_fragment() {
        in_fresh_namespace(|| {
            let b = NewServer::new(false);
            for ((here, _), client) in HERE.into_iter().zip(CLIENTS) {
                let server = bound(socket_addr(here, 53));
                b.tun.write(&udp(client, 4000, here, 53, b"question"));
                let (_, from) = server.recv_from(&mut [0; 100]).unwrap();
                let answer = vec![0xa5; 60_000];
                server.send_to(&answer, from).unwrap();
                let mut seen = 0;
                while let Some((_, packet)) = b.tun.read(|p| goes_to(p, client)) {
                    seen += packet.iter().filter(|&&byte| byte == 0xa5).count();
                    if seen >= answer.len() {
                        break;
                    }
                }
                assert!(seen >= answer.len(), "{seen} bytes");
                assert!(!b.router.has_seen(&[0xa5; 100]));
            }
        });
    }

    #[test]
    #[allow(unsafe_code, reason = "setsockopt(UDP_SEGMENT)")]
    fn a_super_packet_of_the_application_arrives_whole() {
        in_fresh_namespace(|| {
            let segment: libc::c_int = 1200;
            let b = NewServer::new(true);
            for ((here, _), client) in HERE.into_iter().zip(CLIENTS) {
                let server = bound(socket_addr(here, 53));
                b.tun.write(&udp(client, 4000, here, 53, b"question"));
                let (_, from) = server.recv_from(&mut [0; 100]).unwrap();
                // SAFETY: the option's value is an int, and the kernel reads no more.
                let result = unsafe {
                    libc::setsockopt(
                        server.as_raw_fd(),
                        libc::SOL_UDP,
                        libc::UDP_SEGMENT,
                        (&raw const segment).cast(),
                        size_of::<libc::c_int>() as libc::socklen_t,
                    )
                };
                assert_eq!(result, 0);
                server.send_to(&[0x5a; 12_000], from).unwrap();
                let (header, packet) = b.tun.read(|p| goes_to(p, client)).expect("steered");
                let headers = if here.contains(':') { 48 } else { 28 };
                const NEEDS_CSUM: u8 = 1;
                const GSO_UDP_L4: u8 = 5;
                assert_eq!(packet.len(), headers + 12_000);
                assert_eq!((header[0], header[1]), (NEEDS_CSUM, GSO_UDP_L4));
                assert_eq!(u16::from_le_bytes([header[4], header[5]]), 1200);
                assert!(!b.router.has_seen(&[0x5a; 100]));
            }
        });
    }

    #[test]
    fn tcp_and_icmp_replies_go_back_into_the_tun() {
        in_fresh_namespace(|| {
            let b = NewServer::new(false);
            for ((here, _), client) in HERE.into_iter().zip(CLIENTS) {
                let _listener = TcpListener::bind(socket_addr(here, 80)).unwrap();
                for (port, flag) in [(80, "SYN-ACK"), (81, "RST")] {
                    let mut syn = Vec::new();
                    let builder = ip(client, here).tcp(4000, port, 1000, 64_000).syn();
                    builder.write(&mut syn, &[]).unwrap();
                    b.tun.write(&syn);
                    let (_, packet) = b.tun.read(|p| goes_to(p, client)).expect(flag);
                    let sliced = SlicedPacket::from_ip(&packet).unwrap();
                    let Some(TransportSlice::Tcp(tcp)) = sliced.transport else {
                        panic!("{packet:02x?}")
                    };
                    assert_eq!((tcp.syn(), tcp.rst()), (port == 80, port == 81));
                }
                // A closed UDP port.
                b.tun.write(&udp(client, 4000, here, 9, b"anybody?"));
                let (_, packet) = b
                    .tun
                    .read(|p| goes_to(p, client))
                    .expect("port unreachable");
                let sliced = SlicedPacket::from_ip(&packet).unwrap();
                match sliced.transport {
                    Some(TransportSlice::Icmpv4(icmp)) => {
                        assert!(matches!(
                            icmp.icmp_type(),
                            Icmpv4Type::DestinationUnreachable(_)
                        ));
                    }
                    Some(TransportSlice::Icmpv6(icmp)) => {
                        assert!(matches!(
                            icmp.icmp_type(),
                            Icmpv6Type::DestinationUnreachable(_)
                        ));
                    }
                    other => panic!("{other:?}"),
                }
                // Ping.
                let mut ping = Vec::new();
                if here.contains(':') {
                    let builder = ip(client, here).icmpv6_echo_request(7, 1);
                    builder.write(&mut ping, b"ping").unwrap();
                } else {
                    let builder = ip(client, here).icmpv4_echo_request(7, 1);
                    builder.write(&mut ping, b"ping").unwrap();
                }
                b.tun.write(&ping);
                assert!(
                    b.tun
                        .read(|p| goes_to(p, client) && p.ends_with(b"ping"))
                        .is_some()
                );
            }
        });
    }

    #[test]
    fn after_a_crash_replies_fall_silent_until_the_next_daemon_takes_over() {
        in_fresh_namespace(|| {
            let mut b = NewServer::new(false);
            let clients = HERE.into_iter().zip(CLIENTS);
            let mut talks: Vec<_> = Vec::new();
            for ((here, _), client) in clients {
                let server = bound(socket_addr(here, 53));
                b.tun.write(&udp(client, 4000, here, 53, b"question"));
                let (_, from) = server.recv_from(&mut [0; 100]).unwrap();
                talks.push((server, from, client));
            }
            // A kill: TUN and lock go, everything else stays.
            drop((b.tun, b.host));
            for (server, from, _) in &talks {
                let _ = server.send_to(b"a late answer", *from);
            }
            assert!(!b.router.has_seen(b"a late answer"));

            let netlink = Netlink::new().unwrap();
            b.tun = Tun::new(&netlink, "tun0", false);
            b.host = Host::open(&b._scratch.0).unwrap();
            let links = std::slice::from_ref(&b.router.uplink);
            let steering = Steering::new(&netlink, links, 51820, 1000, &[]).unwrap();
            let desired = steering.plan(&netlink, links, &b.tun.link).unwrap();
            b.host.reconcile(desired).unwrap();
            for (server, from, client) in &talks {
                server.send_to(b"pushed", *from).unwrap();
                assert!(b.tun.read(|p| goes_to(p, client)).is_some());
            }
            assert!(!b.router.has_seen(b"pushed"));
            // Other measures: nothing is known, and nothing is lost that a client asks for.
            let steering = Steering::new(&netlink, links, 51820, 2000, &[]).unwrap();
            let desired = steering.plan(&netlink, links, &b.tun.link).unwrap();
            b.host.reconcile(desired).unwrap();
            for (server, from, client) in &talks {
                server.send_to(b"unknown", *from).unwrap();
                assert!(b.router.has_seen(b"unknown"), "{client}");
            }
        });
    }

    #[test]
    fn a_plan_can_be_made_again_with_other_links() {
        in_fresh_namespace(|| {
            let mut b = NewServer::new(false);
            let netlink = Netlink::new().unwrap();
            let (here, client) = (HERE[0].0, CLIENTS[0]);
            let server = bound(socket_addr(here, 53));
            b.tun.write(&udp(client, 4000, here, 53, b"question"));
            let (_, from) = server.recv_from(&mut [0; 100]).unwrap();
            let second = uplink(&netlink, "second", &[("10.1.0.2", 24)]);
            let links = carriers(&netlink, &b.tun.link).unwrap();
            assert_eq!(links.len(), 3, "and the other end of the second");
            for _ in 0..2 {
                let desired = b.steering.plan(&netlink, &links, &b.tun.link).unwrap();
                let report = b.host.reconcile(desired).unwrap();
                assert!(
                    report.undone.is_empty() && report.left.is_empty(),
                    "{report:?}"
                );
                server.send_to(b"pushed", from).unwrap();
                assert!(b.tun.read(|p| goes_to(p, client)).is_some());
                // It comes by the link that leads to its client.
                for (client, place) in [(client, "up0"), ("10.1.0.9", "second")] {
                    let bound = bound(socket_addr("0.0.0.0", 54));
                    socket2::SockRef::from(&bound)
                        .bind_device(Some(place.as_bytes()))
                        .unwrap();
                    b.tun.write(&udp(client, 4000, here, 54, b"question"));
                    bound.recv_from(&mut [0; 100]).expect(place);
                }
            }
            delete_link(&netlink, second.index).unwrap();
            let links = carriers(&netlink, &b.tun.link).unwrap();
            let desired = b.steering.plan(&netlink, &links, &b.tun.link).unwrap();
            b.host.reconcile(desired).unwrap();
            b.tun.write(&udp("10.1.0.9", 4000, here, 53, b"question"));
            assert!(server.recv_from(&mut [0; 100]).is_ok());
        });
    }

    #[test]
    fn a_family_without_a_way_out_is_delivered_on_the_tun() {
        for strictness in ["0", "1", "2"] {
            in_fresh_namespace(|| {
                let netlink = Netlink::new().unwrap();
                // No default route of either family.
                let router = Router::new(&netlink, &HERE, &[]);
                let tun = Tun::new(&netlink, "tun0", false);
                for entry in std::fs::read_dir("/proc/sys/net/ipv4/conf").unwrap() {
                    std::fs::write(entry.unwrap().path().join("rp_filter"), strictness).unwrap();
                }
                let scratch = Scratch::new();
                let mut host = Host::open(&scratch.0).unwrap();
                let links = std::slice::from_ref(&router.uplink);
                let steering = Steering::new(&netlink, links, 51820, 1000, &[]).unwrap();
                let desired = steering.plan(&netlink, links, &tun.link).unwrap();
                host.reconcile(desired).unwrap();
                for ((here, _), client) in HERE.into_iter().zip(CLIENTS) {
                    let server = bound(socket_addr(here, 53));
                    tun.write(&udp(client, 4000, here, 53, b"question"));
                    let (_, from) = server.recv_from(&mut [0; 100]).expect(strictness);
                    server.send_to(b"answer", from).unwrap();
                    assert!(tun.read(|p| goes_to(p, client)).is_some());
                }
            });
        }
    }

    #[test]
    fn a_connection_of_this_host_is_not_taken_over() {
        in_fresh_namespace(|| {
            let b = NewServer::new(false);
            for ((here, _), (gateway, _)) in HERE.into_iter().zip(GATEWAYS) {
                let listener = b.router.listen(&socket_addr(gateway, 443).to_string());
                let (mut own, mut far) = (
                    TcpStream::connect(socket_addr(gateway, 443)).unwrap(),
                    listener.accept().unwrap().0,
                );
                let port = own.local_addr().unwrap().port();
                for (syn, flags) in [(true, "SYN"), (false, "ACK")] {
                    let mut forged = Vec::new();
                    let builder = ip(gateway, here).tcp(443, port, 1, 64_000);
                    let builder = if syn { builder.syn() } else { builder.ack(1) };
                    builder.write(&mut forged, &[]).unwrap();
                    b.tun.write(&forged);
                    own.write_all(b"mine").unwrap();
                    let mut buffer = [0; 4];
                    far.read_exact(&mut buffer).expect(flags);
                    // A second connection of the same ports would be another one.
                    let mine = |p: &[u8]| p.windows(4).any(|bytes| bytes == b"mine");
                    let taken = b.tun.read(|p| goes_to(p, gateway) && mine(p));
                    assert!(taken.is_none(), "{flags}");
                }
            }
        });
    }
}
