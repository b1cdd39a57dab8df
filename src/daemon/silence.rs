//! Silence is seen: what is not answered, why as far as a look shows, and who is told.
//!
//! ```text
//! newest conversations ──► policy::silence ── doubts ──► look at the system ──► causes
//!                                │                                               │
//!        the peer's view ────────┴──────────► what is not well ◄─────────────────┘
//!                                                 │
//!                       status, one warning for each change, and the peer
//! ```
//!
//! Owns the causes: which there are, what is said of each, and in which order they count. Every
//! second it judges; the system is looked at only while something is in doubt. The verdicts are
//! [`policy::silence`](super::policy::silence)'s, and how to look
//! [`kernel::look`](crate::kernel::look)'s.
//!
//! | cause | server | |
//! |---|---|---|
//! | `no_route` | both | no route leads back to a client: from where is delivered, or from the \
//!   moved address |
//! | `route_elsewhere` | new | the route back leads to a link that has no program of ours |
//! | `rp_filter` | new | reverse path filtering dropped packets meanwhile |
//! | `accept_queue` | new | the application does not take its connections |
//! | `nothing_listens` | new | no socket is bound there |
//! | `listens_on_loopback`, `listens_elsewhere`, `listens_on_ipv6` | new | one is, elsewhere |
//! | `not_here` | new | the delivery address is not this server's |
//! | `rejected` | new | a socket is there, and something refuses nevertheless |
//! | `rule` | new | with a mark that a rule knows the route back is another |
//! | `refused_source`, `not_accepted`, `no_delivery`, `flow_table_full`, `direct_connection`, \
//!   `dropped` | both | the new server's daemon itself turns clients away |
//! | `filter_before` | both | a tc filter of others sees packets before ours |
//! | `firewall` | new | nothing else was found |
//! | `forwarding_off` | new | containers behind DNAT cannot be reached |
//! | `new_server`, `old_server` | the other | what that server says |
//! | `lost_between` | both | what one server sends does not come to the other, by what both saw |
//! | `unknown` | old | the new server does not say |

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::before_ours::BeforeOurs;
use super::causes;
use super::follow::Follower;
use super::index;
use super::policy::Policy;
use super::policy::silence::{Silence, Thing, names};
use crate::channel::tunnel::MAX_TROUBLES;
use crate::flow::translate::Translator;
use crate::flow::watch::Observations;
use crate::kernel::look::{self, Counters, Listener, Listeners};
use crate::kernel::netlink::{Netlink, RouteKind, RouteQuery};
use crate::model::asked::{Asked, News, Trouble, Verdict, View};
use crate::model::drops::{DropReason, Drops};
use crate::model::moved::{Move, TCP};
use crate::model::peer::{PeerId, Role};
use crate::model::status::{Answers, Cause, MAX_SERVED, Served};

/// The cause that takes both servers to know.
const LOST: &str = "lost_between";

/// The cause that either server may have for itself: no route to clients.
const NO_ROUTE: &str = "no_route";

/// Who has asked within this time tells where answers go now.
const ASKED_LATELY: Duration = Duration::from_secs(60);

/// How often what became of conversations is looked at.
const EVERY: Duration = Duration::from_secs(1);

/// The two servers see the same within this time. Until then neither says that packets are lost
/// between them.
const AGREED: Duration = Duration::from_secs(3);

/// A peer repeats what it sees every five seconds. What it said longer ago is no longer true.
const SEEN_FOR: Duration = Duration::from_secs(16);

/// Nothing came in for so long since the start: whether something can is looked at.
const NOTHING_IN: Duration = Duration::from_secs(10);

/// Seconds of which the kernel's counters are kept: as long as a conversation is followed. What it
/// dropped before has to do with others.
const COUNTED: usize = 16;

/// Most links that a cause names.
const MAX_NAMES: usize = 3;

/// A port that nobody is meant to serve is looked at so often: of a server on the Internet some are
/// always asked for.
const REST: Duration = Duration::from_secs(5);

/// Most moves that nobody asks for that are looked at.
const MAX_IDLE: usize = 256;

/// Both servers see a packet, and what is told of it, as long after each other as the path takes,
/// but for so much.
const JITTER: Duration = Duration::from_millis(250);

/// Most ports for which the system is looked at in one second, of all peers.
const MAX_LOOKS: usize = 16;

/// What is not answered, of all peers.
pub(super) struct Watcher {
    role: Role,
    started: Instant,
    next: Instant,
    peers: Vec<Watched>,
    /// What the kernel had counted in each of the last seconds, while something is in doubt.
    counted: VecDeque<Counted>,
    /// When it was last looked who would answer what nobody asks for.
    idle_looked: Option<Instant>,
    /// This server's addresses, as of the last look.
    own: Vec<IpAddr>,
    /// Who listens, as of the last looks.
    listeners: Listeners,
    /// Filters of others before ours.
    others: Vec<BeforeOurs>,
}

/// What was counted at one time.
#[derive(Clone, Copy, Debug)]
struct Counted {
    kernel: Counters,
    /// Of the peers together: [`DropReason::DirectConnection`].
    direct: u64,
}

/// Of one peer.
struct Watched {
    silence: Silence,
    /// Moves that nobody asks for and nobody would answer, each with one of its ports (new server).
    idle: Vec<(Move, Asked, Cause)>,
    /// What is not well.
    found: BTreeMap<Asked, Found>,
    /// The last look at each that is in doubt (new server).
    looks: BTreeMap<Asked, Look>,
    /// What the peer sees, and when it said so. It is `None` if it did not since it is there.
    theirs: Vec<Trouble>,
    views: Vec<View>,
    heard: Option<Instant>,
    /// The run of the peer that said so.
    run: Option<u64>,
    /// Whether the tunnel is up, and since when the peer is there.
    up: bool,
    there: Instant,
    /// When the peer was last known to be there.
    alive: Instant,
    /// When it was last heard, as of the last second.
    heard_before: Instant,
    /// Where what the new server answers has no way out of this one (old server).
    no_way: BTreeMap<Asked, Cause>,
    /// What the peer calls silent is asked in vain since then, by this server's clock.
    asked_since: BTreeMap<Asked, Instant>,
    /// Since when the peer says of something that it is not well.
    told_since: BTreeMap<Asked, Instant>,
}

/// What a look at the system has shown. It stands until the next one.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Look {
    at: Instant,
    /// The verdict then.
    verdict: Verdict,
    /// A client that was not answered then.
    client: Option<IpAddr>,
    causes: Vec<Cause>,
    /// One of them is enough for silence, whatever the protocol.
    certain: bool,
}

/// How soon a look is due: that which is less comes first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Urgency {
    /// The verdict is no news.
    known: bool,
    /// A scan asked for it, most likely.
    stranger: bool,
    /// The last look.
    last: Option<Instant>,
}

impl Urgency {
    /// `None`: no look is due.
    fn of(now: Instant, thing: &Thing, waits: bool, last: Option<&Look>) -> Option<Self> {
        let bad = matches!(thing.verdict, Verdict::Silent | Verdict::Refused);
        let known = !bad || last.is_some_and(|last| last.verdict == thing.verdict);
        let due = last.is_none_or(|last| {
            // Nobody waits: what the look found when somebody did says more.
            let over = thing.verdict == Verdict::Silent && !waits && !last.causes.is_empty();
            let rest = if thing.serves() { EVERY / 2 } else { REST };
            !known || (!over && now.saturating_duration_since(last.at) >= rest)
        });
        due.then(|| Self {
            known,
            stranger: !thing.serves(),
            last: last.map(|last| last.at),
        })
    }
}

/// Something that is not well.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Found {
    answers: Answers,
    since: Instant,
    causes: Vec<Cause>,
    /// Own eyes have seen it, not the peer's alone.
    own: bool,
    /// The causes are those of a look, or of the peer.
    looked: bool,
    /// The warning that was given.
    line: Option<String>,
}

/// Where to look.
pub(super) struct Around<'a> {
    /// What the settings refuse of a peer's moves.
    pub(super) policy: &'a Policy,
    /// What was dropped that belongs to no peer.
    pub(super) drops: &'a Drops,
    /// The kernel.
    pub(super) netlink: &'a Netlink,
    /// The links that carry our programs.
    pub(super) follower: &'a Follower,
    /// The new server's rewriting.
    pub(super) translator: Option<&'a Translator>,
}

impl Around<'_> {
    /// Whether answers that leave by an interface come to the tunnel.
    fn carries(&self, index: u32) -> bool {
        let mut carrying = self.follower.carrying().iter();
        carrying.any(|link| link.index == index) || self.follower.is_tun(index)
    }
}

impl Watched {
    /// The peer is there, after it was away, or anew.
    fn is_back(&mut self, now: Instant, role: Role) {
        self.forget();
        self.there = now;
        // On the new server clients' packets come by the peer alone.
        if role == Role::Old {
            self.silence.was_away(now, self.alive);
        }
    }

    /// What the peer said is no longer true.
    fn forget(&mut self) {
        self.theirs.clear();
        self.views.clear();
        self.asked_since.clear();
        self.told_since.clear();
        self.heard = None;
        // Counts of another time are not compared.
        for found in self.found.values_mut() {
            found.causes.retain(|it| it.cause != LOST);
        }
    }

    /// Whether the peer has had the time to say what it sees of a port. After its start it needs a
    /// moment to look.
    fn had_time(&self, now: Instant, thing: &Thing) -> bool {
        let since = thing.since.max(self.there + AGREED);
        now.saturating_duration_since(since) >= AGREED
    }

    /// Whether the peer has told everything that it sees.
    fn tells_all(&self) -> bool {
        self.theirs.len() < MAX_TROUBLES
    }

    /// Whether the peer's daemon says what it has seen of our troubles.
    fn shows_views(&self) -> bool {
        !self.views.is_empty()
    }

    /// Why nobody would answer a move that nobody asks for, as a look here has shown, or one there.
    fn not_served_yet(&self, moved: &Move) -> Vec<Cause> {
        let here = self.idle.iter().filter(|(idle, ..)| idle == moved);
        let here = here.map(|(_, _, cause)| cause.clone());
        let port = |asked: &Asked| (asked.port > 0).then_some(asked.port);
        let there = self.theirs.iter().filter(|it| {
            let (asked, takes) = (&it.asked, |it: &Asked| moved.takes(it.protocol, port(it)));
            let idle = it.verdict == Verdict::Unanswered;
            idle && names(moved) && moved.prefix.contains(asked.addr) && takes(asked)
        });
        let there = there.map(|it| Cause {
            cause: it.cause.clone(),
            ..new_server_says(it)
        });
        here.chain(there).take(1).collect()
    }
}

/// What an administrator is told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Said {
    /// This is not well.
    Warning(String),
    /// It is not well in another way; this was the warning, and this is the new one.
    Changed(String, String),
    /// It is well again; this was the warning.
    Well(String, String),
}

impl Watched {
    fn new(now: Instant) -> Self {
        Self {
            silence: Silence::new(),
            found: BTreeMap::new(),
            looks: BTreeMap::new(),
            idle: Vec::new(),
            theirs: Vec::new(),
            views: Vec::new(),
            heard: None,
            run: None,
            up: false,
            there: now,
            alive: now,
            heard_before: now,
            no_way: BTreeMap::new(),
            asked_since: BTreeMap::new(),
            told_since: BTreeMap::new(),
        }
    }
}

impl Watcher {
    /// There is one more peer, or another one in the place of one that is gone.
    pub(super) fn begin(&mut self, now: Instant, peer: PeerId) {
        match self.peers.get_mut(index(peer)) {
            Some(place) => *place = Watched::new(now),
            None => self.peers.push(Watched::new(now)),
        }
    }

    /// Watches for so many peers.
    pub(super) fn new(role: Role, peers: usize, now: Instant) -> Self {
        Self {
            role,
            started: now,
            next: now + EVERY,
            peers: (0..peers).map(|_| Watched::new(now)).collect(),
            counted: VecDeque::new(),
            idle_looked: None,
            own: Vec::new(),
            listeners: Listeners::default(),
            others: Vec::new(),
        }
    }

    /// When to look next.
    pub(super) fn next(&self) -> Instant {
        self.next
    }

    /// The peer said what it sees.
    pub(super) fn peer_sees(&mut self, now: Instant, peer: PeerId, run: u64, news: News) {
        let role = self.role;
        let watched = &mut self.peers[index(peer)];
        // Another run knows nothing of what came before it. What it says may come before the tunnel
        // is known to be up.
        if watched.run.replace(run) != Some(run) || !watched.up {
            watched.is_back(now, role);
            watched.up = true;
        }
        let since = |trouble: &Trouble| {
            let before = now.checked_sub(trouble.age + JITTER).unwrap_or(now);
            let known = watched.asked_since.get(&trouble.asked).copied();
            let since = if trouble.age.is_zero() { known } else { None };
            (trouble.asked, since.unwrap_or(before))
        };
        let bad = |trouble: &&Trouble| trouble.verdict != Verdict::Unanswered;
        let troubles = || news.troubles.iter().filter(bad);
        watched.asked_since = troubles().map(since).collect();
        let told_since = std::mem::take(&mut watched.told_since);
        let since = |asked: Asked| (asked, told_since.get(&asked).copied().unwrap_or(now));
        watched.told_since = troubles().map(|trouble| since(trouble.asked)).collect();
        watched.theirs = news.troubles;
        watched.views = news.views;
        watched.heard = Some(now);
    }

    /// The tunnel to the peer is up, or no longer.
    pub(super) fn peer_is(&mut self, now: Instant, peer: PeerId, up: bool, heard: Option<Instant>) {
        let role = self.role;
        let watched = &mut self.peers[index(peer)];
        if watched.up {
            // Also of a goodbye.
            watched.alive = watched.alive.max(heard.unwrap_or(watched.alive));
        }
        if up && !watched.up {
            watched.is_back(now, role);
        }
        if !up {
            watched.forget();
        }
        watched.up = up;
    }

    /// Takes in what became of conversations with a peer's clients.
    pub(super) fn observe(
        &mut self,
        now: Instant,
        peer: PeerId,
        moves: &Arc<[Move]>,
        heard: Option<Instant>,
        seen: Observations,
    ) {
        self.next = now + EVERY;
        let watched = &mut self.peers[index(peer)];
        watched.silence.set_moves(moves);
        watched.silence.observe(now, seen);
        // A new run may have been heard a moment before it is known for one.
        watched.alive = watched.alive.max(watched.heard_before);
        watched.heard_before = heard.unwrap_or(watched.heard_before);
        if watched
            .heard
            .is_some_and(|heard| now.saturating_duration_since(heard) >= SEEN_FOR)
        {
            watched.theirs.clear();
            watched.views.clear();
        }
    }

    /// Judges, and looks for causes where something is in doubt. Returns what to say.
    pub(super) fn judge(&mut self, now: Instant, around: &Around<'_>) -> Vec<(PeerId, Said)> {
        self.others = around.follower.before_ours().to_vec();
        let is_new = self.role == Role::New;
        let doubtful = (self.peers.iter())
            .any(|it| it.silence.doubts(now).next().is_some() || !it.theirs.is_empty());
        if is_new && doubtful {
            if self.counted.len() == COUNTED {
                self.counted.pop_front();
            }
            self.counted.push_back(Counted {
                kernel: Counters::read(),
                direct: around.drops.get(DropReason::DirectConnection),
            });
        } else {
            self.counted.clear();
        }
        let rested = |at| now.saturating_duration_since(at) >= REST;
        let idle_due = is_new && self.idle_looked.is_none_or(rested);
        if is_new && (doubtful || idle_due) {
            let own = around.netlink.addresses().unwrap_or_default();
            self.own = own.into_iter().map(|held| held.addr).collect();
        }
        if idle_due {
            self.look_at_idle(now, around);
        }
        let mut said = Vec::new();
        let mut left = MAX_LOOKS;
        for (at, id) in (0..self.peers.len()).zip(0..) {
            match self.role {
                Role::New => left -= self.look_here(now, at, PeerId(id), left, around),
                Role::Old => left -= self.look_out(now, at, left, around),
            }
            let found = self.found(now, at);
            let told = self.tell(now, at, found);
            said.extend(told.into_iter().map(|said| (PeerId(id), said)));
        }
        said
    }

    /// What the peer is to know.
    pub(super) fn news(&self, now: Instant, peer: PeerId) -> News {
        let watched = &self.peers[index(peer)];
        let told = |asked: &Asked| watched.theirs.iter().any(|it| it.asked == *asked);
        let own = watched.found.iter().filter(|(_, it)| it.own && it.looked);
        let mut own: Vec<_> = own.collect();
        // What the new server says itself it need not hear first.
        let known = |asked: &Asked| self.role == Role::Old && told(asked);
        own.sort_by_key(|(asked, found)| (known(asked), found.answers));
        let own = own.into_iter().filter_map(|(&asked, found)| {
            let verdict = match found.answers {
                Answers::Silent => Verdict::Silent,
                Answers::Refused => Verdict::Refused,
                Answers::NothingIn | Answers::Unanswered | Answers::Ok => return None,
            };
            // The old server has its causes from the new one, but for two.
            let first = found.causes.first();
            let of_its_own = |it: &&Cause| [LOST, NO_ROUTE].contains(&it.cause.as_str());
            let why = first.filter(|it| self.role == Role::New || of_its_own(it));
            let thing = watched.silence.things().find(|(known, _)| **known == asked);
            let waits = thing.and_then(|(_, thing)| thing.waits_since());
            Some(Trouble {
                asked,
                verdict,
                cause: why.map_or_else(String::new, |why| why.cause.clone()),
                why: why.map_or_else(String::new, in_one_line),
                age: waits.map_or(Duration::ZERO, |at| now.saturating_duration_since(at)),
            })
        });
        let idle = watched.idle.iter().map(|(_, asked, why)| Trouble {
            asked: *asked,
            verdict: Verdict::Unanswered,
            cause: why.cause.clone(),
            why: why.text.clone(),
            age: Duration::ZERO,
        });
        let views = watched.asked_since.iter();
        News {
            troubles: own.chain(idle).collect(),
            views: views
                .map(|(asked, &since)| watched.silence.view(since, asked))
                .collect(),
        }
    }

    /// For the status.
    pub(super) fn served(&self, now: Instant, peer: PeerId) -> Vec<Served> {
        let watched = &self.peers[index(peer)];
        let seconds = |since| now.saturating_duration_since(since).as_secs();
        let things: BTreeMap<&Asked, &Thing> = watched.silence.things().collect();
        let of = |asked: &Asked, found: Option<&Found>| {
            let thing = things.get(asked);
            let [asked_for, answered, refused] = thing.map_or([0; 3], |thing| thing.counts);
            let since = found
                .map(|found| found.since)
                .or(thing.map(|thing| thing.since));
            Served {
                what: asked.to_string(),
                state: found.map_or(Answers::Ok, |found| found.answers),
                expected: thing.is_none_or(|thing| thing.serves()),
                since_s: since.map_or(0, seconds),
                asked: asked_for,
                answered,
                refused,
                clients: thing.map_or(0, |thing| thing.clients() as u64),
                causes: found.map_or_else(Vec::new, |found| found.causes.clone()),
            }
        };
        let mut unasked: Vec<(&Move, Vec<Cause>)> = (watched.silence.unasked())
            .map(|moved| (moved, watched.not_served_yet(moved)))
            .collect();
        unasked.sort_by_key(|(_, causes)| causes.is_empty());
        let unasked = unasked
            .into_iter()
            .take(MAX_SERVED / 2)
            .map(|(moved, causes)| Served {
                what: moved.to_string(),
                state: Answers::NothingIn,
                expected: true,
                since_s: seconds(self.started),
                asked: 0,
                answered: 0,
                refused: 0,
                clients: 0,
                causes: self.taken_before(now).into_iter().chain(causes).collect(),
            });
        let bad = watched
            .found
            .iter()
            .map(|(asked, found)| of(asked, Some(found)));
        let well = things.iter().filter(|(asked, thing)| {
            thing.verdict == Verdict::Well && !watched.found.contains_key(asked)
        });
        let well = well.map(|(asked, _)| of(asked, None));
        let mut all: Vec<Served> = bad.chain(unasked).chain(well).collect();
        // Of what nobody asks for there may be more than are shown; it is no fault by itself.
        let quiet =
            |served: &Served| served.state == Answers::NothingIn && served.causes.is_empty();
        all.sort_by_key(|served| (quiet(served), served.state));
        all.truncate(MAX_SERVED);
        all
    }

    /// Looks who would answer what nobody asks for yet (new server).
    fn look_at_idle(&mut self, now: Instant, around: &Around<'_>) {
        self.idle_looked = Some(now);
        let Self {
            peers,
            own,
            listeners,
            ..
        } = self;
        for (watched, id) in peers.iter_mut().zip(0..) {
            let unasked = watched.silence.unasked().filter(|moved| names(moved));
            let idle = unasked.take(MAX_IDLE).filter_map(|moved| {
                let listener = |protocol, to| listeners.listener(now, protocol, to);
                let found = causes::not_served_yet(PeerId(id), moved, around, own, listener);
                found.map(|(asked, cause)| (moved.clone(), asked, cause))
            });
            watched.idle = idle.collect();
        }
    }

    /// What may keep packets from coming in at all (old server).
    fn taken_before(&self, now: Instant) -> Vec<Cause> {
        let early = now.saturating_duration_since(self.started) < NOTHING_IN;
        if early || self.role == Role::New {
            return Vec::new();
        }
        self.filters_before().collect()
    }

    fn filters_before(&self) -> impl Iterator<Item = Cause> {
        self.others.iter().map(|filter| {
            let (text, remedy) = filter.cause();
            cause("filter_before", text, remedy)
        })
    }

    /// Looks at the system for what is in doubt, where a look is due; how many looks it took, of
    /// `most`.
    fn look_here(
        &mut self,
        now: Instant,
        at: usize,
        id: PeerId,
        most: usize,
        around: &Around<'_>,
    ) -> usize {
        let Watched {
            silence,
            looks,
            theirs,
            ..
        } = &mut self.peers[at];
        // What this daemon does not know of yet, since it has started later, it hears of.
        let told = theirs.iter().filter(|it| it.verdict != Verdict::Unanswered);
        let mut doubts: BTreeMap<Asked, (Thing, Option<IpAddr>)> = told
            .map(|it| {
                (
                    it.asked,
                    (silence.as_told(now, &it.asked, it.verdict), None),
                )
            })
            .collect();
        for (&asked, thing, client) in silence.doubts(now) {
            let doubt = doubts
                .entry(asked)
                .or_insert_with(|| (thing.clone(), client));
            doubt.1 = client;
            if thing.verdict != Verdict::Well {
                doubt.0 = thing.clone();
            }
        }
        looks.retain(|asked, _| doubts.contains_key(asked));
        let mut due: Vec<(Urgency, Asked)> = (doubts.iter())
            .filter_map(|(&asked, (thing, client))| {
                let urgency = Urgency::of(now, thing, client.is_some(), looks.get(&asked))?;
                Some((urgency, asked))
            })
            .collect();
        due.sort_by_key(|(urgency, _)| *urgency);
        due.truncate(most);
        for (_, asked) in &due {
            let (thing, client) = &doubts[asked];
            let last = self.peers[at].looks.get(asked);
            let client = client.or(last.and_then(|last| last.client));
            let (causes, certain) = self.causes_here(now, at, id, asked, thing, client, around);
            let Watched { silence, looks, .. } = &mut self.peers[at];
            let look = Look {
                at: now,
                verdict: match silence.verdict(asked) {
                    Verdict::Well => thing.verdict,
                    own @ (Verdict::Unanswered | Verdict::Refused | Verdict::Silent) => own,
                },
                client,
                causes,
                certain,
            };
            looks.insert(*asked, look);
        }
        due.len()
    }

    /// Looks whether answers have a way from this server to those who asked last; how many looks it
    /// took, of `most` (old server). The kernel drops what has none behind our back.
    fn look_out(&mut self, now: Instant, at: usize, most: usize, around: &Around<'_>) -> usize {
        let watched = &mut self.peers[at];
        watched.no_way.clear();
        if around.follower.sends_by_name() {
            return 0;
        }
        let since = now.checked_sub(ASKED_LATELY).unwrap_or(now);
        let things = watched.silence.things();
        let asked: Vec<(Asked, IpAddr)> = things
            .filter_map(|(asked, thing)| Some((*asked, thing.answers_to(since)?)))
            .take(most)
            .collect();
        for &(asked, client) in &asked {
            let from = asked.addr;
            let why = match around.netlink.route_get(client, None, Some(from)) {
                Ok(route) => match route.kind {
                    RouteKind::Unicast | RouteKind::Local => continue,
                    // That is how the kernel answers of IPv6.
                    RouteKind::Blackhole | RouteKind::Other(_) => "a route forbids it".to_owned(),
                },
                Err(error) => error.to_string(),
            };
            // Of what this server has not, the kernel tells no route from there.
            let held = around.netlink.addresses().unwrap_or_default();
            if held.iter().any(|held| held.addr == from) {
                watched.no_way.insert(asked, no_way_out(from, &why));
            }
        }
        asked.len()
    }

    /// What is not well with a peer's clients, and why.
    fn found(&mut self, now: Instant, at: usize) -> BTreeMap<Asked, Found> {
        let doubts: Vec<(Asked, Thing)> = (self.peers[at].silence.doubts(now))
            .map(|(&asked, thing, _)| (asked, thing.clone()))
            .collect();
        let mut found = BTreeMap::new();
        for (asked, thing) in doubts {
            // It has seen it itself, and says more.
            if thing.is_told() && self.peers[at].told_since.contains_key(&asked) {
                continue;
            }
            let (causes, certain, looked) = match self.role {
                Role::New => match self.peers[at].looks.get(&asked) {
                    Some(look) => {
                        let looked = look.verdict == thing.verdict;
                        (look.causes.clone(), look.certain, looked || look.certain)
                    }
                    None => (Vec::new(), false, false),
                },
                Role::Old => {
                    self.trust(now, at, &asked, &thing);
                    let (causes, certain) = self.causes_there(now, at, &asked, &thing);
                    (causes, certain, true)
                }
            };
            let verdict = self.peers[at].silence.verdict(&asked);
            let answers = match verdict {
                Verdict::Well => continue,
                Verdict::Silent => Answers::Silent,
                // The new server knows whether one client is refused, or all.
                Verdict::Refused if !self.agreed(now, at, &asked, &thing) => Answers::Unanswered,
                Verdict::Refused => Answers::Refused,
                Verdict::Unanswered if certain => Answers::Silent,
                Verdict::Unanswered => Answers::Unanswered,
            };
            found.insert(
                asked,
                Found {
                    answers,
                    since: thing.since,
                    causes: if answers == Answers::Unanswered {
                        Vec::new()
                    } else {
                        causes
                    },
                    own: true,
                    looked,
                    line: None,
                },
            );
        }
        let watched = &self.peers[at];
        for (&asked, cause) in &watched.no_way {
            let before = watched.found.get(&asked);
            let since = before.map_or(now, |before| before.since);
            found.entry(asked).or_insert_with(|| Found {
                answers: Answers::Silent,
                since,
                causes: vec![cause.clone()],
                own: true,
                looked: true,
                line: None,
            });
        }
        self.add_theirs(now, at, &mut found);
        found
    }

    /// Adds what the peer alone sees.
    fn add_theirs(&self, now: Instant, at: usize, found: &mut BTreeMap<Asked, Found>) {
        let watched = &self.peers[at];
        let troubles = watched.theirs.iter();
        for trouble in troubles.filter(|it| it.verdict != Verdict::Unanswered) {
            let asked = &trouble.asked;
            let bad = |found: &Found| matches!(found.answers, Answers::Silent | Answers::Refused);
            if found.get(asked).is_some_and(bad) {
                continue;
            }
            let answers = match trouble.verdict {
                Verdict::Refused => Answers::Refused,
                Verdict::Silent | Verdict::Unanswered | Verdict::Well => Answers::Silent,
            };
            let before = watched.found.get(asked);
            let since = |own| {
                let before = before.filter(|before| before.own == own);
                before.map_or(now, |before| before.since)
            };
            let mut new = Found {
                answers,
                since: since(false),
                causes: Vec::new(),
                own: false,
                looked: true,
                line: None,
            };
            match self.role {
                Role::Old => new.causes = vec![new_server_says(trouble)],
                Role::New => {
                    if let Some(causes) = self.explains(at, trouble) {
                        (new.causes, new.own, new.since) = (causes, true, since(true));
                    } else if now.saturating_duration_since(new.since) < AGREED {
                        // Own eyes may need a moment more. It is kept, to be told later.
                        new = before.filter(|before| !before.own).cloned().map_or_else(
                            || waiting_for(now),
                            |before| Found {
                                line: None,
                                ..before
                            },
                        );
                    } else if trouble.cause == LOST {
                        new.causes = vec![self.lost(at, asked)];
                    } else if trouble.cause == NO_ROUTE {
                        new.causes = vec![old_server_says(trouble)];
                    }
                }
            }
            found.insert(*asked, new);
        }
    }

    /// What the last look at a port says, if that explains what the old server alone has seen. This
    /// daemon may have started later than the clients came.
    fn explains(&self, at: usize, trouble: &Trouble) -> Option<Vec<Cause>> {
        let (watched, asked) = (&self.peers[at], &trouble.asked);
        let since = watched.asked_since.get(asked)?;
        let look = watched.looks.get(asked)?;
        let answered = watched.silence.view(*since, asked).answered;
        let refused = trouble.verdict == Verdict::Refused;
        // A socket that is there is no reason to refuse: it may have been opened meanwhile. If a
        // firewall does, this server sees that itself.
        let rejected = look.causes.first().is_some_and(|it| it.cause == "rejected");
        let explains = (look.certain || refused) && !look.causes.is_empty();
        (!answered && explains && !(refused && rejected)).then(|| look.causes.clone())
    }

    /// Why the old server hears nothing that this one knows of.
    fn lost(&self, at: usize, asked: &Asked) -> Cause {
        let watched = &self.peers[at];
        let since = watched.asked_since.get(asked);
        let view = since.map(|since| watched.silence.view(*since, asked));
        let text = match view {
            Some(view) if view.answered => "this server answers, and the old one does not hear it",
            Some(view) if !view.came => "the old server sends packets for it, and none comes here",
            Some(_) | None => "the old server hears no answer",
        };
        lost_between(text)
    }

    /// What was refused is well again if the new server sees nothing wrong: it knows who listens.
    /// If it has no room to tell more, it may see more.
    fn trust(&mut self, now: Instant, at: usize, asked: &Asked, thing: &Thing) {
        let watched = &mut self.peers[at];
        let theirs = watched.theirs.iter().any(|theirs| theirs.asked == *asked);
        let waited = watched.had_time(now, thing);
        let says_well = watched.heard.is_some() && !theirs && watched.tells_all();
        if thing.verdict == Verdict::Refused && says_well && waited {
            watched.silence.trust(now, asked);
        }
    }

    /// Whether a refusal that this server sees is one by all that is known: the old server waits
    /// for the new one's view, if that says what it sees.
    fn agreed(&self, now: Instant, at: usize, asked: &Asked, thing: &Thing) -> bool {
        let watched = &self.peers[at];
        self.role == Role::New
            || watched.heard.is_none()
            || watched.theirs.iter().any(|theirs| theirs.asked == *asked)
            || (watched.found.get(asked)).is_some_and(|it| it.answers == Answers::Refused)
            || watched.had_time(now, thing)
    }

    /// Causes that a look at the old server finds.
    fn causes_there(
        &self,
        now: Instant,
        at: usize,
        asked: &Asked,
        thing: &Thing,
    ) -> (Vec<Cause>, bool) {
        let watched = &self.peers[at];
        let theirs = watched
            .theirs
            .iter()
            .find(|theirs| theirs.asked == *asked && theirs.verdict != Verdict::Unanswered);
        let since = thing.since.max(watched.there);
        let agreed = now.saturating_duration_since(since) >= AGREED;
        let causes = match theirs {
            Some(theirs) => return (vec![new_server_says(theirs)], true),
            None if !watched.up || !agreed || thing.verdict == Verdict::Unanswered => Vec::new(),
            None if watched.heard.is_none() => vec![cause(
                "unknown",
                "the new server's daemon does not say what it sees".into(),
                "look at `ipmoved status` there; update it".into(),
            )],
            None if thing.verdict == Verdict::Silent => self.lost_on_the_way(at, asked, thing),
            None if watched.tells_all() => Vec::new(),
            None => vec![new_server("connections are refused there".into())],
        };
        (causes, false)
    }

    /// What both servers saw of the same clients, if that shows that packets are lost between them.
    /// While nobody asks, what was found last stands.
    fn lost_on_the_way(&self, at: usize, asked: &Asked, thing: &Thing) -> Vec<Cause> {
        let watched = &self.peers[at];
        let view = watched.views.iter().find(|view| view.asked == *asked);
        let waits = thing.waits_since().filter(|&since| since >= watched.there);
        let text = match (waits, view) {
            (Some(_), Some(view)) if view.answered => {
                "the new server answers, and its answers do not come here"
            }
            (Some(_), Some(view)) if !view.came => {
                "the packets are sent to the new server, and do not come there"
            }
            // It may see more than it has room to tell.
            (Some(_), Some(_)) => {
                let text = "the new server gets the packets, and nothing comes back";
                return vec![new_server(text.into())];
            }
            // An older daemon does not say what it has seen.
            (Some(_), None) if !watched.shows_views() => {
                "the new server sees nothing wrong: its answers do not come here"
            }
            (Some(_), None) | (None, _) => {
                let before = watched.found.get(asked);
                let causes = before.into_iter().flat_map(|before| &before.causes);
                return causes.filter(|it| it.cause == LOST).cloned().collect();
            }
        };
        vec![lost_between(text)]
    }

    /// Causes that a look at the new server finds, and whether one of them alone is enough for
    /// silence, whatever the protocol.
    #[expect(clippy::too_many_arguments, reason = "one caller")]
    fn causes_here(
        &mut self,
        now: Instant,
        at: usize,
        id: PeerId,
        asked: &Asked,
        thing: &Thing,
        client: Option<IpAddr>,
        around: &Around<'_>,
    ) -> (Vec<Cause>, bool) {
        if let (Some(translator), Some((client, reason))) = (around.translator, thing.turned()) {
            let refusals = around.policy.refusals(id);
            let found = causes::turned_away(translator, refusals, asked, client, reason);
            if let Some(found) = found {
                return (vec![found], thing.serves());
            }
        }
        let delivered = around.translator.and_then(|it| it.delivered(id, asked));
        let Some(to) = delivered else {
            return (Vec::new(), false);
        };
        let refused = thing.verdict == Verdict::Refused;
        let is_own = self.own.contains(&to.ip());
        let mut causes = Vec::new();
        if !is_own {
            causes.extend(not_here(to.ip(), around.netlink));
        }
        // From what is not its own the kernel finds no route at all.
        let (mut astray, mut dropped) = (Vec::new(), Vec::new());
        if let Some(client) = client.filter(|_| !refused && is_own) {
            let query = RouteQuery {
                dst: client,
                src: Some(to.ip()),
                mark: None,
                from: Some((asked.protocol, to.port())),
            };
            let carries = |link| around.carries(link);
            match no_way_back(query, around.netlink, &carries) {
                Some(cause) => causes.push(cause),
                None => (astray, dropped) = causes::by_mark(query, around.netlink, &carries),
            }
        }
        let mut certain = !causes.is_empty() && thing.serves();
        if !refused {
            causes.extend(self.counted(to, asked, around));
        }
        let listener = is_own
            .then(|| self.listeners.listener(now, asked.protocol, to))
            .flatten();
        let there = matches!(listener, Some(Listener::Here | Listener::OnIpv6));
        if listener.is_some() {
            self.peers[at].silence.listens(now, asked, there);
        }
        let found = listener.and_then(|listener| nobody_there(&listener, to, asked, refused));
        // A container behind DNAT has no socket here.
        let on_host = look::forwards(to.is_ipv4()) == Some(false);
        certain |= found.is_some() && thing.serves() && on_host;
        causes.extend(found);
        let explained = !causes.is_empty();
        if !refused {
            causes.extend(self.filters_before());
            causes.append(&mut astray);
            // What only the other server has seen may have been lost on the way.
            let seen = !thing.is_told();
            if !there && on_host && seen {
                causes.push(forwarding_off(to.is_ipv4()));
            }
            if (!explained || !there) && seen {
                causes.push(firewall());
            }
            causes.append(&mut dropped);
        }
        (causes, certain)
    }

    /// What the kernel has counted since the doubts began.
    fn counted(&self, to: SocketAddr, asked: &Asked, around: &Around<'_>) -> Option<Cause> {
        let (before, counters) = (self.counted.front()?, self.counted.back()?);
        if asked.protocol == TCP && counters.direct > before.direct {
            return Some(causes::direct_connection());
        }
        let (before, counters) = (before.kernel, counters.kernel);
        if to.is_ipv4() && counters.rp_filter > before.rp_filter {
            let filters = look::rp_filters(around.follower.carrying());
            let (text, remedy) = says_rp_filter(&filters);
            return Some(cause("rp_filter", text, remedy));
        }
        if asked.protocol == TCP && counters.overflows > before.overflows {
            return Some(cause(
                "accept_queue",
                format!("the application at {to} does not take its connections; its queue is full"),
                "look at the application; `ss -ltn` shows the queue".into(),
            ));
        }
        None
    }

    /// Compares with what was known before. Returns what to say.
    fn tell(&mut self, now: Instant, at: usize, found: BTreeMap<Asked, Found>) -> Vec<Said> {
        let role = self.role;
        let before = std::mem::replace(&mut self.peers[at].found, found);
        let mut said = Vec::new();
        for (asked, found) in &mut self.peers[at].found {
            let old = before.get(asked);
            found.line = old.and_then(|old| old.line.clone());
            if let Some(old) = old.filter(|old| old.own == found.own) {
                found.since = found.since.min(old.since);
            }
            let bad = matches!(found.answers, Answers::Silent | Answers::Refused);
            // The old server waits for the new one's view, so that it says why, and says it once;
            // the new one for a look.
            let known = match role {
                Role::New => found.looked,
                Role::Old => {
                    !found.causes.is_empty() || now.saturating_duration_since(found.since) >= AGREED
                }
            };
            let same = old.is_some_and(|old| old.answers == found.answers || !found.own);
            if !bad || !known || (found.line.is_some() && same) {
                continue;
            }
            let line = line(asked, found);
            said.push(match found.line.replace(line.clone()) {
                Some(before) => Said::Changed(before, line),
                None => Said::Warning(line),
            });
        }
        for (asked, old) in before {
            let still = self.peers[at].found.get_mut(&asked);
            let bad =
                |found: &&mut Found| matches!(found.answers, Answers::Silent | Answers::Refused);
            match (old.line, still) {
                (Some(line), None) => said.push(Said::Well(asked.to_string(), line)),
                (Some(line), Some(still)) if !bad(&still) => {
                    still.line = None;
                    said.push(Said::Well(asked.to_string(), line));
                }
                _ => {}
            }
        }
        said
    }
}

/// That reverse path filtering dropped packets, and what to do: of these links, each with the
/// settings that end it.
fn says_rp_filter(filters: &[(String, String)]) -> (String, String) {
    let links: Vec<&str> = filters.iter().map(|(link, _)| link.as_str()).collect();
    let mut settings: Vec<String> = filters.iter().map(|(_, set)| set.clone()).collect();
    settings.sort_unstable();
    settings.dedup();
    let on = match links.as_slice() {
        [] => String::new(),
        [..] => format!(", on {}", some_of(&links)),
    };
    let text = format!("reverse path filtering (rp_filter{on}) dropped packets meanwhile");
    let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
    let remedy = match settings.as_slice() {
        [] => "look at `sysctl -a -r rp_filter`, or".into(),
        some if some.len() <= MAX_NAMES => format!("`sysctl -w {}`, or", some.join(" ")),
        [first, ..] => format!("`sysctl -w {first}` and so on, or"),
    };
    (
        text,
        format!("{remedy} give this server a route back to its clients"),
    )
}

/// The first of these names, and how many more there are.
fn some_of(names: &[&str]) -> String {
    match names.split_at_checked(MAX_NAMES) {
        Some((first, more)) if !more.is_empty() => {
            format!("{} and {} more", first.join(", "), more.len())
        }
        _ => names.join(", "),
    }
}

fn line(asked: &Asked, found: &Found) -> String {
    let what = match found.answers {
        Answers::Refused => "is refused",
        Answers::Silent | Answers::NothingIn | Answers::Unanswered | Answers::Ok => {
            "is not answered"
        }
    };
    match found.causes.first() {
        Some(Cause { text, remedy, .. }) => format!("{asked} {what}: {text}; {remedy}"),
        None => format!("{asked} {what}"),
    }
}

/// The old server hears nothing; this one looks for a moment more.
fn waiting_for(now: Instant) -> Found {
    Found {
        answers: Answers::Unanswered,
        since: now,
        causes: Vec::new(),
        own: false,
        looked: false,
        line: None,
    }
}

pub(super) fn cause(name: &str, text: String, remedy: String) -> Cause {
    Cause {
        cause: name.into(),
        text,
        remedy,
    }
}

/// What the new server says, under its name if its daemon itself is the cause.
fn new_server_says(trouble: &Trouble) -> Cause {
    let own = causes::OWN.iter().find(|own| **own == trouble.cause);
    let why = &trouble.why;
    match (own, why.split_once("; ")) {
        _ if why.is_empty() => new_server("the new server says so, and not why".into()),
        (Some(own), Some((text, remedy))) => {
            cause(own, format!("the new server says: {text}"), remedy.into())
        }
        (Some(own), None) => Cause {
            cause: (*own).into(),
            ..new_server(format!("the new server says: {why}"))
        },
        (None, _) => new_server(format!("the new server says: {why}")),
    }
}

/// What the old server says that this one cannot see.
fn old_server_says(trouble: &Trouble) -> Cause {
    let remedy = "look at `ipmoved status` on the old server";
    let text = format!("the old server says: {}", trouble.why);
    cause("old_server", text, remedy.into())
}

/// Why answers do not leave the old server.
fn no_way_out(from: IpAddr, why: &str) -> Cause {
    let text = format!("this server has no route from {from} to its clients: {why}");
    let remedy = format!("look at `ip route get CLIENT from {from}` and `ip rule`");
    cause(NO_ROUTE, text, remedy)
}

fn new_server(text: String) -> Cause {
    let remedy = "look at `ipmoved status` on the new server";
    cause("new_server", text, remedy.into())
}

/// A cause as the peer is told of it: with the remedy where that is to be had on the old server
/// too.
fn in_one_line(cause: &Cause) -> String {
    if causes::OWN.contains(&cause.cause.as_str()) && !cause.remedy.is_empty() {
        format!("{}; {}", cause.text, cause.remedy)
    } else {
        cause.text.clone()
    }
}

fn lost_between(text: &str) -> Cause {
    let remedy = "look at `ipmoved status` on both servers for what is dropped, and at firewalls \
                  between them: UDP has to pass in both directions";
    cause(LOST, text.into(), remedy.into())
}

pub(super) fn forwarding_off(v4: bool) -> Cause {
    let set = if v4 {
        "net.ipv4.ip_forward"
    } else {
        "net.ipv6.conf.all.forwarding"
    };
    let text = format!("{set} is 0, so that no container or VM can be reached");
    let remedy = format!("if the application runs in one: `sysctl -w {set}=1`");
    cause("forwarding_off", text, remedy)
}

fn firewall() -> Cause {
    cause(
        "firewall",
        "a firewall on this server likely drops the packets or the answers".into(),
        "look at `nft list ruleset` and `iptables-save -c` for drops in input, forward and output"
            .into(),
    )
}

/// That packets are delivered to an address which this server does not have, if that is so: it is
/// gone, or no route makes a prefix this server's.
fn not_here(to: IpAddr, netlink: &Netlink) -> Option<Cause> {
    let route = netlink.route_get(to, None, None);
    let is_here = route.is_ok_and(|route| route.kind == RouteKind::Local);
    (!is_here).then(|| {
        let text = format!("{to}, where that is delivered, is not an address of this server");
        let remedy = "give it this address, or deliver to another one (--deliver-to, --deliver)";
        cause("not_here", text, remedy.into())
    })
}

/// Whether the kernel knows a way for the answers, from where is delivered to a client.
pub(super) fn no_way_back(
    query: RouteQuery,
    netlink: &Netlink,
    carries: &dyn Fn(u32) -> bool,
) -> Option<Cause> {
    let from = query.src?;
    let remedy = format!("look at `ip route get CLIENT from {from}` and `ip rule`");
    if let Err(error) = netlink.route_of(query) {
        let text = format!("this server has no route from {from} to its clients: {error}");
        return Some(cause(NO_ROUTE, text, remedy));
    }
    if let Some(why) = causes::goes_astray(query, netlink, carries) {
        let text = format!("answers to clients {why}");
        return Some(cause("route_elsewhere", text, remedy));
    }
    causes::next_hop_missed(query, netlink)
}

/// What is said of who listens, if that is a cause.
pub(super) fn nobody_there(
    listener: &Listener,
    to: SocketAddr,
    asked: &Asked,
    refused: bool,
) -> Option<Cause> {
    let show = if asked.protocol == TCP {
        "ss -ltnp"
    } else {
        "ss -lunp"
    };
    let bind = format!("let the application listen on {to} or on any address; see `{show}`");
    Some(match listener {
        Listener::Nobody if refused => cause(
            "nothing_listens",
            format!("nothing listens on {to}"),
            format!("start the application, or deliver elsewhere (--deliver); see `{show}`"),
        ),
        Listener::Nobody => cause(
            "nothing_listens",
            format!("nothing on this server itself listens on {to}"),
            format!(
                "start the application (`{show}`); if it runs in a container or VM, look at its \
                 address translation and at what is dropped in `forward`"
            ),
        ),
        Listener::At(ip) if ip.is_loopback() => {
            let text = format!("the application listens on {ip} alone, not on {to}");
            cause("listens_on_loopback", text, bind)
        }
        Listener::At(ip) => {
            let text = format!("the application listens on {ip}, not on {to}");
            cause("listens_elsewhere", text, bind)
        }
        Listener::OnIpv6 if refused => {
            let text = format!("the application listens on [::] for IPv6 alone, not on {to}");
            cause("listens_on_ipv6", text, bind)
        }
        Listener::Here if refused => cause(
            "rejected",
            format!(
                "something listens on {to}, but a firewall rejects the clients, or its socket is \
                 bound to another interface"
            ),
            format!("look at `nft list ruleset` for `reject`, and at `{show}` for %INTERFACE"),
        ),
        Listener::Here | Listener::OnIpv6 => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::watch::{Fate, Observed};
    use crate::kernel::netlink::Direction;
    use crate::testing::epoch;

    /// A run of the peer.
    const RUN: u64 = 1;

    fn asked() -> Asked {
        Asked {
            addr: "192.0.2.5".parse().unwrap(),
            protocol: TCP,
            port: 80,
        }
    }

    fn trouble(why: &str) -> Trouble {
        Trouble {
            asked: asked(),
            verdict: Verdict::Refused,
            cause: String::new(),
            why: why.into(),
            age: Duration::ZERO,
        }
    }

    fn news(troubles: Vec<Trouble>) -> News {
        let views = Vec::new();
        News { troubles, views }
    }

    /// One peer of a server, and its clock.
    struct Bed {
        watcher: Watcher,
        now: Instant,
        moves: Arc<[Move]>,
    }

    impl Bed {
        fn new(role: Role) -> Self {
            let now = epoch();
            let mut watcher = Watcher::new(role, 1, now);
            watcher.peer_is(now, PeerId(0), true, None);
            Self {
                watcher,
                now,
                moves: [("192.0.2.5:80/tcp".parse().unwrap())].into(),
            }
        }

        /// A second passes, and this becomes of a conversation that began when it did.
        fn second(&mut self, fate: Option<Fate>) -> Vec<Said> {
            let opened = self.now;
            self.now += EVERY;
            let observed = fate.map(|fate| Observed {
                asked: asked(),
                client: [203, 0, 113, 9].into(),
                opened,
                waited: opened,
                fate,
            });
            let seen = Observations {
                opened: 1,
                some: observed.into_iter().collect(),
                turned: Vec::new(),
            };
            let (now, watcher) = (self.now, &mut self.watcher);
            watcher.observe(now, PeerId(0), &self.moves, Some(now), seen);
            let mut found = BTreeMap::new();
            // As on the old server, whose look needs no system.
            for (&asked, thing, _) in watcher.peers[0].silence.doubts(now) {
                let (causes, _) = watcher.causes_there(now, 0, &asked, thing);
                let answers = Answers::Refused;
                if thing.verdict == Verdict::Refused {
                    let (since, own, looked, line) = (thing.since, true, true, None);
                    found.insert(
                        asked,
                        Found {
                            answers,
                            since,
                            causes,
                            own,
                            looked,
                            line,
                        },
                    );
                }
            }
            watcher.add_theirs(now, 0, &mut found);
            watcher.tell(now, 0, found)
        }

        /// The client that came then still waits, and asks again and again.
        fn waits(&mut self, opened: Instant) -> Vec<Said> {
            let again = self.now > opened + EVERY;
            let observed = Observed {
                asked: asked(),
                client: [203, 0, 113, 9].into(),
                opened,
                waited: opened,
                fate: Fate::Waiting { again },
            };
            let seen = Observations {
                some: vec![observed],
                ..Observations::default()
            };
            let (now, heard) = (self.now, Some(self.now));
            (self.watcher).observe(now, PeerId(0), &self.moves, heard, seen);
            self.judge()
        }

        /// As on the old server, whose look needs no system.
        fn judge(&mut self) -> Vec<Said> {
            let found = self.watcher.found(self.now, 0);
            self.watcher.tell(self.now, 0, found)
        }
    }

    #[test]
    fn the_old_server_says_once_what_the_new_one_sees() {
        let mut bed = Bed::new(Role::Old);
        assert_eq!(
            bed.second(Some(Fate::Refused)),
            [],
            "it waits for the new server's view"
        );
        bed.watcher.peer_sees(
            bed.now,
            PeerId(0),
            RUN,
            news(vec![trouble("nothing listens")]),
        );
        let said = bed.second(Some(Fate::Refused));
        let [Said::Warning(line)] = said.as_slice() else {
            panic!("{said:?}");
        };
        assert_eq!(
            line,
            "192.0.2.5:80/tcp is refused: the new server says: nothing listens; look at `ipmoved \
             status` on the new server"
        );
        for _ in 0..5 {
            assert_eq!(bed.second(Some(Fate::Refused)), []);
        }
        let served = bed.watcher.served(bed.now, PeerId(0));
        assert_eq!((served[0].state, served[0].refused), (Answers::Refused, 7));
        let told = bed.watcher.news(bed.now, PeerId(0)).troubles;
        assert_eq!(
            (told.len(), told[0].why.as_str()),
            (1, ""),
            "the new server knows why"
        );
        bed.watcher
            .peer_sees(bed.now, PeerId(0), RUN, news(Vec::new()));
        let said = bed.second(Some(Fate::Answered));
        assert_eq!(said, [Said::Well("192.0.2.5:80/tcp".into(), line.clone())]);
        assert_eq!(bed.second(None), []);
        assert_eq!(bed.watcher.served(bed.now, PeerId(0))[0].state, Answers::Ok);
    }

    #[test]
    fn what_is_refused_stays_so_while_the_new_server_has_no_room_to_say_that_it_is_well() {
        for (told, stays) in [(MAX_TROUBLES, true), (1, false)] {
            let mut bed = Bed::new(Role::Old);
            let of_port = |port| Trouble {
                asked: Asked { port, ..asked() },
                ..trouble("nothing listens")
            };
            let others: Vec<_> = (81..).map(of_port).take(told).collect();
            let mut refused = Vec::new();
            for _ in 0..20 {
                (bed.watcher).peer_sees(bed.now, PeerId(0), RUN, news(others.clone()));
                bed.second(Some(Fate::Refused));
                bed.judge();
                let served = bed.watcher.served(bed.now, PeerId(0));
                let own = served.iter().find(|it| it.what == asked().to_string());
                refused.push(own.is_some_and(|it| it.state == Answers::Refused));
            }
            let last = refused.split_off(10);
            assert_eq!(last.iter().all(|&it| it), stays, "{told}: {last:?}");
        }
    }

    #[test]
    fn what_the_new_server_alone_sees_shows_on_the_old_one_until_it_says_no_more() {
        let mut bed = Bed::new(Role::Old);
        bed.watcher
            .peer_sees(bed.now, PeerId(0), RUN, news(vec![trouble("why")]));
        assert_eq!(bed.second(None).len(), 1);
        let state = |bed: &Bed| bed.watcher.served(bed.now, PeerId(0))[0].state;
        assert_eq!(state(&bed), Answers::Refused);
        let mut said = Vec::new();
        for _ in 0..20 {
            said.extend(bed.second(None));
        }
        assert!(matches!(said[..], [Said::Well(..)]), "{said:?}");
        assert_eq!(state(&bed), Answers::NothingIn);
    }

    /// What the old server says of packets that are lost, while a client waits for so long.
    fn lost_says_the_peer(age: u64) -> News {
        let mut trouble = trouble("");
        trouble.verdict = Verdict::Silent;
        trouble.cause = LOST.into();
        trouble.age = Duration::from_secs(age);
        news(vec![trouble])
    }

    #[test]
    fn the_new_server_takes_a_moment_before_it_says_that_packets_are_lost() {
        let mut bed = Bed::new(Role::New);
        let mut said = Vec::new();
        for second in 0..5 {
            let told = lost_says_the_peer(4);
            bed.watcher.peer_sees(bed.now, PeerId(0), RUN, told);
            said.extend(
                bed.second(Some(Fate::Answered))
                    .into_iter()
                    .map(|it| (second, it)),
            );
        }
        let [(3, Said::Warning(line))] = said.as_slice() else {
            panic!("{said:?}");
        };
        assert!(line.contains("this server answers"), "{line}");
        let told = bed.watcher.news(bed.now, PeerId(0));
        assert_eq!(told.troubles, []);
        assert!(told.views[0].came && told.views[0].answered);
    }

    #[test]
    fn what_was_answered_before_the_clients_came_that_wait_says_nothing_of_these() {
        let mut bed = Bed::new(Role::New);
        bed.second(Some(Fate::Answered));
        for _ in 0..3 {
            bed.second(None);
        }
        let mut said = Vec::new();
        for age in 1..6 {
            bed.watcher
                .peer_sees(bed.now, PeerId(0), RUN, lost_says_the_peer(age));
            said.extend(bed.second(None));
        }
        let [Said::Warning(line)] = said.as_slice() else {
            panic!("{said:?}");
        };
        assert!(line.contains("none comes here"), "{line}");
    }

    /// The old server, one of whose clients waits for as many seconds.
    fn old_server_with_a_client_that_waits(seconds: u32, view: Option<(bool, bool)>) -> Bed {
        let mut bed = Bed::new(Role::Old);
        let opened = bed.now;
        bed.watcher
            .peer_sees(bed.now, PeerId(0), RUN, News::default());
        for second in 1..=seconds {
            bed.now = opened + EVERY * second;
            let told = News {
                troubles: Vec::new(),
                views: view
                    .map(|(came, answered)| View {
                        asked: asked(),
                        came,
                        answered,
                    })
                    .into_iter()
                    .collect(),
            };
            bed.watcher.peer_sees(bed.now, PeerId(0), RUN, told);
            bed.waits(opened);
        }
        bed
    }

    #[test]
    fn what_is_lost_is_said_by_what_both_servers_saw_of_the_same_clients() {
        let says = |view| {
            let bed = old_server_with_a_client_that_waits(8, view);
            let served = bed.watcher.served(bed.now, PeerId(0));
            assert_eq!(served[0].state, Answers::Silent);
            let cause = served[0].causes.first();
            cause.map(|cause| (cause.cause.clone(), cause.text.clone()))
        };
        let lost = |text: &str| Some((LOST.to_owned(), text.to_owned()));
        assert_eq!(
            says(Some((true, true))),
            lost("the new server answers, and its answers do not come here")
        );
        assert_eq!(
            says(Some((false, false))),
            lost("the packets are sent to the new server, and do not come there")
        );
        let there = "the new server gets the packets, and nothing comes back";
        let says_there = Some(("new_server".to_owned(), there.to_owned()));
        assert_eq!(says(Some((true, false))), says_there);
        let of_older = lost("the new server sees nothing wrong: its answers do not come here");
        assert_eq!(says(None), of_older);
    }

    #[test]
    fn a_peer_that_starts_anew_is_not_held_against_what_was_before() {
        let mut bed = old_server_with_a_client_that_waits(8, Some((true, true)));
        let told = news(Vec::new());
        bed.watcher.peer_sees(bed.now, PeerId(0), RUN + 1, told);
        let opened = bed.now;
        for second in 1..5 {
            bed.now = opened + EVERY * second;
            bed.judge();
            let served = bed.watcher.served(bed.now, PeerId(0));
            assert_eq!(served[0].state, Answers::Silent, "it was so before");
            assert_eq!(served[0].causes, [], "nobody has asked since");
        }
        let troubles = bed.watcher.news(bed.now, PeerId(0)).troubles;
        assert_eq!(troubles[0].verdict, Verdict::Silent, "the peer may look");
        // Without the tunnel nothing is known.
        bed.watcher.peer_is(bed.now, PeerId(0), false, None);
        bed.judge();
        let served = bed.watcher.served(bed.now, PeerId(0));
        assert_eq!(
            (served[0].state, served[0].causes.len()),
            (Answers::Silent, 0)
        );
    }

    #[test]
    fn what_the_new_server_turns_away_has_one_name_on_both() {
        let mut bed = Bed::new(Role::Old);
        let mut one = trouble("it turns them away; give it --clients-from 10.0.0.0/8");
        one.cause = "refused_source".into();
        bed.watcher
            .peer_sees(bed.now, PeerId(0), RUN, news(vec![one]));
        bed.second(None);
        let served = bed.watcher.served(bed.now, PeerId(0));
        let cause = &served[0].causes[0];
        assert_eq!(cause.cause, "refused_source");
        assert_eq!(cause.text, "the new server says: it turns them away");
        assert_eq!(cause.remedy, "give it --clients-from 10.0.0.0/8");
    }

    #[test]
    fn what_nobody_would_answer_yet_is_seen_on_both_servers_and_is_no_alarm() {
        let mut new = Bed::new(Role::New);
        new.second(None);
        let listener = Listener::Nobody;
        let to = "198.51.100.2:80".parse().unwrap();
        let cause = nobody_there(&listener, to, &asked(), true).unwrap();
        let idle = (new.moves[0].clone(), asked(), cause);
        new.watcher.peers[0].idle.push(idle);
        let told = new.watcher.news(new.now, PeerId(0));
        let mut old = Bed::new(Role::Old);
        old.watcher.peer_sees(old.now, PeerId(0), RUN, told);
        assert_eq!(old.second(None), []);
        for (bed, text) in [
            (&new, "nothing listens on 198.51.100.2:80"),
            (
                &old,
                "the new server says: nothing listens on 198.51.100.2:80",
            ),
        ] {
            let served = bed.watcher.served(bed.now, PeerId(0));
            assert_eq!(served[0].state, Answers::NothingIn);
            assert_eq!(served[0].causes[0].cause, "nothing_listens");
            assert_eq!(served[0].causes[0].text, text);
        }
    }

    /// A look at a port, as the system would show it.
    fn look(now: Instant, verdict: Verdict, certain: bool) -> Look {
        Look {
            at: now,
            verdict,
            client: None,
            causes: vec![firewall()],
            certain,
        }
    }

    #[test]
    fn the_new_server_warns_after_a_look_and_keeps_what_it_has_found() {
        let mut bed = Bed::new(Role::New);
        bed.second(Some(Fate::Refused));
        let judge = |bed: &mut Bed| {
            bed.now += EVERY;
            bed.judge()
        };
        bed.watcher.peers[0].found.clear();
        assert_eq!(judge(&mut bed), [], "nobody has looked");
        assert_eq!(bed.watcher.news(bed.now, PeerId(0)).troubles, []);
        let looks = &mut bed.watcher.peers[0].looks;
        looks.insert(asked(), look(bed.now, Verdict::Well, false));
        assert_eq!(judge(&mut bed), [], "nobody has since it is refused");
        let looks = &mut bed.watcher.peers[0].looks;
        looks.insert(asked(), look(bed.now, Verdict::Refused, false));
        let said = judge(&mut bed);
        let [Said::Warning(line)] = said.as_slice() else {
            panic!("{said:?}");
        };
        assert!(line.contains("a firewall"), "{line}");
        for _ in 0..10 {
            assert_eq!(judge(&mut bed), []);
            let troubles = bed.watcher.news(bed.now, PeerId(0)).troubles;
            assert!(troubles[0].why.contains("a firewall"), "{troubles:?}");
            let served = bed.watcher.served(bed.now, PeerId(0));
            assert_eq!(served[0].causes, [firewall()]);
        }
    }

    #[test]
    fn a_look_is_due_at_once_when_a_verdict_falls_and_seldom_for_a_scan() {
        let mut bed = Bed::new(Role::New);
        bed.moves = ["192.0.2.5".parse().unwrap()].into();
        bed.second(Some(Fate::Waiting { again: false }));
        let of = |bed: &Bed, last: Option<&Look>, waits| {
            let (_, thing) = bed.watcher.peers[0].silence.things().next().unwrap();
            Urgency::of(bed.now, thing, waits, last)
        };
        assert!(of(&bed, None, true).is_some());
        let last = look(bed.now, Verdict::Well, false);
        bed.now += Duration::from_secs(4);
        assert_eq!(of(&bed, Some(&last), true), None);
        bed.now += Duration::from_secs(1);
        let scan = of(&bed, Some(&last), true).unwrap();
        let mut bed = Bed::new(Role::New);
        bed.second(Some(Fate::Refused));
        let last = look(bed.now, Verdict::Well, false);
        let fallen = of(&bed, Some(&last), false).unwrap();
        assert!(fallen < scan, "it comes first");
        let last = look(bed.now, Verdict::Refused, false);
        assert_eq!(of(&bed, Some(&last), false), None);
        bed.now += EVERY;
        assert!(of(&bed, Some(&last), false).is_some());
    }

    #[test]
    fn a_change_of_what_is_wrong_is_said_once() {
        let mut bed = Bed::new(Role::New);
        let mut tell = |answers| {
            let one = Found {
                answers,
                since: bed.now,
                causes: vec![firewall()],
                own: true,
                looked: true,
                line: None,
            };
            bed.watcher.tell(bed.now, 0, [(asked(), one)].into())
        };
        let said = tell(Answers::Silent);
        let [Said::Warning(silent)] = said.as_slice() else {
            panic!("{said:?}");
        };
        let said = tell(Answers::Refused);
        let [Said::Changed(before, refused)] = said.as_slice() else {
            panic!("{said:?}");
        };
        assert_eq!(before, silent);
        assert!(refused.contains("is refused"), "{refused}");
        assert_eq!(tell(Answers::Refused), []);
        let said = tell(Answers::Ok);
        assert_eq!(said, [Said::Well(asked().to_string(), refused.clone())]);
    }

    #[test]
    fn the_old_server_calls_nothing_refused_before_the_new_one_agrees() {
        let mut bed = Bed::new(Role::Old);
        bed.second(Some(Fate::Refused));
        // Nothing was shown yet.
        bed.watcher.peers[0].found.clear();
        bed.watcher
            .peer_sees(bed.now, PeerId(0), RUN, news(Vec::new()));
        let state = |bed: &mut Bed| {
            let found = bed.watcher.found(bed.now, 0);
            found.get(&asked()).map(|found| found.answers)
        };
        assert_eq!(state(&mut bed), Some(Answers::Unanswered));
        bed.watcher
            .peer_sees(bed.now, PeerId(0), RUN, news(vec![trouble("")]));
        assert_eq!(state(&mut bed), Some(Answers::Refused));
        bed.watcher
            .peer_sees(bed.now, PeerId(0), RUN, news(Vec::new()));
        bed.now += AGREED * 2;
        assert_eq!(state(&mut bed), None, "one client was banned");
    }

    #[test]
    fn what_is_asked_for_is_shown_beside_any_number_of_moves_that_nobody_asks_for() {
        for filter in [false, true] {
            let mut bed = Bed::new(Role::Old);
            let moves = (80..280).map(|port| format!("192.0.2.5:{port}/tcp"));
            bed.moves = moves.map(|text| text.parse().unwrap()).collect();
            bed.second(Some(Fate::Answered));
            bed.now += NOTHING_IN;
            if filter {
                let filter = BeforeOurs::new("eth0", Direction::Ingress, "u32", 1);
                bed.watcher.others = vec![filter];
            }
            let served = bed.watcher.served(bed.now, PeerId(0));
            assert!(served.len() <= MAX_SERVED);
            assert!(served.iter().any(|served| served.state == Answers::Ok));
        }
    }

    #[test]
    fn reverse_path_filtering_is_said_in_few_names_and_no_numbers() {
        let set = |name: &str| format!("net.ipv4.conf.{name}.rp_filter=2");
        let filter = |name: &str| (name.to_owned(), set(name));
        let (text, remedy) = says_rp_filter(&[filter("eth0")]);
        assert_eq!(
            text,
            "reverse path filtering (rp_filter, on eth0) dropped packets meanwhile"
        );
        assert!(remedy.starts_with("`sysctl -w net.ipv4.conf.eth0.rp_filter=2`, or give"));
        let many: Vec<_> = ["a", "b", "c", "d", "e"].map(filter).into();
        let (text, remedy) = says_rp_filter(&many);
        assert!(text.contains("on a, b, c and 2 more)"), "{text}");
        assert!(remedy.contains("conf.a.rp_filter=2` and so on"), "{remedy}");
    }
}
