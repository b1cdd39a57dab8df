//! The one door through which the state of the kernel changes.
//!
//! Owns the order of things: a change is written to the journal, then made; it is undone in
//! reverse, then struck out. What is there already and not ours is left alone; what a killed
//! predecessor left is taken over without a gap. What is wanted is decided elsewhere
//! ([`capture`](super::capture), [`steer`](super::steer)).

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::journal::{Change, Journal, JournalError};
use super::netlink::{
    Address, Direction, FilterSlot, Netlink, NetlinkError, Route, RouteKind, Rule,
};

/// A change that is wanted.
#[derive(Debug)]
pub struct Desired {
    /// The change.
    pub change: Change,
    /// The program, for a filter.
    pub program: Option<OwnedFd>,
    /// It goes when the TUN goes, and needs no journal.
    pub with_tun: bool,
    /// Whoever changes it later has the last word: it is not made again.
    pub once: bool,
}

impl Desired {
    /// A change that outlives the daemon unless it is undone.
    pub fn lasting(change: Change) -> Self {
        Self {
            change,
            program: None,
            with_tun: false,
            once: false,
        }
    }

    /// A change to the TUN or of something that goes with it.
    pub fn with_tun(change: Change) -> Self {
        Self {
            with_tun: true,
            ..Self::lasting(change)
        }
    }

    /// Not to be made again when others change it.
    pub fn once(self) -> Self {
        Self { once: true, ..self }
    }

    /// With the program of a filter.
    pub fn program(self, program: OwnedFd) -> Self {
        Self {
            program: Some(program),
            ..self
        }
    }
}

/// A change that could not be undone.
#[derive(Debug)]
pub struct Failure {
    /// The change that is still there.
    pub change: Change,
    /// Why, and what to do.
    pub reason: String,
}

/// What was undone and what was not.
#[derive(Debug, Default)]
pub struct Report {
    /// Undone, or found to be gone already.
    pub undone: Vec<Change>,
    /// Left as it is.
    pub left: Vec<Failure>,
}

/// What somebody had taken away.
#[derive(Debug, Default)]
pub struct Repairs {
    /// Made again.
    pub made: Vec<Change>,
    /// Still missing.
    pub failed: Vec<Failure>,
}

/// Why the host's state could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The journal cannot be used, or another daemon uses it.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The kernel cannot be asked.
    #[error("cannot speak with the kernel: {0}")]
    Netlink(#[from] NetlinkError),
    /// The kernel refused a change. What was made before it is undone.
    #[error("cannot make {change}: {reason}")]
    Refused {
        /// The change.
        change: Box<Change>,
        /// Why, and what to do.
        reason: String,
    },
}

/// The network namespace that the daemon works in, with its journal locked.
#[derive(Debug)]
pub struct Host {
    netlink: Netlink,
    journal: Journal,
    /// What the journal holds, in the order in which it was made.
    made: Vec<Change>,
    /// What was last asked for, to be made again if somebody takes it away.
    wanted: Vec<Desired>,
}

impl Host {
    /// Takes charge of the calling thread's network namespace: locks it, and loads what a killed
    /// predecessor left (nothing is changed yet). Every call must come from a thread in the same
    /// namespace, since `/proc/sys` follows the thread.
    ///
    /// # Errors
    /// If another daemon is in charge, or the journal cannot be used.
    pub fn open(base: &Path) -> Result<Self, HostError> {
        let (journal, made) = Journal::open(base)?;
        Ok(Self {
            netlink: Netlink::new()?,
            journal,
            made,
            wanted: Vec::new(),
        })
    }

    /// Removes what a killed daemon left in the calling thread's network namespace.
    ///
    /// # Errors
    /// If a daemon is in charge, or the journal cannot be used.
    pub fn cleanup(base: &Path) -> Result<Report, HostError> {
        Self::open(base)?.undo_all()
    }

    /// For questions; changes go through this door.
    pub fn netlink(&self) -> &Netlink {
        &self.netlink
    }

    /// The directory of this namespace, which only root may enter.
    pub fn dir(&self) -> &Path {
        self.journal.dir()
    }

    /// The lasting changes that are made, in their order.
    pub fn made(&self) -> &[Change] {
        &self.made
    }

    /// Makes what is wanted, in its order, and then undoes what was made before and is no longer
    /// wanted. A filter that is there already is replaced in one step; whatever else is there
    /// already stays untouched, and a sysctl keeps the value that it had before the first change.
    ///
    /// # Errors
    /// If a change fails: those that this call has made are undone.
    pub fn reconcile(&mut self, desired: Vec<Desired>) -> Result<Report, HostError> {
        self.wanted.clear();
        let step = Step {
            earlier: std::mem::take(&mut self.made),
            ..Step::default()
        };
        self.reconcile_step(step, desired)
    }

    fn reconcile_step(
        &mut self,
        mut step: Step,
        mut desired: Vec<Desired>,
    ) -> Result<Report, HostError> {
        for desired in &mut desired {
            if let Err(error) = self.take(&mut step, desired) {
                for change in step.fresh.iter().rev() {
                    let _ = self.undo(change);
                }
                step.kept.retain(|change| !step.fresh.contains(change));
                self.made = step.earlier;
                self.made.append(&mut step.kept);
                self.record()?;
                return Err(error);
            }
        }
        self.wanted.append(&mut desired);
        self.undo_reversed(step.earlier, step.kept)
    }

    /// Makes again what others have taken away since [`reconcile`](Self::reconcile): a network manager
    /// that removes rules and routes it does not know (as systemd-networkd does whenever it starts), a
    /// TUN that was down for a moment, a `sysctl --system`. Cheap enough for every few seconds.
    pub fn repair(&mut self) -> Repairs {
        let mut repairs = Repairs::default();
        let mut wanted = std::mem::take(&mut self.wanted);
        for desired in wanted.iter_mut().filter(|desired| !desired.once) {
            match self.repair_one(desired) {
                Ok(false) => {}
                Ok(true) => repairs.made.push(desired.change.clone()),
                Err(error) => repairs.failed.push(Failure {
                    change: desired.change.clone(),
                    reason: match error {
                        HostError::Refused { reason, .. } => reason,
                        HostError::Journal(_) | HostError::Netlink(_) => error.to_string(),
                    },
                }),
            }
        }
        self.wanted = wanted;
        repairs
    }

    /// Whether it was missing.
    fn repair_one(&mut self, desired: &mut Desired) -> Result<bool, HostError> {
        let refused = |change: &Change, reason| HostError::Refused {
            change: Box::new(change.clone()),
            reason,
        };
        let change = &desired.change;
        // A route is asked for again: to list the routes may mean to read all of the Internet's.
        if !matches!(change, Change::Default { .. }) {
            match self.present(change) {
                Ok(Presence::AsWanted) => return Ok(false),
                Ok(Presence::Absent) => {}
                Ok(Presence::Foreign(reason)) => return Err(refused(change, reason)),
                Err(error) => return Err(refused(change, remedy(change, &error))),
            }
        }
        // The value that somebody wants now is the one to come back to.
        if let Change::Sysctl { path, from, .. } = &mut desired.change {
            *from = read_sysctl(path).map_err(NetlinkError::from)?;
        }
        let change = &desired.change;
        if !desired.with_tun && !self.made.contains(change) {
            self.made.retain(|made| !made.same_object(change));
            // Undone last: a qdisc after the filters on it.
            self.made.insert(0, change.clone());
            self.journal.write(&self.made)?;
        }
        match self.make(desired, false) {
            Ok(()) => Ok(true),
            Err(error) if error.is_exists() => Ok(false),
            Err(error) => Err(refused(change, remedy(change, &error))),
        }
    }

    /// As [`reconcile`](Self::reconcile) for a part of what is made: of that, what is not wanted is undone; the rest stays.
    ///
    /// # Errors
    /// If a change fails: those that this call has made are undone.
    pub fn reconcile_part(
        &mut self,
        part: impl Fn(&Change) -> bool,
        desired: Vec<Desired>,
    ) -> Result<Report, HostError> {
        self.wanted.retain(|desired| !part(&desired.change));
        let made = std::mem::take(&mut self.made);
        let (earlier, kept) = made.into_iter().partition(part);
        self.reconcile_step(
            Step {
                earlier,
                kept,
                fresh: Vec::new(),
            },
            desired,
        )
    }

    /// Undoes everything, in reverse. What could not be undone stays in the journal.
    ///
    /// # Errors
    /// If the journal cannot be written.
    pub fn undo_all(&mut self) -> Result<Report, HostError> {
        self.wanted.clear();
        let made = std::mem::take(&mut self.made);
        self.undo_reversed(made, Vec::new())
    }

    /// Writes one wanted change down, and makes it.
    fn take(&self, step: &mut Step, desired: &mut Desired) -> Result<(), HostError> {
        let known = step
            .earlier
            .iter()
            .position(|change| change.same_object(&desired.change));
        let known_change = known.map(|index| &step.earlier[index]);
        if let (Change::Sysctl { from, .. }, Some(Change::Sysctl { from: original, .. })) =
            (&mut desired.change, known_change)
        {
            original.clone_into(from);
        }
        let change = &desired.change;
        let refused = |reason| HostError::Refused {
            change: Box::new(change.clone()),
            reason,
        };
        let present = match self.present(change) {
            Err(error) => return Err(refused(remedy(change, &error))),
            Ok(Presence::Foreign(reason)) => return Err(refused(reason)),
            // Somebody else's, and as we want it: nothing to make, nothing to undo.
            Ok(Presence::AsWanted) if known.is_none() && !is_unmistakable(change) => return Ok(()),
            Ok(Presence::AsWanted) => true,
            Ok(Presence::Absent) => false,
        };
        if !desired.with_tun {
            if let Some(index) = known
                && in_place(&step.earlier[index], change)
            {
                step.earlier.remove(index);
            }
            step.kept.push(change.clone());
            let all: Vec<_> = step.earlier.iter().chain(&step.kept).cloned().collect();
            if let Err(error) = self.journal.write(&all) {
                // Not written down, not made.
                if !present {
                    step.kept.pop();
                }
                return Err(error.into());
            }
        }
        if !present {
            step.fresh.push(change.clone());
        }
        self.make(desired, present)
            .map_err(|error| refused(remedy(change, &error)))
    }

    fn make(&self, desired: &Desired, present: bool) -> Result<(), NetlinkError> {
        let netlink = &self.netlink;
        match &desired.change {
            Change::Filter { program, .. } => {
                let Some(fd) = &desired.program else {
                    return Err(NetlinkError::Malformed {
                        request: "add bpf filter",
                    });
                };
                let slot = slot(&desired.change);
                if present {
                    netlink.replace_filter(slot, fd.as_fd(), program)
                } else {
                    netlink.add_filter(slot, fd.as_fd(), program)
                }
            }
            _ if present => Ok(()),
            Change::Clsact { on } => netlink.add_clsact(on.index),
            change @ Change::Rule { .. } => netlink.add_rule(&rule(change)),
            change @ Change::Default { .. } => netlink.add_route(&route(change)),
            Change::Sysctl { path, to, .. } => Ok(write_sysctl(path, to)?),
            Change::Address { on, addr, prefix } => netlink.add_quiet_address(&Address {
                index: on.index,
                addr: *addr,
                prefix: *prefix,
            }),
        }
    }

    /// Whether the object is there, and whose it is.
    fn present(&self, change: &Change) -> Result<Presence, NetlinkError> {
        let netlink = &self.netlink;
        let there = match change {
            Change::Clsact { on } => netlink.has_clsact(on.index)?,
            Change::Filter {
                on,
                direction,
                priority,
                handle,
                program,
            } => {
                let filters = netlink.filters(on.index, *direction)?;
                let mut at = filters.iter().filter(|f| f.priority == *priority);
                let foreign = at.clone().find(|f| f.kind != "bpf" || f.protocol != ALL);
                if let Some(foreign) = foreign {
                    return Ok(Presence::Foreign(format!(
                        "pref {priority} is taken by a {} filter that is not ipmoved's; move that one",
                        foreign.kind
                    )));
                }
                match at.find(|f| f.handle == *handle) {
                    None => false,
                    Some(filter) if filter.name.as_deref() == Some(program) => true,
                    Some(filter) => {
                        return Ok(Presence::Foreign(format!(
                            "its place is taken by bpf {}; move that one",
                            filter.name.as_deref().unwrap_or("(without a name)")
                        )));
                    }
                }
            }
            Change::Rule { family, .. } => netlink.rules(*family)?.contains(&rule(change)),
            Change::Default { family, table, .. } => {
                let wanted = route(change);
                netlink.routes(*family, *table)?.iter().any(|route| {
                    // IPv6 says that a blackhole leads to lo.
                    let dev = wanted.kind == RouteKind::Blackhole || route.dev == wanted.dev;
                    let metric = route.metric.unwrap_or(0) == wanted.metric.unwrap_or(0);
                    route.dst == wanted.dst && route.kind == wanted.kind && metric && dev
                })
            }
            Change::Sysctl { path, to, .. } => read_sysctl(path)? == *to,
            Change::Address { on, addr, .. } => netlink
                .addresses()?
                .iter()
                .any(|address| address.index == on.index && address.addr == *addr),
        };
        Ok(if there {
            Presence::AsWanted
        } else {
            Presence::Absent
        })
    }

    /// Undoes `changes` from the last to the first; the journal then holds `kept` and what could not
    /// be undone.
    fn undo_reversed(
        &mut self,
        mut changes: Vec<Change>,
        kept: Vec<Change>,
    ) -> Result<Report, HostError> {
        let mut report = Report::default();
        let mut left = Vec::new();
        while let Some(change) = changes.pop() {
            match self.undo(&change) {
                Ok(Undone::Gone) => report.undone.push(change),
                Ok(Undone::Foreign(reason)) => report.left.push(Failure { change, reason }),
                Err(error) => {
                    left.push(change.clone());
                    let reason = remedy(&change, &error);
                    report.left.push(Failure { change, reason });
                }
            }
        }
        left.reverse();
        self.made = left;
        self.made.extend(kept);
        self.record()?;
        Ok(report)
    }

    /// Writes down what is made. To write that nothing is takes no room on a full disk.
    fn record(&self) -> Result<(), JournalError> {
        if self.made.is_empty() {
            self.journal.clear();
            return Ok(());
        }
        self.journal.write(&self.made)
    }

    fn undo(&self, change: &Change) -> Result<Undone, NetlinkError> {
        match self.undo_present(change) {
            Err(error) if error.is_missing() => Ok(Undone::Gone),
            other => other,
        }
    }

    fn undo_present(&self, change: &Change) -> Result<Undone, NetlinkError> {
        let netlink = &self.netlink;
        match change {
            Change::Clsact { on } => {
                if !netlink.has_clsact(on.index)? {
                    return Ok(Undone::Gone);
                }
                for direction in [Direction::Ingress, Direction::Egress] {
                    if !netlink.filters(on.index, direction)?.is_empty() {
                        return Ok(Undone::Foreign(format!(
                            "others have put {direction} filters on it; it stays for them"
                        )));
                    }
                }
                netlink.delete_clsact(on.index)?;
            }
            Change::Filter { .. } => match self.present(change)? {
                Presence::AsWanted => netlink.delete_filter(slot(change))?,
                Presence::Absent | Presence::Foreign(_) => {}
            },
            Change::Rule { .. } => netlink.delete_rule(&rule(change))?,
            Change::Default { .. } => netlink.delete_route(&route(change))?,
            Change::Sysctl { path, from, to } => {
                let now = read_sysctl(path)?;
                if now == *from {
                    return Ok(Undone::Gone);
                }
                if now != *to {
                    return Ok(Undone::Foreign(format!(
                        "somebody has set it to {now} since; it stays so"
                    )));
                }
                write_sysctl(path, from)?;
            }
            Change::Address { on, addr, prefix } => netlink.delete_address(&Address {
                index: on.index,
                addr: *addr,
                prefix: *prefix,
            })?,
        }
        Ok(Undone::Gone)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if self.made.is_empty() {
            self.journal.remove();
        }
    }
}

/// A reconciliation on its way.
#[derive(Default)]
struct Step {
    /// Made before and not asked for (yet).
    earlier: Vec<Change>,
    /// Made before or now, and wanted: what the journal will hold in the end.
    kept: Vec<Change>,
    /// Made now, also what goes with the TUN: what is undone if a later change fails.
    fresh: Vec<Change>,
}

enum Presence {
    Absent,
    AsWanted,
    /// In the way, with a reason.
    Foreign(String),
}

enum Undone {
    Gone,
    /// Still there, rightly: somebody else relies on it.
    Foreign(String),
}

/// `ETH_P_ALL`.
const ALL: u16 = libc::ETH_P_ALL as u16;

/// Whether making `wanted` leaves no trace of `old`: the same object in the same place.
fn in_place(old: &Change, wanted: &Change) -> bool {
    let place = |change: &Change| match change {
        Change::Filter {
            priority, handle, ..
        } => Some((*priority, *handle)),
        Change::Clsact { .. }
        | Change::Rule { .. }
        | Change::Default { .. }
        | Change::Sysctl { .. }
        | Change::Address { .. } => None,
    };
    old.same_object(wanted) && place(old) == place(wanted)
}

/// Whether an object bears ipmoved's own name or number, so that it is ours even if the journal that
/// told of it is lost.
fn is_unmistakable(change: &Change) -> bool {
    match change {
        Change::Filter { .. } | Change::Rule { .. } | Change::Default { .. } => true,
        Change::Clsact { .. } | Change::Sysctl { .. } | Change::Address { .. } => false,
    }
}

fn slot(change: &Change) -> FilterSlot {
    let Change::Filter {
        on,
        direction,
        priority,
        handle,
        ..
    } = change
    else {
        unreachable!("only filters have a slot")
    };
    FilterSlot {
        index: on.index,
        direction: *direction,
        priority: *priority,
        handle: *handle,
    }
}

fn rule(change: &Change) -> Rule {
    let Change::Rule {
        family,
        mark,
        table,
        priority,
    } = change
    else {
        unreachable!("only rules are rules")
    };
    Rule {
        family: *family,
        priority: *priority,
        mark: Some((*mark, u32::MAX)),
        table: Some(*table),
        selects_more: false,
    }
}

fn route(change: &Change) -> Route {
    let Change::Default {
        family,
        table,
        dev,
        metric,
    } = change
    else {
        unreachable!("only routes are routes")
    };
    Route {
        kind: if dev.is_some() {
            RouteKind::Unicast
        } else {
            RouteKind::Blackhole
        },
        table: *table,
        dev: dev.as_ref().map(|dev| dev.index),
        metric: Some(*metric),
        ..Route::default_of(*family)
    }
}

fn sysctl_path(path: &str) -> PathBuf {
    Path::new("/proc/sys").join(path)
}

/// The value of a sysctl in the calling thread's network namespace, without the final newline.
pub(super) fn read_sysctl(path: &str) -> io::Result<String> {
    Ok(fs::read_to_string(sysctl_path(path))?.trim_end().to_owned())
}

/// With a newline: without it nothing at all would be written where the value is empty.
fn write_sysctl(path: &str, value: &str) -> io::Result<()> {
    fs::write(sysctl_path(path), format!("{value}\n"))
}

/// The kernel's reason, and what a person can do about it.
fn remedy(change: &Change, error: &NetlinkError) -> String {
    let missing = error.is_missing() || error.errno() == Some(Errno::OPNOTSUPP);
    let said = match error {
        // Nothing went through netlink.
        NetlinkError::Socket(error) if matches!(change, Change::Sysctl { .. }) => error.to_string(),
        NetlinkError::Socket(_) | NetlinkError::Refused { .. } | NetlinkError::Malformed { .. } => {
            error.to_string()
        }
    };
    let what = match change {
        _ if error.is_denied() => "run as root, or with CAP_NET_ADMIN",
        _ if error.errno() == Some(Errno::NODEV) => "the interface is gone",
        Change::Clsact { .. } if error.is_exists() => {
            "the interface has an ingress qdisc already; replace it by clsact, which takes the same filters"
        }
        Change::Clsact { .. } if missing => {
            "the kernel needs CONFIG_NET_SCH_INGRESS (module sch_ingress)"
        }
        Change::Filter { .. } if missing => "the kernel needs CONFIG_NET_CLS_BPF (module cls_bpf)",
        Change::Rule { .. } if error.errno() == Some(Errno::OPNOTSUPP) => {
            "the kernel needs CONFIG_IP_MULTIPLE_TABLES"
        }
        Change::Default { .. } if error.errno() == Some(Errno::NETDOWN) => {
            "the interface must be up"
        }
        Change::Sysctl { .. } if missing => "the kernel has no such setting",
        Change::Sysctl { .. } if error.errno() == Some(Errno::ROFS) => {
            "/proc/sys is read-only here, as in most containers; set it on the host, or run ipmoved there"
        }
        Change::Clsact { .. }
        | Change::Filter { .. }
        | Change::Rule { .. }
        | Change::Default { .. }
        | Change::Sysctl { .. }
        | Change::Address { .. } => return said,
    };
    format!("{said}; {what}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::bpf::{Assembler, Reg};
    use crate::kernel::testing::{Scratch, Tun, in_fresh_namespace, snapshot, sysctl, uplink};
    use crate::kernel::{capture, steer};
    use crate::model::moved::Move;

    struct Stage {
        scratch: Scratch,
        netlink: Netlink,
        uplink: crate::kernel::netlink::Link,
    }

    fn stage() -> Stage {
        let netlink = Netlink::new().unwrap();
        let addrs = [("192.0.2.5", 24), ("2001:db8::5", 64)];
        Stage {
            scratch: Scratch::new(),
            uplink: uplink(&netlink, "up.0", &addrs),
            netlink,
        }
    }

    impl Stage {
        fn host(&self) -> Host {
            Host::open(&self.scratch.0).unwrap()
        }

        fn capture(&self, tun: &Tun) -> Vec<Desired> {
            let moves: [Move; 2] = ["192.0.2.5".parse().unwrap(), "2001:db8::5".parse().unwrap()];
            capture::plan(&self.netlink, &moves, &self.uplink, &tun.link, &[]).unwrap()
        }

        fn steer(&self, tun: &Tun) -> Vec<Desired> {
            let uplinks = std::slice::from_ref(&self.uplink);
            steer::plan(&self.netlink, uplinks, &tun.link, 51820, 1000).unwrap()
        }

        fn tun(&self) -> Tun {
            Tun::new(&self.netlink, "tun0", false)
        }
    }

    /// A program that lets everything pass.
    fn foreign_program() -> OwnedFd {
        let mut asm = Assembler::new();
        asm.mov(Reg::R0, -1);
        asm.exit();
        asm.finish("foreign").unwrap().load().unwrap()
    }

    fn both(stage: &Stage, tun: &Tun) -> Vec<Desired> {
        let mut all = stage.capture(tun);
        all.extend(stage.steer(tun));
        // One TUN cannot carry both programs in one place; the lasting changes are what counts.
        all.retain(|desired| !desired.with_tun);
        all
    }

    #[test]
    fn undo_restores_everything() {
        in_fresh_namespace(|| {
            let stage = stage();
            sysctl("net/ipv4/fwmark_reflect", "3");
            let before = snapshot(&stage.netlink);
            for plan in [Stage::capture, Stage::steer, both] {
                let tun = stage.tun();
                let mut host = stage.host();
                host.reconcile(plan(&stage, &tun)).unwrap();
                assert_ne!(snapshot(&stage.netlink), before);
                let report = host.undo_all().unwrap();
                assert!(report.left.is_empty(), "{report:?}");
                drop(tun);
                assert_eq!(snapshot(&stage.netlink), before);
                drop(host);
                assert!(!stage.scratch.0.exists());
            }
        });
    }

    #[test]
    fn a_crash_is_taken_over_without_a_gap_and_undone_to_the_original() {
        in_fresh_namespace(|| {
            let stage = stage();
            let before = snapshot(&stage.netlink);
            let first = stage.tun();
            let mut host = stage.host();
            host.reconcile(both(&stage, &first)).unwrap();
            let made = host.made().to_vec();
            // Killed: the TUN goes, the rest stays.
            drop(host);
            drop(first);
            let filters = |direction| {
                let filters = stage
                    .netlink
                    .filters(stage.uplink.index, direction)
                    .unwrap();
                filters
                    .into_iter()
                    .filter(|f| f.handle != 0)
                    .collect::<Vec<_>>()
            };
            let old = filters(Direction::Ingress);
            assert_eq!(old.len(), 1);

            let second = stage.tun();
            let mut host = stage.host();
            assert_eq!(host.made(), made);
            let report = host.reconcile(both(&stage, &second)).unwrap();
            assert!(
                report.undone.is_empty() && report.left.is_empty(),
                "{report:?}"
            );
            assert_eq!(host.made(), made);
            let new = filters(Direction::Ingress);
            assert_eq!(new.len(), 1);
            assert_eq!(
                (new[0].priority, new[0].handle),
                (old[0].priority, old[0].handle)
            );
            assert_ne!(new[0].program_id, old[0].program_id);
            // Another role: what is no longer wanted goes.
            let report = host.reconcile(stage.capture(&second)).unwrap();
            assert_eq!(report.undone.len(), made.len() - 2);
            assert_eq!(host.made().len(), 2);
            drop(host);
            drop(second);
            let report = Host::cleanup(&stage.scratch.0).unwrap();
            assert_eq!(report.undone.len(), 2);
            assert_eq!(snapshot(&stage.netlink), before);
            assert!(!stage.scratch.0.exists());
        });
    }

    #[test]
    fn a_journal_ahead_of_the_kernel_is_undone_too() {
        in_fresh_namespace(|| {
            let stage = stage();
            let before = snapshot(&stage.netlink);
            let tun = stage.tun();
            let mut host = stage.host();
            let planned: Vec<_> = both(&stage, &tun).into_iter().map(|d| d.change).collect();
            host.journal.write(&planned).unwrap();
            host.made = planned.clone();
            let report = host.undo_all().unwrap();
            assert_eq!(report.undone.len(), planned.len());
            drop(tun);
            assert_eq!(snapshot(&stage.netlink), before);
        });
    }

    #[test]
    fn what_others_have_is_left_to_them() {
        in_fresh_namespace(|| {
            let stage = stage();
            let index = stage.uplink.index;
            // Their clsact and filter were there before, at our usual place.
            stage.netlink.add_clsact(index).unwrap();
            let place = FilterSlot {
                index,
                direction: Direction::Ingress,
                priority: capture::FILTER_PRIORITY,
                handle: capture::FILTER_HANDLE,
            };
            let foreign = foreign_program();
            stage
                .netlink
                .add_filter(place, foreign.as_fd(), "foreign")
                .unwrap();
            sysctl("net/ipv4/tcp_fwmark_accept", "1");
            let before = snapshot(&stage.netlink);
            let tun = stage.tun();
            let mut host = stage.host();
            host.reconcile(both(&stage, &tun)).unwrap();
            let filters = stage.netlink.filters(index, Direction::Ingress).unwrap();
            let ours = filters
                .iter()
                .find(|filter| filter.name.as_deref() == Some("ipmoved_capture"));
            let ours = ours.map(|filter| filter.priority);
            assert_eq!(ours, Some(capture::FILTER_PRIORITY - 1));
            assert!(host.undo_all().unwrap().left.is_empty());
            drop(tun);
            assert_eq!(snapshot(&stage.netlink), before);
        });
    }

    #[test]
    fn what_others_have_joined_or_changed_stays() {
        in_fresh_namespace(|| {
            let stage = stage();
            let tun = stage.tun();
            let mut host = stage.host();
            host.reconcile(both(&stage, &tun)).unwrap();
            let place = FilterSlot {
                index: stage.uplink.index,
                direction: Direction::Egress,
                priority: 7,
                handle: 1,
            };
            let foreign = foreign_program();
            stage
                .netlink
                .add_filter(place, foreign.as_fd(), "foreign")
                .unwrap();
            sysctl("net/ipv4/fwmark_reflect", "5");
            let left = host.undo_all().unwrap().left;
            let left: Vec<_> = left
                .iter()
                .map(|failure| failure.change.to_string())
                .collect();
            assert_eq!(left.len(), 2, "{left:?}");
            assert!(
                left[0].starts_with("sysctl") || left[1].starts_with("sysctl"),
                "{left:?}"
            );
            assert!(stage.netlink.has_clsact(stage.uplink.index).unwrap());
            let filters = stage
                .netlink
                .filters(stage.uplink.index, Direction::Egress)
                .unwrap();
            assert!(
                filters
                    .iter()
                    .all(|f| f.name.as_deref() != Some("ipmoved_reply"))
            );
            assert!(filters.iter().any(|f| f.name.as_deref() == Some("foreign")));
        });
    }

    #[test]
    fn a_change_that_fails_leaves_nothing_half_done() {
        in_fresh_namespace(|| {
            let stage = stage();
            let before = snapshot(&stage.netlink);
            let tun = stage.tun();
            let mut host = stage.host();
            let mut desired = both(&stage, &tun);
            desired.push(Desired::lasting(Change::Sysctl {
                path: "net/ipv4/no_such_setting".into(),
                from: String::new(),
                to: "1".into(),
            }));
            let error = host.reconcile(desired).unwrap_err().to_string();
            assert!(error.contains("sysctl net.ipv4.no_such_setting"), "{error}");
            assert!(error.contains("no such setting"), "{error}");
            assert_eq!(host.made(), []);
            drop(tun);
            assert_eq!(snapshot(&stage.netlink), before);
        });
    }

    #[test]
    fn a_second_daemon_and_cleanup_are_refused_while_one_runs() {
        in_fresh_namespace(|| {
            let stage = stage();
            let host = stage.host();
            for error in [
                Host::open(&stage.scratch.0).unwrap_err(),
                Host::cleanup(&stage.scratch.0).unwrap_err(),
            ] {
                assert!(error.to_string().contains("already running"), "{error}");
            }
            drop(host);
            // Another namespace never collides.
            let base = stage.scratch.0.clone();
            let _host = stage.host();
            in_fresh_namespace(move || drop(Host::open(&base).unwrap()));
        });
    }

    #[test]
    fn what_others_take_away_comes_back_and_still_goes_in_the_end() {
        in_fresh_namespace(|| {
            let stage = stage();
            let netlink = &stage.netlink;
            sysctl("net/ipv6/fwmark_reflect", "1");
            let mut before = snapshot(netlink);
            let tun = stage.tun();
            let mut host = stage.host();
            host.reconcile(stage.steer(&tun)).unwrap();
            let untouched = snapshot(netlink);
            assert!(host.repair().made.is_empty());
            assert_eq!(snapshot(netlink), untouched);

            // A network manager starts, a `sysctl --system`, a TUN that was down for a moment.
            for change in host.made().to_vec() {
                if matches!(change, Change::Rule { .. }) {
                    netlink.delete_rule(&rule(&change)).unwrap();
                }
            }
            sysctl("net/ipv4/tcp_fwmark_accept", "0");
            sysctl("net/ipv6/fwmark_reflect", "0");
            netlink.delete_clsact(stage.uplink.index).unwrap();
            netlink.set_link_down(tun.link.index).unwrap();
            let repairs = host.repair();
            let down: Vec<_> = repairs.failed.iter().map(|f| &f.reason).collect();
            assert_eq!(down.len(), 2, "{down:?}");
            assert!(down.iter().all(|reason| reason.contains("must be up")));
            netlink.set_link_up(tun.link.index).unwrap();
            let repairs = host.repair();
            assert!(repairs.failed.is_empty(), "{repairs:?}");
            assert_eq!(repairs.made.len(), 2, "{repairs:?}");
            assert_eq!(sorted(snapshot(netlink)), sorted(untouched));

            assert!(host.undo_all().unwrap().left.is_empty());
            drop(tun);
            // What was set to 0 meanwhile is 0 again, whatever it was before.
            for line in &mut before {
                if line.starts_with("net/ipv6/fwmark_reflect") {
                    *line = "net/ipv6/fwmark_reflect = \"0\\n\"".into();
                }
            }
            assert_eq!(snapshot(netlink), before);
        });
    }

    /// In an order of its own, since what comes back may come back elsewhere in a list.
    fn sorted(mut lines: Vec<String>) -> Vec<String> {
        lines.sort();
        lines
    }

    #[test]
    fn a_vanished_interface_is_named() {
        in_fresh_namespace(|| {
            let stage = stage();
            let tun = stage.tun();
            let desired = stage.capture(&tun);
            stage.netlink.delete_link(stage.uplink.index).unwrap();
            let error = stage.host().reconcile(desired).unwrap_err().to_string();
            assert!(
                error.contains("up.0") && error.contains("interface is gone"),
                "{error}"
            );
        });
    }
}
