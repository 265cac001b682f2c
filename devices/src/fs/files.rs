//! Requests about open files: open, create, read, write, and what goes with them.

use super::abi::{self, Put};
use super::credentials::{Creator, without_fsetid};
use super::guest_io::Buffers;
use super::names::permissions;
use super::nodes::Stamp;
use super::request::{Header, Op, Span};
use super::session::{OpenFile, Served, Session, open_new, stat_at};
use rustix::fs::{FallocateFlags, Mode, OFlags, SeekFrom, Statx};
use rustix::io::Errno;
use rustix::path::DecInt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Most bytes that one COPY_FILE_RANGE copies; the guest asks again for the rest. It bounds how long one
/// request keeps its thread.
const COPY_MAX_BYTES: u64 = 16 << 20;

/// How long ago a file's last change must be before its time tells that nothing changed since, ms. The
/// coarsest clocks of file systems tick every two seconds.
const SETTLE_MS: u64 = 2000;

/// The open flags that mean something to the host. O_APPEND is done per write, O_DIRECT stays in the guest
/// (the host's alignment rules are not the guest's), O_NOFOLLOW, O_PATH and the rest are ours to decide.
fn host_flags(flags: u32) -> OFlags {
    let wanted = libc::O_ACCMODE | libc::O_TRUNC | libc::O_SYNC | libc::O_DSYNC;
    OFlags::from_bits_retain(flags & wanted as u32) | OFlags::CLOEXEC | OFlags::NOCTTY
}

fn is_writable(flags: OFlags) -> bool {
    flags.intersects(OFlags::WRONLY | OFlags::RDWR)
}

impl Session {
    /// An open file of the guest, which must be the one of that node.
    pub(super) fn file(&self, node: u64, fh: u64) -> Result<Arc<OpenFile>, Errno> {
        let files = self.files.read().unwrap_or_else(PoisonError::into_inner);
        match files.get(&fh) {
            Some(file) if file.node == node => Ok(file.clone()),
            _ => Err(Errno::BADF),
        }
    }

    /// As [`Session::file`], and no directory.
    pub(super) fn regular(&self, node: u64, fh: u64) -> Result<Arc<OpenFile>, Errno> {
        let file = self.file(node, fh)?;
        match file.position {
            Some(_) => Err(Errno::ISDIR),
            None => Ok(file),
        }
    }

    fn add(&self, file: OpenFile) -> u64 {
        let fh = self.next_file.fetch_add(1, Ordering::Relaxed);
        let mut files = self.files.write().unwrap_or_else(PoisonError::into_inner);
        files.insert(fh, Arc::new(file));
        fh
    }

    /// The file type of a node (`S_IFMT` bits).
    pub(super) fn kind(&self, id: u64) -> Result<u32, Errno> {
        Ok(self.table().key(id)?.kind)
    }

    /// Opens a regular file or directory that is open as `O_PATH`.
    pub(super) fn reopen(&self, fd: &OwnedFd, flags: OFlags) -> Result<OwnedFd, Errno> {
        rustix::fs::openat(&*self.proc_fds, DecInt::from_fd(fd), flags, Mode::empty())
    }

    pub(super) fn open(
        &self,
        node: u64,
        flags: u32,
        kill_suidgid: bool,
        out: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        match self.kind(node)? {
            libc::S_IFREG => {}
            libc::S_IFDIR => return Err(Errno::ISDIR),
            // The guest's kernel never asks for this; whatever does must not reach the host's device.
            _ => return Err(Errno::PERM),
        }
        let permit = self.permit()?;
        let fd = self.fd(node)?;
        let flags = host_flags(flags);
        let open = || self.reopen(&fd, flags);
        let fd = match kill_suidgid && flags.contains(OFlags::TRUNC) {
            true => without_fsetid(open)?,
            false => open()?,
        };
        let stamp = stamp(&stat_at(fd.as_fd(), c"")?, SystemTime::now());
        let keep = match self.table().opened(node, stamp) {
            true => abi::FOPEN_KEEP_CACHE,
            false => 0,
        };
        let fh = self.add(OpenFile {
            node,
            fd,
            writable: is_writable(flags),
            position: None,
            _permit: permit,
        });
        put_open(out, fh, keep | at_close(is_writable(flags)));
        Ok(())
    }

    pub(super) fn opendir(&self, node: u64, out: &mut Vec<u8>) -> Result<(), Errno> {
        if self.kind(node)? != libc::S_IFDIR {
            return Err(Errno::NOTDIR);
        }
        let permit = self.permit()?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = self.reopen(&*self.fd(node)?, flags)?;
        let fh = self.add(OpenFile {
            node,
            fd,
            writable: false,
            position: Some(Mutex::new(Some(0))),
            _permit: permit,
        });
        put_open(out, fh, at_close(false));
        Ok(())
    }

    pub(super) fn create(
        &self,
        header: &Header,
        op: &Op<'_>,
        out: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let Op::Create {
            name,
            flags,
            mode,
            kill_suidgid,
        } = *op
        else {
            return Err(Errno::INVAL);
        };
        let permit = self.permit()?;
        let dir = self.fd(header.node)?;
        let host = host_flags(flags);
        let made = {
            let _creator = Creator::become_(header.uid, header.gid)?;
            // Always exclusive: a file that is there already is opened as OPEN would.
            open_new(dir.as_fd(), name.as_c_str(), host, permissions(mode))
        };
        match made {
            Ok(fd) => {
                let st = stat_at(fd.as_fd(), c"")?;
                let node = self.entry(header.node, dir.as_fd(), name.as_c_str(), &st, out)?;
                let fh = self.add(OpenFile {
                    node,
                    fd,
                    writable: is_writable(host),
                    position: None,
                    _permit: permit,
                });
                put_open(out, fh, at_close(is_writable(host)));
                Ok(())
            }
            Err(Errno::EXIST) if flags & libc::O_EXCL as u32 == 0 => {
                drop(permit);
                let st = stat_at(dir.as_fd(), name.as_c_str())?;
                let node = self.entry(header.node, dir.as_fd(), name.as_c_str(), &st, out)?;
                let opened = self.open(node, flags, kill_suidgid, out);
                if opened.is_err() {
                    self.take_back(node);
                }
                opened
            }
            Err(errno) => Err(errno),
        }
    }

    pub(super) fn release(&self, node: u64, fh: u64) -> Result<(), Errno> {
        self.file(node, fh)?;
        let mut files = self.files.write().unwrap_or_else(PoisonError::into_inner);
        let file = files.remove(&fh);
        drop(files);
        // The descriptor is closed here, unless another request still uses it, and after the lock.
        drop(file);
        Ok(())
    }

    pub(super) fn read(
        &self,
        node: u64,
        fh: u64,
        span: Span,
        buffers: &Buffers<'_>,
        room: usize,
    ) -> Result<Served, Errno> {
        let file = self.regular(node, fh)?;
        let len = room.min(span.len as usize);
        let read = buffers.read_file(abi::OUT_HEADER_BYTES, len, file.fd.as_fd(), span.offset)?;
        Ok(Served::Data(read))
    }

    pub(super) fn write(
        &self,
        node: u64,
        fh: u64,
        span: Span,
        (append, kill_suidgid): (bool, bool),
        buffers: &Buffers<'_>,
        out: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let file = self.regular(node, fh)?;
        let at = abi::IN_HEADER_BYTES + abi::WRITE_IN_BYTES;
        let fd = file.fd.as_fd();
        let write = || buffers.write_file(at, span.len as usize, fd, span.offset, append);
        // The guest says it of every write by an unprivileged process; only these files care.
        let kills = kill_suidgid && has_suidgid(&file.fd)?;
        let written = if kills {
            without_fsetid(write)?
        } else {
            write()?
        };
        out.put_u32(written as u32);
        out.put_u32(0);
        Ok(())
    }

    /// What `close(2)` in the guest must do: on network file systems the host's `close` is where late write
    /// errors come up, so one is made.
    pub(super) fn flush(&self, node: u64, fh: u64) -> Result<(), Errno> {
        let file = self.file(node, fh)?;
        if !file.writable {
            return Ok(());
        }
        let copy = rustix::io::dup(&file.fd)?;
        nix::unistd::close(copy).map_err(|errno| Errno::from_raw_os_error(errno as i32))
    }

    pub(super) fn fsync(&self, node: u64, fh: u64, data_only: bool) -> Result<(), Errno> {
        let file = self.file(node, fh)?;
        match data_only {
            true => rustix::fs::fdatasync(&file.fd),
            false => rustix::fs::fsync(&file.fd),
        }
    }

    pub(super) fn syncfs(&self, node: u64) -> Result<(), Errno> {
        if self.kind(node)? != libc::S_IFDIR {
            return Err(Errno::INVAL);
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = self.reopen(&*self.fd(node)?, flags)?;
        rustix::fs::syncfs(fd)
    }

    pub(super) fn fallocate(&self, node: u64, fh: u64, span: Span, mode: u32) -> Result<(), Errno> {
        let known =
            FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE;
        let mode = FallocateFlags::from_bits_retain(mode);
        if !known.contains(mode) {
            return Err(Errno::OPNOTSUPP);
        }
        let file = self.regular(node, fh)?;
        rustix::fs::fallocate(&file.fd, mode, span.offset, span.len)
    }

    pub(super) fn lseek(
        &self,
        node: u64,
        fh: u64,
        offset: u64,
        whence: u32,
        out: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let file = self.regular(node, fh)?;
        if offset > i64::MAX as u64 {
            return Err(Errno::INVAL);
        }
        // Only these two need the host; the rest the guest's kernel answers itself.
        let to = match i32::try_from(whence) {
            Ok(libc::SEEK_DATA) => SeekFrom::Data(offset),
            Ok(libc::SEEK_HOLE) => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL),
        };
        out.put_u64(rustix::fs::seek(&file.fd, to)?);
        Ok(())
    }

    pub(super) fn copy_file_range(
        &self,
        node: u64,
        op: &Op<'_>,
        out: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let Op::CopyFileRange {
            from,
            mut from_offset,
            to_node,
            to,
            mut to_offset,
            len,
        } = *op
        else {
            return Err(Errno::INVAL);
        };
        let len = len.min(COPY_MAX_BYTES);
        let fits = |offset: u64| {
            offset
                .checked_add(len)
                .is_some_and(|end| end <= i64::MAX as u64)
        };
        if !fits(from_offset) || !fits(to_offset) {
            return Err(Errno::INVAL);
        }
        let (source, target) = (self.regular(node, from)?, self.regular(to_node, to)?);
        let copied = rustix::fs::copy_file_range(
            &source.fd,
            Some(&mut from_offset),
            &target.fd,
            Some(&mut to_offset),
            len as usize,
        )?;
        out.put_u32(copied as u32);
        out.put_u32(0);
        Ok(())
    }
}

/// Whether the file has a setuid or setgid bit.
pub(super) fn has_suidgid(fd: &OwnedFd) -> Result<bool, Errno> {
    let st = stat_at(fd.as_fd(), c"")?;
    Ok(u32::from(st.stx_mode) & (libc::S_ISUID | libc::S_ISGID) != 0)
}

/// What the file's content can be known by later, or nothing while a change could still leave the same
/// time behind: file systems count time in ticks, some in seconds.
fn stamp(st: &Statx, now: SystemTime) -> Option<Stamp> {
    let seconds = u64::try_from(st.stx_ctime.tv_sec).ok()?;
    let changed = UNIX_EPOCH + Duration::new(seconds, st.stx_ctime.tv_nsec);
    let settled = now.duration_since(changed).ok()? >= Duration::from_millis(SETTLE_MS);
    let nanos = st.stx_ctime.tv_sec.checked_mul(1_000_000_000)?;
    settled.then_some(Stamp {
        changed: nanos.checked_add(i64::from(st.stx_ctime.tv_nsec))?,
        size: st.stx_size,
    })
}

/// Nothing was written through a file that is not writable, so its close has nothing to report.
fn at_close(writable: bool) -> u32 {
    if writable { 0 } else { abi::FOPEN_NOFLUSH }
}

fn put_open(out: &mut Vec<u8>, fh: u64, flags: u32) {
    out.put_u64(fh);
    out.put_u32(flags);
    out.put_u32(0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_trusted_to_show_only_after_two_seconds() {
        let path = std::env::current_exe().unwrap();
        let file = std::fs::File::open(path).unwrap();
        let st = stat_at(file.as_fd(), c"").unwrap();
        let seconds = st.stx_ctime.tv_sec as u64;
        let changed = UNIX_EPOCH + Duration::new(seconds, st.stx_ctime.tv_nsec);
        assert_eq!(stamp(&st, changed), None);
        assert_eq!(stamp(&st, changed - Duration::from_secs(1)), None);
        assert_eq!(stamp(&st, changed + Duration::from_millis(1999)), None);
        let settled = stamp(&st, changed + Duration::from_secs(2)).unwrap();
        assert_eq!(settled.size, st.stx_size);
    }
}
