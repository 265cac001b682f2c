//! The cgroup of a VM on the host, below its pod's: the VMM is born into it, so that what a VM uses counts as its pod's, and its end is the
//! end of everything in it. Version 2 alone (Documentation/admin-guide/cgroup-v2.rst).
//!
//! `linux.cgroupsPath` of the pod's first container says where: a path below the root of the hierarchy, or `SLICE:PREFIX:NAME` of the systemd
//! driver. It is made by mkdir(2) in both forms, without systemd: systemd leaves cgroups alone that it does not know, and the slices are there. Limits
//! are the pod's own, above, and none is written here. Calls may block in the kernel: from an event loop they belong on a blocking thread.

use capsid_owner::escape::Line;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, XattrFlags, getxattr, setxattr};
use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

/// Where every distribution mounts it.
const HIERARCHY: &str = "/sys/fs/cgroup";
/// Longest `cgroupsPath`, in bytes, and longest name of one cgroup (NAME_MAX).
const PATH_MAX_BYTES: usize = 4096;
const NAME_MAX_BYTES: usize = 255;
/// Longest file read, in bytes: each that is read here has a few lines.
const FILE_MAX_BYTES: u64 = 4096;
/// The extended attribute that says whose a cgroup is. Kernels have it for cgroups since 5.7, and it goes with the cgroup.
const MARK: &str = "user.capsid";
/// How long killed processes may take to be gone.
const EMPTY_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a `cgroupsPath` is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{shown} is neither a path below the root of cgroups, without .., nor SLICE:PREFIX:NAME")]
pub struct BadCgroupPath {
    shown: String,
}

/// A place in the hierarchy: at least one name, none of them `..`, relative to its root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CgroupPath(PathBuf);

/// What limits there are above a VM, as its cgroups say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// memory.max of the pod's cgroup, in bytes; none: no limit.
    pub memory_pod: Option<u64>,
    /// The tightest memory.max of the pod's cgroup and all above it, in bytes; none: no limit.
    pub memory: Option<u64>,
    /// cpu.max of the pod's cgroup: quota and period in µs; none: no limit.
    pub cpu_pod: Option<(u64, u64)>,
}

/// Why a cgroup cannot be had, or does not go.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// Version 1, or none.
    #[error(
        "{} is not cgroup v2, which Capsid needs: boot the host with systemd.unified_cgroup_hierarchy=1, or mount cgroup2 there", root.display()
    )]
    NotV2 {
        /// Where it was looked for.
        root: PathBuf,
    },
    /// Mounted read-only.
    #[error("{} is read-only: containerd must run where it may make cgroups (a container needs --privileged --cgroupns=host)", path.display())]
    ReadOnly {
        /// What was to be made.
        path: PathBuf,
    },
    /// Somebody else's.
    #[error("{} has processes in it already: another container has the same cgroup", path.display())]
    InUse {
        /// Which.
        path: PathBuf,
    },
    /// A file of it.
    #[error("{doing} {}", path.display())]
    File {
        /// "reading", "writing", ...
        doing: &'static str,
        /// Which.
        path: PathBuf,
        /// errno.
        #[source]
        cause: io::Error,
    },
    /// Killed processes that stay.
    #[error("{} was not empty {limit_ms} ms after its processes were killed", path.display())]
    NotEmpty {
        /// Which.
        path: PathBuf,
        /// For how long was waited.
        limit_ms: u128,
    },
}

impl CgroupPath {
    /// Takes `linux.cgroupsPath`: `/kubepods/pod1/id`, or `kubepods-pod1.slice:cri-containerd:id` for
    /// `kubepods.slice/kubepods-pod1.slice/cri-containerd-id.scope` (systemd.slice(5)).
    ///
    /// # Errors
    /// It is neither.
    pub fn parse(path: &Path) -> Result<CgroupPath, BadCgroupPath> {
        let text = path.to_str().filter(|text| text.len() <= PATH_MAX_BYTES);
        let place = text.and_then(
            |text| match text.split(':').collect::<Vec<_>>().as_slice() {
                [_] => Some(PathBuf::from(text)),
                [slice, prefix, name] => {
                    let mut place = slices(slice)?;
                    place.push(unit(prefix, name)?);
                    Some(place)
                }
                _ => None,
            },
        );
        let place = place.and_then(|place| names(&place));
        place.map(CgroupPath).ok_or_else(|| BadCgroupPath {
            shown: Line(path.as_os_str().as_encoded_bytes()).to_string(),
        })
    }
}

impl fmt::Display for CgroupPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.display().fmt(f)
    }
}

/// The names of a path alone; none if there is none, or one that no cgroup can have.
fn names(path: &Path) -> Option<PathBuf> {
    let mut names = PathBuf::new();
    for part in path.components() {
        match part {
            Component::RootDir | Component::CurDir => {}
            Component::Normal(name) if is_name(name) => names.push(name),
            Component::Normal(_) | Component::ParentDir | Component::Prefix(_) => return None,
        }
    }
    Some(names).filter(|names| !names.as_os_str().is_empty())
}

fn is_name(name: &OsStr) -> bool {
    let bytes = name.as_encoded_bytes();
    bytes.len() <= NAME_MAX_BYTES && !bytes.iter().any(u8::is_ascii_control)
}

/// `a-b.slice` is in `a.slice`, and `-.slice` is the root; none given is `system.slice`, as for runc.
fn slices(slice: &str) -> Option<PathBuf> {
    let name = match slice {
        "" => "system",
        "-.slice" => return Some(PathBuf::new()),
        slice => slice.strip_suffix(".slice")?,
    };
    if name.contains('/') || name.split('-').any(str::is_empty) {
        return None;
    }
    let ends = name.match_indices('-').map(|(end, _)| end);
    let ends = ends.chain([name.len()]);
    Some(
        ends.filter_map(|end| name.get(..end))
            .map(|name| format!("{name}.slice"))
            .collect(),
    )
}

/// A scope, or what is named as a slice itself.
fn unit(prefix: &str, name: &str) -> Option<String> {
    match (prefix, name) {
        (_, "") => None,
        (prefix, name) if prefix.contains('/') || name.contains('/') => None,
        (_, slice) if slice.ends_with(".slice") => Some(slice.to_owned()),
        ("", name) => Some(format!("{name}.scope")),
        (prefix, name) => Some(format!("{prefix}-{name}.scope")),
    }
}

/// The host's hierarchy of cgroups.
#[derive(Clone, Debug)]
pub struct Hierarchy {
    root: PathBuf,
}

impl Hierarchy {
    /// The one at `/sys/fs/cgroup`.
    ///
    /// # Errors
    /// It is not version 2.
    pub fn find() -> Result<Hierarchy, CgroupError> {
        Hierarchy::at(Path::new(HIERARCHY))
    }

    fn at(root: &Path) -> Result<Hierarchy, CgroupError> {
        let root = root.to_owned();
        match rustix::fs::statfs(&root) {
            Ok(found) if found.f_type == libc::CGROUP2_SUPER_MAGIC => Ok(Hierarchy { root }),
            Ok(_) | Err(_) => Err(CgroupError::NotV2 { root }),
        }
    }

    /// The limits above a VM in this place. Cgroups that are not there yet, and controllers that are off, limit nothing.
    ///
    /// # Errors
    /// A file that cannot be read, or is not what it should be.
    pub fn room(&self, place: &CgroupPath) -> Result<Room, CgroupError> {
        let mut room = Room::default();
        let above = place.0.ancestors().skip(1);
        for (level, names) in above
            .filter(|names| !names.as_os_str().is_empty())
            .enumerate()
        {
            let directory = self.root.join(names);
            let memory = limit(&directory.join("memory.max"), memory_max)?;
            room.memory = room.memory.into_iter().chain(memory).min();
            if level == 0 {
                room.memory_pod = memory;
                room.cpu_pod = limit(&directory.join("cpu.max"), cpu_max)?;
            }
        }
        Ok(room)
    }

    /// Makes the cgroup, with those above it that are not there: they stay, as they do with runc. An empty one that an earlier shim left is
    /// taken over.
    ///
    /// # Errors
    /// It cannot be made, or has processes in it.
    pub fn make(&self, place: &CgroupPath) -> Result<Cgroup, CgroupError> {
        let path = self.root.join(&place.0);
        fs::create_dir_all(&path).map_err(|cause| match cause.kind() {
            io::ErrorKind::ReadOnlyFilesystem => CgroupError::ReadOnly { path: path.clone() },
            _ => failed("making", &path)(cause),
        })?;
        if is_populated(&path)? {
            return Err(CgroupError::InUse { path });
        }
        let cgroup = Cgroup { path, gone: false };
        let marked = setxattr(&cgroup.path, MARK, b"1", XattrFlags::empty());
        marked.map_err(|errno| failed("marking", &cgroup.path)(errno.into()))?;
        Ok(cgroup)
    }

    /// Moves a process into a cgroup that is there: the shim itself, where containerd's configuration wants it (`ShimCgroup`).
    ///
    /// # Errors
    /// There is no such cgroup, or it takes no processes.
    pub fn enter(&self, place: &CgroupPath, pid: u32) -> Result<(), CgroupError> {
        let path = self.root.join(&place.0).join("cgroup.procs");
        // Not `fs::write`, which would make the file in a directory that is no cgroup.
        let opened = File::options().write(true).open(&path);
        let mut file = opened.map_err(failed("opening", &path))?;
        let written = file.write_all(pid.to_string().as_bytes());
        written.map_err(failed("writing", &path))
    }

    /// What a shim that was killed has left in this place: a cgroup that one has made, or an empty one. Not one of somebody else, who was there first.
    ///
    /// # Errors
    /// It cannot be looked at.
    pub fn left(&self, place: &CgroupPath) -> Result<Option<Cgroup>, CgroupError> {
        let path = self.root.join(&place.0);
        let marked = getxattr(&path, MARK, &mut [0; 8]).is_ok();
        match is_populated(&path) {
            Err(CgroupError::File { cause, .. }) if is_gone(&cause) => Ok(None),
            Ok(true) if !marked => Ok(None),
            looked => looked.map(|_| Some(Cgroup { path, gone: false })),
        }
    }
}

/// A cgroup of ours. Dropping it kills what is in it and removes it; [`Cgroup::remove`] also says how that went.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    gone: bool,
}

impl Cgroup {
    /// Its `cgroup.procs`, open for writing: a new child that writes `0` to it is in this cgroup before it is anything else.
    ///
    /// # Errors
    /// The cgroup is gone.
    pub fn entrance(&self) -> Result<OwnedFd, CgroupError> {
        let path = self.path.join("cgroup.procs");
        let opened = rustix::fs::open(&path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
        opened.map_err(|errno| failed("opening", &path)(errno.into()))
    }

    /// Kills everything in it, waits until that is gone, which takes at most five seconds, and removes it. Gone already is done.
    ///
    /// # Errors
    /// A process that does not die, or a cgroup below it that is not ours.
    pub fn remove(mut self) -> Result<(), CgroupError> {
        self.gone = true;
        self.end()
    }

    fn end(&self) -> Result<(), CgroupError> {
        let kill = self.path.join("cgroup.kill");
        match fs::write(&kill, "1") {
            Err(cause) if is_gone(&cause) => return Ok(()),
            written => written.map_err(failed("writing", &kill))?,
        }
        self.wait_until_empty()?;
        match fs::remove_dir(&self.path) {
            Err(cause) if is_gone(&cause) => Ok(()),
            removed => removed.map_err(failed("removing", &self.path)),
        }
    }

    /// The kernel wakes pollers of cgroup.events when it changes.
    fn wait_until_empty(&self) -> Result<(), CgroupError> {
        let path = self.path.join("cgroup.events");
        let mut file = File::open(&path).map_err(failed("opening", &path))?;
        let until = Instant::now() + EMPTY_TIMEOUT;
        while read_populated(&mut file).map_err(failed("reading", &path))? {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(CgroupError::NotEmpty {
                    path: self.path.clone(),
                    limit_ms: EMPTY_TIMEOUT.as_millis(),
                });
            }
            let timeout = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            match poll(&mut [PollFd::new(&file, PollFlags::PRI)], Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(failed("polling", &path)(errno.into())),
            }
        }
        Ok(())
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if !self.gone {
            // Whoever wants to know how it went calls `remove`. What stays, the next `delete` of the container removes.
            let _unsaid = self.end();
        }
    }
}

fn failed(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |cause| CgroupError::File { doing, path, cause }
}

/// The cgroup was removed: ENOENT at open, ENODEV at read or write.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

fn is_populated(cgroup: &Path) -> Result<bool, CgroupError> {
    let path = cgroup.join("cgroup.events");
    let mut file = File::open(&path).map_err(failed("opening", &path))?;
    read_populated(&mut file).map_err(failed("reading", &path))
}

fn read_populated(file: &mut File) -> io::Result<bool> {
    let mut text = String::new();
    file.rewind()?;
    file.take(FILE_MAX_BYTES).read_to_string(&mut text)?;
    Ok(text.lines().any(|line| line == "populated 1"))
}

/// The limit that a file names; none where the file is not there or says `max`.
fn limit<T>(path: &Path, parse: fn(&str) -> Option<Option<T>>) -> Result<Option<T>, CgroupError> {
    let mut text = String::new();
    let read =
        File::open(path).and_then(|file| file.take(FILE_MAX_BYTES).read_to_string(&mut text));
    match read {
        Err(cause) if is_gone(&cause) => return Ok(None),
        read => read.map_err(failed("reading", path))?,
    };
    let parsed = parse(text.trim_end());
    parsed.ok_or_else(|| failed("reading", path)(io::ErrorKind::InvalidData.into()))
}

/// `max`, or bytes.
fn memory_max(text: &str) -> Option<Option<u64>> {
    match text {
        "max" => Some(None),
        bytes => bytes.parse().ok().map(Some),
    }
}

/// `QUOTA PERIOD` in µs; a quota of `max` is no limit.
fn cpu_max(text: &str) -> Option<Option<(u64, u64)>> {
    match text.split_once(' ')? {
        ("max", _) => Some(None),
        (quota, period) => Some(Some((quota.parse().ok()?, period.parse().ok()?))),
    }
}

#[cfg(test)]
#[path = "cgroup_tests.rs"]
mod tests;
