//! Detached mounts (`open_tree(2)`, `fsmount(2)`, Linux 5.2; `mount_setattr(2)`, 5.12), of which the tree of a share is made. None of them is in
//! the host's mount namespace: each goes with its fd, or with the private namespace of the thread that attached it.

mod setattr;

pub use setattr::{Propagation, set_attributes, set_propagation};

use nix::sched::CloneFlags;
use rustix::fs::{AtFlags, Mode, OFlags};
pub use rustix::mount::MountAttrFlags;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// Longest option string of a mount (one page, `mount(2)`), in bytes.
pub const OPTIONS_MAX_BYTES: usize = 4095;

/// The attributes that every mount of a share has: what is a device, a setuid program, a program or a link to the guest is none to the
/// host. The VMM gives them to what is in the tree when it starts; to what is mounted later the owner does, before he attaches it
/// (what is set on it then does not travel), or the guest is refused it.
pub const SHARE_ATTRIBUTES: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOSUID
    .union(MountAttrFlags::MOUNT_ATTR_NODEV)
    .union(MountAttrFlags::MOUNT_ATTR_NOEXEC)
    .union(MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW);

/// A mount namespace of this thread alone (which also unshares its root and working directory), from which nothing
/// propagates back. What the host mounts and unmounts later does so here too.
///
/// # Errors
/// The kernel's.
pub fn enter_private_namespace() -> io::Result<()> {
    nix::sched::unshare(CloneFlags::CLONE_NEWNS)?;
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    Ok(rustix::mount::mount_change("/", slave)?)
}

/// A detached copy of the mount tree at `path`; with an empty path, of the one behind the fd.
///
/// # Errors
/// The kernel's.
pub fn clone_tree(at: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    if path.as_os_str().is_empty() {
        flags |= OpenTreeFlags::AT_EMPTY_PATH;
    }
    Ok(rustix::mount::open_tree(at, path, flags)?)
}

/// A detached tmpfs of bounded size.
///
/// # Errors
/// The kernel's.
pub fn tmpfs(max_bytes: u64, max_inodes: u64) -> io::Result<OwnedFd> {
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(&context, "source", "capsid")?;
    rustix::mount::fsconfig_set_string(&context, "mode", "0755")?;
    rustix::mount::fsconfig_set_string(&context, "size", max_bytes.to_string())?;
    rustix::mount::fsconfig_set_string(&context, "nr_inodes", max_inodes.to_string())?;
    rustix::mount::fsconfig_create(&context)?;
    Ok(rustix::mount::fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::empty(),
    )?)
}

/// `mount(2)`, since `fsconfig(2)` takes strings of at most 255 bytes.
///
/// # Errors
/// The kernel's.
pub fn mount_overlay(target: &str, options: &str) -> io::Result<()> {
    let options = std::ffi::CString::new(options)?;
    let flags = rustix::mount::MountFlags::empty();
    Ok(rustix::mount::mount(
        "capsid",
        target,
        "overlay",
        flags,
        Some(options.as_c_str()),
    )?)
}

/// Moves a detached mount to a place.
///
/// # Errors
/// The kernel's.
pub fn attach(mount: &OwnedFd, at: impl AsFd, place: &Path) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(rustix::mount::move_mount(mount, "", at, place, flags)?)
}

/// Makes the mount point `place` in the tree and moves a detached mount there.
///
/// # Errors
/// The kernel's.
pub fn put(mount: &OwnedFd, tree: &OwnedFd, place: &Path, is_directory: bool) -> io::Result<()> {
    if is_directory {
        make_directory(tree, place)?;
    } else {
        make_file(tree, place)?;
    }
    attach(mount, tree, place)
}

/// Makes a directory with mode 0755, whatever the umask.
///
/// # Errors
/// The kernel's.
pub fn make_directory(at: &OwnedFd, path: &Path) -> io::Result<()> {
    // The mode is set apart: the process's umask would take from it.
    rustix::fs::mkdirat(at, path, Mode::from_raw_mode(0o755))?;
    Ok(rustix::fs::chmodat(
        at,
        path,
        Mode::from_raw_mode(0o755),
        AtFlags::empty(),
    )?)
}

/// Makes an empty file with mode 0644, whatever the umask, and opens it for writing.
///
/// # Errors
/// The kernel's.
pub fn make_file(at: &OwnedFd, path: &Path) -> io::Result<std::fs::File> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let file = rustix::fs::openat(at, path, flags, Mode::from_raw_mode(0o644))?;
    rustix::fs::fchmod(&file, Mode::from_raw_mode(0o644))?;
    Ok(file.into())
}

/// Opens a directory, to look names up in.
///
/// # Errors
/// The kernel's.
pub fn open_at(at: impl AsFd, path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(at, path, flags, Mode::empty())?)
}
