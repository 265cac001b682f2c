//! A FUSE request as it lies on the queue (include/uapi/linux/fuse.h), with nothing that keeps it from being none.

use crate::cpu::poke;

/// `struct fuse_in_header` and `struct fuse_out_header`.
pub(super) const IN_HEADER: u32 = 40;
pub(super) const OUT_HEADER: u32 = 16;
/// The node that is the root.
pub(super) const ROOT: u64 = 1;

/// Operations.
pub(super) const LOOKUP: u32 = 1;
pub(super) const FORGET: u32 = 2;
pub(super) const GETATTR: u32 = 3;
pub(super) const SETATTR: u32 = 4;
pub(super) const READLINK: u32 = 5;
pub(super) const SYMLINK: u32 = 6;
pub(super) const MKNOD: u32 = 8;
pub(super) const MKDIR: u32 = 9;
pub(super) const UNLINK: u32 = 10;
pub(super) const RMDIR: u32 = 11;
pub(super) const RENAME: u32 = 12;
pub(super) const LINK: u32 = 13;
pub(super) const OPEN: u32 = 14;
pub(super) const READ: u32 = 15;
pub(super) const WRITE: u32 = 16;
pub(super) const STATFS: u32 = 17;
pub(super) const RELEASE: u32 = 18;
pub(super) const FSYNC: u32 = 20;
pub(super) const SETXATTR: u32 = 21;
pub(super) const GETXATTR: u32 = 22;
pub(super) const LISTXATTR: u32 = 23;
pub(super) const REMOVEXATTR: u32 = 24;
pub(super) const FLUSH: u32 = 25;
pub(super) const INIT: u32 = 26;
pub(super) const OPENDIR: u32 = 27;
pub(super) const READDIR: u32 = 28;
pub(super) const RELEASEDIR: u32 = 29;
pub(super) const FSYNCDIR: u32 = 30;
pub(super) const CREATE: u32 = 35;
pub(super) const INTERRUPT: u32 = 36;
pub(super) const DESTROY: u32 = 38;
pub(super) const BATCH_FORGET: u32 = 42;
pub(super) const FALLOCATE: u32 = 43;
pub(super) const READDIRPLUS: u32 = 44;
pub(super) const RENAME2: u32 = 45;
pub(super) const LSEEK: u32 = 46;
pub(super) const COPY_FILE_RANGE: u32 = 47;
pub(super) const SYNCFS: u32 = 50;

/// Answers.
pub(super) const OK: i32 = 0;
pub(super) const EPERM: i32 = 1;
pub(super) const ENOENT: i32 = 2;
pub(super) const E2BIG: i32 = 7;
pub(super) const EBADF: i32 = 9;
pub(super) const EINVAL: i32 = 22;
pub(super) const ENFILE: i32 = 23;
pub(super) const EFBIG: i32 = 27;
pub(super) const ENAMETOOLONG: i32 = 36;
pub(super) const ENOSYS: i32 = 38;
pub(super) const EPROTO: i32 = 71;
pub(super) const ESTALE: i32 = 116;

/// What follows the header of a request.
#[derive(Clone, Debug)]
pub(super) struct Arguments {
    bytes: [u8; Arguments::MAX],
    length: usize,
}

impl Arguments {
    const MAX: usize = 512;

    /// None.
    pub(super) fn none() -> Arguments {
        Arguments {
            bytes: [0; Arguments::MAX],
            length: 0,
        }
    }

    /// Numbers of 64 bits, which is also two of 32.
    pub(super) fn of(numbers: &[u64]) -> Arguments {
        numbers
            .iter()
            .fold(Arguments::none(), |more, number| more.u64(*number))
    }

    /// A name with its end.
    pub(super) fn named(name: &[u8]) -> Arguments {
        Arguments::none().name(name)
    }

    pub(super) fn bytes(mut self, bytes: &[u8]) -> Arguments {
        let end = self.length + bytes.len();
        self.bytes[self.length..end].copy_from_slice(bytes);
        self.length = end;
        self
    }

    pub(super) fn u32(self, number: u32) -> Arguments {
        self.bytes(&number.to_le_bytes())
    }

    pub(super) fn u64(self, number: u64) -> Arguments {
        self.bytes(&number.to_le_bytes())
    }

    pub(super) fn name(self, name: &[u8]) -> Arguments {
        self.bytes(name).bytes(&[0])
    }

    /// `struct fuse_init_in`.
    pub(super) fn init(major: u32, minor: u32, flags: u32) -> Arguments {
        Arguments::none().u32(major).u32(minor).u32(0).u32(flags)
    }

    /// `struct fuse_read_in` and `struct fuse_write_in`.
    pub(super) fn io(handle: u64, offset: u64, size: u32) -> Arguments {
        Arguments::of(&[handle, offset]).u32(size).bytes(&[0; 20])
    }

    /// How many bytes they are.
    pub(super) fn length(&self) -> u32 {
        self.length as u32
    }

    /// Writes them.
    pub(super) fn put(&self, at: u64) {
        for (at, byte) in (at..).zip(&self.bytes[..self.length]) {
            poke(at, *byte);
        }
    }
}

/// `struct fuse_in_header`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    pub(super) length: u32,
    pub(super) operation: u32,
    pub(super) unique: u64,
    pub(super) node: u64,
    pub(super) extensions: u16,
}

impl Header {
    /// Writes it, as root's.
    pub(super) fn put(self, at: u64) {
        poke(at, self.length);
        poke(at + 4, self.operation);
        poke(at + 8, self.unique);
        poke(at + 16, self.node);
        poke(at + 24, 0u64);
        poke(at + 32, 0u32);
        poke(at + 36, self.extensions);
        poke(at + 38, 0u16);
    }
}
