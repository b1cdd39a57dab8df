//! The edge to the kernel's data path: one TUN queue and one UDP socket per lane.
//!
//! Owns system calls on these two, the detection of what they can do, the batch that the socket
//! sends, the system's randomness, and the words for who lacks a privilege. Knows nothing of
//! packets' contents, sessions or flows: its data path imports from `model` alone, and is given the
//! two numbers by which datagrams find their lanes ([`udp::LaneField`]).

#![expect(
    clippy::disallowed_methods,
    reason = "an edge: it opens sockets and draws randomness"
)]

pub mod batch;
pub mod entropy;
pub mod privileges;
pub mod tun;
pub mod udp;
