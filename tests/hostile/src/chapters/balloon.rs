//! The balloon (virtio 1.2 section 5.5), with its reporting queue where the specification has it.

use super::{COMMON_COUNT, Honest, Named, QUEUE_SIZE, chapters_of, rings};
use crate::cpu::{RAM, peek, poke};
use crate::report::{At, Outcome, same};
use crate::ring::{Descriptor, Ring, readable, writable};
use crate::virtio::{Device, NEEDS_RESET, RUNNING};
use core::ops::Range;

const TYPE: u16 = 5;
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const REPORTING: usize = 2;
/// Which number that queue has.
const REPORTING_NUMBER: u16 = 4;
/// Page frame numbers, and memory that is given away.
const FRAMES: u64 = 0x60_0000;
const GIVEN: Range<u64> = 0x180_0000..0x380_0000;
const PAGE: u64 = 0x1000;
const MARK: u64 = 0x5555_aaaa_5555_aaaa;

const F_PAGE_REPORTING: u64 = 1 << 5;
/// `actual`, in which the driver says how many pages it gave.
const ACTUAL: Range<u64> = 4..8;

pub(crate) struct Balloon {
    device: Device,
    rings: [Ring; 3],
    victim: usize,
}

pub(super) const CHAPTERS: [Named<Balloon>; COMMON_COUNT + 4] = chapters_of!(
    Balloon,
    &[
        ("no chain of reports", no_reports),
        ("frames that are none", frames),
        ("the same frame without end", duplicates),
        ("reports that are none", reports),
    ]
);

impl Balloon {
    pub(super) fn new() -> Outcome<Balloon> {
        Ok(Balloon {
            device: Device::find(TYPE)?,
            rings: [0, 1, REPORTING_NUMBER].map(|number| Ring::new(number, QUEUE_SIZE)),
            victim: INFLATE,
        })
    }

    /// Sends a chain, of which nothing is written to.
    fn send(&mut self, queue: usize, chain: &[Descriptor]) -> Outcome {
        let ring = &mut self.rings[queue];
        ring.chain(0, chain);
        ring.offer(0);
        let number = ring.number;
        self.device.kick(number);
        let (head, bytes) = self.device.answer(&mut self.rings[queue])?;
        same("the head of an answer", head, 0u32)?;
        same("bytes written", bytes, 0u32)
    }

    /// Names pages in one chain.
    fn name(&mut self, queue: usize, frames: &[u32]) -> Outcome {
        for (at, frame) in (FRAMES..).step_by(4).zip(frames) {
            poke(at, *frame);
        }
        self.send(queue, &[readable(FRAMES, 4 * frames.len() as u32)])
    }
}

fn frame(address: u64) -> u32 {
    (address / PAGE) as u32
}

impl Honest for Balloon {
    fn device(&self) -> Device {
        self.device
    }

    fn features(&self) -> u64 {
        F_PAGE_REPORTING
    }

    fn rings(&mut self) -> &mut [Ring] {
        &mut self.rings
    }

    fn victim(&mut self) -> &mut Ring {
        &mut self.rings[self.victim]
    }

    fn writable_config(&self) -> Range<u64> {
        ACTUAL
    }

    /// A page that is given away is empty when it comes back, and its neighbours are not.
    fn ask(&mut self) -> Outcome {
        let page = GIVEN.start + 8 * PAGE;
        for neighbour in [page - PAGE, page, page + PAGE] {
            poke(neighbour, MARK);
        }
        self.name(INFLATE, &[frame(page)])?;
        self.name(DEFLATE, &[frame(page)])?;
        same("a page that was given away", peek::<u64>(page), 0u64)?;
        same("the page before it", peek::<u64>(page - PAGE), MARK)?;
        same("the page behind it", peek::<u64>(page + PAGE), MARK)?;
        // By the other way.
        poke(page, MARK);
        self.send(REPORTING, &[writable(page, PAGE as u32)])?;
        same("a page that was reported", peek::<u64>(page), 0u64)?;
        same("the page behind it", peek::<u64>(page + PAGE), MARK)
    }
}

/// As what is given, and the other way round.
fn no_reports(balloon: &mut Balloon) -> Outcome {
    balloon.victim = REPORTING;
    let outcome = rings::direct(balloon).and_then(|()| rings::indirect(balloon));
    balloon.victim = INFLATE;
    outcome
}

/// Pages past all memory, parts of a number, more than a chain may name, and the page that is just used (V17).
fn frames(balloon: &mut Balloon) -> Outcome {
    /// More than are looked at.
    const MANY: u32 = 4096;
    balloon.recovers()?;
    poke(GIVEN.start, MARK);
    for queue in [INFLATE, DEFLATE] {
        for none in [
            frame(RAM.end),
            frame(0xc000_0000),
            frame(0xfee0_0000),
            frame(0x1_0000_0000),
            0x8000_0000,
            u32::MAX - 1,
            u32::MAX,
        ] {
            balloon.name(queue, &[none]).at("a frame", none.into())?;
            let among = [none, frame(GIVEN.start) + 1, none, none.wrapping_sub(1)];
            balloon
                .name(queue, &among)
                .at("among frames", none.into())?;
        }
        poke(FRAMES, frame(GIVEN.start));
        for bytes in [1, 2, 3] {
            let chain = [readable(FRAMES, bytes)];
            balloon.send(queue, &chain).at("bytes", bytes.into())?;
        }
        balloon.send(queue, &[writable(FRAMES, 64)])?;
    }
    same("a page that nobody gave", peek::<u64>(GIVEN.start), MARK)?;
    // Each is one of 4,096 numbers; those beyond the first 1,024 stay.
    let last = GIVEN.start + u64::from(MANY - 1) * PAGE;
    poke(last, MARK);
    for number in 0..MANY {
        let at = FRAMES + 4 * u64::from(number);
        poke(at, frame(GIVEN.start) + number);
    }
    balloon.send(INFLATE, &[readable(FRAMES, 4 * MANY)])?;
    same("the first page", peek::<u64>(GIVEN.start), 0u64)?;
    same("a page beyond them", peek::<u64>(last), MARK)?;
    // Zeroes without end, of which the first name a page at the beginning of memory.
    balloon.send(INFLATE, &[readable(GIVEN.start, 16 << 20)])?;
    // The rings themselves: whatever the driver finds there then is its own doing.
    for part in [
        balloon.rings[INFLATE].used,
        balloon.rings[INFLATE].available,
    ] {
        balloon.up(0)?;
        poke(FRAMES, frame(part));
        let ring = &mut balloon.rings[INFLATE];
        ring.chain(0, &[readable(FRAMES, 4)]);
        ring.offer(0);
        balloon.device.kick(INFLATE as u16);
        let status = balloon.device.status();
        same("the status", status & !NEEDS_RESET, RUNNING)?;
    }
    balloon.recovers()
}

/// A quarter of a million times.
fn duplicates(balloon: &mut Balloon) -> Outcome {
    const CHAINS: u32 = 250;
    const FRAMES_OF_A_CHAIN: u32 = 1_000;
    balloon.up(0)?;
    for number in 0..FRAMES_OF_A_CHAIN {
        poke(FRAMES + 4 * u64::from(number), frame(GIVEN.start));
    }
    for number in 0..CHAINS {
        let chain = [readable(FRAMES, 4 * FRAMES_OF_A_CHAIN)];
        balloon.send(INFLATE, &chain).at("chain", number.into())?;
    }
    balloon.ask()
}

/// Parts of pages, the same range in every buffer, and such as are to be read.
fn reports(balloon: &mut Balloon) -> Outcome {
    balloon.recovers()?;
    let page = GIVEN.start;
    for (offset, bytes) in [
        (8, 1),
        (8, 8),
        (1, PAGE as u32 - 1),
        (8, PAGE as u32),
        (0x800, 2 * PAGE as u32 - 0x801),
    ] {
        poke(page, MARK);
        poke(page + 2 * PAGE - 8, MARK);
        balloon.send(REPORTING, &[writable(page + offset, bytes)])?;
        same("the page's first bytes", peek::<u64>(page), MARK).at("a part from", offset)?;
        let last = peek::<u64>(page + 2 * PAGE - 8);
        same("the page's last bytes", last, MARK).at("a part from", offset)?;
    }
    poke(page, MARK);
    balloon.send(REPORTING, &[readable(page, PAGE as u32)])?;
    same("a page to be read", peek::<u64>(page), MARK)?;
    let all = (GIVEN.end - GIVEN.start) as u32;
    let huge = [writable(GIVEN.start, all); 8];
    let size = usize::from(balloon.rings[REPORTING].size);
    for _ in 0..4 {
        balloon.send(REPORTING, &huge[..size])?;
    }
    same("a page that was reported", peek::<u64>(page), 0u64)
}
