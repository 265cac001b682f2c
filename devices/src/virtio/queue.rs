//! One live split virtqueue (virtio 1.2 section 2.7), as a device sees it.
//!
//! Wraps [`virtio_queue::Queue`]; the wrapper bounds the work done for one kick by the queue's size (the
//! driver may refill while the device works), keeps the notification rules of EVENT_IDX in one place, and
//! opens chains by [`super::chain`].
//!
//! `virtio_queue` reads and writes the rings by itself. It is given none before each part was found to be one slice of memory.

// The one place where it is used.
#![allow(clippy::disallowed_types)]

use super::chain::{BadChain, Buffers, Table};
use super::device::Interrupt;
use crate::memory::{self, GuestMemory, NotMemory};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_AVAIL_F_NO_INTERRUPT,
};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::state::QueueSettings;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A chain of descriptors that the driver made available, not yet looked at; [`ActiveQueue::open`] does.
pub type Chain = DescriptorChain<GuestMemory>;

/// The driver broke the ring itself: its indices or addresses make no sense. The device asks for a reset.
#[derive(Debug, thiserror::Error)]
#[error("virtqueue {index} is broken")]
pub struct BrokenQueue {
    /// Which queue of the device.
    pub index: u16,
    /// What the ring code found.
    #[source]
    pub cause: virtio_queue::Error,
}

/// What the driver set for a queue cannot be one. The transport asks for a reset instead of activating.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadSettings {
    /// Size 0, no power of two or above the maximum.
    #[error("queue size {0} is not a power of two up to the maximum")]
    Size(u16),
    /// A part of the ring is at 0, misaligned, or not within one region of memory.
    #[error("{part} at {address:#x} is misaligned or not in memory")]
    Part {
        /// Which part.
        part: &'static str,
        /// Where the driver put it.
        address: u64,
    },
    /// Two parts of the ring share bytes.
    #[error("parts of the queue overlap")]
    Overlap,
}

/// A queue cannot be served on: [`ActiveQueue::serve`].
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The ring itself is broken.
    #[error(transparent)]
    Ring(#[from] BrokenQueue),
    /// A chain is none.
    #[error("virtqueue {index} has a bad chain")]
    Chain {
        /// Which queue of the device.
        index: u16,
        /// What is wrong with it.
        #[source]
        cause: BadChain,
    },
}

/// The driver broke a queue, in whatever way: for devices that have nothing to tell of it but that they need a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Broken;

impl From<BrokenQueue> for Broken {
    fn from(_: BrokenQueue) -> Broken {
        Broken
    }
}

impl From<BadChain> for Broken {
    fn from(_: BadChain) -> Broken {
        Broken
    }
}

/// Where a device stands in the rings of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueuePosition {
    /// Index in the available ring of the chain to take next.
    pub next_available: u16,
    /// Index in the used ring of the chain to give back next.
    pub next_used: u16,
}

/// Where a device stands in its queues, by their numbers. One that is not enabled, or that the driver broke, is missing.
pub type Positions = BTreeMap<u16, QueuePosition>;

/// Where the device stands in these queues.
pub(crate) fn positions<'q>(queues: impl IntoIterator<Item = &'q ActiveQueue>) -> Positions {
    let queues = queues.into_iter();
    queues
        .map(|queue| (queue.index, queue.position()))
        .collect()
}

/// An address as `virtio_queue` takes it, of a part of a ring that was found to be one slice of memory.
#[allow(clippy::disallowed_methods)] // not to reach memory by it here
fn checked(address: u64) -> GuestAddress {
    GuestAddress(address)
}

/// A queue between DRIVER_OK and reset.
pub struct ActiveQueue {
    /// Which queue of the device it is.
    pub index: u16,
    /// Signalled by the driver's notification, in the kernel where there is one (ioeventfd).
    pub kick: Arc<EventFd>,
    queue: Queue,
    indirect: bool,
    event_idx: bool,
    /// Where the used ring stood when the driver was last told, or had no wish to be.
    told: u16,
}

impl ActiveQueue {
    /// A queue with the settings that the driver made, each part of it checked as one whole slice of
    /// memory. `features` are the agreed ones.
    ///
    /// # Errors
    /// The settings cannot be those of a queue.
    pub fn new(
        index: u16,
        settings: &QueueSettings,
        features: u64,
        memory: &GuestMemory,
        kick: Arc<EventFd>,
    ) -> Result<ActiveQueue, BadSettings> {
        let size = settings.size;
        let bad_size = |_| BadSettings::Size(size);
        let mut queue = Queue::new(settings.max_size).map_err(bad_size)?;
        queue.try_set_size(size).map_err(bad_size)?;
        let entries = u64::from(size);
        // Lengths and alignments of section 2.7.
        let parts = [
            ("descriptor table", settings.descriptors, 16 * entries, 16),
            ("available ring", settings.available, 6 + 2 * entries, 2),
            ("used ring", settings.used, 6 + 8 * entries, 4),
        ];
        for (part, address, length, alignment) in parts {
            let inside = memory::slice_of(memory, address, length as usize).is_ok();
            if address == 0 || address % alignment != 0 || !inside {
                return Err(BadSettings::Part { part, address });
            }
        }
        // All ends are inside memory, so no sum wraps.
        let apart = |(_, a, a_length, _): &(_, u64, u64, _),
                     (_, b, b_length, _): &(_, u64, u64, _)| {
            a + a_length <= *b || b + b_length <= *a
        };
        let [descriptors, available, used] = &parts;
        if !(apart(descriptors, available) && apart(available, used) && apart(descriptors, used)) {
            return Err(BadSettings::Overlap);
        }
        let misaligned = |_| BadSettings::Part {
            part: "ring",
            address: settings.descriptors,
        };
        queue
            .try_set_desc_table_address(checked(settings.descriptors))
            .and_then(|()| queue.try_set_avail_ring_address(checked(settings.available)))
            .and_then(|()| queue.try_set_used_ring_address(checked(settings.used)))
            .map_err(misaligned)?;
        let event_idx = features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        Ok(ActiveQueue {
            index,
            kick,
            queue,
            indirect: features & (1 << VIRTIO_RING_F_INDIRECT_DESC) != 0,
            event_idx,
            told: 0,
        })
    }

    /// The queue's size in descriptors, which also bounds the chains served for one kick.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Where the device stands.
    pub fn position(&self) -> QueuePosition {
        QueuePosition {
            next_available: self.queue.next_avail(),
            next_used: self.queue.next_used(),
        }
    }

    /// Goes on from `position`, of which the driver was told all that was used. One that cannot be breaks the queue when it is served.
    pub fn go_on_at(&mut self, position: QueuePosition) {
        self.queue.set_next_avail(position.next_available);
        self.queue.set_next_used(position.next_used);
        self.told = position.next_used;
    }

    /// The next available chain, if there is one.
    ///
    /// # Errors
    /// The available ring makes no sense: the index jumped by more than the queue's size, there are more chains than the queue has
    /// descriptors that are not in flight, or the address is outside memory.
    pub fn pop(&mut self, memory: &GuestMemory) -> Result<Option<Chain>, BrokenQueue> {
        let position = self.position();
        let in_flight = position.next_available.wrapping_sub(position.next_used);
        let full = in_flight >= self.size();
        let next = self.queue.iter(memory.clone());
        let next = next.map(|mut chains| chains.next());
        match next.map_err(|cause| self.broken(cause))? {
            Some(_) if full => {
                self.undo_pop();
                Err(self.broken(virtio_queue::Error::InvalidAvailRingIndex))
            }
            next => Ok(next),
        }
    }

    /// Walks a chain that [`ActiveQueue::pop`] gave and checks all of it: the way from a chain to its bytes.
    ///
    /// # Errors
    /// It is no chain; the device asks for a reset.
    pub fn open<'m>(
        &self,
        memory: &'m GuestMemory,
        chain: &Chain,
    ) -> Result<Buffers<'m>, BadChain> {
        let table = Table {
            address: self.queue.desc_table(),
            size: self.queue.size(),
            indirect: self.indirect,
        };
        Buffers::walk(memory, table, chain.head_index())
    }

    /// Serves what is available: `each` answers a chain and returns how many bytes it wrote. At most as many
    /// chains as the queue is long; if the driver refills it meanwhile, the queue kicks itself, so that
    /// others on the same thread get their turn. Sends the interrupt that the driver wants.
    ///
    /// For devices that answer each chain at once.
    ///
    /// # Errors
    /// The driver broke the ring or a chain; the device asks for a reset and serves this queue no more.
    pub fn serve(
        &mut self,
        memory: &GuestMemory,
        interrupt: &dyn Interrupt,
        each: impl FnMut(Buffers<'_>) -> u32,
    ) -> Result<(), ServeError> {
        self.serve_up_to(self.size(), memory, interrupt, each)
    }

    /// The same with at most `most` chains a kick, where one costs much.
    ///
    /// # Errors
    /// As [`ActiveQueue::serve`].
    pub fn serve_up_to(
        &mut self,
        most: u16,
        memory: &GuestMemory,
        interrupt: &dyn Interrupt,
        mut each: impl FnMut(Buffers<'_>) -> u32,
    ) -> Result<(), ServeError> {
        let mut served = 0;
        let mut left = most;
        self.disable_kicks(memory)?;
        loop {
            while left > 0 {
                let Some(chain) = self.pop(memory)? else {
                    break;
                };
                let buffers = self
                    .open(memory, &chain)
                    .map_err(|cause| ServeError::Chain {
                        index: self.index,
                        cause,
                    })?;
                let written = each(buffers);
                self.push_used(memory, chain.head_index(), written)?;
                served += 1;
                left -= 1;
            }
            if left == 0 {
                // Fails only when the counter is full, and then the fd is readable anyway.
                let _ = self.kick.write(1);
                break;
            }
            if !self.enable_kicks(memory)? {
                break;
            }
        }
        if served > 0 && self.needs_notification(memory)? {
            interrupt.used(self.index);
        }
        Ok(())
    }

    /// Gives back the chain popped last, unread.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Hands a chain back to the driver with `len` bytes written.
    ///
    /// # Errors
    /// The used ring cannot be written.
    pub fn push_used(
        &mut self,
        memory: &GuestMemory,
        head: u16,
        len: u32,
    ) -> Result<(), BrokenQueue> {
        self.queue
            .add_used(&**memory, head, len)
            .map_err(|cause| self.broken(cause))
    }

    /// Hands several chains back at once, each with its bytes written: the driver sees all of them or none, as it must the
    /// buffers of one packet (section 5.1.6.4). No more than the queue is long.
    ///
    /// # Errors
    /// The used ring cannot be written.
    pub fn push_used_together(
        &mut self,
        memory: &GuestMemory,
        chains: &[(u16, u32)],
    ) -> Result<(), BrokenQueue> {
        let Some((last, before)) = chains.split_last() else {
            return Ok(());
        };
        // The driver looks no further than the index, which moves with the last one.
        let first = self.queue.next_used();
        let mut next = first;
        for (head, bytes) in before {
            // `struct virtq_used_elem`: the head, the bytes.
            let element = u64::from(*head) | u64::from(*bytes) << 32;
            memory::write(memory, self.used_element(next), &element.to_le_bytes())
                .map_err(|cause| self.unmapped(cause))?;
            next = next.wrapping_add(1);
        }
        self.queue.set_next_used(next);
        let (head, bytes) = *last;
        self.push_used(memory, head, bytes)
    }

    /// Where in the used ring the element with this index is.
    fn used_element(&self, index: u16) -> u64 {
        let place = u64::from(index % self.queue.size());
        // Inside the ring, which `new` has found to be in memory.
        self.queue.used_ring() + 4 + 8 * place
    }

    /// Whether the driver wants an interrupt for what was pushed since the last question (section 2.7.7.2).
    ///
    /// # Errors
    /// The ring's event fields cannot be read.
    pub fn needs_notification(&mut self, memory: &GuestMemory) -> Result<bool, BrokenQueue> {
        let (old, new) = (self.told, self.queue.next_used());
        self.told = new;
        // What was pushed is there before the driver is asked.
        fence(Ordering::SeqCst);
        let field = |offset| {
            let field = memory::load(memory, self.queue.avail_ring() + offset);
            field.map_err(|cause| self.unmapped(cause))
        };
        if !self.event_idx {
            let flags = field(0)?;
            return Ok(old != new && flags & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0);
        }
        let event = field(4 + 2 * u64::from(self.queue.size()))?;
        Ok(needs_event(event, old, new))
    }

    /// Asks for kicks again; true if chains arrived meanwhile, and the device must look once more.
    ///
    /// # Errors
    /// The ring's event fields cannot be written.
    pub fn enable_kicks(&mut self, memory: &GuestMemory) -> Result<bool, BrokenQueue> {
        self.queue
            .enable_notification(&**memory)
            .map_err(|cause| self.broken(cause))
    }

    /// Tells the driver to spare its kicks while the device is working anyway.
    ///
    /// # Errors
    /// The ring's event fields cannot be written.
    pub fn disable_kicks(&mut self, memory: &GuestMemory) -> Result<(), BrokenQueue> {
        self.queue
            .disable_notification(&**memory)
            .map_err(|cause| self.broken(cause))
    }

    /// A part of the ring is memory no more: its block was unplugged.
    fn unmapped(&self, cause: NotMemory) -> BrokenQueue {
        self.broken(virtio_queue::Error::GuestMemory(cause.into()))
    }

    fn broken(&self, cause: virtio_queue::Error) -> BrokenQueue {
        BrokenQueue {
            index: self.index,
            cause,
        }
    }
}

/// Whether the index on its way from `old` to `new` passed the one that its reader wants to hear of (`vring_need_event`, appendix A).
fn needs_event(event: u16, old: u16, new: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
#[path = "queue_proofs.rs"]
mod proofs;
