//! The encrypted channel between two servers: layouts, keys, replay window, state machine
//! (`contrib/protocol.md` has every byte of it).

pub mod parts;
pub mod pmtu;
pub mod replay;
pub mod session;
pub mod tunnel;
pub mod wire;
