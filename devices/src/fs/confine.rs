//! What a file-system thread gives up before it reads the guest's first byte. All of it is about the calling
//! thread and the threads it starts, never about the rest of the process.
//!
//! In order: a descriptor table of its own, without what the VMM holds; its own mount namespace with everything
//! private; the share as its root and nothing else in it; then another identity, without every privilege but
//! those that being true to owners, modes and attributes takes.
//!
//! The thread is *not* root: its user ids are those of the jail, and only the id that file systems look at
//! (`fsuid`) is 0. Root without capabilities would still own every sysctl. And it has no
//! CAP_DAC_READ_SEARCH: with that and `open_by_handle_at` a thread taken over could open any file of the
//! share's file system, inside the share or not (the reason for [`super::nodes`]).
//!
//! The table is why a thread taken over reaches no disk, no other share and no file of the serial port: with the process's it
//! would write them by their numbers, and by `/proc/self/fd` open them anew, whatever they were opened for. What it has of the
//! process's are eventfds, what interrupts are sent by, and standard error, where a panic is told: an owner gives a pipe there, or
//! a file without a name. Since a number means one thing here and another there, no descriptor is ever handed to a thread of the
//! other side to be closed; [`super::threads`] says how what holds some is kept apart.
//!
//! `unsafe`: `unshare`, `close_range` and `mount_setattr` have no safe wrapper; a number that both tables have is borrowed.
#![allow(unsafe_code)]

use super::credentials::{set_gid, set_uid};
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid};
use rustix::mount::{
    MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount_change, move_mount,
    open_tree, unmount,
};
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, UnshareFlags,
    clear_ambient_capability_set, remove_capability_from_bounding_set, set_capabilities,
    set_capabilities_secure_bits, set_no_new_privs, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid, unshare_unsafe,
};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use vmm_sys_util::eventfd::EventFd;

/// Everything that a file-system thread may do beyond an ordinary user, each with what would break:
///
/// - CHOWN: `chown` in the guest to any user.
/// - DAC_OVERRIDE: files of any owner and mode; the guest's kernel has checked who may.
/// - FOWNER: `chmod`, `utimes`, sticky directories and `user.*` attributes of files of any owner.
/// - FSETID: setuid and setgid bits survive a `chmod` or a privileged write, as on any file system.
/// - SETUID, SETGID: only for `setfsuid` and `setfsgid`, so that a new file belongs to who made it. The
///   system-call filter must keep `setresuid` and the like out.
/// - SETFCAP: `security.capability`, without which a package manager in a container cannot install `ping`.
///
/// Not: MKNOD (device nodes; the overlay's whiteout 0:0 needs none since Linux 5.8), DAC_READ_SEARCH (see the
/// module text), SYS_ADMIN (`trusted.*`), LINUX_IMMUTABLE, SYS_RESOURCE.
pub const KEPT_CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETFCAP);

/// `f_type` of procfs.
const PROC_MAGIC: i64 = 0x9fa0;
/// The attributes that every mount of the share gets: what is a device, a setuid program, a program or a
/// link to the guest is none to the host. The guest sees mode bits, not these.
const SHARE_MOUNT_ATTRIBUTES: u64 = libc::MOUNT_ATTR_NOSUID
    | libc::MOUNT_ATTR_NODEV
    | libc::MOUNT_ATTR_NOEXEC
    | libc::MOUNT_ATTR_NOSYMFOLLOW;
/// The same as `statfs(2)` tells them.
const SHARE_STATFS_FLAGS: u64 = libc::ST_NOSUID | libc::ST_NODEV | libc::ST_NOEXEC | ST_NOSYMFOLLOW;
/// include/linux/statfs.h (Linux 5.10).
const ST_NOSYMFOLLOW: u64 = 0x2000;

/// The step that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step}")]
pub struct ConfineError {
    step: &'static str,
    #[source]
    cause: io::Error,
}

/// Gives an error the step that it came up in.
fn at<T>(step: &'static str, result: rustix::io::Result<T>) -> Result<T, ConfineError> {
    result.map_err(|errno| ConfineError {
        step,
        cause: errno.into(),
    })
}

/// An eventfd that the process and the threads of a share both have, under one number in two tables. The process owns it and keeps it
/// open as long as it signals; in the other table it lasts as long as that.
#[derive(Clone, Copy)]
pub(crate) struct Signal(RawFd);

impl Signal {
    /// That of an eventfd, which [`own_descriptors`] is then told to keep.
    pub(crate) fn of(event: &EventFd) -> Signal {
        Signal(event.as_raw_fd())
    }

    pub(crate) fn number(self) -> RawFd {
        self.0
    }

    pub(crate) fn send(self) {
        // SAFETY: the number is of this eventfd in the table of whoever calls, see above.
        let event = unsafe { BorrowedFd::borrow_raw(self.0) };
        // A full counter is as readable.
        let _full = rustix::io::write(event, &1u64.to_ne_bytes());
    }
}

/// Gives the calling thread, and those that it starts, a descriptor table of their own, which holds standard error, `kept` and `tree`
/// under the numbers that they have in the process's. The tree there is the caller's.
///
/// The caller holds nothing that would close a descriptor of the process: it would be another one from now on. The first two that it
/// opens get the numbers of standard input and output, so they are to last as long as the table, and not for reading or writing.
pub(crate) fn own_descriptors(tree: RawFd, kept: &[RawFd]) -> Result<OwnedFd, ConfineError> {
    // SAFETY: this thread has borrowed numbers alone, and what it opens from now on stays with the threads of this table.
    let unshared = unsafe { unshare_unsafe(UnshareFlags::FILES) };
    at("unshare the descriptors", unshared)?;
    let mut kept: Vec<RawFd> = [libc::STDERR_FILENO, tree]
        .into_iter()
        .chain(kept.iter().copied())
        .collect();
    kept.sort_unstable();
    let mut first = 0;
    for number in kept {
        close_range(first, number.saturating_sub(1))?;
        first = number.saturating_add(1);
    }
    close_range(first, RawFd::MAX)?;
    // SAFETY: it is open in this table, and nobody else here knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(tree) })
}

/// Closes the descriptors from `first` to `last`, if there are any.
fn close_range(first: RawFd, last: RawFd) -> Result<(), ConfineError> {
    if last < first {
        return Ok(());
    }
    // SAFETY: it takes numbers alone, and in this table nobody owns any of them yet.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    at("close the VMM's descriptors", result_of(closed))
}

/// Whether a mount has the attributes that every mount of a share has to have. What was in the tree has them by [`enter_tree`]; what the
/// owner lets come later he gives them.
pub(crate) fn is_restricted(fs: &rustix::fs::StatFs) -> bool {
    (fs.f_flags as u64) & SHARE_STATFS_FLAGS == SHARE_STATFS_FLAGS
}

/// Gives the calling thread a mount namespace whose only mounts are those of `tree`, of which no descriptor is left, and those that
/// come later by propagation, if the owner left mounts of the tree shared or made them slaves: none of ours ever goes back. Returns
/// `/proc/thread-self/fd` as a mount of its own: nothing of procfs can be reached from it, not even by `..`. `/proc/self/fd` would be the
/// process's.
pub(crate) fn enter_tree(tree: OwnedFd) -> Result<OwnedFd, ConfineError> {
    let st = at("look at the share's tree", rustix::fs::fstat(&tree))?;
    if FileType::from_raw_mode(st.st_mode) != FileType::Directory {
        return at(
            "use the share's tree as a root",
            Err(rustix::io::Errno::NOTDIR),
        );
    }
    at(
        "unshare the mount namespace",
        unshare(UnshareFlags::FS | UnshareFlags::NEWNS),
    )?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    at("make the mounts private", mount_change(c"/", private))?;
    let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let fds = at(
        "open /proc/thread-self/fd",
        open_tree(CWD, c"/proc/thread-self/fd", clone),
    )?;
    if at("look at /proc/thread-self/fd", rustix::fs::fstatfs(&fds))?.f_type != PROC_MAGIC {
        return at("find procfs at /proc", Err(rustix::io::Errno::INVAL));
    }
    at("restrict the share's mounts", restrict_mounts(tree.as_fd()))?;
    let empty = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    at(
        "attach the share's tree",
        move_mount(&tree, c"", CWD, c"/", empty),
    )?;
    at("enter the share's tree", rustix::process::fchdir(&tree))?;
    at(
        "pivot into the share",
        rustix::process::pivot_root(c".", c"."),
    )?;
    // The old root lies over the new one now; what is under "." goes with all that is mounted in it.
    at(
        "let go of the host's mounts",
        unmount(c".", UnmountFlags::DETACH),
    )?;
    at("enter the share", rustix::process::chdir(c"/"))?;
    drop(tree);
    Ok(fds)
}

/// The share's root, for a thread inside it.
pub(crate) fn open_root() -> Result<OwnedFd, ConfineError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    at(
        "open the share's root",
        rustix::fs::openat(CWD, c"/", flags, Mode::empty()),
    )
}

/// Gives the calling thread a working directory and a umask of its own: the directory is
/// `/proc/thread-self/fd`, because the xattr calls take no directory descriptor, and the guest's kernel applies
/// the umask.
pub(crate) fn own_working_directory(proc_fds: BorrowedFd<'_>) -> Result<(), ConfineError> {
    at("unshare the working directory", unshare(UnshareFlags::FS))?;
    at(
        "enter /proc/thread-self/fd",
        rustix::process::fchdir(proc_fds),
    )?;
    rustix::process::umask(Mode::empty());
    Ok(())
}

/// Makes the calling thread `uid` and `gid` with [`KEPT_CAPABILITIES`] alone, for good.
pub(crate) fn drop_privileges(uid: u32, gid: u32) -> Result<(), ConfineError> {
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match remove_capability_from_bounding_set(capability) {
            // The first number that this kernel has no capability for.
            Err(rustix::io::Errno::INVAL) => break,
            result => at("empty the bounding set", result)?,
        }
    }
    let bits = CapabilitiesSecureBits::NO_ROOT
        | CapabilitiesSecureBits::NO_ROOT_LOCKED
        | CapabilitiesSecureBits::NO_SETUID_FIXUP
        | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
        | CapabilitiesSecureBits::KEEP_CAPS_LOCKED
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED;
    at("lock the secure bits", set_capabilities_secure_bits(bits))?;
    at(
        "clear the ambient capabilities",
        clear_ambient_capability_set(),
    )?;
    at("drop the supplementary groups", set_thread_groups(&[]))?;
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(gid));
    at("change the group", set_thread_res_gid(group, group, group))?;
    at("change the user", set_thread_res_uid(user, user, user))?;
    at("take the file group", set_gid(0))?;
    at("take the file user", set_uid(0))?;
    let sets = CapabilitySets {
        effective: KEPT_CAPABILITIES,
        permitted: KEPT_CAPABILITIES,
        inheritable: CapabilitySet::empty(),
    };
    at("drop capabilities", set_capabilities(None, sets))?;
    at("forbid new privileges", set_no_new_privs(true))
}

pub(super) fn unshare(flags: UnshareFlags) -> rustix::io::Result<()> {
    // SAFETY: it is unsafe for CLONE_FILES alone, for which there is `own_descriptors`; no caller here passes it.
    unsafe { unshare_unsafe(flags) }
}

fn restrict_mounts(tree: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: SHARE_MOUNT_ATTRIBUTES,
        attr_clr: 0,
        // Nothing goes back to the owner; what he lets come comes. A private mount stays private.
        propagation: libc::MS_SLAVE,
        userns_fd: 0,
    };
    // SAFETY: the path is a NUL-terminated constant, the structure lives through the call and its size is
    // the one given; the kernel only reads both.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            (AtFlags::EMPTY_PATH.bits() as i32) | libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    result_of(result)
}

/// What a system call without a wrapper came to.
fn result_of(returned: libc::c_long) -> rustix::io::Result<()> {
    match returned {
        0 => Ok(()),
        _ => Err(
            rustix::io::Errno::from_io_error(&io::Error::last_os_error())
                .unwrap_or(rustix::io::Errno::IO),
        ),
    }
}
