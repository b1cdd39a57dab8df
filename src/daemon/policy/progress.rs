//! How far each move has come: what the new server tells of it, and what the old one has heard.
//!
//! Owns where one has to look whether something listens, what follows from what was found, and what
//! an old server keeps of what it was told. Looks at nothing itself.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::channel::tunnel::MoveName;
use crate::model::asked::Asked;
use crate::model::moved::{Move, TCP, Transport, UDP};
use crate::model::prefix::Prefix;
use crate::model::progress::{Listens, Progress};

/// Most ends at which one move is looked for: ports, times protocols, times addresses where each is
/// delivered to itself. Of more nobody is told: a range of thousands is meant for what opens its
/// ports one by one, and does not listen on each.
pub(in super::super) const MAX_ENDS: usize = 256;

/// Ends of this host, by protocol: something listens at a port if it does at one of them.
pub(in super::super) type Alternatives = Vec<(u8, SocketAddr)>;

/// Where something has to listen for a move to be served; `None` if nobody can tell. `delivered`
/// says where what clients ask for is delivered.
pub(in super::super) fn ends(
    moved: &Move,
    delivered: impl Fn(&Asked) -> Option<SocketAddr>,
) -> Option<Vec<Alternatives>> {
    if moved.ports.is_empty() {
        return None;
    }
    let protocols = match moved.transport {
        Some(Transport::Tcp) => &[TCP][..],
        Some(Transport::Udp) => &[UDP],
        None => &[TCP, UDP],
    };
    let count =
        |range: &std::ops::RangeInclusive<u16>| usize::from(range.end() - range.start()) + 1;
    let ports: usize = moved.ports.iter().map(count).sum();
    if ports * protocols.len() > MAX_ENDS {
        return None;
    }
    let end = |addr, port| {
        let alternatives = protocols.iter().map(|&protocol| {
            let asked = Asked {
                addr,
                protocol,
                port,
            };
            Some((protocol, delivered(&asked)?))
        });
        alternatives.collect::<Option<Alternatives>>()
    };
    let (first, last) = (moved.prefix.first(), moved.prefix.last());
    // All of a prefix are delivered to one end, or each to its own.
    let port = *moved.ports.first()?.start();
    let ends_differ = end(first, port)? != end(last, port)?;
    let addresses = match ends_differ {
        false => vec![first],
        true => addresses(moved.prefix, MAX_ENDS / (ports * protocols.len()))?,
    };
    let mut all: Vec<Alternatives> = Vec::new();
    for addr in addresses {
        for port in moved.ports.iter().cloned().flatten() {
            all.push(end(addr, port)?);
        }
    }
    Some(all)
}

/// The addresses of a prefix; `None` if there are more than `most`.
fn addresses(prefix: Prefix, most: usize) -> Option<Vec<IpAddr>> {
    let all: Vec<IpAddr> = match (prefix.first(), prefix.last()) {
        (IpAddr::V4(first), IpAddr::V4(last)) => (first.to_bits()..=last.to_bits())
            .take(most + 1)
            .map(|bits| IpAddr::V4(bits.into()))
            .collect(),
        (IpAddr::V6(first), IpAddr::V6(last)) => (first.to_bits()..=last.to_bits())
            .take(most + 1)
            .map(|bits| IpAddr::V6(bits.into()))
            .collect(),
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => return None,
    };
    (all.len() <= most).then_some(all)
}

/// Whether something listens for a move. `found` says whether something does at an end, and
/// `forwards` whether this host forwards packets of a family (IPv4: true), so that what is not
/// found may be in a container.
pub(in super::super) fn listens(
    ends: Option<&[Alternatives]>,
    mut found: impl FnMut(u8, SocketAddr) -> Option<bool>,
    forwards: impl Fn(bool) -> bool,
) -> Listens {
    let Some(ends) = ends else {
        return Listens::Unknown;
    };
    let mut all = Listens::Yes;
    for alternatives in ends {
        let said: Vec<Option<bool>> = alternatives
            .iter()
            .map(|&(protocol, end)| found(protocol, end))
            .collect();
        if said.contains(&Some(true)) {
            continue;
        }
        let may_be_behind = alternatives.iter().any(|(_, end)| forwards(end.is_ipv4()));
        if said.contains(&None) || may_be_behind {
            all = Listens::Unknown;
        } else {
            return Listens::No;
        }
    }
    all
}

/// Conversations with ends of this host that are new since the last time.
#[derive(Default, Debug)]
pub(in super::super) struct Arrivals {
    known: BTreeMap<(u8, SocketAddr), u64>,
}

impl Arrivals {
    /// Takes in all counts; returns how many are new, for each end that has some.
    pub(in super::super) fn take(
        &mut self,
        counts: Vec<(u8, SocketAddr, u64)>,
    ) -> Vec<(u8, SocketAddr, u64)> {
        let before = std::mem::take(&mut self.known);
        let mut new = Vec::new();
        for (protocol, end, count) in counts {
            let known = before.get(&(protocol, end)).copied().unwrap_or(0);
            // One that was displaced in the kernel counts from the beginning.
            let more = count.checked_sub(known).unwrap_or(count);
            if more > 0 {
                new.push((protocol, end, more));
            }
            self.known.insert((protocol, end), count);
        }
        new
    }
}

/// What an old server has heard of its moves.
#[derive(Debug)]
pub(in super::super) struct Heard {
    moves: Arc<[Move]>,
    places: HashMap<MoveName, usize>,
    /// The run of the new server that has said it.
    run: Option<u64>,
    of: Vec<Option<Progress>>,
}

impl Heard {
    /// Nothing yet.
    pub(in super::super) fn new() -> Self {
        Self {
            moves: Arc::new([]),
            places: HashMap::new(),
            run: None,
            of: Vec::new(),
        }
    }

    /// Takes in what the new server says of these moves. What it says of others is nothing.
    pub(in super::super) fn take(
        &mut self,
        moves: &Arc<[Move]>,
        run: u64,
        said: Vec<(MoveName, Progress)>,
    ) {
        if !Arc::ptr_eq(&self.moves, moves) {
            self.moves = Arc::clone(moves);
            let names = moves.iter().map(MoveName::of);
            self.places = names.zip(0..).collect();
            self.run = None;
        }
        if self.run != Some(run) {
            self.run = Some(run);
            self.of = vec![None; moves.len()];
        }
        for (name, progress) in said {
            let place = self.places.get(&name).and_then(|&at| self.of.get_mut(at));
            if let Some(place) = place {
                *place = Some(progress);
            }
        }
    }

    /// The new server is not there: what listens there now, nobody knows.
    pub(in super::super) fn lost(&mut self) {
        for progress in self.of.iter_mut().flatten() {
            progress.listens = Listens::Unknown;
        }
    }

    /// What is known, move by move.
    pub(in super::super) fn all(&self) -> impl Iterator<Item = (&Move, Progress)> {
        let each = self.moves.iter().zip(&self.of);
        each.filter_map(|(moved, progress)| Some((moved, (*progress)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moved(text: &str) -> Move {
        text.parse().unwrap()
    }

    fn translated(asked: &Asked) -> Option<SocketAddr> {
        // Port 80 of the address is delivered to another one.
        let port = if asked.port == 80 { 8080 } else { asked.port };
        let addr = if asked.addr.is_ipv4() {
            "198.51.100.2"
        } else {
            "2001:db8:b::2"
        };
        Some(SocketAddr::new(addr.parse().unwrap(), port))
    }

    fn kept(asked: &Asked) -> Option<SocketAddr> {
        Some(SocketAddr::new(asked.addr, asked.port))
    }

    fn end(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn ends_are_where_ports_are_delivered_and_only_where_ports_are_named() {
        let one = ends(&moved("192.0.2.5:80/tcp"), translated);
        assert_eq!(one, Some(vec![vec![(TCP, end("198.51.100.2:8080"))]]));
        let both = ends(&moved("[2001:db8::5]:53"), translated).unwrap();
        let at = end("[2001:db8:b::2]:53");
        assert_eq!(both, [[(TCP, at), (UDP, at)]]);
        for unknown in [
            "192.0.2.5",
            "192.0.2.5/tcp",
            "192.0.2.5:1-257/tcp",
            "192.0.2.5:1-129",
        ] {
            assert_eq!(ends(&moved(unknown), translated), None, "{unknown}");
        }
        assert_eq!(
            ends(&moved("192.0.2.5:1-256/tcp"), kept).unwrap().len(),
            256
        );
        assert_eq!(ends(&moved("192.0.2.5:80/tcp"), |_| None), None);
    }

    #[test]
    fn a_prefix_has_one_end_or_each_address_its_own() {
        let of = |text, delivered: fn(&Asked) -> _| ends(&moved(text), delivered);
        assert_eq!(of("192.0.2.0/24:80/tcp", translated).unwrap().len(), 1);
        assert_eq!(of("192.0.2.0/24:80/tcp", kept).unwrap().len(), 256);
        assert_eq!(
            of("192.0.2.0/24:80,443/tcp", kept),
            None,
            "too many to look at"
        );
        assert_eq!(of("[2001:db8::/64]:80/tcp", kept), None);
        assert_eq!(of("[2001:db8::/126]:80/tcp", kept).unwrap().len(), 4);
    }

    #[test]
    fn something_listens_if_it_does_on_every_port_and_containers_are_not_seen() {
        let web = ends(&moved("192.0.2.5:80-81"), kept).unwrap();
        let said = |ports: &[(u8, u16)], forwards: bool| {
            let found = |protocol, end: SocketAddr| Some(ports.contains(&(protocol, end.port())));
            listens(Some(&web), found, |_| forwards)
        };
        assert_eq!(said(&[(TCP, 80), (TCP, 81)], false), Listens::Yes);
        assert_eq!(
            said(&[(TCP, 80), (UDP, 81)], true),
            Listens::Yes,
            "either will do"
        );
        assert_eq!(said(&[(TCP, 80)], false), Listens::No);
        assert_eq!(said(&[(TCP, 80)], true), Listens::Unknown);
        assert_eq!(
            listens(None, |_, _| Some(true), |_| false),
            Listens::Unknown
        );
        assert_eq!(
            listens(Some(&web), |_, _| None, |_| false),
            Listens::Unknown
        );
        let v6 = ends(&moved("[2001:db8::5]:80/tcp"), kept).unwrap();
        let only_v4 = |v4| v4;
        assert_eq!(listens(Some(&v6), |_, _| Some(false), only_v4), Listens::No);
    }

    #[test]
    fn arrivals_are_new_once() {
        let mut arrivals = Arrivals::default();
        let (web, dns) = (end("198.51.100.2:80"), end("198.51.100.2:53"));
        let first = vec![(TCP, web, 3), (UDP, dns, 1)];
        assert_eq!(arrivals.take(first.clone()), first);
        assert_eq!(
            arrivals.take(vec![(TCP, web, 3), (UDP, dns, 2)]),
            [(UDP, dns, 1)]
        );
        // The kernel has forgotten one meanwhile, and has counted anew.
        assert_eq!(arrivals.take(vec![(TCP, web, 2)]), [(TCP, web, 2)]);
        assert_eq!(
            arrivals.take(vec![(TCP, web, 2), (UDP, dns, 5)]),
            [(UDP, dns, 5)]
        );
    }

    #[test]
    fn what_was_heard_is_of_ones_own_moves_and_of_one_run() {
        let moves: Arc<[Move]> = Arc::new([moved("192.0.2.5:80/tcp"), moved("192.0.2.6")]);
        let (one, other) = (MoveName::of(&moves[0]), MoveName::of(&moves[1]));
        let progress = |by_tunnel| Progress {
            listens: Listens::Yes,
            by_tunnel,
            ..Progress::default()
        };
        let mut heard = Heard::new();
        let all = |heard: &Heard| -> Vec<(String, u64, Listens)> {
            let each = heard.all();
            each.map(|(it, progress)| (it.to_string(), progress.by_tunnel, progress.listens))
                .collect()
        };
        assert_eq!(all(&heard), []);
        let stranger = MoveName::of(&moved("192.0.2.7"));
        heard.take(
            &moves,
            1,
            vec![(other, progress(2)), (stranger, progress(9))],
        );
        assert_eq!(all(&heard), [("192.0.2.6".into(), 2, Listens::Yes)]);
        heard.take(&moves, 1, vec![(one, progress(1))]);
        assert_eq!(all(&heard).len(), 2);
        heard.lost();
        assert!(all(&heard).iter().all(|it| it.2 == Listens::Unknown));
        heard.take(&moves, 2, vec![(one, progress(0))]);
        assert_eq!(all(&heard), [("192.0.2.5:80/tcp".into(), 0, Listens::Yes)]);
    }
}
