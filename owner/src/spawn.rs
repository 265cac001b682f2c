//! Starts the VMM with exactly the fds that its configuration names, as the first process of a PID namespace of its own
//! (docs/decisions/0013).
//!
//! Every fd of ours is close-on-exec; between fork and exec the child takes that flag from the ones that are the VMM's.
//! The signal mask of this process (all forwarded signals are blocked, `crate::signals`) is not for the VMM.
#![allow(unsafe_code)] // `pre_exec` is unsafe to call

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{SigSet, Signal};
use rustix::io::FdFlags;
use rustix::process::{PidfdFlags, getpid, pidfd_open};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// Starts `program` with `fds` inherited by their own numbers, `config` among them; in the cgroup whose `cgroup.procs` is given.
///
/// # Errors
/// The program cannot be executed.
pub(crate) fn spawn(
    program: &Path,
    config_fd: i32,
    fds: Vec<OwnedFd>,
    cgroup: Option<File>,
) -> io::Result<Child> {
    let mut command = Command::new(program);
    command
        .arg("--config-fd")
        .arg(config_fd.to_string())
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        // Ctrl-C goes to the terminal's foreground group: it is for the container, by way of us.
        .process_group(0);
    // These two the VMM reads from an fd. The first process of a namespace is not told of a signal that it neither blocks nor
    // handles, so they wait for it from the beginning.
    let mut blocked = SigSet::empty();
    blocked.add(Signal::SIGTERM);
    blocked.add(Signal::SIGINT);
    let inherit = move || -> io::Result<()> {
        for fd in &fds {
            rustix::io::fcntl_setfd(fd.as_fd(), FdFlags::empty())?;
        }
        blocked.thread_set_mask()?;
        if let Some(procs) = &cgroup {
            // "0" is whoever writes it (cgroup v2, Documentation/admin-guide/cgroup-v2.rst).
            rustix::io::write(procs, b"0")?;
        }
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec, where only async-signal-safe work is allowed: it calls fcntl(2),
    // sigprocmask and write(2), allocates nothing and takes no lock. It owns the fds, so they are open until exec.
    unsafe { command.pre_exec(inherit) };
    in_new_pid_namespace(&mut command)
}

/// Starts the command as the first process of a new PID namespace. The calling thread stays where it is; for the moment in
/// which its children would go elsewhere it starts nothing else.
fn in_new_pid_namespace(command: &mut Command) -> io::Result<Child> {
    let ourselves = pidfd_open(getpid(), PidfdFlags::empty())?;
    unshare(CloneFlags::CLONE_NEWPID)?;
    let child = command.spawn();
    // A thread whose children go elsewhere can start no threads.
    match (setns(ourselves, CloneFlags::CLONE_NEWPID), child) {
        (Ok(()), child) => child,
        (Err(cause), child) => {
            if let Ok(mut child) = child {
                // It is our child, so killing and reaping it fail only if it has ended already.
                let _ended = child.kill();
                let _reaped = child.wait();
            }
            Err(cause.into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_child_is_the_first_of_its_namespace_and_ours_and_new_threads_stay_in_ours() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED the_child_is_the_first_of_its_namespace: needs root");
            return;
        }
        // Twice on one thread: it has come back in between.
        for _ in 0..2 {
            let mut shell = Command::new("sh");
            shell.args(["-c", "echo $$"]).stdout(Stdio::piped());
            let child = in_new_pid_namespace(&mut shell).expect("a child");
            let output = child.wait_with_output().expect("our child");
            assert_eq!(output.stdout, b"1\n");
            std::thread::spawn(|| ()).join().expect("a thread");
        }
    }
}
