//! The daemon: checks, sets up, runs, and leaves the host as it was.
//!
//! ```text
//!   setup ──► host checked, sockets and TUN open, kernel changed (journaled)
//!     │
//!     ├──► lanes: one thread each, or two, carrying packets    (lane)
//!     │       │ handshakes, control messages     ▲ sessions, endpoints
//!     │       ▼                                  │
//!     └──► control: one thread, everything else; it asks
//!             the tunnels   how to reach a peer                (channel)
//!             the policy    what to do                         (policy)
//! ```
//!
//! `facts` is what the new server reads of itself for the policy, and `follow` keeps up with links,
//! addresses and routes that change; `held` is which moved addresses the old server has, and
//! `delivered` where the new one delivered last. `orders` is what commands ask of the old server
//! over the `control_socket`; `keeper` and `state_dir` keep what comes of it, and `asks` asks the
//! new server for a cut-over.
//!
//! `handover` is how one daemon takes over from another, and `kept` what a service manager keeps
//! for the next one; `descriptors` go from one process to another.
//!
//! `their_modes` is which mode each move is in, as the new server hears. `gates` makes the old
//! server's gates of the settings, and `before_ours` is what is said of filters of others.
//!
//! `forge` is the process that keeps the privileges, for a configuration that has changed.
//!
//! `progress` is how far each move has come, and `silence` what is not answered. `checks` is
//! whether it will work on this server, and `login` the session that a command is given from.
//!
//! `ways_back` is which way replies leave where routing rules go by marks.
//!
//! `visitors` hands over who comes to be recorded (stragglers).
//!
//! `dry_run` tells what a start would change, and changes nothing.
//! `viewers` are those who look at it from outside: at its `flows`, and at its `metrics`.
//!
//! `nat` is the daemon of the mode without a tunnel. Both use `service` (signals, service manager,
//! threads, undo, errors), `watchdog` (whether all is well), `warnings` and `report` (what `ipmoved
//! status` is told), `status_socket` (how it is told), and `confine` (what they give up).
//!
//! Owns the order of things. What is changed in the kernel is `kernel`'s business, what a packet
//! goes through is `lane`'s, and neither knows of the daemon.

#![expect(
    clippy::disallowed_methods,
    reason = "an edge: the process reads clocks, files and its environment"
)]

mod asks;
mod before_ours;
mod causes;
pub mod checks;
mod chosen;
pub mod confine;
mod control;
pub mod control_socket;
mod delivered;
mod descriptors;
mod dry_run;
mod early;
mod facts;
pub mod flows;
mod follow;
mod forge;
mod gates;
mod handover;
mod held;
mod keeper;
mod kept;
pub mod log;
pub mod login;
mod metrics;
mod nat;
mod orders;
mod policy;
mod progress;
mod report;
mod service;
mod setup;
mod silence;
mod state_dir;
pub mod status_socket;
mod their_modes;
mod viewers;
mod visitors;
mod warnings;
mod watchdog;
mod ways_back;

use std::path::Path;

use self::checks::Words;
use self::forge::Forge;
use self::orders::Orders;
use crate::model::peer::PeerId;
use crate::settings::config::Config;
use crate::settings::values::PeerAddr;

pub use dry_run::{DryRun, dry_run};
pub use handover::giving::{HandoverError, store};
pub use nat::{dry_run as dry_run_nat, run as run_nat};
#[cfg(any(test, fuzzing))]
pub use policy::reload::check_reloads;
pub use service::DaemonError;

/// Runs until a signal ends it, and undoes everything then; or until another daemon takes over.
/// With `takeover`, it takes over itself from the one that runs, if any does.
///
/// # Errors
/// See [`DaemonError`]; kernel changes of this run are undone, unless a thread crashed.
pub fn run(mut config: Config, runtime_dir: &Path, takeover: bool) -> Result<(), DaemonError> {
    service::block_on(async {
        let mut ready = setup::Ready::new(&mut config, runtime_dir, takeover)?;
        // Before the daemon gives up what this keeps.
        let (programs, tun) = (ready.tools.follower.programs(), &ready.tools.tun);
        let forge = Forge::start(&config, programs, tun, ready.tools.inheritance.as_mut());
        let endpoints = config
            .peers
            .iter()
            .filter_map(|peer| peer.endpoint.as_ref());
        // Before the daemon may no longer look at the firewall.
        if let Some(found) = ready.tools.checked.take() {
            config.warnings.extend(found);
        } else if ready.tools.awaited.is_none() || ready.tools.follower.leads_out() {
            let words = Words::of_this_process();
            let uplinks = ready.tools.follower.uplinks();
            let found = checks::at_start(&config, &words, &ready.tools.endpoints, uplinks);
            config.warnings.extend(found);
        }
        // Before the first thread starts: later threads inherit what this one gives up.
        let confinement = confine::confine(confine::Needs {
            runtime_dir: ready.host.dir(),
            names: endpoints.clone().any(PeerAddr::is_name),
            state_dir: ready.tools.orders.as_ref().map(Orders::dir),
        });
        config.warnings.extend_from_slice(&confinement.lacking);
        let _log = log::queue();
        control::run(config, ready, forge).await
    })
}

/// A peer's place in a list that has one entry for each peer.
fn index(peer: PeerId) -> usize {
    usize::from(peer.0)
}
