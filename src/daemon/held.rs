//! Which of the moved addresses this server has, on which interfaces, and whether packets for the
//! others can reach it.
//!
//! Owns the questions alone, as functions of what was listed. With thousands of moves none of them
//! goes through all addresses for each move.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::num::NonZeroU16;

use crate::kernel::netlink::{Address, Route, RouteKind};
use crate::model::moved::Move;
use crate::model::prefix::Prefix;
use crate::model::scopes::number_of;

/// Moves that one warning names.
pub(super) const NAMED: usize = 4;

/// This server's addresses, in order.
#[derive(Debug)]
pub(super) struct Held(Vec<(u128, Address)>);

impl Held {
    /// From what the kernel lists.
    pub(super) fn new(addresses: Vec<Address>) -> Self {
        let numbered = addresses
            .into_iter()
            .map(|held| (number_of(held.addr), held));
        let mut all: Vec<(u128, Address)> = numbered.collect();
        all.sort_by_key(|&(number, _)| number);
        Self(all)
    }

    /// Those that lie in a prefix, in order.
    pub(super) fn within(&self, prefix: Prefix) -> impl Iterator<Item = &Address> {
        let (first, last) = (number_of(prefix.first()), number_of(prefix.last()));
        let start = self.0.partition_point(|&(number, _)| number < first);
        let within = self.0[start..].iter();
        within
            .take_while(move |&&(number, _)| number <= last)
            .map(|(_, held)| held)
    }

    /// Whether this server has the address.
    pub(super) fn has(&self, addr: IpAddr) -> bool {
        self.within(addr.into()).next().is_some()
    }

    /// All of them.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Address> {
        self.0.iter().map(|(_, held)| held)
    }
}

/// What an administrator has to know of moved addresses that this server does not have: a line for
/// each kind.
pub(super) fn absent(moves: &[Move], held: &Held, local: &[Prefix]) -> Vec<String> {
    let mut networks: Vec<Prefix> = held
        .iter()
        .map(|held| Prefix::of(held.addr, held.prefix))
        .filter(|network| !network.is_single())
        .collect();
    networks.sort_unstable();
    networks.dedup();
    let mut prefixes: Vec<Prefix> = moves.iter().map(|moved| moved.prefix).collect();
    prefixes.sort_unstable();
    prefixes.dedup();
    let (mut elsewhere, mut unanswered) = (Vec::new(), Vec::new());
    for prefix in prefixes {
        let here = held.within(prefix).count();
        let size = number_of(prefix.last()) - number_of(prefix.first());
        let is_all = here as u128 > size || local.iter().any(|it| it.covers(&prefix));
        if is_all {
        } else if !prefix.is_single() && networks.iter().any(|it| it.overlaps(&prefix)) {
            unanswered.push(prefix);
        } else if here == 0 {
            elsewhere.push(prefix);
        }
    }
    let mut lines = Vec::new();
    if let Some(first) = unanswered.first() {
        let (v4, v6) = (
            unanswered.iter().any(Prefix::is_ipv4),
            unanswered.iter().any(|prefix| !prefix.is_ipv4()),
        );
        let mut remedy = String::new();
        if v4 {
            let _ = write!(
                remedy,
                "; for IPv4 `ip route add local {first} dev lo` does as well"
            );
        }
        if v6 {
            remedy.push_str("; for IPv6 ndppd or `ip -6 neigh add proxy` can answer");
        }
        lines.push(format!(
            "{} lies in a network that this server is in, and nobody there is told where its \
             addresses are, but for those that are configured here: configure them all, or have \
             the prefix routed to this server{remedy}",
            names(&unanswered)
        ));
    }
    if !elsewhere.is_empty() {
        lines.push(format!(
            "not configured on this server: {}; packets for that come only if the network routes \
             them here",
            names(&elsewhere)
        ));
    }
    let mut single = elsewhere.iter().filter(|it| it.is_single());
    if let Some(meant) = single.find_map(|it| with_port(it.first(), held)) {
        lines.push(format!(
            "{meant} is what to write if the end of that IPv6 address is meant as a port"
        ));
    }
    lines
}

/// How an address of this server with a port is written, where an IPv6 address that it has not is
/// the same without brackets. Both are right, so that nothing refuses it.
pub(super) fn with_port(addr: IpAddr, held: &Held) -> Option<String> {
    let text = addr.to_string();
    let (front, port) = text.rsplit_once(':')?;
    let front: IpAddr = front.parse().ok()?;
    let port: NonZeroU16 = port.parse().ok()?;
    held.has(front).then(|| format!("[{front}]:{port}"))
}

/// The prefix of which a route makes every address this server's own.
pub(super) fn local_prefix(route: &Route) -> Option<Prefix> {
    let (addr, len) = route.dst;
    (route.kind == RouteKind::Local).then(|| Prefix::of(addr, len))
}

/// The parts of a prefix beside one of its addresses.
pub(super) fn beside(prefix: Prefix, addr: IpAddr) -> Vec<Prefix> {
    let mut parts = Vec::new();
    let mut rest = prefix;
    while let Some(halves) = rest.halves() {
        for half in halves {
            if half.contains(addr) {
                rest = half;
            } else {
                parts.push(half);
            }
        }
    }
    parts.sort_unstable();
    parts
}

/// The first of these, and how many more there are.
pub(super) fn names(prefixes: &[Prefix]) -> String {
    first_of(prefixes, NAMED)
}

/// The first `named` of all, and how many more there are.
pub(super) fn first_of(all: &[impl ToString], named: usize) -> String {
    let first = all.iter().take(named).map(ToString::to_string);
    let mut first = first.collect::<Vec<_>>().join(", ");
    if let Some(more) = all.len().checked_sub(named).filter(|&more| more > 0) {
        let _ = write!(first, " and {more} more");
    }
    first
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(texts: &[&str]) -> Held {
        let address = |text: &&str| {
            let (addr, len) = text.split_once('/').unwrap();
            Address {
                index: 2,
                addr: addr.parse().unwrap(),
                prefix: len.parse().unwrap(),
            }
        };
        Held::new(texts.iter().map(address).collect())
    }

    fn moves(texts: &[&str]) -> Vec<Move> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn what_neighbours_are_not_told_of_is_warned_of() {
        let here = held(&["192.0.2.1/24", "192.0.2.17/24", "2001:db8:a::1/64"]);
        let local = ["192.0.2.32/28".parse().unwrap()];
        let told = |texts: &[&str]| absent(&moves(texts), &here, &local);
        assert!(
            told(&[
                "192.0.2.1",
                "192.0.2.17:80",
                "192.0.2.32/28",
                "192.0.2.36/30"
            ])
            .is_empty()
        );
        let lines = told(&["192.0.2.16/28", "198.51.100.0/24", "203.0.113.5"]);
        assert_eq!(lines.len(), 2);
        assert!(
            lines[0].starts_with("192.0.2.16/28 lies in a network"),
            "{}",
            lines[0]
        );
        assert!(
            lines[0].contains("ip route add local 192.0.2.16/28 dev lo"),
            "{}",
            lines[0]
        );
        assert!(!lines[0].contains("ndppd"));
        assert!(
            lines[1].contains("198.51.100.0/24, 203.0.113.5; packets"),
            "{}",
            lines[1]
        );
        let lines = told(&["2001:db8:a::/64"]);
        assert!(lines[0].contains("ndppd"), "{}", lines[0]);
        // Many are told in one line.
        let many: Vec<String> = (0..100).map(|n| format!("198.51.100.{n}")).collect();
        let lines = absent(
            &moves(&many.iter().map(String::as_str).collect::<Vec<_>>()),
            &here,
            &[],
        );
        assert_eq!(lines.len(), 1);
        assert!(
            lines[0].contains("198.51.100.3 and 96 more"),
            "{}",
            lines[0]
        );
    }

    #[test]
    fn an_ipv6_address_and_a_port_without_brackets_are_not_taken_for_meant() {
        let here = held(&["2001:db8:a::1/64", "2001:db8:a::5/64"]);
        let told = |text: &str| absent(&moves(&[text]), &here, &[]);
        for text in ["2001:db8:a::5:80", "2001:db8:a::5:80/tcp"] {
            let lines = told(text);
            assert!(lines[1].starts_with("[2001:db8:a::5]:80 is"), "{lines:?}");
        }
        for text in [
            "2001:db8:a::5",
            "2001:db8:a::7:80",
            "2001:db8:a::5:ff",
            "192.0.2.5:80",
        ] {
            assert!(told(text).len() < 2, "{text}");
        }
    }

    #[test]
    fn the_parts_beside_an_address_are_all_the_rest() {
        let parts = beside(
            "192.0.2.0/29".parse().unwrap(),
            "192.0.2.1".parse().unwrap(),
        );
        let texts: Vec<String> = parts.iter().map(ToString::to_string).collect();
        assert_eq!(texts, ["192.0.2.0", "192.0.2.2/31", "192.0.2.4/30"]);
    }
}
