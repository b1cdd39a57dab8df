//! What the daemon gives up once it no longer needs it: copies of the key, privileges, system
//! calls, files. Whoever takes the daemon over through a bug in it finds little to work with.
//!
//! ```text
//!   command_line   the key, where the kernel shows it to others
//!   files          what it can still open, and whom it can still reach (Landlock)
//!   calls          the system calls that it can no longer make (seccomp)
//!   this file      privileges, and the order of it all
//! ```
//!
//! Owns nothing that the daemon needs to work: where the kernel cannot do one of these, the daemon
//! says so, in its log and in `status`, and goes on.

mod calls;
mod command_line;
mod files;

use rustix::process::DumpableBehavior;
use rustix::thread::{CapabilitySet, CapabilitySets};

pub use command_line::forget_command_line;
use files::Anchors;
pub use files::Needs;

/// The privileges that the daemon needs after its start: it changes links and undoes its routes,
/// rules and filters; and it keeps the memory of its programs, for which kernels before 5.19 want
/// `CAP_BPF`. Before it gives up the others, it loads programs and makes the device.
const NEEDED: CapabilitySet = CapabilitySet::NET_ADMIN.union(CapabilitySet::BPF);

/// The highest capability there is (`CAP_CHECKPOINT_RESTORE`).
const LAST_CAPABILITY: u32 = 40;

/// What is to be kept as long as the daemon runs.
#[derive(Debug)]
pub struct Confinement {
    /// What could not be given up, and why, a sentence each.
    pub lacking: Vec<String>,
    _anchors: Anchors,
}

/// Gives up every privilege but those in `NEEDED`, every means to gain new ones, core dumps, the
/// files beyond what it needs, and the system calls that lead out of it.
///
/// It holds for the calling thread and for those that it starts, so call it while there is one.
#[must_use = "it holds as long as this value lives"]
pub fn confine(needs: Needs<'_>) -> Confinement {
    let mut lacking = Vec::new();
    let mut note = |what: &str, result: Result<(), String>| {
        if let Err(error) = result {
            lacking.push(format!(
                "whoever takes this daemon over has {what}: {error}"
            ));
        }
    };
    let kernel = |result: rustix::io::Result<()>| result.map_err(|error| error.to_string());
    // A dump of this process would hold the keys of every session.
    let no_dump = rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable);
    note("its core dumps", kernel(no_dump));
    let stuck = rustix::thread::set_no_new_privs(true);
    note("the privileges of what it executes", kernel(stuck));
    note("root's privileges", kernel(drop_capabilities()));
    let mut anchors = Anchors::default();
    let closed = files::close(needs).map(|closed| anchors = closed);
    note("every file of root's", closed);
    // Last, since it is the one that could keep the others from working.
    note("every system call", calls::forbid());
    Confinement {
        lacking,
        _anchors: anchors,
    }
}

fn drop_capabilities() -> rustix::io::Result<()> {
    for number in 0..=LAST_CAPABILITY {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if !NEEDED.contains(capability) {
            // This fails for capabilities that the kernel does not know, and without CAP_SETPCAP.
            // Nothing can be regained from the set then either, since nothing can be executed.
            let _ = rustix::thread::remove_capability_from_bounding_set(capability);
        }
    }
    let held = rustix::thread::capabilities(None)?.permitted;
    rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: held & NEEDED,
            permitted: held & NEEDED,
            inheritable: CapabilitySet::empty(),
        },
    )
}
