//! What a start would change in the kernel, without a start (`--dry-run`).
//!
//! Goes the way of [`setup`](super::setup) with a host that only tells what it would do, a TUN that
//! is only planned, and memories of its own. The kernel does check the programs, and forgets them
//! at once.

use std::path::Path;

use super::early;
use super::follow::{Follower, Programs};
use super::service::{DaemonError, Result, system, warn_of_unread};
use super::setup::{Found, find_peers, link_settings, moves, moves_that_begin};
use crate::kernel::capture::Capture;
use crate::kernel::netlink::{Family, Link, Netlink};
use crate::kernel::programs::Own;
use crate::kernel::steer::Steering;
use crate::kernel::tun::{self, TunSetting};
use crate::kernel::{Host, Step, keep};
use crate::model::peer::Role;
use crate::model::prefix::Prefix;
use crate::packet::IPV6_MIN_MTU;
use crate::settings::config::{Config, PeerConfig};
use crate::settings::values::DeliverTo;

/// The memory of flows needs no room for any.
const NO_FLOWS: u32 = 1;

/// What would be done.
#[derive(Debug)]
pub struct DryRun {
    /// At the start, in order.
    pub at_start: Vec<Step>,
    /// Once the old server says that what `--accept` names has moved: no more than this, in order.
    pub when_moved: Vec<Step>,
    /// At the end, in order.
    pub at_exit: Vec<Step>,
}

impl DryRun {
    /// The changes to the TUN, and whatever else this host would do by now.
    pub(super) fn new(host: &Host, tun: &Link, queues: usize, mtu: u32) -> Self {
        let mut at_start = vec![tun::step_to_make(tun, queues)];
        let settings = tun::settings(tun.mtu).into_iter();
        at_start.extend(settings.filter_map(|setting| setting.step(tun)));
        at_start.extend(host.take_rehearsed());
        if mtu != tun.mtu {
            at_start.extend(TunSetting::Mtu(mtu).step(tun));
        }
        Self {
            at_start,
            when_moved: Vec::new(),
            at_exit: Vec::new(),
        }
    }

    /// How all of that would be undone.
    pub(super) fn end(mut self, host: &mut Host, tun: &Link) -> Result<Self> {
        self.when_moved.extend(host.take_rehearsed());
        host.undo_all()?;
        self.at_exit.extend(host.take_rehearsed());
        self.at_exit.push(tun::step_to_end(tun));
        Ok(self)
    }
}

/// Tells what [`run`](super::run) would change.
///
/// # Errors
/// As a start would fail.
pub fn dry_run(config: &Config, runtime_dir: &Path) -> Result<DryRun, DaemonError> {
    let netlink = Netlink::new().map_err(system)?;
    let mut host = Host::rehearse(runtime_dir)?;
    warn_of_unread(&host);
    let addresses = netlink.addresses().map_err(system)?;
    let may_come = early::may_come(&addresses);
    let endpoints = find_peers(config, early::is_up(&addresses));
    let found = Found::new(&netlink, config, &endpoints, &addresses, (may_come, false))?;
    let tun = Link::planned_tun(&config.tun, found.uplinks.mtu());
    let moves = moves(config);
    let port = config.listen.port;
    let programs = match config.role {
        Role::Old => {
            let begin = moves_that_begin(config);
            let own = Own::new().map_err(system)?;
            let capture = Capture::new(&moves, &begin, &tun, port, own).map_err(system)?;
            Programs::Old(Box::new(capture))
        }
        Role::New => {
            let steering = Steering::new(&netlink, &[], port, NO_FLOWS, &[]).map_err(system)?;
            Programs::New(Box::new(steering.with_outgoing(found.chosen)))
        }
    };
    let settings = link_settings(config, moves);
    Follower::start(settings, programs, tun.clone(), found.uplinks, &mut host)?;
    let mtu = match config.role {
        Role::Old => tun.mtu,
        Role::New => tun.mtu.max(IPV6_MIN_MTU as u32),
    };
    let told = DryRun::new(&host, &tun, config.lanes.into(), mtu);
    hold(config, &mut host, &tun)?;
    told.end(&mut host, &tun)
}

/// What would be done to hold what is accepted, where that is held.
fn hold(config: &Config, host: &mut Host, tun: &Link) -> Result<()> {
    let holds =
        |peer: &&PeerConfig| peer.deliver_to == DeliverTo::Keep || !peer.outgoing.is_empty();
    let accepted = config.peers.iter().filter(holds);
    let accepted = accepted.flat_map(|peer| peer.accept.iter().map(|it| it.prefix));
    let accepted: Vec<Prefix> = accepted.collect();
    if accepted.is_empty() {
        return Ok(());
    }
    for family in [Family::V4, Family::V6] {
        let of_family = |prefix: &&Prefix| Family::of(prefix.first()) == family;
        let wanted: Vec<Prefix> = accepted.iter().filter(of_family).copied().collect();
        let desired = keep::plan(host.netlink(), &wanted, tun, host.made()).map_err(system)?;
        host.reconcile_part(|change| keep::is_part_for(change, family), desired)?;
    }
    Ok(())
}
