//! See `capsid_fuzz::net`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| capsid_fuzz::run("net", data));
