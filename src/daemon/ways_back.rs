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
//! | any | leads elsewhere, and the address is on no interface | a warning |
//!
//! The same is done where the kernel tells a program less than it knows: of IPv6 its look-up for
//! programs takes no note of `suppress_prefixlength` (`fib6_rule_suppress` in net/ipv6/fib6_rules.c
//! asks for what only other look-ups have), and finds the default route that such a rule passes
//! over. Then no mark is set.
//!
//! Only what would leave by the way without a mark gets one: clients in other networks of this host
//! (a LAN, containers) are answered there.
//!
//! Not every rule by mark is about ways out. A rule for what has *not* a mark is a VPN's for all
//! but its own packets (wg-quick); one to the main table lets a VPN's packets out (Tailscale); and
//! one to local routes is a transparent proxy's.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use super::held::{self, Held};
use crate::kernel::netlink::{
    Family, Link, Nature, Netlink, Route, RouteKind, RouteQuery, Rule, TABLE_LOCAL, TABLE_MAIN,
};
use crate::kernel::plan::PUBLIC;
use crate::kernel::programs::{MAX_INSTEAD, MarkedWay};
use crate::model::finding::Finding;
use crate::model::moved::Move;
use crate::model::prefix::Prefix;

/// How the lines begin that say that replies may leave by the wrong way.
pub(super) const UNKNOWN: &str = "replies may leave by the wrong way: ";

/// Most marks that are asked for: more than any of the usual programs has ways out.
const MAX_MARKS: usize = 64;

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

/// What is to be said of moved addresses.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Said {
    /// Which.
    about: Vec<Prefix>,
    /// What is so.
    text: String,
    /// What to do, if something may be wrong.
    remedy: Option<String>,
}

impl Said {
    /// As a line of its own, if something may be wrong.
    pub(super) fn warning(&self) -> Option<String> {
        let Self {
            about,
            text,
            remedy,
        } = self;
        let remedy = remedy.as_ref()?;
        Some(format!("{UNKNOWN}{} {text}: {remedy}", held::names(about)))
    }

    /// As a line of its own, if all is well.
    pub(super) fn note(&self) -> Option<String> {
        let Self { about, text, .. } = self;
        self.remedy
            .is_none()
            .then(|| format!("{} {text}", held::names(about)))
    }

    /// As a finding of `check`.
    pub(super) fn finding(&self) -> Finding {
        let object = held::names(&self.about);
        match &self.remedy {
            None => Finding::ok("route", object, self.text.clone()),
            Some(remedy) => Finding::warn("route", object, self.text.clone(), remedy.clone()),
        }
    }
}

/// A rule by mark that may be about ways out.
#[derive(Clone, PartialEq, Eq, Debug)]
struct ByMark {
    mark: u32,
    table: u32,
    priority: u32,
}

/// Where packets leave, by routes among which the kernel chooses; empty if no route leads anywhere.
type Choices = Vec<(u32, Option<IpAddr>)>;

/// What the routes say: `None` if it is this host's own.
type Ask<'a> = &'a dyn Fn(IpAddr, Option<IpAddr>, Option<u32>) -> Option<Choices>;

/// An interface that receives packets of its own.
#[derive(Clone, Debug)]
struct Carrier {
    index: u32,
    name: String,
    /// The interface by which it sends and receives, if it is another address on that (VRRP).
    lower: Option<u32>,
}

/// What was found out about addresses with the same interfaces and rules.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Found {
    Nothing,
    Way(MarkedWay, u32),
    Several(ByMark),
    Homeless(ByMark, u32),
}

impl WaysBack {
    /// Looks what the rules of this server mean for the replies of `moves`.
    pub(super) fn look(netlink: &Netlink, moves: &[Move], held: &Held, tun: u32) -> Self {
        let mut all = Self::default();
        let mut carriers = None;
        for family in [Family::V4, Family::V6] {
            let rules = netlink.rules(family).unwrap_or_default();
            all.detailed |= rules.iter().any(|rule| rule.detailed);
            let passed_over = passed_over(netlink, &rules);
            if by_mark(&rules).is_empty() && passed_over.is_empty() {
                continue;
            }
            let carriers: &Vec<Carrier> = carriers.get_or_insert_with(|| {
                let links = netlink.links().unwrap_or_default();
                let natures = netlink.natures().unwrap_or_default();
                receiving(&links, &natures, tun)
            });
            let is_own = |addr| {
                let route = netlink.route_get(addr, None, None);
                route.is_ok_and(|route| route.kind == RouteKind::Local)
            };
            let ask = |to, from: Option<IpAddr>, mark| {
                let query = RouteQuery {
                    dst: to,
                    src: from,
                    mark,
                    from: None,
                };
                choices(netlink.choices(query).unwrap_or_default())
            };
            let found = (&*rules, &*passed_over);
            all.add(family, found, moves, held, carriers, (&is_own, &ask));
        }
        all
    }

    /// Adds those of a family.
    fn add(
        &mut self,
        family: Family,
        (rules, passed_over): (&[Rule], &[u32]),
        moves: &[Move],
        held: &Held,
        carriers: &[Carrier],
        (is_own, ask): (&dyn Fn(IpAddr) -> bool, Ask<'_>),
    ) {
        let marks = by_mark(rules);
        let Some(far) = PUBLIC.into_iter().find(|ip| Family::of(*ip) == family) else {
            return;
        };
        let prefixes: BTreeSet<Prefix> = moves
            .iter()
            .map(|moved| moved.prefix)
            .filter(|prefix| Family::of(prefix.first()) == family)
            .collect();
        // The answer is the same for all that have the same interface and the same rules.
        let mut asked: HashMap<(Vec<u32>, Vec<u32>), Found> = HashMap::new();
        let mut said: Vec<(Found, Vec<Prefix>)> = Vec::new();
        for prefix in prefixes {
            let own = home(prefix, held, carriers);
            let source = held.within(prefix).next();
            let source = source.map_or(prefix.first(), |held| held.addr);
            let of_source: Vec<u32> = rules
                .iter()
                .filter(|rule| selects_source(rule, source))
                .map(|rule| rule.priority)
                .collect();
            let found = asked.entry((own, of_source)).or_insert_with_key(|key| {
                let (own, of_source) = key;
                // The kernel answers for sources of this host alone.
                let source = Some(source).filter(|&source| is_own(source));
                if source.is_none() && !of_source.is_empty() {
                    return Found::Nothing;
                }
                let ask = |mark| ask(far, source, mark);
                judge(own, passed_over, !of_source.is_empty(), &marks, &ask)
            });
            if let Found::Way(way, _) = found {
                self.marked.insert(prefix, way.clone());
            }
            match said.iter_mut().find(|(known, _)| known == found) {
                Some((_, about)) => about.push(prefix),
                None => said.push((found.clone(), vec![prefix])),
            }
        }
        let name = |index: u32| {
            let mut carriers = carriers.iter();
            let carrier = carriers.find(|carrier| carrier.index == index);
            carrier.map_or_else(|| format!("interface {index}"), |it| it.name.clone())
        };
        let said = said.into_iter();
        let said = said.filter_map(|(found, about)| in_words(found, about, &name));
        self.said.extend(said);
    }
}

/// What is said of those for which that was found.
fn in_words(found: Found, about: Vec<Prefix>, name: &dyn Fn(u32) -> String) -> Option<Said> {
    let first = about.first()?;
    let by_source = |rule: &ByMark| {
        let ip = if first.is_ipv4() { "ip" } else { "ip -6" };
        let ByMark {
            table, priority, ..
        } = rule;
        format!("{ip} rule add pref {priority} from {first} lookup {table}")
    };
    let shown = |ByMark { mark, priority, .. }: &ByMark| format!("{priority} (fwmark {mark:#x})");
    let (text, remedy) = match found {
        Found::Nothing | Found::Way(MarkedWay { mark: 0, .. }, _) => return None,
        Found::Way(way, priority) => {
            let text = format!(
                "answers by {} with the mark {:#x}, as `ip rule` {priority} has it",
                name(way.link),
                way.mark
            );
            (text, None)
        }
        Found::Several(rule) => {
            let text = format!(
                "would answer by another interface than its own without a mark, and rules by mark \
                 lead out there by different ways, such as `ip rule` {}; packets of moved \
                 addresses have no marks, so say which way it is",
                shown(&rule)
            );
            (text, Some(by_source(&rule)))
        }
        Found::Homeless(rule, link) => {
            let text = format!(
                "is on no interface by which clients come, and packets of moved addresses have no \
                 marks, so that `ip rule` {}, which leads out by {}, is not asked; if clients come \
                 there",
                shown(&rule),
                name(link)
            );
            (text, Some(by_source(&rule)))
        }
    };
    Some(Said {
        about,
        text,
        remedy,
    })
}

/// What is to be done for an address on these interfaces, where programs find the links of routes
/// that are `passed_over`. `is_settled` says that a rule
/// goes by its source.
fn judge(
    own: &[u32],
    passed_over: &[u32],
    is_settled: bool,
    marks: &[ByMark],
    ask: &dyn Fn(Option<u32>) -> Option<Choices>,
) -> Found {
    let Some(unmarked) = ask(None) else {
        return Found::Nothing;
    };
    let mut instead: Vec<u32> = unmarked.iter().map(|&(link, _)| link).collect();
    if instead.is_empty() {
        instead.push(0);
    }
    instead.retain(|link| !own.contains(link));
    instead.sort_unstable();
    instead.dedup();
    if instead.is_empty() {
        return to_own(own, passed_over, &unmarked);
    }
    let leads = |rule: &ByMark| ask(Some(rule.mark)).filter(|choices| !choices.is_empty());
    let led: Vec<(&ByMark, Choices)> = marks
        .iter()
        .filter_map(|rule| Some((rule, leads(rule)?)))
        .collect();
    if own.is_empty() {
        let elsewhere = |choices: &Choices| {
            let mut choices = choices.iter();
            choices.all(|(link, _)| !instead.contains(link))
        };
        let mut others = led.iter().filter(|(_, choices)| elsewhere(choices));
        return match others.next() {
            Some((rule, choices)) if !is_settled => {
                let link = choices.first().map_or(0, |&(link, _)| link);
                Found::Homeless((*rule).clone(), link)
            }
            Some(_) | None => Found::Nothing,
        };
    }
    let by_own = |choices: &Choices| choices.iter().all(|(link, _)| own.contains(link));
    let fitting: Vec<_> = led.iter().filter(|(_, it)| by_own(it)).collect();
    let Some((rule, choices)) = fitting.first() else {
        return Found::Nothing;
    };
    let is_one = fitting.iter().all(|(_, other)| other == choices);
    match way(choices, rule.mark, &instead) {
        Some(way) if is_one => Found::Way(way, rule.priority),
        Some(_) | None => Found::Several((*rule).clone()),
    }
}

/// The way by the address's own interface, which the routes lead out by, where a program would find
/// another one.
fn to_own(own: &[u32], passed_over: &[u32], choices: &Choices) -> Found {
    let wrong = passed_over.iter().filter(|link| !own.contains(link));
    let wrong: Vec<u32> = wrong.copied().collect();
    match way(choices, 0, &wrong) {
        Some(way) if !wrong.is_empty() => Found::Way(way, 0),
        Some(_) | None => Found::Nothing,
    }
}

/// The way by the one interface of these choices, if it is one, instead of these.
fn way(choices: &Choices, mark: u32, instead: &[u32]) -> Option<MarkedWay> {
    let mut links: Vec<u32> = choices.iter().map(|&(link, _)| link).collect();
    links.dedup();
    let &[link] = links.as_slice() else {
        return None;
    };
    (instead.len() <= MAX_INSTEAD).then(|| MarkedWay {
        link,
        mark,
        instead_of: std::array::from_fn(|at| instead.get(at).copied()),
    })
}

/// The links of the routes of IPv6 that rules pass over because they are short, and that a program
/// finds all the same.
fn passed_over(netlink: &Netlink, rules: &[Rule]) -> Vec<u32> {
    let of_v6 = rules.iter().filter(|rule| rule.family == Family::V6);
    let tables: BTreeMap<u32, u32> = of_v6
        .filter_map(|rule| Some((rule.table?, rule.suppresses?)))
        .collect();
    let mut links = BTreeSet::new();
    for (table, longest) in tables {
        let routes = netlink.routes(Family::V6, table).unwrap_or_default();
        let short = routes
            .iter()
            .filter(|route| u32::from(route.dst.1) <= longest);
        links.extend(short.filter_map(|route| route.dev));
    }
    links.into_iter().collect()
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

/// The interfaces that receive packets of their own, but the TUN.
fn receiving(links: &[Link], natures: &[Nature], tun: u32) -> Vec<Carrier> {
    let nature = |index: u32| natures.iter().find(|nature| nature.index == index);
    let kind = |index: u32| nature(index).and_then(|nature| nature.kind.as_deref());
    let has_ports = |index: u32| natures.iter().any(|nature| nature.master == Some(index));
    let receives = |link: &&Link| match kind(link.index) {
        Some("dummy" | "ifb" | "nlmon") => false,
        Some("bridge") => has_ports(link.index),
        Some(_) | None => !link.loopback && !link.port && link.index != tun,
    };
    let carriers = links.iter().filter(receives).map(|link| Carrier {
        index: link.index,
        name: link.name.clone(),
        lower: match kind(link.index) {
            Some("macvlan" | "ipvlan") => nature(link.index).and_then(|nature| nature.lower),
            Some(_) | None => None,
        },
    });
    carriers.collect()
}

/// The interface that holds addresses of a prefix, or in whose network it lies, and the one by
/// which that sends; none if that is not clear.
fn home(prefix: Prefix, held: &Held, carriers: &[Carrier]) -> Vec<u32> {
    let on = |index: u32| carriers.iter().find(|carrier| carrier.index == index);
    let of = |indexes: BTreeSet<u32>| -> Vec<u32> {
        let found = indexes.iter().filter_map(|&index| on(index));
        let senders: BTreeSet<u32> = found.map(|it| it.lower.unwrap_or(it.index)).collect();
        match senders.len() {
            1 => indexes.union(&senders).copied().collect(),
            _ => Vec::new(),
        }
    };
    let receiving = |index: &u32| on(*index).is_some();
    let holding = held.within(prefix).map(|held| held.index);
    let holding: BTreeSet<u32> = holding.filter(receiving).collect();
    let around = || {
        let covers = |network: Prefix| !network.is_single() && network.covers(&prefix);
        let around = held
            .iter()
            .filter(|it| covers(Prefix::of(it.addr, it.prefix)));
        around.map(|held| held.index).filter(receiving).collect()
    };
    of(if holding.is_empty() {
        around()
    } else {
        holding
    })
}

#[cfg(test)]
mod tests {
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

    /// What is found if replies leave by these ways without a mark, and with the marks 1, 2, ….
    fn found(own: &[u32], unmarked: &Choices, marked: &[Choices]) -> Found {
        let marks: Vec<ByMark> = (1..).zip(marked).map(|(mark, _)| rule(mark)).collect();
        let ask = |mark: Option<u32>| match mark {
            None => Some(unmarked.clone()),
            Some(mark) => Some(marked[mark as usize - 1].clone()),
        };
        judge(own, &[], false, &marks, &ask)
    }

    fn way(mark: u32, instead: &[u32]) -> Found {
        let way = super::way(&vec![(OWN, None)], mark, instead).unwrap();
        Found::Way(way, rule(mark).priority)
    }

    #[test]
    fn replies_get_the_mark_that_leads_out_where_their_address_is() {
        let own = || vec![via(OWN, "192.0.2.254")];
        let other = || vec![via(OTHER, "10.0.0.1")];
        let third = || vec![via(THIRD, "10.1.0.1")];
        let none = Vec::new;
        assert_eq!(found(&[OWN], &other(), &[other(), own()]), way(2, &[OTHER]));
        assert_eq!(found(&[OWN], &none(), &[own(), third()]), way(1, &[0]));
        // Two marks mean the same.
        assert_eq!(found(&[OWN], &other(), &[own(), own()]), way(1, &[OTHER]));
        // A route chooses among several by itself.
        let both = [own(), other()].concat();
        assert_eq!(found(&[OWN], &both, &[own(), other()]), way(1, &[OTHER]));
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
            let found = found(own_links, &unmarked, &marked);
            assert_eq!(
                found,
                Found::Nothing,
                "{own_links:?} {unmarked:?} {marked:?}"
            );
        }
        let by_another_gateway = vec![via(OWN, "192.0.2.253")];
        let several = found(&[OWN], &other(), &[own(), by_another_gateway]);
        assert_eq!(several, Found::Several(rule(1)));
        let homeless = found(&[], &other(), &[other(), own()]);
        assert_eq!(homeless, Found::Homeless(rule(2), OWN));
    }

    #[test]
    fn an_administrator_who_has_a_rule_for_the_source_is_told_nothing() {
        let ask = |mark: Option<u32>| Some(vec![(if mark.is_some() { OWN } else { OTHER }, None)]);
        assert_eq!(judge(&[], &[], true, &[rule(1)], &ask), Found::Nothing);
        let own_table = |_| None;
        assert_eq!(
            judge(&[OWN], &[], false, &[rule(1)], &own_table),
            Found::Nothing
        );
    }

    #[test]
    fn a_route_that_rules_pass_over_is_not_taken_where_they_lead_out_by_the_own_interface() {
        let ask = |_| Some(vec![(OWN, None)]);
        let Found::Way(way, _) = judge(&[OWN], &[OTHER], false, &[], &ask) else {
            panic!("nothing");
        };
        assert_eq!((way.link, way.mark), (OWN, 0));
        assert_eq!(way.instead_of, [Some(OTHER), None, None, None]);
        assert_eq!(judge(&[OWN], &[OWN], false, &[], &ask), Found::Nothing);
        // A VPN for everything.
        assert_eq!(judge(&[THIRD], &[THIRD], false, &[], &ask), Found::Nothing);
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

    #[test]
    fn an_address_is_at_home_where_it_is_held_or_in_whose_network_it_lies() {
        let carrier = |index, lower| Carrier {
            index,
            name: format!("eth{index}"),
            lower,
        };
        let carriers = [carrier(2, None), carrier(3, None), carrier(9, Some(2))];
        let held = |texts: &[(u32, &str, u8)]| {
            let address = |&(index, addr, prefix): &(u32, &str, u8)| Address {
                index,
                addr: addr.parse().unwrap(),
                prefix,
            };
            Held::new(texts.iter().map(address).collect())
        };
        let here = held(&[
            (2, "192.0.2.1", 24),
            (3, "198.51.100.1", 24),
            (3, "198.51.100.5", 32),
            (9, "192.0.2.9", 24),
            // A dummy.
            (7, "192.0.2.77", 32),
            (7, "203.0.113.7", 32),
            // One network on two interfaces.
            (2, "198.18.0.2", 24),
            (3, "198.18.0.3", 24),
        ]);
        let home = |text: &str| home(text.parse().unwrap(), &here, &carriers);
        assert_eq!(home("192.0.2.1"), [2]);
        assert_eq!(home("198.51.100.5"), [3]);
        assert_eq!(home("198.51.100.64/26"), [3]);
        assert_eq!(home("192.0.2.9"), [2, 9], "as VRRP has it");
        assert_eq!(home("192.0.2.77"), [2, 9], "its network is there");
        assert_eq!(home("203.0.113.7"), [0; 0]);
        assert_eq!(home("203.0.113.0/24"), [0; 0]);
        assert_eq!(home("198.18.0.3"), [3]);
        assert_eq!(home("198.18.0.77"), [0; 0], "that is not clear");
    }
}
