//! clone3(2) into a cgroup, so that a new process never runs outside its container's limits.
#![allow(unsafe_code)] // it has no safe wrapper

use nix::sched::CloneFlags;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// include/uapi/linux/sched.h; libc's constant of that name is cut to 32 bits.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// A child in `cgroup` and in new namespaces as `namespaces` says, otherwise as by fork(2). 0 in the child.
///
/// # Errors
/// As clone3(2); EBUSY: the cgroup has given its controllers on to cgroups below it.
pub(super) fn clone_into(cgroup: &OwnedFd, namespaces: CloneFlags) -> io::Result<i32> {
    // SAFETY: an all-zero clone_args is a valid value of that plain C struct and means "as fork(2)".
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = CLONE_INTO_CGROUP | u64::from(namespaces.bits() as u32);
    args.exit_signal = libc::SIGCHLD as u64;
    args.cgroup = cgroup.as_raw_fd() as u64;
    let size = std::mem::size_of_val(&args);
    // SAFETY: no CLONE_VM and no stack: like fork(2), the child continues here on a copy of everything.
    // The runtime process has one thread, so no lock can be held by a thread that the child lacks.
    match unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size) } {
        -1 => Err(io::Error::last_os_error()),
        pid => i32::try_from(pid).map_err(io::Error::other),
    }
}
