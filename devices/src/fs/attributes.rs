//! Requests about what is known of a file: attributes, extended attributes, link targets, file-system size.

use super::abi::Put;
use super::credentials::without_fsetid;
use super::files::has_suidgid;
use super::names::permissions;
use super::request::{Changes, Time, XATTR_VALUE_MAX_BYTES};
use super::session::{OpenFile, Session, put_attr_out, stat_at};
use rustix::fs::{
    AtFlags, Gid, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid, XattrFlags,
};
use rustix::io::Errno;
use rustix::path::DecInt;
use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// Most bytes of a link's target, with room to see that it is not longer.
const LINK_MAX_BYTES: usize = 4096;

impl Session {
    pub(super) fn getattr(
        &self,
        node: u64,
        fh: Option<u64>,
        out: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let st = match fh {
            Some(fh) => stat_at(self.file(node, fh)?.fd.as_fd(), c"")?,
            None => self.stat(node)?,
        };
        put_attr_out(out, &st, 0);
        Ok(())
    }

    pub(super) fn setattr(
        &self,
        node: u64,
        changes: &Changes,
        out: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let file = changes.fh.map(|fh| self.file(node, fh)).transpose()?;
        // An O_PATH descriptor serves all but the size. Calls that take none of it take its name below
        // /proc/thread-self/fd, whose last link is the file itself, whatever it is.
        let fd = self.fd(node)?;
        let here = DecInt::from_fd(&fd);
        let here = here.as_c_str();
        if let Some(mode) = changes.mode {
            rustix::fs::chmodat(&*self.proc_fds, here, permissions(mode), AtFlags::empty())?;
        }
        if changes.uid.is_some() || changes.gid.is_some() {
            let uid = changes.uid.map(Uid::from_raw);
            let gid = changes.gid.map(Gid::from_raw);
            rustix::fs::chownat(&fd, c"", uid, gid, AtFlags::EMPTY_PATH)?;
        }
        if let Some(size) = changes.size {
            self.truncate(node, file.as_ref(), &fd, size, changes.kill_suidgid)?;
        }
        if changes.atime != Time::Keep || changes.mtime != Time::Keep {
            let times = Timestamps {
                last_access: timespec(changes.atime),
                last_modification: timespec(changes.mtime),
            };
            rustix::fs::utimensat(&*self.proc_fds, here, &times, AtFlags::empty())?;
        }
        let st = stat_at(fd.as_fd(), c"")?;
        put_attr_out(out, &st, 0);
        Ok(())
    }

    fn truncate(
        &self,
        node: u64,
        file: Option<&Arc<OpenFile>>,
        fd: &OwnedFd,
        size: u64,
        kill_suidgid: bool,
    ) -> Result<(), Errno> {
        match self.kind(node)? {
            libc::S_IFREG => {}
            libc::S_IFDIR => return Err(Errno::ISDIR),
            _ => return Err(Errno::INVAL),
        }
        let kills = kill_suidgid && has_suidgid(fd)?;
        let cut = |fd: &OwnedFd| match kills {
            true => without_fsetid(|| rustix::fs::ftruncate(fd, size)),
            false => rustix::fs::ftruncate(fd, size),
        };
        match file {
            Some(file) if file.writable => cut(&file.fd),
            _ => cut(&self.reopen(fd, OFlags::WRONLY | OFlags::CLOEXEC)?),
        }
    }

    pub(super) fn readlink(&self, node: u64, room: usize, out: &mut Vec<u8>) -> Result<(), Errno> {
        let fd = self.fd(node)?;
        if self.kind(node)? != libc::S_IFLNK {
            return Err(Errno::INVAL);
        }
        out.resize(LINK_MAX_BYTES, 0);
        let len = rustix::fs::readlinkat_raw(&fd, c"", &mut out[..])?;
        if len > room {
            return Err(Errno::NAMETOOLONG);
        }
        out.truncate(len);
        Ok(())
    }

    pub(super) fn statfs(&self, node: u64, out: &mut Vec<u8>) -> Result<(), Errno> {
        let st = rustix::fs::fstatfs(self.fd(node)?)?;
        out.put_u64(st.f_blocks);
        out.put_u64(st.f_bfree);
        out.put_u64(st.f_bavail);
        out.put_u64(st.f_files);
        out.put_u64(st.f_ffree);
        out.put_u32(st.f_bsize as u32);
        out.put_u32(st.f_namelen as u32);
        out.put_u32(st.f_frsize as u32);
        out.put_zeros(28);
        Ok(())
    }

    pub(super) fn setxattr(
        &self,
        node: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> Result<(), Errno> {
        allow(name, Errno::PERM)?;
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let fd = self.fd(node)?;
        rustix::fs::setxattr(DecInt::from_fd(&fd), name, value, flags)
    }

    pub(super) fn getxattr(
        &self,
        node: u64,
        name: &CStr,
        size: u32,
        room: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        allow(name, Errno::NODATA)?;
        let fd = self.fd(node)?;
        let path = DecInt::from_fd(&fd);
        if size == 0 {
            put_size(out, rustix::fs::getxattr_query(path, name)?);
            return Ok(());
        }
        out.resize(room.min(size as usize).min(XATTR_VALUE_MAX_BYTES), 0);
        let len = rustix::fs::getxattr(path, name, &mut out[..])?;
        out.truncate(len);
        Ok(())
    }

    pub(super) fn listxattr(
        &self,
        node: u64,
        size: u32,
        room: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let fd = self.fd(node)?;
        // The whole list, because what the guest may not have is taken out of it.
        out.resize(XATTR_VALUE_MAX_BYTES, 0);
        let len = rustix::fs::listxattr(DecInt::from_fd(&fd), &mut out[..])?;
        out.truncate(len);
        let mut allowed = Vec::with_capacity(out.len());
        for name in out.split_inclusive(|byte| *byte == 0) {
            if CStr::from_bytes_with_nul(name).is_ok_and(|name| allow(name, Errno::PERM).is_ok()) {
                allowed.extend_from_slice(name);
            }
        }
        out.clear();
        if size == 0 {
            put_size(out, allowed.len());
        } else if allowed.len() > room.min(size as usize) {
            return Err(Errno::RANGE);
        } else {
            out.extend_from_slice(&allowed);
        }
        Ok(())
    }

    pub(super) fn removexattr(&self, node: u64, name: &CStr) -> Result<(), Errno> {
        allow(name, Errno::PERM)?;
        let fd = self.fd(node)?;
        rustix::fs::removexattr(DecInt::from_fd(&fd), name)
    }
}

/// The extended attributes that a guest may have: its own, and file capabilities. `trusted.*` and the other
/// `security.*` mean something to the host (overlayfs, SELinux, IMA); POSIX ACLs are not announced.
fn allow(name: &CStr, refused: Errno) -> Result<(), Errno> {
    let name = name.to_bytes();
    if name.starts_with(b"user.") || name == b"security.capability" {
        Ok(())
    } else if name.starts_with(b"system.posix_acl_") {
        Err(Errno::OPNOTSUPP)
    } else {
        Err(refused)
    }
}

fn put_size(out: &mut Vec<u8>, size: usize) {
    out.clear();
    out.put_u32(size as u32);
    out.put_u32(0);
}

fn timespec(time: Time) -> Timespec {
    let (tv_sec, tv_nsec) = match time {
        Time::Keep => (0, UTIME_OMIT),
        Time::Now => (0, UTIME_NOW),
        Time::At { seconds, nanos } => (seconds, i64::from(nanos)),
    };
    Timespec { tv_sec, tv_nsec }
}
