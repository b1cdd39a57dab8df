//! What this server does not have yet when the daemon starts before its network is up.
//!
//! Until the daemon of the old server captures, the host's own stack answers for the moved address:
//! it resets every connection that it does not know (RFC 9293 section 3.10.7.1). After a reboot the
//! daemon must therefore not wait for the network. It starts first, and puts its programs on each
//! link as it appears.
//!
//! ```text
//! daemon ──► capture on every link ──► link up ──► addresses ──► routes ──► name, peer
//!                                      └────────── each is used as it comes ──────────┘
//! ```
//!
//! Owns what may be missing at the start, and the checks that have to wait for it. Links and
//! addresses are followed all the time, by [`follow`](super::follow).

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::service::{DaemonError, Result, input};
use super::setup::{check_new, check_old, warn_of_absent};
use super::warnings::Warnings;
use crate::kernel::netlink::{Address, Netlink};
use crate::model::delivery_map::DeliveryMap;
use crate::model::moved::Move;
use crate::model::peer::Role;
use crate::settings::config::Config;
use crate::settings::values::DeliverTo;

/// Index of the loopback interface in every network namespace (`LOOPBACK_IFINDEX`,
/// include/net/net_namespace.h).
const LOOPBACK: u32 = 1;

/// How long the network has to be up before what is still wrong counts: addresses and routes come
/// one after the other, those of IPv6 after a search for duplicates of a second or two (RFC 4862).
/// Whoever looks does so when something changes, and every few seconds.
const SETTLED: Duration = Duration::from_secs(10);

/// How long the old server may have no address of its own but moved ones, under a service manager:
/// the moved ones may be static, and its own come by DHCP, whose first tries take a minute (section
/// 4.1 of RFC 2131). A daemon that ended would undo everything, and the host's own stack reset the
/// clients' connections.
const OWN_COMES: Duration = Duration::from_secs(120);

/// How long a host has been up at most for a daemon to wait so where it finds addresses already.
/// Later it is somebody's mistake that no address mends, and is told before anything is captured.
const BOOTING: Duration = Duration::from_secs(180);

/// Whether a service manager has started the daemon.
fn is_managed() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some()
}

/// Whether an address of the old server's own may still come, so that moving all that are there is
/// not refused.
pub(super) fn own_may_come(addresses: &[Address]) -> bool {
    let up = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let up = Duration::from_secs(up.tv_sec.unsigned_abs());
    !is_up(addresses) || is_boot(is_managed(), up)
}

/// Whether a daemon has been started as the host came up; `up`: for how long that has been.
fn is_boot(is_managed: bool, up: Duration) -> bool {
    is_managed && up < BOOTING
}

/// How long the network is up before a server without an address of its own is refused.
fn patience(is_managed: bool) -> Duration {
    if is_managed { OWN_COMES } else { SETTLED }
}

/// Whether what is missing may still come. Else somebody has just typed it, and is told at once.
///
/// A service manager starts the daemon without anybody watching, before the network or after it,
/// and a daemon that ends captures nothing.
pub(super) fn may_come(addresses: &[Address]) -> bool {
    is_managed() || !is_up(addresses)
}

/// Whether the network is up: this host has an address under which others may reach it.
pub(super) fn is_up(addresses: &[Address]) -> bool {
    let reachable = |held: &Address| {
        held.index != LOOPBACK
            && match held.addr {
                IpAddr::V4(addr) => !addr.is_link_local(),
                IpAddr::V6(addr) => !addr.is_unicast_link_local(),
            }
    };
    addresses.iter().any(reachable)
}

/// What the settings say of this server's own addresses.
#[derive(Debug)]
pub(super) struct Terms {
    /// The daemon's role.
    pub(super) role: Role,
    /// The address of `--listen`.
    pub(super) listen: Option<IpAddr>,
    /// The peers, by [`PeerId`](crate::model::peer::PeerId).
    pub(super) peers: Vec<PeerTerms>,
}

/// What they say for one peer.
#[derive(Debug)]
pub(super) struct PeerTerms {
    /// The moves to it (old server).
    pub(super) moves: Vec<Move>,
    /// Where to deliver what moved from it (new server).
    pub(super) deliver_to: DeliverTo,
    /// What is delivered elsewhere (new server).
    pub(super) deliver: Vec<DeliveryMap>,
}

impl Terms {
    /// Those of the settings.
    pub(super) fn of(config: &Config) -> Self {
        let peers = config.peers.iter().map(|peer| PeerTerms {
            moves: peer.moves.clone(),
            deliver_to: peer.deliver_to,
            deliver: peer.deliver.clone(),
        });
        Self {
            role: config.role,
            listen: config.listen.ip,
            peers: peers.collect(),
        }
    }
}

/// The checks that wait for the network.
#[derive(Debug)]
pub(super) struct Awaited {
    terms: Terms,
    /// Since when it is up.
    up: Option<Instant>,
}

impl Awaited {
    /// Nothing is known to be there.
    pub(super) fn new(terms: Terms) -> Self {
        Self { terms, up: None }
    }

    /// Makes the checks once the network is up and has settled; whether that was all. `leads_out`:
    /// there is an uplink. Until then an administrator is told what is missing.
    ///
    /// # Errors
    /// If something is there now that must not be: what the daemon does would harm this server.
    pub(super) fn look(
        &mut self,
        now: Instant,
        netlink: &Netlink,
        addresses: &[Address],
        leads_out: bool,
        endpoints: &[Option<SocketAddr>],
        known: &mut Warnings,
    ) -> Result<bool> {
        if !is_up(addresses) || !leads_out {
            self.up = None;
            return Ok(false);
        }
        let up = now.saturating_duration_since(*self.up.get_or_insert(now));
        if up < SETTLED {
            return Ok(false);
        }
        let listens = self.terms.listen.filter(|ip| !ip.is_unspecified());
        let absent = listens.filter(|ip| addresses.iter().all(|held| held.addr != *ip));
        if let Some(ip) = absent {
            let text = format!("--listen {ip} is not an address of this server; waiting for it");
            known.warn(now, text);
        }
        match self.terms.role {
            Role::Old => {
                if let Some(reason) = check_old(netlink, &self.terms, endpoints)? {
                    if up >= patience(is_managed()) {
                        return Err(input(reason));
                    }
                    let text = format!("{reason}; waiting for another address of this server");
                    known.warn(now, text);
                    return Ok(false);
                }
                let moves = self.terms.peers.iter().flat_map(|peer| &peer.moves);
                warn_of_absent(netlink, &moves.cloned().collect::<Vec<_>>())?;
            }
            Role::New => match check_new(netlink, &self.terms) {
                Err(DaemonError::Input(error)) => {
                    known.warn(now, format!("{error}; waiting for it"));
                    return Ok(false);
                }
                checked => checked?,
            },
        }
        Ok(absent.is_none())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(list: &[(u32, &str)]) -> Vec<Address> {
        let held = |&(index, addr): &(u32, &str)| Address {
            index,
            addr: addr.parse().unwrap(),
            prefix: 24,
        };
        list.iter().map(held).collect()
    }

    #[test]
    fn the_network_is_up_once_others_may_reach_this_host() {
        for (list, up) in [
            (&[][..], false),
            (&[(1, "127.0.0.1"), (1, "::1")], false),
            // A service's own address, which needs no network to be there.
            (&[(1, "10.0.0.7"), (1, "2001:db8::7")], false),
            (&[(2, "fe80::1"), (2, "169.254.7.7")], false),
            (&[(2, "fe80::1"), (3, "192.0.2.1")], true),
            (&[(2, "2001:db8::1")], true),
        ] {
            assert_eq!(is_up(&held(list)), up, "{list:?}");
        }
    }

    #[test]
    fn a_boot_waits_for_an_address_of_its_own_and_a_mistake_is_told_at_once() {
        let minutes = |count: u64| Duration::from_secs(60 * count);
        assert!(is_boot(true, minutes(0)) && is_boot(true, minutes(2)));
        // A unit that was set up on a running host, and whatever somebody types.
        assert!(!is_boot(true, minutes(3)) && !is_boot(false, minutes(0)));
        assert_eq!(patience(false), SETTLED, "somebody waits for the answer");
        assert!(
            patience(true) >= minutes(2),
            "DHCP has tried for more than a minute"
        );
        // A daemon that ends so during a boot may be started again before that counts as over; it
        // then waits once more, and no more than once.
        assert!(BOOTING < 2 * OWN_COMES);
    }
}
