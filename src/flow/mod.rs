//! Which flow a packet belongs to, and what becomes of it in each role.
//!
//! | file | owns |
//! |---|---|
//! | [`ownership`] | whose a captured packet is |
//! | [`gate`] | the old server's checks: what may pass |
//! | `clients` | which clients came, for those checks |
//! | `allowed` | what the new server may begin, for those checks |
//! | [`role`] | what the server's role makes of a packet |
//! | [`translate`], [`routes`] | the new server's rewriting, and what is configured for it |
//! | `hairpin` | the moved address called from this host, and from those behind it |
//! | [`outgoing`] | connections that begin on the new server |
//! | [`nat`] | both addresses rewritten, on the old server alone |
//! | [`table`] | the flows, found from either side |
//! | [`tally`] | how many conversations each move has |
//! | [`class`] | how long a flow is kept, and which gives way first |
//! | [`fairness`] | who gives way when flows or ports run out |
//! | [`modes`] | on the old server: whose a conversation is that nobody knows |
//! | [`watch`] | which of the newest conversations were answered |
//! | [`turned`] | which of them this server's daemon turned away |
//! | [`hold`] | first packets that wait for the end of a hold |
//! | `shield` | refusals that are kept from clients while a cut-over is watched |
//! | `visits` | which clients still come, and what is known of their conversations |
//! | [`served_here`] | the same of those whom the old server serves itself |
//! | [`ended`] | flows that ended, until somebody takes note |
//! | `slab` | entries by number, and lists through them |
//! | [`fragments`] | what the first fragment of a packet told, for the later ones |
//! | [`seed`] | the secret of the hashes |
//!
//! Must not touch sockets, devices or the clock.

mod allowed;
pub mod class;
mod clients;
pub mod ended;
pub mod fairness;
pub mod fragments;
pub mod gate;
mod hairpin;
pub mod hold;
pub mod listing;
pub mod modes;
pub mod nat;
pub mod networks;
pub mod outgoing;
pub mod ownership;
mod records;
pub mod role;
pub mod routes;
pub mod seed;
pub mod served_here;
mod shield;
mod slab;
pub mod table;
pub mod tally;
#[cfg(test)]
mod testing;
pub mod translate;
pub mod turned;
mod visits;
pub mod watch;
pub mod weight;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks a mutex even if a thread has panicked with it: what it guards is whole between any two
/// calls.
#[inline]
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
