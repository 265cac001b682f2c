//! See `capsid_fuzz::blk`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| capsid_fuzz::run("blk", data));
