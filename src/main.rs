//! The `ipmoved` command: see the library for everything it does.
fn main() {}
