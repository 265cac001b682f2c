//! The FUSE protocol as it lies on the queue: opcodes, flags, and the layout of replies.
//!
//! Source: `include/uapi/linux/fuse.h` of Linux 6.12 (protocol 7.41). Everything is little-endian on the
//! one architecture this runs on, and is read and written field by field, so no struct is ever overlaid on
//! guest bytes.

/// The protocol's major version; another one is not spoken.
pub(crate) const VERSION_MAJOR: u32 = 7;
/// The minor version that this server was written for. The guest uses the smaller of the two.
pub(crate) const VERSION_MINOR: u32 = 38;
/// The oldest minor version served: 7.31 is the first with virtio-fs, and no layout here is older.
pub(crate) const VERSION_MINOR_MIN: u32 = 31;

/// The node that is the root of the share.
pub(crate) const ROOT_ID: u64 = 1;

/// `struct fuse_in_header`, bytes.
pub(crate) const IN_HEADER_BYTES: usize = 40;
/// `struct fuse_out_header`, bytes.
pub(crate) const OUT_HEADER_BYTES: usize = 16;
/// `struct fuse_write_in`, bytes: the data follows it.
pub(crate) const WRITE_IN_BYTES: usize = 40;
/// `struct fuse_entry_out`, bytes.
pub(crate) const ENTRY_OUT_BYTES: usize = 128;
/// `struct fuse_attr_out`, bytes.
pub(crate) const ATTR_OUT_BYTES: usize = 104;
/// `struct fuse_open_out`, bytes.
pub(crate) const OPEN_OUT_BYTES: usize = 16;
/// `struct fuse_init_out`, bytes.
pub(crate) const INIT_OUT_BYTES: usize = 64;
/// `struct fuse_kstatfs`, bytes.
pub(crate) const STATFS_OUT_BYTES: usize = 80;
/// `struct fuse_dirent` without its name, bytes.
pub(crate) const DIRENT_BYTES: usize = 24;

/// Request codes (`enum fuse_opcode`); those that are not here are answered with ENOSYS.
pub(crate) mod opcode {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const SETATTR: u32 = 4;
    pub(crate) const READLINK: u32 = 5;
    pub(crate) const SYMLINK: u32 = 6;
    pub(crate) const MKNOD: u32 = 8;
    pub(crate) const MKDIR: u32 = 9;
    pub(crate) const UNLINK: u32 = 10;
    pub(crate) const RMDIR: u32 = 11;
    pub(crate) const RENAME: u32 = 12;
    pub(crate) const LINK: u32 = 13;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const STATFS: u32 = 17;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const FSYNC: u32 = 20;
    pub(crate) const SETXATTR: u32 = 21;
    pub(crate) const GETXATTR: u32 = 22;
    pub(crate) const LISTXATTR: u32 = 23;
    pub(crate) const REMOVEXATTR: u32 = 24;
    pub(crate) const FLUSH: u32 = 25;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const OPENDIR: u32 = 27;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const RELEASEDIR: u32 = 29;
    pub(crate) const FSYNCDIR: u32 = 30;
    pub(crate) const CREATE: u32 = 35;
    pub(crate) const INTERRUPT: u32 = 36;
    pub(crate) const DESTROY: u32 = 38;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const FALLOCATE: u32 = 43;
    pub(crate) const READDIRPLUS: u32 = 44;
    pub(crate) const RENAME2: u32 = 45;
    pub(crate) const LSEEK: u32 = 46;
    pub(crate) const COPY_FILE_RANGE: u32 = 47;
    pub(crate) const SYNCFS: u32 = 50;
}

/// Flags of FUSE_INIT.
pub(crate) mod init {
    pub(crate) const ASYNC_READ: u64 = 1 << 0;
    pub(crate) const ATOMIC_O_TRUNC: u64 = 1 << 3;
    pub(crate) const BIG_WRITES: u64 = 1 << 5;
    pub(crate) const AUTO_INVAL_DATA: u64 = 1 << 12;
    pub(crate) const DO_READDIRPLUS: u64 = 1 << 13;
    pub(crate) const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub(crate) const ASYNC_DIO: u64 = 1 << 15;
    pub(crate) const PARALLEL_DIROPS: u64 = 1 << 18;
    pub(crate) const MAX_PAGES: u64 = 1 << 22;
    pub(crate) const CACHE_SYMLINKS: u64 = 1 << 23;
    pub(crate) const SUBMOUNTS: u64 = 1 << 27;
    pub(crate) const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub(crate) const INIT_EXT: u64 = 1 << 30;
}

/// `valid` bits of FUSE_SETATTR.
pub(crate) mod fattr {
    pub(crate) const MODE: u32 = 1 << 0;
    pub(crate) const UID: u32 = 1 << 1;
    pub(crate) const GID: u32 = 1 << 2;
    pub(crate) const SIZE: u32 = 1 << 3;
    pub(crate) const ATIME: u32 = 1 << 4;
    pub(crate) const MTIME: u32 = 1 << 5;
    pub(crate) const FH: u32 = 1 << 6;
    pub(crate) const ATIME_NOW: u32 = 1 << 7;
    pub(crate) const MTIME_NOW: u32 = 1 << 8;
    pub(crate) const KILL_SUIDGID: u32 = 1 << 11;
}

/// GETATTR: the file handle is valid.
pub(crate) const GETATTR_FH: u32 = 1;
/// OPEN and CREATE: drop setuid and setgid if the file is truncated.
pub(crate) const OPEN_KILL_SUIDGID: u32 = 1;
/// WRITE: delayed write from the page cache, its offset is final.
pub(crate) const WRITE_CACHE: u32 = 1;
/// WRITE: drop setuid and setgid.
pub(crate) const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// FSYNC: only data.
pub(crate) const FSYNC_FDATASYNC: u32 = 1;
/// OPEN reply: do not throw away what is cached of the file.
pub(crate) const FOPEN_KEEP_CACHE: u32 = 1 << 1;
/// OPEN reply: no FLUSH at close.
pub(crate) const FOPEN_NOFLUSH: u32 = 1 << 5;
/// Attribute flag: a mount on the host starts at this directory.
pub(crate) const ATTR_SUBMOUNT: u32 = 1;

/// Appends little-endian fields to a reply.
pub(crate) trait Put {
    fn put_u16(&mut self, value: u16);
    fn put_u32(&mut self, value: u32);
    fn put_u64(&mut self, value: u64);
    fn put_zeros(&mut self, count: usize);
}

impl Put for Vec<u8> {
    fn put_u16(&mut self, value: u16) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn put_u32(&mut self, value: u32) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn put_u64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn put_zeros(&mut self, count: usize) {
        self.resize(self.len() + count, 0);
    }
}

/// The device number as FUSE carries it: 12 bits of major, 20 bits of minor (`new_encode_dev`).
pub(crate) fn encode_rdev(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & !0xff) << 12)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_are_as_new_encode_dev_makes_them() {
        assert_eq!(encode_rdev(1, 3), 0x103);
        assert_eq!(encode_rdev(259, 300), 0x0011_032c);
        assert_eq!(encode_rdev(4095, 1_048_575), u32::MAX);
    }
}
