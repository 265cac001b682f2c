//! What a VMM costs the host, counted from outside by the host's kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

const TRACEFS: &str = "/sys/kernel/tracing";
/// Bytes of the trace buffer, in KiB: a boot makes some thousand calls of a hundred bytes each.
const BUFFER_KIB: &str = "16384";

/// Memory of process `pid` without the guest's, as its share of what it has in common with others, in KiB. The guest's memory is
/// that of which a dump of the VMM has nothing (`dd`, include/linux/mm.h VM_DONTDUMP).
///
/// # Errors
/// There is no such process.
pub fn own_pss_kib(pid: u32) -> io::Result<u64> {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    Ok(own_pss(&maps))
}

fn own_pss(smaps: &str) -> u64 {
    let (mut sum, mut pss) = (0, 0);
    for line in smaps.lines() {
        if let Some(kib) = line.strip_prefix("Pss:") {
            let kib = kib.trim().trim_end_matches(" kB");
            pss = kib.parse().unwrap_or(0);
        } else if let Some(flags) = line.strip_prefix("VmFlags:") {
            // The last line of a mapping.
            let guests = flags.split_whitespace().any(|flag| flag == "dd");
            sum += if guests { 0 } else { pss };
        }
    }
    sum
}

/// Threads of process `pid`.
///
/// # Errors
/// There is no such process.
pub fn threads(pid: u32) -> io::Result<BTreeSet<u32>> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"))?;
    let ids = tasks.map(|task| Ok(task?.file_name().to_string_lossy().parse().ok()));
    let ids: io::Result<Vec<Option<u32>>> = ids.collect();
    Ok(ids?.into_iter().flatten().collect())
}

/// Page faults of process `pid` that read nothing from a disk, those included that KVM has for its guest.
///
/// # Errors
/// There is no such process.
pub fn minor_faults(pid: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // proc(5): the name is in brackets and may have anything in it; field 10, the eighth behind it.
    let behind = stat.rsplit_once(") ").map(|(_, behind)| behind);
    let faults = behind.and_then(|fields| fields.split(' ').nth(7));
    faults
        .and_then(|faults| faults.parse().ok())
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Bytes that process `pid` has read by system calls.
///
/// # Errors
/// There is no such process.
pub fn bytes_read(pid: u32) -> io::Result<u64> {
    let io = fs::read_to_string(format!("/proc/{pid}/io"))?;
    let read = io.lines().find_map(|line| line.strip_prefix("rchar: "));
    read.and_then(|bytes| bytes.parse().ok())
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// The system calls of the calling thread's children from now on. Its drop ends it.
pub struct SystemCalls(());

impl SystemCalls {
    /// Begins to count.
    ///
    /// # Errors
    /// This host's kernel does not trace system calls, or the caller is not root.
    pub fn count() -> io::Result<SystemCalls> {
        if !file("trace").exists() {
            let none = None::<&str>;
            let flags = nix::mount::MsFlags::empty();
            nix::mount::mount(Some("tracefs"), TRACEFS, Some("tracefs"), flags, none)?;
        }
        let counting = SystemCalls(());
        fs::write(file("buffer_size_kb"), BUFFER_KIB)?;
        fs::write(file("trace"), "")?;
        fs::write(file("options/event-fork"), "1")?;
        let thread = nix::unistd::gettid().to_string();
        fs::write(file("set_event_pid"), thread)?;
        fs::write(file("events/raw_syscalls/sys_enter/enable"), "1")?;
        Ok(counting)
    }

    /// How many `threads` made so far, by number.
    ///
    /// # Errors
    /// The trace cannot be read.
    pub fn of(&self, threads: &BTreeSet<u32>) -> io::Result<BTreeMap<u32, u64>> {
        fs::write(file("events/raw_syscalls/sys_enter/enable"), "0")?;
        Ok(calls(&fs::read_to_string(file("trace"))?, threads))
    }
}

impl Drop for SystemCalls {
    fn drop(&mut self) {
        for (name, value) in [
            ("events/raw_syscalls/sys_enter/enable", "0"),
            ("options/event-fork", "0"),
            ("set_event_pid", ""),
            ("trace", ""),
        ] {
            // What was not set cannot be unset.
            let _ = fs::write(file(name), value);
        }
    }
}

fn file(name: &str) -> PathBuf {
    Path::new(TRACEFS).join(name)
}

/// Counts lines like `vcpu0-123 [000] ..... 1.0: sys_enter: NR 16 (…)`.
fn calls(trace: &str, threads: &BTreeSet<u32>) -> BTreeMap<u32, u64> {
    let mut calls = BTreeMap::new();
    for line in trace.lines() {
        let Some((task, call)) = line.split_once("sys_enter: NR ") else {
            continue;
        };
        let thread = task.split(" [").next().unwrap_or_default().trim();
        let thread = thread.rsplit('-').next().and_then(|id| id.parse().ok());
        let number = call
            .split(' ')
            .next()
            .and_then(|number| number.parse().ok());
        if let (Some(thread), Some(number)) = (thread, number) {
            if threads.contains(&thread) {
                *calls.entry(number).or_default() += 1;
            }
        }
    }
    calls
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_is_in_no_dump_is_the_guests() {
        let smaps = "1000-2000 rw-p 0 00:00 0\nPss:   12 kB\nPss_Dirty:   5 kB\nVmFlags: rd wr mr\n\
                     3000-4000 rw-p 0 00:00 0\nPss:  900 kB\nVmFlags: rd wr dd hg\n\
                     5000-6000 rw-p 0 00:00 0 [heap]\nPss:    3 kB\nVmFlags: rd wr\n";
        assert_eq!(own_pss(smaps), 15);
    }

    #[test]
    fn calls_of_the_threads_are_counted_by_number_and_others_are_not() {
        let trace = "# tracer: nop\n\
             capsid-vmm-12    [000] ..... 1.0: sys_enter: NR 16 (5, ae80, 0)\n\
             vcpu0-13 [000] ..... 1.0: sys_enter: NR 16 (5, ae80, 0)\n\
             vcpu0-13 [000] ..... 1.0: sys_enter: NR 1 (5)\n\
             sh-14 [000] ..... 1.0: sys_enter: NR 16 (5)\n";
        let calls = calls(trace, &BTreeSet::from([12, 13]));
        assert_eq!(calls, BTreeMap::from([(1, 1), (16, 2)]));
    }
}
