//! Which sources no client may have: addresses of the networks that this server is in itself.
//!
//! Whoever is on one of these networks reaches the server there, and its services may trust that
//! network. Packets out of the tunnel come from somewhere else, so such a source is forged, or the
//! client's network has the same addresses by accident. The kernel does not notice: with the mark
//! of the steering, every source has a route through the TUN, however strict `rp_filter` is.
//!
//! Owns the lookup ([`Networks::check`]), which is asked when a flow begins and never for a packet
//! of a known flow: flows that are under way stay when the networks change. Which networks there
//! are is the daemon's business. Must not touch packets, sockets or the clock.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Mutex;

use arc_swap::ArcSwap;

use crate::flow::lock;
use crate::model::drops::DropReason;
use crate::model::peer::PeerId;
use crate::model::prefix::Prefix;
use crate::packet::{Addr, Family};

/// A network that this server is in, or reaches as its own.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OwnNetwork {
    /// Its addresses.
    pub prefix: Prefix,
    /// The interface towards it.
    pub interface: String,
}

/// A source that was refused.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RefusedSource {
    /// The source.
    pub source: IpAddr,
    /// The smallest network of this server's own that it lies in.
    pub network: OwnNetwork,
}

/// The networks of this server, and the clients that may come from them all the same.
#[derive(Default)]
pub(super) struct Networks {
    own: ArcSwap<Own>,
    /// By [`PeerId`].
    allowed: ArcSwap<Vec<Vec<Prefix>>>,
    /// For each peer, the first source that was refused since somebody asked.
    refused: Mutex<BTreeMap<PeerId, RefusedSource>>,
}

#[derive(Default)]
struct Own {
    networks: Vec<OwnNetwork>,
    v4: Spans,
    v6: Spans,
}

/// The lowest and highest addresses of networks of one family, sorted. None lies in another.
#[derive(Default)]
struct Spans(Vec<(Addr, Addr)>);

impl Networks {
    /// Sets this server's networks.
    pub(super) fn set_own(&self, networks: Vec<OwnNetwork>) {
        let of = |v4: bool| {
            let prefixes = networks.iter().map(|it| it.prefix);
            Spans::new(prefixes.filter(|prefix| prefix.is_ipv4() == v4))
        };
        let (v4, v6) = (of(true), of(false));
        self.own.store(Own { networks, v4, v6 }.into());
    }

    /// Lets clients of `peer` come from these prefixes, whatever networks there are
    /// (`--clients-from`).
    pub(super) fn allow(&self, peer: PeerId, prefixes: &[Prefix]) {
        self.allowed.rcu(|allowed| {
            let mut allowed = Vec::clone(allowed);
            let index = usize::from(peer.0);
            if allowed.len() <= index {
                allowed.resize(index + 1, Vec::new());
            }
            allowed[index] = prefixes.to_vec();
            allowed
        });
    }

    /// Whether a client of `peer` may have this address.
    ///
    /// # Errors
    /// [`DropReason::MartianSource`].
    #[inline]
    pub(super) fn check(&self, peer: PeerId, client: Addr) -> Result<(), DropReason> {
        let own = self.own.load();
        if own.contains(client) {
            return self.check_allowed(peer, client.into(), &own);
        }
        Ok(())
    }

    /// The smallest network of this server's own that an address lies in.
    pub(super) fn own_network(&self, addr: IpAddr) -> Option<OwnNetwork> {
        self.own.load().smallest(addr).cloned()
    }

    /// A source that was refused for each peer since the last call.
    pub(super) fn take_refused(&self) -> BTreeMap<PeerId, RefusedSource> {
        std::mem::take(&mut lock(&self.refused))
    }

    #[cold]
    fn check_allowed(&self, peer: PeerId, source: IpAddr, own: &Own) -> Result<(), DropReason> {
        let allowed = self.allowed.load();
        let of_peer = allowed.get(usize::from(peer.0)).into_iter().flatten();
        if of_peer.into_iter().any(|prefix| prefix.contains(source)) {
            return Ok(());
        }
        // A flood of such packets takes turns with nobody, and is searched for once.
        if let Ok(mut refused) = self.refused.try_lock()
            && !refused.contains_key(&peer)
            && let Some(network) = own.smallest(source)
        {
            let network = network.clone();
            refused.insert(peer, RefusedSource { source, network });
        }
        Err(DropReason::MartianSource)
    }
}

impl Own {
    #[inline]
    fn contains(&self, addr: Addr) -> bool {
        match addr.family() {
            Family::V4 => self.v4.contain(addr),
            Family::V6 => self.v6.contain(addr),
        }
    }

    fn smallest(&self, addr: IpAddr) -> Option<&OwnNetwork> {
        let around = self.networks.iter().filter(|it| it.prefix.contains(addr));
        around.max_by_key(|it| it.prefix.len())
    }
}

impl Spans {
    fn new(prefixes: impl Iterator<Item = Prefix>) -> Self {
        let span = |it: Prefix| -> (Addr, Addr) { (it.first().into(), it.last().into()) };
        let mut all: Vec<(Addr, Addr)> = prefixes.map(span).collect();
        // Of two that begin together the larger one comes first.
        all.sort_unstable_by_key(|&(first, last)| (first, Reverse(last)));
        let mut spans: Vec<(Addr, Addr)> = Vec::with_capacity(all.len());
        for span in all {
            // Prefixes lie in each other or apart.
            if spans.last().is_none_or(|largest| largest.1 < span.0) {
                spans.push(span);
            }
        }
        Self(spans)
    }

    #[inline]
    fn contain(&self, addr: Addr) -> bool {
        let behind = self.0.partition_point(|&(first, _)| first <= addr);
        behind > 0 && addr <= self.0[behind - 1].1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PEER: PeerId = PeerId(1);

    fn networks(text: &str) -> Networks {
        let networks = Networks::default();
        let own = text
            .split_whitespace()
            .enumerate()
            .map(|(at, prefix)| OwnNetwork {
                prefix: prefix.parse().unwrap(),
                interface: format!("eth{at}"),
            });
        networks.set_own(own.collect());
        networks
    }

    fn check(networks: &Networks, peer: PeerId, addr: &str) -> bool {
        let addr: IpAddr = addr.parse().unwrap();
        networks.check(peer, addr.into()).is_ok()
    }

    #[test]
    fn no_client_comes_from_a_network_of_this_server() {
        let networks = networks("10.0.0.0/8 10.9.0.0/24 203.0.113.0/24 2001:db8:b::/64");
        for (addr, may) in [
            ("9.255.255.255", true),
            ("10.0.0.0", false),
            ("10.9.0.7", false),
            ("10.255.255.255", false),
            ("11.0.0.0", true),
            ("203.0.112.255", true),
            ("203.0.113.0", false),
            ("203.0.113.255", false),
            ("203.0.114.0", true),
            ("2001:db8:b::1", false),
            ("2001:db8:b:1::1", true),
            ("::1", true),
        ] {
            assert_eq!(check(&networks, PEER, addr), may, "{addr}");
        }
        networks.set_own(Vec::new());
        assert!(check(&networks, PEER, "10.9.0.7"));
    }

    #[test]
    fn who_is_let_in_comes_in_through_that_peer_alone() {
        let networks = networks("10.9.0.0/24");
        networks.allow(PEER, &["10.9.0.0/28".parse().unwrap()]);
        assert!(check(&networks, PEER, "10.9.0.7"));
        assert!(!check(&networks, PEER, "10.9.0.16"));
        for other in [PeerId(0), PeerId(9)] {
            assert!(!check(&networks, other, "10.9.0.7"));
        }
    }

    #[test]
    fn a_refused_source_is_told_once_with_its_smallest_network() {
        let networks = networks("10.0.0.0/8 10.9.0.0/24 10.9.0.0/16");
        assert!(networks.take_refused().is_empty());
        for addr in ["10.9.0.7", "10.9.0.8", "10.1.0.1"] {
            assert!(!check(&networks, PEER, addr));
        }
        assert!(!check(&networks, PeerId(0), "10.1.0.1"));
        let told = networks.take_refused();
        let told: Vec<String> = told
            .iter()
            .map(|(peer, it)| {
                let network = &it.network;
                format!(
                    "{} {} {} {}",
                    peer.0, it.source, network.prefix, network.interface
                )
            })
            .collect();
        assert_eq!(
            told,
            ["0 10.1.0.1 10.0.0.0/8 eth0", "1 10.9.0.7 10.9.0.0/24 eth1"]
        );
        assert!(networks.take_refused().is_empty());
    }

    fn any_prefix() -> impl Strategy<Value = Prefix> {
        let v4 = (any::<u32>(), 8u8..=32).prop_map(|(addr, len)| {
            // Few enough that they lie in each other.
            Prefix::of(IpAddr::V4((addr & 0x0303_0303).into()), len)
        });
        let v6 = (any::<u128>(), 16u8..=128).prop_map(|(addr, len)| {
            Prefix::of(
                IpAddr::V6((0x2001 << 112 | addr & 0x0303 << 96).into()),
                len,
            )
        });
        prop_oneof![v4, v6]
    }

    proptest! {
        #[test]
        fn the_spans_hold_what_the_prefixes_hold(
            prefixes in proptest::collection::vec(any_prefix(), 0..20),
            addrs in proptest::collection::vec(any_prefix(), 0..20),
        ) {
            let text: Vec<String> = prefixes.iter().map(ToString::to_string).collect();
            let networks = networks(&text.join(" "));
            let ends = prefixes.iter().flat_map(|it| [it.first(), it.last()]);
            for addr in addrs.iter().map(Prefix::first).chain(ends) {
                let free = !prefixes.iter().any(|it| it.contains(addr));
                prop_assert_eq!(networks.check(PEER, addr.into()).is_ok(), free, "{}", addr);
            }
        }
    }
}
