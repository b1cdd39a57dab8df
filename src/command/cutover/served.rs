//! What the old service serves of an address that moves whole: where something has to listen on the
//! new server before clients are sent there.
//!
//! Which ports those are, this server's sockets tell, as they were when the cut-over began, the
//! kernel's connection tracker, and the list of who comes. A port is *needed* if clients talk with
//! it, or came in the last days, or if a socket is bound to the moved address itself. A socket that
//! is bound to any address may be for something else, a login or a monitor: that it lacks on the
//! new server is said, and is no reason to wait, unless nothing else is known.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};

use crate::command::here::PortRange;
use crate::kernel::programs::DHCP_CLIENTS;
use crate::kernel::{conntrack, sockets};
use crate::model::asked::{Asked, Found};
use crate::model::move_index::MoveIndex;
use crate::model::moved::{Move, TCP, UDP};
use crate::model::progress::Listens;

/// Most ends of tracked conversations that are looked at.
const MAX_BEHIND: usize = 65_536;

/// Ports that a line names.
const NAMED: usize = 4;

/// What is served of each move that names no ports.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Served(BTreeMap<String, Ports>);

/// What is served of one.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Ports {
    needed: BTreeSet<Asked>,
    others: BTreeSet<Asked>,
}

/// What is known of a move.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Heard {
    /// Whether something listens on the new server.
    pub(super) listens: Listens,
    /// Where nothing was found there.
    pub(super) lacks: Vec<String>,
}

/// Something that waits for clients, or talks with one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Seen {
    /// It is bound there.
    Bound(u8, SocketAddr),
    /// It talks with a client there, or did of late.
    Talks(u8, SocketAddr),
}

impl Served {
    /// Looks at the sockets of this host, at what the kernel tracks, and at what clients have
    /// `asked` for of late. `tunnel_port` is the daemon's own.
    pub(super) fn look(
        what: &[String],
        tunnel_port: u16,
        asked: &BTreeSet<Asked>,
    ) -> io::Result<Self> {
        let moves = what.iter().filter_map(|it| it.parse().ok()).collect();
        let index = MoveIndex::new(moves);
        let is_whole = |it: &Move| it.ports.is_empty();
        if !index.moves().iter().any(is_whole) {
            return Ok(Self::default());
        }
        let mut seen = Vec::new();
        let (mut listening, range) = (BTreeSet::new(), PortRange::read());
        sockets::bound(|it| {
            let end = (it.protocol, it.local.port());
            // A client's own: of DHCP, or bound to an address and to whatever port was free.
            let is_clients = it.protocol == UDP
                && (DHCP_CLIENTS.contains(&it.local.port())
                    || !it.local.ip().is_unspecified() && range.has(it.local.port()));
            if end != (UDP, tunnel_port) && !is_clients {
                listening.insert(end);
                seen.push(Seen::Bound(it.protocol, it.local));
            }
        })?;
        sockets::tcp(|it| {
            if listening.contains(&(TCP, it.local.port())) {
                seen.push(Seen::Talks(TCP, it.local));
            }
        })?;
        // Of UDP no socket tells who its clients are. What nobody serves here any more is not asked
        // for.
        let asked = asked
            .iter()
            .map(|it| (it.protocol, SocketAddr::new(it.addr, it.port)));
        let asked = asked.filter(|(protocol, end)| listening.contains(&(*protocol, end.port())));
        seen.extend(asked.map(|(protocol, end)| Seen::Talks(protocol, end)));
        let moved = |addr: IpAddr| index.moves().iter().any(|it| it.prefix.contains(addr));
        // Where nothing is tracked there is nobody behind.
        let tracked = conntrack::served(moved, MAX_BEHIND).unwrap_or_default();
        let is_tunnels = |it: &(u8, SocketAddr)| (it.0, it.1.port()) == (UDP, tunnel_port);
        let tracked = tracked.into_iter().filter(|it| !is_tunnels(it));
        let tracked = tracked.filter(|(_, end)| !range.has(end.port()));
        seen.extend(tracked.map(|(protocol, end)| Seen::Talks(protocol, end)));
        Ok(Self::of(&index, &seen))
    }

    fn of(index: &MoveIndex, seen: &[Seen]) -> Self {
        let mut all: BTreeMap<String, Ports> = BTreeMap::new();
        for (place, moved) in index.moves().iter().enumerate() {
            if !moved.ports.is_empty() {
                continue;
            }
            let takes = |protocol, end| index.find(protocol, end) == Some(place);
            let ports = all.entry(moved.to_string()).or_default();
            for &one in seen {
                let (protocol, end, is_needed) = match one {
                    Seen::Talks(protocol, end) => (protocol, end, true),
                    Seen::Bound(protocol, end) => (protocol, end, !end.ip().is_unspecified()),
                };
                // One that is bound to `::` serves IPv4 as well, but for those that say otherwise.
                let first = moved.prefix.first();
                let serves = end.ip() == IpAddr::from([0; 16]) || end.is_ipv4() == first.is_ipv4();
                let addr = match is_needed {
                    true => end.ip(),
                    false => first,
                };
                if !serves || !takes(protocol, SocketAddr::new(addr, end.port())) {
                    continue;
                }
                let asked = Asked {
                    addr,
                    protocol,
                    port: end.port(),
                };
                match is_needed {
                    true => ports.needed.insert(asked),
                    false => ports.others.insert(asked),
                };
            }
            let Ports { needed, others } = ports;
            let same = |one: &Asked, other: &Asked| {
                (one.protocol, one.port) == (other.protocol, other.port)
            };
            others.retain(|it| !needed.iter().any(|needed| same(needed, it)));
        }
        Self(all)
    }

    /// What is to be asked of the new server, what matters first.
    pub(super) fn asks(&self) -> Vec<Asked> {
        let needed = self.0.values().flat_map(|it| &it.needed);
        let others = self.0.values().flat_map(|it| &it.others);
        needed.chain(others).copied().collect()
    }

    /// Whether the old service serves this.
    pub(super) fn serves(&self, what: &str) -> bool {
        let mut all = (self.0.values()).flat_map(|it| it.needed.iter().chain(&it.others));
        all.any(|it| it.to_string() == what)
    }

    /// What is known of a move, by what was found; `None` if its ports are named.
    pub(super) fn heard(&self, what: &str, found: &BTreeMap<String, Found>) -> Option<Heard> {
        let ports = self.0.get(what)?;
        let of = |asked: &Asked| found.get(&asked.to_string()).copied().unwrap_or_default();
        let are = |all: &BTreeSet<Asked>, is: Found| -> Vec<Asked> {
            all.iter().filter(|it| of(it) == is).copied().collect()
        };
        let Ports { needed, others } = ports;
        let decide = if needed.is_empty() { others } else { needed };
        let [yes, no, perhaps, unknown] =
            [Found::Yes, Found::No, Found::Perhaps, Found::Unknown].map(|is| are(decide, is));
        let missing = [&no[..], &perhaps[..]].concat();
        let (listens, lacks) = if decide.is_empty() || !unknown.is_empty() {
            (Listens::Unknown, Vec::new())
        } else if missing.is_empty() {
            let others = [are(others, Found::No), are(others, Found::Perhaps)].concat();
            (Listens::Yes, others)
        } else if no.is_empty() || (needed.is_empty() && !yes.is_empty()) {
            (Listens::Unknown, missing)
        } else {
            (Listens::No, no)
        };
        let mut names: Vec<String> = lacks.iter().take(NAMED).map(ToString::to_string).collect();
        if let Some(more @ 1..) = lacks.len().checked_sub(NAMED) {
            names.push(format!("{more} more"));
        }
        let lacks = names;
        Some(Heard { listens, lacks })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn served(moves: &[&str], seen: &[Seen]) -> Served {
        let moves = moves.iter().map(|it| it.parse().unwrap()).collect();
        Served::of(&MoveIndex::new(moves), seen)
    }

    fn names(all: &BTreeSet<Asked>) -> Vec<String> {
        all.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_port_is_needed_where_clients_are_and_where_a_socket_is_bound_to_the_address() {
        let seen = [
            Seen::Bound(TCP, end("192.0.2.5:80")),
            Seen::Bound(UDP, end("192.0.2.5:53")),
            Seen::Bound(TCP, end("192.0.2.9:81")),
            Seen::Bound(TCP, end("0.0.0.0:22")),
            Seen::Bound(TCP, end("[::]:9100")),
            Seen::Bound(TCP, end("0.0.0.0:443")),
            Seen::Talks(TCP, end("192.0.2.5:443")),
            Seen::Talks(TCP, end("192.0.2.9:25")),
            // Moved by its number, so it is asked for anyway.
            Seen::Talks(TCP, end("192.0.2.6:25")),
            Seen::Talks(TCP, end("[2001:db8::5]:993")),
            Seen::Bound(UDP, end("0.0.0.0:123")),
            Seen::Talks(UDP, end("192.0.2.5:123")),
        ];
        let all = served(&["192.0.2.5", "192.0.2.6:25/tcp", "2001:db8::/64"], &seen);
        let of = |what: &str| &all.0[what];
        assert_eq!(
            names(&of("192.0.2.5").needed),
            [
                "192.0.2.5:80/tcp",
                "192.0.2.5:443/tcp",
                "192.0.2.5:53/udp",
                "192.0.2.5:123/udp",
            ]
        );
        assert_eq!(
            names(&of("192.0.2.5").others),
            ["192.0.2.5:22/tcp", "192.0.2.5:9100/tcp"]
        );
        let v6 = of("2001:db8::/64");
        assert_eq!(names(&v6.needed), ["[2001:db8::5]:993/tcp"]);
        assert_eq!(names(&v6.others), ["[2001:db8::]:9100/tcp"]);
        assert_eq!(all.asks().len(), 8);
        assert_eq!(all.heard("192.0.2.6:25/tcp", &BTreeMap::new()), None);
    }

    #[test]
    fn what_is_needed_decides_and_other_ports_where_nothing_is() {
        let needed = [
            Seen::Bound(TCP, end("192.0.2.5:80")),
            Seen::Talks(TCP, end("192.0.2.5:443")),
            Seen::Bound(TCP, end("0.0.0.0:22")),
        ];
        let others = [
            Seen::Bound(TCP, end("0.0.0.0:80")),
            Seen::Bound(TCP, end("0.0.0.0:22")),
        ];
        use Found::{No, Perhaps, Unknown, Yes};
        for (seen, found, listens, lacks) in [
            (
                &needed[..],
                &[(80, Yes), (443, Yes), (22, Yes)][..],
                Listens::Yes,
                &[][..],
            ),
            (
                &needed,
                &[(80, Yes), (443, Yes), (22, No)],
                Listens::Yes,
                &[22],
            ),
            (
                &needed,
                &[(80, Yes), (443, No), (22, Yes)],
                Listens::No,
                &[443],
            ),
            (&needed, &[(80, Perhaps), (443, No)], Listens::No, &[443]),
            (
                &needed,
                &[(80, Yes), (443, Perhaps)],
                Listens::Unknown,
                &[443],
            ),
            (&needed, &[(80, Yes), (443, Unknown)], Listens::Unknown, &[]),
            (&needed, &[], Listens::Unknown, &[]),
            (&others, &[(80, Yes), (22, Yes)], Listens::Yes, &[]),
            (&others, &[(80, No), (22, No)], Listens::No, &[22, 80]),
            (&others, &[(80, No), (22, Yes)], Listens::Unknown, &[80]),
            (
                &others,
                &[(80, Perhaps), (22, Perhaps)],
                Listens::Unknown,
                &[22, 80],
            ),
            (&[], &[(80, Yes)], Listens::Unknown, &[]),
        ] {
            let name = |port: &u16| format!("192.0.2.5:{port}/tcp");
            let found = found
                .iter()
                .map(|(port, found)| (name(port), *found))
                .collect();
            let heard = served(&["192.0.2.5"], seen).heard("192.0.2.5", &found);
            let lacks = lacks.iter().map(name).collect();
            assert_eq!(heard, Some(Heard { listens, lacks }), "{found:?}");
        }
    }
}
