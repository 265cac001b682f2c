//! Nothing that goes in or comes out is lost, reordered or invented.

use capsid_tests::capsid::{run, sh};
use std::collections::hash_map::DefaultHasher;
use std::hash::Hasher;

/// How much goes through in both directions, in MiB.
const BIG_MIB: usize = 256;

/// Bytes that repeat nowhere near each other: a linear congruential sequence.
fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut noise = Vec::with_capacity(bytes + 8);
    while noise.len() < bytes {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        noise.extend_from_slice(&state.to_be_bytes());
    }
    noise.truncate(bytes);
    noise
}

fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}

#[test]
fn a_quarter_gibibyte_goes_through_and_comes_back() {
    let sent = noise(BIG_MIB << 20);
    let ended = run(&["-i"], &["cat"]).stdin(sent.clone()).wait();
    ended.exits(0);
    assert_eq!(ended.stdout.len(), sent.len());
    assert_eq!(hash(&ended.stdout), hash(&sent));
    println!("{BIG_MIB} MiB each way in {:?}", ended.took);
}

#[test]
fn the_end_of_input_reaches_the_command() {
    let ended = run(&["-i"], &["wc", "-c"])
        .stdin(b"twelve bytes".to_vec())
        .wait();
    ended.exits(0);
    assert_eq!(ended.text().trim(), "12");
}

#[test]
fn without_i_the_input_is_empty() {
    let ended = run(&[], &["cat"]).stdin(b"not for you".to_vec()).wait();
    ended.exits(0);
    assert_eq!(ended.text(), "");
}

#[test]
fn the_last_bytes_before_the_exit_are_not_lost() {
    for _ in 0..3 {
        let ended = sh(
            &[],
            "dd if=/dev/zero bs=1000 count=1000 2>/dev/null; printf end; printf bad >&2",
        )
        .wait();
        ended.exits(0);
        assert_eq!(ended.stdout.len(), 1_000_003);
        assert!(ended.stdout.ends_with(b"end"));
        assert_eq!(ended.stderr, "bad");
    }
}

#[test]
fn output_closed_by_the_reader_does_not_hang_the_run() {
    let mut running = sh(&[], "yes").start();
    running.until("y\ny\n");
    // Nobody reads any more: `capsid` is killed by the broken pipe or ends with the command's own code.
    drop(running.close_output());
    let ended = running.wait();
    assert_ne!(ended.code, 0, "{}", ended.stderr);
}

#[test]
fn dev_stdout_can_be_opened_again() {
    let ended = sh(&[], "echo again > /dev/stdout; echo bad > /proc/self/fd/2").wait();
    ended.exits(0);
    assert_eq!(ended.text(), "again\n");
    assert_eq!(ended.stderr, "bad\n");
}

#[test]
fn a_child_that_outlives_the_command_does_not_hold_the_end() {
    sh(&[], "sleep 1000 & exit 4").wait().exits(4);
}
