//! Serve an address that has moved to another server. `README.md` says what it does; this page
//! shows how the code is laid out.
//!
//! # The journey of a packet
//!
//! ```text
//!            A, the old server                           B, the new server
//!
//! client ──► uplink ──► TUN ──► check,      UDP   open,     ──► translate ──► TUN ──► application
//!            capture            segment,  ══════► coalesce
//!                               seal
//!
//! client ◄── uplink ◄── TUN ◄── check,      UDP   segment,  ◄── translate ◄── TUN ◄── application
//!            return path        coalesce, ◄══════ seal
//!                               open
//! ```
//!
//! Both servers run the same two loops, outbound and inbound ([`lane`]); [`flow::role`] makes the
//! difference: A only checks a packet, B translates it. A packet that is too big for one datagram
//! is split over several, and reassembled at the other end.
//!
//! A lane is one TUN queue, one UDP socket and the thread that serves both. A helper thread takes
//! over the inbound loop while one thread is not enough.
//!
//! `ipmoved nat` has neither B nor a tunnel: one loop on A translates both addresses
//! ([`lane::nat`]).
//!
//! # The folders
//!
//! Each folder uses those above it in this table, and none below; only the unit tests of `kernel`
//! also stand on the namespaces of `lab`.
//!
//! | folder | owns |
//! |---|---|
//! | [`model`] | what all share: what moved, peers, drop reasons, what `status` says |
//! | [`packet`] | IP packets: checked once, segmented and coalesced, rewritten; ICMP errors |
//! | [`flow`] | which flow a packet belongs to, and what becomes of it in each role |
//! | [`channel`] | the encrypted channel (`contrib/protocol.md`): messages, keys, state machine |
//! | [`io`] | the TUN queue, the UDP socket, the batch sent in one call, randomness |
//! | [`settings`] | what was typed, and what it means |
//! | [`stragglers`] | who still comes to what has moved: the database, and what follows from it |
//! | [`kernel`] | every change of the host's network, recorded and undone |
//! | [`lane`] | the loops that carry packets, and what they share with the control task |
//! | [`daemon`] | the process: set-up, what it decides, control task, status, privileges |
//! | [`lab`] | throwaway namespaces for the demo, the tests and the benches |
//! | [`command`] | the subcommands, what is printed, and exit codes |
//!
//! `model`, `packet`, `flow` and `channel` do no I/O and read neither a clock nor randomness;
//! `clippy.toml` holds them to it. `testing` is what unit tests and fuzzers share.

pub(crate) mod channel;
pub mod command;
pub(crate) mod daemon;
pub(crate) mod flow;
pub(crate) mod io;
pub(crate) mod kernel;
pub mod lab;
pub(crate) mod lane;
pub(crate) mod model;
pub(crate) mod packet;
pub(crate) mod settings;
pub(crate) mod stragglers;
#[cfg(any(test, fuzzing))]
pub mod testing;

/// What the namespace tests and the benches use of the crate's inside. Nobody else should: the
/// modules are private, so that the compiler finds what no longer has a user.
#[doc(hidden)]
pub mod internals {
    pub use crate::channel::session::{
        Cipher, CipherPolicy, MacCheck, Offer, OpenBatch, PeerKeys, Psk, Session, SessionIndexes,
    };
    pub use crate::channel::tunnel::{Announcement, Deliver, Event, Timers, Tunnel, TunnelConfig};
    pub use crate::channel::wire::{DATA_HEADER_LEN, DATA_OVERHEAD, Flags, Message};
    pub use crate::flow::class::TCP_RESET;
    pub use crate::flow::ended::HostFlow;
    pub use crate::flow::fairness::Limit;
    pub use crate::flow::gate::{Gate, GateConfig};
    pub use crate::flow::nat::PORTS;
    pub use crate::flow::routes::Delivery;
    pub use crate::flow::seed::Seed;
    pub use crate::flow::table::{FlowTable, Inside, Outside};
    pub use crate::flow::translate::{Translator, TranslatorConfig};
    pub use crate::io::batch::{Destination, SendBatch};
    pub use crate::io::entropy;
    pub use crate::io::tun::{MAX_FRAME, TunOptions, TunQueue};
    pub use crate::kernel::netlink::{Address, Direction, FilterSlot, Netlink, Route};
    pub use crate::model::drops::DropReason;
    pub use crate::model::moved::{Move, TCP};
    pub use crate::model::peer::{Endpoint, PeerId, Role};
    pub use crate::packet::coalesce::{Coalescer, MAX_PARTS, Push, Reach};
    pub use crate::packet::fragment::{Client, HeldFragments, Key as FragmentKey, Overlaps};
    pub use crate::packet::segment::Segments;
    pub use crate::packet::vnet::{GSO_TCPV4, NEEDS_CSUM, Offload, VnetHdr};
    pub use crate::packet::{ACK, Parsed, RST};
    pub use crate::settings::values::DEFAULT_PORT;
}
