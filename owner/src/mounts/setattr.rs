//! `mount_setattr(2)` (Linux 5.12), for which there is no safe wrapper in the crates we use.
#![allow(unsafe_code)] // one raw system call

use rustix::mount::MountAttrFlags;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// Sets attributes on every mount of the detached tree behind the fd.
///
/// # Errors
/// The kernel's.
pub fn set_attributes(tree: &OwnedFd, attributes: MountAttrFlags) -> io::Result<()> {
    set(
        tree,
        libc::mount_attr {
            attr_set: attributes.bits().into(),
            attr_clr: 0,
            propagation: 0,
            userns_fd: 0,
        },
    )
}

/// What is mounted in a tree later arrives in other copies of it that say [`Propagation::Slave`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Propagation {
    /// Tells its copies, and listens to those that are shared.
    Shared,
    /// Listens to the shared tree that it is a copy of, but not while it is attached nowhere (`propagate_one`, fs/pnode.c): a mount
    /// that is to arrive at a VM is made when its guest runs, or before the copy.
    Slave,
}

/// Sets how mounts travel (`Documentation/filesystems/sharedsubtree.rst`), for every mount of the tree behind the fd.
///
/// # Errors
/// The kernel's.
pub fn set_propagation(tree: &OwnedFd, propagation: Propagation) -> io::Result<()> {
    let propagation = match propagation {
        Propagation::Shared => libc::MS_SHARED,
        Propagation::Slave => libc::MS_SLAVE,
    };
    set(
        tree,
        libc::mount_attr {
            attr_set: 0,
            attr_clr: 0,
            propagation,
            userns_fd: 0,
        },
    )
}

fn set(tree: &OwnedFd, attr: libc::mount_attr) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | libc::AT_RECURSIVE;
    // SAFETY: the path is a NUL-terminated string and `attr` a live struct of the size passed; the kernel reads
    // both and keeps neither.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
