//! `capsid` as a person runs it, and what it runs on.

use crate::command::Run;
use crate::ledger::Ledger;
use nix::unistd::Pid;
use std::ffi::OsStr;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

/// The code of `capsid` for what it refuses itself, as docker's.
pub const REFUSED: i32 = 125;

/// The busybox image, a docker-archive.
///
/// # Panics
/// `CAPSID_TEST_IMAGE` is not set or names no file.
pub fn image() -> PathBuf {
    let path = std::env::var_os("CAPSID_TEST_IMAGE")
        .map(PathBuf::from)
        .expect("CAPSID_TEST_IMAGE names the busybox image; `cargo xtask test` sets it");
    assert!(
        path.exists(),
        "CAPSID_TEST_IMAGE: {} does not exist",
        path.display()
    );
    path
}

/// The guest kernel.
///
/// # Panics
/// `CAPSID_KERNEL` is not set.
pub fn kernel() -> PathBuf {
    std::env::var_os("CAPSID_KERNEL")
        .map(PathBuf::from)
        .expect("CAPSID_KERNEL names the guest kernel; `cargo xtask test` sets it")
}

/// `capsid` with arguments as given.
pub fn capsid<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Run {
    Run::of(Command::new("capsid")).args(args)
}

/// `capsid run --image <busybox> FLAGS -- COMMAND`.
pub fn run(flags: &[&str], command: &[&str]) -> Run {
    let image = image();
    capsid([OsStr::new("run"), OsStr::new("--image"), image.as_os_str()])
        .args(flags)
        .args(["--"])
        .args(command)
}

/// `capsid run FLAGS -- sh -c SCRIPT`.
pub fn sh(flags: &[&str], script: &str) -> Run {
    run(flags, &["sh", "-c", script])
}

/// Asserts that `capsid` refuses this run in one line that has each of `words`, and leaves nothing.
///
/// # Panics
/// It does not.
#[track_caller]
pub fn refused(run: Run, words: &[&str]) {
    let before = Ledger::now();
    run.wait().refuses(REFUSED, words);
    before.balances();
}

/// The VMM of the `capsid` with this process id: the child by that name of one of its threads (proc(5),
/// /proc/PID/task/TID/children).
pub fn vmm_of(capsid: i32) -> Option<Pid> {
    let threads = fs::read_dir(format!("/proc/{capsid}/task")).ok()?;
    let children: Vec<String> = threads
        .flatten()
        .filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok())
        .collect();
    children
        .iter()
        .flat_map(|line| line.split_whitespace())
        .filter_map(|child| child.parse().ok())
        .find(|child: &i32| {
            fs::read_to_string(format!("/proc/{child}/comm"))
                .is_ok_and(|name| name == "capsid-vmm\n")
        })
        .map(Pid::from_raw)
}
