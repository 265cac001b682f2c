//! The first milliseconds of the guest: from a bare initramfs to a place where containers can live.
//! Runs once, in PID 1, before any other thread exists. It trusts the kernel and the initramfs.
//!
//! The root that the kernel unpacks the initramfs into has no parent mount, and pivot_root(2) refuses
//! to move away from such a root (EINVAL, fs/namespace.c). So the agent first binds that root onto
//! itself, read-only, and lives in the bind: three system calls, no copy. Containers then leave it by
//! pivot_root as on any host, and the agent's program, which they reach as /proc/self/exe until their
//! own program is executed, cannot be written through it (CVE-2019-5736).
#![allow(unsafe_code)] // one ioctl that no crate wraps: bringing the loopback interface up

use crate::last_words;
use rustix::mount::{
    MountFlags, MoveMountFlags, OpenTreeFlags, mount, mount_remount, move_mount, open_tree,
};
use std::ffi::CStr;
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

/// Where the cgroup v2 hierarchy is.
pub const CGROUP_ROOT: &str = "/sys/fs/cgroup";
/// The agent's memory that reclaim leaves alone, in bytes: a container that fills the guest must not
/// push PID 1 out.
const AGENT_MEMORY_MIN_BYTES: u64 = 16 << 20;
/// Size of /run in bytes: config.json files and sockets of containers.
const RUN_MAX_BYTES: u64 = 64 << 20;
/// Part of the kernel's threads that containers may use together; the rest is for the agent.
const CONTAINER_THREADS_PERCENT: u64 = 90;
/// Open files: what the agent may have, and the hard limit that containers inherit.
const OPEN_FILES_MAX_COUNT: u64 = 1 << 20;

/// Why the guest cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A mount failed.
    #[error("mounting {what} on {target}")]
    Mount {
        /// File system type or source.
        what: &'static str,
        /// Mount point.
        target: &'static str,
        /// errno.
        #[source]
        cause: io::Error,
    },
    /// A directory could not be made.
    #[error("making directory {path}")]
    Directory {
        /// Which.
        path: String,
        /// errno.
        #[source]
        cause: io::Error,
    },
    /// A file of the kernel could not be written.
    #[error("writing {value} to {path}")]
    Write {
        /// Which.
        path: String,
        /// What.
        value: String,
        /// errno.
        #[source]
        cause: io::Error,
    },
    /// A file of the kernel could not be read.
    #[error("reading {path}")]
    Read {
        /// Which.
        path: String,
        /// errno.
        #[source]
        cause: io::Error,
    },
    /// The loopback interface.
    #[error("bringing the loopback interface up")]
    Loopback(#[source] io::Error),
    /// An rlimit.
    #[error("raising the limit of open files")]
    Limits(#[source] io::Error),
}

/// Makes the guest usable: root, mounts, cgroups, limits, sysctls, loopback.
///
/// # Errors
/// The first step that failed; nothing is undone, the machine ends.
pub fn prepare() -> Result<(), BootError> {
    // Once here, so that a failure in the next step has /dev/kmsg to be told by, and again below.
    directory("/dev")?;
    mount_one("devtmpfs", "/dev", MountFlags::NOSUID, None)?;
    read_only_root()?;
    mounts()?;
    cgroups()?;
    write("/proc/self/oom_score_adj", "-1000")?;
    open_files_limit().map_err(BootError::Limits)?;
    loopback_up().map_err(BootError::Loopback)?;
    sysctls();
    Ok(())
}

fn read_only_root() -> Result<(), BootError> {
    for path in ["/proc", "/sys", "/dev", "/run"] {
        directory(path)?;
    }
    let failed = |cause: rustix::io::Errno| BootError::Mount {
        what: "the initramfs",
        target: "/",
        cause: cause.into(),
    };
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let root = open_tree(rustix::fs::CWD, "/", flags).map_err(failed)?;
    let to_root = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(&root, "", rustix::fs::CWD, "/", to_root).map_err(failed)?;
    rustix::process::fchdir(&root).map_err(failed)?;
    rustix::process::chroot(".").map_err(failed)?;
    mount_remount("/", MountFlags::BIND | MountFlags::RDONLY, "").map_err(failed)
}

/// The mounts of a guest, in order: what, where, type, flags, options.
fn mounts() -> Result<(), BootError> {
    let quiet = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let run = format!("mode=0755,size={RUN_MAX_BYTES}\0");
    let run = CStr::from_bytes_until_nul(run.as_bytes()).unwrap_or(c"mode=0755");
    let pts = c"gid=5,mode=0620,ptmxmode=0666";
    let cgroup = c"nsdelegate,memory_recursiveprot";
    mount_one("proc", "/proc", quiet, None)?;
    mount_one("sysfs", "/sys", quiet, None)?;
    mount_one("devtmpfs", "/dev", MountFlags::NOSUID, Some(c"mode=0755"))?;
    let tmp = MountFlags::NOSUID | MountFlags::NODEV;
    mount_one("tmpfs", "/run", tmp, Some(run))?;
    directory("/dev/pts")?;
    directory("/dev/shm")?;
    let no_exec = MountFlags::NOSUID | MountFlags::NOEXEC;
    mount_one("devpts", "/dev/pts", no_exec, Some(pts))?;
    mount_one("tmpfs", "/dev/shm", tmp, Some(c"mode=1777"))?;
    mount_one("cgroup2", CGROUP_ROOT, quiet, Some(cgroup))?;
    devices_links();
    Ok(())
}

/// The links that programs expect beside the nodes of devtmpfs.
fn devices_links() {
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        if let Err(e) = std::os::unix::fs::symlink(target, link) {
            last_words::warn(&format!("linking {link}: {e}"));
        }
    }
}

fn mount_one(
    kind: &'static str,
    target: &'static str,
    flags: MountFlags,
    options: Option<&CStr>,
) -> Result<(), BootError> {
    mount(kind, target, kind, flags, options).map_err(|cause| BootError::Mount {
        what: kind,
        target,
        cause: cause.into(),
    })
}

/// The agent in a cgroup of its own with its memory kept; containers below `capsid`, with every
/// controller, and together never so many threads that the agent could not start a runtime process.
fn cgroups() -> Result<(), BootError> {
    let root = Path::new(CGROUP_ROOT);
    enable_controllers(root)?;
    let agent = root.join("agent");
    directory(&agent.to_string_lossy())?;
    write(
        agent.join("memory.min"),
        &AGENT_MEMORY_MIN_BYTES.to_string(),
    )?;
    write(agent.join("cgroup.procs"), "0")?;
    let containers = root.join("capsid");
    directory(&containers.to_string_lossy())?;
    enable_controllers(&containers)?;
    let threads = read("/proc/sys/kernel/threads-max")?;
    if let Ok(threads) = threads.trim().parse::<u64>() {
        let most = threads / 100 * CONTAINER_THREADS_PERCENT;
        write(containers.join("pids.max"), &most.to_string())?;
    }
    Ok(())
}

fn enable_controllers(cgroup: &Path) -> Result<(), BootError> {
    let controllers = read(cgroup.join("cgroup.controllers"))?;
    let enable: Vec<String> = controllers
        .split_whitespace()
        .map(|name| format!("+{name}"))
        .collect();
    write(cgroup.join("cgroup.subtree_control"), &enable.join(" "))
}

/// A hard limit that containers inherit; the soft one is set back for them (`runtime/mod.rs`).
fn open_files_limit() -> io::Result<()> {
    use nix::sys::resource::{Resource, setrlimit};
    setrlimit(
        Resource::RLIMIT_NOFILE,
        OPEN_FILES_MAX_COUNT,
        OPEN_FILES_MAX_COUNT,
    )?;
    Ok(())
}

/// Sane values for a machine that exists to run containers. None is vital: a kernel without one of
/// these files works, so a failure is only noted.
fn sysctls() {
    for (path, value) in [
        // A pid must not come round again while somebody still means the old process.
        ("kernel/pid_max", "4194304"),
        // A broken kernel ends as a panic with its reason, not as a pod that half works.
        ("kernel/panic_on_oops", "1"),
        // ping without a capability, as on every distribution.
        ("net/ipv4/ping_group_range", "0 2147483647"),
        ("vm/max_map_count", "1048576"),
        ("vm/overcommit_memory", "1"),
        ("fs/inotify/max_user_instances", "8192"),
        ("fs/inotify/max_user_watches", "1048576"),
        ("kernel/keys/maxkeys", "65536"),
        ("kernel/keys/maxbytes", "1048576"),
    ] {
        let path = Path::new("/proc/sys").join(path);
        if let Err(e) = fs::write(&path, value) {
            last_words::warn(&format!("writing {value} to {}: {e}", path.display()));
        }
    }
}

/// Sets IFF_UP on `lo` of the network namespace that the calling thread is in.
///
/// # Errors
/// As ioctl(2) SIOCGIFFLAGS and SIOCSIFFLAGS.
pub fn loopback_up() -> io::Result<()> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    let kind = SocketType::DGRAM;
    let socket = socket_with(AddressFamily::INET, kind, SocketFlags::CLOEXEC, None)?;
    // SAFETY: an all-zero ifreq is a valid value of that plain C struct.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    // SAFETY: the socket is open for the whole call and `request` is a valid ifreq, which the kernel
    // reads and writes within its size.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: SIOCGIFFLAGS has just filled `ifru_flags`; reading a union field of integers is sound.
    unsafe { request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short };
    // SAFETY: as above; the kernel only reads the request.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn directory(path: &str) -> Result<(), BootError> {
    match fs::create_dir(path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result.map_err(|cause| BootError::Directory {
            path: path.into(),
            cause,
        }),
    }
}

fn read(path: impl AsRef<Path>) -> Result<String, BootError> {
    fs::read_to_string(&path).map_err(|cause| BootError::Read {
        path: path.as_ref().display().to_string(),
        cause,
    })
}

fn write(path: impl AsRef<Path>, value: &str) -> Result<(), BootError> {
    fs::write(&path, value).map_err(|cause| BootError::Write {
        path: path.as_ref().display().to_string(),
        value: value.into(),
        cause,
    })
}
