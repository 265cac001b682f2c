//! The contract between the virtio transport and a device.
//!
//! The transport (virtio-pci) owns everything that is alike for all devices: feature negotiation, the
//! status machine, queue settings (frozen from DRIVER_OK until a completed reset) and MSI-X. A device is
//! constants, a configuration space, and what it does with live queues between
//! [`VirtioDevice::activate`] and [`VirtioDevice::reset`].
//!
//! Every byte a device reads from a queue or a register is hostile. A device that meets a chain it cannot
//! serve answers as its section of virtio 1.2 says, or asks for `DEVICE_NEEDS_RESET` by
//! [`Interrupt::needs_reset`]; it never ends the VMM.

use super::queue::{ActiveQueue, BadSettings, Positions};
use crate::GuestMemory;
use crate::balloon::BalloonState;
use crate::counters::Counters;
use crate::fs::ShareState;
use crate::mem::MemState;
use crate::net::NetState;
use crate::state::Foreign;
use crate::vsock::VsockState;
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, PoisonError};
use vmm_sys_util::eventfd::EventFd;

/// How a device tells the driver that something happened. Implemented by the transport; cheap and safe to
/// call from any thread, also after a reset (then nothing happens).
pub trait Interrupt: Send + Sync {
    /// Used buffers are waiting in `queue` (virtio 1.2 section 2.7.8). The caller has already asked the
    /// queue whether the driver wants to know.
    fn used(&self, queue: u16);
    /// The device's configuration space changed (section 2.5).
    fn config_changed(&self);
    /// The device is in trouble that only a reset mends: sets DEVICE_NEEDS_RESET (section 2.1.2).
    fn needs_reset(&self);
}

/// The way to the driver while there is one, for what outlives an activation.
#[derive(Default)]
pub(crate) struct Listener(Mutex<Option<Arc<dyn Interrupt>>>);

impl Listener {
    /// To be told from now on.
    pub(crate) fn set(&self, interrupt: Option<Arc<dyn Interrupt>>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = interrupt;
    }

    /// Tells the driver, if there is one, that the configuration space changed.
    pub(crate) fn config_changed(&self) {
        let interrupt = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        if let Some(interrupt) = interrupt {
            interrupt.config_changed();
        }
    }
}

/// What a device gets when the driver sets DRIVER_OK.
pub struct Activation {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The negotiated feature bits, device-specific and transport ones.
    pub features: u64,
    /// The enabled queues in order; a queue that the driver left disabled is `None`.
    pub queues: Vec<Option<ActiveQueue>>,
    /// The way back to the driver.
    pub interrupt: Arc<dyn Interrupt>,
}

/// Why a device could not be activated or reset; the transport then marks it DEVICE_NEEDS_RESET or FAILED.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver did not enable a queue that the device cannot do without.
    #[error("queue {0} is not enabled")]
    QueueMissing(u16),
    /// What the driver set for a queue is no queue.
    #[error("queue {index} cannot be used")]
    Queue {
        /// Which queue.
        index: u16,
        /// What is wrong with it.
        #[source]
        cause: BadSettings,
    },
    /// A host resource could not be had.
    #[error("cannot {what}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        #[source]
        cause: std::io::Error,
    },
}

/// A device does not stand still yet: the host is at work on its requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the host has not done what it was asked for")]
pub struct Busy;

/// Why state cannot be taken over.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// It is not one of this device.
    #[error(transparent)]
    Foreign(#[from] Foreign),
    /// It says that the guest had mounted the share. The host's files behind its names are not part of it.
    #[error("the guest had mounted share {0:?}, and a mounted share cannot be taken over")]
    Mounted(String),
    /// The host refused memory that the guest had.
    #[error("cannot give the guest the memory that it had plugged")]
    Memory(#[source] std::io::Error),
}

/// What a device knows beyond its transport and the positions in its queues: plain data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceData {
    /// Nothing.
    Nothing,
    /// A vsock device.
    Vsock(VsockState),
    /// A share.
    Share(ShareState),
    /// A network card.
    Net(NetState),
    /// A balloon.
    Balloon(BalloonState),
    /// A memory device.
    Mem(MemState),
}

/// A virtio device behind the transport.
///
/// The transport never calls `activate` twice without a completed `reset` between. A `reset` also comes where the queues were
/// refused before the device heard of an activation.
pub trait VirtioDevice: Send {
    /// Device type (virtio 1.2 section 5).
    fn device_type(&self) -> u16;

    /// The largest size of each queue; its length is the number of queues. Powers of two, at most 32768.
    fn queue_sizes(&self) -> &[u16];

    /// What its queues are kicked by, in their order, if the device was made with that; else the transport makes an eventfd for each.
    fn kicks(&self) -> Option<Vec<Arc<EventFd>>> {
        None
    }

    /// The device-specific feature bits offered (bits 0 to 23 and 50 to 127 as far as u64 goes). The
    /// transport adds VIRTIO_F_VERSION_1, VIRTIO_F_INDIRECT_DESC and VIRTIO_F_EVENT_IDX.
    fn features(&self) -> u64;

    /// The device-specific configuration space, read as plain little-endian bytes; the transport cuts out
    /// what the driver asked for and answers zero beyond its end.
    fn config(&self) -> Vec<u8>;

    /// What the device counts, for as long as it lives.
    fn counters(&self) -> Arc<dyn Counters> {
        Arc::new(())
    }

    /// The driver writes one access into the configuration space, at any offset, also beyond its end. Most devices have nothing there
    /// that is the driver's to write.
    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    /// Takes live queues. Kicks arrive on each queue's `kick` eventfd, which the device watches on its own
    /// thread or on the event loop it was built for.
    ///
    /// Each kick is one event ([`crate::event::Interest::KICK`]): nobody takes it away, also of a queue that the device has given up.
    ///
    /// # Errors
    /// The device cannot work; the transport sets DEVICE_NEEDS_RESET.
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError>;

    /// Lets go of the queues as [`VirtioDevice::reset`] does, but forgets nothing: whatever was taken off a queue is answered or will be
    /// taken again. A device that is not active has nothing to let go of. Called by the event loop's thread, and never waits.
    ///
    /// # Errors
    /// [`Busy`]: what was taken off a queue is under way. Nothing more is taken, and `idle` is signalled when it is worth asking again.
    fn suspend(&mut self, idle: &Arc<EventFd>) -> Result<Positions, Busy>;

    /// After [`Busy`]: it is asked no more, and works on as before. Each queue is kicked afterwards.
    fn keep_on(&mut self) {}

    /// Takes the queues back after [`VirtioDevice::suspend`], or after [`VirtioDevice::restore`] those of another process, and goes on
    /// where they stand. Each of them is kicked afterwards.
    ///
    /// # Errors
    /// As of [`VirtioDevice::activate`].
    fn resume(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.activate(activation)
    }

    /// What it knows beyond its transport, while it is suspended or not active.
    fn data(&self) -> DeviceData {
        DeviceData::Nothing
    }

    /// Takes over what a device of its kind knew. It has not been activated yet.
    ///
    /// # Errors
    /// That device was of another kind, or of another configuration.
    fn restore(&mut self, data: &DeviceData) -> Result<(), RestoreError> {
        match data {
            DeviceData::Nothing => Ok(()),
            _ => Err(Foreign("kind").into()),
        }
    }

    /// Stops all work and returns only when nothing of the device touches guest memory any more.
    ///
    /// # Errors
    /// The device cannot be used again; the transport keeps it FAILED.
    fn reset(&mut self) -> Result<(), DeviceError>;
}
