//! Why a move that an old server names is not served.
//!
//! Owns what the new server's settings accept of each peer, and what it never serves whatever they
//! accept: an address that it needs itself. Whoever takes an old server over can name any address;
//! with `keep` this host would then talk to itself instead of its gateway or its resolver.
//!
//! A move is refused whole, even if a part of it is accepted. The old server captures all of it
//! either way, so a narrower one would be half dead without anybody noticing.
//!
//! Only endpoints that the settings name, or that a name of theirs stands for, are kept from other
//! peers. Whoever holds one peer's key can appear to be anywhere, at another peer's moved address
//! too, and would take it away by that.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{Addresses, Peer};
use crate::daemon::index;
use crate::model::accept::Accept;
use crate::model::moved::Move;
use crate::model::peer::PeerId;
use crate::model::prefix::Prefix;
use crate::settings::values::DeliverTo;

/// Refusals that one line shows; `ipmoved status` shows all.
pub(super) const SHOWN: usize = 4;

/// Where cloud providers answer a virtual server, and nobody else, questions about itself, its
/// credentials included: Amazon's IPv6 block, Google's IPv6 address, Azure's, and Alibaba's. Most
/// others use IPv4 link-local addresses.
const METADATA: [(IpAddr, u8); 4] = [
    (
        IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0)),
        32,
    ),
    (
        IpAddr::V6(Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254)),
        128,
    ),
    (IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)), 32),
    (IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)), 32),
];

/// A move that is not served.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(in crate::daemon) struct Refusal {
    /// The move.
    pub(in crate::daemon) moved: Move,
    /// Why.
    pub(in crate::daemon) why: Why,
}

/// Why a move is not served.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(in crate::daemon) enum Why {
    /// Another old server was first.
    Taken,
    /// The settings accept other moves of this peer.
    NotAccepted,
    /// With `keep`: an address that this server has already, and that the settings accept as one
    /// of many.
    OwnAddress,
    /// This server needs the address itself.
    Needed(Need),
}

/// What the new server needs an address for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(in crate::daemon) enum Need {
    /// It means another host on each link.
    LinkLocal,
    /// The cloud provider answers there.
    Metadata,
    /// The next hop of a route.
    Gateway,
    /// A name server that this host asks.
    Resolver,
    /// The place of another peer.
    OtherPeer,
    /// One end of the tunnel through which it was named.
    Tunnel,
}

/// What a move is held against, beside other peers' claims.
pub(super) struct Rules<'a> {
    pub(super) peers: &'a [Peer],
    pub(super) addresses: &'a Addresses,
    /// Moved addresses that an earlier run held here.
    pub(super) left: &'a [Prefix],
}

impl Rules<'_> {
    /// Why `moved` is not served for `peer`; `None` if nothing speaks against it.
    pub(super) fn refuse(&self, peer: PeerId, moved: &Move) -> Option<Why> {
        let accept = &self.peers[index(peer)].accept;
        if let Some(need) = self.need(peer, moved) {
            return Some(Why::Needed(need));
        }
        if !accept.is_empty() && !Accept::all_accept(accept, moved) {
            return Some(Why::NotAccepted);
        }
        if self.keeps(peer) && self.has_own(moved.prefix) && !is_named(accept, moved) {
            return Some(Why::OwnAddress);
        }
        None
    }

    fn need(&self, id: PeerId, moved: &Move) -> Option<Need> {
        let (peer, prefix) = (&self.peers[index(id)], moved.prefix);
        let holds = |addr: &IpAddr| prefix.contains(*addr);
        // No move has link-local addresses of IPv6.
        let link_local = Prefix::of(IpAddr::V4(Ipv4Addr::new(169, 254, 0, 0)), 16);
        let is_link_local = link_local.overlaps(&prefix);
        let mut metadata = METADATA.iter();
        let mut others = (self.peers.iter().enumerate()).filter(|&(at, _)| at != index(id));
        let ends = peer.endpoint.map(|it| (Some(it.remote.ip()), it.local));
        let (remote, local) = ends.unwrap_or_default();
        let is_end = [peer.known_at, remote, local].iter().flatten().any(holds);
        // An old server with a single address moves some of its ports and speaks from it, and it
        // may be this server's router or resolver as well.
        let is_part = !self.keeps(id) && !moved.is_whole();
        if is_link_local {
            Some(Need::LinkLocal)
        } else if metadata.any(|&(block, len)| Prefix::of(block, len).overlaps(&prefix)) {
            Some(Need::Metadata)
        } else if is_part && peer.known_at.as_ref().is_some_and(holds) {
            None
        } else if self.addresses.gateways.iter().any(holds) {
            Some(Need::Gateway)
        } else if self.addresses.resolvers.iter().any(holds) {
            Some(Need::Resolver)
        } else if is_end {
            // Only an address that is held here cuts the tunnel. An old server that has lost an
            // address may speak from a moved one.
            self.keeps(id).then_some(Need::Tunnel)
        } else {
            let is_other = others.any(|(_, other)| other.known_at.as_ref().is_some_and(holds));
            is_other.then_some(Need::OtherPeer)
        }
    }

    fn keeps(&self, peer: PeerId) -> bool {
        self.peers[index(peer)].deliver_to == DeliverTo::Keep
    }

    /// Whether this server has an address of the prefix, and not because it moved here.
    fn has_own(&self, prefix: Prefix) -> bool {
        let moved_here = |addr: IpAddr| {
            let addr = Prefix::from(addr);
            self.addresses.held.contains(&addr) || self.left.contains(&addr)
        };
        let mut all = self.addresses.all.iter().copied();
        all.any(|addr| prefix.contains(addr) && !moved_here(addr))
    }
}

/// Whether the settings accept the move by its very prefix, and not as one of many.
pub(super) fn is_named(accept: &[Accept], moved: &Move) -> bool {
    let named = accept.iter().filter(|it| it.prefix == moved.prefix);
    Accept::all_accept(&named.cloned().collect::<Vec<_>>(), moved)
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Taken => "has moved here from another old server already",
            Self::NotAccepted => "is not accepted",
            Self::OwnAddress => {
                "is an address of the new server already, and --accept does not name it alone"
            }
            Self::Needed(Need::LinkLocal) => "is link-local, which is never served",
            Self::Needed(Need::Metadata) => {
                "is where a cloud provider answers (metadata), which is never served"
            }
            Self::Needed(Need::Gateway) => "is a gateway of the new server, which is never served",
            Self::Needed(Need::Resolver) => {
                "is a resolver of the new server, which is never served"
            }
            Self::Needed(Need::OtherPeer) => "is another peer's own address, which is never served",
            Self::Needed(Need::Tunnel) => {
                "is an end of this tunnel itself, which `--deliver-to keep` would cut"
            }
        })
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { moved, why } = self;
        let holds = if moved.prefix.is_single() || matches!(why, Why::Taken | Why::NotAccepted) {
            ""
        } else {
            "holds what "
        };
        write!(f, "{moved} {holds}{why}")?;
        match why {
            Why::Taken => f.write_str("; it is not served for this one"),
            Why::NotAccepted | Why::OwnAddress => {
                write!(f, "; to serve it, give the new server --accept {moved}")
            }
            Why::Needed(_) => Ok(()),
        }
    }
}

/// Shows refusals in one line. Those that one remedy helps against are told together.
pub(super) fn line(refusals: &[Refusal]) -> String {
    let (not_accepted, others): (Vec<&Refusal>, Vec<&Refusal>) =
        refusals.iter().partition(|it| it.why == Why::NotAccepted);
    let moves = || not_accepted.iter().map(|it| &it.moved).take(SHOWN);
    let names: Vec<String> = moves().map(ToString::to_string).collect();
    let mut sentences = match names.as_slice() {
        [] => Vec::new(),
        [name] => vec![format!("{name} is not accepted; to serve it, give")],
        _ => vec![format!(
            "{} are not accepted; to serve them, give",
            names.join(", ")
        )],
    };
    if let Some(sentence) = sentences.first_mut() {
        sentence.push_str(" the new server");
        sentence.push_str(&accept_flags(moves()));
    }
    let others = others.into_iter().take(SHOWN - names.len());
    sentences.extend(others.map(ToString::to_string));
    let more = refusals.len().saturating_sub(SHOWN);
    if more > 0 {
        sentences.push(format!("and {more} more, see `ipmoved status` there"));
    }
    sentences.join("; ")
}

/// The flags that accept these moves, each behind a space; the first few of them.
pub(super) fn accept_flags<'a>(moves: impl Iterator<Item = &'a Move>) -> String {
    let flag = |moved: &Move| format!(" --accept {moved}");
    moves.take(SHOWN).map(flag).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(moved: &str, why: Why) -> Refusal {
        Refusal {
            moved: moved.parse().unwrap(),
            why,
        }
    }

    #[test]
    fn a_line_names_each_move_with_its_remedy() {
        let one = refusal("192.0.2.5:443/tcp", Why::NotAccepted);
        let other = refusal("[2001:db8::5]:53", Why::NotAccepted);
        let gateway = refusal("192.0.2.254", Why::Needed(Need::Gateway));
        assert_eq!(
            line(std::slice::from_ref(&one)),
            "192.0.2.5:443/tcp is not accepted; to serve it, give the new server \
             --accept 192.0.2.5:443/tcp"
        );
        let both = line(&[one.clone(), gateway, other]);
        assert_eq!(
            both,
            "192.0.2.5:443/tcp, [2001:db8::5]:53 are not accepted; to serve them, give the new \
             server --accept 192.0.2.5:443/tcp --accept [2001:db8::5]:53; \
             192.0.2.254 is a gateway of the new server, which is never served"
        );
        let many: Vec<Refusal> = (1..=64)
            .map(|host| refusal(&format!("192.0.2.{host}"), Why::NotAccepted))
            .collect();
        let shown = line(&many);
        assert!(shown.ends_with("--accept 192.0.2.4; and 60 more, see `ipmoved status` there"));
    }
}
