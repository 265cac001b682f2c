//! What a VMM takes of the host, as `/proc` has it.

use crate::harness::Running;
use std::fs::{read_dir, read_to_string};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The guest's memory, which is one mapping of exactly this size, in KiB.
const GUEST_MEMORY_KIB: u64 = 64 * 1024;

/// Resident memory of the VMM without the guest's, in KiB.
pub(crate) fn own_memory_kib(running: &Running) -> u64 {
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

/// How many fds the VMM has open: in its own table, and in that of the threads of each share.
pub(crate) fn open_fds(running: &Running) -> usize {
    let process = PathBuf::from(format!("/proc/{}", running.child.id()));
    let tasks = read_dir(process.join("task")).unwrap();
    let tasks = tasks.map(|task| task.unwrap().path());
    let leads = tasks.filter(|task| read_to_string(task.join("comm")).unwrap() == "fs0\n");
    let places = leads.chain([process.clone()]);
    let tables = places.map(|place| read_dir(place.join("fd")).unwrap().count());
    tables.sum()
}

/// How long all threads of the VMM have run.
pub(crate) fn busy(running: &Running) -> Duration {
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

/// How much longer they have than that.
pub(crate) fn busy_since(running: &Running, before: Duration) -> Duration {
    busy(running).saturating_sub(before)
}
