//! The driver's side of one split virtqueue (virtio 1.2 section 2.7), and a small allocator of guest memory.

use crate::GuestMemory;
use std::collections::HashMap;
use vm_memory::{Bytes, GuestAddress};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// One buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub enum Buffer<'a> {
    /// Bytes for the device to read.
    Readable(&'a [u8]),
    /// Room of so many bytes for the device to write.
    Writable(u32),
}

/// A descriptor as it lies in memory, for chains that no sane driver makes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RawDescriptor {
    /// Guest address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// 1: next, 2: write, 4: indirect.
    pub flags: u16,
    /// Index of the next descriptor.
    pub next: u16,
}

impl RawDescriptor {
    pub(super) fn bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// Descriptors that mostly lie in memory and mostly are a chain.
#[cfg(test)]
pub(crate) fn any_descriptor() -> impl proptest::strategy::Strategy<Value = RawDescriptor> {
    use proptest::prelude::*;
    let addr = prop_oneof![8 => 0x1000u64..0x0100_0000, 1 => any::<u64>()];
    let len = prop_oneof![4 => 0u32..2048, 2 => 0u32..20, 2 => Just(512), 1 => any::<u32>()];
    let flags =
        prop_oneof![3 => Just(NEXT), 3 => Just(NEXT | WRITE), 2 => Just(WRITE), 1 => 0u16..8];
    let next = prop_oneof![8 => 0u16..8, 1 => any::<u16>()];
    (addr, len, flags, next).prop_map(|(addr, len, flags, next)| RawDescriptor {
        addr,
        len,
        flags,
        next,
    })
}

/// A chain that came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Used {
    /// The head that `add` returned.
    pub head: u16,
    /// How many bytes the device says that it wrote.
    pub len: u32,
    /// The bytes written: the first `len` of the chain's writable buffers.
    pub data: Vec<u8>,
}

/// Guest memory given out in powers of two and taken back.
pub(super) struct Allocator {
    next: u64,
    end: u64,
    free: HashMap<u64, Vec<u64>>,
}

impl Allocator {
    pub(super) fn new(start: u64, end: u64) -> Allocator {
        Allocator {
            next: start,
            end,
            free: HashMap::new(),
        }
    }

    pub(super) fn take(&mut self, length: u64) -> u64 {
        let size = length.max(16).next_power_of_two();
        if let Some(address) = self.free.get_mut(&size).and_then(Vec::pop) {
            return address;
        }
        let address = self.next.next_multiple_of(size.min(4096));
        self.next = address + size;
        assert!(self.next <= self.end, "the test's guest memory is full");
        address
    }

    fn give(&mut self, address: u64, length: u64) {
        let size = length.max(16).next_power_of_two();
        self.free.entry(size).or_default().push(address);
    }
}

/// What was allocated for one chain in flight.
#[derive(Default)]
struct Flight {
    /// Descriptors of the ring that it uses.
    slots: Vec<u16>,
    /// Allocations to give back.
    owned: Vec<(u64, u64)>,
    /// Writable buffers, in order.
    writable: Vec<(u64, u32)>,
}

pub(super) struct DriverQueue {
    pub(super) size: u16,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
    free: Vec<u16>,
    flights: HashMap<u16, Flight>,
    next_available: u16,
    last_used: u16,
}

impl DriverQueue {
    pub(super) fn new(memory: &GuestMemory, allocator: &mut Allocator, size: u16) -> DriverQueue {
        let entries = u64::from(size);
        let queue = DriverQueue {
            size,
            descriptors: allocator.take(16 * entries),
            available: allocator.take(6 + 2 * entries),
            used: allocator.take(6 + 8 * entries),
            free: (0..size).rev().collect(),
            flights: HashMap::new(),
            next_available: 0,
            last_used: 0,
        };
        for (address, length) in [
            (queue.descriptors, 16 * entries),
            (queue.available, 6 + 2 * entries),
            (queue.used, 6 + 8 * entries),
        ] {
            let zeros = vec![0; length as usize];
            memory.write_slice(&zeros, GuestAddress(address)).unwrap();
        }
        queue
    }

    /// Writes a chain into the ring or, if `indirect`, into a table of its own, and makes it available.
    pub(super) fn add(
        &mut self,
        memory: &GuestMemory,
        allocator: &mut Allocator,
        buffers: &[Buffer<'_>],
        indirect: bool,
    ) -> u16 {
        let mut flight = Flight::default();
        let mut chain = Vec::new();
        for buffer in buffers {
            let (length, flags) = match buffer {
                Buffer::Readable(bytes) => (bytes.len() as u32, 0),
                Buffer::Writable(length) => (*length, WRITE),
            };
            let addr = allocator.take(u64::from(length));
            flight.owned.push((addr, u64::from(length)));
            match buffer {
                Buffer::Readable(bytes) => memory.write_slice(bytes, GuestAddress(addr)).unwrap(),
                Buffer::Writable(_) => flight.writable.push((addr, length)),
            }
            chain.push(RawDescriptor {
                addr,
                len: length,
                flags,
                next: 0,
            });
        }
        if indirect {
            for (index, descriptor) in (1u16..).zip(&mut chain).take(buffers.len() - 1) {
                descriptor.flags |= NEXT;
                descriptor.next = index;
            }
            let length = 16 * chain.len() as u64;
            let addr = allocator.take(length);
            flight.owned.push((addr, length));
            write_table(memory, addr, &chain);
            chain = vec![RawDescriptor {
                addr,
                len: length as u32,
                flags: INDIRECT,
                next: 0,
            }];
        }
        self.link(memory, chain, flight)
    }

    fn link(
        &mut self,
        memory: &GuestMemory,
        mut chain: Vec<RawDescriptor>,
        mut flight: Flight,
    ) -> u16 {
        flight.slots = chain
            .iter()
            .map(|_| self.free.pop().expect("no free descriptor in the queue"))
            .collect();
        let following = flight.slots.iter().skip(1);
        for (descriptor, next) in chain.iter_mut().zip(following) {
            descriptor.flags |= NEXT;
            descriptor.next = *next;
        }
        for (slot, descriptor) in flight.slots.iter().zip(&chain) {
            self.write_descriptor(memory, *slot, descriptor);
        }
        let head = flight.slots[0];
        self.flights.insert(head, flight);
        self.publish(memory, head);
        head
    }

    pub(super) fn write_descriptor(&self, memory: &GuestMemory, at: u16, raw: &RawDescriptor) {
        let address = self.descriptors + 16 * u64::from(at);
        memory
            .write_slice(&raw.bytes(), GuestAddress(address))
            .unwrap();
    }

    /// Puts `head` into the available ring.
    pub(super) fn publish(&mut self, memory: &GuestMemory, head: u16) {
        let slot = u64::from(self.next_available % self.size);
        memory
            .write_obj(head, GuestAddress(self.available + 4 + 2 * slot))
            .unwrap();
        let index = self.next_available.wrapping_add(1);
        self.set_available_index(memory, index);
    }

    pub(super) fn set_available_index(&mut self, memory: &GuestMemory, index: u16) {
        self.next_available = index;
        memory
            .store(
                index,
                GuestAddress(self.available + 2),
                std::sync::atomic::Ordering::Release,
            )
            .unwrap();
    }

    /// Whether the device wants to be kicked for the chains from `old` on (section 2.7.10.2).
    pub(super) fn wants_kick(&self, memory: &GuestMemory, event_idx: bool) -> bool {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let at = if event_idx {
            self.used + 4 + 8 * u64::from(self.size)
        } else {
            self.used
        };
        let value: u16 = memory.read_obj(GuestAddress(at)).unwrap();
        if event_idx {
            value == self.next_available.wrapping_sub(1)
        } else {
            value & 1 == 0
        }
    }

    pub(super) fn used_index(&self, memory: &GuestMemory) -> u16 {
        memory
            .load(
                GuestAddress(self.used + 2),
                std::sync::atomic::Ordering::Acquire,
            )
            .unwrap()
    }

    /// The next chain that came back.
    pub(super) fn take_used(
        &mut self,
        memory: &GuestMemory,
        allocator: &mut Allocator,
    ) -> Option<Used> {
        if self.used_index(memory) == self.last_used {
            return None;
        }
        let slot = self.used + 4 + 8 * u64::from(self.last_used % self.size);
        let head: u32 = memory.read_obj(GuestAddress(slot)).unwrap();
        let len: u32 = memory.read_obj(GuestAddress(slot + 4)).unwrap();
        self.last_used = self.last_used.wrapping_add(1);
        let event = GuestAddress(self.available + 4 + 2 * u64::from(self.size));
        memory.write_obj(self.last_used, event).unwrap();

        let head = u16::try_from(head).expect("the used ring names no head");
        let flight = self.flights.remove(&head).unwrap_or_default();
        let mut data = Vec::new();
        for (address, length) in flight.writable {
            let left = len as usize - data.len();
            let mut bytes = vec![0; left.min(length as usize)];
            memory
                .read_slice(&mut bytes, GuestAddress(address))
                .unwrap();
            data.extend(bytes);
        }
        for (address, length) in flight.owned {
            allocator.give(address, length);
        }
        self.free.extend(flight.slots);
        Some(Used { head, len, data })
    }
}

pub(super) fn write_table(memory: &GuestMemory, address: u64, table: &[RawDescriptor]) {
    for (at, descriptor) in (address..).step_by(16).zip(table) {
        memory
            .write_slice(&descriptor.bytes(), GuestAddress(at))
            .unwrap();
    }
}
