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

/// Each word of a text, read as what it stands for.
#[cfg(test)]
pub(crate) fn all<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> Vec<T> {
    let words = text.split_whitespace();
    words.map(|word| word.parse().unwrap()).collect()
}
