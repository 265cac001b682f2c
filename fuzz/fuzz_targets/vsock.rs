//! See `capsid_fuzz::vsock`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| capsid_fuzz::run("vsock", data));
