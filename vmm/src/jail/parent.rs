//! The process that started this one, for a VM that is to end with it.
//!
//! In a PID namespace of its own a process sees no parent: getppid(2) answers 0 whatever becomes of it. The `/proc` that it
//! was started with is that of its parent's namespace and still tells.

use super::{JailError, step};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::{Errno, pread};
use rustix::process::{Signal, set_parent_process_death_signal};
use std::os::fd::OwnedFd;

/// Longest beginning of `/proc/PID/stat` that is read, in bytes: a number, a name of at most 16 and the parent's number.
const STAT_MAX_BYTES: usize = 128;

/// The parent at the time when the process began.
pub struct Parent {
    stat: OwnedFd,
    pid: u32,
}

impl Parent {
    /// # Errors
    /// There is no `/proc`, or it is not that of the parent's namespace.
    pub(super) fn find() -> Result<Parent, JailError> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let stat = open(c"/proc/self/stat", flags, Mode::empty());
        let stat = step("open /proc/self/stat", stat)?;
        let pid = read(&stat)?;
        Ok(Parent { stat, pid })
    }

    /// Has the process killed when its parent, the very thread that started it, ends. Behind the last change of user, which
    /// would undo it.
    ///
    /// # Errors
    /// The parent is gone already.
    pub(super) fn die_with(&self) -> Result<(), JailError> {
        let killed = set_parent_process_death_signal(Some(Signal::KILL));
        step("ask for a signal at the death of its parent", killed)?;
        if read(&self.stat)? != self.pid {
            return step("find its parent alive", Err(Errno::SRCH));
        }
        Ok(())
    }
}

fn read(stat: &OwnedFd) -> Result<u32, JailError> {
    let mut bytes = [0; STAT_MAX_BYTES];
    let length = step("read /proc/self/stat", pread(stat, &mut bytes, 0))?;
    let pid = bytes.get(..length).and_then(parent_in);
    step("find its parent in /proc", pid.ok_or(Errno::SRCH))
}

/// The fourth field of proc_pid_stat(5), behind a name that may hold anything; 0 is a parent that this `/proc` does not show.
fn parent_in(stat: &[u8]) -> Option<u32> {
    let behind_name = stat.iter().rposition(|byte| *byte == b')')? + 1;
    let text = std::str::from_utf8(stat.get(behind_name..)?).ok()?;
    let pid = text.split_ascii_whitespace().nth(1)?.parse().ok()?;
    (pid != 0).then_some(pid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parent_is_the_field_behind_name_and_state() {
        assert_eq!(parent_in(b"12 (capsid-vmm) R 34 12 0"), Some(34));
        assert_eq!(parent_in(b"12 (a) S 9 (b\xff) R 34 12 0"), Some(34));
        for bad in [
            b"".as_slice(),
            b"12 (capsid-vmm) R 0 1 1",
            b"12 (capsid-vmm) R x 1",
            b"12 (capsid-vmm) R",
            b"12 (capsid-vmm",
        ] {
            assert_eq!(parent_in(bad), None);
        }
    }

    #[test]
    fn proc_tells_the_same_as_the_kernel() {
        let parent = Parent::find().unwrap();
        assert_eq!(parent.pid, std::os::unix::process::parent_id());
    }
}
