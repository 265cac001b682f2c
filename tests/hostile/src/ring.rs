//! A split virtqueue from its driver's side (virtio 1.2 section 2.7), with nothing that keeps the driver from breaking it.

use crate::cpu::{fence, peek, poke};

/// The chain goes on with the next descriptor.
pub(crate) const NEXT: u16 = 1;
/// The device writes the buffer.
pub(crate) const WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub(crate) const INDIRECT: u16 = 4;

/// Where the first queue is; each takes [`QUEUE_BYTES`].
const QUEUES: u64 = 0x20_0000;
const QUEUE_BYTES: u64 = 0x1_0000;
const AVAILABLE: u64 = 0x4000;
const USED: u64 = 0x8000;
const TABLE: u64 = 0xc000;

/// One descriptor.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Descriptor {
    pub(crate) address: u64,
    pub(crate) length: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

/// A buffer that the device reads.
pub(crate) fn readable(address: u64, length: u32) -> Descriptor {
    Descriptor {
        address,
        length,
        ..Descriptor::default()
    }
}

/// A buffer that the device writes.
pub(crate) fn writable(address: u64, length: u32) -> Descriptor {
    Descriptor {
        flags: WRITE,
        ..readable(address, length)
    }
}

/// A queue.
#[derive(Clone, Debug)]
pub(crate) struct Ring {
    /// Which of its device.
    pub(crate) number: u16,
    /// Entries.
    pub(crate) size: u16,
    /// Which place in memory it has.
    place: u16,
    /// Addresses that the device is told.
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
    /// A table for indirect descriptors.
    pub(crate) table: u64,
    /// The available index.
    pub(crate) offered: u16,
    /// The used index up to which answers were taken.
    taken: u16,
}

impl Ring {
    /// An empty queue, in the place of its number.
    pub(crate) fn new(number: u16, size: u16) -> Ring {
        Ring::placed(number, number, size)
    }

    /// An empty queue in a place that no other has.
    pub(crate) fn placed(place: u16, number: u16, size: u16) -> Ring {
        let base = QUEUES + u64::from(place) * QUEUE_BYTES;
        let ring = Ring {
            number,
            size,
            place,
            descriptors: base,
            available: base + AVAILABLE,
            used: base + USED,
            table: base + TABLE,
            offered: 0,
            taken: 0,
        };
        poke::<u32>(ring.available, 0);
        poke::<u32>(ring.used, 0);
        ring
    }

    /// Makes it empty again.
    pub(crate) fn renew(&mut self) {
        *self = Ring::placed(self.place, self.number, self.size);
    }

    /// Writes a descriptor of the queue's own table.
    pub(crate) fn describe(&self, index: u16, descriptor: Descriptor) {
        put(self.descriptors, index, descriptor);
    }

    /// Writes a descriptor of the indirect table.
    pub(crate) fn describe_indirect(&self, index: u16, descriptor: Descriptor) {
        put(self.table, index, descriptor);
    }

    /// Writes a chain from `head` on, in neighbouring descriptors.
    pub(crate) fn chain(&self, head: u16, buffers: &[Descriptor]) {
        let count = buffers.len() as u16;
        for (index, buffer) in (head..).zip(buffers) {
            let last = index + 1 == head + count;
            self.describe(
                index,
                Descriptor {
                    flags: buffer.flags | if last { 0 } else { NEXT },
                    next: index + 1,
                    ..*buffer
                },
            );
        }
    }

    /// Makes a head available.
    pub(crate) fn offer(&mut self, head: u16) {
        self.make_available(self.offered % self.size, head);
        self.offer_up_to(self.offered.wrapping_add(1));
    }

    /// Writes an entry of the available ring, and not its index.
    pub(crate) fn make_available(&self, entry: u16, head: u16) {
        poke(self.available + 4 + 2 * u64::from(entry), head);
    }

    /// Moves the available index, to wherever.
    pub(crate) fn offer_up_to(&mut self, index: u16) {
        self.offered = index;
        poke(self.available + 2, index);
        fence();
    }

    /// Where the driver says behind which used index it wants an interrupt.
    pub(crate) fn used_event(&self) -> u64 {
        self.available + 4 + 2 * u64::from(self.size)
    }

    /// Where the device says behind which available index it wants a notification.
    pub(crate) fn avail_event(&self) -> u64 {
        self.used + 4 + 8 * u64::from(self.size)
    }

    /// The device's used index.
    pub(crate) fn used_index(&self) -> u16 {
        peek(self.used + 2)
    }

    /// Whether there is an answer.
    pub(crate) fn is_answered(&self) -> bool {
        self.used_index() != self.taken
    }

    /// Takes all answers at once, whatever they are, if all that was offered is answered.
    pub(crate) fn take_all(&mut self) -> bool {
        let all = self.used_index() == self.offered;
        if all {
            self.taken = self.offered;
        }
        all
    }

    /// The next answer: head and bytes written.
    pub(crate) fn take(&mut self) -> Option<(u32, u32)> {
        if !self.is_answered() {
            return None;
        }
        let element = self.used + 4 + 8 * u64::from(self.taken % self.size);
        self.taken = self.taken.wrapping_add(1);
        Some((peek(element), peek(element + 4)))
    }
}

fn put(table: u64, index: u16, descriptor: Descriptor) {
    let at = table + 16 * u64::from(index);
    let rest = u64::from(descriptor.length)
        | u64::from(descriptor.flags) << 32
        | u64::from(descriptor.next) << 48;
    poke(at, descriptor.address);
    poke(at + 8, rest);
}
