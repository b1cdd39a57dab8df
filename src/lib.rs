//! Serve an address that has moved to another server: see `README.md` for what it does and
//! `ARCHITECTURE.md` for the rooms of this house and what flows through them.

pub mod batch;
pub mod cli;
pub mod command;

pub mod config;
pub mod daemon;

pub mod drops;
pub mod flow;
pub mod fragment;
pub mod icmp;
pub mod moved;
pub mod offload;
pub mod packet;
pub mod peer;
pub mod translate;
