//! One container's cgroup (v2): its processes, its limits, its end; its figures are read in `figures.rs`. Every call may block in the kernel
//! (a reader of memory.stat waits for a flush), so all of it runs on blocking threads and under no lock.
//! File formats: Documentation/admin-guide/cgroup-v2.rst.

use crate::figures::Keyed;
use libcgroups::common::{CgroupManager, ControllerOpt};
use oci_spec::runtime::LinuxResources;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Longest file read, in bytes (io.stat has a line a device, cgroup.procs one a process).
const FILE_MAX_BYTES: u64 = 4 << 20;
/// Most cgroups that a container's own tree may hold for `pids` and removal to walk it.
const TREE_MAX_COUNT: usize = 4096;
/// How long freezing or thawing may take.
const FREEZE_TIMEOUT_MS: u64 = 5_000;
/// How long killed processes may take to be gone.
const EMPTY_TIMEOUT_MS: u64 = 5_000;

/// Why a cgroup does not do what it is told.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// A file of it.
    #[error("{doing} {path}")]
    File {
        /// "reading", "writing", ...
        doing: &'static str,
        /// Which.
        path: PathBuf,
        /// errno.
        #[source]
        cause: io::Error,
    },
    /// cgroup.events did not change in time.
    #[error("{path} did not become {what} within {limit_ms} ms")]
    Timeout {
        /// Its cgroup.
        path: PathBuf,
        /// What was waited for.
        what: &'static str,
        /// For how long.
        limit_ms: u64,
    },
    /// A limit that the kernel does not take.
    #[error("applying the limits: {0}")]
    Limits(String),
}

/// The cgroup of one container.
#[derive(Clone, Debug)]
pub struct Cgroup {
    root: PathBuf,
    name: PathBuf,
    path: PathBuf,
}

impl Cgroup {
    /// The cgroup of container `id` below `root`, the mount point of cgroup2. It may not exist yet.
    pub fn of(root: &Path, id: &str) -> Cgroup {
        let name = Path::new("capsid").join(id);
        Cgroup {
            root: root.into(),
            path: root.join(&name),
            name: Path::new("/").join(name),
        }
    }

    /// Makes it, with the controllers that its parents give on.
    ///
    /// # Errors
    /// It is there already, or there is no cgroup2.
    pub fn make(&self) -> Result<(), CgroupError> {
        let parent = self.path.parent().unwrap_or(&self.root);
        match fs::create_dir(parent) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            result => result.map_err(failed("making", parent.into()))?,
        }
        fs::create_dir(&self.path).map_err(failed("making", self.path.clone()))
    }

    /// How many processes the OOM killer has taken; 0 without a memory controller.
    ///
    /// # Errors
    /// The cgroup is gone.
    pub fn oom_kills(&self) -> Result<u64, CgroupError> {
        let events = self.optional("memory.events")?.unwrap_or_default();
        Ok(Keyed::parse(&events).get("oom_kill"))
    }

    /// memory.events, open for polling; `None` without a memory controller.
    ///
    /// # Errors
    /// The cgroup is gone.
    pub fn memory_events(&self) -> Result<Option<File>, CgroupError> {
        let path = self.path.join("memory.events");
        match File::open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            result => result.map(Some).map_err(failed("opening", path)),
        }
    }

    /// The pids of all its processes, those in cgroups that it made itself too.
    ///
    /// # Errors
    /// The cgroup is gone.
    pub fn pids(&self) -> Result<Vec<u32>, CgroupError> {
        let mut pids = Vec::new();
        for directory in self.tree()? {
            let path = directory.join("cgroup.procs");
            match read_bounded(&path) {
                // Threaded cgroups (EOPNOTSUPP) show their processes in the domain above.
                Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
                // Removed by the container in between.
                Err(e) if is_gone(&e) && directory != self.path => {}
                result => {
                    let text = result.map_err(failed("reading", path))?;
                    pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
                }
            }
        }
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    /// Kills every process in it, new ones included (cgroup.kill).
    ///
    /// # Errors
    /// The cgroup is gone.
    pub fn kill(&self) -> Result<(), CgroupError> {
        self.write("cgroup.kill", "1")
    }

    /// Freezes or thaws it and waits for that.
    ///
    /// # Errors
    /// It is gone, or a process cannot be frozen in time (it waits in the kernel for a dead device).
    pub fn freeze(&self, frozen: bool) -> Result<(), CgroupError> {
        self.write("cgroup.freeze", if frozen { "1" } else { "0" })?;
        let what = if frozen { "frozen" } else { "thawed" };
        self.wait_for("frozen", u64::from(frozen), what, FREEZE_TIMEOUT_MS)
    }

    /// Sets the limits given, leaving the others as they are.
    ///
    /// # Errors
    /// One that the kernel does not take.
    pub fn update(&self, resources: &LinuxResources) -> Result<(), CgroupError> {
        let manager = libcgroups::v2::manager::Manager::new(self.root.clone(), self.name.clone());
        let options = ControllerOpt {
            resources,
            disable_oom_killer: false,
            oom_score_adj: None,
            freezer_state: None,
        };
        let limits = |e: libcgroups::v2::manager::V2ManagerError| {
            CgroupError::Limits(crate::last_words::chain(&e))
        };
        manager.map_err(limits)?.apply(&options).map_err(limits)
    }

    /// Its directory, to be born in (clone3 CLONE_INTO_CGROUP).
    ///
    /// # Errors
    /// The cgroup is gone.
    pub fn directory(&self) -> Result<OwnedFd, CgroupError> {
        open_directory(&self.path)
    }

    /// The directory of the cgroup that process `pid` is in, if that is this one or below it. A container that
    /// may write its cgroups keeps its processes in the leaves (systemd and dockerd do), and nobody can be born
    /// in a cgroup whose controllers are given on. None too where the process has ended, or moved and removed that
    /// cgroup while we looked: the container may do so at any time.
    ///
    /// # Errors
    /// /proc or the directory cannot be read.
    pub fn directory_of(&self, pid: u32) -> Result<Option<OwnedFd>, CgroupError> {
        let file = PathBuf::from(format!("/proc/{pid}/cgroup"));
        let text = match read_bounded(&file) {
            Err(e) if is_gone(&e) || e.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
            result => result.map_err(failed("reading", file))?,
        };
        let Some(below) = v2_path(&text).and_then(|path| path.strip_prefix(&self.name).ok()) else {
            return Ok(None);
        };
        match open_directory(&self.path.join(below)) {
            Err(CgroupError::File { cause, .. }) if is_gone(&cause) => Ok(None),
            result => result.map(Some),
        }
    }

    /// Kills what is left in it, waits for that, and removes it with the cgroups made below it.
    ///
    /// # Errors
    /// A process that does not die, or a cgroup that cannot be removed. Gone already is done.
    pub fn remove(&self) -> Result<(), CgroupError> {
        match self.kill() {
            Err(CgroupError::File { cause, .. }) if is_gone(&cause) => return Ok(()),
            result => result?,
        }
        self.wait_for("populated", 0, "empty", EMPTY_TIMEOUT_MS)?;
        for directory in self.tree()?.into_iter().rev() {
            match fs::remove_dir(&directory) {
                Err(e) if is_gone(&e) => {}
                result => result.map_err(failed("removing", directory))?,
            }
        }
        Ok(())
    }

    /// It and every cgroup below, parents first.
    fn tree(&self) -> Result<Vec<PathBuf>, CgroupError> {
        let mut all = vec![self.path.clone()];
        let mut next = 0;
        while let Some(directory) = all.get(next).cloned() {
            next += 1;
            let entries = match fs::read_dir(&directory) {
                Err(e) if is_gone(&e) && directory != self.path => continue,
                result => result.map_err(failed("listing", directory))?,
            };
            for entry in entries.flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) && all.len() < TREE_MAX_COUNT {
                    all.push(entry.path());
                }
            }
        }
        Ok(all)
    }

    /// Waits until `key` of cgroup.events is `value`: the kernel wakes pollers of that file.
    fn wait_for(
        &self,
        key: &str,
        value: u64,
        what: &'static str,
        limit_ms: u64,
    ) -> Result<(), CgroupError> {
        let path = self.path.join("cgroup.events");
        let mut file = File::open(&path).map_err(failed("opening", path.clone()))?;
        let until = Instant::now() + Duration::from_millis(limit_ms);
        loop {
            let mut text = String::new();
            file.rewind().map_err(failed("reading", path.clone()))?;
            let read = file.by_ref().take(FILE_MAX_BYTES).read_to_string(&mut text);
            read.map_err(failed("reading", path.clone()))?;
            if Keyed::parse(&text).get(key) == value {
                return Ok(());
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let path = self.path.clone();
                return Err(CgroupError::Timeout {
                    path,
                    what,
                    limit_ms,
                });
            }
            let timeout = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            let mut fds = [PollFd::new(&file, PollFlags::PRI)];
            match poll(&mut fds, Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(failed("polling", path)(e.into())),
            }
        }
    }

    pub(crate) fn read(&self, name: &str) -> Result<String, CgroupError> {
        let path = self.path.join(name);
        read_bounded(&path).map_err(failed("reading", path))
    }

    /// A file that exists only with its controller; an error only if the whole cgroup is gone.
    pub(crate) fn optional(&self, name: &str) -> Result<Option<String>, CgroupError> {
        match self.read(name) {
            Err(CgroupError::File { cause, .. }) if cause.kind() == io::ErrorKind::NotFound => {
                Ok(None)
            }
            result => result.map(Some),
        }
    }

    fn write(&self, name: &str, value: &str) -> Result<(), CgroupError> {
        let path = self.path.join(name);
        fs::write(&path, value).map_err(failed("writing", path))
    }
}

fn failed(doing: &'static str, path: PathBuf) -> impl FnOnce(io::Error) -> CgroupError {
    move |cause| CgroupError::File { doing, path, cause }
}

/// The cgroup was removed: ENOENT at open, ENODEV at read or write.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

fn open_directory(path: &Path) -> Result<OwnedFd, CgroupError> {
    let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::DIRECTORY | OFlags::NOFOLLOW;
    rustix::fs::open(path, flags, Mode::empty())
        .map_err(|e| failed("opening", path.into())(e.into()))
}

/// The path of cgroup v2 in /proc/<pid>/cgroup; none of a path that the kernel shows as outside or deleted.
fn v2_path(text: &str) -> Option<&Path> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
    let plain = path.starts_with('/') && !path.starts_with("/..") && !path.ends_with(" (deleted)");
    plain.then(|| Path::new(path))
}

fn read_bounded(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?
        .take(FILE_MAX_BYTES)
        .read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_cgroup_that_is_there_is_found_in_proc() {
        assert_eq!(
            v2_path("0::/capsid/c1/init\n"),
            Some(Path::new("/capsid/c1/init"))
        );
        assert_eq!(v2_path("1:name=systemd:/x\n0::/\n"), Some(Path::new("/")));
        assert_eq!(v2_path("0::/../outside\n"), None);
        assert_eq!(v2_path("0::/capsid/c1/gone (deleted)\n"), None);
        assert_eq!(v2_path(""), None);
    }

    #[test]
    fn a_process_that_ended_or_left_is_in_no_cgroup_of_ours() {
        let cgroup = Cgroup::of(Path::new("/sys/fs/cgroup"), "never-made");
        let mut ended = std::process::Command::new("true").spawn().expect("spawn");
        ended.wait().expect("wait");
        assert!(matches!(cgroup.directory_of(ended.id()), Ok(None)));
        assert!(matches!(cgroup.directory_of(std::process::id()), Ok(None)));
    }
}
