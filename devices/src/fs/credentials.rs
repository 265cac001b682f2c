//! Whose files a file-system thread makes, and with which privileges it writes. All of it is about the
//! calling thread alone: each call is the raw system call, which Linux applies to one thread.

use rustix::io::Errno;
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

/// While it lives, files that this thread makes belong to the given user and group.
///
/// Only the ids that the file system looks at change (`setfsuid(2)`): the thread's real identity and, by
/// the secure bit NO_SETUID_FIXUP, its capabilities stay. Permissions were checked by the guest's kernel,
/// which alone knows the process's groups; what the host must get right is who owns the new file.
pub(crate) struct Creator {
    uid: u32,
    gid: u32,
}

impl Creator {
    /// # Errors
    /// EINVAL: an id that no file can have, or that the thread may not take.
    pub(crate) fn become_(uid: u32, gid: u32) -> Result<Creator, Errno> {
        if uid == u32::MAX || gid == u32::MAX {
            return Err(Errno::INVAL);
        }
        let creator = Creator { uid, gid };
        if gid != 0 {
            set_gid(gid)?;
        }
        if uid != 0 {
            set_uid(uid)?;
        }
        Ok(creator)
    }
}

impl Drop for Creator {
    fn drop(&mut self) {
        // Both calls come back to the ids the thread started with and cannot fail while it has
        // CAP_SETUID and CAP_SETGID, without which `become_` would have failed.
        if self.uid != 0 {
            nix::unistd::setfsuid(nix::unistd::Uid::from_raw(0));
        }
        if self.gid != 0 {
            nix::unistd::setfsgid(nix::unistd::Gid::from_raw(0));
        }
    }
}

/// `setfsuid(2)` reports no error; asking with an invalid id tells what holds now.
pub(crate) fn set_uid(uid: u32) -> Result<(), Errno> {
    nix::unistd::setfsuid(nix::unistd::Uid::from_raw(uid));
    let now = nix::unistd::setfsuid(nix::unistd::Uid::from_raw(u32::MAX));
    if now.as_raw() == uid {
        Ok(())
    } else {
        Err(Errno::INVAL)
    }
}

/// As [`set_uid`], for the group.
pub(crate) fn set_gid(gid: u32) -> Result<(), Errno> {
    nix::unistd::setfsgid(nix::unistd::Gid::from_raw(gid));
    let now = nix::unistd::setfsgid(nix::unistd::Gid::from_raw(u32::MAX));
    if now.as_raw() == gid {
        Ok(())
    } else {
        Err(Errno::INVAL)
    }
}

/// Runs `change` without CAP_FSETID, so that the host's kernel takes the setuid and setgid bits off the file
/// as it does for an unprivileged writer (FUSE_HANDLE_KILLPRIV_V2).
pub(crate) fn without_fsetid<T>(change: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
    let before = capabilities(None)?;
    let mut dropped = before;
    dropped.effective.remove(CapabilitySet::FSETID);
    set_capabilities(None, dropped)?;
    let result = change();
    // It raises what the permitted set still holds. Were it refused, the thread would go on with less.
    set_capabilities(None, before)?;
    result
}
