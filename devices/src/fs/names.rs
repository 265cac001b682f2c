//! Requests about names: look up, make, link, rename and remove.

use super::credentials::Creator;
use super::nodes::NodeTable;
use super::request::{Forget, Header, Name};
use super::session::{Session, open_path, stat_at};
use rustix::fs::{AtFlags, FileType, Mode, RenameFlags};
use rustix::io::Errno;
use rustix::path::DecInt;
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

impl Session {
    pub(super) fn forget(&self, forgets: &[Forget]) {
        let mut closed = Vec::new();
        let mut table = self.table();
        for forget in forgets {
            table.forget(forget.node, forget.lookups, &mut closed);
        }
        drop(table);
        // Closing comes after the lock is gone.
        drop(closed);
    }

    pub(super) fn lookup(
        &self,
        parent: u64,
        name: Name<'_>,
        out: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let dir = self.fd(parent)?;
        self.answer_entry(parent, dir.as_fd(), name, out)
    }

    fn answer_entry(
        &self,
        parent: u64,
        dir: BorrowedFd<'_>,
        name: Name<'_>,
        out: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let name = name.as_c_str();
        let st = stat_at(dir, name)?;
        self.entry(parent, dir, name, &st, out)?;
        Ok(())
    }

    pub(super) fn symlink(
        &self,
        header: &Header,
        name: Name<'_>,
        target: &CStr,
        out: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let dir = self.fd(header.node)?;
        {
            let _creator = Creator::become_(header.uid, header.gid)?;
            rustix::fs::symlinkat(target, &dir, name.as_c_str())?;
        }
        self.answer_entry(header.node, dir.as_fd(), name, out)
    }

    /// Regular files, fifos, sockets, and the character device 0:0 that is an overlay's whiteout. A real
    /// device would be one of the host's (CVE-2020-35517); containers get theirs from the agent.
    pub(super) fn mknod(
        &self,
        header: &Header,
        name: Name<'_>,
        mode: u32,
        rdev: u32,
        out: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let kind = match (mode & libc::S_IFMT, rdev) {
            (0 | libc::S_IFREG, _) => FileType::RegularFile,
            (libc::S_IFIFO, _) => FileType::Fifo,
            (libc::S_IFSOCK, _) => FileType::Socket,
            (libc::S_IFCHR, 0) => FileType::CharacterDevice,
            (libc::S_IFCHR | libc::S_IFBLK, _) => return Err(Errno::PERM),
            _ => return Err(Errno::INVAL),
        };
        let dir = self.fd(header.node)?;
        {
            let _creator = Creator::become_(header.uid, header.gid)?;
            rustix::fs::mknodat(&dir, name.as_c_str(), kind, permissions(mode), 0)?;
        }
        self.answer_entry(header.node, dir.as_fd(), name, out)
    }

    pub(super) fn mkdir(
        &self,
        header: &Header,
        name: Name<'_>,
        mode: u32,
        out: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let dir = self.fd(header.node)?;
        {
            let _creator = Creator::become_(header.uid, header.gid)?;
            rustix::fs::mkdirat(&dir, name.as_c_str(), permissions(mode))?;
        }
        self.answer_entry(header.node, dir.as_fd(), name, out)
    }

    pub(super) fn link(
        &self,
        target: u64,
        parent: u64,
        name: Name<'_>,
        out: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let dir = self.fd(parent)?;
        let file = self.fd(target)?;
        // AT_EMPTY_PATH would need CAP_DAC_READ_SEARCH, which these threads must not have.
        rustix::fs::linkat(
            &*self.proc_fds,
            DecInt::from_fd(&file),
            &dir,
            name.as_c_str(),
            AtFlags::SYMLINK_FOLLOW,
        )?;
        self.answer_entry(parent, dir.as_fd(), name, out)
    }

    pub(super) fn unlink(&self, parent: u64, name: Name<'_>, flags: AtFlags) -> Result<(), Errno> {
        let dir = self.fd(parent)?;
        let victim = self.pin_victim(parent, dir.as_fd(), name);
        let result = rustix::fs::unlinkat(&dir, name.as_c_str(), flags);
        self.unpin_survivor(result, victim, parent, name)
    }

    pub(super) fn rename(
        &self,
        (parent, name): (u64, Name<'_>),
        (new_parent, new_name): (u64, Name<'_>),
        flags: u32,
    ) -> Result<(), Errno> {
        let flags = RenameFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let known = RenameFlags::NOREPLACE | RenameFlags::EXCHANGE | RenameFlags::WHITEOUT;
        if !known.contains(flags) {
            return Err(Errno::INVAL);
        }
        let (dir, new_dir) = (self.fd(parent)?, self.fd(new_parent)?);
        let replaces = !flags.intersects(RenameFlags::NOREPLACE | RenameFlags::EXCHANGE);
        let victim = match replaces {
            true => self.pin_victim(new_parent, new_dir.as_fd(), new_name),
            false => None,
        };
        let result =
            rustix::fs::renameat_with(&dir, name.as_c_str(), &new_dir, new_name.as_c_str(), flags);
        self.unpin_survivor(result, victim, new_parent, new_name)?;
        self.note_place(new_parent, new_dir.as_fd(), new_name);
        if flags.contains(RenameFlags::EXCHANGE) {
            self.note_place(parent, dir.as_fd(), name);
        }
        Ok(())
    }

    /// If the guest knows the file at a name that is about to go, keeps a descriptor of it: the guest may
    /// still have it open and ask for its attributes. Best effort: without it the guest gets ESTALE.
    fn pin_victim(&self, parent: u64, dir: BorrowedFd<'_>, name: Name<'_>) -> Option<u64> {
        let name = name.as_c_str();
        let st = stat_at(dir, name).ok()?;
        let key = self.key(dir, name, &st).ok()?;
        let id = {
            let mut table = self.table();
            let id = table
                .find(&key)
                .filter(|id| table.is_at(*id, parent, name))?;
            table.pin(id);
            if table.fd(id).ok()?.is_some() {
                return Some(id);
            }
            id
        };
        let fd = open_path(dir, name).ok()?;
        let opened = stat_at(fd.as_fd(), c"").ok()?;
        if self.key(fd.as_fd(), c"", &opened).ok()? == key {
            let closed = self.table().keep(id, Arc::new(fd));
            drop(closed);
        }
        Some(id)
    }

    /// The name did not go after all: its node is an ordinary one again.
    fn unpin_survivor(
        &self,
        result: Result<(), Errno>,
        victim: Option<u64>,
        parent: u64,
        name: Name<'_>,
    ) -> Result<(), Errno> {
        if let (Err(_), Some(id)) = (&result, victim) {
            self.table().moved(id, parent, name.as_c_str());
        }
        result
    }

    /// Notes where a renamed file is now, if the guest knows it.
    fn note_place(&self, parent: u64, dir: BorrowedFd<'_>, name: Name<'_>) {
        let name = name.as_c_str();
        let Ok(st) = stat_at(dir, name) else {
            return;
        };
        let Ok(key) = self.key(dir, name, &st) else {
            return;
        };
        let mut table = self.table();
        let note = |table: &mut NodeTable| {
            let id = table.find(&key)?;
            table.moved(id, parent, name);
            Some(())
        };
        note(&mut table);
    }
}

/// The twelve permission bits of a mode.
pub(super) fn permissions(mode: u32) -> Mode {
    Mode::from_raw_mode(mode & 0o7777)
}
