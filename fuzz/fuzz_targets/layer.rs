//! See `capsid_fuzz::layer`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| capsid_fuzz::run("layer", data));
