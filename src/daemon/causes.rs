//! Causes of silence that lie in this server's own settings and routes: what the daemon itself
//! turns away, marks that lead answers astray, and ports that nobody serves yet.
//!
//! Owns what is found and what is said of it. When to look is
//! [`silence`](super::silence)'s.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use super::policy::refusal::{Refusal, Why};
use super::silence::{Around, cause, nobody_there};
use crate::flow::translate::Translator;
use crate::kernel::look::{self, Listener};
use crate::kernel::netlink::{Family, Netlink, RouteQuery};
use crate::model::asked::Asked;
use crate::model::drops::DropReason;
use crate::model::moved::{Move, TCP, UDP};
use crate::model::peer::PeerId;
use crate::model::status::Cause;

/// Causes that the new server's daemon is itself. They have the same name on the old server.
pub(super) const OWN: [&str; 6] = [
    "refused_source",
    "not_accepted",
    "no_delivery",
    "flow_table_full",
    "direct_connection",
    "dropped",
];

/// Most marks that are tried: mwan3 has one for each of its links and policies.
const MAX_MARKS: usize = 64;

/// Why the daemon turns away a client that asks for something.
pub(super) fn turned_away(
    translator: &Translator,
    refusals: &[Refusal],
    asked: &Asked,
    client: IpAddr,
    reason: DropReason,
) -> Option<Cause> {
    let found = if reason == DropReason::MartianSource {
        let network = translator.own_network(client)?;
        let (prefix, interface) = (network.prefix, network.interface);
        let text = format!(
            "the new server turns clients away whose addresses lie in {prefix} on \
                 {interface}, a network of its own"
        );
        let remedy = format!("if they are not forged, give it --clients-from {prefix}");
        cause("refused_source", text, remedy)
    } else if reason == DropReason::BadSource {
        cause(
            "refused_source",
            "the new server turns clients away that have an address of its own".into(),
            "look which of both servers is to have that address".into(),
        )
    } else if reason == DropReason::NotMoved {
        let port = (asked.port > 0).then_some(asked.port);
        let is_it = |it: &&Refusal| {
            let moved = &it.moved;
            moved.prefix.contains(asked.addr) && moved.takes(asked.protocol, port)
        };
        let refusal = refusals.iter().find(is_it)?;
        let said = refusal.to_string();
        let (text, remedy) = said.split_once("; ").unwrap_or((&said, ""));
        let remedy = match refusal.why {
            Why::NotAccepted | Why::OwnAddress | Why::Taken => remedy,
            Why::Needed(_) => "do not move it",
        };
        cause("not_accepted", text.into(), remedy.into())
    } else if reason == DropReason::NoDelivery {
        let family = if asked.addr.is_ipv4() { "IPv4" } else { "IPv6" };
        cause(
            "no_delivery",
            format!("the new server has no {family} address to deliver to"),
            "give it one with --deliver-to".into(),
        )
    } else if reason == DropReason::FlowTableFull {
        cause(
            "flow_table_full",
            "the new server's flow table is full".into(),
            "give it more with --max-flows, and look who takes them".into(),
        )
    } else {
        cause(
            "dropped",
            format!(
                "the new server's daemon drops the packets ({})",
                reason.name()
            ),
            "look at what is dropped there in `ipmoved status`".into(),
        )
    };
    Some(found)
}

/// That clients have connections to the new server directly, from the same ports.
pub(super) fn direct_connection() -> Cause {
    cause(
        "direct_connection",
        "clients have a connection to the new server itself from the same ports".into(),
        "it passes once that connection has ended; see `ss -tn` there".into(),
    )
}

/// Marks with which answers would not reach the tunnel, though without one they do: those that a
/// rule sends to a table, and those that a rule drops. Whether an answer has such a mark (`CONNMARK
/// --restore-mark`, `meta mark set`) the daemon cannot know.
pub(super) fn by_mark(
    query: RouteQuery,
    netlink: &Netlink,
    carries: &dyn Fn(u32) -> bool,
) -> (Vec<Cause>, Vec<Cause>) {
    let rules = netlink.rules(Family::of(query.dst));
    let mut by_table: BTreeMap<u32, (u32, bool)> = BTreeMap::new();
    for rule in rules.unwrap_or_default() {
        let Some((mark, mask)) = rule.mark else {
            continue;
        };
        let mark = mark & mask;
        if mark != 0 && by_table.len() < MAX_MARKS {
            by_table
                .entry(mark)
                .or_insert((rule.priority, rule.table.is_some()));
        }
    }
    let (mut astray, mut dropped) = (Vec::new(), Vec::new());
    for (mark, (priority, has_table)) in by_table {
        let query = RouteQuery {
            mark: Some(mark),
            ..query
        };
        let Some(why) = goes_astray(query, netlink, carries) else {
            continue;
        };
        let text = format!("answers that carry the mark {mark:#x} (ip rule {priority}) {why}");
        let remedy = format!(
            "look at `ip rule`, at `ip route get CLIENT from {} mark {mark:#x}`, and at what sets \
             marks (CONNMARK, `nft list ruleset`)",
            query.src.map_or_else(String::new, |src| src.to_string())
        );
        let list = if has_table { &mut astray } else { &mut dropped };
        list.push(cause("rule", text, remedy));
    }
    // One shows where to look.
    astray.truncate(2);
    dropped.truncate(1);
    (astray, dropped)
}

/// That the next host on the way to a client is not found on its link: the kernel keeps answers,
/// and drops them, before they can be taken.
pub(super) fn next_hop_missed(query: RouteQuery, netlink: &Netlink) -> Option<Cause> {
    let route = netlink.route_of(query).ok()?;
    let (oif, next) = (route.oif?, route.gateway.unwrap_or(query.dst));
    if !netlink.is_missed(oif, next).ok()? {
        return None;
    }
    let link = netlink.link_by_index(oif).ok()??;
    let name = link.name;
    let (text, remedy) = match route.gateway {
        Some(gateway) => (
            format!(
                "the gateway {gateway}, by which answers go to clients, is not found on {name}"
            ),
            format!("look at `ip neigh show dev {name}` and at the link"),
        ),
        None => (
            format!(
                "this server looks for its clients on {name}, as its own network there says, and \
                 does not find them"
            ),
            format!(
                "if they are elsewhere, take their addresses off {name} (`ip addr show dev \
                 {name}`), or add a route to them by the gateway"
            ),
        ),
    };
    Some(cause("no_neighbour", text, remedy))
}

/// What becomes of an answer that does not come to the tunnel by the kernel's routes. `carries`
/// says of an interface's index whether our programs are there, or it is the TUN.
pub(super) fn goes_astray(
    query: RouteQuery,
    netlink: &Netlink,
    carries: &dyn Fn(u32) -> bool,
) -> Option<String> {
    let oif = match netlink.route_of(query) {
        Err(error) => return Some(format!("find no route: {error}")),
        Ok(route) => route.oif?,
    };
    if carries(oif) {
        return None;
    }
    let link = netlink.link_by_index(oif).ok()??;
    let name = link.name;
    Some(format!("leave by {name}, where ipmoved does not take them"))
}

/// What nobody on this server would answer, of a move that names its ports, and that nobody has
/// asked for yet: one of its ports, and why. Only where no container or VM can be meant, since this
/// server does not forward.
pub(super) fn not_served_yet(
    peer: PeerId,
    moved: &Move,
    around: &Around<'_>,
    own: &[IpAddr],
    mut listener: impl FnMut(u8, SocketAddr) -> Option<Listener>,
) -> Option<(Asked, Cause)> {
    let translator = around.translator?;
    let addr = moved.prefix.first();
    if !around.policy.moves(peer).contains(moved) {
        return None;
    }
    if look::forwards(addr.is_ipv4()) != Some(false) {
        return None;
    }
    let mut first = None;
    let mut more = 0;
    for port in moved.ports.iter().cloned().flatten() {
        let mut missing = None;
        for protocol in [TCP, UDP] {
            if !moved.takes(protocol, Some(port)) {
                continue;
            }
            let asked = Asked {
                addr,
                protocol,
                port,
            };
            let to = translator.delivered(peer, &asked)?;
            if !own.contains(&to.ip()) {
                return None;
            }
            let found = nobody_there(&listener(protocol, to)?, to, &asked, true);
            match found.filter(|cause| cause.cause != "rejected") {
                // Of a move of both protocols one is enough.
                None => {
                    missing = None;
                    break;
                }
                Some(cause) => missing = missing.or(Some((asked, cause))),
            }
        }
        match (missing, &first) {
            (None, _) => {}
            (Some(found), None) => first = Some(found),
            (Some(_), Some(_)) => more += 1,
        }
    }
    let (asked, mut cause) = first?;
    if cause.cause == "nothing_listens" {
        cause.text.push_str(" yet");
    }
    if more > 0 {
        cause.text = format!("{}, nor for {more} more of its ports", cause.text);
    }
    Some((asked, cause))
}
