//! `mount_setattr(2)` (Linux 5.12), for which there is no safe wrapper in the crates we use.
#![allow(unsafe_code)] // one raw system call

use rustix::mount::MountAttrFlags;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// Sets attributes on every mount of the detached tree behind the fd.
///
/// # Errors
/// The kernel's.
pub fn set(tree: &OwnedFd, attributes: MountAttrFlags) -> io::Result<()> {
    let attr = libc::mount_attr {
        attr_set: attributes.bits().into(),
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
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
