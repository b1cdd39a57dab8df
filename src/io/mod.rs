//! The edge to the kernel's data path: one TUN queue and one UDP socket per lane.
//!
//! Owns system calls on these two and the detection of what they can do. Knows nothing of packets'
//! contents, sessions or flows.

#![expect(
    clippy::disallowed_methods,
    reason = "an edge: it opens sockets and draws randomness"
)]

pub mod batch;
pub mod entropy;
pub mod tun;
pub mod udp;
