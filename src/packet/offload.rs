//! The rooms of super-packets under one name.

pub use crate::packet::coalesce::*;
pub use crate::packet::segment::*;
pub use crate::packet::vnet::*;
