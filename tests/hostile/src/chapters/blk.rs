//! A disk (virtio 1.2 section 5.2) of 1 MiB with one queue, writable or not.

use super::{COMMON_COUNT, Honest, Named, chapters_of, queues};
use crate::cpu::{peek, poke};
use crate::report::{At, Outcome, same};
use crate::ring::{Descriptor, Ring, readable, writable};
use crate::virtio::{CONFIG, Device};

const TYPE: u16 = 2;
const HEADER: u64 = 0x60_0000;
const STATUS: u64 = 0x60_0100;
const RANGES: u64 = 0x60_0200;
const DATA: u64 = 0x61_0000;

/// Types of requests (section 5.2.6).
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
/// Answers.
const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;
const NO_ANSWER: u8 = 0xff;

const F_RO: u64 = 1 << 5;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;
const SECTOR_BYTES: u32 = 512;

pub(crate) struct Blk {
    device: Device,
    rings: [Ring; 1],
    /// The disk's size.
    sectors: u64,
    /// Nobody may write it.
    read_only: bool,
    /// What the last honest request wrote.
    wrote: u64,
}

pub(super) const CHAPTERS: [Named<Blk>; COMMON_COUNT + 5] = chapters_of!(
    Blk,
    &[
        ("sectors that are not there", sectors),
        ("ranges that are none", ranges),
        ("answers that nothing has room for", room),
        ("the same head twice in flight", twice),
        ("resets with requests in flight", resets),
    ]
);

/// Of a disk that nobody may write.
pub(super) const READ_ONLY_CHAPTERS: [Named<Blk>; 3] = [
    ("sectors that are not there", sectors),
    ("what would change the disk", changes),
    ("answers that nothing has room for", room),
];

impl Blk {
    pub(super) fn new() -> Outcome<Blk> {
        let device = Device::find(TYPE)?;
        let read_only = device.offered() & F_RO != 0;
        Ok(Blk {
            device,
            rings: queues(),
            sectors: device.get(CONFIG),
            read_only,
            wrote: 0,
        })
    }

    /// A request from its header to its status, with `data` between them. Returns the status.
    fn request(&mut self, kind: u32, sector: u64, data: Descriptor) -> Outcome<u8> {
        let buffers = [readable(HEADER, 16), data, writable(STATUS, 1)];
        self.chain(kind, sector, &buffers)?;
        Ok(peek(STATUS))
    }

    /// A request in these buffers. Returns how many bytes were written.
    fn chain(&mut self, kind: u32, sector: u64, buffers: &[Descriptor]) -> Outcome<u32> {
        poke(HEADER, u64::from(kind));
        poke(HEADER + 8, sector);
        poke(STATUS, NO_ANSWER);
        self.rings[0].chain(0, buffers);
        self.rings[0].offer(0);
        self.device.kick(0);
        let (head, written) = self.device.answer(&mut self.rings[0])?;
        same("the head of an answer", head, 0u32)?;
        Ok(written)
    }

    /// The last sector is what an honest request left there.
    fn unchanged(&mut self) -> Outcome {
        poke(DATA, !self.wrote);
        let status = self.request(IN, self.sectors - 1, writable(DATA, SECTOR_BYTES))?;
        same("the status of a read", status, OK)?;
        same("the sector", peek::<u64>(DATA), self.wrote)
    }

    /// A request with one range.
    fn range(&mut self, kind: u32, (sector, count, flags): (u64, u32, u32)) -> Outcome<u8> {
        poke(RANGES, sector);
        poke(RANGES + 8, count);
        poke(RANGES + 12, flags);
        self.request(kind, 0, readable(RANGES, 16))
    }
}

impl Honest for Blk {
    fn device(&self) -> Device {
        self.device
    }

    fn features(&self) -> u64 {
        match self.read_only {
            true => F_RO,
            false => F_DISCARD | F_WRITE_ZEROES,
        }
    }

    fn rings(&mut self) -> &mut [Ring] {
        &mut self.rings
    }

    /// The last sector is what was written to it, or zeroes if nobody may.
    fn ask(&mut self) -> Outcome {
        let last = self.sectors - 1;
        if !self.read_only {
            self.wrote += 0x0123_4567_89ab;
            poke(DATA, self.wrote);
            let status = self.request(OUT, last, readable(DATA, SECTOR_BYTES))?;
            same("the status of a write", status, OK)?;
        }
        self.unchanged()
    }
}

/// Requests beyond the disk, of no sectors, of no type: each is refused, and nothing is changed.
fn sectors(blk: &mut Blk) -> Outcome {
    blk.recovers()?;
    let end = blk.sectors;
    let one = SECTOR_BYTES;
    let beyond = [
        (end, one),
        (end - 1, 2 * one),
        (0, one * end as u32 + one),
        (u64::MAX, one),
        (u64::MAX - 1, 4 * one),
        (u64::MAX / 512, one),
        (1 << 55, one),
        (1 << 63, one),
        // No sectors.
        (0, 1),
        (0, one - 1),
        (end - 1, one + 1),
    ];
    for (number, (sector, length)) in (0..).zip(beyond) {
        let read = blk.request(IN, sector, writable(DATA, length))?;
        same("the status of a read", read, IO_ERROR).at("beyond", number)?;
        let write = blk.request(OUT, sector, readable(DATA, length))?;
        same("the status of a write", write, IO_ERROR).at("beyond", number)?;
    }
    for kind in [2, 3, 5, 6, 7, 9, 10, 12, 14, 0x8000_0000, u32::MAX] {
        let status = blk.request(kind, 0, readable(DATA, one))?;
        same("the status", status, UNSUPPORTED).at("no type", kind.into())?;
    }
    blk.unchanged()
}

/// Ranges to discard and to zero that overflow, or have flags that nobody knows (catalogue B2.14).
fn ranges(blk: &mut Blk) -> Outcome {
    blk.recovers()?;
    let end = blk.sectors;
    let bad = [
        (end, 1, 0),
        (end - 1, 2, 0),
        (0, end as u32 + 1, 0),
        (0, u32::MAX, 0),
        (u64::MAX, 1, 0),
        (u64::MAX, u32::MAX, 0),
        (u64::MAX / 512 + 1, 1, 0),
    ];
    for kind in [DISCARD, WRITE_ZEROES] {
        for (number, range) in (0..).zip(bad) {
            let status = blk.range(kind, range)?;
            same("the status", status, IO_ERROR).at("a range", number)?;
        }
        for flags in [2, 0x8000_0000, u32::MAX] {
            let status = blk.range(kind, (0, 1, flags))?;
            same("the status", status, UNSUPPORTED).at("flags", flags.into())?;
        }
        for length in [1, 15, 17, 16 * 17, 1 << 20] {
            let status = blk.request(kind, 0, readable(RANGES, length))?;
            same("the status", status, IO_ERROR).at("no list", length.into())?;
        }
    }
    blk.unchanged()
}

/// What has no room for its answer gets what fits, and what has none for a status gets nothing and does nothing (catalogue V15).
fn room(blk: &mut Blk) -> Outcome {
    const ID_BYTES: u32 = 20;
    blk.recovers()?;
    for length in [1, ID_BYTES - 1, ID_BYTES, ID_BYTES + 1, 4096] {
        poke(DATA + u64::from(ID_BYTES), NO_ANSWER);
        let status = blk.request(GET_ID, 0, writable(DATA, length))?;
        same("the status of an id", status, OK).at("room", length.into())?;
        let behind = peek::<u8>(DATA + u64::from(ID_BYTES));
        same("what is behind an id", behind, NO_ANSWER).at("room", length.into())?;
    }
    let header = readable(HEADER, 16);
    let written = blk.chain(GET_ID, 0, &[header, writable(STATUS, 1)])?;
    same("the answer without room for an id", written, 1u32)?;
    let last = blk.sectors - 1;
    poke(DATA, !blk.wrote);
    let sector = readable(DATA, SECTOR_BYTES);
    for (number, buffers) in (0..).zip([&[header][..], &[header, sector]]) {
        for kind in [IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES] {
            let written = blk.chain(kind, last, buffers)?;
            same("the answer without a status", written, 0u32).at("buffers", number)?;
            same("the status", peek::<u8>(STATUS), NO_ANSWER).at("buffers", number)?;
        }
    }
    blk.unchanged()
}

/// What is written, discarded or zeroed of a disk that nobody may write, whole and in parts, is as it was (catalogue BI6).
fn changes(blk: &mut Blk) -> Outcome {
    blk.recovers()?;
    poke(DATA, !0u64);
    for sector in 0..blk.sectors {
        let status = blk.request(OUT, sector, readable(DATA, SECTOR_BYTES))?;
        same("the status of a write", status, IO_ERROR).at("sector", sector)?;
    }
    let all = blk.sectors as u32;
    for kind in [DISCARD, WRITE_ZEROES] {
        for (number, range) in (0..).zip([(0, 1, 0), (0, all, 0), (0, 0, 0), (0, all, 1)]) {
            let status = blk.range(kind, range)?;
            same("the status", status, UNSUPPORTED).at("a range", number)?;
        }
    }
    let status = blk.request(FLUSH, 0, readable(DATA, SECTOR_BYTES))?;
    same("the status of a flush", status, OK)?;
    blk.unchanged()
}

/// Reads the first sectors, `count` times, in chains of their own or all by the first chain's head.
fn flood(blk: &mut Blk, count: u16, length: u32, own: bool) {
    poke(HEADER, u64::from(IN));
    poke(HEADER + 8, 0u64);
    let buffers = [
        readable(HEADER, 16),
        writable(DATA, length),
        writable(STATUS, 1),
    ];
    let ring = &mut blk.rings[0];
    for number in 0..count {
        let head = if own { 3 * number } else { 0 };
        ring.chain(head, &buffers);
        ring.offer(head);
    }
    blk.device.kick(0);
}

/// CVE-2026-45782.
fn twice(blk: &mut Blk) -> Outcome {
    const BYTES: u32 = 64 * SECTOR_BYTES;
    for count in 2..super::QUEUE_SIZE {
        blk.up(0)?;
        flood(blk, count, BYTES, false);
        blk.device.gave_up().at("times", count.into())?;
    }
    Ok(())
}

/// When a reset is done, nothing writes the driver's memory any more.
fn resets(blk: &mut Blk) -> Outcome {
    const BYTES: u32 = 1024 * SECTOR_BYTES;
    const ROUNDS: u64 = 20;
    const MARK: u64 = 0x5555_aaaa_5555_aaaa;
    const LOOKS: u32 = 100;
    for round in 0..ROUNDS {
        blk.up(0)?;
        flood(blk, 2, BYTES, true);
        blk.device.reset().at("round", round)?;
        let last = DATA + u64::from(BYTES) - 8;
        let used = blk.rings[0].used_index();
        for place in [DATA, last] {
            poke(place, MARK);
        }
        for _ in 0..LOOKS {
            for place in [DATA, last] {
                same("memory after a reset", peek::<u64>(place), MARK).at("round", round)?;
            }
        }
        same("the used index", blk.rings[0].used_index(), used).at("round", round)?;
    }
    Ok(())
}
