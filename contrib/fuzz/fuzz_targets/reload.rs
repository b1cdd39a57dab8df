#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ipmoved::testing::fuzz::reload(bytes));
