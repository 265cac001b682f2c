//! A disk, driven as a guest drives it: requests over the real queue and transport, done by a ring and by threads. The threads
//! run under a filter of exactly [`super::DISK_SYSCALLS`]; a call that the list lacks ends the whole test process.

mod hostile;
mod serving;

use super::*;
use crate::event::Poller;
use crate::testing::{Buffer, Driver, RawDescriptor, WAIT_MS, written_down};
use crate::virtio::device::Busy;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// Everything that the device offers of its own.
const ALL: u64 = 0x00ff_ffff;
/// VIRTIO_BLK_F_FLUSH.
const F_FLUSH: u64 = 1 << 9;
/// VIRTIO_BLK_F_MQ.
const F_MQ: u64 = 1 << 12;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const SECTOR: usize = 512;

fn filter() -> BpfProgram {
    let rules: BTreeMap<i64, Vec<_>> = DISK_SYSCALLS.iter().map(|nr| (*nr, vec![])).collect();
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::x86_64,
    );
    filter.unwrap().try_into().unwrap()
}

/// An engine; `None`, loudly, if it should be a ring and this host has none.
fn engine(kind: EngineKind, poller: &Poller) -> Option<Arc<DiskIo>> {
    let io = idle_engine(kind, poller)?;
    io.start(&seal()).expect("its threads");
    Some(io)
}

fn seal() -> Seal {
    Arc::new(|| seccompiler::apply_filter(&filter()).map_err(std::io::Error::other))
}

/// One whose threads do not run yet, so that all that they are asked for stays under way.
fn idle_engine(kind: EngineKind, poller: &Poller) -> Option<Arc<DiskIo>> {
    let io = DiskIo::new(kind, poller).expect("an engine");
    if kind == EngineKind::Best && !io.is_ring() {
        eprintln!("SKIPPED: {}: this host has no io_uring", module_path!());
        return None;
    }
    Some(io)
}

/// A file that is gone when it is closed.
fn file(bytes: usize) -> File {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .open(std::env::temp_dir())
        .expect("a temporary file");
    file.set_len(bytes as u64).expect("its size");
    file
}

/// A guest with one disk.
struct Guest {
    driver: Driver,
    poller: Arc<Poller>,
    file: File,
    io: Arc<DiskIo>,
}

impl Guest {
    /// `None` if this host lacks that engine.
    fn new(kind: EngineKind, file: File, read_only: bool, features: u64) -> Option<Guest> {
        let poller = Arc::new(Poller::new().unwrap());
        let io = engine(kind, &poller)?;
        Some(Guest::with(io, poller, file, read_only, features))
    }

    fn with(
        io: Arc<DiskIo>,
        poller: Arc<Poller>,
        file: File,
        read_only: bool,
        features: u64,
    ) -> Guest {
        let disk = disk(io.clone(), &poller, &file, read_only);
        let mut driver = Driver::new(Box::new(disk));
        driver.negotiate(driver.offered() & features);
        for queue in 0..2 {
            driver.setup_queue(queue, 256);
        }
        driver.start();
        Guest {
            driver,
            poller,
            file,
            io,
        }
    }

    /// One request: what is sent after the header, and room for data. The status, the bytes that the device says it wrote, and
    /// the data.
    fn ask(&mut self, kind: u32, sector: u64, sent: &[u8], room: usize) -> (u8, u32, Vec<u8>) {
        self.ask_raw(&[&header(kind, sector), sent].concat(), room)
    }

    fn ask_raw(&mut self, readable: &[u8], room: usize) -> (u8, u32, Vec<u8>) {
        let data = self.driver.allocate(readable.len() as u64);
        let memory = self.driver.memory().clone();
        memory.write_slice(readable, GuestAddress(data)).unwrap();
        // One descriptor for what is sent, and the status at the end of the data, as section 5.2.6 allows.
        let answer = self.driver.allocate(room as u64 + 1);
        memory
            .write_slice(&vec![0xee; room + 1], GuestAddress(answer))
            .unwrap();
        let descriptor = |addr, len: usize, flags, next| RawDescriptor {
            addr,
            len: len as u32,
            flags,
            next,
        };
        let before = self.driver.used_index(0);
        self.driver.add_raw(
            0,
            0,
            &[
                descriptor(data, readable.len(), NEXT, 1),
                descriptor(answer, room + 1, WRITE, 0),
            ],
        );
        self.driver.kick(0);
        let deadline = Instant::now() + Duration::from_millis(WAIT_MS);
        while self.driver.used_index(0) == before {
            assert!(Instant::now() < deadline, "no answer");
            self.poller
                .turn(Some(Duration::from_millis(WAIT_MS)))
                .unwrap();
        }
        let used = self.driver.used(0).expect("an answer");
        let mut bytes = vec![0; room + 1];
        memory.read_slice(&mut bytes, GuestAddress(answer)).unwrap();
        let status = bytes.pop().unwrap();
        (status, used.len, bytes)
    }

    fn status(&mut self, kind: u32, sector: u64, sent: &[u8], room: usize) -> u8 {
        self.ask(kind, sector, sent, room).0
    }

    fn on_host(&self, sector: usize, sectors: usize) -> Vec<u8> {
        let mut bytes = vec![0; sectors * SECTOR];
        let at = (sector * SECTOR) as u64;
        self.file.read_exact_at(&mut bytes, at).expect("the file");
        bytes
    }
}

fn disk(io: Arc<DiskIo>, poller: &Arc<Poller>, file: &File, read_only: bool) -> Disk {
    let setup = DiskSetup {
        file: file.try_clone().unwrap(),
        read_only,
        queues: 2,
        id: "disk-of-a-test".into(),
    };
    Disk::new(setup, io, poller.clone()).expect("a disk")
}

/// A request's first bytes.
fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

/// Runs a test with each engine.
fn with_each_engine(test: impl Fn(EngineKind)) {
    test(EngineKind::Best);
    test(EngineKind::Threads);
}

fn range(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend_from_slice(&count.to_le_bytes());
    bytes.extend_from_slice(&flags.to_le_bytes());
    bytes
}
