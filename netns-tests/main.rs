//! Tests on real kernels with real sockets: client, router, old and new server in namespaces.
//!
//! ```text
//!                                        ┌── old server 192.0.2.1, holds 192.0.2.5 (moved)
//!  clients 203.0.113.10, .11 ── router ──┤              ║ tunnel
//!                                        └── new server 198.51.100.2, runs the application
//! ```
//!
//! Each test builds a lab of its own, so they run side by side. Needs root; says so and fails without.

mod bad_input;
mod demo;
mod privacy;
mod restart;
mod serving;
mod stage;
mod status;
mod the_lab;
mod undo;
mod ways;
