//! Serve an address that has moved to another server: `README.md` says what it does, this page what
//! the house looks like inside.
//!
//! # The journey of a packet
//!
//! ```text
//! client ──► A: uplink ingress ─capture─► TUN ─► [segment, seal] ─► UDP ══► B: [open, join] ─► translate ─► TUN ─► application
//! client ◄── A: uplink ◄─return path──── TUN ◄─ [open, join] ◄──── UDP ◄══ B: [segment, seal] ◄─ translate ◄─ TUN ◄─ application
//! ```
//!
//! A is the old server, B the new one. Both run the same two straight loops ([`lane`]); on A
//! `translate` only checks. A lane is one TUN queue, one UDP socket and the thread that serves both; a second
//! thread helps it out while one is not enough.
//!
//! # The rooms
//!
//! A folder is a floor; each uses those above it in this table, and none below.
//!
//! | folder | owns |
//! |---|---|
//! | [`model`] | the words that all rooms share: what moved, who is at the other end, why a packet was dropped, what `status` says |
//! | [`packet`] | IP packets: checked once, cut and joined, rewritten, answered |
//! | [`flow`] | which flow a packet belongs to, and what becomes of it |
//! | [`channel`] | the encrypted channel: layouts, keys, window, state machine (`contrib/protocol.md`) |
//! | [`io`] | the TUN queue, the UDP socket, and the batch that is sent in one call |
//! | [`settings`] | what was typed, and what it means |
//! | [`kernel`] | every change of the host's network, recorded and undone |
//! | [`lane`] | the two loops that carry packets, and what they share with the control task |
//! | [`daemon`] | the process: set-up, what it decides, control task, privileges |
//! | [`lab`] | throwaway namespaces for the demo, the tests and the benches |
//! | [`command`] | what is printed |
//!
//! `model`, `packet`, `flow` and `channel` do no I/O and read neither a clock nor randomness;
//! `clippy.toml` holds them to it.

pub mod channel;
pub mod command;
pub mod daemon;
pub mod flow;
pub mod io;
pub mod kernel;
pub mod lab;
pub mod lane;
pub mod model;
pub mod packet;
pub mod settings;
#[cfg(any(test, fuzzing))]
pub mod testing;
