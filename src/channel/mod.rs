//! The encrypted channel between two servers: layouts, keys, replay window, state machine
//! (`contrib/protocol.md` has every byte of it).
//!
//! | file | owns |
//! |---|---|
//! | [`wire`] | what a datagram looks like |
//! | [`session`] | handshake, keys, sealing and opening |
//! | [`replay`] | which datagrams came before |
//! | [`parts`] | packets that were split over several datagrams |
//! | [`pmtu`] | how large a datagram may be |
//! | [`tunnel`] | the state machine of one peer |

pub mod parts;
pub mod pmtu;
pub mod replay;
pub mod session;
pub mod tunnel;
pub mod wire;
