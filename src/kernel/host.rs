//! All changes to the state of the kernel go through here.
//!
//! Owns the order of events: a change goes into the journal before it is made, and leaves it after
//! it is undone; undoing goes in reverse order. A host leaves alone what others have made, and
//! takes over without a gap what a killed predecessor left. [`plan`](super::plan) decides what is
//! wanted, and [`change`](super::change) knows how to find, make and undo each kind of change.
//!
//! A host in a rehearsal decides all the same, and changes nothing: it tells what it would do.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use super::change::{Change, ChangeError, Means, Presence, There, Undone};
use super::journal::{Journal, JournalError, Unread};
use super::netlink::{Netlink, NetlinkError};
use super::rehearsal::{Rehearsal, Step as Rehearsed};
use super::runtime_dir::{RuntimeDir, RuntimeDirError};

/// A change that is wanted.
#[derive(Debug)]
pub struct Desired {
    /// The change.
    pub change: Change,
    /// The program, for a filter.
    pub program: Option<OwnedFd>,
    /// It vanishes with the TUN, so the journal need not record it.
    pub with_tun: bool,
    /// If others change it later, their value stays: it is not made again.
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

    /// A change to the TUN, or to something that vanishes with it.
    pub fn with_tun(change: Change) -> Self {
        Self {
            with_tun: true,
            ..Self::lasting(change)
        }
    }

    /// The same change, but not made again after others change it.
    pub fn once(self) -> Self {
        Self { once: true, ..self }
    }

    /// The same change with the program of its filter.
    pub fn program(self, program: OwnedFd) -> Self {
        Self {
            program: Some(program),
            ..self
        }
    }

    fn refused_by(&self, error: &ChangeError) -> HostError {
        self.refused(self.change.remedy(error))
    }

    fn refused(&self, reason: String) -> HostError {
        HostError::Refused {
            change: Box::new(self.change.clone()),
            reason,
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

/// The result of undoing.
#[derive(Debug, Default)]
pub struct Report {
    /// Undone now, or gone already.
    pub undone: Vec<Change>,
    /// Still there.
    pub left: Vec<Failure>,
}

/// The result of cleaning up.
#[derive(Debug)]
pub struct Cleanup {
    /// What was recorded, and was or was not undone.
    pub report: Report,
    /// What was not understood of the journal.
    pub unread: Unread,
}

/// The changes that others had taken away.
#[derive(Debug, Default)]
pub struct Repairs {
    /// Made again.
    pub made: Vec<Change>,
    /// Still missing.
    pub failed: Vec<Failure>,
}

impl Repairs {
    fn fail(&mut self, desired: &Desired, error: HostError) {
        self.failed.push(Failure {
            change: desired.change.clone(),
            reason: match error {
                HostError::Refused { reason, .. } => reason,
                HostError::RuntimeDir(_) | HostError::Journal(_) | HostError::Netlink(_) => {
                    error.to_string()
                }
            },
        });
    }
}

/// Why the host's state could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The directory of the namespace cannot be used, or another daemon uses it.
    #[error(transparent)]
    RuntimeDir(#[from] RuntimeDirError),
    /// The journal cannot be used.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The kernel cannot be asked.
    #[error("cannot speak with the kernel: {0}")]
    Netlink(#[from] NetlinkError),
    /// The kernel refused a change. The changes before it are undone.
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
    dir: RuntimeDir,
    journal: Journal,
    /// The changes in the journal, in the order in which they were made.
    made: Vec<Change>,
    /// What was not understood of the journal.
    unread: Unread,
    /// The latest request, so that [`Host::repair`] can make again what somebody takes away.
    wanted: Vec<Desired>,
    /// Another daemon is in charge until it hands over.
    shared: bool,
    /// What would have been done, if nothing is to be.
    rehearsal: Option<Rehearsal>,
}

impl Host {
    /// Takes charge of the calling thread's network namespace: locks it, and loads the journal of a
    /// killed predecessor. It changes nothing yet. Every later call must come from a thread in the
    /// same namespace, since `/proc/sys` follows the thread.
    ///
    /// # Errors
    /// If another daemon is in charge, or the journal cannot be used.
    pub fn open(base: &Path) -> Result<Self, HostError> {
        Self::of(RuntimeDir::open(base)?, None)
    }

    /// Looks at the calling thread's network namespace, and at the journal of a killed predecessor.
    /// Neither this nor any later call changes anything there.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn rehearse(base: &Path) -> Result<Self, HostError> {
        Self::of(RuntimeDir::look(base)?, Some(Rehearsal::default()))
    }

    fn of(dir: RuntimeDir, rehearsal: Option<Rehearsal>) -> Result<Self, HostError> {
        let (journal, made, unread) = Journal::open(&dir)?;
        Ok(Self {
            netlink: Netlink::new()?,
            dir,
            journal,
            made,
            unread,
            wanted: Vec::new(),
            rehearsal,
            shared: false,
        })
    }

    /// As [`open`](Self::open), where another daemon is in charge, and shares its `lock` until it
    /// hands over.
    ///
    /// # Errors
    /// If the lock is not that of this namespace, or the journal cannot be used.
    pub fn inherit(base: &Path, lock: OwnedFd) -> Result<Self, HostError> {
        let mut host = Self::of(RuntimeDir::inherit(base, lock)?, None)?;
        host.shared = true;
        Ok(host)
    }

    /// A second handle to the lock, for the daemon that is to take over.
    ///
    /// # Errors
    /// If there is no descriptor left.
    pub fn lock(&self) -> io::Result<OwnedFd> {
        self.dir.lock()
    }

    /// This process is in charge from now on, and nobody else.
    ///
    /// # Errors
    /// If that cannot be written down.
    pub fn take_charge(&mut self) -> Result<(), HostError> {
        self.shared = false;
        Ok(self.dir.sign()?)
    }

    /// Leaves everything as it is to another daemon, which is in charge from now on.
    pub fn leave(&mut self) {
        self.shared = true;
    }

    /// Somebody else made changes meanwhile, and is gone: makes all that is wanted once more, each
    /// for itself, and undoes what is not. What fails is still wanted, so that
    /// [`repair`](Self::repair) tries it again.
    pub fn resume(&mut self) -> (Repairs, Result<Report, HostError>) {
        let read = self.journal.read();
        let unread = read.map(|read| (self.made, self.unread) = read);
        let mut repairs = Repairs::default();
        let before = self.made.clone();
        let mut wanted = std::mem::take(&mut self.wanted);
        for row in wanted.chunk_by_mut(are_of_a_row) {
            self.resume_row(row, &mut repairs);
        }
        self.wanted = wanted;
        let report = match unread {
            Ok(()) => self.undo_unwanted(before),
            Err(error) => Err(error.into()),
        };
        (repairs, report)
    }

    /// Makes all of a row once more.
    fn resume_row(&mut self, row: &mut [Desired], repairs: &mut Repairs) {
        let there = There::new(&self.netlink);
        let objects = Objects::of(&self.made);
        let mut to_make = Vec::new();
        for desired in row.iter_mut() {
            let known = objects.first(&self.made, &desired.change);
            if let Some(at) = known {
                desired.change.keep_original(&self.made[at]);
            }
            let is_present = match desired.change.present(&there) {
                Err(error) => {
                    repairs.fail(desired, desired.refused_by(&error));
                    continue;
                }
                Ok(Presence::Foreign(reason)) => {
                    repairs.fail(desired, desired.refused(reason));
                    continue;
                }
                Ok(Presence::AsWanted) if known.is_none() && !desired.change.is_unmistakable() => {
                    continue;
                }
                Ok(Presence::AsWanted) => true,
                Ok(Presence::Absent) => false,
            };
            // What is not in the journal was undone meanwhile.
            if !is_present
                && known.is_none()
                && let Err(error) = desired.change.renew_original(&self.netlink)
            {
                repairs.fail(desired, desired.refused_by(&error));
                continue;
            }
            to_make.push((&*desired, is_present));
        }
        self.make_again(&to_make, repairs);
    }

    /// Undoes what was made `before`, and is not wanted, or not there.
    fn undo_unwanted(&mut self, before: Vec<Change>) -> Result<Report, HostError> {
        let objects = Objects::of(&before);
        let mut stays = HashSet::new();
        for desired in self.wanted.iter().filter(|desired| !desired.with_tun) {
            let known = objects.all(&before, &desired.change).into_iter();
            stays.extend(known.filter(|&at| desired.change.takes_the_place_of(&before[at])));
        }
        let unwanted = (0..).zip(before).filter(|(at, _)| !stays.contains(at));
        let unwanted: Vec<Change> = unwanted.map(|(_, change)| change).collect();
        let mut kept = std::mem::take(&mut self.made);
        kept.retain(|change| !unwanted.contains(change));
        self.undo_reversed(unwanted, kept)
    }

    /// What would have been done since the last call, in order, in a rehearsal.
    pub fn take_rehearsed(&self) -> Vec<Rehearsed> {
        let rehearsal = self.rehearsal.as_ref();
        rehearsal.map(Rehearsal::take).unwrap_or_default()
    }

    /// Removes what a killed daemon left in the calling thread's network namespace.
    ///
    /// # Errors
    /// If a daemon is in charge, or the journal cannot be used.
    pub fn cleanup(base: &Path) -> Result<Cleanup, HostError> {
        let mut host = Self::open(base)?;
        let report = host.undo_all()?;
        let unread = std::mem::take(&mut host.unread);
        Ok(Cleanup { report, unread })
    }

    /// What was not understood of a killed predecessor's journal.
    pub fn unread(&self) -> &Unread {
        &self.unread
    }

    /// For questions only. Changes go through [`Host`].
    pub fn netlink(&self) -> &Netlink {
        &self.netlink
    }

    /// The directory of this namespace, which only root may enter.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The lasting changes that are in force, in the order in which they were made.
    pub fn made(&self) -> &[Change] {
        &self.made
    }
    /// Makes the desired changes in their order, and then undoes earlier ones that are no longer
    /// wanted. It replaces a filter that is there already in one step. Anything else that is there
    /// already stays untouched, and a sysctl remembers the value from before the first change.
    ///
    /// Something may happen `between` two parts of it: what comes `first` stands by then, and what
    /// comes `then` does not, unless a killed predecessor left it.
    ///
    /// # Errors
    /// If a change fails. Then the changes that this call has made are undone.
    pub fn reconcile_around(
        &mut self,
        mut first: Vec<Desired>,
        between: impl FnOnce(&Netlink),
        mut then: Vec<Desired>,
    ) -> Result<Report, HostError> {
        self.wanted.clear();
        let mut step = Step {
            earlier: std::mem::take(&mut self.made),
            ..Step::default()
        };
        let made = self.take_all(&mut step, &mut first).and_then(|()| {
            between(&self.netlink);
            self.take_all(&mut step, &mut then)
        });
        first.append(&mut then);
        self.finish_step(step, made, first)
    }

    /// The same, in one part.
    #[cfg(test)]
    pub fn reconcile(&mut self, desired: Vec<Desired>) -> Result<Report, HostError> {
        self.reconcile_around(desired, |_| {}, Vec::new())
    }

    /// Looks for everything, and makes it.
    fn take_all(&self, step: &mut Step, desired: &mut [Desired]) -> Result<(), HostError> {
        let mut rows = desired.chunk_by_mut(are_of_a_row);
        rows.try_for_each(|row| self.take(step, row))
    }

    /// Undoes what is no longer wanted, or what was made just now if that failed.
    fn finish_step(
        &mut self,
        mut step: Step,
        made: Result<(), HostError>,
        mut desired: Vec<Desired>,
    ) -> Result<Report, HostError> {
        if let Err(error) = made {
            for change in step.fresh.iter().rev() {
                match &self.rehearsal {
                    Some(rehearsal) => rehearsal.forget(change),
                    None => drop(change.undo(&self.netlink)),
                }
            }
            step.kept.retain(|change| !step.fresh.contains(change));
            self.made = step.earlier;
            self.made.append(&mut step.kept);
            self.record()?;
            return Err(error);
        }
        self.wanted.append(&mut desired);
        self.undo_reversed(step.earlier, step.kept)
    }

    /// Makes again what others have taken away since
    /// [`reconcile_around`](Self::reconcile_around): a network
    /// manager that removes unknown rules and routes (as systemd-networkd does whenever it starts),
    /// a TUN that was down for a moment, a `sysctl --system`. It is cheap enough to run every few
    /// seconds.
    pub fn repair(&mut self) -> Repairs {
        let mut repairs = Repairs::default();
        let mut wanted = std::mem::take(&mut self.wanted);
        for row in wanted.chunk_by_mut(are_of_a_row) {
            self.repair_row(row, &mut repairs);
        }
        self.wanted = wanted;
        repairs
    }

    /// Makes again what is missing of a row.
    fn repair_row(&mut self, row: &mut [Desired], repairs: &mut Repairs) {
        let there = There::new(&self.netlink);
        let mut missing = Vec::new();
        for desired in row.iter_mut().filter(|desired| !desired.once) {
            match Self::is_missing(desired, &there) {
                Ok(false) => {}
                Ok(true) => missing.push(&*desired),
                Err(error) => repairs.fail(desired, error),
            }
        }
        let missing: Vec<_> = missing
            .into_iter()
            .map(|desired| (desired, false))
            .collect();
        self.make_again(&missing, repairs);
    }

    /// Writes down what is to be made, and makes each, which may be present.
    fn make_again(&mut self, all: &[(&Desired, bool)], repairs: &mut Repairs) {
        if all.is_empty() {
            return;
        }
        let desired: Vec<_> = all.iter().map(|&(desired, _)| desired).collect();
        if let Err(error) = self.write_down(&desired) {
            let reason = error.to_string();
            let failed = desired.into_iter().map(|desired| Failure {
                change: desired.change.clone(),
                reason: reason.clone(),
            });
            repairs.failed.extend(failed);
            return;
        }
        for &(desired, is_present) in all {
            match self.make(desired, is_present) {
                Ok(()) => repairs.made.push(desired.change.clone()),
                Err(error) if error.is_exists() => {}
                Err(error) => repairs.fail(desired, desired.refused_by(&error)),
            }
        }
    }

    /// Whether a change has to be made again.
    fn is_missing(desired: &mut Desired, there: &There<'_>) -> Result<bool, HostError> {
        if !desired.change.is_costly_to_find() {
            match desired.change.present(there) {
                Ok(Presence::AsWanted) => return Ok(false),
                Ok(Presence::Absent) => {}
                Ok(Presence::Foreign(reason)) => return Err(desired.refused(reason)),
                Err(error) => return Err(desired.refused_by(&error)),
            }
        }
        // Undoing must restore the value that somebody has set by now.
        let renewed = desired.change.renew_original(there.netlink());
        renewed.map_err(|error| desired.refused_by(&error))?;
        Ok(true)
    }

    /// Writes down those that the journal does not hold as they are now.
    fn write_down(&mut self, missing: &[&Desired]) -> Result<(), JournalError> {
        let objects = Objects::of(&self.made);
        let mut replaced = HashSet::new();
        let mut new = Vec::new();
        for desired in missing.iter().filter(|desired| !desired.with_tun) {
            let known = objects.all(&self.made, &desired.change);
            if !known.iter().any(|&at| self.made[at] == desired.change) {
                replaced.extend(known);
                new.push(desired.change.clone());
            }
        }
        if new.is_empty() {
            return Ok(());
        }
        // They must be undone last: a qdisc after the filters on it.
        new.reverse();
        let made = std::mem::take(&mut self.made);
        let others = (0..).zip(made).filter(|(at, _)| !replaced.contains(at));
        new.extend(others.map(|(_, change)| change));
        self.made = new;
        self.journal.write(&self.made)
    }

    /// As [`reconcile_around`](Self::reconcile_around), but only for the changes that `part`
    /// selects. It undoes those of them that are no longer wanted, and leaves all others as they
    /// are.
    ///
    /// # Errors
    /// If a change fails. Then the changes that this call has made are undone.
    pub fn reconcile_part(
        &mut self,
        part: impl Fn(&Change) -> bool,
        mut desired: Vec<Desired>,
    ) -> Result<Report, HostError> {
        self.wanted.retain(|desired| !part(&desired.change));
        let made = std::mem::take(&mut self.made);
        let (earlier, kept) = made.into_iter().partition(part);
        let mut step = Step {
            earlier,
            kept,
            fresh: Vec::new(),
        };
        let made = self.take_all(&mut step, &mut desired);
        self.finish_step(step, made, desired)
    }

    /// Undoes everything, in reverse order. The journal keeps the changes that could not be undone.
    ///
    /// # Errors
    /// If the journal cannot be written.
    pub fn undo_all(&mut self) -> Result<Report, HostError> {
        self.wanted.clear();
        let made = std::mem::take(&mut self.made);
        self.undo_reversed(made, Vec::new())
    }

    /// Looks for all of a row, writes it down, and makes it.
    fn take(&self, step: &mut Step, row: &mut [Desired]) -> Result<(), HostError> {
        let there = There::new(&self.netlink);
        let objects = Objects::of(&step.earlier);
        let mut to_make = Vec::new();
        let mut replaced = HashSet::new();
        for desired in row.iter_mut() {
            let known = objects.first(&step.earlier, &desired.change);
            if let Some(index) = known {
                desired.change.keep_original(&step.earlier[index]);
            }
            let change = &desired.change;
            let present = match self.look_for(desired, &there) {
                Err(error) => return Err(desired.refused_by(&error)),
                Ok(Presence::Foreign(reason)) => return Err(desired.refused(reason)),
                // Somebody else's, and as we want it: there is nothing to make and nothing to undo.
                Ok(Presence::AsWanted) if known.is_none() && !change.is_unmistakable() => continue,
                Ok(Presence::AsWanted) => true,
                Ok(Presence::Absent) => false,
            };
            if let Some(index) = known
                && !desired.with_tun
                && change.takes_the_place_of(&step.earlier[index])
            {
                replaced.insert(index);
            }
            to_make.push((&*desired, present));
        }
        let lasting = to_make.iter().filter(|(desired, _)| !desired.with_tun);
        let lasting: Vec<Change> = lasting.map(|(desired, _)| desired.change.clone()).collect();
        if !lasting.is_empty() {
            let earlier = std::mem::take(&mut step.earlier);
            let others = (0..).zip(earlier).filter(|(at, _)| !replaced.contains(at));
            step.earlier = others.map(|(_, change)| change).collect();
            step.kept.extend(lasting);
            let all: Vec<_> = step.earlier.iter().chain(&step.kept).cloned().collect();
            if let Err(error) = self.journal.write(&all) {
                // What the journal does not hold must not be made.
                let absent = |change: &Change| {
                    let mut absent = to_make.iter().filter(|(_, present)| !present);
                    absent.any(|(desired, _)| desired.change == *change)
                };
                step.kept.retain(|change| !absent(change));
                return Err(error.into());
            }
        }
        for (at, &(desired, present)) in to_make.iter().enumerate() {
            if !present {
                step.fresh.push(desired.change.clone());
            }
            if let Err(error) = self.make(desired, present) {
                // Those behind it are written down, and will not be made.
                let absent = to_make[at + 1..].iter().filter(|(_, present)| !present);
                let unmade: Vec<_> = absent.map(|(desired, _)| &desired.change).collect();
                step.kept.retain(|change| !unmade.contains(&change));
                return Err(desired.refused_by(&error));
            }
        }
        Ok(())
    }

    /// Whether a desired change is there already. In a rehearsal what it is on may not be.
    fn look_for(&self, desired: &Desired, there: &There<'_>) -> Result<Presence, ChangeError> {
        if self.rehearsal.is_some() && desired.with_tun {
            return Ok(desired.change.present_at_first());
        }
        desired.change.present(there)
    }

    fn make(&self, desired: &Desired, present: bool) -> Result<(), ChangeError> {
        if let Some(rehearsal) = &self.rehearsal {
            rehearsal.make(&desired.change, present);
            return Ok(());
        }
        let with = Means {
            netlink: &self.netlink,
            program: desired.program.as_ref().map(AsFd::as_fd),
        };
        if present {
            desired.change.renew(&with)
        } else {
            desired.change.make(&with)
        }
    }

    /// Undoes one change. A rehearsal tells it if there would be something to undo.
    fn undo(&self, change: &Change) -> Result<Undone, ChangeError> {
        let Some(rehearsal) = &self.rehearsal else {
            return change.undo(&self.netlink);
        };
        let is_there = || change.present(&There::new(&self.netlink));
        if rehearsal.has(change) || matches!(is_there(), Ok(Presence::AsWanted)) {
            rehearsal.undo(change);
        }
        Ok(Undone::Gone)
    }

    /// Undoes `changes` from the last to the first. Then the journal holds `kept` and the changes
    /// that could not be undone.
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
                    let reason = change.remedy(&error);
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

    /// Writes the made changes to the journal. If there are none it removes the file, which works
    /// on a full disk as well.
    fn record(&self) -> Result<(), JournalError> {
        if self.made.is_empty() && self.shared {
            return self.journal.write(&self.made);
        }
        if self.made.is_empty() {
            self.journal.clear();
            return Ok(());
        }
        self.journal.write(&self.made)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if self.made.is_empty() && !self.shared {
            self.journal.clear();
            self.dir.remove();
        }
    }
}

/// Whether two changes that follow one another may be looked for together.
fn are_of_a_row(one: &Desired, next: &Desired) -> bool {
    one.change.is_one_of_many() && next.change.is_one_of_many()
}

/// Where each object stands in a list of changes, so that a search for each of thousands does not
/// go through thousands.
struct Objects {
    by_name: HashMap<String, Vec<usize>>,
    /// Those that have no name of their own.
    others: Vec<usize>,
}

impl Objects {
    fn of(changes: &[Change]) -> Self {
        let mut all = Self {
            by_name: HashMap::new(),
            others: Vec::new(),
        };
        for (at, change) in changes.iter().enumerate() {
            match change.object() {
                Some(name) => all.by_name.entry(name).or_default().push(at),
                None => all.others.push(at),
            }
        }
        all
    }

    /// Where the same object stands among the same `changes`.
    fn all(&self, changes: &[Change], change: &Change) -> Vec<usize> {
        match change.object() {
            Some(name) => self.by_name.get(&name).cloned().unwrap_or_default(),
            None => {
                let others = self.others.iter().copied();
                others
                    .filter(|&at| changes[at].same_object(change))
                    .collect()
            }
        }
    }

    /// Where it stands first.
    fn first(&self, changes: &[Change], change: &Change) -> Option<usize> {
        self.all(changes, change).first().copied()
    }
}

/// A reconciliation under way.
#[derive(Default)]
struct Step {
    /// Made by an earlier call, and not asked for, or not yet.
    earlier: Vec<Change>,
    /// Wanted, and made by an earlier call or by this one: the final content of the journal.
    kept: Vec<Change>,
    /// Made by this call, including changes that vanish with the TUN. They are undone if a later
    /// one fails.
    fresh: Vec<Change>,
}

#[cfg(test)]
mod tests {
    use rustix::thread::CapabilitySet;

    use super::*;
    use crate::kernel::bpf::{Assembler, Reg};
    use crate::kernel::capture::Capture;
    use crate::kernel::change::{DefaultRoute, MarkRule, Sysctl};
    use crate::kernel::netlink::{Direction, Family, FilterSlot};
    use crate::kernel::plan;
    use crate::kernel::programs::Own;
    use crate::kernel::steer::Steering;
    use crate::kernel::testing::{
        Scratch, Tun, capabilities_of_the_unit, delete_link, in_fresh_namespace, keep_only,
        set_link_down, snapshot, sysctl, uplink,
    };
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
            let capture = Capture::new(&moves, &[], &tun.link, 51820, Own::new().unwrap()).unwrap();
            let mut desired = capture.on_tun(&self.netlink).unwrap();
            desired.extend(capture.on_entrance(&self.netlink, &self.uplink).unwrap());
            desired
        }

        fn steer(&self, tun: &Tun) -> Vec<Desired> {
            let uplinks = std::slice::from_ref(&self.uplink);
            let steering = Steering::new(&self.netlink, uplinks, 51820, 1000, &[]).unwrap();
            steering.plan(&self.netlink, uplinks, &tun.link).unwrap()
        }

        /// What steers, with rules by mark and a route to the TUN, which needs it up.
        fn steer_by_route(&self, tun: &Tun) -> Vec<Desired> {
            let mut desired = self.steer(tun);
            desired.extend(by_mark());
            desired.push(Desired::with_tun(Change::Route(DefaultRoute {
                family: Family::V4,
                table: 254,
                dev: Some((&tun.link).into()),
                metric: 7,
            })));
            desired
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

    /// What earlier versions made on the new server: the replies of marked packets went by a rule.
    fn by_mark() -> Vec<Desired> {
        const MARK: u32 = 0x6970_6d76;
        let sysctl = |path: &str| {
            let file = format!("/proc/sys/{path}");
            Change::Sysctl(Sysctl {
                path: path.to_owned(),
                on: None,
                from: std::fs::read_to_string(file).unwrap().trim_end().to_owned(),
                to: "1".to_owned(),
            })
        };
        let mut all = vec![
            sysctl("net/ipv4/fwmark_reflect"),
            sysctl("net/ipv6/fwmark_reflect"),
            sysctl("net/ipv4/tcp_fwmark_accept"),
        ];
        for family in [Family::V4, Family::V6] {
            all.push(Change::Route(DefaultRoute {
                family,
                table: MARK,
                dev: None,
                metric: 4_000_000,
            }));
            all.push(Change::Rule(MarkRule {
                family,
                mark: MARK,
                table: MARK,
                priority: 100,
            }));
        }
        all.into_iter().map(Desired::lasting).collect()
    }

    fn both(stage: &Stage, tun: &Tun) -> Vec<Desired> {
        let mut all = stage.capture(tun);
        all.extend(by_mark());
        all.extend(stage.steer(tun));
        // Neither the TUN nor the uplink's ingress can carry the programs of both roles in one
        // place; only lasting changes matter here, and one filter of each role.
        all.retain(|desired| {
            let in_the_way = matches!(
                &desired.change,
                Change::Filter(filter) if filter.program == "ipmoved_direct"
            );
            !desired.with_tun && !in_the_way
        });
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
                for change in host.made() {
                    assert_eq!(change.check(), Ok(()), "the next start undoes it");
                }
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
    fn what_is_older_is_noted_when_everything_but_the_capture_stands() {
        in_fresh_namespace(|| {
            let stage = stage();
            let tun = stage.tun();
            let mut host = stage.host();
            let index = stage.uplink.index;
            let stands = |netlink: &Netlink, name| {
                [Direction::Ingress, Direction::Egress].iter().any(|&way| {
                    let filters = netlink.filters(index, way).unwrap();
                    filters.iter().any(|it| it.name.as_deref() == Some(name))
                })
            };
            let names = ["ipmoved_own", "ipmoved_capture"];
            let mut first = stage.capture(&tun);
            let then = vec![first.pop().unwrap()];
            let mut seen = None;
            let between = |netlink: &Netlink| seen = Some(names.map(|name| stands(netlink, name)));
            host.reconcile_around(first, between, then).unwrap();
            assert_eq!(seen, Some([true, false]));
            assert_eq!(names.map(|name| stands(&stage.netlink, name)), [true, true]);
            assert!(host.repair().failed.is_empty());
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
            // A kill: the TUN vanishes, everything else stays.
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
            // Another role: changes that are no longer wanted go.
            let report = host.reconcile(stage.capture(&second)).unwrap();
            assert_eq!(report.undone.len(), made.len() - 5);
            assert_eq!(host.made().len(), 5);
            drop(host);
            drop(second);
            let report = Host::cleanup(&stage.scratch.0).unwrap().report;
            assert_eq!(report.undone.len(), 5);
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
            // Their clsact and their filter are there first, at our usual place.
            stage.netlink.add_clsact(index).unwrap();
            let place = FilterSlot {
                index,
                direction: Direction::Ingress,
                priority: plan::FILTER_PRIORITY,
                handle: plan::FILTER_HANDLE,
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
            assert_eq!(ours, Some(plan::FILTER_PRIORITY - 1));
            assert!(host.undo_all().unwrap().left.is_empty());
            drop(tun);
            assert_eq!(snapshot(&stage.netlink), before);
        });
    }

    #[test]
    fn changes_that_others_rely_on_or_have_changed_stay() {
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
            desired.push(Desired::lasting(Change::Sysctl(Sysctl {
                path: "net/ipv4/no_such_setting".into(),
                from: String::new(),
                to: "1".into(),
                on: None,
            })));
            let error = host.reconcile(desired).unwrap_err().to_string();
            assert!(error.contains("sysctl net.ipv4.no_such_setting"), "{error}");
            assert!(error.contains("no such setting"), "{error}");
            assert_eq!(host.made(), []);
            drop(tun);
            assert_eq!(snapshot(&stage.netlink), before);
        });
    }

    /// Addresses and a prefix of the loopback interface.
    fn row() -> Vec<Change> {
        let on = crate::kernel::change::Interface {
            index: 1,
            name: "lo".into(),
        };
        let address = |n: u8| {
            Change::Address(crate::kernel::change::QuietAddress {
                on: on.clone(),
                addr: [198, 18, 0, n].into(),
                prefix: 32,
            })
        };
        let mut row: Vec<Change> = (0..40).map(|n| address(2 * n + 1)).collect();
        row.push(Change::LocalPrefix(crate::kernel::change::LocalPrefix {
            on: on.clone(),
            prefix: "198.18.1.0/28".parse().unwrap(),
        }));
        row
    }

    #[test]
    fn a_row_is_made_repaired_and_undone_but_for_what_others_have() {
        in_fresh_namespace(|| {
            let stage = stage();
            let (netlink, row) = (&stage.netlink, row());
            let desired = || row.iter().cloned().map(Desired::lasting).collect();
            let with = Means {
                netlink,
                program: None,
            };
            // Somebody has one of them.
            row[7].make(&with).unwrap();
            let before = snapshot(netlink);
            let mut host = stage.host();
            host.reconcile(desired()).unwrap();
            let ours: Vec<&Change> = row.iter().filter(|change| **change != row[7]).collect();
            assert_eq!(host.made().iter().collect::<Vec<_>>(), ours);
            let made = snapshot(netlink);
            assert!(host.repair().made.is_empty());
            for gone in [&row[3], &row[7], &row[40]] {
                gone.undo(netlink).unwrap();
            }
            let repairs = host.repair();
            assert_eq!(repairs.made, [&row[3], &row[7], &row[40]].map(Clone::clone));
            assert!(repairs.failed.is_empty(), "{repairs:?}");
            assert_eq!(sorted(snapshot(netlink)), sorted(made));
            // What nobody has any more was made here, and goes in the end. A crash changes nothing.
            assert_eq!(host.made().len(), row.len());
            drop(host);
            let mut host = stage.host();
            assert_eq!(host.made().len(), row.len());
            host.reconcile(desired()).unwrap();
            assert_eq!(host.made(), row);
            assert!(host.undo_all().unwrap().left.is_empty());
            let seventh = row[7].present(&There::new(netlink)).unwrap();
            assert!(matches!(seventh, Presence::Absent));
            row[7].make(&with).unwrap();
            assert_eq!(snapshot(netlink), before);
        });
    }

    #[test]
    fn a_row_of_which_one_fails_leaves_nothing_in_the_kernel_or_the_journal() {
        in_fresh_namespace(|| {
            let stage = stage();
            let before = snapshot(&stage.netlink);
            let mut row = row();
            let Change::Address(address) = &mut row[20] else {
                panic!("{:?}", row[20]);
            };
            address.on.index = 4_000;
            let mut host = stage.host();
            let desired = row.into_iter().map(Desired::lasting).collect();
            let error = host.reconcile(desired).unwrap_err().to_string();
            assert!(error.contains("198.18.0.41/32"), "{error}");
            assert_eq!(host.made(), []);
            assert_eq!(snapshot(&stage.netlink), before);
            drop(host);
            assert_eq!(stage.host().made(), []);
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
            // A daemon in another namespace does not collide.
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
            host.reconcile(stage.steer_by_route(&tun)).unwrap();
            let untouched = snapshot(netlink);
            assert!(host.repair().made.is_empty());
            assert_eq!(snapshot(netlink), untouched);

            // A network manager starts, a `sysctl --system`, a TUN that was down for a moment.
            for change in host.made().to_vec() {
                if matches!(change, Change::Rule(_)) {
                    change.undo(netlink).unwrap();
                }
            }
            sysctl("net/ipv4/tcp_fwmark_accept", "0");
            sysctl("net/ipv6/fwmark_reflect", "0");
            netlink.delete_clsact(stage.uplink.index).unwrap();
            set_link_down(netlink, tun.link.index).unwrap();
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
            // A value that somebody set to 0 meanwhile is 0 again in the end, whatever it was at
            // first.
            for line in &mut before {
                if line.starts_with("net/ipv6/fwmark_reflect") {
                    *line = "net/ipv6/fwmark_reflect = \"0\\n\"".into();
                }
            }
            assert_eq!(snapshot(netlink), before);
        });
    }

    /// Another daemon was about to take over, has changed things, and is gone.
    #[test]
    fn what_another_daemon_changed_is_put_back_and_what_fails_stays_wanted() {
        in_fresh_namespace(|| {
            let stage = stage();
            let netlink = &stage.netlink;
            let before = snapshot(netlink);
            let tun = stage.tun();
            let mut host = stage.host();
            host.reconcile(stage.steer_by_route(&tun)).unwrap();
            let ours = sorted(snapshot(netlink));

            let mut other = Host::inherit(&stage.scratch.0, host.lock().unwrap()).unwrap();
            let mut theirs = stage.steer(&tun);
            theirs.extend(row().into_iter().map(Desired::lasting));
            other.reconcile(theirs).unwrap();
            drop(other);
            netlink.delete_clsact(stage.uplink.index).unwrap();
            set_link_down(netlink, tun.link.index).unwrap();

            let (repairs, report) = host.resume();
            assert!(report.unwrap().left.is_empty());
            assert!(!repairs.failed.is_empty());
            let reasons = repairs.failed.iter().map(|failure| &failure.reason);
            assert!(
                reasons.clone().all(|it| it.contains("must be up")),
                "{repairs:?}"
            );
            netlink.set_link_up(tun.link.index).unwrap();
            let repairs = host.repair();
            assert!(repairs.failed.is_empty(), "{repairs:?}");
            assert_eq!(sorted(snapshot(netlink)), ours);

            assert!(host.undo_all().unwrap().left.is_empty());
            drop(tun);
            assert_eq!(sorted(snapshot(netlink)), sorted(before));
        });
    }

    /// Sorts the lines, since an object that was made again may stand elsewhere in a list.
    fn sorted(mut lines: Vec<String>) -> Vec<String> {
        lines.sort();
        lines
    }

    #[test]
    fn one_privilege_is_enough_to_repair_and_to_undo() {
        in_fresh_namespace(|| {
            let stage = stage();
            let before = snapshot(&stage.netlink);
            let tun = stage.tun();
            keep_only(capabilities_of_the_unit());
            let mut host = stage.host();
            host.reconcile(both(&stage, &tun)).unwrap();
            // The daemon keeps this once it has started: it can attach programs, but not load them.
            keep_only(CapabilitySet::NET_ADMIN);
            let refused = Steering::new(&stage.netlink, &[], 51820, 1000, &[]);
            assert!(refused.is_err());
            stage.netlink.delete_clsact(stage.uplink.index).unwrap();
            sysctl("net/ipv4/tcp_fwmark_accept", "0");
            let repairs = host.repair();
            assert!(repairs.failed.is_empty(), "{repairs:?}");
            let made: Vec<_> = repairs.made.iter().map(Change::to_string).collect();
            for kind in ["qdisc clsact", "filter on up.0", "sysctl"] {
                assert!(made.iter().any(|line| line.starts_with(kind)), "{made:?}");
            }
            let report = host.undo_all().unwrap();
            assert!(report.left.is_empty(), "{report:?}");
            drop(tun);
            assert_eq!(snapshot(&stage.netlink), before);
        });
    }

    #[test]
    fn a_vanished_interface_is_named() {
        in_fresh_namespace(|| {
            let stage = stage();
            let tun = stage.tun();
            let desired = stage.capture(&tun);
            delete_link(&stage.netlink, stage.uplink.index).unwrap();
            let error = stage.host().reconcile(desired).unwrap_err().to_string();
            assert!(
                error.contains("up.0") && error.contains("interface is gone"),
                "{error}"
            );
        });
    }
}
