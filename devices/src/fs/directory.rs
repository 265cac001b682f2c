//! READDIR and READDIRPLUS.

use super::abi::{self, Put};
use super::session::{Scratch, Session, stat_at};
use rustix::fs::{FileType, RawDir, SeekFrom};
use rustix::io::Errno;
use std::ffi::CStr;
use std::os::fd::AsFd;
use std::sync::PoisonError;

/// Bytes of directory entries taken from the host's kernel at once, and most bytes of one reply.
pub(crate) const ENTRIES_MAX_BYTES: usize = 64 * 1024;

impl Session {
    /// Fills `scratch.reply` with at most `room` bytes of entries from `offset` on.
    pub(super) fn readdir(
        &self,
        (node, fh): (u64, u64),
        offset: u64,
        room: usize,
        plus: bool,
        scratch: &mut Scratch,
    ) -> Result<(), Errno> {
        let file = self.file(node, fh)?;
        let position = file.position.as_ref().ok_or(Errno::NOTDIR)?;
        // The kernel keeps the place in the directory in the open file: one reader of it at a time.
        let mut position = position.lock().unwrap_or_else(PoisonError::into_inner);
        if *position != Some(offset) {
            rustix::fs::seek(&file.fd, SeekFrom::Start(offset))?;
        }
        // Unknown until this is done; an early return makes the next request seek.
        *position = None;
        let room = room.min(ENTRIES_MAX_BYTES);
        let buffer = scratch.entries.spare_capacity_mut();
        let buffer = buffer.get_mut(..entries_bytes(room)).ok_or(Errno::INVAL)?;
        let mut entries = RawDir::new(&file.fd, buffer);
        let out = &mut scratch.reply;
        let mut full = false;
        let mut cookie = offset;
        while let Some(entry) = entries.next() {
            let entry = match entry {
                Ok(entry) => entry,
                Err(errno) if out.is_empty() => return Err(errno),
                // What was found before it counts; the error comes up again at the next request.
                Err(_) => break,
            };
            let next = entry.next_entry_cookie();
            let size = record_bytes(entry.file_name(), plus);
            if out.len() + size > room {
                full = true;
                break;
            }
            if plus && !self.put_plus(node, file.fd.as_fd(), entry.file_name(), out) {
                continue;
            }
            let kind = file_type_bits(entry.file_type());
            put_dirent(out, entry.ino(), next, kind, entry.file_name());
            cookie = next;
        }
        if full && out.is_empty() {
            // Not even one entry fits: an empty reply would say that the directory ends here.
            return Err(Errno::INVAL);
        }
        if !full {
            *position = Some(cookie);
        }
        Ok(())
    }

    /// The `fuse_entry_out` before an entry's name. False if the entry is gone by now.
    fn put_plus(
        &self,
        node: u64,
        dir: std::os::fd::BorrowedFd<'_>,
        name: &CStr,
        out: &mut Vec<u8>,
    ) -> bool {
        // Node 0 says: no lookup was counted for this one.
        if matches!(name.to_bytes(), b"." | b"..") {
            out.put_zeros(abi::ENTRY_OUT_BYTES);
            return true;
        }
        let entered = stat_at(dir, name)
            .and_then(|st| self.entry(node, dir, name, &st, out))
            .map(|_| ());
        match entered {
            Ok(()) => true,
            Err(Errno::NOENT) => false,
            Err(_) => {
                out.put_zeros(abi::ENTRY_OUT_BYTES);
                true
            }
        }
    }
}

/// How many bytes of the host's entries to ask for: about what fills the reply, so that little is read twice,
/// and never less than one entry with the longest name takes.
fn entries_bytes(room: usize) -> usize {
    (room / 2).clamp(1024, ENTRIES_MAX_BYTES)
}

fn record_bytes(name: &CStr, plus: bool) -> usize {
    let entry = abi::DIRENT_BYTES + name.count_bytes();
    let plus = if plus { abi::ENTRY_OUT_BYTES } else { 0 };
    plus + entry.next_multiple_of(8)
}

fn put_dirent(out: &mut Vec<u8>, ino: u64, next: u64, kind: u32, name: &CStr) {
    let name = name.to_bytes();
    out.put_u64(ino);
    out.put_u64(next);
    out.put_u32(name.len() as u32);
    out.put_u32(kind);
    out.extend_from_slice(name);
    let padded = (abi::DIRENT_BYTES + name.len()).next_multiple_of(8);
    out.put_zeros(padded - abi::DIRENT_BYTES - name.len());
}

/// `d_type`: the type bits of a mode, twelve bits lower.
fn file_type_bits(kind: FileType) -> u32 {
    match kind {
        FileType::Unknown => 0,
        kind => kind.as_raw_mode() >> 12,
    }
}
