//! The edge to the kernel's data path: one TUN queue and one UDP socket per lane.
//!
//! Owns system calls on these two, the detection of what they can do, and the batch that one of
//! them sends. Knows nothing of packets' contents, sessions or flows: it imports from `model`
//! alone, and is told the two numbers by which datagrams are given to their lanes
//! ([`udp::LaneField`]).

#![expect(
    clippy::disallowed_methods,
    reason = "an edge: it opens sockets and draws randomness"
)]

pub mod batch;
pub mod entropy;
pub mod tun;
pub mod udp;
