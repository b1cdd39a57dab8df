//! A BPF program as a direct-action filter on a clsact qdisc.
//!
//! We know a filter by the name of its program. The kernel replaces one that an earlier daemon left
//! in one step, so every packet meets either the old program or the new one.

use std::fmt;
use std::os::fd::BorrowedFd;

use serde::{Deserialize, Serialize};

use super::{ChangeError, Interface, Kind, Means, Presence, There, Undone, typed};
use crate::kernel::netlink::{Direction, FilterSlot, Netlink};
use crate::kernel::programs::NAME_PREFIX;

/// `ETH_P_ALL`: the filter sees every protocol.
const ALL_PROTOCOLS: u16 = libc::ETH_P_ALL as u16;

/// Where a program would be pinned, if it were: the file system for that.
const PINNED: &str = "/sys/fs/bpf";

/// A program on one side of an interface.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BpfFilter {
    /// The interface.
    pub on: Interface,
    /// Its side.
    pub direction: Direction,
    /// Preference; the lower runs first.
    pub priority: u16,
    /// Handle within the preference.
    pub handle: u32,
    /// Name of the program.
    pub program: String,
}

impl BpfFilter {
    fn slot(&self) -> FilterSlot {
        FilterSlot {
            index: self.on.index,
            direction: self.direction,
            priority: self.priority,
            handle: self.handle,
        }
    }
}

impl BpfFilter {
    /// The place as tc takes it. `action` is what to do with it.
    fn in_tc(&self, action: &str) -> String {
        let Self {
            on,
            direction,
            priority,
            handle,
            program: _,
        } = self;
        let dev = typed(&on.name);
        format!(
            "tc filter {action} dev {dev} {direction} protocol all pref {priority} \
             handle {handle:#x} bpf"
        )
    }

    /// The same with the program, which lies in no file: a path stands for it.
    fn with_program(&self, action: &str) -> String {
        let place = self.in_tc(action);
        format!(
            "{place} direct-action object-pinned {PINNED}/{}",
            self.program
        )
    }
}

impl fmt::Display for BpfFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            on,
            direction,
            priority,
            handle,
            program,
        } = self;
        write!(
            f,
            "filter on {} {direction} pref {priority} handle {handle:#x}: bpf {program}",
            on.name
        )
    }
}

impl Kind for BpfFilter {
    fn object(&self) -> String {
        format!(
            "filter {} {} {}",
            self.on.index, self.direction, self.program
        )
    }

    fn to_make(&self) -> String {
        self.with_program("add")
    }

    fn to_renew(&self) -> Option<String> {
        Some(self.with_program("replace"))
    }

    fn to_undo(&self) -> String {
        self.in_tc("del")
    }

    fn place(&self) -> Option<(u16, u32)> {
        Some((self.priority, self.handle))
    }

    fn check(&self) -> Result<(), String> {
        self.on.check()?;
        let name = self.program.strip_prefix(NAME_PREFIX);
        let is_ours = |name: &str| name.bytes().all(|c| c.is_ascii_lowercase() || c == b'_');
        if name.is_some_and(is_ours) {
            Ok(())
        } else {
            Err(format!("{:?} is no program of ipmoved", self.program))
        }
    }

    fn is_unmistakable(&self) -> bool {
        true
    }

    fn present(&self, there: &There<'_>) -> Result<Presence, ChangeError> {
        let priority = self.priority;
        let filters = there.netlink.filters(self.on.index, self.direction)?;
        let mut here = filters.iter().filter(|filter| filter.priority == priority);
        let mut others = here.clone();
        if let Some(other) = others.find(|f| f.kind != "bpf" || f.protocol != ALL_PROTOCOLS) {
            return Ok(Presence::Foreign(format!(
                "pref {priority} is taken by a {} filter that is not ipmoved's; move that one",
                other.kind
            )));
        }
        Ok(match here.find(|filter| filter.handle == self.handle) {
            None => Presence::Absent,
            Some(filter) if filter.name.as_deref() == Some(&self.program) => Presence::AsWanted,
            Some(filter) => Presence::Foreign(match filter.name.as_deref() {
                Some(name) if name.starts_with(NAME_PREFIX) => format!(
                    "its place is taken by bpf {name}, which another ipmoved has left; run: \
                     ipmoved cleanup"
                ),
                name => format!(
                    "its place is taken by bpf {}; move that one",
                    name.unwrap_or("(without a name)")
                ),
            }),
        })
    }

    fn make(&self, with: &Means<'_>) -> Result<(), ChangeError> {
        let program = loaded(with)?;
        Ok(with
            .netlink
            .add_filter(self.slot(), program, &self.program)?)
    }

    fn renew(&self, with: &Means<'_>) -> Result<(), ChangeError> {
        let (slot, program) = (self.slot(), loaded(with)?);
        Ok(with.netlink.replace_filter(slot, program, &self.program)?)
    }

    /// Whatever else stands in its place by now is not ours to remove.
    fn undo(&self, netlink: &Netlink) -> Result<Undone, ChangeError> {
        match self.present(&There::new(netlink))? {
            Presence::AsWanted => netlink.delete_filter(self.slot())?,
            Presence::Absent | Presence::Foreign(_) => {}
        }
        Ok(Undone::Gone)
    }

    fn remedy(&self, error: &ChangeError) -> Option<&'static str> {
        error
            .is_unsupported()
            .then_some("the kernel needs CONFIG_NET_CLS_BPF (module cls_bpf)")
    }
}

fn loaded<'a>(with: &Means<'a>) -> Result<BorrowedFd<'a>, ChangeError> {
    with.program.ok_or(ChangeError::NoProgram)
}
