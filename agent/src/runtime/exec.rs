//! Adds a process to a running container.
//!
//! Not by libcontainer's tenant builder: it leaves the container's seccomp filter out (its tenant spec
//! has no `linux.seccomp`), and it joins the namespaces by `/proc/<pid>`, where a pid may have come round
//! again. Here the init is named by its pidfd, one setns(2) enters all its namespaces at once, and the
//! child is born in the container's cgroup by clone3(2), so this runtime process itself is never charged to it.
//! The parts that are right are libcontainer's: terminal, rlimits, seccomp, user, capabilities.

use super::clone::clone_into;
use super::create::receive_fd;
use super::executor::ReportingExecutor;
use super::message::Report;
use super::{ProcessFds, RuntimeError, hand_over_terminal, io_error};
use crate::last_words::chain;
use libcontainer::syscall::Syscall;
use libcontainer::syscall::syscall::SyscallType;
use libcontainer::{capabilities, seccomp, tty};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use oci_spec::runtime::{LinuxNamespaceType, LinuxSeccomp, Process, Spec};
use std::error::Error;
use std::io;
use std::os::fd::{IntoRawFd, OwnedFd};
use std::path::Path;

/// What the child needs, all read before the container's files are in sight.
struct Plan {
    process: Process,
    seccomp: Option<LinuxSeccomp>,
    fds: ProcessFds,
    console: Option<OwnedFd>,
    /// The container's init, if its cgroup namespace is to be entered. By the child, in whose cgroup it
    /// is rooted: with `nsdelegate` nobody may be born across the edge of the namespace he is in.
    cgroup_namespace_of: Option<OwnedFd>,
}

/// Starts the process; answers its pid. What goes wrong after its birth it reports itself.
pub(super) fn exec(
    agent: &OwnedFd,
    bundle: &Path,
    process: &Path,
    fds: ProcessFds,
    more: Vec<OwnedFd>,
) -> Result<i32, RuntimeError> {
    let mut more = more.into_iter();
    let (Some(init), Some(cgroup), Some(init_cgroup)) = (more.next(), more.next(), more.next())
    else {
        return Err(RuntimeError::NoDescriptors);
    };
    let spec = Spec::load(bundle.join("config.json"))
        .map_err(|e| RuntimeError::Exec(format!("reading the container's spec: {e}")))?;
    let text = std::fs::read(process).map_err(io_error("reading the process"))?;
    let process: Process =
        serde_json::from_slice(&text).map_err(|e| io_error("reading the process")(e.into()))?;
    if let Some(adjust) = process.oom_score_adj() {
        std::fs::write("/proc/self/oom_score_adj", adjust.to_string())
            .map_err(io_error("setting oom_score_adj"))?;
    }
    let (master_side, console) = console(process.terminal().unwrap_or(false))
        .map_err(io_error("making the console socket"))?;
    let linux = spec.linux().as_ref();
    let namespaces = namespaces(&spec);
    let own_cgroup = namespaces.contains(CloneFlags::CLONE_NEWCGROUP);
    let cgroup_namespace_of = own_cgroup.then(|| init.try_clone()).transpose();
    let plan = Plan {
        process,
        seccomp: linux.and_then(|linux| linux.seccomp().clone()),
        fds,
        console,
        cgroup_namespace_of: cgroup_namespace_of.map_err(io_error("copying a descriptor"))?,
    };
    // Joined processes must not be able to read this one (CVE-2016-9962).
    nix::sys::prctl::set_dumpable(false).map_err(|e| io_error("becoming undumpable")(e.into()))?;
    setns(&init, namespaces - CloneFlags::CLONE_NEWCGROUP)
        .map_err(|e| io_error("entering the container's namespaces")(e.into()))?;
    let pid = start_in([&cgroup, &init_cgroup], plan)
        .map_err(io_error("starting a process in the container"))?;
    if let Some(socket) = master_side {
        wait_readable(&socket).map_err(io_error("waiting for the terminal"))?;
        // Without one the child ended before it had a terminal, and says why on its report pipe.
        if let Ok(master) = receive_fd(&socket) {
            hand_over_terminal(agent, &master)?;
        }
    }
    Ok(pid)
}

/// A pair for the terminal's master: ours, and the child's.
fn console(terminal: bool) -> io::Result<(Option<OwnedFd>, Option<OwnedFd>)> {
    if !terminal {
        return Ok((None, None));
    }
    let flags = SockFlag::SOCK_CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::Stream, None, flags)?;
    Ok((Some(ours), Some(theirs)))
}

fn wait_readable(socket: &OwnedFd) -> io::Result<()> {
    use rustix::event::{PollFd, PollFlags, poll};
    let mut fds = [PollFd::new(socket, PollFlags::IN)];
    // Bounded: the child either sends or ends, and the agent's deadline is over both.
    poll(&mut fds, None)?;
    Ok(())
}

/// The namespaces that the container does not share with the guest. A pidfd names them all at once.
fn namespaces(spec: &Spec) -> CloneFlags {
    let linux = spec.linux().as_ref();
    let listed = linux.and_then(|linux| linux.namespaces().as_ref());
    let mut flags = CloneFlags::empty();
    for namespace in listed.into_iter().flatten() {
        flags |= match namespace.typ() {
            LinuxNamespaceType::Mount => CloneFlags::CLONE_NEWNS,
            LinuxNamespaceType::Cgroup => CloneFlags::CLONE_NEWCGROUP,
            LinuxNamespaceType::Uts => CloneFlags::CLONE_NEWUTS,
            LinuxNamespaceType::Ipc => CloneFlags::CLONE_NEWIPC,
            LinuxNamespaceType::Pid => CloneFlags::CLONE_NEWPID,
            LinuxNamespaceType::Network => CloneFlags::CLONE_NEWNET,
            // Refused by the agent's check of the spec.
            LinuxNamespaceType::User => CloneFlags::empty(),
            LinuxNamespaceType::Time => CloneFlags::from_bits_retain(libc::CLONE_NEWTIME),
        };
    }
    flags
}

/// Starts the child in the container's cgroup or, where that has given its controllers on to cgroups that the
/// container made, in the one of the container's init, as runc does.
fn start_in([cgroup, init_cgroup]: [&OwnedFd; 2], plan: Plan) -> io::Result<i32> {
    let same = CloneFlags::empty();
    let born = match clone_into(cgroup, same) {
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => clone_into(init_cgroup, same),
        result => result,
    };
    match born? {
        0 => std::process::exit(child(plan)),
        pid => Ok(pid),
    }
}

/// The child's life up to its program. Returns only if that could not be executed.
fn child(plan: Plan) -> i32 {
    let Plan {
        process,
        seccomp,
        fds,
        console,
        cgroup_namespace_of,
    } = plan;
    let ProcessFds {
        stdin,
        stdout,
        stderr,
        report,
    } = fds;
    let executor = ReportingExecutor::new(report);
    let stdio = [stdin, stdout, stderr];
    let entered =
        cgroup_namespace_of.map_or(Ok(()), |init| setns(init, CloneFlags::CLONE_NEWCGROUP));
    let become_process = || {
        entered?;
        become_process(&process, seccomp.as_ref(), stdio, console)
    };
    let why = match become_process() {
        Ok(()) => executor.execute(&process),
        Err(error) => Report::Failed(super::message::bounded(&chain(&*error))),
    };
    executor.say(&why);
    255
}

fn become_process(
    process: &Process,
    seccomp: Option<&LinuxSeccomp>,
    stdio: [OwnedFd; 3],
    console: Option<OwnedFd>,
) -> Result<(), Box<dyn Error>> {
    let syscall = SyscallType::Linux.create_syscall();
    nix::unistd::setsid()?;
    match console {
        // setup_console closes it.
        Some(console) => tty::setup_console(&*syscall, console.into_raw_fd(), false)?,
        None => {
            let [stdin, stdout, stderr] = stdio;
            rustix::stdio::dup2_stdin(&stdin)?;
            rustix::stdio::dup2_stdout(&stdout)?;
            rustix::stdio::dup2_stderr(&stderr)?;
        }
    }
    for rlimit in process.rlimits().iter().flatten() {
        syscall.set_rlimit(rlimit)?;
    }
    if let Some(umask) = process.user().umask() {
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(umask & 0o777));
    }
    // As root first: the user may not be allowed to search the way there (runc does the same).
    let early = std::env::set_current_dir(process.cwd());
    become_user(process, &*syscall)?;
    syscall.close_range(0)?;
    let strict = process.no_new_privileges() == Some(true);
    if strict {
        nix::sys::prctl::set_no_new_privs()?;
    }
    // Without no_new_privs a filter takes CAP_SYS_ADMIN, which is about to go.
    if let (Some(filter), false) = (seccomp, strict) {
        seccomp::initialize_seccomp(filter)?;
    }
    capabilities::reset_effective(&*syscall)?;
    if let Some(wanted) = process.capabilities() {
        capabilities::drop_privileges(wanted, &*syscall)?;
    }
    if early.is_err() {
        let cwd = process.cwd().display().to_string();
        std::env::set_current_dir(process.cwd()).map_err(|e| format!("process.cwd {cwd}: {e}"))?;
    }
    // A directory outside the root has no name in it: getcwd(2) says so (CVE-2024-21626).
    std::env::current_dir().map_err(|e| format!("process.cwd is outside the container: {e}"))?;
    if let (Some(filter), true) = (seccomp, strict) {
        seccomp::initialize_seccomp(filter)?;
    }
    Ok(())
}

fn become_user(process: &Process, syscall: &dyn Syscall) -> Result<(), Box<dyn Error>> {
    let user = process.user();
    let gids = user.additional_gids().iter().flatten();
    let gids: Vec<_> = gids
        .map(|gid| rustix::process::Gid::from_raw(*gid))
        .collect();
    rustix::thread::set_thread_groups(&gids)?;
    let (uid, gid) = (
        rustix::process::Uid::from_raw(user.uid()),
        rustix::process::Gid::from_raw(user.gid()),
    );
    rustix::thread::set_keep_capabilities(true)?;
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    rustix::thread::set_thread_res_uid(uid, uid, uid)?;
    if !uid.is_root() {
        capabilities::reset_effective(syscall)?;
    }
    rustix::thread::set_keep_capabilities(false)?;
    Ok(())
}
