//! What is delivered elsewhere than the rest (`--deliver`), made ready for lookup.
//!
//! Owns which of several counts: one that names the port before one that names none. A lookup costs
//! the same however many there are and however long their prefixes; the way back, which is asked
//! where a flow is not known, goes through all of them.

use std::net::IpAddr;

use crate::model::delivery_map::DeliveryMap;
use crate::model::moved::{Move, TCP, UDP};
use crate::model::prefix::Prefix;
use crate::model::scopes::Scopes;
use crate::packet::{Addr, Kind};

/// In place of a protocol with ports.
const NO_PORTS: u8 = 0;

/// The `--deliver` of a peer.
#[derive(Default)]
pub(super) struct Maps {
    /// No two of them are about the same.
    all: Vec<DeliveryMap>,
    /// What each is about, in the same order.
    about: Scopes,
}

impl Maps {
    pub(super) fn new(all: Vec<DeliveryMap>) -> Self {
        let about: Vec<Move> = all.iter().map(DeliveryMap::about).collect();
        Self {
            about: Scopes::new(&about),
            all,
        }
    }

    /// The one that counts for a packet of this kind to a moved address and port.
    #[inline]
    pub(super) fn find(&self, moved: Addr, kind: Kind, port: u16) -> Option<&DeliveryMap> {
        let scope = self.about.find(moved.number())?;
        let (protocol, port) = match kind {
            Kind::Tcp => (TCP, Some(port)),
            Kind::Udp => (UDP, Some(port)),
            Kind::IcmpQuery
            | Kind::IcmpReply
            | Kind::IcmpError
            | Kind::Other
            | Kind::LaterFragment => (NO_PORTS, None),
        };
        self.all.get(self.about.taker(scope, protocol, port)?)
    }

    /// Whether single ports of a moved address are delivered elsewhere.
    pub(super) fn name_ports_of(&self, moved: Addr) -> bool {
        let scope = self.about.find(moved.number());
        scope.is_some_and(|scope| self.about.has_parts(scope))
    }

    /// The moved addresses and ports that are delivered there.
    pub(super) fn origins(&self, to: Addr, port: u16) -> impl Iterator<Item = (Addr, u16)> {
        let to = IpAddr::from(to);
        let origins = self.all.iter().filter_map(move |map| map.origin(to, port));
        origins.map(|(addr, port)| (addr.into(), port))
    }

    /// Whether something is delivered to this address by one of them.
    pub(super) fn lead_to(&self, to: Addr) -> bool {
        let to = IpAddr::from(to);
        self.all.iter().any(|map| map.to.contains(to))
    }

    /// Whether some addresses of a prefix are delivered elsewhere than others of it, whatever the
    /// port.
    pub(super) fn divide(&self, prefix: Prefix) -> bool {
        let within = |map: &DeliveryMap| {
            map.port.is_none() && map.moved != prefix && prefix.covers(&map.moved)
        };
        self.all.iter().any(within)
    }

    /// Addresses that packets are delivered to: of each prefix so many at most, and its last one.
    pub(super) fn listed(&self, most: usize) -> impl Iterator<Item = Addr> {
        self.all.iter().flat_map(move |map| {
            let some = map.to.addresses().take(most);
            some.chain([map.to.last()]).map(Addr::from)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn maps(texts: &[&str]) -> Maps {
        Maps::new(texts.iter().map(|text| text.parse().unwrap()).collect())
    }

    fn addr(text: &str) -> Addr {
        text.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn a_port_counts_before_its_address_and_a_prefix_before_nothing() {
        let maps = maps(&[
            "192.0.2.0/28=198.51.100.16/28",
            "192.0.2.5:80/tcp=198.51.100.99:8080",
            "192.0.2.0/28:53=198.51.100.32/28:5353",
            "2001:db8:a::/64=2001:db8:b::/64",
        ]);
        for (moved, kind, port, to) in [
            ("192.0.2.4", Kind::Tcp, 80, Some(("198.51.100.20", 80))),
            ("192.0.2.5", Kind::Tcp, 80, Some(("198.51.100.99", 8080))),
            ("192.0.2.5", Kind::Udp, 80, Some(("198.51.100.21", 80))),
            ("192.0.2.5", Kind::Udp, 53, Some(("198.51.100.37", 5353))),
            (
                "192.0.2.5",
                Kind::IcmpQuery,
                53,
                Some(("198.51.100.21", 53)),
            ),
            ("192.0.2.16", Kind::Tcp, 80, None),
            ("2001:db8:a::5", Kind::Other, 0, Some(("2001:db8:b::5", 0))),
        ] {
            let found = maps.find(addr(moved), kind, port);
            let place = found.map(|map| map.place(IpAddr::from(addr(moved)), port));
            let wanted = to.map(|(to, port)| (to.parse::<IpAddr>().unwrap(), port));
            assert_eq!(place, wanted, "{moved} {kind:?} {port}");
        }
        assert!(maps.name_ports_of(addr("192.0.2.4")) && maps.lead_to(addr("2001:db8:b::77")));
        assert!(!maps.name_ports_of(addr("2001:db8:a::5")) && !maps.lead_to(addr("192.0.2.5")));
        let origins: Vec<_> = maps.origins(addr("198.51.100.37"), 5353).collect();
        assert_eq!(origins, [(addr("192.0.2.5"), 53)]);
    }

    #[test]
    fn of_a_long_prefix_the_first_addresses_and_the_last_one_are_listed() {
        let listed = |text: &str| {
            maps(&[text])
                .listed(3)
                .map(IpAddr::from)
                .collect::<Vec<_>>()
        };
        let all = |texts: &[&str]| {
            texts
                .iter()
                .map(|it| it.parse::<IpAddr>().unwrap())
                .collect::<Vec<_>>()
        };
        let single = listed("192.0.2.5=198.51.100.2");
        assert_eq!(single, all(&["198.51.100.2", "198.51.100.2"]));
        let four = listed("192.0.2.4/30=198.51.100.4/30");
        assert_eq!(
            four,
            all(&[
                "198.51.100.4",
                "198.51.100.5",
                "198.51.100.6",
                "198.51.100.7"
            ])
        );
        let net = listed("2001:db8:a::/64=2001:db8:b::/64");
        assert_eq!(net.len(), 4);
        assert_eq!(net[3], all(&["2001:db8:b::ffff:ffff:ffff:ffff"])[0]);
    }
}
