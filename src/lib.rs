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
//! | room | owns |
//! |---|---|
//! | [`cli`], [`config`], [`command`] | what was typed, what it means, what is printed |
//! | [`moved`], [`peer`], [`drops`] | the words that all rooms share |
//! | [`packet`], [`offload`], [`ecn`], [`icmp`], [`answer`], [`fragment`], [`pieces`] | IP packets: checked once, cut and joined, rewritten, answered |
//! | [`flow`], [`translate`], [`nat`] | which flow a packet belongs to, and what becomes of it |
//! | [`wire`], [`session`], [`replay`], [`tunnel`], [`pmtu`] | the channel: layouts, keys, window, state machine (`contrib/protocol.md`) |
//! | [`join`], [`batch`] | packets in several datagrams, datagrams in one send |
//! | [`io`] | the TUN queue and the UDP socket |
//! | [`kernel`] | every change of the host's network, recorded and undone |
//! | [`confine`] | what the process gives up: privileges, system calls, copies of keys |
//! | [`lane`], [`shared`], [`daemon`], [`status`] | the loops, what they share with the control task, and the rest of the daemon |
//! | [`lab`] | throwaway namespaces for the demo, the tests and the benches |
//!
//! The core (everything but `io`, `kernel`, `lane`, `daemon`, `lab`) does no I/O and reads no clock.

pub mod answer;
pub mod batch;
pub mod cli;
pub mod command;
pub mod config;
pub mod confine;
pub mod daemon;
pub mod drops;
pub mod ecn;
pub mod flow;
pub mod fragment;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod icmp;
pub mod io;
pub mod join;
pub mod kernel;
pub mod lab;
pub mod lane;
pub mod moved;
pub mod nat;
pub mod offload;
pub mod packet;
pub mod peer;
pub mod pieces;
pub mod pmtu;
pub mod replay;
pub mod session;
pub mod shared;
pub mod status;
pub mod translate;
pub mod tunnel;
pub mod wire;
