//! What tests and fuzzers share.

pub mod fuzz;

/// Where a virtual clock begins: any point in time will do. Only here do unit tests of folders
/// without a clock look at the real one.
#[cfg(test)]
#[expect(
    clippy::disallowed_methods,
    reason = "a virtual clock has to begin somewhere"
)]
pub(crate) fn epoch() -> std::time::Instant {
    std::time::Instant::now()
}
