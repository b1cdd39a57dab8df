//! A rehearsal: what would be changed, and how it would be undone, as commands that a person could
//! type.
//!
//! Owns the record. [`Host`](super::Host) decides what would be done as it does for the kernel, and
//! [`change`](super::change) knows the commands.

use std::cell::RefCell;

use serde::Serialize;

use super::change::Change;

/// One thing that would be done.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Step {
    /// What it is, as people write it.
    pub change: String,
    /// The command that would do the same.
    pub command: String,
    /// What the command cannot say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<&'static str>,
}

impl Step {
    /// A step that needs no note.
    pub fn new(change: impl ToString, command: String) -> Self {
        Self {
            change: change.to_string(),
            command,
            note: None,
        }
    }
}

/// The program of a filter is no file that tc could load.
const IN_MEMORY: &str = "the program lies in no file: a path stands for what ipmoved has in memory";

/// The daemon itself takes care of them.
const BY_HAND: &str = "by hand, this one removes IPv6 default routes learnt from routers; ipmoved \
                       keeps them";

/// What would have been done so far.
#[derive(Debug, Default)]
pub(super) struct Rehearsal {
    /// What was not told yet; a change that would be made is there itself, too.
    steps: RefCell<Vec<(Step, Option<Change>)>>,
    /// What would be there by now.
    made: RefCell<Vec<Change>>,
}

impl Rehearsal {
    /// It would be made, or brought up to date if it is `present`.
    pub(super) fn make(&self, change: &Change, present: bool) {
        let command = if present {
            change.to_renew()
        } else {
            Some(change.to_make())
        };
        if let Some(command) = command {
            let note = if matches!(change, Change::Filter(_)) {
                Some(IN_MEMORY)
            } else {
                change.takes_routes_by_hand().then_some(BY_HAND)
            };
            let step = Step {
                note,
                ..Step::new(change, command)
            };
            self.steps.borrow_mut().push((step, Some(change.clone())));
        }
        self.made.borrow_mut().push(change.clone());
    }

    /// Whether it would be there by now, though it is not.
    pub(super) fn has(&self, change: &Change) -> bool {
        self.made.borrow().contains(change)
    }

    /// It would be undone.
    pub(super) fn undo(&self, change: &Change) {
        self.made.borrow_mut().retain(|made| made != change);
        let step = Step::new(change, change.to_undo());
        self.steps.borrow_mut().push((step, None));
    }

    /// It would not be made after all.
    pub(super) fn forget(&self, change: &Change) {
        self.made.borrow_mut().retain(|made| made != change);
        let mut steps = self.steps.borrow_mut();
        steps.retain(|(_, made)| made.as_ref() != Some(change));
    }

    /// What would have been done since the last call, in order.
    pub(super) fn take(&self) -> Vec<Step> {
        let steps = self.steps.borrow_mut().drain(..).collect::<Vec<_>>();
        steps.into_iter().map(|(step, _)| step).collect()
    }
}
