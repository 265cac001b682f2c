//! The device, and the handle by which the VMM asks the guest to have more or less memory.

use super::plugging::{Backing, Plugging};
use super::request::Extent;
use super::server::Server;
use crate::GuestMemory;
use crate::counters::{Counters, counters};
use crate::event::{EventLoop, Interest};
use crate::state::Foreign;
use crate::virtio::device::{
    Activation, Busy, DeviceData, DeviceError, Listener, RestoreError, VirtioDevice,
};
use crate::virtio::queue::Positions;
use serde::{Deserialize, Serialize};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vm_memory::{GuestMemory as _, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

/// Device type (section 5.15.1).
const DEVICE_TYPE: u16 = 24;
/// Linux has one request under way.
const QUEUE_SIZE: u16 = 16;
/// VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE.
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// The device.
pub struct Mem {
    shared: Arc<Shared>,
    plugging: Arc<Plugging>,
    event_loop: Arc<dyn EventLoop>,
    active: Option<Active>,
}

/// The device, as the VMM holds it. Stays valid after the device is gone. For any thread.
#[derive(Clone)]
pub struct MemHandle(Arc<Shared>);

/// What a memory device knows: plain data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemState {
    /// Bytes that the guest may have plugged.
    requested: u64,
    /// Bytes of a block.
    block_bytes: u64,
    /// Numbers of the blocks that it has plugged, in order.
    plugged: Vec<u32>,
}

/// The memory has no region for blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the guest's memory has no region that can be plugged")]
pub struct NoPluggableRegion;

/// More than the guest may ever have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{asked} bytes of memory to plug: this guest can have {max}")]
pub struct RequestTooLarge {
    /// What was asked for, in bytes.
    pub asked: u64,
    /// The most, in bytes.
    pub max: u64,
}

counters! {
    /// What the device has done.
    MemCounters {
        /// Requests of the driver.
        requests,
        /// Those that were not done: they made no sense, or asked for more than was granted.
        refused,
        /// Times that the host refused to map, unmap or take back a block.
        errors,
    }
}

/// What the device, its server and its handles share.
pub(super) struct Shared {
    pub(super) extent: Extent,
    /// Bytes that the guest may have plugged.
    pub(super) requested: AtomicU64,
    /// Bytes that it has.
    pub(super) plugged: AtomicU64,
    /// The most that it may be granted, in bytes.
    max: u64,
    listener: Listener,
    pub(super) counters: Arc<MemCounters>,
}

/// The device between activation and reset.
struct Active {
    server: Arc<Mutex<Server>>,
    kick: RawFd,
    event_loop: Arc<dyn EventLoop>,
}

impl Mem {
    /// A device for the pluggable region of `memory`, with nothing plugged, that works on `event_loop`. The guest may be granted
    /// `max` bytes at most.
    ///
    /// # Errors
    /// There is no such region.
    pub fn new(
        memory: &GuestMemory,
        max: u64,
        backing: Arc<dyn Backing>,
        event_loop: Arc<dyn EventLoop>,
    ) -> Result<Mem, NoPluggableRegion> {
        let found = memory
            .iter()
            .find_map(|region| Some((region, region.blocks()?)));
        let (region, blocks) = found.ok_or(NoPluggableRegion)?;
        let extent = Extent {
            start: region.start_addr().0,
            count: blocks.count().min(u64::from(u32::MAX)),
            block_bytes: blocks.block_bytes(),
        };
        let shared = Arc::new(Shared {
            extent,
            requested: AtomicU64::new(0),
            plugged: AtomicU64::new(0),
            max: max.min(extent.bytes()),
            listener: Listener::default(),
            counters: Arc::default(),
        });
        let plugging = Plugging::new(Arc::clone(memory), backing, Arc::clone(&shared));
        Ok(Mem {
            shared,
            plugging: Arc::new(plugging),
            event_loop,
            active: None,
        })
    }

    /// What the VMM keeps.
    pub fn handle(&self) -> MemHandle {
        MemHandle(Arc::clone(&self.shared))
    }
}

impl MemHandle {
    /// Asks the guest to have `bytes` plugged, rounded down to whole blocks: to plug some, or to unplug what it has more. It takes its
    /// time, may find that it can spare less, and without a driver does nothing. What it plugs is never more.
    ///
    /// # Errors
    /// It can never have as much.
    pub fn request(&self, bytes: u64) -> Result<(), RequestTooLarge> {
        let max = self.0.max;
        if bytes > max {
            return Err(RequestTooLarge { asked: bytes, max });
        }
        let whole = bytes - bytes % self.0.extent.block_bytes;
        self.0.requested.store(whole, Ordering::Relaxed);
        self.0.listener.config_changed();
        Ok(())
    }

    /// What the guest was asked to have, in bytes.
    pub fn requested(&self) -> u64 {
        self.0.requested.load(Ordering::Relaxed)
    }

    /// What it has plugged, in bytes. More than was requested while it unplugs.
    pub fn plugged(&self) -> u64 {
        self.0.plugged.load(Ordering::Relaxed)
    }

    #[cfg(test)]
    pub(super) fn counters(&self) -> &MemCounters {
        &self.0.counters
    }
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        UNPLUGGED_INACCESSIBLE
    }

    /// `struct virtio_mem_config` (section 5.15.4). All of the region is usable at any time.
    fn config(&self) -> Vec<u8> {
        let extent = self.shared.extent;
        let fields = [
            extent.block_bytes,
            0, // node and padding: VIRTIO_MEM_F_ACPI_PXM is not offered
            extent.start,
            extent.bytes(),
            extent.bytes(),
            self.shared.plugged.load(Ordering::Relaxed),
            self.shared.requested.load(Ordering::Relaxed),
        ];
        fields
            .iter()
            .flat_map(|field| field.to_le_bytes())
            .collect()
    }

    fn counters(&self) -> Arc<dyn Counters> {
        self.shared.counters.clone()
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let queue = activation.queues.into_iter().next().flatten();
        let queue = queue.ok_or(DeviceError::QueueMissing(0))?;
        let kick = queue.kick.as_raw_fd();
        let interrupt = activation.interrupt;
        let server = Arc::new(Mutex::new(Server::new(
            activation.memory,
            interrupt.clone(),
            queue,
            Arc::clone(&self.plugging),
            Arc::clone(&self.shared),
        )));
        self.event_loop
            .watch(kick, Interest::KICK, 0, server.clone())
            .map_err(|cause| DeviceError::Io {
                what: "watch the queue of the memory device",
                cause,
            })?;
        self.active = Some(Active {
            server,
            kick,
            event_loop: self.event_loop.clone(),
        });
        self.shared.listener.set(Some(interrupt));
        Ok(())
    }

    fn suspend(&mut self, idle: &Arc<EventFd>) -> Result<Positions, Busy> {
        let positions = match &self.active {
            Some(active) => active.server().hold(idle)?,
            None => Positions::new(),
        };
        self.shared.listener.set(None);
        self.active = None;
        Ok(positions)
    }

    fn keep_on(&mut self) {
        if let Some(active) = &self.active {
            active.server().keep_on();
        }
    }

    fn data(&self) -> DeviceData {
        DeviceData::Mem(MemState {
            requested: self.shared.requested.load(Ordering::Relaxed),
            block_bytes: self.shared.extent.block_bytes,
            plugged: self.plugging.plugged(),
        })
    }

    fn restore(&mut self, data: &DeviceData) -> Result<(), RestoreError> {
        let DeviceData::Mem(state) = data else {
            return Err(Foreign("kind").into());
        };
        let Extent {
            block_bytes, count, ..
        } = self.shared.extent;
        let in_order = state.plugged.is_sorted_by(|a, b| a < b);
        let plugged = state.plugged.len() as u64 * block_bytes;
        let granted = plugged <= self.shared.max;
        let there = state
            .plugged
            .last()
            .is_none_or(|last| u64::from(*last) < count);
        let fits = state.requested <= self.shared.max && state.requested % block_bytes == 0;
        if state.block_bytes != block_bytes || !in_order || !there || !granted || !fits {
            return Err(Foreign("blocks").into());
        }
        self.shared
            .requested
            .store(state.requested, Ordering::Relaxed);
        let plugged = self.plugging.restore(&state.plugged);
        plugged.map_err(RestoreError::Memory)
    }

    /// What is plugged stays so (section 5.15.5): the next driver finds it in the configuration.
    fn reset(&mut self) -> Result<(), DeviceError> {
        self.shared.listener.set(None);
        self.active = None;
        Ok(())
    }
}

impl Active {
    fn server(&self) -> MutexGuard<'_, Server> {
        self.server.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.event_loop.forget(self.kick);
        // Waits for what is being served; after it nothing touches guest memory.
        self.server().stop();
    }
}
