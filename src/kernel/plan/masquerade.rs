//! The kernel changes of the old server with `nat`, where it translates both addresses itself:
//! packets to moved addresses and the new server's replies go into the TUN, and packets that the
//! daemon writes to the TUN leave towards either.
//!
//! ```text
//! uplink ingress ── capture (moved addresses) ──┐           ┌──► uplink: clients
//!                ── replies (borrowed ports) ───┴─► TUN ────┼──► uplink: new server
//!                                                           └──► the host's own stack (bounced)
//! uplink egress  ── note_own: what this host has itself, which capture leaves to it
//! ```
//!
//! Owns the reservation of the borrowed ports, and the question whether somebody uses one of them
//! already. The captures outlive the daemon and then lead into nothing: neither client nor new
//! server gets a reset, and connections live on when the daemon is back.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use super::{PlanError, behind, clsact, filter, filter_from, l2_header};
use crate::kernel::Desired;
use crate::kernel::change::{Change, Sysctl, read_sysctl};
use crate::kernel::netlink::{Direction, Link, Netlink};
use crate::kernel::programs::{self, Facts, Pair, Way};
use crate::model::moved::Move;

/// Ports that the kernel gives to no socket that does not name its port (`ip-sysctl`); for IPv6
/// too.
const RESERVED: &str = "net/ipv4/ip_local_reserved_ports";

/// One destination of the translation, and the path to it.
#[derive(Clone, Debug)]
pub struct Towards {
    /// The new server's address.
    pub to: IpAddr,
    /// Our own address towards it.
    pub own: IpAddr,
    /// The interface towards it.
    pub link: Link,
}

/// The changes for `nat`.
#[derive(Debug)]
pub struct Plan {
    /// All but the last one.
    pub first: Vec<Desired>,
    /// The capture of what has moved. Its packets may get replies at once.
    pub captures: Vec<Desired>,
    facts: Facts,
}

impl Plan {
    /// Takes in the connections of hosts behind this one that are older ([`super::own`]). Call it
    /// before the capture is made, and after all else.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn note_older(&self, netlink: &Netlink, moves: &[Move]) -> Result<(), PlanError> {
        super::own::note_older(netlink, self.facts.own(), moves)
    }
}

/// The changes for `nat`: both captures, the programs that send, and reserved `ports`.
///
/// # Errors
/// If the kernel refuses a program, or the programs cannot work on one of the interfaces.
pub fn plan(
    netlink: &Netlink,
    moves: &[Move],
    uplink: &Link,
    towards: &[Towards],
    tun: &Link,
    ports: &RangeInclusive<u16>,
) -> Result<Plan, PlanError> {
    let way = |link: &Link| -> Result<Way, PlanError> {
        let replies = towards.iter().any(|end| end.link.index == link.index);
        Ok(Way {
            captures: u32::from(link.index == uplink.index) + u32::from(replies),
            ifindex: link.index,
            l2_header: l2_header(link)?,
            mac: link.mac,
        })
    };
    let (mut servers, mut local) = (Vec::new(), Vec::new());
    for end in towards {
        servers.push((end.to, way(&end.link)?));
        local.push((end.own, way(&end.link)?));
    }
    for moved in moves {
        local.push((moved.prefix.first(), way(uplink)?));
    }
    let own = super::own::memory(netlink, std::slice::from_ref(uplink), &[])?;
    let facts = Facts::remembering(moves, &[], own)?;
    let l2 = l2_header(uplink)?;
    let out = programs::way_out(way(uplink)?, &servers, &local, facts.own())?;
    let capture = programs::capture(&facts, l2, tun.index, None)?;
    let noting = programs::note_own(&facts, l2, tun.index, None)?;
    let on_tun = filter(netlink, tun, Direction::Ingress, out.name())?;
    let on_uplink = filter(netlink, uplink, Direction::Ingress, capture.name())?;
    let mut desired = vec![
        Desired::with_tun(clsact(tun)),
        Desired::with_tun(on_tun).program(out.load()?),
    ];
    // Others add to this list, too. Once they do, we must not restore the old one.
    desired.extend(reservation(ports).map(|change| Desired::lasting(change).once()));
    let mut links: Vec<&Link> = Vec::new();
    for end in towards {
        if links.iter().all(|known| known.index != end.link.index) {
            links.push(&end.link);
        }
    }
    for link in links {
        let pairs: Vec<Pair> = towards
            .iter()
            .filter(|end| end.link.index == link.index)
            .map(|end| Pair {
                own: end.own,
                to: end.to,
            })
            .collect();
        let replies = programs::replies(&pairs, ports, l2_header(link)?, tun.index)?;
        // It stands beside the capture, which may have the same preference.
        let (program, first) = (replies.name(), behind([&on_uplink], Direction::Ingress));
        let place = filter_from(netlink, link, Direction::Ingress, program, first)?;
        if link.index != uplink.index {
            desired.push(Desired::lasting(clsact(link)));
        } else if !desired.iter().any(|it| it.change == clsact(uplink)) {
            desired.push(Desired::lasting(clsact(uplink)));
        }
        desired.push(Desired::lasting(place).program(replies.load()?));
    }
    if !desired.iter().any(|it| it.change == clsact(uplink)) {
        desired.push(Desired::lasting(clsact(uplink)));
    }
    let on_way_out = super::own::place(netlink, uplink)?;
    desired.push(Desired::lasting(on_way_out).program(noting.load()?));
    Ok(Plan {
        first: desired,
        captures: vec![Desired::lasting(on_uplink).program(capture.load()?)],
        facts,
    })
}

/// The change that reserves `ports` as well; ports that somebody else has reserved stay so.
fn reservation(ports: &RangeInclusive<u16>) -> Option<Change> {
    let from = read_sysctl(RESERVED).ok()?;
    Some(Change::Sysctl(Sysctl {
        path: RESERVED.to_owned(),
        to: with_reserved(&from, ports),
        from,
        on: None,
    }))
}

/// A list of ports and ranges with one more range, as the kernel writes it: sorted, and merged
/// where ranges touch.
fn with_reserved(list: &str, ports: &RangeInclusive<u16>) -> String {
    let number = |text: &str| text.trim().parse::<u16>().ok();
    let mut all: BTreeSet<u16> = ports.clone().collect();
    for item in list.split(',') {
        match item.split_once('-') {
            Some((first, last)) => {
                if let (Some(first), Some(last)) = (number(first), number(last)) {
                    all.extend(first..=last);
                }
            }
            None => all.extend(number(item)),
        }
    }
    let mut ranges: Vec<(u16, u16)> = Vec::new();
    for port in all {
        match ranges.last_mut() {
            Some((_, last)) if u32::from(*last) + 1 == u32::from(port) => *last = port,
            _ => ranges.push((port, port)),
        }
    }
    let texts: Vec<String> = ranges
        .into_iter()
        .map(|(first, last)| {
            if first == last {
                first.to_string()
            } else {
                format!("{first}-{last}")
            }
        })
        .collect();
    texts.join(",")
}

/// A socket that would no longer receive its packets.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Conflict {
    /// `TCP` or `UDP`.
    pub transport: &'static str,
    /// Its port.
    pub port: u16,
    /// The address it is connected to; `None` if it listens to all.
    pub remote: Option<IpAddr>,
}

impl std::fmt::Display for Conflict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} port {}", self.transport, self.port)?;
        match self.remote {
            Some(remote) => write!(f, " (connected to {remote})"),
            None => Ok(()),
        }
    }
}

/// The first socket of this namespace that has one of `ports` at `own`, and either listens there or
/// is connected to `to`. Connections to others do not matter, nor those that are over.
pub fn conflict(ports: &RangeInclusive<u16>, towards: &[Towards]) -> Option<Conflict> {
    let files = [
        ("tcp", "TCP"),
        ("tcp6", "TCP"),
        ("udp", "UDP"),
        ("udp6", "UDP"),
    ];
    files.into_iter().find_map(|(file, transport)| {
        // A kernel without IPv6 has no such file.
        let text = fs::read_to_string(format!("/proc/thread-self/net/{file}")).ok()?;
        text.lines()
            .skip(1)
            .filter_map(socket)
            .find_map(|(local, port, remote, over)| {
                let inside = ports.contains(&port) && !over;
                let meant = towards.iter().any(|end| {
                    let here = local.is_unspecified() || local == end.own;
                    here && (remote.is_unspecified() || remote == end.to)
                });
                (inside && meant).then_some(Conflict {
                    transport,
                    port,
                    remote: Some(remote).filter(|remote| !remote.is_unspecified()),
                })
            })
    })
}

/// Local address and port, remote address, and whether it is over, from a line of `/proc/net/tcp`.
fn socket(line: &str) -> Option<(IpAddr, u16, IpAddr, bool)> {
    const TIME_WAIT: &str = "06";
    let mut words = line.split_whitespace().skip(1);
    let (local, port) = words.next()?.split_once(':')?;
    let (remote, _) = words.next()?.split_once(':')?;
    let over = words.next()? == TIME_WAIT;
    let port = u16::from_str_radix(port, 16).ok()?;
    Some((address(local)?, port, address(remote)?, over))
}

/// An address as `/proc/net` writes it: words of the machine's own byte order.
fn address(hex: &str) -> Option<IpAddr> {
    let word = |at: usize| u32::from_str_radix(hex.get(at * 8..at * 8 + 8)?, 16).ok();
    match hex.len() {
        8 => Some(Ipv4Addr::from(word(0)?.to_ne_bytes()).into()),
        32 => {
            let mut bytes = [0; 16];
            for (at, chunk) in bytes.chunks_exact_mut(4).enumerate() {
                chunk.copy_from_slice(&word(at)?.to_ne_bytes());
            }
            Some(IpAddr::V6(Ipv6Addr::from(bytes)).to_canonical())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::nat::PORTS;

    #[test]
    fn reserved_ports_are_merged_as_the_kernel_merges_them() {
        for (before, after) in [
            ("", "40960-57343"),
            ("8080", "8080,40960-57343"),
            ("40959,57344-57350", "40959-57350"),
            ("1-3,50000,60000", "1-3,40960-57343,60000"),
        ] {
            assert_eq!(with_reserved(before, &PORTS), after, "{before}");
            let change = Change::Sysctl(Sysctl {
                path: RESERVED.to_owned(),
                from: before.to_owned(),
                to: after.to_owned(),
                on: None,
            });
            assert_eq!(change.check(), Ok(()), "the next start undoes it");
        }
    }

    #[test]
    fn sockets_are_read_from_proc() {
        let line =
            "   0: 0100007F:A000 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0";
        let (local, port, remote, over) = socket(line).unwrap();
        assert_eq!((local, port), ("127.0.0.1".parse().unwrap(), 0xa000));
        assert!(remote.is_unspecified() && !over);
        let line = "   1: 0000000000000000FFFF00000100007F:0050 \
                    00000000000000000000000000000000:0000 06 0";
        let (local, port, _, over) = socket(line).unwrap();
        assert_eq!((local, port), ("127.0.0.1".parse().unwrap(), 80));
        assert!(over);
    }
}
