//! The end of everything that our children started, also of what went into a session of its own, as apt's dpkg does.
//!
//! A process belongs to a child of ours by its parent, its group or its session. Each is killed by a pidfd and waited for, and
//! then it is looked again, because a process may have forked while it was being killed.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, getpid, pidfd_open, pidfd_send_signal};

/// A process that the kernel told about.
#[derive(Debug, Clone, Copy)]
struct Process {
    pid: i32,
    parent: i32,
    group: i32,
    session: i32,
    /// It has ended and waits for its parent.
    ended: bool,
}

/// Kills these children of ours with everything that they started. What has not ended at the deadline was still killed.
pub(super) fn kill(leaders: &[Pid], deadline: Instant) {
    let mut doomed: BTreeSet<i32> = leaders
        .iter()
        .map(|pid| pid.as_raw_nonzero().get())
        .collect();
    while !doomed.is_empty() && Instant::now() < deadline {
        let all = all();
        spread(&mut doomed, &all);
        let living = all
            .iter()
            .filter(|one| doomed.contains(&one.pid) && !one.ended);
        let killed: Vec<OwnedFd> = living
            .filter_map(|one| signal(Pid::from_raw(one.pid)?, Signal::KILL))
            .collect();
        if killed.is_empty() {
            return;
        }
        for process in &killed {
            ended(process, deadline);
        }
    }
}

/// Sends a signal; returns what the process's end can be waited for with. None when it has ended, or is not ours to signal.
pub(super) fn signal(pid: Pid, signal: Signal) -> Option<OwnedFd> {
    let process = pidfd_open(pid, PidfdFlags::empty()).ok()?;
    pidfd_send_signal(&process, signal).ok()?;
    Some(process)
}

/// Waits for the end of a process; whether it came before the deadline.
pub(super) fn ended(process: &OwnedFd, deadline: Instant) -> bool {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match poll(
            &mut [PollFd::new(process, PollFlags::IN)],
            Some(&timespec(left)),
        ) {
            Err(rustix::io::Errno::INTR) => {}
            Ok(ready) => return ready > 0,
            // It cannot be waited for; it was signalled all the same.
            Err(_) => return false,
        }
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}

/// Adds every process that belongs to one of these. What was added stays: the orphans of a process that has ended are known by
/// the group or the session that it led.
fn spread(doomed: &mut BTreeSet<i32>, all: &[Process]) {
    let ours = getpid().as_raw_nonzero().get();
    loop {
        let before = doomed.len();
        for one in all.iter().filter(|one| one.pid != ours) {
            if [one.parent, one.group, one.session]
                .iter()
                .any(|leader| doomed.contains(leader))
            {
                doomed.insert(one.pid);
            }
        }
        if doomed.len() == before {
            return;
        }
    }
}

/// Every process there is. One that ends while we look is not there.
fn all() -> Vec<Process> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter(|entry| {
            entry
                .file_name()
                .as_encoded_bytes()
                .iter()
                .all(u8::is_ascii_digit)
        })
        .filter_map(|entry| process(&std::fs::read_to_string(entry.path().join("stat")).ok()?))
        .collect()
}

/// `PID (NAME) STATE PARENT GROUP SESSION …`; the name may hold anything.
fn process(stat: &str) -> Option<Process> {
    let (pid, rest) = stat.split_once(" (")?;
    let (_, rest) = rest.rsplit_once(") ")?;
    let mut words = rest.split(' ');
    let ended = matches!(words.next()?, "Z" | "X");
    let mut number = || words.next()?.parse().ok();
    Some(Process {
        pid: pid.parse().ok()?,
        parent: number()?,
        group: number()?,
        session: number()?,
        ended,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_hold_anything() {
        let one = process("12 (a) Z (b) S 3 4 5 0 -1").expect("read");
        assert_eq!(
            (one.pid, one.parent, one.group, one.session, one.ended),
            (12, 3, 4, 5, false)
        );
        assert!(process("12 (x) Z 3 4 5").expect("read").ended);
        assert!(process("").is_none());
    }

    #[test]
    fn the_orphans_of_a_session_go_with_it() {
        let one = |pid, parent, group, session| Process {
            pid,
            parent,
            group,
            session,
            ended: false,
        };
        // 20 is our child, 21 its child, 22 a session of 21's; 23 was orphaned there; 30 is somebody else.
        let all = [
            one(23, 1, 22, 22),
            one(22, 21, 22, 22),
            one(21, 20, 20, 9),
            one(20, 10, 20, 9),
            one(30, 10, 30, 9),
        ];
        let mut doomed = BTreeSet::from([20]);
        spread(&mut doomed, &all);
        assert_eq!(doomed, BTreeSet::from([20, 21, 22, 23]));
    }
}
