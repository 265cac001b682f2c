//! A disk of a hostile driver. What no request of it names stays as it was; of a read-only disk that is all of it.

use crate::allocations::Bounds;
use crate::guest::{ACTS_MAX, Guest};
use crate::program::{Act, Reader};
use capsid_devices::blk::{Disk, DiskIo, DiskSetup, EngineKind};
use capsid_devices::event::Poller;
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};

pub(crate) const BOUNDS: Bounds = Bounds {
    growth: 8 << 20,
    largest: 1 << 20,
};
const SECTOR_BYTES: usize = 512;
const SECTORS: usize = 64;
/// Behind the last whole sector, and not part of the disk.
const TAIL_BYTES: usize = 300;
const FILE_BYTES: usize = SECTORS * SECTOR_BYTES + TAIL_BYTES;
const QUEUES: u8 = 2;
/// The header of a request, and the most ranges of one.
const HEADER_BYTES: usize = 16;
const RANGES_MAX: usize = 16;

/// What is in the file at first.
static BEFORE: OnceLock<Vec<u8>> = OnceLock::new();

/// The target's own steps, by their kinds.
mod own {
    /// So many calls of the disk are made, 0 for all.
    pub(super) const WORK: u8 = 0;
    /// A pause that waits for all of them.
    pub(super) const PAUSE: u8 = 1;
    pub(super) const KINDS: u8 = PAUSE + 1;
}

pub(crate) fn run(input: &[u8]) {
    let mut reader = Reader::new(input);
    let Some(form) = reader.u8() else {
        return;
    };
    let read_only = form & 1 != 0;
    let poller = Arc::new(Poller::new().expect("a loop"));
    let io = DiskIo::new(EngineKind::Here, &*poller).expect("an engine");
    let before = BEFORE.get_or_init(|| (0..FILE_BYTES).map(|at| (at / 7) as u8 | 1).collect());
    let file = File::from(memfd_create(c"disk", MemfdFlags::CLOEXEC).expect("a file"));
    file.write_all_at(before, 0).expect("room");
    let setup = DiskSetup {
        file: file.try_clone().expect("a descriptor"),
        read_only,
        queues: QUEUES,
        id: "fuzzed".into(),
    };
    let disk = Disk::new(setup, io.clone(), poller.clone()).expect("a disk");
    let mut guest = Guest::new(Box::new(disk), poller);
    let mut named = [false; SECTORS];
    for _ in 0..ACTS_MAX {
        let Some(act) = Act::read(&mut reader) else {
            break;
        };
        name(&mut guest, &mut named);
        match &act {
            Act::Own { kind, bytes } if kind % own::KINDS == own::WORK => {
                let most = bytes.first().copied().filter(|most| *most > 0);
                io.work_here(most.map_or(usize::MAX, usize::from));
                guest.look();
            }
            Act::Own { .. } => guest.pause(|| {
                io.work_here(usize::MAX);
            }),
            _ => guest.play(&act),
        }
    }
    name(&mut guest, &mut named);
    guest.settle();
    io.work_here(usize::MAX);
    guest.leave();
    drop(guest);
    let mut after = vec![0; FILE_BYTES + 1];
    let bytes = file.read_at(&mut after, 0).expect("a file");
    assert_eq!(bytes, FILE_BYTES, "the disk's file has another size");
    let sectors = before.chunks(SECTOR_BYTES).zip(after.chunks(SECTOR_BYTES));
    for (sector, (was, is)) in sectors.enumerate() {
        let same = is.starts_with(was);
        let allowed = !read_only && named.get(sector).copied().unwrap_or(false);
        assert!(same || allowed, "sector {sector} of the disk changed");
    }
}

/// Notes the sectors that requests which may be begun now could change, as a reader of virtio 1.2 section 5.2.6 has it.
fn name(guest: &mut Guest, named: &mut [bool; SECTORS]) {
    let Some(offered) = guest.offered(HEADER_BYTES * (RANGES_MAX + 1)) else {
        named.fill(true);
        return;
    };
    for (read, reads) in offered {
        let Some((header, ranges)) = read.split_first_chunk::<HEADER_BYTES>() else {
            continue;
        };
        let (kind, first) = (&header[..4], number(&header[8..]));
        match u32::from_le_bytes(kind.try_into().expect("four bytes")) {
            1 => note(
                named,
                first,
                (reads - HEADER_BYTES as u64) / SECTOR_BYTES as u64,
            ),
            11 | 13 => {
                for range in ranges.chunks_exact(16) {
                    note(named, number(range), number(&range[8..]) & 0xffff_ffff);
                }
            }
            _ => {}
        }
    }
}

fn number(bytes: &[u8]) -> u64 {
    let bytes = bytes.first_chunk().copied().unwrap_or_default();
    u64::from_le_bytes(bytes)
}

fn note(named: &mut [bool; SECTORS], first: u64, count: u64) {
    let first = usize::try_from(first).unwrap_or(usize::MAX);
    let end = first.saturating_add(count as usize);
    // What is not wholly in the disk is refused.
    if let Some(sectors) = named.get_mut(first..end) {
        sectors.fill(true);
    }
}
