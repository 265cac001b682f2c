//! What dies is reported as what it was, and leaves nothing.

use capsid_tests::bundle::{Scratch, privileged_spec, write};
use capsid_tests::capsid::{REFUSED, capsid, kernel, run, sh, vmm_of};
use capsid_tests::command::{Ended, Run, Running};
use capsid_tests::ledger::Ledger;
use capsid_tests::vmm::archive;
use nix::sys::signal::{Signal, kill};
use std::fs;
use std::path::Path;
use std::time::Duration;

#[test]
fn a_vmm_killed_by_9_ends_the_run_with_137_and_says_so() {
    let before = Ledger::now();
    let mut running = sh(&[], "echo up; sleep 1000").start();
    running.until("up");
    kill(vmm_of(running.pid()).expect("a VMM"), Signal::SIGKILL).expect("the VMM runs");
    running.wait().refuses(137, &["VMM", "signal 9"]);
    before.balances();
}

#[test]
fn a_vmm_told_to_stop_powers_its_guest_off_which_is_137() {
    let before = Ledger::now();
    let mut running = sh(&[], "echo up; sleep 1000").start();
    running.until("up");
    kill(vmm_of(running.pid()).expect("a VMM"), Signal::SIGTERM).expect("the VMM runs");
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

/// A run whose agent is not to be reached in `seconds`; what it said.
#[track_caller]
fn unreached(run: Run, seconds: u64) -> Ended {
    let ended = run.wait();
    ended.exits(REFUSED);
    let said = format!("agent not reachable in {seconds} s");
    assert!(ended.stderr.contains(&said), "{}", ended.stderr);
    assert!(ended.took > Duration::from_secs(seconds));
    ended
}

#[test]
fn a_guest_without_an_agent_is_refused_at_its_deadline_with_the_console() {
    let before = Ledger::now();
    let scratch = Scratch::new("agentless");
    let initramfs = scratch.join("initramfs");
    // An emergency of the kernel's is what a silent console prints.
    let script = "echo '<0>there is no agent here' > /dev/kmsg; while true; do sleep 1000; done";
    fs::write(&initramfs, archive(script)).expect("write");
    // Long enough for an emulated host to boot in.
    let seconds = 30;
    let flag = format!("--boot-timeout={seconds}");
    let ended = unreached(
        run(&[&flag], &["true"]).env("CAPSID_INITRAMFS", &initramfs),
        seconds,
    );
    assert!(
        ended.stderr.contains("there is no agent here"),
        "the console's last lines are shown: {}",
        ended.stderr
    );
    drop(scratch);
    before.balances();
}

#[test]
fn a_kernel_that_never_says_anything_is_refused_at_its_deadline() {
    let before = Ledger::now();
    let scratch = Scratch::new("mute");
    let path = scratch.join("kernel");
    fs::write(&path, halted(&kernel())).expect("write");
    let quick = run(&["--boot-timeout=2"], &["true"]).env("CAPSID_KERNEL", &path);
    let ended = unreached(quick, 2);
    // It drives no device, so nobody waits for it to power off.
    assert!(
        ended.took < Duration::from_secs(10),
        "after {:?}",
        ended.took
    );
    assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
    drop(scratch);
    before.balances();
}

/// The kernel, but its first instructions are `cli` and `hlt`, for ever.
fn halted(kernel: &Path) -> Vec<u8> {
    const XEN_ELFNOTE_PHYS32_ENTRY: [u8; 4] = [18, 0, 0, 0];
    let mut kernel = fs::read(kernel).expect("the guest kernel");
    let number = |at: usize| {
        let bytes = kernel[at..at + 8].try_into().expect("8 bytes");
        usize::try_from(u64::from_le_bytes(bytes)).expect("an address")
    };
    // The note: lengths of name and content, type, "Xen\0", and the physical address of the entry (PVH).
    let name = kernel
        .windows(8)
        .position(|note| note.starts_with(&XEN_ELFNOTE_PHYS32_ENTRY) && note.ends_with(b"Xen\0"));
    let entry = number(name.expect("a PVH note") + 8);
    // Program headers of 56 bytes: offset, physical address and length in the file are at 8, 24 and 32.
    let count = usize::from(u16::from_le_bytes([kernel[56], kernel[57]]));
    let headers = (0..count).map(|index| number(32) + index * 56);
    let loaded = headers.filter(|at| kernel[*at] == 1);
    let at = loaded
        .filter_map(|at| {
            let inside = entry.checked_sub(number(at + 24))?;
            (inside < number(at + 32)).then(|| number(at + 8) + inside)
        })
        .next();
    let at = at.expect("the entry's segment");
    kernel[at..at + 4].copy_from_slice(&[0xfa, 0xf4, 0xeb, 0xfd]);
    kernel
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
