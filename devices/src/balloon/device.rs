//! The balloon device, and the handle by which the VMM asks for pages.

use super::pages::PAGE_BYTES;
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
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use vm_memory::{GuestMemory as _, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

/// Device type (section 5.5.1).
const DEVICE_TYPE: u16 = 5;
/// Sizes of the inflate, deflate, statistics, free page and reporting queue. Linux has one chain under way in each, and gives up without
/// room for 32 ranges in that of reporting (PAGE_REPORTING_CAPACITY).
///
/// Section 5.5.2 numbers them so, also where some are not agreed on. Linux up to 6.12 leaves no gaps between those that are
/// (`vp_find_vqs_msix`): its reporting queue is then the third.
const QUEUE_SIZES: [u16; 5] = [16, 16, 32, 32, 32];
/// How many of them every balloon has.
pub(super) const PFN_QUEUES: usize = 2;

/// VIRTIO_BALLOON_F_DEFLATE_ON_OOM.
const DEFLATE_ON_OOM: u64 = 1 << 2;
/// VIRTIO_BALLOON_F_PAGE_REPORTING.
pub(super) const PAGE_REPORTING: u64 = 1 << 5;

/// Where in `struct virtio_balloon_config` the driver writes how many pages it gave.
const ACTUAL: usize = 4;

/// The balloon.
pub struct Balloon {
    shared: Arc<Shared>,
    event_loop: Arc<dyn EventLoop>,
    active: Option<Active>,
}

/// The balloon, as the VMM holds it. Stays valid after the device is gone. For any thread.
#[derive(Clone)]
pub struct BalloonHandle(Arc<Shared>);

/// What a balloon knows: plain data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonState {
    /// Pages of 4 KiB that the guest was asked for.
    target: u32,
    /// Pages of 4 KiB that the driver says it gave.
    actual: u32,
}

/// More pages than the guest has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a balloon of {asked} pages: the guest has only {max}")]
pub struct TargetTooLarge {
    /// What was asked for, in pages of 4 KiB.
    pub asked: u32,
    /// All memory of the guest, in pages of 4 KiB.
    pub max: u32,
}

counters! {
    /// What a balloon has done. Nothing of it ever becomes less.
    BalloonCounters {
        /// Chains of free pages that the guest reported.
        reports,
        /// Bytes of them that were given back.
        reported_bytes,
        /// Bytes given back because the guest put them into the balloon.
        inflated_bytes,
        /// Bytes that the guest named and that stayed: not memory, or more than one chain may name.
        refused_bytes,
        /// Times that the host refused to take pages back.
        errors,
    }
}

/// What the device, its server and its handles share.
pub(super) struct Shared {
    /// Pages that the VMM asks for.
    target: AtomicU32,
    /// Pages that the driver says it gave.
    actual: AtomicU32,
    /// All pages of the guest.
    max: u32,
    listener: Listener,
    pub(super) counters: Arc<BalloonCounters>,
}

/// A balloon between activation and reset.
struct Active {
    server: Arc<Mutex<Server>>,
    watched: Vec<RawFd>,
    event_loop: Arc<dyn EventLoop>,
}

impl Balloon {
    /// An empty balloon for this memory that works on `event_loop`.
    pub fn new(memory: &GuestMemory, event_loop: Arc<dyn EventLoop>) -> Balloon {
        let bytes: u64 = memory.iter().map(GuestMemoryRegion::len).sum();
        Balloon {
            shared: Arc::new(Shared {
                target: AtomicU32::new(0),
                actual: AtomicU32::new(0),
                max: u32::try_from(bytes / PAGE_BYTES).unwrap_or(u32::MAX),
                listener: Listener::default(),
                counters: Arc::default(),
            }),
            event_loop,
            active: None,
        }
    }

    /// What the VMM keeps.
    pub fn handle(&self) -> BalloonHandle {
        BalloonHandle(Arc::clone(&self.shared))
    }
}

impl BalloonHandle {
    /// Asks the guest for `pages` pages of 4 KiB in all, fewer than now to let it have some back. The guest takes its time, and a guest
    /// without a driver does nothing.
    ///
    /// # Errors
    /// It has not as many.
    pub fn set_target(&self, pages: u32) -> Result<(), TargetTooLarge> {
        let max = self.0.max;
        if pages > max {
            return Err(TargetTooLarge { asked: pages, max });
        }
        self.0.target.store(pages, Ordering::Relaxed);
        self.0.listener.config_changed();
        Ok(())
    }

    /// What the guest was asked for, in pages of 4 KiB.
    pub fn target(&self) -> u32 {
        self.0.target.load(Ordering::Relaxed)
    }

    /// What the guest says that it gave, in pages of 4 KiB; never more than it has.
    pub fn actual(&self) -> u32 {
        self.0.actual.load(Ordering::Relaxed).min(self.0.max)
    }

    #[cfg(test)]
    pub(super) fn counters(&self) -> &BalloonCounters {
        &self.0.counters
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        DEFLATE_ON_OOM | PAGE_REPORTING
    }

    /// `struct virtio_balloon_config` (section 5.5.4) up to `actual`.
    fn config(&self) -> Vec<u8> {
        let mut config = self
            .shared
            .target
            .load(Ordering::Relaxed)
            .to_le_bytes()
            .to_vec();
        config.extend_from_slice(&self.shared.actual.load(Ordering::Relaxed).to_le_bytes());
        config
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let mut actual = self.shared.actual.load(Ordering::Relaxed).to_le_bytes();
        for (at, byte) in (offset..).zip(data) {
            if let Some(to) = at.checked_sub(ACTUAL).and_then(|at| actual.get_mut(at)) {
                *to = *byte;
            }
        }
        self.shared
            .actual
            .store(u32::from_le_bytes(actual), Ordering::Relaxed);
    }

    fn counters(&self) -> Arc<dyn Counters> {
        self.shared.counters.clone()
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let mut queues = activation.queues.into_iter();
        let mut pfns = Vec::with_capacity(PFN_QUEUES);
        for index in 0..PFN_QUEUES as u16 {
            let queue = queues.next().flatten();
            pfns.push(queue.ok_or(DeviceError::QueueMissing(index))?);
        }
        let reporting = match activation.features & PAGE_REPORTING {
            0 => None,
            // The only other one there is, wherever the driver put it.
            _ => queues.flatten().next(),
        };
        let interrupt = activation.interrupt;
        let server = Server::new(
            activation.memory,
            interrupt.clone(),
            self.shared.clone(),
            pfns,
            reporting,
        );
        let watched = server.kicks();
        // From here on a reset has something to undo, also if this fails half-way.
        let active = self.active.insert(Active {
            server: Arc::new(Mutex::new(server)),
            watched: Vec::with_capacity(watched.len()),
            event_loop: self.event_loop.clone(),
        });
        for (token, kick) in watched {
            let fd = kick.as_raw_fd();
            self.event_loop
                .watch(fd, Interest::KICK, token, active.server.clone())
                .map_err(|cause| DeviceError::Io {
                    what: "watch the queues of the balloon",
                    cause,
                })?;
            active.watched.push(fd);
        }
        self.shared.listener.set(Some(interrupt));
        Ok(())
    }

    fn suspend(&mut self, _: &Arc<EventFd>) -> Result<Positions, Busy> {
        self.shared.listener.set(None);
        let active = self.active.take();
        Ok(active.map(|active| active.positions()).unwrap_or_default())
    }

    fn data(&self) -> DeviceData {
        DeviceData::Balloon(BalloonState {
            target: self.shared.target.load(Ordering::Relaxed),
            actual: self.shared.actual.load(Ordering::Relaxed),
        })
    }

    fn restore(&mut self, data: &DeviceData) -> Result<(), RestoreError> {
        match data {
            DeviceData::Balloon(state) if state.target <= self.shared.max => {
                self.shared.target.store(state.target, Ordering::Relaxed);
                self.shared.actual.store(state.actual, Ordering::Relaxed);
                Ok(())
            }
            _ => Err(Foreign("balloon").into()),
        }
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        self.shared.listener.set(None);
        // A driver that begins anew has all its pages (section 5.5.5).
        self.shared.actual.store(0, Ordering::Relaxed);
        self.active = None;
        Ok(())
    }
}

impl Active {
    fn positions(&self) -> Positions {
        let server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        server.positions()
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        for fd in &self.watched {
            self.event_loop.forget(*fd);
        }
        // Waits for what is being served; after it nothing touches guest memory.
        let mut server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        server.stop();
    }
}
