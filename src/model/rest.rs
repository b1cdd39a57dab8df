//! What is left of a move once others take a part of it.

use std::ops::RangeInclusive;

use crate::model::moved::{Move, Transport};

/// Every port that a packet can come to.
const ALL: RangeInclusive<u16> = 1..=u16::MAX;

/// What none of the `others` takes of a move. Where they leave a part of a whole address only, the
/// protocols without ports are not among it.
pub fn rest<'a>(moved: &Move, others: impl IntoIterator<Item = &'a Move>) -> Vec<Move> {
    let mut left = vec![moved.clone()];
    // Thousands are held against as many, and hardly any meet.
    let mut others = others.into_iter();
    while let Some(other) = others.find(|it| it.prefix.overlaps(&moved.prefix)) {
        left = left.into_iter().flat_map(|it| without(it, other)).collect();
        if left.is_empty() {
            break;
        }
    }
    left
}

fn without(moved: Move, other: &Move) -> Vec<Move> {
    if !moved.prefix.overlaps(&other.prefix) {
        return vec![moved];
    }
    if other.prefix.covers(&moved.prefix) {
        return without_ports(moved, other);
    }
    // The other is a part of it: what lies beside that stays as it is.
    let halves = moved.prefix.halves().into_iter().flatten();
    let half = |prefix| Move {
        prefix,
        ..moved.clone()
    };
    halves.flat_map(|it| without(half(it), other)).collect()
}

/// The same, where the other takes ports of each of its addresses.
fn without_ports(moved: Move, other: &Move) -> Vec<Move> {
    if other.is_whole() {
        return Vec::new();
    }
    let transports = [Transport::Tcp, Transport::Udp];
    let before = transports.map(|transport| ports_of(&moved, transport));
    let taken = transports.map(|transport| ports_of(other, transport));
    let [tcp, udp] = [0, 1].map(|at| subtract(&before[at], &taken[at]));
    if [&tcp, &udp] == [&before[0], &before[1]] {
        return vec![moved];
    }
    let part = |transport: Option<Transport>, ports: Vec<RangeInclusive<u16>>| {
        let all = ports == [ALL];
        (!ports.is_empty()).then(|| Move {
            prefix: moved.prefix,
            ports: if all { Vec::new() } else { ports },
            transport,
        })
    };
    let parts = if tcp == udp && tcp != [ALL] {
        [part(None, tcp), None]
    } else {
        [
            part(Some(Transport::Tcp), tcp),
            part(Some(Transport::Udp), udp),
        ]
    };
    parts.into_iter().flatten().collect()
}

/// The ports that a move has of a transport.
fn ports_of(moved: &Move, transport: Transport) -> Vec<RangeInclusive<u16>> {
    if moved.transport.is_some_and(|only| only != transport) {
        return Vec::new();
    }
    if moved.ports.is_empty() {
        return vec![ALL];
    }
    moved.ports.clone()
}

fn subtract(
    from: &[RangeInclusive<u16>],
    taken: &[RangeInclusive<u16>],
) -> Vec<RangeInclusive<u16>> {
    let mut left = from.to_vec();
    for gone in taken {
        let beside = |it: RangeInclusive<u16>| {
            let (first, last) = (*it.start(), *it.end());
            let before = gone.start().checked_sub(1).map(|end| first..=last.min(end));
            let behind = gone
                .end()
                .checked_add(1)
                .map(|start| first.max(start)..=last);
            [before, behind]
                .into_iter()
                .flatten()
                .filter(|it| !it.is_empty())
        };
        left = left.into_iter().flat_map(beside).collect();
    }
    left
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::moved::{TCP, UDP};
    use crate::model::scopes::Scopes;

    fn moves(names: &[&str]) -> Vec<Move> {
        names.iter().map(|name| name.parse().unwrap()).collect()
    }

    #[test]
    fn what_others_take_is_cut_out() {
        for (moved, others, left) in [
            ("192.0.2.5", &["192.0.2.6"][..], &["192.0.2.5"][..]),
            ("192.0.2.5", &["192.0.2.5"], &[]),
            ("192.0.2.5:80", &["192.0.2.5"], &[]),
            ("192.0.2.5:80,443", &["192.0.2.5:80"], &["192.0.2.5:443"]),
            ("192.0.2.5:80", &["192.0.2.5:80/udp"], &["192.0.2.5:80/tcp"]),
            (
                "192.0.2.5:53/udp",
                &["192.0.2.5:53/tcp"],
                &["192.0.2.5:53/udp"],
            ),
            (
                "192.0.2.5:80-90",
                &["192.0.2.5:84"],
                &["192.0.2.5:80-83,85-90"],
            ),
            ("192.0.2.4/31", &["192.0.2.5"], &["192.0.2.4"]),
            ("192.0.2.4/30", &["192.0.2.4/31"], &["192.0.2.6/31"]),
            (
                "192.0.2.5",
                &["192.0.2.4/30:80"],
                &["192.0.2.5:1-79,81-65535"],
            ),
            (
                "192.0.2.5/32",
                &["192.0.2.5:25/tcp"],
                &["192.0.2.5:1-24,26-65535/tcp", "192.0.2.5/udp"],
            ),
        ] {
            let (moved, others) = (moved.parse().unwrap(), moves(others));
            assert_eq!(rest(&moved, &others), moves(left), "{moved} {others:?}");
        }
    }

    /// A move among few addresses and ports.
    fn any_move() -> impl Strategy<Value = Move> {
        let prefix = prop_oneof![
            "192\\.0\\.2\\.[4-7]",
            "192\\.0\\.2\\.4/3[01]",
            "192\\.0\\.2\\.6/31"
        ];
        let ports = prop_oneof![Just(""), Just(":2"), Just(":2-4"), Just(":1,3")];
        let transport = prop_oneof![Just(""), Just("/tcp"), Just("/udp")];
        (prefix, ports, transport)
            .prop_map(|(prefix, ports, transport)| format!("{prefix}{ports}{transport}").parse())
            .prop_filter_map("a move", Result::ok)
    }

    proptest! {
        #[test]
        fn the_rest_takes_what_the_move_takes_and_no_other_does(
            moved in any_move(),
            others in prop::collection::vec(any_move(), 0..4),
        ) {
            let left = rest(&moved, &others);
            let scopes = [vec![moved], others, left].map(|moves| Scopes::new(&moves));
            for addr in 0xc000_0203..0xc000_0209_u32 {
                let addr = std::net::IpAddr::V4(addr.into());
                for protocol in [TCP, UDP] {
                    for port in 1..6 {
                        let [moved, other, left] = scopes.each_ref().map(|scopes| {
                            let scope = scopes.find(crate::model::scopes::number_of(addr));
                            scope.is_some_and(|it| scopes.takes(it, protocol, Some(port)))
                        });
                        prop_assert_eq!(left, moved && !other, "{} {} {}", addr, protocol, port);
                    }
                }
            }
        }
    }
}
