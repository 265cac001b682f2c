//! Starts the VMM with exactly the fds that its configuration names.
//!
//! Every fd of ours is close-on-exec; between fork and exec the child takes that flag from the ones that are the VMM's.
//! The signal mask of this process (all forwarded signals are blocked, `crate::signals`) is not for the VMM.
#![allow(unsafe_code)] // `pre_exec` is unsafe to call

use nix::sys::signal::SigSet;
use rustix::io::FdFlags;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// Starts `program` with `fds` inherited by their own numbers, `config` among them.
///
/// # Errors
/// The program cannot be executed.
pub(super) fn spawn(program: &Path, config_fd: i32, fds: Vec<OwnedFd>) -> io::Result<Child> {
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
    let inherit = move || -> io::Result<()> {
        for fd in &fds {
            rustix::io::fcntl_setfd(fd.as_fd(), FdFlags::empty())?;
        }
        SigSet::empty().thread_set_mask()?;
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec, where only async-signal-safe work is allowed: it calls fcntl(2)
    // and sigprocmask, allocates nothing and takes no lock. It owns the fds, so they are open until exec.
    unsafe { command.pre_exec(inherit) };
    command.spawn()
}
