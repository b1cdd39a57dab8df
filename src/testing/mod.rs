//! What tests and fuzzers share.

pub mod fuzz;

/// Where the virtual clock of a test begins.
#[cfg(test)]
#[expect(
    clippy::disallowed_methods,
    reason = "any point in time will do as a beginning"
)]
pub(crate) fn epoch() -> std::time::Instant {
    std::time::Instant::now()
}
