//! Which of this host's addresses are used: those that the new server delivers to, and those that
//! the old server speaks from as a router on the path.
//!
//! Owns the choice alone, as functions of what is known.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::Addresses;
use crate::channel::tunnel::Deliver;
use crate::flow::routes::Delivery;
use crate::model::delivery_map::DeliveryMap;
use crate::model::moved::Move;
use crate::model::scopes::Scopes;
use crate::settings::values::DeliverTo;

/// The last address of each family to which packets from a peer were delivered.
pub(in crate::daemon) type Chosen = (Option<Ipv4Addr>, Option<Ipv6Addr>);

/// What is known of where a peer reaches this host. Nothing of it depends on which of the two
/// daemons started first or began the handshake, and the next daemon is told the last addresses if
/// this one is killed, so a restart changes nothing.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Reached {
    /// The address that the peer's settings name. Where a router translates addresses on the way,
    /// it is none of this host's.
    pub(super) named: Option<IpAddr>,
    /// The last addresses, one of each family.
    pub(super) before: Chosen,
    /// The address that this host speaks to the peer from.
    pub(super) from: Option<IpAddr>,
}

/// Where packets from a peer are delivered: as the peer is told, and as the lanes do it.
///
/// Without an address in the settings, it is the one at which the peer's settings name this host.
/// If that is none of this host's, or of the other family, it stays what it was as long as this
/// host has that address: connections would not survive a change. Else it is the one that this host
/// speaks to the peer from, and for the other family the first one of the uplink, or of the link
/// that the family's default route leaves by. Each family is chosen for itself.
pub(super) fn choose(
    to: DeliverTo,
    maps: &[DeliveryMap],
    reached: Reached,
    here: &Addresses,
) -> (Deliver, Delivery) {
    let maps = maps.to_vec();
    match to {
        DeliverTo::Keep => (
            Deliver::Keep,
            Delivery {
                keep: true,
                maps,
                ..Delivery::default()
            },
        ),
        DeliverTo::Addresses { v4, v6 } => {
            let Reached {
                named,
                before: (before_v4, before_v6),
                from,
            } = reached;
            let ((named_v4, named_v6), (from_v4, from_v6)) = (by_family(named), by_family(from));
            // Nothing is known yet where there is no address at all.
            let is_here = |addr: IpAddr| here.all.is_empty() || here.all.contains(&addr);
            let is_v4_here = |addr: &Ipv4Addr| is_here(IpAddr::from(*addr));
            let is_v6_here = |addr: &Ipv6Addr| is_here(IpAddr::from(*addr));
            let mut known_v4 = named_v4.into_iter().chain(before_v4).chain(from_v4);
            let mut known_v6 = named_v6.into_iter().chain(before_v6).chain(from_v6);
            let v4 = v4
                .or_else(|| known_v4.find(is_v4_here))
                .or_else(|| first_v4(&here.uplink))
                .or_else(|| first_v4(&here.by_default));
            let v6 = v6
                .or_else(|| known_v6.find(is_v6_here))
                .or_else(|| first_v6(&here.uplink))
                .or_else(|| first_v6(&here.by_default));
            let delivery = Delivery {
                v4,
                v6,
                keep: false,
                maps,
            };
            (Deliver::To { v4, v6 }, delivery)
        }
    }
}

/// The address in the place of its family.
fn by_family(addr: Option<IpAddr>) -> Chosen {
    match addr {
        Some(IpAddr::V4(addr)) => (Some(addr), None),
        Some(IpAddr::V6(addr)) => (None, Some(addr)),
        None => (None, None),
    }
}

/// A move that cannot be delivered, since this host has no address of its family, and `--deliver`
/// names none for it.
pub(super) fn undeliverable<'m>(
    deliver: Deliver,
    maps: &[DeliveryMap],
    moves: &'m [Move],
) -> Option<&'m Move> {
    let is_mapped = |moved: &Move| {
        let whole = maps.iter().filter(|map| map.port.is_none());
        whole.into_iter().any(|map| map.moved.covers(&moved.prefix))
    };
    moves.iter().find(|moved| match deliver {
        Deliver::Keep => false,
        Deliver::To { v4, v6 } => {
            let lacks = match moved.prefix.first() {
                IpAddr::V4(_) => v4.is_none(),
                IpAddr::V6(_) => v6.is_none(),
            };
            lacks && !is_mapped(moved)
        }
    })
}

/// The name of the moved address's family.
pub(super) fn family(moved: &Move) -> &'static str {
    match moved.prefix.first() {
        IpAddr::V4(_) => "IPv4",
        IpAddr::V6(_) => "IPv6",
    }
}

/// Those of `--deliver` of which nothing has moved.
pub(super) fn not_moved<'a>(
    maps: &'a [DeliveryMap],
    moves: &[Move],
) -> impl Iterator<Item = &'a DeliveryMap> {
    maps.iter().filter(|map| {
        let about = map.about();
        !moves.iter().any(|moved| moved.overlaps(&about))
    })
}

/// The addresses from which the old server sends ICMP replies. They belong to its uplink and have
/// not moved as a whole; if possible, nothing of them has moved.
pub(super) fn hop(uplink: &[IpAddr], moved: &Scopes) -> (Option<Ipv4Addr>, Option<Ipv6Addr>) {
    let mut own: Vec<IpAddr> = uplink
        .iter()
        .copied()
        .filter(|&addr| !moved.is_whole_at(addr))
        .collect();
    own.sort_by_key(|&addr| moved.contains(addr));
    (first_v4(&own), first_v6(&own))
}

fn first_v4(addresses: &[IpAddr]) -> Option<Ipv4Addr> {
    addresses.iter().find_map(|&addr| match addr {
        IpAddr::V4(addr) => Some(addr),
        IpAddr::V6(_) => None,
    })
}

fn first_v6(addresses: &[IpAddr]) -> Option<Ipv6Addr> {
    let is_global = |addr: Ipv6Addr| !addr.is_unicast_link_local() && !addr.is_loopback();
    addresses.iter().find_map(|&addr| match addr {
        IpAddr::V6(addr) if is_global(addr) => Some(addr),
        IpAddr::V6(_) | IpAddr::V4(_) => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::all;

    fn addresses(text: &str) -> Vec<IpAddr> {
        all(text)
    }

    fn here(uplink: &str) -> Addresses {
        Addresses {
            all: addresses(uplink),
            uplink: addresses(uplink),
            ..Addresses::default()
        }
    }

    fn moves(text: &str) -> Vec<Move> {
        all(text)
    }

    fn v4(text: &str) -> Option<Ipv4Addr> {
        (text != "-").then(|| text.parse().unwrap())
    }

    fn v6(text: &str) -> Option<Ipv6Addr> {
        (text != "-").then(|| text.parse().unwrap())
    }

    #[test]
    fn each_family_is_delivered_to_an_address_of_its_own() {
        const UPLINK: &str = "198.51.100.9 198.51.100.2 fe80::1 2001:db8::9 2001:db8::2";
        for (told_v4, told_v6, reached, uplink, to_v4, to_v6) in [
            // Where the peer reaches this host, and the uplink's first of the other family.
            (
                "-",
                "-",
                "198.51.100.2",
                UPLINK,
                "198.51.100.2",
                "2001:db8::9",
            ),
            (
                "-",
                "-",
                "2001:db8::2",
                UPLINK,
                "198.51.100.9",
                "2001:db8::2",
            ),
            ("-", "-", "", UPLINK, "198.51.100.9", "2001:db8::9"),
            // An address in the settings counts for its family alone.
            (
                "10.0.0.1",
                "-",
                "198.51.100.2",
                UPLINK,
                "10.0.0.1",
                "2001:db8::9",
            ),
            (
                "-",
                "fd00::1",
                "198.51.100.2",
                UPLINK,
                "198.51.100.2",
                "fd00::1",
            ),
            // A host of one family.
            (
                "-",
                "-",
                "198.51.100.2",
                "198.51.100.2",
                "198.51.100.2",
                "-",
            ),
            ("-", "-", "198.51.100.2", "fe80::1 ::1", "198.51.100.2", "-"),
            ("-", "-", "2001:db8::2", "2001:db8::2", "-", "2001:db8::2"),
        ] {
            let told = DeliverTo::Addresses {
                v4: v4(told_v4),
                v6: v6(told_v6),
            };
            let reached = addresses(reached).first().copied();
            let mut here = here(uplink);
            here.all.extend(reached);
            let by_name = Reached {
                named: reached,
                ..Reached::default()
            };
            let by_source = Reached {
                from: reached,
                ..Reached::default()
            };
            let (deliver, delivery) = choose(told, &[], by_name, &here);
            assert_eq!(choose(told, &[], by_source, &here).0, deliver);
            let (v4, v6) = (v4(to_v4), v6(to_v6));
            assert_eq!(deliver, Deliver::To { v4, v6 });
            assert_eq!((delivery.v4, delivery.v6, delivery.keep), (v4, v6, false));
        }
    }

    #[test]
    fn the_delivery_address_stays_while_this_host_has_it_family_by_family() {
        let anywhere = DeliverTo::Addresses { v4: None, v6: None };
        let chosen = |(before_v4, before_v6): (&str, &str), from: &str, uplink: &str| {
            let reached = Reached {
                named: None,
                before: (v4(before_v4), v6(before_v6)),
                from: addresses(from).first().copied(),
            };
            choose(anywhere, &[], reached, &here(uplink)).0
        };
        let to = |to_v4: &str, to_v6: &str| Deliver::To {
            v4: v4(to_v4),
            v6: v6(to_v6),
        };
        let (both, first) = (
            "198.51.100.9 198.51.100.2 2001:db8::9 2001:db8::2",
            ("198.51.100.2", "2001:db8::2"),
        );
        // This host speaks to the peer from elsewhere, and other addresses come first.
        for reached in ["198.51.100.2", "198.51.100.9", "2001:db8::9", ""] {
            assert_eq!(chosen(first, reached, both), to(first.0, first.1));
        }
        // One of them goes: the other family stays.
        let gone = "198.51.100.9 2001:db8::9 2001:db8::2";
        let other = to("198.51.100.9", "2001:db8::2");
        assert_eq!(chosen(first, "198.51.100.2", gone), other);
        let none = to("198.51.100.2", "-");
        assert_eq!(chosen(first, "198.51.100.2", "198.51.100.2"), none);
    }

    #[test]
    fn where_the_peers_settings_name_this_host_counts_first() {
        let anywhere = DeliverTo::Addresses { v4: None, v6: None };
        let chosen = |named: &str, before: &str, from: &str, uplink: &str| {
            let reached = Reached {
                named: addresses(named).first().copied(),
                before: (v4(before), None),
                from: addresses(from).first().copied(),
            };
            choose(anywhere, &[], reached, &here(uplink)).0
        };
        let to = |to_v4: &str, to_v6: &str| Deliver::To {
            v4: v4(to_v4),
            v6: v6(to_v6),
        };
        const HERE: &str = "198.51.100.2 198.51.100.3";
        let floating = to("198.51.100.3", "-");
        for before in ["-", "198.51.100.2", "198.51.100.3"] {
            for from in ["", "198.51.100.2", "198.51.100.3"] {
                assert_eq!(chosen("198.51.100.3", before, from, HERE), floating);
            }
        }
        // Behind a router that translates addresses, and by the other family.
        for named in ["203.0.113.1", "2001:db8:f::1"] {
            let first = chosen(named, "-", "198.51.100.3", HERE);
            assert_eq!(first, floating);
            assert_eq!(chosen(named, "198.51.100.3", "198.51.100.2", HERE), first);
        }
        // It floats to another host, and back.
        let gone = chosen("198.51.100.3", "198.51.100.3", "", "198.51.100.2");
        assert_eq!(gone, to("198.51.100.2", "-"));
        assert_eq!(chosen("198.51.100.3", "198.51.100.2", "", HERE), floating);
    }

    #[test]
    fn a_family_without_an_address_on_the_uplink_has_that_of_its_default_route() {
        let here = Addresses {
            by_default: addresses("198.51.100.2 fe80::1 2001:db8:6::2 2001:db8:6::3"),
            ..here("198.51.100.2")
        };
        let anywhere = DeliverTo::Addresses { v4: None, v6: None };
        let deliver = choose(anywhere, &[], Reached::default(), &here).0;
        let (v4, v6) = (v4("198.51.100.2"), v6("2001:db8:6::2"));
        assert_eq!(deliver, Deliver::To { v4, v6 });
    }

    #[test]
    fn kept_packets_are_not_rewritten() {
        let reached = Reached {
            named: addresses("198.51.100.2").first().copied(),
            ..Reached::default()
        };
        let here = here("198.51.100.2");
        let (deliver, delivery) = choose(DeliverTo::Keep, &[], reached, &here);
        assert_eq!(deliver, Deliver::Keep);
        assert!(delivery.keep && delivery.v4.is_none() && delivery.v6.is_none());
        assert_eq!(
            undeliverable(deliver, &[], &moves("192.0.2.5 2001:db8::5")),
            None
        );
    }

    #[test]
    fn a_move_of_a_family_that_this_host_lacks_is_named() {
        let deliver = |v4: Option<&str>, v6: Option<&str>| Deliver::To {
            v4: v4.map(|addr| addr.parse().unwrap()),
            v6: v6.map(|addr| addr.parse().unwrap()),
        };
        let both = moves("192.0.2.5 [2001:db8::5]:80");
        let here = Some("198.51.100.2");
        assert_eq!(
            undeliverable(deliver(here, None), &[], &both),
            Some(&both[1])
        );
        assert_eq!(
            undeliverable(deliver(None, Some("fd00::1")), &[], &both),
            Some(&both[0])
        );
        assert_eq!(
            undeliverable(deliver(here, Some("fd00::1")), &[], &both),
            None
        );
        assert_eq!(undeliverable(deliver(here, None), &[], &both[..1]), None);
        for (map, lacks) in [
            ("2001:db8::/64=fd00::/64", false),
            ("[2001:db8::5]:80=[fd00::1]:80", true),
            ("2001:db8::6=fd00::1", true),
        ] {
            let found = undeliverable(deliver(here, None), &all(map), &both);
            assert_eq!(found.is_some(), lacks, "{map}");
        }
    }

    #[test]
    fn what_has_not_moved_is_named() {
        for (moved, map, named) in [
            ("192.0.2.5", "192.0.2.5:80=192.0.2.5:8080", false),
            ("192.0.2.5:80,443", "192.0.2.5:443=192.0.2.5:8080", false),
            ("192.0.2.5:80,443", "192.0.2.5:25=192.0.2.5:8080", true),
            ("192.0.2.5:80/tcp", "192.0.2.5:80/udp=192.0.2.5:8080", true),
            ("192.0.2.6", "192.0.2.5:80=192.0.2.5:8080", true),
            ("", "192.0.2.5:80=192.0.2.5:8080", true),
            ("192.0.2.5:80", "192.0.2.0/28=198.51.100.0/28", false),
            ("192.0.2.0/24", "192.0.2.16/28:80=198.51.100.0/28:80", false),
            ("192.0.2.0/28", "192.0.2.16/28=198.51.100.0/28", true),
        ] {
            let maps: Vec<DeliveryMap> = all(map);
            let found = not_moved(&maps, &moves(moved)).count() == 1;
            assert_eq!(found, named, "{moved} {map}");
        }
    }

    #[test]
    fn the_old_server_speaks_from_what_has_not_moved() {
        for (uplink, moved, says_v4, says_v6) in [
            ("192.0.2.1 192.0.2.5", "192.0.2.5", "192.0.2.1", "-"),
            ("192.0.2.5 192.0.2.1", "192.0.2.5", "192.0.2.1", "-"),
            ("192.0.2.5", "192.0.2.5", "-", "-"),
            // An address of which ports have moved will do, if there is no other.
            ("192.0.2.5", "192.0.2.5:80", "192.0.2.5", "-"),
            ("192.0.2.5 192.0.2.1", "192.0.2.5:80", "192.0.2.1", "-"),
            ("fe80::1 2001:db8::1", "192.0.2.5", "-", "2001:db8::1"),
            (
                "2001:db8::5 2001:db8::1 192.0.2.1",
                "2001:db8::5",
                "192.0.2.1",
                "2001:db8::1",
            ),
        ] {
            let said = hop(&addresses(uplink), &Scopes::new(&moves(moved)));
            assert_eq!(said, (v4(says_v4), v6(says_v6)), "{uplink} without {moved}");
        }
    }
}
