//! What a VMM costs its host, counted by the host kernel's own trace events, so that every VMM is counted alike. Done in a
//! run of its own: tracing costs instructions.

use rustix::time::{ClockId, clock_gettime};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

const TRACEFS: &str = "/sys/kernel/tracing";
/// Room for the events of one run; what does not fit costs the oldest.
const BUFFER_KIB: &str = "65536";
/// Every return of KVM to its VMM.
pub const USERSPACE_EXITS: &[&str] = &["kvm/kvm_userspace_exit"];
/// All that a request may cost.
pub const EVERYTHING: &[&str] = &[
    "kvm/kvm_userspace_exit",
    "kvm/kvm_exit",
    "raw_syscalls/sys_enter",
    "sched/sched_switch",
];

/// Counts by name.
pub type Counts = BTreeMap<String, u64>;

/// What was counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Returns to the VMM, by reason (`KVM_EXIT_` left out, lower case).
    pub userspace_exits: Counts,
    /// Exits of the guest, by reason, those that KVM handles itself among them.
    pub exits: Counts,
    /// System calls of the VMM and what it started, by name, or by number.
    pub syscalls: Counts,
    /// How often the host's scheduler went to a thread, by its name.
    pub switches: Counts,
}

/// A record of what the thread that made it starts from then on. None any more when dropped.
#[derive(Debug)]
pub struct Recording(&'static [&'static str]);

/// The clock of the events and of the times that [`Recording::counted`] takes.
pub fn now() -> Duration {
    let time = clock_gettime(ClockId::Monotonic);
    Duration::new(
        time.tv_sec.unsigned_abs(),
        time.tv_nsec.unsigned_abs() as u32,
    )
}

fn file(name: &str) -> PathBuf {
    Path::new(TRACEFS).join(name)
}

fn enable(events: &[&str], switch: &str) -> io::Result<()> {
    for event in events {
        fs::write(file(&format!("events/{event}/enable")), switch)?;
    }
    Ok(())
}

impl Recording {
    /// Nothing is recorded until [`Recording::begin`].
    ///
    /// # Errors
    /// Tracing is not available.
    pub fn of(events: &'static [&'static str]) -> io::Result<Recording> {
        if !file("trace").exists() {
            let none = None::<&str>;
            let flags = nix::mount::MsFlags::empty();
            nix::mount::mount(Some("tracefs"), TRACEFS, Some("tracefs"), flags, none)?;
        }
        for (name, value) in [
            ("buffer_size_kb", BUFFER_KIB),
            ("trace_clock", "mono"),
            ("options/event-fork", "1"),
            ("set_event_pid", &nix::unistd::gettid().to_string()),
            ("trace", ""),
        ] {
            fs::write(file(name), value)?;
        }
        Ok(Recording(events))
    }

    /// Records from here on.
    ///
    /// # Errors
    /// The kernel has no such event.
    pub fn begin(&self) -> io::Result<()> {
        enable(self.0, "1")
    }

    /// What happened from `since` until `until`.
    ///
    /// # Errors
    /// The record cannot be read.
    pub fn counted(self, since: Duration, until: Duration) -> io::Result<Counted> {
        enable(self.0, "0")?;
        let own = fs::read_to_string("/proc/thread-self/comm")?;
        Ok(count(
            &fs::read_to_string(file("trace"))?,
            own.trim_end(),
            since..until,
        ))
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        // There is nobody left to tell.
        let _ = enable(self.0, "0");
        let _ = fs::write(file("set_event_pid"), "");
    }
}

/// Counts a record, whose lines read `COMM-PID [CPU] FLAGS SECONDS: EVENT: WORDS`. What threads called `own` do is not counted.
fn count(record: &str, own: &str, within: std::ops::Range<Duration>) -> Counted {
    let mut counted = Counted::default();
    for line in record.lines() {
        let Some(event) = event(line) else {
            continue;
        };
        if !within.contains(&event.at) {
            continue;
        }
        let word = |name: &str| {
            let (_, rest) = event.words.split_once(name)?;
            rest.split([' ', '(']).next()
        };
        let found = match event.name {
            "kvm_userspace_exit" => word("reason ")
                .map(|reason| reason.trim_start_matches("KVM_EXIT_").to_lowercase())
                .map(|reason| (&mut counted.userspace_exits, reason)),
            "kvm_exit" => word("reason ").map(|reason| (&mut counted.exits, reason.to_owned())),
            "sys_enter" if event.thread != own => {
                word("NR ").map(|number| (&mut counted.syscalls, system_call(number)))
            }
            // The idle thread's name has the CPU's number.
            "sched_switch" => word("next_comm=")
                .filter(|next| *next != own && !next.starts_with("swapper"))
                .map(|next| (&mut counted.switches, next.to_owned())),
            _ => None,
        };
        if let Some((counts, name)) = found {
            *counts.entry(name).or_default() += 1;
        }
    }
    counted
}

struct Event<'a> {
    thread: &'a str,
    at: Duration,
    name: &'a str,
    words: &'a str,
}

fn event(line: &str) -> Option<Event<'_>> {
    if line.starts_with('#') {
        return None;
    }
    let (thread, rest) = line.split_once(" [")?;
    let (thread, _pid) = thread.trim().rsplit_once('-')?;
    let mut parts = rest.splitn(3, ": ");
    let seconds = parts.next()?.rsplit(' ').next()?;
    let (seconds, fraction) = seconds.split_once('.')?;
    let micros: u64 = fraction.parse().ok()?;
    let at = Duration::from_secs(seconds.parse().ok()?) + Duration::from_micros(micros);
    Some(Event {
        thread,
        at,
        name: parts.next()?,
        words: parts.next()?,
    })
}

/// The names of those that a VMM makes for its devices.
fn system_call(number: &str) -> String {
    const NAMES: &[(libc::c_long, &str)] = &[
        (libc::SYS_read, "read"),
        (libc::SYS_write, "write"),
        (libc::SYS_readv, "readv"),
        (libc::SYS_writev, "writev"),
        (libc::SYS_preadv, "preadv"),
        (libc::SYS_preadv2, "preadv2"),
        (libc::SYS_pread64, "pread64"),
        (libc::SYS_pwritev, "pwritev"),
        (libc::SYS_pwritev2, "pwritev2"),
        (libc::SYS_ioctl, "ioctl"),
        (libc::SYS_ppoll, "ppoll"),
        (libc::SYS_epoll_wait, "epoll_wait"),
        (libc::SYS_epoll_pwait, "epoll_pwait"),
        (libc::SYS_epoll_ctl, "epoll_ctl"),
        (libc::SYS_futex, "futex"),
        (libc::SYS_io_uring_enter, "io_uring_enter"),
        (libc::SYS_recvmsg, "recvmsg"),
        (libc::SYS_sendmsg, "sendmsg"),
        (libc::SYS_recvfrom, "recvfrom"),
        (libc::SYS_openat, "openat"),
        (libc::SYS_openat2, "openat2"),
        (libc::SYS_open_by_handle_at, "open_by_handle_at"),
        (libc::SYS_name_to_handle_at, "name_to_handle_at"),
        (libc::SYS_close, "close"),
        (libc::SYS_statx, "statx"),
        (libc::SYS_newfstatat, "newfstatat"),
        (libc::SYS_getdents64, "getdents64"),
        (libc::SYS_lseek, "lseek"),
        (libc::SYS_fcntl, "fcntl"),
        (libc::SYS_setresuid, "setresuid"),
        (libc::SYS_setresgid, "setresgid"),
        (libc::SYS_setgroups, "setgroups"),
        (libc::SYS_capset, "capset"),
        (libc::SYS_poll, "poll"),
        (libc::SYS_sched_yield, "sched_yield"),
    ];
    let parsed = number.parse::<libc::c_long>().ok();
    let known = NAMES.iter().find(|(known, _)| Some(*known) == parsed);
    known.map_or_else(|| number.to_owned(), |(_, name)| (*name).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORD: &str = "# tracer: nop\n\
         vcpu 0-12     [000] .....     1.000000: kvm_userspace_exit: reason KVM_EXIT_IO (2)\n\
         vcpu 0-12     [000] .....     2.000001: kvm_userspace_exit: reason KVM_EXIT_IO (2)\n\
         vcpu 0-12     [000] .....     2.000002: kvm_userspace_exit: reason restart (4)\n\
         vcpu 0-12     [000] .....     2.000003: kvm_exit: vcpu 0 reason hlt rip 0xffffffff8 info1 0x0\n\
         a-b-c-7       [001] .....     2.000004: sys_enter: NR 0 (3, 7f, 8, 0, 0, 0)\n\
         a-b-c-7       [001] .....     2.000004: sys_enter: NR 9999 (3, 7f, 8, 0, 0, 0)\n\
         us-9          [001] .....     2.000004: sys_enter: NR 0 (3, 7f, 8, 0, 0, 0)\n\
         a-b-c-7       [001] d....     2.000005: sched_switch: prev_comm=a-b-c prev_pid=7 prev_prio=120 prev_state=S ==> next_comm=vcpu next_pid=12 next_prio=120\n\
         vcpu-12       [001] d....     2.000006: sched_switch: prev_comm=vcpu prev_pid=12 prev_prio=120 prev_state=S ==> next_comm=swapper/0 next_pid=0 next_prio=120\n\
         vcpu 0-12     [000] .....     3.000000: kvm_userspace_exit: reason KVM_EXIT_MMIO (6)\n";

    fn counts(pairs: &[(&str, u64)]) -> Counts {
        pairs
            .iter()
            .map(|(name, count)| ((*name).to_owned(), *count))
            .collect()
    }

    #[test]
    fn what_happened_in_between_is_counted_by_name() {
        let counted = count(RECORD, "us", Duration::from_secs(2)..Duration::from_secs(3));
        let expected = Counted {
            userspace_exits: counts(&[("io", 1), ("restart", 1)]),
            exits: counts(&[("hlt", 1)]),
            syscalls: counts(&[("read", 1), ("9999", 1)]),
            switches: counts(&[("vcpu", 1)]),
        };
        assert_eq!(counted, expected);
    }

    #[test]
    fn the_whole_record_is_counted_where_no_time_is_too_late() {
        let counted = count(RECORD, "us", Duration::ZERO..Duration::MAX);
        assert_eq!(
            counted.userspace_exits,
            counts(&[("io", 2), ("restart", 1), ("mmio", 1)])
        );
    }
}
