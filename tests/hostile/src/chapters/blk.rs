//! A disk (virtio 1.2 section 5.2) of 1 MiB with one queue, writable.

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
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
/// Answers.
const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;
const NO_ANSWER: u8 = 0xff;

const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;
const SECTOR_BYTES: u32 = 512;

pub(crate) struct Blk {
    device: Device,
    rings: [Ring; 1],
    /// The disk's size.
    sectors: u64,
    /// What the last honest request wrote.
    wrote: u64,
}

pub(super) const CHAPTERS: [Named<Blk>; COMMON_COUNT + 4] = chapters_of!(
    Blk,
    &[
        ("sectors that are not there", sectors),
        ("ranges that are none", ranges),
        ("the same head twice in flight", twice),
        ("resets with requests in flight", resets),
    ]
);

impl Blk {
    pub(super) fn new() -> Outcome<Blk> {
        let device = Device::find(TYPE)?;
        Ok(Blk {
            device,
            rings: queues(),
            sectors: device.get(CONFIG),
            wrote: 0,
        })
    }

    /// A request from its header to its status, with `data` between them. Returns the status.
    fn request(&mut self, kind: u32, sector: u64, data: Descriptor) -> Outcome<u8> {
        poke(HEADER, u64::from(kind));
        poke(HEADER + 8, sector);
        poke(STATUS, NO_ANSWER);
        let buffers = [readable(HEADER, 16), data, writable(STATUS, 1)];
        self.rings[0].chain(0, &buffers);
        self.rings[0].offer(0);
        self.device.kick(0);
        let (head, _) = self.device.answer(&mut self.rings[0])?;
        same("the head of an answer", head, 0u32)?;
        Ok(peek(STATUS))
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
        F_DISCARD | F_WRITE_ZEROES
    }

    fn rings(&mut self) -> &mut [Ring] {
        &mut self.rings
    }

    /// The last sector is what was written to it.
    fn ask(&mut self) -> Outcome {
        let last = self.sectors - 1;
        self.wrote += 0x0123_4567_89ab;
        poke(DATA, self.wrote);
        let status = self.request(OUT, last, readable(DATA, SECTOR_BYTES))?;
        same("the status of a write", status, OK)?;
        poke(DATA, 0u64);
        let status = self.request(IN, last, writable(DATA, SECTOR_BYTES))?;
        same("the status of a read", status, OK)?;
        same("the sector", peek::<u64>(DATA), self.wrote)
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
    let status = blk.request(IN, end - 1, writable(DATA, one))?;
    same("the status of a read", status, OK)?;
    same("the sector", peek::<u64>(DATA), blk.wrote)
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
    let status = blk.request(IN, end - 1, writable(DATA, SECTOR_BYTES))?;
    same("the status of a read", status, OK)?;
    same("the sector", peek::<u64>(DATA), blk.wrote)
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
