//! One mount of the share by the guest, from FUSE_INIT to FUSE_DESTROY or reset: its nodes, its open files,
//! and which operation serves which request.
//!
//! Names are resolved one component at a time below a descriptor of the parent, never through a symbolic
//! link (`O_NOFOLLOW`, `RESOLVE_NO_SYMLINKS`, and the mounts are `nosymfollow`), and the thread's root is
//! the share: there is nothing above it. A file is opened for reading or writing only after an `O_PATH`
//! descriptor has shown it to be a regular file or a directory: the guest's kernel handles fifos, sockets
//! and devices itself and never opens one here, so such a request is hostile and refused (CVE-2020-35517).

use super::abi::{self, Put};
use super::guest_io::Buffers;
use super::nodes::{Key, NodeTable, Reach, Walk};
use super::request::{Header, Init, Op};
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, Statx, StatxFlags};
use rustix::io::Errno;
use std::collections::HashMap;
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

/// How long the guest may believe a name or an attribute, seconds. The host may change files under it
/// (volumes, `cp` into a container), so this is also how stale a guest's view can be; with less, every
/// `stat` of the container would be a round trip.
const VALID_SECONDS: u64 = 1;
/// The same for the names of the share's first mount, which is a tree of mount points: none is kept. Linux drops such a name, and the
/// file with it, as soon as nobody uses it (`fuse_dentry_delete`), so a guest that unmounts what lies on a mount point forgets that, too,
/// and the host can take its mount away. A container never walks through these names: its root is a mount below.
const VALID_SECONDS_OF_THE_TREE: u64 = 0;
/// Requests that the guest's kernel may have in flight in the background, such as read-ahead.
const BACKGROUND_MAX: u16 = 64;
/// Bytes of a guest page, for the number of pages in one request.
const PAGE_BYTES: u32 = 4096;
/// `f_type` of overlayfs: its files change their birth time when they are copied up.
const OVERLAYFS_MAGIC: i64 = 0x794c_7630;
/// Most mounts of one share of which facts are remembered; they are asked for again beyond it.
const MOUNT_FACTS_MAX: usize = 4096;
/// `STATX_MNT_ID_UNIQUE` (Linux 6.8): the number of a mount that is gone never comes back. An older kernel ignores it and gives numbers
/// that do: then what was known of the mount that is gone is believed of the one that has its number.
const MNT_ID_UNIQUE: StatxFlags = StatxFlags::from_bits_retain(0x4000);

/// What is announced to the guest, if it offers it too. Not among them: WRITEBACK_CACHE (the host may change
/// a file under a dirty page), POSIX_LOCKS and FLOCK_LOCKS (locks stay in the guest: no wait of a guest
/// process may hold a thread of ours), POSIX_ACL and SECURITY_CTX, DONT_MASK (the guest applies its umask).
const FEATURES: u64 = abi::init::ASYNC_READ
    | abi::init::ATOMIC_O_TRUNC
    | abi::init::BIG_WRITES
    | abi::init::AUTO_INVAL_DATA
    | abi::init::DO_READDIRPLUS
    | abi::init::READDIRPLUS_AUTO
    | abi::init::ASYNC_DIO
    | abi::init::PARALLEL_DIROPS
    | abi::init::MAX_PAGES
    | abi::init::CACHE_SYMLINKS
    | abi::init::SUBMOUNTS
    | abi::init::HANDLE_KILLPRIV_V2
    | abi::init::INIT_EXT;

/// What one thread reuses from request to request.
pub(crate) struct Scratch {
    pub(crate) request: Vec<u8>,
    pub(crate) reply: Vec<u8>,
    /// Only its spare capacity is used: room that nothing has touched yet.
    pub(crate) entries: Vec<u8>,
}

/// How a request was served. The header of the reply is the caller's.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Served {
    /// The payload is in [`Scratch::reply`], and may be empty.
    Payload,
    /// So many bytes of file data lie in the guest's buffers already.
    Data(usize),
}

/// How many descriptors the guest can make the host open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FdBudget {
    /// `O_PATH` descriptors kept for nodes.
    pub(crate) nodes: usize,
    /// Files and directories that the guest has open.
    pub(crate) files: usize,
}

/// One of [`FdBudget::files`].
pub(super) struct Permit(Arc<AtomicUsize>);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A file or directory that the guest has open.
pub(super) struct OpenFile {
    pub(super) node: u64,
    pub(super) fd: OwnedFd,
    pub(super) writable: bool,
    /// For a directory, the offset at which the next `getdents64` would go on, if that is known.
    pub(super) position: Option<Mutex<Option<u64>>>,
    pub(super) _permit: Permit,
}

/// See the module text.
pub(crate) struct Session {
    nodes: Mutex<NodeTable>,
    pub(super) files: RwLock<HashMap<u64, Arc<OpenFile>>>,
    pub(super) next_file: AtomicU64,
    open_files: Arc<AtomicUsize>,
    files_max: usize,
    /// `/proc/thread-self/fd`, to open an `O_PATH` descriptor again.
    pub(super) proc_fds: Arc<OwnedFd>,
    submounts: bool,
    /// The mount at the root of the share.
    tree: u64,
    /// What is known of the mounts below it, by their numbers.
    mounts: Mutex<HashMap<u64, MountFacts>>,
}

/// What holds for a mount as long as it lives.
#[derive(Clone, Copy)]
struct MountFacts {
    /// Birth times hold still.
    births_stable: bool,
    /// It has the attributes that every mount of a share must have.
    restricted: bool,
}

impl Session {
    /// Starts a session on `root`, as FUSE_INIT asks.
    pub(crate) fn new(
        root: Arc<OwnedFd>,
        proc_fds: Arc<OwnedFd>,
        budget: FdBudget,
        init: &Init,
    ) -> Result<Session, Errno> {
        let st = stat_at(root.as_fd(), c"")?;
        let mounts = Mutex::new(HashMap::new());
        let (key, _) = key_of(&mounts, root.as_fd(), c"", &st)?;
        Ok(Session {
            nodes: Mutex::new(NodeTable::new(root, key, budget.nodes)),
            files: RwLock::new(HashMap::new()),
            next_file: AtomicU64::new(1),
            open_files: Arc::new(AtomicUsize::new(0)),
            files_max: budget.files,
            proc_fds,
            submounts: init.flags & abi::init::SUBMOUNTS != 0,
            tree: key.mount,
            mounts,
        })
    }

    /// Serves one request other than INIT and DESTROY. `room` is what the reply may have behind its header.
    pub(crate) fn serve(
        &self,
        header: &Header,
        op: &Op<'_>,
        buffers: &Buffers<'_>,
        room: usize,
        scratch: &mut Scratch,
    ) -> Result<Served, Errno> {
        if room < reply_bytes(op) {
            return Err(Errno::INVAL);
        }
        let out = &mut scratch.reply;
        let node = header.node;
        match *op {
            Op::Init(_) | Op::Destroy => return Err(Errno::INVAL),
            Op::Interrupt => {}
            Op::Forget(ref forgets) => self.forget(forgets),
            Op::Lookup { name } => self.lookup(node, name, out)?,
            Op::Symlink { name, target } => self.symlink(header, name, target, out)?,
            Op::Mknod { name, mode, rdev } => self.mknod(header, name, mode, rdev, out)?,
            Op::Mkdir { name, mode } => self.mkdir(header, name, mode, out)?,
            Op::Unlink { name } => self.unlink(node, name, AtFlags::empty())?,
            Op::Rmdir { name } => self.unlink(node, name, AtFlags::REMOVEDIR)?,
            Op::Rename {
                name,
                new_parent,
                new_name,
                flags,
            } => self.rename((node, name), (new_parent, new_name), flags)?,
            Op::Link { target, name } => self.link(target, node, name, out)?,
            Op::Readlink => self.readlink(node, room, out)?,
            Op::Statfs => self.statfs(node, out)?,
            Op::Syncfs => self.syncfs(node)?,
            Op::Getattr { fh } => self.getattr(node, fh, out)?,
            Op::Setattr(ref changes) => self.setattr(node, changes, out)?,
            Op::Setxattr { name, value, flags } => self.setxattr(node, name, value, flags)?,
            Op::Getxattr { name, size } => self.getxattr(node, name, size, room, out)?,
            Op::Listxattr { size } => self.listxattr(node, size, room, out)?,
            Op::Removexattr { name } => self.removexattr(node, name)?,
            _ => return self.serve_file(header, op, buffers, room, scratch),
        }
        Ok(Served::Payload)
    }

    fn serve_file(
        &self,
        header: &Header,
        op: &Op<'_>,
        buffers: &Buffers<'_>,
        room: usize,
        scratch: &mut Scratch,
    ) -> Result<Served, Errno> {
        let out = &mut scratch.reply;
        let node = header.node;
        match *op {
            Op::Open {
                flags,
                kill_suidgid,
            } => self.open(node, flags, kill_suidgid, out)?,
            Op::Opendir => self.opendir(node, out)?,
            Op::Create { .. } => self.create(header, op, out)?,
            Op::Read { fh, span } => return self.read(node, fh, span, buffers, room),
            Op::Write {
                fh,
                span,
                append,
                kill_suidgid,
            } => self.write(node, fh, span, (append, kill_suidgid), buffers, out)?,
            Op::Readdir {
                fh,
                offset,
                size,
                plus,
            } => {
                let size = room.min(size as usize);
                self.readdir((node, fh), offset, size, plus, scratch)?;
            }
            Op::Release { fh } => self.release(node, fh)?,
            Op::Flush { fh } => self.flush(node, fh)?,
            Op::Fsync { fh, data_only } => self.fsync(node, fh, data_only)?,
            Op::Fallocate { fh, span, mode } => self.fallocate(node, fh, span, mode)?,
            Op::Lseek { fh, offset, whence } => self.lseek(node, fh, offset, whence, out)?,
            Op::CopyFileRange { .. } => self.copy_file_range(node, op, out)?,
            _ => return Err(Errno::NOSYS),
        }
        Ok(Served::Payload)
    }

    pub(super) fn table(&self) -> MutexGuard<'_, NodeTable> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more open file, within the budget.
    pub(super) fn permit(&self) -> Result<Permit, Errno> {
        let before = self.open_files.fetch_add(1, Ordering::Relaxed);
        let permit = Permit(self.open_files.clone());
        if before >= self.files_max {
            return Err(Errno::NFILE);
        }
        Ok(permit)
    }

    /// An `O_PATH` descriptor of a node.
    pub(super) fn fd(&self, id: u64) -> Result<Arc<OwnedFd>, Errno> {
        let walk = {
            let mut table = self.table();
            match table.fd(id)? {
                Some(fd) => return Ok(fd),
                None => table.walk(id)?,
            }
        };
        let fd = Arc::new(self.follow(&walk)?);
        // Whatever is closed for it is closed here, after the lock.
        let closed = self.table().keep(id, fd.clone());
        drop(closed);
        Ok(fd)
    }

    fn follow(&self, walk: &Walk) -> Result<OwnedFd, Errno> {
        let mut reached: Option<OwnedFd> = None;
        for path in &walk.paths {
            let from = reached.as_ref().map_or(walk.base.as_fd(), OwnedFd::as_fd);
            reached = Some(open_path(from, path).map_err(moved_away)?);
        }
        let fd = reached.ok_or(Errno::STALE)?;
        let st = stat_at(fd.as_fd(), c"")?;
        if self.key(fd.as_fd(), c"", &st)? != walk.key {
            return Err(Errno::STALE);
        }
        Ok(fd)
    }

    /// The attributes of a node, by its descriptor or by its name: one system call in both cases.
    pub(super) fn stat(&self, id: u64) -> Result<Statx, Errno> {
        let reach = self.table().reach(id)?;
        match reach {
            Reach::Open(fd) => stat_at(fd.as_fd(), c""),
            Reach::Named { parent, name, key } => {
                let dir = self.fd(parent)?;
                let st = stat_at(dir.as_fd(), &name).map_err(moved_away)?;
                if self.key(dir.as_fd(), &name, &st)? != key {
                    return Err(Errno::STALE);
                }
                Ok(st)
            }
        }
    }

    /// Which file `st` describes, which is `name` in `dir` or, with no name, `dir` itself.
    pub(super) fn key(&self, dir: BorrowedFd<'_>, name: &CStr, st: &Statx) -> Result<Key, Errno> {
        let (key, facts) = key_of(&self.mounts, dir, name, st)?;
        match facts.restricted || key.mount == self.tree {
            true => Ok(key),
            // The owner has mounted it after the start, and as one that a guest must not have.
            false => Err(Errno::ACCESS),
        }
    }

    /// `name` in `parent` as an entry of the guest: counts one lookup.
    pub(super) fn entry(
        &self,
        parent: u64,
        dir: BorrowedFd<'_>,
        name: &CStr,
        st: &Statx,
        out: &mut Vec<u8>,
    ) -> Result<u64, Errno> {
        let key = self.key(dir, name, st)?;
        let mut table = self.table();
        let above = table.key(parent)?.mount;
        let submount = self.submounts && key.kind == libc::S_IFDIR && above != key.mount;
        let id = table.enter(parent, name, key)?;
        drop(table);
        let flags = if submount { abi::ATTR_SUBMOUNT } else { 0 };
        let valid = match above == self.tree {
            true => VALID_SECONDS_OF_THE_TREE,
            false => VALID_SECONDS,
        };
        put_entry(out, id, st, flags, valid);
        Ok(id)
    }

    /// Gives back a lookup that an entry counted and the guest will never hear of.
    pub(super) fn take_back(&self, id: u64) {
        let mut closed = Vec::new();
        self.table().forget(id, 1, &mut closed);
    }
}

/// The payload of INIT's reply.
pub(crate) fn put_init(init: &Init, out: &mut Vec<u8>) {
    let flags = FEATURES & init.flags;
    out.put_u32(abi::VERSION_MAJOR);
    out.put_u32(abi::VERSION_MINOR);
    out.put_u32(init.max_readahead);
    out.put_u32(flags as u32);
    out.put_u16(BACKGROUND_MAX);
    out.put_u16(BACKGROUND_MAX / 4 * 3);
    out.put_u32(super::request::DATA_MAX_BYTES);
    out.put_u32(1); // time stamps are exact to the nanosecond
    out.put_u16((super::request::DATA_MAX_BYTES / PAGE_BYTES) as u16);
    out.put_u16(0); // no DAX
    out.put_u32((flags >> 32) as u32);
    out.put_zeros(28);
}

/// What a reply of fixed size needs behind its header: a guest that leaves no room for it is refused before
/// anything is done.
fn reply_bytes(op: &Op<'_>) -> usize {
    match op {
        Op::Lookup { .. } | Op::Symlink { .. } | Op::Mknod { .. } | Op::Mkdir { .. } => {
            abi::ENTRY_OUT_BYTES
        }
        Op::Link { .. } => abi::ENTRY_OUT_BYTES,
        Op::Create { .. } => abi::ENTRY_OUT_BYTES + abi::OPEN_OUT_BYTES,
        Op::Getattr { .. } | Op::Setattr(_) => abi::ATTR_OUT_BYTES,
        Op::Open { .. } | Op::Opendir => abi::OPEN_OUT_BYTES,
        Op::Statfs => abi::STATFS_OUT_BYTES,
        Op::Write { .. } | Op::Lseek { .. } | Op::CopyFileRange { .. } => 8,
        Op::Getxattr { size: 0, .. } | Op::Listxattr { size: 0 } => 8,
        _ => 0,
    }
}

/// What `openat2` allows on the way to a node: no symbolic link of either kind, nothing above the start.
const RESOLVE: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS);

/// `O_PATH`, and no link followed: a link as the last component is opened itself (`openat2(2)`,
/// RESOLVE_NO_SYMLINKS).
pub(super) fn open_path(dir: BorrowedFd<'_>, path: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat2(dir, path, flags, Mode::empty(), RESOLVE)
}

/// Opens a new file below `dir`.
pub(super) fn open_new(
    dir: BorrowedFd<'_>,
    name: &CStr,
    flags: OFlags,
    mode: Mode,
) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat2(dir, name, flags, mode, RESOLVE)
}

/// The attributes of `name` in `dir`, or of `dir` for an empty name.
pub(super) fn stat_at(dir: BorrowedFd<'_>, name: &CStr) -> Result<Statx, Errno> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::EMPTY_PATH | AtFlags::NO_AUTOMOUNT;
    let mask = StatxFlags::BASIC_STATS | StatxFlags::BTIME | StatxFlags::MNT_ID | MNT_ID_UNIQUE;
    rustix::fs::statx(dir, name, flags, mask)
}

fn key_of(
    mounts: &Mutex<HashMap<u64, MountFacts>>,
    dir: BorrowedFd<'_>,
    name: &CStr,
    st: &Statx,
) -> Result<(Key, MountFacts), Errno> {
    let lock = || mounts.lock().unwrap_or_else(PoisonError::into_inner);
    let known = lock().get(&st.stx_mnt_id).copied();
    let facts = match known {
        Some(facts) => facts,
        None => {
            let fs = match name.is_empty() {
                true => rustix::fs::fstatfs(dir)?,
                false => rustix::fs::fstatfs(open_path(dir, name)?)?,
            };
            let facts = MountFacts {
                births_stable: fs.f_type != OVERLAYFS_MAGIC,
                restricted: super::confine::is_restricted(&fs),
            };
            let mut mounts = lock();
            if mounts.len() >= MOUNT_FACTS_MAX {
                mounts.clear();
            }
            mounts.insert(st.stx_mnt_id, facts);
            facts
        }
    };
    let has_birth = st.stx_mask & StatxFlags::BTIME.bits() != 0;
    let born = match facts.births_stable && has_birth {
        true => st
            .stx_btime
            .tv_sec
            .wrapping_mul(1_000_000_000)
            .wrapping_add(i64::from(st.stx_btime.tv_nsec)),
        false => 0,
    };
    let key = Key {
        mount: st.stx_mnt_id,
        dev: u64::from(st.stx_dev_major) << 32 | u64::from(st.stx_dev_minor),
        ino: st.stx_ino,
        kind: u32::from(st.stx_mode) & libc::S_IFMT,
        born,
    };
    Ok((key, facts))
}

/// The file is not where it was: the guest must look it up again.
fn moved_away(errno: Errno) -> Errno {
    match errno {
        Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV => Errno::STALE,
        other => other,
    }
}

fn put_entry(out: &mut Vec<u8>, id: u64, st: &Statx, flags: u32, valid_seconds: u64) {
    out.put_u64(id);
    out.put_u64(0); // node ids are never used again for another file, so there is one generation
    out.put_u64(valid_seconds);
    out.put_u64(VALID_SECONDS);
    out.put_u32(0);
    out.put_u32(0);
    put_attr(out, st, flags);
}

/// `struct fuse_attr_out`.
pub(super) fn put_attr_out(out: &mut Vec<u8>, st: &Statx, flags: u32) {
    out.put_u64(VALID_SECONDS);
    out.put_u32(0);
    out.put_u32(0);
    put_attr(out, st, flags);
}

fn put_attr(out: &mut Vec<u8>, st: &Statx, flags: u32) {
    out.put_u64(st.stx_ino);
    out.put_u64(st.stx_size);
    out.put_u64(st.stx_blocks);
    out.put_u64(st.stx_atime.tv_sec as u64);
    out.put_u64(st.stx_mtime.tv_sec as u64);
    out.put_u64(st.stx_ctime.tv_sec as u64);
    out.put_u32(st.stx_atime.tv_nsec);
    out.put_u32(st.stx_mtime.tv_nsec);
    out.put_u32(st.stx_ctime.tv_nsec);
    out.put_u32(u32::from(st.stx_mode));
    out.put_u32(st.stx_nlink);
    out.put_u32(st.stx_uid);
    out.put_u32(st.stx_gid);
    out.put_u32(abi::encode_rdev(st.stx_rdev_major, st.stx_rdev_minor));
    out.put_u32(st.stx_blksize);
    out.put_u32(flags);
}
