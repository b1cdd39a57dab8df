//! The words that all folders share: what moved, who is at the other end, why a packet was dropped,
//! what the daemon says of itself, and where its files lie.

pub mod budget;
pub mod drops;
pub mod moved;
pub mod peer;
pub mod port_map;
pub mod runtime;
pub mod status;
