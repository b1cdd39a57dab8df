//! The interfaces: the one that clients use, the one that leads to a peer, and what others have put
//! on those that will carry ipmoved's programs.

use std::net::IpAddr;

use super::words::{Words, quoted};
use crate::daemon::before_ours::BeforeOurs;
use crate::daemon::service::DaemonError;
use crate::daemon::setup::{Uplinks, find_uplinks};
use crate::kernel::netlink::{
    Direction, Family, Link, Netlink, Route, RouteAnswer, RouteKind, Rule, TABLE_MAIN,
};
use crate::kernel::plan::{self, PlanError};
use crate::kernel::programs::NAME_PREFIX;
use crate::model::finding::Finding;
use crate::model::moved::Move;
use crate::model::peer::Role;

/// Most interfaces that are looked at: beyond, they are containers'.
const MAX_LINKS: usize = 64;

/// The preference before which there is none.
const FIRST: u16 = 1;

/// The interfaces that clients use, with what was found about that.
pub(super) fn uplinks(
    netlink: &Netlink,
    named: Option<&str>,
    moves: &[Move],
    towards: &[IpAddr],
    tun: &str,
    words: &Words,
) -> (Option<Uplinks>, Vec<Finding>) {
    match find_uplinks(netlink, named, moves, towards, tun) {
        Ok(uplinks) => {
            let found = uplinks.iter().map(|link| {
                let name = &link.name;
                let text = format!("clients use it; MTU {}", link.mtu);
                if link.up {
                    Finding::ok("uplink", name, text)
                } else {
                    let remedy = format!("ip link set {} up", quoted(name));
                    Finding::fail("uplink", name, "is down", remedy)
                }
            });
            let found = found.collect();
            (Some(uplinks), found)
        }
        Err(error) => {
            let others = netlink.links().unwrap_or_default();
            let usable = |link: &&Link| !link.loopback && link.up && link.name != tun;
            let other = others.iter().find(usable);
            let remedy = match (&error, other) {
                (DaemonError::Input(_), Some(other)) => {
                    words.with("uplink", std::slice::from_ref(&other.name))
                }
                _ => "ip route show table all".into(),
            };
            let object = named.unwrap_or("no interface");
            let found = Finding::fail("uplink", object, error.to_string(), remedy);
            (None, vec![found])
        }
    }
}

/// Whether the way to a peer is the one of the main table: a rule of a VPN may take it.
pub(super) fn way_to_peer(netlink: &Netlink, peer: IpAddr) -> Finding {
    const NAME: &str = "way";
    let route = match netlink.route_get(peer, None, None) {
        Ok(route) if route.kind == RouteKind::Unicast => route,
        Ok(_) => {
            let text = "has no route: it is dropped here";
            return Finding::fail(NAME, peer, text, "ip route show table all");
        }
        Err(error) => {
            let text = format!("this server has no route to it: {error}");
            return Finding::fail(NAME, peer, text, "ip route show table all");
        }
    };
    let family = Family::of(peer);
    let main = netlink.routes(family, TABLE_MAIN).unwrap_or_default();
    let rules = netlink.rules(family).unwrap_or_default();
    let name = |index: Option<u32>| {
        let link = netlink.link_by_index(index?).ok()??;
        Some(link.name)
    };
    judge_way(peer, &route, &main, &rules, &name)
}

fn judge_way(
    peer: IpAddr,
    route: &RouteAnswer,
    main: &[Route],
    rules: &[Rule],
    name: &dyn Fn(Option<u32>) -> Option<String>,
) -> Finding {
    const NAME: &str = "way";
    let link = name(route.oif).unwrap_or_default();
    let covers =
        |route: &&Route| crate::model::prefix::Prefix::of(route.dst.0, route.dst.1).contains(peer);
    let best = main
        .iter()
        .filter(covers)
        .max_by_key(|route| (route.dst.1, std::cmp::Reverse(route.metric.unwrap_or(0))));
    let by_main = best.and_then(|best| best.dev);
    let other = name(by_main).filter(|_| by_main != route.oif);
    let Some(other) = other else {
        return Finding::ok(NAME, peer, format!("the tunnel goes by {link}"));
    };
    let text = format!(
        "a rule sends the tunnel by {link}, not by {other} as the main table has it: if that is a \
         VPN for other traffic, it carries the tunnel too"
    );
    let remedy = format!(
        "{} rule add pref {} to {peer} lookup main",
        ip(peer),
        before(rules)
    );
    Finding::warn(NAME, peer, text, remedy)
}

/// The `ip` of a family.
pub(super) fn ip(addr: IpAddr) -> &'static str {
    if addr.is_ipv4() { "ip" } else { "ip -6" }
}

/// A preference before every rule of others.
pub(super) fn before(rules: &[Rule]) -> u32 {
    // The kernel's own for the local table is 0.
    let others = rules.iter().map(|rule| rule.priority);
    let first = others.filter(|&priority| priority > 0).min();
    first.map_or(1, |first| first.saturating_sub(1).max(1))
}

/// What others have put on the interfaces where ipmoved's programs will stand.
pub(super) fn filters(
    netlink: &Netlink,
    role: Role,
    carriers: &[Link],
    uplinks: Option<&Uplinks>,
) -> Vec<Finding> {
    let mut found = Vec::new();
    for link in carriers.iter().take(MAX_LINKS) {
        let is_uplink = uplinks.is_some_and(|them| them.contains(link.index));
        found.extend(to_many(role, link, is_uplink));
        found.extend(qdisc(netlink, role, link, is_uplink));
        found.extend(filter(netlink, role, link));
    }
    if found.is_empty() {
        let names: Vec<&str> = carriers.iter().map(|link| link.name.as_str()).collect();
        let shown = names.iter().take(4).copied().collect::<Vec<_>>().join(", ");
        let more = names.len().saturating_sub(4);
        let more = match more {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let object = format!("{shown}{more}");
        found.push(Finding::ok(
            "filters",
            object,
            "there is room for the programs",
        ));
    }
    found
}

/// A GRE tunnel without `remote`, which hides what leaves by it.
fn to_many(role: Role, link: &Link, is_uplink: bool) -> Option<Finding> {
    const NAME: &str = "uplink";
    let name = link.to_many.then_some(&link.name)?;
    // A tunnel to one end is another one.
    let remedy = format!("ip -details link show dev {}", quoted(name));
    Some(match role {
        Role::Old => Finding::warn(NAME, name, plan::own::NOT_NOTED_TO_MANY, remedy),
        Role::New => {
            let text = PlanError::ToMany(name.clone()).to_string();
            match is_uplink {
                true => Finding::fail(NAME, name, text, remedy),
                false => Finding::warn(NAME, name, text, remedy),
            }
        }
    })
}

/// The older qdisc, beside which clsact cannot be.
fn qdisc(netlink: &Netlink, role: Role, link: &Link, is_uplink: bool) -> Option<Finding> {
    let qdiscs = netlink.qdiscs(link.index).ok()?;
    if !qdiscs.iter().any(|kind| kind == "ingress") {
        return None;
    }
    let name = &link.name;
    let quoted = quoted(name);
    // The kernel does not turn one into the other.
    let remedy = format!("tc qdisc del dev {quoted} ingress && tc qdisc add dev {quoted} clsact");
    let filters = format!(
        "; its filters have to be made anew on clsact (see `tc filter show dev {quoted} ingress`)"
    );
    Some(match role {
        Role::Old => {
            let text = "has an ingress qdisc of others: what this server itself sends there from a \
                        moved address cannot be noted, unless it is TCP or a connected UDP socket";
            Finding::warn("qdisc", name, text.to_owned() + &filters, remedy)
        }
        Role::New if is_uplink => {
            let text = "has an ingress qdisc of others, beside which the programs cannot be";
            Finding::fail("qdisc", name, text.to_owned() + &filters, remedy)
        }
        Role::New => {
            let text = "has an ingress qdisc of others: clients that come by it are not served";
            Finding::warn("qdisc", name, text.to_owned() + &filters, remedy)
        }
    })
}

/// A filter of others that will see packets first.
fn filter(netlink: &Netlink, role: Role, link: &Link) -> Option<Finding> {
    let direction = match role {
        Role::Old => Direction::Ingress,
        Role::New => Direction::Egress,
    };
    let filters = netlink.filters(link.index, direction).ok()?;
    let is_ours = |name: Option<&str>| name.is_some_and(|name| name.starts_with(NAME_PREFIX));
    let ours = filters.iter().filter(|it| is_ours(it.name.as_deref()));
    let ours = ours.map(|it| it.priority).min();
    let mut others = filters.iter().filter(|it| !is_ours(it.name.as_deref()));
    // Without ours there: it is put before them, unless there is no place.
    let first = others.find(|it| match ours {
        Some(ours) => it.priority < ours,
        None => it.priority == FIRST,
    })?;
    let first = BeforeOurs::new(&link.name, direction, &first.kind, first.priority);
    let text = format!("{}; if nobody needs it", first.meaning());
    Some(Finding::warn(
        "filters",
        &first.object,
        text,
        &*first.remove,
    ))
}

/// The interfaces that will carry the programs: what [`plan::carriers`] says, or the named one.
pub(super) fn carriers(
    netlink: &Netlink,
    role: Role,
    named: Option<&str>,
    tun: &Link,
    uplinks: Option<&Uplinks>,
) -> Vec<Link> {
    let of_uplinks = || uplinks.into_iter().flat_map(Uplinks::iter).cloned();
    if role == Role::New && named.is_some() {
        return of_uplinks().collect();
    }
    let mut links: Vec<Link> = of_uplinks().collect();
    for link in plan::carriers(netlink, tun).unwrap_or_default() {
        if links.iter().all(|it| it.index != link.index) {
            links.push(link);
        }
    }
    links
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::finding::Grade;

    fn rule(priority: u32) -> Rule {
        Rule {
            table: Some(TABLE_MAIN),
            ..Rule::of(Family::V4, priority)
        }
    }

    #[test]
    fn a_vpn_that_takes_the_tunnel_is_seen() {
        let peer: IpAddr = "198.51.100.2".parse().unwrap();
        let answer = |oif| RouteAnswer {
            kind: RouteKind::Unicast,
            oif: Some(oif),
            gateway: None,
            prefsrc: None,
            mtu: None,
            learned_mtu: None,
        };
        let to = |dst: &str, len, dev| Route {
            dev: Some(dev),
            ..Route::to(dst.parse().unwrap(), len)
        };
        let name = |index: Option<u32>| Some(format!("eth{}", index?));
        let main = [to("0.0.0.0", 0, 2), to("10.0.0.0", 8, 5)];
        let rules = [rule(0), rule(32_763), rule(32_764), rule(32_766)];
        let judge = |oif, main: &[Route]| judge_way(peer, &answer(oif), main, &rules, &name);
        assert_eq!(judge(2, &main).result, Grade::Ok);
        let vpn = judge(9, &main);
        assert_eq!(vpn.result, Grade::Warn);
        let remedy = "ip rule add pref 32762 to 198.51.100.2 lookup main";
        assert_eq!(vpn.remedy.as_deref(), Some(remedy));
        // The main table itself leads there.
        let with = [main.as_slice(), &[to("198.51.100.0", 24, 9)]].concat();
        assert_eq!(judge(9, &with).result, Grade::Ok);
        assert_eq!(judge(9, &[]).result, Grade::Ok, "there is no other way");
    }

    #[test]
    fn a_rule_is_put_before_all_others() {
        assert_eq!(before(&[]), 1);
        assert_eq!(before(&[rule(0), rule(1)]), 1);
        assert_eq!(before(&[rule(0), rule(100), rule(50)]), 49);
    }
}
