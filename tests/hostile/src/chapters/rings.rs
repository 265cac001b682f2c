//! What is no chain and no ring: the device asks for a reset, and is as new behind it (virtio 1.2 section 2.7; catalogue B2.1,
//! B2.5, V3 to V9; CVE-2019-18960).

use super::Honest;
use crate::cpu::RAM;
use crate::report::{At, Outcome};
use crate::ring::{Descriptor, INDIRECT, NEXT, Ring, readable, writable};
use crate::virtio::F_INDIRECT;

/// Memory that nobody else uses.
const BUFFER: u64 = 0x70_0000;
/// Ends of memory, and what is none.
const OUTSIDE: [(u64, u32); 10] = [
    (RAM.end, 1),
    (RAM.end - 1, 2),
    (RAM.end - 0x1000, 0x1001),
    (RAM.end - 0x1000, u32::MAX),
    (0xc000_0000, 4),
    (0xfee0_0000, 16),
    (0x1_0000_0000, 1),
    (1 << 52, 1),
    (u64::MAX, 1),
    (u64::MAX - 1, 4),
];

/// A chain's descriptors from the first on; the head is another matter.
type Chain<'a> = &'a [Descriptor];

fn with(descriptor: Descriptor, flags: u16, next: u16) -> Descriptor {
    Descriptor {
        flags: descriptor.flags | flags,
        next,
        ..descriptor
    }
}

/// Descriptors in the queue's own table.
pub(super) fn direct<H: Honest>(honest: &mut H) -> Outcome {
    for (number, (address, length)) in (0..).zip(OUTSIDE) {
        let (read, write) = (readable(address, length), writable(address, length));
        broken(honest, 0, &[read]).at("to read outside memory", number)?;
        broken(honest, 0, &[write]).at("to write outside memory", number)?;
        let first = with(writable(BUFFER, 64), NEXT, 1);
        broken(honest, 0, &[first, write]).at("last outside memory", number)?;
    }
    let fine = writable(BUFFER, 64);
    let size = honest.rings()[0].size;
    let cases: [Chain<'_>; 8] = [
        // Nothing at all.
        &[readable(BUFFER, 0)],
        &[writable(BUFFER, 0)],
        // Rounds of one, of two, and into the middle.
        &[with(fine, NEXT, 0)],
        &[with(fine, NEXT, 1), with(fine, NEXT, 0)],
        &[
            with(fine, NEXT, 1),
            with(fine, NEXT, 2),
            with(fine, NEXT, 1),
        ],
        // Beyond the table.
        &[with(fine, NEXT, size)],
        &[with(fine, NEXT, u16::MAX)],
        // To be read behind what is to be written.
        &[with(fine, NEXT, 1), readable(BUFFER, 64)],
    ];
    for (number, chain) in (0..).zip(cases) {
        broken(honest, 0, chain).at("no chain", number)?;
    }
    for head in [size, size + 1, 0x8000, u16::MAX] {
        broken(honest, head, &[fine]).at("a head beyond the table", head.into())?;
    }
    broken(honest, 0, &[with(fine, INDIRECT, 0)])
        .at("an indirect table that nobody agreed on", 0)?;
    // Nothing of it is wrong but where the index is.
    for jump in [size + 1, 2 * size, 0x7fff, 0x8000, u16::MAX] {
        up_and_break(honest, 0, |ring| {
            ring.chain(0, &[fine]);
            ring.offer_up_to(jump);
        })
        .at("an index that jumped", jump.into())?;
    }
    Ok(())
}

/// Descriptors in tables of their own.
pub(super) fn indirect<H: Honest>(honest: &mut H) -> Outcome {
    const ENTRY: u32 = 16;
    for (number, (address, length)) in (0..).zip(OUTSIDE) {
        let length = length.next_multiple_of(ENTRY).max(ENTRY);
        let table = with(readable(address & !15, length), INDIRECT, 0);
        up_and_break(honest, F_INDIRECT, |ring| offer(ring, 0, &[table]))
            .at("a table outside memory", number)?;
    }
    for length in [0, 1, ENTRY - 1, ENTRY + 1, u32::MAX] {
        nested(honest, length, 0, &[writable(BUFFER, 64)])
            .at("a table of broken entries", length.into())?;
    }
    let fine = writable(BUFFER, 64);
    nested(honest, ENTRY, NEXT, &[fine]).at("a table with a next", 0)?;
    let cases: [Chain<'_>; 5] = [
        &[with(fine, INDIRECT, 0)],
        &[with(fine, NEXT, 0)],
        &[with(fine, NEXT, 1)],
        &[with(fine, NEXT, u16::MAX)],
        &[writable(RAM.end - 1, 2)],
    ];
    for (number, chain) in (0..).zip(cases) {
        nested(honest, ENTRY, 0, chain).at("a table of what is no chain", number)?;
    }
    // One more than the queue has: that is a loop for all that the device knows.
    let size = honest.rings()[0].size;
    up_and_break(honest, F_INDIRECT, |ring| {
        for index in 0..=size {
            let last = if index == size { 0 } else { NEXT };
            ring.describe_indirect(index, with(fine, last, index + 1));
        }
        let table = readable(ring.table, ENTRY * u32::from(size + 1));
        offer(ring, 0, &[with(table, INDIRECT, 0)]);
    })
    .at("a table longer than the queue", size.into())
}

fn nested<H: Honest>(honest: &mut H, length: u32, flags: u16, chain: Chain<'_>) -> Outcome {
    up_and_break(honest, F_INDIRECT, |ring| {
        for (index, descriptor) in (0..).zip(chain) {
            ring.describe_indirect(index, *descriptor);
        }
        let table = with(readable(ring.table, length), INDIRECT | flags, 1);
        offer(ring, 0, &[table, writable(BUFFER, 64)]);
    })
}

fn broken<H: Honest>(honest: &mut H, head: u16, chain: Chain<'_>) -> Outcome {
    up_and_break(honest, 0, |ring| offer(ring, head, chain))
}

fn offer(ring: &mut Ring, head: u16, chain: Chain<'_>) {
    for (index, descriptor) in (0..).zip(chain) {
        ring.describe(index, *descriptor);
    }
    ring.offer(head);
}

/// Brings the device up, lets the driver break the queue, and kicks until long after.
fn up_and_break<H: Honest>(
    honest: &mut H,
    features: u64,
    break_it: impl FnOnce(&mut Ring),
) -> Outcome {
    /// Notifications of a queue that is broken, each an exit; nothing may come of them.
    const KICKS: u32 = 3;
    honest.up(features)?;
    honest.provoke()?;
    let device = honest.device();
    let ring = honest.victim();
    let number = ring.number;
    break_it(ring);
    device.kick(number);
    device.gave_up()?;
    for _ in 0..KICKS {
        device.kick(number);
    }
    device.gave_up()
}
