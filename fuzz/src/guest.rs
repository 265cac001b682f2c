//! A hostile guest with one device, on one thread: it plays a program of [`Act`]s over the real transport and looks after each
//! turn of the device at what that did to its memory.
//!
//! What has to hold, whatever it does: the device changes only its used rings and what the driver lent it for writing, and
//! nothing at all after a reset; queues behave as [`Ring`] says; the event loop falls silent. A driver that lets buffers lie over
//! rings makes the device write what it reads next; from there to its reset only its liveness is looked at.

use crate::program::{Act, shape};
use crate::ring::{DESCRIPTOR_BYTES, INDIRECT, LENT, Memory, NEXT, Ring, WRITE, lend, meet};
use capsid_devices::GuestMemory;
use capsid_devices::event::Poller;
use capsid_devices::memory::{slice_of, write};
use capsid_devices::testing::{Driver, Region, memory};
use capsid_devices::virtio::device::VirtioDevice;
use capsid_devices::virtio::pci::{BAR_BYTES, VirtioState};
use capsid_devices::virtio::state::status;
use std::sync::Arc;
use std::time::Duration;

/// Memory in two regions, so that a buffer can lie across both, which no device may take.
const REGIONS: [(u64, usize); 2] = [(0, 0x1_0000), (0x1_0000, 0x4000)];
const MEMORY_BYTES: usize = 0x1_4000;
/// Where the rings are that a driver sets up, each in so many bytes.
const RINGS_START: u64 = 0x1000;
const RING_BYTES: u64 = 0x800;
const QUEUES_MAX: u16 = 6;
/// Offsets in there, enough for [`SIZE_LOG_MAX`].
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x500;
const SIZE_LOG_MAX: u8 = 6;
/// Where the buffers of chains are.
const ARENA: std::ops::Range<u64> = 0x4000..0x1_0000;
/// The longest of them in bytes.
const BUFFER_MAX_BYTES: u64 = 0x4000;
/// Most buffers of a chain that are read.
const PIECES_MAX: usize = 64;
/// Most bytes of a chain that are read, and the pieces that [`shape::PIECES`] asks for.
const READABLE_MAX_BYTES: usize = 0x4000;
const PIECE_BYTES: usize = 16;
/// What is compared at once.
const PAGE_BYTES: usize = 0x400;
/// More turns than this until the loop falls silent are a spin.
const TURNS_MAX: usize = 1000;
/// Most steps of a program.
pub(crate) const ACTS_MAX: usize = 256;

/// The driver's side of a queue.
#[derive(Clone, Copy, Default)]
struct Side {
    size: u16,
    available: u64,
    table: u64,
    slot: u16,
    index: u16,
}

/// See the module text.
pub(crate) struct Guest {
    driver: Driver,
    poller: Arc<Poller>,
    memory: GuestMemory,
    /// The memory as it was when the driver looked last.
    known: Vec<u8>,
    /// Room to look again.
    now: Vec<u8>,
    /// What the device may do was not looked at since the memory changed.
    changed: bool,
    sides: [Side; QUEUES_MAX as usize],
    /// Where the next buffer goes.
    arena: u64,
    /// The live queues.
    rings: Vec<Ring>,
    /// Which bytes were lent for writing since the device went live, each as [`LENT`].
    lent: Vec<u8>,
    /// The driver lets the device write what it will read.
    muddled: bool,
}

impl Guest {
    pub(crate) fn new(device: Box<dyn VirtioDevice>, poller: Arc<Poller>) -> Guest {
        let memory = memory(&REGIONS);
        Guest {
            driver: Driver::with_memory(device, memory.clone()),
            poller,
            memory,
            known: vec![0; MEMORY_BYTES],
            now: vec![0; MEMORY_BYTES],
            changed: false,
            sides: Default::default(),
            arena: ARENA.start,
            rings: Vec::new(),
            lent: vec![0; MEMORY_BYTES],
            muddled: false,
        }
    }

    /// Plays one step; those of the target's own are not for here.
    pub(crate) fn play(&mut self, act: &Act) {
        match act {
            Act::Chain {
                queue,
                shape,
                readable,
                writable,
            } => self.chain(*queue, *shape, readable, writable),
            Act::Descriptor {
                queue,
                slot,
                address,
                length,
                flags,
                next,
            } => self.descriptor(*queue, (*slot).into(), (*address, *length), (*flags, *next)),
            Act::Poke { address, bytes } => self.poke(*address, bytes),
            Act::Publish { queue, head } => self.publish(*queue, *head, true),
            Act::Index { queue, index } => self.index(*queue, *index),
            Act::Events {
                queue,
                flags,
                event,
            } => {
                let side = self.side(*queue);
                self.poke(side.available, &flags.to_le_bytes());
                let at = side.available + 4 + 2 * u64::from(side.size);
                self.poke(at, &event.to_le_bytes());
            }
            Act::Kick(queue) => self.driver.kick(u16::from(*queue) % QUEUES_MAX),
            Act::Turn => {
                self.turn();
            }
            Act::Settle => self.settle(),
            Act::Pause => self.pause(|| {}),
            Act::Own { .. } => {}
            _ => self.touch(act),
        }
    }

    /// A step that is about registers alone.
    fn touch(&mut self, act: &Act) {
        let width_of = |width: &u8| 1 << (width % 4);
        match act {
            Act::Up {
                features,
                queues,
                size_log,
            } => self.up(*features, *queues, *size_log),
            Act::Status(value) => self.driver.set_status(*value),
            Act::Common {
                offset,
                width,
                value,
            } => {
                let (common, offset) = (self.driver.common, u64::from(*offset % 0x40));
                self.driver.write(common, offset, width_of(width), *value);
            }
            Act::Bar {
                offset,
                width,
                value,
            } => {
                let (bar, width) = (Region::default(), width_of(width));
                let offset = u64::from(*offset) % u64::from(BAR_BYTES);
                self.driver.write(bar, offset, width, *value);
                self.driver.read(bar, offset, width);
            }
            Act::Pci {
                offset,
                width,
                value,
            } => {
                let width = 1 << (width % 3);
                self.driver.write_config(*offset, width, u64::from(*value));
                self.driver.read_config(*offset, width);
            }
            Act::Reset => self.driver.set_status(0),
            _ => {}
        }
        self.follow();
    }

    /// The host has the device stand still, looks at its state as another process would, and lets it go on. `work` is what the
    /// host does that the device may wait for; it goes on at once where that is not enough.
    pub(crate) fn pause(&mut self, work: impl FnOnce()) {
        let transport = self.driver.transport.clone();
        self.offer();
        if self.driver.suspend().is_err() {
            work();
            self.settle();
            self.offer();
            if self.driver.suspend().is_err() {
                return transport.resume();
            }
        }
        if !transport.is_suspended() {
            return transport.resume();
        }
        // What it ended with that.
        self.look();
        let state = transport.state().expect("it stands still");
        let written = serde_json::to_vec(&state).expect("plain data");
        let read: VirtioState = serde_json::from_slice(&written).expect("what was written");
        assert_eq!(state, read);
        let rings = std::mem::take(&mut self.rings);
        let lent = std::mem::replace(&mut self.lent, vec![0; MEMORY_BYTES]);
        let muddled = std::mem::take(&mut self.muddled);
        self.settle();
        (self.rings, self.lent, self.muddled) = (rings, lent, muddled);
        self.changed = true;
        self.offer();
        transport.resume();
        self.look();
    }

    /// The end of every program: a driver that goes, after which nothing of the device may touch its memory.
    pub(crate) fn leave(&mut self) {
        self.settle();
        self.driver.decode();
        self.play(&Act::Reset);
        self.settle();
    }

    /// What the device may begin to work on by now, if that changed: what it reads as far as `most` bytes, and how much that is in all. `None`: it may
    /// have changed that itself.
    pub(crate) fn offered(&mut self, most: usize) -> Option<Vec<(Vec<u8>, u64)>> {
        if !self.changed && !self.muddled {
            // All that was said the last time.
            return Some(Vec::new());
        }
        self.offer();
        if self.muddled {
            return None;
        }
        let memory = Memory(&self.known);
        let mut offered = Vec::new();
        for ring in &self.rings {
            for head in ring.offered(memory) {
                let (mut read, mut reads) = (Vec::new(), 0);
                let chain = ring.chain(memory, head);
                for buffer in chain.iter().filter(|buffer| buffer.flags & WRITE == 0) {
                    let length = u64::from(buffer.length);
                    reads += length;
                    let start = buffer.address as usize;
                    let end = start.saturating_add((most - read.len()).min(length as usize));
                    read.extend_from_slice(self.known.get(start..end).unwrap_or_default());
                }
                offered.push((read, reads));
            }
        }
        Some(offered)
    }

    fn up(&mut self, features: u64, queues: u32, size_log: u8) {
        let fresh = self.rings.is_empty();
        let driver = &self.driver;
        let common = driver.common;
        driver.set_status(status::ACKNOWLEDGE);
        driver.set_status(status::ACKNOWLEDGE | status::DRIVER);
        let features = driver.offered() & features;
        for select in 0..2 {
            driver.write(common, 8, 4, select);
            driver.write(common, 0x0c, 4, features >> (32 * select) & 0xffff_ffff);
        }
        driver.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
        for queue in 0..QUEUES_MAX.min(driver.queue_count()) {
            if queues & 1 << queue != 0 {
                self.set_up(queue, size_log, fresh);
            }
        }
        self.driver.write(common, 0x10, 2, 0);
        self.driver.set_status(0x0f);
    }

    fn set_up(&mut self, queue: u16, size_log: u8, fresh: bool) {
        let table = RINGS_START + u64::from(queue) * RING_BYTES;
        let size = (1 << (size_log % (SIZE_LOG_MAX + 1))).min(self.driver.queue_max(queue));
        let available = table + AVAILABLE;
        if fresh {
            self.poke(table, &[0; RING_BYTES as usize]);
        }
        let common = self.driver.common;
        let settings = [
            (0x18, 2, u64::from(size)),
            (0x1a, 2, u64::from(queue) + 1),
            (0x20, 8, table),
            (0x28, 8, available),
            (0x30, 8, table + USED),
            (0x1c, 2, 1),
        ];
        for (offset, width, value) in settings {
            self.driver.write(common, offset, width, value);
        }
        if let Some(side) = self.sides.get_mut(usize::from(queue)) {
            *side = Side {
                size: size.max(1),
                available,
                table,
                slot: 0,
                index: 0,
            };
        }
    }

    /// The driver's side of a queue, of which there may be none.
    fn side(&self, queue: u8) -> Side {
        let queue = usize::from(u16::from(queue) % QUEUES_MAX);
        let side = self.sides.get(queue).copied().unwrap_or_default();
        Side {
            size: side.size.max(1),
            ..side
        }
    }

    fn change(&mut self, queue: u8, change: impl FnOnce(&mut Side)) {
        let queue = usize::from(u16::from(queue) % QUEUES_MAX);
        if let Some(side) = self.sides.get_mut(queue) {
            change(side);
        }
    }

    /// Room for a buffer, in one piece.
    fn room(&mut self, length: u64) -> u64 {
        if self.arena + length > ARENA.end {
            self.arena = ARENA.start;
        }
        let at = self.arena;
        self.arena = (at + length).next_multiple_of(16);
        at
    }

    fn chain(&mut self, queue: u8, shape: u8, readable: &[u8], writable: &[u16]) {
        let side = self.side(queue);
        let readable = readable
            .get(..READABLE_MAX_BYTES.min(readable.len()))
            .unwrap_or_default();
        let piece = match shape & shape::PIECES {
            0 => readable.len().max(1),
            _ => PIECE_BYTES.max(readable.len() / PIECES_MAX + 1),
        };
        let mut buffers = Vec::new();
        for bytes in readable.chunks(piece) {
            let at = self.room(bytes.len() as u64);
            self.poke(at, bytes);
            buffers.push((at, bytes.len() as u32, 0));
        }
        for length in writable {
            let length = u64::from(*length).min(BUFFER_MAX_BYTES);
            buffers.push((self.room(length), length as u32, WRITE));
        }
        let count = buffers.len();
        let indirect = shape & shape::INDIRECT != 0;
        let table = indirect.then(|| self.room(DESCRIPTOR_BYTES * count as u64));
        let slot = |number: usize| side.slot.wrapping_add(number as u16) % side.size;
        for (number, (address, length, write)) in buffers.into_iter().enumerate() {
            let next = if number + 1 < count { NEXT } else { 0 };
            match table {
                Some(table) => {
                    let at = table + DESCRIPTOR_BYTES * number as u64;
                    let following = number as u16 + 1;
                    self.poke(at, &bytes_of(address, length, write | next, following));
                }
                None => self.descriptor(
                    queue,
                    slot(number),
                    (address, length),
                    (write | next, slot(number + 1)),
                ),
            }
        }
        let taken = match table {
            Some(table) => {
                let length = (DESCRIPTOR_BYTES * count as u64) as u32;
                self.descriptor(queue, slot(0), (table, length), (INDIRECT, 0));
                1
            }
            None => count as u16,
        };
        self.change(queue, |side| side.slot = side.slot.wrapping_add(taken));
        self.publish(queue, slot(0), shape & shape::UNPUBLISHED == 0);
        if shape & shape::KICK != 0 {
            self.driver.kick(u16::from(queue) % QUEUES_MAX);
        }
    }

    fn descriptor(
        &mut self,
        queue: u8,
        slot: u16,
        (address, length): (u64, u32),
        (flags, next): (u16, u16),
    ) {
        let side = self.side(queue);
        let at = side.table + DESCRIPTOR_BYTES * u64::from(slot % side.size);
        self.poke(at, &bytes_of(address, length, flags, next));
    }

    fn publish(&mut self, queue: u8, head: u16, told: bool) {
        let side = self.side(queue);
        let slot = u64::from(side.index % side.size);
        self.poke(side.available + 4 + 2 * slot, &head.to_le_bytes());
        let next = side.index.wrapping_add(1);
        match told {
            true => self.index(queue, next),
            false => self.change(queue, |side| side.index = next),
        }
    }

    fn index(&mut self, queue: u8, index: u16) {
        self.change(queue, |side| side.index = index);
        let at = self.side(queue).available + 2;
        self.poke(at, &index.to_le_bytes());
    }

    /// The driver writes its memory, as far as it has some there.
    fn poke(&mut self, address: u64, bytes: &[u8]) {
        let start = usize::try_from(address).unwrap_or(usize::MAX);
        let Some(known) = start
            .checked_add(bytes.len())
            .and_then(|end| self.known.get_mut(start..end))
        else {
            return;
        };
        known.copy_from_slice(bytes);
        // By its regions: none of the devices' ways to memory goes across two.
        for (first, length) in REGIONS {
            let from = address.max(first);
            let to = (first + length as u64).min(address + bytes.len() as u64);
            if from < to {
                let part = &bytes[(from - address) as usize..(to - address) as usize];
                write(&self.memory, from, part).expect("it is in memory");
            }
        }
        self.changed = true;
        // What the device has written there is lost.
        let range = (address, bytes.len() as u64);
        self.muddled |= self.rings.iter().any(|ring| meet(range, ring.used_ring()));
    }

    /// Notices that the device went live, or is not any more.
    fn follow(&mut self) {
        let state = self.driver.transport.transport_state().device;
        let live = state.status() & status::DRIVER_OK != 0;
        if live && self.rings.is_empty() {
            let queues = (0..).zip(state.queues());
            self.rings = queues
                .filter(|(_, settings)| settings.enabled && settings.size > 0)
                .map(|(index, settings)| Ring::new(index, settings))
                .collect();
            let memory = Memory(&self.known);
            self.muddled = self.rings.iter().any(|ring| memory.u16(ring.used + 2) != 0);
            self.changed = true;
        } else if !live && !self.rings.is_empty() {
            self.rings.clear();
            self.lent.fill(0);
            self.muddled = false;
        }
    }

    /// One turn of the loop; how many were called.
    pub(crate) fn turn(&mut self) -> usize {
        self.offer();
        let called = self.poller.turn(Some(Duration::ZERO)).expect("a turn");
        if called > 0 {
            self.look();
        }
        called
    }

    pub(crate) fn settle(&mut self) {
        for _ in 0..TURNS_MAX {
            if self.turn() == 0 {
                return;
            }
        }
        panic!("the loop spins");
    }

    /// Before a turn: what the device may write, and take.
    pub(crate) fn offer(&mut self) {
        if !std::mem::take(&mut self.changed) || self.muddled {
            return;
        }
        let memory = Memory(&self.known);
        let mut tables = Vec::new();
        for ring in &mut self.rings {
            tables.push((ring.descriptors, u64::from(ring.size)));
            ring.offer(memory);
        }
        let mut nested = Vec::new();
        for table in tables {
            lend(memory, table, Some(&mut nested), &mut self.lent);
        }
        for table in &nested {
            lend(memory, *table, None, &mut self.lent);
        }
        let is_lent = |(start, length): (u64, u64)| {
            let start = usize::try_from(start).unwrap_or(usize::MAX);
            let end = start.saturating_add(length as usize).min(self.lent.len());
            let bytes = self.lent.get(start..end);
            bytes.is_some_and(|bytes| bytes.contains(&LENT))
        };
        let used: Vec<_> = self.rings.iter().map(Ring::used_ring).collect();
        let mut parts: Vec<_> = self.rings.iter().flat_map(Ring::parts).collect();
        let tables = nested
            .iter()
            .map(|(at, count)| (*at, DESCRIPTOR_BYTES * count));
        parts.extend(tables);
        self.muddled |= parts.iter().any(|part| is_lent(*part));
        // A used ring meets itself.
        self.muddled |= used
            .iter()
            .any(|used| parts.iter().filter(|part| meet(*used, **part)).count() > 1);
    }

    /// After a turn: what the device did.
    pub(crate) fn look(&mut self) {
        for (first, length) in REGIONS {
            let region = slice_of(&self.memory, first, length).expect("it is memory");
            let start = first as usize;
            region.copy_to(&mut self.now[start..start + length]);
        }
        if self.now == self.known {
            return;
        }
        if !self.muddled {
            self.compare();
            for ring in &mut self.rings {
                ring.returned(Memory(&self.now));
            }
        }
        std::mem::swap(&mut self.known, &mut self.now);
        self.changed = true;
    }

    fn compare(&self) {
        let used: Vec<_> = self.rings.iter().map(Ring::used_ring).collect();
        let pages = self
            .known
            .chunks(PAGE_BYTES)
            .zip(self.now.chunks(PAGE_BYTES));
        for (page, (was, is)) in pages.enumerate().filter(|(_, (was, is))| was != is) {
            for (offset, (was, is)) in was.iter().zip(is).enumerate() {
                let at = page * PAGE_BYTES + offset;
                let allowed =
                    || self.lent[at] == LENT || used.iter().any(|ring| meet((at as u64, 1), *ring));
                assert!(
                    was == is || allowed(),
                    "the device wrote at {at:#x}, which it was not lent"
                );
            }
        }
    }
}

fn bytes_of(address: u64, length: u32, flags: u16, next: u16) -> Vec<u8> {
    let mut bytes = address.to_le_bytes().to_vec();
    bytes.extend(length.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(next.to_le_bytes());
    bytes
}

#[cfg(test)]
#[path = "guest_tests.rs"]
mod tests;
