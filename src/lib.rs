//! Serve an address that has moved to another server: see `README.md` for what it does and
//! `ARCHITECTURE.md` for the rooms of this house and what flows through them.

pub mod drops;
pub mod moved;
pub mod peer;
pub mod pmtu;
pub mod replay;
pub mod session;
pub mod tunnel;
pub mod wire;
