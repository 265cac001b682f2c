//! What a disk's bytes are kept in: a regular file or a block device that the owner opened. Raw, whatever is in it: the first
//! bytes of a disk are the guest's, so nobody looks at them for a format: a guest that writes the header of one could name
//! any file of the host as its backing (GHSA-jmr4-g2hv-mjj6).

use super::request::SECTOR_BYTES;
use rustix::fs::{FileType, OFlags, SeekFrom};
use rustix::io::Errno;
use std::fs::File;
use std::os::fd::AsFd;

/// Largest block that is passed on to the guest: what Linux takes as the block size of a disk, and what a request is cut by.
const BLOCK_BYTES_MAX: u32 = 4096;

/// Why a file cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum BackingError {
    /// A directory, a pipe, a device of another kind.
    #[error("a disk has to be a regular file or a block device; this is neither")]
    Kind,
    /// It cannot be read, or not written though the guest may write.
    #[error("the disk's file is not open for {0}")]
    Access(&'static str),
    /// Writes would go elsewhere than where the guest wants them, or need buffers that a guest need not have.
    #[error("the disk's file is open with {0}, which a guest's requests cannot do with")]
    Flag(&'static str),
    /// Not even one sector.
    #[error("the disk has {0} bytes, less than a sector of {SECTOR_BYTES}")]
    Small(u64),
    /// The file would not say what it is.
    #[error("cannot ask the disk's file for its {0}")]
    Ask(&'static str, #[source] Errno),
}

/// What a disk's file says of itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct Backing {
    /// Size in sectors; what is left over at the end of the file is not part of the disk.
    pub(super) sectors: u64,
    /// Smallest block that a driver should use, in bytes: a power of two from 512 to [`BLOCK_BYTES_MAX`].
    pub(super) block_bytes: u32,
    /// Block that costs no reading to write, in bytes: a power of two, at least `block_bytes`.
    pub(super) physical_bytes: u32,
}

impl Backing {
    /// Checks that `file` can be a disk.
    ///
    /// # Errors
    /// See [`BackingError`].
    pub(super) fn new(file: &File, read_only: bool) -> Result<Backing, BackingError> {
        let flags = rustix::fs::fcntl_getfl(file).map_err(|e| BackingError::Ask("flags", e))?;
        let mode = flags & OFlags::RWMODE;
        if flags.contains(OFlags::PATH) || mode == OFlags::WRONLY {
            return Err(BackingError::Access("reading"));
        }
        if !read_only && mode != OFlags::RDWR {
            return Err(BackingError::Access("writing"));
        }
        for (flag, name) in [(OFlags::APPEND, "O_APPEND"), (OFlags::DIRECT, "O_DIRECT")] {
            if flags.contains(flag) {
                return Err(BackingError::Flag(name));
            }
        }
        let stat = rustix::fs::fstat(file).map_err(|e| BackingError::Ask("kind", e))?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        let (block_bytes, physical_bytes) = match kind {
            FileType::RegularFile => (SECTOR_BYTES as u32, u32::try_from(stat.st_blksize).ok()),
            FileType::BlockDevice => blocks_of_device(file)?,
            _ => return Err(BackingError::Kind),
        };
        let bytes = match kind {
            FileType::RegularFile => u64::try_from(stat.st_size).unwrap_or(0),
            // fstat does not tell the length of a device.
            _ => rustix::fs::seek(file, SeekFrom::End(0))
                .map_err(|e| BackingError::Ask("size", e))?,
        };
        let sectors = bytes / SECTOR_BYTES;
        if sectors == 0 {
            return Err(BackingError::Small(bytes));
        }
        let block_bytes = power_of_two(block_bytes);
        Ok(Backing {
            sectors,
            block_bytes,
            physical_bytes: power_of_two(physical_bytes.unwrap_or(block_bytes)).max(block_bytes),
        })
    }
}

fn blocks_of_device(file: &File) -> Result<(u32, Option<u32>), BackingError> {
    let ask = |what| move |cause| BackingError::Ask(what, cause);
    let fd = file.as_fd();
    let logical = rustix::fs::ioctl_blksszget(fd).map_err(ask("block size"))?;
    let physical = rustix::fs::ioctl_blkpbszget(fd).map_err(ask("physical block size"))?;
    Ok((logical, Some(physical)))
}

/// The nearest block size below that we pass on.
fn power_of_two(bytes: u32) -> u32 {
    let bytes = bytes.clamp(SECTOR_BYTES as u32, BLOCK_BYTES_MAX);
    1 << bytes.ilog2()
}
