//! What dies is reported as what it was, and leaves nothing.

use capsid_tests::bundle::{Scratch, privileged_spec, write};
use capsid_tests::capsid::{REFUSED, Running, capsid, run, sh};
use capsid_tests::ledger::Ledger;
use nix::sys::signal::{Signal, kill};
use std::fs;

#[test]
fn a_vmm_killed_by_9_ends_the_run_with_137_and_says_so() {
    let before = Ledger::now();
    let mut running = sh(&[], "echo up; sleep 1000").start();
    running.until("up");
    kill(running.vmm().expect("a VMM"), Signal::SIGKILL).expect("the VMM runs");
    running.wait().refuses(137, &["VMM", "signal 9"]);
    before.balances();
}

#[test]
fn a_vmm_told_to_stop_powers_its_guest_off_which_is_137() {
    let before = Ledger::now();
    let mut running = sh(&[], "echo up; sleep 1000").start();
    running.until("up");
    kill(running.vmm().expect("a VMM"), Signal::SIGTERM).expect("the VMM runs");
    // The agent kills the command and powers off: whichever of the two is told first, it is the same end.
    let ended = running.wait();
    ended.exits(137);
    assert!(!ended.stderr.trim().is_empty(), "the reason is told");
    before.balances();
}

/// A bundle whose container runs `script` with every privilege in its guest.
fn privileged(name: &str, script: &str) -> (Scratch, Running) {
    let scratch = Scratch::new(name);
    write(scratch.path(), &privileged_spec(script));
    let running = capsid(["run", "--bundle", scratch.path().to_str().expect("utf-8")]).start();
    (scratch, running)
}

#[test]
fn an_agent_that_dies_panics_the_guest_which_is_255_with_the_console() {
    let before = Ledger::now();
    // PID 1 cannot be killed by a signal from inside; its own text overwritten by zeros can kill it, once it wakes up
    // to read what `dd` says.
    let script = "a=$(grep -m1 r-xp /proc/1/maps); from=$((0x${a%%-*})); b=${a#*-}; to=$((0x${b%% *})); \
                  dd if=/dev/zero of=/proc/1/mem bs=4096 seek=$((from/4096)) count=$(((to-from)/4096)) conv=notrunc; \
                  sleep 1000";
    let (scratch, running) = privileged("agent", script);
    let ended = running.wait();
    ended.exits(255);
    assert!(
        ended.stderr.contains("Attempted to kill init"),
        "the console's last lines are shown: {}",
        ended.stderr
    );
    drop(scratch);
    before.balances();
}

#[test]
fn an_initramfs_without_a_whole_agent_panics_the_guest_which_is_125_with_the_console() {
    let before = Ledger::now();
    let scratch = Scratch::new("initramfs");
    let good = std::env::var_os("CAPSID_INITRAMFS").expect("`cargo xtask test` sets it");
    let good = fs::read(good).expect("the initramfs");
    for (name, bytes) in [
        ("cut", &good[..good.len() / 2]),
        (
            "none",
            &b"this is no archive of any kind, and long enough to be looked at"[..],
        ),
    ] {
        let path = scratch.join(name);
        fs::write(&path, bytes).expect("write");
        let ended = run(&[], &["true"]).env("CAPSID_INITRAMFS", &path).wait();
        // No command of the user's has begun.
        ended.exits(REFUSED);
        assert!(
            ended.stderr.contains("not syncing"),
            "the console's last lines are shown: {}",
            ended.stderr
        );
    }
    drop(scratch);
    before.balances();
}

#[test]
fn a_guest_that_reboots_itself_is_not_a_success() {
    let before = Ledger::now();
    let (scratch, running) = privileged("reboot", "reboot -f; sleep 1000");
    let ended = running.wait();
    ended.exits(255);
    assert!(ended.stderr.contains("reset"), "{}", ended.stderr);
    drop(scratch);
    before.balances();
}

#[test]
fn a_container_out_of_memory_is_killed_and_says_137() {
    let before = Ledger::now();
    let ended = sh(&["--memory", "128M"], "tail /dev/zero").wait();
    assert_eq!(ended.code, 137, "{}", ended.stderr);
    before.balances();
}
