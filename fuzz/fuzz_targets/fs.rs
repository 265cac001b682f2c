//! See `capsid_fuzz::fs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| capsid_fuzz::run("fs", data));
