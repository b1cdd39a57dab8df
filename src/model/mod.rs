//! The words that all folders share: what moved, what is accepted of it, who is at the other end,
//! why a packet was dropped, what the daemon says of itself and is asked to do, and where its files
//! lie.

pub mod accept;
pub mod asked;
pub mod budget;
pub mod bytes;
pub mod delivery_map;
pub mod drops;
pub mod finding;
pub mod flow_list;
pub mod inherited;
pub mod mode;
pub mod move_index;
pub mod moved;
pub mod moved_list;
pub mod outgoing;
pub mod owners;
pub mod peer;
pub mod prefix;
pub mod problems;
pub mod progress;
pub mod rates;
pub mod request;
pub mod rest;
pub mod runtime;
pub mod scopes;
pub mod status;
pub mod visit;
