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
#[cfg(any(test, fuzzing))]
pub mod testing;

/// What the namespace tests and the benches take from inside the house. It is nobody else's: the
/// rooms are the crate's own, so that the compiler says what no longer has a user.
#[doc(hidden)]
pub mod internals {
    pub use crate::channel::session::{
        Cipher, CipherPolicy, Entropy, MacCheck, Offer, OpenBatch, PeerKeys, Psk, Session,
        SessionIndexes,
    };
    pub use crate::channel::tunnel::{Announcement, Deliver, Event, Timers, Tunnel, TunnelConfig};
    pub use crate::channel::wire::{DATA_HEADER_LEN, DATA_OVERHEAD, Flags, Message};
    pub use crate::flow::class::TCP_RESET;
    pub use crate::flow::gate::Gate;
    pub use crate::flow::nat::PORTS;
    pub use crate::flow::routes::Delivery;
    pub use crate::flow::seed::Seed;
    pub use crate::flow::table::{AddrId, FlowTable, Inside, Limit, Outside};
    pub use crate::flow::translate::{Translator, TranslatorConfig};
    pub use crate::io::batch::{Destination, SendBatch};
    pub use crate::io::entropy;
    pub use crate::io::tun::{MAX_FRAME, TunOptions, TunQueue};
    pub use crate::kernel::netlink::{Address, Netlink, Route};
    pub use crate::model::drops::DropReason;
    pub use crate::model::moved::{Move, TCP};
    pub use crate::model::peer::{Endpoint, PeerId, Role};
    pub use crate::packet::coalesce::{Coalescer, MAX_PARTS, Push, Reach};
    pub use crate::packet::segment::Segments;
    pub use crate::packet::vnet::{GSO_TCPV4, NEEDS_CSUM, Offload, VnetHdr};
    pub use crate::packet::{ACK, Parsed, RST};
    pub use crate::settings::values::DEFAULT_PORT;
}
