//! One container's cgroup (v2): its figures, its processes, its end. Every call may block in the kernel
//! (a reader of memory.stat waits for a flush), so all of it runs on blocking threads and under no lock.
//! File formats: Documentation/admin-guide/cgroup-v2.rst.

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

/// The figures of a container. A controller that is not there counts 0; no limit is `u64::MAX`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// cpu.stat.
    pub cpu: Cpu,
    /// memory.current, memory.max, memory.stat, memory.events.
    pub memory: Memory,
    /// pids.current.
    pub pids_current: u64,
    /// pids.max.
    pub pids_limit: u64,
    /// io.stat, all devices: bytes read and written.
    pub io: (u64, u64),
}

/// cpu.stat, in µs but for the count of throttled periods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // the kernel's names
pub struct Cpu {
    pub usage_usec: u64,
    pub user_usec: u64,
    pub system_usec: u64,
    pub nr_throttled: u64,
    pub throttled_usec: u64,
}

/// The memory controller's files, in bytes but for the count of OOM kills.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // the kernel's names
pub struct Memory {
    pub current: u64,
    pub max: u64,
    pub anon: u64,
    pub file: u64,
    pub inactive_file: u64,
    pub oom_kill: u64,
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

    /// Reads all figures.
    ///
    /// # Errors
    /// The cgroup is gone.
    pub fn figures(&self) -> Result<Figures, CgroupError> {
        let limit = |name| Ok(self.optional(name)?.map_or(u64::MAX, |text| limit(&text)));
        let cpu = self.read("cpu.stat")?;
        let stat = self.optional("memory.stat")?.unwrap_or_default();
        let number = |name| Ok(self.optional(name)?.map_or(0, |text| number(&text)));
        Ok(Figures {
            cpu: Cpu {
                usage_usec: keyed(&cpu, "usage_usec"),
                user_usec: keyed(&cpu, "user_usec"),
                system_usec: keyed(&cpu, "system_usec"),
                nr_throttled: keyed(&cpu, "nr_throttled"),
                throttled_usec: keyed(&cpu, "throttled_usec"),
            },
            memory: Memory {
                current: number("memory.current")?,
                max: limit("memory.max")?,
                anon: keyed(&stat, "anon"),
                file: keyed(&stat, "file"),
                inactive_file: keyed(&stat, "inactive_file"),
                oom_kill: self.oom_kills()?,
            },
            pids_current: number("pids.current")?,
            pids_limit: limit("pids.max")?,
            io: io_bytes(&self.optional("io.stat")?.unwrap_or_default()),
        })
    }

    /// How many processes the OOM killer has taken; 0 without a memory controller.
    ///
    /// # Errors
    /// The cgroup is gone.
    pub fn oom_kills(&self) -> Result<u64, CgroupError> {
        let events = self.optional("memory.events")?.unwrap_or_default();
        Ok(keyed(&events, "oom_kill"))
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
            if keyed(&text, key) == value {
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

    fn read(&self, name: &str) -> Result<String, CgroupError> {
        let path = self.path.join(name);
        read_bounded(&path).map_err(failed("reading", path))
    }

    /// A file that exists only with its controller; an error only if the whole cgroup is gone.
    fn optional(&self, name: &str) -> Result<Option<String>, CgroupError> {
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

/// The value of `key` in a flat keyed file ("key value" a line); 0 if it is not there.
fn keyed(text: &str, key: &str) -> u64 {
    let value = text.lines().find_map(|line| {
        let (name, value) = line.split_once(' ')?;
        (name == key).then(|| number(value))
    });
    value.unwrap_or(0)
}

fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or(0)
}

/// A limit file: a number, or "max".
fn limit(text: &str) -> u64 {
    text.trim().parse().unwrap_or(u64::MAX)
}

/// rbytes and wbytes of io.stat over all devices.
fn io_bytes(text: &str) -> (u64, u64) {
    let sum = |key: &str| {
        let pairs = text.split_whitespace();
        let values = pairs.filter_map(|pair| pair.strip_prefix(key)?.parse::<u64>().ok());
        values.fold(0u64, u64::saturating_add)
    };
    (sum("rbytes="), sum("wbytes="))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CPU: &str = "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\nnr_periods 0\n";

    #[test]
    fn a_key_is_found_by_its_whole_name() {
        assert_eq!(keyed(CPU, "usage_usec"), 1500);
        assert_eq!(keyed(CPU, "usec"), 0);
    }

    #[test]
    fn a_missing_key_counts_zero() {
        assert_eq!(keyed(CPU, "throttled_usec"), 0);
    }

    #[test]
    fn max_is_no_limit() {
        assert_eq!(limit("max\n"), u64::MAX);
        assert_eq!(limit("1048576\n"), 1 << 20);
    }

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

    #[test]
    fn io_is_summed_over_devices() {
        let text = "254:0 rbytes=4096 wbytes=512 rios=1 wios=1 dbytes=0 dios=0\n\
                    254:16 rbytes=1 wbytes=2 rios=1 wios=1 dbytes=0 dios=0\n";
        assert_eq!(io_bytes(text), (4097, 514));
    }

    #[test]
    fn figures_come_from_the_files() {
        let root = std::env::temp_dir().join(format!("capsid-cgroup-{}", std::process::id()));
        let directory = root.join("capsid/c1");
        fs::create_dir_all(&directory).expect("made");
        for (name, text) in [
            ("cpu.stat", CPU),
            ("memory.current", "4096\n"),
            ("memory.max", "max\n"),
            ("memory.stat", "anon 1\nfile 2\ninactive_file 3\n"),
            ("memory.events", "low 0\noom_kill 2\n"),
            ("pids.current", "7\n"),
            ("pids.max", "100\n"),
        ] {
            fs::write(directory.join(name), text).expect("written");
        }
        let figures = Cgroup::of(&root, "c1").figures().expect("read");
        fs::remove_dir_all(&root).expect("removed");
        assert_eq!(figures.cpu.usage_usec, 1500);
        assert_eq!(figures.memory.max, u64::MAX);
        assert_eq!(figures.memory.inactive_file, 3);
        assert_eq!(figures.memory.oom_kill, 2);
        assert_eq!((figures.pids_current, figures.pids_limit), (7, 100));
        assert_eq!(figures.io, (0, 0));
    }

    #[test]
    fn a_cgroup_that_is_gone_is_an_error() {
        assert!(Cgroup::of(Path::new("/nowhere"), "c1").figures().is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_read(text: String) {
            let _ = (keyed(&text, "anon"), limit(&text), io_bytes(&text));
        }
    }
}
