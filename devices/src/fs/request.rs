//! FUSE requests, parsed once into types that cannot be wrong.
//!
//! Nothing is trusted: the length in the header must be the length of the chain, each opcode's arguments
//! must be there and nothing behind them, a name is one path component, an offset fits the kernel's signed
//! type, a size has a bound. What is refused here never reaches a system call.

use super::abi::{self, fattr, opcode};
use rustix::io::Errno;
use std::ffi::CStr;

/// Most bytes of a request that carries no file data: the largest is SETXATTR with a value of
/// [`XATTR_VALUE_MAX_BYTES`] and a name.
pub(crate) const REQUEST_MAX_BYTES: usize = 80 * 1024;
/// Most bytes of file data in one WRITE, and in one READ.
pub(crate) const DATA_MAX_BYTES: u32 = 1 << 20;
/// Longest file name, bytes (`NAME_MAX`).
pub(crate) const NAME_MAX_BYTES: usize = 255;
/// Longest target of a symbolic link, bytes (`PATH_MAX` with its NUL).
pub(crate) const SYMLINK_MAX_BYTES: usize = 4095;
/// Longest xattr name and value, bytes (`XATTR_NAME_MAX`, `XATTR_SIZE_MAX`).
pub(crate) const XATTR_NAME_MAX_BYTES: usize = 255;
pub(crate) const XATTR_VALUE_MAX_BYTES: usize = 64 * 1024;

/// A single path component: 1 to 255 bytes, no slash, no NUL, not `.` or `..`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Name<'a>(&'a CStr);

impl<'a> Name<'a> {
    pub(crate) fn parse(name: &'a CStr) -> Result<Name<'a>, Errno> {
        let bytes = name.to_bytes();
        if bytes.len() > NAME_MAX_BYTES {
            return Err(Errno::NAMETOOLONG);
        }
        if bytes.is_empty() || bytes == b"." || bytes == b".." || bytes.contains(&b'/') {
            return Err(Errno::INVAL);
        }
        Ok(Name(name))
    }

    pub(crate) fn as_c_str(self) -> &'a CStr {
        self.0
    }
}

/// `struct fuse_in_header`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Header {
    pub(crate) opcode: u32,
    /// The guest's number of this request; the reply repeats it.
    pub(crate) unique: u64,
    pub(crate) node: u64,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    len: u32,
    extensions: u16,
}

impl Header {
    /// Reads a header; `None` when it is cut short, so that there is not even a number to answer to.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Header> {
        let mut args = Args(bytes);
        let read = |args: &mut Args<'_>| -> Result<Header, Errno> {
            let (len, opcode) = (args.u32()?, args.u32()?);
            let (unique, node) = (args.u64()?, args.u64()?);
            let (uid, gid, _pid) = (args.u32()?, args.u32()?, args.u32()?);
            let (extensions, _padding) = (args.u16()?, args.u16()?);
            Ok(Header {
                opcode,
                unique,
                node,
                uid,
                gid,
                len,
                extensions,
            })
        };
        read(&mut args).ok()
    }

    /// Refuses a request whose length is not that of its chain. Extensions are never negotiated.
    pub(crate) fn check(&self, chain_bytes: usize) -> Result<(), Errno> {
        if self.len as usize != chain_bytes || self.extensions != 0 {
            return Err(Errno::INVAL);
        }
        Ok(())
    }

    /// Whether the guest waits for an answer.
    pub(crate) fn wants_reply(&self) -> bool {
        !matches!(
            self.opcode,
            opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT
        )
    }
}

/// What SETATTR asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Changes {
    pub(crate) fh: Option<u64>,
    pub(crate) mode: Option<u32>,
    pub(crate) uid: Option<u32>,
    pub(crate) gid: Option<u32>,
    pub(crate) size: Option<u64>,
    pub(crate) atime: Time,
    pub(crate) mtime: Time,
    pub(crate) kill_suidgid: bool,
}

/// What SETATTR does with one time stamp.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Time {
    #[default]
    Keep,
    Now,
    At {
        seconds: i64,
        nanos: u32,
    },
}

/// A stretch of a file whose end still fits the kernel's signed offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

impl Span {
    fn new(offset: u64, len: u64) -> Result<Span, Errno> {
        match offset.checked_add(len) {
            Some(end) if end <= i64::MAX as u64 => Ok(Span { offset, len }),
            _ => Err(Errno::INVAL),
        }
    }
}

/// FUSE_INIT's arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Init {
    pub(crate) major: u32,
    pub(crate) minor: u32,
    pub(crate) max_readahead: u32,
    pub(crate) flags: u64,
}

/// A node and how many of its lookups the guest gives back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Forget {
    pub(crate) node: u64,
    pub(crate) lookups: u64,
}

/// A request's operation with its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
#[rustfmt::skip]
pub(crate) enum Op<'a> {
    Init(Init),
    Destroy,
    Interrupt,
    Lookup { name: Name<'a> },
    Forget(Vec<Forget>),
    Getattr { fh: Option<u64> },
    Setattr(Changes),
    Readlink,
    Symlink { name: Name<'a>, target: &'a CStr },
    Mknod { name: Name<'a>, mode: u32, rdev: u32 },
    Mkdir { name: Name<'a>, mode: u32 },
    Unlink { name: Name<'a> },
    Rmdir { name: Name<'a> },
    Rename { name: Name<'a>, new_parent: u64, new_name: Name<'a>, flags: u32 },
    Link { target: u64, name: Name<'a> },
    Open { flags: u32, kill_suidgid: bool },
    Opendir,
    Create { name: Name<'a>, flags: u32, mode: u32, kill_suidgid: bool },
    Read { fh: u64, span: Span },
    /// The data lies in the chain behind [`abi::WRITE_IN_BYTES`].
    Write { fh: u64, span: Span, append: bool, kill_suidgid: bool },
    Readdir { fh: u64, offset: u64, size: u32, plus: bool },
    Statfs,
    Release { fh: u64 },
    Flush { fh: u64 },
    Fsync { fh: u64, data_only: bool },
    Setxattr { name: &'a CStr, value: &'a [u8], flags: u32 },
    Getxattr { name: &'a CStr, size: u32 },
    Listxattr { size: u32 },
    Removexattr { name: &'a CStr },
    Fallocate { fh: u64, span: Span, mode: u32 },
    Lseek { fh: u64, offset: u64, whence: u32 },
    CopyFileRange { from: u64, from_offset: u64, to_node: u64, to: u64, to_offset: u64, len: u64 },
    Syncfs,
}

/// Parses what follows the header. For WRITE, `args` are the fixed arguments alone and `data_bytes` is how
/// much follows them in the chain.
pub(crate) fn parse<'a>(
    header: &Header,
    args: &'a [u8],
    data_bytes: usize,
) -> Result<Op<'a>, Errno> {
    let mut args = Args(args);
    let op = match header.opcode {
        opcode::LOOKUP..=opcode::LINK | opcode::RENAME2 | opcode::CREATE => {
            parse_names(header, &mut args)?
        }
        opcode::SETXATTR..=opcode::REMOVEXATTR => parse_xattr(header.opcode, &mut args)?,
        opcode::BATCH_FORGET => parse_forget(header, &mut args)?,
        opcode::INIT => {
            let init = parse_init(&mut args)?;
            return Ok(Op::Init(init));
        }
        _ => parse_file(header.opcode, &mut args, data_bytes)?,
    };
    args.end()?;
    Ok(op)
}

fn parse_names<'a>(header: &Header, args: &mut Args<'a>) -> Result<Op<'a>, Errno> {
    Ok(match header.opcode {
        opcode::LOOKUP => Op::Lookup { name: args.name()? },
        opcode::FORGET => parse_forget(header, args)?,
        opcode::GETATTR => {
            let (flags, _padding, fh) = (args.u32()?, args.u32()?, args.u64()?);
            Op::Getattr {
                fh: (flags & abi::GETATTR_FH != 0).then_some(fh),
            }
        }
        opcode::SETATTR => Op::Setattr(parse_changes(args)?),
        opcode::READLINK => Op::Readlink,
        opcode::SYMLINK => {
            let (name, target) = (args.name()?, args.c_str()?);
            if target.is_empty() || target.count_bytes() > SYMLINK_MAX_BYTES {
                return Err(Errno::INVAL);
            }
            Op::Symlink { name, target }
        }
        opcode::MKNOD => {
            let (mode, rdev, _umask, _padding) =
                (args.u32()?, args.u32()?, args.u32()?, args.u32()?);
            let name = args.name()?;
            Op::Mknod { name, mode, rdev }
        }
        opcode::MKDIR => {
            let (mode, _umask) = (args.u32()?, args.u32()?);
            let name = args.name()?;
            Op::Mkdir { name, mode }
        }
        opcode::UNLINK => Op::Unlink { name: args.name()? },
        opcode::RMDIR => Op::Rmdir { name: args.name()? },
        opcode::RENAME | opcode::RENAME2 => {
            let new_parent = args.u64()?;
            let flags = match header.opcode {
                opcode::RENAME2 => (args.u32()?, args.u32()?).0,
                _ => 0,
            };
            let (name, new_name) = (args.name()?, args.name()?);
            Op::Rename {
                name,
                new_parent,
                new_name,
                flags,
            }
        }
        opcode::LINK => {
            let target = args.u64()?;
            let name = args.name()?;
            Op::Link { target, name }
        }
        opcode::CREATE => {
            let (flags, mode, _umask, open_flags) =
                (args.u32()?, args.u32()?, args.u32()?, args.u32()?);
            let name = args.name()?;
            Op::Create {
                name,
                flags,
                mode,
                kill_suidgid: open_flags & abi::OPEN_KILL_SUIDGID != 0,
            }
        }
        _ => return Err(Errno::NOSYS),
    })
}

fn parse_file<'a>(code: u32, args: &mut Args<'a>, data_bytes: usize) -> Result<Op<'a>, Errno> {
    Ok(match code {
        opcode::OPEN | opcode::OPENDIR => {
            let (flags, open_flags) = (args.u32()?, args.u32()?);
            match code {
                opcode::OPENDIR => Op::Opendir,
                _ => Op::Open {
                    flags,
                    kill_suidgid: open_flags & abi::OPEN_KILL_SUIDGID != 0,
                },
            }
        }
        opcode::READ | opcode::WRITE | opcode::READDIR | opcode::READDIRPLUS => {
            parse_io(code, args, data_bytes)?
        }
        opcode::STATFS => Op::Statfs,
        opcode::RELEASE | opcode::RELEASEDIR => {
            let fh = args.u64()?;
            args.skip(16)?;
            Op::Release { fh }
        }
        opcode::FLUSH => {
            let fh = args.u64()?;
            args.skip(16)?;
            Op::Flush { fh }
        }
        opcode::FSYNC | opcode::FSYNCDIR => {
            let (fh, flags, _padding) = (args.u64()?, args.u32()?, args.u32()?);
            Op::Fsync {
                fh,
                data_only: flags & abi::FSYNC_FDATASYNC != 0,
            }
        }
        opcode::INTERRUPT => {
            args.skip(8)?;
            Op::Interrupt
        }
        opcode::DESTROY => Op::Destroy,
        opcode::FALLOCATE => {
            let (fh, offset, len) = (args.u64()?, args.u64()?, args.u64()?);
            let (mode, _padding) = (args.u32()?, args.u32()?);
            let span = Span::new(offset, len).map_err(|_| Errno::FBIG)?;
            Op::Fallocate { fh, span, mode }
        }
        opcode::LSEEK => {
            let (fh, offset, whence, _padding) =
                (args.u64()?, args.u64()?, args.u32()?, args.u32()?);
            Op::Lseek { fh, offset, whence }
        }
        opcode::COPY_FILE_RANGE => {
            let (from, from_offset, to_node) = (args.u64()?, args.u64()?, args.u64()?);
            let (to, to_offset, len, flags) = (args.u64()?, args.u64()?, args.u64()?, args.u64()?);
            if flags != 0 {
                return Err(Errno::INVAL);
            }
            Op::CopyFileRange {
                from,
                from_offset,
                to_node,
                to,
                to_offset,
                len,
            }
        }
        opcode::SYNCFS => {
            args.skip(8)?;
            Op::Syncfs
        }
        _ => return Err(Errno::NOSYS),
    })
}

/// READ, WRITE and READDIR share a layout.
fn parse_io<'a>(code: u32, args: &mut Args<'a>, data_bytes: usize) -> Result<Op<'a>, Errno> {
    let (fh, offset, size, how) = (args.u64()?, args.u64()?, args.u32()?, args.u32()?);
    let (_lock_owner, flags, _padding) = (args.u64()?, args.u32()?, args.u32()?);
    Ok(match code {
        opcode::READ => Op::Read {
            fh,
            span: Span::new(offset, u64::from(size.min(DATA_MAX_BYTES)))?,
        },
        opcode::WRITE => {
            if size > DATA_MAX_BYTES || size as usize != data_bytes {
                return Err(Errno::INVAL);
            }
            Op::Write {
                fh,
                span: Span::new(offset, u64::from(size)).map_err(|_| Errno::FBIG)?,
                append: flags & libc::O_APPEND as u32 != 0 && how & abi::WRITE_CACHE == 0,
                kill_suidgid: how & abi::WRITE_KILL_SUIDGID != 0,
            }
        }
        _ => Op::Readdir {
            fh,
            offset,
            size,
            plus: code == opcode::READDIRPLUS,
        },
    })
}

fn parse_xattr<'a>(code: u32, args: &mut Args<'a>) -> Result<Op<'a>, Errno> {
    Ok(match code {
        opcode::SETXATTR => {
            // Eight bytes of arguments: FUSE_SETXATTR_EXT is not announced.
            let (size, flags, name) = (args.u32()?, args.u32()?, args.xattr_name()?);
            if size as usize > XATTR_VALUE_MAX_BYTES {
                return Err(Errno::TOOBIG);
            }
            let value = args.bytes(size as usize)?;
            Op::Setxattr { name, value, flags }
        }
        opcode::GETXATTR => {
            let (size, _padding, name) = (args.u32()?, args.u32()?, args.xattr_name()?);
            Op::Getxattr { name, size }
        }
        opcode::LISTXATTR => {
            let (size, _padding) = (args.u32()?, args.u32()?);
            Op::Listxattr { size }
        }
        _ => Op::Removexattr {
            name: args.xattr_name()?,
        },
    })
}

fn parse_forget<'a>(header: &Header, args: &mut Args<'a>) -> Result<Op<'a>, Errno> {
    if header.opcode == opcode::FORGET {
        return Ok(Op::Forget(vec![Forget {
            node: header.node,
            lookups: args.u64()?,
        }]));
    }
    let (count, _padding) = (args.u32()?, args.u32()?);
    // The count is only a claim: what is there decides how much is allocated.
    if args.0.len() != (count as usize).saturating_mul(16) {
        return Err(Errno::INVAL);
    }
    let mut forgets = Vec::with_capacity(args.0.len() / 16);
    while !args.0.is_empty() {
        forgets.push(Forget {
            node: args.u64()?,
            lookups: args.u64()?,
        });
    }
    Ok(Op::Forget(forgets))
}

fn parse_init(args: &mut Args<'_>) -> Result<Init, Errno> {
    let (major, minor) = (args.u32()?, args.u32()?);
    let (max_readahead, flags) = (args.u32()?, args.u32()?);
    // Newer kernels append flags2 and room to grow.
    let more = args.u32().unwrap_or(0);
    let mut flags = u64::from(flags);
    if flags & abi::init::INIT_EXT != 0 {
        flags |= u64::from(more) << 32;
    }
    Ok(Init {
        major,
        minor,
        max_readahead,
        flags,
    })
}

fn parse_changes(args: &mut Args<'_>) -> Result<Changes, Errno> {
    let (valid, _padding, fh, size) = (args.u32()?, args.u32()?, args.u64()?, args.u64()?);
    let (_lock_owner, atime, mtime, _ctime) = (args.u64()?, args.u64()?, args.u64()?, args.u64()?);
    let (atime_nanos, mtime_nanos, _) = (args.u32()?, args.u32()?, args.u32()?);
    let (mode, _unused4, uid, gid, _unused5) = (
        args.u32()?,
        args.u32()?,
        args.u32()?,
        args.u32()?,
        args.u32()?,
    );
    let has = |bit: u32| valid & bit != 0;
    let id = |bit: u32, id: u32| match (has(bit), id) {
        (false, _) => Ok(None),
        // -1 means "leave it" to chown(2): never what a guest may smuggle in.
        (true, u32::MAX) => Err(Errno::INVAL),
        (true, id) => Ok(Some(id)),
    };
    let time = |bit: u32, now: u32, seconds: u64, nanos: u32| match (has(bit), has(now)) {
        (false, _) => Ok(Time::Keep),
        (true, true) => Ok(Time::Now),
        // UTIME_NOW and UTIME_OMIT hide behind numbers that are no nanoseconds.
        (true, false) if nanos >= 1_000_000_000 => Err(Errno::INVAL),
        (true, false) => Ok(Time::At {
            seconds: seconds as i64,
            nanos,
        }),
    };
    if has(fattr::SIZE) && size > i64::MAX as u64 {
        return Err(Errno::FBIG);
    }
    Ok(Changes {
        fh: has(fattr::FH).then_some(fh),
        mode: has(fattr::MODE).then_some(mode & 0o7777),
        uid: id(fattr::UID, uid)?,
        gid: id(fattr::GID, gid)?,
        size: has(fattr::SIZE).then_some(size),
        atime: time(fattr::ATIME, fattr::ATIME_NOW, atime, atime_nanos)?,
        mtime: time(fattr::MTIME, fattr::MTIME_NOW, mtime, mtime_nanos)?,
        kill_suidgid: has(fattr::KILL_SUIDGID),
    })
}

/// The bytes of a request that were not read yet.
struct Args<'a>(&'a [u8]);

impl<'a> Args<'a> {
    fn bytes(&mut self, count: usize) -> Result<&'a [u8], Errno> {
        let (bytes, rest) = self.0.split_at_checked(count).ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Errno> {
        let (bytes, rest) = self.0.split_first_chunk::<N>().ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(*bytes)
    }

    fn u16(&mut self) -> Result<u16, Errno> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, Errno> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Errno> {
        self.array().map(u64::from_le_bytes)
    }

    fn skip(&mut self, count: usize) -> Result<(), Errno> {
        self.bytes(count).map(|_| ())
    }

    fn c_str(&mut self) -> Result<&'a CStr, Errno> {
        let text = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        self.skip(text.count_bytes() + 1)?;
        Ok(text)
    }

    fn name(&mut self) -> Result<Name<'a>, Errno> {
        Name::parse(self.c_str()?)
    }

    fn xattr_name(&mut self) -> Result<&'a CStr, Errno> {
        let name = self.c_str()?;
        match name.count_bytes() {
            0 => Err(Errno::INVAL),
            1..=XATTR_NAME_MAX_BYTES => Ok(name),
            _ => Err(Errno::RANGE),
        }
    }

    fn end(&self) -> Result<(), Errno> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(Errno::INVAL)
        }
    }
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
