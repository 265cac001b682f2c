//! The pause container of a pod: what holds a pid namespace that other containers are born into, and reaps their orphans.
//!
//! A third life of the agent's program: the runtime process starts it in the container's cgroup and in a pid namespace of its
//! own, and it puts everything away that it was born with before it says that it is there. Containers of the pod may see it as
//! their PID 1, and one with CAP_SYS_PTRACE everything that hangs on it (/proc/1/root, /proc/1/ns, /proc/1/fd): so its root is an
//! empty directory, its descriptors are /dev/null, its cgroup namespace begins at its cgroup, and it has no user and no capability.

use super::clone::clone_into;
use super::executor::ReportingExecutor;
use super::message::{Report, bounded};
use super::{ProcessFds, RuntimeError, io_error};
use crate::last_words::chain;
use libcontainer::seccomp::initialize_seccomp;
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal};
use oci_spec::runtime::{LinuxSeccompAction, LinuxSeccompBuilder, LinuxSyscallBuilder};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change, move_mount, unmount,
};
use rustix::process::{Gid, Uid, WaitOptions, wait};
use rustix::thread::{
    CapabilitySet, CapabilitySets, remove_capability_from_bounding_set, set_capabilities,
    set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};
use std::error::Error;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;

/// The argument that makes the program a pause process.
pub const ARGUMENT: &str = "pause";
/// What the OOM killer thinks of it: the whole pod hangs on it (kubelet's PodInfraOOMAdj).
const OOM_SCORE_ADJ: &str = "-998";
/// Its user and group, as in the pause image; they own nothing.
const NOBODY: u32 = 65535;
/// All that it does once it is there, and the end of what came before.
const SYSTEM_CALLS: [&str; 8] = [
    "rt_sigtimedwait",
    "wait4",
    "exit_group",
    "restart_syscall",
    "write",
    "close",
    "munmap",
    "brk",
];

/// Starts it in `cgroup`; answers its pid. What goes wrong after its birth it reports itself.
pub(super) fn pause(fds: ProcessFds, cgroup: Option<OwnedFd>) -> Result<i32, RuntimeError> {
    let cgroup = cgroup.ok_or(RuntimeError::NoDescriptors)?;
    std::fs::write("/proc/self/oom_score_adj", OOM_SCORE_ADJ)
        .map_err(io_error("setting oom_score_adj"))?;
    match clone_into(&cgroup, CloneFlags::CLONE_NEWPID) {
        Ok(0) => std::process::exit(execute_again(fds)),
        born => born.map_err(io_error("starting the pause process")),
    }
}

/// From the runtime process's memory to a fresh one. Its report pipe becomes descriptor 1. Returns only if it failed.
fn execute_again(fds: ProcessFds) -> i32 {
    let executed = || {
        rustix::stdio::dup2_stdin(&fds.stdin)?;
        rustix::stdio::dup2_stdout(&fds.report)?;
        rustix::stdio::dup2_stderr(&fds.stderr)?;
        let Err(errno) = nix::unistd::execv(c"/proc/self/exe", &[c"/pause", c"pause"]);
        Err::<(), io::Error>(errno.into())
    };
    if let Err(e) = executed() {
        let text = format!("executing the pause process: {e}");
        ReportingExecutor::new(fds.report).say(&Report::Failed(bounded(&text)));
    }
    255
}

/// The pause process's main: it ends with 0 when it is asked to.
pub fn main() -> ExitCode {
    let Ok(report) = io::stdout().as_fd().try_clone_to_owned() else {
        return ExitCode::FAILURE;
    };
    let report = ReportingExecutor::new(report);
    let signals: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGCHLD]
        .into_iter()
        .collect();
    if let Err(error) = confine(&signals) {
        report.say(&Report::Failed(bounded(&chain(&*error))));
        return ExitCode::FAILURE;
    }
    report.say(&Report::Executing);
    drop(report);
    // Blocked, they are kept for PID 1 even from inside its namespace, where unhandled ones are dropped (kernel/signal.c).
    loop {
        match signals.wait() {
            Ok(Signal::SIGCHLD) => while matches!(wait(WaitOptions::NOHANG), Ok(Some(_))) {},
            Ok(_) => return ExitCode::SUCCESS,
            Err(_) => return ExitCode::FAILURE,
        }
    }
}

fn confine(signals: &SigSet) -> Result<(), Box<dyn Error>> {
    signals.thread_block()?;
    rustix::thread::set_name(c"pause")?;
    nix::unistd::setsid()?;
    let null = File::open("/dev/null")?;
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP)?;
    empty_root()?;
    rustix::stdio::dup2_stdout(&null)?;
    drop(null);
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match remove_capability_from_bounding_set(capability) {
            // The first number that this kernel has no capability for.
            Err(rustix::io::Errno::INVAL) => break,
            result => result?,
        }
    }
    set_thread_groups(&[])?;
    let (uid, gid) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)?;
    let none = CapabilitySet::empty();
    let sets = CapabilitySets {
        effective: none,
        permitted: none,
        inheritable: none,
    };
    set_capabilities(None, sets)?;
    nix::sys::prctl::set_dumpable(false)?;
    nix::sys::prctl::set_no_new_privs()?;
    let names: Vec<String> = SYSTEM_CALLS.map(str::to_owned).to_vec();
    let allowed = LinuxSyscallBuilder::default()
        .names(names)
        .action(LinuxSeccompAction::ScmpActAllow)
        .build()?;
    let filter = LinuxSeccompBuilder::default()
        .default_action(LinuxSeccompAction::ScmpActErrno)
        .syscalls(vec![allowed])
        .build()?;
    initialize_seccomp(&filter)?;
    Ok(())
}

/// Leaves this mount namespace with one mount: a directory in which there is nothing and can be nothing.
fn empty_root() -> rustix::io::Result<()> {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change(c"/", private)?;
    let context = fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, c"mode", c"0555")?;
    fsconfig_set_string(&context, c"nr_inodes", c"1")?;
    fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let root = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    let empty = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(&root, c"", rustix::fs::CWD, c"/", empty)?;
    rustix::process::fchdir(&root)?;
    rustix::process::pivot_root(c".", c".")?;
    // The old root lies over the new one now.
    unmount(c".", UnmountFlags::DETACH)?;
    rustix::process::chdir(c"/")
}
