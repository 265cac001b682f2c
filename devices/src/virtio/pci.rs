//! Virtio over PCI (virtio 1.2 section 4.1), modern only: one function, one BAR, MSI-X.
//!
//! Owns what all devices have alike and lets a device see only agreed features and checked queues. The BAR:
//!
//! | offset | what                          | section   |
//! |--------|-------------------------------|-----------|
//! | 0x0000 | common configuration          | 4.1.4.3   |
//! | 0x1000 | ISR status                    | 4.1.4.5   |
//! | 0x2000 | device configuration          | 4.1.4.6   |
//! | 0x3000 | notifications, 4 bytes a queue | 4.1.4.4  |
//! | 0x4000 | MSI-X table                   | PCI 6.8.2 |
//! | 0x5000 | MSI-X pending bits            | PCI 6.8.2 |
//!
//! Every access of any width and offset is defined: what is nothing reads as zero inside the BAR, as all ones
//! while the BAR does not decode, and swallows writes. The guest may move or disable the BAR, which cuts it
//! off itself (see [`crate::pci::ConfigSpace`]); its notifications still arrive, because KVM delivers
//! them by the address that was registered, and do nothing that a notification would not do.
//!
//! Locks: `core` (the device and configuration space), then the leaf lock of `signal`. A device is called
//! with `core` held, so activations and resets never overlap.

use super::device::{Activation, DeviceError, VirtioDevice};
use super::queue::ActiveQueue;
use super::signal::Shared;
use super::state::{DeviceState, Effect, status};
use crate::GuestMemory;
use crate::bus::BusDevice;
use crate::counters::Counters;
use crate::pci::msix::{self, MsiRoutes, Msix};
use crate::pci::{CONFIG_BYTES, ConfigSpace, LayoutError, PciFunction};
use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Length of the one BAR in bytes; the VMM aligns it to this.
pub const BAR_BYTES: u32 = 0x8000;
/// Which BAR it is.
pub const BAR: u8 = 0;
/// Most queues of one device: what fits into the notification page and beside the configuration vector.
pub const QUEUES_MAX: usize = msix::VECTORS_MAX as usize - 1;
/// Bytes between the notification addresses of two queues.
pub const NOTIFY_OFF_MULTIPLIER: u32 = 4;
/// Features that the transport brings, whatever the device.
pub const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

mod gone;
mod layout;
mod suspend;

use gone::Gone;
use layout::lay_out;
use suspend::Standing;
pub use suspend::{TransportState, VirtioState};

const RETIRE_TRIES: u32 = 1000;
const PAGE: u64 = 0x1000;
const COMMON_PAGE: u64 = 0;
const ISR_PAGE: u64 = 1;
const CONFIG_PAGE: u64 = 2;
const NOTIFY_PAGE: u64 = 3;
const TABLE_PAGE: u64 = 4;
const PENDING_PAGE: u64 = 5;

// Offsets in struct virtio_pci_cap and virtio_pci_cfg_cap.
const CAP_BAR: u8 = 4;
const CAP_OFFSET: usize = 8;
const CAP_LENGTH: usize = 12;
const CAP_DATA: u8 = 16;

/// Why a transport cannot be made; a defect of the device or a host without fds.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// Too many queues, a size that is none, or other kicks than queues.
    #[error("virtio device type {device} has queues that no transport can offer")]
    Queues {
        /// Device type.
        device: u16,
    },
    /// No eventfd for a queue.
    #[error("cannot make an eventfd for the queues of virtio device type {device}")]
    Kick {
        /// Device type.
        device: u16,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// The configuration space has no place.
    #[error("virtio device type {device} cannot be laid out")]
    Layout {
        /// Device type.
        device: u16,
        /// What has no place.
        #[source]
        cause: LayoutError,
    },
}

/// A notification address for the VMM to register as an ioeventfd (any length, no datamatch), so that a
/// kick does not leave the kernel.
#[derive(Clone)]
pub struct NotifyAddress {
    /// Guest-physical address.
    pub address: u64,
    /// Signalled when the guest writes there; the same for the life of the device.
    pub kick: Arc<EventFd>,
}

/// Where the BAR is, and whether by a register or for good (see [`ConfigSpace::add_fixed`]). Below 4 GiB and aligned to
/// [`BAR_BYTES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarAddress {
    /// Of a function that is there when the guest starts.
    InRegister(u64),
    /// Of one that comes later.
    Fixed(u64),
}

impl BarAddress {
    /// The guest-physical address.
    pub fn address(self) -> u64 {
        match self {
            BarAddress::InRegister(address) | BarAddress::Fixed(address) => address,
        }
    }
}

/// The driver has not let go of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the guest still uses the device, or it could not be reset; its agent has to let go of it first"
)]
pub struct InUse;

struct Core {
    device: Box<dyn VirtioDevice>,
    /// Why the device could last not be activated or reset.
    failure: Option<DeviceError>,
    /// Where it stands while it is suspended.
    standing: Option<Standing>,
}

/// One virtio device on the bus: a [`PciFunction`], and on the MMIO bus the [`BusDevice`] of its BAR.
pub struct VirtioPci {
    address: u64,
    memory: GuestMemory,
    shared: Arc<Shared>,
    kicks: Vec<Arc<EventFd>>,
    msix_control: u8,
    window: u8,
    name: &'static str,
    counters: Arc<dyn Counters>,
    /// The device was asked to stand still. Set while no vCPU runs, so that `resume` waits for none.
    asked: AtomicBool,
    core: Mutex<Core>,
    /// Never held over what a device does: who looks at configuration space may be the one that a reset waits for. Taken after `core`
    /// and before what is `shared`.
    config: Mutex<ConfigSpace>,
}

impl VirtioPci {
    /// Puts `device` behind a BAR at `bar`. `name` is for counters, for instance `virtio-rng`.
    ///
    /// # Errors
    /// See [`TransportError`].
    pub fn new(
        name: &'static str,
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        routes: Arc<dyn MsiRoutes>,
        bar: BarAddress,
    ) -> Result<VirtioPci, TransportError> {
        let kind = device.device_type();
        let sizes = device.queue_sizes();
        let size_legal = |size: &u16| size.is_power_of_two() && *size <= 1 << 15;
        if sizes.len() > QUEUES_MAX || !sizes.iter().all(size_legal) {
            return Err(TransportError::Queues { device: kind });
        }
        let made = || {
            let event = |_| EventFd::new(EFD_NONBLOCK | libc::EFD_CLOEXEC).map(Arc::new);
            sizes.iter().map(event).collect::<io::Result<Vec<_>>>()
        };
        let kicks = device
            .kicks()
            .map_or_else(made, Ok)
            .map_err(|cause| TransportError::Kick {
                device: kind,
                cause,
            })?;
        if kicks.len() != sizes.len() {
            return Err(TransportError::Queues { device: kind });
        }
        // One vector a queue and one for the configuration.
        let vectors = sizes.len() as u16 + 1;
        let msix = Msix::new(vectors, routes);
        let state = DeviceState::new(device.features() | TRANSPORT_FEATURES, sizes, vectors);
        let layout = lay_out(&*device, &msix, bar).map_err(|cause| TransportError::Layout {
            device: kind,
            cause,
        })?;
        Ok(VirtioPci {
            address: bar.address(),
            memory,
            shared: Shared::new(state, msix),
            kicks,
            msix_control: layout.msix_control,
            window: layout.window,
            name,
            counters: device.counters(),
            asked: AtomicBool::new(false),
            core: Mutex::new(Core {
                device,
                failure: None,
                standing: None,
            }),
            config: Mutex::new(layout.config),
        })
    }

    /// The BAR's guest-physical address; its length is [`BAR_BYTES`].
    pub fn address(&self) -> u64 {
        self.address
    }

    /// MSI-X vectors that the function has.
    pub fn vectors(&self) -> u16 {
        self.shared.lock().msix.vectors()
    }

    /// Where each queue is kicked, in the order of the queues.
    pub fn notify_addresses(&self) -> Vec<NotifyAddress> {
        (0u64..)
            .zip(&self.kicks)
            .map(|(queue, kick)| NotifyAddress {
                address: self.address
                    + NOTIFY_PAGE * PAGE
                    + queue * u64::from(NOTIFY_OFF_MULTIPLIER),
                kick: Arc::clone(kick),
            })
            .collect()
    }

    /// Takes the reason for which the device could last not be activated or reset, to be reported. `None` also while a vCPU is
    /// at it: a reset may wait for the thread that asks.
    pub fn take_failure(&self) -> Option<DeviceError> {
        let mut core = match self.core.try_lock() {
            Ok(core) => core,
            Err(TryLockError::Poisoned(core)) => core.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        core.failure.take()
    }

    /// Whether a driver works with the device.
    pub fn in_use(&self) -> bool {
        self.shared.lock().state.live()
    }

    /// Whether the driver has to reset the device before it works again, or cannot even do that.
    pub fn broken(&self) -> bool {
        let status = self.shared.lock().state.status();
        status & (status::NEEDS_RESET | status::FAILED) != 0
    }

    /// What the device counts.
    pub fn counters(&self) -> &dyn Counters {
        &*self.counters
    }

    /// Takes the device out, to be dropped by the caller; whoever still holds the transport finds one that nobody can activate.
    ///
    /// # Errors
    /// A driver works with it, or is just about to.
    pub fn retire(&self) -> Result<Box<dyn VirtioDevice>, InUse> {
        // A vCPU that looks at a register has the lock for a moment; one that resets may wait for the thread that asks.
        for _ in 0..RETIRE_TRIES {
            let mut core = match self.core.try_lock() {
                _ if self.in_use() => return Err(InUse),
                Ok(core) => core,
                Err(TryLockError::Poisoned(core)) => core.into_inner(),
                Err(TryLockError::WouldBlock) => {
                    std::thread::yield_now();
                    continue;
                }
            };
            return Ok(std::mem::replace(&mut core.device, Box::new(Gone)));
        }
        Err(InUse)
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the BAR; all of `data` is inside it.
    fn read_bar(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let (page, at) = (offset / PAGE, offset % PAGE);
        match page {
            COMMON_PAGE => self.shared.lock().state.read_common(at, data),
            ISR_PAGE if at == 0 => {
                if let Some(first) = data.first_mut() {
                    *first = self.shared.lock().state.take_isr();
                }
            }
            CONFIG_PAGE => {
                let config = self.core().device.config();
                let bytes = config.iter().skip(at as usize);
                for (to, from) in data.iter_mut().zip(bytes) {
                    *to = *from;
                }
            }
            TABLE_PAGE => self.shared.lock().msix.read_table(at, data),
            PENDING_PAGE => self.shared.lock().msix.read_pending(at, data),
            _ => {}
        }
    }

    /// Writes the BAR; all of `data` is inside it.
    fn write_bar(&self, offset: u64, data: &[u8]) {
        let (page, at) = (offset / PAGE, offset % PAGE);
        match page {
            COMMON_PAGE => self.write_common(at, data),
            // Inside the page, so it fits.
            CONFIG_PAGE => self.core().device.write_config(at as usize, data),
            NOTIFY_PAGE => self.notify(at),
            TABLE_PAGE => self.shared.lock().msix.write_table(at, data),
            _ => {}
        }
    }

    /// A kick that KVM did not take (no ioeventfd there, or through configuration space). What is written
    /// is the queue's number (section 4.1.4.4.2); the address already says it.
    fn notify(&self, at: u64) {
        let queue = usize::try_from(at / u64::from(NOTIFY_OFF_MULTIPLIER));
        if let Some(kick) = queue.ok().and_then(|queue| self.kicks.get(queue)) {
            // Fails only when the counter is full, and then the fd is readable anyway.
            let _ = kick.write(1);
        }
    }

    fn write_common(&self, at: u64, data: &[u8]) {
        // Held over the whole effect: another vCPU that resets meanwhile waits.
        let mut core = self.core();
        let effect = self.shared.lock().state.write_common(at, data);
        match effect {
            Effect::None => {}
            Effect::Activate => {
                if let Err(error) = self.activate(&mut core) {
                    core.failure = Some(error);
                    self.shared.lock().needs_reset();
                }
            }
            Effect::Reset { active } => self.reset(&mut core, active),
        }
    }

    fn activate(&self, core: &mut Core) -> Result<(), DeviceError> {
        let activation = self.activation(|_, _| true)?;
        core.device.activate(activation)
    }

    /// What an activation brings: of the queues that the driver enabled those that `ready` makes so.
    fn activation(
        &self,
        ready: impl Fn(u16, &mut ActiveQueue) -> bool,
    ) -> Result<Activation, DeviceError> {
        let (features, settings) = {
            let inner = self.shared.lock();
            (inner.state.features(), inner.state.queues().to_vec())
        };
        let mut queues = Vec::with_capacity(settings.len());
        for ((index, settings), kick) in (0u16..).zip(&settings).zip(&self.kicks) {
            let queue = if settings.enabled {
                let kick = Arc::clone(kick);
                let queue = ActiveQueue::new(index, settings, features, &self.memory, kick)
                    .map_err(|cause| DeviceError::Queue { index, cause })?;
                Some(queue)
            } else {
                None
            };
            queues.push(queue.and_then(|mut queue| ready(index, &mut queue).then_some(queue)));
        }
        Ok(Activation {
            memory: Arc::clone(&self.memory),
            features,
            queues,
            interrupt: self.shared.arm(),
        })
    }

    fn reset(&self, core: &mut Core, active: bool) {
        // A device whose activation failed is reset too: it may have half begun.
        let result = if active { core.device.reset() } else { Ok(()) };
        core.standing = None;
        self.shared.disarm();
        self.shared.lock().state.finish_reset(result.is_ok());
        core.failure = result.err();
    }

    /// An access through the window of section 4.1.4.9, if configuration space asks for one.
    fn windowed(&self, config: &ConfigSpace) -> Option<(u64, usize)> {
        let at = usize::from(self.window);
        let bar = config.dword(at + usize::from(CAP_BAR)) as u8;
        let offset = config.dword(at + CAP_OFFSET);
        let length = config.dword(at + CAP_LENGTH);
        let legal = bar == BAR && matches!(length, 1 | 2 | 4) && offset % length == 0;
        (legal && offset < BAR_BYTES).then_some((u64::from(offset), length as usize))
    }

    fn touches_window(&self, offset: u8, width: usize) -> bool {
        let first = usize::from(self.window) + usize::from(CAP_DATA);
        let at = usize::from(offset);
        at < first + 4 && first < at + width
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        let core = self.core.get_mut().unwrap_or_else(PoisonError::into_inner);
        self.shared.disarm();
        if self.shared.lock().state.live() {
            // Nobody is left to be told that it failed.
            let _ = core.device.reset();
        }
    }
}

impl PciFunction for VirtioPci {
    fn config_read(&self, offset: u8, data: &mut [u8]) {
        let window = self
            .touches_window(offset, data.len())
            .then(|| self.windowed(&self.config()))
            .flatten();
        if let Some((at, length)) = window {
            let mut bytes = [0; 4];
            if let Some(bytes) = bytes.get_mut(..length) {
                self.read_bar(at, bytes);
            }
            self.config().write(self.window + CAP_DATA, &bytes);
        }
        self.config().read(offset, data);
    }

    fn config_space(&self) -> [u8; CONFIG_BYTES] {
        self.config().bytes()
    }

    fn config_write(&self, offset: u8, data: &[u8]) {
        let mut config = self.config();
        config.write(offset, data);
        let mut control = [0];
        config.read(self.msix_control, &mut control);
        let at = usize::from(offset);
        if (at..at + data.len()).contains(&usize::from(self.msix_control)) {
            let [control] = control;
            self.shared.lock().msix.set_control(control);
        }
        if !self.touches_window(offset, data.len()) {
            return;
        }
        if let Some((at, length)) = self.windowed(&config) {
            let mut bytes = [0; 4];
            config.read(self.window + CAP_DATA, &mut bytes);
            drop(config);
            if let Some(bytes) = bytes.get(..length) {
                self.write_bar(at, bytes);
            }
        }
    }
}

impl BusDevice for VirtioPci {
    fn name(&self) -> &'static str {
        self.name
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if self.config().decodes(usize::from(BAR)) {
            self.read_bar(offset, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if self.config().decodes(usize::from(BAR)) {
            self.write_bar(offset, data);
        }
    }
}

#[cfg(test)]
#[path = "pci_tests.rs"]
mod tests;
