//! Whose a packet is: the table of flows, and what becomes of a packet in each role.

pub mod class;
pub mod fragments;
pub mod gate;
pub mod nat;
pub mod routes;
pub mod seed;
mod slab;
pub mod table;
pub mod translate;

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::packet::Kind;

/// The port as [`Move::takes`](crate::model::moved::Move::takes) wants it: only what is a port.
#[inline]
fn port_of(kind: Kind, port: u16) -> Option<u16> {
    matches!(kind, Kind::Tcp | Kind::Udp).then_some(port)
}

/// A lock that a panic elsewhere does not close: what it guards is whole between any two calls.
#[inline]
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
