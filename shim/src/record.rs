//! What is left in the bundle for the `delete` action, which runs when the server is gone: which processes and which cgroup to end.
//!
//! A pid alone may be somebody else's by then, so each comes with the time at which it started (proc_pid_stat(5), field 22).

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// Its name in the bundle.
const NAME: &str = "capsid.json";
/// The name of what is known of one container.
const TASK_NAME: &str = "capsid-task.json";
/// Longest record that is read, in bytes.
const MAX_BYTES: u64 = 16 << 10;

/// A process that can be told from a later one with its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Started {
    /// Its number.
    pub pid: u32,
    /// Clock ticks after the boot of the host.
    pub start_ticks: u64,
}

impl Started {
    /// The process that has this pid now.
    pub fn now(pid: u32) -> Option<Started> {
        Some(Started {
            pid,
            start_ticks: start_ticks(pid)?,
        })
    }

    /// A handle on it, if it is still there.
    pub fn open(self) -> Option<OwnedFd> {
        let pid = Pid::from_raw(i32::try_from(self.pid).ok()?)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        // Asked after it was opened: the handle means whoever has the number now.
        (start_ticks(self.pid) == Some(self.start_ticks)).then_some(pidfd)
    }

    /// Kills it; a handle to wait for its end by, if it was there.
    pub fn kill(self) -> Option<OwnedFd> {
        let pidfd = self.open()?;
        // Fails only when it has ended already.
        let _ended = pidfd_send_signal(&pidfd, Signal::KILL);
        Some(pidfd)
    }
}

fn start_ticks(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is a name in parentheses, which may hold anything.
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.split(' ').nth(19)?.parse().ok()
}

/// The record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// The group that the server serves.
    pub group: String,
    /// The server.
    pub shim: Option<Started>,
    /// Its socket.
    pub socket: PathBuf,
    /// The server ends by itself, and is to be waited for.
    #[serde(default)]
    pub ends: bool,
    /// The VMM, once there is one.
    pub vmm: Option<Started>,
    /// The VMM's cgroup, once there is one, relative to the hierarchy.
    pub cgroup: Option<String>,
}

impl Record {
    /// That of a server that begins.
    pub fn of_this_process(group: &str, socket: &Path) -> Record {
        Record {
            group: group.to_owned(),
            shim: Started::now(std::process::id()),
            socket: socket.to_owned(),
            ends: false,
            vmm: None,
            cgroup: None,
        }
    }

    /// Writes it into the bundle, whole or not at all.
    ///
    /// # Errors
    /// The bundle's file system does not take it.
    pub fn write(&self, bundle: &Path) -> io::Result<()> {
        write(self, bundle, NAME)
    }

    /// Reads it from a bundle; `None` if there is none.
    ///
    /// # Errors
    /// It cannot be read, or is none of ours.
    pub fn read(bundle: &Path) -> io::Result<Option<Record>> {
        read(bundle, NAME)
    }
}

/// What each container's bundle says as long as the container is not deleted in good order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskRecord {
    /// The task's pid.
    pub pid: u32,
}

impl TaskRecord {
    /// As [`Record::write`].
    ///
    /// # Errors
    /// The same.
    pub fn write(self, bundle: &Path) -> io::Result<()> {
        write(&self, bundle, TASK_NAME)
    }

    /// As [`Record::read`].
    ///
    /// # Errors
    /// The same.
    pub fn read(bundle: &Path) -> io::Result<Option<TaskRecord>> {
        read(bundle, TASK_NAME)
    }

    /// Its container is deleted. A bundle that is gone took it along.
    pub fn remove(bundle: &Path) {
        let _gone = fs::remove_file(bundle.join(TASK_NAME));
    }
}

fn write(record: &impl Serialize, bundle: &Path, name: &str) -> io::Result<()> {
    let json = serde_json::to_vec(record)?;
    let new = bundle.join(format!("{name}.new"));
    fs::File::create(&new)?.write_all(&json)?;
    fs::rename(new, bundle.join(name))
}

fn read<T: DeserializeOwned>(bundle: &Path, name: &str) -> io::Result<Option<T>> {
    let file = match fs::File::open(bundle.join(name)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let record = serde_json::from_reader(io::Read::take(file, MAX_BYTES));
    Ok(Some(record?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn bundle(name: &str) -> PathBuf {
        let path =
            std::env::temp_dir().join(format!("capsid-record-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).expect("writable");
        path
    }

    #[test]
    fn a_record_reads_back_and_none_is_none() {
        let bundle = bundle("reads-back");
        assert!(Record::read(&bundle).expect("readable").is_none());
        let record = Record::of_this_process("g1", Path::new("/run/s"));
        record.write(&bundle).expect("writable");
        let read = Record::read(&bundle).expect("readable").expect("written");
        fs::remove_dir_all(&bundle).expect("ours");
        assert_eq!(read, record);
        let shim = read.shim.expect("we are there");
        assert!(shim.open().is_some());
    }

    #[test]
    fn a_process_that_took_over_a_number_is_spared() {
        let mut child = Command::new("sleep").arg("1000").spawn().expect("sleep");
        let mut started = Started::now(child.id()).expect("there");
        started.start_ticks += 1;
        assert!(started.kill().is_none());
        assert!(child.try_wait().expect("ours").is_none(), "it runs on");
        started.start_ticks -= 1;
        assert!(started.kill().is_some());
        child.wait().expect("ours");
        assert!(started.open().is_none(), "it is gone");
    }

    #[test]
    fn a_record_that_is_none_is_an_error() {
        let bundle = bundle("broken");
        fs::write(bundle.join(NAME), "{").expect("writable");
        let read = Record::read(&bundle);
        fs::remove_dir_all(&bundle).expect("ours");
        assert!(read.is_err());
    }
}
