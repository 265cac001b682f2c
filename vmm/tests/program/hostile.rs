//! The hostile guest (`tests/hostile`) against the real program under its filters: the guest abuses a device and says how that
//! answered; here is seen to that the VMM lives, answers its owner all the time, did not grow, does not spin, and ends when
//! it is told to.

use crate::control::channel::Control;
use crate::harness::{Running, Vmm, can_run, inherited};
use capsid_protocol::control::{REPLY_TIMEOUT_MS, Reply, Request};
use capsid_protocol::exit::VmmExit;
use rustix::process::Signal;
use std::fs::{read_dir, read_to_string};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

/// Where the guest is; `cargo xtask test --suite vmm` builds it and says so.
const GUEST: &str = "CAPSID_HOSTILE_GUEST";
/// How much the VMM may have grown after all that was done to it, in KiB.
const GROWTH_MAX_KIB: u64 = 8 * 1024;
/// How long its owner waits for an answer at most, whatever the guest does.
const REPLY_MAX: Duration = Duration::from_millis(REPLY_TIMEOUT_MS);
/// How often the owner asks while the chapters are played.
const ASKED_EVERY: Duration = Duration::from_millis(5);
/// How long the VMM of a guest that sleeps is watched.
const WATCHED: Duration = Duration::from_secs(1);
/// How much of it the VMM may run.
const BUSY_MAX: Duration = Duration::from_millis(50);
/// The guest's memory, which is one mapping of exactly this size, in KiB.
const GUEST_MEMORY_KIB: u64 = 64 * 1024;

/// The guest's file, or a loud word that the test cannot run.
fn guest(test: &str) -> Option<Vec<u8>> {
    if !can_run(test) {
        return None;
    }
    let Some(path) = std::env::var_os(GUEST) else {
        eprintln!("SKIPPED {test}: needs {GUEST}, which `cargo xtask test --suite vmm` sets");
        return None;
    };
    Some(std::fs::read(path).expect("the hostile guest"))
}

/// Runs the chapters of one device and holds the VMM against its bounds. Returns the chapters, which all went well.
fn play(mut vmm: Vmm, name: &str) -> Vec<String> {
    let (mut control, theirs) = Control::pair();
    vmm.more += &format!(
        r#","cmdline":"hostile={name}","control_fd":{}"#,
        theirs.as_raw_fd()
    );
    let mut running = vmm.start();
    running.printed("ready\n");
    // The guest goes on meanwhile, by what its first chapter does in as long as this takes.
    let before = own_memory_kib(&running);
    let mut slowest = Duration::ZERO;
    running.printed_while("idle\n", || {
        let asked = Instant::now();
        let reply = control.ask(&Request::State, &[]);
        assert!(matches!(reply, Reply::State(_)), "{reply:?}");
        slowest = slowest.max(asked.elapsed());
        std::thread::sleep(ASKED_EVERY);
    });
    let (busy, since) = (busy(&running), Instant::now());
    std::thread::sleep(WATCHED);
    let busy = busy_since(&running, busy);
    let watched = since.elapsed();
    let after = own_memory_kib(&running);
    running.signal(Signal::TERM);
    let ended = running.wait();
    let (lines, wrong): (Vec<&str>, Vec<&str>) = ended
        .serial
        .lines()
        .partition(|line| line.ends_with(": ok"));
    assert_eq!(wrong, ["ready", "idle"], "{}", ended.stderr);
    assert_eq!(ended.exit, Some(VmmExit::Stopped), "{}", ended.stderr);
    assert!(
        after <= before + GROWTH_MAX_KIB,
        "it grew from {before} to {after} KiB"
    );
    assert!(
        busy <= BUSY_MAX,
        "{busy:?} of {watched:?} with a guest that sleeps"
    );
    assert!(slowest <= REPLY_MAX, "an answer took {slowest:?}");
    println!(
        "{name}: {before} KiB, then {after} KiB; busy for {busy:?} of {watched:?}; slowest answer {slowest:?}"
    );
    lines.into_iter().map(str::to_owned).collect()
}

/// Resident memory of the VMM without the guest's, in KiB.
fn own_memory_kib(running: &Running) -> u64 {
    let maps = read_to_string(format!("/proc/{}/smaps", running.child.id())).unwrap();
    let field = |line: &str, name: &str| -> Option<u64> {
        line.strip_prefix(name)?
            .trim()
            .strip_suffix(" kB")?
            .parse()
            .ok()
    };
    let (mut sum, mut size) = (0, 0);
    for line in maps.lines() {
        if let Some(kib) = field(line, "Size:") {
            size = kib;
        } else if let Some(kib) = field(line, "Rss:") {
            sum += if size == GUEST_MEMORY_KIB { 0 } else { kib };
        }
    }
    assert!(sum > 0, "no memory in {maps}");
    sum
}

/// How long all threads of the VMM have run.
fn busy(running: &Running) -> Duration {
    let threads = read_dir(
        Path::new("/proc")
            .join(running.child.id().to_string())
            .join("task"),
    );
    let run_ns = |thread: std::fs::DirEntry| -> u64 {
        let times = read_to_string(thread.path().join("schedstat")).unwrap();
        times
            .split(' ')
            .next()
            .and_then(|ns| ns.parse().ok())
            .expect("ns")
    };
    Duration::from_nanos(threads.unwrap().map(|thread| run_ns(thread.unwrap())).sum())
}

fn busy_since(running: &Running, before: Duration) -> Duration {
    busy(running).saturating_sub(before)
}

/// What all virtio devices have to bear, in order.
const COMMON: [&str; 10] = [
    "an honest request at first",
    "registers of any width and offset",
    "features and the status in any order",
    "settings that are no queue",
    "settings after activation",
    "what is no chain",
    "indirect tables that are none",
    "notifications without end",
    "messages of every kind",
    "events that are none",
];

fn chapters(own: &[&str]) -> Vec<String> {
    COMMON
        .iter()
        .chain(own)
        .map(|name| format!("{name}: ok"))
        .collect()
}

#[test]
fn the_entropy_device_bears_a_hostile_driver() {
    let Some(guest) = guest("the_entropy_device_bears_a_hostile_driver") else {
        return;
    };
    let own = ["buffers without end", "buffers that cannot be filled"];
    assert_eq!(play(Vmm::new(&guest), "rng"), chapters(&own));
}

#[test]
fn a_disk_bears_a_hostile_driver() {
    const DISK_BYTES: u64 = 1 << 20;
    let Some(guest) = guest("a_disk_bears_a_hostile_driver") else {
        return;
    };
    let disk = inherited(b"");
    disk.set_len(DISK_BYTES).unwrap();
    let mut vmm = Vmm::new(&guest);
    vmm.more = format!(r#","disks":[{{"id":"hostile","fd":{}}}]"#, disk.as_raw_fd());
    let own = [
        "sectors that are not there",
        "ranges that are none",
        "the same head twice in flight",
        "resets with requests in flight",
    ];
    assert_eq!(play(vmm, "blk"), chapters(&own));
    assert_eq!(disk.metadata().unwrap().len(), DISK_BYTES);
}

#[test]
fn configuration_space_and_ports_bear_a_hostile_guest() {
    let Some(guest) = guest("configuration_space_and_ports_bear_a_hostile_guest") else {
        return;
    };
    let all = [
        "an honest request at first: ok",
        "configuration space of any width and offset: ok",
        "pvpanic of any width and offset: ok",
        "ports of nobody: ok",
    ];
    assert_eq!(play(Vmm::new(&guest), "machine"), all);
}
