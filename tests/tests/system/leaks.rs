//! After a run the host is as it was.

use capsid_tests::capsid::sh;
use capsid_tests::ledger::Ledger;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};

#[test]
fn ten_containers_one_after_another_leave_nothing() {
    sh(&[], "true").wait().exits(0); // fills the image cache, which is meant to stay
    let before = Ledger::now();
    for _ in 0..10 {
        sh(&[], "true").wait().exits(0);
    }
    before.balances();
}

#[test]
fn capsid_killed_at_any_time_leaves_nothing() {
    sh(&[], "true").wait().exits(0);
    let before = Ledger::now();
    for after_ms in [0, 20, 50, 100, 200, 400, 800, 1500, 2500] {
        let running = sh(&[], "sleep 1000").start();
        // The moment is the point of this test: the start is cut at times spread over its phases.
        std::thread::sleep(std::time::Duration::from_millis(after_ms));
        kill(Pid::from_raw(running.pid()), Signal::SIGKILL).expect("capsid runs");
        running.wait().exits(137);
    }
    before.balances();
}

#[test]
fn ctrl_c_in_any_phase_leaves_nothing() {
    sh(&[], "true").wait().exits(0);
    let before = Ledger::now();
    for after_ms in [5, 30, 80, 150, 300, 600, 1200, 2400] {
        let running = sh(&[], "trap 'exit 130' INT; while :; do sleep 0.1; done").start();
        std::thread::sleep(std::time::Duration::from_millis(after_ms));
        kill(Pid::from_raw(running.pid()), Signal::SIGINT).expect("capsid runs");
        running.wait().exits(130);
    }
    before.balances();
}

/// The ledger itself is tested: a leak of each class that this test can make turns it red.
#[test]
fn the_ledger_sees_a_seeded_leak_of_each_class() {
    let before = Ledger::now();
    let sleeper = Command::new("sleep")
        .arg("1000")
        .stdout(Stdio::null())
        .spawn();
    let mut sleeper = sleeper.expect("sleep");
    let _socket = UnixListener::bind("/tmp/capsid-ledger-socket").expect("bind");
    let mount = Command::new("mount")
        .args(["-t", "tmpfs", "capsid-ledger", "/mnt"])
        .status();
    assert!(mount.expect("mount").success());
    let left = before.left_behind();
    assert!(
        Command::new("umount")
            .arg("/mnt")
            .status()
            .expect("umount")
            .success()
    );
    std::fs::remove_file("/tmp/capsid-ledger-socket").expect("the socket file");
    sleeper.kill().expect("our child");
    sleeper.wait().expect("our child");
    for class in ["mount: ", "unix socket: ", "tmp: "] {
        assert!(
            left.iter().any(|entry| entry.starts_with(class)),
            "{class}: {left:?}"
        );
    }
}
