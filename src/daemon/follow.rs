//! Follows what changes around the daemon: links, addresses, routes, rules, filters and settings,
//! whoever changes them, without a restart.
//!
//! ```text
//! kernel ── events ──► Listener ── at its pace ──► control task ──► Follower
//!                                                                    ├─ programs on new links,
//!                                                                    │  gone ones forgotten
//!                                                                    ├─ the uplinks
//!                                                                    └─ the tunnel's own ends
//! ```
//!
//! Owns the pace of looks, and which links carry the daemon's programs. It does not ask what an
//! event was about: a look finds everything that matters, and changes what differs. So a lost event
//! costs nothing, and an event that the daemon has caused itself costs one look.

use std::collections::BTreeSet;
use std::future::pending;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tracing::{debug, info, warn};

use super::before_ours::BeforeOurs;
use super::facts::of_default_routes;
use super::held::{self, Held};
use super::service::{Result, system, warn_of_left};
use super::setup::{Uplinks, find_uplinks};
use super::warnings::Warnings;
use super::ways_back::{self, Said, WaysBack};
use crate::flow::ended::HostFlow;
use crate::flow::modes::Taken;
use crate::kernel::capture::Capture;
use crate::kernel::netlink::{Address, Direction, Events, Link, Netlink, RouteKind};
use crate::kernel::plan::{self, PlanError};
use crate::kernel::programs::Served;
use crate::kernel::steer::Steering;
use crate::kernel::{Change, Desired, Host, HostError, keep, loopback};
use crate::model::drops::DropReason;
use crate::model::mode::{Mode, ShareKey};
use crate::model::moved::Move;
use crate::model::prefix::Prefix;

/// The least time between two looks. The first event of a burst is answered at once, and whatever
/// comes within this time by one look at its end. It is short, since a link that was made anew
/// carries packets within milliseconds; [`SHARE`] is what keeps looks cheap.
const LEAST_GAP: Duration = Duration::from_millis(5);

/// Looks take one part in so many of the control task's time at most, however fast links come and
/// go, and however many there are.
const SHARE: u32 = 10;

/// How much time looks may take beyond that at once. While a host starts its links come one after
/// the other, and what comes soon after a slow look must not wait for ten times as long: a link
/// without our program answers for the moved address with resets.
const AT_ONCE: Duration = Duration::from_secs(1);

/// Most links that carry the daemon's programs: the uplinks, and of the others those that have been
/// there for longest. A host of containers may have thousands of links, and an address is seldom
/// reached by more than a handful. The kernel lists the qdiscs of all links whenever it is asked
/// for those of one, so that a look at this many takes some 50 ms.
const MAX_LINKS: usize = 256;

/// How the line begins that says so, and the one about a link that cannot carry them.
const TOO_MANY: &str = "too many interfaces";

fn unserved(link: &Link) -> String {
    format!("clients that use {} are not served: ", link.name)
}

/// How the line begins about moved addresses that this server has no longer.
const LOST: &str = "no longer configured on this server: ";

/// How the line begins about a link where nothing can note what this server sends.
const NO_PLACE: &str = "an ingress qdisc of others leaves no place for ipmoved on the way out";

/// When the next look may be.
#[derive(Debug, Default)]
struct Pace {
    /// No sooner than this.
    next: Option<Instant>,
    /// The time that looks have taken beyond their share, and when that was counted.
    owed: (Duration, Option<Instant>),
}

impl Pace {
    /// How long a look at `now` still has to wait.
    fn rest(&self, now: Instant) -> Duration {
        let next = self.next.unwrap_or(now);
        next.saturating_duration_since(now)
    }

    /// A look took from `begun` to `ended`.
    fn looked(&mut self, begun: Instant, ended: Instant) {
        let took = ended.saturating_duration_since(begun);
        let (owed, counted) = self.owed;
        let passed = ended.saturating_duration_since(counted.unwrap_or(begun));
        let owed = owed.saturating_sub(passed / SHARE) + took;
        self.owed = (owed, Some(ended));
        let rest = owed.saturating_sub(AT_ONCE) * SHARE;
        self.next = Some(ended + LEAST_GAP.max(rest));
    }
}

/// Hears of changes, at a pace that the control task can keep.
#[derive(Debug)]
pub(super) struct Listener {
    /// `None` if the kernel tells nothing: then the looks that come by themselves have to do.
    events: Option<AsyncFd<Events>>,
    pace: Pace,
    /// The port ids of the daemon's own sockets, whose doings are no news.
    own: Vec<u32>,
}

impl Listener {
    /// Listens from now on. Call it inside the event loop. `own` are the daemon's own sockets.
    pub(super) fn new<'n>(own: impl IntoIterator<Item = &'n Netlink>) -> Self {
        let events = Events::new()
            .and_then(|events| {
                #[expect(
                    unsafe_code,
                    reason = "tokio cannot know what the descriptor refers to"
                )]
                // SAFETY: `Events` owns its socket, and gives its descriptor as long as it lives.
                let registered =
                    unsafe { AsyncFd::register_with_interest(events, Interest::READABLE) };
                Ok(registered?)
            })
            .map_err(|error| warn!(%error, "the kernel tells of no changes; looking by the clock"))
            .ok();
        Self {
            events,
            pace: Pace::default(),
            own: own.into_iter().map(Netlink::port_id).collect(),
        }
    }

    /// Waits for news, and for as long as the pace wants. Nothing is lost if the caller stops
    /// waiting.
    ///
    /// While it rests it does not even read, so a flood of messages costs nothing: the kernel drops
    /// what does not fit, and says so.
    pub(super) async fn news(&mut self) {
        loop {
            tokio::time::sleep(self.pace.rest(Instant::now())).await;
            let Some(events) = &mut self.events else {
                return pending().await;
            };
            let ready = events.readable_mut().await;
            let begun = Instant::now();
            let heard = match ready {
                Ok(mut ready) => ready.try_io(|events| events.get_mut().read(&self.own)),
                Err(error) => Ok(Err(error)),
            };
            match heard {
                Ok(Ok(true)) => return,
                Ok(Ok(false)) => self.looked(begun, Instant::now()),
                Err(_nothing_was_there) => {}
                Ok(Err(error)) => {
                    warn!(%error, "the kernel tells of changes no more; looking by the clock");
                    self.events = None;
                }
            }
        }
    }

    /// A look took from `begun` to `ended`.
    pub(super) fn looked(&mut self, begun: Instant, ended: Instant) {
        self.pace.looked(begun, ended);
        if let Some(events) = &self.events {
            let counts = events.get_ref().counts();
            debug!(counts.read, counts.overrun, "the kernel told of changes");
        }
    }
}

/// The programs of this server, by its role.
#[derive(Debug)]
pub(super) enum Programs {
    /// Of the old server.
    Old(Box<Capture>),
    /// Of the new server.
    New(Box<Steering>),
}

/// What the settings say about links.
#[derive(Debug)]
pub(super) struct LinkSettings {
    /// The one of `--uplink`.
    pub(super) named: Option<String>,
    /// What has moved (old server).
    pub(super) moves: Vec<Move>,
    /// The address of `--listen`; `None` is any.
    pub(super) listen: Option<IpAddr>,
    /// Whether a moved address is held here for a peer (`--deliver-to keep`, `--outgoing`).
    pub(super) keeps: bool,
    /// Whether that is so where packets are delivered to another address.
    pub(super) calls_itself: bool,
}

/// Keeps the daemon's programs where packets are.
#[derive(Debug)]
pub(super) struct Follower {
    settings: LinkSettings,
    programs: Programs,
    tun: Link,
    /// The links that carry our programs, as they were when they got them.
    carrying: Vec<Link>,
    /// The interfaces that clients' packets use, as they are or, if they are gone, were.
    uplinks: Uplinks,
    /// The links that the default routes leave by, or left by last (new server).
    ways_out: Vec<u32>,
    /// Whether they are there.
    there: bool,
    /// How many links there are beyond [`MAX_LINKS`], and how many there were at the last look.
    beyond: usize,
    told_beyond: usize,
    /// The moved addresses that this server has, or had; and those that it has no longer (old
    /// server).
    had: BTreeSet<Prefix>,
    lost: Vec<Prefix>,
    /// Every link of the last look.
    links: Vec<(u32, String)>,
    /// What was last planned for the TUN.
    on_tun: Vec<Change>,
    /// Filters of others that were seen before ours, and how to list them.
    before_ours: Vec<BeforeOurs>,
    /// What this host's rules mean for replies, and what was said of it (old server).
    ways_back: WaysBack,
    told_of_ways: Vec<Said>,
}

impl Follower {
    /// Makes everything on the TUN, and puts the programs on every link that is there. A link that
    /// cannot carry them is left out, with a warning, unless it is an uplink.
    ///
    /// # Errors
    /// If it cannot be done on the TUN or an uplink.
    pub(super) fn start(
        settings: LinkSettings,
        programs: Programs,
        tun: Link,
        uplinks: Uplinks,
        host: &mut Host,
    ) -> Result<Self> {
        let mut follower = Self {
            settings,
            programs,
            tun,
            carrying: Vec::new(),
            there: uplinks.first().is_some(),
            uplinks,
            ways_out: Vec::new(),
            beyond: 0,
            told_beyond: 0,
            had: BTreeSet::new(),
            lost: Vec::new(),
            links: Vec::new(),
            on_tun: Vec::new(),
            before_ours: Vec::new(),
            ways_back: WaysBack::default(),
            told_of_ways: Vec::new(),
        };
        follower.look_for_ways_out(host.netlink());
        let addresses = host.netlink().addresses().map_err(system)?;
        follower.tell_programs(&addresses);
        follower.look_for_ways_back(host.netlink(), &addresses);
        let there = host.netlink().links().map_err(system)?;
        let mut links = follower.wanted(&there);
        let calls_itself = follower.settings.calls_itself;
        let mut lo = there.iter().find(|link| calls_itself && link.loopback);
        loop {
            // All in one step, so that what a killed predecessor left is taken over without a gap.
            let mut desired = Vec::new();
            let mut captures = Vec::new();
            let mut carrying = Vec::new();
            for link in links {
                match follower.on_link(host.netlink(), &link) {
                    Ok(mut changes) => {
                        if let Programs::Old(_) = follower.programs {
                            captures.extend(changes.pop());
                        }
                        desired.extend(changes);
                        carrying.push(link);
                    }
                    Err(error) if follower.uplinks.contains(link.index) => {
                        return Err(system(error));
                    }
                    Err(error) => not_served(&link, &error.to_string()),
                }
            }
            let on_tun = follower.on_tun(host.netlink(), &carrying).map_err(system)?;
            let changes = on_tun.iter().map(|desired| desired.change.clone());
            follower.on_tun = changes.collect();
            match follower.programs {
                // Captured packets may get replies at once,
                Programs::Old(_) => drop(desired.splice(0..0, on_tun)),
                // and delivered ones, too: they must be taken by then.
                Programs::New(_) => desired.extend(on_tun),
            }
            if let (Some(link), Programs::New(steering)) = (lo, &follower.programs) {
                match steering.on_loopback(host.netlink(), link) {
                    Ok(changes) => desired.extend(changes),
                    Err(error) => calls_stay(&error.to_string()),
                }
            }
            if follower.settings.keeps {
                // The peers will say which of them are still wanted.
                let left = host.made().iter().filter(|change| keep::is_part(change));
                desired.extend(left.cloned().map(Desired::lasting));
            }
            let mut noted = Ok(());
            let note_older = |netlink: &Netlink| {
                if let Programs::Old(capture) = &follower.programs {
                    noted = capture.note_older(netlink, &follower.settings.moves);
                }
            };
            let error = match host.reconcile_around(desired, note_older, captures) {
                Ok(report) => {
                    noted.map_err(system)?;
                    warn_of_left(&report);
                    follower.carrying = carrying;
                    follower.warn_of_routes(host.netlink());
                    return Ok(follower);
                }
                Err(error) => error,
            };
            let HostError::Refused { change, .. } = &error else {
                return Err(error.into());
            };
            let on = |link: &Link| change.interface() == Some(link.index);
            if lo.is_some_and(on) {
                calls_stay(&error.to_string());
                lo = None;
                links = carrying;
                continue;
            }
            let other = |link: &&Link| on(link) && !follower.uplinks.contains(link.index);
            match carrying.iter().find(other) {
                Some(link) => not_served(link, &error.to_string()),
                None => return Err(error.into()),
            }
            carrying.retain(|link| !on(link));
            links = carrying;
        }
    }

    /// Warns if replies cannot follow routes. (With an uplink in the settings they need not.)
    fn warn_of_routes(&self, netlink: &Netlink) {
        let Programs::Old(capture) = &self.programs else {
            return;
        };
        if self.settings.named.is_none() && !capture.follows_routes(netlink) {
            warn!(
                uplink = self.uplink_name(),
                "every reply leaves by this interface, since net.ipv4.conf.lo.forwarding cannot be \
                 set here; if clients come by others, run `sysctl -w \
                 net.ipv4.conf.lo.forwarding=1 net.ipv6.conf.lo.forwarding=1` on the host (with \
                 `--network host`), or give a container with a network of its own `docker run \
                 --sysctl net.ipv4.conf.lo.forwarding=1 --sysctl net.ipv6.conf.lo.forwarding=1`"
            );
        }
    }

    /// The programs.
    pub(super) fn programs(&mut self) -> &mut Programs {
        &mut self.programs
    }

    /// The programs that note what this server has itself stand on every link from now on, and
    /// after `between` those that capture, or deliver.
    pub(super) fn set_programs(
        &mut self,
        now: Instant,
        host: &mut Host,
        programs: Option<Programs>,
        settings: LinkSettings,
        between: impl FnOnce(&Programs),
        known: &mut Warnings,
    ) {
        let replaced = programs.map(|programs| std::mem::replace(&mut self.programs, programs));
        self.set_settings(now, host, settings, known);
        let links = self.carrying.clone();
        if let Programs::Old(_) = self.programs {
            // All but the captures, which stay those of before.
            for link in &links {
                let Ok(mut desired) = self.on_link(host.netlink(), link) else {
                    continue;
                };
                desired.pop();
                let changes: Vec<Change> = desired.iter().map(|it| it.change.clone()).collect();
                let of_these = |change: &Change| changes.iter().any(|it| it.same_object(change));
                if let Err(error) = host.reconcile_part(of_these, desired) {
                    known.warn(now, format!("{}: {error}", link.name));
                }
            }
        }
        between(&self.programs);
        for link in &links {
            let desired = self.on_link(host.netlink(), link);
            self.put(now, host, link, desired, known);
        }
        self.plan_for_tun(now, host, true, known);
        if self.settings.calls_itself {
            self.put_on_loopback(now, host, known);
        }
        drop(replaced);
    }

    /// From now on the settings say this about links. What the programs can do stays as it is.
    pub(super) fn set_settings(
        &mut self,
        now: Instant,
        host: &mut Host,
        settings: LinkSettings,
        known: &mut Warnings,
    ) {
        let before = std::mem::replace(&mut self.settings, settings);
        match host.netlink().addresses() {
            Ok(addresses) => {
                self.tell_programs(&addresses);
                self.look_for_ways_back(host.netlink(), &addresses);
            }
            Err(error) => warn!(%error, "cannot list this server's addresses"),
        }
        if before.calls_itself && !self.settings.calls_itself {
            self.put_on_loopback(now, host, known);
        }
    }

    /// Makes, or undoes, what is wanted on the loopback interface.
    fn put_on_loopback(&self, now: Instant, host: &mut Host, known: &mut Warnings) {
        let Programs::New(steering) = &self.programs else {
            return;
        };
        let links = host.netlink().links().unwrap_or_default();
        let Some(lo) = links.iter().find(|link| link.loopback) else {
            return;
        };
        let wanted = self.settings.calls_itself;
        let desired = match wanted.then(|| steering.on_loopback(host.netlink(), lo)) {
            None => Vec::new(),
            Some(Ok(desired)) => desired,
            Some(Err(error)) => return calls_stay(&error.to_string()),
        };
        // What is held there is another one's business.
        let on_lo = |change: &Change| loopback::is_part(change, lo);
        if let Err(error) = host.reconcile_part(on_lo, desired) {
            known.warn(now, format!("{}: {error}", lo.name));
        }
    }

    /// The name of the first uplink, for people.
    pub(super) fn uplink_name(&self) -> &str {
        let first = self.uplinks.first();
        first.map_or("(none yet)", |link| &link.name)
    }

    /// Whether there is an uplink.
    pub(super) fn leads_out(&self) -> bool {
        self.there
    }

    /// The interfaces that clients' packets use, as they are or, if they are gone, were.
    pub(super) fn uplinks(&self) -> &Uplinks {
        &self.uplinks
    }

    /// The links that the default routes leave by, or left by last (new server).
    pub(super) fn ways_out(&self) -> &[u32] {
        &self.ways_out
    }

    /// Whether clients may be where this link leads.
    fn leads_to_clients(&self, index: u32) -> bool {
        self.uplinks.contains(index) || self.ways_out.contains(&index)
    }

    /// Looks where the default routes leave. While there is none, the links are those of before.
    fn look_for_ways_out(&mut self, netlink: &Netlink) {
        if matches!(self.programs, Programs::New(_)) {
            let found = of_default_routes(netlink, &self.tun);
            if !found.is_empty() {
                self.ways_out = found;
            }
        }
    }

    /// The memory of the programs, for the next daemon.
    pub(super) fn memory(&self) -> Vec<BorrowedFd<'_>> {
        match &self.programs {
            Programs::Old(capture) => capture.memory(),
            Programs::New(steering) => steering.memory(),
        }
    }

    /// The programs of the new server.
    pub(super) fn steering(&mut self) -> Option<&mut Steering> {
        match &mut self.programs {
            Programs::Old(_) => None,
            Programs::New(steering) => Some(steering),
        }
    }

    /// Looks at links, routes and addresses, and brings the programs to where packets are now;
    /// whether there are other links than at the last look.
    pub(super) fn look(
        &mut self,
        now: Instant,
        host: &mut Host,
        peers: &[IpAddr],
        addresses: &[Address],
        known: &mut Warnings,
    ) -> bool {
        let before = (self.uplinks.clone(), self.ways_out.clone());
        self.look_for_uplinks(now, host.netlink(), peers, known);
        self.look_for_ways_out(host.netlink());
        self.tell_programs(addresses);
        let links = match host.netlink().links() {
            Ok(links) => links,
            Err(error) => {
                warn!(%error, "cannot list this server's interfaces");
                return false;
            }
        };
        let wanted = self.wanted(&links);
        self.look_for_beyond(now, known);
        self.look_for_lost(now, host.netlink(), addresses, known);
        // A link that is down, or without an address for a moment, keeps its programs.
        let there = |known: &&Link| {
            let mut links = links.iter();
            let stays = |link: &Link| !link.port || self.uplinks.contains(link.index);
            links.any(|link| link.index == known.index && stays(link))
        };
        let gone: Vec<Link> = self
            .carrying
            .iter()
            .filter(|it| !there(it))
            .cloned()
            .collect();
        for link in gone {
            info!(
                interface = link.name,
                "clients no longer use this interface"
            );
            self.put(now, host, &link, Ok(Vec::new()), known);
        }
        for link in wanted {
            let is_new = !self.carrying.iter().any(|known| is_same(known, &link));
            // Then it has other programs.
            let led = before.0.contains(link.index) || before.1.contains(&link.index);
            let has_turned = led != self.leads_to_clients(link.index);
            if is_new || has_turned {
                let desired = self.on_link(host.netlink(), &link);
                self.put(now, host, &link, desired, known);
            }
        }
        // After the links, since one without our program answers for a moved address with resets.
        self.look_for_ways_back(host.netlink(), addresses);
        self.tell_of_ways_back(now, known);
        self.look_at_tun(now, host, known);
        self.look_for_others(now, host.netlink(), known);
        self.look_for_unnoted(now, host.netlink(), known);
        let named = |link: Link| (link.index, link.name);
        let links: Vec<_> = links.into_iter().map(named).collect();
        let others = links != self.links;
        self.links = links;
        others
    }

    /// Makes a new plan for the TUN, if links or routes ask for it.
    fn look_at_tun(&mut self, now: Instant, host: &mut Host, known: &mut Warnings) {
        self.plan_for_tun(now, host, false, known);
    }

    /// The same, also if there are `other` programs for what is planned.
    fn plan_for_tun(&mut self, now: Instant, host: &mut Host, other: bool, known: &mut Warnings) {
        let desired = match self.on_tun(host.netlink(), &self.carrying) {
            Ok(desired) => desired,
            Err(error) => {
                let text = format!("the programs do not know of every interface: {error}");
                known.warn(now, text);
                if other {
                    // The next look makes good for it.
                    self.on_tun.clear();
                }
                return;
            }
        };
        let mut both = self.on_tun.iter().zip(&desired);
        let same = both.all(|(planned, desired)| planned.same_object(&desired.change));
        if same && self.on_tun.len() == desired.len() && !other {
            return;
        }
        let changes: Vec<Change> = desired.iter().map(|it| it.change.clone()).collect();
        // What was planned before and is not wanted any more goes with the TUN.
        let before = std::mem::replace(&mut self.on_tun, changes);
        let of_tun = |change: &Change| {
            let mut planned = before.iter().chain(&self.on_tun);
            planned.any(|planned| planned.same_object(change))
        };
        if let Err(error) = host.reconcile_part(of_tun, desired) {
            let text = format!("{}: {error}", self.tun.name);
            known.warn(now, text);
        }
    }

    /// Makes a new plan for the links of changes that cannot be made again as they were.
    pub(super) fn plan_again(
        &mut self,
        now: Instant,
        host: &mut Host,
        broken: &[Change],
        known: &mut Warnings,
    ) {
        let is_broken = |link: &&Link| {
            let mut broken = broken.iter();
            broken.any(|change| change.interface() == Some(link.index))
        };
        let links: Vec<Link> = self.carrying.iter().filter(is_broken).cloned().collect();
        for link in links {
            let desired = self.on_link(host.netlink(), &link);
            self.put(now, host, &link, desired, known);
        }
    }

    /// Makes the desired changes to a link, and undoes all others.
    fn put(
        &mut self,
        now: Instant,
        host: &mut Host,
        link: &Link,
        desired: Result<Vec<Desired>, PlanError>,
        known: &mut Warnings,
    ) {
        self.carrying
            .retain(|carrying| carrying.index != link.index);
        let on_link = |change: &Change| change.interface() == Some(link.index);
        let done = desired
            .map_err(|error| error.to_string())
            .and_then(|desired| {
                let some = !desired.is_empty();
                let done = host.reconcile_part(on_link, desired).map(|_| some);
                done.map_err(|error| error.to_string())
            });
        match done {
            Ok(false) => {}
            Ok(true) => {
                debug!(interface = link.name, "clients may use this interface");
                known.withdraw_own(|line| line.starts_with(&unserved(link)));
                self.carrying.push(link.clone());
            }
            // It went away meanwhile, as those of containers do: nobody uses it any more.
            Err(_) if matches!(host.netlink().link_by_index(link.index), Ok(None)) => {}
            Err(reason) => {
                if known.keep(now, format!("{}{reason}", unserved(link))) {
                    not_served(link, &reason);
                }
            }
        }
    }

    /// Looks where the uplinks are.
    fn look_for_uplinks(
        &mut self,
        now: Instant,
        netlink: &Netlink,
        peers: &[IpAddr],
        known: &mut Warnings,
    ) {
        let LinkSettings { named, moves, .. } = &self.settings;
        match find_uplinks(netlink, named.as_deref(), moves, peers, &self.tun.name) {
            Ok(uplinks) => {
                let first = |uplinks: &Uplinks| uplinks.first().map(|link| link.index);
                let is_new = !self.there || first(&self.uplinks) != first(&uplinks);
                self.there = true;
                self.uplinks = uplinks;
                if is_new {
                    info!(uplink = self.uplink_name(), "clients use this uplink now");
                }
            }
            Err(error) => {
                let text = match (named, self.uplinks.first()) {
                    (Some(name), Some(_)) => {
                        format!("{name} (--uplink) is gone; waiting for it to come back")
                    }
                    (None, Some(link)) => {
                        let name = &link.name;
                        format!("{name} leads nowhere; waiting for a route out of this server")
                    }
                    (Some(name), None) => format!(
                        "interface {name} (--uplink) does not exist yet; waiting for it \
                         (`ip link` lists those that do)"
                    ),
                    (None, None) => "the network is not up yet; waiting for a route out of this \
                                     server"
                        .to_owned(),
                };
                if self.uplinks.first().is_none() {
                    known.warn(now, text);
                } else if self.there && known.keep(now, text.clone()) {
                    warn!(%error, warning = %text, "an administrator should know");
                }
                self.there = false;
            }
        }
    }

    /// Packets to what has moved that stayed here, since they belong to what this server, or one
    /// behind it, does itself (old server).
    pub(super) fn stayed(&self) -> u64 {
        match &self.programs {
            Programs::Old(capture) => capture.stayed(),
            Programs::New(_) => 0,
        }
    }

    /// What the programs of the old server have dropped since the last call.
    pub(super) fn take_captures_drops(&mut self) -> Option<(DropReason, u64)> {
        match &mut self.programs {
            Programs::Old(capture) => Some(capture.take_drops()),
            Programs::New(_) => None,
        }
    }

    /// How often a conversation of a host behind this one could not be kept from giving way to new
    /// ones (old server).
    pub(super) fn own_full(&self) -> u64 {
        match &self.programs {
            Programs::Old(capture) => capture.own_full(),
            Programs::New(_) => 0,
        }
    }

    /// What the programs have noted of the flows that the new server has (old server).
    pub(super) fn taken(&self) -> Option<Arc<dyn Taken>> {
        match &self.programs {
            Programs::Old(capture) => Some(capture.taken()),
            Programs::New(_) => None,
        }
    }

    /// Tells the programs who answers new conversations (old server). Returns what is to be said
    /// if they do not know.
    pub(super) fn set_modes(
        &self,
        now: Instant,
        modes: &[Mode<Duration>],
        key: ShareKey,
        known: &mut Warnings,
    ) -> Option<String> {
        let Programs::Old(capture) = &self.programs else {
            return None;
        };
        let error = capture.set_modes(modes, key).err()?;
        let text = format!(
            "the kernel's programs do not know who answers new connections, and go by the modes \
             from before: {error}; give the command again, or restart the daemon"
        );
        known.warn(now, text.clone());
        Some(text)
    }

    /// The conversations that this host, or one behind it, has at moved addresses, but for those of
    /// which its sockets tell (old server).
    pub(super) fn own_conversations(&self) -> Option<Vec<HostFlow>> {
        match &self.programs {
            Programs::Old(capture) => capture.own_conversations().ok(),
            Programs::New(_) => None,
        }
    }

    /// Forgets those of them that are `wanted`. Returns how many.
    pub(super) fn forget_own(&self, wanted: impl Fn(&HostFlow) -> bool) -> u64 {
        match &self.programs {
            Programs::Old(capture) => capture.forget_own(wanted).unwrap_or(0),
            Programs::New(_) => 0,
        }
    }

    /// Has the programs tell who is served by this server itself, or no longer (old server).
    /// Returns whether they do.
    pub(super) fn tell_served(&self, on: bool) -> Result<bool, String> {
        match &self.programs {
            Programs::Old(capture) => match capture.tell_served(on) {
                Ok(()) => Ok(on),
                Err(error) => Err(error.to_string()),
            },
            Programs::New(_) => Ok(false),
        }
    }

    /// Reads what they have told since the last time. Returns how many connections have begun
    /// since, and how much was lost.
    pub(super) fn take_served(&self, each: impl FnMut(Served<'_>)) -> [u64; 2] {
        match &self.programs {
            Programs::Old(capture) => capture.take_served(each),
            Programs::New(_) => [0; 2],
        }
    }

    /// Tells the programs that the daemon is alive (old server). Call it every second.
    pub(super) fn beat(&self, now: Instant, known: &mut Warnings) {
        if let Programs::Old(capture) = &self.programs
            && let Err(error) = capture.beat()
        {
            let text = format!("the kernel remembers conversations that are over: {error}");
            known.warn(now, text);
        }
    }

    /// Looks for links where nothing can note what this server does itself.
    fn look_for_unnoted(&self, now: Instant, netlink: &Netlink, known: &mut Warnings) {
        if matches!(self.programs, Programs::New(_)) {
            return;
        }
        let line = |link: &Link| {
            let interface = &link.name;
            if link.to_many {
                return Some(format!("{interface} {}", plan::own::NOT_NOTED_TO_MANY));
            }
            let is_unnoted = matches!(plan::own::is_noted(netlink, link), Ok(false));
            is_unnoted.then(|| {
                format!(
                    "{NO_PLACE} of {interface}: answers to what this server does there itself from \
                     a moved address go to the new server, unless it is TCP or a connected UDP \
                     socket; make it clsact"
                )
            })
        };
        let lines = self.carrying.iter().filter_map(line).collect();
        let is_such =
            |line: &str| line.starts_with(NO_PLACE) || line.ends_with(plan::own::NOT_NOTED_TO_MANY);
        known.warn_of_all(now, is_such, lines);
    }

    /// Looks for filters of others that come before ours. An administrator may want that, but then
    /// has to know what it means.
    fn look_for_others(&mut self, now: Instant, netlink: &Netlink, known: &mut Warnings) {
        let direction = match &self.programs {
            Programs::Old(_) => Direction::Ingress,
            Programs::New(_) => Direction::Egress,
        };
        let of = |link: &Link| {
            let (priority, kind) = plan::before_ours(netlink, link, direction).ok()??;
            Some(BeforeOurs::new(&link.name, direction, &kind, priority))
        };
        self.before_ours = self.carrying.iter().filter_map(of).collect();
        for filter in &self.before_ours {
            known.warn(now, filter.warning());
        }
    }

    /// The filters of others that come before ours.
    pub(super) fn before_ours(&self) -> &[BeforeOurs] {
        &self.before_ours
    }

    /// Whether every reply leaves by the interface that the settings name (old server).
    pub(super) fn sends_by_name(&self) -> bool {
        self.settings.named.is_some()
    }

    /// Whether a link is the TUN.
    pub(super) fn is_tun(&self, index: u32) -> bool {
        self.tun.index == index
    }

    /// The links that carry the programs.
    pub(super) fn carrying(&self) -> &[Link] {
        &self.carrying
    }

    /// Tells the programs what may change while they run.
    fn tell_programs(&self, addresses: &[Address]) {
        let Programs::Old(capture) = &self.programs else {
            return;
        };
        let uplink = self.uplinks.first().filter(|_| self.there);
        capture.set_uplink(uplink, self.settings.named.is_some());
        let own = addresses.iter().map(|held| held.addr);
        let ends = own.filter(|&addr| self.settings.listen.is_none_or(|ip| ip == addr));
        if let Err(error) = capture.set_tunnel_ends(ends) {
            warn!(%error, "cannot tell the programs of this server's addresses");
        }
    }

    /// Looks what this host's routing rules mean for replies, and tells the programs (old server).
    fn look_for_ways_back(&mut self, netlink: &Netlink, addresses: &[Address]) {
        let Programs::Old(capture) = &self.programs else {
            return;
        };
        let found = match self.settings.named {
            Some(_) => Ok(WaysBack::default()),
            None => {
                let held = Held::new(addresses.to_vec());
                WaysBack::look(netlink, &self.settings.moves, &held, self.tun.index)
            }
        };
        match found {
            Ok(found) => self.ways_back = found,
            Err(error) => {
                warn!(%error, "cannot look what rules mean for replies; it stays as it was");
                return;
            }
        }
        capture.set_detailed(self.ways_back.detailed);
        if let Err(error) = capture.set_marked(&self.ways_back.marked) {
            warn!(%error, "cannot tell the programs by which marks replies leave");
        }
    }

    /// Says what is to be known of that: what may be wrong at each look, as long as it is so.
    fn tell_of_ways_back(&mut self, now: Instant, known: &mut Warnings) {
        let said = &self.ways_back.said;
        let warnings = said.iter().filter_map(Said::warning).collect();
        known.warn_of_all(now, |line| line.starts_with(ways_back::UNKNOWN), warnings);
        let is_new = |said: &&Said| !self.told_of_ways.contains(said);
        for note in said.iter().filter(is_new).filter_map(Said::note) {
            info!("{note}");
        }
        self.told_of_ways.clone_from(said);
    }

    /// Those of the links that are there that are to carry the programs, the uplinks first.
    fn wanted(&mut self, there: &[Link]) -> Vec<Link> {
        let all = match &self.programs {
            Programs::New(_) => self.settings.named.is_none(),
            Programs::Old(_) => true,
        };
        let carriers = there
            .iter()
            .filter(|link| all && plan::is_carrier(link, &self.tun));
        let mut links: Vec<Link> = carriers.cloned().collect();
        for uplink in self.uplinks.iter().filter(|_| self.there) {
            if links.iter().all(|link| link.index != uplink.index) {
                links.push(uplink.clone());
            }
        }
        links.sort_by_key(|link| !self.uplinks.contains(link.index));
        self.beyond = links.len().saturating_sub(MAX_LINKS);
        links.truncate(MAX_LINKS);
        links
    }

    /// Says that there are more links than can carry the programs, as long as that is so.
    fn look_for_beyond(&mut self, now: Instant, known: &mut Warnings) {
        known.withdraw_own(|line| line.starts_with(TOO_MANY) && self.beyond == 0);
        if self.beyond > self.told_beyond {
            let text = format!(
                "{TOO_MANY}: {} more than the {MAX_LINKS} that ipmoved serves; clients behind \
                 those that came last are not served",
                self.beyond
            );
            known.withdraw_own(|line| line.starts_with(TOO_MANY));
            known.warn(now, text);
        }
        self.told_beyond = self.beyond;
    }

    /// Looks for moved addresses that this server had and has no longer (old server): as a lease
    /// that was not renewed, or an address that somebody has taken off. Nothing else shows it,
    /// since what does not come in is not missed.
    fn look_for_lost(
        &mut self,
        now: Instant,
        netlink: &Netlink,
        addresses: &[Address],
        known: &mut Warnings,
    ) {
        if matches!(self.programs, Programs::New(_)) {
            return;
        }
        let singles = self.settings.moves.iter().map(|moved| moved.prefix);
        let moved: BTreeSet<Prefix> = singles.filter(Prefix::is_single).collect();
        let here: BTreeSet<Prefix> = addresses
            .iter()
            .map(|held| Prefix::from(held.addr))
            .filter(|held| moved.contains(held))
            .collect();
        self.had.retain(|prefix| moved.contains(prefix));
        let lost: Vec<Prefix> = self.had.difference(&here).copied().collect();
        let is_local = |prefix: &Prefix| {
            let route = netlink.route_get(prefix.first(), None, None);
            route.is_ok_and(|route| route.kind == RouteKind::Local)
        };
        let lost: Vec<Prefix> = lost.into_iter().filter(|it| !is_local(it)).collect();
        self.had.extend(here);
        if lost == self.lost {
            return;
        }
        known.withdraw_own(|line| line.starts_with(LOST));
        if !lost.is_empty() {
            let text = format!(
                "{LOST}{}; neighbours do not find that here, and nothing comes in for it unless \
                 the network routes it here: put it back (`ip addr add ADDRESS dev INTERFACE`), or \
                 find out where its lease or its VRRP went",
                held::names(&lost)
            );
            known.warn(now, text);
        }
        self.lost = lost;
    }

    /// The changes to the TUN. The new server's programs deliver to `links` from now on.
    fn on_tun(&self, netlink: &Netlink, links: &[Link]) -> Result<Vec<Desired>, PlanError> {
        match &self.programs {
            Programs::Old(capture) => capture.on_tun(netlink),
            Programs::New(steering) => {
                // The first one stands for any other that leads to a client.
                let mut links = links.to_vec();
                links.sort_by_key(|link| !self.uplinks.contains(link.index));
                steering.set_links(&links)?;
                steering.on_tun(netlink, &links, &self.tun)
            }
        }
    }

    /// The changes to one link.
    fn on_link(&self, netlink: &Netlink, link: &Link) -> Result<Vec<Desired>, PlanError> {
        match &self.programs {
            Programs::Old(capture) => capture.on_entrance(netlink, link),
            Programs::New(steering) => {
                let leads = self.leads_to_clients(link.index);
                steering.on_link(netlink, link, &self.tun, leads)
            }
        }
    }
}

/// Whether a link is as it was, in what the programs and the journal know of it.
fn is_same(one: &Link, other: &Link) -> bool {
    let of = |link: &Link| {
        let Link {
            index,
            name,
            link_type,
            mac,
            to_many,
            ..
        } = link;
        (*index, name.clone(), *link_type, *mac, *to_many)
    };
    of(one) == of(other)
}

fn calls_stay(reason: &str) {
    warn!(
        reason,
        "this server's own calls to moved addresses reach only what is bound to these or to any"
    );
}

fn not_served(link: &Link, reason: &str) {
    let interface = &link.name;
    warn!(
        interface,
        reason, "clients that use this interface are not served"
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::epoch;

    /// How many looks a burst gets that brings an event each millisecond, and when they begin.
    fn looks(burst: Duration, took: Duration) -> Vec<Duration> {
        let (mut pace, start) = (Pace::default(), epoch());
        let (mut now, mut begun) = (start, Vec::new());
        while now < start + burst {
            let rest = pace.rest(now);
            if rest.is_zero() {
                begun.push(now - start);
                pace.looked(now, now + took);
                now += took;
            }
            now += Duration::from_millis(1);
        }
        // Whatever came last is answered, too.
        assert!(pace.rest(now) <= LEAST_GAP.max(took * SHARE));
        begun
    }

    #[test]
    fn the_first_event_is_answered_at_once_and_a_storm_at_a_pace() {
        let (second, ms) = (Duration::from_secs(1), Duration::from_millis);
        let quick = looks(second, Duration::ZERO);
        assert_eq!(quick.len(), 200);
        assert_eq!(quick[0], Duration::ZERO);
        assert_eq!(quick[1], LEAST_GAP);
        // A look at thousands of links takes long. The next one is not far, since a link may come
        // then; later ones take a tenth of the time, and no more.
        let slow = looks(60 * second, ms(200));
        assert_eq!(slow[1], ms(200) + LEAST_GAP);
        assert_eq!(
            slow.last().map(|last| *last - slow[slow.len() - 2]),
            Some(2 * second)
        );
        assert!(slow.len() <= 37, "{}", slow.len());
    }
}
