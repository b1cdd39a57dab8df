//! Whose a packet is: the table of flows, and what becomes of a packet in each role.

pub mod fragments;
pub mod nat;
pub mod role;
pub mod seed;
pub mod table;
pub mod translate;
