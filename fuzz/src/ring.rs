//! What a hostile driver may expect of a live queue: nothing comes back that it did not lend, nothing twice, and no more bytes
//! than it lent room for (virtio 1.2 section 2.7).
//!
//! The driver's memory changes between any two turns of the device, so what is expected is the most that some device could
//! have seen; of an honest driver that is exactly what it did.

use capsid_devices::virtio::state::QueueSettings;
use std::collections::{HashMap, HashSet};

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;
/// Bytes of a descriptor.
pub(crate) const DESCRIPTOR_BYTES: u64 = 16;

/// Of a byte that the device may write.
pub(crate) const LENT: u8 = 1;

/// The driver's memory as it was when the device was called last.
#[derive(Clone, Copy)]
pub(crate) struct Memory<'a>(pub(crate) &'a [u8]);

/// A descriptor as it lies in memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor {
    pub(crate) address: u64,
    pub(crate) length: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

impl Memory<'_> {
    fn array<const N: usize>(self, address: u64) -> Option<[u8; N]> {
        let start = usize::try_from(address).ok()?;
        let bytes = self.0.get(start..start.checked_add(N)?)?;
        bytes.try_into().ok()
    }

    pub(crate) fn u16(self, address: u64) -> u16 {
        self.array(address).map_or(0, u16::from_le_bytes)
    }

    fn u32(self, address: u64) -> u32 {
        self.array(address).map_or(0, u32::from_le_bytes)
    }

    pub(crate) fn descriptor(self, address: u64) -> Option<Descriptor> {
        let bytes: [u8; DESCRIPTOR_BYTES as usize] = self.array(address)?;
        let [
            a0,
            a1,
            a2,
            a3,
            a4,
            a5,
            a6,
            a7,
            l0,
            l1,
            l2,
            l3,
            f0,
            f1,
            n0,
            n1,
        ] = bytes;
        Some(Descriptor {
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            length: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        })
    }
}

/// One head.
#[derive(Clone, Copy, Debug, Default)]
struct Head {
    /// How often it could have been taken.
    lent: u32,
    /// How often it came back.
    returned: u32,
    /// The most room that its chain had, in bytes.
    room: u64,
}

/// A live queue.
pub(crate) struct Ring {
    pub(crate) index: u16,
    pub(crate) size: u16,
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
    /// How many entries of the available ring the device can have taken.
    taken: u32,
    /// How many it has given back.
    returned: u32,
    heads: HashMap<u16, Head>,
    /// Entries of the available ring that were counted.
    seen: HashSet<(u32, u16)>,
}

impl Ring {
    /// A queue as the driver set it, from DRIVER_OK on.
    pub(crate) fn new(index: u16, settings: &QueueSettings) -> Ring {
        Ring {
            index,
            size: settings.size,
            descriptors: settings.descriptors,
            available: settings.available,
            used: settings.used,
            taken: 0,
            returned: 0,
            heads: HashMap::new(),
            seen: HashSet::new(),
        }
    }

    /// Where its parts are, first address and length: descriptors, available ring, used ring.
    pub(crate) fn parts(&self) -> [(u64, u64); 3] {
        let entries = u64::from(self.size);
        [
            (self.descriptors, DESCRIPTOR_BYTES * entries),
            (self.available, 6 + 2 * entries),
            (self.used, 6 + 8 * entries),
        ]
    }

    pub(crate) fn used_ring(&self) -> (u64, u64) {
        let [_, _, used] = self.parts();
        used
    }

    /// Looks at what the device may take in its next turn.
    pub(crate) fn offer(&mut self, memory: Memory<'_>) {
        let ahead = memory
            .u16(self.available + 2)
            .wrapping_sub(self.taken as u16);
        // A larger jump breaks the queue.
        if ahead <= self.size {
            self.taken += u32::from(ahead);
        }
        for (entry, head) in self.window(memory) {
            let room = self
                .chain(memory, head)
                .iter()
                .filter(|buffer| buffer.flags & WRITE != 0)
                .map(|buffer| u64::from(buffer.length))
                .sum();
            let known = self.heads.entry(head).or_default();
            known.room = known.room.max(room);
            if self.seen.insert((entry, head)) {
                known.lent += 1;
            }
        }
    }

    /// The entries of the available ring that the device may look at, and their heads.
    fn window(&self, memory: Memory<'_>) -> Vec<(u32, u16)> {
        let first = self.taken.saturating_sub(self.size.into());
        let head = |entry: u32| {
            let slot = u64::from(entry % u32::from(self.size));
            (entry, memory.u16(self.available + 4 + 2 * slot))
        };
        (first..self.taken).map(head).collect()
    }

    /// The heads that the device may begin to work on.
    pub(crate) fn offered(&self, memory: Memory<'_>) -> Vec<u16> {
        let window = self.window(memory);
        window.into_iter().map(|(_, head)| head).collect()
    }

    /// The buffers of a chain, as far as it is one.
    pub(crate) fn chain(&self, memory: Memory<'_>, head: u16) -> Vec<Descriptor> {
        let mut buffers = Vec::new();
        let (mut base, mut entries) = (self.descriptors, u32::from(self.size));
        let (mut index, mut nested) = (head, false);
        while buffers.len() < usize::from(self.size) && u32::from(index) < entries {
            let address = base.checked_add(DESCRIPTOR_BYTES * u64::from(index));
            let Some(descriptor) = address.and_then(|address| memory.descriptor(address)) else {
                break;
            };
            if descriptor.flags & INDIRECT != 0 {
                if std::mem::replace(&mut nested, true) {
                    break;
                }
                (base, entries) = (descriptor.address, descriptor.length / 16);
                index = 0;
                continue;
            }
            buffers.push(descriptor);
            if descriptor.flags & NEXT == 0 {
                break;
            }
            index = descriptor.next;
        }
        buffers
    }

    /// Looks at what came back in a turn, of which the driver's memory is `memory` afterwards.
    ///
    /// # Panics
    /// Something that the driver did not lend.
    pub(crate) fn returned(&mut self, memory: Memory<'_>) {
        let now = memory.u16(self.used + 2);
        let count = u32::from(now.wrapping_sub(self.returned as u16));
        let queue = self.index;
        assert!(
            self.returned + count <= self.taken,
            "queue {queue}: {now} is used, ahead of what is available"
        );
        for entry in self.returned..self.returned + count {
            // The older ones are written over.
            if self.returned + count - entry > u32::from(self.size) {
                continue;
            }
            let slot = self.used + 4 + 8 * u64::from(entry % u32::from(self.size));
            let (id, length) = (memory.u32(slot), memory.u32(slot + 4));
            let head = u16::try_from(id)
                .ok()
                .and_then(|head| self.heads.get_mut(&head));
            let Some(head) = head else {
                panic!("queue {queue}: {id} came back, which was never lent");
            };
            head.returned += 1;
            assert!(
                head.returned <= head.lent,
                "queue {queue}: {id} came back twice"
            );
            assert!(
                u64::from(length) <= head.room,
                "queue {queue}: {length} bytes in room for {}",
                head.room
            );
        }
        self.returned += count;
    }
}

/// Whether two ranges of first address and length share a byte.
pub(crate) fn meet((a, a_length): (u64, u64), (b, b_length): (u64, u64)) -> bool {
    a < b.saturating_add(b_length) && b < a.saturating_add(a_length)
}

/// Notes what a table lends for writing; indirect tables that it names go to `nested`, where there may be some.
pub(crate) fn lend(
    memory: Memory<'_>,
    (base, count): (u64, u64),
    mut nested: Option<&mut Vec<(u64, u64)>>,
    lent: &mut [u8],
) {
    for index in 0..count {
        let at = base.saturating_add(DESCRIPTOR_BYTES * index);
        let Some(descriptor) = memory.descriptor(at) else {
            return;
        };
        let length = u64::from(descriptor.length);
        if descriptor.flags & INDIRECT != 0 {
            if let Some(nested) = &mut nested {
                nested.push((descriptor.address, length / DESCRIPTOR_BYTES));
            }
        } else if descriptor.flags & WRITE != 0 {
            let start = usize::try_from(descriptor.address).unwrap_or(usize::MAX);
            let end = start.saturating_add(length as usize);
            // One that ends beyond memory is none.
            if let Some(bytes) = lent.get_mut(start..end) {
                bytes.fill(LENT);
            }
        }
    }
}
