//! Which way replies of moved addresses leave, as far as this server's routing rules go by what the
//! kernel does not know of them (old server).
//!
//! A host with several ways out may mark its connections by the interface that they came in by, and
//! have a rule for each mark (`CONNMARK`, `fwmark 2 lookup 102`). What has moved has no connections
//! here. But an address of one way comes in by that way. So where an interface holds a moved
//! address, and the rule of a mark leads out there, its replies get that mark, as the host's own
//! answers would. It is asked of the kernel, which knows all rules:
//!
//! | without a mark | with a mark | replies |
//! |---|---|---|
//! | by the address's own interface | | go as they are |
//! | by another one | none leads by its own | go as they are |
//! | by another one | one leads by its own | get that mark |
//! | by another one | several do, by different gateways | a warning |
//! | any | leads elsewhere, and the address is on no interface, or on several | a warning |
//!
//! The same is done where the kernel tells a program less than it knows: of IPv6 its look-up for
//! programs takes no note of `suppress_prefixlength` (`fib6_rule_suppress` in net/ipv6/fib6_rules.c
//! asks for what only other look-ups have), and finds the default route that such a rule passes
//! over. Then no mark is set.
//!
//! Only what would leave by the way without a mark gets one: clients in networks of this host (a
//! LAN, containers, that of the other way out) and behind other routers there are answered there.
//!
//! What rules by source select inside of a moved prefix is asked for by itself, and so is a longer
//! prefix that has moved.
//!
//! Not every rule by mark is about ways out. A rule for what has *not* a mark is a VPN's for all
//! but its own packets (wg-quick); one to the main table lets a VPN's packets out (Tailscale); and
//! one to local routes is a transparent proxy's.

mod home;
mod said;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use rustix::io::Errno;

use home::{Carrier, Home, Nested, Networks, home, receiving};
pub(super) use said::{Said, UNKNOWN};
use said::{in_words, is_alike};

use super::held::Held;
use crate::kernel::netlink::{
    Family, Netlink, NetlinkError, Route, RouteKind, RouteQuery, Rule, TABLE_LOCAL, TABLE_MAIN,
};
use crate::kernel::plan::PUBLIC;
use crate::kernel::programs::{Hop, MAX_INSTEAD, MarkedWay};
use crate::model::moved::Move;
use crate::model::prefix::Prefix;

/// Most marks that are asked for: more than any of the usual programs has ways out.
const MAX_MARKS: usize = 64;

/// Most kinds of sources that are asked for, as rules by source tell them apart: each takes a few
/// requests, and one more for each mark. So a look takes some milliseconds with hundreds of rules,
/// and a fraction of a second at worst.
const MAX_CLASSES: usize = 256;

/// The kernel's word, or why there is none.
type Result<T> = std::result::Result<T, NetlinkError>;

/// What the rules mean for replies.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct WaysBack {
    /// Some rule goes by protocol, ports or DSCP.
    pub(super) detailed: bool,
    /// Whose replies get a mark.
    pub(super) marked: BTreeMap<Prefix, MarkedWay>,
    /// What is to be said of that.
    pub(super) said: Vec<Said>,
}

/// A rule by mark that may be about ways out.
#[derive(Clone, PartialEq, Eq, Debug)]
struct ByMark {
    mark: u32,
    table: u32,
    priority: u32,
}

/// Where packets leave, by routes among which the kernel chooses; empty if no route leads anywhere.
type Choices = Vec<Hop>;

/// How much is asked.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Depth {
    /// The route that the kernel would take.
    First,
    /// All those among which it chooses.
    All,
}

/// What the routes say of packets with this mark: `None` if it is this host's own.
type Ask<'a> = &'a dyn Fn(Option<u32>, Depth) -> Result<Option<Choices>>;

/// The sources that the same rules select, by their places among the rules; and whether this host
/// holds them.
type Class = (Vec<usize>, bool);

/// A mark, and how much was asked of it.
type Asked = (Option<u32>, Depth);

/// What the kernel said of a class.
struct Told {
    /// One of it, if the kernel answers for it: it does for sources of this host alone.
    source: Option<IpAddr>,
    /// The answers.
    answers: RefCell<HashMap<Asked, Option<Choices>>>,
}

/// What was found out about addresses of the same home and class.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Found {
    Nothing,
    Way(MarkedWay, u32),
    /// A rule by mark may be meant.
    Doubt(Doubt, ByMark),
    /// There are more than [`MAX_CLASSES`].
    Unasked,
}

/// Why it is not clear.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Doubt {
    /// Marks lead out by the address's own interface, by different gateways.
    Gateways,
    /// The mark does so by two interfaces.
    Links,
    /// The route without a mark has more than [`MAX_INSTEAD`] gateways.
    TooMany,
    /// The address is on no interface, and the mark leads out by this one.
    Homeless(u32),
    /// It is on several.
    Several(u32),
}

/// What is known of this host, in one family.
struct Here<'a> {
    rules: &'a [Rule],
    /// See [`passed_over`].
    passed_over: &'a [Hop],
    held: &'a Held,
    carriers: &'a [Carrier],
    /// Whether an address is this host's own.
    is_own: &'a dyn Fn(IpAddr) -> Result<bool>,
    /// Where packets from a source leave.
    ask: &'a dyn Fn(Option<IpAddr>, Option<u32>, Depth) -> Result<Option<Choices>>,
}

impl WaysBack {
    /// Looks what the rules of this server mean for the replies of `moves`.
    ///
    /// # Errors
    /// If the kernel does not tell its rules, routes or links.
    pub(super) fn look(netlink: &Netlink, moves: &[Move], held: &Held, tun: u32) -> Result<Self> {
        let mut all = Self::default();
        let mut carriers = None;
        for family in [Family::V4, Family::V6] {
            let rules = listed(netlink.rules(family))?;
            all.detailed |= rules.iter().any(|rule| rule.detailed);
            let passed_over = passed_over(netlink, &rules)?;
            let far = PUBLIC.into_iter().find(|ip| Family::of(*ip) == family);
            let Some(dst) = far else {
                continue;
            };
            if by_mark(&rules).is_empty() && passed_over.is_empty() {
                continue;
            }
            let carriers: &Vec<Carrier> = match &mut carriers {
                Some(known) => known,
                none => none.insert(receiving(&netlink.links()?, &netlink.natures()?, tun)),
            };
            let is_own = |addr| match netlink.route_get(addr, None, None) {
                Ok(route) => Ok(route.kind == RouteKind::Local),
                Err(error) => led_nowhere(error).map(|()| false),
            };
            let ask = |src, mark, depth| {
                let query = RouteQuery {
                    dst,
                    src,
                    mark,
                    from: None,
                };
                let found = match depth {
                    Depth::First => netlink.choice(query).map(|route| vec![route]),
                    Depth::All => netlink.choices(query),
                };
                match found {
                    Ok(routes) => Ok(choices(routes)),
                    Err(error) => led_nowhere(error).map(|()| Some(Vec::new())),
                }
            };
            let here = Here {
                rules: &rules,
                passed_over: &passed_over,
                held,
                carriers,
                is_own: &is_own,
                ask: &ask,
            };
            let of_family = |prefix: &Prefix| Family::of(prefix.first()) == family;
            let prefixes = moves.iter().map(|moved| moved.prefix).filter(of_family);
            all.add(prefixes.collect(), &here)?;
        }
        Ok(all)
    }

    /// Adds those of a family.
    fn add(&mut self, moved: BTreeSet<Prefix>, here: &Here<'_>) -> Result<()> {
        let marks = by_mark(here.rules);
        let networks = Networks::of(here.held, here.carriers);
        let selected = selected_inside(here.rules, &moved);
        let all = Nested::new(moved.union(&selected).copied().collect());
        let mut classes: HashMap<Class, Told> = HashMap::new();
        let mut asked: HashMap<(Home, Class), Found> = HashMap::new();
        let mut said: Vec<(Found, Vec<(Prefix, Found)>)> = Vec::new();
        let mut unmarked = Vec::new();
        for &prefix in &all.prefixes {
            let home = home(prefix, here.held, here.carriers, &networks);
            let (source, is_held) = all.source(prefix, here.held);
            let rules = here.rules.iter().enumerate();
            let of_source = rules.filter(|(_, rule)| selects_source(rule, source));
            let class: Class = (of_source.map(|(at, _)| at).collect(), is_held);
            let key = (home, class);
            let found = match asked.get(&key) {
                Some(found) => found.clone(),
                None => {
                    let (home, class) = &key;
                    let found = here.find(home, class, source, &mut classes, &marks)?;
                    asked.insert(key, found.clone());
                    found
                }
            };
            match &found {
                Found::Way(way, _) => {
                    self.marked.insert(prefix, way.clone());
                }
                Found::Nothing | Found::Doubt(..) | Found::Unasked => unmarked.push(prefix),
            }
            if !moved.contains(&prefix) {
                continue;
            }
            match said.iter_mut().find(|(known, _)| is_alike(known, &found)) {
                Some((_, about)) => about.push((prefix, found)),
                None => said.push((found.clone(), vec![(prefix, found)])),
            }
        }
        let around = Nested::new(self.marked.keys().copied().collect());
        for prefix in unmarked {
            if around.covers(prefix) {
                self.marked.insert(prefix, MarkedWay::NONE);
            }
        }
        let name = |index: u32| {
            let mut carriers = here.carriers.iter();
            let carrier = carriers.find(|carrier| carrier.index == index);
            carrier.map_or_else(|| format!("interface {index}"), |it| it.name.clone())
        };
        let said = said.iter();
        let said = said.filter_map(|(found, about)| in_words(found, about, &name));
        self.said.extend(said);
        Ok(())
    }
}

impl Here<'_> {
    /// What is to be done for an address of that home and class.
    fn find(
        &self,
        home: &Home,
        class: &Class,
        source: IpAddr,
        classes: &mut HashMap<Class, Told>,
        marks: &[ByMark],
    ) -> Result<Found> {
        let is_settled = !class.0.is_empty();
        if !classes.contains_key(class) {
            if classes.len() == MAX_CLASSES {
                return Ok(Found::Unasked);
            }
            let is_own = (self.is_own)(source)?;
            let told = Told {
                source: is_own.then_some(source),
                answers: RefCell::default(),
            };
            classes.insert(class.clone(), told);
        }
        let Some(Told { source, answers }) = classes.get(class) else {
            return Ok(Found::Unasked);
        };
        if source.is_none() && is_settled {
            return Ok(Found::Nothing);
        }
        let ask = |mark, depth| {
            if let Some(told) = answers.borrow().get(&(mark, depth)) {
                return Ok(told.clone());
            }
            let told = (self.ask)(*source, mark, depth)?;
            answers.borrow_mut().insert((mark, depth), told.clone());
            Ok(told)
        };
        judge(home, self.passed_over, is_settled, marks, &ask)
    }
}

/// Those prefixes inside of moved ones that rules go by.
fn selected_inside(rules: &[Rule], moved: &BTreeSet<Prefix>) -> BTreeSet<Prefix> {
    let moved = Nested::new(moved.clone());
    let selected = rules.iter().filter_map(|rule| rule.from);
    let selected = selected.map(|(addr, len)| Prefix::of(addr, len));
    selected.filter(|&prefix| moved.covers(prefix)).collect()
}

/// Nothing, if the kernel has no such family, or no such rules at all.
fn listed<T>(found: Result<Vec<T>>) -> Result<Vec<T>> {
    match found {
        Ok(all) => Ok(all),
        Err(error) if matches!(error.errno(), Some(Errno::AFNOSUPPORT | Errno::OPNOTSUPP)) => {
            Ok(Vec::new())
        }
        Err(error) => Err(error),
    }
}

/// Whether the kernel said that no route leads there, and did not fail otherwise.
fn led_nowhere(error: NetlinkError) -> Result<()> {
    match error {
        NetlinkError::Refused { errno, .. } if ![Errno::NOMEM, Errno::NOBUFS].contains(&errno) => {
            Ok(())
        }
        NetlinkError::Refused { .. } | NetlinkError::Socket(_) | NetlinkError::Malformed { .. } => {
            Err(error)
        }
    }
}

/// What is to be done for an address of that home, where programs find the routes that are
/// `passed_over`. `is_settled` says that a rule goes by its source.
fn judge(
    home: &Home,
    passed_over: &[Hop],
    is_settled: bool,
    marks: &[ByMark],
    ask: Ask<'_>,
) -> Result<Found> {
    let own: &[u32] = match home {
        Home::On(own) => own,
        Home::Nowhere | Home::Several => &[],
    };
    let Some(unmarked) = ask(None, Depth::All)? else {
        return Ok(Found::Nothing);
    };
    let mut instead = unmarked.clone();
    if instead.is_empty() {
        instead.push((0, None));
    }
    instead.retain(|(link, _)| !own.contains(link));
    if instead.is_empty() {
        return Ok(to_own(own, passed_over, &unmarked));
    }
    // Most marks lead elsewhere, and that shows by the first of their routes.
    let is_fit = |(link, _): &Hop| match home {
        Home::On(own) => own.contains(link),
        Home::Nowhere | Home::Several => !instead.iter().any(|(other, _)| other == link),
    };
    let mut fitting: Vec<(&ByMark, Choices)> = Vec::new();
    for rule in marks {
        let mut led = Vec::new();
        for depth in [Depth::First, Depth::All] {
            led = ask(Some(rule.mark), depth)?.unwrap_or_default();
            if led.is_empty() || !led.iter().all(is_fit) {
                led.clear();
                break;
            }
        }
        if let Some(&(link, _)) = led.first() {
            match home {
                Home::On(_) => fitting.push((rule, led)),
                Home::Nowhere | Home::Several if is_settled => return Ok(Found::Nothing),
                Home::Nowhere => return Ok(Found::Doubt(Doubt::Homeless(link), rule.clone())),
                Home::Several => return Ok(Found::Doubt(Doubt::Several(link), rule.clone())),
            }
        }
    }
    let Some((rule, choices)) = fitting.first() else {
        return Ok(Found::Nothing);
    };
    let rule = *rule;
    if fitting.iter().any(|(_, other)| other != choices) {
        return Ok(Found::Doubt(Doubt::Gateways, rule.clone()));
    }
    Ok(match way(choices, rule.mark, &instead) {
        Ok(way) => Found::Way(way, rule.priority),
        Err(doubt) => Found::Doubt(doubt, rule.clone()),
    })
}

/// The way by the address's own interface, which the routes lead out by, where a program would find
/// another one.
fn to_own(own: &[u32], passed_over: &[Hop], choices: &Choices) -> Found {
    let wrong = passed_over.iter().filter(|(link, _)| !own.contains(link));
    let wrong: Vec<Hop> = wrong.copied().collect();
    match way(choices, 0, &wrong) {
        Ok(way) if !wrong.is_empty() => Found::Way(way, 0),
        Ok(_) | Err(_) => Found::Nothing,
    }
}

/// The way by the one interface of these choices, instead of these.
fn way(choices: &Choices, mark: u32, instead: &[Hop]) -> std::result::Result<MarkedWay, Doubt> {
    let mut links: Vec<u32> = choices.iter().map(|&(link, _)| link).collect();
    links.dedup();
    let &[link] = links.as_slice() else {
        return Err(Doubt::Links);
    };
    if instead.len() > MAX_INSTEAD {
        return Err(Doubt::TooMany);
    }
    Ok(MarkedWay {
        link,
        mark,
        instead_of: std::array::from_fn(|at| instead.get(at).copied()),
    })
}

/// Where the routes of IPv6 lead that rules pass over because they are short, and that a program
/// finds all the same.
fn passed_over(netlink: &Netlink, rules: &[Rule]) -> Result<Vec<Hop>> {
    let of_v6 = rules.iter().filter(|rule| rule.family == Family::V6);
    let tables: BTreeMap<u32, u32> = of_v6
        .filter_map(|rule| Some((rule.table?, rule.suppresses?)))
        .collect();
    let mut hops = BTreeSet::new();
    for (table, longest) in tables {
        let routes = listed(netlink.routes(Family::V6, table))?;
        let short = routes
            .iter()
            .filter(|route| u32::from(route.dst.1) <= longest);
        hops.extend(short.filter_map(|route| Some((route.dev?, route.via))));
    }
    Ok(hops.into_iter().collect())
}

/// Those of the rules that may be about ways out, each mark once.
fn by_mark(rules: &[Rule]) -> Vec<ByMark> {
    /// The kernel's own table beside these two (`default`).
    const TABLE_DEFAULT: u32 = 253;
    let mut found: Vec<ByMark> = Vec::new();
    for rule in rules {
        let (Some((mark, mask)), Some(table)) = (rule.mark, rule.table) else {
            continue;
        };
        let mark = mark & mask;
        let is_way = ![0, TABLE_DEFAULT, TABLE_MAIN, TABLE_LOCAL].contains(&table);
        let is_new = found.iter().all(|known| known.mark != mark);
        if mark != 0 && is_way && is_new && !rule.inverted && found.len() < MAX_MARKS {
            found.push(ByMark {
                mark,
                table,
                priority: rule.priority,
            });
        }
    }
    found
}

/// Whether a rule is about the source, and not about every one.
fn selects_source(rule: &Rule, source: IpAddr) -> bool {
    rule.from
        .is_some_and(|(addr, len)| len > 0 && Prefix::of(addr, len).contains(source))
}

/// Where packets leave by these routes.
fn choices(routes: Vec<Route>) -> Option<Choices> {
    let is_own = |route: &Route| route.kind == RouteKind::Local;
    if routes.iter().any(is_own) {
        return None;
    }
    let out = routes.into_iter();
    let out = out.filter(|route| route.kind == RouteKind::Unicast);
    let mut out: Choices = out.filter_map(|it| Some((it.dev?, it.via))).collect();
    out.sort_unstable();
    out.dedup();
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::home::tests::carrier;
    use super::*;
    use crate::kernel::netlink::Address;

    /// The address's own way out, another one, and the host's network.
    const OWN: u32 = 2;
    const OTHER: u32 = 3;
    const THIRD: u32 = 4;

    fn rule(mark: u32) -> ByMark {
        ByMark {
            mark,
            table: 100 + mark,
            priority: 1_000 + mark,
        }
    }

    fn via(link: u32, gateway: &str) -> (u32, Option<IpAddr>) {
        (link, Some(gateway.parse().unwrap()))
    }

    fn on(links: &[u32]) -> Home {
        match links {
            [] => Home::Nowhere,
            links => Home::On(links.to_vec()),
        }
    }

    /// What is found if replies leave by these ways without a mark, and with the marks 1, 2, ….
    fn found(home: &Home, unmarked: &Choices, marked: &[Choices]) -> Found {
        let marks: Vec<ByMark> = (1..).zip(marked).map(|(mark, _)| rule(mark)).collect();
        let ask = |mark: Option<u32>, depth| {
            let all = match mark {
                None => unmarked.clone(),
                Some(mark) => marked[mark as usize - 1].clone(),
            };
            let asked = match depth {
                Depth::First => 1,
                Depth::All => all.len(),
            };
            Ok(Some(all.into_iter().take(asked).collect()))
        };
        judge(home, &[], false, &marks, &ask).unwrap()
    }

    fn way(mark: u32, instead: &[Hop]) -> Found {
        let way = super::way(&vec![(OWN, None)], mark, instead).unwrap();
        Found::Way(way, rule(mark).priority)
    }

    #[test]
    fn replies_get_the_mark_that_leads_out_where_their_address_is() {
        let own = || vec![via(OWN, "192.0.2.254")];
        let other = || vec![via(OTHER, "10.0.0.1")];
        let third = || vec![via(THIRD, "10.1.0.1")];
        let none = Vec::new;
        let home = on(&[OWN]);
        assert_eq!(found(&home, &other(), &[other(), own()]), way(2, &other()));
        assert_eq!(
            found(&home, &none(), &[own(), third()]),
            way(1, &[(0, None)])
        );
        // Two marks mean the same.
        assert_eq!(found(&home, &other(), &[own(), own()]), way(1, &other()));
        // A route chooses among several by itself.
        let both = [own(), other()].concat();
        assert_eq!(found(&home, &both, &[own(), other()]), way(1, &other()));
        let gateways = [other(), vec![via(OTHER, "10.0.0.2")]].concat();
        assert_eq!(found(&home, &gateways, &[own()]), way(1, &gateways));
        for (own_links, unmarked, marked) in [
            // It leaves by its own interface as it is, or by the one that this stands on (VRRP).
            (&[OWN][..], own(), vec![own(), other()]),
            (&[7, OWN], own(), vec![other()]),
            // No mark leads there.
            (&[OWN], other(), vec![third(), other(), none()]),
            (&[OWN], other(), vec![both.clone()]),
            // It is on no interface, and no mark leads elsewhere.
            (&[], other(), vec![other(), both.clone(), none()]),
        ] {
            let found = found(&on(own_links), &unmarked, &marked);
            assert_eq!(
                found,
                Found::Nothing,
                "{own_links:?} {unmarked:?} {marked:?}"
            );
        }
        let doubt = |doubt, mark| Found::Doubt(doubt, rule(mark));
        let by_another_gateway = vec![via(OWN, "192.0.2.253")];
        let several = found(&home, &other(), &[own(), by_another_gateway]);
        assert_eq!(several, doubt(Doubt::Gateways, 1));
        let by_two = vec![via(7, "192.0.2.254"), via(OWN, "192.0.2.254")];
        let links = found(&on(&[7, OWN]), &other(), &[by_two]);
        assert_eq!(links, doubt(Doubt::Links, 1));
        let many = (1..6).map(|last| via(OTHER, &format!("10.0.0.{last}")));
        let many = found(&home, &many.collect(), &[own()]);
        assert_eq!(many, doubt(Doubt::TooMany, 1));
        let homeless = found(&Home::Nowhere, &other(), &[other(), own()]);
        assert_eq!(homeless, doubt(Doubt::Homeless(OWN), 2));
        let on_two = found(&Home::Several, &other(), &[other(), own()]);
        assert_eq!(on_two, doubt(Doubt::Several(OWN), 2));
    }

    #[test]
    fn an_administrator_who_has_a_rule_for_the_source_is_told_nothing() {
        let ask = |mark: Option<u32>, _| {
            let link = if mark.is_some() { OWN } else { OTHER };
            Ok(Some(vec![(link, None)]))
        };
        for home in [Home::Nowhere, Home::Several] {
            let found = judge(&home, &[], true, &[rule(1)], &ask).unwrap();
            assert_eq!(found, Found::Nothing);
        }
        let own_table = |_, _| Ok(None);
        let found = judge(&on(&[OWN]), &[], false, &[rule(1)], &own_table);
        assert_eq!(found.unwrap(), Found::Nothing);
    }

    #[test]
    fn a_route_that_rules_pass_over_is_not_taken_where_they_lead_out_by_the_own_interface() {
        let ask = |_, _| Ok(Some(vec![(OWN, None)]));
        let other = via(OTHER, "fe80::1");
        let judged = |home: u32, passed_over| judge(&on(&[home]), &[passed_over], false, &[], &ask);
        let Found::Way(way, _) = judged(OWN, other).unwrap() else {
            panic!("nothing");
        };
        assert_eq!((way.link, way.mark), (OWN, 0));
        assert_eq!(way.instead_of, [Some(other), None, None, None]);
        assert_eq!(judged(OWN, (OWN, None)).unwrap(), Found::Nothing);
        // A VPN for everything.
        assert_eq!(judged(THIRD, (THIRD, None)).unwrap(), Found::Nothing);
    }

    /// What is found of these prefixes, where [`OWN`] has these addresses, the default route leads
    /// elsewhere, the mark 2 leads out by that, and so do sources of which `by_source` says so.
    fn looked(
        (moved, here): (&[&str], &[&str]),
        rules: &[Rule],
        by_source: &dyn Fn(IpAddr) -> Result<bool>,
    ) -> Result<WaysBack> {
        let address = |text: &&str| Address {
            index: OWN,
            addr: text.parse().unwrap(),
            prefix: 24,
        };
        let held = Held::new(here.iter().map(address).collect());
        let carriers = [carrier(OWN, None)];
        let is_own = |addr| Ok(held.has(addr));
        let ask = |source: Option<IpAddr>, mark, _| {
            let is_own = mark == Some(2) || source.map_or(Ok(false), by_source)?;
            let other = via(OTHER, "10.0.0.1");
            Ok(Some(vec![if is_own { (OWN, None) } else { other }]))
        };
        let here = Here {
            rules,
            passed_over: &[],
            held: &held,
            carriers: &carriers,
            is_own: &is_own,
            ask: &ask,
        };
        let mut all = WaysBack::default();
        all.add(
            moved.iter().map(|text| text.parse().unwrap()).collect(),
            &here,
        )?;
        Ok(all)
    }

    fn from(priority: u32, addr: &str, len: u8) -> Rule {
        Rule {
            from: Some((addr.parse().unwrap(), len)),
            table: Some(101),
            ..Rule::of(Family::V4, priority)
        }
    }

    fn fwmark2() -> Rule {
        Rule {
            mark: Some((2, u32::MAX)),
            table: Some(102),
            ..Rule::of(Family::V4, 200)
        }
    }

    #[test]
    fn what_leaves_as_it_is_inside_of_a_marked_prefix_stays_so() {
        let here = ["192.0.2.5", "192.0.2.6", "192.0.2.7"];
        // Both rules have the same preference.
        let rules = [
            from(100, "192.0.2.5", 32),
            from(100, "192.0.2.6", 32),
            fwmark2(),
        ];
        let five: IpAddr = "192.0.2.5".parse().unwrap();
        let by_source = |source: IpAddr| Ok(source == five);
        for moved in [&["192.0.2.0/24"][..], &["192.0.2.0/24", "192.0.2.5"]] {
            let found = looked((moved, &here), &rules, &by_source).unwrap();
            let marks = |text: &str| found.marked.get(&text.parse().unwrap()).map(|it| it.mark);
            assert_eq!(marks("192.0.2.0/24"), Some(2), "by none of those");
            assert_eq!(found.marked[&five.into()], MarkedWay::NONE);
            assert_eq!(
                marks("192.0.2.6"),
                Some(2),
                "the other rule leads nowhere else"
            );
            assert_eq!(found.marked.len(), 3);
        }
        let alone = looked((&["192.0.2.5"], &here), &rules, &by_source).unwrap();
        assert_eq!(alone.marked, BTreeMap::new());
    }

    #[test]
    fn what_the_kernel_does_not_tell_is_an_error() {
        let failing = |_| Err(NetlinkError::Malformed { request: "look up" });
        let found = looked((&["192.0.2.5"], &["192.0.2.5"]), &[fwmark2()], &failing);
        assert!(found.is_err(), "{found:?}");
        let gone = NetlinkError::Refused {
            request: "look up",
            errno: Errno::NETUNREACH,
            detail: String::new(),
        };
        assert!(led_nowhere(gone).is_ok());
        let failed = NetlinkError::Socket(Errno::NOBUFS.into());
        assert!(led_nowhere(failed).is_err());
    }

    #[test]
    fn with_more_kinds_of_sources_than_are_asked_for_it_is_said_of_the_others() {
        let addrs: Vec<String> = (0..=MAX_CLASSES)
            .map(|at| format!("192.0.{}.{}", at / 256, at % 256))
            .collect();
        let mut rules: Vec<Rule> = addrs.iter().map(|addr| from(100, addr, 32)).collect();
        rules.push(fwmark2());
        let addrs: Vec<&str> = addrs.iter().map(String::as_str).collect();
        let found = looked((&addrs, &addrs), &rules, &|_| Ok(false)).unwrap();
        assert_eq!(found.marked.len(), MAX_CLASSES);
        let warnings: Vec<String> = found.said.iter().filter_map(Said::warning).collect();
        let [warning] = warnings.as_slice() else {
            panic!("{warnings:?}");
        };
        assert!(warning.contains(": 192.0.1.0 has replies"), "{warning}");
        assert!(warning.contains("`ip rule` lists"), "{warning}");
    }

    #[test]
    fn one_line_says_what_is_so_of_several_addresses_and_what_to_do_for_each() {
        let found = looked(
            (&["198.51.100.5", "198.51.100.6"], &[]),
            &[fwmark2()],
            &|_| Ok(false),
        );
        let said = found.unwrap().said;
        let warnings: Vec<String> = said.iter().filter_map(Said::warning).collect();
        let [warning] = warnings.as_slice() else {
            panic!("{warnings:?}");
        };
        let about = "198.51.100.5, 198.51.100.6 is on no interface";
        assert!(warning.contains(about), "{warning}");
        let remedy = ": ip rule add pref 200 from 198.51.100.5 lookup 102 \
                      && ip rule add pref 200 from 198.51.100.6 lookup 102";
        assert!(warning.ends_with(remedy), "{warning}");
    }

    #[test]
    fn rules_of_vpns_are_not_about_ways_out() {
        let by = |priority, mark, table| Rule {
            mark: Some(mark),
            table: Some(table),
            ..Rule::of(Family::V4, priority)
        };
        let rules = [
            by(10, (0x8_0000, 0xff_0000), TABLE_MAIN),
            Rule {
                inverted: true,
                ..by(11, (51_820, u32::MAX), 51_820)
            },
            by(12, (0x4000, 0), 7),
            Rule {
                table: None,
                ..by(13, (5, 5), 7)
            },
            by(14, (0x102, 0xff00), 8),
            by(15, (0x100, 0xff00), 9),
        ];
        let expected = ByMark {
            mark: 0x100,
            table: 8,
            priority: 14,
        };
        assert_eq!(by_mark(&rules), [expected]);
    }
}
