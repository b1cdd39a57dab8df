//! The programs that stand at the interfaces, generated for the addresses and ports at hand.
//!
//! ```text
//!            old server                                      new server
//!   uplink ingress ── capture ──► TUN              TUN ingress ── steer_ingress ──► stack (marked)
//!   TUN ingress ── return_path ──► uplink          uplink egress ── steer_egress ──► TUN
//!                   └─ bounced: uplink ingress, past capture
//!
//!            old server alone (it translates both addresses)
//!   uplink ingress ── capture, answers ──► TUN
//!   TUN ingress ── way_out ──► uplinks, or back into this host's own stack
//! ```
//!
//! One program a file, with a sketch of it in C at its head. A new one is a new file, and a line
//! each in this one and in the test of what the kernel takes below. What they share:
//!
//! ```text
//!   headers   where the fields lie that are read
//!   phrases   what several programs say alike, and the registers that have names
//!   flows     the maps of the steering programs
//! ```
//!
//! Owns what each program decides about a packet. Attaching them is the business of
//! [`plan`](super::plan).
//!
//! All packet reads go through `LD_ABS`/`LD_IND`, which reach into non-linear packets and let a
//! packet pass that ends too early. A packet that is none of a program's business costs a handful
//! of loads and one comparison per moved address: 40 to 50 ns as BPF_PROG_TEST_RUN counts, on the
//! machine of the design's measurements; a UDP packet on the new server costs 200 ns.
//!
//! Size: at most [`MAX_MOVES`](crate::model::moved::MAX_MOVES) addresses are compared one by one
//! (the verifier gives up at 8,192 open branches, and at a million instructions looked at; 64 moves
//! of 64 ranges each are 11,500 instructions, of which it looks at 50,000).

mod answers;
mod capture;
mod flows;
mod headers;
mod phrases;
mod return_path;
mod steer_egress;
mod steer_ingress;
#[cfg(test)]
mod testing;
mod way_out;

pub use answers::{Pair, answers};
pub use capture::capture;
pub use flows::{FlowMaps, MAX_FRAGMENTED};
pub use return_path::return_path;
pub use steer_egress::{REPLY_IDLE, steer_egress};
pub use steer_ingress::{Entrance, steer_ingress};
pub use way_out::{Way, way_out};

/// Start of the names of all programs, by which the daemon recognises its own filters.
pub const NAME_PREFIX: &str = "ipmoved_";
