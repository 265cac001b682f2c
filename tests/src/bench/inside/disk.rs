//! Accesses to one file by threads.

use super::super::load::{Accesses, STORE_BYTES};
use super::Task;
use nix::libc;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

/// What O_DIRECT wants of a buffer's address; no device here has larger blocks.
const ALIGN_BYTES: usize = 4 << 10;
/// Where the random places of the first thread begin; any but 0.
const SEED: u64 = 0x9e37_79b9_7f4a_7c15;

/// The disk, past the page cache.
pub(super) struct Disk {
    file: File,
    accesses: Accesses,
}

impl Disk {
    /// The first one.
    ///
    /// # Errors
    /// There is none.
    pub(super) fn open(accesses: Accesses) -> io::Result<Disk> {
        let file = OpenOptions::new()
            .read(true)
            .write(accesses.write)
            .custom_flags(libc::O_DIRECT)
            .open("/dev/vda")?;
        Ok(Disk { file, accesses })
    }
}

impl Task for Disk {
    fn round(&mut self) -> io::Result<()> {
        access(&self.file, self.accesses)
    }
}

/// Does all `accesses` to `file`.
///
/// # Errors
/// One fails.
pub(super) fn access(file: &File, accesses: Accesses) -> io::Result<()> {
    if accesses.threads == 1 {
        return access_as(file, accesses, 0);
    }
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..accesses.threads)
            .map(|thread| scope.spawn(move || access_as(file, accesses, thread)))
            .collect();
        threads.into_iter().try_for_each(|thread| {
            thread
                .join()
                .map_err(|_| io::Error::other("a thread panicked"))?
        })
    })
}

fn access_as(file: &File, accesses: Accesses, thread: usize) -> io::Result<()> {
    let length = accesses.bytes;
    let mut room = vec![b'x'; length + ALIGN_BYTES];
    let start = room.as_ptr().align_offset(ALIGN_BYTES);
    let buffer = room
        .get_mut(start..start + length)
        .ok_or(io::ErrorKind::InvalidInput)?;
    let places = (STORE_BYTES / length) as u64;
    let share = (accesses.count / accesses.threads) as u64;
    let mut random = SEED.wrapping_mul(1 + thread as u64);
    for index in 0..share {
        let place = if accesses.random {
            // Marsaglia's xorshift.
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % places
        } else {
            thread as u64 * share + index
        };
        let offset = place * length as u64;
        match accesses.write {
            true => file.write_all_at(buffer, offset)?,
            false => file.read_exact_at(buffer, offset)?,
        }
    }
    Ok(())
}
