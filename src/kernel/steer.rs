//! What the new server needs of its kernel: replies to what came out of the TUN go back into it, and
//! everything else goes its ordinary way.
//!
//! ```text
//! TUN ingress: mark ──► TCP:  tcp_fwmark_accept hands the mark to the accepted socket ──┐
//!                  ├──► RST, ICMP answers: fwmark_reflect ─────────────────────────────┴► ip rule ──► table: default dev TUN
//!                  └──► UDP and the rest: the flow is remembered ──► uplink egress: redirect ──► TUN
//! ```
//!
//! Owns the mark, the table and their places. A rule that selects by mark touches no packet but
//! replies of tunnelled flows, so a client may use the new server directly at the same time. When
//! the daemon dies the TUN and its route vanish, and the blackhole behind it keeps replies from
//! leaving with the new server's own address, which would reset the client's connection.

use std::net::IpAddr;
use std::path::Path;

use super::Desired;
use super::capture::{PlanError, clsact, default_routes, filter, interface, l2_header};
use super::host::read_sysctl;
use super::journal::Change;
use super::netlink::{Direction, Family, Link, Netlink, NetlinkError, Rule, TABLE_LOCAL};
use super::programs::{self, FlowMaps};

/// The mark of what came out of the TUN: "ipmv". Compared whole, so that it never meets the single
/// bits that others use.
pub const MARK: u32 = 0x6970_6d76;

/// The routing table that the mark leads to; the same number.
pub const TABLE: u32 = MARK;

/// Preference of the rule, unless others force a lower one.
pub const RULE_PRIORITY: u32 = 100;

/// Metrics of the two default routes in the table: into the TUN, and behind it into nothing.
const TUN_METRIC: u32 = 1;
const BLACKHOLE_METRIC: u32 = 4_000_000;

/// Flows without TCP that are remembered by default; 65,536 take some 10 MB of kernel memory.
pub const MAX_FLOWS: u32 = 65_536;

/// What the new server needs: marks on `tun`, the way back into it, and on every one of `uplinks` the
/// redirection of replies without TCP.
///
/// The TUN must be up. `tunnel_port` is the tunnel's own UDP port on this host; `max_flows` bounds the
/// flows without TCP. Nothing is changed yet, but the programs are in the kernel.
///
/// # Errors
/// If the kernel refuses a program, or an interface or rule is in the way.
pub fn plan(
    netlink: &Netlink,
    uplinks: &[Link],
    tun: &Link,
    tunnel_port: u16,
    max_flows: u32,
) -> Result<Vec<Desired>, PlanError> {
    let mut desired = Vec::new();
    // Nothing may be marked before the mark leads somewhere: rules and routes first, the marking
    // program last.
    for family in [Family::V4, Family::V6] {
        if family == Family::V6 && !has_ipv6(tun) {
            continue;
        }
        let default = |dev, metric| Change::Default {
            family,
            table: TABLE,
            dev,
            metric,
        };
        desired.push(Desired::lasting(default(None, BLACKHOLE_METRIC)));
        desired.push(Desired::with_tun(default(Some(interface(tun)), TUN_METRIC)));
        desired.push(Desired::lasting(Change::Rule {
            family,
            mark: MARK,
            table: TABLE,
            priority: rule_priority(family, &netlink.rules(family)?)?,
        }));
        let reflect = match family {
            Family::V4 => "net/ipv4/fwmark_reflect",
            Family::V6 => "net/ipv6/fwmark_reflect",
        };
        desired.push(Desired::lasting(sysctl(reflect.to_owned())));
    }
    desired.push(Desired::lasting(sysctl(
        "net/ipv4/tcp_fwmark_accept".to_owned(),
    )));
    // Lets strict rp_filter look the source up with the mark, that is: in our table.
    let valid_mark = format!("net/ipv4/conf/{}/src_valid_mark", tun.name);
    desired.push(Desired::with_tun(sysctl(valid_mark)));

    let maps = FlowMaps::new(max_flows)?;
    for uplink in uplinks {
        let reply = programs::steer_egress(&maps, l2_header(uplink)?, tun.index, tunnel_port)?;
        let place = filter(netlink, uplink, Direction::Egress, reply.name())?;
        desired.push(Desired::lasting(clsact(uplink)));
        desired.push(Desired::lasting(place).program(reply.load()?));
    }
    let mark = programs::steer_mark(MARK, &maps)?;
    let place = filter(netlink, tun, Direction::Ingress, mark.name())?;
    desired.push(Desired::with_tun(clsact(tun)));
    desired.push(Desired::with_tun(place).program(mark.load()?));
    Ok(desired)
}

/// The interfaces on which replies may leave: those of the default routes, and the one towards the
/// peer.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn uplinks(netlink: &Netlink, peer: Option<IpAddr>) -> Result<Vec<Link>, NetlinkError> {
    let mut indices = default_routes(netlink, Family::V4)?;
    indices.extend(default_routes(netlink, Family::V6)?);
    if let Some(peer) = peer
        && let Ok(answer) = netlink.route_get(peer, None, None)
    {
        indices.extend(answer.oif);
    }
    let links = netlink.links()?;
    Ok(links
        .into_iter()
        .filter(|link| !link.loopback && indices.contains(&link.index))
        .collect())
}

/// Whether the kernel routes IPv6 into the TUN.
fn has_ipv6(tun: &Link) -> bool {
    read_sysctl(&format!("net/ipv6/conf/{}/disable_ipv6", tun.name)).is_ok_and(|value| value == "0")
}

/// A switch that is to be on. One that cannot be read is written anyway, and the kernel says why not.
fn sysctl(path: String) -> Change {
    debug_assert!(Path::new(&path).is_relative(), "below /proc/sys");
    Change::Sysctl {
        from: read_sysctl(&path).unwrap_or_default(),
        to: "1".to_owned(),
        path,
    }
}

/// Behind the rule for local addresses (or marked packets would not reach this host) and before
/// every other one.
fn rule_priority(family: Family, rules: &[Rule]) -> Result<u32, PlanError> {
    let local = rules
        .iter()
        .filter(|rule| rule.table == Some(TABLE_LOCAL) && !rule.selects_more)
        .map(|rule| rule.priority)
        .min()
        .unwrap_or(0);
    let own = |rule: &&Rule| rule.mark == Some((MARK, u32::MAX)) && rule.table == Some(TABLE);
    let next = rules
        .iter()
        .filter(|rule| !own(rule) && rule.priority > local)
        .map(|rule| rule.priority)
        .min();
    let next = next.unwrap_or(u32::MAX);
    // One that an earlier daemon left stays where it is, if that will do.
    let left = rules.iter().find(own).map(|rule| rule.priority);
    if let Some(left) = left
        && local < left
        && left < next
    {
        return Ok(left);
    }
    let wanted = RULE_PRIORITY.max(local.saturating_add(1)).min(next - 1);
    if wanted > local {
        Ok(wanted)
    } else {
        Err(PlanError::NoRulePriority(family, next))
    }
}
