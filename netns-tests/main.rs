//! Tests on real kernels with real sockets: client, router, old and new server in namespaces.
//!
//! ```text
//!                                        ┌── old server 192.0.2.1, holds 192.0.2.5 (moved)
//!  clients 203.0.113.10, .11 ── router ──┤              ║ tunnel
//!                                        └── new server 198.51.100.2, runs the application
//! ```
//!
//! Each test builds a lab of its own, so they run side by side. The tests need root, and one of
//! them two processors. Without these they fail and say so.

#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "tests on real kernels read the real clock, and print what they measured"
)]

mod accept;
mod apart;
mod attack;
mod bad_input;
mod bad_new_server;
mod bad_packets;
mod behind_dnat;
mod check;
mod check_bench;
mod check_peer;
mod confined;
mod demo;
mod dimensions;
mod dry_run;
mod each_state;
mod endpoints;
#[cfg(target_arch = "x86_64")]
mod entered;
mod flood;
mod follow;
mod fragments;
mod hairpin;
mod handed_on;
mod hold;
mod hops;
mod impostor;
mod independent_peer;
mod ipv6;
mod lanes;
mod last_word;
mod links;
mod modes;
mod modes_of_a_move;
mod mtu;
mod on_path;
mod others_rules;
mod outgoing;
mod own;
mod prefixes;
mod privacy;
mod progress;
mod protocol_text;
mod protocols;
mod reboot;
mod rekey;
mod relay;
mod reload;
mod restart;
mod seeing;
mod service_manager;
mod serving;
mod several;
mod several_new;
mod silence;
mod silence_lasts;
mod stage;
mod status;
mod steering;
mod stragglers;
mod stream;
mod systemd;
mod takeover;
mod the_cutover;
mod the_lab;
mod the_move;
mod tracee;
mod undo;
mod unread;
mod ways_back;
