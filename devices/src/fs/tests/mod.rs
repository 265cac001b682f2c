//! A share, driven as a guest drives it: raw FUSE requests over the real queues, transport and threads, which
//! run confined and under a seccomp filter of exactly [`super::FS_SYSCALLS`]. A call that the list lacks
//! ends the whole test process.
//!
//! Needs root, because mounts do. Without it each test says so and is skipped.

mod host;
mod hostile;
mod kernel;
mod mounts;
mod names;
mod privileges;
mod scale;
mod serving;

use super::abi::{self, Put, opcode};
use super::confine::unshare;
use super::threads::Pool;
use super::*;
use crate::event::Poller;
use crate::testing::{Buffer, Driver, Used, memory, written_down};
use crate::virtio::device::{Busy, RestoreError};
use rustix::fs::CWD;
use rustix::mount::{OpenTreeFlags, open_tree};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

/// Whom the threads become in these tests.
const JAIL_ID: u32 = 64_321;
/// The priority queue and the request queue.
const PRIORITY: u16 = 0;
const REQUESTS: u16 = 1;

/// Skips the calling test, loudly, if it cannot mount. `cargo xtask test` counts a test that prints a line `SKIPPED …: why` as
/// skipped (`xtask/src/test/count.rs`); plain `cargo test` shows the line with `-- --show-output`.
macro_rules! needs_root {
    () => {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: {}: needs root to make mounts", module_path!());
            return;
        }
    };
}
use needs_root;

/// A directory of the host that is removed with its contents.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Dir {
        Dir::below(&std::env::temp_dir())
    }

    /// One in memory, where there is such a place, for tests that make more files than a disk likes.
    fn in_memory() -> Dir {
        let memory = Path::new("/dev/shm");
        if memory.is_dir() {
            Dir::below(memory)
        } else {
            Dir::new()
        }
    }

    fn below(base: &Path) -> Dir {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("capsid-fs-{}-{number}", std::process::id());
        let path = base.join(name);
        std::fs::create_dir(&path).expect("a directory for the test");
        Dir(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn write(&self, name: &str, content: &[u8]) {
        std::fs::write(self.path(name), content).expect("a file of the test");
    }

    fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).expect("a file of the test")
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn tree_of(path: &Path) -> OwnedFd {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    open_tree(CWD, path, flags).expect("a mount tree")
}

/// Exactly the calls of the list; any other ends the process, and the test with it.
fn filter() -> Arc<BpfProgram> {
    let rules: BTreeMap<i64, Vec<_>> = FS_SYSCALLS.iter().map(|nr| (*nr, Vec::new())).collect();
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::x86_64,
    );
    Arc::new(filter.unwrap().try_into().unwrap())
}

/// An event loop that a thread of the tests turns.
fn event_loop() -> Arc<Poller> {
    static LOOP: OnceLock<Arc<Poller>> = OnceLock::new();
    let started = LOOP.get_or_init(|| {
        let poller = Arc::new(Poller::new().expect("an event loop"));
        let turned = poller.clone();
        std::thread::spawn(move || {
            while turned.turn(None).is_ok() {}
            panic!("the event loop of the tests ended");
        });
        poller
    });
    started.clone()
}

fn setup(tree: OwnedFd) -> ShareSetup<'static> {
    let filter = filter();
    ShareSetup {
        tag: "capsid".into(),
        tree,
        uid: JAIL_ID,
        gid: JAIL_ID,
        fd_budget: FD_BUDGET_MIN,
        kept: &[],
        seal: Arc::new(move || seccompiler::apply_filter(&filter).map_err(std::io::Error::other)),
        event_loop: event_loop(),
    }
}

/// A guest's kernel, as far as it speaks FUSE.
struct Guest {
    driver: Driver,
    pool: Arc<Pool>,
    unique: u64,
    uid: u32,
    gid: u32,
}

/// What a reply says of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    node: u64,
    mode: u32,
    size: u64,
    ino: u64,
    flags: u32,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// `struct fuse_attr`.
fn attr(node: u64, bytes: &[u8]) -> Entry {
    Entry {
        node,
        ino: u64_at(bytes, 0),
        size: u64_at(bytes, 8),
        mode: u32_at(bytes, 60),
        flags: u32_at(bytes, 84),
    }
}

fn entry(reply: &[u8]) -> Entry {
    attr(u64_at(reply, 0), &reply[40..])
}

fn name(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

impl Guest {
    /// A share of `dir`, mounted by the guest.
    fn mounted(dir: &Dir) -> Guest {
        let mut guest = Guest::new(setup(tree_of(&dir.0)));
        guest.init();
        guest
    }

    /// A share whose device is up; nothing was sent yet.
    fn new(setup: ShareSetup<'_>) -> Guest {
        let device = spawn_share_threads(setup).expect("a share");
        let pool = device.pool();
        let mut driver = Driver::with_memory(Box::new(device), memory(&[(0, 32 << 20)]));
        let guest = |driver| Guest {
            driver,
            pool,
            unique: 0,
            uid: 0,
            gid: 0,
        };
        driver.negotiate(0);
        driver.setup_queue(PRIORITY, 128);
        driver.setup_queue(REQUESTS, 1024);
        driver.start();
        guest(driver)
    }

    fn init(&mut self) -> Vec<u8> {
        let mut args = Vec::new();
        args.put_u32(7);
        args.put_u32(41);
        args.put_u32(128 * 1024);
        args.put_u32(u32::MAX);
        args.put_u32(u32::MAX);
        args.put_zeros(44);
        self.ask(opcode::INIT, 0, &args, 64).expect("INIT")
    }

    fn header(&mut self, code: u32, node: u64, behind: usize) -> Vec<u8> {
        self.unique += 1;
        let mut header = Vec::new();
        header.put_u32((abi::IN_HEADER_BYTES + behind) as u32);
        header.put_u32(code);
        header.put_u64(self.unique);
        header.put_u64(node);
        header.put_u32(self.uid);
        header.put_u32(self.gid);
        header.put_u32(1);
        header.put_u32(0);
        header
    }

    /// Sends buffers and waits for them to come back.
    fn send(&mut self, queue: u16, buffers: &[Buffer<'_>]) -> Used {
        let head = self.driver.add_indirect(queue, buffers);
        self.driver.kick(queue);
        let used = self.driver.wait_used(queue, None);
        assert_eq!(used.head, head);
        used
    }

    /// Asks one request with `room` bytes for the answer; the payload of the reply or its errno.
    fn ask(&mut self, code: u32, node: u64, args: &[u8], room: u32) -> Result<Vec<u8>, i32> {
        self.ask_with(code, node, args, &[], room)
    }

    fn ask_with(
        &mut self,
        code: u32,
        node: u64,
        args: &[u8],
        data: &[u8],
        room: u32,
    ) -> Result<Vec<u8>, i32> {
        let header = self.header(code, node, args.len() + data.len());
        let readable = [&header[..], args, data];
        let mut buffers: Vec<Buffer<'_>> = readable
            .iter()
            .filter(|bytes| !bytes.is_empty())
            .map(|bytes| Buffer::Readable(bytes))
            .collect();
        buffers.push(Buffer::Writable(16));
        if room > 0 {
            buffers.push(Buffer::Writable(room));
        }
        let used = self.send(REQUESTS, &buffers);
        self.reply(&used)
    }

    fn reply(&self, used: &Used) -> Result<Vec<u8>, i32> {
        assert!(used.data.len() >= 16, "no reply at all");
        assert_eq!(u32_at(&used.data, 0), used.len, "length of the reply");
        assert_eq!(u64_at(&used.data, 8), self.unique, "whose reply");
        match u32_at(&used.data, 4) as i32 {
            0 => Ok(used.data[16..].to_vec()),
            errno => {
                assert_eq!(used.len, 16);
                Err(-errno)
            }
        }
    }

    fn lookup(&mut self, parent: u64, file: &str) -> Result<Entry, i32> {
        self.ask(opcode::LOOKUP, parent, &name(file), 128)
            .map(|reply| entry(&reply))
    }

    /// Looks up a path of names.
    fn walk(&mut self, path: &str) -> Result<Entry, i32> {
        let mut found = Err(libc::ENOENT);
        let mut node = abi::ROOT_ID;
        for part in path.split('/') {
            let entry = self.lookup(node, part)?;
            node = entry.node;
            found = Ok(entry);
        }
        found
    }

    fn getattr(&mut self, node: u64) -> Result<Entry, i32> {
        let reply = self.ask(opcode::GETATTR, node, &[0; 16], 104)?;
        Ok(attr(node, &reply[16..]))
    }

    fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        let mut args = (flags as u32).to_le_bytes().to_vec();
        args.put_u32(0);
        self.ask(opcode::OPEN, node, &args, 16)
            .map(|reply| u64_at(&reply, 0))
    }

    fn opendir(&mut self, node: u64) -> Result<u64, i32> {
        self.ask(opcode::OPENDIR, node, &[0; 8], 16)
            .map(|reply| u64_at(&reply, 0))
    }

    fn create(&mut self, parent: u64, file: &str, mode: u32) -> Result<(Entry, u64), i32> {
        let mut args = Vec::new();
        args.put_u32((libc::O_RDWR | libc::O_CREAT | libc::O_EXCL) as u32);
        args.put_u32(libc::S_IFREG | mode);
        args.put_u32(0o22);
        args.put_u32(0);
        args.extend(name(file));
        let reply = self.ask(opcode::CREATE, parent, &args, 128 + 16)?;
        Ok((entry(&reply), u64_at(&reply, 128)))
    }

    fn read(&mut self, node: u64, fh: u64, offset: u64, size: u32) -> Result<Vec<u8>, i32> {
        let args = io_args(fh, offset, size, 0, 0);
        self.ask(opcode::READ, node, &args, size.min(2 << 20))
    }

    fn write(&mut self, node: u64, fh: u64, offset: u64, data: &[u8]) -> Result<u32, i32> {
        let args = io_args(fh, offset, data.len() as u32, 0, 0);
        let reply = self.ask_with(opcode::WRITE, node, &args, data, 8)?;
        Ok(u32_at(&reply, 0))
    }

    fn mkdir(&mut self, parent: u64, dir: &str, mode: u32) -> Result<Entry, i32> {
        let mut args = Vec::new();
        args.put_u32(mode);
        args.put_u32(0o22);
        args.extend(name(dir));
        self.ask(opcode::MKDIR, parent, &args, 128)
            .map(|reply| entry(&reply))
    }

    fn mknod(&mut self, parent: u64, file: &str, mode: u32, rdev: u32) -> Result<Entry, i32> {
        let mut args = Vec::new();
        args.put_u32(mode);
        args.put_u32(rdev);
        args.put_u32(0);
        args.put_u32(0);
        args.extend(name(file));
        self.ask(opcode::MKNOD, parent, &args, 128)
            .map(|reply| entry(&reply))
    }

    fn rename(&mut self, from: (u64, &str), to: (u64, &str), flags: u32) -> Result<(), i32> {
        let mut args = Vec::new();
        args.put_u64(to.0);
        args.put_u32(flags);
        args.put_u32(0);
        args.extend(name(from.1));
        args.extend(name(to.1));
        self.ask(opcode::RENAME2, from.0, &args, 0).map(|_| ())
    }

    fn release(&mut self, code: u32, node: u64, fh: u64) -> Result<(), i32> {
        let mut args = fh.to_le_bytes().to_vec();
        args.put_zeros(16);
        self.ask(code, node, &args, 0).map(|_| ())
    }

    /// FORGET on the priority queue: comes back with nothing written.
    fn forget(&mut self, node: u64, lookups: u64) {
        let header = self.header(opcode::FORGET, node, 8);
        let args = lookups.to_le_bytes();
        let used = self.send(
            PRIORITY,
            &[Buffer::Readable(&header), Buffer::Readable(&args)],
        );
        assert_eq!(used.len, 0);
    }

    /// Every entry of a directory, by READDIR or READDIRPLUS with replies of `size` bytes: name, node.
    fn list(&mut self, node: u64, plus: bool, size: u32) -> Result<Vec<(String, u64)>, i32> {
        let fh = self.opendir(node)?;
        let code = if plus {
            opcode::READDIRPLUS
        } else {
            opcode::READDIR
        };
        let mut all = Vec::new();
        let mut offset = 0;
        loop {
            let reply = self.ask(code, node, &io_args(fh, offset, size, 0, 0), size)?;
            if reply.is_empty() {
                self.release(opcode::RELEASEDIR, node, fh)?;
                return Ok(all);
            }
            let mut rest = &reply[..];
            while !rest.is_empty() {
                let mut node = 0;
                if plus {
                    node = u64_at(rest, 0);
                    rest = &rest[128..];
                }
                offset = u64_at(rest, 8);
                let length = u32_at(rest, 16) as usize;
                let name = String::from_utf8(rest[24..24 + length].to_vec()).unwrap();
                all.push((name, node));
                rest = &rest[(24 + length).next_multiple_of(8)..];
            }
        }
    }
}

/// `struct fuse_read_in`, which WRITE and READDIR share.
fn io_args(fh: u64, offset: u64, size: u32, how: u32, flags: u32) -> Vec<u8> {
    let mut args = Vec::new();
    args.put_u64(fh);
    args.put_u64(offset);
    args.put_u32(size);
    args.put_u32(how);
    args.put_u64(0);
    args.put_u32(flags);
    args.put_u32(0);
    args
}

/// SETATTR of one field.
fn setattr_args(valid: u32, fh: u64, size: u64, mode: u32, (uid, gid): (u32, u32)) -> Vec<u8> {
    let mut args = Vec::new();
    args.put_u32(valid);
    args.put_u32(0);
    args.put_u64(fh);
    args.put_u64(size);
    args.put_zeros(8);
    args.put_u64(1_000_000_000);
    args.put_u64(2_000_000_000);
    args.put_u64(0);
    args.put_u32(111);
    args.put_u32(222);
    args.put_u32(0);
    args.put_u32(mode);
    args.put_u32(0);
    args.put_u32(uid);
    args.put_u32(gid);
    args.put_u32(0);
    args
}
