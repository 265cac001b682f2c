//! What Capsid has and runc has not: a VM that dies, stands still or is shared, and a shim that holds it.

use crate::tasks::UP;
use capsid_tests::command::eventually;
use capsid_tests::containerd::Daemon;
use capsid_tests::cost::own_pss_kib;
use capsid_tests::ledger::Ledger;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::time::{Duration, Instant};

/// What takes less did not wait for a guest: the shim gives one that stands still half a minute before it ends the VM.
const UNAIDED: Duration = Duration::from_secs(15);

/// A process of a container's pod by the record in its bundle: `shim` or `vmm`.
fn process(daemon: &Daemon, id: &str, which: &str) -> Pid {
    let record = fs::read(daemon.bundle(id).join("capsid.json")).expect("a record");
    let record: serde_json::Value = serde_json::from_slice(&record).expect("JSON");
    let pid = record[which]["pid"].as_i64().expect("a pid");
    Pid::from_raw(i32::try_from(pid).expect("a pid"))
}

fn is_there(pid: Pid) -> bool {
    fs::metadata(format!("/proc/{pid}")).is_ok()
}

fn detached(daemon: &Daemon, id: &str) {
    let flags = ["--detach", "--null-io"];
    daemon.run(&flags, id, UP).wait().exits(0);
}

fn remove(daemon: &Daemon, id: &str) {
    daemon.ctr(["containers", "delete", id]).wait().exits(0);
}

/// The host is as it was. (How many threads a Go program has is its own affair, so those of the daemon are not counted here.)
#[track_caller]
fn is_balanced(daemon: &Daemon, before: &Ledger) {
    before.balances();
    let left = fs::read_dir(daemon.bundle("")).map_or(0, Iterator::count);
    assert_eq!(left, 0, "bundles are left");
}

/// Does it before anybody could have waited for a guest.
#[track_caller]
fn at_once<T>(what: &str, act: impl FnOnce() -> T) -> T {
    let began = Instant::now();
    let done = act();
    assert!(
        began.elapsed() < UNAIDED,
        "{what} took {:?}",
        began.elapsed()
    );
    done
}

pub(crate) fn a_killed_vmm_is_137_for_its_container(daemon: &Daemon) {
    daemon.run(&["--rm"], "first", "true").wait().exits(0);
    let before = Ledger::now();
    detached(daemon, "one");
    let vmm = process(daemon, "one", "vmm");
    kill(vmm, Signal::SIGKILL).expect("it runs");
    daemon.reaches("one", "STOPPED");
    let refused = daemon.exec("late", "one", "true").wait();
    assert_ne!(refused.code, 0, "{}", refused.stderr);
    assert_eq!(daemon.delete("one"), 137);
    remove(daemon, "one");
    assert!(!is_there(vmm));
    is_balanced(daemon, &before);
}

pub(crate) fn a_vm_that_stands_still_is_answered_for_and_killed(daemon: &Daemon) {
    daemon.run(&["--rm"], "first", "true").wait().exits(0);
    let before = Ledger::now();
    detached(daemon, "one");
    let vmm = process(daemon, "one", "vmm");
    kill(vmm, Signal::SIGSTOP).expect("it runs");
    let status = at_once("task ls", || daemon.status("one"));
    assert_eq!(status.expect("listed").1, "RUNNING");
    at_once("a signal", || {
        daemon.task(&["kill", "--signal", "SIGTERM"], "one")
    });
    at_once("SIGKILL", || {
        daemon.task(&["kill", "--signal", "SIGKILL"], "one")
    });
    daemon.reaches("one", "STOPPED");
    assert_eq!(at_once("delete", || daemon.delete("one")), 137);
    remove(daemon, "one");
    assert!(!is_there(vmm));
    is_balanced(daemon, &before);
}

pub(crate) fn a_killed_shim_leaves_nothing(daemon: &Daemon) {
    daemon.run(&["--rm"], "first", "true").wait().exits(0);
    let before = Ledger::now();
    detached(daemon, "one");
    let (shim, vmm) = (
        process(daemon, "one", "shim"),
        process(daemon, "one", "vmm"),
    );
    kill(shim, Signal::SIGKILL).expect("it runs");
    eventually("the VMM follows its shim", || !is_there(vmm));
    eventually("the task is not one that runs", || {
        daemon
            .status("one")
            .is_none_or(|(_, status)| status != "RUNNING")
    });
    if daemon.status("one").is_some() {
        daemon.ctr(["tasks", "delete", "--force", "one"]).wait();
    }
    remove(daemon, "one");
    is_balanced(daemon, &before);
}

pub(crate) fn a_pod_is_one_vm(daemon: &Daemon) {
    daemon.run(&["--rm"], "first", "true").wait().exits(0);
    let before = Ledger::now();
    let sandbox = "io.kubernetes.cri.sandbox-id=pod";
    let kind = |kind| format!("io.kubernetes.cri.container-type={kind}");
    let pause = kind("sandbox");
    let flags = [
        "--detach",
        "--null-io",
        "--annotation",
        sandbox,
        "--annotation",
        &pause,
    ];
    daemon.run(&flags, "pod", "this is not run").wait().exits(0);
    let (pid, status) = daemon.status("pod").expect("listed");
    assert_eq!(status, "RUNNING");
    let vmm = process(daemon, "pod", "vmm");
    let namespaces = ["network:net", "ipc:ipc", "uts:uts", "pid:pid"].map(|pair| {
        let (kind, name) = pair.split_once(':').expect("a pair");
        format!("{kind}:/proc/{pid}/ns/{name}")
    });
    let member = kind("container");
    let mut flags = vec!["--annotation", sandbox, "--annotation", &member];
    flags.extend(namespaces.iter().flat_map(|one| ["--with-ns", one]));
    let says = "cat /proc/sys/kernel/random/boot_id; cat /proc/1/cmdline | tr '\\0' ' '";
    let boot_ids = ["one", "two"].map(|id| {
        let ended = daemon
            .run(&[&["--rm"], flags.as_slice()].concat(), id, says)
            .wait();
        ended.exits(0).text()
    });
    assert_eq!(boot_ids[0], boot_ids[1]);
    assert!(
        boot_ids[0].contains("pause"),
        "PID 1 is the pod's: {}",
        boot_ids[0]
    );
    // A member's death is its own.
    let mut long = vec!["--detach", "--null-io"];
    long.extend(&flags);
    daemon.run(&long, "three", UP).wait().exits(0);
    daemon.task(&["kill", "--signal", "SIGKILL"], "three");
    daemon.reaches("three", "STOPPED");
    assert_eq!(daemon.delete("three"), 137);
    remove(daemon, "three");
    assert_eq!(daemon.status("pod").expect("listed").1, "RUNNING");
    assert!(is_there(vmm));
    daemon.task(&["kill", "--signal", "SIGTERM"], "pod");
    daemon.reaches("pod", "STOPPED");
    assert_eq!(daemon.delete("pod"), 0);
    remove(daemon, "pod");
    assert!(!is_there(vmm));
    is_balanced(daemon, &before);
}

/// What a pod costs beside its guest's memory, idle, in KiB: a shim alone (of which four fifths are its program's pages, that others would share; 4 MiB
/// are aimed at), each of ten, a shim with its VMM.
const SHIM_MAX_KIB: u64 = 4_608;
const SHIM_OF_TEN_MAX_KIB: u64 = 2 << 10;
const BOTH_MAX_KIB: u64 = 8 << 10;
const PODS: usize = 10;

pub(crate) fn shims_are_small(daemon: &Daemon) {
    let pss = |id: &str, which| {
        let pid = process(daemon, id, which).as_raw();
        own_pss_kib(u32::try_from(pid).expect("a pid")).expect("it runs")
    };
    let ids: Vec<String> = (0..PODS).map(|number| format!("c{number}")).collect();
    detached(daemon, &ids[0]);
    let (shim, vmm) = (pss(&ids[0], "shim"), pss(&ids[0], "vmm"));
    println!("a shim: {shim} KiB, its VMM: {vmm} KiB");
    for id in &ids[1..] {
        detached(daemon, id);
    }
    let each = ids.iter().map(|id| pss(id, "shim")).sum::<u64>() / ids.len() as u64;
    println!("each of {PODS} shims: {each} KiB");
    for id in &ids {
        daemon.task(&["kill", "--signal", "SIGKILL"], id);
        daemon.reaches(id, "STOPPED");
        daemon.delete(id);
        remove(daemon, id);
    }
    assert!(
        shim <= SHIM_MAX_KIB && shim + vmm <= BOTH_MAX_KIB,
        "{shim}, {vmm}"
    );
    assert!(each <= SHIM_OF_TEN_MAX_KIB, "{each}");
}
