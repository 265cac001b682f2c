//! One live split virtqueue (virtio 1.2 section 2.7), as a device sees it.
//!
//! Wraps [`virtio_queue::Queue`]; the wrapper bounds the work done for one kick by the queue's size (the
//! driver may refill while the device works) and keeps the notification rules of EVENT_IDX in one place.

use crate::GuestMemory;
use std::sync::Arc;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::EventFd;

/// A chain of descriptors that the driver made available.
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

/// A queue between DRIVER_OK and reset.
pub struct ActiveQueue {
    /// Which queue of the device it is.
    pub index: u16,
    /// Signalled by the driver's notification, in the kernel where there is one (ioeventfd).
    pub kick: Arc<EventFd>,
    queue: Queue,
}

impl ActiveQueue {
    /// A queue as the transport validated and froze it.
    pub fn new(index: u16, queue: Queue, kick: Arc<EventFd>) -> ActiveQueue {
        ActiveQueue { index, kick, queue }
    }

    /// The queue's size in descriptors, which also bounds the chains served for one kick.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The next available chain, if there is one.
    ///
    /// # Errors
    /// The available ring makes no sense (index jumped by more than the queue's size, address outside
    /// memory).
    pub fn pop(&mut self, memory: &GuestMemory) -> Result<Option<Chain>, BrokenQueue> {
        match self.queue.iter(memory.clone()) {
            Ok(mut chains) => Ok(chains.next()),
            Err(cause) => Err(self.broken(cause)),
        }
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

    /// Whether the driver wants an interrupt for what was pushed since the last question.
    ///
    /// # Errors
    /// The ring's event fields cannot be read.
    pub fn needs_notification(&mut self, memory: &GuestMemory) -> Result<bool, BrokenQueue> {
        self.queue
            .needs_notification(&**memory)
            .map_err(|cause| self.broken(cause))
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

    fn broken(&self, cause: virtio_queue::Error) -> BrokenQueue {
        BrokenQueue {
            index: self.index,
            cause,
        }
    }
}
